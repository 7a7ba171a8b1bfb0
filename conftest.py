"""What several test files share: a script run in this process, and scripts run in forked ones."""

import gc
import multiprocessing.forkserver
import os
import pathlib
import runpy
import signal
import socket
import sys

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "2000",
}  # before torch is imported, here and in forked processes

import numpy as np
import pytest
import torch
import torch.distributed as dist

import checkpoint
import cifar_train  # noqa: F401 (for the processes that are forked)
import imagenet_train  # noqa: F401

HERE = pathlib.Path(__file__).parent
SHARED = HERE.parent / "shared"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """One thread, and neither the group of processes nor the signal handlers of a run outlive its test."""
    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    handlers = [signal.getsignal(number) for number in checkpoint.SIGNALS]
    gc.collect()
    gc.freeze()  # or every collection of `start` would go through all that is imported, for a tenth of a second
    yield
    checkpoint.end_processes()
    checkpoint.stop.__init__()
    signal.set_wakeup_fd(-1)
    for number, handler in zip(checkpoint.SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture
def flags(monkeypatch, request):
    """The resolved flags of a command line of the test file's SCRIPT."""

    def parse(*words, script=request.module.SCRIPT):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        return script.parse_flags()

    return parse


@pytest.fixture
def start(monkeypatch, capsys, tmp_path, request):
    """Run the test file's SCRIPT in this process and an empty folder. Returns the exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words, script=request.module.SCRIPT):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        try:
            status = script.main()
        except SystemExit as error:
            status = error.code
        checkpoint.end_processes()
        gc.collect()  # an exception keeps the run's lock, as the end of a process would not
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def pictures(n, seed=0):
    """Random images and labels: every bit of them matters and none is learnable."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))
    return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(rng.integers(0, 10, n))


# A process that has imported everything and computed nothing forks the others: an import of torch takes seconds, and so
# do those of what the first optimizer and the first picture need.
PRELOAD = ["conftest", "torch._dynamo", "torchvision.io"]


def be(words, printed, variables):
    """What `python words` does, in a forked process of a session of its own; its output goes to a file."""
    os.setsid()
    os.environ.update(variables)
    if printed:
        with open(printed, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    sys.argv = [*words]
    runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")


def fork(*words, target=be, printed=None, **variables):
    """Start `python words` in a process of its own, with these environment variables. Returns that process."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    place = os.getcwd()
    os.chdir(HERE)  # where that process, if it is the first, finds this file
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.chdir(place)
    process = server.Process(target=target, args=(list(map(str, words)), printed, variables))
    process.start()
    # start() in another thread would look for the end of this process too, and sometimes take its exit status away.
    multiprocessing.process._children.discard(process)
    return process


def torchrun_variables(world):
    """What torchrun sets for so many processes, but for their ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}


def start_workers(world, *words, target=be):
    """Run `python words` as so many processes. Returns their exit statuses."""
    variables = torchrun_variables(world)
    workers = [fork(*words, target=target, **variables, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)]
    for worker in workers:
        worker.join(timeout=120)
    return [worker.exitcode for worker in workers]
