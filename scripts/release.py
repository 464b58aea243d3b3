"""Check that this tree is a release, build it into dist/, and print the text of its tag. Nothing is tagged or published.

    make release

In this order: the version of the package is the one of CITATION.cff and has its dated entry in CHANGELOG.md; the tree is clean
and the version has no tag yet; wheel and source archive are built; the wheel holds every file of the package, the kernels and
the recipes, and nothing else.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSIDE = {"marlin_tools/": "marlin_tools/", "kernels/": "marlin_tools/_kernels/", "recipes/": "marlin_tools/_recipes/"}
"""Folders of the tree, and where the wheel has them."""


class NotAReleaseError(Exception):
    """What has to be mended first."""


def main(root: Path = ROOT) -> int:
    """All checks, the build, the tag; 1 with one line where something is missing."""
    try:
        version = version_of(root)
        entry = entry_of(root, version)
        check_tree(root, version)
        wheel, archive = build(root, version)
    except NotAReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"built {wheel.relative_to(root)} ({wheel.stat().st_size / 1e6:.1f} MB)\nbuilt {archive.relative_to(root)}",
        file=sys.stderr,
    )
    print(f"the tag, for `git tag -a v{version} --cleanup=verbatim -F -`:\n", file=sys.stderr)
    print(f"marlin-tools {version}\n\n{entry}")
    return 0


def version_of(root: Path) -> str:
    """The version of the package, which CITATION.cff repeats."""
    found = re.search(
        r'^__version__ = "(.+)"$', (root / "marlin_tools" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None or not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", found[1]):
        raise NotAReleaseError("marlin_tools/__init__.py: `__version__` is no version of the form 1.2.3 or 1.2.3rc1")
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1] != found[1]:
        raise NotAReleaseError(f"CITATION.cff: the version is not {found[1]}")
    return found[1]


def entry_of(root: Path, version: str) -> str:
    """What CHANGELOG.md says of this version, which has to be its first entry and dated."""
    _, *entries = re.split(r"^## ", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    title, _, text = (entries[0] if entries else "").partition("\n")
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", title):
        raise NotAReleaseError(f"CHANGELOG.md: the first entry is `{title}`, not `{version} (YYYY-MM-DD)`")
    if not text.strip():
        raise NotAReleaseError(f"CHANGELOG.md: nothing is said of {version}")
    return text.strip()


def check_tree(root: Path, version: str) -> None:
    """Everything is committed, and nobody has released this version yet."""
    if changed := _git(root, "status", "--porcelain"):
        raise NotAReleaseError(f"the tree is not clean: {changed.splitlines()[0].strip()}")
    if _git(root, "tag", "--list", f"v{version}"):
        raise NotAReleaseError(f"there is a tag v{version} already: raise `__version__`")


def tracked(root: Path) -> set[str]:
    """The names that the wheel has for the files of the package, of the kernels and of the recipes."""
    names = _git(root, "ls-files").splitlines()
    return {inside + name.removeprefix(top) for name in names for top, inside in INSIDE.items() if name.startswith(top)}


def build(root: Path, version: str) -> tuple[Path, Path]:
    """Wheel and source archive in dist/, which replace those of the same version: built aside, moved when they are right."""
    target = root / "dist"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as aside:
        for kind in ("wheel", "sdist"):
            command = (sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", aside)
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotAReleaseError(f"the build failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        names = f"marlin_tools-{version}-py3-none-any.whl", f"marlin_tools-{version}.tar.gz"
        check_wheel(Path(aside) / names[0], tracked(root), version)
        wheel, archive = ((Path(aside) / name).replace(target / name) for name in names)
    return wheel, archive


def check_wheel(wheel: Path, expected: set[str], version: str) -> None:
    """It holds what is expected and its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if not name.startswith(f"marlin_tools-{version}.dist-info/")}
    if lacking := expected - there:
        raise NotAReleaseError(f"{wheel.name} lacks `{min(lacking)}`")
    if strange := there - expected:
        raise NotAReleaseError(f"{wheel.name} holds `{min(strange)}`, which is not in the tree")


def _git(root: Path, *words: str) -> str:
    return subprocess.run(("git", *words), cwd=root, capture_output=True, text=True, check=True).stdout.rstrip()


if __name__ == "__main__":
    sys.exit(main())
