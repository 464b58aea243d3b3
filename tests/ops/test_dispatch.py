"""Tables, their nearest rows, and the shapes of tiles."""

import json

import pytest
import torch

from marlin_tools.checkpoint.output import put
from marlin_tools.ops.linear import dispatch
from marlin_tools.ops.linear.dispatch import CUBLAS, DENSE, TableRow
from marlin_tools.ops.linear.tiles import TILES, dense_kernels
from marlin_tools.ops.linear.w4a16 import decompose
from marlin_tools.ops.runtime.target import TARGETS, capability_of


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """A machine without a tuned table."""
    monkeypatch.setenv("MARLIN_TOOLS_CACHE", str(tmp_path))
    dispatch.forget()
    yield tmp_path
    monkeypatch.undo()
    dispatch.forget()


@pytest.mark.parametrize("target", [*TARGETS, "sm_120"])
def test_every_shape_has_a_choice(tables, target):
    for n, k in ((64, 128), (4096, 4096), (57344, 8192), (100, 28672)):
        for m in (1, 8, 9, 16, 17, 32, 64, 100, 256, 1000, 10**6):
            choice = dispatch.choose(target, m, n, k)
            assert choice in dispatch.possible(target, n, k)
            assert choice in TILES or choice == CUBLAS


def tune(target, measured):
    """What `bench kernels --tune` does with its measurements."""
    put(dispatch.tuned_path(), DENSE.tuned_with(target, measured))
    dispatch.forget()


def test_tuned_table_wins(tables):
    tune("sm_80", [TableRow(100, 128, (4, 16), ("8x64", "16x64")), TableRow(9000, 8192, (4,), (CUBLAS,))])

    assert [dispatch.choose("sm_80", m, 128, 128) for m in (1, 4, 5, 99)] == ["8x64", "8x64", "16x64", "16x64"]
    assert dispatch.choose("sm_80", 1, 8192, 8192) == CUBLAS
    assert dispatch.possible("sm_80", 100, 100) == ("8x64", "16x64")


def test_a_choice_without_room_for_the_inputs_is_passed_over(tables):
    """All inputs of a strip's tokens lie in shared memory, whose size is the GPU's."""
    for target in ("sm_80", "sm_86"):
        tune(target, [TableRow(4096, 4096, (8, 16), ("8x32", "16x64"))])

    assert [dispatch.choose("sm_80", 8, 4096, k) for k in (4096, 8576, 8704)] == ["8x32", "8x32", "16x64"]
    assert [dispatch.choose("sm_80", m, 4096, 28672) for m in (1, 2, 3)] == ["8x32", "8x32", "16x64"]
    assert [dispatch.choose("sm_86", m, 4096, 8192) for m in (1, 5, 6, 8)] == ["8x32", "8x32", "16x64", "16x64"]
    assert "16x64" in dispatch.possible("sm_80", 4096, 28672)


def test_tuning_some_shapes_leaves_the_others_as_they_are(tables):
    before = dispatch.choose("sm_90a", 16, 57344, 8192)
    tune("sm_90a", [TableRow(4096, 4096, (16,), ("8x64",))])
    tune("sm_80", [TableRow(4096, 4096, (16,), (CUBLAS,))])
    tune("sm_90a", [TableRow(4096, 11008, (16,), ("16x64",))])

    assert dispatch.choose("sm_90a", 16, 57344, 8192) == before
    assert [dispatch.choose("sm_90a", 16, 4096, k) for k in (4096, 11008)] == ["8x64", "16x64"]
    assert dispatch.choose("sm_80", 16, 4096, 4096) == CUBLAS


@pytest.mark.parametrize(
    "text", ["not JSON", '{"sm_90a": [{"n": 1, "k": 1, "rows": [1], "choices": ["gone"]}]}', '{"sm_90a": [{}]}']
)
def test_table_of_another_version_is_ignored_and_said(tables, caplog, text):
    expected = dispatch.choose("sm_90a", 16, 4096, 4096)
    dispatch.tuned_path().write_text(text)
    dispatch.forget()

    assert dispatch.choose("sm_90a", 16, 4096, 4096) == expected
    assert "tune again" in caplog.text
    tune("sm_90a", [TableRow(4096, 4096, (16,), ("8x64",))])
    assert dispatch.choose("sm_90a", 16, 4096, 4096) == "8x64"


def test_file_is_that_of_the_tables_in_it(tables):
    rows = [TableRow(100, 128, (4, 16), ("8x64", "16x64")), TableRow(9000, 8192, (4,), (CUBLAS,))]

    assert json.loads(dispatch.to_json({"sm_80": rows, "sm_90a": rows[:1]})) == {
        "sm_80": [
            {"n": 100, "k": 128, "rows": [4, 16], "choices": ["8x64", "16x64"]},
            {"n": 9000, "k": 8192, "rows": [4], "choices": [CUBLAS]},
        ],
        "sm_90a": [{"n": 100, "k": 128, "rows": [4, 16], "choices": ["8x64", "16x64"]}],
    }


def test_shipped_table_is_sound():
    from marlin_tools.resources import kernels_dir

    tables = json.loads((kernels_dir() / "dispatch.json").read_text())
    assert "sm_90a" in tables
    for rows in tables.values():
        DENSE.check([TableRow(row["n"], row["k"], tuple(row["rows"]), tuple(row["choices"])) for row in rows])


def test_shipped_choices_do_not_multiply_mostly_padding():
    """Also between the measured numbers of rows, which take the choice of the next larger one."""
    from marlin_tools.resources import kernels_dir

    for target, rows in json.loads((kernels_dir() / "dispatch.json").read_text()).items():
        for row in rows:
            for m in (*range(9, 600), 1000, 1025, 3000):
                choice = dispatch.choose(target, m, row["n"], row["k"])
                if choice != CUBLAS:
                    tokens = TILES[choice].tokens
                    assert -(-m // tokens) * tokens < 2 * m, (row, m, choice)


@pytest.mark.parametrize(
    ("rows", "choices"), [((1, 2), ("8x64",)), ((2, 1), ("8x64", "8x64")), ((1,), ("nonsense",)), ((), ())]
)
def test_bad_table_is_refused(rows, choices):
    with pytest.raises(ValueError, match=r"rows|unknown"):
        DENSE.check([TableRow(1, 1, rows, choices)])


def test_names_are_unique_and_say_the_shape():
    names = [kernel.name for kernel in dense_kernels("sm_90a")]
    assert len(names) == len(set(names))
    for name, tile in TILES.items():
        assert name.removesuffix("-tma") == f"{tile.tokens}x{tile.outputs}"
        if tile.kernel != "hopper":
            assert tile.along_n * tile.along_t * tile.along_k == 8


def test_copy_engine_and_warpgroups_are_for_hopper_alone():
    assert any("-tma" in kernel.name for kernel in dense_kernels("sm_90a"))
    for target in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"):
        assert not any("-tma" in kernel.name for kernel in dense_kernels(target))
        assert not any(choice.endswith("-tma") for choice in dispatch.choices_on(target))
        assert not any(choice.endswith("-tma") for choice in dispatch.possible(target, 4096, 4096))


def test_every_cta_has_work():
    shapes = [(n, k) for n in (64, 200, 4096, 8192, 12288, 22016, 57344) for k in (128, 384, 4096, 28672)]
    for tile in TILES.values():
        for n, k in shapes:
            tiles, groups = -(-n // tile.outputs), k // 128
            way = decompose(tile, tiles, groups, 132, 90)
            assert 1 <= way.ctas <= 132
            assert way.tiles == tiles
            if way.stream_k:
                assert way.ctas <= tiles * groups
            else:
                assert way.ctas % way.split == 0
                assert way.ctas // way.split <= tiles


def test_targets_are_parsed():
    assert capability_of("compute_80") == 80


def test_a_model_of_gpu_may_have_tables_of_its_own(monkeypatch):
    monkeypatch.setattr(dispatch, "target_of", lambda _: "sm_90a")
    names = {"NVIDIA H100 80GB HBM3": "sm_90a", "NVIDIA H200": "sm_90a H200", "NVIDIA GH200 480GB": "sm_90a"}
    for name, gpu in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert dispatch.gpu_of.__wrapped__(torch.device("cuda", 0)) == gpu
    assert dispatch.table("sm_90a H200") != dispatch.table("sm_90a")
    assert dispatch.table("sm_90a H300") == dispatch.table("sm_90a")
    assert set(dispatch.choices_on("sm_90a H200")) == set(dispatch.choices_on("sm_90a"))
