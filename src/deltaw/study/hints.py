"""Rules of thumb about rank, capacity and learning rate, each with its source and what it says here. Never results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_BITS = 2  # of knowledge that a parameter holds


def hints(results: Mapping[str, Any]) -> list[list[str]]:
    """Rule, what it comes to, source. `results`: what rank.json holds."""
    return [*_capacity(results), _rate(results), _scale(results)]


def _capacity(results: Mapping[str, Any]) -> list[list[str]]:
    """Bits that the parameters hold, against bits that there were to learn."""
    supervised, first = results["loop"].get("supervised"), results["loop"].get("first_loss")
    if not supervised or not first:
        return []
    wanted = supervised * first / math.log(2)
    row = next(r for r in results["ranks"] if r["rank"] == results["rank"])
    holds = _BITS * row["parameters"]
    verdict = "there is room" if holds >= wanted else "it may bind: if a larger rank scores better, this is a reason"
    return [[
        f"A parameter holds about {_BITS} bits; where there is more to learn, LoRA falls behind full fine-tuning.",
        f"r = {row['rank']} holds {_amount(holds)} bits; the run's {supervised:,} predictions, at {first:.2f} nats each before "
        f"training, had at most {_amount(wanted)} to learn: {verdict}.",
        "Allen-Zhu and Li 2024 (arXiv 2404.05405); Schulman et al. 2025, LoRA Without Regret",
    ]]  # fmt: skip


def _rate(results: Mapping[str, Any]) -> list[str]:
    lr = results["settings"].get("lr")
    here = f"This run's {lr:.2g} is what full fine-tuning would do with at about {lr / 10:.2g}." if lr else "–"
    return [
        "LoRA's best learning rate is about ten times full fine-tuning's.",
        here,
        "Schulman et al. 2025, LoRA Without Regret",
    ]


def _scale(results: Mapping[str, Any]) -> list[str]:
    settings = results["settings"]
    # Where none was given, α is the rank
    alpha = settings.get("alpha") or (results["ranks"][-1]["rank"] if settings else None)
    here = (
        f"To train at another rank, keep {'the same α' if alpha is None else f'α = {alpha:g}'} and the learning rate."
    )
    if settings.get("scaling", "alpha/r") != "alpha/r":
        here = "This run's scale is α/√r, of which this is not said."
    return [
        "With α the same for all ranks, a scale of α/r, the best learning rate hardly depends on the rank.",
        here,
        "Hu et al. 2021, section 4.1 (α is set to the first r tried, and not tuned); Schulman et al. 2025",
    ]


def _amount(bits: float) -> str:
    for unit in ("", "k", "M", "G"):
        if bits < 999.5:  # what rounds to 1000 is 1k
            return f"{bits:.3g}{unit}"
        bits /= 1000
    return f"{bits:.3g}T"
