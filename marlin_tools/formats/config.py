"""The two dialects of `quantization_config` in config.json: reading them, writing them, refusing what we cannot hold.

flat      one set of keys for all linears (`bits`, `group_size`, `sym`, `desc_act`, `checkpoint_format`): quant_method `gptq`
          and `marlin`. Read by transformers with gptqmodel, GPTQModel, vLLM and SGLang.
grouped   `config_groups`, each with targets and a full scheme: quant_method `compressed-tensors`.
          Read by transformers with compressed-tensors and by vLLM.

Where linears have groups of different sizes, each size has an entry of `config_groups`, and its targets are the ends of their
names. `Linear` is then no target: vLLM fuses q, k and v into a module of another name, and finds its class before their names.

A checkpoint says how its tensors lie by a *spelling*, the pair (quant_method, layout). One format can have several spellings.
`ignore` is in both dialects the full names of the linears that stay unquantized, `lm_head` among them.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from marlin_tools import __version__
from marlin_tools.errors import FormatError
from marlin_tools.quantized import ActivationType

Spelling = tuple[str, str]
"""(quant_method, layout)."""

BITS = 4

_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
"""How the grouped dialect says that activations are e4m3 with a scale for each token, found while the model runs."""


def spelling_of(config: Mapping[str, Any]) -> Spelling:
    """How a checkpoint with this quantization_config says that its weights are laid out."""
    method = str(config.get("quant_method"))
    if method == "gptq" and config.get("is_marlin_format"):  # AutoGPTQ up to 0.7.1; later ones use checkpoint_format
        return method, "marlin"
    if method == "gptq":
        return method, str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if method == "compressed-tensors":
        return method, str(config.get("format"))
    return method, method


def check_readable(config: Mapping[str, Any]) -> None:
    """Raise FormatError unless these are symmetric 4-bit weights under activations that we know."""
    if config.get("quant_method") == "compressed-tensors":
        for key in ("sparsity_config", "transform_config"):
            section = config.get(key)  # writers leave empty ones, and ones with the format `dense`, which change no weights
            if section and section.get("format") != "dense":
                raise FormatError(f"`quantization_config`: `{key}` is not supported", hint="start from the unquantized model")
        for name, group in (config.get("config_groups") or {}).items():
            _check_group(f"config_groups.{name}", group)
        activations_of(config)
        return
    _check_value("bits", config.get("bits", BITS), expected=BITS)
    _check_value("sym", config.get("sym", True), expected=True)


def activations_of(config: Mapping[str, Any] | None) -> ActivationType:
    """What the quantised linears of a checkpoint read, by its quantization_config; all of them the same."""
    groups = (config or {}).get("config_groups") or {}
    says: set[ActivationType] = {"fp8" if group.get("input_activations") else "16bit" for group in groups.values()}
    if len(says) > 1:
        raise FormatError(
            "`quantization_config`: some `config_groups` have FP8 activations and some have not",
            hint="start from the unquantized model",
        )
    return says.pop() if says else "16bit"


def with_activations(config: dict[str, Any], activations: ActivationType) -> dict[str, Any]:
    """The same config for linears that read these; FP8 only in the grouped dialect."""
    if activations == "16bit":
        return config
    more = {
        "input_activations": dict(_FP8),
        "format": config["format"],
    }  # without, compressed-tensors takes it for int-quantized
    return config | {"config_groups": {name: group | more for name, group in config["config_groups"].items()}}


def flat_config(method: str, layout: str, group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """The flat dialect. GPTQModel learns of ignored linears by `dynamic`; others see which ones have quantised tensors."""
    config: dict[str, Any] = {
        "quant_method": method,
        "checkpoint_format": layout,
        "bits": BITS,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": "lm_head" not in ignore,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"marlin-tools:{__version__}"]},
    }
    if skipped := [name for name in ignore if name != "lm_head"]:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
    return config


def grouped_config(layout: str, group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """The grouped dialect with one group that holds every linear but the ignored ones."""
    weights = {
        "num_bits": BITS,
        "type": "int",
        "symmetric": True,
        **_grain(group_size),
        "dynamic": False,
        "actorder": None,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


_EXPERTS = r"re:.*\.experts\."
"""The target that matches all experts."""


def with_group_sizes(config: dict[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The same config for linears of these group sizes, -1 for per column; different ones only in the grouped dialect.

    Experts come first: transformers takes for theirs the first entry with a target that says `experts`, be it `shared_experts`.
    """
    if len(set(sizes.values())) == 1:
        return config
    scheme = config["config_groups"]["group_0"]
    groups = [
        scheme | {"targets": targets, "weights": scheme["weights"] | _grain(size)}
        for size, targets in sorted(_targets(sizes).items(), key=lambda each: (_EXPERTS in each[1], each[0]), reverse=True)
    ]
    return config | {"config_groups": {f"group_{number}": group for number, group in enumerate(groups)}}


def _targets(sizes: Mapping[str, int]) -> dict[int, list[str]]:
    """What names the linears of each size: the shortest ends of their names that no linear of another size has."""
    meant: dict[str, set[int]] = defaultdict(set)
    for name, size in sizes.items():
        for target in _ends(name):
            meant[target].add(size)
    found: dict[int, set[str]] = defaultdict(set)
    for name, size in sizes.items():
        found[size].add(next(target for target in _ends(name) if len(meant[target]) == 1))
    return {size: sorted(targets) for size, targets in found.items()}


def _ends(name: str) -> list[str]:
    """The targets that match a linear, the shortest first. Engines ask for experts by names that may not be theirs."""
    parts = [r"\d+" if part.isdecimal() else re.escape(part) for part in name.split(".")]
    ends = [r"re:.*\." + r"\.".join(parts[-length:]) + "$" for length in range(1, len(parts))]
    return [*([_EXPERTS] if ".experts." in name else []), *ends, name]


def _grain(group_size: int) -> dict[str, Any]:
    """How a scheme says what shares a scale."""
    per_column = group_size == -1
    return {"strategy": "channel" if per_column else "group", "group_size": None if per_column else group_size}


def _check_group(where: str, group: object) -> None:
    if not isinstance(group, Mapping) or not isinstance(weights := group.get("weights"), Mapping):
        raise FormatError(f"`quantization_config`: `{where}` has no `weights` scheme", hint="start from the unquantized model")
    _check_value(f"{where}.weights.num_bits", weights.get("num_bits"), expected=BITS)
    _check_value(f"{where}.weights.type", weights.get("type", "int"), expected="int")
    _check_value(f"{where}.weights.symmetric", weights.get("symmetric", True), expected=True)
    _check_value(f"{where}.output_activations", group.get("output_activations"), expected=None)
    _check_inputs(f"{where}.input_activations", group.get("input_activations"))
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise FormatError(
            f"`quantization_config`: `{where}.weights.actorder` {weights['actorder']!r} permutes the inputs",
            hint="no format here can hold that; quantize again with `actorder` static or null",
        )


def _check_inputs(where: str, scheme: object) -> None:
    """16-bit activations, or e4m3 with a scale for each token."""
    if not isinstance(scheme, Mapping):
        return _check_value(where, scheme, expected=None)
    for key, value in _FP8.items():
        _check_value(f"{where}.{key}", scheme.get(key), expected=value)
    return None


def _check_value(where: str, value: object, *, expected: object) -> None:
    if value != expected:
        raise FormatError(
            f"`quantization_config`: `{where}` is {value!r}, only {expected!r} can be read",
            hint="we hold symmetric 4-bit integers under activations of 16 bits, or of FP8 with a scale for each token; "
            "start from the unquantized model",
        )
