"""What people bring: columns that come late, odd separators, rows left out, and a machine's limits read right."""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinytrainer_nb import core
from tinytrainer_nb.core import TinyTrainerError, _cgroup_free, patiently, peak_memory, read_json, write_json
from tinytrainer_nb.data import data_origin, load_examples, load_prompts

INSTRUCTION = "### Instruction:\nName a color.\n### Response:\nRed."
GiB = 2 ** 30


def jsonl(folder, *rows) -> Path:
    "A file of `rows`; a text among them is a line as it stands"
    path = folder / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows), encoding="utf-8")
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
        if text == "plain": assert row == dict(messages=None, text="plain")
        else: assert row["text"] is None and [m["content"] for m in row["messages"]] == ["Name a color.", "Red."]
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
    table = load_examples([dict(instruction="Add.", input="1, 2", output="3", level=1), dict(instruction="Hello", output="Hi")])
    assert table.column_names == ["messages", "level"]
    assert [r["messages"][0]["content"] for r in table] == ["Add.\n1, 2", "Hello"]


def test_rows_left_out_are_shown_and_counted(tmp_path, capsys):
    rows = [dict(prompt="a", completion="b")]
    load_examples(rows)
    assert capsys.readouterr() == ("", "")
    path = jsonl(tmp_path, *rows, "", dict(prompt="a", completion=" "))
    table = load_examples(path)
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{path}: 1 of 2 rows left out: empty text (line 3)\n")
    assert len(table) == 1 and data_origin(table)["left_out_empty"] == 1
    load_examples([dict(text="")] * 7 + [dict(text="a")])
    assert capsys.readouterr().err == "the data: 7 of 8 rows left out: empty text (row 1, 2, 3, 4, 5, ...)\n"
    assert len(load_examples([dict(messages=[])] + [dict(messages=[dict(role="user", content="a")])])) == 1


@pytest.mark.parametrize("rows, said", [
    ([dict(prompt="a", completion="b"), "", dict(prompt="a", completion=3)], "line 3, field 'completion': expected text, found 3"),
    ([dict(instruction="a", input=3, output="b")], "line 1, field 'input': expected text, found 3"),
    ([dict(messages=[dict(role="user", content="a")]), dict(prompt="a")], "line 2, field 'messages': expected a list of turns, found None"),
    ([dict(text="a", level=1), dict(text=" "), "", dict(text="b", level="hard")], "line 4, field 'level': found 'hard'"),
    ([dict(prompt=" ", completion="b")], "no row left to use (1 read, 1 with an empty text)"),
    ([dict(text="a"), "{"], "line 2: not readable as JSON"),
])
def test_refused_with_file_line_and_field(tmp_path, rows, said):
    path = jsonl(tmp_path, *rows)
    with pytest.raises(TinyTrainerError) as e: load_examples(path)
    assert str(path) in str(e.value) and said in str(e.value) and "\n" not in str(e.value)


def test_a_list_of_texts_is_refused_by_row():
    with pytest.raises(TinyTrainerError, match="row 1: found 'What is 1"): load_examples(["What is 1 + 1?"])


def test_prompts_that_ask_nothing_are_left_out_and_refused_if_none_is_left(capsys):
    answer, asked = ([dict(role=r, content="a") for r in roles] for roles in (["assistant"], ["user", "assistant"]))
    assert len(load_prompts([dict(messages=answer), dict(messages=asked)])) == 1
    assert "1 of 2 rows left out: nothing is asked (row 1)" in capsys.readouterr().err
    with pytest.raises(TinyTrainerError, match="none of 1 asks anything"): load_prompts([dict(messages=answer)])


def test_a_file_that_another_process_holds_is_tried_again(tmp_path, monkeypatch):
    path, replace, read = write_json(tmp_path / "a.json", 1), os.replace, Path.read_text
    refusals = iter([True, True, False, True, False])

    def held(f):
        def g(*args, **kwargs):
            if next(refusals): raise PermissionError(13, "another process holds it")
            return f(*args, **kwargs)
        return g

    monkeypatch.setattr(core.os, "replace", held(replace)); monkeypatch.setattr(Path, "read_text", held(read))
    write_json(path, 2)
    assert read_json(path) == 2 and list(tmp_path.iterdir()) == [path]


def test_a_file_that_stays_closed_is_an_error(monkeypatch):
    waited = []
    monkeypatch.setattr(core.time, "sleep", waited.append)
    def closed(): raise PermissionError(13, "never yours")
    with pytest.raises(PermissionError, match="never yours"): patiently(closed)
    assert 0.5 < sum(waited) <= 1.5


def group(folder, files: dict) -> Path:
    "A control group's folder"
    for name, text in files.items(): (folder / name).parent.mkdir(exist_ok=True); (folder / name).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize("files, free", [
    ({"memory.max": 8 * GiB, "memory.current": 7 * GiB, "memory.stat": f"anon {2 * GiB}\ninactive_file {5 * GiB}"}, 6 * GiB),
    ({"memory/memory.limit_in_bytes": 8 * GiB, "memory/memory.usage_in_bytes": 7 * GiB,
      "memory/memory.stat": f"inactive_file {1 * GiB}\ntotal_inactive_file {5 * GiB}"}, 6 * GiB),
    ({"memory.max": 8 * GiB, "memory.current": 7 * GiB}, 1 * GiB),
    ({"memory.max": "max", "memory.current": 7 * GiB}, float("inf")),
    ({}, float("inf")),
])
def test_cached_files_count_as_free_memory(tmp_path, files, free):
    assert _cgroup_free(group(tmp_path, files)) == free


def test_peak_memory_is_that_of_the_device_in_use(monkeypatch):
    allocated = {"cuda": 3 * GiB}
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, max_memory_allocated=lambda device="cuda": allocated[str(device)]))
    assert peak_memory() == peak_memory("cuda") == peak_memory(torch.device("cuda")) == 3
    on_cpu = peak_memory("cpu")
    assert on_cpu != 3 and on_cpu > 0.1 # this process, with PyTorch loaded
    allocated["cuda"] = 0
    assert peak_memory() >= on_cpu # a GPU that nothing was put on
