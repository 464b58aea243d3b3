"""Every example runs as it stands, on the embedded model: the scripts in this process, one quantised model for all of them."""

import ast
import json
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "first_steps.ipynb"
ABSENT = 77
LINES = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where examples are run: `runs/example` is what `quantize.py` makes there."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["quantize.py"])
        runpy.run_path(str(EXAMPLES / "quantize.py"), run_name="__main__")
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """`run("in_vllm.py")` -> exit code and stdout."""
    from marlin_tools.algorithms import PRESETS

    presets = dict(PRESETS)
    monkeypatch.chdir(place)

    def start(name, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().out

    yield start
    PRESETS.clear()
    PRESETS.update(presets)


def test_the_first_example_makes_what_the_others_use(place):
    from marlin_tools import verify

    assert verify(place / "runs" / "example").ok


def test_an_own_algorithm_quantises_a_whole_model(run):
    code, said = run("own_algorithm.py")
    values = dict(re.findall(r"^ *(\w+): mean KL to the original ([\d.]+)$", said, re.MULTILINE))

    assert 0 == code
    assert {"rtn", "clipped"} == set(values)
    assert values["rtn"] != values["clipped"]
    assert all(0 < float(value) < 0.05 for value in values.values())


def test_transformers_answers_on_packed_linears(run):
    from marlin_tools.serving.transformers import unregister

    try:
        code, said = run("in_transformers.py")
    finally:
        unregister()

    assert 0 == code
    assert said.startswith("PackedLinear on c")
    assert "Answer: gold" in said


def test_without_vllm_it_is_said_in_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, said = run("in_vllm.py")

    assert ABSENT == code
    assert re.fullmatch(r"runs/example in vLLM [\d.]+: loads\n", said)


def test_with_vllm_it_is_asked_for_texts(run, monkeypatch):
    """A stand-in with the names and the arguments that vLLM has."""
    calls = []

    class LLM:
        def __init__(self, *, model):
            calls.append(model)

        def generate(self, prompts, sampling_params):
            calls.append(vars(sampling_params))
            return [types.SimpleNamespace(prompt=each, outputs=[types.SimpleNamespace(text=" gold")]) for each in prompts]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    code, said = run("in_vllm.py")

    assert 0 == code
    assert ["runs/example", {"temperature": 0.0, "max_tokens": 8}] == calls
    assert said.endswith("Answer: gold\n")


def test_what_vllm_does_not_load_is_not_served(run):
    from marlin_tools import export

    export("runs/example", "marlin", "runs/example-marlin")
    code, said = run("in_vllm.py", "runs/example-marlin")

    assert 1 == code
    assert said.endswith("does not load\n")


def test_the_operator_computes_the_product(run):
    code, said = run("operator_alone.py")

    assert 0 == code
    assert float(re.search(r"largest error of the product ([\d.e+-]+)", said)[1]) < 0.01
    assert "4.125 bits per weight" in said


def test_the_better_preset_is_nearer_to_the_original_and_the_picture_shows_it(run, place):
    import xml.etree.ElementTree as ET

    code, said = run("two_presets.py")
    found = {
        (what.strip(), preset): float(value)
        for what, preset, value in re.findall(r"^(.+?)  +(rtn|fast)  (\S+)$", said, re.MULTILINE)
    }
    picture = ET.parse(place / "runs" / "two-presets.svg")  # noqa: S314 (written a moment ago)
    bars = [each for each in picture.iter("{http://www.w3.org/2000/svg}rect") if "x" in each.attrib]

    assert 0 == code
    assert found["mean KL", "fast"] < found["mean KL", "rtn"]
    assert 6 == len(bars) == len(found)
    assert all(0 <= float(each.get("width")) <= 300 for each in bars)


def test_the_notebook_runs_from_top_to_bottom(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names = {"__name__": "__main__"}
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)  # noqa: S102 (our own)

    assert "gold" in names["answer"]
    assert "perplexity" in capsys.readouterr().out


def test_the_notebook_is_one():
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = document["cells"]

    assert (4, 5) == (document["nbformat"], document["nbformat_minor"])
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert {"cell_type", "id", "metadata", "source"} <= set(cell)
        assert cell["cell_type"] == "markdown" or ([], None) == (cell["outputs"], cell["execution_count"])  # no results in git


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_say_what_they_show(path):
    text = path.read_text(encoding="utf-8")

    assert len(text.splitlines()) <= LINES
    assert ast.get_docstring(ast.parse(text))


def test_the_table_lists_them_all():
    named = re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert {path.name for path in (*SCRIPTS, NOTEBOOK)} == set(named)
    assert len(SCRIPTS) == 6
