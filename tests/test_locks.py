"""Who trains into a folder: known across a clock that was set, containers, other hosts and file systems without locks.
Most children import the lock alone, so they are there at once."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from live import until
from small import small_base

from tinytrainer_nb import core
from tinytrainer_nb.core import (
    TinyTrainerError,
    read_json,
    sync_folder,
    whole_folder,
    write_json,
)
from tinytrainer_nb.runs import lock as lock_module
from tinytrainer_nb.runs.lock import Lock, TakenOver, _alive, _me, _seen, is_me
from tinytrainer_nb.runs.run import Run

fcntl = pytest.importorskip("fcntl", reason="Windows locks otherwise")
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="ticks and namespaces are Linux's")
HOLD = """
import sys
from tinytrainer_nb.runs.lock import Lock
lock = Lock(sys.argv[1])
lock.take()
print("taken", flush=True)
{more}
sys.stdin.read()
"""


@contextlib.contextmanager
def holding(path: Path, more: str = "", before: tuple = ()):
    "A process that holds a lock, until it is killed here"
    code = HOLD.format(more=more)
    command = [*before, sys.executable, "-c", code, str(path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "taken\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def by_hand(folder: Path, process, status: str = "running") -> Run:
    "A run of which there is no more than a reader needs"
    told = dict(recipe="sft", settings=dict(max_steps=5), status=status, process=process, may_change=["learning_rate"])
    write_json(folder / "run.json", told)
    return Run.open(folder)


def refused(f, *args, **kwargs) -> str:
    with pytest.raises(TinyTrainerError) as error:
        f(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("step", [3.0, -3600.0, 86400.0 * 400])
def test_a_clock_that_was_set(tmp_path, monkeypatch, step):
    "Forwards, backwards, by more than a year: the living stay alive, the dead stay dead"
    with holding(tmp_path / "lock"):
        run = by_hand(tmp_path, read_json(tmp_path / "lock"))
        plain = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self, *a, **k: plain(self, *a, **k) + step)
        assert run.status == "running" and run.lock.holder()
        assert "is training into this folder" in refused(run.lock.take)
        monkeypatch.setattr(lock_module, "_is_held", lambda path: False)  # as where there are no such locks
        assert run.status == "running" and run.lock.holder()
    assert run.status == "interrupted" and run.lock.holder() is None
    run.lock.take()
    run.lock.release()


def test_three_answers():
    "Alive, gone, and not to be seen from here, which is never taken for gone"
    me = _me()
    elsewhere = dict(host="far-away", machine="0" * 16, boot="another")
    assert _seen(me) and is_me(me) and _alive(me)
    assert _seen(me | dict(ticks=me["ticks"] + 1)) is False  # the number was given again
    assert _seen(me | elsewhere) is None and not _alive(me | elsewhere)
    assert _seen(me | dict(pids="pid:[1]")) is None  # another container
    assert _seen(me | dict(boot="another")) is False  # this machine was started again
    assert _seen(me | dict(boot="another", machine="0" * 16)) is None  # another one of the same name
    assert _seen(me | dict(boot="another", host="far-away")) is None
    assert _seen(me | dict(host="renamed")) is True  # a laptop in another network: still this kernel
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert _seen(me | dict(pid=gone.pid)) is False


def test_a_zombie_is_gone():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = lock_module._stat(child.pid)[1]
    who = _me() | dict(pid=child.pid, ticks=ticks)
    assert _seen(who) is True
    child.stdin.close()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert _seen(who) is False
    child.wait()


def test_a_process_that_hides_is_not_gone(monkeypatch):
    "Where /proc shows one's own processes only, that of another user is there and has no start"
    monkeypatch.setattr(lock_module, "_stat", lambda pid: ("", None))
    monkeypatch.setattr(lock_module.os, "kill", lambda pid, number: None)
    assert _seen(_me() | dict(ticks=5)) is None

    def nobody(pid, number):
        raise ProcessLookupError

    monkeypatch.setattr(lock_module.os, "kill", nobody)
    assert _seen(_me() | dict(ticks=5)) is False


GARBAGE = [None, "process", 7, [], {}, dict(pid=None), dict(pid="1"), dict(pid=True), dict(pid=-1), dict(pid=0)]
GARBAGE += [
    dict(pid=2**70, started=1),
    dict(pid=1, started="yesterday"),
    dict(pid=1),
    dict(pid=1, started=None, host=3),
]
GARBAGE += [dict(pid=1, host=[], boot={}, pids=3, ticks="x", machine=None), dict(pid=1.0, started=2.0)]


@pytest.mark.parametrize("who", GARBAGE, ids=str)
def test_whatever_stands_for_a_process(tmp_path, who):
    "A stranger's file may hold anything: the run opens, and nothing is raised but a line"
    run = by_hand(tmp_path, who)
    write_json(tmp_path / "lock", who)
    try:
        assert run.status in ("interrupted", "running")
    except TinyTrainerError as e:
        assert "run.json: process" in str(e)
    with contextlib.suppress(TinyTrainerError):
        run.lock.take()
        run.lock.release()


@pytest.mark.parametrize("content", ["", "{", "\x00\xff", "[" * 100_000, '{"pid": 1' + "0" * 5000 + "}"])
def test_a_lock_file_that_was_cut(tmp_path, content):
    (tmp_path / "lock").write_text(content, encoding="latin1")
    lock = Lock(tmp_path / "lock")
    assert lock.holder() is None
    lock.take()
    assert lock.holder()["pid"] == os.getpid()
    lock.release()


def test_runs_of_an_earlier_version(tmp_path):
    "They knew the number and the start time only"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = dict(pid=child.pid, started=psutil.Process(child.pid).create_time())
    run = by_hand(tmp_path, who)
    write_json(tmp_path / "lock", who)
    assert run.status == "running" and "process" in refused(run.lock.take) and "process" in refused(run.claim)
    child.communicate(b"\n")
    assert run.status == "interrupted"
    run.claim()
    assert run.lock.is_mine
    run.lock.release()


def test_a_living_run_is_left_as_it_was(tmp_path):
    "Of a second resume nothing is seen: not in run.json, the requests, the lock, the journal"
    from tinytrainer_nb.recipes import train  # noqa: F401, adds `resume` to a run

    with holding(tmp_path / "lock"):
        run = by_hand(tmp_path, read_json(tmp_path / "lock"))
        run.stop()
        (tmp_path / "requests" / "broken.json").write_text("{")
        tree = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        before = tree()
        for again in run, Run.open(tmp_path):
            assert "is training into this folder" in refused(again.resume)
            assert "is training into this folder" in refused(again.resume, take_over=True)  # seen, so not asked for
        assert tree() == before and run.status == "running"


def test_before_the_lock_is_taken(tmp_path):
    "A process that has made a run and loads its model has no lock yet: nobody trains into its folder"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = _me() | dict(pid=child.pid, ticks=lock_module._stat(child.pid)[1], locked=False)
    run = by_hand(tmp_path, who)
    assert "is training into this folder" in refused(run.claim)
    write_json(tmp_path / "run.json", read_json(tmp_path / "run.json") | dict(process=who | dict(pids="pid:[1]")))
    assert run.status == "running" and "cannot be seen" in refused(run.claim)  # in another container
    child.communicate(b"\n")
    write_json(tmp_path / "run.json", read_json(tmp_path / "run.json") | dict(process=who))
    run.claim()
    run.lock.release()


def test_another_host_is_asked_for(tmp_path):
    "The line names host, process and the last event, and how to go on; said so, the run is taken over"
    far = _me() | dict(host="far-away\x1b[31m", boot="another", machine="0" * 16, pid=4711, locked=True)
    run = by_hand(tmp_path, far)
    write_json(tmp_path / "lock", far)
    run.journal.append("metrics", 3, loss=1.0)
    os.utime(tmp_path / "events.jsonl", (1.7e9, 1.7e9))
    assert run.status == "running"
    for f in run.lock.take, run.claim:
        said = refused(f)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(1.7e9))
        assert all(part in said for part in ("4711", "far-away", when, "take_over=True", "--take-over"))
        assert "\x1b" not in said
    assert read_json(tmp_path / "lock")["pid"] == 4711
    run.claim(take_over=True)
    assert is_me(run.lock.holder())
    run.lock.release()
    assert not run.lock.path.exists()


def can(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run([*command, "true"], capture_output=True).returncode == 0


CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.mark.skipif(not can(*CONTAINER), reason="no rights to make a namespace of processes")
@pytest.mark.parametrize("table", ["its own /proc", "the host's /proc"])
def test_a_container_on_the_same_folder(tmp_path, table):
    "Its process has another number there, or is process 1 as all others are; the system's lock shows it"
    container = CONTAINER if table == "its own /proc" else CONTAINER[:-1]
    with holding(tmp_path / "lock", before=container):
        who = read_json(tmp_path / "lock")
        run = by_hand(tmp_path, who)
        assert who["pid"] < 10 and who["pids"] != _me()["pids"]
        assert run.status == "running" and "is training into this folder" in refused(run.lock.take, take_over=True)
    assert run.status == "interrupted" and run.lock.holder() is None  # it had the lock, which is free
    run.lock.take()
    code = "import sys; from tinytrainer_nb.runs.lock import Lock; print(Lock(sys.argv[1]).holder()['pid'])"
    inside = [*container, sys.executable, "-c", code, str(tmp_path / "lock")]
    assert int(subprocess.run(inside, capture_output=True, text=True).stdout) == os.getpid()
    run.lock.release()
    write_json(tmp_path / "run.json", read_json(tmp_path / "run.json") | dict(process=who | dict(locked=False)))
    assert run.status == "running" and "cannot be seen" in refused(run.claim)  # it had no lock of the system


FORK = """
import os, time
if not os.fork():
    print("child", os.getpid(), flush=True)
    time.sleep(60)
"""
MULTIPROCESSING = """
import multiprocessing, time
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
print("child", child.pid, flush=True)
"""
PROGRAM = """
import subprocess
print("child", subprocess.Popen(["sleep", "60"], close_fds=False).pid, flush=True)
"""
LEAVE_A_CHILD = dict(fork=FORK, multiprocessing=MULTIPROCESSING, program=PROGRAM)


@pytest.mark.parametrize("kind", LEAVE_A_CHILD)
def test_a_child_does_not_keep_the_lock(tmp_path, kind):
    "A worker that outlives its killed parent; while the parent lives, the child changes nothing"
    with holding(tmp_path / "lock", more=LEAVE_A_CHILD[kind]) as parent:
        child = int(parent.stdout.readline().split()[1])
        time.sleep(0.2)
        assert Lock(tmp_path / "lock").holder()["pid"] == parent.pid
        refused(Lock(tmp_path / "lock").take)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert psutil.pid_exists(child)
        try:
            assert Lock(tmp_path / "lock").holder() is None
            lock = Lock(tmp_path / "lock")
            lock.take()
            lock.release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_who_reads_the_folder_does_not_drop_the_lock(tmp_path):
    "Locks of POSIX would go with the first file that is closed: a copy of a living run's folder would end its lock"
    lock = Lock(tmp_path / "run" / "lock")
    lock.path.parent.mkdir()
    lock.take()
    (tmp_path / "run" / ".held").read_bytes()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with open(tmp_path / "run" / ".held", "rb+"):
        pass
    code = "import sys; from tinytrainer_nb.runs.lock import Lock; print(Lock(sys.argv[1]).is_held)"
    asked = [sys.executable, "-c", code, str(lock.path)]
    assert subprocess.run(asked, capture_output=True, text=True).stdout == "True\n"
    refused(Lock(lock.path).take)  # nor can this process take it twice
    lock.release()
    lock.release()
    assert not lock.path.exists() and Lock(lock.path).holder() is None


def test_another_may_have_taken_over(tmp_path):
    "Whoever wakes finds another description, ends, and leaves the folder to the other"
    lock = Lock(tmp_path / "lock")
    lock.take()
    lock.need_mine()
    lock.path.unlink()
    lock.need_mine()  # somebody has tidied up; the system's lock is still held
    other = _me() | dict(pid=4711, host="far-away", boot="another")
    write_json(lock.path, other)
    with pytest.raises(TakenOver, match="4711 on far-away has taken this run over"):
        lock.need_mine()
    lock.release()
    assert read_json(lock.path) == other


@pytest.mark.parametrize("made", [lambda p: p.mkdir(), lambda p: p.symlink_to("/nowhere/file"), lambda p: os.mkfifo(p)])
def test_a_strangers_held(tmp_path, made):
    "A folder, a link or a pipe in the place of the locked file: a line, or a lock; nothing hangs, no link is followed"
    made(tmp_path / ".held")
    lock = Lock(tmp_path / "lock")
    assert lock.holder() is None
    try:
        lock.take()
    except TinyTrainerError as e:
        assert "cannot be locked" in str(e)
    lock.release()


@pytest.fixture
def no_locks(monkeypatch):
    "A file system that has no locks, as some network drives"

    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)


def test_without_locks_the_description_decides(tmp_path, no_locks):
    lock = Lock(tmp_path / "lock")
    lock.take()
    assert not lock.me()["locked"] and not lock.is_held and lock.holder()["pid"] == os.getpid()
    refused(Lock(lock.path).take)
    lock.release()
    write_json(lock.path, _me() | dict(pids="pid:[1]", locked=False))
    assert lock.holder() and "cannot be seen" in refused(lock.take)
    lock.take(take_over=True)
    lock.release()


def test_a_preparation_elsewhere_is_left_alone(tmp_path):
    "The hidden folder of a run that is prepared in another container or on another host; only the dead one's goes"
    from tinytrainer_nb.all import SFTArgs

    folders = {name: tmp_path / f".run.{n}-1.partial" for n, name in enumerate(("dead", "far", "old"), 999_999_991)}
    for folder in folders.values():
        folder.mkdir()
    write_json(folders["dead"] / "lock", _me() | dict(ticks=1))
    write_json(folders["far"] / "lock", _me() | dict(host="far-away", boot="another"))
    with Run.prepare(tmp_path / "run", "none", SFTArgs(), may_change=[]) as run:
        inside = run.folder
        assert run.lock.is_mine and Lock(inside / "lock").holder()
    assert {name for name, folder in folders.items() if folder.exists()} == {"far"}
    made = Run.open(tmp_path / "run")
    assert made.lock.holder() is None and not made.lock.path.exists() and made.info["process"]["locked"] is False
    with made.session(0):
        assert made.info["process"]["locked"] is True


CANNOT = ["EINVAL", "ENOTSUP", "EPERM", "EACCES", "ENOSYS", "EBADF"]


@pytest.mark.parametrize("name", CANNOT)
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, name, call):
    plain = getattr(os, call)

    def cannot(what, *args, **kwargs):
        is_folder = os.path.isdir(what if call == "open" else f"/proc/self/fd/{what}")
        if is_folder:
            raise OSError(getattr(errno, name), name)
        return plain(what, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(core.os, call, cannot)
        write_json(tmp_path / "a.json", dict(a=1))
        with whole_folder(tmp_path / "folder") as folder:
            write_json(folder / "b.json", dict(b=2))
        run = by_hand(tmp_path / "run", _me())
        with run.session(0):
            run.log("metrics", 1, loss=1.0)
    assert read_json(tmp_path / "a.json") == dict(a=1) and read_json(tmp_path / "folder" / "b.json") == dict(b=2)


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
def test_a_full_or_broken_disk_is_an_error(tmp_path, monkeypatch, name):
    def broken(handle):
        raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(core.os, "fsync", broken)
    with pytest.raises(OSError, match=name):
        sync_folder(tmp_path)
    with pytest.raises(OSError, match=name):
        write_json(tmp_path / "a.json", dict(a=1))


def test_rights_that_a_drive_does_not_have(tmp_path, monkeypatch):
    def no_rights(self, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", no_rights)
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "folder" / "a").read_text() == "a"


PAIRS = """
import errno, os, random, sys, time
import psutil
from tinytrainer_nb.core import TinyTrainerError, write_json
from tinytrainer_nb.runs import lock as module
from tinytrainer_nb.runs.lock import Lock, _me

folder, tries, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.chdir(folder)
plain = psutil.Process.create_time

def none(*args): raise OSError(errno.ENOLCK, "No locks available")
if kind == "without locks": module.fcntl.flock = none

def work(number, turn):
    chance = random.Random(1000 * turn + number)
    shift = chance.choice([0.0, 3.0, -7200.0, 1e7])
    psutil.Process.create_time = lambda self, *a, **k: plain(self, *a, **k) + shift
    module.write_json = lambda *args: (time.sleep(chance.random() * 0.002), write_json(*args))
    lock, had = Lock("lock"), 0
    for _ in range(2):
        try: lock.take()
        except TinyTrainerError: time.sleep(chance.random() * 0.004); continue
        os.close(os.open("inside", os.O_CREAT | os.O_EXCL)) # nobody else is
        had += 1
        time.sleep(chance.random() * 0.004)
        os.unlink("inside")
        if chance.random() < 0.4: os._exit(10 + had) # killed, with the lock in its hands
        lock.release()
    os._exit(10 + had)

taken = 0
for turn in range(tries):
    children = []
    for number in range(2):
        child = os.fork()
        if not child:
            try: work(number, turn)
            except BaseException as e: print(turn, type(e).__name__, e, flush=True)
            os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert all(10 <= code <= 13 for code in codes), (turn, codes)
    assert sum(codes) > 20, (turn, "nobody came in")
    taken += sum(codes) - 20
print("taken", taken)
"""


@pytest.mark.parametrize(
    "kind, tries", [pytest.param("with locks", 200, marks=pytest.mark.slow), ("with locks", 40), ("without locks", 60)]
)
def test_two_never_train_into_one_folder(tmp_path, kind, tries):
    """Two processes, each with a clock of its own, want the same folder again and again; many are killed while they
    have it. There is never more than one inside, and always somebody gets in."""
    (tmp_path / "pairs.py").write_text(PAIRS)
    (tmp_path / "run").mkdir()
    command = [sys.executable, str(tmp_path / "pairs.py"), str(tmp_path / "run"), str(tries), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= tries


SEPARATE = """
import os, random, sys, time
import psutil
plain, shift = psutil.Process.create_time, float(sys.argv[2])
psutil.Process.create_time = lambda self, *a, **k: plain(self, *a, **k) + shift
from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.runs.lock import Lock
print("ready", flush=True)
sys.stdin.readline()
lock = Lock(sys.argv[1] + "/lock")
try: lock.take()
except TinyTrainerError: sys.exit(3)
os.close(os.open(sys.argv[1] + "/inside", os.O_CREAT | os.O_EXCL))
time.sleep(0.3) # longer than the other one waits
os.unlink(sys.argv[1] + "/inside")
os._exit(4) # killed
"""


@pytest.mark.slow
def test_two_programs_never_train_into_one_folder(tmp_path):
    "The same with programs that have nothing in common but the folder: one comes in, the other one is refused"
    for turn in range(200):
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", SEPARATE, str(tmp_path), shift],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for shift in ("0", "3")
        ]
        for child in pair:
            assert child.stdout.readline() == "ready\n"
        for child in pair:
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in pair:
            child.communicate()
        assert sorted(child.returncode for child in pair) == [3, 4], turn


@pytest.fixture(scope="module")
def policy():
    from tinytrainer_nb.all import LoraArgs, add_lora, load_model

    def made():
        model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
        return add_lora(model, LoraArgs(r=2)), tokenizer

    return made


def begun(policy, out: Path, **settings):
    "A live run of many short steps"
    from tinytrainer_nb.all import SFTArgs, sft

    rows = [dict(prompt=f"How much is {i} + 1?", completion=str(i + 1)) for i in range(8)]
    usual = dict(max_steps=2000, batch_size=2, save_steps=0, eval_steps=0, sample_steps=0)
    run = sft(*policy(), rows, SFTArgs(out=str(out), **usual | settings), live=True)
    until(lambda: run.step >= 2)
    return run


def test_a_training_that_was_taken_over(tmp_path, policy):
    "It ends by itself, and what the other process has written stays"
    run = begun(policy, tmp_path / "run")
    assert run.lock.is_mine and Run.open(run.folder).lock.holder()["locked"]
    before = (run.folder / "run.json").read_bytes()
    other = _me() | dict(pid=4711, host="far-away", boot="another")
    write_json(run.folder / "lock", other)
    with pytest.raises(TakenOver):
        run.wait(60)
    assert (run.folder / "run.json").read_bytes() == before and read_json(run.folder / "lock") == other
    assert not run.lock.is_held and not [e for e in run.events if e["kind"] == "error"]


def test_a_run_of_another_host_from_the_terminal(tmp_path, policy, capsys):
    "Refused with status 2 and one line, and nothing is changed; with --take-over it goes on"
    from tinytrainer_nb.cli import main

    run = begun(policy, tmp_path / "run", max_steps=8, batch_size=1)
    run.stop()
    run.wait()
    far = _me() | dict(host="far-away", boot="another", machine="0" * 16, pid=4711, locked=True)
    write_json(run.folder / "run.json", run.info | dict(status="running", process=far))
    write_json(run.folder / "requests" / "1-pause.json", dict(action="pause", asked=1.0))
    before = (run.folder / "run.json").read_bytes()
    capsys.readouterr()
    assert main(["resume", str(run.folder)]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "far-away" in line]
    assert len(err) == 1 and "--take-over" in err[0]
    assert (run.folder / "run.json").read_bytes() == before and list((run.folder / "requests").iterdir())
    assert main(["resume", str(run.folder), "--take-over"]) == 0
    assert Run.open(run.folder).status == "finished" and not (run.folder / "lock").exists()


def test_a_resume_that_fails_gives_the_lock_back(tmp_path, policy, monkeypatch):
    from tinytrainer_nb.recipes import train

    run = begun(policy, tmp_path / "run", max_steps=50)
    run.stop()
    run.wait()
    before = (run.folder / "run.json").read_bytes()

    def gone(run):
        raise TinyTrainerError("the base is gone")

    with monkeypatch.context() as m:
        m.setattr(train, "at_start", gone)
        for live in False, True:
            assert refused(run.resume, live=live) == "the base is gone"
            assert not run.lock.is_held and not run.lock.path.exists()
            assert (run.folder / "run.json").read_bytes() == before
    again = Run.open(run.folder).resume()
    assert again.status == "finished" and json.loads(before)["status"] == "stopped"
