"""The notebooks in reading order: tutorials, the floors of the library from the lowest up, benchmarks, pages."""
import os
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PACKAGES = ("data", "runs", "model", "compute", "views", "recipes", "panels")  # the floors, from the lowest up
DOORS = ("notebooks", "cli", "all")  # modules that stand above all packages


def is_door(path: str | Path) -> bool:
    "Whether a notebook or a page belongs to a module that stands above all packages"
    return re.sub(r"^\d+_", "", Path(path).stem) in DOORS


def parts() -> dict[str, list[Path]]:
    "Notebooks by the part of the reading order they belong to, all but index.ipynb"
    def inside(folder): return sorted((NBS / folder).glob("*.ipynb"))
    own = [path for path in inside(".") if path.name != "index.ipynb"]
    return {
        "tutorials": inside("tutorials"),
        "ground": [path for path in own if not is_door(path)],
        **{name: inside(name) for name in PACKAGES},
        "doors": [path for path in own if is_door(path)],
        "benchmarks": inside("benchmarks"),
        "docs": inside("docs"),
    }


def reading_order() -> list[Path]:
    "All notebooks but index.ipynb, in the order in which they are read"
    return [path for part in parts().values() for path in part]


def opening(notebook: Path) -> tuple[str, str]:
    "A notebook's title up to a colon, and the quoted line below it"
    cells = nbformat.read(notebook, as_version=4).cells
    first = next(cell.source for cell in cells if cell.cell_type == "markdown")
    found = re.match(r"# ([^:\n]+).*\n+> (.+)", first)
    if not found: raise ValueError(f"{notebook} does not open with `# Title` and a quoted line, `> What it teaches.`")
    return found[1].strip(), found[2].strip()


def table(part: str, folder: Path) -> str:
    "Markdown table of a part's notebooks, with links as seen from a notebook in `folder`"
    rows = ["| notebook | what it teaches |", "|---|---|"]
    for path in parts()[part]:
        title, teaches = opening(path)
        rows.append(f"| [{title}]({Path(os.path.relpath(path, folder)).as_posix()}) | {teaches} |")
    return "\n".join(rows)
