"""Quantised checkpoints written tensor by tensor, and the same model as transformers would run it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_tools.formats import FORMATS
from marlin_tools.quantized import QuantizedLinear


def _draw(shape: torch.Size, group_size: int, *, sparse: bool, seed: int) -> QuantizedLinear:
    """Codes and scales about as large as those of the tiny models."""
    random = torch.Generator().manual_seed(seed)
    n, k = shape
    codes = torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)
    if sparse:
        codes.view(n, k // 4, 4)[..., 1::2] = 8
    scales = (torch.rand(n, k // group_size, generator=random) * 0.02 - 0.005).half()
    return QuantizedLinear(codes, scales, group_size)


@pytest.fixture
def write_int4(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`write_int4(dense, format)`: (a checkpoint with the linears of its blocks in that format, the same dequantised)."""

    def write(dense: Path, name: str, group_size: int = 128, ignore: str = "no such layer") -> tuple[Path, Path]:
        form = FORMATS[name]
        packed, plain = tmp_path / f"packed-{name}", tmp_path / f"plain-{name}"
        tensors = load_file(dense / "model.safetensors")
        linears = [n for n in sorted(tensors) if n.endswith("_proj.weight") and ignore not in n]
        stored, unpacked = dict(tensors), dict(tensors)
        for seed, weight in enumerate(linears):
            shape = tensors[weight].shape
            linear = _draw(shape, shape[1] if group_size == -1 else group_size, sparse=name == "marlin-24", seed=seed)
            unpacked[weight] = linear.dequantize()
            del stored[weight]
            stored |= {f"{weight.removesuffix('weight')}{suffix}": t for suffix, t in form.pack(linear, torch.float16).items()}
        for folder, content in ((packed, stored), (plain, unpacked)):
            shutil.copytree(dense, folder)
            save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        change_config(packed, quantization_config=form.quantization_config(group_size, ["lm_head"]))
        return packed, plain

    return write


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def edit() -> Callable[..., None]:
    """`edit(folder, {"name": tensor or None})`: add, replace or remove tensors of a checkpoint."""

    def change(folder: Path, tensors: dict[str, torch.Tensor | None], **config: Any) -> None:
        path = folder / "model.safetensors"
        content = load_file(path) | tensors
        save_file({k: v.contiguous() for k, v in content.items() if v is not None}, path, metadata={"format": "pt"})
        change_config(folder, **config)

    return change
