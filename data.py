"""CIFAR in memory: read, normalised, and augmented by one gather a batch."""

import fcntl
import functools
import pathlib

import numpy as np
import torch
from torch.nn.functional import pad

CLASSES = {"cifar10": 10, "cifar100": 100, "synthetic": 10}


def load_cifar(dataset, root, limit=0):
    """The training and test images (N, 3, 32, 32) and labels (N,) of a data set, uint8 and int64, on the CPU.

    dataset: "cifar10", "cifar100", which are downloaded to `root` when absent, or "synthetic", which needs nothing.
    With a limit, only the first images of each set.
    Raises ValueError when a file is not the published one, or absent and not to be had.
    """
    if dataset == "synthetic":
        return synthetic_cifar(limit or 50_000, limit or 10_000)
    from torchvision import datasets
    from torchvision.datasets.utils import check_md5

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    folder = pathlib.Path(root, kind.base_folder)
    files = [(folder / name, md5) for name, md5 in kind.train_list + kind.test_list]
    files.append((folder / kind.meta["filename"], kind.meta["md5"]))
    missing = [path for path, _ in files if not path.exists()]
    if missing:
        download(kind, root, missing[0])
    for path, md5 in files:
        if not check_md5(path, md5):
            raise ValueError(
                f"{path} is damaged: its MD5 is not the published one. Delete {folder} and it is downloaded again"
            )
    images, labels = [], []
    for train in (True, False):
        part = kind(root, train)
        part.data, part.targets = part.data[: limit or None], part.targets[: limit or None]
        images.append(torch.from_numpy(np.ascontiguousarray(part.data)).permute(0, 3, 1, 2))  # channels_last in memory
        labels.append(torch.tensor(part.targets))
    return images[0], labels[0], images[1], labels[1]


def download(kind, root, missing):
    """Fetch a torchvision data set; of several programs that want it one does, the others wait."""
    pathlib.Path(root).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(root, ".download.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            kind(root, download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"there is no {missing}, and {kind.url} could not be downloaded ({error}). Download it elsewhere "
                f"and unpack it in {root}, or say with --data where it lies. --dataset synthetic needs no download"
            ) from None


def synthetic_cifar(train, test):
    """A learnable stand-in for CIFAR-10, the same at every call: each class is a smooth pattern of colours, seen
    through another smooth pattern of the image's own and noise."""
    rng = np.random.default_rng(2016)
    patterns = rng.normal(0, 36, (10, 8, 8, 3)).astype(np.float32)
    labels = rng.integers(0, 10, train + test)
    coarse = 128 + patterns[labels] + rng.normal(0, 36, (train + test, 8, 8, 3)).astype(np.float32)
    images = coarse.clip(16, 239).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    images += rng.integers(-16, 17, images.shape, dtype=np.int8).view(np.uint8)  # stays within 0 ... 255
    images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    return images[:train], labels[:train], images[train:], labels[train:]


def normalisation(images, recipe):
    """What is subtracted from an image (3, 32, 32) and what it is divided by (3, 1, 1), in grey levels of 0 ... 255.

    "paper": the mean of each pixel, and 1 ([1] Section 4.2); "resnet-1k-layers": mean and standard deviation of each
    channel over all pixels of all images.
    """
    if recipe == "paper":
        return images.sum(dim=0, dtype=torch.int64).double().div(len(images)).float(), torch.ones(3, 1, 1)
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
    mean = (counts @ levels) / counts.sum(dim=1)
    std = ((counts @ levels**2) / counts.sum(dim=1) - mean**2).sqrt()
    return mean.float().view(3, 1, 1).expand(3, 32, 32), std.float().view(3, 1, 1)


def every_crop(images):
    """All 9 x 9 crops of images (..., 3, 32, 32) padded by 4 zeros on each side, as a view (..., 9, 9, 3, 32, 32)."""
    padded = pad(images.movedim(-3, -1), (0, 0, 4, 4, 4, 4))  # (..., 40, 40, 3)
    return padded.unfold(-3, 32, 1).unfold(-3, 32, 1)


def augment(crops, mean_crops, std, draws):
    """The images (B, 3, 32, 32) of draws (4, B): shifted by up to 4 pixels, half of them flipped ([1] Section 4.2).

    crops and mean_crops come from `every_crop` of the training images and of their mean: subtracting the same crop of
    both is, bit for bit, subtracting the mean first and padding with zeros then.
    """
    index, row, column, flip = draws
    images = (crops[index, row, column].float() - mean_crops[row, column]) / std
    return torch.where(flip.bool().view(-1, 1, 1, 1), images.flip(3), images)


@functools.lru_cache(maxsize=2)
def epoch_draws(seed, epoch, n, device):
    """What an epoch over n images draws, a pure function of (seed, epoch): int64 (4, n), whose rows are the images'
    indices in random order, the crop's row and column (0 ... 8, 4 being no shift), and 1 for a flip."""
    rng = np.random.default_rng((seed, epoch))
    draws = np.stack([rng.permutation(n), rng.integers(0, 9, n), rng.integers(0, 9, n), rng.integers(0, 2, n)])
    return torch.from_numpy(draws).to(device)


def batch_draws(seed, iteration, batch_size, n, device):
    """The draws (4, batch_size) of an iteration. The epochs' permutations end to end are one endless stream, of which
    iteration t reads [t * batch_size, (t + 1) * batch_size)."""
    parts, first, last = [], iteration * batch_size, (iteration + 1) * batch_size
    while first < last:
        epoch, start = divmod(first, n)
        parts.append(epoch_draws(seed, epoch, n, device)[:, start : start + last - first])
        first += parts[-1].shape[1]
    return torch.cat(parts, dim=1)


def mix(*numbers):
    """One seed for torch out of several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
