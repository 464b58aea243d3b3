"""manifest.json: how a result came to be. Everything outside `times` is the same for the same inputs on the same machine.

`times` is also the only part that is written to again: `times.stages` says of each stage that the result has been through how
long it took and how much memory the process had used by its end.
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from marlin_tools import __version__
from marlin_tools.checkpoint.contract import Manifest
from marlin_tools.checkpoint.ours import MANIFEST as NAME
from marlin_tools.checkpoint.ours import TOOL
from marlin_tools.checkpoint.output import OutputDirectory, clear_published, put, sha256_of
from marlin_tools.checkpoint.strict_json import conforms, read_object
from marlin_tools.errors import ModelError

_PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "datasets", "lm-eval", "numpy")


def versions() -> dict[str, str]:
    """What computed this."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def file_hashes(directory: Path, sha256: Callable[[Path], str] = sha256_of) -> dict[str, str]:
    """sha256 of what makes a result a model, by path inside it: all its files but the manifest, and the stored reference."""
    found = sorted((*directory.glob("*"), *directory.glob("verify/*")))
    files = [file for file in found if file.is_file() and file.name != NAME]
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
        digests = list(threads.map(sha256, files))
    return {file.relative_to(directory).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def write_manifest(
    output: OutputDirectory, stage: str, facts: Mapping[str, Any], times: Mapping[str, Any], warnings: Sequence[str]
) -> None:
    """Write manifest.json into a result that is being made, with the hashes of the files that it has by now."""
    content = {
        "tool": {"name": TOOL, "version": __version__},
        "stage": stage,
        **facts,
        "versions": versions(),
        "warnings": list(warnings),
        "files": file_hashes(output.work, output.sha256_of),
        "times": times,
    }
    output.write_text(NAME, json.dumps(content, indent=1) + "\n")


def history(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """`history` for the manifest of what is made from this model: our stages that it has been through, first to last."""
    content = read_manifest(directory)
    if content is None:
        return {}
    here = {key: content[key] for key in ("stage", "model", "settings") if key in content}
    return {"history": [*content.get("history", []), here]}


def record_stage(directory: Path, stage: str, cost: Mapping[str, float]) -> None:
    """Note in `times` what a stage of a finished result has cost; does nothing where there is no manifest."""
    content = read_manifest(directory)
    if content is None:
        return
    content.setdefault("times", {}).setdefault("stages", {})[stage] = {key: round(value, 2) for key, value in cost.items()}
    put(directory / NAME, json.dumps(content, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a finished result; None if there is none, an error if it is not what we write."""
    file = directory / NAME
    if not file.exists():
        return None
    hint = "remove it: the weights do not need it, but what it says of them is lost"
    content = read_object(file, hint=hint)
    conforms(Manifest, content, str(file), hint=hint)
    if content["tool"]["name"] != TOOL:
        raise ModelError(f"`{file}` is of `{content['tool']['name']}`, not of {TOOL}", hint=hint)
    return content


def holds(out: Path, fingerprint: str) -> bool:
    """Whether `out` already is the result of this run; what a run that was killed behind its last step left goes away."""
    try:
        found = (read_manifest(out) or {}).get("fingerprint") == fingerprint
    except ModelError:
        return False  # whether it may be replaced is decided where outputs are
    if found:
        clear_published(out)
    return found
