"""Models that hold a language model among other things."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaForConditionalGeneration,
)

from marlin_tools.backends import load
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.errors import ModelError
from marlin_tools.evaluation.evaluate import EvaluateSettings, evaluate
from marlin_tools.evaluation.generate import GenerateSettings, generate
from marlin_tools.families.layout import Layout
from marlin_tools.formats.contents import Contents
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.serving.transformers import register, unregister
from marlin_tools.verification.checks import Subject
from marlin_tools.verification.engines import judge_checkpoint
from tiny_nested import NESTED_CASES, THINKERS


def test_config_json_stays_as_it_was(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Transformers changes what it is given of another model's, and older files say the same with other keys."""
    path = Path(shutil.copytree(made("qwen3_vl"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["model_type"] = "qwen3_vl"
    turns = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": turns.pop("rope_theta"), "rope_scaling": turns}
    (path / "config.json").write_text(json.dumps(config))
    source = Checkpoint.open(path)
    assert source.text_config["hidden_size"] == config["text_config"]["hidden_size"]
    out = quantize(source, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")

    written = json.loads((out.path / "config.json").read_text())
    assert config == {key: value for key, value in written.items() if key != "quantization_config"}


def test_a_model_within_another_may_leave_out_how_many_blocks_it_has(made: Callable[[str], Path], tmp_path: Path) -> None:
    """LLaVA 1.5 does, and has as many as transformers takes then; another number is refused, not passed over."""
    path = Path(shutil.copytree(made("llava"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    usual = AutoConfig.for_model("llama").num_hidden_layers
    del config["text_config"]["num_hidden_layers"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"`num_hidden_layers` is {usual}, but there is no `language_model.model.layers.2`"):
        Layout(Checkpoint.open(path))

    two = load_file(path / "model.safetensors")
    more = {name.replace("layers.1.", f"layers.{i}."): tensor.clone() for name, tensor in two.items() for i in range(2, usual)}
    save_file(two | more, path / "model.safetensors", metadata={"format": "pt"})
    assert usual == Layout(Checkpoint.open(path)).blocks


def test_engines_look_into_a_model_within_another(made: Callable[[str], Path], tmp_path: Path) -> None:
    settings = QuantizeSettings(preset="rtn", group_size=32, ignore=(r"layers\.0\.self_attn\.q_proj",))
    out = quantize(made("gemma3"), None, settings, tmp_path / "out")
    (verdict,) = [each for each in judge_checkpoint(Contents(out)) if each.engine == "vLLM"]
    assert not verdict.loads
    assert "q_proj` is not quantised, but fused with linears that are" in verdict.reasons[1]


Names = tuple[tuple[str, str], ...]
LLAVA: Names = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
"""What tensors begin with as transformers writes them, and as LLaVA 1.5 lies on the hub."""


def _renamed(source: Path, folder: Path, older: Names) -> Path:
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        begin, instead = next((pair for pair in older if name.startswith(pair[0])), ("", ""))
        tensors[instead + name.removeprefix(begin)] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "older"),
    [("llava", LLAVA), ("qwen2_vl", (("model.language_model.", "model."), ("model.visual.", "visual.")))],
)
def test_transformers_finds_linears_by_older_names(
    made: Callable[[str], Path], tmp_path: Path, model_type: str, older: Names
) -> None:
    path = _renamed(made(model_type), tmp_path / "model", older)
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    ids = torch.arange(2, 22)[None]
    expected = load(out, device="cpu", backend="reference")(input_ids=ids).logits

    register()
    model = AutoModelForImageTextToText.from_pretrained(out.path)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    for each in (model, again, load(tmp_path / "saved", device="cpu", backend="reference")):
        torch.nn.Module.float(each)
        torch.testing.assert_close(each(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["voxtral", "granite_speech", "nemotron_h"])
def test_transformers_computes_in_the_type_that_it_is_told(
    made: Callable[[str], Path], quantized: Callable[[str], Checkpoint], model_type: str, dtype: torch.dtype
) -> None:
    """Also what a checkpoint calls otherwise than the model does; of a quantised one it leaves that as it is stored."""
    out = quantized(model_type)
    backend = "torch-int4" if dtype == torch.bfloat16 else "reference-packed"
    expected = load(out, device="cpu", backend=backend, dtype=dtype)
    register()
    maker = AutoModelForMultimodalLM if model_type in NESTED_CASES else AutoModelForCausalLM
    found, original = (maker.from_pretrained(each, dtype=dtype) for each in (out.path, made(model_type)))
    types = {name: tensor.dtype for name, tensor in original.named_parameters()}
    assert all(tensor.dtype == types[name] for name, tensor in found.named_parameters())
    ids = torch.arange(2, 22)[None]
    assert torch.equal(expected(input_ids=ids).logits, found(input_ids=ids).logits)


def test_what_a_model_wants_in_32_bits_comes_in_32_bits(
    quantized: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlavaForConditionalGeneration, "_keep_in_fp32_modules_strict", {"multi_modal_projector"})
    register()
    model = AutoModelForMultimodalLM.from_pretrained(quantized("llava").path, dtype=torch.bfloat16)
    exact = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    assert exact == {name for name, _ in model.named_parameters() if "multi_modal_projector" in name}
    assert model.model.language_model.norm.weight.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "older"), [("nemotron_h", ()), ("llava", LLAVA)])
def test_transformers_leaves_out_what_is_left_out_under_another_name(
    made: Callable[[str], Path], eager: Callable[[str, Path], torch.nn.Module], model_type: str, older: Names, tmp_path: Path
) -> None:
    """It goes by its modules, of which the names of the tensors may begin otherwise."""
    path = _renamed(made(model_type), tmp_path / "model", older)
    settings = QuantizeSettings(preset="rtn", group_size=32, ignore=(r"layers\.[01]\..*(up|q)_proj$",))
    out = quantize(path, None, settings, tmp_path / "out")
    ids = torch.arange(2, 22)[None]
    expected = load(out, device="cpu", backend="reference")(input_ids=ids).logits
    unregister()
    try:
        found = eager(model_type, out.path)(input_ids=ids).logits
    finally:
        register()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(("outer", "fails"), [(False, False), (True, True)])
def test_whether_a_head_is_the_embedding_is_said_by_the_whole_model(
    made: Callable[[str], Path], tmp_path: Path, outer: bool, fails: bool
) -> None:
    """The language model of Qwen3-VL with experts, asked alone, takes it for granted."""
    path = Path(shutil.copytree(made("qwen3_vl_moe"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    del config["text_config"]["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": outer}))
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert Layout(out).config["tie_word_embeddings"]
    found = Subject(out).inventory()
    assert found.ok != fails, found.detail


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["hunyuan_vl", "paddleocr_vl", "glm4v"])
def test_a_config_may_say_all_of_the_language_model_beside_the_others(
    made: Callable[[str], Path], model_type: str, tmp_path: Path
) -> None:
    nested, flat = (Path(shutil.copytree(made(model_type), tmp_path / name)) for name in ("nested", "flat"))
    config = json.loads((flat / "config.json").read_text())
    inside = config.pop("text_config")
    (flat / "config.json").write_text(json.dumps(inside | config))
    ids, logits = torch.arange(2, 22)[None], []
    for path in (nested, flat):
        out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), path.with_suffix(".out"))
        logits.append(load(out, device="cpu", backend="reference")(input_ids=ids).logits)
    assert torch.equal(*logits)


def test_exaone_4_5_calls_its_language_model_by_a_type_of_its_own(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("exaone4_5"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["model_type"] = "exaone4_5_text"
    (path / "config.json").write_text(json.dumps(config))
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert sorted(StoredLinears(out).names) == sorted(Layout(Checkpoint.open(made("exaone4_5"))).linears())


@torch.no_grad()
def test_paligemma_does_not_look_ahead_in_a_text(made: Callable[[str], Path]) -> None:
    model = load(made("paligemma"), device="cpu", dtype=torch.float32)
    first, other = torch.arange(2, 22)[None], torch.arange(2, 22)[None]
    other[0, -1] = 40
    logits, others = model(input_ids=first).logits, model(input_ids=other).logits
    torch.testing.assert_close(logits[:, :-1], others[:, :-1])
    assert not torch.allclose(logits[:, -1], others[:, -1])


@torch.no_grad()
def test_paligemma_looks_ahead_in_what_it_is_asked_and_in_transformers_everywhere(made: Callable[[str], Path]) -> None:
    """What docs/models.md says of it: only without `token_type_ids` do the ways to compute its attention differ."""
    model = load(made("paligemma"), device="cpu", dtype=torch.float32)
    first, other = torch.arange(2, 22)[None], torch.arange(2, 22)[None]
    other[0, 9] = 40

    def looks_ahead(**told: torch.Tensor) -> bool:
        return not torch.allclose(*(model(input_ids=ids, **told).logits[:, 0] for ids in (first, other)))

    kinds = torch.arange(20)[None]
    asked, written = {"token_type_ids": (kinds > 12).long()}, {"token_type_ids": (kinds > 4).long()}
    assert [False, True, False] == [looks_ahead(), looks_ahead(**asked), looks_ahead(**written)]
    model.set_attn_implementation("sdpa")
    assert [True, True, False] == [looks_ahead(), looks_ahead(**asked), looks_ahead(**written)]


@pytest.mark.parametrize("model_type", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_what_speaks_is_copied(made: Callable[[str], Path], model_type: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made(model_type), tmp_path / "model"))
    own = load_file(path / "model.safetensors")
    names = [f"talker.model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    names += ["talker.model.embed_tokens.weight", "token2wav.dit.transformer_blocks.0.proj.weight", "code2wav.x.layers.5.w"]
    more = {name: torch.full((8, 8), float(i), dtype=torch.float16) for i, name in enumerate(names)}
    save_file(own | more, path / "model.safetensors", metadata={"format": "pt"})
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert all(torch.equal(out.read(name), tensor) for name, tensor in more.items())
    assert set(names[:3]) <= {f"{name}.weight" for name in (out.quantization or {})["ignore"]}
    assert all(name.startswith("thinker.model.layers.") for name in StoredLinears(out).names)


ELSEWHERE = {"paligemma-2", "mistral3-latent", *THINKERS}
"""Cases whose class in transformers is that of another."""


@pytest.mark.parametrize("model_type", [each for each in NESTED_CASES if each not in ELSEWHERE])
def test_a_model_within_another_is_scored_and_writes(
    made: Callable[[str], Path], quantized: Callable[[str], Checkpoint], model_type: str, tmp_path: Path
) -> None:
    out, original = quantized(model_type), made(model_type)
    (tmp_path / "held.txt").write_text("The boat left the harbour at dawn, and left at dawn. " * 20)
    settings = EvaluateSettings(tasks=("demo_qa", f"ppl:{tmp_path / 'held.txt'}"), seqlen=32, limit=4, device="cpu")
    scores = {
        (each.task.partition(":")[0], each.metric): each.value for each in evaluate(out, settings, baseline=original).scores
    }
    assert 0 <= scores["demo_qa", "acc"] <= 1
    assert scores["ppl", "kl"] > 0
    assert isinstance(generate(out, "The boat", GenerateSettings(max_new_tokens=4, device="cpu")), str)
