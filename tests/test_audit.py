"""An audit in use: what it counts, what it costs, when it raises an alarm, and its state file."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from test_runtime import prompts_of, runtime_of
from tiny_models import LAYERS, VOCAB, tiny

from lspade_train import Audit, ExitPolicy, ExitRuntime
from lspade_train.cli import main
from lspade_train.errors import AuditError
from lspade_train.policies.audit import (
    AuditFile,
    AuditKey,
    AuditState,
    Seen,
    audit_of,
    default_budget,
    policy_digest,
)
from lspade_train.policies.flops import counter
from lspade_train.policies.gate import Gate
from lspade_train.policies.promise import promise

ALWAYS = ExitPolicy.always(1, decoder="l-spade")
"""Random heads: nearly every answer differs from the full model's."""

KEY = AuditKey(policy="a" * 64, heads=None, budget=0.02, alpha=0.05)
TWENTY = prompts_of([6] * 20)
FORK = multiprocessing.get_context("fork")


def audited(tmp_path, policy=ALWAYS, **settings) -> ExitRuntime:
    given = {"state": tmp_path / "audit.json", "rate": 1.0, "budget": 0.5, "seed": 0} | settings
    return runtime_of(tiny("llama"), policy, audit=Audit(**given))


def never(prompts):
    return runtime_of(tiny("llama"), ExitPolicy.never()).decide(prompts)


@pytest.fixture(autouse=True)
def _without_wandb(monkeypatch):
    """`audit` logs its own run where W&B is on, which takes seconds."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


# Counting -----------------------------------------------------------------------------------


def test_failures_are_the_rows_that_the_full_model_answers_differently(tmp_path):
    prompts = prompts_of([7, 3, 5, 6, 2, 7] * 8)
    runtime = audited(tmp_path, budget=0.99)
    found = runtime.decide(prompts)
    pairs = zip(found, never(prompts), strict=True)
    differ = sum(early.token_id != full.token_id for early, full in pairs)
    assert differ > 0
    seen = runtime.auditor.flush().seen
    assert (seen.rows, seen.exited, seen.drawn, seen.audited) == (48, 48, 48, 48)
    assert seen.failures == differ


def test_the_full_model_answers_among_the_same_choices_of_each_row(tmp_path):
    prompts, choices = TWENTY, [[5, 6], [7, 8, 9]] * 10
    policy = ExitPolicy.always(1, decoder="l-spade", scope="choices")
    runtime = audited(tmp_path, policy, budget=0.99)
    found = runtime.decide(prompts, choices)
    full = runtime_of(tiny("llama"), ExitPolicy.never()).decide(prompts, choices)
    differ = sum(a.token_id != b.token_id for a, b in zip(found, full, strict=True))
    assert runtime.auditor.flush().seen.failures == differ < 20


def test_rows_without_an_exit_count_as_agreeing_at_no_cost(tmp_path):
    runtime = audited(tmp_path, ExitPolicy(layers=(1,), threshold=0.0))
    runtime.decide(TWENTY)
    seen = runtime.auditor.flush().seen
    assert (seen.drawn, seen.audited, seen.failures, seen.exits) == (20, 0, 0, {LAYERS: 20})
    assert seen.flops[2] == 0


def test_rows_counted_in_an_earlier_run_are_answered_but_not_counted_again(tmp_path):
    runtime = audited(tmp_path, budget=0.99)
    assert runtime.decide(TWENTY, counted=5) == runtime_of(tiny("llama"), ALWAYS).decide(TWENTY)
    assert runtime.auditor.flush().seen.rows == 15


def test_auditing_changes_no_answer(tmp_path):
    plain = runtime_of(tiny("llama"), ALWAYS).decide(TWENTY)
    assert audited(tmp_path, budget=0.99).decide(TWENTY) == plain


def test_the_fraction_of_sampled_rows_matches_the_rate(tmp_path):
    runtime = audited(tmp_path, ExitPolicy.never(), rate=0.2)
    for _ in range(20):
        runtime.decide(prompts_of([2] * 100))
    seen = runtime.auditor.flush().seen
    assert seen.rows == 2000
    assert binomtest(seen.drawn, seen.rows, 0.2).pvalue > 1e-3


@pytest.mark.slow
def test_a_restart_samples_other_rows_than_the_previous_run(tmp_path):
    blocks = []
    for _ in range(4):
        runtime = audited(tmp_path, ExitPolicy.never(), rate=0.5)
        runtime.decide(prompts_of([2] * 40))
        blocks.append(runtime.auditor.flush().seen.drawn)
    assert len({b - a for a, b in zip([0, *blocks], blocks, strict=False)}) > 1


def test_flops_match_pytorchs_counter(tmp_path):
    audit = Audit(state=tmp_path / "audit.json", rate=1.0, budget=0.99)
    # One prompt at a time: a batch is also charged for what its rows share.
    runtime = runtime_of(tiny("llama"), ALWAYS, audit=audit, tokens_per_batch=1)
    runtime.decide(TWENTY)  # the model's parts are counted at the first call
    before = runtime.auditor.flush().seen.flops
    with counter() as count:
        runtime.decide(TWENTY)
    model, policy, audit = (
        now - then for now, then in zip(runtime.auditor.flush().seen.flops, before, strict=True)
    )
    # The counter also sees the few products that compute the cost of a row.
    assert policy + audit == pytest.approx(count.get_total_flops(), rel=1e-3)
    assert model < audit < 1.05 * model  # every row exited; its check's answer is read too


def test_nan_logits_of_the_full_model_count_as_a_failure(tmp_path, monkeypatch):
    runtime = audited(tmp_path, budget=0.99)
    monkeypatch.setattr(
        "lspade_train.runtime.trace.Probe.answer",
        lambda probe, state, *_: torch.full((len(state), VOCAB), torch.nan),
    )
    runtime.decide(TWENTY)
    assert runtime.auditor.flush().seen.failures == 20


def test_a_failing_call_counts_no_rows(tmp_path):
    runtime = audited(tmp_path)
    with pytest.raises(Exception, match="outside"):
        runtime.decide([*TWENTY, [10**6]])
    assert runtime.auditor.flush().seen.rows == 0


def test_threads_sharing_a_runtime_lose_no_counts(tmp_path):
    runtime = audited(tmp_path, budget=0.99)
    threads = [
        threading.Thread(target=lambda: [runtime.decide(TWENTY[:4]) for _ in range(5)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = runtime.auditor.flush()
    assert state.seen.rows == state.seen.drawn == 80
    assert AuditState.load(tmp_path / "audit.json") == state


# The alarm ----------------------------------------------------------------------------------


def test_an_alarm_warns_once_calls_back_once_and_survives_a_restart(tmp_path, caplog):
    calls = []
    runtime = audited(tmp_path, budget=0.02, callback=calls.append)
    for _ in range(3):
        runtime.decide(TWENTY)
    assert caplog.text.count("AUDIT ALARM") == 1
    (state,) = calls
    assert state.alarm["failures"] == state.seen.failures > 0
    again = audited(tmp_path, budget=0.02, callback=calls.append)
    assert again.auditor.state.alarm == state.alarm
    assert len(calls) == 2


def test_a_callback_that_fails_loses_no_answer(tmp_path, caplog):
    def fail(_):
        raise OSError("the web hook does not answer")

    runtime = audited(tmp_path, budget=0.02, callback=fail)
    assert len(runtime.decide(TWENTY)) == 20
    assert "the web hook does not answer" in caplog.text


def test_an_audit_without_heads_is_of_one_model(tmp_path):
    policy = ExitPolicy.always(1, decoder="logit_lens")

    def audit_of(seed):
        audit = Audit(state=tmp_path / "audit.json", rate=1.0, budget=0.5)
        torch.manual_seed(seed)
        model = tiny("llama")
        if seed:
            torch.nn.init.normal_(model.lm_head.weight)
        ExitRuntime(model, None, policy=policy, audit=audit).decide(TWENTY)

    audit_of(0)
    audit_of(0)
    with pytest.raises(AuditError, match="belongs to another heads"):
        audit_of(1)


def test_a_callback_can_read_the_state(tmp_path):
    found = []
    runtime = audited(
        tmp_path, budget=0.02, callback=lambda _: found.append(runtime.auditor.flush().alarm)
    )
    runtime.decide(TWENTY)
    assert found == [runtime.auditor.state.alarm]


def test_with_never_exit_an_alarm_routes_every_row_to_the_full_model(tmp_path):
    runtime = audited(tmp_path, budget=0.02, on_alarm="never_exit")
    assert all(decision.exited for decision in runtime.decide(TWENTY))
    assert runtime.decide(TWENTY) == never(TWENTY)
    seen = runtime.auditor.flush().seen
    assert (seen.rows, seen.unaudited) == (20, 20)


def test_an_alarm_in_one_process_reaches_the_others_at_their_next_update(tmp_path):
    first, second = (audited(tmp_path, budget=0.02, on_alarm="never_exit") for _ in range(2))
    first.decide(TWENTY)
    second.decide(TWENTY[:1])
    assert not second.decide(TWENTY[:1])[0].exited


def test_no_alarm_when_the_disagreement_equals_the_budget(tmp_path):
    file = AuditFile(tmp_path / "audit.json", KEY)
    for _ in range(20):
        state = file.add(Seen(rows=2500, exits={4: 2500}, drawn=50, failures=1, audited=50))
    assert state.alarm is None
    assert state.disagreement == 0.02


def stream(rng, rows, rate, disagreement, state, batch=250):
    """Rows served until the alarm; None if `rows` rows do not raise it."""
    for done in range(0, rows, batch):
        drawn = int(rng.binomial(batch, rate))
        failures = int(rng.binomial(drawn, disagreement))
        state = state.plus(Seen(rows=batch, exits={1: batch}, drawn=drawn, failures=failures))
        if state.alarm is not None:
            return done + batch
    return None


@pytest.mark.slow
def test_at_most_5_percent_of_healthy_streams_raise_an_alarm():
    rng, fresh = np.random.default_rng(0), AuditState(key=KEY)
    alarms = [stream(rng, 5000, 0.02, KEY.budget, fresh) is not None for _ in range(500)]
    assert sum(alarms) <= 25


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_a_shift_raises_the_alarm_after_about_the_predicted_number_of_rows(rate):
    rng, fresh = np.random.default_rng(1), AuditState(key=KEY)
    found = [stream(rng, 200_000, rate, 0.1, fresh) for _ in range(60)]
    assert None not in found
    assert np.median(found) == pytest.approx(fresh.rows_until_alarm(0.1, rate), rel=0.5)


# The budget ---------------------------------------------------------------------------------


def test_the_default_budget_is_the_guaranteed_disagreement():
    record = {"risk": "disagreement", "budget": 0.03, "n": 500, "chosen": {"disagreement": 0.0}}
    assert default_budget(ExitPolicy(layers=(), calibration=record)) == 0.03


@pytest.mark.parametrize("failures", [0, 7, 299, 300])
def test_the_fallback_budget_is_an_exact_bound_on_the_measured_disagreement(failures):
    chosen = {"disagreement": failures / 300}
    record = {"risk": "accuracy_drop", "budget": 0.01, "n": 300, "chosen": chosen}
    exact = binomtest(failures, 300, alternative="less").proportion_ci(0.95, "exact").high
    found = default_budget(ExitPolicy(layers=(), calibration=record))
    assert found == pytest.approx(exact, abs=1e-6)
    assert found < 1


def test_an_uncalibrated_policy_requires_a_budget(tmp_path):
    with pytest.raises(AuditError, match=r"such as 0\.02"):
        audited(tmp_path, budget=None)


@pytest.mark.parametrize(
    "setting", [{"rate": 0.0}, {"rate": 1.5}, {"budget": 1.0}, {"alpha": 0.0}, {"on_alarm": "cry"}]
)
def test_out_of_range_settings_are_named_in_the_error(tmp_path, setting):
    with pytest.raises(AuditError, match=next(iter(setting))):
        audited(tmp_path, **setting)


# The file -----------------------------------------------------------------------------------


def with_seen(state, **changes):
    return json.dumps(state | {"seen": state["seen"] | changes})


DAMAGES = {
    "cut": lambda state: json.dumps(state)[:200],
    "empty": lambda _: "",
    "list": lambda _: "[]",
    "another format": lambda state: json.dumps(state | {"format_version": 99}),
    "a negative count": lambda state: with_seen(state, failures=-1),
    "sums that differ": lambda state: with_seen(state, drawn=4),
    "an unknown count": lambda state: with_seen(state, colour=1),
    "half a row": lambda state: json.dumps(state | {"blocks": [[1.5, 1]]}),
    "a bad budget": lambda state: json.dumps(state | {"key": state["key"] | {"budget": 2}}),
    "a bad alarm": lambda state: json.dumps(state | {"alarm": "yes"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_file_raises_a_clear_error_and_is_not_modified(tmp_path, damage):
    path = tmp_path / "audit.json"
    AuditFile(path, KEY).add(Seen(rows=9, exits={1: 9}, drawn=3, audited=3, failures=1))
    path.write_text(DAMAGES[damage](json.loads(path.read_text())))
    before = path.read_bytes()
    with pytest.raises(AuditError, match=r"audit\.json"):
        AuditFile(path, KEY)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"policy": "b" * 64}, "policy"),
        ({"heads": "c" * 64}, "heads"),
        ({"budget": 0.03}, "budget"),
        ({"alpha": 0.01}, "alpha"),
    ],
)
def test_the_state_of_another_audit_is_rejected_with_the_differing_field(tmp_path, change, name):
    path = tmp_path / "audit.json"
    AuditFile(path, KEY).add(Seen(rows=1, exits={1: 1}))
    before = path.read_bytes()
    with pytest.raises(AuditError, match=f"belongs to another {name}"):
        AuditFile(path, AuditKey(**vars(KEY) | change))
    assert path.read_bytes() == before


def test_damage_to_the_state_file_while_serving_loses_no_answers(tmp_path, caplog):
    runtime = audited(tmp_path, budget=0.99)
    first = runtime.decide(TWENTY)
    path = tmp_path / "audit.json"
    good = path.read_bytes()
    path.write_text("{")
    assert runtime.decide(TWENTY) == runtime.decide(TWENTY) == first
    assert caplog.text.count("counts are kept in memory") == 1
    with pytest.raises(AuditError, match="not valid JSON"):
        runtime.auditor.flush()
    assert path.read_text() == "{"
    path.write_bytes(good)
    assert runtime.auditor.flush().seen.rows == 60


def test_a_policy_digest_depends_only_on_its_behaviour():
    first = ExitPolicy(layers=(1,), threshold=0.5)
    assert policy_digest(first) == policy_digest(
        ExitPolicy(layers=(1,), threshold=0.5, calibration={"n": 3})
    )
    assert policy_digest(first) != policy_digest(ExitPolicy(layers=(1,), threshold=0.6))


def test_a_policy_digest_names_a_gate_before_and_after_it_is_saved(tmp_path):
    def gated(bias):
        weight = torch.ones(1, 10)
        gate = Gate((1,), ("l-spade",), weight, torch.tensor([bias]))
        return ExitPolicy(layers=(1,), threshold=0.5, measure="gate", gate=gate)

    first = gated(0.0)
    first.save(tmp_path)
    assert policy_digest(ExitPolicy.load(tmp_path)) == policy_digest(first)
    assert policy_digest(gated(1.0)) != policy_digest(first)


def _count(path, updates, reported):
    """Add rows one at a time, and report after each that it is done."""
    file = AuditFile(path, KEY)
    for _ in range(updates):
        file.add(Seen(rows=1, exited=1, exits={1: 1}, drawn=1, audited=1))
        os.write(reported, b".")


def _counting(path, updates):
    read, write = os.pipe()
    process = FORK.Process(target=_count, args=(path, updates, write), daemon=True)
    process.start()
    os.close(write)
    return process, read


def test_concurrent_and_killed_processes_lose_no_completed_counts(tmp_path):
    path = tmp_path / "audit.json"
    draw, reported = random.Random(3), 0
    other, read_other = _counting(path, 60)
    for _ in range(6):
        process, read = _counting(path, 10**6)
        time.sleep(draw.uniform(0.02, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while done := os.read(read, 4096):
            reported += len(done)
        os.close(read)
    other.join(60)
    os.close(read_other)
    assert other.exitcode == 0
    state = AuditState.load(path)
    # Each killed process may have written one update that it could no longer report.
    assert 60 + reported <= state.seen.rows <= 60 + reported + 6
    assert AuditFile(path, KEY).add(Seen(rows=1, exits={1: 1})).seen.rows == state.seen.rows + 1


# Reporting ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A policy and its audit, which has raised an alarm."""
    record = {
        "risk": "disagreement", "budget": 0.02, "confidence": 0.95, "n": 300,
        "chosen": {"threshold": 0.5, "disagreement": 0.01},
        "rows": {"task": "jsonl", "split": "validation", "part": "all"},
        "profile": {"exit_counts": {"1": 200, "4": 100}},
    }  # fmt: skip
    policy = ExitPolicy(layers=(1,), threshold=0.5, calibration=record)
    policy.save(tmp_path)
    key = AuditKey(policy=policy_digest(policy), heads=None, budget=0.02, alpha=0.05)
    seen = Seen(
        rows=5000, exited=1000, exits={1: 1000, 4: 4000}, drawn=100, audited=20, failures=12,
        flops=(100.0, 80.0, 0.4),
    )  # fmt: skip
    AuditFile(tmp_path / "audit.json", key).add(seen)
    return tmp_path


def test_audit_prints_the_counts_and_writes_a_page(folder, capsys):
    assert main(["audit", str(folder), "--html", str(folder / "audit.html")]) == 0
    printed, page = capsys.readouterr().out, (folder / "audit.html").read_text()
    for text in (printed, page):
        assert "12.00% [" in text
        assert "0.40% of the full model" in text
        assert "66.7%" in text  # exits at layer 1 during calibration
        assert "ALARM on" in text
        assert "chi-square p = " in text


def test_audit_shows_a_state_file_without_its_policy(folder, capsys):
    (folder / "policy.json").unlink()
    assert main(["audit", str(folder / "audit.json")]) == 0
    assert "5,000" in capsys.readouterr().out


def test_audit_rejects_a_missing_state_and_another_policy(folder, capsys):
    assert main(["audit", str(folder / "nothing.json")]) == 1
    assert "nothing.json does not exist" in capsys.readouterr().err
    ExitPolicy(layers=(2,), threshold=0.5).save(folder)
    assert main(["audit", str(folder), "--policy", str(folder)]) == 1
    assert "belongs to a different policy" in capsys.readouterr().err


def test_the_guarantee_states_risk_prompts_confidence_and_audit_status(folder):
    words = promise(ExitPolicy.load(folder).calibration, audit_of(folder))
    assert "At most 2% of the answers differ from the full model's, with 95% confidence" in words
    assert "as the 300 rows on which it was tested (validation split of jsonl)" in words
    assert "100 of 5,000 production rows were sampled, 12 disagreed" in words
    assert "ALARM" in words


def test_the_audit_of_another_policy_is_not_shown_for_this_one(folder):
    assert audit_of(folder) is not None
    ExitPolicy(layers=(2,), threshold=0.5).save(folder)
    assert audit_of(folder) is None
