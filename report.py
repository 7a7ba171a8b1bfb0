"""The papers' tables and figures, theirs beside ours, from the run folders under results/.

    python report.py                        # results/README.md, its figures, and the table that opens README.md
    python report.py RUN [RUN ...]          # curve.png into each run's folder
    python report.py --responses RUN ...    # [1] Fig. 7 measured on trained nets: responses.csv into each folder

A cell is filled by finished runs alone, those whose folder is results/<name in run_all.sh>/seed<n>.
"""

import argparse
import csv
import json
import math
import pathlib
import re
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"

TITLES = {
    "2-table1": "[2] Table 1: shortcuts, CIFAR-10",
    "2-table2": "[2] Table 2: the order of activations, CIFAR-10",
    "2-table3": "[2] Table 3: original and pre-activation units",
    "2-table4": "[2] Table 4: comparison",
    "1-table6": "[1] Table 6: CIFAR-10",
    "1-fig6": "[1] Fig. 6: plain nets (the paper's figures read off its curves)",
    "1-table2": "[1] Table 2: plain and residual nets, ImageNet validation, top-1 error of 10 crops",
    "1-table3": "[1] Table 3: ImageNet validation, 10 crops",
    "1-table4": "[1] Table 4: ImageNet validation, fully convolutional at five scales",
    "1-table5": "[1] Table 5: ensembles",
    "2-table5": "[2] Table 5: ImageNet validation, one crop of 320",
    "2-section5": "[2] Section 5: ResNet-101, ImageNet validation, one crop of 224",
    "open": "Open choices: what the papers do not say, and the other way",
    "short": "The short schedule",
}

# Figure: its axes, and for each panel a title and the curves, by their name in paper/ and in run_all.sh
LOSS, ERROR, IMAGENET, TRAIN, TEST = "loss and error", "error", "ImageNet error", "training error", "test error"
ORIGINAL = ("ResNet-110 original", "cifar10/110")
FIGURES = {
    "2-fig1": (LOSS, "[2] Fig. 1 right: ResNet-1001", [
        ("", [("ResNet-1001 original", "cifar10/1001"), ("ResNet-1001 pre-activation", "cifar10/1001-preact")]),
    ]),
    "2-fig3": (LOSS, "[2] Fig. 3: shortcuts", [
        ("(a)", [ORIGINAL, ("ResNet-110 constant scaling 0.5/0.5", "cifar10/110-constant-scaling-0.5-0.5")]),
        ("(b)", [ORIGINAL, ("ResNet-110 exclusive gating, b=-6", "cifar10/110-exclusive-gating-6")]),
        ("(c)", [ORIGINAL, ("ResNet-110 shortcut-only gating, b=0", "cifar10/110-shortcut-gating-0")]),
        ("(d)", [ORIGINAL, ("ResNet-110 1x1 conv shortcut", "cifar10/110-conv-shortcut")]),
    ]),
    "2-fig6": (LOSS, "[2] Fig. 6: the order of activations", [
        ("left", [ORIGINAL, ("ResNet-110 BN after addition", "cifar10/110-bn-after-add")]),
        ("right", [("ResNet-164 original", "cifar10/164"), ("ResNet-164 pre-activation", "cifar10/164-preact")]),
    ]),
    "1-fig1": (ERROR, "[1] Fig. 1: plain nets", [
        (kind, [("plain-20", "cifar10/20-plain"), ("plain-56", "cifar10/56-plain")]) for kind in (TRAIN, TEST)
    ]),
    "1-fig6": (ERROR, "[1] Fig. 6: plain and residual nets", [
        ("left", [(f"plain-{depth}", f"cifar10/{depth}-plain") for depth in (20, 32, 44, 56)]),
        ("middle", [(f"ResNet-{depth}", f"cifar10/{depth}") for depth in (20, 32, 44, 56, 110)]),
        ("right", [(f"ResNet-{depth}", f"cifar10/{depth}") for depth in (110, 1202)]),
    ]),
    "1-fig4": (IMAGENET, "[1] Fig. 4: ImageNet", [
        ("left", [(f"plain-{depth}", f"imagenet/{depth}-plain") for depth in (18, 34)]),
        ("right", [(f"ResNet-{depth}", f"imagenet/{depth}-A") for depth in (18, 34)]),
    ]),
}  # fmt: skip
RESPONSES = {f"plain-{depth}": f"cifar10/{depth}-plain" for depth in (20, 56)}
RESPONSES |= {f"ResNet-{depth}": f"cifar10/{depth}" for depth in (20, 56, 110)}


# Reading


TOPS = {"top-1": "top1", "top-5": "top5"}
VAL, ONE_CROP = ("val_top1", "val_top5"), ("1-crop top-1", "1-crop top-5")
PRECISIONS = ["float32", "tf32", "bf16", "fp16"]  # of several in one row, the first fills the table


def read_run(folder):
    """A run's result with its log under "log", its error (%; ImageNet: top-1) under "error" and all of its errors under
    "errors", by the metrics of paper/tables.csv. Raises ValueError saying what is wrong with the folder."""
    try:
        run = json.loads((folder / "result.json").read_text())
        run["errors"] = {}
        if "runs" not in run:  # the average of several runs has no log and no error of its own
            main = {"test_error": "test error %"} if "test_error" in run else dict(zip(VAL, ONE_CROP, strict=True))
            run["errors"] = {name: math.inf if run["diverged"] else float(run[key]) for key, name in main.items()}
            run["log"] = read_log(folder)
        for path in folder.glob("*.json"):
            if path.stem not in ("config", "result"):
                made = json.loads(path.read_text())
                if "runs" not in run and (made["iterations"] != [run["iterations"]] or made["recompute_bn"]):
                    continue  # of another net than the run's last
                run["errors"] |= {f"{path.stem} {top}": float(made[key]) for top, key in TOPS.items()}
        run["error"] = next(iter(run["errors"].values()))
        numbers = [run[name] for name in ("seconds", "peak_memory", *(() if "runs" in run else ("iterations",)))]
        numbers += [] if run["diverged"] else [*run["errors"].values(), run.get("train_loss", 0.0)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"a number is not finite: {numbers}")
        PRECISIONS.index(run["precision"])
        return {"log": []} | run | {"folder": folder}
    except FileNotFoundError as error:
        raise ValueError(f"not finished: there is no {pathlib.Path(error.filename).name}") from None
    except Exception as error:  # a broken file may raise anything; it must not cost the page
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from None


def read_log(folder):
    """The rows of a run's log.csv. Raises ValueError or csv.Error when it is not one."""
    with open(folder / "log.csv", newline="") as file:
        log = [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]
    for row in log:
        if not math.isfinite(row["iteration"]) or not math.isfinite(row["train_loss"]):
            raise ValueError("log.csv has a row without iteration or training loss")
        if not {"test_error", "val_top1"} & row.keys():
            raise ValueError("log.csv has no errors")
        if not all(value is None or math.isfinite(value) for value in row.values()):
            raise ValueError("log.csv has a number that is not finite")
    return log


def read_runs(root):
    """({row's name: its runs}, other runs, problems). A row's runs are of one precision, float32 if there are any."""
    rows, others, problems = {}, [], []
    folders = {path.parent for name in ("config.json", "log.csv", "result.json") for path in root.rglob(name)}
    for folder in sorted(folders):
        try:
            run = read_run(folder)
        except ValueError as error:
            problems.append(f"{folder.relative_to(root)}: {error}")
            continue
        name, _, seed = folder.relative_to(root).as_posix().rpartition("/")
        known = name and re.fullmatch(r"seed\d+", seed) and name in {cell["run"] for cell in cells()}
        known = known and run["dataset"] != "synthetic"
        rows.setdefault(name, []).append(run) if known else others.append(run)
    for name, runs in rows.items():
        precision = min((run["precision"] for run in runs), key=PRECISIONS.index)
        others += [run for run in runs if run["precision"] != precision]
        rows[name] = [run for run in runs if run["precision"] == precision]
    return rows, others, problems


def cells():
    with open(HERE / "paper" / "tables.csv", newline="") as file:
        return list(csv.DictReader(file))


def paper_curves():
    """{(network, quantity): {figure: [(x, value), ...]}} of both; x is the iteration, in [1] Fig. 7 the layer."""
    curves = {}
    for name in ("identity_mappings", "deep_residual_learning"):
        with open(HERE / "paper" / f"{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                figures = curves.setdefault((row["network"], row["quantity"]), {})
                point = float(row.get("iteration") or row["x"]), float(row["value"])
                figures.setdefault(row["figure"], []).append(point)
    return curves


# Tables


def ours(runs, fails=False, metric=None):
    """median (mean +- std, n) of the runs' test errors, or of a metric; above 20 % "fail", where the papers say so."""
    errors = [run["errors"].get(metric) if metric else run["error"] for run in runs]
    errors = [error for error in errors if error is not None]
    if not errors:
        return ""
    finite = [error for error in errors if error < math.inf]
    median = statistics.median(errors)
    shown, notes = f"{median:.2f}", []
    if median == math.inf:
        shown = "diverged"
    if fails and median > 20:
        shown, notes = "fail", [shown]
    if len(finite) > 1:
        notes.append(f"{statistics.mean(finite):.2f} ± {statistics.stdev(finite):.2f}")
    notes.append(f"n = {len(errors)}")
    if len(finite) < len(errors):
        notes.append(f"{len(errors) - len(finite)} diverged")
    return f"{shown} ({', '.join(notes)})"


def table(tag, rows):
    """A paper's table as Markdown, ours beside each of its columns."""
    mine = [cell for cell in cells() if cell["table"] == tag]
    columns = list(dict.fromkeys(cell["column"] for cell in mine))
    lines = ["| |" + "".join(f" {column} | ours |" for column in columns), "|---|" + "---|---|" * len(columns)]
    for label in dict.fromkeys(cell["row"] for cell in mine):
        line = f"| {label} |"
        for column in columns:
            cell = next((cell for cell in mine if (cell["row"], cell["column"]) == (label, column)), None)
            found = rows.get(cell["run"], []) if cell else []
            fails = cell and cell["metric"] == "test error %" and cell["paper"] in ("fail", "-")
            line += f" {cell['paper'] if cell else ''} | {ours(found, fails, cell and cell['metric'])} |"
        lines.append(line)
    return lines


def short_table(rows):
    """The short schedule's table: the papers' ResNet-110, and our test error and training loss, medians."""
    lines = ["| unit | the papers' ResNet-110 | test error, % | training loss |", "|---|---|---|---|"]
    for label, paper, runs in short_rows(rows):
        losses = [run["train_loss"] for run in runs if run["train_loss"] is not None]
        loss = f"{statistics.median(losses):.2f}" if losses else ""
        lines.append(f"| {label} | {paper} | {ours(runs)} | {loss} |")
    return lines


def short_rows(rows):
    """(label, the papers' figure, our runs) of the short schedule, in the papers' order."""
    mine = [cell for cell in cells() if cell["table"] == "short"]
    paper = {cell["row"]: cell["paper"] for cell in mine if not cell["run"]}
    return [(cell["row"], paper[cell["row"]], rows.get(cell["run"], [])) for cell in mine if cell["run"]]


def orderings(rows):
    """Which of the papers' orderings by test error the short runs confirm, contradict or cannot tell, pair by pair."""
    found = [(label, paper, [run["error"] for run in runs]) for label, paper, runs in short_rows(rows) if runs]
    several = [errors for _, _, errors in found if len(errors) > 1 and max(errors) < math.inf]
    if not several:
        return ["No row has two runs yet, so whether a difference is more than chance cannot be told."]
    squares = sum(statistics.variance(errors) * (len(errors) - 1) for errors in several)
    spread = math.sqrt(squares / sum(len(errors) - 1 for errors in several))

    def verdict(lower, higher):
        (_, a, ours_a), (_, b, ours_b) = lower, higher
        if a == b:  # the papers do not order them
            return ""
        difference = statistics.mean(ours_b) - statistics.mean(ours_a)
        enough = 2 * spread * math.sqrt(1 / len(ours_a) + 1 / len(ours_b))
        return "✓" if difference > enough else "✗" if difference < -enough else "?"

    table = ["| lower in the papers | n |", "|---|---|"]
    for i, (label, _, errors) in enumerate(found):
        table[0] += f" {i + 1} |"
        table[1] += "---|"
        verdicts = [verdict(found[i], other) if k > i else "" for k, other in enumerate(found)]
        table.append(f"| {i + 1} {label} | {len(errors)} | " + " | ".join(verdicts) + " |")
    wanted = ("full pre-activation", "original", "plain")
    three = {label: runs for label, _, runs in short_rows(rows) if label in wanted}
    loss = []
    if all(three.values()):
        medians = [statistics.median(run["train_loss"] or math.inf for run in runs) for runs in three.values()]
        shown = ", ".join(f"{label} {median:.2f}" for label, median in zip(three, medians, strict=True))
        order = "the papers' order" if medians == sorted(medians) else "**not** the papers' order"
        loss = [f"Median training loss: {shown}: {order}.", ""]
    yes, no, unsure = ("".join(table).count(mark) for mark in "✓✗?")
    return [
        *loss,
        f"Of {yes + no + unsure} pairs of units that the papers order by test error, these runs confirm {yes} (✓),",
        f"contradict {no} (✗) and cannot tell {unsure} (?), at this schedule. An order counts as told where the",
        f"means of n and m runs differ by more than 2 s sqrt(1/n + 1/m); s = {spread:.2f} % is the standard deviation",
        f"of a row's runs, pooled over the {len(several)} rows with two or more and taken to be that of all. Of twenty",
        "pairs without a difference one or two would pass for told.",
        "",
        *table,
    ]


def runs_of(tag, rows):
    """How the runs of a table were made, how far from the paper they end, what choosing on the test set would do."""
    mine = [cell for cell in cells() if cell["table"] == tag and cell["run"] in rows]
    if not mine:
        return ["No run yet."]
    lines = ["| runs | n | precision | hours each | peak memory, GB |", "|---|---|---|---|---|"]
    away, gains = [], []
    for name in dict.fromkeys(cell["run"] for cell in mine):
        runs = rows[name]
        hours = statistics.median(run["seconds"] for run in runs) / 3600
        memory = max(run["peak_memory"] for run in runs) / 1e9
        lines.append(f"| [{name}]({name}) | {len(runs)} | {runs[0]['precision']} | {hours:.2f} | {memory:.2f} |")
        for run in runs:
            errors = [row.get("test_error", row.get("val_top1")) for row in run["log"]]
            errors = [error for error in errors if error is not None]
            if errors and run["error"] < math.inf:
                gains.append(errors[-1] - min(errors))
    for cell in mine:
        errors = [run["errors"][cell["metric"]] for run in rows[cell["run"]] if cell["metric"] in run["errors"]]
        figures = re.findall(r"[\d.]+", cell["paper"])  # "6.43 (6.61±0.16)": of the lowest of 5 runs take the mean
        label = cell["row"] + (f", {cell['column']}" if "top" in cell["metric"] else "")
        median = statistics.median(errors or [math.nan])
        if figures and median == math.inf:
            away.append(f"{label} (diverged)")
        elif figures and abs(median - float(figures["lowest" in cell["row"]])) > 0.5:
            away.append(f"{label} ({median - float(figures['lowest' in cell['row']]):+.2f})")
        elif cell["paper"] == "fail" and median <= 20:
            away.append(f"{label} ({median:.2f} instead of a failure)")
    if gains:
        gain = (
            f"{statistics.mean(gains):.2f} % above the lowest of a run's test evaluations (mean of {len(gains)} runs)"
        )
        lines += ["", f"The last iterate, which is what the table shows, is {gain}."]
    if away:
        lines += ["", "More than 0.5 % from the paper: " + "; ".join(away) + "."]
    return lines


# Check-points of the curves, paper.md's: where does a run leave the paper's?

ITERATIONS = (10_000, 20_000, 30_000, 36_000, 46_000, 56_000, 64_000)
WINDOWS = ((1_000, 3_000), (9_000, 11_000), (29_000, 31_000), (35_000, 37_000), (45_000, 47_000), (62_000, 66_000))


def paper_error_at(points, iteration):
    """The test error of a paper's curve at an iteration: the mean within 1,500 of it. Above 20 % there is no curve."""
    near = [y for x, y in points if abs(x - iteration) <= 1_500]
    return f"{statistics.mean(near):.2f}" if near else ">20"


def paper_loss_in(points, window):
    """The mean training loss of a paper's curve in a window of iterations; above 2 it is cut off."""
    values = [y for x, y in points if window[0] <= x <= window[1]]
    return f"{statistics.mean(values):.4f}" if values else (">2" if window[0] < 5_000 else "<0.002")


def checkpoints(panels, curves, rows):
    """Test error and training loss at the check-points of a figure's curves, the paper's and our first run's."""
    header = [f"{t // 1000}k" for t in ITERATIONS] + [f"{a // 1000}-{b // 1000}k" for a, b in WINDOWS]
    lines = ["| | " + " | ".join(header) + " |", "|---|" + "---|" * len(header)]
    for network, name in dict.fromkeys(curve for _, panel in panels for curve in panel):
        (error,), (loss,) = (curves[network, quantity].values() for quantity in ("test_error", "train_loss"))
        values = [paper_error_at(error, t) for t in ITERATIONS] + [paper_loss_in(loss, window) for window in WINDOWS]
        lines.append(f"| {network}, paper | " + " | ".join(values) + " |")
        full = [run for run in rows.get(name, []) if run["iterations"] == 64_000]
        if full:
            log = {row["iteration"]: row for row in full[0]["log"]}
            errors = dict(our_points(full[0], "test_error"))
            values = [f"{errors[t]:.2f}" if t in errors else "" for t in ITERATIONS]
            for a, b in WINDOWS:  # a row's loss is the mean over the 2,000 iterations up to it
                ends = [t for t in log if a <= t <= b + 1_000]
                mean = statistics.mean(log[t]["train_loss"] for t in ends) if ends else math.nan
                same = paper_loss_in(loss, (min(ends) - 2_000, max(ends))) if ends else ""
                values.append(f"{mean:.4f} ({same})" if ends else "")
            lines.append(f"| ours ({full[0]['folder'].name}) | " + " | ".join(values) + " |")
    return lines


# Figures


def save(figure, name):
    figure.tight_layout()
    for suffix in ("svg", "png"):
        figure.savefig(RESULTS / f"{name}.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else {})
    plt.close(figure)


def plot(axes, points, **style):
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def our_points(run, quantity):
    return [(row["iteration"], row[quantity]) for row in run["log"] if row.get(quantity) is not None]


def paper_points(curves, network, quantity, figure):
    """A curve of the paper: of those drawn in several figures the one of this figure, else any."""
    figures = curves.get((network, quantity), {})
    return next((points for key, points in figures.items() if figure in key), next(iter(figures.values()), []))


def label_iterations(axes, start, end):
    every = 100_000 if end > 100_000 else 10_000
    ticks = range(math.ceil(start / every) * every, end, every)
    axes.set_xlim(start, end)
    axes.set_xticks(ticks, [str(tick // 10_000) for tick in ticks])
    axes.set_xlabel("iterations (1e4)")


def draw_figure(name, curves, rows):
    """One figure of the papers: their curves thin and pale, ours strong, in the same colours and axes."""
    kind, title, panels = FIGURES[name]
    down, across = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure, grid = plt.subplots(down, across, figsize=(4.4 * across, 3.6 * down), squeeze=False)
    for axes, (panel, networks) in zip(grid.flat, panels, strict=True):
        axes.set_title(f"{title} {panel}".strip(), fontsize=10)
        right = axes.twinx() if kind == LOSS else axes
        quantities = [("train_loss", axes, "--"), ("test_error", right, "-")]
        if kind != LOSS:
            quantities = [("train_error", axes, "--"), ("val_top1" if kind == IMAGENET else "test_error", axes, "-")]
            quantities = {TRAIN: quantities[:1], TEST: quantities[1:]}.get(panel, quantities)
        for i, (network, run_name) in enumerate(networks):
            for quantity, where, line in quantities:
                theirs = "val_error" if quantity == "val_top1" else quantity
                theirs = paper_points(curves, network, theirs, f"{name[-1]} {panel}".replace("(", "").strip())
                plot(where, theirs, color=f"C{i}", linestyle=line, linewidth=0.8, alpha=0.5)
                for run in rows.get(run_name, []):
                    plot(where, our_points(run, quantity), color=f"C{i}", linestyle=line, linewidth=1.8)
            n = len(rows.get(run_name, []))
            right.plot([], [], color=f"C{i}", label=f"{network} ({f'ours: n = {n}' if n else 'paper'})")
        begin = 34_000 if "ResNet-1202" in dict(networks) else 0  # as the paper cuts it
        label_iterations(axes, begin, {LOSS: 68_000, ERROR: 64_000, IMAGENET: 600_000}[kind])
        if kind == LOSS:
            axes.set(yscale="log", ylim=(0.002, 2), ylabel="training loss (dashed)")
            right.set(ylim=(0, 20), ylabel="test error, % (solid)")
        else:
            axes.set(ylim=(20, 60) if kind == IMAGENET else (0, 20))
            axes.set(ylabel=panel + ", %" if panel in (TRAIN, TEST) else "error, % (dashed: training)")
        right.legend(fontsize=7, loc="upper right", framealpha=0.6)
    save(figure, name)


def draw_responses(curves, rows):
    """[1] Fig. 7: the paper's dots pale, ours as lines, in layer order and sorted."""
    figure, grid = plt.subplots(2, 1, figsize=(7, 6))
    for axes, half in zip(grid, ("top", "bottom"), strict=True):
        for i, (network, name) in enumerate(RESPONSES.items()):
            theirs = curves[network, "response_std"][f"7 {half}"]
            plot(axes, theirs, color=f"C{i}", linewidth=0.8, alpha=0.5)
            measured = [run["folder"] / "responses.csv" for run in rows.get(name, [])]
            measured = [path for path in measured if path.exists()]
            for path in measured:
                with open(path, newline="") as file:
                    values = [float(row["std"]) for row in csv.DictReader(file)]
                values = sorted(values, reverse=True) if half == "bottom" else values
                plot(axes, list(enumerate(values, 1)), color=f"C{i}", linewidth=1.8)
            note = f"ours: n = {len(measured)}" if measured else "paper"
            axes.plot([], [], color=f"C{i}", label=f"{network} ({note})")
        axes.set(ylabel="std", xlabel="layer" + (", sorted by magnitude" if half == "bottom" else ""), ylim=(0, 3.6))
        axes.legend(fontsize=7, ncols=2)
    grid[0].set_title("[1] Fig. 7: std of the 3x3 layers' responses, after BN", fontsize=10)
    save(figure, "1-fig7")


def draw_short(rows):
    """The short schedule's test errors beside the papers' ResNet-110, in the papers' order."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
    labels = []
    for i, (label, paper, runs) in enumerate(short_rows(rows)):
        labels.append(label)
        if paper == "fail":
            left.text(20, i, "fail (> 20 %)", ha="right", va="center", fontsize=8, color="C3")
        else:
            left.plot(float(paper), i, "o", color="C7")
        errors = [run["error"] for run in runs if run["error"] < math.inf]
        right.plot(errors, [i] * len(errors), "o", color="C0", markersize=4, alpha=0.5)
        if errors:
            right.plot(statistics.median(errors), i, "|", color="C0", markersize=14, markeredgewidth=2)
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    left.invert_yaxis()
    left.set(title="the papers: ResNet-110, 64,000 iterations", xlabel="test error, %", xlim=(5, 20.5))
    right.set(title="here: 38 layers, 1,600 iterations", xlabel="test error, % (each run, median)")
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.grid(axis="y", alpha=0.3)
    save(figure, "short")


def draw_run(folder):
    """curve.png into a run's folder, finished or not: training loss dashed at the left, errors solid at the right."""
    run = {"log": read_log(folder)}
    figure, axes = plt.subplots(figsize=(6, 4))
    right = axes.twinx()
    plot(axes, our_points(run, "train_loss"), color="C0", linestyle="--", marker=".")
    for quantity, color in (("test_error", "C0"), ("val_error", "C1"), ("val_top1", "C0"), ("val_top5", "C2")):
        if quantity not in run["log"][0]:
            continue
        plot(right, our_points(run, quantity), color=color, marker=".", label=quantity.replace("_", " "))
    axes.set(yscale="log", xlabel="iterations", ylabel="training loss (dashed)", title=folder.name)
    right.set(ylabel="error, % (solid)")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=110)
    plt.close(figure)


def measure_responses(folder):
    """[1] Fig. 7: the std of each 3x3 layer's output after BN, before ReLU and addition, over 1,000 test images with BN
    in evaluation mode (the paper does not say which images or mode). Writes responses.csv: layer, std."""
    import torch

    import checkpoint
    import data
    import models
    import units

    config, state = checkpoint.read_json(folder / "config.json"), checkpoint.load(folder)
    if state is None:
        raise ValueError("holds no checkpoint")
    net = models.cifar_resnet(
        config["depth"], units.UNITS[config["unit"]], data.CLASSES[config["dataset"]], **config["unit_args"]
    )
    net.load_state_dict(state["model"])
    responses, latest = [], None

    def hook(layer, inputs, output):
        nonlocal latest
        if isinstance(layer, torch.nn.Conv2d):
            latest = output if layer.kernel_size == (3, 3) else None
        elif inputs[0] is latest:  # the BN of the 3x3 layer that has just run
            responses.append(output.std().item())

    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.BatchNorm2d)):
            layer.register_forward_hook(hook)
    images = data.load_cifar(config["dataset"], config["data"], 1_000)[2]
    with torch.inference_mode():
        net.eval()((images - state["mean"]) / state["std"])
    layers = sum(isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) for layer in net.modules())
    if len(responses) != layers:
        raise ValueError(
            f"[1] Fig. 7 is of nets with BN right after each 3x3 layer, and {config['unit']} has it elsewhere"
        )
    with open(folder / "responses.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("layer", "std"), *((i, round(std, 4)) for i, std in enumerate(responses, 1))])


# The pages


def headline(rows):
    """What opens README.md: the short schedule, and of the papers' nets those that have been run."""
    lines = ["![test error of each unit](results/short.svg)", "", *short_table(rows), ""]
    papers = [cell for cell in cells() if cell["run"] in rows and cell["table"] not in ("open", "short")]
    if papers:
        lines += ["| the papers' nets, full schedule | paper | ours |", "|---|---|---|"]
        for cell in {cell["run"]: cell for cell in reversed(papers)}.values():
            note = "" if cell["metric"] == "test error %" else f", {cell['metric']}"
            mine = ours(rows[cell["run"]], cell["paper"] == "fail", cell["metric"])
            lines.append(f"| {cell['run']}{note} | {cell['paper']} | {mine} |")
    else:
        lines.append("None of the papers' nets has been run on its full schedule of 64,000 iterations yet.")
    return "\n".join(lines)


START, END = "<!-- written by report.py -->", "<!-- end -->"


def with_headline(text, rows):
    """README.md's text with the part between the two marks made anew."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{headline(rows)}\n{END}{rest.partition(END)[2]}"


def page(rows, others, problems):
    """results/README.md."""
    curves = paper_curves()
    lines = [
        "# Results",
        "",
        "Written by `python report.py` from the run folders beside it; a cell is empty where nothing has run. Test",
        "error in %, of the last iterate: *median (mean ± std over the runs, n)*. [2]'s figures are medians of 5 runs.",
        "On ImageNet, top-1 and top-5 error on the validation images.",
    ]
    for tag, title in TITLES.items():
        lines += ["", f"## {title}", ""]
        if tag == "short":
            lines += [
                "Not the papers' tables, but an evening on a laptop (`bash run_all.sh short`): 38 layers, batches of",
                "32 in one micro-batch, 1,600 iterations, learning rate 0.05 after 100 iterations of warm-up, recipe",
                "`paper` otherwise. Every error is far above the papers', who train on 160 times as many images. What",
                "one should see is their order: pre-activation on an identity shortcut lowest, anything else on the",
                "shortcut worse, no shortcut among the worst. What one does see is below the table. (With exclusive",
                "gating at b_g = -6, F begins scaled by 0.0025: 1,600 iterations may be too few to open its gates.)",
                "",
                *short_table(rows),
                *["", "![short schedule](short.svg)", ""],
                *orderings(rows),
            ]
        else:
            lines += table(tag, rows)
        lines += ["", *runs_of(tag, rows)]
    lines += ["", "## Figures", "", "The papers' curves are thin and pale, ours strong, in the same colours."]
    for name, (kind, title, panels) in FIGURES.items():
        lines += ["", f"### {title}", "", f"![{title}]({name}.svg)"]
        if kind == LOSS:
            lines += ["", "Test error at the iteration, then mean training loss in the window (ours: of the log's rows"]
            lines += ["around it; in brackets the paper's over the same iterations):", ""]
            lines += checkpoints(panels, curves, rows)
    lines += ["", "### [1] Fig. 7: layer responses", "", "![layer responses](1-fig7.svg)"]
    lines += ["", "### [2] Sections 2 and 3: [signal and gradient through depth](propagation.md)"]
    if others:
        lines += ["", "## Other runs", "", "| folder | dataset | depth | unit | iterations | test error, % |"]
        lines.append("|---|---|---|---|---|---|")
        for run in others:
            name = run["folder"].relative_to(RESULTS).as_posix()
            settings = " | ".join(str(run.get(key)) for key in ("dataset", "depth", "unit", "iterations"))
            lines.append(f"| [{name}]({name}) | {settings} | {ours([run])} |")
    if problems:
        lines += ["", "## Not read", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=pathlib.Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--responses", action="store_true", help="measure [1] Fig. 7 on the runs' checkpoints")
    args = parser.parse_args()
    if args.responses and not args.runs:
        parser.error("--responses needs the folder of a run")
    for folder in args.runs:
        try:
            measure_responses(folder) if args.responses else draw_run(folder)
        except Exception as error:  # a folder may hold anything
            print(f"report.py: {folder}: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
        print(folder / ("responses.csv" if args.responses else "curve.png"))
    if not args.runs:
        rows, others, problems = read_runs(RESULTS)
        RESULTS.mkdir(exist_ok=True)
        plt.rcParams["svg.hashsalt"] = "resnet"  # the same picture is the same file
        curves = paper_curves()
        for name in FIGURES:
            draw_figure(name, curves, rows)
        draw_responses(curves, rows)
        draw_short(rows)
        damaged = [problem for problem in problems if "not finished" not in problem]  # the others may be under way
        (RESULTS / "README.md").write_text(page(rows, others, damaged))
        readme = HERE / "README.md"
        readme.write_text(with_headline(readme.read_text(), rows))
        print(*problems, f"wrote {RESULTS / 'README.md'}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
