"""`--keep-dense`: what 2:4 costs each unit is measured where its block ends, and the dearest stay dense, within the share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress import dense, job
from marlin_tools.compress.dense import Unit, check_dense, choose
from marlin_tools.compress.export import export
from marlin_tools.compress.quantize import QuantizeSettings, prepare_quantize, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.team import ALONE
from marlin_tools.errors import FormatError, RecipeError
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.stream.inventory import take_linears
from marlin_tools.stream.layer_stream import LayerStream
from marlin_tools.training.finetune import FinetuneSettings, finetune
from marlin_tools.verification.inspect import inspect, rows
from marlin_tools.verification.verify import verify

Run = Callable[..., Checkpoint]
Digest = Callable[[Path], dict[str, str]]
MIXED: dict[str, Any] = {"preset": "fast", "device": "cpu", "sparsity": "2:4", "keep_dense": "40%"}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    """Two small blocks."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return tiny_model("llama", hidden_size=128, intermediate_size=256, **heads)


@pytest.fixture(scope="module")
def made(model: Path, tokens: TokenSet, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The model with two fifths of its weights dense at most."""
    return quantize(model, tokens, QuantizeSettings(**MIXED), tmp_path_factory.mktemp("mixed") / "out")


@pytest.fixture
def run(model: Path, tokens: TokenSet, tmp_path: Path) -> Callable[..., Checkpoint]:
    """`run()` makes it again, `run(keep_dense=0.2)` with another setting."""

    def call(of: Path = model, **settings: Any) -> Checkpoint:
        return quantize(of, tokens, QuantizeSettings(**{**MIXED, **settings}), tmp_path / "out")

    return call


def manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint.path / "manifest.json").read_text())
    return content


def sparse_linears(checkpoint: Checkpoint) -> dict[str, bool]:
    stored = StoredLinears(checkpoint)
    return {name: stored.read(name).is_2_4() for name in stored.names}


def unit(name: str, weights: int, cost: float) -> Unit:
    return Unit((name,), weights, 0.5, 0.5 + cost)


def test_the_dearest_for_each_weight_first() -> None:
    units = [unit("a", 100, 8), unit("b", 10, 1), unit("c", 50, 6), unit("free", 1, 0), unit("better", 1, -1)]
    names = [[each.linears[0] for each in choose(units, room)] for room in (9, 10, 60, 100, 160, 1000)]
    assert names == [[], ["b"], ["c", "b"], ["c", "b"], ["c", "b", "a"], ["c", "b", "a"]]


@pytest.mark.parametrize(("typed", "share"), [("10%", 0.1), ("12.5%", 0.125), ("0.1", 0.1), (".25", 0.25), (0.3, 0.3)])
def test_a_share_as_people_type_it(typed: object, share: float) -> None:
    assert QuantizeSettings(keep_dense=typed).keep_dense == pytest.approx(share)


@pytest.mark.parametrize("typed", ["0", "100%", "0%", "10", "1.5", "-10%", "x", 0.0, 1.0, 1, True])
def test_no_share(typed: object) -> None:
    with pytest.raises(ValueError, match="`keep_dense` is no flag" if typed is True else r"such as 10% or 0\.1"):
        QuantizeSettings(keep_dense=typed)


def test_units_stay_dense_within_the_share(made: Checkpoint) -> None:
    sparse, told = sparse_linears(made), manifest(made)
    choice, records = told["kept_dense"], {record["name"]: record for record in told["linears"]}
    kept = {name for name, zeros in sparse.items() if not zeros}
    sizes = {name: records[name]["shape"][0] * records[name]["shape"][1] for name in sparse}
    assert set(choice["linears"]) == kept
    assert choice["share"] == sum(sizes[name] for name in kept) / sum(sizes.values())
    assert 0.2 < choice["share"] <= 0.4
    assert choice["tokens"] == 6 * 64
    assert {name: record["mask"] for name, record in records.items()} == {
        name: "none" if name in kept else "chosen" for name in sparse
    }
    whole = [set(each["linears"]) for each in choice["units"]]
    assert set().union(*whole) == set(sparse)
    assert [4] * 2 == [sum(name.startswith(f"model.layers.{i}.") for name in map(min, whole)) for i in (0, 1)]
    assert all(each <= kept or not each & kept for each in whole)
    assert set(dearest(made)) <= kept
    assert all(each["sparse"] > each["dense"] > 0 for each in choice["units"])


def test_the_error_is_that_of_the_block_in_transformers(model: Path, tokens: TokenSet) -> None:
    checkpoint = Checkpoint.open(model)
    stream = LayerStream(checkpoint, tokens, take_linears(checkpoint, ()).names, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.stack(tokens.sequences)
    with torch.no_grad():
        before = theirs(ids, output_hidden_states=True).hidden_states[1].double()
        block = next(iter(stream))
        assert stream.hidden is not None
        entering = stream.hidden.copy()
        block.skip()
        leaving = stream.hidden.copy()
        own = {name: linear.weight.clone() for name, linear in block.linears().items()}
        new = {name: weight * 0.9 for name, weight in own.items() if "mlp" in name}
        found = [dense._error(block, entering, leaving, version, ALONE) for version in (new, {}, new)]
        for name, weight in new.items():
            theirs.get_submodule(name).weight.copy_(weight)
        after = theirs(ids, output_hidden_states=True).hidden_states[1].double()
    expected = ((after - before).square().sum(-1) / before.square().sum(-1)).mean()
    assert found == pytest.approx([float(expected), 0, float(expected)], rel=1e-4, abs=1e-12)
    assert all(torch.equal(weight, block.linears()[name].weight) for name, weight in own.items())


def dearest(checkpoint: Checkpoint) -> list[str]:
    """The unit that 2:4 costs most for each weight."""
    units = manifest(checkpoint)["kept_dense"]["units"]
    found: list[str] = max(units, key=lambda each: (each["sparse"] - each["dense"]) / each["weights"])["linears"]
    return found


def test_the_same_linears_of_all_experts_are_one_unit() -> None:
    first, other = ([f"b.mlp.experts.{i}.{name}_proj" for name in ("gate", "up")] for i in (0, 17))
    assert dense._unit(first) == dense._unit(other) != dense._unit(["b.mlp.experts.0.down_proj"])
    assert dense._unit(first) != dense._unit([name.replace("b.", "c.") for name in first])


def test_linears_that_are_2_4_already_stay_so(made: Checkpoint, run: Run, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    for name in dearest(made):
        n, k = weights[f"{name}.weight"].shape
        weights[f"{name}.weight"].view(n, k // 4, 4)[:, :, 1:3] = 0
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    masks = {record["name"]: record["mask"] for record in manifest(run(other))["linears"]}
    assert {masks[name] for name in dearest(made)} == {"kept"}
    assert "none" in masks.values()


@pytest.mark.parametrize("when", ["measuring", "solving"])
def test_a_killed_run_ends_in_the_same_bytes(
    made: Checkpoint, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: Digest, when: str
) -> None:
    class Killed(BaseException):
        pass

    measured = dense._measured

    def dying(*rest: Any, **_: Any) -> Any:
        if when == "measuring":
            yield next(measured(*rest))
        raise Killed

    with monkeypatch.context() as patch:
        if when == "measuring":
            patch.setattr(dense, "_measured", dying)
        else:
            patch.setattr(job, "compress_blocks", lambda *rest: next(dying(*rest)))
        with pytest.raises(Killed):
            run()
    saved = (tmp_path / "out.partial/state/dense.json").is_file()
    assert saved == (when == "solving")
    if saved:
        monkeypatch.setattr(dense, "_measured", lambda *_: pytest.fail("it was known"))
    assert digest(made.path) == digest(run().path)


def test_another_share_is_another_result(made: Checkpoint, run: Run) -> None:
    other = run(keep_dense=0.1)
    kept = [set(manifest(each)["kept_dense"]["linears"]) for each in (other, made)]
    assert len(kept[0]) < len(kept[1])
    assert manifest(other)["fingerprint"] != manifest(made)["fingerprint"]


def test_what_comes_after_takes_it(made: Checkpoint, model: Path, tokens: TokenSet, tmp_path: Path) -> None:
    out = made
    assert verify(out.path).ok
    facts = inspect(out)
    sparse = sum(sparse_linears(out).values())
    assert facts["sparsity"]["sparse"] == sparse < facts["sparsity"]["linears"]
    assert dict(rows(facts))["sparsity"].startswith(f"2:4 in {sparse} of 14 linears, ")
    copy = export(out, "gptq", tmp_path / "gptq")
    assert sparse_linears(copy) == sparse_linears(out)
    assert manifest(copy)["kept_dense"] == manifest(out)["kept_dense"]
    how = FinetuneSettings(teacher=str(model), tokens=256, batch=2, micro=2, held_out=2, code_rate=0.9, device="cpu")
    tuned = finetune(out, tokens, how, tmp_path / "tuned")
    assert sparse_linears(tuned) == sparse_linears(out)
    assert manifest(tuned)["kept_dense"] == manifest(out)["kept_dense"]
    with pytest.raises(FormatError, match="more than two nonzeros"):
        export(out, "marlin-24", tmp_path / "marlin-24")


@pytest.mark.parametrize(
    ("settings", "formats", "kind", "said"),
    [
        ({}, (), RecipeError, "chooses what `sparsity: 2:4` leaves dense"),
        ({"sparsity": "keep"}, (), RecipeError, "chooses what `sparsity: 2:4` leaves dense"),
        ({"sparsity": "2:4", "preset": "rtn"}, (), RecipeError, "looks at no data"),
        ({"sparsity": "2:4", "format": "marlin-24"}, (), FormatError, "`marlin-24` cannot hold the linears that stay dense"),
        ({"sparsity": "2:4"}, ("gptq", "marlin-24"), FormatError, "`marlin-24` cannot hold the linears that stay dense"),
    ],
)
def test_refused_before_work(
    model: Path, settings: dict[str, Any], formats: tuple[str, ...], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        prepare_quantize(model, QuantizeSettings(keep_dense=0.1, device="cpu", **settings), 1000, 64, formats)


def test_a_share_in_which_no_linear_has_room_is_refused_with_the_least_that_has(model: Path) -> None:
    def prepared(share: str) -> None:
        prepare_quantize(model, QuantizeSettings(keep_dense=share, device="cpu", preset="fast", sparsity="2:4"), 1000, 64)

    with pytest.raises(RecipeError, match=r"room for 1 weights, too few for any linear: the smallest has 16,384") as refused:
        prepared("0.0004%")
    assert refused.value.hint == "use `--keep-dense 5.0001%` or more, or leave it out"
    prepared("5.0001%")


def test_marlin_holds_what_stays_dense() -> None:
    check_dense("2:4", ("marlin",), needs_data=True)
