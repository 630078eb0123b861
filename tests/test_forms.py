"""Forms: every recipe's settings go into widgets and come back, as an object and as code; what is wrong or untrusted
is told and shown, never obeyed."""

import random
import re
import shlex
from dataclasses import fields, replace

import pytest

from tinytrainer_nb import cli
from tinytrainer_nb.core import TinyTrainerError, escaped, write_json
from tinytrainer_nb.model.arguments import LoraArgs, TinyLoraArgs
from tinytrainer_nb.notebooks import read_parameters
from tinytrainer_nb.panels.settings_form import (
    Form,
    earlier_runs,
    settings_form,
    version_gap,
)
from tinytrainer_nb.recipes.arguments import (
    DPOArgs,
    GRPOArgs,
    PPOArgs,
    PretrainArgs,
    RewardModelArgs,
    SFTArgs,
)
from tinytrainer_nb.recipes.reproduce import (
    as_command,
    as_parameters,
    as_python,
    not_default,
)
from tinytrainer_nb.recipes.table import RECIPES, find_recipe, run_settings
from tinytrainer_nb.runs.run import Run
from tinytrainer_nb.settings import check_value, field_type, grouped

CLASSES = [SFTArgs, PPOArgs, GRPOArgs, DPOArgs, RewardModelArgs, PretrainArgs, LoraArgs, TinyLoraArgs]
TEXTS = [
    "runs/a b",
    "it's",
    'say "x"',
    "$HOME",
    "-x",
    "--out",
    "a\\b",
    "none",
    "true",
    "1e3",
    "ä/ö",
    "#x",
    "a: b",
    "",
    "*",
    "<img src=x onerror=alert(1)>",
]
each = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def some(cls, r: random.Random):
    "Random settings that are allowed"

    def value(f):
        said = f.metadata
        low, high = said.get("ge", said.get("gt", 0)), said.get("le", said.get("lt", 5000))
        if said["choices"]:
            return r.choice(said["choices"])
        if field_type(f) is bool:
            return r.random() < 0.5
        if field_type(f) is int:
            return r.randint(int(low), int(high))
        if field_type(f) is float:
            return r.choice(
                [f.default, low + (high - low) * r.uniform(1e-9, 0.999), low + (high - low) * 10 ** r.uniform(-8, -1)]
            )
        return r.choice(TEXTS)

    while True:
        try:
            return cls(**{f.name: value(f) for f in fields(cls) if r.random() < 0.4})
        except TinyTrainerError:
            pass  # a rule between fields, or a text that one of them does not take


def filled(form: Form, name: str, value) -> None:
    "Type a value into a field, as a person would"
    entry = form.inputs[name]
    entry.value = str(value) if isinstance(entry.value, str) else value


@each
def test_a_form_says_its_settings(cls):
    r = random.Random(cls.__name__)
    form = settings_form(cls())
    assert form.value == cls() and list(form.inputs) == [f.name for f in fields(cls)]
    for _ in range(5):
        args = some(cls, r)
        assert settings_form(args).value == args
        form.fill(args)
        assert form.value == args
    names = [f.name for members in grouped(cls).values() for f in members]
    assert sorted(names) == sorted(form.inputs), "each setting stands under one heading"
    for f in fields(cls):
        assert form.inputs[f.name].description == f.name and form.inputs[f.name].tooltip == f.metadata["help"]


@each
def test_code_leads_back(cls, tmp_path):
    r = random.Random(cls.__name__)
    prefix, command = (
        ("lora_", "sft")
        if cls is LoraArgs
        else ("", next((row.name for row in RECIPES.values() if row.command and row.settings_class is cls), None))
    )
    for args in [cls(), *(some(cls, r) for _ in range(25))]:
        assert eval(as_python(args), {cls.__name__: cls}) == args
        (tmp_path / "f.yaml").write_text(as_parameters(args), encoding="utf-8")
        assert cls(**read_parameters(tmp_path / "f.yaml")) == args and read_parameters(
            tmp_path / "f.yaml"
        ) == not_default(args)
        if command is None:
            with pytest.raises(TinyTrainerError, match=f"no command takes {cls.__name__}"):
                as_command(args)
            continue
        words = shlex.split(as_command(args))
        cli.recipe_flags(RECIPES[command], parser := cli.Parser(command))
        assert words[:2] == ["tinytrainer", command] and cli.read_settings(cls, parser.parse(words[2:]), prefix) == args


def test_recipes_are_those_of_the_command_line():
    assert {name for name in RECIPES if name != "reward_model"} == {name for name in cli.COMMANDS if name in RECIPES}
    assert [row.settings_class for row in RECIPES.values()] == [
        SFTArgs,
        PPOArgs,
        GRPOArgs,
        DPOArgs,
        RewardModelArgs,
        PretrainArgs,
    ]
    with pytest.raises(TinyTrainerError, match="Known: sft"):
        find_recipe("nonsense")


def wrong_values(f):
    "Values of the widget's kind that the field does not allow"
    kind, said = field_type(f), f.metadata
    if said["choices"] or kind not in (int, float):
        return []
    return [b + d for bound, d in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)) if (b := said.get(bound)) is not None]


@each
def test_what_is_wrong_is_told_in_the_words_of_validation(cls):
    tried = 0
    for f in fields(cls):
        for value in wrong_values(f):
            value = field_type(f)(value)
            form, tried = settings_form(cls()), tried + 1
            with pytest.raises(TinyTrainerError) as by_check:
                check_value(f, value)
            form.inputs[f.name].value = value
            assert escaped(by_check.value) in form.errors[f.name].value and form.inputs[f.name].value == value, (
                "the field keeps what was typed"
            )
            with pytest.raises(TinyTrainerError, match=re.escape(str(by_check.value))):
                form.value
            if form.code:
                assert escaped(by_check.value) in form.code.value
            form.inputs[f.name].value = f.default
            assert form.errors[f.name].value == "" and form.value == cls()
    assert tried >= 3


def test_rules_between_fields_are_told_where_the_code_would_be():
    form = settings_form(SFTArgs())
    form.inputs["eval_steps"].value, form.inputs["keep_best"].value = 0, True
    assert "keep_best and patience look at evaluations" in form.code.value and "<pre" not in form.code.value
    form.inputs["eval_steps"].value = 5
    assert "eval_steps=5" in form.code.value


@pytest.mark.parametrize("cls", [c for c in CLASSES if c.presets], ids=lambda c: c.__name__)
def test_presets_fill_the_form(cls):
    assert cls.presets and all(cls(**values) != cls() for values in cls.presets.values()), (
        "a preset that changes nothing"
    )
    form = settings_form(replace(cls(), out="runs/mine", seed=5))
    for name, values in cls.presets.items():
        form.preset.value = values
        assert form.value == cls(**dict(out="runs/mine", seed=5) | values) and form.preset.label == name
    form.preset.value = {}
    assert form.value == cls(out="runs/mine", seed=5)


def test_only_a_person_changes():
    told = []
    form = settings_form(PPOArgs(), changed=lambda name, value: told.append((name, value)))
    form.fill(PPOArgs(learning_rate=1e-5, max_steps=7))
    form.preset.value = PPOArgs.presets["a first look"]
    assert told == []
    form.inputs["kl_coef"].value = -1.0
    form.inputs["max_steps"].value = 0
    assert told == []
    form.inputs["max_steps"].value = 9
    form.sliders["lam"].value = 0.5
    form.inputs["value_adapter"].value = True
    assert told == [("max_steps", 9), ("lam", 0.5), ("value_adapter", True)] and form.preset.value is None


@each
def test_a_slider_never_moves_a_field_by_itself(cls):
    r, form = random.Random(1), settings_form(cls())
    for _ in range(20):
        args = some(cls, r)
        form.fill(args)
        for name, slider in form.sliders.items():
            if slider is None:
                continue
            assert form.inputs[name].value == getattr(args, name)
            slider.value = slider.value  # the page says what it was told
            assert form.inputs[name].value == getattr(args, name)
    assert {f.name for f in fields(cls) if form.sliders[f.name]} == {
        f.name
        for f in fields(cls)
        if field_type(f) in (int, float) and ({"ge", "gt"} & set(f.metadata)) and ({"le", "lt"} & set(f.metadata))
    }


def test_a_slider_sets_what_can_be_read():
    form = settings_form(SFTArgs())
    for exponent in (-7, -4.3, -3.68, -2, 0):
        form.sliders["learning_rate"].value = 10**exponent
        value = form.inputs["learning_rate"].value
        assert (
            abs(value / 10**exponent - 1) < 0.06 and len(f"{value:e}".split("e")[0].rstrip("0").replace(".", "")) <= 2
        )
        assert form.value.learning_rate == value


def sent(form: Form) -> list:
    "What the form's widgets send to the page from now on"
    found = []

    def watch(widget):
        widget.send_state = lambda *args, **kwargs: found.append((widget, args))
        for child in getattr(widget, "children", ()):
            watch(child)

    watch(form)
    return found


def test_a_lock_costs_nothing_twice():
    form = settings_form(PPOArgs(), earlier=True)
    form.lock(open=["learning_rate"])
    free = {name for name, entry in form.inputs.items() if not entry.disabled}
    assert (
        free == {"learning_rate"}
        and not form.sliders["learning_rate"].disabled
        and form.sliders["lam"].disabled
        and form.preset.disabled
        and form.earlier.disabled
    )
    messages = sent(form)
    for _ in range(50):
        form.lock(open=["learning_rate"])
    assert messages == []
    form.unlock()
    assert messages and not any(entry.disabled for entry in form.inputs.values()) and not form.preset.disabled


def test_settings_of_earlier_runs(tmp_path):
    runs = tmp_path / "runs"
    for i in range(23):
        Run.create(runs / f"run{i}", "sft", SFTArgs(max_steps=10 + i), may_change=[])
    Run.create(runs / "other", "ppo", PPOArgs(), may_change=[])
    for broken in ("torn", "strange"):
        (runs / broken).mkdir()
    (runs / "torn" / "run.json").write_text("{", encoding="utf-8")
    (runs / "strange" / "run.json").write_text("{}", encoding="utf-8")
    found = earlier_runs(SFTArgs(out=str(runs / "mine")))
    assert [run.folder.name for run in found] == [f"run{i}" for i in range(22, 2, -1)]
    form = settings_form(SFTArgs(out=str(runs / "mine")), earlier=True)
    form.earlier.value = form.earlier.options[1][1]
    assert form.value == SFTArgs(max_steps=32, out=str(runs / "mine"))


def test_a_run_of_another_version(tmp_path):
    run = Run.create(tmp_path / "new", "grpo", GRPOArgs(max_steps=3, kl_coef=0.5), may_change=[])
    assert run_settings(run) == GRPOArgs(max_steps=3, kl_coef=0.5) and version_gap(run) == ""
    said = {k: v for k, v in run.info["settings"].items() if k != "importance_cap"} | {"<b>": 1, "report_to": "nobody"}
    write_json(run.folder / "run.json", run.info | dict(settings=said))
    assert run_settings(run).kl_coef == 0.5 and run_settings(run).report_to == "nobody", (
        "what this machine lacks is no reason not to show a run"
    )
    assert "importance_cap" in version_gap(run) and "<b>" in version_gap(run)
    form = settings_form(GRPOArgs(out=str(tmp_path / "mine")), earlier=True)
    form.earlier.value = form.earlier.options[1][1]
    assert "&lt;b&gt;" in form.trouble.value and "<b>" not in form.trouble.value and "report_to" in form.code.value
    write_json(run.folder / "run.json", run.info | dict(settings=said | dict(max_steps=-3)))
    with pytest.raises(TinyTrainerError, match="max_steps=-3 is not allowed"):
        run_settings(run)


def shown(widget) -> str:
    "All that a box of widgets shows as HTML"
    own = widget.value if type(widget).__name__ == "HTML" else ""
    return own + "".join(shown(child) for child in getattr(widget, "children", ()))


def test_text_is_shown_and_not_obeyed(tmp_path):
    evil = "<img src=x onerror=alert(1)>\x1b[2J\u202e"
    Run.create(tmp_path / "runs" / evil.replace("/", ""), "sft", SFTArgs(report_to="none"), may_change=[])
    form = settings_form(SFTArgs(out=str(tmp_path / "runs" / evil)), earlier=True)
    form.inputs["report_to"].value = evil
    pages = [shown(form), form.twin()]
    form.earlier.value = form.earlier.options[1][1]
    for name in ("as Python", "as command", "as papermill parameters"):
        form.code_as.label = name
        pages += [shown(form), form.twin()]
    assert all("&lt;img" in page for page in pages)
    assert not any(bad in page for page in pages for bad in ("<img", "\x1b", "\u202e"))
    assert (
        not any(bad in label for label, _ in form.earlier.options for bad in ("\x1b", "\u202e"))
        and not form.earlier.description_allow_html
    )


def test_help_without_a_mouse():
    form = settings_form(PPOArgs())
    assert all(line.value == "" for line in form.errors.values())
    form.explain.value = True
    assert all(escaped(f.metadata["help"]) in form.errors[f.name].value for f in fields(PPOArgs))
    form.inputs["max_steps"].value = 0
    assert "at least 1" in form.errors["max_steps"].value


def test_one_group_at_a_time():
    form = settings_form(PPOArgs())
    seen = lambda: [heading for heading, box in form.groups.items() if box.layout.display != "none"]
    assert seen() == ["The run"]
    form.switch.value = "PPO"
    assert seen() == ["PPO"]
    form.switch.value = "all"
    assert seen() == list(form.groups) and len(seen()) == 5


def test_closing_gives_everything_back():
    import ipywidgets.widgets.widget as registry

    before = set(registry._instances)
    form = settings_form(PPOArgs(), earlier=True)
    assert len(set(registry._instances) - before) > 100
    form.close()
    left = [
        w
        for i, w in registry._instances.items()
        if i not in before and not type(w).__name__.endswith(("Layout", "Style", "StyleModel", "Model"))
    ]
    assert left == []
