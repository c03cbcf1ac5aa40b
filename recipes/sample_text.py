"""Sample a corpus from a model itself, as a folder for the `text` task.

This way heads can be trained without any data of your own, on the kind of text that the model
generates. Then:

    lspade-train fit --config recipes/text.yaml --data.model_id MODEL --data.dataset OUTPUT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, AutoTokenizer


def sample_text(
    model: str,
    output: Path,
    *,
    texts: int = 192,
    held_out: int = 42,
    tokens: int = 160,
    batch_size: int = 32,
    seed: int = 0,
) -> None:
    """Write `train.jsonl` and `validation.jsonl` of texts sampled from BOS at temperature 1.

    Args:
        model: Hub id or folder.
        output: folder to write; created if missing.
        texts: total number of texts to sample.
        held_out: how many of them, the last ones, make the validation split.
        tokens: tokens per text, including BOS.
        batch_size: texts sampled at a time.
        seed: seed of the sampling.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0
    rows: list[str] = []
    while len(rows) < texts:
        ids = network.generate(
            torch.full((batch_size, 1), start),
            attention_mask=torch.ones(batch_size, 1, dtype=torch.long),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens - 1,
            min_new_tokens=tokens - 1,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        rows += tokenizer.batch_decode(ids, skip_special_tokens=True)
    output.mkdir(parents=True, exist_ok=True)
    rows = rows[:texts]
    parts = {"train": rows[: texts - held_out], "validation": rows[texts - held_out :]}
    for split, part in parts.items():
        lines = "".join(json.dumps({"text": row}) + "\n" for row in part)
        (output / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        sys.stdout.write(f"{output / f'{split}.jsonl'}: {len(part)} texts\n")


if __name__ == "__main__":
    auto_cli(sample_text)
