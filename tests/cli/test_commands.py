"""The command line as a user meets it, on a tiny model in a folder, with its exit codes and messages. One test is of a process of
its own; the others call what it calls."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.cli import main, show
from tests.conftest import byte_llama, fill, tiny_llama
from tests.data.conftest import CHATML, tiny_tokenizer

WORDS = ["red", "blue", "green", "white"]
RECORDS = [{"prompt": f"{a} and {b}?", "completion": f" {b} {a}"} for a in WORDS for b in WORDS if a != b]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, data, and one finished run."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer(CHATML)
    byte_llama(tokenizer, tie_word_embeddings=True).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    words = ["train", str(folder / "model"), str(folder / "data.jsonl"), "--out", str(folder / "run")]
    assert main([*words, "--steps", "6", "--lr", "0.02", "--rank", "4", "--alpha", "6", "--separator", "#"]) == 0
    return folder


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """One command, with what it is told at the terminal."""

    def of(*words: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as ended:  # tyro's, after its own message
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return of


def test_a_process_of_its_own(place: Path) -> None:
    """Prompts come in by a pipe; the exit code and the message go out."""
    model = str(place / "model")

    def process(*words: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "deltaw", *words]
        return subprocess.run(arguments, capture_output=True, text=True, input="red?\nblue?\n", check=False)

    done = process("generate", model, "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["red?", "blue?"]
    done = process("generate", model, "--adaptr", model)
    assert done.returncode == 2 and "did you mean '--adapter'" in done.stderr and "Traceback" not in done.stderr


def test_train_wrote_its_run(place: Path) -> None:
    names = {"adapter", "config.yaml", "log.jsonl", "result.json", "report.html"}
    assert {p.name for p in (place / "run").iterdir()} == names


def test_a_runs_config_reproduces_it(place: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(place / "run" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, second = (p / "adapter" / "adapter_model.safetensors" for p in (place / "run", tmp_path / "again"))
    from safetensors.torch import load_file

    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_generate_from_prompt_file_and_stdin(place: Path, tmp_path: Path, run: Run) -> None:
    words = ["generate", place / "model", "--adapter", place / "run" / "adapter", "--max-new-tokens", 6]
    one = run(*words, "red and blue?").stdout.rstrip("\n")
    assert run(*words, "--file", place / "data.jsonl", "--out", tmp_path / "o.jsonl").returncode == 0
    pairs = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [p["prompt"] for p in pairs] == [r["prompt"] for r in RECORDS]
    assert next(p["completion"] for p in pairs if p["prompt"] == "red and blue?") == one
    lines = [json.loads(line) for line in run(*words, stdin="red and blue?\nblue and red?\n").stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["red and blue?", "blue and red?"] and lines[0]["completion"] == one


def test_generate_uses_the_prompt_settings_of_training(place: Path) -> None:
    from deltaw.cli.opening import as_trained
    from deltaw.config import DataConfig

    adapter = str(place / "run" / "adapter")
    assert as_trained(DataConfig(), adapter).separator == "#"
    assert as_trained(DataConfig(separator="!"), adapter).separator == "!"


def test_eval_shows_base_and_adapter(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(place / "model"), str(place / "data.jsonl"), "--adapter", str(place / "run" / "adapter")]
    assert main([*words, "--max-new-tokens", "6", "--out", str(tmp_path / "scores.json")]) == 0
    text = capsys.readouterr().out
    assert "base" in text and "adapter" in text and "rouge l" in text
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["adapter"]["scores"]["loss"]["value"] < found["base"]["scores"]["loss"]["value"]
    loss = found["base"]["scores"]["loss"]
    assert loss["low"] < loss["value"] < loss["high"]


def test_eval_of_texts_scores_what_texts_allow(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{w} and so on"}) + "\n" for w in WORDS))
    assert main(["eval", str(place / "model"), str(tmp_path / "texts.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "perplexity" in text and "bleu" not in text
    assert main(["eval", str(place / "model"), str(tmp_path / "texts.jsonl"), "--metrics", "bleu"]) == 6
    assert "has no prompt" in capsys.readouterr().err


def test_an_adapter_of_chats_wraps_a_plain_prompt_as_a_chat(place: Path, tmp_path: Path) -> None:
    from deltaw.cli.opening import as_trained
    from deltaw.config import DataConfig

    turns = [[{"role": "user", "content": w}, {"role": "assistant", "content": "yes"}] for w in WORDS]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    words = ["train", str(place / "model"), str(tmp_path / "chats.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*words, "--steps", "1"]) == 0
    assert as_trained(DataConfig(), str(tmp_path / "run" / "adapter")).template == "chat"
    assert as_trained(DataConfig(), str(place / "run" / "adapter")).template == "plain"


def test_merge_gives_an_ordinary_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import deltaw

    out = tmp_path / "merged"
    assert main(["merge", str(place / "model"), str(place / "run" / "adapter"), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Merge report" in printed and "model.layers.*.mlp.up_proj" in printed
    merged: Any = AutoModelForCausalLM.from_pretrained(out)
    base: Any = AutoModelForCausalLM.from_pretrained(place / "model")
    assert type(merged) is type(base) and list(merged.state_dict()) == list(base.state_dict())
    assert (out / "tokenizer.json").is_file()
    assert not any("deltaw" in p.read_text(errors="ignore") for p in out.glob("*.json"))
    deltaw.load(base, place / "run" / "adapter")
    deltaw.merge(base)
    weights = dict(base.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in merged.named_parameters())
    assert main(["merge", str(place / "model"), str(place / "run" / "adapter"), "-o", str(out)]) == 2


def test_a_reversible_merge_gives_the_bases_bytes_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = str(place / "model"), str(place / "run" / "adapter")
    merged, back = str(tmp_path / "merged"), str(tmp_path / "back")
    assert main(["merge", model, adapter, "-o", merged, "--reversible", "--check", "off"]) == 0
    assert "Correction file" in (printed := capsys.readouterr().out) and "--check on" in printed
    assert main(["unmerge", merged, adapter, "-o", back]) == 0
    assert "sha256 is the same" in capsys.readouterr().out
    names = {p.name for p in Path(model).iterdir()}
    assert {p.name for p in Path(back).iterdir()} == names
    assert all((Path(back) / n).read_bytes() == (Path(model) / n).read_bytes() for n in names)
    assert main(["unmerge", merged, adapter, "-o", back]) == 2
    (Path(merged) / "base.correction").unlink()
    assert main(["unmerge", merged, adapter, "-o", back, "--overwrite"]) == 0
    assert "There is no correction file" in capsys.readouterr().out
    assert main(["merge", model, adapter, "-o", merged, "--overwrite", "--reversible", "--dtype", "bfloat16"]) == 2


def test_a_model_of_the_hub_is_merged_on_disk_too(
    place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, as it lies there after a download."""
    cache = tmp_path / "cache" / "models--someone--small"
    shutil.copytree(place / "model", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter = place / "run" / "adapter"
    done = run("merge", "someone/small", adapter, "-o", tmp_path / "merged", "--reversible")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "base.correction").is_file() and (tmp_path / "merged" / "config.json").is_file()
    done = run("merge", "someone/other", adapter, "-o", tmp_path / "other", "--reversible")
    assert done.returncode == 5 and "someone/other cannot be had from the hub" in done.stderr
    assert not (tmp_path / "other").exists()


def test_merge_into_another_precision_goes_by_the_model(place: Path, tmp_path: Path) -> None:
    words = ["merge", str(place / "model"), str(place / "run" / "adapter"), "-o", str(tmp_path / "half")]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_resized_vocabulary_trains_merges_and_verifies(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that adds tokens, through every command that takes one; the merged model has them."""
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    count = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(count + 3, mean_resizing=False)
    tokens = f"{count},{count + 1},{count + 2}"
    fill(deltaw.attach(base, deltaw.DoRA(rank=4, alpha=6, targets="qv", tokens=tokens)))
    deltaw.save(base, tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    assert main(["inspect", adapter]) == 0
    shown = capsys.readouterr().out
    assert "tokens of model.embed_tokens" in shown and "3×32" in shown and "magnitude of" in shown
    assert main(["verify", str(place / "model"), adapter]) == 0
    assert main(["merge", str(place / "model"), adapter, "-o", str(tmp_path / "merged")]) == 0
    assert "merging in memory" in capsys.readouterr().err
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), torch.tensor([[1, count, 5, count + 2]])
    torch.testing.assert_close(merged(ids).logits, base.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert main(["merge", str(place / "model"), adapter, "-o", str(tmp_path / "no"), "--reversible"]) != 0
    said = capsys.readouterr().err
    assert (
        "By files alone only A and B of dense layers" in said
        and "Without --reversible this is merged in memory" in said
    )
    assert not (tmp_path / "no").exists()


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "run" / "adapter")]) == 0
    assert "layers" in capsys.readouterr().out
    assert main(["inspect", str(place / "run" / "adapter"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 14 and all(
        row["rank"] == 4 and row["scale"] == 1.5 and row["dW"] > 0 for row in found["layers"]
    )


def test_inspect_says_that_an_adapter_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deltaw.save(deltaw.attach(tiny_llama(), deltaw.LoRA(rank=2)), tmp_path / "fresh")
    assert main(["inspect", str(tmp_path / "fresh")]) == 0
    assert "nothing: B is zero in all layers" in " ".join(capsys.readouterr().out.split())


def test_a_path_is_on_one_line_of_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "/a" * 50 + "/report.html"
    show.facts({"report": long, "held-out loss": "1.0"})
    assert capsys.readouterr().out == f"report         {long}\nheld-out loss  1.0\n"


def narrow(table: Any, width: int) -> list[str]:
    """The lines of a table in a terminal of this width."""
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as shown:
        console.print(table)
    return [line.rstrip() for line in shown.get().splitlines()]


def test_amounts_stay_whole_in_a_narrow_terminal() -> None:
    """They were broken within the number (2.8 over 92) to keep long names of layers on one line."""
    name, amounts = (
        "bert.encoder.layer.*.attention.output.dense",
        ["6", "384×1536", "8", "1", "2.892", "0.467", "0.4895"],
    )
    table = show.table("layer", "count", "d×k", "rank", "scale", "‖A‖", "‖B‖", "‖ΔW‖")
    table.add_row(name, *amounts)
    lines = narrow(table, 80)
    assert all(len(line) <= 80 for line in lines)
    shown = [line.split() for line in lines]
    assert [row for row in shown if row[-7:] == amounts], lines
    assert "".join(row[0] for row in shown if row[0] in name and row[0] != "layer") == name


@pytest.mark.parametrize("width", [30, 45, 70])
def test_columns_that_do_not_fit_follow_in_another_part(width: int) -> None:
    headers = ["parameters", "adapter", "share", "memory", "time per step", "latency", "accuracy", "matthews"]
    amounts = ["2,442,240", "9.8MB", "1.82%", "1.3GB", "0.8s", "1.02", "0.350 [0.233, 0.483]", "0.000 [0.000, 0.000]"]
    table = show.table("method", *headers)
    table.add_row("lora-qv", *amounts)
    lines = narrow(table, width)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    for word in " ".join([*headers, *amounts]).split():
        assert word in words, (word, lines)
    assert words.count("lora-qv") == words.count("method") > 1
    assert narrow(table, width) == lines
    assert narrow(table, 200)[1].split() == ["lora-qv", *" ".join(amounts).split()]


def test_an_interval_is_not_broken() -> None:
    table = show.table("", "base", "adapter", "adapter less base")
    table.add_row("loss", "1.441 [0.796, 2.208]", "1.132 [0.481, 2.017]", "-0.310 [-0.522, -0.098]")
    lines = narrow(table, 70)
    assert all(len(line) <= 70 for line in lines)
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[-2:]] == [
        ["loss", "1.441", "1.132", "-0.310"], ["[0.796, 2.208]", "[0.481, 2.017]", "[-0.522, -0.098]"],
    ]  # fmt: skip


def test_sentences_are_folded_between_words_in_a_terminal() -> None:
    """The terminal broke them within words; in a file each is one line."""
    for terminal, expected in (
        (True, ["/base and /adapter", "switch, /new starts", "over."]),
        (False, ["/base and /adapter switch, /new starts over."]),
    ):
        file = io.StringIO()
        show.prose(
            "/base and /adapter switch, /new starts over.",
            console=Console(file=file, width=20, force_terminal=terminal, highlight=False),
        )
        assert [line.rstrip() for line in file.getvalue().splitlines()] == expected


def test_headers_give_way_before_names_do() -> None:
    name = "model.layers.*.self_attn.q_proj"
    table = show.table("layers", "count", "‖ΔW‖ / ‖W0‖", "ΔW kept", "entries changed", "largest change")
    table.add_row(name, "30", "3.48e-04", "100.00%", "100.0%", "3.88e-04")
    lines = narrow(table, 80)
    assert lines[-1].split() == [name, "30", "3.48e-04", "100.00%", "100.0%", "3.88e-04"]
    assert max(map(len, lines)) <= 80


def test_the_title_of_a_narrow_table_is_one_line() -> None:
    """It was folded to the width of the table, which made three lines of it and broke paths."""
    table = show.table("", "base", title="\nreg.csv: 60 records of 60 items (95% intervals by bootstrap over [items])")
    table.add_row("loss", "2.178")
    assert narrow(table, 80) == [
        "", "reg.csv: 60 records of 60 items (95% intervals by bootstrap over [items])", "       base", "loss  2.178",
    ]  # fmt: skip


def test_chat(place: Path, run: Run) -> None:
    words = ["chat", place / "model", "--adapter", place / "run" / "adapter", "--max-new-tokens", 4]
    done = run(*words, stdin="hi\n/base\nhi\n/what\n/new\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "Now the base alone" in done.stdout and "There is no /what" in done.stdout
    assert done.stdout.count("model ›") == 2


def test_a_conversation_over_the_models_positions_says_so_and_goes_on(place: Path, run: Run) -> None:
    done = run("chat", place / "model", "--max-new-tokens", 4, stdin="x" * 260 + "\nhi\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "256 positions" in done.stdout and "/new starts over" in done.stdout and done.stdout.count("model ›") == 1


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


def test_a_flag_of_another_method_is_named_as_its(place: Path, run: Run) -> None:
    done = run("train", place / "model", place / "data.jsonl", "--method", "bitfit", "--rank", "4", "--size", "3")
    assert done.returncode == 2
    assert "--rank (a setting of --method lora or dora)" in done.stderr
    assert "--size (a setting of --method bottleneck)" in done.stderr
    done = run("train", place / "model", place / "data.jsonl", "--method", "bottlneck")
    assert done.returncode == 2 and "did you mean 'bottleneck'" in done.stderr
