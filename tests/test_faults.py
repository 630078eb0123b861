"""What people do wrong, and what machines do to them: one line that says what was given, what is allowed and what to
do, exit status 2, and nothing damaged."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinytrainer_nb.all import (
    LoraArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    add_lora,
    data_file,
    load_examples,
    load_model,
    sft,
)
from tinytrainer_nb.cli import main

ROW = dict(prompt="How much is 1 + 1?", completion="2")
FAST = [
    "--max_steps",
    "1",
    "--batch_size",
    "2",
    "--eval_steps",
    "0",
    "--sample_steps",
    "0",
    "--lora_r",
    "2",
    "--quantization",
    "none",
    "--dtype",
    "fp32",
    "--data",
    "own.jsonl",
    "--out",
    "out",
]
PPO = [
    "--max_steps",
    "1",
    "--batch_size",
    "2",
    "--num_generations",
    "2",
    "--max_new_tokens",
    "8",
    "--sample_steps",
    "0",
    "--lora_r",
    "2",
    "--quantization",
    "none",
    "--dtype",
    "fp32",
    "--out",
    "out",
]


def text(content) -> bytes:
    return (
        content
        if isinstance(content, bytes)
        else content.encode()
        if isinstance(content, str)
        else "".join(json.dumps(r) + "\n" for r in content).encode()
    )


def reward(body: str) -> dict:
    return {"r.py": f"def f(prompt, completion, **row):\n    {body}\n"}


def base(folder: Path, *, cut: int = 0, bytes_of: str = "", remove: str = "", add: str = "", **config) -> None:
    "A copy of the embedded base with something wrong"
    shutil.copytree(data_file("tiny"), folder)
    weights = folder / "model.safetensors"
    if cut:
        weights.write_bytes(weights.read_bytes()[:cut])
    if add:
        (folder / add).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    if remove:
        (folder / remove).unlink()
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))


DATA = {  # content of the file, more words of the command, what the line says
    "missing.jsonl": (None, [], ["missing.jsonl", "no such file"]),
    "empty.jsonl": ("", [], ["empty.jsonl", "empty"]),
    "blank.csv": ("", [], ["blank.csv", "no row in it"]),
    "header.csv": ("prompt,completion\n", [], ["header.csv"]),
    "nothing.json": ("[]", [], ["nothing.json"]),
    "cut.json": ('[{"prompt": "a", "comp', [], ["cut.json", "JSON"]),
    "cut.jsonl": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl', [], ["cut.jsonl", "line 2", "JSON"]),
    "nul.jsonl": (b'{"prompt": "a", "completion": "b"}\n\x00\x00\x00\n', [], ["nul.jsonl", "line 2"]),
    "nul.csv": (b"prompt,completion\na,b\x00c\n", [], ["nul.csv"]),
    "latin.jsonl": ('{"prompt": "caf\u00e9", "completion": "b"}\n'.encode("latin-1"), [], ["latin.jsonl", "UTF-8"]),
    "utf16.jsonl": ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), [], ["utf16.jsonl", "UTF-8"]),
    "latin.txt": ("caf\u00e9".encode("latin-1"), [], ["latin.txt", "UTF-8"]),
    "number.jsonl": ([ROW, dict(prompt="a", completion=3)], [], ["number.jsonl", "line 2", "completion", "3"]),
    "null.jsonl": ([ROW, dict(prompt="a", completion=None)], [], ["null.jsonl", "line 2", "completion"]),
    "list.jsonl": ("[1, 2]\n", [], ["list.jsonl", "line 1"]),
    "object.json": ('{"prompt": "a"}', [], ["object.json", "list"]),
    "strings.json": ('["a", "b"]', [], ["strings.json"]),
    "role.jsonl": (
        [dict(messages=[dict(role="robot", content="a")])],
        [],
        ["role.jsonl", "line 1", "robot", "assistant"],
    ),
    "turn.jsonl": ([dict(messages=[dict(role="user")])], [], ["turn.jsonl", "line 1", "content"]),
    "turns.jsonl": ([dict(messages="hello")], [], ["turns.jsonl", "line 1", "messages", "hello"]),
    "columns.csv": ("foo,bar\na,b\n", [], ["columns.csv", "foo, bar", "prompt + completion", "columns"]),
    "mixed.jsonl": ([ROW, dict(messages=[dict(role="user", content="a")])], [], ["mixed.jsonl", "line"]),
    "blanks.jsonl": ([dict(prompt="a", completion=" ")], [], ["blanks.jsonl", "empty"]),
    "long.jsonl": (
        [ROW | dict(prompt="word " * 600)],
        [],
        ["longer than the model's context of 1024 tokens", "Shorten the rows"],
    ),
    "unanswered.jsonl": ([dict(messages=[dict(role="user", content="a")])], [], ["nothing to learn"]),
    "pairs.jsonl": ([dict(prompt="a", chosen="b", rejected="c")], [], ["chosen", "columns"]),
    "torn.parquet": (b"PAR1 torn", [], ["torn.parquet"]),
    "data.xlsx": (b"PK", [], ["data.xlsx", ".jsonl"]),
    "mapped.jsonl": ([ROW], ["--columns", "prompt=question"], ["question", "prompt, completion"]),
    "mapping.jsonl": ([ROW], ["--columns", "nosuchmapping"], ["nosuchmapping", "gsm8k"]),
    "pretrain.jsonl": ([ROW], None, ["plain text", "tinytrainer sft"]),
}

FAULTS = {  # files, command, what the line says
    "hub data": ({}, ["sft", *FAST, "--data", "nobody/nothing"], ["nobody/nothing", "Hub"]),
    "folder without texts": ({"d/x.bin": "x"}, ["sft", *FAST, "--data", "d"], [".txt", "d"]),
    "prompts too long": (
        {"p.jsonl": [dict(prompt="word " * 1200)] * 4},
        ["ppo", *PPO, "--data", "p.jsonl", "--reward", "reference_overlap"],
        ["longer than 512 tokens", "raise max_length"],
    ),
    "prompts of plain text": ({"p.txt": "once"}, ["ppo", *PPO, "--data", "p.txt"], ["prompts"]),
    "too few prompts": ({"p.jsonl": [ROW]}, ["ppo", *PPO, "--data", "p.jsonl"], ["batch_size=2"]),
    "unknown reward": ({}, ["ppo", *PPO, "--reward", "exact_anser"], ["exact_anser", "reference_overlap"]),
    "reward weight": ({}, ["ppo", *PPO, "--reward", "exact_answer=much"], ["exact_answer=much", "number"]),
    "reward twice": ({}, ["ppo", *PPO, "--reward", "exact_answer,exact_answer"], ["once"]),
    "reward file missing": ({}, ["ppo", *PPO, "--reward", "no.py:f"], ["no.py"]),
    "reward function missing": (reward("return 1"), ["ppo", *PPO, "--reward", "r.py:g"], ["r.py", "g"]),
    "reward file broken": (
        {"r.py": "def f(:\n"},
        ["ppo", *PPO, "--reward", "r.py:f"],
        ["r.py", "line 1", "SyntaxError"],
    ),
    "reward without reference": (
        {"p.jsonl": [dict(prompt="a")] * 4},
        ["ppo", *PPO, "--data", "p.jsonl", "--reward", "exact_answer"],
        ["reference_answer"],
    ),
    "reward asks for a column": (
        {"r.py": "def f(prompt, completion, total): return 1.0\n"},
        ["ppo", *PPO, "--reward", "r.py:f"],
        ["reward f asks for total", "It has: reference_answer"],
    ),
    "reward raises": (
        reward("return 1 / 0"),
        ["ppo", *PPO, "--reward", "r.py:f"],
        [
            "reward f (r.py, line 2) raised ZeroDivisionError",
            "prompt",
            "completion",
            "`tinytrainer resume out --reward r.py:f`",
        ],
    ),
    "reward NaN": (
        reward("return float('nan')"),
        ["ppo", *PPO, "--reward", "r.py:f"],
        ["reward f returned nan", "finite number"],
    ),
    "reward text": (
        reward("return 'good'"),
        ["ppo", *PPO, "--reward", "r.py:f"],
        ["reward f returned 'good'", "finite number"],
    ),
    "reward of wrong length": (
        {"r.py": "def f(prompts, completions, **row): return [1.0]\n"},
        ["ppo", *PPO, "--reward", "r.py:f"],
        ["returned 1 values"],
    ),
    "negative learning rate": ({}, ["sft", *FAST, "--learning_rate", "-1"], ["learning_rate", "larger than 0"]),
    "learning rate by another name": (
        {},
        ["sft", *FAST, "--lr", "1e-3"],
        ["unknown flag --lr", "Did you mean --learning_rate?"],
    ),
    "epochs": (
        {},
        ["sft", *FAST, "--num_train_epochs", "3"],
        ["unknown flag --num_train_epochs", "Did you mean --max_steps?"],
    ),
    "absurd learning rate": ({}, ["sft", *FAST, "--learning_rate", "1000"], ["learning_rate", "at most 1"]),
    "learning rate NaN": ({}, ["sft", *FAST, "--learning_rate", "nan"], ["learning_rate"]),
    "infinite weight decay": ({}, ["sft", *FAST, "--weight_decay", "inf"], ["weight_decay", "number"]),
    "no steps": ({}, ["sft", *FAST, "--max_steps", "0"], ["max_steps", "at least 1"]),
    "negative batch": ({}, ["sft", *FAST, "--batch_size", "-4"], ["batch_size", "at least 1"]),
    "half a step": ({}, ["sft", *FAST, "--max_steps", "1.5"], ["max_steps", "whole number"]),
    "unknown schedule": ({}, ["sft", *FAST, "--schedule", "steep"], ["schedule", "linear, cosine"]),
    "unknown quantization": ({}, ["sft", *FAST, "--quantization", "int3"], ["int3", "nf4"]),
    "unknown dtype": ({}, ["sft", *FAST, "--dtype", "fp8"], ["fp8", "bf16"]),
    "rank 0": ({}, ["sft", *FAST, "--lora_r", "0"], ["lora_r", "at least 1"]),
    "all dropped": ({}, ["sft", *FAST, "--lora_dropout", "1"], ["lora_dropout", "smaller than 1"]),
    "unknown layer": ({}, ["sft", *FAST, "--lora_target_modules", "q_prj"], ["q_prj", "q_proj, k_proj"]),
    "layer 9 of 7": ({}, ["sft", *FAST, "--lora_layers", "5-9"], ["layers='5-9'", "0 to 6"]),
    "patience without evaluation": ({}, ["sft", *FAST, "--patience", "2"], ["patience", "eval_steps"]),
    "unknown tracker": ({}, ["sft", *FAST, "--report_to", "mlflow"], ["mlflow", "tensorboard"]),
    "config unknown": (
        {"c.json": '{"max_step": 3}'},
        ["sft", *FAST, "--config", "c.json"],
        ["c.json", "max_step", "Did you mean max_steps"],
    ),
    "config broken": ({"c.json": "{"}, ["sft", *FAST, "--config", "c.json"], ["c.json", "JSON"]),
    "config wrong type": (
        {"c.json": '{"learning_rate": "fast"}'},
        ["sft", *FAST, "--config", "c.json"],
        ["learning_rate", "fast", "a number"],
    ),
    "missing base": ({}, ["sft", *FAST, "--base", "nowhere"], ["nowhere", "tiny"]),
    "Hub base": ({}, ["sft", *FAST, "--base", "nobody/nothing"], ["nobody/nothing", "Without a network", "tiny"]),
    "gated base": (
        {},
        ["sft", *FAST, "--base", "meta-llama/Llama-3.2-1B"],
        ["meta-llama/Llama-3.2-1B", "Without a network"],
    ),
    "file as base": ({"m.txt": "x"}, ["sft", *FAST, "--base", "m.txt"], ["m.txt", "a folder or a .gguf file"]),
    "no GGUF file": ({"m.gguf": "x"}, ["sft", *FAST, "--base", "m.gguf"], ["m.gguf", "no GGUF file"]),
    "folder as base": ({"m/x": "x"}, ["sft", *FAST, "--base", "m"], ["m", "config.json"]),
    "adapter as base": ({"m/adapter_config.json": "{}"}, ["sft", *FAST, "--base", "m"], ["adapter", "run's folder"]),
    "cut weights": (dict(cut=5_000_000), ["sft", *FAST, "--base", "b"], ["b", "cannot be loaded"]),
    "weights without end": (dict(cut=4), ["sft", *FAST, "--base", "b"], ["b", "cannot be loaded"]),
    "pickled weights": (
        dict(remove="model.safetensors", add="pytorch_model.bin"),
        ["sft", *FAST, "--base", "b"],
        ["pytorch_model.bin", "pickle", "safetensors"],
    ),
    "no weights": (
        dict(remove="model.safetensors"),
        ["sft", *FAST, "--base", "b"],
        ["b", "no model.safetensors is here"],
    ),
    "wrong tokenizer": (dict(vocab_size=500), ["sft", *FAST, "--base", "b"], ["1,024", "500", "tokenizer"]),
    "other shapes": (
        dict(intermediate_size=512),
        ["sft", *FAST, "--base", "b"],
        ["b: its files are not", "another shape"],
    ),
    "unknown architecture": (dict(model_type="dream"), ["sft", *FAST, "--base", "b"], ["b", "cannot be loaded"]),
    "no tokenizer": (dict(remove="tokenizer.json"), ["sft", *FAST, "--base", "b"], ["b", "cannot be loaded"]),
    "out is a file": ({"out": "mine"}, ["sft", *FAST], ["out", "--out"]),
    "out below a file": ({"f": "mine"}, ["sft", *FAST, "--out", "f/run"], ["f/run", "--out"]),
    "resume nothing": ({}, ["resume", "nowhere"], ["nowhere", "run.json"]),
    "resume broken": ({"r/run.json": "{"}, ["resume", "r"], ["run.json", "JSON"]),
    "chat with a folder of runs": (
        {"q/sft/run.json": "{}"},
        ["chat", "q"],
        ["q: no model is here, but below it are: q/sft"],
    ),
    "resume a folder of runs": (
        {"q/sft/run.json": "{}"},
        ["resume", "q"],
        ["q: no run is here, but there are below it: q/sft"],
    ),
    "chat with a file": ({"d.jsonl": [ROW]}, ["chat", "d.jsonl"], ["d.jsonl", "folder"]),
    "evaluate unknown task": ({}, ["evaluate", "--task", "rouge"], ["rouge", "exact_answer"]),
    "evaluate missing data": ({}, ["evaluate", "--data", "no.jsonl"], ["no.jsonl", "no such file"]),
    "unknown notebook": ({}, ["run", "quickstrat"], ["quickstrat", "Did you mean quickstart?"]),
    "unknown parameter": ({}, ["run", "quickstart", "-p", "steps", "3"], ["steps", "sft_steps (80)"]),
    "parameter of another kind": ({}, ["run", "quickstart", "-p", "seed", "first"], ["seed", "first", "whole number"]),
}
BEGUN = {"reward raises", "reward NaN", "reward text", "reward of wrong length"}  # found out in the first round only


def contents(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


def check(argv: list[str], said: list[str], folder: Path, capsys, begun: bool = False) -> None:
    (folder / "own.jsonl").write_bytes(text([ROW] * 4))
    before = contents(folder)
    capsys.readouterr()
    status = main(argv)
    err = capsys.readouterr().err
    errors = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in err, err
    for words in said:
        assert words in errors[0], (words, errors[0])
    after = contents(folder)
    assert all(after.get(name) == content for name, content in before.items()), "what was there has changed"
    if not begun:
        assert after.keys() == before.keys(), "something was left behind"


@pytest.mark.parametrize("name", DATA)
def test_data(name, tmp_path, monkeypatch, capsys):
    content, more, said = DATA[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(text(content))
    command = ["pretrain", "--max_steps", "1", "--out", "out"] if more is None else ["sft", *FAST, *more]
    check([*command, "--data", name], said, tmp_path, capsys)


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, tmp_path, monkeypatch, capsys):
    files, argv, said = FAULTS[name]
    monkeypatch.chdir(tmp_path)
    if any(k in files for k in ("cut", "remove", "vocab_size", "intermediate_size", "model_type")):
        base(tmp_path / "b", **files)
    else:
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(text(content))
    check(argv, said, tmp_path, capsys, begun=name in BEGUN)
    assert not (tmp_path / "opened").exists() and not (tmp_path / "b/opened").exists()


@pytest.fixture
def stopped(tmp_path) -> Run:
    "A run that was stopped at step 4 of 8, with checkpoints of steps 2 and 4"
    model, tokenizer = load_model("tiny", "none", "fp32", verbose=False)
    run = sft(
        add_lora(model, LoraArgs(r=2)),
        tokenizer,
        load_examples(data_file("sft.jsonl")).select(range(12)),
        SFTArgs(
            max_steps=8,
            batch_size=2,
            max_length=128,
            save_steps=2,
            eval_steps=0,
            sample_steps=0,
            out=str(tmp_path / "run"),
        ),
        live=True,
    )
    while run.step < 3:
        pass
    run.stop()
    run.wait()
    return run


@pytest.mark.parametrize(
    "file", ["trained.safetensors", "optimizer.safetensors", "scheduler.json", "trainer_state.json"]
)
def test_a_checkpoint_with_a_flipped_bit_is_named(stopped, file, capsys):
    "And when it is removed, as the line says, the run goes on from the one before"
    checkpoint, step = stopped.last_checkpoint()
    damaged = checkpoint / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    assert main(["resume", str(stopped.folder)]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(err) == 1 and file in err[0] and f"Remove the folder {checkpoint}" in err[0]
    assert damaged.read_bytes() == bytes(content)
    shutil.rmtree(checkpoint)
    assert main(["resume", str(stopped.folder)]) == 0 and Run.open(stopped.folder).status == "finished"


def test_a_base_that_changed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "b")
    model, tokenizer = load_model("b", "none", "fp32", verbose=False)
    run = sft(
        add_lora(model, LoraArgs(r=2)),
        tokenizer,
        [ROW] * 4,
        SFTArgs(max_steps=500, batch_size=2, eval_steps=0, sample_steps=0, save_steps=0, out="out"),
        live=True,
    )
    while run.step < 1:
        pass
    run.stop()
    run.wait()
    weights = tmp_path / "b/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    check(["resume", "out"], ["b", "not as it was when the run was started"], tmp_path, capsys)


def test_an_unfinished_run_is_not_begun_again(stopped, tmp_path, capsys):
    settings = SFTArgs(**stopped.info["settings"])
    model, tokenizer = load_model("tiny", "none", "fp32", verbose=False)
    with pytest.raises(TinyTrainerError, match="tinytrainer resume"):
        sft(
            add_lora(model, LoraArgs(r=2)), tokenizer, load_examples(data_file("sft.jsonl")).select(range(12)), settings
        )


def test_cuda_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(TinyTrainerError, match="device='cuda' was asked for, but PyTorch sees no GPU"):
        load_model("tiny", device="cuda")


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 3 MB"
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.name == "nt"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 1_500_000], ids=["at the start", "at a checkpoint"])
def test_full_disk(small_disk, tmp_path, room, capsys):
    "A run that finds no room ends in one line; when there is room again it goes on, and ends as it would have"
    command = [
        "--max_steps",
        "6",
        "--batch_size",
        "2",
        "--save_steps",
        "1",
        "--eval_steps",
        "0",
        "--sample_steps",
        "0",
        "--lora_r",
        "2",
        "--quantization",
        "none",
        "--dtype",
        "fp32",
        "--keep_checkpoints",
        "9",
        "--data",
        str(tmp_path / "d.jsonl"),
    ]
    (tmp_path / "d.jsonl").write_bytes(text([ROW | dict(completion=str(i)) for i in range(8)]))
    (small_disk / "filler").write_bytes(b"x" * (3 * 2**20 - 8192 - room))
    capsys.readouterr()
    assert main(["sft", *command, "--out", str(small_disk / "run")]) == 2
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "the disk is full" in errors[0], errors
    (small_disk / "filler").unlink()
    if not room:
        return
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    assert main(["resume", str(small_disk / "run")]) == 0
    assert main(["sft", *command, "--out", str(tmp_path / "whole")]) == 0
    ended = [
        load_file(folder / "adapter/adapter_model.safetensors") for folder in (small_disk / "run", tmp_path / "whole")
    ]
    assert all(torch.equal(x, ended[1][n]) for n, x in ended[0].items())
