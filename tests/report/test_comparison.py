"""Verdicts: what passes, what fails, what is only reported, and what was not run."""

import math

import pytest

from marlin_tools.recipe.recipe import Recipe
from marlin_tools.report.comparison import as_markdown, as_text, write_comparison
from marlin_tools.run.verdict import Comparison, Finding, Outcome


def finding(measured=5.0, expected=5.0, tolerance=0.1, **more):
    return Finding("ppl:x", "perplexity", measured, None, expected, tolerance, **more)


def outcome(*findings, name="row", **more):
    known = {"name": name, "model": "demo", "source": "a paper", "deviations": ("another tokenizer",)}
    return Outcome(Recipe.model_construct(**known), findings, **more)


@pytest.mark.parametrize(
    ("measured", "tolerance", "expected"),
    (
        (5.0, 0.0, "PASS"),
        (5.1, 0.11, "PASS"),
        (4.9, 0.11, "PASS"),
        (5.1, 0.09, "FAIL"),
        (4.9, 0.09, "FAIL"),
        (5.000001, 0.0, "FAIL"),
        (math.nan, 9.0, "FAIL"),
        (math.inf, 9.0, "FAIL"),
        (5.1, None, "reported"),
        (None, 0.1, "not run"),
        (None, None, "not run"),
    ),
)
def test_verdict_of_a_number(measured, tolerance, expected):
    assert expected == finding(measured, 5.0, tolerance).verdict


def test_numbers_that_are_not_finite_are_valid_json():
    """A ruined model has them; JSON has not."""
    found = outcome(finding(math.nan), finding(math.inf)).describe()["findings"]

    assert [(None, None, "FAIL")] * 2 == [(each["measured"], each["difference"], each["verdict"]) for each in found]


def test_a_finding_is_a_line_of_the_log():
    assert "PASS: ppl:x perplexity 5.0000, expected 5, ±0.1 allowed" == str(GOOD)
    assert "not run: ppl:x perplexity, expected 5, ±0.1 allowed (no data)" == str(MISSING)


GOOD, BAD, MISSING, SHOWN = finding(), finding(6.0), finding(None, reason="no data"), finding(expected=None)


@pytest.mark.parametrize(
    ("row", "expected", "code"),
    (
        (outcome(GOOD), "PASS", 0),
        (outcome(GOOD, SHOWN), "PASS", 0),
        (outcome(SHOWN), "reported", 0),
        (outcome(GOOD, BAD), "FAIL", 1),
        (outcome(MISSING, BAD), "FAIL", 1),
        (outcome(GOOD, MISSING), "not run", 2),
        (outcome(problem="no model"), "not run", 2),
        (outcome(GOOD, problem="`hashes`", failed=True), "FAIL", 1),
    ),
)
def test_verdict_of_a_recipe(row, expected, code):
    assert expected == row.verdict
    assert code == Comparison("x", (row,)).code


def test_failure_outweighs_what_was_not_run():
    assert 1 == Comparison("x", (outcome(MISSING), outcome(BAD))).code


@pytest.mark.parametrize(
    ("row", "stands"),
    (
        (outcome(GOOD), True),
        (outcome(SHOWN), True),
        (outcome(GOOD, MISSING), True),
        (outcome(BAD), False),
        (outcome(MISSING), False),
        (outcome(problem="no model"), False),
        (outcome(GOOD, problem="`hashes`", failed=True), False),
    ),
)
def test_only_a_control_that_was_measured_and_did_not_fail_stands(row, stands):
    assert stands == row.stands


def test_everything_is_said_in_words_in_markdown_and_on_the_page(tmp_path):
    rows = (outcome(GOOD, MISSING, name="first"), outcome(BAD, name="second"), outcome(problem="<no> model", name="third"))
    comparison = Comparison("mine", rows, overrides=("evaluate.limit=3",), home=tmp_path)
    text, markdown = as_text(comparison), as_markdown(comparison)
    page = write_comparison(comparison).read_text(encoding="utf-8")

    assert "| second | ppl:x | perplexity |   6.0000 |    5.0000 |    +1.0000 | ±0.1    | FAIL    |" in text
    assert "first: `ppl:x` was not run: no data" in text
    assert "third: not run: <no> model" in text
    assert text.endswith("1 FAIL, 2 not run")
    for each in (markdown, page):
        for word in ("first", "second", "third", "no data", "evaluate.limit=3", "another tokenizer", "a paper", "third.log"):
            assert word in each
    assert {"report.html", "report.json", "report.md"} == {path.name for path in tmp_path.iterdir()}
    assert "\\<no\\> model" in markdown
    assert "&lt;no&gt; model" in page
    assert "<no>" not in page
    assert 3 == page.count('class="allowed"') + 1  # a picture for each judged number that was measured


def test_the_picture_shows_where_the_number_lies(tmp_path):
    places = {5.0: 'class="inside" x="48.50"', 5.1: 'class="inside" x="73.50"', 12.0: 'class="outside" x="98.50"'}
    for measured, place in (places | {-2.0: 'class="outside" x="-1.50"'}).items():
        row = outcome(finding(measured, tolerance=0.1 + 1e-9))
        assert place in write_comparison(Comparison("x", (row,), home=tmp_path)).read_text(encoding="utf-8")
