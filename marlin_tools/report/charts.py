"""Charts as inline SVG: shapes only, stretched to the width that there is. Words stand beside them as HTML and stay legible.

All colours are classes of the page's style sheet, so the charts follow light and dark. Each bar says its value when pointed at.
"""

from collections.abc import Sequence
from html import escape

Bar = tuple[float, str]
"""(value, what it says when pointed at)"""

_GAP = 0.16
"""Empty share of a bar's place."""


def columns(bars: Sequence[Bar], top: float, label: str, *, marked: int | None = None) -> str:
    """Vertical bars side by side; `top` is the value of the full height, `marked` one bar that stands out."""
    shapes = []
    for index, (value, said) in enumerate(bars):
        height = max(100 * value / top, 0.8) if top and value else 0.0
        kind = "bar marked" if index == marked else "bar"
        reach = f'<rect class="reach" x="{index}" y="0" width="1" height="100"><title>{escape(said)}</title></rect>'
        place = f'x="{index + _GAP / 2:.2f}" y="{100 - height:.2f}" width="{1 - _GAP:.2f}" height="{height:.2f}"'
        shapes.append(f'<g>{reach}<rect class="{kind}" {place}/></g>')
    return _svg(max(len(bars), 1), 100, label, "".join(shapes))


def band(difference: float, tolerance: float) -> str:
    """Where a measured number lies: the allowed band around the expected one, and a mark that stays inside the picture."""
    reach = 2 * tolerance if tolerance else 1.0
    place = 50 + 50 * max(-1.0, min(1.0, difference / reach))
    kind = "inside" if abs(difference) <= tolerance else "outside"
    label = f"{difference:+.4g} of ±{tolerance:g} allowed"
    shapes = (
        '<rect class="track" x="0" y="8" width="100" height="4"/><rect class="allowed" x="25" y="5" width="50" height="10"/>'
        '<rect class="expected" x="49.6" y="5" width="0.8" height="10"/>'
        f'<rect class="{kind}" x="{place - 1.5:.2f}" y="2" width="3" height="16"><title>{escape(label)}</title></rect>'
    )
    return _svg(100, 20, label, shapes)


def _svg(width: float, height: float, label: str, shapes: str) -> str:
    name = escape(label, quote=True)
    return f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" role="img" aria-label="{name}">{shapes}</svg>'
