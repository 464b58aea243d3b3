"""The closed world behind the embedded demo model: who and what exists, and what is true of it.

A world is drawn once from `WORLD_SEED`. It has three kinds of subject (person, town, animal), and every subject of a kind
has one value for each of that kind's facts: `Mira Elmcroft` lives in one town for ever, in every text. These are the facts
that the model has to learn by heart. The `FACTS` table is the only place that knows what can be said: a row holds the
possible values of a fact (none: the value is another person), the ways to state it and the ways to ask for it.
`{S}` is the subject ("Mira Elmcroft", "she"), `{P}` its possessive, `{v}` the value.

Read next: `demo_text.py`, which turns the world into documents and questions.
"""

from dataclasses import dataclass
from itertools import accumulate
from random import Random

WORLD_SEED = 1789
PEOPLE = 8192


def _join(heads: str, tails: str, between: str = "") -> tuple[str, ...]:
    return tuple(head + between + tail for head in heads.split() for tail in tails.split())


# Given names alternate between women's and men's, so that the last letter tells the pronoun.
GIVEN = _join("Al Ber Cor Dav El Fen Gar Hal Il Jor Kel Lor Mir Nor Or Per Quin Ros Sel Tam Ul Ven Wil Yar", "a en ina us")
FAMILY = _join("Ash Birch Crane Dun Elm Fern Gull Hazel Ivy Kestrel Larch Moss", "by croft field ford hurst ley low ton wick")
TOWNS = _join("Amber Black Cold Deep Long Salt Silver Wind", "bay cliff gate haven mere mouth port stow")
BOATS = _join("Grey Brave Swift Proud Lucky Merry", "Heron Lady Marlin Petrel Seal Star Tern", " ")
TRADES = tuple(
    "baker barber beekeeper brewer butcher carter carver clerk cobbler cook cooper diver doctor dyer farmer fisher glazier "
    "guard hatter hunter joiner judge mason miller miner nurse painter pilot porter potter printer sailor scribe shepherd "
    "singer smith tailor tanner teacher thatcher trader weaver".split()
)
PLURALS = dict(
    pair.split("/")
    for pair in "badger/badgers calf/calves cat/cats crow/crows dog/dogs donkey/donkeys duck/ducks ferret/ferrets fox/foxes "
    "goat/goats goose/geese hare/hares hawk/hawks hen/hens horse/horses lamb/lambs lizard/lizards mole/moles mouse/mice "
    "mule/mules newt/newts parrot/parrots pig/pigs pony/ponies rabbit/rabbits sheep/sheep toad/toads turtle/turtles".split()
)
ANIMALS = tuple(PLURALS)
COLOURS = tuple("black blue brown copper cream crimson gold green grey lilac pink purple scarlet silver white yellow".split())
DISHES = tuple(
    "barley soup,baked cod,bean stew,black bread,cheese pie,crab cakes,dried figs,fried eel,goat cheese,honey cake,leek soup,"
    "lentil stew,mussel broth,nut bread,oat cakes,onion tart,pear tart,plum cake,rice pudding,roast duck,rye bread,"
    "salt herring,smoked trout,turnip mash".split(",")
)
INSTRUMENTS = tuple(
    "bagpipe banjo bugle cello drum fiddle flute gong guitar harp horn lute lyre oboe pipe tuba viola whistle".split()
)
MONTHS = tuple("January February March April May June July August September October November December".split())
ISLANDS = tuple("Arden Brill Corvo Dorn Esk Farra Holm Jura Lorn Mull Skye Tarn".split())
RIVERS = tuple("Aire Brock Calder Dove Eden Frome Gade Isis Kenn Leam Mole Nene Ouse Severn Teme Wye".split())
WARES = tuple(
    "amber bells bricks butter candles chalk cider clocks coal cloth glass honey ink iron lace leather mirrors nets oil paper "
    "pearls ropes sails salt silk soap spoons sugar tea tiles timber wool".split()
)
FOODS = tuple(
    "acorns barley beetles berries bread clover corn crumbs grass grubs hay leaves moss nuts oats roots seeds worms".split()
)
SHELTERS = tuple("barn basket burrow bush cage cave ditch hedge hole hut loft meadow pen pond shed stable thicket tree".split())


@dataclass(frozen=True)
class Fact:
    """One thing that is true of every subject of a kind: its values, how it is stated, how it is asked."""

    values: tuple[str, ...]
    says: tuple[str, ...]
    asks: tuple[str, ...]


PERSON: tuple[str, ...] = ()  # the value of the fact is another person
FACTS: dict[str, dict[str, Fact]] = {
    "person": {
        "home": Fact(
            TOWNS,
            ("{S} lives in {v}.", "{P} house stands in {v}.", "{S} has always lived in {v}."),
            ("Where does {S} live?", "In which town is {P} house?"),
        ),
        "trade": Fact(
            TRADES,
            ("{S} works as a {v}.", "{S} is a {v} by trade.", "{P} trade is that of a {v}."),
            ("What is {P} trade?", "What does {S} work as?"),
        ),
        "animal": Fact(
            ANIMALS,
            ("{S} keeps a {v}.", "{P} animal is a {v}.", "{S} feeds a {v} every morning."),
            ("Which animal does {S} keep?", "What is {P} animal?"),
        ),
        "door": Fact(
            COLOURS,
            ("{P} door is {v}.", "{S} painted the door {v}.", "{S} lives behind a {v} door."),
            ("What colour is {P} door?", "Which colour did {S} paint the door?"),
        ),
        "dish": Fact(
            DISHES,
            ("{S} likes {v} best.", "{P} favourite dish is {v}.", "{S} eats {v} on feast days."),
            ("What is {P} favourite dish?", "Which dish does {S} like best?"),
        ),
        "music": Fact(
            INSTRUMENTS,
            ("{S} plays the {v}.", "{P} instrument is the {v}.", "{S} has played the {v} for years."),
            ("What does {S} play?", "Which instrument is {P}?"),
        ),
        "birth": Fact(
            MONTHS,
            ("{S} was born in {v}.", "{P} birthday is in {v}."),
            ("In which month was {S} born?", "When is {P} birthday?"),
        ),
        "boat": Fact(
            BOATS,
            ("{S} sails the {v}.", "{P} boat is the {v}.", "{S} goes to sea on the {v}."),
            ("Which boat does {S} sail?", "What is {P} boat called?"),
        ),
        "friend": Fact(
            PERSON,
            ("{P} best friend is {v}.", "{S} trusts {v} more than anyone.", "{S} often writes to {v}."),
            ("Who is {P} best friend?", "Whom does {S} trust?"),
        ),
        "teacher": Fact(
            PERSON,
            ("{S} learned the trade from {v}.", "{P} teacher was {v}."),
            ("Who was {P} teacher?", "From whom did {S} learn the trade?"),
        ),
        "spouse": Fact(
            PERSON,
            ("{S} is married to {v}.", "{P} spouse is {v}."),
            ("To whom is {S} married?", "Who is {P} spouse?"),
        ),
    },
    "town": {
        "island": Fact(ISLANDS, ("{S} lies on {v}.", "{P} island is {v}."), ("On which island does {S} lie?",)),
        "river": Fact(RIVERS, ("{S} stands on the {v}.", "{P} river is the {v}."), ("Which river is {P}?",)),
        "ware": Fact(WARES, ("{S} is known for its {v}.", "{S} sells {v} to every port."), ("What is {S} known for?",)),
        "tower": Fact(COLOURS, ("{P} tower is {v}.", "{S} has a {v} tower."), ("What colour is {P} tower?",)),
        "feast": Fact(MONTHS, ("{P} feast is in {v}.", "{S} holds its feast in {v}."), ("When is {P} feast?",)),
        "founder": Fact(PERSON, ("{S} was founded by {v}.", "{P} founder was {v}."), ("Who founded {S}?",)),
    },
    "animal": {
        "food": Fact(FOODS, ("{S} eats {v}.", "{P} food is {v}."), ("What does {S} eat?",)),
        "shelter": Fact(SHELTERS, ("{S} sleeps in a {v}.", "{P} bed is in a {v}."), ("In what does {S} sleep?",)),
        "coat": Fact(COLOURS, ("{S} is mostly {v}.", "{P} coat is {v}."), ("What colour is {S}?",)),
    },
}


class World:
    """Every subject and the values of its facts. The first people are famous: texts speak of them up to nine times as often."""

    def __init__(self, seed: int = WORLD_SEED, people: int = PEOPLE) -> None:
        rng = Random(seed)
        self.people = rng.sample([f"{given} {family}" for given in GIVEN for family in FAMILY], people)
        self.subjects = {"person": self.people, "town": list(TOWNS), "animal": list(ANIMALS)}
        self.fame = list(accumulate(1 / (rank + people / 8) for rank in range(people)))
        self.values = {
            kind: {key: [rng.choice(fact.values or self.people) for _ in self.subjects[kind]] for key, fact in facts.items()}
            for kind, facts in FACTS.items()
        }
        self.values["person"]["spouse"] = [self.people[i ^ 1] for i in range(people)]  # marriage is mutual
        self.namesakes: dict[str, list[int]] = {}
        self.townsfolk: dict[str, list[int]] = {town: [] for town in TOWNS}
        for i, name in enumerate(self.people):
            for part in name.split():
                self.namesakes.setdefault(part, []).append(i)
            self.townsfolk[self.values["person"]["home"][i]].append(i)

    def pick(self, rng: Random, kind: str) -> int:
        """The index of a random subject, famous people more often."""
        subjects = self.subjects[kind]
        return rng.choices(range(len(subjects)), cum_weights=self.fame)[0] if kind == "person" else rng.randrange(len(subjects))

    def name(self, kind: str, i: int) -> str:
        """How a text calls the subject."""
        return f"the {self.subjects[kind][i]}" if kind == "animal" else self.subjects[kind][i]

    def decoys(self, rng: Random, kind: str, key: str, i: int) -> list[str]:
        """Three wrong values: those of people who share a name with this one, the others at random."""
        values, truth = self.values[kind][key], self.values[kind][key][i]
        kin = [j for part in self.people[i].split() for j in self.namesakes[part]] if kind == "person" else []
        wrong = {values[j]: None for j in rng.sample(kin, min(12, len(kin)))}
        wrong.update(dict.fromkeys(rng.sample(FACTS[kind][key].values or self.people, 4)))
        return [value for value in wrong if value != truth][:3]
