"""The slot in which an adapted layer keeps its updates, and the class that calls them. Knows one layer, never a model."""

from __future__ import annotations

from functools import partial
from typing import Any, SupportsIndex

from torch import Tensor, nn

from deltaw import quantised
from deltaw.attention_rows import through_attention
from deltaw.errors import AdapterError
from deltaw.layers import inner_class, takes_tokens
from deltaw.plain import itself, plain_class, remember
from deltaw.routes import UNSET, Route
from deltaw.rows import Rows


class Slot(nn.Module):
    """The one child that an adapted layer gets: its updates by adapter name, and the model's route."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route
        self.name = ""
        """The layer's, in the model."""
        self.rows_at = 0
        """The dimension of the layer's input that has the batch's rows."""
        self.parts: dict[Any, set[int]] = {}
        """A batch's form → how many parts for a row the layer's input was found to have."""

    # Straight into _modules: add_module would refuse adapter names such as "route" or "training"
    def put(self, name: str, update: nn.Module) -> None:
        self._modules[name] = update

    def drop(self, name: str) -> None:
        self._modules.pop(name, None)

    def names(self) -> list[str]:
        return list(self._modules)

    def get(self, name: str | None) -> Any:
        return self._modules.get(name) if name is not None else None

    def parameter(self, layer: Any, own_name: str) -> Tensor | None:
        """What a module around the layer reads as this parameter of it: with the active update, if that changes it."""
        own: Tensor | None = layer._parameters[own_name]
        chosen = self.route.chosen()
        if type(chosen) is Rows and chosen.alike:
            chosen = chosen.names[0]
        if type(chosen) is not Rows:
            update: Any = self._modules.get(chosen)
            return own if update is None else update.parameter(layer, own_name)
        updates: list[Any] = [update for name, update in self._modules.items() if name in chosen.rows]
        if any(update.parameter(layer, own_name) is not own for update in updates):
            raise AdapterError(
                f"The {own_name} of a {plain_class(layer).__name__} is read by the module around it, for all rows at once: they "
                "cannot have adapters of their own there. Use one adapter at a time."
            )
        return own


SLOT = "deltaw"
"""Name of the child module that holds a layer's updates."""

_adapted: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def adapted_class(cls: Any, read: tuple[str, ...] = ()) -> type[nn.Module]:
    """The subclass of `cls` whose forward adds the active update, and whose parameters `read` are read with it. Cached, so that
    copies share it."""
    if (cls, read) not in _adapted:
        inner = inner_class(cls)
        plain: Any = (inner or cls).forward if quantised.package_class(cls) is None else partial(quantised.output, cls)

        def forward(self: Any, *inputs: Tensor, **named: Tensor) -> Tensor:
            slot = self._modules[SLOT]
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

        def reduce(self: Any, protocol: SupportsIndex) -> tuple[Any, ...]:
            return _unpickled, (cls, read), vars(self)

        own = {"__reduce_ex__": reduce, "__module__": cls.__module__}
        own |= {name: property(partial(_read, name)) for name in read}
        if inner is None:
            made = type(cls.__name__, (cls,), own | {"forward": forward})
        else:  # it comes between them, where the forward of `cls` calls it
            made = type(cls.__name__, (cls, type(inner.__name__, (inner,), {"forward": forward})), own)
        remember(made, cls, inner, read=bool(read))
        _adapted[cls, read] = made
    return _adapted[cls, read]


def _each_row(rows: Rows, slot: Slot, layer: Any, plain: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """An adapted layer's output in a pass whose rows have adapters of their own."""
    x = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
    by_tokens = takes_tokens(layer)
    if rows.form is not None and x is not None and x.dim() and not (by_tokens and len(x) == rows.form.tokens):
        rows.form.check(slot.name or plain_class(layer).__name__, x, slot.rows_at, slot.parts)
    if by_tokens:
        return rows.by_tokens(layer, slot._modules, partial(plain, layer), inputs, named)
    if isinstance(layer, nn.MultiheadAttention):
        own = partial(plain, layer)
        return through_attention(rows, slot.route, layer, slot._modules, own, inputs, named)
    x = only_input(layer, inputs, named)
    out, kept = plain(itself(layer), x), slot.route.kept()
    if not slot.rows_at:
        return rows.through(layer, slot._modules, x, out, kept)
    x, out = x.movedim(slot.rows_at, 0), out.movedim(slot.rows_at, 0)
    return rows.through(layer, slot._modules, x, out, kept).movedim(0, slot.rows_at)


def _check_rows(rows: Rows, layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raise AdapterError where the layer's input is not a batch of these rows."""
    x = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
    if x is not None:
        rows.check(x, dimensions(layer))


def dimensions(layer: nn.Module) -> int:
    """Count the dimensions that an adapted layer's input has at least, if its first one is the batch's."""
    weight = layer._parameters.get("weight")
    return 2 if weight is None else max(2, weight.dim())


def _read(own_name: str, layer: Any) -> Tensor | None:
    value: Tensor | None = layer._modules[SLOT].parameter(layer, own_name)
    return value


def only_input(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    """A layer's one input, under whatever name its own forward gives it. Raises AdapterError where there are several."""
    if len(inputs) + len(named) != 1:
        raise AdapterError(
            f"A {type(layer).__name__} takes several inputs: its rows cannot have adapters of their own. Adapters that leave it "
            "out (targets='attention', say) can be mixed in a batch."
        )
    return inputs[0] if inputs else next(iter(named.values()))


def _unpickled(cls: type[nn.Module], read: tuple[str, ...] = ()) -> nn.Module:
    """An empty layer of `cls`'s adapted class, for pickle to fill: the class itself has no name to be found by."""
    adapted = adapted_class(cls, read)
    return adapted.__new__(adapted)


def slot_of(layer: nn.Module) -> Slot | None:
    found = layer._modules.get(SLOT)
    return found if isinstance(found, Slot) else None


def open_slot(layer: nn.Module, route: Route, *, read: bool = False) -> Slot:
    """Give the layer its slot and its dynamic class; nothing changes while the route is off it. `read`: the module around it uses
    its parameters without calling it. Packed bits stay what they are: nothing can be added to these."""
    slot = Slot(route)
    slot.train(layer.training)
    names = tuple(layer._parameters) if read and quantised.form_of(layer) is None else ()
    layer.__class__ = adapted_class(type(layer), names)
    layer._modules[SLOT] = slot
    return slot


def close_slot(layer: nn.Module) -> None:
    """Undo `open_slot`: the layer has its own class and children again."""
    layer.__class__ = plain_class(layer)
    del layer._modules[SLOT]
