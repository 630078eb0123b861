"""A second adapter on top of a frozen first one: both speak, one learns, and the stack is saved, resumed, merged and
taken for the reference as one."""

import math
import time

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small import small_base
from transformers import AutoModelForCausalLM

from tinytrainer_nb.all import (
    DPOArgs,
    PPOArgs,
    RewardModelArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    data_file,
    dpo,
    load_examples,
    load_model,
    model_reward,
    ppo,
    reward_model,
    save_merged,
    sft,
)
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.export import merged
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.lora import (
    add_lora,
    freeze_reference,
    is_fresh,
    saved_adapters,
    stack_adapter,
    using_adapters,
)

IDS = torch.arange(3, 67).reshape(2, 32)
QUICK = dict(warmup_steps=0, eval_steps=0, sample_steps=0, save_steps=0)


def base(quantization="none"):
    return load_model(small_base(), quantization, "fp32", verbose=False)


def changed(model, seed: int):
    "The adapter that is trained, changed much"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def stack(quantization="none", **top):
    "Two trained adapters on one base"
    model = changed(add_lora(base(quantization)[0], LoraArgs(r=4)), 0)
    return changed(stack_adapter(model, LoraArgs(**dict(r=2) | top)), 1).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


def adapter(model, name: str) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if name in n.split(".")}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def examples():
    return load_examples(data_file("sft.jsonl")).select(range(24))


@pytest.mark.parametrize(
    "top", [{}, dict(target_modules="q_proj,down_proj", layers="1"), dict(dora=True), dict(rslora=True)], ids=str
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_stack_is_more_than_each_and_equals_the_merged_one(quantization, top):
    model = stack(quantization, **top)
    both, whole = logits(model), merged(model, torch.float32)
    for name in ("default", "cot"):
        with using_adapters(model, [name]):
            assert (logits(model) - both).abs().max() > 0.5
    assert (logits(whole) - both).abs().max() < 1e-4
    assert torch.equal(logits(model), both)  # the model is as it was


def test_the_corrections_add_up():
    "Against the formula written out for one layer"
    layer = stack().base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    delta = {
        name: layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("default", "cot")
    }
    torch.testing.assert_close(
        layer(x), x @ (layer.base_layer.weight + delta["default"] + delta["cot"]).T, atol=1e-4, rtol=1e-4
    )


def test_only_the_top_learns(tmp_path):
    model, tokenizer = base()
    model = stack_adapter(changed(add_lora(model, LoraArgs(r=4)), 0), LoraArgs(r=2))
    assert is_fresh(model) and all(".cot." in n for n in trainable(model))
    below, top = adapter(model, "default"), adapter(model, "cot")
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".cot." not in n)
    assert all(p.grad.any() for n, p in model.named_parameters() if ".lora_B.cot." in n)
    sft(model, tokenizer, examples(), SFTArgs(max_steps=3, batch_size=4, out=str(tmp_path / "run"), **QUICK))
    assert same(below, adapter(model, "default")) and not same(top, adapter(model, "cot"))


def test_a_run_on_a_run_is_saved_loaded_and_merged(tmp_path):
    model, tokenizer = base()
    args = dict(max_steps=2, batch_size=4, learning_rate=1e-2, **QUICK)
    first = sft(add_lora(model, LoraArgs(r=4)), tokenizer, examples(), SFTArgs(out=str(tmp_path / "sft"), **args))
    model, tokenizer = load_model(first.folder, verbose=False)
    model = stack_adapter(model, LoraArgs(r=2))
    run = sft(model, tokenizer, examples(), SFTArgs(out=str(tmp_path / "cot"), **args))
    expected = logits(model.eval())
    assert saved_adapters(run.folder / "adapter") == saved_adapters(run.folder / "start") == ["default", "cot"]
    assert run.info["load"]["adapter"]["cot"]["r"] == 2
    again = load_model(run.folder, verbose=False)[0].eval()
    assert again.active_adapters == ["default", "cot"] and all(".cot." in n for n in trainable(again))
    assert torch.equal(logits(again), expected)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_base(), dtype=torch.float32), run.folder / "adapter"
    )
    plain.load_adapter(run.folder / "adapter" / "cot", "cot")
    plain.base_model.set_adapter(["default", "cot"])
    assert (logits(plain.eval()) - expected).abs().max() < 1e-4
    save_merged(run, tmp_path / "whole", "fp32")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")) - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_a_stopped_stack_resumes_to_the_same_end(tmp_path):
    def train(out, live=False):
        model, tokenizer = base()
        model = stack_adapter(changed(add_lora(model, LoraArgs(r=4)), 0), LoraArgs(r=2))
        return sft(
            model,
            tokenizer,
            examples(),
            SFTArgs(max_steps=12, batch_size=3, learning_rate=1e-3, out=str(tmp_path / out), **QUICK),
            live=live,
        )

    train("whole")
    run = train("stopped", live=True)
    while not run.step:
        time.sleep(0.01)
    run.stop()
    run.wait()
    assert run.status == "stopped" and 0 < run.step < 12
    Run.open(run.folder).resume()
    files = ["adapter_model.safetensors", "cot/adapter_model.safetensors"]
    assert all(
        (tmp_path / "whole" / "adapter" / f).read_bytes() == (run.folder / "adapter" / f).read_bytes() for f in files
    )


@pytest.mark.parametrize("trained", [False, True], ids=["fresh on top", "trained on top"])
def test_the_reference_of_a_stack_is_the_stack_as_it_was_handed_over(trained):
    model = stack_adapter(changed(add_lora(base("nf4")[0], LoraArgs(r=4)), 0), LoraArgs(r=2)).eval()
    if trained:
        changed(model, 1)
    before, names = logits(model), trainable(model).keys()
    reference = freeze_reference(model)
    assert trainable(model).keys() == names
    changed(model, 2)
    assert (logits(model) - before).abs().max() > 0.5
    with using_adapters(model, reference):
        assert torch.equal(logits(model), before)
    after = logits(model)
    for name in reference:
        model.delete_adapter(name)
    assert (
        model.active_adapters == ["default", "cot"]
        and torch.equal(logits(model), after)
        and trainable(model).keys() == names
    )


def test_ppo_on_a_stack_starts_at_its_reference(tmp_path):
    model, tokenizer = base()
    model = changed(stack_adapter(changed(add_lora(model, LoraArgs(r=4)), 0), LoraArgs(r=2)), 1)
    below = adapter(model, "default")
    run = ppo(
        model,
        tokenizer,
        [dict(messages=[dict(role="user", content="Say a number.")])] * 4,
        lambda prompt, completion: float(len(completion)),
        PPOArgs(
            max_steps=2,
            batch_size=2,
            num_generations=2,
            max_new_tokens=8,
            minibatches=1,
            learning_rate=1e-2,
            out=str(tmp_path / "ppo"),
            **QUICK,
        ),
    )
    kl = run.history("kl")[1]
    assert kl[0] == 0.0 and kl[1] != 0.0
    assert model.active_adapters == ["default", "cot"] and same(below, adapter(model, "default"))


@pytest.mark.parametrize("name", ["default", "layers", "q_proj", "two words", "reference", "../up"])
def test_names_that_would_be_mistaken_are_refused(name):
    with pytest.raises(TinyTrainerError, match="is not allowed"):
        stack_adapter(add_lora(base()[0], LoraArgs(r=2)), name=name)


def test_a_stack_needs_something_below():
    with pytest.raises(TinyTrainerError, match="no adapter to stack another one on"):
        stack_adapter(base()[0])
    with pytest.raises(
        TinyTrainerError, match="Its linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ):
        stack_adapter(add_lora(base()[0], LoraArgs(r=2)), LoraArgs(target_modules="q_prj"))


@pytest.mark.parametrize(
    "config, said",
    [
        (dict(modules_to_save=["lm_head"]), "brings a whole linear module or some tokens' embeddings"),
        (dict(trainable_token_indices=[3, 10]), "brings a whole linear module or some tokens' embeddings"),
    ],
    ids=str,
)
def test_what_peft_cannot_save_in_a_stack_is_refused(config, said):
    model = peft.get_peft_model(base()[0], peft.LoraConfig(r=2, target_modules=["q_proj"], **config))
    with pytest.raises(TinyTrainerError, match=said):
        stack_adapter(model)


def test_another_kind_below_is_named():
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(TinyTrainerError, match="this model has one of the kind IA3. Merge it first"):
        stack_adapter(peft.get_peft_model(base()[0], config))
    named = peft.get_peft_model(base()[0], peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="math")
    with pytest.raises(TinyTrainerError, match="the adapter in use is called math"):
        stack_adapter(named)


PAIRS = [dict(prompt=f"How much is {i} and {i}?", chosen=f"It is {2 * i}.", rejected="No idea.") for i in range(12)]


@pytest.mark.parametrize("trained", [False, True])
def test_dpo_on_a_stack_prefers_to_the_stack_as_it_was_handed_over(tmp_path, trained):
    "The reference is the whole stack, so the first loss is log 2; and the top alone learns"
    model, tokenizer = base()
    model = changed(add_lora(model, LoraArgs(r=4)), 0)
    model = stack_adapter(model, LoraArgs(r=2))
    if trained:
        changed(model, 1)
    below, names = adapter(model, "default"), set(model.peft_config)
    run = dpo(
        model,
        tokenizer,
        PAIRS,
        DPOArgs(max_steps=2, batch_size=4, out=str(tmp_path / "run"), **QUICK | dict(save_steps=1)),
    )
    assert abs(run.history("loss")[1][0] - math.log(2)) < 1e-5 and abs(run.history("margin")[1][0]) < 1e-5
    assert all(
        "cot" in name.split(".")
        for name in load_file(run.folder / "checkpoints" / "step-000001" / "trained.safetensors")
    )
    assert (
        same(below, adapter(model, "default"))
        and set(model.peft_config) == names
        and model.active_adapters == ["default", "cot"]
    )
    assert saved_adapters(run.folder / "adapter") == ["default", "cot"] and all(
        "cot" in name.split(".") for name in trainable(model)
    )


def test_a_reward_model_on_a_stack_comes_back_with_what_it_learned(tmp_path):
    model, tokenizer = base()
    model = stack_adapter(changed(add_lora(model, LoraArgs(r=4)), 0), LoraArgs(r=2))
    run = reward_model(
        model,
        tokenizer,
        PAIRS,
        RewardModelArgs(
            max_steps=6, batch_size=4, learning_rate=1e-2, out=str(tmp_path / "run"), **QUICK | dict(sample_steps=6)
        ),
    )
    said = {
        e["completion"]: e["reward"]
        for e in run.events
        if e["kind"] == "sample" and e["step"] == 6 and e["prompt"] == PAIRS[0]["prompt"]
    }
    found = model_reward(run.folder)([PAIRS[0]["prompt"]] * 2, list(said))
    assert len(said) == 2 and found == pytest.approx(list(said.values()), abs=1e-5) and found[0] > found[1]
