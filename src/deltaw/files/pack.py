"""An attached LoRA adapter as what its file holds. Reads the model, changes nothing."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from deltaw import __version__
from deltaw.errors import AdapterError
from deltaw.files.formats.peft.adapter import TWICE, LoRAFile
from deltaw.files.formats.peft.config import PeftConfig
from deltaw.files.formats.peft.keys import in_file
from deltaw.files.formats.peft.metadata import BASE, FORMAT, FORMAT_KEY, SLICES, TRANSPOSED, VERSION_KEY, W0
from deltaw.files.formats.peft.ranks import config_for
from deltaw.files.identity import base_fingerprint, weights_fingerprint
from deltaw.files.other_methods import name_of_base, place_of_base
from deltaw.layers.kinds import Conv1DKind, ConvKind, EmbeddingKind, matrices_of, weights_of
from deltaw.layers.ops.merging import times
from deltaw.layers.processes.shards import full
from deltaw.layers.tree import base_modules, dotted, owner_of
from deltaw.methods.lora import LoRA
from deltaw.methods.updates.base import Update, own_tensor
from deltaw.methods.updates.dora import LowRankRescaled
from deltaw.methods.updates.lowrank import LowRank
from deltaw.methods.updates.weights import OnWeights
from deltaw.methods.updates.whole import Replaced, ReplacedRows
from deltaw.model.inputs import text_config
from deltaw.model.record import readers, record_of
from deltaw.model.summary import updates as updates_of

log = logging.getLogger("deltaw")

# What transformers 4 called the dense layers of an expert, and their router
_EXPERTS_BEFORE = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
# Ends of names of modules that PEFT trains whole of a classifier
_HEADS = ("classifier", "score")

_Weights = dict[str, tuple[str, LowRank]]
"""A weight's name in the file → the parameter's in the model, and its update."""


def as_file(model: nn.Module, name: str) -> LoRAFile:
    """Return adapter `name` in PEFT's terms.

    Raises:
        AdapterError: for a method or a mix of updates that PEFT's format has no place for.
    """
    updates, owner = updates_of(model, name), owner_of(model)
    low_rank = {n: u for n, u in updates.items() if isinstance(u, LowRank)}
    weights = _of_weights(owner, updates)
    keys = {n: _key(owner, n, weights) for n in low_rank}
    method = _checked(record_of(model).attached[name].method, updates)
    whole, modules = _whole(model, {n: u for n, u in updates.items() if isinstance(u, Replaced)})
    whole_biases, biases = _biases(owner, low_rank)
    rows = _rows(model, {n: u for n, u in updates.items() if isinstance(u, ReplacedRows)})
    magnitudes: dict[str, Tensor] = {n: u.magnitude for n, u in low_rank.items() if isinstance(u, LowRankRescaled)}
    others: dict[str, object] = {
        "use_dora": bool(magnitudes),
        "bias": "all" if whole_biases else "none",
        **({"lora_bias": True} if biases else {}),
        "modules_to_save": modules or None,
        **({"trainable_token_indices": _tokens(owner, rows)} if rows else {}),
    }
    file = LoRAFile(
        factors={keys[n]: (u.A, u.B if keys[n] == n else times(u.B, 1 / TWICE)) for n, u in low_rank.items()}
        | {n: in_file(u.A, u.B) for n, (_, u) in weights.items()},
        scales={keys[n]: u.scale for n, u in low_rank.items()} | {n: u.scale for n, (_, u) in weights.items()},
        config=_config(model, method, {keys[n]: u for n, u in low_rank.items()}, weights, others),
        embeddings=frozenset(n for n, u in low_rank.items() if isinstance(u.kind, EmbeddingKind)),
        kernels={
            n: tuple(own_tensor(owner.get_submodule(n), "weight").shape[1:])
            for n, u in low_rank.items()
            if isinstance(u.kind, ConvKind)
        },
        magnitudes=magnitudes,
        biases=biases,
        rows=rows,
        whole=whole | whole_biases,
    )
    file.metadata.update(_metadata(model, name, low_rank, keys, weights, file))
    return file


def _of_weights(owner: nn.Module, updates: Mapping[str, Update]) -> _Weights:
    """Return the updates of weights without layers under PEFT's names.

    PEFT wraps a module once for each of its parameters, the last of them outermost, and `nn.MultiheadAttention` as a whole, with
    its output projection inside.
    """
    weights: _Weights = {}
    for module_name, update in updates.items():
        if not isinstance(update, OnWeights):
            continue
        module = owner.get_submodule(module_name)
        parts = [(own_name, update.parts[own_name]) for own_name in matrices_of(module) if own_name in update.parts]
        for depth, (own_name, part) in enumerate(reversed(parts)):
            attention = isinstance(module, nn.MultiheadAttention) and own_name != "in_proj_weight"
            key = dotted(module_name, own_name) if attention else module_name + ".base_layer" * depth
            weights[key] = dotted(module_name, own_name), part
    return weights


def _key(owner: nn.Module, layer: str, weights: _Weights) -> str:
    """Return a layer's name in the file: PEFT has the output projection of an attention inside its wrapper."""
    outer, _, last = layer.rpartition(".")
    wrapped = outer in weights and isinstance(owner.get_submodule(outer), nn.MultiheadAttention)
    return f"{outer}.base_layer.{last}" if wrapped else layer


def _checked(method: object, updates: Mapping[str, Update]) -> LoRA:
    """Return the method. Raises AdapterError for another one than LoRA, and for a mix of updates without a format."""
    if not isinstance(method, LoRA):
        raise AdapterError(f"{type(method).__name__} has no file format yet.")
    others = [n for n, u in updates.items() if not isinstance(u, (LowRank, OnWeights, Replaced, ReplacedRows))]
    low_rank = [u for u in updates.values() if isinstance(u, LowRank)]
    if len({isinstance(u, LowRankRescaled) for u in low_rank}) > 1:
        others += [n for n, u in updates.items() if isinstance(u, LowRankRescaled)]
    if others:
        raise AdapterError("Not saved: PEFT's format has no such updates beside the adapter's others:", others)
    return method


def _metadata(
    model: nn.Module,
    name: str,
    low_rank: Mapping[str, LowRank],
    keys: Mapping[str, str],
    weights: _Weights,
    file: LoRAFile,
) -> dict[str, str]:
    """Return what deltaw adds to the file's header."""
    if (known := record_of(model).attached[name].metadata.get("of_base")) is not None:
        return dict(known)
    parameters = {key: f"{n}.weight" for n, key in keys.items()} | {key: n for key, (n, _) in weights.items()}
    fingerprints = {
        BASE: base_fingerprint(model, without=file.replaced()),
        W0: weights_fingerprint(model, [parameters[key] for key in sorted(parameters)]),
    }
    transposed = [n for n, u in low_rank.items() if isinstance(u.kind, Conv1DKind)]
    slices = {n: u.slices for n, u in [*low_rank.items(), *((n, u) for n, (_, u) in weights.items())] if u.slices}
    return {
        FORMAT_KEY: FORMAT,
        VERSION_KEY: __version__,
        **place_of_base(model),
        **{key: str(value) for key, value in fingerprints.items() if value is not None},
        **({TRANSPOSED: json.dumps(transposed)} if transposed else {}),
        **({SLICES: json.dumps(slices)} if slices else {}),
    }


# --- what stands beside A and B ---------------------------------------------------------------------------------


def _whole(model: nn.Module, updates: Mapping[str, Replaced]) -> tuple[dict[str, Tensor], list[str]]:
    """Return name of a parameter → its value, and the modules that PEFT keeps a copy of (modules_to_save).

    A value that all layers have whose weights the base ties is there once, by the first one's name and outside of such modules.
    PEFT then gives it to the base's own parameter, which they share.
    """
    values: dict[str, Tensor] = {
        dotted(n, own_name): value for n, u in updates.items() for own_name, value in u.named_parameters()
    }
    sharing = [names for names in readers(model).values() if len(names) > 1]
    followed = [names for names in sharing if all(n in values and values[n] is values[names[0]] for n in names)]
    once = {n for names in followed for n in names}
    alone = {n for names in sharing for n in names if n in values} - once
    whole = {n: value for n, value in values.items() if n not in {n for names in followed for n in names[1:]}}
    modules: list[str] = []
    for layer_name in updates:
        module = owner_of(model).get_submodule(layer_name)
        parameters = {dotted(layer_name, own_name) for own_name, p in module._parameters.items() if p is not None}
        if parameters & alone or not (parameters & once or parameters - values.keys()):
            modules.append(layer_name)
    outer = [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]
    for name in outer:  # a module that PEFT copies must be there with all that it has
        whole = _state(model, name) | whole
    return whole, outer


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors that the base's module `name`, and those inside it, have in a checkpoint, by names in the model."""
    state: dict[str, Tensor] = {}
    for place, module in base_modules(model):
        if place == name or place.startswith(f"{name}."):
            kept = {
                own_name: b
                for own_name, b in module._buffers.items()
                if own_name not in module._non_persistent_buffers_set
            }
            tensors = {**module._parameters, **kept}
            state |= {dotted(place, own_name): full(t.detach()) for own_name, t in tensors.items() if t is not None}
    return state


def _biases(owner: nn.Module, updates: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the biases of layers with A and B.

    The first are those of layers that have one: name in the base → its value. The second are those of layers without: layer name
    → b, of which scale·b is the bias.
    """
    whole: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, update in updates.items():
        if update.bias is not None and owner.get_submodule(name)._parameters.get("bias") is not None:
            whole[f"{name}.bias"] = update.bias
        elif update.bias is not None:
            added[name] = update.bias.detach() / update.scale
    return whole, added


def _rows(model: nn.Module, updates: Mapping[str, ReplacedRows]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer name → tokens [n] and rows [n, e].

    Of layers whose weights are tied it has the one that embeds tokens, which the others follow.
    """
    owner = owner_of(model)
    embedding = getattr(owner, "get_input_embeddings", lambda: None)() if updates else None
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    seen: set[tuple[int, int]] = set()
    for name in sorted(updates, key=lambda name: owner.get_submodule(name) is not embedding):
        update = updates[name]
        shared = id(owner.get_submodule(name)._parameters["weight"]), id(update.rows)
        if shared not in seen:
            rows[name] = (update.indices, update.rows)
        seen.add(shared)
    return rows


def _tokens(owner: nn.Module, rows: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, list[int]]:
    """Return layer name → its tokens.

    PEFT takes tied layers with the same list of tokens for one. Where each has rows of its own, the second one's list is in
    another order.

    Raises:
        AdapterError: for a list of one token, which has no other order.
    """
    tokens: dict[str, list[int]] = {}
    first: dict[tuple[int, ...], str] = {}
    for name, (indices, _) in rows.items():
        ids = [int(i) for i in indices]
        other = first.setdefault((id(owner.get_submodule(name)._parameters["weight"]), *ids), name)
        if other != name and len(ids) == 1:
            raise AdapterError(
                f"Not saved: {other} and {name} are tied and have different values for token {ids[0]}, which PEFT reads as one "
                "value for both."
            )
        tokens[name] = ids if other == name else ids[::-1]
    return tokens


# --- settings ---------------------------------------------------------------------------------------------------


def _config(
    model: nn.Module, method: LoRA, updates: Mapping[str, LowRank], weights: _Weights, others: Mapping[str, object]
) -> PeftConfig:
    """Return the settings with which PEFT makes modules for these updates, by their names in the file, and for no others."""
    base = owner_of(model)
    owners = {parameter: parameter.rpartition(".")[0] for parameter, _ in weights.values()}
    attention = {p: m for p, m in owners.items() if isinstance(base.get_submodule(m), nn.MultiheadAttention)}
    # Those of a module in its own order, by which a reader of the file tells them apart (PEFT does not mind)
    parameters = sorted((p for p in reversed(owners) if p not in attention), key=lambda p: owners[p])
    modules = {n for n in updates if ".base_layer." not in n} | {*attention.values()}
    by_weight = _taken_for_experts(model, modules) if not (others["use_dora"] or "lora_bias" in others) else set()
    if by_weight and method.dropout:
        log.warning("The file's lora_dropout is 0 instead of %g: PEFT has none for %s.", method.dropout, min(by_weight))
    # Ranks and scales by the names in the file, and by those that PEFT knows these weights by
    named = {**updates, **{n: u for n, (_, u) in weights.items()}}
    named |= {parameter: u for parameter, u in weights.values() if parameter in parameters}
    named |= {f"{n}.weight": updates[n] for n in by_weight}
    return config_for(
        {layer: u.rank for layer, u in named.items()},
        {layer: u.scale for layer, u in named.items()},
        target_modules=_target_modules(model, modules - by_weight),
        dropout=0.0 if by_weight else method.dropout,
        rank_stabilised=method.scaling == "alpha/sqrt(r)",
        transposed=bool(updates) and all(isinstance(u.kind, Conv1DKind) for u in updates.values()),
        target_parameters=[*parameters, *(f"{n}.weight" for n in sorted(by_weight))] or None,
        base=name_of_base(model),
        task=_task(base, named, others),
        **others,
    )


def _taken_for_experts(model: nn.Module, modules: set[str]) -> set[str]:
    """Return the layers that PEFT does not find by their names in target_modules.

    From 0.19 on it takes these names, in mixtures of some types, for those of transformers 4's experts. It then adapts their
    stacks instead, also where all layers of a model are dense. By their weights it finds the layers.
    """
    stacks = any(weights_of(m) for _, m in base_modules(model) if not isinstance(m, nn.MultiheadAttention))
    mixture = stacks or _names_experts(text_config(owner_of(model)))
    return {n for n in modules if n.rsplit(".", 1)[-1] in _EXPERTS_BEFORE} if mixture else set()


def _names_experts(config: object) -> bool:
    """Return whether a model of this config may have several experts."""
    fields = vars(config).items() if hasattr(config, "__dict__") else ()
    return any("experts" in name and type(value) is int and value > 1 for name, value in fields)


def _task(base: nn.Module, layers: Collection[str], others: Mapping[str, object]) -> str | None:
    """Return PEFT's name of what the model does, where its reader needs no more than that.

    For encoder-decoders it wants a method that transformers no longer has. It calls any other model with these arguments.
    """
    asked = {"input_ids", "attention_mask", "inputs_embeds", "labels"}
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not asked <= inspect.signature(base.forward).parameters.keys():
        return None
    if type(base).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS" if _has_heads_whole(base, layers, others) else None
    return "CAUSAL_LM" if getattr(base, "can_generate", lambda: False)() else None


def _has_heads_whole(base: nn.Module, layers: Collection[str], others: Mapping[str, object]) -> bool:
    """Return whether an adapter has all that PEFT takes for a classifier's head, as a whole: it refuses a file without."""
    names = [name for name, _ in base_modules(base)]
    heads = {name for name in names if name.endswith(_HEADS)}
    saved = others["modules_to_save"]
    ends = tuple(saved) if isinstance(saved, list) else ()
    whole = {name for name in names if ends and name.endswith(ends)}
    changed = {*layers, *(whole - heads)}
    within = any(name == head or name.startswith(f"{head}.") for name in changed for head in heads)
    return heads <= whole and not within and others["bias"] == "none"


def _target_modules(model: nn.Module, updates: set[str]) -> list[str]:
    """Return the shortest list that PEFT reads as exactly these layers.

    It has the last parts of their names where no other module ends so, else the full names.
    """
    ends = {name.rsplit(".", 1)[-1] for name in updates}
    matched = {name for name, _ in base_modules(model) if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends if matched == updates else updates)
