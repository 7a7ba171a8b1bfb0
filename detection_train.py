"""The object detection of [1] Section 4.3 and Appendix A, VOC's part: Faster R-CNN, [3] of detection.py.

    python detection_train.py --weights R-101.pkl                  # ResNet-101 on VOC 2007 and 2012, Table 7
    torchrun --nproc_per_node=2 detection_train.py --weights runs/imagenet-101-bottleneck-seed1     # two processes
    python detection_train.py --vgg --weights vgg16-397923af.pth   # the papers' other net
    python detection_train.py --dataset synthetic                  # a first result in minutes, without any download
    python detection_train.py --data FOLDER --depth 18 --width 16 --short 300 --iterations 1000 --batch-size 4 --lr 0.03
    python detection_train.py --evaluate RUN --draw 20

The same command again continues a run that was stopped.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read as torch is imported: threads that spin less share the cores

import argparse
import contextlib
import functools
import io
import math
import pathlib
import sys

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.ops import box_iou

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

RECIPES = {
    # [3] Section 3.1.3: 60k + 20k iterations, as of its RPN; 2 images of 64 regions, as of its authors' Fast R-CNN
    "voc": dict(depth=101, width=64, short=600, roi=14, regions=64, iterations=80_000, batch_size=2, lr=0.001),
    # Not the papers': small images, a narrow net and less of each image, to see it learn in minutes
    "synthetic": dict(depth=18, width=16, short=128, roi=7, regions=32, iterations=600, batch_size=8, lr=0.06),
}

PRETRAINING = 200  # iterations, where there are no --weights

COLUMNS = {"map_11point": "mAP (11-point)", "map_area": "mAP (area)"}  # of VOC 2007, of VOC 2010 and later; IoU 0.5

IDENTITY = (  # the flags that make a run this run; any other may change when it is continued
    "dataset train images vgg depth unit unit_args width short roi regions iterations batch_size lr seed precision"
).split()
SETTINGS = "data workers device out checkpoint_seconds timeout".split()


def lr_at(iteration, args):
    """The learning rate of an iteration (0, 1, ...): divided by 10 after three quarters, [3] Section 3.1.3."""
    return args.lr / (10 if iteration >= round(0.75 * args.iterations) else 1)


def average_precision(found, truth, label, least=0.5):
    """The AP (%) of a class by VOC's rules: {"11point": the mean precision at 11 recalls, as of 2007, "area": the area
    under the curve, as of 2010}. None where the class does not occur.

    found: of each image what `detect` found. truth: of each image its boxes, labels and which are difficult. By
    falling score, a box is right if, of its class's objects, that of the largest IoU has more than `least` and was not
    found before; if that one is difficult it is neither right nor wrong.
    """
    scores, right, positives = [], [], 0
    for detections, (boxes, labels, difficult) in zip(found, truth, strict=True):
        boxes, difficult = boxes[labels == label], difficult[labels == label]
        positives += int((~difficult).sum())
        own = (detections["labels"] == label).nonzero().flatten()
        own = own[detections["scores"][own].argsort(descending=True, stable=True)]
        overlaps, taken = box_iou(detections["boxes"][own].double(), boxes.double()), set()
        for score, overlap in zip(detections["scores"][own].tolist(), overlaps, strict=True):
            i = int(overlap.argmax()) if len(boxes) else -1
            hit = i >= 0 and bool(overlap[i] > least)
            if not (hit and difficult[i]):
                scores.append(score)
                right.append(hit and i not in taken)
            if hit:
                taken.add(i)
    if not positives:
        return None
    right = np.array(right, dtype=bool)[np.argsort(-np.array(scores), kind="stable")].cumsum()
    recall, precision = right / positives, right / np.arange(1, 1 + len(right))
    points = [precision[recall >= t].max(initial=0) for t in np.linspace(0, 1, 11)]
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # that of the same or a larger recall
    area = (np.diff(recall, prepend=0) * precision).sum()
    return {"11point": 100 * float(np.mean(points)), "area": 100 * float(area)}


def evaluate(net, images, precision, workers, device):
    """What is detected in each image, by one process or another; {class: its AP} of the classes that occur; and the
    means of these by COLUMNS."""
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
                found = net.detect(as_image(pixels, device))
            own.append({name: t.cpu() for name, t in found.items()})
    net.train()
    dist.all_gather_object(parts, own, group=checkpoint.control)
    found = [parts[i % world][i // world] for i in range(len(images))]
    aps = {c: average_precision(found, images.objects, 1 + i) for i, c in enumerate(images.classes)}
    aps = {c: ap for c, ap in aps.items() if ap}
    return found, aps, {name: sum(ap[name[4:]] for ap in aps.values()) / len(aps) for name in COLUMNS}


def as_image(pixels, device):
    """Pixels (H, W, 3), uint8, as a net reads them: (3, H, W) in 0 ... 1."""
    return pixels.to(device, non_blocking=True).permute(2, 0, 1).float() / 255


def load(images, view, keys, workers, device):
    """Yield [*view(image, *key), index] for one image after the other."""

    def only(examples):
        return [*examples[0][0], examples[0][1]]

    return data.load_views(images, view, only, keys, workers, device, checkpoint.ignore_signals)


def train(args, device):
    """Train the detector that the flags name, from where its run stands, draw what it finds, and write the result.
    Returns the exit status."""
    with checkpoint.all_or_none():
        images, test = data.load_detection(args.dataset, args.data, args.train, args.images)
        identity = {name: getattr(args, name) for name in IDENTITY} | {"weights": args.weights_hash}
        identity |= {"classes": images.classes, "training_images": len(images)}
        run = checkpoint.Run(args.out, identity, COLUMNS)
    checkpoint.agree(args.out, run.result)
    if run.result:
        return finish(run, run.result, COLUMNS)

    with checkpoint.all_or_none(args.out):
        torch.manual_seed(args.seed)
        normal = weights.grey_levels(data.MEAN, data.STD)
        net, about = args.pretrained or (detection.classifier(args, len(images.classes)), normal)
        about = {name: about[name] for name in normal} | {"classes": images.classes, "size": args.short}
        run.begin({name: getattr(args, name) for name in SETTINGS}, about)
        begun = run.load() is not None
    net.to(device, memory_format=torch.channels_last)
    if not (args.weights or begun):
        pretrain(net, images, args, device)
    torch.manual_seed(args.seed)
    net = detection.detector(args, about, net).to(device, memory_format=torch.channels_last)
    # 300 regions of an image are tested, and fewer trained on: it costs as much
    rows, evaluations = rows_at(args.iterations, args.iterations * args.batch_size, 3 * len(test))
    own = range(args.batch_size)[own_micro_batches(args)]
    training = Training(
        args,
        run,
        net,
        detection.objective,
        lambda batches: batches,
        iterations=args.iterations,
        images=len(images),
        columns=COLUMNS,
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

    def test_net():
        return evaluate(net, test, training.precision, args.workers, device)

    found = None
    with contextlib.closing(stream), training:
        while True:
            t = training.iteration
            if training.row_due(t in rows):
                found, aps, errors = test_net() if t in evaluations else (None, None, {})
                training.row(lr_at(t - 1, args), errors)
            if t == args.iterations:
                break
            training.save_if_due()
            training.iterate(lr_at(t, args), draws(t))
    result = training.result("weights", "train", "width", "short", "roi", "regions")
    if not training.diverged:
        if not found:  # the run was killed between its last row and its result
            found, aps, _ = test_net()
        draw(test, found, args.draw, run.folder, run.write)
        result["aps"] = aps
    return finish(run, result, COLUMNS)


def load_vgg(path):
    """(net, about) of a file of torchvision's vgg16, as load_weights has them. Raises ValueError."""
    net = detection.vgg16(weights=None, init_weights=False)
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
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


def draw(images, found, count, folder, write):
    """Write the first images with what was found in them, as PNG files, by write(path, content)."""
    for i in range(min(count, len(images)) if dist.get_rank() == 0 else 0):
        with images.open(i) as image:
            pixels, buffer = data.decode(image, 1).permute(2, 0, 1), io.BytesIO()
        drawn = detection.draw(pixels, found[i], images.classes).permute(1, 2, 0)
        Image.fromarray(drawn.numpy()).save(buffer, "PNG")
        write(pathlib.Path(folder, f"found-{i}.png"), buffer.getvalue())


def evaluate_run(flags, device):
    """Print the mAP of a run's checkpoint and the AP of each class, on the test images of its flags, and draw. Returns
    the exit status."""
    folder = flags.evaluate
    with checkpoint.all_or_none(folder):
        args, state = checkpoint.read_run(folder)
        if "regions" not in args:
            raise ValueError(f"{folder} is no run of detection_train.py: evaluate it with the script that trained it")
        _, images = data.load_detection(args.dataset, flags.data or args.data, args.train, args.images)
        if images.classes != state["about"]["classes"]:
            raise ValueError(f"{folder} is of {', '.join(args.classes)} and the images of {', '.join(images.classes)}")
        net, precision = detection.of_run(args, state), Precision(args.precision, device)
    net.to(device, memory_format=torch.channels_last)
    found, aps, maps = evaluate(net, images, precision, flags.workers, device)
    with checkpoint.all_or_none():
        draw(images, found, flags.draw, folder, checkpoint.write)
    for name, ap in aps.items():
        print_line(f"{name:15} AP (11-point) {ap['11point']:6.2f} %, AP (area) {ap['area']:6.2f} %")
    maps = ", ".join(f"{name} {maps[key]:.2f} %" for key, name in COLUMNS.items())
    print_line(f"{folder}: {maps} after {state['iteration']:,} of {args.iterations:,} iterations")
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
    add = parser.add_argument_group("the data").add_argument
    add("--dataset", choices=RECIPES, default="voc", help="synthetic needs none (default voc)")
    add("--data", metavar="DIR", help="where VOCdevkit is, or will be; or a folder in VOC's layout (default data)")
    add("--train", choices=("07+12", "07"), default="07+12", help="VOC's trainval sets of these years (default 07+12)")
    add("--images", type=int, default=0, metavar="N", help="only the first N images of each set (default 0: all)")
    add("--short", type=int, metavar="N", help="the shorter side; all sizes scale along (default 600; synthetic 128)")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: a process's cores but 2)")
    add = parser.add_argument_group("the recipe").add_argument
    add("--iterations", type=int, metavar="N", help="the drop scales along (default 80000; synthetic 600)")
    add("--batch-size", type=int, metavar="N", help="images a step (default 2; synthetic 8)")
    add("--lr", type=float, help="learning rate before the drop (default 0.001; synthetic 0.06)")
    add("--seed", type=int, default=1, help="of weights, order, flips and samples (default 1)")
    group = parser.add_argument_group("the machine and the run")
    add_run_flags(group, checkpoint_seconds=300)
    group.add_argument("--draw", type=int, default=4, metavar="N", help="test images with what was found (default 4)")
    group.add_argument("--evaluate", metavar="RUN", help="print the mAP of a run's checkpoint; trains nothing")
    args = parser.parse_args()
    try:
        if args.evaluate is not None:
            refuse_all_but("--evaluate --data --draw --device --workers --timeout")
        resolve(args)
    except ValueError as error:
        checkpoint.fail(error)
    return args


def resolve(args):
    """Fill in what the flags leave to the recipe. Raises ValueError on a contradiction."""
    args.workers = max(cores_of_a_process() - 2, 1) if args.workers is None else args.workers
    at_least(args, workers=0, draw=0)
    if args.evaluate is not None:
        return
    if args.compile:
        raise ValueError("--compile: images have many sizes, and each would be compiled anew")
    if args.weights and args.width:
        raise ValueError("--width goes without --weights, whose net has its own")
    if args.vgg and (not args.weights or args.depth or args.unit or args.preact or args.unit_arg or args.layout):
        raise ValueError("--vgg goes with --weights, the file of torchvision's vgg16, and without --depth or --unit")
    recipe = RECIPES[args.dataset] | ({"roi": 7} if args.vgg else {}) | ({"width": 64} if args.weights else {})
    vars(args).update({name: value for name, value in recipe.items() if getattr(args, name, None) is None})
    at_least(args, width=1, short=32, images=0, iterations=1)
    args.data, args.micro_batch = args.data or "data", 1  # BN is fixed: images that share a step do not meet
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
    args.out = args.out or f"runs/{args.dataset}-{args.depth}-{args.unit}-seed{args.seed}"
    check_recipe(args)


def main():
    args = parse_flags()
    return start(train if args.evaluate is None else evaluate_run, args)


if __name__ == "__main__":
    sys.exit(main())
