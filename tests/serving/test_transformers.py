"""The quantizer: transformers' own `from_pretrained` and `save_pretrained` on every format, on a CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import marlin_tools.transformers
from marlin_tools.backends import native, reference
from marlin_tools.errors import FormatError, ModelError
from marlin_tools.formats import FORMATS
from marlin_tools.formats.config import with_activations
from marlin_tools.quantized import rounds_inputs
from marlin_tools.serving.transformers import PackedQuantizer, StoredConfig, _check_places

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "attention_bias": True,
}


@pytest.fixture(autouse=True)
def registered():
    """Whatever tests of other files have left behind."""
    marlin_tools.transformers.register()


@pytest.fixture
def stored(tmp_path, make):
    """A small Llama in a format; also its weights in the neutral form."""

    def write(layout, **changes):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).half()
        tensors, weights = {}, {}
        for name, tensor in model.state_dict().items():
            linear = name.removesuffix(".weight")
            if not linear.endswith("_proj") or not name.endswith(".weight"):
                tensors[name] = tensor
                continue
            weights[linear] = make(*tensor.shape, sparse=layout == "marlin-24", seed=len(weights))
            packed = FORMATS[layout].pack(weights[linear], torch.float16)
            tensors.update({f"{linear}.{suffix}": part.contiguous() for suffix, part in packed.items()})
        config = model.config.to_dict() | {"dtype": "float16", "architectures": ["LlamaForCausalLM"]}
        config["quantization_config"] = FORMATS[layout].quantization_config(128, ["lm_head"]) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path, weights

    return write


@pytest.fixture(params=FORMATS)
def layout(request):
    return request.param


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def test_linears_stay_packed(stored, layout):
    folder, weights = stored(layout)
    model = load(folder)
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert isinstance(module, reference.PackedLinear)
        assert torch.equal(module.weight().codes, weight.codes)
        assert (module.bias is not None) == name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
    assert {type(module).__name__ for module in model.modules()} & {"PendingLinear"} == set()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fp8_activations_are_rounded(stored, dtype):
    config = with_activations(FORMATS["compressed-tensors"].quantization_config(128, ["lm_head"]), "fp8")
    folder, weights = stored("compressed-tensors", **config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert all(rounds_inputs(model.get_submodule(name)) for name in weights)
    backend = "torch-int4" if dtype == torch.bfloat16 else "reference-packed"
    expected = marlin_tools.transformers.load(folder, device="cpu", backend=backend, dtype=dtype)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.equal(expected(ids).logits, model(ids).logits)
    model.save_pretrained(folder / "again")
    written = json.loads((folder / "again" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"] == written["config_groups"]


def test_it_generates_what_the_reference_does(stored, layout):
    folder, _ = stored(layout)
    ids = torch.tensor([[1, 2, 3]])
    ours, theirs = load(folder), marlin_tools.transformers.load(folder, device="cpu", backend="reference")
    with torch.inference_mode():
        tokens = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (ours, theirs)]
        static = ours.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")

    assert torch.equal(*tokens)
    assert torch.equal(static, tokens[0])


def test_saving_writes_the_same_checkpoint(stored, layout, tmp_path):
    folder, _ = stored(layout)
    load(folder).save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]

    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("way", ["loaded", "made"])
def test_scales_that_only_float16_holds_survive_bfloat16(stored, tmp_path, way):
    folder, _ = stored("compressed-tensors")
    before = load_file(folder / "model.safetensors")
    for name in (name for name in before if name.endswith("weight_scale")):
        before[name] = torch.nextafter(before[name], torch.ones_like(before[name]))
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if way == "loaded" else torch.float16)
    model = model.to(torch.bfloat16)

    assert model(torch.arange(8)[None]).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if ".weight_" in name)


def test_bfloat16_runs_on_torch_s_product(stored, tmp_path):
    folder, weights = stored("gptq")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    kinds = {type(model.get_submodule(name)).__name__ for name in weights}
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))

    assert kinds == {"TorchInt4Linear"}
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(("qweight", "scales")))


def test_a_device_map_may_name_the_cpu(stored, layout):
    folder, _ = stored(layout)

    assert load(folder, device_map="cpu").model.layers[0].mlp.up_proj.pairs.device.type == "cpu"


def test_the_model_can_be_traced_whole(stored):
    folder, _ = stored("gptq")
    model = load(folder)
    with torch.inference_mode():
        traced = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
        x = torch.randn(1, 3, 256)
        assert torch.equal(traced(x), model.model.layers[0].mlp(x))
    assert model.hf_quantizer.is_compileable


@pytest.mark.parametrize("places", [{"a": "cpu", "b": 0}, {"a": "disk"}, {"a": "cuda:0", "b": "disk"}])
def test_packed_weights_are_not_offloaded(places):
    with pytest.raises(ModelError, match="on the CPU or on disk"):
        _check_places(places.values())


@pytest.mark.parametrize("places", [{"": "cpu"}, {"a": "cuda:0", "b": "cuda:1"}, {"": 0}, {}])
def test_other_places_are_fine(places):
    _check_places(places.values())


@pytest.mark.parametrize("head", ["mtp.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj", "extra.up_proj"])
def test_quantised_heads_that_predict_ahead_are_passed_over(stored, make, monkeypatch, head):
    folder, weights = stored("compressed-tensors")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^extra\."])
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    packed = FORMATS["compressed-tensors"].pack(make(512, 256), torch.float16)
    tensors = load_file(folder / "model.safetensors") | {f"{head}.{suffix}": part for suffix, part in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    own = marlin_tools.transformers.load(folder, device="cpu", backend="reference-packed", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])

    model = load(folder)
    assert weights.keys() == {name for name, module in model.named_modules() if isinstance(module, reference.PackedLinear)}
    with torch.inference_mode():
        assert torch.equal(own(ids).logits, model(ids).logits)


def test_a_quantised_linear_without_a_place_is_named(stored, make):
    folder, _ = stored("compressed-tensors")
    packed = FORMATS["compressed-tensors"].pack(make(512, 256), torch.float16)
    stranger = {f"model.layers.0.mlp.side_proj.{suffix}": part for suffix, part in packed.items()}
    save_file(load_file(folder / "model.safetensors") | stranger, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"quantised `model.layers.0.mlp.side_proj`, the model has no such module"):
        load(folder)


def test_permuted_inputs_are_refused_by_name(stored):
    folder, weights = stored("gptq")
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(FormatError, match=rf"`{name}`.*permutes the inputs"):
        load(folder)


def test_missing_tensors_are_named(stored):
    folder, weights = stored("gptq")
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    del tensors[f"{name}.scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(FormatError, match=rf"`{name}` has no `scales`"):
        load(folder)


def test_a_checkpoint_without_packed_tensors_says_so(stored, tmp_path):
    folder, _ = stored("gptq")
    save_file({"model.norm.weight": torch.ones(256)}, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match="holds no tensors of format `gptq`"):
        load(folder)


def test_other_checkpoints_get_what_transformers_had():
    taken = AUTO_QUANTIZER_MAPPING["gptq"]
    ours = FORMATS["gptq"].quantization_config(128, [])

    assert isinstance(taken.from_dict(ours), StoredConfig)
    assert isinstance(taken(taken.from_dict(ours)), PackedQuantizer)
    assert type(taken.from_dict(ours | {"bits": 8})).__name__ == "GPTQConfig"


def test_it_can_be_undone():
    before = dict(AUTO_QUANTIZER_MAPPING)
    marlin_tools.transformers.unregister()
    try:
        assert AUTO_QUANTIZER_MAPPING["gptq"].__name__ == "GptqHfQuantizer"
        assert "marlin" not in AUTO_QUANTIZER_MAPPING
    finally:
        marlin_tools.transformers.register()
    assert before.keys() == AUTO_QUANTIZER_MAPPING.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", FORMATS, indirect=True)
def test_on_a_gpu(stored, layout):
    """Kernels instead of 16-bit products, and texts that a static cache and `torch.compile` do not change."""
    folder, weights = stored(layout)
    model = load(folder, device_map="cpu")
    fast = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cuda")
    ids = torch.tensor([[1, 5, 9, 20]])
    kernel = native.NativeSparseLinear if layout == "marlin-24" else native.NativeLinear
    for name in weights:
        assert isinstance(fast.get_submodule(name), kernel)

    exact, found = model(ids).logits, fast(ids.cuda()).logits.float().cpu()
    assert (found - exact).norm() < 0.01 * exact.norm()
    usual = fast.generate(ids.cuda(), max_new_tokens=12, do_sample=False, pad_token_id=0)
    again = fast.generate(ids.cuda(), max_new_tokens=12, do_sample=False, pad_token_id=0, cache_implementation="static")
    assert torch.equal(usual, again)
    compiled = torch.compile(fast, mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(4):  # warm-up, recording, replay
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(ids.cuda()).logits.clone()
    assert torch.allclose(logits.float().cpu(), found, atol=0.01 * float(found.abs().max()))
    fast.save_pretrained(folder / "again")
    saved = load_file(folder / "again" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(folder / "model.safetensors").items())
