"""README.md from nbs/index.ipynb, by nbconvert.

`python tools/readme.py` writes it, `--check` compares and shows the difference."""
import difflib
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
IMAGES = "nbs/images/index"  # pictures among index.ipynb's outputs
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|#|/)([^)\s"]+)')


def from_root(markdown: str) -> str:
    "Relative links of a notebook in nbs/, seen from the root of the repository"
    return LINK.sub(lambda m: m[1] + posixpath.normpath(f"nbs/{m[2]}"), markdown)


def shown(cell):
    "A code cell as the README has it: without nbdev's directives, and its Markdown output alone where it says `echo: false`"
    if re.match(r"#\|\s*echo:\s*false", cell.source):
        return nbformat.v4.new_markdown_cell("\n\n".join(o.data["text/markdown"] for o in cell.outputs))
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    return cell


def visible(cells: list) -> list:
    "The cells without those that begin with `#| hide`"
    kept = [c for c in cells if c.cell_type != "code" or not re.match(r"#\|\s*hide\b", c.source)]
    for c in kept:
        if c.cell_type != "code": c.source = from_root(c.source)
    return [shown(c) if c.cell_type == "code" else c for c in kept]


def readme(root: Path = ROOT) -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the pictures it needs by their paths"
    nb = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    nb.cells = visible(nb.cells)
    nb.metadata.language_info = {"name": "python"}  # nbdev_clean takes it out; it names the code blocks
    resources = {"output_files_dir": IMAGES, "unique_key": "output"}
    text, resources = MarkdownExporter().from_notebook_node(nb, resources)
    text = re.sub(r"<style.*?</style>\n?", "", text, flags=re.S)  # GitHub would show it as text
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    note = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook -->"
    return f"{note}\n\n{text}\n", {Path(name).as_posix(): data for name, data in resources["outputs"].items()}


def difference(root: Path = ROOT) -> str:
    "What README.md and its pictures would change by, empty when they are fresh"
    text, pictures = readme(root)
    target = root / "README.md"
    old = target.read_text(encoding="utf-8") if target.exists() else ""
    lines = list(difflib.unified_diff(old.splitlines(), text.splitlines(), "README.md", "nbs/index.ipynb", lineterm=""))
    for name, data in pictures.items():
        if not (root / name).exists() or (root / name).read_bytes() != data: lines.append(f"{name} differs")
    return "\n".join(lines)


def write(root: Path = ROOT) -> None:
    "Write README.md and its pictures"
    text, pictures = readme(root)
    (root / "README.md").write_text(text, encoding="utf-8", newline="\n")
    for name, data in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]: sys.exit(write())
    stale = difference()
    if stale: print(stale)
    sys.exit(bool(stale))
