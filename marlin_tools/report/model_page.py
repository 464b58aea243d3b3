"""report.html of a model directory: what it has cost, where, how it was made, and how to use it.

Nothing on it depends on where the directory lies. All times stand in one section, which is taken from `times` in manifest.json;
everything else is the same for the same inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from marlin_tools.evaluation.scores import Score, spell
from marlin_tools.report.charts import columns
from marlin_tools.report.page import TIMES, code, details, facts, page, paragraphs, section, table, tiles, verdict, words
from marlin_tools.report.result import Result
from marlin_tools.report.serving import commands


def model_page(result: Result) -> str:
    """The whole page."""
    tokens = result.manifest.get("calibration")
    read = "reading" if result.manifest.get("stage") == "finetune" else "calibrated on"
    text = f", {read} {tokens['tokens']:,} tokens of `{tokens['source']}`" if tokens else ", without calibration data"
    stored = f"in the format `{result.facts['format']}`" if result.quantized else "with two of every four weights zero"
    lead = words(f"`{result.base}` {stored}: {result.method}{text}.")
    parts = [tiles(_figures(result)), _before_and_after(result), _learning(result), _layers(result), _weights(result)]
    parts += [_costs(result.manifest.get("times", {})), _remarks(result), _serving(result), _origin(result)]
    over = {"prune": "Pruning report", "finetune": "Finetuning report"}.get(
        result.manifest.get("stage", ""), "Quantisation report"
    )
    return page(f"{result.base.rpartition('/')[2]} · {result.scheme}", over, lead, "\n".join(filter(None, parts)))


def _figures(result: Result) -> Iterator[tuple[str, str, str]]:
    """The numbers that most people come for."""
    total = result.facts["bytes"]["total"]
    if result.quantized:
        before = result.before_bytes
        yield "Size", size(total), f"{before / total:.2f} × smaller than {size(before)} in 16 bits"
        yield (
            "Quantised linears",
            f"{result.bits:.2f} bits",
            f"per weight, scales included; {result.facts['quantized']} linears",
        )
    elif sparsity := result.facts["sparsity"]:
        where = f"of the weights of {sparsity['linears']} linears; {size(total)} in all"
        yield "Zeros", f"{100 * sparsity['zeros']:.1f} %", where
    if result.evaluation is not None:
        compared = [score for score in result.evaluation.scores if score.part_of is None and score.recovery is not None]
        if compared:
            worst = min(compared, key=lambda score: score.recovery or 0.0)
            yield "Recovery", f"{worst.recovery:.1f} %", f"of the original at worst: {_label(worst)}"
        for score in result.evaluation.scores:
            if score.metric == "kl":
                yield "Distance to the original", f"{score.value:.4f}", f"nats per token (mean KL) on {score.task}"
                break
    if result.verification is not None:
        passed = sum(check.ok for check in result.verification.checks)
        checks = len(result.verification.checks)
        yield "Verification", verdict("ok" if result.verification.ok else "FAILED"), f"{passed} of {checks} checks passed"


MINUS = "\N{MINUS SIGN}"
"""As long as a plus; a hyphen is not."""

_METRICS = {"acc": "accuracy", "acc_norm": "accuracy, by length", "kl": "mean KL, nats", "top1": "same likeliest token"}
"""What some metrics are called by people."""


def metric_name(metric: str) -> str:
    """For people."""
    return _METRICS.get(metric, metric.replace("_", " "))


def _label(score: Score) -> str:
    return f"{score.task}, {metric_name(score.metric)}"


def _before_and_after(result: Result) -> str:
    title, evaluation = "Before and after", result.evaluation
    if evaluation is None:
        hint = "marlin-tools eval DIR --tasks ppl:wikitext2,mmlu --baseline ORIGINAL"
        return section(title, words("Nobody has measured this model yet.") + code(hint))
    rows = [_score_row(score) for score in evaluation.scores if score.part_of is None]
    names = ("task", "metric", "INT4" if result.quantized else "2:4", "original", "difference", "recovery")
    parts = [score for score in evaluation.scores if score.part_of is not None]
    more = details(f"{len(parts)} parts of groups", table(names, map(_score_row, parts), "numbers")) if parts else ""
    how = evaluation.model
    about = (
        f"± is one standard error; that of a difference is from the same items answered by both models. "
        f"Measured with backend `{how.get('backend')}` in {how.get('computed_in')} on {how.get('device')}."
    )
    if how.get("format") != result.facts["format"] and result.quantized:
        about += f" The same codes and scales were measured, stored as `{how.get('format')}`."
    return section(
        title, table(names, rows, "numbers") + more + (paragraphs(evaluation.notes) if evaluation.notes else ""), about
    )


def _score_row(score: Score) -> list[str]:
    on = score.details.get("on")
    name = f'<span class="name">{escape(score.task)}</span>' + (f" <small>{escape(str(on))}</small>" if on else "")
    recovery = "" if score.recovery is None else f"{score.recovery:.1f} %"
    return [
        f"<span>{name}</span>",
        escape(metric_name(score.metric)),
        number(score.value, score.stderr),
        number(score.baseline, score.baseline_stderr),
        number(score.difference, score.difference_stderr, sign="+"),
        recovery,
    ]


def number(value: float | None, stderr: float | None = None, sign: str = "") -> str:
    """A number with its standard error; empty if there is none."""
    if value is None:
        return ""
    error = "" if stderr is None else f" <small>± {stderr:.4f}</small>"
    return f"<span>{spell(value, sign=sign).replace('-', MINUS)}{error}</span>"


def _layers(result: Result) -> str:
    """One panel for each kind of linear, a bar for each block, all to one scale."""
    linears: Sequence[Mapping[str, Any]] = result.manifest.get("linears", [])
    measured = [entry for entry in linears if entry.get("output_error") is not None]
    what = "output" if measured else "weight"
    entries = measured or [entry for entry in linears if entry.get("weight_error") is not None]
    if not entries:
        return ""
    key = f"{what}_error"
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        kinds.setdefault(_kind(entry["name"]), []).append(entry)
    top = max(entry[key] for entry in entries)
    panels = "".join(_panel(kind, members, key, top) for kind, members in kinds.items())
    worst = sorted(entries, key=lambda entry: -entry[key])[:10]
    rows = [(f"<code>{escape(entry['name'])}</code>", f"{entry[key]:.3%}", _shape(entry)) for entry in worst]
    listing = details("The ten that lost most", table(("linear", f"{what} lost", "outputs x inputs"), rows))
    taken = f"energy that {_taker(result)} taken"
    about = (
        f"Share of the output's {taken}, on the calibration text, by block. "
        if what == "output"
        else f"Share of the weights' {taken}, by block; what outputs lose was not measured. "
    )
    return section(
        "What each linear lost",
        f'<div class="panels">{panels}</div>{listing}',
        f"{about}All panels reach up to {top:.2%}; the worst linear stands out.",
    )


def _taker(result: Result) -> str:
    """What the errors of the linears come from."""
    if not result.quantized:
        return "pruning has"
    return "pruning and rounding have" if (result.manifest.get("settings") or {}).get("sparsity") == "2:4" else "rounding has"


def _learning(result: Result) -> str:
    """How near the student has come to its teacher, on text that it was not trained on."""
    measured: Sequence[tuple[int, float]] = result.manifest.get("held_out_kl", [])
    if len(measured) < 2:
        return ""
    top = max(kl for _, kl in measured)
    bars = [(kl, f"after {step} steps: {kl:.4f} nats") for step, kl in measured]
    label = f"mean KL to the teacher, from {measured[0][1]:.4f} to {measured[-1][1]:.4f}"
    axis = f'<div class="axis"><span>{measured[0][0]}</span><span>steps</span><span>{measured[-1][0]}</span></div>'
    panel = _histogram(
        "Mean KL to the teacher", f"nats per token on held-out text, up to {top:.3f}", columns(bars, top, label), axis
    )
    about = (
        f"It began at {measured[0][1]:.4f} and ended at {measured[-1][1]:.4f} nats per token. The zeros stayed where they were."
    )
    return section("What it has learned", f'<div class="panels wide">{panel}</div>', about)


def _kind(name: str) -> str:
    """A linear's name within its block: what follows the number."""
    parts = name.split(".")
    place = max((index for index, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[place + 1 :])


def _shape(entry: Mapping[str, Any]) -> str:
    n, k = entry["shape"]
    return f"{n} x {k}"


def _panel(kind: str, members: Sequence[Mapping[str, Any]], key: str, top: float) -> str:
    values = [entry[key] for entry in members]
    worst = values.index(max(values))
    bars = [(value, f"block {index}: {value:.3%}") for index, value in enumerate(values)]
    told = f"{kind}: {max(values):.3%} at most, in block {worst}"
    chart = columns(bars, top, told, marked=worst if max(values) == top else None)
    return (
        f'<div class="panel"><p class="name">{escape(kind)}</p><p class="note">at most {max(values):.2%}, block {worst}</p>'
        f'<div class="plot">{chart}</div>'
        f'<div class="axis"><span>0</span><span>block</span><span>{len(values) - 1}</span></div></div>'
    )


def _weights(result: Result) -> str:
    found = result.weights
    if found is None:
        return ""
    top = max(found.codes)
    codes = [(share, f"code {code - 8:+d}: {share:.2%} of the weights") for code, share in enumerate(found.codes)]
    labels = "".join(f"<span>{code - 8}</span>" for code in range(len(codes)))
    parts = [
        _histogram(
            "Codes",
            f"share of weights, up to {top:.1%}",
            columns(codes, top, "codes"),
            f'<div class="axis cells">{labels}</div>',
        )
    ]
    if found.scales:
        top = max(share for _, share in found.scales)
        scales = [(share, f"from {low:.3g}: {share:.2%} of the groups") for low, share in found.scales]
        low, high = found.scales[0][0], found.scales[-1][0] * 2**0.25
        middle = found.scales[len(found.scales) // 2][0]
        axis = f'<div class="axis"><span>{low:.2g}</span><span>{middle:.2g}</span><span>{high:.2g}</span></div>'
        note = f"share of groups by magnitude (logarithmic), up to {top:.1%}; {found.negative:.1%} are negative"
        parts.append(_histogram("Scales", note, columns(scales, top, "scales"), axis))
    read = "all of them" if found.read == found.linears else f"{found.read} of {found.linears} linears, evenly spread"
    about = f"A stored weight is code times scale. Looked at: {read}. Code 0 stands for a weight that is exactly zero."
    return section("Codes and scales", f'<div class="panels wide">{"".join(parts)}</div>', about)


def _histogram(name: str, note: str, chart: str, axis: str) -> str:
    return (
        f'<div class="panel"><p class="name">{escape(name)}</p><p class="note">{escape(note)}</p>'
        f'<div class="plot">{chart}</div>{axis}</div>'
    )


def _costs(times: Mapping[str, Any]) -> str:
    """Between marks: the one part that differs from run to run."""
    stages: Mapping[str, Mapping[str, float]] = times.get("stages", {})
    if not stages:
        return f"{TIMES[0]}{TIMES[1]}"
    longest = max(cost["seconds"] for cost in stages.values())
    rows = []
    for stage, cost in stages.items():
        share = 100 * cost["seconds"] / longest if longest else 0.0
        gpu = f"{cost['gpu_gb']:.1f} GB" if "gpu_gb" in cost else ""
        bar = f'<span class="spent" style="width:{share:.1f}%"></span>'
        rows.append(
            (f'<span class="name">{escape(stage)}</span>', bar, duration(cost["seconds"]), f"{cost['host_gb']:.1f} GB", gpu)
        )
    real, expected = times.get("real"), times.get("forecast")
    told = (
        f" The forecast for making it was {duration(expected['seconds'])}, it took {duration(real['seconds'])}."
        if real and expected
        else ""
    )
    about = f"Memory is the highest that the process had used by the end of the stage.{told}"
    names = ("stage", "", "time", "host memory", "GPU memory")
    width = len(names) if any(row[-1] for row in rows) else len(names) - 1
    shown = table(names[:width], [row[:width] for row in rows], "stages")
    return f"{TIMES[0]}\n{section('Time and memory', shown, about)}\n{TIMES[1]}"


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _remarks(result: Result) -> str:
    """What was left out, replaced, or refused."""
    lines = [f"Warning: {text}" for text in result.manifest.get("warnings", [])]
    lines += [f"`{name}` was left as it is: {reason}" for name, reason in result.manifest.get("kept", {}).items()]
    tokens = result.manifest.get("calibration") or {}
    lines += [f"Calibration: {note}" for note in tokens.get("notes", ())]
    if result.verification is not None:
        lines += [f"Check `{check.name}` failed: {check.detail}" for check in result.verification.checks if not check.ok]
        lines += [f"Check `{check.name}` was skipped: {check.detail}" for check in result.verification.checks if check.skipped]
    elif result.quantized:
        lines.append("Not verified in this run: `marlin-tools verify DIR` does.")
    nothing = "Nothing was left out, nothing fell back, no damping was raised, and no check was skipped."
    return section("Left out, replaced, refused", paragraphs(lines) if lines else f"<p>{nothing}</p>")


def _serving(result: Result) -> str:
    if not result.quantized:
        next_steps = (
            "marlin-tools finetune DIR --teacher ORIGINAL\nmarlin-tools quantize DIR --sparsity keep --format marlin-24"
        )
        about = "Every engine that runs the original runs this, no faster. What makes the zeros worth it comes next:"
        return section("How to go on", code(next_steps), about)
    rows = [
        (
            f'<span class="name">{escape(engine["engine"])}</span>',
            escape(engine["version"]),
            verdict("ok" if engine["loads"] else "no"),
            ", ".join(map(str, engine["tensor_parallel"])),
            words(
                engine["verdict"].partition(": ")[2] if not engine["loads"] else "; ".join(engine["verdict"].split("; ")[1:])
            ),
        )
        for engine in result.facts["engines"]
    ]
    names = ("engine", "version", "loads", "tensor parallel", "remark")
    shown = code("\n".join(commands(result)))
    about = "Known from the format and the shapes, without starting the engines. DIR is the directory that this page lies in."
    return section("How to serve it", (table(names, rows, "prose") if rows else "") + shown, about)


def _origin(result: Result) -> str:
    """How it was made, down to the versions."""
    manifest = result.manifest
    model, tokens = result.original, manifest.get("calibration")
    rows = [
        ("original", f"`{result.base}`, fingerprint `{str(model.get('fingerprint', 'unknown'))[:16]}`"),
        ("method", result.method),
    ]
    if solver := manifest.get("solver"):
        rows.append(("solver", ", ".join(f"{key} {value}" for key, value in solver.items() if key != "kind") or "no settings"))
    if tokens:
        shape = f"{tokens['sequences']} sequences, {tokens['tokens']:,} tokens, seed {tokens['seed']}"
        rows.append(("calibration", f"`{tokens['source']}`: {shape}, fingerprint `{tokens['fingerprint'][:16]}`"))
    rows.append(("computed on", str(manifest.get("device", "unknown"))))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())))
    recipe = details("The recipe, with every setting", code(result.recipe)) if result.recipe else ""
    again = "`marlin-tools run recipe.yaml` makes the same bytes on the same machine with the same versions."
    return section("How it was made", facts(rows) + recipe, again)
