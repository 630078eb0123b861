"""4-bit weights keep their gradient, after anything that is done in evaluation mode; adapters in fewer steps have
PEFT's gradient."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tinytrainer_nb.compute.arguments import GenerateArgs
from tinytrainer_nb.compute.decode import Decoder
from tinytrainer_nb.compute.generate import generate
from tinytrainer_nb.compute.thin import thin_adapters
from tinytrainer_nb.core import data_file
from tinytrainer_nb.data.tokens import encode_chat, pack_row
from tinytrainer_nb.hardware import DTYPES
from tinytrainer_nb.model.arguments import LoraArgs, TinyLoraArgs
from tinytrainer_nb.model.base import compute_context
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora, stack_adapter
from tinytrainer_nb.model.tinylora import add_tinylora
from tinytrainer_nb.recipes.evaluate import evaluate

MESSAGES = [
    dict(role="user", content="Mia has 3 boxes with 24 pens in each box. How many pens has she?"),
    dict(role="assistant", content="3 * 24 = 72 pens.\n#### 72"),
]


@pytest.fixture()
def model():
    model, tokenizer = load_model("tiny", quantization="nf4", verbose=False)
    model = add_lora(model, LoraArgs(r=4))
    with torch.no_grad():  # a B of zeros would hide a lost gradient of A
        for name, p in trainable(model).items():
            if "lora_B" in name:
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return model, tokenizer


def gradient(model, tokenizer, mode: bool = True) -> torch.Tensor:
    "Gradient of the loss of one conversation with respect to everything trained, as one vector"
    micro = pack_row([encode_chat(tokenizer, MESSAGES)])
    model.zero_grad()
    model.train(mode)
    model(**micro, labels=micro["shift_labels"], use_cache=False).loss.backward()
    return torch.cat(
        [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in trainable(model).values()]
    )


EVALUATIONS = {
    "generate": lambda m, t: generate(m, t, MESSAGES[:1], GenerateArgs(max_new_tokens=8)),
    "evaluate": lambda m, t: evaluate(m, t, data_file("heldout.jsonl"), "loss", limit=4),
    "forward": lambda m, t: m.eval()(torch.tensor([t("Once upon a time").input_ids])),
}


# PPO updates in eval mode
@pytest.mark.parametrize("mode", [True, False], ids=["trained in train mode", "trained in eval mode"])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_gradient_survives(model, name, mode):
    before = gradient(*model, mode)
    with torch.no_grad():
        EVALUATIONS[name](*model)
    after = gradient(*model, mode)
    assert before.abs().sum() > 0 and torch.cosine_similarity(before, after, dim=0) > 0.9999


def test_bitsandbytes_alone_loses_it(model):
    "The reason for the cure: where bitsandbytes repacks weights, its own behaviour cuts the gradient"
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("needs a processor on which bitsandbytes repacks 4-bit weights (AVX512-BF16)")
    policy, tokenizer = model
    before = gradient(policy, tokenizer)
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        policy.eval()(torch.tensor([tokenizer("Once upon a time").input_ids]))
    try:
        after = gradient(policy, tokenizer)
    except RuntimeError:
        return  # no gradient at all
    assert torch.cosine_similarity(before, after, dim=0) < 0.9999


ADAPTERS = {
    "LoRA": lambda m: add_lora(m, LoraArgs(r=4)),
    "rsLoRA on two kinds of layer": lambda m: add_lora(
        m, LoraArgs(r=4, rslora=True, target_modules="q_proj,down_proj")
    ),
    "DoRA": lambda m: add_lora(m, LoraArgs(r=4, dora=True)),
    "dropout": lambda m: add_lora(m, LoraArgs(r=4, dropout=0.3)),
    "TinyLoRA": lambda m: add_tinylora(m, TinyLoraArgs(n_tie=4)),
    "one on another": lambda m: stack_adapter(add_lora(m, LoraArgs(r=4)), LoraArgs(r=4)),
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_thin_adapters_have_pefts_outputs_and_gradients(kind, quantization):
    model, tokenizer = load_model("tiny", quantization=quantization, dtype="fp32", verbose=False)
    model = ADAPTERS[kind](model)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_B" in name or "tinylora_v" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(i))  # frozen ones below the stack, too
    ids = torch.tensor([tokenizer("Mia has 3 boxes with 24 pens in each box.").input_ids])

    def both():
        torch.manual_seed(0)  # of the dropout
        logits = model.train()(ids).logits
        logits.square().mean().backward()
        found = [p.grad for p in trainable(model).values()]
        model.zero_grad()
        return logits.detach(), found

    logits, plain = both()
    with thin_adapters(model):
        assert any("forward" in m.__dict__ for m in model.modules()) == (kind != "DoRA")
        inside, thin = both()
        with model.disable_adapter():
            base = model(ids).logits
        with Decoder(model, torch.float32, 1).on():
            decoded = model(ids).logits  # one replacement in another
        again, _ = both()
    assert not any("forward" in m.__dict__ for m in model.modules())  # all is put back
    torch.testing.assert_close(inside, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
    if kind != "dropout":
        torch.testing.assert_close(decoded, logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base, logits, atol=1e-2)
    for name, a, b in zip(trainable(model), thin, plain):
        assert b.norm() > 0 and (a - b).norm() < 1e-5 * b.norm(), name


def test_thin_adapters_in_16_bits_are_no_further_from_the_truth():
    """Against gradients in fp32, those in bf16 err as much as PEFT's, in the mean of thirty adapters; one alone may
    be a third better or worse"""
    nothing = lambda model: contextlib.nullcontext()

    def gradients(dtype, context=nothing):
        model, tokenizer = load_model("tiny", quantization="none", dtype=dtype, verbose=False)
        model, ids, found = (
            add_lora(model, LoraArgs(r=4)),
            torch.tensor([tokenizer("Mia has 3 boxes with 24 pens in each box.").input_ids]),
            [],
        )
        for draw in range(30):
            for i, p in enumerate(trainable(model).values()):
                p.data.normal_(std=0.05, generator=torch.Generator().manual_seed(100 * draw + i))
            with context(model), compute_context(model, DTYPES[dtype]):
                logits = model(ids).logits
            logits.float().square().mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in trainable(model).values()]))
            model.zero_grad()
        return found

    exact = gradients("fp32")
    error = lambda found: sum(((f - e).norm() / e.norm()).item() for f, e in zip(found, exact)) / 30
    peft, thin = error(gradients("bf16")), error(gradients("bf16", thin_adapters))
    assert 1e-3 < peft < 0.1 and thin < 1.15 * peft


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_thin_adapter_takes_any_input(quantization, given):
    """Layers of bitsandbytes answer in the format that they were asked in, and a LayerNorm on a GPU asks in fp32
    within autocast"""
    model, _ = load_model("tiny", quantization=quantization, dtype="bf16", verbose=False)
    model = add_lora(model, LoraArgs(r=4))
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.lora_B["default"].weight.data.normal_(std=0.05)
    both = []
    for context in (contextlib.nullcontext(), thin_adapters(model)):
        x = torch.randn(1, 7, layer.in_features, generator=torch.Generator().manual_seed(0)).to(given).requires_grad_()
        with context, torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()
        both.append(
            (
                out.detach().float(),
                x.grad.float(),
                layer.lora_A["default"].weight.grad.clone(),
                layer.lora_B["default"].weight.grad.clone(),
            )
        )
        model.zero_grad()
    for thin, peft in zip(both[1], both[0]):
        assert (thin - peft).norm() < 0.02 * peft.norm()


def test_adapters_with_a_bias_are_left_to_peft():
    model, tokenizer = load_model("tiny", quantization="none", dtype="fp32", verbose=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_bias=True))
    for p in trainable(model).values():
        p.data.normal_(std=0.05)
    ids = torch.tensor([tokenizer("Mia has 3 boxes.").input_ids])
    with torch.no_grad():
        logits = model(ids).logits
        with thin_adapters(model):
            inside = model(ids).logits
        with Decoder(model, torch.float32, 1).on():
            decoded = model(ids).logits
    torch.testing.assert_close(inside, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoded, logits, atol=1e-4, rtol=1e-4)
