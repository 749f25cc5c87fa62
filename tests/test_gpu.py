"""The life of an adapter on a GPU: what must be the same as on a CPU bit for bit, and what close to it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw import DoRA, LoRA, attach, load, merge, parameters, route, save, unmerge, use, using
from deltaw.files.identity import base_fingerprint
from tests.conftest import bits, byte_llama, fill, tiny_llama
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.runs.test_train import METHOD, RECORDS, quick

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["a", "b", None, "a", "c", None]


@pytest.mark.parametrize("keep", ["copy", "correction"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_bits_are_the_cpus_and_unmerge_is_exact(tiny: Any, dtype: torch.dtype, keep: str) -> None:
    before = bits(fill(attach(tiny.to(dtype), LoRA(rank=5, alpha=7))))
    there = copy.deepcopy(tiny).cuda()
    merge(tiny, keep=keep)
    merge(there, keep=keep)
    assert all(torch.equal(bits(there)[n].cpu(), v) for n, v in bits(tiny).items())
    unmerge(there)
    assert all(torch.equal(bits(there)[n].cpu(), v) for n, v in before.items())


def test_dora_and_sums_merge_to_the_cpus_bits() -> None:
    torch.manual_seed(5)
    model = tiny_llama().to(torch.bfloat16).eval()
    fill(attach(model, DoRA(rank=3, alpha=4), name="a"), "a")
    fill(attach(model, LoRA(rank=2, alpha=4), name="b"), "b", seed=6)
    there = copy.deepcopy(model).cuda()
    for chosen in ({"name": "a"}, {"weights": {"a": 0.4, "b": -1.3}}):
        merge(model, **chosen)
        merge(there, **chosen)
        assert all(torch.equal(bits(there)[n].cpu(), v) for n, v in bits(model).items())
        unmerge(model)
        unmerge(there)


def test_a_base_has_one_fingerprint(tiny: Any) -> None:
    assert str(base_fingerprint(tiny)) == str(base_fingerprint(copy.deepcopy(tiny).cuda()))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_file_goes_from_one_device_to_the_other(tiny: Any, tmp_path: Path, dtype: torch.dtype | None) -> None:
    there = copy.deepcopy(tiny).cuda()
    save(fill(attach(there, LoRA(rank=4, alpha=6))), tmp_path / "a")
    load(tiny, tmp_path / "a", dtype=dtype)
    load(there, tmp_path / "a", name="again", dtype=dtype)
    assert {p.device.type for p in parameters(there, "again")} == {"cuda"}
    for own, other in zip(parameters(tiny), parameters(there, "again"), strict=True):
        assert torch.equal(own, other.cpu()) and own.dtype == (dtype or torch.float32)


def three(model: Any, folder: Path) -> Any:
    """A model on the GPU with adapters a, b of one rank and c of another."""
    for seed, (name, rank) in enumerate({"a": 4, "b": 4, "c": 2}.items()):
        fill(attach(model, LoRA(rank=rank, alpha=4), name=name), name, seed=seed)
        save(model, folder / name, name=name)
        deltaw.detach(model, name)
    model.cuda()
    for name in "abc":
        load(model, folder / name, name=name, activate=False)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_as_each_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    model = three(tiny_llama().to(dtype).eval(), tmp_path)
    ids = torch.randint(3, 96, (len(NAMES), 11), device="cuda")
    with torch.inference_mode(), route(model, NAMES):
        mixed = model(ids).logits
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for row, name in enumerate(NAMES):
        with torch.inference_mode(), using(model, name):
            own = model(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(mixed[row], own, rtol=tolerance, atol=tolerance)


def test_rows_have_gradients_and_generate(tmp_path: Path) -> None:
    torch.manual_seed(8)
    model = three(tiny_llama().eval(), tmp_path)
    ids = torch.randint(3, 96, (len(NAMES), 11), device="cuda")
    for name in "abc":
        for parameter in parameters(model, name):
            parameter.requires_grad_(True)
    with route(model, NAMES):
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n in "abc" for p in parameters(model, n))
    with torch.no_grad(), route(model, NAMES):
        texts = model.generate(ids, max_new_tokens=6, num_beams=2, do_sample=False)
    with torch.no_grad(), using(model, "c"):
        alone = model.generate(ids[4:5], max_new_tokens=6, num_beams=2, do_sample=False)
    assert torch.equal(texts[4, : alone.shape[1]], alone[0])


def test_compiled_code_switches(tmp_path: Path) -> None:
    torch.manual_seed(9)
    model = three(tiny_llama(layers=1).eval(), tmp_path)
    ids = torch.randint(3, 96, (2, 7), device="cuda")
    compiled = torch.compile(model)
    for name in ("a", "b", None, "a"):
        use(model, name)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns_there_and_its_file_is_good_here(tmp_path: Path, dtype: str) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    model = byte_llama(tokenizer, tie_word_embeddings=True).to(getattr(torch, dtype)).cuda()
    result = deltaw.train(model, RECORDS, quick(tmp_path), method=METHOD, tokenizer=tokenizer)
    lines = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    losses = [line["valid_loss"] for line in lines if line["event"] == "eval"]
    assert losses[-1] < losses[0] - 0.1
    here = byte_llama(tokenizer, tie_word_embeddings=True).to(getattr(torch, dtype))
    load(here, result.folder / "adapter")
    for own, other in zip(parameters(here), parameters(model), strict=True):
        assert torch.equal(own, other.cpu())


def test_a_run_and_its_samples_leave_the_gpus_random_numbers(tmp_path: Path) -> None:
    from deltaw.config import GenerateConfig
    from deltaw.model.generate import generate

    tokenizer = tiny_tokenizer(CHATML)
    model = byte_llama(tokenizer, tie_word_embeddings=True).cuda()
    config = quick(tmp_path, steps=3, overwrite=True)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        method = LoRA(rank=4, alpha=6, dropout=0.3)
        deltaw.train(model, RECORDS, config, method=method, tokenizer=tokenizer)
        said = generate(model, tokenizer, [[5, 6], [7]], GenerateConfig(max_new_tokens=5, temperature=1.0))
        assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])
        found.append((said, [p.detach().clone() for p in parameters(model)]))
        deltaw.detach(model)
    assert found[0][0] == found[1][0]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found[0][1], found[1][1], strict=True))
