"""What cifar_train.py and data.py do to numbers: the recipe against a naive second implementation, the data, equality over
processes, and what a user sees. Each test can fail; none looks at a clock."""

import argparse
import csv
import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cifar_train
import data
import models
import units

HERE = pathlib.Path(__file__).parent
SHARED = HERE.parent / "shared"


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flags(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["cifar_train.py", *words])
    return cifar_train.parse_flags()


def pictures(n, seed=0):
    """Random images and labels: every bit of them matters and none is learnable."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))
    return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(rng.integers(0, 10, n))


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


def naive_training(weights, images, labels, iterations, batch, micro, recipe, seed):
    """The losses of SGD over an endless shuffled stream, each image cut out of its own zero-padded copy."""
    w = {name: value.clone().requires_grad_() for name, value in weights.items()}
    velocity = {name: torch.zeros_like(value) for name, value in w.items()}
    x = images.numpy().astype(np.float32)
    if recipe == "paper":
        x = x - images.numpy().astype(np.float64).mean(axis=0).astype(np.float32)
    else:
        pixels = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
        mean, std = (s.astype(np.float32).reshape(1, 3, 1, 1) for s in (pixels.mean(axis=1), pixels.std(axis=1)))
        x = (x - mean) / std
    padded = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)))
    stream = np.concatenate([data.epoch_draws(seed, e, len(images), "cpu").numpy() for e in range(9)], axis=1).T
    losses = []
    for t in range(iterations):
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
        rate = 0.01 if t < 1 and recipe == "paper" else 0.1
        with torch.no_grad():
            for (name, value), gradient in zip(w.items(), gradients, strict=True):
                weight_of_layer = value.dim() > 1
                if weight_of_layer or recipe != "paper":
                    gradient = gradient + 1e-4 * value
                velocity[name] = 0.9 * velocity[name] + gradient
                value -= rate * (velocity[name] if recipe == "paper" else gradient + 0.9 * velocity[name])
    return losses


@pytest.mark.parametrize("recipe", cifar_train.RECIPES)
def test_training_equals_the_naive_one_loss_by_loss(recipe, monkeypatch):
    args = flags(monkeypatch, "--recipe", recipe, "--batch-size", "8", "--micro-batch", "4", "--seed", "3")
    args.warmup = 1 if recipe == "paper" else 0  # the first of the three steps
    images, labels = pictures(10)  # fewer than two batches: the second step crosses into the next epoch
    torch.manual_seed(0)
    net = models.cifar_resnet(20, units.Basic).double().to(memory_format=torch.channels_last)
    expected = naive_training(dict(net.named_parameters()), images, labels, 3, 8, 4, recipe, seed=3)
    mean, std = data.normalisation(images, recipe)
    crops, mean_crops = data.every_crop(images), data.every_crop(mean)
    shared, running = models.flatten(net)
    optimizer = cifar_train.sgd(net, args)
    scaler, autocast = torch.amp.GradScaler("cpu", enabled=False), torch.autocast("cpu", enabled=False)
    for iteration in range(3):
        for group in optimizer.param_groups:
            group["lr"].fill_(cifar_train.lr_at(iteration, args))
        draws = data.batch_draws(3, iteration, 8, len(images), "cpu").chunk(2, dim=1)
        batches = [(data.augment(crops, mean_crops, std, d).double(), labels[d[0]]) for d in draws]
        loss, _ = cifar_train.step(net, batches, shared, running, optimizer, scaler, autocast)
        assert abs(loss.item() - expected[iteration]) < 1e-9, iteration
