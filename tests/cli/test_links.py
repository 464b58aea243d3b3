"""Links that lead nowhere or in a circle, in every place where a path is typed: told in one line, and left where they are."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def links(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to("gone")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("circle", "`circle` is a link, and results replace what they are named"),
        ("nowhere", "`nowhere` is a link, and results replace what they are named"),
        ("circle/out", "cannot write `circle/out`: Not a directory"),
        ("nowhere/out", "cannot write `nowhere/out`: Not a directory"),
        ("nowhere/deep/out", "cannot write `nowhere/deep/out`: Not a directory"),
    ],
)
def test_no_result_is_written_there_and_that_is_said_before_the_work(cli, name, told):
    outcome = cli("quantize", "demo", "--preset", "rtn", "-o", name)

    assert (2, "") == (outcome.code, outcome.out)
    assert outcome.err.endswith(f"error: {told}\nhint: choose another `-o DIR`\n")
    assert "quantize\n" not in outcome.err
    assert not Path("gone").exists()


def test_no_model_is_there(cli):
    assert "error: `circle` is no directory" in cli("compare", "demo", "circle").err


@pytest.mark.parametrize("name", ["circle", "nowhere"])
def test_a_page_or_a_recipe_does_not_take_its_place(cli, tiny_model, name):
    page, recipe = cli("compare", "demo", tiny_model("llama"), "-o", name), cli("recipes", "copy", "demo", name)

    assert [2, 2] == [page.code, recipe.code]
    assert page.err == f"error: `{name}` is a link, and a page replaces what it is named\nhint: choose another `-o FILE`\n"
    assert recipe.err == f"error: `{name}` exists\nhint: choose another name: marlin-tools recipes copy NAME FILE\n"
    assert Path(name).is_symlink()


def test_a_task_that_includes_one_is_told_as_any_other(cli):
    Path("tasks").mkdir()
    Path("tasks/fish.yaml").write_text("task: fish\ninclude: ../circle\n", encoding="utf-8")

    outcome = cli("eval", "demo", "--tasks", "fish", "--include-path", "tasks")

    assert (2, "") == (outcome.code, outcome.out)
    assert "circle" in outcome.err
