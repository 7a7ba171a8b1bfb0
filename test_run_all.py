"""run_all.sh: its rows against the command line and the papers' tables, and how it runs them (with programs of our own
in place of python)."""

import functools
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

import cifar_train
import data
import detection_train
import flags
import imagenet_train
import models
import units
import weights

HERE = pathlib.Path(__file__).parent
OURS = ("LIST", "SEEDS", "OUT", "SHARD", "JOBS", "LAUNCH", "FLAGS", "SMOKE", "CUDA_VISIBLE_DEVICES", "GOMP_SPINCOUNT")


def start(*words, cwd=HERE, script="run_all.sh", path=pathlib.Path(sys.executable).parent, **variables):
    """Start run_all.sh in a process group of its own, with no variable that it reads but these, and with the signals
    heeded that whoever started the tests may have ignored (as nohup does)."""

    def heed():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    env = {name: value for name, value in os.environ.items() if name not in OURS} | variables
    env["PATH"] = f"{path}:{os.environ['PATH']}"
    command = ["bash", script, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=heed
    )


def run_all(*words, **options):
    """(status, output, errors) of run_all.sh."""
    process = start(*words, **options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@functools.cache
def listing(*words, **variables):
    status, printed, _ = run_all(*words, LIST="1", **variables)
    assert status == 0
    return tuple(printed.splitlines())


def listed(*words, **variables):
    """The lines of LIST=1 that are runs, without their comments: name, the paper's number, command."""
    lines = [line for line in listing(*words, **variables) if line and not line.startswith("#")]
    return [line.rpartition("  # ")[0] for line in lines]


def tags():
    """{row's name: its tags}"""
    runs = [line.rpartition("  # ") for line in listing(SEEDS="1") if line and not line.startswith("#")]
    return {line.split()[0].removesuffix("/seed1"): comment.split(";")[0].split(",") for line, _, comment in runs}


@functools.cache
def beginning():
    about = {"depth": 101, "unit": "bottleneck", "unit_args": {"option": "B"}}
    return models.imagenet_resnet(18, units.Basic, width=2), about | weights.grey_levels(data.MEAN, data.STD)


@pytest.fixture
def parse(monkeypatch):
    """parse(script, words): the flags of a command. A net is built at its smallest depth in place of the depth asked
    for, when that is possible for the unit; what --weights names is taken for a ResNet-101 of ImageNet's."""

    def cifar(depth, unit, *classes, **arguments):
        assert depth > 2 and (depth - 2) % (3 * unit.weights) == 0
        return models.cifar_resnet(2 + 3 * unit.weights, unit, *classes, **arguments)

    def imagenet(depth, unit, *classes, **arguments):
        assert depth in ((18, 34) if unit.weights == 2 else (50, 101, 152, 200))
        return models.imagenet_resnet({2: 18, 3: 50}[unit.weights], unit, *classes, **arguments)

    monkeypatch.setattr(cifar_train, "cifar_resnet", cifar, raising=False)
    monkeypatch.setattr(imagenet_train, "imagenet_resnet", imagenet, raising=False)
    monkeypatch.setattr(detection_train, "load_vgg", lambda path: beginning())
    monkeypatch.setattr(flags, "load_weights", lambda path, layout: beginning())

    def parse(script, words):
        monkeypatch.setattr(sys, "argv", words)
        return script.parse_flags()

    return parse


# The rows


def test_every_cifar_row_is_a_command_that_parses(parse):
    lines = listed(SEEDS="1") + listed("110-relu-preact")[1:2]
    assert len({line.split()[0] for line in lines}) == len(lines)
    for line in lines:
        name, paper, *command = line.split()
        if name.startswith(("imagenet", "voc", "coco")):
            continue
        assert command[:2] == ["python", "cifar_train.py"] and "--unit" in command and "--depth" in command
        args = parse(cifar_train, command[1:])
        seed = name.rpartition("/seed")[2]
        assert args.out == f"results/{name}" and args.seed == int(seed)
        assert re.fullmatch(r"fail|-|[\d.]+(,[\d.]+)?", paper)
        assert ("plain" in args.unit) == ("plain" in name) and ("cifar100" == args.dataset) == ("cifar100" in name)
        assert str(args.depth) == re.search(r"/(\d+)", name)[1]
        assert args.recipe == ("resnet-1k-layers" if "batch64" in name else "paper")
        depths = ("cifar10/20", "cifar10/32", "cifar10/44", "cifar10/56")  # [1]'s alone, without warm-up
        warmup = 0 if name.startswith(depths) or "batch64" in name else 100 if name.startswith("short") else 400
        assert args.warmup == warmup
        if scales := re.search(r"scaling-([\d.]+)-([\d.]+)/", name):
            expected = [float(scale) for scale in scales.groups()]
            assert [args.unit_args["shortcut_scale"], args.unit_args["residual_scale"]] == expected
        if bias := re.search(r"gating-(\d+)", name):
            assert args.unit_args["gate_bias"] == -int(bias[1])
            assert args.unit_args["gate_bn"] == ("gate-bn" in name)
        assert (args.decay_all, args.fan_in) == ("decay-all" in name, "fan-in" in name)
        body = "single" if "single" in name else "bottleneck" if args.depth in (164, 1001) else "basic"
        panel = re.sub(
            r"^.*?/\d+|-batch64|-decay-all|-fan-in|(-[\d.]+)*(-gate-bn|-long)?$", "", name.rpartition("/")[0]
        )
        assert args.unit == body + panel.replace("-single", "")


def test_every_imagenet_row_is_a_command_that_parses(parse):
    for line in listed("imagenet", SEEDS="1"):
        name, paper, *command = line.split()
        assert command[:2] == ["python", "imagenet_train.py"]
        args = parse(imagenet_train, command[1:])
        assert args.out == f"results/{name}"
        if name.startswith("imagenet/ensemble"):
            nets = "34-B/seed1 34-C/seed1 50/seed1 101/seed1 152/seed1 152/seed2".split()
            assert args.evaluate == [f"results/imagenet/{net}" for net in nets] and args.test == ["multi-scale"]
            continue
        errors = [imagenet_train.papers_errors(args, protocol) for protocol in (*args.test, "1-crop")]
        assert paper == "-" or any(paper.replace(",", ", ") in error for error in errors), name
        assert str(args.depth) == re.search(r"/(\d+)", name)[1]
        assert args.preact == ("-preact" in name)
        assert (args.augment == "scale-aspect") == ("scale-aspect" in name)


def test_every_detection_row_is_a_command_that_parses(parse):
    for line in listed("1-table7", "1-table8", "1-table9", SEEDS="1"):
        name, _, *command = line.split()
        assert command[:2] == ["python", "detection_train.py"]
        args = parse(detection_train, command[1:])
        assert args.out == f"results/{name}" and args.vgg == ("vgg" in name) and args.context == ("context" in name)
        assert (args.dataset, args.train) == (name[: name.index("/")], "2014" if "coco" in name else "07+12")
        assert args.weights == ("vgg16-397923af.pth" if args.vgg else "R-101.pkl")


def test_rows_of_the_tables():
    rows = {"2-table1": 19, "2-table2": 10, "2-table3": 12, "2-table4": 9, "1-table6": 6, "1-fig6": 5, "short": 16}
    rows |= {
        "1-table2": 4,
        "1-table3": 7,
        "1-table4": 5,
        "1-table5": 1,
        "1-table7": 2,
        "1-table8": 2,
        "1-table9": 3,
        "2-table5": 5,
        "2-section5": 7,
        "open": 9,
    }
    rows |= {"short-long": 4, "short-depth": 8, "short-1001": 4}
    tagged = tags().values()
    assert {tag: sum(tag in row for row in tagged) for tag in rows} == rows and set().union(*tagged) == set(rows)
    assert len(listed("2-table4", SEEDS="1")) == 9  # by its tag, wherever a row stands
    everything = listed(SEEDS="1")
    papers = {line.split()[0]: line.split()[1] for line in everything}
    assert papers["cifar10/110-exclusive-gating-6/seed1"] == "8.70" and papers["cifar10/1001-preact/seed1"] == "4.92"
    biases = [line for line in everything if line.startswith("cifar10/110-exclusive")]
    assert {int(re.search(r"gate_bias=(-?\d+)", line)[1]) for line in biases} == set(range(-10, 1))
    assert len(listed("2-table5")) == 6 and len(listed("imagenet", SEEDS="1 2")) == 2 * 19 + 1  # one ensemble of both


@pytest.mark.parametrize(
    "words, runs",
    (
        (["cifar10/20"], ["cifar10/20/seed1"]),  # and not 20-plain
        (["cifar10/1001-preact"], [f"cifar10/1001-preact/seed{seed}" for seed in range(1, 6)]),
        (["cifar10/1001-preact/seed2", "cifar10/20/seed7"], ["cifar10/1001-preact/seed2", "cifar10/20/seed7"]),
        (["cifar10/20/seed1", "cifar10/20"], ["cifar10/20/seed1"]),
        (["10/56"], ["cifar10/56/seed1", "cifar10/56-plain/seed1"]),
    ),
)
def test_words_select_rows(words, runs):
    assert [line.split()[0] for line in listed(*words)] == runs


@pytest.mark.parametrize(
    "words, variables, message",
    (
        (["no-such-row"], {}, "no row's name contains 'no-such-row'; the tables' tags are 1-fig6 "),
        (["164", "ty po"], {}, "no row's name contains 'ty po'"),
        (["*"], {}, "no row's name contains '*'"),
        ([""], {}, "no row's name contains ''"),
        (["cifar10/2/seed1"], {}, "no row's name contains 'cifar10/2/seed1'"),
        ([], {"SHARD": "3/2"}, "SHARD is '3/2', but should be like 2/8"),
        ([], {"SEEDS": "one"}, "SEEDS is 'one', but should be like '1 2'"),
        ([], {"JOBS": "0"}, "JOBS is '0', but should be a whole number"),
        ([], {"JOBS": "9" * 20}, f"JOBS is '{'9' * 20}', but should be a whole number"),
        ([], {"SHARD": f"1/{'9' * 20}"}, f"SHARD is '1/{'9' * 20}', but should be like 2/8"),
        ([], {"TMPDIR": "/nowhere", "OUT": "/nowhere"}, "TMPDIR is '/nowhere', where no folder can be made"),
        ([], {"LAUNCH": "a 'b"}, "LAUNCH is 'a 'b', but should be a command"),
        ([], {"LAUNCH": " "}, "LAUNCH is ' ', but should be a command"),
        ([], {"LAUNCH": "torchrun", "JOBS": "2"}, "JOBS and LAUNCH: what LAUNCH starts takes all GPUs"),
        ([], {"FLAGS": "--data 'b"}, "FLAGS is '--data 'b', but should be flags"),
        ([], {"FLAGS": "--workers 2 --lr 1"}, "FLAGS has '--lr', but a row takes --data, "),
        ([], {"FLAGS": "--compile yes"}, "FLAGS has 'yes', but a row takes "),
        ([], {"FLAGS": "--compile --data"}, "FLAGS ends with --data, which needs a value"),
    ),
)
def test_bad_input(words, variables, message):
    status, output, errors = run_all(*words, **variables)
    assert (status, output) == (2, "") and errors.startswith(f"run_all.sh: {message}") and errors.count("\n") == 1


def test_the_list_has_headings_tags_costs_and_done_marks():
    lines = listing("1-table6", "short", "imagenet/50", "imagenet/ensemble", SEEDS="1 9")
    headings = [line for line in lines if line.startswith("# [")]
    assert headings[:2] == ["# [2] Table 1: shortcuts, ResNet-110 (2-table1)", "# [1] Table 6: CIFAR-10 (1-table6)"]
    assert "number in the first of the row's tables" in lines[0] and "SEEDS=1 lists the runs of seed 1" in lines[1]
    runs = {line.split()[0]: line for line in lines if line and not line.startswith("#")}
    command = "python cifar_train.py --depth 20 --unit basic --warmup 0 --seed 1 --out results/cifar10/20/seed1"
    words = shlex.split(runs["cifar10/20/seed1"], comments=True)
    assert words == ["cifar10/20/seed1", "8.75", *command.split()]
    assert re.search(r"  # 2-table1,2-table2,.*; about \d+ CPU-hours, 1\.9 GB$", runs["cifar10/110/seed9"])
    assert runs["short/38/seed1"].endswith("; done") and "done" not in runs["short/38/seed9"]
    assert re.search(r"  # short; about 0\.\d\d CPU-hours, [\d.]+ GB$", runs["short/38/seed9"])
    assert re.search(r"about \d{4} CPU-hours$", runs["imagenet/50/seed1"]) and runs["imagenet/ensemble/seed1"].endswith(
        "# 1-table5"
    )
    order = list(runs)
    assert order.index("cifar10/110/seed9") == order.index("cifar10/110/seed1") + 1  # by row, and not as they start


def test_costs_are_of_the_rows():
    """results/costs.csv has a line for each row that trains, with the images of its schedule."""
    lines = (HERE / "results" / "costs.csv").read_text().splitlines()
    assert lines[0] == "row,images,seconds_an_image,peak_memory"
    costs = {
        row: (int(images), float(seconds), memory) for row, images, seconds, memory in (x.split(",") for x in lines[1:])
    }
    rows = {line.split()[0].removesuffix("/seed1"): line for line in listed(SEEDS="1") if "--evaluate" not in line}
    assert list(costs) == list(rows)
    for row, line in rows.items():
        images, seconds, memory = costs[row]
        if row.startswith(("voc", "coco")):
            assert images == (80_000 * 2 if "voc" in row else 320_000 * 8) and 1 < seconds < 20 and int(memory) > 1e9
        elif row.startswith("imagenet"):
            assert abs(images / (90 * 1_281_167) - 1) < 0.01 and 0.1 < seconds < 1.2
        else:
            assert images == (
                156_250 * 64
                if "resnet-1k" in line
                else int(re.search(r"--iterations (\d+)", line)[1]) * 32
                if row.startswith("short")
                else 64_000 * 128
            )
            assert 0.002 < seconds < 0.2 and int(memory) > 1e9


def test_shards_are_a_partition():
    whole = listed("2-table2", "1-table6", SEEDS="3 4")
    for n in (1, 2, 5):
        parts = [listed("2-table2", "1-table6", SEEDS="3 4", SHARD=f"{i}/{n}") for i in range(1, n + 1)]
        assert sorted(sum(parts, [])) == sorted(whole) and max(map(len, parts)) - min(map(len, parts)) < 2


def test_flags_of_the_machine_are_passed_on(fake):
    """To every run but an average, whose runs decide; they stand before --out, and can be pasted."""
    run = fake('printf "%s\\n" "$@" > "$out/words"; ' + FINISH)
    flags = "--data 'a b' --precision=bf16 --workers 3 --compile"
    status, output, _ = run("imagenet/50", FLAGS=flags)
    words = (fake.folder / "results/imagenet/50/seed1/words").read_text().splitlines()
    assert status == 0 and words[-10:-4] == ["--data", "a b", "--precision=bf16", "--workers", "3", "--compile"]
    assert words[-4:] == ["--seed", "1", "--out", "results/imagenet/50/seed1"]
    assert shlex.split(output.partition("): ")[2])[1:] == words
    assert listed("imagenet/ensemble", FLAGS=flags) == listed("imagenet/ensemble")


def test_help():
    status, output, _ = run_all("--help")
    assert status == 0 and output.startswith("Every experiment of the two papers") and "SHARD=2/8" in output
    assert "#!" not in output and "set -u" not in output


def test_scripts_keep_their_line_ends():
    """As a clone of core.autocrlf=true gets them."""
    command = ["git", "check-attr", "eol", "--", "run_all.sh", ".ci/run"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    assert done.stdout.splitlines() == ["run_all.sh: eol: lf", ".ci/run: eol: lf"]


# How they are run


@pytest.fixture
def fake(tmp_path):
    """run_all.sh in a folder of its own, with a space and a quote in its name, and a python that runs a script there:
    $out is the run's folder. Its calls stand in `calls`."""
    folder = tmp_path / "it's here"
    (folder / "bin").mkdir(parents=True)
    (folder / "run_all.sh").write_bytes((HERE / "run_all.sh").read_bytes())

    def program(name, script):
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)

    def python(script):
        program("python", 'out=${@: -1}\nmkdir -p "$out"\necho "$out" >> "$HOME/calls"\n' + script)
        options = {"cwd": folder, "path": folder / "bin", "HOME": str(folder)}
        return lambda *words, **variables: run_all(*words, **options | variables)

    python.folder, python.program = folder, program
    python.calls = lambda: (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return python


FINISH = 'echo > "$out/result.json"'


def test_it_goes_on_after_a_failure_and_skips_what_is_done(fake):
    """With a python that fails on ResNet-32 and writes a result otherwise."""
    run = fake(f'case "$*" in *"--depth 32"*) exit 1;; esac; {FINISH}')
    status, output, errors = run("1-fig6", SEEDS="1")
    assert status == 1 and errors == "failed:\n  cifar10/32-plain/seed1 (exit status 1)\n"
    command = (
        "python cifar_train.py --depth 20 --unit basic-plain --warmup 0 --seed 1 --out results/cifar10/20-plain/seed1"
    )
    assert f"cifar10/20-plain/seed1 (the paper: 9.69): {command}\n" in output and "have a result" not in output
    calls = fake.calls()
    assert len(calls) == 5 and (fake.folder / "results/cifar10/56-plain/seed1/result.json").exists()
    assert run("1-fig6", SEEDS="1")[1].startswith("4 of 5 runs have a result; ")
    assert fake.calls()[5:] == ["results/cifar10/32-plain/seed1"]


def test_a_call_that_starts_nothing_says_so(fake):
    run = fake(FINISH)
    assert run("cifar10/20")[0] == 0
    assert run("cifar10/20") == (0, '1 of 1 runs have a result; SEEDS="6 7 8" or OUT=DIR makes others\n', "")
    for variables in ({}, {"LIST": "1"}):
        assert run("cifar10/20", SHARD="2/2", **variables) == (0, "SHARD=2/2 selects none of the 1 runs\n", "")
    assert len(fake.calls()) == 1
    status, output, errors = run("imagenet/50", LAUNCH="no-such-program")
    assert (status, output) == (2, "") and "there is no no-such-program: activate the environment" in errors


@pytest.mark.parametrize("out", ("a b", "*", "$(x) \"'"))
def test_folders_of_any_name(fake, out):
    """OUT is a folder of the current one, wherever run_all.sh lies."""
    run = fake(FINISH)
    elsewhere = fake.folder / "else where"
    elsewhere.mkdir()
    options = {"OUT": out, "cwd": elsewhere, "script": "../run_all.sh", "TMPDIR": str(elsewhere)}
    status, output, errors = run("cifar10/20", **options)
    assert (status, errors) == (0, "") and fake.calls() == [str(elsewhere / out / "cifar10/20/seed1")]
    assert (elsewhere / out / "cifar10/20/seed1/result.json").exists() and not (fake.folder / "results").exists()
    assert shlex.split(output.splitlines()[0])[-1] == fake.calls()[0]  # what is printed can be pasted
    assert run("cifar10/20", **options)[1].startswith("1 of 1 runs")
    (elsewhere / "link.sh").symlink_to("../run_all.sh")
    assert run("cifar10/20", **options | {"script": "./link.sh"})[1].startswith("1 of 1 runs")
    assert run("cifar10/20", **options | {"cwd": fake.folder, "script": "run_all.sh"})[0] == 0
    assert fake.calls()[1:] == [f"{out}/cifar10/20/seed1"]  # relative, as nobody's path belongs in config.json


def test_jobs_side_by_side(fake):
    """Each run once, two at a time: every one waits until another has begun, which one at a time would never see."""
    wait = 'for i in {1..200}; do [ "$(wc -l < calls)" -gt 1 ] && break; sleep 0.05; done\n'
    wait += '[ "$(wc -l < calls)" -gt 1 ] && ' + FINISH
    status, _, errors = fake(wait)("1-fig6", "1-table6", SEEDS="1", JOBS="2", OMP_NUM_THREADS="")
    assert (status, errors) == (0, "")
    calls = fake.calls()
    assert len(calls) == len(set(calls)) == 11 == len(list(fake.folder.glob("results/*/*/*/result.json")))


@pytest.mark.parametrize(
    "variables, expected",
    (
        ({"JOBS": "2"}, {"0", "1"}),  # of nvidia-smi's three
        ({"JOBS": "4"}, {"0", "1", "2"}),
        ({"JOBS": "2", "SHARD": "2/2"}, {"2", "0"}),
        ({"SHARD": "3/4"}, {"2"}),
        ({"JOBS": "2", "CUDA_VISIBLE_DEVICES": "5,GPU-7, 6"}, {"5", "GPU-7"}),
        ({"SHARD": "3/4", "CUDA_VISIBLE_DEVICES": "5,GPU-7, 6"}, {"6"}),
        ({"JOBS": "2", "CUDA_VISIBLE_DEVICES": ""}, {""}),
        ({"JOBS": "2", "CUDA_VISIBLE_DEVICES": "-1"}, {"-1"}),
    ),
)
def test_runs_are_spread_over_the_gpus(fake, variables, expected):
    """A run waits until as many run as there are jobs, so that each of them is in a slot of its own."""
    jobs = int(variables.get("JOBS", 1))
    fake.program("nvidia-smi", 'printf "0\\n1\\n2\\n"')
    wait = f'for i in {{1..200}}; do [ "$(wc -l < gpus)" -ge {jobs} ] && break; sleep 0.05; done\n'
    run = fake('echo "$CUDA_VISIBLE_DEVICES ${LOCAL_WORLD_SIZE-1}" >> gpus\n' + wait + FINISH)
    assert run("1-fig6", "1-table6", SEEDS="1", **variables)[0] == 0
    lines = [line.split(" ") for line in (fake.folder / "gpus").read_text().splitlines()]
    gpus = [gpu for gpu, _ in lines]
    assert {*gpus[:jobs]} == {*gpus} == expected and {share for _, share in lines} == {str(jobs)}


def test_a_machine_without_gpus_and_rows_that_launch_starts(fake):
    """Neither gets a GPU assigned: nvidia-smi says "failed" or is not there, and LAUNCH's rows keep all."""
    fake.program("nvidia-smi", "echo NVIDIA-SMI has failed, 9; exit 9")
    show = 'echo "${CUDA_VISIBLE_DEVICES-unset} $GOMP_SPINCOUNT" >> gpus; ' + FINISH
    run = fake(show)
    assert run("cifar10/20")[0] == 0 and run("cifar10/32", GOMP_SPINCOUNT="7")[0] == 0
    fake.program("nvidia-smi", "echo 0; echo 1")
    fake.program("my torchrun", 'echo "$1" >> launched; exec python "$@"')
    assert run("imagenet/50", LAUNCH="'my torchrun' --x")[0] == 0
    assert run("imagenet/101", JOBS="2", CUDA_VISIBLE_DEVICES="4,5")[0] == 0
    lines = (fake.folder / "gpus").read_text().splitlines()
    assert lines == ["unset 2000", "unset 7", "unset 2000", "4 2000"]
    assert (fake.folder / "launched").read_text() == "--x\n"


def test_ctrl_c_stops_every_job(fake):
    run = 'trap "echo $out >> stopped; exit 143" TERM; touch "$out/trap"\nfor i in {1..600}; do sleep 0.1; done'
    fake(run)
    process = start(cwd=fake.folder, path=fake.folder / "bin", HOME=str(fake.folder), JOBS="3")
    while len(list(fake.folder.glob("results/*/*/*/trap"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped; the same command continues" in errors
    stopped = (fake.folder / "stopped").read_text().splitlines()
    assert len(fake.calls()) == 3 and sorted(fake.calls()) == sorted(stopped)


def test_a_row_that_another_program_runs_is_left_to_it(fake):
    status, output, errors = fake("exit 3")("20-plain")
    assert (status, errors) == (0, "")
    assert "cifar10/20-plain/seed1: left to the program that is running it" in output


def test_an_ensemble_names_the_runs_that_it_lacks(fake):
    run = fake(FINISH)
    for folder in ("34-B", "34-C", "50", "101"):
        (fake.folder / f"results/imagenet/{folder}/seed1").mkdir(parents=True)
        (fake.folder / f"results/imagenet/{folder}/seed1/result.json").write_text("{}")
    waits = "imagenet/ensemble/seed1 waits for the runs that it averages: "
    waits += "results/imagenet/152/seed1 results/imagenet/152/seed2\n"
    assert run("imagenet/ensemble") == (0, waits, "")
    assert run("imagenet/152", "imagenet/ensemble", JOBS="3")[0] == 0
    assert sorted(fake.calls()[:2]) == ["results/imagenet/152/seed1", "results/imagenet/152/seed2"]
    assert fake.calls()[2:] == ["results/imagenet/ensemble/seed1"]  # begun after the runs that it averages


def test_smoke_shows_what_failed_and_leaves_nothing(fake):
    temporary = fake.folder / "my tmp"
    temporary.mkdir()
    run = fake(f'echo "$out is odd"; case "$*" in *"--unit basic-plain"*) exit 4;; esac; {FINISH}')
    status, output, errors = run("cifar10/20", "cifar10/20-plain", SMOKE="1", TMPDIR=str(temporary))
    assert status == 1 and errors == "failed:\n  cifar10/20-plain/seed1 (exit status 4)\n"
    first, second = output.splitlines()
    assert first.startswith("cifar10/20/seed1: ran python cifar_train.py --depth 20 --unit basic --warmup 0 --seed 1 ")
    assert first.endswith(" --batch-size 8 --micro-batch 4 --depth 20 --iterations 4 --out cifar10/20/seed1")
    assert second == "cifar10/20-plain/seed1: cifar10/20-plain/seed1 is odd"
    assert list(temporary.iterdir()) == [] and not (fake.folder / "results").exists()


def test_smoke_of_a_real_row(tmp_path):
    """In small, from a temporary folder with a space in its name."""
    temporary = tmp_path / "my tmp"
    temporary.mkdir()
    status, output, errors = run_all("short/38-single-preact", SMOKE="1", TMPDIR=str(temporary))
    assert status == 0 and output.startswith("short/38-single-preact/seed1: ran python "), output + errors


def test_smoke_of_imagenet_divides_among_eight_processes(fake, parse, monkeypatch):
    run = fake('printf "%s\\n" "$@" > ../words; ' + FINISH)
    assert run("imagenet/200-preact", SMOKE="1", TMPDIR=str(fake.folder))[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = parse(imagenet_train, (fake.folder.parent / "words").read_text().splitlines())
    assert (args.depth, args.preact, args.images, args.test) == (200, True, 32, ["1-crop-320"])


# ImageNet's page


def test_commands_of_the_imagenet_page_are_rows():
    """What torchrun starts there in results/ is what LIST=1 prints."""
    page = (HERE / "docs" / "imagenet.md").read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"imagenet_train.py .*--out results/\S+", page)
    rows = [shlex.join(line.split()[3:]) for line in listed("imagenet")]
    assert commands and all(" ".join(command.split()) in rows for command in commands), commands


@pytest.mark.parametrize("stop", (False, True))
def test_the_slurm_script_comes_back_when_time_is_up_alone(tmp_path, stop):
    """With a torchrun that ends with 1: at once as after bad input, or asked to stop, as it is when the time is up."""
    page = (HERE / "docs" / "imagenet.md").read_text("utf-8")
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)[1]
    bin = tmp_path / "venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "activate").write_text("PATH=$PWD/venv/bin:$PATH\n")
    wait = "trap 'echo saved > saved; exit 1' TERM; touch started; for i in {1..600}; do sleep 0.05; done"
    for name, body in (("torchrun", wait if stop else "exit 1"), ("scontrol", 'echo "$@" > requeued')):
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    (tmp_path / "job").write_text(re.sub(r"(?m)^cd .*?(?= |$)", f"cd '{tmp_path}'", script))
    process = subprocess.Popen(["bash", tmp_path / "job"], env=os.environ | {"SLURM_JOB_ID": "7"}, cwd=tmp_path)
    while stop and not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    if stop:
        process.terminate()
    process.wait(timeout=30)
    assert (tmp_path / "saved").exists() == (tmp_path / "requeued").exists() == stop
    assert not stop or (tmp_path / "requeued").read_text() == "requeue 7\n"
