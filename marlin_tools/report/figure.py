"""Line charts as SVG files: what was measured over a logarithmic axis of batch sizes, with ideal lines behind it.

One file, no script, no font of its own; legible on a white and on a dark page, and on paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from math import ceil, floor, log2, log10

WIDTH, HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 190, 54, 52
_COLORS = ("#1668b8", "#d1571b", "#2f8f4e", "#8a4fb8", "#b8860b", "#5f6b7a", "#c2376b", "#1f9aa8")
_IDEAL = "#8a94a0"
_STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #39424e }
.title { font-size: 15px; font-weight: 600; fill: #1b222b }
line { stroke: #d5dae0 }
polyline { fill: none; stroke-width: 2 }
.ideal { stroke-dasharray: 6 4; stroke-width: 1.4 }
.dotted { stroke-dasharray: 2 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #c3cad3 }
  .title { fill: #f0f3f6 }
  line { stroke: #3a434e }
  .paper { fill: #161b22 }
}
</style>"""


@dataclass(frozen=True)
class Line:
    """Points (x, y) of one contestant; an ideal one is dashed, without marks.

    Lines of the same `hue` have the same colour. Without one, a line has the next colour, and an ideal one is grey.
    """

    name: str
    points: Sequence[tuple[float, float]]
    ideal: bool = False
    hue: int | None = None
    dotted: bool = False


@dataclass(frozen=True)
class Axis:
    """What is drawn along it; logarithmic to base 2 or 10, or linear from zero."""

    title: str
    base: int | None = None


def chart(title: str, remark: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """The picture as one SVG document."""
    points = [point for line in lines for point in line.points]
    across = _Scale([p[0] for p in points], x.base, _LEFT, WIDTH - _RIGHT)
    up = _Scale([p[1] for p in points], y.base, HEIGHT - _BOTTOM, _TOP)
    label = escape(title, quote=True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        _STYLE,
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text><text x="{_LEFT}" y="40">{escape(remark)}</text>',
    ]
    for value, place in across.ticks():
        parts.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{place:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{_spell(value)}</text>')
    for value, place in up.ticks():
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{_spell(value)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x.title)}</text>')
    height = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(f'<text transform="translate(16 {height}) rotate(-90)" text-anchor="middle">{escape(y.title)}</text>')
    hues = count()
    drawn = []
    for index, line in enumerate(lines):
        grey = line.hue is None and line.ideal
        color = _IDEAL if grey else _COLORS[(next(hues) if line.hue is None else line.hue) % len(_COLORS)]
        drawn.append((not line.ideal, _drawn(line, color, _TOP + 8 + 20 * index, across, up)))
    for _, part in sorted(drawn, key=lambda each: each[0]):  # the ideal behind the real
        parts += part
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(line: Line, color: str, legend: float, across: "_Scale", up: "_Scale") -> list[str]:
    """One line with its marks, and its entry in the legend."""
    places = [(across(x), up(y)) for x, y in line.points]
    look = f'stroke="{color}"' + ' class="ideal"' * line.ideal + ' class="dotted"' * (line.dotted and not line.ideal)
    parts = [f'<polyline {look} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>']
    if not line.ideal:
        for (a, b), (x, y) in zip(places, line.points, strict=True):
            told = f"<title>{escape(line.name)}: {_spell(x)}, {y:.3g}</title>"
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{color}">{told}</circle>')
    start = WIDTH - _RIGHT + 16
    parts.append(f'<polyline {look} points="{start},{legend:.1f} {start + 22},{legend:.1f}"/>')
    parts.append(f'<text x="{start + 28}" y="{legend + 4:.1f}">{escape(line.name)}</text>')
    return parts


class _Scale:
    """Values to places on the picture, and the round values that are worth a line."""

    def __init__(self, values: Sequence[float], base: int | None, first: float, last: float) -> None:
        self._base, self._first, self._last = base, first, last
        if base is None:
            power = 10.0 ** floor(log10(max(values) / 6))  # the step is the next of 1, 2, 5, 10 times a power of ten
            self._step = next(m * power for m in (1, 2, 5, 10) if m * power >= max(values) / 6 * (1 - 1e-9))
            self._low, self._high = 0.0, self._step * ceil(max(values) / self._step - 1e-9)
        else:
            logs = [self._log(value) for value in values]
            self._low, self._high = floor(min(logs) + 1e-9), max(ceil(max(logs) - 1e-9), floor(min(logs)) + 1)

    def __call__(self, value: float) -> float:
        at = self._log(value) if self._base else value
        return self._first + (at - self._low) / (self._high - self._low) * (self._last - self._first)

    def ticks(self) -> list[tuple[float, float]]:
        """(value, place) of the lines."""
        if self._base:
            every = 1 + int(self._high - self._low) // 12
            values = [float(self._base) ** power for power in range(int(self._low), int(self._high) + 1, every)]
        else:
            values = [self._step * i for i in range(round(self._high / self._step) + 1)]
        return [(value, self(value)) for value in values]

    def _log(self, value: float) -> float:
        return log2(value) if self._base == 2 else log10(value)


def _spell(value: float) -> str:
    return f"{value:g}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e")
