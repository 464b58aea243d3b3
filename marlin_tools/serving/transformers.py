"""A quantizer for transformers: `from_pretrained` runs our four formats on packed weights instead of unpacking them to 16 bits.

    import marlin_tools.transformers                      # once
    model = AutoModelForCausalLM.from_pretrained(DIR, device_map="cuda")

transformers finds quantizers by `quant_method`. `register` takes over those of our formats: a checkpoint that we can read gets
a `StoredConfig` and with it our quantizer, any other one what transformers had before. While a model loads, each quantised
linear is a `PendingLinear` with the tensors that the checkpoint has for it; then it becomes the linear of `backends`: our
kernels on a GPU, torch's INT4 product on a CPU in bfloat16, else the packed reference. `save_pretrained` writes the same again.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, build_glob_alternation, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from marlin_tools import ops
from marlin_tools.backends import native, reference, torch_int4
from marlin_tools.checkpoint.headers import TensorInfo, read_header
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import FormatError, ModelError
from marlin_tools.families.layout import beside
from marlin_tools.formats import READABLE, find_format
from marlin_tools.formats.config import activations_of
from marlin_tools.formats.format import Format
from marlin_tools.quantized import QuantizedLinear, round_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
_ELSEWHERE = "use `marlin_tools.load(DIR)`, or `marlin_tools.transformers.unregister()` for what transformers does without us"


class StoredConfig(QuantizationConfigMixin):
    """A `quantization_config` as it stands in config.json, which is also how it is written again."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.stored = dict(stored)
        self.quant_method = str(stored["quant_method"])

    def to_dict(self) -> dict[str, Any]:
        """What was read."""
        return copy.deepcopy(self.stored)


class _Takeover:
    """Stands in both of transformers' tables for one `quant_method`, before what was there."""

    def __init__(self, config: Any, quantizer: Any) -> None:
        self.config, self.quantizer = config, quantizer

    def from_dict(self, stored: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The config of a checkpoint."""
        try:
            find_format(stored)
        except FormatError as error:
            if self.config is None:
                raise
            _log.info("not for our kernels: %s", error.message)
            return self.config.from_dict(stored, *args, **kwargs)
        return StoredConfig(stored)

    def __call__(self, config: Any, **kwargs: Any) -> HfQuantizer:
        """The quantizer for a config."""
        if isinstance(config, StoredConfig):
            return PackedQuantizer(config, **kwargs)
        return self.quantizer(config, **kwargs)


def register() -> None:
    """Take over the formats that we read. Twice is as good as once."""
    for method in {method for readable in READABLE for method, _ in readable.spellings}:
        if not isinstance(AUTO_QUANTIZER_MAPPING.get(method), _Takeover):
            before = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method), AUTO_QUANTIZER_MAPPING.get(method)
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AUTO_QUANTIZER_MAPPING[method] = _Takeover(*before)


def unregister() -> None:
    """Leave transformers as it was."""
    for method, found in list(AUTO_QUANTIZER_MAPPING.items()):
        if isinstance(found, _Takeover):
            for table, before in (
                (AUTO_QUANTIZATION_CONFIG_MAPPING, found.config),
                (AUTO_QUANTIZER_MAPPING, found.quantizer),
            ):
                if before is None:
                    del table[method]
                else:
                    table[method] = before


class PendingLinear(nn.Module):
    """A quantised linear while the checkpoint's tensors for it arrive."""

    def __init__(self, linear: nn.Linear, stored: Mapping[str, TensorInfo]) -> None:
        super().__init__()
        self.shape, self.dtype = (linear.out_features, linear.in_features), linear.weight.dtype
        for suffix, info in stored.items():
            empty = torch.empty(info.shape, dtype=info.dtype, device="meta")
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))
        self.bias: nn.Parameter | None = linear.bias


class PackedQuantizer(HfQuantizer):
    """Loads and saves models whose linears stay packed."""

    requires_calibration = True
    is_compileable = True
    is_trainable = False

    def __init__(self, config: StoredConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._format: Format = find_format(config.stored)
        self._reads = activations_of(config.stored)

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        """Packed weights stay where they are put."""
        if isinstance(device_map, Mapping):
            _check_places(device_map.values())

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """In the format that they were loaded from."""
        return True

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **_kwargs: Any
    ) -> None:
        self._dtypes = _dtypes(model)
        self._headers: dict[str, TensorInfo] = {}
        for file in checkpoint_files or ():
            self._headers |= read_header(Path(file))
        stored = dict(_quantized(self._headers, self._format))
        if not stored:
            raise ModelError(
                f"the checkpoint holds no tensors of format `{self._format.name}`, which its config.json names",
                hint="only *.safetensors are read; download or export the checkpoint again",
            )
        self._stored = _of_model(model, {place: name for name, place in _places(model, stored)}, checkpoint_files or ())
        for place, name in self._stored.items():
            model.set_submodule(place, PendingLinear(_linear(model, place, name), stored[name]))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_kwargs: Any) -> "PreTrainedModel":
        waiting = {name: module for name, module in model.named_modules() if isinstance(module, PendingLinear)}
        devices = {getattr(module, self._format.suffixes[0]).device.type for module in waiting.values()}
        _check_places(devices)
        for name, tensor in _floating(model):
            tensor.data = tensor.data.to(self._dtypes.get(name, tensor.dtype))
        for name, module in waiting.items():
            model.set_submodule(name, self._built(name, module))
        return model

    def _built(self, name: str, module: PendingLinear) -> nn.Module:
        tensors = {
            suffix: self._exact(f"{self._stored[name]}.{suffix}", getattr(module, suffix).detach())
            for suffix in self._format.suffixes
        }
        try:
            weight = self._format.unpack(tensors, module.shape)
        except FormatError as error:
            raise FormatError(f"`{name}`: {error.message}", hint=error.hint) from error
        device = weight.codes.device
        dtype, reason = module.dtype, ops.limits(weight.shape[1], weight.group_size)
        fits = device.type == "cuda" and reason is None and dtype in (torch.float16, torch.bfloat16)
        if device.type == "cuda" and not fits:
            _log.warning("`%s` runs on the reference: %s", name, reason or f"activations are {dtype}")
        bias = None if module.bias is None else module.bias.detach()
        native_build = native.build_fp8 if self._reads == "fp8" else native.build
        build = native_build if fits else torch_int4.build if device.type == "cpu" else reference.PackedLinear
        built = build(weight, bias, device, dtype)
        if self._reads == "fp8" and not fits:
            round_inputs(built)
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(built, hook)
        return built.eval()

    def _exact(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as it is stored: what has been cast to the type of the model, as scales are, is read once more."""
        stored = self._headers[name]
        if tensor.dtype == stored.dtype:
            return tensor
        with safe_open(stored.file, framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found.to(tensor.device)

    def _scales_dtype(self, name: str) -> torch.dtype:
        """The type in which the scales of a linear are stored, whatever the model computes in."""
        stored = (self._headers[f"{self._stored[name]}.{suffix}"].dtype for suffix in self._format.suffixes)
        return next(dtype for dtype in stored if dtype.is_floating_point)

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of the checkpoint, and not those that our linears hold."""
        ours = {name: module for name, module in model.named_modules() if _weight(module) is not None}
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.rpartition(".")[0] not in ours or name.endswith(".bias")
        }
        for name, module in ours.items():
            weight = _weight(module)
            assert weight is not None
            for suffix, tensor in self._format.pack(weight, self._scales_dtype(name)).items():
                state[f"{name}.{suffix}"] = tensor
        return state, {}


def _weight(module: nn.Module) -> QuantizedLinear | None:
    """What one of our linears computes with, in the neutral form."""
    if isinstance(module, native.NativeSparseLinear):
        return ops.unpack_sparse(module.weight)
    if isinstance(module, native.NativeLinear):
        packed = module.weight
        assert isinstance(packed, ops.PackedWeight)
        return ops.unpack(packed)
    return module.weight() if isinstance(module, reference.PackedLinear | torch_int4.TorchInt4Linear) else None


def _floating(model: "PreTrainedModel") -> Iterator[tuple[str, Tensor]]:
    """The weights that are not quantised, those that are tied once, and buffers that checkpoints have."""
    names = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in names and tensor.is_floating_point():
            yield name, tensor


def _dtypes(model: "PreTrainedModel") -> dict[str, torch.dtype]:
    """Their types, as they are asked for. transformers leaves a quantised model's tensors as they are stored if a checkpoint
    calls them otherwise than the model does, as it does where the language model is part of a larger one.
    """
    dtypes = {name: tensor.dtype for name, tensor in _floating(model)}
    exact = model._get_dtype_plan(model.dtype)  # noqa: SLF001  (what the model wants in 32 bits; nothing public says it)
    if exact:
        pattern, _, _ = build_glob_alternation(list(exact))
        dtypes |= {name: torch.float32 for name in dtypes if pattern.search(name)}
    return dtypes


def _quantized(headers: Mapping[str, TensorInfo], stored_as: Format) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """The quantised linears of a checkpoint with their tensors by suffix."""
    marker = f".{stored_as.suffixes[0]}"
    for name in [name.removesuffix(marker) for name in headers if name.endswith(marker)]:
        if missing := [suffix for suffix in stored_as.suffixes if f"{name}.{suffix}" not in headers]:
            raise FormatError(f"`{name}` has no `{missing[0]}`", hint="download or export the checkpoint again")
        yield name, {suffix: headers[f"{name}.{suffix}"] for suffix in stored_as.suffixes}


def _places(model: "PreTrainedModel", stored: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each of these linears with the name of the module that transformers fills with it: older checkpoints have other names."""
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    there = model.state_dict()
    for name in stored:
        own = f"{name}.weight"
        found, _ = rename_source_key(own, renamings, [], model.base_model_prefix, there)
        yield name, (found if found in there else own).removesuffix(".weight")


def _of_model(model: "PreTrainedModel", places: Mapping[str, str], files: Sequence[str]) -> dict[str, str]:
    """The places but those that the model does not have, of what it does without, such as a head that predicts ahead."""
    there = {name for name, _ in model.named_modules()}
    if places.keys() <= there:
        return dict(places)
    needs_none = beside(Checkpoint.open(Path(files[0]).parent), model)
    return {place: name for place, name in places.items() if place in there or not needs_none(f"{name}.weight")}


def _linear(model: "PreTrainedModel", place: str, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(place)
    except AttributeError:
        raise ModelError(f"the checkpoint holds a quantised `{name}`, the model has no such module", hint=_ELSEWHERE) from None
    if not isinstance(module, nn.Linear):
        raise ModelError(f"`{name}` is quantised, but a {type(module).__name__} in the model", hint=_ELSEWHERE)
    return module


def _check_places(places: Any) -> None:
    """Our linears cannot be moved for each call, as accelerate does with what lies on a CPU or a disk beside a GPU."""
    kinds = {str(getattr(place, "type", place)).partition(":")[0] for place in places}
    if "disk" in kinds or "meta" in kinds or ("cpu" in kinds and len(kinds) > 1):
        raise ModelError(
            "`device_map` leaves packed weights on the CPU or on disk beside a GPU",
            hint='put all layers on GPUs, or all on the CPU: `device_map="cuda"` or `device_map="cpu"`',
        )
