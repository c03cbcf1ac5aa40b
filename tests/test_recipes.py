"""Every recipe parses, and runs one batch on the CPU with a tiny model in place of its model."""

import re
from pathlib import Path

import pytest
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lspade_train.cli import main
from lspade_train.cli.parsing import command_parser, parse

RECIPES = sorted(Path(__file__).resolve().parents[1].glob("recipes/*.yaml"))
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"


@pytest.fixture(scope="module")
def byte_llama(tmp_path_factory) -> Path:
    """A tiny random Llama whose tokens are characters and the answers of all tasks."""
    folder = tmp_path_factory.mktemp("byte_llama")
    characters = [chr(code) for code in range(32, 127)]
    words = ["<unk>", "<s>", *characters, "yes", "no"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", chat_template=CHAT
    ).save_pretrained(folder)
    model = tiny("llama", vocab_size=len(words), max_position_embeddings=4096)
    model.save_pretrained(folder)
    return folder


def test_recipes_are_found():
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_states_its_cost(recipe):
    parsed = parse(command_parser("fit", ""), ["--config", str(recipe)], early=lambda _: None)
    assert parsed.recipe.name == recipe.stem
    assert recipe.read_text().startswith("# ")
    assert (
        "cost" in recipe.read_text().lower()
        or "GB" in recipe.read_text()
        or "MB" in recipe.read_text()
    )
    assert parsed.recipe.data.revision is None  # resolved at run time, never invented


def one_per_task():
    """All recipes; those whose task another recipe covers are slow, as only the model differs."""
    seen = set()
    for path in RECIPES:
        task = re.search(r"task: *(\w+)", path.read_text())[1]
        yield pytest.param(path, id=path.stem, marks=pytest.mark.slow if task in seen else ())
        seen.add(task)


@pytest.mark.parametrize("recipe", [*one_per_task()])
def test_every_recipe_runs_one_batch_with_a_tiny_model(
    recipe, byte_llama, shared, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = parse(
        command_parser("fit", ""), ["--config", str(recipe)], early=lambda _: None
    ).recipe.data
    folder = {
        "arc_easy": "allenai/ai2_arc",
        "arc_challenge": "allenai/ai2_arc",
        "boolq": "google/boolq",
        "headqa": "EleutherAI/headqa",
    }.get(data.task)
    if folder:
        overrides = [f"--data.dataset={shared / 'data/hub-mini' / folder}"]
    elif data.task == "text":
        (tmp_path / "corpus.txt").write_text("\n\n".join(f"once {i} " * 90 for i in range(60)))
        overrides = ["--data.dataset=corpus.txt", "--data.subset=null"]
    else:
        pytest.skip("has a test of its own")
    code = main(
        [
            "fit", f"--config={recipe}", f"--data.model_id={byte_llama}", *overrides,
            "--data.cache_dir=cache", "--data.limit=8", "--data.dtype=float32",
            "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    assert code == 0
    assert (tmp_path / "checkpoints" / recipe.stem / "heads.safetensors").exists()
