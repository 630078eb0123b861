"""The rollout engine against plain forward passes, `transformers`' own generation, and itself in other company."""

from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from small import small_base
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinytrainer_nb.compute import decode as fast_module
from tinytrainer_nb.compute import generate as rollout
from tinytrainer_nb.compute.arguments import GenerateArgs
from tinytrainer_nb.compute.blocks import why_not
from tinytrainer_nb.compute.decode import Decoder, choose_forms, weight_forms
from tinytrainer_nb.compute.generate import Spoken, _cut, _living, generate, stream
from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.data.formats import load_prompts
from tinytrainer_nb.hardware import DTYPES, mix_seed
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.attention import SharedCache
from tinytrainer_nb.model.export import merged
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora

IDS = torch.arange(3, 43)[None]
PROMPTS = [p["messages"] for p in load_prompts(data_file("rl.jsonl"))[:6]]


def policy(quantization="none", dtype="fp32"):
    "A base of two layers with an adapter that changes it"
    model, tokenizer = load_model(small_base(), quantization=quantization, dtype=dtype, verbose=False)
    model = add_lora(model, LoraArgs(r=4))
    for i, (name, p) in enumerate(trainable(model).items()):
        if "lora_B" in name:
            p.data.normal_(std=0.02, generator=torch.Generator().manual_seed(i))
    return model, tokenizer


@pytest.fixture(scope="module")
def exact():
    return policy()


@pytest.fixture(params=["a copy for every slot", "each prompt once"])
def storage(request, monkeypatch):
    "Both ways in which a cache may hold its prompts; small ones would all take the first"
    if request.param == "each prompt once":
        monkeypatch.setattr(rollout, "SharedCache", partial(SharedCache, few=0))


def sampled(model, tokenizer, prompts=PROMPTS, seeds=None, decoder=None, **how):
    return generate(
        model,
        tokenizer,
        prompts,
        GenerateArgs(**dict(num_generations=4, max_new_tokens=48) | how),
        seeds=seeds,
        quiet=True,
        decoder=decoder,
    )


def plain_logprobs(model, prompt, completion, temperature):
    "Of each completion token, by one pass of the model over the whole text"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def test_logprobs_are_those_of_a_full_pass(exact, storage):
    model, tokenizer = exact
    out = sampled(model, tokenizer, temperature=0.7, top_k=50, top_p=0.9)
    assert len({len(c) for c in out.completion_ids}) > 3 and any(out.finished)  # rows ended at different times
    model.get_base_model().config._attn_implementation = "sdpa"
    try:
        plain = [plain_logprobs(model, p, c, 0.7) for p, c in zip(out.prompt_ids, out.completion_ids)]
    finally:
        model.get_base_model().config._attn_implementation = "packed"
    for found, expected in zip(out.logprobs, plain):
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


def test_a_row_says_the_same_in_any_company(exact, storage):
    "All together, a few rows at a time, and each alone"
    model, tokenizer = exact
    together, apart = sampled(model, tokenizer), sampled(model, tokenizer, batch_size=4)
    seeds = [mix_seed(0, i, j) for i in range(len(PROMPTS)) for j in range(4)]
    alone = [
        sampled(model, tokenizer, [PROMPTS[i // 4]], [seed], num_generations=1).completion_ids[0]
        for i, seed in enumerate(seeds)
    ]
    assert together.completion_ids == apart.completion_ids == alone
    assert len(set(map(tuple, alone))) > len(PROMPTS)  # and not all the same


SMALL = dict(
    vocab_size=1032,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SMALL, tie_word_embeddings=True), Qwen2Config(**SMALL), Qwen3Config(**SMALL, head_dim=32)],
    ids=["llama", "qwen2", "qwen3"],
)
def test_greedy_is_that_of_transformers(tmp_path, config, exact, storage):
    "Random weights of three architectures, prompts of four lengths, eight completions that end at different places"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    exact[1].save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, "none", "fp32", verbose=False)
    texts = ["Tom has 3 apples.", "Mia", "Once upon a time there was a bridge", "Why?"]
    out = sampled(model, tokenizer, texts, num_generations=2, temperature=0.0, max_new_tokens=40)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for prompt, found in zip(out.prompt_ids, out.completion_ids):
        expected = plain.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
        assert found == expected


@pytest.mark.parametrize("top_k,top_p", [(5, 1.0), (0, 0.8), (20, 0.5), (1, 1.0), (0, 0.001)])
def test_cut_keeps_what_transformers_keeps(top_k, top_p):
    logits = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * 2
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(_cut(logits.log_softmax(-1), top_k, top_p).isinf(), expected.isinf())


def test_any_attention_will_do(exact):
    "A model that was set to another attention speaks the same, and keeps its own"
    model, tokenizer = exact
    expected = sampled(model, tokenizer).completion_ids
    model.config._attn_implementation = "eager"
    try:
        assert sampled(model, tokenizer).completion_ids == expected and model.config._attn_implementation == "eager"
    finally:
        model.config._attn_implementation = "packed"


def test_living_slots():
    "Three prompts of four slots: one is silent, the others have two and one alive"
    alive = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]).bool()
    slots = _living(alive, 4)
    assert slots.shape == (2, 2) and slots[0].tolist() == [1, 3] and slots[1, 0] == 10 and 8 <= slots[1, 1] <= 11
    assert _living(torch.ones(8).bool(), 4) is None


def test_stop_texts(exact):
    model, tokenizer = exact
    free, cut = sampled(model, tokenizer), sampled(model, tokenizer, stop=["=", "has"])
    for text, shorter, ids, fewer, ended in zip(
        free.completions, cut.completions, free.completion_ids, cut.completion_ids, cut.finished
    ):
        assert fewer == ids[: len(fewer)] and "=" not in shorter and "has" not in shorter and text.startswith(shorter)
        assert ended or "=" not in text and "has" not in text
    assert sum(map(len, cut.completion_ids)) < sum(map(len, free.completion_ids))


def test_stop_text_over_token_borders(exact):
    "A stop of several characters is found wherever the tokens cut it, even if one of them holds more than it"
    tokenizer = exact[1]
    ids = tokenizer("The answer is 42 apples", add_special_tokens=False).input_ids
    for stop in ("42", "r is 4", " apples", "answer is 42"):
        spoken = Spoken(tokenizer, 1, {2}, (stop,))
        said = next(i for i, t in enumerate(ids) if not spoken.add(0, t, 0.0))
        assert stop in tokenizer.decode(ids[: said + 1]) and stop not in tokenizer.decode(ids[:said])
        assert spoken.text(0) == "The answer is 42 apples"[: "The answer is 42 apples".index(stop)]


@pytest.mark.parametrize(
    "how",
    [
        dict(temperature=0.0),
        dict(temperature=1.2, seed=3),
        dict(temperature=1.0, stop=("ap", "===")),
        dict(temperature=1.0, top_p=0.9, max_new_tokens=3),
    ],
)
def test_a_stream_is_the_completion(exact, how):
    model, tokenizer = exact
    pieces = list(stream(model, tokenizer, PROMPTS[0], GenerateArgs(**dict(max_new_tokens=40) | how)))
    assert (
        "".join(pieces)
        == sampled(model, tokenizer, PROMPTS[:1], num_generations=1, **dict(max_new_tokens=40) | how).completions[0]
    )


def test_a_stream_holds_back_half_characters(exact):
    "Bytes of a character come one token at a time; no piece shows a replacement mark"
    tokenizer, text = exact[1], "näive 🙂 ©"
    ids, spoken, shown = tokenizer(text, add_special_tokens=False).input_ids, Spoken(exact[1], 1, {2}, ()), []
    from tinytrainer_nb.compute.generate import _unsure

    for t in ids:
        spoken.add(0, t, 0.0)
        said = spoken.text(0)
        shown.append(said[: len(said) - _unsure(said, ())])
    assert (
        shown[-1] == text
        and all(text.startswith(s) for s in shown)
        and any("\ufffd" in tokenizer.decode(ids[:i]) for i in range(len(ids)))
    )


@pytest.mark.parametrize(
    "dtype, form",
    [
        ("bf16", "as it is"),
        ("bf16", "copy"),
        ("bf16", "blocked"),
        ("bf16", "packed"),
        ("fp32", "as it is"),
        ("fp32", "copy"),
        ("fp32", "blocked"),
    ],
)
def test_every_form_of_a_weight_decodes_alike(dtype, form):
    "4-bit weights in each form: log-probabilities within rounding of the plain pass, and the weights untouched"
    model, tokenizer = policy("nf4", dtype)
    layer, computed = model.get_base_model().model.layers[0].mlp.up_proj.base_layer, DTYPES[dtype]
    if form not in weight_forms(layer, computed):
        pytest.skip(f"this processor has no form {form!r} in {dtype}")
    before = layer.weight.data.clone()
    decoder = Decoder(
        model, computed, 24, {k: form for k in choose_forms(model, computed, 24) if k.startswith("Linear4bit")}
    )
    assert form in decoder.forms.values()
    out = sampled(model, tokenizer, decoder=decoder)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        plain = [plain_logprobs(model, p, c, 1.0) for p, c in zip(out.prompt_ids, out.completion_ids)]
    apart = (torch.cat([torch.tensor(x) for x in out.logprobs]) - torch.cat(plain)).abs()
    mean, most = (0.02, 0.5) if dtype == "bf16" else (1e-5, 1e-4)
    assert torch.equal(before, layer.weight.data) and apart.mean() < mean and apart.max() < most, (
        apart.mean(),
        apart.max(),
    )


def test_large_weights_take_the_quickest_form_in_fp32(monkeypatch, exact):
    "Blocks are tried for them; small ones stay in rows, so that no run of a small model hangs on a clock"
    model, _ = exact
    if "blocked" not in weight_forms(model.get_base_model().lm_head, torch.float32):
        pytest.skip("this processor has no blocks in fp32")
    tried = []

    def seconds_of(forward, x, others):
        tried.append(type(forward))
        return 1.0 if type(forward) is fast_module._Blocked else 2.0

    monkeypatch.setattr(fast_module, "seconds_of", seconds_of)
    assert set(choose_forms(model, torch.float32, 8).values()) == {"as it is"} and not tried
    assert set(choose_forms(model, torch.float32, 8, small=0).values()) == {"blocked"} and fast_module._Blocked in tried


def test_rows_of_the_packed_kernel_are_few():
    "A long input takes the written-out weight, with the same result as training"
    model, _ = load_model("tiny", "nf4", "bf16", verbose=False)
    layer = model.model.layers[0].mlp.up_proj
    forms = weight_forms(layer, torch.bfloat16)
    if "packed" not in forms:
        pytest.skip("this processor has no packed form")
    x = torch.randn(1, 200, layer.in_features).bfloat16()
    with torch.no_grad():
        assert torch.equal(forms["packed"]()(x), forms["copy"]()(x))


@pytest.mark.parametrize("quantization,dtype", [("none", "fp32"), ("nf4", "bf16"), ("int8", "bf16")])
def test_thirteen_numbers_decode(quantization, dtype):
    "A TinyLoRA model: the log-probabilities are those of its plain pass, and not those of the base"
    from tinytrainer_nb.model.arguments import TinyLoraArgs
    from tinytrainer_nb.model.tinylora import add_tinylora

    model, tokenizer = load_model(small_base(), quantization=quantization, dtype=dtype, verbose=False)
    model = add_tinylora(model, TinyLoraArgs(n_tie=4))
    for p in trainable(model).values():
        p.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    out = sampled(model, tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        plain = [plain_logprobs(model, p, c, 1.0) for p, c in zip(out.prompt_ids, out.completion_ids)]
        with model.disable_adapter():
            base = [plain_logprobs(model, p, c, 1.0) for p, c in zip(out.prompt_ids, out.completion_ids)]
    apart = lambda other: (torch.cat([torch.tensor(x) for x in out.logprobs]) - torch.cat(other)).abs().mean()
    assert apart(plain) < (1e-5 if dtype == "fp32" else 0.03) and apart(base) > 0.1, (apart(plain), apart(base))


@pytest.mark.parametrize("stop", ["结束回答完毕", "🙂🙂🙂🙂", "apples and pears"])
def test_a_stop_text_of_many_tokens_is_seen(exact, stop):
    "A character may be several tokens; the row ends with the token that completes the text"
    tokenizer = exact[1]
    spoken = Spoken(tokenizer, 1, {2}, (stop,))
    for t in tokenizer(f"Say it: {stop} and more", add_special_tokens=False).input_ids:
        if not spoken.finished[0]:
            spoken.add(0, t, 0.0)
    assert spoken.finished[0] and spoken.text(0) == "Say it: " and "more" not in tokenizer.decode(spoken.tokens[0])


def test_forms_of_another_machine_are_chosen_anew(exact):
    "A run's forms are kept; one that does not exist here, as on a GPU or in fp32, does no harm"
    model, tokenizer = exact
    decoder = Decoder(model, torch.float32, 4, {k: "packed" for k in choose_forms(model, torch.float32, 4)})
    assert "packed" not in decoder.forms.values()
    assert sampled(model, tokenizer, decoder=decoder).completion_ids == sampled(model, tokenizer).completion_ids
    assert GenerateArgs(stop=None).stop == ()


def random_model(tmp_path, exact, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    exact[1].save_pretrained(tmp_path)
    return load_model(tmp_path, "none", "fp32", verbose=False)


def test_windows_and_caps_are_refused_not_ignored(tmp_path, exact):
    "A text within the window is that of transformers; a longer one, and capped scores, are refused"
    model, tokenizer = random_model(tmp_path / "mistral", exact, MistralConfig(**SMALL, sliding_window=64))
    plain, ids = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "mistral", dtype=torch.float32).eval(),
        torch.arange(3, 203)[None],
    )
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :60]).logits, plain(ids[:, :60]).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(TinyTrainerError, match="sees the last 64 tokens alone, and a text here has 200"):
        model(ids)
    with pytest.raises(TinyTrainerError, match="sees the last 64 tokens"):
        sampled(model, tokenizer, temperature=0.0, max_new_tokens=64)
    assert (
        len(sampled(model, tokenizer, ["Tom"], temperature=0.0, max_new_tokens=16, num_generations=1).completion_ids[0])
        == 16
    )
    with pytest.raises(TinyTrainerError, match="sees the last 64 tokens alone, and a text here has 65"):
        sampled(model, tokenizer, ["Tom"], temperature=0.0, max_new_tokens=128, num_generations=1)
    capped = Gemma2Config(**SMALL | dict(num_attention_heads=4), head_dim=16)
    with pytest.raises(TinyTrainerError, match="caps its attention scores"):
        random_model(tmp_path / "gemma", exact, capped)


def test_changed_logits_are_refused_where_they_would_be_wrong(tmp_path, exact):
    from tinytrainer_nb.all import DPOArgs, GRPOArgs, dpo, grpo

    model, tokenizer = random_model(tmp_path / "granite", exact, GraniteConfig(**SMALL, logits_scaling=8.0))
    model = add_lora(model, LoraArgs(r=2))
    with pytest.raises(TinyTrainerError, match=r"granite change their logits \(logits_scaling=8.0\)"):
        grpo(model, tokenizer, PROMPTS, "exact_answer", GRPOArgs(out=str(tmp_path / "grpo")))
    with pytest.raises(TinyTrainerError, match="granite change their logits"):
        dpo(model, tokenizer, [dict(prompt="a", chosen="b", rejected="c")] * 4, DPOArgs(out=str(tmp_path / "dpo")))
    assert not (tmp_path / "grpo").exists() and not (tmp_path / "dpo").exists()


def test_a_merged_adapter_counts_once():
    model, tokenizer = policy()
    before = sampled(model, tokenizer, temperature=0.0)
    model.merge_adapter()
    after = sampled(model, tokenizer, temperature=0.0)
    assert after.completion_ids == before.completion_ids
    for a, b in zip(before.logprobs, after.logprobs):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(merged(model, torch.float32)(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


class Doubled(torch.nn.Linear):
    "A layer that is no plain product though it is a Linear, as those of FP8 and routers"

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_linear_layer_with_a_forward_pass_of_its_own_keeps_it():
    model, tokenizer = policy()
    block = model.get_base_model().model.layers[0].mlp
    own = block.up_proj.base_layer
    twice = own.weight.data.clone()
    own.__class__ = Doubled
    said = sampled(model, tokenizer, temperature=0.0)
    assert why_not(model) == "Doubled layers keep their own forward pass"
    with pytest.raises(TinyTrainerError, match="Doubled weights cannot be written out"):
        merged(model)
    own.__class__ = torch.nn.Linear
    own.weight.data = 2 * twice
    plain = sampled(model, tokenizer, temperature=0.0)
    assert (
        said.completion_ids == plain.completion_ids
        and plain.completion_ids != sampled(*policy(), temperature=0.0).completion_ids
    )


def test_adalora_speaks_by_its_own_forward_pass():
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    before = sampled(model, tokenizer, temperature=0.0).completion_ids
    model = get_peft_model(
        model, AdaLoraConfig(target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1, task_type="CAUSAL_LM")
    )
    assert sampled(model, tokenizer, temperature=0.0).completion_ids == before  # fresh
    for name, p in model.named_parameters():
        if "lora_E" in name:
            torch.nn.init.constant_(p, 5.0)
    assert sampled(model, tokenizer, temperature=0.0).completion_ids != before


def test_what_is_added_to_scores_is_refused(tmp_path, exact):
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    ).eval()
    model.config._attn_implementation = "packed"
    with pytest.raises(TinyTrainerError, match="adds to its attention scores .s_aux."):
        model(torch.arange(3, 13)[None])


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=1032, hidden_size=32, n_layer=1, n_head=2),
        MambaConfig(vocab_size=1032, hidden_size=32, num_hidden_layers=1, state_size=4),
    ],
    ids=["attention", "state"],
)
def test_models_in_which_documents_would_see_each_other_are_refused(tmp_path, exact, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    exact[1].save_pretrained(tmp_path)
    with pytest.raises(TinyTrainerError, match="has an attention, or a state, of its own"):
        load_model(tmp_path, "none", verbose=False)
