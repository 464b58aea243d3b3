"""Recipes that are right: the bundled ones, overrides, the way there and back, and what is chosen when nobody chose."""

import json
import re

import pytest

from marlin_tools.checkpoint.reader import ALIASES
from marlin_tools.errors import RecipeError
from marlin_tools.recipe.files import bundled, catalog, find, load, overview, show, tables
from marlin_tools.recipe.recipe import Recipe, settle
from marlin_tools.recipe.yaml_reader import json_schema
from marlin_tools.resources import recipes_dir

RECIPES = [name for name in catalog() if name not in tables()]


@pytest.mark.parametrize("name", RECIPES)
def test_bundled_recipe(name):
    recipe = load(name)

    assert name == recipe.name
    assert recipe.description
    alias, _, revision = recipe.model.partition("@")
    assert alias in {"demo", *ALIASES}
    said = "models are read at no pinned commit" in recipe.deviations and not recipe.expect
    assert alias == "demo" or re.fullmatch("[0-9a-f]{40}", revision) or said
    assert recipe.quantize is None or recipe.stages[-1].stage == "verify"
    assert recipe.tasks


def test_every_bundled_file_is_found_and_listed_in_the_readme():
    text = (recipes_dir() / "README.md").read_text(encoding="utf-8")

    ours = {"demo", "demo-presets", "demo-max", "demo-sparse"}
    paper = {"llama2-paper", "llama2-presets", "llama2-sparse"}
    assert set(bundled()) == ours | paper | {"newer-models", "other-models", "qwen-max", "qwen-sparse"}
    for name in bundled():
        assert f"({name}.yaml)" in text


def test_the_list_names_every_recipe_once():
    names = [name.strip() for name, told in overview() if told]

    assert sorted(catalog()) == sorted(names)


def test_the_papers_recipe_says_what_the_paper_says():
    recipe = load("llama2-7b-marlin")
    solver = recipe.quantize.solver

    assert ("redpajama", 256, "documents", 0) == (
        recipe.calibrate.source,
        recipe.calibrate.num_samples,
        recipe.calibrate.shape,
        recipe.calibrate.seed,
    )
    assert (0.1, "natural", "conditional", False, 0, False) == (
        solver.damp,
        solver.order,
        solver.scales,
        solver.signed,
        solver.polish,
        solver.sequential,
    )
    assert 128 == recipe.quantize.group_size
    assert any("the source names no revision" in deviation for deviation in recipe.deviations)
    assert any("SlimPajama" in deviation for deviation in recipe.deviations)


PUBLISHED = {  # the README of IST-DASLab/marlin: WikiText-2, RedPajama, MMLU in percent
    "llama2-7b-fp16": (5.12, 6.14, 41.80),
    "llama2-7b-marlin": (5.27, 6.30, 40.07),
    "llama2-13b-fp16": (4.57, 5.67, 52.10),
    "llama2-13b-marlin": (4.67, 5.79, 51.13),
    "llama2-70b-fp16": (3.12, 4.74, 65.43),
    "llama2-70b-marlin": (3.21, 4.81, 64.81),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_table_is_row_by_row_what_was_published(name):
    wiki, pajama, mmlu = load(name).expect

    assert ("ppl:wikitext2", "ppl:redpajama", "mmlu") == (wiki.task, pajama.task, mmlu.task)
    assert PUBLISHED[name] == (wiki.value, pajama.value, pytest.approx(100 * mmlu.value))
    assert 0.01 * (1 if "fp16" in name else 3) == wiki.tolerance
    assert 0.007 == mmlu.tolerance
    assert pajama.tolerance is None
    assert pajama.note


def test_a_row_is_shown_as_the_recipe_that_it_is(tmp_path):
    (tmp_path / "row.yaml").write_text(show("llama2-7b-fast"), encoding="utf-8")

    assert load("llama2-7b-fast") == load(tmp_path / "row.yaml")
    assert show("demo") == find("demo").path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RECIPES)
def test_dump_is_the_same_recipe(name, tmp_path):
    settled, _ = settle(load(name))
    (tmp_path / "recipe.yaml").write_text(settled.dump(), encoding="utf-8")

    assert settled == load(tmp_path / "recipe.yaml")
    assert settled.dump() == load(tmp_path / "recipe.yaml").dump()


def test_override_reads_yaml():
    recipe = load(
        "demo-fast",
        [
            "quantize.damp=1e-4",
            "evaluate.tasks=[a, 'ppl:demo']",
            "calibrate.seed=3",
            "description=no",
            "stages.0.group_size=-1",
        ],
    )

    assert 1e-4 == recipe.quantize.damp
    assert ("a", "ppl:demo") == recipe.tasks
    assert 3 == recipe.calibrate.seed
    assert "no" == recipe.description
    assert "int4-channel" == recipe.scheme


@pytest.mark.parametrize(
    ("overrides", "scheme"),
    (
        (["quantize.group_size=64"], "int4-g64"),
        (["quantize.group_size=auto"], "int4-auto"),
        (["quantize.activations=fp8"], "int4-g128-fp8"),
        (["quantize.sparsity='2:4'"], "2of4-int4-g128"),
    ),
)
def test_the_output_is_named_after_how_weights_are_stored(overrides, scheme):
    assert scheme == load("demo-fast", overrides).scheme


def test_override_makes_a_section_that_is_not_there():
    assert 5 == load("demo-rtn", ["calibrate.num_samples=5"]).calibrate.num_samples


def _recipe(model, preset, **calibrate):
    stages = [{"stage": "quantize", "preset": preset}]
    return Recipe.model_validate(
        {"name": "x", "model": model, "stages": stages} | ({"calibrate": calibrate} if calibrate else {})
    )


@pytest.mark.parametrize(
    ("recipe", "source", "num_samples", "said"),
    (
        (_recipe("demo", "default"), "demo", 64, True),
        (_recipe("demo", "marlin"), "demo", 64, True),
        (_recipe("demo", "default", num_samples=5), "demo", 5, True),
        (_recipe("llama2-7b", "default"), "c4", 128, True),
        (_recipe("llama2-7b", "fast", seqlen=64), "c4", 128, True),
        (_recipe("llama2-7b", "marlin"), "redpajama", 256, True),
        (_recipe("llama2-7b", "marlin", num_samples=9), "redpajama", 9, True),
        (_recipe("llama2-7b", "marlin", source="c4"), "c4", 128, False),
        (_recipe("llama2-7b", "default", source="demo"), "demo", 64, True),
    ),
)
def test_calibration_that_nobody_chose(recipe, source, num_samples, said):
    settled, notes = settle(recipe)

    assert (source, num_samples) == (settled.calibrate.source, settled.calibrate.num_samples)
    assert said == any(f"`{source}`, {num_samples} samples" in note for note in notes)


@pytest.mark.parametrize(
    ("tokens", "windows", "length"),
    [(None, 8192, None), (1000, 8192, None), (30_000_000, 29305, None), (30_000_000, 14657, 2048), (10**9, 65536, None)],
)
def test_there_is_as_much_text_as_is_trained_on(tokens, windows, length):
    stage = {"stage": "finetune", "teacher": "llama2-7b", **({"tokens": tokens} if tokens else {})}
    text = {"calibrate": {"seqlen": length}} if length else {}
    settled, _ = settle(Recipe.model_validate({"name": "x", "model": "somewhere", "stages": [stage], **text}))
    assert (windows, length or 1024) == (settled.calibrate.num_samples, settled.calibrate.seqlen)


def test_rounding_needs_no_calibration():
    assert (None, []) == (settle(_recipe("demo", "rtn"))[0].calibrate, settle(_recipe("demo", "rtn"))[1])
    settled, notes = settle(_recipe("demo", "rtn", source="c4"))
    assert settled.calibrate is None
    assert ["preset `rtn` looks at no data: calibration settings have no effect"] == notes


def test_a_text_that_no_stage_reads_is_told():
    stages = [{"stage": "evaluate", "tasks": ["ppl:demo"]}]
    _, notes = settle(Recipe.model_validate({"name": "x", "model": "demo", "stages": stages, "calibrate": {"source": "c4"}}))
    assert ["no stage looks at calibration text: calibration settings have no effect"] == notes


def test_schema_describes_every_key():
    document = json.loads(json.dumps(json_schema(Recipe)))

    assert set(Recipe.model_fields) == set(document["properties"])
    assert {"prune", "finetune", "quantize", "export", "evaluate", "verify", "generate"} == set(
        document["properties"]["stages"]["items"]["discriminator"]["mapping"]
    )
    assert document["additionalProperties"] is False


def test_unknown_name():
    with pytest.raises(RecipeError) as error:
        find("demo-rnt")
    assert error.value.hint == "did you mean `demo-rtn`? `marlin-tools recipes list` names all of them"


def test_a_table_is_not_one_recipe():
    with pytest.raises(RecipeError, match="`llama2-paper` is a table of 6 recipes") as error:
        load("llama2-paper")
    assert "marlin-tools reproduce llama2-paper" in error.value.hint
