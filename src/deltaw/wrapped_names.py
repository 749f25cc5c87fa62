"""What torch.compile, FSDP, activation checkpointing, DDP and DeepSpeed put into the names of modules. Knows
names, no model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

# Names of a wrapper's one child that nothing else has; and DDP's, DataParallel's and DeepSpeed's, which a base may have too
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MODULE = "module"
_ANY = rf"(?:(?:{'|'.join((*WRAPPED, _MODULE))})\.)*"
_PEFT = re.compile(rf"^{_ANY}base_model\.{_ANY}model\.")
# A name with more parts that may be wrappers is taken as it is
_MOST = 8


def without_peft_prefix(key: str) -> str:
    """A key without `base_model.model.`, and without the wrappers around PEFT's model."""
    return _PEFT.sub("", key)


def unwrapped(name: str) -> str:
    """A dotted name without the parts that only wrappers have."""
    if not any(own in name for own in WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def unwrapped_pattern(text: str) -> str:
    """A name, or a regular expression of names, without what only wrappers have."""
    return re.sub(rf"(?:{'|'.join(WRAPPED)})\\?\.", "", text)


def plain_names(known: Iterable[str]) -> dict[str, str]:
    """Name without wrappers → the name in `known`, of those that have any."""
    return {plain: name for name in known if (plain := unwrapped(name)) != name}


def found_as(name: str, known: Collection[str], plain: Mapping[str, str]) -> str | None:
    """What `known` has for a name: itself; else what is left without parts that wrappers have put into it; else the name that
    has wrappers itself (`plain`, of `plain_names`)."""
    for candidate in _candidates(name):
        if candidate in known:
            return candidate
        if candidate in plain:
            return plain[candidate]
    return None


def common_prefix(names: Sequence[str], known: Collection[str], plain: Mapping[str, str]) -> str:
    """The `module.`s before all of these names without which all of them are known, as DDP puts them there; else none."""
    prefix = ""
    while names and all(name.startswith(prefix) for name in names):
        if all(name.removeprefix(prefix) in known or unwrapped(name.removeprefix(prefix)) in plain for name in names):
            return prefix
        prefix += f"{_MODULE}."
    return ""


def _candidates(name: str) -> Iterable[str]:
    """The name; then without some of the parts that may be wrappers, the fewest `module` first."""
    yield name
    parts = unwrapped(name).split(".")
    yield ".".join(parts)
    places = [i for i, part in enumerate(parts) if part == _MODULE][:_MOST]
    for count in range(1, len(places) + 1):
        for gone in itertools.combinations(places, count):
            yield ".".join(part for i, part in enumerate(parts) if i not in gone)
