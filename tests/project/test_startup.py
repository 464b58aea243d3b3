"""`--help` answers at once: it may cost what typer costs, and nothing of torch."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRIES = 7
HEAVY = ("torch", "transformers", "pydantic", "datasets", "lm_eval", "numpy", "safetensors", "huggingface_hub")


def _seconds(*arguments: str) -> float:
    """Processor time of one Python process: what the user waits for on an idle machine, whoever else is busy on this one."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    with process.stderr as errors:
        assert process.returncode == 0, errors.read().decode()
    return usage.ru_utime + usage.ru_stime


def test_help_is_fast():
    """The best of several tries each, taken by turns."""
    tries = [(_seconds("-c", "pass"), _seconds("-m", "marlin_tools", "--help")) for _ in range(TRIES)]
    nothing, shown = (min(column) for column in zip(*tries, strict=True))

    assert shown <= 2 * nothing + 0.25


def test_help_loads_nothing_heavy():
    code = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))
sys.argv = ["marlin-tools", "--help"]
from marlin_tools.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert "quantize" in done.stdout
    assert done.stderr.strip() == "[]"


def test_import_of_the_package_loads_nothing_heavy():
    code = f"import sys, marlin_tools; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
