"""Tables of recipes: what a row takes from where, in which order recipes come, and mistakes with the line of each."""

from pathlib import Path

import pytest

from marlin_tools.errors import RecipeError
from marlin_tools.recipe.files import check, load, load_all, tables
from marlin_tools.recipe.recipe import Recipe

TABLE = """\
table: mine
source: somebody's table
deviations: [another tokenizer]
recipes:
  plain:
    description: as it is
    stages: [{stage: evaluate, tasks: ["ppl:demo"]}]
  small:
    deviations: [fewer windows]
    calibrate: {source: demo, num_samples: 4}
    stages:
      - {stage: quantize, preset: fast}
      - {stage: evaluate, tasks: ["ppl:demo"]}
rows:
  - name: a
    like: plain
    model: demo
    expect: [{task: "ppl:demo", value: 2.0, tolerance: 0.1}]
  - name: b
    like: small
    model: demo
    control: a
    set: {quantize.preset: rtn, calibrate.seed: 7}
    deviations: [rounding]
  - {name: c, like: small, model: demo, control: b, description: its own words}
"""


@pytest.fixture
def table(tmp_path):
    def write(text=TABLE):
        file = tmp_path / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_a_row_is_the_shared_recipe_with_what_is_its_own(table):
    a, b, c = load_all(table())

    assert ("a", "as it is", "somebody's table") == (a.name, a.description, a.source)
    assert 2.0 == a.expect[0].value
    assert ("another tokenizer", "fewer windows", "rounding") == b.deviations
    assert ("rtn", 7, 4) == (b.quantize.preset, b.calibrate.seed, b.calibrate.num_samples)
    assert ("fast", 0, "its own words") == (c.quantize.preset, c.calibrate.seed, c.description)
    assert ("another tokenizer", "fewer windows") == c.deviations


def test_a_row_takes_its_model_at_the_pinned_revision(table):
    pinned = TABLE.replace("recipes:", f"revisions: {{demo: {'a' * 40}}}\nrecipes:", 1)

    assert [f"demo@{'a' * 40}"] * 3 == [recipe.model for recipe in load_all(table(pinned))]


def test_bundled_tables_agree_about_revisions():
    pinned = [pair for table in tables().values() for pair in table.revisions.items()]

    assert len(dict(pinned)) == len(set(pinned))
    for table in tables().values():
        assert {row.model for row in table.rows} - {"demo"} == set(table.revisions)


def test_overrides_come_last(table):
    assert [5, 5] == [recipe.calibrate.seed for recipe in load_all(table(), ["calibrate.seed=5"])[1:]]


def test_overrides_of_a_stage_go_to_the_recipes_that_have_it(table):
    a, b, c = load_all(table(), ["quantize.damp=0.5", "quantize.preset=default"])

    assert None is a.quantize
    assert [0.5, 0.5] == [recipe.quantize.damp for recipe in (b, c)]
    with pytest.raises(RecipeError, match="no recipe here has a stage `export`"):
        load_all(table(), ["export.formats=[gptq]"])


def test_bundled_rows_bring_their_controls():
    assert ["llama2-13b-fp16", "llama2-13b-marlin"] == [recipe.name for recipe in load_all("llama2-13b-marlin")]
    assert ["llama2-7b-fp16", "llama2-7b-rtn"] == [recipe.name for recipe in load_all("llama2-7b-rtn")]


@pytest.mark.parametrize("name", tables())
def test_controls_come_before_what_they_control_and_have_none(name):
    recipes = load_all(name)
    names = [recipe.name for recipe in recipes]

    assert len(names) == len(set(names)) == check(name)
    for recipe in recipes:
        if recipe.quantize:
            assert names.index(recipe.control) < names.index(recipe.name)
            assert recipes[names.index(recipe.control)].model == recipe.model
        else:
            assert recipe.control is None


def test_a_file_may_have_a_bundled_control(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nmodel: demo\ncontrol: demo-fp16\nstages: [{stage: verify}]\n", encoding="utf-8")

    assert ["demo-fp16", "x"] == [recipe.name for recipe in load_all(tmp_path / "x.yaml")]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    (
        ("preset: fast", "preset: fats", "12:35: unknown preset `fats`; did you mean `fast`?"),
        ("value: 2.0", "valu: 2.0", "18:33: unknown key `valu`; did you mean `value`? "),
        ("quantize.preset: rtn", "quantize.damp: -1", "23:26: `damp: -1`: must be greater than 0"),
        ("quantize.preset: rtn", "round.x: 1", "23:20: unknown key `round`; "),
        ("like: plain", "like: plane", "16:5: row `a` is like `plane`; did you mean `plain`? "),
        (
            "source: som",
            "revisions: {demo: main}\nsource: som",
            "2:19: `demo: main`: string should match pattern '^[0-9a-f]{40}$'",
        ),
        ("source: som", f"revisions: {{x: {'a' * 40}}}\nsource: som", "2:13: `x` is the model of no row"),
        ("control: a", "control: c", "22:5: row `b`: its control `c` does not stand above it"),
        ("control: a", "control: nobody", "recipe `b`: its control `nobody` is no row beside it and no bundled recipe"),
        ("name: c", "name: b", "25:6: row `b` stands twice"),
        ("    model: demo\n    expect", "    expect", "15:5: `model` is missing"),
        ("deviations: [rounding]", "deviations: [fewer windows]", "a deviation stands twice"),
        ("table: mine", "tabel: mine", "1:1: unknown key `tabel`; did you mean `table`?"),
    ),
)
def test_mistakes_have_their_place(table, old, new, expected):
    assert old in TABLE
    with pytest.raises(RecipeError) as error:
        check(table(TABLE.replace(old, new)))

    assert expected in error.value.message


def test_all_mistakes_are_reported_at_once(table):
    text = TABLE.replace("like: plain", "like: plane").replace("name: c", "name: b")
    with pytest.raises(RecipeError) as error:
        check(table(text))
    assert 3 == len(error.value.message.splitlines())

    text = TABLE.replace("preset: fast", "preset: fats").replace("value: 2.0", "value: x").replace("seed: 7", "seed: x")
    with pytest.raises(RecipeError) as error:
        check(table(text))
    assert ["12:", "18:", "23:"] == [line.split("mine.yaml:")[1][:3] for line in error.value.message.splitlines()]


def test_tables_leave_no_recipe_unused():
    for table in tables().values():
        assert {row.like for row in table.rows} == set(table.recipes)
        assert not {*table.recipes} & {*Recipe.model_fields}


def test_there_is_no_row_without_a_home(table):
    with pytest.raises(RecipeError, match="no bundled recipe"):
        load(Path("a"))
