"""The defaults that make it fast, --compile and benchmark.py. Counts and equality; no test looks at a clock."""

import copy
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import types
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import checkpoint
import cifar_train
import conftest
import data
import models
import training
import units
from conftest import HERE, fork

TINY = "--dataset synthetic --images 40 --depth 8 --batch-size 8 --device cpu --warmup 0".split()


SCRIPT = cifar_train  # what `start` runs


@pytest.fixture(autouse=True)
def no_graphs_yet():
    torch.compiler.reset()
    counters.clear()


def prepared(depth, unit, dtype=torch.float32, micro=2):
    """A net on its way through training: the arguments of training.step."""
    torch.manual_seed(0)
    net = models.cifar_resnet(depth, unit).to(dtype=dtype, memory_format=torch.channels_last)
    shared, running = training.flatten(net)
    lr = torch.tensor(0.1, dtype=dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr, 0.9, fused=True)
    images = torch.randn(micro, 2, 3, 32, 32, dtype=dtype)
    batches = [(part.contiguous(memory_format=torch.channels_last), torch.tensor([0, 1])) for part in images]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return net, training.classification, batches, shared, running, optimizer, scaler, nullcontext()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def host_reads(operations):
    """Those for whose result, or its shape, the host must wait. Indexing is one if by truth values."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    reads = [(func, args) for func, args in operations.seen if tags & set(func.tags)]
    numbers = (torch.int32, torch.int64)
    return [
        func
        for func, args in reads
        if func is not torch.ops.aten.index.Tensor or any(i is not None and i.dtype not in numbers for i in args[1])
    ]


@pytest.mark.parametrize("name", ("basic", "bottleneck-preact", "basic-exclusive-gating", "basic-dropout-shortcut"))
def test_the_step_reads_nothing_on_the_host(name, world_of_one):
    depth = 8 if name.startswith("basic") else 11
    net, objective, batches, *rest = prepared(depth, units.UNITS[name])
    images = torch.zeros(9, 3, 32, 32, dtype=torch.uint8)
    mean, std = data.normalisation(images, "paper")
    crops, mean_crops = data.every_crop(images), data.every_crop(mean)
    draws = data.batch_draws(1, 0, 4, 9, "cpu")
    with Operations() as operations:
        batches = [(data.augment(crops, mean_crops, std, d), batches[0][1]) for d in draws.chunk(2, dim=1)]
        training.step(net, objective, batches, *rest)
    assert len(operations.seen) > 100 and not host_reads(operations)
    with Operations() as operations:  # and the test would see one
        rest[0].sum().item()
        rest[0].nonzero()
        rest[0][rest[0] > 0]
    assert len(host_reads(operations)) == 3


@pytest.mark.parametrize("name, most", [("basic", 10), ("basic-preact", 10), ("bottleneck-preact", 10), ("single", 11)])
def test_operations_per_convolution(name, most, world_of_one):
    """Forward and backward together; the optimizer, the statistics and the gradients' average cost the same at any
    depth. (Convolution, BN and ReLU, each backwards too, and adding to three gradients are nine.)"""
    unit, launches = units.UNITS[name], []
    for count in (1, 2, 3):
        words = prepared(3 * count * unit.weights + 2, unit, micro=1)
        with benchmark.Traffic() as traffic:
            training.step(*words)
        launches.append(traffic.launches)
    more, again = launches[1] - launches[0], launches[2] - launches[1]
    assert 0 < more == again and more / (3 * unit.weights) <= most


def test_defaults(start, monkeypatch):
    """What cifar_train.py trains and evaluates is laid out and run as results/speed.md says."""
    seen, step = {}, training.step

    def watched_output(net, images, logits):
        if not net.training:
            seen["evaluated"].append(logits.is_inference())

    def watched_step(net, objective, batches, shared, running, optimizer, *more):
        step(net, objective, batches, shared, running, optimizer, *more)
        seen["step"] = (net, batches, optimizer)
        if "evaluated" not in seen:
            seen["evaluated"] = []
            net.register_forward_hook(watched_output)

    monkeypatch.setattr(training, "step", watched_step)
    assert start(*TINY, "--iterations", 3, "--out", "run")[0] == 0
    net, batches, optimizer = seen["step"]
    wide = [p for p in net.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    assert all(p.grad.stride() == p.stride() for p in net.parameters())
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)
    assert optimizer.defaults["fused"] and all(torch.is_tensor(group["lr"]) for group in optimizer.param_groups)
    assert seen["evaluated"] == [True]


FREED = """
import resource, torch, checkpoint
checkpoint.start_processes("cpu") if {keep} else None
for i in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = torch.ones(2**24)
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_is_kept(tmp_path):
    """A tensor of 64 MB, freed and made again, is page faults by the thousand, unless the heap keeps it."""
    script, faults = tmp_path / "freed.py", []
    for keep in (True, False):
        script.write_text(FREED.format(keep=keep))
        fork(script, printed=tmp_path / f"{keep}").join(timeout=60)
        faults.append(int((tmp_path / f"{keep}").read_text()))
    assert faults[0] < 100 and faults[1] > 4000


# --compile


@pytest.mark.slow
@pytest.mark.parametrize("name, depths", [("basic", (14, 20)), ("bottleneck-preact", (20, 29))])
def test_compiled_steps_equal_plain_ones(name, depths, world_of_one):
    """A handful of graphs, all made in the first step, and none more for a deeper net, a new learning rate, an
    evaluation with a smaller last batch, or a net that goes on from a state."""
    evaluated = torch.randint(256, (251, 3, 32, 32), dtype=torch.uint8), torch.zeros(251, dtype=torch.int64)
    mean = torch.full((3, 32, 32), 128.0, dtype=torch.float64)
    for depth in depths:
        nets = []
        for compiled in (True, False):
            net, *words = prepared(depth, units.UNITS[name], torch.float64)
            optimizer = words[4]
            names, graphs = list(net.state_dict()), []
            if compiled:
                training.compile_units(net)
            before = counters["stats"]["unique_graphs"]
            for rate in (0.1, 0.1, 0.01, 0.001):
                optimizer.param_groups[0]["lr"].fill_(rate)
                training.step(net, *words)
                cifar_train.evaluate(net, *evaluated, mean, 64.0, nullcontext())
                graphs.append(counters["stats"]["unique_graphs"] - before)
                net.load_state_dict(copy.deepcopy(net.state_dict()))
            if compiled and depth == depths[0]:
                assert 3 <= graphs[0] <= 6
                assert set(graphs) == {graphs[0]}
            else:
                assert set(graphs) == {0}
            assert list(net.state_dict()) == names
            nets.append(net)
        for value, plain in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
            torch.testing.assert_close(value, plain, rtol=0, atol=1e-9)
    assert not counters["graph_break"]


def test_a_compiled_run_continues_to_the_same_bits(start, monkeypatch, tmp_path):
    """Stopped after 3 of 6 iterations, and it may go on with --compile or without."""
    words = ["--compile", "--iterations", 6]
    assert start(*TINY, *words, "--out", tmp_path / "whole")[0] == 0
    check, calls = checkpoint.Stop.check, []

    def stop_after_3(self, due=False):
        calls.append(due)
        if len(calls) == 4:
            raise checkpoint.Stopped(signal.SIGTERM)
        return check(self, due)

    for out, again in (("parts", words), ("mixed", words[1:])):
        calls.clear()
        monkeypatch.setattr(checkpoint.Stop, "check", stop_after_3)
        assert start(*TINY, *words, "--out", tmp_path / out)[0] == 143
        monkeypatch.setattr(checkpoint.Stop, "check", check)
        assert checkpoint.load(tmp_path / out)["iteration"] == 3
        assert start(*TINY, *again, "--out", tmp_path / out)[0] == 0
    whole, parts = (checkpoint.load(tmp_path / out)["model"] for out in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert "stem.0.weight" in whole and not any("_orig_mod" in name for name in whole)


def test_no_compiler_is_said_before_anything_is_begun(start, monkeypatch, tmp_path):
    def compile(function):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", compile)
    status, printed = start(*TINY, "--compile", "--iterations", 6, "--out", tmp_path / "run")
    assert status == 2 and "torch.compile does not work here: no C++ compiler\n" in printed
    assert not (tmp_path / "run").exists()


# benchmark.py


@pytest.fixture
def measure(start, monkeypatch):
    """Run benchmark.py with a clock of our own, on which ours takes 2 s, the other `other` s. Returns the exit status,
    and what was printed as JSON or as it was."""

    def thread(target, args, daemon):  # in place of the other one's process: it need not import torch
        *args, connection = args
        connection = multiprocessing.connection.Connection(os.dup(connection.fileno()))
        return threading.Thread(target=target, args=(*args, connection), daemon=daemon)

    context = types.SimpleNamespace(Process=thread)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    ones, load_cifar = torch.ones, data.load_cifar  # no clock runs, so little will do
    monkeypatch.setattr(torch, "ones", lambda *shape, **more: ones(*(min(n, 1000) for n in shape), **more))
    monkeypatch.setattr(data, "load_cifar", lambda dataset, root, count: load_cifar(dataset, root, 50))

    def run(*words, other=3.0):
        turns = itertools.count()

        def seconds(work, args, times=1):
            if isinstance(work, multiprocessing.connection.Connection):
                work.send(1)
                assert work.recv() > 0
                return other + 0.1 * (next(turns) % 3)
            work()
            return 2.0

        monkeypatch.setattr(benchmark, "seconds", seconds)
        status, printed = start(*words, script=benchmark)
        return status, json.loads(printed.splitlines()[0]) if "--json" in words and status != 2 else printed

    return run


STEP = "step --depth 8 --batch-size 2 --pairs 3 --json --device cpu".split()


def test_ratios_of_pairs(measure):
    status, record = measure(*STEP)
    ours, theirs = record["figures"].values()
    assert status == 0 and ours == {"seconds": 2.0, "ratio": [1, 1, 1]}
    assert 1.5 <= theirs["ratio"][0] <= theirs["ratio"][1] <= theirs["ratio"][2] <= 1.6
    assert record["notes"]["parameters"] == 75_290 and record["notes"]["equal"] is True
    assert record["environment"]["threads"] == 1 and len(record["environment"]["load average"]) == 2
    assert [measure(*STEP, "--min-ratio", r)[0] for r in (1.52, 1.54)] == [0, 1]  # its quartiles: 1.525, 1.55, 1.575


def test_floor_counts_what_a_step_does(measure):
    """ResNet-8's multiplications, three times: forward, and backward to the input (but not to the images) and to the
    weights; twice as many images need twice the FLOPs in as many launches."""
    two, four = (measure(*STEP, "--batch-size", n)[1]["notes"] for n in (2, 4))
    first, stage = 32**2 * 9 * 3 * 16, 32**2 * 9 * 16 * 16
    later = sum((32 // 2**s) ** 2 * 9 * (16 * 2**s) ** 2 * 1.5 for s in (1, 2))
    forward = 2 * 2 * (first + 2 * stage + later + 640)
    assert two["FLOPs"] == 3 * forward - 2 * 2 * first
    assert four["FLOPs"] == 2 * two["FLOPs"] and four["launches"] == two["launches"]
    parts = measure(*STEP, "--batch-size", 4, "--micro-batch", 2)[1]["notes"]
    assert parts["FLOPs"] == four["FLOPs"] and parts["micro-batches"] == 2 and parts["launches"] > four["launches"]
    with benchmark.Traffic() as traffic:
        torch.ones(1000).view(10, 100).t().add(1)
    assert (traffic.launches, traffic.bytes) == (2, 3 * 4000)


PEER = """
import os, signal
from torch import nn
print("imported")
def small(classes=10): return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))
def wrong(): return nn.Linear(4, 4)
def none(): pass
def frozen(): return small().requires_grad_(False)
def leaves(): raise SystemExit(3)
def killed(): os.kill(os.getpid(), signal.SIGKILL)
"""


def test_any_peer(measure, tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)
    for name in ("small", "small(classes=10)"):
        status, record = measure(*STEP, "--peer", f"{peer}:{name}")
        assert status == 0 and record["notes"]["the other's parameters"] == 30_730 and not record["notes"]["equal"]
    assert measure(*STEP, "--dataset", "imagenet", "--depth", 18, "--peer", "torchvision.models:resnet18")[0] == 0
    found = [f"{peer}:{name}" for name in ("wrong", "none", "absent", "frozen", "leaves", "small().flatten")]
    for name in (*found, "absent.py:net", "no_module:net", "torchvision.models:resnet19", "math", ""):
        status, printed = measure(*STEP, "--peer", name)
        assert status == 2 and f"--peer {name}" in printed and "Traceback" not in printed, name


def be_apart(words, printed, variables):
    """What a forked process does, with its output and its errors in two files."""
    sys.stdout, sys.stderr = open(f"{printed}.out", "w"), open(f"{printed}.err", "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    conftest.be(words, None, variables)


def test_a_peer_is_measured_in_a_process_of_its_own(tmp_path):
    """Really started, timed and ended, also when it ends itself; what it prints is no figure."""
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)
    started = {}
    for name in ("small", "killed"):
        words = "benchmark.py", *STEP, "--peer", f"{peer}:{name}"
        started[name] = fork(*words, target=be_apart, printed=tmp_path / name)
    for name, status in (("small", 0), ("killed", 2)):
        started[name].join(timeout=120)
        printed, errors = ((tmp_path / f"{name}.{stream}").read_text() for stream in ("out", "err"))
        assert started[name].exitcode == status and "Traceback" not in errors, errors
        assert "imported" in errors and ("has ended" in errors) == (status == 2)
        figures = json.loads(printed)["figures"] if status == 0 else {}
        assert all(figure["seconds"] > 0 for figure in figures.values()) and bool(printed) == (status == 0)


def test_a_damaged_photograph_is_named(measure, tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "1.jpg").write_text("none")
    status, printed = measure("data", "--data", tmp_path, "--pairs", 1)
    assert status == 2 and "1.jpg cannot be read" in printed and "Traceback" not in printed


COMPILED = pytest.param("step --compile", marks=pytest.mark.slow)


@pytest.mark.parametrize("words", (COMPILED, "evaluate", "depth", "data", "side-by-side"))
def test_every_figure_is_printed(measure, monkeypatch, words):
    monkeypatch.setattr(benchmark, "DEPTHS", {8: "basic", 11: "bottleneck-preact"})
    small = ["--depth", 8, "--batch-size", 2]
    size = {"step": small, "side-by-side": small, "evaluate": small[:2]}.get(words.split()[0], [])
    status, printed = measure(*words.split(), *size, "--pairs", 1)
    assert status == 0
    for part in ("## `benchmark.py", "| times the first: median (quartiles) |", "load average: ", "torch: "):
        assert part in printed
    spin = f"GOMP_SPINCOUNT: {os.environ['GOMP_SPINCOUNT']}"
    own = {"step --compile": "compiled graphs: 3;", "depth": "11: checkpoint, bytes", "side-by-side": spin}
    assert own.get(words, "") in printed


@pytest.mark.parametrize(
    "words, message",
    [
        ("step --depth 21", "depth 21 is impossible"),
        ("step --dataset imagenet --depth 20", "depth 20 is impossible"),
        ("step --batch-size 0", "--batch-size must be at least 1"),
        ("step --micro-batch 48", "--micro-batch 48 does not divide --batch-size 128"),
        ("evaluate --threads 0", "--threads must be at least 1"),
        ("data --pairs 0", "--pairs must be at least 1"),
        ("data --depth 20", "unrecognized arguments"),
        ("step --unit gated", "invalid choice"),
        ("", "required"),
    ],
)
def test_bad_input(measure, words, message):
    status, printed = measure(*words.split())
    assert status == 2 and message in printed and "Traceback" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(measure):
    for flag in ("--device", "--clock"):
        status, printed = measure(*STEP, flag, "cuda")
        assert status == 2 and "GPU" in printed


def test_the_table_claims_what_was_printed():
    """Every measured number of the table at the top of results/speed.md stands below it, as benchmark.py printed it."""
    page = (HERE / "results" / "speed.md").read_text()
    table, printed = page.partition("\n## ")[0], page.partition("## What benchmark.py printed")[2]
    measured = [line.split(" | ")[2] for line in table.splitlines() if line.startswith("| ") and "aim" not in line]
    numbers = re.findall(r"[\d.,]*\d", " ".join(measured))
    assert len(numbers) > 20
    for number in numbers:
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", printed), number
