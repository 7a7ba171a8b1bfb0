"""What every experiment shares: the step of SGD, precision, the CUDA graph, and a training's state, rows and result.

An experiment owns its images, its learning rate, its evaluation and its loop, of which this is the pattern:

    with Training(...) as training:
        while True:
            t = training.iteration  # iterations done so far
            if training.row_due(t in rows_at):
                training.row(lr_at(t - 1), errors(t))
            if t == iterations:
                break
            training.save_if_due()
            training.iterate(lr_at(t), draws(t))
"""

import contextlib
import math
import os
import resource
import shlex
import signal
import sys
import time
import traceback
from warnings import warn

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import checkpoint

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # [1] Sections 3.4 and 4.2
PRECISIONS = ("float32", "tf32", "bf16", "fp16")


def step(net, objective, micro_batches, shared, running, optimizer, scaler, precision):
    """One iteration of SGD. Leaves the mean loss and error of the mini-batch in shared[-2:]."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    shared.zero_()  # gradients | running statistics | loss, error
    before = running.clone()
    for batch in micro_batches:
        running.copy_(before)  # every micro-batch starts from the same statistics, as every GPU of the papers did
        with precision:
            loss, error = objective(net, *batch)
        gradients = torch.autograd.grad(scaler.scale(loss), weights)
        torch._foreach_add_([p.grad for p in weights], gradients)  # each .grad is a part of `shared`
        shared[-len(running) - 2 :] += torch.cat([running, torch.stack([loss.detach(), error])])
    dist.all_reduce(shared)
    shared /= len(micro_batches) * dist.get_world_size()
    running.copy_(shared[-len(running) - 2 : -2])
    scaler.step(optimizer)
    scaler.update()


def classification(net, images, labels):
    """The objective of a net that classifies: cross-entropy, and the error (0 ... 1)."""
    logits = net(images)
    return cross_entropy(logits, labels), (logits.argmax(dim=1) != labels).float().mean()


def flatten(net):
    """Put a net's gradients and its BN layers' running statistics into flat tensors, so that one operation reaches all.

    Returns `shared`, of gradients + statistics + 2 elements, and `running`. From now on every trained parameter's .grad
    is a view of the head of `shared` (with the parameter's strides: fused SGD on a CPU is silently wrong where they
    differ), and the statistics are views of `running`. The rest of `shared` is where a step averages statistics, loss
    and error.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    statistics = [s for layer in layers for s in (layer.running_mean, layer.running_var)]
    trained = [p for p in net.parameters() if p.requires_grad]
    running = torch.cat([s.flatten() for s in statistics]) if statistics else trained[0].new_zeros(0).detach()
    shared = running.new_zeros(sum(p.numel() for p in trained) + running.numel() + 2)
    offset = 0
    for p in trained:
        p.grad = shared.as_strided(p.shape, p.stride(), offset)
        offset += p.numel()
    # .data: with a version counter of its own, or backward of a compiled unit would refuse the updates of other BNs
    views = iter(part.data for part in running.split([s.numel() for s in statistics]))
    for layer in layers:
        layer.running_mean, layer.running_var = next(views), next(views)
    return shared, running


def sgd(net, lr, nesterov=False, decay_all=False, weight_decay=WEIGHT_DECAY):
    """The papers' SGD, in which the weights of convolutions and fc alone decay; with decay_all BN and biases too.
    A parameter that does not require a gradient is left alone."""
    trained = [p for p in net.parameters() if p.requires_grad]
    weights, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": weights}, {"params": others, "weight_decay": weight_decay if decay_all else 0}]
    lr = torch.tensor(lr, dtype=weights[0].dtype, device=weights[0].device)
    optimizer = torch.optim.SGD(groups, lr, MOMENTUM, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    for p in trained:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)  # a CUDA graph needs it from the start
    return optimizer


class Precision:
    """A context in which a net computes in "float32", "tf32", "bf16" or "fp16"; it may be entered again and again.
    Leaving it does not reset TF32, so that backward passes use TF32 too."""

    def __init__(self, name, device):
        needs = {"float32": (0, 0), "tf32": (8, 0), "bf16": (8, 0), "fp16": (7, 0)}[name]
        if dist.is_initialized() and dist.get_rank():
            pass  # process 0 warns
        elif device.type == "cpu" and name != "float32":
            slower = "bf16 and fp16 are slower than float32, and tf32 is float32"
            warn(f"--precision {name}: on most CPUs {slower}", stacklevel=3)
        elif device.type == "cuda" and torch.cuda.get_device_capability(device) < needs:
            warn(f"--precision {name}: this GPU has no units for it, so it is no faster than float32", stacklevel=3)
        self.tf32, dtype = name == "tf32", torch.float16 if name == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype, enabled=name in ("bf16", "fp16"))

    def __enter__(self):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        self.autocast.__enter__()

    def __exit__(self, *error):
        self.autocast.__exit__(*error)


def compile_units(net):
    """Compile a net's units in place, each by itself: units of one class and shape share a graph, so that there are as
    few at depth 1001 as at 20. Raises ValueError where torch.compile does not work, such as without a C++ compiler."""
    from torch._inductor import config  # a second's import

    config.compile_threads = min(config.compile_threads, cores_of_a_process())
    torch._dynamo.config.recompile_limit = 64  # beyond it units would run uncompiled without a word
    try:
        torch.compile(torch.exp)(torch.zeros(1, device=net.fc.weight.device))
    except Exception as error:  # compilers raise errors of many kinds
        raise ValueError(f"torch.compile does not work here: {str(error).partition(chr(10))[0]}") from None
    for stage in net.stages:
        for unit in stage:
            unit.compile(dynamic=False)


def graphed(iterate, draws, state, reason=None, timeout=math.inf):
    """Captures one iteration as a CUDA graph: launching 2,000 kernels one by one takes longer than running them.

    iterate: a function of draws, a list of tensors of constant shapes. state: the tensors that it changes; the warm-up
    before a capture changes them too, so they are put back. With a reason why there can be no graph, or where the
    capture fails, it says so and returns `iterate` itself.
    timeout: seconds that a replay waits for the one before the last, as NCCL's watchdog does not see what is captured.
    """
    if not reason:
        static, before = [t.to(state[0].device, copy=True) for t in draws], [t.detach().clone() for t in state]
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # which a capture that fails would not leave
            for _ in range(3):
                iterate(static)
            try:  # NCCL's own thread may go on meanwhile
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    iterate(static)
            except RuntimeError as error:
                reason = str(error.__context__ or error)  # what broke the capture, rather than that it broke
        torch.cuda.synchronize()
        with torch.no_grad():
            torch._foreach_copy_(state, before)
    if reason:
        print_line(f"each kernel is launched by itself, without a CUDA graph: {reason}")
        return iterate
    ends = [torch.cuda.Event(), torch.cuda.Event()]  # of the iteration before the last, and of the last

    def replay(draws):
        until = time.monotonic() + timeout
        while not ends[0].query():  # the host is two iterations ahead at most, so that a stop does not wait for more
            if time.monotonic() > until:
                raise dist.DistError(f"an iteration has not ended in {timeout} s")
            time.sleep(1e-4)
        for buffer, t in zip(static, draws, strict=True):
            buffer.copy_(t, non_blocking=True)
        graph.replay()
        ends[0].record()
        ends.reverse()

    replay.iterate = iterate  # a graph knows addresses alone: what the iteration reads must live as long
    return replay


def mix(*numbers):
    """One seed for torch out of several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def own_micro_batches(args):
    """Which of an iteration's micro-batches are this process's, as a slice."""
    count, rank, world = args.batch_size // args.micro_batch, dist.get_rank(), dist.get_world_size()
    return slice(rank * count // world, (rank + 1) * count // world)


def cores_of_a_process():
    """How many of the machine's cores each of the processes on it has for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(cores // max(checkpoint.whole_number("LOCAL_WORLD_SIZE", 1), 1), 1)


def peak_memory(device):
    """Bytes: the most that was in use on the GPU, or on a CPU the most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux


def print_line(line):
    """Print a line above the progress bar, if this is process 0."""
    if dist.get_rank() == 0:
        checkpoint.print_out(line, tqdm.write)


def duration(seconds):
    """A time as one says it: "40 s", "12 min", "5 h", "2.1 days"."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def rows_at(iterations, trained, evaluated):
    """After which iterations a run gets a row in its log, some 32 of them, and which of these have errors of a set that
    is evaluated, as two sets. An evaluated image costs a third of a trained one; all evaluations together cost at most
    a tenth of the training, though the last row always has one.

    trained: images in all iterations. evaluated: images in one evaluation.
    """
    every = -(-iterations // 32)
    latest = iterations - (every + 1) // 2  # of the last row but one: the last covers half as many iterations or more
    rows = [*range(every, latest + 1, every), iterations]
    evaluations = max(1, int(0.1 * 3 * trained / evaluated))
    apart = math.ceil(len(rows) / evaluations)
    return {*rows}, {*rows[::-apart]}  # every so many rows, counted from the last


class Diverged(Exception):
    """A loss, a weight, a running statistic or a momentum is not finite."""


class Training:
    """The state of a training: the net, its optimizer, sums, rows and clock. Resumes from the run's last checkpoint.

    As a context, it ends well when the training diverges, which is a result. When the run is asked to stop or images
    cannot be read, both between two iterations, it saves the state. Anything else saves nothing: an error within an
    iteration leaves statistics and momentum half changed.

    run: a checkpoint.Run. objective: see `step`. micro_batches: a function from an iteration's draws, a list of
    tensors, to this process's micro-batches. iterations: how many there will be. images: how many to train on.
    columns: {name of an error in log.csv: its name in a sentence}. about: the classes' names, mean, std and size.
    graph: whether a CUDA graph may be tried: not where shapes differ. options: of `sgd`.
    """

    def __init__(
        self,
        args,
        run,
        net,
        objective,
        micro_batches,
        iterations,
        images,
        columns,
        about,
        device,
        graph=True,
        **options,
    ):
        self.args, self.run, self.net, self.device = args, run, net, device
        self.iterations, self.images, self.columns, self.about = iterations, images, columns, about
        self.shared, self.running = flatten(net)
        self.optimizer = sgd(net, args.lr, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        precision = Precision(args.precision, device)

        def compute(draws):
            batches = micro_batches(draws)
            step(net, objective, batches, self.shared, self.running, self.optimizer, self.scaler, precision)

        self.compute, self.precision, self.try_graph = compute, precision, graph and device.type == "cuda"
        # not torch.manual_seed, which seeds every kind of device and takes the host a hundred times as long
        self.generator = torch.default_generator
        if device.type == "cuda":
            self.generator = torch.cuda.default_generators[device.index]
        self.tail = math.ceil(iterations / 10)
        self.computed = torch.cuda.Event() if device.type == "cuda" else None  # recorded after every iteration
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss and error since a row; loss of the tail
        self.iteration, self.rows, self.waited, seconds, self.diverged = 0, [], 0.0, 0.0, False
        with checkpoint.all_or_none(args.out):
            if args.batch_size > 1000 * images:
                raise ValueError(f"--batch-size {args.batch_size} is more than 1,000 times the {images} images")
            state = run.load()
            if state:
                net.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                for group in self.optimizer.param_groups:
                    group["lr"] = group["lr"].to(device)  # load_state_dict leaves it where it was read
                self.scaler.load_state_dict(state["scaler"])
                self.sums.copy_(state["sums"])
                self.iteration, self.rows, seconds = state["iteration"], state["rows"], state["seconds"]
                self.waited = state.get("waited", 0.0)
        checkpoint.agree(args.out, self.iteration)
        self.began = time.monotonic() - seconds  # so that the clock counts all sessions
        self.saved = time.monotonic()

    def __enter__(self):
        if self.rows:
            self.run.log(self.rows)  # once more: the disk may have been full
        self.net.train()
        self.introduce()
        rest = {"total": self.iterations, "initial": self.iteration, "disable": True if dist.get_rank() else None}
        self.bar = tqdm(unit="it", **rest)
        self.seen = self.iteration, self.waited, time.monotonic()  # at the last progress line
        self.measured, self.warned = False, False
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        self.compute = None  # with a living CUDA graph the group of processes could not be left
        self.diverged = kind is Diverged
        if isinstance(error, (checkpoint.Stopped, SystemExit)) and self.finite() and self.save():
            saved = f"saved in {self.args.out}; the same command continues it"
            if isinstance(error, checkpoint.Stopped):
                error.state = saved  # `start` says it
            elif self.run.mine:
                checkpoint.print_error(saved)
        return self.diverged

    def introduce(self):
        """Print what is trained, on what and where, and warn of what seldom trains well."""
        args, count = self.args, sum(p.numel() for p in self.net.parameters())
        name, classes = getattr(args, "name", f"ResNet-{args.depth}"), len(self.about["classes"])
        print_line(
            f"{name} ({args.unit}, {count:,} parameters); {args.dataset}: {self.images:,} training "
            f"image{'s' * (self.images != 1)} of {classes} class{'es' * (classes != 1)}; "
            f"{args.batch_size} image{'s' * (args.batch_size != 1)} a step in {args.precision} on "
            f"{self.device.type}; processes: {dist.get_world_size()}, threads: {torch.get_num_threads()}; in {args.out}"
            + (f", continuing at iteration {self.iteration:,} of {self.iterations:,}" if self.iteration else "")
        )
        if self.images < 10 * args.batch_size:
            print_line(
                f"warning: the {self.images:,} training images are fewer than 10 batches of {args.batch_size}. So few "
                "steps an epoch train badly: choose a smaller --batch-size, and a smaller --lr with it"
            )
        if len(self.running) and args.micro_batch < 16:
            print_line(
                f"warning: BN's statistics are of {args.micro_batch} images, so they are noisy: choose a --micro-batch "
                "of 16 or more if you can (it must divide --batch-size)"
            )

    def means(self):
        """The mean training loss and error (0 ... 1) since the last row."""
        return (self.sums[:2] / max(1, self.iteration - self.last_row())).tolist()

    def print_progress(self, *more, means):
        loss, error = f"training loss {means[0]:.4f}", f"training error {100 * means[1]:.1f} %"
        print_line(", ".join([f"iteration {self.iteration:,} of {self.iterations:,}", loss, error, *more]))
        self.seen = self.iteration, self.waited, time.monotonic()

    def progress(self):
        """When no line has been printed for a minute (at the start: 10 s), print one; on a terminal a bar shows the
        progress instead. Warn, once, when more than 30 % of that time was spent waiting for images."""
        iteration, waited, since = self.seen
        elapsed = time.monotonic() - since
        if elapsed < (60 if self.measured and self.bar.disable else 10):
            return
        rate, share, means = (self.iteration - iteration) / elapsed, (self.waited - waited) / elapsed, self.means()
        left = (self.iterations - self.iteration) / rate
        images, self.seen = rate * self.args.batch_size, (self.iteration, self.waited, time.monotonic())
        self.bar.set_postfix_str(f"loss {means[0]:.3f}, error {100 * means[1]:.1f} %")
        if self.bar.disable or not self.measured and left > 3600:
            waits = f"{share:.0%} of the time waiting for images"
            self.print_progress(f"{images:,.0f} images/s", waits, f"about {duration(left)} left", means=means)
        if share > 0.3 and self.measured and not self.warned:
            self.warned = True
            print_line(
                f"input-bound: {share:.0%} of the time is spent waiting for images. The loader delivers {images:,.0f} "
                f"images/s, the net could take {images / (1 - share):,.0f} (--workers is {self.args.workers})"
            )
        self.measured = True

    def changing(self):
        """The tensors that an iteration changes, but for `shared` and `sums`."""
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [*self.net.parameters(), self.running, *momenta]

    def finite(self):
        return bool(torch.stack([t.isfinite().all() for t in (self.sums, *self.changing())]).all())

    def raise_if_diverged(self):
        if not self.finite():
            raise Diverged

    def save(self):
        """Write a checkpoint. Returns whether that was possible."""
        state = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "about": self.about}
        state |= {"scaler": self.scaler.state_dict(), "sums": self.sums, "iteration": self.iteration}
        state |= {"rows": self.rows, "waited": self.waited, "seconds": time.monotonic() - self.began}
        return self.run.save(state)

    def save_if_due(self):
        """Save after every --checkpoint-seconds. Raises Stopped when the run has been asked to stop, and Diverged."""
        if checkpoint.stop.check(time.monotonic() - self.saved >= self.args.checkpoint_seconds):
            self.raise_if_diverged()
            self.save()
            self.saved = time.monotonic()

    @contextlib.contextmanager
    def waiting(self):
        """A context for what waits for images. On a GPU that is still computing at its end nobody has waited."""
        began = time.monotonic()
        yield
        if self.computed is None or self.computed.query():
            self.waited += time.monotonic() - began

    def iterate(self, lr, draws):
        """One iteration at a learning rate, on what `draws`, a list of tensors, says."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)
        self.generator.manual_seed(mix(self.args.seed, self.iteration, dist.get_rank()))  # for dropout
        if self.try_graph:
            reason = "fp16" if self.args.precision == "fp16" else "dropout" if "dropout" in self.args.unit else None
            timeout = self.args.timeout if dist.get_world_size() > 1 else math.inf
            self.compute = graphed(self.compute, draws, self.changing(), reason, timeout)
            self.try_graph = False
        self.compute(draws)
        self.sums[:2] += self.shared[-2:]
        if self.iteration >= self.iterations - self.tail:
            self.sums[2] += self.shared[-2]
        if self.computed:
            self.computed.record()
        self.iteration += 1
        self.bar.update()
        self.progress()

    def last_row(self):
        return self.rows[-1]["iteration"] if self.rows else 0

    def row_due(self, due):
        """Whether a row that is due after this iteration has still to be written. Raises Diverged."""
        due = due and self.iteration > self.last_row()
        if due:
            self.raise_if_diverged()
        return due

    def row(self, lr, errors):
        """Add a row to the log: the means since the row before, and {column: error in %} of those evaluated now."""
        loss, error = means = self.means()
        epoch = round(self.iteration * self.args.batch_size / self.images, 3)
        row = {"iteration": self.iteration, "epoch": epoch, "lr": lr, "train_loss": round(loss, 6)}
        row |= {"train_error": round(100 * error, 4)} | dict.fromkeys(self.columns) | errors
        self.rows.append(row | {"waited": round(self.waited, 1), "seconds": round(time.monotonic() - self.began, 1)})
        self.sums[:2] = 0
        self.run.log(self.rows)
        shown = [f"{self.columns[name]} {error:.2f} %" for name, error in errors.items()]
        self.print_progress(
            f"epoch {epoch:.1f}", f"lr {lr:g}", *shown, f"{self.rows[-1]['seconds']:,.0f} s", means=means
        )

    def result(self, *flags):
        """Save the last state. Returns the run's result, which names these flags beside those that every run has."""
        if not self.diverged:
            self.save()
        names = "dataset depth unit unit_args seed batch_size micro_batch precision".split()
        return {
            **{name: getattr(self.args, name) for name in [*names, *flags]},
            "iterations": self.iterations,
            "parameters": sum(p.numel() for p in self.net.parameters()),
            **{name: None if self.diverged else self.rows[-1][name] for name in self.columns},
            "train_loss": None if self.diverged else round(self.sums[2].item() / self.tail, 6),
            "waited": round(self.waited, 1),
            "seconds": round(time.monotonic() - self.began, 1),
            "peak_memory": peak_memory(self.device),
            "diverged": self.diverged,
        }


def finish(run, result, columns, paper=""):
    """Write result.json, if the run has none yet, and say how it ended. Returns the exit status."""
    status = run.status if run.result else run.finish(result)
    if run.mine and (run.folder / "result.json").exists():
        errors = [] if result["diverged"] else [f"{name} {result[key]:.2f} %" for key, name in columns.items()]
        files = f"its files are in {run.folder} (its curve: python report.py {shlex.quote(str(run.folder))})"
        how = "already finished" if run.result else "finished"
        print_line(f"{how}: {', '.join(errors) or 'diverged'}{paper}; {files}")
    return status


def start(work, args):
    """Do work(args, device) as one of however many processes. Returns the exit status."""
    checkpoint.prepare_streams()
    try:
        try:
            checkpoint.stop.listen()
            device = checkpoint.start_processes(args.device, args.timeout)
        except (ValueError, OSError, RuntimeError) as error:  # there may be too few files or threads
            checkpoint.fail(error)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        return work(args, device)
    except checkpoint.Stopped as stopped:
        if dist.get_rank() == 0:
            checkpoint.print_error(f"{stopped}: stopped; {stopped.state}")
        return stopped.status
    except Exception as error:
        return status_of(error)
    finally:
        checkpoint.end_processes()


def status_of(error):
    """The exit status after an error that is no fault of this code, with a message; raises any other again. Of several
    processes this one ends at once: to leave their group it would wait for the others, which wait for it."""
    text, alone = str(error) or type(error).__name__, not dist.is_initialized() or dist.get_world_size() == 1
    if checkpoint.is_lost(error):
        checkpoint.print_error(f"process {dist.get_rank()} lost another one, which died or does not answer: {text}")
        os._exit(1)
    if checkpoint.stop.asked and isinstance(error, torch._dynamo.exc.TorchDynamoException):  # Ctrl-C hit its compiler
        checkpoint.print_error(f"{signal.Signals(checkpoint.stop.asked).name}: what was saved before stays")
        return 128 + checkpoint.stop.asked
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "bad_alloc" in text:
        checkpoint.print_error(f"out of memory: {text}. A smaller --micro-batch or --batch-size needs less")
        return 2 if alone else os._exit(2)
    if alone:
        raise error
    traceback.print_exception(error)
    os._exit(1)
