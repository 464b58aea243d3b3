"""Names that were made to deceive a terminal, and a process that is told to end."""

import json
import os
import signal
import subprocess
import sys

import pytest

from marlin_tools.errors import ModelError, RecipeError, plain

TRICKS = ["a\nerror: forged", "a\x1b[2J", "a\rb", "a\u202eb", "a\ud800", "a\x9b31m", "a\0b", "a\u2028b", "x" * 5000, "a\tb"]


@pytest.mark.parametrize("name", TRICKS, ids=lambda text: ascii(text)[:20])
def test_a_message_is_one_printable_line(name):
    error = ModelError(f"`{name}` is no model", hint=f"try `{name}`")

    for text in (error.message, error.hint):
        assert text.isprintable()
        assert len(text) <= 500
        text.encode("utf-8")


def test_ordinary_letters_stay():
    assert "`Größe/模型` – 2 × σ" == plain("`Größe/模型` – 2 × σ")


def test_of_very_many_problems_the_first_are_listed():
    error = RecipeError.of([f"problem {number}" for number in range(3000)])

    assert 21 == len(error.lines)
    assert "and 2980 more problems" == error.lines[-1]


@pytest.mark.parametrize("name", [name for name in TRICKS if "\0" not in name], ids=lambda text: ascii(text)[:20])
@pytest.mark.parametrize("verb", [["quantize"], ["inspect"], ["export", "--format", "gptq", "-o", "x"], ["recipes", "show"]])
def test_a_name_forges_no_second_error(cli, verb, name):
    outcome = cli(*verb, name)

    assert 2 == outcome.code
    assert 1 == sum(line.startswith("error:") for line in outcome.err.splitlines())
    assert all(line.isprintable() for line in outcome.err.splitlines())


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "demo", "--preset", "rtn", "-o", "o\udcff"],
        ["quantize", "demo", "--calib", "t\udcff.txt"],
        ["eval", "demo", "-t", "ppl:t\udcff.txt"],
        ["compare", "a", "b\udcff"],
    ],
)
def test_a_name_that_is_no_utf8_is_refused_before_the_work(cli, tmp_path, words):
    """A manifest could not hold it."""
    outcome = cli(*words)

    assert 2 == outcome.code
    assert "\\udcff" in outcome.err.splitlines()[0]
    assert "is no text in UTF-8\nhint: rename it, or check the terminal's locale\n" in outcome.err
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("out", [".", "/", "..", "x" * 300, "a\0b"])
def test_a_place_that_is_none_is_refused_before_the_work(cli, tmp_path, out):
    outcome = cli("quantize", "demo", "--preset", "rtn", "-o", out)

    assert 2 == outcome.code
    assert 1 == sum(line.startswith("error:") for line in outcome.err.splitlines())
    assert [] == list(tmp_path.iterdir())


def test_the_source_is_never_overwritten(cli, tiny_llama, tmp_path):
    before = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    for out in (tiny_llama, tiny_llama.parent):
        outcome = cli("quantize", tiny_llama, "--preset", "rtn", "-o", out, "--overwrite")
        assert 2 == outcome.code
        assert "which the run reads" in outcome.err or "working directory" in outcome.err
    assert before == {path.name: path.read_bytes() for path in tiny_llama.iterdir()}


def test_a_result_that_would_steer_the_terminal_is_escaped(capsys):
    from marlin_tools.cli import ui

    ui.write("a\x1b[2J\ud800\nb\tc")
    ui.write_json({"a": "\x9b\ud800é"})
    out = capsys.readouterr().out

    assert out.startswith("a\\u001b[2J\\ud800\nb\tc\n")
    assert {"a": "\x9b\ud800é"} == json.loads(out.split("\n", 2)[2])


WAITING = """
import sys, time
import marlin_tools.run.plan
from marlin_tools.cli import main
def wait(*args, **options):
    print("ready", flush=True)
    time.sleep(60)
marlin_tools.run.plan.plan = wait
main(["run", "demo"])
"""


def test_sigterm_is_like_ctrl_c():
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "ready\n" == process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=30)

    assert (130, "error: interrupted\nhint: run the same command again: what is finished is kept\n") == (
        process.returncode,
        said,
    )


INTERRUPTED = """
import sys
from marlin_tools.__main__ import main
class Interrupted:
    def find_spec(self, name, *_others):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
main()
"""


def test_ctrl_c_while_the_command_line_is_read_in():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)

    assert (130, "", "error: interrupted\nhint: run the same command again\n") == (done.returncode, done.stdout, done.stderr)
