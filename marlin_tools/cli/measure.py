"""The verbs that run a model: `eval` and `generate`."""

from typing import Annotated

import typer

from marlin_tools.cli import ui
from marlin_tools.cli.complete import ACTIVATIONS, BACKENDS, TASKS, list_of, models, one_of
from marlin_tools.cli.options import PLAIN, Device, Json, Model, Strict, argument, flag, option
from marlin_tools.cli.perform import given, perform, recipe_of, short_name

app = typer.Typer(**PLAIN)

_RUNNING = [name for name in BACKENDS if name != "vllm"]
Backend = Annotated[
    str | None, option(of="NAME", text="auto, native, reference, reference-packed or torch-int4.", words=one_of(_RUNNING))
]
Reads = Annotated[
    str | None,
    option("--activations", of="16bit|fp8", text="What the linears read, if not as stored.", words=one_of(ACTIVATIONS)),
]


@app.command(name="eval")
def evaluate(
    tasks: Annotated[
        str,
        option("-t", "--tasks", of="T,...", text="ppl:wikitext2, ppl:FILE, and lm-eval's, such as mmlu.", words=list_of(TASKS)),
    ],
    model: Annotated[
        str | None, argument("MODEL", "As for quantize; the newest model under runs/ if left out.", models)
    ] = None,
    baseline: Annotated[str | None, option(of="MODEL", text="The original, measured on the same items.", words=models)] = None,
    backend: Annotated[
        str | None,
        option(of="NAME", text="auto, native, reference, reference-packed, torch-int4 or vllm.", words=one_of(BACKENDS)),
    ] = None,
    activations: Reads = None,
    num_fewshot: Annotated[int | None, option("-f", "--num-fewshot", of="N", text="Examples in the prompt.")] = None,
    limit: Annotated[float | None, option("-L", "--limit", of="N", text="Items per task; below 1, a share of them.")] = None,
    batch_size: Annotated[str | None, option("-b", "--batch-size", of="N|auto", text="Items per forward.")] = None,
    seqlen: Annotated[int | None, option(of="L", text="Window of a perplexity.")] = None,
    include_path: Annotated[list[str] | None, option(of="DIR", text="Where more tasks are defined; repeatable.")] = None,
    allow_task_code: Annotated[bool, flag("--allow-task-code", "Let those tasks run code that comes with them.")] = False,
    device: Device = None,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Measure a model, beside the original if it is named."""
    from marlin_tools.run.execute import newest_run

    how = given(backend=backend, activations=activations, batch_size=batch_size, device=device, baseline=baseline)
    what = given(num_fewshot=num_fewshot, limit=limit, seqlen=seqlen, include_path=include_path)
    what |= given(allow_task_code=allow_task_code or None)
    stage = {"stage": "evaluate", "tasks": tasks.split(","), **how, **what}
    if model is None:
        model = str(newest_run())
        ui.note(f"evaluating `{model}`, the newest model under runs/")
    return perform(recipe_of(short_name(model), model, [stage]), overwrite=True, strict=strict, as_json=json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, option(of="TEXT", text="The text to continue.")],
    max_new_tokens: Annotated[int | None, option(of="N", text="At most; the end of the text comes earlier.")] = None,
    temperature: Annotated[float | None, option(of="T", text="0, the default, takes the likeliest token each time.")] = None,
    seed: Annotated[int | None, option(of="N", text="Of the draws, above temperature 0.")] = None,
    backend: Backend = None,
    activations: Reads = None,
    device: Device = None,
    json: Json = False,
) -> int:
    """Continue a text."""
    how = given(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, backend=backend, device=device)
    how |= given(activations=activations)
    stage = {"stage": "generate", "prompt": prompt, **how}
    return perform(recipe_of(short_name(model), model, [stage]), as_json=json)
