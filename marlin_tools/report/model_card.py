"""README.md of a model directory: the card that the hub shows. Nothing on it depends on when or where the model was made."""

from collections.abc import Iterator

from marlin_tools.checkpoint.reader import hub_name
from marlin_tools.report.result import Result
from marlin_tools.report.serving import commands
from marlin_tools.report.text import facts, table


def model_card(result: Result) -> str:
    """Front matter for the hub, then what it is, how it was made, what it scores, and how to serve it."""
    return "\n".join([*_front_matter(result), *_what(result), *_how(result), *_numbers(result), *_serving(result)])


def _front_matter(result: Result) -> Iterator[str]:
    yield "---"
    public, _ = hub_name(str(result.original.get("origin", "")))
    if result.base_is_public(public):
        yield f"base_model: {public}"
        yield "base_model_relation: quantized"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield f"tags: [int4, {result.facts['format']}, marlin-tools]"
    yield "---"
    yield ""


def _what(result: Result) -> Iterator[str]:
    kept = len(result.manifest.get("kept", {}))
    yield f"# {result.base.rpartition('/')[2]}, {result.scheme}"
    yield ""
    yield f"`{result.base}` with {result.facts['quantized']} linears in INT4, stored as `{result.facts['format']}`:"
    yield f"{result.bits:.2f} bits per weight, scales included."
    same = "Embeddings and the head" if result.finetuned else "Embeddings, norms and the head"
    yield f"{same} are as in the original" + (f", as are {kept} linears." if kept else ".")
    yield "The licence of the original model applies. `report.html` beside this card shows every number with a picture."
    yield ""


def _how(result: Result) -> Iterator[str]:
    tokens = result.manifest.get("calibration")
    yield "## How it was made"
    yield ""
    yield f"marlin-tools {result.manifest['tool']['version']}, {result.method}."
    if tokens:
        text = f"{tokens['sequences']} sequences ({tokens['tokens']} tokens) of `{tokens['source']}`"
        yield f"Calibrated on {text}, seed {tokens['seed']}."
        yield from (f"- {note}" for note in tokens["notes"])
    yield "`marlin-tools run recipe.yaml` makes it again; `manifest.json` holds settings, versions, hashes and errors by layer."
    warnings = result.manifest.get("warnings", [])
    if warnings:
        yield ""
        yield from (f"- Warning: {warning}" for warning in warnings)
    yield ""


def _numbers(result: Result) -> Iterator[str]:
    yield "## What it scores"
    yield ""
    if result.evaluation is None:
        yield "Not measured yet."
    else:
        columns, rows = result.evaluation.table()
        yield table(columns, rows)
        yield ""
        measured = result.evaluation.model.get("format")
        same = (
            "" if measured == result.facts["format"] else f" The same codes and scales were measured, stored as `{measured}`."
        )
        yield f"± is one standard error.{same}"
        yield from (f"- {note}" for note in result.evaluation.notes)
    yield ""


def _serving(result: Result) -> Iterator[str]:
    yield "## How to serve it"
    yield ""
    rows = [(f"{engine['engine']} {engine['version']}", engine["verdict"]) for engine in result.facts["engines"]]
    yield table(("engine", "loads"), rows) if rows else facts([("engines", "unknown")])
    yield ""
    yield "```sh"
    yield from commands(result)
    yield "```"
    yield ""
