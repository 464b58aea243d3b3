"""Stages: plain functions from directories and tokens to directories, one module each, cached and chained by `run`."""
