"""Where lm-eval finds its tasks: the user's folders, the bundled demo tasks, and its own fourteen thousand.

lm-eval would parse every file that it has to learn their names, a minute's work. Here names are read off the lines that declare
them, those of lm-eval once for each version, and only the files of tasks that are asked for are parsed. Nothing that a folder
of the user's brings along is executed unless that is allowed: no function, no class, no script, and templates are confined.
Data files that a task names relative to its YAML file are found there, wherever the command runs.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import lm_eval.api.metrics
import lm_eval.tasks
import lm_eval.utils
from jinja2 import BaseLoader, StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager, _yaml_loader
from lm_eval.tasks._index import TaskIndex

from marlin_tools.checkpoint.output import put
from marlin_tools.checkpoint.patterns import compiled
from marlin_tools.checkpoint.strict_json import read_bounded
from marlin_tools.data.evaluation import NAMED
from marlin_tools.errors import DataError, OutputError, RecipeError
from marlin_tools.resources import cache_dir, demo_dir, is_file, resolved

_DECLARED = re.compile(
    r"""^["']?(task|group|tag|include)["']?[ \t]*:[ \t]*(.*)((?:\r?\n[ \t]*-[ \t]+.*)*)""",
    re.MULTILINE,
)
_CODE = re.compile(r"^[^#\n]*!function", re.MULTILINE)

OWN = Path(lm_eval.tasks.__file__).parent
"""Where lm-eval's own tasks are, whose code comes with it."""

DEEPEST, MOST_VALUES, LARGEST = 32, 20_000, 1 << 20
"""Levels of nesting, values with aliases counted as often as they are used, and bytes of a task file of the user's."""

TEMPLATE_SECONDS = 5
"""How long one template may take with one item; usual ones take less than a millisecond."""

Files = Mapping[str, Sequence[str]]
"""The files that declare a task, a group or a tag, by its name, relative to the folder that was searched."""


class Tasks:
    """The tasks of some names with all that they are made of, for lm-eval to load.

    names     as they were asked for
    manager   lm-eval's own, which knows nothing else
    code      what the tasks execute of the user's folders, for the report
    """

    def __init__(self, names: Sequence[str], include: Sequence[Path], *, allow_code: bool) -> None:
        for folder in include:
            if not folder.is_dir():
                raise RecipeError(
                    f"`--include-path {folder}`: no such directory", hint="name a directory with lm-eval task YAML files"
                )
        self.names = list(names)
        self.manager = TaskManager(include_defaults=False)
        self.code: list[str] = []
        self._allowed, self._theirs = allow_code, include
        self._roots = [*reversed(include), demo_dir() / "tasks", OWN]
        self._declared: dict[Path, Files] = {}
        self._names: set[str] = set()
        self._files: set[Path] = set()
        self._inside: dict[str, set[str]] = {}
        for name in names:
            if not self._add(name):
                raise self._unknown(name)
        for name in names:
            if twice := sorted(set(names) & self._members(name)):
                raise RecipeError(f"task `{twice[0]}` is a part of `{name}`", hint="name one of the two")
        self._confine()

    @property
    def data(self) -> list[Path]:
        """The files on this machine that the tasks read."""
        found: list[Path] = []
        for entry in self.manager.task_index.values():
            asked = entry.cfg or {}
            named = [asked.get("dataset_path"), *_leaves((asked.get("dataset_kwargs") or {}).get("data_files"))]
            for path in (Path(str(name)) for name in named if name):
                found += sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
        return found

    def _members(self, name: str) -> set[str]:
        """All that a group is made of."""
        waiting, found = [name], set[str]()
        while waiting:
            new = self._inside.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    def _add(self, name: str) -> bool:
        """Put a name and its members into the manager's index. Of two tasks with one name, the later folder's is taken."""
        if name in self._names:
            return True
        for root in self._roots:
            if files := self._known(root).get(name):
                self._names.add(name)
                for file in files:
                    self._read(root / file, foreign=root in self._theirs)
                return True
        return False

    def _known(self, root: Path) -> Files:
        """What a folder declares; lm-eval's own is only looked at if the others do not have a name."""
        if root not in self._declared:
            self._declared[root] = _own_declarations() if root == OWN else _declarations(root)
        return self._declared[root]

    def _read(self, path: Path, *, foreign: bool) -> None:
        """Parse one file and those of its members."""
        if path in self._files:
            return
        self._files.add(path)
        try:
            texts = dict(_bounded(path)) if foreign else {}
            config = _yaml_loader.load_yaml(path, resolve_func=False)
            TaskIndex.process_cfg(dict(config), path, self.manager.task_index)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, _yaml_loader.yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"`{path}` cannot be read: {reason}", hint="check the task's YAML file") from error
        if foreign:
            self._check(path, config, texts)
        members = config.get("task")
        self._inside.setdefault(str(config.get("group")), set()).update(_parts(members))
        for part in _parts(members):
            if not self._add(part) and part in members:  # others are described on the spot
                raise self._unknown(part)
        entry = self.manager.task_index.get(str(config.get("task")))
        if entry is not None and OWN not in path.parents:
            _anchor(entry)

    def _check(self, path: Path, config: Mapping[str, Any], texts: Mapping[Path, str]) -> None:
        """Refuse code of a task in a folder of the user's, or remember it."""
        _check_patterns(path, config)
        found = list(_code(config, texts))
        if found and not self._allowed:
            raise RecipeError(
                f"`{path}` runs code: {found[0]}",
                hint="read that code; `--allow-task-code` lets the tasks asked for run theirs",
            )
        self.code += [f"the task file `{path}` ran code: {what}" for what in found]

    def _unknown(self, name: str) -> RecipeError:
        known = [each for root in self._roots for each in self._known(root)]
        is_text = name in NAMED or is_file(name)
        near = [f"ppl:{name}"] if is_text else get_close_matches(name[:100], known, n=3, cutoff=0.5)
        guess = f"did you mean {', '.join(f'`{n}`' for n in near)}?" if near else "`lm-eval ls tasks` lists all;"
        return RecipeError(f"unknown task `{name[:100]}`", hint=f"{guess} tasks of your own need `--include-path DIR`")

    def _confine(self) -> None:
        """Templates of tasks are expanded in a sandbox: they reach values, not the interpreter."""
        sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
        sandbox.template_class = _HurriedTemplate
        sandbox.filters |= lm_eval.utils.env.filters
        lm_eval.utils.env = sandbox


class _HurriedTemplate(Template):
    """A template that gives up after `TEMPLATE_SECONDS`: loops in loops would go on for ever."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Only the main thread can be interrupted; lm-eval expands templates nowhere else."""
        if threading.current_thread() is not threading.main_thread():
            return super().render(*args, **kwargs)
        before = signal.signal(signal.SIGALRM, _too_slow)
        signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
        try:
            return super().render(*args, **kwargs)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _too_slow(*_: object) -> None:
    raise DataError(f"a template of a task takes longer than {TEMPLATE_SECONDS} s", hint="check the task's YAML file")


def _check_patterns(path: Path, config: object) -> None:
    """Refuse regular expressions of a task that are none, or could take for ever."""
    waiting = [("", config)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]
        elif key in {"regex_pattern", "regexes_to_ignore"}:
            try:
                compiled(str(value), f"`{path}`: `{key}`", DataError)
            except DataError as error:
                raise DataError(error.message, hint="check the task's YAML file") from error


def _own_declarations() -> Files:
    """What lm-eval's own files declare, read once for each version of it."""
    file, key = cache_dir() / f"tasks-{version('lm-eval')}.json", [str(OWN), OWN.stat().st_mtime_ns]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["of"] == key:
            return dict(content["names"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    names = _declarations(OWN)
    with suppress(OutputError):  # without a cache the next run reads them again
        put(file, json.dumps({"of": key, "names": names}))
    return names


def _declarations(root: Path) -> Files:
    """The files of every name that the YAML files of a folder declare: the first of a task or a group, all of a tag."""
    names: dict[str, list[str]] = {}
    included: dict[Path, dict[str, list[str]]] = {}
    for path in sorted(root.rglob("*.yaml"), key=lambda path: path.as_posix()):
        if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & {*path.parts}:
            for kind, declared in _declared(path, included).items():
                for name in declared:
                    places = names.setdefault(name, [])
                    places += [path.relative_to(root).as_posix()] if kind == "tag" or not places else []
    return names


def _declared(path: Path, included: dict[Path, dict[str, list[str]]]) -> dict[str, list[str]]:
    """Names by kind, with those of the files that it includes where it has none of the kind itself."""
    if path in included:
        return included[path]
    included[path] = {}  # a circle ends here
    try:
        if not path.is_file():
            return {}  # a pipe would wait for ever
        with path.open("rb") as stream:
            text = stream.read(LARGEST).decode("utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    for kind, inline, listed in _DECLARED.findall(text):
        values = re.sub(r"\s#.*", "", inline).strip(" []\r\t").split(",") if inline.strip() else listed.splitlines()
        if kind in {"tag", "include"} or ("[" not in inline and not listed.strip()):
            found[kind] = [name for value in values if (name := re.sub(r"\s#.*", "", value).strip(" -\t\r\"'"))]
    for name in found.pop("include", ()):
        for kind, values in _declared(resolved(path.parent / name), included).items():
            found.setdefault(kind, values)
    included[path] = found
    return found


def _bounded(path: Path) -> Iterator[tuple[Path, str]]:
    """A task file of the user's and those that it includes, each with its text, once it is small enough to be opened."""
    waiting, seen = [path], set()
    while waiting:
        file = resolved(waiting.pop())
        if file in seen or OWN in file.parents:
            continue
        seen.add(file)
        text = read_bounded(file, DataError, "check the task's YAML file", LARGEST).decode("utf-8", errors="replace")
        if max(accumulate(("[{".count(c) - "]}".count(c) for c in re.sub(r"[^\[\]{}]", "", text)), initial=0)) > 10 * DEEPEST:
            raise _too_much(file, f"nested deeper than {DEEPEST} levels")  # the library would take minutes to find that out
        _count(file, _yaml_loader.yaml.compose(text, _yaml_loader.yaml.SafeLoader))
        yield file, text
        names = _yaml_loader.load_yaml(file, resolve_func=False, recursive=False).get("include", ())
        waiting += [file.parent / name for name in ([names] if isinstance(names, str) else names)]


def _too_much(file: Path, rule: str) -> DataError:
    return DataError(f"`{file}`: {rule}", hint="check the task's YAML file")


def _count(file: Path, root: Any) -> None:
    """Refuse an alias bomb: what follows may write out every use of an alias."""
    waiting, count = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        inner = node.value if node is not None and not isinstance(node.value, str) else ()
        children = [each for pair in inner for each in (pair if isinstance(pair, tuple) else (pair,))]
        count += len(children)
        if count > MOST_VALUES or depth > DEEPEST:
            rule = f"more than {MOST_VALUES} values" if count > MOST_VALUES else f"nested deeper than {DEEPEST} levels"
            raise _too_much(file, f"{rule}, aliases counted as often as they are used")
        waiting += [(child, depth + 1) for child in children]


def _code(config: Mapping[str, Any], texts: Mapping[Path, str]) -> Iterator[str]:
    """What of a task, and of the files that it is made of, would be executed; lm-eval's own files count as its code."""
    for file, text in texts.items():
        if found := _CODE.search(text):
            yield f"`{' '.join(found[0].split())}{text[found.end() :].partition(chr(10))[0]}` in `{file.name}`"
    if "class" in config:
        yield "a class of its own"
    if str(config.get("dataset_path")) == "pandas" or "trust_remote_code" in str(config.get("dataset_kwargs")):
        yield "the data set unpickles, or has a script"
    for metric in config.get("metric_list") or ():
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if not isinstance(name, str) or name not in metric_registry or (isinstance(metric, dict) and metric.get("hf_evaluate")):
            yield f"metric `{name}` is fetched"


def _parts(members: object) -> Iterator[str]:
    """The names in the member list of a group; a member that is a mapping describes itself or names what it changes."""
    for member in members if isinstance(members, list) else ():
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict):
            inner = member.get("task", member.get("group"))
            yield from _parts(inner) if isinstance(inner, list) else (str(inner),)


def _anchor(entry: Any) -> None:
    """Make the data files of a task absolute where they lie beside its YAML file."""
    files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
    if not files or entry.yaml_path is None:
        return
    config = _yaml_loader.load_yaml(entry.yaml_path)
    config["dataset_kwargs"]["data_files"] = _absolute(files, entry.yaml_path.parent)
    entry.cfg, entry.yaml_path = config, None


def _leaves(files: Any) -> Iterator[str]:
    if isinstance(files, dict | list):
        for each in files.values() if isinstance(files, dict) else files:
            yield from _leaves(each)
    elif files:
        yield str(files)


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(names, folder) for split, names in files.items()}
    if isinstance(files, list):
        return [_absolute(name, folder) for name in files]
    beside = folder / str(files)
    return str(beside.resolve()) if beside.is_file() else files
