"""What a shell offers after a tab: the words of our tables, asked as bash, zsh and fish ask, at the price of `--help`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from marlin_tools.cli import complete
from marlin_tools.data.evaluation import NAMED

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "numpy", "safetensors", "huggingface_hub", "ruamel")


def _ask(capsys, monkeypatch, **environment):
    from marlin_tools.cli import main

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([])
    assert 0 == ended.value.code
    return capsys.readouterr().out


@pytest.fixture
def bash(capsys, monkeypatch, tmp_path):
    """`bash("eval -t ppl:de")` -> what bash offers; a space at the end begins a word."""
    monkeypatch.chdir(tmp_path)

    def ask(line):
        words = ["marlin-tools", *line.replace(":", "\0:\0").replace("=", "\0=\0").replace(" ", "\0").split("\0")]
        words = [word for word in words[:-1] if word] + ([words[-1]] if words[-1] or line.endswith(" ") else [])
        asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
        return _ask(capsys, monkeypatch, _MARLIN_TOOLS_COMPLETE="complete_bash", **asked).split()

    return ask


def test_texts_that_are_offered_to_judge_by_exist():
    assert {task.removeprefix("ppl:") for task in complete.TASKS if task.startswith("ppl:")} == NAMED


@pytest.mark.parametrize(
    ("line", "offered"),
    (
        ("quant", ["quantize"]),
        ("quantize phi", ["phi-4"]),
        ("quantize demo --pres", ["--preset"]),
        ("quantize demo --preset ", complete.PRESETS),
        ("prune demo --preset ", complete.PRUNERS),
        ("export x --format gptq,mar", ["gptq,marlin", "gptq,marlin-24"]),
        ("export x --format gptq,gp", []),
        ("export x --format=gp", ["gptq"]),
        ("finetune x --teacher phi", ["phi-4"]),
        ("quantize demo --calib wiki", ["wikitext2"]),
        ("eval -t ppl:d", ["demo"]),  # bash puts `ppl:` in front
        ("eval -t mmlu,ppl:wi", ["wikitext2"]),
        ("eval -t demo_", ["demo_qa", "demo_text"]),
        ("eval -t ppl:demo phi", ["phi-4"]),
        ("quantize demo --device cuda:", ["0"]),
        ("run demo-sp", ["demo-sparse"]),
        ("reproduce demo-fast llama2-70b-f", ["llama2-70b-fast", "llama2-70b-fp16"]),
        ("recipes show dem", None),
        ("bench model --shape llama2-7", ["llama2-7b", "llama2-70b"]),
        ("kernels build --arch sm_80,sm_9", ["sm_80,sm_90a"]),
        ("verify x", []),
    ),
)
def test_bash_is_offered(bash, line, offered):
    found = bash(line)

    assert sorted(found) == sorted(offered if offered is not None else complete.recipes("dem"))


def test_results_are_offered_where_there_are_some(bash):
    for name in ("runs/one", "runs/several/gptq", "runs/empty"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").touch() if "empty" not in name else None

    assert ["runs/one", "runs/several/gptq"] == bash("verify ")
    assert ["runs/one", "runs/several/gptq"] == bash("quantize runs/")
    assert ["runs/several/gptq"] == bash("compare runs/one runs/s")


def test_zsh_and_fish_are_offered_the_same(capsys, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    for shell in ("zsh", "fish"):
        line = "marlin-tools quantize demo --preset m"
        said = _ask(capsys, monkeypatch, _MARLIN_TOOLS_COMPLETE=f"complete_{shell}", _TYPER_COMPLETE_ARGS=line)
        assert "marlin" in said
        assert "default" not in said


def test_the_words_are_those_of_the_tables():
    from marlin_tools.algorithms import PRESETS, PRUNERS
    from marlin_tools.backends import BACKENDS
    from marlin_tools.checkpoint.reader import ALIASES
    from marlin_tools.data.sources import SOURCES
    from marlin_tools.formats import FORMATS
    from marlin_tools.quantized import ActivationType
    from marlin_tools.recipe.files import catalog

    assert ["demo", *ALIASES] == complete.ALIASES
    assert set(PRESETS) == set(complete.PRESETS)
    assert set(PRUNERS) == set(complete.PRUNERS)
    assert set(FORMATS) == set(complete.FORMATS)
    assert list(get_args(ActivationType)) == complete.ACTIVATIONS
    assert list(SOURCES) == complete.SOURCES
    assert {"auto", "vllm", *BACKENDS} == set(complete.BACKENDS)
    assert set(catalog()) == set(complete.recipe_names())


def test_the_tasks_are_known():
    from marlin_tools.evaluation.task_index import Tasks

    asked = [task for task in complete.TASKS if not task.startswith("ppl:")]

    assert asked == Tasks(asked, (), allow_code=False).names  # an unknown one is refused


def test_a_tab_loads_nothing_heavy_and_costs_little_more_than_help():
    """The best of several tries of processor time: others on this machine change both alike."""
    code = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))
from marlin_tools.cli import main
main(sys.argv[1:])
"""
    asked = {"COMP_WORDS": "marlin-tools\neval\n-t\nppl", "COMP_CWORD": "3", "_MARLIN_TOOLS_COMPLETE": "complete_bash"}

    def run(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
        before = os.times()
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
        after = os.times()
        return done, after.children_user + after.children_system - before.children_user - before.children_system

    helps, tabs = [], []
    for _ in range(4):
        helps.append(run("--help")[1])
        done, seconds = run(**asked)
        tabs.append(seconds)

    assert "ppl:demo" in done.stdout
    assert "[]" == done.stderr.strip()
    assert min(tabs) < 4 * min(helps), (tabs, helps)  # it also looks for files and names of tasks
    assert min(helps) < 2, helps  # 0.3 s on an idle machine


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_installed_for_bash_it_completes_there(tmp_path):
    """As `--install-completion` leaves it: a file that .bashrc sources, with our program on the path."""
    program = tmp_path / "bin" / "marlin-tools"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m marlin_tools "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    env = os.environ | {"HOME": str(tmp_path), "PATH": path, "PYTHONPATH": str(ROOT)}
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    subprocess.run([program, "--install-completion", "bash"], env=env, check=True, capture_output=True)
    script = f"""
source {tmp_path}/.bashrc
COMP_WORDS=(marlin-tools eval -t ppl : wi); COMP_CWORD=5
_marlin_tools_completion marlin-tools
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)

    assert "wikitext2\n" == done.stdout
