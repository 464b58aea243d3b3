"""A good checkpoint passes every check; each kind of damage fails the check that is for it, which names what is damaged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.export import export
from marlin_tools.errors import FormatError, ModelError
from marlin_tools.formats.contents import Contents
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.report.result import gather
from marlin_tools.verification.verify import verify

LINEAR = "model.layers.1.mlp.up_proj"
ALL = ("files", "config", "inventory", "size", "scales", "zero points", "codes", "hashes", "logits", "generation")


@pytest.mark.parametrize("name", ("gptq", "marlin", "compressed-tensors"))
def test_a_good_checkpoint_passes(in_format, name):
    events = []
    verification = verify(in_format(name), emit=events.append)

    assert verification.ok
    expected = ALL if name == "gptq" else tuple(check for check in ALL if check != "zero points")
    assert expected == tuple(check.name for check in verification.checks)
    assert not any(check.skipped for check in verification.checks)
    assert expected == tuple(event.text for event in events if event.kind == "progress")
    assert {"vLLM", "SGLang", "transformers", "GPTQModel", "marlin-tools"} == {each.engine for each in verification.engines}


def test_what_passing_says(in_format):
    details = {check.name: check.detail for check in verify(in_format("gptq")).checks}

    assert "14 linears quantised, 0 kept, nothing left over" == details["inventory"]
    assert "linears take 26.6% of 16 bits, 25.8% expected for group_size 128" == details["size"]
    assert "7 everywhere" == details["zero points"]
    assert "0.001 allowed (float32 on a CPU, as then)" in details["logits"]
    assert "16 greedy tokens from the beginning and from the reference text" == details["generation"]


def test_uncalibrated_models_have_no_reference(rounded):
    verification = verify(rounded())
    (logits,) = (check for check in verification.checks if check.name == "logits")

    assert verification.ok
    assert ("no stored reference", True) == (logits.detail, logits.skipped)


def test_another_tools_checkpoint_passes(foreign):
    verification = verify(foreign)

    assert verification.ok, [check for check in verification.checks if not check.ok]
    assert {"hashes", "logits"} == {check.name for check in verification.checks if check.skipped}
    assert "8 passed, 2 skipped" == verification.counted
    assert ["hashes", "logits"] == [each["name"] for each in verification.describe()["checks"] if each["result"] == "skipped"]


@pytest.mark.parametrize("content", ("{", "[]"))
def test_a_manifest_that_cannot_be_read_is_an_error_and_no_pass(copy, content):
    directory = copy()
    (directory / "manifest.json").write_text(content)
    with pytest.raises(ModelError, match=r"manifest\.json`"):
        verify(directory)


@pytest.mark.parametrize("model_type", ("mistral", "qwen2", "qwen3"))
def test_other_families_pass(rounded, model_type, failures):
    assert {} == failures(rounded(model_type, tie_word_embeddings=model_type == "qwen2"))


def test_a_sparse_checkpoint_passes_and_is_seen(sparse, tmp_path):
    verification = verify(export(sparse, "marlin-24", tmp_path / "out"))
    details = {check.name: check.detail for check in verification.checks}

    assert verification.ok
    assert "all legal, 14 of 14 linears 2:4 sparse" == details["codes"]
    assert "linears take 19.5% of 16 bits, 19.5% expected for group_size 128" == details["size"]


# ---- stored values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (float("inf"), float("nan"), 0.0))
@pytest.mark.parametrize(("name", "suffix"), (("gptq", "scales"), ("marlin", "s"), ("compressed-tensors", "weight_scale")))
def test_bad_scale(copy, edit, name, suffix, value, failures, forget_hashes):
    directory = forget_hashes(copy(name))
    with edit(directory, f"{LINEAR}.{suffix}") as tensors:
        tensors[f"{LINEAR}.{suffix}"].view(-1)[7] = value
    found = failures(directory)

    assert f"`{LINEAR}.{suffix}` holds {value:g} (1 of 1024)" == found.pop("scales")
    assert {"logits", "generation"}.issuperset(found)


def test_zero_points_of_the_other_version(damaged, edit, failures):
    with edit(damaged, f"{LINEAR}.qzeros") as tensors:
        tensors[f"{LINEAR}.qzeros"].fill_(-0x77777778)  # eight nibbles of 8

    assert {"zero points": f"`{LINEAR}.qzeros` holds 8, not 7"} == failures(damaged)


def test_permuted_inputs(damaged, edit, failures):
    with edit(damaged, f"{LINEAR}.g_idx") as tensors:
        tensors[f"{LINEAR}.g_idx"] = tensors[f"{LINEAR}.g_idx"].flip(0).contiguous()
    found = failures(damaged)

    assert ["codes"] == list(found)
    assert found["codes"].startswith(f"`{LINEAR}`: `g_idx` permutes the inputs")


def test_illegal_metadata(sparse, edit, tmp_path, failures, forget_hashes):
    directory = forget_hashes(export(sparse, "marlin-24", tmp_path / "out").path)
    with edit(directory, f"{LINEAR}.meta") as tensors:
        tensors[f"{LINEAR}.meta"][0, 0] = 0
    found = failures(directory)

    assert ["codes"] == list(found)
    assert found["codes"].startswith(f"`{LINEAR}`: `meta`: nibble 0x0 does not name two of four inputs")


def test_a_changed_code_is_legal_but_not_what_was_written(copy, edit, failures):
    """Only the hashes and the logits can tell."""
    directory = copy()
    with edit(directory, f"{LINEAR}.qweight") as tensors:
        tensors[f"{LINEAR}.qweight"] ^= 0x11111111
    found = failures(directory)

    assert {"hashes", "logits"} == set(found)
    assert "`model-00002-of-00003.safetensors` is not what was written" in found["hashes"]


# ---- inventory, size and config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "check", "detail"),
    (
        (f"{LINEAR}.qweight", "inventory", f"`{LINEAR}.weight` is missing"),
        (f"{LINEAR}.scales", "config", f"has no tensor `{LINEAR}.scales`"),
        ("model.layers.1.input_layernorm.weight", "inventory", "`model.layers.1.input_layernorm.weight` is missing"),
        ("lm_head.weight", "inventory", "`lm_head.weight` is missing"),
    ),
)
def test_missing_tensor(damaged, edit, name, check, detail, failures):
    with edit(damaged, name) as tensors:
        del tensors[name]
    found = failures(damaged)

    assert [check] == list(found)
    assert detail in found[check]


def test_what_some_tools_leave_out_is_no_broken_download(damaged, edit, failures):
    with edit(damaged, f"{LINEAR}.g_idx") as tensors:
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]

    assert "is stored without `g_idx`, which readers of `gptq` go by" in failures(damaged)["config"]
    for use in (lambda: Contents(Checkpoint.open(damaged)).grids, lambda: StoredLinears(Checkpoint.open(damaged)).read(LINEAR)):
        with pytest.raises(FormatError, match="is stored without `g_idx`") as caught:
            use()
        assert "some tools leave it out" in caught.value.hint


def test_a_linear_that_nobody_quantized(damaged, edit, failures):
    with edit(damaged, f"{LINEAR}.qweight") as tensors:
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{LINEAR}.{suffix}"]
        tensors[f"{LINEAR}.weight"] = torch.ones(512, 256).half()

    assert {"inventory": f"`{LINEAR}` is not quantised and not listed as kept"} == failures(damaged)


@pytest.mark.parametrize("name", ("gptq", "compressed-tensors"))
@pytest.mark.parametrize("manifest", (True, False), ids=("manifest", "config"))
def test_a_linear_that_was_kept_on_purpose(rounded, name, manifest, failures):
    directory = rounded(settings={"ignore": (r"1\.mlp\.up_proj$",), "format": name})
    if not manifest:
        (directory / "manifest.json").unlink()

    assert {} == failures(directory)


def test_leftover_weights(damaged, edit, failures):
    with edit(damaged, f"{LINEAR}.qweight") as tensors:
        tensors[f"{LINEAR}.weight"] = torch.zeros(512, 256).half()

    assert {"inventory": f"`{LINEAR}.weight` is unknown to the model"} == failures(damaged)


@pytest.mark.parametrize("block", ("mtp.layers.0", "model.layers.2"))
def test_quantized_heads_that_predict_ahead_are_no_fault(damaged, edit, edit_json, failures, block):
    """They are beside the model: it has no such linears, and runs without them."""
    edit_json(damaged / "config.json", num_nextn_predict_layers=1)
    with edit(damaged, f"{LINEAR}.qweight") as tensors:
        ahead = {name.replace("model.layers.1", block): t.clone() for name, t in tensors.items() if "layers.1." in name}
        assert f"{block}.mlp.up_proj.qweight" in ahead
        tensors.update(ahead)

    assert {} == failures(damaged)


def test_a_bias_that_the_model_does_not_have(damaged, edit, failures):
    with edit(damaged, f"{LINEAR}.qweight") as tensors:
        tensors[f"{LINEAR}.bias"] = torch.ones(512).half()

    assert {"inventory": f"`{LINEAR}.bias` is unknown to the model"} == failures(damaged)


def test_a_shape_that_the_config_contradicts(damaged, edit_json, failures):
    edit_json(damaged / "config.json", intermediate_size=1024)

    assert "`model.layers.0.mlp.down_proj` is 256 x 512, the model has (256, 1024)" in failures(damaged)["inventory"]


def test_missing_tokenizer(damaged, failures):
    for file in damaged.glob("tokenizer*"):
        file.unlink()

    assert "the tokenizer cannot be loaded" in failures(damaged)["inventory"]


def test_scales_in_twice_the_bytes(rounded, edit, failures):
    directory = rounded(settings={"group_size": 32})
    assert {} == failures(directory)
    for block in range(2):
        with edit(directory, f"model.layers.{block}.mlp.up_proj.scales") as tensors:
            tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("scales")}

    assert "32.7% of 16 bits, 28.1% expected for group_size 32" in failures(directory)["size"]


@pytest.mark.parametrize(
    ("values", "detail"),
    (
        ({"group_size": 64}, "`model.layers.0.mlp.down_proj` has groups of 128, `quantization_config` says 64"),
        ({"group_size": -1}, "`model.layers.0.mlp.down_proj` has groups of 128, `quantization_config` says -1"),
        ({"bits": 8}, "`bits` is 8, only 4 can be read"),
        ({"quant_method": "awq"}, "unknown quant_method `awq`"),
        ({"checkpoint_format": "marlin"}, "no linear is stored as `marlin`"),
    ),
)
def test_quantization_config_that_contradicts_the_tensors(damaged, edit_json, values, detail, failures):
    config = json.loads((damaged / "config.json").read_text())["quantization_config"]
    edit_json(damaged / "config.json", quantization_config=config | values)

    assert detail in failures(damaged)["config"]


@pytest.mark.parametrize(
    ("name", "values"),
    (
        ("compressed-tensors", {"ignore": ["re:.*"]}),
        ("compressed-tensors", {"ignore": ["lm_head", "model.layers.0.mlp.down_proj"]}),
        ("gptq", {"dynamic": {"-:.*down_proj": {}}}),
    ),
)
def test_a_quantized_linear_that_the_config_leaves_out(copy, edit_json, failures, forget_hashes, name, values):
    """Engines that go by the config look for a weight in 16 bits."""
    directory = forget_hashes(copy(name))
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_json(directory / "config.json", quantization_config=config | values)
    found = failures(directory)

    assert ["config"] == list(found)
    assert found["config"].startswith("`model.layers.0.mlp.down_proj` is quantised, `quantization_config` says it is not")


def test_act_order_that_permutes_nothing_is_said(damaged, edit_json):
    config = json.loads((damaged / "config.json").read_text())["quantization_config"]
    edit_json(damaged / "config.json", quantization_config=config | {"desc_act": True})
    verification = verify(damaged)

    assert verification.ok
    (codes,) = (check.detail for check in verification.checks if check.name == "codes")
    assert codes.endswith(", `desc_act` is true and `g_idx` permutes nothing")


def test_a_head_that_should_be_the_embedding(damaged, edit, edit_json, failures):
    edit_json(damaged / "config.json", tie_word_embeddings=True)
    reason = "`lm_head.weight` is not `model.embed_tokens.weight`, `tie_word_embeddings` says it is: vLLM would read the latter"

    assert reason == failures(damaged)["inventory"]
    with edit(damaged, "lm_head.weight") as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "inventory" not in failures(damaged)


def test_unknown_family(damaged, edit_json, failures):
    edit_json(damaged / "config.json", model_type="mamba")

    assert "unknown model type `mamba`" in failures(damaged)["config"]


# ---- files ----------------------------------------------------------------------------------------------------------------


def test_truncated_shard(damaged, failures):
    shard = damaged / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    found = failures(damaged)

    assert ["files"] == list(found)
    assert f"`{shard}` is truncated" in found["files"]


def test_lost_shard(damaged, failures):
    (damaged / "model-00002-of-00003.safetensors").unlink()

    assert "is missing, though the index names it" in failures(damaged)["files"]


def test_swapped_shards(damaged, failures):
    first, second = (damaged / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    first.rename(damaged / "aside")
    second.rename(first)
    (damaged / "aside").rename(second)

    found = failures(damaged)["files"]
    assert "is not in `model-00001-of-00003.safetensors`, where `" in found
    assert "model.safetensors.index.json` has it" in found


def test_a_shard_of_another_model(copy, tiny_model, rounded, failures, forget_hashes):
    """Rounded to nearest instead of calibrated: the same names and shapes."""
    directory, name = copy(), "model-00001-of-00003.safetensors"
    shutil.copy(rounded() / name, directory / name)

    assert f"`{name}` is not what was written" == failures(directory)["hashes"]
    assert "logits" in failures(forget_hashes(directory))


def test_a_lost_file_that_no_loader_misses(copy, failures):
    directory = copy()
    (directory / "generation_config.json").unlink()

    assert {"hashes": "`generation_config.json` is missing"} == failures(directory)


def test_a_tensor_that_the_index_does_not_know(damaged, failures):
    index = damaged / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    del places["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(places))

    assert {"files": "the index does not know `model.norm.weight`"} == failures(damaged)


@pytest.mark.parametrize("content", (None, "{", "[]", pytest.param('{"a":' * 3000 + "1" + "}" * 3000, id="deep")))
def test_what_is_no_model_directory_is_an_error(tmp_path, content):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError):
        verify(tmp_path)


def test_a_model_without_weights_is_an_error(damaged):
    for file in damaged.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no"):
        verify(damaged)


def test_a_dense_model_is_an_error(tiny_llama):
    with pytest.raises(FormatError, match="is not quantised"):
        verify(tiny_llama)


@pytest.mark.timeout(60)
def test_a_page_has_no_bin_for_a_scale_that_is_no_number(copy, edit):
    """Bins reach from the smallest scale to the largest, and there is no end to those of infinity."""
    directory = copy()
    with edit(directory, f"{LINEAR}.scales") as tensors:
        tensors[f"{LINEAR}.scales"][0, 0], tensors[f"{LINEAR}.scales"][0, 1] = torch.nan, torch.inf

    assert len(gather(directory, None).weights.scales) < 1000
