"""A thousand data files, half of them broken at random: each is read exactly or refused by name, and nothing is lost
on the way."""

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.data.formats import data_origin, load_examples

FILES, BATCH = 1000, 40  # hypothesis varies what it has just tried, so it is sent off anew after each batch
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "observation",
    "tool": "tool",
}


MAY_BE_EMPTY = ("system", "tool", "observation")

# What a table means, written a second time and plainly


class Refused(Exception):
    "These rows should not be read"


def text(row: dict, column: str) -> str:
    if type(row.get(column)) is not str:
        raise Refused(column)
    return row[column]


def turns(value) -> list[dict]:
    if type(value) is not list:
        raise Refused(value)
    found = []
    for turn in value:
        if type(turn) is not dict:
            raise Refused(turn)
        role, content = turn.get("role"), turn.get("content")
        if role is None or content is None:
            role, content = turn.get("from"), turn.get("value")
        if type(role) is not str or role not in ROLES or type(content) is not str or turn.get("tool_calls"):
            raise Refused(turn)
        found.append({"role": ROLES[role], "content": content})
    return found


def asked(row: dict, column: str) -> list[dict]:
    if column == "prompt" and type(row.get("prompt")) is not list:
        return [{"role": "user", "content": text(row, "prompt")}]
    return turns(row.get(column))


def answer(value, before: list[dict]) -> str:
    if type(value) is str:
        return value
    said = turns([value] if type(value) is dict else value)
    if said[: len(before)] == before:
        said = said[len(before) :]
    if len(said) != 1 or said[0]["role"] not in ("assistant", "function_call"):
        raise Refused(value)
    return said[0]["content"]


def dialogue(question: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


ASKS = ("prompt", "question", "instruction", "query", "problem", "input")
ANSWERS = ("completion", "response", "answer", "output", "reply", "solution", "target")


def other_names(columns: set, rows: list[dict]) -> tuple[str, str] | None:
    "A question's and an answer's column, if only one of each can be meant"
    asks = [c for c in ASKS if c in columns and not (c == "input" and "instruction" in columns)]
    texts = [c for c in ANSWERS if all(r.get(c) is None or type(r[c]) is str for r in rows)]
    answers = [c for c in texts if c in columns]
    return (asks[0], answers[0]) if len(asks) == len(answers) == 1 and "text" not in columns else None


def meaning(rows: list[dict]) -> tuple[list[dict], int]:
    "What should be made of `rows`, and how many of them say nothing"
    if not all(type(r) is dict for r in rows):
        raise Refused(rows)
    columns = {c for r in rows for c in r}
    talk = next((c for c in ("messages", "conversations", "prompt") if c in columns), None)
    kinds = {
        "preference": {"chosen", "rejected"} if talk else {"-"},
        "chat": {talk if talk != "prompt" else "-"},
        "completion": {"prompt", "completion"},
        "instruction": {"instruction", "output"},
        "question": {"question", "answer"},
        "text": {"text"},
        "prompt": {"prompt"},
    }
    kind = next((k for k, needed in kinds.items() if needed <= columns), None)
    if kind in (None, "prompt") and (pair := other_names(columns, rows)):
        kind, talk = "pair", pair
    if kind is None and {"chosen", "rejected"} <= columns:
        kind, talk = "preference", None
    if kind is None:
        raise Refused(columns)
    made = [one(row, kind, talk) for row in rows]
    blank = [
        any(not m["content"].strip() for m in r.get("messages", ()) if m["role"] not in MAY_BE_EMPTY)
        or "messages" in r
        and not any(m["content"].strip() for m in r["messages"])
        or any(not r[c].strip() for c in ("text", "chosen", "rejected") if type(r.get(c)) is str and c in used)
        for r, used in made
    ]
    if all(blank):
        raise Refused("nothing is left")
    for r, _ in made:
        if "messages" in r:
            r["messages"] = [m for m in r["messages"] if m["role"] != "system" or m["content"].strip()]
    return [{k: v for k, v in r.items() if v is not None} for (r, _), empty in zip(made, blank) if not empty], sum(
        blank
    )


def one(row: dict, kind: str, talk: str | None) -> tuple[dict, set]:
    "One row as it should come out, other columns included, and the columns that were used"
    if kind == "pair":
        question, reply = talk
        if question == "prompt":
            said = [] if row.get(reply) is None else [{"role": "assistant", "content": text(row, reply)}]
            new, used = {"messages": asked(row, "prompt") + said, reply: row.get(reply)}, {"prompt"}
        else:
            given = "\n" + text(row, "input") if question == "instruction" and row.get("input") else ""
            new, used = {"messages": dialogue(text(row, question) + given, text(row, reply))}, {question, reply}
            used |= {"input"} if question == "instruction" else set()
    elif kind == "preference":
        if talk is None:
            both = [turns(row.get(c))[:-1] if type(row.get(c)) is list else [] for c in ("chosen", "rejected")]
            if both[0] != both[1] or not both[0]:
                raise Refused(row)
        before = asked(row, talk) if talk else both[0]
        if before and before[-1]["role"] in ("assistant", "function_call"):
            raise Refused(row)
        new, used = (
            {
                "messages": before,
                "chosen": answer(row.get("chosen"), before),
                "rejected": answer(row.get("rejected"), before),
            },
            {talk, "chosen", "rejected"},
        )
    elif kind == "chat" and talk == "messages" and row.get("messages") is None and type(row.get("text")) is str:
        return one(row, "text", None)
    elif kind == "chat":
        new, used = {"messages": turns(row.get(talk))}, {talk}
        open_end = not new["messages"] or new["messages"][-1]["role"] not in ("assistant", "function_call")
        if row.get("completion") is not None and open_end:
            new["messages"] = new["messages"] + [
                {"role": "assistant", "content": answer(row["completion"], new["messages"])}
            ]
            used = {talk, "completion"}
    elif kind == "completion":
        before = asked(row, "prompt")
        reply = answer(row.get("completion"), before)
        new, used = {"messages": before + dialogue("", reply)[1:]}, {"prompt", "completion"}
    elif kind == "instruction":
        question = text(row, "instruction") + ("\n" + text(row, "input") if row.get("input") else "")
        new, used = {"messages": dialogue(question, text(row, "output"))}, {"instruction", "input", "output"}
    elif kind == "question":
        new, used = {"messages": dialogue(text(row, "question"), text(row, "answer"))}, {"question", "answer"}
    elif kind == "text":
        whole, used = text(row, "text"), {"text"}
        m = re.fullmatch(r"\s*### Instruction:(.*?)(?:### Input:(.*?))?### Response:(.*)", whole, re.S)
        new = (
            {"messages": dialogue("\n".join(p.strip() for p in m.groups()[:2] if p and p.strip()), m[3].strip())}
            if m
            else {"text": whole}
        )
    else:
        new, used = {"messages": asked(row, "prompt")}, {"prompt"}
    return {k: v for k, v in row.items() if k not in used and k not in ("messages",)} | new, used | set(new)


# Rows and files

# What ends a line, a cell or a string somewhere
SHARP = "\"\"'',,;:|\t\n\n\r\r\\\\{}[]#&\u2028\u2028\u2029\x85\x0b\x1c\xa0\ufeff\u200b"
TEXT = st.one_of(
    st.text(st.sampled_from(SHARP + "abc 017éß漢😀"), max_size=20),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
)
WORDS = st.one_of(
    TEXT.map(lambda t: f"w{t}w"),
    TEXT.map(lambda t: f"w{t}w"),
    TEXT,
    st.sampled_from(["", " ", "007", "nan", "None", "null", "1e3", "TRUE", "### Response:"]),
)
STYLES = [
    ("role", "content", "user", "assistant"),
    ("from", "value", "human", "gpt"),
    ("from", "value", "user", "model"),
]
FLAT = {
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "question": ("question", "answer"),
    "text": ("text",),
    "prompt": ("prompt", "reference_answer"),
}
SUFFIXES = {
    ".jsonl": [*FLAT, "chat", "preference"],
    ".json": [*FLAT, "chat", "preference"],
    ".parquet": [*FLAT, "chat", "preference"],
    ".csv": [*FLAT],
    ".txt": ["text"],
    ".md": ["text"],
    "": ["text"],
}


def talk(draw, style, roles=("user", "assistant")) -> list[dict]:
    "Turns in one of the key styles"
    names = {"user": style[2], "assistant": style[3]}
    return [{style[0]: names.get(r, r), style[1]: draw(WORDS)} for r in roles]


def make_row(draw, kind: str, style, column: str, form: str) -> dict:
    "One row of a kind"
    if kind in FLAT:
        return {c: draw(WORDS) for c in FLAT[kind]}
    roles = draw(
        st.sampled_from(
            [["user"], ["system", "user"], ["user", "assistant", "user"], ["user", "function_call", "observation"]]
        )
    )
    if kind == "chat":
        return {column: talk(draw, style, roles + ["assistant"])}
    before = talk(draw, style, roles) if column != "prompt" else draw(WORDS)
    replies = [talk(draw, style, ["assistant"])[0] for _ in range(2)]
    wrap = {
        "text": lambda r: r[style[1]],
        "turn": lambda r: r,
        "list": lambda r: [r],
        "whole": lambda r: (before if column != "prompt" else talk(draw, style, [])) + [r],
    }[form]
    return {column: before, "chosen": wrap(replies[0]), "rejected": wrap(replies[1])}


def add_columns(draw, row: dict, suffix: str) -> dict:
    "A row with columns that nobody asked for"
    extra = {
        "note": TEXT if suffix == ".csv" else st.one_of(st.none(), TEXT),
        "id": TEXT if suffix == ".csv" else st.integers(-(2**40), 2**40),
    }
    if suffix in (".json", ".jsonl"):
        extra["tools"] = st.lists(
            st.dictionaries(
                st.sampled_from(["name", "a", "b"]), st.one_of(TEXT, st.integers(-9, 9), st.none()), max_size=2
            ),
            max_size=2,
        )
    return row | {k: draw(v) for k, v in extra.items() if suffix == ".csv" or draw(st.booleans())}


def write_json(draw, rows: list) -> bytes:
    whole = {draw(st.sampled_from(["data", "rows", "train"])): rows} if draw(st.booleans()) else rows
    return json.dumps(whole, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2]))).encode()


def write_jsonl(draw, rows: list) -> bytes:
    end, ascii_only = draw(st.sampled_from(["\n", "\r\n", "\n\n"])), draw(st.booleans())
    return (end.join(json.dumps(r, ensure_ascii=ascii_only) for r in rows) + draw(st.sampled_from(["", end]))).encode()


def write_csv(draw, rows: list) -> bytes:
    buffer, columns = io.StringIO(), list(rows[0])
    # Python 3.11 writes it without quotes, and then nobody can tell it from a line's end
    bare = any("\r" in r[c] for r in rows for c in columns)
    writer = csv.writer(
        buffer,
        lineterminator=draw(st.sampled_from(["\n", "\r\n"])),
        quoting=csv.QUOTE_ALL if bare else draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    )
    writer.writerows([columns, *([r[c] for c in columns] for r in rows)])
    return buffer.getvalue().encode()


def write_parquet(draw, rows: list) -> bytes:
    sink, columns = io.BytesIO(), dict.fromkeys(c for r in rows for c in r)
    pyarrow.parquet.write_table(
        pyarrow.table({c: pyarrow.array([r.get(c) for r in rows]) for c in columns}),
        sink,
        compression=draw(st.sampled_from(["none", "snappy"])),
    )
    return sink.getvalue()


WRITERS = {
    ".json": write_json,
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".parquet": write_parquet,
    ".txt": lambda draw, rows: rows[0]["text"].encode(),
}


# The ways to break them


def break_rows(draw, rows: list, kind: str, suffix: str) -> list | None:
    "Rows of which one must be refused; None where the format cannot say such a thing"
    rows, i = [dict(r) for r in rows], draw(st.integers(0, len(rows) - 1))
    needed = [c for c in rows[i] if c not in ("note", "id", "tools", "input", "reference_answer")]
    how = draw(st.sampled_from(["type", "missing", "role", "no object", "mixed"]))
    if suffix == ".csv":
        return None
    if suffix == ".parquet" or how == "type":
        column, wrong = draw(st.sampled_from(needed)), draw(st.sampled_from([3, 1.5, True]))
        for row in rows if suffix == ".parquet" else [rows[i]]:
            row[column] = wrong
        return rows
    if how == "missing" and len(rows) > 1:
        del rows[i][draw(st.sampled_from(needed))]
        return rows
    if how == "role" and kind == "chat":
        next(iter(rows[i].values()))[0].update({"role": "narrator", "from": "narrator"})
        return rows
    if how == "no object":
        rows[i] = draw(st.sampled_from(["text", 3, None, ["a"]]))
        return rows
    if how == "mixed" and len(rows) > 1:
        rows[i] = {"frage": "a", "antwort": "b"}
        return rows
    return None


def break_bytes(draw, data: bytes) -> bytes:
    "A file after an accident"
    at, how = (
        draw(st.integers(0, max(len(data) - 1, 0))),
        draw(st.sampled_from(["cut", "flip", "nul", "latin", "empty", "lost", "twice", "quote", "comma", "again"])),
    )
    field = re.search(rb'(?<=\{)\s*("\w+":)', data)  # of a JSON object, the first
    again = data[: field.start()] + field[1] + b" 0," + data[field.start() :] if field else data + b"\n\0"
    return {
        "comma": data[:at] + b"," + data[at:],
        "again": again,
        "cut": data[:at],
        "flip": data[:at] + bytes([(data or b"x")[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :],
        "nul": data[:at] + b"\0" + data[at:],
        "latin": data[:at] + b"\xe9" + data[at:],
        "empty": b"",
        "lost": data[:at] + data[at + draw(st.integers(1, 9)) :],
        "twice": data + data,
        "quote": data[:at] + b'"' + data[at:],
    }[how]


# What broken bytes still say


def csv_rows(whole: str) -> list[dict]:
    "RFC 4180, a character at a time; a quote inside a cell without quotes is a character like others"
    table, row, cell, state = [], [], "", "start"
    for c in whole.replace("\r\n", "\n") if '"' not in whole else whole:
        if state == "quoted":
            state, cell = ("closing", cell) if c == '"' else (state, cell + c)
        elif state == "closing" and c == '"':
            state, cell = "quoted", cell + c
        elif c in ",\r\n":
            blank = state == "start" and not row
            if c == "," or not blank:
                row.append(cell)
            if c != "," and not blank:
                table.append(row)
                row = []
            cell, state = "", "start"
        elif state == "closing":
            raise Refused(c)
        elif c == '"' and state == "start":
            state = "quoted"
        else:
            cell, state = cell + c, "plain"
    if state == "quoted":
        raise Refused("open quote")
    if row or state != "start":
        table.append([*row, cell])
    if table:
        table[0] = [name.strip() for name in table[0]]
    if not table or len(set(table[0])) < len(table[0]) or any(len(r) != len(table[0]) for r in table):
        raise Refused("ragged")
    return [dict(zip(table[0], r)) for r in table[1:]]


def once(pairs: list[tuple]) -> dict:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Refused(pairs)
    return dict(pairs)


def still_says(data: bytes, suffix: str) -> list[dict]:
    "The rows of a file's bytes by other means than the library's; any exception says that it cannot be read"
    if suffix == ".parquet":
        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    whole = data.decode("utf-8-sig")
    if "\0" in whole:
        raise Refused("NUL")
    if suffix == ".csv":
        return csv_rows(whole)
    if suffix == ".jsonl":
        return [json.loads(line, object_pairs_hook=once) for line in whole.split("\n") if line.strip()]
    if suffix != ".json":
        return [{"text": whole}]
    rows = json.loads(whole, object_pairs_hook=once)
    if type(rows) is dict and len(rows) == 1:
        rows = next(iter(rows.values()))
    if type(rows) is not list:
        raise Refused(rows)
    return rows


@st.composite
def data_files(draw) -> tuple:
    "(suffix, files' bytes, rows or None if a file cannot be read, whether it is broken)"
    suffix = draw(st.sampled_from(list(SUFFIXES)))
    kind, style = draw(st.sampled_from(SUFFIXES[suffix])), draw(st.sampled_from(STYLES))
    column = draw(st.sampled_from(["messages", "conversations"] + ["prompt"] * (kind == "preference")))
    form = draw(st.sampled_from(["text", "turn", "list"] + ["whole"] * (column != "prompt")))
    alone = suffix in (".txt", ".md")
    rows = [make_row(draw, kind, style, column, form) for _ in range(1 if alone else draw(st.integers(1, 4)))]
    if WRITERS.get(suffix) and not alone:
        rows = [add_columns(draw, r, suffix) for r in rows]
    broken, write = draw(st.booleans()), WRITERS.get(suffix, WRITERS[".txt"])
    refused = break_rows(draw, rows, kind, suffix) if broken and not alone and suffix and draw(st.booleans()) else None
    if refused:
        return suffix, [write(draw, refused)], None, True
    if suffix in (".txt", ".md", ""):
        rows = [{"text": r["text"].lstrip("\ufeff")} for r in rows]  # at the start of a file it is a mark
    files = [write(draw, [r]) for r in rows] if not suffix else [write(draw, rows)]
    if suffix != ".parquet" and draw(st.booleans()):
        files = [b"\xef\xbb\xbf" + f for f in files]
    if not broken:
        return suffix, files, rows, False
    files[0] = break_bytes(draw, files[0])
    try:
        rows = [r for f in files for r in still_says(f, suffix)]
    except Exception:
        rows = None
    return suffix, files, rows, True


def save(folder: Path, number: int, suffix: str, files: list[bytes]) -> Path:
    "The files on the disk; without a suffix they are texts in a folder"
    path = folder / f"data{number}{suffix}"
    if suffix:
        path.write_bytes(files[0])
        return path
    for i, data in enumerate(files):
        (path / "deep").mkdir(parents=True, exist_ok=True)
        (path / ("deep" if i % 2 else ".") / f"{i}.{'md' if i % 3 else 'TXT'}").write_bytes(data)
    return path


def plain(value, wanted):
    "A value of a column that no type fits, which is kept as JSON, where it says what is wanted"
    odd = type(value) is str and value != wanted and "\\ud" in value
    return json.loads(value) if odd else value


def check(path: Path, rows: list | None, broken: bool) -> str:
    "Load one file and hold the result against what it means; says what became of it"
    try:
        wanted, blank = meaning(rows if rows is not None else [None])
    except Refused:
        wanted, blank = None, None
    try:
        table = load_examples(path)
    except TinyTrainerError as e:
        assert str(path) in str(e) and len(str(e).splitlines()) == 1 and str(e).endswith("."), str(e)
        assert wanted is None or broken, f"refused, but it says {wanted}: {e}"
        return "refused"
    found = [{k: v for k, v in r.items() if v is not None} for r in table.to_list()]
    order = lambda rs: sorted(map(repr, rs)) if path.is_dir() else rs
    found = [{k: plain(v, w.get(k)) for k, v in r.items()} for r, w in zip(found, wanted, strict=True)]
    assert order(found) == order(wanted), "altered"
    assert data_origin(table)["left_out_empty"] == blank and len(table) + blank == len(rows), "lost"
    return "read"


def test_every_file_is_read_exactly_or_refused(tmp_path):
    fates = Counter()

    def each(case):
        suffix, files, rows, broken = case
        fates["files"] += 1
        path = save(tmp_path, fates["files"], suffix, files)
        fates[suffix, broken, check(path, rows, broken)] += 1

    batch = settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for start in range(FILES // BATCH):
        seed(start)(batch(given(data_files())(each)))()
    assert fates["files"] >= FILES
    missed = [
        (suffix, case)
        for suffix in SUFFIXES
        for case in ((False, "read"), (True, "refused"))
        if not fates[(suffix, *case)]
    ]
    assert not missed, f"never met: {missed}"
    halves = [sum(n for k, n in fates.items() if k != "files" and k[1] is broken) for broken in (False, True)]
    assert min(halves) > FILES / 4, halves


# Files as strangers write them: what each means is known before it is written


def word(r: random.Random) -> str:
    "A text with what ends a line, a cell, a turn or a document somewhere"
    sharp = [
        "</s>",
        "<s>",
        "<|im_end|>",
        "[INST]",
        "### Response:",
        '"',
        ",",
        "\n",
        "\r\n",
        "\u2028",
        "\ufeff",
        "漢😀",
        " ",
    ]
    return "w" + "".join(r.choice([*sharp, "a", "7"]) for _ in range(r.randint(0, 6))) + "w"


def strange_talk(r: random.Random) -> list[dict]:
    "A conversation that ends with an answer"
    turns = [{"role": role, "content": word(r)} for role in ["user", "assistant"] * r.randint(1, 2)]
    if r.random() < 0.2:
        turns[1:1] = [
            {"role": "function_call", "content": word(r)},
            {"role": "observation", "content": r.choice(["", word(r)])},
        ]
    return turns


def in_style(r: random.Random, turns: list[dict], style) -> list[dict]:
    "Turns in one of the key styles; each weight in one of the ways to mark it"
    names, marks = {"user": style[2], "assistant": style[3]}, [{"weight": 0}, {"loss": False}, {"train": False}]
    found = []
    for turn in turns:
        mark = (
            r.choice(marks)
            if turn.get("weight") == 0
            else r.choice([{}, {}, {"weight": 1}])
            if style[0] == "role"
            else {}
        )
        found.append({style[0]: names.get(turn["role"], turn["role"]), style[1]: turn["content"], **mark})
    return found


def strange_row(r: random.Random, kind: str, style, ask: str, answer: str, column: str) -> tuple[dict, dict]:
    "A row as it stands in a file, and what it means"
    turns = strange_talk(r)
    if kind == "text":
        said = word(r)
        return {"text": said}, {"text": said}
    if kind == "pair":
        question, reply = word(r), word(r)
        return {ask: question, answer: reply}, {"messages": dialogue(question, reply)}
    if kind == "chat":
        if r.random() < 0.3:
            turns[-1] |= {"weight": 0}
        return {column: in_style(r, turns, style)}, {"messages": turns}
    before, good, bad = turns[:-1], word(r), word(r)
    whole = [in_style(r, [*before, {"role": "assistant", "content": t}], style) for t in (good, bad)]
    row = {"chosen": whole[0], "rejected": whole[1]}
    asked = [t["content"] for t in (before[0], before[-1]) if t["role"] == "user"]
    row |= {"beside": {column: whole[0]}, "prompt": {"prompt": r.choice(asked)}, "alone": {}}[kind]
    return row, {"messages": before, "chosen": good, "rejected": bad}


def with_system(r: random.Random, row: dict, meant: dict, column: str | None, name: str) -> None:
    "A system text in one of its places, or none, or an empty one"
    if "text" in meant or not meant["messages"]:
        return
    where = r.choice(["none", "column", "empty column", "turn", "empty turn", "both"])
    style = next((s for s in STYLES if column and s[0] in row[column][0]), STYLES[0])
    content = {"turn": "wSw", "both": "wSw", "empty turn": " "}.get(where)
    if content and column:
        row[column] = [{style[0]: "system", style[1]: content}, *row[column]]
    row |= {"column": {name: "wSw"}, "empty column": {name: ""}, "both": {name: "wSw"}}.get(where, {})
    if where in ("column", "both") or (where == "turn" and column):
        meant["messages"] = [{"role": "system", "content": "wSw"}, *meant["messages"]]


ODD = {  # columns that nobody needs
    ".jsonl": [
        ["a", 1],
        [True, 1.5],
        [[1], {"a": None}],
        [{"a": 1}, {"b": "x"}],
        [10**30, "x"],
        ["\ud83d", 1],
        [None, ""],
    ],
    ".csv": [["", "007"], ["nan", "\n"]],
    ".parquet": [
        pyarrow.array([[("a", "1")], [("b", "2")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
        pyarrow.array([decimal.Decimal("1.50"), None]),
        pyarrow.array([datetime.date(2020, 1, 1), None]),
        pyarrow.array([10**15, 0], pyarrow.timestamp("s")),
        pyarrow.array([b"\xff", None]),
        pyarrow.array([b"\xff", b"a"]).view(pyarrow.string()),
        pyarrow.array([float("nan"), 1.0]),
        pyarrow.array([{"a": {"b": [1]}}, None]),
    ],
}
ODD[".json"] = ODD[".jsonl"]
PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def strange_bytes(r: random.Random, rows: list[dict], suffix: str, odd) -> bytes:
    "Rows as a file's bytes, with an odd column"
    if suffix == ".parquet":
        columns = dict.fromkeys(c for row in rows for c in row)
        table = {c: pyarrow.array([row.get(c) for row in rows]) for c in columns}
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(table | {"odd": odd.take([i % 2 for i in range(len(rows))])}), sink)
        return sink.getvalue()
    rows = [row | {"odd": odd[i % 2]} for i, row in enumerate(rows)]
    mark = b"\xef\xbb\xbf" if r.random() < 0.3 else b""
    if suffix == ".csv":
        buffer, blank = io.StringIO(), r.choice(["", " ", "\t"])
        writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
        names = list(dict.fromkeys(c for row in rows for c in row))
        writer.writerows([[blank + c + blank for c in names], *([row.get(c, "") for c in names] for row in rows)])
        return mark + buffer.getvalue().encode()
    if suffix == ".json":
        return mark + json.dumps(rows, ensure_ascii=True).encode()
    return mark + "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()


def spoil_rows(r: random.Random, rows: list[dict], kind: str, suffix: str, column: str) -> str | None:
    "Make a row one that must be refused; says what the error has to name, None if nothing was changed"
    row, wrong = r.choice(rows), r.choice([3, ["a"], {"a": 1}])
    if suffix in (".csv", ".parquet"):
        return None
    if kind == "text":
        row["text"] = wrong
        return "field 'text'"
    if kind == "chat":
        turn = row[column][-1]
        how = r.choice(["role", "weight", "content"])
        turn |= {"role": {"role": "narrator", "from": "narrator"}, "weight": {"weight": 0.5}}.get(
            how, {"content": 3, "value": 3}
        )
        return f"field '{column}'"
    if kind in ("beside", "prompt", "alone"):
        row["rejected"] = wrong
        return "field 'rejected'"
    return None


def spoil_bytes(r: random.Random, data: bytes, packed: str) -> bytes | None:
    "A file after an accident; None where none is sure to be noticed"
    if packed:
        return data[: -r.randint(1, 9)]
    return r.choice([b"version https://git-lfs.github.com/spec/v1\nsize 3\n", b"\xff\xfe" + data, b"\0" + data])


def strange_file(r: random.Random, path: Path) -> tuple[Path, list[dict] | None, str, object]:
    "(path, what its rows mean or None, what an error has to name, the odd column's values)"
    suffix, packed = r.choice([".jsonl", ".json", ".csv", ".parquet"]), r.choice(list(PACK))
    kind = r.choice(["text", "pair"] if suffix == ".csv" else ["text", "pair", "chat", "beside", "prompt", "alone"])
    style, column = r.choice(STYLES), r.choice(["messages", "conversations"])
    ask, answer, name = r.choice(ASKS), r.choice(ANSWERS), r.choice(["system", "system_prompt"])
    made = [strange_row(r, kind, style, ask, answer, column) for _ in range(r.randint(1, 4))]
    for row, meant in made:
        with_system(r, row, meant, column if kind == "chat" else None, name)
    rows, odd = [row for row, _ in made], r.choice(ODD[suffix])
    spoiled = r.random() < 0.3 and spoil_rows(r, rows, kind, suffix, column)
    parts = [rows[i::2] for i in range(2)] if len(rows) > 1 and r.random() < 0.3 and not spoiled else [rows]
    files = [PACK[packed](strange_bytes(r, part, suffix, odd)) for part in parts]
    if not spoiled and r.random() < 0.2 and (broken := spoil_bytes(r, files[-1], packed)):
        files[-1], spoiled = broken, "." + suffix[1:]
    meaning = None if spoiled else [m for i in range(len(parts)) for _, m in made[i :: len(parts)]]
    if len(parts) == 1 and r.random() < 0.5:
        path = path.with_name(path.name + suffix + packed)
        path.write_bytes(files[0])
        return path, meaning, spoiled, odd
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    for i, data in enumerate(files):
        (path / "data" / f"train-{i:05d}-of-00002{suffix}{packed}").write_bytes(data)
    if r.random() < 0.5:
        (path / "data" / f"test-00000-of-00001{suffix}{packed}").write_bytes(b"nobody reads it")
    return path, meaning, spoiled, odd


def weighted(rows: list[dict]) -> list[dict]:
    "Meanings with a weight at each turn, if one has one"
    if not any("weight" in turn for row in rows for turn in row.get("messages", ())):
        return rows
    return [row | {"messages": [{"weight": 1} | turn for turn in row["messages"]]} for row in rows]


def odd_is_told(found: list, odd, err: str, suffix: str) -> bool:
    "Whether an odd column came back as it was, as JSON, or not at all, and a line says so"
    if suffix == ".parquet" or not found:
        return bool(found) or "column odd left out" in err
    same = lambda f, o: f == o or (isinstance(f, str) and "kept as JSON" in err and json.loads(f) == o)
    return all(any(same(f, o) for o in odd) for f in found)


def strangers(tmp_path: Path, capsys, count: int) -> Counter:
    "Write and read so many files; how many were read and refused, by suffix"
    fates = Counter()
    for number in range(count):
        r = random.Random(number)
        path, meaning, spoiled, odd = strange_file(r, tmp_path / f"data{number}")
        suffix = next(
            s for s in (".jsonl", ".json", ".csv", ".parquet") if any(s in f.name for f in [path, *path.rglob("*")])
        )
        capsys.readouterr()
        try:
            table = load_examples(path)
        except TinyTrainerError as e:
            assert meaning is None, f"{number}: refused, but it says {meaning}: {e}"
            assert str(path) in str(e) and spoiled in str(e) and len(str(e).splitlines()) == 1, f"{number}: {e}"
            fates[suffix, "refused"] += 1
            continue
        assert meaning is not None, f"{number}: {path} is spoiled ({spoiled}), and was read as {table[0]}"
        columns = [c for c in ("messages", "text", "chosen", "rejected") if c in table.column_names]
        assert [{c: row[c] for c in columns} for row in table.to_list()] == weighted(meaning), (
            f"{number}: {path} altered"
        )
        found = table["odd"][:] if "odd" in table.column_names else []
        assert odd_is_told(found, odd, capsys.readouterr().err, suffix), f"{number}: {path}: {odd} became {found}"
        fates[suffix, "read"] += 1
    return fates


def test_strangers_files_mean_what_they_say(tmp_path, capsys):
    fates = strangers(tmp_path, capsys, 150)
    assert len(fates) == 8 and sum(fates.values()) == 150, fates


@pytest.mark.slow
def test_a_thousand_strangers_files_mean_what_they_say(tmp_path, capsys):
    fates = strangers(tmp_path, capsys, 1000)
    assert len(fates) == 8 and sum(fates.values()) == 1000 and min(fates.values()) > 20, fates
