"""2:4-sparse checkpoints on our kernels: loaded, joined and decoded, here with the operator's CPU implementation."""

import dataclasses

import pytest
import torch

from marlin_tools import backends
from marlin_tools.backends import load
from marlin_tools.backends.decoder import Decoder
from marlin_tools.backends.native import NativeLinear, NativeSparseLinear
from marlin_tools.compress.export import export

TOKENS = torch.arange(24).view(2, 12) % 400


@pytest.fixture
def native_on_cpu(monkeypatch):
    """The backend may be asked for without a GPU."""
    row = dataclasses.replace(backends.BACKENDS["native"], devices=("cpu", "cuda"))
    monkeypatch.setitem(backends.BACKENDS, "native", row)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))

    def run(folder):
        return load(folder, backend="native", device="cpu", dtype=torch.float16)

    return run


@pytest.mark.parametrize("group_size", [128, -1])
def test_marlin_24_runs_on_the_sparse_operator(tiny_llama, write_int4, native_on_cpu, group_size):
    packed, plain = write_int4(tiny_llama, "marlin-24", group_size)
    model = native_on_cpu(packed)
    expected = load(plain, device="cpu", dtype=torch.float16)(TOKENS).logits

    kinds = [type(module) for module in model.modules() if isinstance(module, NativeLinear)]
    assert kinds == [NativeSparseLinear] * 14
    assert torch.allclose(model(TOKENS).logits, expected, atol=0.02, rtol=0.02)


def test_the_format_does_not_matter(tiny_llama, write_int4, native_on_cpu, tmp_path):
    packed, _ = write_int4(tiny_llama, "marlin-24")
    export(packed, "gptq", tmp_path / "gptq")
    logits = [native_on_cpu(folder)(TOKENS).logits for folder in (packed, tmp_path / "gptq")]

    assert torch.equal(*logits)


def test_decoder_joins_them(tiny_llama, write_int4, native_on_cpu):
    model = native_on_cpu(write_int4(tiny_llama, "marlin-24")[0])
    expected = model(TOKENS).logits

    decoder = Decoder(model, batch=2, capacity=16)
    decoder.read(TOKENS[:, :-1])
    logits = decoder.step(TOKENS[:, -1])

    assert torch.allclose(logits, expected[:, -1], atol=0.02, rtol=0.02)
    assert len(decoder.products) == 2 * 4 + 1
    assert all(isinstance(product.whole, NativeSparseLinear) for product in decoder.products[:8:2])
