"""Thirteen numbers: against the formula with a full decomposition, against autograd, against PEFT; saved small, found
again elsewhere, refused where they mean nothing."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft import TinyLoraConfig as PeftTinyLora
from safetensors.torch import load_file
from small import small_base
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tinytrainer_nb.all import (
    PPOArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    data_file,
    load_examples,
    load_model,
    ppo,
    save_merged,
    sft,
)
from tinytrainer_nb.hardware import peak_memory
from tinytrainer_nb.model import tinylora
from tinytrainer_nb.model.arguments import LoraArgs, TinyLoraArgs
from tinytrainer_nb.model.base import compute_context, new_model
from tinytrainer_nb.model.export import merged
from tinytrainer_nb.model.layers import count_trainable, trainable
from tinytrainer_nb.model.load import with_adapter
from tinytrainer_nb.model.lora import (
    add_lora,
    freeze_reference,
    is_fresh,
    save_adapter,
    stack_adapter,
    using_adapters,
)
from tinytrainer_nb.model.tinylora import (
    TinyLoraLayer,
    adapter_line,
    add_tinylora,
    from_line,
    truncated_svd,
)

IDS = torch.arange(3, 67).reshape(2, 32)
QUICK = dict(warmup_steps=0, eval_steps=0, sample_steps=0, save_steps=0)
NAME = "base_model.tinylora_v.default"


def base(quantization="none", folder="tiny", dtype="fp32"):
    return load_model(folder, quantization, dtype, verbose=False)


def number(model) -> torch.nn.Parameter:
    return trainable(model)[NAME]


def moved(model, size=0.5, seed=0):
    "The numbers set so that the model says something else"
    with torch.no_grad():
        number(model).normal_(std=size, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def thirteen(quantization="none", **args):
    return moved(add_tinylora(base(quantization)[0], TinyLoraArgs(**dict(u=1, n_tie=4) | args)))


def layers(model) -> dict:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, TinyLoraLayer)}


def logits_and_grad(model):
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    return out.logits.detach().float()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


def by_the_formula(weights: dict, v: torch.Tensor, n_tie: int, r: int, seed: int) -> dict:
    "W + U S (sum_i v_i P_i) V^T of every weight, by a full decomposition in fp64; v is (groups, u)"
    found = {}
    for i, (name, weight) in enumerate(weights.items()):
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        signs = torch.stack([u[u.abs().argmax()].sign() for u in U.T[:r]])
        U, V = U[:, :r] * signs, Vh[:r].T * signs
        P = torch.normal(0.0, r**-0.5, (v.shape[1], r, r), generator=torch.Generator().manual_seed(seed + i)).double()
        found[name + ".weight"] = (
            weight.double() + U @ S[:r].diag() @ (v[i // n_tie].double()[:, None, None] * P).sum(0) @ V.T
        ).float()
    return found


@pytest.mark.parametrize("shape", [(256, 640), (640, 256), (128, 128), (40, 30)], ids=str)
def test_the_decomposition(shape):
    "Of a matrix whose singular values fall like those of trained ones"
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
    weight = (U * (1 + torch.arange(len(S))) ** -0.3) @ Vh
    u, s, v, gap = truncated_svd(weight, 3, torch.Generator().manual_seed(0))
    signs = torch.stack([x[x.abs().argmax()].sign() for x in U.T[:3]])
    torch.testing.assert_close(s, (1 + torch.arange(3)).double() ** -0.3)
    torch.testing.assert_close(u, U[:, :3] * signs, atol=1e-5, rtol=0)
    torch.testing.assert_close(v, Vh[:3].T * signs, atol=1e-5, rtol=0)
    assert abs(gap - (3**-0.3 - 4**-0.3)) < 1e-6


@pytest.mark.parametrize("r, u, n_tie", [(2, 1, 4), (3, 2, 12), (2, 5, 1)])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_logits_and_gradient_are_those_of_the_formula(quantization, r, u, n_tie):
    model = moved(add_tinylora(base(quantization)[0], TinyLoraArgs(u=u, n_tie=n_tie, r=r), seed=5), 0.5 / u)
    plain = merged(base(quantization)[0], torch.float32).requires_grad_(False)
    v = number(model).detach().clone().requires_grad_()
    assert v.shape == (-(-49 // n_tie), u)
    weights = by_the_formula({n: plain.get_submodule(n).weight for n in layers(model)}, v, n_tie, r, seed=5)
    out = functional_call(plain, weights, kwargs=dict(input_ids=IDS, labels=IDS, use_cache=False))
    out.loss.backward()
    found = logits_and_grad(model)
    assert (found - out.logits).abs().max() < 1e-4 and (found - logits(plain)).abs().max() > 1
    torch.testing.assert_close(number(model).grad, v.grad, atol=1e-5, rtol=1e-3)


def test_a_fresh_adapter_changes_nothing_and_can_move_everywhere():
    model, _ = base("nf4")
    before = logits(model)
    model = add_tinylora(model, TinyLoraArgs(u=1, n_tie=4))
    assert count_trainable(model) == 13 and is_fresh(model) and number(model).dtype == torch.float32
    assert torch.equal(logits_and_grad(model), before)
    grad = number(model).grad
    assert grad.isfinite().all() and (grad != 0).all()
    assert not is_fresh(moved(model))


def test_neighbours_share():
    groups = [m.group["default"] for m in layers(thirteen()).values()]
    assert groups == sorted(groups) and list(Counter(groups).values()) == [4] * 12 + [1]


def test_bf16_keeps_small_steps():
    "A step that bf16 cannot hold still reaches the output, and the gradient is that of fp32 up to bf16's noise"
    model, whole = moved(add_tinylora(base(dtype="bf16")[0], TinyLoraArgs(n_tie=4))), thirteen()
    with compute_context(model, torch.bfloat16):
        logits_and_grad(model)
    logits_and_grad(whole)
    assert torch.cosine_similarity(number(model).grad.flatten(), number(whole).grad.flatten(), dim=0) > 0.99
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).bfloat16()

    def said(value):
        number(model).data.fill_(value)
        with torch.no_grad(), compute_context(model, torch.bfloat16):
            return layer(x)

    one, step = said(1.0), 1 + 2**-10
    assert torch.tensor(step).bfloat16() == 1 and one.dtype == torch.bfloat16
    assert not torch.equal(said(step), one)


def test_int8():
    """Which rounds the inputs of every product too: the oracle is the written-out weight, before a forward pass and
    after, which moves bitsandbytes' scales"""
    model = moved(add_tinylora(base("int8")[0], TinyLoraArgs(n_tie=4)))
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    weight = layer.base_layer.weight.data.float() * layer.base_layer.weight.SCB[:, None].float() / 127
    for _ in range(2):
        torch.testing.assert_close(
            merged(model, torch.float32).model.layers[0].mlp.up_proj.weight,
            weight + layer.get_delta_weight("default"),
            atol=1e-5,
            rtol=1e-5,
        )
        logits_and_grad(model)
    assert (number(model).grad != 0).all() and number(model).grad.isfinite().all()


@pytest.mark.parametrize("parametrization", ["paper", "peft"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_merged_logits_are_those_of_the_adapter(quantization, parametrization):
    model = thirteen(quantization, parametrization=parametrization)
    before = logits(model)
    with using_adapters(model, []):
        assert (before - logits(model)).abs().max() > 1
    assert (logits(merged(model, torch.float32)) - before).abs().max() < 1e-4


def test_the_reference_is_a_copy_that_finds_no_subspace_again(monkeypatch):
    model = thirteen("nf4")
    before, called = logits(model), []
    monkeypatch.setattr(tinylora, "truncated_svd", lambda *a: called.append(a))
    reference = freeze_reference(model)
    assert count_trainable(model) == 13 and not called
    moved(model, seed=1)
    with using_adapters(model, reference):
        assert torch.equal(logits(model), before)
    after = logits(model)
    assert (after - before).abs().max() > 0.1
    for name in reference:
        model.delete_adapter(name)
    assert (
        torch.equal(logits(model), after) and model.active_adapters == ["default"] and list(trainable(model)) == [NAME]
    )


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_saved_and_loaded(tmp_path, quantization):
    model = thirteen(quantization)
    save_adapter(model, tmp_path)
    assert {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "base_model.tinylora_v": (13, 1)
    }
    again = with_adapter(base(quantization)[0], tmp_path)
    assert (
        torch.equal(logits(again), logits(model))
        and count_trainable(again) == 13
        and torch.equal(number(again), number(model))
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A base with the embedded one's shape and tokenizer, one layer of which is orthogonal: all its singular values
    are equal"""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(data_file("tiny"), dtype=torch.float32)
    with torch.no_grad():
        torch.nn.init.orthogonal_(
            model.model.layers[2].self_attn.q_proj.weight, generator=torch.Generator().manual_seed(0)
        ).mul_(0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(data_file("tiny")).save_pretrained(folder)
    return folder


def test_other_weights_are_refused(tmp_path, other):
    model = thirteen("nf4")
    save_adapter(model, tmp_path)
    line = adapter_line(model)
    for load in (lambda m: with_adapter(m, tmp_path), lambda m: from_line(m, line)):
        with pytest.raises(TinyTrainerError, match="belongs to another base"):
            load(base("nf4", other)[0])
        with pytest.raises(TinyTrainerError, match="over nf4 weights, and the model has 16-bit ones"):
            load(base("none")[0])
    with pytest.raises(TinyTrainerError, match="was not loaded by load_model"):
        from_line(AutoModelForCausalLM.from_pretrained(data_file("tiny"), dtype=torch.float32), line)


def test_a_vague_subspace_is_saved(tmp_path, other, monkeypatch):
    "On a machine that would find other vectors for equal singular values, the saved ones are used"
    model = moved(add_tinylora(base("none", other)[0], TinyLoraArgs(n_tie=4)))
    vague = [n for n, m in layers(model).items() if m.vague["default"]]
    assert vague == ["model.layers.2.self_attn.q_proj"]
    save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1 + 3
    with pytest.raises(TinyTrainerError, match="does not fit into a line"):
        adapter_line(model)

    def elsewhere(weight, r, generator):
        U, S, V, gap = truncated_svd(weight, r, generator)
        return (U, S, V, gap) if gap > 1e-6 else (U.flip(1), S, V.flip(1), gap)

    monkeypatch.setattr(tinylora, "truncated_svd", elsewhere)
    fresh = add_tinylora(base("none", other)[0], TinyLoraArgs(n_tie=4))
    difference = {
        n: (layers(fresh)[n].tinylora_B["default"] - m.tinylora_B["default"]).abs().max()
        for n, m in layers(model).items()
    }
    assert [n for n, d in difference.items() if d > 1e-3] == vague
    again = with_adapter(base("none", other)[0], tmp_path)
    assert (logits(again) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_another_number_of_threads_finds_the_same(quantization, tmp_path):
    model, threads, found = thirteen(quantization), torch.get_num_threads(), []
    save_adapter(model, tmp_path)
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        try:
            found.append(logits(with_adapter(base(quantization)[0], tmp_path)))
        finally:
            torch.set_num_threads(threads)
    assert all((other - logits(model)).abs().max() < 1e-4 for other in found)


def test_a_line_goes_round():
    model = thirteen("nf4")
    line = adapter_line(model)
    assert "\n" not in line and len(line) < 250
    again = from_line(base("nf4")[0], line)
    assert (
        torch.equal(number(again), number(model))
        and torch.equal(logits(again), logits(model))
        and adapter_line(again) == line
    )
    wrapped = "\n".join(f"  {word}" for word in line.split(" ")) + "\n"
    assert torch.equal(number(from_line(base("nf4")[0], wrapped)), number(model))


@pytest.mark.slow
def test_a_base_from_the_hub_is_known_by_its_files(tmp_path):
    "As they lie in the cache: the same adapter fits the same weights from a folder"
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--me--small"
    shutil.copytree(data_file("tiny"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "from tinytrainer_nb.all import *; "
                "print(adapter_line(add_tinylora(load_model('me/small', 'nf4', verbose=False)[0])))"
            ),
        ],
        env=os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.strip() == adapter_line(add_tinylora(base("nf4")[0]))


def checked(line: str) -> str:
    "A line with a right checksum"
    body = line.rpartition(" check=")[0]
    return f"{body} check={hashlib.sha256(body.encode()).hexdigest()[:8]}"


def test_a_line_tells_bases_of_several_files_apart():
    "Whose first files may be the same"
    model, other, alone = thirteen("nf4"), base("nf4")[0], base("nf4")[0]
    first, second, third = ("a" * 64, "b" * 64, "c" * 64)
    for m, files in ((model, [first, second]), (other, [first, third]), (alone, [first])):
        m.load_report = dataclasses.replace(m.load_report, sha256="+".join(files))
    model.peft_config["default"].base = model.load_report.sha256
    line = adapter_line(model)
    for wrong in (other, alone):
        with pytest.raises(TinyTrainerError, match="belongs to another base"):
            from_line(wrong, line)
    right = base("nf4")[0]
    right.load_report = dataclasses.replace(right.load_report, sha256=model.load_report.sha256)
    assert torch.equal(number(from_line(right, line)), number(model))


def test_an_untrained_model_takes_no_adapter_that_needs_its_hash():
    model = new_model("tiny", seed=0, dtype="fp32")
    with pytest.raises(TinyTrainerError, match="new:tiny: no files hold these weights"):
        add_tinylora(model)
    with pytest.raises(TinyTrainerError, match="new:tiny: no files hold these weights"):
        from_line(model, adapter_line(thirteen("nf4")))


def test_damaged_lines_are_refused():
    line, bare = adapter_line(thirteen("nf4")), base("nf4")[0]
    for bad in ("", "hello", line[:-1], line.replace("u=1", "u=2"), line.replace("v=", "v=A"), line[:100] + line[101:]):
        with pytest.raises(TinyTrainerError, match="not a whole line"):
            from_line(bare, bad)
    with pytest.raises(TinyTrainerError, match="not a whole line"):
        from_line(bare, checked(line.replace("n_tie=4", "n_tie=3")))  # 17 groups, and 13 numbers
    for mark in ("", line.split("base=")[1][:8]):  # with which every other base begins, or many
        with pytest.raises(TinyTrainerError, match="not a whole line"):
            from_line(base("nf4")[0], checked(re.sub("base=[0-9a-f]*", f"base={mark}", line)))
    numbers = number(thirteen("nf4")).detach().clone()
    numbers[0] = float("nan")
    packed = base64.b64encode(numbers.cpu().numpy().tobytes()).decode()
    with pytest.raises(TinyTrainerError, match="values that are not finite"):
        from_line(base("nf4")[0], checked(re.sub(r"v=\S+", f"v={packed}", line)))
    broken = thirteen("nf4")
    number(broken).data[0] = float("inf")
    with pytest.raises(TinyTrainerError, match="values that are not finite"):
        adapter_line(broken)
    with pytest.raises(TinyTrainerError, match="has no TinyLoRA adapter"):
        adapter_line(base()[0])
    with pytest.raises(TinyTrainerError, match="has no TinyLoRA adapter"):
        adapter_line(add_lora(base()[0], LoraArgs(r=2)))


def peft_model(**settings):
    model = AutoModelForCausalLM.from_pretrained(data_file("tiny"), dtype=torch.float32)
    return get_peft_model(model, PeftTinyLora(**dict(task_type="CAUSAL_LM", target_modules="all-linear") | settings))


PEFTS = [
    dict(u=1, weight_tying=1 - 13 / 49),
    dict(u=3, r=3, weight_tying=0.5, projection_seed=7),
    dict(u=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 4, 5], save_projection=False),
    dict(u=1, weight_tying=1.0),
]


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("settings", PEFTS, ids=str)
def test_an_adapter_of_pefts_says_the_same_here(tmp_path, settings):
    theirs = peft_model(**settings)
    with torch.no_grad():
        for i, p in enumerate(theirs.base_model.tinylora_v["default"].values()):
            p.normal_(std=0.5, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(tmp_path)
    expected = logits_and_grad(theirs)
    ours = with_adapter(base()[0], tmp_path)
    assert (logits_and_grad(ours) - expected).abs().max() < 1e-4
    grads = torch.stack([p.grad for p in theirs.base_model.tinylora_v["default"].values()])
    torch.testing.assert_close(number(ours).grad, grads, atol=1e-5, rtol=1e-4)
    save_adapter(ours, tmp_path / "back")  # and back again
    back = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(data_file("tiny"), dtype=torch.float32), tmp_path / "back"
    )
    assert (logits(back) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_adapter_of_ours_says_the_same_in_peft(tmp_path, quantization):
    "Made over 4 bits too: PEFT is then given the written-out weights"
    model = moved(add_tinylora(base(quantization)[0], TinyLoraArgs(u=2, n_tie=4, parametrization="peft"), seed=3))
    save_adapter(model, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["peft_type"] == "TINYLORA" and not {"n_tie", "base", "parametrization"} & said.keys()
    plain = PeftModel.from_pretrained(merged(base(quantization)[0], torch.float32), tmp_path)
    assert type(plain.base_model).__module__.startswith("peft.") and len(plain.base_model.tinylora_v["default"]) == 13
    assert (logits(plain) - logits(model)).abs().max() < 1e-4
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = plain(input_ids=IDS).logits.float()
    with compute_context(model, torch.bfloat16):
        assert (logits(model) - half).abs().mean() < 0.05


def test_pefts_numbers_are_drawn_alike():
    """The same seed gives the same P and the same groups, and the same matrices up to the signs of their singular
    vectors"""
    theirs, ours = (
        peft_model(u=2, weight_tying=1 - 13 / 49, projection_seed=3),
        add_tinylora(base()[0], TinyLoraArgs(u=2, n_tie=4, parametrization="peft"), seed=3),
    )
    for name, mine in layers(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        assert (
            torch.equal(mine.tinylora_P["default"], other.tinylora_P["default"])
            and str(mine.group["default"]) == other._tinylora_v_key["default"]
        )
        torch.testing.assert_close(
            mine.tinylora_A["default"].abs(), other.tinylora_A["default"].abs(), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            mine.tinylora_B["default"].abs(), other.tinylora_B["default"].abs(), atol=1e-4, rtol=0
        )


def test_what_only_peft_can_do_is_refused(tmp_path):
    peft_model(tinylora_dropout=0.1).save_pretrained(tmp_path / "dropout")
    with pytest.raises(TinyTrainerError, match="tinylora_dropout.*not supported here"):
        with_adapter(base()[0], tmp_path / "dropout")
    peft_model(target_modules=["embed_tokens"]).save_pretrained(tmp_path / "embedding", save_embedding_layers=False)
    with pytest.raises(TinyTrainerError, match="model.embed_tokens is a Embedding"):
        with_adapter(base()[0], tmp_path / "embedding")


def examples():
    return load_examples(data_file("sft.jsonl")).select(range(24))


@pytest.mark.parametrize("parametrization", ["paper", "peft"])
def test_a_run_of_13_numbers(tmp_path, parametrization):
    model, tokenizer = base("nf4")
    run = sft(
        add_tinylora(model, TinyLoraArgs(n_tie=4, parametrization=parametrization)),
        tokenizer,
        examples(),
        SFTArgs(max_steps=3, batch_size=8, learning_rate=0.1, out=str(tmp_path / "run"), **QUICK),
    )
    assert run.summary["trainable_parameters"] == 13 and run.info["load"]["adapter"]["n_tie"] == 4
    expected = logits(model := run.model.eval())
    assert not is_fresh(model)
    again, _ = load_model(run.folder, verbose=False)
    assert (logits(again) - expected).abs().max() < 1e-4 and torch.equal(number(again), number(model))
    save_merged(run, tmp_path / "whole", "fp32")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")) - expected).abs().max() < 1e-4
    assert list(run.folder.glob("start/*.safetensors"))


def reward(prompt, completion, **row):
    return float(len(completion))


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_a_stopped_run_resumes_to_the_same_end(tmp_path, recipe):
    def train(out, live=False):
        model, tokenizer = base("nf4", small_base())
        model = moved(add_tinylora(model, TinyLoraArgs(n_tie=4)), 0.1)
        common = dict(learning_rate=0.01, out=str(tmp_path / out), **QUICK)
        if recipe == "sft":
            return sft(model, tokenizer, examples(), SFTArgs(max_steps=12, batch_size=3, **common), live=live)
        return ppo(
            model,
            tokenizer,
            [dict(messages=[dict(role="user", content="Say a number.")])] * 4,
            reward,
            PPOArgs(max_steps=6, batch_size=2, num_generations=2, max_new_tokens=8, minibatches=1, **common),
            live=live,
        )

    whole = train("whole")
    run = train("stopped", live=True)
    while not run.step:
        time.sleep(0.01)
    run.stop()
    run.wait()
    assert run.status == "stopped" and 0 < run.step < run.settings.max_steps
    again = Run.open(run.folder).resume(**dict(reward=reward) if recipe == "ppo" else {})
    assert again.status == "finished"
    files = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole.folder, run.folder)]
    assert files[0] == files[1] and files[0] != (run.folder / "start" / "adapter_model.safetensors").read_bytes()
    if recipe == "ppo":
        assert whole.history("kl")[1][0] == 0.0 and whole.history("kl")[1][-1] != 0.0


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_qwen(tmp_path, quantization):
    "With biases, grouped queries and tied embeddings"
    config = Qwen2Config(
        vocab_size=1100,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    whole = Qwen2ForCausalLM(config)
    with torch.no_grad():
        [p.normal_(std=0.1) for n, p in whole.named_parameters() if n.endswith("bias")]
    whole.save_pretrained(tmp_path / "qwen")
    AutoTokenizer.from_pretrained(data_file("tiny")).save_pretrained(tmp_path / "qwen")
    model = add_tinylora(base(quantization, tmp_path / "qwen")[0], TinyLoraArgs(n_tie=4))
    assert count_trainable(model) == 7 and len(layers(model)) == 28
    before = logits_and_grad(model)
    assert (number(model).grad != 0).all()
    moved(model, 2.0)
    assert (logits(model) - before).abs().max() > 0.01 and (
        logits(merged(model, torch.float32)) - logits(model)
    ).abs().max() < 1e-4
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(
        logits(with_adapter(base(quantization, tmp_path / "qwen")[0], tmp_path / "adapter")), logits(model)
    )


def test_one_adapter_at_a_time():
    with pytest.raises(TinyTrainerError, match="has an adapter already"):
        add_tinylora(add_lora(base()[0], LoraArgs(r=2)))
    with pytest.raises(TinyTrainerError, match="only LoRA adapters are stacked"):
        stack_adapter(thirteen())
    with pytest.raises(TinyTrainerError, match="was not loaded by load_model"):
        add_tinylora(AutoModelForCausalLM.from_pretrained(data_file("tiny"), dtype=torch.float32))
    with pytest.raises(TinyTrainerError, match="parametrization='papr' is not allowed"):
        TinyLoraArgs(parametrization="papr")


@pytest.mark.slow
@pytest.mark.shared
def test_13_numbers_over_4_bits_of_tinyllama(shared, tmp_path):
    "Random weights of its shape, whose spectrum is flat: the hardest to decompose"
    made = shared.resolve().parent / "models"
    folder = made if (made / "tinyllama-1.1b").is_dir() else tmp_path
    subprocess.run([sys.executable, shared / "bench" / "make_models.py", folder, "tinyllama-1.1b"], check=True)
    start = time.perf_counter()
    model, _ = base("nf4", folder / "tinyllama-1.1b", "bf16")
    before, loaded = peak_memory(), time.perf_counter()
    model = add_tinylora(model, TinyLoraArgs(u=1, n_tie=12))
    print(
        (
            f"{torch.get_num_threads()} threads: loaded in {loaded - start:.0f} s, ready after "
            f"{time.perf_counter() - loaded:.0f} s more; {before:.2f} GiB at the most while loading, "
            f"{peak_memory():.2f} when ready"
        )
    )
    assert len(layers(model)) == 154 and count_trainable(model) == 13 and peak_memory() - before < 0.5
    with compute_context(model, torch.bfloat16):
        logits_and_grad(model)
    grad = number(model).grad
    assert grad.isfinite().all() and (grad != 0).all()


def test_a_line_over_4_bits_means_the_same_in_any_number_format():
    "Made in bf16, read where fp16 or fp32 is computed in: the directions come from the 4-bit numbers themselves"
    made = moved(add_tinylora(base("nf4", dtype="bf16")[0], TinyLoraArgs(n_tie=4)))
    line = adapter_line(made)
    for dtype in ("fp32", "fp16"):
        read = from_line(base("nf4", dtype=dtype)[0], line)
        for name, layer in layers(made).items():
            for part in ("tinylora_A", "tinylora_B", "tinylora_P"):
                assert torch.equal(getattr(layer, part)["default"], getattr(layers(read)[name], part)["default"])
