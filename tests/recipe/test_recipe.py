"""Recipes that are right: the bundled ones, overrides, the way there and back, and what is chosen when nobody chose."""

import json

import pytest

from marlin_tools.checkpoint import ALIASES
from marlin_tools.errors import RecipeError
from marlin_tools.recipe import Recipe, bundled, find, load, schema, settle
from marlin_tools.resources import recipes_dir
from marlin_tools.run import plan


@pytest.mark.parametrize("name", bundled())
def test_bundled_recipe(name):
    recipe = load(name)

    assert name == recipe.name
    assert recipe.description
    assert recipe.model in {"demo", *ALIASES}
    assert ("verify",) == tuple(stage.stage for stage in recipe.stages)[-1:]


def test_every_bundled_file_is_found_and_listed_in_the_readme():
    text = (recipes_dir() / "README.md").read_text(encoding="utf-8")

    assert {"demo", "demo-marlin", "demo-rtn", "llama2-7b-default", "llama2-7b-marlin"} <= set(bundled())
    for name in bundled():
        assert f"({name}.yaml)" in text


@pytest.mark.parametrize("name", [name for name in bundled() if load(name).model == "demo"])
def test_demo_recipes_plan_without_a_network(name):
    planned = plan(load(name))

    assert [stage.stage for stage in load(name).stages] == [step.stage.stage for step in planned.steps]
    assert dict(planned.steps[0].facts)["linears"].startswith("28 quantised, 0 kept")


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
    assert "No revision is pinned" in find("llama2-7b-marlin").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", bundled())
def test_dump_is_the_same_recipe(name, tmp_path):
    settled, _ = settle(load(name))
    (tmp_path / "recipe.yaml").write_text(settled.dump(), encoding="utf-8")

    assert settled == load(tmp_path / "recipe.yaml")
    assert settled.dump() == load(tmp_path / "recipe.yaml").dump()


def test_override_reads_yaml():
    recipe = load(
        "demo", ["quantize.damp=1e-4", "evaluate.tasks=[a, b]", "calibrate.seed=3", "description=no", "stages.0.group_size=-1"]
    )

    assert 1e-4 == recipe.quantize.damp
    assert ("a", "b") == recipe.stages[2].tasks
    assert 3 == recipe.calibrate.seed
    assert "no" == recipe.description
    assert "int4-channel" == recipe.scheme


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


def test_rounding_needs_no_calibration():
    assert (None, []) == (settle(_recipe("demo", "rtn"))[0].calibrate, settle(_recipe("demo", "rtn"))[1])
    settled, notes = settle(_recipe("demo", "rtn", source="c4"))
    assert settled.calibrate is None
    assert ["preset `rtn` looks at no data: calibration settings have no effect"] == notes


def test_schema_describes_every_key():
    document = json.loads(json.dumps(schema()))

    assert set(Recipe.model_fields) == set(document["properties"])
    assert {"quantize", "export", "evaluate", "verify", "generate"} == set(
        document["properties"]["stages"]["items"]["discriminator"]["mapping"]
    )
    assert document["additionalProperties"] is False


def test_unknown_name():
    with pytest.raises(RecipeError) as error:
        find("demo-rnt")
    assert error.value.hint.startswith("did you mean `demo-rtn`? known: demo, ")
