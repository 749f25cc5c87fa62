"""Dotted names of layers: as people read them, and without the parts that wrappers put into them.

torch.compile, FSDP, activation checkpointing, DDP and DeepSpeed put parts of their own into the names of modules.

Knows names, no model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence


def brief(names: Sequence[str]) -> dict[str, str]:
    """Return name → its last parts, as many as tell all of these names apart, but no fewer than two.

    >>> brief(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])["model.layers.1.mlp.up_proj"]
    '1.mlp.up_proj'
    """
    for count in range(2, 1 + max((name.count(".") for name in names), default=0)):
        short = {name: ".".join(name.split(".")[-count:]) for name in names}
        if len(set(short.values())) == len(set(names)):
            return short
    return {name: name for name in names}


def family(name: str) -> str:
    """Return the name with its numbers as *: layers that differ only in their place in a stack share it.

    >>> family("model.layers.12.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return re.sub(r"\b\d+\b", "*", name)


def by_family(names: Iterable[str]) -> dict[str, list[str]]:
    """Return family → its names, those with a lower number first."""
    families: dict[str, list[str]] = {}
    for name in in_order(names):
        families.setdefault(family(name), []).append(name)
    return families


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names sorted with numbers by their value: layer 2 before layer 10, which files have the other way round."""
    return sorted(names, key=lambda name: [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")])


# Names of a wrapper's one child that nothing else has; and DDP's, DataParallel's and DeepSpeed's, which a base may have too
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MODULE = "module"
_ANY = rf"(?:(?:{'|'.join((*WRAPPED, _MODULE))})\.)*"
_PEFT = re.compile(rf"^{_ANY}base_model\.{_ANY}model\.")
# A name with more parts that may be wrappers is taken as it is
_MOST = 8

# Beginning of a name → what stands for it now. From version 4.52 on, models of text and images have one `model` around all
# of their parts, and the head beside it; text models alone were the same before and after
RENAMES = (
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\b", "lm_head"),
    (r"model\.(?=layers\.|embed_tokens\b|norm\b)", "model.language_model."),
    (r"(?=visual\.|vision_tower\.|vision_model\.|multi_modal_projector\.)", "model."),
)


def other_names(name: str) -> list[str]:
    """Return the names that this version of transformers may have for a module that another version calls by this one."""
    others = [re.sub(f"^{old}", new, name) for old, new in RENAMES if re.match(old, name)]
    return [*others, name.replace(".block_sparse_moe.", ".mlp.")]  # Mixtral's, in transformers 4


def without_peft_prefix(key: str) -> str:
    """Return a key without `base_model.model.`, and without the wrappers around PEFT's model."""
    return _PEFT.sub("", key)


def unwrapped(name: str) -> str:
    """Return a dotted name without the parts that only wrappers have."""
    if not any(part in name for part in WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def unwrapped_pattern(text: str) -> str:
    """Return a name, or a regular expression of names, without the parts that only wrappers have."""
    return re.sub(rf"(?:{'|'.join(WRAPPED)})\\?\.", "", text)


def plain_names(known: Iterable[str]) -> dict[str, str]:
    """Return name without wrappers → the name in `known`, of the names that have wrappers."""
    return {plain: name for name in known if (plain := unwrapped(name)) != name}


def found_as(name: str, known: Collection[str], plain: Mapping[str, str]) -> str | None:
    """Return what `known` has for a name: itself; else it without parts that wrappers have put into it; else the name that
    has wrappers itself (`plain`, of `plain_names`)."""
    for candidate in _candidates(name):
        if candidate in known:
            return candidate
        if candidate in plain:
            return plain[candidate]
    return None


def common_prefix(names: Sequence[str], known: Collection[str], plain: Mapping[str, str]) -> str:
    """Return the `module.`s that DDP has put before all of these names, without which all of them are known; else none."""
    prefix = ""
    while names and all(name.startswith(prefix) for name in names):
        if all(name.removeprefix(prefix) in known or unwrapped(name.removeprefix(prefix)) in plain for name in names):
            return prefix
        prefix += f"{_MODULE}."
    return ""


def _candidates(name: str) -> Iterable[str]:
    """Yield the name; then it without some of the parts that may be wrappers, the fewest `module` first."""
    yield name
    parts = unwrapped(name).split(".")
    yield ".".join(parts)
    places = [i for i, part in enumerate(parts) if part == _MODULE][:_MOST]
    for count in range(1, len(places) + 1):
        for gone in itertools.combinations(places, count):
            yield ".".join(part for i, part in enumerate(parts) if i not in gone)
