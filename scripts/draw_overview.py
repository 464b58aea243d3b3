"""Draw the picture of the README from the tables of the pages: `python scripts/draw_overview.py`.

Left, milliseconds per token in vLLM (`docs/serving.md`); right, what INT4 costs (`docs/accuracy.md`).
A test holds the file to both.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "img" / "overview.svg"
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #39424e }
.title { font-size: 14px; font-weight: 600; fill: #1b222b }
.small { font-size: 12px }
.paper { fill: #ffffff }
.ours { fill: #4453b8 }
.others { fill: #aab4c0 }
@media (prefers-color-scheme: dark) {
  text { fill: #c3cad3 }
  .title { fill: #f0f3f6 }
  .paper { fill: #161b22 }
  .ours { fill: #8b97e8 }
  .others { fill: #55606d }
}
</style>"""
SPEED = {
    "FP16": "FP16",
    "INT4, Machete (vLLM's choice)": "INT4, vLLM's Machete",
    "INT4, ours": "INT4, ours",
    "INT4 and 2:4, ours": "INT4 with 2:4, ours",
}
ACCURACY = {
    "round to nearest, absmax": "round to nearest",
    "llm-compressor 0.14.0.1, GPTQ W4A16 g128": "llm-compressor, GPTQ",
    "`--preset marlin`, the paper's recipe": "ours, preset marlin",
    "`--preset fast`": "ours, preset fast",
    "`--preset default`": "ours, preset default",
}


def cells(page: str, row: str) -> list[str]:
    """What stands in the row of a page's table that begins with this label."""
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"| {row} |"):
            return [cell.strip() for cell in line.strip("| ").split("|")][1:]
    raise LookupError(f"docs/{page} has no row `{row}`")


def first(cell: str) -> str:
    """The first number of a cell, of several seeds the first seed's."""
    return re.findall(r"[\d.]+", cell)[0]


def panel(left: int, title: str, under: str, bars: list[tuple[str, str]]) -> list[str]:
    """A title, a line that says what was measured, and horizontal bars with their numbers."""
    longest = max(float(value) for _, value in bars)
    parts = [f'<text class="title" x="{left}" y="24">{title}</text>', f'<text class="small" x="{left}" y="44">{under}</text>']
    for number, (label, value) in enumerate(bars):
        y, width = 62 + 30 * number, 150 * float(value) / longest
        kind = "ours" if "ours" in label else "others"
        parts += [
            f'<text x="{left}" y="{y + 15}">{label}</text>',
            f'<rect class="{kind}" x="{left + 152}" y="{y}" width="{width:.1f}" height="20" rx="3"/>',
            f'<text x="{left + 158 + width:.1f}" y="{y + 15}">{value}</text>',
        ]
    return parts


def draw() -> str:
    """The picture as SVG."""
    speed = [(label, first(cells("serving.md", row)[0])) for row, label in SPEED.items()]
    accuracy = [(label, first(cells("accuracy.md", row)[0])) for row, label in ACCURACY.items()]
    body = panel(16, "Milliseconds per token, batch 1", "Llama-2-7B shapes in vLLM 0.22.1, H200, 2026-11-30", speed)
    body += panel(396, "Mean KL divergence to FP16, in nats", "a 26 M Llama on WikiText-2, H100 80GB, 2026-11-21", accuracy)
    label = "Speed in vLLM and loss of accuracy, beside other projects; shorter is better"
    size = 'viewBox="0 0 760 244" width="760" height="244"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
    foot = '<text class="small" x="16" y="232">Shorter is better in both.</text>'
    return "\n".join([head, STYLE, '<rect class="paper" width="760" height="244"/>', *body, foot, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
