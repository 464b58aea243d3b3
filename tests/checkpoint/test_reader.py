"""What a model directory may say, and what is refused: one error of ours that names file, key and rule, and no more."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hostile_files import CONFIG, MANIFEST, QUANTIZATION, header, safetensors, tensors, write_json, write_model
from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import skeleton
from marlin_tools.checkpoint.tokenizer_files import panics_unprinted
from marlin_tools.errors import ModelError
from marlin_tools.verification.inspect import inspect

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def refused(model: Path, rule: str) -> ModelError:
    with pytest.raises(ModelError, match=rule) as refusal:
        Checkpoint.open(model)
    error = refusal.value
    assert error.hint
    assert len(error.message) <= 500
    assert error.message.isprintable()
    return error


def test_the_undamaged_model_opens(model: Path) -> None:
    assert sorted(tensors()) == Checkpoint.open(model).names()
    assert MANIFEST == read_manifest(model)


def test_a_directory_of_models_names_them(model: Path) -> None:
    (model.parent / "notes").mkdir()

    assert refused(model.parent, "holds no config.json").hint == f"name a model in it: `{model}`"


# ---- names and links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a\nb", "x" * 300, ".x"]
)
def test_an_index_names_files_of_its_directory(model: Path, name: str) -> None:
    (model.parent / "x.safetensors").write_bytes((model / SHARD).read_bytes())
    places = json.loads((model / INDEX).read_text())["weight_map"]
    write_json(model / INDEX, {"weight_map": places | {"model.norm.weight": name}})
    refused(model, "`weight_map.*must be the plain name of a file")


@pytest.mark.parametrize("name", [SHARD, "notes.txt", "tokenizer.json", "LICENSE", "config.json", INDEX, "manifest.json"])
def test_links_out_of_the_directory_are_refused(model: Path, name: str) -> None:
    elsewhere = model.parent / "elsewhere"
    elsewhere.write_bytes((model / name).read_bytes() if (model / name).exists() else b"{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(elsewhere)
    refused(model, f"{name}` is a link out of its directory")


def test_one_whole_file_is_the_model_whatever_lies_beside_it(model: Path) -> None:
    names = Checkpoint.open(model).names()
    tensors = {name: Checkpoint.open(model).read(name) for name in names}
    for file in (*model.glob("*.safetensors"), *model.glob("*.index.json")):
        file.unlink()
    save_file(tensors, model / "model.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, model / "consolidated.safetensors")
    assert Checkpoint.open(model).names() == names


def test_masks_that_old_models_store_are_no_weights(model: Path) -> None:
    save_file({"model.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, model / "more.safetensors")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.layers.0.attention.bias"] = "more.safetensors"
    write_json(model / INDEX, index)
    assert Checkpoint.open(model).read("model.layers.0.attention.bias").dtype == torch.bool


def test_links_inside_and_into_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    (model / SHARD).rename(model / "blob")
    (model / SHARD).symlink_to("blob")
    Checkpoint.open(model)
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = model.rename(cache / "snapshots" / "0123")
    (snapshot / "blob").rename(cache / "blobs" / "0")
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to("../../blobs/0")
    Checkpoint.open(snapshot)


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json", "config.json"])
@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(model, f"{name}` is not an ordinary file")


@pytest.mark.parametrize("name", [SHARD, "config.json", "manifest.json"])
def test_a_file_of_somebody_else_is_neither_damaged_nor_to_be_removed(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (model / name).touch()
    opened = os.open

    def closed(path: Path, *flags: int) -> int:
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *flags)

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(ModelError, match=rf"`{model / name}` cannot be read: Permission denied") as refusal:
        (read_manifest if name == "manifest.json" else Checkpoint.open)(model)
    assert "let this user read it" in (refusal.value.hint or "")


def test_links_to_nothing_and_in_circles(model: Path) -> None:
    (model / "notes.txt").symlink_to("notes.txt")
    refused(model, "notes.txt` is a link to nothing")
    (model / "notes.txt").unlink()
    (model / "notes.txt").symlink_to("nowhere")
    refused(model, "notes.txt` is a link to nothing")


# ---- JSON -------------------------------------------------------------------------------------------------------------

BROKEN = {
    "": "cannot be read as JSON",
    "[]": "is not a JSON object",
    "null": "is not a JSON object",
    "{" * 100: "cannot be read as JSON",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested deeper than 64 levels",
    '{"a": ' + "[" * 65 + "]" * 65 + "}": "nested deeper than 64 levels",
    '{"hidden_size": ' + "9" * 5000 + "}": "an integer of 5000 digits",
    '{"a": NaN}': "`NaN` is no JSON",
    '{"a": 1e999}': "`1e999` is no finite number",
    '{"a": 1, "a": 2}': "the key `a` stands twice",
    '{"a": "\\ud800"}': "half of a surrogate pair",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:20] or "nothing")
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json", "manifest.json"])
def test_json_that_is_none(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    read = {"manifest.json": read_manifest, "tokenizer_config.json": lambda model: Checkpoint.open(model).tokenizer()}
    with pytest.raises(ModelError, match=BROKEN[text]) as refusal:
        read.get(name, Checkpoint.open)(model)
    assert name in refusal.value.message
    assert len(refusal.value.message) <= 500


def test_a_file_that_is_too_large(model: Path) -> None:
    with (model / "config.json").open("ab") as stream:
        stream.truncate(65 << 20)
    refused(model, r"config.json` has \d+ bytes, at most")


# ---- config.json ------------------------------------------------------------------------------------------------------

WRONG = [
    ("hidden_size", -8), ("hidden_size", None), ("hidden_size", "8"), ("hidden_size", 8.0), ("hidden_size", True),
    ("num_hidden_layers", 0), ("num_hidden_layers", 3), ("num_hidden_layers", 1), ("num_hidden_layers", 10**12),
    ("num_attention_heads", 0), ("num_key_value_heads", -1), ("head_dim", []), ("intermediate_size", {}),
    ("vocab_size", 10**12), ("vocab_size", 17), ("vocab_size", None), ("max_position_embeddings", "long"),
    ("rms_norm_eps", -1), ("rms_norm_eps", "x"), ("rope_parameters", []), ("hidden_act", 3), ("dtype", 16),
    ("num_experts", "4"), ("num_local_experts", 4.0), ("n_routed_experts", []), ("num_experts_per_tok", "2"),
    ("moe_intermediate_size", "64"), ("tie_word_embeddings", "yes"), ("quantization_config", "gptq"),
    ("model_type", ["llama"]), ("model_type", "x" * 1000),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_a_config_says_what_cannot_be(model: Path, key: str, value: object) -> None:
    write_json(model / "config.json", CONFIG | {key: value})
    assert f"`{key}`" in refused(model, "config.json`: ").message


def test_what_transformers_refuses_in_a_config_is_not_the_tokenizers_fault(model: Path) -> None:
    write_json(model / "config.json", CONFIG | {"attention_dropout": "much"})
    (model / "tokenizer.model").touch()
    with pytest.raises(ModelError, match=r"config\.json` is not understood by transformers: .*'attention_dropout'"):
        Checkpoint.open(model).tokenizer()


def test_a_language_model_of_no_known_kind_inside_of_a_config_is_refused(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    write_json(model / "config.json", CONFIG | {"text_config": {}})
    with pytest.raises(ModelError, match=r"config\.json` is not understood by transformers: "):
        skeleton(checkpoint, checkpoint.dtype)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_config_says_too_little(model: Path, key: str) -> None:
    write_json(model / "config.json", {name: value for name, value in CONFIG.items() if name != key})
    refused(model, f"`{key}` is missing")


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", "4"), ("config_groups", []), ("config_groups", {"a": {"targets": "Linear"}}), ("ignore", "lm_head"),
     ("ignore", [1]), ("quant_method", 1), ("group_size", 1.5), ("group_size", -2), ("dynamic", [])],
)  # fmt: skip
def test_a_quantization_says_what_cannot_be(model: Path, key: str, value: object) -> None:
    write_json(model / "config.json", CONFIG | {"quantization_config": QUANTIZATION | {key: value}})
    refused(model, rf"`quantization_config\.{key}")


@pytest.mark.parametrize("name", ["bfloat", "nn", "int8", "__class__"])
def test_a_type_that_is_none(model: Path, name: str) -> None:
    write_json(model / "config.json", CONFIG | {"dtype": name})
    with pytest.raises(ModelError, match=f"unknown dtype `{name}`"):
        Checkpoint.open(model)


# ---- safetensors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def single(model: Path) -> Path:
    for file in (*model.glob("*.safetensors"), model / INDEX):
        file.unlink()
    return model


NAME = "model.norm.weight"
ENTRIES = [
    ({"dtype": "I16"}, "stored as int16"),
    ({"dtype": "F32"}, "is 32 bytes, its offsets span 16"),
    ({"dtype": 16}, "has type 16"),
    ({"dtype": "F4"}, "has type F4"),
    ({"shape": [-8]}, "is not a list of at most 8 sizes"),
    ({"shape": [8.0]}, "is not a list of at most 8 sizes"),
    ({"shape": [True] * 8}, "is not a list of at most 8 sizes"),
    ({"shape": [1] * 9}, "is not a list of at most 8 sizes"),
    ({"shape": None}, "is not a list of at most 8 sizes"),
    ({"shape": [2**62, 2**62]}, "its offsets span 16"),
    ({"data_offsets": [0]}, r"is not \[begin, end\]"),
    ({"data_offsets": [272, 256]}, r"is not \[begin, end\]"),
    ({"data_offsets": [-16, 0]}, r"is not \[begin, end\]"),
    ({"data_offsets": "ab"}, r"is not \[begin, end\]"),
    ({"data_offsets": [0, 16]}, "do not begin where those before it end"),
    ({"data_offsets": [258, 274]}, "do not begin where those before it end"),
    ({"data_offsets": [2**62, 2**62 + 16]}, "do not begin where those before it end"),
    ({"more": 1}, "is not described by"),
]


@pytest.mark.parametrize(("change", "rule"), ENTRIES, ids=str)
def test_an_entry_of_a_header(single: Path, change: dict, rule: str) -> None:
    entries, data = header(tensors())
    entries[NAME] |= change
    (single / "model.safetensors").write_bytes(safetensors(entries, data))
    assert NAME in refused(single, rule).message or "do not begin" in rule


@pytest.mark.parametrize("entry", [None, [], "x", 3, {}])
def test_an_entry_that_is_none(single: Path, entry: object) -> None:
    entries, data = header(tensors())
    (single / "model.safetensors").write_bytes(safetensors(entries | {"x": entry}, data))
    refused(single, "`x` is not described by")


@pytest.mark.parametrize("name", ["", "a\x1b[31m", "x" * 501, "a\nb"])
def test_a_name_that_is_none(single: Path, name: str) -> None:
    entries, data = header(tensors() | {name: ("F16", [1])})
    (single / "model.safetensors").write_bytes(safetensors(entries, data))
    refused(single, "has no usable name")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (safetensors({"__metadata__": []}, 0), "does not map words to words"),
        (safetensors({"__metadata__": {"a": 1}}, 0), "does not map words to words"),
        (safetensors(*header(tensors())) + b"x", "is too long"),
        (safetensors(*header(tensors()))[:-1], "is truncated: its header promises"),
        (b"", "is truncated inside its header"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "is truncated inside its header"),
        (safetensors(b"[]", 0), "is not a safetensors file"),
        (safetensors(b'{"a": ' + b"[" * 10_000, 0), "cannot be read as JSON"),
        (safetensors(b'{"a": {"dtype": "F16", "shape": [], "data_offsets": [0, ' + b"9" * 5000 + b"]}}", 2), "5000 digits"),
        (safetensors(b"{\xff}", 0), "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_none(single: Path, content: bytes, rule: str) -> None:
    (single / "model.safetensors").write_bytes(content)
    refused(single, rule)


def test_a_header_that_is_too_long(single: Path) -> None:
    with (single / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(200_000_100)
    refused(single, "a header of 200000000 bytes")


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_that_is_none(model: Path, index: dict) -> None:
    write_json(model / INDEX, index)
    refused(model, "weight_map")


def test_an_index_that_names_what_is_elsewhere(model: Path) -> None:
    places = json.loads((model / INDEX).read_text())["weight_map"]
    write_json(model / INDEX, {"weight_map": places | {"model.norm.weight": "model-00002-of-00002.safetensors"}})
    refused(model, r"`model\.norm\.weight` is not in `model-00002")


@pytest.mark.parametrize(
    ("key", "value"),
    [("tool", None), ("tool", {"name": "x", "version": "1"}), ("files", []), ("files", {"a": 1}), ("linears", [1]),
     ("linears", [{"name": "a", "shape": [1, "x"]}]), ("history", {}), ("history", [[]]), ("warnings", "w"), ("kept", []),
     ("times", []), ("times", {"stages": {"a": 1}}), ("model", "m"), ("calibration", []), ("settings", 3),
     ("versions", {"a": None}), ("fingerprint", 3)],
)  # fmt: skip
def test_a_manifest_that_is_none_of_ours(model: Path, key: str, value: object) -> None:
    write_json(model / "manifest.json", MANIFEST | {key: value})
    with pytest.raises(ModelError, match=r"manifest\.json") as refusal:
        read_manifest(model)
    assert refusal.value.hint


PANICS = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "continuing_subword_prefix": "xyz"},
}


def test_a_panic_of_the_tokenizer_library_prints_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_json(model / "tokenizer.json", PANICS)
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded") as refusal:
        Checkpoint.open(model).tokenizer()

    assert "PanicException" == type(refusal.value.__cause__).__name__
    assert "" == capfd.readouterr().err


def test_what_others_write_while_panics_are_held_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with panics_unprinted():
        os.write(2, b"a warning\n")

    assert "a warning\n" == capfd.readouterr().err


def test_a_model_within_another_of_a_type_that_nobody_knows_can_be_looked_at(model: Path) -> None:
    write_json(model / "config.json", {"model_type": "unheard_of", "torch_dtype": "float16", "text_config": CONFIG})
    assert Checkpoint.open(model).text_config == CONFIG
    assert not inspect(model)["supported"]
