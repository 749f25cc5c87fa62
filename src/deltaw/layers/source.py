"""A module's source, read for three things: children whose weights are read, that are never called, or that get no gradient.

Why. An update acts in its layer's forward. Three things that models do would leave it without effect, in silence, and only their
code shows them:

1. A module computes with a child's weight without calling the child. Mamba multiplies by `self.dt_proj.weight`, WavLM's attention
   hands its projections' weights to a function. `read_outside` tells; layers/patch.py then lets the weight itself read as W0 +
   ΔW.
2. A layer is not called, or without gradients: T5 keeps `shared` for its weight and calls other modules that have the same one,
   the indexer of a sparse attention only chooses tokens. Its update would never learn. `never_called` and `without_gradient`
   tell; methods/targets.py leaves such layers out.
3. A subclass of a layer computes in another way. Gemma's embedding multiplies what `super().forward` gives, so an update of that
   forward is exact; another subclass may use the weight differently. `only_scales` tells these two apart.

How. Each function is parsed once (`ast`). One visitor notes which attributes its source asks of `self` and of other objects
(`Reading`), and each question is answered from the readings of a class's methods. No code is run. Bytecode would say the same, in
other words in each version of Python. Parsing takes time, so the names that a code object lists (`co_names`) are looked at first:
without the telltale ones among them (`no_grad`, `weight`; a child's, in the module around it) there is nothing to parse for.

Where it errs. Names are followed, not objects: after `x = self.child`, it is not seen that `x.weight` is read. All doubts are
settled so that a model keeps working: a name counts as called where any code of the model mentions it, and all of them do where
code asks for attributes by computed names (`getattr`, `children`). Code without source (a frozen application, `exec`) counts as
calling everything, with gradients, and as reading no weight; a subclass whose forward has none takes no update. What this misses
is said by the first step of a training, which warns of updates that got no gradient.

Knows modules and their classes, and changes nothing.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import CodeType, FunctionType
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from deltaw.layers.unwrap import plain_class

_T = TypeVar("_T")

# Methods that no forward calls
_NOT_IN_USE = (
    "__init__", "_init", "init", "reset", "tie", "_tie", "resize", "_resize", "set_", "load", "save", "from_", "prune", "_prune",
)  # fmt: skip
# Methods that hand a module on by its name without computing with it
_GETTERS = ("get_input_embeddings", "get_output_embeddings")
_PARAMETERS = {"weight", "bias"}
# What is asked of a parameter without using its values, as an attribute and by a function
_ASKED = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda"}
_ASKING = {"isinstance", "hasattr", "type"}
_WITHOUT_GRADIENT = {"no_grad", "inference_mode"}
# Names by which code reaches children that it does not name
_BY_ANY_NAME = {"getattr", "_modules", "children", "named_children", "modules", "named_modules", "get_submodule"}
# Packages whose classes name no module of one model; of transformers, all but these folders
_GENERAL = ("torch.", "builtins", "deltaw.", "transformers.")
_MODELS = ("transformers.models.", "transformers.modeling_layers")
# Modules of these names return which tokens are attended to: no gradient comes through a choice
_CHOOSE = "Indexer"


def once(function: Callable[[type], _T]) -> Callable[[type], _T]:
    """Cache what a function says of a class. (`functools.cache`, whose type lets no class of modules in.)"""
    return cache(function)


# --- what one function says -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """The names of attributes that a function's source mentions, by what it does with them."""

    at_self: set[str] = field(default_factory=set)
    """Read of `self`."""
    others: set[str] = field(default_factory=set)
    """Read of other objects or set on any, and constant strings that are names."""
    bare: set[str] = field(default_factory=set)
    """No attributes, but names of functions, classes and modules."""
    handed_on: set[str] = field(default_factory=set)
    """Read of any object, while no attribute is asked of them in turn."""
    whole: set[str] = field(default_factory=set)
    """Used for more than their parameters."""
    weights: set[str] = field(default_factory=set)
    """Children of `self` whose weight or bias the function computes with."""
    of_weight: set[str] = field(default_factory=set)
    """Asked of any `weight`; "" where that is used itself."""
    of_super: set[str] = field(default_factory=set)
    """Asked of `super()`."""
    stopped: set[str] = field(default_factory=set)
    """Names that stand at `self` in a block without gradients."""
    flowing: set[str] = field(default_factory=set)
    """Names that stand at `self` outside of such blocks."""
    decorators: set[str] = field(default_factory=set)
    """The function's, without arguments."""

    @property
    def names(self) -> set[str]:
        return self.at_self | self.others | self.bare


_Function = ast.FunctionDef | ast.AsyncFunctionDef


class _Reader(ast.NodeVisitor):
    """Fills the reading of one function."""

    def __init__(self, function: _Function) -> None:
        self.reading = Reading(decorators={_called(d) for d in function.decorator_list})
        self.then: dict[int, str] = {}
        """An expression's id → the attribute that is asked of it."""
        self.variables: set[str] = set()
        self.without_gradient = self.only_asks = self.another_self = 0
        """Numbers of open blocks without gradients, questions about a parameter, and functions with another `self`."""
        self._arguments(function.args)
        for statement in function.body:
            self.visit(statement)
        self.reading.bare.difference_update(self.variables)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        reading, name, then = self.reading, node.attr, self.then.get(id(node), "")
        self.then[id(node.value)] = name
        read = isinstance(node.ctx, ast.Load)
        if _is_name(node.value, "self"):
            (reading.stopped if self.without_gradient else reading.flowing).add(name)
        (reading.at_self if read and _is_name(node.value, "self") and not self.another_self else reading.others).add(
            name
        )
        if read and not then:
            reading.handed_on.add(name)
        if then not in _PARAMETERS | _ASKED:
            reading.whole.add(name)
        if name == "weight":
            reading.of_weight.add(then)
        if name in _PARAMETERS and read and not self.only_asks and then not in _ASKED:
            child = node.value
            if isinstance(child, ast.Attribute) and _is_name(child.value, "self"):
                reading.weights.add(child.attr)
        if isinstance(node.value, ast.Call) and _is_name(node.value.func, "super") and not node.value.args:
            reading.of_super.add(name)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        (self.reading.bare if isinstance(node.ctx, ast.Load) else self.variables).add(node.id)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.isidentifier():
            self.reading.others.add(node.value)

    def visit_With(self, node: ast.With) -> None:
        stops = any(_stops_gradients(_called(item.context_expr)) for item in node.items)
        self.without_gradient += stops
        self.generic_visit(node)
        self.without_gradient -= stops

    def visit_Call(self, node: ast.Call) -> None:
        asks = isinstance(node.func, ast.Name) and node.func.id in _ASKING
        self.only_asks += asks
        self.generic_visit(node)
        self.only_asks -= asks

    def visit_Compare(self, node: ast.Compare) -> None:
        asks = all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops)
        self.only_asks += asks
        self.generic_visit(node)
        self.only_asks -= asks

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        another = self._arguments(node.args)
        self.another_self += another
        self.generic_visit(node)
        self.another_self -= another

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef
    visit_AsyncWith = visit_With  # type: ignore[assignment]

    def _arguments(self, arguments: ast.arguments) -> bool:
        """Note a function's arguments as variables. True if `self` is among them."""
        names = {a.arg for a in ast.walk(arguments) if isinstance(a, ast.arg)}
        self.variables |= names
        return "self" in names


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _called(node: ast.expr) -> str:
    """Return the dotted name of what is called, or is there without a call: torch.no_grad, of `torch.no_grad()`."""
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def _stops_gradients(name: str) -> bool:
    return name.rpartition(".")[2] in _WITHOUT_GRADIENT


@cache
def reading(function: FunctionType) -> Reading | None:
    """Return what the function's source says; None where there is no source, or the file has changed since it was imported."""
    code = function.__code__
    linecache.lazycache(code.co_filename, function.__globals__)
    definition = _definitions(code.co_filename).get((code.co_firstlineno, code.co_name))
    return None if definition is None else _Reader(definition).reading


@cache
def _listed(code: CodeType) -> frozenset[str]:
    """Return the names of attributes, functions and modules that the code, and the functions in it, use: no source is needed
    for these."""
    inner = (_listed(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


@lru_cache(maxsize=4)
def _definitions(file: str) -> dict[tuple[int, str], _Function]:
    """Return (first line, name) → function, of all in a file, those in classes and in other functions too."""
    try:
        nodes: list[ast.AST] = [ast.parse("".join(linecache.getlines(file)))]
    except (SyntaxError, ValueError):
        return {}
    for node in nodes:  # which grows meanwhile; no statement is within an expression
        nodes += [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.ExceptHandler, ast.match_case))]
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {(min([f.lineno, *(d.lineno for d in f.decorator_list)]), f.name): f for f in functions}


# --- what a class says ------------------------------------------------------------------------------------------


def _methods(cls: type, *, of_torch: bool = False) -> Iterator[tuple[str, FunctionType]]:
    """Yield (name, function) of the methods and properties of a class, without those that it has of a package's general classes;
    `of_torch`: with those of torch's."""
    for owner in cls.__mro__:
        torchs = of_torch and owner is not nn.Module and owner.__module__.startswith("torch.")
        if _is_general(owner.__module__) and not torchs:
            continue
        for name, member in vars(owner).items():
            if (function := _function(member)) is not None:
                yield name, function


def _function(member: object) -> FunctionType | None:
    """Return the innermost function of a member of a class or a module, beneath its decorators."""
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    function = inspect.unwrap(member) if callable(member) else None
    function = getattr(function, "__func__", function)
    return function if isinstance(function, FunctionType) else None


def _is_general(module: str) -> bool:
    """Return whether code of this file names no module of one model."""
    return module.startswith(_GENERAL) and not module.startswith(_MODELS)


def _in_use(name: str) -> bool:
    """Return whether a forward may call a method of this name."""
    return not name.startswith(_NOT_IN_USE) and name not in _GETTERS


class _Names(NamedTuple):
    """Attributes that code asks for."""

    at_self: frozenset[str]
    """Names at `self`: children of modules of the class alone, or of one that inherits from it."""
    elsewhere: frozenset[str]
    """Names at any other object, and constant strings."""
    known: bool = True
    """All of the code has source."""


@once
def _used(cls: type) -> _Names:
    """Return what the code of this class, and the functions that it calls, ask for while they compute."""
    at_self: set[str] = set()
    elsewhere: set[str] = set()
    helpers: dict[FunctionType, None] = {}
    known = True
    for name, function in _methods(cls):
        if name != "__init__" and not _in_use(name):
            continue
        if (said := reading(function)) is None:
            known = False
        elif name == "__init__":
            elsewhere |= said.handed_on
        else:
            at_self |= said.at_self
            elsewhere |= said.others
            helpers |= dict.fromkeys(_helpers(function, said))
    waiting = list(helpers)
    for function in waiting:
        if (said := reading(function)) is None:
            known = False
            continue
        elsewhere |= said.at_self | said.others
        new = [helper for helper in _helpers(function, said) if helper not in helpers]
        helpers |= dict.fromkeys(new)
        waiting += new
    delegates = any(name == "__getattr__" for name, _ in _methods(cls))  # it may hand on what it is asked for
    return _Names(
        frozenset() if delegates else frozenset(at_self),
        frozenset(elsewhere | at_self if delegates else elsewhere),
        known,
    )


def _helpers(function: FunctionType, said: Reading) -> Iterator[FunctionType]:
    """Yield the functions outside of classes that this one's code names; those of torch and of Python aside."""
    names, scope = said.names, function.__globals__
    members = [scope[name] for name in names if name in scope]
    members += [vars(m)[name] for m in members if inspect.ismodule(m) for name in names if name in vars(m)]
    for member in members:
        helper = None if isinstance(member, type) else _function(member)
        if helper is not None and not _is_general(helper.__module__ or "torch."):
            yield helper


@once
def _listed_by(cls: type) -> frozenset[str]:
    """Return the names that the code of this class uses while it computes."""
    return frozenset().union(*(_listed(function.__code__) for name, function in _methods(cls) if _in_use(name)))


@once
def _returned(cls: type) -> _Names:
    """Return what `get_input_embeddings` and the like return. (One that sets a module computes with none.)"""
    said = [reading(f) or Reading() for name, f in _methods(cls) if name in _GETTERS]
    return _Names(frozenset().union(*(s.at_self for s in said)), frozenset().union(*(s.others for s in said)))


@once
def _names_its_children(cls: type) -> bool:
    """Return whether code of this class can only reach its children by names that stand in it. A class without a forward of its
    own leaves open how they are reached."""
    listing = issubclass(cls, (nn.ModuleList, nn.ModuleDict, nn.Sequential, torch.jit.ScriptModule))
    forward = any("forward" in vars(c) for c in cls.__mro__ if c is not nn.Module)
    if listing or _is_general(cls.__module__) or not forward:
        return False
    said = [reading(f) for name, f in _methods(cls) if not name.startswith(_NOT_IN_USE)]
    return all(s is not None and not _BY_ANY_NAME & s.names for s in said)


@once
def _without_gradient_in(cls: type) -> frozenset[str]:
    """Return the children that the methods of this class use inside `with torch.no_grad()` and nowhere else."""
    methods = [(name, function) for name, function in _methods(cls) if name == "__init__" or _in_use(name)]
    inside: set[str] = set()
    outside: set[str] = set()
    if not any(_listed(function.__code__) & _WITHOUT_GRADIENT for _, function in methods):
        return frozenset()
    for name, function in methods:
        if (said := reading(function)) is None:
            return frozenset()
        inside |= said.stopped if name != "__init__" else set()
        outside |= said.flowing | said.others if name != "__init__" else said.handed_on
    return frozenset(inside - outside)


@once
def _stops(cls: type) -> str:
    """Return why no gradient leaves modules of this class; empty where one may."""
    if _CHOOSE in cls.__name__:
        return f"no gradient reaches it: {cls.__name__} only chooses tokens"
    forward = vars(cls).get("forward")
    function = _function(forward) if hasattr(forward, "__wrapped__") else None  # it is decorated
    said = None if function is None else reading(function)
    if said is not None and any(map(_stops_gradients, said.decorators)):
        return f"no gradient reaches it: {cls.__name__} computes under torch.no_grad"
    return ""


@once
def _read_by(cls: type) -> frozenset[str]:
    """Return the names of the children whose parameters are used in the methods of this class."""
    return frozenset().union(*(said.weights for said in _of_forward(cls)))


@once
def _used_by(cls: type) -> frozenset[str]:
    """Return the names of the attributes that methods of this class use for more than their parameters."""
    return frozenset().union(*(said.whole for said in _of_forward(cls)))


def _of_forward(cls: type) -> Iterator[Reading]:
    """Yield what the functions say that a class's forward may call, where any of them names a parameter."""
    methods = [f for name, f in _methods(cls, of_torch=True) if not name.startswith(_NOT_IN_USE)]
    if any(_listed(function.__code__) & _PARAMETERS for function in methods):
        yield from (said for function in methods if (said := reading(function)) is not None)


@once
def only_scales(cls: type) -> bool:
    """Return whether a subclass's own forward gets at the layer's weight by `super().forward` alone, and of the weight itself
    asks for no more than dtype, device and shape."""
    forward = vars(cls)["forward"]
    said = reading(forward) if isinstance(forward, FunctionType) and not hasattr(forward, "__wrapped__") else None
    if said is None or {"parameters", "_parameters"} & said.names:
        return False
    return "forward" in said.of_super and said.of_weight <= {"dtype", "device", "shape"}


def mentions(function: object, name: str) -> bool:
    """Return whether the function's source asks for an attribute of this name, or has it as a text. False where there is no
    source."""
    plain = _function(function)
    said = None if plain is None else reading(plain)
    return said is not None and name in said.at_self | said.others


# --- what a model's modules say ---------------------------------------------------------------------------------


def read_outside(parent: nn.Module, child: str) -> bool:
    """Return whether this module uses parameters of its child without calling it: PyTorch's attention its output projection's,
    its encoder layer, in evaluation, those of all; others where their code says `self.child.weight`."""
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return True
    return child in _read_by(plain_class(parent))


def only_read(parent: nn.Module, child: str) -> bool:
    """Return whether this module uses its child for its parameters alone: no code of it calls the child or hands it on."""
    if isinstance(parent, nn.MultiheadAttention):
        return child == "out_proj"
    return child in _read_by(plain_class(parent)) - _used_by(plain_class(parent))


def without_gradient(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the name of each module with parameters that only computes without gradients → why. A module inside one has the
    outer one's reason."""
    stopping: dict[str, str] = {}
    classes = {plain_class(module) for module in modules.values()}
    for name, module in modules.items():
        outer = next((why for prefix, why in stopping.items() if name.startswith(f"{prefix}.")), None)
        place, _, child = name.rpartition(".")
        if not name or next(module.parameters(), None) is None:
            continue
        if why := outer or _stops(plain_class(module)) or _within(modules.get(place), child, classes):
            stopping[name] = why
    return stopping


def _within(parent: nn.Module | None, child: str, classes: Collection[type]) -> str:
    """Return why no gradient leaves this child: its parent uses it in `torch.no_grad` blocks alone, and no other of the
    `classes` names it. Empty where it does not."""
    if parent is None or child not in _without_gradient_in(plain_class(parent)):
        return ""
    if any(child in _used(cls).at_self | _used(cls).elsewhere for cls in classes if cls is not plain_class(parent)):
        return ""
    return f"no gradient reaches it: {plain_class(parent).__name__} uses it under torch.no_grad alone"


def never_called(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the modules with parameters of their own that no code of the model calls, as far as `uncalled` can
    tell."""
    return uncalled(modules, [n for n, m in modules.items() if any(p is not None for p in m._parameters.values())])


def uncalled(modules: Mapping[str, nn.Module], names: Iterable[str]) -> set[str]:
    """Return those of these names of modules that no code of the model mentions outside of constructors.

    A name counts as called in all cases of doubt: inside a list, where code asks for attributes by computed names, where a
    constructor hands the module on, and where any code of the model has no source.
    """
    places = {name: name.rpartition(".") for name in names if name and name.rpartition(".")[0] in modules}
    suspects = {
        name: (plain_class(modules[place]), child)
        for name, (place, _, child) in places.items()
        if child not in _listed_by(plain_class(modules[place]))
    }
    if not suspects:
        return set()
    classes = {plain_class(module) for module in modules.values()}
    replaced = [_function(vars(module)["forward"]) for module in modules.values() if "forward" in vars(module)]
    said = [reading(function) for function in replaced if function is not None]
    if not all(_used(cls).known for cls in classes) or None in said:
        return set()
    used = {name for cls in classes for name in _used(cls).elsewhere}
    used |= {name for s in said if s is not None for name in s.at_self | s.others}
    getters = bool(used.union(*(_used(cls).at_self for cls in classes)).intersection(_GETTERS))
    if getters:
        used |= {name for cls in classes for name in _returned(cls).elsewhere}
    return {
        name
        for name, (around, child) in suspects.items()
        if child not in used | _used(around).at_self
        and not (getters and child in _returned(around).at_self)
        and _names_its_children(around)
    }
