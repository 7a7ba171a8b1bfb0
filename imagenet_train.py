"""The ImageNet experiments of [1] Section 4.1 and [2] Section 5, the papers of units.py, and all their evaluations.

    torchrun --nproc_per_node=8 imagenet_train.py --depth 200 --preact    # eight GPUs, 32 images on each, as in [2]
    python imagenet_train.py --depth 50 --test 10-crop,multi-scale        # on one, in eight micro-batches of 32
    python imagenet_train.py --evaluate runs/imagenet-50-bottleneck-seed1 --test 1-crop-320
    python imagenet_train.py --evaluate RUN RUN --test multi-scale --out runs/ensemble
    python imagenet_train.py --dataset synthetic --depth 18 --crop 64 --epochs 4 --batch-size 32 --lr 0.02 \\
        --micro-batch 32

The same command again continues a run that was stopped. The loop and its step are those of cifar_train.py.
"""

import argparse
import contextlib
import csv
import functools
import math
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist

import checkpoint
import cifar_train
import data
from models import compile_units, imagenet_resnet
from units import UNITS

DROPS = (1 / 3, 2 / 3)  # the learning rate is divided by 10 at epochs 30 and 60 of 90: [2] Section 5, [1] Fig. 4


def lr_at(iteration, args):
    """The learning rate of an iteration (0, 1, ...), without a warm-up ([2] Section 5)."""
    return args.lr / 10 ** sum(iteration >= round(drop * args.iterations) for drop in DROPS)


@torch.inference_mode()
def evaluate(nets, images, protocol, args, device, stop):
    """The top-1 and top-5 error (%) under a protocol of data.PROTOCOLS, by the softmax averaged over its views and over
    the nets. Every image counts once, whatever the number of processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    size = min(args.micro_batch, math.ceil(len(images) / world))
    batches = [
        [(i,) for i in range(first + rank, min(first + size * world, len(images)), world)]
        for first in range(0, len(images), size * world)
    ]
    view = functools.partial(data.test_views, protocol=protocol, crop=args.crop)
    flips = data.PROTOCOLS[protocol][-1]
    autocast = cifar_train.reduced(args.precision, device)
    right = torch.zeros(2, dtype=torch.int64, device=device)
    for net in nets:
        net.eval()
    stream = load(images, view, data.test_batch, batches, args, device)
    for _ in batches:
        stop.check()
        with checkpoint.all_or_none():
            flat, views, labels = next(stream)
        scores = torch.zeros(len(labels), len(images.classes), dtype=torch.float64, device=device)
        for pixels, which in data.same_size(flat.to(device), views):
            for part, rows in zip(pixels.split(size), which.to(device).split(size), strict=True):
                part = data.normalise(part)
                for turned in (part, part.flip(3)) if flips else (part,):
                    for net in nets:
                        with autocast, torch.compiler.set_stance("force_eager"):  # no graphs for these sizes
                            logits = net(turned)
                        scores.index_add_(0, rows, logits.double().softmax(dim=1))
        hits = scores.topk(min(5, scores.shape[1])).indices == labels.to(device).unsqueeze(1)
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
    dist.all_reduce(right)
    for net in nets:
        net.train()
    return [100 * (len(images) - n) / len(images) for n in right.tolist()]


class ImageNet:
    """ImageNet in the place of cifar_train.Cifar: workers decode a step's images while the one before is computed.
    sets: the training and the validation images."""

    as_a_graph = False  # a batch comes from the host, and few large kernels are quickly launched
    columns = {"val_top1": "top-1 error", "val_top5": "top-5 error"}
    flags = ["augment", "crop", "epochs"]
    sgd_arguments = {}

    def __init__(self, args, sets, device, iteration):
        self.args, self.device, self.val, self.size = args, device, sets[1], args.images
        self.lr_at = functools.partial(lr_at, args=args)
        ends = (round(epoch * args.images / args.batch_size) for epoch in range(1, args.epochs + 1))
        self.rows_at = {max(1, end) for end in ends}
        self.in_checkpoint = {"classes": sets[0].classes}
        self.mine = cifar_train.own_micro_batches(args)
        view = functools.partial(data.augmented, augment=args.augment, crop=args.crop, seed=args.seed)
        keys = data.image_batches(args.seed, self.size, args.batch_size, args.micro_batch, self.mine, iteration)
        self.stream = load(sets[0], view, data.train_batch, keys, args, device)
        self.clock = Waiting(args, device)

    def draw(self, iteration):
        with self.clock, checkpoint.all_or_none():
            return [next(self.stream) for _ in self.mine]

    def micro_batches(self, batches):
        batches = [[t.to(self.device, non_blocking=True) for t in batch] for batch in batches]
        return [(data.normalise(pixels, draws), labels) for pixels, draws, labels in batches]

    def errors(self, net, iteration, autocast, stop):
        found = evaluate([net], self.val, "1-crop", self.args, self.device, stop)
        self.clock.restart()
        return dict(zip(self.columns, found, strict=True))


def load(images, view, stack, batches, args, device):
    return data.load_views(images, view, stack, batches, args.workers, device, checkpoint.ignore_signals)


class Waiting:
    """A context around each wait for images. Warns, once, when the device has had nothing to do but wait for more than
    30 % of the time since the last evaluation. The first wait, in which workers start, does not count."""

    def __init__(self, args, device):
        self.args, self.warned, self.cuda = args, dist.get_rank() > 0, device.type == "cuda"
        self.restart()

    def restart(self):
        self.waits, self.waited, self.pending = 0, 0.0, []

    def __enter__(self):
        self.start = time.monotonic()
        if self.waits == 1:
            self.began = self.start
        self.done = self.mark()

    def __exit__(self, *error):
        waited = time.monotonic() - self.start
        self.waits += 1
        if self.waits == 1:
            return
        if self.cuda:
            self.pending.append((self.done, self.mark(), waited))
        else:
            self.waited += waited
        while self.pending and self.pending[0][1].query():  # read when the GPU has passed them, which is not waited for
            done, ready, waited = self.pending.pop(0)
            self.waited += min(waited, done.elapsed_time(ready) / 1000)  # while it still computed it did not wait
        elapsed = time.monotonic() - self.began
        if self.waits > 100 and self.waited > 0.3 * elapsed and not self.warned:
            self.warned = True
            images = (self.waits - 1) * self.args.batch_size
            cifar_train.say(
                f"input-bound: {self.waited / elapsed:.0%} of the time is spent waiting for data. The loader delivers "
                f"{images / elapsed:,.0f} images/s, the net takes {images / (elapsed - self.waited):,.0f} "
                f"(--workers is {self.args.workers})"
            )

    def mark(self):
        """When the GPU will have done all that it has been given so far."""
        event = torch.cuda.Event(enable_timing=True) if self.cuda else None
        if event:
            event.record()
        return event


@torch.inference_mode()
def recompute_bn(net, images, n, args, device):
    """BN's statistics as the true mean and variance over n training views, in whole micro-batches, as the authors did
    before they published their nets (github.com/KaimingHe/deep-residual-networks)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total = math.ceil(n / args.micro_batch)
    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    moments = [torch.zeros(2, layer.num_features, dtype=torch.float64, device=device) for layer in layers]

    def gather(moment, layer, inputs):
        x = inputs[0].double()
        moment += torch.stack([x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))])

    hooks = [
        layer.register_forward_pre_hook(functools.partial(gather, moment))
        for layer, moment in zip(layers, moments, strict=True)
    ]
    view = functools.partial(data.augmented, augment=args.augment, crop=args.crop, seed=args.seed)
    stream = data.image_batches(args.seed, len(images), args.micro_batch, args.micro_batch, range(1), args.iterations)
    stream = (batch for i, batch in zip(range(total), stream, strict=False) if i % world == rank)
    autocast = cifar_train.reduced(args.precision, device)
    net.train()
    with checkpoint.all_or_none():
        for pixels, draws, _ in load(images, view, data.train_batch, stream, args, device):
            with autocast:
                net(data.normalise(pixels.to(device), draws.to(device)))
    for hook in hooks:
        hook.remove()
    for layer, moment in zip(layers, moments, strict=True):
        dist.all_reduce(moment)
        mean, square = moment / total
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(square - mean.square())


def parse_flags():
    """The command line, with every default filled in; exits with status 2 on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("the net").add_argument
    add("--depth", type=int, default=50, help="weight layers: 18, 34, 50, 101, 152, 200 (default 50)")
    add("--preact", action="store_true", help="full pre-activation, [2] Fig. 4(e) (default: the original unit)")
    add("--unit", metavar="NAME", help="a unit of units.py (default basic at 18 and 34, else bottleneck)")
    add("--unit-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of the unit; repeatable")
    add = parser.add_argument_group("the data").add_argument
    add(
        "--dataset",
        choices=("imagenet", "synthetic"),
        default="imagenet",
        help="synthetic needs none (default imagenet)",
    )
    add("--data", metavar="DIR", help="where train/<class>/ and val/<class>/ lie (default data/imagenet)")
    add("--augment", choices=data.AUGMENT, default="scale", help="scale is the papers' (default scale)")
    add("--crop", type=int, default=224, metavar="N", help="pixels; every size scales along (default 224)")
    add("--images", type=int, metavar="N", help="how many synthetic ones to train on (default 1000)")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: the cores of a process)")
    add = parser.add_argument_group("the recipe").add_argument
    add("--epochs", type=int, default=90, metavar="N", help="the drops scale along (default 90)")
    add("--batch-size", type=int, metavar="N", help="images a step (default 256); with --evaluate at once (32)")
    add("--micro-batch", type=int, metavar="N", help="images that share BN statistics (default an 8th of the batch)")
    add("--lr", type=float, default=0.1, help="learning rate before the drops (default 0.1)")
    add("--seed", type=int, default=1, help="of weights, order and augmentation (default 1)")
    add = parser.add_argument_group("the machine and the run").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto: cuda if there is one)")
    add("--precision", choices=("float32", "tf32", "bf16", "fp16"), default="float32", help="(default float32)")
    add("--compile", action="store_true", help="compile the units: a minute or two first, then faster on a GPU")
    add("--out", metavar="DIR", help="the run's folder (default runs/<dataset>-<depth>-<unit>-seed<seed>)")
    add(
        "--checkpoint-seconds",
        type=float,
        default=300,
        metavar="S",
        help="what a kill may cost; 0: a step (default 300)",
    )
    add("--timeout", type=int, default=600, metavar="S", help="how long processes wait for each other (default 600)")
    add = parser.add_argument_group("evaluation").add_argument
    protocols = ", ".join(data.PROTOCOLS)
    add("--test", metavar="PROTOCOL[,...]", help=f"at the end of training, or with --evaluate: {protocols}")
    add(
        "--evaluate", nargs="+", metavar="RUN", help="evaluate a run as its flags say; of several the average, in --out"
    )
    add("--recompute-bn", type=int, default=0, metavar="N", help="before, BN's statistics over N training images")
    args = parser.parse_args()
    try:
        if args.evaluate:
            own = "--evaluate --test --recompute-bn --data --device --workers --batch-size --out --timeout"
            cifar_train.refuse_all_but(own)
        resolve(args)
    except ValueError as error:
        checkpoint.fail(error)
    return args


def resolve(args):
    """Fill in what the flags leave open. Raises ValueError on a contradiction."""
    cifar_train.resolve_unit(args, bottlenecks=(50, 101, 152, 200), option="B")
    with torch.device("meta"):  # raises ValueError for an impossible depth or option
        imagenet_resnet(args.depth, UNITS[args.unit], **args.unit_args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    args.workers = max(cores // processes, 1) if args.workers is None else args.workers
    args.test = args.test.split(",") if args.test else []
    for protocol in args.test:
        if protocol not in data.PROTOCOLS:
            raise ValueError(f"there is no --test {protocol}: choose from {', '.join(data.PROTOCOLS)}")
    if args.evaluate:
        if len(args.evaluate) > 1 and not args.out:
            raise ValueError("--evaluate of several runs needs a folder of its own: --out DIR")
        if args.out and pathlib.Path(args.out, "config.json").exists():
            raise ValueError(f"--out {args.out} is the folder of a training run: choose another for the evaluation")
        args.batch_size = 32 if args.batch_size is None else args.batch_size
        cifar_train.at_least(args, batch_size=1, workers=0, recompute_bn=0)
        return
    if args.recompute_bn:
        raise ValueError("--recompute-bn goes with --evaluate")
    if args.dataset == "imagenet" and args.images is not None:
        raise ValueError("--images goes with --dataset synthetic")
    args.images = 1000 if args.images is None else args.images
    args.batch_size = 256 if args.batch_size is None else args.batch_size
    args.micro_batch = max(args.batch_size // 8, 1) if args.micro_batch is None else args.micro_batch
    args.out = args.out or f"runs/{args.dataset}-{args.depth}-{args.unit}-seed{args.seed}"
    cifar_train.check_recipe(args)
    cifar_train.at_least(args, epochs=1, crop=32, images=1, workers=0)
    if args.crop == 32 and args.micro_batch == 1:
        raise ValueError("--crop 32 ends in maps of one pixel: BN needs a --micro-batch of at least 2 images there")


def papers_figures(args, protocol):
    """What the papers have for a net under a protocol, by the tables' copy in paper/: " (the paper: 22.85, 6.71)"."""
    body, _, panel = args.unit.partition("-")
    option = args.unit_args.get("option", "")
    name = f"imagenet/{args.depth}" + (panel and f"-{panel}")
    name += f"-{option}" if option and (body == "basic" or option != "B") else ""
    name += "-scale-aspect" if args.augment == "scale-aspect" else ""
    with open(pathlib.Path(__file__).parent / "paper" / "tables.csv", newline="") as file:
        cells = [cell for cell in csv.DictReader(file) if cell["run"] == name and cell["paper"] != "-"]
    found = {cell["metric"]: cell["paper"] for cell in cells}
    figures = [found[f"{protocol} {top}"] for top in ("top-1", "top-5") if f"{protocol} {top}" in found]
    return f" (the paper, all of ImageNet: {', '.join(figures)})" if figures else ""


def test(nets, images, protocols, args, device, stop, folder, more, write):
    """Evaluate under each protocol: a line on the terminal, and <protocol>.json in a folder. Returns their contents."""
    found = {}
    for protocol in protocols:
        top1, top5 = evaluate(nets, images, protocol, args, device, stop)
        found[protocol] = {"top1": top1, "top5": top5, "images": len(images), "precision": args.precision} | more
        write(pathlib.Path(folder, f"{protocol}.json"), found[protocol])
        if dist.get_rank() == 0:
            paper = papers_figures(args, protocol) if len(nets) == 1 else ""
            cifar_train.say(f"{folder}: {protocol} top-1 error {top1:.2f} %, top-5 {top5:.2f} %{paper}")
    return found


def read_run(folder):
    """(flags, net, checkpoint) of a run. Raises ValueError when its folder does not hold one."""
    args = argparse.Namespace(**checkpoint.read_json(pathlib.Path(folder, "config.json")))
    state = checkpoint.load(folder)
    if state is None:
        raise ValueError(f"{folder} holds no checkpoint")
    net = imagenet_resnet(args.depth, UNITS[args.unit], args.classes, **args.unit_args)
    net.load_state_dict(state["model"])
    return args, net, state


def check_classes(folder, classes, images):
    if classes != images.classes:
        mine, theirs = (f"{len(names)} classes ({names[0]} ... {names[-1]})" for names in (classes, images.classes))
        raise ValueError(f"{folder} is of {mine} and the images of {theirs}")


def evaluate_runs(flags, device, stop):
    """Evaluate a run's checkpoint, or the average of several; net, data set and crop are those of their config.json."""
    began = time.monotonic()
    with checkpoint.all_or_none(" or ".join(flags.evaluate)):
        lacking = [run for run in flags.evaluate if not pathlib.Path(run, "config.json").exists()]
        if lacking:
            raise ValueError(f"there is no run in {', '.join(lacking)}")
        runs = [read_run(folder) for folder in flags.evaluate]
        args = runs[0][0]
        place = args.dataset, flags.data or args.data
        images = data.imagenet_part(*place, "val", args.images)
        train_images = data.imagenet_part(*place, "train", args.images) if flags.recompute_bn else None
        for folder, (other, net, state) in zip(flags.evaluate, runs, strict=True):
            check_classes(folder, state["classes"], images)
            if (other.dataset, other.crop) != (args.dataset, args.crop):
                raise ValueError(f"{folder} and {flags.evaluate[0]} differ in data set or crop")
            net.to(device, memory_format=torch.channels_last)
        out = pathlib.Path(flags.out or flags.evaluate[0])
        out.mkdir(parents=True, exist_ok=True)
        made = {"runs": flags.evaluate, "iterations": [state["iteration"] for _, _, state in runs]}
        made |= {"recompute_bn": flags.recompute_bn}
        before = (checkpoint.result(out) if flags.out else None) or made
        if any(before.get(name) != value for name, value in made.items()):
            raise ValueError(f"--out {out} holds the evaluation of {', '.join(before.get('runs', []))}: choose another")

    def write(path, content):
        with checkpoint.all_or_none():
            if dist.get_rank() == 0:
                checkpoint.write(path, checkpoint.as_json(content))

    for other, net, _ in runs:
        other.workers = flags.workers
        if flags.recompute_bn:
            recompute_bn(net, train_images, flags.recompute_bn, other, device)
    args.micro_batch = flags.batch_size
    found = test([net for _, net, _ in runs], images, flags.test or ["1-crop"], args, device, stop, out, made, write)
    if flags.out:
        done = before | {"dataset": args.dataset, "precision": args.precision, "diverged": False, **found}
        done |= {"seconds": round(time.monotonic() - began, 1), "peak_memory": cifar_train.peak_memory(device)}
        write(out / "result.json", done)
    return 0


def final(folder, protocol, iterations):
    """Has the net of a run's last iteration been evaluated under a protocol, as training left it?"""
    path = pathlib.Path(folder, f"{protocol}.json")
    made = checkpoint.read_json(path) if path.exists() else {}
    return made.get("iterations") == [iterations] and made.get("recompute_bn") == 0


def train_run(args, device, stop):
    """Train the net that the flags name, or say that this has been done, and evaluate what --test asks for and has not
    been evaluated yet; all of it is in the run's folder, result.json last."""
    args.data = args.data or "data/imagenet"
    with checkpoint.all_or_none():
        sets = data.load_imagenet(args.dataset, args.data, args.images)
        args.images, args.classes = len(sets[0]), len(sets[0].classes)
        args.iterations = max(1, round(args.epochs * args.images / args.batch_size))
        torch.manual_seed(args.seed)
        net = imagenet_resnet(args.depth, UNITS[args.unit], args.classes, **args.unit_args)
        net.to(device, memory_format=torch.channels_last)
        if args.compile:
            compile_units(net)
        flags = {name: value for name, value in vars(args).items() if name not in ("evaluate", "test", "recompute_bn")}
        run = checkpoint.Run(args.out, flags) if dist.get_rank() == 0 else None
        state = checkpoint.load(args.out, flags)
        if state:
            check_classes(args.out, state["classes"], sets[1])
        done = checkpoint.result(args.out, ImageNet.columns)
        protocols = [name for name in args.test if not final(args.out, name, args.iterations)]
        if done and done["diverged"]:
            protocols = []
        elif done and protocols and (state is None or state["iteration"] != args.iterations):
            raise ValueError(f"{args.out} is finished and holds no checkpoint of its end to evaluate")
    checkpoint.agree(args.out, done is None, protocols, state and state["iteration"])

    def write(path, content):
        if run:
            run.write(path, checkpoint.as_json(content))

    result = done
    if not done:
        source = ImageNet(args, sets, device, state["iteration"] if state else 0)
        with contextlib.closing(source.stream):
            result = cifar_train.train(args, net, source, state, run, stop, device)
    elif protocols:
        net.load_state_dict(state["model"])
    if protocols and not result["diverged"]:
        made = {"runs": [args.out], "iterations": [args.iterations], "recompute_bn": 0}
        test([net], sets[1], protocols, args, device, stop, args.out, made, write)
    paper = "" if result["diverged"] else papers_figures(args, "1-crop")
    return cifar_train.finish(run, result, done, ImageNet.columns, paper)


def main():
    args = parse_flags()
    return cifar_train.start(evaluate_runs if args.evaluate else train_run, args)


if __name__ == "__main__":
    status = main()
    dist.destroy_process_group()
    sys.exit(status)
