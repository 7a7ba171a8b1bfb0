"""weights.py and hubconf.py: others' nets against second implementations of theirs, runs of every age, there and back,
and files that are damaged, foreign or malicious."""

import json
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, linear, max_pool2d, pad, relu

import cifar_train
import data
import imagenet_train
import models
import units
import weights
from conftest import HERE, SHARED

SCRIPT = cifar_train  # what `start` runs


def filled(net, seed=1):
    """The net with random weights and random statistics, in eval mode; made on the meta device, or anew."""
    torch.manual_seed(seed)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if t.dim() > 1:
                t.normal_(0, (2 / t[0].numel()) ** 0.5)
            elif name.endswith(("weight", "running_var")):
                t.uniform_(0.5, 1)
            elif t.dim():  # not num_batches_tracked
                t.normal_(0, 0.1)
    return net.eval()


def small_run(folder, about=True, **flags):
    """A CIFAR run of one unit a stage, written by hand; without about as runs were before they knew their classes."""
    flags = {"dataset": "cifar10", "depth": 8, "unit": "basic-preact", "unit_args": {"option": "A"}} | flags
    net = filled(models.cifar_resnet(8, units.UNITS[flags["unit"]], **flags["unit_args"]))
    input_of = {"mean": torch.rand(3, 32, 32) * 255, "std": torch.ones(3, 1, 1)}
    said = {"classes": [*"abcdefghij"], "size": 32} | input_of
    state = {"schema": 1, "flags": flags, "model": net.state_dict(), "iteration": 7}
    folder.mkdir()
    torch.save(state | ({"about": said} if about else input_of), folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps(flags | {"environment": {}}))
    return net, input_of


def equal(net, other):
    """Have two nets the same parameters and statistics, bit for bit?"""
    mine, theirs = net.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def main(monkeypatch, capsys, *words):
    """(exit status, lines of the error stream) of weights.py."""
    monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, words)])
    try:
        status = weights.main() or 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err.splitlines()


# torchvision


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_torchvision_there_and_back(depth, tmp_path, monkeypatch, capsys):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    theirs = filled(theirs).to(memory_format=torch.channels_last)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    net, about = weights.load(tmp_path / "theirs.pth")
    assert "layout torchvision (a bottleneck's stride on its 3x3" in capsys.readouterr().err
    assert (about["depth"], about["size"], about["classes"][1]) == (depth, 224, "goldfish")
    net.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(net(images), theirs(images))
    monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, (tmp_path / "theirs.pth", tmp_path / "back.pth"))])
    sys.argv += ["--to", "torchvision"]
    weights.main()
    assert "1,000 classes" in (out := capsys.readouterr().out) and "; without their names" in out
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(t, back[name]) for name, t in theirs.state_dict().items() if "num_batches" not in name)
    with torch.device("meta"):
        again = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    again.load_state_dict(back, assign=True)  # strict: no name is left, none is missing


def test_stride_of_a_bottleneck_is_the_layouts(tmp_path, capsys):
    """The same file is two nets; neither is taken for the other, and ours does not go out under torchvision's names."""
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(weights=None, num_classes=3)
    theirs = filled(theirs)
    torch.save({"state_dict": {f"module.{name}": t for name, t in theirs.state_dict().items()}}, tmp_path / "a.pth")
    nets = {name: weights.load(tmp_path / "a.pth", name) for name in ("torchvision", "torchvision-1x1")}
    strides = {name: (net.stages[1][0].conv1.stride, net.stages[1][0].conv2.stride) for name, (net, _) in nets.items()}
    assert strides == {"torchvision": ((1, 1), (2, 2)), "torchvision-1x1": ((2, 2), (1, 1))}
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        a, b = (net(images) for net, _ in nets.values())
    assert (a - b).abs().max() > 0.1 and capsys.readouterr().err == ""  # said by who asked
    net, about = nets["torchvision-1x1"]
    with pytest.raises(ValueError, match="none of torchvision's nets"):
        weights.save(net, about, tmp_path / "b.pth", to="torchvision")
    weights.save(net, about, tmp_path / "b.pth")
    again, _ = weights.load(tmp_path / "b.pth")
    assert again.stages[1][0].conv1.stride == (2, 2) and equal(again, net)


# CIFAR nets of others


def akamaster(option):
    """A state under akamaster's names, two units a stage, and a second implementation of its net."""
    torch.manual_seed(3)
    state = {}

    def bn(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"module.{name}.{part}"] = torch.rand(channels) + 0.5
        state[f"module.{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name, channels, before, size=3):
        state[f"module.{name}.weight"] = torch.randn(channels, before, size, size) / (before * size**2) ** 0.5

    conv("conv1", 16, 3), bn("bn1", 16)
    for stage, unit, before in ((1, 0, 16), (1, 1, 16), (2, 0, 16), (2, 1, 32), (3, 0, 32), (3, 1, 64)):
        channels = 8 * 2**stage
        place = f"layer{stage}.{unit}"
        conv(f"{place}.conv1", channels, before), bn(f"{place}.bn1", channels)
        conv(f"{place}.conv2", channels, channels), bn(f"{place}.bn2", channels)
        if option == "B" and before != channels:
            conv(f"{place}.shortcut.0", channels, before, 1), bn(f"{place}.shortcut.1", channels)
    state["module.linear.weight"], state["module.linear.bias"] = torch.randn(10, 64) / 8, torch.randn(10)

    def forward(x):
        s = {name.removeprefix("module."): t.double() for name, t in state.items()}

        def bn(x, name):
            mean, var, weight, bias = (
                s[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
            )
            return batch_norm(x, mean, var, weight, bias)

        x = relu(bn(conv2d(x, s["conv1.weight"], padding=1), "bn1"))
        for stage in (1, 2, 3):
            for unit in (0, 1):
                place, stride = f"layer{stage}.{unit}", 2 if stage > 1 and unit == 0 else 1
                y = relu(bn(conv2d(x, s[f"{place}.conv1.weight"], stride=stride, padding=1), f"{place}.bn1"))
                y = bn(conv2d(y, s[f"{place}.conv2.weight"], padding=1), f"{place}.bn2")
                if stride == 2 and option == "A":
                    x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
                elif stride == 2:
                    x = bn(conv2d(x, s[f"{place}.shortcut.0.weight"], stride=2), f"{place}.shortcut.1")
                x = relu(x + y)
        return linear(avg_pool2d(x, 8).flatten(1), s["linear.weight"], s["linear.bias"])

    return state, forward


@pytest.mark.parametrize("option, layout", [("A", "akamaster"), ("B", "akamaster"), ("B", "torchvision-cifar")])
def test_cifar_nets_of_others(option, layout, tmp_path):
    """Option A's channels are reordered, which changes nothing but the order of sums."""
    state, forward = akamaster(option)
    torch.save({"best_prec1": 91.0, "state_dict": state}, tmp_path / "net.th")
    net, about = weights.load(tmp_path / "net.th", layout)
    assert about["unit_args"] == {"option": option} and about["classes"][3] == "cat" and about["size"] == 32
    assert np.allclose(about["mean"].flatten() / 255, weights.LAYOUTS[layout][1], atol=1e-7)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        assert (net.double()(images) - forward(images)).abs().max() < 1e-10
    weights.save(net.float(), about, tmp_path / "ours.pth")
    again, said = weights.load(tmp_path / "ours.pth")  # as ours, nothing is reordered again
    assert equal(again, net) and said.keys() == about.keys()


# The authors' nets, in Detectron's format


class Python2(pickle._Pickler):
    """Writes as Python 2's pickle did, and numpy of that time: bytes are strings, and numpy.core has no underscore."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        short = len(value) < 256
        self.write((b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value)
        self.memoize(value)

    def save_name(self, value):
        self.write(f"c{value.__module__.replace('_core', 'core')}\n{value.__name__}\n".encode())
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[type] = dispatch[type(np.dtype)] = dispatch[type(np.array)] = save_name


def blobs_of(depth, bias, random=True):
    """Arrays under the names and in the shapes that the authors' nets have in Detectron's files."""
    rng = np.random.default_rng(5)
    blobs = {}

    def draw(low, high, *shape):
        return rng.uniform(low, high, shape).astype(np.float32) if random else np.broadcast_to(np.float32(0), shape)

    def conv(name, channels, before, size, bn=None):
        most = (3 / before) ** 0.5 / size
        blobs[f"{name}_w"] = draw(-most, most, channels, before, size, size)
        blobs[f"{bn or name + '_bn'}_s"] = draw(0.5, 1, channels)
        blobs[f"{bn or name + '_bn'}_b"] = draw(-0.2, 0.2, channels)

    conv("conv1", 64, 3, 7, "res_conv1_bn")
    if bias:
        blobs["conv1_b"] = draw(-2, 2, 64)
    before = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), models.UNITS_PER_STAGE[depth], strict=True), 2):
        for unit in range(count):
            place = f"res{stage}_{unit}_branch"
            if unit == 0:
                conv(place + "1", 4 * width, before, 1)
            conv(place + "2a", width, before, 1)
            conv(place + "2b", width, width, 3)
            conv(place + "2c", 4 * width, width, 1)
            before = 4 * width
    return blobs | {"fc1000_w": draw(-0.04, 0.04, 1000, 2048), "fc1000_b": draw(-0.2, 0.2, 1000)}


def as_caffe(blobs, bgr):
    """The logits of the authors' net, computed from the blobs: [1]'s, with BN as scale and offset."""
    w = {name: torch.from_numpy(blob).double() for name, blob in blobs.items()}

    def layer(x, name, bn=None, **how):
        x = conv2d(x, w[f"{name}_w"], w.get(f"{name}_b"), **how)
        return x * w[f"{bn or name + '_bn'}_s"].view(-1, 1, 1) + w[f"{bn or name + '_bn'}_b"].view(-1, 1, 1)

    x = max_pool2d(relu(layer(bgr, "conv1", "res_conv1_bn", stride=2, padding=3)), 3, 2, ceil_mode=True)
    for stage, count in enumerate((3, 4, 6, 3), 2):
        for unit in range(count):
            place, stride = f"res{stage}_{unit}_branch", 2 if stage > 2 and unit == 0 else 1
            y = relu(layer(x, place + "2a", stride=stride))
            y = layer(relu(layer(y, place + "2b", padding=1)), place + "2c")
            x = relu(y + (layer(x, place + "1", stride=stride) if unit == 0 else x))
    return linear(x.mean(dim=(2, 3)), w["fc1000_w"], w["fc1000_b"])


def test_msra_logits(tmp_path):
    """A file as Detectron's R-50.pkl, with a bias of conv1, on pixels as they come."""
    blobs = blobs_of(50, bias=True)
    with open(tmp_path / "R-50.pkl", "wb") as file:
        Python2(file, protocol=2).dump({"blobs": blobs | {"fc1000_w_momentum": blobs["fc1000_b"]}})
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in (tmp_path / "R-50.pkl").read_bytes()[:200]
    net, about = weights.load(tmp_path / "R-50.pkl")
    assert about["unit_args"] == {"option": "B", "caffe_pool": True} and about["depth"] == 50
    pixels = torch.randint(0, 256, (2, 3, 64, 96)).double()  # RGB
    bgr = pixels.flip(1) - torch.tensor([102.9801, 115.9465, 122.7717], dtype=torch.float64).view(3, 1, 1)
    with torch.inference_mode():
        ours, theirs = net.double()((pixels - about["mean"]) / about["std"]), as_caffe(blobs, bgr)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("depth, names", [(50, 161), (101, 314), (152, 467)])
def test_msra_names(depth, names):
    blobs = blobs_of(depth, bias=False, random=False)
    blobs = {name: torch.empty(blob.shape, device="meta") for name, blob in blobs.items()}
    _, found = weights.skeleton(blobs, weights.foreign(blobs, "msra"), "msra")
    assert len(blobs) == len({*found.values()}) == names and {*found.values()} == {*blobs}


def test_pickles_of_numpy_today(tmp_path):
    """Read back by the restricted unpickler whatever numpy wrote them, in Fortran's order too; of objects, refused."""
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3))}
    for protocol in (3, 4):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol))
        state, _ = weights.read(tmp_path / "a.pkl")
        assert all(torch.equal(state[name], torch.arange(6.0).view(2, 3)) for name in "ab")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.array([None])}, 3))
    with pytest.raises(ValueError, match="none of numbers"):
        weights.read(tmp_path / "a.pkl")


# Runs, and files of ours


@pytest.mark.parametrize("about", [True, False])
@pytest.mark.parametrize("place", ["", "checkpoint.pt"])
def test_cifar_runs_of_every_age(about, place, tmp_path):
    net, input_of = small_run(tmp_path / "run", about)
    loaded, found = weights.load(tmp_path / "run" / place)
    assert equal(loaded, net) and not loaded.training
    assert found["classes"] == ([*"abcdefghij"] if about else weights.CIFAR10) and found["size"] == 32
    assert torch.equal(found["mean"], input_of["mean"]) and torch.equal(found["std"], input_of["std"])


def test_imagenet_run_of_before(tmp_path):
    flags = {"dataset": "imagenet", "depth": 18, "unit": "basic", "unit_args": {"option": "A"}, "crop": 64}
    with torch.device("meta"):
        net = models.imagenet_resnet(18, units.Basic, 2, option="A")
    filled(net)
    torch.save(
        {"schema": 1, "flags": flags, "model": net.state_dict(), "classes": ["n1", "n2"]}, tmp_path / "checkpoint.pt"
    )
    (tmp_path / "config.json").write_text(json.dumps(flags))
    loaded, about = weights.load(tmp_path)
    assert equal(loaded, net) and about["classes"] == ["n1", "n2"] and about["size"] == 64
    pixels = torch.randint(0, 256, (2, 8, 8, 3))
    ours = (pixels.permute(0, 3, 1, 2) - about["mean"]) / about["std"]
    assert (ours - data.normalise(pixels)).abs().max() < 1e-5


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_alone(ending, tmp_path, monkeypatch, capsys):
    """What weights.py writes rebuilds the net without the run, and says all that the run said; a second run of the
    command does not write over the first one's file."""
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    net, _ = small_run(
        tmp_path / "run", unit="basic-constant-scaling", unit_args={"option": "B", "residual_scale": 1.0}
    )
    command = tmp_path / "run", tmp_path / f"alone.{ending}"
    assert main(monkeypatch, capsys, *command) == (0, [])
    (loaded, about), (_, before) = weights.load(command[1]), weights.load(command[0])
    assert equal(loaded, net) and loaded.stages[0][0].residual_scale == 1.0 and about.keys() == before.keys()
    assert all(torch.equal(about[k], v) if isinstance(v, torch.Tensor) else about[k] == v for k, v in before.items())
    status, (error,) = main(monkeypatch, capsys, *command)
    assert status == 2 and "exists" in error


def test_safetensors_that_are_not_installed(tmp_path, monkeypatch, capsys):
    """The file is not called damaged."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "net.safetensors").write_bytes(b"whole")
    status, (error,) = main(monkeypatch, capsys, tmp_path / "net.safetensors", tmp_path / "net.pth")
    assert status == 2 and error.endswith("net.safetensors can only be read with safetensors: pip install safetensors")


# Bad input


class Trap:
    """Unpickled by pickle.load, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.write_text, (self.path, "executed")


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, capsys):
    trap = pickle.dumps({"conv1_w": Trap(tmp_path / "executed")}, 2)
    pickle.loads(trap)
    assert (tmp_path / "executed").exists()  # it would
    (tmp_path / "executed").unlink()
    (tmp_path / "a.pkl").write_bytes(trap)
    (tmp_path / "b.pkl").write_bytes(b"cnumpy\nload\n(S'/etc/hostname'\ntR.")  # of numpy, and not what arrays need
    (tmp_path / "c.pth").write_bytes(trap)
    torch.save({"state_dict": Trap(tmp_path / "executed")}, tmp_path / "d.pth")
    torch.save({"model": {"stem.0.weight": Trap(tmp_path / "executed")}, "flags": {}}, tmp_path / "e.pt")
    for path in sorted(tmp_path.glob("*.p*")):
        status, (error,) = main(monkeypatch, capsys, path, tmp_path / "to.pth")
        assert status == 2 and "nothing of it was executed" in error, error
    assert not (tmp_path / "executed").exists() and not (tmp_path / "to.pth").exists()


def test_truncated_files(tmp_path, monkeypatch, capsys):
    small_run(tmp_path / "run")
    weights.save(*weights.load(tmp_path / "run"), tmp_path / "a.pth")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": np.zeros((64, 3, 7, 7), np.float32)}}, 2))
    torch.save({"conv1.weight": torch.zeros(9)}, tmp_path / "c.th", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "a.pth", tmp_path / "b.pkl", tmp_path / "c.th"):
        whole = path.read_bytes()
        for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            status, (error,) = main(monkeypatch, capsys, path, tmp_path / "to.pth")
            assert status == 2 and str(path) in error and "damaged" in error
    whole = bytearray((tmp_path / "run" / "checkpoint.pt").read_bytes())
    whole[len(whole) // 2] ^= 4
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole)
    for place in ("run", "run/checkpoint.pt"):
        status, (error,) = main(monkeypatch, capsys, tmp_path / place, tmp_path / "to.pth")
        assert status == 2 and "damaged" in error


def test_what_does_not_fit_is_listed(tmp_path, monkeypatch, capsys):
    """Another net's file, a wrong layout, a wrong count of classes, an `about` that lies: each in one line."""
    run, _ = small_run(tmp_path / "run")
    ours, about = run.state_dict(), weights.load(tmp_path / "run")[1]
    theirs, _ = akamaster("A")
    deep = {name: t for name, t in ours.items() if not name.startswith("stages.2")}
    with torch.device("meta"):
        next50 = torchvision.models.resnext50_32x4d().state_dict()
    next50 = {name: torch.zeros(t.shape, dtype=torch.float16) for name, t in next50.items()}
    nan = {name: t * torch.nan for name, t in ours.items()}

    def said(**other):
        return {"model": ours, "about": about | other}

    cases = [
        ({"features.0.weight": torch.zeros(2)}, None, "no layout has names such as features.0.weight"),
        (next50, None, "layer1.0.conv1.weight is 128 x 64 x 1 x 1 and not 64 x 64 x 1 x 1"),
        (theirs, "torchvision-cifar", "layer2.0.downsample.0.weight is missing"),
        (theirs, "msra", "layout msra begins with conv1_w, and its names are conv1.weight, "),
        (next50, "akamaster", "depth 50 is impossible"),
        (theirs, "torchvision", "depth 14 is impossible"),
        (theirs, "ours", "which unit"),
        (theirs | {"module.layer3.0.extra": torch.zeros(1)}, None, "layer3.0.extra has no place"),
        (said(), "akamaster", "begins with conv1.weight"),
        (ours, None, "which unit"),
        (said(classes=["a", "b"]), None, "fc.weight is 10 x 64 and not 2 x 64"),
        (said(depth=6 * 10**9 + 2), None, "3 units"),
        (said(unit="none"), None, "KeyError"),
        (said(unit_args={"option": "D"}), None, "option must be A, B or C"),
        (said(mean=torch.zeros(3, 7, 7)), None, "mean or std"),
        (said(size=None), None, "size is no number"),
        ({"model": deep, "about": about}, None, "2 units"),
        ({"model": nan, "about": about}, None, "not finite"),
        ([1, 2], None, "holds no weights"),
        ({"model": {"a": 1}}, None, "no dict of names and tensors"),
        ({"flags": {}, "model": ours}, None, "lacks"),
        (theirs | {"module.linear.weight": torch.zeros(1).expand(10**12, 64)}, None, "larger than itself"),
    ]
    for n, (content, layout, words) in enumerate(cases):
        torch.save(content, tmp_path / f"{n}.pth")
        options = ["--layout", layout] if layout else []
        status, errors = main(monkeypatch, capsys, tmp_path / f"{n}.pth", tmp_path / "to.pth", *options)
        assert status == 2 and words in errors[-1] and f"{n}.pth" in errors[-1], (n, errors)
        assert len(errors) == 1 + errors[0].count("taken for layout"), errors
    for path in ("nowhere.pth", "run/config.json", "."):
        status, (error,) = main(monkeypatch, capsys, tmp_path / path, tmp_path / "to.pth")
        assert status == 2 and str(tmp_path / path) in error
    status, (error,) = main(monkeypatch, capsys, tmp_path / "run", tmp_path / "to.txt")
    assert status == 2 and ".pth" in error
    assert not (tmp_path / "to.pth").exists()


# torch.hub


def test_hub_from_another_folder(tmp_path, monkeypatch):
    """As a stranger's program: neither the repository's folder nor its modules are there before."""
    small_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and pathlib.Path(p).resolve() != HERE])
    for name in ("checkpoint", "data", "models", "units", "weights"):
        monkeypatch.delitem(sys.modules, name)
    net = torch.hub.load(str(HERE), "cifar_resnet", depth=110, unit="basic-preact", source="local")
    assert sum(p.numel() for p in net.parameters()) == 1_727_962
    assert type(net).__module__ == "models" and sys.modules["models"] is not models
    net = torch.hub.load(str(HERE), "imagenet_resnet", source="local", depth=18, unit="basic", num_classes=3)
    assert net.fc.out_features == 3
    net, about = torch.hub.load(str(HERE), "load", "run", source="local")
    assert isinstance(net, nn.Module) and about["depth"] == 8
    with pytest.raises(ValueError, match="choose from basic, "):
        torch.hub.load(str(HERE), "cifar_resnet", unit="block", source="local")


# --weights and --evaluate in the training scripts

CIFAR = "--dataset synthetic --images 40 --batch-size 8 --iterations 3 --device cpu --out run".split()
IMAGENET = (
    "--dataset synthetic --images 10 --crop 32 --batch-size 8 --micro-batch 8 --epochs 1 --workers 0 --device cpu"
)
IMAGENET = [*IMAGENET.split(), "--out", "run"]


def test_cifar_run_that_begins_from_weights(start, tmp_path, monkeypatch):
    """At a learning rate that changes nothing, the run's net is the file's, with the file's input; the run's
    own file does not begin it, and another file begins another run."""
    net, input_of = small_run(tmp_path / "before")
    words = [*CIFAR, "--lr", "1e-30", "--weights"]
    status, printed = start(*words, "before")
    assert status == 0 and "the fc of before stays, though the names of its 10 classes differ: a ... j and " in printed
    after, about = weights.load("run")
    assert all((p - q).abs().max() < 1e-20 for p, q in zip(net.parameters(), after.parameters(), strict=True))
    assert torch.equal(about["mean"], input_of["mean"]) and about["unit"] == "basic-preact" and about["depth"] == 8
    weights.save(*weights.load("before"), "before.pth")
    status, printed = start(*words, "before.pth")
    assert status == 0 and "already finished" in printed  # the same weights
    status, printed = start(*words, "run")
    assert status == 2 and "--weights is " in printed
    status, printed = start(*words[:-1])
    assert status == 2 and "--depth is 8 there and 20 here" in printed


def test_imagenet_run_that_begins_with_another_fc(start, tmp_path):
    """The normalisation and pooling of the authors' nets go on in the run that begins from one of 3 classes."""
    with torch.device("meta"):
        net = filled(models.imagenet_resnet(18, units.Basic, 3, caffe_pool=True))
    about = {"depth": 18, "unit": "basic", "unit_args": {"option": "B", "caffe_pool": True}, "classes": [*"xyz"]}
    weights.save(net, about | {"size": 224} | weights.grey_levels(*weights.LAYOUTS["msra"][1:]), tmp_path / "a.pth")
    status, printed = start(*IMAGENET, "--lr", "1e-30", "--weights", "a.pth", script=imagenet_train)
    said = "a.pth has 3 classes: its last layer (fc) is replaced by a new, untrained one for 10\n"
    assert status == 0 and said in printed
    after, about = weights.load("run")
    assert about["unit_args"] == {"option": "B", "caffe_pool": True} and about["size"] == 32
    assert torch.allclose(about["mean"].flatten(), torch.tensor([122.7717, 115.9465, 102.9801]))
    pairs = [*zip(net.parameters(), after.parameters(), strict=True)]
    assert (
        all((p - q).abs().max() < 1e-20 for p, q in pairs[:-2])
        and after.fc.out_features == 10
        and after.fc.bias.abs().max() < 1e-20
    )
    status, printed = start("--evaluate", "run", "--workers", 0, "--device", "cpu", script=imagenet_train)
    errors = json.loads(pathlib.Path("run", "1-crop.json").read_text())
    row = pathlib.Path("run", "log.csv").read_text().splitlines()
    assert status == 0 and errors["top1"] == float(
        dict(zip(row[0].split(","), row[-1].split(","), strict=True))["val_top1"]
    )


def test_a_file_is_evaluated_as_its_run(start, tmp_path):
    small_run(
        tmp_path / "run", dataset="synthetic", images=40, val_split=0, recipe="paper", precision="float32", iterations=9
    )
    weights.save(*weights.load("run"), "alone.pth")
    _, of_run = start("--evaluate", "run", "--device", "cpu")
    status, of_file = start("--evaluate", "alone.pth", "--dataset", "synthetic", "--images", 40, "--device", "cpu")
    assert status == 0 and of_run.startswith("run: test error ") and of_run.endswith(" after 7 of 9 iterations\n")
    assert of_file == of_run.replace("run:", "alone.pth:").replace(" after 7 of 9 iterations", "")


@pytest.mark.parametrize("released", [True, False])
def test_a_file_under_the_papers_protocols(released, start, tmp_path):
    """The authors' own nets stand beside what they published and the paper, others' beside the paper. Of a net that
    knows its input, its logits and errors are those of its own normalisation."""
    with torch.device("meta"):
        net = filled(models.imagenet_resnet(50, units.Bottleneck, 10, caffe_pool=released))
    about = {
        "depth": 50,
        "unit": "bottleneck",
        "unit_args": {"option": "B"} | ({"caffe_pool": True} if released else {}),
    }
    about |= {"classes": [*"abcdefghij"], "size": 32} | weights.grey_levels((0.1, 0.2, 0.3), (0.01, 0.02, 0.03))
    weights.save(net, about, tmp_path / "net.pth")
    words = "--evaluate net.pth --dataset synthetic --images 20 --workers 0 --device cpu --test 1-crop,10-crop".split()
    status, printed = start(*words, script=imagenet_train)
    val, hits = data.imagenet_part("synthetic", None, "val", 20), 0
    for i in range(len(val)):
        (pixels,) = data.test_views(val.open(i), i, "1-crop", 32)
        logits = net((pixels.permute(2, 0, 1)[None].float() - about["mean"]) / about["std"])
        hits += int(logits.argmax() == val.labels[i])
    first, second = printed.splitlines()
    assert status == 0 and f"1-crop top-1 error {100 - 100 * hits / len(val):.2f} %" in first
    assert ("(published for these weights: 24.7, 7.8)" in first) == released
    assert second.endswith(
        " (published for these weights: 22.9, 6.7)" * released + " (the paper, all of ImageNet: 22.85, 6.71)"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth"]


def test_weights_that_contradict(start, tmp_path):
    small_run(tmp_path / "before")
    with torch.device("meta"):
        net = filled(models.imagenet_resnet(18, units.Basic, 10))
    about = {"depth": 18, "unit": "basic", "unit_args": {"option": "B"}, "classes": [*"abcdefghij"], "size": 32}
    weights.save(net, about | weights.grey_levels(data.MEAN, data.STD), tmp_path / "large.pth")
    cifar = [
        ("--weights before --depth 14", "--depth contradicts --weights: before is basic-preact, depth 8"),
        ("--weights before --unit basic", "--unit contradicts --weights"),
        ("--weights before --unit-arg option=B", "cannot be combined with --weights"),
        ("--weights before --fan-in", "--fan-in cannot be combined with --weights"),
        ("--weights large.pth", "imagenet_train.py takes it"),
        ("--evaluate large.pth", "imagenet_train.py takes it"),
        ("--weights nowhere", "nowhere: weights come from"),
        ("--layout msra", "--layout goes with --weights"),
        ("--weights before --layout msra", "begins with conv1_w"),
        ("--evaluate before/checkpoint.pt --dataset cifar100", "10 classes, unlike --dataset cifar100"),
    ]
    imagenet = [
        ("--weights before", "cifar_train.py takes it"),
        ("--evaluate before/checkpoint.pt", "cifar_train.py takes it"),
        ("--weights large.pth --preact", "--preact contradicts --weights: large.pth is basic, depth 18"),
        ("--evaluate large.pth --recompute-bn 8", "--evaluate cannot be combined with --recompute-bn"),
        ("--evaluate before --layout ours", "--evaluate cannot be combined with --layout"),
    ]
    for script, cases in ((cifar_train, cifar), (imagenet_train, imagenet)):
        for words, message in cases:
            status, printed = start(*words.split(), "--device", "cpu", script=script)
            assert status == 2 and message in printed and "Traceback" not in printed, printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "large.pth"]


def test_a_file_of_another_count_of_classes(start, tmp_path):
    with torch.device("meta"):
        net = filled(models.imagenet_resnet(18, units.Basic, 3))
    about = {"depth": 18, "unit": "basic", "unit_args": {"option": "B"}, "classes": [*"abc"], "size": 32}
    weights.save(net, about | weights.grey_levels(data.MEAN, data.STD), tmp_path / "a.pth")
    status, printed = start("--evaluate", "a.pth", "--dataset", "synthetic", "--device", "cpu", script=imagenet_train)
    assert status == 2 and "a.pth is of 3 classes (a ... c) and the images of 10 classes (class0 ... class9)" in printed


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the real CIFAR-10 does not lie beside the project")
def test_weights_under_results_have_their_runs_error(start, tmp_path):
    subprocess.run([sys.executable, SHARED / "data" / "unpack_cifar10.py", tmp_path], check=True, capture_output=True)
    files = sorted((HERE / "results").rglob("weights.pth"))
    assert files
    for file in files:
        error = json.loads((file.parent / "result.json").read_text())["test_error"]
        status, printed = start("--evaluate", file, "--data", tmp_path)
        assert status == 0 and f"test error {error:.2f} %" in printed


def test_a_run_without_its_checkpoint_names_its_weights(start):
    run = HERE / "results" / "cifar10" / "20" / "seed1"
    status, printed = start("--evaluate", run)
    assert status == 2 and f"its weights alone are in {run / 'weights.pth'}" in printed and "Traceback" not in printed
