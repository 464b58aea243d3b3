"""The command line: every verb turns its flags into a recipe, has the engine run it, and prints the result.

stdout carries the result, stderr everything else. Exit codes: 0 done, 1 ran but a check failed, 2 could not run, 130
interrupted. Defaults live in the settings classes: a flag that is not given is not in the recipe. Whatever `--help` does not
need is imported by the function that needs it. The only importer of typer.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from marlin_tools import __version__
from marlin_tools.errors import MarlinToolsError, OutputError, RecipeError

if TYPE_CHECKING:
    from marlin_tools.recipe import Recipe

_UsageError: Any = typer.BadParameter.__mro__[2]
"""Typer's own complaints about arguments: click's class, or that of the copy that newer versions carry."""

_SPELLINGS = {
    "nsamples": "num-samples",
    "num-calibration-samples": "num-samples",
    "max-seq-length": "seqlen",
    "percdamp": "damp",
    "dampening-frac": "damp",
    "dataset": "calib",
    "output-dir": "output",
}
"""What other tools call our options."""

_FLAGS = {"source": "--calib", "formats": "--format", "negative_scales": "--no-negative-scales", "model": "MODEL"}
"""Settings whose option has another name than theirs."""


def _spelling(name: str) -> str:
    name = name.replace("_", "-")
    return _SPELLINGS.get(name, name)


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def _option(*names: str, of: str, text: str) -> Any:
    return typer.Option(*names, metavar=of, help=text, show_default=False)


def _flag(names: str, text: str) -> Any:
    return typer.Option(names, help=text, show_default=False)


_SETTINGS = {"token_normalize_func": _spelling, "help_option_names": ["-h", "--help"], "terminal_width": 100}
_PLAIN: Any = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(context_settings=_SETTINGS, invoke_without_command=True, **_PLAIN)
recipes = typer.Typer(help="List, show, copy and check recipes.", **_PLAIN)
app.add_typer(recipes, name="recipes")

Model = Annotated[str, _argument("MODEL", "Directory, hub id, or alias: demo, llama2-7b, ...")]
Directory = Annotated[Path, _argument("DIR", "Directory of a quantised model.")]
Output = Annotated[Path | None, _option("-o", "--output", of="DIR", text="Where the result goes: runs/<name>-<scheme>.")]
Device = Annotated[str | None, _option(of="NAME", text="cpu, cuda or cuda:N; the first GPU if there is one.")]
Calib = Annotated[
    str | None, _option(of="SOURCE", text="demo, c4, redpajama, wikitext2, pile, ultrachat, FILE, hf:OWNER/NAME.")
]
FORMATS = "compressed-tensors, gptq, marlin, marlin-24; several go to DIR/<format>/."
DryRun = Annotated[bool, _flag("--dry-run", "Print what would be done, and what it would take.")]
Resume = Annotated[bool, _flag("--resume/--no-resume", "Continue an interrupted run (which is the default), or start over.")]
Overwrite = Annotated[bool, _flag("--overwrite", "Replace what is in the way.")]
Strict = Annotated[bool, _flag("--strict", "Exit with 1 if there was any warning.")]
Version = Annotated[bool, _flag("--version", "Print the version and exit.")]
Json = Annotated[bool, _flag("--json", "Print one JSON document.")]


@app.callback()
def _marlin_tools(context: typer.Context, version: Version = False) -> int:
    """Accurate, verified, fast INT4 for Hugging Face causal language models."""
    if version:
        typer.echo(f"marlin-tools {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        return 2
    return 0


@app.command()
def quantize(
    model: Model,
    output: Output = None,
    preset: Annotated[str, _option(of="NAME", text="default, fast, marlin (the paper's recipe) or rtn.")] = "default",
    format: Annotated[str | None, _option(of="F,...", text=FORMATS)] = None,
    calib: Calib = None,
    num_samples: Annotated[int | None, _option(of="N", text="Windows or documents to calibrate on.")] = None,
    seqlen: Annotated[int | None, _option(of="L", text="Tokens per window; if given, text is packed.")] = None,
    group_size: Annotated[int | None, _option(of="128|-1", text="Inputs that share a scale; -1 for one per output.")] = None,
    damp: Annotated[float | None, _option(of="F", text="Added to the Hessian's diagonal, relative to its mean.")] = None,
    seed: Annotated[int | None, _option(of="N", text="Which samples are drawn.")] = None,
    ignore: Annotated[list[str] | None, _option(of="REGEX", text="Linears to leave as they are; repeatable.")] = None,
    no_negative_scales: Annotated[bool, _flag("--no-negative-scales", "For engines that expect positive scales.")] = False,
    device: Device = None,
    dry_run: DryRun = False,
    preview: Annotated[bool, _flag("--preview", "Print the first calibration samples as the model reads them.")] = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Quantise a model to INT4."""
    first, *others = format.split(",") if format else (None,)
    signed = False if no_negative_scales else None
    solver = _given(preset=preset, damp=damp, negative_scales=signed, group_size=group_size)
    stages = [_given(stage="quantize", **solver, format=first, ignore=ignore, device=device)]
    stages += [{"stage": "export", "formats": others}] if others else []
    name = "-".join(filter(None, [_name(model), preset, first, *others]))
    recipe = _recipe(name, model, stages, _given(source=calib, num_samples=num_samples, seqlen=seqlen, seed=seed))
    if preview:
        return _preview(recipe, as_json=json)
    return _run(recipe, output, dry_run=dry_run, resume=resume, overwrite=overwrite, strict=strict, as_json=json)


@app.command()
def export(
    directory: Directory,
    format: Annotated[str, _option(of="F,...", text=FORMATS)],
    output: Annotated[Path, _option("-o", "--output", of="DIR", text="Where the result goes.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Write a quantised model in another format, bit for bit.

    The original model is not needed.
    """
    stage = {"stage": "export", "formats": format.split(",")}
    return _run(_recipe(_name(str(directory)), str(directory), [stage]), output, overwrite=overwrite, as_json=json)


@app.command(name="eval")
def evaluate(
    tasks: Annotated[str, _option("-t", "--tasks", of="T,...", text="ppl:wikitext2, ppl:FILE, and lm-eval's, such as mmlu.")],
    model: Annotated[str | None, _argument("MODEL", "As for quantize; the newest model under runs/ if left out.")] = None,
    baseline: Annotated[str | None, _option(of="MODEL", text="The original, measured on the same items.")] = None,
    backend: Annotated[str | None, _option(of="NAME", text="auto, reference, reference-packed or native.")] = None,
    num_fewshot: Annotated[int | None, _option("-f", "--num-fewshot", of="N", text="Examples in the prompt.")] = None,
    limit: Annotated[float | None, _option("-L", "--limit", of="N", text="Items per task; below 1, a share of them.")] = None,
    batch_size: Annotated[str | None, _option("-b", "--batch-size", of="N|auto", text="Items per forward.")] = None,
    seqlen: Annotated[int | None, _option(of="L", text="Window of a perplexity.")] = None,
    include_path: Annotated[list[str] | None, _option(of="DIR", text="Where more tasks are defined; repeatable.")] = None,
    device: Device = None,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Measure a model, beside the original if it is named."""
    how = _given(backend=backend, batch_size=batch_size, device=device, baseline=baseline)
    what = _given(num_fewshot=num_fewshot, limit=limit, seqlen=seqlen, include_path=include_path)
    stage = {"stage": "evaluate", "tasks": tasks.split(","), **how, **what}
    model = model or _newest()
    return _run(_recipe(_name(model), model, [stage]), overwrite=True, strict=strict, as_json=json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, _option(of="TEXT", text="The text to continue.")],
    device: Device = None,
    json: Json = False,
) -> int:
    """Continue a text."""
    stage = _given(stage="generate", prompt=prompt, device=device)
    return _run(_recipe(_name(model), model, [stage]), as_json=json)


@app.command()
def run(
    recipe: Annotated[str, _argument("RECIPE", "A YAML file, or the name of a bundled recipe.")],
    set_: Annotated[list[str] | None, _option("--set", of="A.B=C", text="Override a setting; repeatable.")] = None,
    from_: Annotated[str | None, _option("--from", of="STAGE", text="Keep what earlier stages made, redo the others.")] = None,
    output: Output = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Run a recipe: all stages that are not done yet."""
    from marlin_tools.recipe import load

    again = {"resume": resume, "overwrite": overwrite, "start": from_}
    return _run(load(recipe, set_ or ()), output, dry_run=dry_run, strict=strict, as_json=json, **again)


@app.command()
def verify(directory: Directory, json: Json = False) -> int:
    """Check a quantised model, and say which engines load it.

    Exits with 1 if a check fails.
    """
    return _run(_recipe(_name(str(directory)), str(directory), [{"stage": "verify"}]), as_json=json)


@app.command()
def inspect(model: Model, json: Json = False) -> int:
    """Say what a model directory holds."""
    from marlin_tools import report, ui
    from marlin_tools.stages.inspect import inspect as look
    from marlin_tools.stages.inspect import rows

    document = look(model)
    ui.write_json(document) if json else ui.write(report.facts(rows(document)))
    return 0


@app.command()
def doctor(json: Json = False) -> int:
    """Say what this machine and this installation can do, and why."""
    from marlin_tools import report, ui
    from marlin_tools.stages.doctor import diagnose

    document = [asdict(fact) for fact in diagnose()]
    ui.write_json(document) if json else ui.write(report.diagnosis(document))
    return 0


Name = Annotated[str, _argument("NAME", "A bundled recipe.")]


@recipes.command(name="list")
def recipes_list() -> int:
    """The bundled recipes."""
    from marlin_tools import recipe, report, ui

    rows = [(name, recipe.load(path).description) for name, path in recipe.bundled().items()]
    ui.write(report.table(("recipe", "what it does"), rows))
    return 0


@recipes.command(name="show")
def recipes_show(name: Name) -> int:
    """Print a recipe as it is."""
    from marlin_tools import recipe, ui

    ui.write(recipe.find(name).read_text(encoding="utf-8"))
    return 0


@recipes.command(name="copy")
def recipes_copy(name: Name, to: Annotated[Path, _argument("FILE", "Where to; a directory keeps the name.")] = Path()) -> int:
    """Copy a recipe, to be changed."""
    from marlin_tools import recipe, ui

    source = recipe.find(name)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise OutputError(f"`{target}` exists", hint="choose another name: marlin-tools recipes copy NAME FILE")
    target.write_bytes(source.read_bytes())
    ui.write(str(target))
    return 0


@recipes.command(name="validate")
def recipes_validate(files: Annotated[list[str], _argument("FILE...", "Recipe files.")]) -> int:
    """Check recipes and report all that is wrong with them."""
    from marlin_tools import recipe, ui

    problems = []
    for file in files:
        try:
            recipe.load(file)
        except RecipeError as error:
            problems.append(error.message)
    if problems:
        raise RecipeError("\n".join(problems), hint="`marlin-tools recipes schema` describes every key")
    ui.write("\n".join(f"{file}: ok" for file in files))
    return 0


@recipes.command(name="schema")
def recipes_schema() -> int:
    """Print the JSON Schema of recipes, for editors."""
    from marlin_tools import recipe, ui

    ui.write_json(recipe.schema())
    return 0


# ---- what the verbs share --------------------------------------------------------------------------------------------------


def _name(model: str) -> str:
    """A model's name without its owner or its parent directories."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"


def _newest() -> str:
    from marlin_tools import ui
    from marlin_tools.run import newest_run

    newest = newest_run()
    ui.note(f"evaluating `{newest}`, the newest model under runs/")
    return str(newest)


def _recipe(name: str, model: str, stages: list[dict[str, Any]], calibrate: dict[str, Any] | None = None) -> "Recipe":
    """The recipe that these options describe; a complaint about a value begins with its option."""
    from marlin_tools.recipe import build

    origins: dict[tuple[str | int, ...], str] = {(): "command line"}
    for place, section in [*((("stages", i), stage) for i, stage in enumerate(stages)), (("calibrate",), calibrate or {})]:
        origins |= {(*place, key): _FLAGS.get(key, f"--{key.replace('_', '-')}") for key in section}
    return build(_given(name=name, model=model, calibrate=calibrate or None, stages=stages), origins)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _run(
    recipe: "Recipe",
    output: Path | None = None,
    *,
    dry_run: bool = False,
    strict: bool = False,
    as_json: bool = False,
    **again: Any,
) -> int:
    """Plan and, unless it is a dry run, execute; then print."""
    from marlin_tools import report, ui
    from marlin_tools.run import execute, plan

    with ui.Display() as display:
        planned = plan(recipe, output)
        result = None if dry_run else execute(planned, display, **again)
    if result is None:
        steps = planned.describe()
        ui.write_json({"steps": steps, "notes": planned.notes}) if as_json else ui.write(report.plan(steps, planned.notes))
        return 0
    parts = result.outputs, result.evaluation, result.verifications, result.text
    ui.write_json(result.describe()) if as_json else ui.write(report.summary(*parts))
    return int(not result.ok or (strict and bool(result.warnings)))


def _preview(recipe: "Recipe", *, as_json: bool) -> int:
    from marlin_tools import ui
    from marlin_tools.checkpoint import Checkpoint
    from marlin_tools.recipe import settle
    from marlin_tools.stages.calibrate import preview

    settled, _ = settle(recipe)
    if settled.calibrate is None:
        raise RecipeError("there is nothing to preview: this preset looks at no data", hint="choose another `--preset`")
    samples = preview(settled.calibrate, Checkpoint.open(recipe.model))
    ui.write_json(samples) if as_json else ui.write("\n\n".join(samples))
    return 0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: run a verb, turn every known failure into one line and a hint, and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for library in ("TRANSFORMERS", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # they warn of their own defaults, not of the user's model
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a CPU that others use too to a standstill
    try:
        code = app(arguments, prog_name="marlin-tools", standalone_mode=False) or 0
    except typer.Abort:
        code = 130
    except MarlinToolsError as error:
        code = _complain(error)
    except _UsageError as error:
        code = _complain(_usage(error))
    if code == 130:
        kept = ": finished blocks and stages are kept" if arguments[0] in {"quantize", "run"} else ""
        _complain(MarlinToolsError("interrupted", hint=f"run the same command again{kept}"))
    sys.exit(code)


def _complain(error: MarlinToolsError) -> int:
    from marlin_tools import ui

    ui.complain(error)
    return 2


def _usage(error: Any) -> MarlinToolsError:
    """Typer's complaint in our form."""
    message, _, rest = re.sub(r"\.? (Did you mean |\(Possible options: )", "\n", error.format_message()).partition("\n")
    context = getattr(error, "ctx", None)
    verb = context.command_path if context else "marlin-tools"
    hint = f"did you mean {rest.rstrip('?)')}?" if rest else f"`{verb} --help` lists what there is"
    return MarlinToolsError(message[:1].lower() + message[1:].rstrip("."), hint=hint)
