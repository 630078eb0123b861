"""4-bit weights keep their gradient: after generation, after an evaluation, after any forward pass in evaluation mode."""
import pytest
import torch

from tinytrainer_nb.adapters import LoraArgs, add_lora, trainable
from tinytrainer_nb.core import data_file
from tinytrainer_nb.evaluate import evaluate
from tinytrainer_nb.models import load_model
from tinytrainer_nb.rollout import GenerateArgs, generate
from tinytrainer_nb.tokens import encode_chat, pack_row

MESSAGES = [dict(role="user", content="Mia has 3 boxes with 24 pens in each box. How many pens has she?"), dict(role="assistant", content="3 * 24 = 72 pens.\n#### 72")]


@pytest.fixture()
def model():
    model, tokenizer = load_model("tiny", quantization="nf4", verbose=False)
    model = add_lora(model, LoraArgs(r=4))
    with torch.no_grad():  # a B of zeros would hide a lost gradient of A
        for name, p in trainable(model).items():
            if "lora_B" in name: p.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return model, tokenizer


def gradient(model, tokenizer, mode: bool = True) -> torch.Tensor:
    "Gradient of the loss of one conversation with respect to everything trained, as one vector"
    micro = pack_row([encode_chat(tokenizer, MESSAGES)])
    model.zero_grad()
    model.train(mode)
    model(**micro, labels=micro["shift_labels"], use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in trainable(model).values()])


EVALUATIONS = {
    "generate": lambda m, t: generate(m, t, MESSAGES[:1], GenerateArgs(max_new_tokens=8)),
    "evaluate": lambda m, t: evaluate(m, t, data_file("heldout.jsonl"), "loss", limit=4),
    "forward": lambda m, t: m.eval()(torch.tensor([t("Once upon a time").input_ids])),
}


@pytest.mark.parametrize("mode", [True, False], ids=["trained in train mode", "trained in eval mode"])  # PPO updates in eval mode
@pytest.mark.parametrize("name", EVALUATIONS)
def test_gradient_survives(model, name, mode):
    before = gradient(*model, mode)
    with torch.no_grad(): EVALUATIONS[name](*model)
    after = gradient(*model, mode)
    assert before.abs().sum() > 0 and torch.cosine_similarity(before, after, dim=0) > 0.9999


def test_bitsandbytes_alone_loses_it(model):
    "The reason for the cure: where bitsandbytes repacks weights, its own behaviour cuts the gradient"
    from bitsandbytes.functional import has_avx512bf16
    if not has_avx512bf16(): pytest.skip("needs a processor on which bitsandbytes repacks 4-bit weights (AVX512-BF16)")
    policy, tokenizer = model
    before = gradient(policy, tokenizer)
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"): module.support_avx512bf16_for_cpu = True
    with torch.no_grad(): policy.eval()(torch.tensor([tokenizer("Once upon a time").input_ids]))
    try: after = gradient(policy, tokenizer)
    except RuntimeError: return  # no gradient at all
    assert torch.cosine_similarity(before, after, dim=0) < 0.9999
