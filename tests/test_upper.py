"""Adapters on upper layers, with the hidden states below them computed once and kept on disk: the loss, the gradients
and the result are those of the whole model, through kills too."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tinytrainer_nb.recipes.train  # noqa: F401 (gives runs their resume)
from tinytrainer_nb.compute import lower_states as upper
from tinytrainer_nb.compute.arguments import GenerateArgs
from tinytrainer_nb.compute.generate import generate
from tinytrainer_nb.compute.lower_states import (
    Hidden,
    UpperCollator,
    first_trained_layer,
    hidden_bytes,
    lower_states,
    starting_at,
)
from tinytrainer_nb.compute.thin import thin_adapters
from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.data.formats import load_examples
from tinytrainer_nb.data.tokens import Collator, encode_chat, pack_row
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.base import compute_context
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora, stack_adapter
from tinytrainer_nb.model.tinylora import add_tinylora
from tinytrainer_nb.recipes.arguments import SFTArgs
from tinytrainer_nb.recipes.sft import sft
from tinytrainer_nb.runs.run import Run

QUIET = dict(batch_size=4, warmup_steps=1, eval_steps=0, sample_steps=0, save_steps=0)


def examples(n):
    return load_examples(data_file("sft.jsonl")).select(range(n))


def policy(quantization="none", dtype="fp32", **lora):
    model, tokenizer = load_model("tiny", quantization, dtype, verbose=False)
    return moved(add_lora(model, LoraArgs(r=4, **dict(layers="5-6") | lora))), tokenizer


def moved(model):
    "The model with an adapter that has learned something: a B of zeros would hide what is lost below it"
    for i, p in enumerate(trainable(model).values()):
        p.data.normal_(std=0.05, generator=torch.Generator().manual_seed(i))
    return model


def step(model, batch: dict, dtype=torch.float32) -> list[torch.Tensor]:
    "Loss and the gradient of everything trained, of one optimiser step"
    model.train()
    with compute_context(model, dtype):
        loss = sum(
            model(**m, labels=m["shift_labels"], num_items_in_batch=batch["num_items"], use_cache=False).loss
            for m in batch["micro_batches"]
        )
    return [loss.detach(), *torch.autograd.grad(loss, list(trainable(model).values()))]


def both(model, rows, chosen, folder, max_tokens=512, dtype=torch.float32) -> tuple[list, list]:
    "A step on the whole model, and on its upper layers from kept states"
    hidden = Hidden(model, dtype, 1024)
    assert hidden.fill(rows, folder) == len(list(folder.iterdir()))
    whole = step(model, Collator(max_tokens)(chosen), dtype)
    with starting_at(model, hidden.first):
        return whole, step(model, UpperCollator(max_tokens)(chosen), dtype)


def errors(found: list, expected: list) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("thin", [False, True])
def test_loss_and_every_gradient(quantization, thin, tmp_path):
    "Packed rows, several micro-batches of other rows than those that were computed together"
    model, tokenizer = policy(quantization)
    rows = [encode_chat(tokenizer, r["messages"]) for r in examples(30)]
    for a, b, max_tokens in ((5, 21, 512), (0, 8, 4096), (29, 30, 64)):
        if thin:
            with thin_adapters(model):
                whole, kept = both(model, rows, rows[a:b], tmp_path / f"{a}", max_tokens)
        else:
            whole, kept = both(model, rows, rows[a:b], tmp_path / f"{a}", max_tokens)
        assert len(whole) == 1 + 2 * 2 * 7 and min(x.norm() for x in whole) > 0
        assert max(errors(kept, whole)) < 1e-6


def test_in_16_bits_they_are_no_further_from_the_truth(tmp_path):
    "Against the gradients in fp32; the last bits differ, for a product's do with its number of rows"
    model, tokenizer = policy()
    rows = [encode_chat(tokenizer, r["messages"]) for r in examples(30)]
    truth = step(model, Collator(512)(rows[5:21]))
    model, _ = policy(dtype="bf16")
    whole, kept = both(model, rows, rows[5:21], tmp_path / "bf16", dtype=torch.bfloat16)
    assert rows[0]["hidden"].dtype == torch.bfloat16
    error = lambda found: sum(errors(found, truth)) / len(truth)
    assert 1e-4 < error(whole) < 0.1 and error(kept) < 1.15 * error(whole)


ARCHITECTURES = [
    (LlamaConfig, LlamaForCausalLM),
    (MistralConfig, MistralForCausalLM),
    (Qwen2Config, Qwen2ForCausalLM),
    (Qwen3Config, Qwen3ForCausalLM),
]
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def random_model(config, kind, layers="2-3"):
    torch.manual_seed(0)
    model = kind(config(**SMALL)).requires_grad_(False).eval()
    model.config._attn_implementation = "packed"
    return moved(add_lora(model, LoraArgs(r=2, layers=layers)))


@pytest.mark.parametrize("config, kind", ARCHITECTURES, ids=lambda x: x.__name__)
def test_architectures(config, kind, tmp_path):
    "The states are those that transformers tells of each text alone, and the upper layers go on from them"
    model = random_model(config, kind)
    rows = [dict(input_ids=ids, labels=ids) for ids in ([3, 1, 4, 1, 5, 9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3, 2])]
    states = lower_states(model, pack_row(rows), 2, torch.float32)
    with torch.no_grad():
        alone = [model(torch.tensor([r["input_ids"]]), output_hidden_states=True).hidden_states[2][0] for r in rows]
    torch.testing.assert_close(states[:17], torch.cat(alone), atol=1e-5, rtol=1e-5)
    whole, kept = both(model, rows, rows[1:], tmp_path / "hidden")
    assert max(errors(kept, whole)) < 1e-6


def test_nothing_runs_below(tmp_path):
    """No gradient goes below the lowest adapter, and from kept states no layer below is asked; afterwards the model
    is whole again"""
    model, tokenizer = policy("nf4")
    rows, seen, layers = (
        [encode_chat(tokenizer, r["messages"]) for r in examples(4)],
        [],
        model.get_base_model().model.layers,
    )
    hidden = Hidden(model, torch.float32, 1024)
    hidden.fill(rows, tmp_path / "hidden")
    expected = step(model, Collator(512)(rows))
    for i, layer in enumerate(layers):
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, words, i=i: seen.append((i, words["hidden_states"].requires_grad)), with_kwargs=True
        )
    step(model, Collator(4096)(rows))
    assert seen == [(i, i == 6) for i in range(7)]
    seen.clear()
    with starting_at(model, hidden.first):
        step(model, UpperCollator(4096)(rows))
    assert seen == [(5, False), (6, True)]
    with pytest.raises(ZeroDivisionError), starting_at(model, hidden.first):
        1 / 0
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert errors(step(model, Collator(512)(rows)), expected) == [0] * len(expected)


def test_a_run_is_the_same(tmp_path):
    """Losses, evaluations, samples and the adapter, with dropout in the upper layers; a finished run leaves no states
    behind"""
    runs = []
    for keep in (False, True):
        args = SFTArgs(
            **QUIET | dict(eval_steps=2, sample_steps=3, sample_tokens=12),
            max_steps=7,
            micro_batch_tokens=256,
            keep_hidden=keep,
            out=str(tmp_path / str(keep)),
        )
        runs.append(sft(*policy(dropout=0.1), examples(22), args))
    told = [
        [
            (e["kind"], e["step"], e.get("loss"), e.get("completion"))
            for e in r.events
            if e["kind"] in ("metrics", "evaluation", "sample")
        ]
        for r in runs
    ]
    assert len(told[0]) == len(told[1]) == 7 + 4 + 2 * 2
    for a, b in zip(*told):
        assert a[:2] == b[:2] and a[3] == b[3]
        if a[2] is not None:
            assert a[2] == pytest.approx(b[2], rel=1e-5)
    a, b = (load_file(r.folder / "adapter/adapter_model.safetensors") for r in runs)
    for name in a:
        assert (a[name] - b[name]).norm() < 1e-4 * a[name].norm(), name
    assert not (runs[1].folder / "hidden").exists()


def test_disk_use_is_announced(tmp_path):
    "The journal's figure is what the files take, to the byte; a stopped run keeps them, and goes on with them"
    args = dict(QUIET, max_steps=300, keep_hidden=True, micro_batch_tokens=512)
    run = sft(*policy(dtype="bf16"), examples(24), SFTArgs(**args, out=str(tmp_path / "run")), live=True)
    while not run.step and run.status == "running":
        time.sleep(0.01)
    run.stop()
    run.wait()
    tokens = sum(len(encode_chat(run.tokenizer, r["messages"])["input_ids"]) for r in examples(24))
    used = sum(p.stat().st_size for p in (run.folder / "hidden").iterdir())
    assert run.status == "stopped" and used == tokens * 256 * 2
    note = next(e["message"] for e in run.events if e["kind"] == "note" and "hidden states" in e["message"])
    assert (
        f"24 rows, {tokens:,} tokens of 256 numbers, {used / 1e6:,.1f} MB; training goes through the data 50.0 times"
        in note
    )
    before, step = {p.name: p.stat().st_mtime_ns for p in (run.folder / "hidden").iterdir()}, run.step
    again = Run.open(run.folder).resume(live=True)
    while again.step <= step and again.status == "running":
        time.sleep(0.01)
    assert {p.name: p.stat().st_mtime_ns for p in (run.folder / "hidden").iterdir()} == before
    again.stop()
    again.wait()


def test_a_pause_while_they_are_computed(tmp_path, monkeypatch):
    """It is obeyed between two files; the model answers as a whole meanwhile, and the result is that of a run nobody
    touched"""
    make = Hidden._make

    def slowly(self, *args):
        time.sleep(0.05)
        make(self, *args)

    args = dict(QUIET, max_steps=3, keep_hidden=True, micro_batch_tokens=128)
    whole = sft(*policy(), examples(24), SFTArgs(**args, out=str(tmp_path / "whole")))
    monkeypatch.setattr(Hidden, "_make", slowly)
    model, tokenizer = policy()
    ask = lambda: (
        generate(
            model, tokenizer, "One day, Tom", GenerateArgs(max_new_tokens=8, temperature=0), quiet=True
        ).completions
    )
    said = ask()
    run = sft(model, tokenizer, examples(24), SFTArgs(**args, out=str(tmp_path / "run")), live=True)
    files = lambda: len(list((run.folder / "hidden").glob("*.bin")))
    while not files() and run.status == "running":
        time.sleep(0.005)
    run.pause()
    while run.status == "running":
        time.sleep(0.005)
    made = files()
    with run.still:
        assert ask() == said
    assert files() == made < 20 and run.step == 0
    run.unpause()
    run.wait()
    assert run.status == "finished" and adapter(run.folder) == adapter(whole.folder)


def test_an_interrupt_while_they_are_computed(tmp_path, monkeypatch):
    "Ctrl-C ends the run at the next file; what is ready stays"
    make, made = Hidden._make, []

    def interrupted(self, path, group):
        make(self, path, group)
        made.append(path.name)
        if len(made) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Hidden, "_make", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            sft(
                *policy(),
                examples(24),
                SFTArgs(**QUIET, max_steps=2, keep_hidden=True, micro_batch_tokens=128, out=str(tmp_path / "run")),
            )
    finally:
        signal.signal(signal.SIGINT, before)
    run = Run.open(tmp_path / "run")
    assert (
        run.status == "interrupted"
        and {p.name for p in (run.folder / "hidden").iterdir()} == set(made)
        and len(made) == 3
    )
    assert run.resume().status == "finished" and len(made) == len(set(made)) > 3


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def work(out: str, resume: bool) -> None:
    "A run in a process of its own, or the rest of it"
    if resume:
        Run.open(out).resume()
    else:
        sft(
            *policy("nf4", "auto", dropout=0.1),
            examples(30),
            SFTArgs(
                **QUIET | dict(save_steps=2, eval_steps=3),
                max_steps=10,
                micro_batch_tokens=256,
                keep_hidden=True,
                out=out,
            ),
        )


def begin(out: Path, resume: bool = False):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinytrainer_nb.all"])
    process = context.Process(target=work, args=(str(out), resume))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    process = begin(out)
    process.join(300)
    assert process.exitcode == 0
    return out


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "moment",
    ["while states are computed", pytest.param("between checkpoints", marks=pytest.mark.slow), "and files are lost"],
)
def test_killed_and_resumed(moment, undisturbed, tmp_path):
    "The adapter and every figure are those of the run that was left alone, bit for bit"
    run, hidden = tmp_path / "run", tmp_path / "run" / "hidden"
    process = begin(run)
    ready = lambda: (
        len(list(hidden.glob("*.bin"))) >= 2
        if moment.startswith("while")
        else (run / "checkpoints/step-000002").exists()
    )
    while process.is_alive() and not ready():
        time.sleep(0.0005)
    process.kill()
    process.join()
    files = sorted(hidden.glob("*.bin"))
    kept = {p: p.stat().st_mtime_ns for p in files}
    assert Run.open(run).status == "interrupted" and len(files) >= 2
    if moment.startswith("while"):
        assert Run.open(run).last_checkpoint() == (None, 0) and len(files) < 10
    if moment.startswith("and"):
        files[0].unlink()
        files[1].write_bytes(files[1].read_bytes()[:-100])
        (hidden / f".{files[2].name}.1.partial").write_bytes(b"torn")
    process = begin(run, resume=True)
    if not moment.startswith("and"):  # what is whole is not computed again
        while process.is_alive() and Run.open(run).status != "finished":
            for p, when in kept.items():
                if p.exists():
                    assert p.stat().st_mtime_ns == when
            time.sleep(0.01)
    process.join(300)
    assert process.exitcode == 0 and Run.open(run).status == "finished" and not hidden.exists()
    figures = [
        [(e["kind"], e["step"], e["loss"]) for e in Run.open(r).events if e["kind"] in ("metrics", "evaluation")]
        for r in (undisturbed, run)
    ]
    assert figures[0] == figures[1] and adapter(run) == adapter(undisturbed)
    assert not list(run.rglob(".*partial*"))


def frozen_dropout(model):
    return stack_adapter(add_lora(model, LoraArgs(r=2, dropout=0.1)), LoraArgs(r=2, layers="5-6"))


def trained_embeddings(model):
    model = add_lora(model, LoraArgs(r=2, layers="5-6"))
    model.get_input_embeddings().weight.requires_grad_()
    return model


REFUSED = {
    "an adapter on all layers": ("none", lambda m: add_lora(m, LoraArgs(r=2)), r"layer 0 has an adapter.*layers='3-6'"),
    "an adapter on the first layer": (
        "none",
        lambda m: add_lora(m, LoraArgs(r=2, layers="0,6")),
        "layer 0 has an adapter",
    ),
    "thirteen numbers": ("none", add_tinylora, "tinylora_v.* is trained, which all layers share"),
    "trained embeddings": ("none", trained_embeddings, "the embeddings are trained"),
    "dropout in a frozen adapter": ("none", frozen_dropout, "below layer 5 drops some at random"),
    "8 bits": ("int8", lambda m: add_lora(m, LoraArgs(r=2, layers="5-6")), "8-bit layers"),
    "no adapter": ("none", lambda m: m, "nothing of this model is trained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    "In one line, and no folder is left"
    quantization, put_on, said = REFUSED[case]
    model, tokenizer = load_model("tiny", quantization, "fp32", verbose=False)
    with pytest.raises(TinyTrainerError, match=said):
        sft(put_on(model), tokenizer, examples(4), SFTArgs(**QUIET, keep_hidden=True, out=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


def test_other_models_and_several_processes_are_refused(monkeypatch):
    with pytest.raises(TinyTrainerError, match="GemmaForCausalLM cannot be cut"):
        first_trained_layer(random_model(GemmaConfig, GemmaForCausalLM))
    model = random_model(LlamaConfig, LlamaForCausalLM)
    assert first_trained_layer(model) == 2
    with pytest.raises(TinyTrainerError, match="nothing is trained"):
        first_trained_layer(model.requires_grad_(False))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TinyTrainerError, match="2 train together here"):
        first_trained_layer(model)


def test_a_disk_without_room(tmp_path, monkeypatch):
    "What it would take and what there is are told, before there is a run"
    model, tokenizer = policy()
    need = hidden_bytes(model, [encode_chat(tokenizer, r["messages"]) for r in examples(24)])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        upper.shutil, "disk_usage", lambda path: usage._replace(free=need - 1) if Path(path).exists() else usage
    )
    args = SFTArgs(**QUIET, keep_hidden=True, out=str(tmp_path / "run"))
    with pytest.raises(
        TinyTrainerError, match=f"{need / 1e6:,.1f} MB on disk, and {(need - 1) / 1e6:,.1f} MB are free"
    ):
        sft(model, tokenizer, examples(24), args)
    assert not (tmp_path / "run").exists()
