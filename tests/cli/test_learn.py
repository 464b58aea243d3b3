"""`quantize --learn`: INT4, then learning from the original, in one command; what cannot be is said first."""

import json
from pathlib import Path

import pytest

SHORT = ("--num-samples", "4", "--seqlen", "32", "--device", "cpu")
TEXT = "The boat left the harbour at dawn, and nine marlins were seen off the point. "


@pytest.fixture
def text(tmp_path):
    (tmp_path / "boat.txt").write_text(TEXT * 80, encoding="utf-8")
    return "boat.txt"


def quantize(cli, model, text, *more):
    return cli("quantize", model, "--preset", "rtn", "--calib", text, *SHORT, "-o", "made", *more)


def test_one_command_makes_both(cli, tiny_llama, text):
    done = quantize(cli, tiny_llama, text, "--learn", "512", "--format", "compressed-tensors,gptq")

    assert 0 == done.code, done.err
    assert "made/compressed-tensors\nmade/finetuned\nmade/gptq\n" == done.out
    assert "held-out KL" in done.err
    told = json.loads(Path("made/finetuned/manifest.json").read_text())
    assert (told["settings"]["tokens"], told["settings"]["batch"], told["settings"]["held_out"]) == (512, 8, 16)
    assert told["calibration"]["sequences"] == 16 + 16  # 512 / 32 to learn from, and those held out
    exported = json.loads(Path("made/gptq/manifest.json").read_text())
    assert "finetune" in json.dumps(exported)  # what has learned is exported
    again = quantize(cli, tiny_llama, text, "--learn", "512", "--format", "compressed-tensors,gptq")
    assert 0 == again.code
    assert 3 == again.err.count("nothing to do")


def test_a_short_text_is_read_more_often_and_said(cli, tiny_llama, text):
    done = quantize(cli, tiny_llama, text, "--learn", "6400")

    assert 0 == done.code, done.err
    assert "windows of 32 tokens in its" in done.err
    assert "216 asked for" in done.err
    assert "windows are read" in done.err


def test_what_cannot_be_is_said_before_any_work(cli, tiny_llama, text):
    done = quantize(cli, tiny_llama, text, "--learn", "0")

    assert 2 == done.code
    assert "error: `--learn 0`: must be greater than or equal to 1" in done.err
    assert not Path("made").exists()


def test_windows_that_the_model_does_not_have_are_refused_before_it_is_quantised(cli, tiny_llama, text):
    Path("learn.yaml").write_text(
        f"""
name: learn
model: {tiny_llama}
calibrate: {{source: {text}, num_samples: 4, seqlen: 32}}
stages:
  - {{stage: quantize, preset: rtn, device: cpu}}
  - {{stage: finetune, tokens: 512, device: cpu, text: {{source: {text}, num_samples: 40, seqlen: 100000}}}}
""",
        encoding="utf-8",
    )
    done = cli("run", "learn.yaml", "-o", "made")

    assert 2 == done.code
    assert "error: sequence length 100000 is more than the" in done.err
    assert not Path("made").exists()


def test_a_text_that_is_too_short_to_hold_some_of_it_out_is_refused_before_any_work(cli, tiny_llama, tmp_path):
    (tmp_path / "short.txt").write_text(TEXT * 12, encoding="utf-8")
    done = quantize(cli, tiny_llama, "short.txt", "--learn", "512")

    assert 2 == done.code
    assert "windows of text, of which 16 are held out\nhint: use a longer text, or a smaller `--seqlen`\n" in done.err
    assert not Path("made").exists()


def test_a_text_is_read_once(cli, tiny_llama, text):
    done = quantize(cli, tiny_llama, text, "--preset", "fast", "--learn", "512")

    assert 0 == done.code, done.err
    assert 2 == done.err.count("calibration text: ")  # that of `quantize`, and what is learned from


@pytest.mark.parametrize(("processes", "micro"), [(1, 4), (2, 4), (4, 2), (8, 1)])
def test_every_process_learns(asked, tiny_llama, text, monkeypatch, processes, micro):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    _, learning = asked("quantize", tiny_llama, "--calib", text, *SHORT, "--learn", "512").recipe.stages

    assert (8, micro) == (learning.batch, learning.micro)


def test_a_result_of_other_settings_is_told_before_any_work(cli, tiny_llama, text):
    assert 0 == quantize(cli, tiny_llama, text, "--learn", "512").code
    done = quantize(cli, tiny_llama, text, "--learn", "1024", "--format", "gptq")

    assert 2 == done.code
    assert "error: `made/finetuned` exists and is not empty" in done.err
    assert not list(Path("made").glob("gptq*"))


@pytest.mark.parametrize(("more", "windows"), [((), 600_000 // 512 + 1), (("--seqlen", "100"), 6000)])
def test_there_are_as_many_windows_as_the_tokens_fill(asked, tiny_llama, text, more, windows):
    _, learning = asked("quantize", tiny_llama, "--calib", text, "--learn", "600000", *more).recipe.stages

    assert windows + 16 == learning.text.num_samples  # the model has 512 positions


@pytest.mark.parametrize("seqlen", ["0", "-3"])
def test_no_window_is_so_short(cli, tiny_llama, text, seqlen):
    done = cli("quantize", tiny_llama, "--calib", text, "--learn", "512", "--seqlen", seqlen, "-o", "made")

    assert 2 == done.code
    assert f"error: `--seqlen {seqlen}`: must be greater than or equal to 2\n" in done.err


@pytest.mark.parametrize("model", ["nowhere", "no where", "nowhere/model"])
def test_a_model_that_is_not_there_is_said_as_without(cli, text, model):
    """The length of its windows is asked for before it is looked for."""
    told = [cli("quantize", model, "--calib", text, "-o", "made", *more) for more in ((), ("--learn", "512"))]

    assert 2 == told[0].code
    assert told[0] == told[1]


def test_amounts_that_nobody_has_are_refused(cli, tiny_llama, text):
    for words in (("--learn", "1" + 20 * "0"), ("--num-samples", "1" + 20 * "0")):
        done = cli("quantize", tiny_llama, "--calib", text, *words, "-o", "made")
        assert 2 == done.code
        assert f"error: `{' '.join(words)}`: must be less than or equal to " in done.err


def test_one_of_a_kind_is_told_as_one(cli, tiny_llama, text):
    cli("quantize", tiny_llama, "--preset", "rtn", "-o", "made")
    few = ("--calib", text, "--seqlen", "32", "--device", "cpu", "-o", "learned")
    once = ("--tokens", "64", "--batch", "1", "--micro", "1")
    done = cli("finetune", "made", "--teacher", tiny_llama, *few, *once, "--num-samples", "1")
    assert "  1 sequence, 32 tokens\n" in done.err
    assert "error: 1 window of text, of which 8 are held out\n" in done.err
    done = cli("finetune", "made", "--teacher", tiny_llama, *few, *once, "--num-samples", "9")
    assert 0 == done.code, done.err
    assert "1 window is read 2.0 times" in done.err
    done = cli("eval", "made", "--tasks", f"ppl:{text}", "--seqlen", "32", "--limit", "1", "--device", "cpu")
    assert "  1 score\n" in done.err
    assert "1 window of 32 tokens" in done.out
