"""A run that is steered from its panel ends like one that nobody touched, and steering leaves nothing behind."""
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ipywidgets
import psutil
import pytest

from tinytrainer_nb.all import LoraArgs, Run, SFTArgs, add_lora, data_file, load_examples, load_model, sft
from tinytrainer_nb.panels import RunPanel, launch_panel, request_lines
from tinytrainer_nb.plots import LivePicture, run_html

from live import adapter, figures, until

NASTY = "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'>\x1b[31mred\x1b[0m\u202eecalper\u200bzero"


def train(out, live=False, examples=None, **changes):
    model, tokenizer = load_model("tiny", quantization="none", verbose=False)
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


def test_pause_and_continue_are_bit_for_bit(tmp_path, whole):
    run = train(tmp_path / "run", live=True)
    panel = RunPanel(run, every=0.05)
    panel.pause_button.click()
    until(lambda: run.status == "paused", "the pause")
    until(lambda: not panel.continue_button.disabled, "Continue can be pressed")
    assert 0 <= run.step < 12 and "pause: took effect" in panel.asked.value
    panel.continue_button.click()
    assert run.wait(120).status == "finished" and result(run) == whole
    panel.close()


def test_a_killed_kernel_is_found_again_and_goes_on(tmp_path, whole):
    "SIGKILL in mid-run; a panel of another process shows what was, and its Continue ends like the run that nobody touched"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_panels import train\ntrain({str(tmp_path / 'run')!r}, save_steps=3)"
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"IN_TEST": "1"})
    until(lambda: (tmp_path / "run" / "checkpoints" / "step-000003").exists(), "a checkpoint", 120)
    child.send_signal(signal.SIGKILL); child.wait()
    run = Run.open(tmp_path / "run")
    panel = run.panel()
    assert run.status == "interrupted" and "interrupted" in panel.head.value and "<img" in panel.curves.value
    panel.continue_button.click()
    until(lambda: run.status == "finished", "the resumed run ends", 120)
    run.wait(60)
    assert result(run) == whole
    panel.close()


def test_two_hundred_pauses_leave_nothing(tmp_path):
    alike = [dict(prompt="How much is 2 + 2?", completion="4")] * 50  # of other lengths PyTorch keeps code for each, which is memory, too
    run = train(tmp_path / "run", live=True, examples=alike, max_steps=500)
    panel = RunPanel(run, every=0.05)
    until(lambda: run.step >= 2, "it trains")
    def pause():
        panel.ask("pause"); until(lambda: run.status == "paused", "a pause")
        panel.ask("unpause"); until(lambda: run.status == "running", "it goes on")
    for _ in range(20): pause()
    gc.collect()
    threads, widgets, memory = threading.active_count(), len(ipywidgets.widgets.widget._instances), psutil.Process().memory_info().rss
    for _ in range(180): pause()
    gc.collect()
    assert threading.active_count() == threads and len(ipywidgets.widgets.widget._instances) == widgets
    assert psutil.Process().memory_info().rss - memory < 30e6
    run.stop(); run.wait(120)
    values = [e["value"] for e in run.events if e["kind"] == "status"]
    assert values == ["running"] + ["paused", "running"] * 200 + ["stopped"]
    assert not run.waiting() and not list((run.folder / "requests").iterdir())
    panel.close()
    until(lambda: not any(t.name.startswith("tinytrainer") for t in threading.enumerate()), "all threads end")


def test_two_thousand_learning_rates_leave_nothing(tmp_path):
    run = train(tmp_path / "run", live=True, max_steps=5000)
    panel = RunPanel(run, every=0.05)
    until(lambda: run.step >= 2, "it trains")
    threads = threading.active_count()
    for i in range(2000): panel.change("learning_rate", 1e-4 + 1e-7 * i)
    run.save()  # the last request: when it has been taken, so have all before it
    until(lambda: not run.waiting(), "all are taken", 120)
    assert threading.active_count() == threads
    run.stop(); run.wait(120)
    changes = [e for e in run.events if e["kind"] == "change"]
    assert [e["new"] for e in changes] == [1e-4 + 1e-7 * i for i in range(2000)]
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
    assert "&lt;script&gt;" in panel.samples.value and r"\u202e" in panel.samples.value and r"\x1b[31m" in panel.last.value
    panel.close()


def test_closing_a_panel_closes_what_is_in_it(tmp_path):
    run = train(tmp_path / "run", max_steps=1)
    before = len(ipywidgets.widgets.widget._instances)
    panel = RunPanel(run)
    for name in panel.rooms: panel.unfold(name)
    assert len(ipywidgets.widgets.widget._instances) > before
    panel.close()
    assert len(ipywidgets.widgets.widget._instances) == before


def test_a_long_history_is_one_small_picture(tmp_path):
    "20,000 steps: the lowest and the highest loss are in the picture, and the static twin stays below 5 MB"
    run = train(tmp_path / "run", max_steps=1)
    with open(run.journal.path, "a") as f:
        for step in range(2, 20_001): f.write(f'{{"time": {step}.0, "step": {step}, "kind": "metrics", "loss": {9.0 if step == 7777 else 1 + step % 7}, "learning_rate": 0.001}}\n')
    picture = LivePicture(run); picture.png()
    drawn = picture.figure.axes[0].lines[0].get_ydata()
    assert len(drawn) <= 2001 and max(drawn) == 9.0 and min(drawn[1:]) == 1.0
    assert len(run_html(run)) < 5e6


def test_the_form_is_locked_while_a_run_goes_on(tmp_path):
    launcher = launch_panel(lambda args: train(args.out, live=True, max_steps=args.max_steps), SFTArgs(max_steps=200, out=str(tmp_path / "run")))
    run = launcher.start()
    assert launcher.form.inputs["batch_size"].disabled and not launcher.form.inputs["learning_rate"].disabled
    launcher.form.inputs["learning_rate"].value = 5e-4  # a field that stays open asks the run
    until(lambda: any(e["kind"] == "change" and e["new"] == 5e-4 for e in run.events), "the change")
    run.stop(); run.wait(60)
    until(lambda: not launcher.form.inputs["batch_size"].disabled, "the form is free again")
    launcher.close()
