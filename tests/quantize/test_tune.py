"""`--tune`: tuning begins at what `default` gives, lowers the error on what it has not seen, and never ends above it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from marlin_tools.algorithms import GPTQ, Gram
from marlin_tools.algorithms.masks import magnitude
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress import reconstruct, tune
from marlin_tools.compress.quantize import QuantizeSettings, prepare_quantize, quantize
from marlin_tools.compress.tune import STEP_TOKENS, TunedLinear, Tuning
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import DataError, OutputError, RecipeError
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import QuantizedLinear
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.layer_stream import Block

Run = Callable[..., Checkpoint]
FEW = {"iters": 12, "lr": 0.002, "minmax_lr": 0.002}


def records(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((checkpoint.path / "manifest.json").read_text())["linears"]
    return found


def shards(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.path.glob("*.safetensors")}


def solved(weight: torch.Tensor) -> QuantizedLinear:
    gram = Gram(weight.shape[1], weight.device)
    gram.add(torch.randn(300, weight.shape[1], generator=torch.Generator().manual_seed(1)))
    return GPTQ(drift=0).solve("linear", weight, gram.hessian(), 32, torch.bfloat16).linear


@pytest.mark.parametrize("sparse", [False, True])
def test_step_0_is_what_the_solver_found(sparse: bool) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    found = solved(weight)
    if sparse:
        found = QuantizedLinear(torch.where(magnitude(weight), found.codes, 8), found.scales, 32)
    tuned = TunedLinear(found, weight, None, torch.bfloat16)

    assert torch.equal(found.codes, tuned.solved().codes)
    assert torch.equal(found.scales, tuned.solved().scales)
    x = torch.randn(5, 64)
    torch.testing.assert_close(x @ found.dequantize().T, tuned(x), rtol=0, atol=1e-5)


def test_codes_move_by_one_at_most_and_zeros_of_a_mask_stay() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    found = solved(weight)
    sparse = QuantizedLinear(torch.where(magnitude(weight), found.codes, 8), found.scales, 32)
    for linear in (found, sparse):
        tuned = TunedLinear(linear, weight, None, torch.float16)
        tuned.offset.data.copy_(torch.randn(48, 64) * 9)
        moved = tuned.solved().codes.int() - linear.codes.int()
        assert 1 == int(moved.abs().max())
        assert not linear.is_2_4() or not bool(moved[linear.codes == 8].any())


def test_steady_it_leans_only_where_the_original_has_the_same_code() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    linear = solved(weight)
    lean, steady = (TunedLinear(linear, weight, None, torch.float16, steady=steady) for steady in (False, True))
    same = (weight / linear.scales.float().repeat_interleave(32, dim=1) + 8 - linear.codes.float()).abs() <= 0.5
    assert 0.2 < float(same.float().mean()) < 0.98
    assert torch.equal(steady.place[same], lean.place[same])
    assert torch.equal(steady.place[~same], linear.codes[~same].half())
    assert bool((lean.place[~same] != linear.codes[~same].half()).all())


def test_stored_scales_are_what_the_format_holds() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    tuned = TunedLinear(solved(weight), weight, None, torch.bfloat16)
    tuned.factor.data.add_(torch.rand(48, 2) * 0.01)
    scales = tuned.solved().scales
    assert torch.equal(scales, scales.to(torch.bfloat16).to(torch.float16))
    plain = torch.nn.functional.linear(torch.eye(64), tuned.solved().dequantize())
    assert torch.equal(plain, tuned(torch.eye(64)))


def test_the_gradient_passes_rounding_as_if_it_were_not_there() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    tuned = TunedLinear(solved(weight), weight, None, torch.float16)
    x, g = torch.randn(6, 32), torch.randn(6, 4)
    tuned(x).backward(g)
    toward, linear = g.T @ x, tuned.solved()
    scale = linear.scales.float()
    inside = (linear.codes > 0) & (linear.codes < 15)
    torch.testing.assert_close((toward * scale)[inside], tuned.offset.grad[inside])  # type: ignore[index]
    expected = (toward * (linear.codes.float() - 8)).sum(1, keepdim=True) * scale
    torch.testing.assert_close(expected, tuned.factor.grad)


def test_blocks_end_nearer_to_the_original(run: Run, tiny_llama: Path) -> None:
    coarse = GPTQ(damp=10, scales="absmax", polish=0, drift=0)  # noise has nothing left to gain after `default`
    out = run(tiny_llama, algorithm=coarse, tuning=FEW)
    manifest = json.loads((out.path / "manifest.json").read_text())
    for record in records(out):
        before, after = record["block_error"]
        assert after < before
        assert 0 < record["best_step"] <= 12
        assert record["output_error"] > 0
    assert len({manifest["calibration"]["fingerprint"], manifest["tuning"]["tuned_on"], manifest["tuning"]["held_out"]}) == 3
    assert manifest["tuning"]["iters"] == 12
    with pytest.raises(OutputError, match="not empty"):  # other tuning is another result
        run(tiny_llama, algorithm=coarse, tuning={"iters": 2})


def test_the_next_block_reads_what_the_tuned_one_puts_out(
    run: Run, tiny_llama: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.Tensor] = []
    start = reconstruct.BlockTraining.__init__

    def seen(self: reconstruct.BlockTraining, block: Block, entering: Activations, *rest: Any) -> None:
        read[:] = [torch.cat(list(entering)).float()]
        start(self, block, entering, *rest)

    monkeypatch.setattr(reconstruct.BlockTraining, "__init__", seen)
    stored = StoredLinears(run(tiny_llama, algorithm=GPTQ(damp=10, scales="absmax", polish=0, drift=0), tuning=FEW))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name in stored.names:
        if ".layers.0." in name:
            model.get_submodule(name).weight.data.copy_(stored.read(name).dequantize())
    with torch.no_grad():
        states = model(torch.stack(tokens.sequences), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], read[0], rtol=0, atol=2e-3)


def test_where_nothing_gets_better_the_result_is_that_of_default(
    run: Run, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marlin_tools.compress.codes.CHUNK_TOKENS", 64)  # chunks that are cut in the same places
    monkeypatch.setitem(STEP_TOKENS, "cpu", 64)
    plain = run(tiny_llama, "plain", preset="default")
    worse = run(tiny_llama, "worse", preset="default", tuning={"iters": 2, "lr": 1.0, "minmax_lr": 1.0})
    assert {0} == {record["best_step"] for record in records(worse)}
    before, after = (StoredLinears(each) for each in (plain, worse))
    for name in before.names:
        assert torch.equal(before.read(name).codes, after.read(name).codes)
        assert torch.equal(before.read(name).scales, after.read(name).scales)


@pytest.mark.parametrize("fault", ["nan", "scale"])
def test_a_fault_falls_back_and_is_told(run: Run, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    gradients = reconstruct.BlockTraining.gradients
    steps = [0]

    def faulty(self: reconstruct.BlockTraining, i: int, parameters: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        steps[0] += 1
        if steps[0] == 5:
            with torch.no_grad():
                parameters[-1].fill_(float("nan") if fault == "nan" else 1e9)
        return gradients(self, i, parameters)

    monkeypatch.setattr(reconstruct.BlockTraining, "gradients", faulty)
    out = run(tiny_llama, preset="default", tuning=FEW)
    first = [record for record in records(out) if ".layers.0." in record["name"]]
    assert all("tuning stopped" in record["tuning_stopped"] for record in first)
    assert all(record["block_error"][1] <= record["block_error"][0] for record in first)
    warnings = json.loads((out.path / "manifest.json").read_text())["warnings"]
    assert 1 == len([each for each in warnings if "`model.layers.0`: tuning stopped" in each])
    assert not any("`model.layers.1`" in each and "stopped" in each for each in warnings)


def test_a_block_that_is_left_alone_is_not_tuned(run: Run, tiny_llama: Path) -> None:
    out = run(tiny_llama, preset="marlin", ignore=(r"layers\.0\.",), tuning=FEW)
    assert {record["name"].split(".")[2] for record in records(out)} == {"1"}
    assert all("block_error" in record for record in records(out))


def test_a_2_4_model_stays_2_4(run: Run, tiny_llama: Path) -> None:
    out = run(tiny_llama, preset="marlin", sparsity="2:4", tuning=FEW)
    stored = StoredLinears(out)
    assert all(stored.read(name).is_2_4() for name in stored.names)
    assert all(record["block_error"][1] < record["block_error"][0] for record in records(out))
    original = Checkpoint.open(tiny_llama)
    for record in records(out):  # of what is stored, not of what was tuned
        weight, value = original.read(f"{record['name']}.weight").float(), stored.read(record["name"]).dequantize()
        lost = float((weight - value).square().sum() / weight.square().sum())
        assert record["weight_error"] == pytest.approx(lost, rel=1e-4)


def test_a_killed_run_ends_in_the_same_bytes(run: Run, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    whole = run(tiny_llama, "whole", preset="default", tuning=FEW)
    real = tune._train

    def dying(training: reconstruct.BlockTraining, *rest: Any) -> None:
        if training.prefix.endswith(".1."):
            raise Killed
        real(training, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "_train", dying)
        with pytest.raises(Killed):
            run(tiny_llama, "killed", preset="default", tuning=FEW)
    solved_blocks: list[int] = []
    batches = Block.batches

    def seen(self: Block, **how: Any) -> Any:
        solved_blocks.append(self.index)
        return batches(self, **how)

    monkeypatch.setattr(Block, "batches", seen)
    again = run(tiny_llama, "killed", preset="default", tuning=FEW)
    assert [1] == solved_blocks
    assert shards(whole) == shards(again)


def test_max_is_tuned_and_guided(run: Run, tiny_llama: Path, tokens: TokenSet) -> None:
    steps = max(1, tokens.tokens // 640)
    out = run(tiny_llama, "max", preset="max")
    same = run(tiny_llama, "same", algorithm=GPTQ(drift=0.75, guided=True), tuning={"iters": steps})
    assert shards(out) == shards(same)
    assert all("block_error" in record for record in records(out))
    assert json.loads((out.path / "manifest.json").read_text())["tuning"]["iters"] == steps
    assert QuantizeSettings(preset="max", tuning=Tuning(iters=0)).tuned(10**9) is None
    assert QuantizeSettings(preset="max", tuning=Tuning(iters=3)).tuned(10**9) == Tuning(iters=3, lr=0.005)
    assert QuantizeSettings(preset="max").tuned(64 * 1024) == Tuning(iters=102, lr=0.005)
    assert QuantizeSettings(preset="max").tuned(128 * 2048) == Tuning(iters=400, lr=0.005)
    assert QuantizeSettings(tuning=Tuning(iters=3), sparsity="2:4").tuned(10**9) == Tuning(iters=3, lr=0.02)
    assert QuantizeSettings(tuning=Tuning(iters=3, lr=0.1), sparsity="2:4").tuned(10**9) == Tuning(iters=3, lr=0.1)
    assert QuantizeSettings(preset="max", sparsity="2:4").tuned(64 * 1024) == Tuning(iters=102, lr=0.02)
    assert QuantizeSettings(preset="default").tuned(128 * 2048) is None


def test_with_2_4_max_is_not_default_and_tuned(run: Run, tiny_llama: Path) -> None:
    """Other masks: neither what is finished nor what is not is taken for the other's."""
    settings = {"sparsity": "2:4", "tuning": {"iters": 1}}
    plain = run(tiny_llama, "plain", preset="default", **settings)
    with pytest.raises(OutputError, match="not empty"):
        run(tiny_llama, "plain", preset="max", **settings)
    assert shards(run(tiny_llama, "max", preset="max", **settings)) != shards(plain)


def test_one_sequence_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = TokenSet((torch.arange(64),), "one", packed=True, documents=1)
    with pytest.raises(DataError, match="tuned on and held out") as error:
        quantize(tiny_llama, tokens, QuantizeSettings(tuning=FEW, device="cpu"), tmp_path / "out")
    assert "--num-samples" in str(error.value.hint)


def test_several_processes_are_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RecipeError, match="one process"):
        prepare_quantize(tiny_llama, QuantizeSettings(tuning=FEW, device="cpu"), 640, 64)


def test_rounding_to_nearest_has_nothing_to_tune_on(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match="looks at no data"):
        prepare_quantize(tiny_llama, QuantizeSettings(preset="rtn", tuning=Tuning(), device="cpu"), 640, 64)


def test_no_time_is_foretold_and_memory_counts_the_training(tiny_llama: Path) -> None:
    plain, tuned = (
        prepare_quantize(tiny_llama, QuantizeSettings(tuning=tuning, device="cpu"), 640, 64).forecast
        for tuning in (None, Tuning())
    )
    assert plain.seconds is not None
    assert tuned.seconds is None
    assert tuned.host_gb > plain.host_gb
