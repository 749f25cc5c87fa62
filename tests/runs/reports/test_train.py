"""What a run's report says of its figures, and the commands that it proposes."""

from __future__ import annotations

import re
import shlex

from deltaw.runs.evaluation.bootstrap import Score
from deltaw.runs.evaluation.classes import Confusion
from deltaw.runs.memory import machine
from deltaw.runs.reports.page import render
from deltaw.runs.reports.train import Sampled, next_commands, run_report
from deltaw.runs.results.train import HeldOutScores, RunFigures
from deltaw.training.events import Answered, Evaluated
from deltaw.training.loop import LoopState


def test_commands_can_be_pasted_whatever_the_names() -> None:
    for command in next_commands("my model", "runs/it's one/adapter", {}):
        words = shlex.split(command)
        assert "my model" in words and "runs/it's one/adapter" in words


def figures(scored: HeldOutScores | None) -> RunFigures:
    """The figures of a run of ten steps."""
    loop = LoopState(step=10, seconds=5.0, step_seconds=4.0, tokens=100, records=20, first_loss=1.0, last_loss=0.5)
    return RunFigures(
        loop=loop, trainable_parameters=10, trainable_share=0.1, adapter_bytes=1000, bytes_with_optimizer=2000, base_bytes=9000,
        unit="nats per record", counted="tokens", relative_norm=0.1, merge_dtype="float32", merge_rows=[], peak_memory=1000,
        data={"records": 20}, sets={"train": "20 records of 20 texts", "valid": "6 records of 6 texts", "overlap": None},
        warnings=[], held_out=scored, environment=machine.describe(),
    )  # fmt: skip


SETTINGS: dict[str, object] = {
    "model": "/far/away/minilm",
    "data": "tickets.csv",
    "out": "run",
    "task": "classification",
}
EVENTS = [Evaluated(0, 1.1, 1.1), Answered(0, ["early"]), Evaluated(10, 0.4, 0.4), Answered(10, ["later"])]


def test_a_run_of_classes_shows_its_matrix_each_class_and_intervals() -> None:
    confusion = Confusion.of([0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1], ["no", "yes"])
    scores = {"loss": Score(0.4, 0.3, 0.5), "accuracy": Score(4 / 6, 0.25, 0.95)}
    report = run_report(SETTINGS, figures(HeldOutScores(6, scores, confusion)), EVENTS, [])
    assert report.headline.startswith("Held-out accuracy 0.667 [0.250, 0.950], loss 1.100 → 0.400 with")
    tables = {table.title: table for table in report.tables}
    assert [list(row) for row in tables["Confusion matrix"].rows] == [["no", 1, 1], ["yes", 1, 3]]
    assert list(tables["Each class"].rows[1]) == ["yes", "0.750", "0.750", "0.750", 4, 4]
    assert list(tables["Held-out scores"].rows[0]) == ["loss", "0.4000", "[0.3000, 0.5000]"]
    page = render(report)
    assert 'class="num shade4">1</td>' in page and 'class="num shade6">3</td>' in page  # a half, and three quarters


def test_the_share_of_right_classes_has_a_curve_where_there_are_classes() -> None:
    events = [Evaluated(0, 1.1, 1.1, 0.25), Evaluated(10, 0.4, 0.4, 0.75)]
    charts = {chart.title: chart for chart in run_report(SETTINGS, figures(None), events, []).curves}
    assert list(charts["Accuracy"].series[0].points) == [(0, 0.25), (10, 0.75)] and charts["Accuracy"].y_most == 1
    assert "Accuracy" not in {chart.title for chart in run_report(SETTINGS, figures(None), EVENTS, []).curves}


def test_of_many_classes_the_mistakes_are_listed() -> None:
    names = [f"class {i}" for i in range(40)]
    confusion = Confusion.of([0, 0, 2], [1, 1, 2], names)
    report = run_report(SETTINGS, figures(HeldOutScores(3, {"loss": Score(0.4, 0.3, 0.5)}, confusion)), EVENTS, [])
    tables = {table.title: table for table in report.tables}
    assert "Confusion matrix" not in tables
    assert [list(row) for row in tables["Most frequent mistakes"].rows] == [["class 1", "class 0", 2]]


def test_the_foot_is_there_and_no_folder_of_this_machine() -> None:
    report = run_report(SETTINGS, figures(None), EVENTS, [])
    assert all(part in report.footer for part in ("UTC", "deltaw ", "torch ", "transformers ", "Python 3.", "GiB"))
    assert report.title == "…/minilm on tickets.csv" and "Held-out loss 1.100 → 0.400 with" in report.headline
    assert "/far/away" not in re.sub(r"(?s)<section class=.next.*?</section>", "", render(report))


def test_all_turns_of_a_sample_and_its_answers_during_training_are_shown() -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("<b>odd", "Who?")]
    report = run_report(
        SETTINGS, figures(None), EVENTS, [Sampled("Who?", "I.", "He", "I.", turns), Sampled("q", None, "a", "b")]
    )
    first, second = report.examples
    assert list(first.during) == [(0, "early"), (10, "later")] and list(second.during) == []
    page = render(report)
    for part in (
        "Be brief.",
        "Hello!",
        ">system<",
        ">user<",
        ">assistant<",
        "&lt;b&gt;odd",
        "Step 10",
        "2 answers during",
    ):
        assert part in page
    assert 'class="block turn other"' in page
