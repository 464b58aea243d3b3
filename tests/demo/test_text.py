"""The generator: the same text everywhere, splits that share no seed and no story, and files that are what it writes."""

import hashlib
import json
from itertools import combinations
from pathlib import Path
from random import Random

import demo_text
import pytest
from demo_world import FACTS, PEOPLE, World

FIRST_DOCUMENTS = "3905764e24e12a821cac456ad649b75e7476a736b9414761c1a4e169db3bb1bc"


def _hash(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def test_the_first_documents_never_change() -> None:
    assert _hash([demo_text.document(seed) for seed in range(200)]) == FIRST_DOCUMENTS


def test_a_document_depends_on_its_seed_alone() -> None:
    forward = [demo_text.document(seed) for seed in range(50)]
    assert forward == [demo_text.document(seed) for seed in reversed(range(50))][::-1]
    assert len(set(forward)) == 50


def test_documents_are_single_lines_of_plain_text() -> None:
    for text in demo_text.documents("calibration"):
        assert text == text.strip()
        assert text.isascii()
        assert text.isprintable()
        assert "  " not in text


def test_no_two_splits_share_a_seed() -> None:
    for one, other in combinations(demo_text.SPLITS.values(), 2):
        assert max(one.start, other.start) >= min(one.stop, other.stop), (one, other)


def test_held_out_stories_were_not_trained_on() -> None:
    trained = "\n".join(demo_text.document(seed) for seed in range(20_000))
    stories = [
        row["prompt"].split(" Question:")[0] for row in map(demo_text.question, demo_text.SPLITS["qa"]) if "read" in row["kind"]
    ]
    told_before = [story for story in stories if story in trained and not story.startswith("Today is")]
    assert told_before == []
    assert len(stories) == 200


def test_the_files_are_what_the_generator_writes(demo: Path) -> None:
    text = (demo / "calibration.txt").read_text(encoding="utf-8")
    assert text.rstrip("\n").split("\n\n") == list(demo_text.documents("calibration"))
    rows = [json.loads(line) for line in (demo / "tasks" / "demo_qa.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [demo_text.question(seed) for seed in demo_text.SPLITS["qa"]]
    rows = [json.loads(line) for line in (demo / "tasks" / "demo_text.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == list(demo_text.documents("text"))


@pytest.mark.parametrize("make", [demo_text.recall, demo_text.read])
def test_an_item_has_one_right_answer_and_three_wrong_ones(make: object) -> None:
    for seed in range(500):
        item = make(Random(seed))
        assert len({item.answer, *item.decoys}) == 4
        assert sorted(item.options(Random(0))) == sorted([item.answer, *item.decoys])
        assert item.prompt().endswith(f"Question: {item.question} Answer:")


def test_the_answer_of_a_shelf_story_is_where_the_thing_was_put_last() -> None:
    for seed in range(200):
        lines, asks = demo_text._shelf(Random(seed))
        for question, answer, _ in asks:
            thing = question.removeprefix("Where is the ").rstrip("?")
            last = [line for line in lines if f"the {thing} " in line.lower()][-1]
            assert last.endswith(f" the {answer}.")


def test_sums_add_up() -> None:
    for seed in range(200):
        lines, asks = demo_text._sums(Random(seed))
        have: dict[str, int] = {}
        for line in lines:
            words = line.rstrip(".").split()
            amount = next(demo_text.NUMBERS.index(word) for word in words if word in demo_text.NUMBERS)
            if words[1] == "had":
                have[words[0]] = amount
            elif words[1] == "bought":
                have[words[0]] += amount
            else:
                have[words[0]] -= amount
                if words[1] == "gave":
                    have[words[2]] += amount
        assert [demo_text.NUMBERS[n] for n in have.values()] == [answer for _, answer, _ in asks]


def test_the_world_is_closed_and_marriage_mutual() -> None:
    world = World()
    assert len(set(world.people)) == PEOPLE
    spouse = dict(zip(world.people, world.values["person"]["spouse"], strict=True))
    assert all(spouse[spouse[name]] == name != spouse[name] for name in world.people)
    for kind, facts in FACTS.items():
        for key, fact in facts.items():
            assert set(world.values[kind][key]) <= set(fact.values or world.people), (kind, key)
            assert all("{v}" in form for form in fact.says), (kind, key)
            assert not any("{v}" in form for form in fact.asks), (kind, key)


def test_another_seed_gives_another_world() -> None:
    assert World(1, 64).values != World(2, 64).values
    assert World(1, 64).values == World(1, 64).values
