"""Which rank a run needed: data whose right rank is known, and how the command asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import deltaw
from deltaw.cli.main import main
from deltaw.errors import ConfigError, DataError, FileError
from deltaw.runs.events import RankEvent, Scored

WORDS, LENGTH = 60, 24
TRUE_RANK = 3


def word(i: int) -> str:
    return f"w{i:02}"


def save_base(folder: Path) -> Any:
    """A tiny Llama that has no preference among words."""
    vocabulary = {word(i): i for i in range(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=word(0)))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    # No token that the texts never have: to learn that would be a direction more
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=word(1), eos_token=word(2), unk_token=word(0))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def spoken(model: Any, rows: int, seed: int) -> list[dict[str, str]]:
    """Texts that the model itself makes, word by word."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (rows, 1), generator=chance)
    for _ in range(LENGTH - 1):
        shares = model(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(shares, 1, generator=chance)], 1)
    return [{"text": " ".join(word(i) for i in row)} for row in ids.tolist()]


def write(folder: Path, **sets: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for name, records in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def trained(folder: Path, data: Path, **more: Any) -> Path:
    # Without the token that would end each text, which is a direction more to learn
    reading = deltaw.DataConfig(max_length=LENGTH)
    config = deltaw.TrainConfig(
        data=reading, **{"out": str(folder / "run"), "steps": 250, "batch": 16, "lr": 1e-2, "samples": 0, "eval_every": 250}
        | {"dtype": "float32", "device": "cpu"} | more,
    )  # fmt: skip
    deltaw.train(str(folder / "model"), str(data), config, method=deltaw.LoRA(rank=8, targets="lm_head"))
    return Path(config.out)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned from a teacher whose ΔW has rank 3."""
    folder = tmp_path_factory.mktemp("taught")
    teacher = save_base(folder / "model")
    chance = torch.Generator().manual_seed(1)
    W = teacher.lm_head.weight
    U, V = (torch.linalg.qr(torch.randn(n, TRUE_RANK, generator=chance)).Q for n in W.shape)
    with torch.no_grad():
        W += 12 * U @ V.t()
    data = write(folder / "data", train=spoken(teacher, 1500, 2), valid=spoken(teacher, 200, 3))
    trained(folder, data)
    return folder


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of rank 4 on q and v, and the folder of another one of rank 2 beside it."""
    folder = tmp_path_factory.mktemp("small")
    for name, rank in (("run", 4), ("other", 2)):
        config = deltaw.TrainConfig(
            out=str(folder / name), steps=6, batch=4, lr=1e-2, valid_share=0.3, valid_most=8, eval_every=6, samples=0,
            dtype="float32", device="cpu",
        )  # fmt: skip
        method = deltaw.LoRA(rank=rank, targets="q,v")
        deltaw.train(str(place / "model"), str(place / "data.jsonl"), config, method=method)
    return folder / "run"


def test_each_rank_is_scored_and_told(run: Path, tmp_path: Path) -> None:
    events: list[RankEvent] = []
    config = deltaw.RankConfig(out=str(tmp_path), against=str(run.with_name("other")), margin=0.5)
    choice = deltaw.choose_rank(run, config, on_event=events.append)
    assert choice.rank == 1 and [tested.rank for tested in choice.choice.tested] == [1, 2, 4]
    assert [event.name for event in events if isinstance(event, Scored)][:4] == ["base", "r = 1", "r = 2", "r = 4"]
    outcome = choice.outcome
    assert json.loads((tmp_path / "rank.json").read_text()) == choice.results == outcome.to_json()
    assert [row.parameters for row in outcome.ranks] == [224, 448, 896] and outcome.largest.energy == 1.0
    assert all(row.cost is not None and row.cost.memory > 0 for row in outcome.ranks)
    assert [pair.other_rank for pair in outcome.alike] == [2] and outcome.loop["step"] == 6
    assert "Directions of r = 4 in common with" in choice.report.read_text()


@pytest.mark.slow
def test_a_planted_rank_is_found(taught: Path) -> None:
    found = deltaw.choose_rank(taught / "run", deltaw.RankConfig(ranks="1,2,3,4,6"))
    assert found.rank == TRUE_RANK
    losses = {each.rank: each.loss.value for each in found.choice.tested}
    assert list(losses) == [1, 2, 3, 4, 6, 8] and losses[2] > losses[3] + found.choice.margin
    assert found.results["base"]["loss"] > losses[8]
    (layer,) = found.results["layers"]
    assert layer["rank_90"] == TRUE_RANK and len(layer["values"]) == 8
    page = found.report.read_text()
    assert f"r = {TRUE_RANK}: " in page and "against" in page and json.loads((taught / "run" / "rank.json").read_text())


def test_the_base_is_compared_with_the_adapter_in_pairs(run: Path, tmp_path: Path) -> None:
    """Texts differ in their losses more than the models do: a base within the adapter's interval was called hardly worse."""
    outcome = deltaw.choose_rank(run, deltaw.RankConfig(ranks="4", out=str(tmp_path))).outcome
    assert outcome.base is not None
    gain, whole = outcome.base.less_adapter, outcome.largest.tested.loss
    assert gain.value == pytest.approx(outcome.base.loss - whole.value) and gain.low < gain.value < gain.high
    assert gain.high - gain.low < whole.high - whole.low


def test_a_run_that_learned_nothing_says_so_in_its_rank(place: Path, tmp_path: Path) -> None:
    config = deltaw.TrainConfig(
        out=str(tmp_path / "run"), steps=2, lr=1e-9, batch=4, valid_share=0.3, valid_most=4, samples=0, device="cpu"
    )
    method = deltaw.LoRA(rank=2, targets="q")
    deltaw.train(str(place / "model"), str(place / "data.jsonl"), config, method=method, progress=False)
    choice = deltaw.choose_rank(tmp_path / "run", progress=False)
    assert any(warning.startswith("Nothing was learned") for warning in choice.outcome.warnings)
    assert "The run itself warned: Nothing was learned" in choice.report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_noise_needs_the_smallest(tmp_path: Path) -> None:
    base = save_base(tmp_path / "model")
    with torch.no_grad():
        base.lm_head.weight.zero_()  # all words alike
    data = write(tmp_path / "data", train=spoken(base, 300, 2), valid=spoken(base, 200, 3))
    found = deltaw.choose_rank(trained(tmp_path, data, steps=60))
    assert found.rank == 1


@pytest.mark.slow
def test_the_command(taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deltaw.compress(taught / "run" / "adapter", tmp_path / "cut", rank=2)
    words = ["rank", str(taught / "run"), "--most", "50", "--ranks", "1,3", "--out", str(tmp_path / "out")]
    assert main([*words, "--against", str(tmp_path / "cut"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rank"] == TRUE_RANK and found["records"]["count"] == 50
    (alike,) = found["alike"]
    (row,) = alike["rows"]
    # A cut has the very directions that it kept
    assert row["first"] == pytest.approx(1) and row["all"] == pytest.approx(1) and row["all_by_chance"] < 0.1
    assert len(alike["maps"][0]["values"]) == 8 and len(alike["maps"][0]["values"][0]) == 2
    (amplified,) = found["amplified"]
    assert amplified["by_weight"] > amplified["by_chance"] and amplified["weight"] > 0
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "less r = 8's" in said and "rank.html" in said and (tmp_path / "out" / "rank.html").is_file()


def test_an_adapter_alone_needs_its_records_named(run: Path, place: Path, tmp_path: Path) -> None:
    """One that others wrote, without our metadata."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text((run / "adapter" / "adapter_config.json").read_text())
    weights = "adapter_model.safetensors"
    save_file(load_file(run / "adapter" / weights), foreign / weights)
    with pytest.raises(ConfigError, match="--model") as error:
        deltaw.choose_rank(foreign)
    assert "--records" in str(error.value)
    config = deltaw.RankConfig(model=str(place / "model"), records=str(place / "data.jsonl"), ranks="3", most=4)
    choice = deltaw.choose_rank(foreign, config)
    assert choice.report == tmp_path / "rank.html" and choice.outcome.ranks[0].cost is None
    assert [row.rank for row in choice.outcome.ranks] == [3, 4] and not choice.outcome.loop


def test_ranks_beyond_the_adapters_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"16 is more than the adapter has \(4\)"):
        deltaw.choose_rank(run, deltaw.RankConfig(ranks="2,16"))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="neither a run's folder"):
        deltaw.choose_rank(tmp_path)


def test_records_that_are_not_there_are_refused(run: Path) -> None:
    with pytest.raises(DataError, match="nothing"):
        deltaw.choose_rank(run, deltaw.RankConfig(records="nothing"))


def test_an_adapter_of_a_method_without_a_rank_is_refused(place: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(place / "model")
    deltaw.attach(model, deltaw.BitFit(add=True))
    with torch.no_grad():
        for parameter in deltaw.parameters(model):
            parameter.add_(0.1)
    deltaw.save(model, tmp_path / "biases")
    with pytest.raises(FileError, match="another method"):
        deltaw.choose_rank(tmp_path / "biases")


def test_a_run_that_a_sweep_cannot_repeat_is_not_confirmed(run: Path, place: Path, tmp_path: Path) -> None:
    config = deltaw.TrainConfig(out=str(tmp_path / "run"), steps=1, valid_share=0.3, samples=0)
    method = deltaw.LoRA(rank=2, targets="q=1,v=2")
    records = [{"prompt": f"p {i}", "completion": "c"} for i in range(24)]
    deltaw.train(str(place / "model"), records, config, method=method)
    with pytest.raises(ConfigError, match="cannot be confirmed") as error:
        deltaw.choose_rank(tmp_path / "run", deltaw.RankConfig(confirm=True))
    assert error.value.problems == [
        "targets is 'q=1,v=2'; a sweep has one rank for all layers", "its data is not a file, folder or hub name",
    ]  # fmt: skip


@pytest.mark.slow
def test_what_was_recommended_is_trained_again(taught: Path, tmp_path: Path) -> None:
    """Whether it holds is for the data to say: a rank that is enough need not be as easy to train."""
    config = deltaw.RankConfig(ranks="1,3", confirm=True, out=str(tmp_path / "out"))
    found = deltaw.choose_rank(taught / "run", config)
    confirmed = found.results["confirmed"]
    assert confirmed["rank"] == TRUE_RANK and confirmed["full"] == 8
    assert confirmed["held"] == (confirmed["difference"]["high"] <= confirmed["margin"])
    # Seed and settings are the run's, and nine tenths of its records (the rest is held out), so r = 8 comes out nearly as it did
    assert confirmed["full_loss"]["value"] == pytest.approx(found.results["ranks"][-1]["loss"]["value"], rel=5e-3)
    verdict = "It held" if confirmed["held"] else "It did not hold"
    assert f"{verdict} when trained again" in found.report.read_text()
    assert (tmp_path / "out" / "confirmed" / "report.html").is_file()
