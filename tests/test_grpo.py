"""GRPO against plain transcriptions of its formulas, against TRL, and against itself computed the long way."""

import datetime
from decimal import Decimal

import pytest
import torch
from datasets import Dataset
from small import small_base

import tinytrainer_nb.recipes.train  # noqa: F401 (gives runs their resume)
from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.data.formats import load_prompts
from tinytrainer_nb.data.tokens import micro_trees, pack_trees
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes.arguments import GRPOArgs
from tinytrainer_nb.recipes.grpo import (
    GRPOTrainer,
    group_advantages,
    grpo,
    importance_weights,
    loss_weights,
)
from tinytrainer_nb.recipes.rounds import Policy
from tinytrainer_nb.runs.run import Run
from tinytrainer_nb.views.terminal import summary_line

PROMPTS = load_prompts(data_file("rl.jsonl"))[:8]


def policy():
    "An adapter whose B is not zero: otherwise the gradient of A would be, whatever the formula"
    model, tokenizer = load_model(small_base(), quantization="none", dtype="fp32", verbose=False)
    model = add_lora(model, LoraArgs(r=4))
    for i, (name, p) in enumerate(trainable(model).items()):
        if "lora_B" in name:
            p.data.normal_(std=0.02, generator=torch.Generator().manual_seed(i))
    return model, tokenizer


def letters(prompt, completion, **row):
    "Differs between completions"
    return len(set(completion)) / 20


def only_some(prompt, completion, **row):
    "No difference between the answers to every other question"
    return letters(prompt, completion) if sum(map(ord, prompt)) % 2 else 1.0


def small(out, **more):
    return GRPOArgs(
        **dict(
            max_steps=1,
            batch_size=4,
            num_generations=4,
            max_new_tokens=12,
            save_steps=0,
            sample_steps=0,
            warmup_steps=0,
            out=str(out),
        )
        | more
    )


def one_round(tmp_path, monkeypatch, reward=letters, away=0.0, **settings):
    """Run a round; the policy that rolled out is moved `away` by noise, so that ratios are not 1. Returns the model,
    the round, the loss and the gradient by name."""
    model, tokenizer = policy()
    seen, before = {}, {n: p.detach().clone() for n, p in trainable(model).items()}
    gather, original = GRPOTrainer.gather, GRPOTrainer.training_step

    def keep(self, prompts, step):
        seen["batch"], figures = gather(self, prompts, step)
        noise = torch.Generator().manual_seed(5)
        if away:
            with torch.no_grad():
                seen["batch"].logprobs = seen["batch"].rollout_logprobs + away * torch.randn(
                    seen["batch"].mask.shape, generator=noise
                )
            seen["batch"].rollout_logprobs = seen["batch"].logprobs + away * torch.randn(
                seen["batch"].mask.shape, generator=noise
            )
        return seen["batch"], figures

    def step(self, model, inputs, num_items_in_batch=None):
        seen["loss"] = original(self, model, inputs, num_items_in_batch).item()
        seen["gradient"] = {n.removeprefix("policy."): p.grad.clone() for n, p in trainable(self.model).items()}
        return torch.tensor(seen["loss"])

    monkeypatch.setattr(GRPOTrainer, "gather", keep)
    monkeypatch.setattr(GRPOTrainer, "training_step", step)
    grpo(model, tokenizer, PROMPTS, reward, small(tmp_path / "grpo", **settings))
    with torch.no_grad():
        for n, p in trainable(model).items():
            p.copy_(before[n])
    model.zero_grad()
    model.eval()
    return model, seen["batch"], seen["loss"], seen["gradient"]


def plain_logprobs(model, row):
    "One whole row by plain `transformers`, prompt and all"
    ids, start = torch.tensor([row["prompt"] + row["completion"]]), len(row["prompt"])
    return torch.log_softmax(model(ids).logits[0, start - 1 : -1].float(), -1).gather(-1, ids[0, start:, None])[:, 0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(away=0.4),
        dict(away=0.4, kl_coef=0.3),
        dict(reward=only_some),
        dict(scale_rewards="none", micro_batch_tokens=60),
    ],
    ids=["first pass", "later pass", "with a price", "idle groups", "micro-batches"],
)
def test_loss_and_gradient_are_the_formulas(tmp_path, monkeypatch, loss_type, case):
    """Every completion in a row of its own, equations written out, nothing skipped: the same loss and gradient within
    1e-5"""
    model, batch, loss, gradient = one_round(tmp_path, monkeypatch, loss_type=loss_type, **case)
    if case.get("reward"):
        assert 0 < len(batch.idle) < len(batch.rows)
    lengths, total, per_sequence = [len(r["completion"]) for r in batch.rows], 0.0, []
    groups = batch.scores.view(-1, 4)
    advantages = groups - groups.mean(1, keepdim=True)
    if case.get("scale_rewards") != "none":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    for i, (row, a) in enumerate(zip(batch.rows, advantages.flatten())):
        logp = plain_logprobs(model, row)
        old = logp.detach() if batch.logprobs is None else batch.logprobs[i, : lengths[i]]
        ratio = torch.exp(logp - old)
        tokens = -torch.min(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a)
        tokens = tokens * torch.exp(old - batch.rollout_logprobs[i, : lengths[i]]).clamp(max=2.0)
        if case.get("kl_coef"):
            ref = batch.ref_logprobs[i, : lengths[i]]
            tokens = tokens + 0.3 * (torch.exp(ref - logp) - (ref - logp) - 1)
        per_sequence.append(tokens)
    if loss_type == "grpo":
        total = torch.stack([t.mean() for t in per_sequence]).mean()
    if loss_type == "dapo":
        total = torch.cat(per_sequence).sum() / sum(lengths)
    if loss_type == "dr_grpo":
        total = torch.cat(per_sequence).sum() / (len(per_sequence) * 12)
    total.backward()
    assert loss == pytest.approx(total.item(), abs=1e-5)
    apart = {name: gradient[name] - p.grad for name, p in trainable(model).items()}
    whole = torch.cat([p.grad.flatten() for p in trainable(model).values()])
    assert torch.cat([d.flatten() for d in apart.values()]).norm() / whole.norm() < 1e-5
    for name, p in trainable(model).items():
        assert apart[name].norm() / p.grad.norm() < 1e-4, name  # small tensors have more of the rounding


def test_the_reference_is_the_base_when_the_adapter_is_fresh_and_the_policy_otherwise(tmp_path, monkeypatch):
    "The adapter handed over is not fresh here, so its copy is the reference"
    model, batch, *_ = one_round(tmp_path, monkeypatch, kl_coef=0.1)
    with torch.no_grad():
        plain = plain_logprobs(model, batch.rows[0])
    torch.testing.assert_close(batch.ref_logprobs[0, : len(plain)], plain, atol=1e-4, rtol=0)


def test_all_groups_idle(tmp_path):
    "A constant reward: no gradient, nothing moves, the run goes on, and an alarm says so once it is no accident"
    model, tokenizer = policy()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    run = grpo(
        model,
        tokenizer,
        PROMPTS,
        lambda prompt, completion, **row: 1.0,
        small(tmp_path / "grpo", max_steps=6, max_new_tokens=6),
    )
    assert all(torch.equal(before[n], p) for n, p in trainable(model).items()) and run.status == "finished"
    assert [e["grad_norm"] for e in run.events if e["kind"] == "metrics"] == [0] * 6
    rung = {e["name"]: e for e in run.events if e["kind"] == "alarm"}
    assert rung["no_signal"]["step"] == 5 and "raise num_generations" in rung["no_signal"]["message"]


def test_a_tree_is_its_rows(tmp_path):
    """Log-probabilities and gradient of three prompts with ragged completions, against each row alone; budgets cut
    them everywhere"""
    model, _ = policy()
    module, draw = Policy(model), torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, 1000, (n,), generator=draw).tolist()
    rows = [
        dict(prompt=prompt, completion=ids(n), group=g)
        for g, prompt in enumerate([ids(40), ids(3), ids(17)])
        for n in (5, 1, 33, 20)
    ]
    weights = [torch.randn(len(r["completion"]), generator=draw) for r in rows]

    def gradient(loss):
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in trainable(model).values()])
        model.zero_grad()
        return found

    plain = [plain_logprobs(model, row) for row in rows]
    expected = gradient(sum((w * x).sum() for w, x in zip(weights, plain)))
    for budget in (10_000, 120, 1):
        parts = [module(**pack_trees(group))[0] for group in micro_trees(rows, budget)]
        assert len(parts) == {10_000: 1, 120: 3, 1: 12}[budget]
        torch.testing.assert_close(torch.cat(parts), torch.cat(plain).detach(), atol=1e-4, rtol=1e-4)
        found = gradient((torch.cat(weights) * torch.cat(parts)).sum())
        assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("loss_type,beta", [("grpo", 0.0), ("dapo", 0.0), ("dr_grpo", 0.0), ("dapo", 0.2)])
def test_trl_says_the_same(tmp_path, monkeypatch, loss_type, beta):
    "TRL's loss on the same rollouts, with an old policy that is not the present one and rollouts that are neither"
    from datasets import Dataset
    from trl import GRPOConfig
    from trl import GRPOTrainer as Theirs

    model, batch, loss, gradient = one_round(tmp_path, monkeypatch, loss_type=loss_type, away=0.4, kl_coef=beta)
    tokenizer = load_model(small_base(), "none", "fp32", verbose=False)[1]
    tokenizer.pad_token = tokenizer.eos_token
    config = GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        num_generations=4,
        per_device_train_batch_size=16,
        max_completion_length=12,
        loss_type=loss_type,
        beta=beta,
        epsilon=0.2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        scale_rewards="group",
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_cap=2.0,
    )
    model.train(False)
    model.get_base_model().config._attn_implementation = "sdpa"
    theirs = Theirs(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([dict(prompt="x")] * 16),
        processing_class=tokenizer,
    )
    theirs.use_vllm, theirs.vllm_importance_sampling_correction, theirs.current_gradient_accumulation_steps = (
        True,
        True,
        1,
    )
    widest = max(len(r["prompt"]) for r in batch.rows)
    left = lambda key: torch.tensor(
        [[key(None)] * (widest - len(r["prompt"])) + [key(t) for t in r["prompt"]] for r in batch.rows]
    )
    right = torch.tensor([r["completion"] + [0] * (batch.mask.shape[1] - len(r["completion"])) for r in batch.rows])
    inputs = dict(
        prompt_ids=left(lambda t: t or 0),
        prompt_mask=left(lambda t: int(t is not None)),
        completion_ids=right,
        completion_mask=batch.mask.long(),
        advantages=group_advantages(batch.scores, 4),
        old_per_token_logps=batch.logprobs,
        ref_per_token_logps=batch.ref_logprobs,
        importance_sampling_ratio=(batch.logprobs - batch.rollout_logprobs).exp().clamp(max=2.0),
        num_items_in_batch=batch.mask.sum(),
    )
    model.zero_grad()
    total = theirs._compute_loss(theirs.model.eval(), inputs)
    total.backward()
    assert loss == pytest.approx(total.item(), abs=1e-4)
    ours, trl = (
        torch.cat([g.flatten() for g in found])
        for found in (gradient.values(), [p.grad for p in trainable(model).values()])
    )
    assert (ours - trl).norm() / trl.norm() < 1e-4


def test_group_advantages_of_equal_rewards_are_exactly_zero():
    "Also where a mean of equal numbers is not that number in floating point"
    found = group_advantages(torch.tensor([0.1, 0.1, 0.1, 0.7, 0.1, 0.1]), 3)
    assert found[:3].tolist() == [0, 0, 0] and found[3] > 0


def test_weights_sum_to_what_they_say():
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    assert loss_weights(mask, "grpo", 5).sum(1).tolist() == [0.5, 0.5] and loss_weights(mask, "dapo", 5).sum() == 1
    assert loss_weights(mask, "dr_grpo", 5).max().item() == pytest.approx(0.1)
    assert importance_weights(torch.zeros(2), torch.tensor([-5.0, 5.0]), 0).tolist() == [1, 1]


def test_a_bandit_converges(tmp_path):
    "One token an answer, two arms: a digit is worth 1, anything else 0"
    model, tokenizer = policy()
    arm = lambda prompt, completion, **row: float(completion.strip()[:1].isdigit())
    run = grpo(
        model,
        tokenizer,
        [dict(messages=[dict(role="user", content="Say a number.")])] * 8,
        arm,
        small(
            tmp_path / "grpo",
            max_steps=25,
            batch_size=4,
            num_generations=8,
            max_new_tokens=1,
            learning_rate=3e-3,
            minibatches=2,
        ),
    )
    rewards = run.history("reward")[1]
    assert sum(rewards[-5:]) / 5 > 0.9, rewards


@pytest.mark.slow
def test_price_holds_the_policy(tmp_path):
    "A large KL coefficient keeps the policy at its reference"
    free, held = (
        grpo(
            *policy(),
            PROMPTS,
            letters,
            small(tmp_path / f"kl{beta}", max_steps=10, batch_size=4, learning_rate=3e-3, kl_coef=beta, minibatches=2),
        ).history("kl")[1]
        for beta in (0.0, 10.0)
    )
    assert sum(map(abs, held[-3:])) < 0.3 * sum(map(abs, free[-3:])), (free, held)


def test_a_reward_that_fails_ends_the_run_with_its_checkpoint(tmp_path):
    "In the third round; what was trained until then is kept, and a resume with the reward, mended, goes on from there"
    calls = []

    def reward(mended):
        def breaks(prompt, completion, **row):
            calls.append(completion)
            if len(calls) == 40 and not mended:
                raise ValueError("no such unit")
            return letters(prompt, completion)

        return breaks

    model, tokenizer = policy()
    with pytest.raises(
        TinyTrainerError, match=r"reward breaks.* raised ValueError: no such unit; prompt .*, completion"
    ):
        grpo(model, tokenizer, PROMPTS, reward(mended=False), small(tmp_path / "grpo", max_steps=4))
    run = Run.open(tmp_path / "grpo")
    assert run.last_checkpoint()[1] == 2 and run.status == "failed"
    with pytest.raises(TinyTrainerError, match="the code of breaks has changed since"):
        run.resume(reward=reward(mended=True))
    run.resume(reward=reward(mended=True), accept=["reward"])
    assert run.status == "finished" and [e["step"] for e in run.events if e["kind"] == "metrics"] == [1, 2, 3, 4]


def test_what_an_idle_round_does_not_know_it_does_not_say(tmp_path):
    "An entropy of 0 would look like a collapse"
    run = grpo(*policy(), PROMPTS, lambda prompt, completion, **row: 1.0, small(tmp_path / "idle"))
    busy = grpo(*policy(), PROMPTS, only_some, small(tmp_path / "busy", batch_size=8, minibatches=4))
    idle, busy = (next(e for e in r.events if e["kind"] == "metrics") for r in (run, busy))
    assert (
        not {"entropy", "mismatch", "clip_fraction"} & set(idle)
        and idle["no_signal"] == 1
        and idle["loss"] == 0
        and "kl" in idle
    )
    whole = grpo(*policy(), PROMPTS, letters, small(tmp_path / "whole", batch_size=8, minibatches=4))
    assert 0 < busy["no_signal"] < 1 and busy["entropy"] == pytest.approx(
        next(e for e in whole.events if e["kind"] == "metrics")["entropy"], rel=0.3
    )


def test_a_start_that_fails_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model, tokenizer = policy()
    before = list(model.peft_config)
    monkeypatch.setattr("tinytrainer_nb.recipes.rounds.Decoder", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo(model, tokenizer, PROMPTS, letters, small(tmp_path / "run"))
    assert list(model.peft_config) == before


def test_an_alarm_is_heard_while_it_trains_and_named_in_the_end(tmp_path, capsys):
    run = grpo(
        *policy(),
        PROMPTS,
        lambda prompt, completion, **row: 0.0,
        small(tmp_path / "run", max_steps=6, max_new_tokens=6),
    )
    told = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "alarm in round 5: " in line and "fine-tune first" in line
    ]
    assert len(told) == 1 and summary_line(run).endswith("; alarms: unfinished (step 5), no signal (step 5)")


def test_an_adapter_that_was_not_taken_is_told(tmp_path):
    model, tokenizer = load_model(small_base(), quantization="none", dtype="fp32", verbose=False)
    add_lora(model, LoraArgs(r=4))
    with pytest.raises(TinyTrainerError, match=r"model = add_lora\(model"):
        grpo(model, tokenizer, PROMPTS, letters, small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_distance_counts_rows_without_a_gradient(tmp_path, monkeypatch):
    """Every eighth completion of a round that teaches nothing, under the moved policy and under the reference, each
    by a plain pass"""
    model, tokenizer = policy()
    before, seen = {n: p.detach().clone() for n, p in trainable(model).items()}, {}
    rollout, update = GRPOTrainer.rollout, GRPOTrainer.update

    def moved(self, *args):
        with torch.no_grad():
            for i, p in enumerate(trainable(self.model.policy).values()):
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        return rollout(self, *args)

    def keep(self, model, batch, picked, watch=False):
        seen.update(rows=[batch.rows[i] for i in picked[::8]], idle=len(batch.idle))
        return update(self, model, batch, picked, watch)

    monkeypatch.setattr(GRPOTrainer, "rollout", moved)
    monkeypatch.setattr(GRPOTrainer, "update", keep)
    run = grpo(model, tokenizer, PROMPTS, lambda prompt, completion, **row: 1.0, small(tmp_path / "run"))

    def said():
        with torch.no_grad():
            return torch.stack([plain_logprobs(model, row).sum() for row in seen["rows"]])

    now = said()
    with torch.no_grad():
        for n, p in trainable(model).items():
            p.copy_(before[n])
    expected = (now - said()).mean().item()
    assert seen["idle"] == 16 and len(seen["rows"]) == 2 and abs(expected) > 0.1
    assert run.history("kl")[1] == pytest.approx([expected], abs=1e-3)


def test_groups_that_hardly_differ_have_no_advantage():
    "One percent of the mean size is the limit, of the whole round and not of the group; exact zeros, however scaled"
    rewards = [1.0, 1.0, 0.0, 0.3, 0.3001, 0.3, 5.0, 5.001, 5.0, 1.0, 0.0, 1.0]
    for scale in ("group", "batch", "none"):
        found = group_advantages(rewards, 3, scale).view(-1, 3)
        assert not found[1:3].any() and found[0].all() and found[3].all()
    assert not group_advantages([0.1 + 0.2, 0.3, 0.3], 3).any()  # equal but for rounding
    assert group_advantages([0.0, 1e-3], 2).all()  # small, and as different as they can be
    assert not group_advantages([0.0, 1e-5], 2).any()  # noise around zero
    assert not group_advantages([0.0] * 6 + [5.0, 5.001], 2).any()  # nothing earned elsewhere


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("huge", [[-1e5, -1e5, -1.01e5, -1e5], [1e6, 1e6, 1e6, -1e6], [9e5] * 4])
def test_one_enormous_group_silences_no_other(scale, huge):
    others = [0.0, 1.0, 0.0, 1.0]
    for rewards, places in ((others + huge, [0]), (huge + others, [1]), (others + huge + others, [0, 2])):
        found = group_advantages(rewards, 4, scale).view(-1, 4)
        assert all(found[i].all() for i in places)
        assert (found[1 - places[0] if len(places) == 1 else 1] != 0).any() == (len(set(huge)) > 1)
    alone = group_advantages(others, 4, "group")
    assert group_advantages(others + huge, 4, "group")[:4].equal(alone)


ODD = [
    dict(made=datetime.datetime(2026, 11, i + 1), price=Decimal("4.50"), raw=b"ab", share=float("nan"))
    for i in range(8)
]


@pytest.mark.parametrize("kind", ["list", "parquet"])
def test_a_column_is_the_same_before_and_after_a_resume(tmp_path, kind):
    "Dates, decimals, bytes and NaN beside the prompts; the run fails in its third round and goes on"
    data = [
        dict(prompt=p["messages"][-1]["content"], reference_answer=["4", "four"]) | odd for p, odd in zip(PROMPTS, ODD)
    ]
    if kind == "parquet":
        Dataset.from_list(data).to_parquet(tmp_path / "odd.parquet")
        data = str(tmp_path / "odd.parquet")
    seen, calls = [], []

    def reward(completions, prompts, messages, made, price, raw, share, reference_answer):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("once")
        seen.append(list(zip(prompts, made, price, raw, share, reference_answer, map(str, messages))))
        return [letters("", c) for c in completions]

    args = small(tmp_path / "grpo", max_steps=4, batch_size=8, num_generations=2, max_new_tokens=4)
    with pytest.raises(TinyTrainerError, match="raised ValueError: once"):
        grpo(*policy(), data, reward, args)
    run = Run.open(tmp_path / "grpo").resume(reward=reward)
    assert run.status == "finished" and len(seen) == 4
    assert all(sorted(map(str, rows)) == sorted(map(str, seen[0])) for rows in seen)  # all prompts, in another order
    assert {row[1] for row in seen[-1]} == {f"2026-11-0{i}T00:00:00" for i in range(1, 9)}
    assert {row[2:5] for row in seen[-1]} == {("4.50", "ab", None)}


def test_the_data_s_columns_do_not_take_the_place_of_what_was_said(tmp_path):
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        assert not {"prompts", "completions", "messages"} & set(columns) and columns["level"] == [1] * len(prompts)
        return [letters("", c) for c in completions]

    data = [dict(p, completions=["good"], prompts=["good"], level=1) for p in PROMPTS]
    grpo(*policy(), data, reward, small(tmp_path / "grpo"))
    assert len(seen) == 16 and "good" not in seen and all(isinstance(c, str) for c in seen)


def test_a_reward_sees_the_turns_that_the_model_was_asked(tmp_path):
    turns = [
        dict(role="system", content="Be brief."),
        dict(role="user", content="Hi."),
        dict(role="assistant", content="Yes?"),
    ]
    data = [dict(messages=[*turns, p["messages"][-1]]) for p in PROMPTS]
    seen = []

    def reward(prompt, completion, messages):
        seen.append((messages[:-1] == turns, messages[-1]["content"] == prompt))
        return letters("", completion)

    grpo(*policy(), data, reward, small(tmp_path / "grpo", eval_steps=1, eval_rows=0))
    assert set(seen) == {(True, True)}
