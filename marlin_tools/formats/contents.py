"""What a checkpoint holds, dense or quantised, read from its headers: shared by export, verify and inspect.

The size of a quantised linear is not taken from config.json but from the shapes of its own tensors, so it also holds for
checkpoints that other tools wrote, and a config.json that says something else is found out.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marlin_tools.checkpoint.patterns import compiled
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import FormatError
from marlin_tools.formats.config import activations_of
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import ActivationType

_EMBEDDING = re.compile(r"embed|wte|wpe")


class LinearShape(NamedTuple):
    """The size of a quantised linear: N outputs, K inputs, `group_size` inputs per scale (K if per column)."""

    n: int
    k: int
    group_size: int


class Contents:
    """The linears of `checkpoint`: `grids` those that are quantised, `plain` those that are not."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.stored = StoredLinears(checkpoint) if checkpoint.quantization is not None else None

    @cached_property
    def grids(self) -> dict[str, LinearShape]:
        """Every quantised linear by name; an error names the linear that has no readable size."""
        return {} if self.stored is None else {name: grid_of(self.stored, name) for name in self.stored.names}

    @cached_property
    def plain(self) -> dict[str, tuple[int, ...]]:
        """Shapes [N, K] of the linears that are stored as they are: every matrix that is not an embedding."""
        weights = (name for name in self.checkpoint.names() if name.endswith(".weight") and not _EMBEDDING.search(name))
        shapes = {name.removesuffix(".weight"): self.checkpoint.shape(name) for name in weights}
        return {name: shape for name, shape in shapes.items() if len(shape) == 2}

    @property
    def activations(self) -> ActivationType:
        """What the quantised linears read."""
        return activations_of(self.checkpoint.quantization)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The group size of each linear, -1 for per column; one group alone is of the size that others have, if any has."""
        several = {grid.group_size for grid in self.grids.values() if grid.group_size != grid.k}
        return {name: grid.group_size if grid.group_size in several else -1 for name, grid in self.grids.items()}

    @property
    def group_sizes(self) -> set[int]:
        """Those that are in use."""
        return set(self.sizes.values())


def grid_of(stored: StoredLinears, name: str) -> LinearShape:
    """The size of one quantised linear, without reading its codes."""
    headers = {suffix: _header(stored.checkpoint, full) for suffix, full in stored.places(name).items()}
    try:
        n, k = stored.format.shape_of(headers)
    except FormatError as error:
        raise FormatError(f"`{name}`: {error.message}", hint=error.hint) from error
    scales = next((tensor.numel() for tensor in headers.values() if tensor.is_floating_point()), 0)
    groups = scales // n if n else 0
    if not groups or scales % n or k % groups:
        raise FormatError(
            f"`{name}`: {scales} scales do not fit {n} outputs by {k} inputs", hint="download or export the checkpoint again"
        )
    return LinearShape(n, k, k // groups)


def _header(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor without its values, except for the few numbers in which `compressed-tensors` stores a shape."""
    stored = checkpoint.stored(name)
    if stored.nbytes <= 16:
        return checkpoint.read(name)
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def keeps(config: Mapping[str, Any], name: str) -> bool:
    """Whether this quantization_config says that the linear `name` is not quantised."""
    targets = [target for group in (config.get("config_groups") or {}).values() for target in group.get("targets") or ()]
    grouped = config.get("quant_method") == "compressed-tensors"
    return ignores(config, name) or (grouped and not _matches(targets, name))


def ignores(config: Mapping[str, Any], name: str) -> bool:
    """Whether it says so outright, by a rule for what is left out."""
    if config.get("quant_method") == "compressed-tensors":
        return _matches(config.get("ignore") or (), name)
    skipped = [rule.removeprefix("-:") for rule in config.get("dynamic") or {} if rule.startswith("-:")]
    return any(_pattern(rule).match(name) for rule in skipped) or name in (config.get("modules_to_not_convert") or ())


def declared_sizes(config: Mapping[str, Any], name: str) -> set[int]:
    """The group size, -1 for per column, that this quantization_config gives a linear; all of them if no target means it."""
    groups = list((config.get("config_groups") or {}).values())
    rules = [(target, group) for group in groups for target in group.get("targets") or ()]
    rules.sort(key=lambda rule: (rule[0] == "Linear", rule[0].startswith("re:"), rule[0]))  # the library's order
    found = [group for target, group in rules if _matches((target,), name)][:1]
    schemes = [group["weights"] for group in found or groups] or [config]
    return {int(scheme.get("group_size") or -1) for scheme in schemes}


def _matches(entries: list[str] | tuple[str, ...], name: str) -> bool:
    """compressed-tensors' rules: a full name, `re:` and an expression for its beginning, or the class of a module."""
    return any(_pattern(e[3:]).match(name) if e.startswith("re:") else e in {name, "Linear"} for e in entries)


def _pattern(text: str) -> re.Pattern[str]:
    return compiled(text, "`quantization_config`:", FormatError)
