"""What a run has finished so far, beside the files it has finished, so that a killed run loses at most the block in work.

`<out>.partial/state/run.json` holds the fingerprint of everything that decides the result: model, tokens, settings, code
revision; also the settings themselves, by which a run with others is refused before it reads its text.
`state/block-00000.json` is written after the block's shard and holds the shard's sha256, so a half-written block
never counts.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from marlin_tools.checkpoint.contract import BlockEntry, RunState
from marlin_tools.checkpoint.output import OutputDirectory, sha256_of
from marlin_tools.checkpoint.strict_json import conforms, read_object
from marlin_tools.errors import ModelError, OutputError

_RUN = "run.json"


def fingerprint_of(**facts: Any) -> str:
    """sha256 of the facts in canonical JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def unfinished(out: Path) -> dict[str, Any]:
    """What an unfinished run into `out` has noted; empty if there is nothing to go on from."""
    output = OutputDirectory(out)
    return _read(output.state / _RUN, RunState) if output.work.exists() and output.begun else {}


def another_run(partial: Path, otherwise: str = "start over with `--no-resume`") -> OutputError:
    """What to raise where an unfinished run is in the way."""
    return OutputError(
        f"`{partial}` holds an unfinished run with another model, calibration or settings",
        hint=f"repeat the command that began it, or {otherwise}",
    )


def begin_anew(output: OutputDirectory) -> None:
    """Make room for work that is never gone on with; what another run has finished there goes only where that is asked for."""
    if (output.state / _RUN).exists() and output.begun and not output.overwrite:
        raise another_run(output.partial, "choose another `-o DIR`; `--overwrite` throws it away")
    output.clear()
    output.lasting = False


class Journal:
    """The finished blocks of one run."""

    def __init__(self, output: OutputDirectory, fingerprint: str, made: Mapping[str, Any] | None = None) -> None:
        self._output = output
        run = output.state / _RUN
        begun = _read(run, RunState).get("fingerprint", "unreadable") if run.exists() and output.work.exists() else None
        if begun == fingerprint:
            return
        if begun is not None and output.begun and not output.overwrite:
            raise another_run(output.partial)
        output.clear()
        output.work.mkdir()
        output.write_state(_RUN, json.dumps({"fingerprint": fingerprint, **(made or {})}))

    def finished(self, index: int, shard: Path) -> dict[str, Any] | None:
        """The entry of block `index` if its shard is on disk exactly as it was written."""
        entry = self._output.state / self._name(index)
        if not entry.is_file() or not shard.is_file():
            return None
        content = _read(entry, BlockEntry)
        return content if content and content["sha256"] == sha256_of(shard) else None

    def entry(self, index: int) -> dict[str, Any]:
        """What a finished block has recorded."""
        content: dict[str, Any] = json.loads((self._output.state / self._name(index)).read_text())
        return content

    def record(self, index: int, shard: Path, entry: dict[str, Any]) -> dict[str, Any]:
        """Block `index` is done; from here on a resumed run skips it."""
        complete = {**entry, "sha256": self._output.sha256_of(shard)}
        self._output.write_state(self._name(index), json.dumps(complete))
        return complete

    @staticmethod
    def _name(index: int) -> str:
        return f"block-{index:05d}.json"


def _read(file: Path, model: type[BaseModel]) -> dict[str, Any]:
    """A note of ours; empty if it is none, so that what it stands for is done again."""
    try:
        content = read_object(file)
        conforms(model, content, str(file))
    except ModelError:
        return {}
    return content
