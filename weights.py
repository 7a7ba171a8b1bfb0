"""Weights in, from runs and from others' files, and weights out.

    python weights.py runs/cifar10-20-basic-seed1 weights.pth    # the weights alone, with what predict.py has to know
    python weights.py R-50.pkl weights.safetensors               # others' too; where safetensors is installed
    python weights.py RUN resnet18.pth --to torchvision          # under torchvision's names

In Python: net, about = weights.load(path). Nothing that a file holds is ever executed.
"""

import argparse
import hashlib
import io
import json
import pathlib
import pickle
import re
import sys
import zipfile

import numpy as np
import torch

import checkpoint
import data
from models import cifar_resnet, imagenet_resnet
from units import UNITS

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()

LAYOUTS = {  # what names and shapes cannot tell: in words, and the mean and standard deviation of RGB in 0 ... 1
    "ours": ("this project's", (), ()),
    "torchvision": ("a bottleneck's stride on its 3x3, ImageNet's mean and std", data.MEAN, data.STD),
    "torchvision-1x1": ("a bottleneck's stride on its first 1x1, ImageNet's mean and std", data.MEAN, data.STD),
    "torchvision-cifar": (
        "option B, a bottleneck's stride on its 3x3, mean 0.4914, 0.4822, 0.4465 and std 0.2023, 0.1994, 0.2010",
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    ),
    # github.com/akamaster/pytorch_resnet_cifar10
    "akamaster": ("option A padded on both sides, ImageNet's mean and std", data.MEAN, data.STD),
    # [1]'s own nets as github.com/facebookresearch/Detectron has them
    "msra": (
        "BN as scale and offset, BGR in 0 ... 255 less its mean, pooling without padding",
        (122.7717 / 255, 115.9465 / 255, 102.9801 / 255),
        (1 / 255, 1 / 255, 1 / 255),
    ),
}

OF_CIFAR = ("torchvision-cifar", "akamaster")


def load(path, layout=None):
    """(net, about) of a run's folder or a file of weights, the net on the CPU and in eval mode.

    about: "classes", their names; "mean" and "std", tensors with which (pixels - mean) / std of RGB in 0 ... 255 is the
    net's input, of "size" x "size" pixels; "depth", "unit" and "unit_args", of which it is built. `layout`, a name of
    LAYOUTS, is what a foreign file cannot tell; the usual one is taken and told on the error stream.
    Raises ValueError when the file is not there, is damaged, does not fit or holds more than tensors and plain values.
    """
    path = pathlib.Path(path)
    if not (path.is_file() or path.is_dir()):
        what = f"{path} is neither" if path.exists() else f"there is no {path}"
        raise ValueError(f"{what}: weights come from a run's folder or a file")
    state, about = read(path)
    try:
        usual = usual_layout(state)
        if layout is None and usual != "ours":
            data.warn(f"{path}: taken for layout {usual} ({LAYOUTS[usual][0]}); --layout NAME is for another")
        layout = layout or usual
        if layout != "ours":
            about = foreign(state, layout)
        elif about is None:
            raise ValueError("it does not say which unit it is of; its run's folder does, or what weights.py writes")
        net, names = skeleton(state, about, layout)
        weights = {key: state[name] for key, name in names.items()}
        if layout == "msra":
            weights = normal_and_rgb(net, weights, state.get("conv1_b"))
        if layout == "akamaster" and about["unit_args"]["option"] == "A":
            pad_at_the_end(net, weights)
        if not all(t.isfinite().all() for t in weights.values()):
            raise ValueError("it holds weights that are not finite")
        net.to_empty(device="cpu")
        with torch.no_grad():
            for key, tensor in net.state_dict().items():
                tensor.copy_(weights[key])
    except ValueError as error:
        raise ValueError(f"{path} does not fit: {error}") from None
    except Exception as error:  # a crafted file may lead to anything
        raise ValueError(f"{path} does not fit: {type(error).__name__}: {error}") from None
    return net.eval(), about


# What a file holds


def read(path):
    """({name: tensor}, about or None) of a run's folder or a file. Raises ValueError."""
    if path.is_dir():
        flags, state = checkpoint.read_run(path)
        return state["model"], of_run(path, vars(flags), state)
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        with open(path, "rb") as file:
            if path.suffix == ".pkl":
                held = Arrays(file, encoding="latin1").load()
            else:
                if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():  # torch.load does not look at the CRCs
                    raise ValueError("it is not what was written")
                file.seek(0)
                held = torch.load(file, map_location="cpu", weights_only=True)
        about = held.get("about")
        if isinstance(held.get("flags"), dict):  # a run's checkpoint
            about = of_run(path, held["flags"], held)
        for name in ("model", "state_dict", "blobs"):
            held = held[name] if isinstance(held.get(name), dict) else held
        held = {name: t.tensor() if isinstance(t, Array) else t for name, t in held.items()}
        if not held or not all(isinstance(t, torch.Tensor) for t in held.values()):
            raise ValueError("it is no dict of names and tensors")
        if path.suffix != ".pkl" and sum(t.nbytes for t in held.values()) > path.stat().st_size:
            raise ValueError("its tensors are larger than itself")  # one number, repeated without end
        return plain_names(held), about
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values; nothing of it was executed"
        ) from None
    except ImportError:
        raise ValueError(f"{path} can only be read with safetensors: pip install safetensors") from None
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} holds no weights, or is damaged ({type(error).__name__} {error})") from None


class Arrays(pickle.Unpickler):
    """Detectron's pickles: numpy's arrays in plain containers. Nothing that a file names is called: `Array` stands for
    all that arrays are made with, and every other name is refused."""

    def find_class(self, module, name):
        modules = "numpy", "numpy.core.multiarray", "numpy._core.multiarray"
        if module not in modules or name not in ("_reconstruct", "ndarray", "dtype"):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return Array


class Array:
    """An array, or the kind of its numbers, as numpy takes them apart."""

    def __init__(self, *given):
        self.given = given

    def __setstate__(self, state):
        self.state = state

    def tensor(self):
        _, shape, kind, fortran, content = self.state
        kind = kind.state[1] + kind.given[0]
        if not re.fullmatch("[<>|=][fiu][1248]", kind):
            raise ValueError(f"an array of {kind} is none of numbers")
        content = content.encode("latin1") if isinstance(content, str) else content
        array = np.frombuffer(content, kind).astype(np.float32)
        return torch.from_numpy(array.reshape(shape, order="F" if fortran else "C"))


def read_safetensors(path):
    from safetensors import safe_open  # optional

    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        about = json.loads((file.metadata() or {}).get("about", "null"))
    if about:
        about |= {name: state.pop(f"about.{name}") for name in ("mean", "std")}
    return plain_names(state), about


def plain_names(state):
    """Without what wrapping, counting and training add, and with torchvision's words in place of akamaster's."""
    plain = {}
    for name, tensor in state.items():
        name = re.sub(r"^module\.", "", name)
        if not name.startswith("stages."):
            name = re.sub(r"\.shortcut\.(?=\d)", ".downsample.", re.sub(r"^linear\.", "fc.", name))
        if not name.endswith(("num_batches_tracked", "_momentum")):
            plain[name] = tensor
    return plain


def of_run(path, flags, state):
    """What `load` says about a run; of one older than that, by what it holds instead."""
    try:
        about = state.get("about")
        if about is None and "mean" in state:
            dataset = flags["dataset"]
            classes = CIFAR10 if dataset == "cifar10" else numbered(data.CLASSES[dataset])
            about = {"classes": classes, "mean": state["mean"], "std": state["std"], "size": 32}
        elif about is None:
            about = {"classes": state["classes"], "size": flags["crop"]} | grey_levels(data.MEAN, data.STD)
        return about | {name: flags[name] for name in ("depth", "unit", "unit_args")}
    except KeyError as error:
        raise ValueError(f"{path} is of no net that classifies: it lacks {error}") from None


def numbered(count):
    return [f"class {c}" for c in range(count)]


def grey_levels(mean, std):
    return {name: 255 * torch.tensor(t).view(3, 1, 1) for name, t in (("mean", mean), ("std", std))}


# From names and shapes to a net


def usual_layout(state):
    """The layout that files with such names mostly are in. Raises ValueError when none is."""
    if "stem.0.weight" in state or "conv1_w" in state:
        return "ours" if "stem.0.weight" in state else "msra"
    if "conv1.weight" not in state:
        raise ValueError(f"no layout has names such as {few([*state])}")
    if state["conv1.weight"].shape[-1] == 7:
        return "torchvision"
    return "torchvision-cifar" if any(".downsample." in name for name in state) else "akamaster"


def foreign(state, layout):
    """What `load` says about another's net, by names, shapes and layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout}: choose from {', '.join(LAYOUTS)}")
    first = layout_name(layout, "stem.0.weight")
    if first not in state:
        raise ValueError(f"layout {layout} begins with {first}, and its names are {few([*state])}")
    bottleneck = any(re.search(r"\.conv3\.|_branch2c_", name) for name in state)
    cifar = layout in OF_CIFAR
    option = "A" if layout == "akamaster" and not any(".downsample." in name for name in state) else "B"
    stride = {"stride_on_3x3": True} if bottleneck and layout in ("torchvision", "torchvision-cifar") else {}
    classes = numbered(len(state.get("fc.weight", state.get("fc1000_w", "?"))))
    if len(classes) == 1000:
        from torchvision.models import ResNet50_Weights

        classes = ResNet50_Weights.DEFAULT.meta["categories"]
    return {
        "depth": 2 + (3 if bottleneck else 2) * count_units(state),
        "unit": "bottleneck" if bottleneck else "basic",
        "unit_args": {"option": option} | stride | ({"caffe_pool": True} if layout == "msra" else {}),
        "classes": CIFAR10 if cifar and len(classes) == 10 else classes,
        "size": 32 if cifar else 224,
    } | grey_levels(*LAYOUTS[layout][1:])


def count_units(state):
    found = (re.match(r"(stages\.\d+\.\d+|layer\d+\.\d+|res\d+_\d+)[._]", name) for name in state)
    return len({match[1] for match in found if match})


def skeleton(state, about, layout):
    """A net without weights, and its names with those in a state. Raises ValueError listing what does not fit."""
    unit, classes, size = UNITS[about["unit"]], about["classes"], about["size"]
    if about["depth"] != 2 + unit.weights * count_units(state):  # so the file's own length limits what is built
        raise ValueError(f"{count_units(state)} units of {about['unit']} make no net of {about['depth']} layers")
    first = state.get("stem.0.weight", torch.empty(0))  # of ours
    with torch.device("meta"):
        make = cifar_resnet if layout in OF_CIFAR or first.shape[-1:] == (3,) else imagenet_resnet
        net = make(about["depth"], unit, len(classes), **about["unit_args"])
    shapes = {key: tuple(t.shape) for key, t in net.state_dict().items()}
    names = {key: name for key in shapes if (name := layout_name(layout, key))}
    optional = {"conv1_b"} if layout == "msra" else set()
    wrong = [f"{name} is missing" for name in names.values() if name not in state]
    wrong += [f"{name} has no place" for name in state if name not in {*names.values(), *optional}]
    for key, name in names.items():
        if name in state and tuple(state[name].shape) != shapes[key]:
            there, here = (" x ".join(map(str, shape)) for shape in (state[name].shape, shapes[key]))
            wrong.append(f"{name} is {there} and not {here}")
    if wrong:
        net = f"a {about['unit']} net of {about['depth']} layers and {len(classes)} classes in layout {layout}"
        raise ValueError(f"as {net}, {few(wrong)}")
    if not (isinstance(size, int) and all(isinstance(name, str) for name in classes)):
        raise ValueError("its size is no number, or a class's name no text")
    for value in (about["mean"], about["std"]):
        if value.shape not in ((3, 1, 1), (3, size, size)) or not value.isfinite().all():
            raise ValueError(f"its mean or std is none of 3 channels or of {size} x {size} pixels")
    return net, names


def few(names):
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def layout_name(layout, key):
    """The name that a layout has for one of a net's own, such as "stages.0.1.conv1.weight"; None for what it lacks."""
    if layout == "ours":
        return key
    if layout != "msra":
        key = key.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.").replace(".shortcut.", ".downsample.")
        return re.sub(r"^stages\.(\d)", lambda match: f"layer{int(match[1]) + 1}", key)
    place, what = key.rsplit(".", 1)
    if what.startswith("running"):
        return None
    theirs = {"stem.0": "conv1", "stem.1": "res_conv1_bn", "fc": "fc1000"}.get(place)
    if match := re.fullmatch(r"stages\.(\d)\.(\d+)\.(conv|bn|shortcut\.)(\d)", place):
        stage, unit, kind, n = match.groups()
        branch = "1" if kind == "shortcut." else "2" + " abc"[int(n)]
        bn = "_bn" if kind == "bn" or (kind, n) == ("shortcut.", "1") else ""
        theirs = f"res{int(stage) + 2}_{unit}_branch{branch}{bn}"
    return f"{theirs}_{'b' if what == 'bias' else 's' if theirs.endswith('_bn') else 'w'}"


def normal_and_rgb(net, weights, bias):
    """msra: statistics with which BN is its scale and offset alone, and conv1 turned from BGR to RGB. A bias of conv1,
    as R-50 has, is the mean that the BN after it subtracts, negated."""
    weights["stem.0.weight"] = weights["stem.0.weight"].flip(1)
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            weights[f"{name}.running_mean"] = torch.zeros(layer.num_features)
            weights[f"{name}.running_var"] = torch.full((layer.num_features,), 1 - layer.eps)
    if bias is not None:
        weights["stem.1.running_mean"] = -bias
    return weights


def pad_at_the_end(net, weights):
    """akamaster: reorder the channels between units so that what is padded on both sides comes last, as ours does."""
    order = torch.arange(16)
    for s, stage in enumerate(net.stages):
        for u in range(len(stage)):
            place = f"stages.{s}.{u}"
            weights[f"{place}.conv1.weight"] = weights[f"{place}.conv1.weight"][:, order]
            if s > 0 and u == 0:
                n = len(order)
                order = torch.cat([order + n // 2, torch.arange(n // 2), torch.arange(n + n // 2, 2 * n)])
            for name in ("conv2.weight", "bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"):
                weights[f"{place}.{name}"] = weights[f"{place}.{name}"][order]
    weights["fc.weight"] = weights["fc.weight"][:, order]


def digest(net, about):
    """A hash of all that a training begun from `load`'s result depends on, but for the unit and its arguments."""
    found = hashlib.sha256()
    for tensor in (*net.state_dict().values(), about["mean"], about["std"]):
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()


# Weights out


def save(net, about, path, to="ours"):
    """Write a net's weights to a new file, in layout "ours" with its `about`. Raises ValueError and OSError."""
    path, state = pathlib.Path(path), net.state_dict()
    if path.suffix not in (".pth", ".pt", ".safetensors") or path.exists():
        raise ValueError(f"{path} {'exists' if path.exists() else 'ends neither in .pth nor in .safetensors'}")
    if to == "torchvision":
        arguments = {name: value for name, value in about["unit_args"].items() if value}
        usual = {"basic": {"option": "B"}, "bottleneck": {"option": "B", "stride_on_3x3": True}}
        if arguments != usual.get(about["unit"]) or state["stem.0.weight"].shape[-1] != 7 or about["depth"] == 200:
            raise ValueError(
                f"{about['unit']}, {about['depth']} layers, {arguments}, is none of torchvision's nets, which are "
                "ImageNet's with option B and a bottleneck's stride on its 3x3"
            )
        state = {layout_name(to, key): tensor for key, tensor in state.items()}
    if path.suffix == ".safetensors":
        try:
            import safetensors.torch
        except ImportError:
            raise ValueError(f"pip install safetensors, or give {path} the ending .pth") from None
        said = {name: value for name, value in about.items() if name not in ("mean", "std") and to == "ours"}
        state |= {f"about.{name}": about[name].contiguous() for name in ("mean", "std") if said}
        content = safetensors.torch.save(state, {"about": json.dumps(said)})
    else:
        buffer = io.BytesIO()
        torch.save({"model": state, "about": about} if to == "ours" else state, buffer)
        content = buffer.getvalue()
    checkpoint.write(path, content)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FROM", help="a run's folder or a file")
    parser.add_argument("target", metavar="TO", help="a new file: .pth or .safetensors")
    layouts = "; ".join(f"{name}: {words}" for name, (words, _, _) in LAYOUTS.items())
    parser.add_argument("--layout", choices=LAYOUTS, help=f"what FROM does not tell ({layouts})")
    parser.add_argument("--to", choices=("ours", "torchvision"), default="ours", help="the names in TO (default ours)")
    args = parser.parse_args()
    checkpoint.prepare_streams()
    try:
        net, about = load(args.source, args.layout)
        save(net, about, args.target, args.to)
    except (ValueError, OSError) as error:
        checkpoint.fail(error)
    size = f"{pathlib.Path(args.target).stat().st_size:,} bytes"
    classes = data.counted(len(about["classes"]), "class", "classes")
    lost = "; without their names, mean, std and size, for which torchvision has no place: keep what it was made from"
    checkpoint.print_out(
        f"{args.target}: {about['unit']}, {about['depth']} layers, {classes}, {size}{lost * (args.to == 'torchvision')}"
    )


if __name__ == "__main__":
    sys.exit(main())
