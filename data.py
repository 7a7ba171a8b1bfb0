"""CIFAR in memory, augmented by one gather per batch; ImageNet from folders, augmented by worker processes; the papers'
test views; and a synthetic stand-in for each data set."""

import contextlib
import fcntl
import filecmp
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import pickle
import signal
import stat
import sys
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

# CIFAR

CLASSES = {"cifar10": 10, "cifar100": 100, "synthetic": 10}


def load_cifar(dataset, root, limit=0):
    """The training and test images (N, 3, 32, 32) and labels (N,) of a data set: uint8 and int64, on the CPU.

    dataset: "cifar10" or "cifar100", downloaded to `root` if absent, or "synthetic", which needs no files.
    limit: how many images of each set, the first ones; 0 for all.
    Raises ValueError when a file is damaged, or is absent and cannot be downloaded.
    """
    if dataset == "synthetic":
        return synthetic_cifar(limit or 50_000, limit or 10_000)
    published = cifar(dataset)
    folder = pathlib.Path(root, published.base_folder)
    parts = published.train_list, published.test_list
    names = [name for part in parts for name, _ in part] + [published.meta["filename"]]
    missing = [folder / name for name in names if not (folder / name).exists()]
    if missing:
        download(published, root, missing[0])
    loaded = []
    for part in parts:
        contents = [read_cifar(folder / name, md5) for name, md5 in part]
        images = torch.from_numpy(np.concatenate([content["data"] for content in contents])).view(-1, 3, 32, 32)
        labels = [label for content in contents for label in content.get("labels") or content["fine_labels"]]
        loaded.append(images[: limit or None].contiguous(memory_format=torch.channels_last))
        loaded.append(torch.tensor(labels[: limit or None]))
    return tuple(loaded)


def class_names(dataset, root):
    """The published names of the classes of a data set that load_cifar has loaded, in the order of the labels. Raises
    ValueError when their file is damaged."""
    if dataset == "synthetic":
        return SyntheticImages.classes
    published = cifar(dataset)
    path = pathlib.Path(root, published.base_folder, published.meta["filename"])
    return read_cifar(path, published.meta["md5"])[published.meta["key"]]


def cifar(dataset):
    """torchvision's class of a data set, which knows its published files and their checksums."""
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]


def read_cifar(path, md5):
    """The content of one of CIFAR's pickled files, a dict. Raises ValueError unless it is the published file."""
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(
            f"{path} is damaged: its MD5 is not the published one. Delete {path.parent} and it is downloaded again"
        )
    return pickle.loads(content, encoding="latin1")


def download(published, root, missing):
    """Download one of torchvision's data sets. Of several programs that need it one does so while the others wait."""
    try:
        pathlib.Path(root).mkdir(parents=True, exist_ok=True)
        with open(pathlib.Path(root, ".download.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:  # Lustre and some NFS have no locks
                warn(f"{root} cannot be locked ({error}): start only one program until its data set is downloaded")
            published(root, download=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"there is no {missing}, and {published.url} could not be downloaded ({error}). Download it elsewhere and "
            f"unpack it in {root}, or name the folder that holds it with --data. --dataset synthetic needs no download"
        ) from None


def warn(sentence):
    """Print a sentence to the error stream, once for all the processes that torchrun started together."""
    if (os.environ.get("RANK") or "0") == "0":
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream that is closed, or full
            print(sentence, file=sys.stderr, flush=True)


def synthetic_cifar(train, test):
    """A learnable stand-in for CIFAR-10, the same at every call: each class is a smooth pattern of colours, which an
    image shows under a smooth pattern of its own and noise."""
    rng = np.random.default_rng(2016)
    patterns = rng.normal(0, 36, (10, 8, 8, 3)).astype(np.float32)
    labels = rng.integers(0, 10, train + test)
    coarse = 128 + patterns[labels] + rng.normal(0, 36, (train + test, 8, 8, 3)).astype(np.float32)
    images = coarse.clip(16, 239).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    images += rng.integers(-16, 17, images.shape, dtype=np.int8).view(np.uint8)  # stays within 0 ... 255
    images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    return images[:train], labels[:train], images[train:], labels[train:]


def normalisation(images, recipe):
    """What is subtracted from an image (3, 32, 32), and what it is then divided by (3, 1, 1), in grey levels 0 ... 255.

    "paper": the mean of each pixel, and 1 ([1] Section 4.2). "resnet-1k-layers": the mean and the standard deviation of
    each channel over all pixels of all images.
    """
    if recipe == "paper":
        return images.sum(dim=0, dtype=torch.int64).double().div(len(images)).float(), torch.ones(3, 1, 1)
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
    mean = (counts @ levels) / counts.sum(dim=1)
    std = ((counts @ levels**2) / counts.sum(dim=1) - mean**2).sqrt()
    return mean.float().view(3, 1, 1).expand(3, 32, 32), std.float().view(3, 1, 1)


def every_crop(images):
    """All 9 x 9 crops of images (..., 3, 32, 32) that are padded with 4 zeros on each side, and of their mirror images:
    a view (2, ..., 9, 9, 3, 32, 32)."""
    both = torch.stack([images, images.flip(-1)]).movedim(-3, -1)
    padded = pad(both, (0, 0, 4, 4, 4, 4)).contiguous()  # (2, ..., 40, 40, 3)
    return padded.unfold(-3, 32, 1).unfold(-3, 32, 1)


def augment(crops, mean_crops, std, draws):
    """The images (B, 3, 32, 32) that draws (4, B) pick: shifted by up to 4 pixels, half of them flipped ([1] Section
    4.2).

    crops and mean_crops: `every_crop` of the training images and of their mean. Subtracting one crop from the other is,
    bit for bit, subtracting the mean first and then padding with zeros.
    std: None stands for 1 and saves the division.
    """
    index, row, column, flip = draws
    column = torch.where(flip.bool(), 8 - column, column)  # in the mirror image
    images = crops[flip, index, row, column].float().sub_(mean_crops[flip, row, column])
    return images if std is None else images.div_(std)


@functools.lru_cache(maxsize=2)
def epoch_draws(seed, epoch, n, device):
    """The random numbers of an epoch over n images, a pure function of (seed, epoch): int64 (4, n). Its rows are the
    images' indices in random order, the crop's row, its column (0 ... 8; 4 is no shift), and 1 for a flip."""
    rng = np.random.default_rng((seed, epoch))
    draws = np.stack([rng.permutation(n), rng.integers(0, 9, n), rng.integers(0, 9, n), rng.integers(0, 2, n)])
    return torch.from_numpy(draws).to(device)


def batch_draws(seed, iteration, batch_size, n, device):
    """The draws (4, batch_size) of an iteration. The epochs' permutations, end to end, form one endless stream, and
    iteration t reads [t * batch_size, (t + 1) * batch_size) of it."""
    first, last = iteration * batch_size, (iteration + 1) * batch_size
    epochs = range(first // n, math.ceil(last / n))
    parts = [epoch_draws(seed, e, n, device)[:, max(first - e * n, 0) : last - e * n] for e in epochs]
    return torch.cat(parts, dim=1)


# ImageNet

# Of RGB in 0 ... 1, from fb.resnet.torch: the channels' mean and standard deviation, the colours' principal components
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

SYSTEM = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")  # the systems' own folders
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_imagenet(dataset, root, limit=0):
    """The training and the validation images: see `imagenet_part`. Raises ValueError also when their classes differ, or
    when there is only one."""
    train, val = (imagenet_part(dataset, root, part, limit) for part in ("train", "val"))
    if dataset == "synthetic":
        return train, val
    ours, theirs = {*train.classes}, {*val.classes}
    if ours != theirs:
        sides = ("train", sorted(ours - theirs)), ("val", sorted(theirs - ours))
        few = [(part, ", ".join(names[:5] + ["..."] * (len(names) > 5))) for part, names in sides if names]
        only = "; ".join(f"only in {part}: {names}" for part, names in few)
        differ = counted(len(ours ^ theirs), "class is", "classes are")
        raise ValueError(f"{root}: {differ} not in both train and val ({only})")
    if len(ours) == 1:
        raise ValueError(
            f"{root} holds only one class, {train.classes[0]!r}: do your class folders lie one level too deep?"
        )
    beside = sorted(file.name for file in os.scandir(root) if is_picture(file.name))
    if beside:
        are = counted(len(beside), "picture is", "pictures are")
        warn(f"warning: {are} left out, such as {beside[0]}: {root} holds them beside train and val, in no class")
    warn_of_copies(train, val)
    return train, val


def warn_of_copies(train, val):
    """Warn of validation pictures with the class, the name within it and the content of a training picture."""

    def same(a, b):
        try:
            return filecmp.cmp(a, b, shallow=False)  # reads only where the sizes agree
        except OSError:
            return False

    def places(images):  # {path within the folder: path}
        start = len(os.fsencode(images.folder))
        return {name[start:]: name for name in images.names.tolist()}

    theirs = places(val)
    pairs = [(name, theirs[place]) for place, name in places(train).items() if place in theirs]
    copies = [os.fsdecode(b) for a, b in pairs if same(a, b)]
    if copies:
        are = counted(len(copies), "picture is", "pictures are")
        warn(f"warning: {are} in both train and val, such as {copies[0]}: the error on them is too low")


def counted(n, one, many):
    return f"{n:,} {one if n == 1 else many}"


def imagenet_part(dataset, root, part, limit=0):
    """The images of a part, "train" or "val", to be opened by index.

    dataset: "imagenet", in root/train/<class>/ and root/val/<class>/, or "synthetic", which needs no files: `limit`
    training images of 10 classes and a fifth as many validation images.
    Raises ValueError when the folder does not have that form.
    """
    if dataset == "synthetic":
        return SyntheticImages(limit, 0) if part == "train" else SyntheticImages(math.ceil(limit / 5), limit)
    return ImageFiles(pathlib.Path(root, part))


class ImageFiles:
    """The pictures in a folder that holds one folder per class, at any depth. Hidden files and folders (.name), and
    folders of the system's own, are neither pictures nor classes. Raises ValueError when a folder cannot be read or is
    read twice, a class has no pictures, or pictures lie beside the folders of the classes."""

    def __init__(self, folder):
        if not folder.is_dir():
            raise ValueError(
                f"there is no folder {folder}: pictures are expected as train/<class>/*.jpg and val/<class>/*.jpg in "
                f"{folder.parent}. Name the folder that holds train and val with --data (your own pictures: "
                "docs/own-pictures.md); --dataset synthetic needs none"
            )
        _, classes, files = next(visible(folder))
        beside = sorted(filter(is_picture, files))
        if beside or not classes:
            held = "no folders"
            if beside:
                held = f"{counted(len(beside), 'picture', 'pictures')} beside its folders, such as {beside[0]}"
            raise ValueError(
                f"{folder} holds {held}: sort the pictures into a folder per class (docs/own-pictures.md; ImageNet's: "
                "docs/imagenet.md)"
            )
        self.folder, self.classes, paths, labels, others = folder, sorted(classes), [], [], []
        for label, name in enumerate(self.classes):
            files = [os.path.join(place, file) for place, _, files in sorted(visible(folder / name)) for file in files]
            pictures = [path for path in files if is_picture(path)]
            if not pictures:
                raise ValueError(f"{folder / name} holds no pictures: remove it if it is not a class")
            paths += pictures
            labels += [label] * len(pictures)
            others += sorted({*files} - {*pictures})
        if others:
            left = f"{counted(len(others), 'file is', 'files are')} left out, such as {others[0]}"
            warn(f"{folder}: {left}: the names of pictures end in {', '.join(SUFFIXES)}")
        self.labels = np.array(labels)
        self.names = np.array([os.fsencode(path) for path in paths])  # a list would be copied into every worker

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return os.fsdecode(self.names[index])

    def open(self, index):
        return open_picture(self.name(index))


def open_picture(path):
    """A picture's file as PIL opens it. Raises ValueError for a folder, for a pipe, which would be waited for, and its
    like."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ValueError(f"it is a folder; name its files ({path}/*)")
    if not stat.S_ISREG(mode):
        raise ValueError("it is no regular file")
    return Image.open(path)


def visible(folder):
    """os.walk without hidden files and folders. Raises ValueError when a folder cannot be read, or when links lead to
    one twice, as they might do without end."""
    real = set()

    def refuse(error):
        raise ValueError(f"the folder {error.filename} cannot be read: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in real:
            raise ValueError(f"the folder {place} is {os.path.realpath(place)} once more: remove the link to it")
        real.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SYSTEM]
        yield place, folders, sorted(name for name in files if not name.startswith("."))


def is_picture(path):
    return path.lower().endswith(SUFFIXES)


class SyntheticImages:
    """A learnable stand-in for n of ImageNet's images, the same at every call: each class is a smooth pattern of
    colours, which an image shows under a smooth pattern of its own."""

    classes = [f"class{c}" for c in range(10)]

    def __init__(self, n, first):
        self.first, self.labels = first, np.arange(n) % 10
        self.patterns = np.random.default_rng(2016).normal(0, 36, (10, 6, 8, 3))

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"synthetic image {index}"

    def open(self, index):
        own = np.random.default_rng((2016, self.first + index)).normal(128, 36, (6, 8, 3))
        pattern = (self.patterns[self.labels[index]] + own).clip(0, 255).astype(np.uint8)
        return Image.fromarray(pattern).resize((256, 192))


@functools.cache
def jpeg_decoder():
    """torchvision's decoder of JPEG files, path to uint8 (3, H, W): the same pixels as PIL's in two thirds of the time.
    None where torchvision has none: 0.29 has deprecated it."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None
    return lambda path: decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)), ImageReadMode.RGB)


def decode(image, ratio):
    """The pixels of an opened picture, uint8 (H, W, 3): of the first frame, and as stored, whatever its EXIF says. One
    that will be scaled down `ratio` times is decoded, if it is a JPEG, at 1/2, 1/4 or 1/8 of its size where that is
    enough, which is cheaper. Raises ValueError where it is unknown which value is white."""
    size = image.size
    if ratio >= 2:
        image.draft("RGB", (int(size[0] / ratio), int(size[1] / ratio)))
    if image.format == "JPEG" and image.size == size and jpeg_decoder():
        return jpeg_decoder()(image.filename).permute(1, 2, 0)
    if image.mode.startswith("I;16"):  # PIL would clip it to 8 bits
        return torch.from_numpy((np.array(image) >> 8).astype(np.uint8))[..., None].expand(-1, -1, 3)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of PIL's mode {image.mode}, which has no fixed white")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:  # what is transparent is white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB")))  # of greyscale, a palette or CMYK too


def resize(pixels, height, width):
    """Pixels (H, W, 3) scaled to (height, width, 3), bicubic with antialiasing."""
    pixels = pixels[None].permute(0, 3, 1, 2)
    return interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def scaled(image, *shorts):
    """The pixels of an opened picture, its shorter side scaled to each of `shorts`. Raises ValueError when it is more
    than 100 times as long as wide, as it would fill the memory."""
    width, height = image.size
    side = min(width, height)
    if max(width, height) > 100 * side:
        raise ValueError(f"{width} x {height} pixels are too long and thin")
    pixels = decode(image, side / max(shorts))
    return [resize(pixels, *(max(short, round(n * short / side)) for n in (height, width))) for short in shorts]


def scale(image, crop, rng):
    """[1] Section 3.4: the shorter side uniform in [256, 480], then a random 224 x 224 crop; all times crop / 224."""
    (pixels,) = scaled(image, int(rng.integers(round(256 * crop / 224), round(480 * crop / 224) + 1)))
    top, left = (int(rng.integers(0, n - crop + 1)) for n in pixels.shape[:2])
    return pixels[top : top + crop, left : left + crop]


def scale_aspect(image, crop, rng):
    """As fb.resnet.torch: 8 to 100 % of the area, with an aspect ratio uniform in [3/4, 4/3] and in half of the cases
    inverted, scaled to crop x crop; when 10 draws do not fit, the centre. (torchvision draws the ratio's logarithm.)"""
    width, height = image.size
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1) * width * height, rng.uniform(3 / 4, 4 / 3)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rng.random() < 0.5:
            w, h = h, w
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            pixels = decode(image, min(w, h) / crop)
            down, across = pixels.shape[0] / height, pixels.shape[1] / width  # below 1 if decoded at a reduced size
            rows = slice(round(top * down), round((top + h) * down))
            columns = slice(round(left * across), round((left + w) * across))
            return resize(pixels[rows, columns], crop, crop)
    return centre(*scaled(image, crop), crop)[0]


AUGMENT = {"scale": scale, "scale-aspect": scale_aspect}


def augmented(image, epoch, index, augment, crop, seed):
    """A training view of an opened image, a pure function of (seed, epoch, index): pixels (crop, crop, 3), flipped in
    half of the cases, and the draws for `normalise`: 3 normal numbers for the lighting and, with "scale-aspect", 3
    factors for the colours and the order in which they act."""
    rng = np.random.default_rng((seed, epoch, 1 + index))
    pixels = AUGMENT[augment](image, crop, rng)
    draws = rng.normal(0, 0.1, 3)
    if augment == "scale-aspect":
        draws = np.concatenate([draws, rng.uniform(0.6, 1.4, 3), rng.permutation(3)])
    return pixels.flip(1) if rng.random() < 0.5 else pixels, torch.from_numpy(draws).float()


# The papers' test views. A protocol is the shorter sides that the image is scaled to, the size of the crops, where they
# are taken, and whether their mirror images count as well.


def centre(pixels, size):
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return [pixels[top : top + size, left : left + size]]


def corners_and_centre(pixels, size):
    height, width = pixels.shape[:2]
    corners = [pixels[y : y + size, x : x + size] for y in (0, height - size) for x in (0, width - size)]
    return corners + centre(pixels, size)


def whole(pixels, size):
    """The whole image, for a net that is applied fully convolutionally."""
    return [pixels]


PROTOCOLS = {
    "1-crop": ([256], 224, centre, False),  # [1] Fig. 4, [2] Table 5 with test crop 224
    "1-crop-320": ([320], 320, centre, False),  # [2] Table 5
    "10-crop": ([256], 224, corners_and_centre, True),  # [1] Tables 2 and 3
    "multi-scale": ([224, 256, 384, 480, 640], 224, whole, True),  # [1] Tables 4 and 5
}


def test_views(image, index, protocol, crop):
    """The views (H, W, 3) of an opened image that a protocol averages over, without their mirror images. All sizes are
    times crop / 224."""
    shorts, size, cut, _ = PROTOCOLS[protocol]
    shorts, size = [round(s * crop / 224) for s in shorts], round(size * crop / 224)
    return [view for pixels in scaled(image, *shorts) for view in cut(pixels, size)]


def train_batch(examples):
    """Stack (view of `augmented`, label) pairs: pixels (N, H, W, 3), draws (N, 3 or 9), labels (N,)."""
    views, labels = zip(*examples, strict=True)
    pixels, draws = zip(*views, strict=True)
    return torch.stack(pixels), torch.stack(draws), torch.tensor(labels)


def test_batch(examples):
    """Of (views of `test_views`, label) pairs: all views' pixels in one flat tensor, (image within the batch, shape) of
    each view, and the labels (N,)."""
    views = [(i, view) for i, (views, _) in enumerate(examples) for view in views]
    flat = torch.cat([view.flatten() for _, view in views] or [torch.empty(0, dtype=torch.uint8)])
    labels = torch.tensor([label for _, label in examples], dtype=torch.int64)
    return flat, [(i, tuple(view.shape)) for i, view in views], labels


def same_size(flat, views):
    """Stack the views of `test_batch` that have the same size: [(pixels (K, H, W, 3), image of each (K,)), ...]."""
    groups = {}
    for (i, shape), pixels in zip(views, flat.split([math.prod(shape) for _, shape in views]), strict=True):
        groups.setdefault(tuple(shape), []).append((pixels.view(*shape), i))
    groups = [zip(*group, strict=True) for group in groups.values()]
    return [(torch.stack(pixels), torch.tensor(which)) for pixels, which in groups]


def make_batch(images, view, stack, keys):
    """stack([(view(image, *key), label), ...]), opening each image by the last part of its key, its index. Raises
    ValueError naming an image that cannot be read."""
    views = []
    for *key, index in keys:
        try:
            with images.open(index) as image:
                views.append((view(image, *key, index), int(images.labels[index])))
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(
                f"{images.name(index)} cannot be read: {error}. Put a whole copy or another picture in its place, and "
                "the same command goes on; or remove it and choose another --out"
            ) from None
    return stack(views)


def load_views(images, view, stack, batches, workers, device, start_worker):
    """Yield stack([(view(image, *key), label), ...]) for each batch of keys, in order; a key ends in an image's index.

    Forked processes, which call start_worker(number) first, take turns at making the batches; with 0 workers this one
    makes them. For a GPU the tensors are in pinned memory. Batches come through a pipe from each worker: unlike torch's
    DataLoader this takes no shared memory, which containers are short of, and no locks, which would stay locked when a
    worker is killed.
    Raises ValueError when an image cannot be read, a worker cannot be started, or one dies.
    """
    make, pinned, pipes = functools.partial(make_batch, images, view, stack), device.type == "cuda", {}
    if workers == 0:
        for keys in batches:
            yield [part.pin_memory() if pinned and torch.is_tensor(part) else part for part in make(keys)]
        return
    try:
        if isinstance(images, ImageFiles):
            jpeg_decoder()  # imported here, so that the workers share it
        for number in range(workers):
            own = itertools.islice(batches, number, None, workers)
            process, pipe = fork_worker(number, start_worker, make, own)
            pipes[process] = pipe
        for pipe in itertools.cycle(pipes.values()):
            batch = receive(pipe, pinned)
            if not batch:  # there are no more
                return
            if isinstance(batch[0], str):
                raise ValueError(batch[0])
            yield batch
    except OSError as error:
        raise ValueError(
            f"{workers} workers that load images cannot be started ({error}): try fewer --workers"
        ) from None
    except (EOFError, pickle.UnpicklingError):
        raise ValueError("a worker that loads images died, perhaps for lack of memory: try fewer --workers") from None
    finally:
        for process, pipe in pipes.items():
            pipe.close()
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored
                os.kill(process, signal.SIGKILL)  # a worker may ignore the other signals
                os.waitpid(process, 0)


def fork_worker(number, start_worker, make, batches):
    """Fork a process that sends make(keys) for each batch of keys, or why it cannot be made, and nothing at the end.
    Returns its process id and the pipe to read from. When its parent dies the pipe breaks, which ends it too."""
    reading, writing = map(open, os.pipe(), ("rb", "wb"))
    process = os.fork()
    if process:
        writing.close()
        return process, reading
    try:
        reading.close()
        torch.set_num_threads(1)
        start_worker(number)
        try:
            for keys in batches:
                send(writing, *make(keys))
            send(writing)
        except Exception as error:
            send(writing, str(error) or repr(error))
    finally:
        os._exit(0)


def send(pipe, *parts):
    """Write tensors and plain values to a pipe."""
    pickle.dump([part.to("meta") if torch.is_tensor(part) else part for part in parts], pipe)
    for tensor in filter(torch.is_tensor, parts):
        pipe.write(tensor.flatten().view(torch.uint8).numpy())
    pipe.flush()


def receive(pipe, pinned):
    """The parts that `send` wrote to a pipe. Raises EOFError or UnpicklingError when they are not complete."""
    parts = pickle.load(pipe)
    for i, part in enumerate(parts):
        if torch.is_tensor(part):
            parts[i] = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
            if pipe.readinto(parts[i].flatten().view(torch.uint8).numpy()) < parts[i].nbytes:
                raise EOFError
    return parts


def image_batches(seed, n, batch_size, micro_batch, mine, iteration):
    """Yield the (epoch, index) of a micro-batch's images for each micro-batch that is in `mine`, a range within an
    iteration's micro-batches, from an iteration on without end. The stream of images is as in `batch_draws`."""
    order = functools.lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(n))
    while True:
        for part in mine:
            first = iteration * batch_size + part * micro_batch
            places = (divmod(place, n) for place in range(first, first + micro_batch))
            yield [(epoch, int(order(epoch)[place])) for epoch, place in places]
        iteration += 1


def normalise(pixels, draws=None, scale=None):
    """Pixels (N, H, W, 3) as a net reads them, float (N, 3, H, W): minus the channels' mean, divided by their standard
    deviation, or by the (mean, std) of RGB in 0 ... 1 that `scale` is. Given the draws of `augmented`, the colours are
    changed first."""
    mean, std, grey, components = colours(pixels.device)
    mean, std = scale or (mean, std)
    images = pixels.permute(0, 3, 1, 2).float() / 255
    if draws is None:
        return (images - mean) / std
    if draws.shape[1] > 3:
        images = jitter(images, draws[:, 3:6], draws[:, 6:9].long(), grey)
    lighting = draws[:, :3].float() @ components  # AlexNet's: along the principal components of ImageNet's colours
    return (images + (lighting.view(-1, 3, 1, 1) - mean)) / std


@functools.cache
def colours(device):
    """On a device: the mean, the standard deviation and the weights of grey, each (3, 1, 1), and the principal
    components (3, 3) of the colours times their eigenvalues."""
    vectors = [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD, (0.299, 0.587, 0.114))]
    return *vectors, (torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES)).T.to(device)


def jitter(images, factors, order, grey):
    """Multiply brightness, contrast and saturation by factors (N, 3), in each image's own order (N, 3): blend the image
    with black, with the mean of its grey version, with its grey version."""
    for kind in order.T:
        factor = factors.gather(1, kind[:, None]).view(-1, 1, 1, 1)
        kind, shade = kind.view(-1, 1, 1, 1), (images * grey).sum(dim=1, keepdim=True)
        other = shade * (kind == 2) + shade.mean(dim=(2, 3), keepdim=True) * (kind == 1)
        images = factor * images + (1 - factor) * other
    return images


# Detection. An image's objects are boxes (N, 4), labels (N,) and difficult (N,): float32, int64 and bool. A box is
# (x1, y1, x2, y2) in pixels, half open, so that its width is x2 - x1; the label of classes[i] is 1 + i.

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


def load_detection(dataset, root, train="07+12", limit=0):
    """The images to train on, each of which has an object, and those to test on.

    dataset: "voc" is VOC 2007's test set and the trainval sets of 2007 (train "07") and 2012 ("07+12") under `root`,
    downloaded when absent; or root itself where it is a folder in VOC's layout, with the classes found in it: its
    trainval.txt and test.txt if it has both, or train.txt and val.txt. "coco" is a folder in COCO's layout: its parts
    train and val, or those of a year (train "2014" or "2017"). "synthetic" needs nothing. With a limit, the first
    images alone (synthetic: and a fifth as many to test on). Raises ValueError naming what is not as it must be.
    """
    if dataset == "synthetic":
        return Shapes(limit or 1000, 0), Shapes(math.ceil((limit or 1000) / 5), 10**6)
    root, classes = pathlib.Path(root), None
    if dataset == "coco":
        if not importlib.util.find_spec("pycocotools"):
            raise ValueError("COCO's mAP is measured by pycocotools, which is not installed: pip install pycocotools")
        year = "" if (root / "annotations/instances_train.json").exists() else train
        images, test = COCOImages(root, "train" + year, True, limit), COCOImages(root, "val" + year, False, limit)
        if (images.categories, images.classes) != (test.categories, test.classes):
            raise ValueError(f"{root / 'annotations'}: the categories of train{year} and val{year} differ")
        return images, test
    if (root / "annotations").is_dir() and not (root / "Annotations").is_dir():
        raise ValueError(f"{root / 'annotations'} is a folder in COCO's layout: add --dataset coco")
    if (root / "Annotations").is_dir():
        both = all((root / "ImageSets/Main" / f"{part}.txt").exists() for part in ("trainval", "test"))
        learn, test = [(root, "trainval" if both else "train")], (root, "test" if both else "val")
    else:
        learn, classes = [voc_part(root, "20" + year, "trainval") for year in train.split("+")], VOC_CLASSES
        test = voc_part(root, "2007", "test")
    images = VOCImages(learn, classes, True, limit)
    return images, VOCImages([test], images.classes, False, limit)


def voc_part(root, year, part):
    folder = root / "VOCdevkit" / f"VOC{year}"
    if not (folder / "ImageSets/Main" / f"{part}.txt").exists():
        from torchvision.datasets import VOCDetection

        kind = functools.partial(VOCDetection, year=year, image_set=part)
        kind.url = "http://host.robots.ox.ac.uk/pascal/VOC"
        download(kind, root, folder / "ImageSets/Main" / f"{part}.txt")
    return folder, part


class VOCImages(ImageFiles):
    """The images of [(folder, part of ImageSets/Main), ...] in VOC's layout. To train on: without their difficult
    objects, and then without the images that have none. Classes of None are those found, sorted."""

    def __init__(self, parts, classes, train, limit):
        files, found = [], {}
        for folder, part in parts:
            try:
                lines = os.fsdecode((folder / "ImageSets/Main" / f"{part}.txt").read_bytes()).splitlines()
            except OSError as error:
                raise ValueError(f"{folder} is not in VOC's layout: {error}") from None
            files += [folder / "JPEGImages" / f"{line.strip()}.jpg" for line in lines if line.strip()]
        for file in files[: limit or None]:
            objects = [o for o in voc_objects(file, classes) if not (train and o[2])]
            if objects or not train:
                found[file] = objects
        if all(difficult for objects in found.values() for _, _, difficult in objects):
            raise ValueError(f"no image of {parts[0][1]}.txt in {parts[0][0]} has an object that is not difficult")
        self.classes = classes or sorted({name for objects in found.values() for name, _, _ in objects})
        self.names, self.labels = np.array([os.fsencode(file) for file in found]), np.arange(len(found))
        self.objects = [as_objects(objects, self.classes) for objects in found.values()]


def voc_objects(file, classes):
    """[(class, box, difficult), ...] of an image file in VOC's layout. VOC counts pixels from 1 and its boxes contain
    both their ends; what lies outside the image is cut off."""
    path = where = file.parents[1] / "Annotations" / f"{file.stem}.xml"
    objects, sides = [], ("xmin", "ymin", "xmax", "ymax")
    try:
        with open_picture(file) as image:
            width, height = image.size
        for n, element in enumerate(ElementTree.parse(path).iterfind("object"), 1):
            where = f"{path}, object {n}"
            name = element.findtext("name", "").strip()
            if not name or name not in (classes or [name]):
                raise ValueError(f"its name {name!r} is none of {', '.join(classes or ['any class'])}")
            x1, y1, x2, y2 = said = [float(element.findtext(f"bndbox/{side}", "absent")) for side in sides]
            box = max(x1 - 1, 0), max(y1 - 1, 0), min(x2, width), min(y2, height)
            if not (box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"its box {said} contains no pixel of the image, which has {width} x {height}")
            objects.append((name, box, element.findtext("difficult", "0").strip() == "1"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    return objects


def as_objects(objects, classes):
    """The tensors that stand for [(class, box, difficult), ...] of an image."""
    boxes = torch.tensor([box for _, box, _ in objects]).view(-1, 4)
    labels = torch.tensor([1 + classes.index(one) for one, _, _ in objects], dtype=torch.int64)
    return boxes, labels, torch.tensor([difficult for _, _, difficult in objects], dtype=torch.bool)


class COCOImages(ImageFiles):
    """The images of annotations/instances_<part>.json in `root`, which lie in its folder <part>. To train on: without
    crowds and boxes that contain nothing, and then without the images that have no object.

    classes[i] is the category whose id is categories[i], and ids[i] the id of image i. truth: what pycocotools reads of
    images to test on.
    """

    def __init__(self, root, part, train, limit):
        path = where = root / "annotations" / f"instances_{part}.json"
        try:
            content = json.loads(path.read_bytes(), object_hook=without_polygons)
            names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
            images = {int(image["id"]): image for image in content["images"]}
            if len({*names.values()}) < len(content["categories"]) or len(images) < len(content["images"]):
                raise ValueError("two of its categories have the same id or name, or two of its images the same id")
            found, annotations, empty, over = {image: [] for image in [*images][: limit or None]}, [], 0, 0
            for n, a in enumerate(content["annotations"], 1):
                where = f"{path}, annotation {n}"
                image, category, crowd = int(a["image_id"]), int(a["category_id"]), int(a.get("iscrowd") or 0)
                if image not in images or category not in names:
                    raise ValueError("its image or its category is not in the file")
                x, y, w, h = map(float, a["bbox"])
                if not math.isfinite(x + y + w + h):
                    raise ValueError(f"its box is {a['bbox']}")
                if image not in found:
                    continue
                width, height = int(images[image]["width"]), int(images[image]["height"])
                box = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
                empty += not (box[0] < box[2] and box[1] < box[3])
                over += x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
                if box[0] < box[2] and box[1] < box[3] and not (train and crowd):
                    found[image].append((category, box, bool(crowd)))
                # Counted from 1, as pycocotools takes the id 0 for no object. Areas do not matter: all sizes count
                if not train:
                    place = {"id": n, "image_id": image, "category_id": category, "bbox": [x, y, w, h]}
                    annotations.append(place | {"iscrowd": crowd, "area": 0})
            where = path
            found = {image: objects for image, objects in found.items() if objects or not train}
            if all(crowd for objects in found.values() for _, _, crowd in objects):
                raise ValueError("none of its images has an object")
            self.sizes = [(int(images[image]["width"]), int(images[image]["height"])) for image in found]
            files = [root / part / images[image]["file_name"] for image in found]
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}): name the folder that holds COCO with --data, and see "
                "docs/detection.md for how it must lie there"
            ) from None
        except KeyError as error:
            raise ValueError(f"{where} is not in COCO's format: there is no {error} in it") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where} is not in COCO's format: {error}") from None
        for file in files:
            if not file.is_file():
                raise ValueError(f"there is no image {file}, which {path} names")
        if empty:
            warn(f"{path}: boxes without a pixel inside their image: {empty}{'; they are not trained on' * train}")
        if over > n / 10:
            warn(f"{path}: boxes that reach over the border: {over} of {n}; a bbox is [x, y, width, height], in pixels")
        self.categories, self.classes, self.ids = sorted(names), [names[n] for n in sorted(names)], list(found)
        self.names, self.labels = np.array([os.fsencode(file) for file in files]), np.arange(len(files))
        self.objects = [as_objects(objects, self.categories) for objects in found.values()]
        categories = [{"id": category, "name": name} for category, name in names.items()]
        self.truth = {"images": [{"id": n} for n in found], "annotations": annotations, "categories": categories}

    def open(self, index):
        image, (width, height) = super().open(index), self.sizes[index]
        if image.size != (width, height):
            raise ValueError(f"it has {image.width} x {image.height} pixels, and its boxes are of {width} x {height}")
        return image


def without_polygons(item):
    """An object of COCO's file without its outlines, which take most of the memory and are not used."""
    item.pop("segmentation", None)
    return item


class Shapes(SyntheticImages):
    """n learnable images of 128 x 128 pixels, made in memory, the same at every call: 1 to 3 shapes apart from each
    other, each about its class's colour, on a ground of smooth colours."""

    classes = ["cross", "disc", "ring", "square", "triangle"]
    colours = np.array([(40, 200, 210), (220, 40, 40), (230, 210, 40), (40, 190, 60), (50, 70, 220)])

    def __init__(self, n, first):
        self.first, self.labels = first, np.arange(n)
        self.pixels, self.objects = zip(*(self.draw(first + i) for i in range(n)), strict=True)

    def draw(self, index):
        rng = np.random.default_rng((2016, index))
        ground = Image.fromarray(rng.normal(128, 40, (5, 5, 3)).clip(0, 255).astype(np.uint8))
        pixels = np.array(ground.resize((128, 128), Image.Resampling.BICUBIC)).astype(np.int64)
        boxes, labels, wanted = np.zeros((0, 4), np.int64), [], rng.integers(1, 4)
        for kind in rng.integers(0, 5, 3 * wanted):  # places that are taken are passed over
            height, width = 2 * rng.integers(13, 33, 2) + 1  # odd: so a disc reaches the sides of its box
            x1, y1 = rng.integers(0, (129 - width, 129 - height))
            x2, y2 = x1 + width, y1 + height
            if len(boxes) < wanted and not ((boxes[:, :2] < (x2, y2)) & (boxes[:, 2:] > (x1, y1))).all(axis=1).any():
                y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
                r, arm = np.hypot(x, y), np.minimum(abs(x), abs(y))
                inside = (arm < 0.33, r < 1.001, abs(r - 0.78) < 0.221, r < 2, 2 * abs(x) < y + 1.001)[kind]
                pixels[y1:y2, x1:x2][inside] = self.colours[kind] + rng.normal(0, 20, 3)
                boxes, labels = np.vstack([boxes, (x1, y1, x2, y2)]), [*labels, 1 + kind]
        pixels = (pixels + rng.integers(-16, 17, pixels.shape)).clip(0, 255).astype(np.uint8)
        return pixels, (torch.from_numpy(boxes).float(), torch.tensor(labels), torch.zeros(len(labels)).bool())

    def open(self, index):
        return Image.fromarray(self.pixels[index])


def with_objects(image, epoch, index, objects, seed):
    """A training view of an opened image, a pure function of (seed, epoch, index): pixels (H, W, 3), its boxes and
    labels, half of them flipped."""
    pixels, (boxes, labels, _) = decode(image, 1), objects[index]
    if np.random.default_rng((seed, epoch, 1 + index)).random() < 0.5:
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        pixels, boxes = pixels.flip(1), torch.stack([pixels.shape[1] - x2, y1, pixels.shape[1] - x1, y2], dim=1)
    return pixels, boxes, labels
