"""Processes forked from one that has imported the library: what every kernel would take seconds for is done once."""
import multiprocessing
import os
import signal
import sys


def forking():
    "The context whose processes know the library when they begin"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinytrainer_nb.all", "ipykernel.kernelapp"])
    return context


class Kernel:
    "A kernel as `jupyter_client` would launch it, with as much of a `subprocess.Popen` as it asks for"
    stdin = stdout = stderr = None

    def __init__(self, command: list[str], env: dict, cwd: str | None = None, **_):
        context = forking()
        ready, tell = context.Pipe(duplex=False)
        self.process = context.Process(target=_serve, args=(command[command.index("-f") + 1], dict(env), str(cwd or os.getcwd()), tell))
        self.process.start()
        self.pid, _ = self.process.pid, ready.recv()  # its process group is its own now: who ends it ends nobody else

    def poll(self): return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int): os.kill(self.pid, number)

    def terminate(self): self.send_signal(signal.SIGTERM)

    def kill(self): self.send_signal(signal.SIGKILL)


def _serve(connection_file: str, env: dict, cwd: str, tell) -> None:
    os.setsid(); tell.send(True)
    os.environ.clear(); os.environ.update(env); os.chdir(cwd)
    sys.argv = ["ipykernel_launcher.py", "-f", connection_file]
    from ipykernel.kernelapp import launch_new_instance
    launch_new_instance()
