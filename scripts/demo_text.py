"""Writes the texts of the embedded demo model: training, calibration and validation documents, and the items of its two tasks.

A document is one line of one to four sections: a portrait of a person, town or animal, a register of townsfolk, a drill of
questions, or a story. Portraits and drills speak of the fixed world (`demo_world.py`) and must be memorised. A story makes
up its own facts, which hold nowhere else, and then asks about them: looking things up, following moves, adding, counting,
ordering. Both end in the same form, `Question: ... Answer: ...`, which is also the form of a task item.

Every document is drawn from its own seed, an integer, and every split owns a range of seeds (`SPLITS`) that no other split
touches: stories for calibration, validation and the tasks are not those of training (only one as short as "Today is Monday."
can come twice). What the splits share is the world: a question about a person tests memory, one about a story tests reading.

Only `random.Random` is used: the same seeds give the same text everywhere.

    python scripts/demo_text.py        writes calibration.txt and the task data of marlin_tools/demo
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from demo_world import ANIMALS, COLOURS, FACTS, GIVEN, PLURALS, WARES, World

DEMO = Path(__file__).resolve().parent.parent / "marlin_tools" / "demo"
SPLITS = {
    "train": range(8_000_000),
    "calibration": range(8_000_000, 8_000_640),
    "validation": range(8_100_000, 8_100_400),
    "text": range(8_200_000, 8_200_064),
    "qa": range(8_300_000, 8_300_400),
}

NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty".split()
)
ORDINALS = ("first", "second", "third", "fourth", "fifth")
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
FRUITS = tuple("apples beans carrots cherries dates figs lemons nuts onions peaches pears plums".split())
THINGS = tuple(
    "anchor bell candle coin compass drum hammer key knife lamp letter map mirror needle ring rope saw spoon".split()
)
SPOTS = tuple("barrel basket boat box cart chest cupboard drawer jar loft sack shed".split())
PLACES = tuple("bakery bridge chapel forge harbour inn library market mill school".split())
MOODS = tuple("asleep awake calm hungry loud quiet restless thirsty".split())
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
RANKS = (("older", "oldest", "youngest"), ("taller", "tallest", "shortest"), ("richer", "richest", "poorest"))

WORLD = World()


@dataclass(frozen=True)
class Item:
    """A question with one right answer and three wrong ones; `text` is what has to be read first (empty: memory)."""

    kind: str
    text: str
    question: str
    answer: str
    decoys: tuple[str, ...]

    def prompt(self) -> str:
        """What comes before the answer."""
        return f"{self.text} Question: {self.question} Answer:".lstrip()

    def options(self, rng: Random) -> list[str]:
        """The four answers in random order."""
        return rng.sample([self.answer, *self.decoys], 4)


Ask = tuple[str, str, list[str]]  # question, answer, wrong answers
Story = tuple[list[str], list[Ask]]  # sentences, and everything that can be asked about them


def _others(rng: Random, pool: list[str] | tuple[str, ...], answer: str) -> list[str]:
    return rng.sample([value for value in pool if value != answer], 3)


def _near(rng: Random, number: int) -> list[str]:
    return _others(rng, NUMBERS[max(0, number - 3) : number + 4], NUMBERS[number])


def _shelf(rng: Random) -> Story:
    """Things lie in places and some are moved: where are they in the end."""
    things, spots = rng.sample(THINGS, 4), rng.sample(SPOTS, 5)
    where = dict(zip(things, spots, strict=False))
    lines = [f"The {thing} is in the {spot}." for thing, spot in where.items()]
    for _ in range(rng.randrange(3)):
        thing, who = rng.choice(things), rng.choice(GIVEN)
        where[thing] = rng.choice([spot for spot in spots if spot != where[thing]])
        lines.append(f"Then {who} {rng.choice(('moved', 'took', 'carried'))} the {thing} to the {where[thing]}.")
    return lines, [(f"Where is the {thing}?", spot, _others(rng, spots, spot)) for thing, spot in where.items()]


def _pockets(rng: Random) -> Story:
    """People own numbers of things: who has what, and how many."""
    people, fruits, counts = rng.sample(GIVEN, 4), rng.sample(FRUITS, 4), rng.sample(range(2, 21), 4)
    numbers = [NUMBERS[n] for n in counts]
    lines, asks = [], []
    for who, fruit, number in zip(people, fruits, numbers, strict=True):
        lines.append(f"{who} {rng.choice(('has', 'owns', 'carries'))} {number} {fruit}.")
        asks.append((f"How many {fruit} does {who} have?", number, _others(rng, numbers, number)))
        asks.append((f"Who has the {fruit}?", who, _others(rng, people, who)))
        asks.append((f"What does {who} have?", fruit, _others(rng, fruits, fruit)))
    return lines, asks


def _sums(rng: Random) -> Story:
    """Two people give, eat and buy: how many are left."""
    fruit, people = rng.choice(FRUITS), rng.sample(GIVEN, 2)
    have = {who: rng.randrange(3, 11) for who in people}
    lines = [f"{who} had {NUMBERS[n]} {fruit}." for who, n in have.items()]
    for _ in range(rng.randrange(1, 4)):
        who, other = rng.sample(people, 2)
        amount = rng.randrange(1, 6)
        if rng.random() < 0.4 and have[who] + amount <= 20:
            lines.append(f"{who} bought {NUMBERS[amount]} more.")
            have[who] += amount
        elif have[who] > amount and have[other] + amount <= 20:
            gift = rng.random() < 0.5
            lines.append(f"{who} gave {other} {NUMBERS[amount]}." if gift else f"{who} ate {NUMBERS[amount]}.")
            have[who] -= amount
            have[other] += amount * gift
    return lines, [(f"How many {fruit} does {who} have now?", NUMBERS[n], _near(rng, n)) for who, n in have.items()]


def _race(rng: Random) -> Story:
    """Runners and the places they took, told out of order."""
    runners = rng.sample(GIVEN, 5)
    lines = rng.sample([f"{who} came {place}." for who, place in zip(runners, ORDINALS, strict=True)], 5)
    asks = [(f"Who came {place}?", who, _others(rng, runners, who)) for who, place in zip(runners, ORDINALS, strict=True)]
    asks += [(f"Who came right after {a}?", b, _others(rng, runners, b)) for a, b in pairwise(runners)]
    return lines, asks


def _chain(rng: Random) -> Story:
    """Four people compared in pairs: who is at either end."""
    people, (more, most, least) = rng.sample(GIVEN, 4), rng.choice(RANKS)
    lines = [f"{a} is {more} than {b}." for a, b in pairwise(people)]
    ends = ((most, people[0]), (least, people[-1]))
    return rng.sample(lines, 3), [(f"Who is the {end}?", who, _others(rng, people, who)) for end, who in ends]


def _tally(rng: Random) -> Story:
    """A list with repeats: how often each thing occurs."""
    kinds = rng.sample(WARES, 3)
    counts = [rng.randrange(1, 6) for _ in kinds]
    listed = rng.sample(kinds, sum(counts), counts=counts)
    asks = [(f"How often is {ware} on the list?", NUMBERS[n], _near(rng, n)) for ware, n in zip(kinds, counts, strict=True)]
    return [f"The list says {', '.join(listed)}."], asks


def _cipher(rng: Random) -> Story:
    """Made-up words for known things, to be copied exactly."""
    things = rng.sample(THINGS, 4)
    syllables = rng.sample(SYLLABLES, 12)
    words = ["".join(syllables[n : n + 3]) for n in range(0, 12, 3)]
    pairs = list(zip(things, words, strict=True))
    asks = [(f"What is the secret word for {thing}?", word, _others(rng, words, word)) for thing, word in pairs]
    asks += [(f"What does {word} mean?", thing, _others(rng, things, thing)) for thing, word in pairs]
    return [f"The secret word for {thing} is {word}." for thing, word in pairs], asks


def _errand(rng: Random) -> Story:
    """Things are with people and people are at places: two steps from thing to place."""
    things, people, places = rng.sample(THINGS, 4), rng.sample(GIVEN, 4), rng.sample(PLACES, 4)
    lines = [f"{who} is at the {place}." for who, place in zip(people, places, strict=True)]
    lines += rng.sample([f"{who} has the {thing}." for who, thing in zip(people, things, strict=True)], 4)
    asks = [(f"Who has the {thing}?", who, _others(rng, people, who)) for thing, who in zip(things, people, strict=True)]
    where = zip(things, places, strict=True)
    asks += [(f"Where is the {thing}?", place, _others(rng, places, place)) for thing, place in where]
    return lines, asks


def _clothes(rng: Random) -> Story:
    """Who wears what in which colour."""
    people, colours = rng.sample(GIVEN, 4), rng.sample(COLOURS, 4)
    wear = [rng.choice(("hat", "coat", "scarf", "belt")) for _ in people]
    rows = list(zip(people, colours, wear, strict=True))
    lines = [f"{who} {rng.choice(('wears', 'put on', 'bought'))} a {colour} {what}." for who, colour, what in rows]
    asks = [(f"What colour is {_possessive(who)} {what}?", colour, _others(rng, colours, colour)) for who, colour, what in rows]
    return lines, asks


def _week(rng: Random) -> Story:
    """Counting days forward and back."""
    today, step = rng.randrange(7), rng.randrange(1, 6)
    then, now = DAYS[(today + step) % 7], DAYS[today]
    span = f"{NUMBERS[step]} day{'s' * (step > 1)}"
    ahead = (f"Which day comes {span} after {now}?", then, _others(rng, DAYS, then))
    back = (f"Which day comes {span} before {then}?", now, _others(rng, DAYS, now))
    return [f"Today is {now}."], [ahead, back]


STORIES: tuple[Callable[[Random], Story], ...] = (
    _shelf, _pockets, _sums, _race, _chain, _tally, _cipher, _errand, _clothes, _week,
)  # fmt: skip


def _possessive(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def _aside(rng: Random) -> str:
    """A sentence beside the point, whose verb agrees with a noun some words back."""
    animal, many, place = rng.choice(ANIMALS), rng.random() < 0.5, rng.choice(PLACES)
    noun, verb = (PLURALS[animal], "are") if many else (animal, "is")
    return f"The {noun} {rng.choice(('behind', 'near', 'outside'))} the {place} {verb} {rng.choice(MOODS)}."


def _sentence(template: str, name: str, value: str, pronoun: tuple[str, str] | None = None) -> str:
    subject, possessive = pronoun or (name, _possessive(name))
    text = template.format(S=subject, P=possessive, v=value)
    return text[0].upper() + text[1:]


def _portrait(rng: Random, kind: str) -> str:
    """Some of what is true of one subject: named at first, then mostly by pronoun."""
    i = WORLD.pick(rng, kind)
    name = WORLD.name(kind, i)
    pronoun = ("it", "its") if kind != "person" else ("she", "her") if name.split()[0].endswith("a") else ("he", "his")
    keys = rng.sample(list(FACTS[kind]), min(rng.randrange(3, 8), len(FACTS[kind])))
    lines = []
    for n, key in enumerate(keys):
        stand_in = pronoun if n and rng.random() < 0.7 else None
        lines.append(_sentence(rng.choice(FACTS[kind][key].says), name, WORLD.values[kind][key][i], stand_in))
    return " ".join(lines)


def _register(rng: Random) -> str:
    """Townsfolk and their trades."""
    town = rng.choice(WORLD.subjects["town"])
    folk = rng.sample(WORLD.townsfolk[town], rng.randrange(3, 7))
    return f"People of {town}: " + ", ".join(f"{WORLD.people[i]} the {WORLD.values['person']['trade'][i]}" for i in folk) + "."


def recall(rng: Random) -> Item:
    """A question about the world, mostly about a person."""
    kind = rng.choices(("person", "town", "animal"), (20, 3, 1))[0]
    i, key = WORLD.pick(rng, kind), rng.choice(list(FACTS[kind]))
    name, value = WORLD.name(kind, i), WORLD.values[kind][key][i]
    question = _sentence(rng.choice(FACTS[kind][key].asks), name, value)
    return Item(f"recall {kind} {key}", "", question, value, tuple(WORLD.decoys(rng, kind, key, i)))


def _story(rng: Random) -> tuple[str, list[str], list[Ask]]:
    """The kind of a story, its sentences with perhaps an aside, and up to four questions about it."""
    tell = rng.choice(STORIES)
    lines, asks = tell(rng)
    if rng.random() < 0.5:
        lines.insert(rng.randrange(len(lines) + 1), _aside(rng))
    return tell.__name__.lstrip("_"), lines, rng.sample(asks, min(rng.randrange(1, 5), len(asks)))


def read(rng: Random) -> Item:
    """A story and a question about it."""
    kind, lines, asks = _story(rng)
    question, answer, decoys = asks[0]
    return Item(f"read {kind}", " ".join(lines), question, answer, tuple(decoys))


def _section(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.28:
        return _portrait(rng, "person")
    if roll < 0.32:
        return _portrait(rng, rng.choice(("town", "animal")))
    if roll < 0.35:
        return _register(rng)
    if roll < 0.60:
        items = [recall(rng) for _ in range(rng.randrange(2, 5))]
        return " ".join(f"Question: {item.question} Answer: {item.answer}." for item in items)
    _, lines, asks = _story(rng)
    if rng.random() < 0.3:  # told again in another order: the surest lesson that what was said before can be looked up
        lines += ["Again:", *rng.sample(lines, len(lines))]
    return " ".join([*lines, *(f"Question: {question} Answer: {answer}." for question, answer, _ in asks)])


def document(seed: int) -> str:
    """The document of a seed: one line."""
    rng = Random(seed)
    return " ".join(_section(rng) for _ in range(rng.choice((1, 2, 2, 3, 4))))


def documents(split: str) -> Iterator[str]:
    """All documents of a split."""
    return map(document, SPLITS[split])


def question(seed: int) -> dict[str, str | int | list[str]]:
    """The task item of a seed, as a row of `demo_qa.jsonl`: memory and reading in equal parts."""
    rng = Random(seed)
    item = (recall, read)[seed % 2](rng)
    choices = item.options(rng)
    return {"kind": item.kind, "prompt": item.prompt(), "choices": choices, "answer": choices.index(item.answer)}


def _write_rows(path: Path, rows: list[dict[str, str | int | list[str]]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write everything that the package ships besides the model."""
    (DEMO / "tasks").mkdir(parents=True, exist_ok=True)
    (DEMO / "calibration.txt").write_text("\n\n".join(documents("calibration")) + "\n", encoding="utf-8")
    _write_rows(DEMO / "tasks" / "demo_qa.jsonl", [question(seed) for seed in SPLITS["qa"]])
    _write_rows(DEMO / "tasks" / "demo_text.jsonl", [{"text": text} for text in documents("text")])


if __name__ == "__main__":
    main()
