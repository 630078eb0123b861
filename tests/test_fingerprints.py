"""A model is what its run says it is: base, tokenizer, commit, result and reward are compared wherever a run is
opened, and copies of weights never outlive the weights."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from doors import DOORS, said_by
from safetensors.torch import load_file, save_file
from small import ROWS, small_base

from tinytrainer_nb.all import (
    DPOArgs,
    GenerateArgs,
    LoraArgs,
    PPOArgs,
    PretrainArgs,
    RewardModelArgs,
    Run,
    SFTArgs,
    add_lora,
    dpo,
    evaluate,
    generate,
    load_model,
    model_reward,
    ppo,
    pretrain,
    reward_model,
    sft,
    stack_adapter,
)
from tinytrainer_nb.cli import main
from tinytrainer_nb.compute.decode import Decoder
from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.recipes.pretrain import read_back
from tinytrainer_nb.recipes.rewards import code_hash, find_reward
from tinytrainer_nb.recipes.start import describe

FEW = dict(eval_steps=0, save_steps=1, sample_steps=0, batch_size=2)


def base(name="base"):
    "A copy of the small base in the working folder, loaded in fp32."
    if not Path(name).exists():
        shutil.copytree(small_base(), name)
    return load_model(name, "none", "fp32", verbose=False)


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A finished run on a base of its own."
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    return sft(add_lora(model, LoraArgs(r=2)), tokenizer, ROWS, SFTArgs(max_steps=2, out="run", **FEW))


def edited(name: str) -> None:
    "Change a file of the base in a way that changes what it means."
    path = Path("base") / name
    if name == "config.json":
        told = json.loads(path.read_text(encoding="utf8"))
        path.write_text(json.dumps(told | dict(rms_norm_eps=0.5)), encoding="utf8")
    elif name == "chat_template.jinja":
        path.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}", encoding="utf8")
    elif name.endswith(".json"):
        path.write_text(path.read_text(encoding="utf8") + "\n", encoding="utf8")
    else:
        with open(path, "rb+") as f:
            f.seek(-4, os.SEEK_END)
            f.write(b"\1\2\3\4")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_base_is_refused_by_every_door(run, name, capsys):
    edited(name)
    for door, opened in DOORS.items():
        told = said_by(opened, capsys)
        which = "the weights" if name.endswith("tensors") else name
        assert "not as it was when the run was started" in told and which in told, (door, told)
    assert not Path("merged").exists() and not Path("next").exists()


def test_a_relative_base_is_found_from_any_folder(run, tmp_path, monkeypatch):
    there = load_model("run", verbose=False)[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    here = load_model("../run", verbose=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(there.parameters(), here.parameters()))


def test_a_changed_result_is_refused_and_a_copy_of_it_is_not(run):
    path = Path("run/adapter/adapter_model.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(TinyTrainerError, match="adapter/adapter_model.safetensors is not as the run has saved it"):
        load_model("run", verbose=False)
    shutil.copytree("run/adapter", "mine")
    assert load_model("mine", "none", "fp32", verbose=False)[0].active_adapters == ["default"]


def test_a_changed_whole_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    texts = ["The hens of Oakdale have two legs each, and so has the farmer who feeds them."] * 40
    settings = PretrainArgs(max_steps=1, max_length=32, out="whole", **FEW | dict(save_steps=0))
    pretrain(model.float().requires_grad_(True), tokenizer, texts, settings)
    assert load_model("whole", "none", "fp32", verbose=False)
    config = Path("whole/model/config.json")
    config.write_text(config.read_text(encoding="utf8").replace("silu", "gelu"), encoding="utf8")
    with pytest.raises(TinyTrainerError, match="model/config.json is not as the run has saved it"):
        load_model("whole", "none", "fp32", verbose=False)


def test_a_tokenizer_changed_after_loading_goes_with_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    tokenizer.eos_token = "<s>"
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{{ eos_token }}{% endfor %}"
    started = sft(add_lora(model, LoraArgs(r=2)), tokenizer, ROWS, SFTArgs(max_steps=3, out="run", **FEW), live=True)
    started.stop()
    started.wait()
    for door in (lambda: load_model("run", verbose=False)[1], lambda: Run.open("run").resume().tokenizer):
        again = door()
        assert (again.eos_token, again.chat_template) == ("<s>", tokenizer.chat_template)
    assert not (Path("run") / "start" / "tokenizer.json").exists()


def test_an_unchanged_tokenizer_takes_no_room(run):
    assert not (Path("run") / "start" / "tokenizer").exists()


def test_tokens_that_the_model_has_no_embedding_for_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    tokenizer.add_tokens(["<hen>"])
    with pytest.raises(TinyTrainerError, match="1,025 tokens and the model knows 1,024"):
        sft(add_lora(model, LoraArgs(r=2)), tokenizer, ROWS, SFTArgs(max_steps=1, out="run", **FEW))
    assert not Path("run").exists()


def hub_cache(folder: Path, commits: dict) -> None:  # commit: folder of a model; the last one is main
    "A Hub's local cache that holds one model in several commits."
    repository = folder / "models--someone--hens"
    for commit, model in commits.items():
        shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def test_a_hub_base_is_pinned_by_its_commit(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(tmp_path / "hub", {"a" * 40: small_base()})
    model, tokenizer = load_model("someone/hens", "none", "fp32", verbose=False)
    assert model.load_report.commit == "a" * 40 and model.load_report.sha256
    sft(add_lora(model, LoraArgs(r=2)), tokenizer, ROWS, SFTArgs(max_steps=1, out="run", **FEW))
    first = load_model("run", verbose=False)[0]
    base("other")
    Path("base").symlink_to("other")
    edited("model.safetensors")
    hub_cache(tmp_path / "hub", {"b" * 40: "other"})
    newest = load_model("someone/hens", "none", "fp32", verbose=False)[0]
    assert newest.load_report.commit == "b" * 40
    again = load_model("run", verbose=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    shutil.rmtree(tmp_path / "hub" / "models--someone--hens" / "snapshots" / ("a" * 40))
    with pytest.raises(TinyTrainerError, match="someone/hens: .*commit aaaaaaaaaaaa"):
        load_model("run", verbose=False)


def judge(limit: int, comment: str = "") -> None:
    "A reward's file, with a helper of its own."
    function = "def short(prompt, completion, **row):\n    return float(len(completion) < LIMIT)\n"
    text = f"{comment}\nLIMIT = {limit}\n\n{function}"
    Path("judge.py").write_text(text, encoding="utf8")


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    "A run of PPO with a reward of a file, stopped before its end."
    monkeypatch.chdir(tmp_path)
    judge(10)
    model, tokenizer = base()
    prompts = [dict(prompt=f"{n} + {n}?") for n in range(12)]
    settings = PPOArgs(max_steps=3, num_generations=2, max_new_tokens=4, out="run", **FEW)
    run = ppo(add_lora(model, LoraArgs(r=2)), tokenizer, prompts, "judge.py:short", settings, live=True)
    run.stop()
    run.wait()
    assert run.status == "stopped"
    return run.folder


def test_changed_code_of_a_reward_wants_a_word_of_consent(stopped, capsys):
    judge(12)
    before = (stopped / "run.json").read_bytes()
    with pytest.raises(TinyTrainerError, match="the code of short has changed since.*--accept reward"):
        Run.open(stopped).resume(reward="judge.py:short")
    assert (stopped / "run.json").read_bytes() == before
    assert main(["resume", str(stopped), "--reward", "judge.py:short"]) == 2
    assert main(["resume", str(stopped), "--reward", "judge.py:short", "--accept", "reward"]) == 0
    notes = [e["message"] for e in Run.open(stopped).events if e["kind"] == "note"]
    assert any("the reward differs, as accepted: the code of short" in note for note in notes)


def test_a_comment_is_no_change_and_another_weight_is_one(stopped):
    judge(10, "# the same, with a comment")
    with pytest.raises(TinyTrainerError, match="its weights were"):
        Run.open(stopped).resume(reward="judge.py:short=0.5")
    with pytest.raises(TinyTrainerError, match="accept=\\['everything'\\] is not allowed"):
        Run.open(stopped).resume(reward="judge.py:short", accept=["everything"])
    assert Run.open(stopped).resume(reward="judge.py:short").status == "finished"


def test_what_counts_as_the_code_of_a_reward():
    def made(limit):
        return lambda prompt, completion, **row: float(len(completion) < 10 + 0 * limit) if "x" in {"x", "y"} else 0.0

    class Judge:
        def __call__(self, prompt, completion, **row):
            return 1.0

    assert code_hash(made(1)) == code_hash(made(1)) and code_hash(Judge()) == code_hash(Judge())
    assert "code" not in find_reward("exact_answer").record and find_reward(Judge()).record["code"]


@pytest.mark.parametrize("how", ["merged by peft", "trained in place", "replaced"])
def test_answers_never_come_from_copies_of_other_weights(how):
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    model = add_lora(model, LoraArgs(r=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    decoder, args = Decoder(model, torch.float32, 1), GenerateArgs(max_new_tokens=6)
    said = lambda **kept: generate(model, tokenizer, ["Once upon a time"], args, quiet=True, **kept).logprobs
    before = said(decoder=decoder)
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    if how == "merged by peft":
        model.merge_adapter()
        model.disable_adapter_layers()
    for layer in layers:
        weight = layer.base_layer.weight
        if how == "trained in place":
            with torch.no_grad():
                weight.add_(0.05)
        if how == "replaced":
            layer.base_layer.weight = torch.nn.Parameter(weight + 0.05, requires_grad=False)
    assert said(decoder=decoder) == said()
    if how != "merged by peft":
        assert said(decoder=decoder) != before


def test_the_loss_of_a_run_is_that_of_its_base(run):
    model, tokenizer = load_model("run", verbose=False)
    assert evaluate(model, tokenizer, ROWS, task="loss").score == pytest.approx(
        evaluate(run.model, run.tokenizer, ROWS, task="loss").score, abs=1e-6
    )


# What is in the memory, and what is on the disk

PLAIN = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def wrapped(model, name="default", **config):
    "`model` with a LoRA adapter of PEFT's, as a user may hand it over."
    return wrapped_in(model, peft.LoraConfig(**PLAIN | config), name)


def wrapped_in(model, config, name="default"):
    report = model.load_report
    model = peft.get_peft_model(model, config, adapter_name=name)
    model.load_report = report
    return model


@torch.no_grad()
def shaken(model, std=0.05):
    "The adapter as a training might leave it."
    generator = torch.Generator().manual_seed(0)
    for p in trainable(model).values():
        p.add_(std * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(24)[None] * 7 + 3, use_cache=False).logits.float()


def quick(model, tokenizer, out="run", **more):
    settings = FEW | dict(max_steps=1, learning_rate=2e-2, warmup_steps=0, out=out) | more
    return sft(model, tokenizer, ROWS, SFTArgs(**settings))


def merged_with_an_adapter(model, tokenizer):
    return shaken(add_lora(model, LoraArgs(r=2))).merge_and_unload()


@torch.no_grad()
def scaled(model, tokenizer):
    model.model.layers[1].mlp.up_proj.weight.mul_(2)
    return model


@torch.no_grad()
def rows_changed_places(model, tokenizer):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.copy_(weight.flip(0))
    return model


@torch.no_grad()
def signs_changed(model, tokenizer):
    model.model.norm.weight.mul_(-1)
    return model


def another_epsilon(model, tokenizer):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5
    return model


def resized(model, tokenizer):
    tokenizer.add_tokens(["<hen>", "<cow>"])
    model.resize_token_embeddings(len(tokenizer))
    return model


def another_head(model, tokenizer):
    model.lm_head = torch.nn.Linear(256, 1024, bias=False)
    return model


CHANGES = [
    merged_with_an_adapter, scaled, rows_changed_places, signs_changed, another_epsilon, resized, another_head,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_base_that_was_changed_in_memory_is_refused_before_a_run_is_made(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    model = add_lora(change(model, tokenizer), LoraArgs(r=2))
    with pytest.raises(TinyTrainerError, match="base: this model is not as it was loaded: .*changed in memory"):
        quick(model, tokenizer)
    assert not Path("run").exists()


@pytest.mark.parametrize("quantization, dtype", [("nf4", "fp32"), ("nf4", "bf16"), ("int8", "bf16")])
def test_quantized_weights_are_compared_too(quantization, dtype):
    model, tokenizer = load_model(small_base(), quantization, dtype, verbose=False)
    model = shaken(add_lora(model, LoraArgs(r=2)), 0.5)
    logits(model)
    describe(model, tokenizer)
    model = add_lora(model.merge_and_unload(), LoraArgs(r=2))
    with pytest.raises(TinyTrainerError, match="changed in memory"):
        describe(model, tokenizer)


def test_use_and_training_leave_a_base_as_it_was_loaded(tmp_path, monkeypatch):
    "Number formats that lose nothing, training, decoding and a second adapter are no change of the base."
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(small_base(), "none", "bf16", verbose=False)
    model = add_lora(model.float(), LoraArgs(r=2, dropout=0.1))
    quick(model, tokenizer)
    generate(model, tokenizer, ["Once"], GenerateArgs(max_new_tokens=3), quiet=True)
    model.config.use_cache, model.config.pad_token_id = False, 0
    quick(stack_adapter(model, LoraArgs(r=2)), tokenizer, out="second")
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight[0, 0] += (
            1e-5  # bf16 has not as many digits
        )
    with pytest.raises(TinyTrainerError, match="up_proj.weight changed in memory"):
        describe(model, tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="OLoRA"),
        dict(layer_replication=[[0, 2], [1, 2]]),
        dict(modules_to_save=["lm_head"]),
        dict(trainable_token_indices=[3, 10]),
    ],
    ids=str,
)
def test_an_adapter_that_knows_how_it_changes_the_base_is_no_change(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    run = quick(shaken(wrapped(model, **config)), tokenizer)
    assert torch.equal(logits(load_model("run", verbose=False)[0]), logits(run.model))


# Parts of a run's folder


def changed(path: Path) -> None:
    "Another number in a file of tensors, another line in any other one."
    if path.suffix != ".safetensors":
        path.write_text(path.read_text(encoding="utf8") + "\n", encoding="utf8")
        return
    tensors = load_file(path)
    save_file({name: 1.5 * t for name, t in tensors.items()}, path, metadata={"format": "pt"})


TEXTS = ["The hens of Oakdale have two legs each, and so has the farmer who feeds them."] * 40


def test_every_file_of_a_whole_model_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    settings = PretrainArgs(max_steps=1, max_length=32, out="whole", **FEW | dict(save_steps=0))
    pretrain(model.float().requires_grad_(True), tokenizer, TEXTS, settings)
    changed(Path("whole/model/chat_template.jinja"))
    with pytest.raises(TinyTrainerError, match="model/chat_template.jinja is not as the run has saved it"):
        load_model("whole", "none", "fp32", verbose=False)


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_the_tokenizer_that_a_run_keeps_is_compared(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    tokenizer.eos_token = "<s>"
    quick(add_lora(model, LoraArgs(r=2)), tokenizer)
    assert load_model("run", verbose=False)[1].eos_token == "<s>"
    folder = Path("run/start/tokenizer")
    changed(folder / "tokenizer_config.json") if how == "changed" else shutil.rmtree(folder)
    with pytest.raises(TinyTrainerError, match="start/tokenizer/.* is not as it was when the run was started"):
        load_model("run", verbose=False)


@pytest.mark.parametrize("recipe", ["stack", "dpo"])
def test_a_run_does_not_go_on_from_another_start(tmp_path, monkeypatch, recipe):
    "The lower adapter of a stack, and the reference of a DPO, are in `start/` alone."
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    model, settings = shaken(add_lora(model, LoraArgs(r=2))), dict(max_steps=3, out="run", **FEW)
    pairs = [dict(prompt=f"{n} hens?", chosen=f"{2 * n} legs", rejected="no") for n in range(12)]
    if recipe == "dpo":
        run = dpo(model, tokenizer, pairs, DPOArgs(**settings), live=True)
    else:
        run = sft(stack_adapter(model, LoraArgs(r=2)), tokenizer, ROWS, SFTArgs(**settings), live=True)
    run.stop()
    run.wait()
    shutil.copytree("run", "older")
    for folder in ("run", "older"):
        changed(Path(folder, "start/adapter_model.safetensors"))
    told = json.loads(Path("older/run.json").read_text(encoding="utf8"))
    Path("older/run.json").write_text(json.dumps({n: v for n, v in told.items() if n != "start"}), encoding="utf8")
    with pytest.raises(TinyTrainerError, match="start/adapter_model.safetensors is not as it was when"):
        Run.open("run").resume()
    assert Run.open("run").status == "stopped"
    assert Run.open("older").resume().status == "finished"  # a run of an older version knows no hashes


@pytest.mark.parametrize("how", ["changed", "without its score", "damaged", "missing"])
def test_a_reward_model_that_is_not_as_it_was_saved_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    pairs = [dict(prompt=f"{n} hens?", chosen="a", rejected="b c") for n in range(8)]
    args = RewardModelArgs(max_steps=1, out="judge", **FEW | dict(save_steps=0))
    run = reward_model(add_lora(model, LoraArgs(r=2)), tokenizer, pairs, args)
    assert len(model_reward("judge")(["1 hen?"], ["2"])) == 1
    path = Path("judge/adapter/adapter_model.safetensors")
    tensors = load_file(path)
    if how == "changed":
        changed(path)
    if how == "without its score":
        save_file({n: t for n, t in tensors.items() if "score" not in n}, path)
    if how == "damaged":
        path.write_bytes(b"x" * 100)
    if how == "missing":
        path.unlink()
    with pytest.raises(TinyTrainerError, match="adapter/adapter_model.safetensors is not as the run has saved it"):
        model_reward("judge")
    run.update_info(result={})  # an older version's run
    if how != "changed":
        with pytest.raises(TinyTrainerError, match="judge"):
            model_reward("judge")


def test_a_vocabulary_in_a_file_of_another_name_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcde")]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("base", name).unlink()
    Path("base/vocab.txt").write_text("\n".join(words), encoding="utf8")
    told = dict(tokenizer_class="BertTokenizer", eos_token="[SEP]", bos_token="[CLS]")
    Path("base/tokenizer_config.json").write_text(json.dumps(told), encoding="utf8")
    model, tokenizer = base()
    quick(add_lora(model, LoraArgs(r=2)), tokenizer)
    load_model("run", verbose=False)
    words[7], words[8] = words[8], words[7]
    Path("base/vocab.txt").write_text("\n".join(words), encoding="utf8")
    with pytest.raises(TinyTrainerError, match="not as it was when the run was started: the tokenizer's vocabulary"):
        load_model("run", verbose=False)


# What is trained is part of the record


def frozen_a(model):
    "LoRA-FA: A stays as it is drawn."
    model = add_lora(model, LoraArgs(r=2))
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    return model


PARTS = dict(
    lora_fa=frozen_a,
    mica=lambda model: wrapped(model, init_lora_weights="mica"),
    adalora=lambda model: wrapped_in(
        model, peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ),
    a_layer_frozen_by_hand=lambda model: [
        model := add_lora(model, LoraArgs(r=2)),
        *(p.requires_grad_(False) for n, p in model.named_parameters() if "layers.0" in n),
    ][0],
)


@pytest.mark.parametrize("kind", PARTS)
def test_a_resume_trains_what_was_trained(tmp_path, monkeypatch, kind):
    "To the same end, whether a checkpoint is there or the run died before it."
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, tokenizer = base()
    run = quick(PARTS[kind](model), tokenizer, max_steps=3, keep_checkpoints=3)
    whole, names = load_file("run/adapter/adapter_model.safetensors"), list(trainable(run.model))
    told = json.loads(Path("run/run.json").read_text(encoding="utf8")) | dict(status="interrupted")
    shutil.rmtree("run/adapter")
    shutil.copytree("run", "early")
    shutil.rmtree("early/checkpoints")
    shutil.rmtree("run/checkpoints/step-000003")
    for folder in ("run", "early"):
        Path(folder, "run.json").write_text(json.dumps(told), encoding="utf8")
        again = Run.open(folder).resume()
        assert list(trainable(again.model)) == names
        end = load_file(f"{folder}/adapter/adapter_model.safetensors")
        assert all(torch.equal(whole[name], end[name]) for name in whole)


# Adapters from elsewhere


def elsewhere(config=None, **edits):
    "An adapter on the base, as PEFT writes it; the model of PEFT's, which says what is right."
    base()
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = shaken(peft.get_peft_model(model, config or peft.LoraConfig(**PLAIN, init_lora_weights=False)))
    model.save_pretrained("mine")
    rewritten("mine", base_model_name_or_path=str(Path("base").resolve()), **edits)
    return model


def rewritten(folder, **edits):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf8")) | edits), encoding="utf8")


def opened(name="mine"):
    return load_model(name, "none", "fp32", verbose=False)


KINDS = dict(
    ia3=lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    loha=lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    oft=lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    vera=lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    vera_seeded=lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False, task_type="CAUSAL_LM"),
    norms=lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    randlora=lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    lora=lambda: peft.LoraConfig(**PLAIN, init_lora_weights=False),
)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_must_be_whole(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(elsewhere(KINDS[kind]())), logits(opened()[0]))
    path = Path("mine/adapter_model.safetensors")
    save_file({n: t for n, t in load_file(path).items() if "layers.1" not in n}, path)
    with pytest.raises(TinyTrainerError, match="mine: this adapter lacks .*layers.1"):
        opened()


def test_embeddings_in_an_adapters_file_are_loaded_and_not_lost_in_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = elsewhere()
    model.save_pretrained("same", save_embedding_layers=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.3)
    model.save_pretrained("mine", save_embedding_layers=True)
    for folder in ("same", "mine"):
        rewritten(folder, base_model_name_or_path=str(Path("base").resolve()))
    mine, tokenizer = opened()
    assert torch.equal(logits(mine), logits(model))
    with pytest.raises(TinyTrainerError, match="embed_tokens.weight changed in memory.*merge_and_unload"):
        quick(mine, tokenizer)
    run = quick(*opened("same"))
    assert torch.equal(logits(load_model("run", verbose=False)[0]), logits(run.model))


@pytest.mark.parametrize(
    "edits, said",
    [
        (dict(task_type="SEQ_CLS"), "for another task than writing .*SEQ_CLS.*model_reward"),
        (dict(task_type="SEQ_2_SEQ_LM"), "for another task than writing .*SEQ_2_SEQ_LM"),
        (dict(task_type="NEW"), "does not fit PEFT .*Invalid task type"),
        (dict(peft_type="NEW_KIND"), "names the kind 'NEW_KIND', which the installed PEFT does not know"),
        (dict(peft_type=None), "peft_type"),
        (dict(alora_invocation_tokens=[5, 6]), "begins at certain tokens of a text"),
        (dict(init_lora_weights="pissa_niter_4"), "changed its base in a way that cannot be repeated"),
        (dict(init_lora_weights="corda"), "changed its base in a way that cannot be repeated"),
        (dict(lora_alpha=float("inf")), "lora_alpha=inf, which is no number"),
        (dict(alpha_pattern=dict(q_proj=float("nan"))), "q_proj=nan, which is no number"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_trained_or_found_again_is_refused(tmp_path, monkeypatch, edits, said):
    monkeypatch.chdir(tmp_path)
    elsewhere(**edits)
    with pytest.raises(TinyTrainerError, match=f"mine.*{said}"):
        opened()


@pytest.mark.parametrize(
    "config, said",
    [
        (dict(alora_invocation_tokens=[5, 6]), "begins at certain tokens"),
        (dict(init_lora_weights="pissa_niter_4"), "cannot be repeated"),
        (dict(name="math"), "the adapter in use is called math"),
    ],
    ids=str,
)
def test_such_an_adapter_is_refused_when_it_is_handed_over(tmp_path, monkeypatch, config, said):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    with pytest.raises(TinyTrainerError, match=said):
        quick(wrapped(model, **config), tokenizer)
    assert not Path("run").exists()


def test_another_active_adapter_and_a_merged_one_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    model = shaken(wrapped(model))
    model.add_adapter("second", peft.LoraConfig(**PLAIN))
    model.set_adapter("second")
    with pytest.raises(TinyTrainerError, match="the adapter in use is called second"):
        quick(model, tokenizer)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(TinyTrainerError, match="the adapter is merged into the weights"):
        quick(model, tokenizer)
    assert not Path("run").exists()


def test_a_reward_runs_adapter_is_no_language_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    pairs = [dict(prompt=f"{n} hens?", chosen="a", rejected="b c") for n in range(8)]
    reward_model(add_lora(model, LoraArgs(r=2)), tokenizer, pairs, RewardModelArgs(max_steps=1, out="judge", **FEW))
    shutil.copytree("judge/adapter", "mine")
    with pytest.raises(TinyTrainerError, match="SEQ_CLS"):
        opened()


@pytest.mark.parametrize("files", ["all", "template"])
def test_the_tokenizer_beside_an_adapter_is_the_adapters(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    elsewhere()
    theirs = transformers.AutoTokenizer.from_pretrained("base")
    theirs.chat_template = "{% for m in messages %}[{{ m['content'] }}]{{ eos_token }}{% endfor %}"
    theirs.eos_token = "<s>"
    if files == "all":
        theirs.save_pretrained("mine")
    else:
        Path("mine/chat_template.jinja").write_text(theirs.chat_template, encoding="utf8")
    model, tokenizer = opened()
    told = ("<s>" if files == "all" else "</s>", theirs.chat_template)
    assert (tokenizer.eos_token, tokenizer.chat_template) == told
    quick(model, tokenizer)
    again = load_model("run", verbose=False)[1]
    assert (again.eos_token, again.chat_template) == told


def test_an_adapter_with_more_tokens_than_its_base_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere()
    theirs = transformers.AutoTokenizer.from_pretrained("base")
    theirs.add_tokens(["<hen>"])
    theirs.save_pretrained("mine")
    with pytest.raises(TinyTrainerError, match="mine: its tokenizer has 1,025 tokens and the model knows 1,024"):
        opened()


def test_an_adapter_is_loaded_on_the_revision_that_it_names(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = logits(elsewhere())
    shutil.copytree("base", "newer")
    changed(Path("newer/model.safetensors"))
    hub_cache(tmp_path / "hub", {"a" * 40: "base", "b" * 40: "newer"})
    (tmp_path / "hub/models--someone--hens/refs/v1").write_text("a" * 40)
    rewritten("mine", base_model_name_or_path="someone/hens", revision="v1")
    model, tokenizer = opened()
    report = model.load_report
    assert (report.base, report.path, report.commit) == ("someone/hens", "someone/hens", "a" * 40)
    assert torch.equal(logits(model), expected)
    run = quick(model, tokenizer)
    assert torch.equal(logits(load_model("run", verbose=False)[0]), logits(run.model))
    rewritten("mine", revision="v2")
    with pytest.raises(TinyTrainerError, match="someone/hens: its revision v2 is neither in the local cache nor"):
        opened()


def test_a_folder_with_a_model_and_an_adapter_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere()
    for path in Path("mine").glob("adapter*"):
        shutil.copy(path, "base")
    with pytest.raises(TinyTrainerError, match="base: here lie a model and an adapter"):
        opened("base")


def pairs() -> list[dict]:
    return [dict(prompt=f"{n} hens?", chosen=f"{2 * n} legs", rejected="no") for n in range(12)]


KEPT = {  # recipe: how it is run, and a file of its data
    "sft": (lambda m, t, **s: sft(m, t, ROWS, SFTArgs(**s)), "train.json"),
    "dpo": (lambda m, t, **s: dpo(m, t, pairs(), DPOArgs(**s)), "train.json"),
    "reward_model": (lambda m, t, **s: reward_model(m, t, pairs(), RewardModelArgs(**s)), "heldout.json"),
    "ppo": (
        lambda m, t, **s: ppo(m, t, ROWS, "length", PPOArgs(num_generations=2, max_new_tokens=4, **s)),
        "prompts.json",
    ),
    "pretrain": (lambda m, t, **s: pretrain(m, t, TEXTS, PretrainArgs(max_length=32, **s)), "tokens.npy"),
}


@pytest.mark.parametrize("recipe", KEPT)
def test_a_run_does_not_go_on_with_other_data(tmp_path, monkeypatch, recipe):
    "A valid file with one other row, one without a row, none; a run of an older version knows no hashes"
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    train, name = KEPT[recipe]
    train(model if recipe == "pretrain" else add_lora(model, LoraArgs(r=2)), tokenizer, max_steps=1, out="run", **FEW)
    told = json.loads(Path("run/run.json").read_text(encoding="utf8"))
    told |= dict(status="stopped", settings=told["settings"] | dict(max_steps=2))
    assert f"data/{name}" in told["start"]
    Path("run/run.json").write_text(json.dumps(told), encoding="utf8")
    file = Path("run/data", name)
    whole = file.read_bytes()
    for other in (whole[:-2] + b" " + whole[-2:], whole[: len(whole) // 2], b"", None):
        file.unlink() if other is None else file.write_bytes(other)
        with pytest.raises(TinyTrainerError, match=f"data/{name} is not as it was when the run was started"):
            Run.open("run").resume()
        assert Run.open("run").status == "stopped"
        file.write_bytes(whole)
    file.unlink()
    if recipe != "reward_model":
        load_model("run", verbose=False)  # the result does not need them
    file.write_bytes(whole)
    told["start"] = {n: v for n, v in told["start"].items() if not n.startswith("data/")}
    Path("run/run.json").write_text(json.dumps(told), encoding="utf8")
    assert Run.open("run").resume().status == "finished"


NPZ = io.BytesIO()
np.savez(NPZ, tokens=np.arange(9))
TOKENS = dict(
    cut=lambda whole: whole[: len(whole) // 2],
    empty=lambda whole: b"",
    zip=lambda whole: NPZ.getvalue(),
    text=lambda whole: b"tokens",
    floats=lambda whole: saved(np.ones(999)),
    table=lambda whole: saved(np.ones((9, 9), dtype=np.uint16)),
    objects=lambda whole: saved(np.array([print] * 9)),
    foreign=lambda whole: saved(np.full(999, 60_000, dtype=np.uint16)),
)


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_tokens_that_are_none_are_a_line(tmp_path, monkeypatch):
    "In a run of an older version, which kept no hash of them"
    monkeypatch.chdir(tmp_path)
    model, tokenizer = base()
    train, name = KEPT["pretrain"]
    run = train(model, tokenizer, max_steps=1, out="run", **FEW)
    run.update_info(start={})
    whole = (run.folder / "data" / name).read_bytes()
    for what, damaged in TOKENS.items():
        (run.folder / "data" / name).write_bytes(damaged(whole))
        with pytest.raises(TinyTrainerError, match="tokens.npy: holds (no tokens|something else than tokens)"):
            read_back(run, tokenizer, PretrainArgs())
            pytest.fail(what)
