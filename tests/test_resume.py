"""A run killed at a random step and resumed ends with the same adapter, bit for bit, as one that was never interrupted."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "max_steps=12, save_steps=3, sample_steps=4, warmup_steps=2, seed=3, out={out!r}"
PROGRAM = {
    "sft": "sft(m, t, data_file('sft.jsonl'), SFTArgs(batch_size=4, eval_steps=5, " + SETTINGS + "))",
    "ppo": "ppo(m, t, data_file('rl.jsonl'), 'exact_answer=1,reference_overlap=0.5', PPOArgs(batch_size=4, num_generations=2, max_new_tokens=32, epochs=2, minibatches=2, " + SETTINGS + "))",
}


def python(code: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def start(recipe: str, out: Path) -> subprocess.Popen:
    "The program in a process of its own: nf4, dropout on, so that the random state matters too"
    return python("from tinytrainer_nb.all import *\nm, t = load_model('tiny', quantization='nf4', verbose=False)\n"
                  "m = add_lora(m, LoraArgs(r=4, dropout=0.1))\n" + PROGRAM[recipe].format(out=str(out)))


def finish(process: subprocess.Popen) -> str:
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0, text
    return text


def kill_after(process: subprocess.Popen, run: Path, step: int) -> None:
    "SIGKILL when the journal knows `step`, at whatever moment that is"
    while process.poll() is None:
        events = run / "events.jsonl"
        if events.exists() and f'"step": {step}, "kind": "metrics"' in events.read_text(encoding="utf8"): break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL) if process.poll() is None else None
    process.communicate()


def adapter(run: Path) -> bytes: return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("recipe", PROGRAM)
def test_killed_and_resumed_is_bit_equal(recipe, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(recipe, whole))
    step = random.Random().randint(1, 11)
    kill_after(start(recipe, broken), broken, step)
    from tinytrainer_nb.run import Run
    assert Run.open(broken).status == "interrupted", f"killed after step {step}"
    finish(python(f"from tinytrainer_nb.all import *\nRun.open({str(broken)!r}).resume()"))
    assert Run.open(broken).status == "finished"
    assert adapter(broken) == adapter(whole), f"killed after step {step}: another adapter"
    figures = [[(e["step"], e.get("loss"), e.get("reward")) for e in Run.open(r).events if e["kind"] == "metrics"] for r in (whole, broken)]
    assert figures[0] == figures[1]
