"""Figures of the benchmarks: what is drawn is what was measured, to scale."""

import re
from html import unescape

import pytest

from marlin_tools.report import bench as show
from marlin_tools.report.figure import Axis, Line, chart
from marlin_tools.stages.bench import Measurement, Rates

RATES = Rates(3e12, 6e14)


def drawn(svg):
    """Lines of the picture that carry points, and the words on it."""
    lines = [points.split() for points in re.findall(r'<polyline [^>]*points="([^"]*)"', svg)]
    words = [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    return [[tuple(map(float, point.split(","))) for point in line] for line in lines], words


def test_points_are_to_scale():
    points = [(1, 0.0), (4, 2.0), (16, 4.0)]
    (line, _legend), words = drawn(chart("t <&>", "", Axis("batch", 2), Axis("y"), [Line("a", points)]))

    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # equal steps on a logarithmic axis
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # equal steps on a linear one, and up is more
    assert y0 > y1
    assert {"t <&>", "1", "16", "4", "batch", "a"} <= set(words)


def test_ideal_lines_are_dashed_and_behind():
    lines = [Line("real", [(1, 1), (10, 10)]), Line("ideal", [(1, 1), (10, 5)], ideal=True)]
    svg = chart("t", "", Axis("x", 10), Axis("y", 10), lines)

    assert svg.index(">ideal<") < svg.index(">real<")
    assert svg.count('class="ideal"') == 2  # the line, and its entry in the legend
    assert svg.count("<circle") == 2


def result(m, kernel, speedup, *, k=4096, n=1024, model="peak"):
    microseconds = 8.0 / speedup
    return Measurement(model, model, k, n, m, kernel, "", microseconds, 0.1, speedup, 0.5, 2.0)


RESULTS = [result(m, kernel, s) for m in (1, 16) for kernel, s in (("torch", 1.0), ("ours", 2.0 + m))]


@pytest.mark.parametrize("name", show.FIGURES)
def test_every_figure_is_a_picture(name):
    lines, words = drawn(show.FIGURES[name](RESULTS, RATES, "some GPU"))

    assert len(lines) >= 2
    assert any("some GPU" in word or "GPU" in word or "TB/s" in word for word in words)


def test_ideal_of_a_memory_bound_product_is_the_ratio_of_bytes():
    svg = show.peak(RESULTS, RATES, "gpu")
    told = re.findall(r"<title>ours: ([^<]*)</title>", svg)

    assert told == ["1, 3", "16, 18"]
    assert "ideal INT4" in svg
    assert "2:4" not in svg
    assert "ideal INT4 2:4" in show.peak([*RESULTS, result(1, "ours 2:4", 4.0), result(16, "ours 2:4", 4.0)], RATES, "gpu")


def test_models_weigh_layers_by_their_time():
    """Speed-up of a model is that of the sum of its layers."""
    results = [result(1, "torch", 1.0, n=512, model="m"), result(1, "ours", 4.0, n=512, model="m")]
    results += [result(1, "torch", 1.0, n=256, model="m"), result(1, "ours", 1.0, n=256, model="m")]

    assert "<title>m, ours: 1, 1.6</title>" in show.models(results, RATES, "gpu")
