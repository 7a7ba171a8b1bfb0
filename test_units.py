"""Are the units and nets the papers'? Orders, counts and equalities, read out of the modules themselves."""

import inspect
import pathlib
import pickle
import re
import runpy
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

import models
import training
import units
from units import UNITS

torch.set_num_threads(1)

# The panels, read from top to bottom. On an identity shortcut nothing stands; a gate or a factor stands first.
BASIC, BOTTLENECK = "conv3x3 bn relu conv3x3 bn", "conv1x1 bn relu conv3x3 bn relu conv1x1 bn"
PANELS = {
    "basic": f"{BASIC} + relu",
    "basic-plain": f"{BASIC} relu",
    "basic-bn-after-add": "conv3x3 bn relu conv3x3 + bn relu",
    "basic-relu-before-add": "conv3x3 bn relu conv3x3 bn relu +",
    "basic-relu-preact": "relu conv3x3 bn relu conv3x3 bn +",
    "basic-preact": "bn relu conv3x3 bn relu conv3x3 +",
    "basic-preact-raw-shortcut": "bn relu conv3x3 bn relu conv3x3 +",
    "basic-constant-scaling": f"* {BASIC} * + relu",
    "basic-exclusive-gating": f"conv1x1 sigmoid - * {BASIC} * + relu",
    "basic-shortcut-gating": f"conv1x1 sigmoid - * {BASIC} + relu",
    "basic-conv-shortcut": f"conv1x1 bn {BASIC} + relu",
    "basic-dropout-shortcut": f"dropout * {BASIC} + relu",
    "basic-rescaled-dropout": f"dropout {BASIC} + relu",
    "bottleneck": f"{BOTTLENECK} + relu",
    "bottleneck-plain": f"{BOTTLENECK} relu",
    "bottleneck-bn-after-add": "conv1x1 bn relu conv3x3 bn relu conv1x1 + bn relu",
    "bottleneck-relu-before-add": "conv1x1 bn relu conv3x3 bn relu conv1x1 bn relu +",
    "bottleneck-relu-preact": "relu conv1x1 bn relu conv3x3 bn relu conv1x1 bn +",
    "bottleneck-preact": "bn relu conv1x1 bn relu conv3x3 bn relu conv1x1 +",
    "bottleneck-preact-stride-on-3x3": "bn relu conv1x1 bn relu conv3x3 bn relu conv1x1 +",
    "bottleneck-constant-scaling": f"* {BOTTLENECK} * + relu",
    "bottleneck-exclusive-gating": f"conv1x1 sigmoid - * {BOTTLENECK} * + relu",
    "bottleneck-shortcut-gating": f"conv1x1 sigmoid - * {BOTTLENECK} + relu",
    "bottleneck-conv-shortcut": f"conv1x1 bn {BOTTLENECK} + relu",
    "bottleneck-dropout-shortcut": f"dropout * {BOTTLENECK} + relu",
    "single": "conv3x3 bn + relu",
    "single-preact": "bn relu conv3x3 +",
}

every_unit = pytest.mark.parametrize("name", UNITS)
DOUBLE = {"dtype": torch.float64}


def count(net):
    return sum(p.numel() for p in net.parameters())


def settle(net):
    """Give every BN gains, biases and statistics that are not neutral, and evaluate by them."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for t in (layer.weight.data, layer.running_var):
                t.uniform_(0.5, 1.5)
            for t in (layer.bias.data, layer.running_mean):
                t.normal_()
    return net.double().eval()


@every_unit
def test_order_is_the_panels(name):
    unit = UNITS[name]
    assert units.order(unit(4 * unit.expansion, 4)) == PANELS[name]


@every_unit
@pytest.mark.parametrize("stride", (1, 2))
def test_shapes_and_attributes(name, stride):
    unit = UNITS[name]
    module = unit(2, 4, stride)
    assert module(torch.randn(2, 2, 6, 6)).shape == (2, 4 * unit.expansion, 6 // stride, 6 // stride)
    on_branch = [layer for n, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and n.startswith("conv")]
    assert len(on_branch) == unit.weights
    assert unit.expansion == {"basic": 1, "single": 1, "bottleneck": 4}[name.split("-")[0]]
    full = "preact", "preact-raw-shortcut", "preact-stride-on-3x3"
    preact = {"relu-preact": "relu"} | dict.fromkeys(full, "bn-relu")
    assert unit.preact == preact.get(name.partition("-")[2])
    assert not any(layer.bias is not None for layer in on_branch)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert layers and all((layer.eps, layer.momentum, layer.affine) == (1e-5, 0.1, True) for layer in layers)
    strides = [layer.stride[0] for layer in on_branch]
    assert strides.pop(name.endswith("stride-on-3x3")) == stride and {*strides} <= {1}


@every_unit
def test_pasted_source_runs_alone(name):
    """What `python units.py NAME` prints, in an empty namespace."""
    pasted = {}
    exec(units.source(name), pasted)
    unit, copy = UNITS[name], pasted[UNITS[name].__name__]
    assert copy is not unit and not any(base.__module__ == "units" for base in copy.__mro__)
    x, results = torch.randn(2, 2, 6, 6), []
    for build in (unit, copy):
        torch.manual_seed(0)
        module = build(2, 4, 2)
        results.append([*module.parameters(), module(x), module.eval()(x)])  # with one mask of dropout
    assert all(map(torch.equal, *results))


@every_unit
def test_gradients(name):
    """gradcheck in float64, for the input and every parameter."""
    unit = UNITS[name]
    torch.manual_seed(0)
    module = settle(unit(2, 2, 2))  # dropout is off: its mask would differ from call to call
    names, values = zip(*module.named_parameters(), strict=True)
    x = torch.randn(2, 2, 4, 4, **DOUBLE, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *values))


def test_merges_of_fig2():
    """[2] Fig. 2 and eqs (5)-(8) written out, on a unit that changes the shape."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, **DOUBLE)
    for body, expansion, option in (("basic", 1, "A"), ("bottleneck", 4, "B")):
        build = {name: settle(UNITS[f"{body}-{name}"](4, 8, 2)) for name in (
            "constant-scaling", "exclusive-gating", "shortcut-gating", "conv-shortcut", "dropout-shortcut", "plain"
        )}  # fmt: skip
        for name, unit in build.items():
            branch = unit.residual(x)
            if name == "plain":
                assert torch.equal(unit(x), relu(branch)) and not hasattr(unit, "shortcut")
                continue
            if option == "A" and name != "conv-shortcut":
                assert isinstance(unit.shortcut, units.ZeroPad)
                assert torch.equal(unit.shortcut(x), torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 4, 3, 3)], dim=1))
            else:
                assert [type(layer) for layer in unit.shortcut] == [nn.Conv2d, nn.BatchNorm2d]
            h = unit.shortcut(x)
            if "gating" in name:
                assert unit.gate.weight.shape == (8 * expansion, 4, 1, 1) and unit.gate.bias.eq(-6).all()
                g = 1 / (1 + torch.exp(-torch.nn.functional.conv2d(x, unit.gate.weight, unit.gate.bias, stride=2)))
                merged = (1 - g) * h + (g * branch if "exclusive" in name else branch)
            elif name == "constant-scaling":
                merged = 0.5 * h + 0.5 * branch
            elif name == "dropout-shortcut":
                merged = 0.5 * h + branch
            else:
                merged = h + branch
            torch.testing.assert_close(unit(x), relu(merged), rtol=1e-12, atol=1e-12)


def test_unit_arguments_arrive():
    x = torch.randn(2, 4, 6, 6)
    unit = units.BasicConstantScaling(4, 4, shortcut_scale=0.5, residual_scale=1.0)
    assert torch.equal(unit(x), relu(0.5 * x + unit.residual(x)))
    assert units.BasicExclusiveGating(4, 4, gate_bias=-3.0).gate.bias.eq(-3).all()
    gated = units.BasicExclusiveGating(4, 8, 2, gate_bias=-3.0, gate_bn=True)
    assert units.order(gated).startswith("conv1x1 bn sigmoid") and gated.gate[0].bias is None
    assert gated.gate[1].bias.eq(-3).all() and gated(torch.randn(2, 4, 6, 6)).shape == (2, 8, 3, 3)
    assert isinstance(units.Basic(4, 4, option="C").shortcut, nn.Sequential)
    assert isinstance(units.Basic(4, 4, option="B").shortcut, nn.Identity)
    assert isinstance(units.Basic(4, 8, option="B").shortcut, nn.Sequential)
    with pytest.raises(ValueError, match="A, B or C, not 'D'"):
        units.Basic(4, 8, option="D")
    scaling = {"option": "A", "shortcut_scale": 0.5, "residual_scale": 0.5}
    assert list(units.arguments(units.BasicConstantScaling).items()) == list(scaling.items())
    gating = {"option": "B", "stride_on_3x3": False, "gate_bias": -6.0, "gate_bn": False}
    assert units.arguments(units.BottleneckShortcutGating) == gating
    assert units.arguments(units.BasicPlain) == units.arguments(units.BottleneckConvShortcut) == {}


@every_unit
def test_channels_are_never_dropped_in_silence(name):
    """A projection may leave fewer channels; zero-padding, which no other unit can do without, cannot."""
    unit = UNITS[name]
    channels = 24 // unit.expansion
    projects = "conv-shortcut" in name
    for option in "ABC" if "option" in units.arguments(unit) else " ":
        for stride in (1, 2):
            arguments = {} if option == " " else {"option": option}
            unit(24, channels, stride, **arguments)
            if option in "A " and not projects:
                with pytest.raises(ValueError, match="24 channels cannot follow 48"):
                    unit(48, channels, stride, **arguments)
            else:
                module = unit(48, channels, stride, **arguments)
                assert module(torch.randn(2, 48, 4, 4)).shape == (2, 24, 4 // stride, 4 // stride)


def test_a_mixin_says_that_it_is_one():
    classes = [value for value in vars(units).values() if inspect.isclass(value)]
    mixins = {c.__name__ for c in classes if not issubclass(c, nn.Module)}
    assert mixins == {c.__name__ for c in classes if re.search(r"\bmixins?\b", c.__doc__)} and len(mixins) == 7


@pytest.mark.parametrize("unit, kept", ((units.BasicDropoutShortcut, 1), (units.BasicRescaledDropout, 2)))
def test_dropout_is_rescaled_only_where_its_name_says_so(unit, kept):
    torch.manual_seed(0)
    unit = unit(4, 4)
    nn.init.zeros_(unit.bn2.weight)  # F = 0
    x = torch.rand(2, 4, 64, 64) + 1
    y = unit(x)
    dropped = y == 0
    assert torch.equal(y[~dropped], kept * x[~dropped])  # element by element
    assert 0.45 < dropped.float().mean() < 0.55
    assert dropped.any(dim=(2, 3)).all() and not dropped.all(dim=(2, 3)).any()
    assert torch.equal(unit.eval()(x), 0.5 * kept * x)  # the expectation


@pytest.mark.parametrize("name", [name for name in UNITS if UNITS[name].preact])
def test_preactivation_shortcuts(name):
    """[2] appendix: a shortcut that changes the shape reads the activated signal (but where the name says raw), an
    identity the raw one."""
    unit = UNITS[name]
    x = torch.randn(2, 8, 6, 6, **DOUBLE)
    for option in "ABC":
        for stride in (1, 2):
            module = settle(unit(8, 8 // unit.expansion, stride, option=option))
            a = relu(x) if unit.preact == "relu" else relu(module.bn1(x))
            raw = option != "C" and stride == 1
            assert isinstance(module.shortcut, nn.Identity) == raw
            h = x if raw else module.shortcut(x if "raw" in name else a)
            assert torch.equal(module(x), h + module.residual(a))
    if unit.preact == "bn-relu":  # [2] appendix: no BN on the projection, the next unit's BN does it
        assert isinstance(unit(8, 16, 2, option="B").shortcut, nn.Conv2d)


@pytest.mark.parametrize("name", ("basic-bn-after-add", "bottleneck-bn-after-add"))
def test_no_bn_on_the_projection_before_bn_after_addition(name):
    assert isinstance(UNITS[name](4, 8, 2, option="B").shortcut, nn.Conv2d)


@pytest.mark.parametrize("name", [name for name in UNITS if UNITS[name].preact == "bn-relu"])
def test_additive_form(name):
    """[2] eq. (4): with identity pre-activation units x_L - x_l is the sum of the residual branches between."""
    unit = UNITS[name]
    torch.manual_seed(0)
    chain = nn.Sequential(*[settle(unit(8, 8 // unit.expansion)) for _ in range(5)])
    first = x = torch.randn(2, 8, 6, 6, **DOUBLE, requires_grad=True)
    total = 0
    for module in chain:
        branch = module.residual(relu(module.bn1(x)))
        total, x = total + branch, module(x)
    torch.testing.assert_close(chain(first) - first, total, rtol=0, atol=1e-12)
    # eq. (5): the gradient holds the loss's own as a term, whatever the weights are
    for module in chain:
        nn.init.zeros_(list(module.children())[-2].weight)  # the branch's last layer: F = 0
    (gradient,) = torch.autograd.grad(chain(first).sum(), first)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_initialisation_is_he_fan_out():
    torch.manual_seed(0)
    for net in (models.cifar_resnet(56, units.Basic), models.cifar_resnet(29, units.BottleneckPreAct)):
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
                fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
                ratio = layer.weight.square().mean().item() * fan_out / 2
                assert 0.8 < ratio < 1.2, layer  # fan-in would give 2 or 4 times this where the width changes
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.weight.eq(1).all() and layer.bias.eq(0).all()  # no zero-initialised gains
        assert net.fc.bias.eq(0).all() and net.fc.weight.abs().max() <= net.fc.in_features**-0.5


# Nets


@every_unit
@pytest.mark.parametrize("classes", (10, 100))
def test_every_net_classifies(name, classes):
    net = models.cifar_resnet(20, UNITS[name], classes)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, classes)
    maps = []
    for stage in net.stages:
        stage.register_forward_hook(lambda module, x, y: maps.append(tuple(y.shape[1:])))
    net(torch.randn(2, 3, 32, 32))
    wide = UNITS[name].expansion
    assert maps == [(16 * wide, 32, 32), (32 * wide, 16, 16), (64 * wide, 8, 8)]


def test_first_and_last_activation():
    """[2] appendix. The stem's BN-ReLU stands before the first split, the first unit has none of its own (its ReLU
    changes nothing), and only a pre-activation net has one more activation before the average."""
    stem = "conv3x3 bn relu "
    middle = "bn relu conv3x3 bn relu conv3x3 +"
    zero_pad = "bn relu getitem pad conv3x3 bn relu conv3x3 +"
    order = units.order(models.cifar_resnet(8, units.BasicPreAct))
    assert order == stem + f"relu conv3x3 bn relu conv3x3 + {zero_pad} {zero_pad} bn relu Linear"
    order = units.order(models.cifar_resnet(14, units.BasicPreAct))
    assert order.startswith(stem + f"relu conv3x3 bn relu conv3x3 + {middle} bn relu getitem")
    order = units.order(models.cifar_resnet(8, units.Basic))
    assert order.startswith(stem + f"{BASIC} + relu getitem pad {BASIC} + relu")
    assert order.endswith("conv3x3 bn + relu Linear")
    order = units.order(models.cifar_resnet(8, units.BasicReLUPreAct))
    assert order.startswith(stem + "relu conv3x3") and order.endswith("conv3x3 bn + relu Linear")
    order = units.order(models.cifar_resnet(8, units.BasicReLUBeforeAdd))
    assert order.endswith("conv3x3 bn relu + Linear")
    order = units.order(models.cifar_resnet(11, units.BottleneckPreAct))
    assert order.startswith(stem + "relu conv1x1 conv1x1 bn relu conv3x3 bn relu conv1x1 +")
    assert order.endswith("+ bn relu Linear")


COUNTS = [  # paper.md 3.7: depth, unit, arguments, parameters for 10 classes, for 100
    (20, "basic", {}, 269_722, 275_572),
    (32, "basic", {}, 464_154, 470_004),
    (44, "basic", {}, 658_586, 664_436),
    (56, "basic", {}, 853_018, 858_868),
    (110, "basic", {}, 1_727_962, 1_733_812),
    (110, "basic-plain", {}, 1_727_962, 1_733_812),
    (110, "basic-bn-after-add", {}, 1_727_962, 1_733_812),
    (110, "basic-relu-before-add", {}, 1_727_962, 1_733_812),
    (110, "basic-relu-preact", {}, 1_727_962, 1_733_812),
    (110, "basic-preact", {}, 1_727_962, 1_733_812),
    (110, "basic-preact-raw-shortcut", {}, 1_727_962, 1_733_812),
    (110, "basic-rescaled-dropout", {}, 1_727_962, 1_733_812),
    (110, "single", {}, 1_727_962, 1_733_812),
    (110, "single-preact", {}, 1_727_962, 1_733_812),
    (1202, "basic", {}, 19_421_274, 19_427_124),
    (164, "bottleneck", {}, 1_704_154, 1_727_284),
    (164, "bottleneck-preact", {}, 1_703_258, 1_726_388),
    (1001, "bottleneck", {}, 10_328_602, 10_351_732),
    (1001, "bottleneck-preact", {}, 10_327_706, 10_350_836),
    (110, "basic-exclusive-gating", {}, 1_824_186, None),
    (110, "basic-shortcut-gating", {}, 1_824_186, None),
    (110, "basic-exclusive-gating", {"gate_bn": True}, 1_826_202, None),
    (110, "basic-conv-shortcut", {}, 1_826_202, None),
    (110, "basic", {"option": "B"}, 1_730_714, 1_736_564),
]


@pytest.mark.parametrize("depth, name, arguments, ten, hundred", COUNTS)
def test_cifar_parameters(depth, name, arguments, ten, hundred):
    with torch.device("meta"):
        assert count(models.cifar_resnet(depth, UNITS[name], 10, **arguments)) == ten
        if hundred:
            assert count(models.cifar_resnet(depth, UNITS[name], 100, **arguments)) == hundred


@pytest.mark.parametrize(
    "depth, name, option, parameters",
    [
        (18, "basic", "A", 11_515_688),
        (18, "basic", "B", 11_689_512),
        (18, "basic", "C", 12_043_816),
        (34, "basic", "A", 21_623_848),
        (34, "basic", "B", 21_797_672),
        (34, "basic", "C", 22_716_840),
        (50, "bottleneck", "B", 25_557_032),
        (50, "bottleneck-preact", "B", 25_549_352),
        (101, "bottleneck", "B", 44_549_160),
        (101, "bottleneck-preact", "B", 44_541_480),
        (152, "bottleneck", "B", 60_192_808),
        (152, "bottleneck-preact", "B", 60_185_128),
        (200, "bottleneck", "B", 64_673_832),
        (200, "bottleneck-preact", "B", 64_666_152),
    ],
)
def test_imagenet_parameters(depth, name, option, parameters):
    with torch.device("meta"):
        assert count(models.imagenet_resnet(depth, UNITS[name], option=option)) == parameters
        if option == "B":  # the default there
            assert count(models.imagenet_resnet(depth, UNITS[name])) == parameters


def test_multiply_adds():
    """paper.md 3.7: 244.5M for ResNet-164 fit the stride on the first 1x1, and not on the 3x3 (3.1M more)."""
    for depth, name, expected in ((20, "basic", 40.6), (110, "basic", 252.9), (164, "bottleneck-preact", 244.5)):
        total = 0

        def add(layer, x, y):
            nonlocal total
            total += layer.weight.numel() * y.shape[2:].numel()

        net = models.cifar_resnet(depth, UNITS[name])
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(add)
        net.eval()(torch.zeros(1, 3, 32, 32))
        assert round(total / 1e6, 1) == expected


def test_impossible_depths():
    for depth, unit, near in (
        (21, units.Basic, "20 and 26"),
        (100, units.Bottleneck, "92 and 101"),
        (3, units.Basic, "such as 8"),
        (-1, units.SinglePreAct, "such as 5"),
    ):
        with pytest.raises(ValueError, match=near):
            models.cifar_resnet(depth, unit)
    with pytest.raises(ValueError, match="18, 34"):
        models.imagenet_resnet(50, units.Basic)
    with pytest.raises(ValueError, match="50, 101, 152, 200"):
        models.imagenet_resnet(34, units.Bottleneck)


def test_flatten_keeps_values_and_strides():
    net = models.cifar_resnet(8, units.BasicConvShortcut).to(memory_format=torch.channels_last)
    settle(net).float()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    shared, running = training.flatten(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert len(shared) == count(net) + len(running) + 2
    assert len(running) == sum(b.numel() for b in net.buffers())
    shared.copy_(torch.arange(len(shared)))
    running.fill_(7)
    assert all(p.grad.stride() == p.stride() for p in net.parameters())
    assert sorted(torch.cat([p.grad.flatten() for p in net.parameters()]).tolist()) == list(range(count(net)))
    assert all(b.eq(7).all() for b in net.buffers())


@pytest.mark.parametrize("name", ("basic", "basic-preact", "bottleneck-shortcut-gating"))
def test_plain_dicts_are_loaded_strictly(name):
    """With and without num_batches_tracked, into a whole net and into a part; what does not fit is still refused."""
    torch.manual_seed(0)
    settled, net = settle(models.cifar_resnet(11 if "bottle" in name else 8, UNITS[name])), None
    plain = dict(settled.state_dict())
    assert not any("num_batches_tracked" in key for key in plain)
    with_counts = plain | {
        key.replace("running_var", "num_batches_tracked"): torch.tensor(5) for key in plain if "var" in key
    }
    for weights in (plain, with_counts, settled.state_dict()):
        net = models.cifar_resnet(11 if "bottle" in name else 8, UNITS[name]).double()
        assert str(net.load_state_dict(weights)) == "<All keys matched successfully>"
        assert all(torch.equal(value, plain[key]) for key, value in net.state_dict().items())
        part = {key.removeprefix("stages.1."): value for key, value in weights.items() if key.startswith("stages.1.")}
        net.stages[1].load_state_dict(part)
    for wrong in (plain | {"stem.1.extra": torch.zeros(1)}, {k: v for k, v in plain.items() if k != "stem.1.bias"}):
        with pytest.raises(RuntimeError, match="stem.1.extra|stem.1.bias"):
            net.load_state_dict(wrong)
    pickle.loads(pickle.dumps(net)).load_state_dict(with_counts)


def test_what_the_command_prints(monkeypatch, capsys):
    def printed(*words):
        monkeypatch.setattr(sys, "argv", ["units.py", *words])
        runpy.run_path(units.__file__, run_name="__main__")
        return capsys.readouterr().out

    lines = printed().splitlines()
    assert len(lines) == len(UNITS)
    for line, name in zip(lines, UNITS, strict=True):
        assert line.split()[0] == name and PANELS[name] in line and "parameters" in line
    assert lines[list(UNITS).index("basic-shortcut-gating")].endswith("16x32x32 -> 16x32x32     4,944 parameters")
    assert printed("basic-dropout-shortcut") == units.source("basic-dropout-shortcut") + "\n"
    with pytest.raises(SystemExit) as refused:
        printed("resnet")
    assert refused.value.code == 2 and "basic-dropout-shortcut" in capsys.readouterr().err


# README: "Is your ResNet the paper's?"


def without_last_bn(net):
    net.last = nn.Identity()
    return net


def with_first_bn(net):
    net.stages[0][0].bn1 = nn.BatchNorm2d(16)
    return net


def with_imagenet_widths(counts):
    stem = units.conv(3, 3, 64), nn.BatchNorm2d(64), nn.ReLU()
    return models.ResNet(stem, 64, counts, units.Basic, 10, {"option": "B"})


def with_bn_on_projections(net):
    for stage in net.stages:
        stage[0].shortcut = nn.Sequential(stage[0].shortcut, nn.BatchNorm2d(stage[0].shortcut.out_channels))
    return net


def test_readme_counts():
    cifar, preact, deep = models.cifar_resnet, units.BasicPreAct, units.BottleneckPreAct
    right = {
        **{f"ResNet-{depth}": cifar(depth, units.Basic) for depth in (20, 32, 44, 56, 110, 1202)},
        "ResNet-110, pre-activation": cifar(110, preact),
        "ResNet-164": cifar(164, units.Bottleneck),
        "ResNet-164, pre-activation": cifar(164, deep),
        "ResNet-1001": cifar(1001, units.Bottleneck),
        "ResNet-1001, pre-activation": cifar(1001, deep),
    }
    wrong = {
        'option B ("ResNet-20")': cifar(20, units.Basic, option="B"),
        'option B ("ResNet-110")': cifar(110, units.Basic, option="B"),
        'ImageNet\'s widths, 4 stages ("ResNet-18" on CIFAR)': with_imagenet_widths((2, 2, 2, 2)),
        'ImageNet\'s widths, 4 stages ("ResNet-34" on CIFAR)': with_imagenet_widths((3, 4, 6, 3)),
        'no BN after the last addition ("pre-activation ResNet-110")': without_last_bn(cifar(110, preact)),
        'no BN after the last addition ("pre-activation ResNet-164")': without_last_bn(cifar(164, deep)),
        'BN twice before the first unit ("pre-activation ResNet-110")': with_first_bn(cifar(110, preact)),
        '164 layers, 18 bottlenecks a stage, called "pre-activation ResNet-110"': cifar(164, deep),
        'BN on the projections ("pre-activation ResNet-164")': with_bn_on_projections(cifar(164, deep)),
    }
    readme = pathlib.Path(__file__).with_name("README.md").read_text()
    for label, net in (right | wrong).items():
        assert f"| {label} | {count(net):,} |" in readme
