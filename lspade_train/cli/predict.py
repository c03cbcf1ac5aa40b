"""`predict`: answer questions, lines in and lines out."""

import json
import logging
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lspade_train.cli.options import heads_given, heads_option, runtime_parts
from lspade_train.cli.parsing import command_parser, parse

log = logging.getLogger(__name__)

PREDICT = """\
Answer questions with early exits: JSONL or plain lines in, JSONL out, in input order.
A line is a row as the recipe's task has it, such as {"question": ..., "choices": [...]}; it is
rendered as fit renders it, by the recipe's template, solved examples and chat format. With --raw a
line is {"prompt": ..., "choices": [...]} or a text, and is asked as it stands.
Further keys are echoed. Where rows give their answer, the accuracy is printed at the end.
The policy is policy.json beside the heads; without one, --threshold sets an entropy in nats.

  lspade-train predict --config arc --input questions.jsonl --output answers.jsonl
  echo '{"question": "Iron is a", "choices": ["metal", "gas"]}' | lspade-train predict --config arc
  echo "The capital of France is" | lspade-train predict --config arc --raw --threshold 0.5"""


def predict(arguments: list[str]) -> int:
    """Answer questions; 1 where every line failed."""
    parser = command_parser("predict", PREDICT)
    heads_option(parser)
    add = parser.add_argument
    add("--input", type=str, default="-", help="JSONL or text file; - reads standard input")
    add("--output", type=str, default="-", help="JSONL file; - writes standard output")
    add("--raw", type=bool, default=False, nargs="?", const=True, help="prompts as they stand")
    add(
        "--threshold", type=float | None, default=None,
        help="entropy in nats, in place of policy.json",
    )  # fmt: skip
    add("--resume", type=bool, default=False, nargs="?", const=True, help="keep existing answers")
    parsed = parse(parser, arguments)

    from lspade_train.errors import TaskError
    from lspade_train.policies.policy import ExitPolicy
    from lspade_train.runtime import ExitRuntime
    from lspade_train.runtime.predict import RawPrompts, predict_lines
    from lspade_train.tasks.asking import Asker

    options, data = parsed.options, parsed.recipe.data
    output, source = Path(options.output).expanduser(), Path(options.input).expanduser()
    if options.output != "-":
        _require_output(output)
    if options.input != "-" and not source.is_file():
        raise TaskError(f"No input file {options.input}. Give a JSONL or text file with --input.")
    folder = heads_given(parsed)
    heads, adapter, tokenizer = runtime_parts(parsed, folder)
    policy = (
        ExitPolicy.load(folder / "policy.json")
        if options.threshold is None
        else ExitPolicy(
            layers=heads.layers,
            threshold=options.threshold,
            scope=heads.scope,
            positions=data.positions,
        )
    )
    runtime = ExitRuntime(adapter, heads, policy=policy, tokenizer=tokenizer)
    ask = RawPrompts() if options.raw else Asker(data, tokenizer, _fitted_prefix(heads))
    done = 0
    if options.resume and options.output != "-" and output.exists():
        done = _keep_whole_lines(output)
    count = Counts()
    with _lines(options.input) as lines:
        answers = predict_lines(runtime, lines, ask=ask, done=done)
        if options.output == "-":
            _write(answers, sys.stdout, count)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a" if done else "w", encoding="utf-8") as file:
                _write(answers, file, count)
    return count.report()


def _fitted_prefix(heads: Any) -> str | None:
    """Text before the answers as the heads were fitted; None for heads that do not record it."""
    training: dict[str, Any] = heads.metadata.get("training", {})
    return training.get("data", {}).get("answer_prefix")


@dataclass
class Counts:
    """What the answers of a run came to."""

    lines: int = 0
    failed: int = 0
    exited: int = 0
    labelled: int = 0
    correct: int = 0
    first_error: str = ""

    def add(self, answer: dict[str, Any]) -> None:
        """Count one output line."""
        self.lines += 1
        if "error" in answer:
            self.failed += 1
            self.first_error = self.first_error or f"line {answer['line']}: {answer['error']}"
            return
        self.exited += answer["exited"]
        self.labelled += "correct" in answer
        self.correct += answer.get("correct", False)

    def report(self) -> int:
        """Print it on standard error; the exit code."""
        if self.failed:
            which = "all" if self.failed == self.lines else f"{self.failed} of"
            first = self.first_error.splitlines()[0]
            sys.stderr.write(f"error: {which} {self.lines} lines failed; {first}\n")
            if self.failed == self.lines:
                return 1
        answered = self.lines - self.failed
        told = f"{answered:,} answered, {self.exited:,} of them early"
        if self.labelled:
            right = self.correct / self.labelled
            told += f"; accuracy {right:.3f} on {self.labelled:,} with an answer"
        log.info("%s", told)
        return 0


@contextmanager
def _lines(name: str) -> Generator[Iterable[str]]:
    """The input's lines; whatever bytes one holds, the others are read."""
    from lspade_train.io.text import lines_of

    if name != "-":
        with Path(name).expanduser().open("rb") as file:
            yield lines_of(file)
        return
    binary = getattr(sys.stdin, "buffer", None)
    yield sys.stdin if binary is None else lines_of(binary)


def _require_output(path: Path) -> None:
    """Refuse what cannot be written, before the model is loaded."""
    from lspade_train.errors import TaskError
    from lspade_train.io.storage import require_writable

    if not path.exists():
        require_writable(path.parent, TaskError)
    elif path.is_dir() or not os.access(path, os.W_OK):
        raise TaskError(f"{path} cannot be written. Give another file with --output.")


def _write(answers: Iterator[dict[str, Any]], file: Any, count: Counts) -> None:
    for answer in answers:
        count.add(answer)
        file.write(json.dumps(answer, allow_nan=False) + "\n")
        file.flush()


def _keep_whole_lines(path: Path) -> int:
    """Cut a half-written last line off, and count the answers that stand."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))  # in place: a kill here loses nothing
    return whole.count(b"\n")
