"""A pass through a model with adapters: which adapter it goes through is settled once, as it begins.

Hooks on the model, and on parts that may be called by themselves (a body without its head), tell when a pass begins and ends.
Parts within a pass go through what it began with. A pass's outputs carry hooks of their own: as a backward pass comes to them,
they tell it what the forward pass went through, for activations that checkpointing computes again.

Hooks and the `generate` of a model are objects, not functions: `copy.deepcopy` and pickle take them along with the model.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaw.errors import AdapterError, shown
from deltaw.layers.ops.row_forms import placeholders_of
from deltaw.layers.ops.rows import Rows
from deltaw.layers.patch import dimensions, slot_of
from deltaw.layers.routing import UNSET, Choice, Pass, Route, names_of, natively
from deltaw.layers.tree import with_statistics
from deltaw.model.ends import common, extended
from deltaw.model.record import Adapters

log = logging.getLogger("deltaw")

GENERATE = "generate"


class Begin:
    """Forward pre-hook: settles what the pass that begins goes through."""

    def __init__(self, record: Adapters) -> None:
        self.record = record
        self.looks: bool | None = None
        """True if passes to come are checked for norms that change the base's running statistics; None before the first pass."""

    @natively
    def __call__(self, module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        if torch.compiler.is_compiling():  # adapted layers then ask the route themselves
            return
        route = self.record.route
        route.drop_stale()
        here, frame = route.here, sys._getframe(1)
        if here.choice is not UNSET:  # a part of a pass
            route.push(module, here.choice, frame, here.kept)
            return
        if self.looks is not False and not here.passes:
            self._warn_of_statistics(module)
        choice, block = route.taken()
        if block is not None:
            _check_still_there(self.record, choice)
        if isinstance(choice, Rows):
            x = _main_input(module, inputs, named)
            least = 1 if slot_of(module) is None else dimensions(module)
            # Without a tensor among the inputs it stays UNSET, and each layer looks at its own input
            choice = UNSET if x is None else choice.of_batch(x, least, by_name(inputs, named), _placeholders(module))
        route.push(module, choice, frame, None if block is None else block.kept)

    def _warn_of_statistics(self, module: nn.Module) -> None:
        """Warn, once, of norms whose running statistics this pass changes."""
        norms = with_statistics(module)
        moving = [name for name, norm in norms if norm.training]
        self.looks = bool(norms) and not moving
        if moving:
            log.warning(
                "%d norms with running statistics are in training mode (%s): passes change these, which are the base's, and no "
                "adapter holds them. After model.train(), call eval() on each module whose track_running_stats is true.",
                len(moving), shown(moving, 2),
            )  # fmt: skip


class End:
    """Forward hook, also called after an error: the pass is over."""

    def __init__(self, record: Adapters) -> None:
        self.record = record

    @natively
    def __call__(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if torch.compiler.is_compiling():
            return
        route = self.record.route
        passes: list[Pass] = route.here.passes
        ended = next((begun for begun in reversed(passes) if begun.of is module), None)
        if ended is None:
            return
        route.pop(ended)
        if (
            isinstance(ended.choice, Rows)
            and ended.choice.form is not None
            and not any(begun.choice is ended.choice for begun in passes)
        ):
            ended.choice.form.end()
        if torch._C._current_graph_task_id() == -1 and ended.choice is not UNSET:
            route.last = ended.choice
        if torch.is_grad_enabled() and (not passes or passes[-1].of is None):
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(_CameBackward(route, ended.choice))  # type: ignore[no-untyped-call]


class _CameBackward:
    """Tensor hook on a pass's output: tells the route that a backward pass has come to it, and what the pass went through."""

    def __init__(self, route: Route, choice: Choice) -> None:
        self.route = route
        self.choice = choice

    def __call__(self, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task == -1:
            return
        threads = self.route.backward.get(task)
        if threads is None:
            threads = self.route.backward.setdefault(task, {})
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, task))
        threads[threading.get_ident()] = self.choice
        self.route.here.came = task, self.choice

    def _end(self, task: int) -> None:
        self.route.backward.pop(task, None)


class Generate:
    """The `generate` of a model with adapters: all of its passes go through one choice, from the first token to the last."""

    def __init__(self, model: nn.Module, record: Adapters) -> None:
        self.model = weakref.ref(model)  # the model holds this object, and is freed at once without a cycle
        self.record = record

    @property
    def __wrapped__(self) -> Callable[..., object]:
        """The class's `generate`, bound to the model; inspect reads signature and documentation from it."""
        model = self._model()
        bound: Callable[..., object] = getattr(type(model), GENERATE).__get__(model)
        return bound

    def __call__(self, *inputs: object, **named: object) -> object:
        """Generate, and stop at the end tokens that all rows' adapters were taught, unless the call names its own.

        Raises AdapterError if a `route` block has another number of names than there are prompts. Only rows that `generate`
        itself makes of a prompt may be several.
        """
        with self.record.route.pinned():
            choice = self.record.route.chosen()
            if isinstance(choice, Rows) and (x := _main_input(self._model(), inputs, named)) is not None:
                choice.check(x, 1)
            return self.__wrapped__(*inputs, **self._with_ends(choice, inputs, named))

    def _with_ends(self, choice: Choice, inputs: tuple[object, ...], named: dict[str, object]) -> Mapping[str, object]:
        """Return the call's keywords, and the model's end tokens with those that the adapters add.

        A generation_config is the second input if it is no keyword.
        """
        attached = self.record.attached
        names = choice.names if isinstance(choice, Rows) else (choice,)
        ends = common(
            attached[name].metadata.get("ends", ()) if name in attached else () for name in dict.fromkeys(names)
        )
        config = named.get("generation_config", inputs[1] if len(inputs) > 1 else None)
        if not ends or "eos_token_id" in named or getattr(config, "eos_token_id", None) is not None:
            return named
        before = getattr(getattr(self._model(), "generation_config", None), "eos_token_id", None)
        after = extended(before, ends)
        return named if after == before else {**named, "eos_token_id": after}

    def _model(self) -> nn.Module:
        model = self.model()
        if model is None:
            raise ReferenceError("The model that this generate belongs to no longer exists.")
        return model

    def __deepcopy__(self, memo: dict[int, object]) -> Generate:
        model = self._model()
        twin, record = memo.get(id(model), model), memo.get(id(self.record), self.record)
        assert isinstance(twin, nn.Module) and isinstance(record, Adapters)
        return Generate(twin, record)

    def __reduce__(self) -> tuple[type[Generate], tuple[nn.Module, Adapters]]:
        return Generate, (self._model(), self.record)


def watch(model: nn.Module, record: Adapters) -> list[RemovableHandle]:
    """Put hooks on a model that tell `record` when passes begin and end, on modules that have none yet.

    Return the handles that take the new hooks off again.
    """
    if callable(getattr(type(model), GENERATE, None)) and GENERATE not in vars(model):
        setattr(model, GENERATE, Generate(model, record))
    parts = [child for child in model.children() if slot_of(child) is None and _is_adapted(child)]
    handles: list[RemovableHandle] = []
    for module in dict.fromkeys((model, *parts)):
        watched = any(isinstance(hook, Begin) for hook in module._forward_pre_hooks.values())
        # With a hook, PyTorch's encoder layer leaves its fused path and computes other bits
        if not watched and not isinstance(module, nn.TransformerEncoderLayer):
            handles.append(module.register_forward_pre_hook(Begin(record), with_kwargs=True))
            handles.append(module.register_forward_hook(End(record), always_call=True))
    return handles


def unwatch(model: nn.Module, handles: list[RemovableHandle]) -> None:
    """Undo `watch`."""
    for handle in handles:
        handle.remove()
    if isinstance(vars(model).get(GENERATE), Generate):
        delattr(model, GENERATE)


def by_name(inputs: tuple[object, ...], named: Mapping[str, object]) -> dict[int | str, object]:
    """Return a call's inputs by place or name."""
    values: dict[int | str, object] = dict(enumerate(inputs))
    values.update(named)
    return values


def _is_adapted(part: nn.Module) -> bool:
    return any(slot_of(module) is not None for module in part.modules())


def _check_still_there(record: Adapters, choice: Choice) -> None:
    """Raise AdapterError for a block whose adapter is gone.

    A task can go on in a block that was closed in the task that opened it; its adapter may then be detached or merged.
    """
    names = names_of(choice)
    if detached := sorted(name for name in names if name not in record.attached):
        raise AdapterError(
            f"This code is in a using or route block with {detached[0]!r}, which was detached in the meantime."
        )
    if names and record.merged:
        raise AdapterError(
            f"This code is in a using or route block with {min(names)!r}, and {', '.join(map(repr, record.merged))} was "
            "merged into the base in the meantime: call unmerge(model)."
        )


_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_features")
"""Names that models give the input with a row for each row of the batch."""


def _main_input(module: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> Tensor | None:
    """Return the input whose first dimension is the batch's; None if there is no tensor."""
    wanted = (str(getattr(module, "main_input_name", None)), *_INPUTS)
    positional = [value for value in inputs[:1] if isinstance(value, Tensor)]
    by_its_name = [value for name in wanted if isinstance(value := named.get(name), Tensor)]
    others = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.dim() > 0]
    return next(iter((*positional, *by_its_name, *others)), None)


def _placeholders(module: nn.Module) -> frozenset[int]:
    """Return the tokens in whose places the module's model puts images, videos or sounds."""
    return placeholders_of(getattr(module, "config", None))


def _tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors of a model's output, which may be in lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
