"""README.md from nbs/index.ipynb and docs/NAME.md from nbs/docs/NAME.ipynb, by nbconvert.

`python tools/readme.py` writes them, `--check` compares and shows the difference.
`--run` first executes the notebooks whose text is made by cells: those that say `#| echo: false`."""
import difflib
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|#|/)([^)\s"]+)')
MADE_BY_CELL = re.compile(r"#\|\s*echo:\s*false")


def pages(root: Path = ROOT) -> dict[str, str]:
    "Path of each notebook in the repository: path of its page"
    docs = sorted((root / "nbs" / "docs").glob("*.ipynb"))
    return {"nbs/index.ipynb": "README.md"} | {f"nbs/docs/{p.name}": f"docs/{p.stem}.md" for p in docs}


def images(page: str) -> str:
    "The folder of the pictures among a notebook's outputs, as seen from its page"
    return "nbs/images/index" if page == "README.md" else f"images/{Path(page).stem}"


def relink(markdown: str, notebook: str, pages: dict[str, str]) -> str:
    "Relative links of a notebook, as seen from its page; a notebook that has a page is linked by it"
    def replace(m):
        path, mark, heading = m[2].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(notebook), path))
        folder = posixpath.dirname(pages[notebook]) or "."
        return m[1] + posixpath.relpath(pages.get(target, target), folder) + mark + heading
    return LINK.sub(replace, markdown)


def shown(cell):
    "A code cell as its page has it: without nbdev's directives; its Markdown output alone if it says `echo: false`"
    if MADE_BY_CELL.match(cell.source):
        return nbformat.v4.new_markdown_cell("\n\n".join(o.data["text/markdown"] for o in cell.outputs))
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    return cell


def visible(cells: list) -> list:
    "The cells without those that begin with `#| hide`"
    kept = [c for c in cells if c.cell_type != "code" or not re.match(r"#\|\s*hide\b", c.source)]
    return [shown(c) if c.cell_type == "code" else c for c in kept]


def convert(notebook: str, root: Path = ROOT) -> tuple[str, dict[str, bytes]]:
    "The text of a notebook's page, and the pictures it needs by their paths in the repository"
    known = pages(root)
    page = known[notebook]
    nb = nbformat.read(root / notebook, as_version=4)
    nb.cells = visible(nb.cells)
    for cell in nb.cells:
        if cell.cell_type != "code": cell.source = relink(cell.source, notebook, known)
    nb.metadata.language_info = {"name": "python"}  # nbdev_clean takes it out; it names the code blocks
    resources = {"output_files_dir": images(page), "unique_key": "output"}
    text, resources = MarkdownExporter().from_notebook_node(nb, resources)
    text = re.sub(r"<style.*?</style>\n?", "", text, flags=re.S)  # GitHub would show it as text
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    note = f"<!-- Made from {notebook} by tools/readme.py: edit the notebook -->"
    pictures = {(Path(page).parent / name).as_posix(): data for name, data in resources["outputs"].items()}
    return f"{note}\n\n{text}\n", pictures


def difference(root: Path = ROOT) -> str:
    "What the pages and their pictures would change by, empty when they are fresh"
    lines = []
    for notebook, page in pages(root).items():
        text, pictures = convert(notebook, root)
        target = root / page
        old = target.read_text(encoding="utf-8") if target.exists() else ""
        lines += difflib.unified_diff(old.splitlines(), text.splitlines(), page, notebook, lineterm="")
        for name, data in pictures.items():
            if not (root / name).exists() or (root / name).read_bytes() != data: lines.append(f"{name} differs")
    return "\n".join(lines)


def write(root: Path = ROOT) -> None:
    "Write the pages and their pictures"
    for notebook, page in pages(root).items():
        text, pictures = convert(notebook, root)
        for name, data in {page: text.encode("utf-8"), **pictures}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)


def run(root: Path = ROOT) -> None:
    "Execute the notebooks whose text is made by cells, and keep their outputs"
    for path in (root / notebook for notebook in pages(root)):
        nb = nbformat.read(path, as_version=4)
        code = [cell for cell in nb.cells if cell.cell_type == "code"]
        if not any(MADE_BY_CELL.match(cell.source) for cell in code): continue
        NotebookClient(nb, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
        nb.metadata.pop("language_info", None)
        for cell in code:
            cell.execution_count = None
            cell.metadata.pop("execution", None)
            for output in cell.outputs:
                if "execution_count" in output: output.execution_count = None
        nbformat.write(nb, path)


if __name__ == "__main__":
    if "--run" in sys.argv[1:]: run()
    if "--check" not in sys.argv[1:]: sys.exit(write())
    stale = difference()
    if stale: print(stale)
    sys.exit(bool(stale))
