"""What `doctor` says of vLLM: whether it will find the plugin, and if not, why."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from marlin_tools.serving import vllm as plugin
from marlin_tools.verification import doctor


@pytest.fixture
def installed(monkeypatch):
    """VLLM 0.33.0 beside us, with our entry point."""
    monkeypatch.setattr(plugin, "version", lambda _: "0.33.0")
    monkeypatch.setattr(plugin, "entry_points", lambda group: [SimpleNamespace(name="marlin_tools")])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("MARLIN_TOOLS_VLLM", raising=False)


def test_it_is_seen(installed):
    assert plugin.seen() == ("vLLM 0.33.0 loads the plugin", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("VLLM_PLUGINS", "other", "does not name"), ("MARLIN_TOOLS_VLLM", "0", "turns the plugin off")],
)
def test_a_variable_keeps_it_out(monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    found, obstacle = plugin.seen()

    assert found == "vLLM 0.33.0"
    assert reason in obstacle


@pytest.mark.usefixtures("installed")
def test_an_installation_without_entry_points_is_said(monkeypatch):
    monkeypatch.setattr(plugin, "entry_points", lambda group: [])
    (fact,) = doctor._serving()

    assert (fact.name, fact.status) == ("vllm", "note")
    assert "install marlin-tools again" in fact.hint


def test_without_vllm_all_is_well(monkeypatch):
    def absent(_):
        raise PackageNotFoundError

    monkeypatch.setattr(plugin, "version", absent)
    (fact,) = doctor._serving()

    assert (fact.value, fact.status) == ("vLLM is not installed", "ok")


def test_the_entry_point_names_what_there_is():
    import tomllib
    from importlib import import_module
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"][plugin.GROUP]
    module, function = points[plugin.NAME].split(":")

    assert getattr(import_module(module), function) is plugin.register
