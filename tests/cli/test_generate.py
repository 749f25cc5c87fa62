"""`deltaw generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.cli import main, show
from tests.cli.conftest import RECORDS, Run
from tests.conftest import ROOT, byte_llama
from tests.data.chats.templates import QWEN2
from tests.data.conftest import CHATML, tiny_tokenizer


def test_prompt_file_and_standard_input_give_the_same_completions(place: Path, tmp_path: Path, run: Run) -> None:
    words = ["generate", place / "model", "--adapter", place / "run" / "adapter", "--max-new-tokens", 6]
    one = run(*words, "red and blue?").stdout.rstrip("\n")
    assert run(*words, "--file", place / "data.jsonl", "--out", tmp_path / "o.jsonl").returncode == 0
    pairs = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [p["prompt"] for p in pairs] == [r["prompt"] for r in RECORDS]
    assert next(p["completion"] for p in pairs if p["prompt"] == "red and blue?") == one
    lines = [json.loads(line) for line in run(*words, stdin="red and blue?\nblue and red?\n").stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["red and blue?", "blue and red?"] and lines[0]["completion"] == one


def test_a_bare_prompt_is_put_as_the_model_was_made_for(place: Path, run: Run) -> None:
    """In its chat template, unless the adapter was trained without it, or the user says so."""
    words = ["generate", place / "model", "red and blue?", "--max-new-tokens", 6]
    bare = run(*words)
    assert "put into the model's chat template; --template plain" in bare.stderr
    assert bare.stdout == run(*words, "--template", "chat").stdout
    plain = run(*words, "--template", "plain")
    assert "chat template" not in plain.stderr and plain.stdout != bare.stdout
    adapter = ["--adapter", place / "run" / "adapter"]  # which was trained on prompts without a template
    with_adapter = run(*words, *adapter)
    assert "chat template" not in with_adapter.stderr
    assert with_adapter.stdout == run(*words, *adapter, "--template", "plain").stdout


@pytest.mark.parametrize(("answer", "what"), [("", "nothing: it ended at once"), (" \n", "nothing but white space")])
def test_a_model_that_says_nothing_is_told(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, what: str
) -> None:
    from deltaw.training.tasks import Causal

    monkeypatch.setattr(Causal, "answer", lambda *given: [answer])
    said = run("generate", place / "model", "red and blue?")
    assert said.returncode == 0 and f"The model said {what}. Try --template plain" in said.stderr


def test_one_prompt_as_json(place: Path, run: Run) -> None:
    words = ["generate", place / "model", "red and blue?", "--max-new-tokens", 6]
    (line,) = run(*words, "--json").stdout.splitlines()
    assert json.loads(line) == {"prompt": "red and blue?", "completion": run(*words).stdout[:-1]}


TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}},
}


def test_lines_of_records_and_of_messages_are_answered_in_order(place: Path, run: Run) -> None:
    asked = ["red and blue?", "blue and red and green?", "white?", "red and blue?"]
    prompts: list[dict[str, object]] = [{"prompt": text} for text in asked]
    messages: list[dict[str, object]] = [{"messages": [{"role": "user", "content": text}]} for text in asked]
    words = ["generate", place / "model", "--max-new-tokens", 5, "--batch", 3, "--json"]
    alone = [json.loads(run(*words, text).stdout) for text in asked[:3]]
    for lines in (prompts, messages):
        answers = run(*words, stdin="\n".join(map(json.dumps, lines)) + "\n\n")
        assert answers.returncode == 0, answers.stderr
        assert [json.loads(line) for line in answers.stdout.splitlines()] == [*alone, alone[0]]


def test_a_broken_line_is_named_and_nothing_is_generated(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ['{"prompt": "red?"}', '{"prompt": "blue?"', "", '{"messages": []}', '{"prompt": 3}']
    ended = run("generate", place / "model", "--max-new-tokens", 2, stdin="\n".join(lines))
    assert ended.returncode == 6 and not ended.stdout
    for line in (2, 4, 5):
        assert f"standard input:{line}: " in ended.stderr


def test_a_prompt_of_several_lines_comes_from_a_file_or_from_standard_input(
    place: Path, tmp_path: Path, run: Run
) -> None:
    text = "red and blue?\n\nblue and red?"
    (tmp_path / "prompt.md").write_text(text + "\n")
    words = ["generate", place / "model", "--max-new-tokens", 5, "--json"]
    of_file = json.loads(run(*words, "--prompt-file", tmp_path / "prompt.md").stdout)
    assert of_file["prompt"] == text and of_file == json.loads(run(*words, "-", stdin=text + "\n").stdout)
    assert of_file == json.loads(run(*words, text).stdout)
    assert json.loads(run(*words, "-", stdin='{"prompt": "x"}').stdout)["prompt"] == '{"prompt": "x"}'
    both = run(*words, "hi", "--prompt-file", tmp_path / "prompt.md")
    assert both.returncode == 2 and "not in PROMPT and --prompt-file" in both.stderr
    none = run(*words, "--prompt-file", tmp_path / "nothing.txt")
    assert none.returncode == 6 and "nothing.txt cannot be read" in none.stderr


def test_an_answer_is_shown_as_it_comes(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    shown = show.piece
    monkeypatch.setattr(show, "piece", lambda text: (pieces.append(text), shown(text)))
    words = ["generate", place / "model", "red and blue?", "--max-new-tokens", 24, "--seed", 3, "--temperature", 1.5]
    whole = run(*words)
    assert not pieces  # a pipe is no terminal
    streamed = run(*words, "--stream", "on")
    assert streamed.stdout == whole.stdout and len(pieces) > 1 and "".join(pieces) == whole.stdout.removesuffix("\n")


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--json"], "--json"), (["--beams", 2], "--beams"), (["--out", "x.jsonl"], "--out")],
)
def test_what_is_told_whole_cannot_be_streamed(place: Path, run: Run, more: list[object], said: str) -> None:
    ended = run("generate", place / "model", "hi", "--stream", "on", *more)
    assert ended.returncode == 2 and said in ended.stderr
    ended = run("generate", place / "model", "--stream", "on", stdin="a\nb\n")
    assert ended.returncode == 2 and "there are 2 prompts" in ended.stderr


def model_with(folder: Path, template: str) -> Path:
    tokenizer = tiny_tokenizer(template)
    byte_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_tools_are_rendered_or_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.training import tasks

    prompts: list[str] = []

    def read(model: object, tokenizer: object, ids: list[list[int]], *rest: object, **more: object) -> list[str]:
        prompts.extend(tokenizer.decode(row) for row in ids)  # type: ignore[attr-defined]
        return ["an answer"] * len(ids)

    monkeypatch.setattr(tasks, "generate", read)
    request = {"messages": [{"role": "user", "content": "Weather in Oslo?"}], "tools": [TOOL]}
    asked = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n" + json.dumps(request)
    ended = run("generate", model_with(tmp_path / "qwen", QWEN2), "--json", stdin=asked)
    assert ended.returncode == 0, ended.stderr
    assert "get_weather" in prompts[1] and "Weather in Oslo?" in prompts[1] and "get_weather" not in prompts[0]
    ended = run("generate", model_with(tmp_path / "plain", CHATML), stdin=asked)
    assert ended.returncode == 6 and len(prompts) == 2
    assert "standard input:2: the chat template does not render the tools (get_weather)" in ended.stderr


@pytest.mark.slow
def test_smollm2_streams_what_it_says_at_once(run: Run) -> None:
    folder = ROOT / ".cache" / "smollm2"
    if not folder.is_dir():
        pytest.skip("SmolLM2 is made by examples/quickstart")
    words = ["generate", folder, "Count from one to five, in words.", "--max-new-tokens", 16]
    streamed, whole = run(*words, "--stream", "on"), run(*words)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == whole.stdout and len(whole.stdout.split()) > 3


def test_the_most_records_bound_a_file_of_prompts(place: Path, run: Run) -> None:
    """--max-records was taken and did nothing."""
    done = run("generate", place / "model", "--file", place / "data.jsonl", "--max-records", 2, "--max-new-tokens", 2)
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == [r["prompt"] for r in RECORDS[:2]]


def test_settings_of_training_are_no_flags_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "model", "Hi", "--max-length", "5", "--turns", "last"]) == 2
    said = capsys.readouterr().err
    assert "unknown flag --max-length" in said and "unknown flag --turns" in said
    assert main(["generate", "--help"]) == 0
    assert "Take the first so many prompts" in capsys.readouterr().out
