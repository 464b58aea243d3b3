"""Quantise the embedded model to INT4 and measure it beside the original: the first to run, others use its result.

python examples/quantize.py [MODEL]     a directory, a hub id or an alias in the place of `demo`
"""

import sys

import marlin_tools as mt

RESULT = "runs/example"


def main(model: str = "demo") -> None:
    """Open, calibrate, quantise, check, measure."""
    base = mt.Checkpoint.open(model)
    tokens = mt.calibrate("demo" if model == "demo" else "c4", base, num_samples=8, seqlen=512)
    int4 = mt.quantize(base, tokens, mt.QuantizeSettings(preset="fast"), RESULT)

    checked = mt.verify(int4)
    print(f"{RESULT}: {checked.counted}; loads in {', '.join(each.engine for each in checked.engines if each.loads)}")

    task = "ppl:demo" if model == "demo" else "ppl:wikitext2"
    scores = mt.evaluate(int4, mt.EvaluateSettings(tasks=(task,), limit=4), baseline=base)
    for score in scores.scores:
        print(
            f"{score.metric:>10}: {score.value:.4f}"
            + (f", original {score.baseline:.4f}" if score.baseline is not None else "")
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
