"""Calibration and evaluation text, from where it lies to token ids.

Read in this order: `sources` (name -> corpus), `rows` (files and dataset rows -> documents), `render` (document -> token
ids), `samples` (token ids -> windows or documents), `tokens` (the result), `evaluation` (the same for held-out text).
Nothing here is cached: tokenising is exact and cheap to repeat.
"""

from marlin_tools.data.evaluation import evaluation_documents, load_text
from marlin_tools.data.sources import SOURCES, Corpus, find_corpus
from marlin_tools.data.tokens import TokenSet

__all__ = ["SOURCES", "Corpus", "TokenSet", "evaluation_documents", "find_corpus", "load_text"]
