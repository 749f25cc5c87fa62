"""One training step on the meta device: the bytes that it would hold, by part, and its FLOPs.

The real loop, loss and update run over tensors without memory. Knows loops and models of one stack of blocks; nothing of files
or presets. Equal blocks cost the same. Of many equal blocks, only two and then three are run: every part grows with each
further block by the difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from deltaw.config import TrainConfig
from deltaw.data.encode import Example
from deltaw.data.items import Item
from deltaw.methods.plan import Method
from deltaw.methods.targets import blocks_of
from deltaw.model.attach import attach, detach
from deltaw.model.inputs import text_config
from deltaw.runs.memory.live import Live, StandIns
from deltaw.training import head as heads
from deltaw.training.attention import training_attention
from deltaw.training.head import AfterHead
from deltaw.training.loop import LoopPlan, LoopState, opened
from deltaw.training.losses import CAPS, CompletionLoss, Loss

# Up to so many blocks all are run
_FEW = 6

Record: TypeAlias = Example | Item


@dataclass(frozen=True)
class Step:
    """Bytes that one training step holds, and its FLOPs."""

    adapter: int
    """The trained values, and their copy in the precision that steps compute in."""
    gradients: int
    optimizer: int
    """Its state after a step."""
    activations: int
    """Kept by the forward pass for the backward pass."""
    working: int
    """The most that either pass holds beyond the activations."""
    logits: int
    """Held by the head and the loss: a part of `working`, or less."""
    flops: int
    """FLOPs of the forward and the backward pass."""


def step(
    model: nn.Module,
    method: Method,
    examples: Sequence[Record],
    config: TrainConfig,
    device: str,
    loss_of: Callable[[], Loss],
) -> Step:
    """Return one step of `method` on a meta model without adapters, over `examples` as one batch.

    Afterwards the model is as before, except that it still checkpoints where `config` asks for that: take another one then.

    Args:
        device: The type of the device to plan for, cpu or another one.
        loss_of: Returns the loss of `model`, asked once the adapter is attached.

    Raises:
        DeltaWError: The method does not fit the model.
        Exception: Any error of the model's forward where it does not run on the meta device.
    """
    stack = _stack(model)
    if stack is None or len(stack) <= _FEW or not _alike(model, method):
        return _of_blocks(model, method, examples, config, device, loss_of, None)
    two, three = (_of_blocks(model, method, examples, config, device, loss_of, n) for n in (2, 3))
    more = len(stack) - 3
    parts = {}
    for part, size in dataclasses.asdict(three).items():
        # One block, or the head, is at work at a time, however many blocks there are
        growth = 0 if part in ("working", "logits") else size - getattr(two, part)
        parts[part] = size + more * growth
    return Step(**parts)


def _stack(model: nn.Module) -> nn.ModuleList | None:
    """The one list of all blocks; None where there are several lists or none."""
    lists = {name.rpartition(".")[0] for name in blocks_of(model)}
    stack = model.get_submodule(lists.pop()) if len(lists) == 1 else None
    return stack if isinstance(stack, nn.ModuleList) else None


def _alike(model: nn.Module, method: Method) -> bool:
    """True if all blocks but the first have the same parameters, the same updates and the same kind of attention."""
    if len(set(getattr(text_config(model), "layer_types", None) or ())) > 1:
        return False
    names = sorted(blocks_of(model), key=blocks_of(model).__getitem__)
    with torch.device("meta"):
        updates = method.plan(model).updates
    shapes: dict[str, list[tuple[object, ...]]] = {name: [] for name in names}
    for layer, update in updates.items():
        block = next((n for n in names if layer == n or layer.startswith(f"{n}.")), None)
        if block is not None:
            sizes = tuple(tuple(p.shape) for p in update.parameters())
            shapes[block].append((layer[len(block) :], type(update), sizes))
    for name in names:
        block_parameters = model.get_submodule(name).named_parameters()
        shapes[name] += [(n, tuple(p.shape), p.dtype) for n, p in block_parameters]
    return all(shapes[name] == shapes[names[1]] for name in names[2:])


@contextlib.contextmanager
def _only(model: nn.Module, blocks: int | None) -> Iterator[None]:
    """Keep only the first `blocks` blocks of the model's stack, within the block; all of them where it is None."""
    stack = _stack(model) if blocks is not None else None
    if stack is None:
        yield
        return
    whole = dict(stack._modules)
    stack._modules = dict(list(whole.items())[:blocks])
    try:
        yield
    finally:
        stack._modules = whole


def _of_blocks(
    model: nn.Module, method: Method, examples: Sequence[Record], config: TrainConfig, device: str,
    loss_of: Callable[[], Loss], blocks: int | None,
) -> Step:  # fmt: skip
    longest = max(e.length for e in examples)
    with (
        _only(model, blocks),
        training_attention(model, longest, device, trees=False),
        torch.random.fork_rng(devices=[]),
    ):
        with torch.device("meta"):
            attach(model, method)
        try:
            loss = loss_of()
            if isinstance(loss, CompletionLoss):
                choose_path(loss)
            any_rate = dataclasses.replace(config, lr=1e-3)  # which takes no more nor less than another
            return _dry(LoopPlan(loss, examples, (), any_rate), loss.collate(examples), device)
        finally:
            detach(model)
            model.eval()


def choose_path(loss: CompletionLoss) -> None:
    """Tell the loss how its model makes logits, which it would otherwise try out with values. Only a cap takes memory."""
    loss.path = "logits" if loss.body is None or loss.head is None else "head"
    config = text_config(loss.model)
    cap = next((value for name in CAPS if (value := getattr(config, name, None))), None)
    loss.after = AfterHead(cap=float(cap)) if cap else AfterHead()


def _dry(plan: LoopPlan, batch: Any, device: str) -> Step:
    """Run a step of a loop over a meta model: forward, backward, and the optimizer for its state alone."""
    live = Live(there=(*plan.model.parameters(), *plan.model.buffers()))
    with live, StandIns(device), opened(plan, LoopState()) as loop:
        flat = loop.flat
        buffers = [buffer for letter in "AB" for buffer in flat.buffers[letter]]
        flats = {id(buffer.values) for buffer in buffers}
        loose = [p for letter in "AB" for p in flat.parameters(letter) if id(p) not in flats]
        gradients = sum(_bytes(b.gradient) + _bytes(b.copy_grad) for b in buffers)
        gradients += sum(_bytes(p.grad) for p in loose if p.grad is not None)
        held, began = live.since() - _bytes(loop.losses), live.flops
        passes = _passes(plan.loss, batch, live, device)
        flops = live.flops - began
        flat.add_gradients()
        before = live.now
        loop.optimizer.step()
        optimizer = live.now - before
    adapter = held - gradients + sum(map(_bytes, loose))
    return Step(adapter, gradients, optimizer, passes.activations, passes.working, passes.logits, flops)


class _Passes(NamedTuple):
    activations: int
    working: int
    logits: int


def _passes(loss: Loss, batch: Any, live: Live, device: str) -> _Passes:
    """Run the forward and the backward pass."""
    began, before_head = live.since(), [0]

    def at_head(*_: object) -> None:
        before_head.append(live.peak - began)
        live.since()

    body = loss.body if isinstance(loss, CompletionLoss) else None
    with contextlib.ExitStack() as hooked:
        if body is not None:
            hooked.callback(body.register_forward_hook(at_head).remove)
        total, count = loss(batch)
    kept, highest = live.now - began, live.peak - began
    if isinstance(loss, CompletionLoss):
        highest = max(kept, highest - _uncached(loss, count, device))
    live.since()
    mean = total / count
    torch.autograd.backward(get_gradient_edge(mean))  # not mean.backward(), which would leave the stand-ins
    del total, mean
    peak = max(before_head[-1], highest, live.peak - began)
    return _Passes(kept, peak - kept, 0 if body is None else highest - kept)


def _uncached(loss: CompletionLoss, count: int, device: str) -> int:
    """The bytes of float32 logits that a CPU never holds at once, as it makes them a few at a time."""
    head = loss.head
    if device != "cpu" or loss.path != "head" or not isinstance(head, nn.Linear) or not heads.is_frozen_linear(head):
        return 0
    if head.weight.dtype.itemsize >= 4:
        return 0
    vocabulary = head.weight.shape[0]
    chunk = max(1, heads.CHUNK_ELEMENTS // vocabulary // heads.MULTIPLE) * heads.MULTIPLE
    rows = min(chunk, -(-count // heads.MULTIPLE) * heads.MULTIPLE)
    return 4 * max(0, rows * vocabulary - heads.CACHED_ELEMENTS)


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
