"""Rollouts: what a run writes down of them against its own figures, their order, hostile texts, journals that are
rewound, and how often a page is redrawn."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from small import small_base

import tinytrainer_nb.panels.rollouts as room
from tinytrainer_nb.core import data_file, visible
from tinytrainer_nb.data.formats import load_prompts
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.panels.rollouts import (
    columns_of,
    groups_of,
    ordered,
    rollout_panel,
    spread,
)
from tinytrainer_nb.recipes.arguments import GRPOArgs, PPOArgs
from tinytrainer_nb.recipes.grpo import group_advantages, grpo
from tinytrainer_nb.recipes.ppo import ppo
from tinytrainer_nb.runs.run import Run
from tinytrainer_nb.views.plots import sample_rows
from tinytrainer_nb.views.terminal import news

RECIPES = dict(ppo=(ppo, PPOArgs), grpo=(grpo, GRPOArgs))
PARTS = {"reference_overlap": 1.0, "repetition": 0.5}


def trained(out, recipe: str = "grpo", **settings) -> Run:
    "A few small rounds of a base of two layers"
    learn, args = RECIPES[recipe]
    model, tokenizer = load_model(small_base(), quantization="none", dtype="fp32", verbose=False)
    common = dict(
        max_steps=2,
        batch_size=2,
        num_generations=3,
        max_new_tokens=16,
        sample_steps=1,
        save_steps=0,
        warmup_steps=0,
        out=str(out),
    )
    return learn(
        add_lora(model, LoraArgs(r=4)),
        tokenizer,
        load_prompts(data_file("rl.jsonl"))[:8],
        ",".join(f"{k}={w}" for k, w in PARTS.items()),
        args(**common | settings),
    )


def events(run: Run, kind: str, step: int) -> list[dict]:
    return [e for e in run.events if e["kind"] == kind and e["step"] == step]


def by_hand(tmp_path, status: str = "running", **settings) -> Run:
    run = Run.create(tmp_path / "run", "grpo", GRPOArgs(num_generations=4, **settings), may_change=[])
    if status != "running":
        run.set_status(status, 0)
    return run


def write(run: Run, step: int, group: int = 0, index: int = 0, **more) -> None:
    "A sample as the rounds write it"
    run.log(
        "sample",
        step,
        **dict(
            prompt=f"question {group}",
            completion=f"answer {index} of step {step}",
            reward=index / 2,
            parts=dict(a=index / 2),
            advantage=index - 0.5,
            tokens=3,
            finished=True,
            group=group,
            index=index,
        )
        | more,
    )


def cells(page: str) -> list[list[list[str]]]:
    "The tables of a page, as texts: rows of cells, the head first"
    tables = re.findall(r"<table.*?</table>", page, re.S)
    return [
        [
            [unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S)]
            for line in re.findall(r"<tr>(.*?)</tr>", t, re.S)
        ]
        for t in tables
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_samples_agree_with_the_figures_of_their_round(tmp_path, recipe):
    "With two prompts a round everything is written down, so the round's means are those of the samples"
    run = trained(tmp_path / recipe, recipe)
    for step in 1, 2:
        samples, (figures,) = events(run, "sample", step), events(run, "metrics", step)
        assert [(e["group"], e["index"]) for e in samples] == [(g, i) for g in range(2) for i in range(3)]
        assert len({e["prompt"] for e in samples}) == 2 and len({e["prompt"] for e in samples[:3]}) == 1
        mean = lambda value: sum(map(value, samples)) / len(samples)
        assert mean(lambda e: e["reward"]) == pytest.approx(figures["reward"]) and mean(
            lambda e: e["tokens"]
        ) == pytest.approx(figures["completion_length"])
        assert 1 - mean(lambda e: e["finished"]) == pytest.approx(figures["unfinished"])
        for name, weight in PARTS.items():
            assert mean(lambda e: e["parts"][name]) == pytest.approx(figures[f"reward/{name}"], abs=1e-6)
        for e in samples:
            assert e["reward"] == pytest.approx(sum(w * e["parts"][name] for name, w in PARTS.items()), abs=1e-6)
        if recipe == "grpo":
            assert [e["advantage"] for e in samples] == pytest.approx(
                group_advantages([e["reward"] for e in samples], 3).tolist(), abs=1e-5
            )
        else:  # whitened over the round's tokens: their mean is 0
            assert mean(lambda e: e["advantage"] * e["tokens"]) == pytest.approx(0, abs=1e-4) and any(
                e["advantage"] for e in samples
            )


def test_two_groups_are_whole_and_two_more_have_their_first(tmp_path):
    run = trained(tmp_path / "wide", batch_size=6, num_generations=2, max_new_tokens=4, max_steps=2, sample_steps=2)
    assert [(e["step"], e["group"], e["index"]) for e in run.events if e["kind"] == "sample"] == [
        (2, 0, 0),
        (2, 0, 1),
        (2, 1, 0),
        (2, 1, 1),
        (2, 2, 0),
        (2, 3, 0),
    ]
    assert [e["group"] for e in sample_rows(run, 6)] == [3, 2, 1, 0]  # of each prompt one, as other views show them
    # In a terminal one line a step
    assert sum("->" in line and "step 2:" in line for line in news(run, run.events)) == 1
    assert [spread(g).startswith("1 of 2 completions") for g in groups_of(run)] == [False, False, True, True]


ROWS = [
    dict(index=i, **dict(zip(("reward", "reward/a", "advantage", "tokens", "ended", "completion"), row)))
    for i, row in enumerate(
        [
            (1.0, None, 0.5, 7, True, "b"),
            (None, 2.0, None, 7, False, "a"),
            (2.0, -1.0, 0.5, 3, None, "b"),
            (1.0, 2.0, -0.5, None, True, "c"),
            (-3.0, 2.0, 0.0, 12, False, "a"),
        ]
    )
]


@pytest.mark.parametrize(
    "column, up, down",
    [
        ("index", "01234", "43210"),
        ("reward", "40321", "20341"),
        ("reward/a", "21340", "13420"),
        ("advantage", "34021", "02431"),
        ("tokens", "20143", "40123"),
        ("ended", "14032", "03142"),
        ("completion", "14023", "30214"),
        ("gone", "01234", "01234"),
    ],
)
def test_order_of_each_column(column, up, down):
    "Written down by hand: None last both ways, ties as they were"
    found = ["".join(str(row["index"]) for row in ordered(ROWS, column, descending)) for descending in (False, True)]
    assert found == [up, down]


def test_the_panel_sorts_by_every_column(tmp_path):
    run = by_hand(tmp_path, "finished")
    for group in range(2):
        for row in ROWS:
            write(
                run,
                5,
                group,
                row["index"],
                completion=row["completion"],
                reward=row["reward"],
                parts=dict(a=row["reward/a"]),
                advantage=row["advantage"],
                tokens=row["tokens"],
                finished=row["ended"],
            )
    panel = rollout_panel(run)
    assert [value for _, value in panel.sort.options] == columns_of(groups_of(run)) and panel.thread is None
    for _, column in panel.sort.options:
        for descending in (True, False):
            panel.sort.value, panel.descending.value = column, descending
            tables = cells(panel.table.value)
            assert len(tables) == 2
            for head, *lines in tables:
                assert [h.replace("\n", "") for h in head if h.endswith((" ▼", " ▲"))] == [
                    {"index": "#"}.get(column, column) + (" ▼" if descending else " ▲")
                ]
                assert [line[0] for line in lines] == [str(row["index"]) for row in ordered(ROWS, column, descending)]
    panel.close()


@pytest.mark.parametrize(
    "advantages, of, said",
    [
        ((0.0, 0.0), 2, "No signal"),
        ((0.0, 0.0), 4, ""),
        ((0.5, -0.5), 2, "moves the policy"),
        ((0.5,), 4, "moves the policy"),
        ((None,), 4, ""),
        ((None, None), None, ""),
    ],
)
def test_a_signal_is_claimed_and_denied_only_where_it_is_known(advantages, of, said):
    text = spread(dict(of=of, rows=[dict(reward=0.5, advantage=a) for a in advantages]))
    assert said in text if said else "signal" not in text and "policy" not in text


NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></table><h1>out",
    "'\" onmouseover='alert(1)'",
    "&lt;b&gt;",
    "\x1b[2J\x1b[31mred",
    "user\u202etxt.exe",
    "zero\u200bwidth\u2066\ufeff",
    "w" * 5000,
    "\ud800 alone",
    "{color:red}</style><style>*{display:none}",
    "line\u2028one\r\ntwo\x00",
]
TAGS = {"style", "div", "b", "span", "table", "tr", "th", "td", "p", "br", "tbody"}


class Texts(HTMLParser):
    "The texts, tags and attributes of a page, as a browser would read them"

    def __init__(self, page):
        super().__init__()
        self.tags, self.names, self.text = set(), set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("nasty", NASTY)
def test_texts_from_outside_are_shown_and_not_obeyed(tmp_path, nasty):
    """In a prompt, a completion, the name of a part, an alarm; written past the journal, which would refuse half a
    surrogate"""
    run = by_hand(tmp_path, "finished")
    sample = dict(
        time=1,
        step=5,
        kind="sample",
        prompt=nasty,
        completion=nasty,
        reward=0.5,
        parts={nasty: 0.5},
        advantage=0.1,
        tokens=3,
        finished=True,
        group=0,
        index=0,
    )
    alarm = dict(time=1, step=5, kind="alarm", name=nasty, value=1.0, limit=0.5, message=nasty)
    with open(run.journal.path, "a") as f:
        f.write(json.dumps(sample) + "\n" + json.dumps(alarm) + "\n")
    panel = rollout_panel(run)
    ((door, line),) = [box.children for box in panel.alarms.children]
    panel.sort.value = f"reward/{nasty}"
    for page in (panel.table.value, panel.twin()):
        told = Texts(page)
        assert told.tags <= TAGS and told.names <= {"class", "style", "aria-label"}
        # Prompt, completion, head, which is broken into lines
        assert re.sub(r"\s", "", told.text).count(re.sub(r"\s", "", visible(nasty))) >= 3
        assert page.count("<style>") == page.count("</style>") == 1
    shown = [panel.table.value, panel.twin(), line.value, door.description, *(label for label, _ in panel.sort.options)]
    assert all(visible(text) == text for text in shown)  # nothing unseen is left
    assert visible(nasty) in Texts(line.value).text and visible(nasty).replace("_", " ") in door.description
    # What goes to the page can be sent
    json.dumps([panel.table.value, door.description, *panel.sort._options_labels], ensure_ascii=False).encode("utf-8")
    panel.close()


def test_a_rewound_journal_shows_what_counts(tmp_path):
    run = by_hand(tmp_path)
    for step in 5, 10, 15:
        write(run, step)
    run.log("alarm", 15, name="length", value=1.0, limit=0.5, message="long")
    panel = rollout_panel(run, every=1000)
    panel.step.value = 15
    assert "answer 0 of step 15" in panel.table.value and len(panel.alarms.children) == 1
    run.log("status", 5, value="running")  # a resume from the checkpoint of step 5
    panel.look()
    assert (
        panel.step.value == "newest"
        and [v for _, v in panel.step.options] == ["newest", 5]
        and not panel.alarms.children
    )
    assert "answer 0 of step 5<" in panel.table.value
    write(run, 10, completion="the other answer")
    panel.look()
    assert "the other answer" in panel.table.value and [v for _, v in panel.step.options] == ["newest", 5, 10]
    panel.close()


def test_only_what_is_new_is_drawn(tmp_path, monkeypatch):
    """500 steps of samples: a page that stays the same is not sent again, and a journal that has not grown is not
    even read"""
    run, grouped = by_hand(tmp_path), []
    monkeypatch.setattr(room, "groups_of", lambda *args: grouped.append(args) or groups_of(*args))
    for step in range(1, 501):
        for place in range(10):
            write(run, step, place // 4, place % 4)
    panel, sent = rollout_panel(run, every=1000), []
    for widget in (panel.table, panel.step, panel.sort):
        widget.observe(lambda change: sent.append(change.owner), ["value", "_options_labels"])
    grouped.clear()
    for _ in range(20):
        panel.look()
    assert not sent and not grouped
    for step in range(501, 521):
        run.log("metrics", step, reward=0.5)
        panel.look()
    assert not sent
    write(run, 521)
    panel.look()
    assert sent.count(panel.table) == 1 and "step 521" in panel.table.value and panel.step.value == "newest"
    panel.step.value = 7
    shown = panel.table.value
    sent.clear()
    for step in range(522, 532):
        write(run, step)
        panel.look()
    assert (
        panel.table.value == shown
        and panel.table not in sent
        and panel.sort not in sent
        and panel.step.value == 7
        and panel.step.options[-1] == ("step 531", 531)
    )
    panel.close()


def test_an_alarm_leads_to_its_nearest_samples(tmp_path):
    run = by_hand(tmp_path)
    run.log("alarm", 3, name="no_signal", value=1.0, limit=0.9, message="early")
    panel = rollout_panel(run, every=1000)
    assert len(panel.alarms.children[0].children) == 1 and "No samples yet" in panel.table.value  # nowhere to go
    for step in 5, 10, 15, 20:
        write(run, step)
    for at in 4, 18:
        run.log("alarm", at, name="reward_hacking", value=1.0, limit=0.5, message="again")
    panel.look()
    doors = [box.children[0] for box in panel.alarms.children]
    assert [door.description for door in doors] == ["no signal: step 5", "reward hacking: step 20"]
    doors[0].click()
    assert panel.step.value == 5 and "answer 0 of step 5<" in panel.table.value
    doors[1].click()
    assert panel.step.value == 20
    panel.close()
