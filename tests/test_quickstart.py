"""The main job as it is, with what it promises."""

import pytest

from tinytrainer_nb.core import read_json
from tinytrainer_nb.notebooks import run_notebook


@pytest.mark.slow
def test_quickstart(tmp_path):
    "One seed; `nbs/benchmarks/01_quickstart_seeds.ipynb` has three"
    notebook, folder = run_notebook("quickstart", dict(seed=3), tmp_path / "quickstart")
    summary = read_json(folder / "summary.json")
    accuracy = summary["accuracy"]
    assert (
        notebook == folder / "notebook.ipynb"
        and (folder / "sft" / "run.json").exists()
        and (folder / "ppo" / "run.json").exists()
    )
    assert summary["n"] == 200 and summary["peak_memory_gb"] < 3 / 1.074  # GiB
    assert accuracy["sft"] > accuracy["base"] + 0.05 and accuracy["ppo"] > accuracy["sft"] + 0.05, accuracy
