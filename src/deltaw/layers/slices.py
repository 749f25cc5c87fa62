"""The rows of a fused layer's output that each role has: q, k and v, or gate and up, in one layer. Reads a model's modules by
their classes, changes nothing.

In one product with several roles they stand one after the other (GPT-2, Phi-3), or head by head (GPT-NeoX, BLOOM). Which of
these a class of transformers does is read in its forward, and kept in `LAYOUTS`; tests/layers/test_slices.py holds each against
the model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from torch import nn

from deltaw.layers.kinds import Runs

QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


def parts_of(model: nn.Module, name: str, d: int) -> dict[str, Runs]:
    """Return role → rows, of a layer with `d` outputs that holds several roles.

    Empty for a layer of one role, or of a class whose layout is not known.
    """
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        return _even(*QKV)(parent, d) if child == "in_proj_weight" else {}
    if not type(parent).__module__.startswith("transformers.models."):  # another's class of that name
        return {}
    for classes, layer, layout in LAYOUTS:
        if child == layer and re.fullmatch(classes, type(parent).__name__):
            rows = layout(parent, d)
            return rows if sum(stop - start for runs in rows.values() for start, stop in runs) == d else {}
    return {}


def runs_of(text: str, d: int) -> Runs | None:
    """Return rows as they are written in targets: "0:64", joined by + where there are several runs.

    None for a text that is none, or rows outside of a layer's `d`.

    >>> runs_of("0:64+128:192", d=256)
    ((0, 64), (128, 192))
    """
    matches = [re.fullmatch(r"(\d+):(\d+)", part.strip()) for part in text.split("+")]
    runs = tuple((int(m[1]), int(m[2])) for m in matches if m)
    in_order = all(a < b for a, b in runs) and all(one[1] <= two[0] for one, two in itertools.pairwise(runs))
    return runs if len(runs) == len(matches) and in_order and runs[-1][1] <= d else None


def overlapping(slices: Sequence[Runs]) -> bool:
    """Return whether any row is in two of them."""
    runs = sorted(run for rows in slices for run in rows)
    return any(one[1] > two[0] for one, two in itertools.pairwise(runs))


# --- layouts ----------------------------------------------------------------------------------------------------


def _even(*roles: str) -> Callable[[nn.Module, int], dict[str, Runs]]:
    """Return the layout of blocks of one size, one after the other."""
    return lambda parent, d: _blocks(roles, [d // len(roles)] * len(roles))


def _gpt2(parent: nn.Module, d: int) -> dict[str, Runs]:
    """Lay out q, k and v; k and v alone where they are another sequence's."""
    return _even(*(("k", "v") if getattr(parent, "is_cross_attention", False) else QKV))(parent, d)


def _grouped(parent: nn.Module, d: int) -> dict[str, Runs]:
    """Lay out q, then k and v, which may have fewer heads."""
    config = _config(parent)
    heads, groups = _setting(config, "num_attention_heads"), _setting(config, "num_key_value_heads")
    width = d // (heads + 2 * groups)
    return _blocks(QKV, [heads * width, groups * width, groups * width])


def _by_head(parent: nn.Module, d: int) -> dict[str, Runs]:
    """Lay out q, k and v of one head, then those of the next."""
    heads = getattr(_config(parent), "num_attention_heads", None) or _setting(parent, "num_heads")
    width = d // (3 * heads)
    return {
        role: tuple((at, at + width) for at in range(i * width, 3 * width * heads, 3 * width))
        for i, role in enumerate(QKV)
    }


def _bigcode(parent: nn.Module, d: int) -> dict[str, Runs]:
    """Lay out q of all heads and the one k and v, or q, k and v head by head."""
    if getattr(parent, "is_cross_attention", False):
        return {}
    if _setting(parent, "multi_query"):
        q, kv = _setting(parent, "embed_dim"), _setting(parent, "kv_dim")
        return _blocks(QKV, [q, kv, kv])
    return _by_head(parent, d)


def _falcon(parent: nn.Module, d: int) -> dict[str, Runs]:
    """Lay out groups of heads: a group's queries, then the key and the value that these share."""
    heads, groups = _setting(parent, "num_heads"), _setting(parent, "num_kv_heads")
    if not _setting(parent, "new_decoder_architecture"):
        groups = 1 if _setting(parent, "multi_query") else heads
    width, queries = _setting(parent, "head_dim"), heads // groups
    starts = range(0, d, (queries + 2) * width)
    ends = {"q": (0, queries), "k": (queries, queries + 1), "v": (queries + 1, queries + 2)}
    return {role: tuple((at + a * width, at + b * width) for at in starts) for role, (a, b) in ends.items()}


def _config(parent: nn.Module) -> object:
    """Return what has the module's settings: its config, or itself."""
    return getattr(parent, "config", parent)


def _setting(owner: object, name: str) -> int:
    """Return a number or a switch of a module or a config."""
    return int(getattr(owner, name))


def _blocks(roles: Sequence[str], sizes: Sequence[int]) -> dict[str, Runs]:
    """Return role → rows of blocks of these sizes, one after the other."""
    rows: dict[str, Runs] = {}
    at = 0
    for role, size in zip(roles, sizes, strict=True):
        rows[role] = ((at, at + size),)
        at += size
    return rows


LAYOUTS: tuple[tuple[str, str, Callable[[nn.Module, int], dict[str, Runs]]], ...] = (
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
