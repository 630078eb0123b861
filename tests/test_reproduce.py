"""The command that a run prints makes an equal run, executed; where no command can, it is said why."""

import json
import shlex
from pathlib import Path

import pytest
from small import small_base

from tinytrainer_nb.all import (
    DPOArgs,
    LoraArgs,
    PPOArgs,
    PretrainArgs,
    Run,
    SFTArgs,
    TinyLoraArgs,
    TinyTrainerError,
    add_lora,
    add_tinylora,
    as_command,
    data_file,
    dpo,
    load_examples,
    load_model,
    load_prompts,
    model_reward,
    new_model,
    ppo,
    pretrain,
    reward_model,
    sft,
    stack_adapter,
)
from tinytrainer_nb.cli import main
from tinytrainer_nb.recipes.rewards import exact_answer, find_reward

SMALL = dict(save_steps=0, eval_steps=0, sample_steps=0)
ROUNDS = dict(max_steps=1, batch_size=2, num_generations=2, max_new_tokens=8, **SMALL)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(run: Run) -> bytes:
    return next(
        p
        for p in (run.folder / "adapter" / "adapter_model.safetensors", run.folder / "model" / "model.safetensors")
        if p.exists()
    ).read_bytes()


def again(run: Run) -> Run:
    "The run that its command makes"
    words = shlex.split(as_command(run))
    assert words[0] == "tinytrainer" and main(words[1:]) == 0
    return Run(max(run.folder.parent.glob(f"{run.folder.name}-*"), key=lambda p: p.stat().st_mtime))


def model(quantization="none", **lora):
    base, tokenizer = load_model(small_base(), quantization=quantization, verbose=False)
    return add_lora(base, LoraArgs(r=4, **lora)), tokenizer


def test_data_columns_quantization_and_adapter():
    rows = [dict(frage=f"What is {n} + 1?", antwort=str(n + 1)) for n in range(30)]
    Path("lessons.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    examples = load_examples("lessons.jsonl", columns=dict(prompt="frage", completion="antwort"))
    run = sft(*model("nf4", layers="1", alpha=8.0), examples, SFTArgs(max_steps=2, batch_size=4, out="runs/a", **SMALL))
    command = as_command(run)
    for words in (
        "--data lessons.jsonl",
        "--columns prompt=frage,completion=antwort",
        "--quantization nf4",
        "--lora_layers 1",
        "--lora_alpha 8.0",
    ):
        assert words in command
    second = again(run)
    assert weights(second) == weights(run)
    assert as_command(second).replace("--out runs/a-2", "--out runs/a") == command


@pytest.mark.slow
def test_a_run_as_base_and_a_reward_from_a_file_that_is_executed_once():
    first = sft(*model(), str(data_file("heldout.jsonl")), SFTArgs(max_steps=2, batch_size=4, out="first", **SMALL))
    Path("judge.py").write_text(
        "open('executed', 'a').write('x')\ndef short(prompt, completion, **row): return -float(len(completion))\n"
    )
    rounds = [word for name, value in ROUNDS.items() for word in (f"--{name}", str(value))]
    assert main(["ppo", "--base", "first", "--reward", "judge.py:short", "--out", "second", *rounds]) == 0
    assert Path("executed").read_text() == "x"
    run = Run.open("second")
    told = run.info["reward"]
    assert (told["kind"], told["spec"], told["names"]) == ("file", "judge.py:short", ["short"]) and told["code"][
        "short"
    ]
    assert "--base first" in as_command(run)
    assert weights(again(run)) == weights(run)
    assert weights(run) != weights(first)
    assert main(["evaluate", "--task", "judge.py:short", "--limit", "2", "--max_new_tokens", "4", "--json"]) == 0
    assert Path("executed").read_text() == "xxx"


@pytest.mark.slow
def test_python_that_trains_on_from_a_model_in_memory():
    "The model that SFT has trained is the base of PPO: its command names the first run"
    policy, tokenizer = model()
    sft(policy, tokenizer, str(data_file("heldout.jsonl")), SFTArgs(max_steps=2, batch_size=4, out="first", **SMALL))
    run = ppo(policy, tokenizer, str(data_file("rl.jsonl")), exact_answer, PPOArgs(out="second", **ROUNDS))
    assert "--base first" in as_command(run) and "--reward exact_answer" in as_command(run)
    assert weights(again(run)) == weights(run)


def test_pretraining_from_nothing():
    Path("texts").mkdir()
    for i in range(3):
        Path(f"texts/{i}.txt").write_text(" ".join(f"A small town number {n} by the sea." for n in range(i, 400 + i)))
    small = "--max_steps 1 --batch_size 1 --max_length 64 --eval_steps 0 --sample_steps 0 --save_steps 0 --seed 3"
    assert main(["pretrain", "--base", "new:tiny", "--data", "texts", *small.split(), "--out", "p"]) == 0
    run = Run.open("p")
    assert "--base new:tiny" in as_command(run) and "--quantization" not in as_command(run)
    assert weights(again(run)) == weights(run)


def test_pairs():
    Path("pairs.jsonl").write_text(
        "".join(json.dumps(dict(prompt=f"Say {n}.", chosen=str(n), rejected="no")) + "\n" for n in range(12))
    )
    run = dpo(*model(), "pairs.jsonl", DPOArgs(max_steps=1, batch_size=2, out="d", **SMALL))
    assert weights(again(run)) == weights(run)


def refused(run: Run, words: str) -> None:
    with pytest.raises(TinyTrainerError, match=words):
        as_command(run)


def test_what_no_command_can_repeat_is_said():
    args = lambda out, **more: SFTArgs(max_steps=1, batch_size=2, out=out, **SMALL, **more)
    table = load_examples(str(data_file("heldout.jsonl")))
    refused(sft(*model(), table.to_list()[:8], args("list")), "data, which were a list or a table in memory")
    refused(sft(*model(), table.select(range(40)), args("part")), "in memory")  # a part of the file is not the file
    refused(sft(*model(), table, args("seed", seed=3)), "drawn with seed 0, and a command draws it with the run's, 3")
    base, tokenizer = load_model(small_base(), quantization="none", verbose=False)
    refused(
        sft(add_tinylora(base, TinyLoraArgs()), tokenizer, table, args("few")),
        "its adapter is none that a command makes",
    )
    first, tokenizer = load_model("seed", verbose=False)
    refused(sft(stack_adapter(first, LoraArgs(r=2)), tokenizer, table, args("stack")), "none that a command makes")
    refused(
        ppo(
            *model(), str(data_file("rl.jsonl")), lambda prompt, completion, **row: 1.0, PPOArgs(out="lambda", **ROUNDS)
        ),
        "no command can name its reward",
    )
    prompts = load_prompts(str(data_file("rl.jsonl")))
    refused(ppo(*model(), prompts[:20], "exact_answer", PPOArgs(out="some", **ROUNDS)), "in memory")


def test_a_reward_model_has_no_command():
    Path("pairs.jsonl").write_text(
        "".join(json.dumps(dict(prompt=f"Say {n}.", chosen=str(n), rejected="no")) + "\n" for n in range(12))
    )
    from tinytrainer_nb.all import RewardModelArgs

    run = reward_model(*model(), "pairs.jsonl", RewardModelArgs(max_steps=1, batch_size=2, out="judge", **SMALL))
    refused(run, "no command takes RewardModelArgs")
    told = find_reward(model_reward("judge")).record
    assert (told["kind"], told["spec"], told["names"]) == ("function", "", ["judge"]) and told["code"]["judge"]


def test_a_resume_wants_the_same_reward():
    run = ppo(
        *model(), str(data_file("rl.jsonl")), "exact_answer", PPOArgs(out="r", **ROUNDS | dict(max_steps=2)), live=True
    )
    run.stop()
    run.wait()
    with pytest.raises(TinyTrainerError, match="its reward was exact_answer; length is another one"):
        Run.open("r").resume(reward="length")
    assert Run.open("r").resume().status == "finished"


def test_a_new_model_of_another_seed_has_no_command():
    "A command draws it with the run's seed; one that is fine-tuned is never drawn by a command"
    settings = dict(max_steps=1, batch_size=1, max_length=32, **SMALL)
    Path("text.txt").write_text("A small town by the sea. " * 40)
    _, tokenizer = load_model("tiny", "none", verbose=False)
    run = pretrain(new_model("tiny", seed=7), tokenizer, "text.txt", PretrainArgs(seed=0, out="other", **settings))
    with pytest.raises(TinyTrainerError, match="its model was drawn with seed 7, and a command .* the run's, 0"):
        as_command(run)
    run = pretrain(new_model("tiny", seed=7), tokenizer, "text.txt", PretrainArgs(seed=7, out="same", **settings))
    words = shlex.split(as_command(run))
    assert words[words.index("--base") + 1] == "new:tiny" and words[words.index("--seed") + 1] == "7"
    load = run.info["load"] | dict(adapter_from=dict(lora=dict(r=2), seed=7))
    tuned = Run.create("tuned", "sft", SFTArgs(seed=7), load=load, may_change=[])
    with pytest.raises(TinyTrainerError, match="its base is an untrained model \\(new:tiny\\)"):
        as_command(tuned)
