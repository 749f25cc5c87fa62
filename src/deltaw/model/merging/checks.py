"""Checks before a merge: the weights' dtype, shape and order in memory, and what they are tied
to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from deltaw.errors import MergeError, shown
from deltaw.layers.kinds import in_few_bits
from deltaw.layers.ops.merging import Change, Product, Sum, Value
from deltaw.layers.tree import matrix_of, place_of
from deltaw.model.record import Adapters, known, readers
from deltaw.model.summary import updates


def check_mergeable(model: nn.Module, record: Adapters, names: Iterable[str]) -> None:
    """Raise MergeError for adapters with updates that no weight can hold."""
    reasons = {n: {u.unmergeable for u in updates(model, known(record, n)).values() if u.unmergeable} for n in names}
    problems = [f"{name!r}: {why}" for name, whys in reasons.items() for why in sorted(whys)]
    if problems:
        raise MergeError(
            "Not merged:", problems, "Use such an adapter beside the model, as it is: use(model, name), load and save."
        )


def check_writable(owner: nn.Module, changes: Iterable[str]) -> None:
    """Raise MergeError for quantised weights: W0 + ΔW, rounded to their few bits, keeps little of ΔW."""
    forms = {name: form for name in changes if (form := in_few_bits(*place_of(owner, name)))}
    if forms:
        raise MergeError(
            f"This adapter cannot be merged here: the weights of {shown([line(name) for name in forms])} are quantised "
            f"({'; '.join(sorted({form.name for form in forms.values()}))}), and rounding W0 + ΔW to them would lose much of "
            "ΔW.\nSave the adapter, and merge it into the model as it was before it was quantised. On the command line: deltaw "
            "merge MODEL ADAPTER --any-base; in Python: merge_files(base, adapter, out, check_base=False). Or go on using the "
            "adapter beside this model, as it is."
        )


def check_possible(owner: nn.Module, changes: dict[str, Change], *, untie: bool) -> bool:
    """Raise MergeError with every parameter that cannot take its change. Return whether some are to be untied.

    Tied parameters that get the same value are one weight: only one of them is left in `changes`.
    """
    problems = [why for name, change in changes.items() if (why := misfit(owner, name, change))]
    tied = leave_one_of_tied(owner, changes)
    problems += [] if untie else tied
    if problems:
        raise MergeError("This adapter cannot be merged as the model stands:", problems)
    return bool(tied)


def line(parameter: str) -> str:
    """Return a report's name of a parameter: a layer's weight goes by the layer's name."""
    return parameter.removesuffix(".weight")


def misfit(owner: nn.Module, name: str, change: Change) -> str | None:
    """Return why a parameter cannot take this change; None if it can."""
    layer, own_name = place_of(owner, name)
    parameter = layer._parameters.get(own_name)
    if form := in_few_bits(layer, own_name):
        return f"{name} is quantised ({form.name})"
    if parameter is None:
        return f"the base has no {name} that the adapter's could be merged into"
    if parameter.ndim > 2 and not parameter.is_contiguous():
        return f"{name} is stored in another order (channels last?): call model.to(memory_format=torch.contiguous_format) first"
    terms = [term for term, _ in change.terms] if isinstance(change, Sum) else [change]
    shape = matrix_of(owner, name).shape
    other = next((term.W.shape for term in terms if isinstance(term, Value) and term.W.shape != shape), None)
    if other is not None:
        rows = max(other)
        return (
            f"{name} is {list(parameter.shape)}, the adapter's vocabulary has {rows} tokens: "
            f"call model.resize_token_embeddings({rows}) before the adapter is loaded"
        )
    return None


def leave_one_of_tied(owner: nn.Module, changes: dict[str, Change]) -> list[str]:
    """Leave one of tied parameters in `changes` where all of them get the same value.

    Return the problems with the others: layers that share such a weight would change with it.
    """
    problems = []
    for names in readers(owner).values():
        first = next((n for n in names if n in changes), None)
        if first is None:
            continue
        others = [n for n in names if n != first]
        if all(n in changes and _same_value(owner, first, n, changes) for n in others):
            for n in others:
                del changes[n]
        else:
            problems.append(
                f"{first} is tied to {', '.join(others)}, which would change with it. Give each a weight of its own: --untie on "
                "the command line, merge(model, untie=True) in Python"
            )
    return problems


def _same_value(owner: nn.Module, one: str, other: str, changes: Mapping[str, Change]) -> bool:
    """Return whether both names, which are of one weight, get the same value."""
    W, V = matrix_of(owner, one), matrix_of(owner, other)
    return _same_change(changes[one], changes[other], turned=(W.shape, W.stride()) != (V.shape, V.stride()))


def _same_change(one: Change, other: Change, *, turned: bool) -> bool:
    """Return whether both set the same value, or add the same ΔW.

    `turned`: the other is of the transpose. An embedding and a head with the same A and B are, as PEFT's ensure_weight_tying
    makes them.
    """
    if isinstance(one, Sum) and isinstance(other, Sum) and len(one.terms) == len(other.terms):
        pairs = zip(one.terms, other.terms, strict=True)
        return all(w == v and _same_change(a, b, turned=turned) for (a, w), (b, v) in pairs)
    if isinstance(one, Value) and isinstance(other, Value):
        return torch.equal(one.W, other.W.mT if turned else other.W)
    if not (isinstance(one, Product) and isinstance(other, Product)) or one.scale != other.scale:
        return False
    A, B = (other.B.mT, other.A.mT) if turned else (other.A, other.B)
    return torch.equal(one.A, A) and torch.equal(one.B, B)
