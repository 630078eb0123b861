"""The documentation site: links lead somewhere, nothing is loaded from elsewhere, notebooks look as they should."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
WITHOUT = "needs the extra `docs`: pip install -c constraints.txt -e '.[docs]'"
for library in ("latex2mathml", "material", "mkdocs"):
    pytest.importorskip(library, reason=WITHOUT)

import markdown
from markdown_it import MarkdownIt

from tools import site_pages

LOADED_RELATIONS = {"icon", "manifest", "modulepreload", "preconnect", "prefetch", "preload", "stylesheet"}
STYLE_LOAD = re.compile(r"(?:@import|url\()\s*['\"]?((?:https?:)?//[^)'\"\s]+)")


class Page(HTMLParser):
    "Anchors of a page, what it links to, and what it loads."

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a[key] for key in ("id", "name") if a.get(key)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "link" and LOADED_RELATIONS & set(a.get("rel", "").split()):
            self.loads.append(a["href"])
        self.loads += [a[key] for key in ("src", "srcset", "data", "poster") if a.get(key)]
        self.loads += re.findall(r"url\(['\"]?([^)'\"]+)", a.get("style") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The built site"
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "tools/site.py", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"the site was not built:\n{done.stdout}{done.stderr}"
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    "All pages but the one for addresses that do not exist, whose own links are absolute"
    return {p: Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html") if p.name != "404.html"}


def is_outside(address: str) -> bool:
    "Whether something lies on another machine"
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def broken(page: Path, address: str, pages: dict[Path, Page]) -> str:
    "What is wrong with a link inside the site, or nothing"
    parts = urlsplit(address)
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    return "no such anchor" if anchor and target in pages and anchor not in pages[target].anchors else ""


@pytest.mark.slow
def test_every_link_leads_somewhere(site, pages):
    inner = [
        (path, link)
        for path, page in pages.items()
        for link in [*page.links, *page.loads]
        if not is_outside(link) and not link.startswith("data:")
    ]
    wrong = [f"{path.relative_to(site)}: {link}: {why}" for path, link in inner if (why := broken(path, link, pages))]
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.slow
def test_no_page_loads_from_elsewhere(site, pages):
    loads = [(path, load) for path, page in pages.items() for load in page.loads if is_outside(load)]
    for path in [*site.rglob("*.css"), *site.rglob("*.html")]:
        loads += [(path, load) for load in STYLE_LOAD.findall(path.read_text(encoding="utf-8"))]
    assert not loads, "\n".join(f"{path.relative_to(site)}: {load}" for path, load in loads)


@pytest.mark.slow
def test_the_search_knows_every_notebook(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    titles = {entry["location"]: re.sub(r"<[^>]+>", "", entry["title"]) for entry in index["docs"]}
    notebooks = [p for p in [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/[!.]*/*.ipynb")] if p.name != "index.ipynb"]
    for path in notebooks:
        first = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
        page = path.relative_to(ROOT).with_suffix(".html").as_posix()
        if path.parent.name == "docs":
            page = page.removeprefix("nbs/")  # its page is the Markdown made from it
        assert titles.get(page) == first.splitlines()[0].removeprefix("# ").replace("`", ""), page


@pytest.mark.slow
@pytest.mark.browser
def test_search_and_dark_mode_work_from_the_disk(site, chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, asked = browser.new_page(color_scheme="dark"), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
        page.locator(".md-search__input").press_sequentially("add_lora")
        page.wait_for_selector(".md-search-result__link", timeout=30_000)
        found = page.locator(".md-search-result__link").first.get_attribute("href")
        browser.close()
    assert "api/" in found and not [url for url in asked if not url.startswith(("file:", "data:", "about:"))]


def structure(rendered: str) -> list[str]:
    "The tags of lists, tables, headings and code blocks, in order"
    return re.findall(r"<(ul|ol|li|table|tr|h\d|pre|blockquote)\b", rendered)


def test_markdown_means_the_same_on_github_and_in_the_site():
    texts = [(path, path.read_text(encoding="utf-8")) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]]
    for path in [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/[!.]*/*.ipynb")]:
        cells = nbformat.read(path, as_version=4).cells
        texts += [(path, cell.source) for cell in cells if cell.cell_type == "markdown"]
    github = MarkdownIt().enable("table")
    here = ["md_in_html", "sane_lists", "tables", "pymdownx.superfences"]
    wrong = [
        f"{path.relative_to(ROOT)}: {text[:60]!r}"
        for path, text in texts
        if structure(github.render(text)) != structure(markdown.markdown(text, extensions=here))
    ]
    assert not wrong, "put a blank line before a list, and four spaces before a list in it:\n" + "\n".join(wrong)


def page_of(tmp_path: Path, *cells) -> str:
    "The page of a notebook of these cells"
    nb = nbformat.v4.new_notebook(cells=list(cells))
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "results.json").write_text("{}")
    nbformat.write(nb, tmp_path / "nbs" / "a.ipynb")
    pages = {"nbs/a.ipynb": "nbs/a.md", "docs/b.md": "docs/b.md", "README.md": "README.md"}
    return site_pages.notebook_page(site_pages.Sources(tmp_path, pages, "https://example.org/r", "main"), "nbs/a.ipynb")


def code_cell(source: str, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def test_cells_are_shown_without_directives(tmp_path):
    text = page_of(
        tmp_path,
        code_cell("#| default_exp recipes.a"),
        code_cell("#| hide\nsecret()"),
        code_cell("#| export\ndef shown(): ..."),
        code_cell("example()"),
    )
    assert "secret" not in text and "#|" not in text
    assert '```python title="tinytrainer_nb/recipes/a.py"\ndef shown(): ...\n```' in text
    assert "```python\nexample()\n```" in text


def test_outputs_become_readable(tmp_path):
    new = nbformat.v4.new_output
    text = page_of(
        tmp_path,
        code_cell(
            "run()",
            new("stream", text="\x1b[31mred\x1b[0m\n 1%|#   | 1/9\r 99%|####| 9/9\n"),
            new("display_data", {"application/javascript": "alert()", "text/plain": "<JS>"}),
            new("display_data", {"text/html": "<table><tr><td>`x`</td></tr></table>"}),
            new("execute_result", {"text/plain": "'```'"}),
        ),
    )
    assert "red\n 99% 9/9" in text and "\x1b" not in text and "alert" not in text and "<JS>" not in text
    assert '<table class="own"><tr><td>&#96;x&#96;</td>' in text and "````" in text


def test_links_go_to_pages_or_to_the_repository(tmp_path):
    text = page_of(
        tmp_path,
        nbformat.v4.new_markdown_cell(
            "[a](../docs/b.md#Some-heading,-here) [b](results.json) [c](.) `[d](results.json)` [e](a.ipynb)\n"
            '[f](https://example.org) <a href="../README.md">g</a>\n'
            "[![badge](https://example.org/x.svg)](https://example.org)"
        ),
    )
    assert "[a](../docs/b.md#some-heading-here)" in text and "[e](a.md)" in text and '<a href="../index.html">' in text
    assert "[b](https://example.org/r/blob/main/nbs/results.json)" in text
    assert "[c](https://example.org/r/tree/main/nbs)" in text
    assert "`[d](results.json)`" in text and "[f](https://example.org)" in text
    assert "[badge](https://example.org)" in text
