"""Speed: beside any peer, beside the PIL pipelines, with depth, and as a multiple of what the device allows.

    python benchmark.py step --depth 110                                      # against the plain NCHW twin
    python benchmark.py step --depth 20 --peer resnet.py:resnet20 --min-ratio 1.25
    python benchmark.py step --dataset imagenet --depth 50 --batch-size 16 --peer torchvision.models:resnet50
    python benchmark.py step --depth 164 --unit bottleneck-preact --compile
    python benchmark.py evaluate --depth 110
    python benchmark.py data
    python benchmark.py depth
    python benchmark.py data >> results/speed.md                              # what is printed is Markdown

What is compared runs in turn, A, B, A, B, ...: a ratio is the median (and the quartiles) of the ratios of pairs.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
import types

import numpy as np
import PIL.Image
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import checkpoint
import cifar_train
import data
from models import cifar_resnet, compile_units, flatten, imagenet_resnet
from units import UNITS

# Measured by `depth`; cost per layer is compared with the first one's
DEPTHS = {110: "basic", 20: "basic", 164: "bottleneck-preact", 1001: "bottleneck-preact", 1202: "basic"}


def clock(args):
    """Seconds so far: of CPU time, finished subprocesses included, or by the wall; a GPU has finished its work then."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if args.clock == "cpu":
        return time.process_time() + sum(os.times()[2:4])
    return time.perf_counter()


def seconds(work, args, times=1):
    """The seconds that one of `times` calls in a row takes; between two CUDA events with --clock cuda. In place of
    `work`, the connection to a process that measures its own."""
    if isinstance(work, multiprocessing.connection.Connection):
        work.send(times)
        return work.recv()
    if args.clock == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
    began = clock(args)
    for _ in range(times):
        work()
    if args.clock == "cuda":
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000 / times
    return (clock(args) - began) / times


def compare(works, args):
    """Run {name: function} in turn, args.pairs times. Returns {name: {"seconds": median, "ratio": quartiles}}, ratios
    being to the first of them; what takes less than a fifth of a second is repeated within its turn."""
    times = {name: max(1, round(0.2 / max(seconds(work, args), 1e-6))) for name, work in works.items()}
    turns = [{name: seconds(work, args, times[name]) for name, work in works.items()} for _ in range(args.pairs)]
    first = next(iter(works))
    return {
        name: {
            "seconds": statistics.median(turn[name] for turn in turns),
            "ratio": np.quantile([turn[name] / turn[first] for turn in turns], (0.25, 0.5, 0.75)).tolist(),
        }
        for name in works
    }


class Traffic(TorchDispatchMode):
    """Counts the operations that run inside it, and the bytes that they move when each reads its arguments and writes
    its results once. Views and allocations move nothing."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.launches += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, results)) if isinstance(t, torch.Tensor))
        return results


def floor(work, args, device):
    """What the device needs at the least for one call of `work`, operation by operation: its FLOPs at the rate of a
    large matrix product, its bytes at the rate of a large copy."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        work()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision, torch.float32)
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    here, there = torch.ones(2, 1 << 26, device=device)  # 256 MiB each
    rates = compare({"copy": lambda: there.copy_(here), "matmul": lambda: a @ b}, args)
    copied, multiplied = 2 * here.nbytes / rates["copy"]["seconds"], 2 * n**3 / rates["matmul"]["seconds"]
    needed = {"arithmetic": flops.get_total_flops() / multiplied, "traffic": traffic.bytes / copied}
    return {
        "FLOPs": flops.get_total_flops(),
        "bytes": traffic.bytes,
        "launches": traffic.launches,
        "copy, bytes/s": copied,
        "matmul, FLOP/s": multiplied,
        "floor, seconds": max(needed.values()),
        "floor, of": max(needed, key=needed.get),
    }


def build(args):
    """The net that the flags name, and a batch of random images (in channels_last) and labels for it."""
    make, size, classes = (cifar_resnet, 32, 10) if args.dataset == "cifar10" else (imagenet_resnet, 224, 1000)
    torch.manual_seed(1)
    net = make(args.depth, UNITS[args.unit])
    images = torch.randn(args.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    return net, images, torch.randint(classes, (args.batch_size,))


def peer(name, images, labels):
    """The net of FILE.py:CALLABLE or MODULE:CALLABLE; in place of a callable, any expression that gives a net."""
    place, _, expression = name.partition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location("peer", place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        net = eval(expression, vars(module))
        net = net if isinstance(net, torch.nn.Module) else net()
        with torch.no_grad():
            cross_entropy(net(images), labels)
        return net
    except Exception as error:  # somebody else's code
        raise ValueError(f"--peer {name}: {type(error).__name__}: {error}") from None


def peers_step(args, device, connection):
    """In a process of its own, with the settings that its own script would find: train the peer, or our net in NCHW
    with plain SGD. Sends its number of parameters (or what is wrong with it), then the seconds of each turn."""
    torch.set_num_threads(args.threads)
    net, images, labels = build(args)
    try:
        net = peer(args.peer, images, labels) if args.peer is not None else net
    except ValueError as error:
        return connection.send(error)
    connection.send(sum(p.numel() for p in net.parameters()))
    net.to(device).train()
    images, labels = images.to(device).contiguous(), labels.to(device)
    autocast = cifar_train.reduced(args.precision, device)
    sgd = torch.optim.SGD(net.parameters(), args.lr, 0.9, weight_decay=1e-4, foreach=None if args.peer else False)

    def work():
        with autocast:
            loss = cross_entropy(net(images), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    with contextlib.suppress(EOFError):  # until it is closed
        while True:
            connection.send(seconds(work, args, connection.recv()))


def step(args, device):
    """A training step of one micro-batch, ours beside a peer's, or beside the same net in NCHW with plain SGD."""
    net, images, labels = build(args)
    twin, there = multiprocessing.Pipe()
    with there:
        multiprocessing.get_context("spawn").Process(target=peers_step, args=(args, device, there), daemon=True).start()
    count, theirs = sum(p.numel() for p in net.parameters()), twin.recv()
    if isinstance(theirs, ValueError):
        raise theirs
    notes = {"parameters": count, "the other's parameters": theirs, "equal": count == theirs}

    net.to(device, memory_format=torch.channels_last)
    images, labels = images.to(device), labels.to(device)
    shared, running = flatten(net)
    optimizer, autocast = cifar_train.sgd(net, args.lr), cifar_train.reduced(args.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    def ours(_=None):
        cifar_train.step(net, [(images, labels)], shared, running, optimizer, scaler, autocast)

    ours()
    notes |= {"peak memory, bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        notes["peak memory, bytes"] = torch.cuda.max_memory_allocated(device)
    notes |= floor(ours, args, device)
    works = {"ours": ours}
    if args.compile:
        compile_units(net)
        torch._dynamo.utils.counters.clear()
        torch.compiler.config.force_disable_caches = True  # as on a fresh machine
        torch._inductor.config.compile_threads = 1  # in this process, so that its CPU time is counted
        notes |= {"compilation and first step, seconds": seconds(ours, args)}
        notes |= {"compiled graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}
    if device.type == "cuda":
        state = [*net.parameters(), running, *(s["momentum_buffer"] for s in optimizer.state.values())]
        nothing, works = torch.zeros(1, device=device), {}
        for name, deterministic in (("ours, as one CUDA graph", True), ("without cudnn.deterministic", False)):
            torch.backends.cudnn.deterministic = deterministic
            works[name] = functools.partial(cifar_train.graphed(ours, nothing, state, args), nothing)
        torch.backends.cudnn.deterministic = True
        works["ours, launch by launch"] = ours

    figures = compare(works | {args.peer or "NCHW, plain SGD": twin}, args)
    notes["multiple of the floor"] = next(iter(figures.values()))["seconds"] / notes["floor, seconds"]
    return figures, notes


def evaluate(args, device):
    """Evaluation of a thousand CIFAR images, ours beside the same net in NCHW that keeps what a gradient would need."""
    args.batch_size = 1000
    net, images, labels = build(args)
    twin = copy.deepcopy(net).to(device).eval()
    net.to(device, memory_format=torch.channels_last)
    images, labels = (images * 50 + 128).byte().to(device), labels.to(device)
    mean, std = torch.full((3, 32, 32), 128.0, device=device), torch.ones(3, 1, 1, device=device)
    autocast, stop = cifar_train.reduced(args.precision, device), types.SimpleNamespace(check=lambda: None)
    plain = images.contiguous()

    def theirs():
        wrong = 0
        for first in range(0, len(plain), 250):
            with autocast:
                logits = twin((plain[first : first + 250].float() - mean) / std)
            wrong += (logits.argmax(dim=1) != labels[first : first + 250]).sum().item()

    def ours():
        cifar_train.evaluate(net, images, labels, mean, std, autocast, stop)

    return compare({"ours": ours, "NCHW, with gradients": theirs}, args), {"images": len(images)}


class Pictures(torch.utils.data.Dataset):
    """Pictures through PIL, as torchvision.datasets.CIFAR10 has them."""

    def __init__(self, images, transform):
        self.images, self.transform = images.permute(0, 2, 3, 1).numpy(), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(PIL.Image.fromarray(self.images[index])), 0


def loading(args, device):
    """Augmented images on the CPU, ours beside torchvision's transforms of PIL images: CIFAR's, and JPEG files."""
    images = data.load_cifar("synthetic", None, 5120)[0]
    mean, _ = data.normalisation(images, "paper")
    crops, mean_crops = data.every_crop(images), data.every_crop(mean)
    chain = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    chain.append(transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))
    pictures = Pictures(images, transforms.Compose(chain))

    def ours():
        for t in range(40):
            data.augment(crops, mean_crops, None, data.batch_draws(1, t, 128, len(images), "cpu"))

    def theirs(workers):
        for _ in torch.utils.data.DataLoader(pictures, 128, shuffle=True, num_workers=workers):
            pass

    works = {f"CIFAR: PIL and DataLoader, {n} workers": functools.partial(theirs, n) for n in (0, 2)}
    figures = compare({"CIFAR: ours": ours} | works, args)
    notes = {f"{name}, images/s": len(images) / figure["seconds"] for name, figure in figures.items()}

    with tempfile.TemporaryDirectory() as folder:
        files = data.ImageFiles(pathlib.Path(args.data or made_photographs(folder)))
        crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        chain = transforms.Compose([*crop, transforms.Normalize(data.MEAN, data.STD)])
        keys = [(0, index) for index in range(len(files))][:200]

        def jpeg(augment):
            view = functools.partial(data.augmented, augment=augment, crop=224, seed=1)
            data.Views(files, view, data.train_batch).__getitems__(keys)

        def pil():
            torch.stack([chain(files.open(index).convert("RGB")) for _, index in keys])

        works = {f"JPEG: ours, {augment}": functools.partial(jpeg, augment) for augment in ("scale-aspect", "scale")}
        found = compare(works | {"JPEG: PIL, RandomResizedCrop, flip, ToTensor, Normalize": pil}, args)
    notes |= {f"{name}, images/s": len(keys) / figure["seconds"] for name, figure in found.items()}
    return figures | found, notes


def made_photographs(folder):
    """Fifty JPEG files of 500 x 375 as a folder of one class."""
    pathlib.Path(folder, "made").mkdir()
    rng = np.random.default_rng(0)
    for i in range(50):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.array(coarse) // 2 + rng.integers(0, 32, (375, 500, 3), dtype=np.uint8)
        PIL.Image.fromarray(noisy).save(f"{folder}/made/{i}.jpg", quality=85)
    return folder


def depth(args, device):
    """Construction, a step of one image, and a checkpoint, from 20 layers to 1202; the cost must grow linearly."""
    works, notes = {}, {}
    for depth, unit in DEPTHS.items():
        began = clock(args)
        net, images, labels = build(argparse.Namespace(dataset="cifar10", depth=depth, unit=unit, batch_size=1))
        notes[f"{depth}: construction, s"] = clock(args) - began
        shared, running = flatten(net.to(device, memory_format=torch.channels_last))
        optimizer, scaler = cifar_train.sgd(net, args.lr), torch.amp.GradScaler(device.type, enabled=False)
        batches, autocast = [(images.to(device), labels.to(device))], cifar_train.reduced("float32", device)
        words = net, batches, shared, running, optimizer, scaler, autocast
        works[f"{depth}: step of one image, per weight layer"] = functools.partial(cifar_train.step, *words)
        with tempfile.TemporaryDirectory() as folder:
            run, began = checkpoint.Run(folder, {}), clock(args)
            run.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
            notes[f"{depth}: save, s"] = clock(args) - began
            notes[f"{depth}: checkpoint, bytes"] = pathlib.Path(folder, "checkpoint.pt").stat().st_size
            began = clock(args)
            state = checkpoint.load(folder)
            net.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            notes[f"{depth}: load, s"] = clock(args) - began
    figures = compare(works, args)
    for depth, figure in zip(DEPTHS, figures.values(), strict=True):
        figure["seconds"] /= depth
        figure["ratio"] = [ratio * next(iter(DEPTHS)) / depth for ratio in figure["ratio"]]
    return figures, notes


FIGURES = {"step": step, "evaluate": evaluate, "data": loading, "depth": depth}


def parse_flags():
    """The command line; exits with status 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, work in FIGURES.items():
        add = figures.add_parser(name, description=work.__doc__, help=work.__doc__, allow_abbrev=False).add_argument
        if name in ("step", "evaluate"):
            add("--depth", type=int, default=20, help="(default 20)")
            add("--unit", choices=UNITS, metavar="NAME", help="(default basic, or bottleneck as in the papers)")
            add("--precision", choices=("float32", "tf32", "bf16", "fp16"), default="float32", help="(default float32)")
        if name == "step":
            add("--dataset", choices=("cifar10", "imagenet"), default="cifar10", help="(default cifar10)")
            add("--batch-size", type=int, default=128, metavar="N", help="images in the one micro-batch (default 128)")
            add("--compile", action="store_true", help="compile the units")
            add("--peer", metavar="FILE.py:CALLABLE", help="or MODULE:CALLABLE; what it returns is trained beside ours")
        if name == "data":
            add(
                "--data", metavar="DIR", help="class folders of JPEG files, such as ImageNet's train (default: made up)"
            )
        if name != "depth":
            add("--min-ratio", type=float, metavar="R", help="exit status 1 when other / ours, lower quartile, is less")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto: cuda if there is one)")
        add("--clock", choices=("cpu", "wall", "cuda"), help="(default cuda on a GPU, else cpu: the process's time)")
        add("--threads", type=int, default=1, metavar="N", help="(default 1)")
        add("--pairs", type=int, default=15, metavar="N", help="turns of all that is compared (default 15)")
        add("--json", action="store_true", help="print one line of JSON")
    parser.set_defaults(dataset="cifar10", precision="float32", recipe="paper", lr=1e-4, min_ratio=None)
    args = parser.parse_args()
    for name in ("batch_size", "threads", "pairs"):
        if getattr(args, name, 1) < 1:
            checkpoint.fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if getattr(args, "unit", "") is None:
        deep = args.depth in (164, 1001) if args.dataset == "cifar10" else args.depth >= 50
        args.unit = "bottleneck" if deep else "basic"
    return args


def main():
    args = parse_flags()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    before = os.getloadavg()[0]
    try:
        device = checkpoint.start_processes(args.device)
        args.clock = args.clock or ("cuda" if device.type == "cuda" else "cpu")
        if args.clock == "cuda" and device.type != "cuda":
            raise ValueError("--clock cuda needs a GPU")
        figures, notes = FIGURES[args.figure](args, device)
    except ValueError as error:
        checkpoint.fail(error)
    where = checkpoint.environment({"device": device.type, "precision": args.precision})
    where |= {"cores": os.cpu_count(), "load average": [before, os.getloadavg()[0]], "clock": args.clock}
    if args.json:
        print(json.dumps({"figures": figures, "notes": notes, "environment": where}))
    else:
        print(f"\n## `{where['command']}`\n\n| | milliseconds | times the first: median (quartiles) |\n|---|---|---|")
        for name, figure in figures.items():
            low, middle, high = figure["ratio"]
            print(f"| {name} | {1000 * figure['seconds']:,.4g} | {middle:.2f} ({low:.2f}, {high:.2f}) |")
        print(f"\n{args.pairs} turns. " + "; ".join(f"{name}: {shown(value)}" for name, value in notes.items()) + ".\n")
        print("; ".join(f"{name}: {shown(value)}" for name, value in where.items() if name != "command") + ".")
    ratio = list(figures.values())[-1]["ratio"][0]
    return 1 if args.min_ratio is not None and ratio < args.min_ratio else 0


def shown(value):
    """A number with as many digits as one reads; anything else as it is."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


if __name__ == "__main__":
    status = main()
    torch.distributed.destroy_process_group()
    sys.exit(status)
