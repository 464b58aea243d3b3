"""Several processes give the bytes that one gives; one that is gone takes the others with it, and nothing is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forked import Forked, started
from marlin_tools.distributed import team as teams
from marlin_tools.distributed.team import ALONE, Pairs, Team, assembled
from marlin_tools.errors import DeviceError

Digest = Callable[[Path], dict[str, str]]

Start = Callable[[int, list[str]], list[Forked]]

PRESETS = "marlin,fast,default,dense"

TEXT = " ".join(
    f"The {number} marlins were counted twice, and the skipper wrote {number * number % 97}." for number in range(60)
)

SCRIPT = r"""
import os
import signal
import sys
import torch
from marlin_tools.cli import main
from marlin_tools.distributed import team
from marlin_tools.ops.solver import cholesky
from marlin_tools.stream.layer_stream import Block

team._SHARED, cholesky._FACTOR_BLOCK = 200, 48  # one factorisation in four is shared
model, text, out, presets, victim = sys.argv[1:]
batches = Block.batches

def dying(self, **how):
    if self.index == 1 and os.environ["RANK"] == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if self.index == 1 and "short of memory: " + os.environ["RANK"] == victim:
        raise torch.OutOfMemoryError("out of memory")
    return batches(self, **how)

Block.batches = dying
for preset in presets.split(","):
    more = ["fast", "--sparsity", "2:4", "--keep-dense", "40%"] if preset == "dense" else [preset]
    if "experts" in open(f"{model}/config.json").read():
        more += ["--ignore", r"experts\.1\.gate_proj"]  # one has another shape
    try:
        main(["quantize", model, "--calib", text, "--num-samples", "5", "--seqlen", "48", "--device", "cpu", "--preset", *more,
              "-o", f"{out}/{preset}"])
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small blocks with biases in q, k and v; one token in sixteen is far longer than the others."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_model("qwen2", hidden_size=128, intermediate_size=256, tie_word_embeddings=True, **heads), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][::16] *= 100
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def arguments(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """What the script is started with."""
    place = tmp_path_factory.mktemp("processes")
    (place / "script.py").write_text(SCRIPT)
    (place / "text.txt").write_text(TEXT)

    def of(out: Path, presets: str, victim: int | str | None = None, model: Path = model) -> list[str]:
        return [str(place / "script.py"), str(model), str(place / "text.txt"), str(out), presets, str(victim)]

    return of


@pytest.fixture(scope="module")
def one(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a single process makes with a preset, once for all tests."""
    out = tmp_path_factory.mktemp("one")

    def made(preset: str) -> Path:
        if not (out / preset).exists():
            with started(1, arguments(out, preset), out / f"{preset}.log") as (alone,):
                assert alone.ended(240) == 0, alone.said
        return out / preset

    return made


def same(digest: Digest, one: Path, other: Path) -> bool:
    """Whether all files are equal, but for the page that shows the times."""
    found = [{name: value for name, value in digest(path).items() if name != "report.html"} for path in (one, other)]
    return len(found[0]) > 10 and found[0] == found[1]


def torchrun(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[Start]:
    """`by_hand(2, arguments)` starts two processes that nobody looks after."""
    with ExitStack() as stack:
        number = count()
        yield lambda size, arguments: stack.enter_context(started(size, arguments, tmp_path / f"{next(number)}.log"))


@pytest.mark.slow
def test_two_of_torchrun_give_the_bytes_of_one(
    arguments: Callable[..., list[str]], tmp_path: Path, digest: Digest, one: Callable[[str], Path]
) -> None:
    done = torchrun(2, arguments(tmp_path, PRESETS))
    assert done.returncode == 0, done.stderr
    made = PRESETS.split(",")
    for rank in range(2):
        assert done.stderr.count(f"process {rank}: cpu, cpu (1 threads)") == len(made)
    assert done.stdout.split() == [str(tmp_path / preset) for preset in made]  # one of them speaks
    for preset in made:
        assert same(digest, tmp_path / preset, one(preset))


@pytest.mark.slow
def test_four_give_the_bytes_of_one(
    arguments: Callable[..., list[str]], tmp_path: Path, digest: Digest, one: Callable[[str], Path], by_hand: Start
) -> None:
    processes = by_hand(4, arguments(tmp_path, "default"))
    ends = [process.ended(240) for process in processes]
    said = [process.said for process in processes]
    assert ends == [0, 0, 0, 0], said
    for rank in range(4):
        assert "".join(said).count(f"process {rank}: cpu, cpu (1 threads)") == 1
    assert same(digest, tmp_path / "default", one("default"))


@pytest.mark.slow
def test_experts_are_solved_by_one_process_each(
    arguments: Callable[..., list[str]], tiny_model: Callable[..., Path], tmp_path: Path, digest: Digest, by_hand: Start
) -> None:
    """Three experts, one of another shape, and a shared one, for two processes."""
    mixture = tiny_model(
        "qwen2_moe",
        hidden_size=128,
        num_experts=3,
        num_experts_per_tok=1,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        decoder_sparse_step=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    for size in (1, 2):
        for process in by_hand(size, arguments(tmp_path / str(size), "default,dense", model=mixture)):
            assert process.ended(240) == 0, process.said
    for preset in ("default", "dense"):
        assert same(digest, tmp_path / "1" / preset, tmp_path / "2" / preset)
    manifest = json.loads((tmp_path / "2/default/manifest.json").read_text())
    experts = [each for each in manifest["linears"] if ".experts." in each["name"]]
    assert len(experts) == 2 * (3 * 3 - 1)
    for expert in ("0", "1", "2"):
        told = {(each["tokens"], each["tokens_seen"]) for each in experts if f"layers.0.mlp.experts.{expert}." in each["name"]}
        assert len(told) == 1, told  # what gate, up and down of an expert saw


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_gone_stops_the_other_and_the_same_command_goes_on(
    arguments: Callable[..., list[str]], tmp_path: Path, digest: Digest, one: Callable[[str], Path], by_hand: Start, victim: int
) -> None:
    processes = by_hand(2, arguments(tmp_path, "fast", victim))
    assert processes[victim].ended(120) == -signal.SIGKILL
    gone = time.monotonic()
    end, said = processes[1 - victim].ended(60), processes[1 - victim].said
    assert time.monotonic() - gone < 20
    assert end == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert errors[0].startswith(f"error: process {1 - victim}: another process is gone"), said
    assert "Traceback" not in said
    assert not (tmp_path / "fast").exists()
    if victim == 1:  # the one that writes has put the first block on disk, and any number of processes goes on from there
        assert (tmp_path / "fast.partial/state/block-00000.json").is_file()
        (again,) = by_hand(1, arguments(tmp_path, "fast"))
        assert again.ended(120) == 0, again.said
        assert same(digest, tmp_path / "fast", one("fast"))


@pytest.mark.slow
def test_a_process_without_memory_stops_the_other_and_the_same_command_goes_on(
    arguments: Callable[..., list[str]], tmp_path: Path, digest: Digest, one: Callable[[str], Path], by_hand: Start
) -> None:
    """Smaller chunks would round differently, so no process takes them by itself."""
    processes = by_hand(2, arguments(tmp_path, "fast", "short of memory: 1"))
    ends = [process.ended(120) for process in processes]
    said = [process.said for process in processes]
    assert ends == [2, 2], said
    assert "error: process 1: `cpu` lacks memory" in said[1], said
    assert "error: process 0: another process is gone" in said[0], said
    assert not (tmp_path / "fast").exists()
    (again,) = by_hand(1, arguments(tmp_path, "fast"))
    assert again.ended(120) == 0, again.said
    assert same(digest, tmp_path / "fast", one("fast"))


def test_a_process_alone_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DeviceError, match="WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set"):
        assembled(torch.device("cpu")).__enter__()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(teams, "_MEETING", teams.timedelta(seconds=1))
    with pytest.raises(DeviceError, match=r"2 processes could not find each other at `127\.0\.0\.1:\d+`"):
        assembled(torch.device("cpu")).__enter__()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DeviceError, match="3 processes cannot share the work evenly"):
        assembled(torch.device("cpu")).__enter__()


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 7, 8, 9, 127, 128])
def test_parts_of_the_text(windows: int) -> None:
    """The same parts however many share them, in order, none empty, nothing left out."""
    text = range(windows)
    whole = Team(cuts=True).share(text)
    assert [window for part in whole for window in part] == list(text)
    assert all(whole)
    for size in (2, 4, 8):
        if windows < size:
            with pytest.raises(DeviceError, match=f"{size} processes cannot share {windows} calibration sequences"):
                Team(0, size, cuts=True).share(text)
        else:
            assert [part for rank in range(size) for part in Team(rank, size, cuts=True).share(text)] == whole
    assert ALONE.share(text) == [text]


@pytest.mark.parametrize("n", [3, 4, 7, 256])
def test_slabs_of_rows(n: int) -> None:
    whole = Team(cuts=True).rows(n)
    assert [row for rows in whole for row in range(n)[rows]] == list(range(n))
    for size in (2, 4, 8):
        shared = {rows.start: rows for rank in range(size) for rows in Team(rank, size, cuts=True).rows(n)}
        assert list(shared.values()) == whole
    assert ALONE.rows(n) == [slice(0, n)]


def test_sums_are_made_in_pairs_of_pairs() -> None:
    """The order that each process follows on its own parts, and all of them on theirs; others round differently."""
    parts = list(torch.randn(8, 100, generator=torch.Generator().manual_seed(0)))
    a, b, c, d, e, f, g, h = parts

    def total(of: list[torch.Tensor]) -> torch.Tensor:
        pairs = Pairs()
        for part in of:
            pairs.add([part.clone()])
        return pairs.total()[0]

    expected = ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert torch.equal(total(parts), expected)
    assert torch.equal(total([total(parts[:4]), total(parts[4:])]), expected)
    assert not torch.equal(a + b + c + d + e + f + g + h, expected)
