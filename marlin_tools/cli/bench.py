"""How fast it is: `bench kernels|model|quantize|finetune`, on random weights of true shapes; nothing is downloaded."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from marlin_tools.cli import ui
from marlin_tools.cli.complete import PRESETS, SHAPES, list_of, one_of
from marlin_tools.cli.options import PLAIN, Device, Json, destination, flag, option
from marlin_tools.cli.perform import given, words
from marlin_tools.errors import MarlinToolsError, RecipeError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from marlin_tools.events import Emit

Checked = TypeVar("Checked", bound="BaseModel")

bench = typer.Typer(help="Time kernels, models, quantisation and training on this machine, with random weights.", **PLAIN)

Batches = Annotated[str | None, option("--batch", of="M,...", text="Batch sizes, such as 1,2,4,8,16,32,64,128.")]
Shape = Annotated[str | None, option(of="NAME", text="llama2-7b, llama2-13b, llama2-70b, llama3-8b, ...", words=one_of(SHAPES))]
SeqLen = Annotated[int | None, option(of="N", text="Tokens of a window.")]
Output = Annotated[Path | None, destination("DIR", "Write the numbers here.")]


@bench.command(name="kernels")
def bench_kernels(
    shapes: Annotated[
        str | None, option("--shapes", of="S,...", text="llama2-7b, paper-llama7b, peak, 4096x12288, ...")
    ] = None,
    batch: Batches = None,
    dtype: Annotated[str | None, option(of="NAME", text="float16 or bfloat16.", words=one_of(("float16", "bfloat16")))] = None,
    group_size: Annotated[int | None, option(of="N", text="Inputs per scale: 128, 64, 32, or -1 for one per output.")] = None,
    peers: Annotated[bool | None, flag("--peers/--no-peers", "Time torch's INT4, and dequantising + cuBLAS, too.")] = None,
    figure: Annotated[
        str | None,
        option(
            of="NAME",
            text="Remake the paper's peak, models, roofline or sustained.",
            words=one_of(("peak", "models", "roofline", "sustained")),
        ),
    ] = None,
    tune: Annotated[
        bool, flag("--tune", "Measure every kernel; the choice between them on this machine follows from it.")
    ] = False,
    output: Annotated[Path | None, destination("DIR", "Write the numbers and their pictures here.")] = None,
    json: Json = False,
) -> int:
    """Time our kernels beside cuBLAS, past the L2 cache, results checked."""
    from marlin_tools.bench import figures
    from marlin_tools.bench import kernels as stage
    from marlin_tools.report.benchmarks import kernel_table

    known = figures.FIGURES
    if figure is not None and figure not in known:
        raise RecipeError(f"--figure: `{figure}` is none of the figures", hint=f"there are: {', '.join(known)}")
    if figure is not None and (dtype or group_size):
        raise RecipeError(
            "--figure: the paper's figures are in float16, with groups of 128", hint="leave out `--dtype` and `--group-size`"
        )
    if tune and (figure or output):
        raise RecipeError("--tune writes a table for this machine, no figure and no numbers", hint="run it on its own")
    asked = given(models=words(shapes), rows=_numbers("--batch", batch), dtype=dtype, group_size=group_size, peers=peers)
    settings = _settings(stage.BenchSettings, known[figure].settings(asked) if figure else asked)
    if tune:
        with ui.Display() as display:
            written = stage.tune(settings, display)
        told = f"kernels on this machine are now chosen by `{written}`"
        return ui.show({"tables": str(written)}, told, as_json=json)
    return _measure(lambda emit: figures.measure(figure, settings, emit), kernel_table, output, as_json=json)


@bench.command(name="model")
def bench_model(
    shape: Shape = None,
    tokens_in: Annotated[int | None, option("--in", of="N", text="Tokens of the prompt.")] = None,
    tokens_out: Annotated[int | None, option("--out", of="N", text="Tokens that follow, one at a time.")] = None,
    batch: Batches = None,
    schemes: Annotated[
        str | None, option("--schemes", of="S,...", text="fp16, int4, int4-2:4.", words=list_of(("fp16", "int4", "int4-2:4")))
    ] = None,
    output: Annotated[Path | None, destination("DIR", "Write the numbers and a figure here.")] = None,
    json: Json = False,
) -> int:
    """Time every token of a model with random weights, under CUDA graphs."""
    from marlin_tools.bench import decoding as stage
    from marlin_tools.report.benchmarks import model_table

    asked = given(shape=shape, tokens_in=tokens_in, tokens_out=tokens_out)
    asked |= given(batches=_numbers("--batch", batch), schemes=words(schemes))
    settings = _settings(stage.BenchModelSettings, asked)
    return _measure(lambda emit: stage.bench_model(settings, emit), model_table, output, as_json=json)


@bench.command(name="quantize")
def bench_quantize(
    shape: Shape = None,
    layers: Annotated[int | None, option(of="N", text="Blocks of it; all, if not said.")] = None,
    preset: Annotated[str | None, option(of="NAME", text="default, fast, marlin, max, rtn.", words=one_of(PRESETS))] = None,
    sparsity: Annotated[str | None, option(of="2:4", text="Prune on the way.", words=one_of(("2:4",)))] = None,
    samples: Annotated[int | None, option("--num-samples", of="N", text="Calibration windows of random tokens.")] = None,
    seqlen: SeqLen = None,
    device: Device = None,
    output: Output = None,
    json: Json = False,
) -> int:
    """Quantise random weights of true shapes, and time every part beside its floor."""
    from marlin_tools.bench import quantizing as stage
    from marlin_tools.report.benchmarks import quantize_table

    asked = given(shape=shape, layers=layers, preset=preset, sparsity=sparsity, samples=samples, seqlen=seqlen, device=device)
    settings = _settings(stage.BenchQuantizeSettings, asked)
    return _measure(lambda emit: stage.bench_quantize(settings, emit), quantize_table, output, as_json=json)


@bench.command(name="finetune")
def bench_finetune(
    shape: Shape = None,
    layers: Annotated[int | None, option(of="N", text="Blocks of it, 4 if not said; 0: all.")] = None,
    student: Annotated[
        str | None, option(of="NAME", text="What learns: int4, int4-codes or 2:4.", words=one_of(("int4", "int4-codes", "2:4")))
    ] = None,
    seqlen: SeqLen = None,
    batch: Annotated[int | None, option(of="N", text="Windows per step.")] = None,
    micro: Annotated[int | None, option(of="N", text="Windows per forward.")] = None,
    steps: Annotated[int | None, option(of="N", text="Steps that are timed.")] = None,
    recompute: Annotated[bool, flag("--recompute", "Compute activations twice: slower, in less memory.")] = False,
    device: Device = None,
    output: Output = None,
    json: Json = False,
) -> int:
    """Train random weights of true shapes for some steps, and time them."""
    from marlin_tools.bench import finetuning as stage
    from marlin_tools.report.benchmarks import finetune_table

    asked = given(shape=shape, layers=layers, student=student, seqlen=seqlen, batch=batch, micro=micro, steps=steps)
    settings = _settings(stage.BenchFinetuneSettings, asked | given(recompute=recompute or None, device=device))
    return _measure(lambda emit: stage.bench_finetune(settings, emit), finetune_table, output, as_json=json)


def _measure(run: "Callable[[Emit], Any]", table: Callable[[Any], str], output: Path | None, *, as_json: bool) -> int:
    """Measure, write the numbers if somewhere is named, and print them; that they can be written is seen before the work."""
    from marlin_tools.checkpoint.output import folder
    from marlin_tools.distributed.device import leads
    from marlin_tools.report.benchmarks import write

    new = output if output is not None and not output.exists() else None
    if output is not None:
        folder(output)
    try:
        with ui.Display() as display:
            measured = run(display)
    except MarlinToolsError:
        if new is not None:
            with suppress(OSError):
                new.rmdir()
        raise
    if not leads():
        return 0
    for path in write(measured, output) if output is not None else ():
        ui.note(f"wrote `{path}`")
    return ui.show(measured.as_dict(), table(measured), as_json=as_json)


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    said = words(text)
    if said is not None and not (said and all(word.isdecimal() and int(word) > 0 for word in said)):
        raise RecipeError(f"{name}: `{text}` is not a list of positive numbers", hint=f"for example: {name} 1,8,64")
    return None if said is None else tuple(map(int, said))


def _settings(kind: type[Checked], asked: dict[str, Any]) -> Checked:
    """Checked settings; a complaint about a value begins with its option."""
    from marlin_tools.recipe.yaml_reader import Document, validate

    names = {"models": "--shapes", "rows": "--batch", "batches": "--batch", "tokens_in": "--in", "tokens_out": "--out"}
    names["samples"] = "--num-samples"
    origins: dict[tuple[str | int, ...], str] = {(): "command line"}
    origins |= {(key,): names.get(key, f"--{key.replace('_', '-')}") for key in asked}
    return validate(kind, Document(asked, origins))
