"""What will be quantised and what will not, known from headers alone, before any work.

Everything that could stop a run after hours is refused here in a second, naming the layers.
"""

import re
from dataclasses import dataclass

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import FormatError, ModelError, RecipeError
from marlin_tools.families import Family, find_family
from marlin_tools.formats import FORMATS


@dataclass(frozen=True)
class Target:
    """A linear that will be quantised: N outputs, K inputs."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Inventory:
    """`targets` in solving order; `kept` are the linears that stay as they are, with the reason."""

    family: Family
    blocks: int
    targets: tuple[Target, ...]
    kept: dict[str, str]

    @property
    def names(self) -> frozenset[str]:
        """The names of all targets."""
        return frozenset(target.name for target in self.targets)

    def reads_same_input(self) -> list[list[Target]]:
        """Targets of the first block, by the group that shares a Hessian."""
        first = {
            t.name.removeprefix(self.family.block_prefix(0)): t
            for t in self.targets
            if t.name.startswith(self.family.block_prefix(0))
        }
        groups = [[f"{b.body}.{name}" for name in names] for b in self.family.branches for names in (b.entry, (b.exit,))]
        return [[first[name] for name in group if name in first] for group in groups]


def check_limits(inventory: Inventory, group_size: int, format_name: str, *, sparse: bool | None = None) -> None:
    """Hold each linear against the grid and the format; `sparse` says whether they will be, if that is known."""
    limits = FORMATS[format_name].limits
    judged = [(t, limits(t.n, t.k, group_size, sparse=sparse)) for t in inventory.targets]
    refused = [f"`{target.name}`: {reason}" for target, reason in judged if reason]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise FormatError(
            f"format `{format_name}` cannot hold {'; '.join(refused[:3])}{more}",
            hint="add `--sparsity 2:4`, or use another `--format`"
            if sparse is False and not any(limits(t.n, t.k, group_size, sparse=True) for t in inventory.targets)
            else "use another `--format`, `--group-size -1` (per column), or leave these layers out with `--ignore REGEX`",
        )


def take_linears(checkpoint: Checkpoint, ignore: tuple[str, ...]) -> Inventory:
    """Find the linears of `checkpoint`, and those that the user wants left alone."""
    family = find_family(checkpoint.config)
    if checkpoint.quantization is not None:
        raise ModelError(
            f"`{checkpoint.origin}` is already quantised",
            hint=f"`marlin-tools export {checkpoint.origin} --format NAME` converts it; start from an original model",
        )
    blocks = int(checkpoint.config.get("num_hidden_layers", 0))
    patterns = [_compile(pattern) for pattern in ignore]
    targets: list[Target] = []
    kept: dict[str, str] = {}
    for name in (family.block_prefix(i) + linear for i in range(blocks) for linear in family.linears):
        n, k = _matrix(checkpoint, f"{name}.weight")
        matched = next((p.pattern for p in patterns if p.search(name)), None)
        if matched is not None:
            kept[name] = f"matches --ignore {matched}"
        else:
            targets.append(Target(name, n, k))
    if not targets:
        raise ModelError(f"`{checkpoint.origin}`: no linear is left to work on", hint="check `--ignore`")
    return Inventory(family, blocks, tuple(targets), kept)


def check_quads(inventory: Inventory) -> None:
    """2:4 is a rule about every four neighbouring inputs; a linear in which they do not come out even cannot follow it."""
    if uneven := [f"`{t.name}` has {t.k} inputs" for t in inventory.targets if t.k % 4]:
        more = f" and {len(uneven) - 3} more" if len(uneven) > 3 else ""
        raise FormatError(
            f"2:4 needs inputs in fours: {', '.join(uneven[:3])}{more}", hint="leave these layers out with `--ignore REGEX`"
        )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"`--ignore {pattern}` is no regular expression: {error}", hint="for example: --ignore 'down_proj$'"
        ) from error


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.shape(name)
    if len(shape) != 2:
        raise ModelError(f"`{name}` has shape {list(shape)}, not [outputs, inputs]", hint="is this a dense decoder model?")
    return shape[0], shape[1]
