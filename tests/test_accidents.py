"""What may go wrong beside a training and must not end it, and what belongs together though a process dies in between:
requests, samples, figures, trackers, checkpoints, the best evaluation."""

import errno
import functools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import forking
from live import adapter, figures, until
from small import small_base

from tinytrainer_nb.core import TinyTrainerError, read_json, write_json
from tinytrainer_nb.recipes.arguments import SFTArgs
from tinytrainer_nb.recipes.trainer import RunTrainer
from tinytrainer_nb.runs.run import Run

ROWS = [dict(prompt=f"How much is {i} + 1?", completion=str(i + 1)) for i in range(24)]


def policy(dropout: float = 0.0):
    from tinytrainer_nb.all import LoraArgs, add_lora, load_model

    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    return add_lora(model, LoraArgs(r=2, dropout=dropout)), tokenizer


def train(out: Path, rows=ROWS, live: bool = False, made=None, **settings) -> Run:
    from tinytrainer_nb.all import SFTArgs, sft

    usual = dict(max_steps=4, batch_size=4, warmup_steps=0, save_steps=0, eval_steps=0, sample_steps=0)
    return sft(*(made or policy()), rows, SFTArgs(out=str(out), **usual | settings), live=live)


def notes(run: Run, part: str = "") -> list[str]:
    return [e["message"] for e in run.events if e["kind"] == "note" and part in e["message"]]


def by_hand(folder: Path) -> Run:
    "A run that this process could be training"
    from tinytrainer_nb.runs.lock import _me

    told = dict(recipe="sft", settings=dict(max_steps=5), status="running", may_change=["learning_rate"])
    write_json(folder / "run.json", told | dict(process=_me()))
    (folder / "requests").mkdir()
    return Run(folder)


BROKEN = {
    "empty": "",
    "cut": '{"action": "sto',
    "no-json": "stop it, please",
    "a-list": "[]",
    "a-word": '"stop"',
    "null": "null",
    "unknown-action": '{"action": "restart", "asked": 1}',
    "no-action": '{"asked": 1}',
    "action-of-a-wrong-type": '{"action": ["stop"], "asked": 1}',
    "half-a-letter": '{"action": "\\ud800"}',
    "time-of-a-wrong-type": '{"action": "stop", "asked": "yesterday"}',
    "endless-time": '{"action": "stop", "asked": Infinity}',
    "no-changes": '{"action": "set", "asked": 1}',
    "changes-of-a-wrong-type": '{"action": "set", "changes": [["learning_rate", 1]], "asked": 1}',
    "unknown-setting": '{"action": "set", "changes": {"learnign_rate": 0.1}, "asked": 1}',
    "fixed-setting": '{"action": "set", "changes": {"learning_rate": 0.1, "max_steps": 9}, "asked": 1}',
    "deep": "[" * 100_000,
    "long-number": '{"action": "stop", "asked": 1' + "0" * 5000 + "}",
    "change-of-a-wrong-type": '{"action": "set", "changes": {"learning_rate": "fast"}, "asked": 1}',
    "change-to-a-flag": '{"action": "set", "changes": {"learning_rate": true}, "asked": 1}',
    "changes-of-a-pause": '{"action": "pause", "changes": [], "asked": 1}',
    "huge": '{"action": "stop", "x": "' + "x" * 2_000_000 + '"}',
    "latin": b'{"action": "st\xf6p"}',
    "zeros": b"\0" * 512,  # as a file system may leave after a power failure
}
NO_FILES = {
    "a-folder-stop": lambda path: path.mkdir(),
    "a-full-folder-stop": lambda path: (path.mkdir(), (path / "x.json").write_text("{}")),
    "a-link-to-nowhere-stop": lambda path: path.symlink_to("/nowhere"),
    "a-link-in-a-circle-stop": lambda path: path.symlink_to(path),
    "a-pipe-stop": lambda path: os.mkfifo(path),
    "x" * 250: lambda path: path.write_text("{"),
}


@pytest.mark.skipif(os.name == "nt", reason="makes files that Windows does not know")
def test_broken_requests_are_set_aside(tmp_path):
    "Each once, with a note that names it; the good ones among them are obeyed, in their order"
    run = by_hand(tmp_path)
    requests = tmp_path / "requests"
    for n, (name, content) in enumerate(BROKEN.items()):
        path = requests / f"{n:03d}-{name}.json"
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    for name, make in NO_FILES.items():
        make(requests / f"{name}.json")
    run.pause()
    run.set(learning_rate=1e-4)
    (requests / "stop.json").write_text('{"action": "stop"}')  # by hand, and all that is needed
    assert [r["action"] for r in run.waiting()] == ["pause", "set", "stop"] and run.asked("stop")
    assert all(type(r["asked"]) in (int, float) for r in run.waiting())
    assert [r["action"] for r in run.take_requests()] == ["pause", "set", "stop"]
    assert len(notes(run, "was set aside")) == len(BROKEN) + len(NO_FILES)
    for name in [*BROKEN, *NO_FILES]:
        assert notes(run, name[:90]), name
    assert all("\n" not in note and len(note) < 600 for note in notes(run))
    assert (
        "max_steps cannot be changed while a run goes on. These can: learning_rate." in notes(run, "fixed-setting")[0]
    )
    assert "changes.learning_rate must be a number, found 'fast'" in notes(run, "change-of-a-wrong-type")[0]
    assert "changes must be an object, found a list" in notes(run, "changes-of-a-pause")[0]
    assert not list(requests.glob("*.json")) and len(list(requests.iterdir())) == len(BROKEN) + len(NO_FILES)
    assert not run.take_requests() and not run.waiting() and len(notes(run)) == len(BROKEN) + len(NO_FILES)


def test_whether_a_setting_may_be_changed_is_decided_once(tmp_path):
    "By whoever asks, by whoever reads the request, by the trainer: in the same words"
    run, settings = by_hand(tmp_path), SFTArgs()
    asker = SimpleNamespace(settings=settings)
    for ask in (lambda: run.set(seed=1), lambda: RunTrainer._checked(asker, "seed", 1)):
        with pytest.raises(
            TinyTrainerError, match="^seed cannot be changed while a run goes on. These can: learning_r"
        ):
            ask()
    write_json(tmp_path / "run.json", run.info | dict(may_change=[]))
    with pytest.raises(TinyTrainerError, match="None can.$"):
        run.set(learning_rate=1e-4)
    run.request("set", changes=dict(learning_rate=1e-4))
    assert not run.take_requests() and "None can." in notes(run, "learning_rate cannot be changed")[0]


MISTYPED = {
    "load.files": [1],
    "load.commit": 5,
    "load.vocabulary": None,
    "start": ["x"],
    "result": ["x"],
    "settings.out": None,
    "reward.names": "f",
    "reward.code": ["x"],
    "reward.weights": dict(f="much"),
}


@pytest.mark.parametrize("field", MISTYPED)
def test_a_field_of_a_run_that_is_mistyped_is_named(field, tmp_path):
    run, (name, _, part) = by_hand(tmp_path), field.partition(".")
    reward = dict(kind="function", spec="", names=["f"], weights=dict(f=1.0), code=dict(f="0a"))
    sound = run.info | dict(load=dict(files=dict(a="0b"), commit="", vocabulary=""), start={}, result={}, reward=reward)
    write_json(tmp_path / "run.json", sound)
    assert run.info["reward"] == reward and "reward=f" in run.how_to_resume()
    wrong = sound[name] | {part: MISTYPED[field]} if part else MISTYPED[field]
    write_json(tmp_path / "run.json", sound | {name: wrong})
    with pytest.raises(TinyTrainerError, match=f"run.json: {re.escape(field)}.* must be "):
        run.info  # noqa: B018


def test_a_reward_of_a_run_that_tells_little(tmp_path):
    run = by_hand(tmp_path)
    write_json(tmp_path / "run.json", run.info | dict(reward=dict(kind="function")))
    assert "resume(reward=)" in run.how_to_resume() and run.info["reward"]["names"] == []


def test_a_request_that_cannot_be_moved(tmp_path, monkeypatch):
    "Noted once, and not again at every step; a good one that cannot be removed is obeyed once"
    run = by_hand(tmp_path)
    run.log("metrics", 1, loss=1.0)
    (tmp_path / "requests" / "1-stop.json").write_text("{")
    (tmp_path / "requests" / "2-save.json").write_text('{"action": "save"}')

    def denied(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", denied)
        m.setattr(Path, "unlink", denied)
        assert [r["action"] for r in run.take_requests()] == ["save"]
        assert not run.take_requests() and len(notes(run)) == 1


def test_a_request_that_cannot_be_read(tmp_path, monkeypatch):
    run = by_hand(tmp_path)
    path = tmp_path / "requests" / "1-stop.json"
    path.write_text('{"action": "stop"}')
    plain = Path.read_text

    def denied(self, *args, **kwargs):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    assert not run.waiting() and not run.take_requests() and notes(run, "Permission denied") and not path.exists()


def test_a_training_among_broken_requests(tmp_path):
    "It goes on, obeys what can be obeyed, and is unchanged by the rest: also by values that are not allowed"
    whole = train(tmp_path / "whole", max_steps=16)
    run = train(tmp_path / "run", max_steps=16, live=True)
    until(lambda: run.step >= 1)
    run.pause()
    until(lambda: run.status == "paused")
    for n, name in enumerate(("cut", "a-list", "unknown-setting", "fixed-setting", "deep", "half-a-letter")):
        (run.folder / "requests").mkdir(exist_ok=True)
        (run.folder / "requests" / f"{n}-{name}.json").write_text(BROKEN[name])
    for value in (None, "fast", float("nan"), -1.0, [1], {"a": "\ud800"}, True, 10**400):
        text = json.dumps(dict(action="set", changes=dict(learning_rate=value)))
        (run.folder / "requests" / f"{abs(hash(str(value)))}.json").write_text(text)
    until(lambda: not list((run.folder / "requests").glob("*.json")))
    run.unpause()
    run.wait()
    assert run.status == "finished" and adapter(run) == adapter(whole)
    assert len(notes(run, "was set aside")) == 13 and len(notes(run, "not changed")) == 1
    assert not [e for e in run.events if e["kind"] == "change"]


def test_a_broken_request_does_not_end_a_pause(tmp_path):
    run = train(tmp_path / "run", max_steps=400, live=True)
    until(lambda: run.step >= 2)
    run.pause()
    until(lambda: run.status == "paused")
    (run.folder / "requests" / "0-unpause.json").write_text("{")
    (run.folder / "requests" / "1-stop.json").mkdir()
    until(lambda: len(notes(run, "set aside")) == 2)
    assert run.status == "paused"
    run.stop()
    run.wait()
    assert run.status == "stopped"


def test_old_requests_of_a_run_that_is_resumed(tmp_path):
    "What lies there from before is not obeyed, and what is broken among it does not stop the resume"
    run = train(tmp_path / "run", max_steps=12, live=True)
    until(lambda: run.step >= 2)
    run.stop()
    run.wait()
    (run.folder / "requests" / "1-stop.json").write_text('{"action": "stop"}')
    (run.folder / "requests" / "2-stop.json").write_text('{"action": "stop"')
    assert Run.open(run.folder).resume().status == "finished" and len(notes(run, "set aside")) == 1


def test_samples_that_fail(tmp_path, monkeypatch):
    "Noted once, though every sample fails; the result is that of a run without them. A resume goes on as well"
    from tinytrainer_nb.recipes.sft import SFTTrainer

    whole = train(tmp_path / "whole")

    def fails(self):
        raise RuntimeError("no\nroom\x1b[31m")

    monkeypatch.setattr(SFTTrainer, "sample", fails)
    run = train(tmp_path / "run", sample_steps=1, max_steps=4, save_steps=2)
    assert run.status == "finished" and adapter(run) == adapter(whole)
    assert notes(run, "failed") == ["a sample failed, and the training goes on: RuntimeError: no room\\x1b[31m"]
    shutil.rmtree(run.folder / "checkpoints" / "step-000004")
    write_json(run.folder / "run.json", run.info | dict(status="failed"))
    again = Run.open(run.folder).resume()
    assert again.status == "finished" and adapter(again) == adapter(whole) and len(notes(again, "failed")) == 1


def test_a_long_question_among_the_samples(tmp_path):
    "A row that is left out of the training may be too long for the context; the samples are of those that fit"
    from tinytrainer_nb.all import PretrainArgs  # noqa: F401, the library as users see it

    long = dict(prompt="How much is that? " * 3000, completion="much")
    model, tokenizer = policy()
    room = model.config.max_position_embeddings
    assert len(tokenizer(long["prompt"]).input_ids) > room
    run = train(tmp_path / "run", [long, *ROWS], sample_steps=2, made=(model, tokenizer))
    shown = [e["prompt"] for e in run.events if e["kind"] == "sample"]
    assert run.status == "finished" and len(shown) == 4 and not notes(run, "failed")
    alone = train(tmp_path / "alone", ROWS, sample_steps=2, sample_tokens=room, made=policy())
    assert alone.status == "finished" and not [e for e in alone.events if e["kind"] == "sample"]


def test_training_errors_still_end_a_run(tmp_path, monkeypatch):
    "Only what looks at a training may fail"
    from tinytrainer_nb.recipes.trainer import RunTrainer

    def fails(self, *args, **kwargs):
        raise ValueError("this belongs to the training")

    for name in "training_step", "heldout", "_save_checkpoint", "save_result":
        with monkeypatch.context() as m:
            m.setattr(RunTrainer, name, fails)
            with pytest.raises(ValueError, match="belongs to the training"):
                train(tmp_path / name, eval_steps=2, save_steps=2)
        assert Run.open(tmp_path / name).status == "failed"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), KeyError("font")])
def test_a_figure_that_cannot_be_written(tmp_path, monkeypatch, error):
    from tinytrainer_nb.views.plots import Run as drawn

    def fails(self):
        raise error

    monkeypatch.setattr(drawn, "save_figure", fails)
    run = train(tmp_path / "run")
    assert run.status == "finished" and run.summary["steps"] == 4 and not (run.folder / "figure.png").exists()
    assert len(notes(run, "the figure failed")) == 1 and type(error).__name__ in notes(run, "the figure failed")[0]


DOWN, EXITS = ConnectionError("the server is down"), SystemExit(1)


@pytest.mark.parametrize(
    "event, how",
    [(event, DOWN) for event in ("__init__", "on_train_begin", "on_log", "on_evaluate", "on_save", "on_train_end")]
    + [("__init__", EXITS), ("on_log", EXITS)],
)
def test_a_tracker_that_fails(tmp_path, monkeypatch, event, how):
    "At its making, at each event: told once"
    from transformers.integrations import TensorBoardCallback

    def fails(self, *args, **kwargs):
        raise how

    monkeypatch.setattr(TensorBoardCallback, event, fails, raising=False)
    run = train(tmp_path / "run", max_steps=3, save_steps=1, eval_steps=1, report_to="tensorboard")
    assert run.status == "finished" and run.step == 3
    expected = [] if event == "on_save" else ["the tracker tensorboard failed, and the training goes on: "]  # not asked
    assert (
        [note[: len(expected[0])] for note in notes(run, "failed")] == expected
        if expected
        else not notes(run, "failed")
    )


def test_a_tracker_that_works(tmp_path):
    "Its figures are those of the journal"
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(tmp_path / "run", max_steps=3, report_to="tensorboard")
    (folder,) = (run.folder / "runs").iterdir()
    seen = reader.EventAccumulator(str(folder)).Reload()
    losses = [event.value for event in seen.Scalars("train/loss")]
    assert losses == pytest.approx(run.history("loss")[1]) and not notes(run, "failed")


def test_a_terminal_that_was_closed(tmp_path, monkeypatch):
    "A training outlives the terminal that it writes its progress to"
    from tinytrainer_nb.recipes import trainer

    class Closed:
        n = initial = 0
        disable = False

        def broken(self, *args, **kwargs):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        set_postfix_str = update = close = broken

    monkeypatch.setattr(trainer, "progress", lambda **kwargs: Closed())
    run = train(tmp_path / "run", max_steps=3)
    assert run.status == "finished" and len(notes(run, "the progress bar failed")) == 1


def test_checkpoints_by_number(tmp_path):
    "A million steps, and whatever else lies in the folder: copies, files, links, other names"
    run = by_hand(tmp_path)
    folder = tmp_path / "checkpoints"
    for name in ("step-000002", "step-999999", "step-1000000", "step-1000001"):
        (folder / name).mkdir(parents=True)
    for name in (
        "step-abc",
        "step-1000002-copy",
        "step-",
        "step-12",
        "step-0000002000000",
        "step-\u0663\u0663\u0663\u0663\u0663\u0663",
    ):
        (folder / name).mkdir()
    for name in ("step-" + "9" * 200, "step-2000000 (1)", "Step-3000000", ".step-4000000.partial", "best"):
        (folder / name).mkdir()
    (folder / "step-5000000").write_text("a file")
    (folder / "step-6000000").symlink_to(folder / "step-000002")
    assert [step for _, step in run.checkpoints()] == [2, 999_999, 1_000_000, 1_000_001]
    assert run.last_checkpoint() == (folder / "step-1000001", 1_000_001)


def test_the_oldest_go_first(tmp_path, monkeypatch):
    "By number; what is not a checkpoint stays, and one that cannot be removed ends nothing"
    from tinytrainer_nb.recipes import trainer

    strangers = ["step-abc", "step-000001-copy"]

    def with_strangers(run):
        for name in strangers:
            (run.folder / "checkpoints" / name).mkdir(exist_ok=True)

    plain = trainer.RunTrainer._save_checkpoint

    def saving(self, *args):
        with_strangers(self.run)
        self.state.global_step += 999_997  # as in a long run
        try:
            plain(self, *args)
        finally:
            self.state.global_step -= 999_997

    monkeypatch.setattr(trainer.RunTrainer, "_save_checkpoint", saving)
    run = train(tmp_path / "run", save_steps=1, keep_checkpoints=2)
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == sorted([*strangers, "step-1000000", "step-1000001"])
    assert run.last_checkpoint()[1] == 1_000_001

    def busy(folder):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(trainer, "remove_whole", busy)
    run = train(tmp_path / "busy", save_steps=1, keep_checkpoints=2)
    assert run.status == "finished" and len(run.checkpoints()) == 4 and len(notes(run, "old checkpoint failed")) == 1


@pytest.mark.parametrize("where", ["save_file", "write_json", "_sync_tree"])
def test_a_full_disk_at_a_checkpoint(tmp_path, monkeypatch, where):
    "The run ends with a line; the checkpoint before is whole, nothing takes room beside it, and a resume goes on"
    from tinytrainer_nb import core
    from tinytrainer_nb.recipes import trainer

    whole, times = train(tmp_path / "whole", max_steps=6, save_steps=2), []
    owner = core if where == "_sync_tree" else trainer
    plain = getattr(owner, where)

    def full(what, *args, **kwargs):
        at = str(args[0] if where == "save_file" else what)
        times.extend([1] * (".step-0000" in at))
        if ".step-000004" in at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(what, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(owner, where, full)
        with pytest.raises(TinyTrainerError, match="the disk is full .*tinytrainer resume") as error:
            train(tmp_path / "run", max_steps=6, save_steps=2)
    assert "\n" not in str(error.value) and times
    run = Run.open(tmp_path / "run")
    assert run.status == "failed" and [step for _, step in run.checkpoints()] == [2]
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["step-000002"]
    run.resume()
    assert run.status == "finished" and adapter(run) == adapter(whole)


MOMENTS = {  # what is about to be done when the process dies
    "the evaluation is written": ("runs.run:Run", "log", lambda self, kind, *a, **k: kind == "evaluation"),
    "the evaluation is compared": ("recipes.trainer:RunTrainer", "compare", lambda *a: True),
    "the best is saved": ("recipes.trainer:RunTrainer", "_save", lambda self, folder, *a: ".best." in str(folder)),
    "the best is in place": ("core:", "remove_whole", lambda folder: folder.name == "best"),
    "the end is noted": ("runs.run:Run", "note", lambda self, step, text: "ended early" in text),
    "a checkpoint is made": ("recipes.trainer:RunTrainer", "_save_checkpoint", lambda *a: True),
    "a checkpoint is complete": ("recipes.trainer:RunTrainer", "_complete", lambda *a: True),
    "an old checkpoint goes": ("recipes.trainer:", "remove_whole", lambda folder: True),
    "the best is taken": ("recipes.trainer:RunTrainer", "take_best", lambda *a: True),
    "that is noted": ("runs.run:Run", "note", lambda self, step, text: "the result has" in text),
    "the result is saved": ("recipes.trainer:RunTrainer", "save_result", lambda *a: True),
    "the summary is written": ("recipes.trainer:RunTrainer", "finish", lambda *a: True),
    "the figure is drawn": ("runs.run:Run", "save_figure", lambda *a: True),
    "the status is written": ("runs.run:Run", "set_status", lambda self, value, *a, **k: value == "finished"),
}
PATIENT = dict(max_steps=12, learning_rate=0.003, schedule="constant", eval_steps=1, keep_best=True, patience=2, seed=3)


def dying(out: str, moment: str, time_of: int, after: bool, settings: dict) -> None:
    "A training that dies before (or after) it does something for the `time_of`-th time"
    import importlib

    owner, name, when = MOMENTS[moment]
    module, _, cls = owner.partition(":")
    owner = importlib.import_module(f"tinytrainer_nb.{module}")
    importlib.import_module("tinytrainer_nb.views.plots")
    owner = getattr(owner, cls) if cls else owner
    plain, times = getattr(owner, name), []

    @functools.wraps(plain)
    def last(*args, **kwargs):
        met = when(*args, **kwargs)
        times.extend([1] * met)
        if met and len(times) == time_of and not after:
            os._exit(9)
        found = plain(*args, **kwargs)
        if met and len(times) == time_of:
            os._exit(9)
        return found

    setattr(owner, name, last)
    if Path(out).exists():
        Run.open(out).resume()
    else:
        train(Path(out), made=policy(dropout=0.1), **PATIENT | settings)


def dies(out: Path, *how) -> None:
    process = forking().Process(target=dying, args=(str(out), *how))
    process.start()
    process.join(120)
    assert process.exitcode in (0, 9), how


def told(run: Run) -> list[dict]:
    "All that the journal says but times, the path of a step and where a session began"
    said = [e for e in run.events if e["kind"] in ("evaluation", "note", "checkpoint")]
    return [{k: v for k, v in e.items() if k not in ("time", "asked")} for e in said if "fast path" not in str(e)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Runs that nobody killed, by how often they save"
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def of(save_steps: int) -> Run:
        run = train(folder / f"every{save_steps}", made=policy(dropout=0.1), **PATIENT, save_steps=save_steps)
        assert run.status == "finished" and 3 < run.summary["steps"] < 12 and notes(run, "ended early")
        assert notes(run, "the result has the weights of step")
        return run

    return of


ALWAYS = [
    "the best is in place",
    "the end is noted",
    "that is noted",
    "the status is written",
    "a checkpoint is complete",
]
KILLS = [(moment, save, after) for moment in MOMENTS for save in (1, 3) for after in (False, True)]


@pytest.mark.skipif(os.name == "nt", reason="needs processes that are forked")
@pytest.mark.parametrize(
    "moment, save, after",
    [
        pytest.param(*kill, marks=[] if kill[0] in ALWAYS and kill[1] == 1 and kill[2] else pytest.mark.slow)
        for kill in KILLS
    ],
)
def test_the_end_is_the_same_after_a_kill(tmp_path, whole, moment, save, after):
    "Killed at such a moment, and again in the resume: the same end, weights and record, to the bit"
    reference, out = whole(save), tmp_path / "run"
    few = moment in ("the end is noted", "the best is taken", "that is noted") or moment.startswith(
        ("the re", "the s", "the f")
    )
    dies(out, moment, 1 if few else 2, after, dict(save_steps=save))
    run = Run.open(out)
    if run.status != "finished":
        assert run.status == "interrupted"
        dies(out, moment, 1, after, {})  # and once more
    if run.status != "finished":
        run.resume()
    assert run.status == "finished" and adapter(run) == adapter(reference)
    assert run.summary["steps"] == reference.summary["steps"]
    assert figures(run) == figures(reference) and told(run) == told(reference)


def test_the_best_of_a_later_step_is_not_taken(tmp_path):
    """Evaluated and saved after the last checkpoint, then killed; the resumed run takes another course, in which that
    evaluation never was. The best weights are those that the checkpoint knew"""
    from safetensors.torch import load_file

    run = train(tmp_path / "run", max_steps=6, eval_steps=2, save_steps=2, keep_best=True)
    best = run.folder / "checkpoints" / "best"
    shutil.rmtree(run.folder / "checkpoints" / "step-000006")
    checkpoint = run.folder / "checkpoints" / "step-000004"
    step = read_json(checkpoint / "progress.json")["best"]["step"]
    known = load_file(checkpoint / "best.safetensors")
    expected = load_file(run.folder / "checkpoints" / f"step-{step:06d}" / "trained.safetensors")
    assert all((known[name] == expected[name]).all() for name in expected)
    for state in "of a later step", "gone":
        folder = tmp_path / state
        shutil.copytree(run.folder, folder)
        shutil.rmtree(folder / "checkpoints" / "best")
        if state != "gone":
            (folder / "checkpoints" / "best").mkdir()
            (folder / "checkpoints" / "best" / "trained.safetensors").write_bytes(b"another course")
        write_json(folder / "run.json", run.info | dict(status="interrupted"))
        assert Run.open(folder).resume().status == "finished" and adapter(Run(folder)) == adapter(run)
    assert best.exists()


def test_the_best_weights_are_gone(tmp_path):
    "Of a run without checkpoints, as of an earlier version: said, and the result is what there is"
    from tinytrainer_nb.recipes.trainer import RunTrainer

    plain = RunTrainer.take_best

    def lost(self):
        shutil.rmtree(self.run.folder / "checkpoints" / "best")
        plain(self)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(RunTrainer, "take_best", lost)
        run = train(tmp_path / "run", **PATIENT)
    assert run.status == "finished" and len(notes(run, "are gone: the result has the last ones")) == 1


def test_an_error_whose_folder_is_gone_is_itself(tmp_path, monkeypatch):
    "The reason of an end is told, though it cannot be written down"
    from tinytrainer_nb.recipes.trainer import RunTrainer

    def fails(self, *args, **kwargs):
        shutil.rmtree(self.run.folder)
        raise ValueError("the reason")

    monkeypatch.setattr(RunTrainer, "training_step", fails)
    with pytest.raises(ValueError, match="the reason"):
        train(tmp_path / "run")


BESIDE = dict(max_steps=12, save_steps=3, sample_steps=4, eval_steps=4, keep_best=True)


def only_in(folder: Path, run: Run) -> None:
    "A whole run is in `folder`, and it knows it"
    assert run.status == "finished" and run.place == folder and run.folder in (folder, Path("rel/first"))
    assert Run(folder).step == 12 and [step for _, step in Run(folder).checkpoints()] == [6, 9, 12]
    for name in ("adapter", "summary.json", "figure.png"):
        assert (folder / name).exists(), name


def test_the_current_folder_changes_beside_a_training(tmp_path, monkeypatch):
    "A cell's %cd: journal, checkpoints and result stay where the run is, and so do requests"
    (other := tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    run = train(Path("rel/first"), live=True, **BESIDE)
    assert run.folder == Path("rel/first") and repr(run).startswith("Run('rel/first')")
    until(lambda: run.step >= 1)
    os.chdir(other)
    assert run.folder == tmp_path / "rel" / "first"
    run.pause()
    until(lambda: run.status == "paused")
    os.chdir(tmp_path)
    run.unpause()
    os.chdir(other)
    run.wait()
    assert str(tmp_path) in repr(run) and not list(other.iterdir())
    only_in(tmp_path / "rel" / "first", run)
    os.chdir(tmp_path)
    assert repr(run).startswith("Run('rel/first')")


def test_the_current_folder_is_changed_by_the_training_itself(tmp_path, monkeypatch):
    "By a reward, in every round, to and fro; and a run that is resumed from elsewhere"
    from tinytrainer_nb.all import GRPOArgs, data_file, grpo, load_prompts

    (other := tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    def reward(prompt, completion):
        os.chdir(other if Path.cwd() == tmp_path else tmp_path)
        return float(len(completion))

    few = dict(batch_size=2, num_generations=2, max_new_tokens=4, warmup_steps=0, eval_rows=1)
    args = GRPOArgs(out="rel/first", **BESIDE | few)
    run = grpo(*policy(), load_prompts(data_file("rl.jsonl"))[:24], reward, args)
    only_in(tmp_path / "rel" / "first", run)
    write_json(run.place / "run.json", run.info | dict(status="interrupted"))
    shutil.rmtree(run.place / "checkpoints" / "step-000012")
    os.chdir(other)
    only_in(tmp_path / "rel" / "first", run.resume(reward=reward))
    assert not list(other.iterdir()) and sorted(p.name for p in tmp_path.iterdir()) == ["other", "rel"]


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the current folder")
def test_the_current_folder_is_removed_beside_a_training(tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path)
    run = train(Path("rel/first"), live=True, **BESIDE)
    until(lambda: run.step >= 1)
    os.chdir(gone)
    gone.rmdir()
    try:
        run.wait()
        only_in(tmp_path / "rel" / "first", run)
    finally:
        os.chdir(tmp_path)


def test_a_link_in_the_name_of_a_run(tmp_path, monkeypatch):
    "`link/..` is the parent of the link's target, not the folder that the link is in"
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    run = train(Path("link/../run"), max_steps=1)
    assert run.status == "finished" and (tmp_path / "far" / "run" / "adapter").exists() and not Path("run").exists()


@pytest.mark.parametrize("recipe", ["ppo", "grpo"])
def test_a_reward_that_fails_in_an_evaluation(recipe, tmp_path):
    "What was trained until then is a checkpoint, as when it fails in a round, and the run goes on from there"
    from tinytrainer_nb.recipes import grpo, ppo
    from tinytrainer_nb.recipes.arguments import GRPOArgs, PPOArgs

    learn, args = dict(ppo=(ppo.ppo, PPOArgs), grpo=(grpo.grpo, GRPOArgs))[recipe]
    prompts = [dict(messages=[dict(role="user", content=f"How much is {i} + 1?")]) for i in range(24)]
    few = dict(max_steps=4, batch_size=2, save_steps=0, sample_steps=0, num_generations=2, max_new_tokens=4)
    calls = []

    def reward(prompts, completions):
        calls.append(len(completions))
        if calls == [4, 4, 2]:
            raise ValueError("once in a while")
        return [float(len(c)) for c in completions]

    args = args(out=str(tmp_path / "run"), eval_steps=2, eval_rows=2, **few)
    with pytest.raises(TinyTrainerError, match="once in a while"):
        learn(*policy(), prompts, reward, args)
    run = Run.open(tmp_path / "run")
    assert run.status == "failed" and [step for _, step in run.checkpoints()] == [2]
    assert run.resume(reward=reward).status == "finished" and run.step == 4


ENDS = {
    "EACCES": (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    "EIO": (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "EROFS": (OSError(errno.EROFS, "Read-only file system"), "Read-only"),
    "EMFILE": (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    "safetensors": (RuntimeError("Error while serializing: I/O error: Permission denied (os error 13)"), "Permission"),
    "ENOSPC": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full .*inodes"),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows words them otherwise")
@pytest.mark.parametrize(
    "end, where",
    [(end, "a checkpoint") for end in ENDS]
    + [("EACCES", where) for where in ("the journal", "the result", "the status")],
)
def test_a_file_system_that_fails(end, where, tmp_path, monkeypatch):
    "One line that says what, where and how to go on; a resume does"
    from tinytrainer_nb.recipes import trainer
    from tinytrainer_nb.runs import journal, run

    error, said = ENDS[end]
    owner, name, fails = {
        "a checkpoint": (trainer, "save_file", lambda *a: "step-000002" in str(a[1])),
        "the journal": (journal.Journal, "append", lambda *a: a[1:3] == ("metrics", 3)),
        "the result": (trainer, "save_adapter", lambda *a: True),
        "the status": (run, "write_json", lambda *a: isinstance(a[1], dict) and a[1].get("status") == "finished"),
    }[where]
    plain = getattr(owner, name)

    def failing(*args, **kwargs):
        if fails(*args):
            raise error
        return plain(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(owner, name, failing)
        with pytest.raises(TinyTrainerError, match=f"{tmp_path / 'run'}: .*{said}.*tinytrainer resume") as e:
            train(tmp_path / "run", save_steps=1)
    made = Run.open(tmp_path / "run")
    assert "\n" not in str(e.value) and made.status == "failed"
    assert [step for _, step in made.checkpoints()][-1:] == [1 if where == "a checkpoint" else made.step]
    assert made.resume().status == "finished" and made.step == 4


@pytest.mark.skipif(os.name == "nt", reason="Windows words them otherwise")
def test_a_file_system_that_fails_in_a_terminal(tmp_path, monkeypatch, capsys):
    from tinytrainer_nb.cli import main
    from tinytrainer_nb.recipes import trainer

    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(trainer, "save_file", failing)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    argv = ["sft", "--base", small_base(), "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "run")]
    argv += ["--max_steps", "2", "--save_steps", "1", "--eval_steps", "0", "--dtype", "fp32", "--quantization", "none"]
    assert main(argv) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Input/output error" in said and said.count("tinytrainer resume") == 1


ELSEWHERE = [
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/of/somebody.json"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError("without a number"),
    ValueError("no error of a file"),
]


@pytest.mark.parametrize("error", ELSEWHERE, ids=lambda e: type(e).__name__)
def test_errors_that_are_not_of_the_runs_files(error, tmp_path, monkeypatch):
    "They stay what they are"
    from tinytrainer_nb.recipes.trainer import RunTrainer

    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(RunTrainer, "training_step", failing)
    with pytest.raises(type(error)) as e:
        train(tmp_path / "run")
    assert e.value is error and Run.open(tmp_path / "run").status == "failed"


def test_a_request_that_cannot_be_written(tmp_path, monkeypatch):
    from tinytrainer_nb.runs import run as module

    run = by_hand(tmp_path)

    def failing(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "requests" / ".1.partial"))

    monkeypatch.setattr(module, "write_json", failing)
    with pytest.raises(TinyTrainerError, match="cannot be read or written .*ask again"):
        run.stop()


def test_the_clock_is_set_back_between_requests(tmp_path, monkeypatch):
    "They are obeyed in the order in which they were made, by whichever process; a stranger's file does no harm"
    import time

    run, plain, hours = by_hand(tmp_path), time.time_ns, iter((0, -2, -1, 3, -5))
    (tmp_path / "requests" / "99999-stop.json").write_text("{")
    (tmp_path / "requests" / ("9" * 30 + "-stop.json")).write_text("{")
    for action in ("pause", "unpause", "pause", "save", "stop"):
        hour = next(hours)
        monkeypatch.setattr(time, "time_ns", lambda: plain() + hour * 3600 * 10**9)
        Run(tmp_path).request(action)
    assert [r["action"] for r in run.waiting()] == ["pause", "unpause", "pause", "save", "stop"]
    assert [r["action"] for r in run.take_requests()] == ["pause", "unpause", "pause", "save", "stop"]


SPOILT = {
    "empty": lambda path: [p.unlink() for p in path.iterdir()],
    "no progress": lambda path: (path / "progress.json").unlink(),
    "a folder": lambda path: ((path / "progress.json").unlink(), (path / "progress.json").mkdir()),
    "cut": lambda path: (path / "progress.json").write_text('{"tokens": 1'),
    "nothing in it": lambda path: (path / "progress.json").write_text(""),
    "a list": lambda path: (path / "progress.json").write_text("[]"),
    "a field": lambda path: (path / "progress.json").write_text('{"tokens": "many"}'),
    "no optimiser": lambda path: (path / "optimizer.safetensors").unlink(),
    "no tensors": lambda path: (path / "trained.safetensors").unlink(),
}


@pytest.mark.parametrize("spoilt, last", [*((spoilt, 2) for spoilt in SPOILT), ("empty", 4), ("cut", 4)])
def test_a_checkpoint_that_is_damaged_says_the_same_cure(spoilt, last, tmp_path):
    "Whatever is wrong with it: without its folder the run goes on"
    run = train(tmp_path / "run", save_steps=1)
    write_json(run.folder / "run.json", run.info | dict(status="interrupted"))
    for path, step in run.checkpoints():
        if step > last:
            shutil.rmtree(path)
    folder = run.folder / "checkpoints" / f"step-{last:06d}"
    SPOILT[spoilt](folder)
    with pytest.raises(TinyTrainerError, match=f"damaged. Remove the folder {folder}: a resume then starts from") as e:
        Run.open(run.folder).resume()
    assert "\n" not in str(e.value) and "Restore it" not in str(e.value).replace("Restore it or remove it", "")
    shutil.rmtree(folder)
    assert Run.open(run.folder).resume().status == "finished"


@pytest.mark.parametrize("recipe", ["sft", "pretrain"])
def test_a_result_whose_writing_was_interrupted(recipe, tmp_path, monkeypatch):
    "A stopped run has a result; it goes on and dies between the new one and its hashes"
    from tinytrainer_nb.all import PretrainArgs, load_model, pretrain, save_merged
    from tinytrainer_nb.recipes import trainer

    out = tmp_path / "run"
    if recipe == "sft":
        run = train(out, max_steps=400, save_steps=0, live=True)
    else:
        settings = dict(max_steps=400, batch_size=2, max_length=64, save_steps=0, eval_steps=0, sample_steps=0)
        model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
        run = pretrain(model, tokenizer, ["A town by the sea. " * 400], PretrainArgs(out=str(out), **settings), True)
    until(lambda: run.step >= 1)
    run.stop()
    run.wait()
    assert run.status == "stopped"
    load_model(out, verbose=False)
    write_json(out / "run.json", run.info | dict(settings=run.info["settings"] | dict(max_steps=run.step + 1)))

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(trainer, "result_hashes", dies)
        with pytest.raises(KeyboardInterrupt):
            Run.open(out).resume()
    assert Run.open(out).status == "interrupted"
    for use in (lambda: load_model(out, verbose=False), lambda: save_merged(Run.open(out), tmp_path / "merged")):
        with pytest.raises(TinyTrainerError, match="interrupted while its result was written.*tinytrainer resume"):
            use()
    assert Run.open(out).resume().status == "finished" and load_model(out, verbose=False)


@pytest.mark.parametrize("recipe, alike", [("ppo", False), ("ppo", True), ("grpo", False)])
def test_the_alarm_of_rewards_that_do_not_differ(recipe, alike, tmp_path):
    "PPO compares with the whole round, GRPO with a prompt's others: what differs among prompts teaches only the first"
    from tinytrainer_nb.recipes import grpo, ppo
    from tinytrainer_nb.recipes.arguments import GRPOArgs, PPOArgs

    learn, args = dict(ppo=(ppo.ppo, PPOArgs), grpo=(grpo.grpo, GRPOArgs))[recipe]
    prompts = [dict(messages=[dict(role="user", content=f"How much is {i} + 1?")]) for i in range(24)]
    few = dict(
        max_steps=5, batch_size=4, save_steps=0, sample_steps=0, num_generations=2, max_new_tokens=4, eval_steps=0
    )
    order = [p["messages"][0]["content"] for p in prompts]
    run = learn(
        *policy(),
        prompts,
        lambda prompt, completion: 1.0 if alike else float(order.index(prompt)),
        args(out=str(tmp_path / "run"), **few),
    )
    silent = alike or recipe == "grpo"
    assert run.history("no_signal")[1] == [float(silent)] * 5
    assert ("no_signal" in [e["name"] for e in run.events if e["kind"] == "alarm"]) == silent
