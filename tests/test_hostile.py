"""What a stranger hands over runs nothing and forges nothing: run folders, models, data, names of files. Every damaged
file is one line that says what is wrong, or is passed over; a page gets no element and a terminal no character that
is not ours."""

import ast
import contextlib
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from forked import Script
from safetensors.torch import load_file, save_file
from small import small_base

from tinytrainer_nb.all import (
    LoraArgs,
    PPOArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    add_lora,
    compare_panel,
    load_examples,
    load_model,
    ppo,
    run_panel,
    save_merged,
    sft,
)
from tinytrainer_nb.cli import main
from tinytrainer_nb.core import Markup, command, inert, may_be_on_hub, one_line, progress, unfit, visible, write_whole
from tinytrainer_nb.core import TinyTrainerError as SameError
from tinytrainer_nb.data.tokens import render
from tinytrainer_nb.panels.rollouts import rollout_panel
from tinytrainer_nb.panels.run_panel import request_lines
from tinytrainer_nb.recipes.evaluate import Evaluation, answer_table, score_table
from tinytrainer_nb.recipes.reproduce import as_command
from tinytrainer_nb.recipes.rewards import flexible_answer, format_reward
from tinytrainer_nb.views.chat import chat_loop
from tinytrainer_nb.views.plots import LivePicture, alarm_lines
from tinytrainer_nb.views.terminal import Watch, news, run_line, summary_line

PACKAGE = Path(__file__).resolve().parent.parent / "tinytrainer_nb"
EVIL = "'\"><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\x1b[2J\r\u202e\nerror: forged"
ROWS = [dict(prompt=f"How many legs have {n} hens?", completion=f"{2 * n} legs") for n in range(2, 18)]
FEW = dict(eval_steps=0, save_steps=1, sample_steps=1, batch_size=2)


def trained(out: Path, recipe: str) -> Run:
    "A run of two steps that was stopped before its third"
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    model = add_lora(model, LoraArgs(r=2))
    if recipe == "sft":
        sft(model, tokenizer, load_examples(ROWS), SFTArgs(max_steps=2, out=str(out), **FEW))
    else:
        few = FEW | dict(num_generations=2, max_new_tokens=4)
        ppo(
            model,
            tokenizer,
            [dict(prompt=r["prompt"]) for r in ROWS],
            "length",
            PPOArgs(max_steps=2, out=str(out), **few),
        )
    run = Run.open(out)
    run.request = None
    told = json.loads((out / "run.json").read_text(encoding="utf-8"))
    told |= dict(status="stopped", settings=told["settings"] | dict(max_steps=3))
    (out / "run.json").write_text(json.dumps(told), encoding="utf-8")
    asked = dict(action="set", asked=1.5e9, changes=dict(learning_rate=1e-4))
    (out / "requests").mkdir(exist_ok=True)
    (out / "requests" / "00000000000000000001-set.json").write_text(json.dumps(asked), encoding="utf-8")
    return Run.open(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    "A stopped run of each of two recipes, to be copied and damaged"
    above = tmp_path_factory.mktemp("runs")
    return {recipe: trained(above / recipe, recipe).folder for recipe in ("sft", "ppo")}


class Page(html.parser.HTMLParser):
    "Elements and attributes of a page that are none of ours"

    TAGS = set("b br div img li ol p pre progress span style table td th tr".split())
    NAMES = set("alt aria-label class decoding height max src style value width".split())

    def __init__(self, text: str):
        super().__init__()
        self.foreign = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            ours = name in self.NAMES and (name != "src" or value.startswith("data:image/png;base64,"))
            ours = ours and not (name == "style" and re.search(r"url|expression|@import", value))
            self.foreign += [] if ours else [(tag, name, value)]
        self.foreign += [] if tag in self.TAGS else [tag]


def is_inert(page: str) -> None:
    assert not Page(page).foreign, Page(page).foreign
    assert visible(page) == page


def is_line(error: str) -> None:
    assert error and "\n" not in error and visible(error) == error and "Traceback" not in error, error


def line(f, *args):
    "What comes of a call: its value, or None after one line"
    try:
        return f(*args)
    except TinyTrainerError as e:
        is_line(str(e))
        assert len(str(e)) < 2000


def looked_at(folder: Path, other: Path, panels: bool = True) -> None:
    "Everything that shows a run without loading its model"
    if (run := line(Run.open, folder)) is None:
        return
    for shown in (repr, lambda run: run.summary, lambda run: run.status, request_lines, run_line, summary_line):
        said = line(shown, run)
        assert not isinstance(said, str) or one_line(said) == said
    for shown in (lambda run: news(run, run.events), alarm_lines, as_command, Run.how_to_resume):
        line(shown, run)
    is_inert(line(run._repr_html_) or "")
    if not panels:
        return
    line(lambda: LivePicture(run).html())
    for panel in (line(run_panel, folder), line(rollout_panel, run), line(compare_panel, [folder, other])):
        if panel is None:
            continue
        for page in (panel.trouble.value, line(panel.twin) or "", *(w.value for w in html_of(panel))):
            is_inert(page)
            assert not re.search(r"\b(?!TinyTrainer)\w+Error: ", page), page
        panel.close()


def raised(f, *args) -> str:
    "What a call raises, with the places that it passed in the package; empty if nothing"
    try:
        f(*args)
    except Exception as e:
        places = [f"{Path(t.filename).name}:{t.lineno}" for t in traceback.extract_tb(e.__traceback__)]
        return f"{type(e).__name__}: {str(e):.300} ({' '.join(places[-6:])})"
    return ""


def html_of(widget) -> list:
    children = [w for child in getattr(widget, "children", ()) for w in html_of(child)]
    return children + ([widget] if type(widget).__name__ == "HTML" else [])


DEEP = "[" * 100_000 + "]" * 100_000
WRONG = dict(
    null=None,
    text=EVIL,
    list=[],
    object={},
    nested=[[[dict(a=[EVIL])]]],
    negative=-1,
    huge=10**30,
    enormous=10**4000,
    float=1e308,
    infinite=float("inf"),
    nan=float("nan"),
    flag=True,
)
WHOLE = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"5",
    "text": json.dumps(EVIL).encode(),
    "cut": b'{"recipe": "sft", "sett',
    "not UTF-8": b'{"recipe": "\xff\xfe"}',
    "NUL": b"\0" * 100,
    "deep": DEEP.encode(),
    "deep inside": b'{"recipe": ' + DEEP.encode() + b"}",
    "deep enough": json.dumps(dict(recipe="sft")).encode()[:-1] + b', "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "bare": b"{}",
}


def replace_field(path: Path, field: str, value) -> None:
    "Set `a.b` in a JSON file; `...` as value takes it away"
    content = json.loads(path.read_text(encoding="utf-8"))
    inside, *names = content, *field.split(".")
    for name in names[:-1]:
        inside = inside[int(name) if isinstance(inside, list) else name]
    last = int(names[-1]) if isinstance(inside, list) else names[-1]
    if value is ...:
        inside.pop(last, None)
    else:
        inside[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def in_its_place(path: Path, what: str) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to("nowhere")
    elif what == "pipe":
        os.mkfifo(path)


RUN_FIELDS = (
    *("recipe status settings process seed created may_change versions hardware load data").split(),
    *(
        "settings.max_steps settings.learning_rate settings.out settings.sample_steps process.pid process.started"
    ).split(),
    *("load.base load.path load.sha256 load.quantization load.dtype load.adapter load.adapter_from load.seed").split(),
    *("data.name data.files data.rows data.asked").split(),
)
FILES = ("run.json", "events.jsonl", "summary.json", "requests/00000000000000000001-set.json")
READ = [  # file, what is done to it
    *((name, f"whole: {how}") for name in FILES for how in WHOLE),
    *((name, f"place: {how}") for name in FILES for how in ("folder", "link", "pipe", "nothing")),
    *(("run.json", f"{field}: {how}") for field in RUN_FIELDS for how in (*WRONG, "missing")),
    *(("summary.json", f"{f}: {how}") for f in ("steps", "seconds", "tokens_per_s", "last_loss") for how in WRONG),
    *((FILES[3], f"{field}: {how}") for field in ("action", "asked", "changes") for how in WRONG),
]


def damage(folder: Path, name: str, what: str) -> None:
    path, (field, how) = folder / name, what.split(": ")
    if field == "whole":
        path.write_bytes(WHOLE[how])
    elif field == "place":
        in_its_place(path, how)
    else:
        replace_field(path, field, ... if how == "missing" else WRONG[how])


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_run_is_a_line(name, runs, tmp_path):
    "Some 450 of them; each is read, shown and laid over another run. Panels are opened on every fifth"
    todo, troubles = [what for file, what in READ if file == name], []
    assert len(todo) >= 15
    for i, what in enumerate(todo):
        folder = tmp_path / f"{i}"
        shutil.copytree(runs["sft"], folder)
        damage(folder, name, what)
        if trouble := raised(looked_at, folder, runs["ppo"], i % 9 == 0):
            troubles.append((what, trouble))
        shutil.rmtree(folder)
    assert not troubles


EVENT = dict(time=1.5e9, step=3, kind="metrics", loss=1.0, learning_rate=1e-4)
KINDS = {
    "metrics": dict(loss=1.0, tokens_per_s=3.0, numbers=[1.0]),
    "evaluation": dict(loss=1.0),
    "sample": dict(prompt="a", completion="b", reward=1.0, parts=dict(length=1.0), index=0, group=0, tokens=3),
    "change": dict(setting="learning_rate", old=1.0, new=2.0, asked=1.0),
    "status": dict(value="running", asked=1.0),
    "checkpoint": dict(path="checkpoints/step-000001", asked=1.0),
    "alarm": dict(name="kl", message="far away", value=1.0, limit=1.0),
    "note": dict(message="a note"),
    "error": dict(message="an error", type="ValueError"),
    "unheard of": dict(value=1.0, asked=1.0),
}


def test_damaged_events_are_passed_over_and_counted(runs, tmp_path):
    "Each field of each kind of event with a value that it cannot have, and all of these in one journal"
    folder, wrong = tmp_path / "run", []
    shutil.copytree(runs["ppo"], folder)
    journal = (folder / "events.jsonl").read_text(encoding="utf-8")
    for kind, fields in KINDS.items():
        event = dict(time=1.5e9, step=3, kind=kind) | fields
        for name in event:
            wrong += [json.dumps(event | {name: value}) for value in WRONG.values()]
            wrong += [json.dumps({k: v for k, v in event.items() if k != name})]
    wrong += [
        "",
        " ",
        "5",
        "null",
        "[]",
        "{",
        DEEP,
        '{"kind": ' + DEEP + "}",
        json.dumps(EVENT)[:-1] + ', "x": ' + DEEP + "}",
    ]
    assert len(wrong) > 500
    for chunk in np.array_split(np.array(wrong, dtype=object), 12):
        (folder / "events.jsonl").write_text(journal + "\n".join(chunk) + "\n", encoding="utf-8")
        looked_at(folder, runs["sft"])
    (folder / "events.jsonl").write_text(journal + "\n".join(wrong) + "\n", encoding="utf-8")
    run = Run.open(folder)
    assert (
        run.journal.skipped > 200
        and f"{run.journal.skipped:,} lines of events.jsonl hold no event" in run._repr_html_()
    )
    assert all(type(e["step"]) is int and e["step"] >= 0 for e in run.events)
    (folder / "events.jsonl").write_bytes(journal.encode() + b"\xff\xfe\n" + json.dumps(EVENT).encode() + b"\n")
    assert Run.open(folder).events[-1]["step"] == 3 and Run.open(folder).journal.skipped == 1


LOADED = [  # recipe, file, what is done to it
    *(("sft", "adapter/adapter_config.json", f"whole: {how}") for how in WHOLE),
    *(("sft", "start/adapter_config.json", f"whole: {how}") for how in ("cut", "deep", "list", "not UTF-8")),
    *(("sft", f"{at}/adapter_config.json", "peft_type: list") for at in ("adapter", "start")),
    *(
        ("sft", "start/adapter_config.json", f"{f}: {how}")
        for f in ("r", "target_modules")
        for how in ("text", "nested")
    ),
    *(("sft", "checkpoints/step-000002/progress.json", f"whole: {how}") for how in WHOLE),
    *(
        ("sft", "checkpoints/step-000002/progress.json", f"{field}: {how}")
        for field in ("tokens", "settings", "sha256", "best", "settings.learning_rate")
        for how in ("text", "nested")
    ),
    *(("ppo", "data/prompts.json", f"whole: {how}") for how in WHOLE),
    *(("ppo", "data/prompts.json", f"0.messages: {how}") for how in WRONG),
    *(("sft", "data/train.json", f"whole: {how}") for how in WHOLE),
    *(("sft", "data/train.json", f"0.messages: {how}") for how in ("null", "text", "object", "nested")),
    *(
        (r, f, f"place: {how}")
        for r, f in (("sft", "data/train.json"), ("ppo", "data/prompts.json"))
        for how in ("folder", "link", "nothing")
    ),
    *(
        ("sft", f"{at}/adapter_model.safetensors", f"place: {how}")
        for at in ("adapter", "start")
        for how in ("folder", "link", "nothing")
    ),
    *(("sft", "adapter/adapter_model.safetensors", f"whole: {how}") for how in ("empty", "text", "NUL")),
    *(
        ("sft", "run.json", f"load.{f}: {how}")
        for f in ("base", "path", "dtype", "chat_template")
        for how in ("text", "list")
    ),
    *(("sft", "events.jsonl", f"whole: {how}") for how in ("deep", "NUL", "text")),
    *(("sft", "checkpoints", f"place: {how}") for how in ("link", "nothing")),
]


def said_by(argv: list[str], monkeypatch) -> tuple[int, str]:
    "Exit status of a command, and all that it wrote"
    out = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(argv)
    return status, out.getvalue()


def says_a_line(argv: list[str], monkeypatch) -> None:
    status, said = said_by(argv, monkeypatch)
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    assert (status, len(errors)) in ((0, 0), (2, 1)), (status, said)
    said = said.replace("\r", "")
    assert visible(said) == said, said


@pytest.mark.parametrize("part", range(6))
def test_commands_on_a_damaged_run_say_a_line(part, runs, tmp_path, monkeypatch):
    "resume, or chat and evaluate: what is wrong in one line, or it works"
    (tmp_path / "own.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8")
    own, troubles = str(tmp_path / "own.jsonl"), []
    for i, (recipe, name, what) in enumerate(LOADED[part::6]):
        folder = tmp_path / f"{i}"
        shutil.copytree(runs[recipe], folder)
        if (path := folder / name).exists() or "nothing" not in what:
            if path.suffix == ".json" and not path.exists():
                path.write_text("{}", encoding="utf-8")
            damage(folder, name, what)
        commands = [["resume", str(folder)]]
        if not name.startswith(("data", "checkpoints", "start")):
            commands = [
                ["chat", str(folder)],
                ["evaluate", "--base", str(folder), "--data", own, "--task", "loss"],
                *commands,
            ]
        for argv in commands:
            if trouble := raised(says_a_line, argv, monkeypatch):
                troubles.append((argv[0], name, what, trouble))
        shutil.rmtree(folder)
    assert not troubles
