"""A recommended rank trained again, beside the run's own: does it hold? Knows a finished run and sweeps; nothing of cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaw.config import RankConfig, SweepConfig, TrainConfig
from deltaw.errors import ConfigError, listing
from deltaw.finished import Finished
from deltaw.sweeping import Progress, sweep


def check_confirmable(run: Finished) -> None:
    """Raises ConfigError for a run that a sweep cannot repeat."""
    method, problems = run.method(), []
    if not isinstance(method.targets, str) or "=" in method.targets:
        problems.append(f"targets is {method.targets!r}; a sweep has one rank for all layers")
    if method.tokens or method.norms:
        problems.append("tokens or norms were trained too")
    problems += [f"its {key} is not a file, folder or hub name" for key in ("model", "data") if run.named(key) is None]
    if problems:
        raise ConfigError(listing(f"{run.path} cannot be confirmed by training again:", problems))


def confirmed(
    run: Finished, config: RankConfig, rank: int, folder: Path, on_event: Callable[[Progress], None]
) -> dict[str, Any]:
    """`rank` and the adapter's own, trained as the run was, scored on other records than those that chose."""
    method, model, data = run.method(), config.model or run.named("model"), config.data or run.named("data")
    assert model is not None and data is not None
    options = SweepConfig(
        ranks=f"{run.rank},{rank}", targets=str(method.targets), seeds=config.seeds, scaling=method.scaling, alpha=method.alpha,
        init=method.init, dropout=method.dropout, margin=config.margin, metrics=config.metrics,
        method="dora" if run.settings.get("method") == "dora" else "lora",
    )  # fmt: skip
    training: TrainConfig = dataclasses.replace(run.config(), out=str(folder), overwrite=False)
    done = sweep(model, data, training, options, on_event=on_event)
    choice = next(iter(done.choices.values()), None)
    if choice is None:
        return {"failed": "; ".join(row["error"] for row in done.results["rows"] if "error" in row)}
    small, large = choice.tested
    return {
        "held": small.enough, "rank": rank, "full": run.rank, "loss": dataclasses.asdict(small.loss),
        "full_loss": dataclasses.asdict(large.loss), "difference": dataclasses.asdict(small.difference),
        "margin": choice.margin, "seeds": config.seeds, "report": str(done.report),
    }  # fmt: skip
