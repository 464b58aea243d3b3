"""The model as a stream of decoder blocks, one resident at a time, with the calibration activations flowing through them.

    for block in LayerStream(checkpoint, tokens, ...):
        for group in block.groups():            # q/k/v, then o, then gate/up, then down
            group.hessian                       # what the input of these linears looks like
            group.replace(name, new_weight)     # what later groups and blocks shall see

The forward is *staged*: a block is walked branch by branch, each branch up to the linear that closes it, so that o is
calibrated on the outputs of the already replaced q, k and v, for the price of about one forward. What a block is called with
(masks, rotary embeddings, scaled embeddings) is recorded from the model's own forward with its blocks swapped for recorders;
nothing of it is rebuilt here, so every family that transformers can run comes out right.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from marlin_tools.algorithms.hessian import Drift, Gram, Hessian
from marlin_tools.checkpoint import Checkpoint
from marlin_tools.data.tokens import TokenSet
from marlin_tools.families import Branch, Family, find_family
from marlin_tools.skeleton import read_weight, skeleton

CHUNK_TOKENS = 8192
"""Tokens per forward chunk; chunks never cut a sequence."""


def materialise(module: nn.Module, prefix: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Give a meta module its weights from the checkpoint, in place."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        parameter.data.copy_(read_weight(checkpoint, prefix + name, parameter.shape).to(dtype))
        parameter.requires_grad_(False)  # noqa: FBT003 (torch's own signature)


@dataclass
class Group:
    """Linears that read the same tensor: one Hessian (None when the stream carries no activations), one factorisation."""

    names: tuple[str, ...]
    hessian: Hessian | None
    _modules: dict[str, nn.Linear] = field(repr=False)

    def weight(self, name: str) -> Tensor:
        """The weight [N, K] as it is now."""
        return self._modules[name].weight.data

    def stacked(self) -> Tensor:
        """All weights of the group under each other: rows are independent, so they are solved in one go."""
        return torch.cat([self.weight(name) for name in self.names])

    def replace(self, name: str, weight: Tensor) -> None:
        """From here on the stream computes with `weight`."""
        self._modules[name].weight.data.copy_(weight)


class Block:
    """One decoder block with its weights loaded. Exhaust `groups()` or call `skip()` to move the activations past it."""

    def __init__(self, stream: "LayerStream", index: int, module: nn.Module) -> None:
        self.index = index
        self.prefix = stream.family.block_prefix(index)
        self._stream = stream
        self._module = module
        self._original = copy.deepcopy(module) if stream.original is not None else None

    def all_groups(self) -> Iterator[Group]:
        """The groups without Hessians; the activations stay where they are."""
        for branch in self._stream.family.branches:
            yield self._group(branch, branch.entry, None)
            yield self._group(branch, (branch.exit,), None)

    def groups(self, *, staged: bool = True) -> Iterator[Group]:
        """The groups in solving order. Unstaged, all Hessians come from the block's original weights (two forwards)."""
        if self._stream.hidden is None:
            yield from self.all_groups()
        elif staged:
            yield from self._walk(self._stream.hidden)
        else:
            yield from list(self._walk([hidden.clone() for hidden in self._stream.hidden]))
            self.skip()

    def skip(self) -> None:
        """Move the activations past the block as it is now."""
        if self._stream.hidden is not None:
            for _ in self._walk(self._stream.hidden, observe=False):
                pass

    def _walk(self, hidden: list[Tensor], *, observe: bool = True) -> Iterator[Group]:
        """Advance `hidden` in place through every branch, stopping where a group's input is ready.

        The original model's activations, if they flow alongside, go through the original weights in step.
        """
        original = self._stream.original
        for branch in self._stream.family.branches:
            contexts = self._stream.contexts(self.index)
            now = _Path(self._module, branch, hidden, contexts)
            before = _Path(self._original, branch, original, contexts) if self._original and original else None
            if observe:
                yield self._group(branch, branch.entry, _observe(now.entering(), before.entering() if before else None))
            now.advance()
            if before:
                before.advance()
            if observe:
                residual = (hidden, original) if original and branch.post is None else None
                yield self._group(branch, (branch.exit,), _observe(now.inner, before.inner if before else None, residual))
            now.close()
            if before:
                before.close()

    def _group(self, branch: Branch, names: tuple[str, ...], observation: Iterator[Hessian] | None) -> Group:
        """The targets among `names`; nothing is observed when there are none."""
        body = self._module.get_submodule(branch.body)
        full_names = {f"{self.prefix}{branch.body}.{name}": name for name in names}
        modules: dict[str, nn.Linear] = {
            full: body.get_submodule(name)  # type: ignore[misc]
            for full, name in full_names.items()
            if full in self._stream.targets
        }
        return Group(tuple(modules), next(observation) if modules and observation else None, modules)


class _Path:
    """The activations of one model on their way through one branch."""

    def __init__(self, block: nn.Module, branch: Branch, hidden: list[Tensor], contexts: list[dict[str, Any]]) -> None:
        self._pre = block.get_submodule(branch.pre)
        self._post = block.get_submodule(branch.post) if branch.post else nn.Identity()
        self._body, self._branch, self._contexts = block.get_submodule(branch.body), branch, contexts
        self.hidden = hidden
        self.inner: list[Tensor] = []

    def entering(self) -> Iterator[Tensor]:
        """What the entry linears read, chunk by chunk."""
        return (self._pre(h) for h in self.hidden)

    def advance(self) -> None:
        """Compute what the closing linear reads: the body with its closing linear bypassed."""
        closing = self._body.get_submodule(self._branch.exit)
        setattr(self._body, self._branch.exit, nn.Identity())
        if self._branch.attends:
            outputs = (
                self._body(hidden_states=x, **context)[0] for x, context in zip(self.entering(), self._contexts, strict=True)
            )
        else:
            outputs = (self._body(x) for x in self.entering())
        self.inner = list(outputs)
        setattr(self._body, self._branch.exit, closing)

    def close(self) -> None:
        """Add the branch's output to the residual stream, in place."""
        closing = self._body.get_submodule(self._branch.exit)
        for h, x in zip(self.hidden, self.inner, strict=True):
            h.add_(self._post(closing(x)))


def _observe(
    inputs: Iterable[Tensor], originals: Iterable[Tensor] | None, residual: tuple[list[Tensor], list[Tensor]] | None = None
) -> Iterator[Hessian]:
    """One Hessian over all chunks, with the drift from the original activations where they are known. Runs when asked."""
    gram: Gram | None = None
    drift_x: Tensor | None = None
    drift_h: Tensor | None = None
    before = iter(originals) if originals is not None else None
    for index, x in enumerate(inputs):
        gram = gram or Gram(x.shape[-1], x.device)
        gram.add(x)
        if before is not None:
            drift_x = _add(drift_x, next(before) - x, x)
        if residual is not None:
            drift_h = _add(drift_h, residual[1][index] - residual[0][index], x)
    assert gram is not None, "no activations"
    drift = None if drift_x is None else Drift(drift_x / gram.tokens, None if drift_h is None else drift_h / gram.tokens)
    yield gram.hessian(drift)


def _add(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """The sum so far plus leftᵀ right over all tokens, in float32."""
    product = left.flatten(0, -2).float().T @ right.flatten(0, -2).float()
    return product if total is None else total.add_(product)


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it was called with and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.context: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.context = context
        return hidden_states


class LayerStream:
    """Iterate over the decoder blocks of `checkpoint`, feeding them with `tokens` (None: weights only).

    `targets` are the full names of the linears to hand out (without `.weight`); all others keep their weights. With
    `with_original` the original model's activations flow alongside, so that the drift between the two can be seen.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: TokenSet | None,
        targets: frozenset[str],
        device: torch.device,
        *,
        with_original: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.targets = targets
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else checkpoint.dtype
        self.family: Family = find_family(checkpoint.config)
        self.model = skeleton(checkpoint, self.dtype)
        self.hidden: list[Tensor] | None = None
        self._contexts: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self._decoder = self.model.get_submodule(self.family.decoder)
        self._blocks: nn.ModuleList = getattr(self._decoder, self.family.blocks)
        if tokens is not None:
            self.hidden = self._embed(tokens.chunks(CHUNK_TOKENS))
        self.original = [h.clone() for h in self.hidden] if self.hidden is not None and with_original else None

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        for index in range(len(self._blocks)):
            module = self._blocks[index]
            materialise(module, self.family.block_prefix(index), self.checkpoint, self.device, self.dtype)
            yield Block(self, index, module)
            module.to("meta")

    def contexts(self, index: int) -> list[dict[str, Any]]:
        """What block `index` is called with, chunk by chunk."""
        return [self._contexts[tuple(h.shape[:2])][index] for h in self.hidden or ()]

    @torch.no_grad()
    def logits(self, count: int) -> tuple[Tensor, Tensor]:
        """After the last block: the first `count` tokens of the first sequence and their logits (float32), for later checks."""
        if self.hidden is None:
            raise ValueError("the stream carries no activations")
        norm = getattr(self._decoder, self.family.norm)
        materialise(norm, f"{self.family.decoder}.{self.family.norm}.", self.checkpoint, self.device, self.dtype)
        head = f"{self.family.head}.weight"
        weight = self.checkpoint.read(head if head in self.checkpoint else self._embedding_name).to(self.device, self.dtype)
        logits = (norm(self.hidden[0][0, :count]) @ weight.T).float()
        cap = self.checkpoint.config.get("final_logit_softcapping")
        return self.first_tokens[:count], (torch.tanh(logits / cap) * cap if cap else logits).cpu()

    @property
    def _embedding_name(self) -> str:
        return f"{self.family.decoder}.{self.family.embedding}.weight"

    @torch.no_grad()
    def _embed(self, chunks: list[Tensor]) -> list[Tensor]:
        """Run the model's own forward with recorders for blocks: gives the first hidden states and every block's context."""
        embedding = getattr(self._decoder, self.family.embedding)
        scale = getattr(embedding, "embed_scale", None)
        materialise(embedding, self._embedding_name.removesuffix("weight"), self.checkpoint, self.device, self.dtype)
        if scale is not None:  # a buffer that is not in the checkpoint
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=self.device)
        rotary = self._decoder.rotary_emb
        self._decoder.rotary_emb = type(rotary)(rotary.config).to(self.device)
        recorders = [_Recorder() for _ in self._blocks]
        norm = getattr(self._decoder, self.family.norm)
        setattr(self._decoder, self.family.blocks, nn.ModuleList(recorders))
        setattr(self._decoder, self.family.norm, nn.Identity())
        self.first_tokens = chunks[0][0]
        hidden = []
        for chunk in chunks:
            output = self._decoder(input_ids=chunk.to(self.device), use_cache=False)
            hidden.append(output.last_hidden_state)
            contexts = [{k: v for k, v in recorder.context.items() if k != "past_key_values"} for recorder in recorders]
            self._contexts.setdefault(tuple(chunk.shape), contexts)
        setattr(self._decoder, self.family.blocks, self._blocks)
        setattr(self._decoder, self.family.norm, norm)
        embedding.to("meta")
        return hidden
