"""`--backend vllm`: what becomes of vLLM's log-probabilities, and how an evaluation goes through a stand-in for the engine."""

import contextlib
import math
import os
import sys
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch

from marlin_tools.backends import load, vllm
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import DeviceError, RecipeError
from marlin_tools.evaluation.evaluate import EvaluateSettings, evaluate
from marlin_tools.evaluation.judge import Judge
from marlin_tools.evaluation.record import Record
from marlin_tools.events import silent


def _given(logits, ids, count):
    """`prompt_logprobs` as vLLM gives them: nothing for the first, then the likeliest words and the word that stands there."""
    logs = logits.float().log_softmax(-1)
    rows = [None]
    for row, word in zip(logs, ids[1:], strict=False):
        words = {*row.topk(count).indices.tolist(), word}
        rows.append({each: SimpleNamespace(logprob=row[each].item()) for each in words})
    return rows


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, 50, generator=generator) * 3
    return base, base + torch.randn(7, 50, generator=generator) * 0.5, torch.randint(0, 50, (8,), generator=generator).tolist()


def test_the_loss_is_exact(predictions):
    base, _, ids = predictions
    expected = torch.nn.functional.cross_entropy(base, torch.tensor(ids[1:]))

    assert vllm.reading(ids, _given(base, ids, 4)).loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_divergence_is_exact_over_the_whole_vocabulary(predictions):
    base, model, ids = predictions
    p, q = base.log_softmax(-1), model.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1).mean().item()

    kl, same = vllm.divergence(vllm.reading(ids, _given(model, ids, 50)), vllm.reading(ids, _given(base, ids, 50)))

    assert kl == pytest.approx(exact, rel=1e-4)
    assert same == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


@pytest.mark.parametrize("count", [1, 4, 16, 40])
def test_with_fewer_words_it_is_a_lower_bound(predictions, count):
    base, model, ids = predictions
    p, q = base.log_softmax(-1), model.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1).mean().item()

    kl, _ = vllm.divergence(vllm.reading(ids, _given(model, ids, count)), vllm.reading(ids, _given(base, ids, count)))

    assert 0 <= kl <= exact + 1e-6
    assert count < 16 or kl > 0.9 * exact


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match="vLLM is not installed"):
        vllm.VllmEngine(None, 8, items=True, batch=1, seed=0, emit=silent)


def test_an_engine_that_does_not_start_is_one_line(int4, monkeypatch):
    asked = {}

    def refuse(**given):
        asked.update(given, **{name: os.environ.get(name) for name in vllm._USUAL})
        raise RuntimeError("Engine core initialization failed.\nSee above")

    monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_STREAM": "ext://sys.stdout"})
    monkeypatch.setattr(vllm, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=refuse))

    with pytest.raises(DeviceError) as caught:
        vllm.VllmEngine(Checkpoint.open(int4), 8, items=True, batch=1, seed=0, emit=silent)
    assert caught.value.message == f"vLLM did not start with `{int4}`: Engine core initialization failed."
    assert "--backend native" in str(caught.value.hint)
    assert asked["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"  # a fork of a process that asked about GPUs can use none
    assert asked["VLLM_LOGGING_STREAM"] == "ext://sys.stdout"  # the user's


def test_an_engine_says_of_itself_what_a_loaded_model_does(int4, monkeypatch):
    made = SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16)))
    monkeypatch.setattr(vllm, "find_spec", lambda _: True)
    monkeypatch.setattr(vllm, "version", lambda _: "0.22.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=lambda **_: made))
    heard = []
    load(int4, device="cpu", emit=heard.append)
    told = next(event.data for event in heard if event.kind == "note" and event.data)

    served = vllm.VllmEngine(Checkpoint.open(int4), 8, items=True, batch=1, seed=0, emit=silent)
    assert served.how == {"backend": "vllm", "device": "a GPU", "computed_in": "bfloat16", "vllm": "0.22.1"}
    assert set(told) - {"activations"} <= set(served.how)


def test_only_evaluation_goes_through_vllm(int4):
    with pytest.raises(RecipeError) as caught:
        load(int4, backend="vllm", device="cpu")
    assert "vllm serve DIR" in str(caught.value.hint)


def test_vllm_rounds_activations_as_it_likes(int4, text):
    settings = EvaluateSettings(tasks=(text,), backend="vllm", activations="fp8")
    with pytest.raises(RecipeError, match=r"rounds activations as config\.json says"):
        evaluate(int4, settings)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_device_is_not_ignored(int4, text, device):
    with pytest.raises(RecipeError, match=f"not on `{device}`") as caught:
        evaluate(int4, EvaluateSettings(tasks=(text,), backend="vllm", device=device))
    assert "CUDA_VISIBLE_DEVICES" in str(caught.value.hint)


def test_room_is_kept_for_what_is_read():
    def room(positions, longest, *, items):
        return vllm._options(positions, longest, items=items)["max_model_len"]

    assert room(131072, 4096, items=False) == 4097
    assert room(4096, 2048, items=True) == 4096
    assert room(131072, 0, items=True) == 32768
    assert room(131072, 40000, items=True) == 40001
    assert "hf_overrides" not in vllm._options(4096, 2048, items=True)


def test_a_window_as_long_as_the_model_has_positions_gets_one_more():
    part = SimpleNamespace(max_position_embeddings=2048)
    nested = SimpleNamespace(get_text_config=lambda: part, max_position_embeddings=7)
    whole = vllm._options(2048, 2048, items=True)

    assert whole["max_model_len"] == 2049
    assert ForkingPickler.dumps(whole["hf_overrides"])  # it goes to the engine's process
    assert whole["hf_overrides"](nested) is nested
    assert (part.max_position_embeddings, nested.max_position_embeddings) == (2049, 7)


def test_an_engine_that_dies_is_one_line():
    class EngineDeadError(Exception):
        __module__ = "vllm.v1.engine.exceptions"

    served = object.__new__(vllm.VllmEngine)
    served._origin = "somewhere"
    served.judge = SimpleNamespace(model=SimpleNamespace(llm_engine=SimpleNamespace(engine_core=None)))
    with pytest.raises(DeviceError, match="vLLM ended while it read `somewhere`: gone"), served:
        raise EngineDeadError("gone")


def test_what_vllm_is_decides_whether_an_evaluation_is_taken_over(int4, tmp_path, text, monkeypatch):
    def fingerprint(backend):
        return Record(tmp_path, Checkpoint.open(int4), EvaluateSettings(tasks=(text,), backend=backend), None).fingerprint

    found = {fingerprint("vllm"), fingerprint("reference")}
    monkeypatch.setenv("MARLIN_TOOLS_VLLM", "0")
    assert fingerprint("vllm") not in found
    assert fingerprint("reference") in found


@pytest.fixture
def engine(monkeypatch):
    """Stands for vLLM with the reference backend; `alive` counts engines that were not ended."""
    state = SimpleNamespace(alive=0, most=0)

    class Engine(contextlib.AbstractContextManager):
        def __init__(self, checkpoint, longest, *, items, batch, seed, emit):
            assert (items, batch, seed) == (False, "auto", 1234)
            self.model = load(checkpoint, device="cpu", backend="reference")
            self.judge = Judge(self.model, checkpoint.tokenizer(), 8, emit)
            self.how = {"backend": "vllm", "device": "stand-in", "computed_in": "float32", "vllm": "0"}
            state.alive += 1
            state.most = max(state.most, state.alive)

        def __exit__(self, *_):
            state.alive -= 1

        def read(self, _name, sequences, _emit):
            with torch.inference_mode():
                logits = [self.model(each[None]).logits[0] for each in sequences]
            size = logits[0].shape[-1]
            return [
                vllm.reading(each.tolist(), _given(row[:-1], each.tolist(), size))
                for each, row in zip(sequences, logits, strict=True)
            ]

    monkeypatch.setattr(vllm, "VllmEngine", Engine)
    return state


def test_the_scores_are_those_of_the_same_model_elsewhere(engine, model, int4, text):
    def scores(backend):
        device = "auto" if backend == "vllm" else "cpu"
        settings = EvaluateSettings(tasks=(text,), seqlen=32, limit=4, backend=backend, device=device)
        return evaluate(int4, settings, baseline=model)

    there, here = scores("vllm"), scores("reference")

    assert [score.metric for score in there.scores] == [score.metric for score in here.scores]
    for ours, theirs in zip(there.scores, here.scores, strict=True):
        assert math.isclose(ours.value, theirs.value, rel_tol=1e-3, abs_tol=1e-6)
    assert "lower bound" in there.scores[0].details["kl"]
    assert there.model["backend"] == "vllm"
    assert (engine.alive, engine.most) == (0, 1)
