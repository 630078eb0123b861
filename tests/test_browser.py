"""The panels in a real browser: JupyterLab and Notebook 7 on this machine, chromium, and the lessons as a person
would use them.

`TINYTRAINER_SCREENSHOTS=1 pytest -m browser` also takes the pictures that README and notebooks show, and those of
`SCENES` at both widths and in both themes, to look at."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "nbs" / "tutorials"
PICTURES = os.environ.get("TINYTRAINER_SCREENSHOTS") == "1"
SCENES = ROOT / ".scenes"  # not in the repository
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
]
# No pop-up over the picture
QUIET = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}

pytestmark = pytest.mark.browser


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


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
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
    for child in psutil.wait_procs(children, timeout=5)[1]:
        child.kill()


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    "Address of a Jupyter server of our own, the folder it shows, its process"
    tmp_path = tmp_path_factory.mktemp("jupyter")
    root, config = tmp_path / "notebooks", tmp_path / "config"
    root.mkdir()
    (config / "labconfig").mkdir(parents=True)
    (config / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(QUIET), encoding="utf-8")
    env = os.environ | {f"JUPYTER_{k}_DIR": str(tmp_path / k.lower()) for k in ("CONFIG", "RUNTIME", "DATA")}
    url, log = f"http://127.0.0.1:{(port := free_port())}", tmp_path / "lab.log"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
        "--ServerApp.disable_check_xsrf=True",
        f"--ServerApp.root_dir={root}",
    ]
    with open(log, "wb") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        until(lambda: server.poll() is not None or answers(f"{url}/api/status"), "the server answers")
        assert server.poll() is None, log.read_text(encoding="utf-8")[-2000:]
        yield url, root, server
    finally:
        end(server)


@pytest.fixture(scope="module")
def browser(chromium):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def scene(jupyter, browser):
    "What a person sees and does on a page of 1600 x 1100; the kernels that it has started end with it"
    url, root, _ = jupyter
    page = browser.new_page(viewport={"width": 1600, "height": 1100})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    yield Scene(page, url, root, asked)
    page.close()
    for kernel in json.load(urllib.request.urlopen(f"{url}/api/kernels")):
        urllib.request.urlopen(urllib.request.Request(f"{url}/api/kernels/{kernel['id']}", method="DELETE"))
    inside = (url, url.replace("http", "ws"), "data:", "blob:")
    # The badge is a lesson's first line; nothing else is fetched from anywhere else
    outside = [a for a in asked if not a.startswith(inside) and not a.endswith("/colab-badge.svg")]
    assert not outside, outside


class Scene:
    "What a person sees and does"

    def __init__(self, page, url: str, root: Path, asked: list):
        self.page, self.url, self.root, self.asked = page, url, root, asked

    def lesson(self, name: str, folder: Path = LESSONS, **parameters) -> None:
        "Open a notebook of ours, with other parameters, and run all its cells"
        notebook = json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = []
            if "parameters" in cell["metadata"].get("tags", ()):
                cell["source"] = "".join(cell["source"]) + "".join(f"\n{k} = {v!r}" for k, v in parameters.items())
        self.run(name, notebook["cells"])

    def cells(self, name: str, *sources: str) -> None:
        "Open a notebook of these cells and run them all"
        self.run(
            name,
            [
                dict(cell_type="code", id=f"cell-{i}", metadata={}, outputs=[], execution_count=None, source=source)
                for i, source in enumerate(sources)
            ],
        )

    def run(self, name: str, cells: list, app: str = "lab/tree") -> None:
        notebook = dict(
            cells=cells,
            metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")),
            nbformat=4,
            nbformat_minor=5,
        )
        (self.root / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
        self.open(name, app)
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def open(self, name: str, app: str = "lab/tree") -> None:
        self.page.goto(f"{self.url}/{app}/{name}.ipynb{'?reset' if app == 'lab/tree' else ''}")
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        if app == "lab/tree":
            # The kernel stands; before, Run would ask which one to take
            self.page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)
        else:
            self.page.wait_for_timeout(4000)

    def button(self, name: str):
        # An icon is a letter of its own
        return self.page.locator(".tinytrainer-panel").get_by_role("button", name=re.compile(rf"^\W*{name}$")).last

    def press(self, name: str) -> None:
        "As soon as it can be pressed"
        self.wait(lambda: self.button(name).count() and self.button(name).is_enabled(), f"{name} can be pressed", 120)
        self.button(name).click()

    def fill(self, field: str, value) -> None:
        box = self.page.locator("input, textarea").and_(self.page.get_by_label(field, exact=True)).last
        box.fill(str(value), timeout=120_000)
        box.press("Tab")  # a lesson may train before it shows the form

    @property
    def head(self) -> str:
        "State, step, time left, as the page shows them; empty before the start"
        line = self.page.locator(".tinytrainer-panel").get_by_text(re.compile(r"step \d+ of \d+")).last
        return line.inner_text() if line.count() else ""

    @property
    def step(self) -> int:
        return int(m[1]) if (m := re.search(r"step (\d+) of", self.head)) else 0

    @property
    def curve(self):
        return self.page.locator(".tinytrainer-panel img[alt*=' at step ']").last

    def wait(self, condition, what: str, seconds: float = 60):
        "`until`, with the page alive meanwhile"
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                f"{what}: not within {seconds} s; the page says {self.head!r}, and {self.errors()}"
            )
            self.page.wait_for_timeout(200)

    def shows(self, text, seconds: float = 120) -> None:
        self.page.locator(".tinytrainer-panel").get_by_text(text).last.wait_for(timeout=1000 * seconds)

    def errors(self) -> list[str]:
        return self.page.locator(
            "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"
        ).all_inner_texts()

    def picture(self, name: str, keep: bool = False, at: str = ".tinytrainer-panel:not(.tinytrainer-panel *)") -> None:
        """The window as it is: in nbs/images/ if it is to be kept, and at both widths in both themes, when pictures
        are asked for"""
        if not PICTURES:
            return
        SCENES.mkdir(exist_ok=True)
        for theme in ("JupyterLab Light", "JupyterLab Dark"):
            self.theme(theme)
            for width in (1600, 700):
                self.page.set_viewport_size({"width": width, "height": 1100})
                self.page.locator(at).last.evaluate("e => e.scrollIntoView({block: 'start'})")
                self.page.wait_for_timeout(700)
                self.page.screenshot(path=SCENES / f"{name}_{width}_{theme.split()[1].lower()}.png")
                if keep and width == 1600 and "Light" in theme:
                    self.page.screenshot(path=ROOT / "nbs" / "images" / f"{name}.png")
        self.theme("JupyterLab Light")
        self.page.set_viewport_size({"width": 1600, "height": 1100})

    def theme(self, name: str) -> None:
        self.page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
        self.page.wait_for_timeout(1200)


START = """
from tinytrainer_nb.all import *
model, tokenizer = load_model("tiny", quantization="none", verbose=False)
model = add_lora(model, LoraArgs(r=4), seed=0)
"""


QUESTION = (
    "There are 96 boxes with 7 roses in each box. Zoe takes 159 roses out and sells them. How many roses are left?"
)


def info(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def starts_and_grows(scene, max_steps: int) -> None:
    "Press Start; the step and the curve go on"
    scene.fill("learning_rate", -1)
    scene.shows(re.compile("must be a number larger than 0 and at most 1"))
    scene.fill("learning_rate", 0.001)
    scene.fill("max_steps", max_steps)
    scene.button("Start").click()
    scene.curve.wait_for(timeout=120_000)
    early, step = scene.curve.get_attribute("src"), scene.step
    scene.wait(lambda: scene.step > step + 2, "the step grows", 120)
    scene.wait(lambda: scene.curve.get_attribute("src") != early, "the curve grows")


def test_start_pause_talk_change_continue_stop(scene):
    scene.lesson("04_live_panel", max_steps=2000)
    folder = scene.root / "runs" / "live"
    starts_and_grows(scene, 2000)
    scene.wait(lambda: scene.page.get_by_role("table", name="latest samples").count(), "samples are shown", 120)

    scene.press("Pause")
    scene.wait(lambda: "paused" in scene.head, "the pause takes effect")
    still = scene.step
    scene.page.wait_for_timeout(2000)
    assert (
        scene.step == still and info(folder)["status"] == "paused" and max(e["step"] for e in events(folder)) == still
    )
    scene.picture("live_panel", keep=True)

    scene.press("Chat")
    scene.fill("say", QUESTION)
    scene.press("Send")
    scene.wait(
        lambda: (
            scene.page.get_by_role("table", name="conversation").locator("tr").count() == 2
            and scene.button("Send").is_enabled()
        ),
        "both sides have answered",
        120,
    )
    before, after = (
        scene.page.get_by_role("table", name="conversation").locator("tr").last.locator("td").all_inner_texts()[-2:]
    )
    assert before.strip() and after.strip() and before != after
    scene.picture("live_chat", keep=True, at=".tinytrainer-chatpanel")

    scene.fill("learning_rate", 0.0005)
    scene.shows(re.compile(r"learning_rate 0.001 → 0.0005: took effect after step"))
    scene.press("Continue")
    scene.wait(lambda: scene.step > still, "it goes on")
    assert any(e["kind"] == "change" and e["step"] == still and e["new"] == 0.0005 for e in events(folder))

    scene.press("Save now")
    scene.shows(re.compile("save: took effect after step"))
    scene.press("Stop")
    scene.wait(lambda: "stopped" in scene.head, "it stops", 120)
    assert (
        info(folder)["status"] == "stopped"
        and scene.step < 2000
        and (folder / "adapter" / "adapter_model.safetensors").exists()
    )
    scene.wait(
        lambda: (
            scene.button("Pause").is_disabled()
            and scene.button("Stop").is_disabled()
            and scene.button("Continue").is_enabled()
        ),
        "the buttons follow the head",
    )
    assert not scene.page.locator("[data-mime-type='application/vnd.jupyter.error']").count(), "a cell shows an error"
    scene.picture("stopped")


@pytest.mark.slow
def test_an_error_is_shown(scene):
    "A reward that fails in the second round, in a run that a person has started"
    scene.cells(
        "error",
        START
        + """
calls = []
def broken(prompt, completion, **row):
    calls.append(prompt)
    if len(calls) > 8: raise ValueError("no <b>answer</b> here")
    return 1.0
launch_panel(lambda args: grpo(model, tokenizer, data_file("rl.jsonl"), broken, args, live=True),
             GRPOArgs(max_steps=5, batch_size=2, num_generations=4, max_new_tokens=8, out="runs/broken"))""",
    )
    scene.press("Start")
    scene.wait(lambda: "failed" in scene.head, "the run fails", 120)
    scene.shows(re.compile(r"broken.*no <b>answer</b> here"))
    scene.picture("error")


@pytest.mark.slow
def test_a_restarted_kernel_finds_its_run_again(scene):
    "Restarted in mid-run: the twin stays in the saved notebook, and a new panel goes on from the last checkpoint"
    scene.cells(
        "again",
        START
        + """
args = SFTArgs(max_steps=40, batch_size=4, save_steps=5, eval_steps=0, sample_steps=5, out="runs/again")
run = sft(model, tokenizer, data_file("sft.jsonl"), args, live=True)
run.panel()""",
    )
    folder = scene.root / "runs" / "again"
    scene.curve.wait_for(timeout=120_000)
    scene.wait(lambda: scene.step >= 8, "it trains", 120)
    scene.press("Pause")  # so that the restart comes in mid-run, however fast the machine is
    scene.wait(lambda: "paused" in scene.head, "the pause")
    scene.page.wait_for_timeout(1500)
    scene.page.keyboard.press("Control+s")
    scene.page.wait_for_timeout(1500)
    kernel = json.load(urllib.request.urlopen(f"{scene.url}/api/kernels"))[0]["id"]
    urllib.request.urlopen(urllib.request.Request(f"{scene.url}/api/kernels/{kernel}/restart", method="POST"))
    saved = json.loads((scene.root / "again.ipynb").read_text(encoding="utf-8"))["cells"][0]["outputs"]
    twin = "".join("".join(o["data"].get("text/html", "")) for o in saved if "data" in o)
    assert "<img alt='loss from" in twin and "paused" in twin and "latest samples" in twin

    scene.cells("found", 'from tinytrainer_nb.all import *\nRun.open("runs/again").panel()')
    # The second if the kernel had the time to save
    scene.wait(lambda: "interrupted" in scene.head or "stopped" in scene.head, "the run is found again", 120)
    assert scene.curve.count()
    scene.picture("found_again")
    scene.press("Continue")
    scene.wait(lambda: "finished" in scene.head, "it ends", 120)
    assert (
        info(folder)["status"] == "finished"
        and [e["step"] for e in events(folder) if e["kind"] == "status" and e["value"] == "running"][-1] >= 5
    )


@pytest.mark.slow
def test_two_runs_are_compared(scene):
    scene.cells(
        "compare",
        START
        + """
for rate in (1e-3, 1e-4):
    model, tokenizer = load_model("tiny", quantization="none", verbose=False)
    few = dict(max_steps=6, batch_size=4, eval_steps=0, sample_steps=0, save_steps=0)
    args = SFTArgs(learning_rate=rate, out=f"runs/rate-{rate}", **few)
    sft(add_lora(model, LoraArgs(r=4), seed=0), tokenizer, data_file("sft.jsonl"), args)
compare_panel(["runs/rate-0.001", "runs/rate-0.0001"])""",
    )
    scene.page.locator(".tinytrainer-panel img").first.wait_for(timeout=120_000)
    # The difference comes first
    assert scene.page.locator(".tinytrainer-panel table").first.inner_text().count("learning_rate") == 1
    scene.picture("compare", keep=True)


@pytest.mark.slow
def test_rollouts_of_a_live_ppo_run(scene):
    scene.lesson("09_live_rewards", sft_steps=25)
    for field, value in dict(max_steps=8, batch_size=4, max_new_tokens=48).items():
        scene.fill(field, value)
    scene.press("Start")
    scene.curve.wait_for(timeout=180_000)
    scene.press("Rollouts")
    scene.wait(
        lambda: scene.page.locator(".tinytrainer-panel table").filter(has_text="advantage").count(),
        "groups are shown",
        120,
    )
    scene.wait(lambda: "finished" in scene.head, "it ends", 180)
    scene.page.get_by_label("sort by").last.select_option("reward")
    scene.picture("live_rewards", keep=True, at=".tinytrainer-rolloutpanel")


@pytest.mark.slow
def test_thirteen_numbers_by_hand(scene):
    scene.lesson("10_by_hand", max_steps=3)
    for field, value in dict(max_steps=4, batch_size=4, num_generations=4, max_new_tokens=96).items():
        scene.fill(field, value)
    scene.press("Start")
    scene.wait(lambda: "finished" in scene.head, "it ends", 180)
    scene.press("Numbers")
    # That of the lesson's last cell
    sliders = scene.page.locator(".tinytrainer-dialpanel").last.get_by_role("slider", name=re.compile(r"v\[\d+\]"))
    scene.wait(lambda: sliders.count() == 13, "thirteen sliders with names", 60)
    scene.wait(
        lambda: not scene.page.locator(".tinytrainer-dialpanel").last.locator(".slider[disabled]").count(),
        "they can be moved",
    )
    sliders.first.focus()
    scene.page.keyboard.press("End")  # as far as it goes
    scene.wait(
        lambda: "moved to" in scene.page.locator("img[alt^='trained numbers']").last.get_attribute("alt"),
        "the bar moves",
    )
    scene.page.wait_for_timeout(1000)
    # The others stay as they were trained, however the page rounds them
    assert scene.page.locator("img[alt^='trained numbers']").last.get_attribute("alt").count("moved to") == 1
    scene.fill("say", QUESTION)
    scene.press("Send")
    scene.wait(
        lambda: (
            scene.page.get_by_role("table", name="conversation").last.locator("tr").count() == 2
            and scene.button("Send").is_enabled()
        ),
        "both sides have answered",
        120,
    )
    scene.picture("by_hand", keep=True, at=".tinytrainer-dialpanel")


@pytest.mark.slow
def test_the_first_scene_in_notebook_7(scene):
    notebook = json.loads((LESSONS / "04_live_panel.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    scene.run("seven", notebook["cells"], app="notebooks")
    starts_and_grows(scene, 500)
    scene.press("Stop")
    scene.wait(lambda: "stopped" in scene.head, "it stops", 120)


NASTY = (
    "<script>window.pwned=1</script><img src='http://127.0.0.1:9/x.png' "
    "onerror='window.pwned=2'>\x1b[31mred\x1b[0m\u202eecalper\u200bzero"
)


@pytest.mark.slow  # test_talk.py and test_hostile.py look at the same escapes without a browser
def test_what_is_said_is_text(scene):
    "In every panel and in the static twin: no script runs, nothing is fetched, what cannot be seen is written out"
    scene.cells(
        "text",
        f"nasty = {NASTY!r}"
        + START
        + """
prompts = [dict(prompt=nasty, reference_answer="1"), dict(prompt="How much is 1 + 1?", reference_answer="2")] * 6
few = dict(max_steps=1, batch_size=2, num_generations=2, max_new_tokens=8, sample_steps=1, eval_steps=0)
run = grpo(model, tokenizer, prompts, "exact_answer", GRPOArgs(out="runs/text", **few))
sample = dict(kind="sample", prompt=nasty, completion=nasty, reward=1.0, group=9, index=0, parts={nasty: 1.0})
error, alarm = dict(kind="error", message=nasty, type="ValueError"), dict(kind="alarm", name="kl", message=nasty)
for event in (sample, error, alarm): run.journal.append(step=1, **event)
panel = run.panel(); panel.unfold("Rollouts")
panel""",
        "run",
        "compare_panel(['runs/text', 'runs/text'])",
        "chat_panel(run)",
        "launch_panel(None, GRPOArgs(out='runs/' + nasty.replace('/', '')))",
    )
    scene.shows(re.compile(r"red.*\\u202eecalper\\u200bzero"))
    scene.page.wait_for_timeout(1500)
    assert scene.page.evaluate("window.pwned") is None and not [a for a in scene.asked if ":9/" in a]
    assert not scene.page.locator(".jp-OutputArea script:not([src])").filter(has_text="pwned").count()


READABLE = """() => {
  const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => { const [r, g, b] = c.map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const parse = s => (s.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a > 0.5) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const unread = 'style, script, :disabled, [disabled], .widget-readout';
  const touched = 'button, input, select, textarea, img, table, progress, [role=slider], [role=button], [tabindex]';
  const pale = [], nameless = [];
  for (const panel of document.querySelectorAll('.tinytrainer-panel')) {
    const walk = document.createTreeWalker(panel, NodeFilter.SHOW_TEXT);
    for (let n; n = walk.nextNode();) {
      const e = n.parentElement;
      if (!n.textContent.trim() || !e.offsetParent || e.closest(unread)) continue;
      const ink = luminance(parse(getComputedStyle(e).color).slice(0, 3)), paper = luminance(ground(e));
      const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
      if (contrast < 4.5) pale.push(`${n.textContent.trim().slice(0, 40)}: ${contrast.toFixed(1)}`);
    }
    for (const e of panel.querySelectorAll(touched)) {
      if (!e.offsetParent || e.closest('style') || e.type === 'hidden') continue;
      const labels = [...(e.labels || [])].map(l => l.textContent).join(' ');
      const own = e.tagName === 'BUTTON' ? e.textContent : '';
      const name = e.getAttribute('aria-label') || e.alt || labels || own || e.title;
      if (!name.trim()) nameless.push(e.outerHTML.slice(0, 120));
    }
  }
  const outputs = [...document.querySelectorAll('.jp-OutputArea-output')];
  return {pale, nameless, wide: outputs.filter(e => e.scrollWidth > e.clientWidth + 2).length};
}"""


@pytest.mark.slow
def test_readable_in_light_and_dark_and_narrow(scene):
    "Contrast of at least 4.5, a name for everything that takes a click or a key, no sideways scrolling of the page"
    scene.cells(
        "readable",
        START
        + """
args = SFTArgs(max_steps=30, batch_size=4, sample_steps=5, eval_steps=0, save_steps=0, out="runs/readable")
launcher = launch_panel(lambda args: sft(model, tokenizer, data_file("sft.jsonl"), args, live=True), args)
launcher.start().wait()
launcher""",
        "panel = launcher.run.panel(); panel.unfold('Chat')\npanel",
    )
    scene.curve.wait_for(timeout=120_000)
    scene.page.wait_for_timeout(2000)
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        scene.theme(theme)
        for width in (1600, 700):
            scene.page.set_viewport_size({"width": width, "height": 1100})
            scene.page.wait_for_timeout(800)
            found = scene.page.evaluate(READABLE)
            assert not found["nameless"], (theme, width, found["nameless"])
            assert not found["pale"], (theme, width, found["pale"])
            assert not found["wide"], (theme, width)


@pytest.mark.skipif(not PICTURES, reason="measures: TINYTRAINER_SCREENSHOTS=1 on a quiet machine")
def test_what_a_panel_costs(scene, jupyter):
    "The benchmark with its panel open in a page, and what the server spends meanwhile; kept as its results"
    server, folder, benchmarks = (
        psutil.Process(jupyter[2].pid),
        scene.root / "runs" / "panel_cost",
        ROOT / "nbs" / "benchmarks",
    )
    spent = lambda: sum(server.cpu_times()[:2])
    scene.lesson("05_panel_cost", benchmarks, max_steps=100)
    scene.wait(lambda: (folder / "run.json").exists(), "it starts", 120)
    before = spent()
    scene.wait(lambda: (folder / "summary.json").exists(), "it ends", 300)
    passed = spent() - before
    scene.wait(lambda: (folder / "panel_cost.json").exists(), "all is measured", 120)
    measured = json.loads((folder / "panel_cost.json").read_text(encoding="utf-8"))
    measured |= dict(
        server=round(passed, 3),
        share_with_server=round((sum(measured["threads"].values()) + passed) / measured["training"], 4),
    )
    (benchmarks / "results" / "panel_cost.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


HOSTILE = {  # what a stranger's run says in each place that a page shows
    "recipe": "sft" + NASTY,
    "step": dict(step=NASTY),
    "max_steps": f"'{NASTY}",
    "sample": dict(kind="sample", prompt="<svg onload='window.pwned=3'>" + NASTY, completion=NASTY, reward=1.0),
    "alarm": dict(kind="alarm", name=NASTY, message=f"$\\frac{{{NASTY}$", value=1.0, limit=1.0),
    "figure": {"loss": 1.0, f"reward/{NASTY}": 1.0, "reward": 1.0},
    "change": dict(kind="change", setting=f"' onmouseover='window.pwned=4' x='{NASTY}", old=1.0, new=2.0, asked=1.5e9),
    "error": dict(
        kind="error", message=f"</span><style>*{{background:url(http://127.0.0.1:9/)}}</style>{NASTY}", type="x"
    ),
    "summary": {NASTY: NASTY, "steps": 1},
    "learning_rate": "<a href='javascript:window.pwned=5' autofocus onfocus='window.pwned=5'>" + NASTY,
}


def hostile_run(folder: Path, what: str, said) -> None:
    "A folder as a stranger would make it by hand"
    info = dict(
        recipe="sft", status="stopped", settings=dict(max_steps=3), process=dict(pid=1, started=1.0), may_change=[]
    )
    event = dict(time=1.5e9, step=1, kind="metrics", loss=1.0, learning_rate=1e-4)
    if what == "recipe":
        info["recipe"] = said
    if what in ("max_steps", "learning_rate"):
        info["settings"][what] = said
    lines = [event, event | said] if isinstance(said, dict) and what != "summary" else [event]
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if what == "summary":
        (folder / "summary.json").write_text(json.dumps(said), encoding="utf-8")


@pytest.mark.slow  # test_hostile.py looks at the same escapes without a browser
def test_strangers_runs_run_no_script(scene):
    "Ten folders, each shown in every way: as a value, by its panel, its rollouts, laid over another, as Markdown"
    for i, (what, said) in enumerate(HOSTILE.items()):
        hostile_run(scene.root / "strange" / f"{i} {what}<img src=x onerror=window.pwned=6>", what, said)
    hostile_run(scene.root / "good", "good", None)
    scene.cells(
        "strange",
        """
from pathlib import Path
from IPython.display import HTML, Markdown, display
from tinytrainer_nb.all import *
from tinytrainer_nb.core import inert
from tinytrainer_nb.panels.rollouts import rollout_panel
from tinytrainer_nb.panels.widgets import complaint
for folder in sorted(Path("strange").iterdir()):
    for show in (Run.open, run_panel, rollout_panel, lambda folder: compare_panel([folder, "good"])):
        try: display(show(folder))
        except TinyTrainerError as e: display(HTML(complaint(e)), Markdown(inert(e)))
    display(Markdown(f"| {inert(folder)} |\\n| --- |\\n| {inert((folder / 'events.jsonl').read_text())} |"))
    display(SFTArgs(out=str(folder)))
""",
        "print('all' + ' shown')",
    )
    scene.wait(lambda: scene.page.get_by_text("all shown", exact=True).count(), "all is shown", 180)
    assert not scene.errors(), scene.errors()
    scene.page.wait_for_timeout(1500)
    for link in scene.page.locator(".jp-OutputArea-output a").all():
        assert not (link.get_attribute("href") or "").startswith("javascript"), link.inner_html()
    assert scene.page.evaluate("window.pwned") is None and not [a for a in scene.asked if ":9/" in a]
    assert not scene.page.locator(".jp-OutputArea-output :is(svg, a, iframe)").filter(has_text="pwned").count()
    assert scene.page.get_by_text("window.pwned=3").count()  # seen, and not run
