"""The calibrate stage: what its settings mean, what it says, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.calibrate import CalibrationSettings, calibrate, expected_tokens, preview
from marlin_tools.errors import DataError
from marlin_tools.events import Event

Write = Callable[..., Path]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_a_model_and_a_file_are_named_as_everywhere(tmp_path: Path, tiny_llama: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("0123456789" * 20)
    model = Checkpoint.open(tiny_llama)
    prints = [calibrate(file, named, num_samples=2, seqlen=8).fingerprint for named in (model, tiny_llama, str(tiny_llama))]

    assert {calibrate(str(file), model, num_samples=2, seqlen=8).fingerprint} == set(prints)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """4160 bytes, so 4161 tokens, in 40 documents of 104 bytes with their blank lines."""
    path = tmp_path / "mine.utf8"
    path.write_text("".join(f"{n:024}{LETTERS * 3}\n\n" for n in range(40)))
    return str(path)


def test_a_text_file_is_packed_into_windows_of_the_models_length(checkpoint: Any, text: str) -> None:
    tokens = calibrate(text, checkpoint, num_samples=65)

    assert (65, 64, True) == (len(tokens.sequences), tokens.longest, tokens.packed)
    assert Path(text).read_text()[: 65 * 64 - 1] == checkpoint.tokenizer().decode(
        [token for sequence in tokens.sequences for token in sequence.tolist()], skip_special_tokens=True
    )
    with pytest.raises(DataError, match="65 windows of 64 tokens in its 4161 tokens, 66 asked for"):
        calibrate(text, checkpoint, num_samples=66)


def test_seeds_draw_and_repeat(checkpoint: Any, text: str) -> None:
    prints = [calibrate(text, checkpoint, num_samples=30, seqlen=32, seed=seed).fingerprint for seed in (0, 0, 1, 1, 2)]

    assert prints[0] == prints[1]
    assert prints[2] == prints[3]
    assert 3 == len(set(prints))


def test_settings_and_options_mean_the_same(checkpoint: Any, text: str) -> None:
    settings = CalibrationSettings(source=text, num_samples=5, seqlen=16, seed=4)

    assert (
        calibrate(settings, checkpoint).describe() == calibrate(text, checkpoint, num_samples=5, seqlen=16, seed=4).describe()
    )
    with pytest.raises(TypeError, match="options belong into the settings: seed"):
        calibrate(settings, checkpoint, seed=4)
    with pytest.raises(TypeError, match="a source is a name, a file or CalibrationSettings, not int"):
        calibrate(3, checkpoint)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"num_samples": 0}, {"seqlen": 1}, {"seed": -1}, {"seed": 2**32}, {"shape": "round"}, {"nsamples": 3}]
)
def test_settings_refuse_what_makes_no_sense(checkpoint: Any, text: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        calibrate(text, checkpoint, **wrong)


def test_defaults_are_128_windows_of_2048_tokens_of_the_bundled_text(checkpoint: Any, tmp_path: Path) -> None:
    settings = CalibrationSettings()
    path = tmp_path / "long.txt"
    path.write_text(LETTERS * 90)
    checkpoint.config = {"vocab_size": 257, "max_position_embeddings": 8192}

    assert ("demo", 128, 0, "auto", "auto") == (
        settings.source,
        settings.num_samples,
        settings.seed,
        settings.shape,
        settings.chat_template,
    )
    assert 2048 == calibrate(str(path), checkpoint, num_samples=1).longest


@pytest.mark.parametrize(
    ("asked", "positions", "expected"),
    [
        ({"source": "c4"}, 8192, (128 * 2048, 2048)),
        ({"source": "c4", "num_samples": 3}, 64, (3 * 64, 64)),
        ({"source": "c4", "num_samples": 3, "seqlen": 512}, 8192, (3 * 512, 512)),
        ({"source": "c4", "num_samples": 3, "shape": "documents"}, 8192, (3 * 4096, 4096)),
        ({"source": "redpajama", "num_samples": 3}, 8192, (3 * 4096, 4096)),
        ({"source": "redpajama", "num_samples": 3, "seqlen": 512}, 8192, (3 * 512, 512)),
        ({"source": "redpajama", "num_samples": 3, "shape": "packed"}, 8192, (3 * 2048, 2048)),
        ({"source": "redpajama,c4", "num_samples": 3}, 8192, (3 * 2048, 2048)),
    ],
)
def test_how_much_text_there_will_be_is_known_before_any_is_opened(
    checkpoint: Any, asked: dict[str, Any], positions: int, expected: tuple[int, int]
) -> None:
    checkpoint.config = {"vocab_size": 257, "max_position_embeddings": positions}
    assert expected == expected_tokens(CalibrationSettings(**asked), checkpoint)


def test_documents_are_asked_for_by_shape(checkpoint: Any, text: str, write_jsonl: Write) -> None:
    rows = str(write_jsonl([{"text": LETTERS[:n]} for n in range(1, 20)]))

    assert calibrate(rows, checkpoint, num_samples=2).packed
    documents = calibrate(rows, checkpoint, num_samples=10, seqlen=11, shape="documents")
    assert set(range(2, 12)) == {len(sequence) for sequence in documents.sequences}
    assert (
        documents.fingerprint != calibrate(rows, checkpoint, num_samples=10, seqlen=11, shape="documents", seed=1).fingerprint
    )
    with pytest.raises(DataError, match="0 of 40 documents have 2 to 64 tokens, 1 asked for"):
        calibrate(text, checkpoint, num_samples=1, shape="documents")


def test_auto_follows_the_source_unless_a_length_is_given(hub: Any, checkpoint: Any) -> None:
    hub.rows["DKYoon/SlimPajama-6B", "train"] = [{"text": f"{n:05}"} for n in range(2000)]

    assert not calibrate("redpajama", checkpoint, num_samples=3).packed
    assert calibrate("redpajama", checkpoint, num_samples=3, seqlen=8).packed


def test_more_than_the_model_has_positions_is_refused(checkpoint: Any, text: str) -> None:
    with pytest.raises(DataError, match="sequence length 65 is more than the 64 positions of the model"):
        calibrate(text, checkpoint, seqlen=65)


def test_a_wrong_tokenizer_is_noticed(checkpoint: Any, text: str) -> None:
    checkpoint.config["vocab_size"] = 20

    with pytest.raises(DataError, match="outside the model's vocabulary of 20"):
        calibrate(text, checkpoint, num_samples=1)


def test_the_stage_says_what_it_does(hub: Any, checkpoint: Any) -> None:
    hub.rows["NeelNanda/pile-10k", "train"] = [{"text": LETTERS}] * 4
    events: list[Event] = []
    tokens = calibrate("hf:NeelNanda/pile-10k", checkpoint, num_samples=2, seqlen=8, emit=events.append)

    assert ["stage", "note", "note", "result"] == [event.kind for event in events]
    assert "calibration text: `hf:NeelNanda/pile-10k`" == events[1].text
    assert "none is pinned" in events[2].text
    assert tokens.describe() == events[3].data


def test_the_hub_is_asked_for_no_more_than_the_windows_need(hub: Any, checkpoint: Any) -> None:
    hub.rows["NeelNanda/pile-10k", "train"] = [{"text": LETTERS}] * 100
    tokens = calibrate("pile", checkpoint, num_samples=3, seqlen=27)

    assert 3 == hub.rows_read == tokens.documents


def test_preview_shows_the_first_samples_as_the_model_reads_them(
    make_tokenizer: Any, checkpoint: Any, write_jsonl: Write
) -> None:
    checkpoint.model_tokenizer = make_tokenizer(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    rows = str(write_jsonl([{"prompt": f"q{n}", "response": f"a{n}"} for n in range(9)]))
    settings = CalibrationSettings(source=rows, num_samples=8, seed=3, shape="documents")
    samples = [checkpoint.tokenizer().decode(sequence.tolist()) for sequence in calibrate(settings, checkpoint).sequences]

    assert samples[:3] == preview(settings, checkpoint)
    assert samples[:1] == preview(settings, checkpoint, count=1)
    assert samples[0].startswith("<s>[user]q")


@pytest.fixture
def other(tmp_path: Path) -> str:
    """As long as `text`, of other words."""
    path = tmp_path / "other, mine.txt"  # a comma in a name is no comma between names
    path.write_text("".join(f"{n:024}{LETTERS[::-1] * 3}\n\n" for n in range(40)))
    return str(path)


def test_a_comma_in_a_files_name_is_part_of_it(checkpoint: Any, other: str) -> None:
    assert calibrate(other, checkpoint, num_samples=3).source == other


@pytest.mark.parametrize("seed", [0, 3])
def test_several_sources_give_windows_in_turn(checkpoint: Any, text: str, tmp_path: Path, *, seed: int) -> None:
    second = tmp_path / "second.txt"
    second.write_text("".join(f"{n:024}{LETTERS[::-1] * 3}\n\n" for n in range(40)))
    alone = [calibrate(name, checkpoint, num_samples=3, seqlen=32, seed=seed).sequences for name in (text, str(second))]

    both = calibrate(f"{text},{second}", checkpoint, num_samples=5, seqlen=32, seed=seed)

    expected = [alone[0][0], alone[1][0], alone[0][1], alone[1][1], alone[0][2]]
    assert [sequence.tolist() for sequence in both.sequences] == [sequence.tolist() for sequence in expected]
    assert both.source == f"{text}, {second}"
    assert both.packed
    assert both.order == ("shuffled" if seed else "first")
    assert len(preview(CalibrationSettings(source=f"{text},{second}"), checkpoint, count=1)) == 2, "one of each"


def test_a_source_that_has_less_leaves_the_others_what_they_were_to_give(checkpoint: Any, text: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(LETTERS * 10)
    tokens = calibrate(f"{short}, {text}", checkpoint, num_samples=40, seqlen=64, fewer=True)
    assert len(tokens.sequences) == 4 + 20
    with pytest.raises(DataError, match=r"short\.txt.*20 asked for"):
        calibrate(f"{short},{text}", checkpoint, num_samples=40, seqlen=64)


def test_a_source_that_has_less_is_spread_among_the_others(checkpoint: Any, text: str, tmp_path: Path) -> None:
    """What is held out to judge by are the last windows: they have to be of every source."""
    short = tmp_path / "short.txt"
    short.write_text(LETTERS.upper() * 10)
    sequences = calibrate(f"{short},{text}", checkpoint, num_samples=40, seqlen=64, fewer=True).sequences
    upper = [LETTERS[3].upper() in checkpoint.tokenizer().decode(sequence.tolist()) for sequence in sequences]
    assert [sum(upper[start : start + 6]) for start in range(0, 24, 6)] == [1, 1, 1, 1]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_number_that_a_short_source_is_enough_for_is_named(
    checkpoint: Any, text: str, tmp_path: Path, *, place: int
) -> None:
    short, second = tmp_path / "short.txt", tmp_path / "second.txt"
    short.write_text(LETTERS * 10)
    second.write_text(Path(text).read_text())
    names = [text, str(second)]
    names.insert(place, str(short))
    for asked in ({"seqlen": 64, "shape": "packed"}, {"seqlen": 26 * 10 + 1, "shape": "documents"}):
        if asked["shape"] == "documents":
            short.write_text("\n\n".join([LETTERS] * 4))
            checkpoint.config["max_position_embeddings"] = 300
        with pytest.raises(DataError, match=r"short\.txt") as refusal:
            calibrate(",".join(names), checkpoint, num_samples=30, **asked)
        most = 4 * 3 + place
        assert f"`--num-samples {most}`" in str(refusal.value.hint)
        assert len(calibrate(",".join(names), checkpoint, num_samples=most, **asked).sequences) == most
        with pytest.raises(DataError, match=r"short\.txt"):
            calibrate(",".join(names), checkpoint, num_samples=most + 1, **asked)


def test_one_file_under_two_names_is_named_twice(
    checkpoint: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = Path(text).name
    Path("link").symlink_to(name)
    for again in (f"./{name}", text, "link", f"~/{name}"):
        with pytest.raises(DataError, match=f"`{again}` is named twice"):
            calibrate(f"{name},{again}", checkpoint, num_samples=2)


def test_the_home_folder_is_found_also_behind_a_comma(
    checkpoint: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell replaces `~` at the beginning of a word alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tokens = calibrate(f"demo,~/{Path(text).name}", checkpoint, num_samples=2)
    assert tokens.source == f"demo, {text}"


def test_the_names_of_many_files_may_be_longer_than_that_of_one(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"{n}{'long' * 20}.txt" for n in range(4)]
    for name in names:
        Path(name).write_text(name[0] + LETTERS)
    assert len(calibrate(",".join(names), checkpoint, num_samples=4, seqlen=16).sequences) == 4


def test_a_list_of_sources_is_told_how_to_write_it() -> None:
    with pytest.raises(ValidationError, match=r"several sources are one string with commas: `a\.txt,c4`"):
        CalibrationSettings.model_validate({"source": ["a.txt", "c4"]})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no source is named; known sources: demo, "),
        (" ", "no source is named"),
        ("demo,", "no source beside it"),
        (",", "no source beside it"),
        ("demo,demo", "named twice"),
        ("demo,hf:c4", "not a dataset of the hub"),
    ],
)
def test_what_names_no_sources_is_refused_by_the_settings(checkpoint: Any, source: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CalibrationSettings(source=source)
    with pytest.raises(DataError, match=message.partition(";")[0]):
        calibrate(source, checkpoint)


def test_documents_of_several_sources(checkpoint: Any, tmp_path: Path) -> None:
    names = []
    for name in ("first", "second"):
        file = tmp_path / name
        file.write_text("\n\n".join(f"{name} {n}" for n in range(9)))
        names.append(str(file))
    asked = {"shape": "documents", "seqlen": 60}
    alone = [calibrate(name, checkpoint, num_samples=2, **asked) for name in names]
    both = calibrate(",".join(names), checkpoint, num_samples=4, **asked)
    expected = [alone[0].sequences[0], alone[1].sequences[0], alone[0].sequences[1], alone[1].sequences[1]]
    assert [each.tolist() for each in both.sequences] == [each.tolist() for each in expected]
    assert not both.packed


@pytest.mark.parametrize(
    ("source", "samples", "message"),
    [
        ("demo,dmo", 4, "no such file or source"),
        ("demo,{text}", 1, "2 sources cannot share 1 sample"),
    ],
)
def test_sources_that_are_none_are_refused_by_the_plan_as_well(
    checkpoint: Any, text: str, source: str, samples: int, message: str
) -> None:
    settings = CalibrationSettings(source=source.format(text=text), num_samples=samples)
    for ask in (lambda: calibrate(settings, checkpoint), lambda: expected_tokens(settings, checkpoint)):
        with pytest.raises(DataError, match=message) as refusal:
            ask()
        assert refusal.value.hint
