"""Tables of recipes: what a row takes from where, in which order recipes come, and mistakes with the line of each."""

import re
from pathlib import Path

import pytest

from marlin_tools.errors import RecipeError
from marlin_tools.recipe.files import bundled, check, load, load_all, tables

TABLE = """\
table: mine
source: somebody's table
deviations: [another tokenizer]
shared:
  evaluate: &evaluate {stage: evaluate, tasks: ["ppl:demo"]}
  small: &small
    model: demo
    description: small
    deviations: [fewer windows]
    calibrate: &text {source: demo, num_samples: 4}
    stages:
      - {stage: quantize, preset: fast}
      - *evaluate
rows:
  - name: a
    model: demo
    description: as it is
    stages: [*evaluate]
    expect: [{task: "ppl:demo", value: 2.0, tolerance: 0.1}]
  - <<: *small
    name: b
    control: a
    calibrate: {<<: *text, seed: 7}
    stages: [{stage: quantize, preset: rtn}, *evaluate]
  - {<<: *small, name: c, control: b, description: its own words, source: its own source}
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
    assert ("small", "somebody's table") == (b.description, b.source)
    assert ("rtn", 7, 4) == (b.quantize.preset, b.calibrate.seed, b.calibrate.num_samples)
    assert ("fast", 0, 4) == (c.quantize.preset, c.calibrate.seed, c.calibrate.num_samples)
    assert ("its own words", "its own source") == (c.description, c.source)
    assert [("another tokenizer",), *[("another tokenizer", "fewer windows")] * 2] == [each.deviations for each in (a, b, c)]


def test_models_of_bundled_tables_are_pinned_and_to_one_revision():
    pinned = [table for name, table in tables().items() if name != "newer-models"]  # which says so
    models = {row.model for table in pinned for row in table.rows} - {"demo"}

    assert all(re.fullmatch(r"[\w.-]+@[0-9a-f]{40}", model) for model in models)
    assert len(models) == len({model.partition("@")[0] for model in models})


def test_overrides_come_last(table):
    assert [5, 5] == [recipe.calibrate.seed for recipe in load_all(table(), ["calibrate.seed=5"])[1:]]


def test_controls_that_are_brought_along_obey_overrides(tmp_path):
    recipes = load_all("llama2-13b-marlin", ["evaluate.seqlen=512"])
    (tmp_path / "x.yaml").write_text("name: x\nmodel: demo\ncontrol: demo-fp16\nstages: [{stage: verify}]\n", encoding="utf-8")
    control, _ = load_all(tmp_path / "x.yaml", ["evaluate.seqlen=256"])

    measured = [stage for each in (*recipes, control) for stage in each.stages if stage.stage == "evaluate"]
    assert [512, 512, 256] == [stage.seqlen for stage in measured]


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

    assert len(names) == len(set(names))
    assert len(tables()[name].rows) == check(name)
    for recipe in recipes:
        if recipe.quantize:
            assert names.index(recipe.control) < names.index(recipe.name)
            assert recipes[names.index(recipe.control)].model == recipe.model
        else:
            assert recipe.control is None


@pytest.mark.parametrize(
    ("control", "expected"),
    (
        ("''", "its control `` is no row beside it and no bundled recipe; `marlin-tools recipes list` names all of them"),
        ("' '", "its control ` ` is no row beside it and no bundled recipe; "),
        ("demo-fp61", "its control `demo-fp61` is no row beside it and no bundled recipe; did you mean `demo-fp16`? "),
        ("./demo.yaml", "its control `./demo.yaml` is no row beside it and no bundled recipe; "),
        ("demo-presets", "its control `demo-presets` is a table; name one of its rows: demo-fp16, demo-rtn, demo-"),
        ("x", "is its own control"),
    ),
)
def test_a_control_that_is_none_is_refused_in_a_file_of_its_own(tmp_path, control, expected):
    text = f"name: x\nmodel: demo\ncontrol: {control}\nstages: [{{stage: verify}}]\n"
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    for refuse in (check, load_all):
        with pytest.raises(RecipeError) as error:
            refuse(tmp_path / "x.yaml")
        assert error.value.message.startswith(f"{tmp_path / 'x.yaml'}:3:1: recipe `x`")
        assert expected in error.value.message


def test_a_control_that_measures_nothing_never_holds(table):
    text = TABLE.replace("    stages: [*evaluate]\n    expect: [{", "    stages: [{stage: verify}]\n    # [{")
    with pytest.raises(RecipeError, match="22:5: recipe `b`: its control `a` measures nothing, so it never holds"):
        check(table(text))


@pytest.mark.parametrize(
    ("changes", "expected"),
    (
        ({"name: c, control: b": "name: demo-fp16, control: demo-rtn"}, "25:18: recipe `demo-fp16`"),  # its own control's
        ({"name: a\n": "name: demo-fp16\n", "control: a": "control: demo-rtn"}, "22:5: recipe `b`: its control `demo-rtn`"),
    ),
)
def test_no_row_is_replaced_by_a_bundled_recipe_of_its_name(table, changes, expected):
    text = TABLE
    for old, new in changes.items():
        text = text.replace(old, new)
    for refuse in (check, load_all):
        with pytest.raises(RecipeError) as error:
            refuse(table(text))
        assert f"mine.yaml:{expected}: two different recipes are called `demo-fp16`" in error.value.message


def test_rows_come_before_bundled_recipes_of_their_name(table):
    a, b, _ = load_all(table(TABLE.replace("name: a\n", "name: demo-fp16\n").replace("control: a", "control: demo-fp16")))

    assert "as it is" == a.description
    assert b.control == a.name


def test_a_name_for_all_rows_is_refused(table):
    with pytest.raises(RecipeError, match="--set name=x: recipe `x`: two different recipes are called `x`"):
        load_all(table(TABLE.replace("control: a", "").replace("control: b, ", "")), ["name=x"])


def test_all_controls_are_looked_at(table):
    with pytest.raises(RecipeError) as error:
        check(table(TABLE.replace("control: a", "control: demo-max1").replace("control: b", "control: demo-presets")))
    assert ["22", "25"] == [line.split("mine.yaml:")[1].partition(":")[0] for line in error.value.lines]


def test_a_file_may_have_a_bundled_control(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nmodel: demo\ncontrol: demo-fp16\nstages: [{stage: verify}]\n", encoding="utf-8")

    assert ["demo-fp16", "x"] == [recipe.name for recipe in load_all(tmp_path / "x.yaml")]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    (
        (
            "preset: fast",
            "preset: fats",
            "12:35: unknown preset `fats`; did you mean `fast`? known: rtn, marlin, fast, default, max",
        ),
        ("value: 2.0", "valu: 2.0", "19:33: unknown key `valu`; did you mean `value`? "),
        ("preset: rtn", "preset: rtn, damp: -1", "24:51: `damp: -1`: must be greater than 0"),
        ("num_samples: 4", "num_samples: 0", "10:50: `num_samples: 0`: must be greater than or equal to 1"),
        ("num_samples: 4", "samples: 4", "10:37: unknown key `samples` in `calibrate`; did you mean `num_samples`? "),
        ("seed: 7", "sed: 7", "23:28: unknown key `sed` in `calibrate`; did you mean `seed`? "),
        ("stage: evaluate,", "stage: evaluat,", "5:31: unknown stage `evaluat`; did you mean `evaluate`? "),
        ("*small\n", "*smal\n", "20:9: found undefined alias 'smal'"),
        ("<<: *small\n", "<<: small\n", "20:5: `<<` takes mappings that stand above: `<<: *name`"),
        ("control: a", "control: c", "22:5: row `b`: its control `c` does not stand above it"),
        ("control: a", "control: b", "22:5: row `b`: its control `b` does not stand above it"),
        ("control: a", "control: nobody", "recipe `b`: its control `nobody` is no row beside it and no bundled recipe"),
        ("name: c", "name: b", "25:18: row `b` stands twice"),
        ("    model: demo\n    description: as", "    description: as", "15:5: `model` is missing"),
        ("table: mine", "tabel: mine", "1:1: unknown key `tabel`; did you mean `table`?"),
        ("rows:", "rows: []\nrest:", "14:7: `rows: []`: must have at least 1 item"),
    ),
)
def test_mistakes_have_their_place(table, old, new, expected):
    assert old in TABLE
    with pytest.raises(RecipeError) as error:
        check(table(TABLE.replace(old, new)))

    assert expected in error.value.message


def test_all_mistakes_are_reported_at_once_and_a_shared_one_once(table):
    text = TABLE.replace("preset: fast", "preset: fats").replace("value: 2.0", "value: x").replace("seed: 7", "seed: x")
    text = text.replace('tasks: ["ppl:demo"]}', 'tasks: ["ppl:demo"], limit: x}')
    with pytest.raises(RecipeError) as error:
        check(table(text))
    places = [line.split("mine.yaml:")[1].partition(":")[0] for line in error.value.message.splitlines()]
    assert ["5", "12", "19", "23"] == places

    with pytest.raises(RecipeError) as error:
        check(table(TABLE.replace("control: a", "control: c").replace("name: c", "name: b")))
    assert 2 == len(error.value.message.splitlines())


def test_an_override_of_one_use_of_a_shared_part_leaves_the_others(tmp_path):
    text = """\
name: x
model: demo
calibrate: &text {source: demo, num_samples: 4, seqlen: 64}
stages: [{stage: prune}, {stage: finetune, text: *text, tokens: 64}]
"""
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    recipe = load(tmp_path / "x.yaml", ["calibrate.num_samples=2"])

    assert (2, 4) == (recipe.calibrate.num_samples, recipe.stages[1].text.num_samples)


@pytest.mark.parametrize("path", bundled().values(), ids=bundled())
def test_nothing_is_shared_that_no_row_takes_in(path):
    text = re.sub(r"(^|\s)#.*", "", path.read_text(encoding="utf-8"))

    assert set(re.findall(r"&([\w.-]+)", text)) == set(re.findall(r"\*([\w.-]+)", text))


def test_there_is_no_row_without_a_home(table):
    with pytest.raises(RecipeError, match="no bundled recipe"):
        load(Path("a"))
