"""The token view: its numbers against the model's own, and the command as users see it."""

import io
import math
import re

import pytest
import torch
import toy
from rich.console import Console
from tiny_models import LAYERS, VOCAB, tiny

from lspade_train import LSpadeHeads, ModelAdapter, spade_logits
from lspade_train.cli import main
from lspade_train.errors import RecipeError
from lspade_train.inspection import inspect_prompt, render_html, render_terminal
from lspade_train.inspection.render import style
from lspade_train.probes.lenses import L_SPADE, LENSES, LOGIT_LENS, SPADE

IDS = [1, 9, 10, 30, 11, 12, 6, 7]
BELOW = tuple(range(LAYERS))


@pytest.fixture(scope="module")
def adapter():
    return ModelAdapter.of(tiny("llama"))


def view_of(adapter, lens, layers=BELOW, ids=IDS, **settings):
    return inspect_prompt(adapter, toy.tokenizer(), ids, lens, layers, **settings)


def best(logits):
    return toy.tokenizer().convert_ids_to_tokens(int(logits.argmax()))


# The numbers


@torch.no_grad()
def test_the_top_row_shows_the_full_model_at_every_position(adapter):
    view = view_of(adapter, LOGIT_LENS, top_k=VOCAB)
    logits = adapter.model(torch.tensor([IDS])).logits[0]
    assert view.layers == (*BELOW, LAYERS)
    assert view.tokens == tuple(toy.tokenizer().convert_ids_to_tokens(IDS))
    assert [cell.tokens[0] for cell in view.cells[-1]] == [best(row) for row in logits]
    for cell, row in zip(view.cells[-1], logits.double().softmax(-1), strict=True):
        torch.testing.assert_close(torch.tensor(sum(cell.probabilities)), torch.tensor(1.0))
        assert cell.probabilities[0] == pytest.approx(float(row.max()), abs=1e-6)
        assert cell.entropy == pytest.approx(float(-(row * row.log()).sum()), abs=1e-5)
        assert cell.agrees
        assert cell.kl == pytest.approx(0.0, abs=1e-6)


def test_spade_at_each_position_equals_spade_of_the_truncated_prompt(adapter):
    view = view_of(adapter, SPADE)
    for place in range(len(IDS)):
        expected = spade_logits(adapter, torch.tensor([IDS[: place + 1]]), layers=BELOW)[0]
        for layer in BELOW:
            assert view.cells[layer][place].tokens[0] == best(expected[layer])
            probability = float(expected[layer].softmax(-1).max())
            assert view.cells[layer][place].probabilities[0] == pytest.approx(probability, abs=1e-5)


def test_spade_at_the_start_token_equals_the_full_model(adapter):
    column = [row[0] for row in view_of(adapter, SPADE).cells]
    assert all(cell.agrees and cell.kl == pytest.approx(0.0, abs=1e-5) for cell in column)


def test_untrained_heads_read_the_same_as_the_logit_lens(adapter):
    heads = LSpadeHeads([1, 3], adapter.hidden_size).bind(adapter)
    through_heads = view_of(adapter, L_SPADE, heads.layers, heads=heads)
    assert through_heads.layers == (1, 3, LAYERS)
    assert through_heads.cells == view_of(adapter, LOGIT_LENS, (1, 3)).cells


def test_a_view_of_the_last_positions_matches_the_full_view(adapter):
    lens = LOGIT_LENS
    part, whole = view_of(adapter, lens, last=3), view_of(adapter, lens)
    assert part.first == len(IDS) - 3
    assert part.tokens == whole.tokens[-3:]
    assert [cell.tokens for cell in part.answer] == [cell.tokens for cell in whole.answer]


def test_white_space_is_shown_visibly(stories):
    from lspade_train.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(stories))
    real = ModelAdapter.from_pretrained(str(stories), device="cpu")
    ids = tokenizer("Once upon a time\nthere was").input_ids
    view = inspect_prompt(real, tokenizer, ids, LOGIT_LENS, [1], top_k=1)
    assert "·upon" in view.tokens
    assert "⏎" in view.tokens
    assert not any(re.search(r"\s", token) for token in view.tokens)


def test_the_choices_are_compared_by_the_layers_own_logits(adapter):
    choices = {"yes": 9, "no": 12, "maybe": 30}
    view = view_of(adapter, SPADE, choices=choices)
    expected = spade_logits(adapter, torch.tensor([IDS]), layers=range(LAYERS + 1))[0]
    assert view.choices == ("yes", "no", "maybe")
    for layer, scores in zip(view.layers, view.scores, strict=True):
        among = expected[layer][[9, 12, 30]].double().softmax(-1)
        torch.testing.assert_close(torch.tensor(scores).double(), among, atol=1e-5, rtol=0)
    assert "probability among the choices" in printed(view)
    assert "probability among the choices" not in printed(view_of(adapter, SPADE))


# Rendering


def printed(view, width=100, **settings):
    console = Console(file=io.StringIO(), width=width, **settings)
    render_terminal(view, console)
    return console.file.getvalue()


def test_without_colour_the_entropy_is_a_number_in_the_cell(adapter):
    view = view_of(adapter, LOGIT_LENS)
    text = printed(view)
    assert f"{view.answer[-1].tokens[0]} {view.answer[-1].entropy:.1f}" in text
    assert "\x1b[" not in text


def test_with_colour_the_entropy_is_the_cells_background(adapter):
    view = view_of(adapter, LOGIT_LENS)
    text = printed(view, color_system="truecolor", force_terminal=True)
    background = style(view.answer[-1].entropy, view.uniform)[0]
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}" in text


def test_a_narrow_terminal_keeps_the_answer_and_reports_omitted_columns(adapter):
    text = printed(view_of(adapter, LOGIT_LENS), width=60)
    assert all(len(line) <= 60 for line in text.split("answer position")[0].splitlines()[4:])
    assert re.search(r"\d earlier positions are not shown", text)
    assert re.search(r"┃ : +┃\n", text)  # the prompt's last token is the last column


def test_the_colour_scale_darkens_monotonically_with_readable_text():
    def luminance(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    looks = [style(share / 20 * math.log(VOCAB), math.log(VOCAB)) for share in range(21)]
    backs = [luminance(back) for back, _ in looks]
    assert backs == sorted(backs, reverse=True)
    for back, text in looks:
        light, dark = sorted([luminance(back), luminance(text)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


def test_the_page_is_a_single_file_without_network_requests(adapter, tmp_path):
    view = view_of(adapter, SPADE)
    page = render_html(view, tmp_path / "view.html", model="<b>org/name</b>").read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "<b>org/name" not in page
    assert "&lt;b&gt;org/name" in page
    assert page.count("data-tip=") == len(view.layers) * len(IDS)
    assert f"<td>{view.answer[2].kl:.3f}</td>" in page
    assert "prefers-color-scheme: dark" in page


# The command


@pytest.fixture
def fitted(evaluated_once, monkeypatch):
    """A project whose heads are found from the test's working directory; read-only."""
    monkeypatch.chdir(evaluated_once.project.home)
    return evaluated_once.project


@pytest.mark.parametrize("lens", LENSES)
def test_every_lens_prints_its_layers_and_writes_a_page(fitted, capsys, tmp_path, lens):
    page, recipe = tmp_path / f"{lens}.html", str(fitted.home / "recipe.yaml")
    arguments = ["--config", recipe, "--lens", lens, "--html", str(page)]
    assert main(["inspect", "w1 w2 ? :", *arguments]) == 0
    text = capsys.readouterr().out
    shown = re.findall(r"^│ (\d)(?: \(model\))? ", text, re.M)
    below = ["3", "2", "1"] if lens in {"tuned_lens", "l_spade"} else ["3", "2", "1", "0"]
    assert shown == ["4", *below] * 2
    assert page.read_text().startswith("<!doctype html>")


def test_choices_are_shown_by_layer(fitted, capsys, tmp_path):
    page, recipe = tmp_path / "view.html", str(fitted.home / "recipe.yaml")
    arguments = ["--config", recipe, "--lens", "spade", "--html", str(page)]
    assert main(["inspect", "w1 w2 ? :", "--choices", "A, B", *arguments]) == 0
    shown = capsys.readouterr().out.split("among the choices")[1]
    rows = re.findall(r"^│ (\d)[^│]*│ (\d\.\d{3}) +│ (\d\.\d{3}) +│", shown, re.M)
    assert [row[0] for row in rows] == ["4", "3", "2", "1", "0"]
    assert all(float(one) + float(other) == pytest.approx(1, abs=0.002) for _, one, other in rows)
    assert page.read_text().count("<b>0.") == len(rows)


def test_a_prompt_can_come_from_standard_input(fitted, capsys, monkeypatch):
    arguments = ["--config", str(fitted.home / "recipe.yaml"), "--lens", "spade"]
    assert main(["inspect", "w1 w2 ? :", *arguments]) == 0
    given = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2 ? :\n"))
    assert main(["inspect", *arguments]) == 0
    assert capsys.readouterr().out == given


def test_standard_input_in_another_encoding_is_rejected(fitted, capsys, monkeypatch):
    arguments = ["--config", str(fitted.home / "recipe.yaml"), "--lens", "spade"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("w1 é".encode("latin-1"))))
    assert main(["inspect", *arguments]) == 1
    assert "The prompt holds bytes that are not text" in capsys.readouterr().err


REFUSED = {
    "an unknown lens": (["w1", "--lens", "telescope"], r"'telescope'.*tuned_lens.*--lens"),
    "an empty prompt": ([" ", "--lens", "spade"], r"No prompt.*standard input"),
    "a prompt over the context": (["w1 " * 80, "--lens", "spade"], r"81 tokens.*holds 64"),
    "heads that were never fitted": (["w1"], r"No heads for l_spade.*\n.*--lens logit_lens"),
    "a tuned lens that was never fitted": (
        ["w1", "--lens", "tuned_lens"],
        r"lspade-train fit .*--model\.target final",
    ),
    "heads that are not there": (["w1", "--heads", "no/such/heads"], r"no/such/heads"),
    "one choice": (["w1", "--lens", "spade", "--choices", "A"], r"'A'.*two or more"),
    "no position": (["w1", "--lens", "spade", "--last", "0"], r"--last"),
    "no token": (["w1", "--lens", "spade", "--top_k", "0"], r"--top_k"),
    "a page that cannot be written": (
        ["w1", "--lens", "spade", "--html", "/proc/view.html"],
        r"/proc/view\.html cannot be written",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inspect_rejects_invalid_arguments(project, capsys, monkeypatch, case):
    monkeypatch.chdir(project.home)
    arguments, message = REFUSED[case]
    assert main(["inspect", *arguments, "--config", str(project.recipe())]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 2
    assert re.search(message, error), error


def test_a_layer_the_model_does_not_have_is_rejected(adapter):
    with pytest.raises(RecipeError, match="Layer 4 is out of range"):
        view_of(adapter, SPADE, (1, LAYERS))
