"""The command line as a shell sees it: exit status, one line for an error, flags from the settings, and a run from
start to end."""

import dataclasses
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from small import ROWS, small_base

from tinytrainer_nb.cli import _begun_here, main
from tinytrainer_nb.core import TinyTrainerError, data_file, write_json
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.recipes.table import RECIPES
from tinytrainer_nb.runs.lock import Lock
from tinytrainer_nb.runs.run import Run

SMALL = [
    *("--base", small_base(), "--data", str(data_file("heldout.jsonl"))),
    *"--batch_size 4 --eval_steps 0 --sample_steps 0 --save_steps 2 --lora_r 4".split(),
]


def shell(*argv: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    "`tinytrainer ARGV...` in a process of its own"
    return subprocess.run(
        [sys.executable, "-m", "tinytrainer_nb.cli", *map(str, argv)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    "A finished run of three steps"
    folder = tmp_path_factory.mktemp("cli")
    assert main(["sft", "--max_steps", "3", *SMALL, "--out", str(folder / "first")]) == 0
    return folder / "first"


@pytest.fixture
def notebook(tmp_path) -> Path:
    "A notebook with two parameters, one of them without a value"
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                'steps = 3 # how many\nlimit: int | None = None # rows\nout = "runs/x" # where',
                metadata={"tags": ["parameters"]},
            ),
            nbformat.v4.new_code_cell(
                "import sys\nprint(steps + 1, limit, out, sys.executable)\nassert steps < 100, 'too many'"
            ),
        ]
    )
    nbformat.write(nb, tmp_path / "07_demo.ipynb")
    return tmp_path / "07_demo.ipynb"


ERRORS = {
    "unknown command": (["quickstrat"], "Did you mean quickstart?"),
    "unknown flag": (["sft", "--learnin_rate", "1"], "Did you mean --learning_rate?"),
    "hyphens": (["sft", "--learning-rate", "1"], "Did you mean --learning_rate?"),
    "abbreviated flag": (["sft", "--learning", "1"], "unknown flag --learning"),
    "no value": (["sft", "--out"], "expected one argument"),
    "one word too many": (["sft", "more"], "one word too many"),
    "missing argument": (["resume"], "DIR"),
    "bad number": (["sft", "--learning_rate", "fast"], "a number larger than 0"),
    "out of range": (["ppo", "--gamma", "1.5"], "at most 1"),
    "bad choice": (["sft", "--schedule", "steep"], "one of linear, cosine"),
    "bad limit": (["evaluate", "--limit", "-1"], "--limit"),
    "missing data": (["sft", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "missing config": (["sft", "--config", "nowhere.json"], "nowhere.json: no such file"),
    "missing run": (["resume", "nowhere"], "nowhere: no run is here"),
    "unknown base": (["sft", "--base", "nowhere", "--max_steps", "1"], "nowhere: no such model"),
    "unknown preset": (["pretrain", "--base", "new:nothing"], "nothing: no such preset"),
    "unknown quantization": (["sft", "--quantization", "nf5"], "auto, nf4, int8, none"),
    "unknown reward": (["ppo", "--reward", "exact_anser"], "exact_answer"),
    "unknown task": (["evaluate", "--task", "losses"], "exact_answer"),
    "unknown notebook": (["run", "quickstrat"], "quickstrat: no such notebook"),
    "missing notebook": (["run", "nowhere.ipynb"], "no such notebook"),
    "missing parameters": (["run", "quickstart", "-f", "nowhere.yaml"], "nowhere.yaml"),
}


def check_error(status: int, stderr: str, words: str, folder: Path) -> None:
    "One line, status 2, nothing written"
    lines = stderr.splitlines()
    assert status == 2, stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], stderr
    assert not list(folder.iterdir()), "something was written"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, words = ERRORS[name]
    check_error(main(argv), capsys.readouterr().err, words, tmp_path)


@pytest.mark.parametrize("name", ["unknown command", "unknown flag", "unknown base", "unknown notebook"])
def test_a_shell_sees_the_same(name, tmp_path):
    argv, words = ERRORS[name]
    done = shell(*argv, cwd=tmp_path)
    check_error(done.returncode, done.stderr, words, tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"max_stps": 3}', "Did you mean max_steps"),
        ('{"max_steps": ', "c.json"),
        ("[3]", "a JSON object"),
        ('{"max_steps": "many"}', "a whole number"),
    ],
)
def test_a_wrong_configuration_is_one_line(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(text, encoding="utf-8")
    assert main(["sft", "--config", "c.json"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and words in stderr


@pytest.mark.parametrize("recipe", [row.name for row in RECIPES.values() if row.command])
def test_help_names_every_setting(recipe, capsys):
    assert main([recipe, "--help"]) == 0
    shown = capsys.readouterr().out
    names = [f.name for f in dataclasses.fields(RECIPES[recipe].settings_class)]
    if recipe != "pretrain":
        names += ["quantization", *(f"lora_{f.name}" for f in dataclasses.fields(LoraArgs))]
    missing = [n for n in [*names, "base", "data", "dtype", "config"] if f"--{n} " not in shown]
    assert not missing
    squeeze = lambda text: "".join(text.split())  # lines are broken where the terminal ends
    untold = [
        f.name
        for f in dataclasses.fields(RECIPES[recipe].settings_class)
        if squeeze(f.metadata["help"]) not in squeeze(shown)
    ]
    assert not untold


def test_help_is_quick(tmp_path):
    "Nothing heavy is imported for it: torch alone takes longer"
    code = "import sys; from tinytrainer_nb.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0


def test_configuration_and_flags_reach_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text(
        json.dumps(dict(max_steps=2, seed=7, lora_r=2, learning_rate=1, train_on_all=True)), encoding="utf-8"
    )
    flags = ["--seed", "5", "--learning_rate", "2e-4", "--out", "r"]
    assert main(["sft", "--config", "c.json", *SMALL[:-2], *flags]) == 0
    info = Run.open(tmp_path / "r").info
    assert {k: info["settings"][k] for k in ("max_steps", "seed", "learning_rate", "train_on_all")} == dict(
        max_steps=2, seed=5, learning_rate=2e-4, train_on_all=True
    )
    assert json.loads((tmp_path / "r/adapter/adapter_config.json").read_text(encoding="utf-8"))["r"] == 2


def test_a_finished_run(finished, monkeypatch, capsys):
    assert Run.open(finished).status == "finished" and Run.open(finished).step == 3
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    monkeypatch.chdir(finished.parent)
    assert main(["resume", "first"]) == 0 and "finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert main(["resume", "."]) == 2 and "first" in capsys.readouterr().err


def test_the_terminal_is_clean(finished):
    done = shell("evaluate", "--base", "first", "--task", "loss", "--limit", 8, "--json", cwd=finished.parent)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert set(json.loads(done.stdout)) == {"task", "score", "n"} and json.loads(done.stdout)["n"] == 8


def test_a_run_is_a_base(finished, monkeypatch):
    monkeypatch.chdir(finished.parent)
    rounds = "--max_steps 1 --batch_size 4 --num_generations 2 --max_new_tokens 24 --sample_steps 0 --save_steps 0"
    reward = ["--reward", "exact_answer=1,reference_overlap=0.5"]
    assert main(["ppo", "--base", "first", *rounds.split(), *reward, "--out", "second"]) == 0
    run = Run.open(finished.parent / "second")
    assert run.info["reward"] == dict(
        kind="built_in",
        spec="exact_answer=1,reference_overlap=0.5",
        names=["exact_answer", "reference_overlap"],
        weights=dict(exact_answer=1.0, reference_overlap=0.5),
    )
    r = lambda folder: json.loads((folder / "adapter/adapter_config.json").read_text(encoding="utf-8"))["r"]
    assert r(run.folder) == r(finished) == 4, "the adapter of the first run was trained on"


def test_chat(finished, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 + 3?\n/help\n/reset\n\n"))
    assert main(["chat", str(finished), "--max_new_tokens", "16"]) == 0
    said = capsys.readouterr().out
    assert said.count("model> ") == 1 and "(/help: no such command; there is /reset" in said


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-m", "tinytrainer_nb.cli", "sft", "--max_steps", "30", *SMALL, "--out", "cut"],
        cwd=tmp_path,
        # Whoever runs the tests in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while time.monotonic() < until and not (tmp_path / "cut/checkpoints/step-000002").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "`tinytrainer resume cut` goes on" in stderr and "Traceback" not in stderr, (
        stderr
    )
    assert Run.open(tmp_path / "cut").status == "interrupted"
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "cut"]) == 0
    assert Run.open(tmp_path / "cut").status == "finished" and Run.open(tmp_path / "cut").step == 30


def test_a_notebook_runs(notebook, monkeypatch):
    done = shell("run", notebook.name, "-p", "steps", "41", cwd=notebook.parent)
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(notebook.parent / "demo/notebook.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.split() == ["42", "None", ".", sys.executable]
    (notebook.parent / "values.yaml").write_text("steps: 1\nlimit: 5\n", encoding="utf-8")
    monkeypatch.chdir(notebook.parent)
    assert main(["run", notebook.name, "-f", "values.yaml", "-p", "steps", "2"]) == 0
    executed = nbformat.read(notebook.parent / "demo-2/notebook.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.split()[:2] == ["3", "5"], "the folder demo was there already"


def test_wrong_parameters_and_failing_cells(notebook, monkeypatch, capsys):
    monkeypatch.chdir(notebook.parent)
    run = lambda *p: (main(["run", notebook.name, "-p", *p]), capsys.readouterr().err)
    status, stderr = run("step", "4")
    assert status == 2 and stderr.count("\n") == 1 and "step: no such parameter" in stderr, stderr
    assert "steps (3), limit (None), out ('runs/x')" in stderr
    status, stderr = run("steps", "many")
    assert status == 2 and "a whole number" in stderr and not Path("demo").exists()
    status, stderr = run("steps", "200")
    assert (
        status == 2
        and "AssertionError: too many" in stderr.splitlines()[-1]
        and "demo/notebook.ipynb" in stderr.replace("\\", "/")
    )


def test_exact_answer_on_prose_is_remarked(tmp_path, capsys):
    "A zero that no training could raise; a reference with a number gets no remark"
    from tinytrainer_nb.all import evaluate, load_model

    model, tokenizer = load_model("tiny", quantization="none", verbose=False)
    for answer, remarked in (("For a month.", True), ("For 30 days.", False)):
        evaluate(model, tokenizer, [dict(prompt="How long?", completion=answer)], "exact_answer", max_new_tokens=4)
        assert ("exact_answer compares final answers" in capsys.readouterr().err) is remarked


def test_paths_of_parameters_hold_from_anywhere(tmp_path, monkeypatch):
    from tinytrainer_nb.notebooks import anchor_paths

    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "tiny").mkdir()
    assert anchor_paths(dict(data="texts", base="tiny", name="texts")) == dict(
        data=str(tmp_path / "texts"), base="tiny", name="texts"
    )
    assert anchor_paths(dict(data="", base="nobody/nothing")) == dict(data="", base="nobody/nothing")


def in_shell(command: str, cwd: Path, **env) -> subprocess.CompletedProcess:
    "A line of the shell, with `tinytrainer` for this checkout's"
    ours = f"{shlex.quote(sys.executable)} -m tinytrainer_nb.cli"
    return subprocess.run(
        ["bash", "-c", re.sub(r"^tinytrainer ", f"{ours} ", command)],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_a_pipe_that_closes_ends_no_run(tmp_path, unbuffered):
    few = "--max_steps 1 --eval_steps 0 --save_steps 0 --sample_steps 0"
    train = f"tinytrainer sft --base {small_base()} --data own.jsonl --out run {few}"
    command = f"{train} 2>&1 | sleep 0; echo ${{PIPESTATUS[0]}}"
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    done = in_shell(command, tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.stdout.strip() == "0" and "Traceback" not in done.stderr, done
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_a_full_disk_behind_stdout_is_no_traceback(tmp_path):
    full = "stdout cannot be written (No space left on device)"
    for command in ("cache", "--version", "sft --help"):
        done = in_shell(f"tinytrainer {command} > /dev/full; echo $?", tmp_path)
        assert done.stdout.strip() == "2" and done.stderr.count("\n") == 1 and full in done.stderr, done
    done = in_shell("tinytrainer nothing 2> /dev/full; echo $?", tmp_path)
    assert done.stdout.strip() == "2" and not done.stderr, done
    done = in_shell("tinytrainer --help | head -c 1; echo ${PIPESTATUS[0]}", tmp_path)
    assert done.stdout.endswith("0\n") and not done.stderr, done


def refused(argv: list[str], capsys) -> str:
    "The one line that a command says when it refuses"
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("command", ["sft", "evaluate"])
def test_an_empty_variable_is_no_data(command, tmp_path, monkeypatch, capsys):
    '`--data "$UNSET"` trained on the project\'s own data'
    monkeypatch.chdir(tmp_path)
    assert "data=''" in refused([command, "--data", ""], capsys)


def test_the_generated_corpus_is_no_file(tmp_path, monkeypatch, capsys):
    "Its name passes for the recipe that generates it, as the documentation has it, and for no other"
    monkeypatch.chdir(tmp_path)

    def trained(recipe, args, load, data, lora, reward):
        raise TinyTrainerError(f"{recipe.name} on {data.data}")

    monkeypatch.setattr("tinytrainer_nb.cli._trained", trained)
    assert "pretrain on tinyworld" in refused(["pretrain", "--base", "new:tiny", "--data", "tinyworld"], capsys)
    assert "tinyworld: no such file or folder" in refused(["sft", "--data", "tinyworld"], capsys)
    assert "tinyworlds: no such file or folder" in refused(["pretrain", "--data", "tinyworlds"], capsys)
    assert "sft.jsonl: no such file" in refused(["sft", "--data", "sft.jsonl"], capsys)  # the project's own has a path


def test_a_score_that_is_none_is_json(tmp_path, monkeypatch, capsys):
    from tinytrainer_nb.recipes import evaluate

    def scored(*args, **kwargs):
        return evaluate.Evaluation("loss", math.nan, 3)

    monkeypatch.setattr(evaluate, "evaluate", scored)
    monkeypatch.setattr("tinytrainer_nb.model.load.load_model", lambda *args, **kwargs: (None, None))
    assert main(["evaluate", "--task", "loss", "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told == dict(task="loss", score=None, n=3)


def test_a_run_of_this_process_number_elsewhere_is_not_ours(tmp_path):
    me = Lock(tmp_path / "lock").me()
    told = dict(recipe="sft", settings={}, status="failed", created=1e9)
    elsewhere = me | dict(host="elsewhere", machine="0" * 16, boot="other")
    write_json(tmp_path / "run" / "run.json", told | dict(process=elsewhere))
    assert _begun_here(tmp_path / "run", 0) is None
    write_json(tmp_path / "run-2" / "run.json", told | dict(process=me))
    assert _begun_here(tmp_path / "run", 0).folder == tmp_path / "run-2"


def test_numbers_in_flags_are_read_as_settings_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "learning_rate=-0.0001 is not allowed" in refused(["sft", "--learning_rate", "-1e-4"], capsys)
    assert "whole number at least 1" in refused(["chat", "tiny", "--max_new_tokens", "0"], capsys)
    assert "whole number at least 0" in refused(["evaluate", "--limit", "-1"], capsys)
    assert "nothing.jsonl" in refused(["evaluate", "--limit", "1e1", "--data", "nothing.jsonl"], capsys)
    assert "nothing.jsonl" in refused(["evaluate", "--max_new_tokens", "1e3", "--data", "nothing.jsonl"], capsys)
    assert "weight_decay" in refused(["sft", "--weight_decay", "1e300"], capsys)


def test_a_configuration_is_read_as_data_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text('\ufeff{"max_steps": 3, "data": "nothing.jsonl"}', encoding="utf-8")
    assert "nothing.jsonl" in refused(["sft", "--config", "a.json"], capsys)
    Path("b.json").write_text('{"max_steps": 3, "max_steps": 4}')
    said = refused(["sft", "--config", "b.json"], capsys)
    assert "'max_steps' stands twice" in said and "Correct it there" in said
    assert "is no file" in refused(["sft", "--config", "."], capsys)
    assert "no such file" in refused(["sft", "--config", "c.json"], capsys)


def test_a_finished_run_is_not_offered_for_going_on(tmp_path, monkeypatch, capsys):
    "The process that began it is this one; in a container, where numbers come again, it only seems so"
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    few = "--max_steps 1 --eval_steps 0 --save_steps 0 --sample_steps 0 --out run --data own.jsonl".split()
    command = ["sft", "--base", small_base(), *few]
    assert main(command) == 0
    capsys.readouterr()
    wrong = [*command, "--lora_layers", "0-100"]
    assert main(wrong) == 2 and "goes on" not in capsys.readouterr().err
    replaced = Path("run/run.json").read_text().replace('"finished"', '"stopped"')
    Path("run/run.json").write_text(replaced)
    time.sleep(1.1)  # it began before this command
    assert main(wrong) == 2 and "goes on" not in capsys.readouterr().err
