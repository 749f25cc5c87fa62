"""A bounded part of the crash campaign (benchmarks/crashes.py): kills and full disks leave the old output or the new one.

tests/runs/test_resume.py has the trainings.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "crashes.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="its commands are forks")
def test_no_kill_and_no_full_disk_leaves_anything_half_made() -> None:
    kinds = "merge --reversible,save"
    words = [sys.executable, str(SCRIPT), "--dry", "--kills", "8", "--disks", "6", "--only", kinds]
    ended = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert "'kills': 8, 'hit'" in ended.stdout
