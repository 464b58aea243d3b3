"""What a page and a card say of scores and of how a model came to be: no more than is known, and the worst first."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from marlin_tools import report
from marlin_tools.compress.export import export
from marlin_tools.evaluation.scores import Score
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.report.page import page as render
from marlin_tools.report.result import gather
from marlin_tools.run.execute import execute
from marlin_tools.run.plan import plan
from marlin_tools.verification.verify import Check, Verification
from report_pages import card_of, changed, read


@pytest.mark.parametrize(("items", "shown"), ((2, False), (99, False), (100, True)))
def test_a_few_items_make_no_headline(made, items, shown):
    score = Score("t", "acc", 1.0, 0.0, True, 1.0, 0.0, 0.0, 0.01, None, {"items": items, "on": f"{items} items, 0-shot"})
    result = gather(made / "marlin", None)
    result = replace(result, evaluation=replace(gather(made / "compressed-tensors", None).evaluation, scores=(score,)))
    page = render("model.html.j2", result=result, steps=[])

    assert shown == ("of the original at worst ± 1.0: t, accuracy, 100 items, 0-shot" in page)
    assert shown == ('<p class="what">Recovery</p>' in page)


def scored(name, value, baseline=1.0, better=True, items=400):
    on = {"items": items, "on": f"{items} items, 0-shot"}
    return Score(name, "acc", value, 0.0, better, baseline, 0.0, None, None, None, on)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("turned", (False, True))
def test_a_score_that_is_not_finite_is_the_worst_wherever_it_stands(made, value, turned):
    scores = (scored("good", 0.9), scored("ruined", value, better=False, items=4), scored("bad", 0.0))
    result = gather(made / "marlin", None)
    evaluation = replace(gather(made / "compressed-tensors", None).evaluation, scores=scores[::-1] if turned else scores)
    page = "".join(read(render("model.html.j2", result=replace(result, evaluation=evaluation), steps=[])).text)

    assert "nothing is left of the original: ruined, accuracy is not finite, 4 items, 0-shot" in page
    assert "at worst" not in page
    assert "nan %" not in page


def test_a_part_of_a_group_is_not_the_worst(made):
    """One of many parts is, by chance; the group speaks for all of them."""
    part = replace(scored("part", 0.1), part_of="group")
    result = gather(made / "marlin", None)
    evaluation = replace(gather(made / "compressed-tensors", None).evaluation, scores=(part, scored("group", 0.9)))

    assert "group" == replace(result, evaluation=evaluation).headline.task


def test_a_check_that_was_not_made_is_told(made):
    checks = (Check("files", True, "7 tensors"), Check("logits", True, "no stored reference", skipped=True))
    result = replace(gather(made / "marlin", None), verification=Verification(checks, ()))

    assert ["Check `logits` was skipped: no stored reference"] == [each for each in result.remarks if each.startswith("Check")]


def test_numbers_of_a_ruined_model_fit_into_a_table(made):
    scores = (scored("huge", 1.7e308, better=False), scored("turned", 2.0, baseline=3e300, better=False))
    result = gather(made / "marlin", None)
    result = replace(result, evaluation=replace(gather(made / "compressed-tensors", None).evaluation, scores=scores))
    page, card = render("model.html.j2", result=result, steps=[]), card_of(result)

    for text in (page, card):
        assert "1.7000e+308" in text
        assert "1.5e+302 %" in text
        assert not re.search(r"\d{40}", text)


LEARNING = {"text": {"source": "demo", "num_samples": 12, "seqlen": 64}, "tokens": 256, "batch": 2, "micro": 2}
SPARSE = [
    {"stage": "prune", "preset": "magnitude"},
    {"stage": "finetune", **LEARNING},
    {"stage": "quantize", "preset": "rtn", "sparsity": "keep", "format": "marlin-24"},
    {"stage": "evaluate", "tasks": ["ppl:demo"], "limit": 2},
]


def test_every_model_of_a_chain_has_its_page(tmp_path):
    report.write_pages(execute(plan(Recipe.model_validate({"name": "x", "model": "demo", "stages": SPARSE}), tmp_path / "x")))
    pages = {name: (tmp_path / "x" / name / "report.html") for name in ("pruned", "finetuned", "marlin-24")}
    pruned, finetuned, quantized = ("".join(read(path.read_text(encoding="utf-8")).text) for path in pages.values())

    for text in (pruned, finetuned):
        assert "demo · 2:4, 16 bits" in text
        assert "50.0 %" in text
        assert "Nobody has measured this model yet." in text
        assert "--sparsity keep --format marlin-24" in text
        assert "Not verified" not in text
    assert "energy that pruning has taken" in pruned
    assert "Finetuning report" in finetuned
    assert f"marlin-tools finetune {tmp_path / 'x' / 'pruned'} --teacher demo --calib demo" in pruned
    assert "--sparsity keep --format marlin-24 --calib demo" in finetuned
    assert "marlin-tools finetune" not in finetuned
    kl = json.loads((tmp_path / "x" / "finetuned" / "manifest.json").read_text(encoding="utf-8"))["held_out_kl"]
    assert f"It began at {kl[0][1]:.4f} and ended at {kl[-1][1]:.4f} nats" in finetuned
    assert len(kl) == pages["finetuned"].read_text(encoding="utf-8").count("<title>after ")
    assert "pruned to 2:4 (preset magnitude), then finetuned on 256 tokens" in quantized
    assert not (tmp_path / "x" / "pruned" / "README.md").exists()


LEARNED = [
    {"stage": "quantize", "preset": "rtn"},
    {"stage": "finetune", **LEARNING},
    {"stage": "export", "formats": ["gptq"]},
]


def test_a_quantised_model_that_has_learned_says_so_in_every_format(tmp_path):
    recipe = Recipe.model_validate({"name": "x", "model": "demo", "stages": LEARNED})
    report.write_pages(execute(plan(recipe, tmp_path / "x")))
    kept = json.loads((tmp_path / "x" / "finetuned" / "manifest.json").read_text(encoding="utf-8"))["best_step"]
    for name in ("finetuned", "gptq"):
        told = "".join(read((tmp_path / "x" / name / "report.html").read_text(encoding="utf-8")).text)
        assert "quantised (preset rtn), then finetuned on 256 tokens with the original as the teacher" in told
        assert f"Kept is the best state, that after {kept} steps." in told
        assert "Finetuning report" in told
        assert "trained on text of demo (768 tokens with those held out)" in told
        assert "training text" in told
        assert "calibrat" not in told.lower().partition("the recipe, with every setting")[0]
        card = (tmp_path / "x" / name / "README.md").read_text(encoding="utf-8")
        assert "Embeddings and the head are as in the original" in card
        assert "Trained on 12 sequences (768 tokens with those held out) of `demo`" in card
        assert "alibrated on" not in card
        assert "unknown" not in card


def test_what_another_tool_has_quantised_is_not_claimed_to_be_known(made, tmp_path):
    theirs = Path(shutil.copytree(made / "compressed-tensors", tmp_path / "theirs"))
    (theirs / "manifest.json").unlink()
    export(theirs, "gptq", tmp_path / "ours")
    page, card = (report.pages(tmp_path / "ours")[0][name] for name in ("report.html", "README.md"))
    told = "".join(read(page).text)

    assert "theirs in the format gptq: quantised by another tool (how is not recorded)." in told
    assert "Quantised by another tool; how is not recorded." in card
    assert "All other tensors are as in that model." in card
    for word in ("unknown", "calibration data", "as in the original", "damping", "preset", "errors by layer"):
        assert word not in told + card
    assert "quantised by another tool (how is not recorded)" == gather(theirs, None).method


def test_an_export_among_the_steps_is_what_it_has_stored_anew(made):
    """What is trained after an export was quantised before it, or by somebody else."""
    result = gather(made / "marlin", None)
    own = {key: result.manifest[key] for key in ("stage", "model", "settings")}
    foreign = {"stage": "export", "model": {"origin": "x", "fingerprint": "f"}}
    learned = {"teacher": {"origin": "demo"}, "settings": {"tokens": 256}, "solver": None}
    taught = "finetuned on 256 tokens with the original as the teacher"

    assert "export" == own["stage"]
    assert f"quantised (preset rtn), then {taught}" == changed(result, **learned, history=[own]).method
    after = changed(result, **learned, history=[foreign])
    assert f"quantised by another tool (how is not recorded), then {taught}" == after.method
    assert "All other tensors but the norms are as in that model." in card_of(after)
