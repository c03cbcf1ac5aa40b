"""Lossless drafting against `model.generate`, and its sampling against the exact distribution."""

import json
import logging

import pytest
import torch
from scipy.stats import chi2
from test_generate import endless
from test_runtime import prompts_of
from tiny_models import CONFIGS, FAMILIES, LAYERS, VOCAB, WIDTH, crossed, tiny

from lspade_train import ExitPolicy, ExitRuntime, LSpadeHeads, ModelAdapter
from lspade_train.errors import ArtifactError, NumericsError, PolicyError, TaskError
from lspade_train.io.storage import write_json
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
    heads = fitted_heads(model, [[*p, *e] for p, e in zip(prompts, expected, strict=True)], 2)
    found = runtime_of(model, heads).generate(prompts, NEW, drafting=Drafting(layer=2, **ALWAYS))
    assert [one.token_ids for one in found] == expected
    accepted = [one.drafts.accepted for one in found]
    assert sum(accepted) >= 12
    assert sum(one.drafts.drafted for one in found) - sum(accepted) >= 12
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
def test_statistics_say_the_drafted_the_accepted_and_the_verifications():
    model, (prompt, *_) = endless("gemma"), prompts_of()
    (found,) = runtime_of(model).generate([prompt], 14, drafting=Drafting(layer=1, **ALWAYS))
    # Its lens is always right here, and each fourth reading is spoilt: 1 2 3 x | 5 6 7 x | ...
    assert len(set(found.token_ids)) == 1
    assert found.drafts.accepted + found.drafts.verifications == 13
    assert found.drafts.verifications == 4
    assert (found.drafts.drafted, found.drafts.accepted) == (12, 9)
    assert found.drafts.tokens_per_verification == pytest.approx(13 / 4)


@pytest.mark.usefixtures("free")
def test_a_text_ends_inside_a_draft_and_the_others_go_on(monkeypatch):
    model, prompts = endless("llama"), prompts_of()
    whole = own_texts(model, prompts)
    heads = fitted_heads(model, [[*p, *e] for p, e in zip(prompts, whole, strict=True)], 2)
    end = whole[0][4]
    model.generation_config.eos_token_id = [end, 2]
    expected = [
        ids[: next((i for i, token in enumerate(ids, 1) if token in (end, 2)), NEW)]
        for ids in whole
    ]
    cut: list[int] = []
    add, heard = lossless.Text.add, dict[int, list[int]]()

    def spy(self, drafts, following, ends):
        cut.append(len(drafts) + 1 - len(new := add(self, drafts, following, ends)))
        return new

    monkeypatch.setattr(lossless.Text, "add", spy)
    found = runtime_of(model, heads).generate(
        prompts, NEW, drafting=Drafting(layer=2, tokens=6, confidence=0),
        on_token=lambda i, token: heard.setdefault(i, []).append(token),
    )  # fmt: skip
    assert [one.token_ids for one in found] == expected
    assert len(set(map(len, expected))) > 1
    assert max(cut) > 0  # tokens accepted after the end
    assert [tuple(heard[i]) for i in range(len(prompts))] == expected
    assert all(
        one.drafts.accepted + one.drafts.verifications >= len(one.token_ids) - 1 for one in found
    )


# Sampling -----------------------------------------------------------------------------------------

LETTERS, ROWS = 8, 4000
PROMPT = [1, 5, 3, 6]
PLAIN, NUCLEUS = {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.8}

verify = Sampling.verify


def always_accept(self, logits, drafts, drawn_from):
    """Wrong: the head's distribution."""
    return torch.full((len(drafts),), drafts.shape[1]), self.pick(logits[:, -1])


def draw_anew(self, logits, drafts, drawn_from):
    """Wrong: a rejected draft's token is drawn from the whole distribution, not the residual."""
    accepted, _ = verify(self, logits, drafts, drawn_from)
    return accepted, self.pick(logits[torch.arange(len(logits)), accepted])


@torch.no_grad()
def exact_law(model, sampling):
    """Probability of each pair of second and third token, from all 512 texts of three."""
    texts = torch.cartesian_prod(*[torch.arange(LETTERS)] * 3)
    ids = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], dim=1)
    each = sampling._probabilities(model(ids).logits[:, len(PROMPT) - 1 : -1].double())
    return each.gather(-1, texts[..., None]).prod(1).reshape(LETTERS, -1).sum(0)


def p_value(counts, probabilities):
    """Of Pearson's chi-squared test, outcomes expected less than five times pooled."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < 5
    groups = [torch.cat([it[~rare], it[rare].sum()[None]]) for it in (counts, expected)]
    observed, wanted = (it[groups[1] > 0] for it in groups)
    return float(chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1))


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("rule", "settings", "confidence", "least", "most"),
    [
        (verify, PLAIN, 0, 1e-3, 1),
        (verify, PLAIN, 0.25, 1e-3, 1),
        (verify, NUCLEUS, 0, 1e-3, 1),
        (always_accept, PLAIN, 0, 0, 1e-20),
        (draw_anew, PLAIN, 0, 0, 1e-20),
    ],
)
def test_sampled_text_has_the_models_distribution(
    rule, settings, confidence, least, most, monkeypatch
):
    """4,000 texts against the exact law of 64 outcomes, by chi-squared.

    A correct rule fails with probability 0.001 for a seed; the two wrong rules, of a total
    variation of 0.25 and 0.15, are told from it at 1e-20.
    """
    monkeypatch.setattr(Sampling, "verify", rule)
    model = tiny("llama", vocab_size=LETTERS)
    model.lm_head.weight.data.mul_(1.5)
    model.generation_config.eos_token_id = None
    found = runtime_of(model).generate(
        [PROMPT] * ROWS, 4, drafting=Drafting(layer=2, tokens=2, confidence=confidence),
        generator=torch.Generator().manual_seed(3), **settings,
    )  # fmt: skip
    texts = torch.tensor([one.token_ids[1:3] for one in found])
    counts = (texts[:, 0] * LETTERS + texts[:, 1]).bincount(minlength=LETTERS**2)
    drafted = sum(one.drafts.drafted for one in found)
    assert drafted == (2 if confidence == 0 else 1) * ROWS
    law = exact_law(model, Sampling(**settings))
    assert least <= p_value(counts.double(), law) <= most


@pytest.mark.slow
@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_has_the_distribution_of_every_family(family):
    """As above, for the correct rule: one of 33 families fails with probability 0.03 for a seed."""
    text = CONFIGS[family].get("text_config")  # of a multimodal family
    inside = {} if text is None else {"text_config": text | {"vocab_size": LETTERS}}
    model = tiny(family, vocab_size=LETTERS, **inside)
    model.generation_config.eos_token_id = None
    found = runtime_of(model).generate(
        [PROMPT] * ROWS, 4, drafting=Drafting(layer=2, tokens=2, confidence=0), temperature=1.0,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    texts = torch.tensor([one.token_ids[1:3] for one in found])
    counts = (texts[:, 0] * LETTERS + texts[:, 1]).bincount(minlength=LETTERS**2)
    assert p_value(counts.double(), exact_law(model, Sampling(temperature=1.0))) > 1e-3


def test_sampled_text_is_reproducible_and_greedy_text_draws_nothing():
    runtime, before = runtime_of(endless("llama")), torch.get_rng_state()

    def texts(**settings):
        found = runtime.generate(prompts_of(), 6, drafting=Drafting(layer=2), **settings)
        return [one.token_ids for one in found]

    seeds = (torch.Generator().manual_seed(seed) for seed in (7, 7, 8))
    one, again, other = (texts(temperature=1.0, generator=seed) for seed in seeds)
    assert one == again != other
    assert texts() == texts()
    assert torch.equal(torch.get_rng_state(), before)


# How much is drafted ------------------------------------------------------------------------------


def test_expected_tokens_are_those_of_coin_tosses():
    coins = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    tokens = coins.long().cumprod(-1).sum(-1) + 1.0
    assert expected_tokens(0.7, 5) == pytest.approx(float(tokens.mean()), abs=0.02)
    assert expected_tokens(1.0, 5) == 6


def test_costs_are_weights_read_in_blocks():
    model = tiny("llama")
    costs = draft_costs(ModelAdapter(model), 1)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert (costs.below, costs.above) == (1, LAYERS - 1)
    assert costs.readout == pytest.approx(VOCAB * WIDTH / block)
    # Two drafts: three tokens through one block, two readings, three blocks and a reading.
    assert costs.of(2) == pytest.approx(3 * 1 + 2 * costs.readout + 3 + costs.readout)
    assert costs.speedup(1.0, 2) == pytest.approx(3 * costs.of(0) / costs.of(2))


def test_the_length_follows_the_acceptance_and_comes_back_from_none():
    length = DraftLength(DraftCosts(below=1, above=3, readout=0.2), most=8)
    assert 0 < length.next < 8
    for _ in range(30):
        length.update(8, 0)
    assert length.next == 8
    for _ in range(100):
        length.update(0, 1)
    assert length.next == 0
    waited = next(rounds for rounds in range(1, 500) if (length.update(0, 0), length.next)[1])
    assert waited > 20


def test_a_head_that_is_never_right_is_given_up(monkeypatch):
    model, prompts = endless("gemma"), prompts_of()[:1]
    runtime, drafting = runtime_of(model), Drafting(layer=1, tokens=4, confidence=0)
    (right,) = runtime.generate(prompts, 40, drafting=drafting)
    read = Drafter.read
    monkeypatch.setattr(Drafter, "read", lambda self, hidden: -read(self, hidden))
    (wrong,) = runtime.generate(prompts, 40, drafting=drafting)
    assert right.token_ids == wrong.token_ids
    assert right.drafts.accepted == right.drafts.drafted > 30
    assert wrong.drafts.accepted == 0
    assert wrong.drafts.drafted < 20  # 148, were it not given up
    assert wrong.drafts.verifications == 39


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(("confidence", "drafts"), [(0.0, 4), (0.5, 3), (0.7, 1), (0.9, 0)])
def test_drafting_stops_under_the_confidence(confidence, drafts, monkeypatch):
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = torch.tensor(0.8 * (VOCAB - 1) / 0.2).log()  # 0.8: then 0.64, 0.51 and 0.41
    monkeypatch.setattr(Drafter, "read", lambda *_: logits)
    draft, made = Drafter.draft, list[int]()

    def spy(*arguments):
        found = draft(*arguments)
        made.append(found[1].shape[1] - 1)
        return found

    monkeypatch.setattr(Drafter, "draft", spy)
    runtime_of(endless("llama")).generate(
        [[1, 7, 9]], 6, drafting=Drafting(layer=1, tokens=4, confidence=confidence)
    )
    assert made[0] == drafts


# Settings -----------------------------------------------------------------------------------------


def test_the_reader_is_the_best_head_there_is_at_the_layer():
    own, lens = (LSpadeHeads(layers, WIDTH) for layers in ([1, 2], [2]))
    lens.metadata = {"training": {"recipe": {"model": {"target": "final"}}}}
    assert draft_reader(Drafting(layer=2), None) is None
    assert draft_reader(Drafting(layer=2), own) is own
    own.beside(lens)
    assert draft_reader(Drafting(layer=2), own) is lens
    assert draft_reader(Drafting(layer=1), own) is own
    assert draft_reader(Drafting(layer=3), own) is None
    assert draft_reader(Drafting(layer=2, reader="l-spade"), own) is own
    assert draft_reader(Drafting(layer=2, reader="logit_lens"), own) is None
    own.metadata = {"training": {"recipe": {"model": {"scope": "choices"}}}}
    assert draft_reader(Drafting(layer=1), own) is None
    with pytest.raises(PolicyError, match="fitted over the choices"):
        draft_reader(Drafting(layer=1, reader="l-spade"), own)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"layer": -1}, PolicyError, "layer is -1; expected 0 or more"),
        (
            {"layer": LAYERS},
            PolicyError,
            "layer 4; this model's layers that can draft go from 0 to 3",
        ),
        ({"layer": 1, "tokens": 0}, PolicyError, "tokens is 0; expected 1 to 64"),
        ({"layer": 1, "tokens": 10**9}, PolicyError, "tokens is 1000000000; expected 1 to 64"),
        ({"layer": 1, "tokens": 2.5}, PolicyError, r"tokens is 2\.5"),
        ({"layer": 1, "confidence": 1}, PolicyError, "confidence is 1"),
        ({"layer": 1, "reader": "spade"}, PolicyError, "reader is 'spade'; expected l-spade"),
        ({"layer": 1, "reader": "tuned_lens"}, PolicyError, "needs tuned_lens heads"),
        ({"layer": 3, "reader": "l-spade"}, ArtifactError, "No head for layer 3"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_error(settings, error, match):
    heads = LSpadeHeads([1], WIDTH).requires_grad_(False)
    heads.metadata = {"training": {"recipe": {"model": {"target": "spade"}}}}
    runtime = runtime_of(tiny("llama"), heads)
    with pytest.raises(error, match=match):
        runtime.generate(prompts_of(), 3, drafting=Drafting(**settings))


def test_a_text_over_the_context_is_one_clear_error():
    with pytest.raises(TaskError, match="60 new ones"):
        runtime_of(tiny("llama")).generate(prompts_of(), 60, drafting=Drafting(layer=1))


def test_nan_logits_are_one_clear_error():
    model = tiny("llama")
    runtime = runtime_of(model)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NaN for prompt"):
        runtime.generate(prompts_of(), 3, drafting=Drafting(layer=1))


def test_a_policy_of_choices_has_no_part_in_it():
    runtime = ExitRuntime(
        endless("llama"),
        LSpadeHeads(range(LAYERS), WIDTH),
        policy=ExitPolicy.always(2, scope="choices"),
    )
    found = runtime.generate(prompts_of(), 4, drafting=Drafting(layer=2))
    assert [one.token_ids for one in found] == own_texts(runtime.adapter.model, prompts_of(), 4)


def test_rotary_angles_that_change_with_the_length_are_decoded_plainly_and_it_is_said(caplog):
    factors = {name: [1.0, 2.0, 3.0, 4.0] for name in ("short_factor", "long_factor")}
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4} | factors
    model = tiny("llama", rope_parameters=rope | {"original_max_position_embeddings": 16})
    model.generation_config.eos_token_id = None
    runtime, prompts = runtime_of(model), prompts_of()
    with caplog.at_level(logging.WARNING):
        short = runtime.generate(prompts, 8, drafting=Drafting(layer=2))
        assert not caplog.records
        long = runtime.generate(prompts, 12, drafting=Drafting(layer=2))
    assert "decoding plainly, without drafts: its rotary angles change" in caplog.text
    assert all(one.drafts is not None for one in short)
    assert all(one.drafts is None for one in long)
    assert [one.token_ids for one in long] == own_texts(model, prompts, 12)


def test_a_drafting_survives_the_disk(tmp_path):
    drafting = Drafting(
        layer=2, tokens=5, confidence=0.3, reader="logit_lens", calibration={"a": 1}
    )
    drafting.save(tmp_path)
    assert Drafting.from_pretrained(tmp_path) == drafting


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda values: values | {"speed": 1}, "unknown key 'speed'"),
        (lambda values: values | {"format_version": 9}, "format_version 9"),
        (lambda values: values | {"layer": "two"}, "layer"),
        (lambda values: {"format_version": 1}, "layer"),
        (lambda values: values | {"calibration": 3}, "calibration"),
        (None, "does not exist"),
    ],
)
def test_a_malformed_drafting_names_the_fault_and_the_remedy(tmp_path, change, match):
    if change is not None:
        Drafting(layer=2).save(tmp_path)
        values = json.loads((tmp_path / "drafting.json").read_text())
        write_json(tmp_path / "drafting.json", change(values))
    with pytest.raises(PolicyError, match=match) as caught:
        Drafting.from_pretrained(tmp_path)
    assert "calibrate --for generate" in str(caught.value)
