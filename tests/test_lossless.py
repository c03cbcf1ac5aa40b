"""Lossless drafting against `model.generate`, and its sampling against the exact distribution."""

import logging

import pytest
import torch
from scipy.stats import chi2
from test_generate import endless
from test_runtime import prompts_of
from tiny_models import FAMILIES, LAYERS, VOCAB, WIDTH, crossed, tiny

from lspade_train import ExitPolicy, ExitRuntime, LSpadeHeads, ModelAdapter
from lspade_train.errors import ArtifactError, NumericsError, PolicyError, TaskError
from lspade_train.policies.drafting import (
    DraftCosts,
    Drafting,
    DraftLength,
    expected_tokens,
)
from lspade_train.policies.readers import draft_reader
from lspade_train.runtime import lossless
from lspade_train.runtime.lossless import Drafter, draft_costs
from lspade_train.runtime.sampling import Sampling

NEW = 16
ALWAYS = {"tokens": 4, "confidence": 0}


def own_texts(model, prompts, count=NEW):
    """What `model.generate` says, greedily."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return [tuple(row) for row in found[:, width:].tolist()]


@torch.no_grad()
def fitted_heads(model, sequences, layer):
    """A tuned lens at one layer, by ridge regression onto the last block's output."""
    adapter, pairs = ModelAdapter(model), []
    for ids in sequences:
        plan = adapter.plan(torch.tensor([ids]))
        states = [plan.hidden]
        for block in range(LAYERS):
            states.append(adapter.run_block(plan, block, states[-1]))
        pairs.append((states[layer][0], states[LAYERS][0]))
    before, after = (torch.cat(it).double() for it in zip(*pairs, strict=True))
    square = before.T @ before
    ridge = 1e-4 * square.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    heads = LSpadeHeads([layer], WIDTH).requires_grad_(False)
    heads.weight[0] = torch.linalg.solve(square + ridge, before.T @ (after - before)).float()
    heads.metadata = {"training": {"recipe": {"model": {"target": "final"}}}}
    return heads


@pytest.fixture
def free(monkeypatch):
    """Drafts cost nothing, so that as many are made as may be."""
    monkeypatch.setattr(lossless, "draft_costs", lambda *_: DraftCosts(0, 1, 0))


@pytest.fixture
def careless(monkeypatch):
    """One draft in four is another token than the head would have said, in each row at its own."""
    read, calls = Drafter.read, [0]

    def wrong(self, hidden):
        logits = read(self, hidden)
        calls[0] += 1
        rows = (torch.arange(len(logits)) + calls[0]) % 4 == 0
        return torch.where(rows[:, None], logits.roll(1, -1), logits)

    monkeypatch.setattr(Drafter, "read", wrong)


def runtime_of(model, heads=None):
    return ExitRuntime(model, heads, policy=ExitPolicy.never())


@pytest.mark.usefixtures("free", "careless")
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_models_own_whatever_was_drafted(family):
    model, prompts = endless(family), prompts_of()
    expected = own_texts(model, prompts)
    heads = fitted_heads(model, [p + [*e] for p, e in zip(prompts, expected, strict=True)], 2)
    found = runtime_of(model, heads).generate(prompts, NEW, drafting=Drafting(layer=2, **ALWAYS))
    assert [one.token_ids for one in found] == expected
    stood = [one.drafts.accepted for one in found]
    assert sum(stood) >= 12
    assert sum(one.drafts.drafted for one in found) - sum(stood) >= 12
    assert len({(one.drafts.accepted, one.drafts.verifications) for one in found}) > 1
    assert {(one.layer, one.exited) for one in found} == {(LAYERS, False)}


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(("family", "layer"), crossed([0, 1, 3]))
def test_any_layer_can_draft_without_heads(family, layer):
    model, prompts = endless(family), prompts_of()
    found = runtime_of(model).generate(prompts, NEW, drafting=Drafting(layer=layer, **ALWAYS))
    assert [one.token_ids for one in found] == own_texts(model, prompts)
    assert all(one.drafts.drafted > NEW / 2 for one in found)


@pytest.mark.usefixtures("free", "careless")
def test_statistics_say_what_was_drafted_what_stood_and_what_it_took():
    model, (prompt, *_) = endless("gemma"), prompts_of()
    (found,) = runtime_of(model).generate([prompt], 14, drafting=Drafting(layer=1, **ALWAYS))
    # Its lens is always right here, and each fourth reading is spoilt: 1 2 3 x | 5 6 7 x | ...
    assert len(set(found.token_ids)) == 1
    assert found.drafts.accepted + found.drafts.verifications == 13
    assert found.drafts.verifications == 4
    assert (found.drafts.drafted, found.drafts.accepted) == (12, 9)
    assert found.drafts.tokens_per_verification == pytest.approx(13 / 4)
