"""Which modules use the parameters of layers inside them without calling these. Knows one module, never a model.

Mamba multiplies by `self.dt_proj.weight`, WavLM's attention hands its projections' weights to a function: what the forward of
such a layer adds is nowhere then. That a module does so is found in its own code.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from deltaw.plain import plain_class

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
