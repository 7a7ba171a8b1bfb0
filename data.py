"""CIFAR in memory, augmented by one gather a batch; ImageNet from folders, augmented by workers; the papers' test
views; a synthetic stand-in for either."""

import fcntl
import functools
import math
import os
import pathlib
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader

# CIFAR

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
    """All 9 x 9 crops of images (..., 3, 32, 32) padded by 4 zeros on each side, and of their mirror images, as a view
    (2, ..., 9, 9, 3, 32, 32)."""
    both = torch.stack([images, images.flip(-1)]).movedim(-3, -1)
    padded = pad(both, (0, 0, 4, 4, 4, 4)).contiguous()  # (2, ..., 40, 40, 3)
    return padded.unfold(-3, 32, 1).unfold(-3, 32, 1)


def augment(crops, mean_crops, std, draws):
    """The images (B, 3, 32, 32) of draws (4, B): shifted by up to 4 pixels, half of them flipped ([1] Section 4.2).

    crops and mean_crops come from `every_crop` of the training images and of their mean: subtracting the same crop of
    both is, bit for bit, subtracting the mean first and padding with zeros then. A std of None divides by nothing.
    """
    index, row, column, flip = draws
    column = torch.where(flip.bool(), 8 - column, column)  # in the mirror image
    images = crops[flip, index, row, column].float().sub_(mean_crops[flip, row, column])
    return images if std is None else images.div_(std)


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


# ImageNet

# Of RGB in 0 ... 1, fb.resnet.torch's: mean and standard deviation of each channel, principal components of the colours
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def load_imagenet(dataset, root, limit=0):
    """The training and the validation images. Raises ValueError when their classes differ; else see `imagenet_part`."""
    train, val = (imagenet_part(dataset, root, part, limit) for part in ("train", "val"))
    differ = sorted({*train.classes} ^ {*val.classes})
    if differ:
        only = "train" if differ[0] in train.classes else "val"
        raise ValueError(f"{root}: train and val differ in {len(differ)} classes: {differ[0]} is in {only} alone")
    return train, val


def imagenet_part(dataset, root, part, limit=0):
    """The images of a part, "train" or "val", opened by index.

    dataset: "imagenet", in root/train/<class>/ and root/val/<class>/, or "synthetic", which needs nothing: `limit`
    images of 10 classes, and a fifth as many for validation. Raises ValueError when the folder is not such.
    """
    if dataset == "synthetic":
        return SyntheticImages(limit, 0) if part == "train" else SyntheticImages(math.ceil(limit / 5), limit)
    return ImageFiles(pathlib.Path(root, part))


class ImageFiles:
    """The images of a folder of class folders. Raises ValueError when it is none."""

    def __init__(self, folder):
        from torchvision.datasets import ImageFolder

        if not folder.is_dir():
            raise ValueError(
                f"there is no folder {folder}: ImageNet is expected as train/<class>/*.JPEG and val/<class>/*.JPEG in "
                f"{folder.parent}. Say with --data where it lies; --dataset synthetic needs none"
            )
        try:
            found = ImageFolder(folder)
            hidden = [name for name in found.classes if name.startswith(".")]
            if hidden:
                raise FileNotFoundError(f"{folder / hidden[0]} is no class.")
        except FileNotFoundError as error:
            raise ValueError(
                f"{error} A folder that is no class has to go; how val's images are sorted into the folders of their "
                "classes: README.md, ImageNet"
            ) from None
        self.classes, self.labels = found.classes, np.array(found.targets)
        # one array: of a million names in a list every worker would end up with a copy
        self.names = np.array([os.fsencode(name) for name, _ in found.samples])

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return os.fsdecode(self.names[index])

    def open(self, index):
        return Image.open(self.name(index))


class SyntheticImages:
    """A learnable stand-in for n of ImageNet's images, the same at every call: each class is a smooth pattern of
    colours, seen through another smooth pattern of the image's own."""

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
    """torchvision's reading of a JPEG file into (3, H, W): the bits of PIL in two thirds of the time. None where there
    is none, as torchvision 0.29 has deprecated it."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file
    except ImportError:
        return None
    return lambda path: decode_jpeg(read_file(path), ImageReadMode.RGB)


def decode(image, ratio):
    """The pixels of an opened image, uint8 (H, W, 3); where they will be scaled down `ratio` times, a JPEG's at
    1/2, 1/4 or 1/8 of its size if that is enough, which is cheaper."""
    size = image.size
    if ratio >= 2:
        image.draft("RGB", (int(size[0] / ratio), int(size[1] / ratio)))
    if image.format == "JPEG" and image.size == size and jpeg_decoder():
        return jpeg_decoder()(image.filename).permute(1, 2, 0)
    return torch.from_numpy(np.array(image.convert("RGB")))  # of greyscale and CMYK too


def resize(pixels, height, width):
    """Pixels (H, W, 3) scaled to (height, width, 3), bicubic with antialiasing."""
    pixels = pixels[None].permute(0, 3, 1, 2)
    return interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def scaled(image, *shorts):
    """The pixels of an opened image with the shorter side scaled to each of `shorts`."""
    width, height = image.size
    side = min(width, height)
    pixels = decode(image, side / max(shorts))
    return [resize(pixels, *(max(short, round(n * short / side)) for n in (height, width))) for short in shorts]


def scale(image, crop, rng):
    """[1] Section 3.4: the shorter side uniform in [256, 480], then a random 224 x 224 crop (all times crop / 224)."""
    (pixels,) = scaled(image, int(rng.integers(round(256 * crop / 224), round(480 * crop / 224) + 1)))
    top, left = (int(rng.integers(0, n - crop + 1)) for n in pixels.shape[:2])
    return pixels[top : top + crop, left : left + crop]


def scale_aspect(image, crop, rng):
    """fb.resnet.torch's: 8 to 100 % of the area, its aspect ratio uniform in [3/4, 4/3] and in half of the cases turned
    over, scaled to crop x crop; after 10 tries that do not fit, the centre. (torchvision draws the logarithm.)"""
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
    """A training view of an opened image, a pure function of (seed, epoch, index): pixels (crop, crop, 3), half of them
    flipped, and the draws of `normalise`: 3 normal numbers for the lighting; with "scale-aspect" also 3 factors of the
    jitter and the order in which they act."""
    rng = np.random.default_rng((seed, epoch, 1 + index))
    pixels = AUGMENT[augment](image, crop, rng)
    draws = rng.normal(0, 0.1, 3)
    if augment == "scale-aspect":
        draws = np.concatenate([draws, rng.uniform(0.6, 1.4, 3), rng.permutation(3)])
    return pixels.flip(1) if rng.random() < 0.5 else pixels, torch.from_numpy(draws).float()


# The papers' test views. A protocol is the shorter sides that the image is scaled to, the size and the places of what
# is cut out of each, and whether the flips of these are views too.


def centre(pixels, size):
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return [pixels[top : top + size, left : left + size]]


def corners_and_centre(pixels, size):
    height, width = pixels.shape[:2]
    corners = [pixels[y : y + size, x : x + size] for y in (0, height - size) for x in (0, width - size)]
    return corners + centre(pixels, size)


def whole(pixels, size):
    """For a net that is used fully convolutionally."""
    return [pixels]


PROTOCOLS = {
    "1-crop": ([256], 224, centre, False),  # [1] Fig. 4, [2] Table 5 with test crop 224
    "1-crop-320": ([320], 320, centre, False),  # [2] Table 5
    "10-crop": ([256], 224, corners_and_centre, True),  # [1] Tables 2 and 3
    "multi-scale": ([224, 256, 384, 480, 640], 224, whole, True),  # [1] Tables 4 and 5
}


def test_views(image, index, protocol, crop):
    """The views (H, W, 3) of an opened image that a protocol averages over, but for flips; sizes times crop / 224."""
    shorts, size, cut, _ = PROTOCOLS[protocol]
    shorts, size = [round(s * crop / 224) for s in shorts], round(size * crop / 224)
    return [view for pixels in scaled(image, *shorts) for view in cut(pixels, size)]


def train_batch(made):
    """Stack the views of `augmented`: pixels (N, H, W, 3), draws (N, 3 or 9), labels (N,)."""
    views, labels = zip(*made, strict=True)
    pixels, draws = zip(*views, strict=True)
    return torch.stack(pixels), torch.stack(draws), torch.tensor(labels)


def test_batch(made):
    """The views of `test_views` end to end in one flat tensor (of many tensors each would hold a file descriptor), the
    (image within the batch, shape) of each, and the labels (N,)."""
    views = [(i, view) for i, (views, _) in enumerate(made) for view in views]
    flat = torch.cat([view.flatten() for _, view in views] or [torch.empty(0, dtype=torch.uint8)])
    labels = torch.tensor([label for _, label in made], dtype=torch.int64)
    return flat, [(i, tuple(view.shape)) for i, view in views], labels


def same_size(flat, views):
    """Stack what `test_batch` has laid end to end: [(pixels (K, H, W, 3), image of each (K,)), ...]."""
    groups = {}
    for (i, shape), part in zip(views, flat.split([math.prod(shape) for _, shape in views]), strict=True):
        groups.setdefault(shape, []).append((part.view(shape), i))
    groups = [zip(*group, strict=True) for group in groups.values()]
    return [(torch.stack(pixels), torch.tensor(which)) for pixels, which in groups]


class Views:
    """What the loader's workers read: view(image, *key) for each key of a batch; its last part is the image's index."""

    def __init__(self, images, view, stack):
        self.images, self.view, self.stack = images, view, stack

    def __getitems__(self, keys):
        made = []
        for *key, index in keys:
            try:
                with self.images.open(index) as image:
                    made.append((self.view(image, *key, index), int(self.images.labels[index])))
            except Exception as error:  # a damaged file may raise anything
                return ValueError(
                    f"{self.images.name(index)} cannot be read: {error}. Put a whole copy in its place; the same "
                    "command then goes on"
                )
        return self.stack(made)


def load_views(images, view, stack, batches, workers, device, start_worker):
    """stack([(view(image, *key), label), ...]) for each batch of keys, made by so many worker processes (0: by this
    one). Raises ValueError naming an image that cannot be read."""
    loader = DataLoader(
        Views(images, view, stack),
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # others would import torch anew in each
        collate_fn=as_it_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    try:
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    except RuntimeError as error:
        raise ValueError(f"loading images failed: {error}") from None


def as_it_is(batch):
    return batch


def image_batches(seed, n, batch_size, micro_batch, mine, iteration):
    """The (epoch, index) of the images of each micro-batch, from an iteration on and for ever, of those in `mine` (a
    range within an iteration's micro-batches). The epochs' permutations are one endless stream, as in `batch_draws`."""
    order = functools.lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(n))
    while True:
        for part in mine:
            first = iteration * batch_size + part * micro_batch
            places = (divmod(place, n) for place in range(first, first + micro_batch))
            yield [(epoch, int(order(epoch)[place])) for epoch, place in places]
        iteration += 1


def normalise(pixels, draws=None):
    """Pixels (N, H, W, 3) as the net reads them, float (N, 3, H, W): less the channels' mean, divided by their standard
    deviation. With the draws of `augmented` the colours are changed before."""
    mean, std, grey, components = colours(pixels.device)
    images = pixels.permute(0, 3, 1, 2).float() / 255
    if draws is None:
        return (images - mean) / std
    if draws.shape[1] > 3:
        images = jitter(images, draws[:, 3:6], draws[:, 6:9].long(), grey)
    lighting = draws[:, :3].float() @ components  # AlexNet's: along the principal components of ImageNet's colours
    return (images + (lighting.view(-1, 3, 1, 1) - mean)) / std


@functools.cache
def colours(device):
    """Mean, std and grey as (3, 1, 1), and the components (3, 3) that lighting adds, on a device."""
    vectors = [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD, (0.299, 0.587, 0.114))]
    return *vectors, (torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES)).T.to(device)


def jitter(images, factors, order, grey):
    """Brightness, contrast and saturation, each times its factor (N, 3), one after another in each image's own order
    (N, 3): a blend with black, with the mean of its grey image, with its grey image."""
    for kind in order.T:
        factor = factors.gather(1, kind[:, None]).view(-1, 1, 1, 1)
        kind, shade = kind.view(-1, 1, 1, 1), (images * grey).sum(dim=1, keepdim=True)
        other = shade * (kind == 2) + shade.mean(dim=(2, 3), keepdim=True) * (kind == 1)
        images = factor * images + (1 - factor) * other
    return images


def class_names(dataset, root):
    return [f"class {c}" for c in range(CLASSES[dataset])]


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
    trainval.txt and test.txt if it has both, or train.txt and val.txt. "synthetic" needs nothing. With a limit, the
    first images alone (synthetic: and a fifth as many to test on). Raises ValueError naming what is not as it must be.
    """
    if dataset == "synthetic":
        return Shapes(limit or 1000, 0), Shapes(math.ceil((limit or 1000) / 5), 10**6)
    root, classes = pathlib.Path(root), None
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
                names = (folder / "ImageSets/Main" / f"{part}.txt").read_text().split()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{folder} is not in VOC's layout: {error}") from None
            files += [folder / "JPEGImages" / f"{name}.jpg" for name in names]
        for file in files[: limit or None]:
            objects = [o for o in voc_objects(file, classes) if not (train and o[2])]
            if objects or not train:
                found[file] = objects
        if not any(found.values()):
            raise ValueError(f"no image of {parts[0][1]}.txt in {parts[0][0]} has an object")
        self.classes = classes or sorted({name for objects in found.values() for name, _, _ in objects})
        self.names, self.labels, self.objects = np.array([os.fsencode(f) for f in found]), np.arange(len(found)), []
        for objects in found.values():
            boxes = torch.tensor([box for _, box, _ in objects]).view(-1, 4)
            labels = torch.tensor([1 + self.classes.index(name) for name, _, _ in objects], dtype=torch.int64)
            self.objects.append((boxes, labels, torch.tensor([d for _, _, d in objects], dtype=torch.bool)))


def voc_objects(file, classes):
    """[(class, box, difficult), ...] of an image file in VOC's layout. VOC counts pixels from 1 and its boxes contain
    both their ends; what lies outside the image is cut off."""
    path = where = file.parents[1] / "Annotations" / f"{file.stem}.xml"
    objects, sides = [], ("xmin", "ymin", "xmax", "ymax")
    try:
        with Image.open(file) as image:
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
