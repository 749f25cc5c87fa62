"""Models opened with an adapter that must have what the checkpoint lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import deltaw
from deltaw import BitFit, LoRA
from deltaw.errors import FileError
from deltaw.model.pretrained import load_pretrained
from deltaw.training.opening import equip
from tests.architectures import ENCODER
from tests.conftest import fill
from tests.data.conftest import tiny_tokenizer


def test_an_adapter_with_a_part_of_a_head_does_not_stand_for_the_head(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = transformers.BertConfig(**(ENCODER | {"vocab_size": len(tokenizer)}))
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    opened = [load_pretrained(str(tmp_path / "base"), task="classification", labels=["a", "b"]) for _ in range(4)]
    deltaw.save(fill(deltaw.attach(opened[0].model, BitFit())), tmp_path / "bias")
    with pytest.raises(FileError, match=r"the adapter in .*bias has none for them"):
        equip(opened[1], tmp_path / "bias", check_base=False)
    deltaw.save(fill(deltaw.attach(opened[2].model, LoRA(rank=2, whole="classifier"))), tmp_path / "whole")
    equip(opened[3], tmp_path / "whole", check_base=False)
