"""How a kind of model is built, as pure data: where the blocks are, and which linears read the same tensor.

A decoder block is a chain of residual branches, each `h + post(exit(body(pre(h))))`. The `entry` linears read `pre(h)`; `body`
is the module that holds them and, up to but not including `exit`, turns `pre(h)` into what `exit` reads. That is all the stream
needs to stage a block; attention, rotary embeddings, masks, q/k norms and embedding scales stay in transformers' own modules.

Names here are those of transformers' modules; `layout.py` says which tensor of a checkpoint each of them is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Experts:
    """The feed-forward networks of a mixture of experts, in `experts` of the body: every token goes through a few.

    shared       the network that every token goes through, relative to the branch's body; None if there is none
    together     what they call the tensors that hold gate and up, and down, of all experts, relative to the branch's body
    transposed   such a tensor is [E, K, N], not [E, N, K]; None if both are found, which its shape tells
    interleaved  in such a tensor, rows of gate and up take turns
    gated        each is three linears; without a gate it is two, and each expert has tensors of its own
    """

    shared: str | None = None
    together: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    transposed: bool | None = False
    interleaved: bool = False
    gated: bool = True

    @property
    def entry(self) -> tuple[str, ...]:
        """The linears of an expert that read the tokens."""
        return ("gate_proj", "up_proj") if self.gated else ("up_proj",)


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block; all names are relative to the block, linears to the body.

    pre       the norm before the body; None if there is none
    post      the norm after it, before the output joins the residual stream
    inner     linears between entry and exit, each of which reads a tensor of its own
    into      the number of the block by which what the body reads is multiplied
    out       the number of the block by which what the branch puts out is multiplied
    attends   the body is called as attention is
    apart     sequence by sequence: transformers' own code for it takes more room for many than there is
    beside    it reads what the branch before it read, not what that put out: "always", or if this key of config.json says so
    instead   a block has it in the place of the branch before it, or of one before that which is `instead` as well
    experts   the body is a mixture of experts; `entry` and `exit` are then empty
    optional  a model may have it or not
    """

    pre: str | None
    body: str
    entry: tuple[str, ...] = ()
    exit: str = ""
    post: str | None = None
    inner: tuple[str, ...] = ()
    into: str | None = None
    out: str | None = None
    attends: bool = False
    apart: bool = False
    beside: str | None = None
    instead: bool = False
    experts: Experts | None = None
    optional: bool = False

    def steps(self, experts: int = 0) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Its linears, relative to the body, as they are solved: step by step, in each the groups that read one tensor."""
        if self.experts is None:
            inner = (tuple((name,) for name in self.inner),) if self.inner else ()
            return (self.entry,), *inner, ((self.exit,),)
        bodies = [f"experts.{number}" for number in range(experts)]
        bodies = [*([self.experts.shared] if self.experts.shared else []), *bodies]
        entries = tuple(tuple(f"{body}.{name}" for name in self.experts.entry) for body in bodies)
        return entries, tuple((f"{body}.down_proj",) for body in bodies)

    def linears(self, experts: int = 0) -> tuple[str, ...]:
        """The same without their order, relative to the block."""
        return tuple(f"{self.body}.{name}" for step in self.steps(experts) for group in step for name in group)


@dataclass(frozen=True)
class Family:
    """How a kind of model is built. `decoder` is the module that maps token ids to hidden states.

    renames        pairs (module, tensor): how names in a checkpoint differ from those of the modules, part by part
    called         parts of a block that checkpoints store, each with what vLLM calls its module, if that is another name
    plain          a part of a block whose linears vLLM takes in 16 bits only
    logits_times   the number of config.json by which the logits are multiplied
    logits_over    the number of config.json by which they are divided
    logits_capped  logits are capped if config.json says so (`final_logit_softcapping`)
    eager          transformers' faster ways to compute its attention look ahead in a text
    multiple       the number of a block's module that scales what joins the residual stream
    scalar         a stored number of each block by which its output is multiplied
    lacks          parts of a block that others of this type have and that cannot be worked on
    needs          parts that each block must have: one without takes what another has computed
    unset          keys of config.json by which blocks of others of this type use what another has computed: zero here
    stored         what tensors of the decoder begin with, if that is not `decoder`
    pairs          a block puts out two things, of which the first is the residual stream
    """

    branches: tuple[Branch, ...]
    decoder: str = "model"
    embedding: str = "embed_tokens"
    blocks: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"
    renames: tuple[tuple[str, str], ...] = ()
    called: tuple[tuple[str, str], ...] = ()
    plain: str | None = None
    logits_times: str | None = None
    logits_over: str | None = None
    logits_capped: bool = True
    eager: bool = False
    multiple: str | None = None
    scalar: str | None = None
    lacks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    stored: str | None = None
    pairs: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block that can be quantised, in solving order, relative to it; no alternatives, no experts."""
        return tuple(name for slot in self.slots() for name in slot[0].linears())

    def slots(self) -> list[tuple[Branch, ...]]:
        """The branches of a block, in order, each with what may stand in its place."""
        slots: list[list[Branch]] = []
        for branch in self.branches:
            if branch.instead:
                slots[-1].append(branch)
            else:
                slots.append([branch])
        return [tuple(slot) for slot in slots]

    def chosen(self, present: Callable[[str], bool]) -> tuple[Branch, ...]:
        """The branches of a block in which these modules are present; where none is whole, the first is missed by name."""

        def whole(branch: Branch) -> bool:
            if (experts := branch.experts) is None:
                return all(present(name) for name in branch.linears())
            anyhow = any(present(f"{branch.body}.{name}") for name in ("experts", experts.together[0]))
            return anyhow and (experts.shared is None or present(f"{branch.body}.{experts.shared}"))

        found = (next((b for b in slot if whole(b)), None if slot[0].optional else slot[0]) for slot in self.slots())
        return tuple(branch for branch in found if branch is not None)

    def head_numbers(self, config: "PreTrainedConfig") -> tuple[float, float | None]:
        """What a model multiplies the product of its head with, and what caps it; as transformers does it."""
        text = config.get_text_config()
        factor = float(getattr(text, self.logits_times)) if self.logits_times else 1.0
        factor /= float(getattr(text, self.logits_over)) if self.logits_over else 1.0
        return factor, getattr(text, "final_logit_softcapping", None) if self.logits_capped else None

    def served(self, linear: str) -> str:
        """What vLLM calls a linear of this name in a checkpoint."""
        for stored, module in self.called:
            linear = linear.replace(f".{stored}.", f".{module}." if module else ".")
        return linear

    def block_prefix(self, index: int) -> str:
        """What the names of a block's tensors start with."""
        return f"{self.stored or self.decoder}.{self.blocks}.{index}."


def turns_by_length(config: "PreTrainedConfig") -> bool:
    """Whether the angles of a position depend on how long the text is."""
    turns: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    every = [turns, *(each for each in turns.values() if isinstance(each, dict))]  # or of each kind of block
    return any(each.get("rope_type") in {"dynamic", "longrope"} for each in every)
