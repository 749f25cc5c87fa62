"""What an adapter does over its life, on every architecture of tests/architectures.py. No scale is 1.

`CHECKS` holds one function for each part of that life; scripts/models_page.py runs the same ones and writes docs/models.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw import LoRA
from deltaw.errors import AdapterError, TargetError
from deltaw.methods.targets import PRESETS, ROLES, select
from deltaw.model.summary import updates
from tests.architectures import ROWS, TABLE, Architecture
from tests.conftest import ROOT, assert_same, bits, covering, fill, snapshot

METHOD = LoRA(rank=2, alpha=3)
ADAPTED = [a for a in TABLE if not a.refused]
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


@torch.no_grad()
def computed(entry: Architecture, model: Any, inputs: dict[str, Any] | None = None) -> Tensor:
    return entry.outputs(model(**(entry.inputs() if inputs is None else inputs)))


def size(x: Tensor) -> float:
    return float(x.abs().max())


def ties(model: nn.Module) -> list[list[str]]:
    """Names of the base's parameters, those of one parameter together."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".deltaw." not in name:
            found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def assert_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = bits(model)
    assert after.keys() == before.keys() and all(torch.equal(after[n], v) for n, v in before.items())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second one, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the checks -------------------------------------------------------------------------------------------------


def identity(entry: Architecture, folder: Path) -> None:
    """Attached and not yet trained, it changes no output, no weight and no tie."""
    model = entry.build()
    before, output, tied = bits(model), computed(entry, model), ties(model)
    deltaw.attach(model, METHOD)
    assert torch.equal(computed(entry, model), output)
    assert torch.equal(entry.outputs(model(**entry.inputs())), output)  # with gradients
    assert_bits(model, before)
    assert ties(model) == tied


def step(entry: Architecture, folder: Path) -> None:
    """One step lowers the loss, by A and B alone, and reaches each of them."""
    model = entry.build()
    before = bits(model)
    deltaw.attach(model, METHOD)
    optimizer = torch.optim.AdamW(deltaw.parameters(model), lr=0.01)
    loss = model(**entry.inputs()).loss
    loss.backward()
    for name, update in updates(model).items():
        for own, parameter in update.named_parameters():
            assert parameter.grad is not None, f"no gradient of {own} on {name}"
            assert parameter.grad.any() == own.endswith("B"), f"{own} on {name}"  # B is zero: it hides A's
    optimizer.step()
    with torch.no_grad():
        assert model(**entry.inputs()).loss < loss
    assert_bits(model, before)
    assert all(p.grad is None for n, p in model.named_parameters() if ".deltaw." not in n)


def save_and_load(entry: Architecture, folder: Path) -> None:
    """Out of its folder it does the same on another model with the same weights."""
    model, twin = entry.build(), entry.build()
    base = computed(entry, model)
    fill(deltaw.attach(model, METHOD))
    expected = computed(entry, model)
    deltaw.save(model, folder / "adapter")
    deltaw.load(twin, folder / "adapter")
    assert torch.equal(computed(entry, twin), expected)
    assert not torch.equal(expected, base)


def merge(entry: Architecture, folder: Path) -> None:
    """The merged weights do what the branch does, and the ties stay."""
    model = entry.build()
    base, tied = computed(entry, model), ties(model)
    fill(deltaw.attach(model, METHOD))
    branch = computed(entry, model)
    report = deltaw.merge(model)
    merged = computed(entry, model)
    assert size(merged - branch) < 1e-4 * size(branch - base)
    assert size(merged - base) > 1e-2 * size(base)
    assert set(report.layers) == resolved(entry.build(), "all-linear").keys()
    assert ties(model) == tied


def unmerge(entry: Architecture, folder: Path) -> None:
    """It gives every weight its bits back, and the branch is in use again."""
    model = entry.build()
    before = bits(model)
    fill(deltaw.attach(model, METHOD))
    branch = computed(entry, model)
    deltaw.merge(model)
    assert not all(torch.equal(v, before[n]) for n, v in bits(model).items())
    deltaw.unmerge(model)
    assert_bits(model, before)
    assert torch.equal(computed(entry, model), branch)


def detach(entry: Architecture, folder: Path) -> None:
    """It leaves the object as it was before attach, also out of a merge."""
    model = entry.build()
    before, output = snapshot(model), computed(entry, model)
    for merged in (False, True):
        fill(deltaw.attach(model, METHOD))
        model(**entry.inputs()).loss.backward()
        if merged:
            deltaw.merge(model)
        assert deltaw.detach(model) is model
        assert_same(model, before)
        assert torch.equal(computed(entry, model), output)


@torch.no_grad()
def rows(entry: Architecture, folder: Path) -> None:
    """Rows of a batch with adapters of their own are what each is alone. Raises AdapterError where deltaw refuses that."""
    model, inputs = entry.build(), entry.inputs()
    fill(deltaw.attach(model, METHOD, name="a"), "a", seed=3)
    fill(deltaw.attach(model, LoRA(rank=2, alpha=5), name="b"), "b", seed=4)
    names = ["a", None, "b"]
    assert len(names) == ROWS
    alone, base = [], []
    for i, name in enumerate(names):
        row = {key: x[i : i + 1] if isinstance(x, Tensor) else x for key, x in inputs.items()}
        with deltaw.using(model, name):
            alone.append(computed(entry, model, row))
        with deltaw.using(model, None):
            base.append(computed(entry, model, row))
    with deltaw.route(model, names):
        together = computed(entry, model, inputs)
    assert size(together - torch.cat(alone)) < 1e-4 * size(torch.cat(alone))
    differ = [size(one - other) > 1e-2 * size(other) for one, other in zip(alone, base, strict=True)]
    assert differ == [name is not None for name in names]


CHECKS: dict[str, Callable[[Architecture, Path], None]] = {
    "identity": identity, "step": step, "save → load": save_and_load, "merge": merge, "unmerge": unmerge, "detach": detach,
    "rows": rows,
}  # fmt: skip


def over(entries: Iterable[Architecture]) -> Any:
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


@pytest.mark.parametrize(("name", "check"), covering([a.name for a in ADAPTED], list(CHECKS)))
def test_an_adapters_life(name: str, check: str, tmp_path: Path) -> None:
    entry = next(a for a in ADAPTED if a.name == name)
    if check == "rows" and entry.rows_refused:
        with pytest.raises(AdapterError, match=entry.rows_refused):
            rows(entry, tmp_path)
    else:
        CHECKS[check](entry, tmp_path)


# --- which layers -----------------------------------------------------------------------------------------------


def by_end(entry: Architecture, model: nn.Module) -> dict[str, set[str]]:
    """How the names of layers end, by the table → the model's dense layers, and stacks of experts, that end so and with nothing
    longer of the table's."""
    ends = {*entry.others, *entry.left_out, *(end for several in entry.roles.values() for end in several)}
    found: dict[str, set[str]] = {end: set() for end in ends}
    for name, layer in model.named_modules():
        dense = [name] if isinstance(layer, (nn.Linear, Conv1D)) else []
        dense += [
            f"{name}.{own}" for own, p in layer.named_parameters(recurse=False) if p.ndim == 3 and "experts" in name
        ]
        for one in dense:
            own = [end for end in ends if f".{one}".endswith(f".{end}")]
            assert own, f"{one} is not in the table"
            found[max(own, key=len)].add(one)
    return found


def resolved(model: nn.Module, targets: str) -> dict[str, set[str]]:
    """The layers that a targets value means, each with the slices of it that are meant, none for the whole; no layers where it
    means nothing."""
    try:
        selection = select(model, targets, 2)
    except TargetError:
        return {}
    return {name: set(selection.slices.get(name, ())) for name in selection.ranks}


@over(ADAPTED)
def test_roles_are_the_layers_of_the_table(entry: Architecture) -> None:
    model = entry.build()
    ends = by_end(entry, model)
    layers = {role: {n for end in own for n in ends[end]} for role, own in entry.roles.items()}
    others = {n for end in entry.others for n in ends[end]}
    assert all(layers.values()) and all(ends[end] for end in entry.others)
    means: dict[str, dict[str, set[str]]] = {role: {n: set() for n in own} for role, own in layers.items()}
    for role, fused in FUSED.items():
        if fused in layers and not entry.unsliced:
            means[role] = {n: {role} for n in layers[fused]}
    for role in ROLES:
        assert resolved(model, role) == means.get(role, {}), role
    everything = set.union(others, *layers.values())
    assert resolved(model, "all-linear") == {n: set() for n in everything}
    for preset, roles in PRESETS.items():
        assert resolved(model, preset).keys() == {n for role in roles for n in means.get(role, ())}, preset


@over(ADAPTED)
def test_every_weight_is_adapted_or_has_a_reason(entry: Architecture) -> None:
    model = entry.build()
    weights = {
        (name, f"{name}.{own}")
        for name, module in model.named_modules()
        for own, p in module.named_parameters(recurse=False)
        if p.ndim >= 2
    }
    named = {n for n, why in select(model, "all-linear", 2).left_out.items() if why.endswith("where it is named")}
    assert {n: set(select(model, n, 2).ranks) for n in named} == {n: {n} for n in named}
    adapted = resolved(model, "all-linear").keys()
    adapter = deltaw.summary(deltaw.attach(model, METHOD)).adapters["default"]
    assert adapter.layers == len(updates(model))
    assert not adapted & adapter.left_out.keys()
    assert [names for names in weights if not (adapted | adapter.left_out.keys()).intersection(names)] == []
    used = set()
    for name, why in adapter.left_out.items():
        own = [end for end in entry.left_out if f".{name}".endswith(f".{end}")]
        if own:
            assert why.startswith(entry.left_out[max(own, key=len)])
            used.add(max(own, key=len))
        else:
            assert isinstance(model.get_submodule(name), nn.Embedding), name
            assert "mbedding" in why or (why.startswith("no forward calls it") and name.endswith("shared")), name
    assert used == entry.left_out.keys()


@over([a for a in TABLE if a.refused])
def test_what_cannot_be_adapted_is_said(entry: Architecture) -> None:
    model = entry.build()
    before = snapshot(model)
    with pytest.raises(TargetError, match=entry.refused):
        deltaw.attach(model, METHOD)
    assert_same(model, before)


def test_the_page_names_every_architecture() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert [
        a.name for a in TABLE if f"\n| `{a.config.model_type.replace('-', '_').removesuffix('_text')}` | " not in page
    ] == []
