"""The residual units of two papers, one class per panel of their figures. Imports torch alone.

[1] He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. arXiv 1512.03385
[2] He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks. arXiv 1603.05027

A unit is x' = f(h(x) + F(x)), eqs (1)-(2) of [2]: `shortcut` is h, `residual` is F, and `forward` merges them.
[2] Fig. 4 is about the order of weights, BN and ReLU. With one line per weight layer it reads, for two layers:

    (a) original                relu(bn1(conv1(x)))    bn2(conv2(y))           relu(x + y)
    (b) BN after addition       relu(bn1(conv1(x)))    conv2(y)                relu(bn2(x + y))
    (c) ReLU before addition    relu(bn1(conv1(x)))    relu(bn2(conv2(y)))     x + y
    (d) ReLU-only pre-act       bn1(conv1(relu(x)))    bn2(conv2(relu(y)))     x + y
    (e) full pre-activation     conv1(relu(bn1(x)))    conv2(relu(bn2(y)))     x + y

[2] Fig. 2 is about what stands on the shortcut, which changes the merge alone.

Every unit is built as Unit(in_channels, channels, stride=1, <arguments of its own>) and maps
(N, in_channels, H, W) to (N, channels * expansion, H / stride, W / stride). `python units.py` lists them all, and
`python units.py NAME` prints all that one of them needs in another file.
"""

import argparse
import inspect
import re
import sys

import torch
from torch import fx, nn
from torch.nn.functional import dropout, pad, relu

# Helpers: convolutions and the shortcuts of [1] Section 3.3


def conv(size, in_channels, channels, stride=1, bias=False):
    """A size x size convolution, padded to keep the map's size, with weights from N(0, 2 / fan-out): He et al. 2015."""
    layer = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class ZeroPad(nn.Module):
    """Option A's shortcut, without parameters: every stride-th pixel, and zeros in the new channels."""

    def __init__(self, new_channels, stride):
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x):
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def shortcut(in_channels, channels, stride, option, bn=True):
    """h(x) as a module, by the options of [1] Section 3.3. A: zero-padding where the shape changes; B: a 1x1 projection
    there; C: a projection everywhere. Otherwise an identity. Raises ValueError for any other option, and when A would
    have to drop channels."""
    if option not in ("A", "B", "C"):
        raise ValueError(f"the shortcut option must be A, B or C, not {option!r}")
    if option == "A" and channels < in_channels:
        raise ValueError(f"without a projection (option B or C) {channels} channels cannot follow {in_channels}")
    if option != "C" and stride == 1 and in_channels == channels:
        return nn.Identity()
    if option == "A":
        return ZeroPad(channels - in_channels, stride)
    projection = conv(1, in_channels, channels, stride)
    return nn.Sequential(projection, nn.BatchNorm2d(channels)) if bn else projection


# The original units


class Basic(nn.Module):
    """Two 3x3 convolutions. [1] Fig. 5 left; [2] Figs 2(a) and 4(a)."""

    weights, expansion, preact = 2, 1, None

    def __init__(self, in_channels, channels, stride=1, option="A"):
        super().__init__()
        self.conv1 = conv(3, in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(3, channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut(in_channels, channels, stride, option)

    def residual(self, x):
        y = relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(y))

    def forward(self, x):
        return relu(self.shortcut(x) + self.residual(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the first two a quarter as wide. [1] Fig. 5 right; [2] Section 4.1."""

    weights, expansion, preact = 3, 4, None

    def __init__(self, in_channels, channels, stride=1, option="B", stride_on_3x3=False):
        super().__init__()
        # The stride is on the first 1x1, as the authors have it; torchvision and fb.resnet.torch put it on the 3x3.
        first, second = (1, stride) if stride_on_3x3 else (stride, 1)
        self.conv1 = conv(1, in_channels, channels, first)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(3, channels, channels, second)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(1, channels, channels * 4)
        self.bn3 = nn.BatchNorm2d(channels * 4)
        self.shortcut = shortcut(in_channels, channels * 4, stride, option)

    def residual(self, x):
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        return self.bn3(self.conv3(y))

    def forward(self, x):
        return relu(self.shortcut(x) + self.residual(x))


class Single(nn.Module):
    """One 3x3 convolution: each shortcut skips a single layer. [2] Table 3."""

    weights, expansion, preact = 1, 1, None

    def __init__(self, in_channels, channels, stride=1, option="A"):
        super().__init__()
        self.conv1 = conv(3, in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut(in_channels, channels, stride, option)

    def residual(self, x):
        return self.bn1(self.conv1(x))

    def forward(self, x):
        return relu(self.shortcut(x) + self.residual(x))


# Plain nets: the same layers without shortcuts. Written once, as a mixin over either body; so are Fig. 2's panels.


class Plain:
    """A mixin over Basic or Bottleneck. [1] Section 3.3; [2] Table 1's constant scaling with 0 on the shortcut."""

    def __init__(self, in_channels, channels, stride=1):
        super().__init__(in_channels, channels, stride, option="A")
        del self.shortcut

    def forward(self, x):
        return relu(self.residual(x))


class BasicPlain(Plain, Basic):
    """[1] Fig. 3 middle."""


class BottleneckPlain(Plain, Bottleneck):
    """[1] footnote 4."""


# [2] Fig. 4(b): BN after addition


class BasicBNAfterAdd(Basic):
    """[2] Fig. 4(b). A projection has no BN of its own: the BN after the addition normalises it too."""

    def __init__(self, in_channels, channels, stride=1, option="A"):
        super().__init__(in_channels, channels, stride, option)
        self.shortcut = shortcut(in_channels, channels, stride, option, bn=False)

    def residual(self, x):
        y = relu(self.bn1(self.conv1(x)))
        return self.conv2(y)

    def forward(self, x):
        return relu(self.bn2(self.shortcut(x) + self.residual(x)))


class BottleneckBNAfterAdd(Bottleneck):
    """[2] Fig. 4(b). A projection has no BN of its own: the BN after the addition normalises it too."""

    def __init__(self, in_channels, channels, stride=1, option="B"):
        super().__init__(in_channels, channels, stride, option)
        self.shortcut = shortcut(in_channels, channels * 4, stride, option, bn=False)

    def residual(self, x):
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        return self.conv3(y)

    def forward(self, x):
        return relu(self.bn3(self.shortcut(x) + self.residual(x)))


# [2] Fig. 4(c): ReLU before addition


class BasicReLUBeforeAdd(Basic):
    """[2] Fig. 4(c): F is never negative, so the signal can only grow."""

    def residual(self, x):
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)))

    def forward(self, x):
        return self.shortcut(x) + self.residual(x)


class BottleneckReLUBeforeAdd(Bottleneck):
    """[2] Fig. 4(c): F is never negative, so the signal can only grow."""

    def residual(self, x):
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        return relu(self.bn3(self.conv3(y)))

    def forward(self, x):
        return self.shortcut(x) + self.residual(x)


# [2] Fig. 4(d), (e): pre-activation, x' = h(x) + F(f^(x)), eq. (9). The activation f^(x) is computed once. F reads it,
# and so does a shortcut that changes the shape ([2] appendix). An identity hands on x itself, from unit to unit.


class BasicReLUPreAct(Basic):
    """[2] Fig. 4(d): ReLU-only pre-activation."""

    preact = "relu"

    def residual(self, a):
        y = self.bn1(self.conv1(a))
        return self.bn2(self.conv2(relu(y)))

    def forward(self, x):
        a = relu(x)
        h = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(a)
        return h + self.residual(a)


class BottleneckReLUPreAct(Bottleneck):
    """[2] Fig. 4(d): ReLU-only pre-activation."""

    preact = "relu"

    def residual(self, a):
        y = self.bn1(self.conv1(a))
        y = self.bn2(self.conv2(relu(y)))
        return self.bn3(self.conv3(relu(y)))

    def forward(self, x):
        a = relu(x)
        h = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(a)
        return h + self.residual(a)


class BasicPreAct(nn.Module):
    """[2] Figs 1(b) and 4(e): full pre-activation."""

    weights, expansion, preact = 2, 1, "bn-relu"

    def __init__(self, in_channels, channels, stride=1, option="A"):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(3, in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(3, channels, channels)
        self.shortcut = shortcut(in_channels, channels, stride, option, bn=False)

    def residual(self, a):
        y = self.conv1(a)
        return self.conv2(relu(self.bn2(y)))

    def forward(self, x):
        a = relu(self.bn1(x))
        h = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(a)
        return h + self.residual(a)


class BottleneckPreAct(nn.Module):
    """[2] Fig. 4(e) with three layers: the unit of ResNet-164, -1001 and -200."""

    weights, expansion, preact = 3, 4, "bn-relu"

    def __init__(self, in_channels, channels, stride=1, option="B"):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(1, in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(3, channels, channels)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv(1, channels, channels * 4)
        self.shortcut = shortcut(in_channels, channels * 4, stride, option, bn=False)

    def residual(self, a):
        y = self.conv1(a)
        y = self.conv2(relu(self.bn2(y)))
        return self.conv3(relu(self.bn3(y)))

    def forward(self, x):
        a = relu(self.bn1(x))
        h = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(a)
        return h + self.residual(a)


class BottleneckPreActStrideOn3x3(BottleneckPreAct):
    """The unit of fb.resnet.torch's ResNet-200 in [2] Table 5 (scale and aspect ratio): its stride is on the 3x3."""

    def __init__(self, in_channels, channels, stride=1, option="B"):
        super().__init__(in_channels, channels, stride, option)
        self.conv1.stride, self.conv2.stride = (1, 1), (stride, stride)


class SinglePreAct(nn.Module):
    """Full pre-activation of one 3x3 convolution. [2] Table 3."""

    weights, expansion, preact = 1, 1, "bn-relu"

    def __init__(self, in_channels, channels, stride=1, option="A"):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(3, in_channels, channels, stride)
        self.shortcut = shortcut(in_channels, channels, stride, option, bn=False)

    def residual(self, a):
        return self.conv1(a)

    def forward(self, x):
        a = relu(self.bn1(x))
        h = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(a)
        return h + self.residual(a)


class BasicPreActRawShortcut(BasicPreAct):
    """What [2] leaves open for option A: a shortcut that changes the shape reads x itself, as an identity does."""

    def forward(self, x):
        return self.shortcut(x) + self.residual(relu(self.bn1(x)))


# [2] Fig. 2(b)-(f): what stands on the shortcut. Each panel is a mixin, which the units below put over either body.


class ConstantScaling:
    """A mixin over Basic or Bottleneck. [2] Fig. 2(b): both branches are scaled by constants."""

    def __init__(self, in_channels, channels, stride=1, shortcut_scale=0.5, residual_scale=0.5, **body):
        super().__init__(in_channels, channels, stride, **body)
        self.shortcut_scale, self.residual_scale = shortcut_scale, residual_scale

    def forward(self, x):
        return relu(self.shortcut_scale * self.shortcut(x) + self.residual_scale * self.residual(x))


class Gating:
    """The gate of the next two mixins, g(x) = sigmoid(W_g x + b_g): a 1x1 convolution of the unit's input, with the
    unit's stride and as many outputs. [2] leaves open whether BN follows it, as it follows the other convolutions: with
    gate_bn it does, and b_g is that BN's bias."""

    def __init__(self, in_channels, channels, stride=1, gate_bias=-6.0, gate_bn=False, **body):
        super().__init__(in_channels, channels, stride, **body)
        gate = conv(1, in_channels, channels * self.expansion, stride, bias=not gate_bn)
        bn = nn.BatchNorm2d(channels * self.expansion)
        self.gate = nn.Sequential(gate, bn) if gate_bn else gate
        nn.init.constant_((bn if gate_bn else gate).bias, gate_bias)


class ExclusiveGating(Gating):
    """A mixin over Basic or Bottleneck. [2] Fig. 2(c), as in Highway networks: 1 - g(x) scales the shortcut, g(x) F."""

    def forward(self, x):
        g = torch.sigmoid(self.gate(x))
        return relu((1 - g) * self.shortcut(x) + g * self.residual(x))


class ShortcutGating(Gating):
    """A mixin over Basic or Bottleneck. [2] Fig. 2(d): 1 - g(x) scales the shortcut; F is left alone."""

    def forward(self, x):
        g = torch.sigmoid(self.gate(x))
        return relu((1 - g) * self.shortcut(x) + self.residual(x))


class ConvShortcut:
    """A mixin over Basic or Bottleneck. [2] Fig. 2(e): a 1x1 convolution and BN on every shortcut, option C of [1]."""

    def __init__(self, in_channels, channels, stride=1):
        super().__init__(in_channels, channels, stride, option="C")


class DropoutShortcut:
    """A mixin over Basic or Bottleneck. [2] Fig. 2(f): half of the shortcut's elements are dropped. The others are not
    scaled up (torch doubles them while training, hence the 0.5), so that the expected scale is 0.5, as in [2]."""

    def forward(self, x):
        return relu(0.5 * dropout(self.shortcut(x), 0.5, self.training) + self.residual(x))


class BasicConstantScaling(ConstantScaling, Basic):
    """[2] Fig. 2(b)."""


class BasicExclusiveGating(ExclusiveGating, Basic):
    """[2] Fig. 2(c)."""


class BasicShortcutGating(ShortcutGating, Basic):
    """[2] Fig. 2(d)."""


class BasicConvShortcut(ConvShortcut, Basic):
    """[2] Fig. 2(e)."""


class BasicDropoutShortcut(DropoutShortcut, Basic):
    """[2] Fig. 2(f)."""


class BasicRescaledDropout(Basic):
    """What [2] leaves open for Fig. 2(f): the elements kept are doubled while training: the expected scale is 1."""

    def forward(self, x):
        return relu(dropout(self.shortcut(x), 0.5, self.training) + self.residual(x))


class BottleneckConstantScaling(ConstantScaling, Bottleneck):
    """[2] Fig. 2(b), Section 5: ImageNet's ResNet-101."""


class BottleneckExclusiveGating(ExclusiveGating, Bottleneck):
    """[2] Fig. 2(c), Section 5: ImageNet's ResNet-101."""


class BottleneckShortcutGating(ShortcutGating, Bottleneck):
    """[2] Fig. 2(d), Section 5: ImageNet's ResNet-101."""


class BottleneckConvShortcut(ConvShortcut, Bottleneck):
    """[2] Fig. 2(e), Section 5: ImageNet's ResNet-101."""


class BottleneckDropoutShortcut(DropoutShortcut, Bottleneck):
    """[2] Fig. 2(f), Section 5: ImageNet's ResNet-101."""


# The command line's names: a body, then what the panel changes

UNITS = {
    "basic": Basic,
    "basic-plain": BasicPlain,
    "basic-bn-after-add": BasicBNAfterAdd,
    "basic-relu-before-add": BasicReLUBeforeAdd,
    "basic-relu-preact": BasicReLUPreAct,
    "basic-preact": BasicPreAct,
    "basic-preact-raw-shortcut": BasicPreActRawShortcut,
    "basic-constant-scaling": BasicConstantScaling,
    "basic-exclusive-gating": BasicExclusiveGating,
    "basic-shortcut-gating": BasicShortcutGating,
    "basic-conv-shortcut": BasicConvShortcut,
    "basic-dropout-shortcut": BasicDropoutShortcut,
    "basic-rescaled-dropout": BasicRescaledDropout,
    "bottleneck": Bottleneck,
    "bottleneck-plain": BottleneckPlain,
    "bottleneck-bn-after-add": BottleneckBNAfterAdd,
    "bottleneck-relu-before-add": BottleneckReLUBeforeAdd,
    "bottleneck-relu-preact": BottleneckReLUPreAct,
    "bottleneck-preact": BottleneckPreAct,
    "bottleneck-preact-stride-on-3x3": BottleneckPreActStrideOn3x3,
    "bottleneck-constant-scaling": BottleneckConstantScaling,
    "bottleneck-exclusive-gating": BottleneckExclusiveGating,
    "bottleneck-shortcut-gating": BottleneckShortcutGating,
    "bottleneck-conv-shortcut": BottleneckConvShortcut,
    "bottleneck-dropout-shortcut": BottleneckDropoutShortcut,
    "single": Single,
    "single-preact": SinglePreAct,
}


def arguments(unit):
    """The keyword arguments of a unit's own with their defaults, such as {"option": "A", "gate_bias": -6.0}."""
    defaults = {}
    for base in unit.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            own = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "stride"}
            defaults = own | defaults
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                return defaults


def operations(module):
    """The operations of a unit or net, read out of the module by torch.fx: {node: (operation, its constants, the nodes
    it reads)} in the order in which they run. Identities are left out: what reads one reads its input."""
    names = {"add": "+", "mul": "*", "sub": "-", "BatchNorm2d": "bn", "ReLU": "relu"}
    read, handed_on = {}, {}
    for node in fx.symbolic_trace(module).graph.nodes:
        inputs = [handed_on.get(i, i) for i in node.all_input_nodes]
        if node.op == "call_module":
            layer = module.get_submodule(node.target)
            name = "conv{}x{}".format(*layer.kernel_size) if isinstance(layer, nn.Conv2d) else type(layer).__name__
        elif node.op == "call_function":
            name = node.target.__name__
        else:
            continue
        if name == "Identity":
            handed_on[node] = inputs[0]
        else:
            constants = [value for value in node.args if isinstance(value, (int, float))]
            read[node] = names.get(name, name), constants, inputs
    return read


def order(module):
    """The operations of a unit or net in the order in which they run, read out of the module: "conv3x3 bn relu ..."."""
    return " ".join(operation for operation, *_ in operations(module).values())


def summary(name):
    """A line about a unit: its name, its operations, the shapes that go in and come out, its parameters."""
    unit = UNITS[name]
    x = torch.zeros(1, 16 * unit.expansion, 32, 32)
    example = unit(x.shape[1], 16)
    shapes = " -> ".join("x".join(map(str, t.shape[1:])) for t in (x, example(x)))
    parameters = sum(p.numel() for p in example.parameters())
    return f"{name:32}{order(example):72}{shapes:24}{parameters:>6,} parameters"


def source(name):
    """The text of a file that holds a unit and all that it needs: imports, helpers and bases."""
    bases = [base for base in reversed(UNITS[name].__mro__) if base.__module__ == __name__]
    text = "\n\n\n".join(inspect.getsource(part).rstrip() for part in (conv, ZeroPad, shortcut, *bases))
    functions = ", ".join(sorted({*re.findall(r"\b(dropout|pad|relu)\(", text)}))
    imports = "import torch\n" * ("torch.sigmoid" in text) + "from torch import nn\n"
    imports += f"from torch.nn.functional import {functions}\n"
    return f"# [1] is arXiv 1512.03385, [2] is arXiv 1603.05027\n\n{imports}\n\n{text}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="List the units, or print all that one of them needs elsewhere.")
    parser.add_argument("name", nargs="?", choices=UNITS, metavar="NAME", help="a unit of the list")
    chosen = parser.parse_args().name
    try:
        print(source(chosen) if chosen else "\n".join(map(summary, UNITS)), flush=True)
    except OSError as error:  # nobody reads it (| head), or its disk is full
        sys.stdout = None  # which would be written to once more at the end
        sys.exit(f"units.py: {error.strerror}")
