"""What waits for a GPU: `pytest -m gpu` runs exactly those tests, and without one each skips. The others show the CUDA
path on a CPU, where a capture keeps the function that it is given and a replay calls it. No test looks at a clock."""

import contextlib
import csv
import functools
import os
import signal
import types
import weakref

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import benchmark
import checkpoint
import cifar_train
import data
import imagenet_train
import models
import predict
import training
import units
from conftest import start_workers

SCRIPT = cifar_train  # what `start` and `flags` run

CIFAR = "--dataset synthetic --images 40 --depth 8 --batch-size 8 --iterations 6 --warmup 2".split()
IMAGENET = "--dataset synthetic --depth 18 --crop 32 --images 16 --batch-size 8 --micro-batch 4 --epochs 3".split()
SCRIPTS = [(cifar_train, [*CIFAR, "--preact"]), (imagenet_train, [*IMAGENET, "--workers", 1])]


def needs(gpus):
    """A mark for a test that needs so many GPUs, beside the mark gpu."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return pytest.mark.skipif(there < gpus, reason=f"needs {gpus} GPU{'s' * (gpus > 1)}, and torch sees {there}")


def assert_equal_bits(one, other):
    """That two runs ended with the same weights, statistics, momenta and sums."""
    one, other = checkpoint.load(one), checkpoint.load(other)
    assert one["model"].keys() == other["model"].keys() and torch.equal(one["sums"], other["sums"])
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    for i, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], other["optimizer"]["state"][i]["momentum_buffer"])


def stop_before(iteration, monkeypatch):
    """Ask the next run to stop when it has done so many iterations, and no later one."""
    check, calls = checkpoint.Stop.check, []

    def counted(self, due=None):
        calls.append(due is not None)
        if due is not None and sum(calls) == iteration + 1:
            raise checkpoint.Stopped(signal.SIGTERM)
        return check(self, due)

    monkeypatch.setattr(checkpoint.Stop, "check", counted)


# On a CPU


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def replay(self):
        self.iterate()


@pytest.fixture
def gpu(monkeypatch):
    """A function that puts a slow GPU in place of CUDA from then on: an iteration has ended when that was asked three
    times. Returns what has been seen of it."""
    narrow = functools.partial(models.imagenet_resnet, width=8)  # a tenth of the time
    monkeypatch.setattr(imagenet_train, "imagenet_resnet", narrow)

    def put():
        seen = types.SimpleNamespace(capturing=None, captures=0, running=[], ahead=[], hangs=False)

        class Event:
            def record(self):
                self.asked = 0
                seen.running.append(self)

            def query(self):
                if self in seen.running:
                    self.asked += 1
                    if self.asked == 3 and not seen.hangs:
                        del seen.running[: 1 + seen.running.index(self)]
                return self not in seen.running

        @contextlib.contextmanager
        def capture(graph, stream, capture_error_mode):
            seen.capturing, seen.compiled = graph, counters["stats"]["unique_graphs"]
            yield
            seen.capturing, seen.captures = None, seen.captures + 1

        def launch(iterate, draws):
            if seen.capturing is None:
                iterate(draws)
            else:
                seen.capturing.iterate = functools.partial(replayed, iterate, draws)

        def replayed(iterate, draws):
            seen.ahead.append(len(seen.running))
            iterate(draws)

        graphed, enter = training.graphed, training.Training.__enter__

        def begin(run):
            run.try_graph = True  # as it begins on a GPU
            return enter(run)

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": contextlib.nullcontext}
        fakes |= {"synchronize": seen.running.clear, "CUDAGraph": Graph, "graph": capture, "Event": Event}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(training, "graphed", lambda it, *more: graphed(functools.partial(launch, it), *more))
        monkeypatch.setattr(training.Training, "__enter__", begin)
        return seen

    return put


@pytest.mark.parametrize("script, words", SCRIPTS)
def test_replayed_steps_give_the_bits_of_plain_ones(script, words, start, gpu, monkeypatch):
    """Over two sessions, each of which captures at its first batch, and with the host two iterations ahead at most."""
    words = [*words, "--device", "cpu"]
    assert start(*words, "--out", "plain", script=script)[0] == 0
    seen = gpu()
    stop_before(2, monkeypatch)
    assert start(*words, "--out", "graphed", script=script)[0] == 143
    status, printed = start(*words, "--out", "graphed", script=script)
    assert status == 0 and "without a CUDA graph" not in printed and seen.captures == 2
    assert seen.ahead == [0, 1, *seen.ahead[2:]] and len(seen.ahead) == 6 and max(seen.ahead) == 1
    assert_equal_bits("plain", "graphed")
    plain, graphed = (list(csv.DictReader(open(f"{out}/log.csv"))) for out in ("plain", "graphed"))
    assert [row | {"waited": "", "seconds": ""} for row in plain] == [
        row | {"waited": "", "seconds": ""} for row in graphed
    ]


def test_a_compiled_step_is_captured_compiled(start, gpu, monkeypatch):
    """The warm-ups compile, and after the capture nothing more is compiled. (What they compile to does not matter.)"""
    torch.compiler.reset()
    counters.clear()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend="eager", **options))
    words = [*CIFAR, "--device", "cpu", "--compile"]
    assert start(*words, "--out", "plain")[0] == 0
    seen = gpu()
    torch.compiler.reset()
    counters.clear()
    assert start(*words, "--out", "graphed")[0] == 0
    assert seen.captures == 1 and 3 <= seen.compiled == counters["stats"]["unique_graphs"] <= 7
    assert_equal_bits("plain", "graphed")


def test_what_cannot_be_a_graph_says_so(start, gpu, world_of_one, capsys, monkeypatch):
    seen = gpu()
    weights, calls = torch.zeros(3), []

    def iterate(draws):
        calls.append(1)
        weights.add_(draws[0])
        if len(calls) in broken:
            raise RuntimeError("not permitted when capturing")

    @contextlib.contextmanager
    def invalid(graph, **options):
        try:
            yield
        finally:
            raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda, "graph", invalid)
    broken = {4}
    step = training.graphed(iterate, [torch.ones(3)], [weights])
    assert "without a CUDA graph: not permitted when capturing\n" in capsys.readouterr().out
    assert weights.tolist() == [0, 0, 0]
    step([torch.ones(3)])
    assert weights.tolist() == [1, 1, 1] and len(calls) == 5
    broken = {7}
    with pytest.raises(RuntimeError, match="not permitted"):  # a warm-up is the step itself
        training.graphed(iterate, [torch.ones(3)], [weights])
    checkpoint.end_processes()
    status, printed = start(*CIFAR, "--device", "cpu", "--unit", "basic-dropout-shortcut", "--out", "run")
    assert status == 0 and "without a CUDA graph: dropout\n" in printed and seen.captures == 0


def test_a_captured_step_keeps_what_it_reads(gpu, monkeypatch):
    """Or its memory would be another tensor's by the next replay."""
    gpu()
    graphs, images, weights = [], torch.ones(3), torch.zeros(3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    read = weakref.ref(images)
    step = training.graphed(lambda draws, images=images: weights.add_(images), [torch.ones(3)], [weights])
    del images, graphs[0].iterate  # it knows addresses alone
    assert read() is not None
    del step
    assert read() is None


def test_a_replay_that_does_not_end(gpu):
    """Another process hangs, which NCCL's watchdog does not see in a graph."""
    seen, weights = gpu(), torch.zeros(3)
    replay = training.graphed(lambda draws: weights.add_(draws[0]), [torch.ones(3)], [weights], None, 0)
    seen.hangs = True
    for _ in range(2):
        replay([torch.ones(3)])
    with pytest.raises(dist.DistError, match="has not ended in 0 s") as error:
        replay([torch.ones(3)])
    assert checkpoint.is_lost(error.value) and weights.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "error, status", [(MemoryError("too much"), 2), (TypeError("a bug"), 1), (dist.DistError(), 1)]
)
def test_one_of_several_processes_ends_without_the_others(start, monkeypatch, error, status):
    """Leaving the group, on a GPU, would wait for them, and they wait for it."""
    done, leave = [], dist.destroy_process_group

    def ends(status):
        done.append(status)
        raise SystemExit(status)

    def fails(args, device):
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        raise error

    monkeypatch.setattr(os, "_exit", ends)
    monkeypatch.setattr(cifar_train, "train", fails)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("left") or leave())
    found, printed = start(*CIFAR, "--device", "cpu", "--out", "run")
    assert found == status == done[0] and (str(error) or "lost another one") in printed


def test_the_graph_is_gone_before_the_group_is_left(start, gpu, monkeypatch):
    """With a living graph it could not be left. However the run ends: by itself, by a signal, or by a lost picture."""
    seen, graphs, leave = gpu(), [], dist.destroy_process_group

    def left():
        assert len(graphs) == 1 and graphs.pop()() is None
        leave()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(weakref.ref(graph := Graph())) or graph)
    monkeypatch.setattr(dist, "destroy_process_group", left)
    words = [*IMAGENET, "--workers", 0, "--device", "cpu"]
    assert start(*words, "--out", "whole", script=imagenet_train)[0] == 0
    with monkeypatch.context() as patch:
        stop_before(2, patch)
        assert start(*words, "--out", "stopped", script=imagenet_train)[0] == 143
    make, made = data.make_batch, []

    def lost(*words):
        made.append(1)
        if len(made) == 5:
            raise ValueError("it is gone")
        return make(*words)

    monkeypatch.setattr(data, "make_batch", lost)
    status, printed = start(*words, "--out", "lost", script=imagenet_train)
    assert status == 2 and "it is gone" in printed and "saved in lost" in printed
    assert seen.captures == 3 and not graphs


def test_a_gpu_that_torch_cannot_compute_on(start, monkeypatch):
    """Such as one that is older than torch supports."""
    ones = torch.ones

    def fail(*size, device=None, **options):
        if device is not None and "cuda" in str(device):
            raise RuntimeError("no kernel image is available\nfor it")
        return ones(*size, device=device, **options)

    fakes = {"is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "ones", fail)
    for script, words, device in ((cifar_train, CIFAR, "cuda:0"), (predict, ["net.pth", "a.png"], "cuda")):
        status, printed = start(*words, script=script)
        assert status == 2
        assert f"cannot compute on {device} (no kernel image is available): choose --device cpu\n" in printed


@pytest.mark.parametrize("computing", (True, False))
def test_nobody_waits_for_images_while_the_gpu_computes(computing, monkeypatch):
    """The host is ahead of the GPU, so it may wait where the GPU does not."""
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    run = types.SimpleNamespace(waited=1.0, computed=types.SimpleNamespace(query=lambda: not computing))
    with training.Training.waiting(run):
        clock[0] = 2.0
    assert run.waited == (1.0 if computing else 3.0)


def test_a_process_leaves_cores_to_others(flags, monkeypatch):
    """The default --workers and the compiler's threads, by the cores and the processes of the machine."""
    from torch._inductor import config

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    net = models.cifar_resnet(8, units.Basic)
    for cores, processes, workers, threads in ((16, 1, 14, 16), (16, 4, 2, 4), (2, 1, 1, 2), (4, 8, 1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert flags(*IMAGENET, script=imagenet_train).workers == workers
        with config.patch(compile_threads=32):
            training.compile_units(net)
            assert config.compile_threads == threads


def test_large_views_are_evaluated_in_smaller_batches(world_of_one):
    """So that no protocol needs more memory than so many crops do, whatever its size of images."""
    images, seen = data.imagenet_part("synthetic", None, "val", 60), []
    net = models.imagenet_resnet(18, units.Basic, 10, width=16)
    net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0].shape))
    precision = training.Precision("float32", torch.device("cpu"))
    imagenet_train.evaluate([(net, precision, None)], images, "multi-scale", 32, 12, 0, torch.device("cpu"))
    assert {n * height * width <= 12 * 32 * 32 or n == 1 for n, _, height, width in seen} == {True}
    assert sum(n for n, *_ in seen) == 2 * 5 * len(images) and max(n for n, *_ in seen) > 1


@pytest.mark.parametrize("figure", ("step", "depth"))
def test_figures_of_a_gpu(figure, flags, gpu, monkeypatch, world_of_one):
    """The rows that benchmark.py prints of one; what it measures there are captured steps, and these train."""
    seen, our_step, nets, works = gpu(), benchmark.our_step, [], {}
    monkeypatch.setattr(benchmark, "our_step", lambda args: nets.append(our_step(args)) or nets[-1])
    monkeypatch.setattr(benchmark, "apart", lambda make, args: make(args))
    monkeypatch.setattr(benchmark, "DEPTHS", {8: "basic", 11: "bottleneck-preact"})

    def compare(found, args):
        works.clear()
        works.update(found)
        return {name: {"seconds": 1.0, "ratio": [1, 1, 1]} for name in found}

    monkeypatch.setattr(benchmark, "compare", compare)
    words = ["--depth", 8, "--batch-size", 4, "--micro-batch", 2] if figure == "step" else []
    args = flags(figure, *words, "--device", "cpu", script=benchmark)
    args.device, args.clock, args.graph = torch.device("cpu"), "cpu", True
    figures, notes = benchmark.FIGURES[figure](args)
    if figure == "step":
        assert notes["micro-batches"] == 2
        assert list(figures) == [
            "ours, as one CUDA graph",
            "without cudnn.deterministic",
            "ours, launch by launch",
            "NCHW, plain SGD",
        ]
    for work, (step, _) in zip(works.values(), nets if figure == "depth" else 2 * nets, strict=False):
        weights = step.args[0].fc.weight
        before, replayed = weights.detach().clone(), len(seen.ahead)
        work()
        assert len(seen.ahead) == replayed + 1 and not torch.equal(weights, before)
    assert seen.captures == 2


# The precisions, against float64


def one_step(device, dtype, precision, layout, unit):
    """The gradient of a step and the running statistics after it, float64, from the same weights and images always."""
    torch.manual_seed(0)
    net = models.cifar_resnet(20, units.UNITS[unit])
    images, labels = torch.randn(2, 16, 3, 32, 32), torch.randint(10, (2, 16))
    shared, running = training.flatten(net.to(device, dtype, memory_format=layout))
    optimizer, scaler = training.sgd(net, 0.1), torch.amp.GradScaler(device.type, enabled=False)
    batches = [
        (x.to(device, dtype).contiguous(memory_format=layout), y.to(device))
        for x, y in zip(images, labels, strict=True)
    ]
    precision = training.Precision(precision, device)
    training.step(net, training.classification, batches, shared, running, optimizer, scaler, precision)
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    return gradient.double().cpu(), running.double().cpu()


@functools.cache
def exact_step(unit):
    return one_step(torch.device("cpu"), torch.float64, "float32", torch.contiguous_format, unit)


# Relative errors of the gradient and of the statistics, at most. On a CPU they are up to 0.0025 and 1.5e-7 in float32,
# most of it from the few ReLUs that an error switches, and 0.19 and 2.2e-4 in bf16.
MOST = {"float32": (0.01, 1e-5), "tf32": (0.15, 1e-3), "bf16": (0.4, 2e-3)}


@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format))
@pytest.mark.parametrize("unit", ("basic", "bottleneck-preact"))
@pytest.mark.parametrize(
    "device, precision",
    [
        ("cpu", "float32"),
        ("cpu", "bf16"),
        *(pytest.param("cuda", name, marks=[pytest.mark.gpu, needs(1)]) for name in MOST),
    ],
)
@pytest.mark.filterwarnings("ignore:--precision")
def test_a_step_against_float64(device, precision, unit, layout):
    """In each precision and both layouts, for which cuDNN's BN has a mode each. `pytest -rP` shows the errors."""
    device = checkpoint.start_processes(device)
    both = zip(one_step(device, torch.float32, precision, layout, unit), exact_step(unit), strict=True)
    errors = [((found - exact).norm() / exact.norm()).item() for found, exact in both]
    print(f"{precision} on {device}, {unit}, {layout}: {errors[0]:.2g} and {errors[1]:.2g}")
    assert errors[0] <= MOST[precision][0] and errors[1] <= MOST[precision][1]


# On a GPU


ON_GPU = [  # CIFAR's step and ImageNet's, in every precision that can be a graph, and compiled
    (cifar_train, [*CIFAR, "--depth", 20, "--iterations", 20]),
    (cifar_train, [*CIFAR, "--depth", 20, "--iterations", 20, "--precision", "tf32"]),
    (cifar_train, [*CIFAR, "--depth", 20, "--iterations", 20, "--preact", "--precision", "bf16"]),
    (cifar_train, [*CIFAR, "--preact", "--precision", "bf16", "--compile"]),
    (imagenet_train, [*IMAGENET, "--workers", 2, "--augment", "scale-aspect"]),
    (imagenet_train, [*IMAGENET, "--workers", 0, "--preact", "--precision", "bf16"]),
    (imagenet_train, [*IMAGENET, "--workers", 1, "--compile"]),
]


@pytest.mark.gpu
@needs(1)
@pytest.mark.parametrize("script, words", ON_GPU)
def test_graphed_steps_equal_plain_ones(script, words, start, monkeypatch):
    """To the same bits, with an evaluation during the run and one at its end."""
    status, printed = start(*words, "--out", "graphed", script=script)
    assert status == 0 and "without a CUDA graph" not in printed
    monkeypatch.setattr(training, "graphed", lambda iterate, *more: iterate)
    assert start(*words, "--out", "plain", script=script)[0] == 0
    assert_equal_bits("graphed", "plain")
    column = "test_error" if script is cifar_train else "val_top1"
    ends = [checkpoint.read_result(out)[column] for out in ("graphed", "plain")]
    assert ends[0] == ends[1]


@pytest.mark.gpu
@needs(1)
@pytest.mark.parametrize(
    "script, words", [(cifar_train, [*CIFAR, "--iterations", 40]), (imagenet_train, [*IMAGENET, "--epochs", 12])]
)
def test_a_run_on_a_gpu_continues_to_the_same_bits(script, words, start, monkeypatch):
    """Through a drop of the learning rate after the interruption: the captured step still sees it."""
    words = [*words, "--checkpoint-seconds", 0]
    assert start(*words, "--out", "whole", script=script)[0] == 0
    stop_before(7, monkeypatch)
    assert start(*words, "--out", "parts", script=script)[0] == 143
    assert start(*words, "--out", "parts", script=script)[0] == 0
    assert_equal_bits("whole", "parts")


@pytest.mark.gpu
@needs(1)
@pytest.mark.parametrize("more, reason", [("--precision fp16", "fp16"), ("--unit basic-dropout-shortcut", "dropout")])
def test_a_step_that_cannot_be_a_graph_says_so(start, more, reason):
    status, printed = start(*CIFAR, *more.split(), "--out", "run")
    assert status == 0 and f"without a CUDA graph: {reason}" in printed
    assert checkpoint.read_result("run")["diverged"] is False


@pytest.mark.gpu
@needs(1)
def test_evaluations_on_a_gpu_are_those_of_a_cpu(start, flags):
    """Of ImageNet by every protocol, and of CIFAR, in float32; the batches are larger."""
    seen, protocols = [], ",".join(data.PROTOCOLS)
    words = [*IMAGENET, "--images", 700, "--workers", 2, "--epochs", 1]
    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0])) if isinstance(module, models.ResNet) else None
    ):
        assert start(*words, "--test", protocols, "--out", "run", script=imagenet_train)[0] == 0
        assert max(seen) == 128
        assert start(*CIFAR, "--images", 1500, "--out", "cifar")[0] == 0
        assert max(seen) == 1000
    gpu = {name: checkpoint.read_json(f"run/{name}.json") for name in data.PROTOCOLS}
    words = ["--evaluate", "run", "--test", protocols, "--device", "cpu", "--workers", 0]
    assert start(*words, script=imagenet_train)[0] == 0
    for name, errors in gpu.items():
        cpu = checkpoint.read_json(f"run/{name}.json")
        for top in ("top1", "top5"):
            assert abs(errors[top] - cpu[top]) <= 200 / 140, (name, top)  # two images of 140
    status, printed = start("--evaluate", "cifar", "--device", "cpu")
    error = float(printed.partition("test error ")[2].split()[0])
    assert status == 0 and abs(error - checkpoint.read_result("cifar")["test_error"]) < 0.2


@pytest.mark.gpu
@needs(2)
@pytest.mark.parametrize("script, words", SCRIPTS)
def test_two_processes_on_two_gpus(script, words, tmp_path):
    """They train, leave their group with a step captured, and end; and their files are those of one run."""
    statuses = start_workers(2, f"{script.__name__}.py", *words, "--device", "cuda", "--out", tmp_path / "run")
    assert statuses == [0, 0] and checkpoint.read_result(tmp_path / "run")["diverged"] is False
    assert checkpoint.read_json(tmp_path / "run" / "config.json")["environment"]["processes"] == 2
    assert len(list(csv.DictReader(open(tmp_path / "run" / "log.csv")))) == 6


@pytest.mark.gpu
@needs(1)
@pytest.mark.parametrize("words", ("step --depth 8 --batch-size 4 --micro-batch 2", "evaluate --depth 8", "depth"))
def test_benchmarks_of_a_gpu(words, start):
    status, printed = start(*words.split(), "--pairs", 1, script=benchmark)
    assert status == 0 and "clock: cuda" in printed and "without a CUDA graph" not in printed
    assert ("| ours, as one CUDA graph | " in printed) == words.startswith("step")
