"""Mails: whole lists of who wrote what and when, by hand; real samples; broken files; files that want much memory."""

import base64
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.data.mail import conversation, mails_in, own_words, readable
from tinytrainer_nb.data.own_files import OwnFile, own_files

ROOT = Path(__file__).resolve().parent.parent
JAN_8 = 1704738360.0  # 2024-01-08 18:26:00 UTC


def read(folder: Path, name: str, data: bytes | str):
    "What a single file is taken for"
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    found, rest = mails_in(own_files(path))
    assert len(found) + len(rest) == 1
    return found[0] if found else None


def said(found) -> list[tuple]:
    return [(m.chat, m.author, m.time, m.text) for m in found.messages]


PLAIN = """From: =?utf-8?q?J=C3=BCrgen_Sand?= <juergen@example.org>
To: Omar <omar@example.org>
Subject: =?utf-8?b?UmU6IEdyw7zDn2U=?= aus
 =?iso-8859-1?q?K=F6ln?=
Date: Mon, 8 Jan 2024 19:26:00 +0100
Message-ID: <1@example.org>

Hi Omar,

  we came  late :-)
And HOW.

"""

MULTIPART = """From: Rosa <rosa@example.org>
Subject: Photos
Date: Mon, 8 Jan 2024 18:26:00 +0000
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="=_outer (1)"

This is a multi-part message in MIME format.

--=_outer (1)
Content-Type: multipart/alternative;
\tboundary=inner

--inner
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: quoted-printable

Here they are, with caf=C3=A9=
s.
--inner
Content-Type: text/html; charset=utf-8

<p>Not this one</p>
--inner--
--=_outer (1)
Content-Type: image/jpeg; name="a.jpg"
Content-Transfer-Encoding: base64
Content-Disposition: attachment; filename="a.jpg"

/9j/4AAQSkZJRg==
--=_outer (1)
Content-Type: text/plain; charset=utf-8
Content-Disposition: attachment; filename="list.txt"

no words of the mail
--=_outer (1)
Content-Type: text/plain; charset=utf-8

And after the picture.
--=_outer (1)
Content-Type: message/rfc822

From: Omar <omar@example.org>
Content-Type: text/plain

Not Rosa's.
--=_outer (1)--
"""

HTML = """From: rosa@example.org
Subject: AW: Tea
Date: Mon, 08 Jan 2024 18:26:00 GMT
Content-Type: text/html; charset="windows-1252"
Content-Transfer-Encoding: 8bit

<html><head><style>p { margin: 0 }</style><title>x</title></head><body>
<div style="display:none;max-height:0">preview</div>
<p class=MsoNormal>Yes \x96 at&nbsp;six.<o:p></o:p></p><p class=MsoNormal><o:p>&nbsp;</o:p></p>
<p class=MsoNormal>Bring:</p><ul><li>milk</li><li>sugar</li></ul>
<div class="gmail_signature">Rosa, Harbour 3</div>
<blockquote type="cite"><p>At six?</p></blockquote><div>See you</div>
<script>track()</script></body></html>
"""

FLOWED = """From: Omar <omar@example.org>
Subject: Walk
Date: Mon, 8 Jan 2024 18:26:00 +0000
Content-Type: text/plain; charset=us-ascii; format=flowed

We walked 
along the sea 
all day.
It rained.
> and? 
> more
 From there we went home.
--\x20
Omar
"""


@pytest.mark.parametrize(
    "data, expected",
    [
        (PLAIN, ("Grüße aus Köln", "Jürgen Sand", JAN_8, "Hi Omar,\n\n  we came  late :-)\nAnd HOW.")),
        (MULTIPART, ("Photos", "Rosa", JAN_8, "Here they are, with cafés.\n\nAnd after the picture.")),
        (
            HTML.encode("latin-1"),
            ("Tea", "rosa@example.org", JAN_8, "Yes – at six.\n\nBring:\n- milk\n- sugar\n\nSee you"),
        ),
        (FLOWED, ("Walk", "Omar", JAN_8, "We walked along the sea all day.\nIt rained.\n\nFrom there we went home.")),
    ],
    ids=["plain", "multipart", "html", "flowed"],
)
def test_a_mail(tmp_path, data, expected):
    found = read(tmp_path, "a.eml", data)
    assert (found.kind, found.source, said(found), found.left_out.total()) == ("mail", "a.eml", [expected], 0)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_do_not_matter(tmp_path, end):
    if end == "\r":
        found = read(tmp_path, "a.eml", PLAIN.replace("\n", end))
        assert found.messages or found.left_out
    else:
        assert (
            said(read(tmp_path, "a.eml", PLAIN.replace("\n", end)))[0][3] == "Hi Omar,\n\n  we came  late :-)\nAnd HOW."
        )


@pytest.mark.parametrize(
    "text, own",
    [
        ("Yes.\n\nOn Mon, 8 Jan 2024 at 18:26, Rosa <r@example.org> wrote:\n\n> Tea?\n> Now?", "Yes."),
        ("Yes.\n\nOn Mon, 8 Jan 2024 at 18:26, Rosa Sand-Haddad\n<r@example.org>\nwrote:\n\n> Tea?", "Yes."),
        ("Ja.\n\nAm 08.01.2024 um 18:26 schrieb Rosa Sand:\n> Tee?", "Ja."),
        ("Ja.\n\nAm Mo., 8. Jan. 2024 um 18:26 Uhr schrieb Rosa <\nr@example.org>:\n\n> Tee?", "Ja."),
        ("Oui.\n\nLe lun. 8 janv. 2024 à 18:26, Rosa <r@example.org> a écrit :\n\n> Du thé ?", "Oui."),
        ("Sim.\n\nEm seg., 8 de jan. de 2024 às 18:26, Rosa <r@example.org> escreveu:\n\n> Chá?", "Sim."),
        ("Tak.\n\npon., 8 sty 2024 o 18:26 Rosa <r@example.org> napisał(a):\n\n> Herbata?", "Tak."),
        ("Yes.\n\n-----Original Message-----\nFrom: Rosa\nSent: Monday\n\nTea?", "Yes."),
        ("Yes.\n\n________________________________\nFrom: Rosa\nSent: Monday\nTo: Omar\n\nTea?", "Yes."),
        ("Ja.\n\nVon: Rosa\nGesendet: Montag\nAn: Omar\nBetreff: Tee\n\nTee?", "Ja."),
        ("Oui.\n\nDe : Rosa\nEnvoyé : lundi\nÀ : Omar\n\nDu thé ?", "Oui."),
        ("See below.\n\n---------- Forwarded message ---------\nFrom: Rosa\n\nTea?", "See below."),
        ("On 8 Jan 2024 at 18:26, Rosa wrote:\n> Tea?\nYes.\n> Cake?\nTwo.", "Yes.\n\nTwo."),
        ("Top.\n\nOn 8 Jan 2024 at 18:26, Rosa wrote:\nTea?\nwithout marks", "Top."),
        ("Yes.\n-- \nRosa\nHarbour 3", "Yes."),
        ("Yes.\n\nSent from my iPhone", "Yes."),
        ("Ja.\n\nVon meinem iPhone gesendet\n\n> Am 8.1. schrieb Rosa:\n> Tee?", "Ja."),
        ("Yes.\n\nGet Outlook for Android", "Yes."),
        ("Yes.\n\n-Rosa", "Yes."),
        ("Yes.\n\nDate: Mon, 8 Jan 2024\nSubject: Tea\nFrom: r@example.org\nTo: o@example.org\n\nTea?", "Yes."),
        ("Да.\n\nОт: Роза\nОтправлено: понедельник\nКому: Омар\n\nЧай?", "Да."),
        (f"Yes.\n\nOn 8 Jan 2024 at 18:26, Rosa wrote:\n> {'tea ' * 20}\ncake?\n> Rosa\n", "Yes."),
        ("Yes.\n\n_______\nRosa Sand\nHarbour 3", "Yes."),
        # All of these are someone's own words
        ("On Monday I wrote:\na letter.", "On Monday I wrote:\na letter."),
        ("On the way\nI met Tom.\nHe wrote:\nnothing", "On the way\nI met Tom.\nHe wrote:\nnothing"),
        ("Bring:\n\n-eggs\n-milk", "Bring:\n\n-eggs\n-milk"),
        ("To: the sea\nFrom: here", "To: the sea\nFrom: here"),
        ("Date: Friday\nFrom: six\nTo: nine", "Date: Friday\nFrom: six\nTo: nine"),
        (">:( no", ">:( no"),
        ("Sent with love,\nRosa", "Sent with love,\nRosa"),
        ("one -- two\n- three\n--- four", "one -- two\n- three\n--- four"),
        ("You said at 10:30:\n> no\nbut I stayed", "You said at 10:30:\n\nbut I stayed"),
    ],
)
def test_own_words(text, own):
    assert own_words(text) == own


BOX = """From 1787@xxx Mon Jan 08 18:26:00 +0000 2024
X-GM-THRID: 1787
X-Gmail-Labels: Sent,Opened
From: Rosa <rosa@example.org>
Subject: The walk
Date: Mon, 8 Jan 2024 18:26:00 +0000

It was long.

From here we went on Mon at 10:30 in 2024.

From rosa@example.org Mon Jan  8 18:26:00 2024
is how a border looks like, without a header below it.

>From now on I walk.
>>From time to time.

From MAILER-DAEMON Tue Jan  9 07:00:00 2024
From: Omar Haddad <omar@example.org>
Subject: Re: The walk
Date: Tue, 9 Jan 2024 07:00:00 +0000

How far?

On Mon, 8 Jan 2024 at 18:26, Rosa <rosa@example.org> wrote:
> It was long.

From - Tue Jan 09 07:01:00 2024
From: Shop <news@example.org>
Subject: Sale
List-Unsubscribe: <mailto:off@example.org>

Buy!

From - Tue Jan 09 07:02:00 2024
From: Tom <tom@example.org>
Subject: Away
Auto-Submitted: auto-replied

I am away.

From - Tue Jan 09 07:03:00 2024
From: Bank <no-reply@example.org>
Subject: Your code

1234

From - Tue Jan 09 07:04:00 2024
From: Tom <tom@example.org>
Subject: Fwd: Sale

---------- Forwarded message ---------
From: Shop

Buy!

From tom@example.org Tue Jan  9 07:05:00 2024
From: Tom <tom@example.org>
Date: soon

no subject
"""
WALK = (
    "It was long.\n\nFrom here we went on Mon at 10:30 in 2024.\n\n"
    "From rosa@example.org Mon Jan  8 18:26:00 2024\nis how a border looks like, without a header below it.\n\n"
    "From now on I walk."  # `>>From` was a line that began with `>`
)


@pytest.mark.parametrize("name", ["All mail Including Spam and Trash.mbox", "Inbox", "box.txt"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_mailbox(tmp_path, name, end):
    found = read(tmp_path, name, BOX.replace("\n", end))
    assert found.kind == "mailbox" and found.user == "Rosa"
    assert said(found) == [
        ("The walk", "Rosa", JAN_8, WALK),
        ("The walk", "Omar Haddad", 1704783600.0, "How far?"),
        ("(no subject)", "Tom", None, "no subject"),
    ]
    assert dict(found.left_out) == {
        "a newsletter, or a program's mail": 3,
        "a mail without words of its sender": 1,
    }


def test_subjects_name_conversations():
    for subject in ("Tea", "Re: Tea", "RE: AW: Tea", "Fwd: Re[3]: Tea", "WG: SV: Tea", "re:re:Tea", "Re : Tea"):
        assert conversation(subject) == "Tea"
    assert conversation("Regarding: Tea") == "Regarding: Tea" and conversation("Re:") == "(no subject)"


def test_html():
    page = readable("<h1>A</h1><p>b<br>c</p><ol><li>x<li><p>y</p></ol><pre>  1\n 2</pre><p>a\n   b <b>c</b>d</p>")
    assert page.text == "A\n\nb\nc\n\n1. x\n2. y\n\n  1\n 2\n\na b cd"
    assert readable("<div>Hello</div><div><br></div><div>there</div>").text == "Hello\n\nthere"
    assert readable("a<span hidden>b</span><noscript>c</noscript>d &amp; &#x1F642; &lt;p&gt;").text == "ad & 🙂 <p>"
    assert readable("5 < 6 and a<b").text == "5 < 6 and a"


def test_other_files_are_left(tmp_path):
    for name, text in [
        ("chat.txt", "08.01.24, 18:26 - Rosa: Hi"),
        ("letter.txt", "From: me\nDate: today\n\nHi"),
        ("a.json", "{}"),
        ("a.bin", "\0\0"),
        ("empty.txt", ""),
        ("From.txt", "From here we walked.\n\nOn."),
    ]:
        (tmp_path / name).write_text(text)
    files = own_files(tmp_path)
    assert mails_in(files) == ([], files)


def test_mails_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "takeout.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("Takeout/Mail/All mail.mbox", BOX)
        z.writestr("Takeout/a.eml", PLAIN)
    found, rest = mails_in(own_files(tmp_path / "takeout.zip"))
    assert [(f.kind, len(f.messages)) for f in found] == [("mail", 1), ("mailbox", 3)] and not rest


def test_a_missing_file_is_a_note(tmp_path):
    found, _ = mails_in([OwnFile("gone.mbox", tmp_path / "gone.mbox")])
    assert len(found[0].notes) == 1 and "\n" not in found[0].notes[0] and "gone.mbox" in found[0].notes[0]


@pytest.mark.shared
def test_the_real_sample(shared):
    found, rest = mails_in(own_files(shared / "data" / "own_writing"))
    assert [(f.kind, f.source) for f in found] == [("mail", "email/gmail.eml")] and len(rest) == 8
    assert said(found[0]) == [("Test", "Megan One", 1333383712.0, "Hello")]


@pytest.mark.parametrize("n", [200, 20_000])
def test_parts_in_parts(tmp_path, n):
    "Too deep for a parser that calls itself"
    head = "From: Rosa <rosa@example.org>\n"
    deep = "".join(f"Content-Type: multipart/mixed; boundary=b{i}\n\n--b{i}\n" for i in range(n))
    found = read(tmp_path, "a.eml", f"{head}{deep}Content-Type: text/plain\n\nHi\n")
    assert found.messages or found.left_out


def test_hostile_mails_are_counted(tmp_path):
    started = time.process_time()
    for text in (
        "Content-Type: multipart/mixed; boundary=x\n\n" + "--x\n\n" * 300_000,
        "Content-Type: x" + '; ";' * 400_000 + "\n\nHi",
        "Content-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: x;\n" + ' "; ;\n' * 200_000 + "\nHi",
        "a:\n" * 600_000 + "\nHi",
        "X: y\n\n" + "word " * 10**6,
        "X: y\n\nHi" + "\n" * 1_900_000,
        "X: y\n\nHi" + "\nSent from my iPhone" * 90_000,
    ):
        found = read(tmp_path, "a.eml", f"From: Rosa <rosa@example.org>\n{text}")
        assert found.messages or found.left_out.total() == 1
    assert time.process_time() - started < 20


def mutated(data: bytes, r: random.Random) -> bytes:
    "A file that was damaged on its way"
    some = data.decode("utf-8", "replace")
    kinds = [
        lambda: data[: r.randrange(len(data))],
        lambda: data[r.randrange(len(data)) :],
        lambda: some.encode(r.choice(["utf-16", "utf-16-le", "cp1252", "utf-32", "utf-8-sig"]), "replace"),
        lambda: data.replace(b"\n", r.choice([b"\r\n", b"\r", b"\n\n", b""])),
        lambda: b"".join(bytes([b, 0]) if r.random() < 0.02 else bytes([b]) for b in data),
        lambda: bytes(r.randrange(256) if r.random() < 0.03 else b for b in data),
        lambda: b"".join(sorted(data.splitlines(True), key=lambda _: r.random())),
    ]
    data = r.choice(kinds)()
    return data


def test_200_damaged_files(tmp_path):
    r, started = random.Random(17), time.process_time()
    samples = [
        (n, t.encode("latin-1" if t is HTML else "utf-8"))
        for n, t in [("a.eml", PLAIN), ("a.eml", MULTIPART), ("a.eml", HTML), ("a.eml", FLOWED), ("a.mbox", BOX)]
    ]
    for i in range(200):
        name, data = samples[i % len(samples)]
        for _ in range(r.choice([1, 1, 2, 3])):
            data = mutated(data or b"x", r)
        try:
            found = read(tmp_path, name, data)
        except TinyTrainerError as e:
            assert "\n" not in str(e)
            continue
        assert found.messages or found.left_out or found.notes
        assert not any("\n" in note for note in found.notes)
        assert all(m.text.strip() == m.text and "\0" not in m.text for m in found.messages)
    assert time.process_time() - started < 60


def test_no_pattern_crawls(tmp_path):
    started = time.process_time()
    pieces = [
        " ",
        "\t",
        "On ",
        "> ",
        "-",
        "=?utf-8?q?a",
        "a@b ",
        "<",
        "<p ",
        "<!--",
        "&",
        "&#",
        "Re:",
        "(",
        '"',
        "=",
        "_",
    ]
    for piece in pieces:
        long = piece * 20_000
        own_words(f"a{long}b"), readable(f"a{long}b"), conversation(long)
        read(
            tmp_path, "a.eml", f"From: {long}\nSubject: {long}\nDate: {long}\nContent-Type: text/html; {long}\n\n{long}"
        )
        read(tmp_path, "a.mbox", f"From {long}\nFrom: {long}\n\n{long}\n\nFrom a@b Mon {long} 2024\n")
    assert time.process_time() - started < 40


LARGE = """
import sys
from pathlib import Path
from tinytrainer_nb.data.mail import mails_in
from tinytrainer_nb.data.own_files import own_files
found, _ = mails_in(own_files(sys.argv[1]))
print(len(found[0].messages), found[0].left_out.total(), len(found[0].notes))
print(next(int(line.split()[1]) // 1024 for line in Path("/proc/self/status").open() if line.startswith("VmHWM")))
"""


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory in /proc")


@NEEDS_PROC
@pytest.mark.parametrize("head, expected", [(BOX, "2 5 0"), ("", "0 0 1")], ids=["mails, then a hole", "a hole"])
def test_a_sparse_mailbox_of_a_gigabyte(tmp_path, head, expected):
    with open(tmp_path / "a.mbox", "wb") as f:
        f.write(head.encode())
        f.truncate(2**30)
    script = [sys.executable, "-c", LARGE, str(tmp_path / "a.mbox")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120)
    counts, megabytes = done.stdout.split("\n")[:2]
    assert counts == expected and int(megabytes) < 300


@NEEDS_PROC
def test_an_attachment_is_not_held(tmp_path):
    picture = base64.encodebytes(bytes(30 * 2**20))
    mail = MULTIPART.encode().replace(b"/9j/4AAQSkZJRg==\n", picture)
    (tmp_path / "a.eml").write_bytes(mail)
    assert len(mail) > 40e6
    script = [sys.executable, "-c", LARGE, str(tmp_path / "a.eml")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120)
    counts, megabytes = done.stdout.split("\n")[:2]
    assert counts == "1 0 0" and int(megabytes) < 100
