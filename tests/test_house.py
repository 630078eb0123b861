"""The house: floors and arrows, one table of recipes, settings without PyTorch, one list of borrowed names."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from borrowed import BORROWED
from forked import Script

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tinytrainer_nb"
# From the ground up
FLOORS = [
    ("core", "settings", "hardware"),
    ("data", "runs"),
    ("model",),
    ("compute",),
    ("views",),
    ("recipes",),
    ("panels",),
    ("notebooks", "cli", "all"),
]
PLACE = re.compile(r"tinytrainer_nb((?:\.\w+)+):\w+")  # module:name, as the table's rows name things
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.name not in ("__init__.py", "_modidx.py")
}


def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str, tree: ast.Module) -> set[str]:
    "Modules of this package that a module imports, at its top or inside functions, or names in a row of a table"
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = ["tinytrainer_nb", *name.split(".")][: -node.level] if node.level else []
            found |= targets(".".join([*above, *filter(None, [node.module])]), [a.name for a in node.names])
        elif isinstance(node, ast.Import):
            found |= {t for a in node.names for t in targets(a.name, [])}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (place := PLACE.fullmatch(node.value)):
            found.add(place[1][1:])
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.removeprefix("tinytrainer_nb.") in MODULES
            and node.value.startswith("tinytrainer_nb.")
        ):
            found.add(node.value.removeprefix("tinytrainer_nb."))
    return found


def targets(module: str, names: list[str]) -> set[str]:
    "The modules that `from module import names` reaches"
    if module != "tinytrainer_nb" and not module.startswith("tinytrainer_nb."):
        return set()
    inside = module.removeprefix("tinytrainer_nb").lstrip(".")
    if inside in MODULES:
        return {inside}
    return {f"{inside}.{name}".lstrip(".") for name in names} & set(MODULES)


GRAPH = {name: imports(name, tree) for name, tree in trees().items()}


def floor(module: str) -> int:
    return next(i for i, packages in enumerate(FLOORS) if module.partition(".")[0] in packages)


def print_floors() -> None:
    "What the house looks like: `python tests/test_house.py`"
    for i, packages in reversed(list(enumerate(FLOORS))):
        for package in packages:
            rooms = [m for m in GRAPH if m.partition(".")[0] == package]
            below = sorted({t.partition(".")[0] for m in rooms for t in GRAPH[m]} - {package})
            print(f"{i + 1}  {package:10} {len(rooms):2} rooms, stands on {', '.join(below) or 'the ground'}")
            print("   ", ", ".join(m.partition(".")[2] or m for m in rooms))


def test_no_arrow_points_upwards():
    up = [f"{a} -> {b}" for a, found in GRAPH.items() for b in found if floor(b) > floor(a)]
    beside = [
        f"{a} -> {b}"
        for a, found in GRAPH.items()
        for b in found
        if floor(a) == floor(b) == 1 and a.partition(".")[0] != b.partition(".")[0]
    ]
    assert not up and not beside, f"imports that point upwards: {up}; data and runs import each other: {beside}"


def test_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for below in sorted(GRAPH[module]):
            visit(below)
        done.add(path.pop())

    for module in GRAPH:
        visit(module)
    assert done == set(MODULES)


def test_within_a_package_rooms_are_read_in_the_order_of_their_arrows():
    "What a notebook imports comes before it, so that a reader has seen it"
    number = {}
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if found := re.search(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8")):
            number[found[1]] = path.name
    later = [
        f"{number[a]} imports {number[b]}"
        for a, found in GRAPH.items()
        for b in found
        if "." in a and a.partition(".")[0] == b.partition(".")[0] and number[b] > number[a]
    ]
    assert not later, f"rooms that import a later one: {later}"


def test_the_notebooks_mirror_the_package():
    slips = []
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        found = re.search(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
        if found and found[1].replace(".", "/") != re.sub(
            r"\d+_", "", path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        ):
            slips.append(f"{path.relative_to(ROOT)} exports {found[1]}")
    assert not slips, slips


LIGHT = [
    "core",
    "settings",
    "data.arguments",
    "model.arguments",
    "compute.arguments",
    "recipes.arguments",
    "recipes.table",
    "runs.run",
    "cli",
]


def test_settings_table_and_errors_take_no_torch():
    code = f"import sys\nfor m in {LIGHT}: __import__('tinytrainer_nb.' + m)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_settings_class_is_light():
    from tinytrainer_nb import all as everything
    from tinytrainer_nb.settings import Settings

    found = {f"{c.__module__}" for c in vars(everything).values() if isinstance(c, type) and issubclass(c, Settings)}
    assert found <= {f"tinytrainer_nb.{m}" for m in LIGHT}


@pytest.mark.parametrize(
    "argv, status",
    [
        (["sft", "--help"], 0),
        (["sft", "--learning_rate", "-1"], 2),
        (["ppo", "--quantization", "int4"], 2),
        (["grpo", "--no_such_flag"], 2),
        (["resume", "nowhere"], 2),
        (["dpo", "--lora_r", "0"], 2),
        (["sft", "--base", "nowhere"], 2),
        (["sft", "--data", "nowhere.jsonl"], 2),
        (["evaluate", "--base", "nowhere"], 2),
        (["chat", "nowhere"], 2),
    ],
)
def test_help_and_refusals_come_at_once(argv, status):
    code = (
        f"import sys; from tinytrainer_nb.cli import main; status = main({argv}); print('torch' in sys.modules, status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"False {status}", done.stderr


def test_rooms_of_the_fast_path_are_small():
    large = {
        m: n
        for m, path in MODULES.items()
        if m.startswith("compute.") and (n := len(path.read_text(encoding="utf-8").splitlines())) > 300
    }
    assert not large, f"rooms of more than 300 lines: {large}"


# Borrowed names


def owner(place: str):
    "What has a borrowed name: an object, or the source of a function or module that sets it"
    if ":" not in place:
        try:
            return inspect.getsource(importlib.import_module(place))
        except ImportError:
            pass
        module, *names = place.split(".")
        for i in range(place.count("."), 0, -1):
            try:
                found = importlib.import_module(".".join(place.split(".")[:i]))
                names = place.split(".")[i:]
                break
            except ImportError:
                continue
        for name in names:
            found = getattr(found, name)
        return inspect.getsource(found)
    module, _, path = place.partition(":")
    found = importlib.import_module(module)
    for name in path.removesuffix("().").split("."):
        found = getattr(found, name)
    return found() if path.endswith("().") else found


@pytest.mark.parametrize("place, name, why", BORROWED, ids=[name for _, name, _ in BORROWED])
def test_a_borrowed_name_exists(place, name, why):
    found = owner(place)
    if isinstance(found, str):
        assert re.search(rf"\b{name}\b", found), f"{place} no longer speaks of {name}, which is wanted for: {why}"
    else:
        assert hasattr(found, name) or name in getattr(found, "__annotations__", {}), (
            f"{place} has no {name} any more, which is wanted for: {why}"
        )


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_the_list_of_borrowed_names_is_whole():
    "A private name that this package does not define, or defines over a library's, stands in the list"
    import trl
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from transformers import Trainer

    ours, used, methods = set(), set(), set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            if isinstance(node, ast.ClassDef):
                methods |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            if isinstance(node, ast.FunctionDef) and any("patch_to" in ast.unparse(d) for d in node.decorator_list):
                methods.add(node.name)
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                ours.add(node.attr)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            if isinstance(node, ast.Attribute) and private(node.attr):
                used.add(node.attr)
            if (
                isinstance(node, ast.ImportFrom)
                and not node.level
                and not (node.module or "").startswith("tinytrainer_nb")
            ):
                used |= {part for part in [*node.module.split("."), *(a.name for a in node.names)] if private(part)}
    over = {
        name
        for name in methods | used
        if private(name)
        for cls in (Trainer, BaseTuner, BaseTunerLayer, trl.DPOTrainer, trl.RewardTrainer)
        if hasattr(cls, name)
    }
    wanted, listed = (
        {name for name in used - ours if not name.startswith("_repr_")} | over,
        {name for _, name, _ in BORROWED},
    )
    assert wanted - listed == set(), f"not in the list of tests/borrowed.py: {sorted(wanted - listed)}"
    assert listed - wanted == set(), f"in the list and no longer used: {sorted(listed - wanted)}"


# A recipe of one file and one row

TOY = """
import contextlib
from dataclasses import dataclass
import torch
from transformers import Trainer
from tinytrainer_nb.core import write_json, read_json
from tinytrainer_nb.model.base import LoadRecord
from tinytrainer_nb.recipes.arguments import TrainArgs
from tinytrainer_nb.recipes.start import begin, describe, start
from tinytrainer_nb.recipes.trainer import RunTrainer
from tinytrainer_nb.data.tokens import Collator, encode_chat
from tinytrainer_nb.runs.run import Run
from tinytrainer_nb.settings import may_change, setting

@dataclass
class ToyArgs(TrainArgs):
    "Settings of a recipe that learns the same lines again and again."
    out: str = setting("runs/toy", "folder of the run")
    louder: bool = setting(False, "shout the lines")

class ToyTrainer(RunTrainer, Trainer): "Nothing of its own."

def toy(model, tokenizer, examples, args=None, live=False):
    args = args or ToyArgs()
    lines = [row["messages"] for row in examples]
    about = dict(load=describe(model, tokenizer), data=dict(rows=len(lines)), may_change=may_change(args))
    with Run.prepare(args.out, "toy", args, **about) as run:
        write_json(run.folder / "data" / "lines.json", lines)
        begin(run, model, tokenizer)
    return start(run, model, tokenizer, args, built, live, lines=lines)

def read_back(run, tokenizer, args): return dict(lines=read_json(run.folder / "data" / "lines.json"))

@contextlib.contextmanager
def built(run, model, tokenizer, args, lines):
    spoken = lambda turn: turn | dict(content=turn["content"].upper()) if args.louder else turn
    rows = [encode_chat(tokenizer, [spoken(turn) for turn in line]) for line in lines]
    dtype, collator = LoadRecord.of(run.info).torch_dtype, Collator(args.micro_batch_tokens)
    yield ToyTrainer(run, args, dtype, model=model, train_dataset=rows, data_collator=collator)
"""


BEGIN = """
import importlib, sys
sys.path.insert(0, ".")
from tinytrainer_nb import cli
from tinytrainer_nb.recipes.table import RECIPES, Recipe
RECIPES["toy"] = Recipe("toy", "A toy.", "toy_recipe", "toy_recipe:ToyArgs", "sft.jsonl")
importlib.reload(cli)
cli.main(sys.argv[1:])
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A recipe in one file, and its row"
    from tinytrainer_nb import cli
    from tinytrainer_nb.recipes.table import RECIPES, Recipe

    (tmp_path / "toy_recipe.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    row = Recipe("toy", "Learn the same lines again and again.", "toy_recipe", "toy_recipe:ToyArgs", "sft.jsonl")
    monkeypatch.setitem(RECIPES, "toy", row)
    importlib.reload(cli)  # its list of commands is made from the table
    yield row
    sys.modules.pop("toy_recipe", None)
    monkeypatch.undo()
    importlib.reload(cli)


@pytest.mark.slow
def test_a_toy_recipe_of_one_file_and_one_row(toy, tmp_path, monkeypatch, capsys):
    "It has a command with help, a form, a panel; it is killed and resumed, and repeated by its command"
    from live import adapter
    from small import small_base

    from tinytrainer_nb import cli
    from tinytrainer_nb.all import Run, as_python, load_model, settings_form
    from tinytrainer_nb.panels.run_panel import RunPanel

    monkeypatch.chdir(tmp_path)
    assert cli.main(["--help"]) == 0 and toy.help in capsys.readouterr().out
    assert cli.main(["toy", "--help"]) == 0 and "shout the lines" in capsys.readouterr().out
    form = settings_form(toy.settings_class())
    assert "louder" in form.inputs and as_python(form.value) == "ToyArgs()"
    words = (
        "toy --max_steps 12 --batch_size 4 --save_steps 2 --eval_steps 0 --sample_steps 0 --louder "
        f"--lora_r 2 --base {small_base()} --quantization none --out"
    ).split()
    assert cli.main([*words, "whole"]) == 0
    killed = Script(BEGIN, *words, "dead")
    while not (tmp_path / "dead" / "checkpoints" / "step-000002").exists():
        assert killed.process.is_alive(), killed.communicate(10)
        time.sleep(0.001)
    killed.kill()
    assert Run.open("dead").status == "interrupted"
    assert cli.main(["resume", "dead"]) == 0
    whole, dead = Run.open("whole"), Run.open("dead")
    assert dead.status == "finished" and adapter(whole) == adapter(dead)
    panel = RunPanel(whole)
    assert "toy" in panel.head.value and "finished" in panel.head.value
    panel.close()
    assert load_model("whole", verbose=False)[0].peft_config["default"].r == 2


if __name__ == "__main__":
    print_floors()
