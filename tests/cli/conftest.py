"""The command line in this process: `cli("quantize", "demo")` -> exit code, stdout, stderr, in a directory of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import marlin_tools.run.execute
import marlin_tools.run.plan
from marlin_tools.cli import main
from marlin_tools.recipe.recipe import Recipe


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return Outcome(exit_.value.code, *capsys.readouterr())

    return call


class Captured(NamedTuple):
    """What a verb asked of the engine."""

    recipe: Recipe
    out: Path | None
    options: dict[str, Any]


@pytest.fixture
def asked(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Captured]:
    """Run a verb with an engine that only notes what it is told."""
    calls: list[Any] = []

    def plan(recipe: Recipe, out: Path | None = None, *, dry: bool = False) -> marlin_tools.run.plan.Plan:
        calls[:] = [recipe, out, {}]
        return marlin_tools.run.plan.Plan(recipe, (), ())

    def execute(planned: Any, emit: Any, **options: Any) -> marlin_tools.run.execute.RunResult:
        calls[2] = options
        return marlin_tools.run.execute.RunResult()

    monkeypatch.setattr(marlin_tools.run.plan, "plan", plan)
    monkeypatch.setattr(marlin_tools.run.execute, "execute", execute)

    def call(*arguments: str | Path) -> Captured:
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
        return Captured(*calls)

    return call
