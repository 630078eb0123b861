"""Fetch the books that the base `books` has read: python tools/fetch_books.py FOLDER

data/books.csv names each book's repository at Standard Ebooks and the commit. One text file a book comes of it:
chapters in their order, paragraphs apart by an empty line, chapters by two; without front matter, notes, pictures."""

import argparse
import csv
import hashlib
import io
import re
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "https://codeload.github.com/standardebooks/{name}/zip/{commit}"
EPUB, XHTML, OPF = "http://www.idpf.org/2007/ops", "http://www.w3.org/1999/xhtml", "http://www.idpf.org/2007/opf"
BLOCKS = {f"{{{XHTML}}}{tag}" for tag in ("p", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "td", "dt", "dd")}
LEFT_OUT = {f"{{{XHTML}}}{tag}" for tag in ("img", "svg", "figure", "nav", "head")}
BREAK = f"{{{XHTML}}}br"


def kind(element) -> str:
    "What an element is, such as `bodymatter` or `noteref`"
    return element.get(f"{{{EPUB}}}type", "")


def text_of(element) -> str:
    "An element's text in one line, verse in several"
    if "noteref" in kind(element) or element.tag in LEFT_OUT:
        return ""
    if element.tag == BREAK:
        return "\v"
    inner = "".join(text_of(child) + (child.tail or "") for child in element)
    return (element.text or "") + inner


def tidy(text: str) -> str:
    "One space between words; a line break only where the book has one"
    return "\n".join(" ".join(line.split()) for line in text.split("\v")).strip()


def paragraphs(element):
    "The paragraphs, headings and breaks below an element"
    for child in element:
        if child.tag in LEFT_OUT or "endnotes" in kind(child):
            continue
        if child.tag == f"{{{XHTML}}}hr":
            yield "* * *"
        elif child.tag in BLOCKS and not any(inner.tag in BLOCKS for inner in child.iter() if inner is not child):
            if text := tidy(text_of(child)):
                yield text
        else:
            yield from paragraphs(child)


def chapter(page: bytes) -> str:
    "A file of a book as text; empty for front and back matter"
    body = ElementTree.fromstring(page).find(f"{{{XHTML}}}body")
    return "\n\n".join(paragraphs(body)) if "bodymatter" in kind(body) else ""


def book(packed: bytes) -> str:
    "A repository's archive as text"
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        listing = next(name for name in archive.namelist() if name.endswith("src/epub/content.opf"))
        package, folder = ElementTree.fromstring(archive.read(listing)), PurePosixPath(listing).parent
        files = {item.get("id"): item.get("href") for item in package.iter(f"{{{OPF}}}item")}
        order = [files[entry.get("idref")] for entry in package.iter(f"{{{OPF}}}itemref")]
        chapters = [chapter(archive.read(str(folder / file))) for file in order]
    return re.sub(r"\n{4,}", "\n\n\n", "\n\n\n".join(filter(None, chapters))) + "\n"


def fetch(row: dict, folder: Path) -> str:
    "Write one book; what came of it, in words"
    file = folder / f"{row['name']}.txt"
    if not file.exists():
        with urllib.request.urlopen(ADDRESS.format(**row), timeout=120) as answer:
            data = book(answer.read()).encode()
        beside = file.with_suffix(".partial")
        beside.write_bytes(data)
        beside.replace(file)
    same = hashlib.sha256(file.read_bytes()).hexdigest() == row["sha256"]
    return "as it was read" if same else "not the same bytes as the text that was read"


def main() -> int:
    "Fetch all books, or those whose name holds a word"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the texts go; books that are there are not fetched again")
    parser.add_argument("--only", default="", help="part of the names, such as austen")
    args, failed = parser.parse_args(), 0
    args.folder.mkdir(parents=True, exist_ok=True)
    with open(ROOT / "data" / "books.csv", encoding="utf8", newline="") as f:
        rows = [row for row in csv.DictReader(f) if args.only in row["name"]]
    for row in rows:
        try:
            said = fetch(row, args.folder)
        except (OSError, zipfile.BadZipFile, ElementTree.ParseError, KeyError, StopIteration) as e:
            said, failed = f"could not be fetched ({e})", failed + 1
        print(f"{row['author']}, {row['title']}: {said}")
    if failed:
        print(f"{failed} of {len(rows)} books are missing; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
