"""What a shell offers after a tab: words that are known without loading anything heavy, so that a tab costs what `--help` does.

The tables of presets, formats and sources lie beside code that loads torch; here are their names alone, and a test holds them
against the tables. A list such as `mmlu,ppl:demo` is completed at its last word.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from pathlib import Path

from marlin_tools.resources import recipes_dir

ALIASES = (
    "demo llama2-7b llama2-13b llama2-70b llama3-8b llama3.1-8b llama3.1-70b llama3.2-1b mistral-7b qwen2.5-0.5b qwen2.5-7b "
    "qwen3-8b qwen3-30b-a3b qwen3-235b-a22b gpt-oss-20b gpt-oss-120b mixtral-8x7b phi-4 qwen3.5-9b llama4-scout gemma2-9b "
    "gemma3-4b gemma3-27b"
).split()
PRESETS = "default fast marlin max rtn".split()
PRUNERS = "default max sparsegpt wanda magnitude".split()
FORMATS = "compressed-tensors gptq marlin marlin-24".split()
ACTIVATIONS = "16bit fp8".split()
SOURCES = "demo wikitext2 c4 redpajama pile ultrachat".split()
BACKENDS = "auto native reference reference-packed torch-int4 vllm".split()
TASKS = (
    "ppl:demo ppl:wikitext2 ppl:redpajama demo_qa demo_text mmlu arc_challenge arc_easy hellaswag winogrande piqa boolq gsm8k "
    "ifeval lambada_openai openbookqa truthfulqa_mc2"
).split()
"""Texts, the embedded model's own, and those of lm-eval that papers of this field report."""
SHAPES = [alias for alias in ALIASES if alias != "demo"]
DEVICES = "cpu cuda cuda:0".split()

Complete = Callable[[str], list[str]]
"""What stands there already -> all that it could become."""


def one_of(words: Iterable[str]) -> Complete:
    """A single word of these."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def list_of(words: Iterable[str]) -> Complete:
    """Words of these between commas, none of them twice."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        said = before.split(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last) and word not in said]

    return complete


def models(incomplete: str) -> list[str]:
    """Aliases, and results under runs/; the shell itself knows all other directories."""
    return one_of((*ALIASES, *results()))(incomplete)


def directories(incomplete: str) -> list[str]:
    """Results under runs/."""
    return one_of(results())(incomplete)


def results() -> list[str]:
    """Model directories under runs/, those of several formats by format."""
    runs = Path("runs")
    found = [*runs.glob("*/config.json"), *runs.glob("*/*/config.json")]
    return sorted(path.parent.as_posix() for path in found)


def recipes(incomplete: str) -> list[str]:
    """Bundled recipes, tables, and the rows of tables."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def recipe_names() -> list[str]:
    """What has a name in the bundled files."""
    files = sorted(recipes_dir().glob("*.yaml"))
    named = [re.findall(r"^[^#\n]*\bname: *([\w.-]+)", path.read_text(encoding="utf-8"), re.MULTILINE) for path in files]
    return list(dict.fromkeys([*(path.stem for path in files), *(name for names in named for name in names)]))


def rejoined(words: list[str], at: int) -> tuple[list[str], int, str]:
    """What bash means by the words of a line, of which it completes the one `at`, and what it will put in front by itself.

    bash splits at colons and equals signs, `ppl:demo` into three words, and replaces only what comes after the last one.
    """
    whole: list[str] = []
    place = 0
    for index, word in enumerate(words):
        if index > 1 and word and (word in ":=" or words[index - 1] in (":", "=")):
            whole[-1] += word
        else:
            whole.append(word)
        if index == at:
            place = len(whole) - 1
    glued = at < len(words) and whole[place] != words[at]
    return whole, place, whole[place][: whole[place].rfind(":") + 1] if glued else ""


def answer(app: Callable[[], object]) -> None:
    """Have typer complete the line that a shell asks about; for bash, as it splits lines into words."""
    prefix = ""
    if os.environ.get("_MARLIN_TOOLS_COMPLETE") == "complete_bash":
        words, at, prefix = rejoined(os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"]))
        os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(at)}
    with redirect_stdout(io.StringIO()) as said, suppress(SystemExit):
        app()
    sys.stdout.write("".join(line.removeprefix(prefix) for line in said.getvalue().splitlines(keepends=True)))
