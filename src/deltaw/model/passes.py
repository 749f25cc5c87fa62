"""A pass through a model with adapters: which adapter it goes through is taken once, as it begins. Knows the model's record as
something with a route, names and merged adapters.

Hooks on the model, and on its parts that may be called by themselves (a body without its head), say when a pass begins and
ends. While a pass goes on, parts within it go through what it began with. The outputs carry hooks that say, as a backward
pass comes to them, what activations that are computed again (checkpointing) went through.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaw.errors import AdapterError
from deltaw.layers.names import shown
from deltaw.layers.ops.row_forms import placeholders_of
from deltaw.layers.ops.rows import Rows
from deltaw.layers.patch import dimensions, slot_of
from deltaw.layers.routing import UNSET, Choice, Pass, names_of, natively
from deltaw.layers.tree import with_statistics
from deltaw.model.ends import TAUGHT, common, extended

log = logging.getLogger("deltaw")

GENERATE = "generate"


class Begin:
    """Forward pre-hook."""

    def __init__(self, record: Any) -> None:
        self.record = record
        self.looks: bool | None = None
        """Whether the module has norms that may change the base; None before its first pass."""

    @natively
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # the layers ask for themselves
            return
        route = self.record.route
        route.drop_stale()
        here, frame = route.here, sys._getframe(1)
        if here.choice is not UNSET:  # a part of a pass
            route.push(module, here.choice, frame, here.kept)
            return
        if self.looks is not False and not here.passes:
            self._look(module)
        choice, block = route.taken()
        if block is not None:
            _check_still_there(self.record, choice)
        if isinstance(choice, Rows):
            x = _main_input(module, inputs, named)
            least = 1 if slot_of(module) is None else dimensions(module)
            given: dict[Any, Any] = {**dict(enumerate(inputs)), **named}
            # UNSET: each layer looks at its own input
            choice = UNSET if x is None else choice.of_batch(x, least, given, placeholders_of(_config(module)))
        route.push(module, choice, frame, None if block is None else block.kept)

    def _look(self, module: nn.Module) -> None:
        """Warn, once, where a pass will change running statistics of the base."""
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
    """Forward hook, called after errors too."""

    def __init__(self, record: Any) -> None:
        self.record = record

    @natively
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
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
                    tensor.register_hook(_Came(route, ended.choice))


class _Came:
    """Tensor hook on what a pass put out: a backward pass has come to it."""

    def __init__(self, route: Any, choice: Choice) -> None:
        self.route = route
        self.choice = choice

    def __call__(self, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task == -1:
            return
        threads = self.route.backward.get(task)
        if threads is None:
            threads = self.route.backward.setdefault(task, {})
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.route.backward.pop(task, None))
        threads[threading.get_ident()] = self.choice
        self.route.here.came = task, self.choice


class Generate:
    """`generate` of a model with adapters: from the first token to the last it goes through one choice."""

    def __init__(self, model: Any, record: Any) -> None:
        self.model = weakref.ref(model)  # the model holds this: without a cycle it is freed as it would be
        self.record = record

    @property
    def __wrapped__(self) -> Any:
        """The class's own, bound to the model: signature and documentation are read from it."""
        model = self.model()
        return getattr(type(model), GENERATE).__get__(model)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Stops at the end tokens that all rows' adapters were taught, unless the call says its own. Raises AdapterError for
        prompts of another number than a route's names: only what `generate` itself makes of a prompt may be several rows."""
        with self.record.route.pinned():
            choice = self.record.route.chosen()
            x = _main_input(self.model(), inputs, named) if isinstance(choice, Rows) else None
            if x is not None:
                choice.check(x, 1)
            return self.__wrapped__(*inputs, **self._stopping(choice, inputs, named))

    def _stopping(self, choice: Choice, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """The call's keywords with the end tokens that its adapters add to the model's. A generation_config is the second
        input, where it has no keyword."""
        attached = self.record.attached
        names = choice.names if isinstance(choice, Rows) else (choice,)
        ends = common(
            attached[name].metadata.get(TAUGHT, ()) if name in attached else () for name in dict.fromkeys(names)
        )
        asked = named.get("generation_config", inputs[1] if len(inputs) > 1 else None)
        if not ends or "eos_token_id" in named or getattr(asked, "eos_token_id", None) is not None:
            return named
        before = getattr(getattr(self.model(), "generation_config", None), "eos_token_id", None)
        after = extended(before, ends)
        return named if after == before else {**named, "eos_token_id": after}

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        model = self.model()
        return Generate(memo.get(id(model), model), memo.get(id(self.record), self.record))

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self.model(), self.record)


def watch(model: nn.Module, record: Any) -> list[RemovableHandle]:
    """Say to `record` when passes begin and end, as far as nobody does yet; what takes that off again."""
    if callable(getattr(type(model), GENERATE, None)) and GENERATE not in vars(model):
        setattr(model, GENERATE, Generate(model, record))
    parts = [child for child in model.children() if slot_of(child) is None and _is_adapted(child)]
    handles: list[RemovableHandle] = []
    for module in dict.fromkeys((model, *parts)):
        watched = any(isinstance(hook, Begin) for hook in module._forward_pre_hooks.values())
        if not watched and not isinstance(module, nn.TransformerEncoderLayer):  # with a hook it computes in another way
            handles.append(module.register_forward_pre_hook(Begin(record), with_kwargs=True))
            handles.append(module.register_forward_hook(End(record), always_call=True))
    return handles


def unwatch(model: nn.Module, handles: list[RemovableHandle]) -> None:
    """Undo `watch`."""
    for handle in handles:
        handle.remove()
    if isinstance(vars(model).get(GENERATE), Generate):
        delattr(model, GENERATE)


def _is_adapted(part: nn.Module) -> bool:
    return any(slot_of(module) is not None for module in part.modules())


def _check_still_there(record: Any, choice: Choice) -> None:
    """Raise AdapterError where a task goes on in a block that was closed in the task that opened it, and its adapter is gone."""
    names = names_of(choice)
    if gone := sorted(name for name in names if name not in record.attached):
        raise AdapterError(
            f"This code is in a using or route block with {gone[0]!r}, which was detached in the meantime."
        )
    if names and record.merged:
        raise AdapterError(
            f"This code is in a using or route block with {min(names)!r}, and {', '.join(map(repr, record.merged))} was "
            "merged into the base in the meantime: call unmerge(model)."
        )


_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_features")
"""Names that models give the input with a row for each row of the batch."""


def _main_input(module: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
    """The input whose first dimension is the batch's; None where there is no tensor."""
    wanted = (str(getattr(module, "main_input_name", None)), *_INPUTS)
    first = [named[name] for name in wanted if isinstance(named.get(name), Tensor)]
    rest = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.dim() > 0]
    positional = [value for value in inputs[:1] if isinstance(value, Tensor)]
    return next(iter((*positional, *first, *rest)), None)


def _config(module: Any) -> Any:
    return getattr(module, "config", None)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors that a model puts out, alone or in lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
