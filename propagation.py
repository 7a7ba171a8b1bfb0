"""The derivation of [2] Sections 2 and 3 made visible: signal and gradient through depth, without data or training.

    python propagation.py                # ResNet-110, under a minute: results/propagation.md, .csv, .svg and .png
    python propagation.py --depth 20     # results/propagation-20.md, ...

Eqs (7) and (8): where units multiply their shortcuts by lambdas and nothing follows the addition, d loss / d x_l is
d loss / d x_L times the product of the lambdas between, which came on the shortcuts alone, plus what came through F's.
"""

import argparse
import csv
import itertools
import pathlib
import sys

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy, relu

import units
from models import cifar_resnet

RESULTS = pathlib.Path(__file__).parent / "results"


class ScaledPreAct(units.BasicPreAct):
    """Eq. (6) to the letter, which no panel draws: x' = 0.5 x + F(x), with nothing after the addition."""

    def forward(self, x):
        a = relu(self.bn1(x))
        h = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(a)
        return 0.5 * h + self.residual(a)


# Unit, arguments, lambda: of a gate 1 - sigmoid(b_g), of dropout the expectation; a convolution has none.
NETS = {
    "original, Fig. 2(a)": (units.Basic, {}, 1),
    "eq. (6): 0.5 on (e)'s shortcut": (ScaledPreAct, {}, 0.5),
    "constant scaling 0.5, 0.5, Fig. 2(b)": (units.BasicConstantScaling, {}, 0.5),
    "constant scaling 0.5, 1, Fig. 2(b)": (units.BasicConstantScaling, {"residual_scale": 1.0}, 0.5),
    "exclusive gating, b_g = 0, Fig. 2(c)": (units.BasicExclusiveGating, {"gate_bias": 0.0}, 0.5),
    "exclusive gating, b_g = -6, Fig. 2(c)": (units.BasicExclusiveGating, {"gate_bias": -6.0}, 0.9975),
    "shortcut-only gating, b_g = 0, Fig. 2(d)": (units.BasicShortcutGating, {"gate_bias": 0.0}, 0.5),
    "shortcut-only gating, b_g = -6, Fig. 2(d)": (units.BasicShortcutGating, {"gate_bias": -6.0}, 0.9975),
    "1x1 conv shortcut, Fig. 2(e)": (units.BasicConvShortcut, {}, None),
    "dropout shortcut, Fig. 2(f)": (units.BasicDropoutShortcut, {}, 0.5),
    "plain": (units.BasicPlain, {}, 0),
    "BN after addition, Fig. 4(b)": (units.BasicBNAfterAdd, {}, 1),
    "ReLU before addition, Fig. 4(c)": (units.BasicReLUBeforeAdd, {}, 1),
    "ReLU-only pre-activation, Fig. 4(d)": (units.BasicReLUPreAct, {}, 1),
    "full pre-activation, Fig. 4(e)": (units.BasicPreAct, {}, 1),
}

PAGE = """# Signal and gradient through depth: [2] Sections 2 and 3

Written by `python propagation.py --depth {depth}`: a new net of each unit, 16 images of noise.

![signal and gradient through depth]({picture})

What one should see, the gradient coming from the right, as a multiple of what it is after the last unit:

- **On the shortcuts alone (top).** With an identity and nothing after the addition, (c) to (e) of Fig. 4, all of it
  arrives; only the two units that change the shape change it. With 0.5 on (e)'s shortcut each unit halves it: eq. (8).
- Fig. 2(b) is drawn with a ReLU after the addition, which stops the gradient wherever the sum is negative: it falls by
  more than a half, and at a cross nothing is left. (The original's ReLU stops little: its shortcut is positive and
  grows.) Gates at b_g = 0, dropout, 1x1 convolutions and BN on the way lose it too. Gates are taken as numbers here,
  as in eq. (8); through their own W_g some more arrives.
- **All of it (middle)** does not vanish: the F's bring the rest. But where the shortcuts bring little it goes the way
  of the plain net's, which grows exponentially from unit to unit. With identities it grows far less, and most of that
  in a stage's first units.
- **The signal (bottom)** is with identities a sum of all F's before and grows; a shortcut that forgets keeps it level.

| unit | lambda | shortcuts alone, eq. (8) | measured | a unit (the last {some}) | gradient | signal |
|---|---|---|---|---|---|---|
{rows}

Gradients at the first unit's input, the signal at the last one's output.
"""


def propagate(net, images, labels):
    """Three lists of tensors over a net's L units' inputs and the last one's output, x_0 ... x_L: the signal x_l; the
    gradient d loss / d x_l; and of it what came from x_L on shortcuts alone, F's and gates being held constant."""
    chain = [unit for stage in net.stages for unit in stage]

    def signals():
        torch.manual_seed(1)  # dropout drops the same elements each time
        return list(itertools.accumulate(chain, lambda x, unit: unit(x), initial=net.stem(images)))

    x = signals()
    gradients = torch.autograd.grad(cross_entropy(net.fc(net.last(x[-1]).mean(dim=(2, 3))), labels), x)
    for unit in chain:
        # requires_grad_, as from nothing but constants, a plain net's, no gradient could be asked
        unit.residual = lambda a, residual=unit.residual: residual(a).detach().requires_grad_()
        if hasattr(unit, "gate"):
            unit.gate.register_forward_hook(lambda gate, inputs, output: output.detach())
    again = signals()
    return x, gradients, torch.autograd.grad(again[-1], again, gradients[-1], materialize_grads=True)


def measure(depth):
    """{net: [(signal, gradient, on shortcuts, predicted) of l = 0 ... L]}: the root mean square of x_l, then over the
    norm of d loss / d x_L that of d loss / d x_l, of its part on shortcuts alone, and of that part by eq. (8)."""
    found = {}
    for name, (unit, arguments, scale) in NETS.items():
        torch.manual_seed(1)
        images, labels = torch.randn(16, 3, 32, 32).double(), torch.arange(16) % 10
        signals, gradients, parts = propagate(cifar_resnet(depth, unit, **arguments).double(), images, labels)
        norms = [[(t.norm() / gradients[-1].norm()).item() for t in tensors] for tensors in (gradients, parts)]
        predicted = [None if scale is None else scale**left for left in reversed(range(len(signals)))]
        found[name] = list(zip([x.square().mean().sqrt().item() for x in signals], *norms, predicted, strict=True))
    return found


def draw(found, path):
    """What came on the shortcuts, the gradient and the signal, for the units of Fig. 2 and for those of Fig. 4."""
    names, last = list(found), len(found["plain"]) - 1
    figure = Figure(figsize=(12, 13))
    grid = figure.subplots(3, 2, sharex=True, sharey="row", height_ratios=(4, 3, 3))
    columns = {"Fig. 2: what stands on the shortcut": names[:11], "Fig. 4: the order": names[:1] + names[11:]}
    rows = {"gradient that came on shortcuts alone": 2, "gradient": 1, "signal (root mean square)": 0}
    for axes, (title, nets) in zip(grid.T, columns.items(), strict=True):
        for ax, (label, quantity) in zip(axes, rows.items(), strict=True):
            for i, net in enumerate(nets):
                points = [(at, values[quantity]) for at, values in enumerate(found[net]) if values[quantity] > 0]
                style = {"color": "k" if net == "plain" else f"C{i}", "linewidth": 2.5 if NETS[net][2] == 1 else 1.3}
                ax.plot(*zip(*points, strict=True), label=net, **style)
                if points[0][0] > 0 and net != "plain":
                    ax.plot(*points[0], "x", markersize=9, **style)  # nothing is left beyond
            for boundary in (last // 3, last // 3 * 2):
                ax.axvline(boundary, color="0.8", linewidth=0.8, zorder=0)
            ax.set(yscale="log", ylabel=label)
        axes[0].plot([0.5 ** (last - at) for at in range(last + 1)], ":", color="0.4", label="eq. (8): 0.5 a unit")
        axes[0].legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.08))
        axes[0].set_title(title)
        axes[2].set_xlabel("unit (grey: where the shape changes)")
    figure.suptitle(f"{2 * last + 2} layers at initialisation: gradients as multiples of that after the last unit")
    figure.tight_layout()
    matplotlib.rcParams["svg.hashsalt"] = "resnet"  # the same picture is the same file
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=90)


def page(found, picture):
    """The picture, what one should see in it, and a table, as Markdown."""
    last, rows = len(found["plain"]) - 1, []
    some = max(1, min(10, last // 3 - 1))  # units within the last stage
    for net, values in found.items():
        scale, (_, gradient, part, predicted), rate = NETS[net][2], values[0], values[-1 - some][2] ** (1 / some)
        by_eq_8 = " | " if scale is None else f"{scale:g} | {predicted:.2g}"
        rows.append(f"| {net} | {by_eq_8} | {part:.2g} | {rate:.3f} | {gradient:.2g} | {values[-1][0]:.2f} |")
    return PAGE.format(depth=2 * last + 2, picture=picture, some=some, rows="\n".join(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=110, help="6n + 2 weight layers (default 110)")
    depth = parser.parse_args().depth
    path = RESULTS / ("propagation" if depth == 110 else f"propagation-{depth}")
    torch.set_num_threads(1)  # the same figures whatever the number of cores
    try:
        found = measure(depth)
        text = page(found, path.name + ".svg")
        RESULTS.mkdir(exist_ok=True)
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["net", "l", "signal", "gradient", "on_shortcuts", "predicted"])
            for net, values in found.items():
                shown = [["" if value is None else f"{value:.6g}" for value in row] for row in values]
                writer.writerows([net, at, *row] for at, row in enumerate(shown))
        draw(found, path)
        path.with_suffix(".md").write_text(text)
    except (ValueError, OSError) as error:
        print(f"propagation.py: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
