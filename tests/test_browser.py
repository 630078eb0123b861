"""The live panel in a real browser: JupyterLab on this machine, chromium, and the tutorial as a person would use it.

`TINYTRAINER_SCREENSHOTS=1 pytest -m browser` also takes the picture that the README shows."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "nbs" / "tutorials" / "04_live_panel.ipynb"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-quic", "--no-first-run"]
QUIET = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}  # no pop-up over the picture

pytestmark = pytest.mark.browser


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url: str) -> bool:
    try: return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError: return False


def until(condition, what: str, seconds: float = 60):
    "The first true value of `condition()`"
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return found


def end(server: subprocess.Popen) -> None:
    "Ask the server to end, which ends its kernels; then whatever of its children is left"
    children = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    server.terminate()
    try: server.wait(20)
    except subprocess.TimeoutExpired: server.kill()
    for child in psutil.wait_procs(children, timeout=5)[1]: child.kill()


@pytest.fixture
def lab(tmp_path):
    "Address of a JupyterLab of our own, and the folder it shows"
    root, config = tmp_path / "notebooks", tmp_path / "config"
    root.mkdir(); (config / "labconfig").mkdir(parents=True)
    (config / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(QUIET), encoding="utf-8")
    env = os.environ | {f"JUPYTER_{k}_DIR": str(tmp_path / k.lower()) for k in ("CONFIG", "RUNTIME", "DATA")}
    url, log = f"http://127.0.0.1:{(port := free_port())}", tmp_path / "lab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={root}"]
    with open(log, "wb") as out: server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        until(lambda: server.poll() is not None or answers(f"{url}/api/status"), "JupyterLab answers")
        assert server.poll() is None, log.read_text(encoding="utf-8")[-2000:]
        yield url, root
    finally: end(server)


@pytest.fixture
def page(chromium):
    "A page of 1600 x 1100 in a real browser"
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser.new_page(viewport={"width": 1600, "height": 1100})
        browser.close()


class Scene:
    "What a person sees and does on the panel"
    def __init__(self, page): self.page = page

    def open(self, url: str, notebook: str) -> None:
        "Open a notebook and run all its cells"
        self.page.goto(f"{url}/lab/tree/{notebook}?reset")
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        self.page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)  # the kernel stands; before, Run would ask which one to take
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.button("Start").wait_for(timeout=120_000)

    def button(self, name: str): return self.page.locator("button.jupyter-button", has_text=re.compile(rf"^\s*{name}\s*$"))

    def fill(self, field: str, value) -> None:
        box = self.page.get_by_label(field, exact=True)
        box.fill(str(value)); box.press("Tab")

    @property
    def head(self) -> str:
        "State, step, time left, as the page shows them; empty before the start"
        line = self.page.get_by_text(re.compile(r"step \d+ of \d+")).first
        return line.inner_text() if line.count() else ""

    @property
    def step(self) -> int: return int(m[1]) if (m := re.search(r"step (\d+) of", self.head)) else 0

    @property
    def curve(self): return self.page.locator("img.widget-image")

    def wait(self, condition, what: str, seconds: float = 60):
        "`until`, with the page alive meanwhile"
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {seconds} s; the page says {self.head!r}"
            self.page.wait_for_timeout(200)

    def picture(self, name: str) -> None:
        "The window as it is, kept in nbs/images/ when pictures are asked for"
        self.button("Start").evaluate("e => e.closest('.jp-OutputArea').scrollIntoView({block: 'start'})")
        self.page.wait_for_timeout(500)
        if os.environ.get("TINYTRAINER_SCREENSHOTS") == "1": self.page.screenshot(path=ROOT / "nbs" / "images" / f"{name}.png")


def steer(scene: Scene, folder: Path, max_steps: int) -> None:
    "Start, watch, pause, continue, stop; `folder` is where the run is"
    info = lambda: json.loads((folder / "run.json").read_text(encoding="utf-8"))
    scene.fill("learning_rate", -1)
    scene.page.get_by_text("must be a number larger than 0 and at most 1").wait_for()
    scene.fill("learning_rate", 0.001)
    scene.fill("max_steps", max_steps)
    scene.button("Start").click()

    scene.curve.wait_for(timeout=120_000)
    early, step = scene.curve.screenshot(), scene.step
    scene.wait(lambda: scene.step > step + 4, "the step grows")
    scene.wait(lambda: scene.curve.screenshot() != early, "the curve grows")
    assert info()["settings"]["max_steps"] == max_steps

    scene.wait(lambda: scene.page.get_by_text("completion", exact=True).count(), "samples are shown", 120)
    scene.button("Pause").click()
    scene.wait(lambda: "paused" in scene.head, "the pause takes effect")
    still = scene.step
    scene.page.wait_for_timeout(3000)
    assert scene.step == still and info()["status"] == "paused"
    assert max(json.loads(line)["step"] for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()) == still
    scene.picture("live_panel")

    scene.button("Continue").click()
    scene.wait(lambda: scene.step > still, "it goes on")
    scene.button("Stop").click()
    scene.wait(lambda: "stopped" in scene.head, "it stops", 120)
    assert info()["status"] == "stopped" and scene.step < max_steps
    assert all(scene.button(name).is_disabled() for name in ("Pause", "Continue", "Stop"))


def test_live_panel_in_jupyterlab(lab, page):
    url, root = lab
    shutil.copy(TUTORIAL, root)
    scene = Scene(page)
    scene.open(url, TUTORIAL.name)
    steer(scene, root / "runs" / "live", max_steps=2000)
    assert (root / "runs" / "live" / "adapter" / "adapter_model.safetensors").exists()
    assert not page.locator("[data-mime-type='application/vnd.jupyter.error']").count(), "a cell shows an error"
