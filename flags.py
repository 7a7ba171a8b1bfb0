"""The flags that the experiments share, and their checks. A wrong command line raises ValueError."""

import math
import sys

import torch

from checkpoint import whole_number
from training import PRECISIONS, print_line
from units import UNITS, arguments
from weights import LAYOUTS, digest
from weights import load as load_weights


def add_unit_flags(parser, depths, bottlenecks):
    """Add to an argparse group the flags that name a net; depths and bottlenecks are for the help."""
    parser.add_argument(
        "--depth", type=int, default=depths[0], help=f"weight layers: {depths[1]} (default {depths[0]})"
    )
    parser.add_argument(
        "--preact", action="store_true", help="full pre-activation, [2] Fig. 4(e) (default: the original unit)"
    )
    parser.add_argument("--unit", metavar="NAME", help=f"a unit of units.py (default {bottlenecks})")
    parser.add_argument(
        "--unit-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of the unit; repeatable"
    )


def add_weights_flags(parser):
    """Add to an argparse group the flags that name a net by its weights."""
    parser.add_argument(
        "--weights", metavar="FROM", help="begin from a run's net or a file of weights (docs/weights.md)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help="what FROM does not tell; see weights.py --help")


def add_run_flags(parser, checkpoint_seconds):
    """Add to an argparse group the flags of the machine and the run."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto: cuda if there is one)")
    add("--precision", choices=PRECISIONS, default="float32", help="(default float32)")
    add("--compile", action="store_true", help="compile the units: a minute or two first, then faster steps on a GPU")
    add("--out", metavar="DIR", help="the run's folder (default runs/<dataset>-<depth>-<unit>-seed<seed>)")
    add(
        "--checkpoint-seconds",
        type=float,
        default=checkpoint_seconds,
        metavar="S",
        help=f"save every S seconds, so that a kill costs no more; 0: every iteration (default {checkpoint_seconds})",
    )
    add("--timeout", type=int, default=600, metavar="S", help="how long processes wait for each other (default 600)")


def given():
    """The flags on the command line."""
    return [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]


def refuse_all_but(names):
    """Raises ValueError when the command line has other flags than these: with --evaluate the run's folder decides."""
    wrong = [flag for flag in given() if flag not in names.split()]
    if wrong:
        raise ValueError(f"--evaluate cannot be combined with {', '.join(wrong)}: what is evaluated decides")


def resolve_unit(args, bottlenecks, **defaults):
    """Fill in --unit, --preact and the arguments of the unit: bottlenecks at those depths, defaults unlike its own.
    Raises ValueError on a contradiction."""
    if args.unit is None:
        args.unit = ("bottleneck" if args.depth in bottlenecks else "basic") + ("-preact" if args.preact else "")
    if args.unit not in UNITS:
        raise ValueError(f"there is no --unit {args.unit}: choose from {', '.join(UNITS)}")
    preact = UNITS[args.unit].preact == "bn-relu"
    if args.preact and not preact:
        raise ValueError(f"--preact contradicts --unit {args.unit}, which is not a full pre-activation unit")
    args.preact = preact
    args.unit_args = arguments(UNITS[args.unit])
    args.unit_args |= {name: value for name, value in defaults.items() if name in args.unit_args}
    for word in args.unit_arg:
        name, _, value = word.partition("=")
        if name not in args.unit_args:
            raise ValueError(f"--unit-arg {word}: {args.unit} takes {', '.join(args.unit_args) or 'no arguments'}")
        kind = type(args.unit_args[name])
        try:
            args.unit_args[name] = {"true": True, "false": False}[value] if kind is bool else kind(value)
            possible = isinstance(args.unit_args[name], str) or math.isfinite(args.unit_args[name])
        except (ValueError, KeyError):
            possible = False
        if not possible:
            raise ValueError(f"--unit-arg {word}: {name} is {'true or false' if kind is bool else 'a number'}")
    del args.unit_arg


def resolve_weights(args):
    """With --weights, after resolve_unit: load them into args.pretrained = (net, about), and make the flags that name a
    net those of this one. Raises ValueError on a contradiction."""
    args.pretrained = args.weights_hash = None
    if args.layout and not (args.weights or args.evaluate):
        raise ValueError("--layout goes with --weights")
    if not args.weights:
        return
    if "--unit-arg" in given():
        raise ValueError("--unit-arg cannot be combined with --weights, whose net has arguments of its own")
    args.pretrained = _, about = load_weights(args.weights, args.layout)
    args.weights_hash = digest(*args.pretrained)
    preact = UNITS[about["unit"]].preact == "bn-relu"
    for flag, value in (("depth", about["depth"]), ("unit", about["unit"]), ("preact", preact)):
        if f"--{flag}" in given() and getattr(args, flag) != value:
            raise ValueError(
                f"--{flag} contradicts --weights: {args.weights} is {about['unit']}, depth {about['depth']}"
            )
        setattr(args, flag, value)
    args.unit_args = arguments(UNITS[args.unit]) | about["unit_args"]


def at_least(args, **minima):
    """Raises ValueError when a flag is below its minimum, or a whole number above what there can be."""
    for name, least in minima.items():
        value, most = getattr(args, name), 1000 if name in ("workers", "threads") else 2**63 - 1
        if not value >= least or isinstance(value, int) and value > most:  # NaN too
            bound = f"least {least}" if not value >= least else f"most {most}"
            raise ValueError(f"--{name.replace('_', '-')} must be at {bound}, not {value}")


def check_recipe(args):
    """Raises ValueError when a number of the recipe is impossible, or the batch cannot be divided as the flags say."""
    at_least(args, batch_size=1, micro_batch=1, seed=0, checkpoint_seconds=0)
    if not 0 < args.lr <= torch.finfo(torch.float32).max:
        raise ValueError(f"--lr must be a positive float32, not {args.lr}")
    if args.batch_size % args.micro_batch:
        fits = next(n for n in range(min(args.micro_batch, args.batch_size, 1024), 0, -1) if args.batch_size % n == 0)
        raise ValueError(
            f"--micro-batch {args.micro_batch} does not divide --batch-size {args.batch_size}: "
            f"--micro-batch {fits} would"
        )
    count, world = args.batch_size // args.micro_batch, whole_number("WORLD_SIZE", 1)
    if world < 1 or count % world:
        raise ValueError(f"{world} processes cannot share {count} micro-batches of {args.micro_batch} images evenly")


def pretrained_net(args, classes):
    """The net of --weights for classes of these names. Another number of them needs a new last layer: this is said."""
    net, about = args.pretrained
    if len(about["classes"]) != len(classes):
        torch.manual_seed(args.seed)
        net.fc = torch.nn.Linear(net.fc.in_features, len(classes))
        torch.nn.init.zeros_(net.fc.bias)
        print_line(
            f"{args.weights} has {len(about['classes'])} classes: its last layer (fc) is replaced by a new, untrained "
            f"one for {len(classes)}"
        )
    elif about["classes"] != classes:
        names = " and ".join(f"{names[0]} ... {names[-1]}" for names in (about["classes"], classes))
        print_line(f"the fc of {args.weights} stays, though the names of its {len(classes)} classes differ: {names}")
    return net
