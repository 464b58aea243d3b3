"""Weight formats: how the codes and scales of a linear lie in a checkpoint.

`FORMATS` holds what we write, by the name that users give. `find_format` also knows the other spellings of the same layouts
that checkpoints have. Every format packs and unpacks exactly, so any can be turned into any other without the base model.

Read next: `format.py`, what a format is; `bits.py`, the two moves they are made of; then one format, say `gptq.py`.
A new format is one file and one line here. README.md says which format is for which engine.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from marlin_tools.errors import FormatError, near
from marlin_tools.formats.compressed_tensors import COMPRESSED_TENSORS
from marlin_tools.formats.config import check_readable, spelling_of
from marlin_tools.formats.format import Format
from marlin_tools.formats.gptq import GPTQ, GPTQ_V2
from marlin_tools.formats.marlin import MARLIN
from marlin_tools.formats.marlin_24 import GPTQ_MARLIN_24, MARLIN_24
from marlin_tools.settings import one_of

__all__ = ["FORMATS", "READABLE", "Format", "FormatName", "find_format", "get_format"]

FORMATS: dict[str, Format] = {each.name: each for each in (GPTQ, COMPRESSED_TENSORS, MARLIN, MARLIN_24)}
FormatName = Annotated[str, one_of("format", FORMATS)]
"""What a setting that names one of them holds."""

READABLE: tuple[Format, ...] = (*FORMATS.values(), GPTQ_V2, GPTQ_MARLIN_24)
"""Everything that checkpoints may say they are."""


def get_format(name: str) -> Format:
    """The format that a user names."""
    if not isinstance(name, str):
        raise TypeError(f"a format is a name, such as `gptq`, not {type(name).__name__}")
    if name not in FORMATS:
        raise FormatError(f"unknown format `{name}`", hint=near(name, FORMATS))
    return FORMATS[name]


def find_format(quantization_config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint with this `quantization_config`; FormatError if it is not one that we can hold exactly."""
    for candidate in READABLE:
        if candidate.recognize(quantization_config):
            check_readable(quantization_config)
            return candidate
    method, layout = spelling_of(quantization_config)
    known = {spelling for each in READABLE for spelling in each.spellings}
    if layouts := sorted(layout for known_method, layout in known if known_method == method):
        raise FormatError(
            f"`quantization_config`: unknown layout `{layout}` of `{method}`" + _contents(quantization_config),
            hint=_original(layout, layouts),
        )
    methods = sorted({known_method for known_method, _ in known})
    raise FormatError(f"`quantization_config`: unknown quant_method `{method}`", hint=_original(method, methods))


def _contents(quantization_config: Mapping[str, Any]) -> str:
    """What the weights are, as far as `config_groups` says so."""
    groups = quantization_config.get("config_groups")
    schemes = [each for each in groups.values() if isinstance(each, Mapping)] if isinstance(groups, Mapping) else []
    found = [each.get("weights") for each in schemes]
    kinds = sorted({f"{each.get('num_bits')}-bit {each.get('type', 'int')}" for each in found if isinstance(each, Mapping)})
    return f", which stores weights as {' and '.join(kinds)}" if kinds else ""


def _original(word: str, known: list[str]) -> str:
    """A hint about a word in a file: a tool wrote it and meant it, unless it is one of ours spelt a little otherwise."""
    plain = word.lower().replace("_", "-")
    if plain != word and plain in known:
        return near(plain, known)
    return f"known: {', '.join(known)}; for all else start from the original model"
