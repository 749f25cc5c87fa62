"""A model as a tree of modules: the base's own modules, names and parameters beneath wrappers and adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deltaw.layers.kinds import as_matrix, in_few_bits
from deltaw.layers.names import WRAPPED
from deltaw.layers.patch import Slot
from deltaw.layers.processes.shards import full
from deltaw.layers.source import uncalled

RECORD = "_deltaw"
# Classes that wrap a model as its child `module`, of packages that need not be installed
_ENGINES = ("DeepSpeedEngine", "PipelineEngine", "DeepSpeedHybridEngine")


def matrix_of(owner: nn.Module, name: str) -> Tensor:
    """Return a parameter by its dotted name, as the matrix that merges work on: a view of it.

    A quantised weight cannot be merged into; it is dequantised, in fp32.
    """
    layer, own_name = place_of(owner, name)
    if form := in_few_bits(layer, own_name):
        return form.dense(layer, torch.float32)
    parameter = layer._parameters[own_name]
    assert parameter is not None
    return as_matrix(layer, own_name, parameter.detach())


def place_of(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has the parameter of this dotted name, and its name there."""
    *path, own_name = name.split(".")
    module: nn.Module | None = owner
    for step in path:  # get_submodule asks for much more on the way
        module = None if module is None else module._modules.get(step)
    return module or owner.get_submodule(".".join(path)), own_name


def dotted(module_name: str, own_name: str) -> str:
    """Return the full name of a module's parameter."""
    return f"{module_name}.{own_name}" if module_name else own_name


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the base in its own order, each module once; not the adapters', whose number may be large."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", owner_of(model))]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = [(dotted(name, place), child) for place, child in module._modules.items()]
        waiting += [(n, c) for n, c in reversed(children) if c is not None and not isinstance(c, Slot)]


def names_of(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return the name of each module that its model has under several names (`self.b = self.a`) → all names by which code may
    call it."""
    known = {id(module): name for name, module in modules.items()}
    names: dict[str, list[str]] = {}
    for place, parent in modules.items():
        for name, child in parent._modules.items():
            if id(child) in known:
                names.setdefault(known[id(child)], []).append(dotted(place, name))
    several = {name: others for name, others in names.items() if len(others) > 1}
    silent = uncalled(modules, [n for others in several.values() for n in others]) if several else set()
    called = {name: [n for n in others if n not in silent] for name, others in several.items()}
    return {name: others for name, others in called.items() if len(others) > 1}


def owner_of(model: nn.Module) -> nn.Module:
    """Return the module whose dotted names are the base's own and that holds the record: what a wrapper (torch.compile,
    DataParallel, DDP) wraps; else the part of the model that has a record; else the model."""
    while (wrapped := _wrapped(model)) is not None:
        model = wrapped
    return next((m for m in model.modules() if RECORD in m.__dict__), model)


def _wrapped(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or type(model).__name__ in _ENGINES:
        return model._modules["module"]
    return next((child for name in WRAPPED if (child := model._modules.get(name)) is not None), None)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Open a block in which the whole model is in evaluation mode; after it, each module has its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def to_train(model: nn.Module) -> None:
    """Put a model in training mode, but for norms with running statistics, which are the base's: a pass in training mode would
    change them, no adapter holds them, and each row would depend on the others of its batch."""
    model.train()
    for _, module in with_statistics(model):
        module.eval()


def with_statistics(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a model's norms that follow their inputs in training mode, by name."""
    return [(name, module) for name, module in model.named_modules() if getattr(module, "track_running_stats", False)]


# --- NaN and infinity, looked for once something is wrong ---------------------------------------------------------


def not_finite_in(model: nn.Module) -> list[str]:
    """Return the names of the base's parameters and stored buffers with NaN or infinity; the adapters' are not looked at.

    A pass over the weights: about 0.1 s for each GB.
    """
    return list(dict.fromkeys(name for name, tensor in _stored(model) if not is_finite(full(tensor))))


def is_finite(tensor: Tensor) -> bool:
    """Return whether all entries are finite; those of integers are, and those of a tensor without values (meta)."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    dense = tensor.detach()
    dense = dense.float() if dense.element_size() == 1 else dense  # 8-bit floats have no arithmetic
    # A sum is finite only if its terms are; one that overflows tells nothing
    return bool(torch.isfinite(dense.sum())) or bool(torch.isfinite(dense).all())


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the base that a checkpoint has, once, by its first name."""
    seen: set[int] = set()
    for name, module in base_modules(model):
        computed = module._non_persistent_buffers_set  # a mask may hold infinity on purpose
        buffers = {key: tensor for key, tensor in module._buffers.items() if key not in computed}
        for key, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield dotted(name, key), tensor
