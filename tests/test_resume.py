"""A run that died or was stopped ends with the same adapter, bit for bit, as one that was never interrupted."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small import small_base

import tinytrainer_nb.recipes.train  # noqa: F401 (gives runs their resume)
from tinytrainer_nb.runs.journal import Journal
from tinytrainer_nb.runs.lock import _alive, _me


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def dies_after_two_steps(monkeypatch, train) -> None:
    from tinytrainer_nb.recipes.trainer import RunTrainer

    step = RunTrainer.training_step

    def die(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise OSError("no power")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(RunTrainer, "training_step", die)
        with pytest.raises(OSError):
            train()


def test_death_between_the_last_step_and_the_end(tmp_path, monkeypatch):
    "What is left to do is to save the result, not to train one step more"
    from tinytrainer_nb.all import (
        LoraArgs,
        Run,
        SFTArgs,
        add_lora,
        data_file,
        load_examples,
        load_model,
        sft,
    )
    from tinytrainer_nb.recipes.trainer import RunTrainer

    def train(out):
        model, tokenizer = load_model(small_base(), quantization="none", verbose=False)
        args = SFTArgs(
            max_steps=4, batch_size=3, save_steps=4, eval_steps=0, sample_steps=0, schedule="constant", out=str(out)
        )
        return sft(
            add_lora(model, LoraArgs(r=4)), tokenizer, load_examples(data_file("sft.jsonl")).select(range(20)), args
        )

    train(tmp_path / "whole")

    def die(self):
        raise OSError("no space left")

    with monkeypatch.context() as m:
        m.setattr(RunTrainer, "save_result", die)
        with pytest.raises(OSError):
            train(tmp_path / "broken")
    torn = [tmp_path / "broken" / ".run.json.1.partial", tmp_path / "broken" / "checkpoints" / ".step-000002.1.partial"]
    torn[0].write_text("{")
    torn[1].mkdir()  # what a kill in the middle of writing a file or a checkpoint leaves
    run = Run.open(tmp_path / "broken").resume()
    assert run.status == "finished" and run.summary["steps"] == 4
    assert not any(path.exists() for path in torn)
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "whole")


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    "Otherwise the corrected call would be told to resume it"
    from tinytrainer_nb.all import (
        LoraArgs,
        SFTArgs,
        TinyTrainerError,
        add_lora,
        data_file,
        load_model,
        sft,
    )

    model, tokenizer = load_model(small_base(), quantization="none", verbose=False)
    model = add_lora(model, LoraArgs(r=4))
    with pytest.raises(TinyTrainerError, match="no row is left"):
        sft(model, tokenizer, data_file("sft.jsonl"), SFTArgs(max_length=8, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no zombies")
def test_a_process_that_nobody_buried_is_dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    who = _me() | dict(pid=child.pid, started=psutil.Process(child.pid).create_time())
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not _alive(who) and _alive(_me())
    child.wait()


def test_data_in_memory_and_a_reward_function(tmp_path):
    "The data are kept in the run; the function is not, and has to be given again"
    from tinytrainer_nb.all import (
        LoraArgs,
        PPOArgs,
        Run,
        SFTArgs,
        TinyTrainerError,
        add_lora,
        load_model,
        ppo,
        sft,
    )

    def length(prompt, completion, **row):
        return len(completion) / row["wanted"]

    rows = [dict(prompt=f"How much is {i} + 1?", completion=str(i + 1), wanted=50) for i in range(12)]

    def policy():
        model, tokenizer = load_model(small_base(), quantization="none", verbose=False)
        return add_lora(model, LoraArgs(r=4)), tokenizer

    def train(recipe, out, live=False):
        common = dict(batch_size=3, save_steps=0, eval_steps=0, sample_steps=0, out=str(tmp_path / out))
        if recipe == "sft":
            return sft(*policy(), rows, SFTArgs(max_steps=30, **common), live=live)
        return ppo(
            *policy(),
            rows,
            length,
            PPOArgs(max_steps=6, num_generations=2, max_new_tokens=8, minibatches=2, **common),
            live=live,
        )

    for recipe in ("sft", "ppo"):
        train(recipe, recipe)
        run = train(recipe, f"{recipe}-stopped", live=True)
        while not run.step:
            time.sleep(0.01)
        run.stop()
        run.wait()
        assert run.status == "stopped"
        again = Run.open(run.folder)
        if recipe == "ppo":
            with pytest.raises(TinyTrainerError, match="its reward was function length, which is not kept"):
                again.resume()
        again.resume(**dict(reward=length) if recipe == "ppo" else {})
        assert again.status == "finished" and adapter(again.folder) == adapter(tmp_path / recipe)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_weights_can_be_read_like_any_file(tmp_path):
    import torch
    from safetensors.torch import save_file

    from tinytrainer_nb.core import whole_folder

    with whole_folder(tmp_path / "adapter") as folder:
        save_file(dict(w=torch.ones(2)), folder / "w.safetensors")
        (folder / "plain.json").write_text("{}")
    assert len({p.stat().st_mode for p in (tmp_path / "adapter").iterdir()}) == 1


def test_two_that_begin_at_once_get_a_folder_each(tmp_path, capsys):
    from tinytrainer_nb.all import Run, SFTArgs

    with Run.prepare(tmp_path / "run", "none", SFTArgs(), may_change=[]) as first:
        (first.folder / "mine").write_text("1")
        hidden = tmp_path / ".run.999999999-1.partial"
        hidden.mkdir()  # of a process that died
        other = tmp_path / ".run.999999999.gone.partial"
        other.mkdir()  # not of a preparation
        with Run.prepare(tmp_path / "run", "none", SFTArgs(), may_change=[], other=2) as second:
            pass
    assert (first.folder / "mine").read_text() == "1" and {first.folder.name, second.folder.name} == {"run", "run-2"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "run", "run-2"]
    assert "run is taken (an unfinished run: `tinytrainer resume" in capsys.readouterr().err


def test_the_form_of_a_question_is_kept(tmp_path, monkeypatch):
    """A chat template that was changed after loading: the resumed run reads its rows in it, and whoever loads the run
    asks in it"""
    from tinytrainer_nb.all import (
        LoraArgs,
        Run,
        SFTArgs,
        add_lora,
        data_file,
        load_examples,
        load_model,
        sft,
    )

    form = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] "
        "}}\nAnswer:{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )

    def train(out):
        model, tokenizer = load_model(small_base(), quantization="none", verbose=False)
        tokenizer.chat_template = form
        return sft(
            add_lora(model, LoraArgs(r=4)),
            tokenizer,
            load_examples(data_file("sft.jsonl")).select(range(20)),
            SFTArgs(max_steps=3, batch_size=3, save_steps=2, eval_steps=0, sample_steps=0, out=str(out)),
        )

    train(tmp_path / "whole")
    dies_after_two_steps(monkeypatch, lambda: train(tmp_path / "broken"))
    Run.open(tmp_path / "broken").resume()
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "whole")
    assert load_model(tmp_path / "broken", verbose=False)[1].chat_template == form


def test_figures_are_those_of_the_events(tmp_path):
    """However a journal has grown between two questions, and whatever a resume has taken back, a column is what a
    pass over the events finds"""
    chance, journal = random.Random(0), Journal(tmp_path / "events.jsonl")
    for turn in range(60):
        for _ in range(chance.randrange(4)):
            step = chance.randrange(1, 9) if chance.random() < 0.1 else turn
            kind = chance.choice(["metrics", "evaluation", "status"])
            values = (
                dict(value="running")
                if kind == "status"
                else {name: chance.choice([1.5, 2, None, "text", True, [3]]) for name in chance.sample("abc", 2)}
            )
            journal.append(kind, step, **values)
        for kind in ("metrics", "evaluation") if chance.random() < 0.7 else ():
            found = {}
            for e in journal.events():
                for name, value in e.items():
                    if e["kind"] == kind and name not in ("time", "step") and type(value) in (int, float):
                        found.setdefault(name, []).append((e["step"], value))
            assert set(journal.names(kind)) == set(found)
            for name in "abc":
                assert list(zip(*journal.column(kind, name))) == found.get(name, [])


def test_pretraining_goes_on_in_32_bits_from_a_model_in_16(tmp_path, monkeypatch):
    "A model may be handed over as it was loaded; small steps would be lost in 16 bits"
    import torch

    from tinytrainer_nb.all import PretrainArgs, Run, load_model, pretrain

    def train(out):
        model, tokenizer = load_model(small_base(), quantization="none", dtype="bf16", verbose=False)
        run = pretrain(
            model,
            tokenizer,
            ["Tom has three apples and gives one to Ann. " * 300],
            PretrainArgs(
                max_steps=4,
                batch_size=2,
                max_length=64,
                save_steps=2,
                eval_steps=0,
                sample_steps=0,
                warmup_steps=0,
                out=str(out),
            ),
        )
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return run

    whole = train(tmp_path / "whole")
    dies_after_two_steps(monkeypatch, lambda: train(tmp_path / "broken"))
    run = Run.open(tmp_path / "broken").resume()
    assert run.history("loss")[1] == whole.history("loss")[1]
    assert (run.folder / "model/model.safetensors").read_bytes() == (
        whole.folder / "model/model.safetensors"
    ).read_bytes()
