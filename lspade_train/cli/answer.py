"""`predict`: answer prompts, lines in and lines out."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lspade_train.cli.parsing import Parsed, command_parser, parse

log = logging.getLogger(__name__)

PREDICT = """\
Answer prompts with early exits: JSONL or plain lines in, JSONL out, in input order.
A line is {"prompt": ..., "choices": [...]} (further keys are echoed) or a prompt as it stands.
The policy is policy.json beside the heads; without one, --threshold sets an entropy in nats.

  lspade-train predict --config recipes/arc.yaml --input prompts.jsonl --output answers.jsonl
  echo "The capital of France is" | lspade-train predict --config recipes/arc.yaml"""


def predict(arguments: list[str]) -> None:
    """Answer prompts."""
    parser = command_parser("predict", PREDICT)
    heads_option(parser)
    add = parser.add_argument
    add("--input", type=str, default="-", help="JSONL or text file; - reads standard input")
    add("--output", type=str, default="-", help="JSONL file; - writes standard output")
    add("--threshold", type=float, default=None, help="entropy in nats, in place of policy.json")
    add("--resume", type=bool, default=False, nargs="?", const=True, help="go on after the answers")
    parsed = parse(parser, arguments)

    from lspade_train.errors import TaskError
    from lspade_train.policy import ExitPolicy
    from lspade_train.runtime import ExitRuntime
    from lspade_train.runtime.predict import predict_lines
    from lspade_train.tokenizer import load_tokenizer

    options, recipe = parsed.options, parsed.recipe
    output = Path(options.output)
    if options.output != "-":
        _require_output(output)
    if options.input != "-" and not Path(options.input).is_file():
        raise TaskError(f"No input file {options.input}. Give a JSONL or text file with --input.")
    folder = heads_given(parsed)
    heads, adapter = runtime_model(parsed, folder)
    policy = (
        ExitPolicy.load(folder / "policy.json")
        if options.threshold is None
        else ExitPolicy(
            layers=heads.layers, threshold=options.threshold, positions=recipe.data.positions
        )
    )
    tokenizer = load_tokenizer(recipe.data.model_id, revision=recipe.data.revision)
    runtime = ExitRuntime(adapter, heads, policy=policy, tokenizer=tokenizer)
    done = 0
    if options.resume and options.output != "-" and output.exists():
        done = _keep_whole_lines(output)
    with _lines(options.input) as lines:
        answers = predict_lines(runtime, lines, done=done)
        if options.output == "-":
            _write(answers, sys.stdout)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a" if done else "w", encoding="utf-8") as file:
                _write(answers, file)


def heads_option(parser: Any) -> None:
    """`--heads`: where the heads are."""
    parser.add_argument(
        "--heads", type=str | None, default=None, help="heads folder or URL; null: checkpoints/NAME"
    )


def heads_given(parsed: Parsed, *, written_by: str | None = None) -> Path:
    """The folder that `--heads` names: a URL's is its mirror, which no command writes into.

    Args:
        parsed: the command line.
        written_by: the command, if it writes into the folder.

    Raises:
        HubError: a URL that cannot be read, or that would be written.
        ArtifactError: a folder that would be written and cannot be.
    """
    from lspade_train.artifact import heads_folder
    from lspade_train.errors import ArtifactError, HubError
    from lspade_train.hub import local_folder
    from lspade_train.remote import is_remote
    from lspade_train.storage import require_writable

    given = parsed.options.heads
    if given is None or not is_remote(given):
        folder = heads_folder(parsed.recipe) if given is None else Path(given)
        if written_by is not None and folder.exists():
            require_writable(folder, ArtifactError)
        return folder
    if written_by is not None:
        raise HubError(
            f"{written_by} writes into the heads folder, and {given} is not on this machine.\n"
            f"Bring it here (lspade-train pull {given} --to DIR), give --heads DIR, and push it."
        )
    return local_folder(given)


def runtime_model(parsed: Parsed, folder: Path) -> tuple[Any, Any]:
    """The model without the data module: predict does not load Lightning."""
    from lspade_train.adapters import ModelAdapter
    from lspade_train.heads import LSpadeHeads

    recipe = parsed.recipe
    heads = LSpadeHeads.from_pretrained(folder)
    adapter = ModelAdapter.from_pretrained(
        recipe.data.model_id,
        revision=recipe.data.revision,
        dtype=recipe.data.dtype,
        device=recipe.data.device,
        device_map=recipe.data.device_map,
        quantization=recipe.data.quantization,
        trust_remote_code=recipe.data.trust_remote_code,
    )
    return heads, adapter


def _lines(name: str) -> Any:
    from contextlib import nullcontext

    return nullcontext(sys.stdin) if name == "-" else Path(name).open(encoding="utf-8")


def _require_output(path: Path) -> None:
    """Refuse what cannot be written, before the model is loaded."""
    from lspade_train.errors import TaskError
    from lspade_train.storage import require_writable

    if not path.exists():
        require_writable(path.parent, TaskError)
    elif path.is_dir() or not os.access(path, os.W_OK):
        raise TaskError(f"{path} cannot be written. Give another file with --output.")


def _write(answers: Iterator[dict[str, Any]], file: Any) -> None:
    for answer in answers:
        file.write(json.dumps(answer) + "\n")
        file.flush()


def _keep_whole_lines(path: Path) -> int:
    """Cut a half-written last line off, and count the answers that stand."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))  # in place: a kill here loses nothing
    return whole.count(b"\n")
