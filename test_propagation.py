"""propagation.py: the gradient on the shortcuts against eqs (5)-(8) of [2], and the responses of [1] Fig. 7."""

import csv
import json
import pathlib
import re
import sys
import xml.etree.ElementTree

import pytest
import torch
from torch import nn

import checkpoint
import data
import models
import propagation
import units

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent


def propagate(unit, arguments, depth=20, change=lambda net: None):
    """propagation.propagate on an untrained net in float64, after a change to it."""
    torch.manual_seed(0)
    net = models.cifar_resnet(depth, unit, **arguments).double()
    change(net)
    return propagation.propagate(net, torch.randn(4, 3, 32, 32).double(), torch.arange(4))


def stages(values):
    """The values of each stage that have only identities between them: those beside a change of shape are left out."""
    n = (len(values) - 1) // 3
    return [values[1 + stage * n : 1 + (stage + 1) * n] for stage in range(3)]


@pytest.mark.parametrize(
    "unit",
    (units.BasicPreAct, units.BasicReLUPreAct, units.BasicReLUBeforeAdd, units.SinglePreAct, units.BottleneckPreAct),
)
def test_an_identity_hands_the_gradient_on(unit):
    """Eq. (5): all of the last unit's gradient arrives, element by element, whatever the weights are."""
    depth = 29 if unit.weights == 3 else 20
    _, gradients, parts = propagate(unit, {}, depth)
    assert torch.equal(parts[-1], gradients[-1])
    for part in stages(parts):
        assert len(part) == (depth - 2) // 3 // unit.weights
        for p in part:
            torch.testing.assert_close(p, part[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(parts[-2], gradients[-1], rtol=1e-6, atol=0)  # the loss's own
    assert not torch.allclose(gradients[-2], gradients[-1])  # so the part leaves out what came through F


def test_one_half_on_the_shortcut_halves_it_at_every_unit():
    """Eqs (7)-(8): lambda = 0.5, nothing after the addition, within a stage."""
    _, gradients, parts = propagate(propagation.ScaledPreAct, {})
    for part in stages([p.norm().item() for p in parts]):
        for before, after in zip(part, part[1:], strict=False):
            assert abs(before / after - 0.5) < 0.005
    assert abs(parts[-3].norm() / gradients[-1].norm() - 0.25) < 0.0025


def test_a_relu_after_the_addition_costs_more_than_one_half():
    for scale in (0.5, 1.0):
        _, _, parts = propagate(units.BasicConstantScaling, {"residual_scale": scale})
        for part in stages([p.norm().item() for p in parts]):
            assert all(0 < before / after < 0.5 for before, after in zip(part, part[1:], strict=False))


@pytest.mark.parametrize("name", propagation.NETS)
def test_without_f_all_of_the_gradient_is_on_the_shortcuts(name):
    """F = 0 leaves eq. (7)'s product alone: the part is the whole, and within a stage each unit multiplies it by the
    lambda that the page states. (With W_g = 0 a gate is sigmoid(b_g); in evaluation mode dropout is its expectation and
    BN does nothing. The first and last unit of the last stage are left out: their ReLU meets new zeros.)"""
    unit, arguments, scale = propagation.NETS[name]

    def change(net):
        net.eval()
        for module in (unit for stage in net.stages for unit in stage):
            module.residual = lambda a, residual=module.residual: 0 * residual(a)
            if hasattr(module, "gate"):
                nn.init.zeros_(module.gate.weight)

    _, gradients, parts = propagate(unit, arguments, depth=32, change=change)
    for gradient, part in zip(gradients, parts, strict=True):
        torch.testing.assert_close(part, gradient, rtol=1e-12, atol=0)
    if scale is not None:
        for before, after in zip(parts[11:14], parts[12:15], strict=True):
            torch.testing.assert_close(before.norm(), scale * after.norm(), rtol=1e-4, atol=0)


def test_gates_are_numbers_on_the_shortcuts():
    """Eq. (8)'s lambda is 1 - g(x), element by element, and the gradient through W_g does not count."""
    nets = []
    _, _, parts = propagate(units.BasicShortcutGating, {"gate_bias": 0.0}, change=nets.append)
    x, gradients, _ = propagate(units.BasicShortcutGating, {"gate_bias": 0.0})
    last = nets[0].stages[2][2]
    passed = (x[-1] > 0) * (1 - torch.sigmoid(last.gate(x[-2])))
    torch.testing.assert_close(parts[-2], gradients[-1] * passed, rtol=1e-9, atol=0)


def test_dropout_drops_the_same_elements_again():
    signals, gradients, parts = propagate(units.BasicDropoutShortcut, {})
    reached = parts[-2] != 0
    assert torch.equal(parts[-2][reached], gradients[-1][reached])  # whole or not at all, where the ReLU is open
    assert not (reached & (signals[-1] <= 0)).any() and 0.2 < reached.double().mean() < 0.6


def test_files_and_bad_depths(tmp_path, monkeypatch, capsys):
    nets = ("plain", "original, Fig. 2(a)", "dropout shortcut, Fig. 2(f)")  # every line of `draw` and `page`
    monkeypatch.setattr(propagation, "NETS", {name: propagation.NETS[name] for name in nets})
    monkeypatch.setattr(propagation, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["propagation.py", "--depth", "8"])
    assert propagation.main() == 0
    files = {path.name: path for path in (tmp_path / "results").iterdir()}
    assert set(files) == {f"propagation-8.{suffix}" for suffix in ("csv", "md", "svg", "png")}
    text = files["propagation-8.md"].read_text()
    assert text == capsys.readouterr().out[:-1] and "What to look for" in text and "(propagation-8.svg)" in text
    rows = list(csv.DictReader(open(files["propagation-8.csv"])))
    assert [row["l"] for row in rows] == ["0", "1", "2", "3"] * len(propagation.NETS)
    assert all(float(row["gradient"]) == 1 for row in rows[3::4])
    monkeypatch.setattr(sys, "argv", ["propagation.py", "--depth", "9"])
    assert propagation.main() == 2 and "such as 8 and 14" in capsys.readouterr().err


def test_the_committed_page_is_of_the_committed_numbers():
    measured = {}
    for row in csv.DictReader(open(HERE / "results" / "propagation.csv")):
        values = [row[key] for key in ("signal", "gradient", "on_shortcuts", "predicted")]
        measured.setdefault(row["net"], []).append([float(value) if value else None for value in values])
    assert [len(values) for values in measured.values()] == [55] * len(propagation.NETS)
    text = (HERE / "results" / "propagation.md").read_text()
    assert text == propagation.page(measured, "propagation.svg"), "run python propagation.py"
    assert re.search(r"\| full pre-activation, Fig. 4\(e\) \| 1 \| 1 \| [\d.]+ \| 1.000 \|", text)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The folder of a run of a 14-layer net of a unit, and images for it."""
    monkeypatch.setattr(data, "load_cifar", lambda dataset, root, limit: (None, None, images))
    torch.manual_seed(0)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)

    def make(name, old=False, **flags):
        net = models.cifar_resnet(14, units.UNITS[name])
        about = {"mean": torch.full((3, 32, 32), 120.0), "std": torch.ones(3, 1, 1)}
        state = {"schema": checkpoint.SCHEMA, "flags": {}, "model": net.state_dict()}
        state |= about if old else {"about": about}
        torch.save(state, tmp_path / "checkpoint.pt")
        config = {"depth": 14, "unit": name, "unit_args": {"option": "A"}, "dataset": "synthetic", "data": None}
        config |= flags or {"recipe": "paper"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(sys, "argv", ["propagation.py", "--responses", str(tmp_path)])
        return net, (images - about["mean"]) / about["std"]

    return make


@pytest.mark.parametrize("old", (False, True))
def test_responses_are_the_std_after_bn(trained, tmp_path, capsys, old):
    """[1] Fig. 7 on a small net, of a run of today or an old one, against the same numbers taken unit by unit."""
    net, x = trained("basic", old)
    assert propagation.main() == 0 and capsys.readouterr().out == f"{tmp_path / 'responses.csv'}\n"
    measured = [float(row["std"]) for row in csv.DictReader(open(tmp_path / "responses.csv"))]
    with torch.inference_mode():
        x = net.eval().stem[1](net.stem[0](x))
        expected = [x.std()]
        x = x.relu()
        for unit in (unit for stage in net.stages for unit in stage):
            expected += [unit.bn1(unit.conv1(x)).std(), unit.residual(x).std()]
            x = unit(x)
    assert len(measured) == 13 and measured == pytest.approx([std.item() for std in expected], abs=1e-3)


def test_runs_without_responses(trained, tmp_path, monkeypatch, capsys):
    trained("basic-preact")
    assert propagation.main() == 2 and "basic-preact has it elsewhere" in capsys.readouterr().err
    trained("basic", crop=224)
    assert propagation.main() == 2 and "is not a run of cifar_train.py" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").unlink()
    assert propagation.main() == 2 and "holds no checkpoint" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert propagation.main() == 2 and "it has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "responses.csv").exists()


# The units as pictures

ORIGINAL, PREACT = "conv 3×3, BN, ReLU, conv 3×3, BN", "BN, ReLU, conv 3×3, BN, ReLU, conv 3×3"
DEEP = "conv 1×1, BN, ReLU, conv 3×3, BN, ReLU, conv 1×1, BN"
COLUMNS = {  # the shortcut, the gate, the branch
    "basic": ("+, ReLU", "", ORIGINAL),
    "basic-constant-scaling": ("× 0.5, +, ReLU", "", f"{ORIGINAL}, × 0.5"),
    "basic-exclusive-gating": ("×, +, ReLU", "conv 1×1, sigmoid, 1 −", f"{ORIGINAL}, ×"),
    "basic-shortcut-gating": ("×, +, ReLU", "conv 1×1, sigmoid, 1 −", ORIGINAL),
    "basic-conv-shortcut": ("conv 1×1, BN, +, ReLU", "", ORIGINAL),
    "basic-dropout-shortcut": ("dropout, × 0.5, +, ReLU", "", ORIGINAL),
    "basic-bn-after-add": ("+, BN, ReLU", "", "conv 3×3, BN, ReLU, conv 3×3"),
    "basic-relu-before-add": ("+", "", f"{ORIGINAL}, ReLU"),
    "basic-relu-preact": ("+", "", "ReLU, conv 3×3, BN, ReLU, conv 3×3, BN"),
    "basic-preact": ("+", "", PREACT),
    "bottleneck": ("+, ReLU", "", DEEP),
    "bottleneck-preact": ("+", "", "BN, ReLU, conv 1×1, BN, ReLU, conv 3×3, BN, ReLU, conv 1×1"),
}


def test_boxes_of_every_panel():
    for names in propagation.FIGURES.values():
        for name in names.values():
            drawn = propagation.boxes(units.UNITS[name](64, 64 // units.UNITS[name].expansion))
            columns = [", ".join(label for label, at, *_ in drawn if at == column) for column in range(3)]
            assert tuple(columns) == COLUMNS[name]
            assert all(begin < row for _, _, row, inputs in drawn for _, begin in inputs)  # every line leads down
    gated = {
        box[0]: box for box in propagation.boxes(units.BasicExclusiveGating(16, 16)) if box[1] > 0 or box[0] == "+"
    }
    assert gated["×"][3] == [(1, 2), (2, 5)] and gated["+"][3] == [(0, 4), (2, 6)]  # sigmoid and BN; × and ×


def test_pictures_of_the_units_are_not_stale():
    text = (HERE / "results" / "units.svg").read_text("utf-8")
    assert text == propagation.draw_units(), "run python propagation.py --units"
    svg = xml.etree.ElementTree.fromstring(text)
    width, height = map(int, svg.get("viewBox").split()[2:])
    boxes = [[int(box.get(side)) for side in ("x", "y", "width", "height")] for box in svg.iter("{*}rect")][1:]
    assert all(0 < x < x + w < width and 0 < y < y + h < height for x, y, w, h in boxes)
    for x, y, w, h in boxes:  # no two boxes touch
        assert sum(a < x + w and x < a + c and b < y + h and y < b + d for a, b, c, d in boxes) == 1
