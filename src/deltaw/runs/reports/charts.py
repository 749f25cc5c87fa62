"""Line, dot and bar charts as inline SVG. Knows charts; nothing of reports, training or where numbers come from.

The curves are in a nested SVG that stretches with the page, but their strokes keep their width. Ticks and labels are placed by
percentage and keep their size in pixels. So a chart is as legible on a phone as on a wide screen or on paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from deltaw.errors import ConfigError
from deltaw.runs.reports.axes import Axis, Point, decimate, finite, linear_axis, log_axis, short
from deltaw.runs.reports.markup import tag, text

_UNITS = 10_000
_COLORS = 10
_MANY = 400
Style = Literal["line", "dots", "points", "bars"]


@dataclass(frozen=True)
class Series:
    """A curve, a cloud of faint dots, points with the series' name beside them, or bars. Points that are not finite are gaps."""

    name: str
    points: Sequence[tuple[float, float]]
    style: Style = "line"
    labels: Sequence[str] = ()
    """Names of the points for the tooltip; those of bars are also below them."""
    spans: Sequence[tuple[float, float, float]] = ()
    """x, low, high: intervals about the points."""

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise ConfigError(
                f"Series {self.name!r}: style is one of {', '.join(get_args(Style))}, not {self.style!r}."
            )
        if self.labels and len(self.labels) != len(self.points):
            raise ConfigError(f"Series {self.name!r}: {len(self.labels)} labels for {len(self.points)} points.")


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_y: bool = False
    log_x: bool = False
    x_ticks: Sequence[float] = ()
    """The numbers on a logarithmic axis. Default: round ones."""
    y_most: float = math.inf
    """The largest value that can be, for example 1 of a share: the axis ends there at the latest."""
    note: str = ""


@dataclass(frozen=True)
class _Curve:
    """A series ready to draw: few points, gaps as None, and the number of its color."""

    name: str
    style: Style
    color: int
    points: list[Point | None]
    names: dict[Point, str]
    spans: list[tuple[Point, Point]]
    """The two ends of each."""

    @property
    def drawn(self) -> list[Point]:
        return [p for p in self.points if p is not None]


def render_chart(chart: Chart, *, wide: bool = False) -> str:
    """Return the chart as a `<figure>` with title, legend, plot and note."""
    curves = _curves(chart)
    head = tag("h3", text(chart.title)) + _legend(curves)
    if any(c.drawn for c in curves):
        body = _plot(chart, curves, wide)
    else:
        body = tag("p", "Nothing to draw: no finite points.", cls="empty")
    note = tag("p", text(chart.note), cls="note") if chart.note else ""
    return tag("figure", tag("figcaption", head) + body + note, cls="chart wide" if wide else "chart")


def describe(chart: Chart) -> str:
    """Return the chart in words, for readers who do not see it."""
    parts = []
    for curve in _curves(chart):
        ys = [y for _, y in curve.drawn]
        if not ys:
            parts.append(f"{curve.name}: no finite points")
        elif len(ys) == 1:
            parts.append(f"{curve.name}: one point, {short(ys[0])}")
        else:
            ends = f"from {short(ys[0])} to {short(ys[-1])}"
            parts.append(f"{curve.name}: {ends}, lowest {short(min(ys))}, highest {short(max(ys))}")
    return f"{chart.title}, over {chart.x_label}. " + "; ".join(parts) + "."


def _curves(chart: Chart) -> list[_Curve]:
    """The series as curves, colored in their order. Dots whose name begins a line's name are its raw values, in its color."""
    colors: dict[str, int] = {}
    for series in sorted(chart.series, key=lambda s: s.style == "dots"):
        owner = next((n for n in colors if series.style == "dots" and n.startswith(series.name)), None)
        colors[series.name] = colors[owner] if owner else len(set(colors.values())) % _COLORS + 1
    curves = []
    for series in chart.series:
        points = [_plottable(p, chart) for p in decimate(series.points)]
        names = {(x, y): str(n) for (x, y), n in zip(series.points, series.labels, strict=False)}
        ends = [(_plottable((x, low), chart), _plottable((x, high), chart)) for x, low, high in series.spans]
        spans = [(low, high) for low, high in ends if low and high]
        curves.append(_Curve(series.name, series.style, colors[series.name], points, names, spans))
    return curves


def _plottable(point: tuple[float, float], chart: Chart) -> Point | None:
    x, y = finite(point[0]), finite(point[1])
    if x is None or y is None or (chart.log_y and y <= 0) or (chart.log_x and x <= 0):
        return None
    return x, y


def _legend(curves: Sequence[_Curve]) -> str:
    """The name and last value of each curve. Lone bars, which the title names, and points, which have names, need none."""
    items = []
    for curve in curves:
        last = tag("b", text(short(curve.drawn[-1][1]))) if curve.drawn and curve.style == "line" else ""
        swatch = tag("span", cls=f"swatch {curve.style} c{curve.color}", aria_hidden="true")
        items.append(tag("li", f"{swatch}{text(curve.name)}{last}"))
    lone = len(curves) == 1 and curves[0].style != "line"
    named = all(c.style == "points" for c in curves)
    return tag("ul", "".join(items), cls="legend") if items and not lone and not named else ""


def _axes(chart: Chart, curves: Sequence[_Curve], wide: bool) -> tuple[Axis, Axis]:
    ends = [end for c in curves for span in c.spans for end in span]
    xs, ys = ([p[i] for p in (*(p for c in curves for p in c.drawn), *ends)] for i in (0, 1))
    bars = any(c.style == "bars" for c in curves)
    if bars:
        half = _slot(curves) / 2
        xs = [min(xs) - half, max(xs) + half]
    counts = bars and all(map(float.is_integer, ys))
    y = log_axis(ys) if chart.log_y else linear_axis(ys, zero=bars, count=4, whole=counts, most=chart.y_most)
    if chart.log_x and not bars:
        low, high = min(xs) / 1.2, max(xs) * 1.2  # so that no point is on the edge
        return Axis(low, high, tuple(chart.x_ticks), log=True) if chart.x_ticks else log_axis([low, high]), y
    whole = all(x.is_integer() for c in curves for x, _ in c.drawn)
    return linear_axis(xs, snug=True, count=8 if wide else 4, whole=whole), y


def _slot(curves: Sequence[_Curve]) -> float:
    """The width for one bar: the smallest distance between neighbours."""
    xs = sorted({x for c in curves for x, _ in c.drawn})
    return min((b - a for a, b in pairwise(xs)), default=1.0)


def _plot(chart: Chart, curves: Sequence[_Curve], wide: bool) -> str:
    x, y = _axes(chart, curves, wide)
    labels = y.labels()
    room = next((name for most, name in ((3, "s"), (5, "m"), (7, "l")) if max(map(len, labels)) <= most), "xl")
    shapes = "".join(_spans(c, x, y) + _shape(c, i, curves, x, y) for i, c in enumerate(curves))
    inner = f'<svg viewBox="0 0 {_UNITS} {_UNITS}" preserveAspectRatio="none" width="100%" height="100%">{shapes}</svg>'
    grid = _grid_y(y, labels) + (_bar_names(curves, x) or _grid_x(x, wide))
    svg = tag(
        "svg",
        grid + inner + _point_names(curves, x, y),
        role="img",
        aria_label=describe(chart),
        width="100%",
        height="100%",
    )
    plot = tag("div", svg, cls="plot", data_chart=_data(curves, x, y))
    y_label = tag("p", text(chart.y_label), cls="y-label", aria_hidden="true") if chart.y_label else ""
    x_label = tag("p", text(chart.x_label), cls="x-label", aria_hidden="true") if chart.x_label else ""
    return tag("div", y_label + plot + x_label, cls=f"axes {room}")


def _grid_y(axis: Axis, labels: Sequence[str]) -> str:
    parts = []
    for value, label in zip(axis.ticks, labels, strict=True):
        at = f"{100 * (1 - axis.place(value)):.4g}%"
        kind = ' class="zero"' if value == axis.ticks[0] or (value == 0 and not axis.log) else ""
        parts.append(f'<line x1="0" x2="100%" y1="{at}" y2="{at}"{kind}></line>')
        parts.append(f'<text x="-8" y="{at}" dy="0.32em" text-anchor="end">{text(label)}</text>')
    return "".join(parts)


def _grid_x(axis: Axis, wide: bool) -> str:
    """The labels of the horizontal axis. A phone hides every second label of a wide chart."""
    parts = []
    for i, (value, label) in enumerate(zip(axis.ticks, axis.labels(), strict=True)):
        at = axis.place(value)
        anchor = "start" if at < 0.02 else "end" if at > 0.97 else "middle"
        rare = ' class="rare"' if wide and i % 2 else ""
        parts.append(f'<text x="{100 * at:.4g}%" y="100%" dy="1.6em" text-anchor="{anchor}"{rare}>{text(label)}</text>')
    return "".join(parts)


def _bar_names(curves: Sequence[_Curve], axis: Axis) -> str:
    """The names of bars, below them."""
    named = {x: name for c in curves if c.style == "bars" for (x, _), name in c.names.items()}
    return "".join(
        f'<text x="{100 * axis.place(x):.4g}%" y="100%" dy="1.6em" text-anchor="middle">{text(name)}</text>'
        for x, name in named.items()
    )


def _point_names(curves: Sequence[_Curve], x: Axis, y: Axis) -> str:
    """The names of series of points, each beside the point in its middle."""
    middles = {}
    for curve in curves:
        if curve.style == "points" and curve.drawn:
            px, py = sorted(curve.drawn, key=lambda p: p[1])[len(curve.drawn) // 2]
            middles[curve.name] = x.place(px), 1 - y.place(py)
    return "".join(
        f'<text class="name" x="{100 * n.x:.4g}%" y="{100 * n.y:.4g}%" dx="{n.dx:g}" dy="{n.dy:g}" '
        f'text-anchor="{n.anchor}">{text(n.text)}</text>'
        for n in placed(middles)
    )


def _shape(curve: _Curve, index: int, curves: Sequence[_Curve], x: Axis, y: Axis) -> str:
    if curve.style == "bars":
        return _bars(curve, index, curves, x, y)
    pixels = [p and (round(_UNITS * x.place(p[0])), round(_UNITS * (1 - y.place(p[1])))) for p in curve.points]
    if curve.style in ("dots", "points"):
        path = "".join(f"M{p[0]} {p[1]}h0" for p in pixels if p)
        many = " many" if len(curve.drawn) > _MANY else ""
        return f'<path class="{curve.style} c{curve.color}{many}" d="{path}"></path>' if path else ""
    return _line(pixels, curve.color)


def _spans(curve: _Curve, x: Axis, y: Axis) -> str:
    places = [
        (round(_UNITS * x.place(low[0])), *(round(_UNITS * (1 - y.place(p[1]))) for p in (low, high)))
        for low, high in curve.spans
    ]
    path = "".join(f"M{at} {low}V{high}" for at, low, high in places)
    return f'<path class="span c{curve.color}" d="{path}"></path>' if path else ""


def _line(placed: Sequence[tuple[int, int] | None], color: int) -> str:
    """One path with a new start after each gap. A point alone between gaps is a dot, and so is the last point."""
    parts: list[str] = []
    after_gap = True
    for i, point in enumerate(placed):
        if point is None:
            after_gap = True
            continue
        alone = after_gap and (i + 1 == len(placed) or placed[i + 1] is None)
        parts.append(f"{'M' if after_gap else 'L'}{point[0]} {point[1]}" + ("h0" if alone else ""))
        after_gap = False
    last = next((p for p in reversed(placed) if p), None)
    if last is None:
        return ""
    end = f'<path class="end c{color}" d="M{last[0]} {last[1]}h0"></path>'
    many = " many" if len(placed) > _MANY else ""
    return f'<path class="line c{color}{many}" d="{"".join(parts)}"></path>{end}'


def _bars(curve: _Curve, index: int, curves: Sequence[_Curve], x: Axis, y: Axis) -> str:
    """The bars of one of several series, which stand side by side."""
    group = [i for i, c in enumerate(curves) if c.style == "bars"]
    slot = 0.8 * _slot(curves) / (x.high - x.low)
    width = slot / len(group)
    foot = round(_UNITS * (1 - y.place(y.low if y.log else 0.0)))
    path = []
    for px, py in curve.drawn:
        left = x.place(px) - slot / 2 + width * group.index(index)
        top = round(_UNITS * (1 - y.place(py)))
        path.append(f"M{_UNITS * left:.1f} {foot}V{top}h{max(_UNITS * width, 1):.1f}V{foot}z")
    return f'<path class="bars c{curve.color}" d="{"".join(path)}"></path>' if path else ""


def _data(curves: Sequence[_Curve], x: Axis, y: Axis) -> str:
    """The tooltip's data as JSON."""
    series = []
    for c in curves:
        item: dict[str, object] = {
            "name": c.name,
            "color": c.color,
            "points": [[_digits(v) for v in p] for p in c.drawn],
        }
        if c.names:
            item["labels"] = [c.names.get(p, "") for p in c.drawn]
        series.append(item)
    return json.dumps({"x": [x.low, x.high], "log": x.log, "series": series}, ensure_ascii=False, separators=(",", ":"))


def _digits(value: float) -> float | int:
    """A value in six significant digits, a whole number without a point, which halves the bytes."""
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded == math.trunc(rounded) and abs(rounded) < 1e15 else rounded


# A plot's usual size and that of its letters, in pixels
_WIDTH, _HEIGHT = 980.0, 260.0
_LETTER, _LINE, _GAP = 6.6, 15.0, 9.0


class Name(NamedTuple):
    """A name at a place."""

    text: str
    x: float
    """Share of the plot's width from the left."""
    y: float
    """Share of the plot's height from the top."""
    dx: float
    """Pixels from there."""
    dy: float
    anchor: str
    """The end of the text that is there: start or end."""


_Box = tuple[float, float, float, float]


def placed(points: Mapping[str, tuple[float, float]]) -> list[Name]:
    """Place a name for each point (shares from the left and top) right, left, below or above it, wherever there is most room."""
    taken: list[_Box] = [(x * _WIDTH - 4, y * _HEIGHT - 4, x * _WIDTH + 4, y * _HEIGHT + 4) for x, y in points.values()]
    names = []
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        choices = [_at(name, x, y, side, down) for down in (0, 1, -1, 2, -2) for side in ("start", "end")]
        best = min(choices, key=lambda choice: _overlap(_box(choice), taken))
        taken.append(_box(best))
        names.append(best)
    return names


def _at(text: str, x: float, y: float, anchor: str, down: int) -> Name:
    return Name(text, x, y, _GAP if anchor == "start" else -_GAP, 4 + down * _LINE, anchor)


def _box(name: Name) -> _Box:
    """Left, top, right and bottom in pixels."""
    width, at, bottom = _LETTER * len(name.text), name.x * _WIDTH + name.dx, name.y * _HEIGHT + name.dy + 3
    left = at if name.anchor == "start" else at - width
    return left, bottom - _LINE, left + width, bottom


def _overlap(box: _Box, taken: list[_Box]) -> float:
    """The area over other boxes, and a penalty for what is outside the plot."""
    left, top, right, bottom = box
    outside = max(0.0, -left) + max(0.0, right - _WIDTH) + max(0.0, -top - 8) + max(0.0, bottom - _HEIGHT)
    shared = sum(
        max(0.0, min(right, r) - max(left, a)) * max(0.0, min(bottom, b) - max(top, t)) for a, t, r, b in taken
    )
    return shared + _LINE * outside
