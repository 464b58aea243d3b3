"""`import marlin_tools as mt`: every public name is there, loads when first used, and is the real thing."""

import importlib

import pytest
import torch

import marlin_tools as mt


@pytest.mark.parametrize("name", sorted(mt.__all__))
def test_name_resolves(name):
    found = getattr(mt, name)

    assert found.__doc__
    assert name in dir(mt)
    assert found is getattr(importlib.import_module(found.__module__), name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'marlin_tools' has no attribute 'quantise'"):
        getattr(mt, "quantise")  # noqa: B009


def test_version_is_a_plain_release():
    assert all(part.isdecimal() for part in mt.__version__.split("."))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: mt.quantize("demo", "demo", mt.QuantizeSettings(), out),
        lambda out: mt.quantize("demo", torch.zeros(2, 8, dtype=torch.int64), mt.QuantizeSettings(), out),
        lambda out: mt.quantize("demo", None, {"preset": "rtn"}, out),
        lambda out: mt.prune("demo", None, mt.QuantizeSettings(), out),
        lambda out: mt.finetune("demo", [[1, 2]], mt.FinetuneSettings(teacher="demo"), out),
        lambda out: mt.finetune("demo", None, None, out),
        lambda _: mt.evaluate("demo", None),
        lambda _: mt.generate("demo", "Hello", {"max_new_tokens": 3}),
        lambda _: mt.calibrate(None, "demo"),
        lambda _: mt.calibrate("demo", None),
        lambda _: mt.calibrate("demo", 3),
        lambda _: mt.load("demo", backend=None),
        lambda _: mt.load("demo", device=None),
        lambda out: mt.export("demo", ["gptq", "marlin"], out),
        lambda out: mt.export("demo", None, out),
    ],
)
def test_misuse_is_a_type_error_that_says_what_is_wanted(wrong, tmp_path):
    with pytest.raises(
        TypeError, match=r"settings are `|tokens are a TokenSet|a source is|a model is|an? \w+ is a name, such as"
    ):
        wrong(tmp_path / "out")
    assert not list(tmp_path.iterdir())
