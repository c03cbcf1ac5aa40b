"""Packs many questions about one world into one sequence, without attention between questions.

The facts are read once; every question then attends to the facts and to itself, at the positions
it would have on its own. The model is therefore trained on exactly the prompts it is evaluated on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from world import ask, make_world

LOOKUPS = 4  # three hops and the option


class PackedQuestions(IterableDataset[dict[str, Tensor]]):
    """An endless stream of batches from the worlds of the training split.

    Args:
        slots: the questions asked about every world, in order: a kind and the hops to draw from.
        vocabulary: word to token id.
        batch_size: worlds per batch.
        seed: seed of the stream; equal seeds give equal streams.
    """

    def __init__(
        self,
        slots: Sequence[tuple[str, Sequence[int]]],
        vocabulary: dict[str, int],
        batch_size: int,
        seed: int,
    ) -> None:
        self.slots = tuple(slots)
        self.vocabulary, self.batch_size, self.seed = vocabulary, batch_size, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = random.Random(self.seed)
        while True:
            rows, targets, difficulties, told, questions = [], [], [], [""], [[""]]
            for _ in range(self.batch_size):
                world = make_world(rng, "train")
                asked = [ask(world, kind, rng.choice(hops), rng) for kind, hops in self.slots]
                told = ["<s>", *" ".join(world.told).split()]
                questions = [question.text.split() for question in asked]
                words = told + [word for question in questions for word in question]
                rows.append([self.vocabulary[word] for word in words])
                targets.append([self.targets(question.path) for question in asked])
                difficulties.append([question.difficulty for question in asked])
            yield {
                "input_ids": torch.tensor(rows),
                "targets": torch.tensor(targets),
                "difficulties": torch.tensor(difficulties),
                **layout(len(told), [len(question) for question in questions]),
            }

    def targets(self, path: Sequence[str]) -> list[int]:
        """Target of each lookup; after the answer is reached, it stays the target."""
        return [self.vocabulary[path[min(step, len(path) - 1)]] for step in range(LOOKUPS)]


def layout(told: int, questions: Sequence[int]) -> dict[str, Tensor]:
    """Mask, position ids and answer positions of `questions` (lengths) after `told` tokens."""
    owner = [0] * told
    positions = list(range(told))
    for number, length in enumerate(questions, start=1):
        owner += [number] * length
        positions += range(told, told + length)
    owners = torch.tensor(owner)
    seen = (owners[None, :] == owners[:, None]) | (owners[None, :] == 0)
    mask = torch.zeros(len(owner), len(owner))
    mask.masked_fill_(~seen.tril(), torch.finfo(mask.dtype).min)
    ends = torch.tensor(questions).cumsum(0) + told - 1
    return {"mask": mask[None, None], "position_ids": torch.tensor([positions]), "ends": ends}
