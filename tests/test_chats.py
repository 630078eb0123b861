"""Exports of chats: each message and nothing else, by lists written by hand; damage ends in a finding or one line."""

import json
import random
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.data import messengers
from tinytrainer_nb.data.chats import looks_like_chat, whatsapp
from tinytrainer_nb.data.messengers import chats_in, export_in
from tinytrainer_nb.data.own_files import OwnFile, own_files

LRM, NARROW = "\u200e", "\u202f"


def at(text: str) -> float:
    "Seconds of a time in UTC"
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def file_of(folder: Path, name: str, content) -> OwnFile:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return own_files(path)[0]


def said(found) -> list[tuple]:
    return [(m.author, m.text) for m in found.messages]


def timed(found) -> list[tuple]:
    return [(m.time, m.author, m.text) for m in found.messages]


# WhatsApp: the beginnings of lines

EVENING = "2024-03-13 21:15:00"
BEGINNINGS = {
    "iOS, day first, dots": "[13.03.24, 21:15:00] Rosa: hi",
    "iOS, with a mark in front": f"{LRM}[13.03.24, 21:15:00] Rosa: hi",
    "iOS, month first, 12 hours, narrow blank": f"[3/13/24, 9:15:00{NARROW}PM] Rosa: hi",
    "iOS, year first": "[2024/3/13, 21:15:00] Rosa: hi",
    "iOS, year first, dashes": "[2024-03-13, 21:15:00] Rosa: hi",
    "iOS, without a comma": "[13/03/2024 21:15:00] Rosa: hi",
    "iOS, Finnish": "[13.3.2024 klo 21.15.00] Rosa: hi",
    "iOS, Korean": "[2024. 3. 13. 오후 9:15:00] Rosa: hi",
    "Android, day first": "13/03/24, 21:15 - Rosa: hi",
    "Android, four digits": "13/03/2024, 21:15 - Rosa: hi",
    "Android, dots": "13.03.24, 21:15 - Rosa: hi",
    "Android, dashes": "13-03-2024 21:15 - Rosa: hi",
    "Android, year first": "2024-03-13 21:15 - Rosa: hi",
    "Android, am and pm": "3/13/24, 9:15 PM - Rosa: hi",
    "Android, lower case, narrow blank": f"13/03/2024, 9:15{NARROW}pm - Rosa: hi",
    "Android, with dots": "13/3/24, 9:15 p.m. - Rosa: hi",
    "Android, Spanish": "13/3/24 9:15 p.\u00a0m. - Rosa: hi",
    "Android, seconds": "13/03/24, 21:15:00 - Rosa: hi",
    "Android, German with 12 hours": "13.03.24, 9:15 nachm. - Rosa: hi",
    "Android, Chinese": "2024/3/13 下午9:15 - Rosa: hi",
    "Android, Chinese of Taiwan": "2024/3/13, 晚上9:15 - Rosa: hi",
    "Android, Bulgarian": "13.03.24 г., 21:15 - Rosa: hi",
    "Android, Hungarian": "2024. 03. 13. 21:15 - Rosa: hi",
    "iOS, French of Canada": "[2024-03-13, 21 h 15 min 00 s] Rosa: hi",
    "Android, Malay": "13/03/24, 9:15 PTG - Rosa: hi",
    "Android, Arabic digits": "١٣\u200f/٣\u200f/٢٠٢٤، ٩:١٥ م - Rosa: hi",
    "a name that is in no list of contacts": f"13/03/24, 21:15 - ~{NARROW}Rosa: hi",
}


@pytest.mark.parametrize("line", BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_line_begins_in_every_way(tmp_path, line):
    found = whatsapp(file_of(tmp_path, "_chat.txt", f"{line}\nthere\n"))
    assert timed(found) == [(at(EVENING), "Rosa", "hi\nthere")]
    assert found.kind == "WhatsApp chat" and not found.notes and not found.left_out


@pytest.mark.parametrize(
    "clock, hour", [("12:15 am", 0), ("12:15 PM", 12), ("1:15 a.m.", 1), ("11:15 p. m.", 23), ("00:15", 0)]
)
def test_midnight_and_noon(tmp_path, clock, hour):
    found = whatsapp(file_of(tmp_path, "_chat.txt", f"13/03/24, {clock} - Rosa: hi"))
    assert timed(found) == [(at("2024-03-13") + hour * 3600 + 15 * 60, "Rosa", "hi")]


@pytest.mark.parametrize(
    "dates, first",
    [
        (["01/02/24", "13/02/24"], "2024-02-01"),  # 13 is no month
        (["1/2/24", "1/13/24"], "2024-01-02"),
        (["11/3/24", "12/3/24", "1/4/24"], "2024-03-11"),  # as mdy it would go back in time
        (["3/11/24", "3/12/24", "4/1/24"], "2024-03-11"),
        (["24/2/28", "24/2/29", "24/3/1", "24/3/2"], "2024-02-28"),  # the year first, in two digits
    ],
)
def test_day_and_month_are_told_apart_by_the_whole_file(tmp_path, dates, first):
    text = "".join(f"{date}, 10:00 - Rosa: hi\n" for date in dates)
    found = whatsapp(file_of(tmp_path, "_chat.txt", text))
    assert found.messages[0].time == at(f"{first} 10:00") and not found.notes
    assert len(found.messages) == len(dates)


def test_where_nothing_tells_day_and_month_apart_it_says_so(tmp_path):
    file = file_of(tmp_path, "_chat.txt", "03/04/24, 10:00 - Rosa: hi\n05/05/24, 10:00 - Omar: hi\n")
    found = whatsapp(file)
    assert found.messages[0].time == at("2024-04-03 10:00")
    assert len(found.notes) == 1 and "03/04/24" in found.notes[0] and "order='mdy'" in found.notes[0]
    assert whatsapp(file, "mdy").messages[0].time == at("2024-03-04 10:00") and not whatsapp(file, "mdy").notes
    with pytest.raises(TinyTrainerError, match="order must be one of dmy, mdy, ymd"):
        whatsapp(file, "american")


# WhatsApp: whole files, by hand

IPHONE = f"""[12.03.24, 09:00:00] Garden: {LRM}Messages and calls are end-to-end encrypted. No one can read them.
[12.03.24, 09:00:01] Garden: {LRM}Rosa created this group
[12.03.24, 21:15:03] Rosa: Who brings
  the spade?

And: the seeds?
{LRM}[12.03.24, 21:16:00] Omar: {LRM}image omitted
{LRM}[12.03.24, 21:16:10] Omar: The sea {LRM}<attached: 00000012-PHOTO-2024-03-12-21-16-10.jpg>
[12.03.24, 21:16:20] Omar: {LRM}<angehängt: 00000013-AUDIO.opus>
[12.03.24, 21:16:30] Omar: Plan.pdf • {LRM}3 pages {LRM}document omitted
[12.03.24, 21:17:00] ~{NARROW}Lena: Me: both {LRM}<This message was edited>
[12.03.24, 21:17:30] Lena: @\u2068Rosa Luz\u2069 10:30?
[12.03.24, 21:18:00] Lena: {LRM}This message was deleted.
[12.03.24, 21:19:00] Rosa: {LRM}Missed voice call, {LRM}Tap to call back
[12.03.24, 21:20:00] Rosa: {LRM}POLL:
When?
{LRM}OPTION: Now (1 vote)
{LRM}OPTION: Later (0 votes)
[31.02.24, 10:00:00] Rosa: there is no such day
[13.03.24, 08:00:00] {LRM}Tom joined using this group's invite link
[13.03.24, 08:01:00] Tom: Grüße 🌱 “so”  two blanks
"""

ANDROID = f"""30/01/24, 09:59 - Nachrichten und Anrufe sind Ende-zu-Ende-verschlüsselt.
30/01/24, 10:00 - Rosa hat die Gruppe „Garten: Sonntag“ erstellt
30/01/24, 10:00 - Rosa changed the subject from "Garden" to "Garden: Sunday"
30/01/24, 10:01 - Rosa: Wer bringt den Spaten?
30/01/24, 10:02 - Omar: <Medien ausgeschlossen>
30/01/24, 10:03 - Omar: {LRM}IMG-20240130-WA0001.jpg (Datei angehängt)
Das Meer
um sechs
30/01/24, 10:04 - Omar: plan.pdf (Datei angehängt)
30/01/24, 10:05 - Omar: <Medien ausgeschlossen>
plan.pdf
30/01/24, 10:06 - Lena: <3
30/01/24, 10:07 - Lena: <seufz>
30/01/24, 10:08 - Lena: Diese Nachricht wurde gelöscht.
30/01/24, 10:09 - Lena: Ja <Diese Nachricht wurde bearbeitet.>
30/01/24, 10:10 - Rosa left: bye
30/01/24, 10:11 - Du hast Tom hinzugefügt
30/01/24, 10:12 - Rosa: Standort: https://maps.google.com/?q=54.1,8.9
30/01/24, 10:13 - Rosa:
30/01/24, 10:14 - Lena: null
31/01/24, 10:15 - Lena: Schau
99/99/99, 10:15 - Lena: kein Tag
31/01/24, 25:61 - Lena: keine Zeit
31/01/24, 10:16 - Rosa: Hm : ja
"""


def test_an_export_of_an_iphone(tmp_path):
    found = whatsapp(file_of(tmp_path, "WhatsApp Chat - Garden/_chat.txt", IPHONE))
    assert timed(found) == [
        (at("2024-03-12 21:15:03"), "Rosa", "Who brings\n  the spade?\n\nAnd: the seeds?"),
        (at("2024-03-12 21:16:10"), "Omar", "The sea"),
        (at("2024-03-12 21:17:00"), "Lena", "Me: both"),
        (at("2024-03-12 21:17:30"), "Lena", "@Rosa Luz 10:30?"),
        (at("2024-03-13 08:01:00"), "Tom", "Grüße 🌱 “so”  two blanks"),
    ]
    assert found.left_out == {
        "media, or a line of WhatsApp's own": 6,
        "a deleted message": 1,
        "a poll": 1,
        "a line of WhatsApp's own": 1,
    }
    assert not found.notes


def test_an_export_of_android(tmp_path):
    found = whatsapp(file_of(tmp_path, "WhatsApp Chat mit Garten.txt", ANDROID))
    assert said(found) == [
        ("Rosa", "Wer bringt den Spaten?"),
        ("Omar", "Das Meer\num sechs"),
        ("Lena", "<3"),
        ("Lena", "<seufz>"),
        ("Lena", "Ja"),
        ("Rosa left", "bye"),  # nobody can know that this is no name
        ("Lena", "Schau\n99/99/99, 10:15 - Lena: kein Tag\n31/01/24, 25:61 - Lena: keine Zeit"),
        ("Rosa", "Hm : ja"),
    ]
    assert found.left_out == {
        "a line of WhatsApp's own": 4,
        "media, or a line of WhatsApp's own": 5,
        "a deleted message": 1,
        "an empty message": 1,
    }
    assert {m.chat for m in found.messages} == {"Garten"}
    assert "Rosa hat die Gruppe „Garten: Sonntag“ erstellt" in found.examples["a line of WhatsApp's own"]


def test_copied_messages_begin_no_message(tmp_path):
    lines = [f"{d:02}/03/24, 10:00 - Rosa: day {d}" for d in range(1, 30)]
    lines.insert(5, "[04.03.24, 09:00:00] Omar: copied")
    found = whatsapp(file_of(tmp_path, "_chat.txt", "\n".join(lines)))
    assert len(found.messages) == 29
    assert found.messages[4].text == "day 5\n[04.03.24, 09:00:00] Omar: copied"


def test_notices_with_a_colon_are_no_messages(tmp_path):
    notices = [
        'Rosa changed the subject from "A" to "B: C"',
        "Rosa hat den Betreff zu „Garten: Sonntag“ geändert",
        "Rosa changed the group description: sea",
        "This business uses a secure service from Meta: read on",
    ]
    lines = [*notices, "Rosa: hi", "Rosa Luz: ho", 'Omar "Omi" Diaz: he', "Rosa: so"]
    found = whatsapp(file_of(tmp_path, "_chat.txt", "".join(f"13/03/24, 10:00 - {line}\n" for line in lines)))
    assert said(found) == [("Rosa", "hi"), ("Rosa Luz", "ho"), ('Omar "Omi" Diaz', "he"), ("Rosa", "so")]
    assert (
        found.left_out == {"a line of WhatsApp's own": 4} and found.examples["a line of WhatsApp's own"] == notices[:3]
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_encodings_and_line_ends(tmp_path, encoding):
    file = file_of(tmp_path, "_chat.txt", IPHONE.replace("\n", "\r\n").encode(encoding))
    plain = whatsapp(file_of(tmp_path, "other/_chat.txt", IPHONE))
    assert timed(whatsapp(file)) == timed(plain)


@pytest.mark.parametrize(
    "text",
    [
        "The sea was grey.\n12/03/24, 21:15 - and so on\n",
        "12.03.24, 21:15 - Dear diary\nIt rained.\n13.03.24, 20:00 - Still raining\n",
        "",
        "\n\n \n",
        "Flour: 200 g\n",
    ],
)
def test_what_is_no_chat_is_left_for_others(tmp_path, text):
    file = file_of(tmp_path, "notes.txt", text)
    assert chats_in([file]) == ([], [file])
    with pytest.raises(TinyTrainerError, match="^notes.txt: is no WhatsApp export"):
        whatsapp(file)


@pytest.mark.shared
def test_real_samples_of_whatsapp(shared):
    folder = shared / "data" / "own_writing" / "whatsapp"
    found = whatsapp(own_files(folder / "test_ddmmyy_24hrs.txt")[0])
    two = "Lorem ipsum dolor sit amet,\nconsectetur adipiscing elit. Duis libero."
    assert timed(found) == [
        (at("2019-01-01 11:25"), "John Doe", "Lorem ipsum dolor sit amet."),
        (at("2019-01-20 11:23"), "John Doe", "."),
        (at("2019-01-30 20:49"), "Jahn Doe", two),
        (at("2020-06-10 15:55"), "John-John Doe", "Lorem ipsum : dolor sit amet."),
        (at("2021-12-10 10:10"), "John Doe 🤓", "Lorem ipsum 🤓"),
        (at("2021-12-20 12:10"), "🤓", "Lorem ipsum 🤓"),
        (at("2021-12-30 22:01"), "John Doe", two),
    ]
    assert found.left_out == {"a line of WhatsApp's own": 2} and not found.notes
    found = whatsapp(own_files(folder / "whatsapp_chat.txt")[0])
    assert timed(found) == [
        (at("2023-05-05 15:48:11"), "James", "Hi here"),
        (at("2021-11-08 09:41:32"), "User name", "Message 123"),
        (at("2023-01-23 03:19"), "User 2", "Bye!"),
        (at("2023-01-23 03:22"), "User 1", "And let me know if anything changes"),
        (at("2021-01-24 12:41:03"), "User name 2", "Of course!"),
        (at("2023-05-04 16:13:23"), "User 2", "See you!"),
        (at("2022-07-19 23:32"), "User 1", "Hello"),
        (at("2022-07-20 11:32"), "User 2", "Goodbye"),
    ]
    assert found.left_out == {"media, or a line of WhatsApp's own": 1, "a deleted message": 1}


# JSON, by hand

TELEGRAM = {
    "personal_information": {"user_id": 1, "first_name": "Rosa", "last_name": "Luz"},
    "chats": {
        "list": [
            {
                "name": "Omar",
                "type": "personal_chat",
                "id": 1,
                "messages": [
                    {"id": 1, "type": "service", "action": "phone_call", "actor": "Omar", "text": ""},
                    {"id": 2, "type": "message", "date": "2024-03-12T22:15:00", "date_unixtime": "1710278100"}
                    | {"from": "Rosa Luz", "from_id": "user1", "text": "Grey\nsea"},
                    {"id": 3, "type": "message", "date": "2024-03-12T21:16:00", "from": "Omar", "from_id": "user2"}
                    | {"text": ["see ", {"type": "link", "text": "https://a.example"}, {"type": "bold", "text": "!"}]},
                    {"id": 4, "type": "message", "from": "Omar", "text": "not mine", "forwarded_from": None},
                    {"id": 5, "type": "message", "from": "Omar", "text": "", "photo": "(not included)"},
                    {"id": 6, "type": "message", "from": "Omar", "text": "a picture", "photo": "(not included)"},
                    {"id": 7, "type": "message", "from": "Omar", "text": "won", "via_bot": "@game"},
                ],
            },
            {"type": "saved_messages", "id": 2, "messages": [{"type": "message", "from": "Rosa Luz", "text": "milk"}]},
        ]
    },
}

DISCORD = {
    "guild": {"id": "1", "name": "Town"},
    "channel": {"id": "2", "type": "GuildTextChat", "name": "garden"},
    "messages": [
        {"type": "GuildMemberJoin", "timestamp": "2024-03-12T20:00:00+00:00", "content": "Joined the server."}
        | {"author": {"name": "omar", "isBot": False}},
        {"type": "Default", "timestamp": "2024-03-12T22:15:00+01:00", "content": "Hello\n**there**"}
        | {"author": {"name": "rosa", "nickname": "Rosa", "isBot": False}},
        {"type": "Reply", "timestamp": "2024-03-12T21:16:00.123+00:00", "content": "Hi!"}
        | {"author": {"name": "omar", "nickname": None, "isBot": False}},
        {"type": "Default", "timestamp": "2024-03-12T21:17:00+00:00", "content": "Beep"}
        | {"author": {"name": "helper", "nickname": "Helper", "isBot": True}},
        {"type": "Default", "timestamp": "2024-03-12T21:18:00+00:00", "content": "", "attachments": [{}]}
        | {"author": {"name": "rosa", "isBot": False}},
    ],
}

FACEBOOK = {
    "participants": [{"name": "Rosa Luz"}, {"name": "J\u00c3\u00bcrgen"}],
    "messages": [
        {
            "sender_name": "Rosa Luz",
            "timestamp_ms": 9000,
            "content": "Reacted \u00f0\u009f\u0091\u008d to your message ",
        },
        {"sender_name": "Rosa Luz", "timestamp_ms": 8000, "content": "Rosa sent an attachment.", "share": {}},
        {"sender_name": "Rosa Luz", "timestamp_ms": 7000, "photos": [{}]},
        {"sender_name": "Rosa Luz", "timestamp_ms": 6000, "content": "gone", "is_unsent": True},
        {
            "sender_name": "J\u00c3\u00bcrgen",
            "timestamp_ms": 5500,
            "content": "J\u00c3\u00bcrgen called you.",
            "type": "Call",
        },
        {
            "sender_name": "J\u00c3\u00bcrgen",
            "timestamp_ms": 5000,
            "content": "Gr\u00c3\u00bc\u00c3\u009fe \u00f0\u009f\u008c\u00b1",
        },
        {"sender_name": "Rosa Luz", "timestamp_ms": 4001, "content": "I sent a letter."},
    ],
    "title": "J\u00c3\u00bcrgen",
    "thread_path": "inbox/jurgen_7",
}

CHATGPT = [
    {
        "title": "Sea",
        "current_node": "e",
        "mapping": {
            "r": {"parent": None, "children": ["s"], "message": None},
            "s": {"parent": "r", "children": ["a", "b"], "message": {"author": {"role": "system"}, "content": {}}},
            "a": {"parent": "s", "children": [], "message": {"author": {"role": "user"}, "create_time": 1}
                  | {"content": {"content_type": "text", "parts": ["Wy?"]}}},
            "b": {"parent": "s", "children": ["t"], "message": {"author": {"role": "user"}, "create_time": 2.5}
                  | {"content": {"content_type": "multimodal_text", "parts": [{"asset": "x"}, "Why?"]}}},
            "t": {"parent": "b", "children": ["h"], "message": {"author": {"role": "assistant"}, "recipient": "python"}
                  | {"content": {"content_type": "code", "text": "print()"}}},
            "h": {"parent": "t", "children": ["e"], "message": {"author": {"role": "user"}}
                  | {"metadata": {"is_visually_hidden_from_conversation": True}}
                  | {"content": {"content_type": "text", "parts": ["hidden"]}}},
            "e": {"parent": "h", "children": [], "message": {"author": {"role": "assistant"}, "create_time": 3}
                  | {"content": {"content_type": "text", "parts": ["Because."]}}},
        },
    },
    {"title": "Sea", "mapping": {"x": {"parent": "x", "message": {"author": {"role": "user"}}
                                       | {"content": {"content_type": "text", "parts": ["round"]}}}}},
]  # fmt: skip

CLAUDE = {
    "name": "Sea",
    "chat_messages": [
        {"sender": "human", "text": "Hello", "created_at": "2024-03-12T21:15:00Z"},
        {"sender": "assistant", "text": "", "created_at": "2024-03-12T21:15:01.500000Z"}
        | {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hi!"}]},
        {"sender": "human", "text": "", "content": [], "created_at": "2024-03-12T21:16:00Z"},
    ],
}

SIGNAL = """{"date": "2024-03-12T21:15:03", "sender": "Me", "body": "How is\\nthe sea?  ", "quote": "", "reactions": []}
{"date": "2024-03-12T21:16:00", "sender": "Rosa", "body": "Grey.  ", "quote": "\\n\\n> How\\n\\n", "reactions": []}
{"date": "2024-03-12T21:17:00", "sender": "Rosa", "body": "  ", "attachments": [{"name": "a.jpg"}]}
{"date": "2024-03-12T21:18:00", "sender": "Rosa", "body": "  ", "deleted": true}
{"date": "2024-03-12T21:19:00", "sender": "Me", "body": "Outgoing voice call (accepted, 3m 2s)  "}
"""

SIGNAL_TEXT = """[2024-03-12 21:15:03] Me: How is
the sea?

[2024-03-12 21:16:00] Rosa:

> How is

Grey.
(- Me: 👍 -)

[2024-03-12 21:17:00] Rosa:   ![a.jpg](./media/a.jpg)

[2024-03-12 21:18:00] Rosa: (This message was deleted)

"""

TWEETS = """window.YTD.tweets.part0 = [
{"tweet": {"full_text": "Sea &amp; rain https://t.co/a https://t.co/b", "created_at": "Tue Mar 12 21:15:00 +0000 2024",
 "entities": {"urls": [{"url": "https://t.co/a", "expanded_url": "https://a.example"}],
              "media": [{"url": "https://t.co/b"}]}}},
{"tweet": {"full_text": "RT @omar: hello", "created_at": "Tue Mar 12 21:16:00 +0000 2024"}}]"""

DIRECT = """window.YTD.direct_messages.part0 = [{"dmConversation": {"conversationId": "7-9", "messages": [
{"messageCreate": {"senderId": "9", "text": "Hi Rosa", "createdAt": "2024-03-12T21:16:00.000Z"}},
{"joinConversation": {"initiatingUserId": "9"}},
{"messageCreate": {"senderId": "7", "text": "Hi!", "createdAt": "2024-03-12T21:15:00.000Z"}}]}}]"""


def test_telegram(tmp_path):
    found = export_in(file_of(tmp_path, "result.json", TELEGRAM))
    assert [(m.chat, m.time, m.author, m.text) for m in found.messages] == [
        ("Omar", at("2024-03-12 21:15:00"), "Rosa Luz", "Grey\nsea"),
        ("Omar", at("2024-03-12 21:16:00"), "Omar", "see https://a.example!"),
        ("Omar", None, "Omar", "a picture"),
        ("Saved Messages", None, "Rosa Luz", "milk"),
    ]
    assert (found.kind, found.user) == ("Telegram chat", "Rosa Luz")
    assert found.left_out == {
        "a service message": 1,
        "forwarded: written by someone else": 1,
        "media without words": 1,
        "written by a bot": 1,
    }
    alone = export_in(file_of(tmp_path, "other.json", TELEGRAM["chats"]["list"][0]))
    assert said(alone) == said(found)[:3] and alone.kind == "Telegram chat"


def test_discord(tmp_path):
    found = export_in(file_of(tmp_path, "garden.json", DISCORD))
    assert found.kind == "Discord channel" and found.messages[0].chat == "Town / garden"
    assert timed(found) == [
        (at("2024-03-12 21:15:00"), "Rosa", "Hello\n**there**"),
        (at("2024-03-12 21:16:00.123"), "omar", "Hi!"),
    ]
    assert found.left_out == {"a system message": 1, "written by a bot": 1, "media without words": 1}


def test_facebook_in_both_encodings(tmp_path):
    expected = [(4.001, "Rosa Luz", "I sent a letter."), (5.0, "Jürgen", "Grüße 🌱")]
    old = export_in(file_of(tmp_path, "inbox/jurgen_7/message_1.json", FACEBOOK))
    assert timed(old) == expected and old.kind == "Facebook chat" and old.messages[0].chat == "Jürgen"
    assert old.left_out == {
        "a sentence of the program's own": 3,
        "media without words": 1,
        "a message that was taken back": 1,
    }
    right = json.loads(json.dumps(FACEBOOK, ensure_ascii=False).encode("latin-1").decode("utf-8"))
    assert timed(export_in(file_of(tmp_path, "new/message_1.json", right))) == expected


def test_what_only_looks_like_doubled_utf8_stays(tmp_path):
    rows = [{"sender_name": "Jürgen", "timestamp_ms": 1, "content": "Write Ã¼ and not ü."}]
    found = export_in(file_of(tmp_path, "message_1.json", {"messages": rows, "title": "J"}))
    assert said(found) == [("Jürgen", "Write Ã¼ and not ü.")]


def test_files_of_a_thread_are_one_conversation_in_the_order_of_time(tmp_path):
    for folder in ("inbox/omar_7", "inbox/lena_8"):
        for i, start in ((1, 5000), (2, 3000), (10, 1000)):
            rows = [{"sender_name": "Omar", "timestamp_ms": start - j, "content": f"at {start - j}"} for j in (0, 1)]
            name = f"your_instagram_activity/messages/{folder}/message_{i}.json"
            file_of(tmp_path, name, {"participants": [], "messages": rows, "title": "Omar"})
    found, rest = chats_in(own_files(tmp_path))
    assert [(f.kind, f.source.split("/")[-1]) for f in found] == [("Instagram chat", n) for n in ("lena_8", "omar_7")]
    assert not rest
    for one in found:
        assert [m.text for m in one.messages] == [f"at {t}" for t in (999, 1000, 2999, 3000, 4999, 5000)]
    liked = {"messages": [{"sender_name": "Omar", "timestamp_ms": 1, "content": "Liked a message"}], "title": "Omar"}
    liked["messages"] += [{"sender_name": "Omar", "timestamp_ms": 2, "content": "so"}]
    file_of(tmp_path, "plain/message_1.json", liked)
    file_of(tmp_path, "plain/message_2.json", {"messages": liked["messages"][1:], "title": "Omar"})
    plain, _ = chats_in(own_files(tmp_path / "plain"))
    assert [(f.kind, len(f.messages)) for f in plain] == [("Instagram chat", 2)]
    inside, _ = chats_in(own_files(tmp_path / "your_instagram_activity/messages/inbox/omar_7"))
    assert len(inside) == 1 and len(inside[0].messages) == 6


def test_facebooks_encrypted_chats(tmp_path):
    rows = [
        {"senderName": "Rosa", "timestamp": 2000, "text": "newer", "isUnsent": False, "media": []},
        {"senderName": "Omar", "timestamp": 1000, "text": "older", "isUnsent": False, "media": []},
        {"senderName": "Omar", "timestamp": 500, "text": "", "isUnsent": False, "media": [{"uri": "a"}]},
    ]
    value = {"participants": ["Rosa", "Omar"], "threadName": "Omar_7", "messages": rows}
    found = export_in(file_of(tmp_path, "Omar_7.json", value))
    assert timed(found) == [(1.0, "Omar", "older"), (2.0, "Rosa", "newer")]


def test_slack_as_a_folder_and_as_an_archive(tmp_path):
    users = [
        {"id": "U1", "name": "rosa.l", "profile": {"display_name": "Rosa", "real_name": "Rosa Luz"}},
        {"id": "U2", "name": "omar", "profile": {"display_name": "", "real_name": "Omar"}},
    ]
    days = {
        "general/2024-03-13.json": [
            {"type": "message", "user": "U2", "text": "ok", "ts": "1710320400.000200"},
            {"type": "message", "subtype": "bot_message", "text": "beep", "ts": "1710320401.0"},
        ],
        "general/2024-03-14.json": [
            {"type": "message", "subtype": "channel_leave", "text": "left", "ts": "1710406800.0"}
        ],
        "general/2024-03-12.json": [
            {"type": "message", "subtype": "channel_join", "user": "U2", "text": "<@U2> joined", "ts": "1710278000.0"},
            {"type": "message", "user": "U1", "ts": "1710278100.000100"}
            | {"text": "<@U2>: <http://a.example|the plan> &amp; <http://b.example>\nin <#C1|garden> &lt;3 <!here>"},
            {
                "type": "message",
                "user": "U9",
                "user_profile": {"real_name": "Lena"},
                "text": "hm",
                "ts": "1710278101.0",
            },
            {"type": "message", "user": "U1", "text": "", "files": [{}], "ts": "1710278102.0"},
        ],
    }
    files = {"users.json": users, "channels.json": [{"id": "C1", "name": "garden"}]} | days
    for name, value in files.items():
        file_of(tmp_path / "town", name, value)
    with zipfile.ZipFile(tmp_path / "town.zip", "w") as z:
        for name, value in files.items():
            z.writestr(name, json.dumps(value))
    for place, where in ((tmp_path / "town", ""), (tmp_path / "town.zip", "town.zip/")):
        found, rest = chats_in(own_files(place))
        assert len(found) == 1 and not rest
        assert (found[0].kind, found[0].source) == ("Slack channel", f"{where}general")
        assert timed(found[0]) == [
            (1710278100.0001, "Rosa", "@Omar: the plan & http://b.example\nin #garden <3 @here"),
            (1710278101.0, "Lena", "hm"),
            (1710320400.0002, "Omar", "ok"),
        ]
        assert found[0].left_out == {"a system message": 2, "written by a bot": 1, "media without words": 1}


def test_slacks_direct_messages_are_called_after_who_talks(tmp_path):
    row = {"type": "message", "user": "U1", "text": "psst", "ts": "1.0"}
    for name, value in {
        "users.json": [
            {"id": "U1", "profile": {"display_name": "Rosa"}},
            {"id": "U2", "profile": {"real_name": "Omar"}},
        ],
        "dms.json": [{"id": "D1", "members": ["U1", "U2"]}],
        "D1/2024-03-12.json": [row],
    }.items():
        file_of(tmp_path, name, value)
    found, rest = chats_in(own_files(tmp_path))
    assert [(m.chat, m.author, m.text) for m in found[0].messages] == [("Rosa, Omar", "Rosa", "psst")] and not rest


def test_words_beside_a_link_are_kept(tmp_path):
    rows = [{"sender_name": "Rosa", "timestamp_ms": 1, "content": "You should see this.", "share": {"link": "a"}}]
    rows += [{"sender_name": "Rosa", "timestamp_ms": 2, "content": "Rosa hat einen Anhang gesendet.", "share": {}}]
    found = export_in(file_of(tmp_path, "message_1.json", {"messages": rows, "title": "Rosa"}))
    assert said(found) == [("Rosa", "You should see this.")]


def test_signal_export(tmp_path):
    file_of(tmp_path, "out/Rosa/data.json", SIGNAL)
    file_of(tmp_path, "out/Rosa/chat.md", SIGNAL_TEXT)
    file_of(tmp_path, "out/Rosa/index.html", "<html>")
    text = file_of(tmp_path, "alone/Rosa/chat.md", SIGNAL_TEXT)
    expected = [
        (at("2024-03-12 21:15:03"), "Me", "How is\nthe sea?"),
        (at("2024-03-12 21:16:00"), "Rosa", "Grey."),
    ]
    found, rest = chats_in(own_files(tmp_path / "out"))
    assert len(found) == 1 and not rest
    assert timed(found[0]) == expected and (found[0].kind, found[0].user) == ("Signal chat", "Me")
    assert found[0].messages[0].chat == "Rosa"
    assert found[0].left_out == {"media without words": 1, "a deleted message": 1, "a call": 1}
    other = export_in(text)
    assert timed(other) == expected and (other.kind, other.user) == ("Signal chat", "Me")
    old = export_in(file_of(tmp_path, "old.txt", "[2019-12-24, 12:23] Me: Hello\n[2020-01-17, 21:49] Rosa: Hi\n"))
    assert timed(old) == [(at("2019-12-24 12:23"), "Me", "Hello"), (at("2020-01-17 21:49"), "Rosa", "Hi")]
    assert (old.kind, old.user) == ("Signal chat", "Me")


def test_signals_own_export_and_signal_cli(tmp_path):
    def item(who, sent, body, **more):
        return {
            "chatItem": {"chatId": "5", "authorId": who, "dateSent": sent, "standardMessage": {"text": body}} | more
        }

    rows = [
        {"version": "1"},
        {"recipient": {"id": "1", "self": {}}},
        {"recipient": {"id": "2", "contact": {"profileGivenName": "Rosa", "profileFamilyName": "Luz"}}},
        {"recipient": {"id": "3", "group": {"snapshot": {"title": {"title": "Garden"}}}}},
        {"chat": {"id": "5", "recipientId": "3"}},
        item("2", "1000", {"body": "Hi"}, incoming={}),
        item("1", "2000", {"body": "Hey"}, outgoing={}),
        item("1", "3000", None, outgoing={}),
    ]
    found = export_in(file_of(tmp_path, "main.jsonl", "\n".join(map(json.dumps, rows))))
    assert timed(found) == [(1.0, "Rosa Luz", "Hi"), (2.0, "Me", "Hey")]
    assert found.messages[0].chat == "Garden" and found.user == "Me"
    rows = [
        {"envelope": {"sourceName": "Rosa", "timestamp": 1000, "dataMessage": {"message": "Hi"}}, "account": "+1"},
        {"envelope": {"sourceName": "Rosa", "timestamp": 1500, "receiptMessage": {}}, "account": "+1"},
        {"jsonrpc": "2.0", "method": "receive", "params": {"envelope": {"sourceName": "Tom", "timestamp": 2000}
            | {"syncMessage": {"sentMessage": {"message": "Hey", "destination": "Rosa"}}}}},
    ]  # fmt: skip
    found = export_in(file_of(tmp_path, "log.json", "\n".join(map(json.dumps, rows))))
    assert timed(found) == [(1.0, "Rosa", "Hi"), (2.0, "Tom", "Hey")] and found.user == "Tom"


def test_an_archive_of_x(tmp_path):
    account = {"username": "rosa", "accountId": "7", "accountDisplayName": "Rosa"}
    file_of(tmp_path, "data/account.js", f"window.YTD.account.part0 = [{json.dumps({'account': account})}]")
    file_of(tmp_path, "data/tweets.js", TWEETS)
    file_of(tmp_path, "data/direct-messages.js", DIRECT)
    file_of(tmp_path, "data/ageinfo.js", "window.YTD.ageinfo.part0 = []")
    found, rest = chats_in(own_files(tmp_path))
    assert [f.kind for f in found] == ["X direct messages", "tweets"]
    assert [f.name for f in rest] == ["data/ageinfo.js"]
    assert timed(found[0]) == [
        (at("2024-03-12 21:15:00"), "Rosa", "Hi!"),
        (at("2024-03-12 21:16:00"), "9", "Hi Rosa"),
    ]
    assert [(d.author, d.time, d.text) for d in found[1].documents] == [
        ("Rosa", at("2024-03-12 21:15:00"), "Sea & rain https://a.example"),
    ]
    assert found[1].left_out == {"a retweet: written by someone else": 1} and found[0].user == "Rosa"


def test_chatgpt_along_the_living_branch(tmp_path):
    found = export_in(file_of(tmp_path, "conversations.json", CHATGPT))
    assert [(m.chat, m.time, m.author, m.text) for m in found.messages] == [
        ("Sea", 2.5, "user", "Why?"),
        ("Sea", 3.0, "assistant", "Because."),
        ("Sea (2)", None, "user", "round"),
    ]
    assert (found.kind, found.user) == ("ChatGPT conversations", "user")
    assert found.left_out == {
        "in a branch that was replaced": 1,
        "of the system or of a tool": 1,
        "a call of a tool, or thoughts": 1,
        "hidden": 1,
    }


def test_claude_alone_and_in_a_list(tmp_path):
    for value in (CLAUDE, [CLAUDE]):
        found = export_in(file_of(tmp_path, "conversations.json", value))
        assert timed(found) == [
            (at("2024-03-12 21:15:00"), "human", "Hello"),
            (at("2024-03-12 21:15:01.500"), "assistant", "Hi!"),
        ]
        assert (found.kind, found.user) == ("Claude conversations", "human")
        assert found.left_out == {"thoughts": 1, "media without words": 1}


@pytest.mark.shared
def test_real_samples_together(shared):
    found, rest = chats_in(own_files(shared / "data" / "own_writing"))
    assert [
        (f.kind, len(f.messages), sorted({m.author for m in f.messages})) for f in found if "Whats" not in f.kind
    ] == [
        ("Claude conversations", 2, ["assistant", "human"]),
        ("Facebook chat", 10, ["User 1", "User 2"]),
        ("Telegram chat", 4, ["Batman & Robin", "Jimmeny Marvelton"]),
    ]
    assert [f.kind for f in found].count("WhatsApp chat") == 2
    assert {f.name for f in rest} == {
        "README.md",
        "email/gmail.eml",
        "epub/test.epub",
        "obsidian/tags_and_frontmatter.md",
    }
    claude = found[0]
    assert said(claude) == [
        ("human", "Can you greet me?"),
        ("assistant", "Hello there! It's great to hear from you."),
    ]
    facebook = next(f for f in found if f.kind == "Facebook chat")
    assert timed(facebook)[-1] == (1675597571.851, "User 2", "Bye!") and facebook.left_out == {"media without words": 1}


# Damage

EXPORTS = {
    "_chat.txt": IPHONE,
    "WhatsApp Chat mit Garten.txt": ANDROID,
    "result.json": json.dumps(TELEGRAM),
    "garden.json": json.dumps(DISCORD),
    "message_1.json": json.dumps(FACEBOOK, indent=1),
    "conversations.json": json.dumps(CHATGPT, indent=1),
    "claude.json": json.dumps(CLAUDE),
    "data.json": SIGNAL,
    "chat.md": SIGNAL_TEXT,
    "tweets.js": TWEETS,
    "direct-messages.js": DIRECT,
    "2024-03-12.json": json.dumps([{"type": "message", "user": "U1", "text": "a <@U2>", "ts": "1.0"}] * 3),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    "An export after an accident"
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(9)
    if kind == 0:
        return data[:i]
    if kind == 1:
        return data[i:]
    if kind == 2:
        return data[:i] + data[j:]
    if kind == 3:
        return data[:i] + bytes(rng.randrange(256) for _ in range(5)) + data[i:]
    if kind == 4:
        return data[:i] + b"\0" * 9 + data[i:]
    if kind == 5:
        return data.decode("utf-8").encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]))
    if kind == 6:
        return data.decode("utf-8").encode("cp1252", "replace").replace(b"\n", b"\r\n")
    if kind == 7:
        swapped = bytearray(data)
        for _ in range(20):
            a, b = rng.randrange(len(data)), rng.randrange(len(data))
            swapped[a], swapped[b] = swapped[b], swapped[a]
        return bytes(swapped)
    return data[:i] + rng.choice([b"null", b"[", b'"', b"{}", b"1e999", b"-", b"\\ud83d", b"\xff\xfe"]) + data[j:]


def test_damaged_files_end_in_a_finding_or_in_one_line(tmp_path):
    rng, start, outcomes = random.Random(1), time.process_time(), {"found": 0, "error": 0}
    for i in range(400):
        name = list(EXPORTS)[i % len(EXPORTS)]
        file = file_of(tmp_path, f"{i}/{name}", damaged(EXPORTS[name].encode(), rng))
        try:
            found = export_in(file)
            assert all(isinstance(m.text, str) and m.text and m.author for m in found.messages)
            json.dumps([m.text for m in found.messages], ensure_ascii=False).encode("utf-8")
            outcomes["found"] += 1
        except TinyTrainerError as e:
            assert "\n" not in str(e) and name in str(e)
            outcomes["error"] += 1
        many, rest = chats_in([file])
        assert len(many) + len(rest) == 1
    assert outcomes["found"] > 200 and time.process_time() - start < 60


VALUES = [None, True, 7, -1.5, float("inf"), 10**30, "", "x", "\ud83d", [], {}, [[]], [{}], {"a": []}]


def replaced(value, rng: random.Random, rate: float):
    "A value of which some parts are of another kind"
    if rng.random() < rate:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        return {k: replaced(v, rng, rate) for k, v in value.items()}
    return [replaced(v, rng, rate) for v in value] if isinstance(value, list) else value


def test_values_of_another_kind_raise_nothing(tmp_path):
    rng = random.Random(2)
    samples = {n: json.loads(t) for n, t in EXPORTS.items() if n.endswith(".json") and n != "data.json"}
    samples["main.jsonl"] = [{"chatItem": {"chatId": "5", "standardMessage": {"text": {"body": "a"}}}}]
    samples["tweets.js"] = json.loads(TWEETS.partition(" = ")[2])
    samples["direct-messages.js"] = json.loads(DIRECT.partition(" = ")[2])
    for i in range(600):
        name = rng.choice(list(samples))
        changed = json.dumps(replaced(samples[name], rng, 0.05))
        many, rest = chats_in([file_of(tmp_path, f"{i}/{name}", changed)])
        assert len(many) + len(rest) == 1
        for found in many:
            json.dumps([[m.author, m.text, m.chat, m.time] for m in found.messages], ensure_ascii=False).encode("utf-8")


def test_what_is_whole_before_a_cut_is_read(tmp_path):
    text = json.dumps(TELEGRAM)
    file = file_of(tmp_path, "result.json", text[: text.index("not mine")])
    found = export_in(file)
    assert said(found) == [("Rosa Luz", "Grey\nsea"), ("Omar", "see https://a.example!")]
    assert len(found.notes) == 1 and "is damaged" in found.notes[0]
    found = export_in(file_of(tmp_path, "data.json", SIGNAL + '{"date": "2024-'))
    assert len(found.messages) == 2 and found.notes == ["1 lines could not be read and are missing"]


def test_one_bad_file_does_not_keep_others_from_being_read(tmp_path, monkeypatch):
    file_of(tmp_path, "a/result.json", "{{{{")
    file_of(tmp_path, "b/_chat.txt", IPHONE)
    file_of(tmp_path, "c/broken.json", "{{{{")
    found, rest = chats_in(own_files(tmp_path))
    assert [(f.kind, len(f.messages), len(f.notes)) for f in found] == [
        ("Telegram chat", 0, 1),
        ("WhatsApp chat", 5, 0),
    ]
    assert [f.name for f in rest] == ["c/broken.json"] and "a/result.json" in found[0].notes[0]


@pytest.mark.parametrize(
    "text",
    [
        " " * 20_000,
        "12/03/24, 21:15 - Rosa: " + " " * 200_000 + "x",
        "12/03/24, 21:15 - Rosa: " + "<" * 200_000 + ">",
        "12/03/24, 21:15 - " + "a b " * 50_000 + ": x",
        "[12/03/24, 21:15:00" + " " * 200_000,
        "12/03/24, 21:15 - Rosa: \u200e" + "( " * 100_000 + ")",
        "12/03/24, 21:15 - Rosa: " + "@\u2068" * 20_000,
        "1" * 200_000,
        "12:15 " + "a" * 200_000,
    ],
)
def test_no_line_makes_a_pattern_crawl(tmp_path, text):
    start = time.process_time()
    chats_in([file_of(tmp_path, "a.txt", text), file_of(tmp_path, "chat.md", text)])
    looks_like_chat(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "value",
    [
        [{"messages": [{"role": "user", "content": "Hello"}]}],
        {"id": 1, "type": "sft", "messages": [{"role": "user", "content": "Hello"}]},
        [{"sender": "a@b.example", "body": "Dear", "date": "2024-03-12"}],
        [{"ts": "1.0", "text": "log", "type": "info"}],
        {"mapping": {"a": 1}, "title": "settings"},
        [{"text": "A story."}],
        {"name": "package", "type": "module", "id": 1},
    ],
)
def test_other_json_is_left_for_others(tmp_path, value):
    file = file_of(tmp_path, "a.json", value)
    assert chats_in([file]) == ([], [file])
    with pytest.raises(TinyTrainerError, match="^a.json: is no export of a conversation"):
        export_in(file)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        '{"messages":' * 50_000,
        '"' * 200_000,
        '{"a":"' + "\\" * 100_001,
        '[{"ts":"1","type":"message","text":"' + "<a" * 50_000 + '"}]',
        '{"messages":[{"sender_name":"R","content":"You sent a ' + "a " * 50_000 + '"}]}',
        '{"messages":[{"sender_name":"R","content":"' + "Reacted " * 30_000 + '"}]}',
        '[{"id": ' + "1" * 5000 + "}]",
    ],
)
def test_no_json_makes_it_crawl_or_fall(tmp_path, text):
    start = time.process_time()
    found, rest = chats_in([file_of(tmp_path, "a.json", text)])
    assert len(found) + len(rest) == 1 and time.process_time() - start < 2


def test_a_file_too_large_is_reported_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(messengers.OwnFile.read, "__defaults__", (100,))
    found, rest = chats_in([file_of(tmp_path, "result.json", TELEGRAM), file_of(tmp_path, "big.json", TELEGRAM)])
    assert [f.kind for f in found] == ["Telegram chat"] and "too much to be read" in found[0].notes[0]
    assert [f.name for f in rest] == ["big.json"]


# Chats that no reader knows


@pytest.mark.parametrize(
    "text",
    [
        "Rosa: Hi\nOmar: Hi!\nRosa: Coffee?\nOmar: At ten.\n",
        "**Rosa:** Hi\n\n**Omar:** Hi!\n\n**Rosa:** Coffee?\n\n**Omar:** At ten.\n",
        "[21:15] <Rosa> hi\n[21:15] <Omar> hello\n[21:16] <Omar> there\n[21:17] <Rosa> so\n",
        "2024-03-12 21:15:00\tRosa\thi\n2024-03-12 21:16:00\tOmar\thello\n" * 2,
        "[12-Mar-24 09:15 PM] rosa\nhi\n\n[12-Mar-24 09:16 PM] omar\nho\n",
        "12.03.2024 21:15 Rosa: hi\nand more\n12.03.2024 21:16 Omar: ho\n12.03.2024 21:16 Omar: ho\n",
    ],
)
def test_what_looks_like_a_chat(text):
    assert looks_like_chat(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Rosa: Hi\n",
        "Flour: 200 g\nSugar: 100 g\nEggs: 3\nBake: 40 minutes\n",
        "At 10:30 we left.\nIt was late: too late.\nThe bus was gone.\nSo we walked.\n",
        "Dear Rosa,\n\nthe sea is grey: it rains.\nNote: bring a coat.\nNote: and boots.\n\nOmar\n",
        "# Title\n\nSome prose here.\nAnd more: of it.\n\n- a list\n- of things\n",
    ],
)
def test_what_does_not(text):
    assert not looks_like_chat(text)
