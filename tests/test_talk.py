"""A run that was asked ends as one that was left alone; what is said is text; what is closed is given back."""

import io
import random
import shutil
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from live import adapter, figures, until
from small import small_base

from tinytrainer_nb.all import (
    GRPOArgs,
    PPOArgs,
    PretrainArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    data_file,
    grpo,
    load_examples,
    load_model,
    new_model,
    ppo,
    pretrain,
    sft,
)
from tinytrainer_nb.core import write_json
from tinytrainer_nb.hardware import give_back
from tinytrainer_nb.model.arguments import LoraArgs, TinyLoraArgs
from tinytrainer_nb.model.base import LoadRecord
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.load import with_adapter
from tinytrainer_nb.model.lora import add_lora, stack_adapter
from tinytrainer_nb.model.tinylora import add_tinylora
from tinytrainer_nb.panels.conversation import (
    Conversation,
    Voice,
    chat_panel,
    held_still,
)
from tinytrainer_nb.recipes.restore import as_handed_over, at_checkpoint
from tinytrainer_nb.recipes.start import begin
from tinytrainer_nb.views import chat as chat_room
from tinytrainer_nb.views.terminal import Watch

QUIET = dict(eval_steps=0, sample_steps=0)
QUESTION = "Ben has 12 pens and buys 30 more. How many pens does Ben have now?"


def base():
    return load_model(small_base(), "none", verbose=False)


def vowels(prompt, completion, **row):
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))


@pytest.fixture(scope="module")
def lessons():
    return load_examples(data_file("sft.jsonl")).select(range(60))


@pytest.fixture
def recipes(lessons):
    "Live runs: a dozen steps of fine-tuning whose dropout draws from PyTorch's numbers, four rounds of GRPO"

    def start(recipe, out, **more):
        model, tokenizer = base()
        if recipe == "sft":
            return sft(
                add_lora(model, LoraArgs(r=4, dropout=0.1)),
                tokenizer,
                lessons,
                SFTArgs(**dict(max_steps=12, batch_size=8, save_steps=4, out=str(out)) | QUIET | more),
                live=True,
            )
        args = GRPOArgs(
            **dict(max_steps=4, batch_size=4, num_generations=3, max_new_tokens=24, save_steps=2, out=str(out))
            | QUIET
            | more
        )
        return grpo(add_lora(model, LoraArgs(r=4)), tokenizer, data_file("rl.jsonl"), vowels, args, live=True)

    return start


def everything(model):
    "What an answer must leave as it is"
    layers = [m for m in model.modules() if hasattr(m, "_active_adapter")]
    weights = {name: p.detach().clone() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    return (
        weights,
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [(m._active_adapter, m._disable_adapters, "forward" in m.__dict__) for m in layers],
        torch.get_rng_state(),
        random.getstate(),
        str(np.random.get_state()),
        model.config._attn_implementation,
    )


def same(a, b):
    return (
        a[0].keys() == b[0].keys()
        and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
        and a[1:4] == b[1:4]
        and torch.equal(a[4], b[4])
        and a[5:] == b[5:]
    )


@pytest.mark.parametrize("recipe", ["sft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_run_that_was_asked_ends_as_one_that_was_left_alone(recipe, recipes, tmp_path):
    alone = recipes(recipe, tmp_path / "alone").wait()
    run = recipes(recipe, tmp_path / "asked")
    panel = chat_panel(run)
    panel.longest.value = 24
    until(lambda: run.step >= 1)
    said = panel.answer(QUESTION)  # while it goes on
    asked_at, total = panel.turns[0]["step"], run.info["settings"]["max_steps"]
    assert 1 <= asked_at < total and said["before"]
    until(lambda: run.status == "running" or run.step == total)
    run.pause()
    until(lambda: run.status == "paused")
    held = everything(run.model)
    panel.temperature.value = 1.0
    assert panel.answer("Who lives by the sea?")["after"] and run.status == "paused"
    assert same(held, everything(run.model))
    panel.longest.value = 800  # an answer that is stopped half-way
    panel.say.value = "Tell me a long story."
    panel.post()
    until(lambda: len(panel.turns) == 3 and panel.turns[2]["before"])
    panel.stop_button.click()
    panel.answering.join(60)
    assert same(held, everything(run.model)) and run.status == "paused"
    run.unpause()
    run.wait(120)
    assert run.status == "finished" and adapter(run) == adapter(alone) and figures(run) == figures(alone)
    panel.close()


def test_before_is_the_model_as_it_was_handed_over(tmp_path):
    """Of a trained adapter, of DoRA's lengths, of the upper one of a stack, of both forms of TinyLoRA; the present
    numbers come back, after an exception too"""

    def random_numbers(model, seed):
        with torch.no_grad():
            for p in trainable(model).values():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
        return model

    kinds = dict(
        lora=lambda m: add_lora(m, LoraArgs(r=4)),
        dora=lambda m: add_lora(m, LoraArgs(r=2, dora=True, layers="1")),
        tiny=lambda m: add_tinylora(m, TinyLoraArgs(n_tie=4)),
        peft=lambda m: add_tinylora(m, TinyLoraArgs(u=2, n_tie=16, parametrization="peft")),
        stack=lambda m: stack_adapter(random_numbers(add_lora(m, LoraArgs(r=4)), 3), LoraArgs(r=2)),
    )
    for name, add in kinds.items():
        model = random_numbers(add(base()[0]), 1)
        run = Run.create(tmp_path / name, "sft", SFTArgs(), may_change=[])
        begin(run, model, base()[1])
        first, loaded = (
            {n: p.clone() for n, p in trainable(model).items()},
            dict(with_adapter(base()[0], run.folder / "start").named_parameters()),
        )
        now = everything(random_numbers(model, 2))
        with pytest.raises(ValueError):
            with as_handed_over(run, model):
                assert all(torch.equal(p, first[n]) for n, p in trainable(model).items()), name
                assert all(torch.equal(p, loaded[n]) for n, p in model.named_parameters()), name
                raise ValueError
        assert same(now, everything(model)), name


def test_who_paused_stays_paused_and_nobody_goes_on_meanwhile(recipes, tmp_path):
    # With a checkpoint due, the trainer takes requests after the answer
    run = recipes("sft", tmp_path / "run", max_steps=40, save_steps=0)
    until(lambda: run.step >= 1)
    with held_still(run):
        step, weights = run.step, {n: p.clone() for n, p in trainable(run.model).items()}
        run.unpause()
        until(lambda: not run.asked("unpause"))
        time.sleep(3)  # somebody presses Continue
        with pytest.raises(TinyTrainerError, match="stopped before"):  # a second panel does not get in, and can give up
            give_up = threading.Event()
            give_up.set()
            with held_still(run, give_up):
                pass
        assert run.step == step and all(torch.equal(p, weights[n]) for n, p in trainable(run.model).items())
    until(lambda: run.step > step)
    run.pause()
    until(lambda: run.status == "paused")
    with held_still(run):
        run.stop()
        until(lambda: not run.asked("stop"))
        time.sleep(1)
        assert not run.worker.done.is_set()  # it ends after the answer
    run.wait(60)
    assert run.status == "stopped"
    with held_still(run):
        assert not run.still.acquire(blocking=False)
    assert not run.still.locked()


def test_runs_of_other_processes_answer_from_their_folder(lessons, tmp_path):
    "The result, else the newest checkpoint; a newer one is taken without loading the base again; none is told"
    model, tokenizer = base()
    run = ppo(
        add_lora(model, LoraArgs(r=4)),
        tokenizer,
        data_file("rl.jsonl"),
        vowels,
        PPOArgs(
            max_steps=2,
            batch_size=3,
            num_generations=2,
            max_new_tokens=8,
            save_steps=1,
            value_adapter=True,
            out=str(tmp_path / "ppo"),
            **QUIET,
        ),
    )
    result, other = trainable(run.model), Run.open(run.folder)
    voice = Voice(other)
    with voice.still():
        assert (
            voice.step == 2
            and voice.model is not run.model
            and all(torch.equal(p, result[n]) for n, p in trainable(voice.model).items())
        )
    at_end, _ = at_checkpoint(other, other.last_checkpoint()[0])
    assert trainable(at_end).keys() == result.keys() and all(
        torch.equal(p, result[n]) for n, p in trainable(at_end).items()
    )
    # As if it had died
    write_json(run.folder / "run.json", run.info | dict(status="running", process=dict(pid=1, started=0.0)))
    newest, later = run.folder / "checkpoints/step-000002", tmp_path / "later"
    newest.rename(later)
    with voice.still():
        first = voice.model
        assert voice.step == 1 and any(not torch.equal(p, result[n]) for n, p in trainable(first).items())
        with as_handed_over(other, first):
            assert not any(p.any() for n, p in trainable(first).items() if "lora_B" in n)
    later.rename(newest)
    with voice.still():
        assert (
            voice.step == 2
            and voice.model is first
            and all(torch.equal(p, result[n]) for n, p in trainable(first).items())
        )
    shutil.rmtree(run.folder / "checkpoints")
    panel = chat_panel(other)
    assert "nobody" in panel.head.value
    with pytest.raises(TinyTrainerError, match="nothing of this run is saved"):
        panel.answer("Hello?")
    shutil.rmtree(run.folder)
    with pytest.raises(TinyTrainerError, match="no run is here"):
        panel.answer("Hello?")
    assert not panel.turns and not panel.send_button.disabled


def test_pretraining_has_no_before(tmp_path):
    model, (_, tokenizer) = new_model("tiny", seed=0), base()
    run = pretrain(
        model,
        tokenizer,
        ["Once upon a time there was a town by the sea. " * 60],
        PretrainArgs(max_steps=2, batch_size=2, max_length=64, save_steps=1, out=str(tmp_path / "run"), **QUIET),
    )
    panel = chat_panel(run)
    panel.longest.value = 8
    assert panel.answer("Once").keys() == {"after"}
    whole = {n: p.clone() for n, p in model.named_parameters()}
    model.config.max_position_embeddings = 0  # a model that states no length
    assert "of the context" not in panel._room() and "tokens" in panel._room()
    made = run.info | dict(status="failed")
    write_json(run.folder / "run.json", made | dict(load=made["load"] | dict(seed=None)))
    with pytest.raises(TinyTrainerError, match="run.json: load.seed is null"):
        at_checkpoint(run, run.last_checkpoint()[0])
    write_json(run.folder / "run.json", made | dict(load=made["load"] | dict(device="cuda")))  # made on a GPU
    again, _ = at_checkpoint(run, run.last_checkpoint()[0])
    dtype = LoadRecord.of(run.info).torch_dtype  # what is in memory is what was written at the end
    assert all(torch.equal(p.to(dtype), whole[n].to(dtype)) for n, p in again.named_parameters())
    assert all(torch.equal(p, p.to(dtype).float()) for p in whole.values())
    panel.close()


class Slow:
    "In the place of `stream`: says a piece whenever it is let"

    def __init__(self, *pieces):
        self.pieces, self.more = pieces, threading.Semaphore(0)

    def __call__(self, *args, **kwargs):
        for piece in self.pieces:
            self.more.acquire()
            yield piece


@pytest.fixture
def alone():
    "A panel over a model without a run"
    panel = Conversation(Voice(None, *base()))
    yield panel
    panel.close()


def test_one_answer_at_a_time_and_each_trouble_a_line(alone, monkeypatch):
    slow = Slow("One. ", "Two. ", "Three.")
    monkeypatch.setattr(chat_room, "stream", slow)
    alone.post()
    assert "first" in alone.said.value and alone.answering is None  # nothing was typed
    alone.say.value = "Count!"
    alone.post()
    slow.more.release()
    until(lambda: "One." in alone.shown.value)
    with pytest.raises(TinyTrainerError, match="an answer is coming already"):
        alone.answer("And I?")
    alone.clear()
    assert "press Stop answer first" in alone.trouble.value and alone.turns
    alone.stop()
    slow.more.release()
    alone.answering.join(10)
    assert (
        alone.turns[0]["answer"] == "One. Two. " == alone.chats["answer"].messages[-1]["content"]
        and alone.say.value == ""
    )
    alone.temperature.value, alone.say.value = -1.0, "Again!"
    alone.post()
    alone.answering.join(10)
    assert "temperature" in alone.trouble.value and len(alone.turns) == 1 and alone.say.value == "Again!"
    alone.clear()
    assert not alone.turns and not alone.chats and "One" not in alone.shown.value


def test_a_question_that_is_too_long_leaves_the_conversation_as_it_was(alone):
    alone.longest.value = 8
    alone.answer("Hello?")
    before, told = list(alone.chats["answer"].messages), alone.said.value
    with pytest.raises(TinyTrainerError, match="context"):
        alone.answer("pen " * 2000)
    assert alone.chats["answer"].messages == before and len(alone.turns) == 1 and "1,024" in told
    for _ in range(4):
        alone.answer("One pen and " * 80)
    assert alone.chats["answer"].forgotten and "no longer sees" in alone.said.value


def test_what_is_said_is_text(alone, monkeypatch):
    nasty = ["<script>alert(1)</script><img src=x onerror=alert(2)>", "\x1b[2J\x1b[31m", "\u202etxt.exe\u200b"]
    monkeypatch.setattr(chat_room, "stream", lambda *args, **kwargs: (piece for piece in nasty))
    alone.answer("</td><script>alert(3)</script>")
    for html in (alone.shown.value, alone.twin()):
        assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html
        assert (
            not any(c in html for c in "\x1b\u202e\u200b")
            and "\\x1b" in html
            and "\\u202e" in html
            and "\\u200b" in html
        )


def test_a_panel_without_a_run_waits(recipes, tmp_path):
    class Launcher:
        run = None

    panel = chat_panel(launcher := Launcher(), every=0.05)
    assert "waits" in panel.head.value
    panel.say.value = "Hello?"
    panel.post()
    panel.answering.join(10)
    assert "press Start first" in panel.trouble.value
    launcher.run = recipes("sft", tmp_path / "run", max_steps=1).wait()
    until(lambda: "step 1" in panel.head.value)
    panel.longest.value = 4
    assert panel.answer("Hello?").keys() == {"before", "after"}
    panel.close()
    launcher.run.close()


def test_closing_while_an_answer_comes(alone, monkeypatch):
    slow = Slow(*"abc")
    monkeypatch.setattr(chat_room, "stream", slow)
    alone.say.value = "Count!"
    alone.post()
    slow.more.release(2)
    alone.close()
    assert not alone.answering.is_alive() and alone.voice.model is None


@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_a_models_memory_is_given_back(end, recipes, tmp_path):
    def fails(prompt, completion, **row):
        raise ValueError("no")

    if end == "failed":
        model, tokenizer = base()
        run = grpo(
            add_lora(model, LoraArgs(r=4)),
            tokenizer,
            data_file("rl.jsonl"),
            fails,
            GRPOArgs(
                max_steps=2, batch_size=3, num_generations=2, max_new_tokens=8, out=str(tmp_path / "run"), **QUIET
            ),
            live=True,
        )
        with pytest.raises(Exception):
            run.wait(60)
        del model, tokenizer
    else:
        run = recipes("sft", tmp_path / "run", max_steps=3) if end == "finished" else recipes("grpo", tmp_path / "run")
        if end == "stopped":
            until(lambda: run.step >= 1)
            run.stop()
        run.wait(120)
    assert run.status == end
    panel = chat_panel(run)
    panel.longest.value = 8
    panel.answer("Hello?")
    kept = [weakref.ref(p) for p in run.model.parameters()]
    panel.close()
    run.close()
    give_back()
    assert kept and not any(r() is not None for r in kept)


def test_an_answer_that_fails_ends_the_chat_aloud(monkeypatch):
    "A closed input ends it in silence; a memory that is full does not"

    def fails(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")
        yield

    def closed(prompt):
        raise RuntimeError("input(): lost sys.stdin")

    said, model = [], base()
    write = lambda text, **kwargs: said.append(text)
    chat_room.chat_loop(*model, read=closed, write=write)
    assert said[1:] == [""]
    monkeypatch.setattr(chat_room, "stream", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        chat_room.chat_loop(*model, read=lambda prompt: "hello", write=write)


class Vanishing(type(Path())):
    "A folder in which something is renamed while it is searched"

    def rglob(self, pattern):
        yield from super().rglob(pattern)
        raise FileNotFoundError(self / "checkpoints/.step-000001.partial")


def test_a_folder_that_changes_ends_no_watching(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", "sft", SFTArgs(), may_change=[])
    stream = io.StringIO()
    watch = Watch([], stream)
    watch.folders = [Vanishing(tmp_path)]
    with watch:
        run.set_status("running", 0)
        for step in range(1, 4):
            run.log("metrics", step, loss=2.0)
        assert "step 3" in watch.line() and list(watch.runs) == [run.folder / "run.json"]
        monkeypatch.setattr(Run, "events", property(lambda self: (_ for _ in ()).throw(OSError("input/output error"))))
        assert watch.news() == [] and "step" not in watch.line()
        time.sleep(0.7)
        assert watch._thread.is_alive()
