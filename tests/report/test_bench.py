"""Figures of the benchmarks: what is drawn is what was measured, to scale."""

import re
from html import unescape

import pytest

from marlin_tools.bench.figures import FigureData
from marlin_tools.bench.kernels import BenchSettings, Measurement, Rates
from marlin_tools.report import kernel_pictures as pictures
from marlin_tools.report.figure import Axis, Line, chart

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
SPARSE = [result(m, "ours 2:4", 4.0) for m in (1, 16)]


def measured(results, figure=None, gpu="some GPU", **settings):
    return FigureData(figure, gpu, BenchSettings(**settings), RATES, {}, tuple(results))


def told(svg, name):
    """The points of a line, as its marks tell them."""
    return [
        text.removeprefix(f"{name}: ") for text in re.findall(r"<title>([^<]*)</title>", svg) if text.startswith(f"{name}: ")
    ]


@pytest.mark.parametrize("figure", pictures.FIGURES)
def test_every_figure_is_a_picture(figure):
    (svg,) = pictures.draw(measured(RESULTS, figure)).values()
    lines, words = drawn(svg)

    assert len(lines) >= 2
    assert any("some GPU" in word for word in words)


def test_the_plain_benchmark_has_two_pictures():
    shown = pictures.draw(measured([*RESULTS, result(16, "dequantize + cuBLAS", 0.5)]))

    assert list(shown) == ["-speedup", "-roofline"]
    assert told(shown["-speedup"], "ours") == ["1, 3", "16, 18"]
    assert told(shown["-roofline"], "ours") == ["1, 0.5", "16, 0.5"]
    assert "cuBLAS" not in shown["-speedup"]


def test_means_are_over_the_shapes():
    svg = pictures.draw(measured([*RESULTS, result(1, "ours", 12.0, n=512)]))["-speedup"]

    assert told(svg, "ours") == ["1, 6", "16, 18"]


def test_others_are_shown_where_they_were_measured():
    """The same shapes, type and groups on the same kind of GPU; nowhere else."""
    same = measured(RESULTS, gpu="NVIDIA H100 80GB HBM3")

    assert len(told(pictures.draw(same)["-speedup"], "Machete *")) == 12
    assert "measured on another one" in pictures.draw(same)["-speedup"]
    assert "Sparse-Marlin *" in pictures.draw(same)["-roofline"]
    for other in (
        measured(RESULTS, gpu="NVIDIA A100"),
        measured(RESULTS, gpu="NVIDIA H100", dtype="bfloat16"),
        measured(RESULTS, gpu="NVIDIA H100", models=("peak",)),
        measured(RESULTS, gpu="NVIDIA H100", group_size=-1),
    ):
        assert "*" not in pictures.draw(other)["-speedup"]
        assert "*" not in pictures.draw(other)["-roofline"]


def test_ideal_of_a_memory_bound_product_is_the_ratio_of_bytes():
    svg = pictures.peak(measured(RESULTS))
    m, k, n = 1, 4096, 1024
    ratio = (k * n * 2 + 2 * m * (k + n)) / (k * n * 4.125 / 8 + 2 * m * (k + n))
    ideal = pictures._ideals(measured(RESULTS), RESULTS[0], "ours", [1.0])

    assert told(svg, "ours") == ["1, 3", "16, 18"]
    assert ideal == [(1.0, pytest.approx(ratio))]
    assert "ideal INT4" in svg
    assert "2:4" not in svg
    assert "ideal INT4 2:4" in pictures.peak(measured([*RESULTS, *SPARSE]))


def test_models_weigh_layers_by_their_time():
    """Speed-up of a model is that of the sum of its layers."""
    results = [result(1, "torch", 1.0, n=512, model="paper-m"), result(1, "ours", 4.0, n=512, model="paper-m")]
    results += [result(1, "torch", 1.0, n=256, model="paper-m"), result(1, "ours", 1.0, n=256, model="paper-m")]

    assert told(pictures.models(measured(results)), "m, ours") == ["1, 1.6"]


def test_what_belongs_together_has_one_color():
    svg = pictures.peak(measured([*RESULTS, *SPARSE]))
    colors = dict(zip(("ours", "ours 2:4"), dict.fromkeys(re.findall(r'<circle [^>]*fill="([^"]*)"', svg)), strict=True))
    ideals = set(re.findall(r'<polyline stroke="([^"]*)" class="ideal"', svg))

    assert ideals == set(colors.values())
    assert len(ideals) == 2
