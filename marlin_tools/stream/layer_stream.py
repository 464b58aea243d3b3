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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from marlin_tools.algorithms.hessian import Hessian
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import skeleton
from marlin_tools.data.tokens import TokenSet, chunks_of
from marlin_tools.distributed.crew import ALONE, Crew
from marlin_tools.families import Branch, Family, find_family
from marlin_tools.stopwatch import span
from marlin_tools.stream.activations import Activations, Room
from marlin_tools.stream.branch import BranchWalk, Flow, Share
from marlin_tools.stream.read_ahead import ReadAhead, read_weights
from marlin_tools.stream.shortcuts import shorten_norms

CHUNK_TOKENS = 8192
"""Tokens per forward chunk; chunks never cut a sequence."""


def materialize(module: nn.Module, prefix: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Give a meta module its weights from the checkpoint, in place."""
    shapes = {prefix + name: parameter.shape for name, parameter in module.named_parameters()}
    fill(module, read_weights(checkpoint, shapes, device, dtype))


def fill(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Make these tensors the weights of a module; they come in the order of its parameters."""
    for (name, _), weight in zip(list(module.named_parameters()), weights.values(), strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


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

    def rows(self) -> Iterator[tuple[str, slice]]:
        """Where each linear's rows lie in `stacked`."""
        start = 0
        for name in self.names:
            stop = start + len(self.weight(name))
            yield name, slice(start, stop)
            start = stop

    def replace(self, name: str, weight: Tensor) -> None:
        """From here on the stream computes with `weight`."""
        self._modules[name].weight.data.copy_(weight)


class Block:
    """One decoder block with its weights loaded. Exhaust `groups()` or call `skip()` to move the activations past it."""

    def __init__(self, stream: "LayerStream", index: int, module: nn.Module) -> None:
        self.index = index
        self.prefix = stream.family.block_prefix(index)
        self.stream, self.module = stream, module
        self._original = copy.deepcopy(module) if stream.original is not None else None

    def all_groups(self) -> Iterator[Group]:
        """The groups without Hessians; the activations stay where they are."""
        for branch in self.stream.family.branches:
            yield self._group(branch, branch.entry)
            yield self._group(branch, (branch.exit,))

    def groups(self, *, staged: bool = True) -> Iterator[Group]:
        """The groups in solving order. Unstaged, all Hessians come from the block's original weights (two forwards)."""
        if self.stream.hidden is None:
            yield from self.all_groups()
        elif staged:
            yield from self._walk(self.stream.hidden)
        else:
            yield from list(self._walk(self.stream.hidden.copy()))
            self.skip()

    def skip(self) -> None:
        """Move the activations past the block as it is now."""
        if self.stream.hidden is not None:
            for _ in self._walk(self.stream.hidden, observe=False):
                pass

    def rerun(self, entering: Activations) -> None:
        """Move the activations past the block once more, from `entering`, with its weights as they are now.

        The original model's activations stay where they are.
        """
        assert self.stream.hidden is not None, "the stream carries no activations"
        for i in range(len(entering)):
            self.stream.hidden[i] = entering[i]
        original, self._original = self._original, None
        self.skip()
        self._original = original

    def _walk(self, hidden: Activations, *, observe: bool = True) -> Iterator[Group]:
        """Advance `hidden` through every branch, stopping where a group's input is ready.

        The original model's activations, if they flow alongside, go through the original weights in step. They wait for nobody:
        what they are inside a branch is seen once, chunk by chunk, and never kept.
        """
        flow = self.stream.flow(self.index)
        for branch in self.stream.family.branches:
            walk = BranchWalk(branch, self.module, self._original, hidden, flow)
            entry, exit_ = self._group(branch, branch.entry), self._group(branch, (branch.exit,))
            with span("forward"):
                hessian = walk.enter(observed=observe and bool(entry.names))
            if observe:
                yield replace(entry, hessian=hessian)
            del hessian
            with span("forward"):
                hessian = walk.advance(observed=observe and bool(exit_.names))
            if observe:
                yield replace(exit_, hessian=hessian)
            del hessian
            with span("forward"):
                walk.close()

    def _group(self, branch: Branch, names: tuple[str, ...]) -> Group:
        """The targets among `names`, unobserved."""
        body = self.module.get_submodule(branch.body)
        full_names = {f"{self.prefix}{branch.body}.{name}": name for name in names}
        modules: dict[str, nn.Linear] = {
            full: body.get_submodule(name)  # type: ignore[misc]
            for full, name in full_names.items()
            if full in self.stream.targets
        }
        return Group(tuple(modules), None, modules)


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it was called with and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.context: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.context = context
        return hidden_states


class LayerStream:
    """Iterate over the decoder blocks of `checkpoint`, feeding them with the crew's share of `tokens` (None: weights only).

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
        chunk_tokens: int = CHUNK_TOKENS,
        crew: Crew = ALONE,
    ) -> None:
        self.checkpoint = checkpoint
        self.targets = targets
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else checkpoint.dtype
        self.family: Family = find_family(checkpoint.config)
        self.model = skeleton(checkpoint, self.dtype)
        shorten_norms(self.model, device, self.dtype)
        self.hidden: Activations | None = None
        self.room = Room()
        self._contexts: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self._decoder = self.model.get_submodule(self.family.decoder)
        self._blocks: nn.ModuleList = getattr(self._decoder, self.family.blocks)
        if tokens is not None:
            parts = [chunks_of(part, chunk_tokens) for part in crew.share(tokens.sequences)]
            chunks = [chunk for part in parts for chunk in part]
            part_of = [number for number, part in enumerate(parts) for _ in part]
            self._share = Share(crew, part_of, tokens.tokens)
            self.room = self._room_for(sum(chunk.numel() for chunk in chunks) * (2 if with_original else 1))
            self.hidden = self._embed(chunks)
        self.original = self.hidden.copy() if self.hidden is not None and with_original else None

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        with ReadAhead(self._wanted(), self.checkpoint, self.device, self.dtype) as weights:
            for index, module in enumerate(self._blocks):
                fill(module, next(weights))
                yield Block(self, index, module)
                module.to("meta")

    def _wanted(self) -> Iterator[dict[str, torch.Size]]:
        """The weights of block after block: full names and shapes."""
        for index, module in enumerate(self._blocks):
            prefix = self.family.block_prefix(index)
            yield {prefix + name: parameter.shape for name, parameter in module.named_parameters()}

    def flow(self, index: int) -> Flow:
        """What the branches of block `index` have in common."""
        return Flow(self.original, self.contexts(index), self.room, self._share)

    def contexts(self, index: int) -> list[dict[str, Any]]:
        """What block `index` is called with, chunk by chunk."""
        assert self.hidden is not None, "the stream carries no activations"
        return [self._contexts[shape[:2]][index] for shape in self.hidden.shapes()]

    def _room_for(self, tokens: int) -> Room:
        """What can stay on the device, from what is free of it, for the residual stream of so many tokens."""
        if self.device.type == "cpu":
            return Room()
        free, _ = torch.cuda.mem_get_info(self.device)
        return Room.for_sizes(free, tokens * self._width * self.dtype.itemsize)

    @property
    def _width(self) -> int:
        return int(self.checkpoint.config["hidden_size"])

    @torch.no_grad()
    def logits(self, count: int) -> tuple[Tensor, Tensor]:
        """After the last block: the first `count` tokens of the first sequence and their logits (float32), for later checks."""
        if self.hidden is None:
            raise ValueError("the stream carries no activations")
        norm = getattr(self._decoder, self.family.norm)
        materialize(norm, f"{self.family.decoder}.{self.family.norm}.", self.checkpoint, self.device, self.dtype)
        head = f"{self.family.head}.weight"
        weight = self.checkpoint.read(head if head in self.checkpoint else self._embedding_name).to(self.device, self.dtype)
        logits = (norm(self.hidden[0][0, :count]) @ weight.T).float()
        cap = self.checkpoint.config.get("final_logit_softcapping")
        return self.first_tokens[:count], (torch.tanh(logits / cap) * cap if cap else logits).cpu()

    @property
    def _embedding_name(self) -> str:
        return f"{self.family.decoder}.{self.family.embedding}.weight"

    @torch.no_grad()
    def _embed(self, chunks: list[Tensor]) -> Activations:
        """Run the model's own forward with recorders for blocks: gives the first hidden states and every block's context."""
        embedding = getattr(self._decoder, self.family.embedding)
        scale = getattr(embedding, "embed_scale", None)
        materialize(embedding, self._embedding_name.removesuffix("weight"), self.checkpoint, self.device, self.dtype)
        if scale is not None:  # a buffer that is not in the checkpoint
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=self.device)
        rotary = self._decoder.rotary_emb
        self._decoder.rotary_emb = type(rotary)(rotary.config).to(self.device)
        recorders = [_Recorder() for _ in self._blocks]
        norm = getattr(self._decoder, self.family.norm)
        setattr(self._decoder, self.family.blocks, nn.ModuleList(recorders))
        setattr(self._decoder, self.family.norm, nn.Identity())
        self.first_tokens = chunks[0][0]
        hidden = Activations(self.device, on_device=self.room.residual)
        for chunk in chunks:
            output = self._decoder(input_ids=chunk.to(self.device), use_cache=False)
            hidden.append(output.last_hidden_state)
            contexts = [{k: v for k, v in recorder.context.items() if k != "past_key_values"} for recorder in recorders]
            self._contexts.setdefault(tuple(chunk.shape), contexts)
        setattr(self._decoder, self.family.blocks, self._blocks)
        setattr(self._decoder, self.family.norm, norm)
        embedding.to("meta")
        return hidden
