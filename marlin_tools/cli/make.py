"""The verbs that make a model: `quantize`, `prune`, `finetune` and `export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marlin_tools.cli import ui
from marlin_tools.cli.complete import ACTIVATIONS, PRESETS, PRUNERS, list_of, models, one_of
from marlin_tools.cli.complete import FORMATS as LAYOUTS
from marlin_tools.cli.options import (
    FORMATS,
    PLAIN,
    Calib,
    Damp,
    Device,
    Directory,
    DryRun,
    Ignore,
    Json,
    Model,
    NumSamples,
    Output,
    Overwrite,
    Resume,
    Seed,
    SeqLen,
    Strict,
    destination,
    flag,
    option,
)
from marlin_tools.cli.perform import given, perform, recipe_of, short_name, words
from marlin_tools.errors import RecipeError

if TYPE_CHECKING:
    from marlin_tools.recipe.recipe import Recipe

app = typer.Typer(**PLAIN)

_HELD_OUT, _BATCH, _MICRO = 16, 8, 4
"""Of what `--learn` reads: the windows that are only measured, those of a step, and those of a forward."""


@app.command()
def quantize(
    model: Model,
    output: Output = None,
    preset: Annotated[
        str, option(of="NAME", text="default, max (tuned), fast, marlin (the paper's recipe) or rtn.", words=one_of(PRESETS))
    ] = "default",
    tune: Annotated[int | None, option(of="N", text="Steps of tuning for each block, 0 for none; helps 2:4.")] = None,
    learn: Annotated[
        int | None, option(of="TOKENS", text="Then `finetune`: learn from the original on so many, into DIR/finetuned/.")
    ] = None,
    format: Annotated[str | None, option(of="F,...", text=FORMATS, words=list_of(LAYOUTS))] = None,
    activations: Annotated[
        str | None,
        option(of="16bit|fp8", text="What the linears read; fp8 is rounded token by token.", words=one_of(ACTIVATIONS)),
    ] = None,
    calib: Calib = None,
    num_samples: NumSamples = None,
    seqlen: SeqLen = None,
    sparsity: Annotated[
        str | None,
        option(of="2:4|keep", text="2:4 prunes what is dense; keep insists on the zeros there.", words=one_of(("2:4", "keep"))),
    ] = None,
    keep_dense: Annotated[
        str | None, option(of="SHARE", text="Of the weights under 2:4, such as 10%: linears that it costs most stay dense.")
    ] = None,
    group_size: Annotated[
        str | None, option(of="N|auto", text="Inputs that share a scale: 128, 64, 32, -1 (one per output), or what fits.")
    ] = None,
    damp: Damp = None,
    seed: Seed = None,
    ignore: Ignore = None,
    no_negative_scales: Annotated[bool, flag("--no-negative-scales", "For engines that expect positive scales.")] = False,
    device: Device = None,
    dry_run: DryRun = False,
    preview: Annotated[bool, flag("--preview", "Print the first calibration samples as the model reads them.")] = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Quantise a model to INT4.

    Started by `torchrun`, 2, 4 or 8 processes share the work; with --tune it is one.
    """
    first, *others = _formats(format) or (None,)
    signed = False if no_negative_scales else None
    tuning = given(iters=tune) or None
    solver = given(preset=preset, tuning=tuning, damp=damp, negative_scales=signed, group_size=group_size, sparsity=sparsity)
    solver |= given(activations=activations, keep_dense=keep_dense)
    text = given(source=calib, num_samples=num_samples, seqlen=seqlen, seed=seed)
    stages = [given(stage="quantize", **solver, format=first, ignore=ignore, device=device)]
    if learn is not None:
        stages.append(_learning(model, learn, text, given(seed=seed, device=device)))
    stages += [{"stage": "export", "formats": others}] if others else []
    name = "-".join(filter(None, [short_name(model), preset, first, *others]))
    recipe = recipe_of(name, model, stages, text, tokens="--learn")
    if preview:
        return _preview(recipe, as_json=json)
    return perform(recipe, output, dry_run=dry_run, resume=resume, overwrite=overwrite, strict=strict, as_json=json)


@app.command()
def prune(
    model: Model,
    output: Output = None,
    preset: Annotated[
        str, option(of="NAME", text="default, max, sparsegpt (as published), wanda or magnitude.", words=one_of(PRUNERS))
    ] = "default",
    reconstruct: Annotated[
        int | None, option(of="N", text="Passes of training each block towards its original outputs.")
    ] = None,
    calib: Calib = None,
    num_samples: NumSamples = None,
    seqlen: SeqLen = None,
    damp: Damp = None,
    seed: Seed = None,
    ignore: Ignore = None,
    device: Device = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Make a model 2:4 sparse.

    The result has the original's type, with two of every four weights zero.
    """
    stage = given(stage="prune", preset=preset, reconstruct=reconstruct, damp=damp, ignore=ignore, device=device)
    text = given(source=calib, num_samples=num_samples, seqlen=seqlen, seed=seed)
    recipe = recipe_of(f"{short_name(model)}-{preset}", model, [stage], text)
    return perform(recipe, output, dry_run=dry_run, resume=resume, overwrite=overwrite, strict=strict, as_json=json)


@app.command()
def finetune(
    model: Model,
    teacher: Annotated[str, option(of="MODEL", text="The original: what the model is to do again.", words=models)],
    output: Output = None,
    calib: Calib = None,
    num_samples: NumSamples = None,
    seqlen: SeqLen = None,
    sampled: Annotated[int | None, option(of="N", text="Windows that the teacher writes itself, besides or instead.")] = None,
    tokens: Annotated[int | None, option(of="N", text="Tokens to train on in all; text is repeated.")] = None,
    rate: Annotated[float | None, option(of="F", text="Highest learning rate.")] = None,
    code_rate: Annotated[float | None, option(of="F", text="That of the codes of a quantised model; at 0 they stay.")] = None,
    batch: Annotated[int | None, option(of="N", text="Windows per step.")] = None,
    micro: Annotated[int | None, option(of="N", text="Windows per forward; gradients are added up.")] = None,
    kl: Annotated[float | None, option(of="F", text="Weight of the KL to the teacher.")] = None,
    ce: Annotated[float | None, option(of="F", text="Weight of the cross entropy.")] = None,
    square_head: Annotated[float | None, option(of="F", text="Weight of the distance of hidden states.")] = None,
    recompute: Annotated[bool, flag("--recompute", "Compute activations twice: slower, in less memory.")] = False,
    seed: Seed = None,
    device: Device = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Let a quantised or 2:4 sparse model learn from the original.

    Zeros stay where they are, a quantised model keeps its format and size. Started by `torchrun`, it trains on many GPUs.
    """
    stage = given(
        stage="finetune", teacher=teacher, tokens=tokens, rate=rate, batch=batch, micro=micro, seed=seed, device=device
    )
    stage |= given(code_rate=code_rate, kl=kl, ce=ce, square_head=square_head, sampled=sampled, recompute=recompute or None)
    text = given(source=calib, num_samples=num_samples, seqlen=seqlen, seed=seed)
    if sampled:
        stage |= given(seqlen=seqlen, text=text if calib else None)
    recipe = recipe_of(short_name(model), model, [stage], {} if sampled else text)
    return perform(recipe, output, dry_run=dry_run, resume=resume, overwrite=overwrite, strict=strict, as_json=json)


@app.command()
def export(
    directory: Directory,
    format: Annotated[str, option(of="F,...", text=FORMATS, words=list_of(LAYOUTS))],
    output: Annotated[Path, destination("DIR", "Where the result goes.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Write a quantised model in another format, bit for bit.

    The original model is not needed.
    """
    stage = {"stage": "export", "formats": _formats(format)}
    return perform(recipe_of(short_name(str(directory)), str(directory), [stage]), output, overwrite=overwrite, as_json=json)


def _learning(model: str, tokens: int, text: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The stage that follows with `--learn`, as it was measured (docs/accuracy.md).

    No window is read twice if there is text, and with seed 0 what is held out lies behind what was calibrated on.
    """
    from marlin_tools.data.calibrate import WINDOW, CalibrationSettings
    from marlin_tools.distributed.device import processes
    from marlin_tools.recipe.recipe import longest_window, usual_source

    window, calibrated = text.get("seqlen") or longest_window(model, WINDOW), text.get("num_samples")
    windows = max(-(-tokens // window), calibrated or CalibrationSettings().num_samples) + _HELD_OUT
    text = {"source": usual_source(model), **text, "num_samples": windows, "shape": "packed", "fewer": True}
    micro = max(1, min(_MICRO, _BATCH // processes()))  # every process of `torchrun` reads some of each step
    how = {"tokens": tokens, "batch": _BATCH, "micro": micro, "held_out": _HELD_OUT, "text": text}
    return {"stage": "finetune", **how, **options}


def _formats(text: str | None) -> tuple[str, ...] | None:
    named = words(text)
    if named == ():  # neither the default nor nothing at all was asked for
        raise RecipeError("--format: no format is named", hint=f"there are: {', '.join(LAYOUTS)}")
    return named


def _preview(recipe: "Recipe", *, as_json: bool) -> int:
    from marlin_tools.checkpoint.reader import Checkpoint
    from marlin_tools.data.calibrate import preview
    from marlin_tools.recipe.recipe import settle

    settled, _ = settle(recipe)
    if settled.calibrate is None:
        raise RecipeError("there is nothing to preview: this preset looks at no data", hint="choose another `--preset`")
    samples = preview(settled.calibrate, Checkpoint.open(recipe.model))
    return ui.show(samples, "\n\n".join(samples), as_json=as_json)
