"""The life of an adapter on one model of transformers: each check says what is wrong, or nothing."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltaw
from deltaw import LoRA
from deltaw.errors import AdapterError, DeltaWError
from deltaw.layers.kinds import Weight
from deltaw.layers.patch import slot_of
from deltaw.layers.source import read_outside
from deltaw.methods.targets import select
from deltaw.model.summary import updates
from tests.conformance.building import Built, called, outputs, said, tensors
from tests.conformance.inputs import ROWS
from tests.conftest import assert_same, bits, fill, snapshot

METHOD = LoRA(rank=2, alpha=3)
CLOSE = 2e-3
"""How far two ways of the same may be apart, as a share of what the adapter changes. fp32, random weights."""

NOISE = 1e-4
"""A change of an output that is no more than rounding, as a share of its largest entry."""


@dataclass
class Life:
    """One model, a batch, and what its base makes of it."""

    built: Built
    folder: Path
    before: list[Tensor] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """A fresh copy of the base."""
        return copy.deepcopy(self.built.model)

    def of(self, model: Any, batch: Mapping[str, Any] | None = None) -> list[Tensor]:
        return [t.clone() for t in outputs(model, self.built.batch if batch is None else dict(batch))]

    def filled(self) -> tuple[Any, list[Tensor]]:
        """A model with an adapter that changes what it computes, and that."""
        model = fill(deltaw.attach(self.model, METHOD), size=0.3)
        return model, self.of(model)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two outputs."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    differences = [(a - b).nan_to_num(0, 0, 0).abs().max() for a, b in zip(one, other, strict=True) if a.numel()]
    return float(max(differences, default=torch.tensor(0.0)))


def differs(what: str, one: list[Tensor], other: list[Tensor], base: list[Tensor]) -> str:
    """Where two ways to the same output are apart, as a share of the adapter's whole effect."""
    effect, error = apart(other, base), apart(one, other)
    if effect == 0:
        return f"{what}: the adapter changes no output"
    return f"{what}: {error / effect:.1%} of the effect off" if error > CLOSE * effect else ""


# --- the checks -------------------------------------------------------------------------------------------------


def identity(life: Life) -> str:
    """Attached and not yet trained, it changes no output and no weight."""
    model = life.model
    weights = bits(model)
    deltaw.attach(model, METHOD)
    if not equal(life.of(model), life.before):
        return f"the output differs by {apart(life.of(model), life.before):.1e}"
    return "" if all(torch.equal(v, weights[n]) for n, v in bits(model).items()) else "a weight differs"


def gradients(life: Life) -> str:
    """The gradient reaches A and B of each update."""
    model, _ = life.filled()
    for parameter in deltaw.parameters(model):
        parameter.requires_grad_(True)
    with torch.enable_grad():
        results = [t for t in tensors(called(model, life.built.batch)) if t.requires_grad]
        if not results:
            return "no output depends on the adapter"
        draws = torch.Generator().manual_seed(8)
        loss = sum((t * torch.randn(t.shape, generator=draws)).mean() for t in results)
        assert isinstance(loss, Tensor)
        loss.backward()
    without = [
        name
        for name, update in updates(model).items()
        if not all(p.grad is not None and bool(p.grad.any()) for p in update.parameters())
    ]
    return f"none in {len(without)} of {len(updates(model))}: {kinds(without)}" if without else ""


def save_and_load(life: Life) -> str:
    """Out of its folder it does the same on another model with the same weights."""
    model, expected = life.filled()
    deltaw.save(model, life.folder / "own")
    twin = life.model
    deltaw.load(twin, life.folder / "own")
    return "" if equal(life.of(twin), expected) else differs("loaded", life.of(twin), expected, life.before)


def merge(life: Life) -> str:
    """The merged weights do what the branch does."""
    model, branch = life.filled()
    deltaw.merge(model)
    if equal(branch, life.before):  # no output depends on it: the column of gradients says so
        return "" if equal(life.of(model), branch) else "merged: an output changes that the branch leaves"
    return differs("merged", life.of(model), branch, life.before)


def unmerge(life: Life) -> str:
    """It gives every weight its bits back."""
    model, branch = life.filled()
    weights = bits(model)
    deltaw.merge(model)
    deltaw.unmerge(model)
    if not all(torch.equal(v, weights[n]) for n, v in bits(model).items()):
        return "a weight differs"
    return "" if equal(life.of(model), branch) else "the branch differs"


def detach(life: Life) -> str:
    """It leaves the object as it was before attach, also out of a merge."""
    model = life.model
    before = snapshot(model)
    for merged in (False, True):
        fill(deltaw.attach(model, METHOD))
        if merged:
            deltaw.merge(model)
        deltaw.detach(model)
        assert_same(model, before)
    return "" if equal(life.of(model), life.before) else "the output differs"


@torch.no_grad()
def rows(life: Life) -> str:
    """Rows of a batch with adapters of their own are what each is alone."""
    model, batch = life.model, life.built.batch
    fill(deltaw.attach(model, METHOD, name="a"), "a", seed=3)
    fill(deltaw.attach(model, LoRA(rank=2, alpha=5), name="b"), "b", seed=4)
    names = ["a", None, "b"]
    with deltaw.route(model, names):
        together, inside = life.of(model, batch), inner(model, batch)
    alone, inside_alone = {}, {}
    for name in dict.fromkeys(names):
        with deltaw.using(model, name):
            alone[name], inside_alone[name] = life.of(model, batch), inner(model, batch)
    places = by_row(life)
    wanted = [torch.stack([alone[n][i][row] for row, n in enumerate(names)]) for i in places]
    before = [life.before[i] for i in places]
    if places and apart(wanted, before) > NOISE * max(float(t.abs().max()) for t in before):
        return differs("rows", [together[i] for i in places], wanted, before)
    # No output of one row that an adapter changes more than rounding does: what its layers put out
    wanted = rows_of_each(names, inside_alone)
    return differs("rows of layers", parts_of_rows(inside), wanted, parts_of_rows(inside_alone[None]))


def inner(model: Any, batch: Mapping[str, Any]) -> dict[str, tuple[Tensor, int]]:
    """What the adapted layers put out in their first call, with the dimension that has the rows."""
    seen: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, slot: Any) -> Any:
        def hook(layer: Any, inputs: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            seen.setdefault(name, (out.detach().clone(), slot.rows_at))

        return hook

    slots = [(n, m, slot) for n, m in model.named_modules() if (slot := slot_of(m)) is not None]
    hooks = [m.register_forward_hook(note(n, slot)) for n, m, slot in slots]
    called(model, dict(batch))
    for hook in hooks:
        hook.remove()
    return seen


def parts_of_rows(seen: Mapping[str, tuple[Tensor, int]]) -> list[Tensor]:
    """[rows, entries] of each layer."""
    return [out.movedim(place, 0).reshape(ROWS, -1) for out, place in seen.values()]


def rows_of_each(names: list[str | None], alone: Mapping[str | None, Any]) -> list[Tensor]:
    """The same, each row from the pass of its own adapter."""
    each = {name: parts_of_rows(seen) for name, seen in alone.items()}
    return [torch.stack([each[n][i][row] for row, n in enumerate(names)]) for i in range(len(each[None]))]


def by_row(life: Life) -> list[int]:
    """Places of the outputs that have one part for each row of the batch, whatever the other rows are."""
    first = {n: torch.stack([v[0]] * ROWS) if _has_rows(v) else v for n, v in life.built.batch.items()}
    try:
        alone = life.of(life.built.model, first)
    except (RuntimeError, ValueError, IndexError):  # rows of images within texts have a form of their own
        return [i for i, t in enumerate(life.before) if t.ndim and t.shape[0] == ROWS]
    pairs = [
        (i, one, t) for i, (one, t) in enumerate(zip(alone, life.before, strict=False)) if t.ndim and len(t) == ROWS
    ]
    return [
        i
        for i, one, t in pairs
        if t.numel() and one.shape == t.shape and apart([one[:1]], [t[:1]]) <= 1e-4 * float(t.abs().max() + 1e-9)
    ]


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == ROWS


def peft_reads(life: Life) -> str:
    """Real PEFT computes the same from our folder."""
    import peft

    model, expected = life.filled()
    deltaw.save(model, life.folder / "ours")
    theirs = peft.PeftModel.from_pretrained(life.model, life.folder / "ours").eval()
    said = differs("PEFT's", life.of(theirs), expected, life.before)
    if said:
        own = of_peft(life)
        torch.manual_seed(1)  # what PEFT does not find is drawn
        again = life.of(peft.PeftModel.from_pretrained(life.model, life.folder / "theirs").eval())
        said += "; PEFT does not read its own file either" if differs("", again, own, life.before) else ""
    return said + bypassed(life, said)


def bypassed(life: Life, said: str) -> str:
    """Why PEFT computes something else: a module reads the weight of a layer that it does not call."""
    model = life.built.model
    for name in select(model, "all-linear", METHOD.rank).layers if said else ():
        place, _, own = name.rpartition(".")
        parent = model.get_submodule(place)
        if not isinstance(parent, torch.nn.MultiheadAttention) and own in parent._modules and read_outside(parent, own):
            return f"; the module around {name} reads the weight itself"
    return ""


def of_peft(life: Life) -> list[Tensor]:
    """The outputs with an adapter of PEFT on the same layers, which is then in the folder `theirs`."""
    import peft

    selection = select(life.built.model, "all-linear", METHOD.rank)
    own = selection.layers
    inner = sorted({n.rpartition(".")[0] for n, w in own.items() if isinstance(w, Weight) and w.value.ndim == 2})
    # PEFT adapts the output projection of attention in one module with that module
    layers = [n for n, layer in own.items() if not isinstance(layer, Weight) and n.rpartition(".")[0] not in inner]
    stacks = [n for n, w in own.items() if isinstance(w, Weight) and w.value.ndim == 3]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers + inner, target_parameters=stacks or None)
    theirs = peft.get_peft_model(life.model, config).eval()
    draws = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    theirs.save_pretrained(str(life.folder / "theirs"))
    return life.of(theirs)


def reads_peft(life: Life) -> str:
    """We compute the same as PEFT from its folder."""
    expected = of_peft(life)
    model = life.model
    deltaw.load(model, life.folder / "theirs")
    said = differs("ours", life.of(model), expected, life.before)
    return said + bypassed(life, said)


CHECKS: dict[str, Callable[[Life], str]] = {
    "identity": identity, "gradients": gradients, "save → load": save_and_load, "merge": merge, "unmerge": unmerge,
    "detach": detach, "rows": rows, "PEFT reads ours": peft_reads, "we read PEFT's": reads_peft,
}  # fmt: skip


# --- one model --------------------------------------------------------------------------------------------------


def look(built: Built, folder: Path) -> dict[str, Any]:
    """What the checks say of a model, and which of its layers are adapted; plain values."""
    # PyTorch chooses another product for frozen weights, whose last bit differs
    model = built.model.requires_grad_(False)
    life = Life(built, folder)
    life.before = life.of(model)
    row: dict[str, Any] = {
        "class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()), "sizes": built.cut,
    }  # fmt: skip
    if not equal(life.of(model), life.before):
        return row | {"not tried": "two passes of it differ"}
    if not all(bool(t.isfinite().any()) for t in life.before):
        return row | {"not tried": "its outputs are not finite"}
    try:
        attached = deltaw.attach(life.model, METHOD)
    except DeltaWError as error:
        return row | {"refused": " ".join(str(error).split())}
    summary = deltaw.summary(attached).adapters["default"]
    adapted = list(select(model, "all-linear", METHOD.rank).ranks)
    row["adapted"], row["dense"] = len(adapted), summary.coverage.dense
    row["roles"] = summary.coverage.roles
    row["left_out"] = reasons(summary.left_out)
    row["checks"] = {name: checked(check, life) for name, check in CHECKS.items()}
    return row


def checked(check: Callable[[Life], str], life: Life) -> str:
    try:
        return check(life)
    except AdapterError as error:
        why = f"refused: {' '.join(str(error).split())[:400]}"
    except Exception as error:
        why = said(error)[:400]
    return without_folders(why, life.folder)


def without_folders(text: str, folder: Path) -> str:
    """A text that says the same on every machine: this folder, and others for temporary files, by what they are."""
    text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), "the folder")
    return re.sub(rf"{re.escape(tempfile.gettempdir())}{re.escape(os.sep)}[\w.-]+", "a temporary folder", text)


def reasons(left_out: Mapping[str, str]) -> dict[str, str]:
    """Reason → the layers it is of, in short."""
    found: dict[str, list[str]] = {}
    for name, why in left_out.items():
        found.setdefault(why, []).append(name)
    return {why: f"{len(names)}: {kinds(names)}" for why, names in found.items()}


def kinds(names: list[str], most: int = 6) -> str:
    """Names of layers with their numbers taken out, each once."""
    short = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", n) for n in names))
    return ", ".join(short[:most]) + (f" and {len(short) - most} more" if len(short) > most else "")
