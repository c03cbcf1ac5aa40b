"""`predict`: answer prompts, lines in and lines out."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lspade_train.cli.options import heads_given, heads_option, runtime_parts
from lspade_train.cli.parsing import command_parser, parse

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
    from lspade_train.policies.policy import ExitPolicy
    from lspade_train.runtime import ExitRuntime
    from lspade_train.runtime.predict import predict_lines

    options, recipe = parsed.options, parsed.recipe
    output = Path(options.output)
    if options.output != "-":
        _require_output(output)
    if options.input != "-" and not Path(options.input).is_file():
        raise TaskError(f"No input file {options.input}. Give a JSONL or text file with --input.")
    folder = heads_given(parsed)
    heads, adapter, tokenizer = runtime_parts(parsed, folder)
    policy = (
        ExitPolicy.load(folder / "policy.json")
        if options.threshold is None
        else ExitPolicy(
            layers=heads.layers, threshold=options.threshold, positions=recipe.data.positions
        )
    )
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


def _lines(name: str) -> Any:
    from contextlib import nullcontext

    return nullcontext(sys.stdin) if name == "-" else Path(name).open(encoding="utf-8")


def _require_output(path: Path) -> None:
    """Refuse what cannot be written, before the model is loaded."""
    from lspade_train.errors import TaskError
    from lspade_train.io.storage import require_writable

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
