"""What surrounds the timing: shapes, means, files. The timing itself needs a GPU."""

import pytest
import torch
from torch import nn

from marlin_tools.backends.native import NativeLinear, NativeSparseLinear
from marlin_tools.bench import kernels as bench
from marlin_tools.bench.decoding import SCHEMES, random_model
from marlin_tools.bench.kernels import BenchSettings, Measurement, Rates, ideal_microseconds
from marlin_tools.errors import DeviceError, OutputError
from marlin_tools.ops import self_test
from marlin_tools.ops.linear import dispatch


def measurement(kernel, m, speedup):
    return Measurement("llama2-7b", "o", 4096, 4096, m, kernel, "8x64", 10.0 / speedup, 0.1, speedup, 0.5, 1.0)


RESULTS = [measurement("torch", 1, 1.0), measurement("ours", 1, 2.0), measurement("ours", 1, 8.0), measurement("ours", 16, 3.0)]


def test_geometric_mean_per_m():
    assert bench.geometric_means(RESULTS, "ours") == pytest.approx({1: 4.0, 16: 3.0})
    assert bench.geometric_means(RESULTS, "absent") == {}


def test_shapes_are_those_of_the_kernels():
    for shapes in bench.SHAPES.values():
        for k, n in shapes.values():
            assert k % 128 == 0
            assert n % 64 == 0
    for shapes in bench.PAPER_SHAPES.values():
        assert all(k % 128 == 0 and n % 64 == 0 for k, n in shapes)


def test_shapes_by_model_by_size_and_by_paper():
    cpu = torch.device("cpu")

    assert [(s.layer, s.k, s.n) for s in bench._shapes(["llama3-8b"], cpu)] == [
        ("qkv", 4096, 6144),
        ("o", 4096, 4096),
        ("gate_up", 4096, 28672),
        ("down", 14336, 4096),
    ]
    (size,) = bench._shapes(["256x1088"], cpu)
    assert (size.model, size.k, size.n) == ("256x1088", 256, 1088)
    assert len(bench._shapes(["paper-falcon180b", "llama2-7b"], cpu)) == 6


@pytest.mark.parametrize("name", ["100x4096", "128x65", "0x64", "128x0"])
def test_sizes_that_no_kernel_takes(name):
    with pytest.raises(DeviceError, match=f"`{name}` is no shape"):
        bench._shapes([name], torch.device("cpu"))


def test_ideal_time_is_that_of_bytes_or_of_arithmetic():
    rates = Rates(bandwidth=3e12, flops=800e12)

    assert ideal_microseconds(1, 4096, 4096, 16, rates) == pytest.approx((4096 * 4096 * 2 + 2 * 8192) / 3e6)
    assert ideal_microseconds(1, 4096, 4096, 4.125, rates) == pytest.approx((4096 * 4096 * 4.125 / 8 + 2 * 8192) / 3e6)
    assert ideal_microseconds(4096, 4096, 4096, 4.125, rates) == pytest.approx(2 * 4096**3 / 800e6)
    assert ideal_microseconds(4096, 4096, 4096, 3.125, rates, density=0.5) == pytest.approx(4096**3 / 800e6)


@pytest.mark.parametrize("run", [bench.bench_kernels, bench.tune])
def test_says_that_there_is_no_gpu(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="torch finds none"):
        run(BenchSettings())
    with pytest.raises(DeviceError, match="no CUDA device"):
        self_test()


def test_tuning_refuses_a_cache_that_cannot_be_written_before_it_measures(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MARLIN_TOOLS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # nothing of it is asked before

    with pytest.raises(OutputError, match="cannot write") as refused:
        bench.tune(BenchSettings())
    assert "MARLIN_TOOLS_CACHE" in refused.value.hint


@pytest.mark.gpu
def test_small_run(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", {"o": (512, 512)})
    settings = BenchSettings(models=("small",), rows=(1, 64), peers=True)
    results = bench.bench_kernels(settings)

    fp8 = {bench.FP8} if torch.cuda.get_device_capability() in {(8, 9), (9, 0)} else set()
    assert {r.kernel for r in results} == {"torch", "ours", bench.SPARSE, bench.DEQUANTIZED, bench.TINYGEMM} | fp8
    assert all(r.microseconds > 0 for r in results)
    assert all(cost > 0 for cost in bench.host_costs(torch.device("cuda", 0)).values())
    with pytest.raises(DeviceError, match="`llama9`"):
        bench.bench_kernels(BenchSettings(models=("llama9",)))


@pytest.mark.parametrize(("m", "expected"), [(1, False), (63, False), (64, True), (4096, True)])
@pytest.mark.parametrize("kind", [kind for kind in bench._KINDS if kind.name != bench.FP8], ids=lambda kind: kind.name)
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_tuning_tries_what_can_be_fastest(kind, target, m, expected):
    sensible = kind.sensible(target, m, 4096)

    assert (dispatch.CUBLAS in sensible) is expected
    assert set(sensible) <= set(kind.tables.choices_on(target))
    assert all(kind.tokens[name] < 4 * max(8, m) for name in sensible if name != dispatch.CUBLAS)
    assert len(sensible) > 1 or m > 1000


def test_tuning_leaves_out_what_has_no_room_for_the_inputs():
    for kind in (kind for kind in bench._KINDS if kind.name != bench.FP8):
        assert "8x32" in kind.sensible("sm_90a", 8, 4096)
        assert "8x32" not in kind.sensible("sm_90a", 8, 28672)
        assert "8x32" in kind.sensible("sm_90a", 1, 28672)


def test_fp8_is_measured_on_hopper_and_ada_and_never_falls_back():
    (fp8,) = (kind for kind in bench._KINDS if kind.name == bench.FP8)
    assert fp8.exists_on("sm_90a H200")
    assert not fp8.exists_on("sm_86")
    assert fp8.sensible("sm_90a", 1, 4096) == fp8.sensible("sm_90a", 4096, 4096) == list(fp8.tokens)
    assert fp8.sensible("sm_89", 1, 4096) == fp8.sensible("sm_89", 4096, 4096) == ["64x256-ada", "128x128-ada"]


CARD = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize(("scheme", "kind"), [("fp16", nn.Linear), ("int4", NativeLinear), ("int4-2:4", NativeSparseLinear)])
def test_random_models_have_linears_of_their_scheme(scheme, kind):
    model = random_model(CARD, scheme, torch.device("cpu"))

    assert scheme in SCHEMES
    assert {type(module) for name, module in model.named_modules() if name.endswith("_proj")} == {kind}
    assert type(model.lm_head) is nn.Linear
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
