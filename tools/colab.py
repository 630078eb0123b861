"""Badges, Colab's install cells and repository addresses in the notebooks, made from settings.ini.

`python tools/colab.py` writes them, `--check` only says which notebooks are stale.
Every tutorial opens with a badge, and its first code cell installs the project in Colab."""
import configparser
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com"


def settings(root: Path = ROOT) -> configparser.SectionProxy:
    "What settings.ini says, as a mapping"
    config = configparser.ConfigParser()
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def badge(notebook: str, s) -> str:
    "Markdown of the badge that opens `notebook` (a path in the repository) in Colab"
    address = f"{COLAB}/github/{s['user']}/{s['repo']}/blob/{s['branch']}/{notebook}"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({address})"


def install_cell(s) -> str:
    "Source of the cell that installs the project in Colab; the data travel with the clone, and Colab's torch is pinned"
    return f"""import sys

if "google.colab" in sys.modules:  # in Colab: fetch and install the project, and keep the torch that is there
    from importlib.metadata import version
    get_ipython().system("git clone -q --depth 1 --branch {s['branch']} {s['git_url']}")
    get_ipython().run_line_magic("pip", f"install -q -e ./{s['repo']} torch=={{version('torch')}}")
    sys.path.insert(0, "{s['repo']}")"""


def relink(source: str, s) -> str:
    "`source` with the clone address, and Colab links into the project, brought up to date"
    source = re.sub(r"git clone https://github\.com/[\w.-]+/[\w.-]*\w && cd [\w.-]+",
                    f"git clone {s['git_url']} && cd {s['repo']}", source)
    return re.sub(rf"{COLAB}/github/[^/\s]+/[^/\s]+/blob/[^/\s]+/nbs/",
                  f"{COLAB}/github/{s['user']}/{s['repo']}/blob/{s['branch']}/nbs/", source)


def add_opening(cells: list, notebook: str, s) -> None:
    "Set, or put in after the title, a tutorial's badge and its install cell"
    mine = badge(notebook, s)
    at = next((i for i, c in enumerate(cells) if c.cell_type == "markdown" and "colab-badge.svg" in c.source), None)
    if at is None: cells.insert(at := 1, nbformat.v4.new_markdown_cell(mine, id="colab-badge"))
    else: cells[at].source = mine
    first = next((c for c in cells if c.cell_type == "code"), None)
    if first is not None and '"google.colab" in sys.modules' in first.source: first.source = install_cell(s)
    else: cells.insert(at + 1, nbformat.v4.new_code_cell(install_cell(s), id="colab-install"))


def update(path: Path, s, write: bool) -> bool:
    "Bring one notebook up to date; True if something was stale"
    nb = nbformat.read(path, as_version=4)
    before = [(c.cell_type, c.source) for c in nb.cells]
    if path.parent.name == "tutorials": add_opening(nb.cells, path.relative_to(path.parents[2]).as_posix(), s)
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = relink(cell.source, s)
    stale = before != [(c.cell_type, c.source) for c in nb.cells]
    if stale and write: nbformat.write(nb, path)
    return stale


def main(root: Path = ROOT, check: bool = False) -> list[str]:
    "Notebooks that were stale, brought up to date unless `check`"
    paths = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    return [p.relative_to(root).as_posix() for p in paths if update(p, settings(root), write=not check)]


if __name__ == "__main__":
    stale = main(check="--check" in sys.argv[1:])
    for name in stale: print(name, "is stale" if "--check" in sys.argv[1:] else "written")
    sys.exit(bool(stale) and "--check" in sys.argv[1:])
