"""The page and the card of a model directory: complete, self-contained, honest about what is missing, the same every time."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from marlin_tools import report
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.report.model_card import model_card
from marlin_tools.report.page import TIMES, verdict, words
from marlin_tools.report.result import gather
from marlin_tools.run.execute import execute
from marlin_tools.run.plan import plan

VOID = {"meta", "br", "link", "img", "hr"}


class Reader(HTMLParser):
    """Complains about tags that are not closed, and collects what a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [
            value for name, value in attrs if name in {"src", "srcset", "data", "poster"} or (tag, name) == ("link", "href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def without_times(page):
    before, _, rest = page.partition(TIMES[0])
    return before + rest.partition(TIMES[1])[2]


STAGES = [
    {"stage": "quantize", "preset": "rtn", "ignore": ["layers.1.mlp.down_proj"]},
    {"stage": "export", "formats": ["marlin"]},
    {"stage": "evaluate", "tasks": ["ppl:demo"], "baseline": "demo", "limit": 4},
    {"stage": "verify"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The embedded model, rounded, in two formats, with one linear left out."""
    recipe = Recipe.model_validate({"name": "x", "model": "demo", "stages": STAGES})
    out = tmp_path_factory.mktemp("made") / "x"
    execute(plan(recipe, out))
    return out


@pytest.fixture(scope="module")
def page(made):
    return (made / "compressed-tensors" / "report.html").read_text(encoding="utf-8")


def test_page_loads_nothing(page):
    reader = read(page)

    assert reader.loads == []
    assert not re.search(r"<script|@import|url\(|https?://(?!www\.w3)", page)
    assert len(page) < 200_000


def test_page_says_what_people_come_for(page):
    text = "".join(read(page).text)

    for title in (
        "Before and after",
        "What each linear lost",
        "Codes and scales",
        "Time and memory",
        "How to serve it",
        "How it was made",
    ):
        assert title in text
    assert "mlp.down_proj" in text
    assert "`" not in text.partition("How it was made")[0]
    assert "model.layers.1.mlp.down_proj was left as it is: matches --ignore layers.1.mlp.down_proj" in text
    for stage in ("calibrate and quantize", "evaluate", "verify"):
        assert stage in text
    assert "vllm serve DIR" in text


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

    assert 27 == len(linears) == len(heights)
    assert [pytest.approx(100 * error / top, abs=0.01) for error in ordered] == heights
    assert 1 == section.count("marked")


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


def test_exports_show_the_scores_of_the_same_weights(made):
    page = (made / "marlin" / "report.html").read_text(encoding="utf-8")

    assert "The same codes and scales were measured, stored as <code>compressed-tensors</code>." in page
    assert "marlin-tools export DIR --format compressed-tensors" in page


def test_page_is_the_same_wherever_and_whenever_it_is_made(made, tmp_path):
    recipe = Recipe.model_validate({"name": "x", "model": "demo", "stages": STAGES})
    execute(plan(recipe, tmp_path / "elsewhere"))
    for name in ("compressed-tensors", "marlin"):
        mine, theirs = made / name, tmp_path / "elsewhere" / name
        assert (mine / "README.md").read_bytes() == (theirs / "README.md").read_bytes()
        first, second = ((each / "report.html").read_text(encoding="utf-8") for each in (mine, theirs))
        assert without_times(first) == without_times(second)
        assert str(tmp_path) not in second


def test_page_without_an_evaluation_says_so(made, tmp_path):
    import shutil

    bare = Path(shutil.copytree(made / "compressed-tensors", tmp_path / "bare"))
    (bare / "evaluation.json").unlink()
    page = report.pages(bare)["report.html"]

    assert "Nobody has measured this model yet." in page
    assert "Not verified in this run" in page
    assert "Not measured yet." in report.pages(bare)["README.md"]


def test_card_has_front_matter_and_numbers(made):
    card = (made / "compressed-tensors" / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1]

    assert "library_name: transformers\n" in front
    assert "tags: [int4, compressed-tensors, marlin-tools]\n" in front
    assert "base_model" not in front  # the embedded model is not on the hub
    assert "| ppl:demo | perplexity |" in card
    assert "vllm serve DIR\n" in card


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
    result = gather(made / "compressed-tensors", None)
    changed = type(result)(**{**vars(result), "manifest": {**result.manifest, "model": {"origin": origin, "fingerprint": "f"}}})
    card = model_card(changed)

    assert name == changed.base
    assert public == (f"base_model: {name}\n" in card)
    assert "/data" not in card


def test_a_directory_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch, made):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    result = gather(made / "compressed-tensors", None)
    origin = {"origin": "models/llama", "fingerprint": "f"}

    assert "base_model" not in model_card(type(result)(**{**vars(result), "manifest": {**result.manifest, "model": origin}}))


def test_what_comes_from_outside_is_escaped():
    assert words("<b> & `x<y`") == "&lt;b&gt; &amp; <code>x&lt;y</code>"
    assert "<b>" not in verdict("<b>")


LEARNING = {"text": {"source": "demo", "num_samples": 12, "seqlen": 64}, "tokens": 256, "batch": 2, "micro": 2}
SPARSE = [
    {"stage": "prune", "preset": "magnitude"},
    {"stage": "finetune", **LEARNING},
    {"stage": "quantize", "preset": "rtn", "sparsity": "keep", "format": "marlin-24"},
    {"stage": "evaluate", "tasks": ["ppl:demo"], "limit": 2},
]


def test_every_model_of_a_chain_has_its_page(tmp_path):
    execute(plan(Recipe.model_validate({"name": "x", "model": "demo", "stages": SPARSE}), tmp_path / "x"))
    pages = {name: (tmp_path / "x" / name / "report.html") for name in ("pruned", "finetuned", "marlin-24")}
    pruned, finetuned, quantized = ("".join(read(path.read_text(encoding="utf-8")).text) for path in pages.values())

    for text in (pruned, finetuned):
        assert "demo · 2:4, 16 bits" in text
        assert "50.0 %" in text
        assert "Nobody has measured this model yet." in text
        assert "marlin-tools quantize DIR --sparsity keep" in text
        assert "Not verified" not in text
    assert "energy that pruning has taken" in pruned
    assert "Finetuning report" in finetuned
    kl = json.loads((tmp_path / "x" / "finetuned" / "manifest.json").read_text(encoding="utf-8"))["held_out_kl"]
    assert f"It began at {kl[0][1]:.4f} and ended at {kl[-1][1]:.4f} nats" in finetuned
    assert len(kl) == pages["finetuned"].read_text(encoding="utf-8").count("<title>after ")
    assert "pruned to 2:4 (preset magnitude), then finetuned on 256 tokens" in quantized
    assert not (tmp_path / "x" / "pruned" / "README.md").exists()
