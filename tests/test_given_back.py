"""What a run changed for the whole process is given back, whatever other cells do meanwhile; what a setting accepts
works."""

import json
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from small import ROWS, small_base
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from tinytrainer_nb import cli
from tinytrainer_nb.all import (
    GenerateArgs,
    LoraArgs,
    PretrainArgs,
    Run,
    SFTArgs,
    add_lora,
    generate,
    load_examples,
    load_model,
    pretrain,
    sft,
    stream,
)
from tinytrainer_nb.compute import path as path_module
from tinytrainer_nb.compute.lower_states import lower_states
from tinytrainer_nb.core import (
    TinyTrainerError,
    data_file,
    hidden_beside,
    local_path,
    quiet,
    write_whole,
)
from tinytrainer_nb.data.tokens import encode_chat, filling, pack_row
from tinytrainer_nb.model.export import exact_logits
from tinytrainer_nb.model.layers import evaluating
from tinytrainer_nb.notebooks import Parameter, anchor_paths, parameter_value
from tinytrainer_nb.panels.settings_form import settings_form
from tinytrainer_nb.recipes.trainer import mean_loss
from tinytrainer_nb.settings import fields, parse_value

FEW = dict(eval_steps=0, save_steps=0, sample_steps=0, batch_size=4)


def base():
    return load_model(small_base(), "none", "fp32", verbose=False)


def trained(out, dropout=0.3, live=False, **settings) -> Run:
    model, tokenizer = base()
    args = SFTArgs(out=str(out), **FEW | dict(max_steps=6) | settings)
    return sft(add_lora(model, LoraArgs(r=2, dropout=dropout)), tokenizer, ROWS, args, live=live)


def losses(run: Run) -> list[float]:
    return run.history("loss")[1]


def drawn_state() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_run_leaves_the_random_numbers_of_others_alone(tmp_path):
    before = drawn_state()
    trained(tmp_path / "first")
    assert drawn_state() == before


def test_whatever_loads_a_run_leaves_the_random_numbers_of_others_alone(tmp_path):
    "The run's model, a merged one, a resume here or in a thread"
    from tinytrainer_nb.all import save_merged
    from tinytrainer_nb.core import write_json

    run = trained(tmp_path / "run", save_steps=2)

    def resumed(live: bool) -> None:
        write_json(run.folder / "run.json", run.info | dict(status="interrupted"))
        Run.open(run.folder).resume(live=live).wait()

    doors = dict(
        run=lambda: load_model(run.folder, verbose=False),
        merged=lambda: save_merged(run, tmp_path / "merged"),
        resume=lambda: resumed(False),
        live=lambda: resumed(True),
    )
    for name, door in doors.items():
        before = drawn_state()
        door()
        assert drawn_state() == before, name


PAIRS = [dict(prompt=f"Say {n}.", chosen=str(n), rejected="no") for n in range(12)]


@pytest.mark.parametrize("recipe", ["sft", "dpo", "reward_model", "ppo", "grpo", "fails", "live"])
def test_a_model_that_was_trained_still_has_its_cache(recipe, tmp_path):
    "transformers.Trainer switches it off, and a saved config would say so"
    from tinytrainer_nb import all as library

    model, tokenizer = base()
    model = add_lora(model, LoraArgs(r=2))
    rounds = dict(num_generations=2, max_new_tokens=4)
    few = FEW | dict(max_steps=1, batch_size=2, out=str(tmp_path / "run"))
    before = model.config.use_cache
    if recipe in ("ppo", "grpo"):
        args = (library.PPOArgs if recipe == "ppo" else library.GRPOArgs)(**few, **rounds)
        prompts = library.load_prompts(data_file("rl.jsonl"))[:8]
        getattr(library, recipe)(model, tokenizer, prompts, lambda prompt, completion: float(len(completion)), args)
    elif recipe in ("dpo", "reward_model"):
        args = (library.DPOArgs if recipe == "dpo" else library.RewardModelArgs)(**few)
        getattr(library, recipe)(model, tokenizer, PAIRS, args)
    elif recipe == "fails":
        with pytest.MonkeyPatch.context() as m, pytest.raises(ValueError):
            m.setattr("tinytrainer_nb.recipes.trainer.RunTrainer.training_step", lambda *a, **k: int("no number"))
            sft(model, tokenizer, ROWS, SFTArgs(**few))
    else:
        sft(model, tokenizer, ROWS, SFTArgs(**few), live=recipe == "live").wait()
    assert before is True and model.config.use_cache is True
    with torch.no_grad():
        assert model.eval()(input_ids=torch.tensor([[5, 6, 7]])).past_key_values is not None
    model.get_base_model().config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("use_cache", True) is True


def test_other_cells_do_not_move_a_live_run_with_dropout_nor_it_theirs(tmp_path):
    alone, without = trained(tmp_path / "alone"), trained(tmp_path / "without", dropout=0.0)
    run = trained(tmp_path / "beside", live=True)
    mine = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    while not run.worker.done.wait(0.001):
        assert torch.equal(torch.rand(5), torch.rand(5, generator=mine)), "the run drew from the cell's numbers"
        random.random()
    run.wait()
    assert losses(run) == losses(alone) != losses(without)


def test_a_run_with_dropout_goes_on_exactly(tmp_path):
    whole = trained(tmp_path / "whole", save_steps=2)
    stopped = trained(tmp_path / "stopped", save_steps=2, live=True)
    stopped.stop()
    stopped.wait()
    torch.rand(3)
    again = Run.open(stopped.folder).resume()
    assert losses(again) == losses(whole)


def test_between_two_pieces_of_a_stream_the_model_is_as_it_was():
    model, tokenizer = base()
    model = add_lora(model, LoraArgs(r=2)).train()
    asked = [dict(role="user", content="How many legs have 3 hens?")]
    args = GenerateArgs(max_new_tokens=12)
    changed = lambda: [m for m in model.modules() if "forward" in m.__dict__]
    pieces = stream(model, tokenizer, asked, args)
    said = next(pieces)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and not changed() and model.training
    assert torch.ones(2, requires_grad=True).sum().requires_grad
    said += "".join(pieces)
    assert said == generate(model, tokenizer, [asked], args, quiet=True).completions[0]


def test_a_stream_sees_weights_that_were_trained_meanwhile():
    model, tokenizer = base()
    model = add_lora(model, LoraArgs(r=2))
    pieces = stream(model, tokenizer, "Once", GenerateArgs(max_new_tokens=30))
    first = next(pieces)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=1.0)
    rest = "".join(pieces)
    model2 = base()[0]
    unchanged = generate(model2, tokenizer, ["Once"], GenerateArgs(max_new_tokens=30), quiet=True).completions[0]
    assert unchanged.startswith(first) and first + rest != unchanged


def test_warnings_and_levels_after_threads_that_overlap():
    filters, level = list(warnings.filters), hf_logging.get_verbosity()
    first, second = threading.Event(), threading.Event()

    def inside(mine, other):
        with quiet():
            mine.set()
            other.wait(10)

    threads = [threading.Thread(target=inside, args=pair) for pair in ((first, second), (second, first))]
    with quiet():
        for thread in threads:
            thread.start()
        first.wait(10)
    for thread in threads:
        thread.join()
    assert warnings.filters == filters and hf_logging.get_verbosity() == level
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("hushed", stacklevel=1)
        warnings.warn("heard", stacklevel=1)
    assert [str(w.message) for w in seen] == ["heard"]


def test_the_embedded_base_and_a_pretrained_one_decode_with_a_cache(tmp_path):
    model, tokenizer = base()
    texts = ["The hens of Oakdale have two legs each, and so has the farmer who feeds them."] * 40
    settings = PretrainArgs(max_steps=1, max_length=32, out=str(tmp_path / "whole"), **FEW)
    pretrain(model.float().requires_grad_(True), tokenizer, texts, settings)
    for folder in (data_file("tiny"), tmp_path / "whole" / "model"):
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert plain.generation_config.use_cache is not False and plain.config.use_cache is not False, folder


def test_few_lengths_of_rows():
    lengths = {n + filling(n) for n in range(1, 4097)}
    assert len(lengths) == 16 + 8 + 8 and all(length % 64 == 0 for length in lengths)
    assert max(filling(n) / n for n in range(512, 4097)) < 1 / 8


GROWTH = """
import json, psutil, sys, torch
from tinytrainer_nb.all import *
from tinytrainer_nb.core import data_file
from tinytrainer_nb.recipes.trainer import RunTrainer
used, counted = {}, RunTrainer.count
def count(self):
    counted(self)
    used[self.state.global_step] = psutil.Process().memory_info().rss
RunTrainer.count = count
model, tokenizer = load_model("tiny", "none", sys.argv[1], verbose=False)
rows = load_examples(data_file("sft.jsonl")).select(range(1500))
args = SFTArgs(max_steps=90, batch_size=8, eval_steps=0, save_steps=0, sample_steps=0, out=sys.argv[2])
sft(add_lora(model, LoraArgs(r=4)), tokenizer, rows, args)
print(json.dumps(used))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_memory_does_not_grow_with_steps(tmp_path, dtype):
    if dtype == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("needs a processor with bf16 instructions: without them nothing is compiled for each length")
    command = [sys.executable, "-c", GROWTH, dtype, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    used = {int(step): size for step, size in json.loads(done.stdout.splitlines()[-1]).items()}
    assert used[90] < 1.05 * used[20], {step: round(size / 2**20) for step, size in used.items()}


def test_a_process_keeps_few_compiled_products():
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    code = f"import os, tinytrainer_nb; print(*(os.environ[name] for name in {names}))"
    unset = {name: value for name, value in os.environ.items() if name not in names}
    run = lambda env: subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
    assert run(unset).split() == ["256", "256"] and run(unset | {names[0]: "7"}).split() == ["7", "256"]


HOME = dict(
    load=lambda: load_model("~/nothing"),
    read=lambda: load_examples("~/nothing.jsonl"),
    open=lambda: Run.open("~/nothing"),
    reward=lambda: cli.main(["grpo", "--reward", "~/nothing.py:f"]),
    config=lambda: cli.main(["sft", "--config", "~/nothing.json"]),
)


@pytest.mark.parametrize("door", HOME)
def test_the_home_folder_is_found_by_every_door(door, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    try:
        HOME[door]()
        said = capsys.readouterr().err
    except TinyTrainerError as e:
        said = str(e)
    assert "nothing" in said and not Path("~").exists()
    assert str(tmp_path / "home") in said or door in ("read", "reward", "config"), said


def test_what_lies_at_home_is_used(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (home / "base").symlink_to(small_base())
    (home / "judge.py").write_text("def f(prompt, completion, **row): return 1.0\n")
    model, tokenizer = load_model("~/base", "none", "fp32", verbose=False)
    run = sft(add_lora(model, LoraArgs(r=2)), tokenizer, "~/rows.jsonl", SFTArgs(max_steps=1, out="~/run", **FEW))
    assert run.folder == home / "run" and Run.open("~/run").status == "finished" and not Path("~").exists()
    from tinytrainer_nb.recipes.rewards import find_reward

    assert find_reward("~/judge.py:f").record["names"] == ["f"]


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "two\nlines", "a b", "-dash", "it's"])
def test_names_of_any_kind(name, tmp_path):
    write_whole(tmp_path / name, "text")
    assert len(os.fsencode(hidden_beside(tmp_path / name, "1.partial").name)) <= 255
    run = trained(tmp_path / "runs" / name, max_steps=1)
    assert run.folder == tmp_path / "runs" / name and Run.open(run.folder).status == "finished"


@pytest.mark.parametrize("out", ["a" * 256, "a\0b", "~nobody-here/run"])
def test_names_that_cannot_be(out):
    with pytest.raises(TinyTrainerError):
        SFTArgs(out=out)
    with pytest.raises(TinyTrainerError):
        local_path(out)


def test_a_dangling_link_is_one_line(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TinyTrainerError, match="link to nothing"):
        trained(tmp_path / "run", max_steps=1)


FIELDS = {f.name: f for f in fields(SFTArgs)}


@pytest.mark.parametrize(
    "name, text, value",
    [("max_steps", "1e3", 1000), ("max_steps", "2E2", 200), ("seed", "4294967295", 2**32 - 1), ("eval_rows", "0", 0)],
)
def test_whole_numbers_as_people_write_them(name, text, value):
    assert parse_value(FIELDS[name], text) == value


@pytest.mark.parametrize(
    "name, text",
    [("max_steps", "1.5"), ("max_steps", "1e-3"), ("max_steps", "1e40"), ("max_steps", "9" * 400)]
    + [("seed", "4294967296"), ("seed", "-1"), ("learning_rate", "9" * 400), ("max_steps", "inf"), ("max_steps", "")],
)
def test_numbers_that_cannot_be_are_one_line(name, text):
    with pytest.raises(TinyTrainerError, match=f"{name}="):
        parse_value(FIELDS[name], text)


def test_a_form_reads_a_whole_number_that_a_browser_gives_as_a_fraction():
    form = settings_form(SFTArgs())
    form.inputs["max_steps"].value = 1e3
    assert form.value.max_steps == 1000 and type(form.value.max_steps) is int
    form.inputs["max_steps"].value = 2.5
    with pytest.raises(TinyTrainerError, match="max_steps=2.5 is not allowed"):
        form.value


def test_the_largest_seed_trains(tmp_path):
    assert trained(tmp_path / "run", seed=2**32 - 1, max_steps=1).status == "finished"


@pytest.mark.parametrize(
    "default, text, value",
    [
        ({"a": 1}, '{"a": 1, "b": true}', {"a": 1, "b": True}),
        ({"a": 1}, "{'a': None}", {"a": None}),
        (["a"], '["x", null]', ["x", None]),
        ([1], "[1, 2.5]", [1, 2.5]),
        ("a", '{"a": 1}', '{"a": 1}'),
        (None, "none", None),
    ],
)
def test_parameters_of_a_notebook_as_json_or_python(default, text, value):
    assert parameter_value(Parameter("p", default, ""), text) == value


@pytest.mark.parametrize("default, text", [(["a"], "x,y"), ({"a": 1}, "[1]"), ([1], "[" * 100_000), ({}, "")])
def test_parameters_of_the_wrong_kind_are_one_line(default, text):
    with pytest.raises(TinyTrainerError, match="parameter p="):
        parameter_value(Parameter("p", default, ""), text)


def test_a_long_text_is_no_path():
    text = "A farmer has 3.5 acres/steps. " * 300
    assert anchor_paths(dict(question=text)) == dict(question=text)


WRONG = [
    (name, v) for name in ("base", "data", "out", "max_steps", "columns") for v in (None, ["tiny"], {"a": 1}, True)
]


@pytest.mark.parametrize("name, value", [*WRONG, ("base", 5), ("data", 5), ("out", 5)])
def test_null_and_wrong_kinds_in_a_configuration_are_one_line(name, value, tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({name: value}))
    argv = ["sft", "--config", str(tmp_path / "c.json"), "--eval_steps", "0"]
    assert cli.main(argv if name == "out" else [*argv, "--out", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_each_module_keeps_its_mode():
    "Whoever only looks at a model leaves alone what somebody keeps in evaluation mode"
    model, tokenizer = base()
    model = add_lora(model, LoraArgs(r=2, layers="1")).train()
    model.get_base_model().model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    row = pack_row([encode_chat(tokenizer, [dict(role="user", content="a"), dict(role="assistant", content="b")])])
    batch = dict(micro_batches=[row], num_items=1)
    looks = dict(
        loss=lambda: mean_loss(model, batch, torch.float32),
        states=lambda: lower_states(model, row, 1, torch.float32),
        logits=lambda: exact_logits(model),
        answer=lambda: generate(model, tokenizer, "Once", GenerateArgs(max_new_tokens=2), quiet=True),
    )
    for name, look in looks.items():
        look()
        assert [m.training for m in model.modules()] == modes, name
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(m.training for m in model.modules()) and 1 / 0
    assert [m.training for m in model.modules()] == modes


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked")
def test_memory_is_kept_as_long_as_a_run_wants_it(tmp_path):
    used = lambda: psutil.Process().memory_info().rss
    drop = lambda: [torch.ones(2**24) for _ in range(4)].clear()  # 256 MiB
    with path_module._memory_kept():
        with path_module._memory_kept():
            pass
        before = used()
        drop()
        assert used() > before + 128 * 2**20, "the first of two runs to end took it back"
    trained(tmp_path / "run")
    before = used()
    drop()
    assert used() < before + 64 * 2**20


def test_memory_goes_back_when_a_run_is_closed(tmp_path):
    run = trained(tmp_path / "run")
    before = psutil.Process().memory_info().rss
    held = [torch.ones(2**22) for _ in range(20)]  # 320 MiB, which glibc would keep
    del held
    run.close()
    assert psutil.Process().memory_info().rss < before + 64 * 2**20
