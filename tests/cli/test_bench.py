"""`bench` and `kernels`: every option reaches what measures, results are printed and written, errors are one line."""

import errno
import json
import os

import pytest

from marlin_tools.bench import decoding as bench_model
from marlin_tools.bench import figures as bench_figures
from marlin_tools.bench import kernels as bench
from marlin_tools.bench import quantizing as bench_quantize
from marlin_tools.bench.decoding import ModelBench, ModelMeasurement
from marlin_tools.bench.figures import FigureData
from marlin_tools.bench.kernels import Measurement, Rates
from marlin_tools.ops.runtime import compiler, cubin_cache
from marlin_tools.ops.runtime.compiler import Binary, Resources


@pytest.fixture
def measured(monkeypatch):
    """What the kernels' benchmark was asked for; it answers with a speed-up of two."""
    calls = []

    def measure(figure, settings, _emit):
        calls.append((figure, settings))
        results = [
            Measurement("peak", "peak", 512, 256, m, kernel, "", 8.0 / s, 0.1, s, 0.5, 1.0)
            for m in (1, 16)
            for kernel, s in (("torch", 1.0), ("ours", 2.0))
        ]
        return FigureData(figure, "a GPU", settings, Rates(3e12, 7e14), {"ours": 9.0, "torch": 8.25}, tuple(results))

    monkeypatch.setattr(bench_figures, "measure", measure)
    return calls


@pytest.fixture
def decoded(monkeypatch):
    """The same for whole models."""
    calls = []

    def run(settings, _emit):
        calls.append(settings)
        results = [
            ModelMeasurement(scheme, batch, step, step / 2, 1.0, 3.0, batch / step * 1e3)
            for scheme, step in zip(settings.schemes, (6.0, 2.0, 1.5), strict=False)
            for batch in settings.batches
        ]
        return ModelBench(settings.shape, "a GPU", settings, tuple(results))

    monkeypatch.setattr(bench_model, "bench_model", run)
    return calls


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    (
        (("--shapes", "peak, 512x256"), "models", ("peak", "512x256")),
        (("--batch", "1,3"), "rows", (1, 3)),
        (("--dtype", "bfloat16"), "dtype", "bfloat16"),
        (("--group-size", "-1"), "group_size", -1),
        (("--no-peers",), "peers", False),
    ),
)
def test_option_of_kernels_arrives(cli, measured, flags, key, value):
    assert cli("bench", "kernels").code == 0
    assert cli("bench", "kernels", *flags).code == 0

    (_, without), (_, with_) = measured
    assert getattr(without, key) != value == getattr(with_, key)


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    (
        (("--shape", "llama2-13b"), "shape", "llama2-13b"),
        (("--in", "7"), "tokens_in", 7),
        (("--out", "9"), "tokens_out", 9),
        (("--batch", "2"), "batches", (2,)),
        (("--schemes", "fp16"), "schemes", ("fp16",)),
    ),
)
def test_option_of_model_arrives(cli, decoded, flags, key, value):
    assert cli("bench", "model").code == 0
    assert cli("bench", "model", *flags).code == 0

    without, with_ = decoded
    assert getattr(without, key) != value == getattr(with_, key)


def test_tune_says_where_the_table_is(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "tune", lambda settings, _emit: tmp_path / f"{settings.models[0]}.json")

    assert f"`{tmp_path / 'llama2-7b.json'}`" in cli("bench", "kernels", "--tune").out
    assert {"tables": str(tmp_path / "llama2-7b.json")} == json.loads(cli("bench", "kernels", "--tune", "--json").out)


@pytest.mark.parametrize("figure", bench_figures.FIGURES)
def test_figure_is_measured_as_it_should_be_and_written(cli, measured, tmp_path, figure):
    outcome = cli("bench", "kernels", "--figure", figure, "-o", "there", "--batch", "1,16")

    ((name, settings),) = measured
    assert (outcome.code, name, settings.rows, settings.peers) == (0, figure, (1, 16), False)
    assert settings.models == bench_figures.FIGURES[figure].models
    assert (tmp_path / "there" / f"bench-{figure}.svg").read_text().startswith("<svg ")
    assert json.loads((tmp_path / "there" / f"bench-{figure}.json").read_text())["results"][1]["speedup"] == 2.0


def test_kernels_as_json_and_as_a_table(cli, measured):
    document = json.loads(cli("bench", "kernels", "--json").out)
    text = cli("bench", "kernels").out

    assert (document["gpu"], document["rates"]) == ("a GPU", {"bandwidth": 3e12, "flops": 7e14})
    assert document["host_microseconds"] == {"ours": 9.0, "torch": 8.25}
    assert "host, microseconds an eager call: ours 9.0, torch 8.2\n" in text
    assert "4.0 (2.00, 0.50)" in text
    assert "geometric mean" in text


def test_model_as_json_and_as_a_table(cli, decoded, tmp_path):
    document = json.loads(cli("bench", "model", "--batch", "1,2", "--json").out)
    outcome = cli("bench", "model", "--batch", "1,2", "--output", tmp_path)

    assert [each["batch"] for each in document["results"]] == [1, 2] * len(bench_model.SCHEMES)
    assert "3.00" in outcome.out
    assert "MARLIN paper, Table 1" in outcome.out
    assert (tmp_path / "bench-llama2-7b.svg").exists()
    assert json.loads((tmp_path / "bench-llama2-7b.json").read_text()) == document


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    (
        (("bench", "kernels", "--figure", "peek"), "error: --figure: `peek` is none of the figures\nhint: there are: peak, "),
        (
            ("bench", "kernels", "--figure", "peak", "--group-size", "-1"),
            "error: --figure: the paper's figures are in float16, ",
        ),
        (("bench", "kernels", "--batch", "1,x"), "error: --batch: `1,x` is not a list of positive numbers\n"),
        (("bench", "kernels", "--batch", ""), "error: --batch: `` is not a list of positive numbers\n"),
        (("bench", "kernels", "--dtype", "int8"), "error: `--dtype int8`: "),
        (
            ("bench", "kernels", "--tune", "-o", "x"),
            "error: --tune writes a table for this machine, no figure and no numbers\n",
        ),
        (("bench", "kernels", "--group-size", "16"), "error: `--group-size 16`: must be 128, 64, 32 or -1\n"),
        (("bench", "kernels", "--shapes", ","), "error: `--shapes ()`: must have at least 1 item\n"),
        (("bench", "model", "--schemes", "int8"), "error: --schemes: unknown scheme `int8`; "),
        (("bench", "model", "--out", "1"), "error: `--out 1`: must be greater than or equal to 2\n"),
        (("kernels", "list", "--arch", "sm_70"), "error: --arch: no kernels are made for `sm_70`\nhint: there are: sm_80, "),
        (("kernels", "build", "--arch", ","), "error: --arch: no architecture is named\n"),
        (("kernels", "list", "--arch", ""), "error: --arch: no architecture is named\n"),
        (("kernels", "build", "-o", ""), "error: `-o` is empty\nhint: name a place: `-o DIR`"),
        (
            ("kernels", "build", "-o", "/dev/null/x"),
            "error: cannot write `/dev/null/x`: Not a directory\nhint: choose another ",
        ),
    ),
    ids=" ".join,
)
def test_complaint(cli, measured, decoded, arguments, complaint):
    outcome = cli(*arguments)

    assert (outcome.code, outcome.out, measured, decoded) == (2, "", [], [])
    assert outcome.err.startswith(complaint)


def test_more_tokens_than_positions_are_refused_before_any_work(cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    complaint = (
        "error: `llama2-7b` has 4096 positions, fewer than the 4097 tokens asked for\nhint: use smaller `--in` and `--out`\n"
    )

    assert cli("bench", "model", "--in", "4090", "--out", "7") == (2, "", complaint)


def test_what_is_refused_leaves_no_directory_behind(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "mine").mkdir()

    for place in ("new", "mine"):
        assert cli("bench", "kernels", "-o", place).code == 2

    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("what", ("kernels", "model", "quantize"))
def test_a_place_that_cannot_be_written_is_said_before_any_work(cli, measured, decoded, monkeypatch, tmp_path, what):
    monkeypatch.setattr(bench_quantize, "bench_quantize", None)
    (tmp_path / "file").touch()
    complaint = "error: cannot write `file`: File exists\nhint: choose another `-o DIR`\n"

    assert cli("bench", what, "-o", "file", "--json") == (2, "", complaint)
    assert (measured, decoded) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    (
        (("kernels", "--shapes", "llama2-7b,bogus"), "no shapes are known for `bogus`"),
        (("kernels", "--shapes", "33x44"), "`33x44` is no shape of the kernels"),
        (("kernels", "--figure", "sustained", "--shapes", "bogus"), "no shapes are known for `bogus`"),
        (("kernels", "--tune", "--shapes", "bogus"), "no shapes are known for `bogus`"),
        (("model", "--shape", "bogus"), "no shapes are known for `bogus`"),
        (("model", "--in", "4090", "--out", "7"), "`llama2-7b` has 4096 positions, fewer than the 4097 tokens asked for"),
        (("model", "--shape", "gemma2-9b"), "this shape cannot be decoded: model type `gemma2` is not one of"),
    ),
)
def test_shapes_are_looked_at_before_the_gpu(cli, monkeypatch, arguments, complaint):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = cli("bench", *arguments)

    assert 2 == outcome.code
    assert outcome.err.startswith(f"error: {complaint}")


@pytest.mark.parametrize("what", ("kernels", "model"))
def test_without_a_gpu(cli, monkeypatch, what):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert (cli("bench", what).code, cli("bench", what).err.partition("\n")[2]) == (2, "hint: `marlin-tools doctor` says why\n")


def test_list_names_every_family(cli):
    document = json.loads(cli("kernels", "list", "--json").out)
    hopper = json.loads(cli("kernels", "list", "--arch", "sm_90a", "--json").out)
    ampere = json.loads(cli("kernels", "list", "--arch", "sm_80", "--json").out)

    assert set(document) == {"dense", "sparse", "fp8", "decode", "solver", "training"}
    assert set(document) - set(ampere) == {"fp8"}  # Ada and Hopper
    assert all(family in cli("kernels", "list").out for family in document)
    assert set(ampere["dense"]["kernels"]) < set(hopper["dense"]["kernels"]) <= set(document["dense"]["kernels"])


def test_build_compiles_once(cli, monkeypatch, tmp_path):
    compiled = []

    def compile_kernel(kernel):
        compiled.append(kernel)
        return Binary(b"cubin", "symbol", Resources(40, 0, 0, 1024))

    monkeypatch.setattr(cubin_cache, "compile_kernel", compile_kernel)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    first = json.loads(cli("kernels", "build", "--arch", "sm_80,sm_89", "-o", tmp_path / "cubins", "--json").out)
    count = len(compiled)
    again = cli("kernels", "build", "--arch", "sm_80,sm_89", "-o", tmp_path / "cubins")

    assert {kernel.target for kernel in compiled} == {"sm_80", "sm_89"}
    assert count == len(compiled) == len(first["kernels"]) > 50
    assert not any(kernel["cached"] for kernel in first["kernels"])
    assert first["kernels"][0]["resources"]["registers"] == 40
    assert again.code == 0
    assert len(list((tmp_path / "cubins").glob("*.kernel"))) == count


def test_a_build_that_could_not_be_kept_is_no_success(cli, monkeypatch, tmp_path):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cubin_cache, "compile_kernel", lambda _kernel: Binary(b"cubin", "symbol", Resources(40, 0, 0, 1024)))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(cubin_cache.os, "fsync", full)
    outcome = cli("kernels", "build", "--arch", "sm_80", "-o", tmp_path / "cubins")

    assert (2, "") == (outcome.code, outcome.out)
    assert outcome.err.startswith(f"error: no space left for `{tmp_path / 'cubins'}` (")
