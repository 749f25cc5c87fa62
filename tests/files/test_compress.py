"""Adapters cut to fewer directions: the nearest there are, in ordinary files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaw
from deltaw.cli.main import main
from deltaw.errors import ConfigError, FileError
from deltaw.files.compress import Spectrum, allocated, folder_bytes
from deltaw.files.formats import peft
from tests.conftest import fill, tiny_gpt2, tiny_llama


def saved(folder: Path, model: Any, method: Any) -> Path:
    fill(deltaw.attach(model, method))
    return Path(deltaw.save(model, folder))


def dense(model: Any) -> dict[str, torch.Tensor]:
    return {layer: deltaw.delta(model, layer).double() for layer in peft_layers(model)}


def peft_layers(model: Any) -> list[str]:
    from deltaw.model.summary import updates

    return list(updates(model))


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    torch.manual_seed(1)
    model = request.param().eval()
    return saved(tmp_path / "adapter", model, deltaw.LoRA(rank=6, alpha=9)), model


def test_the_spectrum_is_that_of_the_dense_update(place: tuple[Path, Any]) -> None:
    folder, model = place
    found = deltaw.spectrum(folder)
    for layer, dW in dense(model).items():
        expected = torch.linalg.svdvals(dW)
        np.testing.assert_allclose(found[layer].values, expected[:6], rtol=1e-6)
        assert found[layer].norm == pytest.approx(float(dW.norm()))
        assert int((expected > 1e-5 * expected[0]).sum()) == 6 and 1.0 <= found[layer].effective_rank <= 6.0


def test_n_equal_directions_count_n() -> None:
    for n in (1, 3, 7):
        own = Spectrum((2.0,) * n + (0.0,) * 2, (10, 10))
        assert own.effective_rank == pytest.approx(n) and own.rank_for(1.0) == n
    assert Spectrum((0.0, 0.0), (4, 4)).effective_rank == 0.0 and Spectrum((0.0,), (4, 4)).energy(1) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_leaves_the_nearest_update(place: tuple[Path, Any], tmp_path: Path, dtype: torch.dtype) -> None:
    folder, model = place
    for parameter in deltaw.parameters(model):
        parameter.data = parameter.data.to(dtype)
    deltaw.save(model, folder)
    done = deltaw.compress(folder, tmp_path / "out", rank=2)
    before = dense(model)
    deltaw.detach(model)
    deltaw.load(model, tmp_path / "out")
    assert set(done.ranks.values()) == {2} and done.bytes == folder_bytes(tmp_path / "out") < done.bytes_before
    missing = 0.0
    for layer, dW in before.items():
        values = torch.linalg.svdvals(dW)
        least = float((values[2:].square().sum() / values.square().sum()).sqrt())
        off = float((deltaw.delta(model, layer).double() - dW).norm() / dW.norm())
        assert done.errors[layer] == pytest.approx(least, rel=1e-5 if dtype == torch.float32 else 2e-3)
        assert off == pytest.approx(least, rel=1e-4 if dtype == torch.float32 else 2e-2)
        missing += float(values[2:].square().sum())
    whole = sum(float(d.square().sum()) for d in before.values())
    assert done.error == pytest.approx((missing / whole) ** 0.5, rel=1e-5 if dtype == torch.float32 else 2e-3)
    if dtype == torch.bfloat16:
        assert all(A.dtype == dtype for A, _ in peft.read(tmp_path / "out").factors.values())


def test_energy_keeps_the_fewest_directions_that_hold_it(place: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = place
    spectra = deltaw.spectrum(folder)
    done = deltaw.compress(folder, tmp_path / "out", energy=0.8)
    for layer, own in spectra.items():
        r = done.ranks[layer]
        assert own.energy(r) >= 0.8 and (r == 1 or own.energy(r - 1) < 0.8)
    assert {layer: A.shape[0] for layer, (A, _) in peft.read(tmp_path / "out").factors.items()} == done.ranks


def test_all_of_it_is_the_same_file(place: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = place
    done = deltaw.compress(folder, tmp_path / "out", rank=64)
    assert done.error == 0.0
    before, after = peft.read(folder), peft.read(tmp_path / "out")
    assert (before.config, before.metadata, before.scales) == (after.config, after.metadata, after.scales)
    assert all(
        torch.equal(*pair) for n in before.factors for pair in zip(before.factors[n], after.factors[n], strict=True)
    )


@pytest.mark.parametrize("share", [0.45, 0.6, 0.9, 1.0])
def test_so_many_bytes_are_not_exceeded(place: tuple[Path, Any], tmp_path: Path, share: float) -> None:
    folder, _ = place
    limit = int(share * folder_bytes(folder))
    done = deltaw.compress(folder, tmp_path / "out", size=limit)
    assert folder_bytes(tmp_path / "out") <= limit
    # Nothing more would have fitted: one direction more takes at least this
    item = 4 * min(A.shape[1] + B.shape[0] for A, B in peft.read(folder).factors.values())
    full = all(r == 6 for r in done.ranks.values())
    assert full or folder_bytes(tmp_path / "out") > limit - 2 * item - 400
    assert len(set(done.ranks.values())) > 1 or share == 1.0


@given(st.lists(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 400))
def test_an_allocation_is_within_its_budget_and_spends_by_worth(values: list[list[float]], budget: int) -> None:
    spectra = {str(i): Spectrum(tuple(sorted(v, reverse=True)), (5 + i, 7)) for i, v in enumerate(values)}
    ranks = allocated(spectra, budget)
    cost = sum(sum(s.shape) * ranks[n] for n, s in spectra.items())
    assert all(1 <= ranks[n] <= len(s.values) for n, s in spectra.items())
    assert cost <= max(budget, sum(sum(s.shape) for s in spectra.values()))
    left = budget - cost
    for name, own in spectra.items():
        assert ranks[name] == len(own.values) or sum(own.shape) > left  # nothing that fits is left out


def test_the_result_is_read_by_peft(place: tuple[Path, Any], tmp_path: Path) -> None:
    peft_package = pytest.importorskip("peft")
    folder, model = place
    deltaw.compress(folder, tmp_path / "out", energy=0.8)
    deltaw.detach(model)
    ids = torch.randint(3, 96, (2, 9))
    deltaw.load(model, tmp_path / "out")
    ours = model(ids).logits
    deltaw.detach(model)
    theirs = peft_package.PeftModel.from_pretrained(model, tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(ours, theirs)


def test_what_is_beside_a_and_b_stays(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_llama()
    folder = saved(tmp_path / "dora", model, deltaw.DoRA(rank=4, whole="lm_head"))
    deltaw.compress(folder, tmp_path / "out", rank=2)
    before, after = peft.read(folder), peft.read(tmp_path / "out")
    assert before.magnitudes and all(torch.equal(m, after.magnitudes[n]) for n, m in before.magnitudes.items())
    assert before.whole and all(torch.equal(w, after.whole[n]) for n, w in before.whole.items())


def test_slices_stay_in_their_rows(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_gpt2()
    folder = saved(tmp_path / "a", model, deltaw.LoRA(rank=4, targets="qv"))
    before = {n: A.shape[0] for n, (A, _) in peft.read(folder).factors.items()}
    assert set(before.values()) == {8}  # one under the other
    kept = dense(model)
    deltaw.compress(folder, tmp_path / "out", rank=5)
    deltaw.detach(model)
    deltaw.load(model, tmp_path / "out")
    for layer, dW in kept.items():
        cut = deltaw.delta(model, layer)
        assert not cut[32:64].any() and not dW[32:64].any() and cut[:32].any() and cut[64:].any()


def test_what_is_wrong_is_said_and_nothing_written(place: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = place
    out = tmp_path / "out"
    for wrong in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}, {"size": "much"}):
        with pytest.raises(ConfigError):
            deltaw.compress(folder, out, **wrong)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="rank 1 in every layer"):
        deltaw.compress(folder, out, size=100)
    with pytest.raises(FileError, match="no adapter folder"):
        deltaw.compress(tmp_path / "none", out, rank=1)
    assert not out.exists()


def test_the_command(place: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = place
    assert main(["compress", str(folder), "--out", str(tmp_path / "o"), "--energy", "0.9"]) == 0
    assert "over all layers" in capsys.readouterr().out
    assert main(["compress", str(folder), "--out", str(tmp_path / "o"), "--rank", "1", "--overwrite", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["ranks"].values()) == {1}
    assert main(["compress", str(folder), "--out", str(tmp_path / "p")]) == 2
    assert "one of rank, energy and size" in capsys.readouterr().err
