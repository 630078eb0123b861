"""The script that fetches books: what it makes of a repository of Standard Ebooks."""

import csv
import io
import zipfile
from pathlib import Path

from tools.fetch_books import book

ROOT = Path(__file__).resolve().parent.parent
OPF = """<package xmlns="http://www.idpf.org/2007/opf"><manifest>
<item id="title" href="text/titlepage.xhtml"/><item id="two" href="text/chapter-2.xhtml"/>
<item id="one" href="text/chapter-1.xhtml"/><item id="notes" href="text/endnotes.xhtml"/></manifest>
<spine><itemref idref="title"/><itemref idref="one"/><itemref idref="two"/><itemref idref="notes"/></spine></package>"""
PAGE = """<?xml version="1.0" encoding="utf-8"?>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><head><title>No</title></head>
<body epub:type="{kind}"><section>{inner}</section></body></html>"""
ONE = """<hgroup><h2 epub:type="ordinal z3998:roman">I</h2><p>Which Begins</p></hgroup>
<p>“Hot!” said  the\n <i>old</i> man.<a epub:type="noteref" href="endnotes.xhtml#1">1</a> Zoë.</p><hr/>
<blockquote epub:type="z3998:verse"><p><span>A line</span><br/><span>and a line</span></p></blockquote>
<figure><img src="x.png"/><figcaption>A picture</figcaption></figure><p></p>"""


def packed() -> bytes:
    data = io.BytesIO()
    page = lambda kind, inner: PAGE.format(kind=kind, inner=inner)
    with zipfile.ZipFile(data, "w") as z:
        z.writestr("book-123/src/epub/content.opf", OPF)
        z.writestr("book-123/src/epub/text/titlepage.xhtml", page("frontmatter", "<h1>The Book</h1>"))
        z.writestr("book-123/src/epub/text/chapter-1.xhtml", page("bodymatter z3998:fiction", ONE))
        z.writestr("book-123/src/epub/text/chapter-2.xhtml", page("bodymatter", "<p>Two.</p>"))
        z.writestr("book-123/src/epub/text/endnotes.xhtml", page("backmatter", "<p>A note.</p>"))
    return data.getvalue()


def test_a_book_is_its_chapters():
    "In the order of the spine; no front matter, notes, pictures; verse in lines, a break as three stars"
    expected = "I\n\nWhich Begins\n\n“Hot!” said the old man. Zoë.\n\n* * *\n\nA line\nand a line\n\n\nTwo.\n"
    assert book(packed()) == expected


def test_the_list_is_that_of_the_texts(shared):
    "Names, sizes and hashes, where the texts are at hand"
    import hashlib

    with open(ROOT / "data" / "books.csv", encoding="utf8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 71
    for row in rows:
        data = (shared / "data" / "books" / f"{row['name']}.txt").read_bytes()
        assert len(data) == int(row["bytes"]) and hashlib.sha256(data).hexdigest() == row["sha256"]
