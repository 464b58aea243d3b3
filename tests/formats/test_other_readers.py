"""What the libraries that own a format make of ours."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file

from marlin_tools import __version__
from marlin_tools.formats import FORMATS
from marlin_tools.quantized import QuantizedLinear

IGNORE = ["lm_head", "model.layers.1.mlp.down_proj"]


def with_plain_scales(linear: QuantizedLinear) -> QuantizedLinear:
    """Scales of a size that the other library can divide by: it works from products, we from codes."""
    random = torch.Generator().manual_seed(1)
    scales = torch.rand(linear.scales.shape, generator=random) + 0.01
    signs = torch.randint(0, 2, scales.shape, generator=random) * 2 - 1
    return QuantizedLinear(linear.codes, (scales * signs).half(), linear.group_size)


@pytest.mark.parametrize(("n", "k", "group_size"), ((24, 256, 128), (24, 256, 256), (8, 96, 32), (3, 20, 20)))
def test_compressed_tensors_writes_the_same_and_reads_ours(draw_linear, n, k, group_size):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    linear = with_plain_scales(draw_linear(n, k, group_size))
    config = FORMATS["compressed-tensors"].quantization_config(-1 if group_size == k else group_size, [])
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    ours = FORMATS["compressed-tensors"].pack(linear)

    theirs = PackedQuantizationCompressor.compress({"weight": linear.dequantize(), "weight_scale": linear.scales}, scheme)
    assert {name: (t.dtype, t.tolist()) for name, t in theirs.items()} == {
        name: (t.dtype, t.tolist()) for name, t in ours.items()
    }

    read = PackedQuantizationCompressor.decompress(ours, scheme)
    assert torch.equal(read["weight"], linear.dequantize(read["weight"].dtype))


@pytest.mark.parametrize(("n", "k", "group_size"), ((128, 512, 128), (192, 384, 128), (128, 256, 256), (64, 32, 32)))
def test_compressed_tensors_writes_the_same_marlin_24(draw_linear, n, k, group_size):
    """At K = 256 in groups of 128 it would not: there it compares G with K/2 and leaves the scales in per-column order."""
    from compressed_tensors.quantization import QuantizationScheme

    package = "compressed_tensors.compressors.sparse_quantized_compressors"
    if importlib.util.find_spec(package) is None:
        pytest.skip("compressed-tensors has had no marlin-24 since 0.15")
    compressor = importlib.import_module(f"{package}.marlin_24").Marlin24Compressor()
    linear = with_plain_scales(draw_linear(n, k, group_size, sparse=True))
    config = FORMATS["marlin-24"].quantization_config(-1 if group_size == k else group_size, [])
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    state = {"linear.weight": linear.dequantize(torch.float16), "linear.weight_scale": linear.scales}
    theirs = compressor.compress(state, {"linear": scheme})
    ours = {f"linear.{suffix}": tensor for suffix, tensor in FORMATS["marlin-24"].pack(linear).items()}
    assert {name: (t.dtype, t.tolist()) for name, t in theirs.items()} == {
        name: (t.dtype, t.tolist()) for name, t in ours.items()
    }


@pytest.mark.parametrize("name", ("compressed-tensors", "marlin-24"))
@pytest.mark.parametrize("group_size", (-1, 128))
def test_grouped_config(name, group_size):
    from compressed_tensors.quantization import QuantizationConfig

    config = FORMATS[name].quantization_config(group_size, IGNORE)
    parsed = QuantizationConfig.model_validate(config)
    weights = parsed.config_groups["group_0"].weights
    assert (parsed.quant_method, parsed.format, parsed.ignore) == ("compressed-tensors", config["format"], IGNORE)
    assert parsed.quantization_status == "compressed"
    assert (weights.num_bits, weights.symmetric, weights.dynamic) == (4, True, False)
    assert (weights.strategy, weights.group_size) == (("channel", None) if group_size == -1 else ("group", 128))


@pytest.mark.parametrize(("name", "method"), (("gptq", "gptq"), ("marlin", "marlin")))
@pytest.mark.parametrize("group_size", (-1, 128))
def test_flat_config(name, method, group_size):
    assert FORMATS[name].quantization_config(group_size, IGNORE) == {
        "quant_method": method,
        "checkpoint_format": name,
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"marlin-tools:{__version__}"]},
        "dynamic": {r"-:^model\.layers\.1\.mlp\.down_proj$": {}},
    }
    assert FORMATS[name].quantization_config(group_size, [])["lm_head"] is True
    assert "dynamic" not in FORMATS[name].quantization_config(group_size, ["lm_head"])


def test_transformers_understands_the_gptq_config():
    from transformers import GPTQConfig

    parsed = GPTQConfig.from_dict(FORMATS["gptq"].quantization_config(128, IGNORE))
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act, parsed.format) == (4, 128, True, False, "gptq")


@pytest.mark.parametrize("group_size", (32, -1))
def test_transformers_runs_a_compressed_tensors_model(tmp_path, draw_linear, group_size):
    """A whole tiny model, one linear left out: what transformers computes from ours is what the dequantised weights compute."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, dtype="float32"
    )
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).eval()
    tensors = dict(dense.state_dict())
    layout = FORMATS["compressed-tensors"]
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in IGNORE:
            n, k = module.weight.shape
            linear = with_plain_scales(draw_linear(n, k, k if group_size == -1 else group_size, seed=n + k))
            linear = QuantizedLinear(linear.codes, linear.scales * 0.03, linear.group_size)
            module.weight.data = linear.dequantize()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in layout.pack(linear, torch.float32).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": layout.quantization_config(group_size, IGNORE),
    }
    (tmp_path / "config.json").write_text(json.dumps(whole, default=str))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, dense(tokens).logits)
