"""SIGKILL at random moments of loading, stepping, saving, evaluating, rolling out and scoring: nothing is half
written, each run goes on, and ends as if nothing had happened. Two moments are tried each time, eighty with `-m
slow`."""

import functools
import gc
import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from forked import forking
from safetensors.torch import load_file
from small import small_base

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
PHASES = ("elsewhere", "loading", "stepping", "saving", "evaluating", "rolling out", "scoring")
MOMENTS = [
    ("sft", "loading", 5),
    ("sft", "stepping", 6),
    ("sft", "saving", 9),
    ("sft", "evaluating", 5),
    ("sft", "rolling out", 5),
    ("ppo", "loading", 5),
    ("ppo", "stepping", 6),
    ("ppo", "saving", 9),
    ("ppo", "evaluating", 4),
    ("ppo", "rolling out", 6),
    ("ppo", "scoring", 5),
    ("grpo", "stepping", 4),
    ("grpo", "saving", 3),
    ("grpo", "rolling out", 4),
    ("grpo", "scoring", 4),
]
KILLS = [(recipe, phase, i) for recipe, phase, count in MOMENTS for i in range(count)]
ALWAYS = [("sft", "stepping", 0)]  # the first of them is killed twice
assert len(KILLS) == 80 and set(ALWAYS) < set(KILLS)


def watched(journal: list, now, began) -> None:
    """Have the library tell what it is doing: the phase in `now`, how often it was entered in `began`, and how long
    each lasted in `journal`"""
    from tinytrainer_nb.model import load
    from tinytrainer_nb.recipes import ppo, sft, trainer
    from tinytrainer_nb.recipes import rounds as rl

    def tell(owner, name: str, phase: str):
        plain = getattr(owner, name)

        def telling(*args, **kwargs):
            before, now.value = now.value, PHASES.index(phase)
            began[now.value] += 1
            place = [phase, began[now.value], time.perf_counter()]
            try:
                return plain(*args, **kwargs)
            finally:
                now.value = before
                journal.append([*place[:2], time.perf_counter() - place[2]])

        setattr(owner, name, telling)

    tell(load, "load_model", "loading")
    for owner in (sft, rl):
        tell(owner, "begin", "loading")
    tell(trainer.RunTrainer, "training_step", "stepping")
    tell(rl.RolloutTrainer, "update", "stepping")
    tell(rl.RolloutTrainer, "scored", "scoring")
    for owner, name in (
        (trainer.RunTrainer, "_save_checkpoint"),
        (trainer.RunTrainer, "save_result"),
        (rl.RolloutTrainer, "save_result"),
        (ppo.PPOTrainer, "save_result"),
        (trainer.RunTrainer, "finish"),
    ):
        tell(owner, name, "saving")
    for owner in (trainer.RunTrainer, rl.RolloutTrainer):
        tell(owner, "heldout", "evaluating")
    tell(sft, "generate", "rolling out")
    tell(rl.RolloutTrainer, "rollout", "rolling out")


def work(recipe: str, out: str, resume: bool, now, began) -> None:
    "The whole of a run, or the rest of it; nf4, and dropout on, so that the random state matters too"
    gc.freeze()  # as in conftest.py
    journal = []
    watched(journal, now, began)
    from tinytrainer_nb.all import (
        GRPOArgs,
        LoraArgs,
        PPOArgs,
        Run,
        SFTArgs,
        add_lora,
        data_file,
        grpo,
        load_examples,
        load_prompts,
        ppo,
        sft,
    )
    from tinytrainer_nb.model import load

    if resume:
        return Run.open(out).resume()
    model, tokenizer = load.load_model(small_base(), quantization="nf4", verbose=False)
    model = add_lora(model, LoraArgs(r=4, dropout=0.1))
    if recipe != "sft":  # as after an SFT: the reference is a frozen copy
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    common = dict(seed=3, warmup_steps=2, save_steps=2, eval_steps=3, sample_steps=4, eval_rows=2, out=out)
    if recipe == "sft":
        sft(
            model,
            tokenizer,
            load_examples(data_file("sft.jsonl")).select(range(22)),
            SFTArgs(max_steps=8, batch_size=4, sample_tokens=16, **common),
        )
    else:
        train, settings = dict(ppo=(ppo, PPOArgs), grpo=(grpo, GRPOArgs))[recipe]
        # A price that moves, and must be found again
        how = dict(kl_target=2.0, value_adapter=True) if recipe == "ppo" else dict(kl_coef=0.02)
        train(
            model,
            tokenizer,
            load_prompts(data_file("rl.jsonl"))[:22],
            "exact_answer=1,reference_overlap=0.5",
            settings(
                max_steps=6,
                batch_size=4,
                num_generations=2,
                max_new_tokens=24,
                epochs=2,
                minibatches=2,
                **how,
                **common,
            ),
        )
    Path(f"{out}.phases").write_text(json.dumps(journal))


def begin(recipe: str, out: Path, resume: bool = False):
    "A process that works, and what it tells"
    context = forking()
    now, began = context.RawValue("i"), context.RawArray("i", len(PHASES))
    process = context.Process(target=work, args=(recipe, str(out), resume, now, began))
    process.start()
    return process, now, began


def finish(recipe: str, out: Path, resume: bool = False) -> None:
    process, *_ = begin(recipe, out, resume)
    process.join(300)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Of a recipe, by its name, a run that nobody killed, and its phases: name, which time, seconds"
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def of(recipe: str) -> tuple[Path, list]:
        finish(recipe, folder / recipe)
        return folder / recipe, json.loads((folder / f"{recipe}.phases").read_text())

    return of


def kill_in(process, now, began, phase: str, time_of: int, delay: float) -> None:
    "SIGKILL `delay` seconds after the phase was entered for the `time_of`-th time"
    while process.is_alive() and began[PHASES.index(phase)] < time_of:
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()


def check_whole(run: Path) -> None:
    "Every file that stands under its own name can be read, and is as it was written"
    for path in run.rglob("*"):
        if path.is_dir() or any(p.startswith(".") for p in path.relative_to(run).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf8"))
        if path.suffix == ".safetensors":
            load_file(path)
        if path.suffix == ".pt" or path.suffix == ".pth":
            torch.load(path, weights_only=False)
    if (run / "events.jsonl").exists():
        [json.loads(line) for line in (run / "events.jsonl").read_bytes().split(b"\n")[:-1]]
    from tinytrainer_nb.core import file_hash

    for step in run.glob("checkpoints/step-*"):
        hashes = json.loads((step / "progress.json").read_text())["sha256"]
        assert hashes == {name: file_hash(step / name) for name in hashes}


@pytest.mark.parametrize(
    "recipe, phase, i", [pytest.param(*kill, marks=[] if kill in ALWAYS else pytest.mark.slow) for kill in KILLS]
)
def test_kill(recipe, phase, i, whole, tmp_path):
    from tinytrainer_nb.runs.run import Run

    chance, (reference, phases), run = random.Random(), whole(recipe), tmp_path / "run"
    _, time_of, seconds = chance.choice([p for p in phases if p[0] == phase])
    delay = chance.random() * seconds
    process, now, began = begin(recipe, run)
    kill_in(process, now, began, phase, time_of, delay)
    told = f"killed {delay * 1000:.1f} ms into {phase}, time {time_of}; found in {PHASES[now.value]}"
    check_whole(run)
    resumed = (run / "run.json").exists()
    if resumed and Run.open(run).status != "finished":
        assert Run.open(run).status == "interrupted", told
        if i % 3 == 0:  # and once more
            process, now, began = begin(recipe, run, resume=True)
            time.sleep(chance.random() * 2.5)
            process.kill()
            process.join()
            check_whole(run)
        finish(recipe, run, resume=True)
    elif not resumed:
        assert not run.exists(), told  # nothing to go on with, and nothing in the way
        finish(recipe, run)
        assert not list(tmp_path.glob(".run*")), told
    runs = [Run.open(r) for r in (reference, run)]
    assert runs[1].status == "finished", told
    assert (
        runs[0].folder.joinpath("adapter/adapter_model.safetensors").read_bytes()
        == run.joinpath("adapter/adapter_model.safetensors").read_bytes()
    ), told
    figures = [[(e["step"], e.get("loss"), e.get("reward")) for e in r.events if e["kind"] == "metrics"] for r in runs]
    assert figures[0] == figures[1], told
    assert not [p for p in run.rglob(".*partial*")], told
    print(told, "" if resumed else "(before there was a run)")
