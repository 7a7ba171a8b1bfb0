"""What imagenet_train.py and data.py's ImageNet half do: views against second implementations, exact evaluation,
equality over processes, interrupted runs, bad input. No test looks at a clock."""

import csv
import functools
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import checkpoint
import cifar_train
import conftest
import data
import imagenet_train
import models
import predict
import training
import units
from conftest import HERE, start_workers

SCRIPT = imagenet_train  # what `flags` and `start` run

TINY = "--dataset synthetic --images 20 --depth 18 --crop 32 --batch-size 8 --micro-batch 4 --epochs 2 --workers 0 "
TINY = [*TINY.split(), "--device", "cpu"]  # 5 iterations, a row after each; after 1, 3 and 5 also an evaluation


NARROW = functools.partial(models.imagenet_resnet, width=8)  # a 60th of the weights, to compute with and to write


@pytest.fixture
def narrow(monkeypatch):
    """Nets an eighth as wide, for tests of all but the nets."""
    monkeypatch.setattr(imagenet_train, "imagenet_resnet", NARROW)


def be_narrow(*words):
    """What a forked process does, with such nets."""
    models.imagenet_resnet = NARROW
    conftest.be(*words)


def photograph(width=500, height=375, seed=0):
    """Smooth colours with some noise: like a photograph to JPEG and to a scaling."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray((np.array(coarse) // 2 + rng.integers(0, 32, (height, width, 3))).astype(np.uint8))


# Nets


def copied(ours, theirs):
    """Our net with the weights of torchvision's, whose layers stand in the same order."""
    weights = [value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")]
    state = ours.state_dict()
    state.update(zip(state, weights, strict=True))
    ours.load_state_dict(state)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("depth", (18, 34, 50))
def test_nets_equal_torchvisions(depth):
    """ResNet-18 and -34, option B; the bottleneck nets when the one known difference, the stride's place, is moved."""
    import torchvision

    unit = units.Basic if depth < 50 else units.Bottleneck
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.0)
    ours, theirs = copied(models.imagenet_resnet(depth, unit), theirs)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = theirs(x)
        if depth == 50:
            assert (ours(x) - expected).abs().max() > 1e-2
            for stage in list(ours.stages)[1:]:
                assert (stage[0].conv1.stride, stage[0].conv2.stride) == ((2, 2), (1, 1))
                stage[0].conv1.stride, stage[0].conv2.stride = (1, 1), (2, 2)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_net_of_a_depth(flags):
    for depth, name in ((18, "basic"), (34, "basic"), (50, "bottleneck"), (101, "bottleneck"), (200, "bottleneck")):
        args = flags("--depth", depth)
        assert args.unit == name and args.unit_args["option"] == "B"
        assert flags("--depth", depth, "--preact").unit == name + "-preact"
    assert flags("--depth", 34, "--unit-arg", "option=A").unit_args == {"option": "A"}
    args = flags("--depth", 101, "--unit", "bottleneck-exclusive-gating", "--unit-arg", "gate_bias=-7")
    assert args.unit_args == {"option": "B", "stride_on_3x3": False, "gate_bias": -7.0, "gate_bn": False}
    assert flags("--depth", 18, "--unit", "basic-plain").unit_args == {}


def test_learning_rate(flags):
    args = flags()
    assert (args.batch_size, args.micro_batch, args.lr, args.epochs) == (256, 32, 0.1, 90)
    iterations = round(90 * 1_281_167 / 256)
    drop = round(30 * 1_281_167 / 256)
    points = (0, drop - 1, drop, 2 * drop, iterations - 1)
    assert [imagenet_train.lr_at(t, iterations, args.lr) for t in points] == [0.1, 0.1, 0.01, 0.001, 0.001]


# Evaluation


@pytest.fixture
def folders(tmp_path, narrow):
    """A data folder: 7 classes with 3 images each to train on and 3 to validate, of several sizes and one grey."""
    for part in ("train", "val"):
        for c in range(7):
            folder = tmp_path / "data" / part / f"n{c}"
            folder.mkdir(parents=True)
            for i in range(3):
                image = photograph(60 + 20 * i, 50 + 7 * c, seed=100 * c + 10 * (part == "val") + i)
                (image.convert("L") if i == 2 else image).save(folder / f"{i}.JPEG", quality=95)
    return tmp_path / "data"


def naive_errors(nets, root, crop, shorts, cut):
    """Top-1 and top-5 error (%) image by image and view by view, by a second implementation (but for the scaling, which
    the tests above compare with PIL's)."""
    wrong, n = [0, 0], 0
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for label, folder in enumerate(sorted((root / "val").iterdir())):
        for path in sorted(folder.iterdir()):
            image, scores = Image.open(path).convert("RGB"), 0
            for short in shorts:
                scale = round(short * crop / 224) / min(image.size)
                width, height = (max(round(short * crop / 224), round(side * scale)) for side in image.size)
                for view in cut(data.resize(torch.from_numpy(np.array(image)), height, width)):
                    x = (view.permute(2, 0, 1) / 255 - mean) / std
                    for net in nets:
                        scores = scores + net.eval()(x[None])[0].softmax(0)
            order = scores.argsort(descending=True).tolist()
            wrong[0] += order[0] != label
            wrong[1] += label not in order[:5]
            n += 1
    return [100 * w / n for w in wrong]


def trained(start, folders, crop):
    """Two runs of a few steps on the folders, with fc layers that tell their images apart."""
    for seed in (1, 2):
        words = ["--data", folders, "--depth", 18, "--crop", crop, "--batch-size", 6, "--micro-batch", 3, "--epochs", 1]
        words += ["--lr", 1e-3, "--seed", seed, "--device", "cpu", "--workers", 0, "--out", f"run{seed}"]
        status, printed = start(*words)
        assert status == 0, printed
        state = checkpoint.load(f"run{seed}")
        net = NARROW(18, units.Basic, 7)
        net.load_state_dict(state["model"])
        images = data.ImageFiles(folders / "val")
        views = [data.scale(images.open(i), crop, np.random.default_rng(0)) for i in range(len(images))]
        with torch.no_grad():
            features = []
            net.fc.register_forward_pre_hook(lambda fc, x, features=features: features.append(x[0]))
            net.eval()(data.normalise(torch.stack(views)))
            spread = (features[0] - features[0].mean(dim=0)) / features[0].std()
            net.fc.weight.copy_(spread[::3] / 10)
            net.fc.bias.copy_(-net.fc.weight @ features[0].mean(dim=0))
        state["model"] = net.state_dict()
        torch.save(state, f"run{seed}/checkpoint.pt")
    return [pathlib.Path("run1"), pathlib.Path("run2")]


def test_evaluation_equals_a_naive_one(start, folders):
    runs = trained(start, folders, 48)
    nets = []
    for run in runs:
        net = NARROW(18, units.Basic, 7)
        net.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
        nets.append(net.double().float())

    def ten(x):
        h, w = x.shape[:2]
        places = [(0, 0), (0, w - 48), (h - 48, 0), (h - 48, w - 48), ((h - 48) // 2, (w - 48) // 2)]
        crops = [x[top : top + 48, left : left + 48] for top, left in places]
        return crops + [crop.flip(1) for crop in crops]

    def centre(size):
        return lambda x: [x[(x.shape[0] - size) // 2 :, (x.shape[1] - size) // 2 :][:size, :size]]

    protocols = {
        "1-crop": ([256], centre(48)),
        "1-crop-320": ([320], centre(69)),
        "10-crop": ([256], ten),
        "multi-scale": ([224, 256, 384, 480, 640], lambda x: [x, x.flip(1)]),
    }
    status, printed = start("--evaluate", *runs, "--test", ",".join(protocols), "--out", "both", "--device", "cpu")
    assert status == 0, printed
    result, different = json.loads(pathlib.Path("both/result.json").read_text()), set()
    for protocol, how in protocols.items():
        with torch.inference_mode():
            expected = naive_errors(nets, folders, 48, *how)
        for found in (result[protocol], json.loads(pathlib.Path(f"both/{protocol}.json").read_text())):
            assert [found["top1"], found["top5"]] == expected and found["images"] == 21, protocol
        different.add(tuple(expected))
        assert f"both: {protocol} top-1 error {expected[0]:.2f} %, top-5 {expected[1]:.2f} %" in printed
    assert result["runs"] == ["run1", "run2"] and len(different) > 2  # hardly a protocol would pass for another
    status, printed = start("--evaluate", *runs[::-1], "--out", "both", "--device", "cpu")
    assert status == 2 and "--out both holds the evaluation of run1, run2" in printed
    # one run: into its own folder, the same counts whatever the size of the batches
    with torch.inference_mode():
        expected = naive_errors(nets[:1], folders, 48, *protocols["1-crop"])
    for size in (1, 7, 32):
        status, printed = start("--evaluate", "run1", "--batch-size", size, "--workers", size % 3, "--device", "cpu")
        assert status == 0 and "run1: 1-crop top-1 error" in printed
        found = json.loads(pathlib.Path("run1/1-crop.json").read_text())
        assert [found["top1"], found["top5"]] == expected


def test_counts_do_not_depend_on_processes(start, folders):
    """21 images on 2 processes and 7 at a time: the last batches are of 4 and 3."""
    (run, _) = trained(start, folders, 32)
    words = ["imagenet_train.py", "--evaluate", run.resolve(), "--device", "cpu", "--workers", 0]
    words += ["--test", ",".join(data.PROTOCOLS)]
    found = {}
    for world, size in ((1, 32), (2, 7), (3, 1)):
        assert start_workers(world, *words, "--batch-size", size, target=be_narrow) == [0] * world
        found[world, size] = [json.loads((run / f"{name}.json").read_text()) for name in data.PROTOCOLS]
    assert all(numbers == found[1, 32] for numbers in found.values())


def test_recomputed_bn_is_the_true_average(flags, world_of_one):
    """Over the stream that goes on after training; of the first layer for several batches, of all for one."""
    args = flags(*TINY)
    images = data.load_imagenet("synthetic", None, 20)[0]
    device = torch.device("cpu")
    torch.manual_seed(0)
    net = models.imagenet_resnet(18, units.Basic, 10)
    stream = data.image_batches(args.seed, 20, 4, 4, range(1), 5)
    batches = []
    for keys in (next(stream) for _ in range(3)):
        views = [data.augmented(images.open(i), epoch, i, "scale", 32, args.seed) for epoch, i in keys]
        batches.append(data.normalise(torch.stack([v for v, _ in views]), torch.stack([d for _, d in views])))
    imagenet_train.recompute_bn(net, images, 12, args, 5, 0, device)
    with torch.inference_mode():
        y = torch.cat([net.stem[0](x) for x in batches]).double()
    torch.testing.assert_close(net.stem[1].running_mean.double(), y.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)
    variance = y.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(net.stem[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    outputs = {}
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda layer, x, name=name: outputs.update({name: x[0]}))
    with torch.no_grad():
        net.train()(batches[0])
    imagenet_train.recompute_bn(net, images, 4, args, 5, 0, device)
    statistics = net.state_dict()
    assert len(outputs) == 20
    for name, x in outputs.items():
        torch.testing.assert_close(statistics[f"{name}.running_mean"], x.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-4)
        variance = x.var(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(statistics[f"{name}.running_var"], variance, rtol=1e-3, atol=1e-4)


def test_the_papers_errors_stand_beside_ours(flags):
    def figures(protocol, *words):
        return imagenet_train.papers_errors(flags(*words), protocol)

    assert figures("10-crop", "--depth", 50) == " (the paper, all of ImageNet: 22.85, 6.71)"
    assert figures("multi-scale", "--depth", 152) == " (the paper, all of ImageNet: 19.38, 4.49)"
    assert figures("1-crop", "--depth", 152).endswith("23.0, 6.7)")
    assert figures("1-crop-320", "--depth", 200, "--preact").endswith("20.7, 5.3)")
    facebooks = "--unit", "bottleneck-preact-stride-on-3x3", "--augment", "scale-aspect"
    assert figures("1-crop-320", "--depth", 200, *facebooks).endswith("20.1, 4.8)")
    assert not figures("1-crop-320", "--depth", 200, "--preact", *facebooks[2:])
    assert figures("10-crop", "--depth", 18, "--unit-arg", "option=A").endswith(": 27.88)")
    assert figures("10-crop", "--depth", 34, "--unit-arg", "option=C").endswith("24.19, 7.40)")
    assert figures("10-crop", "--depth", 34, "--unit", "basic-plain").endswith("28.54, 10.02)")
    assert figures("1-crop", "--depth", 101, "--unit", "bottleneck-bn-after-add").endswith("24.6, 7.5)")
    assert figures("10-crop", "--depth", 18) == ""


# Training


def twenty_steps(path):
    """Train for 20 steps of 4 micro-batches in float64 as one of dist.get_world_size() processes. (With --crop 32 BN
    would see 2 values in the last stage, and multiply what rounding leaves.)"""
    words = "--dataset synthetic --images 40 --depth 18 --crop 40 --batch-size 8 --micro-batch 2 --epochs 4 --workers 0"
    words += " --lr 0.05 --augment scale-aspect --device cpu --out"
    sys.argv = ["imagenet_train.py", *words.split(), str(path.with_name(f"{dist.get_world_size()} processes"))]
    torch.manual_seed(0)
    net = NARROW(18, units.BasicPreAct, 10).double()
    net.register_forward_pre_hook(lambda net, inputs: inputs[0].double())
    errors, evaluate, make = [], imagenet_train.evaluate, imagenet_train.imagenet_resnet
    imagenet_train.evaluate = lambda *words: errors.append(evaluate(*words)) or errors[-1]
    args = imagenet_train.parse_flags()
    imagenet_train.imagenet_resnet = lambda *words, **more: net
    assert imagenet_train.train(args, torch.device("cpu")) == 0
    imagenet_train.evaluate, imagenet_train.imagenet_resnet = evaluate, make
    torch.save({"net": net.state_dict(), "errors": errors}, path)


def test_one_process_and_four_agree(tmp_path, world_of_one):
    twenty_steps(tmp_path / "1-0")
    one = torch.load(tmp_path / "1-0")
    assert any("running_var" in name for name in one["net"]) and one["net"]["fc.weight"].dtype == torch.float64
    assert start_workers(4, __file__, tmp_path) == [0] * 4
    others = [torch.load(tmp_path / f"4-{rank}") for rank in range(4)]
    for name, value in one["net"].items():
        torch.testing.assert_close(others[0]["net"][name], value, rtol=0, atol=1e-9)
        assert all(torch.equal(other["net"][name], others[0]["net"][name]) for other in others), name
    assert len(one["errors"]) > 1 and all(other["errors"] == one["errors"] for other in others)


def content(run):
    """All that a run leaves but clocks and memory."""
    state = checkpoint.load(run)
    result = json.loads((run / "result.json").read_text())
    log = [line.rsplit(",", 2)[0] for line in (run / "log.csv").read_text().splitlines()]
    state = {f"{part}.{name}": value for part in ("model",) for name, value in state[part].items()}
    momentum = checkpoint.load(run)["optimizer"]["state"]
    state |= {f"momentum.{i}": value["momentum_buffer"] for i, value in momentum.items()}
    return state, {k: v for k, v in result.items() if k not in ("waited", "seconds", "peak_memory")}, log


def same(run, other):
    (state, *rest), (state2, *rest2) = content(pathlib.Path(run)), content(pathlib.Path(other))
    return rest == rest2 and state.keys() == state2.keys() and all(torch.equal(state[k], state2[k]) for k in state)


def test_a_run_and_its_folder(start, monkeypatch):
    status, printed = start(*TINY, "--out", "run", "--test", "10-crop,multi-scale")
    assert status == 0, printed
    rows = list(csv.DictReader(open("run/log.csv")))
    header = ["iteration", "epoch", "lr", "train_loss", "train_error", "val_top1", "val_top5", "waited", "seconds"]
    assert list(rows[0]) == header and [row["iteration"] for row in rows] == [*"12345"]
    assert [row["lr"] for row in rows] == ["0.1", "0.1", "0.01", "0.001", "0.001"]
    assert [bool(row["val_top1"]) for row in rows] == [True, False, True, False, True]
    result, config = (json.loads(pathlib.Path(f"run/{name}.json").read_text()) for name in ("result", "config"))
    assert (result["val_top1"], result["val_top5"]) == (float(rows[-1]["val_top1"]), float(rows[-1]["val_top5"]))
    assert result["parameters"] == 11_689_512 - 990 * 513 and result["iterations"] == 5 and result["depth"] == 18
    assert result["unit_args"] == {"option": "B"} and result["dataset"] == "synthetic" and not result["diverged"]
    assert (config["images"], len(config["about"]["classes"]), config["micro_batch"]) == (20, 10, 4)
    assert not {"test", "evaluate", "recompute_bn"} & config.keys()
    for protocol in ("10-crop", "multi-scale"):
        assert json.loads(pathlib.Path(f"run/{protocol}.json").read_text())["images"] == 4
        assert f"run: {protocol} top-1 error" in printed
    status, again = start(*TINY, "--out", "run", "--workers", 1, "--test", "1-crop,10-crop")
    assert status == 0 and "already finished" in again and "10-crop" not in again  # of the tests only what lacked
    found = json.loads(pathlib.Path("run/1-crop.json").read_text())
    assert (found["top1"], found["top5"]) == (result["val_top1"], result["val_top5"])
    status, again = start("--evaluate", "run", "--out", "run", "--device", "cpu")
    assert status == 2 and "--out run is the folder of a training run" in again
    status, again = start("--evaluate", "run", "--crop=64", "--precision", "float32")
    assert status == 2 and "--evaluate cannot be combined with --crop, --precision" in again
    found["iterations"] = [3]  # as if evaluated in the middle of training
    pathlib.Path("run/1-crop.json").write_text(json.dumps(found | {"top1": 0.0}))
    assert start(*TINY, "--out", "run", "--test", "1-crop")[0] == 0
    assert json.loads(pathlib.Path("run/1-crop.json").read_text())["top1"] == result["val_top1"]
    status, again = start(*TINY, "--out", "run", "--lr", 0.2, "--images", 21)
    assert status == 2 and "--lr is 0.1 there and 0.2 here" in again and "--images is 20 there and 21" in again


@pytest.mark.parametrize("at", (1, 4, 5, 7, 8))
def test_stopped_anywhere_it_continues_to_the_same_bits(start, monkeypatch, narrow, at):
    """Within an epoch, in an evaluation, at the end; with another number of workers."""
    words = [*TINY, "--unit", "basic-dropout-shortcut", "--checkpoint-seconds", 1000, "--test", "1-crop"]
    assert start(*words, "--out", "whole")[0] == 0
    check, calls = checkpoint.Stop.check, []

    def stop(self, due=None):
        calls.append(due)
        if len(calls) == at:
            raise checkpoint.Stopped(signal.SIGTERM)
        return check(self, due)

    monkeypatch.setattr(checkpoint.Stop, "check", stop)
    status, printed = start(*words, "--out", "parts")
    assert (status, not pathlib.Path("parts/result.json").exists()) == (143, True), printed
    said = "SIGTERM: stopped; saved in parts; the same command continues it\n"
    assert printed.endswith(said) and printed.count("saved") == 1
    assert start(*words, "--out", "parts", "--workers", 2)[0] == 0 and same("whole", "parts")
    assert len(calls) > at


def test_a_corrupt_image_is_named_and_the_run_continues_once_it_is_mended(start, folders, monkeypatch):
    words = ["--data", folders, "--depth", 18, "--crop", 32, "--batch-size", 4, "--micro-batch", 2, "--epochs", 3]
    words += ["--device", "cpu", "--workers", 1, "--checkpoint-seconds", 1000]
    assert start(*words, "--out", "whole")[0] == 0
    order = np.random.default_rng((1, 0)).permutation(21)
    broken = pathlib.Path(data.ImageFiles(folders / "train").name(order[9]))  # the third batch
    content = broken.read_bytes()
    listing = data.load_imagenet
    for damage in (content[: len(content) // 2], b"", b"no picture", None):

        def damaged(*place, damage=damage):
            """The images listed; one is gone or damaged afterwards."""
            sets = listing(*place)
            broken.unlink() if damage is None else broken.write_bytes(damage)
            return sets

        with monkeypatch.context() as patch:
            patch.setattr(data, "load_imagenet", damaged)
            status, printed = start(*words, "--out", "run")
        assert status == 2 and str(broken) in printed and "whole copy" in printed and "Traceback" not in printed
        assert checkpoint.load("run")["iteration"] == 2 and not pathlib.Path("run/result.json").exists()
    broken.write_bytes(content)
    assert start(*words, "--out", "run")[0] == 0 and same("whole", "run")
    broken = folders / "val" / "n1" / "1.JPEG"
    broken.write_bytes(b"")
    status, printed = start("--evaluate", "run", "--device", "cpu", "--workers", 0)
    assert status == 2 and str(broken) in printed and "Traceback" not in printed


def test_a_run_continues_on_another_number_of_processes(start, monkeypatch, tmp_path, narrow):
    """From where it was: of its five iterations one process has made the first."""
    check, calls, words = checkpoint.Stop.check, [], [*TINY, "--workers", 1, "--out", tmp_path / "run"]

    def stop(self, due=None):
        calls.append(due)
        if len(calls) == 2:
            raise checkpoint.Stopped(signal.SIGTERM)
        return check(self, due)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Stop, "check", stop)
        assert start(*words)[0] == 143 and checkpoint.load("run")["iteration"] == 1
    assert start_workers(2, "imagenet_train.py", *words, target=be_narrow) == [0, 0]
    assert checkpoint.load("run")["iteration"] == 5
    assert [row["iteration"] for row in csv.DictReader(open("run/log.csv"))] == [*"12345"]


def test_a_run_whose_pictures_change(start, folders):
    """What changed is said, and what one can do; put back, the run is what it was."""
    words = ["--data", folders, "--depth", 18, "--crop", 32, "--batch-size", 4, "--micro-batch", 2, "--epochs", 1]
    words += ["--device", "cpu", "--workers", 0, "--out", "run"]
    assert start(*words)[0] == 0
    picture, kept = folders / "train" / "n0" / "0.JPEG", folders / "kept.JPEG"
    picture.rename(kept)
    status, printed = start(*words)
    assert status == 2 and "begun on 21 training images of 7 classes, and there are now 20 of 7. Put back" in printed
    kept.rename(picture)
    for part in ("train", "val"):
        (folders / part / "n6").rename(folders / part / "n9")
    status, printed = start(*words)
    assert status == 2 and "(differing: n6, n9)" in printed
    for part in ("train", "val"):
        (folders / part / "n9").rename(folders / part / "n6")
    status, printed = start(*words)
    assert status == 0 and "already finished" in printed
    status, printed = start("--evaluate", "run", script=cifar_train)
    assert status == 2 and "run is no run of cifar_train.py" in printed
    assert start("--dataset", "synthetic", "--images", 8, "--depth", 8, "--iterations", 1, script=cifar_train)[0] == 0
    status, printed = start("--evaluate", "runs/synthetic-8-basic-seed1")
    assert status == 2 and "is no run of imagenet_train.py" in printed


def test_top5_of_few_classes_is_left_out(start, folders):
    for part in ("train", "val"):
        for c in (5, 6):
            shutil.rmtree(folders / part / f"n{c}")
    words = ["--data", folders, "--depth", 18, "--crop", 32, "--batch-size", 4, "--micro-batch", 2, "--epochs", 1]
    status, printed = start(*words, "--device", "cpu", "--workers", 0, "--out", "run", "--test", "10-crop")
    assert status == 0 and "top-1 error" in printed and "top-5" not in printed
    assert "val_top5" not in pathlib.Path("run/log.csv").read_text() + pathlib.Path("run/result.json").read_text()
    assert "top5" not in pathlib.Path("run/10-crop.json").read_text()


@pytest.mark.filterwarnings("ignore:--precision")
def test_an_ensemble_computes_each_net_in_its_own_precision(world_of_one, monkeypatch):
    images, device, seen = data.imagenet_part("synthetic", None, "val", 10), torch.device("cpu"), []
    nets = []
    for name in ("bf16", "tf32", "float32"):
        net = models.imagenet_resnet(18, units.Basic, 10)
        net.fc.register_forward_hook(
            lambda fc, x, y, name=name: seen.append((name, y.dtype, torch.backends.cuda.matmul.allow_tf32))
        )
        nets.append((net, training.Precision(name, device), None))
    imagenet_train.evaluate(nets, images, "1-crop", 32, 2, 0, device)
    expected = [("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("float32", torch.float32, False)]
    assert len(seen) == 3 and seen == expected


def test_two_processes_end_together_at_a_corrupt_image(folders, tmp_path):
    order = np.random.default_rng((1, 0)).permutation(21)
    broken = pathlib.Path(data.ImageFiles(folders / "train").name(order[7]))  # the second process's
    broken.write_bytes(b"")
    words = ["--data", folders, "--depth", 18, "--crop", 32, "--batch-size", 4, "--micro-batch", 2, "--epochs", 3]
    words += ["--device", "cpu", "--workers", 1, "--out", tmp_path / "run"]
    assert start_workers(2, "imagenet_train.py", *words, target=be_narrow) == [2, 2]
    assert checkpoint.load(tmp_path / "run")["iteration"] == 1


def test_diverged_run_is_a_result(start, narrow):
    status, printed = start(*TINY, "--lr", "1e30", "--out", "run", "--test", "10-crop")
    assert status == 0 and "diverged" in printed
    result = json.loads(pathlib.Path("run/result.json").read_text())
    assert result["diverged"] is True and result["val_top1"] is None and not pathlib.Path("run/10-crop.json").exists()


# Bad input


BAD = [
    ("--depth 20", "depth 20 is impossible", "18, 34"),
    ("--depth 50 --unit basic", "depth 50 is impossible", "18, 34"),
    ("--test 5-crop", "there is no --test 5-crop", "1-crop, 1-crop-320, 10-crop, multi-scale"),
    ("--evaluate a b", "needs a folder of its own: --out", ""),
    ("--evaluate a b --out c", "there is no a", ""),
    ("--evaluate a --batch-size 0", "--batch-size must be at least 1", ""),
    ("--evaluate a --workers -1", "--workers must be at least 0", ""),
    ("--images 20", "--images goes with --dataset synthetic", ""),
    ("--recompute-bn 64", "--recompute-bn goes with --evaluate", ""),
    ("--micro-batch 48", "--micro-batch 48 does not divide --batch-size 256: --micro-batch 32 would", ""),
    ("--crop 16", "--crop must be at least 32", ""),
    ("--crop 32 --batch-size 8", "--crop 32 ends in maps of one pixel", "--micro-batch"),
    ("--workers -1", "--workers must be at least 0", ""),
    ("--epochs 0", "--epochs must be at least 1", ""),
    ("--augment random", "--augment", "scale-aspect"),
]


@pytest.mark.parametrize("words, message, more", BAD)
def test_bad_input(start, words, message, more):
    status, printed = start("--device", "cpu", *words.split())
    assert status == 2 and message in printed and more in printed and "Traceback" not in printed
    assert os.listdir() == []


def test_evaluation_among_other_pictures(start, folders):
    """The pictures that a run trains on are not those that it was trained on, or they are among those it is tested on;
    of neither anything is said where they are as before, or absent."""
    words = ["--data", folders, "--depth", 18, "--crop", 32, "--batch-size", 4, "--micro-batch", 2, "--epochs", 1]
    assert start(*words, "--device", "cpu", "--workers", 0, "--out", "run")[0] == 0
    evaluation = ["--evaluate", "run", "--device", "cpu", "--workers", 0]
    status, printed = start(*evaluation)
    assert status == 0 and " % on 21 images of 7 classes\n" in printed and "warning" not in printed
    shutil.move(folders / "train" / "n0" / "0.JPEG", folders / "val" / "n0" / "new.JPEG")
    status, printed = start(*evaluation)
    assert status == 0 and f"warning: run was trained on 21 images, and {folders}/train now holds 20. If" in printed
    assert " % on 22 images of 7 classes\n" in printed and "in both" not in printed
    shutil.copy(folders / "val" / "n0" / "new.JPEG", folders / "train" / "n0")
    status, printed = start(*evaluation)
    assert status == 0 and "was trained on" not in printed and "1 picture is in both train and val" in printed
    shutil.rmtree(folders / "train")
    status, printed = start(*evaluation)
    assert status == 0 and "warning" not in printed


def test_evaluation_of_what_does_not_fit(start, folders, tmp_path):
    run, other = trained(start, folders, 32)
    (folders / "val" / "n6").rename(folders / "val" / "n7")
    status, printed = start("--evaluate", run, "--device", "cpu")
    assert status == 2 and "run1 is of 7 classes (n0 ... n6) and the images of 7 classes (n0 ... n7)" in printed
    (folders / "val" / "n7").rename(folders / "val" / "n6")
    (run / "checkpoint.pt").write_bytes(b"")
    (run / "checkpoint.previous.pt").unlink(missing_ok=True)
    for words in (["--evaluate", run], ["--evaluate", other, run, "--out", "both"]):
        status, printed = start(*words, "--device", "cpu")
        assert status == 2 and "no checkpoint can be read" in printed and "Traceback" not in printed
    (run / "checkpoint.pt").unlink()
    status, printed = start("--evaluate", run, "--device", "cpu")
    assert status == 2 and "run1 holds no checkpoint" in printed


def test_processes_that_do_not_fit(start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, printed = start(*TINY)
    assert status == 2 and "3 processes cannot share 2 micro-batches of 4 images" in printed
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, printed = start(*TINY)
    assert status == 2 and "RANK" in printed and "not set" in printed


if __name__ == "__main__":
    checkpoint.start_processes("cpu")
    torch.set_num_threads(1)
    twenty_steps(pathlib.Path(sys.argv[1], f"{dist.get_world_size()}-{dist.get_rank()}"))
    dist.destroy_process_group()


# docs/own-pictures.md


def test_the_recipe_for_own_pictures(start, capsys):
    """As it stands there, but for epochs and crop, and for the download: two classes, one in two folders, a picture on
    its side, files that are none; from scratch and from torchvision's weights."""
    from torchvision.models import ResNet18_Weights, resnet18

    page = (HERE / "docs" / "own-pictures.md").read_text()
    split, scratch, begun = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    for seed, name in enumerate(("cat", "dog")):
        pathlib.Path("pictures", name).mkdir(parents=True)
        for i in range(1, 13):
            photograph(90, 70, seed).save(f"pictures/{name}/{i}.jpg")
    exif = Image.Exif()
    exif[0x112] = 6
    photograph(90, 70).save("pictures/cat/2.jpg", exif=exif)
    pathlib.Path("pictures/.hidden").write_text("")
    pathlib.Path("pictures/dog/.hidden").write_text("")
    pathlib.Path("pictures/dog/clip.gif").write_text("")
    pathlib.Path("pictures/cat/more").mkdir()
    photograph(90, 70).save("pictures/cat/more/1.PNG")
    split = split.partition("<<'END'\n")[2].partition("END\n")[0]
    exec(split, {})
    said = capsys.readouterr()
    assert said.out == "cat: 11 to train on, 2 to validate\ndog: 10 to train on, 2 to validate\n"
    assert "1 file is left out, such as pictures/dog/clip.gif" in said.err
    found = {path.as_posix(): Image.open(path).size for path in pathlib.Path("mine").rglob("*.*")}
    assert [path for path, size in found.items() if size == (70, 90)] == ["mine/val/cat/2.jpg"]
    assert sorted(path for path in found if "/val/" in path) == [
        *(f"mine/val/{name}.jpg" for name in ("cat/2", "cat/7", "dog/2", "dog/7")),
    ]
    assert len(found) == 25 and "mine/train/cat/more/1.PNG" in found
    photograph(90, 70).save("pictures/cat/0.jpg")
    with pytest.raises(SystemExit, match="mine exists"):  # the pictures after it would change sides
        exec(split, {})
    assert len([*pathlib.Path("mine").rglob("*.*")]) == 25
    curl, *lines = [*begun.splitlines()[:1], *scratch.splitlines(), *begun.splitlines()[1:]]
    assert curl == f"curl -O {ResNet18_Weights.DEFAULT.url}"
    torch.save(resnet18(weights=None).state_dict(), curl.rpartition("/")[2])
    assert [line.split()[1] for line in lines] == ["imagenet_train.py", "predict.py"] * 2
    for line in lines:
        line = re.sub(r"--epochs \d+", "--epochs 1 --workers 0", line.replace("--crop 64", "--crop 32"))
        words = [path for word in line.split()[2:] for path in (sorted(glob.glob(word)) if "*" in word else [word])]
        status, printed = start(*words, "--device", "cpu", script=imagenet_train if "--data" in words else predict)
        assert status == 0, printed
        if "--data" not in words:
            assert "mine/val/cat/7.jpg" in printed and printed.count(" %  ") == 4
        elif "--weights" in words:
            assert "is replaced by a new, untrained one for 2" in printed
    assert json.loads(pathlib.Path("runs/mine-2/result.json").read_text())["iterations"] == 1
