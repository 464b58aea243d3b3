"""How fast a model of true shapes learns: the real training step on random weights and random tokens, nothing on disk.

Student and teacher have as many blocks of a well-known model as are asked for. A step is timed with these blocks and with none,
so a step of the whole model follows: what blocks do not decide, and so much for each block. What a token needs, in operations:

    8 · weights of the blocks' linears    2 each for teacher, student, gradient of inputs and gradient of weights
    6 · weights of the head               2 each for teacher, student and gradient of inputs; the head does not learn
    8 · seqlen · width of attention       for each block: scores and values of half of the window, forward twice and back

That over the time and over the rate of a large 16-bit product here and now is the share of the peak. Work that is done twice
(`recompute`) is not counted twice.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from marlin_tools.algorithms.masks import magnitude
from marlin_tools.bench.decoding import empty_model, fill_randomly
from marlin_tools.checkpoint.cards import shapes_of
from marlin_tools.distributed.device import DeviceName, describe_device, matmul_rate, pick_device
from marlin_tools.distributed.team import Team
from marlin_tools.errors import DeviceError, ModelError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.families.family import Family
from marlin_tools.quantized import LEVELS, QuantizedLinear
from marlin_tools.settings import Settings
from marlin_tools.training.loop import Trainer, TrainingSettings
from marlin_tools.training.scaled import ScaledLinear, free_codes
from marlin_tools.training.student import Reader, Student, recompute

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GROUP = 128
_WARM = 2
"""Steps before the first one that counts: the optimizer makes its state, and memory is found."""


class BenchFinetuneSettings(Settings):
    """What learns, and from how much.

    shape, layers   so many blocks of this model; 0: all
    student         "int4" learns scales and norms, "int4-codes" codes as well, "2:4" the kept weights of a 16-bit model
    batch, micro    windows of `seqlen` tokens for each step, and for each forward
    steps           how many steps are timed; the median counts
    recompute       as in `finetune`
    """

    shape: str = "llama2-7b"
    layers: int = Field(default=4, ge=0)
    student: Literal["int4", "int4-codes", "2:4"] = "int4"
    seqlen: int = Field(default=2048, ge=2)
    batch: int = Field(default=8, ge=1)
    micro: int = Field(default=4, ge=1)
    steps: int = Field(default=5, ge=1)
    recompute: bool = False
    device: DeviceName = "auto"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seqlen


@dataclass(frozen=True)
class Measured:
    """A step: seconds, operations, and on a GPU the most memory that was in use, in GB."""

    seconds: float
    operations: float
    gpu_gb: float | None


@dataclass(frozen=True)
class FinetuneBench:
    """What came out.

    layers, of      blocks that were there, and blocks of the whole model
    full, bare      a step with these blocks, and with none
    rate            operations per second of a large product in 16 bits (float32 on a CPU)
    """

    settings: BenchFinetuneSettings
    device: str
    layers: int
    of: int
    full: Measured
    bare: Measured
    rate: float

    @property
    def whole(self) -> Measured:
        """A step of the whole model: measured, or with more blocks of the same kind."""
        if self.layers == self.of:
            return self.full
        more, full, bare = (self.of - self.layers) / self.layers, self.full, self.bare
        memory = None
        if full.gpu_gb is not None and bare.gpu_gb is not None:
            memory = full.gpu_gb + more * (full.gpu_gb - bare.gpu_gb)
        operations = full.operations + more * (full.operations - bare.operations)
        return Measured(full.seconds + more * (full.seconds - bare.seconds), operations, memory)

    @property
    def block(self) -> float:
        """Seconds that one more block takes."""
        return (self.full.seconds - self.bare.seconds) / self.layers

    def share(self, step: Measured) -> float:
        """Of the rate of a large product."""
        return step.operations / step.seconds / self.rate

    def speed(self, step: Measured) -> float:
        """Tokens per second."""
        return self.settings.tokens / step.seconds

    @property
    def name(self) -> str:
        """Of its files."""
        return f"bench-finetune-{self.settings.shape.rpartition('/')[2]}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        facts = asdict(self) | {"settings": self.settings.model_dump(), "seconds_per_block": self.block}
        for name, step in (("measured", self.full), ("whole", self.whole)):
            facts[name] = asdict(step) | {"tokens_per_s": self.speed(step), "share_of_peak": self.share(step)}
        return facts


def bench_finetune(settings: BenchFinetuneSettings, emit: Emit = silent) -> FinetuneBench:
    """Take some steps with all blocks that are asked for, then without any."""
    card = shapes_of(settings.shape, settings.layers)
    family, device = find_family(card), pick_device(settings.device)
    if any(branch.experts is not None for branch in family.branches):
        raise ModelError(f"`{settings.shape}` is a mixture of experts", hint="dense models can be timed: llama2-7b, llama3-8b")
    if settings.batch % settings.micro:
        raise ModelError(
            f"batch {settings.batch} is not a multiple of micro {settings.micro}",
            hint="choose `--batch` and `--micro` so that it is",
        )
    layers = settings.layers or int(card["num_hidden_layers"])
    try:
        full, bare = _measure(settings, card | {"num_hidden_layers": layers}, family, device, emit)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"training {layers} blocks does not fit into the memory of {device}",
            hint="lower `--layers` or `--micro`, or `--recompute`",
        ) from error
    rate = matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return FinetuneBench(settings, describe_device(device), layers, int(card["num_hidden_layers"]), full, bare, rate)


def _measure(
    settings: BenchFinetuneSettings, card: dict[str, Any], family: Family, device: torch.device, emit: Emit
) -> tuple[Measured, Measured]:
    """A step with all blocks, and one with none."""
    how = TrainingSettings(
        tokens=settings.tokens * (settings.steps + _WARM),
        batch=settings.batch,
        micro=settings.micro,
        held_out=settings.micro,
        code_rate=None if settings.student == "int4-codes" else 0.0,
        recompute=settings.recompute,
    ).fitted(quantized=settings.student != "2:4")
    every = how.every if how.square_head else 0
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        teacher = empty_model(card, dtype)
        fill_randomly(teacher, device)
        emit(Event("note", f"made {settings.shape} with random weights; the tokens are random, too"))
        student = _student(settings, card, family, teacher, every)
        windows = torch.randint(3, int(card["vocab_size"]), (settings.batch + settings.micro, settings.seqlen))
    texts, team = (windows[: settings.batch], windows[settings.batch :]), Team(device=device)
    found = []
    for name in ("steps with blocks", "steps without"):
        trainer = Trainer(student, Reader(teacher, family, every), texts, how, team)

        def told(done: int, name: str = name) -> None:
            emit(Event("progress", name, done, _WARM + settings.steps))

        seconds, gpu_gb = _timed(trainer, settings.steps, told)
        found.append(Measured(seconds, _operations(settings, teacher, family), gpu_gb))
        del trainer
        for model in (teacher, student.model):
            setattr(model.get_submodule(family.decoder), family.blocks, nn.ModuleList())
    return found[0], found[1]


def _student(
    settings: BenchFinetuneSettings, card: dict[str, Any], family: Family, teacher: "PreTrainedModel", every: int
) -> Student:
    """A model of the same shapes that has something to learn."""
    device, model = teacher.device, empty_model(card, torch.float32)
    names = [name for name, _ in _linears(model, family)]
    if settings.student != "2:4":
        for name, linear in _linears(model, family):
            model.set_submodule(name, _scaled(linear, device))
    fill_randomly(model, device)
    if settings.student == "2:4":
        for _, linear in _linears(model, family):
            linear.weight.data.mul_(magnitude(linear.weight.data))
    if settings.student == "int4-codes":
        free_codes(model, teacher)
    student = Student(model, family, every, frozenset(names if settings.student == "2:4" else ()))
    if settings.recompute:
        recompute(student)
    return student


def _linears(model: nn.Module, family: Family) -> list[tuple[str, nn.Linear]]:
    """Those of the blocks, by their names in the model."""
    blocks = f"{family.decoder}.{family.blocks}."
    return [(name, part) for name, part in model.named_modules() if name.startswith(blocks) and isinstance(part, nn.Linear)]


def _scaled(linear: nn.Linear, device: torch.device) -> ScaledLinear:
    """Any codes, and scales as those of a quantised normal weight."""
    n, k = linear.out_features, linear.in_features
    size = _GROUP if k % _GROUP == 0 else k
    codes = torch.randint(0, LEVELS, (n, k), dtype=torch.uint8, device=device)
    scales = (torch.rand(n, k // size, device=device) * 0.004 + 0.004).half()
    bias = nn.Parameter(torch.zeros(n, device=device)) if "bias" in dict(linear.named_parameters()) else None
    return ScaledLinear(QuantizedLinear(codes, scales, size), bias, torch.float16)


def _operations(settings: BenchFinetuneSettings, teacher: "PreTrainedModel", family: Family) -> float:
    """Of a step, with the blocks that are there; see the top of this file."""
    config, head = teacher.config, teacher.get_submodule(family.head).weight
    weights = sum(linear.weight.numel() for _, linear in _linears(teacher, family))
    blocks = len(getattr(teacher.get_submodule(family.decoder), family.blocks))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = blocks * settings.seqlen * config.num_attention_heads * size
    assert isinstance(head, torch.Tensor)
    return float(settings.tokens * (8 * weights + 6 * head.numel() + 8 * attention))


def _timed(trainer: Trainer, steps: int, done: Callable[[int], None]) -> tuple[float, float | None]:
    """The median of the seconds of a step, and the most memory in use."""
    device = trainer.team.device
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    heads, times = trainer.heads(), []
    trainer.measure(heads, silent)
    for number in range(_WARM + steps):
        begin = time.perf_counter()
        trainer.take(heads)
        wait()
        times.append(time.perf_counter() - begin)
        done(number + 1)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return median(times[_WARM:]), peak
