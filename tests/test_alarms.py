"""Alarms: each fires on a planted history and on nothing healthy, at the same step after a resume; the figures they
read against counts by hand."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest
from small import small_base

from tinytrainer_nb.recipes.alarms import (
    LIMITS,
    ROUNDS,
    Alarm,
    find_alarms,
    new_alarms,
    round_figures,
    rounds,
)
from tinytrainer_nb.recipes.arguments import SFTArgs
from tinytrainer_nb.recipes.rewards import find_reward
from tinytrainer_nb.runs.run import Run
from tinytrainer_nb.views.plots import ALARMS, PANELS, alarm_lines, run_figure, run_html
from tinytrainer_nb.views.terminal import news

ROOT = Path(__file__).resolve().parent.parent
MEASURED = json.loads((ROOT / "nbs" / "benchmarks" / "results" / "alarms.json").read_text(encoding="utf-8"))


def healthy(count: int = 60, seed: int = 0) -> dict[str, list[float]]:
    "A run that goes well: everything jumps, the reward and its witness rise, completions grow by half"
    r = random.Random(seed)
    share = lambda level: [min(1.0, max(0.0, level + r.gauss(0, 0.1))) for _ in range(count)]
    rise = [0.4 + 0.5 * i / count for i in range(count)]
    return {
        "reward": [x + r.gauss(0, 0.08) for x in rise],
        "reward/exact_answer": [x + r.gauss(0, 0.08) for x in rise],
        "kl": [5 * i / count + r.random() for i in range(count)],
        "completion_length": [50 + 25 * i / count + r.gauss(0, 5) for i in range(count)],
        "repetition": share(0.1),
        "identical": share(0.5),
        "no_signal": share(0.5),
        "unfinished": share(0.1),
    }


def told(history: dict, **kwargs) -> list[tuple[int, str]]:
    "Step and name of every alarm, asked after each round as a run does"
    steps = range(1, len(next(iter(history.values()))) + 1)
    return [
        (step, alarm.name)
        for step in steps
        for alarm in new_alarms({k: v[:step] for k, v in history.items()}, **kwargs)
    ]


PLANTED = {  # what is put in the place of the healthy figures from round 31 on
    "length": dict(completion_length=200.0),
    "collapse": dict(completion_length=5.0),
    "unfinished": dict(unfinished=0.8),
    "repetition": dict(repetition=0.6),
    "kl": dict(kl=60.0),
    "identical": dict(identical=1.0),
    "no_signal": dict(no_signal=1.0),
    "reward_hacking": {"reward": 2.0, "reward/exact_answer": 0.1},
}


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_rings_nothing(seed):
    assert told(healthy(seed=seed), watched=["exact_answer"]) == []


@pytest.mark.parametrize("name", PLANTED)
def test_each_alarm_rings_once_for_what_was_planted(name):
    history = healthy()
    history = {k: v[:30] + [PLANTED[name].get(k, x) for x in v[30:]] for k, v in history.items()}
    ((step, said),) = told(history, watched=["exact_answer"])
    assert said == name.replace("collapse", "length") and 31 <= step <= 30 + ROUNDS
    (alarm,) = find_alarms(history, watched=["exact_answer"])
    assert alarm.message.endswith(".") and "\n" not in alarm.message and len(alarm.message) > 60


def test_value_and_limit_of_an_alarm():
    # The last five
    assert find_alarms(dict(kl=[1.0, 10.0, 20.0, 30.0, 40.0, 50.0])) == [
        Alarm("kl", 30.0, 20.0, find_alarms(dict(kl=[30.0] * 5))[0].message)
    ]
    # At the limit; too few rounds to say
    assert find_alarms(dict(kl=[20.0] * 5)) == [] and find_alarms(dict(kl=[99.0] * (ROUNDS - 1))) == []
    (longer,) = find_alarms(dict(completion_length=[40.0] * 5 + [50.0] * 20 + [120.0] * 5))
    assert (longer.value, longer.limit) == (120, 40 * LIMITS["length"])
    (shorter,) = find_alarms(dict(completion_length=[40.0] * 5 + [10.0] * 5))
    assert (shorter.value, shorter.limit) == (10, 40 / LIMITS["length"])
    # The first rounds and the last ones must not overlap
    assert find_alarms(dict(completion_length=[40.0] * 5 + [1.0] * 4)) == []


def test_limits_are_given_by_name():
    assert [a.name for a in find_alarms(dict(kl=[5.0] * 5), LIMITS | dict(kl=4.0))] == ["kl"]
    assert set(LIMITS) == set(ALARMS) and set(ALARMS.values()) <= set(PANELS)  # each has its place in the figure


def test_the_limit_of_reward_hacking_is_four_standard_errors():
    """By hand: neighbours differ by 0.1, so a mean of five differs from another one by chance with a standard error
    of 0.1 / sqrt(5)"""
    zigzag = lambda level, count: [level + 0.05 * (-1) ** i for i in range(count)]
    jump = 4 * (0.1**2 / 5) ** 0.5

    def run(fall):  # 400 rounds of each, so that the one large step between them does not count
        return {"reward": zigzag(0, 400) + zigzag(1, 400), "reward/w": zigzag(1, 400) + zigzag(1 - fall, 400)}

    assert [a.name for a in find_alarms(run(jump * 1.1 + 0.02), watched=["w"])] == ["reward_hacking"] and find_alarms(
        run(jump * 0.9 - 0.02), watched=["w"]
    ) == []


def test_a_falling_reward_or_a_rising_witness_is_no_hacking():
    both = dict(
        healthy(),
        **{"reward": healthy()["reward"][::-1], "reward/exact_answer": healthy()["reward/exact_answer"][::-1]},
    )
    assert told(both, watched=["exact_answer"]) == [] == told(healthy(), watched=["exact_answer"])
    assert told({"reward": [0.0] * 20, "reward/w": [0.0] * 20}, watched=["w"]) == []  # nothing ever moves


@pytest.mark.parametrize("count", [30, 100])
def test_chance_seldom_looks_like_hacking(count):
    """The reward rises, its witness only jumps about: of 200 runs, asked after every round, at most four in a hundred
    ring"""

    def rings(seed):
        r = random.Random(seed)
        history = {
            "reward": [6 * i / count + r.gauss(0, 1) for i in range(count)],
            "reward/w": [r.gauss(0, 1) for _ in range(count)],
        }
        return any(
            find_alarms({k: v[:step] for k, v in history.items()}, watched=["w"])
            for step in range(2 * ROUNDS, count + 1)
        )

    assert sum(map(rings, range(200))) <= 8


def test_one_odd_round_rings_nothing():
    history = healthy()
    for name, value in dict(repetition=0.9, unfinished=1.0, kl=60.0, no_signal=1.0).items():
        history[name][40] = value
    assert told(history) == []


def test_a_figure_that_wavers_about_its_limit_rings_once():
    assert told(dict(kl=[1.0] * 10 + [21.0, 20.5, 19.0] * 20)) == [
        (next(s for s, _ in told(dict(kl=[1.0] * 10 + [21.0, 20.5, 19.0] * 20))), "kl")
    ]
    again = told(dict(kl=[1.0] * 10 + [50.0] * 10 + [1.0] * 20 + [50.0] * 10))
    assert [name for _, name in again] == ["kl", "kl"] and again[1][0] > 40  # one that was off for long is news again


def test_measured_runs():
    "PPO on the embedded base: for right answers; for the letter e without a price for distance; for what never happens"
    assert told(MEASURED["honest"], watched=["exact_answer"]) == []
    assert [name for _, name in told(MEASURED["cheated"], watched=["exact_answer"])] == ["kl", "reward_hacking"]
    assert told(MEASURED["mute"], watched=["exact_answer"]) == [(5, "no_signal")]


def log(run, steps, watched=("exact_answer",)):
    "What a trainer writes of the cheated run at these steps"
    names = MEASURED["cheated"]
    for step in steps:
        run.log("metrics", step, **{name: values[step - 1] for name, values in names.items()})
        for alarm in new_alarms(rounds(run.events), watched=list(watched)):
            run.log("alarm", step, **asdict(alarm))


@pytest.fixture
def cheated(tmp_path) -> Run:
    run = Run.create(tmp_path / "cheated", "sft", SFTArgs(), may_change=[])
    log(run, range(1, 29))
    return run


def alarms(run) -> list[dict]:
    return [{k: v for k, v in e.items() if k != "time"} for e in run.events if e["kind"] == "alarm"]


@pytest.mark.parametrize("died, checkpoint", [(13, 10), (13, 13), (14, 12), (20, 10), (28, 1)])
def test_a_resumed_run_raises_the_same_alarms_at_the_same_steps(cheated, tmp_path, died, checkpoint):
    run = Run.create(tmp_path / "killed", "sft", SFTArgs(), may_change=[])
    log(run, range(1, died + 1))
    run = Run.open(run.folder)  # another process
    run.set_status("running", checkpoint)
    log(run, range(checkpoint + 1, 29))
    assert alarms(run) == alarms(cheated) and len(alarms(run)) == 2


def test_a_history_is_not_changed_and_a_missing_figure_is_silent():
    history = healthy()
    before = json.dumps(history)
    new_alarms(history, watched=["exact_answer", "unknown"])
    assert json.dumps(history) == before
    events = [dict(kind="metrics", step=i, time=0, kl=None if i == 3 else 50.0) for i in range(1, 10)] + [
        dict(kind="sample", step=9)
    ]
    history = rounds(events)
    assert list(history) == ["kl"] and len(history["kl"]) == 9
    assert told(history) == [(8, "kl")]  # five whole rounds after the one that is missing


def test_alarms_are_told_in_figure_page_and_terminal(cheated):
    (kl, _), (hacking, _) = lines = list(alarm_lines(cheated).items())
    assert (kl, hacking) == ("kl", "reward_hacking") and [line.partition(":")[0] for _, line in lines] == [
        "kl, step 13",
        "reward hacking, step 18",
    ]
    figure = run_figure(cheated)
    marks = {axes.get_ylabel(): [t.get_text() for t in axes.texts] for axes in figure.axes}
    assert (
        marks[PANELS["KL"][1]] == ["1"]
        and marks[PANELS["reward"][1]] == ["2"]
        and not marks[PANELS["length"][1]]
        and not marks[PANELS["completions"][1]]
    )
    words = " ".join(figure.get_supxlabel().split())
    for (_, line), number in zip(lines, "12"):
        assert f"({number}) {line}" in words
    # The witness beside the reward
    assert "exact_answer" in [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    cheated.log("alarm", 28, name="kl", value=1.0, limit=0.5, message="<script>alert(1)</script>")
    page = run_html(cheated)
    assert page.count("<li>") == 2 and "kl, steps 13, 28:" in page and "<script>" not in page
    assert sum("alarm, " in line for line in news(cheated, cheated.events)) == 3


def test_a_run_without_alarms_looks_as_before(tmp_path):
    run = Run.create(tmp_path / "run", "sft", SFTArgs(), may_change=[])
    for step in range(1, 5):
        run.log("metrics", step, loss=1.0 / step, learning_rate=1e-3)
    figure = run_figure(run)
    assert (
        not figure.get_supxlabel()
        and len(figure.axes) == 2
        and not any(axes.texts for axes in figure.axes)
        and "alarms" not in run_html(run)
    )


def test_round_figures_by_hand():
    # Of the first completion's six 4-grams four differ, of the fifth's three one. A text of another group is no copy.
    ids = [
        [1, 2, 3, 4, 1, 2, 3, 4, 1],
        [1, 2, 3],
        [1, 2, 3],
        [5, 6, 7, 8],
        [9, 9, 9, 9, 9, 9],
        [1, 2, 3],
        [4],
        [],
    ]
    figures = round_figures(ids, [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5], [True] * 6 + [False] * 2, 4)
    assert figures == dict(
        repetition=pytest.approx((2 / 6 + 2 / 3) / 8), identical=2 / 8, no_signal=1 / 2, unfinished=2 / 8
    )


def test_with_one_completion_a_prompt_the_round_is_the_group():
    figures = round_figures([[1], [2], [1], [3]], [0.0, 0.0, 0.0, 1.0], [True] * 4, 1)
    assert (figures["identical"], figures["no_signal"]) == (1 / 2, 0.0)
    assert round_figures([[1], [2]], [0.5, 0.5], [True] * 2, 1)["no_signal"] == 1.0


def test_what_is_watched():
    assert find_reward("exact_answer").watched == find_reward("length=0.2,exact_answer").watched == ["flexible_answer"]
    assert (
        find_reward("length,exact_answer=0").watched == ["exact_answer", "flexible_answer"]
        and find_reward("length").watched == []
    )


@pytest.mark.slow
def test_a_planted_reward_rings_in_a_real_run(tmp_path):
    """PPO that is paid for the letter e and pays nothing for distance: the reward rises and the policy leaves its
    reference"""
    from tinytrainer_nb.all import (
        LoraArgs,
        PPOArgs,
        add_lora,
        data_file,
        load_model,
        load_prompts,
        ppo,
    )

    args = dict(
        batch_size=8,
        num_generations=4,
        max_new_tokens=24,
        learning_rate=5e-3,
        kl_coef=0.0,
        max_steps=16,
        minibatches=2,
        save_steps=0,
        sample_steps=0,
    )

    def letter_e(prompt, completion):
        return 10 * completion.count("e") / max(1, len(completion))

    model, tokenizer = load_model(small_base(), quantization="none", verbose=False)
    run = ppo(
        add_lora(model, LoraArgs(r=16)),
        tokenizer,
        load_prompts(data_file("rl.jsonl")),
        letter_e,
        PPOArgs(out=str(tmp_path / "e"), **args),
    )
    rung = [(e["step"], e["name"]) for e in run.events if e["kind"] == "alarm"]
    assert "kl" in [name for _, name in rung] and rung == told(rounds(run.events))
    assert run.history("reward")[1][-1] > 1.5 * run.history("reward")[1][0]


def test_a_missing_length_rings_nothing():
    lengths = [math.nan, *[20.0] * 30]
    assert told(dict(completion_length=lengths)) == [] and told(dict(completion_length=[*lengths[1:], math.nan])) == []
