"""Text that a model writes itself: windows sampled at temperature 1 from the whole vocabulary, beginning with BOS.

A teacher's own text needs no data set, and by construction it is what the teacher finds likely. A window does not end with the
end-of-text token: what follows it is another text, as in packed windows.
"""

from typing import TYPE_CHECKING, Any

import torch

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import ModelError
from marlin_tools.events import Emit, Event

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOGETHER = 64
"""Windows that are written at a time."""


@torch.no_grad()
def sample(model: "PreTrainedModel", checkpoint: Checkpoint, count: int, seqlen: int, seed: int, emit: Emit) -> TokenSet:
    """`count` windows of `seqlen` tokens; the same seed on the same machine gives the same text."""
    told = [part.get(key) for key in ("bos_token_id", "eos_token_id") for part in (checkpoint.text_config, checkpoint.config)]
    begin = next((each for each in told if isinstance(each, int)), None)
    if begin is None:
        raise ModelError(
            f"`{checkpoint.origin}` names no BOS token to begin a text with", hint="give it a text to read (`--calib`)"
        )
    from transformers import GenerationConfig

    # what the model's own file asks for besides, penalties and beams, would be done, too
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=begin)
    how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
    windows: list[torch.Tensor] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        while len(windows) < count:
            rows = min(_TOGETHER, count - len(windows))
            start = torch.full((rows, 1), begin, device=model.device)
            ids = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=seqlen - 1, **how)
            windows += ids.cpu().unbind()
            emit(Event("progress", "windows written by the teacher", len(windows), count))
    return TokenSet(tuple(windows), f"written by {checkpoint.origin}", packed=True, documents=count, seed=seed)
