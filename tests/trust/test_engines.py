"""Who loads what, on how many GPUs: real models by their shapes, and every rule at its edge."""

import json
import shlex

import pytest

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.families import find_family
from marlin_tools.formats import FORMATS
from marlin_tools.formats.contents import Contents
from marlin_tools.stream.inventory import take_linears
from marlin_tools.verification.engines import ENGINES, commands, judge_checkpoint, judge_engines, served_as


def config(hidden, inner, heads, kv_heads, blocks=1, head_dim=None):
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": blocks,
        "head_dim": head_dim,
    }


def shapes(config):
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    one = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in one.items()}


def judge(config, layout="gptq", group_size=128, kept=(), activations="16bit", down=None):
    linears = {name: shape for name, shape in shapes(config).items() if name not in kept}
    sizes = dict.fromkeys(linears, group_size) | {n: down for n in linears if down and n.endswith("down_proj")}
    verdicts = judge_engines(config, find_family(config), linears, kept, layout, sizes, activations)
    return {verdict.engine: verdict for verdict in verdicts}


LLAMA2_7B = config(4096, 11008, 32, 32)
LLAMA2_13B = config(5120, 13824, 40, 40)
LLAMA3_8B = config(4096, 14336, 32, 8)
LLAMA3_70B = config(8192, 28672, 64, 8)
QWEN25_7B = config(3584, 18944, 28, 4)
QWEN2_72B = config(8192, 29568, 64, 8)
DOWN = "`model.layers.0.mlp.down_proj`"


@pytest.mark.parametrize(
    ("model", "group_size", "vllm", "sglang"),
    (
        (LLAMA2_7B, 128, (1, 2), (1, 2)),  # 11008 = 86 groups: half of them is the least
        (LLAMA2_13B, 128, (1, 2, 4), (1, 2, 4)),
        (LLAMA3_8B, 128, (1, 2, 4, 8), (1, 2, 4, 8)),
        (LLAMA3_70B, 128, (1, 2, 4, 8), (1, 2, 4, 8)),
        (QWEN25_7B, 128, (1, 2, 4), (1, 2, 4)),  # 28 heads
        (QWEN2_72B, 128, (1,), (1,)),  # 29568 = 231 groups
        (QWEN2_72B, 64, (1, 2), (1,)),  # half of it is 231 groups of 64, but no whole tiles
        (QWEN2_72B, 32, (1, 2, 4), (1,)),
        (LLAMA2_7B, -1, (1, 2, 4, 8), (1, 2)),  # no groups to cut
        (LLAMA3_8B, 16, (), ()),
        (LLAMA3_8B, 256, (), ()),
        (config(2048, 8192, 16, 2), 128, (1, 2, 4, 8), (1, 2, 4, 8)),  # two key-value heads are repeated
        (config(3072, 8192, 24, 6), 128, (1, 2), (1, 2)),  # six do not divide among four
        (config(1024, 4096, 16, 16, head_dim=128), 128, (1, 2, 4, 8), (1, 2, 4, 8)),  # o has 2048 inputs
    ),
)
@pytest.mark.parametrize("layout", ("gptq", "compressed-tensors"))
def test_tensor_parallel_sizes(model, group_size, vllm, sglang, layout):
    verdicts = judge(model, layout, group_size)

    assert (vllm, sglang) == (verdicts["vLLM"].sizes, verdicts["SGLang"].sizes)
    for verdict in verdicts.values():
        assert {1, 2, 4, 8} == {*verdict.sizes, *verdict.reasons}
        assert bool(verdict.sizes) == verdict.loads


@pytest.mark.parametrize(
    ("model", "group_size", "engine", "size", "reason"),
    (
        (
            LLAMA2_7B,
            128,
            "vLLM",
            4,
            f"{DOWN}: 2752 inputs per rank are not a multiple of group_size 128",
        ),
        (QWEN25_7B, 128, "vLLM", 8, "28 attention heads do not divide among 8"),
        (config(3072, 8192, 24, 6), 128, "vLLM", 4, "6 key-value heads do not divide among 4"),
        (LLAMA3_8B, 16, "SGLang", 1, "Marlin kernels have groups of 32, 64, 128 or per column, not 16"),
        (
            LLAMA2_7B,
            -1,
            "SGLang",
            4,
            f"{DOWN}: 4096 outputs by 2752 inputs per rank are not whole tiles",
        ),
        (config(256, 520, 4, 4), -1, "vLLM", 2, f"{DOWN}: 260 inputs per rank are not a multiple of 8"),
        (config(256, 513, 4, 4), -1, "vLLM", 2, "`model.layers.0.mlp.gate_proj`: 513 outputs do not divide among 2"),
        (LLAMA3_8B, 128, "transformers", 2, "runs INT4 linears on one GPU at a time"),
    ),
)
def test_reasons_name_linear_and_rule(model, group_size, engine, size, reason):
    assert judge(model, group_size=group_size)[engine].reasons[size].startswith(reason)


@pytest.mark.parametrize(
    ("model_type", "loads"),
    [("granitemoe", False), ("granitemoe_swa", False), ("granitemoehybrid", False), ("mistral4", False), ("mixtral", True)],
)
def test_experts_that_are_not_found(model_type, loads):
    """Of some types transformers knows how experts are put together; to those of others it gives random weights."""
    whole = LLAMA3_8B | {"model_type": model_type, "num_local_experts": 8}
    verdicts = {}
    for experts in (True, False):
        linears = {"model.layers.0.block_sparse_moe.experts.7.w1": (512, 4096)} if experts else {}
        linears |= {"model.layers.0.self_attn.o_proj": (4096, 4096)}
        found = judge_engines(whole, find_family(whole), linears, (), "compressed-tensors", dict.fromkeys(linears, 128))
        verdicts[experts] = {verdict.engine: verdict for verdict in found}["transformers"]
    assert verdicts[False].loads
    assert verdicts[True].loads == loads
    assert loads or str(verdicts[True]) == "no: does not find experts that are stored one by one, and makes up others"


def test_experts_are_cut_too():
    expert = "model.layers.0.mlp.experts.7"
    linears = shapes(LLAMA3_8B) | {f"{expert}.gate_proj": (768, 4096), f"{expert}.down_proj": (4096, 768)}
    verdicts = judge_engines(LLAMA3_8B, find_family(LLAMA3_8B), linears, (), "gptq", dict.fromkeys(linears, 128))
    found = {verdict.engine: verdict for verdict in verdicts}["vLLM"]

    assert found.sizes == (1, 2)
    assert found.reasons[4] == f"`{expert}.down_proj`: 192 inputs per rank are not a multiple of group_size 128"


def test_each_linear_is_held_against_its_own_groups():
    """Half of 86 groups of 128 is the least, of 172 groups of 64 a quarter; the others are cut between outputs."""
    vllm = {down: judge(LLAMA2_7B, "compressed-tensors", down=down)["vLLM"] for down in (None, 64, 16)}
    assert ((1, 2), (1, 2, 4), ()) == tuple(verdict.sizes for verdict in vllm.values())
    assert vllm[64].reasons[8].startswith(f"{DOWN}: 1376 inputs per rank are not a multiple of group_size 64")
    (note,) = judge(LLAMA2_7B, "compressed-tensors", down=16)["marlin-tools"].notes
    assert note.startswith(f"with the reference backend only: {DOWN}: group_size 16")
    sizes = dict.fromkeys(shapes(LLAMA2_7B), 128) | {"model.layers.0.self_attn.k_proj": 64}
    verdicts = judge_engines(LLAMA2_7B, find_family(LLAMA2_7B), shapes(LLAMA2_7B), (), "compressed-tensors", sizes)
    assert "`model.layers.0.self_attn.q_proj` is fused with linears of another group size" == verdicts[0].reasons[1]
    fp8 = judge(LLAMA3_8B, "compressed-tensors", down=64, activations="fp8")["vLLM"]
    assert fp8.reasons[1] == "its kernel for FP8 activations has groups of 128, not 64"


def test_outputs_of_fused_linears_count_together():
    """On 8 ranks q has 128 outputs; k and v have 32 each, which makes 192, or 16 each, which makes 160."""
    even, odd = config(1024, 8192, 32, 8, head_dim=32), config(1024, 8192, 64, 8, head_dim=16)

    assert (1, 2, 4, 8) == judge(even)["SGLang"].sizes
    assert "`model.layers.0.self_attn.q_proj` with what is fused to it: 160 outputs by" in judge(odd)["SGLang"].reasons[8]
    assert (1, 2, 4, 8) == judge(odd)["vLLM"].sizes
    assert ("fills up incomplete tiles with zeros and warns",) == judge(odd)["vLLM"].notes
    assert () == judge(even)["vLLM"].notes


@pytest.mark.parametrize("kept", ("self_attn.k_proj", "mlp.up_proj"))
def test_half_of_a_fused_matrix_cannot_stay_dense(kept):
    name = f"model.layers.0.{kept}"
    verdicts = judge(LLAMA3_8B, kept=(name,))

    assert f"`{name}` is not quantised, but fused with linears that are" == verdicts["vLLM"].reasons[1]
    assert (1,) == verdicts["transformers"].sizes


def test_whole_branches_may_stay_dense():
    kept = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]

    assert (1, 2, 4, 8) == judge(LLAMA2_7B, kept=kept)["vLLM"].sizes


@pytest.mark.parametrize(
    ("layout", "loading"),
    (
        ("gptq", {"vLLM", "SGLang", "transformers", "GPTQModel", "marlin-tools"}),
        ("compressed-tensors", {"vLLM", "SGLang", "transformers", "marlin-tools"}),
        ("marlin", {"GPTQModel", "marlin-tools"}),
        ("marlin-24", {"marlin-tools"}),
    ),
)
def test_formats(layout, loading):
    verdicts = judge(LLAMA3_8B, layout)

    assert loading == {name for name, verdict in verdicts.items() if verdict.loads}
    assert all(str(verdict).startswith("no: ") for verdict in verdicts.values() if not verdict.loads)


def test_every_engine_has_an_answer_for_every_format():
    for engine in ENGINES:
        assert set(FORMATS) == {*engine.loads, *engine.refuses}


def test_what_has_to_be_installed_is_said():
    verdict = judge(LLAMA3_8B)["transformers"]

    assert "tp 1; not 2, 4, 8: runs INT4 linears on one GPU at a time; needs `gptqmodel`" == str(verdict)


def test_our_own_kernels_have_limits_too():
    assert () == judge(LLAMA3_8B)["marlin-tools"].notes
    assert () == judge(LLAMA3_8B, group_size=32)["marlin-tools"].notes
    (note,) = judge(LLAMA3_8B, group_size=16)["marlin-tools"].notes
    assert note.startswith("with the reference backend only: `model.layers.0.self_attn.q_proj`: group_size 16 is neither")


def test_the_forecast_is_the_verdict(tiny_model, rounded):
    """What is said before quantising, from the original's headers, is what is said of the result."""
    checkpoint = Checkpoint.open(tiny_model("llama"))
    inventory = take_linears(checkpoint, ())
    linears = {target.name: (target.n, target.k) for target in inventory.targets}
    before = judge_engines(checkpoint.config, inventory.family, linears, inventory.kept, "gptq", dict.fromkeys(linears, 128))

    assert before == judge_checkpoint(Contents(Checkpoint.open(rounded())))
    assert (1, 2) == before[0].sizes


@pytest.mark.parametrize(
    ("layout", "group_size", "expected"),
    (
        ("compressed-tensors", 128, None),
        ("gptq", 128, None),
        ("marlin", 128, "compressed-tensors"),
        ("compressed-tensors", 16, None),  # no format makes it fit: nothing is advised, least of all what it is
        ("gptq", 16, None),
    ),
)
def test_the_format_that_servers_want_is_another_one_or_none(rounded, layout, group_size, expected):
    directory = rounded(settings={"format": layout, "group_size": group_size})

    assert expected == served_as(Contents(Checkpoint.open(directory)))


def test_every_engine_is_started_on_a_directory_whatever_its_name():
    place = "it's $HOME/a b"
    started = dict(commands([engine.name for engine in ENGINES], place))

    assert len(ENGINES) == len(started)
    for command in started.values():
        words = shlex.split(command)
        assert place in words or json.dumps(place) in words[-1]
    assert f"vllm serve {shlex.quote(place)}" == started["Serve it with vLLM"]


@pytest.mark.parametrize(
    ("changes", "group_size", "sizes", "reason"),
    (
        ({}, 128, (1, 2, 4, 8), None),
        ({}, 64, (), "its kernel for FP8 activations has groups of 128, not 64"),
        ({}, -1, (), "its kernel for FP8 activations has groups of 128, not -1"),
        (
            {"dtype": "float16"},
            128,
            (),
            "its own kernel for FP8 activations puts out bfloat16, the model is float16 (our plugin takes it)",
        ),
        ({"intermediate_size": 14400}, 128, (), f"{DOWN}: 14400 inputs per rank are not a multiple of group_size 128"),
        ({"num_key_value_heads": 1, "head_dim": 96}, 128, (), "`model.layers.0.self_attn.q_proj` with what is fused to it"),
    ),
)
def test_vllm_has_one_kernel_for_fp8_activations(changes, group_size, sizes, reason):
    verdict = judge(LLAMA3_8B | changes, "compressed-tensors", group_size, activations="fp8")["vLLM"]
    assert sizes == verdict.sizes
    assert not reason or verdict.reasons[1].startswith(reason)
    assert ("on Hopper only" in str(verdict)) == bool(sizes)


def test_engines_without_a_reader_for_fp8_activations():
    verdicts = judge(LLAMA3_8B, "compressed-tensors", activations="fp8")
    assert not verdicts["SGLang"].loads
    assert "rounds activations and multiplies in 16 bits" in str(verdicts["transformers"])
    assert verdicts["marlin-tools"].loads
