"""Which tensor of a checkpoint is which weight of the model.

A weight reference is the name of a stored tensor and a slice of it: all of it for a plain linear, a part of one expert's
matrix where a tensor holds all experts. Everything that reads, replaces or counts weights goes by references, so that a plain
linear, a linear of a nested model and one projection of one expert are the same to it.

Linears have two names: that of the module, relative to the block, and that under which a checkpoint stores it. They differ
where the language model is part of a larger one, and where experts are stored under other names than the modules have.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marlin_tools.checkpoint.contract import CALLED, COMPUTED, EXPERTS
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import MISMATCH, some
from marlin_tools.errors import ModelError
from marlin_tools.families import NESTED, find_family, known_family
from marlin_tools.families.family import Branch, Experts, Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DECODERS = ("model.language_model", "language_model.model", "model.text_model", "model", "language_model", "thinker.model")
"""What the names of a language model's tensors begin with, where it is part of a larger one."""

_HEADS = ("lm_head", "language_model.lm_head", "thinker.lm_head", "embed_out")

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class WeightRef:
    """A tensor of a checkpoint, or a slice of it, turned if it is stored [K, N]."""

    tensor: str
    index: Index = ()
    turned: bool = False

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The weight, in memory of its own."""
        stored = checkpoint.read(self.tensor)
        return stored if self.whole else self.take(stored).clone(memory_format=torch.contiguous_format)

    @property
    def whole(self) -> bool:
        """Whether it is the stored tensor as it is."""
        return not self.index and not self.turned

    def take(self, stored: Tensor) -> Tensor:
        """The weight, a view of the stored tensor."""
        part = stored[self.index] if self.index else stored
        return part.transpose(-1, -2) if self.turned else part

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """The shape of the weight, from the header alone."""
        stored = checkpoint.shape(self.tensor)
        if self.whole:
            return stored
        if len(stored) < len(self.index):
            raise ModelError(f"`{self.tensor}` has shape {list(stored)}, not one matrix for each expert", hint=MISMATCH)
        return tuple(self.take(torch.empty(stored, device="meta")).shape)


class Layout:
    """The weights of the blocks of a model, by the names that its modules have and by those that they are stored under."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config: dict[str, Any] = checkpoint.text_config
        self.family: Family = family_of(checkpoint)
        self.blocks = int(self.config.get("num_hidden_layers", 0))
        self._chosen: dict[int, tuple[Branch, ...]] = {}
        self._counts: dict[tuple[int, str], int] = {}

    @cached_property
    def _modules(self) -> frozenset[str]:
        """Everything that has tensors: what their names begin with."""
        names = self.checkpoint.names()
        return frozenset({part for name in names for part in _beginnings(name)} | set(names))

    def branches(self, index: int) -> tuple[Branch, ...]:
        """The branches that block `index` has."""
        if index not in self._chosen:
            prefix = self.family.block_prefix(index)
            self._chosen[index] = self.family.chosen(lambda name: self._stored(prefix + self._renamed(name)))
        return self._chosen[index]

    def has(self, index: int, name: str) -> bool:
        """Whether block `index` has a module of this name."""
        return self._stored(self.linear(index, name))

    def _stored(self, name: str) -> bool:
        return name in self._modules

    def experts(self, index: int, branch: Branch) -> int:
        """How many experts a branch of block `index` has, by its tensors and by config.json."""
        if branch.experts is None:
            return 0
        if (index, branch.body) not in self._counts:
            self._counts[index, branch.body] = self._count(index, branch, branch.experts)
        return self._counts[index, branch.body]

    def _count(self, index: int, branch: Branch, experts: Experts) -> int:
        prefix = f"{self.family.block_prefix(index)}{self._renamed(f'{branch.body}.experts')}"
        asked = next((int(self.config[key]) for key in EXPERTS if self.config.get(key)), 0)
        if (together := self._together(index, branch)) is not None:
            found = self.checkpoint.shape(together[0])[0]
        else:
            found = next(number for number in range(len(self._modules)) if f"{prefix}.{number}" not in self._modules)
        if found != asked:
            raise ModelError(f"`{prefix}` holds {found} experts, config.json asks for {asked}", hint=MISMATCH)
        return found

    def _together(self, index: int, branch: Branch) -> tuple[str, str] | None:
        """The tensors in which gate and up, and down, of all experts of a branch lie, if there are such."""
        if branch.experts is None or not branch.experts.gated:
            return None
        body = self.family.block_prefix(index) + self._renamed(branch.body)
        gate_up, down = (f"{body}.{name}" for name in branch.experts.together)
        return (gate_up, down) if gate_up in self.checkpoint else None

    def share(self, index: int, name: str) -> float:
        """About which share of all tokens goes through a linear of block `index`, by its name relative to the block."""
        for branch in self.branches(index):
            if branch.experts is not None and name.startswith(f"{branch.body}.experts."):
                called = next((self.config[key] for key in CALLED if self.config.get(key)), 1)
                return min(1.0, (called[index] if isinstance(called, list) else called) / self.experts(index, branch))
        return 1.0

    def steps(self, index: int, branch: Branch) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """`Branch.steps` with names relative to the block."""
        steps = branch.steps(self.experts(index, branch))
        return tuple(tuple(tuple(f"{branch.body}.{name}" for name in group) for group in step) for step in steps)

    def groups(self, index: int) -> Iterator[tuple[str, ...]]:
        """All linears of block `index` that can be quantised, in solving order, by what they read; relative to the block."""
        for branch in self.branches(index):
            for step in self.steps(index, branch):
                yield from step

    def linear(self, index: int, name: str) -> str:
        """The name under which a linear of block `index` is stored; `name` is relative to the block."""
        return self.family.block_prefix(index) + self._renamed(name)

    def linears(self) -> list[str]:
        """The stored names of all linears of all blocks that can be quantised, in solving order."""
        return [self.linear(i, name) for i in range(self.blocks) for group in self.groups(i) for name in group]

    def weight(self, index: int, name: str) -> WeightRef:
        """Where a parameter of block `index` lies, for example `mlp.experts.3.up_proj.weight`."""
        for branch in self.branches(index):
            inside = f"{branch.body}.experts." if branch.experts else None
            if branch.experts and inside and name.startswith(inside) and (together := self._together(index, branch)):
                return self._slice(together, branch.experts, name.removeprefix(inside))
        return WeightRef(self.family.block_prefix(index) + self._renamed(name))

    def split(self, index: int) -> Iterator[tuple[str, str, WeightRef]]:
        """What lies in tensors that hold all experts of block `index`: (stored name of the linear, weight or bias, where)."""
        for branch in self.branches(index):
            if branch.experts is None or (together := self._together(index, branch)) is None:
                continue
            kinds = [kind for kind, end in (("weight", ""), ("bias", "_bias")) if f"{together[1]}{end}" in self.checkpoint]
            for number in range(self.experts(index, branch)):
                for projection in ("gate_proj", "up_proj", "down_proj"):
                    name = f"{branch.body}.experts.{number}.{projection}"
                    for kind in kinds:
                        yield self.linear(index, name), kind, self.weight(index, f"{name}.{kind}")

    def _slice(self, together: tuple[str, str], experts: Experts, name: str) -> WeightRef:
        """One expert's projection, or its bias, in a tensor that holds those of all."""
        number, projection, kind = name.split(".")
        halved = projection != "down_proj"
        tensor = together[0 if halved else 1] + ("" if kind == "weight" else "_bias")
        turned = kind == "weight" and self._turned(tensor, experts, inputs=halved)
        index: Index = (int(number),)
        if halved:
            second = projection == "up_proj"
            half = self.checkpoint.shape(tensor)[-1 if turned or kind == "bias" else 1] // 2
            rows = slice(int(second), None, 2) if experts.interleaved else slice(half * second, half * (1 + second))
            index = (*index, slice(None), rows) if turned else (*index, rows)
        return WeightRef(tensor, index, turned)

    def _turned(self, tensor: str, experts: Experts, *, inputs: bool) -> bool:
        """Whether a tensor is [E, K, N]; the hidden size is K if it is that of the `inputs`, else N."""
        if experts.transposed is None:  # as transformers has it, unless that cannot be
            return self.checkpoint.shape(tensor)[-1 if inputs else 1] != self.config.get("hidden_size")
        return experts.transposed

    def place(self, name: str) -> WeightRef:
        """Where any parameter of transformers' model lies; experts are those of `families.experts`."""
        family = self.family
        if found := re.match(rf"{re.escape(family.decoder)}\.{family.blocks}\.(\d+)\.", name):
            return self.weight(int(found[1]), name[found.end() :])
        if name.startswith(f"{family.decoder}."):
            return WeightRef(f"{family.stored or family.decoder}.{name.removeprefix(f'{family.decoder}.')}")
        head = re.match(r"(language_model\.)?lm_head\.", name)
        return WeightRef(f"{family.head}.{name[head.end() :]}" if head else name)

    def foreign(self, name: str) -> bool:
        """Whether a stored tensor belongs to something beside the language model: what sees, hears or predicts ahead."""
        blocks = re.escape(self.family.block_prefix(0).removesuffix("0."))
        block = re.match(rf"{blocks}(\d+)\.", name)
        if name.startswith(("mtp.", "model.mtp.")) or (block and int(block[1]) >= self.blocks):
            return True
        inside = name.startswith((f"{self.family.stored or self.family.decoder}.", f"{self.family.head}."))
        return not inside and self.checkpoint.config.get("model_type") in NESTED

    def _renamed(self, name: str) -> str:
        """A name inside a block as checkpoints have it."""
        for ours, theirs in self.family.renames:
            name = re.sub(ours, theirs, name)
        return name


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint, with the names that its tensors really have."""
    family = find_family(checkpoint.config)
    own = (family.stored or family.decoder, family.decoder)
    named = (*own, *_DECODERS) if checkpoint.config.get("model_type") in NESTED else own
    stored = next((name for name in named if f"{name}.{family.embedding}.weight" in checkpoint), family.decoder)
    heads = (family.head, *_HEADS)
    head = next((name for name in heads if any(f"{name}.{kind}" in checkpoint for kind in _KINDS)), family.head)
    return replace(family, stored=stored, head=head)


_KINDS = ("weight", "qweight", "weight_packed", "B")


def _beginnings(name: str) -> Iterator[str]:
    """`a.b.c` begins with `a.b` and `a`."""
    while name := name.rpartition(".")[0]:
        yield name


def beside(checkpoint: Checkpoint, model: "PreTrainedModel") -> Callable[[str], bool]:
    """Tells of a stored name for which the model has no place whether it needs none.

    It is of something beside the language model, or of what transformers passes over.
    """
    passed_over = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]  # noqa: SLF001 (public by use)
    layout = Layout(checkpoint) if known_family(checkpoint.config) is not None else None
    return lambda name: any(each.search(name) for each in passed_over) or (layout is not None and layout.foreign(name))


def strangers(checkpoint: Checkpoint, model: "PreTrainedModel", used: Collection[str]) -> list[str]:
    """The stored tensors that nothing reads: not `used` by the model, nor of something beside it.

    Buffers that models compute today, what transformers passes over, and a bias of zeros, which older writers store for every
    linear, do no harm.
    """
    needs_none = beside(checkpoint, model)
    return [
        name
        for name in checkpoint.names()
        if name not in used and not COMPUTED.search(name) and not needs_none(name)
        if not (name.endswith(".bias") and not bool(checkpoint.read(name).any()))
    ]


def refuse_strangers(checkpoint: Checkpoint, model: "PreTrainedModel", used: Collection[str]) -> None:
    """Raise ModelError if there are any: a model that needs them is not the one of config.json."""
    if left := strangers(checkpoint, model, used):
        raise ModelError(
            f"`{checkpoint.origin}` holds {some(left)}, which the model of config.json has no place for",
            hint="download the model again, or remove these tensors if nothing needs them",
        )
