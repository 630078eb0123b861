"""A model is what its run says it is: base, tokenizer, commit, result and reward are compared wherever a run is
opened, and copies of weights never outlive the weights."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from small import ROWS, small_base

from tinytrainer_nb.all import (
    GenerateArgs,
    LoraArgs,
    PPOArgs,
    PretrainArgs,
    Run,
    SFTArgs,
    add_lora,
    evaluate,
    generate,
    load_model,
    ppo,
    pretrain,
    save_merged,
    sft,
)
from tinytrainer_nb.cli import main
from tinytrainer_nb.compute.decode import Decoder
from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.recipes.rewards import code_hash, find_reward

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


OPENED = dict(
    load=lambda: load_model("run", verbose=False),
    merge=lambda: save_merged("run", "merged"),
    train_on=lambda: main(["sft", "--base", "run", "--max_steps", "1", "--out", "next", "--eval_steps", "0"]),
    evaluate=lambda: main(["evaluate", "--base", "run", "--task", "loss", "--limit", "2"]),
)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_base_is_refused_by_every_door(run, name, capsys):
    edited(name)
    for door, opened in OPENED.items():
        try:
            said = str(opened())
        except TinyTrainerError as e:
            said = str(e)
        told = said if said != "2" else capsys.readouterr().err
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
