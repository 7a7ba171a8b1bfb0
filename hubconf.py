"""torch.hub's door: torch.hub.load(REPOSITORY, "cifar_resnet", depth=110, unit="basic-preact")."""

import models as _models
import units as _units

dependencies = ["torch", "torchvision", "numpy", "tqdm"]


def _unit(name):
    if name not in _units.UNITS:
        raise ValueError(f"there is no unit {name}: choose from {', '.join(_units.UNITS)}")
    return _units.UNITS[name]


def cifar_resnet(depth=20, unit="basic", num_classes=10, **unit_args):
    """A new net of [1] Section 4.2 or [2]; unit: a name of units.UNITS, unit_args: its arguments, as option="B"."""
    return _models.cifar_resnet(depth, _unit(unit), num_classes, **unit_args)


def imagenet_resnet(depth=50, unit="bottleneck", num_classes=1000, **unit_args):
    """A new net of [1] Table 1 or [2]; see cifar_resnet."""
    return _models.imagenet_resnet(depth, _unit(unit), num_classes, **unit_args)


def load(path, layout=None):
    """(net, about) of a run's folder or a file of weights: weights.load."""
    import weights

    return weights.load(path, layout)
