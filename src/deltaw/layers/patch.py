"""The slot in which an adapted layer keeps its updates, the class that calls them, and modules that would not.

An adapted layer stays the same object and becomes an instance of a dynamic subclass of its own class, whose forward adds the
active update; closing the slot gives the class back. Some modules use the parameters of layers inside them without calling
these: Mamba multiplies by `self.dt_proj.weight`, WavLM's attention hands its projections' weights to a function. What the
forward of such a layer adds is nowhere then; that a module does so is found in its own code. Knows one layer or module, never a
model.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache, partial
from types import CodeType
from typing import Any, SupportsIndex

from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers import quantised
from deltaw.layers.attention import through_attention
from deltaw.layers.kinds import inner_class, takes_tokens
from deltaw.layers.ops.rows import Rows
from deltaw.layers.routing import UNSET, Route
from deltaw.layers.unwrap import itself, plain_class, remember


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


_READ = {"weight", "bias"}
# What is asked of a parameter without using its values
_ASKED = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda"}
_ASKING = {"isinstance", "hasattr", "type"}
# Methods that no forward calls
_NOT_IN_USE = (
    "__init__",
    "_init",
    "init",
    "reset",
    "tie",
    "_tie",
    "resize",
    "_resize",
    "set_",
    "load",
    "save",
    "from_",
)


def read_outside(parent: nn.Module, own: str) -> bool:
    """Whether this module uses parameters of its child `own` without calling it: PyTorch's attention its output projection's, its
    encoder layer, in evaluation, those of all; others where their code says `self.own.weight`."""
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return True
    cls: Any = plain_class(parent)
    return own in _read_by(cls)


def only_read(parent: nn.Module, own: str) -> bool:
    """Whether this module uses its child `own` for its parameters alone: no code of it calls the child or hands it on."""
    if isinstance(parent, nn.MultiheadAttention):
        return own == "out_proj"
    cls: Any = plain_class(parent)
    return own in _read_by(cls) - _used_by(cls)


@cache
def _read_by(cls: Any) -> frozenset[str]:
    """Names of the children whose parameters are used in the methods of this class."""
    found: set[str] = set()
    for function in _methods(cls):
        code = getattr(function, "__code__", None)
        if code is not None and _READ & set(_names(code)):
            reads = _Reads()
            reads.visit(_tree(function))
            found |= reads.found
    return frozenset(found)


@cache
def _used_by(cls: Any) -> frozenset[str]:
    """Names of the attributes that methods of this class use for more than what they ask of them."""
    found: set[str] = set()
    for function in _methods(cls):
        nodes = list(ast.walk(_tree(function)))
        asked = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in _READ | _ASKED}
        found |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and id(n) not in asked}
    return frozenset(found)


def _methods(cls: Any) -> Iterator[Any]:
    """The functions of a class that its forward may call."""
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(each).items():
            if inspect.isfunction(member) and not name.startswith(_NOT_IN_USE):
                yield inspect.unwrap(member)


def _tree(function: Any) -> ast.AST:
    """Nothing where there is no source; the first step of a training warns of layers that take no part in it."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return ast.Module([], [])


def _names(code: CodeType) -> Iterator[str]:
    """Attributes that the code and the functions in it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Reads(ast.NodeVisitor):
    """Finds `self.own.weight` where the values are used."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _ASKED and _child_of(node.value):
            return
        own = _child_of(node)
        if own and isinstance(node.ctx, ast.Load):
            self.found.add(own)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if not (isinstance(node.func, ast.Name) and node.func.id in _ASKING):
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self.generic_visit(node)


def _child_of(node: ast.expr) -> str | None:
    """own, of `self.own.weight` and `self.own.bias`."""
    if not (isinstance(node, ast.Attribute) and node.attr in _READ):
        return None
    child = node.value
    if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == "self":
        return child.attr
    return None
