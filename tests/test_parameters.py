"""A notebook's parameters that are settings agree with the settings dataclass: name, type, and a default that
validates."""

import importlib
import json
from dataclasses import fields
from pathlib import Path

import pytest

from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.model.arguments import TinyLoraArgs
from tinytrainer_nb.notebooks import (
    check_parameters,
    find_notebook,
    notebook_parameters,
    read_parameters,
)
from tinytrainer_nb.recipes.arguments import DPOArgs, GRPOArgs, PPOArgs, PretrainArgs, SFTArgs
from tinytrainer_nb.settings import check_value, field_type

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")) + sorted((ROOT / "nbs" / "benchmarks").glob("*.ipynb"))
# Where one notebook drives two recipes
ALIASES = {
    "sft_steps": (SFTArgs, "max_steps"),
    "ppo_steps": (PPOArgs, "max_steps"),
    "cot_steps": (SFTArgs, "max_steps"),
    "sft_learning_rate": (SFTArgs, "learning_rate"),
    "lora_learning_rate": (SFTArgs, "learning_rate"),
    "u": (TinyLoraArgs, "u"),
    "n_tie": (TinyLoraArgs, "n_tie"),
}
# A word of the notebook's name: its recipe; else SFT
RECIPES = {
    "ppo": PPOArgs,
    "grpo": GRPOArgs,
    "thirteen": GRPOArgs,
    "preferences": DPOArgs,
    "zero": PretrainArgs,
    "optimizers": PretrainArgs,
    "another": PretrainArgs,
    "words": PretrainArgs,
    "processes": PretrainArgs,
}


def setting_of(notebook: Path, name: str):
    "The dataclass field a parameter stands for, None if it is not a setting"
    recipe, name = ALIASES.get(
        name, (next((args for word, args in RECIPES.items() if word in notebook.stem), SFTArgs), name)
    )
    return {f.name: f for f in fields(recipe)}.get(name)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_are_settings(notebook):
    parameters = notebook_parameters(notebook)
    known = {
        "base",
        "data",
        "columns",
        "problems",
        "live",
        "me",
        "eval_rows",
        "quick",
        "seeds",
        "results",
        "cases",
        "rounds",
        "turns",
        "instruction",
        "cot_data",
        "history",
        "modes",
        "peers",
        "old_cpu",
        "models",
        "tokens",
        "quantization",
        "curve_steps",
        "old_data",
        "rates",
        "task",
    }
    for name, parameter in parameters.items():
        field = setting_of(notebook, name)
        if field is None:
            assert name in known, f"{notebook.name}: parameter {name} is neither a setting nor one of {sorted(known)}"
        elif name not in known:
            assert type(parameter.default) is field_type(field), (
                f"{notebook.name}: {name} is {type(parameter.default).__name__}, the setting is "
                f"{field_type(field).__name__}"
            )
            check_value(field, parameter.default)


@pytest.fixture
def side_by_side(monkeypatch):
    "The module that the benchmark notebooks share"
    monkeypatch.syspath_prepend(ROOT / "nbs" / "benchmarks" / "peers")
    return importlib.import_module("side_by_side")


@pytest.mark.parametrize(
    "cases, turns, said",
    [
        ("tiny", 1, "FOLDER:QUANTIZATION:STEPS"),
        ("tiny:3", 1, "FOLDER:QUANTIZATION:STEPS"),
        ("tiny:nf3:3", 1, "none or nf4"),
        ("tiny:none:1", 1, "at least 2 steps"),
        ("nowhere:none:3", 1, "holds no model"),
        ("", 1, "FOLDER"),
        ("tiny:none:3", 0, "turns=0"),
    ],
)
def test_a_benchmark_refuses_wrong_cases_before_it_measures(side_by_side, cases, turns, said):
    with pytest.raises(TinyTrainerError, match=said):
        side_by_side.cases_of(cases, turns, "none", "nf4")


def test_a_benchmark_reads_its_cases(side_by_side):
    assert side_by_side.cases_of("tiny:none:3, tiny:nf4:2", 1, "none", "nf4") == [
        ("tiny", "none", 3),
        ("tiny", "nf4", 2),
    ] and side_by_side.cases_of("tiny:3", 1) == [("tiny", 3)]


def test_a_benchmark_reads_its_lists(side_by_side):
    with pytest.raises(TinyTrainerError, match="'fastest' is none of default, tuned"):
        side_by_side.listed("peers", "default,fastest", ["default", "tuned"])
    with pytest.raises(TinyTrainerError, match="modes='' is not allowed: it must name at least 1 of auto, off"):
        side_by_side.listed("modes", "", ["auto", "off"], least=1)
    assert side_by_side.listed("peers", "", ["default"]) == []


def notebook_with(tmp_path: Path, source, tags=("parameters",)) -> Path:
    "A notebook of one cell"
    file = tmp_path / "one.ipynb"
    cell = dict(cell_type="code", id="a", execution_count=None, outputs=[], metadata=dict(tags=tags), source=source)
    file.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    return file


NESTED = "[&a0 [x], " + ", ".join(f"&a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(6)) + "]"  # 9^6 lists

YAML = {
    "5: 3": "5: no such parameter",
    "null: 3": "None: no such parameter",
    "steps: 1\nsteps: 2": "steps stands twice",
    "steps: " + "[" * 3000 + "]" * 3000: "nested too deeply",
    "steps: &a [*a]": "nested too deeply",
    "steps: " + "9" * 5000: "not readable",
    "rate: 1" + "0" * 400: "rate=1",
    "steps: 1:30": "steps='1:30'",
    "steps: " + NESTED: "steps=.* is not allowed: it must be a whole number",
    "nothing: " + NESTED: "nothing: no such parameter",
}


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_what_no_parameter_can_be_is_one_line(text, tmp_path):
    file = notebook_with(tmp_path, "steps = 3 # how many\nrate = 0.5")
    (tmp_path / "values.yaml").write_text(text)
    with pytest.raises(TinyTrainerError, match=YAML[text]) as raised:
        check_parameters(file, read_parameters(tmp_path / "values.yaml"))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_parameters_are_read_as_people_write_them(tmp_path):
    file = notebook_with(tmp_path, "steps = 3\nlimit: int | None = None\nname: str = 'a'")
    (tmp_path / "values.yaml").write_text("\ufeffsteps: 010\nlimit: 12\nname: 1:30", encoding="utf-8")
    expected = dict(steps=10, limit=12, name="1:30")
    assert check_parameters(file, read_parameters(tmp_path / "values.yaml")) == expected
    assert check_parameters(file, dict(limit="1e3")) == dict(limit=1000)
    assert check_parameters(file, dict(limit="none")) == dict(limit=None)
    optional = notebook_with(tmp_path, "steps: int | None = 10\nlimit: int = 3")
    for nothing in ("none", "null", "None", None):
        assert check_parameters(optional, dict(steps=nothing)) == dict(steps=None)
        with pytest.raises(TinyTrainerError, match="limit=.* whole number"):
            check_parameters(optional, dict(limit=nothing))
    assert check_parameters(optional, dict(steps="4")) == dict(steps=4)
    file = notebook_with(tmp_path, "steps = 3\nlimit: int | None = None\nname: str = 'a'")
    for wrong in ("[1]", "x", ""):
        with pytest.raises(TinyTrainerError, match="limit=.* whole number"):
            check_parameters(file, dict(limit=wrong))


@pytest.mark.parametrize(
    "source, tags", [("a = 1", 5), (5, ["parameters"]), ("a = " + "-" * 20_000 + "1", ["parameters"])]
)
def test_an_odd_notebook_is_one_line(source, tags, tmp_path):
    with pytest.raises(TinyTrainerError, match="not readable as"):
        notebook_parameters(notebook_with(tmp_path, source, tags))


def test_only_assignments_are_parameters(tmp_path):
    source = (
        "steps = 3\nsteps *= 2\nfor i in range(2): pass\nwith open('a') as f: pass\nsizes[0] = 1\nrate: float\nx = 2"
    )
    found = notebook_parameters(notebook_with(tmp_path, source))
    assert {name: p.default for name, p in found.items()} == dict(steps=3, x=2)


def test_a_path_is_no_name_of_a_notebook_of_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my/edited/01_quickstart.ipynb", "quickstart.py", "./quickstart"):
        with pytest.raises(TinyTrainerError, match="no such notebook"):
            find_notebook(name)
    assert find_notebook("quickstart").name == find_notebook("01_quickstart.ipynb").name == "01_quickstart.ipynb"
