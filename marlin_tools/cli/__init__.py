"""The command line: every verb turns its flags into a recipe, has the engine run it, and prints the result.

stdout carries the result, stderr everything else. Exit codes: 0 done, 1 ran but a check failed, 2 could not run, 130
interrupted, by Ctrl-C or SIGTERM. Defaults live in the settings classes: a flag that is not given is not in the recipe.
Whatever `--help` does not need is imported by the function that needs it. This package is the only importer of typer. A family
of verbs is a file.
"""

import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from marlin_tools import __version__
from marlin_tools.cli import bench, complete, kernels, look, make, measure, recipes, ui
from marlin_tools.cli.options import PLAIN, SETTINGS, flag
from marlin_tools.errors import MarlinToolsError

_RESUMED = frozenset({"quantize", "prune", "finetune", "run", "reproduce"})
"""Verbs that go on where they were interrupted."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What a write that fails is told, and no file's name with it."""

_UsageError: Any = typer.BadParameter.__mro__[2]
"""Typer's own complaints about arguments: click's class, or that of the copy that newer versions carry."""

app = typer.Typer(context_settings=SETTINGS, invoke_without_command=True, **PLAIN | {"add_completion": True})
for family in (make, measure, recipes, look):
    app.add_typer(family.app)
for name, group in (("recipes", recipes.recipes), ("bench", bench.bench), ("kernels", kernels.kernels)):
    app.add_typer(group, name=name)

Version = Annotated[bool, flag("--version", "Print the version and exit.")]


@app.callback()
def _marlin_tools(context: typer.Context, version: Version = False) -> int:
    """Accurate, verified, fast INT4 for Hugging Face causal language models."""
    if version:
        typer.echo(f"marlin-tools {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: run a verb, turn every known failure into one line and a hint, and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "_MARLIN_TOOLS_COMPLETE" in os.environ:  # a shell asks what a tab may become
        complete.answer(lambda: app(prog_name="marlin-tools"))
        sys.exit(0)
    for library in ("TRANSFORMERS", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # they warn of their own defaults, not of the user's model
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a CPU that others use too to a standstill
    ui.open_stderr()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler that ends us is somebody who presses Ctrl-C
    try:
        _check_words(arguments)
        _check_place()
        code = app(arguments, prog_name="marlin-tools", standalone_mode=False) or 0
    except typer.Abort:
        code = 130
    except MarlinToolsError as error:
        code = _complain(error)
    except OSError as error:
        code = _complain(_system(error))
    except _UsageError as error:
        code = _complain(_usage(error, arguments))
    if code == 130:
        kept = ": what is finished is kept" if not _RESUMED.isdisjoint(arguments[:1]) else ""
        _complain(MarlinToolsError("interrupted", hint=f"run the same command again{kept}"))
    sys.exit(code)


def _check_words(arguments: Sequence[str]) -> None:
    """Recipes, manifests and libraries hold names in UTF-8, and a result that names another could not be read again."""
    for word in arguments:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            message, hint = f"`{word}` is no text in UTF-8", "rename it, or check the terminal's locale"
            raise MarlinToolsError(message, hint=hint) from None


def _check_place() -> None:
    """Libraries end the program without a word where the working directory is gone."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise MarlinToolsError("the working directory does not exist any more", hint="`cd` to one that does") from None


def _complain(error: MarlinToolsError) -> int:

    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:  # several processes write to one terminal
        error.lines = tuple(f"process {os.environ['RANK']}: {line}" for line in error.lines)
    ui.complain(error)
    return 2


def _system(error: OSError) -> MarlinToolsError:
    """What only the system could know, in our form: a name that is too long, a file that went away, a disk that is full."""
    if error.filename is not None:
        hint = "check the name, and what it stands for"
        return MarlinToolsError(f"`{os.fsdecode(error.filename)}`: {error.strerror}", hint=hint)
    if error.errno not in _FULL:
        raise error
    ui.forget()
    return MarlinToolsError(f"nothing more can be written: {error.strerror}", hint="free some disk, or write somewhere else")


_NUMBER = re.compile(r"[Ii]nvalid value for '(--[\w-]+)': Input should be a valid (integer|number)")
_NUMBERS = {
    "integer": ("whole number", "write it out in digits, such as 6000000"),
    "number": ("number", "write it in digits, such as 0.01"),
}


def _usage(error: Any, arguments: Sequence[str]) -> MarlinToolsError:
    """Typer's complaint in our form. Where a value is missing it does not say of which verb."""
    message, _, rest = re.sub(r"\.? (Did you mean |\(Possible options: )", "\n", error.format_message()).partition("\n")
    context = getattr(error, "ctx", None)
    if number := _NUMBER.match(message):
        option = number[1]
        value = next((value for name, value in pairwise(arguments) if name == option), "")
        said = next((word for word in arguments if word.startswith(f"{option}=")), f"{option} {value}").rstrip()
        return MarlinToolsError(f"`{said}`: not a {_NUMBERS[number[2]][0]}", hint=_NUMBERS[number[2]][1])
    verb = context.command_path if context else _verb(arguments)
    hint = f"did you mean {rest.rstrip('?)')}?" if rest else f"`{verb} --help` lists what there is"
    if "unexpected extra argument" in message and "--calib" in arguments:
        hint = "of several texts, put commas between: `--calib A,B`"
    return MarlinToolsError(message[:1].lower() + message[1:].rstrip("."), hint=hint)


def _verb(arguments: Sequence[str]) -> str:
    """The command that a line begins with."""
    command: Any = typer.main.get_command(app)
    path = ["marlin-tools"]
    for word in arguments:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return " ".join(path)
