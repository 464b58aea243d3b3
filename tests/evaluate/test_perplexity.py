"""Perplexity, divergence and agreement against their plainest forms."""

import json
import math
import shutil
from statistics import fmean, stdev

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from marlin_tools.backends import load
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import DataError, DeviceError, ModelError
from marlin_tools.evaluation import evaluate as stage
from marlin_tools.evaluation import perplexity
from marlin_tools.evaluation.perplexity import Traces, score_text, trace
from marlin_tools.evaluation.scores import mean_and_error
from marlin_tools.events import silent
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.run.plan import plan


def windows(model, text, length):
    ids = AutoTokenizer.from_pretrained(model)(open(text.removeprefix("ppl:")).read())["input_ids"]  # noqa: PTH123, SIM115
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


@torch.no_grad()
def predictions(network, ids):
    """Log-probabilities of the word after each token but the last, in float64."""
    return network(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def loss(network, ids):
    return fmean(-row[word].item() for row, word in zip(predictions(network, ids), ids[1:], strict=True))


def test_perplexity_is_that_of_the_plain_formula(model, text, run):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    parts = windows(model, text, 32)
    losses = [loss(network, ids) for ids in parts]
    score = run(model, text, seqlen=32).score(text)

    assert len(parts) > 5
    assert pytest.approx(math.exp(fmean(losses)), rel=1e-6) == score.value
    assert pytest.approx(score.value * stdev(losses) / math.sqrt(len(losses)), rel=1e-4) == score.stderr


def test_a_score_that_is_no_number_is_a_warning(int4, text, run, tmp_path):
    broken, events = shutil.copytree(int4, tmp_path / "broken"), []
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name].fill_(math.nan)
        save_file(tensors, file)
    result = run(broken, text, seqlen=32, emit=events.append)

    assert not math.isfinite(result.score(text).value)
    (told,) = [event.text for event in events if event.kind == "warning" and "perplexity is not finite" in event.text]
    assert told in result.notes


@pytest.mark.parametrize("ruined", [353, 360, 690, 705])
def test_a_ruined_model_has_scores_whatever_its_loss(ruined):
    """Squares of its perplexity are more than a float holds, and from 710 on that is as well."""
    losses = [ruined - 4.0, ruined + 0.0, ruined + 4.0]
    perplexity, *_ = score_text("ppl:text", Traces(losses, [3.0, 3.5, 4.0], [2.0] * 3, [0.0] * 3), {})

    assert (math.exp(ruined) if ruined < 700 else math.inf) == perplexity.value
    assert pytest.approx(0.0, abs=1e-9) == perplexity.recovery
    assert "0.0 %" == perplexity.row()[-1]
    if ruined == 353:
        moved = 4 / math.sqrt(3)  # of the loss, beside which that of the baseline is nothing
        assert pytest.approx(perplexity.recovery * moved, rel=1e-3) == perplexity.recovery_stderr


@pytest.mark.parametrize("values", [[math.inf, -math.inf], [1e308] * 3, [1e200, -1e200, 3.0]])
def test_errors_beyond_a_float_are_said_to_be_that(values):
    _, error = mean_and_error(values)

    assert not math.isfinite(error)


def test_the_number_carries_how_it_was_measured(model, text, run):
    details = run(model, text, seqlen=32).score(text).details

    count = len(windows(model, text, 32))
    assert (32, 32, count, 32 * count) == tuple(details[key] for key in ("seqlen", "stride", "sequences", "tokens"))
    assert "none" == details["bos"]  # this tokenizer adds none
    assert any("no BOS" in note for note in details["notes"])


def test_the_window_is_the_models_positions_unless_it_has_more_than_4096(model, text, run):
    with pytest.raises(DataError, match="windows of 512 tokens"):
        run(model, text)
    with pytest.raises(DataError, match="window length 513 is more than the 512 positions"):
        run(model, text, seqlen=513)


def test_divergence_and_agreement_are_those_of_the_plain_formula(model, int4, text, run):
    original, quantized = (load(folder, device="cpu") for folder in (model, int4))
    divergences, agreements, losses = [], [], []
    for ids in windows(model, text, 32):
        p, q = predictions(original, ids), predictions(quantized, ids)
        divergences.append(fmean(sum(a.exp() * (a - b)).item() for a, b in zip(p, q, strict=True)))
        agreements.append(fmean(float(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)))
        losses.append((loss(quantized, ids), loss(original, ids)))
    result = run(int4, text, baseline=model, seqlen=32)
    ppl, kl, top1 = (result.score(text, metric) for metric in ("perplexity", "kl", "top1"))

    assert pytest.approx(fmean(divergences), rel=1e-4) == kl.value
    assert pytest.approx(stdev(divergences) / math.sqrt(len(divergences)), rel=1e-3) == kl.stderr
    assert pytest.approx(fmean(agreements)) == top1.value
    value, base = (math.exp(fmean(column)) for column in zip(*losses, strict=True))
    assert pytest.approx((value, base, value - base), rel=1e-5) == (ppl.value, ppl.baseline, ppl.difference)
    assert pytest.approx(100 * (value / base - 1), rel=1e-3) == ppl.increase
    assert pytest.approx(100 * base / value, rel=1e-5) == ppl.recovery
    moved = [value * a - base * b for a, b in losses]
    assert pytest.approx(stdev(moved) / math.sqrt(len(moved)), rel=1e-3) == ppl.difference_stderr


def test_a_model_does_not_differ_from_itself(model, text, run):
    result = run(model, text, baseline=model, seqlen=32)

    assert (0.0, 0.0) == (result.score(text, "kl").value, result.score(text, "kl").stderr)
    assert 1.0 == result.score(text, "top1").value
    assert (0.0, 0.0, 100.0) == tuple(getattr(result.score(text), n) for n in ("difference", "difference_stderr", "recovery"))


def test_slices_and_batches_do_not_change_the_result(int4, model, monkeypatch):
    tokens = TokenSet(tuple(torch.randint(0, 512, (5, 40)).unbind()), "random", packed=True, documents=1)
    models = load(int4, device="cpu"), load(model, device="cpu")
    whole = trace(*models, tokens, max_tokens=1000, emit=print)
    monkeypatch.setattr(perplexity, "_SLICE_BYTES", 4 * 512 * 7)
    sliced = trace(*models, tokens, max_tokens=40, emit=print)

    for name in ("loss", "base_loss", "kl", "top1"):
        assert pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-7) == getattr(sliced, name)


def test_documents_count_alike_whatever_their_length(model):
    documents = [torch.randint(0, 512, (length,)) for length in (3, 50, 50, 9)]
    network = load(model, device="cpu")
    traces = trace(network, None, TokenSet(tuple(documents), "random", packed=False, documents=4), 100, emit=print)

    assert pytest.approx([loss(network, ids.tolist()) for ids in documents], rel=1e-5) == traces.loss


def test_limit_takes_the_first_windows(model, text, run):
    found = {limit: run(model, text, seqlen=32, limit=limit).score(text).details for limit in (3, 1, 0.25)}
    shares = {limit: details["sequences"] for limit, details in found.items()}

    assert {3: 3, 1: 1, 0.25: math.ceil(len(windows(model, text, 32)) / 4)} == shares
    assert "limit 0.25" in found[0.25]["notes"]


@pytest.mark.parametrize("free", (1000, 1 << 28, 1 << 31, 5 << 30, 1 << 40))
def test_what_is_computed_at_a_time_fits_into_half_of_the_free_memory(model, monkeypatch, free):
    """Logits alone, of 512 words for 512 positions, take no more than that; one item or token is computed anyhow."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for module in (stage, perplexity):
        monkeypatch.setattr(module, "free_memory", lambda _: free)
    one, both = (perplexity.tokens_per_batch(network, copies) for copies in (1, 2))
    items = stage.choose_batch(network, silent)

    assert both == 1 or both < one or both == perplexity.MAX_TOKENS
    assert one == 1 or 4 * 512 * one + 4 * perplexity._SLICE_BYTES <= free // 2
    assert items in {1, 2, 4, 8, 16, 32, 64}
    assert items == 1 or 8 * 512 * 512 * items <= free // 2
    assert (items > 4) == (free > 1000)  # positions that the model has not take no room
    assert (free == 1 << 40) == ((64, perplexity.MAX_TOKENS) == (items, both))


@pytest.mark.parametrize("choice", ({"limit": 1.5}, {"limit": 0}, {"batch_size": 0}))
def test_amounts_that_mean_nothing_are_refused(choice):
    with pytest.raises(ValueError, match=next(iter(choice))):
        stage.EvaluateSettings(tasks=("ppl:demo",), **choice)


@pytest.mark.parametrize(("positions", "asked", "window"), ((8192, None, 4096), (512, None, 512), (8192, 6000, 6000)))
def test_windows_are_as_long_as_those_that_others_publish_where_they_can_be(tiny_model, positions, asked, window):
    checkpoint = Checkpoint.open(tiny_model("llama", max_position_embeddings=positions))
    assert window == stage._window(stage.EvaluateSettings(tasks=("ppl:demo",), seqlen=asked), checkpoint)


def test_a_number_of_positions_that_is_null_is_a_plain_error(model, text, run, tmp_path):
    folder = shutil.copytree(model, tmp_path / "null")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": None}))

    with pytest.raises(ModelError, match="max_position_embeddings"):
        run(folder, text, seqlen=32)


class Cramped(torch.nn.Module):
    """Runs out of memory above two sequences."""

    def __init__(self, model, most=2):
        super().__init__()
        self.model, self.most, self.device = model, most, model.device
        self.batches = []

    def forward(self, input_ids, **options):
        self.batches.append(len(input_ids))
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("no")
        return self.model(input_ids=input_ids, **options)


def test_batches_are_halved_until_they_fit(model):
    tokens = TokenSet(tuple(torch.randint(0, 512, (7, 20)).unbind()), "random", packed=True, documents=1)
    network, events = load(model, device="cpu"), []
    cramped = Cramped(network)

    assert trace(network, None, tokens, 20, print).loss == pytest.approx(trace(cramped, None, tokens, 140, events.append).loss)
    assert [7, 3, 1, 1, 1, 1, 1, 1, 1] == cramped.batches
    assert [True, True] == ["out of memory" in event.text for event in events if event.kind == "warning"]


def test_a_sequence_that_never_fits_is_a_plain_error(model):
    tokens = TokenSet((torch.zeros(20, dtype=torch.int64),), "zeros", packed=True, documents=1)

    with pytest.raises(DeviceError, match="one sequence of 20 tokens does not fit"):
        trace(Cramped(load(model, device="cpu"), most=0), None, tokens, 20, print)


def test_another_vocabulary_cannot_be_a_baseline(model, text, run, tiny_model):
    with pytest.raises(DataError, match=r"vocabularies of .* \(512 words\) and .* \(520 words\) differ"):
        run(model, text, seqlen=32, baseline=tiny_model("llama", vocab_size=520))


@pytest.mark.parametrize("dry", [True, False])
def test_another_vocabulary_is_told_before_anything_is_made(model, text, tiny_model, tmp_path, dry):
    stages = [
        {"stage": "quantize", "preset": "rtn"},
        {"stage": "evaluate", "tasks": [text], "seqlen": 32, "baseline": str(tiny_model("llama", vocab_size=520))},
    ]
    recipe = Recipe.model_validate({"name": "r", "model": str(model), "stages": stages})

    with pytest.raises(DataError, match=r"vocabularies of .* \(512 words\) and .* \(520 words\) differ"):
        plan(recipe, tmp_path / "out", dry=dry)


def test_a_dry_run_opens_no_baseline_that_is_not_here(model, text, tmp_path):
    stages = [{"stage": "evaluate", "tasks": [text], "seqlen": 32, "baseline": "nobody/has-this"}]

    plan(Recipe.model_validate({"name": "r", "model": str(model), "stages": stages}), tmp_path / "out", dry=True)


def test_a_baseline_for_questions_alone_may_have_other_words(model, tiny_model, tmp_path, write_task):
    asked = {"tasks": ["fish"], "include_path": [str(write_task("fish"))], "baseline": str(tiny_model("llama", vocab_size=520))}
    recipe = Recipe.model_validate({"name": "r", "model": str(model), "stages": [{"stage": "evaluate", **asked}]})

    plan(recipe, tmp_path / "out")


def test_the_demo_text_is_known_by_name(run):
    score = run("demo", "ppl:demo", limit=4).score("ppl:demo")

    assert (4, None, "one per document") == tuple(score.details[key] for key in ("sequences", "stride", "bos"))
    assert 1.2 < score.value < 5
