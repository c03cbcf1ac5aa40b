"""Training: the heads one fit produces, unchanged by resuming, processes and modes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lspade_train.cache.states import REDUCED
from lspade_train.errors import NumericsError, RecipeError
from lspade_train.recipe import HeadConfig, TextConfig
from lspade_train.training.losses import distillation
from lspade_train.training.module import LSpadeModule
from lspade_train.training.targets import HiddenTarget


def trainer(project, epochs=2, **options):
    known = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": project.home,
    }
    return Trainer(**known | options)


def fit(project, config=None, *, data=None, epochs=2, ckpt_path=None, **options):
    """Train; return the module and the trainer."""
    seed_everything(0, verbose=False)
    module = LSpadeModule(config or HeadConfig(lr=1e-2))
    runner = trainer(project, epochs, **options)
    runner.fit(module, data or project.module(), ckpt_path=ckpt_path, weights_only=True)
    return module, runner


def weights(module):
    return {name: value.clone() for name, value in module.heads.state_dict().items()}


def assert_equal_heads(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Orders(Callback):
    """Records the first hidden values of every batch, to tell which rows came when."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch.hidden[:, 0, 0].clone())


class Save(Callback):
    """Saves a checkpoint after one chosen step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_training_lowers_the_kl_on_unseen_rows(project):
    config = HeadConfig(lr=3e-3)
    runs = [fit(project, config, epochs=epochs)[1] for epochs in (1, 12)]
    for layer in (1, 2, 3):
        name = f"val/kl/layer_{layer:02d}"
        before, after = (float(run.logged_metrics[name]) for run in runs)
        assert after < before
    untrained = trainer(project)
    untrained.validate(LSpadeModule(config), project.module(), verbose=False)
    start = float(untrained.logged_metrics["val/kl/mean"])
    assert float(runs[1].logged_metrics["val/kl/mean"]) < 0.8 * start


@pytest.mark.parametrize(
    "form", ["full", *(pytest.param(f, marks=pytest.mark.slow) for f in ("low_rank", "bias"))]
)
def test_fitting_twice_gives_the_same_heads_bit_for_bit(project, form):
    config = HeadConfig(form=form, rank=4)
    one, _ = fit(project, config)
    two, _ = fit(project, config)
    assert_equal_heads(weights(one), weights(two))
    assert any(float(value.abs().max()) > 0 for value in weights(one).values())


@pytest.mark.parametrize(
    ("mode", "shard_mb"),
    [
        ("memory", 256),
        ("online", 0.01),
        pytest.param("memory", 0.01, marks=pytest.mark.slow),
        pytest.param("online", 256, marks=pytest.mark.slow),
    ],
)
def test_every_mode_trains_the_same_heads(project, mode, shard_mb):
    data = project.module(shard_mb=shard_mb)
    disk, _ = fit(project, data=data)
    assert (len(data.states("train").shards) > 1) == (shard_mb < 1)
    other, _ = fit(project, data=project.module(mode=mode, shard_mb=shard_mb))
    # Online, a training batch is also a batch of the model, which changes the last bits.
    slack = 1e-6 if mode == "online" else 0
    for name, value in weights(disk).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=slack)


# Online, a batch counts prompts, not positions: the batches are the same if a prompt has one
# position, or if all are in one batch (then in another order, and Adam amplifies the last bits).
@pytest.mark.parametrize(("positions", "batch_size", "steps"), [(1, 4, 8), (4, 1000, 2)])
def test_running_text_trains_the_same_heads_online(project, positions, batch_size, steps):
    text = TextConfig(length=20, first_position=3, positions_per_sequence=positions)
    settings = {"task": "text", "dataset": str(project.texts), "text": text}
    runs = [
        fit(project, data=project.module(mode=mode, batch_size=batch_size, **settings))
        for mode in ("disk", "online")
    ]
    assert [runner.global_step for _, runner in runs] == [steps, steps]
    disk, online = (weights(module) for module, _ in runs)
    for name, value in disk.items():
        torch.testing.assert_close(online[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["logits", "topk"])
def test_every_kind_of_target_trains_nearly_the_same_heads(project, targets):
    data = project.module(targets=targets, topk=64, cache_dir=str(project.home / targets))
    hidden, _ = fit(project)
    other, _ = fit(project, data=data)
    for name, value in weights(hidden).items():
        # fp16 logits; Adam's first steps amplify values near zero.
        assert (weights(other)[name] - value).abs().mean() < 0.05 * value.abs().mean()


def test_each_layer_trains_independently_of_the_others(project):
    together, _ = fit(project)
    alone, _ = fit(project, data=project.module([2], cache_dir=str(project.home / "alone")))
    torch.testing.assert_close(weights(alone)["weight"][0], weights(together)["weight"][1])


def test_the_row_order_differs_between_epochs_but_not_between_runs(project):
    first, second = Orders(), Orders()
    fit(project, callbacks=[first])
    fit(project, callbacks=[second])
    assert all(torch.equal(a, b) for a, b in zip(first.seen, second.seen, strict=True))
    steps = len(first.seen) // 2
    epochs = [torch.cat(first.seen[i * steps : (i + 1) * steps]) for i in range(2)]
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert not torch.equal(epochs[0], epochs[1])


def test_truncated_epochs_see_different_rows(project):
    seen = Orders()
    fit(project, callbacks=[seen], limit_train_batches=2)
    assert len(seen.seen) == 4
    assert not torch.equal(seen.seen[0], seen.seen[2])


# Six steps per epoch, two epochs: within an epoch, at the end of one, and just after it.
@pytest.mark.parametrize("step", [2, 6, 7])
def test_a_resumed_fit_gives_the_heads_of_an_uninterrupted_one(project, step):
    path = project.home / "stopped.ckpt"
    whole, runner = fit(project, callbacks=[Save(step, path)])
    assert runner.global_step == 12
    orders = Orders()
    resumed, again = fit(project, ckpt_path=path, callbacks=[orders])
    assert again.global_step == 12
    assert len(orders.seen) == 12 - step
    assert_equal_heads(weights(resumed), weights(whole))
    assert_equal_optimizers(runner, again)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty:UserWarning")
@pytest.mark.parametrize("limit", [1.0, 2])
def test_a_fit_resumed_after_an_epoch_equals_an_uninterrupted_one(project, limit):
    keep = ModelCheckpoint(dirpath=project.home / "ck", filename="{epoch}", save_top_k=-1)
    options = {"enable_checkpointing": True, "limit_train_batches": limit}
    whole, _ = fit(project, epochs=3, callbacks=[keep], **options)
    path = project.home / "ck/epoch=0.ckpt"
    again = ModelCheckpoint(dirpath=project.home / "ck", filename="{epoch}", save_top_k=-1)
    resumed, _ = fit(project, epochs=3, ckpt_path=path, callbacks=[again], **options)
    assert_equal_heads(weights(resumed), weights(whole))


def test_a_fit_is_not_resumed_with_another_batch_size(project):
    path = project.home / "stopped.ckpt"
    fit(project, callbacks=[Save(2, path)])
    with pytest.raises(RecipeError, match="rows_per_step 8, and this run has 4"):
        fit(project, data=project.module(batch_size=4), ckpt_path=path)


@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
def test_a_process_without_validation_rows_does_not_change_the_metrics(project, scope):
    module, _ = fit(project, HeadConfig(form="bias", scope=scope), epochs=1)
    for mode in ("disk", "online"):
        validation = project.module(mode=mode).states("validation")
        module.validation_step(validation.gather(torch.arange(0)), 0)
        sums = module._epoch.pop("val/")
        assert not sums.rows.any()
        assert not sums.sums.any()


def unreduced(project, monkeypatch, *arguments, **options):
    """A fit whose steps compute the target's logits."""
    with monkeypatch.context() as patch:
        for place in ("module", "losses"):
            patch.setattr(f"lspade_train.training.{place}.is_reducible", lambda _: False)
        return fit(project, *arguments, **options)


@pytest.mark.parametrize(
    ("mode", "target"),
    [
        ("disk", "spade"),
        ("memory", "final"),
        pytest.param("disk", "final", marks=pytest.mark.slow),
        pytest.param("memory", "spade", marks=pytest.mark.slow),
    ],
)
def test_reduced_targets_give_the_same_heads_and_metrics_as_logits(
    project, monkeypatch, target, mode
):
    config = HeadConfig(lr=1e-3, target=target)
    plain, one = unreduced(project, monkeypatch, config, data=project.module(mode=mode), epochs=3)
    data = project.module(mode=mode)
    reduced, two = fit(project, config, data=data, epochs=3)
    assert (data.train_dataloader().dataset.shards[0].keys() >= REDUCED) == (target == "spade")
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(reduced)[name], value, rtol=1e-3, atol=1e-5)
    for name, value in one.logged_metrics.items():
        assert float(two.logged_metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5)


def test_a_fit_of_one_epoch_does_not_store_reduced_targets(project):
    data = project.module()
    fit(project, data=data, epochs=1)
    assert not data.train_dataloader().dataset.shards[0].keys() & REDUCED


def test_a_disk_too_full_for_reduced_targets_only_costs_time(project, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    plain, _ = fit(project, epochs=3)
    monkeypatch.setattr("os.posix_fallocate", full)
    with caplog.at_level("INFO", "lspade_train"):
        module, _ = fit(project, epochs=3)
    assert "recomputed in every step (No space left on device)" in caplog.text
    expected = weights(plain)
    for name, value in weights(module).items():  # products of other shapes round differently
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_a_fit_leaves_no_file_of_reduced_targets_behind(project):
    data = project.module()
    data.states("train")
    before = sorted(project.cache.rglob("*"))
    fit(project, data=project.module(), epochs=3)
    assert [path for path in sorted(project.cache.glob("train/*")) if path not in before] == []


def assert_equal_optimizers(one, other):
    for a, b in zip(one.optimizers, other.optimizers, strict=True):
        for p, q in zip(a.state.values(), b.state.values(), strict=True):
            assert all(torch.equal(p[name], q[name]) for name in p)


def test_weight_decay_pulls_the_maps_to_the_identity_but_not_the_bias(project):
    sizes = {}
    for decay in (0.0, 1.0, 10.0):
        module, _ = fit(project, HeadConfig(lr=1e-2, weight_decay=decay), epochs=6)
        sizes[decay] = float(module.heads.weight.detach().norm())
    assert sizes[10.0] < sizes[1.0] < sizes[0.0]
    _, runner = fit(project, HeadConfig(weight_decay=0.5))
    groups = runner.optimizers[0].param_groups
    assert [(g["params"][0].ndim, g["weight_decay"]) for g in groups] == [(3, 0.5), (2, 0.0)]


def test_the_learning_rate_warms_up_then_decays_to_zero(project):
    class Rates(Callback):
        seen: list = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    fit(project, HeadConfig(lr=1e-2, warmup=0.25), callbacks=[rates])
    assert rates.seen[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates.seen[2:] == sorted(rates.seen[2:], reverse=True)
    assert rates.seen[-1] < 1e-3


def test_target_final_trains_towards_the_models_own_output(project):
    module, _ = fit(project, HeadConfig(lr=3e-3, target="final"), epochs=8)
    data = project.module()
    batch = data.states("validation").gather(torch.arange(20))
    unembed = data.adapter.unembed
    goal = HiddenTarget(batch.final, unembed)
    with torch.no_grad():
        lens = distillation(batch.hidden[:, 2], goal, unembed).kl.mean()
        tuned = distillation(module.heads(batch.hidden)[:, 2], goal, unembed).kl.mean()
    assert tuned < lens


@pytest.mark.parametrize("mode", ["disk", "memory", "online"])
@pytest.mark.parametrize(
    ("most", "read"), [(None, range(20)), (20, range(20)), (4, (0, 5, 10, 15)), (3, (0, 6, 13))]
)
def test_logged_metrics_match_means_computed_by_hand_over_evenly_spaced_rows(
    project, mode, most, read
):
    config = HeadConfig(lr=1e-2, validation_rows=most)
    # 6 epochs: enough for the targets to be reduced beforehand.
    module, runner = fit(project, config, data=project.module(mode=mode), epochs=6)
    data = project.module()
    batch = data.states("validation").gather(torch.tensor(list(read)))
    unembed = data.adapter.unembed
    with torch.no_grad():
        logits = unembed(module.heads(batch.hidden)).double()
        goal = unembed(batch.target).double()
    p = goal.softmax(-1)
    loss = -(p * logits.log_softmax(-1)).sum(-1)
    kl = loss + (p * goal.log_softmax(-1)).sum(-1)
    agreement = (logits.argmax(-1) == goal.argmax(-1)).double()
    choices = batch.choice_ids.long()[:, None].expand(-1, 3, -1)
    chosen = choices.gather(2, logits.gather(2, choices).argmax(2, keepdim=True))[..., 0]
    accuracy = (chosen == batch.answer_id[:, None]).double()
    by_hand = {"loss": loss, "kl": kl, "agreement": agreement, "accuracy": accuracy}
    for name, value in by_hand.items():
        for place, layer in enumerate((1, 2, 3)):
            logged = float(runner.logged_metrics[f"val/{name}/layer_{layer:02d}"])
            assert logged == pytest.approx(float(value[:, place].mean()), rel=1e-5, abs=1e-6)
        mean = float(runner.logged_metrics[f"val/{name}/mean"])
        assert mean == pytest.approx(float(value.mean()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
def test_only_a_fit_over_the_vocabulary_reads_fewer_validation_rows(project, scope):
    seen = []

    class Count(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(len(batch))

    config = HeadConfig(scope=scope, validation_rows=4)
    data = project.module()
    # It leaves no bound and no reduced targets behind.
    fit(project, HeadConfig(validation_rows=2), data=data, epochs=2)
    options = {"callbacks": [Count()], "num_sanity_val_steps": 0}
    module, runner = fit(project, config, data=data, epochs=2, **options)
    assert sum(seen) == 2 * {"vocabulary": 4, "choices": 20}[scope]
    seen.clear()
    runner.validate(module, data, verbose=False)
    assert sum(seen) == 20


def test_online_validation_rows_count_the_positions_of_each_prompt(project):
    text = TextConfig(length=20, first_position=3)
    options = {"task": "text", "dataset": str(project.texts), "text": text, "mode": "online"}
    data = project.module(**options)
    data.validation_rows = 40
    per_prompt = data.states("validation").gather(torch.tensor([0]))
    assert len(data._to_fit("validation")) == 40 // len(per_prompt)


def test_online_states_that_are_stored_are_computed_once(project):
    data = project.module(mode="online")
    assert data.stored("validation") is data.stored("validation")
    assert len(data.stored("train", 5)) == 5


def test_a_fit_without_an_end_raises_a_clear_error(project):
    with pytest.raises(RecipeError, match="max_epochs and max_steps are off"):
        fit(project, epochs=-1)


def test_running_text_uses_the_next_tokens_as_labels(project):
    text = TextConfig(length=20, first_position=3)
    data = project.module(task="text", dataset=str(project.texts), text=text)
    _, runner = fit(project, data=data)
    assert "val/accuracy/mean" in runner.logged_metrics


def test_a_non_finite_loss_stops_training_with_a_remedy(project):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch.hidden[0] = float("nan")

    with pytest.raises(NumericsError, match=r"loss is nan at step 0.*\n.*--model\.lr"):
        fit(project, callbacks=[Spoil()])


def test_csv_has_a_column_for_every_metric_of_every_layer(project):
    fit(project, logger=CSVLogger(project.home, name="logs"), log_every_n_steps=1)
    header = next(project.home.glob("logs/*/metrics.csv")).read_text().splitlines()[0].split(",")
    for stage in ("train", "val"):
        for metric in ("loss", "kl", "agreement", "accuracy"):
            for layer in ("mean", "layer_01", "layer_02", "layer_03"):
                assert f"{stage}/{metric}/{layer}" in header


DDP = """
import sys, torch
sys.path[:0] = [{tests!r}]
import conftest, toy
from pathlib import Path
from test_module import fit, weights
from lspade_train.models import adapter
adapter.load_model = lambda *_, **__: sys.exit("the whole model was loaded")
project = toy.Project(Path({root!r}), Path({home!r}))
data = project.module(batch_size=4)
module, runner = fit(project, data=data, devices=2, strategy="ddp", limit_val_batches=1.0)
assert runner.world_size == 2
if runner.is_global_zero:
    torch.save(weights(module), Path({home!r}) / "heads.pt")
    torch.save(dict(runner.logged_metrics), Path({home!r}) / "metrics.pt")
"""


@pytest.mark.slow  # the same under SLURM's environment is tested more quickly in test_launchers
def test_two_processes_train_the_same_heads_as_one(project, toy_root):
    script = project.home / "run.py"
    tests = str(Path(__file__).parent)
    script.write_text(DDP.format(tests=tests, root=str(toy_root), home=str(project.home)))
    one, runner = fit(project, data=project.module(batch_size=8))  # builds the cache
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(project.home / "heads.pt", weights_only=True)
    for name, value in weights(one).items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
    logged = torch.load(project.home / "metrics.pt", weights_only=True)
    for name, value in runner.logged_metrics.items():
        if name.startswith("val/"):
            assert float(logged[name]) == pytest.approx(float(value), abs=1e-5)


# Weights & Biases


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """Neither a key nor a login, and a home directory without any."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


def test_wandb_is_enabled_by_its_mode_or_a_login(project, no_login, monkeypatch):
    from lspade_train.training.loggers import default_loggers

    kinds = lambda: [type(x).__name__ for x in default_loggers(project.home, "toy")]  # noqa: E731
    monkeypatch.delenv("WANDB_MODE")
    assert kinds() == ["CSVLogger"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert kinds() == ["CSVLogger"]
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert kinds() == ["CSVLogger", "WandbLogger"]
    monkeypatch.delenv("WANDB_MODE")
    (project.home / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (project.home / ".netrc").chmod(0o600)
    assert kinds() == ["CSVLogger", "WandbLogger"]


def test_a_wandb_run_is_written_offline_without_key_or_network(project, no_login):
    wandb = pytest.importorskip("wandb")
    from lspade_train.cli import main

    wandb.teardown()  # another test's settings would override the environment

    recipe = project.recipe()
    here = Path.cwd()
    os.chdir(project.home)
    try:
        assert main(["fit", "--config", str(recipe)]) == 0
    finally:
        os.chdir(here)
    folder = project.home / "checkpoints/toy"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert json.loads((folder / "config.json").read_text())["training"]["recipe"]["name"] == "toy"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_nearly_the_same_heads(project, precision):
    full, _ = fit(project)
    half, _ = fit(project, precision=precision)
    kept = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    for name, value in weights(full).items():
        assert weights(half)[name].dtype == kept
        assert (weights(half)[name].float() - value).abs().mean() < 0.2 * value.abs().mean()


def test_gradients_are_clipped_in_mixed_precision_where_a_fused_optimizer_could_not(project):
    clipped, trainer = fit(project, precision="bf16-mixed", gradient_clip_val=1e-6)
    assert trainer.optimizers[0].defaults["fused"] is False
    _, plain = fit(project, precision="bf16-mixed")
    assert plain.optimizers[0].defaults["fused"] is True
    assert all(value.isfinite().all() for value in weights(clipped).values())
