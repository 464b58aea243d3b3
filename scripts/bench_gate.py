"""Hold the speed of the kernels against a baseline: two files of `marlin-tools bench kernels --json`, and what may be lost.

    python scripts/bench_gate.py scripts/bench_baseline.json measured/gate.json

What is compared is the speed-up over cuBLAS, since both are of one run: machines with the same card differ in clocks and power.
Every point (kernel, layer, M) may lose 10 %, and the geometric mean of a kernel over its layers 5 % at each M. The reason for
these two: machines of one kind gave means of 3.11 to 3.28 at M = 1 and 1.60 to 1.66 at M = 128, and single layers differ more.

Exit codes: 0 as fast as the baseline, 1 slower (each point is named), 2 not comparable: another card or type, or missing
points.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

POINT = 0.10
MEAN = 0.05

Key = tuple[str, str, str, int]
"""Kernel, model, layer, M."""


class NotComparableError(Exception):
    """The two files say nothing about each other."""


def read(path: Path) -> dict[str, Any]:
    """A document of `bench kernels --json`."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        document["gpu"], document["settings"]["dtype"], document["settings"]["group_size"]
        speedups(document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotComparableError(f"`{path}` is no document of `bench kernels --json`: {error!r}") from error
    return document


def speedups(document: Mapping[str, Any]) -> dict[Key, float]:
    """The speed-up over cuBLAS of every point but those of cuBLAS itself."""
    found = ((r["kernel"], r["model"], r["layer"], r["m"], float(r["speedup"])) for r in document["results"])
    return {(kernel, model, layer, m): speedup for kernel, model, layer, m, speedup in found if kernel != "torch"}


def means(points: Mapping[Key, float]) -> dict[tuple[str, int], float]:
    """The geometric mean over the layers, for every kernel and M."""
    logs: dict[tuple[str, int], list[float]] = {}
    for (kernel, _, _, m), speedup in points.items():
        logs.setdefault((kernel, m), []).append(log(speedup))
    return {key: exp(sum(values) / len(values)) for key, values in logs.items()}


def slower(baseline: Mapping[str, Any], measured: Mapping[str, Any], point: float, mean: float) -> list[str]:
    """A line for every point and every mean that lost more than it may."""
    _comparable(baseline, measured)
    before = speedups(baseline)
    after = {key: value for key, value in speedups(measured).items() if key in before}
    if missing := [key for key in before if key not in after]:
        raise NotComparableError("not measured: " + "; ".join(_named(*key) for key in missing))
    found = [(_named(*key), before[key], after[key], point) for key in before]
    now = means(after)
    found += [
        (f"{kernel}, geometric mean, M = {m}", value, now[kernel, m], mean) for (kernel, m), value in means(before).items()
    ]
    return [*_lost(found)]


def _lost(found: Sequence[tuple[str, float, float, float]]) -> Iterator[str]:
    for name, before, after, allowed in found:
        if not after >= before * (1 - allowed):  # also if it is NaN
            change = f"{before:.2f} -> {after:.2f} times as fast as cuBLAS, {after / before - 1:+.1%}"
            yield f"{name}: {change}, {-allowed:.0%} allowed"


def _comparable(baseline: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """The same card, type and group size."""
    if baseline["gpu"] != measured["gpu"]:
        raise NotComparableError(f"the baseline is of `{baseline['gpu']}`, this is `{measured['gpu']}`")
    for key in ("dtype", "group_size"):
        if baseline["settings"][key] != measured["settings"][key]:
            raise NotComparableError(f"{key}: {baseline['settings'][key]} in the baseline, {measured['settings'][key]} here")


def _named(kernel: str, model: str, layer: str, m: int) -> str:
    return f"{kernel}, {model} {layer}, M = {m}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and say by the exit code what came of it."""
    parser = argparse.ArgumentParser(description="Fail where kernels have become slower.")
    parser.add_argument("baseline", type=Path)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--point", type=float, default=POINT, help="what one point may lose (default: %(default)s)")
    parser.add_argument("--mean", type=float, default=MEAN, help="what a geometric mean may lose (default: %(default)s)")
    asked = parser.parse_args(arguments)
    try:
        baseline, measured = read(asked.baseline), read(asked.measured)
        lost = slower(baseline, measured, asked.point, asked.mean)
    except NotComparableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    now = means({key: value for key, value in speedups(measured).items() if key in speedups(baseline)})
    for (kernel, m), before in means(speedups(baseline)).items():
        print(f"{kernel}, M = {m}: {before:.2f} -> {now[kernel, m]:.2f}")
    for line in lost:
        print(f"error: slower: {line}", file=sys.stderr)
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
