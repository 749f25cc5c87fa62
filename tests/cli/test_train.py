"""`deltaw train`, and what its adapters are good for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaw.cli import main


def test_a_run_folder_has_adapter_settings_log_result_and_report(place: Path) -> None:
    names = {"adapter", "config.yaml", "log.jsonl", "result.json", "report.html", "state.safetensors"}
    assert {p.name for p in (place / "run").iterdir()} == names


def test_a_runs_config_reproduces_its_bits(place: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(place / "run" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, second = (p / "adapter" / "adapter_model.safetensors" for p in (place / "run", tmp_path / "again"))
    from safetensors.torch import load_file

    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "method",
    ["dora", "bitfit", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bottleneck", "prefix", "ia3", "full"))],
)
def test_every_method_trains_is_used_and_shown(
    method: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = str(place / "model"), str(place / "data.jsonl"), tmp_path / "run"
    words = ["train", model, data, "--out", str(out), "--steps", "12", "--samples", "0"]
    words += ["--lr", "0.2" if method == "ia3" else "0.02"]
    assert main([*words, "--method", method, *(["--add"] if method == "bitfit" else [])]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["loop"]["last_loss"] < result["loop"]["first_loss"]
    again = ["train", "--config", str(out / "config.yaml"), "--out", str(tmp_path / "again"), "--steps", "2"]
    assert main(again) == 0
    capsys.readouterr()
    adapter = str(out / "adapter")
    assert main(["inspect", adapter]) == 0
    assert method in capsys.readouterr().out or method == "dora"
    assert main(["eval", model, data, "--adapter", adapter, "--metrics", "loss"]) == 0
    merged = str(tmp_path / "merged")
    code = main(["merge", model, adapter, "-o", merged])
    assert code == (4 if method in ("bottleneck", "prefix", "bitfit") else 0)
    assert Path(merged).is_dir() == (code == 0)
    said = capsys.readouterr().err
    assert code == 0 or "no weight can hold" in said or "the base has no" in said
