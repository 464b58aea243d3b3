"""Files of tensors as we write them are those that the library would write, byte for byte."""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from marlin_tools.checkpoint.output import OutputDirectory


def tensors() -> dict[str, torch.Tensor]:
    every = {
        str(dtype).removeprefix("torch."): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16),
            *(torch.int32, torch.float32, torch.float64, torch.int64),
        )
    }
    odd = {"empty": torch.empty(0, 4), "scalar": torch.tensor(1.5), "strided": torch.arange(12.0).reshape(3, 4).T}
    return {**every, **odd, "b": torch.ones(1), "a": torch.ones(2), "ümlaut": torch.ones(3)}


def test_as_the_library_writes_them(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out") as output:
        output.write_tensors("some/file.safetensors", tensors())
        written = (output.work / "some" / "file.safetensors").read_bytes()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors().items()}
    assert written == save(contiguous, metadata={"format": "pt"})


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out") as output:
        file = output.work / "file.safetensors"
        for written in (tensors(), {"x": torch.ones(3)}):
            output.write_tensors(file.name, written)
            content = file.read_bytes()
            file.write_bytes(b"")  # it is not read again
            assert output.sha256_of(file) == hashlib.sha256(content).hexdigest()
        output.clear()
        output.write_text("other", "text")
        assert output.sha256_of(output.work / "other") == hashlib.sha256(b"text").hexdigest()


def test_metadata_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out") as output:
        output.write_tensors("file.safetensors", {"x": torch.ones(1)}, metadata={"z": "1", "a": "2"})
        file = output.work / "file.safetensors"
        assert b'{"__metadata__":{"a":"2","format":"pt","z":"1"}' in file.read_bytes()[:64]
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt", "z": "1", "a": "2"}
