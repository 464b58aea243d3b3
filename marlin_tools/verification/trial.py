"""What `verify` finds by running the model on the reference backend: the logits of when it was quantised, and sane tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marlin_tools import backends
from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.distributed.device import pick_device
from marlin_tools.errors import DeviceError, FormatError, ModelError
from marlin_tools.resources import expanded
from marlin_tools.verification.checks import Check, judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT32_TOLERANCE, FLOAT16_TOLERANCE = 1e-3, 5e-2
"""How far the logits may lie from the stored ones, as root mean square over their spread: the first when both were computed in
float32 on a CPU, where only the order of sums differs; the second when either was computed in 16 bits on a GPU."""

GREEDY_TOKENS = 16

Reference = tuple[Tensor, Tensor]
"""Tokens [L], and the logits [L, V] that the quantised model had for them in the stream that made it."""


@torch.no_grad()
def try_model(checkpoint: Checkpoint, device: str) -> Iterator[Check]:
    """Two checks of the model at work."""
    try:
        reference = _stored_reference(checkpoint.path / "verify" / "reference.safetensors")
        model = _load(checkpoint, device)
    except (ModelError, FormatError) as error:
        yield Check("logits", ok=False, detail=error.message)
        return
    if reference is None:
        yield Check("logits", ok=True, detail="no stored reference", skipped=True)
    else:
        made_on = str((read_manifest(checkpoint.path) or {}).get("device", "an unknown device"))
        yield _compare(model, reference, made_on)
    yield _generate(model, checkpoint, reference)


def _load(checkpoint: Checkpoint, device: str) -> "PreTrainedModel":
    """Dequantised once if there is room, else at each call: the same numbers."""
    pick_device(device)
    try:
        return backends.load(checkpoint, device=device, backend="reference")
    except DeviceError:
        return backends.load(checkpoint, device=device, backend="reference-packed")


def _stored_reference(file: Path) -> Reference | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor("tokens"), tensors.get_tensor("logits")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"`{file}` cannot be read: {error}", hint="quantise again") from error


def _compare(model: "PreTrainedModel", reference: Reference, made_on: str) -> Check:
    """Hold the logits against the stored ones."""
    tokens, stored = reference
    computed = model(input_ids=tokens[None].to(model.device)).logits[0].float().cpu()
    if computed.shape != stored.shape:
        return Check("logits", ok=False, detail=f"{list(computed.shape)} computed, {list(stored.shape)} stored")
    exact = made_on.startswith("cpu") and model.device.type == "cpu"
    limit = FLOAT32_TOLERANCE if exact else FLOAT16_TOLERANCE
    error = float((computed - stored).square().mean().sqrt() / stored.std())
    arithmetic = "float32 on a CPU, as then" if exact else f"the stored ones are from {made_on}"
    detail = f"{error:.1e} of their spread away from the stored ones, {limit:g} allowed ({arithmetic})"
    return Check("logits", error <= limit, detail)  # NaN is not within the limit


def _generate(model: "PreTrainedModel", checkpoint: Checkpoint, reference: Reference | None) -> Check:
    """A few greedy tokens, from the beginning of a text and from the reference: finite, and not one word for ever.

    Some models repeat themselves without being broken: one that does after every prompt is held against its original.
    """
    bos = checkpoint.config.get("bos_token_id")
    prompts = {"the beginning": torch.tensor([bos if isinstance(bos, int) else 0])}
    if reference is not None:
        prompts["the reference text"] = reference[0]
    written = {name: _continue(model, prompt) for name, prompt in prompts.items()}
    overflowed = [
        f"from {name}: logits are not finite after {len(tokens)} tokens"
        for name, tokens in written.items()
        if len(tokens) < GREEDY_TOKENS
    ]
    fine = f"{GREEDY_TOKENS} greedy tokens from {' and from '.join(prompts)}"
    if overflowed or not all(len(set(tokens)) == 1 for tokens in written.values()):
        return judge("generation", overflowed, fine)
    stuck = "; ".join(f"from {name}: nothing but token {tokens[0]}" for name, tokens in written.items())
    if (original := _original(checkpoint)) is None:
        return Check("generation", ok=True, detail=f"{stuck}; the original is not here to compare with", skipped=True)
    theirs = _load(original, str(model.device))
    if all(len(set(_continue(theirs, prompt))) == 1 for prompt in prompts.values()):
        return Check("generation", ok=True, detail=f"{fine}, repeated as the original repeats itself")
    return Check("generation", ok=False, detail=f"{stuck}; the original goes on")


def _original(checkpoint: Checkpoint) -> Checkpoint | None:
    """The very model that this was made from, if it is on this machine: nothing is fetched."""
    made_from = (read_manifest(checkpoint.path) or {}).get("model") or {}
    origin = str(made_from.get("origin", ""))
    if origin != "demo" and not expanded(origin).is_dir():
        return None
    try:
        found = Checkpoint.open(origin)
    except ModelError:
        return None
    return found if found.fingerprint == made_from.get("fingerprint") else None


def _continue(model: "PreTrainedModel", prompt: Tensor) -> list[int]:
    """The most likely tokens after the prompt, up to the first logits that are not finite."""
    tokens: list[int] = []
    step, cache = prompt[None], None
    while len(tokens) < GREEDY_TOKENS:
        output = model(input_ids=step.to(model.device), past_key_values=cache, use_cache=True)
        last = output.logits[:, -1].float()
        if not bool(torch.isfinite(last).all()):
            break
        step, cache = last.argmax(dim=1, keepdim=True), output.past_key_values
        tokens.append(int(step))
    return tokens
