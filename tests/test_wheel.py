"""A built wheel carries all that the main job needs: installed read-only, in an empty folder, with a cleared
environment, offline."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which pip has put a wheel of this checkout; what it depends on comes from the environment of
    the tests"""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)], text=True, capture_output=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 15e6 and not any("tiny_run" in name for name in zipfile.ZipFile(wheel).namelist())
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-compile", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return folder / "site"


def call(installed: Path, where: Path, *command: str) -> subprocess.CompletedProcess:
    "In a cleared environment, without a home, offline by cutting the way out: a proxy that nobody answers"
    env = dict(
        PATH=os.defpath,
        PYTHONPATH=str(installed),
        PYTHONDONTWRITEBYTECODE="1",
        HTTPS_PROXY="http://127.0.0.1:9",
        HTTP_PROXY="http://127.0.0.1:9",
        NO_PROXY="127.0.0.1,localhost",
        OMP_NUM_THREADS=os.environ["OMP_NUM_THREADS"],  # two threads beside other workers took five times as long
    )
    env |= {k: os.environ[k] for k in ("SYSTEMROOT", "TEMP") if k in os.environ}  # Windows cannot do without
    return subprocess.run([sys.executable, *command], cwd=where, env=env, text=True, capture_output=True, timeout=600)


def listing(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def test_the_wheel_does_the_main_job(installed, tmp_path):
    before = listing(installed)
    where = call(installed, tmp_path, "-c", "import tinytrainer_nb; print(tinytrainer_nb.__file__)").stdout.strip()
    assert Path(where).is_relative_to(installed)
    done = call(
        installed,
        tmp_path,
        "-m",
        "tinytrainer_nb.cli",
        "run",
        "quickstart",
        "-p",
        "sft_steps",
        "3",
        "-p",
        "ppo_steps",
        "1",
        "-p",
        "eval_rows",
        "8",
        "--out",
        "first",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "first/summary.json").read_text(encoding="utf8"))["status"] == "finished"
    assert {"notebook.ipynb", "sft", "ppo", "quickstart.png"} <= {p.name for p in (tmp_path / "first").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["first"]  # nothing is left beside it
    assert listing(installed) == before  # nothing is written into the installation


def test_the_wheel_knows_its_notebooks(installed, tmp_path):
    refused = call(installed, tmp_path, "-m", "tinytrainer_nb.cli", "run", "quickstrat")
    assert (
        refused.returncode == 2 and "Did you mean quickstart?" in refused.stderr and "Traceback" not in refused.stderr
    )
