"""Documents: whole texts by hand, for each kind of file; real samples; hostile and damaged files."""

import io
import random
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.data import papers
from tinytrainer_nb.data.own_files import own_files
from tinytrainer_nb.data.papers import papers_in

MAY_1 = 1714521600.0  # 2024-05-01


def read(folder: Path, name: str, data: bytes | str):
    "What a single file is taken for; None: it is left"
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    found, rest = papers_in(own_files(path))
    assert len(found) + len(rest) == 1
    return found[0] if found else None


def texts(found) -> list[tuple]:
    return [(d.title, d.author, d.time, d.text) for d in found.documents]


def packed(members: dict[str, str | bytes]) -> bytes:
    with zipfile.ZipFile(data := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in members.items():
            z.writestr(name, text)
    return data.getvalue()


NOTE = """---
title: "At the harbour"
date: 2024-05-01
tags: [sea, work]
author: Rosa
---
# Monday

We met [[Omar Haddad|Omar]] at [[Harbour#The pier]]. %%ask him%% Then [[#Tuesday]] came.
status:: done
Bought (price:: 3) fish at the #market, for [weight:: 2 kg] us.
#sea #work/2024
- ![[fish.png]]
%%
a longer
comment
%%
Key::value is no field, std::vector neither. #12345

```dataview
LIST FROM #sea
```
```python
x = y[[1]]  # %%time
key:: value
```
  two  blanks, "quotes" ^block-1
"""
NOTE_TEXT = """# Monday

We met Omar at Harbour. Then Tuesday came.
Bought fish at the #market, for us.
Key::value is no field, std::vector neither. #12345

```python
x = y[[1]]  # %%time
key:: value
```
  two  blanks, "quotes\""""


def test_a_note(tmp_path):
    found = read(tmp_path, "Monday.md", NOTE)
    assert found.kind == "note" and not found.left_out
    assert texts(found) == [("At the harbour", "Rosa", MAY_1, NOTE_TEXT)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_plain_markdown(tmp_path, end):
    text = "# Sea\n\nIt was *grey*, [see](sea.html).\n\n---\n\n* one\n* two  \n\n> said #\n\n    code"
    found = read(tmp_path, "sea.md", text.replace("\n", end))
    assert found.kind == "Markdown" and texts(found) == [("sea", "", None, text)]


def test_text_stays_as_it_is(tmp_path):
    text = 'the sea\n   is  grey — "quite"\n\n\n\nSo\tit is. 🙂'
    for data in (text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), text.replace("\n", "\r\n").encode()):
        found = read(tmp_path, "poem.txt", data)
        assert found.kind == "text" and texts(found) == [("poem", "", None, text)]


def test_a_page(tmp_path):
    html = """<!DOCTYPE html><html><head><meta charset=iso-8859-15><meta name="author" content="Rosa">
    <title>The &amp; sea</title><script>x()</script></head><body><nav>Home</nav><h1>Sea</h1>
    <p>It was\n  grey.<br>For 5 \xa4.</p><blockquote>Said Omar</blockquote><ol><li>one</li><li><p>two</p></li></ol>
    <table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table></body></html>"""
    for name in ("sea.html", "sea.htm", "sea.txt"):
        found = read(tmp_path, name, html.encode("latin-1"))
        expected = "Sea\n\nIt was grey.\nFor 5 €.\n\nSaid Omar\n\n1. one\n2. two\n\na b\nc d"
        assert found.kind == "HTML page" and texts(found) == [("The & sea", "Rosa", None, expected)]


CONTAINER = '<?xml version="1.0"?><container><rootfiles><rootfile full-path="OPS/p.opf"/></rootfiles></container>'
OPF = """<?xml version="1.0" encoding="utf-8"?><package xmlns="http://www.idpf.org/2007/opf">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>The Walk</dc:title><dc:creator>Rosa Sand</dc:creator>
<dc:date>2024-05-01</dc:date></metadata>
<manifest><item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="cover" href="cover.xhtml" media-type="application/xhtml+xml"/>
<item id="two" href="a%20b/two.xhtml#start" media-type="application/xhtml+xml"/>
<item id="one" href="one.xhtml" media-type="application/xhtml+xml"/>
<item id="ad" href="ad.xhtml" media-type="application/xhtml+xml"/>
<item id="pic" href="pic.svg" media-type="image/svg+xml"/>
<item id="gone" href="gone.xhtml" media-type="application/xhtml+xml"/></manifest>
<spine><itemref idref="cover"/><itemref idref="nav"/><itemref idref="one"/><itemref idref="ad" linear="no"/>
<itemref idref="pic"/><itemref idref="two"/><itemref idref="gone"/><itemref idref="nowhere"/></spine>
<guide><reference type="cover" href="cover.xhtml"/></guide></package>"""
EPUB = {
    "mimetype": "application/epub+zip",
    "META-INF/container.xml": CONTAINER,
    "OPS/p.opf": OPF,
    "OPS/nav.xhtml": "<html><body><p>Contents</p></body></html>",
    "OPS/cover.xhtml": "<html><body><p>Cover</p></body></html>",
    "OPS/ad.xhtml": "<html><body><p>Buy!</p></body></html>",
    "OPS/one.xhtml": '<?xml version="1.0"?><html><head><title>1</title><script src="x.js"/></head><body>'
    '<section epub:type="toc"><p>1, 2</p></section><h1>One</h1><p>We<a epub:type="noteref">1</a> left.</p>'
    '<aside epub:type="footnote">At six.</aside></body></html>',
    "OPS/a b/two.xhtml": "<html><body><h1>Two<p>We <i>arrived.<p>Tea &nbsp; & cake",  # broken
    "OPS/pic.svg": "<svg/>",
}


def test_a_book(tmp_path):
    found = read(tmp_path, "walk.epub", packed(EPUB))
    assert found.kind == "EPUB book" and dict(found.left_out) == {"a chapter that is not in the file": 1}
    text = "One\n\nWe left.\n\n\nTwo\n\nWe arrived.\n\nTea   & cake"
    assert texts(found) == [("The Walk", "Rosa Sand", MAY_1, text)]


def test_a_book_without_its_parts_is_a_note(tmp_path):
    for name in ("META-INF/container.xml", "OPS/p.opf"):
        found = read(tmp_path, "walk.epub", packed({k: v for k, v in EPUB.items() if k != name}))
        assert not found.documents and found.left_out.total() == 1 and len(found.notes) == 1


W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
MC = "http://schemas.openxmlformats.org/markup-compatibility/2006"


def run(text: str) -> str:
    return f'<w:r><w:rPr><w:b/></w:rPr><w:t xml:space="preserve">{text}</w:t></w:r>'


BODY = f"""<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr>{run("The sea")}</w:p>
<w:p><w:pPr><w:pStyle w:val="TOC1"/></w:pPr>{run("The sea ... 1")}</w:p>
<w:p><w:pPr><w:tabs><w:tab w:val="left" w:pos="720"/></w:tabs></w:pPr>{run("It was ")}
<w:del w:id="1"><w:r><w:delText>blue</w:delText></w:r></w:del><w:ins w:id="2">{run("grey")}</w:ins>
<w:r><w:tab/><w:t>.</w:t><w:br/><w:t>Quite</w:t><w:br w:type="page"/><w:footnoteReference w:id="1"/></w:r>
<w:moveFrom w:id="3">{run(" moved")}</w:moveFrom>{run("  so.")}</w:p>
<w:p><w:pPr><w:rPr><w:del w:id="4"/></w:rPr></w:pPr>{run("One ")}</w:p><w:p>{run("line.")}</w:p>
<w:p><w:moveTo w:id="5">{run("moved")}</w:moveTo></w:p>
<w:p/>
<w:p><w:r><w:fldChar w:fldCharType="begin"/></w:r><w:r><w:instrText> PAGE </w:instrText></w:r>
<w:r><w:fldChar w:fldCharType="separate"/></w:r>{run("7")}<w:r><w:fldChar w:fldCharType="end"/></w:r>
<w:r><w:rPr><w:vanish/></w:rPr><w:t>secret</w:t></w:r></w:p>
<w:p><w:r><mc:AlternateContent><mc:Choice><w:txbxContent><w:p>{run("Box")}</w:p></w:txbxContent></mc:Choice>
<mc:Fallback><w:pict><w:txbxContent><w:p>{run("Box")}</w:p></w:txbxContent></w:pict></mc:Fallback>
</mc:AlternateContent></w:r>{run("Around")}</w:p>
<w:tbl><w:tr><w:tc><w:p>{run("cell")}</w:p></w:tc></w:tr></w:tbl>"""
BODY_TEXT = "The sea\nIt was grey\t.\nQuite  so.\nOne line.\nmoved\n\n7\nAround\nBox\ncell"
DOCX = {
    "[Content_Types].xml": "<Types/>",
    "word/document.xml": f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?><w:document xmlns:w="{W}" '
    f'xmlns:mc="{MC}"><w:body>{BODY}</w:body></w:document>',
    "word/footnotes.xml": f'<w:footnotes xmlns:w="{W}"><w:footnote><w:p>{run("note")}</w:p></w:footnote></w:footnotes>',
    "docProps/core.xml": """<cp:p xmlns:cp="urn:cp" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:t="urn:t">
<dc:title>Sea, a draft</dc:title><dc:creator>Rosa Sand</dc:creator>
<t:created>2024-05-01T00:00:00Z</t:created></cp:p>""",
}


def test_a_word_document(tmp_path):
    found = read(tmp_path, "sea.docx", packed(DOCX))
    assert found.kind == "Word document"
    assert texts(found) == [("Sea, a draft", "Rosa Sand", MAY_1, BODY_TEXT)]


def test_a_word_document_in_utf_16_without_properties(tmp_path):
    body = DOCX["word/document.xml"].replace("UTF-8", "UTF-16")
    for properties in ({}, {"docProps/core.xml": "<broken"}):
        found = read(tmp_path, "x.docx", packed({"word/document.xml": body.encode("utf-16"), **properties}))
        assert texts(found) == [("x", "", None, BODY_TEXT)]


OFFICE, TEXT = (f"urn:oasis:names:tc:opendocument:xmlns:{n}:1.0" for n in ("office", "text"))
ODT = {
    "mimetype": "application/vnd.oasis.opendocument.text",
    "content.xml": f"""<?xml version="1.0"?><office:document-content xmlns:office="{OFFICE}" xmlns:text="{TEXT}"
xmlns:svg="urn:svg"><office:body><office:text><text:tracked-changes><text:changed-region><text:deletion>
<text:p>gone</text:p></text:deletion></text:changed-region></text:tracked-changes>
<text:h text:outline-level="1">The
   sea</text:h><text:p/><text:p>It <text:span>was<text:s text:c="2"/></text:span><text:s/>grey<text:note>
<text:note-body><text:p>note</text:p></text:note-body></text:note>.<text:line-break/>Quite<text:tab/>so.</text:p>
<text:list><text:list-item><text:p>item <office:annotation><text:p>check</text:p></office:annotation> one</text:p>
</text:list-item></text:list><text:table-of-content><text:p>The sea 1</text:p></text:table-of-content>
</office:text></office:body></office:document-content>""",
    "meta.xml": """<m xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:meta="urn:meta"><dc:title>Sea</dc:title>
<meta:initial-creator>Rosa</meta:initial-creator><dc:creator>Omar</dc:creator>
<meta:creation-date>2024-05-01T00:00:00.000000000</meta:creation-date></m>""",
}


def test_an_open_document(tmp_path):
    found = read(tmp_path, "sea.odt", packed(ODT))
    assert found.kind == "OpenDocument text"
    assert texts(found) == [("Sea", "Rosa", MAY_1, "The sea\n\nIt was   grey.\nQuite\tso.\nitem one")]


def pdf(*pages: str, info: str = "") -> bytes:
    "A PDF whose pages have one line each"
    kids = " ".join(f"{5 + 2 * i} 0 R" for i in range(len(pages)))
    parts = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        f"<<{info}>>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        page = f"<</Type/Page/Parent 2 0 R/Resources<</Font<</F1 3 0 R>>>>/Contents {6 + 2 * i} 0 R>>"
        parts += [page, f"<</Length {len(stream)}>>\nstream\n{stream}\nendstream"]
    data, table = b"%PDF-1.4\n", f"xref\n0 {len(parts) + 1}\n0000000000 65535 f \n"
    for i, part in enumerate(parts, 1):
        table += f"{len(data):010d} 00000 n \n"
        data += f"{i} 0 obj\n{part}\nendobj\n".encode()
    end = f"trailer\n<</Root 1 0 R/Info 4 0 R/Size {len(parts) + 1}>>\nstartxref\n{len(data)}\n%%EOF"
    return data + (table + end).encode()


def test_a_pdf(tmp_path):
    pytest.importorskip("pypdf")
    info = "/Title(The sea)/Author(Rosa)/CreationDate(D:20240501000000Z)"
    found = read(tmp_path, "sea.pdf", pdf("It was grey.", "", "Quite so.", info=info))
    assert found.kind == "PDF" and texts(found) == [("The sea", "Rosa", MAY_1, "It was grey.\nQuite so.")]
    assert found.left_out == {"a page without text, such as a scan": 1} and "broken words" in found.notes[0]


def test_a_pdf_with_a_password(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("secret")))
    writer.encrypt("word", algorithm="RC4-128")
    writer.write(tmp_path / "a.pdf")
    found, _ = papers_in(own_files(tmp_path / "a.pdf"))
    assert not found[0].documents and "password" in found[0].notes[0] and "\n" not in found[0].notes[0]


def test_a_page_that_raises_is_left_out(tmp_path, monkeypatch):
    pypdf = pytest.importorskip("pypdf")
    real = pypdf.PageObject.extract_text

    def some(page, *args, **kwargs):
        if page.page_number == 0:
            raise RecursionError
        return real(page, *args, **kwargs)

    monkeypatch.setattr(pypdf.PageObject, "extract_text", some)
    found = read(tmp_path, "a.pdf", pdf("one", "two", "three"))
    assert found.documents[0].text == "two\nthree" and found.left_out == {"a page that cannot be read": 1}
    monkeypatch.setattr(papers, "PDF_PAGES", 2)
    found = read(tmp_path, "a.pdf", pdf("one", "two", "three", "four"))
    assert found.documents[0].text == "two" and sum(found.left_out.values()) == 3


def test_without_pypdf_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(TinyTrainerError, match=r'pip install "tinytrainer_nb\[pdf\]"'):
        read(tmp_path, "a.pdf", pdf("one"))


LAUGHS = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))
LAUGHS = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "ha">{LAUGHS}]><x>&l9;</x>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
@pytest.mark.parametrize(
    "name, members, member",
    [("a.docx", DOCX, "word/document.xml"), ("a.odt", ODT, "content.xml"), ("a.epub", EPUB, "OPS/p.opf")],
)
def test_a_billion_laughs_is_one_line(tmp_path, name, members, member, encoding):
    started = time.process_time()
    found = read(tmp_path, name, packed({**members, member: LAUGHS.encode(encoding)}))
    assert not found.documents and len(found.notes) == 1 and "\n" not in found.notes[0]
    assert "entities" in found.notes[0] and time.process_time() - started < 2


def test_an_archive_that_grows_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "PACKAGE_MOST", 2**20)
    for name, members, member in [
        ("a.docx", DOCX, "word/document.xml"),
        ("a.odt", ODT, "content.xml"),
        ("a.epub", EPUB, "OPS/one.xhtml"),
    ]:
        found = read(tmp_path, name, packed({**members, member: " " * 2**21}))
        assert not found.documents and "1 MB" in found.notes[0]


def test_documents_inside_an_archive(tmp_path):
    members = {"a/sea.odt": packed(ODT), "a/walk.epub": packed(EPUB), "b.docx": packed(DOCX), "c.md": NOTE}
    (tmp_path / "all.zip").write_bytes(packed(members))
    found, rest = papers_in(own_files(tmp_path / "all.zip"))
    assert not rest and [len(f.documents) for f in found] == [1, 1, 1, 1]
    assert {f.kind for f in found} == {"OpenDocument text", "EPUB book", "Word document", "note"}


def test_the_rest(tmp_path):
    for name, data in [
        ("photo.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF"),
        ("program.txt", b"\x7fELF" + bytes(range(256)) * 10),
        ("table.csv", b"a,b\n1,2"),
        ("chat.json", b"{}"),
        ("sheet.xlsx", packed({"xl/workbook.xml": "<x/>"})),
        ("slides.odp", packed({"mimetype": "application/vnd.oasis.opendocument.presentation", "content.xml": "<x/>"})),
    ]:
        (tmp_path / name).write_bytes(data)
    files = own_files(tmp_path)
    assert papers_in(files) == ([], files)


def test_a_name_may_lie(tmp_path):
    assert read(tmp_path, "book.docx", packed(EPUB)).kind == "EPUB book"
    assert read(tmp_path, "page.md.txt", "<!DOCTYPE html><p>Hi").kind == "HTML page"
    for name in ("a.docx", "a.odt", "a.epub", "a.pdf"):
        found = read(tmp_path, name, b"hello")
        assert found.left_out == {"a file that cannot be read": 1} and len(found.notes) == 1


def test_a_locked_word_document_is_a_note(tmp_path):
    found = read(tmp_path, "a.docx", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(2000))
    assert not found.documents and "password" in found.notes[0]


def test_an_empty_file_is_counted(tmp_path):
    for name in ("a.txt", "a.md", "a.html"):
        assert read(tmp_path, name, b"").left_out == {"a file without text": 1}


@pytest.mark.shared
def test_the_real_samples(shared):
    found, rest = papers_in(own_files(shared / "data" / "own_writing"))
    by = {f.source: f for f in found}
    assert {f.name.rpartition(".")[2] for f in rest} == {"json", "eml"}
    book = by["epub/test.epub"]
    assert (book.kind, book.documents[0].title, book.documents[0].author) == (
        "EPUB book",
        "Test EPUB Document",
        "Test Author",
    )
    assert book.documents[0].text == (
        "Chapter 1: Test Content\n\nThis is a test paragraph with some formatting.\n\nIt includes:\n\n"
        "- A bullet point\n- Another point\n\n\n"
        "Chapter 2: More Content\n\nHere's a second chapter with a different style.\n\n"
        "This is a blockquote for testing."
    )
    note = by["obsidian/tags_and_frontmatter.md"]
    assert note.kind == "note" and note.documents[0].title == "tags_and_frontmatter"
    assert note.documents[0].text == (
        "# Tags\n\n ()#notatag\n#12345\nsomething #tagWithCases\n\n# Dataview\n\nHere is some data in a line.\n"
        "Here is even more data in a line.\nnotdataview4: this is not a field\nnotdataview5: this is not a field\n\n"
        "# Text content\n\nhttps://example.com/blog/#not-a-tag"
    )


def mutated(data: bytes, r: random.Random) -> bytes:
    "A file that was damaged on its way"
    some = data.decode("utf-8", "replace")
    kinds = [
        lambda: data[: r.randrange(len(data))],
        lambda: data[r.randrange(len(data)) :],
        lambda: some.encode(r.choice(["utf-16", "utf-16-le", "cp1252", "utf-32", "utf-8-sig"]), "replace"),
        lambda: data.replace(b"\n", r.choice([b"\r\n", b"\r", b"\n\n", b""])),
        lambda: b"".join(bytes([b, 0]) if r.random() < 0.02 else bytes([b]) for b in data),
        lambda: bytes(r.randrange(256) if r.random() < 0.01 else b for b in data),
    ]
    return r.choice(kinds)()


def test_200_damaged_files(tmp_path):
    r, started, documents = random.Random(18), time.process_time(), 0
    packages = [("a.docx", DOCX), ("a.odt", ODT), ("a.epub", EPUB)]
    for i in range(200):
        if i % 3 == 0:  # the archive is whole, what is in it is not
            name, members = packages[i // 3 % 3]
            data = packed({n: mutated(t.encode(), r) if r.random() < 0.5 else t for n, t in members.items()})
        else:
            samples = [("a.md", NOTE.encode()), ("a.txt", NOTE.encode()), ("a.html", EPUB["OPS/one.xhtml"].encode())]
            samples += [("a.pdf", pdf("one", "two")), *((n, packed(m)) for n, m in packages)]
            name, data = samples[i % len(samples)]
            data = mutated(data, r)
        if name == "a.pdf":
            pytest.importorskip("pypdf")
        try:
            found = read(tmp_path, name, data)
        except TinyTrainerError as e:
            assert "\n" not in str(e)
            continue
        if found is None:
            assert name in ("a.md", "a.txt", "a.html")  # no longer text
            continue
        documents += len(found.documents)
        assert found.documents or found.left_out or found.notes
        assert not any("\n" in note for note in found.notes)
        assert all(d.text.strip() == d.text and "\0" not in d.text for d in found.documents)
    assert documents > 50 and time.process_time() - started < 60


def test_deep_and_long_packages(tmp_path):
    started, n = time.process_time(), 200_000
    deep = "<p>" * n + "sea" + "</p>" * n
    read(tmp_path, "a.epub", packed({**EPUB, "OPS/p.opf": deep}))
    assert read(tmp_path, "a.odt", packed({"mimetype": ODT["mimetype"], "content.xml": deep})).documents
    spans = "<p>a" + "<span> </span>" * n + "b</p>"
    found = read(tmp_path, "a.odt", packed({"mimetype": ODT["mimetype"], "content.xml": spans}))
    assert found.documents[0].text == "a b"
    word = f'<w:d xmlns:w="{W}">{"<w:p><w:r>" * n}<w:t>sea</w:t>{"</w:r></w:p>" * n}</w:d>'
    assert read(tmp_path, "a.docx", packed({"word/document.xml": word})).documents[0].text == "sea"
    page = read(tmp_path, "a.html", "<div>" * n + "sea" + "</p></i>" * n)
    assert page.documents[0].text == "sea" and time.process_time() - started < 30


def test_no_pattern_crawls(tmp_path):
    started = time.process_time()
    tags = " ".join(["#" + "a" * 90] * 40)
    assert read(tmp_path, "a.md", f"x\n{tags}\n{tags} !").documents[0].text == f"x\n{tags} !"
    for piece in [
        " ",
        "\t",
        "[[",
        "%%",
        "#a ",
        "[a:: ",
        "(a",
        "a ",
        "- ",
        "`",
        "---\n",
        "a: ",
        "![[",
        "*",
        "<p ",
        "&",
        "<!--",
    ]:
        long = piece * 20_000
        for name in ("a.md", "a.txt", "a.html"):
            read(tmp_path, name, f"a{long}b"), read(tmp_path, name, f"---\n{long}b"), read(tmp_path, name, f"<{long}")
    assert time.process_time() - started < 30
