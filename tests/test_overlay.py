"""Overlay: what differs is named and what does not is not; curves are those of the journals, told apart without
colour; names are text."""

import json
import random
import threading
import time

import numpy as np
import pytest
from live import until
from matplotlib.lines import Line2D

from tinytrainer_nb.core import TinyTrainerError, write_json
from tinytrainer_nb.panels.compare import (
    ABSENT,
    MovingOverlay,
    OverlayPanel,
    common_axes,
    common_titles,
    compare_panel,
    difference_html,
    final_figures,
    final_html,
    find_runs,
    overlay_figure,
    run_names,
    settings_difference,
    telling,
)
from tinytrainer_nb.recipes.arguments import DPOArgs, GRPOArgs, PPOArgs, SFTArgs
from tinytrainer_nb.runs.run import Run
from tinytrainer_nb.runs.verdict import result_evaluation
from tinytrainer_nb.views.plots import alt_text, smooth, wanted_panels
from tinytrainer_nb.views.terminal import summary_line

LOAD = dict(
    base="tiny",
    sha256="a" * 64,
    quantization="nf4",
    dtype="bf16",
    adapter=dict(r=8, alpha=32.0, target_modules=["q", "v"]),
)
DATA = dict(name="x/sft.jsonl", files={"x/sft.jsonl": "b" * 64}, rows=4000)


def make(folder, args=None, steps=20, recipe="sft", status="finished", seed=0, tokens=100, **info) -> Run:
    r = random.Random(seed)
    run = Run.create(folder, recipe, args or SFTArgs(), may_change=[], **dict(load=LOAD, data=DATA) | info)
    run.set_status("running", 0)
    for step in range(1, steps + 1):
        figures = (
            dict(loss=r.random())
            if recipe in ("sft", "pretrain")
            else dict(loss=r.random(), accuracy=0.5, chosen_reward=1.0, rejected_reward=0.0)
            if recipe == "dpo"
            else dict(loss=0.1, reward=r.random(), kl=r.random(), completion_length=30.0)
        )
        run.log("metrics", step, **figures, learning_rate=1e-3, tokens=tokens * step, seconds=0.5, tokens_per_s=200.0)
    if status != "running":
        run.set_status(status, steps)
    return run


def test_all_that_differs_and_nothing_else(tmp_path):
    base = dict(load=LOAD, data=DATA)
    changes = {
        "learning_rate": dict(args=SFTArgs(learning_rate=0.5)),
        "seed": dict(args=SFTArgs(seed=3)),
        "base": dict(load=LOAD | dict(sha256="c" * 64)),
        "quantization": dict(load=LOAD | dict(quantization="none")),
        "dtype": dict(load=LOAD | dict(dtype="fp32")),
        "adapter r": dict(load=LOAD | dict(adapter=LOAD["adapter"] | dict(r=4))),
        "adapter target_modules": dict(load=LOAD | dict(adapter=LOAD["adapter"] | dict(target_modules=["q"]))),
        "data": dict(data=DATA | dict(files={"x/sft.jsonl": "d" * 64})),
    }
    first = make(tmp_path / "first", steps=1)
    assert settings_difference([first, make(tmp_path / "same", SFTArgs(out="elsewhere"), steps=1)]) == {}
    for name, change in changes.items():
        assert list(
            settings_difference([first, make(tmp_path / name.replace(" ", "_"), steps=1, **base | change)])
        ) == [name]
    other = make(tmp_path / "machine", steps=1)
    write_json(
        other.folder / "run.json",
        other.info
        | dict(
            hardware=other.info["hardware"] | dict(cpu="a slower one"),
            versions=other.info["versions"] | dict(torch="1.0"),
        ),
    )
    assert list(settings_difference([first, other])) == ["cpu", "version of torch"]


def test_a_setting_that_one_run_does_not_have(tmp_path):
    runs = [
        make(tmp_path / "a", steps=1),
        make(
            tmp_path / "b",
            PPOArgs(),
            steps=1,
            recipe="ppo",
            reward=dict(kind="built_in", spec="exact_answer", names=["exact_answer"]),
        ),
    ]
    found = settings_difference(runs)
    assert (
        found["recipe"] == ["sft", "ppo"]
        and found["kl_coef"] == [ABSENT, 0.01]
        and found["train_on_all"] == [False, ABSENT]
        and found["reward"] == [ABSENT, "exact_answer"]
    )
    assert "num_generations" in difference_html(runs) and list(found)[0] == "recipe"


def test_small_differences_are_seen(tmp_path):
    runs = [make(tmp_path / str(i), SFTArgs(learning_rate=rate), steps=1) for i, rate in enumerate((2e-4, 2.00001e-4))]
    assert "0.000200001" in difference_html(runs) and telling(runs) == [
        "learning_rate=0.0002",
        "learning_rate=0.000200001",
    ]


def test_what_tells_runs_apart(tmp_path):
    grid = [
        make(tmp_path / f"{rate}-{batch}", SFTArgs(learning_rate=rate, batch_size=batch), steps=1)
        for rate in (1e-3, 2e-3)
        for batch in (8, 16)
    ]
    assert len(set(telling(grid))) == 4 and all("learning_rate=" in t and "batch_size=" in t for t in telling(grid))
    assert telling(grid[:2]) == ["batch_size=8", "batch_size=16"] and telling(grid[:1]) == [""]
    assert telling([grid[0], make(tmp_path / "again", SFTArgs(learning_rate=1e-3, batch_size=8), steps=1)]) == ["", ""]


def test_runs_are_found_and_named(tmp_path):
    for name in ("x/sft", "y/sft", "z"):
        make(tmp_path / name, steps=1)
    (tmp_path / ".hidden" / "run").mkdir(parents=True)
    write_json(tmp_path / ".hidden" / "run" / "run.json", {})
    assert run_names(find_runs(tmp_path)) == ["x/sft", "y/sft", "z"] and run_names(find_runs([tmp_path / "x/sft"])) == [
        "sft"
    ]
    assert run_names(find_runs([Run(tmp_path / "z"), str(tmp_path / "x/sft")])) == ["z", "x/sft"]
    with pytest.raises(TinyTrainerError, match="none below it"):
        find_runs(tmp_path / ".hidden" / "nothing")
    with pytest.raises(TinyTrainerError, match="no run is here"):
        find_runs([tmp_path / "nowhere"])


def lines(axes) -> list[Line2D]:
    return [line for line in axes.lines if line.get_linestyle() != "None"]


def test_the_curves_are_the_journals(tmp_path):
    runs = [make(tmp_path / "a", steps=40, seed=1), make(tmp_path / "b", steps=25, seed=2, tokens=300)]
    for step in (10, 20):
        runs[0].log("evaluation", step, loss=0.3 + step)
    for x, unit in (("step", (1, 1)), ("tokens", (100, 300)), ("seconds", (0.5, 0.5))):
        axes = overlay_figure(runs, x).axes[0]
        for line, run, by in zip(lines(axes), runs, unit, strict=True):
            steps, values = run.history("loss")
            assert np.allclose(line.get_xdata(), by * np.asarray(steps)) and np.allclose(
                line.get_ydata(), smooth(values, max(1, len(steps) // 20))
            )
        marks, none = [line for line in axes.lines if line.get_linestyle() == "None"]
        assert not len(none.get_xdata())
        assert np.allclose(marks.get_xydata(), [[10 * unit[0], 10.3], [20 * unit[0], 20.3]])
    with pytest.raises(TinyTrainerError, match="step, tokens, seconds"):
        overlay_figure(runs, "parsecs")


def test_the_picture_that_moves_is_the_one_made_anew(tmp_path):
    runs, moving = (
        [make(tmp_path / "a", steps=40, seed=1), make(tmp_path / "b", steps=10, seed=2, status="running")],
        MovingOverlay(),
    )
    first = moving.html(runs, "tokens", [0, 1])
    kept = moving.figure
    for step in range(11, 60):
        runs[1].log("metrics", step, loss=9 / step, learning_rate=1e-3, tokens=100 * step, seconds=0.5)
    runs[1].log("evaluation", 50, loss=0.1)
    assert moving.html(runs, "tokens", [0, 1]) != first and moving.figure is kept
    for old, new in zip(moving.figure.axes, overlay_figure(runs, "tokens").axes, strict=True):
        assert (
            all(np.array_equal(a.get_xydata(), b.get_xydata()) for a, b in zip(old.lines, new.lines, strict=True))
            and old.get_xlim() == new.get_xlim()
            and old.get_ylim() == new.get_ylim()
        )
    moving.html(runs, "step", [0, 1])
    assert moving.figure is not kept


def test_runs_are_told_apart_without_colour(tmp_path):
    runs = [make(tmp_path / f"r{i}", SFTArgs(seed=i), steps=3) for i in range(12)]
    looks = [
        (str(line.get_linestyle()), line._unscaled_dash_pattern, line.get_color())
        for line in lines(overlay_figure(runs).axes[0])
    ]
    assert len(set(map(str, looks))) == 12 and len({str(dash) for _, dash, _ in looks[:6]}) == 6
    hidden = lines(overlay_figure(runs[3:4], looks=[3]).axes[0])[0]
    assert (str(hidden.get_linestyle()), hidden._unscaled_dash_pattern, hidden.get_color()) == looks[3], (
        "a run keeps its look when others are hidden"
    )


def test_what_recipes_have_in_common(tmp_path):
    sft, dpo, ppo, grpo = (
        make(tmp_path / r, a, steps=3, recipe=r)
        for r, a in (("sft", SFTArgs()), ("dpo", DPOArgs()), ("ppo", PPOArgs()), ("grpo", GRPOArgs()))
    )
    assert common_titles([ppo, grpo]) == ["reward", "KL", "length", "learning rate"]
    assert common_titles([sft, dpo]) == common_titles([sft, ppo]) == ["learning rate"], (
        "a loss a token is none a pair, nor that of a policy"
    )
    new = Run.create(tmp_path / "new", "sft", SFTArgs(), may_change=[])
    assert common_titles([sft, new]) == ["loss", "learning rate"] and common_axes([sft, new]) == [
        "step",
        "tokens",
        "seconds",
    ]
    assert common_titles([new]) == [] and len(overlay_figure([new]).png()) > 1000


def test_the_best_is_said_in_a_word(tmp_path):
    a, b = make(tmp_path / "a", steps=30), make(tmp_path / "b", steps=30)
    for step in range(31, 61):
        a.log("metrics", step, loss=0.5, learning_rate=1e-3)
        b.log("metrics", step, loss=0.4, learning_rate=1e-3)
    a.log("evaluation", 60, loss=0.6)
    b.log("evaluation", 60, loss=0.7)
    found = final_figures([a, b])
    assert found["loss, last tenth"] == ["0.5", "0.4 (best)"] and found["loss, held out"] == ["0.6 (best)", "0.7"]
    p, q = (make(tmp_path / n, PPOArgs(), steps=1, recipe="ppo", seed=s) for n, s in (("p", 1), ("q", 2)))
    p.log("metrics", 2, reward=0.2, kl=1.0, completion_length=3.0)
    q.log("metrics", 2, reward=0.9, kl=9.0, completion_length=9.0)
    found = final_figures([p, q])
    assert found["reward, last tenth"] == ["0.2", "0.9 (best)"] and found["KL, last tenth"] == ["1", "9"]
    assert final_figures([a, a])["loss, last tenth"] == ["0.5", "0.5"], "equals have no best"


def test_names_are_text(tmp_path):
    evil = "<img src=x onerror=alert(1)>$\\frac{$\x1b[2J\u202e"
    runs = [
        make(tmp_path / evil, SFTArgs(report_to="none"), steps=3),
        make(tmp_path / "_under", SFTArgs(seed=1), steps=3),
        make(tmp_path / "$a_$", SFTArgs(seed=2), steps=3, load=LOAD | dict(base="<script>x")),
    ]
    figure = overlay_figure(runs)
    figure.png()
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(said) == 3 and "_under" in said[1] and "$a_$" in said[2] and "\x1b" not in said[0]
    panel = compare_panel(runs)
    pages = [panel.twin(), difference_html(runs), final_html(runs)]
    assert all("&lt;img" in page for page in pages) and "&lt;script&gt;x" in pages[1]
    assert not any(bad in page for page in pages for bad in ("<img src=x", "<script", "\x1b", "\u202e"))
    assert not any(box.description_allow_html or "\u202e" in box.description for box in panel.boxes)
    panel.close()


def test_a_run_that_goes_on_is_followed(tmp_path):
    done, going = make(tmp_path / "done"), make(tmp_path / "going", steps=5, status="running")
    panel = OverlayPanel([done, going], every=0.02)
    first = panel.curves.value
    going.log("metrics", 6, loss=0.1, learning_rate=1e-3, tokens=600, seconds=0.5)
    until(lambda: "running, step 6" in panel.finals.value and panel.curves.value != first)
    going.set_status("finished", 6)
    panel.thread.join(10)
    assert not panel.thread.is_alive() and "finished, step 6" in panel.finals.value
    panel.close()


def test_a_panel_that_rests_long_shows_an_end_at_once(tmp_path):
    "On a slow machine the next look is far; the end of a run must not wait for it"

    class Dear(OverlayPanel):
        def look(self):
            end = time.thread_time() + 0.5
            while time.thread_time() < end:
                pass
            return super().look()

    done, going = make(tmp_path / "done"), make(tmp_path / "going", steps=5, status="running")
    panel = Dear([done, going], every=0.05)
    assert panel._rest > 20
    going.set_status("finished", 5)
    until(lambda: "finished, step 5" in panel.finals.value, "the end is shown", seconds=10)
    panel.close()
    panel.thread.join(5)
    assert not panel.thread.is_alive()


def test_nothing_new_draws_nothing(tmp_path):
    panel = OverlayPanel([make(tmp_path / "a"), make(tmp_path / "b")])
    assert panel.thread is None, "both have ended"
    drawn, panel._draw = [], lambda: drawn.append(1)
    for _ in range(20):
        panel.look()
    assert drawn == []
    panel.close()


def test_runs_can_be_hidden(tmp_path):
    panel = compare_panel([make(tmp_path / n, SFTArgs(seed=i), steps=5) for i, n in enumerate(("a", "b", "c"))])
    panel.boxes[0].value = False
    until(lambda: "curves of 2 runs" in panel.curves.value)
    panel.axis.value = "tokens"
    until(lambda: panel._drawn[1] == "tokens")
    for box in panel.boxes:
        box.value = False
    until(lambda: "tick one" in panel.differences.value and panel.curves.value == "")
    panel.boxes[1].value = True
    until(lambda: "curves of 1 run," in panel.curves.value)
    panel.close()
    until(lambda: not [t for t in threading.enumerate() if t.name == "tinytrainer-overlay"])


def test_a_long_history_is_drawn_quickly(tmp_path):
    run = Run.create(tmp_path / "long", "sft", SFTArgs(), may_change=[])
    with open(run.journal.path, "w", encoding="utf-8") as f:
        f.writelines(
            json.dumps(dict(time=1, step=i, kind="metrics", loss=i % 97, learning_rate=0.1, tokens=i, seconds=0.1))
            + "\n"
            for i in range(1, 20_001)
        )
    assert all(
        len(line.get_xdata()) <= 2002 for axes in overlay_figure([run, run], "tokens").axes for line in axes.lines
    )


NAN = float("nan")
ENDS = [  # keep_best, status, held-out losses, the one that is told
    (True, "finished", [0.5, 0.3, 0.4], "0.3 (step 2)"),
    (True, "finished", [0.5, 0.3, 0.4, NAN], "0.3 (step 2)"),  # NaN is never the best
    (True, "stopped", [0.5, 0.3, 0.4], "0.4 (step 3)"),  # the best weights are for a run that is finished
    (True, "failed", [0.5, 0.3, 0.4], "0.4 (step 3)"),
    (False, "finished", [0.5, 0.3, 0.4], "0.4 (step 3)"),
    (False, "finished", [0.5, NAN], "0.5 (step 1)"),
    (True, "finished", [NAN, NAN], ""),
]


@pytest.mark.parametrize("keep, status, losses, told", ENDS)
def test_the_held_out_figure_is_that_of_the_result(tmp_path, keep, status, losses, told):
    "In the line at a run's end and in a comparison alike"
    run = make(tmp_path / "run", SFTArgs(keep_best=keep), status=status)
    for step, loss in enumerate(losses, 1):
        run.log("evaluation", step, loss=loss)
    summary = dict(recipe="sft", status=status, steps=20, seconds=1.0, tokens_per_s=2.0, peak_memory_gb=1.0)
    write_json(run.folder / "summary.json", summary)
    line, compared = summary_line(run), final_figures([run]).get("loss, held out")
    assert (f"held-out loss {told}, " in line) if told else "held-out" not in line
    assert compared == ([told.partition(" ")[0]] if told else None)


def test_the_best_reward_is_the_highest(tmp_path):
    run = make(tmp_path / "run", GRPOArgs(keep_best=True, eval_steps=1), recipe="grpo")
    for step, reward in enumerate([0.1, 0.9, None, 0.5], 1):
        run.log("evaluation", step, reward=reward, **{"reward/length": 0.0})
    assert result_evaluation(run)["step"] == 2 and final_figures([run])["reward, held out"] == ["0.9"]


def test_pairs_with_some_figures_only_are_drawn(tmp_path):
    "A journal may hold the accuracy and no rewards, as one of another program does"
    run = Run.create(tmp_path / "run", "dpo", DPOArgs(), may_change=[])
    run.log("metrics", 1, accuracy=0.5)
    run.log("metrics", 2, accuracy=0.75)
    assert wanted_panels(run) == ["accuracy"] and alt_text(run) == "accuracy from 0.5 at step 1 to 0.75 at step 2"
    assert "accuracy from 0.5" in run._repr_html_() and overlay_figure([run]).png()


def test_a_comparison_smooths_as_a_single_figure_does(tmp_path):
    run = make(tmp_path / "run", steps=90)
    line = overlay_figure([run]).axes[0].lines[0]
    assert np.allclose(line.get_ydata(), smooth(run.history("loss")[1], 2))  # 90 // 20 is 4, of 1, 2, 5, 10, ...
