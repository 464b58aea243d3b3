"""A wrong recipe: every mistake at once, each with its place, what is known there, and what was probably meant."""

import pytest

from marlin_tools.errors import RecipeError
from marlin_tools.recipe.files import load
from marlin_tools.recipe.recipe import Recipe

BAD = """\
name: my model
model: demo
calibrate: {sources: c4, num_samples: 0}
stages:
  - stage: quantise
  - stage: quantize
    dampp: 0.1
    damp: -1
    algorithm: {kind: gptq, pollish: 3}
    ignore: down_proj
  - {stage: export, formats: [gptqq]}
  - tasks: [x]
  - {stage: evaluate, batch_size: x}
  - {stage: verify, deep: true}
stagess: 1
"""
EXPECTED = [
    "1:7: `name: my model`: string should match pattern ",
    "3:13: unknown key `sources` in `calibrate`; did you mean `source`? known: source, num_samples, seqlen, seed, shape, ",
    "3:39: `num_samples: 0`: must be greater than or equal to 1",
    "5:12: unknown stage `quantise`; did you mean `quantize`? known: ",
    "7:5: unknown key `dampp` in `quantize`; did you mean `damp`? known: ",
    "8:11: `damp: -1`: must be greater than 0",
    "9:29: unknown key `pollish` in `gptq`; did you mean `polish`? known: ",
    "10:13: `ignore: down_proj`: must be a valid list",
    "11:31: unknown format `gptqq`; did you mean `gptq`? known: gptq, compressed-tensors, marlin, marlin-24",
    "12:5: `stage` is missing; known: ",
    "13:5: `tasks` is missing in `evaluate`",
    "13:35: `batch_size: x`: must be 'auto', or must be a valid integer",
    "14:21: unknown key `deep` in `verify`; known: stage",
    "15:1: unknown key `stagess`; did you mean `stages`? known: name, model, description, source, deviations, calibrate, ",
]
MEASURED = "name: a\nmodel: demo\nstages:\n  - stage: evaluate\n    tasks:\n      - a\n      - ppl:b\n"
GOOD = "name: a\nmodel: demo\nstages:\n  - stage: quantize\n    preset: fast\n  - stage: verify\n"


@pytest.fixture
def complaints(tmp_path):
    def read(text, *overrides):
        file = tmp_path / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError) as error:
            load(file, overrides)
        return [line.removeprefix(f"{file}:") for line in error.value.message.splitlines()]

    return read


def test_all_complaints_at_once(complaints):
    found = complaints(BAD)

    assert len(EXPECTED) == len(found)
    for expected, line in zip(EXPECTED, found, strict=True):
        assert line.startswith(expected)


def test_known_keys_are_those_of_the_model(complaints):
    (line,) = complaints("nam: a\n" + GOOD)

    assert line.endswith(f"known: {', '.join(Recipe.model_fields)}")


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("a: 1\nb: 2\na: 3\n", "3:1: found duplicate key "),
        ("a: [1\nb: 2\n", "2:2: expected ',' or ']'"),
        ("a: b: c\n", "1:5: mapping values are not allowed here"),
        ("a:\n\tb: 1\n", "2:1: found character "),
        ("a: !!python/name:os.system x\n", "1:4: could not determine a constructor for the tag "),
        ("", "1:1: expected `key: value` lines"),
        ("- a\n", "1:1: expected `key: value` lines"),
        ("name: a\n", "1:1: `model` is missing"),
        (GOOD + "  - stage: quantize\n", "1:1: a recipe quantises once"),
        (GOOD + "  - {stage: evaluate, tasks: [a]}\n" * 2, "1:1: a recipe evaluates once"),
        (GOOD + "expect: [{task: a, value: .nan}]\n", "7:27: `value: nan`: must be a finite number"),
        (GOOD + "expect: [{task: a, value: 1, tolerance: .inf}]\n", "7:41: `tolerance: inf`: must be a finite number"),
        (
            GOOD + "  - {stage: export, formats: [compressed-tensors]}\n",
            "1:1: format `compressed-tensors` would be written twice",
        ),
        (
            GOOD + "expect: [{task: mmlu, value: 1}]\n",
            "7:17: `expect` names task `mmlu`, which no stage measures; measured: nothing",
        ),
        (MEASURED + "expect: [{task: a, value: 1, metric: ' '}]\n", "8:38: no metric is named; leave `metric` out for "),
        (MEASURED + "expect: [{task: a, value: 1, metric: kl}]\n", "8:38: `expect` names metric `kl`, which only texts have"),
        (
            MEASURED + "expect: [{task: 'ppl:b', value: 1, metric: perplexty}]\n",
            "8:44: `expect` names metric `perplexty`, which no text has; did you mean `perplexity`? known: perplexity, kl, ",
        ),
        (
            MEASURED + "expect: [{task: 'ppl:b', value: 1, metric: top1}]\n",
            "8:44: `expect` names metric `top1`, and `evaluate` has no `baseline` to measure it by",
        ),
        (GOOD + "expect: [{task: mmlu, value: x}]\n", "7:30: `value: x`: must be a valid number"),
        (
            GOOD.replace("fast", "fats"),
            "5:13: unknown preset `fats`; did you mean `fast`? known: rtn, marlin, fast, default, max",
        ),
        (GOOD.replace("demo", "' '"), "2:8: no model is named; a directory, a hub id (owner/name), or an alias such as demo"),
        (GOOD + "  - {stage: finetune, teacher: ''}\n", "7:32: no model is named; "),
        (GOOD + "  - {stage: evaluate, tasks: [a], baseline: ''}\n", "7:45: no model is named; "),
        (GOOD + "  - {stage: evaluate, tasks: [a], include_path: [b, '']}\n", "7:53: no directory is named; "),
        (GOOD + "calibrate: {source: ' '}\n", "7:21: no source is named; known sources: demo, "),
        (GOOD + "calibrate: {source: 'demo,'}\n", "7:21: `demo,`: a comma with no source beside it; write "),
        (GOOD + "calibrate: {source: 'demo,hf:c4'}\n", "7:21: `hf:c4`: not a dataset of the hub; write `hf:owner/name`, "),
        (GOOD.replace("fast", "fast\n    device: ''"), "6:13: unknown device ``; use auto, cpu, cuda or cuda:N"),
        (GOOD + "  - {stage: evaluate, tasks: [a], device: cuda:}\n", "7:43: unknown device `cuda:`; use auto, cpu, "),
        (GOOD + "  - {stage: generate, prompt: a, device: cpux}\n", "7:42: unknown device `cpux`; use auto, cpu, "),
        (GOOD + "  - {stage: finetune, device: mps}\n", "7:31: unknown device `mps`; use auto, cpu, cuda or cuda:N"),
        (GOOD + "  - {stage: generate, prompt: a, backend: nativ}\n", "7:43: unknown backend `nativ`; did you mean `native`?"),
        (GOOD.replace("fast", "fast\n    ignore: [a, '(']"), "6:17: the pattern `(` is no regular expression: missing ), "),
        (GOOD.replace("fast", "fast\n    group_size: 0"), "6:17: a group size is 128, 64, 32, -1 (one scale per output) or "),
        ("stages: [{stage: verify}, {stage: quantize}]\n" + GOOD[:20], "1:1: `verify` comes where the model is not quantised"),
        ("stages: [{stage: prune}, {stage: verify}]\n" + GOOD[:20], "1:1: `verify` comes where the model is not quantised: "),
        ("stages: [{stage: prune}, {stage: export, formats: [gptq]}]\n" + GOOD[:20], "1:1: `export` comes where the model is "),
        (GOOD + "expect: [{task: mmlu, value: null}]\n", "7:30: `value: null`: must be a valid number"),
        (GOOD + "  - {stage: null}\n", "7:13: unknown stage `null`; known: "),
        (GOOD.replace("fast", "no"), "5:13: unknown preset `no`; "),  # YAML 1.1 would read False
    ),
)
def test_place(complaints, text, expected):
    assert complaints(text)[0].startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    (
        ("quantize.dampp=1", "--set quantize.dampp=1: unknown key `dampp` in `quantize`; did you mean `damp`? known: "),
        ("quantize.damp=-1", "--set quantize.damp=-1: `damp: -1`: must be greater than 0"),
        ("stages.0.damp=x", "--set stages.0.damp=x: `damp: x`: must be a valid number"),
        ("quantize.damp=true", "--set quantize.damp=true: `damp` is no flag, not `true`"),
        ("stages.7.damp=1", "--set stages.7.damp=1: there is no `stages.7`"),
        ("stages.1=x", "--set stages.1=x: "),
        pytest.param(f"stages.{'9' * 5000}=x", "--set stages.9999", id="long number"),
        ("name.x=1", "--set name.x=1: `name` has no parts that could be set"),
        ("model", "`--set model`: not of the form `a.b=value`"),
        ("a..b=1", "`--set a..b=1`: not of the form `a.b=value`"),
        ("model=[", "`[` is no YAML value"),
        ("export.formats=[gptq]", "--set export.formats=[gptq]: unknown key `export`; did you mean `expect`? known: "),
        ("quantise.damp=1", "--set quantise.damp=1: unknown key `quantise`; did you mean `quantize`? known: "),
    ),
)
def test_override(complaints, override, expected):
    assert complaints(GOOD, override)[0].startswith(expected)


def test_override_beside_a_stage_whose_name_is_no_word(complaints):
    text = GOOD + "  - {stage: [a]}\n"
    assert complaints(text, "quantise.damp=1")[0].startswith("--set quantise.damp=1: unknown key `quantise`; ")


def test_a_result_in_the_place_of_its_recipe(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match="is a directory") as caught:
        load(tmp_path)
    assert caught.value.hint == f"name the recipe in it: `{tmp_path / 'recipe.yaml'}`"


def test_unreadable_file(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "mine.yaml")
