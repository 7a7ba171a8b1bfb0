"""What propagation.py calls the gradient on the shortcuts, against eqs (5)-(8) of [2]."""

import csv
import pathlib
import re
import sys

import pytest
import torch
from torch import nn

import models
import propagation
import units

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent


def propagate(unit, arguments, depth=20, change=lambda net: None):
    """propagation.propagate on a new net in float64, changed before."""
    torch.manual_seed(0)
    net = models.cifar_resnet(depth, unit, **arguments).double()
    change(net)
    return propagation.propagate(net, torch.randn(4, 3, 32, 32).double(), torch.arange(4))


def stages(values):
    """Without those beside a change of the shape: of each stage, what is separated by identities alone."""
    n = (len(values) - 1) // 3
    return [values[1 + stage * n : 1 + (stage + 1) * n] for stage in range(3)]


@pytest.mark.parametrize(
    "unit",
    (units.BasicPreAct, units.BasicReLUPreAct, units.BasicReLUBeforeAdd, units.SinglePreAct, units.BottleneckPreAct),
)
def test_an_identity_hands_the_gradient_on(unit):
    """Eq. (5): of the last unit's gradient everything arrives, element by element, whatever the weights are."""
    depth = 29 if unit.weights == 3 else 20
    _, gradients, parts = propagate(unit, {}, depth)
    assert torch.equal(parts[-1], gradients[-1])
    for part in stages(parts):
        assert len(part) == (depth - 2) // 3 // unit.weights
        for p in part:
            torch.testing.assert_close(p, part[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(parts[-2], gradients[-1], rtol=1e-6, atol=0)  # the loss's own
    assert not torch.allclose(gradients[-2], gradients[-1])  # and F's part is not in it


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
    """F = 0 leaves eq. (7)'s product alone: the part is the whole, and within a stage its factor is the lambda that the
    page states (W_g = 0, so that a gate is sigmoid(b_g); evaluating, so that dropout is its expectation and BN does
    nothing; the last stage's first and last unit left out, whose ReLU meets new zeros)."""
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
    """Eq. (8)'s lambda is 1 - g(x), element by element, and W_g's own gradient is not on the shortcut."""
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
    monkeypatch.setattr(propagation, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["propagation.py", "--depth", "8"])
    assert propagation.main() == 0
    files = {path.name: path for path in (tmp_path / "results").iterdir()}
    assert set(files) == {f"propagation-8.{suffix}" for suffix in ("csv", "md", "svg", "png")}
    text = files["propagation-8.md"].read_text()
    assert text == capsys.readouterr().out[:-1] and "What one should see" in text and "(propagation-8.svg)" in text
    rows = list(csv.DictReader(open(files["propagation-8.csv"])))
    assert [row["l"] for row in rows] == ["0", "1", "2", "3"] * len(propagation.NETS)
    assert all(float(row["gradient"]) == 1 for row in rows[3::4])
    monkeypatch.setattr(sys, "argv", ["propagation.py", "--depth", "9"])
    assert propagation.main() == 2 and "near it 8 and 14" in capsys.readouterr().err


def test_the_committed_page_is_of_the_committed_figures():
    found = {}
    for row in csv.DictReader(open(HERE / "results" / "propagation.csv")):
        values = [row[key] for key in ("signal", "gradient", "on_shortcuts", "predicted")]
        found.setdefault(row["net"], []).append([float(value) if value else None for value in values])
    assert [len(values) for values in found.values()] == [55] * len(propagation.NETS)
    text = (HERE / "results" / "propagation.md").read_text()
    assert text == propagation.page(found, "propagation.svg"), "run python propagation.py"
    assert re.search(r"\| full pre-activation, Fig. 4\(e\) \| 1 \| 1 \| [\d.]+ \| 1.000 \|", text)
