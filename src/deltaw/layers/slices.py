"""Which rows of a fused layer's output are whose: q, k and v, or gate and up, in one layer. Reads a model's modules by their
classes, changes nothing.

In one product with several roles they stand one after the other (GPT-2, Phi-3), or head by head (GPT-NeoX, BLOOM). Which of
these a class of transformers does is read in its forward, and kept in `LAYOUTS`; tests/layers/test_slices.py holds each against
the model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from deltaw.layers.kinds import Runs

QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


def parts_of(model: nn.Module, name: str, d: int) -> dict[str, Runs]:
    """Role → rows, of a layer with `d` outputs that holds several roles; empty for one that does not, or of a class whose layout
    is not known."""
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        return _even(*QKV)(parent, d) if own == "in_proj_weight" else {}
    if not type(parent).__module__.startswith("transformers.models."):  # another's class of that name
        return {}
    for classes, layer, layout in LAYOUTS:
        if own == layer and re.fullmatch(classes, type(parent).__name__):
            found: dict[str, Runs] = layout(parent, d)
            return found if sum(stop - start for runs in found.values() for start, stop in runs) == d else {}
    return {}


def runs_of(text: str, d: int) -> Runs | None:
    """Rows as they are written in targets: "0:64", to be joined by + where there are several; None for what is none, or lies
    outside of `d` rows."""
    found = [re.fullmatch(r"(\d+):(\d+)", part.strip()) for part in text.split("+")]
    runs = tuple((int(m[1]), int(m[2])) for m in found if m)
    in_order = all(a < b for a, b in runs) and all(one[1] <= two[0] for one, two in itertools.pairwise(runs))
    return runs if len(runs) == len(found) and in_order and runs[-1][1] <= d else None


def overlapping(slices: Sequence[Runs]) -> bool:
    """Whether any row is in two of them."""
    runs = sorted(run for each in slices for run in each)
    return any(one[1] > two[0] for one, two in itertools.pairwise(runs))


# --- layouts ----------------------------------------------------------------------------------------------------


def _even(*roles: str) -> Callable[[Any, int], dict[str, Runs]]:
    """Blocks of one size, one after the other."""
    return lambda parent, d: _blocks(roles, [d // len(roles)] * len(roles))


def _gpt2(parent: Any, d: int) -> dict[str, Runs]:
    return _even(*(("k", "v") if getattr(parent, "is_cross_attention", False) else QKV))(parent, d)


def _grouped(parent: Any, d: int) -> dict[str, Runs]:
    """q, then k and v, which may have fewer heads."""
    heads, groups = parent.config.num_attention_heads, parent.config.num_key_value_heads
    width = d // (heads + 2 * groups)
    return _blocks(QKV, [heads * width, groups * width, groups * width])


def _by_head(parent: Any, d: int) -> dict[str, Runs]:
    """q, k and v of one head, then those of the next."""
    config = getattr(parent, "config", parent)
    heads = getattr(config, "num_attention_heads", None) or parent.num_heads
    width = d // (3 * heads)
    return {
        role: tuple((at, at + width) for at in range(i * width, 3 * width * heads, 3 * width))
        for i, role in enumerate(QKV)
    }


def _bigcode(parent: Any, d: int) -> dict[str, Runs]:
    if getattr(parent, "is_cross_attention", False):
        return {}
    if parent.multi_query:
        return _blocks(QKV, [parent.embed_dim, parent.kv_dim, parent.kv_dim])
    return _by_head(parent, d)


def _falcon(parent: Any, d: int) -> dict[str, Runs]:
    """By groups of heads: a group's queries, then the key and the value that these share."""
    heads, groups = parent.num_heads, parent.num_kv_heads
    if not parent.new_decoder_architecture:
        groups = 1 if parent.multi_query else heads
    width, each = parent.head_dim, heads // groups
    starts = range(0, d, (each + 2) * width)
    ends = {"q": (0, each), "k": (each, each + 1), "v": (each + 1, each + 2)}
    return {role: tuple((at + a * width, at + b * width) for at in starts) for role, (a, b) in ends.items()}


def _blocks(roles: Sequence[str], sizes: Sequence[int]) -> dict[str, Runs]:
    found: dict[str, Runs] = {}
    at = 0
    for role, size in zip(roles, sizes, strict=True):
        found[role] = ((at, at + size),)
        at += size
    return found


LAYOUTS: tuple[tuple[str, str, Callable[[Any, int], dict[str, Runs]]], ...] = (
    (r"(?:GPT2|ImageGPT|DecisionTransformerGPT2)Attention|Attention", "c_attn", _gpt2),
    (r"GPTBigCodeAttention", "c_attn", _bigcode),
    (r"(?:GPTNeoX|GPTNeoXJapanese|Bloom|Persimmon)Attention", "query_key_value", _by_head),
    (r"FalconAttention|FalconFlashAttention2", "query_key_value", _falcon),
    (r"Phi3Attention", "qkv_proj", _grouped),
    (r"(?:Phi3|Glm|Glm4)MLP", "gate_up_proj", _even(*GATE_UP)),
    (r"(?:Mpt|ModernBert)Attention", "Wqkv", _even(*QKV)),
    (r"(?:Sam|SamHQ)Vision(?:Sdpa)?Attention|(?:Qwen2_5_VL)?VisionAttention", "qkv", _even(*QKV)),
)
"""Class of the module around the layer, the layer's own name → how its rows are laid out."""
