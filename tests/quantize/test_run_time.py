"""What goes on beside the computation: reading ahead, writing behind, memory that runs out."""

import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.compress.shards import Shards
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import DeviceError, ModelError
from marlin_tools.events import Event
from marlin_tools.families.layout import WeightRef
from marlin_tools.stopwatch import Stopwatch, apart, span
from marlin_tools.stream.background import Background
from marlin_tools.stream.layer_stream import CHUNK_TOKENS, Group, LayerStream
from marlin_tools.stream.read_ahead import ReadAhead, WeightRequest

Run = Callable[..., Checkpoint]
Digest = Callable[[Path], dict[str, str]]
CPU = torch.device("cpu")


def failing_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that has no memory for more than `limit` tokens at a time; returns the chunk sizes that were tried."""
    tried: list[int] = []
    before: list[weakref.ref[LayerStream]] = []
    begin, stacked = LayerStream.__init__, Group.stacked

    def init(self: LayerStream, *args: object, chunk_tokens: int = CHUNK_TOKENS, **kwargs: object) -> None:
        assert not any(stream() for stream in before), "what has failed holds the memory still"
        before.append(weakref.ref(self))
        tried.append(chunk_tokens)
        begin(self, *args, chunk_tokens=chunk_tokens, **kwargs)

    def solve(self: Group) -> object:
        if tried[-1] > limit and ".1." in self.names[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return stacked(self)

    monkeypatch.setattr(LayerStream, "__init__", init)
    monkeypatch.setattr(Group, "stacked", solve)
    return tried


def test_smaller_chunks_when_memory_runs_out(
    tiny_llama: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing_above(CHUNK_TOKENS // 4, monkeypatch)
    events: list[Event] = []
    settings = QuantizeSettings(preset="fast", device="cpu")
    result = quantize(tiny_llama, tokens, settings, tmp_path / "out", emit=events.append)

    assert tried == [CHUNK_TOKENS, CHUNK_TOKENS // 2, CHUNK_TOKENS // 4]
    said = [event.text for event in events if "ran out of memory" in event.text and event.kind == "note"]
    assert [f"{count} tokens at a time" in text for text, count in zip(said, tried[1:], strict=True)] == [True, True]
    manifest = read_manifest(result.path)
    assert manifest is not None
    assert len([w for w in manifest["warnings"] if "ran out of memory" in w]) == 2
    assert len(manifest["linears"]) == 14


def test_too_little_memory_for_one_sequence(
    tiny_llama: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_above(0, monkeypatch)
    with pytest.raises(DeviceError, match="lacks memory even for") as failure:
        quantize(tiny_llama, tokens, QuantizeSettings(preset="fast", device="cpu"), tmp_path / "out")
    assert "--seqlen" in (failure.value.hint or "")


def test_a_damaged_first_block_keeps_the_order_of_the_manifest(
    tiny_llama: Path, run: Run, digest: Digest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_llama, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write_rest", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(tiny_llama)
    shard = tmp_path / "out.partial" / "model" / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")

    result, whole = (read_manifest(run(tiny_llama, name, overwrite=True).path) for name in ("out", "whole"))
    assert result is not None
    assert whole is not None
    assert result["linears"] == whole["linears"]


def test_background_keeps_order_and_reports_failures() -> None:
    done: list[int] = []
    gate = threading.Event()
    with Background("test") as background:
        background.hand_over(lambda: (gate.wait(5), done.append(1)))
        gate.set()
        background.hand_over(lambda: done.append(2))
    assert done == [1, 2]

    def fails() -> None:
        raise OSError("disk")

    background = Background("test")
    background.hand_over(fails)
    with pytest.raises(OSError, match="disk"):
        background.hand_over(lambda: done.append(3))
    assert done == [1, 2]


def test_background_finishes_what_it_was_given_when_interrupted() -> None:
    done: list[int] = []
    gate = threading.Event()

    def interrupted() -> None:
        with Background("test") as background:
            background.hand_over(lambda: (gate.wait(5), done.append(1)))
            gate.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


def test_read_ahead_is_one_set_ahead(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    names = [name for name in checkpoint.names() if name.endswith("norm.weight")]
    read: list[str] = []
    stored = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), stored(self, name))[1])
    wanted = iter([{name: WeightRequest(WeightRef(name), torch.Size(checkpoint.shape(name)))} for name in names])
    with ReadAhead(wanted, checkpoint, CPU, torch.float32) as ahead:
        first = next(ahead)
        assert list(first) == names[:1]
        assert torch.equal(first[names[0]], stored(checkpoint, names[0]).float())
        second = next(ahead)
        assert list(second) == names[1:2]
    assert read[:2] == names[:2]
    assert len(read) <= 3


def test_read_ahead_reports_what_it_could_not_read(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    name = "model.norm.weight"
    wrong = iter([{name: WeightRequest(WeightRef(name), torch.Size((3,)))}])
    with ReadAhead(wrong, checkpoint, CPU, torch.float32) as ahead, pytest.raises(ModelError, match="json asks for"):
        next(ahead)


def test_spans_are_exclusive() -> None:
    with Stopwatch(CPU) as watch:
        with span("outer"), span("inner"):
            threading.Event().wait(0.05)
        with apart("beside"):
            pass
    seconds = watch.seconds()
    assert seconds["inner"] >= 0.05
    assert seconds["outer"] < 0.03
    assert set(seconds) == {"outer", "inner", "beside"}
    with span("nobody asks"):
        pass
