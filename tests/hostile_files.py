"""A model directory of a few kilobytes in which every file can be damaged: nothing in it is ever computed with."""

import json
import struct
from pathlib import Path
from typing import Any

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "float16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": True, "group_size": 128}}},
    "ignore": ["lm_head", "re:.*down_proj"],
}
MANIFEST = {
    "tool": {"name": "marlin-tools", "version": "0.1.0"},
    "stage": "quantize",
    "fingerprint": "f" * 64,
    "model": {"origin": "somewhere", "fingerprint": "e" * 64},
    "calibration": {"source": "demo", "sequences": 2, "tokens": 16, "seqlen": 8, "notes": []},
    "settings": {"preset": "default"},
    "solver": {"kind": "gptq"},
    "linears": [{"name": "a", "shape": [8, 8], "output_error": 0.1, "weight_error": 0.1, "damp": None}],
    "kept": {"b": "matches"},
    "versions": {"torch": "2"},
    "warnings": ["one"],
    "files": {"config.json": "0" * 64},
    "times": {"seconds": 1.0, "stages": {"quantize": {"seconds": 1.0}}},
}


def tensors(blocks: int = 2) -> dict[str, tuple[str, list[int]]]:
    """Names, types and shapes."""
    found = {"model.embed_tokens.weight": ("F16", [16, 8]), "model.norm.weight": ("F16", [8])}
    for block in range(blocks):
        found[f"model.layers.{block}.self_attn.q_proj.weight"] = ("F16", [8, 8])
        found[f"model.layers.{block}.input_layernorm.weight"] = ("F16", [8])
    return found


def header(content: dict[str, tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of 16-bit tensors, and how many bytes of data follow it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in content.items():
        count = 2
        for size in shape:
            count *= size
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    return entries, end


def safetensors(entries: dict[str, Any] | bytes, data: int) -> bytes:
    """The bytes of a file with this header and so many zeros."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def write_model(folder: Path, **config: Any) -> Path:
    """Two shards with an index, config.json, manifest.json and a tokenizer's settings."""
    folder.mkdir(exist_ok=True)
    everything = list(tensors().items())
    places = {}
    for number, part in enumerate((everything[:3], everything[3:]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        (folder / name).write_bytes(safetensors(*header(dict(part))))
        places |= dict.fromkeys(dict(part), name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": places})
    write_json(folder / "config.json", CONFIG | config)
    write_json(folder / "manifest.json", MANIFEST)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return folder


def write_json(path: Path, content: Any) -> None:
    """Replace a file."""
    path.write_text(json.dumps(content), encoding="utf-8")
