"""What data.py does, against second implementations: data sets and the folders that hold them, draws, augmentation,
test views, and the workers that load images. No test looks at a clock."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import os
import pathlib
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data

torch.set_num_threads(1)

HERE = pathlib.Path(__file__).parent
SHARED = HERE.parent / "shared"
CPU = torch.device("cpu")


def pictures(n, seed=0):
    """Random images and labels: every bit of them matters."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))
    return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(rng.integers(0, 10, n))


# CIFAR


def test_draws_are_a_pure_function_of_seed_and_epoch():
    draws = data.epoch_draws(1, 0, 100, "cpu").clone()
    data.epoch_draws.cache_clear()
    assert torch.equal(draws, data.epoch_draws(1, 0, 100, "cpu"))
    rng = np.random.default_rng((1, 0))
    assert draws.tolist() == [rng.permutation(100).tolist(), *(rng.integers(0, n, 100).tolist() for n in (9, 9, 2))]
    for row, values in zip(draws[1:], (range(9), range(9), range(2)), strict=True):
        assert set(row.tolist()) == set(values)
    others = [data.epoch_draws(seed, epoch, 100, "cpu") for seed, epoch in ((1, 1), (2, 0), (0, 1))]
    assert not any(torch.equal(draws[row], other[row]) for other in others for row in range(4))


def test_cifar_batches_are_one_endless_stream():
    stream = torch.cat([data.epoch_draws(5, epoch, 10, "cpu") for epoch in range(9)], dim=1)
    for size in (1, 4, 7, 10, 25):  # 25: a batch of more than two epochs
        for t in range(90 // size):
            assert torch.equal(data.batch_draws(5, t, size, 10, "cpu"), stream[:, t * size : (t + 1) * size])


def test_augmentation_is_subtract_pad_crop_flip():
    images, _ = pictures(6)
    for recipe in ("paper", "resnet-1k-layers"):
        mean, std = data.normalisation(images, recipe)
        padded = torch.nn.functional.pad((images.float() - mean) / std, (4, 4, 4, 4))
        draws = torch.tensor([[0, 5, 5, 2, 2], [4, 0, 8, 3, 3], [4, 0, 8, 7, 7], [0, 0, 1, 1, 0]])
        views = data.augment(data.every_crop(images), data.every_crop(mean), std, draws)
        assert views.is_contiguous(memory_format=torch.channels_last) and views.dtype == torch.float32
        for view, (index, row, column, flip) in zip(views, draws.T.tolist(), strict=True):
            crop = padded[index, :, row : row + 32, column : column + 32]
            assert torch.equal(view, crop.flip(2) if flip else crop)
        if recipe == "paper":
            undivided = data.augment(data.every_crop(images), data.every_crop(mean), None, draws)
            assert torch.equal(undivided, views) and std.eq(1).all()
        assert torch.equal(views[0], ((images[0].float() - mean) / std))  # no shift at (4, 4)


def test_normalisation():
    images, _ = pictures(50)
    pixels = images.double()
    mean, std = data.normalisation(images, "paper")
    torch.testing.assert_close(mean.double(), pixels.mean(dim=0), rtol=1e-6, atol=0)
    assert mean.shape == (3, 32, 32) and std.eq(1).all()
    mean, std = data.normalisation(images, "resnet-1k-layers")
    torch.testing.assert_close(mean[:, 0, 0].double(), pixels.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.flatten().double(), pixels.std(dim=(0, 2, 3), correction=0), rtol=1e-6, atol=0)


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the real CIFAR-10 does not lie beside the project")
def test_real_cifar10(tmp_path):
    subprocess.run([sys.executable, SHARED / "data" / "unpack_cifar10.py", tmp_path], check=True, capture_output=True)
    images, labels, test_images, test_labels = data.load_cifar("cifar10", tmp_path)
    assert images.shape == (50_000, 3, 32, 32) and test_images.shape == (10_000, 3, 32, 32)
    assert labels.bincount().tolist() == [5000] * 10 and test_labels.bincount().tolist() == [1000] * 10
    assert data.class_names("cifar10", tmp_path)[::9] == ["airplane", "truck"]
    mean, std = data.normalisation(images, "resnet-1k-layers")  # fb.resnet.torch's constants, to the digits it gives
    assert [round(m, 1) for m in mean[:, 0, 0].tolist()] == [125.3, 123.0, 113.9]
    assert [round(s, 1) for s in std.flatten().tolist()] == [63.0, 62.1, 66.7]
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(batch.read_bytes())
    content[1_000_000] ^= 1
    for broken in (content, content[:1_000_000], b""):
        batch.write_bytes(broken)
        with pytest.raises(ValueError, match="data_batch_3 is damaged"):
            data.load_cifar("cifar10", tmp_path)


def cifar100(folder, monkeypatch):
    """A folder of small files in the format of CIFAR-100's, which become the published ones. Returns the raw pixels."""
    from torchvision.datasets import CIFAR100

    folder.mkdir(parents=True)
    rng, raw, md5 = np.random.default_rng(0), {}, {}
    for name, n in (("train", 7), ("test", 3)):
        raw[name] = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {"data": raw[name], "fine_labels": list(range(90, 90 + n)), "coarse_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"name{i}" for i in range(100)]}))
    for name in ("train", "test", "meta"):
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    return raw


def test_cifar100(tmp_path, monkeypatch):
    """The pixels' order is that of the real files, channel by channel."""
    folder = tmp_path / "cifar-100-python"
    raw = cifar100(folder, monkeypatch)
    images, labels, test_images, test_labels = data.load_cifar("cifar100", tmp_path)
    assert torch.equal(images, torch.from_numpy(raw["train"]).view(7, 3, 32, 32))
    assert torch.equal(test_images, torch.from_numpy(raw["test"]).view(3, 3, 32, 32))
    assert images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [90, 91, 92, 93, 94, 95, 96] and test_labels.tolist() == [90, 91, 92]
    limited = data.load_cifar("cifar100", tmp_path, 2)
    assert all(map(torch.equal, limited, (images[:2], labels[:2], test_images[:2], test_labels[:2])))
    assert data.class_names("cifar100", tmp_path) == [f"name{i}" for i in range(100)]
    assert len(data.class_names("synthetic", None)) == data.CLASSES["synthetic"]
    for name in ("train", "meta"):
        content = bytearray((folder / name).read_bytes())
        content[200] ^= 1  # within the pixels or the names: it could still be read
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="train is damaged"):
        data.load_cifar("cifar100", tmp_path)
    with pytest.raises(ValueError, match="meta is damaged"):
        data.class_names("cifar100", tmp_path)


def downloads(monkeypatch, source):
    """Let torchvision's download of CIFAR be a copy of a folder; or an error."""
    from torchvision.datasets import cifar

    def copy(url, root, **more):
        if isinstance(source, Exception):
            raise source
        shutil.copytree(source, pathlib.Path(root, source.name))

    monkeypatch.setattr(cifar, "download_and_extract_archive", copy)


@pytest.mark.parametrize("number", (None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP))
def test_download_with_and_without_locks(tmp_path, monkeypatch, capsys, number):
    raw = cifar100(tmp_path / "source" / "cifar-100-python", monkeypatch)
    downloads(monkeypatch, tmp_path / "source" / "cifar-100-python")
    lock, locks = fcntl.flock, []

    def flock(file, operation):
        locks.append((pathlib.Path(file.name).parent, operation))
        if number:
            raise OSError(number, os.strerror(number))
        return lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        place = tmp_path / rank / "new"
        assert torch.equal(data.load_cifar("cifar100", place)[0].flatten(1), torch.from_numpy(raw["train"]))
        assert locks == [(place, fcntl.LOCK_EX)]
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if f"{place} cannot be locked" in line]
        assert len(said) == (number is not None and rank == "0") and f"{place} cannot" not in printed.out
        locks.clear()
    data.load_cifar("cifar100", place)
    assert locks == []  # nothing was missing


def test_a_download_that_fails(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    downloads(monkeypatch, OSError("no route to host"))
    (tmp_path / "file").touch()
    for place, reason in (("new", "no route to host"), ("file", "File exists")):
        with pytest.raises(ValueError, match=reason) as error:
            data.load_cifar("cifar10", tmp_path / place)
        for words in (CIFAR10.url, str(tmp_path / place / "cifar-10-batches-py/data_batch_1"), "--dataset synthetic"):
            assert words in str(error.value)


def test_synthetic_is_learnable_and_the_same_at_every_call(monkeypatch):
    images, labels, test_images, test_labels = data.synthetic_cifar(2000, 1000)
    assert images.dtype == torch.uint8 and images.shape == (2000, 3, 32, 32) and labels.bincount().min() > 100
    assert all(map(torch.equal, (images, labels), data.synthetic_cifar(2000, 1000)))
    means = torch.stack([images[labels == c].float().mean(dim=0) for c in range(10)])
    nearest = torch.cdist(test_images.float().flatten(1), means.flatten(1)).argmin(dim=1)
    assert (nearest == test_labels).float().mean() > 0.9
    blocks = images.unfold(2, 4, 4).unfold(3, 4, 4).int()  # of one colour, but for noise that never wraps around
    assert (blocks.amax(dim=(-2, -1)) - blocks.amin(dim=(-2, -1))).max() == 32
    monkeypatch.setattr(data, "synthetic_cifar", lambda *sizes: sizes)
    assert data.load_cifar("synthetic", None) == (50_000, 10_000) and data.load_cifar("synthetic", None, 7) == (7, 7)


# ImageNet: reading and views


def photograph(width=500, height=375, seed=0):
    """Smooth colours with some noise: like a photograph to JPEG and to a scaling."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray((np.array(coarse) // 2 + rng.integers(0, 32, (height, width, 3))).astype(np.uint8))


def stored(image, path, **more):
    image.save(path, **more)
    return Image.open(path)


def near(ours, theirs, levels=2):
    """Equal up to so many grey levels: where a second implementation rounds elsewhere."""
    ours, theirs = (x if torch.is_tensor(x) else torch.from_numpy(np.array(x)) for x in (ours, theirs))
    return ours.shape == theirs.shape and (ours.int() - theirs.int()).abs().max() <= levels


def test_decoding(tmp_path, monkeypatch):
    """The bits of PIL's own decoder for every mode and format, and at a reduced size where the crop allows it."""
    for name, mode in (("grey.jpg", "L"), ("cmyk.jpg", "CMYK"), ("colour.JPEG", "RGB"), ("named.png.jpeg", "RGB")):
        kind = "PNG" if "png" in name else "JPEG"
        image = stored(photograph().convert(mode), tmp_path / name, format=kind)
        expected = torch.from_numpy(np.array(Image.open(tmp_path / name).convert("RGB")))
        assert torch.equal(data.decode(image, 1), expected) and expected.dtype == torch.uint8
        with monkeypatch.context() as patch:  # without torchvision's decoder
            patch.setattr(data, "jpeg_decoder", lambda: None)
            assert torch.equal(data.decode(Image.open(tmp_path / name), 1), expected)
    for ratio, size in ((1.9, (375, 500)), (2, (188, 250)), (3.9, (188, 250)), (4, (94, 125)), (8.5, (47, 63))):
        image = Image.open(tmp_path / "colour.JPEG")
        assert data.decode(image, ratio).shape == (*size, 3), ratio
    small = data.scaled(Image.open(tmp_path / "colour.JPEG"), 64)[0]  # from a quarter of the size
    whole = Image.open(tmp_path / "colour.JPEG").convert("RGB").resize((85, 64), Image.BICUBIC)
    assert small.shape == (64, 85, 3) and (small.float() - torch.from_numpy(np.array(whole)).float()).abs().mean() < 2


def test_scale_is_scale_then_crop():
    """[1] Section 3.4, against PIL; the draws cover their ranges to the ends."""
    image, shorts = photograph(), set()
    for seed in range(40):
        view = data.scale(image, 224, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        short = int(rng.integers(256, 481))
        shorts.add(short)
        resized = image.resize((round(500 * short / 375), short), Image.BICUBIC)
        top, left = int(rng.integers(0, short - 224 + 1)), int(rng.integers(0, resized.width - 224 + 1))
        assert near(view, resized.crop((left, top, left + 224, top + 224))), seed
    assert 256 <= min(shorts) < 270 and 465 < max(shorts) <= 480
    tall = data.scale(photograph(100, 300), 64, np.random.default_rng(0))
    assert tall.shape == (64, 64, 3)


def test_scale_aspect_is_the_torch_codes():
    """fb.resnet.torch's RandomSizedCrop written again from paper.md, crop by PIL; and its fall-back."""
    image = photograph()
    for seed in range(40):
        view = data.scale_aspect(image, 112, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        while True:
            area, aspect = rng.uniform(0.08, 1.0) * 375 * 500, rng.uniform(3 / 4, 4 / 3)
            width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if rng.random() < 0.5:
                width, height = height, width
            if width <= 500 and height <= 375:
                break
        left, top = rng.integers(0, 500 - width + 1), rng.integers(0, 375 - height + 1)
        expected = image.crop((left, top, left + width, top + height)).resize((112, 112), Image.BICUBIC)
        assert near(view, expected), seed

    class Widest(np.random.Generator):
        """The whole area each time, which no shape but the image's own can have."""

        def uniform(self, low, high):
            return high

    long = photograph(400, 100)
    fallback = data.scale_aspect(long, 64, Widest(np.random.PCG64(0)))
    assert near(fallback, long.resize((256, 64), Image.BICUBIC).crop((96, 0, 160, 64)))
    fitting = photograph(200, 150)  # of the widest shape: a crop may be the whole image
    whole = data.scale_aspect(fitting, 64, Widest(np.random.PCG64(0)))
    assert near(whole, fitting.resize((64, 64), Image.BICUBIC))


def test_what_is_decoded_at_a_reduced_size_is_never_enlarged(tmp_path, monkeypatch):
    """A view is computed from at least as many pixels as it has, wherever the picture has them."""
    photograph().save(tmp_path / "large.jpg")
    resize, reduced = data.resize, []

    def checked(pixels, height, width):
        assert pixels.shape[0] >= height and pixels.shape[1] >= width
        return resize(pixels, height, width)

    def decoded(image, ratio):
        pixels = decode(image, ratio)
        reduced.append(round(375 / pixels.shape[0]))
        return pixels

    decode = data.decode
    monkeypatch.setattr(data, "resize", checked)
    monkeypatch.setattr(data, "decode", decoded)
    for seed in range(30):
        data.scale_aspect(Image.open(tmp_path / "large.jpg"), 30 + seed, np.random.default_rng(seed))
    for crop in (12, 30, 64):
        data.test_views(Image.open(tmp_path / "large.jpg"), 0, "multi-scale", crop)
    assert {*reduced[:-3]} == {2, 4, 8} and reduced[-3:] == [8, 4, 2]


def test_a_view_is_a_pure_function_of_seed_epoch_and_index():
    image = photograph()

    def views(**more):
        words = {"epoch": 1, "index": 2, "augment": "scale", "crop": 32, "seed": 3} | more
        return data.augmented(image, **words)

    pixels, draws = views()
    assert pixels.shape == (32, 32, 3) and draws.shape == (3,)
    again = views()
    assert torch.equal(pixels, again[0]) and torch.equal(draws, again[1])
    for other in ({"epoch": 2}, {"index": 3}, {"seed": 4}):
        assert not torch.equal(draws, views(**other)[1])
    rng = np.random.default_rng((3, 1, 3))
    plain = data.scale(image, 32, rng)
    assert torch.equal(draws, torch.from_numpy(rng.normal(0, 0.1, 3)).float())
    flips = 0
    for index in range(60):
        rng = np.random.default_rng((3, 1, 1 + index))
        plain, view = data.scale(image, 32, rng), views(index=index)[0]
        assert torch.equal(view, plain) or torch.equal(view, plain.flip(1))
        flips += torch.equal(view, plain.flip(1))
    assert 15 < flips < 45
    draws = torch.stack([views(index=i, augment="scale-aspect")[1] for i in range(200)])
    assert draws.shape == (200, 9) and 0.6 <= draws[:, 3:6].min() < 0.63 and 1.37 < draws[:, 3:6].max() <= 1.4
    assert len({tuple(order.tolist()) for order in draws[:, 6:]}) == 6 and 0.08 < draws[:, :3].std() < 0.12


def test_colours_are_the_torch_codes():
    """ColorJitter, Lighting and ColorNormalize of fb.resnet.torch, image by image and step by step."""
    pixels = torch.from_numpy(np.stack([np.array(photograph(40, 30, seed)) for seed in range(12)]))
    rng = np.random.default_rng(0)
    orders = [rng.permutation(3) for _ in range(12)]
    draws = np.stack([np.concatenate([rng.normal(0, 0.1, 3), rng.uniform(0.6, 1.4, 3), order]) for order in orders])
    ours = data.normalise(pixels, torch.from_numpy(draws).double())
    assert ours.is_contiguous(memory_format=torch.channels_last)
    vectors = np.array([(-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203)])
    values, mean, std = (0.2175, 0.0188, 0.0045), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for i, order in enumerate(orders):
        x = pixels[i].permute(2, 0, 1).double() / 255
        for kind in order:
            grey = (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).expand(3, -1, -1)
            other = [torch.zeros_like(x), torch.full_like(x, grey.mean()), grey][kind]
            x = x * draws[i, 3 + kind] + other * (1 - draws[i, 3 + kind])
        for c in range(3):
            x[c] += sum(vectors[c][j] * draws[i, j] * values[j] for j in range(3))
            x[c] = (x[c] - mean[c]) / std[c]
        torch.testing.assert_close(ours[i].double(), x, rtol=0, atol=1e-4)
    lighting = data.normalise(pixels, torch.from_numpy(draws[:, :3]).double())
    unlit = data.normalise(pixels)
    shift = torch.from_numpy(draws[:, :3] * values @ vectors.T / std)
    torch.testing.assert_close((lighting - unlit).double().mean(dim=(2, 3)), shift, rtol=0, atol=1e-4)
    assert abs(unlit[0, 0, 0, 0].item() - (pixels[0, 0, 0, 0].item() / 255 - 0.485) / 0.229) < 1e-5


def test_imagenet_batches_are_one_endless_stream():
    """Of every process its own micro-batches; from any iteration on; each epoch's images once."""
    stream = [(e, int(i)) for e in range(9) for i in np.random.default_rng((5, e)).permutation(10)]
    for world in (1, 2, 4):
        for begin in (0, 3):
            got = {}
            for rank in range(world):
                mine = range(rank * 4 // world, (rank + 1) * 4 // world)
                batches = data.image_batches(5, 10, 12, 3, mine, begin)
                for iteration in range(begin, 7):
                    for part in mine:
                        got[iteration, part] = next(batches)
            assert sum([got[key] for key in sorted(got)], []) == stream[begin * 12 : 7 * 12]


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the pictures do not lie beside the project")
@pytest.mark.parametrize("crop", (224, 64))
def test_every_size_of_image_passes(crop):
    """80 x 60 to 1024 x 768, one greyscale: every augmentation and every protocol."""
    images = data.ImageFiles(SHARED / "data" / "imagenet-sizes")
    assert len(images) == 50
    for index in range(len(images)):
        for augment in data.AUGMENT:
            with images.open(index) as image:
                pixels, _ = data.augmented(image, 0, index, augment, crop, 1)
            assert pixels.shape == (crop, crop, 3) and pixels.dtype == torch.uint8
        for protocol, count in (("1-crop", 1), ("1-crop-320", 1), ("10-crop", 5), ("multi-scale", 5)):
            with images.open(index) as image:
                width, height = image.size
                views = data.test_views(image, index, protocol, crop)
            side = round(320 * crop / 224) if protocol == "1-crop-320" else crop
            assert len(views) == count
            if protocol != "multi-scale":
                assert {view.shape for view in views} == {(side, side, 3)}
            else:
                assert [min(view.shape[:2]) for view in views] == [
                    round(s * crop / 224) for s in (224, 256, 384, 480, 640)
                ]
                for view in views:
                    assert abs(view.shape[1] / view.shape[0] - width / height) < 0.03 * width / height


def test_the_views_of_the_protocols():
    image = photograph()
    whole = {
        short: np.array(image.resize((round(500 * short / 375), short), Image.BICUBIC))
        for short in (224, 256, 320, 384, 480, 640)
    }
    (view,) = data.test_views(image, 0, "1-crop", 224)
    assert near(view, whole[256][16:240, 58:282])  # 341 wide: (341 - 224) // 2
    (view,) = data.test_views(image, 0, "1-crop-320", 224)
    assert near(view, whole[320][:, 53:373])
    views = data.test_views(image, 0, "10-crop", 224)
    corners = [(0, 0), (0, 117), (32, 0), (32, 117), (16, 58)]
    for view, (top, left) in zip(views, corners, strict=True):
        assert near(view, whole[256][top : top + 224, left : left + 224])
    views = data.test_views(image, 0, "multi-scale", 224)
    for view, short in zip(views, (224, 256, 384, 480, 640), strict=True):
        assert near(view, whole[short])
    assert [name for name, (*_, flips) in data.PROTOCOLS.items() if flips] == ["10-crop", "multi-scale"]


def test_synthetic_images_are_learnable_and_the_same_at_every_call():
    train, val = data.load_imagenet("synthetic", None, 200)
    assert len(train) == 200 and len(val) == 40 and train.classes == val.classes and len(val.classes) == 10
    stack = [torch.stack([torch.from_numpy(np.array(s.open(i))) for i in range(len(s))]).float() for s in (train, val)]
    again = data.load_imagenet("synthetic", None, 200)[0].open(7)
    assert torch.equal(stack[0][7], torch.from_numpy(np.array(again)).float())
    assert torch.cdist(stack[1].flatten(1), stack[0].flatten(1)).min() > 100  # no image is in both
    assert [len(images) for images in data.load_imagenet("synthetic", None, 6)] == [6, 2]
    means = torch.stack([stack[0][train.labels == c].mean(dim=0).flatten() for c in range(10)])
    nearest = torch.cdist(stack[1].flatten(1), means).argmin(dim=1)
    assert (nearest.numpy() == val.labels).mean() > 0.9


# ImageNet: odd pictures


def test_pictures_of_many_kinds_are_read(tmp_path):
    """As PIL converts them, but with 16 bits scaled to 8, and white where they are transparent; of an animation the
    first frame; EXIF turns nothing."""
    image = photograph(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    sixteen = np.array(image.convert("L")).astype(np.uint16) * 257
    frames = {"save_all": True, "append_images": [photograph(40, 30, 1)]}
    half, hidden = Image.new("L", (40, 30), 0), image.convert("RGBA")
    half.paste(255, (0, 0, 20, 30))
    hidden.putalpha(half)
    palette = image.convert("P")
    paper = np.where(np.array(palette)[..., None] == 3, 255, np.array(palette.convert("RGB")))
    kinds = {
        "16-bit.png": (Image.fromarray(sixteen), {}, np.array(image.convert("L").convert("RGB"))),
        "16-bit.tif": (Image.fromarray(sixteen.astype(">u2")), {}, np.array(image.convert("L").convert("RGB"))),
        "palette.png": (image.convert("P"), {}, None),
        "transparent.png": (image.convert("P"), {"transparency": 3}, paper),
        "two-colours.png": (image.convert("1"), {}, None),
        "alpha.png": (image.convert("RGBA"), {}, None),
        "hidden.png": (hidden, {}, np.array(Image.composite(image, Image.new("RGB", (40, 30), "white"), half))),
        "grey-alpha.png": (image.convert("LA"), {}, None),
        "cmyk.tif": (image.convert("CMYK"), {}, None),
        "animated.png": (image, frames, np.array(image)),
        "animated.webp": (image, frames | {"lossless": True}, np.array(image)),
        "gif.jpeg": (image, frames | {"format": "GIF"}, None),
        "turned.jpg": (image, {"exif": exif}, None),
        "progressive.jpg": (image, {"progressive": True}, None),
        "one-pixel.png": (photograph(1, 1), {}, None),
    }
    for name, (picture, options, expected) in kinds.items():
        opened = stored(picture, tmp_path / name, **options)
        expected = np.array(Image.open(tmp_path / name).convert("RGB")) if expected is None else expected
        pixels = data.decode(opened, 1)
        assert pixels.dtype == torch.uint8 and np.array_equal(pixels, expected), name
        assert data.augmented(Image.open(tmp_path / name), 0, 0, "scale-aspect", 32, 1)[0].shape == (32, 32, 3), name
    narrow = stored(photograph(1, 80), tmp_path / "narrow.png")
    assert data.augmented(narrow, 0, 0, "scale", 32, 1)[0].shape == (32, 32, 3)
    assert [tuple(view.shape) for view in data.test_views(narrow, 0, "multi-scale", 32)][0] == (2560, 32, 3)


def test_pictures_that_are_refused_by_name(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    photograph().save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    for name, part in (("cut", content[:-100]), ("half", content[: len(content) // 2]), ("empty", b""), ("text", b"a")):
        (folder / f"{name}.jpg").write_bytes(part)
    photograph(1, 500).save(folder / "thin.png")
    Image.fromarray(np.ones((40, 40), dtype=np.float32)).save(folder / "float.tif")
    Image.fromarray(np.ones((40, 40), dtype=np.int32)).save(folder / "integer.tif")
    images = data.ImageFiles(tmp_path)
    refused = {}
    for crop in (224, 16):  # JPEG files as a whole and at a reduced size
        for index in range(len(images)):
            view = functools.partial(data.test_views, protocol="1-crop", crop=crop)
            try:
                data.make_batch(images, view, data.test_batch, [(index,)])
            except ValueError as error:
                name = pathlib.Path(images.name(index))
                assert str(error).startswith(f"{name} cannot be read: ") and "whole copy" in str(error)
                refused.setdefault(name.stem, []).append(str(error))
    assert sorted(refused) == ["cut", "empty", "float", "half", "integer", "text", "thin"]
    assert all(len(messages) == 2 for messages in refused.values())
    assert "1 x 500 pixels" in refused["thin"][0] and "mode F" in refused["float"][0]


# ImageNet: folders


def touch(root, *paths):
    for path in map(os.fsencode, paths):
        place = os.path.join(os.fsencode(root), path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        open(place, "wb").close()


def test_listing_is_image_folders_without_hidden_files(tmp_path, capsys, monkeypatch):
    """The order of torchvision's ImageFolder, which the bits of a run depend on."""
    from torchvision.datasets import ImageFolder

    names = ["b/2.JPEG", "b/10.jpg", "b/a-b/1.png", "b/a/z.webp", "b/a/c/0.tiff", "B/x.JPG", "a b/1.ppm", "b/a.b/0.bmp"]
    touch(tmp_path, *names, *(f"é/{i * 7 % 11}.pgm" for i in range(11)))
    ours, theirs = data.ImageFiles(tmp_path), ImageFolder(tmp_path)
    assert [(ours.name(i), ours.labels[i]) for i in range(len(ours))] == theirs.samples and len(ours) == 19
    assert ours.classes == theirs.classes == ["B", "a b", "b", "é"] and capsys.readouterr().err == ""
    hidden = ["b/._2.JPEG", "b/.cache/1.jpg", "b/a/.thumbnails/deep/1.png", ".ipynb_checkpoints/0.jpg", "._0.jpg"]
    hidden += ["__MACOSX/b/1.jpg", "@eaDir/1.jpg", "b/@eaDir/2.JPEG/SYNOPHOTO_THUMB_M.jpg", "lost+found/1.jpg"]
    touch(tmp_path, *hidden, "b/.DS_Store")
    again = data.ImageFiles(tmp_path)
    assert again.classes == ours.classes and again.names.tolist() == ours.names.tolist()
    assert capsys.readouterr().err == ""
    touch(tmp_path, "b/boxes.txt", "b/a/y.gif", "README.txt")  # the last is in no class
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        again = data.ImageFiles(tmp_path)
        assert again.names.tolist() == ours.names.tolist() and again.labels.tolist() == ours.labels.tolist()
        said = f"{tmp_path}: 2 files are left out, such as {tmp_path}/b/a/y.gif: the names of pictures end in .jpg, "
        said += ".jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp\n"
        assert capsys.readouterr().err == (said if rank == "0" else "")


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    touch(tmp_path, b"a/caf\xe9.JPEG")
    photograph(40, 40).save(tmp_path / os.fsdecode(b"a/caf\xe9.JPEG"))
    images = data.ImageFiles(tmp_path)
    view = view_of(data.test_views, "1-crop", 32)
    assert data.make_batch(images, view, data.test_batch, [(0,)])[1] == [(0, (32, 32, 3))]


def test_files_and_folders_without_end(tmp_path):
    """A pipe is not waited for, and links are not followed round and round."""
    touch(tmp_path, "a/0.jpg", "b/0.jpg")
    os.mkfifo(tmp_path / "a" / "1.jpg")
    with pytest.raises(ValueError, match="a/1.jpg cannot be read: it is no regular file"):
        data.make_batch(data.ImageFiles(tmp_path), None, None, [(1,)])
    with pytest.raises(ValueError, match=r"it is a folder; name its files \(.*/a/\*\)"):
        data.open_picture(tmp_path / "a")
    for link, target in (("a/up", ".."), ("b/self", "."), ("b/other", "../a")):
        os.symlink(target, tmp_path / link)
        if target != "../a":  # a link to elsewhere is followed
            with pytest.raises(ValueError, match="/self is .* once more|/up/.* is .* once more"):
                data.ImageFiles(tmp_path)
            os.unlink(tmp_path / link)
    assert len(data.ImageFiles(tmp_path)) == 5


def test_folders_that_are_not_imagenet(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{part}/n{c}/{i}.JPEG" for part in ("train", "val") for c in range(3) for i in range(2)))
    train, val = data.load_imagenet("imagenet", tmp_path)
    assert train.labels.tolist() == val.labels.tolist() == [0, 0, 1, 1, 2, 2] and train.classes == ["n0", "n1", "n2"]

    def refused(*words):
        with pytest.raises(ValueError) as error:
            data.load_imagenet("imagenet", tmp_path)
        assert all(word in str(error.value) for word in words), str(error.value)

    touch(tmp_path, "val/ILSVRC2012_val_00000007.JPEG", "val/ILSVRC2012_val_00000003.JPEG", "val/list.csv")
    refused(
        f"{tmp_path}/val holds 2 pictures beside its folders",
        "such as ILSVRC2012_val_00000003.JPEG",
        "docs/own-pictures.md; ImageNet's: docs/imagenet.md",
    )
    for path in (tmp_path / "val").glob("*.JPEG"):
        path.unlink()
    data.load_imagenet("imagenet", tmp_path)
    touch(tmp_path, "val/n9/.0.JPEG", "val/n9/list.txt")
    refused(f"{tmp_path}/val/n9 holds no pictures", "remove it if it is not a class")
    touch(tmp_path, "val/n9/0.jpg")
    refused(f"{tmp_path}: 1 class is not in both train and val (only in val: n9)")
    touch(tmp_path, *(f"train/m{c}/0.jpg" for c in range(6)))
    shutil.rmtree(tmp_path / "train" / "n0")
    refused("8 classes are not in both train and val (only in train: m0, m1, m2, m3, m4, ...; only in val: n0, n9)")
    scan = os.scandir

    def closed(place):
        if str(place).endswith("n2"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return scan(place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)  # root may read everything
        refused(f"the folder {tmp_path}/train/n2 cannot be read: Permission denied")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    refused(f"{tmp_path}/train holds no folders")
    (tmp_path / "train").rmdir()
    refused(f"there is no folder {tmp_path}/train", "docs/own-pictures.md", "--dataset synthetic")


def test_one_class_is_a_level_too_deep(tmp_path):
    touch(tmp_path, *(f"{part}/pictures/{name}/0.jpg" for part in ("train", "val") for name in ("leaf", "root")))
    with pytest.raises(ValueError, match="only one class, 'pictures': do your class folders lie one level too deep?"):
        data.load_imagenet("imagenet", tmp_path)


def test_pictures_in_train_and_val_are_warned_of(tmp_path, capsys):
    """Those of one class, name and content; and of pictures that lie beside train and val."""
    for path, content in (
        ("train/a/1.jpg", b"one"),
        ("train/a/deep/2.jpg", b"two"),
        ("train/b/3.jpg", b"three"),
        ("train/b/4.jpg", b"four"),
        ("val/a/1.jpg", b"oNe"),  # another picture of that name and size
        ("val/a/2.jpg", b"two"),  # another place
        ("val/b/1.jpg", b"one"),  # another class
    ):
        touch(tmp_path, path)
        (tmp_path / path).write_bytes(content)
    data.load_imagenet("imagenet", tmp_path)
    assert capsys.readouterr().err == ""
    for n, (copy, said) in enumerate((("a/deep/2.jpg", "1 picture is"), ("b/4.jpg", "2 pictures are"))):
        touch(tmp_path, f"val/{copy}")
        shutil.copy(tmp_path / "train" / copy, tmp_path / "val" / copy)
        data.load_imagenet("imagenet", tmp_path)
        first = f"{tmp_path}/val/a/deep/2.jpg: the error on them is too low\n"
        assert capsys.readouterr().err == f"warning: {said} in both train and val, such as {first}", n
    shutil.rmtree(tmp_path / "val/a/deep")
    (tmp_path / "val/b/4.jpg").unlink()
    touch(tmp_path, "5.PNG", "notes.txt")
    data.load_imagenet("imagenet", tmp_path)
    assert capsys.readouterr().err.startswith("warning: 1 picture is left out, such as 5.PNG")


@pytest.mark.parametrize("ending", ("\n", "", "\r\n"))
def test_the_lines_of_the_docs_sort_the_validation_images(tmp_path, ending):
    """With and without a last newline, and again after they were interrupted."""
    val = tmp_path / "data" / "imagenet" / "val"
    names = [f"ILSVRC2012_val_{i:08}" for i in range(4)]
    touch(val, *(f"{name}.JPEG" for name in names[:2]), f"n2/{names[2]}.JPEG", f"{names[3]}.JPEG")
    lines = ["ImageId,PredictionString", *(f"{name},n{i} 85 1 499 272 n{i} 0 0 1 1" for i, name in enumerate(names))]
    separator = "\r\n" if ending == "\r\n" else "\n"
    (val.parent / "LOC_val_solution.csv").write_bytes((separator.join(lines) + ending).encode())
    page = (HERE / "docs" / "imagenet.md").read_text()
    lines = re.search(r"cd data/imagenet/val && python - <<'END'\n(.*?)\nEND\n", page, re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", lines], cwd=val, check=True)
    images = data.ImageFiles(val)
    assert [images.name(i) for i in range(len(images))] == [f"{val}/n{i}/{name}.JPEG" for i, name in enumerate(names)]


# ImageNet: the workers that load images


def view_of(function, *words):
    """A view as load_views calls it, of a function whose last arguments are these."""
    return lambda image, *key: function(image, *key, *words)


class Numbers:
    """Images that are numbers; opening number 13 fails."""

    labels = np.arange(100) % 7

    def name(self, index):
        return f"image {index}"

    @contextlib.contextmanager
    def open(self, index):
        if index == 13:
            raise OSError("unlucky")
        yield index


def identity(image, *key):
    return image, key


def ignore(number):
    """A worker's start: SIGTERM must not end it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def children():
    """The processes that this one has started and not waited for, dead or alive, where the system tells."""
    return {pid for path in pathlib.Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.fixture(autouse=True)
def others():
    """Other tests of the same session may have started what goes on."""
    others.children = children()


def childless():
    """Has a test left no process behind?"""
    return children() <= others.children


def batches_of(n, size=3):
    return [[(7, index) for index in range(first, min(first + size, n))] for first in range(0, n, size)]


@pytest.mark.parametrize("workers", (0, 1, 2, 5))
def test_any_number_of_workers_makes_the_same_batches(workers, monkeypatch):
    """Of training and test views, of a list and a generator, in order; of one that never ends what is asked for."""
    images = data.load_imagenet("synthetic", None, 8)[0]
    train, test = view_of(data.augmented, "scale-aspect", 32, 1), view_of(data.test_views, "multi-scale", 32)
    kinds = [
        (train, data.train_batch, list(itertools.islice(data.image_batches(1, 8, 3, 3, range(1), 1), 4))),
        (test, data.test_batch, [[(0,), (5,)], [(2,)], []]),
    ]
    for view, stack, keys in kinds:
        for batches in (keys, iter(keys)):
            loaded = list(data.load_views(images, view, stack, batches, workers, CPU, ignore))
            for batch, batch_keys in zip(loaded, keys, strict=True):
                for part, wanted in zip(batch, data.make_batch(images, view, stack, batch_keys), strict=True):
                    if torch.is_tensor(part):
                        assert torch.equal(part, wanted) and part.dtype == wanted.dtype
                    else:
                        assert part == wanted
    stream = data.image_batches(3, 20, 4, 2, range(2), 0)
    keys = [key for batch in itertools.islice(data.image_batches(3, 20, 4, 2, range(2), 0), 7) for key in batch]
    stream = ([(epoch, index + 20) for epoch, index in batch] for batch in stream)  # 13 is not among them
    loader = data.load_views(Numbers(), identity, tuple, stream, workers, CPU, ignore)
    views = [view for batch in itertools.islice(loader, 7) for view in batch]
    assert views == [((index + 20, (epoch, index + 20)), (index + 20) % 7) for epoch, index in keys]
    kill, killed = os.kill, []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append(number) or kill(process, number))
    loader.close()
    assert childless() and killed == [signal.SIGKILL] * workers  # one that hangs heeds nothing else


@pytest.mark.parametrize("workers", (0, 1, 3))
def test_an_image_that_cannot_be_read_is_named(workers):
    loader = data.load_views(Numbers(), identity, tuple, batches_of(20), workers, CPU, ignore)
    assert [len(next(loader)) for _ in range(4)] == [3] * 4  # those before it come
    with pytest.raises(ValueError, match="^image 13 cannot be read: unlucky. Put a whole copy"):
        next(loader)
    assert childless()


def test_an_error_within_a_worker_is_told():
    def stack(views):
        raise MemoryError

    with pytest.raises(ValueError, match="MemoryError"):
        next(data.load_views(Numbers(), identity, stack, batches_of(3), 1, CPU, ignore))
    assert childless()


@pytest.mark.parametrize("when", ("before", "within the pickle", "within a tensor"))
def test_a_worker_that_is_killed_is_not_waited_for(monkeypatch, when):
    send, parent = data.send, os.getpid()

    def die(pipe, *parts):
        if parts and parts[0][0] == 4:
            if when == "within the pickle":
                pipe.write(pickle.dumps(list(parts))[:20])
            elif when == "within a tensor":
                pickle.dump([part.to("meta") for part in parts], pipe)
                pipe.write(b"1234567")
            pipe.flush()
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGKILL)
        send(pipe, *parts)

    monkeypatch.setattr(data, "send", die)
    stack = lambda views: (torch.tensor([index for (index, _), _ in views]),)  # noqa: E731
    loader = data.load_views(Numbers(), identity, stack, batches_of(12, 4), 2, CPU, ignore)
    assert next(loader)[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="a worker that loads images died"):
        next(loader)
    assert childless()


def test_workers_that_cannot_all_be_started(monkeypatch):
    """Neither are those that could left behind, nor their pipes."""
    fork, forks, descriptors = os.fork, [], os.listdir("/dev/fd")

    def few():
        if len(forks) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        forks.append(fork())
        return forks[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", few)
        loader = data.load_views(Numbers(), identity, tuple, batches_of(9), 4, CPU, ignore)
        with pytest.raises(ValueError, match="4 workers .* Resource temporarily unavailable.*: try fewer --workers"):
            next(loader)
    assert len(forks) == 2 and childless() and os.listdir("/dev/fd") == descriptors


def test_workers_end_when_their_parent_is_gone():
    """Each holds the writing end of a pipe; when none is left the pipe has ended."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:  # while a training's workers live, those of an evaluation are started
            batches = itertools.repeat([(0,)])
            loaders = [data.load_views(Numbers(), identity, tuple, batches, 3, CPU, ignore) for _ in range(2)]
            for loader in loaders:
                next(loader)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    os.wait()
    ready, _, _ = select.select([reading], [], [], 60)
    assert ready and os.read(reading, 1) == b""
    os.close(reading)


def test_workers_are_told_their_number_and_use_one_thread():
    started = []
    view = lambda image, *key: (started[0], torch.get_num_threads())  # noqa: E731
    torch.set_num_threads(2)
    try:
        loader = data.load_views(Numbers(), view, tuple, batches_of(12), 3, CPU, started.append)
        batches = list(loader)
    finally:
        torch.set_num_threads(1)
    assert [batch[0][0] for batch in batches] == [(0, 1), (1, 1), (2, 1), (0, 1)] and started == []


@pytest.mark.parametrize("device, workers", (("cpu", 1), ("cuda", 0), ("cuda", 1)))
def test_batches_for_a_gpu_are_pinned(monkeypatch, device, workers):
    empty, pinned = torch.empty, []

    def recorded(*size, pin_memory, **more):
        pinned.append(pin_memory)
        return empty(*size, **more)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(True) or tensor)
    monkeypatch.setattr(torch, "empty", recorded)
    stack = lambda views: (torch.arange(4).view(2, 2).T, "more", torch.zeros(2, 0))  # noqa: E731
    loader = data.load_views(Numbers(), identity, stack, batches_of(3), workers, torch.device(device), ignore)
    ((numbers, more, nothing),) = loader
    assert numbers.tolist() == [[0, 2], [1, 3]] and more == "more" and nothing.shape == (2, 0)
    assert pinned == [device == "cuda"] * 2


def test_views_of_one_size_are_stacked():
    examples = [([torch.full((2, 3, 3), i), torch.full((i, 2, 3), 10 + i)], i) for i in range(1, 4)]
    flat, views, labels = data.test_batch(examples)
    assert labels.tolist() == [1, 2, 3] and labels.dtype == torch.int64
    for places in (views, [[i, list(shape)] for i, shape in views]):  # as pin_memory of an older torch leaves them
        groups = data.same_size(flat, places)
        assert [(tuple(pixels.shape), which.tolist()) for pixels, which in groups] == [
            ((3, 2, 3, 3), [0, 1, 2]), ((1, 1, 2, 3), [0]), ((1, 2, 2, 3), [1]), ((1, 3, 2, 3), [2])
        ]  # fmt: skip
        assert groups[0][0][:, 0, 0, 0].tolist() == [1, 2, 3] and groups[3][0].eq(13).all()
