"""What the options of all verbs have in common: how they are spelt, described and shared."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from marlin_tools.cli import complete
from marlin_tools.cli.complete import Complete
from marlin_tools.errors import OutputError, check_named

_SPELLINGS = {
    "nsamples": "num-samples",
    "num-calibration-samples": "num-samples",
    "max-seq-length": "seqlen",
    "percdamp": "damp",
    "dampening-frac": "damp",
    "dataset": "calib",
    "output-dir": "output",
}
"""What other tools call our options."""


def spelling(name: str) -> str:
    """The name under which an option is known here."""
    name = name.replace("_", "-")
    return _SPELLINGS.get(name, name)


def argument(metavar: str, text: str, words: Complete | None = None, read: Callable[[str], Any] | None = None) -> Any:
    """What stands without a name; `words` is what a shell offers, `read` makes it a value."""
    return typer.Argument(metavar=metavar, help=text, show_default=False, autocompletion=words, parser=read)


def option(*names: str, of: str, text: str, words: Complete | None = None, read: Callable[[str], Any] | None = None) -> Any:
    """What takes a value; without names, typer makes one from the parameter's."""
    return typer.Option(*names, metavar=of, help=text, show_default=False, autocompletion=words, parser=read)


def model_directory(name: str) -> Path:
    """A directory of a model; typer would take no name for the working directory."""
    check_named(name)
    return Path(name)


def destination(of: str, text: str) -> Any:
    """The option that says where something is written."""

    def read(name: str) -> Path:
        if not name:
            raise OutputError("`-o` is empty", hint=f"name a place: `-o {of}`")
        return Path(name)

    return option("-o", "--output", of=of, text=text, read=read)


def flag(names: str, text: str) -> Any:
    """What is there or is not."""
    return typer.Option(names, help=text, show_default=False)


SETTINGS = {"token_normalize_func": spelling, "help_option_names": ["-h", "--help"], "terminal_width": 100}
PLAIN: Any = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
"""How every command group is made."""

Model = Annotated[str, argument("MODEL", "Directory, hub id, or alias: demo, llama2-7b, ...", complete.models)]
Directory = Annotated[Path, argument("DIR", "Directory of a quantised model.", complete.directories, model_directory)]
Output = Annotated[Path | None, destination("DIR", "Where the result goes: runs/<name>-<scheme>.")]
Device = Annotated[
    str | None,
    option(of="NAME", text="cpu, cuda or cuda:N; the first GPU if there is one.", words=complete.one_of(complete.DEVICES)),
]
Calib = Annotated[
    str | None,
    option(
        of="SOURCE",
        text="demo, c4, redpajama, wikitext2, pile, ultrachat, FILE, hf:OWNER/NAME; or several, with commas.",
        words=complete.list_of(complete.SOURCES),
    ),
]
NumSamples = Annotated[int | None, option(of="N", text="Windows or documents of text.")]
SeqLen = Annotated[int | None, option(of="L", text="Tokens per window; if given, text is packed.")]
Damp = Annotated[float | None, option(of="F", text="Added to the Hessian's diagonal, relative to its mean.")]
Seed = Annotated[int | None, option(of="N", text="Which samples are drawn.")]
Ignore = Annotated[list[str] | None, option(of="REGEX", text="Linears to leave as they are; repeatable.")]
FORMATS = "compressed-tensors, gptq, marlin, marlin-24; several go to DIR/<format>/."
DryRun = Annotated[bool, flag("--dry-run", "Print what would be done, and what it would take.")]
Resume = Annotated[bool, flag("--resume/--no-resume", "Continue an interrupted run (which is the default), or start over.")]
Overwrite = Annotated[bool, flag("--overwrite", "Replace what is in the way.")]
Strict = Annotated[bool, flag("--strict", "Exit with 1 if there was any warning.")]
Json = Annotated[bool, flag("--json", "Print one JSON document.")]
