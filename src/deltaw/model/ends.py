"""Tokens that end what an adapter was taught to say.

They stand with the adapter, and in the generation_config of a model that it is merged into. The base's own end tokens stay beside
them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from deltaw.layers.ops.rows import Rows
from deltaw.layers.routing import Choice
from deltaw.layers.tree import owner_of
from deltaw.model.record import EndTokens, find_record, known, record_of

if TYPE_CHECKING:
    from transformers import GenerationConfig

Ends = tuple[int, ...]
"""Ids of end tokens."""

log = logging.getLogger("deltaw")


def listed(eos: EndTokens) -> Ends:
    """Return the tokens of an eos_token_id."""
    if eos is None:
        return ()
    return tuple(int(end) for end in eos) if isinstance(eos, (list, tuple)) else (int(eos),)


def extended(eos: EndTokens, ends: Iterable[int]) -> EndTokens:
    """Return an eos_token_id with `ends` among its tokens: the same value if they are already, else all of them as a list."""
    before = listed(eos)
    added = [end for end in dict.fromkeys(ends) if end not in before]
    return [*before, *added] if added else eos


def common(ends: Iterable[Ends]) -> Ends:
    """Return the tokens that all of these have, in the order of the first."""
    first, *others = ends
    return tuple(end for end in first if all(end in other for other in others))


def teach(model: nn.Module, name: str, ends: Iterable[int]) -> None:
    """Note the tokens that end what adapter `name` says; `save` writes them. Raises AdapterError for an unknown name."""
    record = record_of(model)
    record.attached[known(record, name)].metadata["ends"] = tuple(dict.fromkeys(int(end) for end in ends))


def taught(model: nn.Module, names: Iterable[str | None]) -> Ends:
    """Return the end tokens of these adapters together, in order. None stands for the base, which was taught none here."""
    record = find_record(model)
    attached = {} if record is None else record.attached
    ends_of_each = [attached[name].metadata.get("ends", ()) for name in names if name in attached]
    return tuple(dict.fromkeys(end for ends in ends_of_each for end in ends))


def routed(model: nn.Module) -> tuple[str | None, ...] | None:
    """Return the adapter of each row within a `route` block of several; None if all rows go through the same one."""
    choice = _choice(model)
    return choice.names if isinstance(choice, Rows) else None


def in_use(model: nn.Module) -> Ends:
    """Return the end tokens of the adapters that the model goes through here, without those of merged ones."""
    choice = _choice(model)
    return taught(model, choice.names if isinstance(choice, Rows) else (choice,))


def own_ends(model: nn.Module) -> Ends:
    """Return the end tokens that the model's generation_config names."""
    return listed(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def extend(model: nn.Module, names: Iterable[str]) -> tuple[GenerationConfig, EndTokens] | None:
    """Let the model's generation_config stop at the end tokens of these adapters.

    Return that config and its eos_token_id before; None if nothing changed.
    """
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    config = config or getattr(owner_of(model), "generation_config", None)
    ends = taught(model, names)
    before: EndTokens = getattr(config, "eos_token_id", None)
    after = extended(before, ends)
    if config is None and after != before:
        say_without_generate(model, ends)
    if config is None or after == before:
        return None
    config.eos_token_id = after
    return config, before


def say_without_generate(model: nn.Module, ends: Ends) -> None:
    """Warn of end tokens on a model that cannot generate by itself: a model around it that does is not known here."""
    if ends and not callable(getattr(owner_of(model), "generate", None)):
        log.warning(
            "The adapter was taught to end with token %s, and a %s has no generate that could stop there: where a model around "
            "it generates, give that these tokens too (generation_config.eos_token_id).",
            ", ".join(map(str, ends)), type(owner_of(model)).__name__,
        )  # fmt: skip


def _choice(model: nn.Module) -> Choice:
    """Return the adapter, None or Rows that code here goes through."""
    record = find_record(model) if isinstance(model, nn.Module) else None
    return None if record is None else record.route.chosen()
