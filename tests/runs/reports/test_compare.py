"""What a comparison says of its results."""

from __future__ import annotations

import dataclasses
import re

from deltaw.runs.evaluation.bootstrap import Compared, Score
from deltaw.runs.memory.machine import describe
from deltaw.runs.reports.compare import cells, comparison_report, headline, latency_columns, verdicts
from deltaw.runs.reports.page import render
from deltaw.runs.results.compare import BestRun, ComparisonResults, LatencyRow, MethodRow, RunFigures, TriedRate
from deltaw.runs.results.scores import SeedScores
from deltaw.runs.results.study import Failed, StudySettings

FOUR = [("full", 1_000_000, 1.00), ("lora", 10_000, 1.02), ("prefix", 2_000, 1.04), ("ia3", 500, 2.0)]


def compared(methods: list[tuple[str, int, float]]) -> ComparisonResults:
    """Results of methods with these parameters and losses, the best first."""

    def row(name: str, parameters: int, loss: float) -> MethodRow:
        figures = RunFigures(
            notes=[], parameters=parameters, share=0.01, bytes=1, bytes_with_optimizer=2, base_bytes=9, memory=None,
            seconds=1.0, steps=4, tokens_per_second=10.0, step_seconds=0.1, valid_loss=loss,
        )  # fmt: skip
        scores = {"loss": SeedScores([loss], loss, loss - 0.05, loss + 0.05)}
        best = BestRun(1e-3, figures, scores, [(0, 3.0), (4, loss)])
        return MethodRow(name, "lora", {}, [TriedRate(1e-3, loss, None, None)], best)

    least = methods[0][2]
    ratios = {name: 1.1 for name, *_ in methods}
    return ComparisonResults(
        settings=StudySettings("m", "d", None, 9, None, {"minutes": None, "steps": 4, "epochs": 1.0, "batch": 8}),
        environment=describe(),
        chosen_by="loss",
        sets=dict.fromkeys(("train", "valid", "test"), "9 records of 9 prompts"),
        warnings=[],
        rows=[row(*method) for method in methods],
        compared=[
            Compared(n, Score(loss, 0.0, 9.0), Score(loss - least, loss - least - 0.05, loss - least + 0.05), loss - least > 0.5)
            for n, _, loss in methods
        ],
        latency=[LatencyRow("forward", 1, 128, 0.1, ratios, 9)],
    )  # fmt: skip


def test_the_headline_says_what_is_best_and_what_is_near() -> None:
    results = compared(FOUR)
    text = headline(results)
    assert [row.name for row in results.ranked] == ["full", "lora", "prefix", "ia3"]
    assert text.startswith("full is best by loss on the test records: 1.000 [0.950, 1.050], with 1M parameters.")
    near = "Not shown to be worse, in pairs on the same items: lora, prefix; the smallest of them, prefix, has 2k."
    assert text.endswith(near)


def test_single_intervals_say_nothing_of_differences() -> None:
    assert headline(dataclasses.replace(compared(FOUR), compared=[])).endswith("with 1M parameters.")


def test_methods_that_are_all_worse_are_said_to_be() -> None:
    results = compared(FOUR)
    worse = [dataclasses.replace(method, worse=True) for method in results.compared]
    assert headline(dataclasses.replace(results, compared=worse)).endswith("All others are shown to be worse.")
    assert headline(dataclasses.replace(results, compared=worse[:2])).endswith("The other is shown to be worse.")


def test_of_equals_the_smaller_is_first() -> None:
    same = compared([("full", 1_000_000, 0.5), ("lora", 10_000, 0.5)])
    assert headline(same).startswith("The methods do not differ by loss") and same.ranked[0].name == "lora"


def test_the_page_has_every_part() -> None:
    results = compared(FOUR)
    page = render(comparison_report(results))
    for part in (
        "for all 6 pairs together",
        "0.0200 [-0.0300, 0.0700]",
        "not shown",
        "another seed would change is not in",
    ):
        assert part in re.sub("<[^>]*>", "", page)
    for part in ("Quality against parameters", "Inference over the base", "+20.7%", "ia3"):
        assert part in page
    assert "held-out accuracy" not in page
    assert "held-out accuracy" in render(comparison_report(dataclasses.replace(results, chosen_by="accuracy")))


def test_a_method_that_failed_is_last_and_says_why() -> None:
    results = compared(FOUR)
    failed = MethodRow("full", "full", {}, [], Failed("boom"))
    results = dataclasses.replace(results, rows=[failed, *results.rows[1:]])
    assert results.ranked[-1] == failed and cells(failed, results.metrics)[:2] == ["full", "failed"]
    assert "full failed: boom" in render(comparison_report(results))
    assert headline(dataclasses.replace(results, rows=[failed])) == "Every method failed."


def test_few_rounds_of_timing_are_said() -> None:
    rows = [LatencyRow("forward", 1, 128, 0.1, {}, rounds) for rounds in (1, 2, 3, None)]
    columns = latency_columns(dataclasses.replace(compared(FOUR), latency=rows))
    assert columns == [
        "forward, batch 1 (1 round)",
        "forward, batch 1 (2 rounds)",
        "forward, batch 1",
        "forward, batch 1",
    ]


def test_the_page_says_how_many_records_there_were_and_what_is_shown() -> None:
    results = compared(FOUR)
    results = dataclasses.replace(results, sets=results.sets | {"test": "30 records of 28 prompts"})
    report = comparison_report(results)
    assert next(fact for fact in report.facts if fact[0] == "Test records")[1:][0] == "30"
    assert "at most" not in " ".join(f"{a} {b} {c}" for a, b, c in report.facts)
    (text,) = verdicts(results)
    assert "shown to be worse than the best, full: ia3 (+1.000 [+0.950, +1.050])" in text
    assert "no difference from the best, full is shown for lora (+0.020 [−0.030, +0.070]), prefix" in text
    assert text.replace("'", "") in render(report)


def test_methods_are_told_beside_full_fine_tuning_where_that_is_not_the_best() -> None:
    results = compared([("lora", 10_000, 1.0), ("full", 1_000_000, 1.02), ("ia3", 500, 2.0)])
    full, lora, ia3 = results.compared[1], results.compared[0], results.compared[2]
    better = dataclasses.replace(lora, difference=Score(-0.5, -0.6, -0.4), worse=False)
    results = dataclasses.replace(results, beside_full=[full, better, ia3])
    assert "shown to be better than full fine-tuning (full): lora (−0.500 [−0.600, −0.400])" in verdicts(results)[1]
    assert "Methods beside full fine-tuning" in render(comparison_report(results))
    assert ComparisonResults.from_json(results.to_json()).beside_full == results.beside_full
