"""The record that a model with adapters carries at its root.

It holds the route that all adapted layers share, the adapters and their layers, which parameters trained before, and, while
adapters are merged, what gives the original weights back (model/merging/kept.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypedDict, TypeVar, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from deltaw.errors import AdapterError, nearest
from deltaw.layers.ops.residency import Residency
from deltaw.layers.ops.rows import Rows
from deltaw.layers.ops.undo import Kept
from deltaw.layers.processes.shards import whole
from deltaw.layers.routing import Route
from deltaw.layers.ties import Untied
from deltaw.layers.tree import RECORD, base_modules, dotted, owner_of
from deltaw.methods.plan import Method

if TYPE_CHECKING:
    from transformers import GenerationConfig

_Rest = ParamSpec("_Rest")
_Value = TypeVar("_Value")
EndTokens = int | list[int] | None
"""The values that transformers' `eos_token_id` may have."""


class Notes(TypedDict, total=False):
    """Facts about an attached adapter that are no setting of its method."""

    ends: tuple[int, ...]
    """Ids of the tokens that end what it was taught to say."""
    of_base: Mapping[str, str]
    """Facts about the base that stand in its file, taken while the base was whole (see `remember_base`)."""
    rounding: float
    """‖ΔW − ΔW'‖ / ‖ΔW‖, where it was loaded in less than its file's precision."""
    tokenizer: Path
    """The adapter folder with a tokenizer of its own that it was loaded from."""
    training: Mapping[str, object]
    """Settings of its training that its file names: prompt template, form of the data and so on."""


@dataclass
class Attached:
    """One adapter on a model."""

    method: Method
    layers: tuple[str, ...]
    """Dotted names of the modules that have its updates."""
    left_out: dict[str, str]
    """Dotted name of a dense weight without an update → why its method left it out."""
    metadata: Notes = field(default_factory=Notes)


@dataclass
class Adapters:
    """The record of one model. `copy.deepcopy` and pickle take it along with the model."""

    route: Route = field(default_factory=Route)
    attached: dict[str, Attached] = field(default_factory=dict)
    was_trainable: dict[str, bool] = field(default_factory=dict)
    """Name of a base parameter → its `requires_grad` before the first attach."""
    merged: dict[str, float] = field(default_factory=dict)
    """Adapters that are merged into the base → their weights."""
    originals: dict[str, Kept] = field(default_factory=dict)
    """While merged: name of a parameter → what gives it back."""
    eos: tuple[GenerationConfig, EndTokens] | None = None
    """While merged, if the merge added end tokens: the model's generation_config, and its eos_token_id before."""
    untied: Untied | None = None
    """While merged, if the merge untied weights: what gives the base its ties back."""
    before_merge: str | None = None
    """While merged: the adapter that was active before."""
    residency: Residency = field(default_factory=Residency)
    hooks: list[RemovableHandle] = field(default_factory=list)
    """The hooks that tell when a pass begins and ends (model/passes.py)."""
    rows_mixed: list[str] | None = None
    """Messages on layers in which a batch's rows cannot be told apart; None before anything is known (model/row_order.py)."""
    rows_reached: set[str] = field(default_factory=set)
    """Layers that trial passes have reached."""
    rows_asked: set[frozenset[object]] = field(default_factory=set)
    """Forms of the batches that were tried (layers/ops/row_forms.py)."""


# --- the base's parameters ----------------------------------------------------------------------------------------


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of the base as it is now, a tied one under its first name."""
    return ((names[0], parameter) for parameter, names in readers(model).items())


def readers(model: nn.Module, *, now: bool = False) -> dict[nn.Parameter, list[str]]:
    """Return each parameter of the base and all of its names; a tied one has several.

    Weights that a merge has untied still count as tied, unless the ties of `now` are asked for.
    """
    names: dict[nn.Parameter, list[str]] = {}
    record = None if now else find_record(model)
    shared = record.untied.shared if record is not None and record.untied is not None else {}
    for module_name, module in base_modules(model):
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                name = dotted(module_name, own_name)
                names.setdefault(shared.get(name, parameter), []).append(name)
    return names


def on_whole_layers(
    function: Callable[Concatenate[nn.Module, _Rest], _Value],
) -> Callable[Concatenate[nn.Module, _Rest], _Value]:
    """Let a function see the layers with adapters whole where they are dealt out over processes, all of which then call it."""

    @functools.wraps(function)
    def on_whole(model: nn.Module, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Value:
        with whole(model, lambda: adapted(model)):
            return function(model, *args, **kwargs)

    return cast(Callable[Concatenate[nn.Module, _Rest], _Value], on_whole)


def adapted(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of all layers with adapters, the base's and the adapters'."""
    record, owner = find_record(model), owner_of(model)
    names = {layer for adapter in record.attached.values() for layer in adapter.layers} if record is not None else ()
    return {parameter for name in names for parameter in owner.get_submodule(name).parameters()}


# --- the record ---------------------------------------------------------------------------------------------------


def find_record(model: nn.Module) -> Adapters | None:
    """Return the model's record, also through a wrapper (DDP, torch.compile); None if no adapter is attached."""
    return owner_of(model).__dict__.get(RECORD)


def record_of(model: nn.Module) -> Adapters:
    """Return the model's record. Raises AdapterError if no adapter is attached."""
    record = find_record(model)
    if record is None:
        raise AdapterError("The model has no adapter: attach or load one first.")
    return record


def known(record: Adapters, name: str) -> str:
    """Return the name of an attached adapter as it is. Raises AdapterError for any other name."""
    if not isinstance(name, str) or name not in record.attached:
        raise AdapterError(
            f"There is no adapter {name!r}{nearest(str(name), record.attached)}. Attached: {', '.join(record.attached)}."
        )
    return name


def in_use(record: Adapters) -> str:
    """Return the one adapter that this thread goes through. Raises AdapterError if there is none, or one for each row."""
    chosen = record.route.current()
    if isinstance(chosen, Rows):
        raise AdapterError("Rows have adapters of their own in this route block: name the adapter that is meant.")
    if chosen is None:
        raise AdapterError(f"No adapter is active: name one. Attached: {', '.join(record.attached)}.")
    return str(chosen)


def bring(record: Adapters, names: Iterable[str | None]) -> None:
    """Move the tensors of these adapters to their layers' device, if they wait in host memory."""
    record.residency.bring(names, {*record.route.held(), record.route.active} if record.residency.kept else ())


def in_open_block(record: Adapters, names: Iterable[str]) -> str | None:
    """Return the beginning of a message if an open block or a pass of any thread uses one of these adapters."""
    held = record.route.held().intersection(names)
    return f"Adapter {min(held)!r} is in use by an open using or route block, or by a pass" if held else None


def merged_names(record: Adapters) -> str:
    """Return the beginning of a message: "Adapter 'a' is" or "Adapters 'a', 'b' are"."""
    names = ", ".join(repr(name) for name in record.merged)
    return f"Adapter {names} is" if len(record.merged) == 1 else f"Adapters {names} are"


def check_free(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless an adapter of this name can be attached now."""
    record = find_record(model) or Adapters()
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"{name!r} cannot name an adapter: a name is a non-empty string without dots.")
    if name in record.attached:
        raise AdapterError(
            f"An adapter {name!r} is attached already. Choose another name, or detach(model, {name!r}) first."
        )
    if record.merged:
        raise AdapterError(f"{merged_names(record)} merged into the base: call unmerge(model) first.")


def problems_of_weights(weights: object) -> list[str]:
    """Return what is wrong with the weights of adapters, which are a mapping of names to finite numbers."""
    if not isinstance(weights, Mapping):
        return [f"weights is a {type(weights).__name__}; it must be a mapping of names to numbers"]
    problems = [] if weights else ["weights is empty: name at least one adapter"]
    for name, weight in weights.items():
        try:
            if not math.isfinite(weight):
                problems.append(f"the weight of {name!r} is {weight!r}, with which the sum would not be finite")
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
            problems.append(f"the weight of {name!r} is {weight!r}; it must be a number")
    return problems
