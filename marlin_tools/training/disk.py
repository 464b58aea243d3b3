"""What learning takes on disk: the states that it saves, and the result. Known beforehand from headers alone."""

from math import prod

from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.formats.contents import grid_of
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.stream.inventory import take_linears
from marlin_tools.training.loop import TrainingSettings

_BYTES = 4
"""Of a parameter that learns."""


def needed_gb(student: Checkpoint, trained: int, settings: TrainingSettings, *, saved: bool = False) -> float:
    """For a student of which so many bytes learn. A saved state takes the place of the one before when it is whole.

    In it are of each parameter its value, two moments, perhaps its mean, and its best value.
    """
    return ((1 if saved else 2) * (5 if settings.average else 4) * trained + student.nbytes) / 1e9


def trained_bytes(student: Checkpoint, settings: TrainingSettings) -> int:
    """How many bytes learn of a student that is finished: `training.student`, told from the shapes of what is stored."""
    if student.quantization is not None:
        stored = StoredLinears(student)
        grids = [grid_of(stored, name) for name in stored.names]
        learned = sum(grid.n * (grid.k // grid.group_size + (grid.k if settings.code_rate else 0)) for grid in grids)
        others = (student.shape(name) for name in student.names() if name not in stored.tensors)
        return _BYTES * (learned + sum(shape[0] for shape in others if len(shape) == 1))
    targets = take_linears(student, ()).targets
    sparse = {entry["name"] for entry in (read_manifest(student.path) or {}).get("linears", ())} or {t.name for t in targets}
    linears = sum(target.n * target.k // (2 if target.name in sparse else 1) for target in targets)
    within = {target.ref.tensor for target in targets if target.ref}
    words = student.text_config.get("vocab_size")  # embeddings and head stay
    others = (student.shape(name) for name in student.names() if name not in within)
    return _BYTES * (linears + sum(prod(shape) for shape in others if len(shape) == 1 or shape[0] != words))
