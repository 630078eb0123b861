"What is said at the end of a run: planted faults get their name, healthy runs get none"

import json
import random

import pytest

from tinytrainer_nb.all import Run, TinyTrainerError, data_file, verdict
from tinytrainer_nb.recipes.arguments import PPOArgs, SFTArgs
from tinytrainer_nb.runs.verdict import Remark, Verdict
from tinytrainer_nb.views.terminal import last_lines


def made(tmp_path, metrics, evaluations=(), recipe="sft", **settings):
    "A run whose journal holds these figures"
    args = (PPOArgs if recipe == "ppo" else SFTArgs)(out=str(tmp_path / recipe), **settings)
    run = Run.create(tmp_path / recipe, recipe, args)
    for step, figures in enumerate(metrics, 1):
        run.log("metrics", step, **figures)
    for step, figures in evaluations:
        run.log("evaluation", step, **figures)
    return run


def names(run) -> list[str]:
    return [remark.name for remark in verdict(run).remarks]


FALLING = [dict(loss=4 * 0.97**step) for step in range(40)]
WITH_A_LOSS = {
    "healthy": (FALLING, [3.1, 2.6, 2.4, 2.39], []),
    "a bump that is mended": (FALLING, [3.1, 3.4, 3.3, 2.6], []),
    "one worse evaluation at the end": (FALLING, [3.1, 2.6, 2.4, 2.6], []),
    "noise of one per cent": (FALLING, [3.1, 2.4, 2.42, 2.41], []),
    "overfitted": (FALLING, [3.1, 2.4, 2.8, 3.9], ["overfitted"]),
    "learned by heart from the first evaluation on": (FALLING, [2.4, 2.6, 3.0], ["overfitted"]),
    "diverged": ([dict(loss=2 + 0.1 * step) for step in range(40)], [3.0, 5.0, 6.0], ["diverged"]),
    "nothing learned": ([dict(loss=2 + 0.01 * (step % 3)) for step in range(40)], [2.0, 2.0, 2.0], ["nothing_learned"]),
    "a loss that was not a number": ([dict(loss=None), *FALLING], [3.1, None, 2.6], []),
    "two steps": (FALLING[:2], [], []),
    "nothing": ([], [], []),
}


@pytest.mark.parametrize("case", WITH_A_LOSS)
def test_a_run_with_a_loss(case, tmp_path):
    metrics, heldout, expected = WITH_A_LOSS[case]
    run = made(tmp_path, metrics, [(10 * i, dict(loss=loss)) for i, loss in enumerate(heldout, 1)])
    assert names(run) == expected


def test_the_outcome_is_that_of_the_journal(tmp_path):
    run = made(tmp_path, FALLING, [(10, dict(loss=3.0)), (20, dict(loss=2.5)), (40, dict(loss=2.0))])
    assert run.verdict().outcome == "held-out loss fell: 3 at step 10, 2 at step 40, and it was still falling."
    alone = made(tmp_path / "b", FALLING)
    assert "nothing was held out" in alone.verdict().outcome


def test_a_run_that_ends_with_its_best_weights_is_judged_by_them(tmp_path):
    "An early end by held-out rows always has worse evaluations behind the best one: that is no fault"
    run = made(tmp_path, FALLING, [(10, dict(loss=3.1)), (20, dict(loss=2.4)), (40, dict(loss=3.9))], keep_best=True)
    run.set_status("finished", 40)
    assert not run.verdict().remarks
    assert run.verdict().outcome == "held-out loss fell: 3.1 at step 10, 2.4 at step 20."


def test_a_loss_of_zero_is_a_loss(tmp_path):
    assert verdict(made(tmp_path, FALLING, [(10, dict(loss=0.0)), (20, dict(loss=0.0))])).outcome.startswith(
        "held-out loss is the same"
    )


@pytest.mark.parametrize("steps", [6, 12, 40])
def test_noise_of_the_training_loss_is_no_finding(steps, tmp_path):
    "Of 200 runs that learn, with steps that differ by a tenth, few may be said to have diverged"
    rng, found = random.Random(0), 0
    for i in range(200):
        loss = [dict(loss=(2 - step / steps * 0.2) * rng.gauss(1, 0.1)) for step in range(steps)]
        found += "diverged" in names(made(tmp_path / str(i), loss))
    assert found <= 4


def rounds(seed, reward, kl=0.1, silent=0.1, n=30, noise=0.04):
    "Figures of rounds with noise; reward, kl and silent go from a first to a last value"
    rng = random.Random(seed)
    line = lambda ends, i: ends if isinstance(ends, (int, float)) else ends[0] + (ends[1] - ends[0]) * i / (n - 1)
    return [
        dict(reward=line(reward, i) + rng.gauss(0, noise), kl=line(kl, i), no_signal=line(silent, i)) for i in range(n)
    ]


WITH_A_REWARD = {
    "healthy": (dict(reward=(0.4, 0.8), kl=(0, 6)), []),
    "solved already, and left alone": (dict(reward=0.95, kl=(0, 0.4), silent=0.5), []),
    "wrecked": (dict(reward=(0.98, 0.6), kl=(0, 40), silent=0.4), ["wrecked"]),
    "wrecked without a signal": (dict(reward=(0.98, 0.6), kl=(0, 40), silent=0.9), ["no_signal", "wrecked"]),
    "drifted": (dict(reward=0.5, kl=(0, 9)), ["drifted"]),
    "no signal": (dict(reward=0.95, silent=0.9), ["no_signal"]),
    "never a reward": (dict(reward=0.0, silent=1.0, noise=0), ["no_reward"]),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", WITH_A_REWARD)
def test_a_run_with_a_reward(case, seed, tmp_path):
    figures, expected = WITH_A_REWARD[case]
    assert names(made(tmp_path, rounds(seed, **figures), recipe="ppo")) == expected


def test_noise_alone_is_no_finding(tmp_path):
    "Of 200 runs whose reward has the same mean in all rounds, few may be called worse"
    found = [names(made(tmp_path / str(seed), rounds(seed, 0.5), recipe="ppo")) for seed in range(200)]
    assert sum(bool(f) for f in found) <= 4


def test_the_base_that_comes_along_was_trained_well():
    said = verdict(data_file("tiny_run"))
    assert not said.remarks and said.outcome.startswith("held-out loss fell")


def test_it_is_said_in_terminal_and_notebook_once_the_run_has_ended(tmp_path):
    run = made(tmp_path, FALLING, [(10, dict(loss=3.1)), (20, dict(loss=3.4)), (40, dict(loss=3.9))])
    assert "learned by heart" not in run._repr_html_()
    summary = dict(recipe="sft", status="finished", steps=40, seconds=1.0, tokens_per_s=1.0, peak_memory_gb=1.0)
    (run.folder / "summary.json").write_text(json.dumps(summary))
    assert "learned by heart" in run._repr_html_()
    first, wrong = last_lines(run)
    assert first.startswith("sft finished") and wrong.startswith("  overfitted: the held-out loss was lowest")


def test_what_is_said_is_one_line_and_no_markup():
    said = Verdict("<b>\x1b[2J", [Remark("a", "<i>x\ny", "z")])
    assert "<i>" not in said._repr_html_() and "\x1b" not in str(said) and len(said.lines()) == 2


def test_no_run_no_verdict(tmp_path):
    with pytest.raises(TinyTrainerError, match="no run is here"):
        verdict(tmp_path)
