"""A run that was killed or stopped and started again ends at the same bits as one that was not."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint

HERE = pathlib.Path(__file__).parent
# Dropout, so that random numbers drawn in the net have to come back too; evaluated after 250 iterations and at the end.
RUN = (
    "--dataset synthetic --images 24 --depth 8 --unit basic-dropout-shortcut --batch-size 4 --iterations 300 "
    "--device cpu --checkpoint-seconds 0"
).split()


def begin(out):
    """Start a run in a process group of its own, its output in a file."""
    command = [sys.executable, "cifar_train.py", *RUN, "--out", str(out)]
    with open(f"{out}.printed", "a") as printed:
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=HERE, env=variables, stdout=printed, stderr=printed, start_new_session=True
        )


def complete(out):
    assert begin(out).wait(timeout=120) == 0, pathlib.Path(f"{out}.printed").read_text()
    return content(out)


def content(out):
    """All that a finished run leaves, but for clocks and memory."""
    state = checkpoint.load(out)
    state.pop("seconds")
    result = json.loads((out / "result.json").read_text())
    log = [line.rpartition(",")[0] for line in (out / "log.csv").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in state.pop("rows")]
    return state, {k: v for k, v in result.items() if k not in ("seconds", "peak_memory")}, log, rows


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return complete(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize("numbers", [(signal.SIGKILL, signal.SIGKILL), (signal.SIGTERM, signal.SIGINT)])
def test_stopped_twice_and_continued(undisturbed, numbers, tmp_path):
    out = tmp_path / "run"
    for file, number in zip(("checkpoint.previous.pt", "log.csv"), numbers, strict=True):  # early; after an evaluation
        process = begin(out)
        while not (out / file).exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, number)
        assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 128 + number)
        assert not (out / "result.json").exists()  # the run was not over, or this test would show nothing
        assert 0 < checkpoint.load(out)["iteration"] < 300
    assert equal(complete(out), undisturbed)
    if signal.SIGKILL not in numbers:
        assert pathlib.Path(f"{out}.printed").read_text().count("the same command continues it") == 2


def test_damaged_checkpoint_is_not_used(tmp_path):
    """Falls back to the one before; with none readable it stops and starts nothing anew."""
    run = checkpoint.Run.__new__(checkpoint.Run)
    run.folder, run.wrote = tmp_path, False
    assert checkpoint.load(tmp_path) is None
    for iteration in (1, 2):
        run.save({"iteration": iteration, "model": {"w": torch.full((1000,), float(iteration))}})
    assert checkpoint.load(tmp_path)["iteration"] == 2
    newest, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"
    whole = newest.read_bytes()
    at = whole.index(torch.full((1,), 2.0).numpy().tobytes() * 8)  # within the weights
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for damaged in (flipped, whole[:-100], whole[:50], b""):
        newest.write_bytes(damaged)
        assert checkpoint.load(tmp_path)["iteration"] == 1
    run.wrote = False  # a new sitting: what is damaged must not take the place of what is whole
    run.save({"iteration": 3, "model": {}})
    assert checkpoint.load(tmp_path)["iteration"] == 3
    newest.write_bytes(b"")
    assert checkpoint.load(tmp_path)["iteration"] == 1
    newest.unlink()  # killed between the two renames
    assert checkpoint.load(tmp_path)["iteration"] == 1
    previous.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        checkpoint.load(tmp_path)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """The disk fills up, or the program dies, before the rename: the old file is untouched."""
    path = tmp_path / "result.json"
    checkpoint.write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_json(path, {"new": 2})
    assert checkpoint.read_json(path) == {"old": 1}
