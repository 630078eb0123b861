"""A run that is steered from its panel ends like one that nobody touched, and steering leaves nothing behind."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import ipywidgets
import psutil
import pytest
from forked import Script
from live import adapter, figures, until
from small import small_base

from tinytrainer_nb.all import (
    LoraArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    add_lora,
    chat_panel,
    compare_panel,
    data_file,
    dial_panel,
    load_examples,
    load_model,
    rollout_panel,
    sft,
)
from tinytrainer_nb.core import read_json
from tinytrainer_nb.panels.run_panel import (
    RunPanel,
    follow,
    launch_panel,
    request_lines,
    run_memory,
    run_panel,
)
from tinytrainer_nb.recipes.rewards import find_reward
from tinytrainer_nb.recipes.trainer import RunTrainer
from tinytrainer_nb.settings import grouped
from tinytrainer_nb.views.plots import LivePicture, run_html

NASTY = "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'>\x1b[31mred\x1b[0m\u202eecalper\u200bzero"


def train(out, live=False, examples=None, **changes):
    model, tokenizer = load_model(small_base(), quantization="none", verbose=False)
    settings = dict(max_steps=12, batch_size=4, save_steps=0, eval_steps=0, sample_steps=0, out=str(out)) | changes
    examples = load_examples(data_file("sft.jsonl")).select(range(200)) if examples is None else examples
    return sft(add_lora(model, LoraArgs(r=4), seed=0), tokenizer, examples, SFTArgs(**settings), live=live)


def result(run: Run) -> tuple:
    "What has to be the same"
    return adapter(run), figures(run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    "The run that nobody touched"
    return result(train(tmp_path_factory.mktemp("whole") / "run"))


def test_pause_and_continue_are_bit_for_bit(tmp_path, whole, monkeypatch):
    pressed, usual = threading.Event(), RunTrainer.training_step

    def held(self, *args, **kwargs):
        if self.state.global_step == 3:
            assert pressed.wait(60)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", held)
    run = train(tmp_path / "run", live=True)
    panel = RunPanel(run, every=0.05)
    panel.pause_button.click()
    pressed.set()
    until(lambda: run.status == "paused", "the pause")
    until(lambda: not panel.continue_button.disabled, "Continue can be pressed")
    assert 0 <= run.step <= 4 and "pause: took effect" in panel.asked.value
    panel.continue_button.click()
    assert run.wait(120).status == "finished" and result(run) == whole
    panel.close()


def test_a_killed_kernel_is_found_again_and_goes_on(tmp_path, whole):
    """SIGKILL in mid-run; a panel of another process shows what was, and its Continue ends like the run that nobody
    touched"""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_panels import "
        f"train\ntrain({str(tmp_path / 'run')!r}, save_steps=3)"
    )
    child = Script(code, IN_TEST="1")
    until(lambda: (tmp_path / "run" / "checkpoints" / "step-000003").exists(), "a checkpoint", 120)
    child.kill()
    run = Run.open(tmp_path / "run")
    panel = run.panel()
    assert run.status == "interrupted" and "interrupted" in panel.head.value and "<img" in panel.curves.value
    panel.continue_button.click()
    until(lambda: run.status == "finished", "the resumed run ends", 120)
    run.wait(60)
    assert result(run) == whole
    panel.close()


@pytest.mark.parametrize("pauses", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_many_pauses_leave_nothing(tmp_path, pauses):
    alike = [
        dict(prompt="How much is 2 + 2?", completion="4")
    ] * 50  # of other lengths PyTorch keeps code for each, which is memory, too
    run = train(tmp_path / "run", live=True, examples=alike, max_steps=500, batch_size=1)
    panel = RunPanel(run, every=0.05)
    until(lambda: run.step >= 2, "it trains")

    def pause():
        panel.ask("pause")
        until(lambda: run.status == "paused", "a pause")
        panel.ask("unpause")
        until(lambda: run.status == "running", "it goes on")

    for _ in range(20):
        pause()
    gc.collect()
    threads, widgets, memory = (
        threading.active_count(),
        len(ipywidgets.widgets.widget._instances),
        psutil.Process().memory_info().rss,
    )
    for _ in range(pauses - 20):
        pause()
    gc.collect()
    assert threading.active_count() == threads and len(ipywidgets.widgets.widget._instances) == widgets
    assert psutil.Process().memory_info().rss - memory < 30e6
    run.stop()
    run.wait(120)
    values = [e["value"] for e in run.events if e["kind"] == "status"]
    assert values == ["running"] + ["paused", "running"] * pauses + ["stopped"]
    assert not run.waiting() and not list((run.folder / "requests").iterdir())
    panel.close()
    until(lambda: not any(t.name.startswith("tinytrainer") for t in threading.enumerate()), "all threads end")


@pytest.mark.parametrize("changed", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_learning_rates_leave_nothing(tmp_path, changed):
    run = train(tmp_path / "run", live=True, max_steps=5000)
    panel = RunPanel(run, every=0.05)
    until(lambda: run.step >= 2, "it trains")
    threads = threading.active_count()
    for i in range(changed):
        panel.change("learning_rate", 1e-4 + 1e-7 * i)
    run.save()  # the last request: when it has been taken, so have all before it
    until(lambda: not run.waiting(), "all are taken", 120)
    assert threading.active_count() == threads
    run.stop()
    run.wait(120)
    changes = [e for e in run.events if e["kind"] == "change"]
    assert [e["new"] for e in changes] == [1e-4 + 1e-7 * i for i in range(changed)]
    assert all(a["new"] == b["old"] for a, b in zip(changes, changes[1:]))
    assert all(e["asked"] <= e["time"] + 0.001 for e in changes)
    assert len(request_lines(run)) == 5
    panel.close()


def test_what_was_said_is_text(tmp_path):
    "Markup, terminal codes, characters that cannot be seen: shown by name, in the panel and in its static twin"
    run = train(tmp_path / "run", max_steps=1)
    run.journal.append("sample", 1, prompt=NASTY, completion=NASTY, reward=None)
    run.journal.append("error", 1, message=NASTY, type="ValueError")
    run.journal.append("alarm", 1, name="kl", message=NASTY)
    panel = RunPanel(run)
    for html in (run_html(run), panel.samples.value, panel.last.value, panel.twin()):
        assert "<script" not in html and "<img src=x" not in html and not set(html) & set("\x1b\u202e\u200b")
    assert (
        "&lt;script&gt;" in panel.samples.value and r"\u202e" in panel.samples.value and r"\x1b[31m" in panel.last.value
    )
    panel.close()


def test_closing_a_panel_closes_what_is_in_it(tmp_path):
    run = train(tmp_path / "run", max_steps=1)
    before = len(ipywidgets.widgets.widget._instances)
    panel = RunPanel(run)
    for name in panel.rooms:
        panel.unfold(name)
    assert len(ipywidgets.widgets.widget._instances) > before
    panel.close()
    assert len(ipywidgets.widgets.widget._instances) == before


def test_a_long_history_is_one_small_picture(tmp_path):
    "20,000 steps: the lowest and the highest loss are in the picture, and the static twin stays below 5 MB"
    run = train(tmp_path / "run", max_steps=1)
    with open(run.journal.path, "a") as f:
        for step in range(2, 20_001):
            loss = 9.0 if step == 7777 else 1 + step % 7
            event = dict(time=float(step), step=step, kind="metrics", loss=loss, learning_rate=0.001)
            f.write(json.dumps(event) + "\n")
    picture = LivePicture(run)
    picture.png()
    drawn = picture.figure.axes[0].lines[0].get_ydata()
    assert len(drawn) <= 2001 and max(drawn) == 9.0 and min(drawn[1:]) == 1.0
    assert len(run_html(run)) < 5e6


def test_a_panel_that_rests_long_shows_a_pause_at_once(tmp_path):
    """On a slow machine a look is dear and the next one far; a pause must not wait for it, nor must the rest end for
    nothing"""
    looks = []

    class Dear(RunPanel):
        def look(self):
            looks.append(time.monotonic())
            end = time.thread_time() + 0.5
            while time.thread_time() < end:
                pass
            return super().look()

    run = Run.create(tmp_path / "run", "sft", SFTArgs(max_steps=40), may_change=[])
    panel = Dear(run, every=0.05)
    run.log("metrics", 1, loss=2.0, learning_rate=1e-4)
    time.sleep(2)
    assert len(looks) == 1 and panel._rest > 20
    run.set_status("paused", 1)
    until(lambda: panel.pause_button.disabled, "the pause is shown", seconds=5)
    assert len(looks) == 2
    panel.close()
    panel.thread.join(5)
    assert not panel.thread.is_alive()


def test_the_form_is_locked_while_a_run_goes_on(tmp_path):
    launcher = launch_panel(
        lambda args: train(args.out, live=True, max_steps=args.max_steps),
        SFTArgs(max_steps=200, out=str(tmp_path / "run")),
    )
    run = launcher.start()
    assert launcher.form.inputs["batch_size"].disabled and not launcher.form.inputs["learning_rate"].disabled
    launcher.form.inputs["learning_rate"].value = 5e-4  # a field that stays open asks the run
    until(lambda: any(e["kind"] == "change" and e["new"] == 5e-4 for e in run.events), "the change")
    run.stop()
    run.wait(60)
    until(lambda: not launcher.form.inputs["batch_size"].disabled, "the form is free again")
    launcher.close()


def test_what_was_asked_in_a_pause_outlives_a_kill(tmp_path):
    "A learning rate changed in a pause is in a checkpoint before the pause ends"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_panels import "
        f"train\ntrain({str(tmp_path / 'run')!r}, max_steps=400)"
    )
    child = Script(code, IN_TEST="1")
    try:
        until(lambda: (tmp_path / "run" / "run.json").exists() and Run(tmp_path / "run").step >= 2, "it trains", 120)
        run = Run.open(tmp_path / "run")
        run.pause()
        until(lambda: run.status == "paused", "the pause")
        run.set(learning_rate=5e-4)
        until(lambda: run.last_checkpoint()[1] == run.step and not run.waiting(), "the checkpoint")
        assert run.status == "paused"
    finally:
        child.kill()
    assert (
        run.status == "interrupted"
        and read_json(run.last_checkpoint()[0] / "progress.json")["settings"]["learning_rate"] == 5e-4
    )
    step = run.step
    again = Run.open(run.folder).resume(live=True)
    until(lambda: again.step > step, "it goes on")
    again.stop()
    again.wait(60)
    assert next(e for e in again.events if e["kind"] == "metrics" and e["step"] == step + 1)["learning_rate"] < 5e-4


def test_a_checkpoint_that_is_due_is_there_in_the_pause(tmp_path):
    run = train(tmp_path / "run", live=True, max_steps=400, save_steps=1, keep_checkpoints=2)
    until(lambda: run.step >= 2, "it trains")
    run.pause()
    until(lambda: run.status == "paused", "the pause")
    until(lambda: run.last_checkpoint()[1] == run.step, "the checkpoint", 10)
    run.stop()
    run.wait(60)


def test_a_second_run_in_a_process_is_refused(tmp_path):
    first = train(tmp_path / "first", live=True, max_steps=400)
    for begin in (lambda: train(tmp_path / "second"), lambda: train(tmp_path / "second", live=True)):
        with pytest.raises(TinyTrainerError, match="being trained in this process"):
            begin()
    assert not (tmp_path / "second").exists()
    first.stop()
    first.wait(60)
    assert train(tmp_path / "second", max_steps=1).status == "finished"


def test_models_are_made_one_at_a_time():
    "Eight loads at one moment, of which some would find the switches of another: all give the same weights"
    made, errors = [], []

    def load():
        try:
            made.append(
                sum(
                    p.double().abs().sum().item()
                    for p in add_lora(
                        load_model(small_base(), quantization="none", verbose=False)[0], LoraArgs(r=4), seed=0
                    ).parameters()
                )
            )
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(made) == 8 and len(set(made)) == 1


def test_a_run_that_cannot_begin_does_not_seem_to_go_on(tmp_path, monkeypatch):
    from tinytrainer_nb.recipes.trainer import RunTrainer

    def no_memory(*_, **__):
        raise MemoryError("no memory for the trainer")

    monkeypatch.setattr(RunTrainer, "__init__", no_memory)
    with pytest.raises(MemoryError):
        train(tmp_path / "run", live=True)
    run = Run.open(tmp_path / "run")
    assert run.status == "failed" and [e["message"] for e in run.events if e["kind"] == "error"] == [
        "no memory for the trainer"
    ]


def test_a_refused_start_leaves_the_panel(tmp_path):
    def start(args):
        if args.seed == 13:
            raise TinyTrainerError("thirteen is not a seed")
        return train(args.out, live=True, max_steps=args.max_steps) if args.seed != 14 else None

    launcher = launch_panel(start, SFTArgs(max_steps=3, out=str(tmp_path / "run")))
    launcher.start().wait(60)
    panel = launcher.below.children[0]
    until(lambda: not launcher.start_button.disabled, "the end is seen")
    for seed, words in {13: "thirteen is not a seed", 14: "must give back the run"}.items():
        launcher.form.inputs["seed"].value = seed
        launcher.start_button.click()
        until(lambda: words in launcher.said.value, "the complaint")
        assert (
            launcher.below.children == (panel,)
            and not launcher.start_button.disabled
            and not launcher.form.inputs["max_steps"].disabled
        )
    launcher.close()
    with pytest.raises(TinyTrainerError, match="closed"):
        launcher.start()


def test_the_form_is_locked_while_a_run_is_being_started(tmp_path):
    free = threading.Event()

    def start(args):
        free.wait(60)
        return train(args.out, live=True, max_steps=1)

    launcher = launch_panel(start, SFTArgs(out=str(tmp_path / "run")))
    launcher.start_button.click()
    until(lambda: "starting" in launcher.said.value, "it starts")
    assert launcher.form.inputs["max_steps"].disabled and launcher.start_button.disabled
    with pytest.raises(TinyTrainerError, match="started already"):
        launcher.start()
    free.set()
    until(lambda: launcher.run is not None, "the run")
    launcher.run.wait(60)
    launcher.close()


def test_a_refused_field_is_found_and_says_what_the_run_still_uses(tmp_path):
    launcher = launch_panel(
        lambda args: train(args.out, live=True, max_steps=args.max_steps),
        SFTArgs(max_steps=400, out=str(tmp_path / "run")),
    )
    launcher.form.inputs["batch_size"].value = 0
    group = next(heading for heading, members in grouped(SFTArgs).items() if "batch_size" in [f.name for f in members])
    launcher.form.switch.value = next(heading for heading in grouped(SFTArgs) if heading != group)
    launcher.start_button.click()
    until(lambda: "batch_size" in launcher.said.value, "the complaint")
    assert launcher.form.switch.value == group, "the group of the wrong field is shown"
    launcher.form.inputs["batch_size"].value = 4
    run = launcher.start()
    panel = RunPanel(run)
    for form in (launcher.form, panel.form):
        form.inputs["learning_rate"].value = 5.0
        assert f"still uses {run.info['settings']['learning_rate']:g}" in form.errors["learning_rate"].value
    run.stop()
    run.wait(60)
    panel.close()
    launcher.close()


def test_what_others_change_is_shown(tmp_path):
    "The field follows a learning rate that another has set, in a panel of its own and in the form that started the run"
    launcher = launch_panel(
        lambda args: train(args.out, live=True, max_steps=args.max_steps),
        SFTArgs(max_steps=400, out=str(tmp_path / "run")),
    )
    run = launcher.start()
    panel = RunPanel(run, every=0.05)
    Run.open(run.folder).set(learning_rate=7e-4)
    until(
        lambda: panel.form.inputs["learning_rate"].value == launcher.form.inputs["learning_rate"].value == 7e-4,
        "the field",
    )
    assert [e["new"] for e in run.events if e["kind"] == "change"] == [7e-4], "what is shown is not asked for again"
    run.stop()
    run.wait(60)
    panel.close()
    launcher.close()


@pytest.mark.slow
def test_a_panel_sees_that_its_run_goes_on_elsewhere(tmp_path):
    run = train(tmp_path / "run", live=True, max_steps=60)
    panel = RunPanel(run, every=0.05)
    until(lambda: run.step >= 2, "it trains")
    run.stop()
    run.wait(60)
    until(lambda: "stopped" in panel.head.value, "the end")
    Run.open(run.folder).resume()
    until(lambda: "finished" in panel.head.value, "the end of the resumed run", 30)
    panel.close()


def test_a_folder_that_is_gone_is_told(tmp_path):
    run = train(tmp_path / "run", max_steps=1)
    panel = RunPanel(run)
    assert "/".join(run.folder.parts[-2:]) in panel.head.value
    shutil.rmtree(run.folder)
    panel.wake()
    assert "this run is gone" in panel.trouble.value
    panel.close()


def test_the_obvious_wrong_things_are_told_plainly(tmp_path):
    run = train(tmp_path / "run", max_steps=1)
    for wrong, words in {
        (lambda: chat_panel(3)): "is no run",
        (lambda: Run.open(None)): "is no run",
        (lambda: compare_panel([])): "there is no run to show",
        (lambda: launch_panel(run, SFTArgs())): "cannot start a run",
        (lambda: launch_panel(train, None)): "are no settings",
        (lambda: SFTArgs(out="")): "must be the folder",
        (lambda: find_reward(None)): "must be a function",
        run.pause: "is finished: nobody trains it, so the request 'pause' cannot be obeyed.$",
        (lambda: chat_panel(run).answer(" ")): "there is no question",
        (lambda: Run.open(tmp_path / "nowhere")): "no run is here",
    }.items():
        with pytest.raises(TinyTrainerError, match=words):
            wrong()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("[1]")
    with pytest.raises(TinyTrainerError, match="not of a run made here"):
        Run.open(tmp_path / "other").panel()
    for panel in (
        chat_panel(str(run.folder)),
        rollout_panel(run.folder),
        dial_panel(str(run.folder)),
        run_panel(str(run.folder)),
    ):
        panel.close()


def test_dials_of_an_adapter_that_has_none_cannot_be_pressed(tmp_path):
    panel = dial_panel(train(tmp_path / "run", max_steps=1))
    assert "does not train a TinyLoRA" in panel.head.value and all(
        b.disabled for b in (panel.reset_button, panel.zero_button, panel.line_button, panel.send_button)
    )
    panel.close()


@pytest.mark.slow
@pytest.mark.parametrize("end", [pytest.param("run.wait()", marks=pytest.mark.slow), "pass"])
def test_a_script_that_trains_live_ends_well(tmp_path, end):
    "Waited for or not: no abort at the process's end; the run that nobody waited for is stopped, not torn"
    max_steps = 4 if "wait" in end else 4000
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_panels import train, until\n"
        f"run = train({str(tmp_path / 'run')!r}, live=True, max_steps={max_steps})\n"
        f"until(lambda: run.step >= 2)\n{end}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"IN_TEST": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert Run.open(tmp_path / "run").status == ("finished" if "wait" in end else "stopped")


def test_follow_in_a_terminal_is_a_line(tmp_path, capfd):
    run = train(tmp_path / "run", live=True, max_steps=6)
    assert follow(run).status == "finished"
    said = capfd.readouterr()
    assert "IPython" not in said.out and "sft finished: 6 steps" in said.err


ODD = [
    dict(action="set", asked=1.5e9, changes=dict(learning_rate="1e-4")),
    dict(action="set", asked=1.5e9, changes=dict(learning_rate=[{}], **{"x" * 300: None})),
    dict(action="set", asked=1.5e9, changes={NASTY: NASTY}),
    dict(action="pause", asked=1.5e9, changes=["learning_rate"]),
    dict(action="save", asked=0, changes=5),
]


def test_an_odd_request_leaves_the_panel_looking(tmp_path, monkeypatch):
    "Whatever the files in `requests` hold, one line each; the panel looks on"
    run = Run.create(tmp_path / "run", "sft", SFTArgs(), may_change=["learning_rate"])
    run.set_status("running", 0)
    monkeypatch.setattr(Run, "waiting", lambda self: ODD)
    told = request_lines(run)
    assert len(told) == len(ODD) and all(len(text) < 200 for text in told)
    assert told[-1].endswith("set learning_rate=1e-4: waits for the end of this step".replace("set", "change"))
    panel = RunPanel(run, every=0.05)
    assert panel.thread.is_alive() and "learning_rate=1e-4" in panel.asked.value and "Error" not in panel.trouble.value
    run.set_status("finished", 0)
    panel.close()


def test_memory_is_that_of_the_process_that_trains(tmp_path):
    "A process of the same number on another host, or a later one here, is another one"
    run = Run.create(tmp_path / "run", "sft", SFTArgs(), may_change=[])
    me = run.info["process"]
    parent = psutil.Process(os.getppid())
    run.update_info(process=dict(pid=parent.pid, started=parent.create_time()))  # seen by its start alone
    assert run_memory(run, "running") == pytest.approx(parent.memory_info().rss / 2**30, rel=0.5)
    for who in (
        me | dict(pid=parent.pid, host="elsewhere", machine="0" * 16, boot="another"),
        me | dict(host="elsewhere", machine="0" * 16, boot="another"),
        dict(pid=parent.pid, started=parent.create_time() - 1000),
    ):
        run.update_info(process=who)
        assert run_memory(run, "running") is None
    run.update_info(process=me)
    assert run_memory(run, "running") > 0
