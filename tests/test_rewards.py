"""Rewards of one's own: what a function may return, and how its mistakes are told."""
import re

import numpy as np
import pytest
import torch

from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.rewards import find_reward

PROMPTS, COMPLETIONS, ROWS = ["Who?", "Where?"], ["Nobody.", "In the park."], [{}, dict(level=2)]


def refused(f, *args) -> str:
    "The one line that a refusal says"
    with pytest.raises(TinyTrainerError) as e: f(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def both(f): return find_reward(f)(PROMPTS, COMPLETIONS, ROWS)


@pytest.mark.parametrize("value", [0.5, 1, True, np.float32(0.5), np.int64(2), np.array(0.5), np.bool_(True), torch.tensor(0.5), torch.tensor(1), torch.tensor([0.5])])
def test_any_finite_number_is_taken(value):
    totals, _ = both(lambda prompt, completion, **row: value)
    assert totals == [float(value)] * 2 and type(totals[0]) is float


@pytest.mark.parametrize("value", [None, "0.5", b"1", np.str_("1"), [0.5], float("nan"), float("inf"), torch.tensor(float("nan")), torch.ones(2), 10 ** 400, 1j, {}])
def test_anything_else_is_refused_with_what_it_was_for(value):
    said = refused(both, lambda prompt, completion, **row: value)
    assert "must be a finite number" in said and "'Who?'" in said and "'Nobody.'" in said


def test_trl_form_gets_every_column():
    seen = {}

    def f(prompts, completions, **columns): seen.update(columns, prompts=prompts); return torch.arange(2.0)
    assert both(f) == ([0.0, 1.0], {"f": [0.0, 1.0]})
    assert seen == dict(prompts=PROMPTS, level=[None, 2])


def test_trl_form_may_leave_out_the_prompts():
    def f(completions, **columns): return [len(c) for c in completions]
    assert both(f)[0] == [7, 12]


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], []])
def test_trl_form_must_return_one_value_a_completion(values):
    def mine(prompts, completions, **columns): return values
    said = refused(both, mine)
    assert f"mine returned {len(values)} values" in said and "2 completions" in said and "'Who?'" in said


@pytest.mark.parametrize("trl", [True, False])
def test_an_exception_names_reward_prompt_and_completion(trl):
    def mine(prompt, completion, **row): raise KeyError("level\nof the row")
    def mine_of_all(prompts, completions, **columns): return mine("", "")
    said = refused(both, mine_of_all if trl else mine)
    line = mine.__code__.co_firstlineno
    assert said.startswith(f"reward {'mine_of_all' if trl else 'mine'} (test_rewards.py, line {line}) raised KeyError") and "'Who?'" in said and "'Nobody.'" in said


def test_trl_form_without_a_list_is_refused():
    def mine(prompts, completions, **columns): return 1.0
    assert re.match(r"reward mine( \(.*\))? raised TypeError", refused(both, mine))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("source, said", [
    ("def good(prompt, completion, **row):\n    return len(completion\n", ", line 2 raised SyntaxError"),
    ("import math\n\nimport no_such_module_here\n", ", line 3 raised ModuleNotFoundError: No module named 'no_such_module_here'"),
    ("def number(text):\n    return int(text)\n\nLIMIT = number('many')\n", ", line 2 raised ValueError: invalid literal"),
])
def test_a_file_that_does_not_run_is_told_with_its_line(tmp_path, monkeypatch, relative, source, said):
    (tmp_path / "mine.py").write_text(source, encoding="utf-8"); monkeypatch.chdir(tmp_path)
    path = "mine.py" if relative else str(tmp_path / "mine.py")
    text = refused(find_reward, f"{path}:good=0.5")
    assert f"reward {path}:good: {path}{said}" in text and "weight" not in text


def test_a_reward_of_a_file_works(tmp_path):
    (tmp_path / "mine.py").write_text("def good(prompt, completion, **row): return len(completion)\n", encoding="utf-8")
    totals, parts = find_reward(f"{tmp_path / 'mine.py'}:good=0.5,exact_answer")(["Who?"], ["7"], [dict(reference_answer="7")])
    assert totals == [1.5] and parts == dict(good=[1.0], exact_answer=[1.0])


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
    for f, value in ((two, 3), (named, 7), (batch, 2)): assert find_reward(f)(["a"], ["abc"], rows)[0] == [value]
    def wants(prompt, completion, difficulty): return 0.0
    with pytest.raises(TinyTrainerError, match="reward wants asks for difficulty, which the data has not. It has: reference_answer, level"): find_reward(wants)(["a"], ["b"], rows)


def test_what_is_known_before_a_completion_is_checked_first():
    def one(prompt, completion, level): return 1.0
    def all_of_them(prompts, completions, level): return [1.0] * len(prompts)
    for f in (one, all_of_them):
        find_reward(f).check([dict(level=1, messages=[])])
        with pytest.raises(TinyTrainerError, match="asks for level"): find_reward(f).check([dict(reference_answer="1")])
    with pytest.raises(TinyTrainerError, match="needs a reference_answer in each row"): find_reward("exact_answer").check([dict(reference_answer="1"), dict(reference_answer=None)])
