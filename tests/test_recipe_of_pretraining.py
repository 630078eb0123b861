"""How a model is pretrained: Muon beside AdamW against PyTorch's own optimisers, in runs and resumed; presets, FLOP."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinytrainer_nb import hardware
from tinytrainer_nb.all import (
    PrepareArgs,
    PretrainArgs,
    Run,
    TinyTrainerError,
    model_preset,
    new_model,
    prepare,
    pretrain,
)
from tinytrainer_nb.cli import main
from tinytrainer_nb.compute.flops import token_flops
from tinytrainer_nb.compute.muon import MuonAdamW, hidden_matrices, muon_cost, need_muon
from tinytrainer_nb.core import read_json, write_json
from tinytrainer_nb.data.tinyworld import corpus
from tinytrainer_nb.model.arguments import SHAPES
from tinytrainer_nb.recipes.pretrain import decayed_copy, train_tokenizer
from tinytrainer_nb.recipes.trainer import _schedule, set_learning_rate


def small(**shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    usual = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**usual | shape))


def step(model, optimizer) -> None:
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def test_muon_gets_the_matrices_of_the_blocks_alone():
    names = hidden_matrices(small(tie_word_embeddings=False))
    assert len(names) == 14 and all(".layers." in name and name.endswith("_proj.weight") for name in names)
    model = small(tie_word_embeddings=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert len(hidden_matrices(model)) == 13  # what is frozen is nobody's
    assert hidden_matrices(torch.nn.Sequential(torch.nn.Linear(2, 2))) == []


def test_it_is_what_the_two_optimisers_of_torch_do():
    ours, theirs = small(), small()
    names = hidden_matrices(ours)

    def parts(model):
        rest = [p for name, p in model.named_parameters() if name not in names]
        return [model.get_parameter(name) for name in names], rest

    matrices, rest = parts(ours)
    optimizer = MuonAdamW(matrices, [dict(params=rest)], lr=1e-2, muon_rate=2.5, weight_decay=0.1, betas=(0.9, 0.95))
    matrices, rest = parts(theirs)
    both = (
        torch.optim.Muon(matrices, lr=2.5e-2, weight_decay=0.04, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
    )
    for _ in range(3):
        step(ours, optimizer)
        ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
        theirs.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        for part in both:
            part.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_a_live_rate_keeps_the_ratio():
    model = small()
    names = hidden_matrices(model)
    rest = [p for name, p in model.named_parameters() if name not in names]
    matrices = [model.get_parameter(name) for name in names]
    optimizer = MuonAdamW(matrices, [dict(params=rest)], lr=1e-3, muon_rate=3.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    set_learning_rate(optimizer, scheduler, 4e-3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2e-3, 6e-3])
    step(model, optimizer)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2e-3, 6e-3])


def test_its_cost_is_five_widths_a_token():
    width, tokens = 32, 640
    model = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(width, width, bias=False)])])
    assert muon_cost(model, tokens) == pytest.approx(5 * width / tokens)


def test_wsd_falls_in_a_line():
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    how = _schedule(PretrainArgs(max_steps=20, warmup_steps=2, schedule="wsd", decay_share=0.5))
    scheduler = get_scheduler(
        how["lr_scheduler_type"],
        optimizer,
        how["warmup_steps"],
        20,
        scheduler_specific_kwargs=how["lr_scheduler_kwargs"],
    )
    heights = [scheduler.lr_lambdas[0](step) for step in range(21)]
    assert heights[2:11] == [1.0] * 9
    assert heights[10:] == pytest.approx([1 - k / 10 for k in range(11)])


@pytest.fixture(scope="module")
def texts():
    return list(corpus(400, seed=0))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 1024)


def settings(out, **more) -> PretrainArgs:
    usual = dict(max_steps=4, batch_size=2, max_length=64, warmup_steps=1, eval_steps=0, save_steps=2, sample_steps=0)
    return PretrainArgs(out=str(out), optimizer="muon", **usual | more)


def test_a_run_with_muon_goes_on_as_if_it_had_not_stopped(tmp_path, texts, tokenizer):
    whole = pretrain(new_model("tiny", seed=0, dtype="fp32"), tokenizer, texts, settings(tmp_path / "whole"))
    assert any("Muon trains 49 matrices" in e["message"] for e in whole.events if e["kind"] == "note")
    part = pretrain(new_model("tiny", seed=0, dtype="fp32"), tokenizer, texts, settings(tmp_path / "part"), live=True)
    part.stop()
    part.wait()
    run = Run.open(tmp_path / "part").resume()
    losses = [[e["loss"] for e in r.events if e["kind"] == "metrics"] for r in (whole, run)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), run.model.parameters()))


def test_decay_reaches_the_norms_if_it_is_asked_to(tmp_path, texts, tokenizer):
    """Norms begin at 1. With a rate of 0.01 and a decay of 1 they shrink by a hundredth a step, if they are pulled."""
    norms = {}
    for decay_all in (False, True):
        how = dict(
            max_steps=1, save_steps=0, warmup_steps=0, schedule="constant", learning_rate=1e-2, weight_decay=10.0
        )
        args = settings(tmp_path / str(decay_all), decay_all=decay_all, **how)
        run = pretrain(new_model("tiny", seed=0, dtype="fp32"), tokenizer, texts, args)
        norms[decay_all] = run.model.model.norm.weight.float().mean().item()
    assert norms[True] < norms[False] - 0.05


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(TinyTrainerError, match="optimizer='sgd'.*adamw, muon"):
        PretrainArgs(optimizer="sgd")
    with pytest.raises(TinyTrainerError, match="no matrices inside numbered blocks"):
        need_muon(torch.nn.Linear(2, 2))
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(TinyTrainerError, match="needs torch 2.9"):
        need_muon(small())


def test_a_preset_of_tinyllama_begins_as_its_authors_have_it(monkeypatch):
    """Standard deviations of `lit_gpt/model.py`: sqrt(2/5/inputs), at the end of an MLP 1/sqrt(inputs)/layers."""
    monkeypatch.setitem(SHAPES, "tinyllama-small", SHAPES["tinyllama-120m"] | dict(vocab_size=512, num_hidden_layers=3))
    model = new_model("tinyllama-small", seed=0, dtype="fp32")
    block = model.model.layers[1]
    wanted = {
        model.model.embed_tokens: (2 / 5 / 768) ** 0.5,
        model.lm_head: (2 / 5 / 768) ** 0.5,
        block.self_attn.o_proj: (2 / 5 / 768) ** 0.5,
        block.mlp.up_proj: (2 / 5 / 768) ** 0.5,
        block.mlp.down_proj: 2048**-0.5 / 3,
    }
    for layer, std in wanted.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
    assert model.config.rms_norm_eps == 1e-5 and not model.config.tie_word_embeddings


def test_presets_have_the_size_that_their_name_says():
    exact = {"tiny": 5_082_880, "books": 12_096_384}  # whose names say no size
    assert {name: model_preset(name).num_parameters for name in exact} == exact
    for name in SHAPES.keys() - exact.keys():
        size = float(name.split("-")[1][:-1]) * (1e9 if name.endswith("b") else 1e6)
        assert model_preset(name).num_parameters == pytest.approx(size, rel=0.07)
    assert model_preset("tinyllama-1.1b").num_parameters == 1_100_048_384


def test_the_journal_says_what_share_of_the_speed_was_used(tmp_path, texts, tokenizer):
    run = pretrain(new_model("tiny", seed=0, dtype="fp32"), tokenizer, texts, settings(tmp_path / "run", max_steps=2))
    steps = [e for e in run.events if e["kind"] == "metrics"]
    assert all(0 < e["mfu"] < 1 for e in steps)
    weights = sum(p.numel() for p in new_model("tiny", seed=0).parameters() if p.ndim == 2)
    assert token_flops(run.model, 64) == 6 * (weights + 7 * 64 * 256)
    mixture = small()
    assert token_flops(mixture, 64) > 0
    mixture.experts = torch.nn.Parameter(torch.zeros(4, 2, 2))
    assert token_flops(mixture, 64) == 0


def test_the_speed_of_a_cpu_is_measured_by_a_small_product(monkeypatch):
    "Processes that train together call the CPU `cpu:0`; the product for a GPU would take minutes there"
    sizes = []
    monkeypatch.setattr(hardware, "seconds_of", lambda forward, x, *_, **__: sizes.append(len(x)) or 1.0)
    assert hardware.matrix_rate("cpu:0", torch.float32) == hardware.matrix_rate("cpu", torch.float32) == 2 * 1024**3
    assert sizes == [1024, 1024]


@pytest.fixture
def long_run(tmp_path, tokenizer, texts, request):
    "A run of twelve steps at one height, of which the last four fall; with checkpoints after 4 and 8"
    data = texts
    if request.param == "prepared":
        data = prepare(texts, tokenizer, PrepareArgs(out=str(tmp_path / "shards"))).folder
    args = PretrainArgs(
        max_steps=12,
        batch_size=2,
        max_length=32,
        warmup_steps=2,
        decay_share=1 / 3,
        save_steps=4,
        eval_steps=0,
        sample_steps=0,
        min_lr=1e-4,
        keep_checkpoints=9,
        out=str(tmp_path / "long"),
    )
    run = pretrain(new_model("llama-1m", seed=0, dtype="fp32"), tokenizer, data, args)
    shutil.rmtree(run.folder / "checkpoints/step-000012")
    return run


@pytest.mark.parametrize("long_run", ["in memory", "prepared"], indirect=True)
def test_a_copy_ends_while_the_run_goes_on(long_run, tmp_path, capsys):
    """Rows, optimiser and random numbers go on where the run was: the first step of the copy is the run's own
    ninth, to the bit; then the rate falls in a line to min_lr"""
    before = {f: f.stat().st_mtime_ns for f in long_run.folder.rglob("*") if f.is_file()}
    assert main(["resume", str(long_run.folder), "--decay", "4", "--out", str(tmp_path / "early")]) == 0
    assert {f: f.stat().st_mtime_ns for f in long_run.folder.rglob("*") if f.is_file()} == before
    copy = Run.open(tmp_path / "early")
    assert copy.status == "finished" and copy.summary["steps"] == 12
    steps, rates = copy.history("learning_rate")
    assert steps == list(range(1, 13))
    assert rates[8:] == pytest.approx([2e-3, 1.525e-3, 1.05e-3, 5.75e-4])
    assert copy.history("loss")[1] == long_run.history("loss")[1]  # which falls at the same steps
    for file in ("model.safetensors", "tokenizer.json"):
        assert (copy.folder / "model" / file).read_bytes() == (long_run.folder / "model" / file).read_bytes()


@pytest.mark.parametrize("long_run", ["in memory"], indirect=True)
def test_what_cannot_end_early_is_a_line(long_run, tmp_path, capsys):
    def refused(said, **settings):
        info = read_json(long_run.folder / "run.json")
        other = tmp_path / f"other{len(list(tmp_path.iterdir()))}"
        shutil.copytree(long_run.folder, other)
        write_json(other / "run.json", info | dict(settings=info["settings"] | settings))
        with pytest.raises(TinyTrainerError, match=said):
            decayed_copy(other, 4)
        return other

    refused("has the schedule cosine, which falls all the way", schedule="cosine")
    refused("is at step 8, and its learning rate falls since step 6", decay_share=0.5)
    refused("is at step 8, and still warms up", warmup_steps=9)
    refused("follows stages", stages="plan.yaml")
    with pytest.raises(TinyTrainerError, match="steps=0 must be at least 1"):
        decayed_copy(long_run, 0)
    shutil.rmtree(long_run.folder / "checkpoints")
    with pytest.raises(TinyTrainerError, match="has no checkpoint yet"):
        decayed_copy(long_run, 4)
    assert main(["resume", str(long_run.folder), "--out", str(tmp_path / "x")]) == 2
    assert "--out is the folder of a copy, which --decay makes" in capsys.readouterr().err
    assert not list(tmp_path.glob("*-decayed"))
