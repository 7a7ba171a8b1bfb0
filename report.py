"""The papers' tables and figures, their numbers beside ours, from the run folders under results/.

    python report.py                        # results/README.md, its figures, and the results in README.md
    python report.py RUN                    # the curve of any run, finished or not: curve.png in its folder
    python report.py RUN RUN ...            # the curves of several in one picture: curves.png in the current folder

A table shows the finished runs that count, by the rules of docs/imagenet.md ("Which runs count"), as `objection` has
them. Nothing is measured here.
"""

import argparse
import csv
import functools
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"

# Each figure's kind, its title, and its panels: their names in paper/ and their captions
LOSS, ERROR, IMAGENET = "loss and error", "error", "ImageNet error"
FIGURES = {
    "2-fig1": (LOSS, "[2] Fig. 1 right: ResNet-1001", {"": ""}),
    "2-fig3": (LOSS, "[2] Fig. 3: shortcuts", {"a": "a", "b": "b", "c": "c", "d": "d"}),
    "2-fig6": (LOSS, "[2] Fig. 6: the order of activations", {"left": "left", "right": "right"}),
    "1-fig1": (ERROR, "[1] Fig. 1: plain nets", {"left": "training error", "right": "test error"}),
    "1-fig6": (ERROR, "[1] Fig. 6: plain and residual nets", {"left": "left", "middle": "middle", "right": "right"}),
    "1-fig4": (IMAGENET, "[1] Fig. 4: ImageNet", {"left": "left", "right": "right"}),
}

# The tables of the short schedule, and the pairs of rows whose difference the page states
SHORT = {
    "short": {},
    "short-long": {
        "from original to pre-activation, 1-layer skips": ("original", "pre-activation, 1-layer skip"),
        "from exclusive gating to a 1x1 conv shortcut": ("exclusive gating, b_g = -6", "1x1 conv shortcut"),
        "... to pre-activation, 1-layer skips": ("exclusive gating, b_g = -6", "pre-activation, 1-layer skip"),
    },
    "short-depth": {
        "plain nets, from 20 to 56 layers": ("plain-20", "plain-56"),
        "residual nets, from 20 to 56 layers": ("ResNet-20", "ResNet-56"),
    },
    "short-1001": {
        "164 layers, from original to full pre-activation": ("ResNet-164, original", "ResNet-164, full pre-activation"),
        "1,001 layers, the same": ("ResNet-1001, original", "ResNet-1001, full pre-activation"),
    },
}


# Reading

METRICS = {"test_error": "test error %", "val_top1": "1-crop top-1", "val_top5": "1-crop top-5"}
METRICS |= {"map_11point": "mAP (11-point)", "map_area": "mAP (area)", "train_loss": "training loss"}
COCO = {"map_50": "mAP@.5", "map_50_95": "mAP@[.5,.95]"}
METRICS |= COCO
EVALUATED = {"top1": "top-1", "top5": "top-5"} | COCO  # no top-5 where there are fewer than 6 classes
PRECISIONS = ["float32", "tf32", "bf16", "fp16"]  # when a row has runs of several, its cells show the first

# What a run may have besides its row's command
MACHINE = "--data --workers --device --precision --timeout --checkpoint-seconds --compile".split()
# The whole data sets: "images" as config.json has them (0 stands for all), and in each evaluation
IMAGES = {"imagenet": (1_281_167, 50_000), "voc": (0, 4_952), "coco": (0, 40_504)}


def read_run(folder):
    """A run's result, its "config" and "log", its "responses", its "values": errors and mAP in % by the metrics of
    paper/tables.csv, and "training loss"; all infinite if the run diverged; its "evaluated": how many images by test;
    and what `objection` says of it. Raises ValueError saying what is wrong with the folder."""
    try:
        run = json.loads((folder / "result.json").read_text("utf-8"))
        average = "runs" in run  # of several nets: it has no log, and evaluations are its only values
        values = {metric: run[name] for name, metric in METRICS.items() if name in run}
        if (
            not {*run["precision"].split(", ")} <= {*PRECISIONS}
            or "dataset" not in run
            or (len(values) < 2 and not average)
        ):
            raise ValueError("result.json lacks a known precision, the data set, an error or the training loss")
        run["config"] = {} if average else json.loads((folder / "config.json").read_text("utf-8"))
        others = {folder / "result.json", folder / "config.json", *folder.glob("detections-*.json")}
        run["evaluated"] = {}
        for path in sorted({*folder.glob("*.json")} - others):
            evaluation = json.loads(path.read_text("utf-8"))
            if average or (evaluation["iterations"] == [run["iterations"]] and not evaluation.get("recompute_bn")):
                values |= {f"{path.stem} {EVALUATED[key]}": evaluation[key] for key in EVALUATED if key in evaluation}
                run["evaluated"][path.stem] = evaluation["images"]
        numbers = [run["seconds"], run["peak_memory"], *(() if run["diverged"] else values.values())]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"a number is not finite: {numbers}")
        run["values"] = dict.fromkeys(values, math.inf) if run["diverged"] else values
        optional = average or run["diverged"]  # a run may diverge before the first row of its log
        run["log"] = [] if optional and not (folder / "log.csv").exists() else read_log(folder)
        path = folder / "responses.csv"
        run["responses"] = [float(row["std"]) for row in read_csv(path)] if path.exists() else []
        run["folder"] = folder
        return run | {"objection": objection(run)}
    except FileNotFoundError as error:
        raise ValueError(f"cannot be read: there is no {pathlib.Path(error.filename).name}") from None
    except Exception as error:  # a damaged file may raise anything; it must not cost the page
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from None


@functools.cache
def commands():
    """{a row's name: the words of its first seed's command}, as LIST=1 prints them."""
    variables = {"PATH": os.environ.get("PATH", os.defpath), "LIST": "1", "SEEDS": "1"}
    script = ["bash", HERE / "run_all.sh"]
    listed = subprocess.run(script, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout
    lines = [shlex.split(line, comments=True) for line in listed.splitlines()]
    return {line[0].removesuffix("/seed1"): line[3:] for line in lines if line}


def flags_of(words):
    """{flag: its values} of a command, without those of MACHINE; what stands before the first flag is the script's."""
    flag = "script"
    flags = {flag: []}
    for word in words:
        if word.startswith("--"):
            flag, *word = word.split("=", 1)
            flags.setdefault(flag, []).extend(word)
        else:
            flags[flag].append(word)
    return {flag: values for flag, values in flags.items() if flag not in MACHINE}


def objection(run):
    """Why a run does not count for its row; None if it does."""
    name, _, seed = run["folder"].relative_to(RESULTS).as_posix().rpartition("/seed")
    if name not in commands() or not seed.isdecimal():
        return "run_all.sh has no row of this name"
    flags, (images, evaluated) = flags_of(commands()[name]), IMAGES.get(name.split("/")[0], (0, None))
    if "," in run["precision"]:
        return f"its nets are of several precisions ({run['precision']})"
    if "runs" in run:
        if run["runs"] != flags.get("--evaluate") or run["recompute_bn"]:
            return "it is not the average that its row's command makes"
        for net, iterations in zip(run["runs"], run["iterations"], strict=True):
            try:
                other = read_run(HERE / net)
                against = other["objection"] or (other["iterations"] != iterations and "it had not finished")
            except ValueError as error:
                against = error
            if against:
                return f"one of its nets does not count ({net}: {against})"
    else:
        environment = run["config"].get("environment", {})
        flags |= {"--seed": [seed], "--out": [f"results/{name}/seed{seed}"]}
        given = flags_of(shlex.split(environment.get("command", "")))
        differing = sorted(flag for flag in flags | given if flags.get(flag) != given.get(flag))
        if differing:
            return f"its command is not its row's, as LIST=1 prints it (differing: {', '.join(differing)})"
        if environment.get("modified") is not False:
            return "its config.json does not say that its code was a git clone's, and unchanged"
        if run["config"].get("images", 0) != images:
            return f"it was trained on {run['config'].get('images')} images, not on the whole data set's {images}"
    for test, number in run["evaluated"].items():
        if number != evaluated:
            return f"{test}.json is of {number} images, not of the whole data set's {evaluated}"


def read_log(folder):
    """The rows of a run's log.csv, {column: number} without empty cells: not every row has a test error. Raises
    ValueError when there are none, or one lacks what every row has."""
    log = [{name: float(cell) for name, cell in row.items() if cell} for row in read_csv(folder / "log.csv")]
    complete = [{"iteration", "train_loss"} <= row.keys() and all(map(math.isfinite, row.values())) for row in log]
    if not log or not all(complete):
        raise ValueError("log.csv has no rows, or one without an iteration, a training loss or finite numbers")
    return log


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_runs(root):
    """({row's name: its runs}, other runs, names of folders without a result, problems). All runs of a row have one
    precision, the first of PRECISIONS that any run has; the others' "objection" says so."""
    rows, others, unfinished, problems = {cell["run"]: [] for cell in cells() if cell["run"]}, [], [], []
    folders = {path.parent for name in ("config.json", "log.csv", "result.json") for path in root.rglob(name)}
    for folder in sorted(folders):
        name = folder.relative_to(root).as_posix()
        try:
            if not (folder / "result.json").exists():
                unfinished.append(name)
                continue
            run = read_run(folder)
        except ValueError as error:
            problems.append(f"{name}: {error}")
        else:
            (others if run["objection"] else rows[name.rpartition("/")[0]]).append(run)
    for name, runs in rows.items():
        first = min((run["precision"] for run in runs), key=PRECISIONS.index, default=None)
        others += [run | {"objection": f"its row has runs in {first}"} for run in runs if run["precision"] != first]
        rows[name] = [run for run in runs if run["precision"] == first]
    return rows, others, unfinished, problems


def cells(tag=None):
    """The cells of the papers' tables, or of the table with this tag: dicts of table (the tag), row, column, paper (the
    paper's number), metric and run (the name of our row)."""
    return [cell for cell in read_csv(HERE / "paper" / "tables.csv") if tag in (None, cell["table"])]


def paper_curves():
    """{panel: {(network, our row): {quantity: [(x, value), ...]}}} of both papers. Panels are named like "2-fig3a", the
    networks are in the order of paper/networks.csv, and x is the iteration, or the layer in [1] Fig. 7."""
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
    """The lines of a Markdown table with this header line and rows of cells."""
    return [header, "|---" * (header.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def values_of(runs, metric):
    """The values of a metric, of the runs that have it."""
    return [run["values"][metric] for run in runs if metric in run["values"]]


def ours(runs, metric="test error %", fails=False):
    """Our runs as a cell: median (mean ± std, n, and a precision that is not the papers'). With `fails`, a median above
    20 % is "fail", as the papers say."""
    values = values_of(runs, metric)
    if not values:
        return ""
    finite = [value for value in values if value < math.inf]
    median = statistics.median(values)
    text, notes = f"{median:.2f}" if median < math.inf else "diverged", []
    if fails and median > 20:
        text, notes = "fail", [text]
    if len(finite) > 1:
        notes.append(f"{statistics.mean(finite):.2f} ± {statistics.stdev(finite):.2f}")
    notes.append(f"n = {len(values)}")
    if len(finite) < len(values):
        notes.append(f"{len(values) - len(finite)} diverged")
    return f"{text} ({', '.join([*notes, *precision_of(runs)])})"


def precision_of(runs):
    """The precision of a row's runs, as a list that is empty where it is the papers'."""
    name = runs[0]["precision"]
    return [] if name == "float32" else [name]


def ours_beside(cell, rows):
    """Our runs, as they stand beside a cell of the papers' tables."""
    fails = cell["metric"] == "test error %" and cell["paper"] in ("fail", "-")
    return ours(rows.get(cell["run"], []), cell["metric"], fails)


def table(tag, rows):
    """One of the papers' tables as Markdown, with our runs beside each of its columns."""
    pairs = {(cell["row"], cell["column"]): (cell["paper"], ours_beside(cell, rows)) for cell in cells(tag)}
    labels, columns = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    lines = [[label, *(c for column in columns for c in pairs.get((label, column), ("", "")))] for label in labels]
    return markdown("| |" + "".join(f" {column} | ours |" for column in columns), lines)


def short_rows(rows, tag="short"):
    """(label, the paper's number, our runs) of each row on the short schedule, in the order of paper/tables.csv."""
    return [(cell["row"], cell["paper"], rows.get(cell["run"], [])) for cell in cells(tag)]


def short_table(rows, tag="short"):
    """A table of the short schedule: the papers' test errors, and our test errors and median training losses."""
    lines = []
    for label, paper, runs in short_rows(rows, tag):
        losses = [loss for loss in values_of(runs, "training loss") if loss < math.inf]
        lines.append((label, paper, ours(runs), f"{statistics.median(losses):.2f}" if losses else ""))
    first, column = "unit" if tag in ("short", "short-long") else "net", cells(tag)[0]["column"]
    return markdown(f"| {first} | {column} | test error, % | training loss |", lines)


def short_differences(rows, tag):
    """How our medians differ between the pairs of rows in SHORT, beside the paper's difference, as a Markdown list."""
    nets, lines = {label: (paper, runs) for label, paper, runs in short_rows(rows, tag)}, []
    for name, labels in SHORT[tag].items():
        papers, runs = zip(*(nets[label] for label in labels), strict=True)
        if all(runs):
            medians = [[statistics.median(values_of(r, m)) for r in runs] for m in ("test error %", "training loss")]
            error, loss = (after - before for before, after in medians)
            paper = f"{float(papers[1]) - float(papers[0]):+.2f}"
            seeds = " and ".join(str(len(r)) for r in runs)
            change = f"test error {error:+.2f} points (the paper: {paper})"
            lines.append(f"- {name}: {change}, training loss {loss:+.2f} (n = {seeds})")
    return ["", *lines] if lines else []


def compare_orders(rows):
    """Compares the units' order by test error on the short schedule with the papers', pair by pair: ✓ the same, ✗ the
    opposite, ? cannot be told. Returns (the table's rows, the standard deviation s, the number of rows that s is from),
    or None until a row has two runs."""
    short = [(label, paper, values_of(runs, "test error %")) for label, paper, runs in short_rows(rows)]
    short = [row for row in short if row[-1]]
    several = [errors for _, _, errors in short if len(errors) > 1 and max(errors) < math.inf]
    if not several:
        return None
    squares = sum(statistics.variance(errors) * (len(errors) - 1) for errors in several)
    s = math.sqrt(squares / sum(len(errors) - 1 for errors in several))
    lines = []
    for i, (label, paper, errors) in enumerate(short, 1):
        verdicts = []
        for _, higher, others in short[i:]:
            difference = statistics.mean(others) - statistics.mean(errors)
            enough = 2 * s * math.sqrt(1 / len(errors) + 1 / len(others))
            verdict = "✓" if difference > enough else "✗" if difference < -enough else "?"
            verdicts.append("" if higher == paper else verdict)  # the papers give no order of two failures
        lines.append([f"{i} {label}", str(len(errors)), *[""] * i, *verdicts])
    return lines, s, len(several)


def short_note(rows):
    """The line above the short schedule's table: what it is, and how many of the papers' orders it shows."""
    text = "1,600 iterations instead of 64,000, so compare the order, not the errors"
    if compared := compare_orders(rows):
        yes, no, unsure = (sum(line.count(verdict) for line in compared[0]) for verdict in "✓✗?")
        text += f".\nOf {yes + no + unsure} pairs of units, {yes} are in the papers' order, {no} in the opposite one,\n"
        text += f"and {unsure} are too close to tell"
    return text + "."


def short_orders(rows):
    """The text and the table of what compare_orders finds, as Markdown."""
    compared = compare_orders(rows)
    if compared is None:
        return ["No row has two runs yet, so nobody can tell whether a difference is more than chance."]
    lines, s, n = compared
    three = ("full pre-activation", "original", "plain")
    losses = {label: values_of(runs, "training loss") for label, _, runs in short_rows(rows)}
    text = []
    if all(losses[label] for label in three):
        medians = [statistics.median(losses[label]) for label in three]
        numbers = ", ".join(f"{label} {median:.2f}" for label, median in zip(three, medians, strict=True))
        order = "the papers' order" if medians == sorted(medians) else "**not** the papers' order"
        text = [f"Median training loss: {numbers}. This is {order}.", ""]
    return [
        *text,
        "Below, ✓ marks a pair of units whose test errors are in the papers' order, ✗ one in the opposite order,",
        "and ? one that is too close to tell: the means of its n and m runs do not differ",
        f"by more than 2 s sqrt(1/n + 1/m). Here s = {s:.2f} points is the standard deviation of a row's runs, pooled",
        f"over the {n} rows that have two or more and taken to be the same for all. Of twenty pairs that do not",
        "differ, about one would still be marked ✓ or ✗. Two units that fail in the papers have no order.",
        "",
        *markdown("| lower in the papers | n |" + "".join(f" {i + 1} |" for i in range(len(lines))), lines),
    ]


def runs_of(tag, rows):
    """How a table's runs were made, which of them are far from the paper's numbers, and what selecting an iterate on
    the test set would have changed."""
    filled = [cell for cell in cells(tag) if rows.get(cell["run"])]
    if not filled:
        return ["No run yet."]
    lines, gains, far = [], [], []
    for name in dict.fromkeys(cell["run"] for cell in filled):
        runs = rows[name]
        hours = statistics.median(run["seconds"] for run in runs) / 3600
        memory = max(run["peak_memory"] for run in runs) / 1e9
        devices = ", ".join(dict.fromkeys(run["config"].get("environment", {}).get("device", "") for run in runs))
        made = (runs[0]["precision"], devices, f"{hours:.2f}", f"{memory:.2f}")
        lines.append((f"[{name}]({name})", str(len(runs)), *made))
        for run in runs:
            errors = [error for _, error in points(run, "test_error") or points(run, "val_top1")]
            if errors and not run["diverged"]:
                gains.append(errors[-1] - min(errors))
    for cell in filled if tag not in SHORT else ():
        median = statistics.median(values_of(rows[cell["run"]], cell["metric"]) or [math.nan])
        numbers = re.findall(r"[\d.]+", cell["paper"])  # of "6.43 (6.61±0.16)", the lowest of 5 runs, take the mean
        difference = median - float(numbers[1 if "lowest" in cell["row"] else 0]) if numbers else 0
        label = cell["row"] + (f", {cell['column']}" if re.search("top|@", cell["metric"]) else "")
        if abs(difference) > 0.5:
            far.append(f"{label} ({difference:+.2f})" if difference < math.inf else f"{label} (diverged)")
        elif cell["paper"] == "fail" and median <= 20:
            far.append(f"{label} ({median:.2f} instead of a failure)")
    lines = markdown("| runs | n | precision | began on | hours each | peak memory, GB |", lines)
    if gains:
        gain = f"{statistics.mean(gains):.2f} points above the lowest of a run's evaluations"
        gain += f", on average over {len(gains)} runs" if len(gains) > 1 else ""
        lines += ["", f"The table shows the error after the last iteration. It is {gain}."]
    if far:
        lines += ["", "More than 0.5 points from the paper: " + "; ".join(far) + "."]
    return lines


# Figures


def points(run, quantity):
    """[(iteration, value), ...] of one column of a run's log."""
    return [(row["iteration"], row[quantity]) for row in run["log"] if quantity in row]


def made_by(runs):
    """What a legend says of a net: "ours: n = 1, bf16", or "paper" where there are no runs."""
    return ", ".join([f"ours: n = {len(runs)}", *precision_of(runs)]) if runs else "paper"


def plot(axes, curve, **style):
    axes.plot([x for x, _ in curve], [y for _, y in curve], **style)


def save(figure, path, *suffixes):
    figure.tight_layout()
    for suffix in suffixes:
        figure.savefig(f"{path}.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else {})
    plt.close(figure)


def draw_figure(name, curves, rows):
    """One of the papers' figures: their curves thin and pale, ours thick, in the same colours on the same axes."""
    kind, title, panels = FIGURES[name]
    down, across = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure, grid = plt.subplots(down, across, figsize=(4.4 * across, 3.6 * down), squeeze=False)
    for axes, (panel, caption) in zip(grid.flat, panels.items(), strict=True):
        networks = curves[name + panel]
        right = axes.twinx() if kind == LOSS else axes
        for i, ((network, row), theirs) in enumerate(networks.items()):
            runs = rows[row]
            for quantity in sorted(theirs, key=lambda quantity: not quantity.startswith("train")):  # training below
                side, line = (axes, "--") if quantity.startswith("train") else (right, "-")
                plot(side, theirs[quantity], color=f"C{i}", linestyle=line, linewidth=0.8, alpha=0.5)
                for run in runs:
                    curve = points(run, "val_top1" if quantity == "val_error" else quantity)
                    plot(side, curve, color=f"C{i}", linestyle=line, linewidth=1.8)
            right.plot([], [], color=f"C{i}", label=f"{network} ({made_by(runs)})")
        start = 34_000 if (name, panel) == ("1-fig6", "right") else 0  # where the paper begins it
        end, every = {LOSS: (68_000, 10_000), ERROR: (64_000, 10_000), IMAGENET: (600_000, 100_000)}[kind]
        ticks = range(math.ceil(start / every) * every, end, every)
        axes.set(title=f"{title} ({caption})" if caption else title, xlim=(start, end), xlabel="iterations (1e4)")
        axes.set_xticks(ticks, [str(tick // 10_000) for tick in ticks])
        if kind == LOSS:
            axes.set(yscale="log", ylim=(0.002, 2), ylabel="training loss (dashed)")
            right.set(ylim=(0, 20), ylabel="test error, % (solid)")
        else:
            axes.set(ylim=(20, 60) if kind == IMAGENET else (0, 20))
            axes.set(ylabel=f"{caption}, %" if "error" in caption else "error, % (dashed: training)")
        axes.title.set_fontsize(10)
        place = None if kind == ERROR else "upper right"  # None: where it covers the least
        right.legend(fontsize=7, loc=place, framealpha=0.6)
    save(figure, RESULTS / name, "svg", "png")


def draw_responses(curves, rows):
    """[1] Fig. 7, by layer and sorted: the paper's curves thin and pale, ours thick."""
    figure, grid = plt.subplots(2, 1, figsize=(7, 6))
    for axes, half in zip(grid, ("top", "bottom"), strict=True):
        for i, ((network, row), theirs) in enumerate(curves[f"1-fig7{half}"].items()):
            plot(axes, theirs["response_std"], color=f"C{i}", linewidth=0.8, alpha=0.5)
            measured = [run for run in rows[row] if run["responses"]]
            for run in measured:
                stds = sorted(run["responses"], reverse=True) if half == "bottom" else run["responses"]
                axes.plot(range(1, len(stds) + 1), stds, color=f"C{i}", linewidth=1.8)
            axes.plot([], [], color=f"C{i}", label=f"{network} ({made_by(measured)})")
        axes.set(ylabel="std", xlabel="layer" + (", sorted by magnitude" if half == "bottom" else ""), ylim=(0, 3.6))
        axes.legend(fontsize=7, ncols=2)
    grid[0].set_title("[1] Fig. 7: std of the 3x3 layers' responses, after BN", fontsize=10)
    save(figure, RESULTS / "1-fig7", "svg", "png")


def draw_short(rows):
    """The short schedule's test errors beside those of the papers' ResNet-110, in the papers' order."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
    labels, papers, runs = zip(*short_rows(rows), strict=True)
    for i, paper in enumerate(papers):
        if paper == "fail":
            left.text(20, i, "fail (> 20 %)", ha="right", va="center", fontsize=8, color="C3")
        else:
            left.plot(float(paper), i, "o", color="C7")
        errors = [error for error in values_of(runs[i], "test error %") if error < math.inf]
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


def draw_short_depth(rows):
    """Plain and residual nets by depth: the paper's test errors, then ours and our training losses with medians."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 3.8))
    for i, kind in enumerate(("plain", "ResNet")):
        nets = [(int(label.split("-")[1]), *net) for label, *net in short_rows(rows, "short-depth") if kind in label]
        plot(grid[0], [(depth, float(paper)) for depth, paper, _ in nets], color=f"C{i}", marker="o", label=kind)
        for axes, metric in zip(grid[1:], ("test error %", "training loss"), strict=True):
            curve = [(depth, [v for v in values_of(runs, metric) if v < math.inf]) for depth, _, runs in nets]
            plot(
                axes,
                [(d, v) for d, values in curve for v in values],
                color=f"C{i}",
                marker="o",
                linestyle="",
                alpha=0.4,
            )
            plot(axes, [(d, statistics.median(values)) for d, values in curve if values], color=f"C{i}", marker="_")
    titles = ("[1]: 64,000 iterations, of 128 images", *["here: 1,600 iterations, of 32 images"] * 2)
    for axes, title, label in zip(grid, titles, ("test error, %", "test error, %", "training loss"), strict=True):
        axes.set(xlabel="layers", ylabel=label, xticks=(20, 32, 44, 56), xlim=(17, 59))
        axes.set_title(title, fontsize=10)
    grid[0].legend(fontsize=8, loc="upper left")
    save(figure, RESULTS / "short-depth", "svg", "png")


def draw_short_1001(curves, rows):
    """ResNet-164 and -1001, original and pre-activation: the beginning of the paper's training loss, and ours."""
    figure, grid = plt.subplots(1, 2, figsize=(8.5, 3.8))
    for (network, row), theirs in (curves["2-fig1"] | curves["2-fig6right"]).items():
        style = {"color": "C1" if "pre-activation" in network else "C0", "linewidth": 1.8 if "1001" in network else 0.9}
        plot(grid[0], [(x, y) for x, y in theirs["train_loss"] if x <= 10_000], label=network, **style)
        for run in rows[row.replace("cifar10", "short")]:
            plot(grid[1], points(run, "train_loss"), **style, marker=".")
    grid[1].set_ylim(1, 3.5)  # ResNet-1001 with the original unit begins at 10
    titles = ("[2]: the first 10,000 iterations, of 128 images", "here: 1,600 iterations, of 32 images")
    for axes, title in zip(grid, titles, strict=True):
        axes.set(xlabel="iterations", ylabel="training loss")
        axes.set_title(title, fontsize=10)
    grid[0].legend(fontsize=8)
    save(figure, RESULTS / "short-1001", "svg", "png")


def draw_runs(folders, logs):
    """The errors in %, top-5 error apart, and the training loss of runs, finished or not. Of one it is curve.png in its
    folder; of several curves.png in the current folder, with a colour for each run. Returns the path."""
    names = [os.fsencode("/".join(folder.resolve().parts[-2:])).decode("utf-8", "replace") for folder in folders]
    runs = [{"log": log} for log in logs]
    error = {"train_error": ("training", "C7"), "test_error": ("test", "C0"), "val_error": ("validation", "C1")}
    panels = {"error, %": error | {"val_top1": ("validation, top-1", "C0")}}
    coco = {"map_50": ("test, @.5", "C0"), "map_50_95": ("test, @[.5,.95]", "C1")}
    panels |= {"mAP, %": {"map_11point": ("test, 11-point", "C0"), "map_area": ("test, area", "C1")} | coco}
    panels |= {"top-5 error, %": {"val_top5": ("validation, top-5", "C2")}, "loss": {"train_loss": ("training", "C7")}}
    panels = {label: lines for label, lines in panels.items() if any(points(run, q) for run in runs for q in lines)}
    height = max(2.4, 0.4 * len(runs))
    figure, grid = plt.subplots(len(panels), figsize=(7.5, 1 + height * len(panels)), sharex=True, squeeze=False)
    for axes, (label, lines) in zip(grid.flat, panels.items(), strict=True):
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            for quantity, (kind, color) in lines.items():
                if curve := points(run, quantity):
                    line = "--" if kind == "training" else ":" if runs[1:] and color == "C1" else "-"
                    style = {"color": plt.cm.turbo((i + 0.5) / len(runs)) if runs[1:] else color, "linestyle": line}
                    style |= {"label": f"{name}, {kind}" if runs[1:] else kind, "marker": "."}
                    plot(axes, curve, **style)
        axes.set(ylabel=label, **({"yscale": "log"} if label == "loss" else {"ylim": (0, None)}))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    grid[-1, 0].set(xlabel="iterations")
    if not runs[1:]:
        grid[0, 0].set_title(names[0], fontsize=10, parse_math=False)
    path = pathlib.Path("curves") if runs[1:] else folders[0] / "curve"
    with plt.rc_context({"axes.formatter.min_exponent": 4}):  # 0.02, not 2 x 10^-2
        save(figure, path, "png")
    return path.with_suffix(".png")


# The pages

START, END = "<!-- written by report.py -->", "<!-- end -->"


def with_headline(text, rows):
    """README.md's text with the part between the two marks written anew: the papers' nets, and the short schedule."""
    nets = {}
    for cell in cells():
        if rows.get(cell["run"]) and cell["table"] not in ("open", *SHORT):
            label = cell["run"] + ("" if cell["metric"] == "test error %" else f", {cell['metric']}")
            nets.setdefault(cell["run"], (label, cell["paper"], ours_beside(cell, rows)))
    lines = ["None of the papers' nets has been run on its full schedule of 64,000 iterations yet."]
    if nets:
        lines = markdown("| test error of the papers' nets, full schedule, % | paper | ours |", nets.values())
    lines += ["", "All units [in an evening on 2 CPU cores](results/README.md#the-short-schedule).", short_note(rows)]
    lines += ["", "![test error of each unit](results/short.svg)"]
    if differences := short_differences(rows, "short-1001"):
        link = "results/README.md#1001-layers-on-2-cpu-cores-2-fig-1-right"
        lines += ["", f"Full pre-activation [on the same schedule]({link}), too short for deep nets:", *differences]
    before, _, rest = text.partition(START)
    return "\n".join([before + START, *lines, END + rest.partition(END)[2]])


def page(rows, others, problems):
    """results/README.md: paper/page.md with every {table} filled in, then the runs that are in no table."""
    parts = {cell["table"]: table(cell["table"], rows) for cell in cells() if cell["table"] not in SHORT}
    for tag in SHORT:
        picture = [] if tag == "short-long" else ["", f"![{tag} schedule]({tag}.svg)"]
        parts[tag] = [*short_table(rows, tag), *picture, *short_differences(rows, tag)]
    parts["short"] = [short_note(rows), "", *parts["short"], "", *short_orders(rows)]
    parts = {tag: [*lines, "", *runs_of(tag, rows)] for tag, lines in parts.items()}
    text = (HERE / "paper" / "page.md").read_text("utf-8")
    text = re.sub(r"\{(.+)\}", lambda match: "\n".join(parts[match[1]]), text)
    lines = []
    for run in others:
        name = run["folder"].relative_to(RESULTS).as_posix()
        settings = (str(run.get(key)) for key in ("dataset", "depth", "unit", "iterations"))
        metric = next(iter(run["values"]), "")
        error = ours([run], metric) + (f", {metric}" if "mAP" in metric else "")
        lines.append((f"[{name}]({name})", *settings, error, run["objection"]))
    if others:
        lines = markdown("| folder | dataset | depth | unit | iterations | test error or mAP, % | reason |", lines)
        text += "\n".join(["\n## Other runs\n", *lines, ""])
    if problems:
        text += "\n".join(["\n## Not read\n", *(f"- {problem}" for problem in problems), ""])
    return text


def write_pages():
    """Draw every figure and write both pages. Returns what there is to say of the folders that are in no table."""
    rows, others, unfinished, problems = read_runs(RESULTS)
    RESULTS.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "resnet"  # the same picture is the same file
    curves = paper_curves()
    for name in FIGURES:
        draw_figure(name, curves, rows)
    draw_responses(curves, rows)
    draw_short(rows)
    draw_short_depth(rows)
    draw_short_1001(curves, rows)
    (RESULTS / "README.md").write_text(page(rows, others, problems), "utf-8")
    readme = HERE / "README.md"
    readme.write_text(with_headline(readme.read_text("utf-8"), rows), "utf-8")
    said = [f"{run['folder'].relative_to(RESULTS).as_posix()}: in no table, as {run['objection']}" for run in others]
    return problems + said + ["no result yet, so in no table: " + ", ".join(unfinished)] * bool(unfinished)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=pathlib.Path, metavar="RUN", help="folders of runs")
    args = parser.parse_args()
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders need not be text
    logs = []
    for folder in args.runs:
        problem = None
        try:
            if os.path.isfile(folder / "log.csv"):
                logs.append(read_log(folder))
            elif os.path.isdir(folder):
                problem = "it has no log.csv: a run begins it after 1/32 of its iterations; an average has none"
            else:
                problem = "there is no such folder"
        except Exception as error:  # a folder may hold anything
            problem = f"{type(error).__name__}: {error}"
        if problem:
            print(f"report.py: {folder}: {problem}", file=sys.stderr)
            return 2
    try:
        print(*([draw_runs(args.runs, logs)] if logs else [*write_pages(), f"wrote {RESULTS / 'README.md'}"]), sep="\n")
    except OSError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
