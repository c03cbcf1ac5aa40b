"""Makes `lm_eval --model lspade` work with harness releases that look for no plug-ins.

Newer releases of the LM Evaluation Harness read the entry points of the group `lm_eval.models`,
where this package names `lspade`. Up to 0.4.13 none are read, and only what was imported is in
the registry. But its command line imports torch before it asks the registry for a model, and
torch loads the entry points of the group `torch.backends`: this one. Goes when 0.4 does.
"""

import importlib
import sys

MODEL = "lspade"
TARGET = "lspade_train.harness:LSpadeLM"


def register() -> None:
    """Put the model's name into the harness's registry, where the harness is what imports torch.

    Anywhere else this does nothing: it runs with every `import torch`, and loads nothing then.
    """
    if "lm_eval" not in sys.modules:
        return
    from lm_eval.api.registry import model_registry

    importlib.import_module("lm_eval.models")  # its own names first: it fills only an empty one
    if MODEL not in model_registry:
        model_registry.register(MODEL, target=TARGET)
