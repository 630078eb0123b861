"""Adapters leave the house: merged into plain weights, or loaded by plain PEFT; both say what the model in training
says."""

import functools
import json
import shutil

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tinytrainer_nb.all import (
    PPOArgs,
    PretrainArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    data_file,
    load_examples,
    load_model,
    ppo,
    pretrain,
    save_merged,
    sft,
)
from tinytrainer_nb.model import export
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.export import exact_logits, merged
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.lora import (
    add_lora,
    freeze_reference,
    is_fresh,
    using_adapters,
)

KINDS = dict(
    lora={},
    rslora=dict(rslora=True),
    dora=dict(dora=True),
    some_layers=dict(layers="1,3-5", target_modules="q_proj,down_proj"),
)
IDS = torch.arange(3, 67).reshape(2, 32)


def trained(quantization, **kind):
    "A model in fp32 with an adapter that changes much"
    model, _ = load_model("tiny", quantization, "fp32", verbose=False)
    model = add_lora(model, LoraArgs(r=4, **kind))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in trainable(model).items():
            if "lora_B" in n:
                p.normal_(std=0.05, generator=generator)
            if "magnitude" in n:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_merged_logits_are_those_of_the_adapter(quantization, kind):
    model = trained(quantization, **KINDS[kind])
    before = logits(model)
    whole = merged(model, torch.float32)
    with model.disable_adapter():
        assert (before - logits(model)).abs().max() > 1  # the adapter does something
    assert (logits(whole) - before).abs().max() < 1e-4
    for p in whole.parameters():
        p.data.zero_()
    assert torch.equal(logits(model), before)  # the model is as it was, and stays so
    assert type(whole) is type(model.get_base_model()) and not any("lora" in n for n in whole.state_dict())


def test_int8_is_merged_with_the_weights_in_memory():
    """int8 rounds the inputs of every product too, which no 16-bit model does: the oracle is the base with the
    written-out weights"""
    model = trained("int8")
    whole = merged(model, torch.float32)
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = (
        q.base_layer.weight.data.float() * q.base_layer.weight.SCB[:, None].float() / 127
        + q.get_delta_weight("default").float()
    )
    torch.testing.assert_close(whole.model.layers[0].self_attn.q_proj.weight, weight, atol=1e-5, rtol=1e-5)
    assert (logits(whole) - logits(model)).abs().mean() < 0.3


def test_two_adapters_merge_as_they_add_up():
    model = trained("nf4")
    model.add_adapter("second", model.peft_config["default"])
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B.second" in n:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    model.base_model.set_adapter(["default", "second"])
    assert (logits(merged(model, torch.float32)) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_an_adapter_for_peft_and_a_model_for_transformers(tmp_path, kind):
    model, tokenizer = load_model("tiny", "none", "fp32", verbose=False)
    run = sft(
        add_lora(model, LoraArgs(r=4, **KINDS[kind])),
        tokenizer,
        load_examples(data_file("sft.jsonl")).select(range(8)),
        SFTArgs(
            max_steps=2,
            batch_size=4,
            learning_rate=1e-2,
            warmup_steps=0,
            eval_steps=0,
            sample_steps=0,
            save_steps=0,
            out=str(tmp_path / "run"),
        ),
    )
    expected = logits(model.eval())
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(data_file("tiny"), dtype=torch.float32), run.folder / "adapter"
    )
    assert (logits(plain.eval()) - expected).abs().max() < 1e-4
    save_merged(run, tmp_path / "fp32", "fp32")
    save_merged(run.folder, tmp_path / "bf16")
    whole, half = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("fp32", "bf16"))
    assert (logits(whole) - expected).abs().max() < 1e-4 and half.dtype == torch.bfloat16
    again, _ = load_model(run.folder, verbose=False)
    assert (logits(again.eval()) - expected).abs().max() < 1e-4
    with pytest.raises(TinyTrainerError, match="something is here already"):
        save_merged(run, tmp_path / "bf16")


def test_a_dora_adapter_is_its_own_reference(tmp_path):
    "PPO that follows a DoRA fine-tuning starts at KL 0: the frozen copy has the lengths too"
    model, tokenizer = load_model("tiny", "none", "fp32", verbose=False)
    model = add_lora(model, LoraArgs(r=4, dora=True))
    with torch.no_grad():
        for n, p in trainable(model).items():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    run = ppo(
        model,
        tokenizer,
        [dict(messages=[dict(role="user", content="Say a number.")])] * 4,
        lambda prompt, completion: float(len(completion)),
        PPOArgs(
            max_steps=1,
            batch_size=2,
            num_generations=2,
            max_new_tokens=8,
            minibatches=1,
            sample_steps=0,
            save_steps=0,
            out=str(tmp_path / "ppo"),
        ),
    )
    assert run.history("kl")[1] == [0.0]


@pytest.mark.parametrize(
    "layers, said",
    [
        ("0-9", "this model has layers 0 to 6"),
        ("a", "must be all, or numbers and ranges"),
        ("6-4", "from low to high"),
        ("", "must be all"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, said):
    with pytest.raises(TinyTrainerError, match=said):
        add_lora(load_model("tiny", "none", "fp32", verbose=False)[0], LoraArgs(layers=layers))


def test_unknown_targets_are_named_with_the_known_ones():
    with pytest.raises(
        TinyTrainerError, match="Its linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ):
        add_lora(load_model("tiny", "none", "fp32", verbose=False)[0], LoraArgs(target_modules="q_prj"))


# Every base and every kind of adapter: merged right, or refused by name

SHAPE = dict(
    vocab_size=1032,  # some tokenizers add one of their own
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)
MIXTURE = SHAPE | dict(num_key_value_heads=2, num_experts_per_tok=2)
BASES = dict(
    llama=lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    qwen=lambda: transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    gemma=lambda: transformers.GemmaConfig(**SHAPE, num_key_value_heads=2, head_dim=16),
    opt=lambda: transformers.OPTConfig(**SHAPE, ffn_dim=96, word_embed_proj_dim=64),
    gpt2=lambda: transformers.GPT2Config(
        vocab_size=1032, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    mixtral=lambda: transformers.MixtralConfig(**MIXTURE, num_local_experts=4),
    qwen_moe=lambda: transformers.Qwen2MoeConfig(
        **MIXTURE, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=48
    ),
)
HEAD = {"gpt2": "c_attn,lm_head", "opt": "q_proj,lm_head"}
EMBEDDINGS = {"gpt2": "c_attn,wte"}
PLAIN = dict(task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "The folder of a base with random weights, by its name"

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp("base") / name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(BASES[name]()).save_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(data_file("tiny")).save_pretrained(path)
        return path

    return folder


def loaded(folder, quantization="none", dtype="fp32", adapter=None):
    model, _ = load_model(folder, quantization, dtype, verbose=False)
    if isinstance(adapter, LoraArgs):
        return add_lora(model, adapter)
    report = model.load_report
    model = peft.get_peft_model(model, adapter)
    model.load_report = report
    return model


@torch.no_grad()
def shaken(model, seed=0, std=0.05):
    "The adapter as a training might leave it"
    generator = torch.Generator().manual_seed(seed)
    for p in trainable(model).values():
        p.add_(std * torch.randn(p.shape, generator=generator))
    return model.eval()


def written(model, folder):
    "Merged, saved, and read by plain `transformers`"
    merged(model, torch.float32).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", BASES)
def test_every_base_is_merged(base, tmp_path, name, quantization):
    model = shaken(loaded(base(name), quantization, adapter=LoraArgs(r=4)))
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.1
    assert (logits(written(model, tmp_path)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("targets", [HEAD, EMBEDDINGS], ids=["head", "embeddings"])
@pytest.mark.parametrize("name", ["llama", "gemma", "opt", "gpt2"])
def test_a_head_with_its_own_adapter_is_untied(base, tmp_path, name, targets):
    default = "q_proj,lm_head" if targets is HEAD else "q_proj,embed_tokens"
    model = shaken(loaded(base(name), adapter=LoraArgs(r=4, target_modules=targets.get(name, default))))
    plain = written(model, tmp_path)
    assert (logits(plain) - logits(model)).abs().max() < 1e-4
    assert plain.config.tie_word_embeddings is False
    assert model.get_base_model().config.tie_word_embeddings is True  # the base is as it was


def test_a_head_without_an_adapter_stays_tied(base, tmp_path):
    model = shaken(loaded(base("llama"), adapter=LoraArgs(r=4)))
    assert written(model, tmp_path).config.tie_word_embeddings is True
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


ADAPTERS = dict(
    dora=lambda: LoraArgs(r=4, dora=True),
    dora_conv1d=lambda: LoraArgs(r=4, dora=True),
    dora_conv1d_nf4=lambda: LoraArgs(r=4, dora=True),
    int8_conv1d=lambda: LoraArgs(r=4),
    dora_embeddings=lambda: LoraArgs(r=4, dora=True, target_modules="embed_tokens"),
    bias=lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], lora_bias=True, **PLAIN),
    whole_head=lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], **PLAIN),
    some_tokens=lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 9], **PLAIN),
    pissa=lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", **PLAIN),
    experts=lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"], **PLAIN
    ),
    ia3=lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **PLAIN),
    loha=lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], **PLAIN),
    lokr=lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"], **PLAIN),
    vera=lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], **PLAIN),
    oft=lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], **PLAIN),
    adalora=lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], **PLAIN),
)
OVER = dict(
    dora_conv1d=("gpt2", "none"),
    dora_conv1d_nf4=("gpt2", "nf4"),
    bias=("opt", "none"),
    experts=("mixtral", "none"),
)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "int8_conv1d"])
def test_every_kind_of_adapter_is_merged(base, tmp_path, kind):
    name, quantization = OVER.get(kind, ("llama", "none"))
    model = shaken(loaded(base(name), quantization, adapter=ADAPTERS[kind]()), std=0.2)
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.002
    assert (logits(written(model, tmp_path)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name, quantization, adapter, said",
    [
        (
            "llama",
            "none",
            lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, **PLAIN),
            "has a bias",
        ),
        ("llama", "nf4", ADAPTERS["ia3"], "ia3.Linear4bit cannot be merged"),
        ("llama", "none", lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **PLAIN), "no layers to merge"),
    ],
)
def test_what_cannot_be_merged_is_named(base, name, quantization, adapter, said):
    with pytest.raises(TinyTrainerError, match=said):
        merged(shaken(loaded(base(name), quantization, adapter=adapter())), torch.float32)


@pytest.mark.parametrize("quantization, dtype", [("none", "bf16"), ("none", "fp16"), ("nf4", "bf16"), ("int8", "bf16")])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_check_looks_at_weights_and_not_at_rounding(base, name, quantization, dtype):
    "In fp32 on both sides, whatever the run computes in; afterwards its weights are as they were"
    model = shaken(loaded(base(name), quantization, dtype, LoraArgs(r=4)))
    before = {n: p.clone() for n, p in model.named_parameters()}
    plain = merged(model, torch.float32)
    expected = plain(input_ids=torch.arange(32)[None] * 7 + 3).logits.detach()
    assert (exact_logits(model) - expected).abs().max() < 1e-4
    assert all(p.dtype == before[n].dtype and torch.equal(p, before[n]) for n, p in model.named_parameters())


# A merged run checks itself, and keeps how its base is spoken with


def quick_run(folder, tmp_path, quantization="none", dtype="fp32", args=None):
    model, tokenizer = load_model(folder, quantization, dtype, verbose=False)
    rows = [dict(prompt=f"How many legs have {n} hens?", completion=f"{2 * n} legs") for n in range(8)]
    settings = dict(max_steps=2, batch_size=4, learning_rate=2e-2, warmup_steps=0, eval_steps=0, sample_steps=0)
    return sft(
        add_lora(model, args or LoraArgs(r=4)),
        tokenizer,
        rows,
        SFTArgs(max_length=200, save_steps=0, out=str(tmp_path / "run"), **settings),
    )


@pytest.mark.parametrize(
    "name, quantization, targets",
    [("gpt2", "nf4", "all-linear"), ("llama", "none", "q_proj,lm_head"), ("mixtral", "none", "all-linear")],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_is_merged(base, tmp_path, name, quantization, targets, dtype):
    run = quick_run(base(name), tmp_path, quantization, dtype, LoraArgs(r=4, target_modules=targets))
    save_merged(run, tmp_path / "merged", "fp32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (exact_logits(plain) - exact_logits(run.model)).abs().max() < 1e-4


def test_biases_of_the_base_belong_to_the_adapter_that_trains_them(base, tmp_path):
    "A run on them is stopped, resumed, loaded, trained on and merged."
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], bias="lora_only", **PLAIN)
    model, tokenizer = loaded(base("opt"), adapter=config), transformers.AutoTokenizer.from_pretrained(base("opt"))
    rows = [dict(prompt=f"How many legs have {n} hens?", completion=f"{2 * n} legs") for n in range(8)]
    settings = dict(batch_size=4, learning_rate=2e-2, warmup_steps=0, eval_steps=0, sample_steps=0, max_length=200)
    args = SFTArgs(max_steps=3, out=str(tmp_path / "run"), **settings)
    run = sft(model, tokenizer, rows, args, live=True)
    run.stop()
    run.wait()
    assert run.status == "stopped"
    run = Run.open(run.folder).resume()
    again, tokenizer = load_model(run.folder, verbose=False)
    assert run.status == "finished" and torch.equal(logits(again.eval()), logits(run.model.eval()))
    second = sft(again, tokenizer, rows, SFTArgs(max_steps=1, out=str(tmp_path / "second"), **settings))
    save_merged(second, tmp_path / "merged", "fp32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(plain) - logits(second.model.eval())).abs().max() < 1e-4


@pytest.mark.parametrize("fault", ["weight", "tied", "file", "nan"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_that_went_wrong_leaves_nothing(base, tmp_path, monkeypatch, fault, dtype):
    run = quick_run(base("llama"), tmp_path)
    right, save = export._merged_weight, transformers.PreTrainedModel.save_pretrained

    def spoiled(self, folder, **how):
        self.model.layers[0].mlp.up_proj.weight.data[0] *= 1.5
        save(self, folder, **how)
        self.model.layers[0].mlp.up_proj.weight.data[0] /= 1.5

    if fault == "weight":
        monkeypatch.setattr(export, "_merged_weight", lambda layer: right(layer) * 1.01)
    if fault == "tied":
        monkeypatch.setattr(export, "_tie_again", lambda base, plain: plain.lm_head.weight.data.mul_(1.1))
    if fault == "file":
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", spoiled)
    if fault == "nan":
        monkeypatch.setattr(export, "_merged_weight", lambda layer: right(layer) * float("nan"))
    with pytest.raises(TinyTrainerError, match="does not say what the run's model says: a logit .* differs by"):
        save_merged(run, tmp_path / "merged", dtype)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    monkeypatch.undo()
    assert save_merged(run, tmp_path / "merged", dtype).exists()


@pytest.mark.parametrize(
    "config, kept",
    [
        (dict(eos_token_id=[2, 5], repetition_penalty=1.05), dict(eos_token_id=[2, 5], repetition_penalty=1.05)),
        (dict(eos_token_id=5, do_sample=True, top_k=7), dict(eos_token_id=[5, 2], do_sample=True, top_k=7)),
        (dict(eos_token_id=2, temperature=0.6, top_p=0.9), dict(eos_token_id=2, temperature=0.6, top_p=0.9)),
        (dict(eos_token_id=2, use_cache=False, pad_token_id=3), dict(eos_token_id=2, pad_token_id=3)),
        (None, dict(eos_token_id=2)),
    ],
    ids=["two ends", "another end", "what transformers would not save", "a training's", "none"],
)
def test_a_generation_config_is_kept_whole(base, tmp_path, config, kept):
    shutil.copytree(base("llama"), tmp_path / "base")
    if config is None:
        (tmp_path / "base/generation_config.json").unlink(missing_ok=True)
    else:
        (tmp_path / "base/generation_config.json").write_text(json.dumps(config))
    save_merged(quick_run(tmp_path / "base", tmp_path), tmp_path / "merged")
    said = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert {name: said.get(name) for name in kept} == kept and "use_cache" not in said
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id == kept["eos_token_id"]
    )


# References: fresh or not, for every kind of adapter


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_is_fresh_changes_nothing_and_what_was_trained_is_not_fresh(base, kind):
    name, quantization = OVER.get(kind, ("llama", "none"))
    model = loaded(base(name), quantization, adapter=ADAPTERS[kind]()).eval()
    fresh, policy = is_fresh(model), logits(model)
    with using_adapters(model, []):
        unchanged = (logits(model) - policy).abs().max() < 1e-5
    assert unchanged or not fresh  # a fresh one changes nothing
    assert fresh == (kind not in ("dora_embeddings", "pissa", "some_tokens"))  # of these it is not known
    assert not is_fresh(shaken(model))


@pytest.mark.parametrize("quantization, dtype", [("none", "bf16"), ("nf4", "bf16"), ("int8", "bf16"), ("nf4", "fp32")])
def test_lengths_of_dora_are_fresh_in_every_format(base, quantization, dtype):
    model = loaded(base("llama"), quantization, dtype, LoraArgs(r=4, dora=True))
    assert is_fresh(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "magnitude" in n)[0] *= 1.1
    assert not is_fresh(model)


@pytest.mark.parametrize("part", ["magnitude", "lora_B", "lora_bias", "embedding", "whole", "base_bias"])
def test_one_part_that_moved_is_enough(base, part):
    lora = dict(r=4, target_modules=["q_proj"]) | PLAIN
    config = dict(
        magnitude=lambda: peft.LoraConfig(**lora, use_dora=True),
        lora_B=lambda: peft.LoraConfig(**lora),
        lora_bias=lambda: peft.LoraConfig(**lora, lora_bias=True),
        embedding=lambda: peft.LoraConfig(**lora | dict(target_modules=["embed_tokens"])),
        whole=lambda: peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        base_bias=lambda: peft.LoraConfig(**lora, bias="all"),
    )[part]()
    model = loaded(base("opt"), adapter=config)
    assert is_fresh(model) or part == "base_bias"
    ends = dict(
        magnitude="magnitude_vector.default.weight", lora_B="lora_B.default.weight", base_bias="q_proj.base_layer.bias"
    )
    ends |= dict(
        lora_bias="lora_B.default.bias", embedding="embedding_A.default", whole="modules_to_save.default.weight"
    )
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(ends[part])).view(-1)[0] += 0.1
    assert not is_fresh(model)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind not in ("adalora", "int8_conv1d")] + ["fourier"])
def test_a_reference_is_the_policy_as_it_was(base, kind):
    config = ADAPTERS.get(kind, lambda: peft.FourierFTConfig(n_frequency=50, target_modules=["q_proj"], **PLAIN))()
    name, quantization = OVER.get(kind, ("llama", "none"))
    model = shaken(loaded(base(name), quantization, adapter=config), std=0.2)
    policy, count = logits(model), len(trainable(model))
    reference = freeze_reference(model)
    assert torch.equal(logits(model), policy) and len(trainable(model)) == count
    moved = logits(shaken(model, seed=1, std=0.2))
    with using_adapters(model, reference):
        assert (logits(model) - policy).abs().max() < 1e-5
    with using_adapters(model, []):
        alone = logits(model)
    assert min((moved - policy).abs().max(), (alone - policy).abs().max()) > 1e-3
    assert torch.equal(logits(model), moved)


@pytest.mark.parametrize(
    "adapter",
    [
        ADAPTERS["adalora"],
        lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **PLAIN),
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only", **PLAIN),
        lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 9], **PLAIN),
    ],
    ids=["adalora", "prompt tuning", "biases of the base", "some tokens alone"],
)
def test_a_kind_that_has_no_frozen_copy_is_refused(base, adapter):
    model = shaken(loaded(base("opt"), adapter=adapter()))
    with pytest.raises(TinyTrainerError, match="cannot stand beside a frozen copy of itself"):
        freeze_reference(model)


def test_an_adapter_of_words_is_refused_at_the_load(base, tmp_path):
    model = loaded(base("llama"), adapter=peft.PromptTuningConfig(num_virtual_tokens=4, **PLAIN))
    model.peft_config["default"].base_model_name_or_path = str(base("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(TinyTrainerError, match=r"puts words in front of a text \(PROMPT_TUNING\)"):
        load_model(tmp_path, verbose=False)


# Pretraining writes what it trained


def pretrained(folder, out, dtype="fp32", **settings):
    model, tokenizer = load_model(folder, "none", dtype, verbose=False)
    texts = ["The hens of Oakdale have two legs each, and so has the farmer who feeds them."] * 30
    few = dict(max_steps=1, max_length=32, batch_size=2, eval_steps=0, save_steps=0, sample_steps=0) | settings
    return pretrain(model, tokenizer, texts, PretrainArgs(out=str(out), **few))


def test_a_head_that_the_config_calls_tied_is_written(base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    rows = tensors["model.embed_tokens.weight"]
    other = rows * torch.linspace(0.5, 1.5, len(rows))[:, None]
    save_file(tensors | {"lm_head.weight": other}, file, metadata={"format": "pt"})
    run = pretrained(tmp_path / "base", tmp_path / "run")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    assert (logits(again) - logits(run.model)).abs().max() < 1e-5


def test_weights_that_do_not_come_back_are_an_error(base, tmp_path, monkeypatch):
    from tinytrainer_nb.recipes import pretrain as module

    monkeypatch.setattr(module, "_is_tied", lambda model: True)
    shutil.copytree(base("llama"), tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, file, metadata={"format": "pt"})
    with pytest.raises(TinyTrainerError, match="comes back as another one"):
        pretrained(tmp_path / "base", tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    "config",
    [
        dict(eos_token_id=2, temperature=0.6, top_p=0.9),
        dict(eos_token_id=2, num_beams=1, early_stopping=True),
        dict(eos_token_id=[2, 5], do_sample=True, top_k=7),
    ],
    ids=["temperature", "beams", "sampling"],
)
def test_pretraining_keeps_a_generation_config_whole(base, tmp_path, config):
    shutil.copytree(base("llama"), tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(config))
    assert pretrained(tmp_path / "base", tmp_path / "run").status == "finished"
    said = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert {name: said.get(name) for name in config} == config


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_what_was_pretrained_in_the_same_process(base, tmp_path, dtype):
    "Its base is the files that were written: their names, hashes, tokenizer and rounding"
    first = pretrained(base("llama"), tmp_path / "first", dtype, learning_rate=3e-3, max_steps=2)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "first/model", dtype=torch.float32)
    assert torch.equal(logits(written), logits(first.model))
    model, rows = first.model.requires_grad_(False), [dict(prompt="Hens?", completion="Two legs.")] * 4
    few = dict(max_steps=1, batch_size=2, eval_steps=0, save_steps=0, sample_steps=0)
    second = sft(add_lora(model, LoraArgs(r=2)), first.tokenizer, rows, SFTArgs(out=str(tmp_path / "second"), **few))
    again, _ = load_model(tmp_path / "second", "none", "fp32", verbose=False)
    assert (logits(again) - logits(second.model)).abs().max() < 1e-4


@pytest.mark.parametrize("targets", [["input_layernorm"], ["norm"], ["post_attention_layernorm", "q_proj"]])
def test_norms_with_an_adapter(base, tmp_path, targets):
    model, tokenizer = load_model(base("llama"), "none", "fp32", verbose=False)
    report, config = model.load_report, peft.LNTuningConfig(target_modules=targets, **PLAIN)
    model = peft.get_peft_model(model, config)
    model.load_report = report
    rows = [dict(prompt="Hens?", completion="Two legs.")] * 4
    few = dict(max_steps=1, batch_size=2, eval_steps=0, save_steps=0, sample_steps=0)
    run = sft(model, tokenizer, rows, SFTArgs(out=str(tmp_path / "run"), **few))
    assert run.info["fast"]["why"] == "off: a norm has an adapter"
    assert torch.equal(logits(load_model(tmp_path / "run", verbose=False)[0]), logits(run.model))
