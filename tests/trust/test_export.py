"""Any format into any other: the same bits, the same files around them, and a refusal before the work where it cannot be."""

import json
from pathlib import Path

import pytest
import torch

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.writer import ModelWriter
from marlin_tools.compress import export as stage
from marlin_tools.compress.export import export
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.errors import FormatError, ModelError, OutputError
from marlin_tools.formats.contents import Contents
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.verification.checks import check_config
from marlin_tools.verification.verify import verify

DENSE = ("gptq", "marlin", "compressed-tensors")


def same_tensors(a, b):
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def manifest_of(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def test_round_trip_through_all_dense_formats(in_format, tensors_of, tmp_path):
    path = in_format("gptq")
    for step, name in enumerate(("marlin", "compressed-tensors", "gptq")):
        path = export(path, name, tmp_path / str(step)).path

    assert same_tensors(tensors_of(in_format("gptq")), tensors_of(path))
    assert config_of(in_format("gptq")) == config_of(path)


@pytest.mark.parametrize("name", DENSE)
def test_its_own_format_makes_a_copy(in_format, tmp_path, name):
    source = in_format(name)
    copied = export(source, name, tmp_path / "copy").path

    written = {file.relative_to(source) for file in source.rglob("*") if file.is_file()}
    assert written == {file.relative_to(copied) for file in copied.rglob("*") if file.is_file()}
    assert [f for f in written if f.name != "manifest.json" and (source / f).read_bytes() != (copied / f).read_bytes()] == []


@pytest.mark.parametrize("name", ("marlin", "compressed-tensors"))
def test_everything_but_the_linears_is_taken_over(in_format, tensors_of, name):
    source, made = in_format("gptq"), in_format(name)
    ours = {n: t for n, t in tensors_of(source).items() if "_proj" not in n}

    assert same_tensors(ours, {n: t for n, t in tensors_of(made).items() if "_proj" not in n})
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "verify/reference.safetensors"):
        assert (source / file).read_bytes() == (made / file).read_bytes()
    plain = config_of(source)
    assert {k: v for k, v in plain.items() if k != "quantization_config"} == {
        k: v for k, v in config_of(made).items() if k != "quantization_config"
    }


@pytest.mark.parametrize("name", ("marlin", "compressed-tensors"))
def test_shards_are_kept(in_format, name):
    def shards(directory):
        places = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        return {tensor.rpartition(".")[0]: file for tensor, file in places.items()}

    assert len(set(shards(in_format("gptq")).values())) == 3
    assert shards(in_format("gptq")) == shards(in_format(name))


def test_large_shards_are_cut(in_format, foreign, tensors_of, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SHARD_BYTES", 100_000)
    made = export(foreign, "compressed-tensors", tmp_path / "cut").path

    assert len(list(made.glob("model-*.safetensors"))) > 5
    linears = {n: t for n, t in tensors_of(made).items() if not n.endswith(".bias")}
    assert same_tensors(dict(sorted(tensors_of(in_format("compressed-tensors")).items())), dict(sorted(linears.items())))


def test_manifest_keeps_the_facts_and_says_what_changed(in_format):
    before, after = manifest_of(in_format("gptq")), manifest_of(in_format("marlin"))

    kept = ("model", "calibration", "solver", "settings", "linears", "kept", "device", "warnings")
    assert {key: before[key] for key in kept} == {key: after[key] for key in kept}
    assert ("quantize", "gptq") == (before["stage"], before["format"])
    assert ("export", "marlin") == (after["stage"], after["format"])
    assert {"format": "gptq", "stage": "quantize", "fingerprint": Checkpoint.open(in_format("gptq")).fingerprint} == {
        key: after["source"][key] for key in ("format", "stage", "fingerprint")
    }
    assert before["fingerprint"] != after["fingerprint"]
    assert set(after["files"]) == {
        file.relative_to(in_format("marlin")).as_posix() for file in in_format("marlin").rglob("*") if file.is_file()
    } - {"manifest.json"}


def test_the_same_export_twice_is_the_same_bytes(in_format, tmp_path):
    first, second = (export(in_format("gptq"), "marlin", tmp_path / name).path for name in "ab")
    without_times = [{k: v for k, v in manifest_of(path).items() if k != "times"} for path in (first, second)]

    assert without_times[0] == without_times[1]


def test_repeating_an_export_does_nothing(in_format, tmp_path):
    made = export(in_format("gptq"), "marlin", tmp_path / "out").path
    stamp = (made / "config.json").stat().st_mtime_ns
    notes = []
    export(in_format("gptq"), "marlin", tmp_path / "out", emit=lambda event: notes.append(event.text))

    assert stamp == (made / "config.json").stat().st_mtime_ns
    assert any("already holds this result" in note for note in notes)


def test_a_different_result_is_not_overwritten_unasked(in_format, tmp_path):
    export(in_format("gptq"), "marlin", tmp_path / "out")
    with pytest.raises(OutputError, match="exists and is not empty"):
        export(in_format("gptq"), "compressed-tensors", tmp_path / "out")

    made = export(in_format("gptq"), "compressed-tensors", tmp_path / "out", overwrite=True)
    assert "compressed-tensors" == made.config["quantization_config"]["quant_method"]


def test_kept_linears_stay_and_are_listed(rounded, tmp_path):
    source = rounded(settings={"ignore": (r"0\.mlp\.down_proj$",)})
    made = export(source, "compressed-tensors", tmp_path / "out")

    assert "model.layers.0.mlp.down_proj.weight" in made
    assert ["model.layers.0.mlp.down_proj", "lm_head"] == made.config["quantization_config"]["ignore"]


@pytest.mark.parametrize("name", ("marlin", "compressed-tensors"))
def test_another_tools_checkpoint(foreign, in_format, tmp_path, name):
    made = export(foreign, name, tmp_path / "out")
    ours, theirs = StoredLinears(Checkpoint.open(in_format("gptq"))), StoredLinears(made)

    assert len(ours.names) == 14
    assert ours.names == theirs.names
    for linear in ours.names:
        a, b = ours.read(linear), theirs.read(linear)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)
    assert "model.layers.0.mlp.down_proj.bias" in made
    assert not (made.path / "quantize_config.json").exists()
    facts = manifest_of(made.path)
    assert (None, "export", 14) == (facts["calibration"], facts["stage"], len(facts["linears"]))


def test_version_2_of_gptq_becomes_version_1(foreign, edit, edit_json, in_format, tmp_path):
    name = "model.layers.0.mlp.down_proj.qzeros"
    with edit(foreign, name) as tensors:
        for zeros in (t for n, t in tensors.items() if n.endswith("qzeros")):
            zeros.fill_(-0x77777778)  # eight nibbles of 8
    config = config_of(foreign)["quantization_config"] | {"checkpoint_format": "gptq_v2"}
    edit_json(foreign / "config.json", quantization_config=config)
    made = export(foreign, "gptq", tmp_path / "out")

    assert torch.equal(Checkpoint.open(in_format("gptq")).read(name), made.read(name))
    assert "gptq" == made.config["quantization_config"]["checkpoint_format"]


def bfloat16(model: Path, edit, edit_json) -> Path:
    with edit(model, "model.norm.weight") as tensors:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}
    edit_json(model / "config.json", dtype="bfloat16")
    return model


def test_bfloat16_models_lose_nothing(tiny_llama, rounded, edit, edit_json, tensors_of, tmp_path):
    source = rounded(source=bfloat16(tiny_llama, edit, edit_json))
    there = export(source, "compressed-tensors", tmp_path / "there")
    back = export(there, "gptq", tmp_path / "back")

    assert torch.bfloat16 == there.read("model.layers.0.mlp.up_proj.weight_scale").dtype
    assert same_tensors(tensors_of(source), tensors_of(back.path))


def test_scales_that_bfloat16_cannot_hold_are_refused(tiny_llama, rounded, edit, edit_json, tmp_path):
    source = rounded(source=bfloat16(tiny_llama, edit, edit_json))
    with edit(source, "model.layers.1.mlp.up_proj.scales") as tensors:
        tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = 1 + 2**-10
    with pytest.raises(FormatError, match=r"cannot hold `model.layers.1.mlp.up_proj`: .*not exact in bfloat16"):
        export(source, "compressed-tensors", tmp_path / "out")

    assert [] == list(tmp_path.glob("out*"))
    assert export(source, "marlin", tmp_path / "out").path.is_dir()


def test_shapes_that_the_target_cannot_hold_are_refused(rounded, tmp_path):
    source = rounded(num_key_value_heads=2)
    with pytest.raises(FormatError, match=r"`marlin` cannot hold `.*\.0\.self_attn\.k_proj`: 128 outputs") as caught:
        export(source, "marlin", tmp_path / "out")

    assert caught.value.message.endswith("; and 1 more")
    assert caught.value.hint == "choose another `--format`: gptq, compressed-tensors"  # its codes are not 2:4
    assert [] == list(tmp_path.glob("out*"))


def test_no_other_format_is_named_that_cannot_hold_the_shapes_either(rounded, tmp_path):
    source = rounded(num_key_value_heads=1, head_dim=32)
    for target in ("marlin", "marlin-24"):
        with pytest.raises(FormatError, match=rf"`{target}` cannot hold `.*\.0\.self_attn\.k_proj`: 32 outputs") as caught:
            export(source, target, tmp_path / "out")
        assert caught.value.hint == "choose another `--format`: gptq, compressed-tensors"


def test_a_sparse_format_is_named_for_codes_that_are_2_4(tiny_model, tmp_path):
    narrow = prune(
        tiny_model("llama", num_key_value_heads=2), None, PruneSettings(preset="magnitude", device="cpu"), tmp_path / "2of4"
    )
    source = quantize(narrow, None, QuantizeSettings(preset="rtn", format="gptq", device="cpu"), tmp_path / "int4")
    with pytest.raises(FormatError, match="128 outputs") as caught:
        export(source, "marlin", tmp_path / "out")
    assert caught.value.hint == "choose another `--format`: gptq, compressed-tensors, marlin-24"


def test_dense_codes_are_refused_by_a_sparse_format(in_format, tmp_path):
    with pytest.raises(
        FormatError, match=r"cannot hold `[^`]*\.0\.mlp\.down_proj`: output 0 has more than two nonzeros"
    ) as caught:
        export(in_format("gptq"), "marlin-24", tmp_path / "out")

    assert caught.value.message.endswith("; and 11 more")
    assert [] == list(tmp_path.glob("out*"))


def test_sparse_codes_go_into_the_sparse_format_and_back(sparse, tensors_of, tmp_path):
    there = export(sparse, "marlin-24", tmp_path / "there")
    back = export(there, "gptq", tmp_path / "back")

    assert there.nbytes < Checkpoint.open(sparse).nbytes
    assert same_tensors(tensors_of(sparse), tensors_of(back.path))


def test_mixed_group_sizes_go_where_config_json_can_say_it(copy, edit, tmp_path):
    source = copy()
    name = "model.layers.0.mlp.down_proj"
    with edit(source, f"{name}.scales") as tensors:
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"].repeat_interleave(2, dim=0)
        tensors[f"{name}.qzeros"] = tensors[f"{name}.qzeros"].repeat_interleave(2, dim=0)
        tensors[f"{name}.g_idx"] = torch.arange(512, dtype=torch.int32) // 64
    with pytest.raises(FormatError, match="mixes group sizes: 64, 128"):
        export(source, "gptq", tmp_path / "out")
    there = export(source, "compressed-tensors", tmp_path / "out")
    assert 64 == StoredLinears(there).read(name).group_size
    assert check_config(there).ok
    groups = config_of(there.path)["quantization_config"]["config_groups"]
    assert [name] == next(group["targets"] for group in groups.values() if group["weights"]["group_size"] == 64)


def test_quantized_caches_are_refused(copy, edit_json, tmp_path):
    source = copy("compressed-tensors")
    config = config_of(source)["quantization_config"] | {"kv_cache_scheme": {"num_bits": 8}}
    edit_json(source / "config.json", quantization_config=config)
    with pytest.raises(FormatError, match="`kv_cache_scheme` cannot be carried over"):
        export(source, "gptq", tmp_path / "out")


@pytest.mark.parametrize("suffix", ("weight_g_idx", "weight_zero_point"))
def test_tensors_that_change_what_codes_stand_for_are_refused(copy, edit, tmp_path, suffix):
    source, name = copy("compressed-tensors"), "model.layers.0.self_attn.q_proj"
    with edit(source, f"{name}.weight_packed") as tensors:
        tensors[f"{name}.{suffix}"] = torch.zeros(8, dtype=torch.int32)
    for target in ("gptq", "compressed-tensors"):
        with pytest.raises(FormatError, match=f"`{name}.{suffix}` belongs to a quantised linear") as caught:
            export(source, target, tmp_path / "out")
        assert caught.value.hint
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ("extra.weight", "extra.qweight", "extra.B"))
def test_tensors_that_no_model_reads_are_refused_before_the_work(copy, edit, tmp_path, name):
    source, shape = copy(), (8, 32)
    with edit(source, "model.norm.weight") as tensors:
        tensors[name] = torch.ones(shape, dtype=torch.int32)
        if name == "extra.qweight":  # a whole linear
            tensors |= {"extra.qzeros": torch.full((1, 4), 0x77777777, dtype=torch.int32), "extra.scales": torch.ones(1, 32)}
            tensors["extra.g_idx"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(ModelError, match=f"`{name}`.*no place for") as caught:
        export(source, "compressed-tensors", tmp_path / "out")
    assert caught.value.hint
    assert [] == list(tmp_path.glob("out*"))


def test_heads_that_predict_ahead_are_taken_over(copy, edit, tmp_path):
    source = copy()
    with edit(source, "model.norm.weight") as tensors:
        tensors["mtp.fc.weight"] = torch.ones(8, 8).half()

    assert "mtp.fc.weight" in export(source, "marlin", tmp_path / "out")


def test_a_config_that_makes_no_model_is_refused_before_the_work(copy, edit_json, tmp_path):
    source = copy()
    edit_json(source / "config.json", text_config={})
    with pytest.raises(ModelError, match=r"config.json` is not understood by transformers"):
        export(source, "marlin", tmp_path / "out")
    assert [] == list(tmp_path.glob("out*"))


def test_a_reference_that_cannot_be_read_is_told_before_the_work(copy, tmp_path):
    source = copy()
    reference = source / "verify" / "reference.safetensors"
    reference.write_bytes(reference.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"reference.safetensors` is truncated") as caught:
        export(source, "marlin", tmp_path / "out")
    assert "or remove it" in caught.value.hint
    assert [] == list(tmp_path.glob("out*"))

    reference.unlink()
    assert export(source, "marlin", tmp_path / "out").path.is_dir()


def test_a_dense_model_is_refused(tiny_llama, tmp_path):
    with pytest.raises(FormatError, match="is not quantised") as caught:
        export(tiny_llama, "gptq", tmp_path / "out")

    assert "marlin-tools quantize" in caught.value.hint


def test_an_unknown_format_is_refused(in_format, tmp_path):
    with pytest.raises(FormatError, match="unknown format `gtpq`") as caught:
        export(in_format("gptq"), "gtpq", tmp_path / "out")

    assert "did you mean `gptq`?" in caught.value.hint


def test_an_interrupted_export_leaves_nothing(in_format, tmp_path, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelWriter, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(in_format("gptq"), "marlin", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))  # it would begin anew, and a full disk would stay full

    monkeypatch.undo()
    assert export(in_format("gptq"), "marlin", tmp_path / "out").path.is_dir()
    assert [tmp_path / "out"] == list(tmp_path.glob("out*"))


def test_a_linear_of_one_group_has_the_group_size_of_the_others(rounded, tmp_path):
    """With K = 128, one group of 128 is also one scale per output: both say the same."""
    source = rounded("llama", hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    checkpoint = export(source, "compressed-tensors", tmp_path / "out")

    assert {128} == Contents(checkpoint).group_sizes
    assert verify(checkpoint.path).ok
