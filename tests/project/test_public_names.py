"""`import marlin_tools as mt`: every public name is there, loads when first used, and is the real thing."""

import importlib

import pytest

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
