"""ResNet-164 of [2] out of timm's ResNetV2, a peer for benchmark.py: its layers, but for the first
one, which is the papers', and the stride, which timm has on the 3x3.

python benchmark.py step --depth 164 --unit bottleneck-preact --peer results/timm_resnetv2.py:resnet164
"""

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn


def resnet164():
    layers = dict(conv_layer=create_conv2d, norm_layer=BatchNormAct2d)
    net = ResNetV2((18, 18, 18), (64, 128, 256), num_classes=10, stem_chs=16, stem_type="", **layers)
    net.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    return net
