"""What a stranger hands over runs nothing and forges nothing: run folders, models, data, names of files. Every damaged
file is one line that says what is wrong, or is passed over; a page gets no element and a terminal no character that
is not ours."""

import ast
import bz2
import contextlib
import gzip
import html
import html.parser
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from small import small_base
from transformers import AutoTokenizer

from tinytrainer_nb.all import (
    LoraArgs,
    PPOArgs,
    PretrainArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    add_lora,
    compare_panel,
    load_examples,
    load_model,
    ppo,
    pretrain,
    run_panel,
    save_merged,
    sft,
)
from tinytrainer_nb.cli import main
from tinytrainer_nb.core import (
    Markup,
    inert,
    may_be_on_hub,
    one_line,
    progress,
    read_json,
    remove_whole,
    shell_line,
    unfit,
    visible,
    whole_folder,
    write_json,
    write_whole,
)
from tinytrainer_nb.core import TinyTrainerError as SameError
from tinytrainer_nb.data.tokens import encode_chat, render
from tinytrainer_nb.panels.rollouts import rollout_panel
from tinytrainer_nb.panels.run_panel import request_lines
from tinytrainer_nb.recipes.evaluate import Evaluation, answer_table, score_table
from tinytrainer_nb.recipes.reproduce import as_command
from tinytrainer_nb.recipes.rewards import flexible_answer, format_reward
from tinytrainer_nb.runs.journal import Journal
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
    elif recipe == "pretrain":
        base, _ = load_model(small_base(), "none", "fp32", verbose=False)
        pretrain(
            base, tokenizer, ["A town by the sea. " * 99], PretrainArgs(max_steps=2, max_length=32, out=str(out), **FEW)
        )
    else:
        few = FEW | dict(num_generations=2, max_new_tokens=4)
        ppo(
            model,
            tokenizer,
            [dict(prompt=r["prompt"]) for r in ROWS],
            "length",
            PPOArgs(max_steps=2, out=str(out), **few),
        )
    told = json.loads((out / "run.json").read_text(encoding="utf-8"))
    told |= dict(status="stopped", settings=told["settings"] | dict(max_steps=3))
    (out / "run.json").write_text(json.dumps(told), encoding="utf-8")
    asked = dict(action="set", asked=1.5e9, changes=dict(learning_rate=1e-4))
    (out / "requests").mkdir(exist_ok=True)
    (out / "requests" / "00000000000000000001-set.json").write_text(json.dumps(asked), encoding="utf-8")
    return Run.open(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    "A stopped run of each of three recipes, to be copied and damaged"
    above = tmp_path_factory.mktemp("runs")
    return {recipe: trained(above / recipe, recipe).folder for recipe in ("sft", "ppo", "pretrain")}


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


# Each part holds a sixth of the damages, spread over all kinds; the first is tried always, the others by `-m slow`
PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 6))]
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
    elif what == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(path)


RUN_FIELDS = (
    *("recipe status settings process seed created may_change versions hardware load data").split(),
    *(
        "settings.max_steps settings.learning_rate settings.out settings.sample_steps process.pid process.started"
    ).split(),
    *("load.base load.path load.sha256 load.quantization load.dtype load.adapter load.adapter_from load.seed").split(),
    *("data.name data.files data.rows data.asked").split(),
    *("load.files load.commit load.vocabulary start result").split(),
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


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_run_is_a_line(name, part, runs, tmp_path):
    "Some 450 of them; each is read, shown and laid over another run. Panels are opened on every ninth"
    todo, troubles = [what for file, what in READ if file == name][part::6], []
    for i, what in enumerate(todo):
        folder = tmp_path / f"{i}"
        shutil.copytree(runs["sft"], folder)
        damage(folder, name, what)
        if i % 9 and name != "events.jsonl":
            (folder / "events.jsonl").unlink()  # a picture takes a tenth of a second
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


@pytest.mark.slow
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
    for chunk in np.array_split(np.array(wrong, dtype=object), 4):
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
    *(("pretrain", "data/tokens.npy", f"whole: {how}") for how in ("empty", "text", "cut", "NUL")),
    *(("sft", "data/train.json", f"0.messages: {how}") for how in ("null", "text", "object", "nested")),
    *(
        (r, f, f"place: {how}")
        for r, f in (("sft", "data/train.json"), ("ppo", "data/prompts.json"), ("pretrain", "data/tokens.npy"))
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
    *(
        ("ppo", "run.json", f"{f}: {how}")
        for f in ("load.files", "start", "result", "reward.names", "reward.weights", "reward.code")
        for how in ("null", "text", "list", "missing")
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


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
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


def closed(argv: list[str], monkeypatch, lines: int) -> str:
    "What a command says, in so many lines, nothing among it that is not seen"
    status, said = said_by(argv, monkeypatch)
    assert visible(said) == said and said.count("\n") == lines, (argv, said)
    assert not any(text.startswith(("error: forged", "next: ")) for text in said.splitlines()), said
    return said


def test_names_forge_no_line_in_a_terminal(runs, tmp_path, monkeypatch):
    "Names of folders, files, flags, tasks, rewards, columns"
    monkeypatch.chdir(tmp_path)
    name = "evil\x1b[2J\r\u202e\u2028\nerror: forged"
    closed(["resume", name], monkeypatch, 1)
    closed(["chat", name], monkeypatch, 1)
    closed(["sft", "--data", f"{name}.jsonl"], monkeypatch, 1)
    closed(["evaluate", "--task", name], monkeypatch, 1)
    closed(["sft", f"--{name}", "1"], monkeypatch, 1)
    closed([name], monkeypatch, 1)
    closed(["ppo", "--reward", name, "--base", small_base()], monkeypatch, 1)
    closed(["run", name], monkeypatch, 1)
    Path("own.jsonl").write_text(json.dumps({name: 1, "b": EVIL}), encoding="utf-8")
    closed(["sft", "--data", "own.jsonl", "--base", small_base()], monkeypatch, 1)
    shutil.copytree(runs["sft"], name)
    Path(name, "run.json").write_text(
        json.dumps(json.loads(Path(name, "run.json").read_text()) | dict(status="finished"))
    )
    said = closed(["resume", name], monkeypatch, 1)
    assert "tinytrainer chat $'evil\\x1b[2J\\x0d" in said
    replace_field(Path(name, "run.json"), "recipe", EVIL)
    replace_field(Path(name, "run.json"), "status", "stopped")
    closed(["resume", name], monkeypatch, 1)


def test_a_journal_forges_no_line_in_a_terminal(runs, tmp_path, monkeypatch):
    "What `follow` and `tinytrainer run` show of samples, alarms and figures, on a terminal and in a log"
    folder = tmp_path / "run"
    shutil.copytree(runs["sft"], folder)
    run, lines = Run.open(folder), []
    for terminal in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        watch = Watch([folder], stream)
        watch.line()
        watch.news()
        run.journal.append("sample", 3, prompt=EVIL, completion=EVIL, reward=1.0)
        run.journal.append("alarm", 3, name=EVIL, message=EVIL)
        run.journal.append("evaluation", 3, **{EVIL: 0.5})
        watch.say(EVIL)
        watch._show()
        said = stream.getvalue().replace("\r", "") if terminal else stream.getvalue()
        assert visible(said) == said and not any(text.startswith("error") for text in said.splitlines())
        lines.append(said.count("\n"))
    assert lines == [4, 3]
    bar = progress(total=1, desc=EVIL)
    assert one_line(bar.desc) == bar.desc != EVIL


def test_a_models_answer_forges_no_line_in_a_terminal(monkeypatch):
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    pieces = ["Yes.\ny", "ou> rm -r ~\n\x1b[2J\x1b[31m\u202e\r", "\nmodel> forged\x08\x07"]
    monkeypatch.setattr("tinytrainer_nb.views.chat.Chat.pieces", lambda self, text: iter(pieces))
    out, asked = io.StringIO(), iter(["hello", ""])
    chat_loop(model, tokenizer, read=lambda prompt: next(asked), write=lambda *a, **k: print(*a, **k | dict(file=out)))
    said = out.getvalue()
    assert visible(said) == said and "\\x1b[2J" in said
    assert [text for text in said.splitlines() if text.startswith(("you>", "model>"))] == ["model> Yes."]


def test_an_error_is_one_visible_line_wherever_it_is_printed():
    error = TinyTrainerError(EVIL)
    assert one_line(str(error)) == str(error) and SameError is TinyTrainerError
    script = "import sys; from tinytrainer_nb.core import TinyTrainerError; raise TinyTrainerError(sys.argv[1])"
    said = subprocess.run([sys.executable, "-c", script, EVIL], capture_output=True, text=True).stderr
    assert said.splitlines()[-1].startswith("tinytrainer_nb.core.TinyTrainerError: ") and "\x1b" not in said


@pytest.mark.parametrize(
    "name", ["a b", "$(touch pwned)", "it's", '"; touch pwned; "', "-x", "a\nb", "`touch pwned`", "\x1b[2Jä\\"]
)
def test_hints_can_be_copied_into_a_shell(name, runs, tmp_path, monkeypatch):
    "What a shell makes of a hint is the very folder, and nothing else happens"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs["sft"], name)
    hint = Run.open(name).how_to_resume().strip("`").removeprefix("tinytrainer ")
    assert "\n" not in hint and visible(hint) == hint
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {hint}"], capture_output=True, cwd=tmp_path).stdout
    words = os.fsdecode(shown).split("\0")[:-1]
    assert words[0] == "resume" and os.path.samefile(words[1], name) and not words[1].startswith("-")
    assert not list(tmp_path.rglob("pwned"))
    replace_field(Path(name, "run.json"), "reward", dict(kind="file", spec=f"{name}.py:f", names=["f"]))
    hint = Run.open(name).how_to_resume().strip("`").removeprefix("tinytrainer ")
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {hint}"], capture_output=True).stdout
    words = os.fsdecode(shown).split("\0")[2:-1]
    assert words in (["--reward", f"{name}.py:f"], [f"--reward={name}.py:f"]) and not words[-1].startswith("-x")


LINKED = (
    "events.jsonl",
    "checkpoints",
    "requests",
    "adapter",
    "figure.png",
    "summary.json",
    "run.json",
    "lock",
    ".taking",
)


@pytest.mark.parametrize("name", LINKED)
def test_nothing_is_written_through_a_link(name, runs, tmp_path, monkeypatch):
    "Of a run's folder: by a resume, a request, a note"
    folder, own = tmp_path / "run", tmp_path / "own"
    shutil.copytree(runs["sft"], folder)
    path = folder / name
    is_folder = path.is_dir()
    if path.exists():
        shutil.move(path, own)
    elif is_folder or name in ("checkpoints", "requests", "adapter"):
        own.mkdir()
    else:
        own.write_text("mine", encoding="utf-8")
    path.symlink_to(own)
    before = {p: p.read_bytes() for p in (own.rglob("*") if own.is_dir() else [own]) if p.is_file()}
    status, said = said_by(["resume", str(folder)], monkeypatch)
    assert status == 2 and "is a link" in said and said.count("\n") == 1, said
    process = json.loads((runs["sft"] / "run.json").read_text(encoding="utf-8"))["process"]
    replace_field(folder / "run.json", "status", "running") if name != "run.json" else None
    assert process["pid"] == os.getpid()  # this process, so that a request is taken
    if name != "run.json":
        with pytest.raises(TinyTrainerError, match="is a link"):
            Run.open(folder).pause()
    if name == "events.jsonl":
        with pytest.raises(TinyTrainerError, match="is a link"):
            Run.open(folder).log("note", 1, message="through it")
    Run.open(folder).save_figure()
    assert before == {p: p.read_bytes() for p in (own.rglob("*") if own.is_dir() else [own]) if p.is_file()}


def test_links_in_the_way_of_files_and_folders(runs, tmp_path):
    "A file beside, a merged model, a new run"
    mine = tmp_path / "mine"
    mine.write_text("mine", encoding="utf-8")
    (tmp_path / f".new.json.{os.getpid()}.partial").symlink_to(mine)
    (tmp_path / "old.json").symlink_to(mine)
    for name in ("new.json", "old.json"):
        write_whole(tmp_path / name, "yours")
        assert (tmp_path / name).read_text(encoding="utf-8") == "yours" and not (tmp_path / name).is_symlink()
    assert mine.read_text(encoding="utf-8") == "mine"
    (tmp_path / "there").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "there")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(TinyTrainerError, match="is a link"):
        save_merged(runs["sft"], tmp_path / "merged")
    for put in (lambda path: whole_folder(path).__enter__(), remove_whole):
        with pytest.raises(TinyTrainerError, match="is a link"):
            put(tmp_path / "nowhere")
    assert (tmp_path / "nowhere").is_symlink() and not list(tmp_path.glob(".*.partial"))
    assert not list((tmp_path / "there").iterdir())
    with (
        pytest.raises(TinyTrainerError, match="is a link to nothing"),
        Run.prepare(tmp_path / "nowhere", "sft", SFTArgs()),
    ):
        pass
    inside = tmp_path / "run"
    shutil.copytree(runs["sft"], inside)
    (inside / "latest").symlink_to("checkpoints")
    Run.open(inside).need_own()  # a link that stays in the folder harms nobody


def with_code(folder: Path, kind: str) -> Path:
    "A copy of a base that brings code of its own, which leaves a file when it is run"
    shutil.copytree(small_base(), folder)
    code = f"open({str(folder / 'executed')!r}, 'w')\n"
    own = dict(AutoConfig="own.Hen", AutoModelForCausalLM="own.HenModel")
    if kind == "model":
        edit(folder / "config.json", model_type="hen", auto_map=own)
    elif kind == "known type":
        edit(folder / "config.json", auto_map=own)
    elif kind == "model alone":
        edit(folder / "config.json", auto_map=dict(AutoModelForCausalLM="someone/repo--own.HenModel"))
    elif kind == "tokenizer":
        edit(
            folder / "tokenizer_config.json",
            tokenizer_class="HenTokenizer",
            auto_map=dict(AutoTokenizer=["own.Hen", None]),
        )
    elif kind == "older tokenizer":
        edit(folder / "tokenizer_config.json", auto_map=["own.HenTokenizer", None])
    elif kind == "generation":
        edit(folder / "generation_config.json", auto_map=dict(GenerationConfig="own.Hen"))
    (folder / "own.py").write_text(code + "from transformers import *\nclass Hen(LlamaConfig): model_type = 'hen'\n")
    return folder


def edit(path: Path, **fields) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(content | fields), encoding="utf-8")


@pytest.mark.parametrize("kind", ["model", "known type", "model alone", "tokenizer", "older tokenizer", "generation"])
def test_code_of_a_models_own_is_refused_at_once(kind, tmp_path, monkeypatch):
    "Nobody is asked, nothing is run"
    folder = with_code(tmp_path / "custom", kind)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("somebody was asked"))
    with pytest.raises(TinyTrainerError, match="code of their own.*not run"):
        load_model(folder, "none", "fp32", verbose=False)
    assert not (folder / "executed").exists()


def test_code_that_transformers_has_by_now_is_not_needed(tmp_path):
    folder = with_code(tmp_path / "known", "none")
    edit(folder / "config.json", auto_map=dict(AutoModelForCausalLM="modeling_llama.LlamaForCausalLM"))
    model, _ = load_model(folder, "none", "fp32", verbose=False)
    assert type(model).__module__.startswith("transformers.") and not (folder / "executed").exists()


def test_an_adapter_imports_no_module_that_it_names(runs, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(runs["sft"], folder)
    (tmp_path / "own_module.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder / "adapter" / "adapter_config.json", megatron_config=dict(a=1), megatron_core="own_module")
    with pytest.raises(TinyTrainerError, match="Megatron"):
        load_model(folder, verbose=False)
    edit(folder / "adapter" / "adapter_config.json", megatron_config=None)
    for names in (["default", "../start"], ["default", "default"], ["foo"], [], ["foo", "default"], ["default", 1]):
        (folder / "adapter" / "stack.json").write_text(json.dumps(names), encoding="utf-8")
        with pytest.raises(TinyTrainerError, match="stack.json"):
            load_model(folder, verbose=False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name",
    [
        "./missing",
        "../a/b",
        "~/a/b",
        "~/a",
        "/a/b",
        "a/b/c",
        "rows/train.jsonl",
        "models\\tiny",
        "here/missing",
        "a/b.gguf",
        "a/..b",
        "-a/b",
        "a/b.txt",
        "here/",
        "a/b.csv.gz",
    ],
)
def test_a_name_that_looks_local_is_never_asked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    asked = lambda *args, **kwargs: pytest.fail(f"{name} was looked up")
    monkeypatch.setattr("tinytrainer_nb.data.formats.load_dataset", asked)
    monkeypatch.setattr("tinytrainer_nb.model.load._pretrained", asked)
    for load in (lambda: load_examples(name), lambda: load_model(name, verbose=False)):
        with pytest.raises(TinyTrainerError) as e:
            load()
        is_line(str(e.value))
    assert not may_be_on_hub(name) and may_be_on_hub("owner/name") and may_be_on_hub("Qwen/Qwen2.5-0.5B")


def test_a_name_that_is_too_long_for_a_file_is_no_name():
    long = "a" * 300
    assert may_be_on_hub(f"{long}/b") and not may_be_on_hub(f"{long}/b.csv")
    assert line(load_examples, f"{long}.csv") is None and line(lambda: load_examples(long, split="test")) is None


@pytest.mark.parametrize("half", ["\ud800", "\udce9", "\udfff"])
def test_half_a_character_is_written_and_read(half, tmp_path):
    "As in a data file's name that is not UTF-8, or in a stranger's run.json"
    held = {f"caf{half}.jsonl": [f"\\{half}", "é\U0001f600"]}
    assert read_json(write_json(tmp_path / "a.json", held)) == held
    (tmp_path / "a.json").read_text(encoding="utf-8")
    journal = Journal(tmp_path / "events.jsonl")
    journal.append("note", 1, message=half)
    assert journal.events()[0]["message"] == half and Journal(journal.path).events() == journal.events()
    word = shell_line(f"caf{half}")
    assert word.isascii() and word.isprintable()
    if os.name != "nt":
        said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout
        assert said == f"caf{half}".encode("utf-8", "surrogateescape" if half == "\udce9" else "surrogatepass")


BLANKS, MANY = " " * 20_000, 20_000
SLOW = {  # what may be read in a second
    "blanks behind the heading": "### Instruction:" + BLANKS + "x",
    "blanks everywhere": BLANKS + "### Instruction:" + BLANKS + "### Input:" + BLANKS + "x" + BLANKS,
    "headings": "### Instruction:" + "### Input: " * MANY + "x",
    "line breaks": "### Instruction:" + "\n" * 20_000 + "### Response" + "\n" * 20_000,
    "brackets": "{{" * MANY + "[" * MANY + "<|" * MANY,
    "digits": "1," * MANY + "." + "-" * MANY + "$" * MANY,
    "hashes": "####" * MANY,
}


@pytest.mark.parametrize("what", SLOW)
def test_no_pattern_crawls(what):
    "Each takes milliseconds; the patterns that were here took minutes. The bound is generous"
    text, began = SLOW[what], time.process_time()
    load_examples([dict(text=text)])
    for reward in (flexible_answer, format_reward):
        reward("", text, reference_answer="3")
    inert(text), one_line(text), visible(text), Markup.escape(text), unfit(dict(a=text), dict(a="count"))
    answer_table(dict(a=Evaluation("x", 1.0, 1, [text], [text], [1.0], [text])))
    assert time.process_time() - began < 5


def test_an_instruction_is_read_as_before():
    "By the pattern that was used, on texts where it is quick"
    old = re.compile(r"\s*### Instruction:\s*(.*?)\s*(?:### Input:\s*(.*?)\s*)?### Response:\s*(.*?)\s*", re.S)
    parts = ["### Instruction:", "### Input:", "### Response:", " a ", "\n", "b"]
    draw = np.random.default_rng(0)
    told = 0
    for _ in range(300):
        text = parts[0] + "".join(parts[i] for i in draw.integers(0, len(parts), draw.integers(2, 7)))
        found = old.fullmatch(text)
        if not found:
            read = load_examples([dict(text=text + "x" * (not text.strip()))])[0] if text.strip() else dict(text=text)
            assert read == dict(text=text)
            continue
        asked = "\n".join(filter(None, found.groups()[:2]))
        if not asked.strip() or not found[3].strip():
            continue  # left out as empty
        told += 1
        assert [m["content"] for m in load_examples([dict(text=text)])[0]["messages"]] == [asked, found[3]], text
    assert told > 30


TEMPLATES = {
    "a long range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "nested brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "Python's inside": "{{ messages.__class__.__base__.__subclasses__() }}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_strangers_chat_template_is_limited(what, monkeypatch):
    _, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    tokenizer.chat_template = TEMPLATES[what]
    monkeypatch.setattr("tinytrainer_nb.data.tokens.LONGEST", 1)
    began = time.process_time()
    with pytest.raises(TinyTrainerError, match="chat template") as e:
        render(tokenizer, [dict(role="user", content="hello")])
    is_line(str(e.value))
    assert time.process_time() - began < 20
    time.sleep(1.1)  # nothing is raised later, outside


LINKS = "- [x](javascript:alert(1)) ![y](http://127.0.0.1:9/y.png) <img src=x onerror=alert(1)> | a |"
MARKDOWN = f"# h\n{LINKS}\n$x$ **b** `c` https://a.b"


def test_markdown_of_answers_names_and_settings_is_inert():
    "By a renderer of its own: one paragraph or table of text, in which the characters are what they were"
    mistune = pytest.importorskip("mistune")
    page = mistune.create_markdown(escape=False, plugins=["table", "url", "strikethrough", "math"])
    for text in (
        MARKDOWN,
        "1. one",
        "- one",
        "    code",
        "> quote",
        "| a |\n|---|",
        "a_b_c __d__",
        "~~no~~",
        "===",
        "www.a.b a@b.c",
    ):
        made = page(f"| {inert(text)} |\n| --- |\n| {inert(text)} |\n\n{inert(text)}\n")
        tags = set(re.findall(r"<(\w+)", made))
        assert tags <= {"table", "thead", "tbody", "tr", "th", "td", "p", "br"}, (text, made)
        shown = re.sub(r"<br\s*/?>", "\n", made[made.rindex("<p>") + 3 : made.rindex("</p>")])
        assert html.unescape(shown) == text.strip().replace("\t", " "), made
    table = answer_table({MARKDOWN: Evaluation("x", 1.0, 1, [MARKDOWN], [MARKDOWN], [1.0], [MARKDOWN])})
    scores = score_table({MARKDOWN: Evaluation("x", 1.0, 1, [MARKDOWN], [MARKDOWN], [1.0], [MARKDOWN])})
    settings = SFTArgs(out=MARKDOWN)._repr_markdown_()
    for made in map(page, (table, scores, settings)):
        assert not re.search(r"<(a|img|strong|em|h1|ul)\b", made), made


def calls(name: str):
    "(module, call) of every call of a function or method of this name in the package"
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == name:
                yield path.name, node


def test_every_way_out_has_its_gate():
    "No print but in `core.say` or one line, no HTML by an f-string, no class that may run code without its flag"
    for module, call in calls("print"):
        gated = isinstance(call.args[0], ast.Constant) or ast.unparse(call.args[0]).startswith("one_line(")
        assert gated, (module, call.lineno)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr) or not any(isinstance(v, ast.FormattedValue) for v in node.values):
                continue
            fixed = "".join(v.value for v in node.values if isinstance(v, ast.Constant))
            fixed = re.sub(r"\(\?P<\w+>", "", fixed)  # a named group of a pattern
            assert not re.search(r"</?[a-z]+[ >]", fixed.replace("<br>", "")), (path.name, node.lineno, fixed)
    for name in ("from_pretrained", "from_config"):
        for module, call in calls(name):
            owner = ast.unparse(call.func.value)
            safe = owner in ("GenerationConfig", "PeftConfig", "PeftModel") or module == "base.py" and owner == "kind"
            said = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert safe or said.get("trust_remote_code") == "False", (module, call.lineno)


BLOWN_UP = {
    "{% set n = messages|length + 8 %}{{ n**n**n }}": "powers",
    "{% for m in messages %}{% generation %}{{ (loop.index + 9)**(10**9) }}{% endgeneration %}{% endfor %}": "powers",
    "{{ 'x'.center(30000000) }}{% for m in messages %}{{ m.content }}{% endfor %}": "far more text",
    "{{ 'x' * 30000000 }}": "far more text",
    "{{ '%030000000d' % 1 }}": "far more text",
}


@pytest.mark.parametrize("template", BLOWN_UP, ids=range(len(BLOWN_UP)))
def test_a_template_that_blows_up_is_refused(template):
    tokenizer = AutoTokenizer.from_pretrained(small_base())
    tokenizer.chat_template = template
    with pytest.raises(TinyTrainerError, match=BLOWN_UP[template]):
        encode_chat(tokenizer, [dict(role="user", content="a"), dict(role="assistant", content="b")])


@pytest.mark.parametrize("ending", [".gz", *(pytest.param(e, marks=pytest.mark.slow) for e in (".bz2", ".xz", ".zst"))])
def test_a_packed_bomb_is_refused_before_it_fills_the_memory(ending, tmp_path):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(ending)
    part = b" " * 2**24
    if pack is None:
        with pyarrow.CompressedOutputStream(tmp_path / "all.zst", "zstd") as out:
            for _ in range(70):
                out.write(part)
        data = (tmp_path / "all.zst").read_bytes()
    else:
        data = pack(part) * 70
    (tmp_path / f"a.jsonl{ending}").write_bytes(data)
    with pytest.raises(TinyTrainerError, match="holds over 1 GiB in .* MiB"):
        load_examples(tmp_path / f"a.jsonl{ending}")


PATTERNS = ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "feedforward_modules"]
PATTERNS += ["rank_pattern", "alpha_pattern", "lambda_pattern", "n_frequency_pattern", "block_size_pattern"]


@pytest.mark.parametrize("where", PATTERNS)
def test_an_adapters_pattern_of_names_ends(runs, where, tmp_path):
    shutil.copytree(Path(runs["sft"]) / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    said, pattern = json.loads(file.read_text()), "(([a-z0-9_.])+)+!"
    shapes = dict(modules_to_save=[pattern], layers_pattern=[pattern])
    shape = {pattern: 4} if where.endswith("_pattern") else pattern
    some = {} if where == "target_modules" else dict(layers_to_transform=[0])  # PEFT takes the two only apart
    file.write_text(json.dumps(said | some | {where: shapes.get(where, shape)}))
    start = time.process_time()
    with pytest.raises(TinyTrainerError, match="by a pattern that takes too long"):
        load_model(tmp_path / "adapter", verbose=False)
    assert time.process_time() - start < 30


def test_an_adapters_pattern_of_another_kind(runs, tmp_path):
    shutil.copytree(Path(runs["sft"]) / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    for where, value in dict(rank_pattern=5, alpha_pattern=[1], exclude_modules=3).items():
        file.write_text(json.dumps(said | {where: value}))
        with contextlib.suppress(TinyTrainerError):  # PEFT may not mind
            load_model(tmp_path / "adapter", verbose=False)
    file.write_text(json.dumps(said | dict(target_modules="(")))
    with pytest.raises(TinyTrainerError, match="by a pattern that cannot be read"):
        load_model(tmp_path / "adapter", verbose=False)
    names = "|".join(sorted(said["target_modules"]))
    file.write_text(json.dumps(said | dict(target_modules=f"({names})")))  # unsloth writes such ones
    load_model(tmp_path / "adapter", verbose=False)
