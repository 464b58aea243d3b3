"""The bundled CUDA kernels: `kernels list` and `kernels build`, which need no GPU."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from marlin_tools.cli import ui
from marlin_tools.cli.complete import list_of, one_of
from marlin_tools.cli.options import PLAIN, Json, destination, option
from marlin_tools.cli.perform import words
from marlin_tools.errors import DeviceError, OutputError, RecipeError

kernels = typer.Typer(help="The bundled CUDA kernels.", **PLAIN)

ARCHITECTURES = "sm_80,sm_86,sm_89,sm_90a"


@kernels.command(name="list")
def list_kernels(
    arch: Annotated[
        str | None, option(of="A", text=f"Only those for one of {ARCHITECTURES}.", words=one_of(ARCHITECTURES.split(",")))
    ] = None,
    json: Json = False,
) -> int:
    """Name every kernel and what it is for."""
    from marlin_tools import ops, report
    from marlin_tools.ops.catalog import PURPOSES

    members: dict[str, list[str]] = {}
    for family, kernel in ops.kernels(_known(arch)[0] if arch is not None else None):
        members.setdefault(family, []).append(kernel.name)
    if json:
        ui.write_json({family: {"purpose": PURPOSES[family], "kernels": names} for family, names in members.items()})
        return 0
    rows = [
        (family, str(len(names)), PURPOSES[family], ", ".join(names[:3]) + ", ..." * (len(names) > 3))
        for family, names in members.items()
    ]
    ui.write(report.table(("family", "kernels", "for", "names"), rows))
    return 0


@kernels.command(name="build")
def build_kernels(
    arch: Annotated[
        str,
        option(of="A,...", text=f"Any of {ARCHITECTURES}; all of them if left out.", words=list_of(ARCHITECTURES.split(","))),
    ] = ARCHITECTURES,
    output: Annotated[Path | None, destination("DIR", "The cache to fill, instead of this user's.")] = None,
    json: Json = False,
) -> int:
    """Compile every kernel now, so that no run has to.

    Copy the cache to where no compiler is, and point MARLIN_TOOLS_CACHE at it.
    """
    from marlin_tools import ops, report
    from marlin_tools.checkpoint.output import ELSEWHERE, explained
    from marlin_tools.events import Event
    from marlin_tools.ops.runtime.cubin_cache import CubinCache

    targets = _known(arch)
    if output is not None and (not output.name or output.name == ".."):  # `.` is also what an empty name becomes
        raise OutputError(f"`{output}` is no name for a cache", hint="give it a directory of its own: `-o DIR`")
    cache = CubinCache(output)
    if reason := cache.obstacle():
        raise DeviceError(f"cannot write `{cache.folder}`: {reason}", hint=ELSEWHERE)
    total = sum(len(ops.kernels(target)) for target in targets)
    built = []
    with ui.Display() as display:
        for done in ops.build(targets, cache):
            if cache.refused:
                raise explained(cache.refused, cache.folder)
            built.append(done)
            display(Event("progress", "compiling", len(built), total, {"kernel": done.kernel, "target": done.target}))
    if json:
        ui.write_json({"cache": str(cache.folder), "kernels": [asdict(each) for each in built]})
        return 0
    rows = []
    for target in targets:
        mine = [each for each in built if each.target == target]
        registers = max(each.resources.registers for each in mine)
        fresh = sum(not each.cached for each in mine)
        rows.append((target, str(len(mine)), str(fresh), str(registers), str(sum(each.resources.spill_bytes for each in mine))))
    ui.write(report.table(("target", "kernels", "compiled now", "most registers", "spilled bytes"), rows))
    ui.note(f"they are in `{cache.folder}`")
    return 0


def _known(text: str) -> tuple[str, ...]:
    from marlin_tools.ops import TARGETS

    asked = tuple(dict.fromkeys(words(text) or ()))
    for target in asked:
        if target not in TARGETS:
            raise RecipeError(f"--arch: no kernels are made for `{target}`", hint=f"there are: {', '.join(TARGETS)}")
    if not asked:
        raise RecipeError("--arch: no architecture is named", hint=f"there are: {', '.join(TARGETS)}")
    return asked
