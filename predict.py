"""The five likeliest classes of pictures, by a net of a run's folder or of a file of weights; or the objects in them.

    python predict.py runs/cifar10-20-basic-seed1 cat.jpg dog.png
    python predict.py resnet50.pth pictures/*.jpg --test 10-crop --json
    python predict.py runs/voc-101-bottleneck-seed1 street.jpg              # of detection_train.py: objects

Objects with a score of 0.5 or more are printed with their boxes, from corner to corner in pixels, and drawn into
found-<number>-<name>.png in the current folder.

A picture is turned upright as its EXIF data say, which training and evaluation never do, and this is said. A CIFAR net
sees the centre of the picture scaled to a shorter side of 32, an ImageNet net the views of a protocol of the papers.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read as torch is imported: threads that spin less share the cores

import argparse
import itertools
import json
import pathlib
import sys

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import checkpoint
import data
import weights


def views_of(path, protocol, size):
    """The views of a picture, each (H, W, 3), and whether it was turned. Raises whatever reading it does."""
    with data.open_picture(path) as image:
        upright = ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
        if protocol is None:
            return data.centre(*data.scaled(upright, size), size), upright is not image
        return data.test_views(upright, 0, protocol, size), upright is not image


@torch.inference_mode()
def probabilities(net, about, views, flips):
    """The softmax (N, classes) averaged over the views of each of N pictures, and over their flips."""
    device = net.fc.weight.device
    mean, std = about["mean"].to(device), about["std"].to(device)
    scores = torch.zeros(len(views), len(about["classes"]), dtype=torch.float64, device=device)
    flat, places, _ = data.test_batch([(list(of_one), 0) for of_one in views])
    for pixels, which in data.same_size(flat.to(device), places):
        for part, rows in zip(pixels.split(32), which.to(device).split(32), strict=True):
            part = (part.permute(0, 3, 1, 2).float() - mean) / std
            for turned in (part, part.flip(3)) if flips else (part,):
                scores.index_add_(0, rows, net(turned).double().softmax(dim=1))
    return (scores / scores.sum(dim=1, keepdim=True)).cpu()


def predict(net, about, paths, protocol=None):
    """{"picture": path, "turned": by EXIF, "classes": [(name, probability), ...]} of each picture in order, or
    {"picture": path, "problem": why it cannot be read}. The protocol, of data.PROTOCOLS, is for ImageNet's nets."""
    paths = iter(paths)
    while batch := [{"picture": path} for path in itertools.islice(paths, 32)]:
        views = []
        for found in batch:
            try:
                of_one, found["turned"] = views_of(found["picture"], protocol, about["size"])
                views.append(of_one)
            except Exception as error:  # a damaged file may raise anything
                found["problem"] = str(error) or type(error).__name__
        rows = iter(probabilities(net, about, views, bool(protocol) and data.PROTOCOLS[protocol][-1]))
        for found in batch:
            if "problem" not in found:
                top = next(rows).topk(min(5, len(about["classes"])))
                names = [about["classes"][c] for c in top.indices]
                found["classes"] = list(zip(names, top.values.tolist(), strict=True))
            yield found


def is_detector(source):
    """Whether this is the folder of a run of detection_train.py."""
    path = pathlib.Path(source, "config.json")
    return path.exists() and "regions" in checkpoint.read_json(path)


def find_objects(net, classes, paths, least=0.5):
    """{"picture": path, "turned": by EXIF, "objects": [(class, score, box), ...], "drawn": file} of each picture in
    order, or {"picture": path, "problem": why it cannot be read}. Boxes are (x1, y1, x2, y2) in pixels."""
    import detection

    for number, path in enumerate(paths):
        found = {"picture": path}
        try:
            with data.open_picture(path) as image:
                upright = ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
                found["turned"], pixels = upright is not image, data.decode(upright, 1).permute(2, 0, 1)
            objects = net.detect(pixels.to(net.cls.weight.device).float() / 255)
            columns = (objects[key].tolist() for key in ("labels", "scores", "boxes"))
            rows = [(classes[label - 1], *more) for label, *more in zip(*columns, strict=True) if more[0] >= least]
            found["drawn"] = f"found-{number}-{pathlib.Path(path).stem}.png"
            drawn = detection.draw(pixels, objects, classes, least).permute(1, 2, 0)
            Image.fromarray(drawn.contiguous().numpy()).save(found["drawn"])
            found["objects"] = rows
        except Exception as error:  # a damaged file may raise anything
            found["problem"] = str(error) or type(error).__name__
        yield found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FROM", help="a run's folder or a file of weights")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+")
    parser.add_argument("--layout", choices=weights.LAYOUTS, help="what FROM does not tell; see weights.py --help")
    parser.add_argument("--test", choices=data.PROTOCOLS, help="the views of a picture (default 1-crop)")
    parser.add_argument("--json", action="store_true", help="one JSON object per picture, each on a line")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto)")
    args = parser.parse_args()
    checkpoint.prepare_streams()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        if device == "cuda":
            checkpoint.check_gpu(device)
        if data.is_picture(args.source) and not pathlib.Path(args.source).is_dir():
            raise ValueError(f"{args.source} looks like a picture: the run or the file of weights comes first")
        if is_detector(args.source):
            if args.layout or args.test:
                raise ValueError(f"{args.source} is a detector, and --layout and --test are for nets that classify")
            from detection import of_run  # all of torchvision's, which takes a while

            run, state = checkpoint.read_run(args.source)
            net = of_run(run, state)
            found = find_objects(net, state["about"]["classes"], args.pictures)
        else:
            net, about = weights.load(args.source, args.layout)
            cifar = net.stem[0].kernel_size == (3, 3)
            if args.test and cifar:
                raise ValueError(f"--test {args.test} is for ImageNet's nets: this one sees a picture's centre alone")
            found = predict(net, about, args.pictures, None if cifar else args.test or "1-crop")
        net.to(device, memory_format=torch.channels_last)
    except (ValueError, RuntimeError, AssertionError) as error:
        checkpoint.fail(error)
    torch.backends.cudnn.allow_tf32 = False
    bad = 0
    many = len(args.pictures) > 64
    for picture in tqdm(found, total=len(args.pictures), unit="picture", disable=None if many else True):
        bad += "problem" in picture
        if "problem" in picture:
            checkpoint.print_error(f"{picture['picture']} cannot be read: {picture['problem']}")
        checkpoint.print_out(json.dumps(picture) if args.json else block(**picture), tqdm.write)
    return 2 if bad else 0


def block(picture, classes=(), objects=(), drawn=None, turned=False, problem=None):
    """What is printed for a picture."""
    note = " (not read)" if problem else " (turned upright, as its EXIF data say)" if turned else ""
    note += f": drawn in {drawn}" if drawn else ""
    boxes = [f"{100 * p:7.2f} %  {name}  {' '.join(f'{x:.0f}' for x in box)}" for name, p, box in objects]
    return "\n".join([f"{picture}{note}", *(f"{100 * p:7.2f} %  {name}" for name, p in classes), *boxes])


if __name__ == "__main__":
    sys.exit(main())
