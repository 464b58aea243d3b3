"""Whose weights are at fault: solvers see matrices without names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from marlin_tools.algorithms.scales import ScaleError
from marlin_tools.errors import NumericalError
from marlin_tools.stream.layer_stream import Group


@contextmanager
def naming(batch: Sequence[Group]) -> Iterator[None]:
    """Within, a scale that float16 cannot hold is told with its linear: of these groups, that with the largest weight.

    It is what `--ignore` wants to know. Weights are compared as they are now, so this is for before they are replaced.
    """
    try:
        yield
    except ScaleError as error:
        largest = {name: float(group.weight(name).abs().max()) for group in batch for name in group.names}
        name, size = max(largest.items(), key=lambda each: each[1])
        raise NumericalError(f"`{name}`, whose largest weight is {size:g}: {error.message}", hint=error.hint) from error
