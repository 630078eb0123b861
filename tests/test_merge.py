"""Adapters leave the house: merged into plain weights, or loaded by plain PEFT; both say what the model in training
says."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tinytrainer_nb.all import (
    PPOArgs,
    SFTArgs,
    TinyTrainerError,
    data_file,
    load_examples,
    load_model,
    ppo,
    save_merged,
    sft,
)
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.export import merged
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.lora import add_lora

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
    assert torch.equal(logits(model), before)  # the model is as it was
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
