"""`import marlin_tools.transformers`: from then on transformers loads our formats packed, as `serving/transformers.py` says."""

from marlin_tools.backends import load
from marlin_tools.serving.transformers import register, unregister

__all__ = ["load", "register", "unregister"]

register()
