"""What people bring: columns that come late, odd separators, rows left out, and a machine's limits read right."""

import csv
import datetime
import io
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tinytrainer_nb import core
from tinytrainer_nb.cli import main, read_data_settings
from tinytrainer_nb.core import (
    TinyTrainerError,
    data_file,
    patiently,
    read_json,
    write_json,
)
from tinytrainer_nb.data import formats as data
from tinytrainer_nb.data.arguments import DataArgs
from tinytrainer_nb.data.formats import (
    MAPPINGS,
    as_examples,
    data_origin,
    empty_rows,
    load_examples,
    load_prompts,
)
from tinytrainer_nb.data.rows import encode_rows, held_note, hold_out, read_examples
from tinytrainer_nb.data.tokens import encode_chat, ensure_template, render
from tinytrainer_nb.hardware import _cgroup_free, peak_memory
from tinytrainer_nb.recipes.arguments import PPOArgs
from tinytrainer_nb.recipes.pretrain import read_texts
from tinytrainer_nb.recipes.rewards import exact_answer
from tinytrainer_nb.recipes.rounds import held_first, held_out
from tinytrainer_nb.recipes.sft import _lessons
from tinytrainer_nb.views.data_report import data_report

INSTRUCTION = "### Instruction:\nName a color.\n### Response:\nRed."
GiB = 2**30


def jsonl(folder, *rows) -> Path:
    "A file of `rows`; a text among them is a line as it stands"
    path = folder / "data.jsonl"
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def test_a_column_that_the_first_row_lacks_is_kept(tmp_path):
    path = jsonl(tmp_path, dict(prompt="1 + 1?"), dict(prompt="2 + 2?", reference_answer="4"))
    assert load_examples(path)["reference_answer"][:] == [None, "4"]
    assert [p["reference_answer"] for p in load_prompts(path)] == [None, "4"]


def test_an_answer_serves_where_a_row_has_no_reference():
    rows = [dict(prompt="1 + 1?", completion="2"), dict(prompt="2 + 2?", completion="It is 4.", reference_answer="4")]
    assert [p["reference_answer"] for p in load_prompts(rows)] == ["2", "4"]


@pytest.mark.parametrize("texts", [["plain", INSTRUCTION], [INSTRUCTION, "plain"]])
def test_texts_and_instructions_may_be_mixed(texts, capsys):
    table = load_examples([dict(text=t) for t in texts])
    for row, text in zip(table, texts):
        if text == "plain":
            assert row == dict(messages=None, text="plain")
        else:
            assert row["text"] is None and [m["content"] for m in row["messages"]] == ["Name a color.", "Red."]
    assert [p["messages"][0]["content"] for p in load_prompts(table)] == ["Name a color."]
    assert f"1 of 2 rows left out: nothing is asked (row {texts.index('plain') + 1})" in capsys.readouterr().err
    assert load_examples(table).to_list() == table.to_list()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    row = dict(prompt=f"a{separator}b", completion="c")
    path = jsonl(tmp_path, row, row)
    assert [r["messages"][0]["content"] for r in load_examples(path)] == [row["prompt"]] * 2


def test_lines_of_windows_are_read(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert load_examples(tmp_path / "data.jsonl")["text"][:] == ["a", "b"]


def test_a_column_named_input_belongs_to_instructions_only():
    assert load_examples([dict(prompt="a", completion="b", input="kept")])["input"][:] == ["kept"]
    table = load_examples(
        [dict(instruction="Add.", input="1, 2", output="3", level=1), dict(instruction="Hello", output="Hi")]
    )
    assert table.column_names == ["messages", "level"]
    assert [r["messages"][0]["content"] for r in table] == ["Add.\n1, 2", "Hello"]


def test_rows_left_out_are_shown_and_counted(tmp_path, capsys):
    rows = [dict(prompt="a", completion="b")]
    load_examples(rows)
    assert capsys.readouterr() == ("", "")
    path = jsonl(tmp_path, *rows, "", dict(prompt="a", completion=" "))
    table = load_examples(path)
    out, err = capsys.readouterr()
    said = "in line 3 turn 2, of the role assistant, is empty"
    assert (out, err) == ("", f"{path}: 1 of 2 rows left out: empty text (line 3); {said}\n")
    assert len(table) == 1 and data_origin(table)["left_out_empty"] == 1
    load_examples([dict(text="")] * 7 + [dict(text="a")])
    left_out = "7 of 8 rows left out: empty text (row 1, 2, 3, 4, 5, ...)"
    assert capsys.readouterr().err == f"the data: {left_out}; in row 1 'text' is empty\n"
    assert len(load_examples([dict(messages=[])] + [dict(messages=[dict(role="user", content="a")])])) == 1


@pytest.mark.parametrize(
    "rows, said",
    [
        (
            [dict(prompt="a", completion="b"), "", dict(prompt="a", completion=3)],
            "line 3, field 'completion': expected text, found 3",
        ),
        ([dict(instruction="a", input=3, output="b")], "line 1, field 'input': expected text, found 3"),
        (
            [dict(messages=[dict(role="user", content="a")]), dict(prompt="a")],
            "line 2, field 'messages': expected a list of turns, found None",
        ),
        (
            [dict(text="a", level=1), dict(text=" "), "", dict(text="b", level="hard"), '{"text": "\\ud83d"}'],
            "line 5, field 'text': found '\\ud83d'",
        ),
        ([dict(prompt=" ", completion="b")], "no row left to use (1 read, 1 with an empty text)"),
        ([dict(text="a"), "{"], "line 2: not readable as JSON"),
    ],
)
def test_refused_with_file_line_and_field(tmp_path, rows, said):
    path = jsonl(tmp_path, *rows)
    with pytest.raises(TinyTrainerError) as e:
        load_examples(path)
    assert str(path) in str(e.value) and said in str(e.value) and "\n" not in str(e.value)


def parquet(**columns) -> bytes:
    "A Parquet file's bytes"
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


PAIR = b'{"prompt": "a", "completion": "b"}'
FAULTS = [  # file, its bytes, what the error says
    ("empty.jsonl", b"", "no row in it. Fill it"),
    ("empty.json", b"", "line 1: not readable as JSON"),
    ("nothing.json", b"[]", "no row in it. Fill it"),
    ("empty.csv", b"", "no row in it. Fill it"),
    ("header.csv", b"prompt,completion\r\n", "no row in it. Fill it"),
    ("empty.parquet", b"", "not readable as Parquet"),
    ("empty.txt", b"", "no row left to use (1 read, 1 with an empty text)"),
    (
        "cut.jsonl",
        PAIR + b"\n" + PAIR[:20],
        "line 2: not readable as JSON (Unterminated string starting at, column 17)",
    ),
    ("cut.json", b'[{"text": "a"},\n{"te', "line 2: not readable as JSON"),
    ("cut.csv", b'prompt,completion\na,b\nc,"d', "line 3: not readable as CSV (unexpected end of data)"),
    ("cut.parquet", parquet(text=["a"])[:-5], "not readable as Parquet"),
    ("nul.txt", b"one\ntw\0o", "line 2: its byte 3 is NUL"),
    ("nul.jsonl", b'{"text": "a\0"}', "line 1: its byte 12 is NUL"),
    ("nul.csv", b"text\na\0", "line 2: its byte 2 is NUL"),
    ("latin.md", b"\n\ncaf\xe9", "line 3: its byte 4 (0xe9) is not UTF-8. Save the file as UTF-8"),
    ("utf16.csv", "text\na".encode("utf-16"), "line 1: its byte 1 (0xff) is not UTF-8"),
    ("latin.parquet", parquet(text=pyarrow.array([b"caf\xe9"]).view(pyarrow.string())), "not readable as Parquet"),
    ("number.json", b'[{"prompt": "a", "completion": 3}]', "row 1, field 'completion': expected text, found 3"),
    ("null.jsonl", b'{"text": null}', "line 1, field 'text': expected text, found None"),
    ("number.parquet", parquet(prompt=["a"], completion=[3]), "row 1, field 'completion': expected text, found 3"),
    ("bytes.parquet", parquet(text=[b"a"]), "row 1, field 'text': expected text, found b'a'"),
    ("line.jsonl", PAIR + b'\n"a"', "line 2: found 'a', but each line must be a JSON object"),
    ("object.json", PAIR, "holds a list of objects, alone or as the only field of one object"),
    (
        "lists.json",
        b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
        "holds a list of objects, alone or as the only field",
    ),
    (
        "conversation.json",
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "holds a list of objects, alone or as the only field",
    ),
    ("texts.json", b'["a", "b"]', "row 1: found 'a', but a JSON file holds a list of objects"),
    (
        "twice.jsonl",
        b'{"prompt": "a", "prompt": "b"}',
        "line 1: not readable as JSON (the field 'prompt' stands twice)",
    ),
    ("twice.csv", b"prompt,prompt\na,b", "a column name stands twice, among prompt, prompt"),
    ("deep.jsonl", b"[" * 100000, "line 1: not readable as JSON (maximum recursion depth"),
    (
        "surrogate.jsonl",
        b'{"text": "\\ud83d"}',
        "line 1, field 'text': found '\\ud83d', which does not go into a column",
    ),
    (
        "ragged.csv",
        b'prompt,completion\n"a\nb",c\nd,e,f\n',
        "line 4: 3 cells under 2 column names (prompt, completion)",
    ),
    ("semicolon.csv", b"prompt;completion\na;b", "line 1: its cells are separated by ';', but they must be by commas"),
    ("names.csv", b'"a\nb",c\n1,2', "columns a b, c are no known kind of data"),
    ("quote.csv", b'text\n"a" b', "line 2: not readable as CSV"),
    (
        "role.jsonl",
        b'{"messages": [{"role": "narrator", "content": "a"}]}',
        "line 1, field 'messages': unknown role 'narrator'; known: human, user, gpt",
    ),
    ("role.json", b'[{"conversations": [{"from": ["human"], "value": "a"}]}]', "unknown role ['human']; known: human"),
    (
        "turn.jsonl",
        b'{"messages": [{"role": "user"}]}',
        "a turn needs a role and a text, as 'role' and 'content' or 'from' and 'value'",
    ),
    (
        "null_calls.jsonl",
        b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}',
        "write each call as a turn of its own, such as",
    ),
    (
        "case.csv",
        b"Question,Answer\na,b",
        "columns={'question': 'Question', 'answer': 'Answer'}, in a terminal --columns question=Question,answer=Answer",
    ),
    (
        "calls.jsonl",
        b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}',
        "write each call as a turn of its own, such as",
    ),
    ("cells.csv", b"messages\nhello", "line 2, field 'messages': expected a list of turns, found 'hello'"),
    (
        "unknown.jsonl",
        b'{"frage": "a", "antwort": "b"}',
        "columns frage, antwort are no known kind of data. Known: messages + chosen + rejected",
    ),
    (
        "mixed.jsonl",
        PAIR + b'\n{"question": "a", "answer": "b"}',
        (
            "line 2, field 'prompt': expected text, found None; the data are read as "
            "prompt/completion (prompt + completion), but this row has question, answer"
        ),
    ),
    ("blank.jsonl", b'{"prompt": " ", "completion": "b"}', "no row left to use (1 read, 1 with an empty text)"),
    (
        "answered.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}',
        "line 1, field 'messages': ends with an assistant's turn",
    ),
    (
        "chosen.jsonl",
        b'{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}',
        "line 1, field 'chosen': expected one assistant's turn",
    ),
    (
        "chosen.json",
        b'[{"prompt": "a", "chosen": 1, "rejected": "c"}]',
        "row 1, field 'chosen': expected text, found 1",
    ),
    ("data.xlsx", b"PK", "files ending in .xlsx are not read. Known: .jsonl, .json, .csv, .parquet, .txt, .md"),
    ("noname", b"a", "files ending in nothing are not read"),
]


@pytest.mark.parametrize("name, content, said", FAULTS, ids=[f[0] for f in FAULTS])
def test_faults_are_named_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TinyTrainerError) as e:
        load_examples(tmp_path / name)
    assert (
        str(e.value).startswith(str(tmp_path / name)) and said in str(e.value) and len(str(e.value).splitlines()) == 1
    ), str(e.value)


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "the data: no row in it"),
        (Dataset.from_list([]), "the data: no row in it"),
        (3, "data 3: expected a file, a folder of texts, a Hub id"),
        ({"prompt": ["a"]}, "expected a file, a folder of texts, a Hub id, a list of dicts or a datasets.Dataset"),
        ("a\0b", "expected a file"),
        ([{1: "a"}], "row 1: found {1: 'a'}, but each row must be a dict"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("nobody/nothing", "nobody/nothing: not a file here, and not to be had from the Hub"),
        ("gsm8k", "openai/gsm8k:main: not a file here, and not to be had from the Hub"),
    ],
)
def test_what_is_no_data_is_refused(given, said):
    began = time.process_time()
    with pytest.raises(TinyTrainerError) as e:
        load_examples(given)
    assert said in str(e.value) and len(str(e.value).splitlines()) == 1 and time.process_time() - began < 5


def test_folders(tmp_path, capsys):
    with pytest.raises(TinyTrainerError, match="no data and no .txt or .md file in this folder. Name a data file"):
        load_examples(tmp_path)
    (tmp_path / "rows.html").write_bytes(PAIR)
    with pytest.raises(TinyTrainerError, match="in this folder, only rows.html. Name a data file"):
        load_examples(tmp_path)
    for name, text in {"B.TXT": "b", "deep/a.md": "a", ".checkpoints/a.md": "hidden", "c.txt": " "}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_examples(tmp_path)["text"][:] == ["b", "a"]
    err = capsys.readouterr().err
    assert (
        "1 of 4 files left out (rows.html); read as one data set: B.TXT, c.txt, deep/a.md" in err
        and "1 of 3 rows left out: empty text (file c.txt)" in err
    )
    (tmp_path / "deep" / "a.md").write_bytes(b"\xff")
    with pytest.raises(TinyTrainerError, match=r"a.md, line 1: its byte 1 \(0xff\) is not UTF-8"):
        load_examples(tmp_path)


# Read exactly


def test_cells_stay_text(tmp_path, capsys):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfprompt,completion,note\r\n1,007,\r\n\r\nnan,"two\r\nlines, ""quoted""",None\r\nempty,,x\r\n'
    )
    table = load_examples(tmp_path / "a.csv")
    assert [[m["content"] for m in r["messages"]] for r in table] == [["1", "007"], ["nan", 'two\r\nlines, "quoted"']]
    assert table["note"][:] == ["", "None"] and "1 of 3 rows left out: empty text (line 6)" in capsys.readouterr().err


def test_a_cell_may_be_long(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as f:
        csv.writer(f).writerows([["text"], ["x" * 300_000]])
    assert load_examples(tmp_path / "a.csv")["text"][:] == ["x" * 300_000]


@pytest.mark.parametrize(
    "text", ["a\r\nb\rc\n", "\x85 \u2028 \x1c.", " space around \n\n", "no-break\xa0 and \ufeff inside"]
)
def test_texts_are_read_to_the_last_character(tmp_path, text):
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_examples(tmp_path / "a.TXT")["text"][:] == [text]


def test_an_escaped_nul_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\u0000b"}')
    assert load_examples(tmp_path / "a.jsonl")["text"][:] == ["a\0b"]


def test_a_list_may_stand_in_an_object(tmp_path):
    (tmp_path / "a.json").write_text('{"data": [{"text": "a"}]}')
    assert load_examples(tmp_path / "a.json")["text"][:] == ["a"]


@pytest.mark.parametrize(
    "column",
    [
        [[{"name": "add", "parameters": {"a": 1}}], [{"name": "say", "parameters": {"b": "x"}}]],
        [{"a": 1}, {"a": "x"}],
        [[1, "a"], None],
        [{}, {"a": []}],
        [{"a": None}, {"b": 1}],
        ['[{"name": "add"}]', ""],
        [1.5, None],
        [datetime.datetime(2020, 1, 1), None],
    ],
)
def test_other_columns_are_untouched(column):
    table = load_examples([dict(text="t", tools=c) for c in column])
    assert table["tools"][:] == column
    assert load_examples(table).to_list() == table.to_list()


def test_parquet_types_that_hold_text(tmp_path):
    words = pyarrow.array(["a", "b"])
    for kind in (words, words.cast(pyarrow.large_string()), words.dictionary_encode()):
        (tmp_path / "a.parquet").write_bytes(parquet(text=kind, day=[datetime.date(2020, 1, 1), None]))
        assert load_examples(tmp_path / "a.parquet")["text"][:] == ["a", "b"]


def test_columns_that_json_cannot_hold_do_not_stop_a_run():
    table = _lessons(load_examples([dict(text="t", day=datetime.date(2020, 1, 1), raw=b"a")]))
    assert json.loads(json.dumps(table.to_list())) == [dict(text="t")]


# Conversations


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize(
    "role, content, names",
    [("role", "content", "system user assistant".split()), ("from", "value", "system human gpt".split())],
)
def test_both_key_styles_under_both_names(column, role, content, names):
    table = load_examples([{column: [{role: n, content: f"{n}!"} for n in names], "tools": "[]"}])
    assert table[0] == dict(
        messages=[dict(role=r, content=f"{n}!") for r, n in zip(["system", "user", "assistant"], names)], tools="[]"
    )


def test_an_instruction_in_a_text_may_have_an_input():
    text = "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3\n"
    assert [m["content"] for m in load_examples([dict(text=text)])[0]["messages"]] == ["Add.\n1, 2", "3"]
    assert [
        m["content"] for m in load_examples([dict(text="### Instruction: Add. ### Response: 3")])[0]["messages"]
    ] == ["Add.", "3"]


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
@pytest.mark.parametrize("form", ["text", "turn", "list", "whole"])
def test_preferences_in_every_form(column, form):
    question, turn = [{"from": "human", "value": "q"}], lambda t: {"from": "gpt", "value": t}
    wrap = dict(text=lambda t: t, turn=turn, list=lambda t: [turn(t)], whole=lambda t: [*question, turn(t)])[form]
    row = {column: "q" if column == "prompt" else question, "chosen": wrap("good"), "rejected": wrap("bad"), "score": 1}
    wanted = dict(messages=[dict(role="user", content="q")], chosen="good", rejected="bad", score=1)
    table = load_examples([row])
    assert table.to_list() == load_examples(table).to_list() == [wanted]
    learned = load_examples([row], columns={"completion": "chosen"})
    assert learned[0]["messages"] == wanted["messages"] + [dict(role="assistant", content="good")]


def test_real_preferences(shared):
    path = shared / "data" / "preference" / "dpo_en_demo.json"
    names = dict(human="user", gpt="assistant", system="system")
    wanted = [
        dict(
            messages=[dict(role=names[t["from"]], content=t["value"]) for t in r["conversations"]],
            chosen=r["chosen"]["value"],
            rejected=r["rejected"]["value"],
        )
        for r in json.loads(path.read_text(encoding="utf-8"))
    ]
    table = load_examples(path)
    assert table.to_list() == wanted
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    with pytest.raises(
        TinyTrainerError,
        match=r"300 nothing to learn.*columns=\{'completion': 'chosen'\}, in a terminal --columns completion=chosen",
    ):
        encode_rows(tokenizer, table, 512)
    rows, _ = encode_rows(tokenizer, load_examples(path, columns={"completion": "chosen"}).select(range(5)), 4096)
    assert len(rows) == 5


def test_an_answer_beside_a_conversation():
    asked = [dict(role="user", content="q")]
    assert load_examples([dict(messages=asked, completion="a")])[0]["messages"][-1] == dict(
        role="assistant", content="a"
    )
    answered = dict(messages=[*asked, dict(role="assistant", content="a")], completion="other")
    assert load_examples([answered]).to_list() == [answered]
    assert load_examples([dict(prompt=asked, completion=[dict(role="assistant", content="a")])])[0]["messages"] == [
        *asked,
        dict(role="assistant", content="a"),
    ]


# What a model sees

CALLED = [
    dict(role="system", content="Be short."),
    dict(role="user", content="What is 17 * 23?"),
    dict(role="function_call", content='{"name": "times"}'),
    dict(role="observation", content="391"),
    dict(role="assistant", content="It is 391."),
    dict(role="user", content="And 2 * 2?"),
    dict(role="assistant", content="4"),
]
LEARNED = ['{"name": "times"}', "It is 391.", "4"]


def spoken(tokenizer, row: dict) -> list[str]:
    "The learned stretches of a row"
    runs, inside = [], False
    for token, label in zip(row["input_ids"], row["labels"]):
        if label != -100:
            runs = runs if inside else [*runs, []]
            runs[-1].append(token)
        inside = label != -100
    return [tokenizer.decode(r) for r in runs]


def test_every_answer_is_learned_with_its_end_and_nothing_else():
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    row = encode_chat(tokenizer, CALLED)
    assert spoken(tokenizer, row) == [t + tokenizer.eos_token for t in LEARNED]
    pieces = [
        (f"{tokenizer.bos_token}### System:\nBe short.\n### User:\nWhat is 17 * 23?\n### Assistant:\n", False),
        (LEARNED[0] + tokenizer.eos_token, True),
        ("\n### Tool:\n391\n### Assistant:\n", False),
        (LEARNED[1] + tokenizer.eos_token, True),
        ("\n### User:\nAnd 2 * 2?\n### Assistant:\n", False),
        (LEARNED[2] + tokenizer.eos_token, True),
        ("\n", False),
    ]
    whole = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
    ends = [sum(len(text) for text, _ in pieces[: i + 1]) for i in range(len(pieces))]
    learn = [next(said for end, (_, said) in zip(ends, pieces) if b <= end) for _, b in whole.offset_mapping]
    assert row == dict(
        input_ids=whole.input_ids, labels=[t if said else -100 for t, said in zip(whole.input_ids, learn)]
    )


def test_a_tool_speaks_as_a_user_where_the_template_drops_it(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tinyllama-tokenizer")
    assert render(tokenizer, CALLED) == "".join(
        f"<|{role}|>\n{m['content']}</s>\n"
        for m, role in zip(CALLED, "system user assistant user assistant user assistant".split())
    )
    assert spoken(tokenizer, encode_chat(tokenizer, CALLED)) == [t + "</s>" for t in LEARNED]
    assert spoken(tokenizer, encode_chat(tokenizer, CALLED[4:])) == ["It is 391.</s>", "4</s>"]


TEMPLATES = {
    "refuses": (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif "
        "%}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt "
        "%}[assistant] {% endif %}"
    ),
    "trims": (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor "
        "%}{% if add_generation_prompt %}[assistant] {% endif %}"
    ),
    "quotes": (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | tojson if m['role'] == 'tool' "
        "else m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% "
        "endif %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_with_ways_of_their_own(name):
    tokenizer = AutoTokenizer.from_pretrained(data_file("tiny"))
    tokenizer.chat_template = TEMPLATES[name]
    turns = [
        m | dict(content=f'{m["content"]}\n"{i}" ' if m["role"] == "observation" else m["content"])
        for i, m in enumerate(CALLED)
    ]
    # " It" is one token
    assert [t.lstrip() for t in spoken(tokenizer, encode_chat(tokenizer, turns))] == [
        t + tokenizer.eos_token for t in LEARNED
    ]
    assert f"[{'user' if name == 'refuses' else 'tool'}] " + ('"' if name == "quotes" else "") + "391" in render(
        tokenizer, turns
    )


@pytest.mark.parametrize("content", ["Be short.", "a"])
def test_a_turn_that_a_template_leaves_out_is_an_error(content):
    turns = [dict(role="system", content=content), dict(role="user", content="hm a")]
    tokenizer = AutoTokenizer.from_pretrained(data_file("tiny"))
    tokenizer.chat_template = TEMPLATES["trims"]
    assert render(tokenizer, turns)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }}{% "
        "endif %}{% endfor %}"
    )
    with pytest.raises(TinyTrainerError, match="leaves out turn 1 of 2, of the role system"):
        render(tokenizer, turns)
    table = load_examples([dict(messages=[*turns, dict(role="assistant", content="c")])])
    said = f"the conversation that begins '{content}': the chat template leaves out"
    with pytest.raises(TinyTrainerError, match=said):
        encode_rows(tokenizer, table, 64)


def test_a_row_is_written_twice(monkeypatch):
    "Up to its answer and as a whole; what its roles alone decide is tried once"
    tokenizer, written = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny"))), []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda m, **how: written.append(m) or plain(m, **how))
    rows = [[dict(role="user", content=f"Say {n}."), dict(role="assistant", content=str(n))] for n in range(5)]
    for messages in rows:
        encode_chat(tokenizer, messages)
    assert len(written) == 2 * len(rows) + 1


# Names of columns, public data sets


def test_columns_are_renamed_and_decide_the_kind(tmp_path):
    rows = [dict(question="q", answer="a", body="text", level=1)]
    assert load_examples(rows, columns={"prompt": "body", "completion": "answer"}).to_list() == [
        dict(messages=[dict(role="user", content="text"), dict(role="assistant", content="a")], question="q", level=1)
    ]
    assert load_examples(rows, columns={"text": "body"})["text"][:] == ["text"]
    assert load_prompts(rows, columns={"prompt": "body", "reference_answer": "answer"}) == [
        dict(messages=[dict(role="user", content="text")], reference_answer="a", question="q", level=1)
    ]
    for columns, said in [
        ({"prompt": "frage"}, "no column frage, which columns names. It has question, answer, body, level"),
        ("gsm", "no such mapping. Known: alpaca, dolly, gsm8k"),
        ({"prompt": 3}, "expected names"),
        ("svamp", "no column Body, Question, Equation, Answer, which the mapping svamp names"),
    ]:
        with pytest.raises(TinyTrainerError) as e:
            load_examples(rows, columns=columns)
        assert said in str(e.value)
    with pytest.raises(TinyTrainerError, match="split='test' is for data sets of the Hub"):
        load_examples(rows, split="test")


PUBLIC = {  # a row in the columns of each set as its page on the Hub gives them, and what is to be made of it
    "alpaca": (
        ("tatsu-lab/alpaca", None),
        dict(instruction="Add.", input="1, 2", output="3", text="Below is an instruction ..."),
        "Add.\n1, 2",
        "3",
        None,
        {},
    ),
    "dolly": (
        ("databricks/databricks-dolly-15k", None),
        dict(instruction="Who?", context="Mia came.", response="Mia", category="closed_qa"),
        "Who?\nMia came.",
        "Mia",
        None,
        dict(category="closed_qa"),
    ),
    "gsm8k": (
        ("openai/gsm8k", "main"),
        dict(question="1000 + 234?", answer="It is <<1000+234=1234>>1234.\n#### 1,234"),
        "1000 + 234?",
        "It is <<1000+234=1234>>1234.\n#### 1,234",
        "1,234",
        {},
    ),
    "svamp": (
        ("ChilleD/SVAMP", None),
        dict(
            ID="chal-1",
            Body="A pack costs 76 dollars.",
            Question="And with 25 off?",
            Equation="( 76.0 - 25.0 )",
            Answer="51.0",
            Type="Subtraction",
            question_concat="A pack costs 76 dollars. And with 25 off?",
        ),
        "A pack costs 76 dollars. And with 25 off?",
        "( 76.0 - 25.0 ) = 51\n#### 51",
        "51",
        dict(ID="chal-1", Type="Subtraction", question_concat="A pack costs 76 dollars. And with 25 off?"),
    ),
    "arc": (
        ("allenai/ai2_arc", "ARC-Easy"),
        dict(id="M1", question="Which is warm?", choices=dict(text=["ice", "fire"], label=["1", "2"]), answerKey="2"),
        "Which is warm?\n1) ice\n2) fire",
        "fire\n#### 2",
        "2",
        dict(id="M1"),
    ),
    "boolq": (
        ("google/boolq", None),
        dict(question="is fire warm", answer=True, passage="Fire is warm."),
        "Fire is warm.\nis fire warm? Yes or no?",
        "#### yes",
        "yes",
        {},
    ),
    "aqua_rat": (
        ("deepmind/aqua_rat", "raw"),
        dict(question="1 + 1?", options=["A)2", "B)3"], rationale="One and one.", correct="A"),
        "1 + 1?\nA)2\nB)3",
        "One and one.\n#### A",
        "A",
        {},
    ),
    "mathqa": (
        ("allenai/math_qa", None),
        dict(
            Problem="1 + 1 ?",
            Rationale='"one and one"',
            options="a ) 2 , b ) 3",
            correct="a",
            annotated_formula="add(1,1)",
            linear_formula="add(n0,n0)|",
            category="general",
        ),
        "1 + 1 ?\na ) 2 , b ) 3",
        '"one and one"\n#### a',
        "a",
        dict(annotated_formula="add(1,1)", linear_formula="add(n0,n0)|", category="general"),
    ),
    "mathinstruct": (
        ("TIGER-Lab/MathInstruct", None),
        dict(source="data/CoT/aqua_rat.json", output="The answer is A", instruction="1 + 1?"),
        "1 + 1?",
        "The answer is A",
        None,
        dict(source="data/CoT/aqua_rat.json"),
    ),
}


def test_every_mapping_is_tested():
    assert set(PUBLIC) == set(MAPPINGS)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_data_sets(name, monkeypatch, tmp_path):
    hub, row, prompt, completion, reference, others = PUBLIC[name]
    wanted = dict(
        messages=[dict(role="user", content=prompt), dict(role="assistant", content=completion)], **others
    ) | (dict(reference_answer=reference) if reference else {})
    asked = []
    monkeypatch.setattr(
        data, "load_dataset", lambda *args, **kwargs: asked.append((*args, kwargs["split"])) or Dataset.from_list([row])
    )
    for given in (name, hub[0]):
        assert load_examples(given, split="test").to_list() == [wanted]
    assert load_examples(f"{hub[0]}:other")[0] == wanted
    assert asked == [(*hub, "test"), (*hub, "test"), (hub[0], "other", "train")]
    assert load_examples(jsonl(tmp_path, row), columns=name).to_list() == [wanted]
    if reference:
        assert (
            exact_answer(prompt, completion, reference_answer=reference) == 1
            and load_prompts([row], columns=name)[0]["reference_answer"] == reference
        )
    with pytest.raises(TinyTrainerError, match=f"row 1: not a row of {name}"):
        load_examples([dict.fromkeys(row, 3)], columns=name)


def test_the_hub_is_asked_once_whether_it_is_there(monkeypatch):
    def head(url, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr(data.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data, "get_session", lambda: SimpleNamespace(head=head))
    with pytest.raises(
        TinyTrainerError,
        match=(
            r"nobody/nothing:part: not a file here, and not to be had from the Hub \(Name or service "
            r"not known\). Check the name, or get the file elsewhere"
        ),
    ):
        load_examples("nobody/nothing:part")


def test_columns_on_the_command_line(tmp_path, capsys):
    path = jsonl(tmp_path, dict(frage="Is it far?", antwort="No."))
    assert read_data_settings(dict(columns={"prompt": "frage"}, out="x")) == DataArgs(columns="prompt=frage")
    for written in ("prompt=frage,completion=antwort", "prompt=frage, completion = antwort"):
        assert main(["evaluate", "--data", str(path), "--columns", written, "--task", "loss", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["n"] == 1
    for flags, said in [
        (["--columns", "prompt=frage,antwort"], "expected NEW=OLD"),
        (["--columns", "unknown"], "no such mapping"),
        (["--split", "test"], "is for data sets of the Hub"),
    ]:
        assert main(["sft", "--data", str(path), *flags]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(dict(data=str(path), columns={"prompt": "nichts"})))
    assert (
        main(["sft", "--config", str(tmp_path / "config.json")]) == 2 and "no column nichts" in capsys.readouterr().err
    )
    assert read_texts(str(path), columns={"text": "frage"}) == ["Is it far?"]
    with pytest.raises(TinyTrainerError, match="this holds conversations"):
        read_texts(str(jsonl(tmp_path, dict(prompt="a", completion="b", text="c"))))


# What was read


def test_the_report_counts_what_is_there(shared):
    path = shared / "data" / "alpaca" / "alpaca_en_demo.json"
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    report = data_report(tokenizer, path, 256)
    texts = [
        tokenizer.bos_token
        + f"### User:\n{r['instruction']}"
        + (f"\n{r['input']}" if r["input"] else "")
        + f"\n### Assistant:\n{r['output']}{tokenizer.eos_token}\n"
        for r in json.loads(path.read_text(encoding="utf-8"))
    ]
    lengths = [len(tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    long = [i for i, n in enumerate(lengths, 1) if n > 256]
    short = {i: t for i, t in enumerate(texts, 1) if i not in set(long)}
    assert (
        report.lengths == lengths
        and report.left_out == {"too long": long}
        and report.tokens == sum(n for n in lengths if n <= 256)
    )
    first = {i: next(j for j in short if short[j] == t) for i, t in short.items()}
    assert report.duplicates == {i: j for i, j in first.items() if i != j} != {}
    assert report.figure().png()[:4] == b"\x89PNG" and "| left out: too long |" in report._repr_markdown_()


def test_rows_left_out_keep_the_numbers_of_the_file(tmp_path):
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    path = jsonl(
        tmp_path,
        dict(prompt=" ", completion="a"),
        dict(prompt="a", completion="b"),
        dict(prompt="a", completion=""),
        dict(prompt="a", completion="b"),
        dict(prompt="a", completion="b " * 99),
    )
    report = data_report(tokenizer, path, 64)
    assert (report.rows, report.left_out, report.duplicates) == (5, {"empty text": [1, 3], "too long": [5]}, {4: 2})
    assert str(report).splitlines()[0] == "data.jsonl" and "row 1, 3" in str(report)
    table = load_examples(path)
    assert empty_rows(table) == [1, 3] and empty_rows(table.select(range(2))) == [] and as_examples(table) is table
    assert as_examples(Dataset.from_list([{"messages": [{"from": "human", "value": "a"}]}]))[0]["messages"] == [
        dict(role="user", content="a")
    ]


def test_held_out_rows_may_all_be_too_long():
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    train, held = hold_out(load_examples([dict(prompt=f"a{i}", completion="b") for i in range(10)]), 1, 0)
    assert len(encode_rows(tokenizer, train, 64)[0]) == 9
    assert read_examples(tokenizer, load_examples([dict(prompt="a", completion="b " * 99)]), 64)[0] == []


def test_a_list_of_texts_is_refused_by_row():
    with pytest.raises(TinyTrainerError, match="row 1: found 'What is 1"):
        load_examples(["What is 1 + 1?"])


def test_prompts_that_ask_nothing_are_left_out_and_refused_if_none_is_left(capsys):
    answer, asked = ([dict(role=r, content="a") for r in roles] for roles in (["assistant"], ["user", "assistant"]))
    assert len(load_prompts([dict(messages=answer), dict(messages=asked)])) == 1
    assert "1 of 2 rows left out: nothing is asked (row 1)" in capsys.readouterr().err
    with pytest.raises(TinyTrainerError, match="none of 1 asks anything"):
        load_prompts([dict(messages=answer)])


def test_a_file_that_another_process_holds_is_tried_again(tmp_path, monkeypatch):
    path, replace, read = write_json(tmp_path / "a.json", 1), os.replace, Path.read_text
    refusals = iter([True, True, False, True, False])

    def held(f):
        def g(*args, **kwargs):
            if next(refusals):
                raise PermissionError(13, "another process holds it")
            return f(*args, **kwargs)

        return g

    monkeypatch.setattr(core.os, "replace", held(replace))
    monkeypatch.setattr(Path, "read_text", held(read))
    write_json(path, 2)
    assert read_json(path) == 2 and list(tmp_path.iterdir()) == [path]


def test_a_file_that_stays_closed_is_an_error(monkeypatch):
    waited = []
    monkeypatch.setattr(core.time, "sleep", waited.append)

    def closed():
        raise PermissionError(13, "never yours")

    with pytest.raises(PermissionError, match="never yours"):
        patiently(closed)
    assert 0.5 < sum(waited) <= 1.5


def group(folder, files: dict) -> Path:
    "A control group's folder"
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    "files, free",
    [
        (
            {
                "memory.max": 8 * GiB,
                "memory.current": 7 * GiB,
                "memory.stat": f"anon {2 * GiB}\ninactive_file {5 * GiB}",
            },
            6 * GiB,
        ),
        (
            {
                "memory/memory.limit_in_bytes": 8 * GiB,
                "memory/memory.usage_in_bytes": 7 * GiB,
                "memory/memory.stat": f"inactive_file {1 * GiB}\ntotal_inactive_file {5 * GiB}",
            },
            6 * GiB,
        ),
        ({"memory.max": 8 * GiB, "memory.current": 7 * GiB}, 1 * GiB),
        ({"memory.max": "max", "memory.current": 7 * GiB}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_cached_files_count_as_free_memory(tmp_path, files, free):
    assert _cgroup_free(group(tmp_path, files)) == free


def test_peak_memory_is_that_of_the_device_in_use(monkeypatch):
    allocated = {"cuda": 3 * GiB}
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(is_available=lambda: True, max_memory_allocated=lambda device="cuda": allocated[str(device)]),
    )
    assert peak_memory() == peak_memory("cuda") == peak_memory(torch.device("cuda")) == 3
    on_cpu = peak_memory("cpu")
    assert on_cpu != 3 and on_cpu > 0.1  # this process, with PyTorch loaded
    allocated["cuda"] = 0
    assert peak_memory() >= on_cpu  # a GPU that nothing was put on


@pytest.mark.parametrize(
    "row, cure",
    [
        (
            dict(prompt="What is 2 + 3?"),
            "1 nothing to learn. Bring rows with an answer; questions alone are for PPO and GRPO",
        ),
        (dict(prompt="What is 2 + 3?", completion="5" * 200), "1 too long, with max_length=64. Raise max_length"),
    ],
)
def test_the_cure_fits_the_cause(row, cure):
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    with pytest.raises(TinyTrainerError) as e:
        encode_rows(tokenizer, load_examples([row]), 64)
    assert str(e.value) == f"no row is left of 1: {cure}."


def test_what_is_held_out_has_no_copy_among_the_rows_that_are_learned():
    rows = [dict(prompt=f"q{i % 30}", completion="a") for i in range(55)]  # of 30 questions, five stand once
    train, held = hold_out(load_examples(rows), 64, 0)
    asked = [m[0]["content"] for m in held["messages"]]
    assert len(held) == 5 == len(set(asked)) and not set(asked) & {m[0]["content"] for m in train["messages"]}
    assert len(train) == 50 and held_note(55, 5, 5) == "held out: 5 rows"
    assert hold_out(load_examples(rows[:25] * 2), 64, 0)[1].num_rows == 0
    assert held_note(50, 64, 0) == "held out: 0 rows; every other one has a copy"
    answers = load_examples([dict(prompt="Pick a number.", completion=str(i)) for i in range(40)])
    assert hold_out(answers, 4, 0)[1].num_rows == 4, "the same question with another answer is no copy"


def test_prompts_that_are_held_out_have_no_copy():
    args = PPOArgs(eval_rows=3, eval_steps=1)
    prompts = load_prompts([dict(prompt=f"q{i % 30}", reference_answer="a") for i in range(55)])
    ordered = held_first(prompts, args)
    asked = [p["messages"][-1]["content"] for p in ordered]
    held = held_out(ordered, args)
    assert (
        held == 3
        and not set(asked[:held]) & set(asked[held:])
        and sorted(asked) == sorted(p["messages"][-1]["content"] for p in prompts)
    )
    plain = load_prompts([dict(prompt=f"q{i}", reference_answer="a") for i in range(55)])
    assert held_first(plain, args) == plain, "without copies the order is as it was"
