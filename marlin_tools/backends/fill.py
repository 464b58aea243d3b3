"""Put the weights of a checkpoint into a model without weights: every parameter is found, every stored tensor is accounted for.

All names are compared before the first tensor is read. The tensors then go to the device one at a time, so that the memory
in use never exceeds the finished model by more than one of them. Buffers that are not stored (rotary frequencies, embedding
scales) are computed by transformers itself, in the way in which its own loading computes them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from marlin_tools.checkpoint.reader import GENERATION, Checkpoint
from marlin_tools.checkpoint.skeleton import MAKING, MISMATCH, damaged, mismatched, read_weight, some
from marlin_tools.errors import ErrorTranslation, ModelError
from marlin_tools.events import Emit, Event
from marlin_tools.families import known_family
from marlin_tools.families.layout import Layout, WeightRef, beside, refuse_strangers
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fill(
    model: "PreTrainedModel",
    checkpoint: Checkpoint,
    linears: StoredLinears | None,
    build: Callable[[QuantizedLinear, Tensor | None, torch.device, torch.dtype], nn.Module],
    device: torch.device,
    emit: Emit,
) -> "PreTrainedModel":
    """Give a model on the meta device its weights, in place; quantised linears become what `build` makes of them."""
    from transformers import GenerationConfig

    places = _places(model, checkpoint)
    homes = {ref.tensor.removesuffix(".weight"): name.removesuffix(".weight") for name, ref in places.items() if ref.whole}
    quantized = {name: homes.get(name, name) for name in _of_model(model, linears, homes)}
    modules = {module: _linear(model, module) for module in quantized.values()}
    dtype = model.dtype
    ties = _ties(model, {f"{module}.weight" for module in modules})
    _account(model, checkpoint, linears, ties, places)
    for names in ties:
        _fill_tied(model, checkpoint, {name: places[name] for name in names}, device)
    for done, (stored, name) in enumerate(quantized.items(), start=1):
        assert linears is not None
        weight, linear = linears.read(stored), modules[name]
        if weight.shape != (asked := (linear.out_features, linear.in_features)):
            raise ModelError(f"`{name}` is {weight.shape} in the checkpoint, config.json asks for {asked}", hint=MISMATCH)
        model.set_submodule(name, build(weight, linear.bias, device, dtype))
        emit(Event("progress", "linears", done, len(modules)))
    compute_buffers(model, device)
    if (file := checkpoint.path / GENERATION).is_file():
        with ErrorTranslation(ModelError, f"`{file}` is not understood by transformers", "correct it, or remove it"):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return model.eval()


def _places(model: "PreTrainedModel", checkpoint: Checkpoint) -> dict[str, WeightRef]:
    """Where each parameter and stored buffer lies; names are taken as they are for a family that is not known."""
    names = [*model.state_dict(), *(name for name, _ in model.named_parameters(remove_duplicate=False))]
    if known_family(checkpoint.config) is None:
        return {name: WeightRef(name) for name in names}
    layout = Layout(checkpoint)
    return {name: layout.place(name) for name in names}


def _of_model(model: "PreTrainedModel", linears: StoredLinears | None, homes: Mapping[str, str]) -> list[str]:
    """The quantised linears but those of something beside the language model, such as a head that predicts ahead."""
    if linears is None:
        return []
    needs_none = beside(linears.checkpoint, model)
    return [name for name in linears.names if name in homes or not needs_none(f"{name}.weight")]


def _linear(model: "PreTrainedModel", name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(
            f"the checkpoint holds a quantised `{name}`, the model of config.json has none", hint=MISMATCH
        ) from error
    if not isinstance(module, nn.Linear):
        raise ModelError(f"`{name}` is quantised, but a {type(module).__name__} in the model", hint=MISMATCH)
    return module


def _ties(model: "PreTrainedModel", quantized: set[str]) -> list[list[str]]:
    """The names of all parameters and stored buffers that are not quantised; names of one tensor stand together."""
    stored = model.state_dict(keep_vars=True)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    shared: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if name not in quantized:
            shared[id(tensor)].append(name)
    return list(shared.values())


def _account(
    model: "PreTrainedModel",
    checkpoint: Checkpoint,
    linears: StoredLinears | None,
    ties: list[list[str]],
    places: Mapping[str, WeightRef],
) -> None:
    """Raise ModelError unless the checkpoint holds what the model needs, and nothing that would be left over."""
    if missing := [places[names[0]].tensor for names in ties if not any(places[name].tensor in checkpoint for name in names)]:
        raise ModelError(f"`{checkpoint.origin}` lacks {some(missing)}", hint=MISMATCH)
    used = {places[name].tensor for names in ties for name in names} | (linears.tensors if linears is not None else frozenset())
    refuse_strangers(checkpoint, model, used)


def _fill_tied(model: "PreTrainedModel", checkpoint: Checkpoint, names: Mapping[str, WeightRef], device: torch.device) -> None:
    """Fill the names of one tensor. A tie holds as long as the checkpoint does not store two different tensors for it."""
    first: Tensor | None = None
    for name in sorted(names, key=lambda name: names[name].tensor not in checkpoint):
        owner, _, leaf = name.rpartition(".")
        module, ref = model.get_submodule(owner), names[name]
        old = getattr(module, leaf)
        if first is None or ref.tensor in checkpoint:
            stored = read_weight(checkpoint, ref.tensor, old.shape) if ref.whole else _part(checkpoint, ref, old.shape)
            # a buffer, such as what corrects DeepSeek's routers, stays in the type that its makers chose, as in transformers
            tensor = stored.to(device, old.dtype if isinstance(old, nn.Parameter) else stored.dtype)
            if first is None or not torch.equal(tensor, first):
                first = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        setattr(module, leaf, first)


def _part(checkpoint: Checkpoint, ref: WeightRef, shape: Sequence[int]) -> Tensor:
    """One expert's part of a tensor that holds all of them."""
    if ref.shape(checkpoint) != tuple(shape):
        raise mismatched(ref.tensor, ref.shape(checkpoint), shape)
    part = ref.read(checkpoint)
    if not bool(torch.isfinite(part).all()):
        raise damaged(ref.tensor)
    return part


@torch.no_grad()
def compute_buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Let transformers compute the buffers that no checkpoint stores; everything that has a value is marked as done.

    What computes a buffer is the module that has it, or the decoder.
    """
    decoder = model.get_decoder()
    for module in model.modules():
        waiting = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in waiting:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # noqa: SLF001 (transformers' protocol)
        module._is_hf_initialized = not waiting and module is not decoder  # noqa: SLF001
    with MAKING:
        model.initialize_weights()
