"""The CIFAR experiments of [1] Section 4.2 and [2], the papers of units.py.

    python cifar_train.py --depth 110 --preact                              # ResNet-110, full pre-activation, CIFAR-10
    torchrun --nproc_per_node=2 cifar_train.py --depth 110 --preact         # the same net from two processes
    python cifar_train.py --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-6
    python cifar_train.py --dataset synthetic --depth 20 --preact --iterations 300
    python cifar_train.py --evaluate runs/cifar10-110-basic-preact-seed1

The same command again continues a run that was stopped.
"""

import argparse
import functools
import math
import os
import pathlib
import resource
import sys
import time
from warnings import warn

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import checkpoint
import data
from models import cifar_resnet, compile_units, flatten
from units import UNITS, arguments

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # [1] Section 4.2

RECIPES = {
    # [1] Section 4.2; the warm-up is [2]'s (appendix). Weight decay on convolutions and fc only.
    "paper": dict(batch_size=128, iterations=64_000, drops=(0.5, 0.75), warmup=400, nesterov=False, decay_all=False),
    # github.com/KaimingHe/resnet-1k-layers: 200 epochs, drops after 80 and 121 of them
    "resnet-1k-layers": dict(
        batch_size=64, iterations=156_250, drops=(0.4, 0.605), warmup=0, nesterov=True, decay_all=True
    ),
}


def lr_at(iteration, args):
    """The learning rate of an iteration (0, 1, ...): a tenth during the warm-up, divided by 10 at each drop."""
    if iteration < args.warmup:
        return args.lr / 10
    return args.lr / 10 ** sum(iteration >= int(drop * args.iterations) for drop in RECIPES[args.recipe]["drops"])


def step(net, micro_batches, shared, running, optimizer, scaler, autocast):
    """One iteration of SGD. Leaves the mean loss and error of the mini-batch in shared[-2:]."""
    shared.zero_()  # gradients | running statistics | loss, error
    before = running.clone()
    for images, labels in micro_batches:
        running.copy_(before)  # every micro-batch starts from the same statistics, as every GPU of the papers did
        with autocast:
            logits = net(images)
            loss = cross_entropy(logits, labels)
        scaler.scale(loss).backward()
        error = (logits.argmax(dim=1) != labels).float().mean()
        shared[-len(running) - 2 :] += torch.cat([running, torch.stack([loss.detach(), error])])
    dist.all_reduce(shared)
    shared /= len(micro_batches) * dist.get_world_size()
    running.copy_(shared[-len(running) - 2 : -2])
    scaler.step(optimizer)
    scaler.update()


@torch.inference_mode()
def evaluate(net, images, labels, mean, std, autocast, stop):
    """The error (%) on images (N, 3, 32, 32), each counted once, whatever the number of processes."""
    net.eval()
    rank, world = dist.get_rank(), dist.get_world_size()
    wrong = torch.zeros((), dtype=torch.int64, device=images.device)
    for first in range(0, len(images), 250 * world):
        stop.check()
        mine = slice(first + rank, first + 250 * world, world)
        with autocast, torch.compiler.set_stance("force_eager"):  # no graphs for these sizes, even with --compile
            logits = net((images[mine].float() - mean) / std)
        wrong += (logits.argmax(dim=1) != labels[mine]).sum()
    dist.all_reduce(wrong)
    net.train()
    return 100 * wrong.item() / len(images)


class Cifar:
    """CIFAR as `train` sees it: all of it on the device, a step's images one gather away from its draws.

    sets: {"train": (images, labels), "test": ...} and perhaps "val". What `train` uses: size, the number of training
    images; rows_at, the iterations after which the log gets a row; columns, the row's errors and how they are called;
    flags, those that the result names beside all nets' own; lr_at, sgd_arguments, in_checkpoint; and the methods.
    """

    as_a_graph = True  # on CUDA
    flags = ["recipe"]

    def __init__(self, args, sets, device):
        self.args, self.device, self.lr_at = args, device, functools.partial(lr_at, args=args)
        self.mean, self.std = (t.to(device) for t in data.normalisation(sets["train"][0], args.recipe))
        self.sets = {name: (images.to(device), labels.to(device)) for name, (images, labels) in sets.items()}
        images, self.labels = self.sets.pop("train")
        self.size = len(images)
        self.crops, self.mean_crops = data.every_crop(images), data.every_crop(self.mean)
        self.scale = None if args.recipe == "paper" else self.std  # which is 1 there
        self.watched = "val" if "val" in sets else "test"  # what is evaluated on the way; at the end, everything
        self.columns = {f"{name}_error": f"{name} error" for name in self.sets}
        every = max(250, args.iterations // 32)
        self.rows_at = {*range(every, args.iterations, every), args.iterations}
        self.in_checkpoint = {"mean": self.mean, "std": self.std}
        self.sgd_arguments = {"nesterov": RECIPES[args.recipe]["nesterov"]}
        self.sgd_arguments |= {"decay_all": RECIPES[args.recipe]["decay_all"] or args.decay_all}

    def draw(self, iteration):
        """What an iteration's images are made of."""
        return data.batch_draws(self.args.seed, iteration, self.args.batch_size, self.size, self.device)

    def micro_batches(self, draws):
        """This process's (images, labels) of what was drawn."""
        parts = draws.split(self.args.micro_batch, dim=1)
        parts = [parts[i] for i in own_micro_batches(self.args)]
        return [(data.augment(self.crops, self.mean_crops, self.scale, p), self.labels[p[0]]) for p in parts]

    def errors(self, net, iteration, autocast, stop):
        """{column: error in %} after an iteration."""
        wanted = [name for name in self.sets if name == self.watched or iteration == self.args.iterations]
        found = {f"{n}_error": evaluate(net, *self.sets[n], self.mean, self.std, autocast, stop) for n in wanted}
        return dict.fromkeys(self.columns) | found


def own_micro_batches(args):
    """Which of an iteration's micro-batches are this process's."""
    count, rank, world = args.batch_size // args.micro_batch, dist.get_rank(), dist.get_world_size()
    return range(rank * count // world, (rank + 1) * count // world)


def train(args, net, source, state, run, stop, device):
    """Train a net, on from a checkpoint's state where there is one, to args.iterations or until it diverges.

    source: a Cifar, or what ImageNet has in its place. Process 0 writes the run's folder. Returns the result; raises
    Stopped, with everything saved, when asked to stop, and exits with status 2 when the source gives up.
    """
    rank, tail = dist.get_rank(), math.ceil(args.iterations / 10)
    shared, running = flatten(net)
    optimizer = sgd(net, args.lr, **source.sgd_arguments)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    autocast = reduced(args.precision, device)
    # not torch.manual_seed, which seeds every kind of device and takes the host a hundred times as long
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss and error since a row, loss of the last tenth
    iteration, seconds, rows = 0, 0.0, []
    with checkpoint.all_or_none(args.out):
        if state:
            net.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].to(device)  # load_state_dict leaves it where it was read
            scaler.load_state_dict(state["scaler"])
            sums.copy_(state["sums"])
            iteration, seconds, rows = state["iteration"], state["seconds"], state["rows"]
    began = time.monotonic() - seconds  # so that the clock counts all sittings
    saved = time.monotonic()

    def iterate(draws):
        step(net, source.micro_batches(draws), shared, running, optimizer, scaler, autocast)

    changing = [*net.parameters(), running, *(s["momentum_buffer"] for s in optimizer.state.values())]
    if device.type == "cuda" and source.as_a_graph and not args.compile:
        iterate = graphed(iterate, source.draw(iteration), changing, args)

    def finite():
        return bool(torch.stack([t.isfinite().all() for t in (sums, *changing)]).all())

    def save():
        state = source.in_checkpoint | {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"scaler": scaler.state_dict(), "sums": sums, "iteration": iteration, "rows": rows}
        return rank != 0 or run.save(state | {"seconds": time.monotonic() - began})

    def log(iterations):
        loss, error = (sums[:2] / iterations).tolist()
        row = {"iteration": iteration, "epoch": round(iteration * args.batch_size / source.size, 3)}
        row |= {"lr": source.lr_at(iteration - 1), "train_loss": round(loss, 6), "train_error": round(100 * error, 4)}
        row |= source.errors(net, iteration, autocast, stop)
        rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
        sums[:2] = 0
        if rank == 0:
            run.log(rows)
            said = {said: row[name] for name, said in source.columns.items() if row[name] is not None}
            errors = "  ".join(f"{name} {value:.2f} %" for name, value in said.items())
            place = f"iteration {iteration:,} of {args.iterations:,}, epoch {row['epoch']:.1f}"
            say(f"{place}  lr {row['lr']:g}  training loss {loss:.4f}  {errors}  {rows[-1]['seconds']:,.0f} s")

    if rows and rank == 0:
        run.log(rows)  # once more: the disk may have been full
    net.train()
    bar = tqdm(total=args.iterations, initial=iteration, unit="it", disable=True if rank else None)
    try:
        while True:
            logged = rows[-1]["iteration"] if rows else 0
            if iteration > logged and iteration in source.rows_at:
                if not finite():
                    break
                log(iteration - logged)
            if iteration == args.iterations:
                break
            if stop.check(time.monotonic() - saved >= args.checkpoint_seconds):
                if not finite():
                    break
                save()
                saved = time.monotonic()
            draws = source.draw(iteration)
            for group in optimizer.param_groups:
                group["lr"].fill_(source.lr_at(iteration))
            generator.manual_seed(data.mix(args.seed, iteration, rank))  # for dropout: pure, as all draws are
            iterate(draws)
            sums[:2] += shared[-2:]
            if iteration >= args.iterations - tail:
                sums[2] += shared[-2]
            iteration += 1
            bar.update()
    except (checkpoint.Stopped, SystemExit):  # asked to stop; or the source gave up
        if finite() and save() and rank == 0:
            checkpoint.tell(f"saved in {args.out}; the same command continues it")
        raise
    finally:
        bar.close()
    diverged = not finite()
    if not diverged:
        save()
    names = "dataset depth unit unit_args seed iterations batch_size micro_batch precision".split()
    return {
        **{name: getattr(args, name) for name in names + source.flags},
        "parameters": sum(p.numel() for p in net.parameters()),
        **{name: None if diverged else rows[-1][name] for name in source.columns},
        "train_loss": None if diverged else round(sums[2].item() / tail, 6),
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory": peak_memory(device),
        "diverged": diverged,
    }


def peak_memory(device):
    """Bytes: of the GPU that were in use at once, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def graphed(iterate, draws, state, args):
    """`iterate` as one CUDA graph: launched one by one, the 2,000 kernels of ResNet-110's step are what it waits for.

    The warm-up that a capture needs changes `state`, which is put back. Says why where there can be no graph.
    """
    reason = "fp16" if args.precision == "fp16" else "dropout" if "dropout" in args.unit else None
    static, before, side = draws.clone(), [t.detach().clone() for t in state], torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(0 if reason else 3):
                iterate(static)
        torch.cuda.synchronize()
        if not reason:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread may go on meanwhile
                iterate(static)
    except RuntimeError as error:
        reason = str(error.__context__ or error)  # what broke the capture, rather than that it broke
    torch.cuda.synchronize()
    with torch.no_grad():
        torch._foreach_copy_(state, before)

    def replay(draws):
        static.copy_(draws)
        graph.replay()

    if reason and dist.get_rank() == 0:
        say(f"each kernel is launched by itself, without a CUDA graph: {reason}")
    return iterate if reason else replay


def say(line):
    """Print a line above the progress bar, at once. That nobody reads it (| head, a closed terminal) ends no run."""
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except (OSError, AttributeError):
        sys.stdout = open(os.devnull, "w")


def sgd(net, lr, nesterov=False, decay_all=False):
    """The papers' SGD, in which the weights of convolutions and fc alone decay; with decay_all BN and biases too."""
    weights = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": weights}, {"params": others, "weight_decay": WEIGHT_DECAY if decay_all else 0}]
    lr = torch.tensor(lr, dtype=weights[0].dtype, device=weights[0].device)
    sgd = torch.optim.SGD(groups, lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=nesterov, fused=True)
    for p in net.parameters():
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)  # as after no step; a CUDA graph needs it from the start
    return sgd


def reduced(precision, device):
    """The autocast of a precision, off for float32 and tf32; sets TF32, and warns where a precision gains nothing."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    needs = {"float32": (0, 0), "tf32": (8, 0), "bf16": (8, 0), "fp16": (7, 0)}[precision]
    if device.type == "cpu" and precision != "float32":
        warn(f"--precision {precision}: on most CPUs float32 itself (tf32) or slower (bf16, fp16)", stacklevel=2)
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < needs:
        warn(f"--precision {precision}: this GPU has no units for it, so it is no faster than float32", stacklevel=2)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision in ("bf16", "fp16"))


def new_net(args):
    """The net that the flags name, with its initial weights, on the CPU."""
    torch.manual_seed(args.seed)
    net = cifar_resnet(args.depth, UNITS[args.unit], data.CLASSES[args.dataset], **args.unit_args)
    for layer in net.modules():
        if args.fan_in and isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # by fan-in, Caffe's default
    return net


def load_sets(args):
    """{"train": (images, labels), "test": ...}, and "val" with --val-split."""
    images, labels, *test = data.load_cifar(args.dataset, args.data, args.images)
    if not args.val_split:
        return {"train": (images, labels), "test": test}
    at = len(images) - args.val_split
    if at < 1:
        raise ValueError(f"--val-split {args.val_split} leaves nothing of {len(images)} training images")
    return {"train": (images[:at], labels[:at]), "val": (images[at:], labels[at:]), "test": test}


def parse_flags():
    """The command line, with every default filled in; exits with status 2 on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("the net").add_argument
    add("--depth", type=int, default=20, help="weight layers: 20, 32, 44, 56, 110, 164, 1001, 1202, ... (default 20)")
    add("--preact", action="store_true", help="full pre-activation, [2] Fig. 4(e) (default: the original unit)")
    add("--unit", metavar="NAME", help="a unit of units.py (default bottleneck at 164 and 1001, else basic)")
    add("--unit-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of the unit; repeatable")
    add = parser.add_argument_group("the data").add_argument
    add("--dataset", choices=data.CLASSES, default="cifar10", help="synthetic needs no download (default cifar10)")
    add("--data", metavar="DIR", help="where cifar-10-batches-py lies, downloaded if it does not (default data)")
    add("--val-split", type=int, default=0, metavar="N", help="hold out the last N images; 5000 in [1] (default 0)")
    add("--images", type=int, default=0, metavar="N", help="only the first N images of each set (default 0: all)")
    add = parser.add_argument_group("the recipe").add_argument
    add("--recipe", choices=RECIPES, default="paper", help="[1]'s, or that of the released Torch code (default paper)")
    add("--iterations", type=int, metavar="N", help="the drops scale along (default 64000; resnet-1k-layers 156250)")
    add("--batch-size", type=int, metavar="N", help="images a step (default 128; resnet-1k-layers 64)")
    add("--micro-batch", type=int, metavar="N", help="images that share BN statistics (default half the batch)")
    add("--lr", type=float, default=0.1, help="learning rate before the drops (default 0.1)")
    add("--warmup", type=int, metavar="N", help="iterations at lr/10 (default 400, at most a 16th; resnet-1k-layers 0)")
    add("--fan-in", action="store_true", help="He initialisation by fan-in (default: fan-out)")
    add("--decay-all", action="store_true", help="weight decay on BN and biases too, in recipe paper")
    add("--seed", type=int, default=1, help="of weights, order and augmentation (default 1)")
    add = parser.add_argument_group("the machine and the run").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto: cuda if there is one)")
    add("--precision", choices=("float32", "tf32", "bf16", "fp16"), default="float32", help="(default float32)")
    add("--compile", action="store_true", help="compile the units (a minute or two first; on CUDA in place of a graph)")
    add("--out", metavar="DIR", help="the run's folder (default runs/<dataset>-<depth>-<unit>-seed<seed>)")
    add(
        "--checkpoint-seconds", type=float, default=60, metavar="S", help="what a kill may cost; 0: a step (default 60)"
    )
    add("--timeout", type=int, default=600, metavar="S", help="how long processes wait for each other (default 600)")
    add("--evaluate", metavar="RUN", help="print the test error of a run's checkpoint instead of training")
    args = parser.parse_args()
    try:
        if args.evaluate is None:
            resolve(args)
        else:
            refuse_all_but("--evaluate --data --device --timeout")
    except ValueError as error:
        checkpoint.fail(error)
    return args


def refuse_all_but(names):
    """Raises ValueError when the command line has other flags than these: with --evaluate the run's folder decides."""
    given = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    wrong = [flag for flag in given if flag not in names.split()]
    if wrong:
        raise ValueError(f"--evaluate goes without {', '.join(wrong)}: the run's own config.json decides")


def resolve_unit(args, bottlenecks, **defaults):
    """Fill in --unit, --preact and the arguments of the unit: bottlenecks at those depths, defaults unlike its own.
    Raises ValueError on a contradiction."""
    if args.unit is None:
        args.unit = ("bottleneck" if args.depth in bottlenecks else "basic") + ("-preact" if args.preact else "")
    if args.unit not in UNITS:
        raise ValueError(f"there is no --unit {args.unit}: choose from {', '.join(UNITS)}")
    preact = UNITS[args.unit].preact == "bn-relu"
    if args.preact and not preact:
        raise ValueError(f"--preact contradicts --unit {args.unit}, which is not a full pre-activation unit")
    args.preact = preact
    args.unit_args = arguments(UNITS[args.unit])
    args.unit_args |= {name: value for name, value in defaults.items() if name in args.unit_args}
    for word in args.unit_arg:
        name, _, value = word.partition("=")
        if name not in args.unit_args:
            raise ValueError(f"--unit-arg {word}: {args.unit} takes {', '.join(args.unit_args) or 'no arguments'}")
        kind = type(args.unit_args[name])
        try:
            args.unit_args[name] = {"true": True, "false": False}[value] if kind is bool else kind(value)
            finite = isinstance(args.unit_args[name], str) or math.isfinite(args.unit_args[name])
        except (ValueError, KeyError):
            finite = False
        if not finite:
            raise ValueError(f"--unit-arg {word}: {name} is {'true or false' if kind is bool else 'a number'}")
    del args.unit_arg


def at_least(args, **minima):
    """Raises ValueError when a flag is below its minimum."""
    for name, least in minima.items():
        if not getattr(args, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")


def check_recipe(args):
    """Raises ValueError when a number of the recipe is impossible or the batches cannot be divided as said."""
    at_least(args, batch_size=1, micro_batch=1, seed=0, checkpoint_seconds=0)
    if not 0 < args.lr <= torch.finfo(torch.float32).max:
        raise ValueError(f"--lr must be a positive float32, not {args.lr}")
    if args.seed >= 2**63:
        raise ValueError(f"--seed must be below 2^63, not {args.seed}")
    if args.batch_size % args.micro_batch:
        raise ValueError(f"--micro-batch {args.micro_batch} does not divide --batch-size {args.batch_size}")
    count, world = args.batch_size // args.micro_batch, int(os.environ.get("WORLD_SIZE", 1))
    if world < 1 or count % world:
        raise ValueError(f"{world} processes cannot share {count} micro-batches of {args.micro_batch} images evenly")


def resolve(args):
    """Fill in what the flags leave to the recipe and the unit. Raises ValueError on a contradiction."""
    resolve_unit(args, bottlenecks=(164, 1001))
    with torch.device("meta"):  # raises ValueError for an impossible depth or option
        cifar_resnet(args.depth, UNITS[args.unit], **args.unit_args)

    recipe = RECIPES[args.recipe]
    args.iterations = recipe["iterations"] if args.iterations is None else args.iterations
    args.batch_size = recipe["batch_size"] if args.batch_size is None else args.batch_size
    args.micro_batch = max(args.batch_size // 2, 1) if args.micro_batch is None else args.micro_batch
    args.warmup = min(recipe["warmup"], args.iterations // 16) if args.warmup is None else args.warmup
    args.out = args.out or f"runs/{args.dataset}-{args.depth}-{args.unit}-seed{args.seed}"
    check_recipe(args)
    at_least(args, iterations=1, warmup=0, val_split=0, images=0)


def evaluate_run(flags, device, stop):
    """Print the test error of a run's checkpoint; net and data set are those of its config.json."""
    folder = flags.evaluate
    with checkpoint.all_or_none(folder):
        args = argparse.Namespace(**checkpoint.read_json(pathlib.Path(folder, "config.json")))
        state = checkpoint.load(folder)
        if state is None:
            raise ValueError(f"{folder} holds no checkpoint")
        args.data = flags.data or args.data
        net = cifar_resnet(args.depth, UNITS[args.unit], data.CLASSES[args.dataset], **args.unit_args)
        net.load_state_dict(state["model"])
        images, labels, mean, std = (t.to(device) for t in (*load_sets(args)["test"], state["mean"], state["std"]))
    net.to(device, memory_format=torch.channels_last)
    error = evaluate(net, images, labels, mean, std, reduced(args.precision, device), stop)
    if dist.get_rank() == 0:
        say(f"{folder}: test error {error:.2f} % after {state['iteration']:,} of {args.iterations:,} iterations")
    return 0


def train_run(args, device, stop):
    """Train the net that the flags name, or say that this has been done; the result is in the run's folder."""
    args.data, columns = args.data or "data", {"test_error": "test error"}
    with checkpoint.all_or_none():
        done = checkpoint.result(args.out, columns)
        sets = None if done else load_sets(args)
        net = new_net(args).to(device, memory_format=torch.channels_last)
        if args.compile and not done:
            compile_units(net)
        flags = {name: value for name, value in vars(args).items() if name != "evaluate"}
        run = checkpoint.Run(args.out, flags) if dist.get_rank() == 0 else None
        state = None if done else checkpoint.load(args.out, flags)
    checkpoint.agree(args.out, done is None, state and state["iteration"])
    result = done or train(args, net, Cifar(args, sets, device), state, run, stop, device)
    return finish(run, result, done, columns)


def finish(run, result, done, columns, paper=""):
    """Write result.json, if that has not been done, and say how the run ended. Returns the exit status."""
    if not run:
        return 0
    status = run.status if done else run.finish(result)
    if (run.folder / "result.json").exists():
        errors = [] if result["diverged"] else [f"{said} {result[name]:.2f} %" for name, said in columns.items()]
        files = f"its files are in {run.folder} (its curve: python report.py {run.folder})"
        say(f"{'already finished' if done else 'finished'}: {', '.join(errors) or 'diverged'}{paper}; {files}")
    return status


def start(work, args):
    """Do what the flags ask for, as one of however many processes. Returns the exit status."""
    stop = checkpoint.Stop(args.timeout)
    try:
        device = checkpoint.start_processes(args.device, args.timeout)
    except ValueError as error:
        checkpoint.fail(error)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        return work(args, device, stop)
    except checkpoint.Stopped as stopped:
        if dist.get_rank() == 0:
            checkpoint.tell(f"{stopped}: stopped; what has been saved stays")
        return stopped.status
    except RuntimeError as error:
        checkpoint.lost(error, stop.asked)


def main():
    args = parse_flags()
    return start(train_run if args.evaluate is None else evaluate_run, args)


if __name__ == "__main__":
    status = main()
    dist.destroy_process_group()
    sys.exit(status)
