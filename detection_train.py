"""The object detection of [1] Section 4.3 and Appendices A and B: Faster R-CNN, [3] of detection.py.

    python detection_train.py --weights R-101.pkl                  # ResNet-101 on VOC 2007 and 2012, Table 7
    torchrun --nproc_per_node=8 detection_train.py --dataset coco --data COCO --weights R-101.pkl --test refine
    python detection_train.py --vgg --weights vgg16-397923af.pth   # the papers' other net
    python detection_train.py --dataset synthetic                  # a first result in minutes, without any download
    python detection_train.py --data FOLDER --depth 18 --width 16 --short 300 --iterations 800 --batch-size 4 --lr 0.03
    python detection_train.py --evaluate RUN --test baseline,refine,multi-scale --draw 20

The same command again continues a run that was stopped.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read as torch is imported: threads that spin less share the cores

import argparse
import contextlib
import functools
import io
import json
import math
import pathlib
import sys

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import checkpoint
import data
import detection
import weights
from flags import (
    add_run_flags,
    add_unit_flags,
    add_weights_flags,
    at_least,
    check_recipe,
    refuse_all_but,
    resolve_unit,
    resolve_weights,
)
from training import (
    Precision,
    Training,
    classification,
    cores_of_a_process,
    finish,
    flatten,
    mix,
    own_micro_batches,
    print_line,
    rows_at,
    sgd,
    start,
    step,
)

WEIGHT_DECAY = 5e-4  # [3] Section 3.1.3

PAPER = dict(depth=101, width=64, short=600, roi=14, regions=64, lr=0.001)
RECIPES = {
    # [3] Section 3.1.3: 60k + 20k iterations, as of its RPN; 2 images of 64 regions, as of its authors' Fast R-CNN
    "voc": dict(PAPER, train="07+12", iterations=80_000, batch_size=2),
    # [1] Appendix A: 240k + 80k iterations of 8 images, as of its RPN
    "coco": dict(PAPER, train="2014", iterations=320_000, batch_size=8),
    # Not the papers': small images, a narrow net and less of each image, to see it learn in minutes
    "synthetic": dict(
        train="07+12", depth=18, width=16, short=128, roi=7, regions=32, iterations=600, batch_size=8, lr=0.06
    ),
}

PRETRAINING = 200  # iterations, where there are no --weights

IDENTITY = (  # the flags that make a run this run; any other may change when it is continued
    "dataset train images vgg depth unit unit_args width short roi regions context iterations batch_size lr seed "
    "precision"
).split()
SETTINGS = "data workers device out checkpoint_seconds timeout".split()


def lr_at(iteration, args):
    """The learning rate of an iteration (0, 1, ...): divided by 10 after three quarters, [3] Section 3.1.3."""
    return args.lr / (10 if iteration >= round(0.75 * args.iterations) else 1)


def evaluate(net, images, test, precision, workers, device):
    """Test the net on every image, shared among the processes, by one of detection.TESTS. Returns what it found in
    each, {class: its AP} of the classes that occur, and the means of these."""
    net.eval()
    rank, world = dist.get_rank(), dist.get_world_size()
    keys = ([(i,)] for i in range(rank, len(images), world))
    stream = load(images, lambda image, index: [data.decode(image, 1)], keys, workers, device)
    own, parts = [], [None] * world
    for _ in range(0, len(images), world):
        checkpoint.stop.check()
        with checkpoint.all_or_none():
            pixels = next(stream, [None])[0]
        if pixels is not None:
            with precision:
                found = net.detect(as_image(pixels, device), test)
            own.append({name: t.cpu() for name, t in found.items()})
    net.train()
    dist.all_gather_object(parts, own, group=checkpoint.control)
    found = [parts[i % world][i // world] for i in range(len(images))]
    measured = [detection.measure(found, images) if rank == 0 else None]
    dist.broadcast_object_list(measured, group=checkpoint.control)
    return found, *measured[0]


def as_image(pixels, device):
    """Pixels (H, W, 3), uint8, as a net reads them: (3, H, W) in 0 ... 1."""
    return pixels.to(device, non_blocking=True).permute(2, 0, 1).float() / 255


def load(images, view, keys, workers, device):
    """Yield [*view(image, *key), index] for one image after the other."""

    def only(examples):
        return [*examples[0][0], examples[0][1]]

    return data.load_views(images, view, only, keys, workers, device, checkpoint.ignore_signals)


def train(args, device):
    """Train the detector that the flags name, from where its run stands, test it, draw what it finds, and write the
    result. Returns the exit status."""
    columns = detection.COLUMNS[args.dataset]
    with checkpoint.all_or_none():
        images, test_images = data.load_detection(args.dataset, args.data, args.train, args.images)
        identity = {name: getattr(args, name) for name in IDENTITY} | {"weights": args.weights_hash}
        identity |= {"classes": images.classes, "training_images": len(images)}
        run = checkpoint.Run(args.out, identity, columns)
        tests = [name for name in args.test if not is_tested(args.out, name, args.iterations, len(test_images))]
        if run.result and run.result["diverged"]:
            tests = []
    checkpoint.agree(args.out, run.result, tests)
    if run.result and not tests:
        return finish(run, run.result, columns)

    with checkpoint.all_or_none(args.out):
        torch.manual_seed(args.seed)
        normal = weights.grey_levels(data.MEAN, data.STD)
        net, about = args.pretrained or (detection.classifier(args, len(images.classes)), normal)
        about = {name: about[name] for name in normal} | {"classes": images.classes, "size": args.short}
        run.begin({name: getattr(args, name) for name in SETTINGS}, about)
        state = run.load()
        if run.result and (state is None or state["iteration"] != args.iterations):
            raise ValueError(f"{args.out} is finished and holds no checkpoint of its end to test")
    net.to(device, memory_format=torch.channels_last)
    if not (args.weights or state):
        pretrain(net, images, args, device)
    torch.manual_seed(args.seed)
    net = detection.detector(args, about, net).to(device, memory_format=torch.channels_last)
    precision, last = Precision(args.precision, device), None

    def test(name="baseline"):
        return evaluate(net, test_images, name, precision, args.workers, device)

    if run.result:
        result = run.result
        net.load_state_dict(state["model"])
    else:
        result, last = train_net(args, run, net, images, len(test_images), about, test, device)
    for name in [] if result["diverged"] else tests:
        found, aps, maps = last if last and name == "baseline" else test(name)
        with checkpoint.all_or_none():
            write_test(name, found, aps, maps, test_images, args, args.iterations, run.folder, run.write)
        if name != "baseline":
            print_line(f"{run.folder}: {name}, {shown(maps, columns)}")
    return finish(run, result, columns)


def train_net(args, run, net, images, n_test, about, test, device):
    """Train the net on `images`, and evaluate it by test(), on n_test images. Returns the result, and what the last
    evaluation returned or None if this session made none."""
    columns = detection.COLUMNS[args.dataset]
    # 300 regions of an image are tested, and fewer trained on: it costs as much
    rows, evaluations = rows_at(args.iterations, args.iterations * args.batch_size, 3 * n_test)
    own = range(args.batch_size)[own_micro_batches(args)]
    training = Training(
        args,
        run,
        net,
        detection.objective,
        lambda batches: batches,
        iterations=args.iterations,
        images=len(images),
        columns=columns,
        about=about,
        device=device,
        graph=False,
        weight_decay=WEIGHT_DECAY,
    )
    view = functools.partial(data.with_objects, objects=images.objects, seed=args.seed)
    keys = data.image_batches(args.seed, len(images), args.batch_size, 1, own, training.iteration)
    stream = load(images, view, keys, args.workers, device)

    def draws(t):
        """This process's images of iteration t, each with its objects and a seed: the next in the stream of views."""
        with training.waiting(), checkpoint.all_or_none():
            views = [next(stream) for _ in own]
        return [
            (as_image(pixels, device), boxes.to(device), labels.to(device), mix(args.seed, t, index))
            for pixels, boxes, labels, index in views
        ]

    last = None
    with contextlib.closing(stream), training:
        while True:
            t = training.iteration
            if training.row_due(t in rows):
                last, errors = None, {}
                if t in evaluations:
                    _, _, maps = last = test()
                    errors = {name: maps[name] for name in columns}
                training.row(lr_at(t - 1, args), errors)
            if t == args.iterations:
                break
            training.save_if_due()
            training.iterate(lr_at(t, args), draws(t))
    return training.result("weights", "train", "width", "short", "roi", "regions", "context"), last


def is_tested(folder, name, iterations, images):
    """Whether <name>.json holds a test of the last iteration, on as many images."""
    path = pathlib.Path(folder, f"{name}.json")
    test = checkpoint.read_json(path) if path.exists() else {}
    return (test.get("iterations"), test.get("images")) == ([iterations], images)


def shown(maps, columns):
    return ", ".join(f"{name} {maps[key]:.2f} %" for key, name in columns.items())


def write_test(name, found, aps, maps, images, args, iteration, folder, write):
    """Write a test's result: <name>.json, <name>-<i>.png of the first images and, for COCO, detections-<name>.json, as
    its server reads them. write(path, content): how a file is written."""
    if dist.get_rank() > 0:
        return
    folder, content = pathlib.Path(folder), maps | {"aps": aps, "images": len(images), "iterations": [iteration]}
    for i in range(min(args.draw, len(images))):
        with images.open(i) as image:
            pixels, buffer = data.decode(image, 1).permute(2, 0, 1), io.BytesIO()
        drawn = detection.draw(pixels, found[i], images.classes).permute(1, 2, 0)
        Image.fromarray(drawn.numpy()).save(buffer, "PNG")
        write(folder / f"{name}-{i}.png", buffer.getvalue())
    if isinstance(images, data.COCOImages):
        write(folder / f"detections-{name}.json", json.dumps(detection.coco_detections(found, images)).encode())
    write(folder / f"{name}.json", checkpoint.as_json(content))  # last: it says that the test is done


def load_vgg(path):
    """(net, about) of a file of torchvision's vgg16, as load_weights has them. Raises ValueError."""
    net = detection.vgg16(weights=None, init_weights=False)
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: docs/detection.md says where torchvision's vgg16 is to be had") from None
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is no file of torchvision's vgg16: {str(error).partition(':')[0]}") from None
    return net, weights.grey_levels(data.MEAN, data.STD)


def pretrain(net, images, args, device):
    """Without --weights, teach a net to classify the objects of the training images, each cut out with up to a quarter
    more on each side, as the papers' nets learnt ImageNet: 32 of them an iteration, and the last quarter of these at a
    tenth of the learning rate."""
    size = 32 * math.ceil(224 * args.short / detection.SHORT / 32)

    def one_object(image, epoch, index):
        pixels, boxes, labels = data.with_objects(image, epoch, index, images.objects, args.seed)
        rng = np.random.default_rng((args.seed, epoch, index, 1))
        i = rng.integers(len(labels))
        x1, y1, x2, y2 = boxes[i].tolist()
        left, top, right, bottom = rng.uniform(0, 0.25, 4) * [x2 - x1, y2 - y1, x2 - x1, y2 - y1]
        rows = slice(int(max(y1 - top, 0)), math.ceil(y2 + bottom))
        columns = slice(int(max(x1 - left, 0)), math.ceil(x2 + right))
        return data.resize(pixels[rows, columns], size, size), int(labels[i]) - 1

    keys = data.image_batches(args.seed, len(images), 32, 1, range(32), 0)
    (shared, running), optimizer, errors = flatten(net), sgd(net, 0.1), []
    scaler, precision = torch.amp.GradScaler(device.type, enabled=False), Precision("float32", device)
    with contextlib.closing(load(images, one_object, keys, args.workers, device)) as stream:
        for t in range(PRETRAINING):
            with checkpoint.all_or_none():
                pixels, labels, _ = zip(*(next(stream) for _ in range(32)), strict=True)
            batch = data.normalise(torch.stack(pixels).to(device)), torch.tensor(labels, device=device)
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 if t < 0.75 * PRETRAINING else 0.01)
            step(net, classification, [batch], shared, running, optimizer, scaler, precision)
            errors.append(100 * shared[-1].item())
    error = sum(errors[-50:]) / len(errors[-50:])
    print_line(
        f"no --weights: the net has learnt to classify the objects of the images first, training error {error:.1f} %"
    )


def evaluate_run(args, device):
    """Print the mAP of a run's checkpoint and the AP of each class, on the test images of its flags, and draw. Returns
    the exit status."""
    folder = args.evaluate
    with checkpoint.all_or_none(folder):
        flags, state = checkpoint.read_run(folder)
        if "regions" not in flags:
            raise ValueError(f"{folder} is no run of detection_train.py: evaluate it with the script that trained it")
        _, images = data.load_detection(flags.dataset, args.data or flags.data, flags.train, flags.images)
        if images.classes != state["about"]["classes"]:
            raise ValueError(f"{folder} is of {', '.join(flags.classes)} and the images of {', '.join(images.classes)}")
        net, precision = detection.of_run(flags, state), Precision(flags.precision, device)
    net.to(device, memory_format=torch.channels_last)
    columns = detection.COLUMNS[flags.dataset]

    for name in args.test:
        found, aps, maps = evaluate(net, images, name, precision, args.workers, device)
        for c, ap in aps.items():
            print_line(f"{c:15} {shown(ap, columns).replace('mAP', 'AP')}")
        print_line(
            f"{folder}: {name}, {shown(maps, columns)} after {state['iteration']:,} of {flags.iterations:,} iterations"
        )
        with checkpoint.all_or_none():
            write_test(name, found, aps, maps, images, args, state["iteration"], folder, checkpoint.write)
    return 0


def parse_flags():
    """The command line, with every default filled in; exits with status 2 on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("the net")
    add_unit_flags(group, (101, "18, 34, 50, 101, 152, 200"), "basic at 18 and 34, else bottleneck")
    add_weights_flags(group)
    parser.set_defaults(depth=None)
    group.add_argument(
        "--width", type=int, metavar="N", help="channels of conv1: fewer are faster (default 64; synthetic 16)"
    )
    group.add_argument("--vgg", action="store_true", help="VGG-16, with --weights: the file of torchvision's vgg16")
    group.add_argument("--context", action="store_true", help="each region is judged beside the whole image, Table 9")
    add = parser.add_argument_group("the data").add_argument
    add("--dataset", choices=RECIPES, default="voc", help="layout of --data; synthetic needs no files (default voc)")
    add(
        "--data",
        metavar="DIR",
        help="where VOCdevkit is, or will be; or a folder in VOC's or COCO's layout (default data; coco data/coco)",
    )
    add(
        "--train",
        choices=("07+12", "07", "2014", "2017"),
        help="years of VOC's trainval or COCO's sets (default 07+12; 2014)",
    )
    add("--images", type=int, default=0, metavar="N", help="only the first N images of each set (default 0: all)")
    add("--short", type=int, metavar="N", help="the shorter side; all sizes scale with it (default 600; synthetic 128)")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: a process's cores but 2)")
    add = parser.add_argument_group("the recipe").add_argument
    add("--iterations", type=int, metavar="N", help="the drop moves too (default 80000; coco 320000; synthetic 600)")
    add("--batch-size", type=int, metavar="N", help="images a step (default 2; coco and synthetic 8)")
    add("--lr", type=float, help="learning rate before the drop (default 0.001; synthetic 0.06)")
    add("--seed", type=int, default=1, help="of weights, order, flips and samples (default 1)")
    group = parser.add_argument_group("the machine and the run")
    add_run_flags(group, checkpoint_seconds=300)
    group.add_argument(
        "--test",
        metavar="TEST[,...]",
        help="at the end, also test with refine (boxes refined and voted on) or multi-scale (the same, each region "
        "pooled from two maps of five sizes), Table 9; with --evaluate, the tests to make (default baseline)",
    )
    group.add_argument("--draw", type=int, default=4, metavar="N", help="draw what it finds in N images (default 4)")
    group.add_argument("--evaluate", metavar="RUN", help="print the mAP of a run's checkpoint; trains nothing")
    args = parser.parse_args()
    try:
        if args.evaluate is not None:
            refuse_all_but("--evaluate --data --test --draw --device --workers --timeout")
        resolve(args)
    except ValueError as error:
        checkpoint.fail(error)
    return args


def resolve(args):
    """Fill in what the flags leave to the recipe. Raises ValueError on a contradiction."""
    args.workers = max(cores_of_a_process() - 2, 1) if args.workers is None else args.workers
    at_least(args, workers=0, draw=0)
    tests = args.test.split(",") if args.test is not None else ["baseline"]
    for name in tests:
        if name not in detection.TESTS:
            raise ValueError(f"--test {name} is none of {', '.join(detection.TESTS)}")
    args.test = list(dict.fromkeys(tests if args.evaluate is not None else ["baseline", *tests]))
    if args.evaluate is not None:
        return
    if args.compile:
        raise ValueError("--compile: images have many sizes, and each would be compiled anew")
    if args.weights and args.width:
        raise ValueError("--width cannot be combined with --weights, whose net has a width of its own")
    if args.vgg and (not args.weights or args.depth or args.unit or args.preact or args.unit_arg or args.layout):
        raise ValueError("--vgg goes with --weights, the file of torchvision's vgg16, and without --depth or --unit")
    if args.train and args.dataset != "synthetic" and (args.train in ("2014", "2017")) != (args.dataset == "coco"):
        raise ValueError(f"--train {args.train} is no part of {args.dataset}: VOC has 07 and 07+12, COCO 2014 and 2017")
    recipe = RECIPES[args.dataset] | ({"roi": 7} if args.vgg else {}) | ({"width": 64} if args.weights else {})
    vars(args).update({name: value for name, value in recipe.items() if getattr(args, name, None) is None})
    at_least(args, width=1, short=32, images=0, iterations=1)
    args.data = args.data or ("data/coco" if args.dataset == "coco" else "data")
    args.micro_batch = 1  # BN is fixed: images that share a step do not meet
    if args.vgg:
        args.depth, args.unit, args.unit_args, args.pretrained = 16, "vgg", {}, load_vgg(args.weights)
        args.weights_hash = weights.digest(*args.pretrained)
    else:
        resolve_unit(args, bottlenecks=(50, 101, 152, 200), option="B")
        resolve_weights(args)
        if args.pretrained and args.pretrained[0].stem[0].kernel_size != (7, 7):
            raise ValueError(f"{args.weights} is a net of CIFAR's kind, and a detector is made of one of ImageNet's")
        with torch.device("meta"):  # raises ValueError for an impossible depth or option
            detection.classifier(args, 1)
    args.name = "Faster R-CNN on " + ("VGG-16" if args.vgg else f"ResNet-{args.depth}")
    args.name += ", with context" if args.context else ""
    context = "-context" if args.context else ""
    args.out = args.out or f"runs/{args.dataset}-{args.depth}-{args.unit}{context}-seed{args.seed}"
    check_recipe(args)


def main():
    args = parse_flags()
    return start(train if args.evaluate is None else evaluate_run, args)


if __name__ == "__main__":
    sys.exit(main())
