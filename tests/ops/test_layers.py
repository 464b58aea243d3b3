"""Imports inside `ops`: none of its modules is reached again from what it imports."""

import graphlib

import grimp
import pytest


def circles(imports: dict[str, set[str]]) -> list[str]:
    """One circle of imports, or nothing."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def imports():
    graph = grimp.build_graph("marlin_tools", cache_dir=None)
    modules = {name for name in graph.modules if name.startswith("marlin_tools.ops")}
    return {name: graph.find_modules_directly_imported_by(name) & modules for name in modules}


def test_no_circle(imports):
    assert "marlin_tools.ops.runtime.driver" in imports["marlin_tools.ops.linear.operator"]
    assert circles(imports) == []


def test_a_circle_would_be_found(imports):
    back = {name: set(found) for name, found in imports.items()}
    back["marlin_tools.ops.runtime.driver"].add("marlin_tools.ops.linear.operator")
    assert "marlin_tools.ops.runtime.driver" in circles(back)
