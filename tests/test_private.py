"""Private things: found in ordinary prose, not found where there are none, replaced the same way everywhere."""

import ipaddress
import json
import random
import re
import stat
import time

import pytest

from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.data.private import (
    KINDS,
    Item,
    Replacer,
    Scanner,
    masked,
    private_report,
)

PEOPLE = ["Rosa Lind", "Omar Haddad", "Lena von Berg", "Tom", "May", "Will Carter", "Rose"]
REGIONS = ["DE", "FR", "US"]
PLANTED = [  # a text, the kind of its only item beside names, and that item
    ("I met Rosa Lind at the harbour, and she was late.", "name", "Rosa Lind"),
    ("Gestern hat Lena von Berg den Kuchen gebacken.", "name", "Lena von Berg"),
    ("Omar dit que la mer est froide.", "name", "Omar"),
    ("You can write to rosa.lind@post.example.com any time.", "e-mail", "rosa.lind@post.example.com"),
    ("Schreib mir an lena-berg_77@müller.example.de, ja?", "e-mail", "lena-berg_77@müller.example.de"),
    ("My number is +44 7700 900123, call after six.", "phone", "+44 7700 900123"),
    ("Ruf mich an: 030 23125 456, aber nicht am 12.05.2024.", "phone", "030 23125 456"),
    ("Mon numéro : 06 39 98 12 34, après 18:30.", "phone", "06 39 98 12 34"),
    ("Llámame al +34 612 345 678 mañana.", "phone", "+34 612 345 678"),
    ("Just call (202) 555-0175 and ask for Tom's brother.", "phone", "(202) 555-0175"),
    ("The card is 4242 4242 4242 4242, valid until 12/27.", "card", "4242 4242 4242 4242"),
    ("Die Karte 3782-822463-10005 ist gesperrt.", "card", "3782-822463-10005"),
    ("Bitte auf DE89 3704 0044 0532 0130 00 überweisen.", "IBAN", "DE89 3704 0044 0532 0130 00"),
    ("Mon compte est FR1420041010050500013M02606.", "IBAN", "FR1420041010050500013M02606"),
    ("The router answers at 192.168.178.23, most days.", "IP address", "192.168.178.23"),
    ("El servidor está en 2001:db8:85a3::8a2e:370:7334.", "IP address", "2001:db8:85a3::8a2e:370:7334"),
    ("She moved to 12 Baker Street in May.", "address", "12 Baker Street"),
    ("Wir wohnen jetzt in der Hauptstraße 5, 12345 Neustadt.", "address", "Hauptstraße 5, 12345 Neustadt"),
    ("On se voit au 12 rue de la Paix, 75002 Paris.", "address", "12 rue de la Paix, 75002 Paris"),
    ("Vivo en la Calle Mayor 12, 28013 Madrid.", "address", "Calle Mayor 12, 28013 Madrid"),
    ("Use the key sk-proj-Ab12Cd34Ef56Gh78Ij90 for now.", "key", "sk-proj-Ab12Cd34Ef56Gh78Ij90"),
    (
        "Mein Token ist ghp_16C7e42F292c6912E7710c838347Ae178B4a, pst.",
        "key",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
    ),
    ("The wifi password: seagull-77 if you need it.", "password", "seagull-77"),
    ("Passwort: Seegras", "password", "Seegras"),
    ("Le mot de passe : m0uette! pour toi.", "password", "m0uette!"),
    ("La contraseña es gaviota99, no la digas.", "password", "gaviota99"),
    (
        "Here: https://example.com/s/photos?id=7&token=a8f3kd93 for you.",
        "link with a token",
        "https://example.com/s/photos?id=7&token=a8f3kd93",
    ),
    (
        "Komm dazu: https://chat.example.com/Kd83jF02mXq7Lw5RtZ1bNe",
        "link with a token",
        "https://chat.example.com/Kd83jF02mXq7Lw5RtZ1bNe",
    ),
    (
        "Clone ftp://omar:krill5@files.example.com/box first.",
        "link with a token",
        "ftp://omar:krill5@files.example.com/box",
    ),
    ("We sold the BLUE heron last week.", "own list", "BLUE heron"),
]
NOTHING = """In 2024-03-12 at 12:30 we had 352 + 82 = 434, #### 786 and 1.250.000 or 1,250,000 euros.
ISBN 978-3-16-148410-0, version 1.2.3.4, v10.0.19.1, section 2.3.4.1, 12:30:45, std::vector<int> a::b ::std x::y.
May I go? Will it rain? A rose is a rose. Rose petals fell in May. The mark was 7 of 10.
The password: the thing you forget. Passwort: siehe oben, bitte. password: required
My pin is broken. 24.12.2023 12/24/2023 1990-2024 2020/2021 100 200 300, 10 000 000 000.
https://example.org/how-to-sail-2024 https://example.org/page?id=7&lang=de #123456789 0.123456789 3.14159265358979
There were 12 Street lamps, 5 Way points, Parkplatz 5, Spring 2024, Kapitel 3, 12345 Leute. 15 places libres, 3 rue.
order 12345678901234, 1234567890123456, Bearer of bad news, risk-free, sk-, eyJ, hf_, AKIA.
icon@2x.png @rosa user@ @host a@b 99.9% 50:50 16:9 $1,234,567.89 Nr. 12345678 ID 987654321
"""
LINES = {
    "digits": "1" * 20_000,
    "blanks": " " * 20_000,
    "half addresses": "a@" * 20_000,
    "colons": "::" * 20_000,
    "digits and blanks": "1 " * 20_000,
    "groups of four": "1234 " * 5_000,
    "zeros": "00 " * 9_000,
    "letters": "a" * 20_000,
    "dots": "1." * 20_000,
    "brackets": "(0" * 10_000,
    "key": "-----BEGIN PRIVATE KEY-----\n" * 2_000,
    "token": "token=" * 5_000,
    "jwt": "eyJ" * 10_000,
    "links": "http://" * 5_000,
    "capitals": "Ab " * 10_000,
    "streets": "12 " + "Baker " * 10_000,
    "hyphens": "Ab-" * 10_000,
    "passwords": "password: " * 5_000,
    "mail": "a@" + "b." * 10_000,
    "country codes": "+49 30 " * 5_000,
    "accounts": "DE89 " * 5_000,
    "hex": "ab:" * 10_000,
    "names": "Rosa " * 5_000,
}


@pytest.fixture(scope="module")
def scanner():
    return Scanner(PEOPLE, ["blue heron"], REGIONS)


def texts_of(items, kind=None):
    return [i.text for i in items if kind in (None, i.kind)]


@pytest.mark.parametrize("text, kind, wanted", PLANTED, ids=[wanted[:30] for _, _, wanted in PLANTED])
def test_planted_items_are_found(scanner, text, kind, wanted):
    found = [i for i in scanner.scan(text) if i.kind == kind or i.kind != "name"]
    assert found == [Item(kind, wanted, text.index(wanted), text.index(wanted) + len(wanted))]


def test_every_kind_is_planted():
    assert {kind for _, kind, _ in PLANTED} == set(KINDS)


def test_prose_numbers_and_code_hold_nothing(scanner):
    assert scanner.scan(NOTHING) == []


@pytest.mark.shared
def test_shakespeare_has_no_secrets(shared):
    text = (shared / "data" / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    began = time.process_time()
    found = Scanner().scan(text)
    assert len(found) <= 3 and time.process_time() - began < 10, found
    assert len(Scanner(regions=REGIONS).scan(text)) <= 3


@pytest.mark.shared
def test_word_problems_have_no_secrets(shared):
    with open(shared / "data" / "gsm8k" / "train.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line, _ in zip(f, range(2000))]
    for scanner in (Scanner(), Scanner(regions=["DE", "US", "GB", "FR", "ES"])):
        found = [item for row in rows for text in row.values() for item in scanner.scan(text)]
        assert len(found) <= 20, found


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_no_line_makes_a_pattern_crawl(scanner, line):
    began = time.process_time()
    scanner.scan(line)
    assert time.process_time() - began < 1


# Names


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Will you? I will. In May a rose grew. Rose petals fell. The Carter is a trade.", []),
        ("Hi Will, how are you?", ["Will"]),
        ("Thanks Rose!\nMay I?", ["Rose"]),
        ("@May look", []),
        ("@May, look", ["May"]),
        ("Will Carter and Carter, Will came", ["Will Carter", "Carter, Will"]),
        ("Lind, Rosa; Rosa's; Rosalind; ROSA; rosa", ["Lind, Rosa", "Rosa"]),
        ("Rosa\nLind", ["Rosa\nLind"]),
        ("Lena Berg on the Berg", ["Lena Berg"]),
        ("Omar-Haddad", ["Omar", "Haddad"]),
    ],
)
def test_names(scanner, text, wanted):
    assert texts_of(scanner.scan(text)) == wanted


def test_names_of_two_letters_numbers_and_addresses_are_none():
    scanner = Scanner(["Al", "B", "+49 30 23125 1", "rosa@example.com", "🌸", "", "~ Omar 🌊", "J. K. Haddad"])
    text = "Al B rosa example 23125 Omar Haddad J. K. Haddad"
    assert texts_of(scanner.scan(text)) == ["Omar", "Haddad", "J. K. Haddad"]


def test_thousands_of_authors_take_no_longer():
    rng = random.Random(0)
    names = ["".join(rng.choices("abcdefgh", k=7)).title() + " Lind" for _ in range(5_000)]
    scanner = Scanner(names)
    began = time.process_time()
    assert scanner.scan("The sea was grey, and nobody came. " * 3_000) == []
    assert time.process_time() - began < 5


def test_scripts_without_blanks():
    text = "昨天王小明来了，我们去了蓝鹭公园。"
    assert texts_of(Scanner(["王小明"], ["蓝鹭公园"]).scan(text)) == ["王小明", "蓝鹭公园"]


def test_own_list_is_whole_words_whatever_the_case():
    scanner = Scanner(own=["Blue Heron", "c++", "  ", "#42", "müller"])
    text = "blue\n heron, BLUE HERON, blue herons, C++ and C, #42, 42, MÜLLER"
    assert texts_of(scanner.scan(text)) == ["blue\n heron", "BLUE HERON", "C++", "#42", "MÜLLER"]


# Overlaps


def test_the_longer_wins_and_nothing_is_left_between():
    scanner = Scanner(["Rosa Lind"], ["Lind project", "example"])
    text = "Rosa Lind project, rosa@example.com, https://rosa:pw@example.com/?token=abcd1234"
    found = scanner.scan(text)
    assert [(i.kind, i.text) for i in found] == [
        ("name", "Rosa"),
        ("own list", "Lind project"),
        ("e-mail", "rosa@example.com"),
        ("link with a token", "https://rosa:pw@example.com/?token=abcd1234"),
    ]


# Hard cases


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("ping 10.0.0.1 and 203.0.113.7:8080", ["10.0.0.1", "203.0.113.7"]),
        ("fe80::1, 2001:db8::1: both", ["fe80::1", "2001:db8::1"]),
        ("999.1.1.1 1.2.3.4.5 1.2.3", []),
        ("version 8.8.8.8, v1.2.3.4, §1.2.3.4, Kapitel 1.2.3.4", []),
        ("1.2.3.4 Background", []),
        ("8.8.8.8 is a name server", ["8.8.8.8"]),
        ("00:1a:2b:3c:4d:5e 12:30:45 ::1 face::book", []),
        ("4111111111111111 and 4111111111111112", ["4111111111111111"]),
        ("on 4111-1111-1111-1111 123", ["4111-1111-1111-1111"]),
        ("gb82west12345698765432", ["gb82west12345698765432"]),
        ("GB82 WEST 1234 5698 7654 33", []),
        ("0049 30 23125 456", ["0049 30 23125 456"]),
        ("+49 (0)30 23125 456.", ["+49 (0)30 23125 456"]),
        ("Am Markt 3, 12345 Köln und Kapitel 3, 12345 Leute", ["Am Markt 3, 12345 Köln"]),
        ("Rosenweg 5a, Lange Straße 12, Sitzplatz 5", ["Rosenweg 5a", "Lange Straße 12"]),
        (
            "10 Elm St, Springfield, IL 62704; 221 Hill Road, London NW1 6XE",
            ["10 Elm St, Springfield, IL 62704", "221 Hill Road, London NW1 6XE"],
        ),
        ('{"password": "hunter22", "user": "x"}', ["hunter22"]),
        ("DB_PASSWORD=tide99; password = get_password()", ["tide99"]),
        ("**Password:** tide99x", ["tide99x"]),
        ("PIN: 4711, spin: 4711", ["4711"]),
        ("Authorization: Bearer abcdef1234567890xyz", ["abcdef1234567890xyz"]),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"]),
        (
            "https://a.example/123e4567-e89b-12d3-a456-426614174000.",
            ["https://a.example/123e4567-e89b-12d3-a456-426614174000"],
        ),
    ],
)
def test_hard_cases(text, wanted):
    assert texts_of(Scanner(regions=["DE"]).scan(text)) == wanted


def test_a_key_in_lines_is_one_item_and_ends_in_prose():
    block = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEA0123\n" * 3 + "-----END RSA PRIVATE KEY-----"
    assert texts_of(Scanner().scan(f"Here:\n{block}\nDone.")) == [block]
    cut = block.rpartition("\n")[0]
    assert texts_of(Scanner().scan(f"{cut}\n\nAnd: more prose.")) == [cut]


def test_an_unknown_country_is_one_line():
    for make in (Scanner, Replacer):
        with pytest.raises(TinyTrainerError, match="two letters each") as e:
            make(regions=["Ger\nmany"])
        assert "\n" not in str(e.value)


# Replaced


def everything():
    return "\n".join(text for text, _, _ in PLANTED)


def is_luhn(number):
    digits = [int(d) for d in number if d.isdigit()][::-1]
    return sum(d if i % 2 == 0 else d * 2 // 10 + d * 2 % 10 for i, d in enumerate(digits)) % 10 == 0


def is_iban(number):
    number = number.replace(" ", "")
    moved = number[4:] + number[:4]
    return int("".join(c if c.isdigit() else str(ord(c) - 55) for c in moved)) % 97 == 1


def shape(text):
    return "".join("9" if c.isdigit() else "a" if c.isalpha() else c for c in text)


def test_after_replacing_no_original_is_found(scanner):
    text = everything()
    replacer = Replacer(regions=REGIONS)
    changed = replacer.replace(text, scanner.scan(text))
    assert not set(texts_of(scanner.scan(changed))) & set(replacer.map)
    for _, _, wanted in PLANTED:
        assert wanted not in changed
    assert len(changed.splitlines()) == len(PLANTED)
    values = list(replacer.map.values())
    assert len(set(values)) == len(values) and not set(values) & set(replacer.map)


def test_values_have_the_form_of_their_kind(scanner):
    replacer = Replacer(regions=REGIONS)
    replacer.invent(scanner.scan(everything()))
    found = {}
    for _, kind, wanted in PLANTED:
        found.setdefault(kind, []).append((wanted, replacer.map[wanted]))
    for old, new in found["card"]:
        assert is_luhn(new) and shape(new) == shape(old) and new[0] == old[0]
    for old, new in found["IBAN"]:
        assert is_iban(new) and shape(new) == shape(old) and new[:2] == old[:2]
    for old, new in found["IP address"]:
        assert ipaddress.ip_address(new) in ipaddress.ip_network("2001:db8::/32" if ":" in old else "192.0.2.0/24")
    assert all(re.fullmatch(r"[a-z]+\d{3}@example\.org", new) for _, new in found["e-mail"])
    for kind in ("key", "password", "phone"):
        assert all(shape(new) == shape(old) for old, new in found[kind])
    numbers = dict(found["phone"])
    assert re.fullmatch(r"\+44 7700 900\d{3}", numbers["+44 7700 900123"])
    assert re.fullmatch(r"06 39 98 \d\d \d\d", numbers["06 39 98 12 34"])
    assert re.fullmatch(r"\(\d{3}\) 555-01\d\d", numbers["(202) 555-0175"])
    links = dict(found["link with a token"])
    assert links["https://example.com/s/photos?id=7&token=a8f3kd93"].startswith("https://example.org/")
    assert "&token=" in links["https://example.com/s/photos?id=7&token=a8f3kd93"]
    assert dict(found["address"])["12 Baker Street"].endswith(" Street")


def test_names_agree_with_their_parts():
    scanner, replacer = Scanner(["Rosa K. Lind", "Lena von Berg"]), Replacer()
    text = "Rosa K. Lind, then Rosa, then Lind, Rosa and Rosa Lind. Lena von Berg is Lena."
    changed = replacer.replace(text, scanner.scan(text))
    rosa, lind, lena, berg = (replacer.map[name] for name in ("Rosa", "Lind", "Lena", "Berg"))
    initial = replacer.map["Rosa K. Lind"].split()[1]
    assert changed == (
        f"{rosa} {initial} {lind}, then {rosa}, then {lind}, {rosa} and {rosa} {lind}. {lena} von {berg} is {lena}."
    )
    assert initial != "K." and re.fullmatch(r"[A-Z]\.", initial)
    assert all(name.istitle() for name in (rosa, lind, lena, berg))


def test_own_words_keep_their_case():
    scanner, replacer = Scanner(own=["bluebird"]), Replacer()
    text = "bluebird Bluebird BLUEBIRD"
    low, title, high = replacer.replace(text, scanner.scan(text)).split()
    assert low.islower() and title == low.capitalize() and high == low.upper()


def test_values_stay_the_same(scanner, tmp_path):
    text, replacer = everything(), Replacer(seed=3, regions=REGIONS)
    items = scanner.scan(text)
    changed = replacer.replace(text, items)
    assert replacer.replace(text, items) == changed
    again = Replacer.load(replacer.save(tmp_path / "deep" / "names.json"))
    assert (again.map, again.seed, again.regions) == (replacer.map, 3, ("DE", "FR", "US"))
    assert again.replace(text, items) == changed
    more = "Tom wrote to nobody@example.com."
    assert again.replace(more, scanner.scan(more)) == replacer.replace(more, scanner.scan(more))
    assert Replacer(seed=3, regions=REGIONS).replace(text, items) == changed
    assert Replacer(seed=4, regions=REGIONS).replace(text, items) != changed


def test_what_was_invented_stays(scanner):
    text, replacer = everything(), Replacer(regions=REGIONS)
    changed = replacer.replace(text, scanner.scan(text))
    table = dict(replacer.map)
    wider = Scanner([*PEOPLE, *(value for value in table.values() if value.istitle())], regions=REGIONS)
    assert replacer.replace(changed, [i for i in wider.scan(changed) if i.text in table.values()]) == changed
    assert replacer.map == table


def test_the_table_is_for_its_owner(tmp_path):
    replacer = Replacer()
    replacer.invent([Item("name", "Rosa", 0, 4)])
    path = tmp_path / "names.json"
    path.write_text("{}")
    path.chmod(0o644)
    assert replacer.save(path) == path and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["names.json"]
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    target.write_text("kept")
    link.symlink_to(target)
    replacer.save(link)
    assert target.read_text() == "kept" and not link.is_symlink()
    with pytest.raises(TinyTrainerError, match="cannot be written"):
        replacer.save(path / "below")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"seed": 0, "regions": [], "map": {"a": 1}}',
        '{"seed": "0", "regions": [], "map": {}}',
        '{"seed": 0, "regions": ["XX"], "map": {}}',
        '{"seed": 0, "regions": [], "map": {"a": "c", "b": "c"}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, content):
    path = tmp_path / "names.json"
    path.write_text(content)
    with pytest.raises(TinyTrainerError) as e:
        Replacer.load(path)
    assert "\n" not in str(e.value)


def test_two_originals_never_share_a_value():
    rng, replacer = random.Random(0), Replacer(regions=["DE"])
    items = [Item("IP address", f"10.0.{i // 250}.{i % 250}", 0, 0) for i in range(1_500)]
    items += [Item("password", f"{i:04}", 0, 0) for i in range(0, 10_000, 5)]
    items += [Item("phone", f"0171 39200{i:02}", 0, 0) for i in range(100)]
    items += [Item("name", "".join(rng.choices("abcdefghijk", k=6)).title(), 0, 0) for _ in range(2_000)]
    table = replacer.invent(items)
    assert {i.text for i in items} <= set(table)
    assert len(set(table.values())) == len(table) and not set(table.values()) & set(table)


def test_items_of_another_text_are_refused():
    replacer, items = Replacer(), [Item("name", "Rosa", 0, 4)]
    with pytest.raises(TinyTrainerError, match="another item") as e:
        replacer.replace("Omar", items)
    assert "Rosa" not in str(e.value) and replacer.map == {}
    with pytest.raises(TinyTrainerError):
        replacer.replace("Rosa", items * 2)


# Shown


def test_the_report_counts_and_masks(scanner):
    texts = ["The sea.", *(text for text, _, _ in PLANTED), "Omar | <b>rosa@example.com</b> | x"]
    report = private_report(texts, scanner)
    assert report.texts == len(texts) and report.rows == list(range(1, len(texts)))
    wanted = {kind: sum(k == kind for _, k, _ in PLANTED) for kind in KINDS}
    assert {k: n for k, n in report.counts.items() if k not in ("name", "e-mail")} == {
        k: n for k, n in wanted.items() if k not in ("name", "e-mail")
    }
    assert report.counts["e-mail"] == wanted["e-mail"] + 1
    for shown in (str(report), repr(report), report._repr_markdown_()):
        assert not [text for _, _, text in PLANTED if text in shown]
    assert "e-mail: 3 (ro***@pos***, le***@mül***, ro***@exa***)" in str(report)
    assert report._repr_markdown_().splitlines()[1] == "| --- | --- |"
    assert all(line.count("|") == 3 for line in report._repr_markdown_().splitlines())
    assert "May" in report.details()["found only in full names and greetings"]
    assert str(private_report([], scanner)).splitlines()[1] == "  texts with any: 0 of 0"


def test_masks_show_little():
    assert masked("rosa@example.org") == "ro***@exa***"
    assert masked("hunter2") == "h***" and masked("ab") == "a***"
    assert masked("a\nb") == "a*** b***" and masked("") == ""


def test_two_hundred_damaged_texts(scanner):
    rng, text = random.Random(0), everything() + NOTHING
    for _ in range(200):
        start = rng.randrange(len(text) - 400)
        some = list(text[start : start + 400])
        for _ in range(rng.randrange(40)):
            at = rng.randrange(len(some))
            some[at] = rng.choice(
                ["", "\0", "\ud800", "٣", "²", "İ", "ß", "\n", " ", "@", "+", ":", "1", "-----", some[at] * 3]
            )
        damaged = "".join(some)
        items = scanner.scan(damaged)
        assert all(damaged[i.start : i.end] == i.text and i.start < i.end for i in items)
        assert all(a.end <= b.start for a, b in zip(items, items[1:]))
        replacer = Replacer(regions=REGIONS)
        changed = replacer.replace(damaged, items)
        assert not set(texts_of(scanner.scan(changed))) & {i.text for i in items}
