"""DPO and reward models against the formulas, computed by plain `transformers` and PEFT, and against TRL's own
trainers."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from small import small_base
from test_processes import COMMON, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tinytrainer_nb.recipes.train  # noqa: F401 (gives runs their resume)
from tinytrainer_nb.cli import main
from tinytrainer_nb.compute.arguments import GenerateArgs
from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.data.formats import load_examples, load_prompts
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes import preference
from tinytrainer_nb.recipes.arguments import DPOArgs, PPOArgs, RewardModelArgs
from tinytrainer_nb.recipes.ppo import ppo
from tinytrainer_nb.recipes.preference import (
    dpo,
    encode_answer,
    encode_pairs,
    model_reward,
    reward_model,
    sample_pairs,
)
from tinytrainer_nb.recipes.rewards import find_reward
from tinytrainer_nb.recipes.trainer import RunTrainer
from tinytrainer_nb.runs.run import Run

RECIPES = dict(dpo=(dpo, DPOArgs), reward_model=(reward_model, RewardModelArgs))
SMALL = dict(
    max_steps=3,
    batch_size=4,
    warmup_steps=0,
    learning_rate=2e-3,
    schedule="constant",
    save_steps=0,
    eval_steps=0,
    sample_steps=0,
)


def pairs(count: int = 24) -> list[dict]:
    "Short problems, each with its own solution and with the next one's"
    rows = sorted(load_examples(data_file("sft.jsonl")).select(range(300)).to_list(), key=lambda r: len(str(r)))[
        : count + 1
    ]
    return [
        dict(prompt=a["messages"][:-1], chosen=a["messages"][-1]["content"], rejected=b["messages"][-1]["content"])
        for a, b in zip(rows, rows[1:])
    ]


def policy(trained: bool = False, dtype="fp32", quantization="none", **lora):
    "`tiny` with an adapter, fresh or as after an SFT"
    model, tokenizer = load_model(small_base(), quantization, dtype, verbose=False)
    model = add_lora(model, LoraArgs(r=4, **lora))
    if trained:
        for name, p in trainable(model).items():
            if "lora_B" in name:
                p.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return model, tokenizer


def events(run: Run, kind: str) -> list[dict]:
    return [e for e in run.events if e["kind"] == kind]


def plain(adapter=None, cls=AutoModelForCausalLM, **kwargs):
    "The base as `transformers` and PEFT load it"
    model = cls.from_pretrained(small_base(), dtype=torch.float32, attn_implementation="eager", **kwargs)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def answer_logprob(model, tokenizer, messages: list[dict], answer: str) -> torch.Tensor:
    "log pi(answer | messages), one row without padding; the template is written out by hand"
    prompt = "<s>" + "".join(f"### {m['role'].capitalize()}:\n{m['content']}\n" for m in messages) + "### Assistant:\n"
    ids = tokenizer(prompt + answer + "</s>", add_special_tokens=False).input_ids
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return sum(logp[t - 1, ids[t]] for t in range(start, len(ids)))


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_dpo_loss_is_equation_7(tmp_path, trained):
    """-log sigmoid(beta ((log pi - log ref)(chosen) - (log pi - log ref)(rejected))), and the reference is the policy
    as it was handed over"""
    model, tokenizer = policy(trained)
    run = dpo(model, tokenizer, pairs(30), DPOArgs(**SMALL | dict(eval_steps=3), beta=0.3, out=str(tmp_path / "run")))
    found, held = events(run, "evaluation")[-1], json.loads((run.folder / "data/heldout.json").read_text())
    reference = plain(run.folder / "start" if trained else None)
    after = plain(run.folder / "adapter")
    with torch.no_grad():
        ratio = {
            k: torch.stack(
                [
                    answer_logprob(after, tokenizer, r["messages"], r[k])
                    - answer_logprob(reference, tokenizer, r["messages"], r[k])
                    for r in held
                ]
            )
            for k in ("chosen", "rejected")
        }
    margin = 0.3 * (ratio["chosen"] - ratio["rejected"])
    want = dict(
        loss=-F.logsigmoid(margin),
        margin=margin,
        accuracy=(margin > 0).float(),
        chosen_reward=0.3 * ratio["chosen"],
        rejected_reward=0.3 * ratio["rejected"],
    )
    assert len(held) == 3 and ratio["chosen"].abs().min() > 0.01
    for name, value in want.items():
        assert found[name] == pytest.approx(value.mean().item(), abs=1e-4), name
    first = events(run, "metrics")[0]
    # Nothing is learned yet: policy and reference are one
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0


class Plain(trl.DPOTrainer):
    "TRL's own trainer, its own tokens, collator and forward pass"

    def _send_telemetry(self):
        pass


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_loss_and_gradient_are_those_of_trl(tmp_path, monkeypatch, trained):
    "Cut into micro-batches and packed, or in one padded batch: the same loss, gradient and figures at the same weights"
    seen, original = {}, preference.DPOTrainer.training_step

    def step(self, model, inputs, num_items_in_batch=None):
        seen["weights"] = {n: p.detach().clone() for n, p in trainable(self.model).items()}
        seen["parts"] = len(inputs["micro_batches"])
        loss = original(self, model, inputs, num_items_in_batch)
        seen["gradient"] = {n: p.grad.clone() for n, p in trainable(self.model).items()}
        return loss

    monkeypatch.setattr(preference.DPOTrainer, "training_step", step)
    rows = pairs(4)
    model, tokenizer = policy(trained)
    run = dpo(model, tokenizer, rows, DPOArgs(**SMALL, beta=0.2, micro_batch_tokens=400, out=str(tmp_path / "run")))
    theirs, _ = policy(trained)
    turns = [
        dict(
            prompt=r["prompt"],
            chosen=[dict(role="assistant", content=r["chosen"])],
            rejected=[dict(role="assistant", content=r["rejected"])],
        )
        for r in rows
    ]
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.2, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[]
    )
    trainer = Plain(theirs, args=config, train_dataset=Dataset.from_list(turns), processing_class=tokenizer)
    for row, ours in zip(trainer.train_dataset, encode_pairs(tokenizer, load_examples(rows), 512)[0], strict=True):
        assert row["prompt_ids"] == ours["prompt_ids"]
        for name in ("chosen_ids", "rejected_ids"):
            # TRL goes on to what stands behind the end
            assert row[name][: len(ours[name])] == ours[name] and ours[name][-1] == tokenizer.eos_token_id
    batch = trainer.data_collator(
        [
            {
                k: r[k][: r[k].index(2) + 1] if k != "prompt_ids" else r[k]
                for k in ("prompt_ids", "chosen_ids", "rejected_ids")
            }
            for r in trainer.train_dataset
        ]
    )
    with torch.no_grad():
        for name, p in trainable(theirs).items():
            p.copy_(seen["weights"][name])
    theirs.train()
    loss = trainer.compute_loss(theirs, batch)
    loss.backward()
    last = events(run, "metrics")[-1]
    assert seen["parts"] > 1 and last["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for ours, name in dict(
        accuracy="accuracies", margin="margins", chosen_reward="chosen", rejected_reward="rejected"
    ).items():
        assert last[ours] == pytest.approx(trainer._metrics["train"][f"rewards/{name}"][0], abs=1e-4)
    for name, p in trainable(theirs).items():
        assert (seen["gradient"][name] - p.grad).norm() < 1e-4 * p.grad.norm(), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_over_4_bits_the_adapter_stays_what_it_was(tmp_path, dtype):
    """TRL rounds such an adapter to bf16; here its numbers are handed back in fp32, the reference has them too, and
    nothing is left on the model in the end"""
    model, tokenizer = policy(True, dtype, "nf4", dropout=0.1)
    tokenizer.pad_token = model.config.pad_token_id = None
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    run = dpo(model, tokenizer, pairs(4), DPOArgs(**SMALL | dict(max_steps=2), out=str(tmp_path / "run")))
    first = events(run, "metrics")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and first["grad_norm"] > 0
    start = load_file(run.folder / "start/adapter_model.safetensors")
    assert all(torch.equal(start[n.replace(".default", "")], p) for n, p in before.items())
    assert all(p.dtype == torch.float32 for p in trainable(model).values()) and trainable(model).keys() == before.keys()
    assert list(model.peft_config) == ["default"] and "forward" not in model.get_base_model().__dict__
    assert (
        {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
        and tokenizer.pad_token is None
        and model.config.pad_token_id is None
    )


def ask(monkeypatch, wishes: dict) -> None:
    "Leave requests at the end of these steps"
    original = RunTrainer.obey

    def obey(self, save=None, due=False):
        for action, values in wishes.get(self.state.global_step, {}).items():
            self.run.request(action, **values)
        return original(self, save, due)

    monkeypatch.setattr(RunTrainer, "obey", obey)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_resumed_ends_like_the_uninterrupted(tmp_path, monkeypatch, recipe):
    """Bit for bit: over 4 bits, after an SFT, dropout set, a learning rate changed on the way, stopped in the second
    pass over the data"""
    work, settings = RECIPES[recipe]
    change, stop = {2: dict(set=dict(changes=dict(learning_rate=1e-3)))}, {4: dict(stop={})}

    def begin(out, wishes):
        with monkeypatch.context() as m:
            ask(m, wishes)
            return work(
                *policy(True, "auto", "nf4", dropout=0.1),
                pairs(10),
                settings(
                    **SMALL | dict(max_steps=6, save_steps=3, sample_steps=6, eval_steps=3, eval_rows=1),
                    out=str(tmp_path / out),
                ),
            )

    whole, stopped = begin("whole", change), begin("stopped", change | stop)
    assert stopped.status == "stopped" and stopped.step == 4
    again = Run.open(stopped.folder).resume()
    assert again.status == "finished" and again.step == 6 and [e["new"] for e in events(again, "change")] == [1e-3]
    assert (again.folder / "adapter/adapter_model.safetensors").read_bytes() == (
        whole.folder / "adapter/adapter_model.safetensors"
    ).read_bytes()
    for kind in ("metrics", "evaluation", "sample"):
        told = [
            [{k: v for k, v in e.items() if k not in ("time", "seconds", "tokens_per_s")} for e in events(run, kind)]
            for run in (again, whole)
        ]
        assert told[0] == told[1] != []


def test_reward_model_against_plain_transformers(tmp_path):
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected); `adapter/` is a sequence classifier's in PEFT's format, and
    a padded batch through it gives the same scores"""
    model, tokenizer = policy(True)
    run = reward_model(
        model,
        tokenizer,
        pairs(30),
        RewardModelArgs(**SMALL | dict(max_steps=6, eval_steps=6, learning_rate=1e-2), out=str(tmp_path / "judge")),
    )
    found, held = events(run, "evaluation")[-1], json.loads((run.folder / "data/heldout.json").read_text())
    classifier = plain(run.folder / "adapter", AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
    rows = [encode_answer(tokenizer, r["messages"], r[k])[0] for k in ("chosen", "rejected") for r in held]
    width = max(map(len, rows))
    with torch.no_grad():
        scores = classifier(
            torch.tensor([r + [0] * (width - len(r)) for r in rows]),
            attention_mask=torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
        ).logits[:, 0]
    chosen, rejected = scores.chunk(2)
    assert scores.abs().min() > 1e-3
    want = dict(
        loss=-F.logsigmoid(chosen - rejected),
        accuracy=(chosen > rejected).float(),
        margin=chosen - rejected,
        chosen_reward=chosen,
        rejected_reward=rejected,
    )
    for name, value in want.items():
        assert found[name] == pytest.approx(value.mean().item(), abs=1e-4), name
    judge = model_reward(run.folder)
    said = judge([r["messages"][-1]["content"] for r in held], [r["chosen"] for r in held])
    assert said == pytest.approx(chosen.tolist(), abs=1e-4) and judge.__name__ == "judge"
    assert events(run, "metrics")[0]["loss"] == pytest.approx(math.log(2)) and list(model.peft_config) == ["default"]


def test_a_reward_model_learns_its_pairs_and_teaches_ppo(tmp_path):
    """It ranks what it was trained on; its reward is finite, without gradient, the same each time; PPO takes it, and
    takes it again"""
    rows = pairs(8)
    model, tokenizer = policy(dtype="auto")
    reward_model(
        model,
        tokenizer,
        rows,
        RewardModelArgs(**SMALL | dict(max_steps=12, batch_size=8, learning_rate=5e-3), out=str(tmp_path / "judge")),
    )
    judge = model_reward(tmp_path / "judge")
    with pytest.raises(TinyTrainerError, match="scores answers and does not speak"):
        load_model(tmp_path / "judge")
    asked = [r["prompt"][-1]["content"] for r in rows]
    good, bad = (
        find_reward(judge)(asked, [r[k] for r in rows], [dict(reference_answer="1")] * 8)[0]
        for k in ("chosen", "rejected")
    )
    assert all(a > b for a, b in zip(good, bad)) and all(map(math.isfinite, good + bad))
    assert (
        judge(asked, [r["chosen"] for r in rows]) == good
        and judge(prompts=[r["prompt"] for r in rows], completions=[r["chosen"] for r in rows]) == good
    )
    assert math.isfinite(judge(["How much is 1 + 1?"], [""])[0])
    args = PPOArgs(
        max_steps=2,
        batch_size=2,
        num_generations=2,
        max_new_tokens=8,
        minibatches=1,
        save_steps=1,
        sample_steps=0,
        out=str(tmp_path / "ppo"),
    )
    prompts = load_prompts(data_file("rl.jsonl"))[:4]
    run = ppo(*policy(), prompts, judge, args, live=True)
    run.stop()
    run.wait()
    assert run.how_to_resume() == f"`Run.open({str(run.folder)!r}).resume(reward=judge)`"
    run = Run.open(run.folder).resume(reward=model_reward(tmp_path / "judge"))
    assert run.status == "finished" and len(run.history("reward/judge")[0]) == 2


def test_sampled_pairs_are_best_and_worst():
    model, tokenizer = policy(True)
    longest = lambda prompt, completion, **row: len(completion)
    prompts = load_prompts(data_file("rl.jsonl"))[:3]
    found = sample_pairs(model, tokenizer, prompts, longest, GenerateArgs(num_generations=3, max_new_tokens=12))
    assert found and all(len(p["chosen"]) > len(p["rejected"]) for p in found)
    assert (
        load_examples(found).column_names == ["messages", "chosen", "rejected"]
        and found[0]["prompt"] == prompts[0]["messages"]
    )
    assert (
        sample_pairs(
            model,
            tokenizer,
            prompts,
            lambda prompt, completion, **row: 1.0,
            GenerateArgs(num_generations=2, max_new_tokens=4),
        )
        == []
    )


def test_what_is_left_out(tmp_path):
    _, tokenizer = policy()
    rows = pairs(3) + [
        dict(prompt="a", chosen="b", rejected="b"),
        dict(prompt="word " * 600, chosen="b", rejected="c"),
        dict(prompt="a", chosen=" ", rejected="c"),
    ]
    found, left_out = encode_pairs(tokenizer, load_examples(rows), 512)
    assert len(found) == 3 and left_out == {"equal answers": 1, "too long": 1}
    run = dpo(*policy(), rows, DPOArgs(**SMALL | dict(max_steps=1), out=str(tmp_path / "run")))
    said = "left out: 1 empty text, 1 equal answers, 1 longer than the model's context of 1024 tokens"
    assert said in next(e["message"] for e in events(run, "note"))


FAULTS = {
    "no pairs": (
        [dict(prompt="a", completion="b")],
        {},
        "they need the columns prompt (or a conversation), chosen and rejected",
    ),
    "plain text": ([dict(text="a")], {}, "hold no pairs of answers"),
    "equal answers": ([dict(prompt="a", chosen="b", rejected="b")] * 2, {}, "no pair is left of 2: 2 equal answers"),
    "empty and equal": (
        [dict(prompt="a", chosen="b", rejected="b"), *[dict(prompt="a", chosen="", rejected="b")] * 2],
        {},
        "no pair is left of 3: 2 empty text, 1 equal answers",
    ),
    "too long": (
        [dict(prompt="word " * 100, chosen="b", rejected="c")],
        dict(max_length=64),
        "1 too long, with max_length=64",
    ),
    "nothing held out": (pairs(4), dict(keep_best=True, eval_steps=1), "no row is held back"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_faults_are_one_line_and_leave_nothing(tmp_path, recipe, fault):
    rows, settings, words = FAULTS[fault]
    work, args = RECIPES[recipe]
    with pytest.raises(TinyTrainerError) as e:
        work(*policy(), rows, args(**SMALL | settings, out=str(tmp_path / "run")))
    assert words in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_what_cannot_be_a_reward_or_a_policy(tmp_path):
    head, tokenizer = policy(target_modules="q_proj,lm_head")
    with pytest.raises(TinyTrainerError, match="lm_head"):
        dpo(head, tokenizer, pairs(2), DPOArgs(out=str(tmp_path / "head")))
    run = dpo(*policy(), pairs(4), DPOArgs(**SMALL, out=str(tmp_path / "dpo")))
    with pytest.raises(TinyTrainerError, match="a run of dpo holds no reward model"):
        model_reward(run.folder)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["dpo", "--out", "run"]) == 2 and "--data" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs(12)))
    flags = [
        "--quantization",
        "nf4",
        "--dtype",
        "fp32",
        "--max_steps",
        "2",
        "--batch_size",
        "4",
        "--beta",
        "0.2",
        "--lora_r",
        "2",
        "--data",
        "pairs.jsonl",
        "--out",
        "run",
    ]
    assert main(["dpo", *flags]) == 0
    run = Run.open("run")
    assert run.info["recipe"] == "dpo" and run.info["settings"]["beta"] == 0.2 and run.info["data"]["files"]
    assert {
        "recipe",
        "status",
        "steps",
        "tokens",
        "seconds",
        "tokens_per_s",
        "peak_memory_gb",
        "trainable_parameters",
        "first_loss",
        "last_loss",
    } <= run.summary.keys()
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "accuracy",
        "margin",
        "chosen_reward",
        "rejected_reward",
    } <= events(run, "metrics")[0].keys()
    assert main(["resume", "run"]) == 0 and "finished" in capsys.readouterr().out


@pytest.mark.slow  # test_processes.py trains SFT so, by the same trainer
def test_two_processes_train_as_one(tmp_path):
    """Losses and figures agree to 1e-5, with other numbers of micro-batches in the two, and with a last batch of
    three pairs"""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs(17)))
    flags = [
        *COMMON,
        "--max_steps",
        "3",
        "--batch_size",
        "6",
        "--eval_steps",
        "3",
        "--sample_steps",
        "0",
        "--save_steps",
        "2",
        "--micro_batch_tokens",
        "256",
        "--data",
        tmp_path / "pairs.jsonl",
    ]
    for name, processes in dict(one=1, two=2).items():
        train("dpo", *flags, "--out", tmp_path / name, processes=processes)
    one, two = (
        [e for e in Run.open(tmp_path / name).events if e["kind"] in ("metrics", "evaluation")]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        for name in a.keys() - {"time", "kind", "tokens_per_s", "seconds", "grad_norm"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), (name, a["step"])


def test_real_pairs(tmp_path, shared):
    "300 conversations of several turns, answers of hundreds of tokens"
    examples = load_examples(shared / "data/preference/dpo_en_demo.json")
    assert len(examples) == 300
    run = dpo(
        *policy(dtype="auto"),
        examples.select(range(40)),
        DPOArgs(
            **SMALL | dict(max_steps=2, batch_size=2, eval_steps=2, sample_steps=2, sample_tokens=4),
            max_length=1024,
            out=str(tmp_path / "run"),
        ),
    )
    assert run.status == "finished" and events(run, "sample") and math.isfinite(events(run, "evaluation")[0]["loss"])
