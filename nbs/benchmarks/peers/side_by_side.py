"""What the benchmark notebooks share: a contender in a process of its own, models that others can load, the line that
names the machine."""

import inspect
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tinytrainer_nb.core import TinyTrainerError, quiet

HERE = Path(__file__).resolve().parent
LARGE_PAGES = dict(THP_MEM_ALLOC_ENABLE="1")
# What importing the package adds to the environment of its own processes
OURS = LARGE_PAGES | dict(ONEDNN_PRIMITIVE_CACHE_CAPACITY="256", LRU_CACHE_CAPACITY="256")
# Of glibc: bytes from which memory is mapped afresh, and given back; heaps
GLIBC = dict(MALLOC_MMAP_THRESHOLD_=str(2**32), MALLOC_TRIM_THRESHOLD_=str(2**34), MALLOC_ARENA_MAX="1")
KEPT = GLIBC | LARGE_PAGES


def said(*command, env: dict | None = None) -> dict:
    """The last line of a Python process's output, as JSON; env: what is added to the environment. What the
    package sets is not handed on: it does so where it is imported, and others run as they do without it."""
    plain = {name: value for name, value in os.environ.items() if OURS.get(name) != value}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=plain | (env or {}),
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def called(function, *arguments, env: dict | None = None) -> dict:
    "What a function prints that runs in a process of its own."
    return said("-c", f"{inspect.getsource(function)}\n{function.__name__}(*{arguments!r})", env=env)


def peer(script: str, *arguments, env: dict | None = None) -> dict:
    "What one of the scripts beside this one prints."
    return said(HERE / script, *arguments, env=env)


def listed(parameter: str, text: str, allowed, least: int = 0) -> list[str]:
    """What a notebook's parameter lists, separated by commas; raises `TinyTrainerError` for a name that is not
    allowed, and for fewer than `least`."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in found if name not in allowed]:
        raise TinyTrainerError(f"{parameter}={text!r} is not allowed: {wrong[0]!r} is none of {', '.join(allowed)}.")
    if len(found) < least:
        raise TinyTrainerError(
            f"{parameter}={text!r} is not allowed: it must name at least {least} of {', '.join(allowed)}."
        )
    return found


def cases_of(text: str, turns: int, *quantizations: str) -> list[tuple]:
    """The cases of a notebook, (folder, quantization, steps), or (folder, steps) without quantizations; raises
    `TinyTrainerError` before anything is measured."""
    if turns < 1:
        raise TinyTrainerError(f"turns={turns} is not allowed: it must be at least 1.")
    form, parts, cases = (
        ("FOLDER:QUANTIZATION:STEPS, such as tiny:none:3", 3, [])
        if quantizations
        else ("FOLDER:STEPS, such as tiny:3", 2, [])
    )
    among = f", and a quantization of {' or '.join(quantizations)}" if quantizations else ""
    for case in map(str.strip, text.split(",")):
        base, *rest = case.rsplit(":", parts - 1)
        if (
            len(rest) != parts - 1
            or not rest[-1].isdecimal()
            or int(rest[-1]) < 2
            or any(q not in quantizations for q in rest[:-1])
        ):
            raise TinyTrainerError(f"cases={case!r} is not allowed: it must be {form}, with at least 2 steps{among}.")
        if base != "tiny" and not (Path(base) / "config.json").exists():
            raise TinyTrainerError(
                f"cases={case!r} is not allowed: {base} holds no model (no config.json). Name tiny or a model's folder."
            )
        cases.append((base, *rest[:-1], int(rest[-1])))
    return cases


def loadable(base: str, folder: Path) -> str:
    "A model's folder for those who do not know the name `tiny`; with a chat template."
    if base != "tiny":
        return base
    from tinytrainer_nb.all import load_model

    if not (copy := Path(folder) / "tiny").exists():
        model, tokenizer = load_model(base, quantization="none", dtype="bf16", verbose=False)
        with quiet():
            model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
    return str(copy)


def median_of(found: list[dict], name: str) -> dict:
    "The run in the middle by one figure, with all values of that figure as `turns`."
    return sorted(found, key=lambda r: r[name])[len(found) // 2] | dict(turns=[r[name] for r in found])


def times(one: dict, other: dict) -> str:
    """One figure over another's, turn by turn, for the machine is not equally fast all the time: the median, and
    behind it the range."""
    found = sorted(a / b for a, b in zip(one["turns"], other["turns"]))
    return f"{statistics.median(found):.1f}x" + (f" ({found[0]:.1f} to {found[-1]:.1f})" if len(found) > 1 else "")


def best_of(probes: list[dict]) -> dict:
    "What a machine can do: the best of some probes, for others use it, too, and none can make it faster."
    best = lambda name, values: (
        values[0] if not isinstance(values[0], (int, float)) else min(values) if name.endswith("_ms") else max(values)
    )
    return {name: best(name, [p[name] for p in probes]) for name in probes[0]}


def kept_table(path: Path, table) -> str:
    "The table of published results; a sentence where there are none."
    return (
        table(json.loads(Path(path).read_text(encoding="utf8")))
        if Path(path).exists()
        else "There are no published results."
    )


def product_weights(config) -> tuple[int, int]:
    "Numbers in the matrix products of a Llama-like model: of all blocks, of the head."
    width, head_dim = (
        config.hidden_size,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    queries, values = head_dim * config.num_attention_heads, head_dim * config.num_key_value_heads
    return config.num_hidden_layers * (
        2 * width * queries + 2 * width * values + 3 * width * config.intermediate_size
    ), config.vocab_size * width


def machine(kept: dict) -> str:
    "The machine that figures were taken on, in a line."
    hardware, limits = kept["hardware"], kept["limits"]
    small = (
        f" in large pages, in {limits['fresh_46mb_small_ms']:.0f} in small ones"
        if "fresh_46mb_small_ms" in limits
        else ""
    )
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    return (
        f"{where}, torch {kept['versions']['torch']}; {limits['bf16_gflops']:.0f} GFLOP/s in bf16, "
        f"{limits['fp32_gflops']:.0f} in fp32, {limits['copy_gb_s']:.0f} GB/s; 46 MB of fresh memory "
        f"in {limits['fresh_46mb_ms']:.0f} ms{small}. Median of {kept['turns']}."
    )
