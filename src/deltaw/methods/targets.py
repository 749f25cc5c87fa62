"""Which layers a `targets` value means in this model. Reads the model, changes nothing.

A targets value is a preset ("all-linear", "qv", "attention", "mlp"), a role (q k v o up gate down), a layer's dotted
name or the end of one ("q_proj"), a glob ("*.layers.[0-3].*"), a comma-separated or real list of those, or a mapping of
those to ranks, in which a later entry overrides an earlier one. In brackets after one of these stand slices of a fused
layer, by their roles or as rows of its output: "c_attn[q,v]", "qkv[0:64,128:192]"; a role that a model fuses with others means
its slice.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaw.errors import TargetError, nearest
from deltaw.layers.kinds import KINDS, Runs, Weight, kind_of, shape, weights_of, why_not
from deltaw.layers.slices import overlapping, parts_of, runs_of
from deltaw.layers.source import never_called, without_gradient
from deltaw.layers.unwrap import plain_class

Targets = str | Sequence[str] | Mapping[str, int]

# The end of a dense layer's dotted name → its role, over the architectures of transformers. First match wins, so the
# longer names (attention.output.dense) stand before the shorter ones they end in (output.dense).
ROLES: dict[str, str] = {
    "qkv": r"c_attn|query_key_value|qkv_proj|qkv|Wqkv|in_proj_linear|in_proj_weight",
    "gate_up": r"gate_up_proj",
    "q": r"q_proj|q_proj_weight|query_proj|query|q_lin|to_q|(?:SelfAttention|EncDecAttention|attention|attn)\.q",
    "k": r"k_proj|k_proj_weight|key_proj|key|k_lin|to_k|(?:SelfAttention|EncDecAttention|attention|attn)\.k",
    "v": r"v_proj|v_proj_weight|value_proj|value|v_lin|to_v|(?:SelfAttention|EncDecAttention|attention|attn)\.v",
    "o": r"o_proj|out_proj|out_lin|(?:SelfAttention|EncDecAttention)\.o|(?:attention|attn)\.output\.dense"
    r"|attn\.c_proj|(?:self_attention|attention|self_attn)\.dense|to_out\.0|attention\.o",
    "gate": r"gate_proj|wi_0",
    "up": r"up_proj|fc1|fc_in|c_fc|intermediate\.dense|wi_1|wi|lin1|dense_h_to_4h|linear1|ffn",
    "down": r"down_proj|fc2|fc_out|mlp\.c_proj|output\.dense|wo|lin2|dense_4h_to_h|linear2|ffn_output",
}
_ROLE_PATTERNS = [(role, re.compile(rf"(?:.*\.)?(?:{names})")) for role, names in ROLES.items()]
PRESETS: dict[str, tuple[str, ...]] = {
    "qv": ("q", "v"),
    "attention": ("q", "k", "v", "o", "qkv"),
    "mlp": ("up", "gate", "down", "gate_up"),
}
ALL = "all-linear"
WHERE_NAMED = "it takes an update where it is named"
"""The end of the reason of layers that presets and roles do not mean."""
# Names of roles, or rows from:to, several with +
_SLICED = re.compile(r"(.+)\[((?:[a-z_]+|\d+:\d+(?:\+\d+:\d+)*)(?:,(?:[a-z_]+|\d+:\d+(?:\+\d+:\d+)*))*)\]")
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "up": "gate_up", "gate": "gate_up"}


Layer = nn.Module | Weight
"""A dense layer, or a dense weight of a module."""


@dataclass(frozen=True)
class Selection:
    """What a targets value came to."""

    ranks: dict[str, int]
    """Layer name → rank, in the model's own order."""
    left_out: dict[str, str]
    """Dense weights that are not targeted, and why."""
    slices: dict[str, dict[str, Runs]]
    """Layer name → the slices of it that are meant, where it is not the whole layer; each has the layer's rank."""
    layers: dict[str, Layer]
    """Those that are meant."""


def select(model: nn.Module, targets: Targets, rank: int, *, without: Collection[str] = ()) -> Selection:
    """The layers of `model` that `targets` means, each with its rank (`rank` where targets names none).

    A preset, role or glob leaves out the layers `without` (which are trained otherwise), and those whose min(d, k) is below the
    rank (a router of one expert, say), if it means others as well. Raises TargetError with every problem: an entry that matches
    nothing (with the nearest names), a layer that is not dense or that no training reaches, a rank below 1 or above min(d, k)."""
    layers = dict(model.named_modules())
    dense = _dense(layers)
    head, dead = _head_names(layers, dense), _unreached(layers, dense)
    body = {n: layer for n, layer in dense.items() if n not in head and n not in dead and _multiplies(layer)}
    entries = _entries(targets, rank)
    ranks: dict[str, int] = {}
    small: dict[str, str] = {}
    problems: list[str] = []
    if not entries:
        problems.append("targets is empty")
    slices: dict[str, dict[str, Runs]] = {}
    for entry, r in entries.items():
        if not isinstance(entry, str):
            problems.append(f"{entry!r} is no name, role, glob or preset")
            continue
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            problems.append(f"{entry!r}: rank is {r!r}; it must be a whole number of at least 1")
            continue
        found = _match(entry, layers, dense, body, model, dead)
        if isinstance(found, str):
            problems.append(found)
            continue
        if _means_many(entry, dense):
            too_small = {
                n: f"rank {r} is larger than min(d, k) = {_min(dense[n], own)}"
                for n, own in found.items()
                if r > _min(dense[n], own)
            }
            too_small |= {n: "trained otherwise" for n in found if n in without}
            too_small |= {n: dead[n] for n in found if n in dead}
            if len(too_small) < len(found):
                small |= too_small
                found = {n: own for n, own in found.items() if n not in too_small}
        problems += dict.fromkeys(f"{entry!r}: {_kind(n)} cannot learn: {dead[n]}" for n in found if n in dead)
        for name, own in found.items():
            if own and name in slices and ranks[name] != r:
                problems.append(f"{entry!r}: slices of one layer have one rank, others of {name} have {ranks[name]}")
            elif own:
                slices[name] = {**slices.get(name, {}), **own}
            else:
                slices.pop(name, None)
            ranks[name] = r
    problems += [
        f"{n}: its slices {', '.join(own)} overlap" for n, own in slices.items() if overlapping([*own.values()])
    ]
    problems += _too_large(dense, ranks, slices)
    if problems:
        known = ", ".join(sorted({_kind(n) for n in body})) or "none"
        raise TargetError(
            "These targets do not fit the model:",
            problems,
            f"Its dense layers are: {known}. Presets: {ALL}, {', '.join(PRESETS)}; roles: q k v o up gate down.",
        )
    ordered = {n: ranks[n] for n in dense if n in ranks}
    return Selection(
        ordered,
        left_out(layers, ranks, small),
        {n: slices[n] for n in ordered if n in slices},
        {n: dense[n] for n in ordered},
    )


def blocks_of(model: nn.Module) -> dict[str, int]:
    """The model's blocks (a transformer's layers) by name → their number in their stack: the members of the outermost lists of
    modules of one class with dense layers inside."""
    found: dict[str, int] = {}
    for name, stack in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if isinstance(stack, nn.ModuleList) and not inside and len({plain_class(block) for block in stack}) == 1:
            dense = [any(why_not(m) is None or weights_of(m) for m in block.modules()) for block in stack]
            if all(dense):
                found |= {f"{name}.{i}" if name else str(i): i for i in range(len(stack))}
    return found


def role(name: str) -> str | None:
    """The role of a dense layer by its dotted name: q k v o up gate down, qkv or gate_up where they are fused."""
    return next((role for role, pattern in _ROLE_PATTERNS if pattern.fullmatch(name)), None)


def _dense(layers: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """All that can take an update, in the model's order."""
    found: dict[str, Layer] = {}
    for name, layer in layers.items():
        if name and why_not(layer) is None:
            found[name] = layer
        for own in weights_of(layer):
            found[f"{name}.{own}" if name else own] = Weight(layer, own)
    return found


def _multiplies(layer: Layer) -> bool:
    """Whether the layer is of the kinds that presets and roles mean: embeddings and convolutions are named."""
    if isinstance(layer, Weight):
        return True
    kind = kind_of(layer)
    return kind is not None and kind.multiplies


def _means_many(entry: str, dense: Mapping[str, Layer]) -> bool:
    """Whether the entry describes layers instead of naming them."""
    return entry not in dense and (entry == ALL or entry in PRESETS or entry in ROLES or any(c in entry for c in "*?["))


def _min(layer: Layer, slices: Mapping[str, Runs]) -> int:
    """min(d, k) of a layer, or of the smallest of these slices of it."""
    d, k = shape(layer)
    return min(k, *(sum(stop - start for start, stop in runs) for runs in slices.values() or [((0, d),)]))


def _entries(targets: Targets, rank: int) -> dict[Any, Any]:
    """Entry → rank, as they were written: `select` says what is wrong with them."""
    if isinstance(targets, Mapping):
        return dict(targets)
    words = _split(targets) if isinstance(targets, str) else list(targets)
    entries: dict[Any, Any] = {}
    for word in words:
        if not isinstance(word, str):
            entries[word] = rank
            continue
        name, equals, r = (part.strip() for part in word.partition("="))
        entries[name] = (int(r) if r.isdigit() else r) if equals else rank
    return entries


def _split(text: str) -> list[str]:
    """At commas outside brackets: 'q,c_attn[q,v]' is two entries."""
    return [w.strip() for w in re.split(r",(?![^\[]*\])", text) if w.strip()]


_Found = dict[str, dict[str, Runs]]
"""Layer name → the slices of it that are meant; none for the whole layer."""


def _match(
    entry: str, layers: dict[str, nn.Module], dense: dict[str, Layer], body: dict[str, Layer], model: nn.Module,
    dead: Mapping[str, str],
) -> _Found | str:  # fmt: skip
    """The layers that one entry means, or what is wrong with it."""
    if sliced := _SLICED.fullmatch(entry):
        whole = _match(sliced[1], layers, dense, body, model, dead)
        return whole if isinstance(whole, str) else _sliced(entry, whole, sliced[2].split(","), dense, model)
    if entry == ALL:
        return _whole(body) if body else _none(layers, dead)
    named = [n for n in dense if n == entry or n.endswith("." + entry)]
    if entry in PRESETS or entry in ROLES:
        found = _match_roles(entry, body, model)
        return _whole(named) if isinstance(found, str) and named else found
    if entry in dense:
        return _whole([entry])
    if any(c in entry for c in "*?["):
        names = [n for n in dense if not isinstance(dense[n], nn.Embedding) and fnmatch.fnmatchcase(n, entry)]
        return _whole(names) if names else f"{entry!r} matches no dense layer"
    if named:
        return _whole(named)
    aliases = [n for n, m in model.named_modules(remove_duplicate=False) if n == entry or n.endswith("." + entry)]
    shared = [n for n, m in dense.items() if any(model.get_submodule(a) is m for a in aliases)]
    return _whole(shared) if shared else _unmatched(entry, aliases, layers, dense, model)


def _whole(names: Iterable[str]) -> _Found:
    return {name: {} for name in names}


def _sliced(
    entry: str, names: Iterable[str], wanted: Sequence[str], dense: dict[str, Layer], model: nn.Module
) -> _Found | str:
    """These layers' slices of these names, or what is wrong with them."""
    found: _Found = {}
    for name in names:
        layer = dense[name]
        if isinstance(layer, Weight) and layer.value.ndim == 3:
            return f"{entry!r}: {name} has a matrix for each expert, and slices of these have no form: name all of it"
        d, _ = shape(layer)
        known = parts_of(model, name, d)
        for word in wanted:
            runs = runs_of(word, d) if ":" in word else known.get(word)
            if runs is None:
                has = f"its slices are {', '.join(known)}" if known else "how it is laid out is not known; give rows"
                return f"{entry!r}: {word!r} is no slice of {name} ({d} outputs): {has}, 0:{d} say"
            found.setdefault(name, {})[word] = runs
    return found


def _match_roles(entry: str, body: dict[str, Layer], model: nn.Module) -> _Found | str:
    """The layers of these roles, and slices of those that hold them among others."""
    wanted = PRESETS.get(entry, (entry,))
    fused = {_FUSED[role] for role in wanted if role in _FUSED} - set(wanted)
    found: _Found = {}
    unclear: dict[str, None] = {}
    for name, layer in body.items():
        own = role(name)
        if own in wanted:
            found[name] = {}
        elif own in fused:
            parts = parts_of(model, name, shape(layer)[0])
            slices = {r: parts[r] for r in wanted if r in parts}
            if slices:
                found[name] = slices
            elif not parts:
                unclear[_kind(name)] = None
    if unclear:
        return (
            f"{entry!r}: {', '.join(sorted(unclear))} holds several roles at once, and how is not known: name it to adapt the "
            f"whole layer, or rows of its output, {next(iter(unclear))}[0:64] say"
        )
    return found or f"{entry!r}: no layer of this model has that role"


def _none(layers: Mapping[str, nn.Module], dead: Mapping[str, str]) -> str:
    """Why all-linear means nothing here: of layers that look dense, what they have against it; `dead` are those that would not
    learn."""
    kinds = tuple(kind.layer_class for kind in KINDS if kind.multiplies)
    refused = [why_not(layer) for layer in layers.values() if isinstance(layer, kinds)]
    why = dict.fromkeys(filter(None, [*refused, *dead.values()]))
    return "the model has no dense layer besides its output head" + (f": {'; '.join(why)}" if why else "")


def _unmatched(
    entry: str, aliases: list[str], layers: dict[str, nn.Module], dense: dict[str, Layer], model: nn.Module
) -> str:
    if aliases:
        layer = model.get_submodule(aliases[0])
        inside = [n for n in dense if any(n.startswith(a + ".") for a in aliases)]
        if inside:
            return f"{entry!r} is a {type(layer).__name__} with {len(inside)} dense layers inside; write '*{entry}.*' for them"
        return f"{entry!r} cannot take the update: {why_not(layer)}"
    ends = {_kind(n) for n in dense} | {n.rsplit(".", 1)[-1] for n in dense}
    return f"{entry!r} matches no layer{nearest(entry, [*ends, ALL, *PRESETS, *ROLES, *dense])}"


def _too_large(dense: dict[str, Layer], ranks: dict[str, int], slices: Mapping[str, Mapping[str, Runs]]) -> list[str]:
    """One problem for each kind of layer whose rank exceeds min(d, k): a low-rank update of it would not be low."""
    problems: dict[str, str] = {}
    for name, r in ranks.items():
        d, k = shape(dense[name])
        least = _min(dense[name], slices.get(name, {}))
        if r > least:
            its = "smallest slice" if name in slices else f"{d}×{k} weight"
            problems.setdefault(_kind(name), f"{name!r}: rank {r} is larger than min(d, k) = {least} of its {its}")
    return list(problems.values())


def _head_names(layers: Mapping[str, nn.Module], dense: Mapping[str, Layer]) -> set[str]:
    """Output layers: output embeddings, in a transformers model whatever is outside its base model, and layers with the weight of
    one of these or of an embedding."""
    model = layers[""]
    inner = [m for m in layers.values() if hasattr(m, "get_output_embeddings")]
    heads = [head for m in inner if (head := _output_embeddings(m)) is not None]
    names = {n for n, layer in dense.items() if any(layer is head for head in heads)}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        names |= {n for n in dense if not n.startswith(prefix + ".")}
    ends = [m for n, m in layers.items() if n in names or isinstance(m, nn.Embedding)]
    tied = {m._parameters.get("weight") for m in ends} - {None}
    multiplying = {n: m for n, m in dense.items() if isinstance(m, nn.Module) and _multiplies(m)}
    return names | {n for n, m in multiplying.items() if m._parameters.get("weight") in tied}


def _output_embeddings(module: Any) -> Any:
    """The output layer that a model, or a model inside it, has; None where it has none or does not say."""
    try:
        return module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _unreached(layers: Mapping[str, nn.Module], dense: Mapping[str, Layer]) -> dict[str, str]:
    """Dense layers whose updates would never learn → why."""
    stopped, silent = without_gradient(layers), never_called(layers)
    dead: dict[str, str] = {}
    for name, layer in dense.items():
        module = name.removesuffix(f".{layer.own}") if isinstance(layer, Weight) else name
        if module in stopped:
            dead[name] = stopped[module]
        elif module in silent:
            weight = layer.value if isinstance(layer, Weight) else layer._parameters["weight"]
            others = [n for n, m in layers.items() if n != name and m._parameters.get("weight") is weight]
            dead[name] = "no forward calls it" + (
                f"; its weight is used by {', '.join(others)}: name these" if others else ""
            )
    return dead


def left_out(
    layers: Mapping[str, nn.Module], adapted: Collection[str], reasons: Mapping[str, str] = {}
) -> dict[str, str]:
    """Modules with a matrix weight of their own that take no update, and why; `reasons` are those that a method has."""
    why: dict[str, str] = {}
    kinds = tuple(kind.layer_class for kind in KINDS)
    inside = [f"{name}." for name, layer in layers.items() if isinstance(layer, kinds)]
    dense = _dense(layers)
    head, reasons = _head_names(layers, dense), {**_unreached(layers, dense), **reasons}
    for name, layer in layers.items():
        if name in adapted or name.startswith(tuple(inside)):  # what is inside a dense layer is that layer's own affair
            continue
        if weights := weights_of(layer):
            names = [f"{name}.{own}" if name else own for own in weights]
            why |= {n: reasons.get(n, "not among the targets") for n in names if n not in adapted}
            continue
        if isinstance(layer, kinds) or any(p.ndim >= 2 for p in layer.parameters(recurse=False)):
            if name in reasons:
                why[name] = reasons[name]
            elif name in head:
                why[name] = "output head"
            elif isinstance(layer, kinds) and not _multiplies(layer):
                why[name] = why_not(layer) or f"{type(layer).__name__}: {WHERE_NAMED}"
            else:
                why[name] = why_not(layer) or "not among the targets"
    return why


def _kind(name: str) -> str:
    """The last part of a dotted name, with the one before it where the last alone says little (attention.dense)."""
    parts = [p for p in name.split(".") if not p.isdigit()] or [name]
    return ".".join(parts[-2:]) if parts[-1] in ("dense", "c_proj", "q", "k", "v", "o", "weight") else parts[-1]
