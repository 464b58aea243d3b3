"""The training loop: steps, learning rate, held-out KL, saving and going on.

Everything that a step needs follows from its number: which sequences it reads, its learning rate, nothing drawn at random on
the way. So a run that is continued from a saved state takes the very steps that it would have taken.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from marlin_tools.distributed.team import Team
from marlin_tools.errors import NumericalError
from marlin_tools.events import Emit, Event
from marlin_tools.settings import Settings
from marlin_tools.training.losses import Head, head_losses, square_head
from marlin_tools.training.parallel import fill_share, put_back, whole
from marlin_tools.training.scaled import rounded_once
from marlin_tools.training.student import OFFSET, Reader, Student

_WORSE = 2
"""Times the first held-out KL, to which a rate that is too high leads; a dense INT4 model rises to 1.5 and ends below it."""

_SPEAK_EVERY = 10
"""Steps between two looks at the loss; each look waits for the device."""


class TrainingSettings(Settings):
    """How to train.

    tokens         tokens to train on in all, by default 20 million, of a quantised model 6; the text is repeated, each time in
                   another order, until they are reached
    rate           highest learning rate of AdamW; by default 1e-4, of a quantised model 1e-3
    code_rate      that of the codes of a quantised model, in codes, by default 0.01; at 0 they stay what they are
    warmup         share of the steps in which the rate rises to it; afterwards it falls to a tenth along a cosine
    batch          sequences per step
    micro          sequences per forward; gradients of a step are added up
    kl, ce         weights of the KL to the teacher and of the cross entropy
    square_head    weight of SquareHead on the hidden states, a ratio for each forward; by default 1, of a quantised model 0
    every          which hidden states: those of every so many blocks, and the last
    clip           longest gradient
    average        what is measured and kept is the mean of the states so far, each of which counts so many times as much as the
                   one after it; at 0 it is the last state. By default 0, of a quantised model 0.95
    seed           of the order of sequences
    held_out       sequences that are not trained on but measured
    evaluations    how often they are measured
    saves          how often the state is saved
    recompute      forget activations within blocks and compute them again for the gradient: slower, in less memory
    """

    tokens: int | None = Field(None, ge=1, le=10**15)
    rate: float | None = Field(None, gt=0, le=1)
    code_rate: float | None = Field(None, ge=0, le=1)
    warmup: float = Field(0.03, ge=0, le=1)
    batch: int = Field(32, ge=1, le=1_000_000)
    micro: int = Field(8, ge=1)
    kl: float = Field(1.0, ge=0)
    ce: float = Field(0.0, ge=0)
    square_head: float | None = Field(None, ge=0)
    every: int = Field(4, ge=1)
    clip: float = Field(1.0, gt=0)
    average: float | None = Field(None, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**32)
    held_out: int = Field(8, ge=1)
    evaluations: int = Field(10, ge=1)
    saves: int = Field(10, ge=1)
    recompute: bool = False

    def fitted(self, *, quantized: bool) -> Self:
        """With what suits the student where nobody chose."""
        usual = _QUANTIZED if quantized else _SPARSE
        return self.model_copy(update={key: value for key, value in usual.items() if getattr(self, key) is None})


_SPARSE = {"tokens": 20_000_000, "rate": 1e-4, "code_rate": 0.0, "square_head": 1.0, "average": 0.0}
_QUANTIZED = {"tokens": 6_000_000, "rate": 1e-3, "code_rate": 0.01, "square_head": 0.0, "average": 0.95}


def schedule(step: int, steps: int, settings: TrainingSettings) -> float:
    """The share of the highest learning rate that a step has."""
    rising = max(1, round(settings.warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def sequences_of(step: int, count: int, batch: int, seed: int) -> list[int]:
    """Which of `count` sequences a step reads: permutation after permutation of all of them, cut into batches."""
    first = step * batch
    rounds = range(first // count, (first + batch - 1) // count + 1)
    order = np.concatenate([np.random.RandomState((seed, part)).permutation(count) for part in rounds])
    start = first - rounds[0] * count
    return [int(index) for index in order[start : start + batch]]


class Trainer:
    """One training in progress. `step` counts the finished steps."""

    def __init__(
        self, student: Student, teacher: Reader, texts: tuple[Tensor, Tensor], settings: TrainingSettings, team: Team
    ) -> None:
        self.student, self.teacher, self.settings, self.team = student, teacher, settings, team
        self._train, self._held_out = texts
        assert settings.tokens is not None, "an amount that nobody chose"
        self.steps = max(1, round(settings.tokens / (settings.batch * self._train.shape[1])))
        self.step = 0
        self._trained = student.trained()
        fused = team.device.type == "cuda"
        codes = [parameter for name, parameter in self._trained.items() if name.endswith(OFFSET)]
        others = [parameter for name, parameter in self._trained.items() if not name.endswith(OFFSET)]
        groups = [{"params": others, "top": settings.rate}, *([{"params": codes, "top": settings.code_rate}] if codes else [])]
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self._mean: dict[str, Tensor] = {}
        if settings.average:
            self._mean = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self._narrow = torch.bfloat16 if team.device.type == "cuda" else torch.float32
        self.measured: list[tuple[int, float]] = []
        self.stopped = ""
        self._best: dict[str, Tensor] = {}
        self._said = ""

    @property
    def best_step(self) -> int:
        """The step whose state is the result: that of the least held-out KL."""
        return min(self.measured, key=lambda each: each[1])[0]

    def run(self, emit: Emit, save: Callable[[], None]) -> None:
        """Take all steps that are left, and end in the best state; a loss that is no number is an early end."""
        try:
            self._run(emit, save)
        except NumericalError as error:
            if not self._best:
                raise
            self.stopped = f"training stopped ({error.message}); the state of step {self.best_step} is kept"
            emit(Event("note", self.stopped))
        with torch.no_grad():
            for name, value in self._best.items():
                self._trained[name].copy_(value)

    def _run(self, emit: Emit, save: Callable[[], None]) -> None:
        heads = self.heads()
        measure_at, save_at = _marks(self.steps, self.settings.evaluations), _marks(self.steps, self.settings.saves)
        if not self.measured:
            self.measure(heads, emit)
        first, begin = self.step, time.perf_counter()
        losses = torch.zeros(3, device=self.team.device)
        since = 0
        while self.step < self.steps:
            losses += self.take(heads)
            self.step, since = self.step + 1, since + 1
            if since == _SPEAK_EVERY or self.step in save_at | measure_at:
                self._speak(losses / since, (self.step - first) / max(time.perf_counter() - begin, 1e-9), emit)
                losses, since = torch.zeros_like(losses), 0
            if self.step in measure_at:
                self.measure(heads, emit)
            if self.step in save_at:
                save()

    def heads(self) -> tuple[Head, Head]:
        """The student's and the teacher's."""
        return self.student.head(self._narrow), self.teacher.head(self.teacher.model.dtype)

    def take(self, heads: tuple[Head, Head]) -> Tensor:
        """One step; returns its KL, CE and SquareHead."""
        settings, team = self.settings, self.team
        chosen = self._train[sequences_of(self.step, len(self._train), settings.batch, settings.seed)]
        parts = list(chosen.split(settings.micro))[team.rank :: team.size]
        total = torch.zeros(3, device=team.device)
        with rounded_once(self.student.model):
            for index, ids in enumerate(parts):
                if team.size > 1:
                    self.student.decoder.set_requires_gradient_sync(index + 1 == len(parts))
                total += self._compare(self._sent(ids), heads, 1 / len(parts)) / len(parts)
        torch.nn.utils.clip_grad_norm_(self._trained.values(), settings.clip)
        for group in self._adam.param_groups:
            group["lr"] = group["top"] * schedule(self.step, self.steps, settings)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._average()
        return total

    @torch.no_grad()
    def _average(self) -> None:
        """Let the mean follow the state; at first faster, since it begins where nothing was learned."""
        assert self.settings.average is not None, "a share that nobody chose"
        past = min(self.settings.average, (self.step + 1) / (self.step + 10))
        for name, mean in self._mean.items():
            mean.lerp_(self._trained[name].detach(), 1 - past)

    @contextmanager
    def _in_the_mean(self) -> Iterator[None]:
        """Within, the parameters are the mean of the states so far, if there is one."""
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self._mean.items():
            value = self._trained[name].detach().clone()
            self._trained[name].copy_(mean)
            mean.copy_(value)

    def _compare(self, ids: Tensor, heads: tuple[Head, Head], share: float) -> Tensor:
        """Add `share` of the gradient of one micro-batch; returns its losses."""
        settings = self.settings
        with torch.no_grad():
            goal = self.teacher.read(ids)
        with self._autocast():
            seen = self.student.read(ids)
        found = head_losses(seen.last.detach(), goal.last, ids, heads, kl=settings.kl, ce=settings.ce)
        roots, gradients = [seen.last], [found.gradient * share]
        square = torch.zeros((), device=ids.device)
        if settings.square_head:
            square = square_head(seen.chosen, goal.chosen)
            roots.append(square)
            gradients.append(torch.full_like(square, settings.square_head * share))
        torch.autograd.backward(roots, gradients)
        return torch.stack((found.kl.float(), found.ce.float(), square.detach()))

    def _sent(self, ids: Tensor) -> Tensor:
        """Token ids on the device, without waiting for what it does."""
        device = self.team.device
        return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.team.device.type == "cuda")

    @torch.no_grad()
    def measure(self, heads: tuple[Head, Head], emit: Emit) -> None:
        """The KL on what is not trained on."""
        with self._in_the_mean():
            self._measure(heads, emit)

    def _measure(self, heads: tuple[Head, Head], emit: Emit) -> None:
        total = torch.zeros((), dtype=torch.float64, device=self.team.device)
        with rounded_once(self.student.model):
            for part in self._held_out.split(self.settings.micro):
                ids = self._sent(part)
                with self._autocast():
                    seen = self.student.read(ids)
                total += head_losses(seen.last, self.teacher.read(ids).last, ids, heads).kl * len(part)
        put_back(self.team, self.student.decoder)
        self.team.tell(total, 0)  # a last bit must not make processes keep different states
        kl = float(total) / len(self._held_out)
        self._check(kl)
        self.measured.append((self.step, kl))
        if self.best_step == self.step:
            self._best = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        said = f"step {self.step} of {self.steps}: held-out KL {kl:.4f}{self._said}"
        emit(Event("note", said, data={"step": self.step, "held_out_kl": kl}))
        worse = [step for step, each in self.measured if each > _WORSE * self.measured[0][1]]
        if worse == [self.step]:
            emit(Event("note", f"held-out KL has more than doubled: a lower rate than {self.settings.rate} may learn more"))

    def _speak(self, losses: Tensor, rate: float, emit: Emit) -> None:
        """Say how it goes, at `rate` steps a second; a loss that is no number ends the run, the last saved state intact."""
        kl, ce, square = self.team.mean(losses).tolist()
        self._check(kl, ce, square)
        seconds, speed = (self.steps - self.step) / rate, rate * self.settings.batch * self._train.shape[1]
        data = {"kl": kl, "ce": ce, "square_head": square, "tokens_per_s": speed, "eta_s": seconds}
        emit(Event("progress", "steps", self.step, self.steps, data))
        told = f"KL {kl:.4f}, {speed:.0f} tokens/s"
        emit(Event("progress", told))
        self._said = f"; {told}, {seconds:.0f} s left" if self.step < self.steps else f"; {told}"

    def _check(self, *losses: float) -> None:
        """A held-out loss is looked at too, because the last step of all is followed by no other."""
        if not all(map(math.isfinite, losses)):
            raise NumericalError(
                f"the loss is not finite at step {self.step} of {self.steps}",
                hint="repeat with a lower `--rate`; what was saved before is kept until then",
            )

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a saved state holds, whole. Where several processes train, all of them have to ask."""
        for name, parameter in self._trained.items():
            yield f"{name}|value", whole(parameter.detach()).cpu()
            moments = self._adam.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                yield f"{name}|{moment}", whole(moments[moment]).cpu()
            if self._mean:
                yield f"{name}|mean", whole(self._mean[name]).cpu()
            if self._best:
                yield f"{name}|best", whole(self._best[name]).cpu()

    @property
    def trained_bytes(self) -> int:
        """Bytes of what learns."""
        return sum(parameter.nbytes for parameter in self._trained.values())

    def facts(self) -> dict[str, Any]:
        """The rest of a saved state."""
        return {"step": self.step, "measured": self.measured}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.step, self.measured = facts["step"], [(step, kl) for step, kl in facts["measured"]]
        for name, parameter in self._trained.items():
            fill_share(parameter, tensors[f"{name}|value"])
            moments: dict[str, Tensor] = {
                "step": torch.tensor(float(self.step), device=parameter.device if self._adam.defaults["fused"] else "cpu")
            }
            for moment in ("exp_avg", "exp_avg_sq"):
                moments[moment] = torch.zeros_like(parameter)
                fill_share(moments[moment], tensors[f"{name}|{moment}"])
            self._adam.state[parameter] = moments
            if self._mean:
                fill_share(self._mean[name], tensors[f"{name}|mean"])
            if (best := tensors.get(f"{name}|best")) is not None:
                self._best[name] = parameter.detach().clone()
                fill_share(self._best[name], best)


def _marks(steps: int, count: int) -> frozenset[int]:
    """`count` steps at equal distances, the last among them."""
    return frozenset(math.ceil(steps * (index + 1) / count) for index in range(count))
