"""What a user reads when something is wrong: frozen, on stderr, exit code 2, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_tools.cli import kernels

NO_MODEL = "error: no model is named\nhint: a directory, a hub id (owner/name), or an alias such as demo\n"

CASES = [
    (("quant", "demo"), "error: no such command 'quant'\nhint: did you mean 'quantize'?\n"),
    (("quantize",), "error: missing argument 'MODEL'\nhint: `marlin-tools quantize --help` lists what there is\n"),
    (("quantize", "demo", "-o"), "error: option '-o' requires an argument\nhint: `marlin-tools quantize --help` lists what "),
    (("recipes", "show"), "error: missing argument 'NAME'\nhint: `marlin-tools recipes show --help` lists what "),
    (
        ("bench", "quantize", "--shape"),
        "error: option '--shape' requires an argument\nhint: `marlin-tools bench quantize --help` lists what ",
    ),
    (("quantize", "demo", "--calib", ""), "error: --calib: no source is named; known sources: demo, wikitext2, "),
    (("quantize", "demo", "--calib", "demo,"), "error: --calib: `demo,`: a comma with no source beside it; write the "),
    (("quantize", "demo", "--ignore", "("), "error: --ignore: the pattern `(` is no regular expression: missing ), "),
    (("quantize", "demo", "--group-size", "0"), "error: --group-size: a group size is 128, 64, 32, -1 (one scale per "),
    (("quantize", "demo", "--device", "cpux"), "error: --device: unknown device `cpux`; use auto, cpu, cuda or cuda:N\n"),
    (("quantize", ""), NO_MODEL),
    (("quantize", " "), NO_MODEL),
    (("inspect", " "), NO_MODEL),
    (("prune", "", "--dry-run"), NO_MODEL),
    (("inspect", ""), NO_MODEL),
    (("generate", "", "--prompt", "x"), NO_MODEL),
    (("eval", "", "--tasks", "ppl:demo"), NO_MODEL),
    (("eval", "demo", "--tasks", "ppl:demo", "--baseline", ""), "error: --baseline: no model is named; a directory, "),
    (("eval", "demo", "--tasks", "ppl:demo", "--include-path", ""), "error: --include-path: no directory is named; `.` is "),
    (("finetune", "demo", "--teacher", "", "--calib", "demo"), "error: --teacher: no model is named; a directory, "),
    (("verify", ""), NO_MODEL),
    (("export", "", "--format", "gptq", "-o", "x"), NO_MODEL),
    (("compare", "", "demo"), NO_MODEL),
    (("compare", "demo", ""), NO_MODEL),
    (("compare", "a", "b", "-o", ""), "error: `-o` is empty\nhint: name a place: `-o FILE`\n"),
    (("reproduce", "demo", "-o", ""), "error: `-o` is empty\n"),
    (("quantize", __file__), f"error: `{__file__}` is a file, not a model\nhint: name the directory that holds it\n"),
    (("quantize", "demo", "--dampp", "1"), "error: no such option: --dampp\nhint: did you mean --damp?\n"),
    (
        ("quantize", "demo", "--seed", "x"),
        "error: `--seed x`: not a whole number\nhint: write it out in digits, such as 6000000\n",
    ),
    (
        ("quantize", "demo", "--calib", "a.txt", "b.txt"),
        "error: got unexpected extra argument(s) (b.txt)\nhint: of several texts, put commas between: `--calib A,B`\n",
    ),
    (("quantize", "demo", "--learn=6M"), "error: `--learn=6M`: not a whole number\nhint: write it out in digits"),
    (("quantize", "demo", "--damp", "0,01"), "error: `--damp 0,01`: not a number\nhint: write it in digits, such as 0.01\n"),
    (
        ("quantize", "demo", "--preset", "defualt", "--num-samples", "0", "--format", "gptqq"),
        (
            "error: `--num-samples 0`: must be greater than or equal to 1\n"
            "error: --preset: unknown preset `defualt`; did you mean `default`? known: rtn, marlin, fast, default, max\n"
            "error: --format: unknown format `gptqq`; did you mean `gptq`? known: gptq, compressed-tensors, marlin, marlin-24\n"
        ),
    ),
    (("quantize", "demo", "--format", "gptq,gptq"), "error: command line: format `gptq` would be written twice\n"),
    (
        ("run", "demo", "--from", "nostage", "--dry-run"),
        "error: `--from nostage`: the recipe has no such stage\nhint: its stages: quantize, export, evaluate, verify",
    ),
    (("quantize", "demo", "--tune", "-1"), "error: `--tune -1`: must be greater than or equal to 0\n"),
    (("quantize", "demo", "--damp", "-1"), "error: `--damp -1`: must be greater than 0\n"),
    (
        ("quantize", "demo", "--calib", "redpyjama"),
        (
            "error: `redpyjama`: no such file or source\n"
            "hint: did you mean `redpajama`? known sources: demo, wikitext2, c4, redpajama, pile, ultrachat, a file, "
        ),
    ),
    (
        ("quantize", "demo", "--calib", "/dev"),
        "error: `/dev` is no regular file\nhint: name a text file in it\n",
    ),
    (("quantize", "demo", "--calib", "/dev/null"), "error: `/dev/null` is no regular file\nhint: texts are read twice: "),
    (("quantize", "demo", "-o", "/dev/null", "--dry-run"), "error: `/dev/null` is a file, not a directory\n"),
    (("quantize", "demo", "-o", "", "--dry-run"), "error: `-o` is empty\nhint: name a place: `-o DIR`\n"),
    (
        ("quantize", "demo", "--seqlen", "5000"),
        "error: sequence length 5000 is more than the 1024 positions of the model\nhint: use `--seqlen 1024`\n",
    ),
    (
        ("quantize", "nonsense"),
        "error: `nonsense` is no directory, no hub id (owner/name) and no alias\nhint: known aliases: demo, llama2-7b, ",
    ),
    (
        ("quantize", "demo", "--preview", "--preset", "rtn"),
        "error: there is nothing to preview: this preset looks at no data\nhint: choose another `--preset`\n",
    ),
    (("quantize", "demo", "--device", "cuda:99"), "error: device `cuda:99` does not exist: "),
    (("quantize", "demo", "--format", ","), "error: --format: no format is named\nhint: there are: compressed-tensors, gptq, "),
    (("export", "x", "-o", "y", "--format", ""), "error: --format: no format is named\nhint: there are: compressed-tensors, "),
    (("recipes", "copy", "demo", ""), "error: FILE is empty\nhint: name a file or a directory, or leave it out"),
    (("export", "x"), "error: missing option '--format'\nhint: `marlin-tools export --help` lists what there is\n"),
    (
        ("eval", "--tasks", "ppl:demo"),
        "error: there is no model under `runs/`\nhint: name a MODEL, or make one: marlin-tools quantize demo\n",
    ),
    (("eval", "demo"), "error: missing option '-t' / '--tasks'\nhint: `marlin-tools eval --help` lists what there is\n"),
    (
        ("eval", "demo", "-t", "x", "-b", "x"),
        "error: `--batch-size x`: must be 'auto', or must be a valid integer, unable to parse",
    ),
    (
        ("eval", "demo", "-t", "x", "--backend", "nativ"),
        (
            "error: --backend: unknown backend `nativ`; did you mean `native`? "
            "known: auto, native, reference, reference-packed, torch-int4, vllm\n"
        ),
    ),
    (
        ("run", "dmo"),
        (
            "error: `dmo` is no recipe file and no bundled recipe\n"
            "hint: did you mean `demo`? `marlin-tools recipes list` names all of them\n"
        ),
    ),
    (
        ("run", "demo", "--set", "quantize.dampp=1"),
        "error: --set quantize.dampp=1: unknown key `dampp` in `quantize`; did you mean `damp`? known: ",
    ),
    (
        ("run", "demo", "--set", "damp"),
        "error: `--set damp`: not of the form `a.b=value`\nhint: for example: --set quantize.damp=0.05\n",
    ),
    (
        ("run", "demo", "--from", "calibrate"),
        "error: `--from calibrate`: the recipe has no such stage\nhint: its stages: quantize, export, evaluate, verify\n",
    ),
    (
        ("run", "demo", "--from", "evaluate"),
        "error: `runs/demo-int4-g128/compressed-tensors` holds no finished result to go on from\nhint: run without `--from`\n",
    ),
    (
        ("run", "demo-presets"),
        (
            "error: `demo-presets` is a table of 4 recipes\n"
            "hint: run one of its rows (demo-fp16, demo-rtn, demo-marlin, demo-fast), "
        ),
    ),
    (
        ("reproduce", "demo", "--set", "generate.seed=1"),
        (
            "error: `--set generate.seed=1`: no recipe here has a stage `generate`\n"
            "hint: there are: evaluate, export, quantize, verify\n"
        ),
    ),
    (("verify", "demo"), "error: `demo` is not quantised\nhint: `marlin-tools inspect demo` describes any model\n"),
    (("recipes", "sho"), "error: no such command 'sho'\nhint: did you mean 'show'?\n"),
    (("recipes",), "error: missing command\nhint: `marlin-tools recipes --help` lists what there is\n"),
]

FULL = "error: nothing more can be written: No space left on device\nhint: free some disk, or write somewhere else\n"


@pytest.mark.parametrize(("arguments", "expected"), CASES, ids=lambda case: " ".join(case) if isinstance(case, tuple) else "")
def test_error_text(cli, arguments, expected):
    outcome = cli(*arguments)

    assert 2 == outcome.code
    assert "" == outcome.out
    assert outcome.err.startswith("error: ") or "\nerror: " in outcome.err
    assert expected in outcome.err


def test_an_option_that_two_settings_read_is_complained_of_once(cli):
    """The seed and the length are those of training and those of its text."""
    given = ("finetune", "demo", "--teacher", "demo", "--calib", "demo", "--sampled", "1", "--seed")

    assert (2, "", "error: `--seed 9999999999`: must be less than 4294967296\n") == cli(*given, "9999999999")


def test_interruption_says_how_to_go_on(cli, monkeypatch):
    import marlin_tools.run.plan

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(marlin_tools.run.plan, "plan", interrupt)

    assert (130, "", "error: interrupted\nhint: run the same command again: what is finished is kept\n") == cli("run", "demo")
    assert (130, "", "error: interrupted\nhint: run the same command again\n") == cli("generate", "demo", "--prompt", "x")


def test_a_defect_shows_its_traceback(monkeypatch, tmp_path):
    import marlin_tools.run.plan
    from marlin_tools.cli import main

    def fail(*_args, **_options):
        raise ZeroDivisionError

    monkeypatch.setattr(marlin_tools.run.plan, "plan", fail)
    with pytest.raises(ZeroDivisionError):
        main(["run", "demo"])


def test_no_verb_prints_the_help(cli):
    outcome = cli()

    assert 2 == outcome.code
    assert "" == outcome.out
    assert outcome.err.startswith("Usage: marlin-tools ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("recipes", "list"), "error: the result cannot be written to stdout: No space left on device\n"),
        (("--help",), FULL),
        (("quantize", "--help"), FULL),
        (("--version",), FULL),
    ],
)
def test_a_result_that_nobody_can_read_is_an_error(arguments, expected):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "marlin_tools", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert (2, expected) == (done.returncode, done.stderr)


def test_a_result_that_has_nowhere_to_go_is_an_error():
    command = ["sh", "-c", 'exec "$0" -m marlin_tools recipes list >&-', sys.executable]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)

    assert (2, "error: the result cannot be written to stdout: it is closed\n") == (done.returncode, done.stderr)


@pytest.mark.parametrize("stderr", ["closed", "unread"])
def test_work_goes_on_when_nobody_reads_what_is_told(tiny_llama, tmp_path, stderr):
    out, (read, unread) = str(tmp_path / "out"), os.pipe()
    os.close(read)
    closed = "2>&-" if stderr == "closed" else ""
    work = f'exec "$0" -m marlin_tools quantize "$1" --preset rtn -o "$2" {closed}'
    command = ["sh", "-c", work, sys.executable, str(tiny_llama), out]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=unread, check=False)
    os.close(unread)

    assert (0, f"{out}\n") == (done.returncode, done.stdout.decode())
    assert Path(out, "manifest.json").is_file()


def test_a_complaint_that_finds_no_room_leaves_its_exit_code():
    command = ["sh", "-c", 'exec "$0" -m marlin_tools inspect no/such 2>/dev/full', sys.executable]

    assert 2 == subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def test_a_model_that_cannot_be_written_to_is_not_measured_in_vain(cli, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("The skipper counted them twice.\n" * 40)
    assert 0 == cli("quantize", tiny_llama, "--preset", "rtn", "-o", "made").code
    before = {path.name: path.read_bytes() for path in Path("made").iterdir()}
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "made" and access(path, mode))
    outcome = cli("eval", "made", "--tasks", "ppl:text.txt", "--seqlen", "32")

    assert 2 == outcome.code
    assert "error: `made` is not writable: Permission denied" in outcome.err
    assert "hint: measure a copy of the model, or make its directory writable" in outcome.err
    assert "windows" not in outcome.err
    assert before == {path.name: path.read_bytes() for path in Path("made").iterdir()}


def test_of_several_formats_none_is_written_if_one_cannot_hold_the_model(cli):
    assert 0 == cli("quantize", "demo", "--preset", "rtn", "-o", "base").code
    outcome = cli("export", "base", "--format", "gptq,marlin-24", "-o", "several")

    assert 2 == outcome.code
    assert not Path("several").exists()


def test_a_working_directory_that_is_gone(cli, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    outcome = cli("inspect", "demo")

    assert 2 == outcome.code
    assert "error: the working directory does not exist any more\nhint: `cd` to one that does\n" == outcome.err


def test_an_architecture_is_compiled_once():
    assert ("sm_80", "sm_90a") == kernels._known("sm_80,sm_90a,sm_80")
