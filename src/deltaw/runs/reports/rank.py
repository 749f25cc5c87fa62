"""A run's results about its rank as a Report, as sentences and as table rows, with rules of thumb and their sources. Knows
results; nothing of models or HTML."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence

from deltaw.files import units
from deltaw.layers.names import brief, by_family
from deltaw.runs.evaluation.bootstrap import Choice, figure
from deltaw.runs.evaluation.metrics import limits
from deltaw.runs.memory.machine import foot, placeless
from deltaw.runs.reports.compare import BY_ITEM, ONE_SEED, interval, score, settings_rows
from deltaw.runs.reports.directions import alike_maps, alike_tables
from deltaw.runs.reports.page import Chart, Report, Series, Table
from deltaw.runs.reports.sweep import why_no_smaller
from deltaw.runs.results.rank import Allocated, LayerSpectrum, NotConfirmed, RankResults, RankRow
from deltaw.runs.results.scores import HasInterval

FIRST = ("r", "parameters", "adapter", "with optimizer")
LAST = ("‖ΔW‖² kept", "training", "FLOPs/token")
# Table 7 of the paper: GPT-3's 48th layer, W_q
_PAPER = (
    "The paper's figures (Table 7, W_q of GPT-3's 48th layer): at r = 4 0.32 with the directions of ΔW, 21.67 with W's own, 0.02 "
    "with random ones, ‖W‖ 61.95, ‖ΔW‖ 6.91, a factor of 21.5; at r = 64 1.90, 37.71, 0.33 and ‖ΔW‖ 3.57, a factor of 1.9."
)


def sentence(results: RankResults) -> str:
    """Return the recommendation, its evidence and its cost."""
    row, largest = results.recommended, results.largest
    text = f"r = {row.rank}: {units.size(row.bytes)}, {results.by} {row.tested.loss}"
    if row.rank != largest.rank:
        text += f" against {figure(largest.tested.loss.value)} at r = {largest.rank}"
    return f"{text}, on {results.records.what}, held out."


def remarks(results: RankResults) -> list[str]:
    """Return what else there is to know about the recommendation, what the run warned of first."""
    texts = [f"The run itself warned: {warning}" for warning in results.warnings if warning != results.records.overlap]
    if results.rank == results.largest.rank > 1:
        texts.append(
            "No smaller rank is shown to be enough: train at a larger one to see whether it would be better, or score more "
            "records (--records, --most), which makes intervals narrower."
        )
    choice = Choice(results.rank, results.margin, [row.tested for row in results.ranks], results.by)
    texts += [f"{reason}." for reason in why_no_smaller(choice)]
    base = results.base
    if base is not None and not base.less_adapter.low > 0:
        texts.append(
            f"The adapter is not shown to be better than the base, whose {results.by} is {figure(base.loss)}: "
            "what rank it needs says little."
        )
    if results.records.stopped_by:
        texts.append("The run was stopped by these records (--patience), so their losses are a little too good.")
    texts += [results.records.overlap] if results.records.overlap else []
    texts += [_better(row, results.by) for row in results.allocated if row.better]
    return texts + confirmation(results)


def _better(row: Allocated, by: str) -> str:
    return (
        f"With the parameters of r = {row.rank}, ranks by layer do better than one rank everywhere: {by} "
        f"{row.loss.value:.4f}, a difference of {interval(row.difference)}. "
        f"`deltaw compress --bytes {row.bytes}` makes that."
    )


def confirmation(results: RankResults) -> list[str]:
    """Return what training again came to; nothing where --confirm was not given."""
    outcome = results.confirmed
    if outcome is None:
        return []
    if isinstance(outcome, NotConfirmed):
        return [f"Training again failed: {outcome.failed}"]
    verdict = "It held" if outcome.held else "It did not hold"
    seeds = "one run" if outcome.seeds == 1 else f"{outcome.seeds} runs"
    return [
        f"{verdict} when trained again ({seeds} each): at r = {outcome.rank} {results.by} {interval(outcome.loss)}, at "
        f"r = {outcome.full} {outcome.full_loss.value:.4f}; the difference is {interval(outcome.difference)}, the margin "
        f"{outcome.margin:.4f}."
    ]


def cells(row: RankRow, largest: int, metrics: Sequence[str]) -> list[str]:
    """Return one rank as text: FIRST, the figure that decides, its difference from the largest rank's, whether it is enough, the
    metrics, and LAST."""
    memory = units.size(row.cost.memory) if row.cost is not None else "–"
    flops = row.cost.flops_per_token if row.cost is not None else None
    difference = "–" if row.rank == largest else interval(row.tested.difference)
    return [
        str(row.rank), f"{row.parameters:,}", units.size(row.bytes), units.size(row.bytes_with_optimizer),
        interval(row.tested.loss), difference, "yes" if row.tested.enough else "no",
        *(score(row.scores[m]) for m in metrics), f"{row.energy:.1%}", memory, "–" if flops is None else f"{flops:.3g}",
    ]  # fmt: skip


def rank_report(results: RankResults) -> Report:
    """Return the page about a run's rank."""
    tables = [
        _ranks(results),
        *_other_scores(results),
        *_allocated(results),
        *alike_tables(results.alike),
        *_amplified(results),
    ]
    tables += [Table("Rules of thumb", ["rule", "here", "source"], hints(results), note=_HINTS)]
    tables += [_layers(results.layers), Table("Settings", ["setting", "value"], _settings(results))]
    return Report(
        title=f"Which rank? {placeless(results.run)}",
        headline=sentence(results),
        curves=_curves(results),
        maps=alike_maps(results.alike),
        tables=tables,
        warnings=remarks(results),
        commands=_commands(results),
        footer=foot(results.environment),
    )


_HINTS = (
    "What others found on other data, to begin with where nothing was measured. No result of this page rests on it."
)


def _ranks(results: RankResults) -> Table:
    largest = results.largest.rank
    count = len(results.ranks) - 1
    note = (
        f"The adapter that was trained at r = {largest}, cut to its first r directions in each layer, as `deltaw compress` "
        f"does, and scored on {results.records.what}. {BY_ITEM}Differences are taken item by item. {ONE_SEED} A rank is "
        f"enough if the interval of the difference ends below the margin of {results.margin:.4f}. The tests go down from r = "
        f"{largest} and end at the first that fails; so {count} comparisons err together no more often than one (5%). "
        "Training is the peak of memory of a run at that rank."
    )
    columns = [*FIRST, results.by, f"less that of r = {largest}", "enough", *LAST]
    rows = [cells(row, largest, ()) for row in results.ranks]
    return Table("What each rank costs, and what it loses", columns, rows, note)


def _other_scores(results: RankResults) -> list[Table]:
    if not results.metrics:
        return []
    rows = [[str(row.rank), *(score(row.scores[metric]) for metric in results.metrics)] for row in results.ranks]
    return [Table("Other scores of each rank", ["r", *results.metrics], rows, "They chose nothing.")]


def _allocated(results: RankResults) -> list[Table]:
    if not results.allocated:
        return []
    rows = [
        [row.rank, f"{row.parameters:,}", f"{min(row.ranks.values())} to {max(row.ranks.values())}", interval(row.loss),
         interval(row.difference), "yes" if row.better else "no"]
        for row in results.allocated
    ]  # fmt: skip
    note = (
        "As many parameters as one rank everywhere takes, spent one direction after the other where a parameter keeps the most "
        f"of ‖ΔW‖². Better: the 95% interval of the difference is below 0; {len(rows)} comparisons, nothing taken off for their "
        "number."
    )
    columns = ["parameters of r", "parameters", "ranks", results.by, "less that of one rank everywhere", "better"]
    return [Table("Ranks by layer", columns, rows, note)]


def _amplified(results: RankResults) -> list[Table]:
    if not results.amplified:
        return []
    rows = []
    for row in results.amplified:
        a = row.amount
        figures = (a.by_update, a.by_weight, a.by_chance, a.weight, a.update, a.factor)
        rows.append([row.layer, *(f"{figure:.3g}" for figure in figures)])
    title = f"How ΔW lies to W, r = {results.amplified[0].amount.rank}"
    columns = ["layer", "‖UᵀWVᵀ‖, U, V of ΔW", "of W", "random", "‖W‖", "‖ΔW‖", "factor"]
    note = (
        "The factor is ‖ΔW‖ / ‖UᵀWVᵀ‖: by how much training amplifies directions that W has already, but does not stress. Of "
        f"each kind of layer the one in the middle of the model. {_PAPER}"
    )
    return [Table(title, columns, rows, note)]


def _layers(layers: Sequence[LayerSpectrum]) -> Table:
    rows = [
        [layer.layer, " × ".join(map(str, layer.shape)), f"{layer.norm:.3g}", f"{layer.effective_rank:.1f}", layer.rank_90,
         layer.rank_99, len(layer.values)]
        for layer in layers
    ]  # fmt: skip
    note = (
        "Effective rank is exp of the entropy of σ/Σσ (Roy and Vetterli 2007): n equal directions count n. What holds 90% of "
        "‖ΔW‖² need not hold 90% of what was learned; that the losses say."
    )
    return Table("Spectra", ["layer", "d × k", "‖ΔW‖", "effective rank", "r of 90%", "r of 99%", "rank"], rows, note)


def _settings(results: RankResults) -> list[list[object]]:
    return settings_rows(results.options) + settings_rows(results.settings)


# --- pictures -----------------------------------------------------------------------------------------------------


def _curves(results: RankResults) -> list[Chart]:
    rows = results.ranks
    ranks = [row.rank for row in rows]
    charts = [_differences(results), _against(results.by, [row.tested.loss for row in rows], ranks, note=_CURVE)]
    charts += [_against(m, [row.scores[m] for row in rows], ranks) for m in results.metrics]
    return [*charts, _spectrum_chart(results.layers), _depth_chart(results.layers)]


_CURVE = "Bars are 95% intervals over the items, most of which is how items differ from each other, not ranks."


def _differences(results: RankResults) -> Chart:
    """Return the differences from the largest rank, with the margin that decides."""
    ranks, largest = [row.rank for row in results.ranks], results.largest.rank
    differences = [(row.rank, row.tested.difference) for row in results.ranks[:-1]]
    spans = [(rank, d.low, d.high) for rank, d in differences]
    series = [
        Series("difference", [(rank, d.value) for rank, d in differences], spans=spans),
        Series("margin", [(rank, results.margin) for rank in ranks]),
    ]
    note = "Bars are 95% intervals, by item in pairs. A rank is enough if its bar and those of all larger ones end below it."
    title = f"What cutting loses: held-out {results.by} at r, less that at r = {largest}"
    return Chart(title, "r", results.by, series, log_x=True, x_ticks=ranks, note=note)


def _against(what: str, scores: Sequence[HasInterval], ranks: Sequence[int], note: str = "") -> Chart:
    points = [(rank, s.value) for rank, s in zip(ranks, scores, strict=True)]
    spans = [(rank, s.low, s.high) for rank, s in zip(ranks, scores, strict=True)]
    series = [Series(what, points, spans=spans)]
    title, most = f"{what} against rank", limits(what)[1]
    return Chart(title, "r", what, series, log_x=True, x_ticks=ranks, y_most=most, note=note)


def _spectrum_chart(layers: Sequence[LayerSpectrum]) -> Chart:
    """Return the mean spectrum of each kind of layer."""
    series = []
    for name, alike in _families(layers).items():
        shares = [[v / layer.values[0] for v in layer.values] for layer in alike if layer.values[0] > 0]
        length = min((len(s) for s in shares), default=0)
        means = [math.fsum(s[i] for s in shares) / len(shares) for i in range(length)]
        series.append(Series(name, [(i + 1, v) for i, v in enumerate(means) if v > 1e-6]))
    return Chart("Singular values of ΔW", "i", "σᵢ / σ₁", series, log_y=True)


def _depth_chart(layers: Sequence[LayerSpectrum]) -> Chart:
    series = []
    for name, alike in _families(layers).items():
        numbered = [(re.findall(r"\b\d+\b", layer.layer), layer.effective_rank) for layer in alike]
        points = [(int(numbers[0]), value) for numbers, value in numbered if numbers]
        if len(points) > 1:
            series.append(Series(name, points))
    return Chart("Effective rank by depth", "block", "effective rank", series)


def _families(layers: Sequence[LayerSpectrum]) -> dict[str, list[LayerSpectrum]]:
    """Return the layers that differ in their number alone, by a brief name."""
    by_name = {layer.layer: layer for layer in layers}
    families = by_family(by_name)
    names = brief(list(families))
    return {names[name]: [by_name[n] for n in alike] for name, alike in families.items()}


def _commands(results: RankResults) -> list[str]:
    run, rank = results.run, results.rank
    if rank == results.largest.rank:
        return []
    adapter = f"{run}/adapter" if results.settings else run
    cut = f"deltaw compress {shlex.quote(adapter)} --rank {rank} -o {shlex.quote(f'{run}-r{rank}')}"
    return [cut] if results.confirmed else [cut, f"deltaw rank {shlex.quote(run)} --confirm"]


# --- rules of thumb -----------------------------------------------------------------------------------------------

_BITS = 2  # of knowledge that a parameter holds


def hints(results: RankResults) -> list[list[str]]:
    """Return each rule of thumb, what it comes to for this run, and its source."""
    return [
        *_capacity(results.loop, results.recommended),
        _rate(results.settings),
        _scale(results.settings, results.largest.rank),
    ]


def _capacity(loop: Mapping[str, object], row: RankRow) -> list[list[str]]:
    """Compare the bits that the parameters hold with those that there were to learn."""
    supervised, first = loop.get("supervised"), loop.get("first_loss")
    if not isinstance(supervised, int) or not isinstance(first, (int, float)) or not supervised or not first:
        return []
    wanted = supervised * first / math.log(2)
    holds = _BITS * row.parameters
    verdict = "there is room" if holds >= wanted else "it may bind: if a larger rank scores better, this is a reason"
    return [[
        f"A parameter holds about {_BITS} bits; where there is more to learn, LoRA falls behind full fine-tuning.",
        f"r = {row.rank} holds {_amount(holds)} bits; the run's {supervised:,} predictions, at {first:.2f} nats each before "
        f"training, had at most {_amount(wanted)} to learn: {verdict}.",
        "Allen-Zhu and Li 2024 (arXiv 2404.05405); Schulman et al. 2025, LoRA Without Regret",
    ]]  # fmt: skip


def _rate(settings: Mapping[str, object]) -> list[str]:
    lr = settings.get("lr")
    here = "–"
    if isinstance(lr, (int, float)) and lr:
        here = f"This run's {lr:.2g} is what full fine-tuning would do with at about {lr / 10:.2g}."
    return [
        "LoRA's best learning rate is about ten times full fine-tuning's.",
        here,
        "Schulman et al. 2025, LoRA Without Regret",
    ]


def _scale(settings: Mapping[str, object], rank: int) -> list[str]:
    # Where none was given, α is the rank
    alpha = settings.get("alpha") or (rank if settings else None)
    here = (
        f"To train at another rank, keep {'the same α' if alpha is None else f'α = {alpha:g}'} and the learning rate."
    )
    if settings.get("scaling", "alpha/r") != "alpha/r":
        here = "This run's scale is α/√r, for which this does not hold."
    return [
        "With α the same for all ranks, a scale of α/r, the best learning rate hardly depends on the rank.",
        here,
        "Hu et al. 2021, section 4.1 (α is set to the first r tried, and not tuned); Schulman et al. 2025",
    ]


def _amount(bits: float) -> str:
    """Return a number of bits in words."""
    for unit in ("", "k", "M", "G"):
        if bits < 999.5:  # what rounds to 1000 is 1k
            return f"{bits:.3g}{unit}"
        bits /= 1000
    return f"{bits:.3g}T"
