"""predict.py: the views and their average against the same by hand, EXIF, what is printed, pictures that are none."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import models
import predict
import units
import weights
from conftest import HERE

CLASSES = [f"kind {c}" for c in range(7)]


@pytest.fixture
def cifar_file(tmp_path):
    """A file of weights of a CIFAR net of 7 classes."""
    torch.manual_seed(1)
    about = {"depth": 8, "unit": "basic", "unit_args": {"option": "A"}, "classes": CLASSES, "size": 32}
    about |= {"mean": 255 * torch.rand(3, 32, 32), "std": torch.full((3, 1, 1), 64.0)}
    weights.save(models.cifar_resnet(8, units.Basic, 7), about, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def picture(path, width, height, seed=1, exif=None):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **({"exif": exif} if exif else {}))
    return path


def main(monkeypatch, capsys, *words):
    """(exit status, what predict.py prints, the lines of its error stream)."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    try:
        status = predict.main()
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err.splitlines()


def test_a_cifar_net_sees_the_centre(cifar_file, tmp_path):
    net, about = weights.load(cifar_file)
    pixels = np.array(Image.open(picture(tmp_path / "a.png", 40, 32)))[:, 4:36]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    with torch.no_grad():
        expected = net((image[None].double() - about["mean"]).float() / about["std"]).double().softmax(dim=1)[0]
    (found,) = predict.predict(net, about, [tmp_path / "a.png"])
    names, values = zip(*found["classes"], strict=True)
    assert names == tuple(CLASSES[c] for c in expected.argsort(descending=True)[:5])
    assert torch.allclose(torch.tensor(values).double(), expected.sort(descending=True).values[:5], atol=1e-6)


@pytest.mark.parametrize("protocol, views", [("1-crop", 1), ("1-crop-320", 1), ("10-crop", 10), ("multi-scale", 10)])
def test_an_imagenet_net_averages_the_views_of_a_protocol(protocol, views, tmp_path):
    torch.manual_seed(2)
    net = models.imagenet_resnet(18, units.Basic, 7).eval()
    about = {"classes": CLASSES, "size": 32} | weights.grey_levels(data.MEAN, data.STD)
    paths = [picture(tmp_path / "wide.png", 60, 40), picture(tmp_path / "high.png", 36, 50, seed=2)]
    seen = []
    net.register_forward_hook(lambda net, inputs, logits: seen.append(len(logits)))
    found = list(predict.predict(net, about, paths, protocol))
    assert sum(seen) == 2 * views
    for path, one in zip(paths, found, strict=True):
        with Image.open(path) as image, torch.no_grad():
            cut = [data.normalise(view[None]) for view in data.test_views(image, 0, protocol, 32)]
            cut += [view.flip(3) for view in cut] if views == 10 else []
            expected = torch.stack([net(view)[0].double().softmax(dim=0) for view in cut]).mean(dim=0)
        assert abs(dict(one["classes"])[CLASSES[expected.argmax()]] - expected.max()) < 1e-5


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_honoured_and_said(orientation, cifar_file, tmp_path, monkeypatch, capsys):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = picture(tmp_path / "turned.png", 60, 40, exif=exif)
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}[orientation]
    with Image.open(turned) as image:
        image.transpose(turn).save(tmp_path / "upright.png", exif=Image.Exif())
    status, out, _ = main(monkeypatch, capsys, cifar_file, turned, tmp_path / "upright.png")
    first, second = out.split(str(tmp_path / "upright.png"))
    assert status == 0 and first.startswith(f"{turned} (turned upright, as its EXIF data say)\n")
    assert first.splitlines()[1:] == second.splitlines()[1:] and len(second.splitlines()) == 6


def test_batches_change_nothing(cifar_file, tmp_path):
    net, about = weights.load(cifar_file)
    paths = [picture(tmp_path / f"{n}.png", 33 + n, 32, seed=n) for n in range(35)]
    together = list(predict.predict(net, about, paths))
    assert [found["picture"] for found in together] == paths
    for n in (0, 31, 32, 34):
        (alone,) = predict.predict(net, about, paths[n : n + 1])
        assert [name for name, _ in alone["classes"]] == [name for name, _ in together[n]["classes"]]
        assert np.allclose([p for _, p in alone["classes"]], [p for _, p in together[n]["classes"]], atol=1e-6)


def test_bad_pictures_are_named_and_the_others_predicted(cifar_file, tmp_path, monkeypatch, capsys):
    good = picture(tmp_path / "good.png", 40, 40)
    cut = tmp_path / "cut.jpg"
    picture(cut, 300, 300)
    cut.write_bytes(cut.read_bytes()[:9000])
    (tmp_path / "text.png").write_text("no picture")
    long = picture(tmp_path / "long.png", 5100, 50)
    bad = [cut, tmp_path / "text.png", tmp_path / "nowhere.png", tmp_path, long]
    status, out, errors = main(monkeypatch, capsys, cifar_file, *bad[:2], good, *bad[2:], "--json")
    assert status == 2 and len(errors) == 5
    assert all(error.startswith(f"{path} cannot be read: ") for path, error in zip(bad, errors, strict=True))
    assert errors[3].endswith(f"it is a folder; name its files ({tmp_path}/*)")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["picture"] for line in lines] == [str(path) for path in (*bad[:2], good, *bad[2:])]
    assert [len(line.get("classes", [])) for line in lines] == [0, 0, 5, 0, 0, 0]
    assert sum(p for _, p in lines[2]["classes"]) <= 1 and "problem" in lines[0]


def test_the_lines_for_another_program(tmp_path, monkeypatch, capsys):
    """As docs/weights.md has them."""
    torch.manual_seed(2)
    about = {"classes": CLASSES, "size": 32, "depth": 18, "unit": "basic", "unit_args": {"option": "B"}}
    net, about = models.imagenet_resnet(18, units.Basic, 7).eval(), about | weights.grey_levels(data.MEAN, data.STD)
    weights.save(net, about, tmp_path / "net.pth")
    (expected,) = predict.predict(net, about, [picture(tmp_path / "cat.jpg", 60, 40)], "1-crop")
    (lines,) = re.findall(r"```python\n(import sys.*?)```", (HERE / "docs/weights.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(lines.replace("REPOSITORY", str(HERE)).replace("FROM", "net.pth"), {})
    assert capsys.readouterr().out == f"{expected['classes'][0]}\n" and str(HERE) in sys.path


def test_names_that_are_not_text(cifar_file, tmp_path, monkeypatch, capsys):
    name = picture(tmp_path / "\udcff.png", 32, 32)
    status, out, _ = main(monkeypatch, capsys, cifar_file, name)
    assert status == 0 and "\\udcff.png\n" in out


def test_refusals(cifar_file, tmp_path, monkeypatch, capsys):
    good = picture(tmp_path / "good.png", 40, 40)
    for words, said in (
        ((cifar_file, good, "--test", "10-crop"), "10-crop is for ImageNet's nets"),
        ((tmp_path / "nothing", good), "there is no"),
        ((good, cifar_file), "good.png looks like a picture: the run or the file of weights comes first"),
        ((cifar_file, good, "--layout", "msra"), "begins with conv1_w"),
    ):
        status, out, (error,) = main(monkeypatch, capsys, *words)
        assert status == 2 and out == "" and said in error
