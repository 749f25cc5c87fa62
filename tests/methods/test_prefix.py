"""Prefixes: as embeddings of the input, with a cache, and as PEFT's prompts."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import deltaw
from deltaw.files.formats import method_file
from deltaw.methods.prefix import Prefix
from deltaw.model.summary import updates
from tests.methods.test_methods import FORMS, ROWS, build, inputs, logits, trained


def test_a_prefix_is_what_its_embeddings_are_as_input() -> None:
    model = build("llama")
    torch.manual_seed(5)
    deltaw.attach(model, Prefix(length=3, where="embedding"))
    rows = updates(model)["model"].rows
    batch = inputs(model)
    own = logits(model)
    with deltaw.using(model, None), torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        mask = torch.nn.functional.pad(batch["attention_mask"], (3, 0), value=1)
        whole = model(inputs_embeds=torch.cat([rows.expand(ROWS, -1, -1), embeds], 1), attention_mask=mask).logits
    torch.testing.assert_close(own, whole[:, 3:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_real_peft_and_we_read_each_others_prompts(name: str, tmp_path: Path) -> None:
    model = trained(build(name), FORMS["prompt"])
    deltaw.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path / "a")).eval()
    batch = inputs(theirs)
    del batch["labels"]
    with torch.no_grad():
        found = theirs(**batch).logits
    torch.testing.assert_close(found[:, 3:], logits(model), atol=1e-6, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "b")
    ours = build(name)
    deltaw.load(ours, tmp_path / "b")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-6, rtol=1e-5)
    assert method_file.read(tmp_path / "b").metadata.keys() <= {"format"}
