"""Faster R-CNN on any net of models.py or on VGG-16, [1] Appendices A and B, out of torchvision's parts, after

[3] Ren, He, Girshick, Sun: Faster R-CNN. arXiv 1506.01497v3

Images are (3, H, W), RGB in 0 ... 1, of any size and one at a time. Boxes (N, 4) are (x1, y1, x2, y2) in pixels, half
open; labels (N,) are 1, 2, ..., and 0 is no object.
"""

import contextlib
import io

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models import vgg16
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FrozenBatchNorm2d, batched_nms, box_area, box_iou, clip_boxes_to_image, roi_pool
from torchvision.utils import draw_bounding_boxes

from data import COCOImages
from models import ResNet, imagenet_resnet
from units import UNITS

STRIDE = 16  # of the shared map: conv4_x's, or VGG-16's conv5_3's

# Pixels, where the shorter side of an image has 600 ([1] Appendix B); with another one all of them change along
SHORT, LONG = 600, 1000  # a longer side has 1000 at most, which may make the shorter one shorter
ANCHORS, RATIOS = (128, 256, 512), (0.5, 1.0, 2.0)  # [3] Section 3.3: sides of square ones; heights over widths
COCO_ANCHORS = (64, *ANCHORS)  # [3] Section 4.2
SMALLEST = 16  # side of a proposal
SCALES = (200, 400, 600, 800, 1000)  # shorter sides in multi-scale testing, [1] Appendix B

# How a trained detector is tested, Table 9 of [1]: (refine the boxes?, shorter sides of the maps; () is the usual one)
TESTS = {"baseline": (False, ()), "refine": (True, ()), "multi-scale": (True, SCALES)}


class RPN(RegionProposalNetwork):
    """[3] Section 3.3: in training, anchors that cross the image's border are left out: they have the label -1. Where
    all of them do, as in an image too narrow, none is left out."""

    def assign_targets_to_anchors(self, anchors, targets):
        (anchors,), height, width = anchors, *targets[0]["size"]
        inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
        inside |= ~inside.any()
        (own_labels,), (own_boxes,) = super().assign_targets_to_anchors([anchors[inside]], targets)
        labels, boxes = own_labels.new_full((len(anchors),), -1), anchors.clone()
        labels[inside], boxes[inside] = own_labels, own_boxes.to(boxes)
        return [labels], [boxes]


class Head(RPNHead):
    """The RPN's layers. Under autocast they compute in lower precision; what makes boxes of their outputs does not."""

    def forward(self, maps):
        return tuple([t.to(maps[0].dtype) for t in found] for found in super().forward(maps))


class Detector(nn.Module):
    """A net cut before conv5_1. The part before it makes one map, which the RPN and all regions share. For each region
    that the RPN proposes, conv5_x takes the place of VGG-16's fc6 and fc7; two sibling layers then give class and box.

    net: a models.ResNet, or torchvision's vgg16, that has learnt to classify images of the given mean and std (3
    numbers each). Its BN becomes a fixed scale and offset, and its first layers no longer train: conv1 and conv2_x, or
    conv1_1 to conv2_2. In a pre-activation net the RPN and the regions read the raw sum of conv4_x.
    regions: how many of an image are trained on. roi: the size that they are pooled to, by default 14 before conv5_1,
    whose stride is 2, and 7 before fc6, which wants no other. context: the siblings read the whole image's features
    beside each region's, [1] Appendix B.
    """

    def __init__(self, net, classes, mean, std, short=SHORT, roi=None, regions=64, context=False, anchors=ANCHORS):
        super().__init__()
        if isinstance(net, ResNet):
            self.roi, fixed = roi or 14, 2
            self.trunk = nn.Sequential(net.stem, *net.stages[:3])
            self.head = nn.Sequential(net.stages[3], net.last, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            channels, features = net.stages[3][0].conv1.in_channels, net.fc.in_features
        else:
            self.roi, fixed = roi or 7, 10
            self.trunk = net.features[:-1]  # without the last pooling
            self.head = nn.Sequential(nn.Flatten(), *net.classifier[:-1])
            channels, features = net.features[-3].out_channels, net.classifier[-1].in_features
        fix_bn(self.trunk)
        fix_bn(self.head)
        self.trunk[:fixed].requires_grad_(False)

        self.context, self.scale = context, short / SHORT
        self.transform = GeneralizedRCNNTransform(short, round(LONG * self.scale), mean, std)
        head = Head(channels, len(anchors) * len(RATIOS))
        anchors = AnchorGenerator((tuple(side * self.scale for side in anchors),), (RATIOS,))
        before, after = {"training": 12_000, "testing": 6_000}, {"training": 2_000, "testing": 300}  # NMS at IoU 0.7
        # objects from IoU 0.7, background below 0.3; 256 anchors of which half are objects; smooth L1 with beta 1/9
        self.rpn = RPN(anchors, head, 0.7, 0.3, 256, 0.5, before, after, 0.7)
        self.rpn.min_size = SMALLEST * self.scale
        # chooses the regions to train on: objects from IoU 0.5, a quarter of them; and codes their boxes
        self.sampler = RoIHeads(None, None, None, 0.5, 0.5, regions, 0.25, (10, 10, 5, 5), None, None, None)
        features *= 1 + context
        self.cls, self.box = nn.Linear(features, classes + 1), nn.Linear(features, 4 * (classes + 1))
        for layer in (*head.modules(), self.cls, self.box):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=0.001 if layer is self.box else 0.01)
                nn.init.zeros_(layer.bias)

    def propose(self, image, targets=None):
        """The shared map (1, C, h, w), the proposals' boxes in the scaled image, its size (H, W) and objects, and the
        RPN's losses."""
        images, targets = self.transform([image], targets)
        (size,) = images.image_sizes
        if targets:
            targets[0]["size"] = size
        maps = self.trunk(images.tensors).to(image.dtype)
        (proposals,), losses = self.rpn(images, {"0": maps}, targets)
        return maps, proposals, size, targets, losses

    def features(self, maps, boxes):
        """What conv5_x and up make of the regions `boxes` (R, 4) of an image: (R, features). Of several maps,
        [(map, its scale), ...], smallest first, each region is pooled from the two in which its area lies on either
        side of 224 x 224 pixels, and the elementwise maximum of the two features counts: [1] Appendix B, maxout."""
        if len(maps) == 1:
            return self.head(roi_pool(maps[0][0], [boxes], self.roi, 1 / STRIDE))
        sides = box_area(boxes).sqrt()[:, None] * torch.tensor([scale for _, scale in maps], device=boxes.device)
        lower, both = (sides <= 224 * self.scale).sum(dim=1).sub(1).clamp(0, len(maps) - 2), []
        for level in (lower, lower + 1):
            pooled = maps[0][0].new_empty(len(boxes), maps[0][0].shape[1], self.roi, self.roi)
            for i, (level_map, scale) in enumerate(maps):
                pooled[level == i] = roi_pool(level_map, [boxes[level == i]], self.roi, scale / STRIDE)
            both.append(self.head(pooled))
        return torch.maximum(*both)

    def classify(self, maps, boxes, size):
        """Class scores (R, classes + 1) before the softmax, and for each class a box, coded (R, classes + 1, 4), of the
        regions `boxes` of an image of that size. maps: as in `features`."""
        x = self.features(maps, boxes)
        if self.context:
            whole = boxes.new_tensor([[0, 0, size[1], size[0]]])
            x = torch.cat([x, self.features(maps, whole).expand(len(boxes), -1)], dim=1)
        return self.cls(x).to(boxes.dtype), self.box(x).to(boxes.dtype).unflatten(1, (-1, 4))

    def losses(self, image, boxes, labels):
        """[3] eq. (1), of the RPN and of the regions: the sum of the four losses, and the share of the regions trained
        on that are classified wrongly."""
        maps, proposals, size, targets, rpn = self.propose(image, [{"boxes": boxes, "labels": labels}])
        (proposals,), _, (labels,), (codes,) = self.sampler.select_training_samples([proposals], targets)
        scores, coded = self.classify([(maps, 1)], proposals, size)
        objects = labels > 0
        box_loss = smooth_l1_loss(coded[objects, labels[objects]], codes[objects], reduction="sum") / len(labels)
        loss = rpn["loss_objectness"] + rpn["loss_rpn_box_reg"] + cross_entropy(scores, labels) + box_loss
        return loss, (scores.argmax(dim=1) != labels).float().mean()

    @torch.inference_mode()
    def detect(self, image, test="baseline"):
        """{"boxes": (N, 4) in the image's pixels, "scores": (N,), "labels": (N,)}: at most 100, by falling score.
        test: one of TESTS."""
        refine, shorts = TESTS[test]
        maps, proposals, size, _, _ = self.propose(image)
        maps = self.pyramid(image, shorts, maps, size) if shorts else [(maps, 1)]
        boxes, scores = self.predict(maps, proposals, size)
        if refine:  # each region once more, from its likeliest class's box
            refined = boxes[torch.arange(len(boxes), device=boxes.device), scores.argmax(dim=1)]
            more_boxes, more_scores = self.predict(maps, refined, size)
            boxes, scores = torch.cat([boxes, more_boxes]), torch.cat([scores, more_scores])
        labels = torch.arange(1, 1 + scores.shape[1], device=scores.device).expand_as(scores)
        likely = (scores > 0.05) & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)  # some are clipped to nothing
        boxes, scores, labels = boxes[likely], scores[likely], labels[likely]
        keep = batched_nms(boxes, scores, labels, 0.3)[:100]
        kept = clip_boxes_to_image(vote(boxes, scores, labels, keep), size) if refine else boxes[keep]
        return {"boxes": resize_boxes(kept, size, image.shape[-2:]), "scores": scores[keep], "labels": labels[keep]}

    def predict(self, maps, regions, size):
        """Of each region a box for each class (R, classes, 4), inside the image, and the class's score (R, classes)."""
        scores, coded = self.classify(maps, regions, size)
        boxes = self.sampler.box_coder.decode(coded.flatten(1), [regions]).view(coded.shape)
        return clip_boxes_to_image(boxes, size)[:, 1:], scores.softmax(dim=1)[:, 1:]

    def pyramid(self, image, shorts, usual, size):
        """[(map, its scale), ...] of an image, one for each length of its shorter side in `shorts`; 600 is usual.
        usual: the map of that length, whose scale is 1. size: (H, W) of the image there."""
        maps, sizes = [], (self.transform.min_size, self.transform.max_size)
        for short in shorts:
            if short == SHORT:
                maps.append((usual, 1))
                continue
            self.transform.min_size = (round(short * self.scale),)
            self.transform.max_size = round(short * self.scale * LONG / SHORT)
            images, _ = self.transform([image])
            maps.append((self.trunk(images.tensors).to(image.dtype), max(images.image_sizes[0]) / max(size)))
        self.transform.min_size, self.transform.max_size = sizes
        return maps


def vote(boxes, scores, labels, keep):
    """The boxes of `keep`, each the mean, weighted by score, of its class's boxes whose IoU with it is 0.5 or more:
    Gidaris and Komodakis, arXiv 1505.01749, Section 5."""
    weights = (((box_iou(boxes[keep], boxes) >= 0.5) & (labels[keep, None] == labels)) * scores).double()
    return (weights @ boxes.double() / weights.sum(dim=1, keepdim=True)).to(boxes.dtype)  # autocast leaves double alone


def fix_bn(parent):
    """Make BN a fixed scale and offset, in place: [1] Appendix A."""
    for name, child in parent.named_children():
        fix_bn(child)
        if isinstance(child, nn.BatchNorm2d):
            fixed = FrozenBatchNorm2d(child.num_features, child.eps)
            fixed.load_state_dict(child.state_dict())
            setattr(parent, name, fixed)


def objective(net, image, boxes, labels, seed):
    """The loss and the error of one training image. What it draws (anchors, regions, dropout) is the seed's: of the
    same image in the same iteration it is the same on any number of processes."""
    torch.manual_seed(seed)
    return net.losses(image, boxes, labels)


def classifier(args, classes):
    """The net that the flags of detection_train.py name, whole, with new weights."""
    if args.vgg:
        return vgg16(weights=None, init_weights=False)
    return imagenet_resnet(args.depth, UNITS[args.unit], classes, args.width, **args.unit_args)


def detector(args, about, net=None):
    """The detector that the flags of detection_train.py make of a net, or of a new one. about: as in a checkpoint."""
    classes, (mean, std) = len(about["classes"]), ((about[name].flatten() / 255).tolist() for name in ("mean", "std"))
    more = getattr(args, "context", False), COCO_ANCHORS if args.dataset == "coco" else ANCHORS
    return Detector(net or classifier(args, classes), classes, mean, std, args.short, args.roi, args.regions, *more)


def of_run(args, state):
    """The detector of a run, by its flags and its checkpoint; in eval mode."""
    net = detector(args, state["about"])
    net.load_state_dict(state["model"])
    return net.eval()


def draw(pixels, found, classes, least=0.5):
    """Pixels (3, H, W), uint8, with the boxes, names and scores of what was found with a score of `least` or more."""
    boxes, scores, labels = (found[key][found["scores"] >= least].cpu() for key in ("boxes", "scores", "labels"))
    names = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]
    colours = [f"hsl({360 * label // len(classes)}, 100%, 40%)" for label in labels.tolist()]
    if not names:
        return pixels
    return draw_bounding_boxes(pixels, boxes, names, colours, width=2, label_colors="white", fill_labels=True)


# What was found against what is there

VOC = {"map_11point": "mAP (11-point)", "map_area": "mAP (area)"}  # of VOC 2007, of VOC 2010 and later; IoU 0.5
COLUMNS = {"voc": VOC, "synthetic": VOC, "coco": {"map_50": "mAP@.5", "map_50_95": "mAP@[.5,.95]"}}


def matches(found, truth, label):
    """(matches, objects) of a class: for each box found, by falling score, its score, the object that it overlaps most
    as (IoU, place, whether it is difficult), and the number of objects that are not difficult.

    found: of each image what `detect` found. truth: of each image its boxes, labels and which are difficult.
    """
    rows, objects = [], 0
    for n, (detections, (boxes, labels, difficult)) in enumerate(zip(found, truth, strict=True)):
        own, there = detections["labels"] == label, labels == label
        objects += int((there & ~difficult).sum())
        scores = detections["scores"][own].tolist()
        if scores and there.any():
            most, which = box_iou(detections["boxes"][own].double(), boxes[there].double()).max(dim=1)
            places = [(n, i) for i in which.tolist()]
            rows += zip(scores, most.tolist(), places, difficult[there][which].tolist(), strict=True)
        else:
            rows += [(score, 0.0, None, False) for score in scores]
    return sorted(rows, key=lambda row: -row[0]), objects


def average_precision(matches, objects, least=0.5):
    """The AP (%) of a class by VOC's rules: {"11point": the mean precision at 11 recalls, as of 2007, "area": the area
    under the curve, as of 2010}. None where the class does not occur.

    A box is right if the object that it overlaps most has an IoU of more than `least` with it and was not found before;
    if that object is difficult it is neither right nor wrong.
    """
    if not objects:
        return None
    right, taken = [], set()
    for _, iou, place, difficult in matches:
        if iou <= least:
            right.append(False)
        elif not difficult:
            right.append(place not in taken)
            taken.add(place)
    right = np.array(right, dtype=bool).cumsum()
    recall, precision = right / objects, right / np.arange(1, 1 + len(right))
    points = [precision[recall >= t].max(initial=0) for t in np.linspace(0, 1, 11)]
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # that of the same or a larger recall
    area = (np.diff(recall, prepend=0) * precision).sum()
    return {"11point": 100 * float(np.mean(points)), "area": 100 * float(area)}


def measure(found, images):
    """{class: its AP} of the classes that occur, and the means of these, by the rules of the images' kind; in %."""
    return (coco_map if isinstance(images, COCOImages) else voc_map)(found, images)


def voc_map(found, images):
    """{class: its AP} of the classes that occur, by VOC's rules, and the means of these. Besides COLUMNS, to compare
    Table 9's tests by, the area under the curve, on average over IoUs of 0.5, 0.55, ..., 0.95."""
    aps = {}
    for i, c in enumerate(images.classes):
        matched = matches(found, images.objects, 1 + i)
        at = [average_precision(*matched, (50 + 5 * k) / 100) for k in range(10)]
        if at[0]:
            aps[c] = {f"map_{rule}": value for rule, value in at[0].items()}
            aps[c]["map_area_50_95"] = sum(ap["area"] for ap in at) / 10
    return aps, {name: sum(ap[name] for ap in aps.values()) / len(aps) for name in (*VOC, "map_area_50_95")}


def coco_map(found, images):
    """As voc_map, by COCO's rules: pycocotools measures."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset, detections = images.truth, coco_detections(found, images)
    precision = np.zeros((10, 1, len(images.classes), 1, 1))  # by IoU, recall and class
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if detections:  # it cannot read an empty list
            judge = COCOeval(truth, truth.loadRes(detections), "bbox")
            judge.params.areaRng = judge.params.areaRng[:1]  # of any size: by size as well it took 2.7 times as long
            judge.params.maxDets = [100]
            judge.evaluate()
            judge.accumulate()
            precision = judge.eval["precision"]
    by_class, aps = 100 * precision[..., 0, 0].mean(axis=1).T, {}
    occurring = {a["category_id"] for a in images.truth["annotations"] if not a["iscrowd"]}
    for number, c, ap in zip(images.categories, images.classes, by_class, strict=True):
        if number in occurring:
            aps[c] = {"map_50": float(ap[0]), "map_50_95": float(ap.mean())}
    return aps, {name: sum(ap[name] for ap in aps.values()) / len(aps) for name in COLUMNS["coco"]}


def coco_detections(found, images):
    """What was found, as COCO's server and pycocotools read it: [{"image_id", "category_id", "bbox", "score"}, ...]."""
    detections = []
    for number, one in zip(images.ids, found, strict=True):
        boxes, scores, labels = (one[name].tolist() for name in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(boxes, scores, labels, strict=True):
            box = {"image_id": number, "category_id": images.categories[label - 1], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            detections.append(box | {"score": score})
    return detections
