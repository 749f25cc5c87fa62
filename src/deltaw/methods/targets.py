"""Selection of layers by a `targets` value. Reads the model, changes nothing.

A targets value is a preset ("all-linear", "qv", "attention", "mlp"), a role (q k v o up gate down), a layer's dotted
name or the end of one ("q_proj"), or a glob ("*.layers.[0-3].*"). Several stand with commas or in a list. In a mapping of those
to ranks a later entry overrides an earlier one. In brackets after one of these stand slices of a fused layer, by their roles or
as rows of its output: "c_attn[q,v]", "qkv[0:64,128:192]". A role that a model fuses with others means its slice.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from deltaw.errors import TargetError, nearest
from deltaw.layers.kinds import KINDS, Runs, Weight, kind_of, shape, weights_of, why_not
from deltaw.layers.slices import overlapping, parts_of, runs_of
from deltaw.layers.source import never_called, without_gradient
from deltaw.layers.tree import dotted
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
"""End of the reason why a layer is left out that presets and roles do not mean."""
# Names of roles, or rows from:to, several with +
_SLICED = re.compile(r"(.+)\[((?:[a-z_]+|\d+:\d+(?:\+\d+:\d+)*)(?:,(?:[a-z_]+|\d+:\d+(?:\+\d+:\d+)*))*)\]")
# Role → the role of a layer that has it among others
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "up": "gate_up", "gate": "gate_up"}

Layer = nn.Module | Weight
"""A dense layer, or a dense weight of a module."""


@dataclass(frozen=True)
class Selection:
    """The layers that a targets value means."""

    ranks: dict[str, int]
    """Layer name → rank, in the model's order."""
    left_out: dict[str, str]
    """Name of a dense weight that is not targeted → why."""
    slices: dict[str, dict[str, Runs]]
    """Layer name → its targeted slices, where it is not targeted whole; each has the layer's rank."""
    layers: dict[str, Layer]
    """Layer name → the layer."""


@dataclass(frozen=True)
class _Model:
    """A model's layers by name, in its order."""

    model: nn.Module
    layers: dict[str, nn.Module]
    """All modules."""
    dense: dict[str, Layer]
    """Layers and weights that can take an update."""
    body: dict[str, Layer]
    """Layers and weights that presets and roles choose from."""
    dead: dict[str, str]
    """Name of a dense layer whose update would never learn → why."""


def select(model: nn.Module, targets: Targets, rank: int, *, without: Collection[str] = ()) -> Selection:
    """Return the layers of `model` that `targets` means, each with its rank (`rank` where `targets` has none for it).

    A preset, role or glob that means several layers leaves out some: those in `without`, which are trained otherwise, and those
    whose min(d, k) is below the rank, such as a router of few experts.

    Raises TargetError with every problem: an entry that matches nothing (with the nearest names), a layer that is not dense or
    that no training reaches, a rank below 1 or above min(d, k).
    """
    of = _layers_of(model)
    entries = _entries(targets, rank)
    ranks: dict[str, int] = {}
    slices: dict[str, dict[str, Runs]] = {}
    skipped: dict[str, str] = {}
    problems: list[str] = [] if entries else ["targets is empty"]
    for entry, r in entries.items():
        if not isinstance(entry, str):
            problems.append(f"{entry!r} is no name, role, glob or preset")
            continue
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            problems.append(f"{entry!r}: rank is {r!r}; it must be a whole number of at least 1")
            continue
        try:
            meant = _match(entry, of)
        except TargetError as error:
            problems += error.problems
            continue
        if _describes(entry, of.dense):
            unfit = _unfit(meant, r, without, of)
            if len(unfit) < len(meant):
                skipped |= unfit
                meant = {n: parts for n, parts in meant.items() if n not in unfit}
        problems += dict.fromkeys(f"{entry!r}: {_kind(n)} cannot learn: {of.dead[n]}" for n in meant if n in of.dead)
        problems += _add(entry, r, meant, ranks, slices)
    problems += [f"{n}: its slices {', '.join(s)} overlap" for n, s in slices.items() if overlapping([*s.values()])]
    problems += _too_large(of.dense, ranks, slices)
    if problems:
        known = ", ".join(sorted({_kind(n) for n in of.body})) or "none"
        raise TargetError(
            "These targets do not fit the model:",
            problems,
            f"Its dense layers are: {known}. Presets: {ALL}, {', '.join(PRESETS)}; roles: q k v o up gate down.",
        )
    ordered = {n: ranks[n] for n in of.dense if n in ranks}
    return Selection(
        ordered,
        left_out(of.layers, ranks, skipped),
        {n: slices[n] for n in ordered if n in slices},
        {n: of.dense[n] for n in ordered},
    )


def _layers_of(model: nn.Module) -> _Model:
    layers = dict(model.named_modules())
    dense = _dense(layers)
    head, dead = _head_names(layers, dense), _unreached(layers, dense)
    body = {n: layer for n, layer in dense.items() if n not in head and n not in dead and _multiplies(layer)}
    return _Model(model, layers, dense, body, dead)


def _unfit(meant: _Meant, rank: int, without: Collection[str], of: _Model) -> dict[str, str]:
    """Return the layers that an entry leaves out if it means others as well → why."""
    unfit = {
        n: f"rank {rank} is larger than min(d, k) = {_min(of.dense[n], slices)}"
        for n, slices in meant.items()
        if rank > _min(of.dense[n], slices)
    }
    unfit |= {n: "trained otherwise" for n in meant if n in without}
    return unfit | {n: of.dead[n] for n in meant if n in of.dead}


def _add(
    entry: str, rank: int, meant: _Meant, ranks: dict[str, int], slices: dict[str, dict[str, Runs]]
) -> Iterator[str]:
    """Add an entry's layers to `ranks` and `slices`, in which a later entry overrides; yield what is wrong with them."""
    for name, parts in meant.items():
        if parts and name in slices and ranks[name] != rank:
            yield f"{entry!r}: slices of one layer have one rank, others of {name} have {ranks[name]}"
        elif parts:
            slices[name] = {**slices.get(name, {}), **parts}
        else:
            slices.pop(name, None)
        ranks[name] = rank


def blocks_of(model: nn.Module) -> dict[str, int]:
    """Return the model's blocks (a transformer's layers): name → number in their stack.

    They are the members of the outermost lists of modules of one class with dense layers inside.
    """
    blocks: dict[str, int] = {}
    for name, stack in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(stack, nn.ModuleList) and not inside and len({plain_class(block) for block in stack}) == 1:
            dense = [any(why_not(m) is None or weights_of(m) for m in block.modules()) for block in stack]
            if all(dense):
                blocks |= {dotted(name, str(i)): i for i in range(len(stack))}
    return blocks


def role(name: str) -> str | None:
    """Return the role of a dense layer of this dotted name: q k v o up gate down, qkv or gate_up where they are fused."""
    return next((role for role, pattern in _ROLE_PATTERNS if pattern.fullmatch(name)), None)


def _dense(layers: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Return all layers and weights that can take an update, by name in the model's order."""
    dense: dict[str, Layer] = {}
    for name, layer in layers.items():
        if name and why_not(layer) is None:
            dense[name] = layer
        dense |= {dotted(name, weight): Weight(layer, weight) for weight in weights_of(layer)}
    return dense


def _multiplies(layer: Layer) -> bool:
    """Return whether presets and roles may mean the layer: embeddings and convolutions have to be named."""
    if isinstance(layer, Weight):
        return True
    kind = kind_of(layer)
    return kind is not None and kind.multiplies


def _describes(entry: str, dense: Mapping[str, Layer]) -> bool:
    """Return whether the entry describes layers instead of naming them."""
    return entry not in dense and (entry == ALL or entry in PRESETS or entry in ROLES or any(c in entry for c in "*?["))


def _min(layer: Layer, slices: Mapping[str, Runs]) -> int:
    """Return min(d, k) of a layer, or of the smallest of these slices of it."""
    d, k = shape(layer)
    return min(k, *(sum(stop - start for start, stop in runs) for runs in slices.values() or [((0, d),)]))


def _entries(targets: Targets, rank: int) -> dict[object, object]:
    """Return entry → rank, as they were written: `select` says what is wrong with them."""
    entries: dict[object, object] = {}
    if isinstance(targets, Mapping):
        entries.update(targets)
        return entries
    for word in _split(targets) if isinstance(targets, str) else targets:
        if not isinstance(word, str):
            entries[word] = rank
            continue
        name, equals, r = (part.strip() for part in word.partition("="))
        entries[name] = (int(r) if r.isdigit() else r) if equals else rank
    return entries


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets: 'q,c_attn[q,v]' is two entries."""
    return [w.strip() for w in re.split(r",(?![^\[]*\])", text) if w.strip()]


_Meant = dict[str, dict[str, Runs]]
"""Layer name → its slices that an entry means; empty for the whole layer."""


def _match(entry: str, of: _Model) -> _Meant:
    """Return the layers that one entry means. Raises TargetError with what is wrong with it."""
    if sliced := _SLICED.fullmatch(entry):
        return _sliced(entry, _match(sliced[1], of), sliced[2].split(","), of)
    if entry == ALL:
        if not of.body:
            raise TargetError(_why_none(of))
        return _whole(of.body)
    named = [n for n in of.dense if n == entry or n.endswith("." + entry)]
    if entry in PRESETS or entry in ROLES:
        try:
            return _match_roles(entry, of)
        except TargetError:
            if not named:
                raise
            return _whole(named)
    if entry in of.dense:
        return _whole([entry])
    if any(c in entry for c in "*?["):
        names = [n for n, m in of.dense.items() if not isinstance(m, nn.Embedding) and fnmatch.fnmatchcase(n, entry)]
        if not names:
            raise TargetError(f"{entry!r} matches no dense layer")
        return _whole(names)
    if named:
        return _whole(named)
    modules = of.model.named_modules(remove_duplicate=False)
    aliases = [n for n, _ in modules if n == entry or n.endswith("." + entry)]
    shared = [n for n, m in of.dense.items() if any(of.model.get_submodule(a) is m for a in aliases)]
    if not shared:
        raise TargetError(_why_unmatched(entry, aliases, of))
    return _whole(shared)


def _whole(names: Iterable[str]) -> _Meant:
    return {name: {} for name in names}


def _sliced(entry: str, names: Iterable[str], wanted: Sequence[str], of: _Model) -> _Meant:
    """Return these slices of these layers. Raises TargetError where a layer has no such slice."""
    meant: _Meant = {}
    for name in names:
        layer = of.dense[name]
        if isinstance(layer, Weight) and layer.value.ndim == 3:
            raise TargetError(
                f"{entry!r}: {name} has a matrix for each expert, and slices of these have no form: name all of it"
            )
        d, _ = shape(layer)
        known = parts_of(of.model, name, d)
        for word in wanted:
            runs = runs_of(word, d) if ":" in word else known.get(word)
            if runs is None:
                has = f"its slices are {', '.join(known)}" if known else "how it is laid out is not known; give rows"
                raise TargetError(f"{entry!r}: {word!r} is no slice of {name} ({d} outputs): {has}, for example 0:{d}")
            meant.setdefault(name, {})[word] = runs
    return meant


def _match_roles(entry: str, of: _Model) -> _Meant:
    """Return the layers of a preset's or entry's roles, and slices of layers that hold them among others.

    Raises TargetError where there is none, and for a layer of which it is not known where it holds them.
    """
    wanted = PRESETS.get(entry, (entry,))
    fused = {_FUSED[role] for role in wanted if role in _FUSED} - set(wanted)
    meant: _Meant = {}
    unclear: dict[str, None] = {}
    for name, layer in of.body.items():
        its_role = role(name)
        if its_role in wanted:
            meant[name] = {}
        elif its_role in fused:
            parts = parts_of(of.model, name, shape(layer)[0])
            slices = {r: parts[r] for r in wanted if r in parts}
            if slices:
                meant[name] = slices
            elif not parts:
                unclear[_kind(name)] = None
    if unclear:
        raise TargetError(
            f"{entry!r}: {', '.join(sorted(unclear))} holds several roles at once, and how is not known: name it to adapt the "
            f"whole layer, or rows of its output, for example {next(iter(unclear))}[0:64]"
        )
    if not meant:
        raise TargetError(f"{entry!r}: no layer of this model has that role")
    return meant


def _why_none(of: _Model) -> str:
    """Return why all-linear means nothing here, with the reasons of layers that look dense."""
    kinds = tuple(kind.layer_class for kind in KINDS if kind.multiplies)
    refused = [why_not(layer) for layer in of.layers.values() if isinstance(layer, kinds)]
    why = dict.fromkeys(filter(None, [*refused, *of.dead.values()]))
    return "the model has no dense layer besides its output head" + (f": {'; '.join(why)}" if why else "")


def _why_unmatched(entry: str, aliases: Sequence[str], of: _Model) -> str:
    """Return why an entry means no layer; `aliases` are the modules of its name, none of which is dense."""
    if aliases:
        layer = of.model.get_submodule(aliases[0])
        inside = [n for n in of.dense if any(n.startswith(a + ".") for a in aliases)]
        if inside:
            return f"{entry!r} is a {type(layer).__name__} with {len(inside)} dense layers inside; write '*{entry}.*' for them"
        return f"{entry!r} cannot take the update: {why_not(layer)}"
    ends = {_kind(n) for n in of.dense} | {n.rsplit(".", 1)[-1] for n in of.dense}
    return f"{entry!r} matches no layer{nearest(entry, [*ends, ALL, *PRESETS, *ROLES, *of.dense])}"


def _too_large(dense: dict[str, Layer], ranks: dict[str, int], slices: Mapping[str, Mapping[str, Runs]]) -> list[str]:
    """Return one problem for each kind of layer whose rank exceeds min(d, k), where the update would not be low-rank."""
    problems: dict[str, str] = {}
    for name, r in ranks.items():
        d, k = shape(dense[name])
        least = _min(dense[name], slices.get(name, {}))
        if r > least:
            its = "smallest slice" if name in slices else f"{d}×{k} weight"
            problems.setdefault(_kind(name), f"{name!r}: rank {r} is larger than min(d, k) = {least} of its {its}")
    return list(problems.values())


def _head_names(layers: Mapping[str, nn.Module], dense: Mapping[str, Layer]) -> set[str]:
    """Return the names of output layers.

    They are output embeddings, in a transformers model all that is outside of its base model, and layers that share the weight
    of one of these or of an embedding.
    """
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


def _output_embeddings(module: nn.Module) -> object:
    """Return the output layer that a transformers model names; None where it names none."""
    try:
        return getattr(module, "get_output_embeddings")()  # noqa: B009  (which nn.Module does not have)
    except (AttributeError, NotImplementedError):
        return None


def _unreached(layers: Mapping[str, nn.Module], dense: Mapping[str, Layer]) -> dict[str, str]:
    """Return the names of dense layers whose updates would never learn → why."""
    stopped, silent = without_gradient(layers), never_called(layers)
    dead: dict[str, str] = {}
    for name, layer in dense.items():
        module = name.removesuffix(f".{layer.name}") if isinstance(layer, Weight) else name
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
    """Return the names of modules with a matrix weight that take no update → why; `reasons` are those that a method has."""
    why: dict[str, str] = {}
    kinds = tuple(kind.layer_class for kind in KINDS)
    inside = [f"{name}." for name, layer in layers.items() if isinstance(layer, kinds)]
    dense = _dense(layers)
    head, reasons = _head_names(layers, dense), {**_unreached(layers, dense), **reasons}
    for name, layer in layers.items():
        if name in adapted or name.startswith(tuple(inside)):  # a dense layer computes with what is inside of it
            continue
        if weights := weights_of(layer):
            names = [dotted(name, weight) for weight in weights]
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
    """Return the last part of a dotted name, with the one before it where the last alone says little (attention.dense)."""
    parts = [p for p in name.split(".") if not p.isdigit()] or [name]
    return ".".join(parts[-2:]) if parts[-1] in ("dense", "c_proj", "q", "k", "v", "o", "weight") else parts[-1]
