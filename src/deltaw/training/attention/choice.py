"""The attention of a training run: the model's, with two exceptions. A batch whose records begin alike is computed as a tree, and
short rows in bfloat16 on a CPU by plain products."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from deltaw.data.trees import Tree
from deltaw.layers.unwrap import plain_class
from deltaw.model.inputs import text_config
from deltaw.training.attention.short_rows import attention
from deltaw.training.attention.tree import Plan, Settings, tree_attention

# Up to here plain products are faster there than torch's fused kernel, and their [rows, rows] scores are small beside the
# other activations. Measured: SmolLM2, 8 rows of 50–60 tokens, a step takes 1.0 s instead of 1.3 s.
_SHORT = 128
_SHORT_ROWS, _TREES, _SHORT_TREES = "deltaw_short_rows", "deltaw_trees", "deltaw_short_trees"
_EAGER_TREES = "deltaw_eager_trees"
# The function of a model's module that its config calls eager, and the call in which models name it
_EAGER, _CHOICE = "eager_attention_forward", "get_interface"
# What models hand to attention beside query, key and value that changes its weights, and that trees do not know
_UNKNOWN = ("position_bias", "head_mask", "cache")


class NoTree(Exception):
    """A model's attention cannot be computed over a tree."""


@contextlib.contextmanager
def training_attention(
    model: nn.Module, longest: int, device: str | None = None, *, trees: bool = True
) -> Iterator[None]:
    """Compute attention, while open, in a way of our own. Batches may then be trees, and short rows take plain products.

    longest: tokens of the longest row; rows are short up to 128 tokens, in a bfloat16 model on a CPU. device: the type of the
    device, "cpu" or "cuda"; None: the model's. trees: whether batches may be trees.
    """
    parameter = next(model.parameters())
    slow = (device or parameter.device.type) == "cpu" and parameter.dtype == torch.bfloat16 and longest <= _SHORT
    chosen, choose = implementation(model), getattr(model, "set_attn_implementation", None)
    ours = None
    if chosen == "sdpa":
        ours = {(True, False): _SHORT_ROWS, (True, True): _SHORT_TREES, (False, True): _TREES}.get((slow, trees))
    elif chosen == "eager" and trees and _has_its_own(model):
        ours = _EAGER_TREES
    if ours is None or choose is None:
        yield
        return
    choose(ours)
    try:
        yield
    finally:
        choose(chosen)


def _has_its_own(model: nn.Module) -> bool:
    """Return whether all attention of the model calls its module's own function where the config says eager."""
    calls = [inspect.unwrap(plain_class(module).forward).__code__.co_names for module in model.modules()]
    choices = [_EAGER in names for names in calls if _CHOICE in names]
    return bool(choices) and all(choices)


def takes_trees(model: nn.Module) -> bool:
    """Return whether the model's attention may be computed over trees now."""
    return implementation(model) in _WITHOUT_TREES


@contextlib.contextmanager
def without_trees(model: Any) -> Iterator[None]:
    """Take no trees, while open."""
    chosen = implementation(model) or ""
    without = _WITHOUT_TREES.get(chosen)
    if without is None:
        yield
        return
    model.set_attn_implementation(without)
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def implementation(model: nn.Module) -> str | None:
    """Return the name of the attention that the model's config chooses; None of a model without one."""
    return getattr(text_config(model), "_attn_implementation", None)


def mask_of(tree: Tree, device: torch.device) -> Tensor:
    """Return what the model takes as the mask of a tree's row, and hands to its attention as it is."""
    mask = torch.empty(1, 1, 0, 0, device=device)
    stretches = [(stretch.start, stretch.stop, stretch.end) for stretch in tree.stretches]
    mask.tree = Plan(stretches, tree.position_ids[0].to(device))  # type: ignore[attr-defined]
    return mask


def _with_trees(others: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Return the attention that takes a tree where the mask is one's, and is `others` elsewhere."""

    def attention_of(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **more: Any,
    ) -> tuple[Tensor, None]:
        plan: Plan | None = getattr(attention_mask, "tree", None)
        if plan is None:
            return others(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more)
        unknown = [name for name in _UNKNOWN if more.get(name) is not None]
        if (
            unknown
            or more.get("is_causal") is False
            or len(plan.positions) != key.shape[2]
            or key.shape[2] != query.shape[2]
        ):
            raise NoTree(f"{type(module).__name__} takes {', '.join(unknown) or 'other keys than its own tokens'}")
        seed = int(torch.randint(1 << 62, ())) if dropout else 0
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        settings = Settings(scale, more.get("sliding_window"), more.get("softcap"), dropout, seed)
        return tree_attention(query, key, value, plan, settings, more.get("s_aux")).transpose(1, 2).contiguous(), None

    return attention_of


def _own(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Compute attention as the module's file does."""
    return inspect.unwrap(plain_class(module).forward).__globals__[_EAGER](module, *inputs, **named)


# Our names of attention with trees → the names of what it is without
_WITHOUT_TREES = {_TREES: "sdpa", _SHORT_TREES: _SHORT_ROWS, _EAGER_TREES: "eager"}
AttentionInterface.register(_SHORT_ROWS, attention)
AttentionMaskInterface.register(_SHORT_ROWS, eager_mask)
AttentionInterface.register(_SHORT_TREES, _with_trees(attention))
AttentionMaskInterface.register(_SHORT_TREES, eager_mask)
AttentionInterface.register(_TREES, _with_trees(sdpa_attention_forward))
AttentionMaskInterface.register(_TREES, sdpa_mask)
AttentionInterface.register(_EAGER_TREES, _with_trees(_own))
AttentionMaskInterface.register(_EAGER_TREES, eager_mask)
