"""The layouts written out by hand (`scripts/make_golden.py`), and linears to pack."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from marlin_tools.quantized import QuantizedLinear

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_golden.py"


@pytest.fixture(scope="session")
def by_hand() -> ModuleType:
    """The element-by-element formulas."""
    spec = importlib.util.spec_from_file_location("make_golden", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_golden"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def draw_linear() -> Callable[..., QuantizedLinear]:
    """`draw_linear(n, k, group_size, sparse=..., seed=...)`: any codes, or any 2:4 codes, finite scales of either sign."""

    def draw(n: int, k: int, group_size: int, *, sparse: bool = False, seed: int = 0) -> QuantizedLinear:
        random = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)
        if sparse:  # two positions drawn independently may coincide, and a code may be 8: quads with one nonzero and with none
            kept = torch.randint(0, 4, (n, k // 4, 2), generator=random)
            mask = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(2, kept, value=True).view(n, k)
            codes = torch.where(mask, codes, 8)
        patterns = torch.randint(0, 0x7C00, (n, k // group_size), generator=random, dtype=torch.int16)
        signs = torch.randint(0, 2, patterns.shape, generator=random, dtype=torch.int16) * -0x8000
        return QuantizedLinear(codes, (patterns | signs).view(torch.float16), group_size)

    return draw
