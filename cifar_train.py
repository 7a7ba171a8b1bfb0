"""The CIFAR experiments of [1] Section 4.2 and [2], the papers of units.py.

    python cifar_train.py --depth 110 --preact                              # ResNet-110, full pre-activation, CIFAR-10
    torchrun --nproc_per_node=2 cifar_train.py --depth 110 --preact         # the same net from two processes
    python cifar_train.py --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-6
    python cifar_train.py --dataset synthetic --depth 20 --preact --iterations 300
    python cifar_train.py --evaluate runs/cifar10-110-basic-preact-seed1    # or a file of weights
    python cifar_train.py --weights FROM --lr 0.01                          # begin from a net's weights

The same command again continues a run that was stopped.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read as torch is imported: threads that spin less share the cores

import argparse
import pathlib
import sys

import torch
import torch.distributed as dist

import checkpoint
import data
from flags import (
    add_run_flags,
    add_unit_flags,
    add_weights_flags,
    at_least,
    check_recipe,
    pretrained_net,
    refuse_all_but,
    resolve_unit,
    resolve_weights,
)
from models import cifar_resnet
from training import (
    Precision,
    Training,
    classification,
    compile_units,
    finish,
    own_micro_batches,
    print_line,
    rows_at,
    start,
)
from units import UNITS
from weights import load as load_weights

RECIPES = {
    # [1] Section 4.2; the warm-up is [2]'s (appendix). Weight decay on convolutions and fc only.
    "paper": dict(batch_size=128, iterations=64_000, drops=(0.5, 0.75), warmup=400, nesterov=False, decay_all=False),
    # github.com/KaimingHe/resnet-1k-layers: 200 epochs, drops after 80 and 121 of them
    "resnet-1k-layers": dict(
        batch_size=64, iterations=156_250, drops=(0.4, 0.605), warmup=0, nesterov=True, decay_all=True
    ),
}

IDENTITY = (  # the flags that make a run this run; any other may change when it is continued
    "dataset depth unit unit_args val_split images recipe iterations batch_size micro_batch lr warmup fan_in decay_all "
    "seed precision"
).split()
SETTINGS = "data device compile out checkpoint_seconds timeout".split()


def lr_at(iteration, args):
    """The learning rate of an iteration (0, 1, ...): a tenth during the warm-up, divided by 10 at each drop."""
    if iteration < args.warmup:
        return args.lr / 10
    return args.lr / 10 ** sum(iteration >= int(drop * args.iterations) for drop in RECIPES[args.recipe]["drops"])


@torch.inference_mode()
def evaluate(net, images, labels, mean, std, precision, batch_size=None):
    """The error (%) on images (N, 3, 32, 32), each counted once, whatever the number of processes."""
    net.eval()
    batch_size = batch_size or (1000 if images.is_cuda else 250)
    rank, world = dist.get_rank(), dist.get_world_size()
    wrong = torch.zeros((), dtype=torch.int64, device=images.device)
    for first in range(0, len(images), batch_size * world):
        checkpoint.stop.check()
        own = slice(first + rank, first + batch_size * world, world)
        with precision, torch.compiler.set_stance("force_eager"):  # no graphs for these sizes, even with --compile
            logits = net((images[own].float() - mean) / std)
        wrong += (logits.argmax(dim=1) != labels[own]).sum()
    dist.all_reduce(wrong)
    net.train()
    return 100 * wrong.item() / len(images)


def train(args, device):
    """Train the net that the flags name, from where its run stands, and write the result. Returns the exit status."""
    with checkpoint.all_or_none():
        identity = {name: getattr(args, name) for name in IDENTITY} | {"weights": args.weights_hash}
        run = checkpoint.Run(args.out, identity, ["test_error"])
    checkpoint.agree(args.out, run.result)
    if run.result:
        return finish(run, run.result, {"test_error": "test error"})

    with checkpoint.all_or_none():
        sets = load_sets(args)
        mean, std = data.normalisation(sets["train"][0], args.recipe)
        if args.weights:
            mean, std = args.pretrained[1]["mean"].expand(3, 32, 32), args.pretrained[1]["std"]
        mean, std = mean.to(device), std.to(device)
        sets = {name: [t.to(device) for t in pair] for name, pair in sets.items()}
        images, labels = sets.pop("train")
        classes = data.class_names(args.dataset, args.data)
        net = pretrained_net(args, classes) if args.weights else new_net(args)
        net.to(device, memory_format=torch.channels_last)
        if args.compile:
            compile_units(net)
        about = {"classes": classes, "mean": mean, "std": std, "size": 32}
        run.begin({name: getattr(args, name) for name in SETTINGS}, about)

    crops, mean_crops = data.every_crop(images), data.every_crop(mean)
    scale = None if bool((std == 1).all()) else std  # 1 in recipe paper
    watched = "val" if "val" in sets else "test"  # evaluated at every row; the other one at the end alone
    rows, evaluations = rows_at(args.iterations, args.iterations * args.batch_size, len(sets[watched][0]))

    def draws(t):
        return [data.batch_draws(args.seed, t, args.batch_size, len(images), device)]

    def micro_batches(draws):
        parts = draws[0].split(args.micro_batch, dim=1)[own_micro_batches(args)]
        return [(data.augment(crops, mean_crops, scale, part), labels[part[0]]) for part in parts]

    def errors(t):
        names = [name for name in sets if t in evaluations and name == watched or t == args.iterations]
        return {f"{name}_error": evaluate(net, *sets[name], mean, std, training.precision) for name in names}

    training = Training(
        args,
        run,
        net,
        classification,
        micro_batches,
        iterations=args.iterations,
        images=len(images),
        columns={f"{name}_error": f"{name} error" for name in sets},
        about=about,
        device=device,
        nesterov=RECIPES[args.recipe]["nesterov"],
        decay_all=RECIPES[args.recipe]["decay_all"] or args.decay_all,
    )
    with training:
        while True:
            t = training.iteration
            if training.row_due(t in rows):
                training.row(lr_at(t - 1, args), errors(t))
            if t == args.iterations:
                break
            training.save_if_due()
            training.iterate(lr_at(t, args), draws(t))
    return finish(run, training.result("recipe"), training.columns)


def new_net(args):
    """The net that the flags name, with its initial weights, on the CPU."""
    torch.manual_seed(args.seed)
    net = cifar_resnet(args.depth, UNITS[args.unit], data.CLASSES[args.dataset], **args.unit_args)
    for layer in net.modules():
        if args.fan_in and isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # by fan-in, Caffe's default
    return net


def load_sets(args):
    """{"train": (images, labels), "test": ...}, and "val" with --val-split."""
    images, labels, *test = data.load_cifar(args.dataset, args.data, args.images)
    if not args.val_split:
        return {"train": (images, labels), "test": test}
    at = len(images) - args.val_split
    if at < 1:
        raise ValueError(f"--val-split {args.val_split} leaves nothing of {len(images)} training images")
    return {"train": (images[:at], labels[:at]), "val": (images[at:], labels[at:]), "test": test}


def evaluate_run(flags, device):
    """Print the test error of a run's checkpoint, on the data set of its flags, or of a file of weights, on that of the
    command line. Returns the exit status."""
    source, args, when = flags.evaluate, flags, ""
    with checkpoint.all_or_none(source):
        if pathlib.Path(source).is_dir():
            args, state = checkpoint.read_run(source)
            if "recipe" not in args:
                raise ValueError(f"{source} is no run of cifar_train.py: evaluate it with the script that trained it")
            when = f" after {state['iteration']:,} of {args.iterations:,} iterations"
        net, about = load_weights(source, flags.layout)
        check_kind(net, source)
        if len(about["classes"]) != data.CLASSES[args.dataset]:
            raise ValueError(f"{source} has {len(about['classes'])} classes, unlike --dataset {args.dataset}")
        args.data = flags.data or vars(args).get("data") or "data"
        test = [t.to(device) for t in (*load_sets(args)["test"], about["mean"], about["std"])]
        precision = Precision(args.precision, device)
    net.to(device, memory_format=torch.channels_last)
    error = evaluate(net, *test, precision)
    print_line(f"{source}: test error {error:.2f} %{when}")
    return 0


def check_kind(net, source):
    """Raises ValueError when a net is none of CIFAR's."""
    if net.stem[0].kernel_size != (3, 3):
        raise ValueError(f"{source} is a net of ImageNet's kind: imagenet_train.py takes it")


def parse_flags():
    """The command line, with every default filled in; exits with status 2 on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("the net")
    add_unit_flags(group, (20, "20, 32, 44, 56, 110, 164, 1001, 1202, ..."), "bottleneck at 164 and 1001, else basic")
    add_weights_flags(group)
    add = parser.add_argument_group("the data").add_argument
    add("--dataset", choices=data.CLASSES, default="cifar10", help="synthetic needs no download (default cifar10)")
    add("--data", metavar="DIR", help="where cifar-10-batches-py is, or will be (default data)")
    add("--val-split", type=int, default=0, metavar="N", help="hold out the last N images; 5000 in [1] (default 0)")
    add("--images", type=int, default=0, metavar="N", help="only the first N images of each set (default 0: all)")
    add = parser.add_argument_group("the recipe").add_argument
    add("--recipe", choices=RECIPES, default="paper", help="[1]'s, or that of the released Torch code (default paper)")
    add("--iterations", type=int, metavar="N", help="the drops move too (default 64000; resnet-1k-layers 156250)")
    add("--batch-size", type=int, metavar="N", help="images a step (default 128; resnet-1k-layers 64)")
    add("--micro-batch", type=int, metavar="N", help="images that share BN statistics (default half the batch)")
    add("--lr", type=float, default=0.1, help="learning rate before the drops (default 0.1)")
    add("--warmup", type=int, metavar="N", help="iterations at lr/10 (default 400, at most a 16th; resnet-1k-layers 0)")
    add("--fan-in", action="store_true", help="He initialisation by fan-in (default: fan-out)")
    add("--decay-all", action="store_true", help="weight decay on BN and biases too, in recipe paper")
    add("--seed", type=int, default=1, help="of weights, order and augmentation (default 1)")
    group = parser.add_argument_group("the machine and the run")
    add_run_flags(group, checkpoint_seconds=60)
    group.add_argument("--evaluate", metavar="FROM", help="print the test error of a run, or of a file of weights")
    args = parser.parse_args()
    try:
        if args.evaluate is None:
            resolve(args)
        else:
            of_a_file = "" if pathlib.Path(args.evaluate).is_dir() else " --layout --dataset --images --precision"
            refuse_all_but("--evaluate --data --device --timeout" + of_a_file)
    except ValueError as error:
        checkpoint.fail(error)
    return args


def resolve(args):
    """Fill in what the flags leave to the recipe and the unit. Raises ValueError on a contradiction."""
    resolve_unit(args, bottlenecks=(164, 1001))
    resolve_weights(args)
    if args.weights:
        check_kind(args.pretrained[0], args.weights)
        if args.fan_in:
            raise ValueError("--fan-in cannot be combined with --weights, which are the initial weights")
    with torch.device("meta"):  # raises ValueError for an impossible depth or option
        cifar_resnet(args.depth, UNITS[args.unit], **args.unit_args)

    recipe = RECIPES[args.recipe]
    args.iterations = recipe["iterations"] if args.iterations is None else args.iterations
    args.batch_size = recipe["batch_size"] if args.batch_size is None else args.batch_size
    args.micro_batch = max(args.batch_size // 2, 1) if args.micro_batch is None else args.micro_batch
    args.warmup = min(recipe["warmup"], args.iterations // 16) if args.warmup is None else args.warmup
    args.data = args.data or "data"
    args.out = args.out or f"runs/{args.dataset}-{args.depth}-{args.unit}-seed{args.seed}"
    check_recipe(args)
    at_least(args, iterations=1, warmup=0, val_split=0, images=0)


def main():
    args = parse_flags()
    return start(train if args.evaluate is None else evaluate_run, args)


if __name__ == "__main__":
    sys.exit(main())
