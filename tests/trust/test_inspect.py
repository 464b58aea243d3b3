"""What `inspect` says of dense, quantised, sparse and foreign checkpoints."""

import json

import pytest
from safetensors.torch import load_file, save_file

from marlin_tools.verification import inspect as stage
from marlin_tools.verification.inspect import inspect, rows

LINEARS = 2 * (4 * 256 * 256 + 3 * 256 * 512)
EMBEDDINGS = 2 * 512 * 256
NORMS = 5 * 256


def test_dense(tiny_llama):
    facts = inspect(tiny_llama)

    assert ("llama", 2, "float16", True) == (facts["family"], facts["blocks"], facts["dtype"], facts["supported"])
    assert LINEARS + EMBEDDINGS + NORMS == facts["parameters"]
    assert {
        "quantized linears": 0,
        "other linears": 2 * (LINEARS + EMBEDDINGS // 2),
        "embeddings and norms": 2 * (EMBEDDINGS // 2 + NORMS),
        "total": 2 * (LINEARS + EMBEDDINGS + NORMS),
    } == facts["bytes"]
    assert (None, 0, [], [], []) == tuple(facts[key] for key in ("format", "quantized", "kept", "worst", "engines"))
    assert (False, True, 14) == tuple(facts["sparsity"][key] for key in ("2:4", "exact", "linears"))


@pytest.mark.parametrize(("emptied", "left"), (("up_proj", 12), ("_proj", None)))
def test_linears_without_weights_are_not_sparse(tiny_llama, emptied, left):
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors = {name: t[:0].clone() if emptied in name else t for name, t in tensors.items()}
    save_file(tensors, tiny_llama / "model.safetensors")
    found = inspect(tiny_llama)["sparsity"]

    assert left == (found and found["linears"])
    assert not found or 0 == found["sparse"]


@pytest.mark.parametrize("name", ("gptq", "marlin", "compressed-tensors"))
def test_quantized(in_format, name):
    facts = inspect(in_format(name))

    assert LINEARS + EMBEDDINGS + NORMS == facts["parameters"]
    assert (name, [128], 14, []) == tuple(facts[key] for key in ("format", "group_sizes", "quantized", "kept"))
    assert facts["bytes"]["total"] == sum(size for kind, size in facts["bytes"].items() if kind != "total")
    assert LINEARS * (4 / 8 + 2 / 128) == pytest.approx(facts["bytes"]["quantized linears"], rel=0.04)
    assert ("noise", 4 * 96) == (facts["calibration"]["source"], facts["calibration"]["tokens"])
    assert "gptq" == facts["solver"]["kind"]
    assert 5 == len(facts["engines"])


def test_what_a_model_was_trained_on_is_not_called_calibration(copy, edit_json):
    def named(directory):
        return [what for what, _ in rows(inspect(directory)) if what in {"calibration", "training text"}]

    directory = copy()
    assert ["calibration"] == named(directory)
    edit_json(directory / "manifest.json", teacher={"origin": "x", "fingerprint": "f"})
    assert ["training text"] == named(directory)


def test_worst_layers_lose_most(in_format):
    linears = json.loads((in_format("gptq") / "manifest.json").read_text())["linears"]
    worst = inspect(in_format("gptq"))["worst"]

    assert sorted((entry["output_error"] for entry in linears), reverse=True)[:5] == [entry["error"] for entry in worst]
    assert {"output"} == {entry["of"] for entry in worst}


def test_without_calibration_the_weights_tell(rounded):
    assert {"weight"} == {entry["of"] for entry in inspect(rounded())["worst"]}


def test_kept_linears_are_named(rounded):
    assert ["model.layers.1.mlp.up_proj"] == inspect(rounded(settings={"ignore": (r"1\.mlp\.up_proj$",)}))["kept"]


def test_per_column(rounded):
    facts = inspect(rounded(settings={"group_size": -1}))

    assert [-1] == facts["group_sizes"]
    assert ("group size", "per column") in rows(facts)


def test_sparse(sparse):
    facts = inspect(sparse)

    assert facts["sparsity"]["2:4"]
    assert facts["sparsity"]["zeros"] >= 0.5
    assert any(value.startswith("2:4, ") for what, value in rows(facts) if what == "sparsity")


def test_one_full_quad_is_enough_not_to_be_sparse(sparse, edit):
    name = "model.layers.0.mlp.up_proj.qweight"
    with edit(sparse, name) as tensors:
        tensors[name][0, 0] = 0x1111  # the first four codes of one output

    assert not inspect(sparse)["sparsity"]["2:4"]


def test_large_models_are_sampled(in_format, monkeypatch):
    monkeypatch.setattr(stage, "SAMPLE", 4)
    facts = inspect(in_format("gptq"))

    assert (4, 14, False) == tuple(facts["sparsity"][key] for key in ("read", "linears", "exact"))
    assert any("(4 of 14 linears sampled)" in value for what, value in rows(facts) if what == "sparsity")


def test_another_tools_checkpoint(foreign):
    facts = inspect(foreign)

    assert ("gptq", 14, None, None, []) == tuple(facts[k] for k in ("format", "quantized", "calibration", "solver", "worst"))
    assert LINEARS == facts["quantized_weights"]
    assert 5 == len(facts["engines"])


def test_unknown_family(tiny_llama, edit_json):
    edit_json(tiny_llama / "config.json", model_type="mamba")
    facts = inspect(tiny_llama)

    assert not facts["supported"]
    assert ("family", "mamba, 2 blocks, not supported") in rows(facts)


def test_everything_is_json_and_every_row_is_text(in_format, tiny_llama):
    for directory in (in_format("gptq"), tiny_llama):
        facts = inspect(directory)

        assert facts == json.loads(json.dumps(facts))
        assert all(isinstance(cell, str) and cell for row in rows(facts) for cell in row)


def test_nothing_large_is_read_to_know_sizes(in_format, monkeypatch):
    """Sizes come from headers: only what `sparsity` samples is read."""
    read = []
    original = stage.Checkpoint.read
    monkeypatch.setattr(stage.Checkpoint, "read", lambda self, name: read.append(name) or original(self, name))
    monkeypatch.setattr(stage, "SAMPLE", 1)
    inspect(in_format("gptq"))

    assert {"model.layers.0.mlp.down_proj"} == {name.rpartition(".")[0] for name in read}
