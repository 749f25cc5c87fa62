"""Tokens that end what an adapter was taught to say.

They stand with the adapter, and in the generation_config of a model that it is merged into; the base's own stay beside them.
transformers' `eos_token_id` is one token, several, or None.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from deltaw.layers.ops.rows import Rows
from deltaw.layers.tree import owner_of
from deltaw.model.record import find_record, known, record_of

Ends = tuple[int, ...]

TAUGHT = "ends"
"""Key in an attached adapter's metadata: the tokens that end what it was taught to say."""


def listed(eos: Any) -> Ends:
    """Its tokens."""
    if eos is None:
        return ()
    return tuple(int(end) for end in eos) if isinstance(eos, (list, tuple)) else (int(eos),)


def extended(eos: Any, ends: Iterable[int]) -> Any:
    """An eos_token_id with these among it: the same value where they are already, else all of them as a list."""
    before = listed(eos)
    added = [end for end in dict.fromkeys(ends) if end not in before]
    return [*before, *added] if added else eos


def common(ends: Iterable[Ends]) -> Ends:
    """The tokens that are among each of these, in the order of the first."""
    first, *others = ends
    return tuple(end for end in first if all(end in own for own in others))


log = logging.getLogger("deltaw")


def teach(model: nn.Module, name: str, ends: Iterable[int]) -> None:
    """Note the tokens that end what adapter `name` says; `save` writes them. Raises AdapterError for an unknown name."""
    record = record_of(model)
    record.attached[known(record, name)].metadata[TAUGHT] = tuple(dict.fromkeys(int(end) for end in ends))


def taught(model: nn.Module, names: Iterable[str | None]) -> Ends:
    """The end tokens of these adapters together, in order. None is the base, which was taught none here."""
    record = find_record(model)
    attached = {} if record is None else record.attached
    every = [attached[name].metadata.get(TAUGHT, ()) for name in names if name in attached]
    return tuple(dict.fromkeys(end for ends in every for end in ends))


def routed(model: nn.Module) -> tuple[str | None, ...] | None:
    """The adapter of each row, within a `route` block of several; None where all rows go through the same one."""
    choice = _choice(model)
    return choice.names if isinstance(choice, Rows) else None


def in_use(model: nn.Module) -> Ends:
    """The end tokens of whatever adapters the model goes through here; those of merged ones are its own."""
    choice = _choice(model)
    return taught(model, choice.names if isinstance(choice, Rows) else (choice,))


def own_ends(model: Any) -> Ends:
    """The end tokens that the model's generation_config names."""
    return listed(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def extend(model: nn.Module, names: Iterable[str]) -> tuple[Any, Any] | None:
    """Let the model's generation_config stop at what these adapters were taught. That config and the eos_token_id that it had,
    which give it back; None where nothing changed."""
    config = getattr(model, "generation_config", None) or getattr(owner_of(model), "generation_config", None)
    before = getattr(config, "eos_token_id", None)
    after = extended(before, taught(model, names))
    if config is None and after != before:
        say_without_generate(model, taught(model, names))
    if config is None or after == before:
        return None
    config.eos_token_id = after
    return config, before


def say_without_generate(model: nn.Module, ends: Ends) -> None:
    """Warn of end tokens for a model that generates nothing by itself: a model around it, which does, is not known here."""
    if ends and not callable(getattr(owner_of(model), "generate", None)):
        log.warning(
            "The adapter was taught to end with token %s, and a %s has no generate that could stop there: where a model around "
            "it generates, give that these tokens too (generation_config.eos_token_id).",
            ", ".join(map(str, ends)), type(owner_of(model)).__name__,
        )  # fmt: skip


def _choice(model: nn.Module) -> Any:
    record = find_record(model) if isinstance(model, nn.Module) else None
    return None if record is None else record.route.chosen()
