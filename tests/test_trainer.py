"""fp16, the best evaluation, an early end, interrupts, trackers and memory: what a run is promised besides its loss."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_base

from tinytrainer_nb import hardware as core
from tinytrainer_nb.all import (
    LoraArgs,
    PPOArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    add_lora,
    data_file,
    load_examples,
    load_model,
    load_prompts,
    ppo,
    sft,
)
from tinytrainer_nb.core import file_hash, read_json, write_json
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.recipes import arguments as trainer
from tinytrainer_nb.recipes.restore import at_checkpoint, take_step
from tinytrainer_nb.recipes.sft import SFTTrainer
from tinytrainer_nb.recipes.trainer import summarize

SMALL = dict(batch_size=2, max_length=128, warmup_steps=0, eval_steps=0, sample_steps=0, save_steps=0)


def policy(dtype="fp32", **kwargs):
    model, tokenizer = load_model(small_base(), "none", dtype, verbose=False, **kwargs)
    return add_lora(model, LoraArgs(r=2)), tokenizer


def rows(n):
    return load_examples(data_file("sft.jsonl")).select(range(n))


def small_sft(tmp_path, model, tokenizer, n=8, **settings):
    return sft(model, tokenizer, rows(n), SFTArgs(**SMALL | settings, out=str(tmp_path / "run")))


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_fp16_is_scaled_and_adapters_stay_fp32(tmp_path, recipe):
    """The loss is scaled before the backward pass; trained tensors, gradients and optimiser are fp32; loss and
    gradient are those of fp32"""
    figures = {}
    for dtype in ("fp32", "fp16"):
        model, tokenizer = policy(dtype)
        if recipe == "sft":
            run = sft(model, tokenizer, rows(8), SFTArgs(**SMALL, max_steps=2, out=str(tmp_path / dtype)))
        else:
            run = ppo(
                model,
                tokenizer,
                load_prompts(data_file("rl.jsonl"))[:4],
                "reference_overlap",
                PPOArgs(
                    **SMALL | dict(batch_size=2),
                    max_steps=1,
                    num_generations=2,
                    max_new_tokens=8,
                    minibatches=2,
                    out=str(tmp_path / dtype),
                ),
            )
        assert all(p.dtype == torch.float32 for p in trainable(model).values())
        figures[dtype] = next(e for e in run.events if e["kind"] == "metrics")
    if recipe == "sft":
        assert figures["fp16"]["loss"] == pytest.approx(figures["fp32"]["loss"], rel=0.01)
    # PPO's completions may differ; a scale left in the gradient would make it 65,536
    ratio = figures["fp16"]["grad_norm"] / figures["fp32"]["grad_norm"]
    assert 0.97 < ratio < 1.03 if recipe == "sft" else 0.2 < ratio < 5


def test_fp16_leaves_out_a_step_that_overflows(tmp_path, monkeypatch):
    "An infinite gradient changes no weight and halves the scale; the next step trains"
    seen, original = {}, SFTTrainer._maybe_log_save_evaluate

    def look(self, *args, **kwargs):
        seen[self.state.global_step] = (
            self.accelerator.scaler.get_scale(),
            {n: p.detach().clone() for n, p in trainable(self.model).items()},
        )
        return original(self, *args, **kwargs)

    backward = SFTTrainer.backward

    def overflow(self, *args, **kwargs):
        loss = backward(self, *args, **kwargs)
        if self.state.global_step == 1:
            next(iter(trainable(self.model).values())).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(SFTTrainer, "_maybe_log_save_evaluate", look)
    monkeypatch.setattr(SFTTrainer, "backward", overflow)
    small_sft(tmp_path, *policy("fp16"), max_steps=3)
    (scale, first), (halved, second), (_, third) = seen.values()
    assert halved == scale / 2
    assert all(torch.equal(first[n], second[n]) for n in first) and any(
        not torch.equal(second[n], third[n]) for n in first
    )


def test_best_evaluation_is_the_result(tmp_path):
    """A learning rate that ruins the model: the result has the weights of the evaluation with the lowest loss, and
    the journal says so"""
    model, tokenizer = policy()
    run = small_sft(
        tmp_path,
        model,
        tokenizer,
        n=30,
        max_steps=6,
        learning_rate=0.05,
        schedule="constant",
        eval_steps=1,
        keep_best=True,
    )
    steps, losses = run.history("loss", "evaluation")
    best = steps[losses.index(min(losses))]
    assert best < 6 and any(f"the weights of step {best}" in e.get("message", "") for e in run.events)
    kept = load_file(run.folder / "checkpoints/best/trained.safetensors")
    assert all(torch.equal(p, kept[n]) for n, p in trainable(model).items())
    again, _ = load_model(run.folder, verbose=False)
    saved = trainable(again)
    assert all(torch.equal(saved[n], kept[n]) for n in kept)


def test_patience_ends_a_run_early(tmp_path):
    run = small_sft(tmp_path, *policy(), n=30, max_steps=40, learning_rate=0.3, eval_steps=1, patience=2)
    losses = run.history("loss", "evaluation")[1]
    assert run.status == "finished" and run.summary["steps"] == losses.index(min(losses)) + 3 < 40
    assert any("ended early" in e.get("message", "") for e in run.events)


@pytest.mark.parametrize(
    "settings, said",
    [(dict(keep_best=True), "eval_steps=0 makes none"), (dict(patience=2, eval_steps=1), "no row is held back")],
)
def test_best_needs_evaluations(tmp_path, settings, said):
    with pytest.raises(TinyTrainerError, match=said):
        small_sft(tmp_path, *policy(), **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, said", [("mlflow", "must be none, or some of"), ("wandb", "pip install wandb")])
def test_trackers_that_cannot_work_are_refused(monkeypatch, name, said):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)  # as where none is installed
    with pytest.raises(TinyTrainerError, match=said):
        SFTArgs(report_to=name)


def test_interrupt_keeps_model_and_run(tmp_path):
    """The interrupt of a blocking cell comes after the step: the model is that of the last checkpoint, and the
    resumed run ends as if nothing had been"""
    settings = dict(max_steps=6, learning_rate=1e-3, n=8)
    whole, tokenizer = policy()
    small_sft(tmp_path / "whole", whole, tokenizer, **settings)
    model, tokenizer = policy()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored

    def interrupt():
        events = tmp_path / "cut/run/events.jsonl"
        while not events.exists() or '"step": 2, "kind": "metrics"' not in events.read_text(encoding="utf8"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            small_sft(tmp_path / "cut", model, tokenizer, **settings)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, handler)
    run = Run.open(tmp_path / "cut/run")
    checkpoint, step = run.last_checkpoint()
    assert run.status == "interrupted" and 2 <= step < 6
    kept = load_file(checkpoint / "trained.safetensors")
    assert all(torch.equal(p, kept[n]) for n, p in trainable(model).items())
    run.resume()
    ended = (
        load_file(run.folder / "adapter/adapter_model.safetensors"),
        load_file(tmp_path / "whole/run/adapter/adapter_model.safetensors"),
    )
    assert all(torch.equal(x, ended[1][n]) for n, x in ended[0].items())


def test_tensorboard_gets_the_journal(tmp_path):
    "Off by default; asked for, the tracker has every step's figures and the evaluations, as the journal has them"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run = small_sft(tmp_path, *policy(), n=30, max_steps=3, eval_steps=3, report_to="tensorboard")
    files = list(run.folder.rglob("events.out.tfevents*"))
    assert len(files) == 1
    told = accumulator(str(files[0].parent))
    told.Reload()
    for name, tag in dict(loss="train/loss", learning_rate="train/learning_rate", tokens="train/tokens").items():
        assert [e.value for e in told.Scalars(tag)] == pytest.approx(run.history(name)[1]), tag
    assert [e.value for e in told.Scalars("eval/loss")] == pytest.approx(run.history("loss", "evaluation")[1])
    small_sft(tmp_path / "quiet", *policy(), max_steps=1)
    assert not list((tmp_path / "quiet").rglob("*tfevents*"))


def test_a_gpu_that_is_not_used_is_told(monkeypatch, capsys):
    "An NVIDIA GPU beside a CPU build of torch: the cure is named; so is it where CUDA is asked for"
    monkeypatch.setattr(core.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load_model(small_base(), "none", "fp32")
    out, err = capsys.readouterr()
    assert (
        err.count("\n") == 1
        and "is a CPU build: `pip install" in err
        and "whl/cu" in err
        and "is a CPU build" not in out
    )
    with pytest.raises(TinyTrainerError, match="PyTorch sees no GPU here .*is a CPU build"):
        load_model(small_base(), device="cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert core.unused_gpu() == ""


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="this machine offers no large pages"
)
def test_large_tensors_lie_in_large_pages():
    program = (
        "import tinytrainer_nb, torch; x = torch.ones(2**24); print(*[line.split()[1] for line in "
        "open('/proc/self/smaps_rollup') if line.startswith('AnonHugePages')])"
    )

    def large(**environment) -> int:  # KiB
        clean = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        return int(subprocess.check_output([sys.executable, "-c", program], env=clean | environment, text=True))

    assert large() > 2**16 / 2  # of 64 MiB
    if "[madvise]" in LARGE_PAGES.read_text():
        assert large(THP_MEM_ALLOC_ENABLE="0") < 2**16 / 2  # the setting is what does it


def test_another_program_does_not_choose_the_number_format(monkeypatch):
    "Of 40 ms it slows this one down tenfold for 30; a product of 1 ms in fp32 takes 0.2 ms in bf16"
    now = 0.0

    def product(x, w):
        nonlocal now
        now += (1e-3 if x.dtype == torch.float32 else 2e-4) * (10 if now % 0.04 < 0.03 else 1)

    monkeypatch.setattr(core.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    in_turns, apart = [], []
    for begins in range(40):
        now = begins / 1000
        full, half = core.matmul_seconds(torch.float32, torch.bfloat16)
        in_turns.append(full / half)
        now = begins / 1000
        (full,), (half,) = (core.matmul_seconds(d, patience=0) for d in (torch.float32, torch.bfloat16))
        apart.append(full / half)
    assert in_turns == pytest.approx([5] * 40)
    assert min(apart) < 1, "a program that would disturb nobody"


@pytest.mark.parametrize(
    "bf16, amx, model, dtype",
    [
        (False, False, "Intel(R) Core(TM) i5", torch.float32),
        (True, True, "Intel(R) Xeon(R) Processor", torch.bfloat16),
        (True, False, "AMD EPYC", torch.bfloat16),
        # AVX512-BF16 without AMX: half as fast as fp32 on Intel's processors, so a slow product is no accident
        (True, False, "Intel(R) Xeon(R) Processor", torch.float32),
    ],
)
def test_a_processor_with_fast_instructions_computes_in_bf16_however_busy(monkeypatch, bf16, amx, model, dtype):
    monkeypatch.setattr(core, "_bf16_gain", lambda threads: 0.6)
    monkeypatch.setattr(core, "_cpu_model", lambda: model)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    assert core.probe_dtype("cpu")[0] == dtype
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert core.probe_dtype("cpu")[0] == torch.float32, "hidden, as for the measurements of older processors"


def test_the_speed_is_that_of_steps_that_tell_it(tmp_path):
    "A journal of another program may lack tokens or seconds; the end of a run looks at both"
    run = Run.create(tmp_path / "run", "sft", SFTArgs(), may_change=[])
    figures = [{}, dict(tokens=10, seconds=9.0), dict(tokens=30), dict(seconds=1.0), dict(tokens=50, seconds=4.0), {}]
    for step, told in enumerate(figures, 1):
        run.log("metrics", step, loss=1.0, **told)
    found = summarize(run, "finished", 6, 1, 2.0, "cpu")
    assert found["tokens_per_s"] == 10.0 and found["tokens"] == 50 and found["first_loss"] == 1.0
    empty = Run.create(tmp_path / "empty", "sft", SFTArgs(), may_change=[])
    empty.log("metrics", 1, loss=1.0)
    found = summarize(empty, "finished", 1, 1, 2.0, "cpu")
    assert found["tokens_per_s"] is None and found["tokens"] == 0


def rewritten(checkpoint: Path, change) -> None:
    "Other tensors in a checkpoint, with the hash that is noted for them"
    path, progress = checkpoint / "trained.safetensors", read_json(checkpoint / "progress.json")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    write_json(checkpoint / "progress.json", progress | dict(sha256=progress["sha256"] | {path.name: file_hash(path)}))


def one_of(tensors: dict, change) -> dict:
    name = next(name for name in tensors if "lora_A" in name)
    return tensors | {name: change(tensors[name])}


STEPS = {  # what is done to a checkpoint, and what both ways to it say
    "cut off": (lambda at: (at / "trained.safetensors").write_bytes(b"\0" * 9), "is not as it was written"),
    "gone": (lambda at: (at / "trained.safetensors").unlink(), "is not as it was written"),
    "no hash": (
        lambda at: write_json(at / "progress.json", read_json(at / "progress.json") | dict(sha256={})),
        "as it was",
    ),
    "no progress": (lambda at: (at / "progress.json").unlink(), "progress.json: is not there"),
    "a tensor less": (lambda at: rewritten(at, lambda t: dict(list(t.items())[1:])), "lacks|holds other tensors"),
    "a row that could be repeated": (lambda at: rewritten(at, lambda t: one_of(t, lambda x: x[:1])), "has the shape"),
    "NaN": (lambda at: rewritten(at, lambda t: one_of(t, lambda x: x * float("nan"))), "values that are not finite"),
}


@pytest.mark.parametrize("how", STEPS)
def test_a_checkpoint_that_is_not_whole_is_taken_by_nobody(tmp_path, how):
    "Neither by a resume nor for a chat; and a model at hand keeps its numbers"
    model, tokenizer = policy()
    run = small_sft(tmp_path, model, tokenizer, max_steps=2, save_steps=1)
    checkpoint, before = run.last_checkpoint()[0], {n: p.clone() for n, p in trainable(model).items()}
    take_step(model, checkpoint)
    damage, said = STEPS[how]
    damage(checkpoint)
    for taken in (lambda: take_step(model, checkpoint), lambda: at_checkpoint(run, checkpoint)):
        with pytest.raises(TinyTrainerError, match=said):
            taken()
    assert all(torch.equal(p, before[n]) for n, p in trainable(model).items())
    write_json(
        run.folder / "run.json", run.info | dict(status="stopped", settings=run.info["settings"] | dict(max_steps=3))
    )
    with pytest.raises(TinyTrainerError, match=said):
        Run.open(run.folder).resume()
