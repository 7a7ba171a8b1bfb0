"""Speed: beside any peer, beside the PIL pipelines, with depth, and as a multiple of what the device allows.

    python benchmark.py step --depth 110                                      # against the plain NCHW twin
    python benchmark.py step --depth 20 --peer resnet.py:resnet20 --min-ratio 1.25
    python benchmark.py step --dataset imagenet --depth 50 --batch-size 16 --peer torchvision.models:resnet50
    python benchmark.py step --depth 164 --unit bottleneck-preact --compile
    python benchmark.py step --micro-batch 64 --precision bf16                # as cifar_train.py divides the batch
    python benchmark.py evaluate --depth 110
    python benchmark.py depth
    python benchmark.py side-by-side
    python benchmark.py data >> results/speed.md                              # what is printed is Markdown

What is compared runs in turn, A, B, A, B, ...: a ratio is the median (and the quartiles) of the ratios of pairs.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read as torch is imported: threads that spin less share the cores

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import pathlib
import runpy
import sys
import tempfile
import time

import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import checkpoint
import cifar_train
import data
import training
from flags import at_least
from models import cifar_resnet, imagenet_resnet
from units import UNITS

LR = 1e-4
# Measured by `depth`; cost per layer is compared with the first one's
DEPTHS = {110: "basic", 20: "basic", 164: "bottleneck-preact", 1001: "bottleneck-preact", 1202: "basic"}


def now(args):
    """Seconds of CPU time, finished subprocesses included, or by the wall; with --clock cuda an event. A GPU has
    finished its work then."""
    if args.clock == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if args.clock == "cpu":
        return time.process_time() + sum(os.times()[2:4])
    return event if args.clock == "cuda" else time.perf_counter()


def seconds(work, args, times=1):
    """The seconds that one of `times` calls in a row takes. In place of `work`, the connection to a process that
    measures its own."""
    if hasattr(work, "recv"):
        work.send(times)
        return work.recv()
    began = now(args)
    for _ in range(times):
        work()
    ended = now(args)
    return (began.elapsed_time(ended) / 1000 if args.clock == "cuda" else ended - began) / times


def compare(works, args):
    """Run {name: function} in turn, args.pairs times. Returns {name: {"seconds": median, "ratio": quartiles}}, ratios
    being to the first of them; what takes less than a fifth of a second is repeated within its turn."""
    times = {name: max(1, round(0.2 / max(seconds(work, args), 1e-6))) for name, work in works.items()}
    turns = [[seconds(work, args, times[name]) for name, work in works.items()] for _ in range(args.pairs)]
    turns = np.array(turns)  # (pairs, works)
    quartiles = np.quantile(turns / turns[:, :1], (0.25, 0.5, 0.75), axis=0).T.tolist()
    found = zip(works, np.median(turns, axis=0).tolist(), quartiles, strict=True)
    return {name: {"seconds": middle, "ratio": ratio} for name, middle, ratio in found}


class Traffic(TorchDispatchMode):
    """Counts the operations that run inside it, and the bytes that they move when each reads its arguments and writes
    its results once. Views and allocations move nothing."""

    launches = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.launches += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, results)) if isinstance(t, torch.Tensor))
        return results


def floor(work, args):
    """What the device needs at the least for one call of `work`, operation by operation: its FLOPs at the rate of a
    large matrix product, its bytes at the rate of a large copy."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        work()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision, torch.float32)
    n = 8192 if args.device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, dtype=dtype, device=args.device)
    here, there = torch.ones(2, 1 << 26, device=args.device)  # 256 MiB each
    rates = compare({"copy": lambda: there.copy_(here), "matmul": lambda: a @ b}, args)
    copied, multiplied = 2 * here.nbytes / rates["copy"]["seconds"], 2 * n**3 / rates["matmul"]["seconds"]
    total = flops.get_total_flops()
    needed = {"arithmetic": total / multiplied, "traffic": traffic.bytes / copied}
    found = {"FLOPs": total, "bytes": traffic.bytes, "launches": traffic.launches, "copy, bytes/s": copied}
    found |= {"matmul, FLOP/s": multiplied, "floor, seconds": max(needed.values())}
    return found | {"floor, of": max(needed, key=needed.get)}


def build(args):
    """The net that the flags name, on the CPU, and a batch of random images (N, 3, H, W) and labels on the device."""
    make, size, classes = (cifar_resnet, 32, 10) if args.dataset == "cifar10" else (imagenet_resnet, 224, 1000)
    torch.manual_seed(1)
    net, images = make(args.depth, UNITS[args.unit]), torch.randn(args.batch_size, 3, size, size)
    return net, images.to(args.device), torch.randint(classes, (args.batch_size,)).to(args.device)


def our_step(args):
    """Our training step as a function (training.step, partially applied), and its parameters' number."""
    if not dist.is_initialized():  # in a process of its own
        checkpoint.start_processes(args.device.type)
    net, images, labels = build(args)
    shared, running = training.flatten(net.to(args.device, memory_format=torch.channels_last))
    optimizer, precision = training.sgd(net, LR), training.Precision(args.precision, args.device)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    images = images.contiguous(memory_format=torch.channels_last)
    parts = [*zip(images.split(args.micro_batch), labels.split(args.micro_batch), strict=True)]
    words = net, training.classification, parts, shared, running, optimizer, scaler, precision
    return functools.partial(training.step, *words), sum(p.numel() for p in net.parameters())


def as_graph(ours):
    """Our step as training.py has it on a GPU: one CUDA graph."""
    net, _, _, _, running, optimizer, *_ = ours.args
    changed = [*net.parameters(), running, *(state["momentum_buffer"] for state in optimizer.state.values())]
    nothing = [torch.zeros(1, device=running.device)]
    return functools.partial(training.graphed(lambda _: ours(), nothing, changed), nothing)


def peers_step(args):
    """A training step of the peer, or of our net in NCHW with plain SGD, as a function, and its parameters' number."""
    net, images, labels = build(args)
    if args.peer is not None:  # FILE.py:CALLABLE or MODULE:CALLABLE, or any expression in place of a callable
        place, _, expression = args.peer.partition(":")
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no figure
            names = runpy.run_path(place) if place.endswith(".py") else vars(importlib.import_module(place))
            net = eval(expression, names)
            net = net if isinstance(net, torch.nn.Module) else net()
    net.to(args.device).train()
    precision, foreach = training.Precision(args.precision, args.device), None if args.peer else False
    sgd = torch.optim.SGD(net.parameters(), LR, 0.9, weight_decay=1e-4, foreach=foreach)

    def work():
        with precision:
            loss = torch.nn.functional.cross_entropy(net(images), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    return work, sum(p.numel() for p in net.parameters())


def apart(make, args):
    """(connection, number): what make(args) gives, in a process of its own, with the settings that its own script would
    find. Over the connection `seconds` measures it."""
    here, there = multiprocessing.Pipe()
    with there:
        multiprocessing.get_context("spawn").Process(target=serve, args=(make, args, there), daemon=True).start()
    return here, here.recv()


def serve(make, args, connection):
    """In that process: send the number, then the seconds of each turn. Ends when something is wrong."""
    try:
        torch.set_num_threads(args.threads)
        work, number = make(args)
        work()
        connection.send(number)
        with contextlib.suppress(EOFError):  # until it is closed
            while True:
                connection.send(seconds(work, args, connection.recv()))
    except (Exception, SystemExit) as error:  # somebody else's code
        peer = f"--peer {args.peer}: " if getattr(args, "peer", None) is not None else ""
        print(f"benchmark.py: {peer}{type(error).__name__}: {error}", file=sys.stderr)


def step(args):
    """A training step, ours beside a peer's, or beside the same net in NCHW with plain SGD, both of the whole batch."""
    ours, count = our_step(args)
    other, theirs = apart(peers_step, args)
    ours()
    notes = {"parameters": count, "the other's parameters": theirs, "equal": count == theirs}
    notes |= {"micro-batches": args.batch_size // args.micro_batch}
    notes |= {"peak memory, bytes": training.peak_memory(args.device)} | floor(ours, args)
    if args.compile:
        training.compile_units(ours.args[0])
        torch._dynamo.utils.counters.clear()
        torch.compiler.config.force_disable_caches = True  # as on a fresh machine
        torch._inductor.config.compile_threads = 1  # in this process, so that its CPU time is counted
        notes["compilation and first step, seconds"] = seconds(ours, args)
        notes["compiled graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    works = {"ours": ours}
    if args.graph:
        works = {"ours, as one CUDA graph": as_graph(ours)}
        torch.backends.cudnn.deterministic = False
        works |= {"without cudnn.deterministic": as_graph(ours), "ours, launch by launch": ours}
        torch.backends.cudnn.deterministic = True
    figures = compare(works | {args.peer or "NCHW, plain SGD": other}, args)
    notes["multiple of the floor"] = next(iter(figures.values()))["seconds"] / notes["floor, seconds"]
    return figures, notes


def side_by_side(args):
    """A step of two runs at once, by the wall: each with one thread, and each with a thread for every core."""

    def turn(runs):
        for run in runs:
            run.send(1)
        return [run.recv() for run in runs]

    args.clock, works, cores = "wall", {}, training.cores_of_a_process()
    for name, args.threads in (("one thread each", 1), (f"{cores} threads each, torch's default", cores)):
        works[name] = functools.partial(turn, [apart(our_step, args)[0] for _ in range(2)])
    return compare(works, args), {"GOMP_SPINCOUNT": os.environ["GOMP_SPINCOUNT"]}


def to_evaluate(args):
    """A net, a thousand CIFAR images (uint8) and labels, their mean and standard deviation, all on the device, and the
    net's Precision."""
    net, images, labels = build(args)
    images, precision = (images * 50 + 128).byte(), training.Precision(args.precision, args.device)
    mean, std = torch.full((3, 32, 32), 128.0, device=args.device), torch.ones(3, 1, 1, device=args.device)
    return net.to(args.device), images, labels, mean, std, precision


def plain_evaluation(args):
    """An evaluation in NCHW that keeps what a gradient would need, as a function, and the images' number."""
    net, images, labels, mean, std, precision = to_evaluate(args)

    def work():
        wrong = 0
        for part, truth in zip(images.split(250), labels.split(250), strict=True):
            with precision:
                logits = net((part.float() - mean) / std)
            wrong += (logits.argmax(dim=1) != truth).sum().item()

    net.eval()
    return work, len(images)


def evaluate(args):
    """Evaluation of a thousand CIFAR images, ours beside the same net in NCHW that keeps what a gradient would need."""
    net, images, *rest = to_evaluate(args)
    net, images = (t.to(memory_format=torch.channels_last) for t in (net, images))
    other, number = apart(plain_evaluation, args)
    works = {"ours": functools.partial(cifar_train.evaluate, net, images, *rest), "NCHW, with gradients": other}
    return compare(works, args), {"images": number}


def collated(transform, pictures):
    """A batch of pictures (H, W, 3) through PIL and a transform, as torchvision.datasets.CIFAR10 and a DataLoader make
    it, labels included."""
    return default_collate([(transform(PIL.Image.fromarray(picture)), 0) for picture in pictures])


def loading(args):
    """Augmented images on the CPU, ours beside torchvision's transforms of PIL images: CIFAR's, and JPEG files."""
    rest = transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)
    images = data.load_cifar("synthetic", None, 5120)[0]
    crops, mean_crops = data.every_crop(images), data.every_crop(data.normalisation(images, "paper")[0])
    pictures = images.permute(0, 2, 3, 1).numpy()
    collate = functools.partial(collated, transforms.Compose([transforms.RandomCrop(32, padding=4), *rest]))
    large = transforms.Compose([transforms.RandomResizedCrop(224), *rest])

    def ours():
        for t in range(40):
            data.augment(crops, mean_crops, None, data.batch_draws(1, t, 128, len(images), "cpu"))

    def theirs(workers):
        for _ in DataLoader(pictures, 128, shuffle=True, num_workers=workers, collate_fn=collate):
            pass

    def jpeg(augment):
        view = functools.partial(data.augmented, augment=augment, crop=224, seed=1)
        next(data.load_views(files, view, data.train_batch, [keys], 0, torch.device("cpu"), None))

    def pil():
        torch.stack([large(files.open(index).convert("RGB")) for _, index in keys])

    with tempfile.TemporaryDirectory() as folder:
        files = data.ImageFiles(pathlib.Path(args.data or made_photographs(folder)))
        keys = [(0, index) for index in range(min(200, len(files)))]
        works = {f"CIFAR: PIL and DataLoader, {n} workers": functools.partial(theirs, n) for n in (0, 2)}
        cifar = compare({"CIFAR: ours": ours} | works, args)
        works = {f"JPEG: ours, {augment}": functools.partial(jpeg, augment) for augment in ("scale-aspect", "scale")}
        found = compare(works | {"JPEG: PIL, RandomResizedCrop, flip, ToTensor, Normalize": pil}, args)
    counted = [(len(images), item) for item in cifar.items()] + [(len(keys), item) for item in found.items()]
    return cifar | found, {f"{name}, images/s": count / figure["seconds"] for count, (name, figure) in counted}


def made_photographs(folder):
    """Fifty JPEG files of 500 x 375 as a folder of one class."""
    pathlib.Path(folder, "made").mkdir()
    rng = np.random.default_rng(0)
    for i in range(50):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.array(coarse) // 2 + rng.integers(0, 32, (375, 500, 3), dtype=np.uint8)
        PIL.Image.fromarray(noisy).save(f"{folder}/made/{i}.jpg", quality=85)
    return folder


def depth(args):
    """Construction, a step of one image, and a checkpoint, from 20 layers to 1202; the cost must grow linearly."""
    args.batch_size, args.micro_batch, works, notes = 1, 1, {}, {}

    def load(folder, net, optimizer):
        state = checkpoint.load(folder)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    for args.depth, args.unit in DEPTHS.items():
        notes[f"{args.depth}: construction, s"] = seconds(functools.partial(build, args), args)
        ours, _ = our_step(args)
        net, _, _, _, _, optimizer, *_ = ours.args
        with tempfile.TemporaryDirectory() as folder:
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
            save = functools.partial(checkpoint.Run(folder, {}).save, state)
            notes[f"{args.depth}: save, s"] = seconds(save, args)
            notes[f"{args.depth}: checkpoint, bytes"] = pathlib.Path(folder, "checkpoint.pt").stat().st_size
            notes[f"{args.depth}: load, s"] = seconds(functools.partial(load, folder, net, optimizer), args)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].to(args.device)  # load_state_dict leaves it where it was read
        works[f"{args.depth}: step of one image, per weight layer"] = as_graph(ours) if args.graph else ours
    figures = compare(works, args)
    for depth, figure in zip(DEPTHS, figures.values(), strict=True):
        figure["seconds"] /= depth
        figure["ratio"] = [ratio * next(iter(DEPTHS)) / depth for ratio in figure["ratio"]]
    return figures, notes


FIGURES = {"step": step, "evaluate": evaluate, "data": loading, "depth": depth, "side-by-side": side_by_side}


def parse_flags():
    """The command line; exits with status 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, work in FIGURES.items():
        add = figures.add_parser(name, description=work.__doc__, help=work.__doc__, allow_abbrev=False).add_argument
        if name in ("step", "evaluate", "side-by-side"):
            add("--depth", type=int, default=20, help="(default 20)")
            add("--unit", choices=UNITS, metavar="NAME", help="(default basic, or bottleneck as in the papers)")
            add("--precision", choices=training.PRECISIONS, default="float32", help="(default float32)")
        if name in ("step", "side-by-side"):
            add("--dataset", choices=("cifar10", "imagenet"), default="cifar10", help="(default cifar10)")
            add("--batch-size", type=int, default=128, metavar="N", help="images a step (default 128)")
            add("--micro-batch", type=int, metavar="N", help="images that share BN statistics (default the batch)")
        if name == "step":
            add("--compile", action="store_true", help="compile the units")
            add("--peer", metavar="FILE.py:CALLABLE", help="or MODULE:CALLABLE; what it returns is trained beside ours")
        if name == "data":
            add("--data", metavar="DIR", help="class folders of JPEG files, as ImageNet's train (default: made up)")
        if name in ("step", "evaluate", "data"):
            add("--min-ratio", type=float, metavar="R", help="exit status 1 when other / ours, lower quartile, is less")
        if name != "side-by-side":
            add("--clock", choices=("cpu", "wall", "cuda"), help="(default cuda on a GPU, else cpu, the process's)")
            add("--threads", type=int, default=1, metavar="N", help="(default 1)")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto: cuda if there is one)")
        add("--pairs", type=int, default=15, metavar="N", help="turns of all that is compared (default 15)")
        add("--json", action="store_true", help="print one line of JSON")
    none = dict.fromkeys("unit micro_batch min_ratio clock".split())
    parser.set_defaults(dataset="cifar10", depth=20, batch_size=1000, precision="float32", threads=1, **none)
    args = parser.parse_args()
    bottlenecks = (164, 1001) if args.dataset == "cifar10" else (50, 101, 152, 200)
    args.unit = args.unit or ("bottleneck" if args.depth in bottlenecks else "basic")
    args.micro_batch = args.batch_size if args.micro_batch is None else args.micro_batch
    return args


def main():
    args, before = parse_flags(), os.getloadavg()[0]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    checkpoint.prepare_streams()
    try:
        at_least(args, batch_size=1, micro_batch=1, threads=1, pairs=1)
        if args.batch_size % args.micro_batch:
            raise ValueError(f"--micro-batch {args.micro_batch} does not divide --batch-size {args.batch_size}")
        torch.set_num_threads(args.threads)
        args.device = checkpoint.start_processes(args.device)
        args.graph = args.device.type == "cuda" and args.precision != "fp16"
        args.clock = args.clock or ("cuda" if args.device.type == "cuda" else "cpu")
        if args.clock == "cuda" and args.device.type != "cuda":
            raise ValueError("--clock cuda needs a GPU")
        figures, notes = FIGURES[args.figure](args)
    except (ValueError, OSError, EOFError) as error:
        checkpoint.fail(str(error) or "the other's process has ended")
    except (RuntimeError, MemoryError) as error:
        return training.status_of(error)
    where = checkpoint.environment({"device": args.device.type, "precision": args.precision})
    where |= {"cores": os.cpu_count(), "load average": [before, os.getloadavg()[0]], "clock": args.clock}
    if args.json:
        checkpoint.print_out(json.dumps({"figures": figures, "notes": notes, "environment": where}))
    else:
        checkpoint.print_out(f"\n## `{where.pop('command')}`\n")
        checkpoint.print_out("| | milliseconds | times the first: median (quartiles) |\n|---|---|---|")
        for name, figure in figures.items():
            low, middle, high = figure["ratio"]
            checkpoint.print_out(f"| {name} | {1000 * figure['seconds']:,.4g} | {middle:.2f} ({low:.2f}, {high:.2f}) |")
        notes, where = ("; ".join(f"{name}: {shown(v)}" for name, v in found.items()) for found in (notes, where))
        checkpoint.print_out(f"\n{args.pairs} turns. {notes}.\n\n{where}.")
    *_, last = figures.values()
    return 1 if args.min_ratio is not None and last["ratio"][0] < args.min_ratio else 0


def shown(value):
    """A number, or a list of them, with as many digits as one reads; anything else as it is."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


if __name__ == "__main__":
    try:
        status = main()
    finally:
        checkpoint.end_processes()
    sys.exit(status)
