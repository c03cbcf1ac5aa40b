"""`predict`: answer the questions of a file with early exits."""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lspade_train.cli.options import find_heads, heads_given, heads_option, runtime_parts
from lspade_train.cli.parsing import command_parser, parse
from lspade_train.errors import TaskError
from lspade_train.io.progress import Progress

log = logging.getLogger(__name__)

PREDICT = """\
Answer questions with early exits: JSONL or plain lines in, JSONL out, in input order.
Each input line is a row in the task's format, such as {"question": ..., "choices": [...]}, and is
rendered as in training, with the recipe's template, solved examples and chat format. With --raw,
lines are {"prompt": ..., "choices": [...]} or text and are used as prompts unchanged.
Other keys are copied to the output. Rows need no answer; if they have one, accuracy is printed.
--audit 0.02 also runs the full model on 2% of the rows and raises an alarm if the answers differ
more often than allowed.
The policy is policy.json beside the heads; without one, --threshold sets an entropy in nats.

  lspade-train predict --config arc --input questions.jsonl --output answers.jsonl
  echo '{"question": "Iron is a", "choices": ["metal", "gas"]}' | lspade-train predict --config arc
  echo "The capital of France is" | lspade-train predict --config arc --raw --threshold 0.5"""


def predict(arguments: list[str]) -> int:
    """Answer questions; 1 if every line failed."""
    parser = command_parser("predict", PREDICT)
    heads_option(parser)
    add = parser.add_argument
    add("--input", type=str, default="-", help="JSONL or text file; - reads standard input")
    add("--output", type=str, default="-", help="JSONL file; - writes standard output")
    add("--raw", type=bool, default=False, nargs="?", const=True, help="use lines unchanged")
    add(
        "--threshold", type=float | None, default=None,
        help="entropy in nats, in place of policy.json",
    )  # fmt: skip
    add(
        "--audit", type=float | None, default=None,
        help="fraction of the rows, such as 0.02, on which the full model is run, too; an alarm is "
        "raised if it disagrees more often than the budget allows",
    )  # fmt: skip
    add(
        "--audit_budget", type=float | None, default=None,
        help="largest disagreement without an alarm; default: from the policy",
    )  # fmt: skip
    add(
        "--audit_state", type=str | None, default=None,
        help="JSON file for the audit's state, which several processes can share; default: "
        "audit.json beside the heads",
    )  # fmt: skip
    add("--on_alarm", type=str, default="warn", help="warn, or never_exit: the full model answers")
    add("--resume", type=bool, default=False, nargs="?", const=True, help="keep existing answers")
    parsed = parse(parser, arguments, early=find_heads)

    options, data = parsed.options, parsed.recipe.data
    output, source = Path(options.output).expanduser(), Path(options.input).expanduser()
    if options.output != "-":
        _require_output(output)
    if options.input != "-" and not source.is_file():
        raise TaskError(f"No input file {options.input}. Give a JSONL or text file with --input.")
    if "-" not in (options.input, options.output) and output.exists() and output.samefile(source):
        raise TaskError(
            f"--output {options.output} is the input itself, which would be overwritten. Give "
            "another file with --output."
        )
    folder = heads_given(parsed)

    from lspade_train.policies.policy import ExitPolicy
    from lspade_train.runtime import ExitRuntime
    from lspade_train.runtime.predict import RawPrompts, predict_lines
    from lspade_train.tasks.asking import Asker

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
    if policy.exit_groups is not None:
        log.info(
            "policy: early exit is disabled for all groups except %s",
            ", ".join(policy.exit_groups) or "none",
        )
    audit = _audit(options, folder, parsed.recipe.seed_everything)
    runtime = ExitRuntime(adapter, heads, policy=policy, tokenizer=tokenizer, audit=audit)
    ask = RawPrompts() if options.raw else Asker(data, tokenizer, _fitted_prefix(heads))
    done = 0
    if options.resume and options.output != "-" and output.exists():
        done = _keep_whole_lines(output)
    count = Counts()
    with _lines(options.input) as lines, _progress(options) as progress:
        progress.skip(done)
        answers = progress.counted(predict_lines(runtime, lines, ask=ask, done=done))
        if options.output == "-":
            _write(answers, sys.stdout, count)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a" if done else "w", encoding="utf-8") as file:
                _write(answers, file, count)
    code = count.report()
    _tell_shift(policy.calibration, count)
    if runtime.auditor is not None:
        runtime.auditor.flush()
        log.info("audit: %s (lspade-train audit shows it)", runtime.auditor.file.path)
    return code


def _audit(options: Any, folder: Path, seed: int) -> Any:
    """The requested audit, or None."""
    from lspade_train.errors import AuditError
    from lspade_train.io.remote import is_remote
    from lspade_train.policies.audit import STATE
    from lspade_train.runtime.audit import Audit

    if options.audit is None:
        if options.audit_budget is not None or options.audit_state is not None:
            raise AuditError("There is no audit to set up. Give its rate, such as --audit 0.02.")
        return None
    if options.audit_state is None and is_remote(str(options.heads)):
        raise AuditError(
            f"{options.heads} is not on this machine, and the audit's state must be.\n"
            "Give a file with --audit_state."
        )
    return Audit(
        rate=options.audit,
        budget=options.audit_budget,
        state=options.audit_state or folder / STATE,
        on_alarm=options.on_alarm,
        seed=seed,
    )


def _tell_shift(record: dict[str, Any], count: "Counts") -> None:
    """Warn if this run's rows exit at other layers than the calibration rows did."""
    from lspade_train.policies.shift import LEVEL, calibrated_exits, shift_p_value

    before = calibrated_exits(record)
    p_value = shift_p_value(before, count.layers)
    if p_value is None or p_value >= LEVEL:
        return

    def mean(counts: Mapping[int, int]) -> str:
        rows = sum(counts.values())
        layer = sum(layer * count for layer, count in counts.items()) / rows
        return f"mean exit layer {layer:.2f} over {rows:,} rows"

    log.warning(
        "warning: exit layers differ from calibration (%s; there %s; p = %.1g). "
        "The guarantee may not hold for these prompts.",
        mean(count.layers), mean(before), p_value,
    )  # fmt: skip


def _fitted_prefix(heads: Any) -> str | None:
    """Text before the answers that the heads were fitted with; None if they do not record it."""
    training: dict[str, Any] = heads.metadata.get("training", {})
    return training.get("data", {}).get("answer_prefix")


@dataclass
class Counts:
    """Statistics of a run's answers."""

    lines: int = 0
    failed: int = 0
    exited: int = 0
    labelled: int = 0
    correct: int = 0
    first_error: str = ""
    layers: Counter[int] = field(default_factory=Counter[int])

    def add(self, answer: dict[str, Any]) -> None:
        """Count one output line."""
        self.lines += 1
        if "error" in answer:
            self.failed += 1
            self.first_error = self.first_error or f"line {answer['line']}: {answer['error']}"
            return
        self.exited += answer["exited"]
        self.layers.update(answer.get("steps", [answer["layer"]]))  # counted as in calibrate
        self.labelled += "correct" in answer
        self.correct += answer.get("correct", False)

    def report(self) -> int:
        """Print the statistics on standard error; returns the exit code."""
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


def _progress(options: Any) -> Progress:
    """Progress, shown unless answers are printed; the total is known if the input is a file."""
    total = None
    if options.input != "-":
        with _lines(options.input) as lines:
            total = sum(1 for line in lines if line.strip())
    to_terminal = options.output == "-" and sys.stdout.isatty()
    return Progress(None if to_terminal else "predict", total)


@contextmanager
def _lines(name: str) -> Generator[Iterable[str]]:
    """The input's lines; undecodable bytes in one do not affect the others."""
    from lspade_train.io.text import lines_of

    if name != "-":
        with Path(name).expanduser().open("rb") as file:
            yield lines_of(file)
        return
    binary = getattr(sys.stdin, "buffer", None)
    yield sys.stdin if binary is None else lines_of(binary)


def _require_output(path: Path) -> None:
    """Refuse an output that cannot be written, before the model is loaded."""
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
    """Remove an incomplete last line, and count the remaining answers."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))  # in place, so nothing is lost if killed here
    return whole.count(b"\n")
