"""Which inference engine loads a checkpoint, on how many GPUs, and if not, why: known from config.json and shapes alone.

Under tensor parallelism of size T an engine splits a branch of a block so that only one sum has to travel: the linears that
enter it by their outputs (q, k, v, gate, up: N/T rows per rank), the one that leaves it by its inputs (o, down: K/T columns per
rank, whose scales must not be cut). What enters together is fused into one matrix, so it is quantised together or not at all.

The table was read off released packages and their maintainers' decisions; `AS_OF` says when. What was not found counts as "no".
"""

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from marlin_tools import __version__, ops
from marlin_tools.errors import FormatError, ModelError
from marlin_tools.families import known_family
from marlin_tools.families.family import Branch, Family
from marlin_tools.families.layout import Layout
from marlin_tools.formats import get_format
from marlin_tools.formats.contents import Contents
from marlin_tools.quantized import ActivationType

AS_OF = "2026-09"
SIZES = (1, 2, 4, 8)

Linears = Mapping[str, tuple[int, int]]
"""(N, K) by full name."""


@dataclass(frozen=True)
class Engine:
    """One engine at one version.

    loads      format -> what has to be installed beside it ("" for nothing)
    refuses    format -> why not; a format in neither is unknown to it
    splits     whether it runs INT4 linears tensor-parallel
    marlin     whether it multiplies with Marlin kernels: groups of 32, 64, 128 or per column, tiles of 64 x 128
    pads       whether it fills up incomplete tiles with zeros instead of refusing them
    loses      types of which it does not find experts that are stored one by one
    fp8        what to know where it multiplies INT4 weights with FP8 activations, "" if nothing; None where it does not
    command    what starts it on a model directory; Python code begins with "from"
    serves     whether it is a server for many users, which people want a format for
    """

    name: str
    version: str
    loads: Mapping[str, str]
    refuses: Mapping[str, str] = field(default_factory=dict)
    splits: bool = False
    marlin: bool = False
    pads: bool = False
    loses: Collection[str] = ()
    fp8: str | None = None
    command: str = ""
    serves: bool = False

    def start(self, directory: str) -> str:
        """The command, for a shell."""
        if self.command.startswith("from "):
            return f"python -c {shlex.quote(self.command.format(json.dumps(directory)))}"
        return self.command.format(shlex.quote(directory))


ENGINES = (
    Engine(
        "vLLM",
        "0.33.0",
        {"gptq": "", "compressed-tensors": ""},
        {"marlin": "removed in 0.10.2, last read by 0.10.1.1", "marlin-24": "removed in 0.16.0, last read by 0.15"},
        splits=True,
        marlin=True,
        pads=True,
        fp8="on Hopper only; without our plugin group scales are rounded to FP8 beside one float32 scale for each output",
        command="vllm serve {}",
        serves=True,
    ),
    Engine(
        "SGLang",
        AS_OF,
        {"gptq": "", "compressed-tensors": ""},
        {"marlin": "has a check for it, but loading it is unverified", "marlin-24": "removed in 2025-09"},
        splits=True,
        marlin=True,
        command="python -m sglang.launch_server --model-path {}",
        serves=True,
    ),
    Engine(
        "transformers",
        "5.17",
        {"gptq": "gptqmodel", "compressed-tensors": "compressed-tensors"},
        {"marlin": "has no reader for it", "marlin-24": "compressed-tensors dropped it in 0.15.0"},
        loses=(
            "gpt_oss",
            "granitemoe",
            "granitemoe_swa",
            "granitemoehybrid",
            "granitemoeshared",
            "mistral4",
            "qwen3_vl_moe_text",
        ),
        fp8="rounds activations and multiplies in 16 bits",
        command="from transformers import AutoModelForCausalLM as A; A.from_pretrained({})",
    ),
    Engine(
        "GPTQModel",
        "7.3.4",
        {"gptq": "", "marlin": ""},
        {"compressed-tensors": "no reader for it was found", "marlin-24": "has no reader for it"},
        command="from gptqmodel import GPTQModel; GPTQModel.load({})",
    ),
    Engine(
        "marlin-tools",
        __version__,
        dict.fromkeys(("gptq", "compressed-tensors", "marlin", "marlin-24"), ""),
        fp8="",
        command="marlin-tools generate {} --prompt 'The'",
    ),
)


@dataclass(frozen=True)
class EngineVerdict:
    """`sizes` are the tensor-parallel sizes at which it loads, `reasons` say why not for all others, `notes` what to know."""

    engine: str
    version: str
    sizes: tuple[int, ...]
    reasons: dict[int, str]
    notes: tuple[str, ...]

    @property
    def loads(self) -> bool:
        """Whether it loads at all."""
        return bool(self.sizes)

    def __str__(self) -> str:
        if not self.sizes:
            return "no: " + next(iter(self.reasons.values()))
        parts = [f"tp {', '.join(map(str, self.sizes))}"]
        if self.reasons:
            parts.append(f"not {', '.join(map(str, self.reasons))}: {next(iter(self.reasons.values()))}")
        return "; ".join([*parts, *self.notes])


def judge_engines(
    config: Mapping[str, Any],
    family: Family,
    linears: Linears,
    kept: Collection[str],
    layout: str,
    sizes: Mapping[str, int],
    activations: ActivationType = "16bit",
) -> tuple[EngineVerdict, ...]:
    """One verdict per engine on a model whose `linears` are or would be quantised and whose `kept` ones are not.

    `layout` is the name of the format, `sizes` the group size of each linear, -1 for per column, `activations` what they read.
    """
    model = _Model(config, family, linears, frozenset(kept), sizes, activations == "fp8")
    return tuple(_judge(engine, model, layout) for engine in ENGINES)


def judge_checkpoint(contents: Contents) -> tuple[EngineVerdict, ...]:
    """The same for a quantised checkpoint; no verdict where its headers or its family do not allow one."""
    return _judge_as(contents, contents.stored.format.name) if contents.stored else ()


def served_as(contents: Contents) -> str | None:
    """The format that can hold these weights and that a server would load, where none loads the one that they have."""
    serving = {engine.name for engine in ENGINES if engine.serves}
    own = contents.stored.format.name if contents.stored else None
    for layout in (own, "compressed-tensors", "gptq") if own else ():
        holds = not any(get_format(layout).limits(*grid) for grid in contents.grids.values())
        holds = holds and contents.activations in get_format(layout).says
        holds = holds and (len(contents.group_sizes) == 1 or get_format(layout).mixes)
        if holds and serving & {verdict.engine for verdict in _judge_as(contents, layout) if verdict.loads}:
            return layout if layout != own else None
    return None


def commands(engines: Collection[str], directory: str) -> Iterator[tuple[str, str]]:
    """(what it does, what starts it on this directory), for the engines that are named, in the order of the table."""
    for engine in (each for each in ENGINES if each.name in engines):
        yield f"{'Serve' if engine.serves else 'Run'} it with {engine.name}", engine.start(directory)


def _judge_as(contents: Contents, layout: str) -> tuple[EngineVerdict, ...]:
    """Verdicts on a quantised checkpoint, were its weights stored as `layout`."""
    if known_family(contents.checkpoint.config) is None:
        return ()
    try:
        linears = {name: (grid.n, grid.k) for name, grid in contents.grids.items()}
        family = Layout(contents.checkpoint).family  # with the names that are stored here, also within another model
    except (FormatError, ModelError):
        return ()
    if not linears:
        return ()
    config, reads = contents.checkpoint.text_config, contents.activations
    return judge_engines(config, family, linears, contents.plain, layout, contents.sizes, reads)


@dataclass(frozen=True)
class _Model:
    config: Mapping[str, Any]
    family: Family
    linears: Linears
    kept: frozenset[str]
    sizes: Mapping[str, int]
    fp8: bool

    @property
    def heads(self) -> tuple[int, int, int]:
        """Attention heads, key-value heads, and the outputs of one."""
        heads = int(self.config["num_attention_heads"])
        kv_heads = int(self.config.get("num_key_value_heads") or heads)
        return heads, kv_heads, int(self.config.get("head_dim") or self.config["hidden_size"] // heads)

    def branches(self) -> list[tuple[str, Branch]]:
        """Every branch of every block, with what its linears' names begin with."""
        blocks = range(int(self.config["num_hidden_layers"]))
        return [(f"{self.family.block_prefix(i)}{branch.body}.", branch) for i in blocks for branch in self.family.branches]


def _judge(engine: Engine, model: _Model, layout: str) -> EngineVerdict:
    needs = engine.loads.get(layout)
    refusal = None if needs is not None else engine.refuses.get(layout, f"format `{layout}` is unknown to it")
    if engine.name == "vLLM" and refusal is None:
        refusal = _unread(model, layout)
    if model.fp8 and refusal is None and engine.fp8 is None:
        refusal = "no reader for INT4 weights under FP8 activations was found"
    if (
        refusal is None
        and model.config.get("model_type") in engine.loses
        and any(".experts." in name for name in model.linears)
    ):
        refusal = "does not find experts that are stored one by one, and makes up others"
    reasons = {size: reason for size in SIZES if (reason := refusal or _why_not(engine, model, size))}
    sizes = tuple(size for size in SIZES if size not in reasons)
    notes = [f"needs `{needs}`"] if needs and sizes else []
    notes += [engine.fp8] if model.fp8 and engine.fp8 and sizes else []
    parts = [(*branch, size) for branch in model.branches() for size in sizes] if engine.pads and not model.fp8 else []
    if any(_incomplete_tile(model, *part, turned=True) for part in parts):
        notes.append("fills up incomplete tiles with zeros and warns")
    if engine.name == "marlin-tools":
        notes += _own_notes(model)
    return EngineVerdict(engine.name, engine.version, sizes, reasons, tuple(notes))


def _own_notes(model: _Model) -> list[str]:
    """Our kernels have limits, our reference backend has none."""
    for name, (_, k) in model.linears.items():
        if reason := ops.limits(k, k if model.sizes[name] == -1 else model.sizes[name]):
            return [f"with the reference backend only: `{name}`: {reason}"]
    return []


def _unread(model: _Model, layout: str) -> str | None:
    """A linear that vLLM takes for one of 16 bits. By the names of GPTQ's tensors it knows which are quantised, also where it
    calls the modules otherwise.
    """
    for name in model.linears:
        if model.family.plain is not None and f".{model.family.plain}." in name:
            return f"it takes `{name}` in 16 bits only"
        if layout == "gptq" and (served := model.family.served(name)) != name:
            return f"it calls `{name}` `{served}` and takes it for one of 16 bits (as compressed-tensors it does not)"
    return None


def _why_not(engine: Engine, model: _Model, size: int) -> str | None:
    """Why the engine cannot run the model on `size` GPUs, or None."""
    if not engine.splits:
        return "runs INT4 linears on one GPU at a time" if size > 1 else None
    if engine.marlin and (others := set(model.sizes.values()) - {-1, 32, 64, 128}):
        return f"Marlin kernels have groups of 32, 64, 128 or per column, not {min(others)}"
    if model.fp8 and (others := set(model.sizes.values()) - {128}):
        return f"its kernel for FP8 activations has groups of 128, not {min(others)}"
    if model.fp8 and model.config.get("dtype", model.config.get("torch_dtype")) == "float16":
        return "its own kernel for FP8 activations puts out bfloat16, the model is float16 (our plugin takes it)"
    heads, kv_heads, _ = model.heads
    if heads % size:
        return f"{heads} attention heads do not divide among {size}"
    if max(kv_heads, size) % min(kv_heads, size):
        return f"{kv_heads} key-value heads do not divide among {size}"
    for prefix, branch in model.branches():
        if reason := _cut(model, prefix, branch, size) or _unfit_tile(engine, model, prefix, branch, size):
            return reason
    return _cut_states(model, size) or _cut_experts(model, size)


def _cut_states(model: _Model, size: int) -> str | None:
    """What a split of Mamba's states would tear apart: groups that every rank needs are repeated only in 16 bits."""
    heads, groups = (
        next((int(model.config[key]) for key in keys if model.config.get(key)), 0)
        for keys in (("mamba_n_heads", "mamba_num_heads"), ("mamba_n_groups", "n_groups"))
    )
    name = next((name for name in model.linears if name.endswith((".mamba.in_proj", ".mixer.in_proj"))), None)
    if name is None or not heads or size == 1:
        return None
    if heads % size:
        return f"`{name}`: {heads} heads of states do not divide among {size}"
    return f"`{name}`: {groups or 1} groups of states do not divide among {size}" if (groups or 1) % size else None


def _cut_experts(model: _Model, size: int) -> str | None:
    """What a split of experts would tear apart: an engine cuts each of them as it cuts what is called by all."""
    for name, (outputs, _) in model.linears.items():
        if ".experts." not in name:
            continue
        if name.endswith((".down_proj", ".w2")):
            if reason := _cut_inputs(model, name, size):
                return reason
        elif outputs % size:
            return f"`{name}`: {outputs} outputs do not divide among {size}"
    return None


def _cut(model: _Model, prefix: str, branch: Branch, size: int) -> str | None:
    """What a split would tear apart: a fused matrix, a linear, a group of columns."""
    entries = [prefix + name for name in branch.entry]
    plain = [name for name in entries if name in model.kept]
    if plain and len(plain) < len(entries):
        return f"`{plain[0]}` is not quantised, but fused with linears that are"
    if len({model.sizes[name] for name in entries if name in model.sizes}) > 1:
        return f"`{entries[0]}` is fused with linears of another group size"
    for name in entries:
        if name in model.linears and model.linears[name][0] % size and not branch.attends:
            return f"`{name}`: {model.linears[name][0]} outputs do not divide among {size}"
    leaving = prefix + branch.exit
    return _cut_inputs(model, leaving, size) if leaving in model.linears else None


def _cut_inputs(model: _Model, name: str, size: int) -> str | None:
    """What a split of a linear's inputs would tear apart."""
    k = model.linears[name][1]
    unit = 8 if model.sizes[name] == -1 else model.sizes[name]
    if k % size:
        return f"`{name}`: {k} inputs do not divide among {size}"
    if k // size % unit:
        return f"`{name}`: {k // size} inputs per rank are not a multiple of {'8' if unit == 8 else f'group_size {unit}'}"
    return None


def _unfit_tile(engine: Engine, model: _Model, prefix: str, branch: Branch, size: int) -> str | None:
    """Which matrix of a rank the engine's kernel does not take. That for FP8 activations has tiles of 128 x 128."""
    if model.fp8:
        return _incomplete_tile(model, prefix, branch, size, unit=128)
    return None if engine.pads else _incomplete_tile(model, prefix, branch, size)


def _incomplete_tile(
    model: _Model, prefix: str, branch: Branch, size: int, *, turned: bool = False, unit: int = 64
) -> str | None:
    """Which matrix of a rank is no whole number of tiles of `unit` outputs x 128 inputs; `turned` allows 128 x 64 as well."""
    entries = [prefix + name for name in branch.entry if prefix + name in model.linears]
    leaving = prefix + branch.exit
    matrices: dict[str, tuple[int, int]] = {}
    if entries:
        least = model.heads[2] if branch.attends else 0  # key-value heads are repeated where there are more ranks than heads
        outputs = sum(max(model.linears[name][0] // size, least) for name in entries)
        matrices[entries[0]] = (outputs, model.linears[entries[0]][1])
    if leaving in model.linears:
        matrices[leaving] = (model.linears[leaving][0], model.linears[leaving][1] // size)
    for name, (n, k) in matrices.items():
        if (n % unit or k % 128) and not (turned and n % 128 == 0 and k % 64 == 0):
            fused = " with what is fused to it" if name != leaving and len(entries) > 1 else ""
            return f"`{name}`{fused}: {n} outputs by {k} inputs per rank are not whole tiles of {unit} by 128"
    return None
