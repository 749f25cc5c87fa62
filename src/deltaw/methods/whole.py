"""Parts of a model that an adapter trains whole, beside its other updates: modules by their names, norms, biases, everything, or
some tokens' rows of the embedding. Reads the model, changes nothing.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import TargetError, nearest
from deltaw.layers.unwrap import plain_class
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.whole import Replaced, ReplacedRows

Modules = Mapping[str, nn.Module]
"""Name → module of the base, without those of adapters."""


def with_wholes(
    modules: Modules,
    whole: str | Sequence[str],
    tokens: str | Sequence[int],
    updates: Mapping[str, Update],
    *,
    norms: bool = False,
) -> dict[str, Update]:
    """Layer name → an update that starts from the base's own values: of the modules that `whole` names and all inside them, of
    the `norms` besides, and of the rows of `tokens`. fp32 (float64 on a float64 base), one parameter for layers whose weights
    are tied. `updates` are those that the layers get besides.

    Raises TargetError with everything wrong: names that match nothing, modules without parameters or that take an update as well,
    tokens that are none.
    """
    problems: list[str] = []
    chosen: list[str] = []
    for name in _split(whole):
        found = _named(modules, name)
        if not found:
            problems.append(f"whole: {name!r} matches no module{nearest(name, modules)}")
        chosen += found
    if norms:
        found = [n for n, module in modules.items() if is_norm(module) and n not in updates]
        if not found:
            problems.append("norms: the model has no normalisation layer with parameters")
        chosen += found
    made = _replaced(modules, chosen, updates, problems)
    if tokens not in ("", ()):
        made |= _rows(modules, tokens, {**updates, **made}, problems)
    if problems:
        raise TargetError("These settings do not fit the model:", problems)
    return made


def inside(modules: Modules, whole: str | Sequence[str]) -> set[str]:
    """The modules that `whole` names, and all inside them."""
    return set(_inside(modules, [found for name in _split(whole) for found in _named(modules, name)]))


def _named(modules: Modules, name: str) -> list[str]:
    return [n for n in modules if n and (n == name or n.endswith(f".{name}") or fnmatch.fnmatchcase(n, name))]


def _inside(modules: Modules, chosen: Sequence[str]) -> list[str]:
    return [n for n in modules if any(n == c or n.startswith(f"{c}.") for c in chosen)]


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalisation (LayerNorm, LlamaRMSNorm, GroupNorm …) that has parameters."""
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and "Norm" in plain_class(module).__name__ and all(p.ndim == 1 for p in own)


def biases(modules: Modules, taken: Mapping[str, Update]) -> dict[str, Update]:
    """An update of every bias of the model, but for those of modules that `taken` has."""
    own = {
        name: [k for k, p in m._parameters.items() if p is not None and _is_bias(k, p)] for name, m in modules.items()
    }
    return _in_place_of(modules, {n: names for n, names in own.items() if names and n not in taken}, taken)


def _is_bias(own_name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 1 and (own_name == "bias" or own_name.endswith("_bias"))


def everything(modules: Modules) -> dict[str, Update]:
    """An update of every floating-point parameter of the model."""
    own = {
        n: [k for k, p in m._parameters.items() if p is not None and p.is_floating_point()] for n, m in modules.items()
    }
    return _in_place_of(modules, {n: names for n, names in own.items() if names}, {})


def _split(names: Any) -> list[Any]:
    return [n.strip() for n in names.split(",") if n.strip()] if isinstance(names, str) else list(names)


def _replaced(
    modules: Modules, chosen: Sequence[str], updates: Mapping[str, Update], problems: list[str]
) -> dict[str, Update]:
    wanted: dict[str, list[str]] = {}
    for name in _inside(modules, chosen):
        own = [k for k, p in modules[name]._parameters.items() if p is not None]
        if name in updates:
            problems.append(f"whole: {name!r} is among the targets too: train it whole or by an update")
        elif own:
            wanted[name] = own
    made = _in_place_of(modules, wanted, updates)
    for name in chosen:
        if not any(n == name or n.startswith(f"{name}.") for n in (*made, *updates)):
            problems.append(f"whole: {name!r} has no parameters")
    return made


def _in_place_of(
    modules: Modules, wanted: Mapping[str, Iterable[str]], updates: Mapping[str, Update]
) -> dict[str, Update]:
    """Trained values for these modules' own parameters, one for those that are tied."""
    values: dict[Tensor, nn.Parameter] = {}
    made: dict[str, Update] = {}
    for name, names in wanted.items():
        own = {k: modules[name]._parameters[k] for k in names}
        for parameter in own.values():
            assert parameter is not None
            values.setdefault(parameter, _start(parameter))
        made[name] = Replaced({k: values[p] for k, p in own.items() if p is not None})
    return made | _tied_to(modules, values, {**updates, **made})


def _tied_to(modules: Modules, values: Mapping[Tensor, nn.Parameter], taken: Mapping[str, Update]) -> dict[str, Update]:
    """The other layers that read one of these parameters: they follow, unless they have an update of their own."""
    made: dict[str, Update] = {}
    for name, layer in modules.items():
        shared = {k: values[p] for k, p in layer._parameters.items() if p is not None and p in values}
        if shared and name not in taken:
            made[name] = Replaced(shared)
    return made


def _rows(
    modules: Modules, tokens: str | Sequence[int], taken: Mapping[str, Update], problems: list[str]
) -> dict[str, Update]:
    embedding = getattr(modules[""], "get_input_embeddings", lambda: None)()
    ids = _ids(tokens)
    if not isinstance(embedding, nn.Embedding):
        problems.append("tokens: the model has no embedding of tokens")
        return {}
    count = embedding.weight.shape[0]
    if ids is None or not ids or min(ids) < 0 or max(ids) >= count:
        problems.append(f"tokens is {tokens!r}; it must be ids of tokens below {count}, several with commas")
        return {}
    indices = torch.tensor(sorted(set(ids)), device=embedding.weight.device)
    rows = _start(embedding.weight[indices])
    made: dict[str, Update] = {}
    for name, layer in modules.items():
        if layer._parameters.get("weight") is embedding.weight and isinstance(layer, (nn.Embedding, nn.Linear)):
            if name in taken:
                problems.append(f"tokens: {name!r} is trained already, whole or by an update")
            made[name] = ReplacedRows(indices, rows)
    return made


def _ids(tokens: Any) -> list[int] | None:
    try:
        return [int(t) for t in _split(tokens)]
    except (TypeError, ValueError):
        return None


def _start(value: Tensor) -> nn.Parameter:
    """A trainable copy, in fp32 or wider."""
    return nn.Parameter(value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True))
