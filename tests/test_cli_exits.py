"""`calibrate`, `predict` and `profile` on the model that ships with the repository."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lspade_train.cli import main
from lspade_train.cli.parsing import command_parser, parse
from lspade_train.policies.audit import AuditState
from lspade_train.policies.cached_exits import exit_table
from lspade_train.policies.drafting import Drafting
from lspade_train.policies.exit_table import evaluate_policy
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.seconds import Seconds
from lspade_train.policies.shift import calibrated_exits
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.profiling import drafting, prompts_of
from lspade_train.runtime import ExitRuntime
from lspade_train.training.datamodule import HiddenStateDataModule

ROOT = Path(__file__).parents[1]


class Fitted:
    """The quickstart recipe on fewer rows, with both kinds of heads."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "checkpoints/quickstart"
        self.arguments = [
            f"--config={ROOT / 'recipes/quickstart.yaml'}",
            f"--data.model_id={ROOT / 'checkpoints/tiny-world'}",
            f"--data.dataset={ROOT / 'recipes/quickstart/data'}",
            f"--data.cache_dir={home / 'cache'}",
            "--data.limit=250",
        ]

    def run(self, command, *more):
        os.chdir(self.folder.parents[1])
        return main([command, *self.arguments, *more])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    made = Fitted(tmp_path_factory.mktemp("exits"))
    quick = ["--trainer.max_epochs=6", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    quick.append("--trainer.enable_progress_bar=false")
    before = Path.cwd()
    assert made.run("fit", *quick) == 0
    yield made
    os.chdir(before)


@pytest.fixture(scope="module")
def policy(fitted, tmp_path_factory):
    """The policy that `calibrate --max_accuracy_drop 0.05` wrote."""
    assert fitted.run("calibrate", "--max_accuracy_drop=0.05") == 0
    return shutil.copy(fitted.folder / "policy.json", tmp_path_factory.mktemp("policy"))


@pytest.fixture
def calibrated(fitted, policy):
    """The heads with that policy, restored if another test replaced it."""
    shutil.copy(policy, fitted.folder / "policy.json")
    return fitted


def data_of(fitted):
    recipe = parse(command_parser("calibrate", ""), fitted.arguments).recipe
    return HiddenStateDataModule(recipe.data, "all", name=recipe.name)


def test_calibrate_writes_a_policy_for_these_heads_and_prints_its_guarantee(fitted, capsys):
    assert fitted.run("calibrate", "--max_accuracy_drop=0.05") == 0
    policy = ExitPolicy.load(fitted.folder / "policy.json")
    assert (
        policy.heads_digest == LSpadeHeads.from_pretrained(fitted.folder).metadata["weights_sha256"]
    )
    chosen = policy.calibration["chosen"]
    assert chosen["p_value"] <= 0.05
    assert chosen["drop"] <= 0.05
    printed = capsys.readouterr().out
    assert f"Chosen: {chosen['name']}. {chosen['compute_saved']:.1%} of the FLOPs saved" in printed
    assert f"Guarantee: {policy.calibration['promise']}" in printed
    assert len(printed.splitlines()) < 35


def test_the_papers_policy_has_per_layer_thresholds_proposed_on_training_rows(fitted):
    asked = ["--measure=entropy", "--reader=l-spade", "--decoder=spade"]
    assert fitted.run("calibrate", "--max_disagreement=0.05", *asked) == 0
    found = ExitPolicy.load(fitted.folder / "policy.json").calibration
    assert isinstance(found["chosen"]["threshold"], list)
    assert {row["name"] for row in found["curve"]} == {"l-spade entropy -> spade"}


@pytest.mark.slow
def test_calibrate_by_time_prices_policies_and_profile_confirms_them(fitted, capsys):
    shape = ["--cost=time", "--batch_size=2", "--prompt_length=24"]
    assert fitted.run("calibrate", "--max_accuracy_drop=0.05", *shape) == 0
    record = ExitPolicy.load(fitted.folder / "policy.json").calibration
    seconds, chosen = record["seconds"], record["chosen"]
    assert (record["cost"], seconds["batch_size"], seconds["prompt_length"]) == ("time", 2, 24)
    assert {"l-spade", "tuned_lens"} <= seconds["readers"].keys()
    printed = capsys.readouterr().out
    assert "predicted for 2 x 24 tokens on" in printed
    if chosen["threshold"] is None:
        assert "No early exit" in printed
    else:
        assert chosen["time_saved"] > 0
        assert f"{chosen['time_saved']:.1%} of the time saved" in printed
    assert fitted.run("evaluate", "--split=validation") == 0
    row = json.loads((fitted.folder / "results.json").read_text())["exits"]["policy"]["row"]
    assert row["time_saved"] == pytest.approx(chosen["time_saved"])  # of the selection rows
    assert row["timed_as"] == f"2 x 24 tokens on {Seconds.from_json(seconds).where}"
    capsys.readouterr()
    quick = ["--lengths=[16]", "--batch_sizes=[1]", "--repeats=2"]
    assert fitted.run("profile", *quick) == 0
    found = json.loads((fitted.folder / "profile.json").read_text())["confirmation"]
    printed = capsys.readouterr().out
    assert "32 prompts at 2 x 24 tokens" in printed
    assert f"predicted {found['predicted']:.3f} (calibrate: {found['expected']:.3f})" in printed
    assert found["expected"] == pytest.approx(1 - chosen["time_saved"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--cost=money"], "expected flops or time"),
        (["--batch_size=4"], "give it with --cost time"),
    ],
)
def test_an_unknown_cost_is_named_in_the_error(fitted, capsys, options, match):
    assert fitted.run("calibrate", *options) == 1
    assert match in capsys.readouterr().err


@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
@pytest.mark.parametrize("decoder", ["spade", "l-spade", "logit_lens", "tuned_lens"])
def test_the_exit_table_from_cached_states_matches_the_runtime(fitted, decoder, scope):
    data = data_of(fitted)
    folder = fitted.folder / "tuned_lens" if decoder == "tuned_lens" else fitted.folder
    heads = LSpadeHeads.from_pretrained(folder).bind(data.adapter)
    policy = ExitPolicy(layers=(2, 4, 6, 8), scope=scope, decoder=decoder)
    table = exit_table(data.stored("validation", 64), data.adapter, heads, policy)
    limit = float(table.confidence.mean())
    runtime = ExitRuntime(data.adapter, heads, policy=replace(policy, threshold=limit))
    lines = (ROOT / "recipes/quickstart/data/validation.jsonl").read_text().splitlines()[:64]
    rows = [json.loads(line) for line in lines]
    prompts = [[*data.tokenizer(row["prompt"])["input_ids"]] for row in rows]
    choices = [
        [data.tokenizer.convert_tokens_to_ids(choice) for choice in row["choices"]] for row in rows
    ]
    decided = runtime.decide(prompts, choices)
    stops = table.exits(limit)
    layers = [(*table.layers, table.num_layers)[stop] for stop in stops]
    assert [decision.layer for decision in decided] == layers
    assert len(set(layers)) > 2
    wrong = sum(
        decision.token_id != full for decision, full in zip(decided, table.full_answer, strict=True)
    )
    assert wrong / 64 == evaluate_policy(table, limit).disagreement


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ("--scope=everything", "everything"),
        ("--measure=luck", "luck"),
        ("--decoder=oracle", "oracle"),
        ("--reader=oracle", "oracle"),
    ],
)
def test_an_invalid_policy_raises_a_clear_error(fitted, capsys, option, match):
    assert fitted.run("calibrate", option) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    error = next(i for i, line in enumerate(printed) if line.startswith("error: "))
    assert match in " ".join(printed[error:])
    assert len(printed) - error <= 2


def test_heads_of_a_tuned_lens_give_their_own_answers(fitted):
    heads = fitted.folder / "tuned_lens"
    assert fitted.run("calibrate", f"--heads={heads}", "--max_accuracy_drop=0.05") == 0
    assert ExitPolicy.load(heads / "policy.json").decoder == "tuned_lens"


def test_profile_prints_and_writes_the_policys_savings(calibrated, capsys):
    shapes = ["--lengths=[16,32]", "--batch_sizes=[2]", "--repeats=1", "--generate=2"]
    assert calibrated.run("profile", *shapes) == 0
    printed = capsys.readouterr().out
    written = json.loads((calibrated.folder / "profile.json").read_text())
    policy = ExitPolicy.load(calibrated.folder / "policy.json")
    assert [(row["tokens"], row["rows"]) for row in written["results"]] == [(16, 2)] * 2 + [
        (32, 2)
    ] * 2
    assert [row["threshold"] for row in written["results"][:2]] == [None, [*policy.threshold]]
    assert written["prompts"] == "given"
    assert "greedy decoding of 2 tokens" in printed
    assert (calibrated.folder / "figures/speedup.svg").exists()


def test_profile_accepts_thresholds_and_rejects_a_length_over_the_context(fitted, capsys):
    one = ["--batch_sizes=[1]", "--repeats=1"]
    assert fitted.run("profile", "--lengths=[16]", "--thresholds=[0.0,0.5]", *one) == 0
    written = json.loads((fitted.folder / "profile.json").read_text())
    assert [row["threshold"] for row in written["results"]] == [None, 0.0, 0.5]
    capsys.readouterr()
    assert fitted.run("profile", "--lengths=[4096]", *one) == 1
    assert "this model takes 2 to 128 tokens" in capsys.readouterr().err


def test_predict_answers_with_the_calibrated_policy(calibrated, capsys):
    rows = (ROOT / "recipes/quickstart/data/test.jsonl").read_text().splitlines()[:20]
    source, target = calibrated.folder / "in.jsonl", calibrated.folder / "out.jsonl"
    source.write_text("\n".join(rows) + "\n")
    assert calibrated.run("predict", f"--input={source}", f"--output={target}") == 0
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    right = [
        answer["text"] == json.loads(row)["answer"]
        for answer, row in zip(answers, rows, strict=True)
    ]
    assert sum(right) >= 18
    assert torch.tensor([answer["layer"] for answer in answers]).float().mean() < 9


def rows_of(split, count):
    path = ROOT / f"recipes/quickstart/data/{split}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def asked(fitted, rows, *more):
    """The answers of `predict` for these rows."""
    source, target = fitted.folder / "in.jsonl", fitted.folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fitted.run("predict", f"--input={source}", f"--output={target}", *more) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_predict_audits_its_answers_and_audit_reports_them(calibrated, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    rows = rows_of("test", 40)
    plain = asked(calibrated, rows)
    assert asked(calibrated, rows, "--audit=1.0") == plain
    state = AuditState.load(calibrated.folder / "audit.json")
    assert (state.seen.rows, state.seen.drawn) == (40, 40)
    assert state.seen.exited == state.seen.audited == sum(answer["exited"] for answer in plain)
    assert state.alarm is None
    capsys.readouterr()
    assert main(["audit", str(calibrated.folder)]) == 0
    printed = capsys.readouterr().out
    assert "percentage points below the full model's" in printed
    assert main(["info", str(calibrated.folder)]) == 0
    words = "40 of 40 production rows were sampled"
    assert words in capsys.readouterr().out
    promise = ExitPolicy.load(calibrated.folder).calibration["promise"]
    card = " ".join((calibrated.folder / "README.md").read_text().split())
    for text in (promise, card):
        assert words in text
    (calibrated.folder / "audit.json").unlink()


def test_predict_rejects_the_audit_of_another_policy(calibrated, capsys):
    asked(calibrated, rows_of("test", 4), "--audit=1.0", "--audit_budget=0.5")
    assert calibrated.run("predict", "--threshold=0.01", "--audit=1", "--audit_budget=0.5") == 1
    assert "belongs to another policy" in capsys.readouterr().err
    assert calibrated.run("predict", "--audit_budget=0.5") == 1
    assert "such as --audit 0.02" in capsys.readouterr().err
    (calibrated.folder / "audit.json").unlink()


def test_a_policys_exit_profile_matches_predict_on_the_same_rows(calibrated):
    policy = ExitPolicy.load(calibrated.folder / "policy.json")
    answers = asked(calibrated, rows_of("validation", 250))
    found = Counter(answer["layer"] for answer in answers)
    assert {k: v for k, v in calibrated_exits(policy.calibration).items() if v} == found


def test_predict_reports_when_exits_differ_from_those_at_calibration(calibrated, caplog):
    rows = rows_of("validation", 250)
    with caplog.at_level("WARNING"):
        answered = zip(rows, asked(calibrated, rows), strict=True)
        assert "differ from calibration" not in caplog.text
        deepest = sorted(answered, key=lambda pair: -pair[1]["layer"])
        asked(calibrated, [row for row, _ in deepest[:100]])
    assert caplog.text.count("exit layers differ from calibration") == 1


def test_calibrate_gives_the_same_guarantee_per_group_and_per_depth(fitted, capsys):
    more = ["--max_accuracy_drop=0.1", "--measure=entropy", "--per_group", "--per_depth"]
    assert fitted.run("calibrate", *more) == 0
    record = ExitPolicy.load(fitted.folder / "policy.json").calibration
    groups = [one for one in record["conditions"] if one["kind"] == "group"]
    assert sum(one["n"] for one in groups) == record["n"]
    assert {one["name"] for one in groups} >= {"hops: 1", "hops: 2", "hops: 3"}
    assert any(one["held"] for one in groups)
    assert "The same holds within the group" in capsys.readouterr().out
    policy = ExitPolicy.load(fitted.folder / "policy.json")
    assert policy.exit_groups == tuple(one["name"] for one in groups if one["held"])
    rows = rows_of("validation", 60)
    answers = asked(fitted, [{**row, "group": "unheard of"} for row in rows])
    assert not any(answer["exited"] for answer in answers)
    assert any(answer["exited"] for answer in asked(fitted, rows))
    data = data_of(fitted)
    timed, _ = prompts_of(data.config, data.tokenizer, None, policy.may_exit)
    assert len(timed) == sum(one["n"] for one in groups if one["held"])  # what profile measures


@pytest.mark.slow
def test_small_groups_are_excluded_on_request(fitted, capsys):
    more = ["--max_accuracy_drop=0.05", "--per_group", "--small_groups=exclude"]
    assert fitted.run("calibrate", *more) == 0
    assert ExitPolicy.load(fitted.folder / "policy.json").exit_groups is None
    assert fitted.run("calibrate", "--small_groups=exclude") == 1
    assert "together with --per_group" in capsys.readouterr().err


def test_calibrate_for_generate_writes_what_is_faster_and_removes_what_is_not(
    fitted, capsys, monkeypatch
):
    taken = {"plain": 2.0}

    def rounds(work, *_):
        for one in work.values():
            one.run()
        return {name: [taken.get(name, 1.0)] * 3 for name in work}

    monkeypatch.setattr(drafting, "time_rounds", rounds)
    assert fitted.run("calibrate", "--for=generate", "--new_tokens=6") == 0
    chosen = Drafting.from_pretrained(fitted.folder)
    printed = capsys.readouterr().out
    assert f"Chosen: draft at layer {chosen.layer} with {chosen.reader}" in printed
    assert "2.00x as fast as model.generate" in printed
    taken["plain"] = 1.0
    assert fitted.run("calibrate", "--for=generate", "--new_tokens=6", "--batch_size=2") == 0
    assert "no drafting is chosen" in capsys.readouterr().out
    assert not (fitted.folder / "drafting.json").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--for=speed"], "expected decide or generate"),
        (["--for=generate", "--max_disagreement=0.1"], "--max_disagreement is of exits"),
        (["--for=generate", "--plan"], "--plan is of exits"),
        (["--for=generate", "--new_tokens=0"], "--new_tokens is 0; expected 1 or more"),
    ],
)
def test_options_that_do_not_go_with_a_purpose_are_named(fitted, capsys, options, match):
    assert fitted.run("calibrate", *options) == 1
    assert match in capsys.readouterr().err
