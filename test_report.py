"""The pages and pictures of report.py for all that results/ can hold, and what is committed there."""

import json
import math
import pathlib
import re
import statistics
import sys

import pytest

import checkpoint
import cifar_train
import data
import report
from test_run_all import listed, parse, tags  # noqa: F401

HERE = pathlib.Path(__file__).parent
SAVE = report.save


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results/ and a README.md of its own, with the pictures drawn but not saved. A call makes a run's folder;
    the others are what report.py then wrote: `drawn` counts each picture's curves."""
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
    make.drawn = {}
    make.page = lambda: (tmp_path / "results" / "README.md").read_text()
    make.readme = lambda: (tmp_path / "README.md").read_text()
    return make


def test_empty_results(results):
    assert report.main() == 0
    assert "| original, Fig. 4(a) | 6.61 |  | 5.93 |  |" in results.page()
    tables = {cell["table"] for cell in report.cells()}
    assert "(n =" not in results.page() and results.page().count("No run yet.") == len(tables)
    assert results.drawn.keys() == {*report.FIGURES, *report.SHORT, "1-fig7"} - {"short-long"}
    assert results.readme().startswith("before\n") and results.readme().endswith("after\n")
    assert "None of the papers' nets" in results.readme() and "old" not in results.readme()


def test_pictures_are_the_same_files_each_time(tmp_path, monkeypatch):
    monkeypatch.setitem(report.plt.rcParams, "svg.hashsalt", "resnet")
    for name in "ab":
        figure, axes = report.plt.subplots(figsize=(1, 1))
        axes.plot([1, 2])
        report.save(figure, tmp_path / name, "svg", "png")
    for suffix in ("svg", "png"):
        first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
        assert first == second


def test_one_run(results):
    results("cifar10/110/seed3", 7, lowest=6.75)
    report.main()
    page = results.page()
    assert "| original, Fig. 2(a) | 6.61 | 7.00 (n = 1) |" in page  # the last iterate's
    assert "| [cifar10/110](cifar10/110) | 1 | float32 | 2.00 | 2.00 |" in page
    assert "is 0.25 % above the lowest of a run's test evaluations (mean of 1 runs)" in page
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
    """A cell shows an evaluation of a run's last net as training left it; an average of nets has evaluations alone."""
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
    few = {"top1": 24.5, "iterations": [600_000], "recompute_bn": 0}  # as of fewer than 6 classes
    (folder / "multi-scale.json").write_text(json.dumps(few))
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
    metrics = {"1-crop top-1", "1-crop top-5", "training loss", "10-crop top-1", "10-crop top-5", "multi-scale top-1"}
    assert values.keys() == metrics


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
    logs = [whole.replace("iteration", "x"), whole.replace("train_loss", "x"), "", whole.splitlines()[0]]
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
    assert "seed51: not finished" in printed and "not finished" not in page  # it may be on its way
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
    assert "No row has two runs yet" in results.page() and "compare the order, not the errors.\n" in results.page()
    errors = {"preact": 40, "": 41.7, "relu-preact": 41.6, "bn-after-add": 45, "conv-shortcut": 43.3, "plain": 43.2}
    for name, error in errors.items():
        for seed in (1, 2, 3):
            results(f"short/38{'-' * bool(name)}{name}/seed{seed}", error + seed)
    results("short/38-shortcut-gating-6/seed1", 45.9)
    results("short/38-dropout-shortcut/seed1", None)
    report.main()
    page = results.page()
    note = "compare the order, not the errors;\n14 of 27 orders are as in the papers, 2 are not, 11 cannot be told.\n"
    assert note in page and note in results.readme()
    assert "s = 1.00 %" in page and "over the 6 rows that have two or more" in page
    for line in (
        "| lower in the papers | n | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |",
        "| 1 full pre-activation | 3 |  | ✓ | ? | ✓ | ✓ | ✓ | ✓ | ✓ |",
        "| 2 original | 3 |  |  | ? | ? | ✓ | ? | ✓ | ? |",
        "| 5 BN after addition | 3 |  |  |  |  |  | ✗ | ✓ | ✗ |",
        "| 7 dropout shortcut | 1 |  |  |  |  |  |  |  |  |",
    ):
        assert line in page, line
    assert "full pre-activation 0.50, original 0.50, plain 0.50: the papers' order." in page


def test_degradation_and_depth_on_the_short_schedule(results):
    """The tables, what the page says of them, and the curves: 2 of the paper by depth, and 4 by iteration."""
    report.main()
    assert results.drawn["short-depth"] == 2 and results.drawn["short-1001"] == 4 and "\n- " not in results.page()
    for seed in (1, 2, 3):
        for name, error in (("20-plain", 50), ("56-plain", 60), ("20", 49), ("56", 45.5)):
            results(f"short/{name}/seed{seed}", error + seed, train_loss=error / 50)
    results("short/164/seed1", 55)
    results("short/164-preact/seed1", None)
    results("short/1001-preact/seed1", 44.25, train_loss=1.25)
    report.main()
    page = results.page()
    assert "| plain-56 | 13.2 | 62.00 (62.00 ± 1.00, n = 3) | 1.20 |" in page
    assert "| ResNet-1001, full pre-activation | 4.92 | 44.25 (n = 1) | 1.25 |" in page
    plain, residual, original = (line for line in page.splitlines() if line.startswith("- "))
    change = "from 20 to 56 layers: test error {} % (the paper: {} %), training loss {}"
    assert plain == "- plain nets, " + change.format("+10.00", "+3.51", "+0.20")
    assert residual == "- residual nets, " + change.format("-3.50", "-1.78", "-0.07")
    assert original.startswith("- 164 layers, ") and "test error +inf % (the paper: -0.47 %)" in original
    assert results.drawn["short-depth"] == 2 + 2 * 2 * 2 and results.drawn["short-1001"] == 4 + 3 * 2
    assert "More than 0.5 %" not in page and "None of the papers' nets" in results.readme()


def test_the_short_rows_are_in_the_papers_order():
    numbers = [math.inf if paper == "fail" else float(paper) for _, paper, _ in report.short_rows({})]
    assert numbers == sorted(numbers) and len(numbers) == 16


LOG = """iteration,epoch,lr,train_loss,train_error,test_error,waited,seconds
250,0.2,0.1,2.0,80.0,,0.1,9.0
500,0.4,0.1,1.5,60.0,55.0,0.2,19.0
750,0.6,0.1,0.0,50.0,,0.3,29.0
"""


def curve(folder, monkeypatch, log=LOG):
    """Draw a run's curve; {a panel's label: {a curve's name: its points}}, and the axes."""
    (folder / "log.csv").write_text(log)
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path, suffix: figures.append(figure))
    assert report.draw_run(folder) == folder / "curve.png"
    axes = figures[0].axes
    report.plt.close(figures[0])
    return {a.get_ylabel(): {line.get_label(): line.get_xydata().tolist() for line in a.lines} for a in axes}, axes


def test_curve_of_a_run_that_was_not_always_tested(tmp_path, monkeypatch):
    """A row without a test error is a row; errors start at 0; no legend lies over the data."""
    panels, axes = curve(tmp_path, monkeypatch)
    assert panels["error, %"] == {"training": [[250, 80], [500, 60], [750, 50]], "test": [[500, 55]]}
    assert panels["loss"]["training"][:2] == [[250, 2.0], [500, 1.5]] and len(panels) == 2
    assert axes[0].get_ylim()[0] == 0 and axes[1].get_yscale() == "log"
    for ax in axes:
        ax.figure.canvas.draw()
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1
    old = LOG.replace("waited,", "").replace(",0.1,9", ",9").replace(",0.2,19", ",19").replace(",0.3,29", ",29")
    assert curve(tmp_path, monkeypatch, old)[0] == panels


@pytest.mark.parametrize("classes", (1000, 5))
def test_curve_of_an_imagenet_run(tmp_path, monkeypatch, classes):
    """Top-5 error is never beside top-1 error, and not there at all for fewer than 6 classes."""
    top5 = ",30.0" if classes > 5 else ","
    log = LOG.replace("test_error", "val_top1,val_top5").replace("0.0,,0", "0.0,,,0").replace(",55.0", f",55.0{top5}")
    panels, axes = curve(tmp_path, monkeypatch, log)
    assert panels["error, %"]["validation, top-1"] == [[500, 55]]
    assert panels.get("top-5 error, %") == ({"validation, top-5": [[500, 30]]} if classes > 5 else None)
    assert all(ax.get_ylim()[0] == 0 for ax in axes[:-1])


def test_curve_png(results, monkeypatch, capsys):
    folder = results("any $name$ _{at all", None)
    (folder / "result.json").unlink()
    monkeypatch.setattr(report, "save", SAVE)
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
    assert report.main() == 0 and (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{folder / 'curve.png'}\n"
    (folder / "log.csv").unlink()  # as in the folder of an average
    for run in (str(folder), "nowhere", __file__):
        monkeypatch.setattr(sys, "argv", ["report.py", run])
        assert report.main() == 2
        assert capsys.readouterr().err.startswith(f"report.py: {run}: it has no log.csv: a run writes one")


def test_results_that_cannot_be_written(results, monkeypatch, capsys):
    (report.HERE / "results").write_text("a file in its place")
    assert report.main() == 2 and capsys.readouterr().err.startswith("report.py: [Errno ")


# The papers' numbers, in three places


def test_tables_and_run_all_hold_the_same_numbers():
    rows = {line.split()[0].removesuffix("/seed1"): line.split()[1].split(",") for line in listed(SEEDS="1")}
    runs, papers = {cell["table"]: set() for cell in report.cells()}, {}
    for cell in report.cells():
        if cell["run"]:
            runs[cell["table"]].add(cell["run"])
            protocol, _, top = cell["metric"].partition(" ")
            assert (protocol in data.PROTOCOLS and top in ("top-1", "top-5")) == cell["run"].startswith("imagenet/")
            papers.setdefault(cell["run"], []).append(cell["paper"].split()[0] if cell["paper"] else "")
            if cell["metric"] == "test error %" and cell["table"] not in report.SHORT:
                assert cell["paper"].split()[0] in rows[cell["run"]], cell
    for name, numbers in papers.items():
        assert not name.startswith("imagenet/") or {*rows[name]} <= {*numbers, "-"}, name
    assert runs == {tag: {row for row, tagged in tags().items() if tag in tagged} for tag in runs}
    assert set().union(*runs.values()) == set(rows)


def test_curves_end_at_the_tables_numbers():
    """A number of the tables is the end of its curve."""
    curves, rows = report.paper_curves(), {cell["run"] for cell in report.cells()}
    numbers = {cell["run"]: cell["paper"].split()[0] for cell in report.cells() if cell["table"].startswith("2-")}
    drawn = {name + panel for name, (_, _, panels) in report.FIGURES.items() for panel in panels}
    assert curves.keys() == drawn | {"1-fig7top", "1-fig7bottom"}
    for panel, networks in curves.items():
        for (network, run), theirs in networks.items():
            assert run in rows, network
            if panel.startswith("2-"):
                assert theirs.keys() == {"train_loss", "test_error"}
                assert abs(max(theirs["test_error"])[1] - float(numbers[run])) < 0.25, network
    assert all(len(theirs["response_std"]) > 15 for theirs in curves["1-fig7top"].values())
    assert {*curves["1-fig4left"][("plain-18", "imagenet/18-plain")]} == {"train_error", "val_error"}
    assert {*curves["1-fig1left"][("plain-20", "cifar10/20-plain")]} == {"train_error"}


def test_the_page_has_a_place_for_every_table_and_figure():
    text = (HERE / "paper" / "page.md").read_text("utf-8")
    places = re.findall(r"^\{(.+)\}$", text, re.MULTILINE)
    assert len(places) == len({*places}) and {*places} == {cell["table"] for cell in report.cells()}
    assert all(f"### {title}\n\n![{title}]({name}.svg)" in text for name, (_, title, _) in report.FIGURES.items())


# What is committed


def committed():
    return sorted(path.parent for path in (HERE / "results").rglob("result.json"))


def test_committed_runs_are_their_rows(parse):  # noqa: F811
    """A folder with a row's name was made by that row's command, which means the same today, from committed code."""
    lines = {line.split()[0].removesuffix("/seed1"): line.split()[3:] for line in listed(SEEDS="1")}
    for folder in committed():
        name, _, seed = folder.relative_to(HERE / "results").as_posix().rpartition("/seed")
        config = json.loads((folder / "config.json").read_text())
        assert config["environment"]["modified"] is False, folder
        if not name:
            continue
        command = " ".join(lines[name]).replace("--seed 1 ", f"--seed {seed} ").replace("/seed1", f"/seed{seed}")
        assert config["environment"]["command"] == command
        if seed == "1":
            flags = vars(parse(cifar_train, lines[name]))
            for flag in cifar_train.IDENTITY:
                before, now = map(checkpoint.without_off, (config.get(flag), flags[flag]))
                assert before == now, (name, flag)


def test_committed_results_agree_with_their_logs():
    for folder in committed():
        run = report.read_run(folder)
        if not run["diverged"]:
            assert run["log"][-1]["iteration"] == run["iterations"]
            assert run["log"][-1]["test_error"] == run["test_error"]


def test_pages_are_not_stale():
    rows, others, problems = report.read_runs(HERE / "results")
    assert all("not finished" in problem for problem in problems)  # a run may be on its way
    readme, page = ((HERE / path).read_text("utf-8") for path in ("README.md", "results/README.md"))
    assert report.with_headline(readme, rows) == readme, "run python report.py"
    assert report.page(rows, others, []) == page, "run python report.py"
