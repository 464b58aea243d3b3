"""How far it is from a public call to the mathematics: the frames of our own on the stack when the column sweep begins."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import marlin_tools as mt
from marlin_tools.algorithms import gptq
from marlin_tools.cli import main

PACKAGE = str(Path(mt.__file__).parent)


def own_frames(frame: FrameType | None) -> list[str]:
    """From the caller outwards."""
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
        frame = frame.f_back
    return found


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    seen: list[list[str]] = []
    sweep: Callable[..., None] = gptq.sweep

    def watched(*arguments: object) -> None:
        seen.append([*own_frames(sys._getframe(1)), "sweep"])
        sweep(*arguments)

    monkeypatch.setattr(gptq, "sweep", watched)
    return seen


def test_from_quantize_to_the_sweep(tiny_llama: Path, tmp_path: Path, stacks: list[list[str]]) -> None:
    ids = torch.randint(2, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    tokens = mt.TokenSet(tuple(ids), "random", packed=True, documents=1)
    mt.quantize(tiny_llama, tokens, mt.QuantizeSettings(device="cpu"), tmp_path / "out")

    assert stacks
    assert 5 == max(map(len, stacks)), stacks[0]


def test_from_the_command_line_to_the_sweep(
    tiny_llama: Path, tmp_path: Path, stacks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"The {n} marlins and the {n * n % 97} boats." for n in range(300)))
    with pytest.raises(SystemExit) as end:
        main(f"quantize {tiny_llama} --calib text.txt --num-samples 2 --seqlen 32 --device cpu -o out".split())

    assert not end.value.code
    assert 10 >= max(map(len, stacks)), stacks[0]
