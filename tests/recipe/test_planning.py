"""Plans without weights: every bundled recipe, offline, from shapes that are those of the real models."""

import json
from math import prod
from pathlib import Path

import pytest

from marlin_tools.backends import vllm
from marlin_tools.checkpoint import cards
from marlin_tools.checkpoint.cards import CARDS, Card, sketch
from marlin_tools.checkpoint.reader import ALIASES, Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.errors import DataError, DeviceError, FormatError, ModelError, RecipeError
from marlin_tools.families import find_family
from marlin_tools.recipe.files import catalog, load, tables
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.run.plan import plan
from marlin_tools.stage import made_with

PARAMETERS = {  # as the hub counts them
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-9b": 9_241_705_984,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "microsoft/phi-4": 14_659_507_200,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-27b-it": 27_432_406_640,
    "meta-llama/Llama-4-Scout-17B-16E": 108_641_793_536,
    "Qwen/Qwen3.5-9B": 9_409_813_744,  # without the layers that predict ahead, which transformers does not have
}


def test_every_alias_has_a_card():
    assert set(ALIASES.values()) == set(CARDS) == set(PARAMETERS)


@pytest.mark.parametrize("repository", CARDS)
def test_card_has_as_many_parameters_as_the_model(repository):
    card = Card(CARDS[repository], repository)

    assert PARAMETERS[repository] == sum(prod(card.shape(name)) for name in card.names())


@pytest.mark.parametrize("model_type", ("llama", "mistral", "qwen2", "qwen3", "gemma2"))
@pytest.mark.parametrize("tied", (False, True))
def test_card_has_the_names_and_shapes_of_a_checkpoint(tiny_model, model_type, tied):
    """A saved model of the same config, tensor by tensor."""
    saved = Checkpoint.open(tiny_model(model_type, tie_word_embeddings=tied))
    card = Card(saved.config, "card")

    assert saved.names() == card.names()
    assert [saved.shape(name) for name in saved.names()] == [card.shape(name) for name in card.names()]
    assert saved.nbytes == card.nbytes


@pytest.mark.parametrize("name", [name for name in catalog() if name not in tables()])
def test_every_bundled_recipe_plans_offline(name):
    recipe = load(name)
    planned = plan(recipe, dry=True)
    facts = {key: value for step in planned.steps for key, value in step.facts}

    assert [stage.stage for stage in recipe.stages] == [step.stage.stage for step in planned.steps]
    assert {"tasks", "memory"} <= set(facts)
    if recipe.quantize:
        assert {"linears", "shapes", "host memory", "disk", "blocks"} <= set(facts)
        mixture = int(facts["linears"].split()[0]) > 12 * int(facts["blocks"])  # whose time is not foretold
        foretold = recipe.quantize.sparsity is None and recipe.quantize.preset not in {"rtn", "max"} and not mixture
        assert ("time" in facts) == foretold
        for layout in recipe.formats:
            assert any(key.startswith(f"{layout} in vLLM") for key in facts)
    assert (recipe.model == "demo") == (not any("not on this machine" in note for note in planned.notes))


def test_plan_of_the_largest_model():
    planned = plan(load("llama2-70b-marlin"), dry=True)
    facts = dict(planned.steps[0].facts)

    assert "560 quantised, 0 kept as they are" == facts["linears"]
    assert "160 of 8192 x 8192, 160 of 1024 x 8192, 160 of 28672 x 8192, 80 of 8192 x 28672" == facts["shapes"]
    assert "36.6 GB" == facts["disk"]
    assert facts["gptq in vLLM 0.33.0"].startswith("tp 1, 2, 4, 8")
    resolved, absent = planned.notes[:2]
    assert "`llama2-70b@3aba440b59558f995867ba6e1f58f21d0336b5bb` is `meta-llama/Llama-2-70b-hf` at revision 3aba" in resolved
    assert "is not on this machine: planned from its shapes; a run downloads 138.0 GB" in absent


def test_a_shape_that_a_format_cannot_hold_is_refused_without_weights(monkeypatch):
    odd = CARDS["meta-llama/Llama-2-7b-hf"] | {"intermediate_size": 11000}
    monkeypatch.setitem(CARDS, "meta-llama/Llama-2-7b-hf", odd)

    with pytest.raises(FormatError, match="down_proj"):
        plan(load("llama2-7b-marlin"), dry=True)


def test_a_model_without_a_card_is_planned_from_its_config(monkeypatch, tiny_llama):
    monkeypatch.setattr(cards, "_config_of_the_hub", lambda repository, revision: Checkpoint.open(tiny_llama).config)
    recipe = Recipe.model_validate({"name": "x", "model": "some/one", "stages": [{"stage": "quantize", "preset": "rtn"}]})

    assert "14 quantised, 0 kept as they are" == dict(plan(recipe, dry=True).steps[0].facts)["linears"]


def test_a_model_that_nobody_knows(tmp_path):
    with pytest.raises(ModelError, match="`some/one` has no built-in shape card") as error:
        sketch("some/one", find_family)
    assert "meta-llama/Llama-2-7b-hf" in error.value.hint
    with pytest.raises(ModelError, match="is no directory, no hub id"):
        sketch("nonsense", find_family)


@pytest.mark.parametrize("dry", [True, False])
def test_a_baseline_that_is_no_model(dry):
    stages = [{"stage": "quantize", "preset": "rtn"}, {"stage": "evaluate", "tasks": ["ppl:demo"], "baseline": "nonsense"}]
    with pytest.raises(ModelError, match="`nonsense` is no directory, no hub id"):
        plan(Recipe(name="a", model="demo", stages=stages), dry=dry)


def test_a_baseline_of_other_words_is_refused_from_its_shapes():
    stages = [{"stage": "quantize", "preset": "rtn"}, {"stage": "evaluate", "tasks": ["ppl:demo"], "baseline": "llama3.2-1b"}]
    with pytest.raises(DataError, match=r"the vocabularies of `demo` .* and `llama3.2-1b` \(128256 words\) differ"):
        plan(Recipe(name="a", model="demo", stages=stages), dry=True)


@pytest.mark.parametrize("stage", [{"stage": "verify"}, {"stage": "export", "formats": ["gptq"]}])
@pytest.mark.parametrize("dry", [True, False])
def test_what_is_about_codes_wants_a_model_with_codes(tiny_llama, tmp_path, stage, dry):
    """Also behind stages that take hours."""
    stages = [{"stage": "evaluate", "tasks": ["ppl:demo"]}, stage]
    with pytest.raises(FormatError, match="`demo` is not quantised"):
        plan(Recipe(name="a", model="demo", stages=stages), dry=dry)
    quantize(tiny_llama, None, QuantizeSettings(preset="rtn", device="cpu"), tmp_path / "int4")
    planned = plan(Recipe(name="a", model=str(tmp_path / "int4"), stages=[stage]), dry=dry)
    assert [stage["stage"]] == [step.stage.stage for step in planned.steps]


@pytest.mark.parametrize(
    ("stage", "refused"),
    [
        ({"stage": "finetune", "device": "cuda:77"}, "device `cuda:77` does not exist"),
        ({"stage": "generate", "prompt": "a", "device": "cuda:77"}, "device `cuda:77` does not exist"),
        ({"stage": "generate", "prompt": "a", "device": "cpu", "backend": "native"}, "`native` does not run on cpu"),
        ({"stage": "evaluate", "tasks": ["ppl:demo"], "device": "cpu", "backend": "native"}, "`native` does not run on cpu"),
        ({"stage": "evaluate", "tasks": ["ppl:demo"], "backend": "vllm"}, "backend `vllm`"),
    ],
)
def test_a_place_that_cannot_compute_is_refused_before_stages_before_it_work(monkeypatch, stage, refused):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=refused):
        plan(Recipe(name="a", model="demo", stages=[{"stage": "quantize", "preset": "rtn", "device": "cpu"}, stage]))


def test_what_is_on_this_machine_is_opened(tiny_llama):
    assert Path(tiny_llama) == sketch(tiny_llama, find_family).path
    assert not isinstance(sketch("demo", find_family), Card)


def test_a_plan_says_what_fp8_activations_mean() -> None:
    planned = plan(build_fp8("llama3-8b"), dry=True)
    facts = dict(planned.describe()[0]["facts"])
    assert str(planned.steps[0].outputs["compressed-tensors"]) == "runs/fp8-int4-g128-fp8"
    assert facts["activations"] == "FP8, e4m3 with a scale for each token"
    assert "on Hopper only" in facts["compressed-tensors in vLLM 0.33.0"]
    assert facts["compressed-tensors in SGLang 2026-09"].startswith("no: ")


def build_fp8(model: str) -> Recipe:
    stage = {"stage": "quantize", "preset": "rtn", "activations": "fp8", "device": "cpu"}
    return Recipe.model_validate({"name": "fp8", "model": model, "stages": [stage]})


def test_codes_learn_once_they_are_there():
    """What the recipe starts from is not quantised, what `finetune` reads is; without `quantize` before it there is nothing."""
    learning = {"stage": "finetune", "code_rate": 0.001}
    stages = [{"stage": "quantize"}, learning]
    assert ["quantize", "finetune"] == [step.stage.stage for step in plan(Recipe(name="a", model="demo", stages=stages)).steps]
    with pytest.raises(RecipeError, match="`code_rate` means nothing"):
        plan(Recipe(name="a", model="demo", stages=[learning]))


@pytest.mark.parametrize(
    ("before", "quantised", "name"),
    (
        ([], True, "a-finetuned"),
        ([], False, "a-2of4-finetuned"),
        ([{"stage": "prune", "preset": "magnitude"}], False, "a-2of4-finetuned/finetuned"),
    ),
)
def test_only_what_has_zeros_is_called_2of4(tiny_llama, tmp_path, before, quantised, name):
    """A dense INT4 model that learns stays dense; what is finetuned in 16 bits can only be 2:4."""
    model = tmp_path / "model"
    if quantised:
        quantize(tiny_llama, None, QuantizeSettings(preset="rtn", device="cpu"), model)
    elif before:
        model = tiny_llama
    else:
        prune(tiny_llama, None, PruneSettings(preset="magnitude", device="cpu"), model)
    stages = [*before, {"stage": "finetune", "teacher": str(tiny_llama)}]
    planned = plan(Recipe(name="a", model=str(model), calibrate={"source": "demo"}, stages=stages))

    assert Path("runs") / name == planned.outputs[-1]


@pytest.mark.parametrize(("told", "tied"), [({}, True), ({"tie_word_embeddings": False}, False)])
def test_heads_are_tied_where_models_of_a_type_are(told: dict[str, bool], tied: bool) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32}
    assert ("lm_head.weight" in Card({"model_type": "gemma2", **sizes, **told}, "card")) is not tied


@pytest.mark.parametrize("name", [name for name in catalog() if name not in tables()])
def test_a_stage_is_known_again_by_what_its_run_notes(name):
    """Else a killed run would be refused when it is repeated."""
    for stage in load(name).remaking:
        noted = json.loads(json.dumps(made_with(stage, None)))["settings"]
        assert not stage.differs(type(stage).model_validate(noted))
