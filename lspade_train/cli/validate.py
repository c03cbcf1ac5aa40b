"""`validate`: metrics of fitted heads on the validation split (`test` does the same on test)."""

from functools import partial

from lspade_train.cli.options import find_heads, heads_option
from lspade_train.cli.parsing import command_parser, parse, refusals_named

CHECK = "Loss, KL, agreement and accuracy by layer of fitted heads on the {split} split."


def validate(arguments: list[str]) -> None:
    """Metrics on the validation split."""
    check_split("validate", "validation", arguments)


def check_split(command: str, split: str, arguments: list[str]) -> None:
    """Run Lightning's `command` on `split` with the given heads."""
    parser = command_parser(command, CHECK.format(split=split), with_trainer=True)
    heads_option(parser)
    parsed = parse(parser, arguments, early=partial(find_heads, tuned_lens=True))

    from lspade_train.cli.ending import print_by_layer
    from lspade_train.cli.trainer import (
        early_end_named,
        open_loggers,
        open_modules,
        open_trainer,
    )
    from lspade_train.io.layout import TUNED_LENS
    from lspade_train.io.parallel import ranks
    from lspade_train.probes.heads import LSpadeHeads, check_same_model
    from lspade_train.recipe import heads_folder
    from lspade_train.tasks import evaluation_split

    folder = heads_folder(parsed.recipe)
    if parsed.recipe.model.target == "final":
        folder /= TUNED_LENS
    heads = LSpadeHeads.from_pretrained(parsed.options.heads or folder)
    module, data = open_modules(parsed, heads)
    check_same_model(heads.metadata.get("base_model", {}), data.frozen.facts.identity)
    with refusals_named():
        trainer = open_trainer(parsed, open_loggers(parsed, folder), [])
        with early_end_named(trainer, "Run the same command again."):
            (metrics,) = getattr(trainer, command)(module, data, verbose=False)
    if not ranks()[0]:
        measured = evaluation_split(parsed.recipe.data) if split == "test" else split
        rows = len(data.states(measured))
        title = f"{parsed.recipe.name}: {measured} split, {rows:,} rows"
        print_by_layer(metrics, parsed.recipe.model.targets, title, loss=True)
