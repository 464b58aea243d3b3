"""Stage `generate`: continue a prompt; greedy, and the same text every time, unless a temperature is given."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from marlin_tools.backends import check_activations, check_backend, check_place, load
from marlin_tools.backends.decoder import Decoder, refusal
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.render import Encoder
from marlin_tools.data.tokens import check_arguments
from marlin_tools.distributed.device import DeviceName, pick_device
from marlin_tools.errors import DataError, counted
from marlin_tools.events import Emit, Event, silent
from marlin_tools.quantized import ActivationType
from marlin_tools.settings import Settings, checked
from marlin_tools.stage import Outlook, Stage, StagePlan, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


COLDEST = 1e-6
"""The least temperature that logits are divided by: with less they overflow."""

_SPEAK_EVERY = 8
"""Tokens between two words about how far it is."""


class GenerateSettings(Settings):
    """How to continue.

    max_new_tokens   at most; the end-of-text token ends earlier
    temperature      0 takes the likeliest token each time; above 0 draws, with `seed`
    backend, activations, device  as in `backends.load`
    """

    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    backend: Annotated[str, checked(check_backend)] = "auto"
    activations: ActivationType | None = None
    device: DeviceName = "auto"

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        if 0 < value < COLDEST:
            raise ValueError(f"from {COLDEST:g} on, or 0 for the likeliest token each time")
        return value


def generate(
    model: str | Path | Checkpoint, prompt: str, settings: GenerateSettings | None = None, *, emit: Emit = silent
) -> str:
    """What the model writes after `prompt`, without the prompt. An empty prompt starts from the BOS token."""
    settings = GenerateSettings() if settings is None else settings
    check_arguments(settings, GenerateSettings, None)
    emit(Event("stage", "generate"))
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise DataError("the prompt is no text in UTF-8", hint="check the terminal's locale, or call `generate` from Python")
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.tokenizer()
    ids = Encoder(tokenizer, "off", checkpoint.text_config["vocab_size"])(prompt)
    if not len(ids):
        if tokenizer.bos_token_id is None:
            raise DataError("the prompt is empty, and the tokenizer has no BOS token to start from", hint="give a `--prompt`")
        ids = torch.tensor([tokenizer.bos_token_id])
    room = int(checkpoint.text_config.get("max_position_embeddings") or len(ids) + settings.max_new_tokens) - len(ids)
    if room < 1:
        raise DataError(
            f"the prompt has {len(ids)} tokens and leaves no room in the model's {len(ids) + room} positions",
            hint="shorten the prompt",
        )
    if room < settings.max_new_tokens:
        emit(Event("note", f"{room} tokens are left to the model, {settings.max_new_tokens} asked for"))
    reads = settings.activations
    loaded = load(checkpoint, device=settings.device, backend=settings.backend, activations=reads, emit=emit)
    new = min(room, settings.max_new_tokens)
    with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        if loaded.device.type == "cuda" and (reason := refusal(loaded, len(ids) + new)) is None:
            written = ids.tolist()
            for token in _decode(Decoder(loaded, 1, len(ids) + new), ids, new, _ends(loaded), settings.temperature):
                written.append(token)
                _tell(len(written) - len(ids), new, emit)
        else:
            if loaded.device.type == "cuda":
                emit(Event("note", f"without a CUDA graph, slowly: {reason}"))
            written = _with_transformers(loaded, ids, new, tokenizer, settings.temperature, emit)
    # Decoded together with the prompt, because some tokenizers drop the space before the first word that they are given.
    parts = written[: len(ids)], written, written[len(ids) :]
    before, whole, alone = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
    text = whole.removeprefix(before) if whole.startswith(before) else alone
    emit(Event("result", counted(len(written) - len(ids), "token"), data={"tokens": len(written) - len(ids)}))
    return text


def _decode(decoder: Decoder, ids: Tensor, new: int, ends: list[int], temperature: float) -> Iterator[int]:
    """Token by token, until one of `ends` or so many."""
    logits = decoder.read(ids[None].to(decoder.device))
    for left in range(new - 1, -1, -1):
        token = torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0] if temperature else logits.argmax(-1)
        yield int(token)
        if not left or int(token) in ends:
            return
        logits = decoder.step(token)


def _tell(done: int, new: int, emit: Emit) -> None:
    """How far it is; an end of text may come before."""
    if done % _SPEAK_EVERY == 0 or done == new:
        emit(Event("progress", "tokens", done, new))


def _with_transformers(
    model: "PreTrainedModel", ids: Tensor, new: int, tokenizer: "PreTrainedTokenizerBase", temperature: float, emit: Emit
) -> list[int]:
    from transformers import GenerationConfig

    def count(written: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        """Called after each token; never ends anything."""
        _tell(written.shape[1] - len(ids), new, emit)
        return torch.zeros(len(written), dtype=torch.bool, device=written.device)

    draws = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    how = GenerationConfig(
        max_new_tokens=new,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(_ends(model)), None),
        **draws,
    )
    model.generation_config = GenerationConfig()  # what the model's file asks for besides would be done, too
    given = ids[None].to(model.device)
    mask = torch.ones_like(given)
    (written,) = model.generate(given, attention_mask=mask, generation_config=how, stopping_criteria=[count]).tolist()
    return list(written)


def _ends(model: "PreTrainedModel") -> list[int]:
    end: int | list[int] | None = model.generation_config.eos_token_id
    return [] if end is None else end if isinstance(end, list) else [end]


class GenerateStage(GenerateSettings, Stage):
    """Continue a text."""

    stage: Literal["generate"] = "generate"
    prompt: str

    def plan(self, outlook: Outlook) -> StagePlan:
        """The prompt."""
        if not outlook.quantized:
            check_activations(outlook.model, self.activations)
        check_place(self.backend, pick_device(self.device))
        return StagePlan((("prompt", self.prompt),))

    def run(self, work: Work) -> dict[str, Any]:
        """Continue it."""
        return {"text": generate(work.model, self.prompt, self, emit=work.emit)}
