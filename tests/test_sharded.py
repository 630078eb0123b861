"""Processes that share out a model's weights: what they train is what one process trains, and each kind of process goes
on from each other's checkpoints."""

import functools
import json
import os
import random
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from forked import Command, Script
from safetensors.torch import load_file
from small import small_base
from test_kills import check_whole

from tinytrainer_nb.all import LAUNCH, Run, load_model

PRETRAIN = [
    *("pretrain", "--base", "new:llama-1m", "--dtype", "fp32", "--batch_size", "4", "--max_length", "64"),
    *("--warmup_steps", "0", "--save_steps", "2", "--eval_steps", "3", "--sample_steps", "3", "--sample_tokens", "4"),
    *("--eval_blocks", "8", "--max_steps", "7", "--keep_checkpoints", "9"),
]
SFT = [
    *("sft", "--base", small_base(), "--quantization", "none", "--dtype", "fp32", "--max_length", "160"),
    *("--warmup_steps", "0", "--batch_size", "6", "--save_steps", "2", "--eval_steps", "2", "--sample_steps", "4"),
    *("--max_steps", "6", "--keep_best", "true", "--lora_dropout", "0.1"),
]


def engine(name: str) -> dict[str, str]:
    "The variables that `accelerate launch` makes of a file of settings"
    if name == "ddp":
        return {}
    said = yaml.safe_load(LAUNCH[name].read_text(encoding="utf8"))["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value).lower() for key, value in said.items()}


def train(kind: str, *command, refused: bool = False) -> str:
    "`tinytrainer COMMAND` in one process, in two with whole models, or in two with parts"
    process = Command(*command, processes=1 if kind == "one" else 2, **({} if kind == "one" else engine(kind)))
    out, _ = process.communicate(timeout=300)
    assert bool(process.returncode) == refused, out
    return out


def journal(run) -> dict[tuple, float]:
    return {(e["step"], e["kind"]): e["loss"] for e in Run.open(run).events if "loss" in e}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    "A folder of prose"
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(topics.values()):
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def whole_runs(texts, tmp_path_factory):
    "A run of seven steps by each kind of process, made once it is asked for"
    folder = tmp_path_factory.mktemp("runs")

    def made(kind: str):
        if not (folder / kind).exists():
            train(kind, *PRETRAIN, "--data", texts, "--out", folder / kind)
        return folder / kind

    return made


LOOK = """
import json, sys
from tinytrainer_nb.recipes.trainer import RunTrainer
from tinytrainer_nb.compute.sharded import local
count = RunTrainer.count
def look(self):
    count(self)
    parts = {n: [type(p).__name__, list(p.shape), list(local(p).shape)] for n, p in self.model.named_parameters()}
    states = [[type(x).__name__, list(local(x).shape)] for x in
              [s["exp_avg"] for s in self.optimizer.state.values()]]
    with open(f"{sys.argv[1]}-{self.args.process_index}.json", "w") as f: json.dump([parts, states], f)
RunTrainer.count = look
from tinytrainer_nb.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_each_process_holds_a_part(texts, tmp_path):
    "The parameters, and not only the losses: accelerate would take DDP without a word, whose losses are the same"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    command = [*PRETRAIN, "--data", texts, "--max_steps", "2", "--out", tmp_path / "run"]
    scripts = [
        Script(LOOK, tmp_path / "seen", *command, RANK=rank, LOCAL_RANK=rank, **common, **engine("fsdp2"))
        for rank in ("0", "1")
    ]
    for script in scripts:
        out, err = script.communicate(300)
        assert script.returncode == 0, err
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    for name in seen[0][0]:
        (kind, shape, first), (_, _, second) = (parts[name] for parts, _ in seen)
        assert kind == "DTensor" and first[0] + second[0] == shape[0] and abs(first[0] - second[0]) <= 1, name
    assert all(kind == "DTensor" for _, states in seen for kind, _ in states)


def test_parts_train_as_one_process(whole_runs):
    "Losses and evaluations; best weights, samples, checkpoints and the result are there, and those of one process"
    one, parts = whole_runs("one"), whole_runs("fsdp2")
    expected, found = journal(one), journal(parts)
    assert expected.keys() == found.keys()
    assert all(found[key] == pytest.approx(loss, abs=1e-5) for key, loss in expected.items())
    samples = lambda run: [e["completion"] for e in Run.open(run).events if e["kind"] == "sample"]
    assert samples(parts) == samples(one) and samples(one)
    a, b = (load_file(run / "checkpoints/step-000006/optimizer.safetensors") for run in (one, parts))
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    model, _ = load_model(parts / "model", "none", "fp32", verbose=False)
    assert model.num_parameters() == load_model(one / "model", "none", "fp32", verbose=False)[0].num_parameters()


KINDS = ("one", "ddp", "fsdp2")
MOVES = [(a, b) for a in KINDS for b in KINDS]
QUICK = [("one", "fsdp2"), ("fsdp2", "one")]


@pytest.mark.parametrize(
    "begun, ended", [pytest.param(*m, marks=[] if m in QUICK else pytest.mark.slow) for m in MOVES]
)
def test_a_checkpoint_moves(begun, ended, whole_runs, tmp_path):
    "Saved after two steps by one kind of process, five more by another: as if one process had gone on"
    run = tmp_path / "moved"
    shutil.copytree(whole_runs(begun), run)
    back_to(run, 2)
    train(ended, "resume", run)
    expected, found = journal(whole_runs("one")), journal(run)
    assert expected.keys() == found.keys()
    assert all(found[key] == pytest.approx(loss, abs=1e-5) for key, loss in expected.items()), (begun, ended)


def back_to(run, step: int) -> None:
    "As if a run had been killed after this step"
    for folder in (run / "checkpoints").iterdir():
        if folder.name != f"step-{step:06d}":
            shutil.rmtree(folder)
    shutil.rmtree(run / "model")
    for name in ("summary.json", "figure.png"):
        (run / name).unlink()
    lines = (run / "events.jsonl").read_text(encoding="utf8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (run / "events.jsonl").write_text("".join(kept), encoding="utf8")
    info = json.loads((run / "run.json").read_text(encoding="utf8"))
    info["status"] = "interrupted"
    info.pop("result", None)
    (run / "run.json").write_text(json.dumps(info), encoding="utf8")


KILLED = """
import os, signal, sys
from tinytrainer_nb.cli import main
writes, wanted, plain = 0, int(sys.argv[1]), os.replace
def counted(*args, **kwargs):
    global writes
    writes += 1
    if writes == wanted: os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)
os.replace = counted # whatever is written gets its name by it
code = main(sys.argv[2:])
print(writes)
sys.exit(code)
"""
PLAN = """
- tokens: 768
  sources: {text: 1}
  batch_tokens: 256
- tokens: 1024
  sources: {text: [1, 0], more: [0, 1]}
  batch_tokens: 512
"""


def killed_at(write: int, kind: str, command: list) -> str:
    "Train until the first process has made so many writes; then all of them get a SIGKILL. 0: to the end"
    count, env = (1, {}) if kind == "one" else (2, engine(kind))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
        env["MASTER_PORT"] = str(free.getsockname()[1])
    scripts = []
    for rank in range(count):
        place = dict(env, RANK=str(rank), LOCAL_RANK=str(rank)) if count > 1 else {}
        scripts.append(Script(KILLED, write * (rank == 0), *command, **place))
    scripts[0].process.join(300)
    for script in scripts[1:] if write else []:
        script.kill()
    said = [script.communicate(300) for script in scripts]
    assert scripts[0].returncode == (-9 if write else 0), said
    return said[0][0]


@pytest.fixture(scope="module")
def planned(texts, tmp_path_factory):
    "By each kind of process: the command of a plan of two stages, a run to its end, and how many writes that took"
    folder = tmp_path_factory.mktemp("planned")
    for name, share in (("text", "0.1"), ("more", "0.2")):
        command = ["prepare", "--data", texts, "--base", small_base(), "--out", folder / name, "--heldout", share]
        train("one", *command)
    (folder / "plan.yaml").write_text(PLAN)
    flags = (
        "--dtype fp32 --max_length 64 --warmup_steps 0 --save_steps 1 --eval_steps 2 --sample_steps 0 --eval_blocks 4"
    )
    command = ["pretrain", "--stages", folder / "plan.yaml", "--base", small_base(), *flags.split(), "--out"]

    @functools.cache
    def of(kind: str):
        said = killed_at(0, kind, [*command, folder / kind])
        return command, folder / kind, int(said.split()[-1])

    return of


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "kind, i",
    [pytest.param(k, i, marks=[] if (k, i) == ("one", 0) else pytest.mark.slow) for k in KINDS for i in range(8)],
)
def test_a_kill_at_any_write(kind, i, planned, tmp_path):
    "Also at the border of two stages: what was saved can be read, and one process goes on from it to the same end"
    command, reference, writes = planned(kind)
    at = random.Random().randint(1, writes)
    killed_at(at, kind, [*command, tmp_path / "run"])
    check_whole(tmp_path / "run")
    if not (tmp_path / "run/run.json").exists():
        assert not (tmp_path / "run").exists(), f"killed at write {at} of {writes}: something is in the way"
        return
    train("one", "resume", tmp_path / "run")
    expected, found = journal(reference), journal(tmp_path / "run")
    assert [step for step, kind in expected if kind == "metrics"] == [1, 2, 3, 4, 5]
    assert expected.keys() == found.keys(), f"killed at write {at} of {writes}"
    assert all(found[key] == pytest.approx(loss, abs=1e-5) for key, loss in expected.items()), f"write {at}"
    assert not list((tmp_path / "run").rglob(".*partial*"))


@pytest.mark.slow
def test_adapters_train_in_parts(tmp_path):
    "LoRA with dropout, best weights and samples; an adapter that a plain process loads"
    for kind in ("ddp", "fsdp2"):
        train(kind, *SFT, "--out", tmp_path / kind)
    expected, found = (journal(tmp_path / kind) for kind in ("ddp", "fsdp2"))
    assert expected.keys() == found.keys()
    assert all(found[key] == pytest.approx(loss, abs=1e-5) for key, loss in expected.items())
    a, b = (load_file(tmp_path / kind / "adapter/adapter_model.safetensors") for kind in ("ddp", "fsdp2"))
    assert a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < 1e-4 for name in a)
    load_model(tmp_path / "fsdp2", "none", "fp32", verbose=False)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--optimizer", "muon"], "optimizer='muon' needs whole matrices, which FSDP shares out"),
        pytest.param(["ppo"], "FSDP: ppo needs all weights in each process", marks=pytest.mark.slow),
        pytest.param(["nf4"], "FSDP: weights stored as nf4 cannot be shared out", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_shared_out_is_a_line(more, said, texts, tmp_path):
    command = [*PRETRAIN, "--data", texts, *more]
    if more == ["ppo"]:
        command = ["ppo", "--base", small_base(), "--max_steps", "1", "--batch_size", "2"]
    if more == ["nf4"]:
        command = [*SFT[:3], "--quantization", "nf4", "--max_steps", "1"]
    out = train("fsdp2", *command, "--out", tmp_path / "run", refused=True)
    assert said in out and "ddp.yaml" in out and "Traceback" not in out


def launched(*command, timeout: float = 300, **env) -> str:
    "A command as a user would give it"
    known = os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1") | env
    process = subprocess.run(
        [sys.executable, "-m", *map(str, command)], env=known, text=True, capture_output=True, timeout=timeout
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAUNCH if not name.endswith("nodes")])
def test_each_file_of_settings_starts(name, whole_runs, texts, tmp_path):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    accelerate = ["accelerate.commands.launch", "--config_file", LAUNCH[name], "--main_process_port", "0"]
    more = dict(DS_ACCELERATOR="cpu") if name.startswith("zero") else {}
    launched(*accelerate, "-m", "tinytrainer_nb.cli", *PRETRAIN, "--data", texts, "--out", tmp_path / "run", **more)
    expected, found = journal(whole_runs("one")), journal(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(found[key] == pytest.approx(loss, abs=1e-5) for key, loss in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("by", ["accelerate", "torchrun"])
def test_two_machines(by, whole_runs, texts, tmp_path):
    "As two machines would: each starts a process of its own, and they meet at an address"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*PRETRAIN, "--data", texts, "--out", tmp_path / "run"]
    env = os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    machines = []
    for rank in (0, 1):
        start = ["accelerate.commands.launch", "--config_file", LAUNCH["fsdp2_nodes"], "--machine_rank", rank]
        start += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        if by == "torchrun":
            start = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", rank]
            start += ["--master_addr", "127.0.0.1", "--master_port", port]
        words = [sys.executable, "-m", *map(str, start), "-m", "tinytrainer_nb.cli", *map(str, command)]
        machines.append(subprocess.Popen(words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for machine in machines:
        out, _ = machine.communicate(timeout=300)
        assert machine.returncode == 0, out
    expected, found = journal(whole_runs("one")), journal(tmp_path / "run")
    assert all(found[key] == pytest.approx(loss, abs=1e-5) for key, loss in expected.items())
