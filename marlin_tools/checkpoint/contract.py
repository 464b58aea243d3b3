"""What we take for granted about the files of a model directory, as types: whoever reads one holds it against these.

Only keys that we use are here; others pass. `agree` then holds config.json against the tensors that are really there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from marlin_tools.checkpoint.strict_json import HINT, conforms
from marlin_tools.errors import ModelError
from marlin_tools.quantized import dtype_name


def plain_name(name: str) -> str:
    """The name of a file in its directory: no path, nothing that a terminal or a file system would take amiss."""
    if not 0 < len(name.encode("utf-8", "replace")) <= 200 or name.startswith(".") or "/" in name or not name.isprintable():
        raise ValueError("must be the plain name of a file in the same directory")
    return name


class Part(BaseModel):
    """An object some keys of which have these types; others pass."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


Size = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, le=2**16)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=200)]


class Weights(Part):
    """The scheme of one group of `compressed-tensors`."""

    num_bits: int | None = None
    group_size: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    symmetric: bool | None = None
    strategy: Name | None = None
    type: Name | None = None


class Group(Part):
    """One of `config_groups`."""

    targets: list[str] | None = None
    weights: Weights | None = None
    input_activations: dict[str, Any] | None = None


class Quantization(Part):
    """`quantization_config`, in either dialect."""

    quant_method: Name | None = None
    checkpoint_format: Name | None = None
    format: Name | None = None
    is_marlin_format: bool | None = None
    bits: int | None = None
    group_size: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    dynamic: dict[str, Any] | None = None
    modules_to_not_convert: list[str] | None = None
    ignore: list[str] | None = None
    config_groups: dict[str, Group] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


class Rope(Part):
    """How positions are turned: of all blocks, or of those of one kind."""

    rope_type: Name | None = None
    factor: Positive | None = None
    rope_theta: Positive | None = None
    original_max_position_embeddings: Size | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    full_attention: "Rope | None" = None
    sliding_attention: "Rope | None" = None


class Beside(Part):
    """What reads images or sounds beside the language model."""

    depth: Annotated[int, Field(ge=0, le=1000)] | None = None
    num_hidden_layers: Annotated[int, Field(ge=0, le=1000)] | None = None


class Generation(Part):
    """generation_config.json."""

    bos_token_id: int | None = None
    eos_token_id: int | Annotated[list[int], Field(min_length=1)] | None = None
    pad_token_id: int | None = None


class Config(Part):
    """config.json, or the part of it that describes the text model."""

    model_type: Name | None = None
    architectures: list[str] | None = None
    hidden_size: Annotated[int, Field(ge=1, le=2**20)] | None = None
    intermediate_size: Size | list[Size] | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] | None = None
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=1000)] | None = None
    num_labels: Count | None = None
    num_attention_heads: Annotated[int, Field(ge=1, le=2**16)] | None = None
    num_key_value_heads: Annotated[int, Field(ge=1, le=2**16)] | None = None
    head_dim: Annotated[int, Field(ge=1, le=2**16)] | None = None
    num_local_experts: Count | None = None
    num_experts: Count | None = None
    n_routed_experts: Count | None = None
    moe_num_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_k: Count | None = None
    moe_topk: Count | list[Count] | None = None
    moe_intermediate_size: Size | list[Size] | None = None
    vocab_size: Annotated[int, Field(ge=1, le=2**26)] | None = None
    max_position_embeddings: Size | None = None
    sliding_window: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    hidden_act: Name | None = None
    hidden_activation: Name | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    dtype: Name | None = None
    torch_dtype: Name | None = None
    quantization_config: Quantization | None = None
    text_config: "Config | None" = None
    thinker_config: "Config | None" = None
    vision_config: Beside | None = None
    audio_config: Beside | None = None


class Index(Part):
    """model.safetensors.index.json."""

    weight_map: Annotated[dict[str, Annotated[str, AfterValidator(plain_name)]], Field(min_length=1)]


class Tool(Part):
    """Who wrote a manifest."""

    name: str
    version: str


class Origin(Part):
    """The model that a result was made from."""

    origin: str
    fingerprint: str


class Linear(Part):
    """What was noted about one linear."""

    name: str
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)] | None = None
    output_error: float | None = None
    weight_error: float | None = None
    damp: float | None = None


class Stage(Part):
    """What a manifest says of a stage, its own or one that came before."""

    stage: Name | None = None
    model: Origin | None = None
    settings: dict[str, Any] | None = None


class Calibration(Part):
    """The text that was looked at."""

    source: str
    sequences: int
    tokens: int
    seqlen: int
    notes: list[str] = Field(default_factory=list)


class Times(Part):
    """What it took."""

    stages: dict[str, dict[str, float]] = Field(default_factory=dict)
    blocks_s: list[float] = Field(default_factory=list)


class Manifest(Stage):
    """manifest.json."""

    tool: Tool
    fingerprint: str | None = None
    calibration: Calibration | None = None
    solver: dict[str, Any] | None = None
    history: list[Stage] = Field(default_factory=list)
    linears: list[Linear] = Field(default_factory=list)
    kept: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    files: dict[str, str] = Field(default_factory=dict)
    times: Times = Field(default_factory=Times)
    held_out_kl: list[Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    device: str | None = None


class Scored(Part):
    """One number of an evaluation; null is one that is not finite."""

    task: str
    metric: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    baseline: float | None
    baseline_stderr: float | None
    difference: float | None
    difference_stderr: float | None
    part_of: str | None
    details: dict[str, Any]


class Judged(Part):
    """A model that was measured, and how it was run."""

    origin: str
    fingerprint: str
    format: str | None
    backend: str | None
    device: str
    computed_in: str


class Evaluated(Part):
    """evaluation.json."""

    fingerprint: str
    model: Judged
    baseline: Judged | None
    scores: list[Scored]
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]


class RunState(Part):
    """state/run.json."""

    fingerprint: str
    settings: dict[str, Any] = Field(default_factory=dict)
    text: list[int] | None = None


class BlockEntry(Part):
    """state/block-00000.json."""

    sha256: str
    linears: list[Linear]
    seconds: float


class Tensors(NamedTuple):
    """Of one checkpoint: shapes and types by name."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Where a config.json says how many experts there are."""

CALLED = ("num_experts_per_tok", "moe_k", "moe_topk")
"""Where it says how many of them a token is sent to: one number, or one for each block."""

COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(bias|masked_bias)$")
"""Buffers, masks among them, that old checkpoints store and that models compute today."""

_BLOCK = re.compile(r"^(?P<prefix>.*?(?:layers|blocks|h))\.(?P<index>\d{1,9})\.")
_WEIGHT = re.compile(r"\.(weight|bias)$|\.experts\.(gate_up_proj|down_proj)(_bias)?$")
_OTHER = re.compile(r"vision|visual|audio|image|encoder|projector|resampler|^vit\.|^talker\.|2wav\.|mtp")
"""Parts of a model that are not its text decoder."""


def check_config(config: dict[str, Any], where: Path) -> None:
    """Refuse a config.json in which a size, a flag or a name is of the wrong kind."""
    conforms(Config, config, str(where), hint="correct it, or download the model again")


def check_generation(config: dict[str, Any], where: Path) -> None:
    """Refuse a generation_config.json whose special tokens are none."""
    conforms(Generation, config, str(where), hint="correct it, or remove it")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model: all of it, or `text_config` beside that of other parts.

    Of those that also speak it is a part of what thinks.
    """
    thinker = config.get("thinker_config")
    nested = (thinker if isinstance(thinker, dict) else config).get("text_config")
    return nested if isinstance(nested, dict) else config


def agree(config: Mapping[str, Any], tensors: Tensors, where: Path) -> None:
    """Refuse a config.json that describes another model than the tensors beside it: other blocks, sizes or types."""
    text = text_config(config)
    if text is config or "num_hidden_layers" in text:  # a part of a larger model leaves out what is as usual
        check_blocks(text, tensors, where)
    if _has_experts(text, tensors):
        _check_experts(text, where)
    wanted = text.get("vocab_size"), text.get("hidden_size")
    for name, shape in tensors.shapes.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and not _OTHER.search(name):
            for value, found, key in zip(wanted, shape, ("vocab_size", "hidden_size"), strict=False):
                if value != found and (value is not None or text is config):
                    raise _disagreement(where, f"`{key}` is {value or 'missing'}, but `{name}` is {list(shape)}")
        if COMPUTED.search(name):
            continue
        plain = config.get("quantization_config") is None
        weight = name.endswith(("norm.weight", "embed_tokens.weight")) or (plain and bool(_WEIGHT.search(name)))
        kind = tensors.dtypes[name]
        if weight and not kind.is_floating_point:
            told = f"`{name}` is stored as {dtype_name(kind)}, weights are floating-point numbers"
            raise ModelError(f"`{where.parent}`: {told}", hint=HINT)
        if weight and plain and kind.itemsize == 1:
            told = f"`{name}` is stored as {dtype_name(kind)}, and no `quantization_config` says how to read it"
            raise ModelError(f"`{where}`: {told}", hint="download config.json again")


def blocks_of(config: Mapping[str, Any]) -> int | None:
    """How many blocks the settings of a language model ask for. Nemotron-H may say it only by what each of them is."""
    kinds = config.get("layers_block_type")
    return config.get("num_hidden_layers") or (len(kinds) if isinstance(kinds, list) else None)


def check_blocks(config: Mapping[str, Any], tensors: Tensors, where: Path) -> None:
    """Refuse another number of blocks than the settings of the language model say."""
    count = blocks_of(config)
    found: dict[str, set[int]] = {}
    for name in tensors.shapes:
        if (block := _BLOCK.match(name)) and not _OTHER.search(block["prefix"]):
            found.setdefault(block["prefix"], set()).add(int(block["index"]))
    extra = config.get("num_nextn_predict_layers") or 0  # stored behind the others, and read by nobody
    for prefix, there in found.items():
        if count is None:
            raise _disagreement(where, f"`num_hidden_layers` is missing, but there are {len(there)} blocks under `{prefix}`")
        if there not in (set(range(count)), set(range(count + extra))):
            missing = next((i for i in range(count) if i not in there), None)
            fact = f"there are {len(there)}" if missing is None else f"there is no `{prefix}.{missing}`"
            raise _disagreement(where, f"`num_hidden_layers` is {count}, but {fact} under `{prefix}`")


def _has_experts(config: Mapping[str, Any], tensors: Tensors) -> bool:
    """A Jamba without experts says that there is one, and leaves how many of them a token is sent to as it is elsewhere."""
    alone = next((config[key] for key in EXPERTS if config.get(key)), None) == 1
    return not alone or any(".experts." in name for name in tensors.shapes)


def _check_experts(config: Mapping[str, Any], where: Path) -> None:
    """A router calls some of the experts that there are, each once for a token."""
    count = next((config[key] for key in EXPERTS if config.get(key)), None)
    for key in CALLED:
        called = config.get(key)
        for each in called if isinstance(called, list) else [called]:
            if isinstance(count, int) and isinstance(each, int) and not 1 <= each <= count:
                hint = "correct it, or download the model again"
                raise ModelError(f"`{where}`: `{key}` is {each}, of {count} experts", hint=hint)


def _disagreement(where: Path, fact: str) -> ModelError:
    return ModelError(f"`{where}`: {fact}", hint="config.json and weights do not belong together; download the model again")
