"""Adapters that wait in host memory until they are used."""

import copy
import ctypes
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from deltaw import (
    LoRA,
    adapters,
    attach,
    combine,
    detach,
    keep_on_device,
    load,
    merge,
    parameters,
    route,
    save,
    use,
    using,
)
from deltaw.errors import ConfigError
from deltaw.layers.patch import slot_of
from deltaw.model.record import record_of
from tests.conftest import fill, tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(fill(attach(tiny_llama(), LoRA(rank=4, alpha=10))), tmp_path / "a")


def here(model: Any) -> str:
    """The adapters that are on the device, the one that was used last at the end."""
    return "".join(record_of(model).residency.here)


def load_four(model: Any, folder: Path) -> Any:
    for name in "abcd":
        load(model, folder, name=name, host=True, activate=False, check_base=False)
    return model


def test_the_last_used_are_on_the_device(folder: Path) -> None:
    model = load_four(tiny_llama(), folder)
    assert here(model) == ""
    keep_on_device(model, 2)
    for name in "abac":
        use(model, name)
    assert here(model) == "ac"
    with using(model, "a"):
        use(model, "d")
        assert here(model) == "cad"  # what is in use stays
    with route(model, ["a", "b", None, "d"]):  # more than the limit, while they are in use
        assert set(here(model)) >= set("abd")
    use(model, "c")
    assert here(model)[-1] == "c" and len(here(model)) == 2
    keep_on_device(model, 1)
    assert here(model) == "c"
    detach(model, "c")
    use(model, "a")
    assert here(model) == "a"


@pytest.mark.gpu
def test_on_a_gpu_only_those_are_there(folder: Path, ids: torch.Tensor) -> None:
    model = tiny_llama().eval()
    load(model, folder, name="plain", check_base=False)
    expected = model(ids).logits
    detach(model)
    load_four(model.cuda(), folder)
    keep_on_device(model, 2)
    for name in "abcdab":
        use(model, name)
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, rtol=1e-4, atol=1e-4)
        where = {n: {p.device.type for p in parameters_of(model, n)} for n in "abcd"}
        assert sorted(n for n, types in where.items() if types == {"cuda"}) == sorted(here(model))


def parameters_of(model: Any, name: str) -> list[Any]:
    """Without bringing the adapter to the device, as `parameters` does."""
    slots = [slot for layer in model.modules() if (slot := slot_of(layer)) is not None]
    return [p for slot in slots for p in slot.get(name).parameters()]


@pytest.mark.parametrize("change", ["counted", "by .data", "new memory"])
def test_values_come_back_and_so_does_what_was_learned(change: str, folder: Path, ids: torch.Tensor) -> None:
    model = tiny_llama().eval()
    plain = copy.deepcopy(model)
    load(plain, folder, check_base=False)
    for name in "ab":
        load(model, folder, name=name, host=True, check_base=False)
    keep_on_device(model, 1)
    for name in "abab":
        use(model, name)
        assert torch.equal(model(ids).logits, plain(ids).logits)
    with torch.no_grad():
        for parameter in parameters(model, "b"):
            if change == "counted":
                parameter.add_(0.1)
            elif change == "by .data":
                parameter.data.add_(0.1)
            else:
                parameter.data = parameter.data + 0.1
    changed = model(ids).logits
    use(model, "a")
    assert torch.equal(model(ids).logits, plain(ids).logits)
    use(model, "b")
    assert torch.equal(model(ids).logits, changed)


def test_all_else_works_with_them(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny_llama().eval()
    for name in "ab":
        load(model, folder, name=name, host=True, check_base=False)
    keep_on_device(model, 1)
    branch = model(ids).logits
    save(model, tmp_path / "again", name="a")
    combine(model, {"a": 0.5, "b": 0.5}, name="c")
    merge(model, "a")
    torch.testing.assert_close(model(ids).logits, branch, rtol=1e-4, atol=1e-4)
    detach(model)
    assert adapters(model) == ()


def test_one_at_least() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        keep_on_device(attach(tiny_llama(), LoRA(rank=2)), 0)


def test_unloading_frees_the_memory(tmp_path: Path) -> None:
    """It goes back to the system, not to a pool that only new adapters could use.

    What the tests before it have freed is given back first: else it shows by their order.
    """

    def taken() -> int:
        ctypes.CDLL(None).malloc_trim(0)
        return psutil.Process().memory_info().rss

    model = tiny_llama()
    model.resize_token_embeddings(50_000)
    folder = save(fill(attach(model, LoRA(rank=8, alpha=10, targets="all-linear,lm_head"))), tmp_path / "a")
    detach(model)
    load(model, folder, name="first")  # what it imports and reads of sources stays
    detach(model)
    size = (folder / "adapter_model.safetensors").stat().st_size
    before = taken()
    for i in range(60):
        load(model, folder, name=f"a{i}", activate=False)
    loaded = taken() - before
    assert 0.9 * 60 * size < loaded < 1.2 * 60 * size
    for i in range(60):
        detach(model, f"a{i}")
    assert taken() - before < 0.1 * loaded
