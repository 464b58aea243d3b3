"""`guided`: rows make up for each other by what their outputs are worth, which a run finds out before its first block."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlin_tools.algorithms import GPTQ
from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress import guide
from marlin_tools.compress import quantize as stage
from marlin_tools.compress.guide import Guide
from marlin_tools.compress.quantize import QuantizeSettings, prepare_quantize, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import RecipeError
from marlin_tools.events import Event, silent
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.stream.inventory import take_linears
from marlin_tools.stream.layer_stream import Block, LayerStream

Run = Callable[..., Checkpoint]
Digest = Callable[[Path], dict[str, str]]
ONE_PASS: dict[str, Any] = {"preset": "max", "tuning": {"iters": 0}, "device": "cpu"}
ALONE = GPTQ(drift=0.75)
CPU = torch.device("cpu")


class Killed(BaseException):
    """A process that is simply gone."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    """Two small blocks."""
    return tiny_model("llama", hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2)


def manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint.path / "manifest.json").read_text())
    return content


def codes(checkpoint: Checkpoint) -> dict[str, Tensor]:
    stored = StoredLinears(checkpoint)
    return {name: stored.read(name).codes for name in stored.names}


def test_max_without_tuning_is_default_and_guided(run: Run, model: Path, tokens: TokenSet) -> None:
    made, default = run(model, "max", **ONE_PASS), run(model, "default", algorithm=ALONE)
    said = manifest(made)

    assert said["guide"] == {"tokens": tokens.tokens, "seed": 0}
    assert "tuning" not in said
    assert "guide" not in manifest(default)
    assert said["solver"] == manifest(default)["solver"] | {"guided": True}
    assert all(not torch.equal(ours, codes(default)[name]) for name, ours in codes(made).items())
    assert not list(made.path.rglob("guide*"))


def test_masks_that_are_there_are_kept(run: Run, model: Path, tokens: TokenSet) -> None:
    sparse = run(model, "sparse", **ONE_PASS, sparsity="2:4")

    stored = StoredLinears(sparse)
    assert all(stored.read(name).is_2_4() for name in stored.names)


def test_of_long_text_the_first_windows_are_read(
    model: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes behind them; and a window is not cut."""
    monkeypatch.setattr(guide, "LOOKED_AT", 100)
    slopes: list[dict[str, Tensor]] = []
    for text in (tokens, replace(tokens, sequences=tokens.sequences[:2])):
        inventory = take_linears(Checkpoint.open(model), ())
        one = Guide(inventory, silent)
        with OutputDirectory(tmp_path / "out") as output:
            one.make(text, lambda text: LayerStream(Checkpoint.open(model), text, frozenset(), CPU), output)
            slopes.append(load_file(output.state / "guide-00001.safetensors"))
            output.clear()
        assert one.facts["tokens"] == 128

    assert torch.equal(slopes[0]["slopes"], slopes[1]["slopes"])
    assert len(slopes[0]["slopes"]) == 128
    assert bool(slopes[0]["slopes"].any(dim=1).all())


def test_what_is_found_does_not_depend_on_how_text_is_cut(
    model: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that runs out of memory goes on with fewer tokens at a time; chunks may end behind the text that was read."""
    monkeypatch.setattr(guide, "LOOKED_AT", 150)
    checkpoint = Checkpoint.open(model)
    inventory = take_linears(checkpoint, ())
    one = Guide(inventory, silent)
    found: list[dict[str, Tensor]] = []
    with OutputDirectory(tmp_path / "out") as output:
        one.make(tokens, lambda text: LayerStream(checkpoint, text, frozenset(), CPU, chunk_tokens=64), output)
        for chunk in (64, 128, 256, 8192):
            stream = LayerStream(checkpoint, tokens, inventory.names, CPU, with_original=True, chunk_tokens=chunk)
            block = next(iter(stream))
            one.look(block)
            found.append({name: gram.hessian().matrix for name, gram in one._grams.items()})
        output.clear()

    assert {name.rpartition(".")[2] for name in found[0]} == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    for other in found[1:]:
        for name, matrix in found[0].items():
            assert float(matrix.abs().max()) > 0
            torch.testing.assert_close(other[name], matrix, rtol=1e-4, atol=1e-5 * float(matrix.abs().max()))


def test_killed_at_any_write_then_resumed(model: Path, run: Run, digest: Digest, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ONE_PASS | {"tuning": {"iters": 1}}
    write, names = OutputDirectory._write, list[str]()

    def noting(self: OutputDirectory, final: Path, parts: list[bytes]) -> None:
        names.append(final.name)
        write(self, final, parts)

    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "_write", noting)
        whole = digest(run(model, "whole", **settings).path)
    assert names.count("guide-00000.safetensors") == names.count("guide-00001.safetensors") == 2
    read = Guide._read
    guided = names.index("guide.json")
    for fatal in (guided - 1, guided, guided + 3):
        left, readings = fatal, list[int]()

        def dying(self: OutputDirectory, final: Path, parts: list[bytes]) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            write(self, final, parts)

        def reading(self: Guide, *rest: Any, readings: list[int] = readings) -> None:
            readings.append(1)
            read(self, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(OutputDirectory, "_write", dying)
            with pytest.raises(Killed):
                run(model, f"out{fatal}", **settings)
        with monkeypatch.context() as patch:
            patch.setattr(Guide, "_read", reading)
            assert digest(run(model, f"out{fatal}", **settings).path) == whole, f"killed at {names[fatal]}"
        assert len(readings) == (fatal <= guided)


def test_gradients_that_are_not_finite_guide_nobody(
    model: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, said = Guide._read, list[str]()

    def spoilt(self: Guide, stream: LayerStream, output: OutputDirectory) -> None:
        read(self, stream, output)
        file = output.state / "guide-00000.safetensors"
        save_file({"slopes": load_file(file)["slopes"].fill_(torch.inf)}, file)

    monkeypatch.setattr(Guide, "_read", spoilt)

    def note(event: Event) -> None:
        said.append(event.text)

    made = quantize(model, tokens, QuantizeSettings(**ONE_PASS), tmp_path / "out", emit=note)
    alone = quantize(model, tokens, QuantizeSettings(algorithm=ALONE, device="cpu"), tmp_path / "alone")
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    first = {f"model.layers.0.{name}" for name in names}

    assert {name for name in first if any(f"`{name}`: gradients are not finite" in each for each in said)} == first
    assert all(torch.equal(codes(made)[name], codes(alone)[name]) for name in first)


def test_linears_of_very_many_outputs_go_without(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide, "WIDEST", 127)  # all of this model have 128 or more
    made, alone = codes(run(model, "max", **ONE_PASS)), codes(run(model, "default", algorithm=ALONE))

    assert all(torch.equal(ours, alone[name]) for name, ours in made.items())


def test_one_process_solves_rows_that_know_of_each_other(
    model: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two:
        cuts = True

    monkeypatch.setattr(stage, "expected", Two)
    settings = QuantizeSettings(algorithm=GPTQ(guided=True), device="cpu")
    with pytest.raises(RecipeError, match="one process") as caught:
        prepare_quantize(model, settings, tokens.tokens, tokens.longest)
    assert "torchrun" in str(caught.value.hint)


def test_the_forecast_counts_what_it_takes(model: Path, tokens: TokenSet) -> None:
    forecasts = [
        prepare_quantize(model, QuantizeSettings(algorithm=GPTQ(guided=guided), device="cpu"), 1 << 20, 2048).forecast
        for guided in (False, True)
    ]
    hidden, blocks = 128, 2

    assert forecasts[0].seconds is not None
    assert forecasts[1].seconds is None
    read = blocks * (guide.LOOKED_AT + 2048) * hidden * 4 / 1e9
    assert forecasts[1].disk_gb - forecasts[0].disk_gb == pytest.approx(read)
    assert forecasts[1].host_gb > forecasts[0].host_gb


def test_a_block_that_is_done_is_not_looked_at(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    look, batches = Guide.look, Block.batches

    def noting(self: Guide, block: Block) -> None:
        looked.append(block.index)
        look(self, block)

    def dying(self: Block, *, staged: bool) -> Any:
        if self.index == 1:
            raise Killed
        return batches(self, staged=staged)

    monkeypatch.setattr(Guide, "look", noting)
    with monkeypatch.context() as patch:
        patch.setattr(Block, "batches", dying)
        with pytest.raises(Killed):
            run(model, **ONE_PASS)
    looked.clear()
    run(model, **ONE_PASS)

    assert looked == [1]
