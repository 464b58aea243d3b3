"""The page and the card of a model directory: complete, self-contained, honest about what is missing, the same every time."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_tools import report
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.report.advice import next_steps
from marlin_tools.report.page import TIMES, code, plain, words
from marlin_tools.report.page import page as render
from marlin_tools.report.result import Losses, gather
from marlin_tools.run.execute import execute
from marlin_tools.run.plan import plan
from report_pages import STAGES, card, card_of, changed, read


def without_times(page):
    before, _, rest = page.partition(TIMES[0])
    return before + rest.partition(TIMES[1])[2]


@pytest.fixture(scope="module")
def page(made):
    return (made / "compressed-tensors" / "report.html").read_text(encoding="utf-8")


def test_page_loads_nothing(page):
    reader = read(page)

    assert reader.loads == []
    assert not re.search(r"<script |@import|url\(|https?://(?!www\.w3)|fetch\(|XMLHttp", page)
    assert len(page) < 200_000


def test_page_says_what_people_come_for(page):
    text = "".join(read(page).text)

    for title in (
        "Before and after",
        "What each linear lost",
        "Codes and scales",
        "Time and memory",
        "What loads it",
        "How to go on",
        "How it was made",
    ):
        assert title in text
    assert "mlp.down_proj" in text
    assert "`" not in text.partition("How it was made")[0]
    assert "model.layers.1.mlp.down_proj was left as it is: matches --ignore layers.1.mlp.down_proj" in text
    stages = re.findall(r'data-label="stage"><span><span class="name">([^<]*)', page)
    assert ["quantize", "evaluate", "verify"] == stages  # nothing was calibrated


def test_numbers_on_the_page_are_those_of_the_evaluation(made, page):
    scores = json.loads((made / "compressed-tensors" / "evaluation.json").read_text(encoding="utf-8"))["scores"]

    assert len(scores) == 3
    for score in scores:
        assert f"{score['value']:.4f}" in page
    assert f"{scores[0]['baseline']:.4f}" in page


def test_every_linear_has_a_bar_of_its_own_height(made, page):
    """Heights are shares of the largest error, which has the full height."""
    linears = json.loads((made / "compressed-tensors" / "manifest.json").read_text(encoding="utf-8"))["linears"]
    section = page.partition("What each linear lost")[2].partition("</section>")[0]
    heights = [float(height) for height in re.findall(r'class="bar[^"]*"[^>]*height="([\d.]+)"', section)]
    top = max(entry["weight_error"] for entry in linears)
    kinds = list(dict.fromkeys(entry["name"].split(".", 3)[3] for entry in linears))
    ordered = [entry["weight_error"] for kind in kinds for entry in linears if entry["name"].endswith(kind)]

    assert (27, 28) == (len(linears), len(heights))  # one was left as it is, and its place is empty
    assert [pytest.approx(100 * error / top, abs=0.01) for error in ordered] == [height for height in heights if height]
    assert "block 1: left as it is" in section
    assert f"block 3: {top:.3%}" in section
    assert 1 == section.count("marked")


def test_experts_of_a_block_share_a_bar():
    names = {
        "model.layers.0.mlp.experts.0.up": 0.1,
        "model.layers.0.mlp.experts.1.up": 0.3,
        "model.layers.0.mlp.experts.2.up": 0.2,
        "model.layers.2.mlp.experts.0.up": 0.2,
    }
    entries = [{"name": name, "weight_error": loss} for name, loss in names.items()] + [
        {"name": "lm_head", "weight_error": 0.4}
    ]
    kinds = Losses("weights'", entries, "weight_error").kinds

    assert {"mlp.experts.*.up": [0.3, 0.0, 0.2], "lm_head": [0.4, 0.0, 0.0]} == {
        kind: [value for value, _ in bars] for kind, bars in kinds.items()
    }


def test_histograms_count_every_code_and_scale(made):
    """Counted again in the dumbest way."""
    directory = made / "compressed-tensors"
    stored = StoredLinears(Checkpoint.open(directory))
    codes = torch.cat([stored.read(name).codes.flatten() for name in stored.names])
    scales = torch.cat([stored.read(name).scales.flatten().float() for name in stored.names])
    weights = gather(directory, None).weights

    assert [pytest.approx(float((codes == code).double().mean())) for code in range(16)] == list(weights.codes)
    assert 1 == pytest.approx(sum(share for _, share in weights.scales))
    for low, share in weights.scales:
        inside = (scales.abs() >= low * (1 - 1e-6)) & (scales.abs() < low * 2**0.25 * (1 - 1e-6))
        assert float(inside.double().mean()) == pytest.approx(share, abs=2e-3)
    assert float((scales < 0).double().mean()) == pytest.approx(weights.negative)


def test_scales_that_are_no_magnitude_are_in_no_bin(made, tmp_path):
    """Of a ruined model: `verify` says so, and the page is made nonetheless."""
    ruined = Path(shutil.copytree(made / "compressed-tensors", tmp_path / "ruined"))
    known = gather(ruined, None).weights
    file = next(
        path for path in sorted(ruined.glob("*.safetensors")) if any("weight_scale" in name for name in load_file(path))
    )
    tensors = load_file(file)
    scales = tensors[next(name for name in tensors if "weight_scale" in name)]
    scales[:, :1] = torch.tensor([[0.0], [float("inf")]]).repeat(len(scales) // 2, 1)
    save_file(tensors, file, metadata={"format": "pt"})
    weights = gather(ruined, None).weights

    assert {low for low, _ in weights.scales} <= {low for low, _ in known.scales}
    assert sum(share for _, share in known.scales) == pytest.approx(1)
    assert sum(share for _, share in weights.scales) < 1


def test_exports_show_the_scores_of_the_same_weights(made):
    page = (made / "marlin" / "report.html").read_text(encoding="utf-8")

    assert "The same codes and scales were measured, stored as <code>compressed-tensors</code>." in page
    assert f"marlin-tools export {made / 'marlin'} --format compressed-tensors -o {made / 'marlin'}-compressed-tensors" in page
    assert "marlin-tools export . --format compressed-tensors -o ../compressed-tensors" in card(made / "marlin")


def test_commands_have_the_real_path_and_nothing_is_exported_to_what_it_is(made, page):
    place = made / "compressed-tensors"

    assert f"vllm serve {place}" in page
    assert "marlin-tools export" not in page
    assert "marlin-tools verify" not in page  # that was done
    assert "marlin-tools eval" not in page
    assert "vllm serve .\n" in card(place)
    assert not re.search(r"\bDIR\b|ORIGINAL", page + card(place))


def test_page_is_the_same_wherever_and_whenever_it_is_made(made, tmp_path):
    recipe = Recipe.model_validate({"name": "x", "model": "demo", "stages": STAGES})
    report.write_pages(execute(plan(recipe, tmp_path / "elsewhere")))
    for name in ("compressed-tensors", "marlin"):
        mine, theirs = made / name, tmp_path / "elsewhere" / name
        assert (mine / "README.md").read_bytes() == (theirs / "README.md").read_bytes()
        first, second = ((each / "report.html").read_text(encoding="utf-8") for each in (mine, theirs))
        assert without_times(first) == without_times(second)
        assert str(tmp_path) not in without_times(second)


def test_page_without_an_evaluation_says_so(made, tmp_path):
    bare = Path(shutil.copytree(made / "compressed-tensors", tmp_path / "bare"))
    (bare / "evaluation.json").unlink()
    page = report.pages(bare)[0]["report.html"]

    assert "Nobody has measured this model yet." in page
    assert f"marlin-tools eval {bare} --tasks ppl:demo,demo_qa --baseline demo" in page
    assert "Not verified in this run" in page
    assert f"marlin-tools verify {bare}" in page
    assert "Not measured yet." in report.pages(bare)[0]["README.md"]


@pytest.mark.parametrize(
    ("base", "positions", "tasks"),
    (("demo", 256, "ppl:demo,demo_qa"), ("a/b", 512, "ppl:wikitext2"), ("a/b", 4096, "ppl:wikitext2,mmlu")),
)
def test_suggested_tasks_are_those_that_the_model_can_be_asked(made, base, positions, tasks):
    result = changed(gather(made / "marlin", None), model={"origin": base, "fingerprint": "f"})
    ((_, command), *_) = next_steps(replace(result, facts={**result.facts, "positions": positions}), "x y")

    assert f"marlin-tools eval 'x y' --tasks {tasks} --baseline {base}" == command


@pytest.mark.parametrize(("sizes", "scheme"), (([128], "INT4 g128"), ([64, 128], "INT4 g64, g128"), ([-1], "INT4 per column")))
def test_the_title_has_every_group_size(made, sizes, scheme):
    result = gather(made / "marlin", None)

    assert scheme == replace(result, facts={**result.facts, "group_sizes": sizes}).scheme


def test_all_linears_are_in_a_table_that_sorts_without_a_server(made, page):
    linears = json.loads((made / "compressed-tensors" / "manifest.json").read_text(encoding="utf-8"))["linears"]
    table = page.partition('<table class="sortable">')[2].partition("</table>")[0]
    losses = [float(text) for text in re.findall(r"weight lost\">([\d.]+)%", table)]

    assert len(linears) == len(losses)
    assert sorted(losses, reverse=True) == losses
    assert all(entry["name"] in table for entry in linears)
    assert 'querySelectorAll("table.sortable")' in page


def test_card_has_front_matter_and_numbers(made):
    card = (made / "compressed-tensors" / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1]

    assert "library_name: transformers\n" in front
    assert "tags: [int4, compressed-tensors, marlin-tools]\n" in front
    assert "base_model" not in front  # the embedded model is not on the hub
    assert "| ppl:demo | perplexity |" in card
    assert "vllm serve .\n" in card


@pytest.mark.parametrize(
    ("origin", "name", "public"),
    (
        ("llama2-7b", "meta-llama/Llama-2-7b-hf", True),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", True),
        ("/data/ann/my-model", "my-model", False),
        ("../models/x", "x", False),
        ("demo", "demo", False),
    ),
)
def test_card_names_the_original_but_no_path_of_this_machine(made, origin, name, public):
    result = changed(gather(made / "compressed-tensors", None), model={"origin": origin, "fingerprint": "f"})
    card = card_of(result)

    assert name == result.base
    assert public == (f"base_model: {name}\n" in card)
    assert "/data" not in card


def test_a_directory_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch, made):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    result = changed(gather(made / "compressed-tensors", None), model={"origin": "models/llama", "fingerprint": "f"})

    assert "base_model" not in card_of(result)


EVIL = "<script>alert(1)</script> | `x` [a](http://b) **c**\n# head"


def test_what_comes_from_outside_is_escaped(made):
    """In every field of the manifest that people can name, on the page and in the card."""
    assert words("<b> & `x<y`") == "&lt;b&gt; &amp; <code>x&lt;y</code>"
    tokens = {"source": EVIL, "sequences": 1, "tokens": 2, "seed": 0, "fingerprint": "f" * 64, "notes": [EVIL]}
    own = gather(made / "compressed-tensors", None)
    linears = [{**entry, "name": EVIL} for entry in own.manifest["linears"]]
    names = {"model": {"origin": EVIL, "fingerprint": EVIL}, "calibration": tokens, "warnings": [EVIL], "kept": {EVIL: EVIL}}
    evaluation = replace(own.evaluation, scores=(replace(own.evaluation.scores[0], task=EVIL),), notes=(EVIL,))
    result = replace(changed(own, **names, linears=linears), evaluation=evaluation)
    page = render("model.html.j2", result=result, steps=next_steps(result, EVIL))
    card = card_of(result)

    read(page)
    assert "<script>alert" not in page
    assert "alert(1)" in page
    for line in re.sub(r"(`+).*?\1", "", card).splitlines():
        assert not re.search(r"(?<!\\)[<>\[]|\*\*", line.replace("[int4, compressed-tensors, marlin-tools]", "")), line
        assert not line.startswith("# head")


@pytest.mark.parametrize(
    ("text", "shown"),
    (
        ("a_b <i>", "a_b \\<i\\>"),
        ("_a_ *b*", "\\_a\\_ \\*b\\*"),
        ("x\n# y", "x \\# y"),
        ("1. x", "1\\. x"),
        ("4.13 bits", "4.13 bits"),
        ("- x", "\\- x"),
        ("---", "\\---"),
    ),
)
def test_markdown_shows_text_as_it_is(text, shown):
    assert shown == plain(text)


def test_code_in_markdown_survives_backticks():
    assert "`a`" == code("a")
    assert "``` a``b ```" == code("a``b")
