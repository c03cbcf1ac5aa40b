"""The registry of lenses: a third-party lens appears everywhere; invalid ones are rejected."""

import json
import shutil
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import pytest
import torch
from results import drawing
from tiny_models import tiny

from lspade_train import ExitPolicy, LSpadeHeads, ModelAdapter
from lspade_train.artifacts.card import card
from lspade_train.cli import main
from lspade_train.errors import ArtifactError, PolicyError, RecipeError
from lspade_train.evaluation import read_lenses, readings
from lspade_train.policies.readers import answer_readers, check_readers
from lspade_train.probes.lenses import (
    L_SPADE,
    LENSES,
    LOGIT_LENS,
    SPADE,
    TUNED_LENS,
    HeadsSource,
    LayerView,
    Lens,
    LineStyle,
    lens_of_target,
    register,
)
from lspade_train.reporting.page import write_report
from lspade_train.reporting.plots import all_figures

# The logit lens and L-SPADE again, as a user would write them: their numbers are known.
PLAIN = Lens(
    key="plain",
    label="plain lens",
    short_label="plain",
    read=lambda view: view.unembed(view.hidden),
    style=LineStyle("#123456", "star", "dot"),
)
SECOND = Lens(
    key="second",
    label="second heads",
    short_label="2nd",
    read=lambda view: view.heads.logits(view.hidden, view.layer),
    style=LineStyle("#654321", "pentagon", "solid"),
    heads=HeadsSource("spade", "second"),
    decoder="l-spade",
)


@contextmanager
def known():
    """Register both lenses."""
    for lens in (PLAIN, SECOND):
        register(lens)
    try:
        yield
    finally:
        for lens in (PLAIN, SECOND):
            del LENSES[lens.key]


@pytest.fixture(scope="module")
def extended(evaluated_once, tmp_path_factory):
    """A project evaluated with the two lenses, and its output."""
    made = evaluated_once.copy(tmp_path_factory.mktemp("extended"))
    (made.folder / "second").mkdir()
    for name in ("config.json", "heads.safetensors"):
        shutil.copy(made.folder / name, made.folder / "second" / name)
    with (
        pytest.MonkeyPatch.context() as patch,
        known(),
        drawing("accuracy_by_layer"),
        redirect_stdout(StringIO()) as out,
    ):
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("COLUMNS", "250")
        patch.chdir(made.project.home)
        assert main(["evaluate", "--config", str(made.project.home / "recipe.yaml")]) == 0
    return made, out.getvalue()


@pytest.fixture
def made(extended):
    """That project, while the two lenses are registered."""
    with known():
        yield extended[0]


@pytest.mark.parametrize(("lens", "same"), [(PLAIN, LOGIT_LENS), (SECOND, L_SPADE)])
def test_a_third_party_lens_is_measured_and_written_to_results(made, lens, same):
    lenses = made.results["lenses"]
    assert list(lenses) == ["logit_lens", "tuned_lens", "l_spade", "spade", "plain", "second"]
    assert lenses[lens.key] == lenses[same.key]


def test_a_third_party_lens_is_priced_by_its_decoder_or_left_out(made):
    lenses = made.results["iso_compute"]["lenses"]
    assert lenses[SECOND.key] == lenses[L_SPADE.key]
    assert PLAIN.key not in lenses


def test_a_third_party_lens_is_in_the_printed_table(extended):
    _, printed = extended
    assert {PLAIN.short_label, SECOND.short_label} <= set(printed.split())


def test_a_third_party_lens_is_drawn_in_its_own_style(made):
    (figure,) = (f for f in all_figures(made.results) if f.title == "Accuracy by layer")
    styles = {series.label: series.style for series in figure.series}
    assert styles[PLAIN.label] == PLAIN.style
    assert styles[SECOND.label] == SECOND.style
    svg = (made.folder / "figures/accuracy_by_layer.svg").read_text(encoding="utf-8")
    assert PLAIN.style.colour in svg
    assert SECOND.style.colour in svg


def test_a_third_party_lens_is_in_the_report_and_the_card(made):
    report = (made.folder / "report.html").read_text(encoding="utf-8")
    for lens in (PLAIN, SECOND):
        assert f"<th>{lens.label}</th>" in report
        assert f'"name": "{lens.label}"' in report  # a trace of the interactive figures
    header = f"| SPADE | {PLAIN.label} | {SECOND.label} | KL of L-SPADE to SPADE (nats) |"
    assert header in card(made.folder)


@pytest.mark.parametrize(("lens", "same"), [(PLAIN, LOGIT_LENS), (SECOND, L_SPADE)])
def test_inspect_supports_a_third_party_lens(made, capsys, monkeypatch, lens, same):
    monkeypatch.setenv("COLUMNS", "200")  # avoids line wrapping
    recipe, heads = str(made.project.home / "recipe.yaml"), str(made.folder)
    shown = {}
    for one in (lens, same):
        arguments = ["--config", recipe, "--heads", heads, "--lens", one.key]
        assert main(["inspect", "w1 w2 ? :", *arguments]) == 0
        title, _, table = capsys.readouterr().out.partition(": likeliest")
        assert title.strip() == one.label
        shown[one.key] = table
    assert shown[lens.key] == shown[same.key]


def test_results_of_an_unregistered_lens_are_shown_under_its_key(evaluated_once, tmp_path):
    folder = tmp_path / "toy"
    shutil.copytree(evaluated_once.folder, folder)
    results = evaluated_once.results
    results["lenses"]["of_others"] = results["lenses"][LOGIT_LENS.key]
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert "<th>of_others</th>" in write_report(folder).read_text(encoding="utf-8")
    assert "| of_others |" in card(folder)


# Reading


def test_spade_is_unembedded_once_per_layer_for_any_number_of_lenses(project, monkeypatch):
    data = project.module()
    dataset, adapter = data.stored("validation"), data.adapter
    heads = LSpadeHeads(data.layers, adapter.hidden_size).bind(adapter)
    monkeypatch.setattr(readings, "CHUNK_LOGITS", 8 * adapter.vocab_size)
    monkeypatch.setattr(readings, "CHUNK_ROWS", 1)
    rows = []
    hook = adapter.unembed.head.register_forward_hook(lambda _, __, out: rows.append(len(out)))
    lenses = {LOGIT_LENS.key: None, TUNED_LENS.key: heads, L_SPADE.key: heads, SPADE.key: None}
    read_lenses(dataset, adapter.unembed, lenses, data.layers)
    hook.remove()
    # The full model once; then per layer SPADE once and each of the three other lenses.
    assert sum(rows) == len(dataset) * (1 + len(data.layers) * (1 + 3))
    assert max(rows) == 8  # one layer of one chunk at a time


@pytest.fixture
def over_choices(project):
    """Rows, the model, and heads that were fitted over the choices."""
    data = project.module()
    heads = LSpadeHeads(data.layers, data.adapter.hidden_size).bind(data.adapter)
    torch.nn.init.normal_(heads.requires_grad_(False).bias)
    heads.metadata = {"training": {"recipe": {"model": {"scope": "choices"}}}}
    return data.stored("validation"), data.adapter, heads


def test_heads_fitted_over_the_choices_need_no_product_with_the_vocabulary(over_choices):
    dataset, adapter, heads = over_choices
    lenses, rows = {L_SPADE.key: heads, SPADE.key: None}, []
    hook = adapter.unembed.head.register_forward_hook(lambda _, __, out: rows.append(len(out)))
    read_lenses(dataset, adapter.unembed, lenses, heads.layers)
    hook.remove()
    assert sum(rows) == len(dataset) * (1 + len(heads.layers))  # the full model, and SPADE


def test_heads_fitted_over_the_choices_are_measured_over_them(over_choices):
    dataset, adapter, heads = over_choices
    found = read_lenses(dataset, adapter.unembed, {L_SPADE.key: heads}, heads.layers)
    batch = dataset.gather(torch.arange(len(dataset)))
    for place, layer in enumerate(heads.layers):
        logits = heads.logits(batch.hidden[:, dataset.layers.index(layer)], layer).double()
        for row, (own, ids, count) in enumerate(
            zip(logits, batch.choice_ids.long(), batch.choice_count, strict=True)
        ):
            among = torch.distributions.Categorical(logits=own[ids[:count]])
            read = {name: value[0, place, row] for name, value in found.values.items()}
            assert read["answer"] == ids[among.probs.argmax()]
            assert float(read["confidence"]) == pytest.approx(float(among.probs.max()), abs=1e-6)
            assert float(read["entropy"]) == pytest.approx(float(among.entropy()), abs=1e-6)


def test_values_do_not_depend_on_how_many_rows_are_measured_at_once(over_choices, monkeypatch):
    dataset, adapter, heads = over_choices
    lenses = {LOGIT_LENS.key: None, L_SPADE.key: heads, SPADE.key: None}
    whole = read_lenses(dataset, adapter.unembed, lenses, heads.layers)
    monkeypatch.setattr(readings, "BLOCK_LOGITS", 7 * adapter.vocab_size)
    assert len(dataset) % 7  # the last block is smaller
    parts = read_lenses(dataset, adapter.unembed, lenses, heads.layers)
    torch.testing.assert_close(parts.values, whole.values, equal_nan=True)
    torch.testing.assert_close(parts.full, whole.full)


def test_a_lens_that_needs_heads_rejects_a_view_without_heads():
    adapter = ModelAdapter.of(tiny("llama"))
    hidden = torch.zeros(1, adapter.hidden_size)
    view = LayerView(1, hidden, adapter.unembed, None, lambda: hidden)
    with pytest.raises(ArtifactError, match=r"l_spade reads through heads(.|\n)*model\.target"):
        L_SPADE.logits(view)


# The registry


def test_registering_a_taken_key_is_rejected():
    with pytest.raises(RecipeError, match=r"'spade' is registered already.*Choose another key"):
        register(SPADE)


@pytest.mark.parametrize("style", [{"marker": "hexagon"}, {"dash": "wavy"}])
def test_an_invalid_line_style_is_rejected(style):
    settings = vars(PLAIN) | {"style": LineStyle("#000000", **style)}
    with pytest.raises(RecipeError, match=r"hexagon|wavy"):
        register(Lens(**settings))
    assert PLAIN.key not in LENSES


@pytest.mark.parametrize("lens", [LOGIT_LENS, TUNED_LENS, L_SPADE, SPADE], ids=lambda x: x.key)
def test_a_policy_with_a_lenss_decoder_uses_the_heads_of_that_lens(lens):
    policy = ExitPolicy(layers=(1,), decoder=lens.decoder)
    if lens.heads is None:
        return
    heads = LSpadeHeads([1], 4)
    other = {"spade": "final", "final": "spade"}
    for target in (lens.heads.target, other[lens.heads.target]):
        heads.metadata = {"training": {"recipe": {"model": {"target": target}}}}
        if target == lens.heads.target:
            assert check_readers(policy, heads) == {lens.decoder: heads}
        else:
            with pytest.raises(PolicyError, match=f"model.target {lens.heads.target}"):
                answer_readers(policy, heads)


def test_heads_belong_to_the_lens_of_their_target():
    assert [lens_of_target(target) for target in ("spade", "final", None)] == [
        L_SPADE, TUNED_LENS, L_SPADE,
    ]  # fmt: skip
    with pytest.raises(ArtifactError, match="'nothing'"):
        lens_of_target("nothing")


def test_a_folder_of_tuned_heads_is_reported_as_a_tuned_lens(
    evaluated_once, tmp_path, monkeypatch, capsys
):
    made = evaluated_once.copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tuned = made.folder / "tuned_lens"
    recipe = str(made.project.home / "recipe.yaml")
    assert main(["evaluate", "--config", recipe, "--heads", str(tuned)]) == 0
    assert "tuned" in capsys.readouterr().out
    found = json.loads((tuned / "results.json").read_text())["lenses"]
    assert list(found) == [LOGIT_LENS.key, TUNED_LENS.key, SPADE.key]
    assert found[TUNED_LENS.key] == evaluated_once.results["lenses"][TUNED_LENS.key]
    assert "KL of tuned lens to SPADE" in (tuned / "README.md").read_text()
    assert main(["compare", str(made.folder), str(tuned), "--output", str(tmp_path / "c.png")]) == 0
