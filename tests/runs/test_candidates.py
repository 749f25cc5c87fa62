"""The candidates of a sweep: ranks and targets, or what a budget of parameters allows."""

from __future__ import annotations

import pytest

import deltaw
from deltaw.config import SweepConfig
from deltaw.errors import ConfigError, TargetError
from deltaw.runs.candidates import Candidate, candidates, choices_of_targets, learning_rates, numbers
from tests.conftest import tiny_llama


def test_the_ranks_share_the_first_ones_alpha() -> None:
    found = candidates(SweepConfig(ranks="8, 1,16", targets="qv; mlp"), tiny_llama()).candidates
    assert [(c.targets, c.rank) for c in found] == [(t, r) for t in ("qv", "mlp") for r in (8, 1, 16)]
    assert {c.method.alpha for c in found} == {8.0}
    assert [c.method.scale(c.rank) for c in found[:3]] == [1.0, 8.0, 0.5]
    (dora,) = candidates(SweepConfig(ranks="4", alpha=2.0, method="dora"), tiny_llama()).candidates
    assert dora.method == deltaw.DoRA(rank=4, alpha=2.0)


def test_a_budget_sets_the_ranks() -> None:
    model = tiny_llama()
    options = SweepConfig(budget="1k")
    found = candidates(options, model).candidates
    assert (
        [c.targets for c in found] == choices_of_targets(options) == ["q", "v", "q,v", "q,k,v,o", "mlp", "all-linear"]
    )
    for each in found:
        own, less, more = (_size(each, max(1, each.rank + i)) for i in (0, -1, 1))
        assert abs(own - 1000) <= min(abs(less - 1000), abs(more - 1000)) or each.rank == 1


def test_targets_that_cannot_hold_the_budget_are_left_out() -> None:
    """v has 16 rows here: at most 1,536 parameters. Of all layers, only some are larger than the rank that the others can have."""
    tried = candidates(SweepConfig(budget="2.5k"), tiny_llama())
    assert list(tried.left_out) == ["v"] and "more than its layers have rows" in tried.left_out["v"]
    assert [c.targets for c in tried.candidates] == ["q", "q,v", "q,k,v,o", "mlp", "all-linear"]
    every = candidates(SweepConfig(budget="20k", targets="all-linear"), tiny_llama()).candidates[0]
    assert "model.layers.0.self_attn.v_proj" in every.method.plan(tiny_llama()).left_out
    assert abs(_size(every, every.rank) - 20_000) < 700
    with pytest.raises(TargetError, match=r"No choice of targets can hold this budget:(.|\n)*all-linear: 1,000,000"):
        candidates(SweepConfig(budget="1M"), tiny_llama())


def _size(candidate: Candidate, rank: int) -> int:
    model = tiny_llama()
    deltaw.attach(model, deltaw.LoRA(rank=rank, targets=candidate.targets))
    return sum(p.numel() for p in deltaw.parameters(model))


def test_all_that_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError) as error:
        candidates(SweepConfig(ranks="8,x,0,8", lrs="1e-3,-1", budget="much"), tiny_llama())
    for part in ("ranks: 'x' is not a whole number", "'0' is not", "8 is there twice", "lrs: '-1'", "budget: 'much'"):
        assert part in str(error.value)
    with pytest.raises(TargetError):
        candidates(SweepConfig(targets="qv;nothing"), tiny_llama())
    with pytest.raises(TargetError, match="is larger than min"):
        candidates(SweepConfig(ranks="8,17", targets="v"), tiny_llama())
    assert learning_rates(SweepConfig(), 3e-4) == [3e-4]


@pytest.mark.parametrize(
    ("text", "count"),
    [("1k", 1000), ("0.5k", 500), ("1500", 1500), (" 2.25k ", 2250), ("0.001M", 1000), ("0.000001B", 1000)],
)
def test_a_budget_is_read_in_its_unit(text: str, count: int) -> None:
    (found,) = candidates(SweepConfig(budget=text, targets="q"), tiny_llama()).candidates
    (plain,) = candidates(SweepConfig(budget=str(count), targets="q"), tiny_llama()).candidates
    assert found == plain


def test_numbers_are_those_above_0_each_once() -> None:
    problems: list[str] = []
    assert numbers("3, 1,,2", int, "ranks", problems) == [3, 1, 2] and not problems
    assert numbers("1e-3,inf,nan,-1,0,2", float, "lrs", problems) == [1e-3, 2.0]
    assert [line.split("'")[1] for line in problems] == ["inf", "nan", "-1", "0"]
    assert numbers("1,1.0", float, "lrs", problems := []) == [1.0] and problems == ["lrs: 1.0 is there twice"]
    assert not numbers(" , ", int, "ranks", problems := []) and problems == ["ranks: there is none"]


def test_each_choice_of_targets_is_tried_once_and_alpha_may_be_given() -> None:
    assert choices_of_targets(SweepConfig(targets="qv; mlp;qv;")) == ["qv", "mlp"]
    assert choices_of_targets(SweepConfig()) == ["all-linear"]
    found = candidates(
        SweepConfig(ranks="2,4", alpha=3.0, scaling="alpha/sqrt(r)", dropout=0.1), tiny_llama()
    ).candidates
    assert {c.method.alpha for c in found} == {3.0} and {c.method.dropout for c in found} == {0.1}
    assert found[1].method.scale(4) == 1.5 and found[1].name == "r = 4, all-linear"
    of_budget = candidates(SweepConfig(budget="1k", targets="q", ranks="5"), tiny_llama()).candidates
    assert of_budget[0].method.alpha == 5.0  # the first rank's there too
    assert learning_rates(SweepConfig(lrs="1e-3,2e-3"), 1.0) == [1e-3, 2e-3]
