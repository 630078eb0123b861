"""A loss or gradient that is no number: the step is left out and said; twice in a row, and the run has failed."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_base

from tinytrainer_nb.all import (
    DPOArgs,
    GRPOArgs,
    LoraArgs,
    PPOArgs,
    PretrainArgs,
    RewardModelArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    add_lora,
    data_file,
    dpo,
    exact_answer,
    grpo,
    load_examples,
    load_model,
    load_prompts,
    ppo,
    pretrain,
    reward_model,
    sft,
)
from tinytrainer_nb.recipes.trainer import RunTrainer

FEW = dict(save_steps=0, eval_steps=0, sample_steps=0, batch_size=2)
ROUNDS = dict(num_generations=2, max_new_tokens=8)
PAIRS = [dict(prompt=f"Say {n}.", chosen=str(n), rejected="no") for n in range(12)]


def examples():
    return load_examples(data_file("heldout.jsonl")).select(range(24))


def broken_base(folder: Path) -> Path:
    "The small base with one number of an MLP that is none"
    folder.mkdir()
    for path in Path(small_base()).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


RECIPES = dict(
    sft=lambda m, t, out: sft(m, t, examples(), SFTArgs(max_steps=4, out=out, **FEW)),
    dpo=lambda m, t, out: dpo(m, t, PAIRS, DPOArgs(max_steps=4, out=out, **FEW)),
    reward_model=lambda m, t, out: reward_model(m, t, PAIRS, RewardModelArgs(max_steps=4, out=out, **FEW)),
    ppo=lambda m, t, out: ppo(
        m, t, load_prompts(data_file("rl.jsonl"))[:8], exact_answer, PPOArgs(max_steps=4, out=out, **FEW, **ROUNDS)
    ),
    grpo=lambda m, t, out: grpo(
        m,
        t,
        load_prompts(data_file("rl.jsonl"))[:8],
        lambda prompt, completion, **row: len(completion),
        GRPOArgs(max_steps=4, out=out, **FEW, **ROUNDS),
    ),
)


def finite(folder: Path) -> bool:
    return all(t.isfinite().all() for path in folder.rglob("*.safetensors") for t in load_file(path).values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_base_with_a_number_that_is_none(recipe, tmp_path):
    model, tokenizer = load_model(broken_base(tmp_path / "base"), "none", "fp32", verbose=False)
    out = str(tmp_path / "run")
    with pytest.raises(TinyTrainerError, match="not finite|no number|NaN") as e:
        RECIPES[recipe](add_lora(model, LoraArgs(r=2)), tokenizer, out)
    assert "\n" not in str(e.value)
    run = Run.open(out)
    assert run.status == "failed" and finite(run.folder)


def spoil(monkeypatch, steps: set):
    "The loss of these steps is NaN"
    plain = RunTrainer.token_loss

    def spoiled(self, *args):
        loss = plain(self, *args)
        return loss * float("nan") if self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(RunTrainer, "token_loss", spoiled)


def test_one_step_is_left_out(tmp_path, monkeypatch):
    spoil(monkeypatch, {2, 4})
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    run = sft(
        add_lora(model, LoraArgs(r=2)), tokenizer, examples(), SFTArgs(max_steps=5, out=str(tmp_path / "run"), **FEW)
    )
    notes = [e["message"] for e in run.events if e["kind"] == "note"]
    assert run.status == "finished" and finite(run.folder)
    assert [n for n in notes if "was left out" in n] == [
        f"step {n} was left out: its gradient is not finite (NaN or infinite)" for n in (2, 4)
    ]


def test_two_in_a_row_end_a_pretraining_and_its_checkpoint_goes_on(tmp_path, monkeypatch):
    "The checkpoint of step 2 is finite; without the fault a resume goes to the end"
    (tmp_path / "text.txt").write_text("A small town by the sea. " * 400)
    args = PretrainArgs(max_steps=6, max_length=64, out=str(tmp_path / "run"), **FEW | dict(save_steps=2))
    with monkeypatch.context() as patch:
        spoil(patch, {3, 4})
        model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
        with pytest.raises(TinyTrainerError, match="step 4: the gradient is not finite .* in 2 steps in a row"):
            pretrain(model, tokenizer, str(tmp_path / "text.txt"), args)
    run = Run.open(tmp_path / "run")
    assert run.status == "failed" and finite(run.folder)
    assert run.resume().status == "finished"


def test_an_evaluation_that_is_none_is_never_the_best(tmp_path, monkeypatch):
    from tinytrainer_nb.recipes import trainer

    plain, scores = trainer.mean_loss, iter([math.nan, 2.0, math.nan, 3.0])
    monkeypatch.setattr(trainer, "mean_loss", lambda *args: plain(*args) * 0 + next(scores))
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    settings = dict(max_steps=4, keep_best=True, eval_rows=4, out=str(tmp_path / "run"))
    run = sft(add_lora(model, LoraArgs(r=2)), tokenizer, examples(), SFTArgs(**FEW | dict(eval_steps=1) | settings))
    assert any("weights of step 2" in e["message"] for e in run.events if e["kind"] == "note")
    assert torch.isfinite(torch.tensor(run.summary["last_loss"]))


def test_fp16_that_overflows_in_every_step_ends_as_failed(tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(1, 41)))
    model, tokenizer = load_model(small_base(), "none", "fp16", verbose=False)
    with pytest.raises(TinyTrainerError, match="step 24: the gradient is not finite .* in 24 steps in a row"):
        sft(
            add_lora(model, LoraArgs(r=2)), tokenizer, examples(), SFTArgs(max_steps=40, out=str(tmp_path / "r"), **FEW)
        )
    assert Run.open(tmp_path / "r").status == "failed" and finite(tmp_path / "r")
