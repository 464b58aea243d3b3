"""A model that learns: of 2:4 linears the kept values, of quantised ones scales or codes; embeddings and head stay."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from marlin_tools.families.family import Family
from marlin_tools.quantized import QuantizedLinear
from marlin_tools.training.compressed import CompressedLinear, expand
from marlin_tools.training.losses import Head
from marlin_tools.training.norms import fuse_norms
from marlin_tools.training.parallel import whole
from marlin_tools.training.scaled import ScaledLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Hidden:
    """The last hidden states, normalised, and those of some blocks [B, L, H]."""

    last: Tensor
    chosen: list[Tensor]


class Reader:
    """A model whose hidden states are wanted: the teacher, or the student."""

    def __init__(self, model: "PreTrainedModel", family: Family, every: int) -> None:
        self.model, self.family = model, family
        self._every = every
        self._seen: list[Tensor] = []
        self._reads = False
        for block in list(self.blocks)[every - 1 : -1 : every] if every else ():
            block.register_forward_hook(self._see)

    def _see(self, _block: nn.Module, _inputs: Any, output: Any) -> None:
        """What a block puts out; not when it is computed again for a gradient."""
        if self._reads:
            self._seen.append(output[0] if isinstance(output, tuple) else output)

    def read(self, ids_bl: Tensor) -> Hidden:
        """Hidden states of every `every`-th block, and the last; only the last if `every` is 0."""
        self._reads = True
        last = self.decoder(input_ids=ids_bl, use_cache=False).last_hidden_state
        self._reads = False
        chosen, self._seen = self._seen, []
        return Hidden(last, [*chosen, last] if self._every else [])

    @property
    def decoder(self) -> Any:
        """The model without its head."""
        return self.model.get_submodule(self.family.decoder)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        blocks: nn.ModuleList = getattr(self.decoder, self.family.blocks)
        return blocks

    def head(self, dtype: torch.dtype) -> Head:
        """What turns the last hidden states into logits."""
        factor, cap = self.family.head_numbers(self.model.config)
        weight, bias = whole(self._head.weight.detach()).to(dtype), None
        if self._head.bias is not None:
            bias = whole(self._head.bias.detach()).float()
        return Head(weight, cap, factor, bias)

    @property
    def _head(self) -> Any:
        """The module before the logits; a checkpoint may call it otherwise."""
        return self.model.get_output_embeddings()


OFFSET = ".offset"
"""What the names of trained codes end with."""

_LEARNED = (".factor", OFFSET)
"""The same for all that a quantised linear learns."""


class Student(Reader):
    """The model that is trained. Linears in `sparse`, by the names of their modules, keep their zeros, whatever happens.

    Of a quantised model, its quantised linears, norms and biases learn; linears that are not quantised stay.
    """

    def __init__(self, model: "PreTrainedModel", family: Family, every: int, sparse: frozenset[str]) -> None:
        super().__init__(model, family, every)
        self.sparse = sparse
        for name in sorted(sparse):
            linear: Any = model.get_submodule(name)
            model.set_submodule(name, CompressedLinear.of(linear.weight.data, linear.weight.data != 0, linear.bias))
        self.quantized = any(isinstance(module, ScaledLinear) for module in model.modules())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not self.quantized or parameter.ndim == 1 or name.endswith(_LEARNED))
        behind = {branch.post for branch in family.branches if branch.post}
        fuse_norms(model, int(model.config.get_text_config().hidden_size), behind)
        for part in (model.get_submodule(f"{family.decoder}.{family.embedding}"), self._head):
            for parameter in part.parameters():
                parameter.requires_grad_(False)  # noqa: FBT003

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _within(self, name: str, block: int | None) -> bool:
        """Whether a module or parameter belongs to a block, or (None) to none."""
        blocks = f"{self.family.decoder}.{self.family.blocks}."
        return not name.startswith(blocks) if block is None else name.startswith(f"{blocks}{block}.")

    def tensors(self, block: int | None) -> Iterator[tuple[str, Tensor]]:
        """What has been trained of a block or (None) of what is in none, whole and with its zeros, float32 on the CPU, by name.

        Where several processes train, all of them have to ask.
        """
        for name, parameter in self.trained().items():
            if not self._within(name, block) or name.endswith(_LEARNED):
                continue
            tensor = whole(parameter.detach()).float()
            owner, _, leaf = name.rpartition(".")
            if leaf == "values" and owner in self.sparse:
                module: Any = self.model.get_submodule(owner)
                yield f"{owner}.weight", expand(tensor, module.positions).cpu()
            else:
                yield name, tensor.cpu()

    def quantized_linears(self, block: int | None) -> Iterator[tuple[str, QuantizedLinear]]:
        """The same for its quantised linears, in the neutral form."""
        for name, module in self.model.named_modules():
            if isinstance(module, ScaledLinear) and self._within(name, block):
                yield name, module.solved(**{key: whole(value.detach()) for key, value in module.learned().items()}).to("cpu")


def recompute(student: Student) -> None:
    """Let it forget activations within blocks, and compute them again for the gradient.

    transformers does so in blocks that are in training. What is in them is not, or some of it would drop out at random.
    """
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in student.blocks:
        block.training = True
