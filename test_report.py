"""The pages and pictures of report.py for all that results/ can hold, and what lies there, committed or not."""

import json
import math
import pathlib
import re
import shlex
import statistics
import sys

import pytest

import checkpoint
import cifar_train
import data
import detection_train
import imagenet_train
import report
from test_run_all import listed, parse, tags  # noqa: F401

HERE = pathlib.Path(__file__).parent
SAVE = report.save
SCRIPTS = {script.__name__ + ".py": script for script in (cifar_train, imagenet_train, detection_train)}
ERRORS = {"imagenet": ["val_top1", "val_top5"], "voc": ["map_11point", "map_area"], "coco": ["map_50", "map_50_95"]}
NETS = [f"imagenet/{net}" for net in "34-B/seed1 34-C/seed1 50/seed1 101/seed1 152/seed1 152/seed2".split()]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results/ and a README.md of its own, with the pictures drawn but not saved. A call makes a run's folder,
    of a run that counts where its name is a row's, `evaluated` an evaluation in it and `average` the folder of one; the
    others are what report.py then wrote: `drawn` counts each picture's curves, and `labels` names them."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "README.md").write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    for name in ("paper", "run_all.sh"):
        (tmp_path / name).symlink_to(HERE / name)
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py"])

    def draw(figure, path, *_):
        curves = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata())]
        make.drawn[path.name] = len(curves)
        make.labels[path.name] = {line.get_label() for axes in figure.axes for line in axes.lines}
        report.plt.close(figure)

    def make(name, error, lowest=None, **more):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        row, _, seed = name.rpartition("/seed")
        dataset, columns = name.split("/")[0], ERRORS.get(name.split("/")[0], ["test_error"])
        log = ["iteration,epoch,lr,train_loss,train_error," + ",".join(columns) + ",seconds"]
        for iteration, shown in ((2000, 50.0), (10000, lowest or error), (64000, error)):
            log.append(f"{iteration},1.0,0.1,0.5,20.0" + len(columns) * f",{'' if shown is None else shown}" + ",1.0")
        (folder / "log.csv").write_text("\n".join(log) + "\n")
        command = shlex.join(report.commands().get(row, [])).replace(f"{row}/seed1", name)
        command, device = command.replace("--seed 1 ", f"--seed {seed} "), "H100" if seed == "3" else "a CPU"
        environment = {"command": command, "modified": False, "device": device}
        config = {"images": 1_281_167 if dataset == "imagenet" else 0, "environment": environment}
        (folder / "config.json").write_text(json.dumps(config))
        result = {"dataset": dataset, "depth": 110, "unit": "basic", "precision": "float32", "iterations": 64_000}
        result |= dict.fromkeys(columns, error)
        result |= {"diverged": error is None, "train_loss": None if error is None else 0.5}
        result |= {"seconds": 7200, "peak_memory": 2e9} | more
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    def evaluated(folder, test, images=50_000, iterations=64_000, **errors):
        made = {"iterations": [iterations], "recompute_bn": 0, "images": images} | errors
        (folder / f"{test}.json").write_text(json.dumps(made))
        return made

    def average(name, runs, test="multi-scale", images=50_000, iterations=64_000, **errors):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        result = {"dataset": "imagenet", "precision": "float32", "diverged": False, "seconds": 7200, "peak_memory": 2e9}
        result |= {"runs": runs, "iterations": [iterations] * len(runs), "recompute_bn": 0}
        result[test] = evaluated(folder, test, images=images, **errors)
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    make.evaluated, make.average = evaluated, average

    monkeypatch.setattr(report, "save", draw)
    make.drawn, make.labels = {}, {}
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
    assert "| [cifar10/110](cifar10/110) | 1 | float32 | H100 | 2.00 | 2.00 |" in page
    assert "The table shows the error after the last iteration. It is 0.25 points above the lowest" in page
    assert "on average" not in page
    assert "| cifar10/110 | 6.61 | 7.00 (n = 1) |" in results.readme()
    assert "More than 0.5 points" not in page  # nor from [1]'s, whose 6.43 is the lowest of 5 runs
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
    assert "It is 0.00 points above the lowest of a run's evaluations, on average over 5 runs." in page
    assert "| [cifar10/110-preact](cifar10/110-preact) | 5 | float32 | a CPU, H100 | 2.00 | 2.00 |" in page
    assert "b_g = -3 (9.00 instead of a failure)" in page and "original, Fig. 4(a) (diverged)" in page
    nets = re.findall(r"^\| cifar10/(\S+) \|", results.readme(), re.MULTILINE)
    assert nets == ["110-exclusive-gating-3", "110-dropout-shortcut", "164", "110-preact"]  # as in the tables
    assert f"| cifar10/110-dropout-shortcut {failed}" in results.readme()


def test_imagenet_runs_and_averages(results):
    """A cell shows an evaluation of a run's last net as training left it; an average of nets has evaluations alone."""
    folder = results("imagenet/34-A/seed1", 25.5)
    results.evaluated(folder, "10-crop", top1=24, top5=7.5)
    results.evaluated(folder, "1-crop-320", iterations=9, top1=2, top5=7.5)
    results.evaluated(folder, "1-crop", recompute_bn=1, top1=2, top5=7.5)
    results.evaluated(folder, "multi-scale", top1=24.5)  # as of fewer than 6 classes
    for net in NETS:
        results(net, 26.0)
    results.average("imagenet/ensemble/seed1", [f"results/{net}" for net in NETS], top1=19.5, top5=3.25)
    report.main()
    page = results.page()
    assert "| ResNet-34 A | 25.03 | 24.00 (n = 1) | 7.76 | 7.50 (n = 1) |" in page
    assert "| ResNet, six nets | 3.57 | 3.25 (n = 1) |" in page and "2.00 (n" not in page
    assert "| imagenet/34-A, 10-crop top-1 | 25.03 | 24.00 (n = 1) |" in results.readme()
    values = report.read_run(report.RESULTS / "imagenet/34-A/seed1")["values"]
    assert results.drawn["1-fig4"] == 8 + 2  # no curve of ours but 34-A's
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
    assert "- cifar10/20/seed51: cannot be read: there is no log.csv" in page
    assert "\nno result yet, so in no table: cifar10/20/seed50\n" in printed and "seed50" not in page
    assert "seed1:" not in printed


def test_other_runs_and_precisions_fill_no_cell(results, capsys):
    results("cifar10/110/seed1", 6.5)
    results("cifar10/110/seed2", 1.5, precision="bf16")
    changed(results("cifar10/110/seed3", 1.5), "config.json", lambda config: config["environment"].pop("modified"))
    for seed, precision in enumerate(("fp16", "bf16", "tf32"), 1):
        results(f"cifar10/164/seed{seed}", 5.0 + seed, precision=precision)
    for name in ("cifar10/20-preact-800", "cifar10/110/again", "mine/seed1", "seed1"):
        results(name, 2.5)
    report.main()
    cells, _, others = results.page().partition("## Other runs")
    assert "| 6.50 (n = 1) |" in cells and "1.50" not in cells and "2.50" not in cells
    assert "| NIN | 8.81 |  |" in cells
    assert "| 8.00 (n = 1, tf32) |" in cells and "| cifar10/164 | 5.93 | 8.00 (n = 1, tf32) |" in results.readme()
    named = {"ResNet-110 original (ours: n = 1)", "ResNet-164 original (ours: n = 1, tf32)"}
    assert named <= results.labels["2-fig6"]
    reasons = {
        "cifar10/110/seed2": "its row has runs in float32",
        "cifar10/110/seed3": "its config.json does not say that its code",
    }
    reasons |= {f"cifar10/164/seed{seed}": "its row has runs in tf32" for seed in (1, 2)}
    printed = capsys.readouterr().out
    for name in (*reasons, "cifar10/110/again", "mine/seed1", "seed1"):
        line = re.search(rf"^\| \[{name}\]\({name}\) \|.*", others, re.MULTILINE)[0]
        assert reasons.get(name, "run_all.sh has no row of this name") in line and f"{name}: in no table, as" in printed


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
    note = "Of 27 pairs of units, 14 are in the papers' order, 2 in the opposite one,\nand 11 are too close to tell.\n"
    assert note in page and note in results.readme()
    assert "s = 1.00 points" in page and "over the 6 rows that have two or more" in page
    for line in (
        "| lower in the papers | n | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |",
        "| 1 full pre-activation | 3 |  | ✓ | ? | ✓ | ✓ | ✓ | ✓ | ✓ |",
        "| 2 original | 3 |  |  | ? | ? | ✓ | ? | ✓ | ? |",
        "| 5 BN after addition | 3 |  |  |  |  |  | ✗ | ✓ | ✗ |",
        "| 7 dropout shortcut | 1 |  |  |  |  |  |  |  |  |",
    ):
        assert line in page, line
    assert "full pre-activation 0.50, original 0.50, plain 0.50. This is the papers' order." in page


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
    assert f":\n\n{original}\n" in results.readme() and plain not in results.readme()
    change = "from 20 to 56 layers: test error {} points (the paper: {}), training loss {} (n = 3 and 3)"
    assert plain == "- plain nets, " + change.format("+10.00", "+3.51", "+0.20")
    assert residual == "- residual nets, " + change.format("-3.50", "-1.78", "-0.07")
    assert original.startswith("- 164 layers, ") and "test error +inf points (the paper: -0.47)" in original
    assert original.endswith(" (n = 1 and 1)")
    assert results.drawn["short-depth"] == 2 + 2 * 2 * 2 and results.drawn["short-1001"] == 4 + 3
    assert "More than 0.5 points" not in page and "None of the papers' nets" in results.readme()


def test_responses_by_layer_and_by_magnitude(results, monkeypatch):
    """[1] Fig. 7."""
    folder, drawn = results("cifar10/56/seed1", 7.0, precision="bf16"), {}
    (folder / "responses.csv").write_text("layer,std\n1,1.5\n2,0.5\n3,2.5\n")
    monkeypatch.setattr(report, "save", lambda figure, path, *_: drawn.setdefault(path.name, figure))
    report.main()
    for axes, stds in zip(drawn["1-fig7"].axes, ([1.5, 0.5, 2.5], [2.5, 1.5, 0.5]), strict=True):
        curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert stds in curves.values() and "ResNet-56 (ours: n = 1, bf16)" in curves
    report.plt.close("all")


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
    assert report.draw_runs([folder], [report.read_log(folder)]) == folder / "curve.png"
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
    for run, problem in (
        (str(folder), "it has no log.csv"),
        ("nowhere", "there is no such folder"),
        (__file__, "there is"),
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", run])
        assert report.main() == 2
        assert capsys.readouterr().err.startswith(f"report.py: {run}: {problem}")


def test_curves_of_several_runs(tmp_path, monkeypatch):
    """In one picture, each in a colour of its own; a run of another kind has a panel of its own."""
    figures, logs = (
        [],
        (
            LOG,
            LOG,
            LOG.replace("test_error", "map_50,map_50_95").replace("0.0,,0", "0.0,,,0").replace("55.0", "55.0,9"),
        ),
    )
    for name, log in zip("abc", logs, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(log)
    monkeypatch.setattr(report, "save", lambda figure, path, suffix: figures.append(figure))
    folders = [tmp_path / name for name in "abc"]
    assert report.draw_runs(folders, map(report.read_log, folders)) == pathlib.Path("curves.png")
    above, boxes, loss = figures[0].axes
    assert [line.get_label().partition("/")[2] for line in above.lines] == [
        "a, training",
        "a, test",
        "b, training",
        "b, test",
        "c, training",
    ]
    colours = [line.get_color() for line in above.lines]
    assert colours[0] == colours[1] and colours[2] == colours[3] and len({*colours}) == 3 == len(loss.lines)
    assert [line.get_linestyle() for line in boxes.lines] == ["-", ":"]
    assert [line.get_label().partition("/")[2] for line in boxes.lines] == ["c, test, @.5", "c, test, @[.5,.95]"]
    report.plt.close(figures[0])


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


# Which runs count


def changed(folder, name, change):
    """Change the content of a JSON file in a folder."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


MEANINGS = {}  # {a row's name: {flag of its identity: value}}


def meaning(name, parse):  # noqa: F811
    """What makes a run of a row this run, but for its seed and precision."""
    if name not in MEANINGS:
        words = report.commands()[name]
        flags = parse(SCRIPTS[words[0]], words)
        MEANINGS[name] = {flag: getattr(flags, flag) for flag in {*SCRIPTS[words[0]].IDENTITY} - {"precision", "seed"}}
    return MEANINGS[name]


def check_row(folder, parse):  # noqa: F811
    """A folder with a row's name is a run that counts, and its row's command still means the same. Any other was made
    from committed code."""
    run = report.read_run(folder)
    name = folder.relative_to(report.RESULTS).as_posix().rpartition("/seed")[0]
    if name not in report.commands():
        assert "runs" in run or run["config"]["environment"]["modified"] is False, folder
        return
    assert run["objection"] is None, f"{folder}: {run['objection']}"
    if "runs" not in run:
        for flag, value in meaning(name, parse).items():
            before, now = map(checkpoint.without_off, (run["config"].get(flag), value))
            assert before == now, f"{folder}: {flag} is {before}, and its row's is {now}"


def check_log(folder):
    """A run's errors are those of the last row of its log, and an average's those of its evaluations."""
    run = report.read_run(folder)
    if "runs" in run:
        assert run["evaluated"] and all(
            run[test] == json.loads((folder / f"{test}.json").read_text()) for test in run["evaluated"]
        ), folder
    elif not run["diverged"]:
        last, errors = run["log"][-1], [name for name in report.METRICS if name in run and name != "train_loss"]
        assert errors and last["iteration"] == run["iterations"], folder
        assert [last.get(name) for name in errors] == [run[name] for name in errors], folder


@pytest.fixture
def kinds(results, parse):  # noqa: F811
    """{kind: a made-up run of a row that counts}"""
    made = {"cifar10": results("cifar10/20/seed2", 8.5), "voc": results("voc/101/seed1", 76.5)}
    made["coco"] = results("coco/101/seed1", 48.5)
    nets = [results(net, 23.0) for net in NETS]
    made |= {"imagenet": nets[-1]}
    for folder in (*made.values(), *nets):
        name = folder.parent.relative_to(report.RESULTS).as_posix()
        row = meaning(name, parse)
        changed(folder, "config.json", lambda config, row=row: config.update(row | {"images": config["images"]}))
    results.evaluated(made["imagenet"], "1-crop-320", top1=21.25, top5=5.5)
    results.evaluated(made["voc"], "baseline", images=4_952)
    results.evaluated(made["coco"], "refine", images=40_504)
    made["ensemble"] = results.average("imagenet/ensemble/seed1", [f"results/{net}" for net in NETS], top1=20, top5=3.5)
    return made


def test_a_run_of_each_kind_counts(kinds, parse):  # noqa: F811
    for folder in kinds.values():
        check_row(folder, parse)
        check_log(folder)
    rows, others, unfinished, problems = report.read_runs(report.RESULTS)
    assert sum(map(len, rows.values())) == 10 and not (others or unfinished or problems)
    assert "1-crop-320 top-1" in rows["imagenet/152"][1]["values"]


def add(words):
    return "config.json", lambda config: config["environment"].update(command=config["environment"]["command"] + words)


def instead(old, new):
    def change(config):
        config["environment"]["command"] = config["environment"]["command"].replace(old, new)

    return "config.json", change


def setting(file, **values):
    return file, lambda content: content.update(values)


@pytest.mark.parametrize(
    "kind, change, objection",
    (
        ("imagenet", instead("--test 10-crop,multi-scale,1-crop-320 ", ""), "its row's, .*(differing: --test)"),
        ("imagenet", add(" --epochs 30"), "(differing: --epochs)"),
        ("imagenet", instead("seed2", "seed3"), "(differing: --out)"),
        ("imagenet", instead("--seed 2 ", ""), "(differing: --seed)"),
        ("cifar10", instead("cifar_train", "mine"), "(differing: script)"),
        ("cifar10", add(" --images 100 --lr=0.2"), "(differing: --images, --lr)"),
        ("voc", instead("R-101.pkl", "R-50.pkl"), "(differing: --weights)"),
        ("imagenet", setting("config.json", environment={}), "(differing: "),
        ("imagenet", setting("config.json", images=600), "it was trained on 600 images"),
        ("voc", setting("config.json", images=8), "it was trained on 8 images"),
        ("imagenet", setting("1-crop-320.json", images=10), "1-crop-320.json is of 10 images, not .* 50000"),
        ("voc", setting("baseline.json", images=10), "baseline.json is of 10 images"),
        ("coco", setting("refine.json", images=10), "refine.json is of 10 images"),
        ("ensemble", setting("multi-scale.json", images=10), "multi-scale.json is of 10 images"),
        ("ensemble", setting("result.json", runs=["results/imagenet/50/seed1"] * 6), "not the average"),
        ("ensemble", setting("result.json", recompute_bn=1000), "not the average"),
        ("ensemble", setting("result.json", iterations=[64_000] * 5 + [9]), "152/seed2: it had not finished"),
    ),
)
def test_a_run_that_breaks_a_rule_is_among_the_others(kinds, parse, kind, change, objection):  # noqa: F811
    changed(kinds[kind], *change)
    pattern = re.escape(objection).replace(r"\.\*", ".*")
    with pytest.raises(AssertionError, match=pattern):
        check_row(kinds[kind], parse)
    others = {run["folder"].parent.name: run["objection"] for run in report.read_runs(report.RESULTS)[1]}
    assert re.search(pattern, others[kinds[kind].parent.name])
    if kind == "imagenet":
        assert "imagenet/152/seed2: " in others["ensemble"]


def test_an_average_needs_its_nets(kinds):
    (report.RESULTS / "imagenet/50/seed1/result.json").unlink()
    others = report.read_runs(report.RESULTS)[1]
    assert [run["folder"] for run in others] == [kinds["ensemble"]]
    assert "(results/imagenet/50/seed1: cannot be read: there is no result.json)" in others[0]["objection"]


def test_flags_of_the_machine_may_be_added(kinds, parse):  # noqa: F811
    """Those that run_all.sh passes on."""
    flags = "--data 'a b' --workers=3 --device cuda --precision bf16 --timeout 9 --checkpoint-seconds 1 --compile"
    assert {word.partition("=")[0] for word in flags.split() if "--" in word} == {*report.MACHINE}
    (line,) = listed("imagenet/152/seed2", FLAGS=flags)
    command = shlex.join(shlex.split(line)[3:])
    assert all(flag in command for flag in report.MACHINE)
    changed(kinds["imagenet"], "config.json", lambda config: config["environment"].update(command=command))
    check_row(kinds["imagenet"], parse)


@pytest.mark.parametrize("kind", ("cifar10", "imagenet", "voc", "coco", "ensemble"))
def test_a_result_that_is_not_its_logs(kinds, kind):
    folder, column = kinds[kind], [*ERRORS.get(kind, ["test_error"])][-1]
    change = {"multi-scale": {}} if kind == "ensemble" else {column: 1.0}
    changed(folder, "result.json", lambda result: result.update(change))
    with pytest.raises(AssertionError):
        check_log(folder)


def test_a_command_that_has_changed_its_meaning(kinds, parse):  # noqa: F811
    changed(kinds["imagenet"], "config.json", lambda config: config.update(micro_batch=64))
    with pytest.raises(AssertionError, match="micro_batch is 64, and its row's is 32"):
        check_row(kinds["imagenet"], parse)


# What lies under results/


def finished():
    return sorted(path.parent for path in (HERE / "results").rglob("result.json"))


def test_runs_under_results_are_their_rows(parse):  # noqa: F811
    for folder in finished():
        check_row(folder, parse)


def test_runs_under_results_agree_with_their_logs():
    for folder in finished():
        check_log(folder)


def test_pages_are_not_stale():
    rows, others, _, problems = report.read_runs(HERE / "results")
    readme, page = ((HERE / path).read_text("utf-8") for path in ("README.md", "results/README.md"))
    assert not problems
    assert report.with_headline(readme, rows) == readme, "run python report.py"
    assert report.page(rows, others, []) == page, "run python report.py"
