"""What the tests of live runs share: waiting for another thread, and what of a run must not depend on who looked at
it."""

import time

TIMES = ("time", "seconds", "tokens_per_s", "mfu")  # what no two runs have in common


def until(condition, what: str = "what was waited for", seconds: float = 60) -> None:
    "Wait for something that another thread does"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def figures(run) -> list[dict]:
    "All figures of a run but times"
    return [
        {k: v for k, v in e.items() if k.partition("/")[0] not in TIMES} for e in run.events if e["kind"] == "metrics"
    ]


def adapter(run) -> bytes:
    return (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
