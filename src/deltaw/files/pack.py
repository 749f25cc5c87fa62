"""An attached adapter as what its file holds, of any method. Reads the model, changes nothing."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deltaw import __version__
from deltaw.config import to_mapping
from deltaw.errors import AdapterError
from deltaw.files.formats.method_file import (
    DIFFERENCES,
    PROMPT,
    REPLACED,
    MethodFile,
    as_difference,
)
from deltaw.files.formats.peft import BASE, FORMAT, SLICES, TRANSPOSED, TWICE, W0, LoRAFile
from deltaw.files.formats.peft_config import METHOD, config_for
from deltaw.files.formats.peft_keys import in_file
from deltaw.files.identity import base_fingerprint, weights_fingerprint
from deltaw.layers import tree
from deltaw.layers.kinds import Conv1DKind, ConvKind, EmbeddingKind, kind_of, matrices_of, weights_of
from deltaw.layers.ops.merging import times
from deltaw.layers.tree import dotted, owner_of
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.registry import name_of
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.dora import LowRankRescaled
from deltaw.methods.updates.ia3 import Scaled
from deltaw.methods.updates.lowrank import LowRank
from deltaw.methods.updates.prefix import Prepended
from deltaw.methods.updates.weights import OnWeights
from deltaw.methods.updates.whole import Replaced, ReplacedRows
from deltaw.methods.whole import inside
from deltaw.model import record, summary
from deltaw.model.merging.kept import base_tensors
from deltaw.model.record import readers

log = logging.getLogger("deltaw")

# What transformers 4 called the dense layers of an expert, and their router
_EXPERTS_BEFORE = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}


def as_file(model: nn.Module, name: str) -> LoRAFile:
    """Adapter `name` in PEFT's terms. Raises AdapterError for a method or a mix of updates that has none."""
    updates, owner = summary.updates(model, name), owner_of(model)
    low_rank = {n: u for n, u in updates.items() if isinstance(u, LowRank)}
    weights = _of_weights(owner, updates)
    keys = {n: _key(owner, n, weights) for n in low_rank}
    method = record.record_of(model).attached[name].method
    _check(method, updates)
    assert isinstance(method, LoRA)
    whole, modules = _whole(model, {n: u for n, u in updates.items() if isinstance(u, Replaced)})
    whole_biases, biases = _biases(owner, low_rank)
    rows = _rows(model, {n: u for n, u in updates.items() if isinstance(u, ReplacedRows)})
    magnitudes: dict[str, Tensor] = {n: u.magnitude for n, u in low_rank.items() if isinstance(u, LowRankRescaled)}
    others = {
        "use_dora": bool(magnitudes),
        "bias": "all" if whole_biases else "none",
        **({"lora_bias": True} if biases else {}),
        "modules_to_save": modules or None,
        **({"trainable_token_indices": _tokens(owner, rows)} if rows else {}),
    }
    made = LoRAFile(
        factors={keys[n]: (u.A, u.B if keys[n] == n else times(u.B, 1 / TWICE)) for n, u in low_rank.items()}
        | {n: in_file(u.A, u.B) for n, (_, u) in weights.items()},
        scales={keys[n]: u.scale for n, u in low_rank.items()} | {n: u.scale for n, (_, u) in weights.items()},
        config=_config(model, method, {keys[n]: u for n, u in low_rank.items()}, weights, others),
        embeddings=frozenset(n for n, u in low_rank.items() if isinstance(u.kind, EmbeddingKind)),
        kernels={n: _kernel(owner, n) for n, u in low_rank.items() if isinstance(u.kind, ConvKind)},
        magnitudes=magnitudes,
        biases=biases,
        rows=rows,
        whole=whole | whole_biases,
    )
    made.metadata.update(_metadata(model, low_rank, keys, weights, made))
    return made


_Weights = dict[str, tuple[str, LowRank]]
"""A layer's name in the file → the parameter's in the model, and its update."""


def _of_weights(owner: nn.Module, updates: dict[str, Update]) -> _Weights:
    """The updates of weights without layers under PEFT's names. It wraps a module once for each of its parameters, the last of
    them outermost, and `nn.MultiheadAttention` as a whole, with its output projection inside."""
    found: _Weights = {}
    for module_name, update in updates.items():
        if not isinstance(update, OnWeights):
            continue
        module = owner.get_submodule(module_name)
        parts = [(own, update.parts[own]) for own in matrices_of(module) if own in update.parts]
        for depth, (own, part) in enumerate(reversed(parts)):
            attention = isinstance(module, nn.MultiheadAttention) and own != "in_proj_weight"
            key = dotted(module_name, own) if attention else module_name + ".base_layer" * depth
            found[key] = dotted(module_name, own), part
    return found


def _key(owner: nn.Module, layer: str, weights: _Weights) -> str:
    """A layer's name in the file: PEFT has the output projection of an attention inside its wrapper."""
    outer, _, own = layer.rpartition(".")
    wrapped = outer in weights and isinstance(owner.get_submodule(outer), nn.MultiheadAttention)
    return f"{outer}.base_layer.{own}" if wrapped else layer


def _kernel(owner: Any, layer: str) -> tuple[int, ...]:
    return tuple(owner.get_submodule(layer).weight.shape[1:])


def _check(method: Any, updates: dict[str, Update]) -> None:
    if not isinstance(method, LoRA):
        raise AdapterError(f"{type(method).__name__} has no file format yet.")
    others = [n for n, u in updates.items() if not isinstance(u, (LowRank, OnWeights, Replaced, ReplacedRows))]
    low_rank = [u for u in updates.values() if isinstance(u, LowRank)]
    if len({isinstance(u, LowRankRescaled) for u in low_rank}) > 1:
        others += [n for n, u in updates.items() if isinstance(u, LowRankRescaled)]
    if others:
        raise AdapterError("Not saved: PEFT's format has no such updates beside the adapter's others:", others)


def _metadata(
    model: nn.Module, low_rank: dict[str, LowRank], keys: dict[str, str], weights: _Weights, file: LoRAFile
) -> dict[str, str]:
    made = {
        "deltaw_format": FORMAT,
        "deltaw_version": __version__,
    }
    in_file = {key: f"{n}.weight" for n, key in keys.items()} | {key: n for key, (n, _) in weights.items()}
    fingerprints = {
        BASE: base_fingerprint(model, without=file.replaced()),
        W0: weights_fingerprint(model, [in_file[key] for key in sorted(in_file)]),
    }
    made |= {key: str(value) for key, value in fingerprints.items() if value is not None}
    transposed = [n for n, u in low_rank.items() if isinstance(u.kind, Conv1DKind)]
    every = low_rank | {n: u for n, (_, u) in weights.items()}
    slices = {n: u.slices for n, u in every.items() if u.slices}
    made |= {TRANSPOSED: json.dumps(transposed)} if transposed else {}
    return made | ({SLICES: json.dumps(slices)} if slices else {})


def _whole(model: nn.Module, updates: dict[str, Replaced]) -> tuple[dict[str, Tensor], list[str]]:
    """Name of a parameter → its value; and the modules that PEFT keeps a copy of (modules_to_save). A value that all layers have
    whose weights the base ties is there once, by the first one's name and outside of such modules: PEFT then gives it to the
    base's own parameter, which they share."""
    given: dict[str, Tensor] = {
        dotted(n, own): value for n, u in updates.items() for own, value in u.named_parameters()
    }
    sharing = [names for names in readers(model).values() if len(names) > 1]
    followed = [names for names in sharing if all(n in given and given[n] is given[names[0]] for n in names)]
    once = {n for names in followed for n in names}
    alone = {n for names in sharing for n in names if n in given} - once
    whole = {n: value for n, value in given.items() if n not in {n for names in followed for n in names[1:]}}
    modules: list[str] = []
    for layer_name in updates:
        module = owner_of(model).get_submodule(layer_name)
        own = {dotted(layer_name, k) for k, p in module._parameters.items() if p is not None}
        if own & alone or not (own & once or own - given.keys()):
            modules.append(layer_name)
    outer = [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]
    for name in outer:  # a module that PEFT copies must be there with all that it has
        whole = _state(model, name) | whole
    return whole, outer


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors that the base's module `name`, and those inside it, have in a checkpoint, by names in the model."""
    found: dict[str, Tensor] = {}
    for place, module in tree.base_modules(model):
        if place == name or place.startswith(f"{name}."):
            kept = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
            tensors = {**module._parameters, **kept}
            found |= {dotted(place, k): t.detach() for k, t in tensors.items() if t is not None}
    return found


def _biases(owner: nn.Module, updates: dict[str, LowRank]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Biases of layers with A and B: name in the base → its value; and of layers that have none, layer name → b, of which
    scale·b is the bias."""
    whole: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, update in updates.items():
        if update.bias is not None and owner.get_submodule(name)._parameters.get("bias") is not None:
            whole[f"{name}.bias"] = update.bias
        elif update.bias is not None:
            added[name] = update.bias.detach() / update.scale
    return whole, added


def _rows(model: nn.Module, updates: dict[str, ReplacedRows]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name → tokens and rows; of layers whose weights are tied, of the one that embeds tokens, which the others follow."""
    owner = owner_of(model)
    embedding = owner.get_input_embeddings() if updates else None  # type: ignore[operator]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    seen: set[tuple[int, int]] = set()
    for name in sorted(updates, key=lambda name: owner.get_submodule(name) is not embedding):
        update = updates[name]
        shared = id(owner.get_submodule(name)._parameters["weight"]), id(update.rows)
        if shared not in seen:
            found[name] = (update.indices, update.rows)
        seen.add(shared)
    return found


def _tokens(owner: nn.Module, rows: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, list[int]]:
    """Layer name → its tokens. PEFT takes tied layers with the same list of tokens for one: where each has rows of its own, the
    second one's list is in another order. Raises AdapterError for a list of one token, which has no other order."""
    found: dict[str, list[int]] = {}
    first: dict[tuple[int, ...], str] = {}
    for name, (indices, _) in rows.items():
        ids: list[int] = indices.tolist()
        other = first.setdefault((id(owner.get_submodule(name)._parameters["weight"]), *ids), name)
        if other != name and len(ids) == 1:
            raise AdapterError(
                f"Not saved: {other} and {name} are tied and have different values for token {ids[0]}, which PEFT reads as one "
                "value for both."
            )
        found[name] = ids if other == name else ids[::-1]
    return found


def _config(
    model: nn.Module, method: LoRA, updates: dict[str, LowRank], weights: _Weights, others: dict[str, Any]
) -> dict[str, Any]:
    base = owner_of(model)
    every = updates | {n: u for n, (_, u) in weights.items()}
    owners = {parameter: parameter.rpartition(".")[0] for parameter, _ in weights.values()}
    attention = {p: m for p, m in owners.items() if isinstance(base.get_submodule(m), nn.MultiheadAttention)}
    # Those of a module in its own order, by which a reader of the file tells them apart (PEFT does not mind)
    parameters = sorted((p for p in reversed(owners) if p not in attention), key=lambda p: owners[p])
    modules = {n for n in updates if ".base_layer." not in n} | {*attention.values()}
    by_weight = _taken_for_experts(model, modules) if not (others["use_dora"] or "lora_bias" in others) else set()
    if by_weight and method.dropout:
        log.warning("The file's lora_dropout is 0 instead of %g: PEFT has none for %s.", method.dropout, min(by_weight))
    # Ranks and scales by the names in the file, and by those that PEFT knows these weights by
    named = every | {parameter: u for parameter, u in weights.values() if parameter in parameters}
    named |= {f"{n}.weight": updates[n] for n in by_weight}
    return config_for(
        {layer: u.rank for layer, u in named.items()},
        {layer: u.scale for layer, u in named.items()},
        target_modules=_target_modules(model, modules - by_weight),
        dropout=0.0 if by_weight else method.dropout,
        rank_stabilised=method.scaling == "alpha/sqrt(r)",
        transposed=bool(updates) and all(isinstance(u.kind, Conv1DKind) for u in updates.values()),
        target_parameters=[*parameters, *(f"{n}.weight" for n in sorted(by_weight))] or None,
        base=getattr(getattr(base, "config", None), "_name_or_path", None) or None,
        task=_task(base),
        **others,
    )


def _taken_for_experts(model: nn.Module, modules: set[str]) -> set[str]:
    """The layers that PEFT does not find by their names in target_modules. From 0.19 on it takes these names, in mixtures of some
    types, for those of transformers 4's experts, whose stacks it then adapts instead, also where all layers of a model are
    dense. By their weights it finds them."""
    stacks = any(weights_of(m) for _, m in tree.base_modules(model) if not isinstance(m, nn.MultiheadAttention))
    mixture = stacks or _names_experts(getattr(owner_of(model), "config", None))
    return {n for n in modules if n.rsplit(".", 1)[-1] in _EXPERTS_BEFORE} if mixture else set()


def _names_experts(config: Any) -> bool:
    """Whether a model of this config's type may have several experts."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    fields = vars(config).items() if hasattr(config, "__dict__") else ()
    return any("experts" in name and type(value) is int and value > 1 for name, value in fields)


def _task(base: Any) -> str | None:
    """PEFT's name of what the model does, where its reader needs no more than that: for classifiers it would want a head, for
    encoder-decoders a method that transformers no longer has, and it calls any causal model with these arguments."""
    if not getattr(base, "can_generate", lambda: False)() or getattr(base.config, "is_encoder_decoder", False):
        return None
    asked = {"input_ids", "attention_mask", "inputs_embeds", "labels"}
    return "CAUSAL_LM" if asked <= inspect.signature(base.forward).parameters.keys() else None


def _target_modules(model: nn.Module, updates: set[str]) -> list[str]:
    """The shortest list that PEFT reads as exactly these layers: the last parts of their names where no other module
    ends so, else the full names."""
    ends = {name.rsplit(".", 1)[-1] for name in updates}
    matched = {name for name, _ in tree.base_modules(model) if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends if matched == updates else updates)


def as_method_file(model: nn.Module, name: str) -> MethodFile:
    """Adapter `name` as a file: PEFT's, where PEFT has one for all that it trains. Raises AdapterError for a method that is not
    one of deltaw's."""
    method = record.record_of(model).attached[name].method
    known = name_of(method)
    if known is None:
        raise AdapterError(f"{type(method).__name__} has no file format: it is none of deltaw's methods.")
    updates = summary.updates(model, name)
    tensors = tensors_in(updates)
    differences = _as_differences(model, tensors, method) if isinstance(method, Full) else set()
    replaced = _replaced(updates) - _all_names(model, differences)
    metadata = {
        "deltaw_format": FORMAT,
        "deltaw_version": __version__,
        REPLACED: json.dumps(sorted(replaced)),
        DIFFERENCES: json.dumps(sorted(differences)),
    }
    if (base_is := base_fingerprint(model, without=replaced)) is not None:
        metadata[BASE] = str(base_is)
    file = MethodFile(known, to_mapping(method), tensors, {}, metadata)
    base = getattr(getattr(owner_of(model), "config", None), "_name_or_path", None) or None
    made = _as_ia3(model, file, updates, base) or _as_prompt(model, file, updates, base)
    return made or _with(file, {METHOD: known, "settings": file.settings, "base_model_name_or_path": base})


def _with(file: MethodFile, config: dict[str, Any], **others: Any) -> MethodFile:
    return MethodFile(**{**vars(file), "config": config, **others})


def _replaced(updates: Mapping[str, Update]) -> set[str]:
    """The base's parameters that the adapter has values for."""
    return {dotted(n, own) for n, u in updates.items() for own in u.replaced()}


def tensors_in(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Dotted name → parameter, one that updates share by its first name."""
    seen: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for name, update in updates.items():
        for own, parameter in update.named_parameters():
            if seen.setdefault(id(parameter), dotted(name, own)) == dotted(name, own):
                found[dotted(name, own)] = parameter
    return found


def _as_differences(model: nn.Module, tensors: dict[str, Tensor], method: Full) -> set[str]:
    """Puts differences from the base into the place of tensors, except of the modules that are kept whole; their names."""
    if method.kept != "difference":
        return set()
    whole = inside(dict(tree.base_modules(model)), method.whole)
    pairs = [pair for pair in with_base(model, tensors) if pair[0].rpartition(".")[0] not in whole]
    for name, W, before in pairs:
        tensors |= as_difference(name, W.detach(), before)
    return {name for name, _, _ in pairs}


def with_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, tensor, the base's under any of whose names it is)."""
    names = readers(model)
    base = {n: tensor.detach() for _, parameter, tensor in base_tensors(model) for n in names[parameter]}
    return ((name, tensor, base[name]) for name, tensor in tensors.items() if name in base)


def _all_names(model: nn.Module, some: Iterable[str]) -> set[str]:
    """The names of the base's parameters of which these are one each."""
    wanted = set(some)
    return {n for names in readers(model).values() if wanted.intersection(names) for n in names}


# --- PEFT's forms -----------------------------------------------------------------------------------------------


def _as_ia3(model: nn.Module, file: MethodFile, updates: Mapping[str, Update], base: str | None) -> MethodFile | None:
    """As PEFT has (IA)³: whole modules beside it, which share nothing."""
    scaled = {n: u for n, u in updates.items() if isinstance(u, Scaled)}
    others = {n: u for n, u in updates.items() if n not in scaled}
    owner = owner_of(model)
    tied = {n for names in readers(model).values() if len(names) > 1 for n in names}
    if not scaled or not all(u.covers(owner.get_submodule(n)) for n, u in others.items()) or tied & _replaced(others):
        return None
    inputs = frozenset(n for n, u in scaled.items() if u.inputs)
    kinds = [kind_of(owner.get_submodule(n)) for n in scaled]
    turned = bool(kinds) and all(isinstance(kind, Conv1DKind) for kind in kinds)
    config = {
        "peft_type": "IA3", "task_type": None, "base_model_name_or_path": base, "target_modules": sorted(scaled),
        "feedforward_modules": sorted(inputs), "fan_in_fan_out": turned, "modules_to_save": sorted(others) or None,
        "init_ia3_weights": True, "inference_mode": True,
    }  # fmt: skip
    tensors = {f"{n}.l": u.whole(owner.get_submodule(n)) for n, u in scaled.items()}
    return _with(file, config, tensors=file.tensors | tensors, inputs=inputs)


def _as_prompt(model: Any, file: MethodFile, updates: Mapping[str, Update], base: str | None) -> MethodFile | None:
    """As PEFT has prompt tuning of a decoder: the prompt, and nothing else."""
    (update,), owner = (*updates.values(),) if len(updates) == 1 else (None,), owner_of(model)
    config = getattr(owner, "config", None)
    generates = getattr(owner, "can_generate", lambda: False)() and not getattr(config, "is_encoder_decoder", False)
    if not isinstance(update, Prepended) or not generates:
        return None
    length, d = update.rows.shape
    made = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "num_virtual_tokens": length,
        "token_dim": d, "num_transformer_submodules": 1, "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None), "prompt_tuning_init": "RANDOM", "inference_mode": True,
    }  # fmt: skip
    return _with(file, made, tensors={PROMPT: update.rows})
