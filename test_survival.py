"""A run that was killed, stopped or starved and started again ends at the same bits as one that was not.

The slow tests (-m slow) do that to real runs at random moments, and print one table at their end.
"""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed as dist

import checkpoint
import cifar_train
import conftest
import data
import training
from conftest import HERE, torchrun_variables

SCRIPT = cifar_train  # what `start` runs
# Dropout, so that random numbers drawn in the net have to come back too; evaluated after 128 iterations and the end.
RUNS = {
    "cifar_train": (
        "--dataset synthetic --images 60 --depth 8 --unit basic-dropout-shortcut --batch-size 2 --micro-batch {micro} "
        "--iterations 256 --device cpu --checkpoint-seconds 0 --timeout 60"
    ),
    "imagenet_train": (
        "--dataset synthetic --images 60 --depth 18 --crop 32 --epochs 2 --batch-size 4 --micro-batch 2 --workers 1 "
        "--device cpu --checkpoint-seconds 0 --timeout 60"
    ),
}
SHORT = "--images 15 --iterations 64".split()  # a quarter of the first: evaluated after 32 iterations and the end
TINY = "--dataset synthetic --images 20 --depth 8 --batch-size 2 --iterations 12 --device cpu --checkpoint-seconds 0"
TABLE = []


def marked(words, printed, variables):
    """What `python words` does in a forked process, with the phase that it is in at the moment in a file. With the
    variable HELD, such as "writing 5", it stays in that phase, once there have been so many, until a signal comes: if
    writing, with the new file written and not yet in its place."""
    phases = os.open(f"{printed}.phase", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    held, after = variables.pop("HELD", "never 0").split()
    count, now = -1, None

    def mark(phase):
        nonlocal count, now
        count, now = count + 1, phase
        os.pwrite(phases, f"{count:06} {phase}\n".ljust(30).encode(), 0)

    def hold():
        while now == held and count >= int(after) and not checkpoint.stop.asked:
            time.sleep(0.001)

    save, evaluate, sync = checkpoint.Run.save, torch.nn.Module.eval, checkpoint.sync

    def marked_save(self, state):
        mark("writing")
        saved = save(self, state)
        mark("training")
        return saved

    def marked_eval(self):
        mark("evaluating")
        hold()
        return evaluate(self)

    def held_sync(descriptor):
        sync(descriptor)
        hold()

    checkpoint.Run.save, torch.nn.Module.eval, checkpoint.sync = marked_save, marked_eval, held_sync
    mark("starting")
    conftest.be(words, printed, variables)


@pytest.fixture(scope="module")
def fork():
    """Start a run in a process of its own. Returns that process."""
    started = []

    def begin(out, micro=2, script="cifar_train", more=(), **variables):
        words = [f"{script}.py", *RUNS[script].format(micro=micro).split(), "--out", out, *more]
        started.append(conftest.fork(*words, target=marked, printed=f"{out}.printed", **variables))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def complete(fork, out, **options):
    """Run to the end. Returns all that a finished run leaves, but for clocks and memory."""
    process = fork(out, **options)
    process.join(timeout=200)
    assert process.exitcode == 0, printed(out)
    return content(out)


def printed(out):
    return pathlib.Path(f"{out}.printed").read_text()


def phase(out):
    """How often the phase of a run has changed, and what it is now."""
    with contextlib.suppress(OSError, ValueError):
        count, now = pathlib.Path(f"{out}.printed.phase").read_text().split()
        return int(count), now
    return 0, "starting"


def content(out):
    clocks = ("waited", "seconds", "peak_memory")
    state, result = checkpoint.load(out), json.loads((out / "result.json").read_text())
    log = [line.rsplit(",", 2)[0] for line in (out / "log.csv").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in clocks} for row in state.pop("rows")]
    return *({k: v for k, v in kept.items() if k not in clocks} for kept in (state, result)), log, rows


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def undisturbed_folder(fork, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    complete(fork, out)
    return out


@pytest.fixture(scope="module")
def short_folder(fork, tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    complete(fork, out, more=SHORT)
    return out


@pytest.fixture(scope="module")
def undisturbed(undisturbed_folder):
    return content(undisturbed_folder)


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Prints the table after the slow tests, past pytest's capturing."""
    yield
    if TABLE:
        rows = "".join(f"| {what} | {passed} of {of} | {seen} |\n" for what, of, passed, seen in TABLE)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\n| what happened | survived | details |\n|---|---|---|\n{rows}")


@pytest.fixture
def report():
    """Add a row to the table, and fail unless all has passed."""

    def add(what, outcomes, seen):
        outcomes = list(outcomes)
        TABLE.append((what, len(outcomes), sum(outcomes), seen))
        assert all(outcomes), TABLE[-1]

    return add


def disturb(fork, out, number, want, after, wait, **options):
    """Start a run and send it a signal: when its phase is the wanted one ("any", "writing", "evaluating") after so many
    changes of phase, and some seconds later. Returns the phase that it hit and the exit status, -9 for a kill."""
    process = fork(out, **options)
    while process.is_alive() and not (phase(out)[0] >= after and want in ("any", phase(out)[1])):
        time.sleep(0.0005)
    time.sleep(wait)
    now = phase(out)[1]
    with contextlib.suppress(ProcessLookupError):  # it has finished
        os.kill(process.pid, number)
        time.sleep(0.1)
        os.kill(process.pid, number)  # torchrun and run_all.sh pass a Ctrl-C on to those that have had it
    process.join(timeout=20)  # the promise: 20 s
    return phase(out)[1] if number == signal.SIGKILL else now, process.exitcode


def moments(rng):
    """A random moment of each kind for `disturb`. A run's phase changes some 515 times: twice with every save."""
    return {
        "any": ("any", rng.randrange(510), rng.uniform(0, 0.05)),
        "starting": ("any", 0, rng.uniform(0, 0.5)),
        "writing": ("writing", rng.randrange(500), rng.uniform(0, 0.005)),
        "evaluating": ("evaluating", rng.choice((0, 505)), rng.uniform(0, 0.1)),
    }


def two_at_a_time(work, count):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(count)))


def tally(words):
    return ", ".join(f"{count} {word}" for word, count in sorted(collections.Counter(words).items()))


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGTERM))
def test_stopped_and_continued(fork, short_folder, number, tmp_path):
    """Two times: in the first evaluation, and in a save after it."""
    out = tmp_path / "run"
    for want, after in (("evaluating", 0), ("writing", 5)):
        _, status = disturb(fork, out, number, want, after, 0, more=SHORT, HELD=f"{want} {after}")
        assert status == (-9 if number == signal.SIGKILL else 128 + number), printed(out)
        assert not (out / "result.json").exists()  # the run was not over, or this test would show nothing
        assert 0 < checkpoint.load(out)["iteration"] < 64
    assert equal(complete(fork, out, more=SHORT), content(short_folder))
    assert not list(out.glob("*.tmp"))
    assert printed(out).count("the same command continues it") == (0 if number == signal.SIGKILL else 2)


def test_every_iteration_is_saved(short_folder):
    """With --checkpoint-seconds 0, evaluations or not: 64 and the end, two phases each, and 2 evaluations."""
    assert phase(short_folder)[0] == 2 * 65 + 2


def test_only_changed_code_is_modified(world_of_one, tmp_path, monkeypatch):
    """Pages that report.py writes, and new runs, do not make a clone's next run one of changed code."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", "-C", tmp_path]
    (tmp_path / "results").mkdir()
    for name in ("checkpoint.py", "results/units.py", "README.md"):
        (tmp_path / name).write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    assert checkpoint.environment({})["modified"] is False
    (tmp_path / "unpacked").mkdir()  # another copy, which lies in this clone and is none itself
    (tmp_path / "unpacked" / "checkpoint.py").write_text("2")
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "__file__", str(tmp_path / "unpacked" / "checkpoint.py"))
        made = checkpoint.environment({})
        assert made["modified"] is None and made["commit"] is None
    (tmp_path / "README.md").write_text("2")
    (tmp_path / "results" / "log.csv").write_text("2")
    assert checkpoint.environment({})["modified"] is False
    (tmp_path / "results" / "units.py").write_text("2")
    assert checkpoint.environment({})["modified"] is True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_is_heard_while_nothing_moves(fork, tmp_path):
    """By a process whose peer does not come, at once; and, the second time, by one whose peer halts."""
    alone = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    processes = {number: fork(tmp_path / "alone", micro=1, **alone) for number in checkpoint.SIGNALS}
    for process in processes.values():
        caught = 0
        while not caught >> signal.SIGUSR1 - 1 & 1:  # it listens
            time.sleep(0.001)
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    time.sleep(0.5)  # by now they wait
    for number, process in processes.items():
        os.kill(process.pid, number)
        process.join(timeout=10)
        assert process.exitcode == 128 + number
    workers, out = two_processes(fork, tmp_path / "run"), tmp_path / "run"
    await_checkpoints(out, 5, workers[0].is_alive)
    os.kill(workers[1].pid, signal.SIGSTOP)
    for seconds in (0.5, 1.5):  # after the first signal more than the second in which a second one is the same Ctrl-C
        time.sleep(seconds)
        assert workers[0].is_alive()
        os.kill(workers[0].pid, signal.SIGTERM)
    workers[0].join(timeout=10)
    assert workers[0].exitcode == 143 and 0 < checkpoint.load(out)["iteration"] < 256
    assert "ended at once" in printed(out) and printed(tmp_path / "alone").count("ended at once") == 3


def test_a_signal_that_also_stops_what_is_waited_for(start, monkeypatch):
    """Ctrl-C reaches --compile's compiler too, and what it breaks with is no error of the run."""

    def broken(args, device):
        checkpoint.stop.asked = signal.SIGINT
        raise error

    monkeypatch.setattr(cifar_train, "train", broken)
    error = torch._dynamo.exc.BackendCompilerFailed(print, KeyboardInterrupt(), None)
    status, printed = start(*TINY.split(), "--out", "run")
    assert status == 130 and "SIGINT: what was saved before stays" in printed
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):  # which is one
        start(*TINY.split(), "--out", "run")


def test_a_closed_error_stream_ends_nothing(start, monkeypatch):
    """The run is stopped and saved as if somebody read what it says."""
    reading, writing = os.pipe()
    os.close(reading)  # | head has gone
    closed = open(writing, "w", buffering=1)
    monkeypatch.setattr(checkpoint.Stop, "check", lambda self, due=None: (_ for _ in ()).throw(checkpoint.Stopped(15)))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", closed)
        assert start(*TINY.split(), "--out", "run")[0] == 143
    assert checkpoint.load("run")["iteration"] == 0
    with contextlib.suppress(BrokenPipeError):
        closed.close()


@pytest.mark.parametrize("stream", ("closed", "broken", "full"))
def test_a_process_ends_at_once_though_nobody_reads(stream):
    reading, writing = os.pipe()
    if stream == "full":
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
    process = os.fork()
    if not process:
        signal.setitimer(signal.ITIMER_REAL, 10)  # so that a failure does not hang
        os.close(reading)
        os.dup2(writing, 2)
        if stream == "closed":
            os.close(2)
        if stream == "broken":
            os.close(writing)
        checkpoint.end_at_once(signal.SIGTERM)
    os.close(writing)
    if stream == "broken":
        os.close(reading)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 143


def test_a_forked_child_does_not_listen(start):
    """A loader's worker: what asks the run to stop must not end it, nor pass for a signal to its parent."""
    assert start(*TINY.split(), "--out", "run")[0] == 0
    stop = checkpoint.stop
    stop.listen()
    child = os.fork()
    if child == 0:
        ignored = all(signal.getsignal(number) == signal.SIG_IGN for number in checkpoint.SIGNALS)
        os._exit(0 if ignored and signal.set_wakeup_fd(-1) == -1 else 1)
    assert os.waitpid(child, 0)[1] == 0 and stop.asked == 0
    assert all(signal.getsignal(number) != signal.SIG_IGN for number in checkpoint.SIGNALS)


@pytest.mark.slow
def test_kill_at_random_moments(fork, undisturbed, tmp_path, report):
    def one(i):
        rng, out, seen = random.Random(i), tmp_path / str(i), []
        for kind in (("any", "starting"), ("any",), ("any",), ("writing",), ("evaluating",))[i % 5]:
            now, status = disturb(fork, out, signal.SIGKILL, *moments(rng)[kind])
            seen.append(now if status == -9 else "finished before")
        return equal(complete(fork, out), undisturbed) and "damaged" not in printed(out), seen

    outcomes, seen = zip(*two_at_a_time(one, 50), strict=True)
    kills = sum(seen, [])
    report("`kill -9` at a random moment", outcomes, f"killed {len(kills)} times: {tally(kills)}; no file unreadable")


@pytest.mark.slow
def test_stop_at_random_moments(fork, undisturbed, tmp_path, report):
    def one(i):
        rng, out = random.Random(100 + i), tmp_path / str(i)
        kind = ("any", "any", "writing", "evaluating", "starting")[i % 5]
        moment = moments(rng)[kind]
        now, status = disturb(fork, out, signal.SIGTERM, *moment)
        # Before the run listens the signal's own effect ends it; before its first iteration there is nothing to save;
        # after its last one it finishes.
        good = status in (-15, 143) if now == "starting" else status == 143 and "saved in" in printed(out)
        if status == 0 and moment[1] >= 505:
            now, good = "finishing", (out / "result.json").exists()
        return good and equal(complete(fork, out), undisturbed), now

    outcomes, seen = zip(*two_at_a_time(one, 20), strict=True)
    report("SIGTERM at a random moment", outcomes, f"stopped within 20 s: {tally(seen)}")


def two_processes(fork, out, **options):
    """Start a run as two processes that find each other without torchrun."""
    variables = torchrun_variables(2)
    return [fork(out, micro=1, **options, **variables, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def await_checkpoints(out, count, alive):
    """Return once a run has written so many checkpoints more."""
    seen = set()
    while len(seen) <= count and alive():
        with contextlib.suppress(FileNotFoundError):
            seen.add((out / "checkpoint.pt").stat().st_mtime_ns)
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("script", RUNS)
def test_kill_a_random_rank(fork, script, tmp_path, report):
    """torchrun starts both processes again, until the run ends as one that nobody disturbed."""

    def complete_two(out):
        for worker in two_processes(fork, out, script=script):
            worker.join(timeout=200)
        return content(out)

    undisturbed, outcomes, killed, rng = complete_two(tmp_path / "undisturbed"), [], [], random.Random(0)
    for kills in (3, 2):
        out = tmp_path / str(kills)
        words = [*RUNS[script].format(micro=1).split(), "--out", str(out)]
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3".split()
        with open(f"{out}.printed", "a") as file:
            command = [sys.executable, *torchrun, f"{script}.py", *words]
            agent = subprocess.Popen(command, cwd=HERE, stdout=file, stderr=file, start_new_session=True)
        for _ in range(kills):
            count = rng.randrange(3, 60) if script == "cifar_train" else rng.randrange(2, 7)  # of 256 and of 30
            await_checkpoints(out, count, lambda agent=agent: agent.poll() is None)
            time.sleep(rng.uniform(0, 0.05))
            ranks = {}
            for path in pathlib.Path(f"/proc/{agent.pid}/task").glob("*/children"):
                for pid in map(int, path.read_text().split()):
                    environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    ranks |= {int(word[5:]): pid for word in environment if word.startswith(b"RANK=")}
            rank = rng.choice(sorted(ranks))
            os.kill(ranks[rank], signal.SIGKILL)
            killed.append(f"rank {rank}")
        status = agent.wait(timeout=200)
        good = status == 0 and equal(content(out), undisturbed)
        outcomes += [good] * kills
    report(f"`kill -9` of one of two processes of {script}.py, `torchrun --max-restarts 3`", outcomes, tally(killed))

    outcomes = []
    for rank in (0, 1):
        out = tmp_path / f"stopped {rank}"
        workers = two_processes(fork, out, script=script, more=("--checkpoint-seconds", "0.05"))
        await_checkpoints(out, 1, workers[0].is_alive)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(workers[rank].pid, signal.SIGTERM)
        for worker in workers:
            worker.join(timeout=20)
        stopped = [worker.exitcode for worker in workers] == [143, 143] and printed(out).count("saved in") == 1
        outcomes.append(stopped and equal(complete_two(out), undisturbed))
    report(f"SIGTERM to one of two processes of {script}.py", outcomes, "both agree on the iteration and save it")


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_ends_the_other(fork, tmp_path, report):
    """Without torchrun, so only the other process sees it. One that waits still ends within 20 s of a signal."""
    outcomes = []
    for number, timeout in ((signal.SIGKILL, 60), (signal.SIGSTOP, 5)):
        for rank in (0, 1):
            out = tmp_path / f"{number}-{rank}"
            workers = two_processes(fork, out, more=("--timeout", str(timeout)))
            await_checkpoints(out, 5, workers[0].is_alive)
            os.kill(workers[rank].pid, number)
            workers[1 - rank].join(timeout=40)
            told = f"process {1 - rank} lost another one, which died or does not answer" in printed(out)
            outcomes.append(workers[1 - rank].exitcode == 1 and told)
            workers[rank].kill()
    workers = two_processes(fork, tmp_path / "asked")
    await_checkpoints(tmp_path / "asked", 5, workers[0].is_alive)
    os.kill(workers[1].pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(workers[0].pid, signal.SIGTERM)
    workers[0].join(timeout=20)
    outcomes.append(workers[0].exitcode == 143)
    report(
        "one of two processes killed or halted without torchrun",
        outcomes,
        "the other says so, status 1; SIGTERM still heeded in 20 s",
    )


class Evil:
    """Runs a function when it is unpickled by whoever lets it."""

    def __init__(self, function, *words):
        self.reduced = function, words

    def __reduce__(self):
        return self.reduced


def malicious(mark):
    """Files that make `mark`, a path, when they are read carelessly."""
    code = f"open({str(mark)!r}, 'w').close()"
    evils = [Evil(os.system, f"touch '{mark}'"), Evil(eval, code), Evil(exec, code)]
    for evil in [*evils, {"nested": [1, (2, {"deep": evils[0]})]}]:
        yield pickle.dumps(evil)  # not even an archive
        for state in (evil, {"schema": checkpoint.SCHEMA, "flags": {}, "iteration": 1, "model": evil}):
            file = io.BytesIO()
            torch.save(state, file)
            yield file.getvalue()


def outside(whole, mark):
    """The archive with files more, whose names lead out of it."""
    for name in ("../evil", "../../evil", str(mark), "archive/../../evil"):
        file = io.BytesIO(whole)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(name, b"evil")
        yield file.getvalue()


def damaged(whole, rng, places):
    """The file cut off and with one bit flipped, each at random places; empty, zeroed, and with a zeroed block."""
    for at in rng.sample(range(len(whole)), places):
        yield whole[:at]
    for at in rng.sample(range(len(whole)), places):
        yield whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
    yield from (b"", bytes(len(whole)))
    at = len(whole) // 2
    yield whole[:at] + bytes(4096) + whole[at + 4096 :]


def read_all(folder, files):
    """Put each file in the newest checkpoint's place, then in both. Returns what came of each."""
    newest, previous = (folder / name for name in checkpoint.CHECKPOINTS)
    before, outcomes = [path.read_bytes() for path in (newest, previous)], []
    saved = [checkpoint.read(path) for path in (newest, previous)]
    for file in files:
        newest.write_bytes(file)
        loaded = checkpoint.load(folder)
        outcomes.append(
            "unchanged" if equal(loaded, saved[0]) else "refused" if equal(loaded, saved[1]) else "DIFFERENT"
        )
        if outcomes[-1] == "refused":
            previous.write_bytes(file)
            with pytest.raises(ValueError, match="no checkpoint can be read"):
                checkpoint.load(folder)
            previous.write_bytes(before[1])
    newest.write_bytes(before[0])
    return outcomes


def two_checkpoints(folder):
    run = checkpoint.Run(folder, {})
    run.begin({}, {})
    for iteration in (1, 2):
        run.save({"iteration": iteration, "model": {"w": torch.full((5000,), float(iteration))}})
    return run


def test_damaged_checkpoint_is_not_used(world_of_one, tmp_path):
    """Falls back to the one before; with none readable it stops and starts nothing anew."""
    assert checkpoint.load(tmp_path) is None
    for name in ("result.json.tmp", "notes.tmp"):
        (tmp_path / name).write_text("left over")
    run = two_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["notes.tmp"]  # what a run did not write is not its own
    newest = tmp_path / "checkpoint.pt"
    whole = newest.read_bytes()
    at = whole.index(torch.full((1,), 2.0).numpy().tobytes() * 8)  # within the weights
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    assert read_all(tmp_path, [flipped]) == ["refused"]
    assert set(read_all(tmp_path, damaged(whole, random.Random(0), 3))) <= {"refused", "unchanged"}
    newest.write_bytes(flipped)
    run.whole = False  # a new session: what is damaged must not take the place of what is whole
    run.save({"iteration": 3, "model": {}})
    assert checkpoint.load(tmp_path)["iteration"] == 3
    newest.write_bytes(b"")
    assert checkpoint.load(tmp_path)["iteration"] == 1
    newest.unlink()  # killed between the two renames
    assert checkpoint.load(tmp_path)["iteration"] == 1


def test_nothing_in_a_checkpoint_is_executed(world_of_one, tmp_path):
    mark = tmp_path / "mark"
    two_checkpoints(tmp_path)
    assert set(read_all(tmp_path, malicious(mark))) == {"refused"} and not mark.exists()
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    assert set(read_all(tmp_path, outside(whole, mark))) <= {"refused", "unchanged"} and not mark.exists()
    assert not list(tmp_path.parent.glob("**/evil"))
    for file in malicious(mark):  # they do what they are said to do
        with contextlib.suppress(RuntimeError):
            torch.load(io.BytesIO(file), weights_only=False)
        mark.unlink()


def test_a_checkpoint_of_another_run_or_version(start, tmp_path):
    """Refused by the names of what differs; never read, never replaced by a new beginning."""
    words = [*TINY.split(), "--out", "run"]
    assert start(*words)[0] == 0
    newest, result = tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "result.json"
    state = checkpoint.read(newest)
    changes = {
        "--lr is 0.3 there and 0.1 here": {"flags": state["flags"] | {"lr": 0.3}},
        "is of schema 99, and this code reads schema 1": {"schema": 99},
        "does not fit this code: RuntimeError": {"model": {"conv.weight": torch.zeros(1)}},
        "does not fit this code: KeyError: 'optimizer'": {"optimizer": None},
    }
    for message, change in changes.items():
        torch.save({k: v for k, v in (state | change).items() if v is not None}, newest)
        before = newest.read_bytes()
        result.unlink(missing_ok=True)
        status, printed = start(*words)
        assert status == 2 and message in printed and "Traceback" not in printed, printed
        assert newest.read_bytes() == before and not result.exists()


@pytest.mark.parametrize("error", (errno.ENOSPC, errno.EROFS, errno.EACCES))
@pytest.mark.parametrize("function", ("fsync", "replace"))
def test_what_cannot_be_written_ends_no_run(start, tmp_path, monkeypatch, error, function):
    """From a random write on, or only for a while: the old checkpoint stays, and status 1 says it."""
    rng = random.Random(f"{error} {function}")
    assert start(*TINY.split(), "--out", "whole")[0] == 0
    words, real = [*TINY.split(), "--out", "run"], getattr(os, function)
    first, calls = rng.randrange(6, 16), []

    def refuse(*words):
        calls.append(words)
        if first <= len(calls) < last:
            raise OSError(error, os.strerror(error))
        return real(*words)

    for last in (math.inf, first + 3):
        calls.clear()
        shutil.rmtree("run", ignore_errors=True)
        monkeypatch.setattr(os, function, refuse)
        status, printed = start(*words)
        monkeypatch.setattr(os, function, real)
        assert status == 1 and f"run/checkpoint.pt could not be written ([Errno {error}]" in printed
        assert printed.count("could not be written") <= 3  # once a file
        finished = (tmp_path / "run" / "result.json").exists()
        assert finished == (last < math.inf)
        assert 0 < checkpoint.load("run")["iteration"] < 12 or finished
        assert not list((tmp_path / "run").glob("*.tmp"))
        status, printed = start(*words)
        assert status == 0 and ("already finished" in printed) == finished
        assert equal(content(tmp_path / "run"), content(tmp_path / "whole"))


def test_a_log_that_cannot_be_written(start, tmp_path, monkeypatch):
    """The run is not finished before its log is on disk too."""
    assert start(*TINY.split(), "--out", "whole")[0] == 0
    words, write = [*TINY.split(), "--out", "run"], checkpoint.write

    def refuse(path, *more):
        if path.name == "log.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *more)

    monkeypatch.setattr(checkpoint, "write", refuse)
    status, printed = start(*words)
    assert status == 1 and "not finished: log.csv not written" in printed and not os.path.exists("run/result.json")
    monkeypatch.setattr(checkpoint, "write", write)
    assert start(*words)[0] == 0
    assert equal(content(tmp_path / "run"), content(tmp_path / "whole"))


def poison(monkeypatch, what, moment):
    """Make a number NaN in one iteration, of runs of one micro-batch."""
    count = iter(range(10**6))

    def loss(*words):
        return cross_entropy(*words) * (math.nan if next(count) == moment else 1)

    def augmented(*words):
        images = augment(*words)
        images[0, 0, 0, 0] += math.nan if next(count) == moment else 0
        return images

    def summed(values, *words, **more):  # the gradients of all processes
        if values.numel() > 1000 and next(count) == moment:
            values[values.numel() // 2] = math.nan
        return all_reduce(values, *words, **more)

    cross_entropy, augment, all_reduce = training.cross_entropy, data.augment, dist.all_reduce
    places = {"loss": (training, "cross_entropy", loss), "input": (data, "augment", augmented)}
    monkeypatch.setattr(*(places | {"gradient": (dist, "all_reduce", summed)})[what])


def survives_nan(start, what, moment, out):
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, what, moment)
        status, printed = start(*TINY.split(), "--micro-batch", 2, "--out", out)
    result, state = json.loads((out / "result.json").read_text()), checkpoint.load(out)
    named = status == 0 and "finished: diverged" in printed and result["diverged"] and result["test_error"] is None
    tensors = [*state["model"].values(), *(s["momentum_buffer"] for s in state["optimizer"]["state"].values())]
    good = state["iteration"] == moment and all(t.isfinite().all() for t in [*tensors, state["sums"]])
    return named and good


@pytest.mark.parametrize("what", ("loss", "gradient", "input"))
def test_nan_is_a_result_and_never_saved(start, tmp_path, what):
    assert survives_nan(start, what, 3, tmp_path / "run")


# The slow rows


@pytest.mark.slow
def test_damage_at_random_places(undisturbed_folder, world_of_one, tmp_path, report):
    shutil.copytree(undisturbed_folder, tmp_path / "run")
    mark, whole = tmp_path / "mark", (tmp_path / "run" / "checkpoint.pt").read_bytes()
    outcomes = read_all(tmp_path / "run", damaged(whole, random.Random(0), 20))
    report(
        "newest checkpoint cut off, with a bit flipped, empty, zeroed",
        (outcome != "DIFFERENT" for outcome in outcomes),
        f"{tally(outcomes)}; 0 read as anything else",
    )
    outcomes = read_all(tmp_path / "run", [*malicious(mark), *outside(whole, mark)])
    report(
        "malicious checkpoint",
        (outcome != "DIFFERENT" and not mark.exists() for outcome in outcomes),
        f"{tally(outcomes)}; 0 executed, 0 written elsewhere",
    )
    assert not list(tmp_path.parent.glob("**/evil"))


@pytest.mark.slow
def test_nan_at_random_moments(start, tmp_path, report):
    rng = random.Random(0)
    kinds = ["loss", "gradient", "input"] * 4
    outcomes = [survives_nan(start, kinds[i], rng.randrange(1, 12), tmp_path / str(i)) for i in range(10)]
    report("NaN in loss, gradient or input", outcomes, "ended as diverged, the last good checkpoint stays")


@pytest.mark.slow
def test_data_at_random_places(start, tmp_path, monkeypatch, report):
    """CIFAR-100's files in small, cut off, with a bit flipped, or missing while there is no network."""
    from torchvision.datasets import CIFAR100, cifar

    folder, rng = tmp_path / "data" / CIFAR100.base_folder, random.Random(0)
    folder.mkdir(parents=True)
    for name, n in (("train", 20), ("test", 10)):
        pixels = np.random.default_rng(0).integers(0, 256, (n, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": list(range(n))}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda *words, **more: open("/no network"))
    words, outcomes = [*TINY.split(), "--dataset", "cifar100", "--data", tmp_path / "data", "--out"], []
    for path in folder.iterdir():
        whole = path.read_bytes()
        for _ in range(5):
            at = rng.randrange(len(whole))
            for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
                path.write_bytes(content)
                status, printed = start(*words, "refused")
                outcomes.append(status == 2 and f"{path} is damaged" in printed)
        path.unlink()
        status, printed = start(*words, "refused")
        outcomes.append(status == 2 and f"there is no {path}" in printed)
        path.write_bytes(whole)
    assert start(*words, "good")[0] == 0 and not (tmp_path / "refused").exists()
    report("CIFAR file cut off, with a bit flipped, missing", outcomes, "named, status 2, no run begun")


@pytest.mark.slow
def test_full_disk(fork, undisturbed, tmp_path, report):
    """A real one: a small file system in a namespace of its own, with room for one checkpoint, or for two."""
    script = """
        mkdir disk && mount -t tmpfs -o size={size}k none disk || exit 99
        {python} {here}/cifar_train.py {words} --out disk/run
        status=$?
        cp -r disk/run . && exit $status"""
    outcomes, sizes = [], (700, 1000, 1500)
    for size in sizes:
        folder = tmp_path / str(size)
        folder.mkdir()
        words = RUNS["cifar_train"].format(micro=2)
        command = script.format(size=size, python=sys.executable, here=HERE, words=words)
        with open(folder / "run.printed", "w") as file:
            command = ["unshare", "--mount", "--map-root-user", "bash", "-c", command]
            variables = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=folder, stdout=file, stderr=file, env=variables, timeout=200)
        if done.returncode == 99 or "unshare" in printed(folder / "run"):
            pytest.skip(f"no file system can be made here: {printed(folder / 'run')}")
        assert checkpoint.load(folder / "run") is not None
        good = done.returncode == 1 and "No space left on device" in printed(folder / "run")
        good &= not (folder / "run" / "result.json").exists()
        outcomes.append(good and equal(complete(fork, folder / "run"), undisturbed))
    report("disk full", outcomes, "status 1, the old checkpoint readable, continued elsewhere to the same bits")
