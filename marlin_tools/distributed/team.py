"""Several processes that quantise one model, with the same bytes in the end for 1, 2, 4 or 8 of them.

`torchrun` starts them, each on a GPU of its own. The calibration text is cut into eight parts and the rows of every weight into
four slabs, however many processes there are; each takes its share. Floating-point sums depend on their order, so the order is
fixed as well: what two neighbouring parts contribute is added first, then pairs of pairs, and nothing is reduced by a library.
A matrix product has the same shape in whichever process it is computed, so it has the same bits.

Without `torchrun` there is a team of one and nothing is cut: that is faster, since a GPU likes all rows at once, and rounds
sums a little differently. `torchrun --nproc-per-node 1` cuts, and gives the bytes of many. On a CPU, where sums depend on the
number of threads, all must have as many (OMP_NUM_THREADS).
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from marlin_tools.distributed.cholesky import shared_cholesky
from marlin_tools.distributed.device import own_device, processes
from marlin_tools.errors import DeviceError
from marlin_tools.ops.solver.cholesky import reversed_cholesky
from marlin_tools.stopwatch import span

T = TypeVar("T")

SIZES = (1, 2, 4, 8)
"""How many processes can share the work."""

PARTS = 8
"""Parts of the text; fewer windows than that are cut into four, two or one."""

SLABS = 4
"""Slabs of rows. Fewer rows take a GPU hardly less time, so there are no more; of eight processes, two solve the same slab."""

_MEETING = timedelta(seconds=60)
"""For how long processes look for each other."""

_PATIENCE = timedelta(minutes=30)
"""For how long a process waits for the others; one that dies is noticed at once."""

_SHARED = 16384
"""Columns from which on processes gain by factorising together."""

_PANEL = 1 << 26
"""Bytes that are exchanged at a time."""

_gather_whole = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Torch 2.13 has given it another name, and warns of the old one."""

_meetings = count()

_EXCHANGE = re.compile(r"\bgloo\b|\bNCCL\b", re.IGNORECASE)
"""What the libraries below torch name in their errors: themselves."""

_LINE = 1024
"""Bytes of a line that processes tell each other."""


class Pairs:
    """Adds up what the parts contribute, always in the same pairs; the first part's tensors become the sums."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Sequence[Tensor]]] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
        """The next part; as many tensors every time."""
        parts = 1
        while self._held and self._held[-1][0] == parts:
            _, left = self._held.pop()
            for total, more in zip(left, tensors, strict=True):
                total.add_(more)
            tensors, parts = left, 2 * parts
        self._held.append((parts, tensors))

    def total(self) -> Sequence[Tensor]:
        """The sums; the number of parts was a power of two."""
        ((_, tensors),) = self._held
        return tensors


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in pairs."""
    pairs = Pairs()
    for part in parts:
        pairs.add([part])
    return pairs.total()[0]


@dataclass(frozen=True)
class Team:
    """The processes that work together.

    cuts      whether work is cut so that it does not matter how many they are
    device    this process's own
    goes_on   after what the same command goes on, if one of them is gone
    """

    rank: int = 0
    size: int = 1
    cuts: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    goes_on: str = "finished block"

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, windows: Sequence[T]) -> list[Sequence[T]]:
        """The parts of the text that are this process's own; none is empty."""
        if not self.cuts:
            return [windows]
        parts = max(parts for parts in SIZES if parts <= min(PARTS, len(windows)))
        if self.size > parts:
            raise DeviceError(
                f"{self.size} processes cannot share {len(windows)} calibration sequences",
                hint="use more of them (`--num-samples`), or fewer processes",
            )
        own = parts // self.size
        bounds = [part * len(windows) // parts for part in range(self.rank * own, (self.rank + 1) * own + 1)]
        return [windows[start:stop] for start, stop in pairwise(bounds)]

    def rows(self, n: int) -> list[slice]:
        """The slabs of `n` rows that are this process's own to solve."""
        first = self.rank * SLABS // self.size
        last = max(first + 1, (self.rank + 1) * SLABS // self.size)
        return self._slabs(n)[first:last] if self._cuts_rows(n) else [slice(0, n)]

    def gather(self, own: Tensor, n: int) -> Tensor:
        """All `n` rows of a tensor of which every process has computed its slabs."""
        if self.size == 1 or not self._cuts_rows(n):
            return own
        whole = own.new_empty(n, *own.shape[1:])
        whole[slice(self.rows(n)[0].start, self.rows(n)[-1].stop)] = own
        with self._exchange():
            for number, rows in enumerate(self._slabs(n)):
                dist.broadcast(whole[rows].view(torch.uint8), src=number * self.size // SLABS)
        return whole

    def each_row(self, n: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """All `n` rows of what `compute` gives for some: every process computes its own."""
        own = [compute(rows) for rows in self.rows(n)]
        return self.gather(own[0] if len(own) == 1 else torch.cat(own), n)

    def cholesky(self, matrix_kk: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """The factor of a matrix that all have; they share the work if there is much of it."""
        shared = self.cuts and len(matrix_kk) >= _SHARED
        return shared_cholesky(matrix_kk, self) if shared else reversed_cholesky(matrix_kk)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Make each tensor the sum of what all processes have, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            step = max(1, _PANEL * len(tensor) // tensor.nbytes)
            for panel in tensor.split(step):
                self._add_up(panel)

    def _add_up(self, panel: Tensor) -> None:
        """Each process adds up its share of the elements, then all tell each other."""
        mine = panel.contiguous().view(-1)
        theirs = mine.new_empty(self.size, mine.numel() // self.size)
        with self._exchange():
            if mine.numel() % self.size:
                theirs = mine.new_empty(self.size, mine.numel())
                _gather_whole(theirs.view(-1), mine)
                mine = _sum(theirs)
            else:
                dist.all_to_all_single(theirs.view(-1), mine)
                _gather_whole(mine, _sum(theirs))
        panel.copy_(mine.view_as(panel))

    def add_up_rows(self, tensor: Tensor) -> None:
        """The same for a tensor [N, ...] of which each process needs just the rows that it solves; the others mean nothing."""
        n = len(tensor)
        if self.size > SLABS or not self._cuts_rows(n):
            self.add_up([tensor])
            return
        slabs, each = self._slabs(n), SLABS // self.size
        counts = [slabs[first + each - 1].stop - slabs[first].start for first in range(0, SLABS, each)]
        own, start = counts[self.rank], slabs[self.rank * each].start
        if self.size > 1:
            theirs = tensor.new_empty(self.size, own, *tensor.shape[1:])
            with self._exchange():
                dist.all_to_all_single(theirs.flatten(0, 1), tensor, [own] * self.size, counts)
            tensor[start : start + own] = _sum(theirs)

    def own(self, things: Sequence[object]) -> int:
        """Which of these, one for each process, is this process's; if they are fewer, the last one is of all that are left."""
        return min(self.rank, len(things) - 1)

    def own_sum(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of tensors of one shape, one for each process: the sum of what all have in the place of this process's own."""
        if self.size == 1:
            return tensors[0]
        mine = torch.stack([tensors[min(rank, len(tensors) - 1)] for rank in range(self.size)])
        theirs = torch.empty_like(mine)
        with self._exchange():
            dist.all_to_all_single(theirs, mine)
        return _sum(theirs)

    def each(self, own: Tensor) -> Tensor:
        """What every process has, one under the other; all have as many rows."""
        if self.size == 1:
            return own
        whole = own.new_empty(self.size * len(own), *own.shape[1:])
        with self._exchange():
            _gather_whole(whole.view(-1).view(torch.uint8), own.contiguous().view(-1).view(torch.uint8))
        return whole

    def tell(self, tensor: Tensor, rank: int) -> None:
        """What the process of this rank has in `tensor`, all have from now on."""
        if self.size > 1:
            with self._exchange():
                dist.broadcast(tensor, src=rank)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, in no order that would be kept: not for what has to come out the same."""
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(value)
            value /= self.size
        return value

    def decide(self, *, choice: bool) -> bool:
        """What the leading process says, once it has said it."""
        if self.size == 1:
            return choice
        said = torch.tensor([choice])
        with self._exchange():
            dist.broadcast(said, src=0)
        return bool(said)

    def wait(self) -> None:
        """Until the leading process has come here."""
        self.decide(choice=True)

    def lines(self, line: str) -> list[str]:
        """One line from every process."""
        if self.size == 1:
            return [line]
        own = torch.tensor(list(line.encode()[:_LINE].ljust(_LINE)), dtype=torch.uint8)
        theirs = [torch.empty_like(own) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(theirs, own)
        return [bytes(each.tolist()).decode(errors="replace").rstrip() for each in theirs]

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Around work in which modules of torch exchange something: one that has gone is an error of ours, nothing else is."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or _EXCHANGE.search(str(error))):
                raise
            raise _gone(error, self.goes_on) from error

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Around an exchange and nothing besides: whatever fails, another process has gone."""
        try:
            with span("exchange"):
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _gone(error, self.goes_on) from error

    def _cuts_rows(self, n: int) -> bool:
        return self.cuts and n >= SLABS

    def _slabs(self, n: int) -> list[slice]:
        return [slice(i * n // SLABS, (i + 1) * n // SLABS) for i in range(SLABS)]


ALONE = Team()
"""One process that does everything, uncut."""


@contextmanager
def assembled(device: torch.device) -> Iterator[Team]:
    """The processes that `torchrun` started, or this one alone; `device` is this process's own."""
    team = expected()
    if team.size == 1:
        yield team
        return
    with joined(device, _PATIENCE):
        yield team


def expected() -> Team:
    """The team that will assemble; refuses a number of processes that cannot share the work."""
    size = processes()
    if size not in SIZES:
        raise DeviceError(f"{size} processes cannot share the work evenly", hint="start `torchrun` with 1, 2, 4 or 8 of them")
    return Team(int(os.environ.get("RANK", "0")), size, cuts="WORLD_SIZE" in os.environ)


@contextmanager
def joined(device: torch.device, patience: timedelta) -> Iterator[None]:
    """Find the other processes, unless that has been done already, and let go of them at the end."""
    if dist.is_initialized():
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    hint = "start all processes with `torchrun --nproc-per-node N -m marlin_tools ...`, or unset WORLD_SIZE"
    if missing:
        raise DeviceError(f"WORLD_SIZE is {processes()}, but {', '.join(missing)} is not set", hint=hint)
    if device.type == "cuda":
        torch.cuda.set_device(own_device(device))
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(rendezvous("env://", timeout=_MEETING))
        store.set_timeout(_MEETING)
        # What was said at an earlier meeting does not count.
        meeting = dist.PrefixStore(f"meeting-{next(_meetings)}", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"{processes()} processes could not find each other at `{where}`", hint=hint) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _gone(error: RuntimeError, goes_on: str) -> DeviceError:
    """What to raise when an exchange has failed."""
    reason = re.sub(r"^\[\S*\] ", "", str(error).split("\n")[0]).split(". ")[0]
    hint = f"what it said last is the cause; the same command goes on after the last {goes_on}"
    return DeviceError(f"another process is gone: {reason}", hint=hint)
