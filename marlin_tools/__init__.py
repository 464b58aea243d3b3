"""Accurate, verified, fast INT4 for Hugging Face causal language models.

The public names are few and load what they need when first used, so that `import marlin_tools` and `marlin-tools --help`
cost nothing. Read next: `quantized.py`, the one type that everything else makes, stores or multiplies with.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marlin_tools.backends import load
    from marlin_tools.checkpoint.reader import Checkpoint
    from marlin_tools.compress.export import export
    from marlin_tools.compress.prune import PruneSettings, prune
    from marlin_tools.compress.quantize import QuantizeSettings, quantize
    from marlin_tools.data.calibrate import calibrate
    from marlin_tools.data.tokens import TokenSet
    from marlin_tools.evaluation.evaluate import EvaluateSettings, evaluate
    from marlin_tools.evaluation.generate import GenerateSettings, generate
    from marlin_tools.quantized import QuantizedLinear
    from marlin_tools.recipe.recipe import Recipe
    from marlin_tools.training.finetune import FinetuneSettings, finetune
    from marlin_tools.verification.inspect import inspect
    from marlin_tools.verification.verify import verify

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "EvaluateSettings",
    "FinetuneSettings",
    "GenerateSettings",
    "PruneSettings",
    "QuantizeSettings",
    "QuantizedLinear",
    "Recipe",
    "TokenSet",
    "calibrate",
    "evaluate",
    "export",
    "finetune",
    "generate",
    "inspect",
    "load",
    "prune",
    "quantize",
    "verify",
]

_HOME = {
    "Checkpoint": "marlin_tools.checkpoint.reader",
    "EvaluateSettings": "marlin_tools.evaluation.evaluate",
    "FinetuneSettings": "marlin_tools.training.finetune",
    "GenerateSettings": "marlin_tools.evaluation.generate",
    "PruneSettings": "marlin_tools.compress.prune",
    "QuantizeSettings": "marlin_tools.compress.quantize",
    "QuantizedLinear": "marlin_tools.quantized",
    "Recipe": "marlin_tools.recipe.recipe",
    "TokenSet": "marlin_tools.data.tokens",
    "calibrate": "marlin_tools.data.calibrate",
    "evaluate": "marlin_tools.evaluation.evaluate",
    "export": "marlin_tools.compress.export",
    "finetune": "marlin_tools.training.finetune",
    "generate": "marlin_tools.evaluation.generate",
    "inspect": "marlin_tools.verification.inspect",
    "load": "marlin_tools.transformers",
    "prune": "marlin_tools.compress.prune",
    "quantize": "marlin_tools.compress.quantize",
    "verify": "marlin_tools.verification.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
