"""How long a model of true shapes takes to quantise: the real stage on random weights and random tokens, part by part.

A checkpoint with the shapes of a well-known model is written to disk, as many blocks of it as are asked for, and quantised by
the same function that quantises real ones. Its weights are random and so are the tokens; neither changes what has to be
computed. Beside the measured seconds of each part stands the least that this machine could take for it (`floor.py`).
"""

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field

from marlin_tools.algorithms import Preset
from marlin_tools.checkpoint.cards import Card, shapes_of
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.floor import least_seconds, works
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.device import DeviceName, describe_device, matmul_rate, pick_device
from marlin_tools.distributed.team import assembled
from marlin_tools.errors import ModelError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.settings import Settings
from marlin_tools.stopwatch import Stopwatch
from marlin_tools.stream.inventory import take_linears

BESIDE = frozenset({"read", "write"})
"""Parts that threads of their own do while the device computes."""

_STD = 0.02
_SPARE = 1.3
"""Disk for the model and its result, in models."""


class BenchQuantizeSettings(Settings):
    """What to quantise: `layers` blocks of `shape` (0: all), on `samples` windows of `seqlen` random tokens."""

    shape: str = "llama2-7b"
    layers: int = Field(default=0, ge=0)
    preset: Preset = "default"
    sparsity: Literal["2:4"] | None = None
    samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=2048, ge=1)
    device: DeviceName = "auto"

    @property
    def stage(self) -> QuantizeSettings:
        """What is timed."""
        return QuantizeSettings(preset=self.preset, sparsity=self.sparsity, device=self.device)


@dataclass(frozen=True)
class Part:
    """One part of the work: seconds in all, and the least that this machine could take; None where that means nothing."""

    name: str
    seconds: float
    least: float | None


@dataclass(frozen=True)
class QuantizeBench:
    """What came out.

    layers, of    blocks that were quantised, and blocks of the whole model
    process       seconds from the start of the process to the last byte on disk, less the making of the model
    blocks        seconds from block to block; the first one includes everything that is done once
    real, forecast    seconds, host_gb and gpu_gb of the stage, as they were and as they were expected
    """

    settings: BenchQuantizeSettings
    device: str
    layers: int
    of: int
    process: float
    blocks: tuple[float, ...]
    parts: tuple[Part, ...]
    real: dict[str, float]
    forecast: dict[str, float]

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.settings.samples * self.settings.seqlen

    @property
    def block(self) -> float:
        """Seconds of a block, once the stream flows."""
        return median(self.blocks[1:] or self.blocks)

    @property
    def whole(self) -> float:
        """Seconds of the whole model, from the start of the process: measured, or with more blocks of the same kind."""
        return self.process + (self.of - self.layers) * self.block

    @property
    def name(self) -> str:
        """Of its files."""
        return f"bench-quantize-{self.settings.shape.rpartition('/')[2]}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        facts = asdict(self) | {"settings": self.settings.model_dump(), "tokens": self.tokens}
        return facts | {"seconds_per_block": self.block, "seconds_of_the_whole_model": self.whole}


def bench_quantize(settings: BenchQuantizeSettings, emit: Emit = silent, *, folder: Path | None = None) -> QuantizeBench:
    """Make the checkpoint in `folder` (or where temporary files go), quantise it, and take both away again.

    Of several processes the first one makes it, and all quantise it.
    """
    card = shapes_of(settings.shape, settings.layers)
    blocks = int(card["num_hidden_layers"])
    device = pick_device(settings.device)
    before = _process_seconds()
    with assembled(device) as team, tempfile.TemporaryDirectory(dir=folder, prefix="marlin-tools-bench-") as own:
        emit = emit if team.leads else silent
        place = team.lines(own)[0]
        model = Path(place) / "model"
        begin = time.perf_counter()
        config = card | ({"num_hidden_layers": settings.layers} if settings.layers else {})
        if team.leads:
            write_random_model(config, model, device)
        team.wait()
        making = time.perf_counter() - begin
        emit(Event("note", f"made {settings.shape} with random weights in {making:.0f} s; the tokens are random, too"))
        checkpoint, out = Checkpoint.open(model), Path(place) / "out"
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, int(checkpoint.config["vocab_size"]), (settings.samples, settings.seqlen), generator=generator)
        tokens = TokenSet(tuple(ids), "random tokens", packed=True, documents=settings.samples)
        with Stopwatch(device) as watch:
            quantize(checkpoint, tokens, settings.stage, out, emit=emit)
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        process = before + time.perf_counter() - begin - making
        parts = tuple(_parts(checkpoint, settings, watch.seconds(), device))
        team.lines("done")  # nobody takes anything away before all have read it
    return QuantizeBench(
        settings=settings,
        device=describe_device(device) + (f", {team.size} processes (floors are those of one)" if team.size > 1 else ""),
        layers=int(config["num_hidden_layers"]),
        of=blocks,
        process=process,
        blocks=tuple(manifest["times"]["blocks_s"]),
        parts=parts,
        real=manifest["times"]["real"],
        forecast=manifest["times"]["forecast"],
    )


def write_random_model(config: dict[str, Any], folder: Path, device: torch.device) -> None:
    """A checkpoint of this config: one shard for each block, one for the rest. Every tensor has a seed of its own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    card = Card(config, "card")
    needed = card.nbytes
    free = shutil.disk_usage(folder).free
    if free < _SPARE * needed:
        raise ModelError(
            f"`{folder}` has {free / 1e9:.0f} GB free, the model and its result take {_SPARE * needed / 1e9:.0f} GB",
            hint="ask for fewer blocks with `--layers`, or point TMPDIR at a larger disk",
        )
    prefix = find_family(config).block_prefix
    blocks = range(int(config["num_hidden_layers"]))
    starts = {index: prefix(index) for index in blocks}
    shards = {index: [name for name in card.names() if name.startswith(start)] for index, start in starts.items()}
    taken = {name for names in shards.values() for name in names}
    shards[len(blocks)] = [name for name in card.names() if name not in taken]
    weight_map = {}
    generator = torch.Generator(device).manual_seed(0)
    for index, names in shards.items():
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            shape, dtype = card.shape(name), card.stored(name).dtype
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=dtype)
            else:
                tensors[name] = (torch.randn(shape, generator=generator, device=device) * _STD).to(dtype).cpu()
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _parts(
    checkpoint: Checkpoint, settings: BenchQuantizeSettings, seconds: dict[str, float], device: torch.device
) -> list[Part]:
    """What was measured beside what it must take."""
    quantizing = settings.stage
    inventory = take_linears(checkpoint, quantizing.ignore)
    rate = matmul_rate(device, checkpoint.dtype if device.type == "cuda" else torch.float32)
    least: dict[str, float] = {}
    for work, count in works(inventory, settings.samples * settings.seqlen, settings.seqlen):
        for name, value in least_seconds(work, quantizing.solver, rate, device).items():
            least[name] = least.get(name, 0.0) + value * count
    return sorted((Part(name, value, least.get(name)) for name, value in seconds.items()), key=lambda part: -part.seconds)


def _process_seconds() -> float:
    """How long this process has been running."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text(encoding="ascii").split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
