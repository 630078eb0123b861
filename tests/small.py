"""A base of two layers, for tests in which a run's course matters and not what it learns: the first two of the embedded
base, with its head, tokenizer and template."""

import functools
import json
import os
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file, save_file

from tinytrainer_nb.core import data_file, whole_folder, write_json

LAYERS = 2
ROWS = [dict(prompt=f"How many legs have {n} hens?", completion=f"{2 * n} legs") for n in range(2, 18)]


@functools.cache
def small_base() -> str:
    "Its folder, written once and shared by all test processes"
    folder = Path(os.environ["TINYTRAINER_CACHE"]) / "two_layers"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            write_small_base(folder)
    return str(folder)


def write_small_base(folder: Path) -> None:
    whole, tensors = data_file("tiny"), load_file(data_file("tiny") / "model.safetensors")
    kept = lambda name: not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    config = json.loads((whole / "config.json").read_text(encoding="utf8")) | dict(num_hidden_layers=LAYERS)
    with whole_folder(folder) as new:
        for path in whole.glob("*.json"):
            (new / path.name).write_bytes(path.read_bytes())
        write_json(new / "config.json", config)
        save_file({n: t for n, t in tensors.items() if kept(n)}, new / "model.safetensors", metadata={"format": "pt"})
