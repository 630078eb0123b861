"""Several processes train as one: the same steps, the same losses, and one of them writes."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from forked import Command
from live import until
from safetensors.torch import load_file
from small import small_base

from tinytrainer_nb.runs.run import Run

COMMON = [
    "--base",
    small_base(),
    "--quantization",
    "none",
    "--dtype",
    "fp32",
    "--max_length",
    "160",
    "--warmup_steps",
    "0",
]
RECIPES = {
    "sft": [
        *COMMON,
        "--max_steps",
        "6",
        "--batch_size",
        "6",
        "--save_steps",
        "2",
        "--eval_steps",
        "3",
        "--sample_steps",
        "3",
        "--micro_batch_tokens",
        "256",
    ],
    "ppo": [
        *COMMON,
        "--max_steps",
        "3",
        "--batch_size",
        "4",
        "--num_generations",
        "3",
        "--max_new_tokens",
        "24",
        "--save_steps",
        "1",
        "--eval_steps",
        "2",
        "--sample_steps",
        "2",
        "--reward",
        "reference_overlap",
        "--learning_rate",
        "1e-3",
        "--minibatches",
        "5",
        "--micro_batch_tokens",
        "256",
    ],
    "grpo": [
        *COMMON,
        "--max_steps",
        "3",
        "--batch_size",
        "4",
        "--num_generations",
        "3",
        "--max_new_tokens",
        "24",
        "--save_steps",
        "1",
        "--sample_steps",
        "2",
        "--reward",
        "reference_overlap",
        "--learning_rate",
        "1e-3",
        "--micro_batch_tokens",
        "256",
    ],
}
LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]


def launch(*command, processes: int = 2) -> subprocess.Popen:
    "As a user would"
    env = os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [sys.executable, *(LAUNCH if processes > 1 else []), "-m", "tinytrainer_nb.cli", *map(str, command)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def train(*command, processes: int = 1) -> str:
    process = (Command if sys.platform == "linux" else launch)(*command, processes=processes)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


# PPO is killed and resumed below, GRPO is shared out as it is
@pytest.mark.parametrize("recipe", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ppo", "grpo"))])
def test_two_processes_train_as_one(tmp_path, recipe):
    "Every figure of the journal agrees to 1e-5 with that of one process with the same global batch"
    train(recipe, *RECIPES[recipe], "--out", tmp_path / "one")
    out = train(recipe, *RECIPES[recipe], "--out", tmp_path / "two", processes=2)
    assert out.count("finished: ") == 1  # one process speaks
    one, two = (
        [e for e in Run.open(tmp_path / name).events if e["kind"] in ("metrics", "evaluation")]
        for name in ("one", "two")
    )
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in [
            n
            for n in a
            if n not in ("time", "kind", "tokens_per_s", "mfu", "grad_norm") and not n.startswith("seconds")
        ]:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), (name, a["step"])
    assert {e["grad_norm"] for e in one if e["kind"] == "metrics"} != {0.0}
    for name, x in load_file(tmp_path / "one/adapter/adapter_model.safetensors").items():
        assert (x - load_file(tmp_path / "two/adapter/adapter_model.safetensors")[name]).abs().max() < 1e-3, name


@pytest.mark.slow  # test_kills.py kills one process everywhere; two are tried above
def test_two_processes_killed_and_resumed(tmp_path):
    """Both are killed after a checkpoint; resumed together they end with the adapter of the run that was left alone,
    bit for bit"""
    recipe = RECIPES["ppo"]
    train("ppo", *recipe, "--out", tmp_path / "whole", processes=2)
    process = launch("ppo", *recipe, "--out", tmp_path / "killed")
    while not (tmp_path / "killed/checkpoints/step-000001").exists() and process.poll() is None:
        time.sleep(0.05)
    for doomed in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        doomed.kill()  # the launcher first: it would clean up
    process.communicate()
    until(
        lambda: Run.open(tmp_path / "killed").status == "interrupted",
        "the end of a killed process, which its system takes a moment for",
    )
    train("resume", tmp_path / "killed", processes=2)
    for file in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "killed/adapter" / file).read_bytes() == (tmp_path / "whole/adapter" / file).read_bytes()
    assert json.loads((tmp_path / "killed/summary.json").read_text())["steps"] == 3


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    process = launch("sft", *RECIPES["sft"], "--batch_size", "5", "--out", tmp_path / "odd")
    out, _ = process.communicate(timeout=120)
    assert (
        process.returncode
        and "batch_size=5 is for all processes together: it must be a multiple of 2" in out
        and not (tmp_path / "odd").exists()
    )
