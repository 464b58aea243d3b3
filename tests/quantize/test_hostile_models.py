"""Models that cannot be quantised: one clear error that names the thing, and nothing left that loads."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_tools.backends import load
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress import job
from marlin_tools.compress.quantize import QuantizeSettings
from marlin_tools.errors import FormatError, MarlinToolsError, ModelError, NumericalError
from marlin_tools.stream.inventory import check_shapes, take_linears

Run = Callable[..., Checkpoint]


@pytest.fixture
def victim(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "victim"))


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., MarlinToolsError]:
    """Run, expect this error with a hint, and check that no result exists."""

    def call(model: Path | str, kind: type[MarlinToolsError], message: str, **settings: object) -> MarlinToolsError:
        with pytest.raises(kind, match=message) as refusal:
            run(model, **settings)
        assert refusal.value.hint
        assert "\n" not in refusal.value.message
        assert not (tmp_path / "out").exists()
        with pytest.raises(ModelError):
            Checkpoint.open(tmp_path / "out.partial" / "model")
        return refusal.value

    return call


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_missing_model(refused: Callable[..., MarlinToolsError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("nowhere", ModelError, "`nowhere` is no directory, no hub id")
    refused("./nowhere", ModelError, "there is no directory `./nowhere`")
    refused("../no where", ModelError, "there is no directory `../no where`")
    (tmp_path / "a.gguf").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("a.gguf", "./a.gguf", str(tmp_path / "a.gguf")):
        refused(name, ModelError, f"`{name}` is a file, not a model")
    for name in ("-x/y", "x--y/z", "x/y..z", "x/y.git", "\u00fcn\u00ef/x", "a/b/c", "a/" + "b" * 200):
        refused(name, ModelError, "is no directory, no hub id")
    refused("someone/not-in-the-cache", ModelError, "neither a local directory|not in the local cache")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", ModelError, "holds no config.json")


def test_pickles_are_not_read(victim: Path, refused: Callable[..., MarlinToolsError]) -> None:
    (victim / "model.safetensors").rename(victim / "pytorch_model.bin")
    error = refused(victim, ModelError, r"holds no \*\.safetensors")
    assert "pickles can run code" in (error.hint or "")


def test_truncated_weights(victim: Path, refused: Callable[..., MarlinToolsError]) -> None:
    whole = (victim / "model.safetensors").read_bytes()
    (victim / "model.safetensors").write_bytes(whole[:-10])
    refused(victim, ModelError, "is truncated: its header promises")
    (victim / "model.safetensors").write_bytes(whole[:100])
    refused(victim, ModelError, "is truncated inside its header")
    (victim / "model.safetensors").write_bytes(b"")
    refused(victim, ModelError, "truncated")


def test_missing_and_broken_shards(victim: Path, refused: Callable[..., MarlinToolsError]) -> None:
    weight_map = dict.fromkeys(load_file(victim / "model.safetensors"), "model.safetensors")
    index = victim / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": "model-00002.safetensors"}}))
    refused(victim, ModelError, "model-00002.safetensors` is missing, though the index names it")
    (victim / "model-00002.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0this is no JSON!")
    refused(victim, ModelError, "is not a safetensors file")
    index.write_text("{")
    refused(victim, ModelError, "cannot be read as JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(victim: Path, refused: Callable[..., MarlinToolsError], value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    change_weights(victim, poison)
    refused(victim, ModelError, r"model\.layers\.1\.mlp\.up_proj\.weight` holds NaN or infinite")


@pytest.mark.parametrize("settings", [{"preset": "rtn"}, {"preset": "default"}, {"sparsity": "2:4", "keep_dense": "40%"}])
def test_a_weight_that_no_scale_reaches_is_told_with_its_linear(
    victim: Path, refused: Callable[..., MarlinToolsError], settings: dict[str, str]
) -> None:
    """Of linears that are solved together, the one to be named in `--ignore` is told."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})
        tensors["model.layers.1.self_attn.k_proj.weight"][2, 3] = 1e7

    change_weights(victim, change)
    error = refused(
        victim, NumericalError, r"^`model\.layers\.1\.self_attn\.k_proj`, whose largest weight is 1e\+07: ", **settings
    )
    assert "--ignore" in (error.hint or "")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("preset", ["rtn", "fast"])
def test_what_is_kept_is_looked_at_as_well(
    victim: Path, refused: Callable[..., MarlinToolsError], name: str, preset: str
) -> None:
    change_weights(victim, lambda tensors: tensors[name].view(-1)[3].fill_(float("nan")))
    refused(victim, ModelError, f"{name}` holds NaN or infinite", preset=preset)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("num_nextn_predict_layers", 10**8, "num_nextn_predict_layers"),
        ("num_nextn_predict_layers", True, "num_nextn_predict_layers"),
        ("num_labels", 10**9, "num_labels"),
        ("vision_config", {"depth": 10**7}, "vision_config.depth"),
        ("audio_config", {"num_hidden_layers": 10**7}, "audio_config.num_hidden_layers"),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}, "rope_scaling.factor"),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn", "factor": -1.0}}, "rope_parameters.full_attention.factor"),
        ("rope_parameters", {"rope_type": "longrope", "long_factor": [1.0, -1.0]}, "rope_parameters.long_factor.1"),
    ],
)
def test_sizes_that_would_take_all_memory_and_factors_that_cannot_be(
    victim: Path, refused: Callable[..., MarlinToolsError], key: str, value: object, named: str
) -> None:
    change_config(victim, **{key: value})
    refused(victim, ModelError, f"config.json`: `{named}` must be")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"eos_token_id": ', "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"eos_token_id": "x"}', "`eos_token_id.*` must be"),
        ('{"eos_token_id": []}', "`eos_token_id.*` "),
        ('{"pad_token_id": 1.5}', "`pad_token_id` must be"),
    ],
)
def test_a_generation_config_is_read_before_the_work(
    victim: Path, refused: Callable[..., MarlinToolsError], content: str, told: str
) -> None:
    (victim / "generation_config.json").write_text(content)
    refused(victim, ModelError, f"generation_config.json`:? {told}")


@pytest.mark.parametrize("content", ['{"cache_implementation": "foo"}', '{"compile_config": 3}', '{"watermarking_config": 3}'])
def test_a_generation_config_that_transformers_refuses_is_one_line(victim: Path, content: str) -> None:
    (victim / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"generation_config.json` is not understood by transformers: .") as refusal:
        load(victim, device="cpu")
    assert "\n" not in refusal.value.message


def test_a_tokenizer_that_is_not_there_is_not_made_up(victim: Path) -> None:
    for file in victim.glob("tokenizer*"):
        file.unlink()
    for model_type in ("llama", "qwen3_moe", "gemma3"):  # of the latter two a library makes one without words
        change_config(victim, model_type=model_type)
        with pytest.raises(ModelError, match="the tokenizer cannot be loaded: there is none"):
            Checkpoint.open(victim).tokenizer()


def test_outputs_as_tuples_are_not_asked_for(victim: Path, run: Run) -> None:
    change_config(victim, return_dict=False)
    assert run(victim, preset="fast").quantization


def test_why_transformers_refuses_is_told(victim: Path, refused: Callable[..., MarlinToolsError]) -> None:
    change_config(victim, num_attention_heads=3)
    refused(victim, ModelError, "validate_architecture.: .*attention heads")


def test_blocks_that_config_does_not_know(victim: Path, refused: Callable[..., MarlinToolsError]) -> None:
    change_config(victim, num_hidden_layers=1)
    refused(victim, ModelError, "`num_hidden_layers` is 1, but there are 2", preset="rtn")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "nonsense"), ("rope_parameters", {"rope_type": "nonsense"}), ("num_attention_heads", 3), ("head_dim", 7)],
)
def test_values_that_transformers_refuses(
    victim: Path,
    refused: Callable[..., MarlinToolsError],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    key: str,
    value: object,
) -> None:
    """Our one line is all that is said: transformers' own warnings are about what is refused."""
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    change_config(victim, **{key: value})
    refused(victim, ModelError, "config.json")
    log.removeHandler(caplog.handler)
    assert [] == [record.message for record in caplog.records if record.name.startswith("transformers")]
    assert not (tmp_path / "out.partial").exists()


def test_a_missing_tensor(victim: Path, refused: Callable[..., MarlinToolsError]) -> None:
    change_weights(victim, lambda tensors: tensors.__delitem__("model.layers.0.self_attn.o_proj.weight"))
    refused(victim, ModelError, r"has no tensor `model\.layers\.0\.self_attn\.o_proj\.weight`")


@pytest.mark.parametrize("name", ["lm_head", "model.norm", "model.embed_tokens"])
def test_what_no_block_needs_is_missed_before_the_work(victim: Path, name: str) -> None:
    change_weights(victim, lambda tensors: tensors.__delitem__(f"{name}.weight"))
    with pytest.raises(ModelError, match=rf"lacks `{name}\.weight`, which config\.json asks for"):
        check_shapes(take_linears(Checkpoint.open(victim), ()))


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_what_is_tied_may_lie_under_either_name(victim: Path, name: str) -> None:
    change_config(victim, tie_word_embeddings=True)
    change_weights(victim, lambda tensors: tensors.__delitem__(f"{name}.weight"))
    check_shapes(take_linears(Checkpoint.open(victim), ()))


def test_a_tensor_that_the_model_has_no_place_for_is_told_before_the_work(
    victim: Path, refused: Callable[..., MarlinToolsError]
) -> None:
    change_weights(victim, lambda tensors: tensors.update({"extra.weight": torch.ones(4, 4).half()}))
    refused(victim, ModelError, r"holds `extra\.weight`, which the model of config\.json has no place for")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,)),
        ("mtp.fc.weight", (256, 512)),
        ("model.layers.2.eh_proj.weight", (256, 512)),
        ("model.layers.0.mlp.up_proj.bias", (512,)),
    ],
)
def test_tensors_that_nobody_reads_do_no_harm(victim: Path, run: Run, name: str, shape: tuple[int, ...]) -> None:
    """Buffers of old writers, heads that predict ahead, and biases of zeros."""
    change_config(victim, num_nextn_predict_layers=1)
    change_weights(victim, lambda tensors: tensors.update({name: torch.zeros(shape).half()}))
    check_shapes(take_linears(Checkpoint.open(victim), ()))
    load(run(victim, preset="rtn").path, device="cpu")


def test_a_tokenizer_that_may_not_be_read_is_told_before_the_work(
    victim: Path, refused: Callable[..., MarlinToolsError], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def closed(path: Path, *flags: int, **rest: int) -> int:
        if Path(path).parent == victim and Path(path).name == "tokenizer.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *flags, **rest)

    monkeypatch.setattr(os, "open", closed)
    monkeypatch.setattr(job, "compress_blocks", lambda *_: pytest.fail("work was done"))
    refused(victim, ModelError, r"tokenizer\.json` cannot be read: Permission denied", preset="rtn")


def test_config_and_weights_of_different_models(victim: Path, refused: Callable[..., MarlinToolsError]) -> None:
    change_config(victim, intermediate_size=768)
    refused(victim, ModelError, "config.json asks for")


def test_dead_channels_and_zero_rows_are_quantized(victim: Path, run: Run) -> None:
    def kill(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][7] = 0
        tensors["model.layers.0.mlp.gate_proj.weight"][11] = 0

    change_weights(victim, kill)
    run(victim, preset="default")


def test_mixture_of_experts_and_unknown_types(victim: Path, refused: Callable[..., MarlinToolsError]) -> None:
    change_config(victim, model_type="mamba")
    refused(victim, ModelError, "unknown model type `mamba`")
    change_config(victim, model_type="llama")

    def give_experts(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.0.gate_proj.weight"] = tensors["model.layers.1.mlp.gate_proj.weight"].clone()

    change_weights(victim, give_experts)
    refused(victim, ModelError, r"mixture of experts \(`model\.layers\.1\.mlp\.experts\.0")


def test_blocks_that_share_keys_are_refused_by_the_key_of_config_json(
    tiny_model: Callable[..., Path], refused: Callable[..., MarlinToolsError]
) -> None:
    own = {"hidden_size_per_layer_input": 0, "global_head_dim": 64, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny_model("gemma4_text", sliding_window=16, layer_types=kinds, **own)
    refused(model, ModelError, r"share what another computes are not known \(`num_kv_shared_layers` is 2 in config\.json\)")


def test_shapes_that_do_not_fit_name_the_layers(
    tiny_model: Callable[..., Path], refused: Callable[..., MarlinToolsError]
) -> None:
    narrow = tiny_model("llama", intermediate_size=448)
    error = refused(narrow, FormatError, r"model\.layers\.0\.mlp\.down_proj`: 448 inputs are not a multiple of group_size 128")
    assert "use `--group-size 64` or `--group-size 32`, which fit all linears, or `--group-size auto`" in (error.hint or "")
    refused(narrow, FormatError, "mlp.gate_proj", format="marlin")
    with pytest.raises(ValueError, match="unknown format `marlim`"):
        QuantizeSettings(format="marlim")


def test_where_only_the_zeros_are_lacking_the_hint_says_so(
    tiny_model: Callable[..., Path], refused: Callable[..., MarlinToolsError]
) -> None:
    message = r"cannot hold `.*q_proj`: .*; `.*k_proj`: .*; `.*v_proj`: weights are not 2:4 sparse and 11 more"
    error = refused(tiny_model("llama"), FormatError, message, format="marlin-24")
    assert error.hint == "add `--sparsity 2:4`, or use another `--format`"
    narrow = tiny_model("llama", intermediate_size=448)
    assert "--sparsity" not in (refused(narrow, FormatError, "2:4 sparse", format="marlin-24").hint or "")


def test_a_quantized_model_is_not_quantized_again(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    first = run(tiny_llama, "first")
    with pytest.raises(ModelError, match="already quantised") as caught:
        run(first.path, "second")
    assert "`marlin-tools export " in str(caught.value.hint)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "unknown layout `float-quantized`"),
        ({"quant_method": "bitsandbytes"}, "unknown quant_method `bitsandbytes`"),
    ],
)
def test_what_export_cannot_read_is_not_sent_to_it(
    victim: Path, refused: Callable[..., MarlinToolsError], scheme: dict[str, str], said: str
) -> None:
    change_config(victim, quantization_config=scheme)
    hint = refused(victim, ModelError, "already quantised").hint or ""
    assert f"start from the original model (`quantization_config`: {said}" in hint
    assert "export" not in hint


def test_nothing_left_to_quantize(tiny_llama: Path, refused: Callable[..., MarlinToolsError]) -> None:
    refused(tiny_llama, ModelError, "no linear is left", ignore=(".*",))
    with pytest.raises(ValueError, match=r"the pattern `\(` is no regular expression"):  # before there is a model
        QuantizeSettings(ignore=("(",))
    refused(tiny_llama, ModelError, "`--ignore dwon_proj` matches nothing", ignore=("q_proj", "dwon_proj"))


def test_a_tokenizer_that_cannot_be_loaded(victim: Path) -> None:
    (victim / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="`model` is missing"):
        Checkpoint.open(victim).tokenizer()


def test_files_that_no_manifest_could_name_are_refused_before_the_work(
    victim: Path, refused: Callable[..., MarlinToolsError]
) -> None:
    (victim / "n\udcff.txt").touch()
    refused(victim, ModelError, r"the name of `.*` is no text in UTF-8", preset="rtn")
