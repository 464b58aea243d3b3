"""What surrounds the timing: shapes, means, files. The timing itself needs a GPU."""

import json

import pytest

from marlin_tools.errors import DeviceError
from marlin_tools.ops import self_test
from marlin_tools.stages import bench
from marlin_tools.stages.bench import BenchSettings, Measurement


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


@pytest.mark.parametrize("run", [bench.bench_kernels, bench.tune])
def test_says_that_there_is_no_gpu(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="torch finds none"):
        run(BenchSettings())
    with pytest.raises(DeviceError, match="no CUDA device"):
        self_test()


@pytest.mark.gpu
def test_small_run(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", {"o": (512, 512)})
    settings = BenchSettings(models=("small",), rows=(1, 64), peers=True)
    results = bench.bench_kernels(settings)
    bench.write_json(results, tmp_path / "out.json")

    assert {r.kernel for r in results} == {"torch", "ours", bench.DEQUANTIZED, bench.TINYGEMM}
    assert all(r.microseconds > 0 for r in results)
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == len(results)
    with pytest.raises(DeviceError, match="`llama9`"):
        bench.bench_kernels(BenchSettings(models=("llama9",)))
