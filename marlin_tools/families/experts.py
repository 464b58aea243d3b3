"""Experts as modules of our own: three linears each, in the place of transformers' tensors that hold all experts of a block.

Those without a gate have two. As linears they are observed, replaced and quantised like all others, and a backend gives each
its kernel. What they compute is what transformers computes in eager mode: the gating is its own code, and the sums are in the
same order.

A GPU computes an expert's few tokens faster than Python starts the kernels for them, so there experts that are called about as
often are computed side by side, as long as they are plain linears. Others are computed one by one.
"""

import types
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import skeleton
from marlin_tools.families import known_family
from marlin_tools.families.family import Family
from marlin_tools.families.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Look = Callable[[Tensor, Tensor, Tensor], None]
"""Told what experts are called with: (tokens [T, H], who is called [T, top k], with which weight [T, top k])."""

_SIDE_BY_SIDE = 512 << 20
"""Bytes that experts side by side may take: their weights once more, and what they read and put out."""

_FEWEST = 64
"""Rows that an expert on a GPU is given at least."""


class Expert(nn.Module):
    """One feed-forward network."""

    def __init__(self, hidden: int, inner: int, *, bias: bool, gated: bool, dtype: torch.dtype) -> None:
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=bias, dtype=dtype)


class SplitExperts(nn.Module):
    """All experts of a block, numbered. `scales_inputs`: a token's weight multiplies what an expert reads, not its output."""

    def __init__(self, fused: nn.Module, sizes: tuple[int, int, int], *, bias: bool, scales_inputs: bool = False) -> None:
        super().__init__()
        count, hidden, inner = sizes
        dtype = next(fused.parameters()).dtype
        self._gated = hasattr(fused, "gate_up_proj")
        for number in range(count):
            self.add_module(str(number), Expert(hidden, inner, bias=bias, gated=self._gated, dtype=dtype))
        self.count, self.scales_inputs = count, scales_inputs
        self.act_fn: Any = None
        self._interleaved = not getattr(fused, "is_concatenated", True)
        for name in ("act_fn", "alpha", "limit"):
            if hasattr(fused, name):
                setattr(self, name, getattr(fused, name))
        own = getattr(type(fused), "_apply_gate", None)
        self._gate = types.MethodType(own, self) if own is not None else self._usual_gate
        self.look: Look | None = None

    def expert(self, number: int) -> Expert:
        """One of them."""
        expert = self.get_submodule(str(number))
        assert isinstance(expert, Expert)
        return expert

    @property
    def _plain(self) -> bool:
        """Whether all are linears with weights and nothing else, which can be multiplied side by side."""
        return all(
            type(linear) is nn.Linear and not linear._forward_pre_hooks and not linear._forward_hooks  # noqa: SLF001
            for expert in self.children()
            for linear in expert.children()
        )

    def bundles(self, counts: Sequence[int], *, on_gpu: bool) -> Iterator[tuple[list[int], int]]:
        """The experts that have rows to read, some side by side, and how many rows each is given: no fewer than it has.

        Where nothing is gained, each has its own. On a GPU there are few different sizes: cuBLAS takes longer to choose a
        kernel for a product that it has not seen than to compute it.
        """
        called = [number for number, count in enumerate(counts) if count]
        if not (on_gpu and self._plain):
            yield from (([number], counts[number]) for number in called)
            return
        alike: dict[int, list[int]] = {}
        for number in called:
            alike.setdefault(_rounded_up(counts[number]), []).append(number)
        weight = self.expert(0).up_proj.weight
        inner, hidden = weight.shape
        for rows, numbers in alike.items():
            each = weight.element_size() * (3 * inner * hidden + rows * (2 * hidden + 5 * inner))
            most, start = max(1, _SIDE_BY_SIDE // each), 0
            while start < len(numbers):
                count = 1 << min(most, len(numbers) - start).bit_length() - 1
                yield numbers[start : start + count], rows
                start += count

    def handed_out(
        self, entries: Tensor, counts: Sequence[int], wanted: Container[int] | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Bundles of experts, of those that are wanted, each with its entries [experts, rows], padded with any others.

        `entries` has `counts` of them for one expert after the other.
        """
        asked = [count if wanted is None or number in wanted else 0 for number, count in enumerate(counts)]
        bundles = list(self.bundles(asked, on_gpu=entries.is_cuda))
        starts = [0, *accumulate(counts)]
        firsts = [starts[number] for numbers, _ in bundles for number in numbers]
        first = torch.tensor(firsts, dtype=torch.long, device=entries.device)  # one copy for all bundles
        for (numbers, rows), own in zip(bundles, first.split([len(numbers) for numbers, _ in bundles]), strict=True):
            places = own[:, None] + torch.arange(rows, device=entries.device)
            yield numbers, entries[places.clamp_(max=len(entries) - 1)]

    def gated(self, numbers: Sequence[int], x: Tensor) -> Tensor:
        """What the down projections of a bundle of experts read; x [experts, rows, H]."""
        if not self._gated:
            bent: Tensor = self.act_fn(self._multiply("up_proj", numbers, x))
            return bent
        pair = self._multiply("gate_proj", numbers, x), self._multiply("up_proj", numbers, x)
        both = torch.stack(pair, dim=-1).flatten(-2) if self._interleaved else torch.cat(pair, dim=-1)
        gated: Tensor = self._gate(both)
        return gated

    def _multiply(self, name: str, numbers: Sequence[int], x: Tensor) -> Tensor:
        """One projection of each expert, of its own rows."""
        linears: list[Any] = [getattr(self.expert(number), name) for number in numbers]
        if len(linears) == 1:
            out: Tensor = linears[0](x[0])
            return out[None]
        weight = torch.stack([linear.weight for linear in linears]).mT
        if linears[0].bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(torch.stack([linear.bias for linear in linears])[:, None], x, weight)

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each token through the experts that were chosen for it."""
        total = torch.zeros_like(hidden_states)
        if self.look is not None:
            self.look(hidden_states, chosen, weights)
            return total
        calls = chosen.flatten()
        order = calls.argsort(stable=True)  # expert after expert
        out = torch.empty(len(order), hidden_states.shape[-1], dtype=total.dtype, device=total.device)
        counts = torch.bincount(calls, minlength=self.count).tolist()
        starts = [0, *accumulate(counts)]
        for numbers, mine in self.handed_out(order, counts):
            x, weight = hidden_states[mine // chosen.shape[1]], weights.flatten()[mine, None]
            x = self._multiply("down_proj", numbers, self.gated(numbers, x * weight if self.scales_inputs else x))
            x = x if self.scales_inputs else x * weight
            for number, own in zip(numbers, x, strict=True):
                out[starts[number] : starts[number + 1]] = own[: counts[number]]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        for places in place.view(chosen.shape).sort(dim=1).values.T:  # a token's experts by their numbers
            total += out[places]
        return total

    def _usual_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        gated: Tensor = up * self.act_fn(gate)
        return gated


def _rounded_up(rows: int) -> int:
    """To one of four sizes between two powers of two."""
    step = max(_FEWEST, (1 << (rows - 1).bit_length()) // 8)
    return -(-rows // step) * step


class InputWeightedExperts(nn.Module):
    """Llama 4's mixture: what an expert reads is multiplied by the router's score.

    transformers computes all experts. Here only those that were chosen are: the others read zeros and put out zeros.
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.router: Any = whole.router
        self.experts: Any = whole.experts
        self.shared_expert: Any = whole.shared_expert
        self.top_k: Any = whole.top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs and the router's logits, as the original gives them."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(tokens)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        out: Tensor = self.shared_expert(tokens) + self.experts(tokens, chosen, weights)
        return out, logits


def split_experts(model: nn.Module, family: Family) -> None:
    """Put experts of our own in the place of a model's, which has no weights yet."""
    for branch in family.branches:
        if branch.experts is None:
            continue
        blocks: Any = getattr(model.get_submodule(family.decoder), family.blocks)
        for block in blocks:
            body: Any = getattr(block, branch.body, None)
            fused = getattr(body, "experts", None)
            if isinstance(fused, nn.Module) and (hasattr(fused, "gate_up_proj") or hasattr(fused, "up_proj")):
                turned = bool(getattr(fused, "is_transposed", branch.experts.transposed))  # the module, not what is stored
                own = _split(fused, transposed=turned, scales_inputs=not hasattr(fused, "_apply_gate"))
                body.experts = own
                if isinstance(bias := getattr(body, "expert_bias", None), nn.Parameter):
                    del body.expert_bias
                    body.register_buffer("expert_bias", bias.data)  # what corrects a router keeps the type that is stored
                if own.scales_inputs:
                    setattr(block, branch.body, InputWeightedExperts(body))


def _split(fused: nn.Module, *, transposed: bool, scales_inputs: bool) -> SplitExperts:
    down: Any = fused.down_proj
    count, hidden, inner = (down.shape[0], down.shape[2], down.shape[1]) if transposed else down.shape
    with torch.device("meta"):
        own = SplitExperts(fused, (count, hidden, inner), bias=hasattr(fused, "down_proj_bias"), scales_inputs=scales_inputs)
    return own.eval()


def shell(checkpoint: Checkpoint, dtype: torch.dtype) -> "PreTrainedModel":
    """The model of config.json without weights, with experts of our own; as transformers makes it for a family not known."""
    family = known_family(checkpoint.config)
    model = skeleton(checkpoint, dtype, eager=family is not None and family.eager)
    if family is not None:
        split_experts(model, family)
    return model


def stored_shapes(layout: Layout, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the language model (a `shell`) has when its experts are stored one by one.

    What is tied is stored under one of its names, or under all.
    """
    tied: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), {})[layout.place(name).tensor] = tuple(tensor.shape)
    shapes: dict[str, tuple[int, ...]] = {}
    for same in tied.values():
        there = {name: shape for name, shape in same.items() if name in layout.checkpoint}
        shapes |= there or dict([next(iter(same.items()))])
    return shapes
