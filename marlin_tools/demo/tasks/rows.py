"""Reads a task's rows from the file beside it: the tasks work wherever the package lies, with no network and no cache."""
# ruff: noqa: INP001 - not imported: lm-eval loads it by path, for the YAML files beside it

import json
from pathlib import Path
from typing import Any


def load(file: str, **_: object) -> dict[str, Any]:
    """The rows of a `.jsonl` file of this folder as split `test`; the task's metadata, which comes along, is not needed."""
    from datasets import Dataset

    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
