"""Results side by side: what is told is what differs."""

import json
from pathlib import Path

import pytest

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.export import export
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.errors import RecipeError
from marlin_tools.report.difference import as_page, as_text, compare, points
from marlin_tools.report.result import gather

SCORE = {"task": "ppl:demo", "metric": "kl", "value": 0.5, "details": {"on": "8 documents", "tokens": 2000}}
NAMES = "stderr higher_is_better baseline baseline_stderr difference difference_stderr part_of".split()


def measured(directory, value, on="8 documents", how=None, beside=None, metric="kl", **details):
    score = dict.fromkeys(NAMES) | SCORE | {"metric": metric, "value": value, "details": {"on": on, **details}}
    known = {"origin": "x", "fingerprint": "x", "format": None, "backend": None, "device": "cpu", "computed_in": "float32"}
    how = known | (how or {})
    content = {"fingerprint": "x", "model": how, "baseline": beside and known | beside, "scores": [score], "notes": []}
    content |= {"settings": {}, "versions": {}}
    (directory / "evaluation.json").write_text(json.dumps(content))


@pytest.fixture
def pair(tiny_model, tmp_path):
    """A model rounded in two ways."""
    for name, size in (("first", 128), ("second", 64)):
        settings = QuantizeSettings(preset="rtn", format="gptq", group_size=size, device="cpu")
        quantize(tiny_model("llama"), None, settings, tmp_path / name)
    return tmp_path / "first", tmp_path / "second"


def test_only_what_differs_is_told(pair):
    found = compare(pair)

    assert {"settings.group_size": ["128", "64"]} == found.describe()["settings"]
    first, second = (float(bits) for bits in dict(found.facts)["bits per weight"])
    assert 4.125 < first < second < 4.6  # with the zero points of the format


def test_before_it_was_quantised_a_model_was_as_large_as_its_original(pair, tiny_model):
    size = Checkpoint.open(tiny_model("llama")).nbytes
    assert [size, size] == [gather(path, None, weights=False).before_bytes for path in pair]


def test_losses_stand_beside_each_other_the_most_different_first(pair):
    losses = compare(pair).describe()["linears"]
    manifests = [json.loads((path / "manifest.json").read_text())["linears"] for path in pair]
    gaps = [abs(a - b) for a, b in losses.values()]

    assert {entry["name"]: entry["weight_error"] for entry in manifests[1]} == {name: row[1] for name, row in losses.items()}
    assert 14 == len(losses)
    assert sorted(gaps, reverse=True) == gaps


def test_scores_on_other_samples_are_other_scores(pair):
    measured(pair[0], 0.5)
    measured(pair[1], 0.25)
    assert [[0.5, 0.25]] == [each["values"] for each in compare(pair).describe()["scores"]]
    measured(pair[1], 0.25, on="2 documents")
    assert [[0.5, None], [None, 0.25]] == [each["values"] for each in compare(pair).describe()["scores"]]


@pytest.mark.parametrize(
    ("first", "second", "told"),
    (
        ({"fingerprint": "a" * 64}, {"fingerprint": "b" * 64}, ["8 documents, text aaaaaaaa", "8 documents, text bbbbbbbb"]),
        ({"bos": "none"}, {"bos": "one per document"}, ["8 documents, BOS none", "8 documents, BOS one per document"]),
        ({"task_version": 1}, {"task_version": 0}, ["8 documents, version 1", "8 documents, version 0"]),
        ({"task_version": 1}, {"task_version": 1}, ["8 documents"]),
    ),
)
def test_scores_of_another_text_or_version_are_other_scores_and_say_why(pair, first, second, told):
    measured(pair[0], 0.5, **first)
    measured(pair[1], 0.25, **second)
    found = compare(pair)

    assert told == [each["on"] for each in found.describe()["scores"]]
    assert (1 if len(told) == 1 else 2) == len(found.scores)
    for on in told:
        assert on in as_text(found)
        assert on in as_page(found)
    assert (len(told) == 1) == ("Distance to the original beside" in as_page(found))  # distances on two texts are no picture


def test_distances_to_other_originals_are_other_scores_and_say_why(pair):
    for path, name in zip(pair, ("a", "b"), strict=True):
        measured(path, 0.5, beside={"origin": f"owner/{name}", "fingerprint": name * 64})
    found = compare(pair)

    assert ["8 documents, baseline aaaaaaaa", "8 documents, baseline bbbbbbbb"] == [on for _, on, _ in found.scores]
    assert ["owner/a (aaaaaaaa)", "owner/b (bbbbbbbb)"] == dict(found.settings)["measured with.baseline"]
    assert "Distance to the original beside" not in as_page(found)
    for path, name in zip(pair, ("a", "b"), strict=True):  # a score that no original decides
        measured(path, 0.5, beside={"origin": f"owner/{name}", "fingerprint": name * 64}, metric="perplexity")
    assert [[0.5, 0.5]] == [each["values"] for each in compare(pair).describe()["scores"]]
    measured(pair[0], 0.5, beside={"origin": "owner/a", "fingerprint": "a" * 64})
    measured(pair[1], 0.25, beside={"origin": "elsewhere/a", "fingerprint": "a" * 64})
    assert [[0.5, 0.25]] == [each["values"] for each in compare(pair).describe()["scores"]]


@pytest.mark.parametrize(
    ("key", "here", "there"),
    (("activations", "16bit", "fp8"), ("backend", "reference", "marlin"), ("computed_in", "float32", "float16")),
)
def test_what_scores_were_computed_with_is_told_where_it_differs(pair, key, here, there):
    for path, value in zip(pair, (here, there), strict=True):
        measured(path, 0.5, how={key: value})
    found = compare(pair)

    assert {f"measured with.{key}": [here, there], "settings.group_size": ["128", "64"]} == dict(found.settings)
    (pair[0] / "evaluation.json").unlink()
    assert {"settings.group_size": ["128", "64"]} == dict(compare(pair).settings)  # nothing to differ from


def test_weights_are_counted_where_they_lie_not_where_somebody_noted_them(pair, tiny_model):
    known = dict(compare(pair).facts)["bits per weight"]
    plain = tiny_model("llama")
    for number, path in enumerate(pair):
        measured(path, 0.5 + number)
        (path / "manifest.json").unlink()
    found = compare([*pair, plain])

    assert [*known, "16"] == dict(found.facts)["bits per weight"]
    assert known == [f"{each['bits']:.2f}" for each in points(found.results)]


def test_a_distance_that_is_not_finite_is_not_drawn(pair):
    measured(pair[0], None)
    measured(pair[1], 0.25)

    assert [] == points(compare(pair).results)
    assert "nan" in as_text(compare(pair))


def test_page_and_table_show_all_of_it(pair):
    measured(pair[0], 0.5)
    measured(pair[1], 0.25)
    found = compare(pair)
    page, text = as_page(found), as_text(found)

    for word in ("0.5000", "0.2500", "settings.group_size", "model.layers.0.mlp.down_proj"):
        assert word in page
        assert word in text
    assert 2 == page.count('title="')  # nobody took the time of these
    times = {"stages": {"quantize": {"seconds": 3.0, "host_gb": 1.0}, "verify": {"seconds": 9.0, "host_gb": 1.0}}}
    for path in pair:
        (path / "manifest.json").write_text(json.dumps(json.loads((path / "manifest.json").read_text()) | {"times": times}))
    timed = compare(pair)
    assert 4 == as_page(timed).count('title="')
    assert ["3.0 s", "3.0 s"] == dict(timed.facts)["made in"]


@pytest.mark.parametrize(("kept", "of"), (("weight_error", "weight"), (None, "")))
def test_outputs_are_compared_with_outputs_and_weights_with_weights(pair, kept, of):
    for number, path in enumerate(pair):
        manifest = json.loads((path / "manifest.json").read_text())
        for entry in manifest["linears"]:
            entry["output_error"] = 0.5 if number else None
            entry["weight_error"] = entry["weight_error"] if number == 0 or kept else None
        (path / "manifest.json").write_text(json.dumps(manifest))
    found = compare(pair)

    assert of == found.of
    assert (
        bool(of)
        == bool(found.linears)
        == ("linear: weight lost" in as_text(found))
        == ("What each linear lost" in as_page(found))
    )


def test_the_original_and_an_export_can_be_compared_too(pair, tiny_model, tmp_path):
    export(pair[0], "compressed-tensors", tmp_path / "other")
    found = compare([pair[0], tmp_path / "other", tiny_model("llama")])

    assert ["gptq", "compressed-tensors", "float16"] == dict(found.facts)["format"]
    assert as_page(found)


def test_a_sparse_model_stands_beside_another_one_that_says_nothing_of_how_it_was_made(pair, tiny_model, tmp_path):
    settings = QuantizeSettings(preset="rtn", format="marlin-24", sparsity="2:4", device="cpu")
    quantize(tiny_model("mistral", num_hidden_layers=1), None, settings, tmp_path / "sparse")
    (pair[1] / "manifest.json").unlink()
    found = compare([tmp_path / "sparse", *pair])
    losses = found.linears

    assert ["2:4, 50% zeros", "", ""] == dict(found.facts)["sparsity"]
    assert ["gptq", "gptq"] == dict(found.facts)["format"][1:]
    assert all("" == values[2] for _, values in found.settings)
    assert {"2:4", ""} == set(dict(found.settings)["settings.sparsity"])
    assert ["settings.sparsity" in text for text in (as_text(found), as_page(found))] == [True, True]
    assert all(row[2] is None for _, row in losses)
    alone = compare(pair).linears
    assert sorted((row[0] for _, row in alone), reverse=True) == [row[0] for _, row in alone]  # nothing differs: what lost most
    assert [] == compare(pair).settings


def test_folders_that_all_share_are_not_in_the_columns(pair, tmp_path):
    assert ["first", "second"] == compare(pair).labels
    for path, name in zip(pair, ("a/gptq", "b/gptq"), strict=True):
        (tmp_path / name).parent.mkdir()
        path.rename(tmp_path / name)
    assert ["a/gptq", "b/gptq"] == compare([tmp_path / "a/gptq", tmp_path / "b/gptq"]).labels
    assert [str(tmp_path / "a/gptq"), str(tmp_path / "b/gptq")] == compare([tmp_path / "a/gptq", tmp_path / "b/gptq"]).names


@pytest.mark.parametrize("count", (1, 2))
def test_one_directory_is_not_compared_with_itself(pair, count):
    with pytest.raises(RecipeError, match="two or more different directories"):
        compare([pair[0]] * count)


def test_only_such_a_page_is_replaced(pair, tmp_path):
    page = tmp_path / "x.html"
    for _ in range(2):
        assert main_code("compare", *map(str, pair), "-o", str(page)) == 0
    for there in (pair[0] / "config.json", pair[0] / "manifest.json", tmp_path / "mine.html", pair[0]):
        if not there.exists():
            there.write_text("<!doctype html>\n<title>mine</title>")
        before = None if there.is_dir() else there.read_bytes()
        assert main_code("compare", *map(str, pair), "-o", str(there)) == 2
        assert there.is_dir() if before is None else there.read_bytes() == before


def main_code(*arguments):
    from marlin_tools.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return exit_.value.code


def test_the_verb_prints_tables_and_leaves_a_page(pair, monkeypatch, tmp_path, capsys):
    from marlin_tools.cli import main

    monkeypatch.chdir(tmp_path)
    for arguments in (["first", "second"], ["first", "second", "-o", "x.html", "--json"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["compare", *arguments])
        assert 0 == exit_.value.code
    assert ["first", "second"] == json.loads(capsys.readouterr().out)["models"]
    assert Path("runs/compare/first+second.html").read_text() == Path("x.html").read_text()
