"""SPADE-EXIT against the model's own forward, against `spade_logits`, and against a spy."""

import math

import pytest
import torch
from test_adapters import positions_of
from tiny_models import FAMILIES, LAYERS, VOCAB, WIDTH, blocks_of, tiny

from lspade_train import ModelAdapter, spade_logits
from lspade_train.errors import ArtifactError, NumericsError, PolicyError, TaskError
from lspade_train.io.storage import write_json
from lspade_train.models.tokenizer import load_tokenizer
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import signal
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.batching import Query, batches, collate
from lspade_train.runtime.decide import decide_batch

LENGTHS = (7, 3, 5, 6, 2, 7)


def prompts_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [[1, *torch.randint(3, VOCAB, (n - 1,), generator=generator).tolist()] for n in lengths]


def batch_of(prompts, choices=None):
    queries = [Query(i, tuple(ids), choices) for i, ids in enumerate(prompts)]
    return collate(queries, torch.device("cpu"))


def random_heads(layers=range(LAYERS)):
    heads = LSpadeHeads(layers, WIDTH).requires_grad_(False)
    heads.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return heads


def runtime_of(model, policy, **kwargs):
    return ExitRuntime(model, random_heads(), policy=policy, **kwargs)


def mixed_policy(model, prompts, **settings):
    """A third of the rows exit at layer 1, most at layer 3, by their own entropies there."""
    limits = []
    for layer, rank in ((1, 1), (3, 4)):
        decoder = settings.get("decoder", "spade")
        policy = ExitPolicy(layers=(layer,), measure="max_prob", threshold=0.0, decoder=decoder)
        found = decide_batch(runtime_of(model, policy).probe, batch_of(prompts)).entropy
        low, high = found.sort().values[rank : rank + 2].tolist()
        limits.append((low + high) / 2)
    return ExitPolicy(layers=(1, 3), threshold=tuple(limits), **settings)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_never_exiting_gives_the_models_logits_bit_for_bit(family):
    model, batch = tiny(family), batch_of(prompts_of())
    expected = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=positions_of(batch.mask),
        use_cache=False,
        logits_to_keep=1,
    ).logits[:, -1]
    for policy in (ExitPolicy.never(), ExitPolicy(layers=(1, 2), threshold=0.0)):
        outcome = decide_batch(runtime_of(model, policy).probe, batch)
        assert outcome.layers.tolist() == [LAYERS] * len(LENGTHS)
        assert torch.equal(outcome.logits, expected)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_forced_exit_gives_spade_at_that_layer(family, positions):
    model, batch = tiny(family), batch_of(prompts_of())
    for layer in range(LAYERS):
        policy = ExitPolicy.always(layer, positions=positions)
        outcome = decide_batch(runtime_of(model, policy).probe, batch)
        expected = spade_logits(model, batch.ids, batch.mask, layers=[layer], positions=positions)[
            :, 0
        ]
        assert outcome.layers.tolist() == [layer] * len(LENGTHS)
        assert torch.equal(outcome.logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mixed_exits_in_one_batch_equal_the_same_prompts_alone(family):
    model, prompts = tiny(family), prompts_of()
    probe = runtime_of(model, mixed_policy(model, prompts)).probe
    together = decide_batch(probe, batch_of(prompts))
    alone = [decide_batch(probe, batch_of([prompt])) for prompt in prompts]
    assert len(set(together.layers.tolist())) > 1
    assert together.layers.tolist() == [int(one.layers) for one in alone]
    expected = torch.cat([one.logits for one in alone])
    torch.testing.assert_close(together.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoder", ["spade", "l-spade", "tuned_lens", "logit_lens"])
@torch.no_grad()
def test_after_its_exit_a_row_runs_blocks_on_one_token_only(decoder):
    model, prompts = tiny("llama"), prompts_of([6] * 6)
    runtime = runtime_of(model, mixed_policy(model, prompts, decoder=decoder))
    calls = [[] for _ in range(LAYERS)]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, x, i=i: calls[i].append(x[0].shape[:2]))
        for i, block in enumerate(blocks_of(model))
    ]
    decide_batch(runtime.probe, batch_of(prompts))  # the start token's constants, computed once
    for shapes in calls:
        shapes.clear()
    layers = decide_batch(runtime.probe, batch_of(prompts)).layers
    for hook in hooks:
        hook.remove()
    assert len(set(layers.tolist())) > 1
    for block, shapes in enumerate(calls):
        still_in = int((layers > block).sum())
        left = len(layers) - still_in if decoder == "spade" else 0
        assert sum(rows * tokens for rows, tokens in shapes) == 6 * still_in + left
        assert len(shapes) == (still_in > 0) + (left > 0)


@pytest.mark.parametrize("decoder", ["l-spade", "logit_lens"])
@torch.no_grad()
def test_an_answering_head_gives_its_own_distribution(decoder):
    model, batch = tiny("gemma2"), batch_of(prompts_of([5, 5]))
    runtime = runtime_of(model, ExitPolicy.always(2, decoder=decoder))
    plan = runtime.adapter.plan(batch.ids, batch.mask)
    hidden = plan.hidden
    for block in range(2):
        hidden = runtime.adapter.run_block(plan, block, hidden)
    hidden = hidden[:, -1]
    lens = runtime.adapter.unembed(hidden)
    expected = lens if decoder == "logit_lens" else runtime.heads.logits(hidden, 2)
    torch.testing.assert_close(decide_batch(runtime.probe, batch).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_choices_scope_uses_the_same_logits(family):
    model, prompts = tiny(family), prompts_of()
    batch = batch_of(prompts, {"a": 7, "b": 9, "c": 30})
    for layer in (2, None):
        kind = ExitPolicy.never() if layer is None else ExitPolicy.always(layer)
        whole = decide_batch(runtime_of(model, kind).probe, batch).logits[:, [7, 9, 30]]
        few = ExitPolicy(
            layers=kind.layers, threshold=kind.threshold, measure=kind.measure, scope="choices"
        )
        got = decide_batch(runtime_of(model, few).probe, batch).logits
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("measure", ["entropy", "margin", "max_prob"])
def test_each_measure_lets_confident_rows_exit_but_not_nan(measure):
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.1, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    policy = ExitPolicy(layers=(1,), measure=measure, threshold=0.6 if measure != "margin" else 0.5)
    assert policy.exits(signal(logits, measure), 1).tolist() == [True, False, False]


def test_each_check_layer_can_have_its_own_threshold():
    policy = ExitPolicy(layers=(1, 3), threshold=(0.1, 2.0))
    strength = torch.tensor([1.0])
    assert [bool(policy.exits(strength, layer)) for layer in (1, 3)] == [False, True]


def test_long_lists_are_batched_within_the_budget_and_returned_in_order():
    model, prompts = tiny("llama"), prompts_of([3, 9, 4, 7, 5, 8, 2, 6] * 3)
    runtime = runtime_of(model, ExitPolicy.always(2), tokens_per_batch=20)
    queries = [Query(i, tuple(ids), None) for i, ids in enumerate(prompts)]
    assert all(b.ids.numel() <= 20 for b in batches(queries, 20, torch.device("cpu")))
    together = runtime.decide(prompts)
    assert [d.token_id for d in together] == [runtime.decide([p])[0].token_id for p in prompts]


def test_rows_with_different_numbers_of_choices_can_share_a_call():
    runtime = runtime_of(tiny("llama"), ExitPolicy.always(2))
    decisions = runtime.decide(prompts_of([4, 4, 4]), [[5, 6, 7], None, [8, 9]])
    assert [d.scores and len(d.scores) for d in decisions] == [3, None, 2]
    assert sum(decisions[2].scores.values()) == pytest.approx(1.0)
    assert decisions[2].token_id in (8, 9)


def test_text_prompts_and_choices_are_answered_as_text(stories):
    adapter = ModelAdapter.from_pretrained(str(stories))
    heads = LSpadeHeads(range(1, 5), adapter.hidden_size)
    tokenizer = load_tokenizer(str(stories))
    runtime = ExitRuntime(
        adapter, heads, policy=ExitPolicy.always(3, scope="choices"), tokenizer=tokenizer
    )
    prompts = ["Once upon a time there was a little", "Tom and his"]
    decisions = runtime.decide(prompts, ["a", "e"])
    assert all(d.text in ("a", "e") and d.exited and d.layer == 3 for d in decisions)
    with pytest.raises(TaskError, match="'a' is the beginning of 'a b'"):
        runtime.decide(prompts, ["a", "a b"])


@pytest.mark.parametrize(
    ("prompts", "choices", "match"),
    [
        ([[]], None, "The prompt is empty"),
        ([[1, 5], [1] * 65], None, "Prompt 2 of 2 has 65 tokens; the model's context holds 64"),
        ([[1, VOCAB]], None, "token id outside 0..63"),
        ([[1, 5]], [[4, 4]], "two or more, each once"),
        ([[1, 5]], [[4, 5], [6, 7]], "2 lists of choices for 1 prompts"),
        (["text"], None, "need a tokenizer"),
        ("text", None, "The prompts are one text; expected a list"),
        ([[1, 5]], {"x": [4], "y": [4]}, "'y' is the same token as 'x'"),
        ([[1, 5]], {"x": [4], "y": []}, "'y' has no tokens"),
        ([[1] * 63], {"x": [4, 5, 6], "y": [7]}, "63 tokens and 2 new ones"),
        ([[1, 5]], "AB", "The choices are one text; expected a list"),
        ([[1, 5]], [5, -1], "a choice of token id -1, outside"),
        ([[1, 5]], {"x": [4], "y": [5, VOCAB]}, "a choice of token id 64, outside"),
    ],
)
def test_a_bad_prompt_raises_a_clear_error(prompts, choices, match):
    with pytest.raises(TaskError, match=match):
        runtime_of(tiny("llama"), ExitPolicy.never()).decide(prompts, choices)


def test_the_choices_scope_without_choices_raises_a_clear_error():
    runtime = runtime_of(tiny("llama"), ExitPolicy.always(2, scope="choices"))
    with pytest.raises(TaskError, match="scope is choices"):
        runtime.decide([[1, 5]])


def test_nan_logits_raise_a_clear_error():
    model = tiny("llama")
    runtime = runtime_of(model, ExitPolicy(layers=(1, 2), threshold=0.1))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match="prompt 1"):
        runtime.decide([[1, 5]])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"layers": (LAYERS,), "threshold": 0.1}, PolicyError, "check layers go from 0 to 3"),
        ({"layers": (1,), "threshold": 9.0}, PolicyError, r"at most 4\.159 nats"),
        ({"layers": (3,), "threshold": 0.1}, ArtifactError, "No head for layer 3"),
        ({"layers": (1,), "heads_digest": "a" * 64}, PolicyError, "lspade-train calibrate"),
    ],
)
def test_a_policy_that_does_not_fit_raises_a_clear_error(settings, error, match):
    with pytest.raises(error, match=match):
        ExitRuntime(tiny("llama"), random_heads([1, 2]), policy=ExitPolicy(**settings))


def test_checks_without_heads_raise_a_clear_error():
    with pytest.raises(PolicyError, match="need heads"):
        ExitRuntime(tiny("llama"), None, policy=ExitPolicy(layers=(1,), threshold=0.1))
    with pytest.raises(PolicyError, match="needs l-spade heads"):
        ExitRuntime(tiny("llama"), None, policy=ExitPolicy.always(1, decoder="l-spade"))
    for decoder in ("logit_lens", "spade"):  # a fixed exit checks nothing
        assert ExitRuntime(tiny("llama"), None, policy=ExitPolicy.always(1, decoder=decoder))


def test_heads_of_another_model_raise_a_clear_error():
    heads = random_heads()
    heads.metadata = {"base_model": {**ModelAdapter(tiny("qwen2")).identity, "model_id": "other"}}
    with pytest.raises(ArtifactError, match="trained for other"):
        ExitRuntime(tiny("llama"), heads, policy=ExitPolicy.never())


def test_a_policy_round_trips_through_disk(tmp_path):
    policy = ExitPolicy(
        layers=(1, 3), threshold=(0.1, 0.2), measure="margin", scope="choices",
        decoder="l-spade", heads_digest="abc", calibration={"curve": [[0.1, 0.9]]},
    )  # fmt: skip
    policy.save(tmp_path)
    assert ExitPolicy.load(tmp_path) == policy


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"speed": 1}, "unknown key 'speed'"),
        ({"measure": "vibes"}, "expected entropy, margin, max_prob"),
        ({"threshold": -0.1}, "out of range"),
        ({"threshold": [0.1]}, "1 thresholds for 2 check layers"),
        ({"layers": [2, 1]}, "ascending"),
        ({"measure": "margin", "threshold": 1.5}, "0 to 1"),
    ],
)
def test_a_malformed_policy_raises_an_error_with_fault_and_remedy(tmp_path, change, match):
    good = {"format_version": 1, "layers": [1, 2], "threshold": 0.1}
    write_json(tmp_path / "policy.json", good | change)
    with pytest.raises(PolicyError, match=match) as caught:
        ExitPolicy.load(tmp_path)
    assert "lspade-train calibrate" in str(caught.value)
