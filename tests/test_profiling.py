"""The profile's counts against the runtime's own, and its files."""

import json

import pytest
from rich.console import Console
from test_runtime import prompts_of, runtime_of
from tiny_models import LAYERS, tiny

from lspade_train.errors import PolicyError, RecipeError, TaskError, UnsupportedModelError
from lspade_train.policies.flops import count_flops, exit_costs
from lspade_train.policies.policy import ExitPolicy
from lspade_train.profiling import profile, profile_generation


def untouched():
    """A second copy of the tiny model."""
    return tiny("llama")


@pytest.fixture(scope="module")
def measured():
    runtime = runtime_of(tiny("llama"), ExitPolicy(layers=(1, 2), threshold=0.5))
    return runtime, profile(
        runtime,
        untouched(),
        lengths=(8, 16),
        batch_sizes=(1, 3),
        thresholds=(None, 0.0, 4.15),
        repeats=2,
    )


def test_the_table_has_a_row_per_length_batch_size_and_threshold(measured):
    shapes = [(row.tokens, row.rows, row.threshold) for row in measured[1].results]
    assert shapes == [
        (tokens, rows, threshold)
        for tokens in (8, 16)
        for rows in (1, 3)
        for threshold in (None, 0.0, 4.15)
    ]


def test_a_looser_threshold_exits_earlier_and_costs_less(measured):
    for place in range(0, 12, 3):
        never, strict, loose = measured[1].results[place : place + 3]
        assert (never.mean_exit_layer, strict.mean_exit_layer) == (LAYERS, LAYERS)
        assert loose.mean_exit_layer == 1
        assert never.flops == pytest.approx(1)
        assert strict.flops > 1 > loose.flops


def test_the_flops_match_the_flop_accounting(measured):
    runtime, found = measured
    policy = ExitPolicy(layers=(1, 2), threshold=4.15)
    expected = exit_costs(count_flops(runtime.adapter, runtime.heads), [16], [1], policy)
    assert found.results[-1].flops == pytest.approx(float(expected))


def test_times_and_memory_are_measured_on_this_machine(measured):
    for row in measured[1].results:
        assert row.seconds > 0
        assert row.tokens_per_second == pytest.approx(row.tokens * row.rows / row.seconds)
        assert row.peak_mb is None or row.peak_mb >= 0


def test_the_speed_up_is_the_ratio_of_the_printed_medians(measured, monkeypatch):
    # Ratios of 2, 3 and 3, whose median differs from the ratio of the medians.
    ticks = iter([2.0, 1.0, 6.0, 2.0, 1.5, 0.5])
    monkeypatch.setattr("lspade_train.profiling.forward.seconds_of", lambda *_: next(ticks))
    shape = {"lengths": (8,), "batch_sizes": (1,), "thresholds": (None,), "repeats": 3}
    (row,) = profile(measured[0], untouched(), **shape).results
    assert (row.plain_seconds, row.seconds) == (2.0, 1.0)
    assert row.speedup == 2.0
    assert row.paired_speedup == (2.0, 3.0)


def test_the_baseline_is_an_unmodified_model():
    runtime, plain = runtime_of(tiny("llama"), ExitPolicy.never()), untouched()
    called = []
    hook = runtime.adapter.model.register_forward_pre_hook(lambda *_: called.append(1))
    runtime.decide([[1, 5]])  # a model with a hook is rechecked
    called.clear()
    profile(runtime, plain, lengths=(4,), batch_sizes=(1,), repeats=1)
    hook.remove()
    assert not called
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_the_runtimes_own_model_is_rejected_as_a_baseline():
    runtime = runtime_of(tiny("llama"), ExitPolicy.never())
    with pytest.raises(UnsupportedModelError, match=r"own model(.|\n)*from_pretrained"):
        profile(runtime, runtime.adapter.model, lengths=(4,))


def test_another_model_is_rejected_as_a_baseline():
    runtime = runtime_of(tiny("llama"), ExitPolicy.never())
    with pytest.raises(UnsupportedModelError, match=r"another model(.|\n)*from_pretrained"):
        profile(runtime, tiny("gpt2"), lengths=(4,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repeats", 0),
        ("batch_sizes", (0,)),
        ("batch_sizes", ()),
        ("lengths", ()),
        ("lengths", (-3,)),
    ],
)
def test_an_invalid_profile_setting_is_named_in_the_error(measured, name, value):
    with pytest.raises(RecipeError, match=f"--{name} is .*expected"):
        profile(measured[0], untouched(), **{name: value})


def test_a_threshold_out_of_the_measures_range_is_rejected(measured):
    with pytest.raises(PolicyError, match="threshold -1.0 is out of range for entropy"):
        profile(measured[0], untouched(), lengths=(4,), thresholds=(-1.0,))
    with pytest.raises(PolicyError, match="the entropy of 64 tokens is at most"):
        profile(measured[0], untouched(), lengths=(4,), thresholds=(99.0,))


@pytest.mark.parametrize(("tokens", "repeats"), [(0, 1), (2, 0)])
def test_generating_zero_tokens_is_rejected(measured, tokens, repeats):
    with pytest.raises(RecipeError, match="expected 1 or more"):
        profile_generation(measured[0], prompts_of([4]), tokens, repeats=repeats)


def test_a_policy_with_an_answer_method_per_layer_can_be_profiled():
    policy = ExitPolicy(layers=(1, 2), threshold=4.15, decoder=("l-spade", "spade"))
    found = profile(
        runtime_of(tiny("llama"), policy), untouched(), lengths=(8,), batch_sizes=(2,), repeats=1
    )
    assert 0 < found.results[0].flops < 1


def test_generation_with_an_answer_method_per_layer_takes_spade_at_other_layers():
    decoders = ("l-spade", "spade")
    policy = ExitPolicy(layers=(1, 2), threshold=0.5, decoder=decoders)
    rows = profile_generation(runtime_of(tiny("llama"), policy), prompts_of([6]), 2, repeats=1)
    alone = [
        profile_generation(
            runtime_of(tiny("llama"), ExitPolicy(layers=(1, 2), threshold=0.5, decoder=decoder)),
            prompts_of([6]), 2, layers=[layer], repeats=1,
        )[0]
        for layer, decoder in ((1, "l-spade"), (2, "spade"), (3, "spade"))
    ]  # fmt: skip
    found = {row.layer: row.agreement for row in rows}
    assert {row.layer: row.agreement for row in alone}.items() <= found.items()


def test_the_profile_is_written_drawn_and_printed(measured, tmp_path):
    found = measured[1]
    path = found.save(tmp_path)
    written = json.loads(path.read_text())
    assert len(written["results"]) == 12
    assert written["prompts"] == "random"
    assert (tmp_path / "figures/speedup.png").stat().st_size > 5000
    console = Console(width=140, record=True, quiet=True)
    console.print(found.table())
    assert len(found.table().rows) == 12


def test_real_prompts_are_truncated_or_concatenated_to_the_length():
    seen = []
    runtime, plain = runtime_of(tiny("llama"), ExitPolicy.never()), untouched()
    hook = plain.model.embed_tokens.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].tolist())
    )
    first, second = prompts_of([4, 9])
    profile(runtime, plain, lengths=(6,), batch_sizes=(2,), prompts=[first, second], repeats=1)
    hook.remove()
    batch = next(ids for ids in seen if len(ids) == 2)
    assert batch == [[1, *second[-2:], *first[1:]], [1, *second[-5:]]]


def test_the_policys_own_threshold_is_the_default():
    policy = ExitPolicy(layers=(1, 2), threshold=(0.1, 0.2), scope="choices")
    runtime = runtime_of(tiny("llama"), policy)
    found = profile(runtime, untouched(), lengths=(4,), batch_sizes=(1,), choices=(5, 6), repeats=1)
    assert [row.threshold for row in found.results] == [(0.1, 0.2)]


@pytest.mark.parametrize(
    ("scope", "length", "match"),
    [("vocabulary", 65, "takes 2 to 64 tokens"), ("choices", 8, "scope is choices")],
)
def test_invalid_profile_arguments_raise_a_clear_error(scope, length, match):
    runtime = runtime_of(tiny("llama"), ExitPolicy.always(1, scope=scope))
    with pytest.raises(TaskError, match=match):
        profile(runtime, untouched(), lengths=(length,))


def test_generation_at_the_top_layer_matches_the_model_and_early_exits_hold_less():
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    runtime = runtime_of(model, ExitPolicy.never())
    rows = profile_generation(runtime, prompts_of([20, 12]), 6, layers=(1, 3, LAYERS), repeats=1)
    assert [row.layer for row in rows] == [1, 3, LAYERS]
    assert (rows[-1].agreement, rows[-1].first_token) == (1, 1)
    assert rows[0].cache_bytes < rows[1].cache_bytes < rows[2].cache_bytes
    assert all(0 <= row.agreement <= 1 and row.prefill_seconds > 0 for row in rows)


def test_agreement_is_the_fraction_of_equal_tokens_by_position():
    model, prompts = tiny("llama"), prompts_of([7, 5])
    model.generation_config.eos_token_id = None
    runtime = runtime_of(model, ExitPolicy.never())
    full = [one.token_ids for one in runtime.generate(prompts, 4)]
    early = [one.token_ids for one in runtime_of(model, ExitPolicy.always(1)).generate(prompts, 4)]
    hits = [
        a == b for one, two in zip(early, full, strict=True) for a, b in zip(one, two, strict=True)
    ]
    (row,) = profile_generation(runtime, prompts, 4, layers=(1,), repeats=1)
    assert row.agreement == pytest.approx(sum(hits) / 8)
