"""Real data and a real pretrained model, where the folder `shared` is at hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinytrainer_nb.compute.arguments import GenerateArgs
from tinytrainer_nb.compute.generate import generate
from tinytrainer_nb.data.formats import load_examples
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes.arguments import SFTArgs
from tinytrainer_nb.recipes.sft import sft

pytestmark = pytest.mark.shared
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


def falls(run):
    "Held-out loss at the first and the last evaluation"
    losses = run.history("loss", "evaluation")[1]
    assert losses[-1] < losses[0], losses


@pytest.mark.slow  # stories260k learns from real rows below, in a few seconds
@pytest.mark.parametrize("path", ["gsm8k/train.jsonl", "alpaca/alpaca_en_demo.json"])
def test_sft_of_tiny_on_real_data(shared, tmp_path, path):
    model, tokenizer = load_model("tiny", quantization="nf4", verbose=False)
    run = sft(
        add_lora(model),
        tokenizer,
        load_examples(shared / "data" / path),
        SFTArgs(
            max_steps=12,
            batch_size=4,
            learning_rate=2e-3,
            eval_steps=6,
            eval_rows=12,
            sample_steps=0,
            save_steps=0,
            max_length=1024,
            out=str(tmp_path / "run"),
        ),
    )
    falls(run)


def greedy(model, tokenizer):
    return generate(model, tokenizer, "", GenerateArgs(max_new_tokens=100, temperature=0)).completions[0]


def test_stories260k_says_what_was_published(shared, tmp_path):
    model, tokenizer = load_model(shared / "models" / "stories260k", quantization="none", dtype="fp32", verbose=False)
    assert greedy(model, tokenizer).startswith(STORY)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, tokenizer = load_model(tmp_path / "saved", quantization="none", dtype="fp32", verbose=False)
    assert greedy(again, tokenizer).startswith(STORY)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = plain.generate(torch.tensor([[1]]), max_new_tokens=60, do_sample=False)[0]
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved").decode(ids, skip_special_tokens=True).startswith(STORY[:150])
    )


def test_sft_of_stories260k(shared, tmp_path):
    model, tokenizer = load_model(shared / "models" / "stories260k", quantization="none", verbose=False)
    run = sft(
        add_lora(model, LoraArgs(r=8)),
        tokenizer,
        load_examples(shared / "data" / "tinytrainer" / "synthetic_cot.jsonl"),
        SFTArgs(
            max_steps=30,
            batch_size=8,
            learning_rate=2e-3,
            eval_steps=5,
            eval_rows=24,
            sample_steps=0,
            save_steps=0,
            out=str(tmp_path / "run"),
        ),
    )
    falls(run)
