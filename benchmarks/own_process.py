"""Run a measurement in a process of its own, so that its memory is its own too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def run(script: str, told: dict[str, Any]) -> dict[str, Any]:
    """What `script --worker TOLD` prints as its last line, both JSON."""
    words = [sys.executable, script, "--worker", json.dumps(told)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | _QUIET)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def held(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
