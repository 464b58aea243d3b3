"""Where the files that ship with the package lie, in a wheel and in a checkout alike."""

import os
import tempfile
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """`kernels/` and `recipes/` are top-level folders of a checkout and `_kernels`, `_recipes` inside the wheel."""
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else _PACKAGE.parent / name


def recipes_dir() -> Path:
    """The bundled recipes."""
    return _shipped("recipes")


def kernels_dir() -> Path:
    """The CUDA sources."""
    return _shipped("kernels")


def demo_dir() -> Path:
    """The embedded model with its calibration text and its tasks."""
    return _PACKAGE / "demo"


def cache_dir() -> Path:
    """Where small things are kept that can be made again: `marlin-tools` in the user's cache folder."""
    home = expanded("~")
    usual = home / ".cache" if home.is_absolute() else Path(tempfile.gettempdir())  # a user without a home
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "marlin-tools"


def expanded(name: str | Path) -> Path:
    """With `~` as the user's home; `~nobody`, who is unknown here, stays as it is, and nothing is found there."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def resolved(name: str | Path) -> Path:
    """Where that is, without links and `..`; links that lead in a circle stay as they are, and nothing is found there."""
    path = expanded(name)
    try:
        return path.resolve()
    except RuntimeError:  # of Python 3.11 and 3.12
        return path.absolute()


def is_file(name: str) -> bool:
    """Whether there is such a file; what is no name of a file may be longer than one can be."""
    try:
        return expanded(name).is_file()
    except OSError:
        return False
