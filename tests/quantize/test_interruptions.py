"""A run that is killed loses at most the block in work and ends with the same bytes; nothing half-written ever loads."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.export import export
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.compress.shards import Shards
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import MarlinToolsError, ModelError, OutputError
from marlin_tools.events import Event
from marlin_tools.stream.layer_stream import Block

Run = Callable[..., Checkpoint]
Digest = Callable[[Path], dict[str, str]]


class Killed(BaseException):
    """Nothing in the program may catch this: it stands for a process that is simply gone."""


@pytest.fixture
def solved_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were really solved, in order."""
    seen: list[int] = []
    batches = Block.batches

    def spy(self: Block, *, staged: bool) -> object:
        seen.append(self.index)
        return batches(self, staged=staged)

    monkeypatch.setattr(Block, "batches", spy)
    return seen


@pytest.fixture(scope="module")
def small_llama(tiny_model: Callable[..., Path]) -> Path:
    """Two blocks that take no time. Shared by the tests here: read it."""
    return tiny_model("llama", hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2)


class Undisturbed(NamedTuple):
    """What all others have to make, and how many files were written for it."""

    files: dict[str, str]
    writes: int


@pytest.fixture(scope="module")
def whole(small_llama: Path, tokens: TokenSet, digest: Digest, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run that nothing happens to."""
    writes = 0
    write = OutputDirectory._write

    def counting(self: OutputDirectory, final: Path, parts: list[bytes]) -> None:
        nonlocal writes
        writes += 1
        write(self, final, parts)

    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputDirectory, "_write", counting)
        quantize(small_llama, tokens, QuantizeSettings(preset="fast", device="cpu"), out)
    return Undisturbed(digest(out), writes)


def dies_at(fatal: int, *, half_written: bool) -> Callable[[OutputDirectory, Path, list[bytes]], None]:
    """A write that kills the process at the `fatal`-th call, before it writes anything or in the middle of it."""
    write, done = OutputDirectory._write, 0

    def dying(self: OutputDirectory, final: Path, parts: list[bytes]) -> None:
        nonlocal done
        if done == fatal:
            if half_written:
                final.parent.mkdir(parents=True, exist_ok=True)
                content = b"".join(parts)
                final.with_name(final.name + ".tmp").write_bytes(content[: len(content) // 2])
            raise Killed
        done += 1
        write(self, final, parts)

    return dying


@pytest.mark.parametrize("half_written", [False, True])
def test_killed_at_any_write_then_resumed(
    small_llama: Path,
    run: Run,
    digest: Digest,
    whole: Undisturbed,
    tmp_path: Path,
    solved_blocks: list[int],
    half_written: bool,
) -> None:
    assert whole.writes >= 10
    for fatal in range(whole.writes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OutputDirectory, "_write", dies_at(fatal, half_written=half_written))
            with pytest.raises(Killed):
                run(small_llama, f"out{fatal}")
        assert not (tmp_path / f"out{fatal}").exists()
        solved_blocks.clear()
        result = run(small_llama, f"out{fatal}")

        assert digest(result.path) == whole.files, f"killed at write {fatal}"
        finished = min(2, max(0, (fatal - 1) // 2))  # write 0 begins the run, then a shard and an entry for each block
        assert len(solved_blocks) == 2 - finished
    assert solved_blocks == []  # killed after the last block: nothing is solved again


def test_killed_while_publishing(
    small_llama: Path, run: Run, digest: Digest, whole: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:

    def dying(self: OutputDirectory) -> Path:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "publish", dying)
        with pytest.raises(Killed):
            run(small_llama)
    assert digest(run(small_llama).path) == whole.files


def test_killed_while_a_small_file_was_written_into_the_result(
    small_llama: Path, run: Run, digest: Digest, whole: Undisturbed
) -> None:
    """As a manifest is once more when all is done: the next run finds the result and takes the half away."""
    (run(small_llama).path / "manifest.json.tmp").write_text('{"tool"')
    assert digest(run(small_llama).path) == whole.files


def test_a_shard_damaged_after_the_kill_is_made_again(
    small_llama: Path,
    run: Run,
    digest: Digest,
    whole: Undisturbed,
    tmp_path: Path,
    solved_blocks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write_rest", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(small_llama)
    shard = tmp_path / "out.partial" / "model" / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    solved_blocks.clear()

    assert digest(run(small_llama).path) == whole.files
    assert solved_blocks == [0]


SCRIPT = """
import os, signal, sys, torch
from marlin_tools.data.tokens import TokenSet
from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.compress.quantize import QuantizeSettings, quantize
write, left = OutputDirectory._write, [int(sys.argv[3])]
def dying(self, final, content):
    left[0] -= 1
    if left[0] < 0:
        final.with_name(final.name + ".tmp").write_bytes(b"".join(content)[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, final, content)
OutputDirectory._write = dying
generator = torch.Generator().manual_seed(0)
tokens = TokenSet(tuple(torch.randint(2, 512, (6, 64), generator=generator)), "random", packed=True, documents=1)
quantize(sys.argv[1], tokens, QuantizeSettings(preset="fast", device="cpu"), sys.argv[2])
"""


def test_kill_minus_nine(small_llama: Path, run: Run, digest: Digest, whole: Undisturbed, tmp_path: Path) -> None:
    """The real thing: another process dies by SIGKILL in the middle of the second block's shard."""
    command = [sys.executable, "-c", SCRIPT, str(small_llama), str(tmp_path / "out"), "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    died = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError):
        Checkpoint.open(tmp_path / "out.partial" / "model")

    assert digest(run(small_llama).path) == whole.files


def test_another_run_does_not_continue_this_one(small_llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write_rest", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(small_llama)
    with pytest.raises(OutputError, match="unfinished run with another") as refusal:
        run(small_llama, damp=0.02)

    assert "--no-resume" in (refusal.value.hint or "")
    run(small_llama, damp=0.02, resume=False)


def test_an_export_does_not_throw_away_what_another_run_has_finished(
    small_llama: Path, run: Run, whole: Undisturbed, digest: Digest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = run(small_llama, "other", preset="rtn")
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write_rest", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(small_llama)
    finished = digest(tmp_path / "out.partial" / "model")
    with pytest.raises(OutputError, match="unfinished run with another") as refusal:
        export(other, "compressed-tensors", tmp_path / "out")

    assert "--overwrite" in (refusal.value.hint or "")
    assert finished
    assert digest(tmp_path / "out.partial" / "model") == finished
    assert digest(run(small_llama).path) == whole.files

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write_rest", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(small_llama, "late")
    export(other, "compressed-tensors", tmp_path / "late", overwrite=True)
    assert not (tmp_path / "late.partial").exists()


def test_two_runs_on_one_output(small_llama: Path, run: Run, tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing"):
        run(small_llama)
    run(small_llama)  # the lock is gone with its owner


def test_only_a_result_of_ours_is_overwritten_and_on_demand(small_llama: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not empty"):
            run(small_llama, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "out.partial").exists()

    run(small_llama, "result", preset="rtn")
    with pytest.raises(OutputError, match="not empty") as refusal:
        run(small_llama, "result")
    assert "--overwrite" in (refusal.value.hint or "")
    (tmp_path / "result.old").mkdir()
    before = (tmp_path / "result" / "manifest.json").read_text()
    run(small_llama, "result", overwrite=True)
    assert before != (tmp_path / "result" / "manifest.json").read_text()
    assert {"out", "result", "result.old"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "not writable")])
def test_a_full_or_read_only_disk(
    small_llama: Path,
    run: Run,
    digest: Digest,
    whole: Undisturbed,
    tmp_path: Path,
    code: int,
    message: str,
) -> None:
    opened, path_open = 0, Path.open

    def failing(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        nonlocal opened
        if mode == "wb":
            opened += 1
            if opened > 3:
                raise OSError(code, os.strerror(code))
        return path_open(self, mode, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(OutputError, match=message) as failure:
            run(small_llama)
    assert failure.value.hint
    assert not (tmp_path / "out").exists()
    assert digest(run(small_llama).path) == whole.files


def test_too_little_disk_is_refused_before_the_work(
    small_llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"needs \d\.\d MB, 0\.0 MB are free"):
        run(small_llama)
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_keeps_what_is_finished(small_llama: Path, tokens: TokenSet, tmp_path: Path, solved_blocks: list[int]) -> None:
    def interrupt(event: object) -> None:
        if event.kind == "progress" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(small_llama, tokens, QuantizeSettings(preset="fast", device="cpu"), tmp_path / "out", emit=interrupt)
    assert solved_blocks == [0]
    told: list[Event] = []
    quantize(small_llama, tokens, QuantizeSettings(preset="fast", device="cpu"), tmp_path / "out", emit=told.append)
    assert solved_blocks == [0, 1]
    assert [(event.done, event.total) for event in told if event.text == "blocks"] == [(1, 2), (2, 2)]  # the old one counts


def test_an_output_that_cannot_be_made(small_llama: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(MarlinToolsError, match=r"cannot write|not writable|Not a directory"):
        run(small_llama, "file/out")
