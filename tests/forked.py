"""Processes forked from one that has imported the library: what every kernel would take seconds for is done once."""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path


def forking():
    "The context whose processes know the library when they begin"
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")  # Windows: slower, and the same
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinytrainer_nb.all", "ipykernel.kernelapp"])
    return context


class Kernel:
    "A kernel as `jupyter_client` would launch it, with as much of a `subprocess.Popen` as it asks for"

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], env: dict, cwd: str | None = None, **_):
        context = forking()
        ready, tell = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve, args=(command[command.index("-f") + 1], dict(env), str(cwd or os.getcwd()), tell)
        )
        self.process.start()
        self.pid, _ = self.process.pid, ready.recv()  # its process group is its own now: who ends it ends nobody else

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int):
        os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _serve(connection_file: str, env: dict, cwd: str, tell) -> None:
    os.setsid()
    tell.send(True)
    gc.freeze()  # as in conftest.py
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["ipykernel_launcher.py", "-f", connection_file]
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


class Command:
    """`tinytrainer ARGV...` in processes that train together, with the variables that `accelerate launch` would set;
    as much of a `subprocess.Popen` as tests ask for"""

    def __init__(self, *argv, processes: int = 1, **env):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = lambda rank: (
            dict(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=processes,
                LOCAL_WORLD_SIZE=processes,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            if processes > 1
            else {}
        )
        self.folder, context = tempfile.TemporaryDirectory(), forking()
        self.said = Path(self.folder.name) / "said"
        self.processes = [
            context.Process(
                target=_command,
                args=(
                    [*map(str, argv)],
                    dict(os.environ) | env | {k: str(v) for k, v in together(rank).items()},
                    str(self.said),
                ),
            )
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    @property
    def returncode(self):
        return max(self.processes, key=lambda p: abs(p.exitcode or 0)).exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        said = self.said.read_text(encoding="utf8") if self.said.exists() else ""
        self.folder.cleanup()
        assert not late, f"not within {timeout} s: {said}"
        return said, None


def _command(argv: list[str], env: dict, said: str) -> None:
    _become(env, said, said)
    from tinytrainer_nb.cli import main

    sys.exit(main(argv))


class Script:
    "`python -c CODE ARGV...`, with as much of a `subprocess.Popen` as tests ask for"

    def __init__(self, code: str, *argv, **env):
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self.folder.name) / name for name in ("out", "err")]
        self.process = forking().Process(
            target=_script, args=(code, [*map(str, argv)], dict(os.environ) | env, *map(str, self.streams))
        )
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"not within {timeout} s"
        return tuple(path.read_text(encoding="utf8") for path in self.streams)


def _script(code: str, argv: list[str], env: dict, out: str, err: str) -> None:
    _become(env, out, err)
    sys.argv = ["-c", *argv]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _become(env: dict, out: str, err: str) -> None:
    "A process of one thread with these variables, that says what it says into these files."
    gc.freeze()
    os.environ.clear()
    os.environ.update(env)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    import torch

    torch.set_num_threads(1)
