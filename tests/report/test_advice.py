"""What is suggested for a sparse model can be done with it."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from marlin_tools.cli import main
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.report.advice import next_steps
from marlin_tools.report.result import gather

Make = Callable[..., Path]


def advice(model: Path, out: Path, **settings: object) -> dict[str, str]:
    made = prune(model, None, PruneSettings(preset="magnitude", device="cpu", **settings), out)
    return dict(next_steps(gather(made.path, None), out))


def test_a_mixture_is_not_sent_to_finetune(tiny_model: Make, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    assert list(advice(tiny_model("qwen3_moe", **experts), tmp_path / "a")) == ["Quantise it, keeping the zeros"]
    assert "Let it learn from the original" in advice(tiny_model("llama"), tmp_path / "b")


def test_what_was_left_dense_stays_so(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = advice(tiny_model("llama"), tmp_path / "out", ignore=("gate_proj|up_proj", "layers.1.mlp"))
    said = command["Quantise it, keeping the zeros"]
    assert said.endswith("--format marlin-24 --ignore 'gate_proj|up_proj' --ignore layers.1.mlp")
    words = [*shlex.split(said)[1:], "--preset", "rtn", "--device", "cpu", "-o", str(tmp_path / "int4")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code, capsys.readouterr().err


def test_a_quantised_model_may_learn_unless_it_is_a_mixture(tiny_model: Make, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    for name, source in {"dense": tiny_model("llama"), "mixture": tiny_model("qwen3_moe", **experts)}.items():
        quantize(source, None, QuantizeSettings(preset="rtn", group_size=32, device="cpu"), tmp_path / name)
        told = [command for _, command in next_steps(gather(tmp_path / name, None), tmp_path / name)]
        command = f"marlin-tools finetune {tmp_path / name} --teacher {source}"
        assert (command in told) == (name == "dense")
    (tmp_path / "text.txt").write_text("The boat left the harbour at dawn. " * 400)
    words = ["finetune", str(tmp_path / "dense"), "--teacher", str(tiny_model("llama")), "--calib", str(tmp_path / "text.txt")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--dry-run"])
    assert not ended.value.code
