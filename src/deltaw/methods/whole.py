"""Parts of a model that an adapter trains whole, beside its other updates: modules by their names, norms, biases, everything, or
some tokens' rows of the embedding. Reads the model, changes nothing.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

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
    """Return layer name → an update that starts from the base's values, beside the `updates` that the layers get.

    They are of the modules that `whole` names and all inside them, with `norms` of the normalisations, and of the rows of
    `tokens`. Values are fp32 (float64 on a float64 base); layers whose weights are tied share one parameter.

    Raises TargetError with everything wrong: names that match nothing, modules without parameters or that take an update as well,
    tokens outside of the vocabulary.
    """
    problems: list[str] = []
    chosen: list[str] = []
    for name in _names(whole):
        matching = _named(modules, name)
        if not matching:
            problems.append(f"whole: {name!r} matches no module{nearest(name, modules)}")
        chosen += matching
    if norms:
        with_parameters = [n for n, module in modules.items() if is_norm(module) and n not in updates]
        if not with_parameters:
            problems.append("norms: the model has no normalisation layer with parameters")
        chosen += with_parameters
    replaced = _replaced(modules, chosen, updates, problems)
    if tokens not in ("", ()):
        replaced |= _rows(modules, tokens, {**updates, **replaced}, problems)
    if problems:
        raise TargetError("These settings do not fit the model:", problems)
    return replaced


def inside(modules: Modules, whole: str | Sequence[str]) -> set[str]:
    """Return the names of the modules that `whole` means, and of all inside them."""
    return set(_inside(modules, [matching for name in _names(whole) for matching in _named(modules, name)]))


def _named(modules: Modules, name: str) -> list[str]:
    """Return the modules of a dotted name, the end of one, or a glob."""
    return [n for n in modules if n and (n == name or n.endswith(f".{name}") or fnmatch.fnmatchcase(n, name))]


def _inside(modules: Modules, chosen: Sequence[str]) -> list[str]:
    return [n for n in modules if any(n == c or n.startswith(f"{c}.") for c in chosen)]


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation (LayerNorm, LlamaRMSNorm, GroupNorm …) that has parameters."""
    parameters = [p for p in module._parameters.values() if p is not None]
    return bool(parameters) and "Norm" in plain_class(module).__name__ and all(p.ndim == 1 for p in parameters)


def biases(modules: Modules, taken: Mapping[str, Update]) -> dict[str, Update]:
    """Return an update of every bias of the model, but for those of modules in `taken`."""
    names = {
        name: [key for key, p in module._parameters.items() if p is not None and _is_bias(key, p)]
        for name, module in modules.items()
        if name not in taken
    }
    return _in_place_of(modules, {n: of_module for n, of_module in names.items() if of_module}, taken)


def _is_bias(own_name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 1 and (own_name == "bias" or own_name.endswith("_bias"))


def everything(modules: Modules) -> dict[str, Update]:
    """Return an update of every floating-point parameter of the model."""
    names = {
        name: [key for key, p in module._parameters.items() if p is not None and p.is_floating_point()]
        for name, module in modules.items()
    }
    return _in_place_of(modules, {n: of_module for n, of_module in names.items() if of_module}, {})


def _names(text: str | Sequence[str]) -> list[str]:
    return [n.strip() for n in text.split(",") if n.strip()] if isinstance(text, str) else list(text)


def _replaced(
    modules: Modules, chosen: Sequence[str], updates: Mapping[str, Update], problems: list[str]
) -> dict[str, Update]:
    """Return updates of the chosen modules and of those inside them; what is wrong is added to `problems`."""
    wanted: dict[str, list[str]] = {}
    for name in _inside(modules, chosen):
        parameters = [key for key, p in modules[name]._parameters.items() if p is not None]
        if name in updates:
            problems.append(f"whole: {name!r} is among the targets too: train it whole or by an update")
        elif parameters:
            wanted[name] = parameters
    replaced = _in_place_of(modules, wanted, updates)
    for name in chosen:
        if not any(n == name or n.startswith(f"{name}.") for n in (*replaced, *updates)):
            problems.append(f"whole: {name!r} has no parameters")
    return replaced


def _in_place_of(
    modules: Modules, wanted: Mapping[str, Iterable[str]], updates: Mapping[str, Update]
) -> dict[str, Update]:
    """Return trained values for parameters (module name → the module's names of them), one value for those that are tied."""
    values: dict[Tensor, nn.Parameter] = {}
    replaced: dict[str, Update] = {}
    for name, own_names in wanted.items():
        of_module: dict[str, nn.Parameter] = {}
        for own_name in own_names:
            parameter = modules[name]._parameters[own_name]
            assert parameter is not None
            of_module[own_name] = values.setdefault(parameter, _start(parameter))
        replaced[name] = Replaced(of_module)
    return replaced | _tied_to(modules, values, {**updates, **replaced})


def _tied_to(modules: Modules, values: Mapping[Tensor, nn.Parameter], taken: Mapping[str, Update]) -> dict[str, Update]:
    """Return updates of the other layers that read one of these parameters, unless they have an update of their own."""
    following: dict[str, Update] = {}
    for name, layer in modules.items():
        shared = {key: values[p] for key, p in layer._parameters.items() if p is not None and p in values}
        if shared and name not in taken:
            following[name] = Replaced(shared)
    return following


def _rows(
    modules: Modules, tokens: str | Sequence[int], taken: Mapping[str, Update], problems: list[str]
) -> dict[str, Update]:
    """Return updates of these tokens' rows, of the embedding and of layers tied to it; what is wrong is added to `problems`."""
    embedding = getattr(modules[""], "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        problems.append("tokens: the model has no embedding of tokens")
        return {}
    ids, count = _ids(tokens), embedding.weight.shape[0]
    if ids is None or not ids or min(ids) < 0 or max(ids) >= count:
        problems.append(f"tokens is {tokens!r}; it must be ids of tokens below {count}, several with commas")
        return {}
    indices = torch.tensor(sorted(set(ids)), device=embedding.weight.device)
    rows = _start(embedding.weight[indices])
    replaced: dict[str, Update] = {}
    for name, layer in modules.items():
        if layer._parameters.get("weight") is embedding.weight and isinstance(layer, (nn.Embedding, nn.Linear)):
            if name in taken:
                problems.append(f"tokens: {name!r} is trained already, whole or by an update")
            replaced[name] = ReplacedRows(indices, rows)
    return replaced


def _ids(tokens: str | Sequence[int]) -> list[int] | None:
    """Return tokens as numbers; None where one is no number."""
    try:
        return [int(t) for t in (_names(tokens) if isinstance(tokens, str) else tokens)]
    except (TypeError, ValueError):
        return None


def _start(value: Tensor) -> nn.Parameter:
    """Return a trainable copy, in fp32 or wider."""
    return nn.Parameter(value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True))
