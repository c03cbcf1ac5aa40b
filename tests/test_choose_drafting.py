"""`choose_drafting`: what is counted, and what is chosen by time."""

import pytest
import torch
from test_generate import endless
from test_lossless import fitted_heads, own_texts
from test_runtime import prompts_of
from tiny_models import LAYERS, WIDTH, tiny

from lspade_train import LSpadeHeads, ModelAdapter
from lspade_train.cli import main
from lspade_train.errors import RecipeError, UnsupportedModelError
from lspade_train.policies.drafting import DraftCosts
from lspade_train.profiling import drafting as profiling
from lspade_train.profiling.drafting import Guesses, choose_drafting, guesses_by_layer, plain_texts

NEW = 8


@pytest.fixture
def clock(monkeypatch):
    """Seconds by what is timed instead of a clock; `plain` takes 2 and every layer 3."""
    times = {"plain": [2.0, 2.0, 2.0]}

    def rounds(work, *_):
        for one in work.values():
            one.run()
        return {name: times.get(name, [3.0, 3.0, 3.0]) for name in work}

    monkeypatch.setattr(profiling, "time_rounds", rounds)
    return times


def choose(family="gemma", **settings):
    """Of a model whose logit lens is right at every layer."""
    adapter = ModelAdapter(endless(family))
    return choose_drafting(adapter, endless(family), None, prompts_of(), new_tokens=NEW, **settings)


@torch.no_grad()
def test_acceptance_is_the_share_of_own_tokens_that_a_head_says():
    model, prompts = endless("llama"), prompts_of()
    texts, adapter = own_texts(model, prompts, NEW), ModelAdapter(model)
    assert plain_texts(model, prompts, NEW) == texts
    joined = [[*p, *t] for p, t in zip(prompts, texts, strict=True)]
    heads = fitted_heads(model, joined, 2)
    found = guesses_by_layer(adapter, heads, prompts, texts)
    assert set(found) == set(range(LAYERS))
    assert found[2].reader == "tuned_lens"
    assert {found[layer].reader for layer in (0, 1, 3)} == {"logit_lens"}
    hits = 0
    for prompt, text in zip(prompts, texts, strict=True):
        for count, token in enumerate(text):
            states = model(torch.tensor([[*prompt, *text[:count]]]), output_hidden_states=True)
            hits += int(heads.logits(states.hidden_states[2][0, -1], 2).argmax()) == token
    assert found[2].acceptance == pytest.approx(hits / (NEW * len(prompts)))
    assert found[2].acceptance > 0.5


def test_texts_end_where_the_model_ends_them():
    model, prompts = endless("llama"), prompts_of()
    free = own_texts(model, prompts, NEW)
    end = free[0][-1]
    model.generation_config.eos_token_id = end
    expected = [t[: t.index(end) + 1] if end in t else t for t in free]
    assert plain_texts(model, prompts, NEW) == expected
    assert len(set(map(len, expected))) > 1


def test_texts_are_without_a_repetition_penalty_of_the_models_configuration():
    model, prompts = endless("llama"), prompts_of()
    expected = own_texts(model, prompts, NEW)
    model.generation_config.repetition_penalty = 5.0
    assert own_texts(model, prompts, NEW) != expected
    assert plain_texts(model, prompts, NEW) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_the_fastest_in_every_round_is_chosen(clock):
    clock |= {"0": [1.0, 1.0, 2.5], "1": [1.9, 1.5, 1.8], "2": [1.5, 1.6, 1.7]}
    found = choose()
    assert found.chosen is not None
    assert found.chosen.layer == 2  # layer 0 has the better median, and was slower in one round
    assert [row.drafting.layer for row in found.rows] == [0, 2, 1, 3]
    (row,) = (row for row in found.rows if row.drafting.layer == 2)
    assert (row.speedup, row.slowest) == (pytest.approx(2 / 1.6), pytest.approx(2 / 1.7))
    assert row.equal == 1
    record = found.chosen.calibration
    assert (record["speedup"], record["new_tokens"], record["batch_size"]) == (row.speedup, NEW, 1)
    assert found.tokens_per_second == pytest.approx(NEW * len(prompts_of()) / 2)


@pytest.mark.usefixtures("clock")
def test_nothing_is_chosen_where_nothing_is_faster():
    found = choose(batch_size=4)
    assert found.chosen is None
    assert len(found.timed) == 4
    assert all(row.equal == 1 for row in found.timed)


@pytest.mark.usefixtures("clock")
def test_layers_that_cannot_pay_are_not_timed():
    found = choose("llama")  # its logit lens is hardly ever right
    assert not found.timed
    assert found.chosen is None
    assert len(found.rows) == LAYERS
    assert max(row.ceiling for row in found.rows) <= 1


def test_nothing_is_chosen_for_a_model_that_never_drafts(clock, monkeypatch, caplog):
    clock["2"] = [1.0, 1.0, 1.0]
    assert choose().chosen is not None
    monkeypatch.setattr(profiling, "why_plain", lambda *_: "its positions depend on the length")
    found = choose()
    assert found.chosen is None
    assert not found.timed
    assert "its positions depend on the length" in caplog.text


def test_the_ceiling_is_the_cost_of_drafting_along_the_texts():
    costs = DraftCosts(below=1, above=3, readout=0.5)
    right = [[True, True, False, True, True]]
    guesses = Guesses("logit_lens", right, [[0.9, 0.9, 0.9, 0.9, 0.3]])
    # Behind the first token: two drafts, the second one wrong; then one, as two tokens are left.
    spent = (3 * 1 + 2 * 0.5 + 3 + 0.5) + (2 * 1 + 1 * 0.5 + 3 + 0.5)
    assert guesses.speedup(costs, 2, 0.0) == pytest.approx(4 * 4.5 / spent)
    # Stopped before the second, for 0.81 is too low: it is read, and not drafted.
    spent = 2 * (2 * 1 + 1 * 0.5 + 3 + 0.5) + 0.5
    assert guesses.speedup(costs, 2, 0.85) == pytest.approx(4 * 4.5 / spent)
    assert guesses.acceptance == pytest.approx(4 / 5)


def test_a_baseline_that_is_no_second_load_is_refused():
    model = tiny("llama")
    with pytest.raises(UnsupportedModelError, match="is the runtime.s own model"):
        choose_drafting(ModelAdapter(model), model, None, prompts_of())


def test_options_that_drafting_cannot_use_are_named(capsys):
    given = ["--config", "quickstart", "--for", "generate", "--cost", "time"]
    assert main(["calibrate", *given]) == 1
    assert "--cost is of exits" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"new_tokens": 0}, {"batch_size": 0}, {"prompts": []}])
def test_nothing_to_measure_is_one_clear_error(settings):
    asked = {"prompts": prompts_of()} | settings
    with pytest.raises(RecipeError, match="expected 1 or more"):
        choose_drafting(ModelAdapter(tiny("llama")), tiny("llama"), None, **asked)


def test_heads_over_the_choices_are_not_counted():
    model, prompts = endless("llama"), prompts_of()
    heads = LSpadeHeads(range(LAYERS), WIDTH).requires_grad_(False)
    heads.metadata = {"training": {"recipe": {"model": {"scope": "choices"}}}}
    found = guesses_by_layer(ModelAdapter(model), heads, prompts, own_texts(model, prompts, 4))
    assert {guesses.reader for guesses in found.values()} == {"logit_lens"}
