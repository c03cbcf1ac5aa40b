"""`calibrate` and `predict`: choose an exit policy, and answer prompts with it."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lspade_train.cli.parsing import Parsed, command_parser, parse

log = logging.getLogger(__name__)

CALIBRATE = """\
Choose the exit policy that saves the most compute while the risk stays within your budget, with a
distribution-free guarantee (Learn then Test, arXiv:2110.01052). Writes policy.json beside the
heads and prints the trade-off. Where nothing qualifies the policy is: never exit.

  lspade-train calibrate --config recipes/arc.yaml --max_accuracy_drop 0.01
  lspade-train calibrate --config recipes/arc.yaml --max_disagreement 0.02   (needs no labels)"""

PREDICT = """\
Answer prompts with early exits: JSONL or plain lines in, JSONL out, in input order.
A line is {"prompt": ..., "choices": [...]} (further keys are echoed) or a prompt as it stands.
The policy is policy.json beside the heads; without one, --threshold sets an entropy in nats.

  lspade-train predict --config recipes/arc.yaml --input prompts.jsonl --output answers.jsonl
  echo "The capital of France is" | lspade-train predict --config recipes/arc.yaml"""


def calibrate(arguments: list[str]) -> None:
    """Choose a policy on the validation split."""
    parser = command_parser("calibrate", CALIBRATE, with_trainer="--help" not in arguments)
    _heads_option(parser)
    add = parser.add_argument
    add("--max_accuracy_drop", type=float, default=None, help="budget, such as 0.01 for one point")
    add(
        "--max_disagreement", type=float, default=None, help="budget for answers unlike the model's"
    )
    add("--confidence", type=float, default=0.95, help="probability that the promise holds")
    add("--interval", type=int, default=1, help="check every n-th layer that has a head")
    add("--scope", type=str, default=None, help="vocabulary or choices; null: choices where given")
    parsed = parse(parser, arguments)

    from lspade_train.calibration import calibrate as choose
    from lspade_train.exits import evaluate_policy

    risk, budget = _budget(parsed.options)
    folder, heads, data = _model(parsed)
    table, policy = _exit_table(parsed, heads, data)
    result = choose([(table, table.grid())], risk, budget, parsed.options.confidence)
    chosen = result.chosen
    _print_curve(result, evaluate_policy(table, None))
    threshold = chosen.threshold
    policy = _replace(policy, threshold=threshold, calibration=result.to_json())
    policy.save(folder)
    sys.stdout.write(f"{result.reason}\n")
    log.info("policy: %s", folder / "policy.json")


def predict(arguments: list[str]) -> None:
    """Answer prompts."""
    parser = command_parser("predict", PREDICT)
    _heads_option(parser)
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
    if options.input != "-" and not Path(options.input).is_file():
        raise TaskError(f"No input file {options.input}. Give a JSONL or text file with --input.")
    folder, heads, adapter = _runtime_model(parsed)
    policy = (
        ExitPolicy.load(folder / "policy.json")
        if options.threshold is None
        else ExitPolicy(
            layers=heads.layers, threshold=options.threshold, positions=recipe.data.positions
        )
    )
    tokenizer = load_tokenizer(recipe.data.model_id, revision=recipe.data.revision)
    runtime = ExitRuntime(adapter, heads, policy=policy, tokenizer=tokenizer)
    output = Path(options.output)
    done = 0
    if options.resume and options.output != "-" and output.exists():
        done = _keep_whole_lines(output)
    with _lines(options.input) as lines:
        answers = predict_lines(runtime, lines, done=done)
        if options.output == "-":
            _write(answers, sys.stdout)
        else:
            with output.open("a" if done else "w", encoding="utf-8") as file:
                _write(answers, file)


def _heads_option(parser: Any) -> None:
    parser.add_argument(
        "--heads", type=str, default=None, help="heads folder; null: checkpoints/NAME"
    )


def _budget(options: Any) -> tuple[Any, float]:
    from lspade_train.errors import PolicyError

    drop, disagreement = options.max_accuracy_drop, options.max_disagreement
    if drop is not None and disagreement is not None:
        raise PolicyError("Give one budget: --max_accuracy_drop or --max_disagreement, not both.")
    if disagreement is not None:
        return "disagreement", disagreement
    return "accuracy_drop", 0.01 if drop is None else drop


def _model(parsed: Parsed) -> tuple[Path, Any, Any]:
    from lspade_train.artifact import heads_folder
    from lspade_train.data import HiddenStateDataModule
    from lspade_train.heads import LSpadeHeads

    recipe = parsed.recipe
    folder = Path(parsed.options.heads) if parsed.options.heads else heads_folder(recipe)
    heads = LSpadeHeads.from_pretrained(folder)
    data = HiddenStateDataModule(
        recipe.data, recipe.model.layers, seed=recipe.seed_everything, name=recipe.name
    )
    return folder, heads.bind(data.adapter), data


def _runtime_model(parsed: Parsed) -> tuple[Path, Any, Any]:
    """The model without the data module: predict does not load Lightning."""
    from lspade_train.adapters import ModelAdapter
    from lspade_train.artifact import heads_folder
    from lspade_train.heads import LSpadeHeads

    recipe = parsed.recipe
    folder = Path(parsed.options.heads) if parsed.options.heads else heads_folder(recipe)
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
    return folder, heads, adapter


def _exit_table(parsed: Parsed, heads: Any, data: Any) -> tuple[Any, Any]:
    """Validation rows as the calibration wants them, and the policy but for its threshold."""
    from lspade_train.evaluation import exit_table
    from lspade_train.policy import ExitPolicy

    dataset = data.stored("validation")
    scope = parsed.options.scope
    if scope is None:
        scope = "choices" if dataset.shards[0]["choice_ids"].shape[1] else "vocabulary"
    layers = [layer for layer in data.layers if layer in heads.layers]
    interval = parsed.options.interval
    policy = ExitPolicy(
        layers=tuple(layers[interval - 1 :: interval]),
        scope=scope,
        positions=parsed.recipe.data.positions,
        heads_digest=heads.metadata["weights_sha256"],
    )
    return exit_table(dataset, data.adapter, heads, policy), policy


def _replace(policy: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(policy, **changes)


def _print_curve(result: Any, never: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "threshold", "accuracy", "drop", "disagreement", "mean exit", "FLOPs saved",
        "of oracle", "p-value", "",
        title=f"validation, n = {result.n:,}, oracle saves {result.oracle_saving:.1%}; *: chosen",
    )  # fmt: skip
    for row in _telling([never, *result.curve], result.chosen):
        chosen = row.threshold == result.chosen.threshold
        table.add_row(*_cells(row), "*" if chosen else "", style="bold" if chosen else "")
    Console(width=max(Console().width, 100)).print(table)


def _telling(curve: list[Any], chosen: Any) -> list[Any]:
    """Never, the chosen row, and those between that save a few points more than the last shown."""
    shown: list[Any] = []
    for row in curve:
        if not shown or row is chosen or row.compute_saved >= shown[-1].compute_saved + 0.03:
            shown.append(row)
    return shown


def _cells(row: Any) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    limit = row.threshold if not isinstance(row.threshold, tuple) else None
    return [
        "never" if row.threshold is None else number(limit, ".3f"),
        number(row.accuracy, ".3f"),
        number(row.drop, "+.3f"),
        number(row.disagreement, ".3f"),
        number(row.mean_exit_layer, ".2f"),
        number(row.compute_saved, ".1%"),
        number(row.efficiency, ".0%"),
        number(row.p_value, ".3f"),
    ]


def _lines(name: str) -> Any:
    from contextlib import nullcontext

    return nullcontext(sys.stdin) if name == "-" else Path(name).open(encoding="utf-8")


def _write(answers: Iterator[dict[str, Any]], file: Any) -> None:
    for answer in answers:
        file.write(json.dumps(answer) + "\n")
        file.flush()


def _keep_whole_lines(path: Path) -> int:
    """Cut a half-written last line off, and count the answers that stand."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return whole.count(b"\n")
