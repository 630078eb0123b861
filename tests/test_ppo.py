"""PPO against hand-worked cases and plain transcriptions of the formulas."""

from types import SimpleNamespace

import pytest
import torch
from small import small_base

from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.data.formats import load_prompts
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.layers import trainable
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes.arguments import GRPOArgs, PPOArgs, SFTArgs
from tinytrainer_nb.recipes.grpo import grpo
from tinytrainer_nb.recipes.ppo import (
    PPOTrainer,
    gae,
    ppo,
    token_rewards,
    value_loss,
    whiten,
)
from tinytrainer_nb.recipes.rounds import Round, policy_loss
from tinytrainer_nb.recipes.sft import sft


def test_gae_by_hand():
    "gamma 0.9, lambda 0.8, three tokens: delta_t = r_t + gamma v_{t+1} - v_t, A_t = delta_t + gamma lambda A_{t+1}"
    r, v = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    d2 = 3 - 1.5
    d1 = 2 + 0.9 * 1.5 - 1
    d0 = 1 + 0.9 * 1 - 0.5
    a2 = d2
    a1 = d1 + 0.72 * a2
    a0 = d0 + 0.72 * a1
    torch.testing.assert_close(gae(r, v, torch.ones(1, 3), 0.9, 0.8), torch.tensor([[a0, a1, a2]]))


def test_gae_ignores_padding():
    r, v = torch.tensor([[1.0, 2.0, 0.0, 9.0]]), torch.tensor([[0.5, 1.0, 7.0, 7.0]])
    padded = gae(r, v, torch.tensor([[1.0, 1, 0, 0]]), 0.9, 0.8)
    torch.testing.assert_close(padded[:, :2], gae(r[:, :2], v[:, :2], torch.ones(1, 2), 0.9, 0.8))
    assert not padded[:, 2:].any()


def test_whiten():
    x, mask = torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]]), torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    w = whiten(x, mask)[mask.bool()]
    torch.testing.assert_close(w, torch.tensor([-1.0, 0.0, 1.0]) / (2 / 3) ** 0.5)


@pytest.mark.parametrize(
    "ratio,advantage,loss,clipped",
    [(1.5, 1, -1.2, True), (1.5, -1, 1.5, False), (0.5, 1, -0.5, False), (0.5, -1, 0.8, True), (1.1, 2, -2.2, False)],
)
def test_clipped_policy_loss(ratio, advantage, loss, clipped):
    got, was = policy_loss(torch.tensor([ratio]).log(), torch.zeros(1), torch.tensor([float(advantage)]), 0.2)
    assert got.item() == pytest.approx(loss) and bool(was) == clipped


def test_clipped_value_loss():
    """From 0 to 1 with clip 0.2 counts as 0.2: against a return of 2 the clipped error (1.8) is the larger one;
    against 0 the plain one"""
    assert value_loss(torch.tensor([1.0]), torch.zeros(1), torch.tensor([2.0]), 0.2).item() == pytest.approx(
        0.5 * 1.8**2
    )
    assert value_loss(torch.tensor([1.0]), torch.zeros(1), torch.tensor([0.0]), 0.2).item() == pytest.approx(0.5)


def tiny_policy(seed=0, dtype="fp32", quantization="none"):
    model, tokenizer = load_model(small_base(), quantization=quantization, dtype=dtype, verbose=False)
    return add_lora(model, LoraArgs(r=4), seed=seed), tokenizer


def letters(prompt, completion, **row):
    "A reward that differs between completions"
    return len(set(completion)) / 20


def small(out, **more):
    return PPOArgs(
        **dict(
            max_steps=1,
            batch_size=4,
            num_generations=2,
            max_new_tokens=12,
            epochs=1,
            minibatches=1,
            save_steps=0,
            sample_steps=0,
            warmup_steps=0,
            out=str(out),
        )
        | more
    )


@pytest.mark.parametrize("after_sft", [False, True])
@pytest.mark.parametrize(
    "kind", [pytest.param(dict(), marks=pytest.mark.slow), dict(dtype="bf16", quantization="nf4")], ids=["fp32", "nf4"]
)
def test_first_pass_starts_at_the_reference(tmp_path, after_sft, kind):
    "Ratio 1, KL 0, nothing clipped; the reference is the policy as handed over, also when it was fine-tuned before"
    model, tokenizer = tiny_policy(**kind)
    if after_sft:
        sft(
            model,
            tokenizer,
            data_file("sft.jsonl"),
            SFTArgs(
                max_steps=3,
                batch_size=4,
                eval_steps=0,
                sample_steps=0,
                save_steps=0,
                learning_rate=1e-2,
                out=str(tmp_path / "sft"),
            ),
        )
        assert any(p.any() for n, p in trainable(model).items() if "lora_B" in n)
    run = ppo(model, tokenizer, load_prompts(data_file("rl.jsonl"))[:8], letters, small(tmp_path / "ppo"))
    event = next(e for e in run.events if e["kind"] == "metrics")
    assert event["kl"] == 0 and event["clip_fraction"] == 0
    assert event["policy_loss"] == pytest.approx(0, abs=1e-2 if kind else 1e-5)  # ratio 1 on whitened advantages
    assert "reference" not in model.peft_config  # it leaves the model in the end


def test_open_clip_is_reinforce_with_baseline(tmp_path, monkeypatch):
    """With the clip wide open and one epoch the gradient is that of -A log pi, A whitened from a transcription of
    eq. 16 on scores counted from the round's mean"""
    model, tokenizer = tiny_policy()
    with torch.no_grad():  # with a B of zeros the gradient of A would be zero, whatever the formula
        for n, p in trainable(model).items():
            if "lora_B" in n:
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    seen = {}
    gather = PPOTrainer.gather

    def keep(self, prompts, step):
        seen["batch"], figures = gather(self, prompts, step)
        seen["scores"] = [r["reward"] for r in self.round]
        return seen["batch"], figures

    def step(self, model, inputs, num_items_in_batch=None):
        loss = original(self, model, inputs, num_items_in_batch)
        seen["gradient"] = {n: p.grad.clone() for n, p in trainable(self.model).items() if p.grad is not None}
        return loss

    original = PPOTrainer.training_step
    monkeypatch.setattr(PPOTrainer, "gather", keep)
    monkeypatch.setattr(PPOTrainer, "training_step", step)
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    args = small(tmp_path / "ppo", clip=1e9, value_clip=1e9, value_coef=0.0, kl_coef=0.05)
    ppo(model, tokenizer, load_prompts(data_file("rl.jsonl"))[:8], letters, args)

    with torch.no_grad():
        for n, p in trainable(model).items():
            p.copy_(before[n])
    model.zero_grad()
    model.eval()
    batch, total, count = seen["batch"], 0.0, seen["batch"].mask.sum()
    # no discount and a value of 0 everywhere: A_t is the sum of 0.95^k r_{t+k}, and the policy is its
    # reference, so only the last token is rewarded
    advantages, mean = [], sum(seen["scores"]) / len(seen["scores"])
    for i, score in enumerate(s - mean for s in seen["scores"]):
        length = int(batch.mask[i].sum())
        advantages.append(torch.tensor([score * 0.95 ** (length - 1 - t) for t in range(length)]))
    flat = torch.cat(advantages)
    advantages = [(a - flat.mean()) / flat.std(correction=0) for a in advantages]
    for i, row in enumerate(batch.rows):  # one plain forward pass a completion
        ids, start = torch.tensor([row["prompt"] + row["completion"]]), len(row["prompt"])
        logp = torch.log_softmax(model(ids).logits[0, start - 1 : -1].float(), -1).gather(-1, ids[0, start:, None])[
            :, 0
        ]
        total = total - (advantages[i] * logp).sum() / count
    total.backward()
    for name, p in trainable(model).items():
        error = (seen["gradient"]["policy." + name] - p.grad).norm() / p.grad.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_token_rewards_and_returns():
    """Returns are advantages before whitening plus values, on scores counted from the round's mean, 1.5; the score
    stands on the last token"""
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    values = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.4, 0.5]])
    logp, ref = torch.full((2, 3), -1.0), torch.full((2, 3), -1.2)
    batch = Round([], mask, torch.tensor([1.0, 2.0]), logp, logp, ref, values)
    PPOTrainer.advantages(SimpleNamespace(settings=PPOArgs(kl_coef=0.5, lam=1.0)), batch)
    torch.testing.assert_close(
        token_rewards(torch.tensor([1.0, 2.0]), logp, ref, mask, 0.5),
        torch.tensor([[-0.1, 0.9, 0.0], [-0.1, -0.1, 1.9]]),
    )
    # Lambda 1: the sum to come
    torch.testing.assert_close(batch.returns, torch.tensor([[-0.7, -0.6, 0.0], [0.2, 0.3, 0.4]]))


def test_bandit_converges(tmp_path):
    "One token an answer, two arms: a digit is worth 1, anything else 0"
    model, tokenizer = tiny_policy()
    arm = lambda prompt, completion, **row: float(completion.strip()[:1].isdigit())
    run = ppo(
        model,
        tokenizer,
        [dict(messages=[dict(role="user", content="Say a number.")])] * 8,
        arm,
        small(
            tmp_path / "ppo",
            max_steps=25,
            batch_size=8,
            num_generations=4,
            max_new_tokens=1,
            learning_rate=3e-3,
            kl_coef=0.0,
            epochs=2,
        ),
    )
    rewards = run.history("reward")[1]
    assert sum(rewards[-5:]) / 5 > 0.9, rewards


@pytest.mark.slow
def test_price_holds_the_policy(tmp_path):
    """A large KL coefficient keeps the policy at its reference; of two seeds together, for ten rounds of one are a
    matter of luck"""

    def distances(beta, seed):
        run = ppo(
            *tiny_policy(),
            load_prompts(data_file("rl.jsonl"))[:16],
            letters,
            small(
                tmp_path / f"kl{beta}-{seed}",
                max_steps=10,
                batch_size=8,
                learning_rate=3e-3,
                kl_coef=beta,
                epochs=2,
                seed=seed,
            ),
        )
        return [abs(kl) for kl in run.history("kl")[1][-3:]]

    free, held = (distances(beta, 0) + distances(beta, 1) for beta in (0.0, 10.0))
    assert sum(held) < 0.3 * sum(free), (free, held)


def test_a_value_adapter_begins_from_the_seed(tmp_path):
    """Two runs of one process, whatever was drawn before: a run that died before its first checkpoint starts over
    with the same one"""
    found = []
    for name in "ab":
        torch.rand(len(found) + 3)
        run = ppo(
            *tiny_policy(), load_prompts(data_file("rl.jsonl"))[:8], letters, small(tmp_path / name, value_adapter=True)
        )
        found.append((run.folder / "adapter" / "value_head.safetensors").read_bytes())
    assert found[0] == found[1]


def test_settings_are_the_callers(tmp_path):
    "An adaptive price moves in the run, not in the settings that were handed over"
    args = small(tmp_path / "run", kl_target=6.0, kl_coef=0.05, max_steps=2)
    run = ppo(*tiny_policy(), load_prompts(data_file("rl.jsonl"))[:8], letters, args)
    assert args.kl_coef == 0.05 and run.settings.kl_coef != 0.05
    with pytest.raises(TinyTrainerError, match="kl_coef=0 stays 0"):
        PPOArgs(kl_target=6.0, kl_coef=0.0)


def only_differences(scores, values, kl=0.0, **settings):
    "The advantages of a round of completions of three tokens, under estimates of the value head"
    mask = torch.ones(len(scores), 3)
    logp = torch.full_like(mask, -1.0)
    batch = Round([], mask, torch.tensor(scores), logp, logp - kl, logp - kl, torch.tensor(values))
    batch.ref_logprobs = logp - kl * torch.tensor([1.0, -1.0, 0.5])
    PPOTrainer.advantages(SimpleNamespace(settings=PPOArgs(**settings)), batch)
    return batch


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.0, 0.0], [-7.0, -7.0], [1.0, 1.001], [1e6, 1e6]])
def test_a_value_head_s_error_is_no_advantage(scores, lam, gamma):
    "Where nothing differs there is nothing to learn, whatever the head says; its own targets are the mean, 0"
    guesses = [[0.3, -0.2, 0.1], [0.2, 0.4, -0.5]]
    batch = only_differences(scores, guesses, lam=lam, gamma=gamma)
    assert not batch.advantages.any()
    if lam == 1:
        torch.testing.assert_close(batch.returns, torch.zeros(2, 3), atol=1e-6, rtol=0)
    none = only_differences(scores, [[0.0] * 3] * 2, lam=lam, gamma=gamma)
    assert not none.advantages.any() and not none.returns.any()


def test_a_head_that_knows_something_is_listened_to():
    """It expects the good one to be good: at lambda 0 only the surprises count. One that expects the opposite is
    ignored, as if it said 0"""
    knows, errs = [[0.2, 0.4, 0.5], [-0.2, -0.4, -0.5]], [[-0.5] * 3, [0.5] * 3]
    wise = only_differences([1.0, 0.0], knows, lam=0.0).advantages
    torch.testing.assert_close(wise[0], -wise[1])
    assert wise[0, 0] > wise[0, 1] > wise[0, 2] == 0  # 0.2, 0.1 and 0, whitened
    foolish = only_differences([1.0, 0.0], errs).advantages
    torch.testing.assert_close(foolish, only_differences([1.0, 0.0], [[0.0] * 3] * 2).advantages)


def test_a_distance_alone_keeps_its_scale():
    """Equal rewards, and a policy that has moved: the penalty is weighed by the rewards' size, not blown up to
    variance 1"""
    zeros = [[0.0] * 3] * 2
    small, large = (only_differences([size] * 2, zeros, kl=0.01).advantages for size in (1.0, 10.0))
    assert 0 < small.abs().max() < 0.01
    torch.testing.assert_close(large, small / 10)
    for nothing in ([0.0, 0.0], [1e-6, 2e-6]):  # nothing earned: a scale of 1
        torch.testing.assert_close(only_differences(nothing, zeros, kl=0.01).advantages, small)


def same(prompt, completion):
    return 1.0


def nearly_the_same(prompt, completion):
    return 1 + 1e-3 * letters(prompt, completion)


def never(prompts, completions):
    return [0.0] * len(prompts)


def noise(prompt, completion):
    return 1e-5 * letters(prompt, completion)


@pytest.mark.parametrize(
    "recipe, reward",
    [
        ("ppo", same),
        ("ppo", nearly_the_same),
        ("ppo", never),
        ("ppo", noise),
        ("grpo", noise),
        ("ppo, value adapter", nearly_the_same),
        ("grpo", nearly_the_same),
        ("grpo, KL", same),
    ],
)
def test_rewards_that_hardly_differ_leave_the_policy_as_it_was(tmp_path, recipe, reward):
    "Bit for bit, with several updates a round: no KL, no other answers"
    model, tokenizer = tiny_policy()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    more = dict(max_steps=2, minibatches=2, learning_rate=3e-3)
    prompts = load_prompts(data_file("rl.jsonl"))[:8]
    if recipe.startswith("ppo"):
        args = small(tmp_path / "run", value_adapter="adapter" in recipe, **more)
        run = ppo(model, tokenizer, prompts, reward, args)
    else:
        args = GRPOArgs(
            batch_size=4,
            num_generations=2,
            max_new_tokens=12,
            warmup_steps=0,
            kl_coef=0.1 if "KL" in recipe else 0.0,
            out=str(tmp_path / "run"),
            **more,
        )
        run = grpo(model, tokenizer, prompts, reward, args)
    for n, p in trainable(model).items():
        assert p.equal(before[n]), n
    assert run.history("kl")[1] == [0, 0] and run.history("no_signal")[1] == [1, 1]


@pytest.mark.parametrize("recipe", [ppo, grpo])
def test_a_reward_that_differs_among_prompts_teaches_ppo_and_not_grpo(tmp_path, recipe):
    "The journal says of each what it compares, and the alarm with it"
    model, tokenizer = tiny_policy()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    prompts = [dict(prompt=f"{n} + 4?", right=n % 2) for n in range(16)]
    few = dict(
        batch_size=4, num_generations=2, max_new_tokens=4, warmup_steps=0, max_steps=5, out=str(tmp_path / "run")
    )
    args = (PPOArgs if recipe is ppo else GRPOArgs)(**few)
    run = recipe(model, tokenizer, prompts, lambda prompt, completion, right: float(right), args)
    moved = any(not p.equal(before[n]) for n, p in trainable(model).items())
    earned, found = run.history("reward")[1], run.history("no_signal")[1]
    assert any(0 < r < 1 for r in earned) and moved == (recipe is ppo)
    assert found == ([float(r in (0, 1)) for r in earned] if recipe is ppo else [1.0] * 5)
    rung = [e["name"] for e in run.events if e["kind"] == "alarm"]
    assert ("no_signal" in rung) == (recipe is grpo)


def test_a_round_without_differences_after_rounds_with_some(tmp_path):
    """The value head has learned something by then: its error is no advantage. (Without a KL penalty, which would go
    on.)"""
    rounds = []

    def at_first(prompts, completions):
        rounds.append(completions)
        return [letters("", c) if len(rounds) <= 2 else 1.0 for c in completions]

    seen = []
    original = PPOTrainer.advantages

    def keep(self, batch):
        original(self, batch)
        seen.append((batch.advantages.abs().max().item(), batch.values.abs().max().item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPOTrainer, "advantages", keep)
        model, tokenizer = tiny_policy()
        args = small(tmp_path / "run", max_steps=4, minibatches=2, learning_rate=3e-3, kl_coef=0.0)
        ppo(model, tokenizer, load_prompts(data_file("rl.jsonl"))[:8], at_first, args)
    assert seen[1][0] > 1 and seen[2][1] > 0  # the head estimates something
    assert seen[2][0] == seen[3][0] == 0


def test_an_offset_of_the_reward_changes_nothing(tmp_path):
    "Only differences teach; the same adapter comes out, but for rounding"
    found, start = [], torch.cat([p.detach().flatten().clone() for p in trainable(tiny_policy()[0]).values()])
    for offset in (0.0, 4.0):
        model, tokenizer = tiny_policy()
        args = small(tmp_path / str(offset), max_steps=2, gamma=0.9)
        reward = lambda prompt, completion: len(set(completion)) + offset
        ppo(model, tokenizer, load_prompts(data_file("rl.jsonl"))[:8], reward, args)
        found.append(torch.cat([p.detach().flatten() for p in trainable(model).values()]))
    assert (found[0] - found[1]).norm() < 1e-2 * (found[0] - start).norm()
