"""Calibration and evaluation text, from where it lies to token ids.

Read in this order: `sources` (name -> corpus), `rows` (files and dataset rows -> documents), `render` (document -> token
ids), `samples` (token ids -> windows or documents), `tokens` (the result), `evaluation` (the same for held-out text).
Nothing here is cached: tokenising is exact and cheap to repeat.
"""
