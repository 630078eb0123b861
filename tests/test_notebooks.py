"""Every notebook runs from top to bottom, in a folder of its own, as papermill would run it for a user."""

import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from forked import Kernel
from jupyter_client.provisioning import local_provisioner

from tools.reading import reading_order

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [
    p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in [*reading_order(), ROOT / "nbs" / "index.ipynb"]
]

# Parameters that make a tutorial short; the other notebooks run as they are.
SMALL = {
    "tutorials/01_quickstart": {"sft_steps": 6, "ppo_steps": 2, "eval_rows": 8},
    "tutorials/02_first_sft": {"max_steps": 4},
    "tutorials/03_ppo_by_hand": {"max_steps": 2},
    "tutorials/04_live_panel": {"max_steps": 20},
    "tutorials/05_grpo": {
        "sft_steps": 4,
        "max_steps": 2,
        "batch_size": 2,
        "num_generations": 4,
        "max_new_tokens": 64,
        "eval_rows": 4,
    },
    "tutorials/06_thirteen": {"max_steps": 2, "sft_steps": 2, "max_new_tokens": 48, "eval_rows": 4},
    "tutorials/07_chain_of_thought": {"sft_steps": 3, "cot_steps": 3, "eval_rows": 4},
    "tutorials/08_preferences": {"sft_steps": 12, "problems": 48, "max_steps": 2, "eval_rows": 8},
    "tutorials/09_live_rewards": {"sft_steps": 3, "max_steps": 2},
    "tutorials/10_by_hand": {"max_steps": 2},
    "tutorials/11_from_zero": {"max_steps": 8, "batch_size": 4, "max_length": 64},
    "tutorials/12_another_text": {"max_steps": 2, "batch_size": 4, "max_length": 64},
    "tutorials/13_compare": {"max_steps": 2, "eval_rows": 8},
    "tutorials/14_two_processes": {"max_steps": 2, "batch_size": 4, "max_length": 32},
    "tutorials/15_your_words": {"max_steps": 2, "batch_size": 4, "max_length": 64},
    "benchmarks/01_quickstart_seeds": {"seeds": "0"},
    "benchmarks/06_sft_speed": {"cases": "tiny:none:2", "batch_size": 4, "curve_steps": 20},
    "benchmarks/07_pretrain_speed": {"cases": "tiny:2", "batch_size": 2, "max_length": 128},
    "benchmarks/11_optimizers": {"max_steps": 10, "rates": "0.004"},
    "benchmarks/09_scaling": {"tokens": 512, "max_steps": 2},
    "benchmarks/05_panel_cost": {"max_steps": 8, "history": 2000},
    "benchmarks/04_rl_accuracy": {"sft_steps": 4, "rounds": 1, "eval_rows": 12},
}


def test_small_parameters_exist():
    unknown = [
        f"{name}: {parameter}"
        for name, small in SMALL.items()
        for parameter in set(small) - set(papermill.inspect_notebook(ROOT / "nbs" / f"{name}.ipynb"))
    ]
    assert not unknown, f"SMALL names parameters that the notebook does not have: {unknown}"


LIVE = ["tutorials/04_live_panel", "tutorials/09_live_rewards", "tutorials/10_by_hand"]
# Benchmarks start processes of their own, with other libraries in some: minutes for what tests/test_parameters.py
# looks at in a second (their parameters and cases), and test_quickstart, tutorials and the peers' own cells for what
# they train. The quickstart is executed by tests/test_wheel.py, from an installed wheel.
LONG = ["tutorials/01_quickstart", *(name for name in NOTEBOOKS if name.startswith("benchmarks/"))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in NOTEBOOKS]
)
def test_notebook(name, tmp_path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # a module notebook's last cell then exports nothing
    if sys.platform == "linux":
        monkeypatch.setattr(local_provisioner, "launch_kernel", Kernel)
    executed = tmp_path / "executed.ipynb"
    papermill.execute_notebook(
        ROOT / "nbs" / f"{name}.ipynb",
        executed,
        parameters=SMALL.get(name, {}),
        cwd=tmp_path,
        kernel_name="python3",
        execution_timeout=600,
        progress_bar=False,
    )
    outputs = [o for c in nbformat.read(executed, as_version=4).cells for o in c.get("outputs", [])]
    errors = [o.ename for o in outputs if o.output_type == "error"]  # `sys.exit(0)` in a cell passes papermill
    assert not errors, f"{name}: cells ended in errors: {errors}"
    if name in LIVE:
        assert_static(executed)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in LIVE])
def test_a_live_lesson_unchanged(name, tmp_path):
    """With its own parameters, by papermill: it trains at once, and what it leaves shows the curves and the answers
    without a widget"""
    executed = tmp_path / "executed.ipynb"
    papermill.execute_notebook(
        ROOT / "nbs" / f"{name}.ipynb",
        executed,
        cwd=tmp_path,
        kernel_name="python3",
        execution_timeout=600,
        progress_bar=False,
    )
    assert_static(executed)


def assert_static(executed: Path) -> None:
    shown = [
        o.data["text/html"]
        for c in nbformat.read(executed, as_version=4).cells
        for o in c.get("outputs", [])
        if "data" in o and "text/html" in o.data
    ]
    assert sum("<img alt=" in html and "finished" in html and "data:image/png;base64," in html for html in shown) >= 1
    assert any("latest samples" in html for html in shown)
