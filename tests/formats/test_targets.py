"""Which linears have which group size in config.json, as the libraries that read it find out."""

import re

import pytest
import torch
from compressed_tensors.utils.match import match_targets

from marlin_tools.formats import FORMATS
from marlin_tools.formats.config import with_group_sizes
from marlin_tools.formats.contents import declared_sizes

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def blocks(count, *, prefix="model.layers", **sizes):
    """Sizes by the linear's name, for each block; `__` stands for a dot."""
    return {f"{prefix}.{i}.{name.replace('__', '.')}": size for i in range(count) for name, size in sizes.items()}


LLAMA = {f"self_attn__{name}_proj": 128 for name in "qkvo"} | {"mlp__gate_proj": 128, "mlp__up_proj": 128}
NARROW = dict.fromkeys(LLAMA, 64)
EXPERTS = {f"mlp__experts__{i}__{name}_proj": 32 for i in range(2) for name in ("gate", "up", "down")}
MLA = {"self_attn__q_a_proj": 128, "self_attn__kv_a_proj_with_mqa": 128, "self_attn__q_b_proj": 64, "self_attn__kv_b_proj": 32}
MODELS = {
    "down is narrow": (blocks(3, **LLAMA, mlp__down_proj=64), {128: 6, 64: 1}),
    "down is wide": (blocks(3, **NARROW, mlp__down_proj=128), {128: 1, 64: 6}),
    "nested": (blocks(2, prefix="model.language_model.layers", **NARROW, mlp__down_proj=128), {128: 1, 64: 6}),
    "experts": (blocks(2, **LLAMA, **EXPERTS, mlp__shared_experts__down_proj=64), {128: 6, 64: 1, 32: 1}),
    "experts of another name": (
        blocks(2, self_attn__q_proj=128, self_attn__k_proj=128, self_attn__v_proj=128, block_sparse_moe__experts__0__w1=64),
        {128: 3, 64: 1},
    ),
    "a dense block first": (
        blocks(1, **LLAMA, mlp__down_proj=64)
        | {k.replace("layers.0", "layers.1"): v for k, v in blocks(1, **MLA, **EXPERTS).items()},
        None,
    ),
    "per column": (blocks(2, **LLAMA, mlp__down_proj=-1), {128: 6, -1: 1}),
    "each block its own": (
        blocks(1, **LLAMA, mlp__down_proj=64) | {"model.layers.1.mlp.down_proj": 32},
        {128: 6, 64: 1, 32: 1},
    ),
}


def config_of(sizes):
    return with_group_sizes(FORMATS["compressed-tensors"].quantization_config(max(sizes.values()), ["lm_head"]), sizes)


def size_of(group):
    return group["weights"]["group_size"] or -1


@pytest.mark.parametrize("sizes", [sizes for sizes, _ in MODELS.values()], ids=list(MODELS))
def test_compressed_tensors_finds_each_size(sizes):
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(config_of(sizes))
    schemes = {target: group for group in parsed.config_groups.values() for target in group.targets}
    linear = torch.nn.Linear(1, 1)
    for name, size in sizes.items():
        matched = match_targets(name, linear, schemes)
        assert {size} == {schemes[target].weights.group_size or -1 for target in matched}, name
        assert {size} == declared_sizes(config_of(sizes), name)
    assert [] == match_targets("lm_head", linear, schemes)


def test_transformers_takes_the_entry_of_experts_for_experts():
    """It looks for the word alone, which the names of shared experts have as well."""
    from compressed_tensors.quantization import QuantizationConfig
    from transformers.integrations.compressed_tensors import get_experts_scheme

    body = "model.layers.1.mlp"
    shared = {f"{body}.{part}.down_proj": size for part, size in (("shared_experts", 128), ("experts.0", 64))}
    sizes = shared | {"model.layers.0.mlp.down_proj": 32, f"{body}.experts.0.up_proj": 64}
    assert 64 == get_experts_scheme(QuantizationConfig.model_validate(config_of(sizes))).weights.group_size


@pytest.mark.parametrize("sizes", [sizes for sizes, _ in MODELS.values()], ids=list(MODELS))
def test_an_engine_that_fuses_finds_each_size(sizes):
    """As vLLM looks: a module's own name, its class, the names of its parts; of experts, these names."""
    groups = config_of(sizes)["config_groups"].values()
    targets = [(target, size_of(group)) for group in groups for target in group["targets"]]

    def named(name):
        return next((s for t, s in targets if (re.match(t[3:], name) if t.startswith("re:") else t == name)), None)

    assert not any(target.lower() in "MergedColumnParallelLinear".lower() for target, _ in targets)
    for name, size in sizes.items():
        parent, _, last = name.rpartition(".")
        if ".experts." in name:
            experts = name.partition(".experts.")[0] + ".experts"
            assert {size} == {named(f"{experts}.0.{part}_proj") for part in ("gate", "up", "down")}
            continue
        for fused, parts in FUSED.items():
            if last in parts:
                assert named(f"{parent}.{fused}") in (None, size)
                assert {size} == {named(f"{parent}.{part}") for part in parts}
                break
        else:
            assert size == named(name)


@pytest.mark.parametrize(("sizes", "counts"), [case for case in MODELS.values() if case[1]])
def test_targets_are_few(sizes, counts):
    assert counts == {size_of(group): len(group["targets"]) for group in config_of(sizes)["config_groups"].values()}


def test_the_most_specific_target_counts():
    def group(size, *targets):
        return {"targets": list(targets), "weights": {"group_size": size}}

    groups = {"a": group(128, "Linear"), "b": group(64, r"re:.*down_proj"), "c": group(None, "x.down_proj")}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    assert ({-1}, {64}, {128}) == tuple(declared_sizes(config, name) for name in ("x.down_proj", "y.down_proj", "x.up_proj"))
    groups["a"]["targets"] = ["re:.*up_proj"]
    assert {128, 64, -1} == declared_sizes(config, "x.o_proj")
    assert {32} == declared_sizes({"quant_method": "gptq", "group_size": 32}, "x.o_proj")


def test_one_size_is_said_as_ever():
    config = FORMATS["gptq"].quantization_config(64, [])
    assert config is with_group_sizes(config, {"a": 64, "b": 64})
