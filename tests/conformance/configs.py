"""The smallest config of a class of transformers: its default, with widths, depths and vocabularies cut by their names."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

LAYERS = re.compile(
    r"(n|num)_.*layers|n_?layers?|num_layers|.*_layers|(.*_)?depth|num_blocks|.*num_blocks|n_blocks|num_hidden_layers"
)
NOT_LAYERS = re.compile(
    r".*(skip|feat|conv|every|extract|interval|freq|select|out_layers|share|_indexes|_indices|idx).*|deepstack.*"
    r"|num_kv_shared_layers|.*upsample.*"
)
HEADS = re.compile(r"(.*_)?n?(um)?_?(.*_)?heads?|n_?heads?|.*num_heads|.*_n_heads|num_attention_heads_.*")
KEY_HEADS = re.compile(r".*(key_value|kv|num_k|num_query_groups|n_groups_kv).*")
HEAD_WIDTH = re.compile(r"(.*_)?head_(dim|size|width|dims)|d_kv|.*_head_dim|kv_channels|dim_head|head_v_dim|head_k_dim")
INNER = re.compile(
    r".*(intermediate|ffn|inner|mlp_dim|mlp_hidden|d_ff|feed_?forward|fc_dim|mlp_size|hidden_dim\b).*|.*_ff_.*|d_inner"
)
WIDTH = re.compile(
    r"(.*_)?(hidden_size|hidden_sizes|d_model|n_embd|dim|embed_dim|embed_dims|embedding_size|hidden_dim|hidden_dims|dims|width|"
    r"channels|n_embed|embedding_dim|feature_size|features|feature_dim|projection_dim|proj_dim|d_embed|dim_model|embd_pdim|"
    r"embedding_width|embd_dim|n_state|output_dim|num_features|hidden_channels|conv_dim|sizes|lru_width|model_dim|out_features|"
    r"hidden_dimension|dimension|embed_size)"
)
NOT_WIDTH = re.compile(
    r".*(num_channels|in_channels|in_chans|rope|rotary|patch|image|window|audio_channels|kernel|out_features|out_indices|num_mel|"
    r"input_channels|mel|state_dim|act_dim|input_dim|spatial|position|temporal_dim|time_dim|num_colors|codebook).*"
)
EXPERTS = re.compile(r".*(num|n)_.*experts|num_experts|moe_num_experts|.*n_routed_experts|num_local_experts")
CHOSEN = re.compile(r".*(experts_per_tok|top_?k|experts_per_token|num_selected_experts|num_experts_per_.*)")
RANKS = re.compile(r".*(lora_rank|_rank|low_rank.*|lora_dim|.*_lora_r)")
VOCABULARY = re.compile(
    r".*vocab(ulary)?_?size.*|.*_vocab|n_vocab|num_embeddings|vocab_size_.*|.*codebook_size.*|.*bucket_size"
)
DEPTHS = re.compile(r".*depths?|.*num_blocks|layers|.*num_layers")
NOT_LISTS = re.compile(r".*(kernel|patch|window|image|stride|crop|pool|merge|size_div).*|.*(indices|index)|.*_layers")
TOKEN = re.compile(r".*(token_id|token_index|token_ids|_token|eos_id|bos_id|pad_id|_id)")

Cut = Callable[[str, Any], Any]
"""A field's name and value → the value in a small model; the same where it need not change."""


def least(value: int, most: int) -> int:
    return most if value > most else value


def narrow(name: str, value: Any) -> Any:
    """Everything cut to sizes that fit each other: widths 32, heads 4, hidden widths 48."""
    if KEY_HEADS.fullmatch(name) and HEADS.fullmatch(name):
        return least(value, 2 if value != 1 else 1)
    if HEADS.fullmatch(name) and not HEAD_WIDTH.fullmatch(name):
        return least(value, 4)
    if HEAD_WIDTH.fullmatch(name) or re.fullmatch(r".*(rope|nope)_head_dim", name):
        return least(value, 8)
    if EXPERTS.fullmatch(name):
        return least(value, 4)
    if CHOSEN.fullmatch(name):
        return least(value, 2)
    if RANKS.fullmatch(name):
        return least(value, 12)
    if INNER.fullmatch(name):
        return least(value, 48)
    if name.endswith("chunk_size"):
        return least(value, 16)
    if WIDTH.fullmatch(name) and not NOT_WIDTH.fullmatch(name):
        return least(value, 32)
    return shallow(name, value)


def scaled(by: int) -> Cut:
    """Widths divided by a number, heads as they are: what divides what stays so."""

    def cut(name: str, value: Any) -> Any:
        wide = WIDTH.fullmatch(name) and not NOT_WIDTH.fullmatch(name)
        if (wide or INNER.fullmatch(name) or HEAD_WIDTH.fullmatch(name) or RANKS.fullmatch(name)) and not (
            value % by or HEADS.fullmatch(name)
        ):
            return max(value // by, 1)
        if EXPERTS.fullmatch(name):
            return least(value, 8)
        if CHOSEN.fullmatch(name):
            return least(value, 2)
        return shallow(name, value)

    return cut


def shallow(name: str, value: Any) -> Any:
    """Fewer layers, tokens, positions and groups of experts; widths as they are."""
    if name in ("n_group", "num_expert_group", "topk_group"):
        return 1
    if VOCABULARY.fullmatch(name):
        return least(value, 128)
    if LAYERS.fullmatch(name) and not NOT_LAYERS.fullmatch(name):
        return least(value, 2)
    if re.fullmatch(r"(.*_)?(max_.*positions?.*|n_positions|n_ctx|max_.*length)", name):
        return least(value, 512)
    return value


@dataclass(frozen=True)
class Size:
    """A way to a small config."""

    cut: Cut
    lists: bool = True
    """Lists of sizes are cut too."""
    filled: bool = False
    """Numbers of heads and their width are said where the default is to follow from others, and are powers of two."""


CUTS: dict[str, Size] = {
    "narrow": Size(narrow),
    "sixteenth": Size(scaled(16)),
    "eighth": Size(scaled(8)),
    "fourth": Size(scaled(4)),
    "shallow": Size(shallow),
    "narrow filled": Size(narrow, filled=True),
    "narrow but lists": Size(narrow, lists=False, filled=True),
    "shallow but lists": Size(shallow, lists=False, filled=True),
}


def small(config: PretrainedConfig, size: Size, extra: Mapping[str, Any] = {}) -> PretrainedConfig:
    """A config of the same class with its fields cut, those of its parts likewise, and these `extra` ones as they are; of a part
    they are a dictionary of their own."""
    cut = size.cut
    fields: dict[str, Any] = {}
    usual = dict(_fields(type(config)()))
    for name, value in _fields(config):
        if isinstance(value, PretrainedConfig):
            of_part = extra.get(name)
            fields[name] = small(value, size, of_part if isinstance(of_part, dict) else {})
        elif (changed := _cut(name, value, size)) != usual.get(name):
            fields[name] = changed
    if "num_attention_heads" in fields:
        heads = getattr(config, "num_attention_heads", None)
        same = [n for n, v in _fields(config) if n in ("num_key_value_heads", "n_kv_heads") and v == heads]
        fields |= dict.fromkeys(same, fields["num_attention_heads"])
    fields |= _layers_of_each_kind(config, size) | ({} if cut is shallow else _small_image(config))
    fields |= _filled(config, fields) if size.filled else {}
    turns = getattr(config, "rope_parameters", None) or {}
    if cut is narrow and _has_sections(type(config)) and not any(isinstance(v, dict) for v in turns.values()):
        part = turns.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        fields["rope_parameters"] = {**turns, "mrope_section": [2, 1, 1] if part == 1 else [1, 1, 0]}
    fields |= {
        n: v for n, v in extra.items() if not (isinstance(v, dict) and isinstance(fields.get(n), PretrainedConfig))
    }
    return _made(config, fields | _tokens(config, fields))


@cache
def _has_sections(cls: Any) -> bool:
    """Whether the folder's models turn parts of a head by places in time, height and width, which have to sum to half a head."""
    code = [p.read_text(encoding="utf-8") for p in Path(inspect.getfile(cls)).parent.glob("modeling_*.py")]
    return "rope_parameters" in cls.__annotations__ and any("mrope_section" in text for text in code)


def _cut(name: str, value: Any, size: Size) -> Any:
    """A field's value in the small config."""
    if TOKEN.fullmatch(name):
        return value
    if type(value) is int:
        return _even(name, size.cut(name, value), size)
    if _are_numbers(value) and not NOT_LISTS.fullmatch(name) and size.lists:
        cut = [min(v, 1) if DEPTHS.fullmatch(name) else _even(name, size.cut(name, v), size) for v in value]
        return type(value)(cut)
    return value


def _even(name: str, value: int, size: Size) -> int:
    """A number of heads as the power of two below it."""
    heads = HEADS.fullmatch(name) and not HEAD_WIDTH.fullmatch(name)
    return 1 << (value.bit_length() - 1) if size.filled and heads and value > 0 else value


def _filled(config: PretrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is None and would follow from the other sizes."""
    known = dict(_fields(config)) | dict(fields)
    width, heads = (known.get(n) for n in ("hidden_size", "num_attention_heads"))
    if type(width) is not int or type(heads) is not int:
        return {}
    usual = {"head_dim": width // heads, "num_key_value_heads": heads}
    return {n: v for n, v in usual.items() if n in known and known[n] is None}


def _are_numbers(value: Any) -> bool:
    """Whether it is a list of whole numbers that is not empty."""
    return isinstance(value, (list, tuple)) and bool(value) and all(type(v) is int for v in value)


def _small_image(config: PretrainedConfig) -> dict[str, Any]:
    """An image of a few patches, where the config tells a patch's side."""
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if type(side) is not int or type(patch) is not int or patch < 2 or side % patch:
        return {}
    return {"image_size": min(side, patch * (8 if patch <= 8 else 4))}


def _fields(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    general = vars(PretrainedConfig())
    for name, value in vars(config).items():
        if not name.startswith("_") and (name not in general or name.endswith("token_id") or name == "id2label"):
            yield name, value


def _made(config: PretrainedConfig, fields: dict[str, Any]) -> PretrainedConfig:
    """The class made with these fields; parts as dictionaries where it does not take configs."""
    try:
        return type(config)(**copy.deepcopy(fields))
    except (TypeError, AttributeError):
        plain = {n: v.to_dict() if isinstance(v, PretrainedConfig) else v for n, v in fields.items()}
        return type(config)(**plain)


def _layers_of_each_kind(config: PretrainedConfig, size: Size) -> dict[str, Any]:
    """Lists with an entry for each layer, cut to a layer of each kind (attention, Mamba, experts …), at most six."""
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 3:
        return {}
    lists = {
        n: v
        for n, v in _fields(config)
        if isinstance(v, (list, tuple))
        and len(v) == depth
        and isinstance(v[0], (str, int))
        # Stages have depths and heads of their own
        and not (size.filled and (DEPTHS.fullmatch(n) or HEADS.fullmatch(n)))
    }
    if not lists:
        return {}
    first: dict[Any, int] = {}
    for i in range(depth):
        first.setdefault(tuple(v[i] for v in lists.values()), i)
    chosen = sorted(first.values())[:6]
    if len(chosen) == 1:
        chosen = [chosen[0], chosen[0]]
    return {n: type(v)(v[i] for i in chosen) for n, v in lists.items()} | {"num_hidden_layers": len(chosen)}


def _tokens(config: PretrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens that are beyond a cut vocabulary, each another one within it."""
    parts = [v for v in fields.values() if isinstance(v, PretrainedConfig)]
    least_part = min((v for p in parts if type(v := getattr(p, "vocab_size", None)) is int), default=None)
    room = fields.get("vocab_size", least_part)
    if type(room) is not int:
        return {}
    tokens: dict[str, Any] = {}
    free = iter(range(room - 2 if parts else room // 2, 0, -1))  # those of a part are others than those of the whole
    for name, value in _fields(config):
        if not TOKEN.fullmatch(name) or name in fields:
            continue
        if type(value) is int and value >= room:
            tokens[name] = next(free)
        elif _are_numbers(value) and max(value) >= room:
            tokens[name] = [next(free) for _ in value]
    return tokens
