"""What a run needs besides the paper: its processes, a way to be asked to stop, and its folder, whose files (flags,
log, state, result) are on disk whole or not at all. Knows nothing of data sets."""

import argparse
import contextlib
import csv
import ctypes
import datetime
import errno
import fcntl
import io
import json
import math
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

SCHEMA = 1  # of a checkpoint's content; a checkpoint of another schema is refused

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 18  # seconds from the first signal to the end, at most: torchrun kills after 30

# What some network file systems answer when they are asked to lock a file, or to write a folder to the disk at once.
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}

control = None  # the gloo group of all messages between processes except the step's; None: the default group


def keep_memory():
    """Let glibc keep the memory that a step frees for the next step. By default it returns every large tensor to the
    system and gets it back page by page: an eighth of a CPU's time at ResNet-20, for a tenth less memory."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing outside the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap is never trimmed


def start_processes(device, timeout=600):
    """Join the processes that torchrun started, or be the only one. Returns this process's torch.device.

    timeout: seconds that a process waits for another, here and in every collective.
    Raises ValueError when torchrun's variables are incomplete, there is no such device or the others do not come.
    """
    global control
    keep_memory()
    if not 1 <= timeout <= 86_400:
        raise ValueError(f"--timeout must be 1 ... 86400 seconds, not {timeout}")
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    launched = any(os.environ.get(name) for name in needed[:3])
    missing = [name for name in needed if launched and not os.environ.get(name)]
    if missing:
        raise ValueError(f"torchrun's environment is incomplete: {', '.join(missing)} not set (or start with python)")
    for name in needed[:3] + needed[4:]:
        whole_number(name, 0)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local, gpus = whole_number("LOCAL_RANK", 0), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine needs a GPU of its own, and torch sees {gpus}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
        check_gpu(device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    limit = datetime.timedelta(seconds=timeout)
    # NCCL, which ends a process without a word, waits a minute longer than gloo, which says what happened.
    nccl = datetime.timedelta(seconds=timeout + 60 * (device != "cpu"))
    try:
        store, rank, world = dist.HashStore(), 0, 1
        if launched:
            store, rank, world = next(dist.rendezvous("env://", timeout=limit))
            # A restart by torchrun must not meet the addresses that the attempt before left in torchrun's store.
            store = dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=nccl)
        control = dist.new_group(backend="gloo", timeout=limit)
    except RuntimeError as error:
        if "interface" in str(error):
            raise ValueError(
                f"no network interface, which even one process needs (ip link set lo up): {error}"
            ) from None
        raise ValueError(f"the processes did not find each other: {error}") from None
    return torch.device(device)


def check_gpu(device):
    """Raises ValueError when torch cannot compute on a GPU, such as one that is too old for it."""
    try:
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch cannot compute on {device} ({reason}): choose --device cpu") from None


def end_processes():
    """Leave the group of processes."""
    global control
    control = None
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_streams():
    """Let every name be printed: what an encoding lacks is escaped, and a stream that is closed swallows all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="replace"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def whole_number(variable, default):
    """The number in an environment variable, or the default where it is unset or empty. Raises ValueError."""
    value = os.environ.get(variable) or default
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"the environment's {variable} is {value!r}, but should be a whole number") from None


def print_out(line, write=print):
    """Print to the output stream. That nobody reads it (| head), or that its disk is full, changes nothing."""
    try:
        write(line)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", errors="replace")


def print_error(line):
    """Print to the error stream. That it is closed or full changes nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def fail(problem, status=2):
    """End with a message and an exit status: 2 for bad input."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print_error(f"{pathlib.Path(sys.argv[0]).name}: {problem}")
    sys.exit(status)


class InUse(ValueError):
    """Another program is writing the folder. Ends with exit status 3."""


@contextlib.contextmanager
def all_or_none(source=None):
    """For work that may fail on one process alone: all of them exit with status 2 then, and say why. With a source, the
    name of a file or folder that something is built from, any error means that its content does not fit."""
    problem, status = None, 2
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        problem, status = str(error) or type(error).__name__, 3 if isinstance(error, InUse) else 2
    except Exception as error:
        if source is None:
            raise
        problem = f"{source} does not fit this code: {type(error).__name__}: {error}"
    some = torch.tensor(int(problem is not None))
    dist.all_reduce(some, dist.ReduceOp.MAX, group=control)
    if some:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, (problem, status), group=control)
        fail(*next(pair for pair in problems if pair[0] is not None))


def agree(folder, *facts):
    """End with status 2 when processes, perhaps of several machines, have read different facts from a run's folder."""
    read = [None] * dist.get_world_size()
    dist.all_gather_object(read, facts, group=control)
    if any(other != facts for other in read):
        fail(f"the processes see different states of {folder}: is it one folder on all machines?")


class Stopped(Exception):
    """A signal asked the run to stop. `status` is the exit status, 128 + the signal's number, and `state` says what
    is kept."""

    state = "what has been saved stays"

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Stop:
    """Listens to SIGTERM, SIGINT and SIGUSR1. During a training the first signal is heeded at the next `check`. Before
    one, on a signal a second or more after the first, and when no check comes within GRACE seconds, the process ends at
    once and saves nothing."""

    def __init__(self):
        self.asked, self.when, self.training = 0, math.inf, False
        self.calls, self.until, self.agreed = 0, 1, time.monotonic()

    def listen(self):
        """Begin to listen. Python's own handlers wait until the main thread returns from C, where it may be waiting for
        a process that hangs, so a thread reads the numbers of the signals from a pipe."""
        self.__init__()  # nothing has been asked yet
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=ignore_signals)
        threading.Thread(target=self.read, args=[reading], daemon=True).start()

    def read(self, pipe):
        while True:
            number = os.read(pipe, 1)[0]
            if number not in SIGNALS:  # none of ours
                continue
            if not self.training or time.monotonic() > self.when + 1:
                end_at_once(self.asked or number)
            # A sooner one is the same Ctrl-C: torchrun and run_all.sh pass it on to processes that have had it.
            if not self.asked:
                self.when, self.asked = time.monotonic(), number
                timer = threading.Timer(GRACE, end_at_once, [number])
                timer.daemon = True
                timer.start()

    def check(self, due=None):
        """Raises Stopped, on every process at the same call, once any process was asked. Otherwise returns whether
        `due` is true on any of them; with a `due`, once an iteration, they agree only about every tenth of a second."""
        self.training = True
        self.calls += due is not None
        if due is not None and self.calls < self.until:
            return False
        agreed = torch.tensor([self.asked, bool(due), time.monotonic() - self.agreed], dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=control)
        number, anywhere, seconds = agreed.tolist()
        if number:
            raise Stopped(int(number))
        if due is not None:
            tenth = int(0.1 * self.calls / seconds)  # of a second, in calls
            self.until = 1 if anywhere else max(1, min(2 * self.calls, tenth))  # doubled at most: the pace may change
            self.calls, self.agreed = 0, time.monotonic()
        return bool(anywhere)


stop = Stop()  # of this process, as its signals are


def end_at_once(number):
    """End the process, whatever its main thread is doing, as a signal asked."""
    with contextlib.suppress(OSError):  # the error stream is closed
        if (os.environ.get("RANK") or "0") == "0" and select.select([], [2], [], 0)[1]:  # a full pipe would block
            os.write(2, f"{signal.Signals(number).name}: ended at once; what was saved before stays\n".encode())
    os._exit(128 + number)


def ignore_signals(*_):
    """For a loader's workers, at their fork: whoever asks a run to stop may ask all its processes, and the workers must
    serve it to the end. They end when it ends them or is gone."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_lost(error):
    """Whether an error says that another process died or does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Run:
    """The folder of a run: config.json, log.csv, checkpoint.pt, checkpoint.previous.pt and, once it has finished,
    result.json. Process 0 writes it, after `begin`; on the others what would write does nothing.

    identity: {flag: value}, all that makes it this run and no other. columns: names that its result must have.
    Raises ValueError when the folder holds another run, or files that cannot be read.
    """

    def __init__(self, folder, identity, columns=()):
        self.folder, self.identity, self.mine = pathlib.Path(folder), identity, dist.get_rank() == 0
        if os.path.lexists(folder) and not os.path.isdir(folder):
            kind = "a file" if os.path.exists(folder) else "a link to nowhere"
            raise ValueError(f"{folder} is {kind}, and a run needs a folder: choose another --out")
        self.whole, self.unsaved, self.status = False, set(), 0
        self.refuse_another()
        self.result = read_result(folder, columns)

    def refuse_another(self):
        """Raises ValueError when the folder holds another run. One that has only its flags is begun anew."""
        files = [name for name in ("result.json", "log.csv", *CHECKPOINTS) if (self.folder / name).exists()]
        config = self.folder / "config.json"
        if files and not config.exists():
            raise ValueError(f"{self.folder} holds {files[0]} but no config.json, which would say what run it is")
        if files:
            refuse_difference(self.folder, read_json(config), self.identity)
        return bool(files)

    def begin(self, settings, about):
        """Lock the folder, and write config.json where the run is new: its identity, its settings (which may change
        from session to session), what `about` says of its net, and the environment.

        Raises ValueError as above, InUse when another program is writing the folder, OSError when it cannot be written.
        """
        if not self.mine:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")  # held as long as this object lives
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be written ({error.strerror}): choose another --out") from None
        lock = weakref.ref(self.lock)
        os.register_at_fork(after_in_child=lambda: lock() and lock().close())  # not by workers that may outlive it
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the second is what SMB answers when another holds the lock
            message = f"another program is writing {self.folder}: wait for it, or choose another --out"
            raise InUse(message) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print_error(f"{self.folder} cannot be locked ({error.strerror}): let no other program write this run")
        if not self.refuse_another():
            plain = {name: v.flatten().tolist() if torch.is_tensor(v) else v for name, v in about.items()}
            if len(plain.get("mean", ())) > 3:
                del plain["mean"]  # of each pixel: in the checkpoint alone
            config = self.identity | settings | {"about": plain}
            write(self.folder / "config.json", as_json(config | {"environment": environment(config)}))
        for name in ("log.csv", "result.json", *CHECKPOINTS):  # left by a program that was killed while it wrote
            temporary(self.folder / name).unlink(missing_ok=True)

    def load(self):
        """Its newest state, or None; see `load`."""
        return load(self.folder, self.identity)

    def save(self, state):
        """Write the state to checkpoint.pt, and keep the one before, if it is whole, as checkpoint.previous.pt. Returns
        whether that was possible."""
        if not self.mine:
            return True
        newest, previous = (self.folder / name for name in CHECKPOINTS)
        buffer = io.BytesIO()
        torch.save({"schema": SCHEMA, "flags": self.identity} | state, buffer)
        if not self.whole:
            with contextlib.suppress(ValueError):
                self.whole = bool(read(newest))
        saved = self.write(newest, buffer.getbuffer(), previous if self.whole else None)
        self.whole = self.whole or saved
        return saved

    def log(self, rows):
        """Write log.csv anew. Rows are dicts; older ones may lack a column."""
        text = io.StringIO()
        columns = dict.fromkeys(name for row in reversed(rows) for name in row)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write(self.folder / "log.csv", text.getvalue().encode())

    def finish(self, result):
        """Write result.json, the mark of a finished run, once all else is on disk. Returns the exit status: 1 when
        anything could not be written in this session."""
        if not self.unsaved:
            self.write(self.folder / "result.json", as_json(result))
        if self.unsaved:
            print_error(f"not finished: {', '.join(self.unsaved)} not written; the same command continues it")
        return self.status

    def write(self, path, content, keep=None):
        """Write a file; where that fails, say so, once, and go on with the old one. Returns whether it was written."""
        if not self.mine:
            return True
        try:
            write(path, content, keep)
        except OSError as error:
            if path.name not in self.unsaved:
                print_error(f"{path} could not be written ({error}): the run goes on, and the old one stays")
            self.unsaved.add(path.name)
            self.status = 1
        else:
            self.unsaved.discard(path.name)
        return path.name not in self.unsaved


def without_off(value):
    """A flag's value, or a unit's arguments, without what is off: a run that is older than a flag had it off."""
    if isinstance(value, dict):
        return {name: v for name, v in value.items() if v is not False}
    return None if value is False else value


def refuse_difference(place, theirs, ours):
    """Raises ValueError, naming the flags that differ, when a folder or file holds a run of another identity."""
    differ = {
        name: f"--{name.replace('_', '-')} is {theirs.get(name)} there and {value} here"
        for name, value in ours.items()
        if without_off(theirs.get(name)) != without_off(value)
    }
    if differ:
        advice = "Choose another --out"
        if {"iterations", "epochs"} & differ.keys():
            advice += " (a run cannot be made longer: its learning rate has followed its length from the start)"
        raise ValueError(f"{place} holds a different run: {'; '.join(sorted(differ.values()))}. {advice}")


def load(folder, identity=None):
    """The state in a run's folder, on the CPU; None when there is no checkpoint. Takes the newest that can be read.

    Raises ValueError when none can, or when it is of another schema or, given an identity, of another run.
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
                print_error(f"{problems[0]}; {path} takes its place")
            if state.get("schema") != SCHEMA:
                raise ValueError(f"{path} is of schema {state.get('schema')!r}, and this code reads schema {SCHEMA}")
            if identity is not None:
                refuse_difference(path, state["flags"], identity)
            return state
    if problems:
        raise ValueError("no checkpoint can be read: " + "; ".join(problems))
    return None


def read_run(folder):
    """(flags, state) of a run: an argparse.Namespace of its config.json, and its newest checkpoint. Raises ValueError
    when the folder does not hold one."""
    path = pathlib.Path(folder, "config.json")
    if not path.exists():
        raise ValueError(f"there is no run in {folder}: it has no config.json")
    flags, state = argparse.Namespace(**read_json(path)), load(folder)
    if state is None:
        weights = pathlib.Path(folder, "weights.pth")
        instead = f"its weights alone are in {weights}" if weights.exists() else "it has to be trained here first"
        raise ValueError(f"{folder} holds no checkpoint: {instead}")
    return flags, state


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
    """Where and from which code a run is made, for config.json."""

    def git(*words):
        try:
            done = subprocess.run(["git", *words], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # there is no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    cuda = torch.cuda.is_available() and config.get("device") != "cpu"
    ours = git("ls-files", "--error-unmatch", "checkpoint.py") is not None  # and not another clone that this lies in
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py") if ours else None  # pages may change
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") if ours else None,
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it holds neither flags nor results")
    return content


def read_result(folder, columns=()):
    """The content of result.json; None while a run has not finished. Raises ValueError when it is damaged or lacks
    one of the columns."""
    path = pathlib.Path(folder, "result.json")
    result = read_json(path) if path.exists() else None
    if result is not None and not {"diverged", *columns} <= result.keys():
        raise ValueError(f"{path} cannot be read: it lacks {', '.join({'diverged', *columns} - result.keys())}")
    if result and not result["diverged"] and not all(isinstance(result[name], (int, float)) for name in columns):
        raise ValueError(f"{path} cannot be read: one of {', '.join(columns)} is no number")
    return result


def as_json(content):
    return (json.dumps(content, indent=2) + "\n").encode()


def temporary(path):
    return path.with_name(path.name + ".tmp")


def sync(descriptor):
    """Have the disk hold what was written, where the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_folder(folder):
    """Make renames in a folder durable, where its file system can do that and the folder may be opened and synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(PermissionError):
            sync(descriptor)
    finally:
        os.close(descriptor)


def write(path, content, keep=None):
    """Write a file whole or not at all; the one before gets the name `keep`. Raises OSError."""
    try:
        with open(temporary(path), "wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary(path), path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        with contextlib.suppress(OSError):
            temporary(path).unlink()  # it may be what fills the disk
        raise
