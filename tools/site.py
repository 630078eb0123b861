"""The documentation site: Markdown pages, notebooks with their saved outputs, and the API.

`python tools/site.py` builds it in `_site`, `python tools/site.py FOLDER` in a folder. Nothing is run or fetched.
A page keeps the path of its source in the repository, so that relative links go on to hold."""
import html
import logging
import re
import shutil
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from colab import settings
from latex2mathml.converter import convert
from mkdocs.commands.build import build
from mkdocs.config import load_config
from reading import PACKAGES, is_door
from site_api import Api
from site_pages import Sources, notebook_page

ROOT = Path(__file__).resolve().parent.parent
MADE_FROM = re.compile(r"\A<!-- Made from (\S+) .*?-->\s*")  # written by readme.py
PROJECT = ("ARCHITECTURE.md", "STYLE.md", "CONTRIBUTING.md", "CHANGELOG.md")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


# What becomes a page, and where it stands

def find_pages(root: Path) -> dict[str, str]:
    "Path of each source in the repository: path of its page. Markdown that is made from a notebook is its page."
    texts = [root / "README.md", *sorted(root.glob("docs/**/*.md")), *(root / name for name in PROJECT)]
    notebooks = [*root.glob("nbs/*.ipynb"), *root.glob("nbs/[!.]*/*.ipynb")]  # what lies deeper, runs left behind
    sources = [p.relative_to(root) for p in [*texts, *notebooks] if p.exists()]
    pages = {p.as_posix(): p.with_suffix(".md").as_posix() for p in sources}
    made = {f"nbs/docs/{p.stem}.ipynb": f"docs/{p.name}" for p in root.glob("docs/*.md")}
    return pages | made | {"nbs/index.ipynb": "README.md"}


def place(notebook: str) -> tuple:
    "Sort key of a notebook: those without a package, packages from the lowest up, then the doors."
    *package, name = Path(notebook).with_suffix("").parts[1:]
    door = not package and is_door(name)
    floor = PACKAGES.index(package[0]) if package and package[0] in PACKAGES else len(PACKAGES)
    return door, bool(package), floor, package, name


def by_package(pages: list[str]) -> list:
    "Entries of the navigation for pages in order, with a section for each package."
    entries = []
    for package, group in groupby(pages, key=lambda page: page.split("/")[1:-1]):
        entries += [{package[0].capitalize(): list(group)}] if package else group
    return entries


def navigation(pages: dict[str, str]) -> list:
    "The sections of the site. Guides stand in the order in which the README names them."
    def inside(folder): return [page for page in pages if page.startswith(folder)]
    readme = pages["README.md"]
    tutorials, benchmarks = sorted(inside("nbs/tutorials/")), sorted(inside("nbs/benchmarks/"))
    built = [page for page in inside("nbs/") if page not in [*tutorials, *benchmarks]]
    sections = {
        "Guides": sorted(inside("docs/"), key=lambda page: readme.find(page) if page in readme else len(readme)),
        "Tutorials": tutorials,
        "How it is built": by_package(sorted(built, key=place)),
        "Benchmarks": benchmarks,
        "API": by_package(inside("api/")),
        "Project": [name for name in PROJECT if name in pages],
    }
    return [{"Start": "README.md"}, *({title: entries} for title, entries in sections.items() if entries)]


# Building

def markdown_page(sources: Sources, source: str) -> str:
    "The Markdown at `source` as a page; a notebook that it was made from is its source."
    text = (sources.root / source).read_text(encoding="utf-8")
    made = MADE_FROM.match(text)
    head = f"source: {made[1] if made else source}"
    if source == "README.md": head += "\nhide: [navigation]"
    return f"---\n{head}\n---\n\n" + sources.relink(source, MADE_FROM.sub("", text))


def make_pages(sources: Sources) -> dict[str, str]:
    "Path and Markdown of every page."
    pages = {}
    for source, page in sources.pages.items():
        if source.endswith(".md"): pages[page] = markdown_page(sources, source)
        elif page not in sources.pages: pages[page] = notebook_page(sources, source)  # else it is made from Markdown
    api = Api(sources.root / "tinytrainer_nb", order=place).pages()
    return pages | {page: sources.relink(page, text) for page, text in api.items()}


def write_sources(sources: Sources, pages: dict[str, str], folder: Path) -> None:
    "Everything that MkDocs reads: pages and their pictures."
    for page, text in pages.items():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(text, encoding="utf-8")
    for image in sources.images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources.root / image, folder / image)


def main(target: Path) -> None:
    "Build the site in `target`; a broken link ends it with an error."
    if target.exists() and any(target.iterdir()) and not (target / "sitemap.xml").exists():
        sys.exit(f"{target} holds something else, which MkDocs would delete: name a new or an empty folder.")
    s = settings()
    sources = Sources(ROOT, find_pages(ROOT), s["git_url"], s["branch"])
    pages = make_pages(sources)
    with tempfile.TemporaryDirectory() as folder:
        write_sources(sources, pages, Path(folder))
        config = load_config(
            str(ROOT / "tools" / "mkdocs.yml"), docs_dir=folder, site_dir=str(target),
            nav=navigation(pages), site_url=f"{s['doc_host']}{s['doc_baseurl']}/",
            site_name=s["title"], site_description=s["description"], copyright=s["copyright"])
        config.extra["sources"] = f"{s['git_url']}/blob/{s['branch']}"
        config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": s["git_url"], "name": "Repository"}]
        build(config)


# Called by MkDocs for each page

def on_page_content(content: str, **_) -> str:
    "Formulas as MathML, which browsers show without a script."
    def formula(m):
        math = convert(html.unescape(m[2]), display="block" if m[1] == "div" else "inline")
        return re.sub(r"<mi>([a-z]{2,})</mi>", r'<mi class="name">\1</mi>', math)  # log, min: with space around
    return MATH.sub(formula, content)


def on_page_context(context, page, config, **_) -> None:
    "The button above a page leads to its source."
    page.edit_url = f"{config.extra['sources']}/{page.meta.get('source', page.file.src_uri)}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # MkDocs names broken links there
    main(Path(sys.argv[1] if sys.argv[1:] else ROOT / "_site").resolve())
