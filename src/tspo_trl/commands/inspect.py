"""Write the rollouts of a run as one page, with the reward and advantage of every turn and the reason for them.

    tspo inspect runs/demo
    tspo inspect runs/demo --steps 0-20,100 --output page.html
    tspo inspect runs/demo --terminal --steps 20 --group 3
    tspo inspect OUT/MODEL/DATASET      # of `tspo evaluate --output_dir OUT`

The page opens from the disk, contains its data and needs no network. Press ? in it to see its keys.
`python -m tspo_trl.inspect` is the same command.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..inspect.load import load_run, parse_steps
from ..inspect.terminal import print_run
from ..inspect.write import write_page
from .options import check_at_least_one, make_parser

_LARGE = 20_000_000  # bytes: larger pages open slowly


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a run, or print it."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "run_dir",
        type=Path,
        help="the `output_dir` of a run, or its folder `trajectories`; or a folder of a data set of `tspo evaluate`",
    )
    add("--output", type=Path, help="file of the page (default: RUN_DIR/inspect.html)")
    add("--steps", help="only these steps, for instance 0-50,100 (default: all)")
    add(
        "--max_rollouts",
        type=int,
        default=10_000,
        metavar="N",
        help="maximum number of rollouts; of a longer run, evenly spread steps are shown (default: %(default)s)",
    )
    add("--terminal", action="store_true", help="print the last of these steps instead of writing a page")
    add(
        "--group",
        type=int,
        help="with --terminal: number of the group to show, from 1 (default: the first group with an advantage)",
    )
    add(
        "--mode",
        choices=("train", "eval"),
        help="with --terminal: show rollouts of training or of evaluation (default: train)",
    )
    args = parser.parse_args(arguments)
    check_at_least_one(parser, args, "max_rollouts")
    for name in ("group", "mode"):
        if getattr(args, name) is not None and not args.terminal:
            parser.error(f"--{name} is for --terminal: the page shows all groups and modes.")
    if args.output is not None and args.terminal:
        parser.error("--output is the file of the page: --terminal writes none.")
    if args.output is not None and args.output.is_dir():
        parser.error(f"--output must be a file, for instance {str(args.output / 'inspect.html')!r}, got a folder.")
    console = Console()
    try:
        steps = None if args.steps is None else parse_steps(args.steps)
        run = load_run(args.run_dir, steps=steps, max_rollouts=args.max_rollouts)
        if args.terminal:
            print_run(run, console, mode=args.mode, group=args.group)
            return
        output = args.output or args.run_dir / "inspect.html"
        size = write_page(run, output)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for note in run.notes:
        console.print(f"Note: {note}", style="yellow", markup=False)
    count = sum(len(group.rollouts) for groups in run.modes.values() for group in groups)
    console.print(f"{count} rollouts, {size / 1e6:.1f} MB: {output}", markup=False, soft_wrap=True)
    if size > _LARGE:
        fewer = int(count * _LARGE / size * 0.9)
        console.print(
            f"The page is large for a browser: --max_rollouts {fewer} reduces it to about {_LARGE / 1e6:.0f} MB.",
            style="yellow",
        )
