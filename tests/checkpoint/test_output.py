"""Where a result may go: nothing that no run of ours made is ever replaced, and publishing leaves nothing behind."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostile_files import MANIFEST, write_json
from marlin_tools.checkpoint.journal import Journal, begin_anew
from marlin_tools.checkpoint.manifest import holds
from marlin_tools.checkpoint.output import OutputDirectory, check_output, folder, put
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import ModelError, OutputError
from marlin_tools.resources import cache_dir, expanded

RUN = "f" * 64


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def make(out: Path | str, text: str = "1", **how: bool) -> None:
    """A result of one file."""
    with OutputDirectory(out, **how) as output:
        Journal(output, RUN)
        output.write_text("weights.txt", text)
        output.write_text("verify/reference.txt", text)
        write_json(output.work / "manifest.json", MANIFEST | {"files": {"weights.txt": "", "verify/reference.txt": ""}})
        output.publish()


def refused(out: Path | str, rule: str, sources: tuple[Path | str, ...] = (), *, overwrite: bool = True) -> None:
    before = sorted(Path.cwd().parent.rglob("*"))
    for call in (
        lambda: check_output(out, sources, overwrite=overwrite),
        lambda: OutputDirectory(out, sources=sources, overwrite=overwrite).__enter__(),
    ):
        with pytest.raises(OutputError, match=rule) as refusal:
            call()
        assert "-o" in (refusal.value.hint or "")
        assert len(refusal.value.message) <= 500
        assert before == sorted(Path.cwd().parent.rglob("*"))


def test_a_result_of_ours_is_replaced_on_demand() -> None:
    make("out")
    refused("out", "exists and is not empty\nhint: use `--overwrite`", overwrite=False)
    make("out", "2", overwrite=True)

    assert "2" == Path("out/weights.txt").read_text()
    assert ["out"] == [path.name for path in Path().iterdir()]


def test_an_empty_directory_is_filled() -> None:
    Path("out").mkdir()
    make("out")


@pytest.mark.parametrize("out", [".", "..", "/", "../here", "a\0b", "x/.."])
def test_names_that_are_none(out: str) -> None:
    with pytest.raises(OutputError):
        check_output(out, overwrite=True)
    with pytest.raises(OutputError):
        OutputDirectory(out, overwrite=True).__enter__()


@pytest.mark.parametrize("out", ["x" * 248, "x" * 300, "a/" + "x" * 300])
def test_names_that_no_file_system_takes(out: str) -> None:
    """With `.partial` behind them they have more than 255 bytes."""
    refused(out, "cannot write")
    make("x" * 247)


def test_other_peoples_things_stay() -> None:
    Path("folder").mkdir()
    Path("folder/thesis.tex").write_text("years of work")
    Path("file").write_text("x")
    Path("link").symlink_to("folder")
    Path("dangling").symlink_to("nowhere")
    os.mkfifo("pipe")

    refused("folder", "has no manifest.json of ours")
    refused("file", "is a file")
    refused("pipe", "is a file")
    refused("link", "is a link")
    refused("dangling", "is a link")
    refused("file/out", "cannot write|not a directory|Not a directory")


@pytest.mark.parametrize("name", ["thesis.tex", "verify/thesis.tex", "more/thesis.tex"])
def test_what_lies_in_a_result_and_is_no_part_of_it_stays(name: str) -> None:
    make("out")
    Path("out", name).parent.mkdir(exist_ok=True)
    Path("out", name).write_text("years of work")

    refused("out", "is no part of a result")


def test_a_manifest_of_another_tool_is_none() -> None:
    make("out")
    for content in ({}, MANIFEST | {"tool": {"name": "x", "version": "1"}}, MANIFEST | {"tool": []}, MANIFEST | {"files": []}):
        write_json(Path("out/manifest.json"), content)
        refused("out", "has no manifest.json of ours")


def test_sources_and_what_holds_them_stay() -> None:
    make("models/source")
    make("other")
    refused("models/source", "which the run reads", ("models/source",))
    refused("models/source", "which the run reads", ("models/../models/source/",))
    Path("alias").symlink_to("models/source")
    refused("models/source", "which the run reads", ("alias",))
    refused("models/source", "which the run reads", (Path("models/source/weights.txt").resolve(),))
    check_output("other", ("models/source",), overwrite=True)
    check_output("other", ("no\0name",), overwrite=True)  # whoever reads it says so
    os.chdir("models/source/verify")
    refused("../../source", "is, or holds, the working directory")


def test_nothing_is_put_into_a_result() -> None:
    make("result")
    Path("others").mkdir()
    for out, sources in (("result/gptq", ("result",)), ("result/gptq", ()), ("result/verify/../a/b/gptq", ())):
        refused(out, f"^`{out}` would lie in the result `result`, which is replaced as a whole", sources)
    for content in (MANIFEST | {"tool": {"name": "x", "version": "1"}}, {}, []):
        write_json(Path("others/manifest.json"), content)
        assert check_output("others/int4", ["others"]) == Path("others/int4")  # what others made is not replaced
    os.chdir("result/verify")
    refused("sub", f"^`sub` would lie in the result `{Path('..').resolve()}`, which")


def test_a_result_with_another_one_inside_stays_while_that_is_there() -> None:
    make("out")
    make("inner")
    Path("inner").rename("out/inner")
    refused("out", "`inner` in it is no part of a result")


def test_a_partial_that_is_none_of_ours_stays() -> None:
    Path("out.partial/model").mkdir(parents=True)
    Path("out.partial/model/thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="no unfinished run of ours"):
        make("out")
    assert Path("out.partial/model/thesis.tex").exists()


@pytest.mark.parametrize("anew", [False, True])
def test_a_run_that_ends_while_we_ask_for_its_lock_is_another_run(monkeypatch: pytest.MonkeyPatch, anew: bool) -> None:
    """What we have locked is then no longer what lies there."""
    lock = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        Path("out.partial").rename("published")
        if anew:
            Path("out.partial").mkdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="another run is writing `out`"):
        OutputDirectory("out").__enter__()
    assert not list(Path("published").iterdir())


def test_a_folder_that_is_filled_during_the_work_stays() -> None:
    with OutputDirectory("out") as output:
        output.write_text("weights.txt", "1")
        Path("out").mkdir()
        Path("out/thesis.tex").write_text("years of work")
        with pytest.raises(OutputError, match="not empty"):
            output.publish()
    assert Path("out/thesis.tex").exists()
    assert Path("out.partial/model/weights.txt").exists()


def test_what_fails_before_anything_is_finished_leaves_nothing() -> None:
    def fail() -> None:
        with OutputDirectory("out") as output:
            Journal(output, RUN)
            raise OutputError("something")

    with pytest.raises(OutputError):
        fail()
    assert not list(Path().iterdir())


def test_what_fails_and_cannot_be_continued_leaves_nothing_but_what_it_replaces() -> None:
    def fail(*, replaced: bool) -> None:
        with OutputDirectory("out", overwrite=True) as output:
            begin_anew(output)
            output.write_text("weights.txt", "new")
            if replaced:
                output.out.rename(output.replaced)
            raise OutputError("something")

    make("out", "old")
    with pytest.raises(OutputError):
        fail(replaced=False)
    assert ["out"] == [path.name for path in Path().iterdir()]
    with pytest.raises(OutputError):
        fail(replaced=True)
    assert "old" == Path("out.partial/replaced/weights.txt").read_text()


class Killed(BaseException):
    """The process is gone: nothing is cleaned up."""


STEPS = {
    "before": lambda _output: None,
    "replaced": lambda output: output.out.rename(output.replaced),
    "published": lambda output: (output.out.rename(output.replaced), output.work.rename(output.out)),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_publishing_loses_nothing_and_the_next_run_clears_up(step: str, overwrite: bool) -> None:
    make("out", "old")
    with OutputDirectory("out", overwrite=True) as output:
        Journal(output, RUN)
        output.write_text("weights.txt", "new")
        write_json(output.work / "manifest.json", MANIFEST | {"files": {"weights.txt": ""}})
        STEPS[step](output)
    if step == "published":
        assert holds(Path("out"), RUN)
        assert ["out"] == [path.name for path in Path().iterdir()]
        assert "new" == Path("out/weights.txt").read_text()
    if overwrite:
        make("out", "newest", overwrite=True, resume=True)
        assert ["out"] == [path.name for path in Path().iterdir()]
    else:
        with pytest.raises(OutputError, match="not empty"):
            make("out", "newest", resume=True)
    expected = "newest" if overwrite else "new" if step == "published" else "old"
    assert expected == Path("out/weights.txt").read_text()


def test_an_unfinished_run_is_not_cleared() -> None:
    make("out")
    with OutputDirectory("out", overwrite=True) as output:
        Journal(output, "other")
        output.write_text("weights.txt", "unfinished")
    assert holds(Path("out"), RUN)
    assert Path("out.partial/model/weights.txt").exists()


def test_a_run_that_was_killed_before_it_had_anything_is_in_nobodys_way() -> None:
    with OutputDirectory("out") as output:
        Journal(output, RUN)
    with OutputDirectory("out", resume=True) as output:
        Journal(output, "other")
        output.write_text("weights.txt", "1")
    assert json.loads(Path("out.partial/state/run.json").read_text()) == {"fingerprint": "other"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fingerprint": 3}', "[" * 100_000, '{"fingerprint": "\\ud800"}'])
def test_a_journal_that_is_none_is_not_continued(text: str) -> None:
    with OutputDirectory("out") as output:
        Journal(output, RUN)
        output.write_text("weights.txt", "1")
    Path("out.partial/state/run.json").write_text(text)
    with OutputDirectory("out", resume=True) as output, pytest.raises(OutputError, match="unfinished run") as refusal:
        Journal(output, RUN)
    assert "--no-resume" in (refusal.value.hint or "")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 3}', '{"sha256": "x", "linears": {}, "seconds": 1}'])
def test_an_entry_that_is_none_makes_its_block_anew(text: str) -> None:
    with OutputDirectory("out") as output:
        journal = Journal(output, RUN)
        output.write_text("shard", "1")
        shard = output.work / "shard"
        entry = {"linears": [], "seconds": 1.0}
        assert journal.record(0, shard, entry) == journal.finished(0, shard)
        (output.state / "block-00000.json").write_text(text)
        assert journal.finished(0, shard) is None


def test_a_block_whose_shard_is_another_or_gone_is_made_anew() -> None:
    with OutputDirectory("out") as output:
        journal = Journal(output, RUN)
        output.write_text("shard", "1")
        shard = output.work / "shard"
        entry = journal.record(0, shard, {"linears": [], "seconds": 1.0})
        assert journal.finished(0, shard) == journal.entry(0) == entry
        assert journal.finished(1, shard) is None
        assert Journal(output, RUN).finished(0, shard) == entry  # the same run goes on
        shard.write_text("2")
        assert journal.finished(0, shard) is None
        shard.unlink()
        assert journal.finished(0, shard) is None


def unwritable(path: Path) -> None:
    path.chmod(0o555)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
@pytest.mark.parametrize("out", ["locked/out", "locked/a/b"])
def test_a_place_that_cannot_be_written_to(out: str) -> None:
    Path("locked").mkdir()
    unwritable(Path("locked"))
    refused(out, "not writable")


def test_a_place_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    access: Callable[..., bool] = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    Path("locked").mkdir()
    refused("locked/out", "not writable")


def test_a_result_that_cannot_be_moved_away_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    access: Callable[..., bool] = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    Path("locked").mkdir()
    refused("locked", "not writable")


def test_two_that_write_one_small_file_do_not_disturb_each_other() -> None:
    texts, seen = [letter * 100_000 for letter in "ab"], set[str]()

    def write(text: str) -> None:
        for _ in range(40):
            put(Path("note.json"), text)

    with ThreadPoolExecutor() as threads:
        writing = [threads.submit(write, text) for text in texts]
        while not all(each.done() for each in writing):
            if Path("note.json").exists():
                seen.add(Path("note.json").read_text())
        for each in writing:
            each.result()
    assert seen <= set(texts)
    assert [path.name for path in Path().iterdir()] == ["note.json"]


def test_what_a_killed_process_has_left_of_a_small_file_goes_away() -> None:
    for left in (
        "note.json.999999999-1.tmp",
        f"note.json.{os.getppid()}-1.tmp",
        "other.json.999999999-1.tmp",
        "note.json.x.tmp",
    ):
        Path(left).touch()
    put(Path("note.json"), "ours")
    there = {path.name for path in Path().iterdir()}
    assert there == {"note.json", f"note.json.{os.getppid()}-1.tmp", "other.json.999999999-1.tmp", "note.json.x.tmp"}


def test_a_file_has_its_name_only_when_all_of_it_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int | str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append(os.fstat(file).st_size), sync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (steps.append(to.name), replace(self, to))[1])
    put(Path("note.json"), "ours")
    with OutputDirectory("out") as output:
        output.write_text("weights.txt", "1")
    assert steps == [4, "note.json", 1, "weights.txt"]


def test_small_files_that_cannot_be_written_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    for write in (lambda: put(Path("file/note.json"), "ours"), lambda: folder(Path("file/more"))):
        with pytest.raises(OutputError, match="cannot write `file/"):
            write()
    assert folder(Path("a/b")).is_dir()
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with pytest.raises(OutputError, match="`a/b` is not writable"):
        folder(Path("a/b"))


def test_a_link_beside_a_small_file_is_not_written_through() -> None:
    Path("mine.txt").write_text("mine")
    Path("note.json.tmp").symlink_to("mine.txt")
    put(Path("note.json"), "ours")
    assert (Path("mine.txt").read_text(), Path("note.json").read_text()) == ("mine", "ours")
    assert not Path("note.json").is_symlink()


def test_a_home_that_nobody_has_is_a_name_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert check_output("~nobody-of-this-name") == Path("~nobody-of-this-name")
    with pytest.raises(ModelError, match="there is no directory `~nobody-of-this-name/x`"):
        Checkpoint.open("~nobody-of-this-name/x")

    def nowhere(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path(tempfile.gettempdir()) / "marlin-tools"
