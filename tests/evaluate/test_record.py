"""evaluation.json: checked before the work, and good for what it was measured on."""

import errno
import json
import math
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from marlin_tools.checkpoint.contract import Scored
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import DataError, MarlinToolsError, ModelError, OutputError, RecipeError
from marlin_tools.evaluation import record
from marlin_tools.evaluation.evaluate import EvaluateSettings
from marlin_tools.evaluation.record import Record, read_record
from marlin_tools.evaluation.scores import Score
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.run.plan import plan


@pytest.fixture
def measure(model, text, tmp_path):
    def call(home=tmp_path / "home", **settings):
        chosen = EvaluateSettings(tasks=(text,), device="cpu", seqlen=32, **settings)
        found = Record(home, Checkpoint.open(model), chosen, None)
        earlier = found.found()
        return earlier or found.measure(), earlier is None

    return call


def test_what_was_measured_is_taken_over_until_something_changes(measure, monkeypatch):
    first, fresh = measure()
    again, measured = measure()

    assert (True, False) == (fresh, measured)
    assert first.scores == again.scores
    assert measure(limit=2)[1]
    assert measure(limit=2, seed=1)[1]
    assert not measure(limit=2, seed=1)[1]
    monkeypatch.setattr(record, "versions", lambda: {"torch": "another"})
    assert measure(limit=2, seed=1)[1]
    monkeypatch.setattr(record, "pick_device", lambda _name: SimpleNamespace(type="another"))
    assert measure(limit=2, seed=1)[1]


@pytest.mark.parametrize(
    ("content", "told"),
    (
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"scores": []}', "`fingerprint` is missing"),
        ('{"fingerprint": "x", "model": "x"}', "`model` must be"),
    ),
)
def test_what_we_did_not_write_is_an_error_to_readers_and_nothing_to_a_measurement(measure, tmp_path, content, told):
    measure()
    written = (tmp_path / "home" / record.NAME).read_text(encoding="utf-8")
    assert read_record(tmp_path / "home") == json.loads(written)
    (tmp_path / "home" / record.NAME).write_text(content, encoding="utf-8")

    with pytest.raises(ModelError) as caught:
        read_record(tmp_path / "home")
    assert told in caught.value.message
    assert "measure again" in str(caught.value.hint)
    assert measure()[1]
    assert (tmp_path / "home" / record.NAME).read_text(encoding="utf-8") == written


def test_what_may_not_be_read_is_not_replaced(measure, tmp_path, monkeypatch):
    measure()
    opened = os.open

    def closed(path, *flags, **rest):
        if Path(path).name == record.NAME:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *flags, **rest)

    monkeypatch.setattr(os, "open", closed)
    monkeypatch.setattr(record, "evaluate", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(ModelError, match=r"evaluation\.json` cannot be read: Permission denied") as caught:
        measure(limit=2)
    assert "let this user read it" in str(caught.value.hint)


def test_a_folder_in_the_place_of_the_record_is_told_before_the_work(measure, tmp_path, monkeypatch):
    (tmp_path / "home" / record.NAME).mkdir(parents=True)
    monkeypatch.setattr(record, "evaluate", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(OutputError, match=r"evaluation\.json` is a directory"):
        measure()


QUANTIZE = {"stage": "quantize", "preset": "rtn"}


def planned(*stages):
    return plan(Recipe.model_validate({"name": "x", "model": "demo", "stages": stages}))


@pytest.mark.parametrize(
    ("settings", "told"),
    (
        ({"tasks": ["ppl:demo"], "seqlen": 100_000}, "window length 100000 is more than"),
        ({"tasks": ["ppl:nowhere.txt"]}, "`ppl:nowhere.txt`: no such file"),
        ({"tasks": ["demo_qa"], "backend": "vllm", "activations": "fp8"}, "backend `vllm` rounds activations as config.json"),
        ({"tasks": ["demo_qb"]}, "unknown task `demo_qb`"),
        ({"tasks": ["demo_qa"], "device": "cuda:77"}, "`cuda:77` does not exist"),
    ),
)
def test_what_could_not_be_measured_is_told_before_a_model_is_made(settings, told):
    with pytest.raises(MarlinToolsError) as caught:
        planned(QUANTIZE, {"stage": "evaluate", **settings})
    assert told in caught.value.message


@pytest.mark.parametrize("stage", ({"stage": "evaluate", "tasks": ["ppl:demo"]}, {"stage": "generate", "prompt": "x"}))
def test_activations_of_linears_that_will_not_be_quantised_are_told_before_they_are_pruned(stage):
    asked = {**stage, "activations": "fp8"}
    with pytest.raises(RecipeError, match="holds no quantised linears"):
        planned({"stage": "prune", "preset": "magnitude"}, asked)
    assert planned(QUANTIZE, asked)


def test_a_baseline_of_other_words_is_told_before_a_model_is_made(model):
    with pytest.raises(DataError, match="the vocabularies of"):
        planned(QUANTIZE, {"stage": "evaluate", "tasks": ["ppl:demo"], "baseline": str(model)})
    assert planned(QUANTIZE, {"stage": "evaluate", "tasks": ["demo_qa"], "baseline": str(model)})  # which no word decides


def test_a_number_beyond_a_float_is_taken_over_as_none(measure, monkeypatch):
    """JSON has no infinity: what is null was infinite or no number, and no longer says which."""
    plain = measure(limit=1)[0]
    ruined = Score("ppl:x", "perplexity", math.inf, math.nan, higher_is_better=False).against(4.0, 0.1, math.inf)
    monkeypatch.setattr(record, "evaluate", lambda *_, **__: replace(plain, scores=(ruined,)))
    first, (again, fresh) = measure()[0], measure()
    (found,) = again.scores

    assert not fresh
    assert math.isnan(found.value)
    assert found.row()[3:] == ["nan", "4.0000 ± 0.1000", "", "0.0 %"]
    assert again.describe()["scores"] == first.describe()["scores"]


def test_every_key_of_a_score_is_looked_at():
    assert set(Scored.model_fields) == {each.name for each in fields(Score)}


def test_what_is_taken_over_took_no_time(measure):
    assert measure()[0].seconds > 0
    again = measure()[0]
    assert again.seconds is None
    assert again.describe()["times"] == {}


def test_all_that_decides_a_number_is_looked_at(tiny_llama, text, write_task, tmp_path):
    """The tokenizer beside the weights, of the baseline too, and data of tasks that lie elsewhere."""
    folder = write_task("fish")
    (folder / "fish.jsonl").rename(tmp_path / "elsewhere.jsonl")
    file = folder / "fish.yaml"
    file.write_text(file.read_text().replace("fish.jsonl", "../elsewhere.jsonl"))
    settings = EvaluateSettings(tasks=(text, "fish"), device="cpu", include_path=(folder,))
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))

    def fingerprint():
        return Record(None, Checkpoint.open(tiny_llama), settings, str(other)).fingerprint

    found = [fingerprint()]
    for changed in (tiny_llama / "tokenizer_config.json", other / "tokenizer.json", tmp_path / "elsewhere.jsonl"):
        assert found[-1] == fingerprint()
        changed.write_bytes(changed.read_bytes() + b"\n")
        found.append(fingerprint())
    assert len(set(found)) == len(found)


def test_a_place_that_cannot_be_written_is_said_before_any_work(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)

    def evaluate(*_args, **_options):
        raise AssertionError("it was measured")

    monkeypatch.setattr(record, "evaluate", evaluate)
    with pytest.raises(MarlinToolsError) as caught:
        measure()

    assert os.strerror(errno.EACCES) in caught.value.message
