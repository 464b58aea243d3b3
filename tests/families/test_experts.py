"""Mixtures of experts: what each expert is calibrated on, what the manifest says about it, and what is refused."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlin_tools.algorithms import PRESETS
from marlin_tools.algorithms.solution import Solution, solve_all
from marlin_tools.backends import load
from marlin_tools.checkpoint.cards import Card
from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.compress.solved import solve_experts
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.team import ALONE
from marlin_tools.errors import ModelError
from marlin_tools.events import Event
from marlin_tools.families import experts
from marlin_tools.families.experts import SplitExperts
from marlin_tools.families.layout import Layout
from marlin_tools.stream import routed
from marlin_tools.stream.inventory import take_linears
from marlin_tools.stream.layer_stream import CHUNK_TOKENS, Group, LayerStream

Load = Callable[[str, Path], torch.nn.Module]
mixtures = pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text"])
ROUTER = {"qwen3_moe": "model.layers.1.mlp.gate", "gpt_oss": "model.layers.1.mlp.router"}


def expert_groups(
    path: Path, tokens: TokenSet, chunk: int = CHUNK_TOKENS, device: str = "cpu"
) -> dict[str, tuple[Tensor, int, int | None]]:
    """By the first linear of each group: its Hessian, tokens seen, tokens routed."""
    checkpoint = Checkpoint.open(path)
    linears = frozenset(Layout(checkpoint).linears())
    stream = LayerStream(checkpoint, tokens, linears, torch.device(device), with_original=True, chunk_tokens=chunk)
    found = {}
    for block in stream:
        for group in block.groups():
            assert group.hessian is not None
            sent, seen = group.tokens or (None, group.hessian.tokens)
            assert seen == group.hessian.tokens
            found[group.names[0]] = group.hessian.matrix, seen, sent
    return found


@pytest.mark.parametrize("model_type", ROUTER, ids=str)
@torch.no_grad()
def test_experts_see_their_tokens_and_a_share_of_all(
    made: Callable[[str], Path],
    eager: Load,
    tokens: TokenSet,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    monkeypatch.setattr(routed, "ALSO", 16)
    found = expert_groups(made(model_type), tokens)
    model, router = eager(model_type, made(model_type)), ROUTER[model_type]
    seen: list[tuple[Tensor, Tensor]] = []
    model.get_submodule(router).register_forward_hook(lambda _, args, out: seen.append((args[0], out[2])))
    for sequence in tokens.sequences:
        model(sequence[None])
    for expert in range(4):
        rows, sent = [], 0
        for x, chosen in seen:
            mine = (chosen == expert).any(dim=-1)
            sent += int(mine.sum())
            rows.append(x.reshape(-1, x.shape[-1])[mine | (torch.arange(len(mine)) % 16 == 0)])
        inputs = torch.cat(rows)
        matrix, count, tokens_sent = found[f"model.layers.1.mlp.experts.{expert}.gate_proj"]
        assert (count, tokens_sent) == (len(inputs), sent)
        expected = inputs.T @ inputs / len(inputs)
        torch.testing.assert_close(matrix, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        _, count_down, sent_down = found[f"model.layers.1.mlp.experts.{expert}.down_proj"]
        assert (count_down, sent_down) == (count, sent)


@pytest.mark.parametrize("model_type", ROUTER, ids=str)
def test_chunks_that_go_through_at_once(
    made: Callable[[str], Path], tokens: TokenSet, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """As on a GPU: the same tokens, and sums that differ by rounding alone, in later blocks too."""
    longest = tokens.longest
    alone = expert_groups(made(model_type), tokens, longest)
    joined, sizes = routed._joined, []
    monkeypatch.setattr(routed, "_joined", lambda hidden, chunks: [joined(hidden, chunks), sizes.append(len(chunks))][0])
    monkeypatch.setitem(routed._TOGETHER_BYTES, "cpu", 1 << 20)
    together = expert_groups(made(model_type), tokens, longest)

    assert max(sizes) > 1
    for name, (hessian, seen, sent) in alone.items():
        assert together[name][1:] == (seen, sent)
        assert torch.allclose(together[name][0], hessian, rtol=1e-4, atol=1e-5 * float(hessian.abs().max()))


@mixtures
@torch.no_grad()
def test_experts_side_by_side_compute_what_each_does(
    made: Callable[[str], Path], tokens: TokenSet, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    alone = expert_groups(made(model_type), tokens)
    sizes: set[int] = set()
    usual = SplitExperts.bundles

    def bundles(self: SplitExperts, counts: Sequence[int], *, on_gpu: bool) -> Iterator[tuple[list[int], int]]:
        for numbers, rows in usual(self, counts, on_gpu=True):
            sizes.add(len(numbers))
            assert not on_gpu
            assert rows > max(counts[number] for number in numbers) // 64 * 64
            yield numbers, rows

    monkeypatch.setattr(SplitExperts, "bundles", bundles)
    for name, (matrix, *counts) in expert_groups(made(model_type), tokens).items():
        torch.testing.assert_close(matrix, alone[name][0], rtol=1e-4, atol=1e-5 * float(matrix.abs().max()))
        assert counts == list(alone[name][1:])
    assert max(sizes) > 1


@pytest.mark.gpu
@mixtures
@torch.no_grad()
def test_bundles_on_a_gpu(
    made: Callable[[str], Path], tokens: TokenSet, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    together = expert_groups(made(model_type), tokens, device="cuda")
    usual = SplitExperts.bundles
    monkeypatch.setattr(SplitExperts, "bundles", lambda self, counts, on_gpu: usual(self, counts, on_gpu=not on_gpu))
    alone = expert_groups(made(model_type), tokens, device="cuda")
    first = min(name for name in alone if ".experts." in name).split(".experts.")[0]
    for name, (matrix, *counts) in alone.items():
        if name.startswith(first):  # later blocks may send a token elsewhere, where two experts are as good
            assert counts == list(together[name][1:])
            torch.testing.assert_close(together[name][0], matrix, rtol=1e-2, atol=1e-3 * float(matrix.abs().max()))


def test_bundles_hold_experts_that_read_about_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    split = SplitExperts(torch.nn.Linear(1, 1, dtype=torch.float16), (8, 256, 128), bias=False)
    counts = [1000, 0, 1024, 10, 64, 65, 900, 1025]
    assert list(split.bundles(counts, on_gpu=False)) == [([i], n) for i, n in enumerate(counts) if n]
    expected = [([0, 2], 1024), ([6], 1024), ([3, 4], 64), ([5], 128), ([7], 1280)]
    assert list(split.bundles(counts, on_gpu=True)) == expected
    monkeypatch.setattr(experts, "_SIDE_BY_SIDE", 1)
    assert all(len(numbers) == 1 for numbers, _ in split.bundles(counts, on_gpu=True))
    monkeypatch.undo()
    split.expert(0).up_proj.register_forward_pre_hook(lambda *_: None)
    assert list(split.bundles(counts, on_gpu=True)) == list(split.bundles(counts, on_gpu=False))


def test_the_manifest_counts_tokens(made: Callable[[str], Path], tokens: TokenSet, tmp_path: Path) -> None:
    out = quantize(made("qwen2_moe"), tokens, QuantizeSettings(preset="default", group_size=32), tmp_path / "out")
    records = (read_manifest(out.path) or {})["linears"]
    sent = [record["tokens"] for record in records if record["name"].startswith("model.layers.0.mlp.experts.")]
    assert len(sent) == 12
    assert sum(sent) == 3 * 2 * tokens.tokens
    assert all(record["tokens_seen"] >= record["tokens"] for record in records if "tokens" in record)
    assert not any("tokens" in record for record in records if ".experts." not in record["name"])


@pytest.mark.parametrize(("inner", "experts"), [(96, 32), (192, 64), (256, 128)])
def test_the_experts_of_a_block_share_a_group_size(inner: int, experts: int) -> None:
    """Engines run them as one matrix; the expert's own down projection decides for all three."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    counts = {"num_hidden_layers": 2, "vocab_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    config = {"model_type": "qwen3_moe", "dtype": "float16", "moe_intermediate_size": inner, **sizes, **counts}
    inventory = take_linears(Card(config, "card"), ())
    chosen = QuantizeSettings(preset="rtn", group_size="auto").sized(inventory)
    assert 7 + 4 + 12 == len(chosen)
    assert {experts} == {size for name, size in chosen.items() if ".experts." in name}
    assert {128} == {size for name, size in chosen.items() if ".experts." not in name}


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4", "mixtral", "qwen3_5_moe_text", "granitemoeshared", "qwen3_vl_moe"])
def test_pruned_experts_lie_where_they_lay(
    made: Callable[[str], Path],
    eager: Callable[[str, Path], torch.nn.Module],
    tokens: TokenSet,
    model_type: str,
    tmp_path: Path,
) -> None:
    """Else transformers would make up experts of its own."""
    source = Checkpoint.open(made(model_type))
    settings = PruneSettings(preset="wanda", reconstruct=1, ignore=(r"experts\.1\.",), device="cpu")
    out = prune(source, tokens, settings, tmp_path / "out")
    assert sorted(out.names()) == sorted(source.names())
    assert all(out.shape(name) == source.shape(name) for name in source.names())
    ids = tokens.sequences[0][None]
    expected = eager(model_type, out.path)(input_ids=ids).logits
    torch.testing.assert_close(load(out, device="cpu")(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    reference = load_file(out.path / "verify" / "reference.safetensors")
    torch.testing.assert_close(reference["logits"], expected[0, : len(reference["logits"])], rtol=1e-4, atol=1e-4)


def test_a_pruned_mixture_goes_on_where_it_was_killed(made: Callable[[str], Path], tokens: TokenSet, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.text == "blocks" and event.done == 2:
            raise KeyboardInterrupt

    settings = PruneSettings(preset="wanda", device="cpu")
    whole = prune(made("gpt_oss"), tokens, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prune(made("gpt_oss"), tokens, settings, tmp_path / "killed", emit=stop)
    assert list((tmp_path / "killed.partial").rglob("model-00001-of-*.safetensors"))
    again = prune(made("gpt_oss"), tokens, settings, tmp_path / "killed")
    for shard in whole.path.glob("*.safetensors"):
        assert shard.read_bytes() == (again.path / shard.name).read_bytes()


def test_pruned_experts_are_sparse_one_by_one(made: Callable[[str], Path], tokens: TokenSet, tmp_path: Path) -> None:
    out = prune(made("gpt_oss"), tokens, PruneSettings(preset="magnitude"), tmp_path / "out")
    weight = Layout(out).weight(1, "mlp.experts.2.up_proj.weight").read(out)
    assert bool(((weight.reshape(-1, 4) != 0).sum(dim=1) <= 2).all())
    again = quantize(out, None, QuantizeSettings(preset="rtn", group_size=32, sparsity="keep"), tmp_path / "int4")
    assert "model.layers.1.mlp.experts.2.up_proj.weight_packed" in again


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object], **config: object) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))
    return folder


def cut(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name][:, :, :-2].contiguous()})


@pytest.mark.parametrize(
    ("model_type", "change", "config", "message"),
    [
        (
            "qwen3_moe",
            lambda _tensors: None,
            {"num_experts": 3, "num_local_experts": 3},
            "holds 4 experts, config.json asks for 3",
        ),
        ("mixtral", lambda _tensors: None, {"num_experts_per_tok": 9}, "`num_experts_per_tok` is 9, of 4 experts"),
        ("mixtral", lambda _tensors: None, {"num_experts_per_tok": 0}, "`num_experts_per_tok` is 0, of 4 experts"),
        ("gpt_oss", cut("model.layers.0.mlp.experts.gate_up_proj"), {}, "config.json asks for"),
        ("mixtral", lambda t: t["model.layers.1.block_sparse_moe.gate.weight"].fill_(torch.nan), {}, "gate.weight` holds NaN"),
    ],
    ids=["count", "called", "not called", "shape", "router"],
)
def test_what_does_not_fit_is_refused_before_work(
    made: Callable[[str], Path],
    tmp_path: Path,
    model_type: str,
    change: Callable[[dict[str, Tensor]], object],
    config: dict[str, object],
    message: str,
) -> None:
    path = changed(made(model_type), tmp_path / "odd", change, **config)
    with pytest.raises(ModelError, match=message):
        quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_are_handed_out_by_the_dozen(
    made: Callable[[str], Path], tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one shape, and none but them: a solver may take them at once, and is told nothing of what comes after."""
    monkeypatch.setattr(routed, "TOGETHER", 3)
    checkpoint = Checkpoint.open(made("qwen2_moe"))
    lacking = "model.layers.1.mlp.experts.1.gate_proj"
    stream = LayerStream(checkpoint, tokens, frozenset(Layout(checkpoint).linears()) - {lacking}, torch.device("cpu"))
    sizes, taken = [], []
    for block in stream:
        for batch in block.batches():
            sizes.append([len(group.names) for group in batch])
            if batch[0].tokens is None:
                continue
            problems = [PRESETS["default"].problem(g.names[0], g.hessian, 32, torch.float16) for g in batch]
            usual = [solve_all(problem, group.stacked()) for problem, group in zip(problems, batch, strict=True)]

            def at_once(groups: list[Group], batch: list[Group] = batch, usual: list[Solution] = usual) -> list[Solution]:
                taken.append(len(groups))
                assert [group.names for group in groups] == [group.names for group in batch]
                return usual

            found = solve_experts(batch, lambda _group, problems=problems: problems[0], ALONE, at_once)
            assert list(found.rows) == [name for group in batch for name in group.names]
            expected = {
                name: (each[rows], each.damp) for group, each in zip(batch, usual, strict=True) for name, rows in group.rows()
            }
            for name, solution in found.each():
                own, damp = expected[name]
                assert torch.equal(solution.linear.codes, own.linear.codes)
                assert torch.equal(solution.linear.scales, own.linear.scales)
                assert solution.damp == damp
                assert found.errors()[name] == (own.output_error, own.weight_error)
            for name, value in found.values(torch.float32):
                assert torch.equal(value, expected[name][0].value(torch.float32))
    attention = [[3], [1]]
    assert sizes[:8] == [*attention, [2], [2, 2, 2], [2], [1], [1, 1, 1], [1]]
    assert sizes[8:] == [*attention, [2], [2], [1], [2, 2], [1], [1, 1, 1], [1]]
    assert sum(taken) == 16
