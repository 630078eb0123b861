"""Blocks compute what `transformers` and PEFT compute: losses and gradients of every adapter and weight, whatever
shares a micro-batch."""

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from live import adapter
from safetensors.torch import load
from small import small_base
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tinytrainer_nb.compute.blocks as blocks_module
import tinytrainer_nb.compute.path as path_module
import tinytrainer_nb.recipes.train  # noqa: F401 (gives runs their resume)
import tinytrainer_nb.recipes.trainer as trainer_module
from tinytrainer_nb.compute.blocks import in_blocks, why_not
from tinytrainer_nb.compute.logprobs import Room, to_slope, token_loss
from tinytrainer_nb.compute.onednn import has_blocks
from tinytrainer_nb.compute.path import choose_path, copied_bytes, kept_bytes
from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.data.tokens import pack_row, pack_trees
from tinytrainer_nb.hardware import DTYPES
from tinytrainer_nb.model.arguments import LoraArgs, TinyLoraArgs
from tinytrainer_nb.model.attention import attend_documents, document_attention
from tinytrainer_nb.model.base import LoadRecord, compute_context
from tinytrainer_nb.model.layers import plain_model, trainable
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora, using_adapters
from tinytrainer_nb.model.tinylora import add_tinylora
from tinytrainer_nb.recipes.arguments import (
    DPOArgs,
    GRPOArgs,
    PPOArgs,
    PretrainArgs,
    RewardModelArgs,
    SFTArgs,
)
from tinytrainer_nb.recipes.grpo import grpo
from tinytrainer_nb.recipes.ppo import ppo
from tinytrainer_nb.recipes.preference import dpo, reward_model
from tinytrainer_nb.recipes.pretrain import pretrain
from tinytrainer_nb.recipes.sft import sft
from tinytrainer_nb.recipes.trainer import RunTrainer
from tinytrainer_nb.runs.run import Run

aten = torch.ops.aten
SHAPE = dict(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
)
KINDS = dict(
    llama=(LlamaForCausalLM, LlamaConfig(**SHAPE)),
    tied=(LlamaForCausalLM, LlamaConfig(**SHAPE | dict(tie_word_embeddings=True))),
    qwen2=(Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    qwen3=(Qwen3ForCausalLM, Qwen3Config(**SHAPE | dict(head_dim=32))),
    mistral=(MistralForCausalLM, MistralConfig(**SHAPE | dict(sliding_window=None))),
)
LENGTHS = (37, 5, 64, 90, 12, 2)


def bare(kind: str):
    "A model with random weights, biases and norms"
    torch.manual_seed(0)
    model = KINDS[kind][0](KINDS[kind][1])
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    model.config._attn_implementation = "packed"
    return model.requires_grad_(False).eval()


def learned(model):
    "Adapters that have learned something: no thin matrix is zero"
    torch.manual_seed(1)
    for p in trainable(model).values():
        torch.nn.init.normal_(p, 0.0, 0.05)
    return model


def rows(vocabulary: int = 199, lengths=LENGTHS) -> list[dict]:
    generator = torch.Generator().manual_seed(2)

    def row(n):
        ids = torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        return dict(input_ids=ids, labels=[-100] * (n // 2) + ids[n // 2 :])

    return [row(n) for n in lengths]


def plain(model, found: list[dict], dtype=torch.float32) -> tuple[float, dict]:
    "Loss and gradients as `transformers` and PEFT compute them: each row alone, their own attention"
    model.zero_grad()
    usual, total = model.config._attn_implementation, 0.0
    items = sum(label != -100 for row in found for label in row["labels"][1:])
    model.config._attn_implementation = "eager"
    for row in found:
        with compute_context(model, dtype):
            loss = model(
                input_ids=torch.tensor([row["input_ids"]]),
                labels=torch.tensor([row["labels"]]),
                num_items_in_batch=items,
                use_cache=False,
            ).loss
        loss.backward()
        total += loss.item()
    model.config._attn_implementation = usual
    return total, {name: p.grad.clone() for name, p in trainable(model).items()}


def blocks(model, found: list[dict], dtype=torch.float32, **how) -> tuple[float, dict]:
    "The same in blocks: one micro-batch"
    model.zero_grad()
    packed = pack_row(found)
    with in_blocks(model, dtype, **how):
        loss = model(
            **packed, labels=packed["shift_labels"], num_items_in_batch=len(packed["shift_labels"]), use_cache=False
        ).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainable(model).items()}


def apart(a: tuple, b: tuple) -> float:
    "The largest relative error of the loss and of a gradient"
    return max(abs(a[0] - b[0]) / abs(b[0]), *(((x - b[1][n]).norm() / b[1][n].norm()).item() for n, x in a[1].items()))


@pytest.mark.parametrize("lengths", [(64,), LENGTHS, (600, 20), (128, 128)], ids=["single", "packed", "long", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compute_what_transformers_and_peft_compute(kind, lengths):
    model = learned(add_lora(bare(kind), LoraArgs(r=4, alpha=8), seed=0))
    assert not why_not(model)
    assert apart(blocks(model, rows(lengths=lengths)), plain(model, rows(lengths=lengths))) < 1e-4


@pytest.mark.parametrize("adapter", ["lora", "tinylora", "qv"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_over_the_embedded_base(adapter, quantization):
    model, _ = load_model("tiny", quantization=quantization, dtype="fp32", verbose=False)
    model = learned(
        add_tinylora(model, TinyLoraArgs(u=2, n_tie=5))
        if adapter == "tinylora"
        else add_lora(model, LoraArgs(r=8, target_modules="q_proj,v_proj" if adapter == "qv" else "all-linear"), seed=0)
    )
    truth = plain(model, rows(1000))
    for how in (dict(), dict(recompute=True), dict(copies=True)):
        assert apart(blocks(model, rows(1000), **how), truth) < 1e-4


@pytest.mark.parametrize("temperature, with_entropy", [(1.0, False), (0.7, True)])
def test_a_token_that_is_all_but_impossible_has_its_logprob(temperature, with_entropy):
    "Softmax in fp32 has no number below e^-103; the log-probability, its slope and the entropy have"
    torch.manual_seed(0)
    logits, labels = 300 * torch.randn(50, 40), torch.randint(0, 40, (50,))
    truth = (logits.double() / temperature).log_softmax(-1)
    slope, chosen = truth.exp() - torch.nn.functional.one_hot(labels, 40), truth.gather(-1, labels[:, None])[:, 0]
    assert chosen.min() < -103 < chosen.max()
    logprobs, entropy = to_slope(logits, labels, temperature, with_entropy)
    # Logits of a thousand are 6e-5 apart in fp32
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-6, atol=2e-4)
    torch.testing.assert_close(logits.double(), slope, rtol=0, atol=2e-4)
    if with_entropy:
        torch.testing.assert_close(entropy.double(), -(truth.exp() * truth).nan_to_num().sum(-1), rtol=0, atol=1e-3)


def test_losses_that_share_their_memory():
    "Two micro-batches of different sizes before either goes backward"
    torch.manual_seed(0)
    weight, room = torch.randn(50, 8), Room()
    parts = [(torch.randn(n, 8, requires_grad=True), torch.randint(0, 50, (n,))) for n in (20, 30, 10)]
    for loss in [token_loss(hidden, weight, labels, room=room) for hidden, labels in parts]:
        loss.backward()
    for hidden, labels in parts:
        alone = hidden.detach().requires_grad_()
        torch.nn.functional.cross_entropy(alone @ weight.t(), labels, reduction="sum").backward()
        torch.testing.assert_close(hidden.grad, alone.grad)


def test_copies_and_recomputing_change_no_bit():
    model = learned(
        add_lora(load_model("tiny", quantization="nf4", dtype="bf16", verbose=False)[0], LoraArgs(r=8), seed=0)
    )
    assert copied_bytes(model, torch.bfloat16) > 2e6
    loss, gradients = blocks(model, rows(1000), torch.bfloat16)
    for how in (dict(recompute=True), dict(copies=True), dict(copies=True, recompute=True)):
        other, others = blocks(model, rows(1000), torch.bfloat16, **how)
        assert other == loss and all(torch.equal(g, others[n]) for n, g in gradients.items())


def test_a_block_computed_again_leaves_its_last_product_out():
    """Nobody looks at what a block ends in once its input is known again: recomputing costs at most a pass less the
    MLP's way down"""
    model = learned(add_lora(bare("llama"), LoraArgs(r=4), seed=0))

    def operations(f) -> int:
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    seen = {name: x for name, x in pack_row(rows()).items() if name not in ("shift_labels", "logits_to_keep")}
    with in_blocks(model, torch.float32), torch.no_grad():
        a_pass = operations(lambda: plain_model(model).model(**seen, use_cache=False))
    again = operations(lambda: blocks(model, rows(), recompute=True)) - operations(lambda: blocks(model, rows()))
    down = 2 * sum(LENGTHS) * SHAPE["intermediate_size"] * SHAPE["hidden_size"] * SHAPE["num_hidden_layers"]
    assert a_pass / 2 < again <= a_pass - down


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_16_bits_blocks_are_no_further_from_the_truth(quantization):
    "The truth is fp32 on the very same weights"

    def model_in(dtype):
        return learned(
            add_lora(
                load_model("tiny", quantization=quantization, dtype=dtype, verbose=False)[0], LoraArgs(r=8), seed=0
            )
        )

    truth, model = plain(model_in("fp32"), rows(1000)), model_in("bf16")
    assert apart(blocks(model, rows(1000), torch.bfloat16), truth) < 1.25 * apart(
        plain(model, rows(1000), torch.bfloat16), truth
    )


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_in_16_bits_a_young_adapter_counts_in_full(copies, bias):
    "What it adds is less than half of the last bit of what it is added to; it arrives all the same, on average"
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 256, bias=bias).to(torch.bfloat16).requires_grad_(False)
    weight = blocks_module._Weight(layer, torch.bfloat16, copies)
    x, residual = torch.randn(400, 128).to(torch.bfloat16), torch.randn(400, 256).to(torch.bfloat16)
    down, up = torch.randn(128, 8).to(torch.bfloat16), 1e-5 * torch.randn(8, 256).to(torch.bfloat16)
    truth = (x.double() @ down.double()) @ up.double()
    for more in (None, residual):
        with_it, without = (
            blocks_module._Products.apply(x, more, [weight], [0], down, u)[0].double() for u in (up, 0 * up)
        )
        assert truth.abs().mean() < 0.2 * (without.abs() * 2**-8).mean()
        assert abs(((with_it - without) * truth).sum() / truth.square().sum() - 1) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models_train_in_blocks_too(kind):
    "Every weight's gradient, embeddings and norms included"
    model = bare(kind).requires_grad_(True)
    assert apart(blocks(model, rows()), plain(model, rows())) < 1e-4


def test_in_16_bits_whole_models_are_no_further_from_the_truth():
    "Autocast keeps in fp32 what all blocks add to, and so do these"

    def model():
        return load_model("tiny", quantization="none", dtype="bf16", verbose=False)[0].float().requires_grad_(True)

    truth = plain(model(), rows(1000))
    assert apart(blocks(model(), rows(1000), torch.bfloat16), truth) < 1.25 * apart(
        plain(model(), rows(1000), torch.bfloat16), truth
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_documents_do_not_see_each_other(dtype):
    "Other tokens in one document leave another's hidden states bit for bit what they were, and so its loss"
    model = learned(
        add_lora(load_model("tiny", quantization="none", dtype=dtype, verbose=False)[0], LoraArgs(r=8), seed=0)
    )
    first, second = rows(1000), rows(1000)
    second[3]["input_ids"] = [7] * len(second[3]["input_ids"])

    def hidden(found):
        packed = pack_row(found)
        with torch.no_grad(), in_blocks(model, DTYPES[dtype]):
            out = (
                model.get_base_model()
                .model(**{k: packed[k] for k in ("input_ids", "position_ids", "document_lengths")})
                .last_hidden_state[0]
            )
        return out.split([*LENGTHS, len(out) - sum(LENGTHS)])

    same = [torch.equal(a, b) for a, b in zip(hidden(first), hidden(second))]
    assert same[:6] == [True, True, True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_many_documents_is_that_of_each(dtype):
    generator = torch.Generator().manual_seed(0)
    lengths = [33, 7, 300, 64, 1, 700, 64, 129, 31, 513]
    inputs = [torch.randn(sum(lengths), h, 32, generator=generator).to(dtype).requires_grad_() for h in (8, 4, 4)]
    weight = torch.randn(sum(lengths), 8, 32, generator=generator)

    def both(f, kind):
        own = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = f(*own)
        return [out.float(), *(g.float() for g in torch.autograd.grad((out.float() * weight).sum(), own))]

    def one_by_one(*x):
        return torch.cat(
            [
                document_attention(*(t.transpose(0, 1)[None] for t in part), 0.2)[0].transpose(0, 1)
                for part in zip(*(t.split(lengths) for t in x))
            ]
        )

    truth = both(one_by_one, torch.float32)
    error = lambda found: max(((a - b).norm() / b.norm()).item() for a, b in zip(found, truth))
    together = error(both(lambda *x: attend_documents(*x, lengths, 0.2), dtype))
    assert together < 1e-5 if dtype == torch.float32 else together < 1.25 * error(both(one_by_one, dtype))


@pytest.mark.parametrize("blocks", [False, True])
def test_attention_over_packed_rows_has_no_dropout(blocks):
    "Whatever a config says, and the fast path computes what the model's own does"
    model = bare("llama")
    row = pack_row(rows())
    inputs = {name: row[name] for name in ("input_ids", "position_ids", "document_lengths")}
    still = model(**inputs, use_cache=False).logits
    for m in model.modules():
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.5
    model.config.attention_dropout = 0.5
    model.train()
    assert why_not(model) == ""
    with in_blocks(model, torch.float32) if blocks else contextlib.nullcontext():
        found = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, still, rtol=0, atol=1e-4)


def test_what_cannot_be_computed_in_blocks_is_said():
    model = add_lora(bare("llama"), LoraArgs(r=4, dropout=0.1))
    assert "dropout" in why_not(model)
    assert "DoRA" in why_not(add_lora(bare("llama"), LoraArgs(r=4, dora=True)))
    assert "head has an adapter" in why_not(add_lora(bare("llama"), LoraArgs(r=4, target_modules="q_proj,lm_head")))
    model = add_lora(bare("llama"), LoraArgs(r=4, target_modules="q_proj,v_proj"))
    model.get_base_model().model.layers[1].self_attn.k_proj.weight.requires_grad_(True)
    assert "beside adapters" in why_not(model)
    model = add_lora(bare("qwen2"), LoraArgs(r=4))
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.bias.requires_grad_(True)
    assert "bias is trained" in why_not(model)
    model = add_lora(bare("llama"), LoraArgs(r=4))
    model.merge_adapter()
    assert "merged" in why_not(model)
    from transformers import GPT2Config, GPT2LMHeadModel

    assert "GPT2LMHeadModel" in why_not(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=99)))


def test_inside_the_model_still_speaks():
    "A cache, a mask, no labels: the model's own forward pass, and afterwards nothing is left of the blocks"
    model, tokenizer = load_model("tiny", quantization="none", verbose=False)
    model = learned(add_lora(model, LoraArgs(r=4), seed=0))
    ids = tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        before = model(**ids).logits
        with in_blocks(model, torch.bfloat16):
            inside, written = model(**ids).logits, model.generate(**ids, max_new_tokens=4, do_sample=False)
            loss = model(**ids, labels=ids["input_ids"]).loss
            packed = pack_row([dict(input_ids=ids["input_ids"][0].tolist(), labels=ids["input_ids"][0].tolist())])
            mean = model(**packed, labels=packed["shift_labels"], use_cache=False).loss
        assert (
            torch.equal(inside, before)
            and torch.equal(model(**ids).logits, before)
            and written.shape[1] == ids.input_ids.shape[1] + 4
        )
        assert torch.equal(loss, model(**ids, labels=ids["input_ids"]).loss) and mean.item() == pytest.approx(
            loss.item(), rel=0.02
        )
    assert not any("forward" in m.__dict__ for m in (model.get_base_model(), model.get_base_model().model))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_tree_is_computed_as_its_rows(recompute):
    "A prompt with its branches, as reinforcement learning packs them, beside each branch behind a prompt of its own"
    model = learned(add_lora(bare("llama"), LoraArgs(r=4, alpha=8), seed=0))
    generator = torch.Generator().manual_seed(2)

    def draw(n):
        return torch.randint(3, 199, (n,), generator=generator).tolist()

    prompts = [draw(n) for n in (17, 40)]
    trees = [
        dict(prompt=prompts[group], completion=draw(n), group=group)
        for group, n in ((0, 9), (0, 30), (0, 1), (1, 12), (1, 12))
    ]
    alone = [
        dict(input_ids=row["prompt"] + row["completion"], labels=[-100] * len(row["prompt"]) + row["completion"])
        for row in trees
    ]
    packed = pack_trees(trees)
    model.zero_grad()
    with in_blocks(model, torch.float32, recompute=recompute):
        loss = model(
            **packed, labels=packed["shift_labels"], num_items_in_batch=len(packed["shift_labels"]), use_cache=False
        ).loss
    loss.backward()
    assert apart((loss.item(), {name: p.grad for name, p in trainable(model).items()}), plain(model, alone)) < 1e-4


def test_what_is_computed_again_finds_its_own_adapters():
    """PPO's value has an adapter of its own, which is active in its forward pass and no longer when gradients are
    computed"""
    model = learned(add_lora(bare("llama"), LoraArgs(r=4, alpha=8), seed=0))
    model.add_adapter("value", model.peft_config["default"])
    for name, p in model.named_parameters():
        if ".value." in name:
            torch.nn.init.normal_(p.requires_grad_(), 0.0, 0.05)
    packed = pack_row(rows())

    def gradients(recompute):
        model.zero_grad()
        with in_blocks(model, torch.float32, recompute=recompute):
            with using_adapters(model, ["value"]):
                loss = model(**packed, labels=packed["shift_labels"], use_cache=False).loss
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    kept, again = gradients(False), gradients(True)
    assert (
        kept.keys() == again.keys()
        and all(".value." in name for name in kept)
        and all(torch.equal(g, again[name]) for name, g in kept.items())
    )


RECIPES = {
    "sft": lambda model, tokenizer, out: sft(
        model, tokenizer, PROBLEMS[:12], SFTArgs(max_steps=1, batch_size=4, out=out)
    ),
    "pretrain": lambda model, tokenizer, out: pretrain(
        load_model("tiny", quantization="none", verbose=False)[0],
        tokenizer,
        ["Once upon a time there was a duck. " * 200],
        PretrainArgs(max_steps=1, batch_size=2, max_length=64, out=out),
    ),
    "ppo": lambda model, tokenizer, out: ppo(
        model,
        tokenizer,
        PROBLEMS[:8],
        "length",
        PPOArgs(max_steps=1, batch_size=2, num_generations=2, max_new_tokens=8, out=out),
    ),
    "grpo": lambda model, tokenizer, out: grpo(
        model,
        tokenizer,
        PROBLEMS[:8],
        "length",
        GRPOArgs(max_steps=1, batch_size=2, num_generations=4, max_new_tokens=8, out=out),
    ),
    "dpo": lambda model, tokenizer, out: dpo(model, tokenizer, PAIRS, DPOArgs(max_steps=1, batch_size=4, out=out)),
    "reward_model": lambda model, tokenizer, out: reward_model(
        model, tokenizer, PAIRS, RewardModelArgs(max_steps=1, batch_size=4, out=out)
    ),
}
PROBLEMS = [dict(prompt=f"How much is {i} plus {i + 1}?", completion=f"It is {2 * i + 1}.") for i in range(20)]
PAIRS = [dict(prompt=row["prompt"], chosen=row["completion"], rejected="No idea.") for row in PROBLEMS]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_says_on_computes_in_blocks(recipe, tmp_path, monkeypatch):
    "All of it: none of its documents goes through the model's own forward pass"
    usual, seen = LlamaModel.forward, []

    def own(self, *args, document_lengths=None, **kwargs):
        assert document_lengths is None
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", own)
    monkeypatch.setattr(
        blocks_module, "attend_documents", lambda *args: seen.append(args[3]) or attend_documents(*args)
    )
    model, tokenizer = load_model("tiny", quantization="none", verbose=False)
    run = RECIPES[recipe](add_lora(model, LoraArgs(r=4)), tokenizer, str(tmp_path / "run"))
    assert run.status == "finished" and run.info["fast"]["blocks"] and run.info["fast"]["why"].startswith("on") and seen


def test_off_is_off(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "attend_documents", None)
    model, tokenizer = load_model("tiny", quantization="none", verbose=False)
    run = sft(
        add_lora(model, LoraArgs(r=4)),
        tokenizer,
        PROBLEMS[:12],
        SFTArgs(max_steps=1, batch_size=4, fast="off", out=str(tmp_path / "run")),
    )
    assert run.info["fast"] == dict(blocks=False, copies=False, recompute=False, why="off, as asked")


@pytest.mark.parametrize(
    "found",
    [dict(blocks=False, copies=False, recompute=False), dict(blocks=True, copies=False, recompute=True)],
    ids=["in blocks", "with scarcer memory"],
)
def test_a_run_goes_on_in_the_way_it_began(tmp_path, monkeypatch, found):
    """Even where the machine that resumes it would choose another; where its memory is scarcer, without what it has
    no room for. That changes no bit, but where oneDNN adds up a copy in an order of its own: there the run says so"""

    def train(out):
        model, tokenizer = load_model(small_base(), quantization="nf4", verbose=False)
        return sft(
            add_lora(model, LoraArgs(r=4), seed=0),
            tokenizer,
            PROBLEMS,
            SFTArgs(max_steps=4, save_steps=2, batch_size=4, eval_steps=0, sample_steps=0, out=str(tmp_path / out)),
        )

    usual, whole = RunTrainer.training_step, train("whole")

    def dying(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise OSError("no space left")
        return usual(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(RunTrainer, "training_step", dying)
        with pytest.raises(OSError):
            train("broken")
    monkeypatch.setattr(trainer_module, "choose_path", lambda *_: found | dict(why="as this machine would"))
    run = Run.open(tmp_path / "broken").resume()
    fast = run.info["fast"]
    assert fast["blocks"] and fast["copies"] != found["blocks"] and fast["recompute"] == found["recompute"]
    other_sums = not fast["copies"] and has_blocks(torch.device("cpu"), LoadRecord.of(run.info).torch_dtype)
    notes = [e["message"] for e in run.events if e["kind"] == "note"]
    assert other_sums == any("the last bits may differ" in note for note in notes)
    if not other_sums:
        assert adapter(run) == adapter(whole)
    one, other = load(adapter(run)), load(adapter(whole))
    for name, value in other.items():
        assert (one[name] - value).norm() < 0.01 * value.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "whole"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_a_step_keeps_is_known_before(kind, whole, dtype):
    "Memory that autograd holds after a forward pass through all blocks"
    model = bare(kind).requires_grad_(True) if whole else learned(add_lora(bare(kind), LoraArgs(r=4), seed=0))
    packed, held, weights = (
        pack_row(rows(lengths=(256,) * 6)),
        {},
        {p.untyped_storage().data_ptr() for p in model.parameters()},
    )

    def note(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with in_blocks(model, dtype), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        plain_model(model).model(
            **{k: packed[k] for k in ("input_ids", "position_ids", "document_lengths")}, use_cache=False
        )
    total = sum(size for place, size in held.items() if place not in weights)
    assert kept_bytes(model, dtype, 6 * 256) == pytest.approx(total, rel=0.2)


def test_what_a_step_keeps_is_told_where_the_last_block_learns_nothing():
    model = learned(add_lora(bare("llama"), LoraArgs(r=4), seed=0))
    everywhere = kept_bytes(model, torch.float32, 1024)
    plain_model(model).model.layers[-1].requires_grad_(False)
    assert kept_bytes(model, torch.float32, 1024) == everywhere


def test_the_path_fits_the_memory(monkeypatch):
    model = add_lora(load_model("tiny", quantization="nf4", dtype="bf16", verbose=False)[0], LoraArgs(r=4))

    def path(free, mode="auto"):
        monkeypatch.setattr(
            path_module, "free_memory", lambda *_: free + 12 * sum(p.numel() for p in trainable(model).values())
        )
        found = choose_path(model, torch.bfloat16, mode, 4096)
        return found["blocks"], found["copies"], found["recompute"]

    copied, kept = copied_bytes(model, torch.bfloat16), kept_bytes(model, torch.bfloat16, 4096)
    assert (
        path(2**40) == (True, True, False)
        and path(2**40, "lean") == (True, False, True)
        and path(2**40, "off") == (False, False, False)
    )
    assert path(4 * copied + 1)[1] and not path(4 * copied)[1]
    assert (
        path(2 * kept + copied + 1 if kept > copied else 2 * kept) == (True, 2 * kept + copied + 1 > 4 * copied, False)
        and path(2 * kept - 1)[2]
    )


def test_copies_are_called_what_they_are():
    "Of 4-bit weights, in the number format that is computed in"
    model = load_model("tiny", quantization="nf4", dtype="fp32", verbose=False)[0]
    linear = sum(
        m.in_features * m.out_features
        for layer in model.model.layers
        for m in layer.modules()
        if isinstance(m, torch.nn.Linear)
    )
    assert copied_bytes(model, torch.float32) == 4 * linear
    assert "with 32-bit copies of the frozen weights" in choose_path(model, torch.float32, "auto", 256)["why"]


def test_a_window_that_hides_a_part_of_a_text_is_not_passed_over():
    model = MistralForCausalLM(MistralConfig(**SHAPE | dict(sliding_window=32))).eval()
    model.config._attn_implementation = "packed"
    with in_blocks(model, torch.float32), torch.no_grad():
        assert model.model(torch.arange(3, 35)[None]).last_hidden_state.shape == (1, 32, 64)
        with pytest.raises(TinyTrainerError, match="last 32 tokens"):
            model.model(torch.arange(3, 36)[None])


def test_an_exception_that_is_kept_keeps_no_copies(monkeypatch):
    "As a run in the background keeps its own, and Jupyter the last one"
    model, calls = learned(add_lora(bare("llama"), LoraArgs(r=4))), []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("none is left")
        return attend_documents(*args)

    monkeypatch.setattr(blocks_module, "attend_documents", fails)
    try:
        with in_blocks(model, torch.bfloat16, copies=True):
            model(torch.arange(3, 40)[None], use_cache=False)
    except MemoryError as e:
        kept = e
    left = [x for x in gc.get_objects() if isinstance(x, blocks_module._Weight)]
    assert (
        kept.__traceback__
        and left
        and not any(
            getattr(x, name, None) is not None for x in left for name in ("copy", "held", "there", "back_there")
        )
    )


def shapes_of_products(act) -> set[tuple]:
    "The shapes that matrix products take, by their first and last sizes."
    found = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (aten.mm, aten.bmm, aten.baddbmm):
                found.add(tuple(tuple(x.shape) for x in args if isinstance(x, torch.Tensor)))
            return function(*args, **kwargs or {})

    with Shapes():
        act()
    return found


def test_products_have_few_shapes():
    "Each shape is compiled in bf16: documents of any number, and rows of any number in a loss"
    generator = torch.Generator().manual_seed(0)

    def attend():
        for _ in range(60):
            count = int(torch.randint(1, 17, (), generator=generator))
            lengths = torch.randint(33, 96, (count,), generator=generator).tolist()
            q, k, v = (torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2))
            attend_documents(q, k, v, lengths, 0.3).sum().backward()

    assert len(shapes_of_products(attend)) <= 2 * 5 * 4  # lengths of 64 and 96, of 1, 2, 4, 8, 16 documents
    hidden, weight, labels = torch.randn(600, 16, requires_grad=True), torch.randn(50, 16), torch.arange(600) % 50

    def losses():
        for count in range(1, 600, 7):
            token_loss(hidden[:count], weight, labels[:count]).backward()

    assert len(shapes_of_products(losses)) <= 4 * 2  # 64, 128, 192 and 256 rows
    for count in (1, 63, 64, 65, 256, 300, 599):
        ours, theirs = hidden[:count].detach().requires_grad_(), hidden[:count].detach().requires_grad_()
        token_loss(ours, weight, labels[:count]).backward()
        F.cross_entropy(theirs @ weight.t(), labels[:count], reduction="sum").backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
