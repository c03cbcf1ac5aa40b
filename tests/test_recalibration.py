"""A stricter policy from audited rows: within its budget, and written without losing data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom
from test_audit import KEY, audited, never
from test_runtime import mixed_policy, prompts_of, random_heads
from test_seconds import seconds_of
from tiny_models import LAYERS, tiny

from lspade_train import ExitPolicy, ExitRuntime
from lspade_train.cli import main
from lspade_train.errors import AuditError
from lspade_train.io.tracking import wandb_is_on
from lspade_train.policies import audited_rows
from lspade_train.policies.audit import AuditFile, AuditKey, Seen, policy_digest
from lspade_train.policies.audited_rows import AuditedRow, AuditedRows, append, load, rows_file
from lspade_train.policies.flops import FlopCounts, count_flops
from lspade_train.policies.policy import NO_GROUP
from lspade_train.policies.recalibration import recalibrate, since
from lspade_train.policies.seconds import Piece

BUDGET, TIME = 0.05, "2026-03-01T00:00:00+00:00"
COUNTS = FlopCounts(
    prompt=torch.ones(7, 3, dtype=torch.float64),
    step=torch.ones(6, dtype=torch.float64),
    norm=0.1,
    token=0.01,
    vocab=50,
    maps={"l-spade": 0.1},
    width=4,
)
POLICY = ExitPolicy(layers=(2, 4), threshold=(1.0, 1.0), decoder="l-spade")


def rows_of(n, rng, *, wrong=(0.4, 0.1), group=None):
    """Rows whose answer at a check is more often wrong the higher its entropy."""
    found = []
    for values in rng.uniform(0, 2, (n, 2)):
        stays = (values > 1).all()
        agrees = tuple(bool(rng.random() > rate * v) for rate, v in zip(wrong, values, strict=True))
        found.append(
            AuditedRow(
                tokens=8, choices=None, shared=0, group=group, time=TIME,
                values=None if stays else tuple(values.tolist()), agrees=None if stays else agrees,
            )
        )  # fmt: skip
    return found


def file_of(rows, policy=POLICY):
    return AuditedRows(policy=policy_digest(policy), flops=COUNTS.to_json(), rows=rows)


def disagreement(policy, rows):
    """Computed by hand, row by row."""
    lost = 0
    for row in rows:
        for layer, limit in zip(policy.check_layers, policy.threshold or (), strict=True):
            place = POLICY.layers.index(layer)
            if row.values is not None and row.values[place] <= limit:
                lost += not row.agrees[place]
                break
    return lost / len(rows)


@pytest.fixture(autouse=True)
def _without_wandb(monkeypatch):
    """`audit` logs its own run where W&B is on, which takes seconds."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


# Choosing -------------------------------------------------------------------------------------


def test_the_chosen_policy_is_stricter_and_records_its_disagreement():
    rows = rows_of(1500, np.random.default_rng(0))
    found = recalibrate(POLICY, file_of(rows), BUDGET)
    assert disagreement(POLICY, rows) > BUDGET
    assert not found.unchanged
    assert found.policy.threshold is not None
    limits = dict(zip(found.policy.layers, found.policy.threshold, strict=True))
    assert all(0 <= limit <= 1.0 for limit in limits.values())
    assert set(limits) <= {2, 4}
    assert found.calibration.chosen.disagreement == pytest.approx(disagreement(found.policy, rows))
    assert found.calibration.chosen.compute_saved > 0
    words = found.policy.calibration["promise"]
    assert (
        "as the 1,500 production rows on which it was tested (sampled by the audit on 2026-03-01)"
        in words
    )


def test_a_policy_priced_by_time_is_recalibrated_by_time():
    block = (Piece(1.0, 7.0),) * 6
    seconds = seconds_of(prompt=block, step=block, scope="vocabulary").to_json()
    policy = replace(POLICY, calibration={"cost": "time", "seconds": seconds})
    rows = rows_of(1500, np.random.default_rng(0))
    found = recalibrate(policy, file_of(rows, policy), BUDGET)
    chosen = found.calibration.chosen
    assert 0 < chosen.time_saved != chosen.compute_saved
    by_flops = recalibrate(POLICY, file_of(rows), BUDGET).calibration.curve
    saved = {(row.layers, row.threshold): row.compute_saved for row in by_flops}
    assert chosen.compute_saved == saved[chosen.layers, chosen.threshold]
    assert found.policy.calibration["seconds"] == seconds


@pytest.mark.parametrize("splits", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_the_guarantee_fails_in_at_most_5_percent_of_splits(splits):
    rng = np.random.default_rng(1)
    many = rows_of(20_000, rng)
    over = exits = 0
    for _ in range(splits):
        tested = [many[place] for place in rng.integers(0, len(many), 400)]
        found = recalibrate(POLICY, file_of(tested), BUDGET).policy
        if found.threshold is not None:
            exits += 1
            over += disagreement(found, many) > BUDGET
    assert exits > splits / 2
    assert over <= binom.ppf(0.99, splits, 0.05)


def test_a_policy_that_still_passes_is_kept():
    rows = rows_of(1500, np.random.default_rng(2), wrong=(0.01, 0.01))
    found = recalibrate(POLICY, file_of(rows), BUDGET)
    assert found.unchanged
    assert (found.policy.layers, found.policy.threshold) == (POLICY.layers, POLICY.threshold)


def test_the_policy_never_exits_if_no_candidate_passes():
    rows = rows_of(1500, np.random.default_rng(3), wrong=(1.0, 1.0))
    rows = [r if r.values is None else replace(r, agrees=(False, False)) for r in rows]
    found = recalibrate(POLICY, file_of(rows), 0.003)  # passes only without a single failure
    assert found.policy.threshold is None
    assert "never exits" in found.policy.calibration["promise"]


def test_too_few_rows_and_policies_that_never_exit_are_rejected():
    with pytest.raises(AuditError, match="it takes 72"):  # ln(0.025) / ln(0.95)
        recalibrate(POLICY, file_of(rows_of(50, np.random.default_rng(0))), BUDGET)
    with pytest.raises(AuditError, match="never exits"):
        recalibrate(ExitPolicy.never(), file_of([]), BUDGET)


@pytest.mark.parametrize("mode", ["never_exit", "exclude"])
def test_a_per_group_guarantee_is_recalibrated_per_group(mode):
    rng = np.random.default_rng(4)
    conditions = [{"kind": "group", "name": n, "n": 300, "held": True} for n in ("a", "b")]
    policy = replace(POLICY, calibration={"conditions": conditions, "small_groups": mode})
    good = rows_of(1000, rng, wrong=(0.02, 0.02), group="a")
    rows = [*good, *rows_of(20, rng, wrong=(0.02, 0.02), group="b"), *rows_of(5, rng)]
    found = recalibrate(policy, file_of(rows), BUDGET).policy
    words = found.calibration["promise"]
    assert "The same holds within the group a (1,000 rows)" in words
    if mode == "never_exit":
        assert found.exit_groups == ("a",)
        assert f"Rows of other groups ({NO_GROUP} (5 rows), b (20 rows)) never exit" in words
    else:
        assert found.exit_groups is None
        assert "It is NOT guaranteed within the groups" in words


def test_since_excludes_older_rows():
    rows = rows_of(4, np.random.default_rng(0))
    later = [replace(row, time="2026-03-02T10:00:00+00:00") for row in rows[:3]]
    file = file_of([*rows, *later])
    assert since(file, file.policy, "2026-03-02").rows == later
    assert len(since(file, file.policy, "2026-03-02T11:00").rows) == 0
    with pytest.raises(AuditError, match="such as 2026-03-01"):
        since(file, file.policy, "yesterday")


def test_flop_counts_round_trip_through_json():
    found = FlopCounts.from_json(json.loads(json.dumps(COUNTS.to_json())))
    assert torch.equal(found.prompt, COUNTS.prompt)
    assert torch.equal(found.full(torch.tensor([5])), COUNTS.full(torch.tensor([5])))


# Recorded rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["spade", "l-spade"])
def test_a_recorded_row_has_every_checks_confidence_and_answer(tmp_path, decoder):
    prompts = prompts_of([7, 3, 5, 6, 2, 7] * 3)
    model = tiny("llama")
    policy = mixed_policy(model, prompts, decoder=decoder)
    runtime = audited(tmp_path, policy, budget=0.99)
    # One by one, as rows are recorded batch by batch.
    decisions = [runtime.decide([prompt])[0] for prompt in prompts]
    runtime.auditor.flush()
    file = load(rows_file(tmp_path / "audit.json"))
    full = never(prompts)
    fixed = [
        ExitRuntime(model, random_heads(), policy=ExitPolicy.always(layer, decoder=decoder))
        for layer in policy.layers
    ]
    answers = [one.decide(prompts) for one in fixed]
    exited = 0
    for place, (row, decision) in enumerate(zip(file.rows, decisions, strict=True)):
        assert row.tokens == len(prompts[place])
        assert (row.values is not None) == decision.exited
        if not decision.exited:
            continue
        exited += 1
        same = tuple(a[place].token_id == full[place].token_id for a in answers)
        assert row.agrees == same
        at = policy.layers.index(decision.layer)
        assert row.values[at] == pytest.approx(decision.entropy, abs=1e-5)
    assert 0 < exited < len(prompts)
    expected = count_flops(model, random_heads())
    assert torch.equal(FlopCounts.from_json(file.flops).prompt, expected.prompt)


def test_rows_that_cannot_be_recorded_are_still_counted(tmp_path, caplog):
    runtime = audited(tmp_path, budget=0.99)
    rows_file(tmp_path / "audit.json").mkdir()
    runtime.decide(prompts_of([6] * 5))
    assert runtime.auditor.flush().seen.drawn == 5
    assert caplog.text.count("counted but not kept") == 1


def test_a_partial_line_left_by_a_kill_is_skipped_and_truncated(tmp_path):
    path, rows = tmp_path / "audit.rows.jsonl", rows_of(4, np.random.default_rng(0))
    append(path, KEY.policy, COUNTS.to_json(), rows[:2])
    path.write_bytes(path.read_bytes()[:-7])
    assert load(path).rows == rows[:1]
    append(path, KEY.policy, COUNTS.to_json(), rows[2:])
    assert load(path).rows == [rows[0], *rows[2:]]


def test_a_full_file_drops_its_oldest_half(tmp_path, monkeypatch):
    monkeypatch.setattr(audited_rows, "MOST_BYTES", 2000)
    path, rng = tmp_path / "audit.rows.jsonl", np.random.default_rng(0)
    rows = rows_of(200, rng)
    for row in rows:
        append(path, KEY.policy, COUNTS.to_json(), [row])
        assert path.stat().st_size < 3000
    kept = load(path).rows
    assert kept == rows[-len(kept) :]


def test_rows_of_another_policy_are_rejected_and_kept(tmp_path):
    path = tmp_path / "audit.rows.jsonl"
    append(path, "b" * 64, COUNTS.to_json(), rows_of(1, np.random.default_rng(0)))
    before = path.read_bytes()
    with pytest.raises(AuditError, match="another policy"):
        AuditFile(tmp_path / "audit.json", KEY)
    path.write_text('{"format_version": 9}\n')
    with pytest.raises(AuditError, match=r"not an audit's rows"):
        load(path)
    assert before != path.read_bytes()


# The command ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A calibrated policy, and its audit of 1,500 rows with too many wrong answers."""
    record = {
        "risk": "disagreement", "budget": BUDGET, "confidence": 0.95, "n": 300,
        "chosen": {"threshold": [1.0, 1.0], "disagreement": 0.01},
        "rows": {"task": "jsonl", "dataset": None, "split": "validation", "part": "all"},
    }  # fmt: skip
    policy = replace(POLICY, calibration=record)
    policy.save(tmp_path)
    rows = rows_of(1500, np.random.default_rng(0))
    key = AuditKey(policy=policy_digest(policy), heads=None, budget=BUDGET, alpha=0.05)
    exited = sum(row.values is not None for row in rows)
    seen = Seen(
        rows=30_000, exited=20 * exited, exits={2: 20 * exited, 6: 30_000 - 20 * exited},
        drawn=1500, audited=exited, failures=round(1500 * disagreement(policy, rows)),
    )  # fmt: skip
    AuditFile(tmp_path / "audit.json", key).add(seen, rows, COUNTS.to_json())
    return tmp_path


def test_recalibrate_writes_a_stricter_policy_and_keeps_the_earlier_files(folder, capsys):
    assert main(["audit", str(folder)]) == 0
    assert "1,500 of 30,000 production rows" in ExitPolicy.load(folder).calibration["promise"]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert main(["audit", str(folder), "--recalibrate", "--max_disagreement", "0.06"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Recalibrated on 1,500 audited rows" in printed
    assert "at most 6.00% (given)" in printed
    assert "Guarantee: At most 6% of the answers differ" in printed
    policy = ExitPolicy.load(folder)
    assert policy.layers != POLICY.layers or max(policy.threshold) < 1.0
    tag = policy_digest(POLICY)[:8]
    for old, new in (
        ("policy.json", f"policy-{tag}.json"),
        ("audit.json", f"audit-{tag}.json"),
        ("audit.rows.jsonl", f"audit-{tag}.rows.jsonl"),
    ):
        assert (folder / new).read_bytes() == before[old]
    assert not (folder / "audit.json").exists()


def test_recalibration_is_opt_in_and_requires_rows_and_policy(folder, capsys):
    assert main(["audit", str(folder)]) == 0
    assert "Recalibrated" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["audit", str(folder), "--confidence", "0.9"])
    assert "requires --recalibrate" in capsys.readouterr().err
    assert main(["audit", str(folder), "--recalibrate", "--since", "2026-04-01"]) == 1
    assert "0 audited rows cannot prove" in capsys.readouterr().err
    (folder / "audit.rows.jsonl").unlink()
    assert main(["audit", str(folder), "--recalibrate"]) == 1
    assert "audit.rows.jsonl cannot be read" in capsys.readouterr().err
    assert ExitPolicy.load(folder).threshold == POLICY.threshold


def test_the_audit_state_is_logged_to_wandb_if_enabled(folder, monkeypatch):
    from contextlib import nullcontext
    from types import SimpleNamespace

    pytest.importorskip("wandb")
    logged = {}
    run = SimpleNamespace(log=logged.update, summary=logged)
    monkeypatch.setattr(
        "lspade_train.integrations.wandb.start_run", lambda **settings: nullcontext(run)
    )
    assert not wandb_is_on()
    assert main(["audit", str(folder)]) == 0
    assert not logged
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["audit", str(folder)]) == 0
    assert logged["audit/drawn"] == 1500
    assert logged["audit/alarm"] == 1.0
    assert logged["audit/exits/layer_06"] + logged["audit/exits/layer_02"] == 30_000
    assert logged["tables/seen"].columns == ["what", "value"]
    assert "ALARM" in logged["audit/verdict"]


# Groups ---------------------------------------------------------------------------------------


def test_groups_that_may_not_exit_are_answered_by_the_full_model(tmp_path):
    prompts = prompts_of([7, 3, 5, 6, 2, 7])
    policy = replace(ExitPolicy.always(1, decoder="l-spade"), exit_groups=("easy",))
    runtime = audited(tmp_path, policy, budget=0.99)
    found = runtime.decide(prompts, groups=["easy", "hard", None, "easy", "new", "easy"])
    assert [one.exited for one in found] == [True, False, False, True, False, True]
    full = never(prompts)
    for place in (1, 2, 4):
        assert found[place].token_id == full[place].token_id
    seen = runtime.auditor.flush().seen
    assert (seen.exited, seen.exits) == (3, {1: 3, LAYERS: 3})


def test_a_policy_for_some_groups_requires_groups(tmp_path):
    policy = replace(ExitPolicy.always(1, decoder="l-spade"), exit_groups=("easy",))
    runtime = ExitRuntime(tiny("llama"), random_heads(), policy=policy)
    with pytest.raises(Exception, match="--small_groups exclude"):
        runtime.decide(prompts_of([4]))
    with pytest.raises(Exception, match="2 groups for 1 prompts"):
        runtime.decide(prompts_of([4]), groups=["easy", "hard"])
    with pytest.raises(Exception, match="generate does not know the groups"):
        runtime.generate(prompts_of([4]), 2)
    policy.save(tmp_path)
    assert ExitPolicy.load(tmp_path).exit_groups == ("easy",)


def test_a_policy_without_groups_accepts_groups_or_none():
    runtime = ExitRuntime(
        tiny("llama"), random_heads(), policy=ExitPolicy.always(1, decoder="l-spade")
    )
    prompts = prompts_of([4, 5])
    assert runtime.decide(prompts) == runtime.decide(prompts, groups=["a", "b"])
