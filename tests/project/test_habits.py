"""Workflows, hooks and templates name what exists; the gate, the release and the table of times work."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gate, release, times = _script("bench_gate"), _script("release"), _script("test_times")


def _yaml(path):
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def _commands(document):
    return [step["run"] for job in document["jobs"].values() for step in job["steps"] if "run" in step]


def missing(text):
    """What a text names and the tree does not have: targets of make, paths of the project, commands of the environment."""
    found = [
        f"make {target}"
        for target in re.findall(r"\bmake ([a-z][\w-]*)", text)
        if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    ]
    tops = r"marlin_tools|kernels|recipes|scripts|tests|docs|examples|\.ci|\.github"
    paths = re.findall(rf"(?<![\w/.-])((?:{tops})/[\w./-]*\w|[\w-]+\.(?:toml|txt|md|cff))(?![\w/*])", text)
    return found + [path for path in paths if not (ROOT / path).exists() and not path.startswith("build/")]


# ---- workflows, hooks, templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*WORKFLOWS, *FORMS, ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"], ids=lambda p: p.name
)
def test_what_is_named_exists(path):
    assert _yaml(path)
    assert [] == missing(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [GITHUB / "pull_request_template.md", ROOT / "tests" / "GPU.md"], ids=lambda p: p.name)
def test_what_pages_name_exists(path):
    assert [] == missing(path.read_text(encoding="utf-8"))


def test_what_is_missing_is_found():
    text = "make lint\nmake lnt\n.ci/run .ci/walk scripts/size.py scripts/sise.py constraints.txt constrants.txt kernels/**"

    assert ["make lnt", ".ci/walk", "scripts/sise.py", "constrants.txt"] == missing(text)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_ask_for_little(path):
    document = _yaml(path)
    steps = [step for job in document["jobs"].values() for step in job["steps"]]

    assert {"contents": "read"} == document["permissions"]
    assert "concurrency" in document
    assert all("timeout-minutes" in job for job in document["jobs"].values())
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert all("${{" not in command or "matrix." in command for command in _commands(document))


def test_hosted_ci_runs_what_we_run_on_all_that_is_allowed():
    document = _yaml(GITHUB / "workflows" / "ci.yml")
    matrix = document["jobs"]["test"]["strategy"]["matrix"]
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    (oldest,) = matrix["include"]
    floors = dict(text.split(">=") for text in PROJECT["dependencies"] if text.startswith(("torch>", "transformers>")))

    assert named == set(matrix["python"])
    assert ".ci/run" in _commands(document)
    assert {name: f"{floor}.0" for name, floor in floors.items()} == {name: oldest[name] for name in floors}
    for name in floors:
        assert f"{name.upper()} ?= {oldest[name]}" in MAKEFILE


def test_the_gpu_workflow_is_for_ourselves_alone():
    """Code of strangers never reaches a machine of ours."""
    document = _yaml(GITHUB / "workflows" / "gpu.yml")

    assert {"workflow_dispatch", "schedule"} == set(document["on"])
    assert "gpu" in document["jobs"]["gpu"]["runs-on"]
    assert ["make test-gpu", "make bench-gate"] == [
        each for each in _commands(document) if each in {"make test-gpu", "make bench-gate"}
    ]


def test_hooks_are_of_this_environment():
    repos = _yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    installed = {re.split(r"[>=\[]", text)[0] for text in PROJECT["optional-dependencies"]["test"]}

    assert {"local"} == {repo["repo"] for repo in repos}
    for hook in (hook for repo in repos for hook in repo["hooks"]):
        folder, _, program = hook["entry"].split()[0].rpartition("/")
        assert ("system", ".venv/bin") == (hook["language"], folder)
        assert {"lint-imports": "import-linter", "python": "pytest"}.get(program, program) in installed
        assert "files" not in hook or re.compile(hook["files"])


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.name)
def test_forms_ask_something(path):
    form = _yaml(path)
    ids = [field["id"] for field in form["body"]]

    assert {"name", "description", "body"} <= set(form)
    assert len(ids) == len(set(ids))
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_citation_is_of_this_version():
    cited = _yaml(ROOT / "CITATION.cff")

    assert (PROJECT["name"], PROJECT["license"]) == (cited["title"], cited["license"])
    assert release.version_of(ROOT) == cited["version"]


# ---- the gate ---------------------------------------------------------------------------------------------------------

BASELINE = ROOT / "scripts" / "bench_baseline.json"


def _gate(tmp_path, capsys, change):
    document = json.loads(BASELINE.read_text(encoding="utf-8"))
    document["results"].append({**document["results"][0], "kernel": "torch", "speedup": 1.0})  # a run holds these as well
    document["results"].append({**document["results"][0], "kernel": "ours 2:4", "speedup": 0.1})  # not in the baseline
    change(document)
    (tmp_path / "measured.json").write_text(json.dumps(document), encoding="utf-8")
    code = gate.main([str(BASELINE), str(tmp_path / "measured.json")])
    return code, capsys.readouterr().err.splitlines()


def _scaled(document, factor, **where):
    for row in document["results"]:
        if where.items() <= row.items():
            row["speedup"] *= factor


@pytest.mark.parametrize("factor", (1.0, 1.3, 0.96))
def test_as_fast_within_the_tolerance(tmp_path, capsys, factor):
    assert (0, []) == _gate(tmp_path, capsys, lambda document: _scaled(document, factor))


def test_a_slow_point_is_named(tmp_path, capsys):
    code, said = _gate(tmp_path, capsys, lambda document: _scaled(document, 0.89, layer="down", model="llama2-7b", m=16))

    assert 1 == code
    assert ["error: slower: ours, llama2-7b down, M = 16: 2.75 -> 2.45 times as fast as cuBLAS, -11.0%, -10% allowed"] == said


def test_many_points_that_are_a_little_slow_are_told_by_their_mean(tmp_path, capsys):
    code, said = _gate(tmp_path, capsys, lambda document: _scaled(document, 0.94, m=64))

    assert 1 == code
    assert ["error: slower: ours, geometric mean, M = 64: 2.33 -> 2.19 times as fast as cuBLAS, -6.0%, -5% allowed"] == said


@pytest.mark.parametrize(
    ("change", "said"),
    (
        (lambda d: d.update(gpu="NVIDIA H200"), "error: the baseline is of `NVIDIA H100 80GB HBM3`, this is `NVIDIA H200`"),
        (lambda d: d["settings"].update(dtype="bfloat16"), "error: dtype: float16 in the baseline, bfloat16 here"),
        (lambda d: d["results"].pop(0), "error: not measured: ours, llama2-7b qkv, M = 1"),
        (lambda d: d.pop("results"), "measured.json` is no document of `bench kernels --json`: KeyError('results')"),
    ),
)
def test_what_cannot_be_compared_does_not_pass(tmp_path, capsys, change, said):
    code, lines = _gate(tmp_path, capsys, change)

    assert 2 == code
    assert 1 == len(lines)
    assert said in lines[0]


def test_a_number_that_is_none_is_slow(tmp_path, capsys):
    assert 1 == _gate(tmp_path, capsys, lambda document: document["results"][5].update(speedup=float("nan")))[0]


def test_the_baseline_has_the_form_of_the_benchmark_and_the_means_that_were_published():
    from marlin_tools.bench.figures import FigureData
    from marlin_tools.bench.kernels import BenchSettings, Measurement, Rates

    found = json.loads(BASELINE.read_text(encoding="utf-8"))
    settings = BenchSettings.model_validate(found["settings"])
    results = [Measurement(**row) for row in found["results"]]
    again = FigureData(None, found["gpu"], settings, Rates(**found["rates"]), {}, results).as_dict()
    means = {m: round(value, 2) for (_, m), value in gate.means(gate.speedups(found)).items()}

    assert set(again) == set(found) - {"about", "date"}
    assert json.loads(json.dumps(again["settings"])) == found["settings"]
    assert again["results"] == found["results"]
    assert 72 == len(gate.speedups(found))
    for m, published in {
        1: 3.26,
        16: 2.99,
        32: 2.75,
        64: 2.33,
        128: 1.62,
        256: 1.02,
        512: 0.97,
        1024: 1.00,
        4096: 0.99,
    }.items():
        assert published == pytest.approx(means[m], abs=0.011)


# ---- the release ------------------------------------------------------------------------------------------------------


PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "marlin-tools"
version = "1.2.3"
requires-python = ">=3.11"
[tool.hatch.build.targets.wheel]
packages = ["marlin_tools"]
[tool.hatch.build.targets.wheel.force-include]
kernels = "marlin_tools/_kernels"
recipes = "marlin_tools/_recipes"
"""


@pytest.fixture
def tree(tmp_path):
    """A project of one module, committed."""
    files = {
        "marlin_tools/__init__.py": '"""x"""\n\n__version__ = "1.2.3"\n',
        "kernels/x.cu": "//\n",
        "recipes/x.yaml": "x: 1\n",
        "CHANGELOG.md": "# Changelog\n\n## 1.2.3 (2026-01-02)\n\n- what is new\n\n## 1.2.2 (2025-01-02)\n\n- what was new\n",
        "CITATION.cff": "version: 1.2.3\n",
        ".gitignore": "dist/\n",
        "pyproject.toml": PYPROJECT,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    _git(tmp_path, "init", "-q")
    _commit(tmp_path)
    return tmp_path


def _git(tree, *words):
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=")
    subprocess.run(("git", *identity, *words), cwd=tree, check=True, capture_output=True)


def _commit(tree):
    _git(tree, "add", "-A")
    _git(tree, "commit", "-qm", "x")


def test_a_release_is_built_and_its_tag_told(tree, capsys):
    code = release.main(tree)
    out, err = capsys.readouterr()

    assert (0, "marlin-tools 1.2.3\n\n- what is new\n") == (code, out), err
    assert {"marlin_tools-1.2.3-py3-none-any.whl", "marlin_tools-1.2.3.tar.gz"} == {
        path.name for path in (tree / "dist").iterdir()
    }


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    (
        ("CHANGELOG.md", "(2026-01-02)", "(unreleased)", "the first entry is `1.2.3 (unreleased)`, not `1.2.3 (YYYY-MM-DD)`"),
        ("CHANGELOG.md", "- what is new", "", "nothing is said of 1.2.3"),
        ("CITATION.cff", "1.2.3", "1.2.2", "CITATION.cff: the version is not 1.2.3"),
        ("marlin_tools/__init__.py", "1.2.3", "next", "no version of the form"),
    ),
)
def test_what_is_no_release_is_not_built(tree, capsys, name, old, new, said):
    (tree / name).write_text((tree / name).read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    _commit(tree)

    assert 1 == release.main(tree)
    assert said in capsys.readouterr().err
    assert not (tree / "dist").exists()


def test_a_tree_with_changes_and_a_tagged_version_are_no_release(tree, capsys):
    (tree / "new.txt").touch()
    assert 1 == release.main(tree)
    assert "error: the tree is not clean: ?? new.txt\n" == capsys.readouterr().err
    (tree / "new.txt").unlink()
    _git(tree, "tag", "v1.2.3")
    assert 1 == release.main(tree)
    assert "there is a tag v1.2.3 already" in capsys.readouterr().err


def test_a_wheel_with_more_or_less_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name in ("marlin_tools/a.py", "marlin_tools/b.pyc", "marlin_tools-1.0.0.dist-info/METADATA"):
            archive.writestr(name, "")
    with pytest.raises(release.NotAReleaseError, match=r"lacks `marlin_tools/c.py`"):
        release.check_wheel(tmp_path / "x.whl", {"marlin_tools/a.py", "marlin_tools/b.pyc", "marlin_tools/c.py"}, "1.0.0")
    with pytest.raises(release.NotAReleaseError, match=r"holds `marlin_tools/b.pyc`"):
        release.check_wheel(tmp_path / "x.whl", {"marlin_tools/a.py"}, "1.0.0")
    release.check_wheel(tmp_path / "x.whl", {"marlin_tools/a.py", "marlin_tools/b.pyc"}, "1.0.0")


def test_this_tree_can_be_released_but_for_its_date():
    """The changelog begins with the version that is being made; its date is set by whoever releases it."""
    title = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]

    assert re.fullmatch(rf"{re.escape(release.version_of(ROOT))} \((unreleased|\d{{4}}-\d\d-\d\d)\)", title)
    assert "marlin_tools/_kernels/w4a16/hopper.cu" in release.tracked(ROOT) or not (ROOT / ".git").exists()


# ---- the times --------------------------------------------------------------------------------------------------------


def test_times_are_summed_by_file(tmp_path):
    cases = [("tests.a.test_x", "one", 1.5), ("tests.a.test_x", "two", 2.0), ("tests.b.test_y", "three", 0.25)]
    rows = "".join(f'<testcase classname="{module}" name="{name}" time="{time}"/>' for module, name, time in cases)
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{rows}</testsuite></testsuites>", encoding="utf-8")
    files = times.read(tmp_path / "tests.xml")
    lines = times.table(files).splitlines()

    assert [("tests/a/test_x.py", 3.5, "two"), ("tests/b/test_y.py", 0.25, "three")] == [
        (f.name, f.seconds, f.slowest) for f in files
    ]
    assert "| 3.5 | 93% | 2 | `tests/a/test_x.py` | `two` | 2.0 |" == lines[2]
    assert "| **3.8** | | 3 | all 2 files | | |" == lines[-1]
