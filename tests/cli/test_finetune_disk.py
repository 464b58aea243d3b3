"""`finetune --dry-run` names the disk that the run itself asks for, and what `--learn` leaves in which format."""

import json
from pathlib import Path

import pytest

import marlin_tools.training.finetune
from marlin_tools.checkpoint.output import gigabytes

SHORT = ("--calib", "boat.txt", "--seqlen", "32", "--num-samples", "24", "--device", "cpu")
QUANTISE = ("quantize", "--preset", "rtn")
PRUNE = ("prune", "--preset", "magnitude")


@pytest.mark.parametrize(
    ("make", "learn"),
    [
        (QUANTISE, ()),
        ((*QUANTISE, "--format", "gptq"), ("--code-rate", "0")),
        ((*QUANTISE, "--group-size", "-1", "--ignore", "q_proj"), ()),
        (PRUNE, ()),
        ((*PRUNE, "--ignore", "down_proj"), ()),
    ],
)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_the_dry_run_names_the_disk_that_the_run_asks_for(cli, request, monkeypatch, make, learn, model):
    model = request.getfixturevalue(model)
    Path("boat.txt").write_text("The boat left the harbour at dawn. " * 120, encoding="utf-8")
    verb, *how = make
    assert 0 == cli(verb, model, *how, "--device", "cpu", "-o", "made").code
    words = ("finetune", "made", "--teacher", model, *SHORT, "--tokens", "256", "--batch", "8", *learn)
    planned = cli(*words, "--dry-run", "--json")
    assert 0 == planned.code, planned.err
    asked = []
    monkeypatch.setattr(marlin_tools.training.finetune, "check_space", lambda _out, need: asked.append(need))
    done = cli(*words, "-o", "learned")
    assert 0 == done.code, done.err

    (step,) = json.loads(planned.out)["steps"]
    assert [gigabytes(need) for need in asked] == [step["facts"]["disk"]]


def test_what_has_learned_is_stored_as_the_model_before(cli, tiny_llama):
    Path("boat.txt").write_text("The boat left the harbour at dawn. " * 120, encoding="utf-8")
    done = cli("quantize", tiny_llama, "--preset", "rtn", *SHORT, "--learn", "256", "--format", "gptq,marlin", "--dry-run")

    assert 0 == done.code, done.err
    assert "`gptq`, as the model before it has learned, which stays" in done.out
