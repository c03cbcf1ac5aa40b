"""Measures a trained tiny-world model, by kind of question and by layer; writes its model card."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from world import HOPS, ask, make_world

from lspade_train import spade_logits

KINDS = ("multiple_choice", "yes_no", "open")
SEED = 2

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# tiny-world

A Llama of {blocks} blocks, width 96 and {parameters:.2f}M parameters that answers questions over
facts told in its prompt. It exists to try lspade-train without a GPU or a download; it knows no
language.

**Data.** Worlds drawn without end by `recipes/quickstart/world.py`, from the training split only:
four chains person, item, container, room, told as twelve facts in random order after four options.
A world's split is a hash of its facts, so that no split shares one. A question is 1, 2 or 3 facts
away from its room; multiple choice then needs the room's letter, yes/no one comparison.

**Training.** `python recipes/quickstart/pretrain.py --seed {seed}`, {minutes:.1f} minutes on one
CPU thread. AdamW, learning rate 2e-3 with 50 steps of warm-up in every stage, falling to zero in
the last. A stage stops sooner where the running accuracy of every kind passes the last column.

| stage | blocks | most steps | steps taken | sequences per step | stops at |
| --- | --- | --- | --- | --- | --- |
{stages}

**Deep supervision.** Besides the answer, with equal weight, blocks {supervised} are trained too, to
say what has been reached by then: the next name on the way, or the answer once it is known. They
say it through an auxiliary norm and head that are not part of this model; its own head, tied to the
embeddings, was trained on the last block alone. So the depth at which a question is answered was
taught. Take this model's early answers as a demonstration, not as evidence about language models.

**Accuracy** in percent among the choices, by kind and hops, on {questions} questions per cell about
worlds of the test split, which training never saw. Chance is 25, 50 and 12.5.

| kind | 1 hop | 2 hops | 3 hops |
| --- | --- | --- | --- |
{rows}

Among the choices at every layer, multiple choice and yes/no together, no training:

| layer | logit lens | SPADE |
| --- | --- | --- |
{layers}
"""


@dataclass(frozen=True)
class Measured:
    """Accuracy on held-out questions: full depth by kind and hops, both lenses by layer (2, L)."""

    questions: int
    cells: dict[str, float]
    layers: Tensor


@torch.no_grad()
def measure(model: LlamaForCausalLM, vocabulary: dict[str, int], count: int) -> Measured:
    """Accuracy among the choices on `count` questions of the test split per kind and hops."""
    rng = random.Random(SEED)
    cells: dict[str, float] = {}
    lenses: list[Tensor] = []
    model.eval()
    for kind in KINDS:
        for hops in HOPS:
            ids, answers, choices = [], [], ()
            for _ in range(count):
                world = make_world(rng, "test")
                question = ask(world, kind, hops, rng)
                words = ["<s>", *" ".join([*world.told, question.text]).split()]
                ids.append([vocabulary[word] for word in words])
                choices = question.choices
                answers.append(choices.index(question.answer))
            columns = [vocabulary[choice] for choice in choices]
            right = [
                read_layers(model, part, columns) == answer[:, None, None]
                for part, answer in zip(
                    torch.tensor(ids).split(250), torch.tensor(answers).split(250), strict=True
                )
            ]
            accuracy = torch.cat(right).double().mean(0)
            cells[f"{kind} {hops}"] = accuracy[1, -1].item()
            if kind != "open":
                lenses.append(accuracy)
    return Measured(count, cells, torch.stack(lenses).mean(0))


def read_layers(model: LlamaForCausalLM, ids: Tensor, columns: list[int]) -> Tensor:
    """The choice of the logit lens and of SPADE at each layer, (batch, 2, layers)."""
    states = model(ids, output_hidden_states=True).hidden_states[1:-1]
    early = [model.lm_head(model.model.norm(state[:, -1])) for state in states]
    spade = spade_logits(model, ids)
    logit_lens = torch.stack([*early, spade[:, -1]], dim=1)
    return torch.stack([logit_lens, spade], dim=1)[..., columns].argmax(-1)


def card(measured: Measured, training: Mapping[str, object]) -> str:
    """The model card; `training` describes how the model was trained."""
    cells = measured.cells
    rows = "\n".join(
        f"| {kind} | " + " | ".join(f"{100 * cells[f'{kind} {hops}']:.1f}" for hops in HOPS) + " |"
        for kind in KINDS
    )
    layers = "\n".join(
        f"| {layer} | {100 * early:.1f} | {100 * spade:.1f} |"
        for layer, (early, spade) in enumerate(measured.layers.T.tolist(), start=1)
    )
    return CARD.format(rows=rows, layers=layers, questions=measured.questions, **training)
