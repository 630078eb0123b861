"""What strangers' data mean: system texts, weights, empty turns, other names, folders, compressed files, odd columns.
And rows that are longer than the model's own context."""

import bz2
import datetime
import decimal
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from live import adapter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
)

from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.data.formats import (
    data_origin,
    load_examples,
    load_prompts,
    row_numbers,
)
from tinytrainer_nb.data.rows import encode_rows, held_numbers, hold_out, read_examples
from tinytrainer_nb.data.tokens import (
    encode_chat,
    encode_text,
    ensure_template,
    pack_row,
)
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.layers import context_length
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes.arguments import (
    DPOArgs,
    PretrainArgs,
    RewardModelArgs,
    SFTArgs,
)
from tinytrainer_nb.recipes.evaluate import evaluate
from tinytrainer_nb.recipes.preference import (
    PairTrainer,
    dpo,
    model_reward,
    reward_model,
)
from tinytrainer_nb.recipes.pretrain import pretrain, token_stream, train_tokenizer
from tinytrainer_nb.recipes.sft import sft
from tinytrainer_nb.recipes.train import Run
from tinytrainer_nb.recipes.trainer import RunTrainer
from tinytrainer_nb.views.data_report import data_report


def user(text):
    return dict(role="user", content=text)


def said(text, **more):
    return dict(role="assistant", content=text) | more


def system(text):
    return dict(role="system", content=text)


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


PAIR = dict(prompt="q", completion="a")
TALK = [user("q"), said("a")]


def lines(*rows) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def folder(path: Path, **files) -> Path:
    "A folder of files; `__` in a name stands for a slash, `_dot_` for a dot"
    for name, data in files.items():
        target = path / name.replace("__", "/").replace("_dot_", ".").replace("_dash_", "-")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


def refused(call, *args, **how) -> str:
    with pytest.raises(TinyTrainerError) as e:
        call(*args, **how)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


# A system text in a column of its own

WITH_SYSTEM = {  # a row with a system column, and what it is without
    "sharegpt": dict(conversations=[human("q"), gpt("a")]),
    "messages": dict(messages=TALK),
    "prompt/completion": PAIR,
    "instruction": dict(instruction="q", output="a"),
    "question/answer": dict(question="q", answer="a"),
    "prompt/response": dict(prompt="q", response="a"),
    "preference": dict(prompt="q", chosen="a", rejected="b"),
    "preference by question": dict(question="q", chosen="a", rejected="b"),
    "prompts": dict(prompt="q"),
    "turns": dict(prompt=[user("q")], completion="a"),
}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("kind", WITH_SYSTEM)
def test_a_system_column_is_the_first_turn(kind, name, capsys):
    row = WITH_SYSTEM[kind]
    (with_it,), (without,) = load_examples([row | {name: "Be short."}]).to_list(), load_examples([row]).to_list()
    assert with_it == without | dict(messages=[system("Be short."), *without["messages"]])
    assert load_prompts([row | {name: "Be short."}])[0]["messages"] == [system("Be short."), user("q")]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("empty", [None, "", "  \n"])
def test_an_empty_system_column_means_none(empty, capsys):
    rows = [dict(messages=TALK, system=empty), dict(messages=TALK, system="S")]
    assert [len(m) for m in load_examples(rows)["messages"]] == [2, 3] and capsys.readouterr().err == ""


def test_a_system_column_that_is_not_used_is_said(capsys):
    own = [system("T"), *TALK]
    table = load_examples([dict(messages=own, system="T "), dict(messages=own, system="S")])
    assert table["messages"][:] == [own, own] and table["system"][:] == [None, "S"]
    assert "1 of 2 rows: column system is not used: another system text is there (row 2)" in capsys.readouterr().err
    for row in (dict(text="plain", system="S"), dict(messages=TALK, system=["S"])):
        assert load_examples([row])["system"][:] == [row["system"]]
        assert "column system is not used: it is not a text before a conversation" in capsys.readouterr().err


def test_columns_may_name_the_system_column():
    table = load_examples([dict(PAIR, persona="S")], columns="system=persona")
    assert table.to_list() == [dict(messages=[system("S"), *TALK])]


def test_other_meanings_beside_a_conversation_are_said(capsys):
    for row, said_of in (
        (dict(question="q", answer="a", context="c"), "column context is not used: --columns instruction="),
        (dict(instruction="q", output="a", history=[["b", "c"]]), "column history is not used"),
        (dict(messages=[user("q"), said("a", reasoning_content="Hm.")]), "field reasoning_content of turns is not"),
    ):
        load_examples([row])
        assert said_of in capsys.readouterr().err
    (row,) = load_examples([dict(instruction="q", context="c", response="a")])
    assert row["messages"][0]["content"] == "q\nc" and capsys.readouterr().err == ""


# Turns that are not learned

tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))


def learned(messages, train_on_all=False) -> str:
    (row,), _ = encode_rows(tokenizer, load_examples([dict(messages=messages)]), 512, train_on_all)
    return tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"]) if label != -100])


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"weight": False}, {"train": False}, {"loss": False}])
def test_a_turn_of_weight_0_is_not_learned(mark):
    talk = [user("q"), said("WRONG", **mark), user("again"), said("RIGHT", weight=1)]
    assert "WRONG" not in learned(talk) and "RIGHT" in learned(talk)
    assert "WRONG" not in learned(talk, train_on_all=True) and "again" in learned(talk, train_on_all=True)
    assert learned([user("q"), said("WRONG"), user("again"), said("RIGHT")]).count("G") == 2


def test_weights_go_with_the_rows(tmp_path):
    rows = [dict(messages=[user("q"), said("x", weight=0), user("r"), said("y")]), dict(messages=TALK)]
    table = load_examples(folder(tmp_path, a_dot_jsonl=lines(*rows)) / "a.jsonl")
    weights = [[t["weight"] for t in turns] for turns in table["messages"]]
    assert weights == [[1, 0, 1, 1], [1, 1]]
    assert load_examples(table).to_list() == table.to_list()
    assert load_examples([dict(messages=TALK)])["messages"][0] == TALK


def test_weights_that_are_not_known_are_refused():
    for weight in (0.5, 2, "0", [0]):
        why = refused(load_examples, [dict(messages=[user("q"), said("a", weight=weight)])])
        assert f"row 1, field 'messages': a turn's weight {weight!r} is not known" in why
    assert learned([dict(user("q"), weight=0.5), said("a", loss=0.3)]).startswith("a")


def test_an_answer_that_is_not_learned_is_no_reference():
    rows = load_prompts([dict(messages=[user("q"), said("wrong", weight=0)]), dict(messages=TALK)])
    assert [r["reference_answer"] for r in rows] == [None, "a"] and rows[0]["messages"] == [user("q")]
    why = refused(encode_rows, tokenizer, load_examples([dict(messages=[user("q"), said("x", weight=0)])]), 64)
    assert "every answer has the weight 0" in why and "max_length" not in why


def test_rows_that_differ_in_weights_alone_are_no_duplicates():
    rows = [dict(messages=[user("q"), said("a", weight=w), user("r"), said("b")]) for w in (0, 1, 1)]
    assert read_examples(tokenizer, load_examples(rows), 64)[1].duplicates == {3: 2}


# Empty turns


def test_an_empty_system_turn_means_none(capsys):
    for empty in ("", " \n"):
        assert load_examples([dict(messages=[system(empty), *TALK])])["messages"][:] == [TALK]
        assert load_examples([dict(conversations=[{"from": "system", "value": empty}, human("q"), gpt("a")])])[
            0
        ] == dict(messages=TALK)
    assert load_examples([dict(messages=[system(""), *TALK], system="S")])["messages"][0][0] == system("S")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("role", ["tool", "observation"])
def test_a_tool_may_return_nothing(role):
    talk = [user("q"), dict(role="function_call", content="run()"), dict(role=role, content=""), said("Done.")]
    assert load_examples([dict(messages=talk)])["messages"][:] == [talk]
    assert "Done." in learned(talk)


def test_an_empty_turn_is_named(tmp_path, capsys):
    rows = [
        dict(messages=TALK),
        dict(messages=[system("S"), user(" "), said("a")]),
        dict(messages=[user("q"), said("")]),
    ]
    path = folder(tmp_path, a_dot_jsonl=lines(*rows)) / "a.jsonl"
    assert len(load_examples(path)) == 1
    err = capsys.readouterr().err
    assert "2 of 3 rows left out: empty text (line 2, 3); in line 2 turn 2, of the role user, is empty" in err
    assert "In row 1 turn 2, of the role assistant, is empty." in refused(load_examples, rows[2:])
    assert "In row 1 there is no turn." in refused(load_examples, [dict(messages=[system(" ")])])
    assert "In row 1 'rejected' is empty." in refused(load_examples, [dict(prompt="q", chosen="a", rejected="")])


# Preferences that repeat themselves

WHOLE = dict(chosen=[user("q"), said("good")], rejected=[user("q"), said("bad")])
ASKED = dict(messages=[user("q")], chosen="good", rejected="bad")


@pytest.mark.parametrize(
    "row, wanted",
    [
        (dict(WHOLE, prompt="q", messages=[user("q"), said("good")]), ASKED),
        (dict(WHOLE, messages=[user("q"), said("good")]), ASKED),
        (dict(WHOLE, messages=[user("q"), said("bad")]), ASKED),
        (dict(prompt="q", messages=[user("q"), said("good")], chosen="good", rejected="bad"), ASKED),
        (dict(prompt="q", messages=[user("q"), said("other")], chosen="good", rejected="bad"), ASKED),
        (WHOLE, ASKED),
        (dict(WHOLE, conversations=[human("q"), gpt("good")]), ASKED),
        (dict(query="q", chosen="good", rejected="bad"), ASKED),
        (
            dict(instruction="q", input="i", chosen="good", rejected="bad"),
            ASKED | dict(messages=[user("q\ni")]),
        ),
        (
            dict(prompt="q", **{c: [system("S"), *turns] for c, turns in WHOLE.items()}),
            ASKED | dict(messages=[system("S"), user("q")]),
        ),
        (
            dict(prompt="q", **{c: [user("first"), said("one"), *turns] for c, turns in WHOLE.items()}),
            ASKED | dict(messages=[user("first"), said("one"), user("q")]),
        ),
    ],
)
def test_whole_conversations_in_preferences(row, wanted):
    (found,) = load_examples([dict(row, score=1)])
    assert {k: found[k] for k in ("messages", "chosen", "rejected", "score")} == wanted | dict(score=1)


@pytest.mark.parametrize(
    "row",
    [
        dict(chosen=[user("q"), said("a")], rejected=[user("r"), said("b")]),
        dict(chosen="Human: q", rejected="Human: r"),
        dict(messages=[user("q"), said("other")], chosen="a", rejected="b"),
        dict(prompt="r", **WHOLE),
    ],
)
def test_preferences_that_disagree_are_refused(row):
    assert "row 1" in refused(load_examples, [row])


# Other names of questions and answers


@pytest.mark.parametrize("ask", ["prompt", "question", "instruction", "query", "input", "problem"])
@pytest.mark.parametrize("answer", ["completion", "response", "answer", "output", "reply", "solution", "target"])
def test_a_question_and_an_answer_by_other_names(ask, answer):
    (row,) = load_examples([{ask: "q", answer: "a", "level": 3}])
    assert row["messages"] == TALK and row["level"] == 3 and ask not in row
    assert load_prompts([{ask: "q", answer: "a"}])[0]["reference_answer"] == "a"


def test_an_instruction_with_an_input_and_a_response():
    (row,) = load_examples([dict(instruction="Add.", input="1, 2", response="3")])
    assert row == dict(messages=[user("Add.\n1, 2"), said("3")])


def test_a_reward_still_finds_the_column_of_the_answer():
    (row,) = load_prompts([dict(prompt="q", answer="4")])
    assert row["answer"] == row["reference_answer"] == "4"
    (row,) = load_prompts([dict(messages=[system("S"), user("q")], solution="4")])
    assert row["solution"] == row["reference_answer"] == "4" and len(row["messages"]) == 2


@pytest.mark.parametrize("answers", [[4, 5], [["4", "four"], ["5"]], [{"value": 4}, None]])
def test_answers_that_are_no_texts_stay_columns(answers):
    rows = load_prompts([dict(prompt="q", answer=a) for a in answers])
    assert [r["answer"] for r in rows] == answers and rows[0]["reference_answer"] is None


def test_an_answer_that_only_some_rows_have():
    rows = load_prompts([dict(prompt="q", answer="4"), dict(prompt="r", answer=None), dict(prompt="s")])
    assert [r["reference_answer"] for r in rows] == ["4", None, None]


@pytest.mark.parametrize(
    "row, cure",
    [
        (dict(prompt="q", response="a", answer="long answer"), "columns={'completion': 'answer'}"),
        (dict(prompt="q", id="7", text_of_the_reply="It is four."), "--columns completion=text_of_the_reply"),
        (
            dict(messages=[user("q")], said="four", n=3),
            "Columns that were not used: said, n; if said holds the answers",
        ),
        (dict(prompt="q", answer=4), "Columns that were not used: answer; none of them holds texts"),
    ],
)
def test_nothing_to_learn_names_the_columns_and_the_cure(row, cure):
    why = refused(encode_rows, tokenizer, load_examples([row] * 3), 64)
    assert cure in why and "3 nothing to learn" in why and "max_length" not in why
    if "--columns" in why:
        columns = why.rpartition("--columns ")[2].rstrip(".")
        assert len(encode_rows(tokenizer, load_examples([row] * 3, columns=columns), 64)[0]) == 3


@pytest.mark.parametrize(
    "row, cure",
    [
        (dict(Prompt="q", Response="a"), "--columns prompt=Prompt,completion=Response"),
        ({" prompt": "q", "Completion ": "a"}, "columns={'prompt': ' prompt', 'completion': 'Completion '}"),
        (dict(problem="q", solution="s", answer="a"), "--columns prompt=problem,completion=answer"),
    ],
)
def test_a_cure_for_columns_that_are_not_known(row, cure):
    assert cure in refused(load_examples, [row])


def test_blanks_around_names_of_csv_columns(tmp_path):
    path = folder(tmp_path, a_dot_csv=b"prompt, completion ,\tlevel\nq, a ,3\n") / "a.csv"
    assert load_examples(path).to_list() == [dict(messages=[user("q"), said(" a ")], level="3")]
    path.write_bytes(b"prompt,completion, prompt\nq,a,b\n")
    assert "a column name stands twice" in refused(load_examples, path)


# Folders

CARD = b"---\nlicense: mit\n---\n# Hens\n"
TRAIN, TEST = lines(PAIR), lines(PAIR, PAIR)


def parquet(*rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "files, rows",
    [
        (dict(README_dot_md=CARD, data__train_dot_jsonl=TRAIN), 1),
        (dict(README_dot_md=CARD, data__train_dot_jsonl=TRAIN, data__test_dot_jsonl=TEST, LICENSE=b"MIT"), 1),
        (dict(README_dot_md=CARD, train__0_dot_csv=b"prompt,completion\nq,a\n", validation__0_dot_csv=b"x"), 1),
        (dict(dataset_infos_dot_json=b"{}", data__train_dot_json_dot_gz=gzip.compress(b"[" + TRAIN + b"]")), 1),
        (
            {
                f"data__{split}_dash_0000{i}_dash_of_dash_00002_dot_parquet": parquet(PAIR)
                for split in ("train", "test")
                for i in (0, 1)
            },
            2,
        ),
        ({f"part{i}_dot_jsonl": TRAIN for i in range(12)}, 12),
        ({f"part{i}_dot_jsonl_dot_gz": gzip.compress(TEST) for i in range(3)}, 6),
        (dict(all_dot_jsonl=TRAIN, test_dot_jsonl=TEST), 1),
        (dict(latest_dot_jsonl=TRAIN, contest_dot_jsonl=TEST), 3),
    ],
)
def test_a_data_set_in_a_folder(tmp_path, files, rows, capsys):
    table = load_examples(folder(tmp_path, **files))
    assert table["messages"][:] == [TALK] * rows
    left_out = len(files) - len(read_json_note(table))
    err = capsys.readouterr().err
    assert (f"{left_out} of {len(files)} files left out" in err) == bool(left_out), err


def read_json_note(table) -> dict:
    return json.loads(table.info.description)["files"]


def test_splits_of_a_folder(tmp_path, capsys):
    path = folder(tmp_path, README_dot_md=CARD, data__train_dot_jsonl=TRAIN, data__test_dot_jsonl=TEST)
    assert len(load_examples(path, split="test")) == 2 and len(load_prompts(path, split="train")) == 1
    assert "read as one data set: data/test.jsonl" in capsys.readouterr().err
    assert "its files are of test, train. Name one" in refused(load_examples, path, split="validation")
    only = folder(tmp_path / "only", test_dot_jsonl=TEST)
    assert len(load_examples(only)) == 2 and "its only files are of the split test" in capsys.readouterr().err
    names = ("train_sft", "train_gen", "test_sft")
    parts = {f"data__{n}_dash_00000_dash_of_dash_00001_dot_jsonl": TRAIN for n in names}
    several = folder(tmp_path / "several", **parts)
    assert "of train_gen, train_sft, test_sft. Name one: split='train_gen'" in refused(load_examples, several)
    assert len(load_examples(several, split="test_sft")) == 1
    configs = folder(
        tmp_path / "configs", **{f"{c}__train_dash_00000_dash_of_dash_00001_dot_jsonl": TRAIN for c in "ab"}
    )
    assert "a data set of several parts (a, b)" in refused(load_examples, configs)
    shards = [("en", 0, 1), ("de", 0, 2), ("de", 1, 2)]
    names = [f"{c}__train_dash_{i:05d}_dash_of_dash_{n:05d}_dot_jsonl" for c, i, n in shards]
    uneven = folder(tmp_path / "uneven", **dict.fromkeys(names, TRAIN))
    assert "a data set of several parts (de, en), each with shards of its own" in refused(load_examples, uneven)
    assert len(load_examples(uneven / "de")) == 2
    apart = [name.replace("en__", "de__").replace("00001_dot", "00002_dot") for name in names[1:]]
    assert len(load_examples(folder(tmp_path / "one", **dict.fromkeys(apart, TRAIN)))) == 2


def test_a_file_has_no_split_under_whatever_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_bytes(TRAIN)
    for name in ("~/x.jsonl", str(tmp_path / "x.jsonl"), Path("~/x.jsonl")):
        assert "A file and a table are read whole" in refused(load_examples, name, split="test")
    assert "no such file or folder" in refused(load_examples, "x" * 300, split="test")


@pytest.mark.parametrize("columns", [["prompt"], ("prompt",), {"prompt"}, 5, True])
def test_columns_of_another_kind_are_refused(columns):
    assert f"columns={columns!r}: expected names" in refused(load_examples, [PAIR], columns=columns)


def test_an_answer_to_an_answer_is_refused(tmp_path):
    "Both would be learned, one after the other"
    (tmp_path / "a.jsonl").write_bytes(lines(PAIR, dict(prompt=[user("q"), said("pre")], completion="c")))
    wrong = refused(load_examples, tmp_path / "a.jsonl")
    assert "a.jsonl, line 2, field 'prompt': ends with an assistant's turn, but 'completion' is to answer it" in wrong
    rows = [dict(prompt=[user("q"), said("pre")], response="c")]
    assert "field 'prompt': ends with an assistant's turn, but 'response' is to answer it" in refused(
        load_examples, rows
    )
    kept = load_examples([dict(prompt=[user("q"), said("a"), user("r")], completion="c")])
    assert kept["messages"][0] == [user("q"), said("a"), user("r"), said("c")]


def test_a_text_is_needed_only_where_there_are_no_messages(capsys):
    table = load_examples([dict(PAIR, text=1), dict(PAIR, text="a")])
    assert table["messages"][:] == [TALK] * 2 and table["text"][:] == [1, "a"]
    assert "column text kept as JSON" in capsys.readouterr().err
    assert "field 'text'" in refused(load_examples, [dict(text="a"), dict(text=1)])


def test_the_name_of_a_file_keeps_its_letters(tmp_path):
    (tmp_path / "A.Jsonl").write_bytes(lines(dict(prompt="Ask ANNA", completion=" ")))
    assert "In line 1 turn 2, of the role assistant, is empty" in refused(load_examples, tmp_path / "A.Jsonl")
    (tmp_path / "MyData").mkdir()
    (tmp_path / "MyData" / "README.txt").write_text(" ")
    assert "In file README.txt 'text' is empty" in refused(load_examples, tmp_path / "MyData")


def test_prompts_that_are_left_out_are_counted_as_the_data_count(capsys):
    rows = [dict(messages=[user(" ")]), dict(messages=[said("a")]), dict(messages=[user("q")])]
    table = load_examples(rows)
    assert row_numbers(table) == [2, 3] and len(load_prompts(rows)) == 1
    assert "1 of 3 rows left out: nothing is asked (row 2)" in capsys.readouterr().err


@pytest.mark.parametrize("length", [1, 0, -5, 1.5, "8", None, True])
def test_rows_of_no_length_are_refused(length):
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    for read in (
        lambda: encode_text(tokenizer, "a b c", length),
        lambda: read_examples(tokenizer, load_examples([dict(text="a b c")]), length),
        lambda: read_examples(tokenizer, load_examples([PAIR]), length),
    ):
        assert f"max_length={length!r} is not allowed: it must be a whole number at least 2" in refused(read)
    assert [w["input_ids"][0] for w in encode_text(tokenizer, "a b c", 2)][0] == tokenizer.bos_token_id


def test_a_folder_of_two_formats_and_of_texts(tmp_path, capsys):
    two = folder(tmp_path / "two", a_dot_jsonl=TEST, a_dot_csv=b"prompt,completion\nx,y\n", notes_dot_md=b"Notes.")
    assert load_examples(two)["messages"][:] == [TALK, TALK]
    assert "2 of 3 files left out (a.csv, notes.md); read as one data set: a.jsonl" in capsys.readouterr().err
    texts = folder(tmp_path / "texts", README_dot_md=CARD, data__train_dot_txt=b"one", data__test_dot_txt=b"two")
    assert load_examples(texts)["text"][:] == ["one"] and "2 of 3 files left out" in capsys.readouterr().err
    tales = folder(tmp_path / "tales", README_dot_md=b"# A tale", test_dot_txt=b"one", hill_dot_txt=b"two")
    assert len(load_examples(tales)) == 3 and capsys.readouterr().err == ""
    assert "only README.md" in refused(load_examples, folder(tmp_path / "card", README_dot_md=CARD))


def test_a_fault_in_a_shard_names_file_and_line(tmp_path):
    path = folder(tmp_path, a_dot_jsonl=TRAIN, b_dot_jsonl=lines(PAIR, dict(prompt="q", completion=3)))
    assert "file b.jsonl, line 2, field 'completion': expected text, found 3" in refused(load_examples, path)
    (path / "b.jsonl").write_bytes(b"{")
    assert "b.jsonl, line 1: not readable as JSON" in refused(load_examples, path)
    (path / "b.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "b.jsonl: this is a pointer of Git LFS" in refused(load_examples, path)


# Compressed files


def zst(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}
INSIDE = {
    "a.jsonl": TEST,
    "a.json": json.dumps([PAIR, PAIR]).encode(),
    "a.CSV": b"\xef\xbb\xbfprompt,completion\r\nq,a\r\nq,a\r\n",
    "a.parquet": parquet(PAIR, PAIR),
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", INSIDE)
def test_compressed_files_are_read(tmp_path, name, packed):
    path, data = tmp_path / (name + packed), PACK[packed](INSIDE[name])
    path.write_bytes(data)
    assert load_examples(path)["messages"][:] == [TALK, TALK]
    for cut in (1, 5, len(data) // 2):
        path.write_bytes(data[:-cut])
        assert f"cannot be unpacked as {packed}" in refused(load_examples, path)
    path.write_bytes(INSIDE[name])
    assert f"cannot be unpacked as {packed}" in refused(load_examples, path)


def test_compressed_texts_and_unknown_endings(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("é\r\n".encode()) + gzip.compress(b"two"))
    assert load_examples(tmp_path / "a.txt.gz")["text"][:] == ["é\r\ntwo"]
    (tmp_path / "a.md.xz").write_bytes(lzma.compress(b"\n\xe9"))
    assert "line 2: its byte 1 (0xe9) is not UTF-8" in refused(load_examples, tmp_path / "a.md.xz")
    for name in ("a.jsonl.lz4", "a.gz", "a.tar.gz", "a.zip"):
        (tmp_path / name).write_bytes(TRAIN)
        assert "are not read. Known: .jsonl" in refused(load_examples, tmp_path / name)


# A column that nobody needs

ODD = {
    "text and number": ["row-0", 1],
    "true and one": [True, 1],
    "list and object": [[1], {"a": 1}],
    "text and nothing known": ["a", None],
    "nested": [{"a": [{"b": [1, "x"]}]}, {"c": 1}],
    "not a number inside": [{"a": 1.5}, {"a": None}],
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_an_odd_column_comes_back_as_it_was(tmp_path, values):
    path = folder(tmp_path, a_dot_jsonl=lines(*(dict(PAIR, id=v) for v in values))) / "a.jsonl"
    table = load_examples(path)
    assert table["id"][:] == values and table["messages"][:] == [TALK] * 2
    assert [type(v) for v in table["id"]] == [type(v) for v in values]


@pytest.mark.parametrize(
    "values, kept",
    [
        ([datetime.date(2020, 1, 1), "soon"], ['"2020-01-01"', '"soon"']),
        ([datetime.datetime(2020, 1, 1, 9), [1]], ['"2020-01-01T09:00:00"', "[1]"]),
        ([datetime.timedelta(hours=1), Path("a")], ['"1:00:00"', '"a"']),
        ([decimal.Decimal("1E+3"), "x"], ['"1000"', '"x"']),
        ([10**40, 1], [str(10**40), "1"]),
        (["\ud83d", "a"], ['"\\ud83d"', '"a"']),
        ([{1: "a"}, None], ['{"1": "a"}', None]),
        ([decimal.Decimal("1.5"), [1]], ['"1.5"', "[1]"]),
        ([float("nan"), "x"], [None, "x"]),
        ([b"a", "a"], ['"a"', '"a"']),
        ([object(), 1], None),
        ([1j, 2], None),
    ],
)
def test_an_odd_column_is_kept_as_json_or_left_out_with_a_line(values, kept, capsys):
    table = load_examples([dict(PAIR, odd=v) for v in values])
    assert table["messages"][:] == [TALK] * 2
    assert (table["odd"][:] if kept else "odd" not in table.column_names) == (kept or True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the data: column odd {'kept as JSON' if kept else 'left out'}")


def test_odd_parquet_columns(tmp_path, capsys):
    a_map = pyarrow.array(
        [[("lang", "en")], [("lang", "de"), ("n", "1")]], pyarrow.map_(pyarrow.string(), pyarrow.string())
    )
    columns = dict(
        meta=a_map,
        when=pyarrow.array([10**15, 0], pyarrow.timestamp("s")),
        bad=pyarrow.array([b"\xff", b"a"]).view(pyarrow.string()),
        price=pyarrow.array([decimal.Decimal("1.50"), None]),
        raw=pyarrow.array([b"\xff", None]),
        score=pyarrow.array([float("nan"), 1.0]),
        deep=pyarrow.array([{"a": {"b": [1]}}, None]),
    )
    path = tmp_path / "a.parquet"
    table = pyarrow.table(dict(prompt=["q", "q"], completion=["a", "a"]) | columns)
    pyarrow.parquet.write_table(table, path)
    found = load_examples(path)
    assert found["messages"][:] == [TALK] * 2
    assert found["meta"][:] == [{"lang": "en"}, {"lang": "de", "n": "1"}] and found["deep"][0] == {"a": {"b": [1]}}
    assert found["price"][0] == decimal.Decimal("1.50") and found["raw"][0] == b"\xff"
    err = capsys.readouterr().err
    assert {n for n in columns if f"column {n} left out, since it cannot be read" in err} == {"when", "bad"}
    pyarrow.parquet.write_table(table.rename_columns(["prompt", "x", "meta", "when", "response", *"abcd"]), path)
    assert "column response: " in refused(load_examples, path)


@pytest.mark.parametrize(
    "row, field",
    [
        (dict(prompt="q", completion=datetime.date(2020, 1, 1)), "completion"),
        (dict(prompt=b"q", completion="a"), "prompt"),
        (dict(instruction="q", output={"a": 1}), "output"),
        (dict(text=float("nan")), "text"),
        (dict(question="q", answer=4), "answer"),
        (dict(messages="[]"), "messages"),
        (dict(prompt="q", chosen="a", rejected=3), "rejected"),
    ],
)
def test_a_needed_column_of_an_odd_type_is_refused_by_name(row, field):
    assert f"row 1, field '{field}': expected" in refused(load_examples, [row])


# What is held back


def test_held_back_rows_of_small_sets_are_named():
    table = load_examples(
        [dict(prompt=f"q{i}", completion="a") for i in range(25)] + [dict(prompt=" ", completion="a")]
    )
    numbers = held_numbers(table, 64, 3)
    assert [f"q{n - 1}" for n in numbers] == [m[0]["content"] for m in hold_out(table, 64, 3)[1]["messages"]]
    shifted = load_examples(
        [dict(prompt=" ", completion="a"), *({"prompt": f"q{i}", "completion": "a"} for i in range(25))]
    )
    assert held_numbers(shifted, 64, 3) == [n + 1 for n in numbers]


# Rows that are longer than the model's context

CONTEXT = 32
FEW = dict(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CONTEXT)
CONFIGS = dict(
    gpt2=lambda: GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT, **FEW),
    opt=lambda: OPTConfig(ffn_dim=32, word_embed_proj_dim=32, pad_token_id=0, **SIZES, **FEW),
    llama=lambda: LlamaConfig(intermediate_size=32, **SIZES, **FEW),
)
LONG = [dict(prompt="hen " * 40, completion="egg " * 40)] * 6
SHORT = [dict(prompt="hen", completion=f"egg {i}") for i in range(14)]
TALE = "The hens lay their eggs in the barn. " * 30


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Models with a context of 32 tokens, by their kind"
    root, made = tmp_path_factory.mktemp("bases"), {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config()).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        made[name] = str(root / name)
    return made


def loaded(base, lora=True):
    model, own = load_model(base, "none", "fp32", verbose=False)
    return (add_lora(model, LoraArgs(r=2)) if lora else model), own


def notes(run) -> str:
    return " ".join(e.get("message", "") for e in run.events if e["kind"] == "note")


def test_the_context_is_what_the_config_states(bases):
    found = {name: context_length(loaded(base)[0]) for name, base in bases.items()}
    assert found == dict(gpt2=CONTEXT, opt=CONTEXT, llama=CONTEXT)
    bloom = BloomConfig(hidden_size=32, n_layer=1, n_head=2, **FEW)  # a bias by distance, for any length
    assert context_length(AutoModelForCausalLM.from_config(bloom)) is None


def test_a_text_beyond_the_table_of_positions_cannot_be_computed(bases):
    for name in ("gpt2", "opt"):
        model = AutoModelForCausalLM.from_pretrained(bases[name])
        assert (
            context_length(model) == CONTEXT and model(torch.ones(1, CONTEXT, dtype=torch.long)).logits.isfinite().all()
        )
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.ones(1, CONTEXT + 1, dtype=torch.long))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_rows_beyond_the_context_are_left_out_in_sft(bases, name, tmp_path, capsys):
    model, own = loaded(bases[name])
    often = dict(batch_size=4, eval_steps=1, save_steps=1, sample_steps=1, sample_tokens=8)
    run = sft(model, own, LONG + SHORT, SFTArgs(max_steps=2, out=str(tmp_path / "run"), **often))
    assert run.status == "finished"
    assert "left out: 6 longer than the model's context of 32 tokens" in notes(run)
    assert "held out: 2 rows (number " in notes(run)
    assert "64 were asked for" in capsys.readouterr().err


@pytest.mark.parametrize("recipe, Args", [(sft, SFTArgs), (dpo, DPOArgs)])
def test_a_resumed_run_leaves_out_the_same_rows(bases, recipe, Args, tmp_path, monkeypatch):
    rows = LONG + SHORT
    if recipe is dpo:
        rows = [dict(prompt=r["prompt"], chosen=r["completion"], rejected="no") for r in rows]

    def train(out):
        how = dict(max_steps=4, batch_size=4, eval_steps=2, save_steps=2, sample_steps=0)
        return recipe(*loaded(bases["gpt2"]), rows, Args(out=str(tmp_path / out), **how))

    whole = train("whole")
    step = PairTrainer.training_step if recipe is dpo else RunTrainer.training_step

    def die(self, *args, **how):
        if self.state.global_step == 2:
            raise OSError("no power")
        return step(self, *args, **how)

    with monkeypatch.context() as m:
        m.setattr(PairTrainer if recipe is dpo else RunTrainer, "training_step", die)
        with pytest.raises(OSError):
            train("cut")
    again = Run.open(tmp_path / "cut").resume()
    assert again.status == "finished" and adapter(again) == adapter(whole)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_are_cut_to_the_context(bases, name, tmp_path):
    model, own = loaded(bases[name])
    table = load_examples([dict(text=TALE)] * 3)
    rows, reading = encode_rows(own, table, 512, context=context_length(model))
    assert {len(r["input_ids"]) for r in rows[:-1]} >= {CONTEXT} and max(len(r["input_ids"]) for r in rows) == CONTEXT
    assert reading.windows and reading.left_out == {} and reading.learned == sum(n - 1 for n in reading.lengths)
    none = dict(eval_steps=0, save_steps=0, sample_steps=0)
    assert sft(model, own, table, SFTArgs(max_steps=1, out=str(tmp_path / "s"), **none)).status == "finished"
    model, own = loaded(bases[name], lora=False)
    args = PretrainArgs(max_steps=2, eval_steps=1, save_steps=0, sample_steps=1, out=str(tmp_path / "p"), batch_size=4)
    run = pretrain(model, own, [TALE] * 3, args)
    assert (
        run.status == "finished"
        and "blocks have 32 tokens, the model's context, instead of max_length=256" in notes(run)
    )


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_loss_is_evaluated_on_rows_that_fit(bases, name, capsys):
    model, own = loaded(bases[name], lora=False)
    found = evaluate(model, own, LONG + SHORT, "loss")
    assert found.n == 14 and found.score == pytest.approx(evaluate(model, own, SHORT, "loss").score, abs=1e-5)
    assert "left out: 6 longer than the model's context of 32 tokens" in capsys.readouterr().err
    why = refused(evaluate, model, own, LONG, "loss")
    assert "6 longer than the model's context" in why and "Shorten the rows" in why and "max_length" not in why


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("recipe, Args", [(dpo, DPOArgs), (reward_model, RewardModelArgs)])
def test_pairs_beyond_the_context_are_left_out(bases, recipe, Args, name, tmp_path):
    pairs = [dict(prompt=r["prompt"], chosen=r["completion"], rejected="no") for r in LONG + SHORT]
    args = Args(max_steps=1, batch_size=4, eval_steps=1, save_steps=0, sample_steps=0, out=str(tmp_path / "run"))
    model, own = loaded(bases[name])
    run = recipe(model, own, pairs, args)
    assert run.status == "finished" and "6 longer than the model's context of 32 tokens" in notes(run)
    why = refused(recipe, *loaded(bases[name]), pairs[:6], args)
    assert "6 longer than the model's context" in why and "Shorten the pairs" in why and "max_length" not in why
    if recipe is reward_model:
        reward = model_reward(run.folder)
        assert len(reward(["hen"], ["egg"])) == 1
        assert "the reward model reads at most 32" in refused(reward, ["hen"], ["egg " * 40])


def test_max_length_counts_where_it_is_shorter(bases):
    table = load_examples([dict(prompt="hen", completion="egg " * n) for n in (1, 2, 40)])
    _, reading = read_examples(tokenizer, table, 30, context=CONTEXT)
    assert reading.left_out == {"too long": [2], "longer than the model's context of 32 tokens": [3]}
    why = refused(encode_rows, tokenizer, table.select([1]), 30, context=CONTEXT)
    assert why.endswith("1 too long, with max_length=30. Raise max_length.")
    report = data_report(tokenizer, table, 512, model=loaded(bases["gpt2"])[0])
    assert (
        report.left_out == {"longer than the model's context of 32 tokens": [3]}
        and report.figure().png()[:4] == b"\x89PNG"
    )


def test_the_filling_of_a_packed_row_has_no_positions_of_its_own():
    packed = pack_row([encode_chat(tokenizer, TALK)])
    length = packed["document_lengths"][0]
    assert packed["position_ids"][0].tolist() == [*range(length), *[0] * (packed["input_ids"].shape[1] - length)]


# What marks an answer as bad

NO = dict(false=False, text="False", zero=0, zero_text="0", zero_float=0.0)


def unlearned(table) -> list[bool]:
    return [bool(m) and m[-1].get("weight") == 0 for m in table["messages"]]


@pytest.mark.parametrize("column", ["label", "weight", "train"])
@pytest.mark.parametrize("value", NO)
def test_a_row_that_says_no_is_not_learned(column, value, capsys):
    rows = [
        dict(PAIR, **{column: True if value == "false" else 1}),
        dict(PAIR, completion="bad", **{column: NO[value]}),
    ]
    table = load_examples(rows)
    said_no = f"1 of 2 rows: the answer is not learned, as column {column} says"
    assert unlearned(table) == [False, True] and said_no in capsys.readouterr().err
    learned_rows, reading = encode_rows(tokenizer, table, 64)
    assert len(learned_rows) == 1 and reading.left_out == {"nothing to learn": [2]}
    assert [r["reference_answer"] for r in load_prompts(rows)] == ["a", None]


def test_other_labels_are_no_marks(capsys):
    kinds = (
        [dict(PAIR, label=n) for n in (0, 1, 2)],
        [dict(PAIR, label="spam"), dict(PAIR, label="0")],
        [dict(text="plain", label=0)],
        [dict(PAIR, label=None), dict(PAIR, label=True)],
        [dict(prompt="q", label=False)],
    )
    for rows in kinds:
        table = load_examples(rows)
        assert not any(t.get("weight") == 0 for m in dict(table[:]).get("messages", []) for t in m or [])
    assert capsys.readouterr().err == ""
    load_examples([dict(PAIR, weight=0.5), dict(PAIR, weight=1)])
    assert "1 of 2 rows: column weight is not used: an answer is learned or not" in capsys.readouterr().err
    load_examples([dict(text="plain", train=False, label=0)])
    assert "column train is not used: a text is learned whole" in capsys.readouterr().err


def test_bad_answers_of_turns_and_of_csv_files(tmp_path):
    path = tmp_path / "kto.csv"
    path.write_text("prompt,completion,label\nq,good,True\nq,bad,False\n")
    assert unlearned(load_examples(path)) == [False, True]
    talks = [dict(prompt=[user("q")], completion=[said(t)], label=t == "good") for t in ("good", "bad")]
    assert unlearned(load_examples(talks)) == [False, True]
    assert unlearned(load_examples([dict(messages=TALK, train=False), dict(messages=TALK)])) == [True, False]


@pytest.mark.parametrize("mark", [dict(train=0), dict(training=0.0), dict(loss=False), dict(weight=False)])
def test_every_mark_of_a_turn_says_no_alike(mark):
    assert load_examples([dict(messages=[user("q"), said("a", **mark)])])["messages"][0][-1]["weight"] == 0
    nothing = dict.fromkeys(mark, None)
    assert load_examples([dict(messages=[user("q"), said("a", **nothing)])])["messages"][0] == TALK


@pytest.mark.parametrize("mark", [dict(train="false"), dict(training=2), dict(weight="0"), dict(loss="no")])
def test_marks_of_turns_that_are_not_known_are_refused(mark):
    why = refused(load_examples, [dict(messages=[user("q"), said("a", **mark)])])
    ((name, value),) = mark.items()
    assert f"row 1, field 'messages': a turn's {name} {value!r} is not known" in why


@pytest.mark.parametrize(
    "field", [dict(mask=True), dict(train_on=False), dict(train_detail=[1]), dict(name="Bob"), dict(loss=0.3)]
)
def test_other_fields_of_turns_are_said(field, capsys):
    for column, row in dict(
        messages=dict(messages=[user("q"), said("a", **field)]),
        completion=dict(prompt="q", completion=[said("a", **field)]),
        chosen=dict(prompt="q", chosen=said("a", **field), rejected="b"),
    ).items():
        load_examples([row])
        assert f"field {next(iter(field))} of turns is not used" in capsys.readouterr().err, column
    load_examples([dict(messages=[user("q"), said("a", name=None, tool_calls=[], mask="")])])
    assert capsys.readouterr().err == ""


# Columns that mean something and are not used

UNREAD = [
    (dict(instruction="i", output="o"), "Input", "--columns input=Input reads it as input"),
    (dict(instruction="i", output="o"), "inputs", "--columns input=inputs reads it as input"),
    (dict(instruction="i", response="o"), "Context", "--columns context=Context reads it as context"),
    (dict(PAIR), "System", "--columns system=System reads it as system"),
    (dict(PAIR), "system_instruction", "--columns system=system_instruction reads it as system"),
    (dict(messages=TALK), "developer", "--columns system=developer reads it as system"),
    (dict(question="q", answer="a"), "Context", "the data are read as question/answer"),
    (dict(question="q", answer="a"), "instruction", "the data are read as question/answer"),
    (dict(PAIR), "instruction", "the data are read as prompt/completion"),
    (dict(PAIR), "input", "the data are read as prompt/completion"),
    (dict(PAIR), "Completion", "the data are read as prompt/completion"),
    (dict(messages=TALK), "tools", "no chat template is shown it"),
    (dict(messages=TALK), "images", "texts alone are read"),
]


@pytest.mark.parametrize("row, column, why", UNREAD)
def test_a_column_that_means_something_and_is_not_used_is_said(row, column, why, capsys):
    load_examples([row, row | {column: "LOST"}])
    err = capsys.readouterr().err
    assert f"1 of 2 rows: column {column} is not used: " in err and why in err and len(err.splitlines()) == 1
    load_examples([row | {column: empty} for empty in ("", None, " ")])
    assert capsys.readouterr().err == ""


def test_a_blank_before_a_name_loses_nothing_in_silence(capsys):
    load_examples([{"instruction": "i", " input": "LOST", "output": "o"}])
    assert "column input is not used: columns={'input': ' input'} reads it as input" in capsys.readouterr().err
    table = load_examples([{"instruction": "i", " input": "x", "output": "o"}], columns={"input": " input"})
    assert table["messages"][0][0]["content"] == "i\nx" and capsys.readouterr().err == ""


def test_columns_that_repeat_the_conversation_are_quiet(capsys):
    rows = [
        dict(prompt="q", messages=TALK, chosen=TALK, rejected=[user("q"), said("b")]),
        dict(instruction="i", input="x", output="o", text="Below is i, then x.\ni\nx\nSay: o"),
        dict(prompt=[user("q")], question="q", answer="4"),
        dict(question="q", answer="a", label="x", id=3, topic="t"),
        dict(PAIR, answer="7", tools="[]"),
    ]
    for row in rows:
        load_examples([row])
        assert capsys.readouterr().err == "", row


# Answers that repeat the question


def hh(n: int, **more) -> dict:
    asked = f"\n\nHuman: hi {n}\n\nAssistant:"
    return dict(prompt=asked, chosen=f"{asked} a{n}", rejected=f"{asked} b{n}") | more


def test_a_question_before_every_answer_is_taken_off(capsys):
    table = load_examples([hh(1), hh(2)])
    assert table["chosen"][:] == ["a1", "a2"] and table["rejected"][:] == ["b1", "b2"]
    assert "2 of 2 rows: the answers begin with the whole question, which is taken off" in capsys.readouterr().err
    asked = dict(instruction="Name it", input="by day")
    table = load_examples([asked | dict(chosen="Name it\nby day: sun", rejected="Name it\nby day: ?")])
    assert table["chosen"][:] == [": sun"] and table["messages"][0] == [user("Name it\nby day")]
    (asked_again,) = load_examples([dict(question="Who is it?", chosen="Who is it? Mia", rejected="Who is it? Max")])
    assert asked_again["chosen"] == "Mia"


def test_a_question_before_some_answers_is_said_and_stays(capsys):
    table = load_examples([hh(1), dict(prompt="Who is it?", chosen="Mia", rejected="Max")])
    assert table["chosen"][0] == hh(1)["chosen"]
    assert "1 of 2 rows: the answers begin with the whole question, which is learned" in capsys.readouterr().err
    load_examples([dict(prompt="What is 2?", completion="What is 2? It is two")])
    assert "the answers begin with the whole question, which is learned" in capsys.readouterr().err
    assert load_examples([dict(prompt="Hi", chosen="Hi Mia", rejected="Hi.")])["chosen"][:] == ["Hi Mia"]
    assert load_examples([dict(PAIR)])["messages"][0] == TALK and capsys.readouterr().err == ""


@pytest.mark.parametrize("write", [json.dumps, str])
def test_turns_written_as_text_are_turns(write, capsys):
    bad = [user("q"), said("b")]
    plain = dict(prompt="q", chosen=TALK, rejected=bad)
    assert load_examples([plain | dict(chosen=write(TALK), rejected=write(bad))]).to_list() == [
        dict(messages=[user("q")], chosen="a", rejected="b")
    ]
    assert load_examples([dict(messages=write(TALK))])["messages"][:] == [TALK]
    assert load_examples([dict(conversations=write([human("q"), gpt("a")]))])["messages"][:] == [TALK]
    assert load_examples([dict(prompt=write([user("q")]), completion=write(said("a")))])["messages"][:] == [TALK]
    assert capsys.readouterr().err == ""


def test_what_only_looks_like_turns_is_a_text(capsys):
    odd = '[{"role": "nobody", "content": "?"}]'
    assert load_examples([dict(prompt="q", completion=odd)])["messages"][0][-1]["content"] == odd
    assert "column completion looks like turns, but they cannot be read" in capsys.readouterr().err
    json_answer = '[{"name": "Mia"}]'
    assert load_examples([dict(prompt="q", completion=json_answer)])["messages"][0][-1]["content"] == json_answer
    assert capsys.readouterr().err == ""
    assert load_examples([dict(prompt="q", completion="[" * 5000)]).num_rows == 1


# Nothing, as pandas has it

NAN = float("nan")


def test_nan_is_nothing(capsys):
    rows = [dict(instruction="i", input=v, output="o") for v in (NAN, "x", None)]
    assert [m[0]["content"] for m in load_examples(rows)["messages"]] == ["i", "i\nx", "i"]
    table = load_examples([dict(PAIR, system=NAN), dict(PAIR, system="S")])
    assert [len(m) for m in table["messages"]] == [2, 3]
    table = load_examples([dict(prompt="q", response="r"), dict(prompt="q2", response=NAN)])
    assert table["messages"][:] == [[user("q"), said("r")], [user("q2")]]
    load_examples([dict(PAIR, history=NAN, tools=NAN, weight=NAN, label=NAN)])
    assert capsys.readouterr().err == ""
    assert "field 'output': expected text" in refused(load_examples, [dict(instruction="i", output=NAN)])


# Hints that can be copied


def test_a_hint_is_quoted_and_names_both_columns():
    ask = lambda row, **how: refused(encode_rows, tokenizer, load_examples([row], **how), 64)
    assert ask({"prompt": "q", "$(touch pwn) x": "text"}).endswith("--columns 'completion=$(touch pwn) x'.")
    comma = ask({"prompt": "q", "a,b=c": "text"})
    assert "columns={'completion': 'a,b=c'}" in comma and "terminal" not in comma
    blank = refused(load_examples, [{" Prompt": "q", "Completion ": "a"}])
    assert "Yours differ by case or blanks: columns={'prompt': ' Prompt', 'completion': 'Completion '}." in blank
    for columns, flag in (
        (("question", "context", "answers"), "prompt=question,completion=answers"),
        (("user", "assistant"), "prompt=user,completion=assistant"),
        (("query", "note"), "prompt=query,completion=your_answer"),
        (("note", "reply"), "prompt=your_question,completion=reply"),
    ):
        why = refused(load_examples, [dict.fromkeys(columns, "x")])
        assert why.endswith(f"in a terminal --columns {flag}."), why


def test_names_that_no_flag_can_say_are_not_noted_as_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"a,b": "q", "c": "a"}))
    columns = {"prompt": "a,b", "completion": "c"}
    assert "asked" not in data_origin(load_examples(path, columns=columns))
    path.write_bytes(lines({"a": "q", "c": "a"}))
    asked = data_origin(load_examples(path, columns={"prompt": "a", "completion": "c"}))["asked"]
    assert asked["columns"] == "prompt=a,completion=c"


# Folders


@pytest.mark.parametrize("name", ["heldout", "held_out", "hold-out", "holdout"])
def test_what_is_held_out_is_not_trained_on(name, tmp_path):
    for file, row in (("data", PAIR), (name, dict(prompt="held", completion="a"))):
        (tmp_path / f"{file}.jsonl").write_bytes(lines(row))
    assert load_examples(tmp_path)["messages"][:] == [TALK]
    assert load_examples(tmp_path, split="heldout")["messages"][0][0] == user("held")


def test_a_file_and_the_same_packed_are_read_once(tmp_path, capsys):
    folder(tmp_path / "rows", train_dot_jsonl=lines(PAIR), train_dot_jsonl_dot_gz=gzip.compress(lines(PAIR)))
    folder(tmp_path / "texts", a_dot_txt=b"one", a_dot_txt_dot_bz2=bz2.compress(b"one"), b_dot_txt=b"two")
    folder(
        tmp_path / "two", a_dot_csv_dot_gz=gzip.compress(b"text\none\n"), a_dot_csv_dot_xz=lzma.compress(b"text\none\n")
    )
    assert [load_examples(tmp_path / name).num_rows for name in ("rows", "texts", "two")] == [1, 2, 1]
    assert "1 of 2 files left out (train.jsonl.gz)" in capsys.readouterr().err


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    table = Dataset.from_list([PAIR, dict(prompt="q2", completion="a2")])
    table.save_to_disk(tmp_path / "one")
    DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "parts")
    DatasetDict(train_sft=table, train_gen=table).save_to_disk(tmp_path / "named")
    load_examples([dict(PAIR, calls=[dict(a=1), dict(b="x")])]).save_to_disk(tmp_path / "own")
    assert [load_examples(tmp_path / name).num_rows for name in ("one", "parts")] == [2, 2]
    assert load_examples(tmp_path / "parts", split="test")["messages"][0] == [user("q2"), said("a2")]
    assert load_examples(tmp_path / "named", split="train_gen").num_rows == 2
    assert load_examples(tmp_path / "own")["calls"][0] == [dict(a=1), dict(b="x")]
    files = data_origin(load_examples(tmp_path / "one"))["files"]
    assert [Path(f).suffix for f in files] == [".arrow"]
    assert "several parts may be meant by the split 'train'" in refused(load_examples, tmp_path / "named")
    assert "its files are of test, train" in refused(load_examples, tmp_path / "parts", split="validation")
    assert "no file of the split 'test'" in refused(load_examples, tmp_path / "one", split="test")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    assert "Of what save_to_disk wrote, give the folder." in refused(load_examples, arrow)
    arrow.write_bytes(b"cut")
    assert "not readable as what save_to_disk wrote" in refused(load_examples, tmp_path / "one")


NO_TEXTS = {
    "an empty list": ([], "there is no text"),
    "no list": (5, "5 holds no texts"),
    "bytes": (b"A town.", "document 1 is 65, and must be a text"),
    "rows without a text": ([dict(name="A town.")], "document 1 is {'name': 'A town.'}, and must be a text"),
    "an empty field": (["A town.", None], "document 2 is None"),
    "conversations": (Dataset.from_list(SHORT), "no column `text`, but prompt, completion"),
    "a table of several parts": (DatasetDict(train=Dataset.from_list(SHORT)), "no column `text`, but train"),
    "a missing file": ("nowhere.txt", "nowhere.txt"),
}


@pytest.mark.parametrize("case", NO_TEXTS)
def test_what_holds_no_texts_is_a_line(bases, case, tmp_path):
    "Each way to documents: a run, a stream of tokens, a tokenizer"
    examples, said = NO_TEXTS[case]
    model, own = loaded(bases["llama"], lora=False)
    assert said in refused(pretrain, model, own, examples, PretrainArgs(max_steps=1, out=str(tmp_path / "run")))
    assert said in refused(token_stream, own, examples) and said in refused(train_tokenizer, examples, 300)
    assert not (tmp_path / "run").exists()


def test_a_text_is_the_name_of_a_file(bases, tmp_path):
    "And no list of characters; the run says which file"
    file, none = tmp_path / "tale.txt", dict(eval_steps=0, save_steps=0, sample_steps=0)
    file.write_text(TALE, encoding="utf8")
    model, own = loaded(bases["llama"], lora=False)
    for i, examples in enumerate((str(file), file, [TALE], Dataset.from_list([dict(text=TALE, topic="hens")]))):
        run = pretrain(
            model.requires_grad_(), own, examples, PretrainArgs(max_steps=1, out=str(tmp_path / f"{i}"), **none)
        )
        data = run.info["data"]
        assert data["documents"] == 1 and data["tokens"] == len(token_stream(own, [TALE]))
        assert bool(data.get("files")) == (i < 2)
        model, own = loaded(bases["llama"], lora=False)
    assert train_tokenizer(str(file), 300).get_vocab() == train_tokenizer([TALE], 300).get_vocab()


def test_a_report_on_no_row_is_a_line():
    assert refused(data_report, tokenizer, load_examples(SHORT).select([])) == "no row is in these data."
