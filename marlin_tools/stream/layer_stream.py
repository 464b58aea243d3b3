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
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from marlin_tools.algorithms.hessian import Hessian
from marlin_tools.checkpoint.dequantized import dequantized
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.tokens import TokenSet, chunks_of
from marlin_tools.distributed.team import ALONE, Team
from marlin_tools.families.experts import shell
from marlin_tools.families.family import Branch, Family, turns_by_length
from marlin_tools.families.layout import Layout
from marlin_tools.quantized import rounding_inputs
from marlin_tools.stream.activations import Activations, MemoryBudget
from marlin_tools.stream.branch import BranchWalk, Flow, Observation
from marlin_tools.stream.head import OutputHead
from marlin_tools.stream.read_ahead import ReadAhead, WeightRequest
from marlin_tools.stream.routed import RoutedWalk
from marlin_tools.stream.shortcuts import shorten_norms, shorten_rotations
from marlin_tools.stream.watch import TextShare
from marlin_tools.stream.weights import compute_buffers, fill, materialize, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHUNK_TOKENS = 8192
"""Tokens per forward chunk; chunks never cut a sequence."""


@dataclass
class Group:
    """Linears that read the same tensor: one Hessian (None when the stream carries no activations), one factorisation.

    tokens   how many tokens were sent to this expert, and how many it has seen; None for linears that are no expert's
    """

    names: tuple[str, ...]
    hessian: Hessian | None
    _modules: dict[str, nn.Linear] = field(repr=False)
    _shared: bool
    tokens: tuple[int, int] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the record of each of these linears says besides: of an expert, how many tokens it was sent and has seen."""
        if self.tokens is None:
            return {}
        sent, seen = self.tokens
        return {"tokens": sent, "tokens_seen": seen}

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
        linear = self._modules[name]
        if self._shared:  # the original keeps the old one
            linear.weight = nn.Parameter(torch.empty_like(linear.weight.data), requires_grad=False)
        linear.weight.data.copy_(weight)


class Block:
    """One decoder block with its weights loaded. Exhaust `groups()` or call `skip()` to move the activations past it."""

    def __init__(self, stream: "LayerStream", index: int, module: nn.Module) -> None:
        self.index = index
        self.prefix = stream.family.block_prefix(index)
        self.stream, self.module = stream, module
        self._original: nn.Module | None = None
        if stream.original is not None:  # it shares all weights with the block until they are replaced
            self._original = copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})

    def all_groups(self) -> Iterator[Group]:
        """The groups without Hessians; the activations stay where they are."""
        for names in self.stream.layout.groups(self.index):
            yield self._group(names)

    def linears(self) -> dict[str, nn.Linear]:
        """All that are handed out, by their full names."""
        return {name: self.module.get_submodule(place) for name, place in self._places().items()}  # type: ignore[misc]

    def original_weight(self, name: str) -> Tensor:
        """The weight [N, K] as the original model has it, which must run alongside."""
        assert self._original is not None, "the original model does not run alongside"
        linear: Any = self._original.get_submodule(self._places()[name])
        return linear.weight.data

    def put(self, name: str, linear: nn.Module) -> None:
        """Let this one take a linear's place."""
        self.module.set_submodule(self._places()[name], linear)

    def _places(self) -> dict[str, str]:
        """Where in the module each of these linears is."""
        groups = self.stream.layout.groups(self.index)
        stored = {self.stream.layout.linear(self.index, name): name for names in groups for name in names}
        return {name: place for name, place in stored.items() if name in self.stream.targets}

    def groups(self, *, staged: bool = True) -> Iterator[Group]:
        """The groups in solving order. Unstaged, all Hessians come from the block's original weights (two forwards)."""
        for batch in self.batches(staged=staged):
            yield from batch

    def batches(self, *, staged: bool = True) -> Iterator[list[Group]]:
        """The same as processes solve them: one group, whose rows they share, or experts, of which each has some Hessians."""
        if self.stream.hidden is None:
            yield from ([group] for group in self.all_groups())
        elif staged:
            yield from self._walk(self.stream.hidden)
        else:
            yield from list(self._walk(self.stream.hidden.copy()))
            self.skip(alone=True)

    def skip(self, *, alone: bool = False) -> None:
        """Move the activations past the block as it is now; `alone`, if those of the original model are past it already."""
        if self.stream.hidden is not None:
            deque(self._walk(self.stream.hidden, observe=False, alone=alone), maxlen=0)

    def rerun(self, entering: Activations) -> None:
        """Move the activations past the block once more, from `entering`, with its weights as they are now.

        The original model's activations stay where they are, and `entering` as it is.
        """
        assert self.stream.hidden is not None, "the stream carries no activations"
        for i in range(len(entering)):
            self.stream.hidden[i] = entering[i].clone()
        self.skip(alone=True)

    def pass_beside(self, hidden: Activations, *, rounded: bool) -> None:
        """Move these past the block as it is now; `rounded`: its linears read what FP8 holds of their inputs."""
        with rounding_inputs(self.linears().values() if rounded else ()):
            deque(self._walk(hidden, observe=False, alone=True), maxlen=0)

    def _walk(self, hidden: Activations, *, observe: bool = True, alone: bool = False) -> Iterator[list[Group]]:
        """Advance `hidden` through every branch, stopping where a group's input is ready.

        The original model's activations, if they flow alongside, go through the original weights in step. They wait for nobody:
        what they are inside a branch is seen once, chunk by chunk, and never kept.
        """
        before = None if alone else self._original
        flow = self.stream.flow(self.index, hidden, with_original=before is not None)
        branches = self.stream.layout.branches(self.index)
        reads: tuple[Activations, Activations | None] | None = None
        for branch, following in zip_longest(branches, branches[1:]):
            beside = self.stream.stands_beside(branch)
            if following is not None and self.stream.stands_beside(following):
                reads = hidden.copy(), flow.original.copy() if flow.original is not None else None

            def wanted(names: tuple[str, ...], body: str = branch.body) -> int:
                return len(self._group(tuple(f"{body}.{name}" for name in names)).names) if observe else 0

            for batch in self._walk_of(branch, before, flow, reads if beside else None).steps(wanted):
                if observe:
                    yield [self._seen(branch, batch.pop(0)) for _ in range(len(batch))]
        self._scale(hidden, flow.original)

    def _seen(self, branch: Branch, seen: Observation) -> Group:
        group = self._group(tuple(f"{branch.body}.{name}" for name in seen.names))
        return replace(group, hessian=seen.hessian, tokens=seen.routed)

    def _walk_of(
        self, branch: Branch, before: nn.Module | None, flow: Flow, reads: tuple[Activations, Activations | None] | None
    ) -> BranchWalk | RoutedWalk:
        if branch.experts is not None:
            return RoutedWalk(branch, self.module, before, flow)
        if branch.pre is not None and getattr(self.module, branch.pre) is None:  # it reads what the one beside it reads
            branch = replace(branch, pre=self.stream.family.branches[0].pre)
        return BranchWalk(branch, self.module, before, flow, reads)

    def _scale(self, hidden: Activations, original: Activations | None) -> None:
        """What some models do to the output of a block."""
        if (name := self.stream.layout.family.scalar) is not None:
            scalar: Tensor = getattr(self.module, name)
            for activations in (hidden, original):
                for i in range(len(activations) if activations is not None else 0):
                    activations[i] = activations[i].mul_(scalar)  # type: ignore[index]

    def _group(self, names: tuple[str, ...]) -> Group:
        """The targets among these linears, by their names in the block, unobserved."""
        stored = {self.stream.layout.linear(self.index, name): name for name in names}
        modules: dict[str, nn.Linear] = {
            full: self.module.get_submodule(name)  # type: ignore[misc]
            for full, name in stored.items()
            if full in self.stream.targets
        }
        return Group(tuple(modules), None, modules, self._original is not None)


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it was called with and passes the hidden states on, in a pair if it has to."""

    def __init__(self, block: nn.Module, *, pairs: bool) -> None:
        super().__init__()
        self._pairs = pairs
        self.block_type = getattr(block, "block_type", None)  # by which some decoders choose the mask
        self.context: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *rest: None, **context: Any) -> Tensor | tuple[Tensor, None]:
        assert not any(each is not None for each in rest), "blocks are called with something unknown"
        self.context = context
        return (hidden_states, None) if self._pairs else hidden_states


class LayerStream:
    """Iterate over the decoder blocks of `checkpoint`, feeding them with the team's share of `tokens` (None: weights only).

    `targets` are the full names of the linears to hand out (without `.weight`); all others keep their weights. With
    `with_original` the original model's activations flow alongside, and unless `drift` is set to False, groups are told how far
    their own have moved away from them.
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
        team: Team = ALONE,
    ) -> None:
        self.checkpoint = checkpoint = dequantized(checkpoint)
        self.targets = targets
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else checkpoint.dtype
        self.layout = Layout(checkpoint)
        self.family: Family = self.layout.family
        self.model = shell(checkpoint, self.dtype)
        shorten_norms(self.model, device, self.dtype)
        shorten_rotations(self.model, device, self.dtype)
        self.hidden: Activations | None = None
        self._beside: tuple[Activations, bool] | None = None
        self.room = MemoryBudget()
        self._contexts: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self._decoder = self.model.get_submodule(self.family.decoder)
        self._blocks: nn.ModuleList = getattr(self._decoder, self.family.blocks)
        if tokens is not None:
            parts = [chunks_of(part, chunk_tokens) for part in team.share(tokens.sequences)]
            if tokens.apart:
                first, last = tokens.sequences[: -tokens.apart], tokens.sequences[-tokens.apart :]
                parts = [[*chunks_of(first, chunk_tokens), *chunks_of(last, chunk_tokens)]]
            chunks = [chunk for part in parts for chunk in part]
            part_of = [number for number, part in enumerate(parts) for _ in part]
            self.share = TextShare(team, part_of, tokens.tokens)
            self.room = self._room_for(sum(chunk.numel() for chunk in chunks) * (2 if with_original else 1))
            self.hidden = self._embed(chunks)
        self.original = self.hidden.copy() if self.hidden is not None and with_original else None
        self.drift = with_original

    def __len__(self) -> int:
        return len(self._blocks)

    def look_at(self, count: int, *, rounded: bool) -> None:
        """`logits` will be asked for with so many tokens, of a model whose linears read them `rounded` to FP8 or not.

        Where that or their positions' angles make them other than in their text, they flow once more, alone, through finished
        blocks. Nothing is calibrated on them.
        """
        if self.hidden is not None and (rounded or turns_by_length(self._text)):
            self._beside = self._embed([self.first_tokens[None, :count]]), rounded

    def __iter__(self) -> Iterator[Block]:
        return self.walk(range(len(self)))

    @torch.no_grad()
    def walk(self, order: Sequence[int]) -> Iterator[Block]:
        """The blocks in another order, for those who move activations past them in their own way."""
        with ReadAhead(self._wanted(order), self.checkpoint, self.device, self.dtype) as weights:
            for index in order:
                fill(module := self._blocks[index], next(weights))
                compute_buffers(self._decoder, module, self.device)
                yield (block := Block(self, index, module))
                if self._beside is not None:
                    block.pass_beside(self._beside[0], rounded=self._beside[1])
                module.to("meta")

    def _wanted(self, order: Sequence[int]) -> Iterator[dict[str, WeightRequest]]:
        """The weights of block after block: full names and shapes."""
        for index in order:
            weights = weights_of(self._blocks[index], self.dtype)
            yield {name: WeightRequest(self.layout.weight(index, name), *each) for name, each in weights.items()}

    def flow(self, index: int, hidden: Activations, *, with_original: bool) -> Flow:
        """What the branches of block `index` have in common."""
        original = self.original if with_original else None
        return Flow(hidden, original, self.contexts(index, hidden), self.room, self.share, self.drift, self._multiple)

    def stands_beside(self, branch: Branch) -> bool:
        """Whether a branch reads what the one before it read."""
        return branch.beside is not None and (branch.beside == "always" or bool(getattr(self._text, branch.beside)))

    @property
    def _multiple(self) -> float:
        name = self.family.multiple
        return 1.0 if name is None else float(getattr(self._blocks[0], name))

    def contexts(self, index: int, hidden: Activations) -> list[dict[str, Any]]:
        """What block `index` is called with besides these, chunk by chunk."""
        return [self._contexts[shape[:2]][index] for shape in hidden.shapes()]

    def _room_for(self, tokens: int) -> MemoryBudget:
        """What can stay on the device, from what is free of it, for the residual stream of so many tokens."""
        if self.device.type == "cpu":
            return MemoryBudget()
        free, _ = torch.cuda.mem_get_info(self.device)
        return MemoryBudget.for_sizes(free, tokens * int(self._text.hidden_size) * self.dtype.itemsize)

    @property
    def _text(self) -> "PreTrainedConfig":
        """The settings of the language model, with transformers' defaults."""
        return self.model.config.get_text_config()

    @torch.no_grad()
    def logits(self, count: int) -> tuple[Tensor, Tensor]:
        """After the last block: the first `count` tokens of the first sequence and their logits (float32), for later checks."""
        if self.hidden is None:
            raise ValueError("the stream carries no activations")
        seen = self._beside[0] if self._beside else self.hidden
        return self.first_tokens[:count], self.head()(seen[0][0, :count]).cpu()

    def head(self) -> OutputHead:
        """What follows the last block, with its weights."""
        norm = getattr(self._decoder, self.family.norm)
        materialize(norm, f"{self._stored}.{self.family.norm}.", self.checkpoint, self.device, self.dtype)
        head, bias = (f"{self.family.head}.{kind}" for kind in ("weight", "bias"))
        weight = self.checkpoint.read(head if head in self.checkpoint else self._embedding_name).to(self.device, self.dtype)
        added = self.checkpoint.read(bias) if self.model.get_output_embeddings().bias is not None else None
        return OutputHead(norm, weight, added, *self.family.head_numbers(self.model.config))

    @property
    def _stored(self) -> str:
        """What the names of the decoder's tensors begin with."""
        return self.family.stored or self.family.decoder

    @property
    def _embedding_name(self) -> str:
        return f"{self._stored}.{self.family.embedding}.weight"

    @torch.no_grad()
    def _embed(self, chunks: list[Tensor]) -> Activations:
        """Run the model's own forward with recorders for blocks: gives the first hidden states and every block's context."""
        before = [name for name, _ in self._decoder.named_children() if name not in {self.family.blocks, self.family.norm}]
        for name in before:
            module = getattr(self._decoder, name)
            materialize(module, f"{self._stored}.{name}.", self.checkpoint, self.device, self.dtype)
            if hasattr(module, "scalar_embed_scale"):  # a buffer that is not in the checkpoint
                module.embed_scale = torch.tensor(module.scalar_embed_scale, device=self.device)
        for name in ("rotary_emb", "pos_emb"):
            if (rotary := getattr(self._decoder, name, None)) is not None:
                setattr(self._decoder, name, type(rotary)(rotary.config).to(self.device))
        several: Any = getattr(self._decoder, "rotary_embs", ())
        for i, rotary in enumerate(several):
            several[i] = type(rotary)(rotary.config).to(self.device)
        recorders = [_Recorder(block, pairs=self.family.pairs) for block in self._blocks]
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
        getattr(self._decoder, self.family.embedding).to("meta")
        return hidden
