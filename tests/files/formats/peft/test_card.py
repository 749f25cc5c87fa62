"""The card of an adapter folder: what the hub and PEFT read of it, what is never in it, and whose edits stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

import deltaw
from deltaw.files.formats.peft.card import Card, add_scores, base_name, card_of, hub_id, short_name
from deltaw.files.formats.peft.config import PeftConfig
from deltaw.files.formats.peft.metadata import base_in
from tests.cli.conftest import RECORDS, place  # noqa: F401
from tests.conftest import fill, tiny_llama
from tests.files.conftest import tiny_bert

peft = pytest.importorskip("peft")


def front(folder: Path) -> Any:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_the_card_of_a_run_says_what_it_is_and_holds_no_record_and_no_path(place: Path) -> None:  # noqa: F811
    text = (place / "run" / "adapter" / "README.md").read_text()
    assert str(place) not in text and str(place.parent) not in text
    assert not any(record[key] in text for record in RECORDS for key in record)
    for part in ("| rank | 4 |", "| alpha | 6 |", "| steps taken | 6 |", "| data | data.jsonl |", "| base | model |"):
        assert part in text
    values = front(place / "run" / "adapter")
    assert values["library_name"] == "peft" and values["license"] == "unknown" and "lora" in values["tags"]
    assert "base_model" not in values, "a folder is no id on the hub"
    huggingface_hub = pytest.importorskip("huggingface_hub")
    assert huggingface_hub.ModelCard(text).data.library_name == "peft"


def test_settings_that_may_hold_text_of_the_user_are_left_out() -> None:
    training = {
        "system": "SECRET",
        "template": "SECRET {prompt}",
        "separator": "SECRET",
        "lr": 1e-3,
        "start": "/SECRET/a",
    }
    text = card_of(PeftConfig.of({"peft_type": "LORA"}), {"deltaw_training": json.dumps(training)}).text()
    assert "SECRET" not in text and "0.001" in text


def test_names_cannot_break_out_of_the_card() -> None:
    config = PeftConfig.of(
        {"peft_type": "LORA", "base_model_name_or_path": "a\n---\n<script>|`x`", "target_modules": ["q|\n# y"]}
    )
    text = Card(config, {"data": "/x/d\n```\n# z"}).text()
    assert (
        text.count("\n---\n") == 1
        and "<script>" not in text.split("## Use")[0]
        and "\n# y" not in text
        and "\n# z" not in text
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/.cache/hub/models--org--some-model/snapshots/0123abc", "org/some-model"),
        (r"C:\hub\models--gpt2\snapshots\0123abc", "gpt2"), ("/home/me/models/llama", "llama"), ("org/model", "org/model"),
    ],
)  # fmt: skip
def test_a_base_is_named_by_its_id_or_its_last_part(name: str, shown: str) -> None:
    assert short_name(name) == shown and (base_name(name) == name) == ("models--" not in name)


def saved(path: Path, base: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    return deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=2))), path)


@pytest.mark.parametrize("edit", [lambda t: "mine", lambda t: t.replace("rank", "Rank"), lambda t: t + "more"])
def test_an_edited_card_stays_and_an_untouched_one_follows_the_adapter(edit: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    card = saved(tmp_path / "a", tmp_path / "base") / "README.md"
    assert add_scores(tmp_path / "a", {"loss": "1.5"}) and "| loss | 1.5 |" in card.read_text()
    saved(tmp_path / "a", tmp_path / "base")
    assert "| loss |" not in card.read_text(), "scores of what was replaced are gone"
    card.write_text(edited := edit(card.read_text()))
    saved(tmp_path / "a", tmp_path / "base")
    assert card.read_text() == edited and not add_scores(tmp_path / "a", {"loss": "1.5"})
    assert card.read_text() == edited


def classifier(folder: Path) -> Any:
    torch.manual_seed(1)
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return LlamaForSequenceClassification.from_pretrained(folder)


def test_autopeft_opens_a_classifier_and_scores_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base's folder is: a local base is named by its folder alone."""
    monkeypatch.chdir(tmp_path)
    model = deltaw.attach(
        classifier(tmp_path / "base"), deltaw.LoRA(rank=2, alpha=3, targets="attention", whole="score")
    )
    folder = deltaw.save(fill(model), tmp_path / "a")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["peft_version"] == "0.21.0"
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    ids = torch.arange(3, 25).view(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    again = classifier(tmp_path / "base")
    deltaw.load(again, folder)
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_a_classifier_whose_heads_inside_is_adapted_has_no_task_that_peft_would_copy_it_for() -> None:
    """PEFT copies the module `classifier` whole, and would leave out the update of a layer in it."""
    from deltaw.files.pack import as_file

    model = deltaw.attach(tiny_bert(), deltaw.LoRA(rank=2, targets=["query", "classifier"]))
    assert as_file(model, "default").config.task_type is None
    bare = deltaw.attach(tiny_bert(), deltaw.LoRA(rank=2, targets=["query"]))
    assert as_file(bare, "default").config.task_type is None, "PEFT refuses a classifier's file without its head"
    other = deltaw.attach(tiny_bert(), deltaw.LoRA(rank=2, targets=["query"], whole="classifier"))
    assert as_file(other, "default").config.task_type == "SEQ_CLS"


def test_a_local_base_is_named_without_its_path_and_as_no_id_of_the_hub(tmp_path: Path) -> None:
    """A folder called gpt2 is not the hub's gpt2. Commands find it by the path in the file's header."""
    base = tmp_path / "gpt2"
    tiny_llama().save_pretrained(base)
    adapter = saved(tmp_path / "a", base)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "./gpt2"
    assert (
        str(tmp_path).encode()
        not in (adapter / "adapter_config.json").read_bytes() + (adapter / "README.md").read_bytes()
    )
    metadata = deltaw.files.store.read(adapter).metadata
    assert base_in(metadata, "./gpt2") == str(base) and hub_id("./gpt2") is None
    moved = base.rename(tmp_path / "elsewhere")
    assert base_in(metadata, "./gpt2") is None and base_in({}, "org/model") == "org/model" and moved.is_dir()


def test_a_base_from_the_hubs_cache_is_named_by_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--tiny" / "snapshots" / "0123"
    tiny_llama().save_pretrained(folder)
    adapter = saved(tmp_path / "a", folder)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    assert front(adapter)["base_model"] == "org/tiny" and "base_model:adapter:org/tiny" in front(adapter)["tags"]
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
