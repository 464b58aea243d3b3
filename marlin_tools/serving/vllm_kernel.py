"""Our kernel as vLLM knows kernels: an `MPLinearKernel`, first in the list from which vLLM picks one for each INT4 layer.

Three moments of a layer: vLLM asks `can_implement` before there are weights, and this is where the kernels are compiled and
tested; `process_weights_after_loading` packs the weights, as 2:4 if their codes are; `apply_weights` is one operator. Whatever
we cannot do goes to the kernel that vLLM would have taken without us, if it has one.

vLLM keeps what `torch.compile` made of a model and finds it again by a hash of its settings, which does not know about kernels:
`_knows_our_choice` adds what we took to the hash, so that no compiled model meets weights that were packed for another one.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from vllm.model_executor.kernels import linear as registry
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from marlin_tools import __version__, ops
from marlin_tools.ops.linear import w4a8, w4a16, w24a16
from marlin_tools.ops.linear.layout import PackedTiles
from marlin_tools.ops.linear.packed import exponent_tensor, packed_fp8_linear, packed_linear
from marlin_tools.ops.runtime.scratch import share_among_captures
from marlin_tools.quantized import QuantizedLinear, unpack_nibbles
from marlin_tools.serving.tally import TALLY
from marlin_tools.serving.trust import unfit
from marlin_tools.serving.vllm import Attempt, log

_EXPONENT = "packed_exponent"
_READ = {"full_weight_shape", "partition_weight_shape", "weight_type", "act_type", "group_size", "zero_points"}

# A scale of a bfloat16 model that float16 cannot hold exactly is wrong by at most 2^-25. That is nothing beside scales of usual
# size; a layer in which it is not goes back to vLLM.
_LARGEST_ERROR = 2.0**-12

_stand_aside: ContextVar[bool] = ContextVar("stand_aside", default=False)
"""True while vLLM chooses for a layer that we gave back."""


def install() -> None:
    """Put the kernel first in vLLM's list, and our choice into its compile cache's key. Twice is as good as once."""
    missing = _READ - {field.name for field in fields(MPLinearLayerConfig)}
    if missing:
        raise TypeError(f"this vLLM describes layers without {', '.join(sorted(missing))}")
    kernels = registry._POSSIBLE_KERNELS[PlatformEnum.CUDA]  # noqa: SLF001  (`register_linear_kernel` only appends)
    if PackedInt4LinearKernel in kernels:
        return
    from vllm.config import VllmConfig

    VllmConfig.compute_hash = _knows_our_choice(VllmConfig.compute_hash)
    kernels.insert(0, PackedInt4LinearKernel)


def _knows_our_choice(compute_hash: Callable[..., str]) -> Callable[..., str]:
    """A hash of settings that also tells which layers run on our kernels, and whether kernels may start early, which torch's
    own settings say; unchanged where no layer does.
    """

    @functools.wraps(compute_hash)
    def with_our_choice(*args: Any, **kwargs: Any) -> str:
        plain = compute_hash(*args, **kwargs)
        ours = TALLY.fingerprint()
        if not ours:
            return plain
        early = getattr(inductor.triton, "enable_pdl", False)
        return hashlib.sha256(f"{plain} {__version__} {ours} {early}".encode()).hexdigest()[: len(plain)]

    return with_our_choice


class PackedInt4LinearKernel(MPLinearKernel):
    """Symmetric INT4, dense or 2:4 sparse, under float16 or bfloat16, or dense under FP8 activations rounded token by token."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return 80

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether, and if not why not. Compiles and tests the kernels when it is asked for the first time."""
        if _stand_aside.get():
            return False, "the layer was given back"
        with Attempt("a layer stays on vLLM's own kernel") as attempt:
            reason = _obstacle(c)
            if reason is None:
                with _plain_torch():
                    reason = _unfit(torch.cuda.current_device(), c)
            if reason is not None:
                TALLY.refuse(_shape(c), reason)
            return reason is None, reason
        TALLY.refuse(_shape(c), str(attempt.failure))
        return False, attempt.failure

    def __init__(self, c: MPLinearLayerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(c, *args, **kwargs)
        self._arguments = (args, kwargs)
        self._instead: MPLinearKernel | None = None
        self._out_features = c.partition_weight_shape[1]
        TALLY.expect()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weights; or let vLLM's next kernel have them, untouched."""
        with Attempt("a layer goes back to vLLM's own kernel") as attempt, _plain_torch(), torch.no_grad():
            packed = self._pack(layer)
            self._keep(layer, packed)
            TALLY.take(packed, fp8=_reads_fp8(self.config))
            return
        try:
            with _standing_aside():
                chosen = registry.choose_mp_linear_kernel(self.config)
        except ValueError as error:
            raise ValueError(f"marlin-tools: {attempt.failure}, and vLLM has no other kernel for such a layer") from error
        args, kwargs = self._arguments
        self._instead = chosen(self.config, *args, **kwargs)
        self._instead.process_weights_after_loading(layer)
        TALLY.give_back(_shape(self.config), str(attempt.failure))

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One operator, whatever the weights are."""
        if self._instead is not None:
            return self._instead.apply_weights(layer, x, bias)
        codes, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        multiply = packed_fp8_linear if _reads_fp8(self.config) else packed_linear
        return multiply(x, codes, scales, getattr(layer, _EXPONENT), bias, self._out_features)

    def _pack(self, layer: nn.Module) -> PackedTiles:
        c = self.config
        weight = _read(getattr(layer, self.w_q_name), getattr(layer, self.w_s_name), c.partition_weight_shape)
        device = weight.codes.device
        if not _reads_fp8(c) and weight.is_2_4() and _sparse_fits(device.index, c):  # other sparse layers run as dense ones
            sparse = ops.pack_sparse(weight)
            ops.prepare_sparse(sparse, c.act_type)
            share_among_captures(device.index)
            return sparse
        packed = ops.pack(weight)
        ops.prepare(packed, _outputs(c))
        if _reads_fp8(c):
            ops.prepare_fp8(packed, _outputs(c))
        share_among_captures(device.index)
        return packed

    def _keep(self, layer: nn.Module, packed: PackedTiles) -> None:
        """In the place of what was loaded; when a model is loaded again, in the place of what was packed then."""
        self._transform_param(layer, self.w_q_name, lambda _: packed.codes)
        self._transform_param(layer, self.w_s_name, lambda _: packed.scales)
        exponent = exponent_tensor(packed)
        if hasattr(layer, _EXPONENT):
            getattr(layer, _EXPONENT).copy_(exponent)
        else:
            layer.register_buffer(_EXPONENT, exponent, persistent=False)


def _obstacle(c: MPLinearLayerConfig) -> str | None:
    """Why our kernels cannot hold such a layer, or None."""
    fp8 = _reads_fp8(c)
    if c.weight_type != (scalar_types.int4 if fp8 else scalar_types.uint4b8):  # stored alike; its name says how CUTLASS has it
        return f"weights of type {c.weight_type}, not symmetric INT4"
    if c.zero_points:
        return "zero points"
    if getattr(c, "has_g_idx", False):  # gone in newer versions, which do not offer such layers
        return "inputs in another order (act-order)"
    if _outputs(c) not in (torch.float16, torch.bfloat16):
        return f"outputs of type {_outputs(c)}, not float16 or bfloat16"
    if not fp8 and c.act_type != _outputs(c):
        return f"activations of type {c.act_type}, not {_outputs(c)}"
    inputs = c.partition_weight_shape[0]
    group = inputs if c.group_size == -1 else c.group_size
    reason = ops.limits(inputs, group)
    if fp8 and reason is None:
        return ops.fp8_supported(torch.device("cuda", torch.cuda.current_device()), inputs, group)
    return reason


def _reads_fp8(c: MPLinearLayerConfig) -> bool:
    """Whether activations are to be rounded, each token by its largest value."""
    return bool(c.act_type == torch.float8_e4m3fn)


def _outputs(c: MPLinearLayerConfig) -> torch.dtype:
    """The type of what comes in and goes out, whatever the product reads."""
    out_type: torch.dtype | None = getattr(c, "out_type", None)
    return c.act_type if out_type is None else out_type


def _unfit(device_index: int, c: MPLinearLayerConfig) -> str | None:
    """Why kernels cannot be used that such a layer needs: FP8 goes beside 16 bits, for few tokens."""
    reason = unfit(device_index, _outputs(c), w4a16.OPERATOR, _group(c))
    if reason is None and _reads_fp8(c):
        return unfit(device_index, _outputs(c), w4a8.OPERATOR, _group(c))
    return reason


def _group(c: MPLinearLayerConfig) -> int:
    """Inputs that share a scale, 0 if all of a rank's do."""
    size: int = c.group_size
    return 0 if size in (-1, c.partition_weight_shape[0]) else size


def _sparse_fits(device_index: int, c: MPLinearLayerConfig) -> bool:
    inputs = c.partition_weight_shape[0]
    if ops.limits(inputs, inputs if c.group_size == -1 else c.group_size, sparse=True) is not None:
        return False
    reason = unfit(device_index, c.act_type, w24a16.OPERATOR, _group(c))
    if reason is not None:
        log.warning("marlin-tools: 2:4 sparse layers run as dense ones (%s)", reason)
    return reason is None


def _read(words: Any, scales: Any, shape: tuple[int, int]) -> QuantizedLinear:
    """The weight [N, K] of a layer as it was loaded; `output_dim` says which way its tensors lie, codes are packed along K."""
    k, n = shape
    # [N, ...], as compressed-tensors stores them, or [..., N], as gptq does
    words, scales = (each.detach() if each.output_dim == 0 else each.detach().t() for each in (words, scales))
    codes = unpack_nibbles(words.contiguous()).view(n, k)
    return QuantizedLinear(codes, _float16(scales.contiguous()), k // scales.shape[1])


def _float16(scales: Tensor) -> Tensor:
    cast = scales.to(torch.float16)
    error = (cast.float() - scales.float()).abs().max()
    if not bool(error <= _LARGEST_ERROR * scales.float().abs().max()):
        raise ValueError(f"scales are not exact in float16: wrong by up to {error.item():g}")
    return cast


def _shape(c: MPLinearLayerConfig) -> str:
    k, n = c.partition_weight_shape
    return f"{n} x {k}"


@contextmanager
def _standing_aside() -> Iterator[None]:
    token = _stand_aside.set(True)
    try:
        yield
    finally:
        _stand_aside.reset(token)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Torch's usual default type and device: vLLM sets its own while it makes layers."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)
