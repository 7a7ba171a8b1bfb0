"""The pages and pictures of report.py on every state that results/ can be in, and what is committed there."""

import csv
import json
import math
import pathlib
import re
import statistics
import sys

import pytest
import torch

import checkpoint
import cifar_train
import data
import models
import report
import units
from test_run_all import listed

HERE = pathlib.Path(__file__).parent
SAVE = report.save


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results/ and a README.md of its own, its pictures drawn but not saved; returns what makes a run."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "README.md").write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    (tmp_path / "paper").symlink_to(HERE / "paper")
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py"])

    def draw(figure, path, *_):
        curves = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata())]
        make.drawn[path.name] = len(curves)
        report.plt.close(figure)

    def make(name, error, lowest=None, **more):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        log = ["iteration,epoch,lr,train_loss,train_error,test_error,seconds"]
        for iteration, shown in ((2000, 50.0), (10000, lowest or error), (64000, error)):
            log.append(f"{iteration},1.0,0.1,0.5,20.0,{'' if shown is None else shown},1.0")
        (folder / "log.csv").write_text("\n".join(log) + "\n")
        (folder / "config.json").write_text("{}")
        result = {"dataset": "cifar10", "depth": 110, "unit": "basic", "precision": "float32", "iterations": 64_000}
        result |= {"test_error": error, "diverged": error is None, "train_loss": None if error is None else 0.5}
        result |= {"seconds": 7200, "peak_memory": 2e9} | more
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    monkeypatch.setattr(report, "save", draw)
    make.drawn = {}  # figure: its curves, the paper's and ours
    make.page = lambda: (tmp_path / "results" / "README.md").read_text()
    make.readme = lambda: (tmp_path / "README.md").read_text()
    return make


def test_empty_results(results, monkeypatch):
    monkeypatch.setattr(report, "save", SAVE)
    assert report.main() == 0
    assert "| original, Fig. 4(a) | 6.61 |  | 5.93 |  |" in results.page()
    tables = {cell["table"] for cell in report.cells()}
    assert "(n =" not in results.page() and results.page().count("No run yet.") == len(tables)
    pictures = {path.name for path in report.RESULTS.iterdir()}
    names = [*report.FIGURES, "1-fig7", "short"]
    assert pictures == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")} | {"README.md"}
    assert results.readme().startswith("before\n") and results.readme().endswith("after\n")
    assert "None of the papers' nets" in results.readme() and "old" not in results.readme()


def test_one_run(results):
    results("cifar10/110/seed3", 7, lowest=6.75)
    report.main()
    page = results.page()
    assert "| original, Fig. 2(a) | 6.61 | 7.00 (n = 1) |" in page  # the last iterate's
    assert "| [cifar10/110](cifar10/110) | 1 | float32 | 2.00 | 2.00 |" in page
    assert "is 0.25 % above the lowest of a run's test evaluations (mean of 1 runs)" in page
    ours = next(line for line in page.splitlines() if line.startswith("| ours (seed3)"))
    assert ours.split("|")[2].strip() == "6.75" and ours.split("|")[8].strip() == "7.00"
    assert ours.split("|")[9].strip().startswith("0.5000 (1.")  # the paper's loss from 0 to 2,000
    assert "| cifar10/110 | 6.61 | 7.00 (n = 1) |" in results.readme()
    assert "More than 0.5 %" not in page  # nor from [1]'s, whose 6.43 is the lowest of 5 runs
    assert results.drawn["2-fig3"] == 4 * (4 + 2) and results.drawn["2-fig1"] == 4


def test_five_seeds_and_a_diverged_one(results):
    errors = [6.1, 6.9, 6.3, 6.6, 6.4]
    for seed, error in enumerate(errors, 1):
        results(f"cifar10/110-preact/seed{seed}", error)
    for seed, error in enumerate((90.0, 62.5, None), 1):
        results(f"cifar10/110-dropout-shortcut/seed{seed}", error)
    results("cifar10/110-exclusive-gating-3/seed1", 9.0)
    (results("cifar10/164/seed1", None) / "log.csv").unlink()  # diverged before its first row
    report.main()
    page = results.page()
    mean, std = statistics.mean(errors), statistics.stdev(errors)
    assert f"| 6.37 | 6.40 ({mean:.2f} ± {std:.2f}, n = 5) |" in page
    failed = "| fail | fail (90.00, 76.25 ± 19.45, n = 3, 1 diverged) |"
    assert f"| dropout shortcut, Fig. 2(f): dropout 0.5 {failed}" in page
    assert "| 5.93 | diverged (n = 1, 1 diverged) |" in page
    assert "b_g = -3 (9.00 instead of a failure)" in page and "original, Fig. 4(a) (diverged)" in page
    nets = re.findall(r"^\| cifar10/(\S+) \|", results.readme(), re.MULTILINE)
    assert nets == ["110-exclusive-gating-3", "110-dropout-shortcut", "164", "110-preact"]  # as in the tables
    assert f"| cifar10/110-dropout-shortcut {failed}" in results.readme()


def test_imagenet_runs_and_averages(results):
    """A cell is of an evaluation of a run's last net as training left it; an average of nets is nothing but those."""
    more = {"dataset": "imagenet", "val_top1": 25.5, "val_top5": 8.5, "iterations": 600_000}
    folder = results("imagenet/34-A/seed1", 1.0, **more)
    for path, name in ((folder / "result.json", "x"), (folder / "log.csv", "val_top1")):
        path.write_text(path.read_text().replace("test_error", name))
    for protocol, top1, iterations, images in (
        ("10-crop", 24, 600_000, 0),
        ("1-crop-320", 2, 9, 0),
        ("1-crop", 2, 9, 1),
    ):
        made = {"top1": top1, "top5": 7.5, "iterations": [iterations], "recompute_bn": images}
        (folder / f"{protocol}.json").write_text(json.dumps(made))
    (folder / "multi-scale.json").write_text(json.dumps(made | {"iterations": [600_000]}))
    folder = results("imagenet/ensemble/seed1", 1.0, runs=["a", "b"])
    path = folder / "result.json"
    path.write_text(path.read_text().replace("test_error", "x").replace("train_loss", "y"))
    (folder / "log.csv").unlink()
    (folder / "multi-scale.json").write_text('{"top1": 19.5, "top5": 3.25}')
    report.main()
    page = results.page()
    assert "| ResNet-34 A | 25.03 | 24.00 (n = 1) | 7.76 | 7.50 (n = 1) |" in page
    assert "| ResNet, six nets | 3.57 | 3.25 (n = 1) |" in page and "2.00 (n" not in page
    assert "| imagenet/34-A, 10-crop top-1 | 25.03 | 24.00 (n = 1) |" in results.readme()
    values = report.read_run(report.RESULTS / "imagenet/34-A/seed1")["values"]
    assert results.drawn["1-fig4"] == 8 + 2
    assert values.keys() == {"1-crop top-1", "1-crop top-5", "training loss", "10-crop top-1", "10-crop top-5"}


def test_folders_that_cannot_be_read_are_named_and_skipped(results, capsys):
    good = results("cifar10/20/seed1", 8.7)
    contents = ['{"test_error": 8.', "[]", "{}", '{"diverged": false, "test_error": "x"}', "[" * 9999, ""]
    for seed, content in enumerate(contents, 10):
        (results(f"cifar10/20/seed{seed}", 1.0) / "result.json").write_text(content)
    odd = [{"precision": "float64"}, {"seconds": None}, {"train_loss": "0.1"}, {"test_error": math.nan}]
    for seed, more in enumerate([*odd, {"peak_memory": {}}], 20):
        results(f"cifar10/20/seed{seed}", 1.0, **more)
    for seed, name in enumerate(("dataset", "train_loss", "test_error"), 25):
        path = results(f"cifar10/20/seed{seed}", 1.0) / "result.json"
        path.write_text(path.read_text().replace(name, "x"))
    whole = (good / "log.csv").read_text()
    logs = [whole.replace("iteration", "x"), whole.replace("test_error", "x"), whole.replace("train_loss", "x"), ""]
    logs += [
        whole.replace("0.5", "nan"),
        whole.replace("0.5", ""),
        whole + "1,2,3,4,5,6,7,8,9\n",
        whole + "9" * 200_000,
    ]
    for seed, content in enumerate(logs, 30):
        (results(f"cifar10/20/seed{seed}", 1.0) / "log.csv").write_text(content)
    (results("cifar10/20/seed40", 1.0) / "log.csv").write_bytes(b"iteration,test_error\n1,\xff\xfe")
    for seed, name in enumerate(("responses.csv", "10-crop.json"), 41):
        (results(f"cifar10/20/seed{seed}", 1.0) / name).write_text("layer,std\n1,x\n")
    (results("cifar10/20/seed50", 1.0) / "result.json").unlink()
    (results("cifar10/20/seed51", 1.0) / "log.csv").unlink()
    assert report.main() == 0
    page, printed = results.page(), capsys.readouterr().out
    assert "| ResNet-20 | 8.75 | 8.70 (n = 1) |" in page
    for seed in [*range(10, 16), *range(20, 28), *range(30, 38), *range(40, 43)]:
        assert f"- cifar10/20/seed{seed}: " in page and f"cifar10/20/seed{seed}: cannot be read" in printed, seed
    assert "cifar10/20/seed50: not finished: there is no result.json" in printed
    assert "seed51: not finished" in printed and "not finished" not in page  # it may be under way
    assert "seed1:" not in printed


def test_other_runs_and_precisions_fill_no_cell(results):
    results("cifar10/110/seed1", 6.5)
    results("cifar10/110/seed2", 1.5, precision="bf16")
    results("cifar10/110/seed3", 1.5, dataset="synthetic")
    for name in ("cifar10/20-preact-800", "cifar10/110/again", "mine/seed1", "seed1"):
        results(name, 2.5)
    report.main()
    cells, _, others = results.page().partition("## Other runs")
    assert "| 6.50 (n = 1) |" in cells and "1.50" not in cells and "2.50" not in cells
    assert "| NIN | 8.81 |  |" in cells
    for name in ("cifar10/110/seed2", "cifar10/110/seed3", "cifar10/110/again", "mine/seed1", "seed1"):
        assert f"[{name}]({name})" in others


def test_orderings_of_the_short_schedule(results):
    """Runs of a row scatter by 1, so means of three must be 2 sqrt(2 / 3) = 1.63 apart, of three and one 2.31."""
    report.main()
    assert "No row has two runs yet" in results.page()
    errors = {"preact": 40, "": 41.7, "relu-preact": 41.6, "bn-after-add": 45, "conv-shortcut": 43.3, "plain": 43.2}
    for name, error in errors.items():
        for seed in (1, 2, 3):
            results(f"short/38{'-' * bool(name)}{name}/seed{seed}", error + seed)
    results("short/38-shortcut-gating-6/seed1", 45.9)
    results("short/38-dropout-shortcut/seed1", None)
    report.main()
    page = results.page()
    assert "Of 27 pairs of units that the papers order by test error, these runs confirm 14 (✓),\n" in page
    assert "contradict 2 (✗) and cannot tell 11 (?), at this schedule" in page
    assert "s = 1.00 %" in page and "over the 6 rows with two or more" in page
    for line in (
        "| lower in the papers | n | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |",
        "| 1 full pre-activation | 3 |  | ✓ | ? | ✓ | ✓ | ✓ | ✓ | ✓ |",
        "| 2 original | 3 |  |  | ? | ? | ✓ | ? | ✓ | ? |",
        "| 5 BN after addition | 3 |  |  |  |  |  | ✗ | ✓ | ✗ |",
        "| 7 dropout shortcut | 1 |  |  |  |  |  |  |  |  |",
    ):
        assert line in page, line
    assert "full pre-activation 0.50, original 0.50, plain 0.50: the papers' order." in page


def test_the_short_rows_are_in_the_papers_order():
    figures = [math.inf if paper == "fail" else float(paper) for _, paper, _ in report.short_rows({})]
    assert figures == sorted(figures) and len(figures) == 16


def test_curve_of_any_run(results, monkeypatch, capsys):
    folder = results("anything", None)
    (folder / "result.json").unlink()
    monkeypatch.setattr(report, "save", SAVE)
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
    assert report.main() == 0 and (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{folder / 'curve.png'}\n"
    (folder / "log.csv").unlink()  # as in the folder of an average
    for options in ([str(folder)], ["nowhere"], [__file__], ["--responses", "nowhere"]):
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        assert report.main() == 2
        assert f"report.py: {options[-1]}: there is no " in capsys.readouterr().err


def test_responses_are_the_std_after_bn(tmp_path, monkeypatch, capsys):
    """[1] Fig. 7 on a small net, against the same numbers taken unit by unit."""
    torch.manual_seed(0)
    net = models.cifar_resnet(14, units.Basic)
    state = {"model": net.state_dict(), "mean": torch.full((3, 32, 32), 120.0), "std": torch.ones(3, 1, 1)}
    state |= {"schema": checkpoint.SCHEMA, "flags": {}}
    torch.save(state, tmp_path / "checkpoint.pt")
    config = {"depth": 14, "unit": "basic", "unit_args": {"option": "A"}, "dataset": "synthetic", "data": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["report.py", "--responses", str(tmp_path)])
    assert report.main() == 0
    measured = [float(row["std"]) for row in csv.DictReader(open(tmp_path / "responses.csv"))]
    x = (data.load_cifar("synthetic", None, 1_000)[2] - state["mean"]).float()
    expected = []
    with torch.inference_mode():
        x = net.eval().stem[1](net.stem[0](x))
        expected.append(x.std())
        x = x.relu()
        for unit in (unit for stage in net.stages for unit in stage):
            y = unit.bn1(unit.conv1(x))
            z = unit.residual(x)
            expected += [y.std(), z.std()]
            x = unit(x)
    config["unit"] = "basic-preact"
    torch.save(state | {"model": models.cifar_resnet(14, units.BasicPreAct).state_dict()}, tmp_path / "checkpoint.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert report.main() == 2 and "basic-preact has it elsewhere" in capsys.readouterr().err
    assert len(measured) == 13 and all(map(lambda a, b: abs(a - b) < 1e-3, measured, expected))


# The papers' numbers, in three places


def test_tables_and_run_all_hold_the_same_figures():
    rows = {line.split()[0].removesuffix("/seed1"): line.split()[1].split(",") for line in listed(SEEDS="1")}
    found, papers = {cell["table"]: set() for cell in report.cells()}, {}
    tags = {tag: {line.split()[0].removesuffix("/seed1") for line in listed(tag, SEEDS="1")} for tag in found}
    for cell in report.cells():
        if cell["run"]:
            found[cell["table"]].add(cell["run"])
            protocol, _, top = cell["metric"].partition(" ")
            assert (protocol in data.PROTOCOLS and top in ("top-1", "top-5")) == cell["run"].startswith("imagenet/")
            papers.setdefault(cell["run"], []).append(cell["paper"].split()[0] if cell["paper"] else "")
            if cell["metric"] == "test error %" and cell["table"] != "short":
                assert cell["paper"].split()[0] in rows[cell["run"]], cell
    for name, figures in papers.items():
        assert not name.startswith("imagenet/") or {*rows[name]} <= {*figures, "-"}, name
    assert found == tags
    assert set().union(*found.values()) == set(rows)


def test_curves_end_at_the_tables_figures():
    """paper.md 3.6: a table's figure is the end of its curve."""
    curves, rows = report.paper_curves(), {cell["run"] for cell in report.cells()}
    figures = {cell["run"]: cell["paper"].split()[0] for cell in report.cells() if cell["table"].startswith("2-")}
    drawn = {name + panel for name, (_, _, panels) in report.FIGURES.items() for panel in panels}
    assert curves.keys() == drawn | {"1-fig7top", "1-fig7bottom"}
    for panel, networks in curves.items():
        for (network, run), theirs in networks.items():
            assert run in rows, network
            if panel.startswith("2-"):
                assert theirs.keys() == {"train_loss", "test_error"}
                assert abs(max(theirs["test_error"])[1] - float(figures[run])) < 0.25, network
    assert all(len(theirs["response_std"]) > 15 for theirs in curves["1-fig7top"].values())
    assert {*curves["1-fig4left"][("plain-18", "imagenet/18-plain")]} == {"train_error", "val_error"}
    assert {*curves["1-fig1left"][("plain-20", "cifar10/20-plain")]} == {"train_error"}


def test_the_page_has_a_place_for_every_table_and_figure():
    text = (HERE / "paper" / "page.md").read_text()
    places = re.findall(r"^\{(.+)\}$", text, re.MULTILINE)
    checked = {name for name, (kind, *_) in report.FIGURES.items() if kind == report.LOSS}
    assert len(places) == len({*places}) and {*places} == {cell["table"] for cell in report.cells()} | checked
    assert all(f"### {title}\n\n![{title}]({name}.svg)" in text for name, (_, title, _) in report.FIGURES.items())


def test_paper_checkpoints():
    """paper.md 2.6's, to the digits it gives."""
    curves = {}
    for networks in report.paper_curves().values():
        curves |= {network: theirs for (network, _), theirs in networks.items()}
    for network, expected in {
        "ResNet-110 original": (12.8, 10.6, 10.3, 6.92, 6.73, 6.64, 6.57),
        "ResNet-110 1x1 conv shortcut": (None, 20.0, 19.0, 12.6, 13.2, 12.2, 12.27),
        "ResNet-164 pre-activation": (13.2, 9.5, 9.1, 6.01, 5.81, 5.51, 5.46),
        "ResNet-1001 original": (None, 15.4, 11.7, 8.52, 8.56, 7.77, 7.59),
    }.items():
        for iteration, value in zip(report.ITERATIONS, expected, strict=True):
            shown = report.paper_error_at(curves[network]["test_error"], iteration)
            assert shown == ">20" if value is None else abs(float(shown) - value) <= 0.051, (network, iteration)
    loss = curves["ResNet-164 original"]["train_loss"]
    losses = [float(report.paper_loss_in(loss, window)) for window in report.WINDOWS]
    for value, expected in zip(losses, (0.91, 0.291, 0.149, 0.0161, 0.0051, 0.0023), strict=True):
        assert math.isclose(value, expected, rel_tol=0.06)


# What is committed


def committed():
    return sorted(path.parent for path in (HERE / "results").rglob("result.json"))


def test_committed_runs_are_their_rows(monkeypatch):
    """A folder with a row's name was made with that row's flags, on all images, from committed code."""
    commands = {line.split()[0]: line.split()[4:] for line in listed(SEEDS="1 2 3 4 5")}
    for folder in committed():
        name = folder.relative_to(HERE / "results").as_posix()
        config = json.loads((folder / "config.json").read_text())
        assert config["environment"]["modified"] is False, name
        if re.search(r"/seed\d+$", name):
            monkeypatch.setattr(sys, "argv", ["cifar_train.py", *commands[name]])
            flags = vars(cifar_train.parse_flags())
            free = checkpoint.FREE | {"evaluate"}
            assert config.keys() - free - {"environment"} <= flags.keys(), name
            for flag in flags.keys() - free:
                there, here = map(checkpoint.without_off, (config.get(flag), flags[flag]))
                assert there == here, (name, flag)


def test_committed_results_agree_with_their_logs():
    for folder in committed():
        run = report.read_run(folder)
        if not run["diverged"]:
            assert run["log"][-1]["iteration"] == run["iterations"]
            assert run["log"][-1]["test_error"] == run["test_error"]


def test_pages_are_not_stale():
    rows, others, problems = report.read_runs(HERE / "results")
    assert all("not finished" in problem for problem in problems)  # a run may be under way
    readme = (HERE / "README.md").read_text()
    assert report.with_headline(readme, rows) == readme, "run python report.py"
    assert report.page(report.paper_curves(), rows, others, []) == (HERE / "results" / "README.md").read_text(), (
        "run python report.py"
    )
