"""The experiment on a consistent space: its loss, its models, its results and its page."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from blocks import ROOT
from tiny_models import LAYERS, WIDTH, tiny
from torch.nn.functional import kl_div, log_softmax

from lspade_train import ModelAdapter
from lspade_train.recipe import HeadConfig

pytest.importorskip("peft")

PROMPTS = [torch.tensor(ids) for ids in ([1, 5, 9, 3], [1, 7], [1, 20, 33, 41, 8, 11])]


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_the_path():
    """As for the script itself, which imports the modules of its folder."""
    sys.path.insert(0, str(ROOT / "recipes"))
    yield
    sys.path.remove(str(ROOT / "recipes"))


def own_head(weight=1.0, lr=1e-2, dtype=torch.float32, touched=True):
    """LoRA on a tiny random Llama, away from its initial zeros if touched."""
    from consistent.own_head import OwnHead, Tuning

    tuning = Tuning(weight=weight, epochs=1, batch_size=2, lr=lr, rank=2, seed=0)
    module = OwnHead(tiny("llama").to(dtype), tuning)
    if touched:
        with torch.no_grad():
            for parameter in trained(module):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def batch():
    from consistent.own_head import collate

    return collate(PROMPTS)


def oracle(module):
    """Both losses by plain autograd over whole logits, one unpadded prompt at a time."""
    original, tuned = tiny("llama").double(), module.model.get_base_model()
    own, kl = [], []
    for prompt in PROMPTS:
        with torch.no_grad():
            before = log_softmax(original(prompt[None]).logits[0, -1], -1)
        states: list = []
        hooks = [
            block.register_forward_hook(lambda _m, _i, out, states=states: states.append(out))
            for block in tuned.model.layers
        ]
        after = log_softmax(tuned(prompt[None]).logits[0, -1], -1)
        for hook in hooks:
            hook.remove()
        assert len(states) == LAYERS
        for state in states[:-1]:
            read = log_softmax(tuned.lm_head(tuned.model.norm(state[0, -1])), -1)
            own.append(-(after.exp().detach() * read).sum())
        kl.append((before.exp() * (before - after)).sum())
    return torch.stack(own).mean(), torch.stack(kl).mean()


def test_both_losses_and_their_gradients_match_plain_autograd_in_float64():
    module = own_head(dtype=torch.float64)
    for place in range(2):
        found, expected = module.losses(batch())[place], oracle(module)[place]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert found > 1e-3
        gradients = [
            torch.autograd.grad(loss, trained(module), allow_unused=True, materialize_grads=True)
            for loss in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_lora_is_in_every_projection_and_nowhere_else():
    names = {name for name, p in own_head().named_parameters() if p.requires_grad}
    assert len(names) == 2 * 7 * LAYERS
    assert not [name for name in names if "norm" in name or "lm_head" in name or "embed" in name]


def test_untouched_lora_has_no_kl_and_merges_into_the_original():
    module = own_head(weight=0.0, touched=False)
    assert module.losses(batch())[1].item() == pytest.approx(0.0, abs=1e-7)
    merged = module.model.merge_and_unload()
    with torch.no_grad():
        found, expected = merged(PROMPTS[0][None]).logits, tiny("llama")(PROMPTS[0][None]).logits
    assert torch.equal(found, expected)


def test_one_step_lowers_the_own_heads_loss():
    module = own_head(touched=False)
    optimizer = torch.optim.AdamW(trained(module), lr=module.tuning.lr)
    before, _ = module.losses(batch())
    before.backward()
    optimizer.step()
    assert module.losses(batch())[0] < before - 1e-3


def test_a_fit_of_as_many_epochs_as_the_fine_tuning_costs_has_its_flops(project):
    from consistent.cost import count
    from consistent.measure import open_data

    from lspade_train.recipe import Recipe

    data = open_data(Recipe(name="toy", data=project.config(mode="memory")))
    found = count(data, HeadConfig(target="both"))
    rows, layers, vocab = 48, LAYERS - 1, data.adapter.vocab_size
    assert found.maps == rows * layers * 2 * (2 * WIDTH**2 + 2 * WIDTH * vocab)
    assert found.fine_tune(2) == 8 * found.forward + 6 * found.own_heads
    assert found.fit(found.epochs(found.fine_tune(2))) == pytest.approx(found.fine_tune(2))
    choices = count(data, HeadConfig(scope="choices"))
    assert choices.maps == rows * layers * (2 * WIDTH**2 + 2 * WIDTH * 3)


# The whole experiment --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(toy_root, tmp_path_factory):
    """The output of a run on the toy model with one weight; tests that write take a copy."""
    home = tmp_path_factory.mktemp("consistent")
    recipe = {
        "name": "toy",
        "data": {
            "model_id": str(toy_root / "model"), "task": "jsonl", "dataset": str(toy_root / "data"),
            "device": "cpu",
        },
        "model": {"target": "both"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }  # fmt: skip
    (home / "toy.yaml").write_text(yaml.safe_dump(recipe))
    run(home)
    return home


def run(home, **options):
    from consistent_space import consistent_space

    given = {"weights": (5.0,), "epochs": 2, "lr": 1e-2, "max_epochs": 2} | options
    consistent_space(str(home / "toy.yaml"), output=home / "out", **given)


def results(home):
    return json.loads((home / "out/results.json").read_text())


@pytest.fixture
def again(finished, tmp_path, monkeypatch):
    """A copy of the finished run, and a list that every training of a copy is added to."""
    import consistent_space

    counted = []
    for name in ("fit", "fine_tune"):
        known = getattr(consistent_space, name)

        def counting(*given, name=name, known=known):
            counted.append(name)
            return known(*given)

        monkeypatch.setattr(consistent_space, name, counting)
    return shutil.copytree(finished, tmp_path / "again"), counted


def test_a_run_measures_the_frozen_and_the_tuned_model(finished):
    found = results(finished)
    assert list(found["rows"]) == ["frozen", "frozen, equal compute", "weight 5"]
    frozen, equal, tuned = found["rows"].values()
    assert found["n"] == {"train": 48, "validation": 20, "test": 12}
    assert frozen["kl"] == equal["kl"] == 0.0
    assert frozen["accuracy"] == equal["accuracy"]
    assert equal["note"].startswith("2 of ")
    assert tuned["kl"] > 1e-4
    assert sum(tuned["own_head_kl"]) < sum(frozen["own_head_kl"])  # what it was trained for
    assert frozen["training_flops"] < equal["training_flops"] < tuned["training_flops"]


def test_the_merged_model_is_an_ordinary_one_with_that_kl(finished, toy_root):
    folder = finished / "out/weight-5/model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    before, after = (ModelAdapter.from_pretrained(str(x)) for x in (toy_root / "model", folder))
    from consistent.measure import open_data

    from lspade_train.recipe import DataConfig, Recipe

    data = DataConfig(model_id=str(folder), task="jsonl", dataset=str(toy_root / "data"))
    total = 0.0
    examples = open_data(Recipe(name="toy", data=data)).encoded("test").examples
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        with torch.no_grad():
            p, q = (x.model(ids).logits[0, -1].double().log_softmax(-1) for x in (before, after))
        total += float(kl_div(q, p, log_target=True, reduction="sum"))
    assert results(finished)["rows"]["weight 5"]["kl"] == pytest.approx(total / 12, rel=1e-3)


def test_results_contain_no_local_paths(finished):
    text = (finished / "out/results.json").read_text()
    assert str(finished) not in text
    assert not [word for word in ("/tmp", "/work", "/home", "/root") if word in text]


def test_a_finished_run_trains_and_measures_nothing(again):
    home, counted = again
    before = (home / "out/results.json").stat().st_mtime_ns
    run(home)
    assert counted == []
    assert (home / "out/results.json").stat().st_mtime_ns == before


def test_an_interrupted_run_reuses_its_finished_stages(again):
    home, counted = again
    kept = results(home)
    lost = kept["rows"].pop("weight 5")
    (home / "out/results.json").write_text(json.dumps(kept))
    (home / "out/weight-5/fitted.json").unlink()
    run(home)
    assert counted == ["fit"]
    assert results(home)["rows"]["weight 5"]["kl"] == pytest.approx(lost["kl"])


def test_other_settings_are_refused_in_the_same_folder(again):
    home, counted = again
    with pytest.raises(SystemExit, match="other settings.*--output"):
        run(home, lr=1e-3)
    assert counted == []


def test_without_peft_the_install_command_is_named(finished, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install peft"):
        run(finished)


# The page --------------------------------------------------------------------------------------


def shown(line):
    return f"| {' | '.join(line)} |"


def test_the_page_shows_every_row_of_the_committed_results():
    from consistent.report import BEGIN, END, FIGURE, PAGE, cells, load, render

    page = PAGE.read_text(encoding="utf-8")
    for found in load():
        for line in cells(found):
            assert shown(line) in page
    assert page.split(BEGIN)[1].split(END)[0].strip() == render(load()).strip()
    assert FIGURE.exists() is bool(load())


def test_committed_results_contain_no_local_paths():
    from consistent.report import load

    for found in load():
        assert not [w for w in ("/tmp", "/work", "/home", "/root") if w in json.dumps(found)]


def test_the_page_is_rewritten_from_results(finished, tmp_path):
    from consistent.report import END, HEADINGS, PAGE, cells, write_page

    (tmp_path / "results").mkdir()
    shutil.copy(finished / "out/results.json", tmp_path / "results/toy.json")
    page = tmp_path / "page.md"
    shutil.copy(PAGE, page)
    for _ in range(2):  # the markers stay
        write_page(tmp_path / "results", page, tmp_path / "figure.svg")
    text = page.read_text(encoding="utf-8")
    lines = cells(results(finished))
    assert [line[1] for line in lines][0::2] == ["frozen", "weight 5"]
    assert all(len(line) == len(HEADINGS) and shown(line) in text for line in lines)
    assert text.split(END)[1] == PAGE.read_text(encoding="utf-8").split(END)[1]
    assert "<svg" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
