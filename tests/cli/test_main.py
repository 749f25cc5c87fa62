"""Words of a command line → a command, its exit code and messages, in the process and in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.cli import main
from tests.cli.conftest import Run


def process(*words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with two prompts in a pipe."""
    arguments = [sys.executable, "-m", "deltaw", *words]
    return subprocess.run(arguments, capture_output=True, text=True, input="red?\nblue?\n", check=False)


def test_a_process_ends_with_the_code_and_message_of_its_error() -> None:
    ended = process("generate", "MODEL", "--adaptr", "FOLDER")
    assert ended.returncode == 2 and "did you mean '--adapter'" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_process_reads_prompts_from_a_pipe(place: Path) -> None:
    ended = process("generate", str(place / "model"), "--max-new-tokens", "4")
    assert ended.returncode == 0, ended.stderr
    assert [json.loads(line)["prompt"] for line in ended.stdout.splitlines()] == ["red?", "blue?"]


REFUSALS = {
    "unknown flag": (["train", "M", "D", "--lrr", "1"], 2, "unknown flag --lrr (did you mean '--lr'"),
    "unknown flag first": (["train", "--rnak", "4", "M", "D"], 2, "unknown flag --rnak (did you mean '--rank'"),
    "argument as flag": (["train", "--model", "M", "D"], 2, "--model is no flag: MODEL stands by itself"),
    "unknown command": (["trian"], 2, "did you mean 'train'"),
    "value": (["train", "{model}", "{data}", "--lr", "-1", "--batch", "0"], 2, "lr is -1"),
    "no model": (["train", "./nothing-here", "{data}"], 5, "There is no model at ./nothing-here"),
    "no data": (["train", "{model}", "nothing.jsonl"], 6, "nothing.jsonl"),
    "targets": (["train", "{model}", "{data}", "--targets", "q_prj", "--out", "{tmp}/x"], 3, "did you mean 'q_proj'"),
    "run folder": (["train", "{model}", "{data}", "--out", "{run}"], 2, "--overwrite"),
    "adapter as model": (["generate", "{run}/adapter", "hi"], 5, "it is an adapter of"),
    "model as adapter": (["generate", "{model}", "hi", "--adapter", "{model}"], 5, "not an adapter folder"),
    "metric": (["eval", "{model}", "{data}", "--metrics", "blue"], 2, "did you mean 'bleu'"),
    "no prompt": (["generate", "{model}"], 6, "There is no prompt"),
    "prompts not text": (["generate", "{model}", "--file", "{tmp}/bytes.txt"], 6, "cannot be read as UTF-8 text"),
    "out under a file": (["generate", "{model}", "hi", "--out", "{data}/x"], 5, "data.jsonl is no folder"),
    "out is a folder": (["eval", "{model}", "{data}", "--out", "{run}"], 5, "is a folder; name a file"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusals_have_a_message_a_code_and_no_traceback(place: Path, tmp_path: Path, run: Run, case: str) -> None:
    words, code, message = REFUSALS[case]
    names = {"model": place / "model", "data": place / "data.jsonl", "run": place / "run", "tmp": tmp_path}
    (tmp_path / "bytes.txt").write_bytes(b"a prompt\n\xff\n")
    done = run(*(w.format(**names) for w in words))
    assert done.returncode == code, done.stderr
    assert message in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_yaml_with_unknown_keys_and_wrong_types_names_them_all(place: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.yaml").write_text(
        f"model: {place / 'model'}\ndata: {place / 'data.jsonl'}\nlearning_rat: 1\nrnk: 4\nbatch: many\n"
    )
    done = run("train", "--config", tmp_path / "c.yaml")
    assert done.returncode == 2
    for part in (
        "unknown key 'learning_rat'",
        "unknown key 'rnk' (did you mean 'rank'",
        "batch is 'many'; it must be a whole number",
    ):
        assert part in done.stderr


def test_flags_win_over_yaml(place: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rank: 2\nsteps: 2\nlr: 1e-3\nsamples: 0\n")
    words = ["train", str(place / "model"), str(place / "data.jsonl"), "--config", str(tmp_path / "c.yaml")]
    assert main([*words, "--rank", "3", "--out", str(tmp_path / "run")]) == 0
    from deltaw.files.formats.peft import read

    assert {A.shape[0] for A, _ in read(tmp_path / "run" / "adapter").factors.values()} == {3}


def test_a_flag_of_another_method_is_named_as_its(place: Path, run: Run) -> None:
    done = run("train", place / "model", place / "data.jsonl", "--method", "bitfit", "--rank", "4", "--size", "3")
    assert done.returncode == 2
    assert "--rank (a setting of --method lora or dora)" in done.stderr
    assert "--size (a setting of --method bottleneck)" in done.stderr
    done = run("train", place / "model", place / "data.jsonl", "--method", "bottlneck")
    assert done.returncode == 2 and "did you mean 'bottleneck'" in done.stderr
