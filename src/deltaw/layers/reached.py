"""Layers that no training reaches, found in the code of the modules around them. Reads modules, changes nothing.

A sparse-attention indexer chooses tokens under `torch.no_grad`, so its layers never get a gradient. T5 keeps a module `shared`
for its weight and calls other modules that have the same one, so that a branch on `shared` is never computed.
"""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn

from deltaw.layers.unwrap import plain_class

# Modules of these names return which tokens are attended to: no gradient comes through a choice
_CHOOSE = "Indexer"
# Functions that hand a module on by its name without computing with it
_GETTERS = ("get_input_embeddings", "set_input_embeddings", "get_output_embeddings", "set_output_embeddings")
# Functions that no forward calls
_NOT_IN_USE = (
    "__init__",
    "_init",
    "init_",
    "tie_",
    "_tie",
    "resize",
    "_resize",
    "reset_",
    "load_",
    "save_",
    "prune",
    "_prune",
)
# Packages whose classes name no module of one model; of transformers, all but these folders
_GENERAL, _MODELS = (
    ("torch.", "builtins", "deltaw.", "transformers."),
    ("transformers.models.", "transformers.modeling_layers"),
)
# Names by which code reaches children that it does not name
_BY_ANY_NAME = frozenset(
    {"getattr", "_modules", "children", "named_children", "modules", "named_modules", "get_submodule"}
)


def without_gradient(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name of each module that only computes without gradients → why. A module inside one has the outer one's reason."""
    stopping: dict[str, str] = {}
    classes = {_class(module) for module in modules.values()}
    for name, module in modules.items():
        outer = next((why for prefix, why in stopping.items() if name.startswith(f"{prefix}.")), None)
        place, _, own = name.rpartition(".")
        why = outer or _stops(_class(module)) or _within(modules.get(place), own, classes)
        if name and why:
            stopping[name] = why
    return stopping


@cache
def _stops(cls: Any) -> str:
    """Why no gradient leaves modules of this class; empty where one may."""
    if _CHOOSE in cls.__name__:
        return f"no gradient reaches it: {cls.__name__} only chooses tokens"
    if any(_disables_gradients(vars(c)["forward"]) for c in cls.__mro__[:1] if "forward" in vars(c)):
        return f"no gradient reaches it: {cls.__name__} computes under torch.no_grad"
    return ""


def _within(parent: nn.Module | None, own: str, classes: Collection[Any]) -> str:
    """Why no gradient leaves this child: its parent uses it in `torch.no_grad` blocks alone, and no other of the `classes` names
    it. Empty where it does not."""
    if parent is None or own not in _without_gradient_in(_class(parent)):
        return ""
    if any(own in _names_used(cls) for cls in classes if cls is not _class(parent)):
        return ""
    return f"no gradient reaches it: {plain_class(parent).__name__} uses it under torch.no_grad alone"


@cache
def _without_gradient_in(cls: Any) -> frozenset[str]:
    """Children that the methods of this class use inside `with torch.no_grad()` and nowhere else."""
    inside: set[str] = set()
    outside: set[str] = set()
    for name, function in _methods(cls):
        if not name.startswith(_NOT_IN_USE) and name not in _GETTERS and "no_grad" in _names(function.__code__):
            children = _Children()
            children.visit(_tree(function))
            inside |= children.inside
            outside |= children.outside
        elif name == "__init__":
            outside |= _loaded(function.__code__)
        elif not name.startswith(_NOT_IN_USE):
            outside |= set(_names(function.__code__))
    return frozenset(inside - outside)


def _tree(function: Any) -> ast.AST:
    """The function's syntax tree; an empty one where there is no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return ast.Module([], [])


class _Children(ast.NodeVisitor):
    """Finds `self.name`, inside of blocks without gradients and outside of them."""

    def __init__(self) -> None:
        self.inside: set[str] = set()
        self.outside: set[str] = set()
        self.depth = 0

    def visit_With(self, node: ast.With) -> None:
        stops = any(
            ast.unparse(item.context_expr) in ("torch.no_grad()", "torch.inference_mode()") for item in node.items
        )
        self.depth += stops
        self.generic_visit(node)
        self.depth -= stops

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            (self.inside if self.depth else self.outside).add(node.attr)
        self.generic_visit(node)


def _disables_gradients(function: Any) -> bool:
    """Whether the function is decorated by `torch.no_grad` or `torch.inference_mode`."""
    while hasattr(function, "__wrapped__"):
        code = getattr(function, "__code__", None)
        cells = getattr(function, "__closure__", None) or ()
        if code is not None and code.co_filename == torch.utils._contextlib.__file__:
            makers = [getattr(cell.cell_contents, "__self__", None) for cell in cells if callable(cell.cell_contents)]
            if any(isinstance(maker, (torch.no_grad, torch.inference_mode)) for maker in makers):
                return True
        function = function.__wrapped__
    return False


def _class(module: nn.Module) -> Any:
    """The module's class, as what can be a key of a cache."""
    return plain_class(module)


def never_called(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the modules with parameters of their own that no code of the model calls, as far as `uncalled` can tell."""
    return uncalled(modules, [n for n, m in modules.items() if any(p is not None for p in m._parameters.values())])


def uncalled(modules: Mapping[str, nn.Module], names: Iterable[str]) -> set[str]:
    """Which of these names of modules no code of the model mentions outside of constructors.

    A name counts as called in all cases of doubt: inside a list, where code asks for attributes by computed names, and where a
    constructor hands the module on.
    """
    classes = {_class(module) for module in modules.values()}
    used = {name for cls in classes for name in _used(cls).elsewhere}
    for module in modules.values():
        if hasattr(replaced := inspect.unwrap(vars(module).get("forward", len)), "__code__"):
            used |= set(_names(replaced.__code__))
    getters = bool(used.union(*(_used(cls).own for cls in classes)).intersection(_GETTERS))
    if getters:
        used |= {name for cls in classes for name in _returned(cls).elsewhere}
    silent = set()
    for name in names:
        place, _, own = name.rpartition(".")
        if not name or own in used or place not in modules:
            continue
        around = _class(modules[place])
        called = own in _used(around).own or (getters and own in _returned(around).own)
        if not called and _names_its_children(around):
            silent.add(name)
    return silent


class _Names(NamedTuple):
    """Attributes that code asks for."""

    own: frozenset[str]
    """Of `self`: children of modules of the class alone, or of one that inherits from it."""
    elsewhere: frozenset[str]
    """Of any other object, and constant strings."""


@cache
def _used(cls: Any) -> _Names:
    """What the code of this class, and the functions that it calls, ask for while they compute."""
    own: set[str] = set()
    elsewhere: set[str] = set()
    helpers: dict[Any, None] = {}
    for name, function in _methods(cls):
        if name == "__init__":
            elsewhere |= _loaded(function.__code__)
        elif name not in _GETTERS and not name.startswith(_NOT_IN_USE):
            asked = _asked(function.__code__)
            own |= asked.own
            elsewhere |= asked.elsewhere
            helpers |= dict.fromkeys(_called(function))
    for function in (waiting := list(helpers)):
        elsewhere |= set(_names(function.__code__))
        new = [helper for helper in _called(function) if helper not in helpers]
        helpers |= dict.fromkeys(new)
        waiting += new
    if any(name == "__getattr__" for name, _ in _methods(cls)):  # it may hand on what it is asked for
        own, elsewhere = set(), own | elsewhere
    return _Names(frozenset(own), frozenset(elsewhere))


@cache
def _names_used(cls: Any) -> frozenset[str]:
    """Attributes that the code of this class, and the functions that it calls, ask of any object while they compute."""
    return _used(cls).own | _used(cls).elsewhere


def _called(function: Any) -> Iterator[Any]:
    """Functions outside of classes that this one's code names; those of torch and of Python aside."""
    names = set(_names(function.__code__))
    known = [function.__globals__[name] for name in names if name in function.__globals__]
    known += [vars(m)[name] for m in known if inspect.ismodule(m) for name in names if name in vars(m)]
    for member in known:
        plain = inspect.unwrap(member) if callable(member) else None
        if inspect.isfunction(plain) and not _is_general(plain.__module__ or "torch."):
            yield plain


@cache
def _returned(cls: Any) -> _Names:
    """What `get_input_embeddings` and the like return. (One that sets a module computes with none.)"""
    found = [_asked(f.__code__) for name, f in _methods(cls) if name in _GETTERS and name.startswith("get_")]
    own, elsewhere = ({name for names in found for name in names[i]} for i in range(2))
    return _Names(frozenset(own), frozenset(elsewhere))


def _asked(code: CodeType) -> _Names:
    """The names that a method's code, and the functions in it, use: asked of `self`, and all others."""
    own: set[str] = set()
    elsewhere = {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
    for before, step in pairwise([None, *dis.get_instructions(code)]):
        assert step is not None
        if _asks(step) and before is not None and _loads_self(before):
            own.add(str(step.argval))
        elif step.argval in code.co_names:
            elsewhere.add(str(step.argval))
    for inner in (constant for constant in code.co_consts if isinstance(constant, CodeType)):
        asked = _asked(inner)
        another = "self" in inner.co_varnames  # a function in it with a `self` of its own
        own |= frozenset() if another else asked.own
        elsewhere |= asked.elsewhere | asked.own if another else asked.elsewhere
    return _Names(frozenset(own), frozenset(elsewhere))


def _loads_self(step: dis.Instruction) -> bool:
    """Whether the step puts `self` on the stack, perhaps after another variable."""
    names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and names[-1] == "self"


@cache
def _names_its_children(cls: Any) -> bool:
    """Whether code of this class can only reach its children by names that stand in it. A class without a forward of its own
    leaves open how they are reached."""
    listing = issubclass(cls, (nn.ModuleList, nn.ModuleDict, nn.Sequential, torch.jit.ScriptModule))
    if (
        listing
        or _is_general(cls.__module__)
        or not any("forward" in vars(c) for c in cls.__mro__ if c is not nn.Module)
    ):
        return False
    own = [f for name, f in _methods(cls) if name != "__init__" and not name.startswith(_NOT_IN_USE)]
    return not any(_BY_ANY_NAME.intersection(_names(f.__code__)) for f in own)


def _methods(cls: Any) -> Iterator[tuple[str, Any]]:
    """(name, function) of the methods and properties of a class, without those that it has of a package's general classes."""
    for owner in cls.__mro__:
        if _is_general(owner.__module__):
            continue
        for name, member in vars(owner).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            function = inspect.unwrap(function) if callable(function) else None
            if hasattr(function, "__code__"):
                yield name, function


def _is_general(module: str) -> bool:
    """Whether code of this file names no module of one model."""
    return module.startswith(_GENERAL) and not module.startswith(_MODELS)


def _names(code: CodeType) -> Iterator[str]:
    """Attributes and constant strings that the code, and the functions in it, use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _loaded(code: CodeType) -> set[str]:
    """Attributes that a constructor reads and may hand on: those of which it asks for no attribute in turn."""
    steps = [*dis.get_instructions(code), None]
    return {
        str(step.argval)
        for step, after in pairwise(steps)
        if step is not None and _asks(step) and not (after is not None and _asks(after))
    }


def _asks(step: dis.Instruction) -> bool:
    """Whether the step asks an object for an attribute."""
    return step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))
