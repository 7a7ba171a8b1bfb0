"""The ImageNet experiments of [1] Section 4.1 and [2] Section 5, the papers of units.py, and all their evaluations.

    torchrun --nproc_per_node=8 imagenet_train.py --depth 200 --preact    # eight GPUs, 32 images on each, as in [2]
    python imagenet_train.py --depth 50 --test 10-crop,multi-scale        # on one, in eight micro-batches of 32
    python imagenet_train.py --evaluate runs/imagenet-50-bottleneck-seed1 --test 1-crop-320
    python imagenet_train.py --evaluate RUN RUN --test multi-scale --out runs/ensemble
    python imagenet_train.py --evaluate R-50.pkl --data DIR --test 1-crop,10-crop,multi-scale
    python imagenet_train.py --weights FROM --data DIR --lr 0.01 --epochs 20    # begin from a net's weights
    python imagenet_train.py --data mine --depth 18 --crop 64 --epochs 15 --batch-size 16 --lr 0.01 --micro-batch 16 \\
        --out runs/mine    # your own pictures: docs/own-pictures.md
    python imagenet_train.py --dataset synthetic --depth 18 --crop 64 --epochs 4 --batch-size 32 --lr 0.02 \\
        --micro-batch 32

The same command again continues a run that was stopped.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read as torch is imported: threads that spin less share the cores

import argparse
import contextlib
import csv
import functools
import math
import pathlib
import sys
import time

import torch
import torch.distributed as dist

import checkpoint
import data
from flags import (
    add_run_flags,
    add_unit_flags,
    add_weights_flags,
    at_least,
    check_recipe,
    pretrained_net,
    refuse_all_but,
    resolve_unit,
    resolve_weights,
)
from models import imagenet_resnet
from training import (
    Precision,
    Training,
    classification,
    compile_units,
    cores_of_a_process,
    finish,
    own_micro_batches,
    peak_memory,
    print_line,
    rows_at,
    start,
)
from units import UNITS
from weights import load as load_weights
from weights import of_run

DROPS = (1 / 3, 2 / 3)  # the learning rate is divided by 10 at epochs 30 and 60 of 90: [2] Section 5, [1] Fig. 4

IDENTITY = (  # the flags that make a run this run; any other may change when it is continued
    "dataset depth unit unit_args augment crop epochs batch_size micro_batch lr seed precision"
).split()
SETTINGS = "data workers device compile out checkpoint_seconds timeout".split()


# Top-1 and top-5 errors (%) that github.com/KaimingHe/deep-residual-networks has for the authors' released nets
RELEASED = {
    50: {"1-crop": "24.7, 7.8", "10-crop": "22.9, 6.7"},
    101: {"1-crop": "23.6, 7.1", "10-crop": "21.8, 6.1"},
    152: {"1-crop": "23.0, 6.7", "10-crop": "21.4, 5.7"},
}


def lr_at(iteration, iterations, lr):
    """The learning rate of an iteration (0, 1, ...) of so many, without a warm-up ([2] Section 5)."""
    return lr / 10 ** sum(iteration >= round(drop * iterations) for drop in DROPS)


@torch.inference_mode()
def evaluate(nets, images, protocol, crop, batch_size, workers, device):
    """The errors (%) {"top1": ..., "top5": ...} under a protocol of data.PROTOCOLS, by the softmax averaged over its
    views and over the nets; of fewer than 6 classes top-1 alone. Every image counts once, whatever the number of
    processes.

    nets: [(net, the Precision in which it computes, (mean, std) of its input as data.normalise has them)].
    batch_size: how many views of crop x crop pixels a net sees at once.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    size = min(batch_size, math.ceil(len(images) / world))
    batches = [
        [(i,) for i in range(first + rank, min(first + size * world, len(images)), world)]
        for first in range(0, len(images), size * world)
    ]
    view = functools.partial(data.test_views, protocol=protocol, crop=crop)
    flips = data.PROTOCOLS[protocol][-1]
    right = torch.zeros(2, dtype=torch.int64, device=device)
    for net, _, _ in nets:
        net.eval()
    stream = load(images, view, data.test_batch, batches, workers, device)
    for _ in batches:
        checkpoint.stop.check()
        with checkpoint.all_or_none():
            flat, views, labels = next(stream)
        scores = torch.zeros(len(labels), len(images.classes), dtype=torch.float64, device=device)
        for pixels, rows in data.same_size(flat.to(device), views):
            most = max(1, size * crop**2 // (pixels.shape[1] * pixels.shape[2]))  # of large views fewer fit in memory
            for part, places in zip(pixels.split(most), rows.to(device).split(most), strict=True):
                for net, precision, scale in nets:
                    upright = data.normalise(part, scale=scale)
                    for x in (upright, upright.flip(3)) if flips else (upright,):
                        with precision, torch.compiler.set_stance("force_eager"):  # no graphs for these sizes
                            logits = net(x)
                        scores.index_add_(0, places, logits.double().softmax(dim=1))
        hits = scores.topk(min(5, scores.shape[1])).indices == labels.to(device).unsqueeze(1)
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
    dist.all_reduce(right)
    for net, _, _ in nets:
        net.train()
    errors = [100 * (len(images) - n) / len(images) for n in right.tolist()]
    return dict(zip(("top1", "top5"), errors[: 1 if len(images.classes) < 6 else 2], strict=False))


def load(images, view, stack, batches, workers, device):
    return data.load_views(images, view, stack, batches, workers, device, checkpoint.ignore_signals)


@torch.inference_mode()
def recompute_bn(net, images, n, args, iteration, workers, device, scale=None):
    """BN's statistics as the true mean and variance over n training views, in whole micro-batches, as the authors did
    before they published their nets (github.com/KaimingHe/deep-residual-networks). The views are those that a run with
    the flags `args` would have trained on after an iteration."""
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
    batches = data.image_batches(args.seed, len(images), args.micro_batch, args.micro_batch, range(1), iteration)
    batches = (batch for i, batch in zip(range(total), batches, strict=False) if i % world == rank)
    precision = Precision(args.precision, device)
    net.train()
    with checkpoint.all_or_none():
        for pixels, draws, _ in load(images, view, data.train_batch, batches, workers, device):
            with precision:
                net(data.normalise(pixels.to(device), draws.to(device), scale))
    for hook in hooks:
        hook.remove()
    for layer, moment in zip(layers, moments, strict=True):
        dist.all_reduce(moment)
        mean, square = moment / total
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(square - mean.square())


def train(args, device):
    """Train the net that the flags name, from where its run stands, evaluate what --test asks for and has not been
    evaluated yet, and write the result. Returns the exit status."""
    with checkpoint.all_or_none():
        images, val = data.load_imagenet(args.dataset, args.data, args.images)
        refuse_other_images(args.out, len(images), images.classes)
        iterations = max(1, round(args.epochs * len(images) / args.batch_size))
        columns = {"val_top1": "top-1 error", "val_top5": "top-5 error"}
        if len(images.classes) < 6:
            del columns["val_top5"]
        identity = {name: getattr(args, name) for name in IDENTITY} | {"images": len(images)}
        identity |= {"weights": args.weights_hash}
        run = checkpoint.Run(args.out, identity, columns)
        protocols = [name for name in args.test if not evaluated(args.out, name, iterations)]
        if run.result and run.result["diverged"]:
            protocols = []
    checkpoint.agree(args.out, run.result, protocols)
    if run.result and not protocols:
        return finish(run, run.result, columns, papers_errors(args, "1-crop"))

    with checkpoint.all_or_none(args.out):
        about = {name: 255 * torch.tensor(t).view(3, 1, 1) for name, t in (("mean", data.MEAN), ("std", data.STD))}
        if args.weights:
            net, about = pretrained_net(args, images.classes), args.pretrained[1]
        else:
            torch.manual_seed(args.seed)
            net = imagenet_resnet(args.depth, UNITS[args.unit], len(images.classes), **args.unit_args)
        net.to(device, memory_format=torch.channels_last)
        if args.compile:
            compile_units(net)
        about = {"classes": images.classes, "mean": about["mean"], "std": about["std"], "size": args.crop}
        run.begin({name: getattr(args, name) for name in SETTINGS}, about)
        if run.result:
            state = run.load()
            if state is None or state["iteration"] != iterations:
                raise ValueError(f"{args.out} is finished and holds no checkpoint of its end to evaluate")
            net.load_state_dict(state["model"])

    precision, scale = Precision(args.precision, device), scale_of(about, device)

    def test(protocol):
        at_once = 128 if device.type == "cuda" else args.micro_batch
        return evaluate([(net, precision, scale)], val, protocol, args.crop, at_once, args.workers, device)

    result = run.result or train_net(args, run, net, images, len(val), iterations, columns, about, test, device)
    if protocols and not result["diverged"]:
        about = {"runs": [args.out], "iterations": [iterations], "recompute_bn": 0, "precision": args.precision}
        write_errors(args.out, protocols, test, val, about, run.write, functools.partial(papers_errors, args))
    return finish(run, result, columns, "" if result["diverged"] else papers_errors(args, "1-crop"))


def train_net(args, run, net, images, evaluated, iterations, columns, about, test, device):
    """The training itself, on `images`. evaluated: how many images test(protocol), which gives the net's errors,
    evaluates. Returns the result."""
    rows, evaluations = rows_at(iterations, iterations * args.batch_size, evaluated)
    count = args.batch_size // args.micro_batch
    own, scale = range(count)[own_micro_batches(args)], scale_of(about, device)

    def micro_batches(draws):
        draws = [t.to(device, non_blocking=True) for t in draws]
        parts = zip(draws[0::3], draws[1::3], draws[2::3], strict=True)
        return [(data.normalise(pixels, colours, scale), labels) for pixels, colours, labels in parts]

    training = Training(args, run, net, classification, micro_batches, iterations, len(images), columns, about, device)
    view = functools.partial(data.augmented, augment=args.augment, crop=args.crop, seed=args.seed)
    keys = data.image_batches(args.seed, len(images), args.batch_size, args.micro_batch, own, training.iteration)
    stream = load(images, view, data.train_batch, keys, args.workers, device)

    def draws(t):
        """What the workers made for iteration t: the next in the stream, which began where the training did."""
        with training.waiting(), checkpoint.all_or_none():
            return [t for _ in own for t in next(stream)]

    def errors(t):
        return {f"val_{top}": error for top, error in test("1-crop").items()} if t in evaluations else {}

    with contextlib.closing(stream), training:
        while True:
            t = training.iteration
            if training.row_due(t in rows):
                training.row(lr_at(t - 1, iterations, args.lr), errors(t))
            if t == iterations:
                break
            training.save_if_due()
            training.iterate(lr_at(t, iterations, args.lr), draws(t))
    return training.result("augment", "crop", "epochs")


def write_errors(folder, protocols, test, images, about, write, papers):
    """Evaluate the images by test(protocol) under each protocol: print a line, and write <protocol>.json into a folder
    by write(path, content). Returns the contents by protocol."""
    contents = {}
    for protocol in protocols:
        errors = test(protocol)
        contents[protocol] = errors | {"images": len(images)} | about
        write(pathlib.Path(folder, f"{protocol}.json"), checkpoint.as_json(contents[protocol]))
        shown = f"{protocol} top-1 error {errors['top1']:.2f} %"
        shown += f", top-5 {errors['top5']:.2f} %" if "top5" in errors else ""
        shown += f" on {data.counted(len(images), 'image', 'images')} of {len(images.classes):,} classes"
        print_line(f"{folder}: {shown}{papers(protocol)}")
    return contents


def papers_errors(args, protocol):
    """What the papers have for a net under a protocol, by the tables' copy in paper/: " (the paper, all of ImageNet:
    22.85, 6.71)"."""
    body, _, panel = args.unit.partition("-")
    option = args.unit_args.get("option", "")
    name = f"imagenet/{args.depth}" + (panel and f"-{panel}")
    name += f"-{option}" if option and (body == "basic" or option != "B") else ""
    name += "-scale-aspect" if args.augment == "scale-aspect" else ""
    with open(pathlib.Path(__file__).parent / "paper" / "tables.csv", newline="") as file:
        cells = [cell for cell in csv.DictReader(file) if cell["run"] == name and cell["paper"] != "-"]
    paper = {cell["metric"]: cell["paper"] for cell in cells}
    errors = [paper[f"{protocol} {top}"] for top in ("top-1", "top-5") if f"{protocol} {top}" in paper]
    return f" (the paper, all of ImageNet: {', '.join(errors)})" if errors else ""


def evaluated(folder, protocol, iterations):
    """Whether the net of a run's last iteration has been evaluated under a protocol, as training left it."""
    path = pathlib.Path(folder, f"{protocol}.json")
    errors = checkpoint.read_json(path) if path.exists() else {}
    return errors.get("iterations") == [iterations] and errors.get("recompute_bn") == 0


def refuse_other_images(folder, count, classes):
    """Raises ValueError when a run was begun on another number of images, or other classes, than there are now."""
    path = pathlib.Path(folder, "config.json")
    config = checkpoint.read_json(path) if path.exists() else {}
    about = config.get("about")
    names = about.get("classes") if isinstance(about, dict) else config.get("classes")
    number = len(names) if isinstance(names, list) else names  # a run from before `about` wrote how many there were
    same = config.get("images") == count and names in (classes, len(classes))
    if same or config.get("dataset") != "imagenet":
        return
    differ = sorted({*map(str, names)} ^ {*classes}) if isinstance(names, list) else []
    raise ValueError(
        f"{folder} was begun on {config.get('images')} training images of {number} classes, and there are now {count} "
        f"of {len(classes)}{' (differing: ' + ', '.join(differ[:5]) + ')' if differ else ''}. Put back what "
        "is missing, whole, and the run continues; or choose another --out"
    )


def warn_of_other_images(trained, val):
    """Warn of runs, {folder: how many images it was trained on}, that were trained on more or fewer images than lie
    beside those that evaluate them, and of images that are in both. Where none to train on lie there nothing is known.
    """
    with contextlib.suppress(ValueError, OSError):
        train = data.ImageFiles(val.folder.parent / "train")
        for folder, count in trained.items():
            if count != len(train):
                data.warn(
                    f"warning: {folder} was trained on {count:,} images, and {train.folder} now holds {len(train):,}. "
                    f"If it was trained on some of {val.folder}, its error there is too low"
                )
        data.warn_of_copies(train, val)


def scale_of(about, device):
    """The (mean, std) of a net's input, of RGB in 0 ... 1."""
    return tuple(about[name].to(device) / 255 for name in ("mean", "std"))


def check_classes(folder, classes, images):
    """Raises ValueError when the classes of a run are not those of the images, or those of a file are not as many."""
    if classes != images.classes and (pathlib.Path(folder).is_dir() or len(classes) != len(images.classes)):
        ours, theirs = (
            f"{data.counted(len(names), 'class', 'classes')} ({names[0]} ... {names[-1]})"
            for names in (classes, images.classes)
        )
        raise ValueError(f"{folder} is of {ours} and the images of {theirs}")


def check_kind(net, source):
    """Raises ValueError when a net is none of ImageNet's."""
    if net.stem[0].kernel_size != (7, 7):
        raise ValueError(f"{source} is a net of CIFAR's kind: cifar_train.py takes it")


def read_net(source, flags):
    """(flags, iteration, net, about) of a run's folder; of a file of weights, whose flags are those of the command line
    and iteration None."""
    if pathlib.Path(source).is_dir():
        args, state = checkpoint.read_run(source)
        if "crop" not in args:
            raise ValueError(f"{source} is no run of imagenet_train.py: evaluate it with the script that trained it")
        about = of_run(source, vars(args), state)
        net = imagenet_resnet(args.depth, UNITS[args.unit], len(about["classes"]), **args.unit_args)
        net.load_state_dict(state["model"])
        return args, state["iteration"], net, about
    net, about = load_weights(source, flags.layout)
    check_kind(net, source)
    args = argparse.Namespace(**vars(flags) | {name: about[name] for name in ("depth", "unit", "unit_args")})
    args.data, args.crop = args.data or "data/imagenet", about["size"]
    return args, None, net, about


def evaluate_runs(flags, device):
    """Evaluate a run's checkpoint, or a file of weights, or the average of several; data set and crop are those of a
    run's config.json, or of the command line and the file. Returns the exit status."""
    began = time.monotonic()
    with checkpoint.all_or_none(" or ".join(flags.evaluate)):
        runs = [read_net(source, flags) for source in flags.evaluate]
        args = runs[0][0]
        for source, (other, _, _, _) in zip(flags.evaluate, runs, strict=True):
            if (other.dataset, other.crop) != (args.dataset, args.crop):
                raise ValueError(f"{source} and {flags.evaluate[0]} differ in data set or crop")
        place = args.dataset, flags.data or args.data
        val = data.imagenet_part(*place, "val", args.images)
        train_images = data.imagenet_part(*place, "train", args.images) if flags.recompute_bn else None
        nets = []
        for source, (other, _, net, about) in zip(flags.evaluate, runs, strict=True):
            check_classes(source, about["classes"], val)
            net.to(device, memory_format=torch.channels_last)
            nets.append((net, Precision(other.precision, device), scale_of(about, device)))
        pairs = zip(flags.evaluate, runs, strict=True)
        trained = {source: run[0].images for source, run in pairs if pathlib.Path(source).is_dir()}
        if args.dataset == "imagenet" and trained and dist.get_rank() == 0:
            warn_of_other_images(trained, val)
        out = flags.out or flags.evaluate[0]
        if flags.out:
            try:
                pathlib.Path(out).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--out {out} cannot be a folder ({error.strerror}): choose another") from None
        about = {"runs": flags.evaluate, "iterations": [iteration for _, iteration, _, _ in runs]}
        about |= {"recompute_bn": flags.recompute_bn}
        before = (checkpoint.read_result(out) if flags.out else None) or about
        if any(before.get(name) != value for name, value in about.items()):
            raise ValueError(f"--out {out} holds the evaluation of {', '.join(before.get('runs', []))}: choose another")

    def write(path, content):
        with checkpoint.all_or_none():
            if dist.get_rank() == 0 and pathlib.Path(out).is_dir():  # it may be a file of weights
                checkpoint.write(path, content)

    def test(protocol):
        at_once = flags.batch_size or (128 if device.type == "cuda" else 32)
        return evaluate(nets, val, protocol, args.crop, at_once, flags.workers, device)

    def papers(protocol):
        if len(runs) > 1:
            return ""
        published = RELEASED.get(args.depth, {}).get(protocol) if args.unit_args.get("caffe_pool") else None
        return (f" (published for these weights: {published})" if published else "") + papers_errors(args, protocol)

    if flags.recompute_bn:
        for (other, iteration, net, _), (_, _, scale) in zip(runs, nets, strict=True):
            recompute_bn(net, train_images, flags.recompute_bn, other, iteration, flags.workers, device, scale)
    precisions = {"precision": ", ".join(dict.fromkeys(other.precision for other, _, _, _ in runs))}
    protocols = flags.test or ["1-crop"]
    errors = write_errors(out, protocols, test, val, about | precisions, write, papers)
    if flags.out:
        result = before | precisions | {"dataset": args.dataset, "diverged": False, **errors}
        result |= {"seconds": round(time.monotonic() - began, 1), "peak_memory": peak_memory(device)}
        write(pathlib.Path(out, "result.json"), checkpoint.as_json(result))
    return 0


def parse_flags():
    """The command line, with every default filled in; exits with status 2 on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("the net")
    add_unit_flags(group, (50, "18, 34, 50, 101, 152, 200"), "basic at 18 and 34, else bottleneck")
    add_weights_flags(group)
    add = parser.add_argument_group("the data").add_argument
    add(
        "--dataset",
        choices=("imagenet", "synthetic"),
        default="imagenet",
        help="synthetic needs no files (default imagenet)",
    )
    add(
        "--data",
        metavar="DIR",
        help="where train/<class>/ and val/<class>/ lie (default data/imagenet)",
    )
    add("--augment", choices=data.AUGMENT, default="scale", help="scale is the papers' (default scale)")
    add("--crop", type=int, default=224, metavar="N", help="pixels; all sizes scale with it (default 224)")
    add("--images", type=int, metavar="N", help="how many synthetic ones to train on (default 1000)")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: a process's cores but 2)")
    add = parser.add_argument_group("the recipe").add_argument
    add("--epochs", type=int, default=90, metavar="N", help="the drops move too (default 90)")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images a step (default 256); with --evaluate, images at once (default 32, on a GPU 128)",
    )
    add("--micro-batch", type=int, metavar="N", help="images that share BN statistics (default an 8th of the batch)")
    add("--lr", type=float, default=0.1, help="learning rate before the drops (default 0.1)")
    add("--seed", type=int, default=1, help="of weights, order and augmentation (default 1)")
    add_run_flags(parser.add_argument_group("the machine and the run"), checkpoint_seconds=300)
    add = parser.add_argument_group("evaluation").add_argument
    protocols = ", ".join(data.PROTOCOLS)
    add("--test", metavar="PROTOCOL[,...]", help=f"at the end of training, or with --evaluate: {protocols}")
    add(
        "--evaluate",
        nargs="+",
        metavar="FROM",
        help="evaluate a run as its flags say, or a file of weights; of several the average, in --out",
    )
    add("--recompute-bn", type=int, default=0, metavar="N", help="take BN's statistics from N training images first")
    args = parser.parse_args()
    try:
        if args.evaluate:
            own = "--evaluate --test --recompute-bn --data --device --workers --batch-size --out --timeout"
            if not all(pathlib.Path(source).is_dir() for source in args.evaluate):
                own = own.replace("--recompute-bn", "--layout --dataset --images --precision")
            refuse_all_but(own)
        resolve(args)
    except ValueError as error:
        checkpoint.fail(error)
    return args


def resolve(args):
    """Fill in what the flags leave open. Raises ValueError on a contradiction."""
    resolve_unit(args, bottlenecks=(50, 101, 152, 200), option="B")
    resolve_weights(args)
    if args.weights:
        check_kind(args.pretrained[0], args.weights)
    with torch.device("meta"):  # raises ValueError for an impossible depth or option
        imagenet_resnet(args.depth, UNITS[args.unit], **args.unit_args)
    args.workers = max(cores_of_a_process() - 2, 1) if args.workers is None else args.workers
    args.test = args.test.split(",") if args.test else []
    for protocol in args.test:
        if protocol not in data.PROTOCOLS:
            raise ValueError(f"there is no --test {protocol}: choose from {', '.join(data.PROTOCOLS)}")
    if args.evaluate:
        if len(args.evaluate) > 1 and not args.out:
            raise ValueError("--evaluate of several runs needs a folder of its own: --out DIR")
        if args.out and pathlib.Path(args.out, "config.json").exists():
            raise ValueError(f"--out {args.out} is the folder of a training run: choose another for the evaluation")
        args.images = 1000 if args.images is None else args.images
        at_least(args, workers=0, recompute_bn=0)
        if args.batch_size is not None:
            at_least(args, batch_size=1)
        return
    if args.recompute_bn:
        raise ValueError("--recompute-bn goes with --evaluate")
    if args.dataset == "imagenet" and args.images is not None:
        raise ValueError("--images goes with --dataset synthetic")
    args.data = args.data or "data/imagenet"
    args.images = 1000 if args.images is None else args.images
    args.batch_size = 256 if args.batch_size is None else args.batch_size
    args.micro_batch = max(args.batch_size // 8, 1) if args.micro_batch is None else args.micro_batch
    args.out = args.out or f"runs/{args.dataset}-{args.depth}-{args.unit}-seed{args.seed}"
    check_recipe(args)
    at_least(args, epochs=1, crop=32, images=1, workers=0)
    if args.crop == 32 and args.micro_batch == 1:
        raise ValueError("--crop 32 ends in maps of one pixel: BN needs a --micro-batch of at least 2 images there")


def main():
    args = parse_flags()
    return start(evaluate_runs if args.evaluate else train, args)


if __name__ == "__main__":
    sys.exit(main())
