"""The sparse kernels' tables, and how work is decomposed."""

import json

import pytest

from marlin_tools.ops.linear import dispatch, sparse_dispatch, w24a16
from marlin_tools.ops.linear.dispatch import TableRow
from marlin_tools.ops.linear.sparse_tiles import SPARSE_TILES, sparse_kernels
from marlin_tools.ops.runtime.target import TARGETS, capability_of
from marlin_tools.resources import kernels_dir


@pytest.mark.parametrize("target", [*TARGETS, "sm_120"])
def test_every_shape_has_a_choice(target):
    for n, k in ((64, 128), (4096, 4096), (57344, 8192), (100, 28672)):
        for m in (1, 8, 9, 16, 17, 32, 64, 100, 256, 1000, 10**6):
            choice = sparse_dispatch.choose(target, m, n, k)
            assert choice in sparse_dispatch.possible(target, n, k)
            assert choice in sparse_dispatch.choices_on(target)


def test_shipped_table_is_sound():
    tables = json.loads((kernels_dir() / "dispatch-24.json").read_text())
    assert "sm_90a" in tables
    for target, rows in tables.items():
        measured = [TableRow(row["n"], row["k"], tuple(row["rows"]), tuple(row["choices"])) for row in rows]
        sparse_dispatch.SPARSE.check(measured)
        assert {choice for row in measured for choice in row.choices} <= set(sparse_dispatch.choices_on(target))


def test_tables_of_dense_kernels_are_not_taken_for_theirs():
    with pytest.raises(ValueError, match="8x64-tma"):
        sparse_dispatch.SPARSE.check([TableRow(64, 128, (1,), ("8x64-tma",))])
    assert sparse_dispatch.SPARSE.tuned_path() != dispatch.tuned_path()


def test_names_are_unique_and_say_the_shape():
    names = [kernel.name for kernel in sparse_kernels("sm_90a")]
    assert len(names) == len(set(names))
    for name, tile in SPARSE_TILES.items():
        assert name.partition("-")[0] == f"{tile.tokens}x{tile.outputs}"
        if tile.kernel == "warps":
            assert tile.along_n * tile.along_t * tile.along_k == 8


def test_hopper_kernels_are_for_hopper_alone():
    assert any("-tma" in kernel.name for kernel in sparse_kernels("sm_90a"))
    for target in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"):
        assert not any("-tma" in kernel.name for kernel in sparse_kernels(target))


@pytest.mark.parametrize("target", TARGETS)
def test_work_is_shared_out_completely(target):
    for tile in filter(lambda each: each.kernel != "strip", SPARSE_TILES.values()):
        for tiles, groups in ((1, 1), (7, 3), (64, 32), (66, 32), (128, 64), (131, 8), (132, 8), (500, 32)):
            way = w24a16.decompose(tile, tiles, groups, 132, capability_of(target))
            assert 1 <= way.ctas <= 132
            assert way.tiles == tiles
            if way.stream_k:
                assert way.shared_tiles == tiles
                assert tiles * groups >= way.ctas
            else:
                assert way.ctas % way.split == 0
                assert way.split == 1 or (way.ctas == tiles * way.split and groups >= tile.along_k * way.split)
