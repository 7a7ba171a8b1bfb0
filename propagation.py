"""The derivation of [2] Sections 2 and 3 made visible: signal and gradient through depth, without data or training.
And the papers' units as pictures; and [1] Fig. 7: how strongly the layers of a trained net respond.

    python propagation.py                          # ResNet-110, in a minute: results/propagation.md, .csv, .svg, .png
    python propagation.py --depth 20               # results/propagation-20.md, ...
    python propagation.py --units                  # the units as boxes, read out of their modules: results/units.svg
    python propagation.py --responses RUN ...      # responses.csv in the folder of each run of cifar_train.py

Eqs (7) and (8): where every unit multiplies its shortcut by a lambda and nothing follows the addition, d loss / d x_l
is the sum of two parts: d loss / d x_L times the product of the lambdas in between, which came on the shortcuts alone,
and what came through the F's.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read as torch is imported: threads that spin less share the cores

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

import checkpoint
import data
import units
from models import cifar_resnet

RESULTS = pathlib.Path(__file__).parent / "results"


class ScaledPreAct(units.BasicPreAct):
    """Eq. (6) to the letter, which no figure shows: x' = 0.5 x + F(x), with nothing after the addition."""

    def forward(self, x):
        a = relu(self.bn1(x))
        h = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(a)
        return 0.5 * h + self.residual(a)


# Unit, arguments, lambda: 1 - sigmoid(b_g) for a gate, the expected value for dropout; a convolution has none.
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

Written by `python propagation.py --depth {depth}`: an untrained net of each unit, given 16 images of noise.

![signal and gradient through depth]({picture})

What to look for. The gradient flows from right to left and is shown as a multiple of its norm after the last unit.

- **On the shortcuts alone (top).** Where the shortcut is an identity and nothing follows the addition, (c) to (e) of
  Fig. 4, every unit passes the gradient on unchanged, except the two that change the shape: they alone reduce it. With
  0.5 on (e)'s shortcut every unit halves it, as eq. (8) says.
- Fig. 2(b) has a ReLU after the addition, which blocks the gradient wherever the sum is negative: every unit takes more
  than half of it, and at a cross nothing is left. (The ReLU of the original unit blocks little, as its shortcut is
  positive and grows.) Gates at b_g = 0, dropout, 1x1 convolutions and BN on the way lose it too. Gates count as
  constants here, as in eq. (8); some more of the gradient arrives through their own weights W_g.
- **In total (middle)** the gradient does not vanish: the F's carry the rest. But where the shortcuts carry little, it
  behaves like the plain net's, which grows exponentially from unit to unit. With identities it grows far less, and most
  of that in the first units of a stage.
- **The signal (bottom)** is the sum of all earlier F's where the shortcuts are identities, and so it grows. A shortcut
  that forgets keeps it level.

| unit | lambda | shortcuts alone, eq. (8) | measured | a unit (the last {some}) | gradient | signal |
|---|---|---|---|---|---|---|
{rows}

Gradients at the first unit's input, the signal at the last unit's output; "a unit" is the factor by which one
unit changes the part on the shortcuts, the geometric mean of the last {some}.
"""


def propagate(net, images, labels):
    """Three lists of tensors, each for the inputs of a net's L units and the last one's output, x_0 ... x_L: the signal
    x_l; the gradient d loss / d x_l; and the part of it that came from x_L on the shortcuts alone, with F's and gates
    taken as constants."""
    chain = [unit for stage in net.stages for unit in stage]

    def signals():
        torch.manual_seed(1)  # so that dropout drops the same elements both times
        return list(itertools.accumulate(chain, lambda x, unit: unit(x), initial=net.stem(images)))

    x = signals()
    gradients = torch.autograd.grad(cross_entropy(net.fc(net.last(x[-1]).mean(dim=(2, 3))), labels), x)
    for unit in chain:
        # requires_grad_, because a plain net is then made of constants alone, which have no gradient to ask for
        unit.residual = lambda a, residual=unit.residual: residual(a).detach().requires_grad_()
        if hasattr(unit, "gate"):
            unit.gate.register_forward_hook(lambda gate, inputs, output: output.detach())
    shortcuts = signals()
    parts = torch.autograd.grad(shortcuts[-1], shortcuts, gradients[-1], materialize_grads=True)
    return x, gradients, parts


def measure(depth):
    """{net: [(signal, gradient, on shortcuts, predicted) of l = 0 ... L]}: the root mean square of x_l; then, as
    multiples of the norm of d loss / d x_L, the norms of d loss / d x_l, of its part on the shortcuts alone, and of
    that part as eq. (8) predicts it."""
    measured = {}
    for name, (unit, arguments, scale) in NETS.items():
        torch.manual_seed(1)
        images, labels = torch.randn(16, 3, 32, 32).double(), torch.arange(16) % 10
        signals, gradients, parts = propagate(cifar_resnet(depth, unit, **arguments).double(), images, labels)
        norms = [[(t.norm() / gradients[-1].norm()).item() for t in tensors] for tensors in (gradients, parts)]
        predicted = [None if scale is None else scale**left for left in reversed(range(len(signals)))]
        sizes = [x.square().mean().sqrt().item() for x in signals]
        measured[name] = list(zip(sizes, *norms, predicted, strict=True))
    return measured


def draw(measured, path):
    """The part on the shortcuts, the gradient and the signal, for the units of Fig. 2 and for those of Fig. 4."""
    names, last = list(measured), len(measured["plain"]) - 1
    figure = Figure(figsize=(12, 13))
    grid = figure.subplots(3, 2, sharex=True, sharey="row", height_ratios=(4, 3, 3))
    columns = {"Fig. 2: what stands on the shortcut": names[:11], "Fig. 4: the order": names[:1] + names[11:]}
    rows = {"gradient that came on shortcuts alone": 2, "gradient": 1, "signal (root mean square)": 0}
    for axes, (title, nets) in zip(grid.T, columns.items(), strict=True):
        for ax, (label, quantity) in zip(axes, rows.items(), strict=True):
            for i, net in enumerate(nets):
                points = [(at, values[quantity]) for at, values in enumerate(measured[net]) if values[quantity] > 0]
                style = {"color": "k" if net == "plain" else f"C{i}", "linewidth": 2.5 if NETS[net][2] == 1 else 1.3}
                ax.plot(*zip(*points, strict=True), label=net, **style)
                if points[0][0] > 0 and net != "plain":
                    ax.plot(*points[0], "x", markersize=9, **style)  # nothing is left to its left
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


def page(measured, picture):
    """The page as Markdown: the picture, what to look for in it, and a table."""
    last, rows = len(measured["plain"]) - 1, []
    some = max(1, min(10, last // 3 - 1))  # units within the last stage
    for net, values in measured.items():
        scale, (_, gradient, part, predicted), rate = NETS[net][2], values[0], values[-1 - some][2] ** (1 / some)
        by_eq_8 = " | " if scale is None else f"{scale:g} | {predicted:.2g}"
        rows.append(f"| {net} | {by_eq_8} | {part:.2g} | {rate:.3f} | {gradient:.2g} | {values[-1][0]:.2f} |")
    return PAGE.format(depth=2 * last + 2, picture=picture, some=some, rows="\n".join(rows))


def write_page(depth):
    """Measure, draw, and write the page and its numbers under results/. Returns the page's text."""
    path = RESULTS / ("propagation" if depth == 110 else f"propagation-{depth}")
    measured = measure(depth)
    RESULTS.mkdir(exist_ok=True)
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["net", "l", "signal", "gradient", "on_shortcuts", "predicted"])
        for net, values in measured.items():
            cells = [["" if value is None else f"{value:.6g}" for value in row] for row in values]
            writer.writerows([net, at, *row] for at, row in enumerate(cells))
    draw(measured, path)
    text = page(measured, path.name + ".svg")
    path.with_suffix(".md").write_text(text, "utf-8")
    return text


FIGURES = {
    "[2] Fig. 2: what stands on the shortcut": {
        "(a) original": "basic",
        "(b) constant scaling": "basic-constant-scaling",
        "(c) exclusive gating": "basic-exclusive-gating",
        "(d) shortcut-only gating": "basic-shortcut-gating",
        "(e) 1\u00d71 conv shortcut": "basic-conv-shortcut",
        "(f) dropout shortcut": "basic-dropout-shortcut",
    },
    "[2] Fig. 4: the order of weights, BN and ReLU; and three layers, [1] Fig. 5": {
        "(a) original": "basic",
        "(b) BN after addition": "basic-bn-after-add",
        "(c) ReLU before addition": "basic-relu-before-add",
        "(d) ReLU-only pre-act.": "basic-relu-preact",
        "(e) full pre-activation": "basic-preact",
        "bottleneck": "bottleneck",
        "bottleneck, pre-act.": "bottleneck-preact",
    },
}


def boxes(unit):
    """A unit's operations as boxes, [(label, column, row, [(column, row) of each that it reads])]; its input is at
    (0, 0). Column 0 is the way from input to output with the fewest operations, the shortcut; 2 the one with the most,
    the branch; 1 has what is on neither, a gate. The row is the most operations that lie before the box."""
    read, ways = units.operations(unit), {}  # ways: from the input to a node, the shortest and the longest
    for node, (_, _, inputs) in read.items():
        before = [ways.get(i, ([], [])) for i in inputs]
        ways[node] = [*min((w[0] for w in before), key=len), node], [*max((w[1] for w in before), key=len), node]
    shortcut, branch = ways[node]
    at = {n: (0 if n in shortcut else 2 if n in branch else 1, len(longest)) for n, (_, longest) in ways.items()}
    signs = {"*": "\u00d7 {}", "-": "{} \u2212", "bn": "BN", "relu": "ReLU"}
    made = []
    for node, (operation, constants, inputs) in read.items():
        label = signs.get(operation, operation).format(*constants or [""]).strip()
        label = label.replace("conv", "conv ").replace("3x3", "3\u00d73").replace("1x1", "1\u00d71")
        made.append((label, *at[node], [at.get(i, (0, 0)) for i in inputs]))
    return made


def draw_units():
    """The text of an SVG: the units of FIGURES as boxes on a branch and its shortcut."""
    colors = {"c": "#cfe2f3", "B": "#fce5cd", "R": "#d9ead3"}  # convolution, BN, ReLU
    parts, right, top = [], 0, 0
    for title, names in FIGURES.items():
        parts.append(f'<text x="14" y="{top + 24}" class="title">{title}</text>')
        left, lowest = 14, 0
        for caption, name in names.items():
            drawn = boxes(units.UNITS[name](16 * units.UNITS[name].expansion, 16))
            used = sorted({0, *(column for _, column, _, _ in drawn)})
            x = {column: left + 30 + 64 * i for i, column in enumerate(used)}
            y = [top + 76 + 25 * row for row in range(len(drawn) + 1)]
            middle, last = left + 32 * len(used) - 2, max(row for _, _, row, _ in drawn)
            parts.append(f'<text x="{middle}" y="{top + 48}">{caption}</text>')
            parts.append(f'<text x="{middle}" y="{top + 61}" class="name">{name}</text>')
            for _, column, row, inputs in drawn:
                for start, begin in inputs:
                    way = f"M{x[start]} {y[begin]}"
                    if start == 1 and column == 2:  # from a gate to the branch: down between the two
                        way += f"H{x[1] + 32}"
                    elif start == 0:  # from the shortcut: to the side, then down
                        way += f"H{x[column]}"
                    way += f"V{y[row]}H{x[column]}"
                    wide = ' class="shortcut"' if start == column == 0 else ""
                    parts.append(f'<path d="{way}"{wide}/>')
            parts.append(f'<path d="M{x[0]} {y[last]}v24m-5 -6l5 6l5 -6" class="shortcut"/>')
            for label, column, row, _ in drawn:
                wide = 12 if len(label) == 1 else 28
                box = f'x="{x[column] - wide}" y="{y[row] - 9}" width="{2 * wide}" height="18" rx="4"'
                parts.append(f'<rect {box} fill="{colors.get(label[0], "#fff")}"/>')
                parts.append(f'<text x="{x[column]}" y="{y[row] + 4}">{label}</text>')
            left, lowest = left + 64 * len(used) + 8, max(lowest, y[last] + 24)
        right, top = max(right, left), lowest + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {top}">\n<style>'
    head += "text {font-family: sans-serif; font-size: 10.5px; text-anchor: middle} .name {font-size: 9px; fill: #666} "
    head += ".title {font-weight: bold; font-size: 12px; text-anchor: start} rect, path {stroke: #555} "
    head += "path {fill: none} .shortcut {stroke-width: 3px}</style>\n"
    head += f'<rect width="{right}" height="{top}" fill="#fff" style="stroke: none"/>\n'
    return head + "\n".join([*parts, "</svg>", ""])


def measure_responses(folder):
    """[1] Fig. 7 of a run of cifar_train.py: the standard deviation of each 3x3 layer's output, after BN and before
    ReLU and addition, over 1,000 test images with BN in evaluation mode (the paper does not say which images or mode).
    Writes responses.csv (layer, std) and returns its path. Raises ValueError, or OSError from the folder's files."""
    flags, state = checkpoint.read_run(folder)
    if "recipe" not in flags:
        raise ValueError(f"{folder} is not a run of cifar_train.py, and [1] Fig. 7 is about its nets")
    net = cifar_resnet(flags.depth, units.UNITS[flags.unit], len(state["model"]["fc.bias"]), **flags.unit_args)
    net.load_state_dict(state["model"])
    stds, latest = [], None

    def hook(layer, inputs, output):
        nonlocal latest
        if isinstance(layer, nn.BatchNorm2d):
            if inputs[0] is latest:  # the output of the last 3x3 layer
                stds[-1] = round(output.std().item(), 4)
        elif layer.kernel_size == (3, 3):
            stds.append(None)
            latest = output

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            layer.register_forward_hook(hook)
    about = state.get("about", state)  # older runs have mean and std beside the weights
    images = data.load_cifar(flags.dataset, flags.data, 1_000)[2]
    with torch.inference_mode():
        net.eval()((images - about["mean"]) / about["std"])
    if None in stds:
        raise ValueError(f"[1] Fig. 7 needs BN right after every 3x3 layer; {flags.unit} has it elsewhere")
    lines = ["layer,std", *(f"{i},{std}" for i, std in enumerate(stds, 1)), ""]
    (folder / "responses.csv").write_text("\n".join(lines))
    return folder / "responses.csv"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--depth", type=int, default=110, help="6n + 2 weight layers (default 110)")
    work.add_argument("--units", action="store_true", help="draw the units of the papers' figures as boxes")
    work.add_argument("--responses", nargs="+", type=pathlib.Path, metavar="RUN", help="folders of trained runs")
    args = parser.parse_args()
    checkpoint.prepare_streams()
    torch.set_num_threads(1)  # so that the numbers do not depend on the number of cores
    try:
        if args.units:
            (RESULTS / "units.svg").write_text(draw_units(), "utf-8")
            checkpoint.print_out(RESULTS / "units.svg")
        elif args.responses is None:
            checkpoint.print_out(write_page(args.depth))
        for folder in args.responses or ():
            checkpoint.print_out(measure_responses(folder))
    except (ValueError, OSError) as error:
        print(f"propagation.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
