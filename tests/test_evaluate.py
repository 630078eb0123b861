"""How sure a score is: intervals against their definitions, a transcription of the published formula, and how often
they hold the truth."""

import json
import math
import random
from types import SimpleNamespace

import pytest
from small import small_base

from tinytrainer_nb.all import (
    GRPOArgs,
    LoraArgs,
    PPOArgs,
    add_lora,
    grpo,
    load_model,
    ppo,
)
from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.recipes import evaluate as room
from tinytrainer_nb.recipes.evaluate import (
    Evaluation,
    Z,
    answer_table,
    compare,
    evaluate,
    score_table,
    wilson,
)
from tinytrainer_nb.recipes.rewards import find_reward


@pytest.fixture
def small():
    "The small base and its tokenizer"
    return load_model(small_base(), "none", "fp32", verbose=False)


def scored(rewards: list[float], task: str = "exact_answer", **kwargs) -> Evaluation:
    return Evaluation(
        task,
        sum(rewards) / len(rewards),
        len(rewards),
        [f"question {i}" for i in range(len(rewards))],
        rewards=list(rewards),
        **kwargs,
    )


@pytest.mark.parametrize("right, n", [(0, 5), (1, 5), (3, 7), (30, 60), (34, 60), (499, 500), (500, 500)])
def test_wilsons_ends_are_the_shares_that_just_fit(right, n):
    "Both ends solve |p - right / n| = z sqrt(p (1 - p) / n), but where the data leave no room"
    for p in wilson(right / n, n):
        assert p == pytest.approx(right / n) or math.isclose(
            abs(p - right / n), Z * math.sqrt(p * (1 - p) / n), rel_tol=1e-9
        )
    low, high = wilson(right / n, n)
    assert (
        0 <= low <= right / n + 1e-12
        and right / n - 1e-12 <= high <= 1
        and (low > 1e-12) == (right > 0)
        and (high < 1 - 1e-12) == (right < n)
    )


def test_wilson_as_published():
    "81 of 263 and 15 of 148, from Newcombe 1998 (Statistics in Medicine 17), method 3"
    assert [round(x, 4) for x in wilson(81 / 263, 263)] == [0.2553, 0.3662] and [
        round(x, 4) for x in wilson(15 / 148, 148)
    ] == [0.0624, 0.1605]


def bonett_price(gained: int, lost: int, n: int) -> tuple[float, float]:
    "Bonett and Price 2012, adjusted Wald interval of a difference between paired proportions"
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return up - down - half, up - down + half


@pytest.mark.parametrize(
    "both, gained, lost, neither",
    [(20, 7, 2, 31), (0, 34, 0, 26), (60, 0, 0, 0), (0, 0, 0, 10), (3, 0, 5, 2), (100, 120, 12, 268)],
)
def test_a_comparison_of_right_and_wrong(both, gained, lost, neither):
    before = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    after = [1.0] * both + [1.0] * gained + [0.0] * lost + [0.0] * neither
    found, n = compare(scored(before), scored(after)), len(before)
    assert (found.low, found.high) == pytest.approx(
        bonett_price(gained, lost, n)
    ) and found.difference == pytest.approx((gained - lost) / n)
    assert (found.n, found.better, found.worse) == (n, gained, lost) and found.low < found.difference < found.high
    back = compare(scored(after), scored(before))
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_a_comparison_of_other_rewards_is_by_the_bootstrap():
    "Against a transcription of the studentized bootstrap (Efron and Tibshirani 1993, section 12.5) with other draws"
    r = random.Random(1)
    before = [r.random() for _ in range(80)]
    after = [x + r.expovariate(5) - 0.1 for x in before]
    gains = [b - a for a, b in zip(before, after)]

    def mean_and_error(values: list[float]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))

    mean, error = mean_and_error(gains)
    drawn = [mean_and_error(r.choices(gains, k=80)) for _ in range(4000)]
    far = sorted(abs(m - mean) / e for m, e in drawn)
    half = far[int(0.95 * len(far))] * error
    found = compare(scored(before, "overlap"), scored(after, "overlap"))
    assert found.difference == pytest.approx(mean) and found.low + found.high == pytest.approx(2 * mean)
    assert found.high - mean == pytest.approx(half, rel=0.05) == pytest.approx(Z * error, rel=0.15)
    assert found.p == pytest.approx(sum(t >= abs(mean / error) for t in far) / len(far), abs=0.01)
    better = sum(g > 0 for g in gains)
    assert (found.better, found.worse) == (better, 80 - better)


def test_the_interval_of_a_mean_reward_is_the_normal_one():
    after = [0.5, 0.3, 1.0, 0.25]
    one = scored(after, "overlap")
    spread = math.sqrt(sum((r - one.score) ** 2 for r in after) / 4) / 2
    assert one.interval == pytest.approx((one.score - Z * spread, one.score + Z * spread))


@pytest.mark.parametrize("up, down", [(0.3, 0.05), (0.05, 0.05), (0.02, 0.0)])
def test_95_in_100_comparisons_hold_the_truth(up, down):
    r, n, held = random.Random(0), 60, 0
    for _ in range(1000):
        pairs = r.choices([(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)], [up, down, 1 - up - down], k=n)
        found = compare(scored([a for a, _ in pairs]), scored([b for _, b in pairs]))
        held += found.low <= up - down <= found.high
    assert 0.93 <= held / 1000


def test_pairs_say_more_than_two_scores():
    "Questions are hard or easy for both: the paired interval is narrower than what the two intervals allow"
    before, after = scored([1.0] * 250 + [0.0] * 250), scored([1.0] * 280 + [0.0] * 220)
    found = compare(before, after)
    assert found.low > 0 and before.interval[1] > after.interval[0]


@pytest.mark.parametrize(
    "other",
    [
        scored([1.0, 0.0, 1.0]),
        scored([1.0, 0.0], "length"),
        Evaluation("exact_answer", 0.5, 2, ["a", "b"], rewards=[1.0, 0.0]),
        Evaluation("loss", 0.2, 2),
    ],
)
def test_only_like_is_compared_with_like(other):
    with pytest.raises(TinyTrainerError, match="compare needs two evaluations by one reward on the same questions"):
        compare(scored([1.0, 0.0]), other)
    with pytest.raises(TinyTrainerError, match="compare needs"):
        compare(other, scored([1.0, 0.0]))


def test_strict_and_flexible_are_both_reported():
    rewards, parts = find_reward("exact_answer")(
        ["q"] * 3, ["#### 7", "so it is 7", "#### 8"], [dict(reference_answer="7")] * 3
    )
    found = Evaluation("exact_answer", sum(rewards) / 3, 3, ["q"] * 3, rewards=rewards, parts=parts)
    said = json.loads(json.dumps(found.to_dict()))
    assert said == dict(
        task="exact_answer", score=1 / 3, n=3, interval=list(wilson(1 / 3, 3)), also=dict(flexible_answer=2 / 3)
    )
    assert "exact_answer: 0.3333 over 3 rows" in repr(found) and "flexible_answer: 0.6667" in repr(found)
    table = score_table({"it": found, "loss": Evaluation("loss", 0.25, 9)})
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] == [
        ["model", "score", "95 % interval", "flexible_answer", "of"],
        ["---"] * 5,
        ["it", "33.3%", "6.1% to 79.2%", "66.7%", "3"],
        ["loss", "0.2500", "", "", "9"],
    ]


def test_a_loss_says_what_it_said():
    assert (
        Evaluation("loss", 0.25, 9).to_dict() == dict(task="loss", score=0.25, n=9)
        and repr(Evaluation("loss", 0.25, 9)) == "loss: 0.2500 over 9 rows"
    )


def test_answers_that_changed_come_first():
    before, after = (
        Evaluation(
            "exact_answer",
            0.5,
            4,
            prompts=list("abcd"),
            completions=list("wxyz"),
            references=list("1234"),
            rewards=rewards,
        )
        for rewards in ([1, 0, 1, 0], [1, 0, 0, 1])
    )
    asked = [
        line.split("|")[1].strip()
        for line in answer_table(dict(before=before, after=after), count=3, changed=True)
        ._repr_markdown_()
        .splitlines()[2:]
    ]
    assert asked == ["c", "d", "a"]


def test_only_shares_are_shown_in_percent():
    "Rewards within 0 and 1 are shares; those of a reward model, or of a part below 0, are numbers"
    table = score_table({"a": scored([0.25, 0.75]), "b": scored([1.0, 1.0])}).splitlines()
    assert "| a | 50.0% |" in table[2] and "| b | 100.0% |" in table[3]
    table = score_table({"a": scored([0.25, 0.75], "judge"), "b": scored([3.2, 3.2], "judge")}).splitlines()
    assert "| a | 0.500 |" in table[2] and "| b | 3.200 | 3.200 to 3.200 |" in table[3]
    parts = dict(exact_answer=[1.0, 1.0], length=[-0.5, 0.0])
    table = score_table({"a": scored([1.0, 1.0], parts=parts), "loss": Evaluation("loss", 0.25, 9)}).splitlines()
    assert "| a | 100.0% |" in table[2] and "| -0.250 | 2 |" in table[2] and "| loss | 0.2500 |  |  | 9 |" in table[3]


@pytest.mark.parametrize("form", ["Q: {question}\nA:", "Q: {", "Q: {0}", "Answer me.", "", 5])
def test_a_form_without_a_place_for_the_question_is_a_line(small, form):
    with pytest.raises(TinyTrainerError, match="it must be a text with {} where the question stands"):
        evaluate(*small, [dict(prompt="Who?", answer="I")], "exact_answer", prompt_format=form)


def test_braces_in_a_form_and_in_a_question_are_text(small, monkeypatch):
    asked = []
    answers = lambda model, tokenizer, texts, *a, **k: SimpleNamespace(completions=asked.extend(texts) or ["I"])
    monkeypatch.setattr(room, "generate", answers)
    evaluate(*small, [dict(prompt="Is {x} {}?", answer="I")], "exact_answer", prompt_format='{"q": {}}')
    assert asked == ['{"q": Is {x} {}?}']


@pytest.mark.parametrize("recipe, args", [(ppo, PPOArgs), (grpo, GRPOArgs)])
def test_prompts_without_room_name_the_limit_that_leaves_them_out(small, recipe, args, tmp_path):
    "Raising or lowering the other one would change nothing"
    model, tokenizer = small
    model, prompts = add_lora(model, LoraArgs(r=2)), [dict(prompt="Who is there? " * 20)] * 8
    for settings, said in (
        (dict(max_length=8), "are longer than 8 tokens, .* raise max_length, or lower batch_size\\.$"),
        (dict(max_new_tokens=1000), "are longer than 24 tokens, .* or lower batch_size or max_new_tokens\\.$"),
        (dict(max_new_tokens=4000), "max_new_tokens=4000 is not allowed: .* context of 1,024 tokens"),
    ):
        with pytest.raises(TinyTrainerError, match=said):
            recipe(model, tokenizer, prompts, "length", args(batch_size=4, out=str(tmp_path / "run"), **settings))
    assert not (tmp_path / "run").exists()


def test_few_documents_have_no_endless_interval():
    "Three of them allow none at 95 %; it was printed from -inf to inf"
    found = room.Evaluation("bits_per_byte", 2.0, 3, ["a", "b", "c"], rewards=[1.0, 2.0, 3.0], weights=[1, 1, 1])
    assert found.interval is None and "inf" not in repr(found)
    many = room.Evaluation("bits_per_byte", 2.0, 30, ["a"] * 30, rewards=[1.0, 2.0, 3.0] * 10, weights=[1] * 30)
    low, high = many.interval
    assert low < 2 < high
