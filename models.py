"""Nets of any depth, made of the units of units.py. Imports torch alone."""

from torch import nn

from units import arguments, conv

UNITS_PER_STAGE = {  # ImageNet: [1] Table 1; [2] footnote 3 (200)
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


def accept_batch_counts(layer, incompatible_keys):
    """A hook for a BN without num_batches_tracked: load_state_dict(strict=True) also accepts a dict that has this key.
    (torch itself adds it to a plain dict.)"""
    keys = incompatible_keys.unexpected_keys
    keys[:] = [key for key in keys if not key.endswith("num_batches_tracked")]


class ResNet(nn.Module):
    """conv-BN-ReLU (ImageNet: and max-pooling), stages of units, average, fc. (N, 3, H, W) to (N, num_classes) logits.

    `counts` are the units per stage. Each stage is twice as wide as the one before and begins with stride 2.
    """

    def __init__(self, stem, width, counts, unit, num_classes, unit_args):
        super().__init__()
        self.stem = nn.Sequential(*stem)
        self.stages = nn.Sequential()
        channels = width
        for stage, count in enumerate(counts):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            self.stages.append(nn.Sequential())
            for stride in strides:
                self.stages[stage].append(unit(channels, width * 2**stage, stride, **unit_args))
                channels = width * 2**stage * unit.expansion
        last = {None: [], "relu": [nn.ReLU()], "bn-relu": [nn.BatchNorm2d(channels), nn.ReLU()]}
        self.last = nn.Sequential(*last[unit.preact])  # [2] appendix: one more activation after the last addition
        self.fc = nn.Linear(channels, num_classes)  # torch's default U(+-1/sqrt(fan-in)), as in fb.resnet.torch
        nn.init.zeros_(self.fc.bias)

        if unit.preact == "bn-relu":
            # [2] appendix: the first activation stands right after the first convolution, before the split. That is the
            # stem's; the first unit's own ReLU then changes nothing, and its BN must not be there.
            self.stages[0][0].bn1 = nn.Identity()
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.num_batches_tracked = None  # nothing reads it, and it would count micro-batches
                layer.register_load_state_dict_post_hook(accept_batch_counts)

    def forward(self, x):
        x = self.last(self.stages(self.stem(x)))
        return self.fc(x.mean(dim=(2, 3)))


def cifar_resnet(depth, unit, num_classes=10, **unit_args):
    """[1] Section 4.2, [2] Section 4.1: three stages on maps of 32, 16 and 8 pixels, 16, 32 and 64 channels wide (a
    bottleneck's outputs: 64, 128 and 256). Raises ValueError when no such net has that depth."""
    step = 3 * unit.weights
    count, rest = divmod(depth - 2, step)
    if rest or count < 1:
        near = " and ".join(str(n * step + 2) for n in (count, count + 1) if n > 0) or step + 2
        raise ValueError(
            f"depth {depth} is impossible: with units of {unit.weights} weight layers it is {step}n + 2, such as {near}"
        )
    if depth > 10_000:
        raise ValueError(f"depth {depth} is more than this code builds: 10,000 layers")
    stem = conv(3, 3, 16), nn.BatchNorm2d(16), nn.ReLU()
    return ResNet(stem, 16, [count] * 3, unit, num_classes, unit_args)


def imagenet_resnet(depth, unit, num_classes=1000, width=64, caffe_pool=False, **unit_args):
    """[1] Table 1, [2] footnote 3: four stages on maps of 56, 28, 14 and 7 pixels (of an image of 224), 64, 128, 256
    and 512 channels wide (a bottleneck's outputs: 4 times). Option B by default. Raises ValueError for other depths.

    width: of the first stage, where that is not 64. caffe_pool: the first max-pooling is that of the authors' released
    nets, without padding and rounded up."""
    counts = UNITS_PER_STAGE.get(depth, ())
    if 2 + unit.weights * sum(counts) != depth:
        fit = {w: [str(d) for d, n in UNITS_PER_STAGE.items() if 2 + w * sum(n) == d] for w in (2, 3)}
        fit = " or ".join(f"{', '.join(depths)} with units of {w} weight layers" for w, depths in fit.items())
        raise ValueError(f"depth {depth} is impossible: choose {fit}")
    if "option" in arguments(unit):
        unit_args = {"option": "B"} | unit_args
    pool = nn.MaxPool2d(3, stride=2, ceil_mode=True) if caffe_pool else nn.MaxPool2d(3, stride=2, padding=1)
    stem = conv(7, 3, width, stride=2), nn.BatchNorm2d(width), nn.ReLU(), pool
    return ResNet(stem, width, counts, unit, num_classes, unit_args)
