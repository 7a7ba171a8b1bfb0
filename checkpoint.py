"""What a run needs besides the paper: its processes, its folder (flags, log, state and result, each on disk whole or
not at all) and a way to be asked to stop. Knows nothing of the data sets."""

import contextlib
import csv
import ctypes
import datetime
import fcntl
import io
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import platform
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile

import torch
import torch.distributed as dist

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")

SCHEMA = 1  # of a checkpoint's content; one of another schema is not read

# Flags that may change between the sittings of one run; every other one is part of what the run is.
FREE = {"data", "out", "workers", "device", "compile", "checkpoint_seconds", "timeout"}

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 18  # seconds between a signal and the end, at most: torchrun kills after 30


def keep_memory():
    """Let glibc keep what a step frees for the next step. By default it hands every large tensor back to the system and
    gets it again page by page, each a page fault: an eighth of a CPU's time at ResNet-20, for a tenth less memory."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing outside the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap is never trimmed


def start_processes(device, timeout=600):
    """Join the processes that torchrun started, or be a world of one; and keep freed memory. Returns this process's
    torch.device.

    timeout: seconds that a process waits for another one, here and in every collective.
    Raises ValueError when torchrun's variables are incomplete, the device is not there or the others do not come.
    """
    keep_memory()
    if not 1 <= timeout <= 86_400:
        raise ValueError(f"--timeout must be 1 ... 86400 seconds, not {timeout}")
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
    # NCCL, which ends a process without naming another, waits a minute longer than the gloo group of Stop.check.
    limit = datetime.timedelta(seconds=timeout + 60 * (device != "cpu"))
    try:
        store, rank, world = dist.HashStore(), 0, 1
        if launched:
            store, rank, world = next(dist.rendezvous("env://", timeout=limit))
            # A restart by torchrun must not meet the addresses that the attempt before left in torchrun's store.
            store = dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except RuntimeError as error:
        raise ValueError(f"the processes did not find each other: {error}") from None
    return torch.device(device)


def tell(line):
    """Print to the error stream. That it is closed or full changes nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def fail(problem):
    """End with a message and exit status 2: bad input."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tell(f"{pathlib.Path(sys.argv[0]).name}: {problem}")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(2)


@contextlib.contextmanager
def all_or_none(source=None):
    """For set-up that may fail on one process: they all exit with status 2 then, saying why. With a source, the name
    of a file or folder that something is built from, an error of any kind means that its content does not fit."""
    problem = None
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        problem = str(error)
    except Exception as error:
        if source is None:
            raise
        problem = f"{source} does not fit this code: {type(error).__name__}: {error}"
    some = torch.tensor(int(problem is not None))
    dist.all_reduce(some, dist.ReduceOp.MAX)
    if some:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        fail(next(filter(None, problems)))


def agree(folder, *facts):
    """Processes, perhaps of several machines, that have read different things of a run's folder end with status 2."""
    read = [None] * dist.get_world_size()
    dist.all_gather_object(read, facts)
    if any(there != facts for there in read):
        fail(f"the processes see different states of {folder}: is it one folder on all machines?")


class Stopped(Exception):
    """A signal asked the run to stop. `status` is the exit status, 128 + the signal's number."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Stop:
    """Listens to SIGTERM, SIGINT and SIGUSR1. While training, the first one is heeded at the next `check`. Before that,
    a second later or more, and when no check comes within GRACE seconds, the process ends at once, without saving."""

    def __init__(self, timeout=600):
        self.timeout, self.group = timeout, None
        self.asked, self.when, self.training = 0, math.inf, False
        self.calls, self.until, self.agreed = 0, 1, time.monotonic()
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=ignore_signals)
        threading.Thread(target=self.listen, args=[heard], daemon=True).start()

    def listen(self, heard):
        """In a thread: the main one hears nothing within a slow step, or while it waits for a process that hangs."""
        number, left = 0, None
        while select.select([heard], [], [], left)[0]:
            number = os.read(heard, 1)[0]
            if number in SIGNALS:  # else a worker of a loader has ended
                if not self.training or time.monotonic() > self.when + 1:
                    break
                # Sooner it is the same Ctrl-C, which torchrun and run_all.sh pass on to processes that have had it.
                if not self.asked:
                    self.when, self.asked = time.monotonic(), number
            left = max(0, self.when + GRACE - time.monotonic()) if self.asked else None
        number = self.asked or number
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"{signal.Signals(number).name}: ended at once; what was saved before stays\n".encode())
        for child in multiprocessing.active_children():  # a loader's workers, which would only see it seconds later
            child.kill()
        os._exit(128 + number)

    def check(self, due=None):
        """Raises Stopped, on every process at the same call, once any process was asked. Otherwise returns whether
        `due` is true on any of them; with a `due`, once an iteration, they agree only about every tenth of a second."""
        self.training = True
        self.group = self.group or dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self.timeout))
        self.calls += due is not None
        if due is not None and self.calls < self.until:
            return False
        agreed = torch.tensor([self.asked, bool(due), time.monotonic() - self.agreed], dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.group)
        number, anywhere, seconds = agreed.tolist()
        if number:
            raise Stopped(int(number))
        if due is not None:
            self.until = 1 if anywhere else max(1, min(2 * self.calls, int(0.1 * self.calls / seconds)))
            self.calls, self.agreed = 0, time.monotonic()
        return bool(anywhere)


def ignore_signals(*_):
    """For a loader's workers, at their fork and as worker_init_fn: who asks a run to stop may ask all its processes,
    and they must serve it to the end. They end with it, or when they see it gone."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def lost(error, asked=0):
    """End with status 1 after an error that came of a process that died or hangs, naming it, and as `asked` by a signal
    after one of a compiler, which the signal stopped too; raise any other error."""
    if "gloo" not in str(error) and not isinstance(error, dist.DistError):
        if asked and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            tell(f"{signal.Signals(asked).name}: ended at once; what was saved before stays")
            sys.exit(128 + asked)
        raise error
    hangs, rank, answered = "Timed out" in str(error), dist.get_rank(), set()
    store, everyone = dist.group.WORLD.get_group_store(), range(dist.get_world_size())

    def call():  # the roll: who gets here has lost somebody, and who does not is lost
        with contextlib.suppress(RuntimeError):
            store.set(f"lost somebody: {rank}", "")
            while True:
                answered.update(other for other in everyone if store.check([f"lost somebody: {other}"]))
                time.sleep(0.1)

    caller = threading.Thread(target=call, daemon=True)  # it may hang with the store
    caller.start()
    caller.join(10 if hangs else 1)
    # Who does not even hear itself has lost the store, which without torchrun process 0 keeps.
    missing = " or ".join(str(other) for other in everyone if other not in answered) if rank in answered else 0
    how = "does not answer" if hangs else "died"
    tell(f"process {rank} lost process {missing}, which {how} ({error})")
    os._exit(1)


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
        lock = weakref.ref(self.lock)
        os.register_at_fork(after_in_child=lambda: lock() and lock().close())  # not by loader workers that outlive it
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another program is writing {folder}: wait for it, or choose another --out") from None
        self.flags = {name: value for name, value in config.items() if name not in FREE}
        self.whole, self.unsaved, self.status = False, set(), 0
        path = self.folder / "config.json"
        held = [name for name in ("result.json", *CHECKPOINTS) if (self.folder / name).exists()]
        if held and not path.exists():
            raise ValueError(f"{folder} holds {held[0]} but no config.json, so of what run is unknown")
        if path.exists():
            refuse_another(folder, read_json(path), config)
        else:
            write(path, as_json(config | {"environment": environment(config)}))
        for name in ("log.csv", "result.json", *CHECKPOINTS):  # left by a program that was killed while it wrote
            temporary(self.folder / name).unlink(missing_ok=True)

    def save(self, state):
        """Write the state to checkpoint.pt and keep the one before, if it is whole, as checkpoint.previous.pt. Returns
        whether that could be done."""
        newest, previous = (self.folder / name for name in CHECKPOINTS)
        buffer = io.BytesIO()
        torch.save({"schema": SCHEMA, "flags": self.flags} | state, buffer)
        if not self.whole:
            with contextlib.suppress(ValueError):
                self.whole = bool(read(newest))
        done = self.write(newest, buffer.getbuffer(), previous if self.whole else None)
        self.whole = self.whole or done
        return done

    def log(self, rows):
        """Write log.csv anew: `rows` are dicts with the same keys."""
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write(self.folder / "log.csv", text.getvalue().encode())

    def finish(self, result):
        """Write result.json, the mark of a finished run, when all else is on disk. Returns the exit status: 1 when
        anything could not be written in this sitting."""
        if not self.unsaved:
            self.write(self.folder / "result.json", as_json(result))
        if self.unsaved:
            tell(f"not finished: {', '.join(self.unsaved)} not written; the same command goes on")
        return self.status

    def write(self, path, content, keep=None):
        """Write a file; where that fails, say so, once, and go on with the old one. Returns whether it was written."""
        try:
            write(path, content, keep)
        except OSError as error:
            if path.name not in self.unsaved:
                tell(f"{path} could not be written ({error}): the run goes on, and the old one stays")
            self.unsaved.add(path.name)
            self.status = 1
        else:
            self.unsaved.discard(path.name)
        return path.name not in self.unsaved


def without_off(value):
    """A flag's value, or the unit's arguments, without what is off: what is younger than a run was off in it."""
    if isinstance(value, dict):
        return {name: v for name, v in value.items() if v is not False}
    return None if value is False else value


def refuse_another(place, there, here):
    """Raise ValueError, naming the flags that differ, when a folder or file holds a different run."""
    differ = [
        f"--{name.replace('_', '-')} is {there.get(name)} there and {here.get(name)} here"
        for name in (there | here).keys() - FREE - {"environment"}
        if without_off(there.get(name)) != without_off(here.get(name))
    ]
    if differ:
        raise ValueError(f"{place} holds a different run: {'; '.join(sorted(differ))}. Choose another --out")


def load(folder, flags=None):
    """The state in a run's folder, on the CPU; None when there is no checkpoint. Takes the newest that can be read.

    Raises ValueError when none can, or when it is of another schema or, given flags, of a different run.
    """
    problems = []
    for path in (pathlib.Path(folder, name) for name in CHECKPOINTS):
        if path.exists():
            try:
                state = read(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            if problems:
                tell(f"{problems[0]}; going on from {path}")
            if state.get("schema") != SCHEMA:
                raise ValueError(f"{path} is of schema {state.get('schema')!r}, and this code reads schema {SCHEMA}")
            if flags is not None:
                refuse_another(path, state["flags"], flags)
            return state
    if problems:
        raise ValueError("no checkpoint can be read: " + "; ".join(problems))
    return None


def read(path):
    """The dict in a checkpoint file, on the CPU: tensors and plain types, and nothing else is ever built or executed.
    Raises ValueError when the file is damaged or holds anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()  # torch.load does not look at the CRCs
        if part is not None:
            raise ValueError(f"{part} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("flags"), dict):
            raise ValueError("it holds no state of a run")
        return state
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors and plain values: it was not written by this code") from None
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


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


def result(folder, needed=()):
    """What result.json says; None while a run has not finished. Raises ValueError when it is damaged or lacks a number
    that is needed."""
    path = pathlib.Path(folder, "result.json")
    found = read_json(path) if path.exists() else None
    if found is not None and not {"diverged", *needed} <= found.keys():
        raise ValueError(f"{path} cannot be read: it lacks {', '.join({'diverged', *needed} - found.keys())}")
    return found


def as_json(content):
    return (json.dumps(content, indent=2) + "\n").encode()


def temporary(path):
    return path.with_name(path.name + ".tmp")


def write(path, content, keep=None):
    """Write a file whole or not at all; the one before gets the name `keep`. Raises OSError."""
    try:
        with open(temporary(path), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary(path), path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # makes the renames durable
        os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            temporary(path).unlink()  # it may be what fills the disk
        raise
