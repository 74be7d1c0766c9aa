"""Measurements that the README quotes.

    python tests/bench.py ops [--device cuda] [--threads 2] [--json F]    operators: plain, torch.compile of plain, native
    python tests/bench.py ops --sweep                                     native against plain over plausible sizes
    python tests/bench.py scale [--plot F]                                the capsule layer against batch size and capsules
    python tests/bench.py maps                                            convolutions of small maps against PyTorch's
    python tests/bench.py train                                           whole steps against the straightforward pipeline
    python tests/bench.py ddp                                             one process against two, on the CPU
    python tests/bench.py accuracy [SETTING ...] [--seeds 1 2 3]          whole trainings with several seeds, of all settings of
                                          bench_accuracy.py by default, or 'NAME=train --lr 0.002'; it goes on where it was
                                          stopped, and --finished trains nothing
    python tests/bench.py plain [options of caps.py train]                a training with plain layers and routing
    python tests/bench.py pictures [--checkpoint F] [--count 300]         accuracy on drawn, scanned, photographed digits
    python tests/bench.py all --json F                                    ops, scale, train and ddp

Times are medians over rounds in which the variants take turns; a ratio is the median of the rounds' ratios, so that a
busy machine harms both sides alike. Peak extra memory is what one call adds to memory that already holds arguments: on
the CPU the growth of the high-water mark of a fresh process (VmHWM, else ru_maxrss), on CUDA max_memory_allocated.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import caps  # noqa: E402
from bench_accuracy import SETTINGS, accuracy, setting, train_plain  # noqa: E402
from bench_operators import ops, scale, small_maps, sweep  # noqa: E402
from bench_pictures import pictures  # noqa: E402
from bench_training import ddp, ddp_process, train  # noqa: E402
from caps.extras.machine import choose_device  # noqa: E402


def everything(options):
    return {"command": "all", "results": [part(options) for part in (ops, scale, train, ddp)]}


def sizes(text):
    """An argparse type: [(B, N), ...] of BxN,BxN,..."""
    natural = caps.number(int, 1)
    pairs = [tuple(map(natural, size.split("x"))) for size in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected BxN,BxN,..., got {text!r}")
    return pairs


def parse():
    parser = caps.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("ops", help="the operators")
    command.add_argument("--sweep", action="store_true", help="native against plain over plausible sizes")
    command.add_argument("--sizes", type=sizes,
                         help="BxN,BxN,... in place of the listed sizes")
    command.set_defaults(run=lambda options: sweep(options) if options.sweep else ops(options))
    command = commands.add_parser("scale", help="the capsule layer against batch size and number of capsules")
    command.set_defaults(run=scale)
    command = commands.add_parser("maps", help="convolutions of small maps, on the CPU")
    command.set_defaults(run=small_maps)
    command = commands.add_parser("train", help="whole training steps against the straightforward pipeline")
    command.set_defaults(run=train)
    command = commands.add_parser("ddp", help="one process against two, on the CPU")
    command.add_argument("--process", choices=list(caps.MODELS), help=argparse.SUPPRESS)
    command.set_defaults(run=lambda options: ddp_process(options.process) if options.process else ddp(options),
                         threads=None)  # two in all
    command = commands.add_parser("accuracy", help="whole trainings of several settings and seeds")
    command.add_argument("settings", nargs="*", type=setting, metavar="SETTING",
                         help=f"{', '.join(SETTINGS)}, or 'NAME=command'")
    command.add_argument("--seeds", nargs="+", type=caps.number(int, 0, 2**40), help="in place of each setting's own number of them")
    command.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="folder of the runs' folders")
    command.add_argument("--finished", action="store_true", help="train nothing: rows of the runs that are finished there")
    command.set_defaults(run=accuracy)
    command = commands.add_parser("pictures", help="digits as people photograph, scan and draw them")
    command.add_argument("--checkpoint", type=caps.checkpoint_name, default="alexcaps")
    command.add_argument("--count", type=caps.number(int, 1), default=300, help="pictures of each kind")
    command.add_argument("--fashion", help="folder of Fashion-MNIST's IDX files, for clothes in place of digits")
    command.set_defaults(run=pictures)
    command = commands.add_parser("all", help="ops, scale, train and ddp")
    command.set_defaults(run=everything, sizes=None)
    for name in ("scale", "all"):
        commands.choices[name].add_argument("--plot", type=Path, help="also draw the scaling into this PNG file")
    for name in ("ops", "scale", "train", "all", "accuracy"):
        commands.choices[name].add_argument("--device", choices=["cpu", "cuda"],
                                            default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("ops", "scale", "train", "all", "maps"):
        commands.choices[name].add_argument("--seconds", type=caps.number(float, 0), default=5, help="of rounds per measurement")
    for name in commands.choices.keys() - {"ddp"}:
        commands.choices[name].add_argument("--threads", type=caps.number(int, 1), help="of the CPU")
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    choose_device(getattr(options, "device", "cpu"))
    for option in ("json", "plot"):
        if path := getattr(options, option, None):
            if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
                raise caps.UserError(f"--{option} {path}: cannot be written there")
    return options


def main():
    if sys.argv[1:2] == ["plain"]:
        sys.exit(train_plain(sys.argv[2:]))
    try:
        options = parse()
        if options.threads:
            torch.set_num_threads(options.threads)
        result = options.run(options)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    except (caps.UserError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
