"""`bench finetune`: options reach the stage, numbers are printed and written; and the stage itself, on a model of no size."""

import json

import pytest
import torch

from marlin_tools.bench import finetuning as stage
from marlin_tools.bench.finetuning import BenchFinetuneSettings, FinetuneBench, Measured
from marlin_tools.checkpoint import cards
from marlin_tools.report.benchmarks import finetune_table

MEASURED = FinetuneBench(
    settings=BenchFinetuneSettings(layers=4, batch=8, seqlen=1000),
    device="a GPU",
    layers=4,
    of=32,
    full=Measured(0.5, 2e14, 12.0),
    bare=Measured(0.1, 0.4e14, 4.0),
    rate=8e14,
)


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(stage, "bench_finetune", lambda settings, _emit: (calls.append(settings), MEASURED)[1])
    return calls


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    (
        (("--shape", "llama3-8b"), "shape", "llama3-8b"),
        (("--layers", "3"), "layers", 3),
        (("--student", "2:4"), "student", "2:4"),
        (("--seqlen", "64"), "seqlen", 64),
        (("--batch", "16"), "batch", 16),
        (("--micro", "2"), "micro", 2),
        (("--steps", "9"), "steps", 9),
        (("--recompute",), "recompute", True),
        (("--device", "cpu"), "device", "cpu"),
    ),
)
def test_options_reach_the_stage(cli, asked, flags, key, value):
    assert cli("bench", "finetune", *flags).code == 0
    assert getattr(asked[0], key) == value


def test_what_is_written(cli, asked, tmp_path):
    cli("bench", "finetune", "-o", str(tmp_path))
    written = json.loads((tmp_path / "bench-finetune-llama2-7b.json").read_text())
    assert written == json.loads(cli("bench", "finetune", "--json").out)
    assert written["measured"]["tokens_per_s"] == 16_000
    assert written["whole"]["seconds"] == pytest.approx(0.1 + 32 * 0.1)


def test_what_is_wrong_is_one_line(cli):
    assert "--layers" in cli("bench", "finetune", "--layers", "-1").err
    assert "no shapes are known for `gpt-9`" in cli("bench", "finetune", "--shape", "gpt-9").err
    assert "`llama2-7b` has 32 blocks, fewer than 33" in cli("bench", "finetune", "--layers", "33").err
    assert "mixture of experts" in cli("bench", "finetune", "--shape", "Qwen/Qwen3-30B-A3B").err
    assert "batch 8 is not a multiple of micro 3" in cli("bench", "finetune", "--micro", "3", "--device", "cpu").err


def test_table():
    rows = [line.split("|") for line in finetune_table(MEASURED).splitlines() if line.startswith("| ")]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows}
    assert cells["4 of 32 blocks"] == ["500", "16000", "50%", "12.0 GB"]
    assert cells["32 blocks, reckoned"] == ["3300", "2424", "50%", "68.0 GB"]


@pytest.mark.parametrize("student", ("int4", "int4-codes", "2:4"))
@pytest.mark.parametrize("recompute", (False, True))
def test_a_model_of_no_size(monkeypatch: pytest.MonkeyPatch, student: str, recompute: bool) -> None:
    card = cards.CARDS["meta-llama/Llama-2-7b-hf"] | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}
    card |= {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setitem(cards.CARDS, "nobody/tiny", card)
    sizes = {"layers": 2, "seqlen": 16, "batch": 4, "micro": 2, "steps": 2}
    told = []
    settings = BenchFinetuneSettings(shape="nobody/tiny", student=student, recompute=recompute, device="cpu", **sizes)
    bench = stage.bench_finetune(settings, told.append)

    assert (bench.layers, bench.of, bench.whole.gpu_gb) == (2, 5, None)
    weights, attention, head = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128, 16 * 4 * 16, 64 * 96
    assert bench.bare.operations == 4 * 16 * 6 * head
    assert bench.full.operations == 4 * 16 * (6 * head + 2 * 8 * (weights + attention))
    assert bench.whole.operations == 4 * 16 * (6 * head + 5 * 8 * (weights + attention))
    assert bench.full.seconds > bench.bare.seconds > 0
    assert [event.done for event in told if event.text == "steps with blocks"] == [1, 2, 3, 4]
    assert torch.is_grad_enabled()
