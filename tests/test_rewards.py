"""Rewards: the built-in ones against TRL's and lm-evaluation-harness's rules; one's own: what a function may return,
and how its mistakes are told."""

import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch

from tinytrainer_nb.core import TinyTrainerError, data_file, repeated_share
from tinytrainer_nb.recipes.rewards import (
    BUILT_IN,
    Reward,
    exact_answer,
    final_answer,
    find_reward,
    flexible_answer,
    format_reward,
    last_number,
    length_reward,
    repetition_reward,
)

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
