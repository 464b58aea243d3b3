"""Several sources of text, as they are typed: what is the same text, what is another, and what is wrong with them."""

from pathlib import Path

import pytest

from marlin_tools.data.calibrate import CalibrationSettings
from marlin_tools.run.execute import _other_text

TEXT = "The boat left the harbour at dawn, and nine marlins were seen off the point. "
FEW = ("--preset", "fast", "--num-samples", "4", "--seqlen", "64", "-o", "int4")


@pytest.mark.parametrize(
    ("ours", "theirs", "other"),
    (
        ("c4,pile", "c4, pile", False),  # as they were typed
        ("c4,pile", "pile,c4", True),
        ("c4,pile", "c4", True),
        ("c4,pile", "c4,mine.txt", False),  # what a file holds is not known by its name
    ),
)
def test_what_is_certainly_another_text(ours: str, theirs: str, *, other: bool) -> None:
    pair = CalibrationSettings(source=ours), CalibrationSettings(source=theirs)
    assert _other_text(*pair) is other
    assert _other_text(*reversed(pair)) is other


def test_a_result_of_a_file_that_is_gone_is_in_the_way_as_any_other(cli, tiny_model):
    model = tiny_model("llama")
    for name in ("boat,,mine.txt", "first.txt", "second.txt"):
        Path(name).write_text(name + TEXT * 80, encoding="utf-8")
    assert cli("quantize", model, "--calib", "boat,,mine.txt", *FEW).code == 0
    Path("boat,,mine.txt").unlink()

    outcome = cli("quantize", model, "--calib", "first.txt,second.txt", *FEW)

    assert outcome.code == 2
    assert outcome.err.endswith("error: `int4` exists and is not empty\nhint: use `--overwrite`, or another `-o DIR`\n")


def test_sources_in_another_order_are_another_result(cli, tiny_model):
    model = tiny_model("llama")
    for name in ("first.txt", "second.txt"):
        Path(name).write_text(name + TEXT * 80, encoding="utf-8")
    assert cli("quantize", model, "--calib", "first.txt,second.txt", *FEW).code == 0
    assert "nothing to do" in cli("quantize", model, "--calib", "./first.txt, second.txt", *FEW).err
    assert cli("quantize", model, "--calib", "second.txt,first.txt", *FEW).code == 2


def test_a_list_in_a_recipe_is_told_how_to_write_it(cli):
    Path("mine.yaml").write_text(
        "name: mine\nmodel: demo\ncalibrate:\n  source: [mine.txt, c4]\nstages:\n  - stage: quantize\n", encoding="utf-8"
    )
    outcome = cli("recipes", "validate", "mine.yaml")
    assert outcome.code == 2
    assert outcome.err.startswith("error: mine.yaml:4:11: several sources are one string with commas: `mine.txt,c4`\n")
