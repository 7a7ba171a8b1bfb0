"""A run that was killed, stopped or starved and started again ends at the same bits as one that was not.

The slow tests (-m slow) do that to real runs at random moments, and print one table at their end.
"""

import collections
import concurrent.futures
import contextlib
import io
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile

import pytest
import torch
import torch.distributed as dist

import checkpoint
import cifar_train

HERE = pathlib.Path(__file__).parent
# Dropout, so that random numbers drawn in the net have to come back too; evaluated after 250 iterations and at the end.
RUNS = {
    "cifar_train": (
        "--dataset synthetic --images 300 --depth 8 --unit basic-dropout-shortcut --batch-size 2 --micro-batch {micro} "
        "--iterations 256 --device cpu --checkpoint-seconds 0 --timeout 60"
    )
}
TINY = "--dataset synthetic --images 20 --depth 8 --batch-size 2 --iterations 12 --device cpu --checkpoint-seconds 0"
TABLE = []


# A process that has imported everything and computed nothing forks every run: an import of torch takes seconds.


def be(script, words, printed, variables):
    """What `python script.py words` does, in a forked process; its output and its phase in files."""
    os.setsid()
    os.environ.update(variables)
    with open(printed, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    phases, marks = os.open(f"{printed}.phase", os.O_RDWR | os.O_CREAT | os.O_TRUNC), iter(range(10**6))

    def mark(phase):
        os.pwrite(phases, f"{next(marks):06} {phase}\n".ljust(30).encode(), 0)

    save, train = checkpoint.Run.save, torch.nn.Module.eval

    def marked_save(self, state):
        mark("writing")
        done = save(self, state)
        mark("training")
        return done

    def marked_eval(self):
        mark("evaluating")
        return train(self)

    checkpoint.Run.save, torch.nn.Module.eval = marked_save, marked_eval
    mark("starting")
    sys.argv = [f"{script}.py", *words]
    runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")


@pytest.fixture(scope="module")
def fork():
    """Start a run in a process of its own. Returns that process."""
    variables = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload([__name__])
        started = []

        def begin(out, micro=2, script="cifar_train", more=(), **variables):
            words = [*RUNS[script].format(micro=micro).split(), "--out", str(out), *more]
            started.append(server.Process(target=be, args=(script, words, f"{out}.printed", variables)))
            started[-1].start()
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
    state = checkpoint.load(out)
    state.pop("seconds")
    result = json.loads((out / "result.json").read_text())
    log = [line.rpartition(",")[0] for line in (out / "log.csv").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in state.pop("rows")]
    return state, {k: v for k, v in result.items() if k not in ("seconds", "peak_memory")}, log, rows


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def undisturbed(fork, tmp_path_factory):
    return complete(fork, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Prints the table after the slow tests, past pytest's capturing."""
    yield
    if TABLE:
        rows = "".join(f"| {what} | {passed} of {of} | {seen} |\n" for what, of, passed, seen in TABLE)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\n| what happened | survived | of that |\n|---|---|---|\n{rows}")


@pytest.fixture
def report():
    """Add a row to the table, and fail unless all has passed."""

    def add(what, outcomes, seen):
        outcomes = list(outcomes)
        TABLE.append((what, len(outcomes), sum(outcomes), seen))
        assert all(outcomes), TABLE[-1]

    return add


def disturb(fork, out, number, want, after, wait):
    """Start a run and send it a signal: when its phase is the wanted one ("any", "writing", "evaluating") after so many
    changes of phase, and some seconds later. Returns the phase that it hit and the exit status, -9 for a kill."""
    process = fork(out)
    while process.is_alive() and not (phase(out)[0] >= after and want in ("any", phase(out)[1])):
        time.sleep(0.0005)
    time.sleep(wait)
    with contextlib.suppress(ProcessLookupError):  # it has finished
        os.kill(process.pid, number)
    process.join(timeout=20)  # the promise: 20 s
    return phase(out)[1], process.exitcode


def moments(rng):
    """A random moment of each kind for `disturb`. A run's phase changes 517 times: twice a save, twice an evaluation."""
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
def test_stopped_and_continued(fork, undisturbed, number, tmp_path):
    """Two times: in the first evaluation, and in training after it."""
    out = tmp_path / "run"
    for moment in (("evaluating", 0, 0), ("writing", 5, 0)):
        _, status = disturb(fork, out, number, *moment)
        assert status == (-9 if number == signal.SIGKILL else 128 + number), printed(out)
        assert not (out / "result.json").exists()  # the run was not over, or this test would show nothing
        assert 0 < checkpoint.load(out)["iteration"] < 256
    (out / "checkpoint.pt.tmp").write_text("left over")
    assert equal(complete(fork, out), undisturbed)
    assert not list(out.glob("*.tmp"))
    assert printed(out).count("the same command continues it") == (0 if number == signal.SIGKILL else 2)


@pytest.mark.slow
def test_kill_at_random_moments(fork, undisturbed, tmp_path, report):
    def one(i):
        rng, out, seen = random.Random(i), tmp_path / str(i), []
        for kind in (("any", "starting"), ("any",), ("any",), ("writing",), ("evaluating",))[i % 5]:
            now, status = disturb(fork, out, signal.SIGKILL, *moments(rng)[kind])
            seen.append(now if status == -9 else "finished before")
        return equal(complete(fork, out), undisturbed) and "damaged" not in printed(out), seen

    outcomes, seen = zip(*two_at_a_time(one, 50), strict=True)
    report("`kill -9` at a random moment", outcomes, f"killed while {tally(sum(seen, []))}; no file unreadable")


@pytest.mark.slow
def test_stop_at_random_moments(fork, undisturbed, tmp_path, report):
    def one(i):
        rng, out = random.Random(100 + i), tmp_path / str(i)
        kind = ("any", "any", "writing", "evaluating", "starting")[i % 5]
        now, status = disturb(fork, out, signal.SIGTERM, *moments(rng)[kind])
        # Before the run listens the signal's own effect ends it, and before the first iteration there is nothing to save.
        good = status in (-15, 143) if now == "starting" else status == 143 and "saved in" in printed(out)
        return good and equal(complete(fork, out), undisturbed), now

    outcomes, seen = zip(*two_at_a_time(one, 20), strict=True)
    report("SIGTERM at a random moment", outcomes, f"stopped within 20 s while {tally(seen)}")


def two_processes(fork, out, **options):
    """Start a run as two processes that find each other without torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [fork(out, micro=1, **options, **both, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def await_checkpoints(out, count, alive):
    """Return once a run has written so many checkpoints more."""
    seen = set()
    while len(seen) <= count and alive():
        with contextlib.suppress(FileNotFoundError):
            seen.add((out / "checkpoint.pt").stat().st_mtime_ns)
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_kill_a_random_rank(fork, script, tmp_path, report):
    """torchrun starts both processes again, until the run ends as one that nobody disturbed."""
    workers = two_processes(fork, tmp_path / "undisturbed", script=script)
    for worker in workers:
        worker.join(timeout=200)
    undisturbed, outcomes, killed, rng = content(tmp_path / "undisturbed"), [], [], random.Random(0)
    for kills in (3, 2):
        out = tmp_path / str(kills)
        words = [*RUNS[script].format(micro=1).split(), "--out", str(out)]
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3".split()
        with open(f"{out}.printed", "a") as file:
            command = [sys.executable, *torchrun, f"{script}.py", *words]
            agent = subprocess.Popen(command, cwd=HERE, stdout=file, stderr=file, start_new_session=True)
        for _ in range(kills):
            await_checkpoints(out, rng.randrange(3, 60), lambda agent=agent: agent.poll() is None)
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


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_named(fork, tmp_path, report):
    """Without torchrun, so nobody but the other process sees it. One that waits still ends within 20 s of a signal."""
    outcomes = []
    for number, timeout, word in ((signal.SIGKILL, 60, "died"), (signal.SIGSTOP, 5, "does not answer")):
        for rank in (0, 1):
            out = tmp_path / f"{number}-{rank}"
            workers = two_processes(fork, out, more=("--timeout", str(timeout)))
            await_checkpoints(out, 5, workers[0].is_alive)
            os.kill(workers[rank].pid, number)
            workers[1 - rank].join(timeout=40)
            named = f"process {1 - rank} lost process {rank}, which {word}" in printed(out)
            outcomes.append(workers[1 - rank].exitcode == 1 and named)
            workers[rank].kill()
    workers = two_processes(fork, tmp_path / "asked")
    await_checkpoints(tmp_path / "asked", 5, workers[0].is_alive)
    os.kill(workers[1].pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(workers[0].pid, signal.SIGTERM)
    workers[0].join(timeout=20)
    outcomes.append(workers[0].exitcode == 143)
    report("one of two processes killed or halted without torchrun", outcomes, "named; SIGTERM still heeded in 20 s")
