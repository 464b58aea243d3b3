"""Every command that a page shows is one that works, and every recipe in it is a recipe."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from marlin_tools.cli import app
from marlin_tools.recipe.files import bundled, load, load_all, tables
from marlin_tools.resources import recipes_dir
from marlin_tools.verification.engines import ENGINES

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ROOT / "marlin_tools" / "formats" / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
RECIPES = recipes_dir() / "README.md"
PAGES = [ROOT / "README.md", RECIPES, recipes_dir() / "reproducing.md", FORMATS, ROOT / "kernels" / "README.md", *DOCS]


def _script():
    spec = importlib.util.spec_from_file_location("readme_commands", ROOT / "scripts" / "readme_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


COMMANDS = [
    line for page in PAGES for block in _blocks(page, "sh") for line in block.splitlines() if line.startswith("marlin-tools ")
]
COMMANDS += [
    line.lstrip("# ").partition("     ")[0].strip()
    for path in bundled().values()
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.startswith("#     marlin-tools ")
]
RUN_IN_CI = [line for page in PAGES for line in SCRIPT.commands(page.read_text(encoding="utf-8"))]


RECIPELESS = {"bench", "compare", "doctor", "inspect", "kernels", "recipes"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[1] in RECIPELESS])
def test_command_without_a_recipe_is_understood(cli, command):
    """Every option is known and has its value; asking for help keeps it from running."""
    assert 0 == cli(*shlex.split(command)[1:], "--help").code


def test_there_are_commands():
    assert len(COMMANDS) >= 15
    assert {ROOT / page for page in SCRIPT.PAGES} <= {*PAGES}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[1] not in RECIPELESS])
def test_command_is_understood(asked, collected, command):
    Path("runs/newest").mkdir(parents=True)  # for `eval` without MODEL
    Path("runs/newest/manifest.json").touch()
    words = shlex.split(command)[1:]
    recipes = collected(*words) if words[0] == "reproduce" else [asked(*words).recipe]

    assert recipes
    for recipe in recipes:
        assert recipe.model.startswith(("demo", "llama", "qwen", "mistral", "runs/"))
        assert command not in RUN_IN_CI or "--dry-run" in words or recipe.model.startswith(("demo", "runs/"))


@pytest.fixture
def collected(cli, monkeypatch):
    """The recipes that `reproduce` would run."""
    from marlin_tools.run import reproduce
    from marlin_tools.run.verdict import Comparison

    def call(*words):
        found = []

        def compare(refs, *args, **options):
            found.extend(reproduce.collect(refs))
            return Comparison("x", ())

        monkeypatch.setattr(reproduce, "reproduce", compare)
        assert 0 == cli(*words).code
        return found or reproduce.collect(word for word in words[1:] if not word.startswith("-"))

    return call


def test_ci_runs_what_needs_nothing_and_leaves_the_rest():
    """A block that begins with `# needs` is for people; everything else runs, in its order."""
    text = "```sh\nmake x\nmarlin-tools a\n```\n```sh\n# needs a GPU\nmarlin-tools b\n```\n"

    assert ["marlin-tools a"] == list(SCRIPT.commands(text))
    assert "marlin-tools quantize demo" in RUN_IN_CI
    assert "marlin-tools quantize llama2-7b -o llama2-7b-int4" not in RUN_IN_CI
    assert "scripts/readme_commands.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_results_are_where_the_readme_looks_for_them(asked):
    """`quantize demo` writes what the following lines read."""
    recipe = asked("quantize", "demo").recipe

    assert f"runs/{recipe.name}-{recipe.scheme}" in " ".join(COMMANDS)


def test_the_table_of_verbs_is_complete():
    text = (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8")

    assert set(get_command(app).commands) == set(re.findall(r"\[`([a-z]+)`\]\(#", text))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for page in PAGES for target in re.findall(r"`make (\w+)`", page.read_text(encoding="utf-8"))}

    assert {"docs", "test", "measure"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), target


def test_the_recipe_in_the_readme_is_one(tmp_path):
    block, table, sparse = _blocks(RECIPES, "yaml")
    (tmp_path / "sparse.yaml").write_text(sparse, encoding="utf-8")
    (tmp_path / "my.yaml").write_text(block, encoding="utf-8")
    (tmp_path / "table.yaml").write_text(table, encoding="utf-8")

    assert ["prune", "finetune", "quantize"] == [stage.stage for stage in load(tmp_path / "sparse.yaml").remaking]
    assert ["my-fp16", "my-fast", "my-rtn"] == [recipe.name for recipe in load_all(tmp_path / "table.yaml")]
    assert ["quantize", "export", "evaluate", "verify"] == [stage.stage for stage in load(tmp_path / "my.yaml").stages]


def test_settings_in_the_readme_exist():
    text = RECIPES.read_text(encoding="utf-8")

    for override in re.findall(r"`--set (\S+?)`", text):
        load("demo", [override])


def test_the_tables_of_recipes_are_counted_right():
    text = RECIPES.read_text(encoding="utf-8")

    for name, table in tables().items():
        assert f"| [{name}]({name}.yaml) | {len(table.rows)} rows: " in text


def test_expected_numbers_of_the_log_are_those_of_the_recipes():
    text = RECIPES.read_text(encoding="utf-8")

    for recipe in (*load_all("demo-presets"), load("demo"), load("demo-max"), load("demo-sparse")):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {recipe.name} ") and "±" in line]
        for expected in recipe.expect:
            if expected.task == "ppl:demo":
                decimals = len(f"{expected.value}".partition(".")[2])
                digits = 4 if expected.value < 0.1 else decimals
                assert f"{expected.value:.{digits}f} ± {expected.tolerance:g}" in line


def test_recommended_formats_are_loaded_by_their_engines():
    rows = re.findall(
        r"^\| (vLLM, SGLang|transformers|GPTQModel) \| `([\w-]+)`", FORMATS.read_text(encoding="utf-8"), re.MULTILINE
    )
    loads = {engine.name: engine.loads for engine in ENGINES}

    assert 3 == len(rows)
    for names, layout in rows:
        for name in names.split(", "):
            assert layout in loads[name]
