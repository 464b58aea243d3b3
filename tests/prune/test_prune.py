"""Stage `prune`, block training, and `quantize --sparsity`: what is zero, what is refused, and that a killed run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin_tools.algorithms import PRUNERS
from marlin_tools.algorithms.masks import magnitude
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.compress.reconstruct import BlockTraining
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import FormatError, ModelError, OutputError, RecipeError
from marlin_tools.events import Event
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import is_2_4
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.layer_stream import Block


@pytest.fixture(scope="session")
def tokens() -> TokenSet:
    """Six windows of 64 random tokens."""
    generator = torch.Generator().manual_seed(0)
    return TokenSet(tuple(torch.randint(2, 512, (6, 64), generator=generator)), "random", packed=True, documents=1)


@pytest.fixture
def run(tmp_path: Path, tokens: TokenSet) -> Callable[..., Checkpoint]:
    """`run(model, "name", preset="wanda", ...)` prunes into `tmp_path/name` on the CPU."""

    def call(model: Path, name: str = "out", how: dict[str, Any] | None = None, **settings: Any) -> Checkpoint:
        return prune(model, tokens, PruneSettings(**{"device": "cpu", **settings}), tmp_path / name, **(how or {}))

    return call


@pytest.fixture
def to_int4(tmp_path: Path, tokens: TokenSet) -> Callable[..., Checkpoint]:
    """`to_int4(model, "name", sparsity="2:4", ...)` quantises into `tmp_path/name` on the CPU."""

    def call(model: Path, name: str = "int4", **settings: Any) -> Checkpoint:
        return quantize(model, tokens, QuantizeSettings(**{"device": "cpu", **settings}), tmp_path / name)

    return call


def linears(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.names() if "proj.weight" in name]


def records(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((checkpoint.path / "manifest.json").read_text())["linears"]
    return found


def losses(checkpoint: Checkpoint) -> float:
    return sum(record["output_error"] for record in records(checkpoint))


@pytest.mark.parametrize("preset", PRUNERS)
def test_every_linear_is_2_4_and_nothing_else_changes(run: Callable[..., Checkpoint], tiny_llama: Path, preset: str) -> None:
    original, out = Checkpoint.open(tiny_llama), run(tiny_llama, preset=preset)
    assert sorted(out.names()) == sorted(original.names())
    assert out.dtype == original.dtype
    assert out.quantization is None
    for name in original.names():
        if name in linears(original):
            assert is_2_4(out.read(name))
            assert 0.49 < float((out.read(name) != 0).float().mean()) <= 0.5
        else:
            assert torch.equal(out.read(name), original.read(name))


def test_magnitude_is_the_mask_of_the_weights_alone(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    original, out = Checkpoint.open(tiny_llama), run(tiny_llama, preset="magnitude")
    for name in linears(original):
        assert torch.equal(out.read(name), original.read(name) * magnitude(original.read(name)))
    assert json.loads((out.path / "manifest.json").read_text())["calibration"] is None


def test_the_result_is_a_model_that_transformers_loads(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = run(tiny_llama, preset="sparsegpt")
    model = AutoModelForCausalLM.from_pretrained(out.path, dtype=torch.float16)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, out.read("model.layers.1.mlp.down_proj.weight"))


def test_better_methods_lose_less(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    """Where the inputs are the same for all methods: in the first group of the first block."""
    others = ("mlp", "o_proj", r"layers\.1")
    names = ("wanda", "sparsegpt", "default")
    lost = [records(run(tiny_llama, name, preset=name, ignore=others))[0]["output_error"] for name in names]
    assert lost == sorted(lost, reverse=True)


def test_training_blocks_brings_them_closer(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    plain, trained = (
        run(tiny_llama, name, preset="sparsegpt", reconstruct=passes, rate=1e-3)
        for name, passes in (("plain", 0), ("trained", 8))
    )
    for record in records(trained):
        before, after = record["block_error"]
        assert after < 0.95 * before
    for name in linears(trained):
        assert is_2_4(trained.read(name))
    first = [name for name in linears(plain) if "layers.0" in name]
    assert all(torch.equal(plain.read(name) == 0, trained.read(name) == 0) for name in first)  # later blocks read other things


@torch.no_grad()
def test_the_next_block_reads_what_the_trained_one_puts_out(
    run: Callable[..., Checkpoint], tiny_llama: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    read: list[torch.Tensor] = []
    start = BlockTraining.__init__

    def seen(self: BlockTraining, block: Block, entering: Activations, *rest: Any) -> None:
        read[:] = [torch.cat(list(entering)).float()]
        start(self, block, entering, *rest)

    monkeypatch.setattr(BlockTraining, "__init__", seen)
    out = run(tiny_llama, preset="sparsegpt", reconstruct=4, rate=1e-3)
    model = AutoModelForCausalLM.from_pretrained(out.path, dtype=torch.float32)
    states = model(torch.stack(tokens.sequences), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], read[0], rtol=0, atol=2e-3)


def test_training_that_makes_blocks_worse_changes_nothing(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    plain, trained = (
        run(tiny_llama, name, preset="sparsegpt", reconstruct=passes, rate=1) for name, passes in (("plain", 0), ("trained", 1))
    )
    assert all(before == after for before, after in (record["block_error"] for record in records(trained)))
    assert all(torch.equal(plain.read(name), trained.read(name)) for name in plain.names())


def test_a_block_that_is_left_alone_is_not_trained(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    out = run(tiny_llama, preset="sparsegpt", reconstruct=1, ignore=(r"layers\.0\.",))
    assert {record["name"].split(".")[2] for record in records(out)} == {"1"}


@pytest.mark.parametrize("settings", [{"ignore": ("mlp",)}, {"preset": "sparsegpt", "reconstruct": 2}])
def test_a_killed_run_ends_in_the_same_bytes(
    run: Callable[..., Checkpoint], tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    class StopError(Exception):
        pass

    def emit(event: Event) -> None:
        if event.kind == "progress" and event.text.startswith("model.layers.1"):
            raise StopError

    whole = run(tiny_llama, "whole", **settings)
    with pytest.raises(StopError):
        run(tiny_llama, "killed", {"emit": emit}, **settings)
    assert (tmp_path / "killed.partial").is_dir()
    again = run(tiny_llama, "killed", **settings)
    for shard in whole.path.glob("*.safetensors"):
        assert shard.read_bytes() == (again.path / shard.name).read_bytes()


def test_a_run_with_other_settings_is_not_continued(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    run(tiny_llama, preset="sparsegpt")
    with pytest.raises(OutputError, match="not empty"):
        run(tiny_llama, preset="sparsegpt", damp=0.05)
    assert run(tiny_llama, how={"overwrite": True}, preset="sparsegpt", damp=0.05).path.is_dir()


def test_ignored_linears_stay_dense(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    out, original = run(tiny_llama, preset="sparsegpt", ignore=("down_proj$",)), Checkpoint.open(tiny_llama)
    assert torch.equal(out.read("model.layers.0.mlp.down_proj.weight"), original.read("model.layers.0.mlp.down_proj.weight"))
    assert is_2_4(out.read("model.layers.0.mlp.up_proj.weight"))


@pytest.mark.parametrize("layout", ["marlin-24", "gptq", "compressed-tensors"])
def test_joint_codes_are_2_4_in_every_format(to_int4: Callable[..., Checkpoint], tiny_llama: Path, layout: str) -> None:
    out = to_int4(tiny_llama, preset="marlin", sparsity="2:4", format=layout)
    stored = StoredLinears(out)
    assert len(stored.names) == 14
    for name in stored.names:
        assert stored.read(name).is_2_4()
    assert {record["mask"] for record in records(out)} == {"chosen"}


@pytest.mark.parametrize("sparsity", ["2:4", "keep"])
def test_zeros_that_are_there_are_kept(
    run: Callable[..., Checkpoint], to_int4: Callable[..., Checkpoint], tiny_llama: Path, sparsity: str
) -> None:
    pruned = run(tiny_llama, preset="wanda")
    out = to_int4(pruned.path, sparsity=sparsity)
    stored = StoredLinears(out)
    for name in stored.names:
        assert bool((stored.read(name).codes[pruned.read(f"{name}.weight") == 0] == 8).all())
    assert {record["mask"] for record in records(out)} == {"kept"}


def test_zeros_that_are_lost_are_told(
    run: Callable[..., Checkpoint], to_int4: Callable[..., Checkpoint], tiny_llama: Path
) -> None:
    out = to_int4(run(tiny_llama, preset="wanda").path)
    warnings = json.loads((out.path / "manifest.json").read_text())["warnings"]
    assert any("`--sparsity keep` keeps them" in warning for warning in warnings)


def test_keep_refuses_a_mask_that_is_not_2_4(to_int4: Callable[..., Checkpoint], tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not 2:4 sparse") as error:
        to_int4(tiny_llama, sparsity="keep")
    assert "marlin-tools prune" in str(error.value.hint)
    assert not (tmp_path / "int4").exists()


def test_inputs_that_do_not_come_in_fours_are_refused(run: Callable[..., Checkpoint], tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match=r"2:4 needs inputs in fours: `model\.layers\.0\.mlp\.down_proj` has 510 inputs"):
        run(tiny_model("llama", intermediate_size=510))


def test_shapes_that_the_sparse_format_cannot_hold_are_refused(
    to_int4: Callable[..., Checkpoint], tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(FormatError, match=r"format `marlin-24` cannot hold `model\.layers\.0\.self_attn"):
        to_int4(
            tiny_model("llama", hidden_size=96, num_attention_heads=2, head_dim=48),
            sparsity="2:4",
            format="marlin-24",
            group_size=-1,
        )


def test_a_quantized_model_cannot_be_pruned(
    run: Callable[..., Checkpoint], to_int4: Callable[..., Checkpoint], tiny_llama: Path
) -> None:
    with pytest.raises(ModelError, match="already quantised"):
        run(to_int4(tiny_llama, preset="fast").path)


def test_magnitude_looks_at_no_data_so_blocks_cannot_be_trained(run: Callable[..., Checkpoint], tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match="looks at no data"):
        run(tiny_llama, preset="magnitude", reconstruct=1)


def test_unknown_presets_are_named() -> None:
    with pytest.raises(ValueError, match="unknown preset `wandas`"):
        PruneSettings(preset="wandas")


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_every_family_is_pruned_and_trained(
    run: Callable[..., Checkpoint], tiny_model: Callable[..., Path], model_type: str
) -> None:
    out = run(tiny_model(model_type), reconstruct=1, preset="sparsegpt")
    for name in linears(out):
        assert is_2_4(out.read(name))


def test_rows_make_up_for_each_other(run: Callable[..., Checkpoint], tiny_llama: Path, tokens: TokenSet) -> None:
    """With `max`; attention's rows and those that close a branch, not gate and up."""
    alone = run(tiny_llama, "alone", algorithm=PRUNERS["max"].model_copy(update={"guided": False}))
    guided = run(tiny_llama, "guided", preset="max")
    same = {name for name in linears(guided) if torch.equal(guided.read(name), alone.read(name))}

    assert json.loads((guided.path / "manifest.json").read_text())["guide"] == {"tokens": tokens.tokens, "seed": 0}
    assert "guide" not in json.loads((alone.path / "manifest.json").read_text())
    assert not {name for name in same if not name.endswith(("gate_proj.weight", "up_proj.weight"))}
    assert all(is_2_4(guided.read(name)) for name in linears(guided))
