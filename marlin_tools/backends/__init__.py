"""Ways to run a checkpoint: transformers' model with our linears in the place of the quantised ones.

    model = load("runs/demo-int4")          # dense checkpoints too: a baseline takes the same path

A backend is one function that builds the module of one quantised linear; everything else of the model is transformers' own
code. Read next: `fill.py`, `reference.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import torch
from torch import Tensor, nn

from marlin_tools.backends import native, reference, torch_int4
from marlin_tools.backends.fill import fill
from marlin_tools.checkpoint.dequantized import dequantized
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.distributed.device import describe_device, free_memory, pick_device
from marlin_tools.errors import DeviceError, ModelError, RecipeError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families.experts import shell
from marlin_tools.formats.config import activations_of
from marlin_tools.formats.contents import grid_of
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import ActivationType, QuantizedLinear, dtype_name, round_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Build = Callable[[QuantizedLinear, Tensor | None, torch.device, torch.dtype], nn.Module]
"""(weight, bias, device, dtype of the activations) -> the module that multiplies with it."""


@dataclass(frozen=True)
class Backend:
    """One way to run quantised linears.

    build      makes one of them
    devices    device types that it runs on
    bits       memory per quantised weight, 0 for as much as the dtype of the activations takes
    what       how it works, for people
    build_fp8  the same for a linear that rounds its input to FP8 by itself; None where that is done before it
    obstacle   why it cannot run a model, or None: (model, its quantised linears, device) -> str | None
    """

    build: Build
    devices: tuple[str, ...]
    bits: float
    what: str
    build_fp8: Build | None = None
    obstacle: "Callable[[PreTrainedModel, StoredLinears, torch.device], str | None] | None" = None

    def function(self, activations: ActivationType) -> Build:
        """What builds a linear that reads these."""
        if activations == "16bit":
            return self.build
        return self.build_fp8 or (lambda *what: round_inputs(self.build(*what)))

    def refuses(self, model: "PreTrainedModel", linears: StoredLinears | None, device: torch.device) -> str | None:
        """Why it cannot run this model here, or None."""
        if device.type not in self.devices:
            return f"does not run on {device.type}"
        return self.obstacle(model, linears, device) if self.obstacle and linears is not None else None


# In order of preference: `auto` is the first that runs the model on the device and fits into its memory.
BACKENDS = {
    "native": Backend(native.build, ("cuda",), 4.25, "our kernels", native.build_fp8, native.obstacle),
    "reference": Backend(reference.at_load, ("cpu", "cuda"), 0, "torch, dequantised once at load"),
    "reference-packed": Backend(reference.PackedLinear, ("cpu", "cuda"), 4.25, "torch, dequantised per call"),
    "torch-int4": Backend(torch_int4.build, ("cpu",), 4.25, "torch's INT4 product", obstacle=torch_int4.obstacle),
}


def load(
    model: str | Path | Checkpoint,
    *,
    device: str = "auto",
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    activations: ActivationType | None = None,
    emit: Emit = silent,
) -> "PreTrainedModel":
    """A transformers model, ready to run. `dtype` is float32 on a CPU (bfloat16 for `torch-int4`) and the checkpoint's own on a
    GPU unless it is given. `activations` is what the quantised linears read, "fp8" or "16bit", if not what the checkpoint says.
    `save_pretrained` writes what the backend `reference` dequantised, and refuses linears that are packed or read FP8.
    """
    _check_dtype(dtype)
    checkpoint = dequantized(Checkpoint.open(model))
    place = pick_device(device)
    usual = torch.bfloat16 if backend == "torch-int4" else torch.float32
    dtype = dtype or (usual if place.type == "cpu" else checkpoint.dtype)
    empty = shell(checkpoint, dtype)
    linears = StoredLinears(checkpoint) if checkpoint.quantization is not None else None
    check_activations(checkpoint, activations)
    reads = activations or activations_of(checkpoint.quantization)
    name, reason = choose_backend(backend, empty, linears, place)
    how = {"backend": name if linears else None, "device": describe_device(place), "computed_in": dtype_name(dtype)}
    how["activations"] = reads if linears else None
    said = ", FP8 activations" if reads == "fp8" else ""
    kind = f"backend `{name}` ({reason}){said}" if linears else "no quantised linears"
    emit(Event("note", f"`{checkpoint.origin}` on {place} in {dtype_name(dtype)}: {kind}", data=how))
    try:
        filled = fill(empty, checkpoint, linears, BACKENDS[name].function(reads), place, emit)
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"`{checkpoint.origin}` does not fit into the memory of {place}", hint=_SMALLER) from error
    if linears and (BACKENDS[name].bits or reads == "fp8"):
        filled.__dict__["save_pretrained"] = _refuse_to_save
    return filled


def _check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse what no model computes in, before transformers takes it for a mistake of config.json."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` is a type of torch, such as torch.bfloat16, not {dtype!r}")
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"no model computes in {dtype}; use torch.float32, torch.float16 or torch.bfloat16")


def _refuse_to_save(*_args: Any, **_kwargs: Any) -> NoReturn:
    """In the place of a model's `save_pretrained`: transformers would write tensors that nothing can read back.

    A function and not a method, so that a model can still be copied and pickled.
    """
    raise ModelError(
        "`save_pretrained` cannot write linears that are packed for a backend, or read FP8 activations",
        hint="after `import marlin_tools.transformers`, load with AutoModelForCausalLM to save the format again; "
        "`marlin-tools export` writes another",
    )


def check_activations(checkpoint: Checkpoint, activations: ActivationType | None) -> None:
    """Refuse a choice that there is not, and one for linears that are not there."""
    if activations is not None and activations not in (known := get_args(ActivationType)):
        raise RecipeError(f"unknown activations `{activations}`", hint=f"known: {', '.join(known)}")
    if activations and dequantized(checkpoint).quantization is None:
        raise RecipeError(
            f"`{checkpoint.origin}` holds no quantised linears, which `--activations` is about",
            hint="leave it out, or name a quantised model",
        )


_SMALLER = "use `--backend reference-packed`, a GPU with more memory, or `--device cpu`"


def check_backend(name: str) -> None:
    """Refuse what is none of `BACKENDS`, nor `auto`."""
    if not isinstance(name, str):
        raise TypeError(f"a backend is a name, such as `auto`, not {type(name).__name__}")
    if name != "auto" and name not in BACKENDS:
        close = get_close_matches(name, BACKENDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known: auto, {', '.join(BACKENDS)}"
        if name == "vllm":
            hint = "only `marlin-tools eval` runs through vLLM; to serve, `vllm serve DIR`"
        raise RecipeError(f"unknown backend `{name}`", hint=hint)


def check_place(name: str, device: torch.device) -> None:
    """Refuse a backend that runs no model there."""
    if name in BACKENDS and device.type not in (own := BACKENDS[name].devices):
        raise DeviceError(
            f"backend `{name}` does not run on {device.type}",
            hint=f"leave `--backend` out, or name a device of its own: {', '.join(sorted(own))}",
        )


def choose_backend(name: str, model: "PreTrainedModel", linears: StoredLinears | None, device: torch.device) -> tuple[str, str]:
    """The backend for a model that has no weights yet, and why; DeviceError if none has room on the device."""
    check_backend(name)
    check_place(name, device)
    free = free_memory(device)
    tried, crowded = [], False
    quantized = sum(grid_of(linears, name).n * grid_of(linears, name).k for name in linears.names) if linears else 0
    candidates = [name] if name != "auto" else list(BACKENDS) if quantized else ["reference"]
    for candidate in candidates:
        backend = BACKENDS[candidate]
        if (reason := backend.refuses(model, linears, device)) is not None:
            if name != "auto" or device.type in backend.devices:
                tried.append(f"backend `{candidate}` {reason}")
        elif (need := _bytes(model, quantized, backend)) > free:
            subject = f"backend `{candidate}`" if quantized else "the model"
            tried.append(f"{subject} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device}")
            crowded = True
        else:
            chosen = "; ".join([*tried, "the first that can"]) if tried else "the default"
            return candidate, f"{backend.what}; {'asked for' if name != 'auto' else chosen}"
    hint = _SMALLER if crowded else "use `--backend reference-packed`, which runs anything"
    raise DeviceError("; ".join(tried), hint=hint)


def _bytes(model: "PreTrainedModel", quantized: int, backend: Backend) -> int:
    """What the weights take on the device, so many of which are quantised."""
    full = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    saved = model.dtype.itemsize - backend.bits / 8 if backend.bits else 0.0
    return int(full - quantized * saved)
