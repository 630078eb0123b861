"""Rewards: the built-in ones against TRL's and lm-evaluation-harness's rules; one's own: what a function may return,
and how its mistakes are told."""

import datetime
import functools
import json
import random
import re
import sys
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch
from small import small_base

from tinytrainer_nb.core import TinyTrainerError, data_file, repeated_share
from tinytrainer_nb.data.formats import load_examples
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes import preference
from tinytrainer_nb.recipes.arguments import PPOArgs, RewardModelArgs
from tinytrainer_nb.recipes.evaluate import evaluate
from tinytrainer_nb.recipes.preference import encode_pairs, model_reward, reward_model
from tinytrainer_nb.recipes.rewards import (
    BUILT_IN,
    Reward,
    code_hash,
    exact_answer,
    final_answer,
    find_reward,
    flexible_answer,
    format_reward,
    hardly_differ,
    last_number,
    length_reward,
    reference_overlap,
    repetition_reward,
    reward_columns,
    same_reward,
    silent,
)
from tinytrainer_nb.recipes.rounds import reward_again
from tinytrainer_nb.runs.run import Run

PROMPTS, COMPLETIONS, ROWS = ["Who?", "Where?"], ["Nobody.", "In the park."], [{}, dict(level=2)]


def refused(f, *args) -> str:
    "The one line that a refusal says"
    with pytest.raises(TinyTrainerError) as e:
        f(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def both(f):
    return find_reward(f)(PROMPTS, COMPLETIONS, ROWS)


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        1,
        True,
        np.float32(0.5),
        np.int64(2),
        np.array(0.5),
        np.bool_(True),
        torch.tensor(0.5),
        torch.tensor(1),
        torch.tensor([0.5]),
    ],
)
def test_any_finite_number_is_taken(value):
    totals, _ = both(lambda prompt, completion, **row: value)
    assert totals == [float(value)] * 2 and type(totals[0]) is float


@pytest.mark.parametrize(
    "value",
    [
        None,
        "0.5",
        b"1",
        np.str_("1"),
        [0.5],
        float("nan"),
        float("inf"),
        torch.tensor(float("nan")),
        torch.ones(2),
        10**400,
        1j,
        {},
    ],
)
def test_anything_else_is_refused_with_what_it_was_for(value):
    said = refused(both, lambda prompt, completion, **row: value)
    assert "must be a finite number" in said and "'Who?'" in said and "'Nobody.'" in said


def test_trl_form_gets_every_column():
    seen = {}

    def f(prompts, completions, **columns):
        seen.update(columns, prompts=prompts)
        return torch.arange(2.0)

    assert both(f) == ([0.0, 1.0], {"f": [0.0, 1.0]})
    assert seen == dict(prompts=PROMPTS, level=[None, 2])


def test_trl_form_may_leave_out_the_prompts():
    def f(completions, **columns):
        return [len(c) for c in completions]

    assert both(f)[0] == [7, 12]


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], []])
def test_trl_form_must_return_one_value_a_completion(values):
    def mine(prompts, completions, **columns):
        return values

    said = refused(both, mine)
    assert f"mine returned {len(values)} values" in said and "2 completions" in said and "'Who?'" in said


@pytest.mark.parametrize("trl", [True, False])
def test_an_exception_names_reward_prompt_and_completion(trl):
    def mine(prompt, completion, **row):
        raise KeyError("level\nof the row")

    def mine_of_all(prompts, completions, **columns):
        return mine("", "")

    said = refused(both, mine_of_all if trl else mine)
    line = mine.__code__.co_firstlineno + 1
    assert (
        said.startswith(f"reward {'mine_of_all' if trl else 'mine'} (test_rewards.py, line {line}) raised KeyError")
        and "'Who?'" in said
        and "'Nobody.'" in said
    )


def test_trl_form_without_a_list_is_refused():
    def mine(prompts, completions, **columns):
        return 1.0

    assert re.match(r"reward mine( \(.*\))? raised TypeError", refused(both, mine))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    "source, said",
    [
        ("def good(prompt, completion, **row):\n    return len(completion\n", ", line 2 raised SyntaxError"),
        (
            "import math\n\nimport no_such_module_here\n",
            ", line 3 raised ModuleNotFoundError: No module named 'no_such_module_here'",
        ),
        (
            "def number(text):\n    return int(text)\n\nLIMIT = number('many')\n",
            ", line 2 raised ValueError: invalid literal",
        ),
    ],
)
def test_a_file_that_does_not_run_is_told_with_its_line(tmp_path, monkeypatch, relative, source, said):
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = "mine.py" if relative else str(tmp_path / "mine.py")
    text = refused(find_reward, f"{path}:good=0.5")
    assert f"reward {path}:good: {path}{said}" in text and "weight" not in text


def test_a_reward_of_a_file_works(tmp_path):
    (tmp_path / "mine.py").write_text("def good(prompt, completion, **row): return len(completion)\n", encoding="utf-8")
    totals, parts = find_reward(f"{tmp_path / 'mine.py'}:good=0.5,exact_answer")(
        ["Who?"], ["7"], [dict(reference_answer="7")]
    )
    assert totals == [1.5] and parts == dict(good=[1.0], exact_answer=[1.0], flexible_answer=[1.0])


@pytest.mark.parametrize("weight", ["much", "nan", "inf"])
def test_a_weight_must_be_a_number(weight):
    assert "the weight must be a number, such as exact_answer=0.5" in refused(find_reward, f"exact_answer={weight}")


def test_a_name_counts_once():
    assert "two are called exact_answer" in refused(find_reward, "exact_answer=1,exact_answer=2")


def test_a_reward_gets_the_columns_that_it_names():
    "A function of prompt and completion alone is enough; one that names a column gets that one; TRL's form likewise"
    rows = [dict(reference_answer="4", level=2)]
    two = lambda prompt, completion: len(completion)
    named = lambda prompt, completion, level, other=5: level + other
    batch = lambda completions, level: [float(x) for x in level]
    for f, value in ((two, 3), (named, 7), (batch, 2)):
        assert find_reward(f)(["a"], ["abc"], rows)[0] == [value]

    def wants(prompt, completion, difficulty):
        return 0.0

    with pytest.raises(
        TinyTrainerError,
        match="reward wants asks for difficulty, which the data has not. It has: reference_answer, level",
    ):
        find_reward(wants)(["a"], ["b"], rows)


def test_what_is_known_before_a_completion_is_checked_first():
    def one(prompt, completion, level):
        return 1.0

    def all_of_them(prompts, completions, level):
        return [1.0] * len(prompts)

    for f in (one, all_of_them):
        find_reward(f).check([dict(level=1, messages=[])])
        with pytest.raises(TinyTrainerError, match="asks for level"):
            find_reward(f).check([dict(reference_answer="1")])
    with pytest.raises(TinyTrainerError, match="needs a reference_answer in each row"):
        find_reward("exact_answer").check([dict(reference_answer="1"), dict(reference_answer=None)])


# The built-in ones


def ours(name: str) -> list[dict]:
    with open(data_file(name), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def lm_eval(text: str, pattern: str, which: int) -> str:
    """lm-evaluation-harness's GSM8K task (version 3): a regular expression, the match to take, and what its
    exact_match ignores"""
    found = [next(filter(None, m), "") if isinstance(m, tuple) else m for m in re.findall(pattern, text)] or [
        "[invalid]"
    ]
    answer = found[which].strip()
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer.lower()


STRICT, FLEXIBLE = (r"#### (\-?[0-9\.\,]+)", 0), (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)


def forms(answer: str) -> list[str]:
    "An answer in forms that models bring"
    return [
        answer,
        f"The answer is {answer}.",
        f"So she pays ${answer}.",
        f"{answer} pens, I think",
        f"#### {answer}",
        f"3 and 4 are 7\n#### {answer}.",
        f"#### ${answer}",
    ]


@pytest.mark.shared
def test_strict_and_flexible_agree_with_lm_evaluation_harness_on_gsm8k(shared):
    """Strict is asked where there is a line `#### N`: without one a text must match as a whole here, and is invalid
    there"""
    with open(shared / "data" / "gsm8k" / "train.jsonl", encoding="utf-8") as f:
        solutions = [json.loads(line)["answer"] for line in f][:1000]
    strict = flexible = 0
    for solution in solutions:
        answer = final_answer(solution)
        plain, wrong = answer.replace(",", ""), str(int(answer.replace(",", "")) + 7)
        for text in [solution, solution.replace("#### ", "It is "), *forms(answer), *forms(wrong)]:
            assert flexible_answer("", text, reference_answer=solution) == (lm_eval(text, *FLEXIBLE) == plain), text
            flexible += lm_eval(text, *FLEXIBLE) == plain
            if not re.search(r"#### -?\d", text):
                continue
            assert exact_answer("", text, reference_answer=solution) == (lm_eval(text, *STRICT) == plain), text
            strict += lm_eval(text, *STRICT) == plain
    assert (strict, flexible) == (3 * len(solutions), 9 * len(solutions))


def test_strict_and_flexible_of_our_own_solutions():
    for row in ours("heldout.jsonl"):
        text, answer = row["completion"], row["reference_answer"]
        assert (
            exact_answer("", text, reference_answer=answer)
            == flexible_answer("", text, reference_answer=answer)
            == format_reward("", text)
            == 1
        )
        said = text.replace("#### ", "That makes ") + "."
        assert (
            exact_answer("", said, reference_answer=answer),
            flexible_answer("", said, reference_answer=answer),
            format_reward("", said),
        ) == (0, 1, 0)


@pytest.mark.parametrize(
    "text, number",
    [
        ("", ""),
        ("no number", ""),
        ("3-7", "7"),
        ("a -7 b", "-7"),
        ("x=-7", "-7"),
        ("-$1,234.50.", "-1234.5"),
        ("1,250, and that is all", "1250"),
        ("(5)-3", "3"),
        ("007", "7"),
        ("3.0", "3"),
        ("7.", "7"),
        ("12 345678901234567890123", "345678901234567890123"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_a_reference_that_is_no_number_is_compared_whole():
    assert (
        flexible_answer("", "It is blue: 3.", reference_answer="blue") == 0
        and flexible_answer("", "#### blue", reference_answer="blue") == 1
        and flexible_answer("", "", reference_answer="") == 0
    )


@pytest.mark.parametrize("ngram_size", [1, 2, 3, 5])
def test_repetition_is_trls(ngram_size):
    from trl.rewards import get_repetition_penalty_reward

    r = random.Random(0)
    texts = [" ".join(r.choices("a b c d".split(), k=r.randrange(30))) for _ in range(200)] + ["A b. a B." * 3, ""]
    words = [text.lower().split() for text in texts]
    expected = get_repetition_penalty_reward(ngram_size=ngram_size, max_penalty=-1.0)(words)
    assert [repetition_reward("", text, ngram_size=ngram_size) for text in texts] == pytest.approx(expected) and [
        -repeated_share(w, ngram_size) for w in words
    ] == pytest.approx(expected)


@pytest.mark.parametrize("free, most", [(64, 128), (0, 10), (5, 6)])
def test_length_is_dapos_soft_punishment(free, most):
    from trl.rewards import get_soft_overlong_punishment

    counts = range(0, 150)
    expected = get_soft_overlong_punishment(max_completion_len=most, soft_punish_cache=most - free)(
        [[0] * n for n in counts]
    )
    assert [length_reward("", "word " * n, free_words=free, max_words=most) for n in counts] == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, good",
    [
        ("#### 7", 1),
        ("so\n\n#### -1,250.5\n", 1),
        ("#### $7", 1),
        ("####7", 1),
        ("7", 0),
        ("#### 7.", 0),
        ("#### 7 pens", 0),
        ("#### 7\nDone.", 0),
        ("is #### 7", 0),
        ("####", 0),
        ("\n", 0),
    ],
)
def test_format(text, good):
    assert format_reward("", text) == good


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_rewards_stand_under_their_names(name):
    """By name, as a function and as a function with other numbers the same part is recorded; nothing is needed to
    check one but a reference where it compares"""
    row = dict(reference_answer="7", level=2)
    for spec in (name, BUILT_IN[name], partial(BUILT_IN[name])):
        reward = find_reward(spec)
        totals, parts = reward(["q"], ["so it is\n#### 7"], [row])
        assert list(parts)[0] == name and parts[name] == totals
        reward.check([row])
    if name in ("length", "format", "repetition"):
        find_reward(name).check([{}])
    else:
        assert f"{name} needs a reference_answer in each row" in refused(find_reward(name).check, [row, dict(level=2)])
    assert -1 <= find_reward(name)(["q"], [""], [row])[0][0] <= 0


@pytest.mark.parametrize(
    "broken", [partial(length_reward, free_words="many"), partial(repetition_reward, ngram_size="three")]
)
def test_a_built_in_reward_that_fails_names_itself_prompt_and_completion(broken):
    said = refused(both, Reward(dict(mine=(broken, 1.0))))
    assert said.startswith("reward mine") and " raised TypeError" in said and "'Who?'" in said and "'Nobody.'" in said


def test_a_witness_is_recorded_and_not_rewarded():
    "exact_answer brings flexible_answer, whose weight is 0 unless one is asked for"
    row = [dict(reference_answer="7")]
    assert find_reward("exact_answer")(["q"], ["it is 7"], row) == (
        [0.0],
        dict(exact_answer=[0.0], flexible_answer=[1.0]),
    )
    assert find_reward("exact_answer,flexible_answer=0.5")(["q"], ["it is 7"], row)[0] == [0.5]
    assert "flexible_answer" not in find_reward("reference_overlap").parts and list(
        find_reward("format,exact_answer=2").parts
    ) == ["format", "exact_answer", "flexible_answer"]


def test_the_command_line_names_every_built_in_reward(capsys):
    from tinytrainer_nb.cli import main

    main(["evaluate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ", ".join(BUILT_IN) in said


def test_a_file_without_a_function_is_asked_for_one(tmp_path):
    (tmp_path / "mine.py").write_text("def short(prompt, completion): return 1.0\n")
    with pytest.raises(TinyTrainerError, match="which function of this file"):
        find_reward(str(tmp_path / "mine.py"))


def test_a_reward_that_was_nearly_named():
    with pytest.raises(TinyTrainerError, match="no such reward. Did you mean exact_answer"):
        find_reward("exakt_answer")


# What a reward sees of a row

TURNS = [dict(role="system", content="Be brief."), dict(role="user", content="Who?")]


def test_the_turns_before_a_completion_come_to_those_who_name_them():
    "In both forms; `**row` alone does not bring them; by hand, without them, the prompt is a user's turn"
    row = reward_columns(dict(messages=TURNS, prompt="x", completion="y", level=2))

    def one(prompt, completion, messages, level):
        return float(len(messages) + level)

    def batch(completions, messages, **columns):
        assert "messages" not in columns
        return [float(m[0]["content"] == "Be brief.") for m in messages]

    def rest(prompt, completion, **row):
        assert set(row) == {"level"}
        return 0.0

    for f, value in ((one, 4), (batch, 1), (rest, 0)):
        find_reward(f).check([dict(messages=TURNS, level=2)])
        assert find_reward(f)(["Who?"], ["I."], [row])[0] == [value]
    seen = []
    find_reward(lambda prompt, completion, messages: seen.append(messages) or 0.0)(["Who?"], ["I."], [{}])
    assert seen == [[dict(role="user", content="Who?")]]


OURS = dict(prompt="the data's", completion="the data's", prompts=["the data's"], completions=["the data's"])


@pytest.mark.parametrize(
    "f",
    [
        lambda prompts, completions, **columns: [
            float(p == "Who?" and c == "Nobody.") for p, c in zip(prompts, completions)
        ],
        lambda completions, prompts: [float(p == "Who?" and c == "Nobody.") for p, c in zip(prompts, completions)],
        lambda level, completions, **columns: [float(c == "Nobody.") for c in completions],
        lambda prompt, completion, **row: float(prompt == "Who?" and completion == "Nobody."),
        lambda completion, prompt: float(prompt == "Who?" and completion == "Nobody."),
        lambda completion, level: float(completion == "Nobody."),
        lambda question, text, **row: float(question == "Who?" and text == "Nobody."),
        lambda asked, said, /: float(asked == "Who?" and said == "Nobody."),
        lambda level, *, prompt, completion: float(prompt == "Who?" and completion == "Nobody."),
    ],
    ids=["TRL", "TRL turned", "TRL late", "plain", "turned", "completion", "other names", "by place", "by name"],
)
def test_no_column_takes_the_place_of_what_the_model_said(f):
    row = reward_columns(dict(OURS, messages=TURNS, asked="the data's", said="the data's", level=2))
    find_reward(f).check([dict(OURS, level=2)])
    assert find_reward(f)(["Who?"], ["Nobody."], [row])[0] == [1.0]


def test_a_column_is_no_setting_of_a_built_in_reward():
    row = dict(reference_answer="7", free_words=0, max_words=1, ngram_size=1)
    for f in (length_reward, partial(length_reward, free_words=2, max_words=4), repetition_reward):
        assert find_reward(f)(["q"], ["a b a"], [row])[0] == [f("q", "a b a")]

    def mine(prompt, completion, level=1):
        return float(level)

    assert find_reward(partial(mine, level=3))(["q"], ["a"], [dict(level=9)])[0] == [3.0]


def test_a_missing_column_is_found_before_the_run_beside_a_row_too():
    def mine(prompt, completion, level, **row):
        return 0.0

    assert "reward mine asks for level" in refused(find_reward(mine).check, [dict(reference_answer="1")])


def test_a_function_that_hides_its_parameters_is_named():
    assert "does not tell its parameters" in refused(find_reward(max).check, [{}])


ODD = dict(
    date=datetime.date(2026, 11, 3),
    time=datetime.datetime(2026, 11, 3, 4, 5, tzinfo=datetime.timezone.utc),
    price=Decimal("4.50"),
    nothing=Decimal("0E-10"),
    raw=b"caf\xc3\xa9",
    broken=b"\xff",
    level=np.int64(2),
    share=np.float32(0.5),
    missing=float("nan"),
    vector=np.arange(2),
    nested=dict(when=[datetime.time(4, 5)]),
    wait=datetime.timedelta(hours=1),
)


def test_a_column_is_what_json_holds():
    found = reward_columns(ODD)
    assert found == json.loads(json.dumps(found)) == reward_columns(found)
    assert found == dict(
        date="2026-11-03",
        time="2026-11-03T04:05:00+00:00",
        price="4.50",
        nothing="0.0000000000",
        raw="café",
        broken="\\xff",
        level=2,
        share=0.5,
        missing=None,
        vector=[0, 1],
        nested=dict(when=["04:05:00"]),
        wait="1:00:00",
    )


# Several right answers


@pytest.mark.parametrize(
    "accepted, right, wrong",
    [
        (["4", "four"], ["#### 4", "four", "4.0", "#### $4"], ["#### 5", "Four", ""]),
        (4, ["#### 4", "4.00"], ["#### 40"]),
        (4.0, ["#### 4"], ["4.01"]),
        (1e22, ["#### 10,000,000,000,000,000,000,000"], ["#### 1"]),
        ("1,000", ["#### 1000", "1000.0"], ["#### 1"]),
        ([1000, 2.5], ["#### 1,000", "2.50"], ["#### 25"]),
        (np.array([3, 4]), ["#### 3", "4"], ["#### 5"]),
        (("so it is\n#### 7", None, " "), ["7"], ["", "None"]),
        ([Decimal("4.00")], ["4"], ["5"]),
        (True, ["True"], ["1"]),
    ],
)
def test_one_of_the_right_answers_is_enough(accepted, right, wrong):
    for f in (exact_answer, flexible_answer):
        assert [f("", text, reference_answer=accepted) for text in right] == [1.0] * len(right)
        assert [f("", text, reference_answer=accepted) for text in wrong] == [0.0] * len(wrong)


def test_flexible_takes_the_last_number_against_every_number():
    assert flexible_answer("", "It is 7, I think", reference_answer=["six", "7"]) == 1
    assert flexible_answer("", "It is six", reference_answer=["six", "7"]) == 0
    assert flexible_answer("", "six", reference_answer=["six", "7"]) == 1


def test_overlap_is_that_with_the_nearest_reference():
    both = reference_overlap("", "a red ball", reference_answer=["blue", "a red ball"])
    assert both == 1 and reference_overlap("", "a ball", reference_answer=["blue", "a ball of snow"]) == pytest.approx(
        reference_overlap("", "a ball", reference_answer="a ball of snow")
    )


@pytest.mark.parametrize("name", ["exact_answer", "flexible_answer", "reference_overlap"])
@pytest.mark.parametrize("answer", [None, [], [None], ["", " "], {}, dict(text=["4"]), [["4"]], float("nan")])
def test_no_right_answer_is_named_before_the_run(name, answer):
    rows = [dict(reference_answer="4"), dict(messages=TURNS, reference_answer=answer)]
    said = refused(find_reward(name).check, rows)
    assert said.startswith("prompt 2 ('Who?'): ") and f"{name} needs a reference_answer in each row" in said
    assert "--columns prompt=your_question,reference_answer=your_answer" in said  # both columns are named


# Values


@pytest.mark.parametrize("value", [1e7, -1e12, 10**9, np.float64(1e300), torch.tensor(2e6)])
def test_an_absurdly_large_value_is_refused(value):
    said = refused(both, lambda prompt, completion, **row: value)
    assert "between -1,000,000 and 1,000,000" in said and "'Who?'" in said and "'Nobody.'" in said
    assert both(lambda prompt, completion, **row: 1e6)[0] == [1e6] * 2


def test_a_weighted_sum_has_the_same_bounds():
    f = lambda prompt, completion: 10.0
    said = refused(Reward(dict(a=(f, 1e9), b=(f, 1.0))), PROMPTS, COMPLETIONS, ROWS)
    assert "a + b, with weights," in said and "between" in said
    assert "with weights" in refused(Reward(dict(a=(f, 1e308), b=(f, -1e308))), PROMPTS, COMPLETIONS, ROWS)


@pytest.mark.parametrize("value", [torch.ones(40, 3), np.ones((40, 3)), "two\nlines"])
def test_a_value_is_told_on_one_line(value):
    assert "must be a finite number" in refused(both, lambda prompt, completion: value)


def test_a_failure_tells_the_row():
    def mine(prompt, completion, **row):
        return 1 / 0

    rows = [dict(level=7, messages=TURNS)]
    said = refused(find_reward(mine), ["Who?"], ["I."], rows)
    assert "row {'level': 7}" in said and "Be brief" not in said


@pytest.mark.parametrize("trl", [True, False])
def test_a_reward_that_exits_does_not_end_the_run_in_silence(trl):
    def mine(prompt, completion):
        raise SystemExit(0)

    def mine_of_all(prompts, completions):
        raise SystemExit(0)

    assert "raised SystemExit: 0" in refused(both, mine_of_all if trl else mine)


# Files

DATACLASS = """from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Mark:
    points: float = {points}
    notes: list[str] = field(default_factory=list)

def good(prompt, completion, **row) -> float:
    return Mark().points
"""


def written(path, source: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf8")
    return path


def test_a_file_may_hold_dataclasses_and_two_may_have_one_name(tmp_path):
    files = [written(tmp_path / name / "mine.py", DATACLASS.format(points=p)) for name, p in (("a", 1.0), ("b", 2.0))]
    found = [find_reward(f"{file}:good") for file in files]
    assert [reward(["Who?"], ["I."], [{}])[0] for reward in found] == [[1.0], [2.0]]
    assert not list(tmp_path.rglob("__pycache__"))  # nothing is left in the folders of others


@pytest.mark.parametrize("folder", ["r=1", "a,b", "a,b=2,exact_answer", "x.py:y", "length", "length,z"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_file_may_stand_anywhere(tmp_path, monkeypatch, folder, relative):
    file = written(tmp_path / folder / "mine.py", "def good(prompt, completion): return 2.0\n")
    monkeypatch.chdir(tmp_path)
    path = f"{folder}/mine.py" if relative else str(file)
    for spec, weight in ((f"{path}:good", 1.0), (f"{path}:good=0.5", 0.5)):
        assert find_reward(spec)(["Who?"], ["I."], [{}])[0] == [2.0 * weight]
    reward = find_reward(f"exact_answer=2, {path}:good=0.5 ,length")
    assert {name: weight for name, (_, weight) in reward.parts.items()} == dict(
        exact_answer=2.0, good=0.5, length=1.0, flexible_answer=0.0
    )
    assert reward.record["kind"] == "file"
    assert re.search("no file|no such reward", refused(find_reward, f"{path[:-7]}no.py:good"))
    assert f"no file {tmp_path / folder}" in refused(find_reward, f"{tmp_path / folder}/no.py:good")


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "mine.py", "def good(prompt, completion): return 1.0\n")
    assert list(find_reward("~/mine.py:good=0.5").parts) == ["good"]


def test_a_file_is_read_afresh(tmp_path):
    "Changed within a second and of the same size, which Python's own cache of files would not notice"
    file = tmp_path / "mine.py"
    for value in (1.0, 2.0):
        written(file, f"def good(prompt, completion): return {value}\n")
        assert find_reward(f"{file}:good")(["Who?"], ["I."], [{}])[0] == [value]


def test_a_file_that_exits_is_told(tmp_path):
    file = written(tmp_path / "mine.py", "import sys\n\nsys.exit()\n")
    assert "mine.py, line 3 raised SystemExit" in refused(find_reward, f"{file}:good")
    assert not any(name.startswith("mine_") and m.__file__ == str(file) for name, m in sys.modules.items())


def test_rewards_that_hardly_differ():
    assert (
        hardly_differ([1.0] * 4) and hardly_differ([0.0] * 4) and hardly_differ([5.0, 5.04]) and hardly_differ([-3.0])
    )
    assert not hardly_differ([1.0, 0.0]) and not hardly_differ([0.0, 1e-3]) and not hardly_differ([1.0, 1.02])
    assert hardly_differ([0.0, 1e-5]) and hardly_differ([-1e-6, 9e-5]) and not hardly_differ([0.0, 2e-4])
    assert hardly_differ([0.5, 0.505], 1.0) and not hardly_differ([0.5, 0.505], 0.1)


def test_groups_are_measured_by_a_size_that_no_single_group_decides():
    "The round's mean size, or less where few groups are far larger than the usual one; noise stays noise"
    assert silent([[0.0, 1.0], [-1e5, -1e5], [0.5, 0.5]]) == [False, True, True]
    assert silent([[0.0, 0.0], [0.0, 0.0], [5.0, 5.001]]) == [True, True, True]
    assert silent([[1.0, 0.0], [0.3, 0.3001], [5.0, 5.001]]) == [False, True, True]
    assert silent([[-1.0, -2.0], [-3.0, -5.0], [-1e6, -9e5]]) == [False, False, False]


# Parameters

SEEN = [dict(messages=TURNS, reference_answer="Nobody.", level=2, question="the data's")]


@pytest.mark.parametrize(
    "f",
    [
        lambda reference_answer, completion: float(reference_answer == "Nobody." and completion == "I."),
        lambda messages, completion: float(messages == TURNS and completion == "I."),
        lambda level, completion, **row: float(level == 2 and completion == "I."),
        lambda level, *, completion: float(level == 2 and completion == "I."),
        lambda level, completion, reference_answer: float(
            (level, completion, reference_answer) == (2, "I.", "Nobody.")
        ),
        lambda question, completion: float(question == "the data's"),
        lambda asked, completion: float((asked, completion) == ("Who?", "I.")),
        lambda asked, /, completion: float((asked, completion) == ("Who?", "I.")),
        lambda prompt, said: float((prompt, said) == ("Who?", "I.")),
        lambda said, prompt: float((prompt, said) == ("Who?", "I.")),
        lambda asked, said: float((asked, said) == ("Who?", "I.")),
        lambda level, weight=1.0, *, prompt, completion: float((level, prompt, completion) == (2, "Who?", "I.")),
        lambda **row: float((row["prompt"], row["completion"], row["level"]) == ("Who?", "I.", 2)),
        lambda prompt, **row: float((prompt, row["completion"], row["level"]) == ("Who?", "I.", 2)),
        lambda level, **row: float((level, row["prompt"], row["completion"]) == (2, "Who?", "I.")),
        lambda *texts, **row: float((texts, row["prompt"], row["completion"]) == ((), "Who?", "I.")),
    ],
)
def test_each_parameter_gets_what_its_name_means(f):
    find_reward(f).check(SEEN)
    assert find_reward(f)(["Who?"], ["I."], [reward_columns(SEEN[0])])[0] == [1.0]


@pytest.mark.parametrize(
    "f, said",
    [
        (lambda response, reference_answer: 0.0, "its parameter response would get the prompt"),
        (lambda text, reference_answer: 0.0, "its parameter reference_answer would get the completion"),
        (lambda text, reference_answer="": 0.0, "takes (text, reference_answer='')"),
        (lambda messages, said: 0.0, "its parameter messages would get the prompt"),
        (lambda asked, level: 0.0, "its parameter level would get the completion"),
        (lambda prompt, level: 0.0, "its parameter level would get the completion"),
        (lambda question, said: 0.0, "its parameter question would get the prompt"),  # or the data's?
        (lambda answer, completion: 0.0, "asks for answer, which the data has not"),
        (lambda target, completion: 0.0, "asks for target, which the data has not"),
        (lambda text: 0.0, "takes (text), and must take prompt and completion"),
        (lambda text, weight=0.5: 0.0, "takes (text, weight=0.5)"),
        (lambda *texts: 0.0, "takes (*texts)"),
        (lambda: 0.0, "takes ()"),
    ],
)
def test_a_parameter_of_unclear_meaning_is_refused_before_the_run(f, said):
    for call in (find_reward(f).check, lambda rows: find_reward(f)(["Who?"], ["I."], rows)):
        told = refused(call, SEEN)
        assert said in told and "reward <lambda>" in told


def test_a_column_that_some_rows_lack_is_found_before_the_run():
    "It is a column in the rows that lack it, too, and never the prompt"
    f = lambda level, completion: 1.0
    rows = [dict(level=1, messages=TURNS), dict(messages=TURNS), dict(level=3)]
    said = refused(find_reward(f).check, rows)
    assert said.startswith("prompt 2 ('Who?'): ") and "asks for level, which the data has not" in said
    assert "asks for level" in refused(find_reward(f), ["a", "b"], ["x", "y"], [dict(level=1), {}])


def hiding(f):
    def inner(*args, **kwargs):
        return f(*args, **kwargs)

    return inner


def telling(f):
    @functools.wraps(f)
    def inner(first, second, **row):
        return f(first, second, **row)

    return inner


def test_decorators():
    def plain(prompt, completion, **row):
        return float((prompt, completion, row) == ("Who?", "I.", dict(level=2)))

    def others(asked, said):
        return float((asked, said) == ("Who?", "I."))

    def batch(prompts, completions, **columns):
        return [1.0] * len(prompts)

    rows = [dict(level=2)]
    for f in (
        hiding(plain),
        functools.wraps(plain)(hiding(plain)),
        telling(others),
        functools.wraps(batch)(hiding(batch)),
    ):
        assert find_reward(f)(["Who?"], ["I."], rows)[0] == [1.0]
    for f in (hiding(others), hiding(batch)):
        assert "put @functools.wraps(f) on its inner function" in refused(find_reward(f), ["Who?"], ["I."], rows)


async def waits(prompt, completion):
    return 1.0


async def waits_for_all(prompts, completions):
    return [1.0] * len(prompts)


class Waits:
    async def __call__(self, prompt, completion):
        return 1.0


@pytest.mark.parametrize("f", [waits, waits_for_all, Waits(), partial(waits)])
def test_an_async_reward_is_refused_before_the_run(f):
    assert "is async" in refused(find_reward(f).check, SEEN)


@pytest.mark.parametrize(
    "values", [{0: 1.0, 1: 2.0}, {1.0, 2.0}, frozenset([1.0, 2.0]), {1.0: 0, 2.0: 0}.keys(), "12", b"12"]
)
def test_trl_form_must_return_values_in_an_order(values):
    assert "must return a list" in refused(both, lambda prompts, completions: values)


@pytest.mark.parametrize(
    "values", [np.ones((2, 1)), torch.ones(2, 1), torch.ones(2, 1, 1), (1.0, 1.0), {0: 1.0, 1: 1.0}.values()]
)
def test_trl_form_may_return_one_number_a_row(values):
    assert both(lambda prompts, completions: values)[0] == [1.0, 1.0]


@pytest.mark.parametrize(
    "value", [np.complex64(1), np.array(1 + 0j), torch.tensor(1 + 0j), np.array("1"), np.ma.masked]
)
def test_no_number_is_read_into_what_is_none(value):
    assert "must be a finite number" in refused(both, lambda prompt, completion: value)


def test_a_reward_changes_nothing_of_what_was_said():
    def greedy(prompts, completions, words, **columns):
        for texts in (prompts, completions, words[0]):
            texts.clear()
        return [1.0, 1.0]

    def after(prompt, completion, words, **row):
        return float(len(words))

    prompts, completions, rows = [*PROMPTS], [*COMPLETIONS], [dict(words=["a"]), dict(words=["b"])]
    totals, _ = Reward(dict(greedy=(greedy, 1.0), after=(after, 1.0)))(prompts, completions, rows)
    assert totals == [2.0, 2.0] and (prompts, completions) == (PROMPTS, COMPLETIONS) and rows[0] == dict(words=["a"])


@pytest.mark.parametrize(
    "part", [exact_answer, (exact_answer,), (exact_answer, "1"), ("length", 1.0), (exact_answer, float("nan"))]
)
def test_a_part_is_a_function_and_a_weight(part):
    assert "it must be a function and its weight, such as a=(mine, 1.0)" in refused(Reward, dict(a=part))
    assert "name a part" in refused(Reward, {})


# Modules beside a reward's file

USES = "from helpers import worth\ndef good(prompt, completion): return worth()\n"
LATE = "def good(prompt, completion):\n    import helpers\n    return helpers.worth()\n"
ALL = "def good(prompts, completions):\n    from helpers import worth\n    for c in completions: yield worth()\n"
WORTH = "from numbers_of import VALUE\ndef worth(): return VALUE\n"


def value_of(file):
    return find_reward(f"{file}:good")(["Who?"], ["I."], [{}])[0][0]


@pytest.mark.parametrize("source", [USES, LATE, ALL])
@pytest.mark.parametrize("package", ["helpers.py", "helpers/__init__.py", "helpers/worth.py"])
def test_a_file_imports_what_stands_beside_it(tmp_path, source, package):
    "Two files with helpers of the same name, changed in between; nothing is left in the interpreter or in the folder"
    before, path = dict(sys.modules), [*sys.path]
    if package == "helpers/worth.py":
        source = source.replace("helpers import worth", "helpers.worth import worth")
        source = source.replace("import helpers\n", "import helpers.worth as helpers\n")
    judges = {}
    for name, value in (("a", 1.0), ("b", 2.0)):
        written(tmp_path / name / package, WORTH)
        written(tmp_path / name / "numbers_of.py", f"VALUE = {value}\n")
        judges[value] = find_reward(f"{written(tmp_path / name / 'mine.py', source)}:good")
    for _ in range(2):
        assert all(judge(["Who?"], ["I."], [{}])[0] == [value] for value, judge in judges.items())
    written(tmp_path / "a" / "numbers_of.py", "VALUE = 3.0\n")
    assert value_of(tmp_path / "a" / "mine.py") == 3.0
    assert sys.path == path and not {"helpers", "numbers_of"} & sys.modules.keys() - before.keys()
    assert not list(tmp_path.rglob("__pycache__")) and sys.modules["json"] is json


def test_a_module_of_the_notebook_keeps_its_place(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "helpers", json)
    written(tmp_path / "helpers.py", "def worth(): return 5.0\n")
    (tmp_path / "numpy").mkdir()  # a folder of an installed module's name is not the module
    written(tmp_path / "numpy" / "notes.py", "")
    file = written(tmp_path / "mine.py", "import numpy\nnumpy.ones(1)\n" + USES)
    assert value_of(file) == 5.0 and sys.modules["helpers"] is json and sys.modules["numpy"] is np


def test_a_name_that_is_no_function_is_told(tmp_path):
    file = written(tmp_path / "mine.py", "x = 3\ndef good(prompt, completion): return 1.0\n")
    assert f"x of {file} is no function" in refused(find_reward, f"{file}:x")
    assert "Did you mean good?" in refused(find_reward, f"{file}:goood")


# The same reward


class Judge:
    def __init__(self, sign, words=("a",)):
        self.sign, self.words, self.asked = sign, list(words), []

    def helped(self):
        return self.sign

    def __call__(self, prompt, completion, **row):
        self.asked.append(prompt)
        return self.helped() * float(len(completion))

    def score(self, prompt, completion, **row):
        return self(prompt, completion)


class Stricter(Judge):
    def helped(self):
        return 2 * self.sign


def closed(sign, words=("a",)):
    words = list(words)
    return lambda prompt, completion: sign * float(len(completion)) + len(words)


def default(value):
    def mine(prompt, completion, sign=value, *, other=value):
        return sign

    return mine


def scaled(factor):
    def decorate(f):
        @functools.wraps(f)
        def inner(prompt, completion, **row):
            return factor * f(prompt, completion)

        return inner

    return decorate


def by_length(prompt, completion):
    return float(len(completion))


@pytest.mark.parametrize(
    "make",
    [
        Judge,
        lambda sign: Judge(1, ["a"] * sign),
        lambda sign: (Judge, Stricter)[sign - 1](1),
        lambda sign: Judge(sign).score,
        lambda sign: partial(Judge(sign)),
        lambda sign: partial(default(0), sign=sign),
        lambda sign: partial(default(0), sign={"a", "b", "c", sign}),
        closed,
        lambda sign: closed(1, ["a"] * sign),
        lambda sign: closed(Judge(sign)),
        default,
        lambda sign: scaled(sign)(by_length),
        lambda sign: scaled(2)(default(sign)),
        lambda sign: functools.lru_cache(default(sign)),
        lambda sign: closed(np.array([1, sign])),
        lambda sign: closed(torch.tensor([1, sign])),
        lambda sign: closed(dict(a=[sign])),
        lambda sign: closed(Decimal(sign)),
    ],
)
def test_another_value_makes_another_reward(make):
    assert code_hash(make(1)) == code_hash(make(1)) != code_hash(make(2))
    record = find_reward(make(1)).record
    same_reward(record, make(1))
    assert "has changed since" in refused(same_reward, record, make(2))
    same_reward(record, make(2), accepted=True)


def test_what_a_reward_keeps_in_memory_is_no_change():
    judge, counted = Judge(1), []

    def counts(prompt, completion):
        counted.append(completion)
        return float(len(counted))

    for f in (judge, judge.score, counts, lambda prompt, completion: judge(prompt, completion)):
        record = find_reward(f).record
        both(f)
        same_reward(record, f)
    assert judge.asked and counted
    record, judge.sign = find_reward(judge).record, -1
    assert "has changed since" in refused(same_reward, record, judge)


LIMIT, WORDS = 3, ["a"]


def helper(completion):
    return len(completion) < LIMIT


def uses_globals(prompt, completion):
    return float(helper(completion)) + len(WORDS)


def test_variables_and_helpers_count(monkeypatch):
    record = find_reward(uses_globals).record
    same_reward(record, uses_globals)
    other = dict(LIMIT=4, WORDS=["b"], helper=lambda completion: True)
    for name, value in other.items():
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], name, value)
            assert "has changed since" in refused(same_reward, record, uses_globals), name
    same_reward(record, uses_globals)


def test_a_changed_file_beside_a_reward_file_is_noticed(tmp_path):
    "A module that it imports, late or through another one, and a file that it reads when it is executed"
    reads = "from pathlib import Path\nW = float((Path(__file__).parent / 'w.txt').read_text())\n"
    for source in (USES, LATE, ALL, reads + "def good(prompt, completion): return W\n"):
        for name, text in {
            "mine.py": source,
            "helpers.py": WORTH,
            "numbers_of.py": "VALUE = 1\n",
            "w.txt": "1",
        }.items():
            written(tmp_path / name, text)
        spec = f"{tmp_path / 'mine.py'}:good"
        record = find_reward(spec).record
        written(tmp_path / "numbers_of.py", "VALUE = 1 # one\n")
        same_reward(record, spec)
        for name in ("numbers_of.py", "w.txt"):
            written(tmp_path / name, "VALUE = 2\n" if name.endswith("py") else "2")
        assert "the code of good has changed since" in refused(same_reward, record, spec)


def test_a_fingerprint_counts_if_it_is_a_text():
    class Named(Judge):
        fingerprint = "first"

    class Method(Judge):
        def fingerprint(self):
            return "x"

    assert code_hash(Named(1)) == code_hash(Named(2)) and code_hash(Method(1)) != code_hash(Method(2))


def test_a_reward_model_reads_the_text_that_it_learned_on(tmp_path, monkeypatch):
    """All turns before the answer, in the same template, with the same end: what comes through a reward is what the
    trained head says of the ids that were trained on"""
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    turns = [dict(role="system", content="Be brief."), dict(role="user", content="Who?")]
    pairs = [dict(prompt=turns, chosen=f"Tom and {n} hens.", rejected=f"{n} times nobody.") for n in range(8)]
    args = RewardModelArgs(max_steps=3, batch_size=4, eval_steps=0, save_steps=0, sample_steps=0, warmup_steps=0)
    args.out = str(tmp_path / "judge")
    run = reward_model(add_lora(model, LoraArgs(r=2)), tokenizer, pairs, args)
    judge = model_reward(run.folder)
    trained_on = encode_pairs(tokenizer, load_examples(pairs), 512)[0][0]
    scorer, _ = preference._trained_scorer(run)
    with torch.no_grad():
        want = scorer.eval().scores([trained_on["prompt_ids"] + trained_on["chosen_ids"]]).tolist()
    row = reward_columns(dict(messages=turns, level=1))
    found = find_reward(judge)(["Who?"], [pairs[0]["chosen"]], [row])[0]
    assert found == pytest.approx(want, abs=1e-5)
    alone = judge(["Who?"], [pairs[0]["chosen"]])
    assert alone != pytest.approx(want, abs=1e-5) and alone == judge([turns[1:]], [pairs[0]["chosen"]])
    assert judge(["Who?"], [""], [turns]) != alone  # an empty answer is one, too
    monkeypatch.setattr(preference, "context_length", lambda model: 64)  # as of a model with a table of positions
    assert "the reward model reads at most 64 tokens" in refused(judge, ["Who?"], ["hen " * 100])


def test_an_evaluation_names_missing_answers_before_it_generates(monkeypatch):
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    monkeypatch.setattr("tinytrainer_nb.recipes.evaluate.generate", lambda *a, **k: pytest.fail("generated"))
    data = [dict(prompt="Who?", reference_answer=["Tom"]), dict(prompt="Where?", reference_answer=[])]
    assert "prompt 2 ('Where?')" in refused(evaluate, model, tokenizer, data, "exact_answer")


@pytest.mark.parametrize("parts", [[exact_answer], (exact_answer, 1.0), exact_answer, "exact_answer", None])
def test_a_reward_is_made_of_named_parts(parts):
    assert "must be a dict of functions and weights by name" in refused(Reward, parts)


RECORDS = {
    "nothing": (None, "it is not there"),
    "no names": (dict(kind="built_in", spec="length"), "lacks names"),
    "no kind": (dict(spec="length", names=["length"]), "lacks kind"),
    "a list of code": (dict(kind="function", spec="", names=["f"], code=["f"]), "reward.code must be an object"),
    "one name": (dict(kind="function", spec="", names="f"), "reward.names must be a list"),
    "a number": (5, "reward must be an object"),
    "no text": (dict(kind="built_in", spec=5, names=["length"]), "reward.spec must be a text"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_of_no_reward_is_a_line(case):
    record, said = RECORDS[case]
    assert said in refused(same_reward, record) and said in refused(same_reward, record, "length")


def test_a_run_without_its_reward_is_not_resumed(tmp_path):
    run = Run.create(tmp_path / "run", "ppo", PPOArgs(), may_change=[])
    assert "run.json does not tell its reward" in refused(reward_again, run)
    run.set_status("stopped", 0)
    said = refused(run.resume)
    assert str(run.folder) in said and "run.json does not tell its reward" in said
