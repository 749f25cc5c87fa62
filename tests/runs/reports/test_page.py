"""The page is whole, safe, self-contained and small, whatever the data."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import ConfigError, visible
from deltaw.runs.reports.charts import _box, describe, placed
from deltaw.runs.reports.examples import marked
from deltaw.runs.reports.page import Chart, HeatMap, Report, Sample, Series, Table, render, write

_VOID = {"meta", "br", "hr", "img", "link", "input"}
_EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """Fails on a tag that does not match; keeps tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.code: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        (self.code if self.open and self.open[-1] in ("script", "style") else self.words).append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)

    def of(self, kind: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if kind in (a.get("class") or "").split()]


def full(word: str) -> Report:
    """A report with `word` in every text."""
    chart = Chart(word, word, word, [Series(word, [(0, 1.0), (1, 2.0)], labels=[word, word])], note=word)
    bars = Chart(word, word, word, [Series(word, [(0, 1.0), (1, -2.0)], "bars", labels=[word, word])])
    return Report(
        title=word,
        headline=word,
        facts=[(word, word, word)],
        curves=[chart, bars],
        examples=[Sample(word, word, word + "a", word + "b"), Sample(word * 400, None, word, word * 400)],
        tables=[Table(word, [word, word], [[word, 1.5]], note=word), Table(word, [word], [[word]] * 30)],
        warnings=[word],
        commands=[word],
        footer=word,
    )


def charted(*points: tuple[float, float], **more: object) -> Report:
    return Report("t", "h", curves=[Chart("c", "x", "y", [Series("s", points)], **more)])  # type: ignore[arg-type]


def test_script_in_any_field_stays_text() -> None:
    plain, evil = Page(render(full("word"))), Page(render(full(_EVIL)))
    assert evil.count("script") == plain.count("script") == 1
    assert evil.count("img") == 0
    assert not any(name.startswith("on") for _, attrs in evil.tags for name in attrs)
    assert _EVIL in evil.text


@given(
    st.text(max_size=60).flatmap(lambda s: st.sampled_from([s, f"{s}<script>", f"</script>{s}", f'" {s}', f"<!--{s}"]))
)
@settings(max_examples=60, deadline=None)
def test_any_text_in_any_field_leaves_the_page_whole(word: str) -> None:
    page = render(full(word))
    found = Page(page)
    assert found.count("script") == 1 and found.count("style") == 1
    assert "<!--" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    page.encode("utf-8")


@given(st.text(min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_an_example_keeps_its_text(word: str) -> None:
    if visible(word) == word and word.strip():
        assert f"  {word}\n\ty" in Page(render(Report("t", "h", examples=[Sample(f"  {word}\n\ty")]))).text


def test_lone_surrogates_and_control_characters_are_shown(tmp_path: Path) -> None:
    page = write(Report("a\ud800b", "nul\x00 esc\x1b"), tmp_path / "r.html").read_text(encoding="utf-8")
    assert r"a\ud800b" in page and r"nul\x00 esc\x1b" in page


def test_page_loads_nothing_and_names_its_own_code_only() -> None:
    page = render(full("word"))
    assert not re.search(r"https?:|//cdn|@import|url\(|src=|<link", page)
    found = Page(page)
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    for code in found.code:
        if code.strip():
            assert base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() in (policy or "")
    assert "style" not in {name for _, attrs in found.tags for name in attrs}


def test_empty_report_has_no_empty_sections() -> None:
    found = Page(render(Report("t", "h")))
    assert found.count("section") == 0 and found.count("h1") == 1
    hollow = Report("t", "h", curves=[Chart("c", "", "", [])], tables=[Table("t", [], [])], examples=[Sample("")])
    assert "Nothing to draw" in Page(render(hollow)).text and "No rows" in render(hollow)


def test_gaps_break_the_line_and_no_nan_is_drawn() -> None:
    page = render(
        charted((0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, math.inf), (math.nan, 1.0), (6, 1.0), (7, 2.0))
    )
    path = Page(page).of("line")[0 if "swatch" not in (Page(page).of("line")[0].get("class") or "") else 1]["d"] or ""
    assert path.count("M") == 3 and path.count("h0") == 1
    body = page.split("<main>")[1].split("<script>")[0]
    assert not re.search(r"\bnan\b|\binf\b|NaN|Infinity", body)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 1e-310, 7e250, -1e299, 1e308, math.inf, math.nan])
@pytest.mark.parametrize("log", [False, True])
def test_one_point_of_any_size(value: float, log: bool) -> None:
    Page(render(charted((5, value), log_y=log)))


number = st.one_of(st.floats(), st.integers(-(10**400), 10**400), st.floats(0, 1e-3), st.none())


@given(
    st.lists(st.tuples(number, number), max_size=30),
    st.sampled_from(["", "x", "y", "xy"]),
    st.sampled_from(["line", "dots", "points", "bars"]),
)
@settings(max_examples=150, deadline=None)
def test_any_numbers_are_drawn_inside_the_plot(points: list[tuple[float, float]], log: str, style: str) -> None:
    chart = Chart("c", "x", "y", [Series("s", points, style)], log_y="y" in log, log_x="x" in log)  # type: ignore[arg-type]
    page = Page(render(Report("t", "h", curves=[chart])))
    for tag, attrs in page.tags:
        if tag == "path":
            for found in re.findall(r"[ML](-?[\d.]+) (-?\d+)", attrs["d"] or ""):
                assert all(-1 <= float(v) <= 10_001 for v in found)
        if tag == "text":
            assert -0.1 <= float((attrs["y"] or "").rstrip("%")) <= 100.1
    for attrs in page.of("plot"):
        json.loads(attrs["data-chart"] or "", parse_constant=lambda c: pytest.fail(c))


def test_ten_thousand_points_stay_small() -> None:
    points = [(i, math.sin(i / 300) + (i * 7919 % 101) / 300) for i in range(10_000)]
    points[5_432] = (5_432, 99.0)
    chart = Chart("loss", "step", "nats", [Series("raw", points, "dots"), Series("raw, smoothed", points)])
    page = render(Report("t", "h", curves=[chart] * 5))
    assert len(page.encode()) < 1_000_000
    assert "5432,99]" in Page(page).of("plot")[0]["data-chart"]  # type: ignore[operator]


def test_raw_dots_share_the_color_of_their_line() -> None:
    chart = Chart(
        "c",
        "x",
        "y",
        [Series("raw", [(0, 1)], "dots"), Series("held out", [(0, 1)]), Series("raw, smoothed", [(0, 1)])],
    )
    found = Page(render(Report("t", "h", curves=[chart])))
    colors = {a["class"] for a in found.of("swatch")}
    assert colors == {"swatch dots c2", "swatch line c1", "swatch line c2"}


def test_points_and_bars_have_their_names_beside_them() -> None:
    methods = {"full": (2e7, 0.8), "lora": (3e5, 0.79), "dora": (3.1e5, 0.79), "ia3": (1e4, 0.7)}
    chart = Chart("c", "x", "y", [Series(n, [p], "points") for n, p in methods.items()], log_x=True)
    page = Page(render(Report("t", "h", curves=[chart])))
    names = {a["x"]: a for t, a in page.tags if t == "text" and a.get("class") == "name"}
    assert len(names) == 4 and not page.of("swatch points c1")
    assert json.loads(page.of("plot")[0]["data-chart"] or "")["log"] is True
    bars = render(
        Report("t", "h", curves=[Chart("c", "", "y", [Series("s", [(0, 1), (1, 2)], "bars", ["left", "right"])])])
    )
    assert (
        ">left</text>" in bars
        and ">right</text>" in bars
        and ">0.5</text>" not in bars.split('text-anchor="middle"')[1]
    )


def test_names_of_points_keep_out_of_each_others_way() -> None:
    points = {
        name: (0.5 + i / 400, 0.5 + i / 200)
        for i, name in enumerate(("full", "houlsby", "pfeiffer", "lora-qv", "dora"))
    }
    boxes = [_box(name) for name in placed(points | {"edge": (1.0, 0.0)})]
    assert len(boxes) == 6 and all(left >= 0 and right <= 980 for left, _, right, _ in boxes)
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_a_chart_says_in_words_what_it_shows() -> None:
    chart = Chart("Loss", "step", "nats", [Series("train", [(0, 3.0), (1, 0.5), (2, 1.0)]), Series("none", [])])
    assert describe(chart) == "Loss, over step. train: from 3 to 1, lowest 0.5, highest 3; none: no finite points."
    assert describe(chart) in [
        a.get("aria-label") for t, a in Page(render(Report("t", "h", curves=[chart]))).tags if t == "svg"
    ]


def test_a_series_with_a_wrong_style_or_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="'dashed'"):
        Series("s", [], "dashed")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 labels for 0 points"):
        Series("s", [], labels=["a"])


def test_long_tables_fold_and_numbers_align_right() -> None:
    rows = [[f"layer.{i}", i, 0.001 * i, f"0.9{i % 10} [0.88, 0.97]", None] for i in range(210)]
    found = Page(render(Report("t", "h", tables=[Table("Merge", ["layer", "i", "x", "score", "none"], rows)])))
    assert "All 210 rows" in found.text and found.count("tr") == 211 and len(found.of("num")) == 211 * 4
    assert found.of("scroll")[0]["role"] == "region"


def test_long_text_folds() -> None:
    found = Page(render(Report("t", "h", examples=[Sample("word " * 400)])))
    assert found.count("details") == 1 and "2,000 characters" in found.text
    many = Page(render(Report("t", "h", examples=[Sample(f"p{i}") for i in range(9)])))
    assert "3 more" in many.text


def test_differences_are_marked() -> None:
    assert marked('{"day": 3}', '{"day": 4}', "before") == '{&quot;day&quot;: <mark class="before">3</mark>}'
    assert "<mark" not in marked("nothing in common", "12 / 34 = ?", "before")
    assert "<mark" not in marked("same", "same", "after")


def test_spaces_are_marked_where_they_are_the_only_difference() -> None:
    assert marked('"to": " A"', '"to": "A"', "after") == '&quot;to&quot;: &quot;<mark class="after"> </mark>A&quot;'
    assert marked("a  b c", "a b d", "after").count("<mark") == 1


def test_a_reference_that_was_reproduced_is_not_repeated() -> None:
    found = Page(render(Report("t", "h", examples=[Sample("p", "yes", "no", "yes"), Sample("q", "yes", "no", "nope")])))
    assert found.text.count("= reference") == 1 and len(found.of("reference")) == 1


def test_write_replaces_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "report.html"
    assert write(Report("one", "h"), path) == path
    write(Report("two", "h"), path)
    assert "<title>two</title>" in path.read_text(encoding="utf-8")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(Report("three", "h"), path)
    assert [f.name for f in path.parent.iterdir()] == ["report.html"]
    assert "two" in path.read_text(encoding="utf-8")


def test_report_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Report("t", "h").title = "u"  # type: ignore[misc]


def test_repetitive_completions_are_compared_quickly() -> None:
    """A base model that repeats itself is difflib's worst case; beyond the limit nothing is marked."""
    assert "<mark" in marked("a b " * 90, "b c " * 90, "before")
    assert "<mark" not in marked("a b " * 5_000, "b c " * 5_000, "before")


def test_a_command_is_copied_as_it_was_written() -> None:
    command = "deltaw  merge M 'a b' \\\n  -o OUT --flag=<x>"
    assert command in Page(render(Report("t", "h", commands=[command]))).text


def test_records_without_answers_are_shown_as_what_is_taught() -> None:
    page = render(Report("t", "h", examples=[Sample("p", "answer")]))
    assert "Records as they are taught" in page and ">Taught<" in page and "Before and after" not in page
    assert "Marked:" not in page


def test_a_page_with_a_map_keeps_its_script_running() -> None:
    """A plot without data for tooltips stopped the script, and the copy buttons with it."""
    page = render(Report("t", "h", maps=[HeatMap("m", "x", "y", [[0.01]])], commands=["deltaw x"]))
    assert any("data-chart" not in attrs for attrs in Page(page).of("plot"))
    assert '.querySelectorAll(".plot[data-chart]")' in page
