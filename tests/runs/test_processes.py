"""Runs of several processes take the steps of one, end together, and are resumed by as many or by others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltaw
from deltaw import TrainConfig
from deltaw.errors import ConfigError
from deltaw.methods.registry import method_class
from tests.layers.processes.conftest import ended, start
from tests.runs.conftest import RECORDS

STEPS = 6
EVERY: dict[str, Any] = {
    "steps": STEPS, "batch": 4, "lr": 0.01, "eval_every": 3, "log_every": 1, "samples": 0, "dtype": "float32", "valid_share": 0.2,
}  # fmt: skip
# Name → method, its settings, the run's
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("lora", {}, {}),
    "a part of the batch at a time, unevenly dealt": ("lora", {"alpha": 4}, {"batch": 7, "micro_batch": 2}),
    "a budget of tokens": ("lora", {}, {"batch_tokens": 96}),
    "groups": ("lora", {}, {"batch": 8, "share": "group"}),
    "clipped, two rates, stopped early": ("lora", {}, {"clip": 0.1, "lr_ratio": 4.0, "patience": 1}),
    "activations computed again": ("lora", {"targets": "q,v"}, {"gradient_checkpointing": True}),
    "DoRA": ("dora", {}, {}),
    "(IA)³": ("ia3", {}, {}),
    "biases": ("bitfit", {"add": True}, {}),
    "a module trained whole": ("lora", {"whole": "model.norm"}, {}),
}

SCRIPT = """
import json, sys
import deltaw
from deltaw.methods.registry import method_class
from deltaw.layers.processes.ranks import joined

with joined() as ranks:
    for out, method, settings, config in json.loads(sys.argv[1]):
        method = method_class(method)(**settings)
        result = deltaw.train("model", "data.jsonl", deltaw.TrainConfig(out=out, **config), method=method)
        heard = [event.to_json()["event"] for event in result.events]
        assert result.adapter.is_dir() and heard[0] == "start" and deltaw.adapters(result.model).active == "default"
"""


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("valid_loss")) for line in lines if line["event"] in ("step", "eval")]


def assert_alike(one: Path, other: Path) -> None:
    """Assert that two runs had the same losses to 1e-5, and came to the same adapter to 1e-5 of what it learned."""
    first, second = losses(one), losses(other)
    assert len(first) == len(second) > STEPS // 2
    assert second == pytest.approx(first, rel=1e-5)
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    difference = sum(float((a[key] - b[key]).double().square().sum()) for key in a) ** 0.5
    size = sum(float(a[key].double().square().sum()) for key in a) ** 0.5
    assert difference <= 1e-5 * size


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """The cases' runs by this process, each in a folder named for it."""
    folder = place / "alone"
    before = Path.cwd()
    os.chdir(place)
    try:
        for name, (method, settings, config) in CASES.items():
            asked = TrainConfig(out=str(folder / name), **EVERY | config)
            deltaw.train("model", "data.jsonl", asked, method=method_class(method)(**settings), progress=False)
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize(
    ("count", "shard"),
    [
        (2, "off"),
        (2, "full"),
        pytest.param(4, "off", marks=pytest.mark.slow),
        pytest.param(4, "full", marks=pytest.mark.slow),
    ],
)
def test_several_processes_take_the_steps_of_one(place: Path, alone: Path, count: int, shard: str) -> None:
    cases = {name: case for name, case in CASES.items() if shard == "off" or "share" not in case[2]}
    folder = f"by {count}, {shard}"
    asked = [
        (f"{folder}/{name}", method, settings, EVERY | config | {"shard": shard})
        for name, (method, settings, config) in cases.items()
    ]
    for code, out, err in ended(start(count, ["-c", SCRIPT, json.dumps(asked)], place)):
        assert code == 0, err
        assert out == ""
    for name in cases:
        assert_alike(alone / name, place / folder / name)
        assert not list((place / folder / name).glob(".*"))


# --- ends -----------------------------------------------------------------------------------------------------------

LONG = ["--steps", "60", "--batch", "4", "--lr", "0.01", "--eval-every", "20", "--log-every", "5", "--samples", "0", "--save-every", "2"]  # fmt: skip
TRAIN = ["-m", "deltaw", "train", "model", "data.jsonl", "--dtype", "float32", *LONG]


def wait_for(path: Path, text: str, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until a file holds a text; raise where a process ends before."""
    until = time.monotonic() + 120
    while not (path.exists() and text in path.read_text()):
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    """The long run by two processes, without a break."""
    codes = [code for code, _, _ in ended(start(2, [*TRAIN, "--out", "unbroken"], place))]
    assert codes == [0, 0]
    return place / "unbroken"


def resume(folder: Path, out: str, count: int) -> str:
    """Resume a run by so many processes; return what the first one said."""
    outcomes = ended(start(count, ["-m", "deltaw", "train", "--resume", out], folder))
    assert [code for code, _, _ in outcomes] == [0] * count, outcomes
    return outcomes[0][2]


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["off", "full"])
def test_a_process_that_is_killed_ends_all_and_the_run_goes_on_from_its_state(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    out = f"killed {shard}"
    processes = start(2, [*TRAIN, "--shard", shard, "--out", out], place)
    wait_for(place / out / "log.jsonl", '"step": 20', processes)
    processes[1].kill()
    (code, _, err), (killed, _, _) = ended(processes)
    assert (code, killed) == (7, -signal.SIGKILL)
    assert err.count("Another process of this run has ended") == 1 and f"deltaw train --resume '{out}'" in err
    assert "GLHF" not in err and "gloo" not in err and "Traceback" not in err
    monkeypatch.chdir(place)
    if shard == "off":
        deltaw.train(resume=out, progress=False)
    else:
        with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
            deltaw.train(resume=out, progress=False)
        resume(place, out, 3)
    assert_alike(unbroken, place / out)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["off", "full"])
def test_a_signal_to_any_process_stops_all_after_one_step_and_the_run_goes_on_in_as_many_or_in_others(
    place: Path, unbroken: Path, shard: str
) -> None:
    out = f"stopped {shard}"
    processes = start(2, [*TRAIN, "--shard", shard, "--out", out], place)
    wait_for(place / out / "log.jsonl", '"step": 10', processes)
    processes[1].send_signal(signal.SIGTERM)
    outcomes = ended(processes)
    assert all(code in (130, 143) for code, _, _ in outcomes)
    assert sum(err.count("Stopped after step") for _, _, err in outcomes) == 1
    shutil.copytree(place / out, place / f"{out} too")
    said = resume(place, out, 2)
    assert "processes 2 then" not in said
    if shard == "off":
        assert "processes" not in said
        assert adapter(place / out) == adapter(unbroken)
    assert_alike(unbroken, place / out)
    assert "processes 2 then, 3 now" in resume(place, f"{out} too", 3)
    assert_alike(unbroken, place / f"{out} too")


def adapter(run: Path) -> dict[str, bytes]:
    """The bytes of each trained tensor."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


ERRORS: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "fewer records than processes": (["model", "data.jsonl", "--batch", "1"], {}, 2, "batch is 1"),
    "data that is not there": (["model", "nothing.jsonl"], {}, 6, "nothing.jsonl: no such file"),
    "accelerate's FSDP": (["model", "data.jsonl"], {"ACCELERATE_USE_FSDP": "true"}, 2, "--use_fsdp"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(ERRORS)]
)
def test_an_error_is_told_once_and_nothing_is_written(place: Path, case: str) -> None:
    words, env, code, message = ERRORS[case]
    outcomes = ended(start(2, ["-m", "deltaw", "train", *words, "--out", "refused"], place, **env))
    assert [code for code, _, _ in outcomes] == [code, code]
    assert sum(err.count(message) for _, _, err in outcomes) == 1, outcomes
    assert not (place / "refused").exists()


@pytest.mark.slow
def test_a_base_in_parts_answers_samples_and_is_scored_by_all(place: Path, unbroken: Path) -> None:
    words = [
        "--steps",
        "4",
        "--batch",
        "3",
        "--micro-batch",
        "1",
        "--samples",
        "2",
        "--samples-during",
        "1",
        "--eval-every",
        "2",
    ]
    for shard in ("off", "full"):
        outcomes = ended(start(2, [*TRAIN[:7], *words, "--shard", shard, "--out", f"samples {shard}"], place))
        assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    off, full = (json.loads((place / f"samples {shard}" / "result.json").read_text()) for shard in ("off", "full"))
    assert full["held_out"]["scores"]["loss"]["value"] == pytest.approx(
        off["held_out"]["scores"]["loss"]["value"], rel=1e-5
    )
    assert full["relative_norm"] == pytest.approx(off["relative_norm"], rel=1e-4) and full["merge"]["rows"]
    logs = [(place / f"samples {shard}" / "log.jsonl").read_text() for shard in ("off", "full")]
    said = [[json.loads(line) for line in log.splitlines() if '"event": "answers"' in line] for log in logs]
    assert [one["answers"] for one in said[0]] == [one["answers"] for one in said[1]] and len(said[0]) == 3


REFUSED = {
    "one process": (1, [], "start them with torchrun"),
    "int8 products": (2, ["--frozen-dtype", "int8"], "leave one of the two out"),
    "groups": (2, ["--share", "group"], "leave one out"),
    "all weights": (2, ["--method", "full"], "stay whole"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_dealt_out_is_refused_before_anything_is_written(place: Path, case: str) -> None:
    count, words, message = REFUSED[case]
    outcomes = ended(start(count, [*TRAIN, *words, "--shard", "full", "--out", "undealt"], place))
    assert [code for code, _, _ in outcomes] == [2] * count
    assert sum(err.count(message) for _, _, err in outcomes) == 1, outcomes
    assert not (place / "undealt" / "log.jsonl").exists()


@pytest.mark.slow
def test_processes_with_other_records_are_refused(place: Path) -> None:
    script = SCRIPT.replace('"data.jsonl"', '["data.jsonl", "other.jsonl"][ranks.rank]')
    (place / "other.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS[::-1]))
    asked = [("differs", "lora", {}, EVERY)]
    outcomes = ended(start(2, ["-c", script, json.dumps(asked)], place))
    assert [code for code, _, _ in outcomes] == [1, 1]
    assert all("process 1: other held_out, records" in err for _, _, err in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["off", "full"])
def test_a_loss_that_is_not_finite_is_told_once(place: Path, shard: str) -> None:
    words = [
        *TRAIN,
        "--shard",
        shard,
        "--out",
        f"diverged {shard}",
        "--lr",
        "1e30",
        "--schedule",
        "constant",
        "--warmup",
        "0",
    ]
    outcomes = ended(start(2, words, place))
    assert [code for code, _, _ in outcomes] == [7, 7]
    assert sum(err.count("training cannot go on") for _, _, err in outcomes) == 1


@pytest.mark.slow
def test_launchers_start_it(place: Path) -> None:
    beside = Path(sys.executable).parent
    words = ["-m", "deltaw", "train", "model", "data.jsonl", "--steps", "2", "--samples", "0", "--out"]
    commands: Mapping[str, list[str]] = {
        "torchrun": [str(beside / "torchrun"), "--nproc-per-node", "2"],
        "accelerate": [str(beside / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"],
    }  # fmt: skip
    for name, launch in commands.items():
        if not Path(launch[0]).exists():
            continue
        done = subprocess.run([*launch, *words, name], cwd=place, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads((place / name / "result.json").read_text())["processes"] == 2
