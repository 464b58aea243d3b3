"""evaluation.json: checked before the work, and good for what it was measured on."""

import errno
import os
from types import SimpleNamespace

import pytest

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import MarlinToolsError
from marlin_tools.evaluation import record
from marlin_tools.evaluation.evaluate import EvaluateSettings
from marlin_tools.evaluation.record import Record


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
    monkeypatch.setattr(record, "pick_device", lambda _name: SimpleNamespace(type="another"))
    assert measure(limit=2)[1]


def test_a_place_that_cannot_be_written_is_said_before_any_work(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)

    def evaluate(*_args, **_options):
        raise AssertionError("it was measured")

    monkeypatch.setattr(record, "evaluate", evaluate)
    with pytest.raises(MarlinToolsError) as caught:
        measure()

    assert os.strerror(errno.EACCES) in caught.value.message
