"""What the site shows beside `docs/`: pages that live where their readers look for them, and what is generated from the code.

MkDocs calls the functions below while `make docs` builds the site. Nothing is written into the tree, so nothing can go stale.

    PAGES       files of other folders that are pages as they are
    options     `<!-- options: VERB -->` becomes the table of the verb's options, from the command line itself
    aliases     `<!-- aliases -->` becomes the table of short names
    layouts     the layout that each file of `marlin_tools/formats/` begins with
    recipes     the bundled recipes as they are
    examples    the scripts of `examples/` as they are
    links       a link to a file of the repository leads to its page, or loses its link if it has none
"""

import ast
import html
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "recipes/README.md": "recipes.md",
    "recipes/reproducing.md": "reproducing.md",
    "marlin_tools/formats/README.md": "formats.md",
    "kernels/README.md": "kernels.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Where a file of the repository stands on the site."""

SOURCES = {page: source for source, page in PAGES.items()}
FIGURES = "kernels/figures"
LAYOUTS = ("compressed_tensors", "gptq", "marlin", "marlin_24")
MARKER = re.compile(r"^<!-- options: ([a-z ]+) -->$", re.MULTILINE)
ALIASES = "<!-- aliases -->"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)#\s]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


# ---- what MkDocs calls ------------------------------------------------------------------------------------------------


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add what does not lie in `docs/`."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for figure in sorted((ROOT / FIGURES).glob("*.svg")):
        files.append(File.generated(config, f"{FIGURES}/{figure.name}", abs_src_path=str(figure)))
    files.append(File.generated(config, "layouts.md", content=layouts()))
    files.append(File.generated(config, "bundled-recipes.md", content=recipes()))
    return files


def on_page_markdown(markdown: str, page: "Page", **_: Any) -> str:
    """Tables of options in the place of their markers, and links as the site has them."""
    if page.file.src_uri == "examples.md":
        markdown += examples()
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if ALIASES in markdown:
        markdown = markdown.replace(ALIASES, aliases())
    return links(MARKER.sub(lambda found: options(found[1]), markdown), source)


# ---- links ------------------------------------------------------------------------------------------------------------


def outside_of_code(text: str, change: Callable[[str], str]) -> str:
    """Change everything but fenced blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def links(text: str, source: str) -> str:
    """The same page with links that hold on the site; `source` is its file in the repository."""
    page = PAGES.get(source, source.removeprefix("docs/"))
    here = posixpath.dirname(page)

    def changed(found: re.Match[str]) -> str:
        picture, label, target, anchor = found.groups(default="")
        if not target:
            return found.group()
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = place_of(there)
        if place is None:
            return label if not picture and (ROOT / there).exists() else found.group()
        place, _, section = place.partition("#")
        return f"{picture}[{label}]({posixpath.relpath(place, here or '.')}{'#' + section if section else anchor})"

    return outside_of_code(text, lambda part: LINK.sub(changed, part))


def place_of(path: str) -> str | None:
    """Where a file of the repository stands on the site, or None."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(f"{FIGURES}/"):
        return path
    folder, _, name = path.rpartition("/")
    stem = name.rpartition(".")[0]
    if folder == "examples":
        return f"examples.md#{stem}" if name.endswith(".py") else "examples.md"
    if folder == "recipes" and name.endswith(".yaml"):
        return f"bundled-recipes.md#{stem}"
    if folder == "marlin_tools/formats" and stem in LAYOUTS:
        return f"layouts.md#{stem.replace('_', '-')}"
    return None


# ---- what is generated -------------------------------------------------------------------------------------------------


def options(verb: str) -> str:
    """How a verb is called: its arguments and options as a table."""
    command = find(verb)
    rows = ["| argument or option | meaning |", "|---|---|"]
    rows += [f"| {spelt(each)} | {meaning(each)} |" for each in told(command)]
    return "\n".join(rows)


def find(verb: str) -> Any:
    """The command of this name, `bench kernels` for one of a group."""
    from typer.main import get_command

    from marlin_tools.cli import app

    command: Any = get_command(app)
    for word in verb.split():
        command = command.commands[word]
    return command


def verbs() -> Iterator[str]:
    """All verbs, those of groups with the name of the group."""
    from typer.main import get_command

    from marlin_tools.cli import app

    for name, command in vars(get_command(app))["commands"].items():
        yield from (f"{name} {inner}" for inner in vars(command)["commands"]) if hasattr(command, "commands") else (name,)


def told(command: Any) -> list[Any]:
    """Its parameters, arguments first, `--help` left out."""
    given = [each for each in command.params if each.name != "help"]
    return sorted(given, key=lambda each: each.param_type_name != "argument")


def spelt(parameter: Any) -> str:
    """An option as it is typed, with what its value is called."""
    if parameter.param_type_name == "argument":
        return code(parameter.metavar or parameter.name.upper())
    names = ", ".join(sorted(parameter.opts, key=len)) + "".join(f" / {name}" for name in parameter.secondary_opts)
    value = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar or 'VALUE'}"
    return code(names + value)


def code(text: str) -> str:
    """Code in a cell of a table, where a bar would end the cell."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def meaning(parameter: Any) -> str:
    """What its help says, and whether it can be left out."""
    text = html.escape(" ".join((parameter.help or "").split()), quote=False).replace("|", "&#124;")
    return f"{text} **Required.**" if parameter.required else text


def aliases() -> str:
    """What short names of models stand for, as a table."""
    from marlin_tools.checkpoint.reader import ALIASES

    return "\n".join(["| alias | model |", "|---|---|", *(f"| `{name}` | `{model}` |" for name, model in ALIASES.items())])


def layouts() -> str:
    """The layout of every format, as its file tells it."""
    begin = """# Byte layouts

What a checkpoint holds for each quantised linear. N is the number of outputs, K that of inputs, G the inputs that share a
scale. Each text is what the file of the format in `marlin_tools/formats/` begins with.
"""
    parts = [begin]
    for name in LAYOUTS:
        text = ast.get_docstring(ast.parse((ROOT / "marlin_tools" / "formats" / f"{name}.py").read_text(encoding="utf-8")))
        parts.append(f"## `{name.replace('_', '-')}` {{: #{name.replace('_', '-')} }}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def recipes() -> str:
    """The bundled recipes, whole."""
    begin = """# The bundled recipes

`marlin-tools recipes copy NAME my.yaml` writes any of them to a file of yours. [How they are written](../recipes/README.md).
"""
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    texts = (f"## {file.stem} {{: #{file.stem} }}\n\n```yaml\n{file.read_text(encoding='utf-8')}```\n" for file in files)
    return "\n".join([begin, *texts])


def examples() -> str:
    """The scripts of `examples/`, whole; they stand below what its README says of them."""
    files = sorted((ROOT / "examples").glob("*.py"))
    texts = (f"\n## {file.name} {{: #{file.stem} }}\n\n```python\n{file.read_text(encoding='utf-8')}```\n" for file in files)
    return "".join(texts)
