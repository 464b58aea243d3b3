"""Every flag reaches the recipe or the engine: what is asked for with it differs from what is asked for without it."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from marlin_tools.cli import app
from marlin_tools.compress.quantize import QuantizeSettings
from marlin_tools.data.sources import SOURCES
from marlin_tools.formats import FORMATS


def _leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{before}{name} ")
        else:
            yield before + name, command


VERBS = dict(_leaves(get_command(app)))

QUANTIZE = [
    (("-o", "there"), "out", "there"),
    (("--preset", "marlin"), "stages.0.preset", "marlin"),
    (("--tune", "9"), "stages.0.tuning.iters", 9),
    (("--learn", "900"), "stages.1.tokens", 900),
    (("--learn", "900", "--format", "gptq,marlin"), "stages.2", {"stage": "export", "formats": ("marlin",)}),
    (("--format", "gptq"), "stages.0.format", "gptq"),
    (("--format", "gptq,marlin"), "stages.1", {"stage": "export", "formats": ("marlin",)}),
    (("--calib", "c4"), "calibrate.source", "c4"),
    (("--dataset", "c4"), "calibrate.source", "c4"),
    (("--num-samples", "7"), "calibrate.num_samples", 7),
    (("--num_samples", "7"), "calibrate.num_samples", 7),
    (("--nsamples", "7"), "calibrate.num_samples", 7),
    (("--num_calibration_samples", "7"), "calibrate.num_samples", 7),
    (("--seqlen", "64"), "calibrate.seqlen", 64),
    (("--max-seq-length", "64"), "calibrate.seqlen", 64),
    (("--seed", "3"), "calibrate.seed", 3),
    (("--sparsity", "2:4"), "stages.0.sparsity", "2:4"),
    (("--sparsity", "keep"), "stages.0.sparsity", "keep"),
    (("--keep-dense", "10%"), "stages.0.keep_dense", 0.1),
    (("--group-size", "-1"), "stages.0.group_size", -1),
    (("--group_size", "64"), "stages.0.group_size", 64),
    (("--activations", "fp8"), "stages.0.activations", "fp8"),
    (("--damp", "0.05"), "stages.0.damp", 0.05),
    (("--percdamp", "0.05"), "stages.0.damp", 0.05),
    (("--dampening_frac", "0.05"), "stages.0.damp", 0.05),
    (("--ignore", "down", "--ignore", "up"), "stages.0.ignore", ("down", "up")),
    (("--no-negative-scales",), "stages.0.negative_scales", False),
    (("--device", "cuda:1"), "stages.0.device", "cuda:1"),
    (("--overwrite",), "options.overwrite", True),
    (("--no-resume",), "options.resume", False),
]
EVAL = [
    (("-t", "a,ppl:b"), "stages.0.tasks", ("a", "ppl:b")),
    (("--baseline", "demo"), "stages.0.baseline", "demo"),
    (("--backend", "reference"), "stages.0.backend", "reference"),
    (("--activations", "fp8"), "stages.0.activations", "fp8"),
    (("-f", "5"), "stages.0.num_fewshot", 5),
    (("--num_fewshot", "5"), "stages.0.num_fewshot", 5),
    (("-L", "0.5"), "stages.0.limit", 0.5),
    (("-b", "8"), "stages.0.batch_size", 8),
    (("--seqlen", "64"), "stages.0.seqlen", 64),
    (("--include_path", "mine"), "stages.0.include_path", ["mine"]),
    (("--allow-task-code",), "stages.0.allow_task_code", True),
    (("--device", "cpu"), "stages.0.device", "cpu"),
]
RUN = [
    (("--set", "quantize.damp=0.05"), "stages.0.damp", 0.05),
    (("--set", "stages.0.ignore=[a, b]"), "stages.0.ignore", ("a", "b")),
    (("--set", "calibrate.num_samples=2"), "calibrate.num_samples", 2),
    (("--set", "model=other"), "model", "other"),
    (("--from", "evaluate"), "options.start", "evaluate"),
    (("--output", "there"), "out", "there"),
    (("--overwrite",), "options.overwrite", True),
    (("--no_resume",), "options.resume", False),
]
GENERATE = [
    (("--prompt", "b"), "stages.0.prompt", "b"),
    (("--device", "cpu"), "stages.0.device", "cpu"),
    (("--backend", "reference-packed"), "stages.0.backend", "reference-packed"),
    (("--activations", "16bit"), "stages.0.activations", "16bit"),
    (("--max-new-tokens", "3"), "stages.0.max_new_tokens", 3),
    (("--temperature", "0.5"), "stages.0.temperature", 0.5),
    (("--seed", "5"), "stages.0.seed", 5),
]
PRUNE = [
    (("-o", "there"), "out", "there"),
    (("--preset", "wanda"), "stages.0.preset", "wanda"),
    (("--reconstruct", "5"), "stages.0.reconstruct", 5),
    (("--calib", "c4"), "calibrate.source", "c4"),
    (("--num-samples", "7"), "calibrate.num_samples", 7),
    (("--seqlen", "64"), "calibrate.seqlen", 64),
    (("--seed", "3"), "calibrate.seed", 3),
    (("--damp", "0.05"), "stages.0.damp", 0.05),
    (("--ignore", "down", "--ignore", "up"), "stages.0.ignore", ("down", "up")),
    (("--device", "cuda:1"), "stages.0.device", "cuda:1"),
    (("--overwrite",), "options.overwrite", True),
    (("--no-resume",), "options.resume", False),
]
FINETUNE = [
    (("-o", "there"), "out", "there"),
    (("--teacher", "other"), "stages.0.teacher", "other"),
    (("--calib", "c4"), "calibrate.source", "c4"),
    (("--num-samples", "7"), "calibrate.num_samples", 7),
    (("--seqlen", "64"), "calibrate.seqlen", 64),
    (("--sampled", "9"), "stages.0.sampled", 9),
    (("--sampled", "9", "--seqlen", "64"), "stages.0.seqlen", 64),
    (("--sampled", "9", "--calib", "c4"), "stages.0.text.source", "c4"),
    (("--tokens", "1000"), "stages.0.tokens", 1000),
    (("--rate", "0.001"), "stages.0.rate", 0.001),
    (("--code-rate", "0.02"), "stages.0.code_rate", 0.02),
    (("--batch", "8"), "stages.0.batch", 8),
    (("--micro", "2"), "stages.0.micro", 2),
    (("--kl", "0.5"), "stages.0.kl", 0.5),
    (("--ce", "0.5"), "stages.0.ce", 0.5),
    (("--square-head", "0"), "stages.0.square_head", 0),
    (("--recompute",), "stages.0.recompute", True),
    (("--seed", "3"), "stages.0.seed", 3),
    (("--seed", "3"), "calibrate.seed", 3),
    (("--device", "cuda:1"), "stages.0.device", "cuda:1"),
    (("--overwrite",), "options.overwrite", True),
    (("--no-resume",), "options.resume", False),
]
CASES = [
    *((("quantize", "model"), *case) for case in QUANTIZE),
    *((("prune", "model"), *case) for case in PRUNE),
    *((("finetune", "model", "--teacher", "demo"), *case) for case in FINETUNE),
    *((("eval", "model", "--tasks", "x"), *case) for case in EVAL),
    *((("run", "demo"), *case) for case in RUN),
    *((("generate", "model", "--prompt", "a"), *case) for case in GENERATE),
    (("export", "there", "--format", "gptq", "-o", "x"), ("--format", "marlin,gptq"), "stages.0.formats", ("marlin", "gptq")),
    (("export", "there", "--format", "gptq", "-o", "x"), ("-o", "y"), "out", "y"),
    (("export", "there", "--format", "gptq", "-o", "x"), ("--overwrite",), "options.overwrite", True),
]


def _flat(captured: Any) -> dict[str, Any]:
    dump = captured.recipe.model_dump() | {"out": captured.out, "options": captured.options}

    def walk(value: Any, path: str) -> dict[str, Any]:
        inside = value.items() if isinstance(value, dict) else ()
        found = {path: value}
        for key, each in inside:
            found |= walk(each, f"{path}.{key}".strip("."))
        return found

    dump["stages"] = dict(enumerate(dump["stages"]))
    return walk(dump, "")


@pytest.mark.parametrize(
    ("verb", "flag", "place", "value"), CASES, ids=lambda case: " ".join(case) if isinstance(case, tuple) else ""
)
def test_flag_arrives(asked, verb, flag, place, value):
    without, with_ = _flat(asked(*verb)), _flat(asked(*verb, *flag))

    assert without.get(place) != with_[place]
    found = with_[place]
    assert value == (str(found) if place == "out" else [str(p) for p in found] if place.endswith("include_path") else found)


@pytest.mark.parametrize(
    "verb",
    (
        ("quantize", "model"),
        ("prune", "model"),
        ("finetune", "model", "--teacher", "demo"),
        ("eval", "model", "--tasks", "x"),
        ("run", "demo"),
    ),
    ids=lambda verb: verb[0],
)
def test_strict_fails_on_a_warning(cli, asked, monkeypatch, verb):
    import marlin_tools.run.execute

    asked(*verb)
    monkeypatch.setattr(
        marlin_tools.run.execute,
        "execute",
        lambda *_, **__: marlin_tools.run.execute.RunResult(warnings=["damping was raised"]),
    )

    assert 0 == cli(*verb).code
    assert 1 == cli(*verb, "--strict").code


def test_every_option_is_tried():
    """An option without a case above may do nothing."""
    tried = {(verb[0], flag[0].replace("_", "-").lstrip("-")) for verb, flag, _, _ in CASES}
    tried |= {(verb, "json") for verb in VERBS}  # tests/cli/test_json.py
    tried |= {("prune", "dry-run"), ("finetune", "dry-run")}  # tests/prune, tests/finetune
    tried |= {("quantize", "dry-run"), ("run", "dry-run"), ("quantize", "preview")}  # tests/cli/test_results.py
    tried |= {("reproduce", name) for name in ("set", "output", "dry-run", "overwrite", "json")}  # tests/cli/test_reproduce.py
    tried |= {("recipes schema", "table")}  # tests/cli/test_results.py
    tried |= {("bench kernels", name) for name in ("shapes", "batch", "dtype", "group-size", "peers", "figure", "tune")}
    tried |= {("bench model", name) for name in ("shape", "tokens-in", "tokens-out", "batch", "schemes")}
    tried |= {
        (f"bench {part}", name) for part in ("kernels", "model", "quantize") for name in ("output", "json")
    }  # tests/cli/test_bench.py
    tried |= {("bench quantize", name) for name in ("shape", "layers", "preset", "sparsity", "samples", "seqlen", "device")}
    fine = "shape layers student seqlen batch micro steps recompute device output json"  # tests/cli/test_bench_finetune.py
    tried |= {("bench finetune", name) for name in fine.split()}
    tried |= {("kernels list", "arch"), ("kernels list", "json")}
    tried |= {("kernels build", name) for name in ("arch", "output", "json")}
    tried |= {(verb, "strict") for verb in ("quantize", "prune", "finetune", "eval", "run", "verify")}
    tried |= {("compare", "output")}  # tests/report/test_difference.py
    short = {"o": "output", "t": "tasks", "f": "num-fewshot", "L": "limit", "b": "batch-size", "no-resume": "resume"}
    tried = {(verb, short.get(name, name)) for verb, name in tried}
    offered = set()
    for verb, command in VERBS.items():
        for name, parameter in inspect.signature(command.callback).parameters.items():
            if type(parameter.annotation.__metadata__[0]).__name__ == "OptionInfo":
                offered.add((verb, name.strip("_").replace("_", "-")))

    assert offered <= tried


def test_default_preset_is_that_of_the_settings():
    assert QuantizeSettings().preset == inspect.signature(VERBS["quantize"].callback).parameters["preset"].default


def test_help_names_every_source_format_and_preset(cli):
    from marlin_tools.algorithms import PRESETS

    words = set(re.findall(r"[\w-]+", cli("quantize", "--help").out))

    assert {*SOURCES, *FORMATS, *PRESETS} <= words


@pytest.mark.parametrize(
    ("arguments", "name"),
    (
        (("quantize", "llama2-7b"), "llama2-7b-default"),
        (("quantize", "meta-llama/Llama-2-7b-hf", "--preset", "fast"), "Llama-2-7b-hf-fast"),
        (("quantize", "demo", "--format", "gptq,marlin"), "demo-default-gptq-marlin"),
        (("quantize", "a b/c d"), "c-d-default"),
    ),
)
def test_output_is_named_for_model_and_preset(asked, arguments, name):
    assert name == asked(*arguments).recipe.name
