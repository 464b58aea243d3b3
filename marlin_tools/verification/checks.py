"""What `verify` finds in the files of a quantised checkpoint, without running the model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marlin_tools.checkpoint.headers import INDEX
from marlin_tools.checkpoint.manifest import file_hashes, read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import skeleton
from marlin_tools.checkpoint.strict_json import read_object
from marlin_tools.errors import FormatError, MarlinToolsError, ModelError
from marlin_tools.families import find_family
from marlin_tools.families.experts import shell, stored_shapes
from marlin_tools.families.layout import Layout, strangers
from marlin_tools.formats import find_format
from marlin_tools.formats.contents import Contents, declared_sizes, ignores, keeps
from marlin_tools.formats.gptq import Gptq
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import unpack_nibbles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `detail` names what is wrong, or says what was found; `skipped` if there was nothing."""

    name: str
    ok: bool
    detail: str
    skipped: bool = False

    @property
    def result(self) -> str:
        """In a word."""
        return "skipped" if self.skipped else "ok" if self.ok else "FAILED"


def judge(name: str, problems: list[str], fine: str) -> Check:
    """Failed with the first three problems, or fine."""
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return Check(name, not problems, "; ".join(problems[:3]) + more if problems else fine)


def check_files(checkpoint: Checkpoint) -> Check:
    """Opening has found every shard as long as its header says, and every tensor where the index has it."""
    index, names = checkpoint.path / INDEX, checkpoint.names()
    known = read_object(index)["weight_map"] if index.is_file() else names
    problems = [f"the index does not know `{name}`" for name in names if name not in known]
    return judge("files", problems, f"{len(names)} tensors, {checkpoint.nbytes / 1e6:.1f} MB")


def check_config(checkpoint: Checkpoint) -> Check:
    """Whether config.json describes a model that can be read, and the quantised linears that are there."""
    declared = checkpoint.quantization or {}
    try:
        find_family(checkpoint.config)
        layout = find_format(declared)
        skeleton(checkpoint, checkpoint.dtype)
        contents = Contents(checkpoint)
        grids = contents.grids
    except MarlinToolsError as error:
        return Check("config", ok=False, detail=error.message)
    problems = [] if grids else [f"no linear is stored as `{layout.name}`, which `quantization_config` names"]
    problems += [f"`{name}` is quantised, `quantization_config` says it is not" for name in grids if ignores(declared, name)]
    problems += [
        f"`{name}` has groups of {grid.group_size}, `quantization_config` says {_listing(sizes)}"
        for name, grid in grids.items()
        for sizes in (declared_sizes(declared, name),)
        if grid.group_size not in sizes and not (grid.group_size == grid.k and -1 in sizes)
    ]
    found = _listing(contents.group_sizes)
    reads = ", FP8 activations" if contents.activations == "fp8" else ""
    return judge("config", problems, f"{checkpoint.config['model_type']}, `{layout.name}`, group_size {found}{reads}")


def _listing(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))


class Subject:
    """A checkpoint whose headers can be read, under examination."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.layout = Layout(checkpoint)
        self.stored = StoredLinears(checkpoint)
        self.contents = Contents(checkpoint)
        self.grids = self.contents.grids
        self.manifest = read_manifest(checkpoint.path) or {}

    def inventory(self) -> Check:
        """Every tensor of the model is there, every linear is quantised or meant not to be, and nothing is left over."""
        names = set(self.checkpoint.names())
        model = shell(self.checkpoint, torch.float16)
        expected = stored_shapes(self.layout, model)
        problems = []
        for name, grid in self.grids.items():
            shape = expected.pop(f"{name}.weight", None)
            if shape is None and self.layout.foreign(name):
                continue  # of something beside the language model, which the model has not
            if shape != (grid.n, grid.k):
                problems.append(f"`{name}` is {grid.n} x {grid.k}, the model has {shape or 'no such linear'}")
        for name, shape in expected.items():
            if name not in names:
                problems.append(f"`{name}` is missing")
            elif self.checkpoint.shape(name) != shape:
                problems.append(f"`{name}` is {list(self.checkpoint.shape(name))}, the model has {list(shape)}")
        left = strangers(self.checkpoint, model, expected.keys() | self.stored.tensors)
        problems += [f"`{name}` is unknown to the model" for name in left]
        plain = [name for name in self.layout.linears() if name not in self.grids]
        problems += [f"`{name}` is not quantised and not listed as kept" for name in plain if not self._kept(name)]
        problems += self._untied(model)
        try:
            self.checkpoint.tokenizer()
        except ModelError as error:
            problems.append(error.message)
        return judge("inventory", problems, f"{len(self.grids)} linears quantised, {len(plain)} kept, nothing left over")

    def _untied(self, model: "PreTrainedModel") -> Iterator[str]:
        """A head beside the embedding that it should be: transformers reads it, vLLM does not.

        Of a model within another both say whether it should; where one says no, the head is read.
        """
        family = self.layout.family
        head, embedding = f"{family.head}.weight", f"{family.stored or family.decoder}.{family.embedding}.weight"
        says = getattr(model.config, "tie_word_embeddings", False) and self.layout.config.get("tie_word_embeddings")
        tied = says and head in self.checkpoint and embedding in self.checkpoint
        if tied and not torch.equal(self.checkpoint.read(head), self.checkpoint.read(embedding)):
            yield f"`{head}` is not `{embedding}`, `tie_word_embeddings` says it is: vLLM would read the latter"

    def _kept(self, name: str) -> bool:
        return name in self.manifest.get("kept", {}) or keeps(self.checkpoint.quantization or {}, name)

    def size(self) -> Check:
        """Whether the quantised linears take the space that their codes, 3 bits if 2:4 and else 4, and their scales take."""
        bits = 3 if self.stored.format.name == "marlin-24" else 4
        suffixes = self.stored.format.suffixes
        stored = sum(self.checkpoint.stored(f"{name}.{suffix}").nbytes for name in self.grids for suffix in suffixes)
        full = sum(2 * grid.n * grid.k for grid in self.grids.values())
        expected = sum(2 * grid.n * grid.k * (bits / 16 + 1 / grid.group_size) for grid in self.grids.values())
        sizes = _listing(self.contents.group_sizes)
        detail = f"linears take {stored / full:.1%} of 16 bits, {expected / full:.1%} expected for group_size {sizes}"
        return Check("size", abs(stored / expected - 1) < 0.1, detail)

    def values(self) -> Iterator[Check]:
        """Scales, zero points and codes of every linear, one linear in memory at a time."""
        problems: dict[str, list[str]] = {"scales": [], "zero points": [], "codes": []}
        sparse = 0
        for name in self.grids:
            tensors = self.stored.raw(name)
            problems["scales"] += _bad_scales(name, tensors)
            if wrong := self._wrong_zeros(name, tensors):
                problems["zero points"].append(wrong)
                continue
            try:
                sparse += self.stored.read(name).is_2_4()
            except FormatError as error:
                problems["codes"].append(error.message)
        yield judge("scales", problems["scales"], "all finite and nonzero")
        if isinstance(self.stored.format, Gptq):
            yield judge("zero points", problems["zero points"], f"{self.stored.format.stored_zero} everywhere")
        ordered = isinstance(self.stored.format, Gptq) and (self.checkpoint.quantization or {}).get("desc_act")
        said = ", `desc_act` is true and `g_idx` permutes nothing" if ordered else ""
        yield judge("codes", problems["codes"], f"all legal, {sparse} of {len(self.grids)} linears 2:4 sparse{said}")

    def _wrong_zeros(self, name: str, tensors: Mapping[str, Tensor]) -> str | None:
        """What stands in the place of the zero point that this version of `gptq` stores."""
        if not isinstance(self.stored.format, Gptq):
            return None
        right = self.stored.format.stored_zero
        found = unpack_nibbles(tensors["qzeros"])
        wrong = found[found != right]
        return f"`{name}.qzeros` holds {int(wrong[0])}, not {right}" if len(wrong) else None

    def hashes(self) -> Check:
        """Whether the files are those that the manifest was written beside."""
        recorded: dict[str, str] = self.manifest.get("files", {})
        if not recorded:
            return Check("hashes", ok=True, detail="no manifest with hashes", skipped=True)
        found = file_hashes(self.checkpoint.path)
        problems = [
            f"`{name}` is {'not what was written' if name in found else 'missing'}"
            for name, value in recorded.items()
            if found.get(name) != value
        ]
        return judge("hashes", problems, f"{len(recorded)} files are as they were written")


def _bad_scales(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Scales that are infinite, NaN or zero."""
    problems = []
    for suffix, tensor in tensors.items():
        bad = tensor[~torch.isfinite(tensor) | (tensor == 0)] if tensor.is_floating_point() else tensor[:0]
        if bad.numel():
            problems.append(f"`{name}.{suffix}` holds {bad[0].item():g} ({bad.numel()} of {tensor.numel()})")
    return problems
