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

# Figure: its kind, its title, and its panels as the curves in paper/ name them, with what stands above each
LOSS, ERROR, IMAGENET = "loss and error", "error", "ImageNet error"
FIGURES = {
    "2-fig1": (LOSS, "[2] Fig. 1 right: ResNet-1001", {"": ""}),
    "2-fig3": (LOSS, "[2] Fig. 3: shortcuts", {"a": "(a)", "b": "(b)", "c": "(c)", "d": "(d)"}),
    "2-fig6": (LOSS, "[2] Fig. 6: the order of activations", {"left": "left", "right": "right"}),
    "1-fig1": (ERROR, "[1] Fig. 1: plain nets", {"left": "training error", "right": "test error"}),
    "1-fig6": (ERROR, "[1] Fig. 6: plain and residual nets", {"left": "left", "middle": "middle", "right": "right"}),
    "1-fig4": (IMAGENET, "[1] Fig. 4: ImageNet", {"left": "left", "right": "right"}),
}


# Reading

METRICS = {"test_error": "test error %", "val_top1": "1-crop top-1", "val_top5": "1-crop top-5"}
METRICS |= {"train_loss": "training loss"}
PRECISIONS = ["float32", "tf32", "bf16", "fp16"]  # of several in one row, the first fills the table


def read_run(folder):
    """A run's result, with its log and responses, and under "values" its errors (%) by the metrics of paper/tables.csv
    and its "training loss", infinite if it diverged. Raises ValueError saying what is wrong with the folder."""
    try:
        run = json.loads((folder / "result.json").read_text())
        average = "runs" in run  # of several nets: no log and no values but those of its evaluations
        values = {metric: run[name] for name, metric in METRICS.items() if name in run}
        if run["precision"] not in PRECISIONS or "dataset" not in run or (len(values) < 2 and not average):
            raise ValueError("result.json lacks a known precision, the data set, an error or the training loss")
        for path in sorted({*folder.glob("*.json")} - {folder / "result.json", folder / "config.json"}):
            made = json.loads(path.read_text())
            if average or (made["iterations"] == [run["iterations"]] and not made["recompute_bn"]):  # its last net
                values |= {f"{path.stem} top-1": made["top1"], f"{path.stem} top-5": made["top5"]}
        numbers = [run["seconds"], run["peak_memory"], *(() if run["diverged"] else values.values())]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"a number is not finite: {numbers}")
        run["values"] = dict.fromkeys(values, math.inf) if run["diverged"] else values
        needless = average or run["diverged"]  # it may have diverged before the log's first row
        run["log"] = [] if needless and not (folder / "log.csv").exists() else read_log(folder)
        path = folder / "responses.csv"
        run["responses"] = [float(row["std"]) for row in read_csv(path)] if path.exists() else []
        return run | {"folder": folder}
    except FileNotFoundError as error:
        raise ValueError(f"not finished: there is no {pathlib.Path(error.filename).name}") from None
    except Exception as error:  # a broken file may raise anything; it must not cost the page
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from None


def read_log(folder):
    """The rows of a run's log.csv, {column: number} without the empty cells. Raises ValueError when it is not one."""
    rows = read_csv(folder / "log.csv")
    if not rows or not {"test_error", "val_top1"} & rows[0].keys():
        raise ValueError("log.csv has no errors")
    log = [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
    for row in log:
        if not {"iteration", "train_loss"} <= row.keys() or not all(map(math.isfinite, row.values())):
            raise ValueError("log.csv has a row without iteration or training loss, or a number that is not finite")
    return log


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_runs(root):
    """({row's name: its runs}, other runs, problems). A row's runs are of one precision, float32 if there are any."""
    rows, others, problems = {cell["run"]: [] for cell in cells() if cell["run"]}, [], []
    folders = {path.parent for name in ("config.json", "log.csv", "result.json") for path in root.rglob(name)}
    for folder in sorted(folders):
        name, _, seed = folder.relative_to(root).as_posix().rpartition("/")
        try:
            run = read_run(folder)
        except ValueError as error:
            problems.append(f"{folder.relative_to(root)}: {error}")
        else:
            known = name in rows and re.fullmatch(r"seed\d+", seed) and run["dataset"] != "synthetic"
            (rows[name] if known else others).append(run)
    for name, runs in rows.items():
        first = min((run["precision"] for run in runs), key=PRECISIONS.index, default=None)
        others += [run for run in runs if run["precision"] != first]
        rows[name] = [run for run in runs if run["precision"] == first]
    return rows, others, problems


def cells(table=None):
    """The cells of the papers' tables, or of one: dicts of table, row, column, paper (%), metric and run (our row)."""
    return [cell for cell in read_csv(HERE / "paper" / "tables.csv") if table in (None, cell["table"])]


def paper_curves():
    """{panel: {(network, our row): {quantity: [(x, value), ...]}}} of both papers, a panel called as "2-fig3a" and the
    networks in the order of paper/networks.csv; x is the iteration, in [1] Fig. 7 the layer."""
    runs = {row["network"]: row["run"] for row in read_csv(HERE / "paper" / "networks.csv")}
    curves, order = {}, list(runs)
    for paper, name in ((1, "deep_residual_learning"), (2, "identity_mappings")):
        for row in sorted(read_csv(HERE / "paper" / f"{name}.csv"), key=lambda row: order.index(row["network"])):
            point = float(row.get("iteration") or row["x"]), float(row["value"])
            for panel in row["figure"].replace(" ", "").split(";"):
                networks = curves.setdefault(f"{paper}-fig{panel}", {})
                quantities = networks.setdefault((row["network"], runs[row["network"]]), {})
                quantities.setdefault(row["quantity"], []).append(point)
    return curves


# Tables


def markdown(header, rows):
    """The lines of a Markdown table: the first as it is, the others of cells."""
    return [header, "|---" * (header.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def found(runs, metric):
    """What the runs have under a metric, those that have it."""
    return [run["values"][metric] for run in runs if metric in run["values"]]


def ours(runs, metric="test error %", fails=False):
    """median (mean ± std, n) of what the runs have under a metric; above 20 % "fail", where the papers say so."""
    values = found(runs, metric)
    if not values:
        return ""
    finite = [value for value in values if value < math.inf]
    median = statistics.median(values)
    shown, notes = f"{median:.2f}" if median < math.inf else "diverged", []
    if fails and median > 20:
        shown, notes = "fail", [shown]
    if len(finite) > 1:
        notes.append(f"{statistics.mean(finite):.2f} ± {statistics.stdev(finite):.2f}")
    notes.append(f"n = {len(values)}")
    if len(finite) < len(values):
        notes.append(f"{len(values) - len(finite)} diverged")
    return f"{shown} ({', '.join(notes)})"


def beside(cell, rows):
    """Ours beside a cell of the papers' tables."""
    fails = cell["metric"] == "test error %" and cell["paper"] in ("fail", "-")
    return ours(rows.get(cell["run"], []), cell["metric"], fails)


def table(tag, rows):
    """A paper's table as Markdown, ours beside each of its columns."""
    mine = {(cell["row"], cell["column"]): [cell["paper"], beside(cell, rows)] for cell in cells(tag)}
    columns = list(dict.fromkeys(column for _, column in mine))
    lines = []
    for label in dict.fromkeys(label for label, _ in mine):
        line = [label]
        for column in columns:
            line += mine.get((label, column), ["", ""])
        lines.append(line)
    return markdown("| |" + "".join(f" {column} | ours |" for column in columns), lines)


def short_rows(rows):
    """(label, the papers' figure, our runs) of the short schedule, in the papers' order."""
    paper = {cell["row"]: cell["paper"] for cell in cells("short") if not cell["run"]}
    return [(cell["row"], paper[cell["row"]], rows.get(cell["run"], [])) for cell in cells("short") if cell["run"]]


def short_table(rows):
    """The short schedule's table: the papers' ResNet-110, and our test error and training loss, medians."""
    lines = []
    for label, paper, runs in short_rows(rows):
        losses = [loss for loss in found(runs, "training loss") if loss < math.inf]
        lines.append((label, paper, ours(runs), f"{statistics.median(losses):.2f}" if losses else ""))
    return markdown("| unit | the papers' ResNet-110 | test error, % | training loss |", lines)


def orderings(rows):
    """Which of the papers' orderings by test error the short runs confirm, contradict or cannot tell, pair by pair."""
    short = [(label, paper, found(runs, "test error %")) for label, paper, runs in short_rows(rows)]
    short = [row for row in short if row[-1]]
    several = [errors for _, _, errors in short if len(errors) > 1 and max(errors) < math.inf]
    if not several:
        return ["No row has two runs yet, so whether a difference is more than chance cannot be told."]
    squares = sum(statistics.variance(errors) * (len(errors) - 1) for errors in several)
    spread = math.sqrt(squares / sum(len(errors) - 1 for errors in several))
    lines, verdicts = [], []
    for i, (label, paper, errors) in enumerate(short, 1):
        line = []
        for _, higher, others in short[i:]:
            difference = statistics.mean(others) - statistics.mean(errors)
            enough = 2 * spread * math.sqrt(1 / len(errors) + 1 / len(others))
            verdict = "✓" if difference > enough else "✗" if difference < -enough else "?"
            line.append("" if higher == paper else verdict)  # the papers do not order two failures
        lines.append([f"{i} {label}", str(len(errors)), *[""] * i, *line])
        verdicts += line
    yes, no, unsure = map(verdicts.count, "✓✗?")
    three = ("full pre-activation", "original", "plain")
    losses = [found(runs, "training loss") for label, _, runs in short_rows(rows) if label in three]
    text = []
    if all(losses):
        medians = [statistics.median(values) for values in losses]
        shown = ", ".join(f"{label} {median:.2f}" for label, median in zip(three, medians, strict=True))
        order = "the papers' order" if medians == sorted(medians) else "**not** the papers' order"
        text = [f"Median training loss: {shown}: {order}.", ""]
    return [
        *text,
        f"Of {yes + no + unsure} pairs of units that the papers order by test error, these runs confirm {yes} (✓),",
        f"contradict {no} (✗) and cannot tell {unsure} (?), at this schedule. An order counts as told where the",
        f"means of n and m runs differ by more than 2 s sqrt(1/n + 1/m); s = {spread:.2f} % is the standard deviation",
        f"of a row's runs, pooled over the {len(several)} rows with two or more and taken to be that of all. Of twenty",
        "pairs without a difference one or two would pass for told.",
        "",
        *markdown("| lower in the papers | n |" + "".join(f" {i + 1} |" for i in range(len(short))), lines),
    ]


def runs_of(tag, rows):
    """How the runs of a table were made, how far from the paper they end, what choosing on the test set would do."""
    mine = [cell for cell in cells(tag) if rows.get(cell["run"])]
    if not mine:
        return ["No run yet."]
    lines, gains, away = [], [], []
    for name in dict.fromkeys(cell["run"] for cell in mine):
        runs = rows[name]
        hours = statistics.median(run["seconds"] for run in runs) / 3600
        memory = max(run["peak_memory"] for run in runs) / 1e9
        made = str(len(runs)), runs[0]["precision"], f"{hours:.2f}", f"{memory:.2f}"
        lines.append((f"[{name}]({name})", *made))
        for run in runs:
            errors = [error for _, error in points(run, "test_error") or points(run, "val_top1")]
            if errors and not run["diverged"]:
                gains.append(errors[-1] - min(errors))
    for cell in mine:
        median = statistics.median(found(rows[cell["run"]], cell["metric"]) or [math.nan])
        figures = re.findall(r"[\d.]+", cell["paper"])  # "6.43 (6.61±0.16)": of the lowest of 5 runs take the mean
        difference = median - float(figures["lowest" in cell["row"]]) if figures else 0
        label = cell["row"] + (f", {cell['column']}" if "top" in cell["metric"] else "")
        if abs(difference) > 0.5:
            away.append(f"{label} ({difference:+.2f})" if difference < math.inf else f"{label} (diverged)")
        elif cell["paper"] == "fail" and median <= 20:
            away.append(f"{label} ({median:.2f} instead of a failure)")
    lines = markdown("| runs | n | precision | hours each | peak memory, GB |", lines)
    if gains:
        gain = f"{statistics.mean(gains):.2f} % above the lowest of a run's test evaluations"
        lines += ["", f"The last iterate, which is what the table shows, is {gain} (mean of {len(gains)} runs)."]
    if away:
        lines += ["", "More than 0.5 % from the paper: " + "; ".join(away) + "."]
    return lines


# Check-points of the curves, paper.md's: where does a run leave the paper's?

ITERATIONS = (10_000, 20_000, 30_000, 36_000, 46_000, 56_000, 64_000)
WINDOWS = ((1_000, 3_000), (9_000, 11_000), (29_000, 31_000), (35_000, 37_000), (45_000, 47_000), (62_000, 66_000))


def paper_error_at(curve, iteration):
    """The test error of a paper's curve at an iteration: the mean within 1,500 of it. Above 20 % there is no curve."""
    near = [y for x, y in curve if abs(x - iteration) <= 1_500]
    return f"{statistics.mean(near):.2f}" if near else ">20"


def paper_loss_in(curve, window):
    """The mean training loss of a paper's curve in a window of iterations; above 2 it is cut off."""
    values = [y for x, y in curve if window[0] <= x <= window[1]]
    return f"{statistics.mean(values):.4f}" if values else (">2" if window[0] < 5_000 else "<0.002")


def checkpoints(name, curves, rows):
    """Test error and training loss at the check-points of a figure's curves, the paper's and our first run's."""
    header = [f"{t // 1000}k" for t in ITERATIONS] + [f"{a // 1000}-{b // 1000}k" for a, b in WINDOWS]
    lines = []
    networks = {}
    for panel in FIGURES[name][2]:
        networks |= curves[name + panel]
    for (network, row), theirs in networks.items():
        error, loss = theirs["test_error"], theirs["train_loss"]
        values = [paper_error_at(error, t) for t in ITERATIONS] + [paper_loss_in(loss, window) for window in WINDOWS]
        lines.append((f"{network}, paper", *values))
        full = [run for run in rows[row] if run.get("iterations") == 64_000]
        if full:
            errors, losses = (dict(points(full[0], quantity)) for quantity in ("test_error", "train_loss"))
            values = [f"{errors[t]:.2f}" if t in errors else "" for t in ITERATIONS]
            for a, b in WINDOWS:  # a row's loss is the mean over the 2,000 iterations up to it
                ends = [t for t in losses if a <= t <= b + 1_000]
                same = paper_loss_in(loss, (min(ends) - 2_000, max(ends))) if ends else ""
                values.append(f"{statistics.mean(losses[t] for t in ends):.4f} ({same})" if ends else "")
            lines.append((f"ours ({full[0]['folder'].name})", *values))
    return markdown("| | " + " | ".join(header) + " |", lines)


# Figures


def points(run, quantity):
    return [(row["iteration"], row[quantity]) for row in run["log"] if quantity in row]


def plot(axes, curve, **style):
    axes.plot([x for x, _ in curve], [y for _, y in curve], **style)


def save(figure, path, *suffixes):
    figure.tight_layout()
    for suffix in suffixes:
        figure.savefig(f"{path}.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else {})
    plt.close(figure)


def draw_figure(name, curves, rows):
    """One figure of the papers: their curves thin and pale, ours strong, in the same colours and axes."""
    kind, title, panels = FIGURES[name]
    down, across = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure, grid = plt.subplots(down, across, figsize=(4.4 * across, 3.6 * down), squeeze=False)
    for axes, (panel, caption) in zip(grid.flat, panels.items(), strict=True):
        networks = curves[name + panel]
        right = axes.twinx() if kind == LOSS else axes
        for i, ((network, row), theirs) in enumerate(networks.items()):
            runs = rows[row]
            for quantity in sorted(theirs, key=lambda quantity: not quantity.startswith("train")):  # that one below
                where, line = (axes, "--") if quantity.startswith("train") else (right, "-")
                plot(where, theirs[quantity], color=f"C{i}", linestyle=line, linewidth=0.8, alpha=0.5)
                for run in runs:
                    curve = points(run, "val_top1" if quantity == "val_error" else quantity)
                    plot(where, curve, color=f"C{i}", linestyle=line, linewidth=1.8)
            right.plot([], [], color=f"C{i}", label=f"{network} ({f'ours: n = {len(runs)}' if runs else 'paper'})")
        start = 34_000 if (name, panel) == ("1-fig6", "right") else 0  # as the paper cuts it
        end, every = {LOSS: (68_000, 10_000), ERROR: (64_000, 10_000), IMAGENET: (600_000, 100_000)}[kind]
        ticks = range(math.ceil(start / every) * every, end, every)
        axes.set(title=f"{title} {caption}".strip(), xlim=(start, end), xlabel="iterations (1e4)")
        axes.set_xticks(ticks, [str(tick // 10_000) for tick in ticks])
        if kind == LOSS:
            axes.set(yscale="log", ylim=(0.002, 2), ylabel="training loss (dashed)")
            right.set(ylim=(0, 20), ylabel="test error, % (solid)")
        else:
            axes.set(ylim=(20, 60) if kind == IMAGENET else (0, 20))
            axes.set(ylabel=f"{caption}, %" if "error" in caption else "error, % (dashed: training)")
        axes.title.set_fontsize(10)
        right.legend(fontsize=7, loc="upper right", framealpha=0.6)
    save(figure, RESULTS / name, "svg", "png")


def draw_responses(curves, rows):
    """[1] Fig. 7: the paper's dots pale, ours as lines, in layer order and sorted."""
    figure, grid = plt.subplots(2, 1, figsize=(7, 6))
    for axes, half in zip(grid, ("top", "bottom"), strict=True):
        for i, ((network, row), theirs) in enumerate(curves[f"1-fig7{half}"].items()):
            plot(axes, theirs["response_std"], color=f"C{i}", linewidth=0.8, alpha=0.5)
            measured = [run["responses"] for run in rows[row] if run["responses"]]
            for stds in measured:
                stds = sorted(stds, reverse=True) if half == "bottom" else stds
                axes.plot(range(1, len(stds) + 1), stds, color=f"C{i}", linewidth=1.8)
            note = f"ours: n = {len(measured)}" if measured else "paper"
            axes.plot([], [], color=f"C{i}", label=f"{network} ({note})")
        axes.set(ylabel="std", xlabel="layer" + (", sorted by magnitude" if half == "bottom" else ""), ylim=(0, 3.6))
        axes.legend(fontsize=7, ncols=2)
    grid[0].set_title("[1] Fig. 7: std of the 3x3 layers' responses, after BN", fontsize=10)
    save(figure, RESULTS / "1-fig7", "svg", "png")


def draw_short(rows):
    """The short schedule's test errors beside the papers' ResNet-110, in the papers' order."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
    labels, papers, runs = zip(*short_rows(rows), strict=True)
    for i, paper in enumerate(papers):
        if paper == "fail":
            left.text(20, i, "fail (> 20 %)", ha="right", va="center", fontsize=8, color="C3")
        else:
            left.plot(float(paper), i, "o", color="C7")
        errors = [error for error in found(runs[i], "test error %") if error < math.inf]
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
    save(figure, RESULTS / "short", "svg", "png")


def draw_run(folder):
    """curve.png into a run's folder, finished or not: training loss dashed at the left, errors in % at the right."""
    run = {"log": read_log(folder)}
    figure, axes = plt.subplots(figsize=(6, 4))
    right = axes.twinx()
    plot(axes, points(run, "train_loss"), color="C7", linestyle="--", marker=".")
    for quantity, color in (("test_error", "C0"), ("val_error", "C1"), ("val_top1", "C0"), ("val_top5", "C2")):
        if curve := points(run, quantity):
            plot(right, curve, color=color, marker=".", label=quantity.replace("_", " "))
    axes.set(yscale="log", xlabel="iterations", ylabel="training loss (dashed)", title=folder.name)
    right.set(ylabel="error, % (solid)")
    right.legend(fontsize=8)
    save(figure, folder / "curve", "png")
    return folder / "curve.png"


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
        raise ValueError("it holds no checkpoint")
    unit, classes = units.UNITS[config["unit"]], data.CLASSES[config["dataset"]]
    net = models.cifar_resnet(config["depth"], unit, classes, **config["unit_args"])
    net.load_state_dict(state["model"])
    stds, latest = [], None

    def hook(layer, inputs, output):
        nonlocal latest
        if isinstance(layer, torch.nn.BatchNorm2d):
            if inputs[0] is latest:  # the output of the last 3x3 layer
                stds[-1] = round(output.std().item(), 4)
        elif layer.kernel_size == (3, 3):
            stds.append(None)
            latest = output

    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.BatchNorm2d)):
            layer.register_forward_hook(hook)
    images = data.load_cifar(config["dataset"], config["data"], 1_000)[2]
    with torch.inference_mode():
        net.eval()((images - state["mean"]) / state["std"])
    if None in stds:
        raise ValueError(f"[1] Fig. 7 has BN right after each 3x3 layer, and {config['unit']} has it elsewhere")
    lines = ["layer,std", *(f"{i},{std}" for i, std in enumerate(stds, 1)), ""]
    (folder / "responses.csv").write_text("\n".join(lines))
    return folder / "responses.csv"


# The pages

START, END = "<!-- written by report.py -->", "<!-- end -->"


def with_headline(text, rows):
    """README.md's text with what is between the two marks made anew: the short schedule and the papers' nets so far."""
    lines = ["![test error of each unit](results/short.svg)", "", *short_table(rows), ""]
    nets = {}
    for cell in cells():
        if rows.get(cell["run"]) and cell["table"] not in ("open", "short"):
            label = cell["run"] + ("" if cell["metric"] == "test error %" else f", {cell['metric']}")
            nets.setdefault(cell["run"], (label, cell["paper"], beside(cell, rows)))
    if nets:
        lines += markdown("| the papers' nets, full schedule | paper | ours |", nets.values())
    else:
        lines.append("None of the papers' nets has been run on its full schedule of 64,000 iterations yet.")
    before, _, rest = text.partition(START)
    return "\n".join([before + START, *lines, END + rest.partition(END)[2]])


def page(curves, rows, others, problems):
    """results/README.md: paper/page.md with each {table} and {figure} filled in, then what is in none."""
    parts = {cell["table"]: table(cell["table"], rows) for cell in cells()}
    parts["short"] = [*short_table(rows), "", "![short schedule](short.svg)", "", *orderings(rows)]
    parts = {tag: [*lines, "", *runs_of(tag, rows)] for tag, lines in parts.items()}
    parts |= {name: checkpoints(name, curves, rows) for name, (kind, *_) in FIGURES.items() if kind == LOSS}
    text = (HERE / "paper" / "page.md").read_text()
    text = re.sub(r"\{(.+)\}", lambda match: "\n".join(parts[match[1]]), text)
    lines = []
    for run in others:
        name = run["folder"].relative_to(RESULTS).as_posix()
        settings = (str(run.get(key)) for key in ("dataset", "depth", "unit", "iterations"))
        lines.append((f"[{name}]({name})", *settings, ours([run], next(iter(run["values"]), ""))))
    if others:
        lines = markdown("| folder | dataset | depth | unit | iterations | test error, % |", lines)
        text += "\n".join(["\n## Other runs\n", *lines, ""])
    if problems:
        text += "\n".join(["\n## Not read\n", *(f"- {problem}" for problem in problems), ""])
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=pathlib.Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--responses", action="store_true", help="measure [1] Fig. 7 on the runs' checkpoints")
    args = parser.parse_args()
    if args.responses and not args.runs:
        parser.error("--responses needs the folder of a run")
    for folder in args.runs:
        try:
            print(measure_responses(folder) if args.responses else draw_run(folder))
        except Exception as error:  # a folder may hold anything
            problem = f"{type(error).__name__}: {error}"
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                name = pathlib.Path(error.filename).name
                problem = f"there is no {name} in it: a run in training writes one, the average of several has none"
            print(f"report.py: {folder}: {problem}", file=sys.stderr)
            return 2
    if args.runs:
        return 0
    rows, others, problems = read_runs(RESULTS)
    RESULTS.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "resnet"  # the same picture is the same file
    curves = paper_curves()
    for name in FIGURES:
        draw_figure(name, curves, rows)
    draw_responses(curves, rows)
    draw_short(rows)
    damaged = [problem for problem in problems if "not finished" not in problem]  # the others may be under way
    (RESULTS / "README.md").write_text(page(curves, rows, others, damaged))
    readme = HERE / "README.md"
    readme.write_text(with_headline(readme.read_text(), rows))
    print(*problems, f"wrote {RESULTS / 'README.md'}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
