"""Write random-weight models of known shapes with the tokenizer from a folder: for speed and memory, never for
quality. OUT TOKENIZER [names]"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

LLAMA = dict(vocab_size=32000, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
SHAPES = {
    "llama-1m": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA,
            hidden_size=32,
            intermediate_size=88,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "llama-4m": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "llama-12m": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
    ),
    "llama-42m": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=9,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
    ),
    "llama-160m": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=12,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
    ),
    "llama-410m": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=22,
            num_attention_heads=16,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
    ),
    "tinyllama-1.1b": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
    ),
    "qwen2-49m": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=151936,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            hidden_size=256,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
}


def main(out: str, tokenizer: str, *names: str) -> None:
    if not (Path(tokenizer) / "tokenizer.json").exists():
        raise SystemExit(f"{tokenizer} has no tokenizer.json.")
    for name in names or SHAPES:
        if (Path(out) / name / "model.safetensors").exists():
            continue
        torch.manual_seed(0)
        kind, config = SHAPES[name]
        model = kind(config).to(torch.bfloat16)
        model.save_pretrained(Path(out) / name)
        for file in Path(tokenizer).glob("*"):
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
                shutil.copy(file, Path(out) / name)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} weights")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(f"{__doc__}\nNames: {', '.join(SHAPES)}; without any, all.")
    main(*sys.argv[1:])
