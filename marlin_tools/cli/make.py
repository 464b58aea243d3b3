"""The verbs that make a model: `quantize` and `export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marlin_tools.cli.options import (
    FORMATS,
    PLAIN,
    Calib,
    Device,
    Directory,
    DryRun,
    Json,
    Model,
    Output,
    Overwrite,
    Resume,
    Strict,
    flag,
    option,
)
from marlin_tools.cli.perform import given, perform, recipe_of, short_name
from marlin_tools.errors import RecipeError

if TYPE_CHECKING:
    from marlin_tools.recipe import Recipe

app = typer.Typer(**PLAIN)


@app.command()
def quantize(
    model: Model,
    output: Output = None,
    preset: Annotated[str, option(of="NAME", text="default, fast, marlin (the paper's recipe) or rtn.")] = "default",
    format: Annotated[str | None, option(of="F,...", text=FORMATS)] = None,
    calib: Calib = None,
    num_samples: Annotated[int | None, option(of="N", text="Windows or documents to calibrate on.")] = None,
    seqlen: Annotated[int | None, option(of="L", text="Tokens per window; if given, text is packed.")] = None,
    group_size: Annotated[int | None, option(of="128|-1", text="Inputs that share a scale; -1 for one per output.")] = None,
    damp: Annotated[float | None, option(of="F", text="Added to the Hessian's diagonal, relative to its mean.")] = None,
    seed: Annotated[int | None, option(of="N", text="Which samples are drawn.")] = None,
    ignore: Annotated[list[str] | None, option(of="REGEX", text="Linears to leave as they are; repeatable.")] = None,
    no_negative_scales: Annotated[bool, flag("--no-negative-scales", "For engines that expect positive scales.")] = False,
    device: Device = None,
    dry_run: DryRun = False,
    preview: Annotated[bool, flag("--preview", "Print the first calibration samples as the model reads them.")] = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Quantise a model to INT4."""
    first, *others = format.split(",") if format else (None,)
    signed = False if no_negative_scales else None
    solver = given(preset=preset, damp=damp, negative_scales=signed, group_size=group_size)
    stages = [given(stage="quantize", **solver, format=first, ignore=ignore, device=device)]
    stages += [{"stage": "export", "formats": others}] if others else []
    name = "-".join(filter(None, [short_name(model), preset, first, *others]))
    recipe = recipe_of(name, model, stages, given(source=calib, num_samples=num_samples, seqlen=seqlen, seed=seed))
    if preview:
        return _preview(recipe, as_json=json)
    return perform(recipe, output, dry_run=dry_run, resume=resume, overwrite=overwrite, strict=strict, as_json=json)


@app.command()
def export(
    directory: Directory,
    format: Annotated[str, option(of="F,...", text=FORMATS)],
    output: Annotated[Path, option("-o", "--output", of="DIR", text="Where the result goes.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Write a quantised model in another format, bit for bit.

    The original model is not needed.
    """
    stage = {"stage": "export", "formats": format.split(",")}
    return perform(recipe_of(short_name(str(directory)), str(directory), [stage]), output, overwrite=overwrite, as_json=json)


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
