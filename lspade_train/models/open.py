"""Opens the model and tokenizer of a recipe: the only place that passes its settings on.

Independent of what they are used for.
"""

from transformers import PreTrainedTokenizerBase

from lspade_train.models.adapter import ModelAdapter
from lspade_train.models.loading import hub_commit
from lspade_train.models.tokenizer import load_tokenizer
from lspade_train.recipe import DataConfig


def open_model(config: DataConfig) -> tuple[ModelAdapter, PreTrainedTokenizerBase]:
    """The frozen model, checked, and its tokenizer, of the same revision.

    `data.compile` is for the commands that build or read states and is not applied here.

    Args:
        config: names the model and how it is loaded.

    Raises:
        UnsupportedModelError: no model or tokenizer can be loaded, or the model fails the check.
        RecipeError: the device or the quantisation cannot be used here.
    """
    revision = resolved_revision(config)
    adapter = open_adapter(config, revision, device=config.device)
    return adapter, open_tokenizer(config, revision)


def resolved_revision(config: DataConfig) -> str | None:
    """The commit on the Hub that `data.revision` currently resolves to; unchanged for a folder."""
    commit = hub_commit(config.model_id, config.revision, gguf_file=config.gguf_file)
    return commit or config.revision


def open_adapter(
    config: DataConfig,
    revision: str | None,
    *,
    device: str,
    check: bool = True,
    compile: bool = False,
) -> ModelAdapter:
    """The frozen model.

    Args:
        config: names the model and how it is loaded.
        revision: the resolved revision.
        device: device to use instead of `config.device`, as a trainer may choose it.
        check: run the load-time check now.
        compile: run the blocks through `torch.compile`.

    Raises:
        UnsupportedModelError: no model can be loaded, or it fails the check.
        RecipeError: the device or the quantisation cannot be used here.
    """
    return ModelAdapter.from_pretrained(
        config.model_id,
        revision=revision,
        dtype=config.dtype,
        device=device,
        device_map=config.device_map,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
        gguf_file=config.gguf_file,
        check=check,
        compile=compile,
    )


def open_tokenizer(config: DataConfig, revision: str | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        config: names the model.
        revision: the model's resolved revision.

    Raises:
        UnsupportedModelError: there is none.
    """
    return load_tokenizer(
        config.model_id,
        revision=revision,
        trust_remote_code=config.trust_remote_code,
        gguf_file=config.gguf_file,
    )
