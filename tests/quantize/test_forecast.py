"""The forecast, against what was measured on one H100 with 128 x 2048 tokens and the preset `default`; no GPU is asked."""

import pytest
import torch

from marlin_tools.algorithms import PRESETS, PRUNERS
from marlin_tools.checkpoint.cards import CARDS, Card
from marlin_tools.compress import forecast
from marlin_tools.compress.floor import Work, least_seconds
from marlin_tools.compress.forecast import Forecast, forecast_prune, forecast_quantize
from marlin_tools.errors import DeviceError
from marlin_tools.stream.inventory import take_linears

H100 = torch.device("cuda", 0)
RATE = 7.4e14
"""Operations per second of a large product while these were measured."""


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "matmul_rate", lambda *_: RATE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(80.3e9), int(85e9)))


def expected(name: str, layers: int, preset: str = "default", tokens: int = 128 * 2048) -> Forecast:
    card = Card(CARDS[name] | {"num_hidden_layers": layers}, name)
    inventory = take_linears(card, ())
    return forecast_quantize(card, inventory, PRESETS[preset], (tokens, 2048), H100)


@pytest.mark.parametrize(
    ("name", "layers", "seconds", "host_gb"),
    [
        ("meta-llama/Llama-2-7b-hf", 32, 26.9 + 4.1, 3.3),  # the blocks, and hashing the model
        ("meta-llama/Llama-2-70b-hf", 3, 14.0 + 1.9, 4.7),
    ],
)
def test_as_measured(name: str, layers: int, seconds: float, host_gb: float) -> None:
    found = expected(name, layers)
    assert found.seconds == pytest.approx(seconds, rel=0.1)
    assert found.host_gb == pytest.approx(host_gb, rel=0.1)


def test_gpu_memory() -> None:
    assert expected("meta-llama/Llama-2-7b-hf", 32).gpu_gb == pytest.approx(15.0, rel=0.1)
    assert (expected("meta-llama/Llama-2-70b-hf", 80).gpu_gb or 0) < 40
    few = expected("meta-llama/Llama-2-7b-hf", 32, tokens=16 * 2048).gpu_gb or 0
    assert few < 8
    assert (expected("meta-llama/Llama-2-7b-hf", 32, "rtn").gpu_gb or 0) < few


@pytest.mark.parametrize(("pruner", "pruned", "tuned"), [("default", 17.4, None), ("max", 21.3, 23.7)])
def test_gpu_memory_of_2_4(pruner: str, pruned: float, tuned: float | None) -> None:
    """Measured on an H200, two or three blocks."""
    card = Card(CARDS["meta-llama/Llama-2-7b-hf"], "7b")
    asked = (card, take_linears(card, ()), PRESETS["default"], (128 * 2048, 2048), H100)
    assert forecast_quantize(*asked, pruner=PRUNERS[pruner]).gpu_gb == pytest.approx(pruned, rel=0.03)
    if tuned is not None:
        assert forecast_quantize(*asked, pruner=PRUNERS[pruner], also="tuning").gpu_gb == pytest.approx(tuned, rel=0.03)


def test_what_costs_more_is_said_to() -> None:
    fast, default = (expected("meta-llama/Llama-2-7b-hf", 32, preset).seconds for preset in ("fast", "default"))
    assert fast < default
    assert expected("meta-llama/Llama-2-7b-hf", 32, tokens=2 * 128 * 2048).seconds > 1.4 * default


def test_what_nobody_has_measured_is_not_foretold() -> None:
    card = Card(CARDS["meta-llama/Llama-2-7b-hf"], "7b")
    inventory = take_linears(card, ())
    sparse = forecast_quantize(card, inventory, PRESETS["default"], (128 * 2048, 2048), H100, pruner=PRUNERS["default"])
    pruned = forecast_prune(card, inventory, PRUNERS["default"], (128 * 2048, 2048), H100)
    mixture = expected("Qwen/Qwen3-30B-A3B", 2)
    for found in (expected("meta-llama/Llama-2-7b-hf", 32, "rtn"), sparse, pruned, mixture):
        assert found.seconds is None
        assert "time" not in dict(found.lines())


def test_floor_of_one_linear_by_hand() -> None:
    """One linear alone: 2 N K operations a token and path, K² for its Gram matrix, of which half is needed."""
    card = Card(CARDS["meta-llama/Llama-2-7b-hf"] | {"num_hidden_layers": 1}, "7b")
    target = next(t for t in take_linears(card, ()).targets if t.name.endswith("o_proj"))
    work = Work([[target]], target.k, 1000, 100)
    n, k = target.n, target.k
    parts = least_seconds(work, PRESETS["default"], 1e12, H100)
    assert parts["forward"] == pytest.approx(2 * (2 * n * k * 1000 + 2 * 1000 * 100 * k) / 1e12)
    assert parts["hessian"] == pytest.approx(k * k * 1000 / 1e12)
    assert parts["drift"] == pytest.approx((2 * n * k * 1000 + 2 * 2 * n * k * k) / 1e12)
    assert parts["correct"] == pytest.approx(3 * 2 * n * k * k / 1e12)
    assert parts["polish"] == pytest.approx(3 * 2 * n * k * k / 1e12)
    assert least_seconds(work, PRESETS["default"], 1e12, torch.device("cpu"))["polish"] == pytest.approx(2 * n * k * k / 1e12)
    three = least_seconds(Work([[target] * 3], k, 1000, 100), PRESETS["default"], 1e12, H100)  # which read one input
    assert three["drift"] == pytest.approx(2 * k * k * 1000 / 1e12)
    assert three["correct"] == pytest.approx((3 * 2 * k * k * k + 2 * 2 * 3 * n * k * k) / 1e12)
    assert "drift" not in least_seconds(work, PRESETS["fast"], 1e12, H100)
    assert least_seconds(work, PRESETS["rtn"], 1e12, H100) == {}


def test_a_block_in_which_nothing_is_solved_takes_its_forward() -> None:
    """Which block that is does not matter; the others take what they always do."""
    card = Card(CARDS["meta-llama/Llama-2-7b-hf"] | {"num_hidden_layers": 4}, "7b")

    def without(*ignored: str) -> Forecast:
        return forecast_quantize(card, take_linears(card, ignored), PRESETS["default"], (128 * 2048, 2048), H100)

    every, first, last = without(), without(r"layers\.0\."), without(r"layers\.3\.")
    assert (first.seconds, first.host_gb, first.gpu_gb) == (last.seconds, last.host_gb, last.gpu_gb)
    assert (first.host_gb, first.gpu_gb) == (every.host_gb, every.gpu_gb)
    assert 0.75 * every.seconds < first.seconds < every.seconds


def test_the_largest_block_decides_about_memory() -> None:
    """Of a mixture of experts, the first blocks may be dense."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 2048, "n_routed_experts": 16}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 512, "kv_lora_rank": 512}
    whole = {"model_type": "deepseek_v3", "dtype": "bfloat16", "num_hidden_layers": 2, "vocab_size": 1024, "n_group": 1}
    found = {}
    for dense in (0, 1, 2):
        card = Card(whole | sizes | heads | {"topk_group": 1, "first_k_dense_replace": dense}, "mixture")
        found[dense] = forecast_quantize(card, take_linears(card, ()), PRESETS["default"], (2**16, 2048), H100)
    assert (found[0].host_gb, found[0].gpu_gb) == (found[1].host_gb, found[1].gpu_gb)
    assert found[2].host_gb < found[1].host_gb
    assert (found[2].gpu_gb or 0) < (found[1].gpu_gb or 0)


def test_processes_share_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the factorisation is shared; each needs the memory of its own tokens, and of sums that wait for their pair."""
    alone = expected("meta-llama/Llama-2-13b-hf", 40)
    found = {}
    for processes in (1, 2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        found[processes] = expected("meta-llama/Llama-2-13b-hf", 40)
        assert found[processes].processes == processes
    assert alone.seconds < found[1].seconds < 1.3 * alone.seconds
    assert 1.6 < found[1].seconds / found[2].seconds < 2
    assert 2.5 < found[1].seconds / found[4].seconds < 4
    assert (found[4].gpu_gb or 0) < (found[2].gpu_gb or 0) < (found[1].gpu_gb or 0)
    assert ("devices", "4 processes, each with a GPU of its own") in found[4].lines()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DeviceError, match="3 processes cannot share the work evenly"):
        expected("meta-llama/Llama-2-13b-hf", 40)
