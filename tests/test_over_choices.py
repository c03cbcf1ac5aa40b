"""The loss over each row's choices, against float64 autograd on the full vocabulary."""

import json
import math
from dataclasses import replace

import pytest
import torch
import toy
from tiny_models import VOCAB, WIDTH, tiny

from lspade_train import ExitPolicy, ExitRuntime
from lspade_train.cache import StateBatch
from lspade_train.cli import main
from lspade_train.errors import PolicyError, UnsupportedModelError
from lspade_train.models import ModelAdapter, Unembedding
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.training.over_choices import choice_distillation

ROWS, LAYERS = 5, 3
CHOICES = [[3, 9, 40], [3, 9, 3], [50, 7, 9], [11, 60, 11], [3, 9, 40]]
COUNTS = [3, 2, 3, 2, 3]


def unembedding(family, scale=1.0):
    found = replace(ModelAdapter(tiny(family).double()).unembed, scale=scale)
    if found.bias is not None:
        torch.nn.init.normal_(found.bias)
    return found


def batch(unembed, stored="target"):
    """Rows with their own lists of choices, padded with the first one."""
    goal = torch.randn(ROWS, LAYERS, WIDTH, dtype=torch.float64)
    numbers = torch.zeros(ROWS, dtype=torch.long)
    return StateBatch(
        hidden=torch.randn(ROWS, LAYERS, WIDTH, dtype=torch.float64),
        final=torch.randn(ROWS, WIDTH, dtype=torch.float64),
        start_id=numbers,
        position_id=numbers,
        answer_id=numbers,
        labelled=numbers.bool(),
        choice_ids=torch.tensor(CHOICES, dtype=torch.int32),
        choice_count=torch.tensor(COUNTS),
        group=numbers,
        **{stored: goal if stored == "target" else unembed(goal).detach()},
    )


def goal_of(rows, target, unembed):
    if target == "final":
        return unembed(rows.final)[:, None].expand(-1, LAYERS, -1)
    return unembed(rows.target) if rows.target is not None else rows.target_logits


def naive(student, goal, row):
    """Loss and KL of one row at all layers: the full softmax, restricted to the row's choices."""
    tokens = torch.tensor(CHOICES[row][: COUNTS[row]])
    p, q = (z.softmax(-1)[:, tokens] for z in (goal[row], student[row]))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    loss = -(p * q.log()).sum(-1)
    best = tokens[q.argmax(-1)]
    return loss, loss + (p * p.log()).sum(-1), best, best == tokens[p.argmax(-1)]


# gemma2 soft-caps its logits, phi's head has a bias, opt projects.
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "opt"])
@pytest.mark.parametrize(
    ("target", "stored"), [("spade", "target"), ("spade", "target_logits"), ("final", "target")]
)
def test_loss_and_gradient_equal_autograd_on_the_restricted_softmax(family, target, stored):
    unembed = unembedding(family, scale=0.5)
    rows = batch(unembed, stored)
    student = torch.randn(ROWS, LAYERS, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(ROWS * LAYERS, dtype=torch.float64)
    parts = [naive(unembed(student), goal_of(rows, target, unembed), row) for row in range(ROWS)]
    loss, kl, best, agrees = (torch.cat(values) for values in zip(*parts, strict=True))
    (expected,) = torch.autograd.grad((loss * weights).sum(), student)

    got = choice_distillation(student, rows, target, unembed)
    (gradient,) = torch.autograd.grad((got.loss * weights).sum(), student)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(got.loss, loss)
    torch.testing.assert_close(got.kl, kl, rtol=0, atol=1e-9)
    assert torch.equal(got.best, best)
    assert torch.equal(got.agrees, agrees)


def test_a_nonlinear_head_is_rejected():
    unembed = replace(unembedding("llama"), linear=False)
    rows = batch(unembed)
    with pytest.raises(UnsupportedModelError, match="more than a product"):
        choice_distillation(rows.hidden, rows, "spade", unembed)


# Full fits


@pytest.fixture
def fit(project, monkeypatch):
    """Fit over the choices; return the exit code."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(project.home)

    def run(*options, **changes):
        recipe = project.recipe(**{"model__scope": "choices", **changes})
        return main(["fit", "--config", str(recipe), *options])

    return run


@pytest.mark.parametrize("form", ["full", "low_rank", "bias"])
def test_no_product_over_the_vocabulary_is_computed(project, fit, monkeypatch, form):
    assert main(["cache", "--config", str(project.recipe())]) == 0
    assert VOCAB > 3

    def refuse(*_, **__):
        raise AssertionError("logits of the vocabulary")

    monkeypatch.setattr(Unembedding, "__call__", refuse)
    monkeypatch.setattr(Unembedding, "into", refuse)
    assert fit(model__form=form, model__rank=4, model__target="both") == 0


def test_the_scope_is_recorded_with_the_heads(project, fit):
    assert fit(model__target="both", model__form="bias") == 0
    heads = LSpadeHeads.from_pretrained("checkpoints/toy")
    assert (heads.scope, heads.tuned_lens.scope) == ("choices", "choices")
    assert LSpadeHeads([1], 8).scope == "vocabulary"


def test_training_over_the_choices_lowers_the_kl_over_them(project, fit):
    assert fit(model__lr=0.0001, trainer__max_epochs=1) == 0
    before, after = (
        json.loads((project.home / "checkpoints/toy/config.json").read_text())["training"][
            "metrics"
        ]
        for epochs in (1, 12)
        if epochs == 1 or fit(model__lr=0.01, trainer__max_epochs=epochs) == 0
    )
    assert after["val/kl/mean"] < 0.8 * before["val/kl/mean"]


def test_a_task_without_choices_is_rejected_before_the_model_runs(
    project, fit, monkeypatch, capsys
):
    monkeypatch.setattr(ModelAdapter, "__init__", None)  # loading a model fails with another error
    assert fit(data__task="text", data__dataset=str(project.texts)) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: model.scope is choices, and the task text has none"), message
    assert "--model.scope vocabulary" in message


def test_topk_targets_that_may_lack_the_choices_are_rejected(fit, capsys):
    assert fit(data__targets="topk") == 1
    assert "model.scope is choices, and data.targets is topk" in capsys.readouterr().err


# Uses of heads over the choices


@pytest.fixture(scope="module")
def fitted(toy_root, tmp_path_factory):
    """A project with both kinds of heads over the choices, evaluated; read-only."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("fitted"))
    recipe = project.recipe(model__scope="choices", model__target="both", model__form="bias")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(project.home)
        assert main(["fit", "--config", str(recipe)]) == 0
        assert main(["calibrate", "--config", str(recipe), "--max_disagreement=0.9"]) == 0
        # caplog is function-scoped.
        project.logged = []
        patch.setattr(
            "lspade_train.evaluation.run.log.info", lambda *record: project.logged.append(record)
        )
        assert main(["evaluate", "--config", str(recipe)]) == 0
    return project


def run(project, command, *options):
    folder = str(project.home / "checkpoints/toy")
    return main(
        [command, "--config", str(project.home / "recipe.yaml"), *options, "--heads", folder]
    )


def test_calibrate_uses_the_choices_scope(fitted):
    policy = ExitPolicy.load(fitted.home / "checkpoints/toy")
    assert policy.scope == "choices"


def test_calibrate_rejects_the_vocabulary_scope(fitted, capsys):
    assert run(fitted, "calibrate", "--scope", "vocabulary") == 1
    message = capsys.readouterr().err
    assert "were fitted over the choices" in message, message
    assert "--model.scope vocabulary" in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("policy", [{"reader": "tuned_lens"}, {"decoder": "l-spade"}, {}])
def test_the_runtime_rejects_the_vocabulary_scope(fitted, policy):
    adapter = ModelAdapter.from_pretrained(str(fitted.model))
    heads = LSpadeHeads.from_pretrained(fitted.home / "checkpoints/toy")
    wanted = ExitPolicy(layers=(1, 2), threshold=0.5, **policy)
    with pytest.raises(PolicyError, match="scope is vocabulary, .* over the choices"):
        ExitRuntime(adapter, heads, policy=wanted)
    ExitRuntime(adapter, heads, policy=replace(wanted, scope="choices"))


def test_a_fixed_exit_answered_by_spade_reads_no_head(fitted):
    adapter = ModelAdapter.from_pretrained(str(fitted.model))
    heads = LSpadeHeads.from_pretrained(fitted.home / "checkpoints/toy")
    ExitRuntime(adapter, heads, policy=ExitPolicy(layers=(2,), measure="fixed", threshold=0.5))


def results_of(project):
    return json.loads((project.home / "checkpoints/toy/results.json").read_text())


def test_evaluate_reports_no_vocabulary_metrics_for_heads_over_the_choices(fitted):
    lenses = results_of(fitted)["lenses"]
    over_vocabulary = ("accuracy_vocabulary", "kl_to_model", "kl_to_spade", "agrees_model")
    for key in ("l_spade", "tuned_lens"):
        assert [lenses[key][name] for name in over_vocabulary] == [None] * 4
        assert None not in lenses[key]["accuracy"]
    assert None not in [*lenses["logit_lens"]["kl_to_model"], *lenses["spade"]["kl_to_model"]]


def test_evaluate_computes_the_entropy_over_the_choices(fitted):
    results = results_of(fitted)
    assert results["exits"]["scope"] == results["heads"]["scope"] == "choices"
    assert all(value <= math.log(3) for value in results["lenses"]["l_spade"]["entropy"])
    assert max(results["lenses"]["logit_lens"]["entropy"]) > math.log(3)


def test_evaluate_reports_once_what_is_not_measured(fitted):
    lines = [text % tuple(rest) for text, *rest in fitted.logged if "over the choices" in text]
    assert len(lines) == 1
    assert lines[0].startswith("tuned lens, L-SPADE: fitted over the choices")


def test_evaluate_rejects_rows_without_choices(fitted, project, monkeypatch, capsys):
    monkeypatch.chdir(project.home)
    project.recipe(data__task="text", data__dataset=str(project.texts))
    folder = str(fitted.home / "checkpoints/toy")
    recipe = str(project.home / "recipe.yaml")
    assert main(["evaluate", "--config", recipe, "--heads", folder, "--split", "validation"]) == 1
    assert "model.scope is choices, and the task text has none" in capsys.readouterr().err


@pytest.mark.slow
def test_ablations_are_also_fitted_over_the_choices(fitted, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(fitted.home)
    assert run(fitted, "evaluate", "--ablations=true") == 0
    variants = results_of(fitted)["ablations"]["heads"]
    assert {"target_final", "full"} <= {variant["name"] for variant in variants}
    assert all(variant["kl_to_model"] is None for variant in variants)
