"""Stage `export`: a quantised checkpoint in another weight format, bit for bit the same weights, without the base model.

    export("runs/llama2-7b-int4", "gptq", "runs/llama2-7b-gptq")

Linear by linear, `target.pack(source.unpack(...))`; every other tensor and file is taken over unchanged, and shards stay what
they are. Checkpoints of other tools work as well as ours. What could stop the conversion is looked for before it begins.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from marlin_tools.checkpoint.headers import read_header
from marlin_tools.checkpoint.journal import begin_anew, fingerprint_of
from marlin_tools.checkpoint.manifest import holds, read_manifest, write_manifest
from marlin_tools.checkpoint.output import OutputDirectory, check_output
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import check_finite
from marlin_tools.checkpoint.writer import ModelWriter, check_companions
from marlin_tools.errors import FormatError, ModelError, counted
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import known_family
from marlin_tools.families.experts import shell, stored_shapes
from marlin_tools.families.layout import Layout, refuse_strangers
from marlin_tools.formats import FORMATS, Format, FormatName, get_format
from marlin_tools.formats.config import with_activations, with_group_sizes
from marlin_tools.formats.contents import Contents
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.stage import Outlook, Stage, StagePlan, Work

SHARD_BYTES = 2 << 30
"""Larger shards are cut: this much is in memory at a time."""

_OWN_FACTS = {"tool", "stage", "fingerprint", "format", "versions", "warnings", "files", "times", "source"}
"""What an export's manifest says for itself; everything else is carried over."""


def export(
    source: str | Path | Checkpoint,
    format: str,  # noqa: A002 (the word for it everywhere)
    out: str | Path,
    *,
    emit: Emit = silent,
    overwrite: bool = False,
) -> Checkpoint:
    """Write the quantised model `source` to the directory `out` in `format`; its own format makes a copy."""
    emit(Event("stage", "export"))
    target = get_format(format)
    checkpoint = Checkpoint.open(source)
    work = _Conversion(checkpoint, target, emit)
    work.check()
    check_output(out, (checkpoint.path,), overwrite=True)
    run = fingerprint_of(stage="export", source=checkpoint.fingerprint, format=format)
    if not overwrite and holds(Path(out), run):
        emit(Event("note", f"`{out}` already holds this result; nothing to do"))
        return Checkpoint.open(out)
    facts = work.facts(run)
    with OutputDirectory(out, overwrite=overwrite, resume=True, sources=(checkpoint.path,)) as output:
        begin_anew(output)
        begin = time.perf_counter()
        work.run(output)
        write_manifest(output, "export", facts, {"seconds": round(time.perf_counter() - begin, 3)}, work.warnings)
        output.publish()
    emit(Event("result", f"`{out}` holds {counted(len(work.contents.grids), 'linear')} as `{format}`"))
    return Checkpoint.open(out)


class ExportStage(Stage):
    """Write the quantised model in other formats."""

    stage: Literal["export"] = "export"
    formats: tuple[FormatName, ...] = Field(min_length=1)

    @property
    def makes(self) -> tuple[str, ...]:
        """A model in each format."""
        return self.formats

    def plan(self, outlook: Outlook) -> StagePlan:
        """Limits are looked at when the codes are known, or by `quantize` in the same recipe."""
        return StagePlan((("formats", ", ".join(self.formats)),))

    def run(self, work: Work) -> dict[str, Any]:
        """One format after the other, once all of them can hold the model."""
        for name in self.formats if len(self.formats) > 1 else ():
            _Conversion(work.model, get_format(name), silent).check()
        for name, path in work.outputs.items():
            with work.clock("export", path):
                export(work.model, name, path, emit=work.emit, overwrite=work.overwrite)
        return {}


class _Conversion:
    """One source, one target."""

    def __init__(self, checkpoint: Checkpoint, target: Format, emit: Emit) -> None:
        self.source, self.target, self.emit = checkpoint, target, emit
        self.stored = StoredLinears(checkpoint)
        self.contents = Contents(checkpoint)
        self.reference = checkpoint.path / "verify" / "reference.safetensors"
        self.manifest = read_manifest(checkpoint.path)
        self.warnings: list[str] = (self.manifest or {}).get("warnings", [])

    def check(self) -> None:
        """Refuse what the target cannot hold, naming the linears."""
        grids = self.contents.grids
        if not grids:
            raise FormatError(f"`{self.source.origin}` holds no quantised linears", hint="see `marlin-tools inspect`")
        if strange := self._strange():
            raise FormatError(
                f"`{strange[0]}` belongs to a quantised linear, and `{self.stored.format.name}` has no such tensor"
                + (f"; and {len(strange) - 1} more" if len(strange) > 1 else ""),
                hint="what it changes is not known, so nothing can stand for it; start from the unquantized model",
            )
        if (self.source.quantization or {}).get("kv_cache_scheme"):
            raise FormatError("`quantization_config`: `kv_cache_scheme` cannot be carried over", hint="remove it, then export")
        sizes = self.contents.group_sizes
        if len(sizes) > 1 and not self.target.mixes:
            raise FormatError(
                f"`{self.source.origin}` mixes group sizes: {', '.join(map(str, sorted(sizes)))}",
                hint=f"`{self.target.name}` can name only one: export to `compressed-tensors`, or quantise again with one",
            )
        self.target.admit_activations(self.contents.activations)
        self._check_model()
        check_companions(self.source)
        if self.reference.is_file():
            self._check_reference()
        check_finite(self.source, self.source.names())
        self._refuse({name: reason for name, grid in grids.items() if (reason := self.target.limits(*grid))})
        if self._depends_on_values():
            self.emit(Event("note", f"looking whether `{self.target.name}` can hold every value"))
            self._refuse({name: reason for name in grids if (reason := self._rehearse(name))})

    def _check_model(self) -> None:
        """Refuse what is no model, or has tensors that none reads, as whoever loads the result would; if its type is known."""
        if known_family(self.source.config) is None:
            return
        model = shell(self.source, torch.float16)
        expected = stored_shapes(Layout(self.source), model)
        linears = [name for name in self.stored.names if f"{name}.weight" in expected]
        codes = {f"{name}.{suffix}" for name in linears for suffix in self.stored.format.suffixes}
        refuse_strangers(self.source, model, expected.keys() | codes)

    def _check_reference(self) -> None:
        """Refuse one that cannot be copied, or that `verify` could not compare with."""
        try:
            read_header(self.reference)
        except ModelError as error:
            raise ModelError(error.message, hint="make it readable, or remove it: `verify` then does without") from error

    def _strange(self) -> list[str]:
        """Tensors of quantised linears that are neither of their format nor a bias: zero points, an order of the inputs."""
        rest = (name for name in self.source.names() if name not in self.stored.tensors and not name.endswith(".bias"))
        return [name for name in rest if name.rpartition(".")[0] in self.contents.grids]

    def _depends_on_values(self) -> bool:
        """Whether headers are not enough: the target wants 2:4, or scales may have to change their type."""
        any_grid = next(iter(self.contents.grids.values()))
        names = (f"{name}.{suffix}" for name in self.contents.grids for suffix in self.stored.format.suffixes)
        types = {dtype for name in names if (dtype := self.source.stored(name).dtype).is_floating_point}
        wants_sparse = self.target.limits(*any_grid, sparse=False) is not None
        return wants_sparse or types | {self.source.dtype} != {torch.float16}

    def _rehearse(self, name: str) -> str | None:
        try:
            self._convert(name)
        except FormatError as error:
            return error.message.removeprefix(f"format `{self.target.name}`: ")
        return None

    def _refuse(self, reasons: dict[str, str]) -> None:
        if reasons:
            first = "; ".join(f"`{name}`: {reason}" for name, reason in list(reasons.items())[:3])
            more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            raise FormatError(
                f"`{self.target.name}` cannot hold {first}{more}",
                hint=f"choose another `--format`: {', '.join(name for name in FORMATS if self._takes(FORMATS[name]))}",
            )

    def _takes(self, other: Format) -> bool:
        """Whether another format can hold all linears, by their sizes; one that wants 2:4, by their codes as well."""
        if other is self.target or (len(self.contents.group_sizes) > 1 and not other.mixes):
            return False
        grids = self.contents.grids
        if any(other.limits(*grid) for grid in grids.values()):
            return False
        wants_sparse = any(other.limits(*grid, sparse=False) for grid in grids.values())
        return not wants_sparse or all(self.stored.read(name).is_2_4() for name in grids)

    def _convert(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.{key}": t for key, t in self.target.pack(self.stored.read(name), self.source.dtype).items()}

    def run(self, output: OutputDirectory) -> None:
        """Write all shards, the files that make it a model, and the reference that `verify` compares with."""
        shards = list(self._shards())
        writer = ModelWriter(output, len(shards))
        linears = self.contents.grids
        for index, units in enumerate(shards):
            tensors: dict[str, Tensor] = {}
            for unit in units:
                tensors |= self._convert(unit) if unit in linears else {unit: self.source.read(unit)}
            writer.write_shard(index, dict(sorted(tensors.items())))
            self.emit(Event("progress", "shards", index + 1, len(shards)))
        if self.reference.is_file():
            output.write_bytes("verify/reference.safetensors", self.reference.read_bytes())
        sizes = self.contents.sizes
        config = with_group_sizes(self.target.quantization_config(max(sizes.values()), self._ignored()), sizes)
        writer.finish(self.source, with_activations(config, self.contents.activations))

    def _shards(self) -> Iterator[list[str]]:
        """Names of linears and of other tensors, shard by shard as in the source; a linear lies where its codes lie."""
        codes = f".{self.stored.format.suffixes[0]}"
        files: dict[Path, list[str]] = {}
        for name in self.source.names():
            linear = name.removesuffix(codes)
            if linear in self.contents.grids or name not in self.stored.tensors:
                files.setdefault(self.source.stored(name).file, []).append(linear)
        for file in sorted(files):
            units: list[str] = []
            size = 0
            for unit in files[file]:
                stored = self.source.stored(unit + codes if unit in self.contents.grids else unit)
                if units and size + stored.nbytes > SHARD_BYTES:
                    yield units
                    units, size = [], 0
                units.append(unit)
                size += stored.nbytes
            yield units

    def _ignored(self) -> list[str]:
        """The linears that stay unquantised; a tied head is one though no tensor shows it."""
        family = known_family(self.contents.checkpoint.config)
        head = family.head if family else "lm_head"
        plain = [name for name in self.contents.plain if name != head]
        return plain if head in self.contents.grids else [*plain, head]

    def facts(self, run: str) -> dict[str, Any]:
        """The source's own manifest, as far as it still holds; for a checkpoint of another tool, what can be seen."""
        manifest = self.manifest or {
            "model": {"origin": self.source.origin, "fingerprint": self.source.fingerprint},
            "calibration": None,
            "solver": None,
            "linears": [{"name": name, "shape": [grid.n, grid.k]} for name, grid in self.contents.grids.items()],
            "kept": dict.fromkeys(self.contents.plain, "as in the source"),
        }
        return {
            "fingerprint": run,
            **{key: value for key, value in manifest.items() if key not in _OWN_FACTS},
            "format": self.target.name,
            "source": {
                "fingerprint": self.source.fingerprint,
                "format": self.stored.format.name,
                **{key: manifest[key] for key in ("tool", "stage", "versions", "source") if key in manifest},
            },
        }
