"""What will be quantised and what will not, known from headers alone, before any work.

Everything that could stop a run after hours is refused here in a second, naming the layers.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from marlin_tools.checkpoint.dequantized import dequantized
from marlin_tools.checkpoint.patterns import compiled
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import MISMATCH, foreign_linears, mismatched
from marlin_tools.errors import FormatError, ModelError
from marlin_tools.families import NESTED, WHICH
from marlin_tools.families.experts import shell, stored_shapes
from marlin_tools.families.family import Family
from marlin_tools.families.layout import Layout, WeightRef, refuse_strangers
from marlin_tools.formats import FORMATS, find_format
from marlin_tools.ops.linear.layout import GROUP_SIZES


@dataclass(frozen=True)
class Target:
    """A linear that will be quantised: N outputs, K inputs.

    ref     where its weight lies
    share   of all tokens that go through it, about so many: an expert sees few
    """

    name: str
    n: int
    k: int
    ref: WeightRef | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Inventory:
    """`targets` in solving order; `kept` are the linears that stay as they are, with the reason."""

    layout: Layout
    targets: tuple[Target, ...]
    kept: dict[str, str]

    @property
    def family(self) -> Family:
        """How the model is built."""
        return self.layout.family

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.layout.blocks

    @property
    def names(self) -> frozenset[str]:
        """The names of all targets."""
        return frozenset(target.name for target in self.targets)

    @cached_property
    def _refs(self) -> dict[str, WeightRef]:
        return {target.name: target.ref or WeightRef(f"{target.name}.weight") for target in self.targets}

    def weight(self, name: str) -> Tensor:
        """The weight [N, K] of a target, as it is stored."""
        return self._refs[name].read(self.checkpoint)

    def dtype(self, name: str) -> torch.dtype:
        """The type that the weight of a target is stored in."""
        return self.checkpoint.stored(self._refs[name].tensor).dtype

    def untouched(self, index: int | None) -> dict[str, WeightRef]:
        """What is written as it was, by the name that it is written under: of a block, or (None) of all that is in none.

        Where a tensor holds all experts of a block, those that are not quantised, and biases, come out of it one by one.
        """
        layout, names, every = self.layout, self.names, self.checkpoint.names()
        if index is None:
            blocks = tuple(self.family.block_prefix(i) for i in range(self.blocks))
            return {name: WeightRef(name) for name in every if not name.startswith(blocks)}
        prefix = self.family.block_prefix(index)
        split = {f"{name}.{kind}": ref for name, kind, ref in layout.split(index)}
        taken = {ref.tensor for ref in split.values()}
        plain = {name: WeightRef(name) for name in every if name.startswith(prefix) and name not in taken}
        return {name: ref for name, ref in (plain | split).items() if name.removesuffix(".weight") not in names}

    def joined(self, index: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a block as the original stores them, with new weights of its targets in them; these are taken out."""
        prefix = self.family.block_prefix(index)
        left = (name for name in self.checkpoint.names() if name.startswith(prefix) and name not in weights)
        tensors = {name: self.checkpoint.read(name) for name in left}
        owned: set[str] = set()
        for name in list(weights):
            ref, weight = self._refs[name.removesuffix(".weight")], weights.pop(name)
            if ref.whole:
                tensors[ref.tensor] = weight
                continue
            if ref.tensor not in owned:
                tensors[ref.tensor] = tensors[ref.tensor].clone()  # what was read may be the file itself
                owned.add(ref.tensor)
            ref.take(tensors[ref.tensor]).copy_(weight)
        return tensors

    def part(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight of a target out of these."""
        ref = self._refs[name]
        return ref.take(tensors[ref.tensor])

    @property
    def kept_tensors(self) -> set[str]:
        """The tensors that are taken over as they are, wholly or in part."""
        return {ref.tensor for index in (None, *range(self.blocks)) for ref in self.untouched(index).values()}

    @property
    def unquantized(self) -> list[str]:
        """The names of all linears that stay as they are, as config.json has to list them.

        What stands beside a language model is listed by its tensors and by transformers' modules, where these differ: some
        engines go by the one, some by the other. So are experts, and blocks whose tensors have another beginning.
        """
        found = [*self.kept, *self._also_called()]
        embedding = f"{self.family.stored or self.family.decoder}.{self.family.embedding}"
        for name in self.checkpoint.names():
            linear = name.removesuffix(".weight")
            known = linear in self.names or linear in self.kept or linear in {embedding, self.family.head}
            if linear != name and not known and len(self.checkpoint.shape(name)) == 2:
                found.append(linear)
        found += self._as_modules(found)
        nested = self.checkpoint.config.get("model_type") in NESTED
        modules = [*(foreign_linears(self.checkpoint) if nested else ()), *({"lm_head"} - {self.family.head})]
        return [*found, *(name for name in modules if name not in found), self.family.head]

    def _as_modules(self, names: Collection[str]) -> list[str]:
        """What transformers calls those linears of blocks whose tensors do not begin as its modules do; not experts."""
        family = self.family
        stored, modules = (f"{begin}.{family.blocks}." for begin in (family.stored or family.decoder, family.decoder))
        inside = [name for name in names if name.startswith(stored) and ".experts." not in name]
        return [] if stored == modules else [modules + name.removeprefix(stored) for name in inside]

    def _also_called(self) -> list[str]:
        """Further names of linears that stay as they are.

        Engines call some modules otherwise than checkpoints do, and ask for experts by the names of modules, of tensors, or by
        half of each.
        """
        layout, names = self.layout, self._routers()
        bare = any(branch.experts is not None and not branch.experts.gated for branch in self.family.branches)
        for index in range(self.blocks if self.kept else 0):
            for linear in (linear for group in layout.groups(index) for linear in group):
                if (stored := layout.linear(index, linear)) not in self.kept:
                    continue
                if (served := self.family.served(stored)) != stored:
                    names.append(served)
                if ".experts." in stored:
                    both = [name.partition(".experts.") for name in (stored, self.family.block_prefix(index) + linear)]
                    number = both[0][2].partition(".")[0]
                    ends = [end.partition(".")[2] for _, _, end in both]
                    ends += ["gate_proj"] if bare and ends[0] == "up_proj" else []  # which engines ask for nonetheless
                    called = (f"{body}.experts.{number}.{end}" for body, _, _ in both for end in ends)
                    names += [name for name in dict.fromkeys(called) if name != stored]
        return names

    def _routers(self) -> list[str]:
        """The names of those modules beside experts that are stored under another name, as far as they may be linears."""
        names, checkpoint = [], self.checkpoint
        plain = [re.sub(r"\^|\\b|\\(?=\.)", "", ours) for ours, _ in self.family.renames]
        for index in range(self.blocks):
            for name in plain:
                weight = f"{self.layout.linear(index, name)}.weight"
                if weight in checkpoint and len(checkpoint.shape(weight)) == 2:
                    names.append(self.family.block_prefix(index) + name)
        return names

    @property
    def checkpoint(self) -> Checkpoint:
        """The model itself."""
        return self.layout.checkpoint

    @cached_property
    def _by_name(self) -> dict[str, Target]:
        return {target.name: target for target in self.targets}

    def reads_same_input(self, index: int) -> list[list[Target]]:
        """Targets of a block, by the group that shares a Hessian."""
        groups = [[self.layout.linear(index, name) for name in group] for group in self.layout.groups(index)]
        return [[self._by_name[name] for name in group if name in self._by_name] for group in groups]

    def kept_in(self, index: int) -> list[Target]:
        """The linears of a block that could have been targets and stay as they are."""
        if not self.kept:
            return []
        layout = self.layout
        linears = {layout.linear(index, linear): linear for group in layout.groups(index) for linear in group}
        kept = [
            (name, linear, layout.weight(index, f"{linear}.weight")) for name, linear in linears.items() if name in self.kept
        ]
        return [Target(name, *_matrix(self.checkpoint, ref), ref, layout.share(index, linear)) for name, linear, ref in kept]


def check_limits(inventory: Inventory, sizes: Mapping[str, int], format_name: str, *, sparse: bool | None) -> None:
    """Hold each linear against the grid and the format; `sparse` says whether they will be, if that is known."""
    limits = FORMATS[format_name].limits
    judged = [(t, limits(t.n, t.k, sizes[t.name], sparse=sparse)) for t in inventory.targets]
    refused = [f"`{target.name}`: {reason}" for target, reason in judged if reason]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise FormatError(
            f"format `{format_name}` cannot hold {'; '.join(refused[:3])}{more}",
            hint="add `--sparsity 2:4`, or use another `--format`"
            if not any(limits(t.n, t.k, sizes[t.name], sparse=True) for t in inventory.targets)
            else _other_group_size(inventory, format_name, sparse=sparse),
        )


def largest_group_sizes(inventory: Inventory, formats: Collection[str], *, sparse: bool, mixed: bool) -> dict[str, int]:
    """The largest size of groups that fits each linear (`mixed`), or all of them; raises what stops 128 where none does.

    What an engine fuses has one size: linears that read the same tensor have as many inputs, and the experts of a block
    are chosen for together.
    """
    fused: dict[str, list[Target]] = defaultdict(list)
    for target in inventory.targets:
        fused[target.name.partition(".experts.")[0] if mixed else ""].append(target)
    fitting = [[size for size in GROUP_SIZES if _fits(part, size, formats, sparse=sparse)] for part in fused.values()]
    if not all(fitting):
        for name in formats:
            check_limits(inventory, dict.fromkeys(inventory.names, GROUP_SIZES[0]), name, sparse=sparse)
        raise FormatError(f"no group size fits all of {', '.join(formats)}", hint="write one format at a time")
    return {target.name: max(sizes) for part, sizes in zip(fused.values(), fitting, strict=True) for target in part}


def _fits(targets: Iterable[Target], size: int, formats: Iterable[str], *, sparse: bool | None) -> bool:
    return not any(FORMATS[name].limits(t.n, t.k, size, sparse=sparse) for t in targets for name in formats)


def _other_group_size(inventory: Inventory, format_name: str, *, sparse: bool | None) -> str:
    """A hint that names the sizes of groups that would fit all linears, and what finds them."""
    fitting = [size for size in GROUP_SIZES if _fits(inventory.targets, size, (format_name,), sparse=sparse)]
    sizes = " or ".join(f"`--group-size {size}`" for size in fitting) or "another `--format`, `--group-size -1` (per column)"
    each = "each linear" if FORMATS[format_name].mixes else "the model"
    said = f", which {'fit' if len(fitting) > 1 else 'fits'} all linears, or `--group-size auto`, the largest for {each}"
    return f"use {sizes}{said if fitting else ''}, or leave these layers out with `--ignore REGEX`"


def _converted(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> str:
    """A hint for who wants to work on a quantised model."""
    try:
        find_format(quantization)
    except FormatError as error:
        return f"start from the original model ({error.message})"
    return f"`marlin-tools export {shlex.quote(checkpoint.origin)} --format NAME` converts it; start from an original model"


def take_linears(checkpoint: Checkpoint, ignore: tuple[str, ...]) -> Inventory:
    """Find the linears of `checkpoint`, and those that the user wants left alone."""
    layout = Layout(checkpoint := dequantized(checkpoint))
    if checkpoint.quantization is not None:
        raise ModelError(f"`{checkpoint.origin}` is already quantised", hint=_converted(checkpoint, checkpoint.quantization))
    _refuse_unknown_parts(layout)
    patterns = [compiled(pattern, "--ignore") for pattern in ignore]
    targets: list[Target] = []
    kept: dict[str, str] = {}
    for index in range(layout.blocks):
        for linear in (linear for group in layout.groups(index) for linear in group):
            name = layout.linear(index, linear)
            ref = layout.weight(index, f"{linear}.weight")
            n, k = _matrix(checkpoint, ref)
            matched = next((p.pattern for p in patterns if p.search(name)), None)
            if matched is not None:
                kept[name] = f"matches --ignore {matched}"
            else:
                targets.append(Target(name, n, k, ref, layout.share(index, linear)))
    if not targets:
        raise ModelError(f"`{checkpoint.origin}`: no linear is left to work on", hint="check `--ignore`")
    taken = {(target.ref or WeightRef(f"{target.name}.weight")).tensor for target in targets}
    others = (name for name in checkpoint.names() if name.removesuffix("_bias") not in taken)
    there = [*kept, *(target.name for target in targets), *others]
    there.append("lm_head")  # which is often the embedding
    if idle := next((p.pattern for p in patterns if not any(p.search(name) for name in there)), None):
        hint = f"names look like `{targets[0].name}`"
        raise ModelError(f"`--ignore {idle}` matches nothing in `{checkpoint.origin}`", hint=hint)
    return Inventory(layout, tuple(targets), kept)


def check_shapes(inventory: Inventory) -> None:
    """Refuse weights that are missing, too many or of other shapes than config.json asks for, before any text is read.

    And a config.json that makes no model. It takes seconds to import the model's class, so a dry run does without. Experts are
    looked at one by one later. What is tied may lie under any of its names.
    """
    layout, checkpoint = inventory.layout, inventory.checkpoint
    tied: dict[int, list[str]] = {}
    model = shell(checkpoint, torch.float16)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".experts." in name:
            continue
        ref = layout.place(name)
        tied.setdefault(id(parameter), []).append(ref.tensor)
        if ref.whole and ref.tensor in checkpoint and checkpoint.shape(ref.tensor) != tuple(parameter.shape):
            raise mismatched(ref.tensor, checkpoint.shape(ref.tensor), parameter.shape)
    if missing := next((names[0] for names in tied.values() if not any(name in checkpoint for name in names)), None):
        raise ModelError(f"`{checkpoint.origin}` lacks `{missing}`, which config.json asks for", hint=MISMATCH)
    refuse_strangers(checkpoint, model, stored_shapes(layout, model).keys())


def _refuse_unknown_parts(layout: Layout) -> None:
    """Refuse what the type of the model does not have, by its tensors: a config.json may name numbers that mean nothing."""
    blocks = range(layout.blocks)
    if part := next((part for part in layout.family.lacks if any(layout.has(i, part) for i in blocks)), None):
        raise ModelError(
            f"`{layout.checkpoint.origin}`: blocks with `{part}` are not known",
            hint="models of this type work in which no block has that",
        )
    if part := next((part for part in layout.family.needs if not all(layout.has(i, part) for i in blocks)), None):
        raise ModelError(
            f"`{layout.checkpoint.origin}`: blocks that share what another computes are not known (some lack `{part}`)",
            hint="models of this type in which all have it work",
        )
    if key := next((key for key in layout.family.unset if layout.config.get(key)), None):
        raise ModelError(
            f"`{layout.checkpoint.origin}`: blocks that share what another computes are not known "
            f"(`{key}` is {layout.config[key]} in config.json)",
            hint="models of this type in which it is 0 work",
        )
    if any(branch.experts is not None for branch in layout.family.branches):
        return
    prefix = layout.family.block_prefix(0).removesuffix("0.")
    if (expert := next((n for n in layout.checkpoint.names() if n.startswith(prefix) and ".experts." in n), None)) is not None:
        kind = layout.checkpoint.config.get("model_type")
        raise ModelError(
            f"`{layout.checkpoint.origin}` is a mixture of experts (`{expert}`), which model type `{kind}` is not",
            hint=WHICH,
        )


def check_quads(inventory: Inventory) -> None:
    """2:4 is a rule about every four neighbouring inputs; a linear in which they do not come out even cannot follow it."""
    if uneven := [f"`{t.name}` has {t.k} inputs" for t in inventory.targets if t.k % 4]:
        more = f" and {len(uneven) - 3} more" if len(uneven) > 3 else ""
        raise FormatError(
            f"2:4 needs inputs in fours: {', '.join(uneven[:3])}{more}", hint="leave these layers out with `--ignore REGEX`"
        )


def _matrix(checkpoint: Checkpoint, ref: WeightRef) -> tuple[int, int]:
    shape = ref.shape(checkpoint)
    if len(shape) != 2:
        raise ModelError(
            f"`{ref.tensor}` has shape {list(shape)}, not [outputs, inputs]", hint="is this a dense decoder model?"
        )
    return shape[0], shape[1]
