"""The fixtures of `tests/conftest.py` are what they say."""

import json
import os
import socket
from pathlib import Path

import pytest

SHAPES = {
    "self_attn.q_proj": [256, 256],
    "self_attn.k_proj": [256, 256],
    "self_attn.v_proj": [256, 256],
    "self_attn.o_proj": [256, 256],
    "mlp.gate_proj": [512, 256],
    "mlp.up_proj": [512, 256],
    "mlp.down_proj": [256, 512],
}


@pytest.mark.parametrize("family", ("llama", "mistral", "qwen2", "qwen3"))
def test_tiny_model_is_a_complete_checkpoint(family, request):
    """It has the promised shapes, loads like any other, computes something finite, and its tokenizer spells any text."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path = request.getfixturevalue(f"tiny_{family}")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == family
    with safe_open(folder / "model.safetensors", "pt") as weights:
        for block in (0, 1):
            for linear, shape in SHAPES.items():
                tensor = weights.get_slice(f"model.layers.{block}.{linear}.weight")
                assert (tensor.get_shape(), tensor.get_dtype()) == (shape, "F16"), linear

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Nine marlins, ±3 °C: 青い海\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert logits.shape == (1, ids.shape[1], 512)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.01


def test_tiny_models_are_the_test_s_own(tiny_llama, tiny_model):
    (tiny_llama / "config.json").unlink()

    assert (tiny_model("llama") / "config.json").is_file()


@pytest.mark.parametrize("host", ("192.0.2.1", "example.org", "2001:db8::1"))
def test_network_is_out_of_reach(host):
    with socket.socket() as sock, pytest.raises(RuntimeError, match=f"tried to reach `{host}`"):
        sock.connect((host, 443))
    with pytest.raises(RuntimeError, match=f"tried to reach `{host}`"):
        socket.create_connection((host, 443), timeout=1)


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"x")
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(1) == b"x"


def test_hub_is_offline_and_its_cache_is_not_the_user_s():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE is True
    assert os.environ["HF_HOME"] == constants.HF_HOME
    assert not Path(constants.HF_HOME).is_relative_to(Path.home() / ".cache")
