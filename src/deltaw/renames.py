"""Layers that other versions of transformers give other names: an adapter's file by this version's. Knows names, no model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from deltaw.files.peft import LoRAFile

log = logging.getLogger("deltaw")

T = TypeVar("T")

# Beginning of a name → what stands for it now. From version 4.52 on, models of text and images have one `model` around all
# of their parts, and the head beside it; text models alone were the same before and after
RENAMES = (
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\b", "lm_head"),
    (r"model\.(?=layers\.|embed_tokens\b|norm\b)", "model.language_model."),
    (r"(?=visual\.|vision_tower\.|vision_model\.|multi_modal_projector\.)", "model."),
)


def renamed(file: LoRAFile, known: Collection[str]) -> LoRAFile:
    """The file with this model's names (`known`: of its modules) for those layers that go by another one here. It logs which."""
    found: dict[str, str] = {}

    def module(name: str) -> str:
        new = name if name in known else next((n for n in _others(name) if n in known), name)
        if new != name:
            found[name] = new
        return new

    def parameter(name: str) -> str:
        layer, _, own_name = name.rpartition(".")
        return f"{module(layer)}.{own_name}"

    if all(layer in known for layer in file.factors) and not (file.whole or file.rows):
        return file
    made = replace(
        file,
        factors=_by(module, file.factors), scales=_by(module, file.scales), magnitudes=_by(module, file.magnitudes),
        biases=_by(module, file.biases), rows=_by(module, file.rows), whole=_by(parameter, file.whole),
        copies=_by(parameter, file.copies), originals=_by(parameter, file.originals),
        embeddings=frozenset(map(module, file.embeddings)), kernels=_by(module, file.kernels),
    )  # fmt: skip
    if found:
        old, new = next(iter(found.items()))
        log.warning(
            "%d layers of the adapter have other names in this model: %s is %s here, for one.", len(found), old, new
        )
    return made


def _others(name: str) -> list[str]:
    return [re.sub(f"^{old}", new, name) for old, new in RENAMES if re.match(old, name)]


def _by(new: Callable[[str], str], values: Mapping[str, T]) -> dict[str, T]:
    return {new(name): value for name, value in values.items()}
