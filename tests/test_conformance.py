"""The checks of the conformance page on a sample of its architectures, one of each kind of structure."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conformance.building import build, folders
from tests.conformance.checks import CHECKS, look
from tests.conformance.configs import CUTS, small
from tests.conftest import ROOT

LIFE = ("identity", "save → load", "merge", "unmerge", "detach")
"""What holds of every type."""

MAMBA = {
    "rows": "refused: The weight of a Linear is read",
    "PEFT reads ours": "ValueError",
    "we read PEFT's": "ValueError",
}
"""PEFT adapts no `out_proj` of these."""
POOLED = {"gradients": "none in 4 of 30: model.vision_tower.head"}
"""The language model does not read what the vision tower sums up."""
# Folder → what its checks say; nothing where all is well
SAMPLE: dict[str, dict[str, str]] = {
    "albert": {}, "aimv2": {}, "altclip": {}, "apertus": {}, "audio_spectrogram_transformer": {}, "axk2": {}, "bart": {},
    "beit": {}, "bert": {}, "bloom": {}, "blenderbot": {}, "camembert": {}, "chinese_clip": {}, "cohere2": {},
    "convbert": {}, "cpmant": {}, "csm": {}, "ctrl": {}, "data2vec": {}, "deberta_v2": {}, "decision_transformer": {}, "deit": {},
    "dia": {}, "diffllama": {}, "electra": {}, "emu3": {}, "exaone4": {}, "falcon": {}, "gemma3": POOLED, "gpt2": {}, "gpt_neox": {},
    "llama": {}, "llava": {"gradients": "none in 6 of 28: model.vision_tower"}, "mamba": MAMBA, "mixtral": {}, "qwen2_5_vl": {}, "t5": {}, "vit": {}, "wav2vec2": {},
    "whisper": {},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_sample_is_of_forty_that_there_are() -> None:
    assert len(SAMPLE) == 40 and SAMPLE.keys() <= set(folders())


@pytest.mark.slow
@pytest.mark.parametrize("folder", SAMPLE)
def test_an_adapters_life(folder: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and PEFT, about sizes and targets
        row = look(build(folder), tmp_path)
    assert "not tried" not in row and "refused" not in row
    said = {name: why for name, why in row["checks"].items() if why}
    assert row["checks"].keys() == CHECKS.keys() and row["adapted"] > 0
    assert said.keys() == SAMPLE[folder].keys(), said
    assert all(why.startswith(SAMPLE[folder][name]) for name, why in said.items()), said


def test_the_page_has_every_type() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "results" / "models.json").read_text(encoding="utf-8"))
    assert [name for name in results["models"] if f"`{name}`" not in page] == []
    failed = [n for n, r in results["models"].items() for check in LIFE if r.get("checks", {}).get(check)]
    assert failed == []


def test_a_small_config_keeps_what_divides_what() -> None:
    from transformers import LlamaConfig, Qwen2VLConfig

    for cut in CUTS.values():
        config = small(LlamaConfig(), cut)
        assert config.num_hidden_layers == 2 and config.vocab_size == 128
        assert config.hidden_size % config.num_attention_heads == 0
    narrow = small(Qwen2VLConfig(), CUTS["narrow"])
    tokens = [narrow.image_token_id, narrow.video_token_id, narrow.text_config.eos_token_id]
    assert len(set(tokens)) == 3 and max(tokens) < narrow.text_config.vocab_size == 128
