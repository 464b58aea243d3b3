"""`bench quantize`: options reach the stage, numbers are printed and written; and the stage itself, on a model of no size."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from marlin_tools.bench import quantizing as stage
from marlin_tools.bench.quantizing import BenchQuantizeSettings, Part, QuantizeBench
from marlin_tools.checkpoint import cards
from marlin_tools.report.benchmarks import quantize_table

MEASURED = QuantizeBench(
    settings=BenchQuantizeSettings(layers=3),
    device="a GPU",
    layers=3,
    of=32,
    process=12.0,
    blocks=(2.0, 1.0, 1.2),
    parts=(Part("forward", 1.5, 0.75), Part("write", 0.9, None), Part("scales", 0.3, None)),
    real={"seconds": 6.0, "host_gb": 4.0, "gpu_gb": 15.0},
    forecast={"seconds": 7.0, "host_gb": 4.1, "gpu_gb": 15.5},
)


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(stage, "bench_quantize", lambda settings, _emit: (calls.append(settings), MEASURED)[1])
    return calls


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    (
        (("--shape", "llama3-8b"), "shape", "llama3-8b"),
        (("--layers", "3"), "layers", 3),
        (("--preset", "marlin"), "preset", "marlin"),
        (("--sparsity", "2:4"), "sparsity", "2:4"),
        (("--num-samples", "16"), "samples", 16),
        (("--seqlen", "64"), "seqlen", 64),
        (("--device", "cpu"), "device", "cpu"),
    ),
)
def test_options_reach_the_stage(cli, asked, flags, key, value):
    assert cli("bench", "quantize", *flags).code == 0
    assert getattr(asked[0], key) == value


def test_the_table_and_what_is_written(cli, asked, tmp_path):
    answer = cli("bench", "quantize", "-o", str(tmp_path))
    assert "| forward " in answer.out
    assert json.loads((tmp_path / "bench-quantize-llama2-7b.json").read_text())["seconds_per_block"] == 1.1
    assert json.loads(cli("bench", "quantize", "--json").out)["parts"][0] == {"name": "forward", "seconds": 1.5, "least": 0.75}


def test_what_is_wrong_is_one_line(cli):
    answer = cli("bench", "quantize", "--layers", "-1")
    assert answer.code == 2
    assert "--layers" in answer.err
    assert cli("bench", "quantize", "--shape", "gpt-9").code == 2
    assert "`llama2-7b` has 32 blocks, fewer than 33" in cli("bench", "quantize", "--layers", "33").err
    assert "unknown preset `best`" in cli("bench", "quantize", "--preset", "best").err


def test_table():
    lines = quantize_table(MEASURED).splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line.startswith("| ")
    }
    assert cells["forward"] == ["500", "250", "2.0"]
    assert cells["scales"] == ["100", "", ""]
    assert cells["a block in all"] == ["1100", "250", "4.4"]
    assert cells["write, beside it"] == ["300", "", ""]
    assert any("whole model" in line and "44 s at 1.10 s a block" in line for line in lines)  # 12 + 29 · 1.1
    assert any("GPU memory" in line and "15.0 GB, forecast 15.5 GB" in line for line in lines)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A shape of no size, on one thread."""
    card = cards.CARDS["meta-llama/Llama-2-7b-hf"] | {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 512}
    card |= {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    monkeypatch.setitem(cards.CARDS, "nobody/tiny", card)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield "nobody/tiny"
    torch.set_num_threads(threads)


def test_a_model_of_no_size(nobody: str, tmp_path: Path) -> None:
    settings = BenchQuantizeSettings(shape=nobody, layers=2, samples=2, seqlen=64, device="cpu")
    bench = stage.bench_quantize(settings, folder=tmp_path)

    assert (bench.layers, bench.of, bench.tokens, len(bench.blocks)) == (2, 5, 128, 2)
    parts = {part.name: part for part in bench.parts}
    floors = {"forward", "hessian", "drift", "factor", "correct", "sweep", "polish", "judge"}
    assert {name for name, part in parts.items() if part.least} == floors
    assert {"read", "write", "scales", "embed", "pack"} == set(parts) - floors
    assert sum(part.seconds for name, part in parts.items() if name not in stage.BESIDE) <= bench.process
    assert bench.whole == pytest.approx(bench.process + 3 * bench.blocks[1])
    assert list(tmp_path.iterdir()) == []


def test_presets_whose_time_is_not_foretold(nobody: str, tmp_path: Path) -> None:
    parts = {}
    for preset in ("rtn", "max"):
        settings = BenchQuantizeSettings(shape=nobody, layers=1, samples=2, seqlen=64, preset=preset, device="cpu")
        bench = stage.bench_quantize(settings, folder=tmp_path)
        assert "seconds" not in bench.forecast
        assert "forecast" in quantize_table(bench)  # of memory
        parts[preset] = {part.name for part in bench.parts}
    assert "train" in parts["max"]
    assert "sweep" not in parts["rtn"]


def test_pruning_on_the_way_is_timed_too(nobody: str, tmp_path: Path) -> None:
    settings = BenchQuantizeSettings(shape=nobody, layers=1, samples=2, seqlen=64, sparsity="2:4", device="cpu")
    bench = stage.bench_quantize(settings, folder=tmp_path)
    assert {"choose", "reselect", "fit"} <= {part.name for part in bench.parts}
    assert "preset default, 2:4, 2 x 64 tokens" in quantize_table(bench)
