"""The notebooks in reading order: tutorials, the floors of the library from the ground up, benchmarks."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PACKAGES = ("data", "runs", "model", "compute", "views", "recipes", "panels")  # the floors between the ground and the doors


def parts() -> dict[str, list[Path]]:
    "Notebooks by the part of the reading order they belong to, all but index.ipynb"
    own = sorted(p for p in NBS.glob("*.ipynb") if p.name != "index.ipynb")
    ground, doors = [p for p in own if p.name < "9"], [p for p in own if p.name >= "9"]
    inside = lambda folder: sorted((NBS / folder).glob("*.ipynb"))
    return dict(tutorials=inside("tutorials"), ground=ground) | {name: inside(name) for name in PACKAGES} | dict(doors=doors, benchmarks=inside("benchmarks"))


def reading_order() -> list[Path]:
    "All notebooks but index.ipynb, in the order in which they are read"
    return [path for part in parts().values() for path in part]
