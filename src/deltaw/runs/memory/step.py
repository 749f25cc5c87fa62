"""One training step on the meta device: the real loop, loss and update over tensors without memory. What it would hold, by part,
and its FLOPs. Knows loops and models of one stack of blocks; nothing of files or presets.

Blocks that are alike cost alike, so of many of them two and three are run and the others reckoned from the difference: every
part grows by the same number of bytes with each block.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.config import TrainConfig
from deltaw.methods.targets import blocks_of
from deltaw.model.attach import attach, detach
from deltaw.runs.memory.live import Live, StandIns
from deltaw.training import head as heads
from deltaw.training.attention import short_row_attention
from deltaw.training.head import AfterHead
from deltaw.training.loop import LoopPlan, LoopState, opened
from deltaw.training.losses import CompletionLoss, Loss

# So many blocks are run as they are
_FEW = 6


@dataclass(frozen=True)
class Step:
    """Bytes that one training step holds, and its FLOPs."""

    adapter: int
    """The trained values, and their copy in the precision that steps compute in."""
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    working: int
    """The most that either pass holds beyond that."""
    logits: int
    """Part of `working`, or less: what the head and the loss hold."""
    flops: int
    """Forward and backward."""


def step(
    model: Any, method: Any, examples: Sequence[Any], config: TrainConfig, device: str, loss_of: Callable[[Any], Loss]
) -> Step:
    """One step of `method` on a meta model without adapters, over `examples` as one batch, as on a device of this type. The model
    is afterwards as it was, but that it goes on checkpointing, where `config` has it do so: take another one then. Raises what
    the model's forward raises where it does not run on the meta device."""
    stack = _stack(model)
    if stack is None or len(stack) <= _FEW or not _alike(model, method):
        return _of_blocks(model, method, examples, config, device, loss_of, None)
    two, three = (_of_blocks(model, method, examples, config, device, loss_of, n) for n in (2, 3))
    more = len(stack) - 3
    reckoned = {}
    for part, there in dataclasses.asdict(three).items():
        # What is at work at one time is of one block or of the head, however many blocks there are
        grown = 0 if part in ("working", "logits") else there - getattr(two, part)
        reckoned[part] = there + more * grown
    return Step(**reckoned)


def _stack(model: nn.Module) -> nn.ModuleList | None:
    """The one list of all blocks; None where there are several or none."""
    lists = {name.rpartition(".")[0] for name in blocks_of(model)}
    found = model.get_submodule(lists.pop()) if len(lists) == 1 else None
    return found if isinstance(found, nn.ModuleList) else None


def _alike(model: Any, method: Any) -> bool:
    """Whether all blocks but the first have the same parameters, the same updates and the same kind of attention."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return False
    names = sorted(blocks_of(model), key=blocks_of(model).__getitem__)
    with torch.device("meta"):
        updates = method.plan(model).updates
    shapes: dict[str, list[tuple[Any, ...]]] = {name: [] for name in names}
    for layer, update in updates.items():
        block = next((n for n in names if layer == n or layer.startswith(f"{n}.")), None)
        if block is not None:
            own = tuple(tuple(p.shape) for p in update.parameters())
            shapes[block].append((layer[len(block) :], type(update), own))
    for name in names:
        block_parameters = model.get_submodule(name).named_parameters()
        shapes[name] += [(n, tuple(p.shape), p.dtype) for n, p in block_parameters]
    return all(shapes[name] == shapes[names[1]] for name in names[2:])


@contextlib.contextmanager
def _only(model: nn.Module, blocks: int | None) -> Iterator[None]:
    """While open, the model's stack has its first so many blocks alone."""
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
    model: Any, method: Any, examples: Sequence[Any], config: TrainConfig, device: str,
    loss_of: Callable[[Any], Loss], blocks: int | None,
) -> Step:  # fmt: skip
    longest = max(e.length for e in examples)
    with _only(model, blocks), short_row_attention(model, longest, device), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            attach(model, method)
        try:
            loss = loss_of(model)
            if isinstance(loss, CompletionLoss):
                _choose_path(loss)
            return _dry(LoopPlan(loss, examples, (), config), loss.collate(examples), device)
        finally:
            detach(model)
            model.eval()


def _choose_path(loss: CompletionLoss) -> None:
    """A loss tries out what its model does to the logits, which tensors without values cannot tell; only a cap takes memory."""
    loss.path = "logits" if loss.body is None or loss.head is None else "head"
    cap = getattr(getattr(loss.model, "config", None), "final_logit_softcapping", None)
    loss.after = AfterHead(cap=float(cap)) if cap else AfterHead()


def _dry(plan: LoopPlan, batch: Any, device: str) -> Step:
    """A step of a loop over a meta model, forward and backward; the optimizer's state is of a step of its own."""
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
    """Forward and backward."""
    began, before_head = live.since(), [0]

    def at_head(*_: Any) -> None:
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
    torch.autograd.backward(total / count)  # not total.backward(), which would leave the stand-ins
    del total
    peak = max(before_head[-1], highest, live.peak - began)
    return _Passes(kept, peak - kept, 0 if body is None else highest - kept)


def _uncached(loss: CompletionLoss, count: int, device: str) -> int:
    """Bytes of wide logits that a CPU, which makes them a few at a time, never has at once."""
    head: Any = loss.head
    if device != "cpu" or loss.path != "head" or not heads.is_frozen_linear(head) or head.weight.dtype.itemsize >= 4:
        return 0
    vocabulary = head.weight.shape[0]
    chunk = max(1, heads.CHUNK_ELEMENTS // vocabulary // heads.MULTIPLE) * heads.MULTIPLE
    rows = min(chunk, -(-count // heads.MULTIPLE) * heads.MULTIPLE)
    return 4 * max(0, rows * vocabulary - heads.CACHED_ELEMENTS)


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
