"""An adapter's file, of any method, as updates of one model, where it fits. Reads the model, changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.config import from_mapping
from deltaw.errors import DeltaWError, FileError, nearest
from deltaw.files.formats.method_file import (
    PROMPT,
    MethodFile,
    from_difference,
    is_beside,
    problems_with,
)
from deltaw.files.formats.peft import TWICE, LoRAFile, by_inputs, is_ours, names_in_peft, slices_of
from deltaw.files.formats.peft_config import rank_of, saved_module, tokens_of
from deltaw.files.formats.peft_keys import transposed_in_file, unstacked
from deltaw.files.formats.peft_targets import is_all_linear, parameters_anywhere
from deltaw.files.pack import tensors_in, with_base
from deltaw.layers.kinds import (
    PARAMETER,
    Conv1DKind,
    ConvKind,
    EmbeddingKind,
    Kind,
    Runs,
    Weight,
    as_matrix,
    kind_of,
    matrices_of,
    weights_of,
    why_not,
)
from deltaw.layers.names import in_order, shown
from deltaw.layers.ops.merging import merge_, times, wide
from deltaw.layers.source import only_read
from deltaw.layers.tree import base_modules, dotted, owner_of
from deltaw.methods.registry import method_class
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.dora import LowRankRescaled
from deltaw.methods.updates.ia3 import Scaled
from deltaw.methods.updates.lowrank import LowRank, Sliced, sliced_rows
from deltaw.methods.updates.prefix import Prepended
from deltaw.methods.updates.weights import Stack, put_on_weight
from deltaw.methods.updates.whole import Replaced, ReplacedRows
from deltaw.model.record import readers

log = logging.getLogger("deltaw")


def fitted(
    model: nn.Module, layers: Mapping[str, nn.Module], file: LoRAFile, path: Path, *, device: torch.device | None = None
) -> dict[str, Update]:
    """The file's updates for the model's `layers`, in their order, on `device` (default: the layers'). A and B stay in the file's
    dtype, what is trained whole gets the base's. Raises FileError with everything that does not fit."""
    fitting = _Fitting(model, layers, file, device)
    fitting.low_rank()
    fitting.whole()
    fitting.rows()
    problems = fitting.problems
    if not problems and not fitting.updates:
        problems += [
            f"{name!r}: PEFT does not compute with its update, for the module around it only reads its weight"
            for name in fitting.unread
        ]
    for name, update in fitting.updates.items():
        layer = fitting.layers[name]  # which a low-rank update's kind was found for
        if why := update.other_shape(layer):
            problems.append(f"{name!r}: {why}")
    if problems:
        raise FileError(f"The adapter in {path} does not fit this model; nothing was changed:", problems)
    return {n: fitting.updates[n] for n in fitting.layers if n in fitting.updates}


def vocabulary(model: Any, file: LoRAFile) -> int:
    """How many tokens the model must have for what the adapter has of its embedding and head: more or fewer than it has where the
    vocabulary was resized before training."""
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    names = [n for n, m in base_modules(model) if any(m is end for end in ends)]
    values = {**file.originals, **file.copies, **file.whole}
    whole = [v.shape[0] for n, v in values.items() if n.removesuffix(".weight") in names]
    rows = [int(indices[-1]) + 1 for n, (indices, _) in file.rows.items() if n in names]
    own = [len(end.weight) for end in ends[:1] if isinstance(getattr(end, "weight", None), Tensor)]
    return max([*(whole or own), *rows], default=0)


def as_meant(model: nn.Module, layers: Mapping[str, nn.Module], file: LoRAFile) -> LoRAFile:
    """The file without the layers that PEFT has no module for on this model, of those that it takes a model to tell. Says which.
    The file's names are the model's. Raises FileError where none is left."""
    left = in_order(
        n for n in file.unclear & file.factors.keys() if not _is_among_all(owner_of(model), layers.get(n), file)
    )
    if not left:
        return file
    setting = "target_modules 'all-linear'" if is_all_linear(file.config) else "target_parameters"
    if len(left) == len(file.factors):
        raise FileError(f"The adapter's settings ({setting}) mean none of its layers on this model: {shown(left)}.")
    log.warning(
        "%d layers of the adapter are left out, as PEFT leaves them out: on this model %s does not mean %s.",
        len(left), setting, shown(left),
    )  # fmt: skip

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {n: v for n, v in values.items() if n not in left and n.rpartition(".")[0] not in left}

    return replace(
        file, factors=kept(file.factors), scales=kept(file.scales), magnitudes=kept(file.magnitudes), biases=kept(file.biases),
        copies=kept(file.copies), whole=kept(file.whole) | {n: v for n, v in file.whole.items() if saved_module(n, file.config)},
    )  # fmt: skip


def _is_among_all(model: Any, layer: nn.Module | None, file: LoRAFile) -> bool:
    """Whether PEFT has a module for a layer of which its name does not tell it."""
    if layer is None:  # which is another problem
        return True
    if not is_all_linear(file.config):
        return not parameters_anywhere(file.config).isdisjoint(layer._parameters)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and file.config.get("task_type") == "SEQ_CLS":
        head = next((h for n in ("score", "classifier") if (h := getattr(model, n, None)) is not None), None)
    return (isinstance(layer, nn.Linear) or isinstance(kind_of(layer), Conv1DKind)) and layer is not head


def without_effect_in_peft(name: str, layers: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT does not compute with the update of this layer of a file, since the module around it only reads its weight.
    (It calls an output projection inside its own wrapper of an `nn.MultiheadAttention`, which has another name.)"""
    outer, _, own = name.rpartition(".")
    return outer in layers and only_read(layers[outer], own)


def unlike_in_peft(layer: nn.Module) -> str | None:
    """Which settings of a convolution PEFT (0.21) leaves out of its update's own; None where it has all that matter."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    parts = []
    if any(d > 1 and k > 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
        parts.append(f"dilation {list(layer.dilation)}")
    if layer.padding_mode != "zeros" and any(layer._reversed_padding_repeated_twice):
        parts.append(f"padding mode {layer.padding_mode!r}")
    return f"with {' and '.join(parts)}, which PEFT leaves out of its update's own convolution" if parts else None


class _Fitting:
    """What has been made so far, and what was wrong."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Any], file: LoRAFile, device: torch.device | None
    ) -> None:
        self.model, self.layers, self.file, self.device = model, layers, file, device
        self.foreign = not is_ours(file.metadata)
        self.updates: dict[str, Update] = {}
        self.unread: list[str] = []
        self.problems: list[str] = []

    def low_rank(self) -> None:
        """A and B, and what DoRA and biases have beside them."""
        file, dropout = self.file, float(self.file.config.get("lora_dropout") or 0.0)
        slices = slices_of(file)
        for name, (A, B) in file.factors.items():
            layer_name, own = self._meant(name)
            layer = self._layer(layer_name)
            if layer is None:
                continue
            if self.foreign and without_effect_in_peft(name, self.layers):
                self.unread.append(name)
                continue
            if own is not None:
                self._on_weight(name, layer_name, own, slices.get(name))
                continue
            kind = kind_of(layer)
            if why := why_not(layer) if kind is None else self._of_another_kind(name, layer, kind):
                self.problems.append(f"{layer_name!r}: {why}")
            if kind is None or why:
                continue
            device, scale = self._place(layer._parameters["weight"]), file.scales[name]
            A, B, bias = A.to(device), B.to(device), self._bias(name, layer_name)
            if layer_name != name:
                B = times(B, TWICE)
            if layer_name in self.updates:
                self._twice(name, layer_name)
                continue
            rows = sliced_rows(B, slices[name]) if name in slices else None
            if rows is not None:
                update: Update = Sliced(kind, A, rows, scale, slices[name], B.shape[0], dropout, bias)
            elif name in file.magnitudes:
                update = LowRankRescaled(kind, A, B, scale, file.magnitudes[name].to(device), dropout, bias)
            else:
                update = LowRank(kind, A, B, scale, dropout, bias)
            self.updates[layer_name] = update
        if self.unread:
            log.warning(
                "Left out of the adapter: PEFT does not compute with its updates of %s, which the modules around them only read.",
                shown(self.unread),
            )

    def _meant(self, name: str) -> tuple[str, str | None]:
        """The layer that a name in the file means; or the module, and which of its weights that have no layer. (PEFT wraps a
        module once for each of these, the last outermost.)"""
        if name in self.layers and not (own := matrices_of(self.layers[name])):
            return name, None
        plain = name.replace(".base_layer", "")
        module = self.layers.get(plain)
        if module is None:
            outer, _, last = plain.rpartition(".")
            return (outer, last) if outer in self.layers and last in weights_of(self.layers[outer]) else (name, None)
        if isinstance(module, nn.MultiheadAttention):
            return plain, "in_proj_weight"
        wanted = tuple(self.file.config.get("target_parameters") or ())
        matrices = matrices_of(module)
        own = [n for n in matrices if any(f".{plain}.{n}".endswith(f".{t}") for t in wanted)]
        own = own or [n for n in matrices if n == "weight"]  # of a router that was a dense layer in transformers 4
        depth = name.count(".base_layer")
        return plain, own[-1 - depth] if depth < len(own) else None

    def _on_weight(self, name: str, module_name: str, own: str, slices: Mapping[str, Runs] | None) -> None:
        """A and B of a weight that has no layer, in its module's update."""
        (A, B), scale, module = self.file.factors[name], self.file.scales[name], self.layers[module_name]
        W0 = module._parameters.get(own)
        if W0 is None:
            self.problems.append(f"{module_name!r} has no {own}")
            return
        by_file = names_in_peft(name, self.file)
        if len(by_file) == 1 and by_file[0] not in (name, dotted(module_name, own)):
            self.problems.append(f"{name!r}: by the file's settings it is {by_file[0]}, by this model's order {own}")
            return
        A, B = A.to(self._place(W0)), B.to(self._place(W0))
        rows = sliced_rows(B, slices) if slices else None
        if W0.ndim == 3:
            E, (d, k) = len(W0), Weight(module, own).shape
            shaped = B.shape[0], A.shape[1]
            turned = shaped == (k, d) if d != k else by_inputs(self.file)
            if turned and not Weight(module, own).transposed and name != dotted(module_name, own):
                A, B = transposed_in_file(A, B, rank_of(name, self.file.config))
            if A.shape[0] != E * rank_of(name, self.file.config) or (B.shape[0], A.shape[1]) != (d, k):
                self.problems.append(
                    f"{dotted(module_name, own)} is {list(W0.shape)}, the file's A {list(A.shape)} and B {list(B.shape)}"
                )
                return
            stacked = unstacked(A, B, len(A) // E)
            part: LowRank = Stack(*stacked, scale, transposed=Weight(module, own).transposed)
        elif slices and rows is not None:
            part = Sliced(PARAMETER, A, rows, scale, slices, B.shape[0])
        else:
            part = LowRank(PARAMETER, A, B, scale)
        if not put_on_weight(self.updates, module_name, own, part):
            self._twice(name, dotted(module_name, own))

    def _twice(self, name: str, layer_name: str) -> None:
        self.problems.append(f"{layer_name!r} has a second update in the file, by the name {name!r}")

    def _of_another_kind(self, name: str, layer: Any, kind: Kind) -> str | None:
        """Where the file's A and B are those of another kind of layer."""
        kernel, theirs = tuple(layer._parameters["weight"].shape[1:]), self.file.kernels.get(name)
        own = f"it is a {type(layer).__name__}"
        if isinstance(kind, EmbeddingKind) != (name in self.file.embeddings):
            return (
                f"{own}, the file's A and B are {'an embedding' if name in self.file.embeddings else 'a dense layer'}'s"
            )
        if isinstance(kind, ConvKind) != (theirs is not None):
            return f"{own}, the file's A and B are {'a dense layer' if theirs is None else 'a convolution'}'s"
        if theirs is not None and theirs != kernel:
            return f"{own} with kernels {list(kernel)}, the file's are {list(theirs)}"
        if self.foreign and (why := unlike_in_peft(layer)):
            return f"{own} {why}: no ΔW does what it computes"
        return None

    def _layer(self, name: str) -> Any:
        """None, and a problem, where the model has none of this name."""
        if name not in self.layers:
            self.problems.append(f"the model has no layer {name!r}{nearest(name, self.layers, count=1)}")
        return self.layers.get(name)

    def _bias(self, name: str, layer_name: str) -> Tensor | None:
        """The bias that the layer has with the adapter, where that is another one."""
        layer, file, given = self.layers[layer_name], self.file, self.file.whole.get(f"{layer_name}.bias")
        if given is None and name in file.biases:
            own, given = layer._parameters.get("bias"), file.biases[name] * file.scales[name]
            given = given if own is None else own.detach().to(given) + given
        return None if given is None else given.to(self._place(layer._parameters["weight"]))

    def _place(self, own: Tensor) -> torch.device:
        """Where what stands beside or for this tensor of the base is kept."""
        return own.device if self.device is None else self.device

    def whole(self) -> None:
        """Values in place of the base's. One that stands in modules_to_save is its module's alone; with any other, all layers
        follow whose weights the model ties to it."""
        file = self.file
        values = {n: v for n, v in file.whole.items() if n.removesuffix(".bias") not in self.updates}
        if not values and not file.copies and not file.originals:
            return
        named = {n: (p, names) for p, names in readers(self.model).items() for n in names}
        copies = {n: v for n, v in file.copies.items() if n in named and not self._only_rows_differ(n, v, named[n][0])}
        values |= {n: v for n, v in copies.items() if self._another(n, v, named[n][0])}
        values = self._without_buffers(self._with_originals(values, named))
        made: dict[str, nn.Parameter] = {}
        for name, value in values.items():
            if name not in named:
                self.problems.append(f"the model has no parameter {name!r}{nearest(name, named, count=1)}")
                continue
            own, names = named[name]
            if not value.is_floating_point():
                self.problems.append(f"{name} is {value.dtype}; it must be floating point")
                continue
            twin = next((made[n] for n in names if n in made and torch.equal(values[n], value)), None)
            made[name] = nn.Parameter(value.to(self._place(own), own.dtype)) if twin is None else twin
        for name in list(made):
            if saved_module(name, file.config) is None:
                for other in named[name][1]:
                    made.setdefault(other, made[name])
        self._put(made)

    def _only_rows_differ(self, name: str, copy: Tensor, own: Tensor) -> bool:
        """Whether a copy of an embedding is this base's but for the rows of tokens that the file has besides."""
        if name.removesuffix(".weight") not in self.file.rows or copy.ndim != 2 or copy.shape[1] != own.shape[1]:
            return False
        ids = torch.arange(len(copy))
        kept = ids[~torch.isin(ids, self.file.rows[name.removesuffix(".weight")][0])]
        return bool((kept < len(own)).all()) and _same(copy[kept], own[kept.to(own.device)])

    def _with_originals(
        self, values: dict[str, Tensor], named: Mapping[str, tuple[nn.Parameter, list[str]]]
    ) -> dict[str, Tensor]:
        """`values`, and those that PEFT's wrappers of modules keep for the base's own parameters. A wrapped module reads its
        trained copy, so that these are only read by layers that the model ties to it."""
        others: dict[str, Tensor] = {}
        for name, original in self.file.originals.items():
            if name not in named or _same(original, own := named[name][0]):
                continue
            wrapped = saved_module(name, self.file.config) is not None
            tied = [n for n in named[name][1] if n not in values and not saved_module(n, self.file.config)]
            if wrapped and tied:
                if tied[0] not in others and self._another(tied[0], original, own):
                    others |= dict.fromkeys(tied, original)
            elif name not in values or not _resized(original, own):
                log.warning(
                    "The adapter's file keeps the %s of the base that it was trained on, which is another one than this model's. "
                    "It is left out: PEFT does not compute with it either while the adapter is on.", name,
                )  # fmt: skip
        return others | values

    def _without_buffers(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """`values` but for the base's buffers, which PEFT's copies of modules have too. Those of others than the base's are
        problems."""
        buffers = {dotted(n, own): b for n, m in self.layers.items() for own, b in m._buffers.items() if b is not None}
        self.problems += [
            f"{name} is a buffer, and not this model's: values that change without gradients are not read"
            for name, value in values.items()
            if name in buffers and not _same(value, buffers[name])
        ]
        return {name: value for name, value in values.items() if name not in buffers}

    def _another(self, name: str, copy: Tensor, own: Tensor) -> bool:
        """Whether the file's copy of a weight of the base is another one than this base's."""
        if _same(copy, own):
            return False
        if not _resized(copy, own):
            log.warning("The adapter's file has another %s than this model: the file's is used.", name)
        return True

    def _put(self, values: dict[str, nn.Parameter]) -> None:
        """These values on their layers; where a layer has a low-rank update too, its sum with that."""
        of_layer: dict[str, dict[str, nn.Parameter]] = {}
        for name, value in values.items():
            layer_name, own_name = name.rsplit(".", 1)
            of_layer.setdefault(layer_name, {})[own_name] = value
        for name, own in of_layer.items():
            update = self.updates.get(name)
            if isinstance(update, LowRank):
                self.updates[name] = self._sum(self.layers[name], update, own)
            else:
                self.updates[name] = Replaced(own)

    @torch.no_grad()
    def _sum(self, layer: Any, update: LowRank, values: dict[str, nn.Parameter]) -> Update:
        own: Tensor = layer._parameters["weight"]
        weight, changes = values.get("weight", own).to(wide(own.dtype)), update.changes(layer)
        W = as_matrix(layer, "weight", weight.clone())
        if W.shape != (update.B.shape[0], update.A.shape[1]):
            self.problems.append(
                f"A and B are {update.B.shape[0]}×{update.A.shape[1]}, the weight {list(weight.shape)}"
            )
            return update
        merge_(W, changes["weight"])
        values = values | {"weight": nn.Parameter(as_matrix(layer, "weight", W).to(own.dtype))}
        return Replaced(values if update.bias is None else values | {"bias": update.bias})

    def rows(self) -> None:
        """Rows of some tokens, also of the layers that follow theirs."""
        for name, (indices, rows) in self.file.rows.items():
            layer = self._layer(name)
            if layer is None:
                continue
            weight = layer._parameters.get("weight")
            if weight is None:
                self.problems.append(f"{name!r} has no weight whose rows could be tokens'")
                continue
            shared = nn.Parameter(rows.to(self._place(weight)))
            for each in (name, *self._following(name)):
                if dotted(name, "weight") in self.file.copies and isinstance(
                    update := self.updates.get(each), Replaced
                ):
                    self._put_rows(update, indices, rows)
                    continue
                if each in self.updates:
                    self.problems.append(f"{dotted(each, 'weight')} has rows of tokens, and another update too")
                self.updates[each] = ReplacedRows(indices.to(weight.device), shared)

    def _following(self, name: str) -> list[str]:
        """The layers that have this one's rows of tokens too, as PEFT has it: those that the model ties to its input embedding,
        unless the file has another list of tokens for one of them."""
        layer, config = self.layers[name], self.file.config
        tied = [n for n, m in self.layers.items() if m._parameters.get("weight") is layer._parameters["weight"]]
        embedding = getattr(owner_of(self.model), "get_input_embeddings", lambda: None)()
        alone = any(tokens_of(n, config) != tokens_of(name, config) for n in tied if n in self.file.rows)
        return [] if alone or layer is not embedding else [n for n in tied if n not in self.file.rows]

    @torch.no_grad()
    def _put_rows(self, update: Replaced, indices: Tensor, rows: Tensor) -> None:
        """Rows of tokens in the file's copy of a base's embedding, which stands in place of this base's."""
        value = update._parameters["weight"]
        assert value is not None
        if rows.ndim != 2 or rows.shape[1] != value.shape[1] or int(indices[-1]) >= len(value):
            self.problems.append(f"its rows of tokens are {list(rows.shape)}, the file's embedding {list(value.shape)}")
        else:
            value[indices.to(value.device)] = rows.to(value)


def _resized(copy: Tensor, own: Tensor) -> bool:
    """Whether a file's copy of a weight is this one but for its last rows: those of tokens that were added."""
    if copy.ndim != 2 or copy.shape[1:] != own.shape[1:]:
        return False
    both = min(len(copy), len(own))
    alike = (copy[:both].to(own.device, own.dtype) == own[:both]).all(1)
    count = int(alike.sum())
    return count > 0 and bool(alike[:count].all())


def _same(copy: Tensor, own: Tensor) -> bool:
    """Whether a file's copy of a parameter has the parameter's values, in its dtype."""
    return copy.shape == own.shape and torch.equal(copy.to(own.device, own.dtype), own)


# --- a file as updates ------------------------------------------------------------------------------------------


def method_in(file: MethodFile, path: Path) -> Any:
    """The method's settings. Raises FileError where the file's are none."""
    try:
        return from_mapping(method_class(file.method), file.settings, where=str(path))
    except DeltaWError as error:
        raise FileError(f"The adapter in {path} cannot be used by this version of deltaw: {error}") from error


def restored(
    model: nn.Module, file: MethodFile, path: Path, *, device: torch.device | None = None
) -> dict[str, Update]:
    """The updates that the file's settings plan on this model, with the file's values, on `device` (default: the layers'). Raises
    FileError with every tensor that is missing, unexpected or of another shape."""
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced
            updates = dict(method_in(file, path).plan(owner_of(model)).updates)
    except FileError:
        raise
    except DeltaWError as error:
        raise FileError(f"The adapter in {path} does not fit this model; nothing was changed:\n{error}") from error
    planned = tensors_in(updates)
    given, differences = _named(file, updates), file.differences()
    beside = {n for n in given if is_beside(n) and n.rpartition(":")[0] in differences}
    problems = [f"{n} is missing" for n in planned if n not in given]
    problems += [
        f"{n} is unexpected{nearest(n, planned, count=1)}" for n in given if n not in planned and n not in beside
    ]
    problems += [
        f"{n} is {list(given[n].shape)}, the model needs {list(t.shape)}"
        for n, t in planned.items()
        if n in given and given[n].shape != t.shape
    ]
    problems += problems_with({n: t for n, t in given.items() if n in differences | beside})
    if problems:
        raise FileError(f"The adapter in {path} does not fit this model; nothing was changed:", problems)
    given |= {n: from_difference(n, given, W0) for n, _, W0 in with_base(model, given) if n in differences}
    whole = {id(p) for u in updates.values() for p in u.replaced().values()}
    named = {n: p for p, names in readers(model).items() for n in names}
    for name, parameter in planned.items():
        value = given[name]
        if id(parameter) in whole and name in named:  # what stands in a base's place has its precision
            value = value.to(named[name].dtype)
        parameter.data = value.to(parameter.device if device is None else device)  # type: ignore[attr-defined]
    return updates


def _named(file: MethodFile, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """The file's tensors by the names that they have on this model: a prompt, whatever its body is called; of a slice's vector
    its own entries."""
    given = dict(file.tensors)
    body = next((n for n, u in updates.items() if isinstance(u, Prepended)), None)
    if PROMPT in given and body is not None:
        given[dotted(body, "rows")] = given.pop(PROMPT)
    for name, update in updates.items():
        key = dotted(name, "l")
        if isinstance(update, Scaled) and update.rows is not None and key in given:
            whole, rows = given[key], update.rows.cpu()
            if len(whole) > int(rows.max()):
                given[key] = whole[rows]
    return given
