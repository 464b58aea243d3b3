"""A compressed model and the original that it learns from: whether they belong together, and what may change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.cards import SIZES
from marlin_tools.checkpoint.contract import EXPERTS, text_config
from marlin_tools.checkpoint.dequantized import dequantized
from marlin_tools.checkpoint.manifest import history, read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.distributed.device import processes
from marlin_tools.errors import ModelError, RecipeError
from marlin_tools.families import find_family, known_family
from marlin_tools.families.layout import Layout
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import is_2_4
from marlin_tools.stream.inventory import Inventory, take_linears
from marlin_tools.training.loop import TrainingSettings


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, and what is known of them before the work begins.

    layout   where the student's weights lie
    kept     its linears that are not compressed, with the reason
    sparse   those that are 2:4 in 16 bits and will stay it
    stored   those that are quantised, if the student is
    carried  what the student's manifest says of them that stays true
    """

    student: Checkpoint
    teacher: Checkpoint
    layout: Layout
    kept: Mapping[str, str]
    sparse: frozenset[str]
    stored: StoredLinears | None
    carried: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of the linears."""
        if self.stored is None:
            return {"sparsity": "2:4", "linears": [{"name": name} for name in sorted(self.sparse)], "kept": self.kept}
        shape_of, raw = self.stored.format.shape_of, self.stored.raw
        linears = [{"name": name, "shape": shape_of(raw(name))} for name in self.stored.names]
        return {"format": self.stored.format.name, "linears": linears, "kept": self.kept, **self.carried}


def pair(model: str | Path | Checkpoint, teacher: str, settings: TrainingSettings) -> Pair:
    """Check that the two belong together and that there is something to keep, before any work."""
    student, original = Checkpoint.open(model, accept=find_family), dequantized(Checkpoint.open(teacher, accept=find_family))
    check_pair(student, original, settings, quantized=student.quantization is not None)
    if student.quantization is not None:
        manifest = read_manifest(student.path) or {}
        carried = {key: manifest[key] for key in ("kept_dense",) if key in manifest}
        return Pair(student, original, Layout(student), manifest.get("kept", {}), frozenset(), StoredLinears(student), carried)
    check_mask(student)
    inventory = take_linears(student, ())
    return Pair(student, original, inventory.layout, inventory.kept, frozenset(_sparse_linears(inventory)), None)


def check_mask(student: Checkpoint) -> None:
    """Refuse a model without zeros to keep; reads no further than the first linear that has them."""
    if next(_sparse_linears(take_linears(student, ())), None) is None:
        raise ModelError(
            f"`{student.origin}` is not quantised and has no 2:4 sparse linear, so there are no codes and no mask to keep",
            hint="quantise or prune it first: `marlin-tools quantize`, `marlin-tools prune`",
        )


def _sparse_linears(inventory: Inventory) -> Iterator[str]:
    return (target.name for target in inventory.targets if is_2_4(inventory.weight(target.name)))


def check_pair(student: Checkpoint, teacher: Checkpoint, settings: TrainingSettings, *, quantized: bool) -> None:
    """Refuse settings that cannot work and two models that cannot be compared, from their configurations alone.

    `quantized` says whether the student is, or will be by then.
    """
    settings = settings.fitted(quantized=quantized)
    _check_learning(settings)
    if settings.code_rate and not quantized:
        raise RecipeError(f"`{student.origin}` is not quantised: `code_rate` means nothing to it", hint="leave it out")
    if dequantized(teacher).quantization is not None:  # one in FP8 or MXFP4 is the original, as its makers stored it
        raise ModelError(f"teacher `{teacher.origin}` is quantised", hint="learn from the original model")
    if _has_experts(student):
        raise ModelError(
            f"`{student.origin}` is a mixture of experts, which cannot be finetuned here",
            hint="`marlin-tools quantize --preset max` trains it block by block",
        )
    check_vocabulary(student, teacher)
    if settings.code_rate:
        _check_shapes(student, teacher)
    if settings.square_head:
        for key in ("hidden_size", "num_hidden_layers"):
            found = [text_config(each.config).get(key) for each in (student, teacher)]
            if found[0] != found[1]:
                raise ModelError(
                    f"`{key}` is {found[0]} in `{student.origin}` and {found[1]} in its teacher `{teacher.origin}`",
                    hint="hidden states cannot be compared: set `square_head` to 0",
                )


def _has_experts(student: Checkpoint) -> bool:
    """Whether a block has any. A config.json may say how many there would be where none has, and that there is one."""
    if not any(text_config(student.config).get(key) for key in EXPERTS):
        return False
    family = known_family(student.config)
    if family is None or not any(branch.experts for branch in family.branches):
        return True
    layout = Layout(student)
    return any(branch.experts for index in range(layout.blocks) for branch in layout.branches(index))


def another_teacher(student: Checkpoint, teacher: Checkpoint) -> str | None:
    """What to warn of if the student was not made from the teacher, as far as its manifest tells."""
    first = next(iter(history(student.path).get("history", ())), {}).get("model")
    if first is None or first["fingerprint"] == teacher.fingerprint:
        return None
    return f"`{student.origin}` was made from `{first['origin']}`; its teacher `{teacher.origin}` is another model"


def _check_shapes(student: Checkpoint, teacher: Checkpoint) -> None:
    """Codes learn from where the original's weights lie between them, so every linear needs its original."""
    for key in ("model_type", *SIZES):
        found = [text_config(each.config).get(key) for each in (student, teacher)]
        if found[0] != found[1]:
            raise ModelError(
                f"`{key}` is {found[0]} in `{student.origin}` and {found[1]} in its teacher `{teacher.origin}`",
                hint="the teacher must be the model that was quantised; another one teaches with `--code-rate 0`",
            )


def _check_learning(settings: TrainingSettings) -> None:
    if not settings.kl and not settings.ce and not settings.square_head:
        raise RecipeError("`kl`, `ce` and `square_head` are all 0", hint="at least one loss must count")
    if settings.batch % (settings.micro * processes()):
        raise RecipeError(
            f"`batch` {settings.batch} is not a multiple of `micro` {settings.micro} times {processes()} processes",
            hint="choose `batch` and `micro` so that every process gets whole micro-batches",
        )


def check_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Probabilities can only be compared if every token id means the same."""
    sizes = [int(text_config(each.config).get("vocab_size", 0)) for each in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"teacher `{teacher.origin}` has a vocabulary of {sizes[1]} tokens, `{student.origin}` one of {sizes[0]}",
            hint="the teacher must be the model that was compressed, or one with the same tokenizer",
        )
    files = [each.path / "tokenizer.json" for each in (student, teacher)]
    if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        words = [each.tokenizer().get_vocab() for each in (student, teacher)]
        if words[0] != words[1]:
            raise ModelError(
                f"the tokenizers of `{student.origin}` and its teacher `{teacher.origin}` number their tokens differently",
                hint="the teacher must be the model that was compressed, or one with the same tokenizer",
            )
