"""One adapter out of several: exact sums, sums cut to a rank, TIES and DARE. No scale is 1."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw import IA3, BitFit, Bottleneck, DoRA, Full, LoRA, Prefix, attach, delta, merge, unmerge, using
from deltaw.errors import AdapterError, MergeError
from deltaw.methods.updates.lowrank import Sliced
from deltaw.model.combine import combine, dare_of, ties_of
from deltaw.model.summary import updates
from tests.conftest import bits, fill, tiny_gpt2, tiny_llama
from tests.methods.updates.test_updates import METHODS
from tests.methods.updates.test_weights import model_of, run


@pytest.fixture
def two(tiny: Any) -> Any:
    fill(attach(tiny, LoRA(rank=4, alpha=10), name="a"), seed=1)
    fill(attach(tiny, LoRA(rank=2, alpha=7, targets="mlp"), name="b"), seed=2)
    return tiny


def expected(model: Any, layer: str, weights: dict[str, float]) -> torch.Tensor:
    """Σ weight·ΔW over the adapters that have the layer."""
    return sum((w * delta(model, layer, n) for n, w in weights.items() if layer in updates(model, n)), torch.zeros(()))


@pytest.mark.parametrize("weights", [{"a": 0.3, "b": -1.7}, {"b": 1.0}, {"a": 1.0}, {"a": -1.0}], ids=str)
def test_a_sum_is_exact_and_merges_to_the_same_bits(two: Any, ids: torch.Tensor, weights: dict[str, float]) -> None:
    made = combine(two, weights, name="sum")
    assert set(made.ranks) == {layer for n in weights for layer in updates(two, n)} and not any(made.errors.values())
    for layer, update in updates(two, "sum").items():
        assert update.rank == sum(updates(two, n)[layer].rank for n in weights if layer in updates(two, n))
        torch.testing.assert_close(delta(two, layer, "sum"), expected(two, layer, weights))
    assert deltaw.adapters(two).active == "b"  # as it was
    merge(two, "sum")
    one = bits(two)
    unmerge(two)
    merge(two, weights=weights)
    assert all(torch.equal(bits(two)[n], w) for n, w in one.items())


def test_an_identity_is_the_adapter_itself(two: Any, ids: torch.Tensor) -> None:
    combine(two, {"a": 1.0}, name="again")
    with using(two, "a"):
        logits = two(ids).logits
    with using(two, "again"):
        torch.testing.assert_close(two(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_task_is_taken_away(two: Any, ids: torch.Tensor) -> None:
    combine(two, {"a": 1.0, "b": 1.0}, name="both")
    combine(two, {"both": 1.0, "b": -1.0}, name="rest")
    for layer in updates(two, "a"):
        torch.testing.assert_close(delta(two, layer, "rest"), delta(two, layer, "a"), atol=1e-5, rtol=1e-4)


def test_a_sum_cut_to_a_rank_says_its_error(two: Any) -> None:
    made = combine(two, {"a": 0.3, "b": -1.7}, name="cut", rank=3, activate=True)
    assert deltaw.adapters(two).active == "cut"
    for layer, error in made.errors.items():
        dW = expected(two, layer, {"a": 0.3, "b": -1.7})
        assert made.ranks[layer] == 3
        assert error == pytest.approx(float((dW - delta(two, layer, "cut")).norm() / dW.norm()), abs=1e-4)
    assert any(error > 0.01 for error in made.errors.values())
    assert max(combine(two, {"a": 2.0, "b": 1.0}, name="whole", rank=6).errors.values()) < 1e-6


def test_ties_trims_elects_and_averages_as_by_hand() -> None:
    one = torch.tensor([[4.0, -3.0, 0.1, 2.0]])
    other = torch.tensor([[-1.0, -5.0, 3.0, 0.2]])
    # the larger half of each: (4, −3, 0, 0) and (0, −5, 3, 0); the signs agree or are alone
    assert torch.equal(ties_of([one, other], 0.5), torch.tensor([[4.0, -4.0, 3.0, 0.0]]))
    # all entries: signs elected + − + +; of the first column only 4 agrees
    assert torch.allclose(ties_of([one, other], 1.0), torch.tensor([[4.0, -4.0, 1.55, 1.1]]))


def test_dare_keeps_the_sum_on_average_and_follows_its_seed() -> None:
    dW = torch.full((200, 200), 2.0)
    made = dare_of([dW, -0.5 * dW], 0.25, torch.Generator().manual_seed(0))
    assert float(made.mean()) == pytest.approx(1.0, abs=0.05) and made.unique().numel() == 4
    assert torch.equal(made, dare_of([dW, -0.5 * dW], 0.25, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_ties_and_dare_make_adapters_that_can_be_saved(two: Any, how: Any, tmp_path: Any) -> None:
    made = combine(two, {"a": 1.0, "b": 0.5}, name="mix", how=how, rank=4, density=0.6, seed=5)
    assert set(made.errors) == set(updates(two, "a")) and all(0 < e < 1 for e in made.errors.values())
    deltaw.save(two, tmp_path / "mix", name="mix")
    deltaw.load(two, tmp_path / "mix", name="back")
    for layer in updates(two, "mix"):
        assert torch.equal(delta(two, layer, "mix"), delta(two, layer, "back"))


def test_all_settings_that_are_wrong_are_one_error(two: Any) -> None:
    with pytest.raises(AdapterError, match=r"(?s)needs a rank.*density is 2"):
        combine(two, {"a": 1.0}, name="x", how="ties", density=2.0)
    with pytest.raises(AdapterError, match=r"taken|attached already"):
        combine(two, {"a": 1.0}, name="b")
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        combine(two, {"c": 1.0}, name="x")
    with pytest.raises(AdapterError, match=r"(?s)weights is empty.*how is 'mean'"):
        combine(two, {}, name="x", how="mean")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"rank is 2.5; it must be a whole number"):
        combine(two, {"a": 1.0}, name="x", rank=2.5)  # type: ignore[arg-type]
    assert deltaw.adapters(two) == ("a", "b")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.5", None, torch.ones(2)], ids=str)
def test_a_weight_is_a_finite_number(two: Any, weight: Any) -> None:
    """A sum of ΔW's times nan was attached without a word."""
    before = bits(two)
    with pytest.raises(AdapterError, match=r"the weight of 'a' is .*(finite|a number).*how is 'mean'"):
        combine(two, {"a": weight, "b": 1.0}, name="x", how="mean")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match=r"the weight of 'a' is .*(finite|a number)"):
        merge(two, weights={"a": weight, "b": 1.0})
    for function, error in ((combine, AdapterError), (merge, MergeError)):
        with pytest.raises(error, match="weights is a list; it must be a mapping of names to numbers"):
            function(two, **{"weights": ["a", "b"]} | ({"name": "x"} if function is combine else {}))
    assert deltaw.adapters(two) == ("a", "b") and all(torch.equal(bits(two)[n], v) for n, v in before.items())


WEIGHTS = {"a": 0.7, "b": -0.4}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_combines_to_what_merging_several_makes(method: str, ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = tiny_llama(tied=False).eval()
    for seed, name in enumerate(WEIGHTS):
        fill(attach(model, METHODS[method], name=name), seed=seed)
    combine(model, WEIGHTS, name="both", rank=32 if "dora" in method else None)  # all that these layers can have
    ids[0, :3] = torch.tensor([5, 7, 90])
    with using(model, "both"):
        branch = model(ids).logits
    merge(model, weights=WEIGHTS)
    torch.testing.assert_close(branch, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_biases_are_combined(ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = tiny_gpt2().eval()
    for seed, name in enumerate(WEIGHTS):
        attach(model, LoRA(rank=2, alpha=5), name=name)
        if name == "a":
            for layer, update in updates(model, name).items():
                update.bias = torch.nn.Parameter(torch.zeros_like(model.get_submodule(layer).bias))
        fill(model, name, seed=seed)
    combine(model, WEIGHTS, name="both")
    with using(model, "both"):
        branch = model(ids).logits
    merge(model, weights=WEIGHTS)
    torch.testing.assert_close(branch, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"tokens": "96,97"}, {"whole": "embed_tokens,lm_head"}], ids=["tokens", "whole"])
def test_vocabularies_of_different_sizes_combine(settings: dict[str, str], ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = tiny_llama().eval()
    for seed, (name, count) in enumerate([("a", 98), ("b", 99)]):
        model = copy.deepcopy(base)
        model.resize_token_embeddings(count)
        fill(attach(model, LoRA(rank=2, alpha=5, targets="qv", **settings)), seed=seed)
        deltaw.load(base, deltaw.save(model, tmp_path / name), name=name)
    combine(base, {"a": 0.5, "b": 0.5}, name="both", activate=True)
    assert base(ids).logits.shape[-1] == (98 if "tokens" in settings else 99)
    base.resize_token_embeddings(99)
    combine(base, {"a": 1.0}, name="same")
    ids[0, :2] = torch.tensor([96, 97])
    with using(base, "a"):
        alone = base(ids).logits
    with using(base, "same"):
        assert torch.equal(base(ids).logits, alone)


CONVOLUTION = LoRA(rank=2, alpha=5, targets="conv")


class Convolved(torch.nn.Module):
    """A convolution and a dense layer, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(6, 10, 3, padding=1)
        self.head = torch.nn.Linear(10, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.one_hot(ids % 6, 6).float().mT
        out: torch.Tensor = self.head(self.conv(x).mT)
        return out


def untied_llama() -> Any:
    return tiny_llama(tied=False)


# A model, the settings of two adapters on it, and the rank at which their sum is whole where there is no exact one
KINDS: dict[str, tuple[Any, tuple[Any, Any], int | None]] = {
    "ranks": (untied_llama, (LoRA(rank=3, alpha=7), LoRA(targets={"q": 2, "down": 5}, alpha=4)), None),
    "rslora": (untied_llama, (LoRA(rank=3, alpha=7, scaling="alpha/sqrt(r)"), LoRA(rank=2, alpha=3)), None),
    "sliced": (tiny_gpt2, (LoRA(rank=2, alpha=5, targets="qv"), LoRA(rank=3, alpha=4, targets="qv")), None),
    "other slices": (tiny_gpt2, (LoRA(rank=2, alpha=5, targets="qv"), LoRA(rank=3, alpha=4, targets="k")), None),
    "slice and whole": (tiny_gpt2, (LoRA(rank=2, alpha=5, targets="q"), LoRA(rank=3, alpha=4, targets="c_attn")), None),
    "pissa": (tiny_gpt2, (LoRA(rank=2, alpha=5, init="pissa"), LoRA(rank=3, alpha=4, init="pissa")), None),
    "pissa and gaussian": (untied_llama, (LoRA(rank=2, alpha=5, init="pissa"), LoRA(rank=3, alpha=4)), None),
    "experts": (lambda: model_of("Mixtral"), (LoRA(rank=2, alpha=5), LoRA(rank=3, alpha=4, targets="down")), None),
    "transposed experts": (lambda: model_of("GPT-OSS"), (LoRA(rank=2, alpha=5), LoRA(rank=3, alpha=4)), None),
    "attention": (lambda: model_of("encoder"), (LoRA(rank=2, alpha=5), LoRA(rank=3, alpha=4)), None),
    "sliced attention": (lambda: model_of("encoder"), (LoRA(rank=2, alpha=5, targets="qv"), LoRA(rank=3)), None),
    "other sizes": (lambda: model_of("attention"), (LoRA(rank=2, alpha=5), LoRA(rank=3, alpha=4)), None),
    "convolution": (Convolved, (CONVOLUTION, LoRA(rank=3, alpha=4, targets="conv,head")), None),
    "embedding": (
        untied_llama,
        (LoRA(rank=2, alpha=5, targets="q,embed_tokens"), LoRA(rank=3, targets="embed_tokens")),
        None,
    ),
    "dora": (tiny_gpt2, (DoRA(rank=2, alpha=5), LoRA(rank=3, alpha=4)), 32),
    "ia3": (tiny_gpt2, (IA3(targets="k,v", inputs="down"), IA3(targets="q,k", inputs="")), None),
    "ia3 alike": (untied_llama, (IA3(norms=True), IA3(norms=True)), None),
    "bitfit": (tiny_gpt2, (BitFit(), BitFit()), None),
    "lora and bitfit": (tiny_gpt2, (LoRA(rank=2, alpha=5, targets="mlp"), BitFit()), None),
    "full": (untied_llama, (Full(), Full()), None),
    "full of experts": (lambda: model_of("Mixtral"), (Full(), Full()), None),
    "tied head": (tiny_llama, (LoRA(rank=2, targets="q", whole="embed_tokens,lm_head"), LoRA(rank=3, targets="q", whole="embed_tokens,lm_head")), None),
    "tokens": (tiny_llama, (LoRA(rank=2, targets="q", tokens="5,7"), LoRA(rank=2, targets="q", tokens="7,9")), None),
}  # fmt: skip


def of_kind(kind: str) -> tuple[Any, int | None]:
    """The model with its two adapters, filled."""
    make, methods, rank = KINDS[kind]
    torch.manual_seed(4)
    model = make().eval()
    for seed, (name, method) in enumerate(zip("ab", methods, strict=True)):
        attach(model, method, name=name)
        for parameter in deltaw.parameters(model, name):
            with torch.no_grad():  # a step from its start
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    return model, rank


def outputs(model: Any, name: str | None) -> torch.Tensor:
    with torch.no_grad(), using(model, name):
        return run(model)


def merged_bits(model: Any, **what: Any) -> dict[str, torch.Tensor]:
    """The base's parameters with these merged; the model is as it was."""
    merge(model, **what, allow_unchanged=True)
    merged = {n: p.clone() for n, p in bits(model).items()}
    unmerge(model)
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_itself(kind: str, tmp_path: Path) -> None:
    model, _ = of_kind(kind)
    made = combine(model, {"a": 1.0}, name="same")
    assert torch.equal(outputs(model, "same"), outputs(model, "a")) and not any(made.errors.values())
    assert len(deltaw.parameters(model, "same")) == len(deltaw.parameters(model, "a"))
    deltaw.load(model, deltaw.save(model, tmp_path / "same", name="same"), name="back")
    torch.testing.assert_close(outputs(model, "back"), outputs(model, "a"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [{"a": -1.0}, {"a": 0.7, "b": -0.4}, {"b": 0.3, "a": 1.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_combined_is_what_merging_several_makes(kind: str, weights: dict[str, float], tmp_path: Path) -> None:
    """Every parameter that one of them changes, by as much; also from the file."""
    model, rank = of_kind(kind)
    before = {n: p.clone() for n, p in bits(model).items()}
    expected = merged_bits(model, weights=weights)
    made = combine(model, weights, name="both", rank=rank)
    assert all(error < 1e-4 for error in made.errors.values())
    both = merged_bits(model, name="both")
    for name, W in expected.items():
        torch.testing.assert_close(both[name], W, rtol=1e-4, atol=1e-5, msg=name)
        assert bool((W - before[name]).any()) == bool((both[name] - before[name]).any())
    if kind == "lora and bitfit" and weights != {"a": -1.0}:
        return  # values beside low-rank updates of other layers: a LoRA with biases, whose file is tests/files/test_store.py's
    deltaw.load(model, deltaw.save(model, tmp_path / "both", name="both"), name="back")
    torch.testing.assert_close(outputs(model, "back"), outputs(model, "both"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
@pytest.mark.parametrize("kind", ["sliced", "pissa", "experts", "transposed experts", "attention", "convolution"])
def test_cut_to_a_rank_each_weight_says_its_error(kind: str, how: Any) -> None:
    model, _ = of_kind(kind)
    weights = {"a": 0.7, "b": -1.3}
    made = combine(model, weights, name="cut", how=how, rank=2, density=0.5)
    of_adapters = {n for name in weights for n, u in updates(model, name).items() for n in names_of(n, u)}
    assert set(made.ranks) == set(made.errors) == of_adapters and set(made.ranks.values()) == {2}
    assert all(0 <= error < 1 for error in made.errors.values()) and any(made.errors.values())
    if how == "sum":
        for layer, error in made.errors.items():
            has = [n for n in weights if layer in {m for k, u in updates(model, n).items() for m in names_of(k, u)}]
            dW = sum((weights[n] * delta(model, layer, n) for n in has), torch.zeros(()))
            assert error == pytest.approx(float((dW - delta(model, layer, "cut")).norm() / dW.norm()), abs=1e-4)


def names_of(layer: str, update: Any) -> list[str]:
    return [layer if own == "weight" else f"{layer}.{own}" for own in update.low_rank()]


def test_ties_of_a_stack_are_those_of_its_matrices() -> None:
    """With all that one matrix can have as the rank, nothing is left out."""
    model, _ = of_kind("transposed experts")
    name = "model.layers.1.mlp.experts.down_proj"
    combine(model, {"a": 0.7, "b": -1.3}, name="t", how="ties", rank=32, density=0.4)
    a, b = 0.7 * delta(model, name, "a"), -1.3 * delta(model, name, "b")
    expected = torch.stack([ties_of([one, other], 0.4) for one, other in zip(a, b, strict=True)])
    torch.testing.assert_close(delta(model, name, "t"), expected, rtol=1e-3, atol=1e-4)


def test_slices_stay_slices() -> None:
    model, _ = of_kind("sliced")
    combine(model, {"a": 1.0, "b": -2.0}, name="both")
    for update in updates(model, "both").values():
        assert isinstance(update, Sliced) and update.rank == 2 * 5
    assert sum(p.numel() for p in deltaw.parameters(model, "both")) == sum(
        p.numel() for name in "ab" for p in deltaw.parameters(model, name)
    )


def test_what_layers_share_stays_shared() -> None:
    model, _ = of_kind("tied head")
    for name, weights in {"sum": {"a": 0.5, "b": 0.7}, "same": {"a": 1.0}}.items():
        combine(model, weights, name=name)
        assert len(deltaw.parameters(model, name)) == len(deltaw.parameters(model, "a"))


def test_float64_is_summed_in_float64() -> None:
    torch.manual_seed(1)
    model = untied_llama().double().eval()
    fill(attach(model, LoRA(rank=2, alpha=5), name="a"))
    combine(model, {"a": -1.0}, name="minus")
    combine(model, {"a": 1.0, "minus": 1.0}, name="zero")
    assert (outputs(model, "zero") - outputs(model, None)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("methods", "settings", "what"),
    [
        (
            (Bottleneck(size=4), Bottleneck(size=4)),
            {},
            r"(?s)model\.layers\.0\.self_attn\.o_proj: a bottleneck .* no sum",
        ),
        ((Prefix(length=3), LoRA(rank=2)), {}, "prefix"),
        ((DoRA(rank=2), DoRA(rank=2)), {}, "DoRA has no rank of its own"),
        ((IA3(), IA3(targets="k", inputs="v")), {}, "scale its inputs, others its outputs"),
        ((IA3(), LoRA(rank=2)), {}, "train it whole, others by an update"),
        ((IA3(), IA3()), {"how": "ties", "rank": 2}, "it is scaled, which ties"),
        ((LoRA(rank=2, targets="q"), Full()), {}, "train it whole, others by an update"),
        ((Full(), Full()), {"how": "dare", "rank": 2}, "it is trained whole, which dare"),
    ],
)
def test_what_has_no_sum_is_refused_as_what_it_is(methods: Any, settings: dict[str, Any], what: str) -> None:
    torch.manual_seed(1)
    model = untied_llama().eval()
    for name, method in zip("ab", methods, strict=True):
        attach(model, method, name=name)
    with pytest.raises(AdapterError, match=what):
        combine(model, {"a": 1.0, "b": 1.0}, name="x", **settings)
    assert deltaw.adapters(model) == ("a", "b")
    combine(model, {"a": 1.0}, name="same")  # as it is
    assert torch.equal(outputs(model, "same"), outputs(model, "a"))
