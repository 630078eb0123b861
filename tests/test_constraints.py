"""The tested versions can be installed by every Python that the project is for."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w.-]+==", line)
)


def oldest() -> str:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    return re.fullmatch(r">=(\d+\.\d+)", said)[1] + ".0"


def test_no_version_wants_a_newer_python():
    """pip would look for another version, find none, and try combinations of all others for more than ten minutes
    before it says so: Debian 12 has 3.11.2"""
    refused = {}
    for name, version in PINNED.items():
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if about["Version"].partition("+")[0] == version.strip():
            wanted = about.get("Requires-Python") or ""
            if not SpecifierSet(wanted).contains(oldest()):
                refused[name] = wanted
    assert len(PINNED) > 200 and not refused


def test_everything_that_is_needed_has_a_version():
    "What is not pinned comes in its newest version, which nobody has tested"
    norm = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    pinned, missing, todo, seen = set(map(norm, PINNED)), set(), ["tinytrainer-nb[dev]"], set()
    while todo:
        whole = todo.pop()
        name, extras = norm(whole.split("[")[0]), set(re.findall(r"\[(.*)\]", whole)) or {""}
        if (name, *extras) in seen:
            continue
        seen.add((name, *extras))
        if name not in pinned and name not in ("tinytrainer-nb", "setuptools", "wheel", "pip"):
            missing.add(name)
        for need in map(requirement, needs_of(name)):
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras | {""}):
                todo += [f"{need.name}[{extra}]" for extra in need.extras] or [need.name]
    assert not missing


def needs_of(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []  # what it needs is not known here; that it is pinned is looked at all the same


def requirement(text: str):
    from packaging.requirements import Requirement

    return Requirement(text)
