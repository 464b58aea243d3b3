"""What a better preset buys: `rtn` beside the result of `quantize.py`, as a picture that needs no library.

python examples/quantize.py && python examples/two_presets.py       writes runs/two-presets.svg
"""

from pathlib import Path

import marlin_tools as mt

SIDES = {"rtn": (Path("runs/example-rtn"), "#b1271b"), "fast": (Path("runs/example"), "#1f6fae")}
PICTURE = Path("runs/two-presets.svg")


def distances(directory: Path) -> dict[str, float]:
    """How far a model is from the original: 0 in everything would be the same model."""
    scores = mt.evaluate(directory, mt.EvaluateSettings(tasks=("ppl:demo",), limit=4), baseline="demo")
    kl, top1, perplexity = (scores.score("ppl:demo", metric) for metric in ("kl", "top1", "perplexity"))
    assert perplexity.increase is not None
    return {"mean KL": kl.value, "other likeliest token, %": 100 - 100 * top1.value, "more perplexity, %": perplexity.increase}


def main() -> None:
    """Quantise with the other preset, measure both, draw: each measure to its own scale."""
    mt.quantize("demo", None, mt.QuantizeSettings(preset="rtn"), SIDES["rtn"][0], overwrite=True)
    found = {preset: distances(directory) for preset, (directory, _) in SIDES.items()}
    parts = ['<rect width="100%" height="100%" fill="#fff"/>']
    for i, measure in enumerate(found["rtn"]):
        top = max(each[measure] for each in found.values())
        parts.append(f'<text x="10" y="{30 + 80 * i}">{measure}</text>')
        for j, (preset, (_, color)) in enumerate(SIDES.items()):
            value, y = found[preset][measure], 36 + 80 * i + 24 * j
            parts.append(f'<rect x="10" y="{y}" width="{300 * value / top:.1f}" height="18" fill="{color}"/>')
            parts.append(f'<text x="{16 + 300 * value / top:.1f}" y="{y + 14}">{preset} {value:.3g}</text>')
            print(f"{measure:>24}  {preset:>5}  {value:.4g}")
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 420 260" font-family="sans-serif" font-size="14">'
    PICTURE.write_text("\n".join((head, *parts, "</svg>\n")), encoding="utf-8")


if __name__ == "__main__":
    main()
