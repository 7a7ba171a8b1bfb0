"""What detection.py, detection_train.py and data.py's detection section do: each of the known ways to get a detector
wrong has a test that would catch it. No test looks at a clock."""

import csv
import json
import math
import os
import pathlib
import re
import signal
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools import coco
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models import VGG, vgg16
from torchvision.models.vgg import make_layers
from torchvision.ops import FrozenBatchNorm2d, clip_boxes_to_image

import checkpoint
import data
import detection
import detection_train
import models
import predict
import training
import units
import weights
from conftest import start_workers

SCRIPT = detection_train  # what `flags` and `start` run
HERE = pathlib.Path(__file__).parent

# The objects of an image


def write_voc(folder, images, parts):
    """A folder in VOC's layout. images: {name: ((width, height), [object, ...])}, an object being an element's text or
    (class, xmin, ymin, xmax, ymax) and perhaps more elements; parts: {part: names}."""
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, (size, objects) in images.items():
        Image.new("RGB", size).save(folder / "JPEGImages" / f"{name}.jpg")
        text = "".join(o if isinstance(o, str) else voc_object(*o) for o in objects)
        size = "<size><width>9</width><height>9</height></size>"  # wrong, as in many sets
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{text}</annotation>")
    for part, names in parts.items():
        (folder / "ImageSets/Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def voc_object(name, xmin, ymin, xmax, ymax, more=""):
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object>{more}<name>{name}</name><bndbox>{box}</bndbox></object>"


DIFFICULT = "<difficult>1</difficult>"
HEAD = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"


def test_boxes_are_half_open_and_inside_the_image(tmp_path):
    objects = {
        (1, 1, 50, 40): [0, 0, 50, 40],  # the whole image
        (0, 0, 10, 10): [0, 0, 10, 10],  # of a set that counts from 0: never -1, nor 65535
        (5, 7, 5, 7): [4, 6, 5, 7],  # one pixel
        (40, 30, 60, 99): [39, 29, 50, 40],  # over the border
        (45.7, 1, 50.2, 3.5): [44.7, 0, 50, 3.5],
    }
    images = {"a": ((50, 40), [("dog", *said, HEAD) for said in objects])}
    train, test = data.load_detection("voc", write_voc(tmp_path, images, {"train": "a", "val": "a"}))
    for boxes, labels, difficult in (train.objects[0], test.objects[0]):
        torch.testing.assert_close(boxes, torch.tensor(list(objects.values())))
        assert labels.tolist() == [1] * 5 and labels.dtype == torch.int64
        assert not difficult.any() and difficult.dtype == torch.bool


def test_difficult_objects_and_images_without_any(tmp_path):
    """Neither is trained on; all of them are tested on."""
    images = {
        "both": ((50, 40), [("dog", 1, 1, 9, 9, DIFFICULT), ("cat", 2, 2, 9, 9, "<difficult>0</difficult>")]),
        "none": ((50, 40), []),
        "hard": ((50, 40), [("cat", 1, 1, 9, 9, DIFFICULT)]),
        "last": ((50, 40), [("dog", 3, 3, 9, 9)]),
    }
    train, test = data.load_detection("voc", write_voc(tmp_path, images, {"train": images, "val": images}))
    assert train.classes == test.classes == ["cat", "dog"]
    assert [train.name(i)[-8:] for i in range(len(train))] == ["both.jpg", "last.jpg"]
    assert [labels.tolist() for _, labels, _ in train.objects] == [[1], [2]]
    assert [labels.tolist() for _, labels, _ in test.objects] == [[2, 1], [], [1], [2]]
    assert [difficult.tolist() for _, _, difficult in test.objects] == [[True, False], [], [True], [False]]
    assert all(boxes.shape == (len(labels), 4) for boxes, labels, _ in test.objects)


def test_names_that_are_not_utf8(tmp_path):
    write_voc(tmp_path, {"a": ((50, 40), [GOOD])}, {"train": "a", "val": "a"})
    for folder, ending in ("JPEGImages", "jpg"), ("Annotations", "xml"):
        (tmp_path / folder / f"a.{ending}").rename(tmp_path / folder / f"caf\udce9 1.{ending}")
    for part in "train", "val":
        (tmp_path / f"ImageSets/Main/{part}.txt").write_bytes(b"caf\xe9 1\r\n\r\n")
    train, test = data.load_detection("voc", tmp_path)
    assert train.open(0).size == test.open(0).size == (50, 40)


GOOD = ("cat", 1, 1, 9, 9)
BAD_OBJECTS = [
    ([GOOD, ("dog", 9, 1, 3, 9)], "object 2: its box [9.0, 1.0, 3.0, 9.0] contains no pixel"),
    ([("dog", 60, 1, 70, 9)], "object 1: its box [60.0, 1.0, 70.0, 9.0] contains no pixel"),
    ([("dog", "nan", 1, 7, 9)], "object 1: its box [nan, 1.0, 7.0, 9.0] contains no pixel"),
    ([GOOD, GOOD, ("dog", "two", 1, 7, 9)], "object 3: could not convert string to float: 'two'"),
    (["<object><name>cat</name></object>"], "object 1: could not convert string to float: 'absent'"),
    ([voc_object(" ", 1, 1, 9, 9)], "object 1: its name '' is none of"),
    (["<object>"], "a.xml: mismatched tag"),
]


@pytest.mark.parametrize("objects, message", BAD_OBJECTS)
def test_an_object_that_cannot_be_is_named(objects, message, tmp_path):
    with pytest.raises(ValueError) as raised:
        data.load_detection("voc", write_voc(tmp_path, {"a": ((50, 40), objects)}, {"train": "a", "val": "a"}))
    assert str(tmp_path / "Annotations" / "a.xml") in str(raised.value) and message in str(raised.value)


def test_a_folder_that_is_not_in_vocs_layout(tmp_path, monkeypatch):
    images = {"a": ((50, 40), [GOOD]), "b": ((50, 40), [("cow", 1, 1, 9, 9)]), "c": ((50, 40), [])}
    write_voc(tmp_path, images, {"train": "a", "val": "b"})

    def problem(root=tmp_path, **parts):
        write_voc(tmp_path, {}, parts)
        with pytest.raises(ValueError) as raised:
            data.load_detection("voc", root)
        return str(raised.value)

    assert "b.xml, object 1: its name 'cow' is none of cat" in problem()
    assert "no image of val.txt in" in problem(val="c") and "no image of train.txt in" in problem(train="c", val="a")
    assert "JPEGImages/d.jpg" in problem(train="ad", val="a")
    write_voc(tmp_path, {"h": ((50, 40), [("cat", 1, 1, 9, 9, DIFFICULT)])}, {})
    assert "no image of val.txt in" in problem(train="a", val="h")  # difficult objects have no average precision
    (tmp_path / "JPEGImages/b.jpg").unlink()
    os.mkfifo(tmp_path / "JPEGImages/b.jpg")
    assert "b.xml: it is no regular file" in problem(train="a", val="b")
    (tmp_path / "ImageSets/Main/val.txt").unlink()
    assert "is not in VOC's layout" in problem(train="a")

    def offline(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", offline)
    said = problem(tmp_path / "elsewhere")
    assert "VOC2007/ImageSets/Main/trainval.txt" in said and "host.robots.ox.ac.uk" in said and "no network" in said


def test_the_parts_of_voc(tmp_path):
    """07+12 is the trainval sets of both years; the test set is 2007's; the classes are VOC's, in their order."""
    one = {name: ((20, 10), [("tvmonitor", 1, 1, 9, 9), ("aeroplane", 1, 1, 9, 9)]) for name in "abc"}
    write_voc(tmp_path / "VOCdevkit/VOC2007", one, {"trainval": "ab", "test": "c"})
    write_voc(tmp_path / "VOCdevkit/VOC2012", one, {"trainval": "abc"})
    for part, names in (("07+12", "ababc"), ("07", "ab")):
        train, test = data.load_detection("voc", tmp_path, part)
        assert [train.name(i)[-5:-4] for i in range(len(train))] == list(names) and len(test) == 1
        assert train.classes == test.classes == sorted(data.VOC_CLASSES) and len(train.classes) == 20
        assert all(labels.tolist() == [20, 1] for _, labels, _ in train.objects)
    assert [len(images) for images in data.load_detection("voc", tmp_path, limit=3)] == [3, 1]


def test_the_parts_of_a_folder_of_ones_own(tmp_path):
    """Nothing that is tested on is trained on: trainval.txt and test.txt, or train.txt and val.txt."""
    write_voc(tmp_path, {name: ((20, 10), [GOOD]) for name in "abc"}, {"train": "a", "val": "b", "trainval": "ab"})
    assert [images.name(0)[-5] for images in data.load_detection("voc", tmp_path)] == ["a", "b"]
    names = [f"kind {name}" for name in "hgfbacde"]  # in the order of their names, and not as they are found
    write_voc(tmp_path / "more", {"a": ((20, 10), [(name, *GOOD[1:]) for name in names])}, {"train": "a", "val": "a"})
    assert data.load_detection("voc", tmp_path / "more")[0].classes == sorted(names)
    write_voc(tmp_path, {}, {"test": "c"})
    train, test = data.load_detection("voc", tmp_path)
    assert (len(train), test.name(0)[-5]) == (2, "c")


def write_coco(folder, part, images, annotations, categories=((90, "toothbrush"), (1, "person"), (13, "stop sign"))):
    """A part in COCO's layout. images: {id: (width, height)}; annotations: (image, category, box, more)."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / part).mkdir(exist_ok=True)
    for number, (width, height) in images.items():
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / part / f"{number}.jpg")
    content = {"categories": [{"id": number, "name": name} for number, name in categories]}
    content["images"] = [{"id": n, "file_name": f"{n}.jpg", "width": w, "height": h} for n, (w, h) in images.items()]
    content["annotations"] = [
        {"id": n, "image_id": image, "category_id": category, "bbox": box} | more
        for n, (image, category, box, more) in enumerate(annotations, 1)
    ]
    path = folder / "annotations" / f"instances_{part}.json"
    path.write_text(json.dumps(content))
    return path


CROWD = {"iscrowd": 1, "area": 700.0}
COCO = {7: (120, 90), 30: (50, 60), 4: (80, 80)}
COCO_OBJECTS = [
    (7, 13, [10, 20, 30, 40], {"iscrowd": 0, "area": 1200.0}),
    (4, 1, [0, 0, 80, 80], CROWD),
    (7, 90, [100.5, 80, 30, 10], {}),  # reaches over the border, and names neither crowd nor area
    (7, 1, [5, 5, 0, 20], {}),  # nothing
    (7, 1, [50, 50, 20, 20], CROWD),
]


def test_cocos_objects(tmp_path, capsys):
    """Ids with gaps become 1, 2, ...; crowds and empty boxes are not trained on, nor images without any other object;
    but pycocotools is told of all."""
    for part in ("train2014", "val2014"):
        write_coco(tmp_path, part, COCO, COCO_OBJECTS)
    images, test = data.load_detection("coco", tmp_path, "2014")
    assert images.classes == test.classes == ["person", "stop sign", "toothbrush"]
    assert images.categories == test.categories == [1, 13, 90]
    assert (images.ids, test.ids) == ([7], [7, 30, 4]) and images.name(0) == str(tmp_path / "train2014/7.jpg")
    ((boxes, labels, crowd),) = images.objects
    assert boxes.tolist() == [[10, 20, 40, 60], [100.5, 80, 120, 90]] and labels.tolist() == [2, 3] and not crowd.any()
    assert [len(labels) for _, labels, _ in test.objects] == [3, 0, 1]
    told = [(a["image_id"], a["category_id"], a["iscrowd"], a["bbox"]) for a in test.truth["annotations"]]
    assert told == [(image, category, more.get("iscrowd", 0), box) for image, category, box, more in COCO_OBJECTS]
    assert [image["id"] for image in test.truth["images"]] == [7, 30, 4]
    said = capsys.readouterr().err
    assert said.count("train2014.json: boxes without a pixel inside their image: 1; they are not trained on") == 1
    assert "boxes that reach over the border: 1 of 5; a bbox is [x, y, width, height]" in said
    limited = data.load_detection("coco", tmp_path, "2014", limit=1)[1]
    assert limited.ids == [7] and len(limited.truth["annotations"]) == 4
    for part in ("train", "val"):  # a folder of one's own has no year
        write_coco(tmp_path, part, {5: (9, 9)}, [(5, 1, [0, 0, 9, 9], {})])
    assert data.load_detection("coco", tmp_path, "2014")[1].ids == [5]
    with pytest.raises(ValueError, match="is a folder in COCO's layout: add --dataset coco"):
        data.load_detection("voc", tmp_path)


CAT = (1, "cat")
BAD_COCO = [
    ({}, [(8, 1, [0, 0, 9, 9], {})], (CAT,), "annotation 1.*its image or its category is not in the file"),
    ({}, [(7, 2, [0, 0, 9, 9], {})], (CAT,), "annotation 1.*its image or its category is not in the file"),
    ({}, [(7, 1, [0, 0, 9], {})], (CAT,), "annotation 1.*not enough values"),
    ({}, [(7, 1, [0, 0, 9, math.nan], {})], (CAT,), r"annotation 1.*its box is \[0, 0, 9, nan\]"),
    ({}, [(7, 1, None, {})], (CAT,), "annotation 1.*not iterable"),
    ({}, [(7, 1, [0, 0, 9, 9], {})], (CAT, (1, "dog")), "two of its categories have the same id or name"),
    ({}, [(7, 1, [0, 0, 9, 9], {})], (CAT, (2, "cat")), "two of its categories have the same id or name"),
    ({}, [(7, 1, [0, 0, 9, 9], {})], (CAT, ("x", "dog")), "invalid literal for int"),
    ({}, [(7, 1, [0, 0, 9, 9], CROWD)], (CAT,), "none of its images has an object"),
    ({"images": [{"id": 7}]}, [(7, 1, [0, 0, 9, 9], {})], (CAT,), "annotation 1.*there is no 'width' in it"),
    ({"images": 7}, [], (CAT,), "not iterable"),
    ({"categories": None}, [], (CAT,), "not iterable"),
]


@pytest.mark.parametrize("changes, annotations, categories, message", BAD_COCO)
def test_a_file_that_is_not_in_cocos_format(changes, annotations, categories, message, tmp_path):
    path = write_coco(tmp_path, "train", {7: (120, 90)}, annotations, categories)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="instances_train.json.* is not in COCO's format: .*") as problem:
        data.load_detection("coco", tmp_path, "2014")
    assert re.search(message, str(problem.value))


def test_a_folder_that_is_not_in_cocos_layout(tmp_path, monkeypatch):
    def problem():
        with pytest.raises(ValueError) as problem:
            data.load_detection("coco", tmp_path, "2014")
        return str(problem.value)

    assert (
        "annotations/instances_train2014.json cannot be read (No such file or directory): name the folder" in problem()
    )
    path = write_coco(tmp_path, "train", COCO, COCO_OBJECTS)
    whole = path.read_bytes()
    for content in (whole[:-9], b"[" * 10**5, b"[]", b"\xff"):
        path.write_bytes(content)
        assert "instances_train.json is not in COCO's format" in problem()
    path.write_bytes(whole)
    write_coco(tmp_path, "val", COCO, [(7, 1, [0, 0, 9, 9], {})], ((1, "cat"),))
    assert "the categories of train and val differ" in problem()
    (tmp_path / "train/7.jpg").unlink()
    assert f"there is no image {tmp_path / 'train/7.jpg'}" in problem()
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert problem() == "COCO's mAP is measured by pycocotools, which is not installed: pip install pycocotools"


def test_synthetic_boxes_are_exact_and_images_pure(monkeypatch):
    train, test = data.load_detection("synthetic", None, limit=40)
    again = data.Shapes(5, 35)
    assert (len(train), len(test)) == (40, 8) and np.array_equal(train.pixels[35:], again.pixels)
    assert not any(np.array_equal(a, b) for a in train.pixels for b in test.pixels)
    assert {len(labels) for _, labels, _ in train.objects} == {1, 2, 3}
    assert {int(label) for _, labels, _ in train.objects for label in labels} == {1, 2, 3, 4, 5}
    painted = []
    for level in (9999, -9999):
        monkeypatch.setattr(data.Shapes, "colours", np.full((5, 3), level))
        painted.append(data.Shapes(40, 0))
    for white, black, (boxes, _, _) in zip(painted[0].pixels, painted[1].pixels, train.objects, strict=True):
        shape = (white != black).any(axis=2)
        for x1, y1, x2, y2 in boxes.int().tolist():
            part = shape[y1:y2, x1:x2]
            assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
            shape[y1:y2, x1:x2] = False
        assert not shape.any()


def test_training_views_are_flipped_with_their_boxes():
    images = data.Shapes(30, 0)
    before = [boxes.clone() for boxes, _, _ in images.objects]

    def view(i, epoch, seed=1):
        return data.with_objects(images.open(i), epoch, i, images.objects, seed)

    flipped = []
    for i, (boxes, labels, _) in enumerate(images.objects):
        pixels, moved, kept = view(i, 0)
        original = torch.from_numpy(images.pixels[i])
        flipped.append(not torch.equal(pixels, original))
        assert kept is labels and moved.dtype == torch.float32
        for (x1, y1, x2, y2), (a1, b1, a2, b2) in zip(boxes.int().tolist(), moved.int().tolist(), strict=True):
            part, own = pixels[b1:b2, a1:a2], original[y1:y2, x1:x2]
            assert torch.equal(part.flip(1) if flipped[-1] else part, own)
        assert torch.equal(view(i, 0)[0], pixels)
    assert 5 < sum(flipped) < 25
    assert flipped != [torch.equal(view(i, 1)[0], view(i, 0)[0]) for i in range(30)]  # another epoch's are others
    assert flipped != [torch.equal(view(i, 0, seed=2)[0], view(i, 0)[0]) for i in range(30)]
    assert all(torch.equal(a, boxes) for a, (boxes, _, _) in zip(before, images.objects, strict=True))


# The net


def resnet(depth=18, unit="basic", width=8):
    """A narrow net whose BN does something, as after training."""
    torch.manual_seed(0)
    net = models.imagenet_resnet(depth, units.UNITS[unit], 10, width)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values, low in ((layer.running_mean, -0.2), (layer.running_var, 0.5), (layer.weight, 0.5)):
                nn.init.uniform_(values, low, low + 1)
    return net.eval()


def vgg():
    """VGG-16 but for its width, which is a 32nd."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = VGG(nn.Sequential(), 10, init_weights=False)
    net.features = make_layers([2, 2, "M", 4, 4, "M", *[8] * 3, "M", *[16] * 3, "M", *[16] * 3, "M"])
    net.classifier[0], net.classifier[3], net.classifier[6] = (
        nn.Linear(n, m) for n, m in ((784, 128), (128, 128), (128, 10))
    )
    return net.eval()


def detector(net=None, classes=5, mean=data.MEAN, std=data.STD, short=96, roi=7, **more):
    net = net or resnet()
    torch.manual_seed(1)
    return detection.Detector(net, classes, mean, std, short, roi, **more)


def objects(*boxes):
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.arange(1, 1 + len(boxes))


PICTURE = torch.rand(3, 100, 130, generator=torch.Generator().manual_seed(2))
OBJECTS = objects((10, 20, 60, 70), (70, 5, 130, 60))


@pytest.mark.parametrize("unit", ("basic", "basic-preact", "single", "bottleneck", "bottleneck-preact"))
def test_a_net_cut_in_two_is_the_net(unit):
    """Trunk, regions' layers and fc in a row are the classifier, with BN fixed: nothing is left out, doubled or pooled
    otherwise; and conv1 to conv4_x have stride 16, conv5_x halves the regions once more."""
    depth = {1: 10, 2: 18, 3: 50}[units.UNITS[unit].weights]
    if depth == 10:
        net = models.ResNet(resnet().stem, 8, (2, 2, 2, 2), units.Single, 10, {"option": "B"}).eval()
    else:
        net = resnet(depth, unit)
    x = torch.rand(2, 3, 96, 128)
    with torch.inference_mode():
        expected = net(x)
        fc = net.fc
        cut = detector(net, roi=None).train()  # in which BN would use the batch's statistics
        maps = cut.trunk(x)
        torch.testing.assert_close(fc(cut.head(maps)), expected)
        assert maps.shape == (2, cut.rpn.head.conv[0][0].in_channels, 6, 8)
        pooled, seen = torch.rand(3, maps.shape[1], cut.roi, cut.roi), []
        cut.head[0].register_forward_hook(lambda _, __, made: seen.append(made.shape[2:]))
        cut.head(pooled)
    assert cut.roi == 14 and seen == [(7, 7)]
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in cut.modules())


def test_vgg_cut_in_two_is_vgg():
    net, x = vgg(), torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        expected = net(x)
        cut = detector(net, roi=None).eval()
        maps = cut.trunk(x)
        assert cut.roi == 7 and maps.shape[2:] == (14, 14)
        last = net.classifier[-1]
        torch.testing.assert_close(last(cut.head(net.features[-1](maps))), expected)


def test_parameters():
    """The papers' two detectors of VOC's 20 classes, and that of COCO's 80, BN's scales and offsets included; 91 layers
    of ResNet-101 are shared."""

    def count(net):
        fixed = sum(b.numel() for name, b in net.named_buffers() if name.endswith(("weight", "bias")))
        return fixed + sum(p.numel() for p in net.parameters())

    with torch.device("meta"):
        one = detection.Detector(models.imagenet_resnet(101, units.Bottleneck), 20, data.MEAN, data.STD)
        two = detection.Detector(vgg16(weights=None, init_weights=False), 20, data.MEAN, data.STD)
    assert count(one) == 52_199_638
    assert count(one) - count(one.rpn) + 9 * 1024 * 512 + 512 + 513 * 45 == 47_457_494  # an RPN 512 wide, as VGG's
    assert count(two) == 137_073_622
    with torch.device("meta"):
        net = models.imagenet_resnet(101, units.Bottleneck)
        context = detection.Detector(net, 80, data.MEAN, data.STD, context=True, anchors=detection.COCO_ANCHORS)
        coco = detection.Detector(net, 80, data.MEAN, data.STD, anchors=detection.COCO_ANCHORS)
    assert (count(coco), count(context)) == (52_829_713, 53_659_153)
    layers = [name for name, layer in one.trunk.named_modules() if isinstance(layer, nn.Conv2d)]
    assert len([name for name in layers if "shortcut" not in name]) == 91 and len(layers) == 94


@pytest.mark.parametrize("make, fixed", ((resnet, ("trunk.0.", "trunk.1.")), (vgg, [f"trunk.{i}." for i in range(10)])))
def test_what_is_fixed_stays_bit_for_bit(make, fixed):
    """BN everywhere, conv1 and conv2_x; weight decay does not reach them either. Everything else trains."""
    net = detector(make()).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01, 0.9, weight_decay=5e-4)
    for t in range(3):
        sgd.zero_grad()
        detection.objective(net, PICTURE, *OBJECTS, t)[0].backward()
        sgd.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained
    assert trained == {name for name, p in net.named_parameters() if not name.startswith(tuple(fixed))}
    buffers = {name for name, _ in net.named_buffers()}
    frozen = [layer for layer in net.modules() if isinstance(layer, FrozenBatchNorm2d)]
    assert len(buffers) == 4 * len(frozen) and (make is vgg or len(frozen) == 20)


def test_fixed_layers_of_vgg():
    net = detector(vgg())
    convolutions = [layer for layer in net.trunk if isinstance(layer, nn.Conv2d)]
    assert [layer.weight.requires_grad for layer in convolutions] == [False] * 4 + [True] * 9  # conv3_1 and up train


def test_new_layers():
    net = detector(resnet(width=64), 20)
    for layer, std in (
        (net.cls, 0.01),
        (net.box, 0.001),
        (net.rpn.head.conv[0][0], 0.01),
        (net.rpn.head.bbox_pred, 0.01),
    ):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05) and not layer.bias.any()


def test_an_image_is_scaled_and_normalised_as_the_weights_ask():
    mean, std, seen = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125), []
    net = detector(mean=mean, std=std).eval()
    net.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    colour = torch.tensor([0.6, 0.45, 0.425]).view(3, 1, 1)
    for height, width, scaled in ((50, 60, (96, 115)), (60, 50, (115, 96)), (40, 400, (16, 160)), (192, 192, (96, 96))):
        net.detect(colour.expand(3, height, width))
        h, w = scaled
        torch.testing.assert_close(seen[-1][0, :, :h, :w], torch.ones(3, h, w))
        assert not seen[-1][0, :, h:].any() and not seen[-1][0, :, :, w:].any()
        assert all(n % 32 == 0 for n in seen[-1].shape[2:])
    with pytest.raises(TypeError):
        net.detect(torch.zeros(3, 50, 60, dtype=torch.uint8))  # 0 ... 255


def test_anchors():
    """Those of the paper; all scale along with the shorter side, as the longer and the smallest proposal do."""
    for short in (600, 150):
        net = detector(short=short)
        (cell,) = net.rpn.anchor_generator.cell_anchors
        scale = short / 600
        sides = (cell[:, 2:] - cell[:, :2]) / scale
        assert len(cell) == 9 and torch.allclose(cell[:, :2], -cell[:, 2:])
        found = {(round(math.sqrt(w * h) / 16) * 16, round(2 * h / w) / 2) for w, h in sides.tolist()}
        assert found == {(side, ratio) for side in (128, 256, 512) for ratio in (0.5, 1, 2)}
        assert (net.transform.min_size, net.transform.max_size, net.rpn.min_size) == (
            (short,),
            1000 * scale,
            16 * scale,
        )


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_labels_of_anchors():
    """By the paper's rule, which knows no anchor across the border of the image (not of the padded one)."""
    net, size = detector(short=150), (150, 190)
    maps = torch.zeros(1, 64, 10, 12)
    images = type("Images", (), {"tensors": torch.zeros(1, 3, 160, 192), "image_sizes": [size]})
    (anchors,) = net.rpn.anchor_generator(images, [maps])
    boxes, _ = objects((20, 30, 60, 70), (3, 3, 20, 12), (90, 60, 185, 145))
    (labels,), (matched,) = net.rpn.assign_targets_to_anchors([anchors], [{"boxes": boxes, "size": size}])
    inside = [0 <= x1 and 0 <= y1 and x2 <= 190 and y2 <= 150 for x1, y1, x2, y2 in anchors.tolist()]
    overlaps = [[iou(a, b) for b in boxes.tolist()] for a in anchors.tolist()]
    largest = [max(o[j] for o, i in zip(overlaps, inside, strict=True) if i) for j in range(3)]
    expected = []
    for o, i in zip(overlaps, inside, strict=True):
        nearest = any(abs(o[j] - largest[j]) < 1e-6 for j in range(3))
        expected.append(-1 if not i else 1 if nearest or max(o) >= 0.7 else 0 if max(o) < 0.3 else -1)
    assert labels.tolist() == expected and 3 <= expected.count(1) and 0 in expected
    assert 0 < sum(190 < x2 <= 192 or 150 < y2 <= 160 for _, _, x2, y2 in anchors.tolist())  # in the padding
    for label, box, o in zip(labels.tolist(), matched, overlaps, strict=True):
        assert label != 1 or torch.equal(box, boxes[int(np.argmax(o))])


HARD_CASES = {
    "no object": (PICTURE, objects()),
    "one pixel": (PICTURE, objects((5, 5, 6, 6))),
    "the whole image": (PICTURE, objects((0, 0, 130, 100))),
    "no anchor inside": (torch.rand(3, 12, 300), objects((5, 5, 100, 10))),
    "many": (PICTURE, (torch.tensor([[i, i, i + 20.0, i + 30] for i in range(60)]), torch.ones(60, dtype=torch.int64))),
}


@pytest.mark.parametrize("case", HARD_CASES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_loss_is_finite(case, dtype):
    image, (boxes, labels) = HARD_CASES[case]
    net = detector().to(dtype).train()
    loss, error = detection.objective(net, image.to(dtype), boxes.to(dtype), labels, 3)
    loss.backward()
    assert loss.isfinite() and 0 <= error <= 1
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    if case == "no object":  # no box is learnt from, and every region is background
        assert not net.box.weight.grad.any() and not net.rpn.head.bbox_pred.weight.grad.any()
        assert net.cls.bias.grad[0] < 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_reduced_precision(dtype):
    """Layers are reduced, coordinates are not: these would be rounded to whole pixels, or to every eighth."""
    net = detector().eval()
    torch.nn.init.zeros_(net.rpn.head.bbox_pred.weight)  # proposals are anchors, and detections proposals
    torch.nn.init.zeros_(net.box.weight)
    with torch.autocast("cpu", dtype):
        found = net.detect(PICTURE)["boxes"]
        maps, proposals, (height, width), *_ = net.propose(PICTURE)
        loss, _ = detection.objective(net.train(), PICTURE, *OBJECTS, 3)
        loss.backward()
    assert loss.dtype == maps.dtype == found.dtype == torch.float32 and loss.isfinite()
    padded = type("Images", (), {"tensors": torch.zeros(1, 3, 96, 128), "image_sizes": [(height, width)]})
    anchors = clip_boxes_to_image(net.rpn.anchor_generator(padded, [maps])[0], (height, width))
    found = found * torch.tensor([width / 130, height / 100] * 2)
    for boxes, among in ((proposals, anchors), (found, proposals)):
        assert len(boxes) > 3 and ((boxes[:, None] - among).abs().amax(dim=2).amin(dim=1) < 1e-3).all()


def test_the_loss_is_the_papers(monkeypatch):
    """Each of its four terms, by hand, out of what was sampled; ground truth is among the regions; of a region's
    boxes its class's alone counts."""
    net = detector().double().train()
    image, boxes = PICTURE.double(), OBJECTS[0].double()
    seen = {}

    def spy(owner, name):
        original = getattr(owner, name)

        def wrapped(*words):
            seen[name] = words, original(*words)
            return seen[name][1]

        monkeypatch.setattr(owner, name, wrapped)

    spy(net.rpn, "compute_loss")
    spy(net.rpn, "fg_bg_sampler")
    spy(net.sampler, "select_training_samples")
    spy(net, "classify")
    nn.init.normal_(net.box.weight, std=0.5)
    nn.init.normal_(net.rpn.head.bbox_pred.weight, std=0.5)
    loss, error = detection.objective(net, image, boxes, OBJECTS[1], 3)
    size = net.transform([image])[0].image_sizes[0]

    def smooth_l1(x, beta):
        x = x.abs()
        return torch.where(x < beta, x**2 / (2 * beta), x - beta / 2).sum()

    objectness, deltas, (labels,), (codes,) = seen["compute_loss"][0]
    positive, negative = (mask[0].bool() for mask in seen["fg_bg_sampler"][1])
    assert 2 <= positive.sum() <= 128 and positive.sum() + negative.sum() <= 256
    assert (labels[positive] == 1).all() and (labels[negative] == 0).all()
    log = nn.functional.logsigmoid
    chosen = positive | negative
    expected = -(log(objectness[:, 0][positive]).sum() + log(-objectness[:, 0][negative]).sum()) / chosen.sum()
    expected = expected + smooth_l1((deltas - codes)[positive], 1 / 9) / chosen.sum()

    (regions,), _, (labels,), _ = seen["select_training_samples"][1]
    scores, coded = seen["classify"][1]
    boxes = boxes * torch.tensor([size[1] / 130, size[0] / 100] * 2)
    assert all((regions == box).all(dim=1).any() for box in boxes)
    assert len(labels) <= 64 and 2 <= (labels > 0).sum() <= 16
    for i, label in enumerate(labels.tolist()):
        expected = expected - scores[i].log_softmax(dim=0)[label] / len(labels)
        if label:  # shifts and logarithms of ratios, times 10 and 5
            (x1, y1, x2, y2), (a1, b1, a2, b2) = regions[i], boxes[label - 1]
            x, w = 10 * ((a1 + a2) - (x1 + x2)) / 2 / (x2 - x1), 5 * ((a2 - a1) / (x2 - x1)).log()
            y, h = 10 * ((b1 + b2) - (y1 + y2)) / 2 / (y2 - y1), 5 * ((b2 - b1) / (y2 - y1)).log()
            expected = expected + smooth_l1(coded[i, label] - torch.stack([x, y, w, h]), 1) / len(labels)
    torch.testing.assert_close(loss, expected)
    assert error == (scores.argmax(dim=1) != labels).double().mean()


def test_regions_are_pooled_where_they_lie():
    """Cells of 16 pixels: a region of cells 2 to 4 across and 1 to 3 down holds the values of these and no others."""
    net, seen = detector(roi=3), []
    net.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    maps = torch.arange(48.0).view(1, 1, 6, 8).expand(1, net.rpn.head.bbox_pred.in_channels, 6, 8)
    net.features([(maps, 1)], torch.tensor([[32.0, 16, 64, 48]]))
    assert torch.equal(seen[0][0, 0], maps[0, 0, 1:4, 2:5])


def test_proposals_and_what_they_are_of():
    """12,000 anchors, and after NMS at 0.7 2,000 proposals; in tests 6,000 and 300. From an IoU of 0.5 a proposal is of
    an object, and any other is background."""
    net = detector()
    for mode, before, after in ((True, 12_000, 2_000), (False, 6_000, 300)):
        net.train(mode)
        assert (net.rpn.pre_nms_top_n(), net.rpn.post_nms_top_n(), net.rpn.nms_thresh) == (before, after, 0.7)
    boxes, _ = objects((0, 0, 10, 10))
    proposals, _ = objects((0, 0, 10, 3), (0, 0, 10, 4.9), (0, 0, 10, 5.1), (50, 50, 60, 60))
    assert net.sampler.assign_targets_to_proposals([proposals], [boxes], [torch.tensor([4])])[1][0].tolist() == [
        0,
        0,
        4,
        0,
    ]


def test_how_many_are_sampled():
    """256 anchors, half of them objects, and 64 regions, a quarter; the rest is filled up with background."""
    net = detector()
    for sampler, objects_, expected in (
        (net.rpn.fg_bg_sampler, 500, (128, 128)),
        (net.rpn.fg_bg_sampler, 20, (20, 236)),
        (net.sampler.fg_bg_sampler, 500, (16, 48)),
        (net.sampler.fg_bg_sampler, 5, (5, 59)),
    ):
        labels = torch.tensor([1] * objects_ + [0] * 500 + [-1] * 500)
        assert tuple(int(mask[0].sum()) for mask in sampler([labels])) == expected


def test_what_a_step_draws_is_the_seeds():
    """Whatever was drawn before, in whatever order the images come, and for VGG-16's dropout too."""
    net = detector(vgg(), regions=8).train()
    other = torch.rand(3, 90, 90)

    def losses(*seeds, image=PICTURE):
        return [float(detection.objective(net, image, *OBJECTS, seed)[0].detach()) for seed in seeds]

    before = losses(5, 6)
    torch.rand(7)
    losses(9, image=other)
    assert losses(6, 5) == before[::-1] and before[0] != before[1]


# Detections


def fixed_regions(net, regions, scores, monkeypatch):
    """The detector as if the RPN proposed these regions (N, 4) of the scaled image, and they had these probabilities
    (N, classes + 1) and kept their boxes."""
    regions, scores = torch.tensor(regions).view(-1, 4), torch.tensor(scores).view(-1, 6)
    monkeypatch.setattr(net.rpn, "forward", lambda *_: ([regions], {}))
    monkeypatch.setattr(net, "classify", lambda *_: (scores.log(), torch.zeros(len(regions), 6, 4)))
    return net.eval()


@pytest.mark.parametrize("test", detection.TESTS)
def test_detections_are_in_the_images_own_pixels(test, monkeypatch):
    """A region as large as the padded map comes back as the whole image."""
    for height, width in ((50, 77), (300, 200), (96, 96)):
        net = fixed_regions(detector(), [[0.0, 0, 500, 500]], [[0, 1.0, 0, 0, 0, 0]], monkeypatch)
        found = net.detect(torch.rand(3, height, width), test)
        torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 0, width, height]]))
        assert found["labels"].tolist() == [1] and found["scores"].tolist() == [1]


def test_detections_are_of_each_class_by_itself(monkeypatch):
    """Above 0.05, not the background; of a class's boxes that overlap by more than 0.3 the likeliest; at most 100."""
    regions = [[10.0, 10, 50, 50], [12, 10, 52, 50], [60, 60, 90, 90], [27, 10, 67, 50]]  # the last: IoU 0.45
    scores = [
        [0.1, 0.5, 0.4, 0, 0, 0],
        [0.09, 0.61, 0.3, 0, 0, 0],
        [0.87, 0.04, 0.03, 0, 0, 0.06],
        [0.8, 0.2, 0, 0, 0, 0],
    ]
    net = fixed_regions(detector(), regions, scores, monkeypatch)
    found = net.detect(torch.rand(3, 96, 96))
    assert found["labels"].tolist() == [1, 2, 5]
    torch.testing.assert_close(found["scores"], torch.tensor([0.61, 0.4, 0.06]))
    torch.testing.assert_close(found["boxes"], torch.tensor(regions)[[1, 0, 2]])
    many = [[float(x), y, x + 4, y + 4] for x in range(0, 90, 5) for y in range(0, 90, 5)]
    net = fixed_regions(detector(), many, [[0.5, 0.5, 0, 0, 0, 0]] * len(many), monkeypatch)
    assert len(many) > 100 == len(net.detect(torch.rand(3, 96, 96))["boxes"])
    found = fixed_regions(detector(), [], [], monkeypatch).detect(torch.rand(3, 96, 96))
    assert found["boxes"].shape == (0, 4) and len(found["scores"]) == len(found["labels"]) == 0


@pytest.mark.parametrize("make", (resnet, vgg))
@pytest.mark.parametrize("test", detection.TESTS)
def test_detecting_draws_nothing_and_remembers_nothing(make, test):
    """Twice the same: no dropout, no sampling, no scale of an image or test before; at most 300 proposals; and nothing
    found is no error."""
    net = detector(make(), context=True).eval()
    net.cls.weight.data.mul_(100)
    before = net.detect(PICTURE, test)
    net.detect(torch.rand(3, 300, 100), "multi-scale")
    after = net.detect(PICTURE, test)
    assert len(before["boxes"]) > 0 and all(torch.equal(before[key], after[key]) for key in before)
    assert (before["scores"].diff() <= 0).all() and before["labels"].min() >= 1
    width, height = (before["boxes"][:, 2:] - before["boxes"][:, :2]).T
    assert (width >= 0).all() and (height >= 0).all() and (before["boxes"] >= 0).all()
    assert (before["boxes"] <= torch.tensor([130.0, 100, 130, 100])).all()
    maps, proposals, *_ = net.propose(torch.rand(3, 200, 300))
    assert len(proposals) <= 300
    net.rpn.min_size = 1e4
    assert len(net.detect(PICTURE, test)["boxes"]) == 0


# The improvements of Table 9


def test_context_is_the_whole_image():
    """Each region's features and then the whole image's, of its own size and not of the padded map's; both learn."""
    net = detector(context=True).train()
    assert net.cls.in_features == net.box.in_features == 2 * resnet().fc.in_features
    maps, boxes = torch.rand(1, net.rpn.head.bbox_pred.in_channels, 6, 8), OBJECTS[0]
    both = torch.cat([net.features([(maps, 1)], b) for b in (boxes, torch.tensor([[0.0, 0, 110, 90]]))])
    x = torch.stack([torch.cat([both[i], both[2]]) for i in range(2)])
    scores, coded = net.classify([(maps, 1)], boxes, (90, 110))
    torch.testing.assert_close(scores, net.cls(x))
    torch.testing.assert_close(coded.flatten(1), net.box(x))
    net.losses(PICTURE, *OBJECTS)[0].backward()
    assert all(half.abs().sum() > 0 for half in net.cls.weight.grad.chunk(2, dim=1))
    assert detection.Detector(vgg(), 5, data.MEAN, data.STD, 96, context=True).cls.in_features == 2 * 128


@pytest.mark.parametrize("growing", (True, False))
def test_two_scales(growing):
    """Of five maps a region is pooled from the two between which it has 224 x 224 pixels, as an image of 600 would, and
    the larger feature counts: of maps that hold constants, the upper one's or the lower one's."""
    net = detector(short=300)
    net.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    scales, sides = [short / 600 for short in detection.SCALES], (20.0, 60, 80, 90, 110, 150, 300, 400)
    lower = [3, 3, 3, 2, 2, 1, 0, 0]  # 112 pixels of an image whose shorter side is 300: sides of 336, 168, 112, 84, 67
    maps = [(torch.full((1, 1, 40, 40), float(i if growing else -i)), scale) for i, scale in enumerate(scales)]
    boxes = torch.tensor([[8, 8, 8 + side, 8 + side] for side in sides])
    features = net.features(maps, boxes).flatten().tolist()
    assert features == [i + 1 if growing else -i for i in lower]


def test_the_maps_of_several_scales(monkeypatch):
    """Their shorter sides are the five of the paper, scaled as --short; a region lies at the same place in each; and
    the proposals come from the usual one."""
    net, seen = detector(short=300).eval(), []
    net.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    monkeypatch.setattr(
        net,
        "classify",
        lambda maps, boxes, size: (
            seen.append([scale for _, scale in maps]) or (torch.zeros(len(boxes), 6), torch.zeros(len(boxes), 6, 4))
        ),
    )
    net.detect(torch.rand(3, 150, 200), "multi-scale")
    assert seen[:5] == [(320, 416), (128, 160), (224, 288), (416, 544), (512, 672)]  # multiples of 32
    assert seen[5] == seen[6] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], rel=0.01)


def test_boxes_are_refined(monkeypatch):
    """Every region is judged again where its likeliest class's box is; of both judgements NMS keeps one box a class and
    object, and it becomes the mean of the boxes that overlap it by a half, weighted by their scores."""
    net = fixed_regions(detector(), [[10.0, 10, 50, 50], [60, 60, 90, 90]], [[1.0] * 6] * 2, monkeypatch)
    asked = []

    def classify(maps, boxes, size):
        asked.append(boxes)
        scores = torch.full((2, 6), -1e9)
        scores[0, [0, 2]] = torch.tensor([0.2, 0.8] if len(asked) == 1 else [0.4, 0.6]).log()
        scores[1, [0, 3]] = torch.tensor([0.1, 0.9]).log() if len(asked) == 1 else torch.tensor([1.0, 1e-9]).log()
        coded = torch.zeros(2, 6, 4)
        coded[0, 2, 0] = 1  # a tenth of its width to the right
        return scores, coded

    monkeypatch.setattr(net, "classify", classify)
    found = net.detect(torch.rand(3, 96, 96), "refine")
    torch.testing.assert_close(asked[1], torch.tensor([[14.0, 10, 54, 50], [60, 60, 90, 90]]))
    assert found["labels"].tolist() == [3, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.8]))
    x1 = (0.8 * 14 + 0.6 * 18) / 1.4
    torch.testing.assert_close(found["boxes"], torch.tensor([[60, 60, 90, 90], [x1, 10, x1 + 40, 50]]))


def test_who_votes():
    """A box itself, and what overlaps it by a half or more, of its class alone."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [0, 2, 10, 12], [0, 0, 8, 10]])
    scores, labels = torch.tensor([0.5, 0.25, 0.9, 0.25, 0.9]), torch.tensor([1, 1, 1, 1, 2])
    voted = detection.vote(boxes, scores, labels, torch.tensor([0, 4]))
    torch.testing.assert_close(voted, torch.tensor([[0, 0.5, 10, 9.25], [0, 0, 8, 10]]))
    boxes = torch.tensor([[601.3, 403.7, 783.2, 590.9]]).repeat(300, 1)
    with torch.autocast("cpu", torch.bfloat16):  # in which 601.3 is 600
        voted = detection.vote(boxes, torch.rand(300), torch.ones(300), torch.tensor([0]))
    torch.testing.assert_close(voted, boxes[:1])


@pytest.mark.parametrize("test", detection.TESTS)
def test_a_box_outside_the_image_is_not_found(test, monkeypatch):
    """Nothing is left of it, and pycocotools takes a box without numbers for one that overlaps all."""
    net = fixed_regions(detector(), [[10.0, 10, 50, 50], [150, 10, 190, 50]], [[0, 1.0, 0, 0, 0, 0]] * 2, monkeypatch)
    assert net.detect(torch.rand(3, 96, 96), test)["boxes"].tolist() == [[10, 10, 50, 50]]


# Average precision


def devkit(found, truth, label, eleven_points, least):
    """The rules of the VOC devkit, scalar by scalar: boxes hold both their ends (+ 1), all detections of a class in one
    order, each looks at the object that it overlaps most, an object is found once, difficult ones do not count."""
    truth = [[values.tolist() for values in objects] for objects in truth]
    positives = sum(c == label and not d for _, labels, hard in truth for c, d in zip(labels, hard, strict=True))
    rows = []
    for image, detections in enumerate(found):
        columns = (detections[key].tolist() for key in ("boxes", "scores", "labels"))
        rows += [(score, image, box) for box, score, c in zip(*columns, strict=True) if c == label]
    seen, right, wrong, points = set(), 0, 0, []
    for _, image, (x1, y1, x2, y2) in sorted(rows, key=lambda row: -row[0]):
        most, which = -1.0, None
        for i, ((a1, b1, a2, b2), c) in enumerate(zip(*truth[image][:2], strict=True)):
            w, h = min(x2 - 1, a2 - 1) - max(x1, a1) + 1, min(y2 - 1, b2 - 1) - max(y1, b1) + 1
            if c == label and w > 0 and h > 0:
                union = (x2 - 1 - x1 + 1) * (y2 - 1 - y1 + 1) + (a2 - 1 - a1 + 1) * (b2 - 1 - b1 + 1) - w * h
                if w * h / union > most:
                    most, which = w * h / union, i
        if which is not None and most > least:
            if truth[image][2][which]:
                continue
            right, wrong = (right, wrong + 1) if (image, which) in seen else (right + 1, wrong)
            seen.add((image, which))
        else:
            wrong += 1
        points.append((right / positives, right / (right + wrong)))
    if eleven_points:
        return sum(max([p for r, p in points if r >= 0.1 * t], default=0) for t in range(11)) / 11
    area, before = 0, 0
    for i, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[i:])
        before = recall
    return area


@pytest.mark.parametrize("least", (0.5, 0.75))
@pytest.mark.parametrize("hard", (0, 0.25))
def test_average_precision_is_the_devkits(least, hard):
    """On random sets, of small whole boxes (down to one pixel) and of others, with ties of scores."""
    rng = np.random.default_rng(3)
    worst, values = 0, []
    for trial in range(4):
        found, truth = [], []
        for _ in range(25):
            n = rng.integers(0, 6)
            corner, size = rng.integers(0, 60, (n, 2)), rng.integers(1, 9 if trial % 2 else 80, (n, 2))
            boxes, labels = np.hstack([corner, corner + size]).astype(float), rng.integers(1, 4, n)
            truth.append([torch.from_numpy(t) for t in (boxes, labels, rng.random(n) < hard)])
            again = rng.integers(0, n, rng.integers(0, 8)) if n else np.zeros(0, int)
            near = boxes[again] + (
                rng.integers(-1, 2, (len(again), 4)) if trial % 2 else rng.normal(0, 4, (len(again), 4))
            )
            near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
            scores = rng.random(len(again)).round(2)
            made = {"boxes": near, "scores": scores, "labels": labels[again]}
            found.append({key: torch.from_numpy(value) for key, value in made.items()})
        for label in (1, 2, 3):
            for rule, ours in average_precision(found, truth, label, least).items():
                worst = max(worst, abs(ours / 100 - devkit(found, truth, label, rule == "11point", least)))
                values.append(ours)
    assert worst <= 1e-12 and min(values) > 0 and len(set(values)) > len(values) / 2


def average_precision(found, truth, label, least=0.5):
    return detection.average_precision(*detection.matches(found, truth, label), least)


def one_image(boxes, difficult, *found):
    """What `average_precision` reads, of one image and class: found are (box, score)."""
    boxes = torch.tensor(boxes, dtype=torch.float32)
    truth = [(boxes, torch.ones(len(boxes), dtype=torch.int64), torch.tensor(difficult))]
    detections = {"boxes": torch.tensor([b for b, _ in found], dtype=torch.float32).view(-1, 4)}
    detections |= {"scores": torch.tensor([s for _, s in found]), "labels": torch.ones(len(found), dtype=torch.int64)}
    return [detections], truth


A, B, ELSEWHERE = [0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]


@pytest.mark.parametrize("rule", ("11point", "area"))
def test_what_counts_as_right(rule):
    def ap(*words):
        return average_precision(*one_image(*words), 1)[rule] / 100

    assert ap([A, B], [False, False], (A, 0.9), (B, 0.8)) == 1
    half = 6 / 11 if rule == "11point" else 1 / 2
    assert ap([A, B], [False, False], (A, 0.9)) == pytest.approx(half)
    # a difficult object: found, missed and found twice change nothing
    for found in ([(B, 0.95)], [], [(B, 0.95), (B, 0.94)]):
        assert ap([A, B], [False, True], (A, 0.9), *found) == 1
    # the second detection of an object is wrong, and so is one elsewhere, or that overlaps by a half and no more
    for wrong in (A, ELSEWHERE, [0, 0, 10, 5]):
        second = 5 / 11 * 2 / 3 if rule == "11point" else 1 / 2 * 2 / 3
        assert ap([A, B], [False, False], (A, 0.9), (wrong, 0.8), (B, 0.7)) == pytest.approx(half + second)
    assert ap([A], [False]) == 0
    assert average_precision(*one_image([A], [True], (A, 0.9)), 1) is None  # no object that counts


def test_the_two_conventions_differ():
    """11-point and area are two numbers of the same detections, and other classes' detections change neither."""
    found, truth = one_image([A, B], [False, False], (A, 0.9), (ELSEWHERE, 0.8), (B, 0.7))
    ap = average_precision(found, truth, 1)
    assert ap == pytest.approx({"11point": 100 * (6 + 5 * 2 / 3) / 11, "area": 100 * (1 / 2 + 1 / 3)})
    found[0]["labels"][1] = 2
    assert average_precision(found, truth, 1)["area"] == 100
    assert average_precision(found, truth, 2) is None  # a class without objects


def by_hand(path, detections):
    """COCO's (mAP@[.5,.95], mAP@.5) of a json file's objects and a file of detections."""
    judge = COCOeval(coco.COCO(path), coco.COCO(path).loadRes(str(detections)), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return (100 * judge.stats[:2]).tolist()


def test_cocos_map_is_pycocotools(tmp_path):
    """On objects of any size, crowds and images without objects among them, some of which are found; boxes come back as
    COCO has them, of COCO's own ids."""
    rng, sizes = np.random.default_rng(0), {int(n): (200, 150) for n in (9, 500, 3, 44, 71, 2)}
    annotations = []
    for number in (9, 500, 44, 71):  # nothing in 3 and 2
        for _ in range(6):
            x, y, w, h = rng.uniform((0, 0, 8, 8), (120, 90, 80, 60)).tolist()
            more = {"iscrowd": int(rng.random() < 0.3), "area": 0.7 * w * h}
            annotations.append((number, int(rng.choice([1, 13])), [x, y, w, h], more))
    annotations.append((9, 90, [10, 10, 60, 60], CROWD))
    path = write_coco(tmp_path, "val", sizes, annotations)
    images, found = data.COCOImages(tmp_path, "val", False, 0), []
    for number in images.ids:
        own = [(box, category) for image, category, box, _ in annotations if image == number and rng.random() < 0.9]
        own += [(rng.uniform((0, 0, 8, 8), (120, 90, 80, 60)), int(rng.choice([1, 13, 90]))) for _ in range(3)]
        boxes = np.array([box for box, _ in own]) + rng.normal(0, 1.5, (len(own), 4))
        boxes = torch.tensor(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), dtype=torch.float32)
        labels = torch.tensor([1 + images.categories.index(category) for _, category in own])
        found.append({"boxes": boxes, "labels": labels, "scores": torch.tensor(rng.random(len(own)))})
    detections = detection.coco_detections(found, images)
    assert {one["category_id"] for one in detections} == {1, 13, 90} and detections[0]["image_id"] == 9
    (tmp_path / "found.json").write_text(json.dumps(detections))
    aps, maps = detection.coco_map(found, images)
    strict, loose = by_hand(path, tmp_path / "found.json")
    assert maps == {"map_50": pytest.approx(loose, abs=1e-12), "map_50_95": pytest.approx(strict, abs=1e-12)}
    assert 20 < strict < loose < 99 and [*aps] == ["person", "stop sign"]  # no toothbrush but a crowd
    content = json.loads(path.read_text())
    for a in content["annotations"]:
        a["id"] -= 1  # some sets count from 0, which pycocotools takes for none
    path.write_text(json.dumps(content))
    assert detection.coco_map(found, data.COCOImages(tmp_path, "val", False, 0))[1] == maps
    nothing = [{name: t[:0] for name, t in one.items()} for one in found]
    assert detection.coco_map(nothing, images)[1] == {"map_50": 0, "map_50_95": 0}


def test_table_9_in_small_is_what_the_run_folders_hold():
    page = (HERE / "docs" / "detection.md").read_text()
    for kind, label in (("plain", "{}"), ("context", "context, {}")):
        for test in detection.TESTS:
            paths = [HERE / f"results/detection/synthetic-{kind}/seed{seed}/{test}.json" for seed in (1, 2, 3)]
            found = [json.loads(path.read_text()) for path in paths]
            cells = [
                label.format(f"`{test}`") if test != "baseline" else ("baseline" if kind == "plain" else "context")
            ]
            for measure, digits in (("map_area", 2), ("map_area_50_95", 1)):
                values = [one[measure] for one in found]
                cells += [", ".join(f"{value:.{digits}f}" for value in values), f"{np.mean(values):.1f}"]
            assert f"| {' | '.join(cells)} |" in page


# Pictures


def test_drawing():
    pixels = torch.zeros(3, 120, 160, dtype=torch.uint8)
    found, _ = one_image([A], [False], ([10, 20, 90, 100], 0.91), ([120, 5, 150, 90], 0.49))
    drawn = detection.draw(pixels, found[0], ["dog", "cat"])
    assert not pixels.any() and drawn.shape == pixels.shape and drawn.dtype == torch.uint8
    drawn = drawn.any(dim=0)
    assert drawn[20:101, 10].all() and drawn[100, 10:91].all() and drawn[20:101, 90].all()
    assert not drawn[:, 100:].any()  # not likely enough
    assert drawn[21:40, 12:80].any()  # its name
    found[0]["scores"] *= 0.1
    assert torch.equal(detection.draw(pixels, found[0], ["dog", "cat"]), pixels)


def test_objects_in_pictures(start, quick, tmp_path):
    """predict.py on a run: printed, as JSON, and drawn; a picture that cannot be read costs the others nothing."""
    assert start(*TINY, "--images", 2, "--iterations", 1, "--out", "run")[0] == 0
    state = checkpoint.load("run")
    for name in ("cls.weight", "box.weight", "box.bias"):
        state["model"][name].zero_()
    state["model"]["cls.bias"].copy_(torch.tensor([0.0, 0, 0, 9, 0, 0]))  # everything is a ring
    torch.save(state, "run/checkpoint.pt")
    data.Shapes(1, 0).open(0).save("a.png")
    pathlib.Path("b.jpg").write_text("none")
    status, printed = start("run", "a.png", "b.jpg", "--device", "cpu", script=predict)
    assert status == 2 and "a.png: drawn in found-0-a.png" in printed and "b.jpg cannot be read" in printed
    assert re.search(r"99\.\d\d %  ring  \d+ \d+ \d+ \d+\n", printed) and "disc" not in printed
    assert Image.open("found-0-a.png").size == (128, 128) and not pathlib.Path("found-1-b.png").exists()
    status, printed = start("run", "a.png", "--json", "--device", "cpu", script=predict)
    name, score, box = json.loads(printed)["objects"][0]
    assert (status, name, len(box)) == (0, "ring", 4) and score > 0.99
    assert "are for nets that classify" in start("run", "a.png", "--test", "10-crop", script=predict)[1]


# Training


def test_learning_rate(flags):
    """The paper's: 60,000 iterations at 0.001 and 20,000 at 0.0001, of 2 images."""
    args = flags()
    assert (args.iterations, args.batch_size, args.depth, args.unit) == (80_000, 2, 101, "bottleneck")
    assert (args.short, args.roi, args.regions, args.width) == (600, 14, 64, 64)
    points = (0, 59_999, 60_000, 79_999)
    assert [detection_train.lr_at(t, args) for t in points] == [0.001, 0.001, 0.0001, 0.0001]
    assert flags("--dataset", "synthetic", "--lr", 0.5).lr == 0.5
    args = flags("--dataset", "coco")  # 240,000 and 80,000, of 8 images; and smaller anchors
    assert (args.iterations, args.batch_size, args.data, args.train) == (320_000, 8, "data/coco", "2014")
    assert [detection_train.lr_at(t, args) for t in (239_999, 240_000)] == [0.001, 0.0001]
    args.width, about = 8, {"classes": ["x"] * 80} | weights.grey_levels(data.MEAN, data.STD)
    net = detection.detector(args, about)
    assert net.rpn.anchor_generator.sizes == ((64, 128, 256, 512),) and net.cls.out_features == 81


TINY = (
    "--dataset synthetic --images 6 --batch-size 2 --iterations 6 --lr 0.002 --workers 0 --device cpu --draw 1".split()
)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(detection_train, "PRETRAINING", 2)


def test_a_run_and_its_folder(start, quick, monkeypatch, tmp_path):
    objective, seeds = detection.objective, []
    monkeypatch.setattr(detection, "objective", lambda *words: seeds.append(words[-1]) or objective(*words))
    status, printed = start(*TINY, "--out", "run")
    assert status == 0 and "Faster R-CNN on ResNet-18 (basic, " in printed and "warning: BN" not in printed
    assert "no --weights: the net has learnt" in printed
    assert len({*seeds}) == 12  # 6 images in 2 epochs: each sampled anew
    result = json.loads(pathlib.Path("run/result.json").read_text())
    with open("run/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5, 6] and float(rows[3]["lr"]) == 0.002
    assert float(rows[5]["lr"]) == pytest.approx(0.0002) and not rows[0]["map_area"]
    tested = json.loads(pathlib.Path("run/baseline.json").read_text())
    for rule in ("map_11point", "map_area"):
        mean = np.mean([ap[rule] for ap in tested["aps"].values()])
        assert result[rule] == tested[rule] == pytest.approx(mean) == pytest.approx(float(rows[-1][rule]))
    assert {"dataset": "synthetic", "unit": "basic", "diverged": False, "short": 128}.items() <= result.items()
    assert set(tested["aps"]) <= set(data.Shapes.classes) and tested["iterations"] == [6]
    groups = checkpoint.load("run")["optimizer"]["param_groups"]
    assert [(g["momentum"], g["weight_decay"]) for g in groups] == [(0.9, 5e-4), (0.9, 0)]  # the paper's
    assert [path.name for path in sorted(tmp_path.glob("run/*.png"))] == ["baseline-0.png"]
    assert Image.open("run/baseline-0.png").size == (128, 128)
    assert "already finished" in start(*TINY, "--out", "run")[1]
    status, printed = start("--evaluate", "run", "--draw", 2, "--workers", 0, "--device", "cpu")
    shown = f"run: baseline, mAP (11-point) {result['map_11point']:.2f} %, mAP (area) {result['map_area']:.2f} %"
    assert status == 0 and f"{shown} after 6 of 6" in printed and len([*tmp_path.glob("run/*.png")]) == 2


def test_tests_besides_the_baseline(start, quick, monkeypatch, tmp_path):
    """At the end of a run, or of a run that has finished; each once."""
    tests, detect = [], detection.Detector.detect
    monkeypatch.setattr(detection.Detector, "detect", lambda *words: tests.append(words[-1]) or detect(*words))
    words = [*TINY, "--images", 5, "--iterations", 1, "--out", "run"]
    assert start(*words, "--test", "refine")[0] == 0 and tests == ["baseline", "refine"]
    status, printed = start(*words, "--test", "baseline,refine,multi-scale")
    assert status == 0 and tests[2:] == ["multi-scale"] and "run: multi-scale, mAP (11-point)" in printed
    assert [path.name for path in sorted(tmp_path.glob("run/*-0.png"))] == [
        f"{name}-0.png" for name in ("baseline", "multi-scale", "refine")
    ]
    written = {name: pathlib.Path(f"run/{name}.json").read_bytes() for name in detection.TESTS}
    assert start("--evaluate", "run", "--test", "refine,multi-scale", "--workers", 0, "--device", "cpu")[0] == 0
    assert written == {name: pathlib.Path(f"run/{name}.json").read_bytes() for name in detection.TESTS}
    pathlib.Path("run/refine.json").unlink()
    for path in pathlib.Path("run").glob("checkpoint*"):
        path.unlink()
    status, printed = start(*words, "--test", "refine")
    assert status == 2 and "run is finished and holds no checkpoint of its end to test" in printed


def test_a_run_on_coco(start, quick, monkeypatch, tmp_path):
    """Ids with gaps and a crowd go through training and tests, with context; the mAP is that of pycocotools called by
    hand, and a picture of another size than its boxes' is refused."""
    objects_ = [*COCO_OBJECTS[:1], (4, 1, [20, 20, 50, 50], {}), *COCO_OBJECTS[2:]]
    write_coco(tmp_path / "own", "train", {n: (120, 90) for n in (7, 30, 4)}, objects_)
    objects_ = [(*one[:3], {"iscrowd": 0, "area": 300} | one[3]) for one in objects_]  # pycocotools needs both
    path = write_coco(tmp_path / "own", "val", {n: (120, 90) for n in (7, 30, 4)}, objects_)
    make = detection.detector

    def confident(*words):  # about everything, so that something is right
        net = make(*words)
        net.cls.bias.data.copy_(torch.tensor([0.0, 1, 1, 1]))
        return net

    monkeypatch.setattr(detection, "detector", confident)
    words = "--dataset coco --data own --depth 18 --width 8 --short 64 --context --test refine --iterations 2".split()
    words += "--lr 1e-6 --batch-size 2 --workers 0 --device cpu --draw 1 --out run".split()
    status, printed = start(*words)
    assert status == 0 and "ResNet-18, with context (" in printed and "2 training images of 3 classes" in printed
    result, log = (pathlib.Path("run", name).read_text() for name in ("result.json", "log.csv"))
    for name in ("baseline", "refine"):
        tested = json.loads(pathlib.Path(f"run/{name}.json").read_text())
        strict, loose = by_hand(path, f"run/detections-{name}.json")
        assert (tested["map_50_95"], tested["map_50"]) == pytest.approx((strict, loose), abs=1e-12) and loose > 0
        assert {one["category_id"] for one in json.loads(pathlib.Path(f"run/detections-{name}.json").read_text())} <= {
            1,
            13,
            90,
        }
    assert json.loads(result)["context"] and "map_50,map_50_95" in log
    Image.new("RGB", (60, 90)).save("own/val/30.jpg")
    status, printed = start("--evaluate", "run", "--workers", 0, "--device", "cpu")
    assert status == 2 and "own/val/30.jpg cannot be read: it has 60 x 90 pixels" in printed


def test_a_stopped_run_continues_to_the_same_bits(start, quick, monkeypatch):
    """And in the trained states of both what is fixed has not moved, whatever decays."""
    words = [*TINY, "--checkpoint-seconds", 0]
    assert start(*words, "--out", "whole")[0] == 0
    check, calls = checkpoint.Stop.check, []

    def stop_at_the_fourth(self, due=None):
        calls.append(due)
        if len(calls) == 4:
            raise checkpoint.Stopped(signal.SIGTERM)
        return check(self, due)

    monkeypatch.setattr(checkpoint.Stop, "check", stop_at_the_fourth)
    assert start(*words, "--out", "parts")[0] == 143
    half = checkpoint.load("parts")
    assert half["iteration"] == 3
    monkeypatch.setattr(detection_train, "pretrain", None)  # which is not done again
    assert start(*words, "--out", "parts")[0] == 0
    whole, parts = (checkpoint.load(out)["model"] for out in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    fixed = {name for name in whole if name.startswith(("trunk.0.", "trunk.1.")) or "running" in name}
    assert len(fixed) > 40
    assert fixed <= {name for name, value in whole.items() if torch.equal(value, half["model"][name])}


def in_float64(out, monkeypatch):
    """A run of TINY in float64 as one of dist.get_world_size() processes."""
    monkeypatch.setattr(
        sys, "argv", ["detection_train.py", *TINY, "--iterations", "3", "--images", "7", "--out", str(out)]
    )
    objective, make, image = detection.objective, detection.detector, detection_train.as_image
    monkeypatch.setattr(detection_train, "PRETRAINING", 2)
    monkeypatch.setattr(detection_train, "as_image", lambda *words: image(*words).double())
    monkeypatch.setattr(detection, "detector", lambda *words: make(*words).double())
    monkeypatch.setattr(detection, "objective", lambda net, x, boxes, *more: objective(net, x, boxes.double(), *more))
    assert detection_train.train(detection_train.parse_flags(), torch.device("cpu")) == 0


def test_one_process_and_two_agree(tmp_path, world_of_one, monkeypatch):
    """On the weights, and on what is found in an odd number of test images."""
    in_float64(tmp_path / "one", monkeypatch)
    assert start_workers(2, __file__, tmp_path / "two") == [0, 0]
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=0, atol=1e-9)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["train_loss"] == b["train_loss"] and a["map_area"] == b["map_area"]


def test_training_goes_on_after_an_evaluation(world_of_one):
    """On every image once, in order, with each class that occurs; and the net is as it was."""
    net, images = detector().train(), data.Shapes(5, 0)
    words = images, "baseline", training.Precision("float32", torch.device("cpu")), 0, torch.device("cpu")
    found, aps, maps = detection_train.evaluate(net, *words)
    assert net.training and [*aps] == [
        c for i, c in enumerate(images.classes, 1) if any(i in o[1] for o in images.objects)
    ]
    rules = ("map_11point", "map_area", "map_area_50_95")
    assert maps == {rule: pytest.approx(np.mean([ap[rule] for ap in aps.values()])) for rule in rules}
    truth = [
        {"boxes": boxes.clone(), "scores": 1 + torch.zeros(len(boxes)), "labels": labels}
        for boxes, labels, _ in images.objects
    ]
    for (_, y1, _, y2), one in ((one["boxes"].T, one) for one in truth):
        one["boxes"][:, 3] = y1 + 0.77 * (y2 - y1)
    strict = detection.voc_map(truth, images)[1]  # IoU 0.77: right up to 0.75, the sixth of ten
    assert strict["map_area"] == 100 and strict["map_area_50_95"] == pytest.approx(60)
    net.eval()
    for i, one in enumerate(found):
        again = net.detect(detection_train.as_image(torch.from_numpy(images.pixels[i]), torch.device("cpu")))
        assert torch.equal(one["boxes"], again["boxes"])


def test_diverged_run_is_a_result(start, quick):
    status, printed = start(*TINY, "--lr", 1e30, "--out", "run")
    result = json.loads(pathlib.Path("run/result.json").read_text())
    assert status == 0 and "finished: diverged" in printed
    assert result["diverged"] and result["map_area"] is None and not [*pathlib.Path("run").glob("*.png")]


def test_weights_of_a_run_or_a_file(start, monkeypatch, tmp_path):
    """The detector begins with the weights that were given, whole and unchanged where they are fixed, and sees images
    as these did."""
    net = resnet(18, "basic-preact", width=64)
    about = {"classes": [f"class {c}" for c in range(10)], "size": 64, "depth": 18, "unit": "basic-preact"}
    about |= {"unit_args": {"option": "B"}} | weights.grey_levels((0.1, 0.2, 0.3), (1 / 255, 1 / 255, 1 / 255))
    weights.save(net, about, "net.pth")
    words = [*TINY, "--short", 64, "--images", 2, "--iterations", 1, "--out", "run"]
    status, printed = start(*words, "--weights", "net.pth")
    assert status == 0 and "on ResNet-18 (basic-preact" in printed and "no --weights" not in printed
    state, start_ = checkpoint.load("run"), net.state_dict()
    torch.testing.assert_close(state["about"]["std"].flatten(), torch.ones(3))
    fixed = [name for name in start_ if name.startswith(("stem.", "stages.0.")) or "running" in name]
    for name in fixed:
        ours = name.replace("stem.", "trunk.0.").replace("stages.3.", "head.0.").replace("last.", "head.1.")
        ours = f"trunk.{int(ours[7]) + 1}{ours[8:]}" if ours.startswith("stages.") else ours
        assert torch.equal(state["model"][ours], start_[name]), name
    transform = detection.of_run(*checkpoint.read_run("run")).transform
    assert transform.image_mean == pytest.approx((0.1, 0.2, 0.3)) and transform.image_std == pytest.approx(
        [1 / 255] * 3
    )
    assert start("--evaluate", "run", "--workers", 0, "--device", "cpu")[0] == 0  # without the file


def test_weights_of_vgg(start, monkeypatch):
    monkeypatch.setattr(detection, "vgg16", lambda **_: vgg())
    net = vgg()
    torch.save(net.state_dict(), "vgg.pth")
    words = [*TINY, "--vgg", "--images", 2, "--iterations", 1, "--out", "run"]
    assert start(*words, "--weights", "vgg.pth")[0] == 0
    assert torch.equal(checkpoint.load("run")["model"]["trunk.7.weight"], net.features[7].weight)
    torch.save(resnet().state_dict(), "other.pth")
    status, printed = start(*words, "--weights", "other.pth", "--out", "another")
    assert status == 2 and "other.pth is no file of torchvision's vgg16" in printed
    net = models.cifar_resnet(8, units.Basic)
    about = {"classes": [f"class {c}" for c in range(10)], "size": 32, "depth": 8, "unit": "basic"}
    weights.save(net, about | {"unit_args": {"option": "A"}} | weights.grey_levels(data.MEAN, data.STD), "cifar.pth")
    assert "cifar.pth is a net of CIFAR's kind" in start(*TINY, "--weights", "cifar.pth")[1]


def test_a_folder_of_ones_own(start, quick, tmp_path):
    objects_ = [("cat", 11, 11, 50, 60), ("dog", 60, 20, 100, 80), ("dog", 5, 5, 20, 20, DIFFICULT)]
    write_voc(tmp_path / "own", {n: ((120, 90), objects_) for n in "abc"}, {"train": "ab", "val": "c"})
    words = (
        "--data own --depth 18 --width 8 --short 64 --iterations 1 --workers 0 --device cpu --draw 1 --out run".split()
    )
    status, printed = start(*words)
    assert status == 0 and "2 training images of 2 classes" in printed
    assert [*json.loads(pathlib.Path("run/baseline.json").read_text())["aps"]] == ["cat", "dog"]
    assert Image.open("run/baseline-0.png").size == (120, 90)
    write_voc(tmp_path / "own", {"c": ((120, 90), [("cow", 11, 11, 50, 60)])}, {"train": "c"})
    status, printed = start("--evaluate", "run", "--workers", 0, "--device", "cpu")
    assert status == 2 and "run is of cat, dog and the images of cow" in printed
    assert start(*words)[0] == 2  # another set is another run


BAD = [
    ("--iterations 0", "--iterations must be at least 1"),
    ("--lr 0", "--lr must be a positive float32"),
    ("--short 10", "--short must be at least 32"),
    ("--draw -1", "--draw must be at least 0"),
    ("--workers -1", "--workers must be at least 0"),
    ("--depth 19", "depth 19 is impossible"),
    ("--vgg", "--vgg goes with --weights"),
    ("--width 0", "--width must be at least 1"),
    ("--width 16 --weights x", "--width cannot be combined with --weights"),
    ("--vgg --weights x --depth 50", "--vgg goes with --weights"),
    ("--vgg --weights nowhere.pth", "there is no nowhere.pth: docs/detection.md says"),
    ("--compile", "--compile: images have many sizes"),
    ("--weights nowhere.pth --dataset synthetic --images 1", "nowhere.pth: weights come from"),
    ("--data nowhere --train 07", "VOC2007/ImageSets/Main/trainval.txt"),
    ("--evaluate nowhere", "there is no run in nowhere"),
    ("--evaluate nowhere --short 64", "--evaluate cannot be combined with --short"),
    ("--batch-size 2 --regions 3", "unrecognized arguments"),
    ("--test refine,5-scale", "--test 5-scale is none of baseline, refine, multi-scale"),
    ("--train 2017", "--train 2017 is no part of voc"),
    ("--dataset coco --train 07", "--train 07 is no part of coco"),
    ("--dataset coco --data nowhere", "nowhere/annotations/instances_train2014.json"),
]


@pytest.mark.parametrize("words, message", BAD)
def test_bad_input(start, words, message, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", offline)
    status, printed = start(*words.split(), "--device", "cpu")
    assert status == 2 and message in printed and "Traceback" not in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU, and torch sees 0")
@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_a_run_on_a_gpu(start, quick, precision):
    """And from its state the same is found on a CPU."""
    assert start(*TINY, "--device", "cuda", "--precision", precision, "--out", "run")[0] == 0
    rows = checkpoint.load("run")["rows"]
    assert len(rows) == 6 and all(math.isfinite(row["train_loss"]) for row in rows)
    net, image = detection.of_run(*checkpoint.read_run("run")), torch.rand(3, 128, 128)
    here, there = net.detect(image), net.cuda().detect(image.cuda())
    assert len(here["scores"]) == len(there["scores"]) > 0
    torch.testing.assert_close(there["scores"].cpu(), here["scores"], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_first_result(start):
    """The command of docs/detection.md, in 6 minutes on 2 cores."""
    assert start("--dataset", "synthetic", "--device", "cpu", "--out", "run")[0] == 0
    assert json.loads(pathlib.Path("run/result.json").read_text())["map_area"] >= 60


if __name__ == "__main__":
    checkpoint.start_processes("cpu")
    torch.set_num_threads(1)
    in_float64(sys.argv[1], pytest.MonkeyPatch())
    dist.destroy_process_group()
