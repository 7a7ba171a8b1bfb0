"""What a run needs besides the paper: its processes, its folder (flags, log, state and result, each on disk whole or
not at all) and a way to be asked to stop. Knows nothing of the data sets."""

import contextlib
import csv
import datetime
import fcntl
import io
import json
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import time
import zipfile

import torch
import torch.distributed as dist

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")

# Flags that may change between the sittings of one run; every other one is part of what the run is.
FREE = {"data", "out", "workers", "device", "compile", "checkpoint_seconds"}


def start_processes(device):
    """Join the processes that torchrun started, or be a world of one. Returns this process's torch.device.

    Raises ValueError when torchrun's variables are incomplete or the device is not there.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    launched = any(name in os.environ for name in needed[:3])
    missing = [name for name in needed if launched and name not in os.environ]
    if missing:
        raise ValueError(f"torchrun's environment is incomplete: {', '.join(missing)} not set (or start with python)")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine needs a GPU of its own, and torch sees {gpus}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    if launched:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(device)


def fail(problem):
    """End with a message and exit status 2: bad input."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{pathlib.Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(2)


@contextlib.contextmanager
def all_or_none():
    """For set-up that may fail on one process: they all exit with status 2 then, saying why."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        fail(problem)


class Stopped(Exception):
    """A signal asked the run to stop. `status` is the exit status, 128 + the signal's number."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Stop:
    """Listens to SIGTERM, SIGINT and SIGUSR1. While training, the first one is heeded at the next `check`; before that,
    and a second later or more, the next ends the process at once."""

    def __init__(self):
        self.asked, self.when, self.training = 0, 0.0, False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        # Within a second it is the same Ctrl-C, which torchrun and run_all.sh pass on to processes that have had it.
        again = self.asked and time.monotonic() - self.when > 1
        if again or not self.training:
            os._exit(128 + number)
        self.asked, self.when = number, time.monotonic()

    def check(self, due=False):
        """Raises Stopped, on every process at the same call, once any process was asked. Otherwise returns whether
        `due` is true on any of them."""
        self.training = True
        asked = torch.tensor([self.asked, due])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        number, due = asked.tolist()
        if number:
            raise Stopped(number)
        return bool(due)


class Run:
    """The folder of a run: config.json, log.csv, checkpoint.pt, checkpoint.previous.pt and, once it has finished,
    result.json.

    Made by the process that writes; the others read the checkpoint with `load`. Raises ValueError when the folder holds
    a different run or another program is writing it, OSError when it cannot be written.
    """

    def __init__(self, folder, config):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")  # held as long as this object lives
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another program is writing {folder}: wait for it, or choose another --out") from None
        self.wrote = False
        path = self.folder / "config.json"
        held = [name for name in ("result.json", *CHECKPOINTS) if (self.folder / name).exists()]
        if held and not path.exists():
            raise ValueError(f"{folder} holds {held[0]} but no config.json, so of what run is unknown")
        if path.exists():
            there = read_json(path)
            differ = [
                f"--{name.replace('_', '-')} is {there.get(name)} there and {config.get(name)} here"
                for name in (there | config).keys() - FREE - {"environment"}
                if without_off(there.get(name)) != without_off(config.get(name))
            ]
            if differ:
                raise ValueError(f"{folder} holds a different run: {'; '.join(sorted(differ))}. Choose another --out")
        else:
            write_json(path, config | {"environment": environment(config)})

    def save(self, state):
        """Write the state to checkpoint.pt and keep the one before, if it is whole, as checkpoint.previous.pt."""
        newest, previous = (self.folder / name for name in CHECKPOINTS)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        temporary = write_temporary(newest, buffer.getbuffer())
        if self.wrote or (newest.exists() and damage(newest) is None):
            os.replace(newest, previous)
        os.replace(temporary, newest)
        sync(self.folder)
        self.wrote = True

    def log(self, rows):
        """Write log.csv anew: `rows` are dicts with the same keys."""
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(self.folder / "log.csv", text.getvalue().encode())

    def finish(self, result):
        """Write result.json, the mark of a finished run."""
        write_json(self.folder / "result.json", result)


def without_off(value):
    """A flag's value, or the unit's arguments, without what is off: what is younger than a run was off in it."""
    if isinstance(value, dict):
        return {name: v for name, v in value.items() if v is not False}
    return None if value is False else value


def load(folder):
    """The state in a run's folder, on the CPU; None when there is no checkpoint. Takes the newest readable one; raises
    ValueError when there are checkpoints and none can be read."""
    problems = []
    for path in (pathlib.Path(folder, name) for name in CHECKPOINTS):
        if path.exists():
            problem = damage(path)
            if problem is None:
                if problems:
                    print(f"{problems[0]}; going on from {path}", file=sys.stderr)
                return torch.load(path, map_location="cpu", weights_only=True)
            problems.append(f"{path} is damaged: {problem}")
    if problems:
        raise ValueError("no checkpoint can be read: " + "; ".join(problems))
    return None


def damage(path):
    """What keeps a checkpoint from being read, or None. torch.load alone does not look at the archive's CRCs."""
    try:
        part = zipfile.ZipFile(path).testzip()
        if part is None:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return part
    except Exception as error:  # a damaged file may raise anything
        return f"{type(error).__name__}: {error}"


def environment(config):
    """Where and from which code a run is made."""

    def git(*words):
        try:
            done = subprocess.run(["git", *words], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # there is no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    cuda = torch.cuda.is_available() and config.get("device") != "cpu"
    changes = git("status", "--porcelain", "--untracked-files=no")
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "modified": None if changes is None else changes != "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else cpu,
        "tf32": config.get("precision") == "tf32",
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size(),
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def read_json(path):
    """The dict in a JSON file; ValueError when it is damaged."""
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it holds no flags or results")
    return content


def write_json(path, content):
    write(path, (json.dumps(content, indent=2) + "\n").encode())


def write(path, content):
    """Write a file whole or not at all."""
    os.replace(write_temporary(path, content), path)
    sync(path.parent)


def write_temporary(path, content):
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def sync(folder):
    """Make the renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
