"""The toy world: seeded questions about facts in the prompt, and the JSONL splits made of them.

A world is four chains `person has item, item in container, container at room`, given as twelve
facts in any order, after four options such as `kitchen is A`. Every question asks for a room, from
a container (1 hop), an item (2 hops) or a person (3 hops). Independent of models and tokenizers,
except that every word, and so every answer, is one token.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEOPLE = ("tom", "ann", "bob", "eva", "max", "lea", "sam", "ida")
ITEMS = ("ball", "coin", "book", "key", "ring", "lamp", "map", "pen")
CONTAINERS = ("box", "bag", "jar", "chest", "basket", "crate", "drawer", "case")
ROOMS = ("kitchen", "garden", "hall", "attic", "cellar", "study", "garage", "porch")
LEVELS = (PEOPLE, ITEMS, CONTAINERS, ROOMS)
RELATIONS = ("has", "in", "at")
LETTERS = ("A", "B", "C", "D")
YES_NO = ("yes", "no")
WORDS = (
    *itertools.chain(*LEVELS),
    *RELATIONS,
    *LETTERS,
    *YES_NO,
    "where",
    "is",
    "which",
    "holds",
    "does",
    "hold",
    "follow",
)

CHAINS = 4
HOPS = (1, 2, 3)
SPLITS = ("train", "validation", "test")
HERE = Path(__file__).parent
SEED = 0
FAMILIES = {
    "data": (
        ("multiple_choice", "yes_no"),
        {"train": 2000, "validation": 1000, "test": 2000},
    ),
    "data_open": (("open",), {"train": 500, "validation": 500, "test": 500}),
}

Chain = tuple[str, ...]
Form = tuple[str, tuple[str, ...], tuple[str, ...]]  # text before the subject, choices, path


@dataclass(frozen=True)
class World:
    """Four chains of names, person to room, the order of their facts, and the rooms A to D."""

    chains: tuple[Chain, ...]
    order: tuple[int, ...]
    options: tuple[str, ...]

    @property
    def facts(self) -> tuple[str, ...]:
        """The facts as lines, such as `tom has ball`."""
        facts = [
            f"{chain[level]} {RELATIONS[level]} {chain[level + 1]}"
            for chain in self.chains
            for level in range(len(RELATIONS))
        ]
        return tuple(facts[index] for index in self.order)

    @property
    def told(self) -> tuple[str, ...]:
        """The lines before a question: the rooms with their letters, then the facts."""
        options = zip(self.options, LETTERS, strict=True)
        return (*(f"{room} is {letter}" for room, letter in options), *self.facts)

    @property
    def split(self) -> str:
        """The split of this world, determined by its facts alone: splits never share a world."""
        digest = hashlib.sha256("\n".join(sorted(self.facts)).encode()).digest()
        return {0: "test", 1: "validation"}.get(digest[0] % 8, "train")


@dataclass(frozen=True)
class Question:
    """A question about a world, without the facts before it.

    `path` is the result of each lookup, ending in the answer; it supervises the middle blocks in
    pretraining and is never written to the data.
    """

    text: str
    choices: tuple[str, ...]
    path: tuple[str, ...]
    difficulty: int
    kind: str

    @property
    def answer(self) -> str:
        """The single token that follows the prompt."""
        return self.path[-1]

    def row(self, world: World) -> dict[str, Any]:
        """This question as one row of a JSONL split."""
        return {
            "prompt": "\n".join([*world.told, self.text]),
            "choices": list(self.choices),
            "answer": self.answer,
            "group": f"hops: {self.difficulty}",
            "kind": self.kind,
        }


def make_world(rng: random.Random, split: str) -> World:
    """Draw worlds until one belongs to `split`."""
    while True:
        names = [rng.sample(level, CHAINS) for level in LEVELS]
        order = rng.sample(range(CHAINS * len(RELATIONS)), CHAINS * len(RELATIONS))
        options = rng.sample(names[-1], CHAINS)
        world = World(tuple(zip(*names, strict=True)), tuple(order), tuple(options))
        if world.split == split:
            return world


def ask(world: World, kind: str, hops: int, rng: random.Random) -> Question:
    """One question of `kind`, `hops` facts from its room, about a random chain of `world`."""
    chain = rng.choice(world.chains)
    text, choices, path = KINDS[kind](world, chain[-1 - hops :], rng)
    return Question(f"{text} {chain[-1 - hops]}", choices, path, hops, kind)


def ask_multiple_choice(world: World, chain: Chain, _: random.Random) -> Form:
    """`which holds tom`; the answer is the letter of a room."""
    return "which holds", LETTERS, (*chain[1:], LETTERS[world.options.index(chain[-1])])


def ask_yes_no(world: World, chain: Chain, rng: random.Random) -> Form:
    """`does kitchen hold tom`; a false one names the room of another chain."""
    truth = rng.random() < 0.5
    room = chain[-1] if truth else rng.choice([it for it in world.options if it != chain[-1]])
    return f"does {room} hold", YES_NO, (*chain[1:], YES_NO[0 if truth else 1])


def ask_open(_: World, chain: Chain, __: random.Random) -> Form:
    """`where is tom`; the answer is the room itself, out of all rooms."""
    return "where is", ROOMS, chain[1:]


def ask_next(world: World, chain: Chain, _: random.Random) -> Form:
    """`follow tom`; the answer is one hop away: a name, or a room's letter. For pretraining."""
    return "follow", (), ((*chain, LETTERS[world.options.index(chain[-1])])[1],)


KINDS: dict[str, Callable[[World, Chain, random.Random], Form]] = {
    "multiple_choice": ask_multiple_choice,
    "yes_no": ask_yes_no,
    "open": ask_open,
    "next": ask_next,
}


def rows(split: str, count: int, kinds: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """`count` rows of `split`, cycling through kinds and hops, every row about a new world."""
    rng = random.Random(f"{seed} {split} {' '.join(kinds)}")
    mixture = itertools.cycle(itertools.product(HOPS, kinds))
    for hops, kind in itertools.islice(mixture, count):
        world = make_world(rng, split)
        yield ask(world, kind, hops, rng).row(world)


def write(folder: Path, sizes: dict[str, int], kinds: Sequence[str], seed: int) -> None:
    """Write one JSONL file per split into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in sizes.items():
        lines = [json.dumps(row) + "\n" for row in rows(split, count, kinds, seed)]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def main() -> None:
    """Write both task families."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE, help="where data/ and data_open/ go")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    for name, (kinds, sizes) in FAMILIES.items():
        write(arguments.output / name, sizes, kinds, arguments.seed)


if __name__ == "__main__":
    main()
