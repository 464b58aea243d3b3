"""Where lm-eval finds its tasks: the user's folders, the bundled demo tasks, and its own fourteen thousand.

Its own index takes seconds to read, so it is only built for names that the folders do not hold. Data files that a task names
relative to its YAML file are found there, wherever the command runs; lm-eval itself would look in the working directory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from marlin_tools.errors import RecipeError
from marlin_tools.resources import demo_dir


def index_tasks(names: Sequence[str], include: Sequence[Path]) -> TaskManager:
    """A manager that knows at least `names`, if they exist. Of two tasks with one name, the later folder's is taken."""
    for folder in include:
        if not folder.is_dir():
            raise RecipeError(
                f"`--include-path {folder}`: no such directory", hint="name a directory with lm-eval task YAML files"
            )
    folders = [demo_dir() / "tasks", *include]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(_is_known(name, manager) for name in names):
        manager = TaskManager(include_path=folders)
    for entry in manager.task_index.values():
        if entry.yaml_path is not None and any(folder in entry.yaml_path.parents for folder in folders):
            _anchor(entry)
    return manager


def _is_known(name: str, manager: TaskManager) -> bool:
    """Whether the index holds this name and everything that it is made of."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    return all(_is_known(part, manager) for part in _parts((entry.cfg or {}).get("task")))


def _parts(members: object) -> Iterator[str]:
    """The names in the member list of a group; a member that is a mapping describes itself or names what it changes."""
    for member in members if isinstance(members, list) else ():
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict) and "task" in member and "dataset_path" not in member:
            yield from _parts(member["task"]) if isinstance(member["task"], list) else (str(member["task"]),)


def _anchor(entry: Any) -> None:
    """Make the data files of a task absolute where they lie beside its YAML file."""
    files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
    if not files:
        return
    config = load_yaml(entry.yaml_path)
    config["dataset_kwargs"]["data_files"] = _absolute(files, entry.yaml_path.parent)
    entry.cfg, entry.yaml_path = config, None


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(names, folder) for split, names in files.items()}
    if isinstance(files, list):
        return [_absolute(name, folder) for name in files]
    beside = folder / str(files)
    return str(beside.resolve()) if beside.is_file() else files
