"""The training script end to end, a few steps on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import train_demo
from train_demo import Windows, learning_rate


def test_a_few_steps_give_a_complete_model(tmp_path: Path) -> None:
    options = "--device cpu --steps 5 --batch 1 --documents 300 --items 4 --processes 1".split()
    subprocess.run(
        [sys.executable, train_demo.__file__, "--out", tmp_path, *options], check=True, capture_output=True, timeout=120
    )
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert (300, 5) == (record["documents"], record["steps"])
    assert record["losses"][-1][1] < record["losses"][0][1]
    files = {file.name for file in (tmp_path / "model").iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip


def test_a_window_begins_at_a_document_after_one_or_two_marks() -> None:
    tokens = torch.arange(10, 5010, dtype=torch.int16)
    windows = Windows(tokens, torch.tensor([0, 100, 2000]), seed=0, device="cpu")
    rows = windows.draw(64, 256)
    assert rows.shape == (64, 257)
    leads = (rows == 1).sum(1)
    assert set(leads.tolist()) == {1, 2}
    for row, lead in zip(rows, leads.tolist(), strict=True):
        assert int(row[lead]) - 10 in {0, 100, 2000}
        assert torch.equal(row[lead:].diff(), torch.ones(256 - lead, dtype=torch.long))


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert max(rates) == 1.0
    assert rates.index(1.0) == 19
    assert rates[-1] < 1e-4
    assert rates[:20] == sorted(rates[:20])
    assert rates[19:] == sorted(rates[19:], reverse=True)
