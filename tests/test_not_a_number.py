"""A loss or gradient that is no number: the step is left out and said; twice in a row, and the run has failed."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import small_base

from tinytrainer_nb.all import (
    DPOArgs,
    GenerateArgs,
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
    evaluate,
    exact_answer,
    generate,
    grpo,
    load_examples,
    load_model,
    load_prompts,
    ppo,
    pretrain,
    reward_model,
    sft,
    stream,
)
from tinytrainer_nb.core import file_hash, write_json
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.recipes.trainer import RunTrainer

FEW = dict(save_steps=0, eval_steps=0, sample_steps=0, batch_size=2)
ROUNDS = dict(num_generations=2, max_new_tokens=8)
PAIRS = [dict(prompt=f"Say {n}.", chosen=str(n), rejected="no") for n in range(12)]


def examples():
    return load_examples(data_file("heldout.jsonl")).select(range(24))


UP = "model.layers.1.mlp.up_proj.weight"


def broken_base(value: float = math.nan) -> tuple:
    "The small base with one number of an MLP that is none, and its tokenizer"
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    with torch.no_grad():
        model.get_parameter(UP)[0, 0] = value
    return model, tokenizer


def policy() -> tuple:
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    return add_lora(model, LoraArgs(r=2)), tokenizer


def notes(run: Run, part: str = "") -> list[str]:
    return [e["message"] for e in run.events if e["kind"] == "note" and part in e["message"]]


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
    model, tokenizer = broken_base()
    del model.as_loaded  # else the base is refused for having changed in memory
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


@pytest.mark.parametrize("recipe, value", zip(RECIPES, [math.nan, math.inf, -math.inf] * 2))
def test_an_adapter_that_is_none_is_refused_before_a_run_is_made(recipe, value, tmp_path):
    model, tokenizer = policy()
    with torch.no_grad():
        list(trainable(model).values())[-1].view(-1)[-1] = value
    with pytest.raises(TinyTrainerError, match="values that are not finite"):
        RECIPES[recipe](model, tokenizer, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def whole(model, tokenizer, out: str, text: Path):
    text.write_text("A small town by the sea. " * 400)
    return pretrain(model, tokenizer, str(text), PretrainArgs(max_steps=1, max_length=64, out=out, **FEW))


@pytest.mark.parametrize("recipe", ["sft", "pretrain"])
@pytest.mark.parametrize("save_steps", [0, 1])
def test_a_run_whose_only_step_is_left_out_has_failed(recipe, save_steps, tmp_path, monkeypatch):
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    spoil(monkeypatch, {1})
    out = str(tmp_path / "run")
    monkeypatch.setitem(FEW, "save_steps", save_steps)
    with pytest.raises(TinyTrainerError, match="step 1: the gradient is not finite .* in every step of this run"):
        if recipe == "pretrain":
            whole(model, tokenizer, out, tmp_path / "text.txt")
        else:
            sft(add_lora(model, LoraArgs(r=2)), tokenizer, examples(), SFTArgs(max_steps=1, out=out, **FEW))
    run = Run.open(out)
    assert run.status == "failed" and not run.summary and not run.checkpoints()


def test_steps_that_all_overflow_in_fp16_are_no_training(tmp_path, monkeypatch):
    "Fewer than those with which a run ends; one that was taken is enough"
    spoil(monkeypatch, {1, 2, 3})
    for steps in (3, 4):
        model, tokenizer = load_model(small_base(), "none", "fp16", verbose=False)
        args = SFTArgs(max_steps=steps, out=str(tmp_path / str(steps)), **FEW)
        if steps == 4:
            run = sft(add_lora(model, LoraArgs(r=2)), tokenizer, examples(), args)
            assert run.status == "finished" and len(notes(run, "was left out")) == 3
            continue
        with pytest.raises(TinyTrainerError, match="in every step of this run"):
            sft(add_lora(model, LoraArgs(r=2)), tokenizer, examples(), args)


def interrupted(out: Path, last: int) -> Path:
    "A run of four steps that was interrupted after step `last`; its newest checkpoint"
    sft(*policy(), examples(), SFTArgs(max_steps=4, out=str(out), **FEW | dict(save_steps=1)))
    for step in range(last + 1, 5):
        shutil.rmtree(out / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
    for path in (out / "adapter", out / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(out / "run.json", json.loads((out / "run.json").read_text()) | dict(status="interrupted"))
    return out / "checkpoints" / f"step-{last:06d}"


def rehashed(checkpoint: Path, name: str) -> None:
    "As if the training itself had written this file"
    progress = json.loads((checkpoint / "progress.json").read_text())
    progress["sha256"][name] = file_hash(checkpoint / name)
    write_json(checkpoint / "progress.json", progress)


def spoil_weights(checkpoint: Path, value: float) -> None:
    tensors = load_file(checkpoint / "trained.safetensors")
    tensors[sorted(tensors)[0]].view(-1)[0] = value
    save_file(tensors, checkpoint / "trained.safetensors")
    rehashed(checkpoint, "trained.safetensors")


def spoil_optimizer(checkpoint: Path, value: float, only: str = "exp_avg_sq") -> None:
    file = checkpoint / "optimizer.safetensors"
    with safe_open(file, "pt") as f:
        saved, about = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    for name, tensor in saved.items():
        if name.endswith((f"|{only}", "|exp_avg_sq")):
            tensor.fill_(value)
    save_file(saved, file, metadata=about)
    rehashed(checkpoint, file.name)


@pytest.mark.parametrize(
    "what, last",
    [
        ("nan weights", 2),
        ("nan weights", 3),
        ("inf weights", 4),
        ("inf state", 2),
        ("inf state", 3),
        ("inf moments", 3),
    ],
)
def test_a_checkpoint_with_numbers_that_are_none(what, last, tmp_path):
    "It is named, nothing is written from it, and without it the run goes on"
    checkpoint = interrupted(tmp_path / "run", last)
    if "weights" in what:
        spoil_weights(checkpoint, math.nan if "nan" in what else math.inf)
    else:
        spoil_optimizer(checkpoint, math.inf, "exp_avg" if "moments" in what else "exp_avg_sq")
    run = Run.open(tmp_path / "run")
    with pytest.raises(TinyTrainerError, match=f"step-{last:06d}.*values that are not finite.*Remove the folder") as e:
        run.resume()
    assert "\n" not in str(e.value) and run.status == "failed" and not (run.folder / "adapter").exists()
    shutil.rmtree(checkpoint)
    assert run.resume().status == "finished" and finite(run.folder)


@pytest.mark.parametrize("save_steps", [0, 1])
def test_weights_that_become_none_are_not_saved(save_steps, tmp_path, monkeypatch):
    "In the last step, behind the look at the gradient: the checkpoint before is the last one, and nothing is a result"
    from tinytrainer_nb.recipes import trainer

    plain = trainer.RunTrainer.log

    def spoiled(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.state.global_step == 3:
            with torch.no_grad():
                next(iter(trainable(self.model).values())).view(-1)[0] = math.inf

    with monkeypatch.context() as m:
        m.setattr(trainer.RunTrainer, "log", spoiled)
        args = SFTArgs(max_steps=3, out=str(tmp_path / "run"), **FEW | dict(save_steps=save_steps))
        with pytest.raises(TinyTrainerError, match="step 3: .* values that are not finite"):
            sft(*policy(), examples(), args)
    run = Run.open(tmp_path / "run")
    assert run.status == "failed" and not (run.folder / "adapter").exists() and finite(run.folder)
    assert [step for _, step in run.checkpoints()] == [1, 2][: 2 * save_steps]
    assert run.resume().status == "finished"


@pytest.mark.parametrize("clip", [1.0, 1e30])
def test_a_gradient_whose_length_is_infinite(clip, tmp_path, monkeypatch):
    "Each of its numbers is finite, their squares' sum is not: said, not passed off as a step"
    plain = RunTrainer.token_loss
    monkeypatch.setattr(RunTrainer, "token_loss", lambda self, *args: plain(self, *args) * 1e25)
    model, tokenizer = policy()
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    with pytest.raises(TinyTrainerError, match="step 2: the gradient is not finite .* in 2 steps in a row"):
        args = SFTArgs(max_steps=4, max_grad_norm=clip, out=str(tmp_path / "run"), **FEW)
        sft(model, tokenizer, examples(), args)
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


def nan_losses(monkeypatch, *values):
    "The evaluations' losses: these, and NaN ever after"
    from tinytrainer_nb.recipes import trainer

    given = iter(values)
    monkeypatch.setattr(trainer, "mean_loss", lambda *args: next(given, math.nan))


@pytest.mark.parametrize("settings, steps", [(dict(patience=2), 2), (dict(keep_best=True), 6), ({}, 6)])
def test_evaluations_that_are_all_none(settings, steps, tmp_path, monkeypatch):
    "Each is said; patience counts them as worse; the result has the last weights, which is said with keep_best"
    nan_losses(monkeypatch)
    args = SFTArgs(max_steps=6, eval_rows=4, out=str(tmp_path / "run"), **FEW | dict(eval_steps=1) | settings)
    run = sft(*policy(), examples(), args)
    assert run.status == "finished" and run.step == steps
    assert len(notes(run, "the evaluation is not finite")) == steps
    assert len(notes(run, "ended early: none of the 2 evaluations was finite")) == ("patience" in settings)
    assert len(notes(run, "the result has the last weights")) == ("keep_best" in settings)


def test_patience_over_evaluations_that_are_none_outlives_a_resume(tmp_path, monkeypatch):
    nan_losses(monkeypatch)
    settings = FEW | dict(eval_steps=1, save_steps=1)
    args = SFTArgs(max_steps=8, eval_rows=4, patience=4, out=str(tmp_path / "run"), **settings)
    run = sft(*policy(), examples(), args)
    assert run.step == 4
    for step in (3, 4):
        shutil.rmtree(run.folder / "checkpoints" / f"step-{step:06d}")
    write_json(run.folder / "run.json", run.info | dict(status="interrupted"))
    assert Run.open(run.folder).resume().status == "finished" and run.step == 4


def test_one_finite_evaluation_among_others_is_the_best(tmp_path, monkeypatch):
    nan_losses(monkeypatch, math.nan, 2.0)
    settings = FEW | dict(eval_steps=1)
    args = SFTArgs(max_steps=8, eval_rows=4, patience=2, keep_best=True, out=str(tmp_path / "run"), **settings)
    run = sft(*policy(), examples(), args)
    assert run.step == 4 and notes(run, "the result has the weights of step 2") and notes(run, "ended early: the evalu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_with_a_number_that_is_none_does_not_answer(value):
    "Whether drawn or not, whole or in pieces; nor is what it says scored"
    model, tokenizer = broken_base(value)
    for temperature in (0.0, 1.0):
        args = GenerateArgs(max_new_tokens=4, temperature=temperature, num_generations=1)
        for answer in (
            lambda: generate(model, tokenizer, ["Hello", "A"], args, quiet=True),
            lambda: list(stream(model, tokenizer, "Hello", args)),
        ):
            with pytest.raises(TinyTrainerError, match="no number") as e:
                answer()
            assert "\n" not in str(e.value)
    with pytest.raises(TinyTrainerError, match="no number"):
        evaluate(model, tokenizer, [dict(prompt="A", completion="B")] * 4, "length", max_new_tokens=4)


def copied(folder: Path, name: str, value: float, dtype=None) -> Path:
    "The small base's folder with one number of a tensor that is none"
    shutil.copytree(small_base(), folder)
    tensors = {n: t.to(dtype) if dtype else t for n, t in load_file(folder / "model.safetensors").items()}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_folder_with_a_number_that_is_none_is_not_loaded(name, value, tmp_path):
    folder = copied(tmp_path / "base", name, value)
    with pytest.raises(TinyTrainerError, match=f"{name} holds values that are not finite"):
        load_model(folder, "none", "fp32", verbose=False)


def test_large_numbers_are_loaded(tmp_path):
    "Whose sum is beyond what fp16 holds, and no number of which is"
    folder = copied(tmp_path / "base", UP, 60000.0, torch.float16)
    tensors = load_file(folder / "model.safetensors")
    tensors[UP].fill_(60000.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(folder, "none", "fp16", verbose=False)


def test_a_run_whose_model_holds_a_number_that_is_none(tmp_path):
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    run = whole(model, tokenizer, str(tmp_path / "run"), tmp_path / "text.txt")
    (path,) = (run.folder / "model").glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TinyTrainerError, match="model.norm.weight holds values that are not finite"):
        load_model(run.folder / "model", verbose=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_without_an_adapter_is_refused_before_a_run_is_made(recipe, tmp_path):
    "All weights are trained by pretraining alone; frozen ones by nobody"
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    for trained, said in ((True, "all its weights are trained by pretrain only"), (False, "nothing of this model")):
        with pytest.raises(TinyTrainerError, match=f"{said}.*add_lora"):
            RECIPES[recipe](model.requires_grad_(trained), tokenizer, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


WHOLE = {
    "an adapter": ("none", lambda m: add_lora(m, LoraArgs(r=2)), "this model has an adapter"),
    "an adapter below the bare model": (
        "none",
        lambda m: (add_lora(m, LoraArgs(r=2)), m)[1],
        "this model has an adapter",
    ),
    "4 bits": ("nf4", lambda m: m, "stored as nf4"),
    "8 bits": ("int8", lambda m: m, "stored as int8"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_pretraining_refuses_what_cannot_be_trained_whole(case, tmp_path):
    "Before a folder is made, and the model stays as it was"
    quantization, put_on, said = WHOLE[case]
    model, tokenizer = load_model(small_base(), quantization, "bf16", verbose=False)
    before = {name: p.dtype for name, p in model.named_parameters()}
    with pytest.raises(TinyTrainerError, match=said):
        whole(put_on(model), tokenizer, str(tmp_path / "run"), tmp_path / "text.txt")
    assert not (tmp_path / "run").exists()
    if "bits" in case:
        assert before == {name: p.dtype for name, p in model.named_parameters()}


def test_weights_that_have_no_room_end_the_pretraining_as_failed(tmp_path, monkeypatch):
    model, tokenizer = load_model(small_base(), "none", "bf16", verbose=False)

    def full(self):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(type(model), "float", full)
    with pytest.raises(RuntimeError, match="not enough memory"):
        whole(model, tokenizer, str(tmp_path / "run"), tmp_path / "text.txt")
    assert Run.open(tmp_path / "run").status == "failed"
