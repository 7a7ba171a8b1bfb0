"""What data.py and cifar_train.py do: the recipe against a naive second implementation, the data, equality over
processes and the command line. No test looks at a clock."""

import ast
import csv
import errno
import fcntl
import functools
import io
import itertools
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run

import checkpoint
import cifar_train
import conftest
import data
import imagenet_train
import models
import training
import units
from conftest import HERE, fork, pictures, start_workers

SCRIPT = cifar_train  # what `flags` and `start` run

TINY = "--dataset synthetic --images 40 --depth 8 --batch-size 8 --iterations 6 --device cpu".split()


# The recipe, against the papers' formulas written out again without nn, autocast, fused or flat anything


def naive_resnet20(w, x):
    """[1] Section 4.2 and Fig. 2 on a dict of weights, with BN by the batch's own mean and variance."""

    def conv(x, name, stride):
        return torch.nn.functional.conv2d(x, w[name + ".weight"], None, stride, 1)

    def bn(x, name):
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        gain, bias = (w[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return gain * (x - mean) / torch.sqrt(variance + 1e-5) + bias

    x = bn(conv(x, "stem.0", 1), "stem.1").clamp(min=0)
    for stage in range(3):
        for i in range(3):
            stride = 2 if stage > 0 and i == 0 else 1
            name = f"stages.{stage}.{i}."
            y = bn(conv(x, name + "conv1", stride), name + "bn1").clamp(min=0)
            y = bn(conv(y, name + "conv2", 1), name + "bn2")
            if stride == 2:
                x = torch.cat([x[:, :, 0::2, 0::2], torch.zeros_like(y[:, : y.shape[1] // 2])], dim=1)
            x = (x + y).clamp(min=0)
    return x.mean(dim=3).mean(dim=2) @ w["fc.weight"].T + w["fc.bias"]


def naive_training(weights, images, labels, rates, batch, micro, recipe, seed):
    """SGD over an endless shuffled stream, each image cut out of its own zero-padded copy: the losses of the iterations
    with these learning rates, and the weights after them."""
    w = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    velocity = {name: torch.zeros_like(value) for name, value in w.items()}
    x = images.numpy().astype(np.float32)
    if recipe == "paper":
        x = x - images.numpy().astype(np.float64).mean(axis=0).astype(np.float32)
    else:
        pixels = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
        mean, std = (s.astype(np.float32).reshape(1, 3, 1, 1) for s in (pixels.mean(axis=1), pixels.std(axis=1)))
        x = (x - mean) / std
    padded = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)))
    stream = np.concatenate([data.epoch_draws(seed, e, len(images), "cpu").numpy() for e in range(20)], axis=1).T
    losses = []
    for t, rate in enumerate(rates):
        drawn = stream[t * batch : (t + 1) * batch]
        total = 0
        for start in range(0, batch, micro):
            views = []
            for index, row, column, flip in drawn[start : start + micro]:
                view = padded[index, :, row : row + 32, column : column + 32]
                views.append(view[:, :, ::-1] if flip else view)
            logits = naive_resnet20(w, torch.from_numpy(np.stack(views)).double())
            truth = labels[drawn[start : start + micro, 0]]
            total = total - torch.log_softmax(logits, dim=1)[range(micro), truth].sum()
        loss = total / batch
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(w.values()))
        with torch.no_grad():
            for (name, value), gradient in zip(w.items(), gradients, strict=True):
                if value.dim() > 1 or recipe != "paper":
                    gradient = gradient + 1e-4 * value
                velocity[name] = 0.9 * velocity[name] + gradient
                value -= rate * (velocity[name] if recipe == "paper" else gradient + 0.9 * velocity[name])
    return losses, w


def train_in_float64(args, net, images, labels, monkeypatch):
    """cifar_train.train on a net in float64, as one process of however many. Returns its losses, errors and state."""
    step, evaluate, losses, errors = training.step, cifar_train.evaluate, [], []

    def recording_evaluate(*words):
        errors.append(evaluate(*words))
        return errors[-1]

    def recording_step(net, objective, batches, shared, *more):
        step(net, objective, batches, shared, *more)
        losses.append(shared[-2].item())

    monkeypatch.setattr(training, "step", recording_step)
    monkeypatch.setattr(cifar_train, "evaluate", recording_evaluate)
    net.double().register_forward_pre_hook(lambda net, inputs: inputs[0].double())
    monkeypatch.setattr(cifar_train, "new_net", lambda args: net)
    sets = {"train": (images, labels), "test": (images, labels)}
    monkeypatch.setattr(cifar_train, "load_sets", lambda args: dict(sets))
    assert cifar_train.train(args, torch.device("cpu")) == 0
    return losses, errors, net.state_dict()


@pytest.mark.parametrize("recipe", cifar_train.RECIPES)
def test_training_equals_the_naive_one_loss_by_loss(recipe, flags, world_of_one, monkeypatch, tmp_path):
    """Three losses, and on through the warm-up's end and both drops to the same weights."""
    words = "--dataset synthetic --batch-size 8 --micro-batch 4 --seed 3 --iterations 10".split()
    args = flags("--recipe", recipe, *words, *(["--warmup", 2] if recipe == "paper" else []), "--out", tmp_path)
    rates = [0.01, 0.01, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001]  # drops at 1/2 and 3/4 of 10
    if recipe != "paper":
        rates = [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001, 0.001]  # at 0.4 and 0.605
    images, labels = pictures(11)  # fewer than two batches: steps cross from epoch to epoch
    torch.manual_seed(0)
    net = models.cifar_resnet(20, units.Basic)
    weights = {name: value.detach().double() for name, value in net.named_parameters()}
    expected, naive = naive_training(weights, images, labels, rates, 8, 4, recipe, seed=3)
    losses, _, state = train_in_float64(args, net, images, labels, monkeypatch)
    for iteration in range(3):
        assert abs(losses[iteration] - expected[iteration]) < 1e-9, iteration
    assert np.allclose(losses, expected, rtol=0, atol=1e-9)
    assert checkpoint.read_result(tmp_path)["train_loss"] == round(losses[-1], 6)  # the last tenth
    rows = csv.DictReader(open(tmp_path / "log.csv"))  # one an iteration, whose loss starts anew each time
    assert [float(row["train_loss"]) for row in rows] == [round(loss, 6) for loss in losses]
    for name, value in naive.items():
        torch.testing.assert_close(state[name], value.detach(), rtol=0, atol=1e-9)


def test_learning_rate(flags):
    paper = flags()
    assert (paper.batch_size, paper.micro_batch, paper.iterations, paper.warmup, paper.lr) == (
        128,
        64,
        64_000,
        400,
        0.1,
    )
    points = (0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999)
    rates = [0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [cifar_train.lr_at(t, paper) for t in points] == rates
    without = flags("--warmup", 0)
    assert {cifar_train.lr_at(t, without) for t in range(32_000)} == {0.1}
    torch_code = flags("--recipe", "resnet-1k-layers")
    assert (torch_code.batch_size, torch_code.micro_batch, torch_code.iterations) == (64, 32, 156_250)
    points = (0, 62_499, 62_500, 94_530, 94_531, 156_249)
    assert [cifar_train.lr_at(t, torch_code) for t in points] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    short = flags("--iterations", 1600, "--lr", 0.05)
    assert short.warmup == 100
    assert [cifar_train.lr_at(t, short) for t in (99, 100, 799, 800, 1200)] == [0.005, 0.05, 0.05, 0.005, 0.0005]


def test_weight_decay_and_momentum(flags):
    net = models.cifar_resnet(8, units.BasicExclusiveGating)
    for recipe, decay in (("paper", 0), ("resnet-1k-layers", 1e-4)):
        chosen = cifar_train.RECIPES[recipe]
        optimizer = training.sgd(net, 0.1, chosen["nesterov"], chosen["decay_all"])
        weights, others = optimizer.param_groups
        assert (weights["weight_decay"], others["weight_decay"]) == (1e-4, decay)
        assert {weights["nesterov"], others["nesterov"]} == {recipe != "paper"}
        assert {weights["momentum"], others["momentum"]} == {0.9}
        names = {id(p): name for name, p in net.named_parameters()}
        decayed = {names[id(p)] for p in weights["params"]}
        assert "fc.weight" in decayed and "stages.0.0.gate.weight" in decayed
        assert not any(name.endswith("bias") or ".bn" in name for name in decayed)
        assert len(weights["params"]) + len(others["params"]) == len(names)
    groups = training.sgd(net, 0.1, decay_all=flags("--decay-all").decay_all).param_groups
    assert {(group["weight_decay"], group["nesterov"]) for group in groups} == {(1e-4, False)}


def test_frozen_parameters_stay_as_they_are(world_of_one):
    """Neither gradient, nor momentum, nor decay; and the others train as if nothing were frozen behind them."""
    images, labels = pictures(8)
    batches = [(images.float(), labels)]
    weights = []
    for frozen in (("fc.",), ("stem.", "stages.0."), ()):
        torch.manual_seed(0)
        net = models.cifar_resnet(8, units.BasicPreAct)
        for name, p in net.named_parameters():
            p.requires_grad_(not name.startswith(tuple(frozen)) if frozen else True)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        shared, running = training.flatten(net)
        optimizer = training.sgd(net, 0.1)
        words = training.classification, batches, shared, running, optimizer, torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(2):
            training.step(net, *words, training.Precision("float32", torch.device("cpu")))
        for name, p in net.named_parameters():
            assert torch.equal(p, before[name]) == (not p.requires_grad), name
            assert (p.grad is None) == (p not in optimizer.state) == (not p.requires_grad)
        weights.append(sum(p.numel() for p in net.parameters() if p.requires_grad))
        assert len(shared) == weights[-1] + len(running) + 2
    assert weights[0] == 75_290 - 650 and weights[1] < weights[0] < weights[2] == 75_290


def test_initialisation_by_fan_in(flags):
    """Their variances are 2 / fan-in, and 2 / fan-out by default; the fc is the same in both."""
    nets = [cifar_train.new_net(flags("--depth", 164, "--preact", *words)) for words in ([], ["--fan-in"])]
    for layers in zip(*(net.modules() for net in nets), strict=True):
        if isinstance(layers[0], torch.nn.Conv2d) and layers[0].weight.numel() > 2000:
            for layer, channels in zip(layers, (layers[0].out_channels, layers[0].in_channels), strict=True):
                assert 0.8 < layer.weight.square().mean().item() * channels * layer.kernel_size[0] ** 2 / 2 < 1.2
    assert torch.equal(nets[0].fc.weight, nets[1].fc.weight)
    assert abs(nets[0].stages[0][1].conv1.weight.std() / nets[1].stages[0][1].conv1.weight.std() - 2) < 0.3  # 64 to 16


def test_the_net_of_a_depth(flags, monkeypatch):
    """20, 56, 110 and 164 are 6n + 2 and 9n + 2 alike: the papers' names decide, never divisibility."""
    monkeypatch.setattr(cifar_train, "cifar_resnet", lambda *words, **more: None)  # test_units.py builds them
    for depth, name in ((20, "basic"), (110, "basic"), (1202, "basic"), (164, "bottleneck"), (1001, "bottleneck")):
        assert flags("--depth", depth).unit == name
        args = flags("--depth", depth, "--preact")
        assert args.unit == name + "-preact" and args.preact
    args = flags("--depth", 164, "--unit", "basic-preact")
    assert args.unit == "basic-preact" and args.preact
    args = flags("--depth", 110, "--unit", "basic-exclusive-gating", "--unit-arg", "gate_bias=-7")
    assert args.unit_args == {"option": "A", "gate_bias": -7.0, "gate_bn": False} and not args.preact
    assert args.out == "runs/cifar10-110-basic-exclusive-gating-seed1"
    args = flags("--unit", "basic-shortcut-gating", "--unit-arg", "gate_bn=true")
    assert args.unit_args == {"option": "A", "gate_bias": -6.0, "gate_bn": True}


# Data


def test_validation_split_is_the_last_training_images(flags):
    whole = cifar_train.load_sets(flags("--dataset", "synthetic", "--images", 50))
    split = cifar_train.load_sets(flags("--dataset", "synthetic", "--images", 50, "--val-split", 8))
    assert list(whole) == ["train", "test"] and list(split) == ["train", "val", "test"]
    for i in (0, 1):
        assert torch.equal(torch.cat([split["train"][i], split["val"][i]]), whole["train"][i])
        assert len(split["val"][i]) == 8 and torch.equal(split["test"][i], whole["test"][i])


# One process and two


def twenty_steps(path, monkeypatch):
    """Train for 20 steps of 4 micro-batches in float64 as one of dist.get_world_size() processes."""
    images, labels = pictures(51)  # an odd number: two processes evaluate 26 and 25
    words = "--dataset synthetic --batch-size 16 --micro-batch 4 --iterations 20 --depth 8 --warmup 2 --out".split()
    monkeypatch.setattr(
        sys, "argv", ["cifar_train.py", *words, str(path.with_name(f"{dist.get_world_size()} processes"))]
    )
    args = cifar_train.parse_flags()
    torch.manual_seed(0)
    net = models.cifar_resnet(8, units.BasicPreAct)
    losses, errors, state = train_in_float64(args, net, images, labels, monkeypatch)
    torch.save({"net": state, "losses": losses, "errors": errors}, path)


def test_one_process_and_two_agree(tmp_path, world_of_one, monkeypatch):
    twenty_steps(tmp_path / "one", monkeypatch)
    assert start_workers(2, __file__, tmp_path) == [0, 0]
    one, first, second = (torch.load(tmp_path / name) for name in ("one", "two-0", "two-1"))
    assert any("running_var" in name for name in one["net"])
    for name, value in one["net"].items():
        torch.testing.assert_close(first["net"][name], value, rtol=0, atol=1e-9)
        assert torch.equal(first["net"][name], second["net"][name]), name  # every process holds the same state
    assert len(one["losses"]) == 20 and np.allclose(first["losses"], one["losses"], rtol=0, atol=1e-9)
    assert one["errors"] == first["errors"] == second["errors"]


# The command line and the run folder


def test_a_run_and_its_folder(start, tmp_path):
    status, printed = start(*TINY, "--preact", "--out", "a/run", "--iterations", 64)
    assert status == 0
    run = tmp_path / "a" / "run"
    result, config = (json.loads((run / name).read_text()) for name in ("result.json", "config.json"))
    rows = list(csv.DictReader(open(run / "log.csv")))
    columns = ["iteration", "epoch", "lr", "train_loss", "train_error", "test_error", "waited", "seconds"]
    assert list(rows[0]) == columns
    assert [int(row["iteration"]) for row in rows] == [*range(2, 65, 2)] and rows[4]["epoch"] == "2.0"
    assert [row["lr"] for row in rows] == ["0.01"] * 2 + ["0.1"] * 14 + ["0.01"] * 8 + ["0.001"] * 8
    assert float(rows[-1]["test_error"]) == result["test_error"]  # the last iterate's, whatever came before
    assert (
        result["parameters"] == 75_290 and result["unit"] == "basic-preact" and result["unit_args"] == {"option": "A"}
    )
    assert result["dataset"] == "synthetic" and result["depth"] == 8 and result["iterations"] == 64
    assert result["precision"] == "float32" and result["seed"] == 1 and result["diverged"] is False
    assert result["seconds"] > 0 and result["peak_memory"] > 1e8 and result["train_loss"] > 0
    assert config["warmup"] == 4 and config["micro_batch"] == 4 and config["about"]["size"] == 32
    environment = {"commit", "modified", "torch", "device", "tf32", "threads", "processes", "command"}
    assert environment <= config["environment"].keys() and config["environment"]["processes"] == 1
    last = (
        f"finished: test error {result['test_error']:.2f} %; its files are in a/run (its curve: python report.py a/run)"
    )
    assert printed.splitlines()[-1] == last
    assert printed.startswith(
        "ResNet-8 (basic-preact, 75,290 parameters); synthetic: 40 training images of 10 classes; "
    )
    few = "in a/run\nwarning: the 40 training images are fewer than 10 batches of 8. So few steps"
    assert few in printed and printed.count("warning: BN's statistics") == 1
    assert printed.count(" of 64, training loss ") == 32

    before = {path: path.read_bytes() for path in run.iterdir()}
    status, printed = start(*TINY, "--unit", "basic-preact", "--out", "a/run", "--iterations", 64, "--warmup", 4)
    assert status == 0 and "already finished" in printed  # the same run, said in other words
    assert before == {path: path.read_bytes() for path in run.iterdir()}

    status, printed = start("--evaluate", "a/run")
    assert status == 0 and f"test error {result['test_error']:.2f} % after 64 of 64" in printed

    status, printed = start(*TINY, "--out", "a/run", "--lr", 0.2, "--seed", 2, "--iterations", 65)
    assert status == 2 and "holds a different run" in printed
    for difference in (
        "--lr is 0.1 there and 0.2 here",
        "--seed is 1 there and 2 here",
        "--unit is basic-preact there",
        "--iterations is 64 there and 65 here",
        "a run cannot be made longer",
    ):
        assert difference in printed
    assert "--data " not in printed and before == {path: path.read_bytes() for path in run.iterdir()}

    state = torch.load(run / "checkpoint.pt", weights_only=True)  # the folder is enough to rebuild the net and predict
    net = models.cifar_resnet(config["depth"], units.UNITS[config["unit"]], **config["unit_args"])
    net.load_state_dict(state["model"])
    images, labels = data.load_cifar("synthetic", None, 40)[2:]
    predicted = net.eval()((images - state["about"]["mean"]) / state["about"]["std"]).argmax(dim=1)
    assert 100 * (predicted != labels).double().mean() == result["test_error"]


def test_validation_run(start, tmp_path):
    assert start(*TINY, "--val-split", 10, "--iterations", 8, "--out", "run")[0] == 0
    rows = list(csv.DictReader(open("run/log.csv")))
    assert [bool(row["val_error"]) for row in rows] == [False, False, False, True, False, False, False, True] or rows
    assert [bool(row["test_error"]) for row in rows] == [False] * 7 + [True]  # the test set is looked at once
    result = json.loads(pathlib.Path("run/result.json").read_text())
    assert result["test_error"] == float(rows[-1]["test_error"]) and result["val_error"] == float(rows[-1]["val_error"])


def test_evaluation_counts_every_image(world_of_one):
    """A net that reads the answer in the image, and one wrong label, in each place: also the last of a batch."""
    answers = torch.arange(11) % 10
    images = answers.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).to(torch.uint8)
    net = torch.nn.Module()
    net.forward = lambda x: torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 10).float()
    precision = training.Precision("float32", torch.device("cpu"))
    for batch_size in (1, 4, 5, 11, 250):
        for wrong in range(11):
            labels = answers.clone()
            labels[wrong] = (labels[wrong] + 1) % 10
            assert cifar_train.evaluate(net, images, labels, 0.0, 1.0, precision, batch_size) == 100 / 11


def test_a_line_a_minute(monkeypatch, world_of_one, capsys):
    """The first after 10 s, with what is left; on a terminal only where that is long. Waiting is warned of once."""
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    for terminal, lines in ((False, 4), (True, 1)):
        words = {"batch_size": 8, "workers": 3}, {"disable": not terminal, "set_postfix_str": lambda text: None}
        args, bar = (types.SimpleNamespace(**fields) for fields in words)
        run = types.SimpleNamespace(args=args, bar=bar, iterations=100_000, iteration=0, waited=0.0)
        run.measured, run.warned, run.seen, run.means = False, False, (0, 0.0, clock[0]), lambda: (2.5, 0.75)
        run.print_progress = functools.partial(training.Training.print_progress, run)
        for _ in range(200):
            clock[0], run.iteration, run.waited = clock[0] + 1, run.iteration + 1, run.waited + 0.5
            training.Training.progress(run)
        printed = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("iteration ") for line in printed) == lines
        assert printed[0] == (
            "iteration 10 of 100,000, training loss 2.5000, training error 75.0 %, 8 images/s, 50% of the time waiting "
            "for images, about 28 h left"
        )
        warning = (
            "input-bound: 50% of the time is spent waiting for images. The loader delivers 8 images/s, the net could "
        )
        assert [line for line in printed if "bound" in line] == [warning + "take 16 (--workers is 3)"]
    assert [training.duration(s) for s in (40, 600, 7300, 200_000)] == ["40 s", "10 min", "2 h", "2.3 days"]


def test_rows_and_evaluations():
    """Some 32 rows; the full schedule is evaluated at each, a short one as often as a tenth of its work allows."""
    rows, evaluations = training.rows_at(64_000, 64_000 * 128, 10_000)
    assert rows == evaluations == {*range(2000, 64_001, 2000)}
    assert training.rows_at(300, 300 * 128, 10_000) == ({*range(10, 301, 10)}, {300})
    rows, _ = training.rows_at(141, 141 * 32, 100)  # not 140: the last row's means would be of one iteration
    assert rows == {*range(5, 136, 5), 141} and training.rows_at(143, 143 * 32, 100)[0] == {*range(5, 141, 5), 143}
    for iterations in range(1, 2100):
        rows = [0, *sorted(training.rows_at(iterations, 1, 1)[0])]
        assert 2 * (rows[-1] - rows[-2]) >= rows[1] and len({b - a for a, b in itertools.pairwise(rows[:-1])}) <= 1
    for iterations, trained, evaluated in ((1, 8, 40), (45, 360, 40), (450_000, 450_000 * 256, 50_000), (33, 33, 33)):
        rows, evaluations = training.rows_at(iterations, trained, evaluated)
        assert evaluations <= rows and iterations in evaluations and len(rows) in (1, 17, 23, 32)
        assert len(evaluations) == 1 or len(evaluations) * evaluated / 3 <= 0.1 * trained


def test_diverged_run_is_a_result(start):
    status, printed = start(*TINY, "--lr", "1e30", "--warmup", 0, "--out", "run", "--checkpoint-seconds", 0)
    assert status == 0 and "diverged" in printed
    result = json.loads(pathlib.Path("run/result.json").read_text())
    assert result["diverged"] is True and result["test_error"] is None and result["train_loss"] is None
    state = torch.load("run/checkpoint.pt", weights_only=True)  # the last good one
    assert state["iteration"] < 6 and all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("precision", ("tf32", "bf16", "fp16"))
def test_reduced_precision(start, precision):
    with pytest.warns(UserWarning, match=f"--precision {precision}.*CPU"):
        status, _ = start(*TINY, "--precision", precision, "--iterations", 2, "--out", "run")
    assert status == 0
    result = json.loads(pathlib.Path("run/result.json").read_text())
    assert result["precision"] == precision and result["diverged"] is False


def test_a_precision_is_warned_of_once(monkeypatch, world_of_one, recwarn):
    for rank in (1, 0, 2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        training.Precision("bf16", torch.device("cpu"))
    (warning,) = recwarn
    assert "on most CPUs bf16 and fp16 are slower than float32, and tf32 is float32" in str(warning.message)


@pytest.mark.parametrize("launched", (False, True))
def test_two_processes_write_one_run(launched, tmp_path):
    words = [*TINY, "--out", tmp_path / "run"]
    if launched:
        torchrun = fork(torch.distributed.run.__file__, "--standalone", "--nproc_per_node=2", SCRIPT.__file__, *words)
        torchrun.join(timeout=120)
        statuses = [torchrun.exitcode]
    else:
        statuses = start_workers(2, "cifar_train.py", *words)
    assert set(statuses) == {0}
    config, result = (json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "result.json"))
    assert config["environment"]["processes"] == 2 and result["diverged"] is False
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 1 + 6


BAD = [
    ("--depth 21", "depth 21 is impossible", "20 and 26"),
    ("--depth 100 --unit bottleneck", "depth 100 is impossible", "92 and 101"),
    ("--depth 20 --preact --unit basic", "--preact contradicts --unit basic", ""),
    ("--depth 20 --preact --unit basic-relu-preact", "--preact contradicts --unit basic-relu-preact", ""),
    ("--unit basic-gated", "no --unit basic-gated", "basic-exclusive-gating, basic-shortcut-gating"),
    ("--unit basic-exclusive-gating --unit-arg bias=1", "takes option, gate_bias", ""),
    ("--unit basic-plain --unit-arg option=A", "basic-plain takes no arguments", ""),
    ("--unit basic --unit-arg option=D", "must be A, B or C", ""),
    ("--unit basic-exclusive-gating --unit-arg gate_bias=low", "gate_bias is a number", ""),
    (
        "--batch-size 128 --micro-batch 48",
        "--micro-batch 48 does not divide --batch-size 128: --micro-batch 32 would",
        "",
    ),
    ("--batch-size 16 --micro-batch 32", "does not divide --batch-size 16: --micro-batch 16 would", ""),
    ("--batch-size 0", "--batch-size must be at least 1", ""),
    ("--iterations 0", "--iterations must be at least 1", ""),
    ("--iterations many", "--iterations", "invalid int"),
    ("--lr -1", "--lr", ""),
    ("--lr 1e308", "--lr must be a positive float32", ""),
    ("--seed 9223372036854775808", "--seed must be at most", ""),
    ("--seed -1", "--seed must be at least 0", ""),
    ("--checkpoint-seconds -1", "--checkpoint-seconds must be at least 0", ""),
    ("--timeout 0", "--timeout must be 1 ... 86400 seconds", ""),
    ("--checkpoint-seconds nan", "--checkpoint-seconds must be at least 0", ""),
    ("--unit basic-exclusive-gating --unit-arg gate_bias=nan", "gate_bias is a number", ""),
    ("--unit basic-exclusive-gating --unit-arg gate_bn=no", "gate_bn is true or false", ""),
    ("--recipe mine", "--recipe", "resnet-1k-layers"),
    ("--dataset mnist", "--dataset", "cifar100"),
    ("--dept 20", "--dept", ""),
    ("--dataset synthetic --images 10 --val-split 10", "--val-split 10 leaves nothing", ""),
    ("--evaluate nowhere", "there is no nowhere", ""),
]


@pytest.mark.parametrize("words, message, more", BAD)
def test_bad_input(start, words, message, more):
    status, printed = start("--device", "cpu", *words.split())
    assert status == 2 and message in printed and more in printed and "Traceback" not in printed
    assert os.listdir() == []  # nothing was begun


def test_processes_that_do_not_fit(start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, printed = start(*TINY)
    assert status == 2 and "3 processes cannot share 2 micro-batches of 4 images" in printed
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    status, printed = start(*TINY)
    assert status == 2 and "LOCAL_RANK, MASTER_PORT not set" in printed


def test_no_permission_to_write(start, tmp_path):
    (tmp_path / "file").write_text("")  # a folder below a file: refused to everybody, root included
    status, printed = start(*TINY, "--out", "file/run")
    assert status == 2 and "file/run" in printed and "Traceback" not in printed


def test_a_folder_that_another_program_writes(start, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, printed = start(*TINY, "--out", "run")
    assert status == 3 and "another program is writing run" in printed
    assert os.listdir("run") == [".lock"]


def test_a_flag_younger_than_a_run_was_off_in_it(start, tmp_path):
    words = [*TINY, "--unit", "basic-shortcut-gating", "--out", "run"]
    assert start(*words)[0] == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config.pop("fan_in") is config["unit_args"].pop("gate_bn") is False
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    status, printed = start(*words)
    assert status == 0 and "already finished" in printed
    for more, message in ((["--fan-in"], "--fan-in is None there"), (["--unit-arg", "gate_bn=true"], "--unit-args is")):
        status, printed = start(*words, *more)
        assert status == 2 and message in printed


def test_a_run_folder_that_cannot_be_trusted(start, tmp_path):
    """Damaged checkpoints, or a checkpoint without its flags: named, status 2, and nothing is trained or lost."""
    words = [*TINY, "--out", "run"]
    assert start(*words)[0] == 0
    run = tmp_path / "run"
    result, config = (run / "result.json").read_text(), (run / "config.json").read_text()
    (run / "config.json").unlink()
    status, printed = start(*words, "--seed", 9)
    assert status == 2 and "holds result.json but no config.json" in printed
    for content in ("[]", "{", '{"depth": 20}'):
        (run / "config.json").write_text(content)
        for again in (words, ["--evaluate", "run"]):
            status, printed = start(*again)
            assert status == 2 and "Traceback" not in printed, content
    (run / "config.json").write_text(config.replace('"depth": 8', '"depth": 14'))
    status, printed = start("--evaluate", "run")
    assert status == 2 and "run does not fit" in printed
    (run / "config.json").write_text(config)
    (run / "result.json").write_text('{"diverged": false}')
    status, printed = start(*words)
    assert status == 2 and "result.json cannot be read: it lacks test_error" in printed
    (run / "result.json").unlink()
    (run / "checkpoint.pt").write_bytes(b"x")
    status, printed = start(*words)
    assert status == 2 and "no checkpoint can be read" in printed and not (run / "result.json").exists()
    for path in run.glob("checkpoint*"):
        path.unlink()
    assert start(*words)[0] == 0  # with no checkpoint at all it begins anew, to the same end
    ours, theirs = (json.loads(text) for text in (result, (run / "result.json").read_text()))
    assert ours["test_error"] == theirs["test_error"] and ours["train_loss"] == theirs["train_loss"]


def test_a_first_try_that_failed_leaves_the_folder_free(start, monkeypatch):
    """A folder with nothing but flags in it, such as one that memory did not suffice for, is begun anew."""

    def no_memory(*words):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(training, "step", no_memory)
        status, printed = start(*TINY, "--lr", 0.2, "--out", "run")
    assert status == 2 and "out of memory: CUDA out of memory. A smaller --micro-batch" in printed
    assert sorted(os.listdir("run")) == [".lock", "config.json"]
    assert start(*TINY, "--out", "run")[0] == 0
    assert json.loads(pathlib.Path("run/config.json").read_text())["lr"] == 0.1
    status, printed = start(*TINY, "--lr", 0.2, "--out", "run")
    assert status == 2 and "--lr is 0.1 there and 0.2 here" in printed


def test_file_systems_without_locks_or_folder_syncs(start, monkeypatch):
    """Network file systems refuse either: the run goes on, and says once that nothing keeps other programs out."""
    fsync, folders = os.fsync, stat.S_ISDIR

    def unsupported(*words):
        raise OSError(numbers[0], os.strerror(numbers[0]))

    def files_alone(descriptor):
        return unsupported() if folders(os.fstat(descriptor).st_mode) else fsync(descriptor)

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(os, "fsync", unsupported)  # of files neither
    numbers = [errno.ENOSYS]
    status, printed = start(*TINY, "--out", "nothing-synced")
    assert status == 0 and "could not be written" not in printed
    monkeypatch.setattr(os, "fsync", files_alone)
    for numbers in ([errno.ENOSYS], [errno.ENOLCK], [errno.EOPNOTSUPP], [errno.EINVAL]):
        status, printed = start(*TINY, "--out", f"run{numbers[0]}")
        assert status == 0 and printed.count("cannot be locked") == 1 and "finished: test error" in printed
    for number in (errno.EPERM, errno.EACCES):  # a folder that may not be synced; a lock that another holds, in SMB
        numbers = [number]
        checkpoint.sync_folder(".")
        status, printed = start(*TINY, "--out", "run")
        assert status == 3 and "another program is writing run" in printed
    numbers = [errno.EIO]  # a lock that fails for another reason is an error
    status, printed = start(*TINY, "--out", "run")
    assert status == 2 and "Input/output error" in printed and "Traceback" not in printed


def test_evaluating_an_unnamed_run_is_not_training(start):
    status, printed = start("--evaluate", "")
    assert status == 2 and "config.json" in printed and not os.path.exists("runs")
    status, printed = start("--evaluate", "run", "--depth=20", "--val-split", 8)
    assert status == 2 and "--evaluate cannot be combined with --depth, --val-split" in printed
    pathlib.Path("afile").write_text("")
    status, printed = start(*TINY, "--out", "afile")
    assert status == 2 and "afile is a file, and a run needs a folder" in printed
    status, printed = start("--evaluate", "afile")
    assert status == 2 and "afile holds no weights" in printed
    os.symlink("nowhere", "link")
    os.mkfifo("pipe")  # to read it would be to wait for ever
    for words, message in (
        ((*TINY, "--out", "link"), "link is a link to nowhere, and a run needs a folder"),
        ((*TINY, "--out", "afile/run"), "afile/run cannot be written (Not a directory): choose another --out"),
        (("--evaluate", "pipe"), "pipe is neither: weights come from a run's folder or a file"),
    ):
        status, printed = start(*words)
        assert status == 2 and message in printed


@pytest.mark.parametrize("encoding", ("ascii", "utf-8", None))
def test_streams_that_cannot_print(start, monkeypatch, encoding):
    """A name that the encoding lacks is escaped, and closed streams (Python has None for them) end no run."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) if encoding else None for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert start(*TINY, "--out", "r\xfcn\udcff")[0] == 0
    if encoding:
        printed = streams[0].buffer.getvalue().decode(encoding)
        assert ("; in r\\xfcn\\udcff\n" if encoding == "ascii" else "; in r\xfcn\\udcff\n") in printed


def test_numbers_of_the_environment(start, monkeypatch):
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        with monkeypatch.context() as patch:
            for variable, value in (launched | {name: "x"}).items():
                patch.setenv(variable, value)
            status, printed = start(*TINY, "--out", "run")
            assert status == 2 and f"the environment's {name} is 'x', but should be a whole number" in printed
    for value, cores in (("", None), ("0", None), ("100000", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        assert training.cores_of_a_process() == (cores or len(os.sched_getaffinity(0)))


def test_numbers_without_bounds(start, monkeypatch):
    """They are refused at once, rather than counted up to."""
    huge = "1" + "0" * 400
    for words, message in (
        (("--iterations", huge), "--iterations must be at most 9223372036854775807"),
        (("--batch-size", 10**12), "--batch-size 1000000000000 is more than 1,000 times the 40 images"),
        (("--depth", 6 * 10**11 + 2), "depth 600000000002 is more than this code builds"),
    ):
        status, printed = start(*TINY, *words, "--out", "run")
        assert status == 2 and message in printed
    status, printed = start("--workers", 10**9, "--epochs", huge, script=imagenet_train)
    assert status == 2 and "--epochs must be at most" in printed
    status, printed = start("--workers", 10**9, script=imagenet_train)
    assert status == 2 and "--workers must be at most 1000" in printed


def test_too_few_threads(start, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    status, printed = start(*TINY, "--out", "run")
    assert status == 2 and "cifar_train.py: can't start new thread" in printed


@pytest.mark.parametrize("values", ('"x"', "null", "[1]"))
def test_a_result_that_is_no_number(start, values):
    pathlib.Path("run").mkdir()
    pathlib.Path("run/result.json").write_text(f'{{"diverged": false, "test_error": {values}}}')
    with pytest.raises(ValueError, match="one of test_error is no number"):
        checkpoint.read_result("run", ["test_error"])
    pathlib.Path("run/result.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="result.json cannot be read"):
        checkpoint.read_result("run", ["test_error"])


def test_without_git(start, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert start(*TINY, "--out", "run")[0] == 0
    environment = json.loads(pathlib.Path("run/config.json").read_text())["environment"]
    assert environment["commit"] is None and environment["modified"] is None


def test_a_problem_of_one_process_ends_both(tmp_path):
    (tmp_path / "file").write_text("")
    assert start_workers(2, "cifar_train.py", *TINY, "--out", tmp_path / "file" / "run") == [2, 2]


def be_unread(*words):
    """What a forked process does whose output is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = open(1, "w")
    conftest.be(*words)


def test_nobody_reads_the_output(tmp_path):
    words = "cifar_train.py", *TINY, "--iterations", "32", "--out", tmp_path / "run"  # as many rows as a run has
    process = fork(*words, target=be_unread)
    process.join(timeout=120)
    assert process.exitcode == 0 and (tmp_path / "run" / "result.json").exists()


def test_help_is_grouped_and_shows_defaults(start):
    status, printed = start("--help")
    assert status == 0
    printed = " ".join(printed.split())
    for group in ("the net:", "the data:", "the recipe:", "the machine and the run:"):
        assert group in printed
    for default in ("(default cifar10)", "(default 0.1)", "(default 64000; resnet-1k-layers 156250)", "(default 1)"):
        assert default in printed


# What the project promises of its own text


def test_readme_prints_the_step_verbatim():
    source = (HERE / "training.py").read_text()
    node = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "step")
    step = ast.get_source_segment(source, node)
    assert f"```python\n{step}\n```" in (HERE / "README.md").read_text()
    assert len(step.splitlines()) - 2 <= 15  # the signature and the docstring not counted


def test_readme_snippet_runs(capsys):
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), flags=re.DOTALL)
    (snippet,) = (snippet for snippet in snippets if not snippet.startswith("def step"))
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == re.search(r"# (torch\.Size.*)", snippet)[1]


IMPORTS = """
import importlib, sys
import torch.distributed
sys.dont_write_bytecode = True
for name in {names}:
    sys.modules.pop(name, None)  # the forking process has imported some
for name in {names}:
    importlib.import_module(name)
assert not torch.distributed.is_initialized()
"""


def test_imports_do_nothing(tmp_path):
    """No output, no file, no process group, no run: everything is behind main()."""
    names = [path.stem for path in HERE.glob("*.py") if not path.stem.startswith("test_")]
    (tmp_path / "imports.py").write_text(IMPORTS.format(names=names))
    before = sorted(HERE.iterdir())
    process = fork(tmp_path / "imports.py", printed=tmp_path / "printed")
    process.join(timeout=60)
    assert process.exitcode == 0 and (tmp_path / "printed").read_text() == "" and sorted(HERE.iterdir()) == before


def test_threads_that_spin_less():
    """Every script that computes sets it before it imports torch, unless the user has."""
    code = """
import os, runpy, sys
class Finder:
    def find_spec(name, *more):
        if name == "torch":
            raise SystemExit(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv[1])
"""
    scripts = "cifar_train imagenet_train detection_train propagation benchmark predict".split()
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for script in scripts:
        for given in (None, "7"):
            variables = environment | ({"GOMP_SPINCOUNT": given} if given else {})
            words = [sys.executable, "-c", code, f"{script}.py"]
            done = subprocess.run(words, cwd=HERE, env=variables, capture_output=True, text=True)
            assert done.stderr.strip() == (given or "2000"), script


def test_nothing_is_selected_on_the_test_set():
    for path in [*HERE.glob("*.sh"), *(p for p in HERE.glob("*.py") if not p.stem.startswith("test_"))]:
        assert not re.search(r"\bbest\b", path.read_text()), path


def test_units_and_models_import_torch_alone():
    for name in ("units", "models"):
        tree = ast.parse((HERE / f"{name}.py").read_text())
        imported = {
            alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert imported <= {"torch", "units", *sys.stdlib_module_names}


if __name__ == "__main__":
    checkpoint.start_processes("cpu")
    twenty_steps(pathlib.Path(sys.argv[1], f"two-{dist.get_rank()}"), pytest.MonkeyPatch())
    dist.destroy_process_group()


def test_links_lead_somewhere():
    """Files and headings that the pages name, GitHub's way: lower case, words joined by hyphens."""
    for page in (
        HERE / "README.md",
        *HERE.glob("docs/*.md"),
        HERE / "results" / "README.md",
        HERE / "results" / "speed.md",
    ):
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text("utf-8")):
            path, _, heading = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), (page.name, target)
            titles = re.findall(r"^#+ (.*)", linked.read_text("utf-8"), re.MULTILINE) if heading else []
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in anchors, (page.name, target)
