"""What a run says about its rank, as a Report, as sentences and as table rows, with rules of thumb and their sources. Knows
rank.json; nothing of models or HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.files import units
from deltaw.layers.names import brief, by_family
from deltaw.runs.memory.machine import in_words
from deltaw.runs.reports.compare import BY_ITEM, ONE_SEED, interval, score
from deltaw.runs.reports.directions import alike_maps, alike_tables
from deltaw.runs.reports.page import Chart, Report, Series, Table
from deltaw.runs.reports.sweep import why_no_smaller

Values = Mapping[str, Any]

FIRST = ("r", "parameters", "adapter", "with optimizer", "loss")
LAST = ("‖ΔW‖² kept", "training", "FLOPs/token")
# Table 7 of the paper: GPT-3's 48th layer, W_q
_PAPER = (
    "The paper's figures (Table 7, W_q of GPT-3's 48th layer): at r = 4 0.32 with the directions of ΔW, 21.67 with W's own, 0.02 "
    "with random ones, ‖W‖ 61.95, ‖ΔW‖ 6.91, a factor of 21.5; at r = 64 1.90, 37.71, 0.33 and ‖ΔW‖ 3.57, a factor of 1.9."
)


def sentence(results: Values) -> str:
    """The recommendation, its evidence and its cost."""
    rows = {row["rank"]: row for row in results["ranks"]}
    own, largest, what = rows[results["rank"]], results["ranks"][-1], results["records"]["what"]
    loss = f"loss {own['loss']['value']:.3f} [{own['loss']['low']:.3f}, {own['loss']['high']:.3f}]"
    text = f"r = {own['rank']}: {units.size(own['bytes'])}, {loss}"
    if own["rank"] != largest["rank"]:
        text += f" against {largest['loss']['value']:.3f} at r = {largest['rank']}"
    return f"{text}, on {what}, held out."


def remarks(results: Values) -> list[str]:
    """What else there is to know about it."""
    found = []
    if results["rank"] == results["ranks"][-1]["rank"] > 1:
        found.append(
            "No smaller rank is shown to be enough: train at a larger one to see whether it would be better, or score more "
            "records (--records, --most), which makes intervals narrower."
        )
    found += [f"{said}." for said in why_no_smaller(results["ranks"], results["rank"], results["margin"])]
    base = results["base"]
    if base is not None and not base["less_adapter"]["low"] > 0:
        found.append(
            f"The adapter is not shown to be better than the base, whose loss is {base['loss']:.3f}: "
            "what rank it needs says little."
        )
    if results["records"]["stopped_by"]:
        found.append("The run was stopped by these records (--patience), so their losses are a little too good.")
    overlapping = results["records"]["overlap"]
    found += [overlapping] if overlapping else []
    found += [_better(each) for each in results["allocated"] if each["better"]]
    return found + confirmation(results)


def _better(each: Values) -> str:
    return (
        f"With the parameters of r = {each['rank']}, ranks by layer do better than one rank everywhere: loss "
        f"{each['loss']['value']:.4f}, a difference of {interval(each['difference'])}. "
        f"`deltaw compress --bytes {each['bytes']}` makes that."
    )


def confirmation(results: Values) -> list[str]:
    """Of --confirm."""
    found = results["confirmed"]
    if found is None:
        return []
    if "failed" in found:
        return [f"Training again failed: {found['failed']}"]
    verdict = "It held" if found["held"] else "It did not hold"
    seeds = "one run" if found["seeds"] == 1 else f"{found['seeds']} runs"
    return [
        f"{verdict} when trained again ({seeds} each): at r = {found['rank']} loss {interval(found['loss'])}, at "
        f"r = {found['full']} {found['full_loss']['value']:.4f}; the difference is {interval(found['difference'])}, the margin "
        f"{found['margin']:.4f}."
    ]


def cells(row: Values, largest: int, metrics: Sequence[str]) -> list[str]:
    """Of one rank as text, under FIRST, the difference from the largest rank, whether it is enough, the metrics, and LAST."""
    memory = units.size(row["memory"]) if "memory" in row else "–"
    flops = row.get("flops_per_token")
    difference = "–" if row["rank"] == largest else interval(row["difference"])
    return [
        str(row["rank"]), f"{row['parameters']:,}", units.size(row["bytes"]), units.size(row["bytes_with_optimizer"]),
        interval(row["loss"]), difference, "yes" if row["enough"] else "no", *(score(row["scores"][m]) for m in metrics),
        f"{row['energy']:.1%}", memory, "–" if flops is None else f"{flops:.3g}",
    ]  # fmt: skip


def metrics_of(results: Values) -> list[str]:
    """Besides the loss."""
    return list(results["ranks"][0]["scores"])


def rank_report(results: Values) -> Report:
    """The page."""
    tables = [_ranks(results), *_allocated(results), *alike_tables(results["alike"]), *_amplified(results)]
    tables += [Table("Rules of thumb", ["rule", "here", "source"], hints(results), note=_HINTS)]
    tables += [_layers(results["layers"]), Table("Settings", ["setting", "value"], _settings(results))]
    return Report(
        title=f"Which rank? {results['run']}",
        headline=sentence(results),
        curves=_curves(results),
        maps=alike_maps(results["alike"]),
        tables=tables,
        warnings=remarks(results),
        commands=_commands(results),
        footer=in_words(results["environment"]),
    )


_HINTS = (
    "What others found on other data, to begin with where nothing was measured. No result of this page rests on it."
)


def _ranks(results: Values) -> Table:
    metrics, largest = metrics_of(results), results["ranks"][-1]["rank"]
    count = len(results["ranks"]) - 1
    note = (
        f"The adapter that was trained at r = {largest}, cut to its first r directions in each layer, as `deltaw compress` "
        f"does, and scored on {results['records']['what']}. {BY_ITEM}Differences are taken item by item. {ONE_SEED} A rank is "
        f"enough if the interval of the difference ends below the margin of {results['margin']:.4f}. The tests go down from r = "
        f"{largest} and end at the first that fails; so {count} comparisons err together no more often than one (5%). "
        "Training is the peak of memory of a run at that rank."
    )
    columns = [*FIRST, f"less that of r = {largest}", "enough", *metrics, *LAST]
    return Table(
        "What each rank costs, and what it loses",
        columns,
        [cells(row, largest, metrics) for row in results["ranks"]],
        note,
    )


def _allocated(results: Values) -> list[Table]:
    if not results["allocated"]:
        return []
    rows = [
        [each["rank"], f"{each['parameters']:,}", _range(each["ranks"]), interval(each["loss"]), interval(each["difference"]),
         "yes" if each["better"] else "no"]
        for each in results["allocated"]
    ]  # fmt: skip
    note = (
        "As many parameters as one rank everywhere takes, spent one direction after the other where a parameter keeps the most "
        f"of ‖ΔW‖². Better: the 95% interval of the difference is below 0; {len(rows)} comparisons, nothing taken off for their "
        "number."
    )
    columns = ["parameters of r", "parameters", "ranks", "loss", "less that of one rank everywhere", "better"]
    return [Table("Ranks by layer", columns, rows, note)]


def _range(ranks: Mapping[str, int]) -> str:
    return f"{min(ranks.values())} to {max(ranks.values())}"


def _amplified(results: Values) -> list[Table]:
    found = results["amplified"]
    if not found:
        return []
    rows = [
        [each["layer"], *(f"{each[key]:.3g}" for key in ("by_update", "by_weight", "by_chance", "weight", "update", "factor"))]
        for each in found
    ]  # fmt: skip
    title = f"How ΔW lies to W, r = {found[0]['rank']}"
    columns = ["layer", "‖UᵀWVᵀ‖, U, V of ΔW", "of W", "random", "‖W‖", "‖ΔW‖", "factor"]
    note = (
        "The factor is ‖ΔW‖ / ‖UᵀWVᵀ‖: by how much training amplifies directions that W has already, but does not stress. Of "
        f"each kind of layer the one in the middle of the model. {_PAPER}"
    )
    return [Table(title, columns, rows, note)]


def _layers(layers: Sequence[Values]) -> Table:
    rows = [
        [each["layer"], " × ".join(map(str, each["shape"])), f"{each['norm']:.3g}", f"{each['effective_rank']:.1f}",
         each["rank_90"], each["rank_99"], len(each["values"])]
        for each in layers
    ]  # fmt: skip
    note = (
        "Effective rank is exp of the entropy of σ/Σσ (Roy and Vetterli 2007): n equal directions count n. What holds 90% of "
        "‖ΔW‖² need not hold 90% of what was learned; that the losses say."
    )
    return Table("Spectra", ["layer", "d × k", "‖ΔW‖", "effective rank", "r of 90%", "r of 99%", "rank"], rows, note)


def _settings(results: Values) -> list[list[object]]:
    return [[key, str(value)] for part in ("options", "settings") for key, value in results[part].items()]


# --- pictures ---------------------------------------------------------------------------------------------------


def _curves(results: Values) -> list[Chart]:
    rows = results["ranks"]
    ranks = [row["rank"] for row in rows]
    charts = [_differences(results), _against("loss", [row["loss"] for row in rows], ranks, note=_CURVE)]
    charts += [_against(m, [row["scores"][m] for row in rows], ranks) for m in metrics_of(results)]
    return [*charts, _spectrum_chart(results["layers"]), _depth_chart(results["layers"])]


_CURVE = "Bars are 95% intervals over the items, most of which is how items differ from each other, not ranks."


def _differences(results: Values) -> Chart:
    """In pairs, with the margin that decides."""
    rows, largest = results["ranks"][:-1], results["ranks"][-1]["rank"]
    found = [(row["rank"], row["difference"]) for row in rows]
    spans = [(rank, d["low"], d["high"]) for rank, d in found]
    margin = [(row["rank"], results["margin"]) for row in results["ranks"]]
    series = [Series("difference", [(rank, d["value"]) for rank, d in found], spans=spans), Series("margin", margin)]
    note = "Bars are 95% intervals, by item in pairs. A rank is enough if its bar and those of all larger ones end below it."
    ticks = [row["rank"] for row in results["ranks"]]
    title = f"What cutting loses: held-out loss at r, less that at r = {largest}"
    return Chart(title, "r", "loss", series, log_x=True, x_ticks=ticks, note=note)


def _against(what: str, scores: Sequence[Values], ranks: Sequence[int], note: str = "") -> Chart:
    points = [(rank, s["value"]) for rank, s in zip(ranks, scores, strict=True)]
    spans = [(rank, s["low"], s["high"]) for rank, s in zip(ranks, scores, strict=True)]
    series = [Series(what, points, spans=spans)]
    return Chart(f"{what} against rank", "r", what, series, log_x=True, x_ticks=ranks, note=note)


def _spectrum_chart(layers: Sequence[Values]) -> Chart:
    """Of each kind of layer the mean over its layers."""
    series = []
    for name, alike in _families(layers).items():
        shares = [[v / each["values"][0] for v in each["values"]] for each in alike if each["values"][0] > 0]
        length = min((len(s) for s in shares), default=0)
        means = [math.fsum(s[i] for s in shares) / len(shares) for i in range(length)]
        series.append(Series(name, [(i + 1, v) for i, v in enumerate(means) if v > 1e-6]))
    return Chart("Singular values of ΔW", "i", "σᵢ / σ₁", series, log_y=True)


def _depth_chart(layers: Sequence[Values]) -> Chart:
    series = []
    for name, alike in _families(layers).items():
        numbered = [(re.findall(r"\b\d+\b", each["layer"]), each["effective_rank"]) for each in alike]
        points = [(int(numbers[0]), value) for numbers, value in numbered if numbers]
        if len(points) > 1:
            series.append(Series(name, points))
    return Chart("Effective rank by depth", "block", "effective rank", series)


def _families(layers: Sequence[Values]) -> dict[str, list[Values]]:
    """Brief name → layers that differ in their number alone."""
    by_name = {each["layer"]: each for each in layers}
    found = by_family(by_name)
    names = brief(list(found))
    return {names[name]: [by_name[n] for n in alike] for name, alike in found.items()}


def _commands(results: Values) -> list[str]:
    run, rank, largest = results["run"], results["rank"], results["ranks"][-1]["rank"]
    if rank == largest:
        return []
    adapter = f"{run}/adapter" if results["settings"] else run
    found = [f"deltaw compress {adapter} --rank {rank} -o {run}-r{rank}"]
    return found if results["confirmed"] else [*found, f"deltaw rank {run} --confirm"]


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
