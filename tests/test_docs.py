"""README and docs: every block runs offline; commands that cannot run here are parsed."""

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from blocks import LANGUAGES, PAGES, ROOT, TO_RUN, blocks, commands, toolkit_command
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lspade_train.cli import COMMANDS, main

QUICKSTART = "recipes/quickstart.yaml"
HERE = {QUICKSTART, "recipes/quickstart_open.yaml", "recipes/quickstart_text.yaml", "reviews.yaml"}
SLOW = {"evaluate", "profile", "compare", "check"}
WITHOUT_RECIPE = {"init", "recipes", "info", "compare", "pull", "audit"}
SHORT = {
    "max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
REVIEWER = "HuggingFaceTB/SmolLM2-135M-Instruct"
FIRST = [
    [command, "--config", QUICKSTART] for command in ("fit", "calibrate")
]  # as written in the pages
TO_CHECK = [page for page in PAGES if any(block.language in TO_RUN for block in blocks(page))]


class Parsed(Exception):  # noqa: N818
    """Raised once a command line has been parsed, to stop before running it."""


@pytest.fixture
def project(fitted, tmp_path, monkeypatch) -> Path:
    """A copy of the fitted project, the starting point of each page."""
    # Without its checkpoints, which record their own folder's path.
    without = shutil.ignore_patterns("training")
    shutil.copytree(fitted, tmp_path / "project", symlinks=True, ignore=without)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path / "project"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """A folder like a clone after the quickstart, on few rows and for one epoch."""
    home = tmp_path_factory.mktemp("project")
    (home / "checkpoints").mkdir()
    (home / "recipes").mkdir()
    for path in (ROOT / "recipes").iterdir():
        (home / "recipes" / path.name).symlink_to(path)
    for name in HERE - {"reviews.yaml"}:
        (home / name).unlink()
        (home / name).write_text(shortened((ROOT / name).read_text()))
    (home / "checkpoints/tiny-world").symlink_to(ROOT / "checkpoints/tiny-world")
    save_reviewer(home / "reviewer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for arguments in FIRST:
            assert main(arguments) == 0
    return home


def shortened(text: str) -> str:
    """A recipe reduced to few rows, one epoch and, for deep models, few layers."""
    recipe = yaml.safe_load(text.replace(REVIEWER, "reviewer"))
    recipe["data"]["limit"] = 64
    recipe["trainer"] = SHORT
    if REVIEWER not in text:
        recipe["model"] = {**recipe.get("model", {}), "layers": [2, 4, 6]}
    return yaml.safe_dump(recipe)


def save_reviewer(folder: Path) -> None:
    """A random Llama whose vocabulary covers the reviews, in place of a model on the Hub."""
    words = ["<unk>", "<s>", "positive", "negative", "Review", "Sentiment", "movie", "witty"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    tiny("llama", max_position_embeddings=256).save_pretrained(folder)


@pytest.mark.parametrize("page", TO_CHECK, ids=lambda page: page.stem)
def test_the_blocks_of_each_page_run(page, project, monkeypatch):
    run_page(page, monkeypatch, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", TO_CHECK, ids=lambda page: page.stem)
def test_the_slow_commands_of_each_page_run(page, project, monkeypatch):
    run_page(page, monkeypatch, slow=True)


def run_page(page: Path, monkeypatch, *, slow: bool) -> None:
    """Write the files that a page shows, then run its commands, then its Python once."""
    found = blocks(page)
    for block in found:
        if block.title:
            Path(block.title).write_text(file_text(block.title, block.text))
    for block in found:
        if block.language == "python" and not slow:
            names: dict = {}
            exec(compile(block.text, f"{page.name}: {block.text[:40]!r}", "exec"), names)
            if "answers" in names:
                assert [answer.text for answer in names["answers"]] == ["B", "A"]
        for words in commands(block) if block.language == "bash" else []:
            run_command(words, monkeypatch, slow=slow)


def file_text(name: str, text: str) -> str:
    """A file as shown in a page; a few example rows are repeated to fill three splits."""
    if name == "reviews.jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        many = [{**row, "text": f"{row['text']} {i}"} for i in range(40) for row in rows]
        return "".join(json.dumps(row) + "\n" for row in many)
    return shortened(text) if name == "reviews.yaml" else text


def run_command(words: list[str], monkeypatch, *, slow: bool) -> None:
    """Run one of our commands if its inputs are here, else parse it; check other programs."""
    arguments = toolkit_command(words)
    if arguments is None:
        return run_other(words, slow=slow)
    if arguments in FIRST:
        return None  # every page starts after these have run
    command, *options = arguments
    assert command in COMMANDS, words
    recipe = options[options.index("--config") + 1] if "--config" in options else None
    heavy = (
        command in SLOW or {"--model.layer_groups", "--for"} & {*options} or "_text" in str(recipe)
    )
    here = recipe in HERE or (recipe is None and command not in {"pull"})
    if here and words[0] == "lspade-train" and (slow or not heavy):
        assert main(arguments) == 0, words
    elif command not in WITHOUT_RECIPE:
        assert_parsed(command, options, monkeypatch)
    return None


def assert_parsed(command: str, options: list[str], monkeypatch) -> None:
    """Check that its recipe exists and that it accepts every option."""
    module = importlib.import_module(f"lspade_train.cli.{command}")
    known = module.parse

    def only_parse(*given, **settings):
        known(*given, **settings | {"early": lambda _: None})  # neither model nor data is available
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(module, "parse", only_parse)
        with pytest.raises(Parsed):
            getattr(module, command)(options)


def run_other(words: list[str], *, slow: bool) -> None:
    """Run another program: the harness on a few questions; for others check that inputs exist."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), words
        if slow:
            subprocess.run([sys.executable, *rest, "--limit", "8"], check=True, capture_output=True)
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\[([\w-]+)\]", " ".join(rest))
        assert set(named) <= set(extras["optional-dependencies"]), words
    else:
        assert program in {"hf", "ruff"}, f"the tests do not know {words}"


def test_every_block_has_a_known_language():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{page.name}: {block.text[:60]}"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_point_to_existing_files_and_headings(page):
    for target in re.findall(r"\]\(([^)#\s]*(?:#[\w-]+)?)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        if name.startswith("http"):
            continue
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in headings(there), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """The heading anchors of a page, as mkdocs generates them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation_and_in_llms_txt():
    found = re.findall(r"\((.*\.md)\)", (ROOT / "docs/llms.txt").read_text())
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    inside = [pages for entry in settings["nav"] for pages in entry.values()]
    nav = [name for part in inside if isinstance(part, list) for e in part for name in e.values()]
    assert found == nav
    assert {*nav, "index.md"} == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_options_are_kept_unbroken_in_text_but_not_in_tags_or_scripts():
    hooks = runpy.run_path(str(ROOT / "docs/hooks.py"))
    page = '<a href="x --tag">fit --max-epochs 3</a><script>a --script</script> l-spade'
    kept = page.replace("--max-epochs", '<span class="whole">--max-epochs</span>')
    assert hooks["on_post_page"](page) == kept


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs lspade-train[docs]")
def test_the_site_builds_in_strict_mode_and_loads_no_external_resources(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    loaded = r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?https?://'
    for page in tmp_path.glob("*.html"):
        assert not re.findall(loaded, page.read_text()), page.name
