"""The slot in which an adapted layer keeps its updates, and the class that calls them.

An adapted layer must stay the same object under the same name: optimizers, hooks, FSDP, other modules and the user hold it. A
wrapper around it would change all names, and a hook cannot replace what the base computes. So the object gets another class:

- `open_slot` gives it a `Slot`, its one new child, and makes it an instance of a dynamic subclass of its own class
  (`adapted_class`). That class's forward asks the route for the active adapter, and calls that one's update in place of the
  layer's own forward.
- `close_slot` gives the class back and removes the child: nothing is left.
- Where `super().forward` is all that a subclass's forward computes with (Gemma scales an embedding's output), the dynamic class
  comes between the two: Gemma → dynamic → `nn.Embedding`. The update is then scaled as the weight is (`inner_class`).
- A module around the layer may use its weight without calling it (layers/source.py finds these). The dynamic class then has
  properties of the parameters' names, so that `layer.weight` reads as W0 + ΔW (`parameter` of the slot).
- There is one dynamic class for each class, so copies share it. It has no name that pickle could find; `_unpickled` makes it
  anew.

What the layer was before is in layers/unwrap.py, which kinds and updates use. Knows one layer, never a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, SupportsIndex

from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers import quantised
from deltaw.layers.attention import through_attention
from deltaw.layers.kinds import inner_class, takes_tokens
from deltaw.layers.ops.rows import Rows
from deltaw.layers.routing import UNSET, Route
from deltaw.layers.unwrap import Before, itself, plain_class, remember


class Slot(nn.Module):
    """The one child that an adapted layer gets: its updates by adapter name, and the model's route."""

    _modules: dict[str, Any]
    """The updates, each a `methods.updates.base.Update`."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route
        self.name = ""
        """The layer's, in the model."""
        self.rows_at = 0
        """The dimension of the layer's input that has the batch's rows."""
        self.parts: dict[object, set[int]] = {}
        """A batch's form → how many parts for a row the layer's input was found to have."""

    # Straight into _modules: add_module would refuse adapter names such as "route" or "training"
    def put(self, name: str, update: nn.Module) -> None:
        """Set the update of this adapter."""
        self._modules[name] = update

    def drop(self, name: str) -> None:
        """Remove the update of this adapter, if it has one."""
        self._modules.pop(name, None)

    def names(self) -> list[str]:
        """Return the names of the adapters that have an update here."""
        return list(self._modules)

    def get(self, name: str | None) -> Any:
        """Return the update of this adapter; None where it has none."""
        return self._modules.get(name) if name is not None else None

    def parameter(self, layer: nn.Module, name: str) -> Tensor | None:
        """Return what a module around the layer reads as this parameter of it: with the active update, if that changes it."""
        stored = layer._parameters[name]
        chosen = self.route.chosen()
        if type(chosen) is Rows and chosen.alike:
            chosen = chosen.names[0]
        if type(chosen) is not Rows:
            update = self._modules.get(chosen)
            if update is None:
                return stored
            value: Tensor | None = update.parameter(layer, name)
            return value
        updates = [update for adapter, update in self._modules.items() if adapter in chosen.rows]
        if any(update.parameter(layer, name) is not stored for update in updates):
            raise AdapterError(
                f"The {name} of a {plain_class(layer).__name__} is read by the module around it, for all rows at once: they "
                "cannot have adapters of their own there. Use one adapter at a time."
            )
        return stored


SLOT = "deltaw"
"""Name of the child module that holds a layer's updates."""

_adapted: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def adapted_class(cls: type[nn.Module], read: tuple[str, ...] = ()) -> type[nn.Module]:
    """Return the subclass of `cls` whose forward calls the active update. Its parameters `read` are read with that update too."""
    if (cls, read) not in _adapted:
        inner = inner_class(cls)
        members: dict[str, object] = {"__reduce_ex__": _reducing(cls, read), "__module__": cls.__module__}
        members |= {name: property(partial(_read, name)) for name in read}
        if inner is None:
            adapted = type(cls.__name__, (cls,), members | {"forward": _adapted_forward(cls, cls.forward)})
        else:  # it comes between them, where the forward of `cls` calls it
            between = type(inner.__name__, (inner,), {"forward": _adapted_forward(cls, inner.forward)})
            adapted = type(cls.__name__, (cls, between), members)
        remember(adapted, Before(cls, inner, read=bool(read)))
        _adapted[cls, read] = adapted
    return _adapted[cls, read]


def _adapted_forward(cls: type[nn.Module], forward_of_base: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of an adapted class: the active update's branch, or `forward_of_base`, which computes the base's."""
    plain = forward_of_base if quantised.package_class(cls) is None else partial(quantised.output, cls)

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        slot: Any = self._modules[SLOT]
        chosen = slot.route.chosen()
        if type(chosen) is Rows:
            if slot.route.here.choice is UNSET and not takes_tokens(self):  # the layer is called by itself
                _check_rows(chosen, self, inputs, named)
            if not chosen.alike:
                if not any(name in slot._modules for name in chosen.rows):
                    return plain(self, *inputs, **named)
                return _each_row(chosen, slot, self, plain, inputs, named)
            chosen = chosen.names[0]
        update = slot._modules.get(chosen)
        if update is None:
            return plain(self, *inputs, **named)
        return update.branch(self, *inputs, **named)

    return forward


def _reducing(cls: type[nn.Module], read: tuple[str, ...]) -> Callable[..., object]:
    """Return the `__reduce_ex__` of an adapted class: how pickle and copy rebuild a layer of it."""

    def reduce(self: nn.Module, protocol: SupportsIndex) -> tuple[object, ...]:
        return _unpickled, (cls, read), vars(self)

    return reduce


def _each_row(
    rows: Rows,
    slot: Slot,
    layer: nn.Module,
    plain: Callable[..., Any],
    inputs: tuple[Any, ...],
    named: dict[str, Any],
) -> Any:
    """Return an adapted layer's output in a pass whose rows have adapters of their own."""
    x = _first_tensor(inputs, named)
    by_tokens = takes_tokens(layer)
    if rows.form is not None and x is not None and x.dim() and not (by_tokens and len(x) == rows.form.tokens):
        rows.form.check(slot.name or plain_class(layer).__name__, x, slot.rows_at, slot.parts)
    if by_tokens:
        return rows.by_tokens(layer, slot._modules, partial(plain, layer), inputs, named)
    if isinstance(layer, nn.MultiheadAttention):
        base = partial(plain, layer)
        return through_attention(rows, slot.route, layer, slot._modules, base, inputs, named)
    x = only_input(layer, inputs, named)
    out, kept = plain(itself(layer), x), slot.route.kept()
    if not slot.rows_at:
        return rows.through(layer, slot._modules, x, out, kept)
    x, out = x.movedim(slot.rows_at, 0), out.movedim(slot.rows_at, 0)
    return rows.through(layer, slot._modules, x, out, kept).movedim(0, slot.rows_at)


def _check_rows(rows: Rows, layer: nn.Module, inputs: Sequence[object], named: dict[str, object]) -> None:
    """Raise AdapterError where the layer's input is not a batch of these rows."""
    x = _first_tensor(inputs, named)
    if x is not None:
        rows.check(x, dimensions(layer))


def _first_tensor(inputs: Sequence[object], named: dict[str, object]) -> Tensor | None:
    return next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)


def dimensions(layer: nn.Module) -> int:
    """Count the dimensions that an adapted layer's input has at least, if its first one is the batch's."""
    weight = layer._parameters.get("weight")
    return 2 if weight is None else max(2, weight.dim())


def _read(name: str, layer: nn.Module) -> Tensor | None:
    """Return the value of the property that stands for a parameter."""
    slot: Any = layer._modules[SLOT]
    value: Tensor | None = slot.parameter(layer, name)
    return value


def only_input(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    """Return a layer's one input, by whatever name its forward takes it. Raises AdapterError where there are several."""
    if len(inputs) + len(named) != 1:
        raise AdapterError(
            f"A {type(layer).__name__} takes several inputs: its rows cannot have adapters of their own. Adapters that leave it "
            "out (for example targets='attention') can be mixed in a batch."
        )
    return inputs[0] if inputs else next(iter(named.values()))


def _unpickled(cls: type[nn.Module], read: tuple[str, ...] = ()) -> nn.Module:
    """Return an empty layer of `cls`'s adapted class, for pickle to fill: the class itself has no name to be found by."""
    adapted = adapted_class(cls, read)
    return adapted.__new__(adapted)


def slot_of(layer: nn.Module) -> Slot | None:
    """Return an adapted layer's slot; None for a layer that is not adapted."""
    slot = layer._modules.get(SLOT)
    return slot if isinstance(slot, Slot) else None


def open_slot(layer: nn.Module, route: Route, *, read: bool = False) -> Slot:
    """Give the layer its slot and its dynamic class. Nothing that it computes changes while the route names none of its updates.

    Args:
        layer: Changed in place; it stays the same object.
        route: The model's, which names the active adapter.
        read: The module around the layer uses its parameters without calling it. A quantised weight stays as it is: nothing can
            be added to it.

    Returns:
        The slot, in evaluation or training mode as the layer is.
    """
    slot = Slot(route)
    slot.train(layer.training)
    names = tuple(layer._parameters) if read and quantised.form_of(layer) is None else ()
    layer.__class__ = adapted_class(type(layer), names)
    layer._modules[SLOT] = slot
    return slot


def close_slot(layer: nn.Module) -> None:
    """Undo `open_slot`: the layer has its former class and children again."""
    layer.__class__ = plain_class(layer)
    del layer._modules[SLOT]
