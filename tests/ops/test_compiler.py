"""Compilation without a GPU: gates on every kernel and target, the register table, and the cache on disk."""

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from marlin_tools.errors import DeviceError
from marlin_tools.ops import TARGETS, kernels
from marlin_tools.ops.linear.fp8_tiles import FP8_GROUP_SIZES, FP8_TILES
from marlin_tools.ops.linear.layout import GROUP_SIZES, SPARSE_GROUP_SIZES
from marlin_tools.ops.linear.sparse_tiles import SPARSE_TILES, sparse_kernel
from marlin_tools.ops.linear.tiles import TILES, choices, dense_kernel, dequantizing_kernel, product_kernel
from marlin_tools.ops.runtime import compiler
from marlin_tools.ops.runtime.compiler import Binary, Resources, compile_kernel, key_of, parse_resources, texts_of
from marlin_tools.ops.runtime.cubin_cache import CubinCache, default_dir
from marlin_tools.ops.runtime.target import capability_of
from marlin_tools.resources import kernels_dir

pytest.importorskip("cuda.bindings.nvrtc")
pytestmark = pytest.mark.timeout(1800)  # all kernels for all targets, by whoever comes first

TABLE = Path(__file__).with_name("registers.json")
SMALL, OTHER = (dequantizing_kernel("w4a16", torch.float16, target) for target in ("sm_80", "sm_86"))


def product(tile, target="compute_90a"):
    return dense_kernel(tile, torch.float16, target, 128)


WHOLE = "sm_90a"
"""The target of which every kind of kernel is compiled. The other three have one source: each compiles another third of it, and
what it alone has.
"""


def kind_of(kernel):
    """Its name, whichever of the two types its operands have: one source, and instructions that differ in a suffix."""
    return kernel.name.replace("bfloat16", "float16")


def chosen(target):
    """Of each kind one kernel, the types by turns."""
    if os.environ.get("KERNELS") == "all":
        return [kernel for _, kernel in kernels(target)]
    kinds = {}
    for _, kernel in kernels(target):
        kinds.setdefault(kind_of(kernel), []).append(kernel)
    every = {kind: alike[turn % len(alike)] for turn, (kind, alike) in enumerate(kinds.items())}
    if target == WHOLE:
        return list(every.values())
    others = [each for each in TARGETS if each != WHOLE]
    shared = set.intersection(*({kind_of(kernel) for _, kernel in kernels(each)} for each in others))
    third = [kind for kind in every if kind in shared][others.index(target) :: len(others)]
    return [kernel for kind, kernel in every.items() if kind in third or kind not in shared]


@pytest.fixture(scope="session")
def reports(kernel_cache):
    """(target, kernel, registers and memory); `KERNELS=all` leaves none out."""
    return [(target, kernel, kernel_cache.get(kernel).resources) for target in TARGETS for kernel in chosen(target)]


def test_every_kernel_compiles_without_spills_or_local_memory(reports):
    """`compile_kernel` asserts no spill, no stack and no advice C7508 or C7510; here: that it was asked for what it should."""
    asked = {(target == WHOLE, kind_of(kernel)) for target in TARGETS for _, kernel in kernels(target)}
    assert asked == {(target == WHOLE, kind_of(kernel)) for target, kernel, _ in reports}
    for _, _, resources in reports:
        assert 0 < resources.registers <= 255


AGAIN = """
import sys
from marlin_tools.ops import kernels
from marlin_tools.ops.runtime.compiler import compile_kernel
target, name = sys.argv[1:]
print(next(compile_kernel(kernel).resources.registers for _, kernel in kernels(target) if kernel.name == name))
"""


def again(target, name):
    """Registers of a kernel that a new process compiles."""
    done = subprocess.run([sys.executable, "-c", AGAIN, target, name], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_register_table(reports):
    """Remake it with `KERNELS=all MARLIN_TOOLS_REGISTERS=1 pytest tests/ops/test_compiler.py` when a kernel is meant to change.

    The compiler gives numbers two apart for the same source, and others late in a process: more, in a new one, counts.
    """
    if "MARLIN_TOOLS_REGISTERS" in os.environ:
        found = {target: {k.name: r.registers for t, k, r in reports if t == target} for target in TARGETS}
        TABLE.write_text(json.dumps({"nvrtc": list(compiler.nvrtc_version()), **found}, indent=1) + "\n")
    expected = json.loads(TABLE.read_text())
    if tuple(expected.pop("nvrtc")) != compiler.nvrtc_version():
        pytest.skip("the table is for another version of the compiler")
    assert {t: [kernel.name for _, kernel in kernels(t)] for t in TARGETS} == {t: list(each) for t, each in expected.items()}
    far = [(t, k.name, expected[t][k.name]) for t, k, r in reports if abs(r.registers - expected[t][k.name]) > 2]
    assert [] == [(*each, found) for *each, found in ((t, n, e, again(t, n)) for t, n, e in far) if abs(found - each[2]) > 2]


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_and_registers_fit(target, reports):
    capability = capability_of(target)
    block = {80: 163, 86: 99, 89: 99, 90: 227}[capability] * 1024
    found = {kernel.name: (kernel.shared_bytes, resources) for each, kernel, resources in reports if each == target}
    assert all(dynamic + resources.static_shared_bytes <= block for dynamic, resources in found.values())
    for family, tiles, groups in (
        ("w4a16", TILES, GROUP_SIZES),
        ("w24a16", SPARSE_TILES, SPARSE_GROUP_SIZES),
        ("w4a8", FP8_TILES, FP8_GROUP_SIZES),
    ):
        for name, dtype, group in choices(tiles, target, groups):
            tile = tiles[name].for_group(group)
            product = product_kernel(family, tile, dtype, target, group).name
            if product not in found:
                continue
            dynamic, resources = found[product]
            assert tile.stages(capability) >= 2
            warps_per_quarter = tile.ctas_on_sm(capability) * tile.threads // 128
            assert resources.registers * warps_per_quarter * 32 <= 16384
            if capability >= 90:
                assert tile.ctas_on_sm(capability) * (dynamic + 1024) <= 228 * 1024


def test_ptx_for_gpus_to_come():
    binary = compile_kernel(product("8x64", "compute_80"))

    text = binary.image.decode(errors="replace")
    assert ".target sm_80" in text
    assert binary.symbol in text
    assert "cp.async.cg.shared.global" in text
    assert "mma.sync.aligned.m16n8k16" in text


def test_hopper_code_uses_hopper():
    expected = {
        "8x64": ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "barrier.cluster.arrive", "st.shared::cluster"),
        "16x256-tma": (
            "griddepcontrol.wait",
            "wgmma.mma_async.sync.aligned.m64n16k16",
            "cp.async.bulk.tensor.2d",
            "setmaxnreg.dec",
            "st.async.weak.shared::cluster.mbarrier",
        ),
    }
    for tile, instructions in expected.items():
        binary = compile_kernel(product(tile))
        text = binary.image.decode(errors="replace")
        for instruction in instructions:
            assert instruction in text


@pytest.mark.parametrize("group", [128, 32])
def test_large_tiles_scale_weights_and_others_sums(group):
    """What `Tile.rounded` promises, on which the bounds of the tests rest."""
    for name, tile in TILES.items():
        if tile.kernel == "hopper" and (group == 128 or tile.tokens in (16, 32)):
            text = compile_kernel(dense_kernel(name, torch.float16, "compute_90a", group)).image
            assert (b"mul.rn.f16x2" in text) == tile.for_group(group).rounded
            assert (b"cp.async.bulk.shared::cluster.shared::cta" in text) == tile.for_group(group).staged


def test_sparse_tiles_from_64_tokens_on_scale_weights():
    for name, tile in SPARSE_TILES.items():
        if tile.kernel == "hopper":
            text = compile_kernel(sparse_kernel(name, torch.float16, "compute_90a", 128)).image
            assert (b"mul.rn.f16x2" in text) == tile.rounded


def test_no_header_is_included_but_our_own():
    for _, kernel in kernels("sm_90a"):
        for name, text in texts_of(kernel).items():
            assert "#include <" not in text
            assert (kernels_dir() / name).is_file()


def test_serialized_tensor_cores_are_refused(monkeypatch):
    advice = "ptxas info : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert compiler._FATAL_ADVICE.search(advice)
    assert compiler._FATAL_ADVICE.search("(C7508) Potential Performance Loss: 'setmaxnreg' ignored")
    assert not compiler._FATAL_ADVICE.search("ptxas info : Used 128 registers, used 1 barriers, 128 bytes smem")


@pytest.mark.parametrize(("tile", "group"), [("8x64", 128), ("32x128", 32), ("8x128-tma", 64)])
def test_a_size_that_differs_does_not_compile(tile, group):
    """Tiles, packed weights, shared memory, counters: whatever Python computes as C++ does."""
    kernel = dense_kernel(tile, torch.float16, "compute_90a", group)
    assert len(kernel.mirrors) >= 9
    for what, value in kernel.mirrors:
        with pytest.raises(DeviceError, match="static assertion failed with"):
            compile_kernel(dataclasses.replace(kernel, mirrors=((what, value + 1),)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda fields: fields.replace("m:i n:i", "n:i m:i"), "member|kOverlay"),
        (lambda fields: fields.replace("bias:Q ", ""), "whole.y"),
        (lambda fields: fields.replace("token_tiles:i", "token_tiles:q"), "whole.token_tiles|whole.split"),
        (lambda fields: f"{fields} more:Q", "more"),
    ],
)
def test_an_argument_that_is_laid_out_otherwise_does_not_compile(change, what):
    kernel = product("8x64", "compute_80")
    wrong = dataclasses.replace(kernel.arguments, fields=change(kernel.arguments.fields))
    with pytest.raises(DeviceError, match=what):
        compile_kernel(dataclasses.replace(kernel, arguments=wrong, mirrors=()))


def test_every_kernel_is_guarded():
    for _, kernel in kernels("sm_90a"):
        assert f"sizeof({kernel.arguments.name}) == {kernel.arguments.size}" in kernel.guards
        assert "kThreads == " in kernel.guards


def test_unknown_target():
    with pytest.raises(DeviceError, match="`sm_12345`") as caught:
        compile_kernel(dequantizing_kernel("w4a16", torch.float16, "sm_12345"))
    assert "sm_90a" in caught.value.hint
    with pytest.raises(DeviceError, match="not a GPU target"):
        capability_of("hopper")


def test_spills_are_refused(monkeypatch):
    log = "ptxas info : 16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nUsed 255 registers, 64 bytes smem"
    assert parse_resources(log) == Resources(255, 16, 20, 64)
    monkeypatch.setattr(compiler, "parse_resources", lambda _log: Resources(255, 0, 20, 64))
    with pytest.raises(AssertionError):
        compile_kernel(SMALL)


# ---- the key ----------------------------------------------------------------------------------------------------------


def test_key_follows_content(monkeypatch, tmp_path):
    (tmp_path / "a.cu").write_text('#include "b.cuh"\nint a;\n')
    (tmp_path / "b.cuh").write_text("int b;\n")
    monkeypatch.setattr(compiler, "kernels_dir", lambda: tmp_path)
    kernel = dataclasses.replace(SMALL, file="a.cu", expression="f<1>")
    first = key_of(kernel)

    assert key_of(dataclasses.replace(kernel)) == first
    assert key_of(dataclasses.replace(kernel, target="sm_86")) != first
    assert key_of(dataclasses.replace(kernel, expression="f<2>")) != first
    assert key_of(dataclasses.replace(kernel, mirrors=(("kThreads", 1),))) != first
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 1))
    assert key_of(kernel) != first
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "kernels_dir", lambda: tmp_path)
    (tmp_path / "b.cuh").write_text("int c;\n")
    assert key_of(kernel) != first


# ---- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """Replaces the compiler; the list grows with each compilation."""
    done = []

    def fake(kernel):
        done.append(kernel)
        return Binary(b"image\nof " + kernel.target.encode(), "symbol", Resources(32, 0, 0, 16))

    monkeypatch.setattr("marlin_tools.ops.runtime.cubin_cache.compile_kernel", fake)
    return done


def test_second_process_compiles_nothing(tmp_path, compilations):
    first = CubinCache(tmp_path).get(SMALL)
    second = CubinCache(tmp_path).get(SMALL)

    assert first == second
    assert len(compilations) == 1
    assert CubinCache(tmp_path).has(SMALL)
    assert not CubinCache(tmp_path).has(OTHER)


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"not json\nimage"])
def test_damaged_entry_is_compiled_again(tmp_path, compilations, damage):
    CubinCache(tmp_path).get(SMALL)
    (entry,) = tmp_path.glob("*.kernel")
    whole = entry.read_bytes()
    for content in (damage, whole[:-1]):
        entry.write_bytes(content)
        assert CubinCache(tmp_path).get(SMALL).image == b"image\nof sm_80"
        assert entry.read_bytes() == whole
    assert len(compilations) == 3


def test_folder_that_cannot_be_written(tmp_path, compilations):
    (tmp_path / "file").write_text("")
    cache = CubinCache(tmp_path / "file" / "kernels")

    for _ in range(3):
        assert cache.get(SMALL).symbol == "symbol"
    assert len(compilations) == 1


def test_a_file_system_without_locks(tmp_path, compilations, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert CubinCache(tmp_path).get(SMALL) == CubinCache(tmp_path).get(SMALL)
    assert len(compilations) == 1


def test_interrupted_write_leaves_nothing_to_read(tmp_path, compilations, monkeypatch):
    def crash(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        CubinCache(tmp_path).get(SMALL)
    assert not list(tmp_path.glob("*.kernel"))
    next(tmp_path.glob("*.new")).rename(tmp_path / f"{key_of(SMALL)}.1-2.new")  # of another process
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    CubinCache(tmp_path).get(SMALL)
    assert not list(tmp_path.glob("*.new"))


def test_a_full_disk_leaves_nothing(tmp_path, compilations, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    cache = CubinCache(tmp_path)
    assert cache.get(SMALL).symbol == "symbol"
    assert cache.refused.errno == 28
    assert not list(tmp_path.glob("*.new"))


def test_what_one_user_compiles_others_can_read(tmp_path, compilations):
    before = os.umask(0o022)
    try:
        CubinCache(tmp_path).get(SMALL)
    finally:
        os.umask(before)
    (entry,) = tmp_path.glob("*.kernel")

    assert oct(entry.stat().st_mode & 0o777) == "0o644"


def _get_slowly(folder, log):
    def slow(_kernel):
        with Path(log).open("a") as file:
            file.write("compiled\n")
        time.sleep(0.3)
        return Binary(b"image", "symbol", Resources(32, 0, 0, 16))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marlin_tools.ops.runtime.cubin_cache.compile_kernel", slow)
        assert CubinCache(Path(folder)).get(SMALL).image == b"image"


def test_eight_processes_compile_once(tmp_path):
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=_get_slowly, args=(tmp_path / "cache", log)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0] * 8
    assert log.read_text() == "compiled\n"


def test_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("MARLIN_TOOLS_CACHE", str(tmp_path / "mine"))
    assert default_dir() == tmp_path / "mine"
    monkeypatch.delenv("MARLIN_TOOLS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_dir() == tmp_path / "marlin-tools" / "kernels"


@pytest.mark.parametrize("length", (1, 2, 100))
def test_what_nvrtc_writes_lands_in_a_buffer_of_our_own(length):
    """An empty log is one NUL. Written into the only b" " that Python has, it would be in every padding from then on."""

    def fill(_program, buffer):
        assert buffer is not bytes([buffer[0]])
        assert len(buffer) > length
        return (0,)

    assert len(compiler._read(lambda _program: (0, length), fill, None)) == length
