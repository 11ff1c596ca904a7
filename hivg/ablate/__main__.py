"""Ablation: the paper's claims, each tried on the drawn world with the seeds and intervals that such a claim needs.

    python -m hivg.ablate list                                the arms: what differs, against which other
    python -m hivg.ablate run [NAME ...] [--budget short] [--seeds 0 1 2] [--jobs 2]
    python -m hivg.ablate report                              tables and charts from the results file alone

`run` trains and evaluates what is missing in notebooks/ablations.jsonl: every arm in the short budget, the most
important ones in the long, and the arms "large gap" in a third between the two. Interrupt it with Ctrl-C at any time
and start it again. Every arm of a world sees the same expressions in the same order, as often; its learning rate is the
best on `val`, with seed 0, of the budget's grid, which is the same for all. Run it in the folder of train.py.
"""

from importlib.util import find_spec

from hivg.utils.cli import Parser, fail, run

if find_spec("train") is None:
    fail("the ablation trains with train.py; run it in the folder that holds it, the project's repository")

from hivg.ablate.arms import ARMS, BY_NAME
from hivg.ablate.report import report
from hivg.ablate.runs import BUDGETS, FOLDER, RESULTS, run_missing, run_one
from hivg.training.settings import RUNS


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("list", "run", "report", "one"), help="one: a single run, as `run` starts")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of arms; default: all")
    parser.add_argument("--budget", choices=tuple(BUDGETS), help="default: all, of `one` short")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 2, of some claims 0 to 4")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each; default: 1")
    parser.add_argument("--lr", type=float, help="of `one`")
    args = parser.parse_args()
    for name in args.names:
        if name not in BY_NAME:
            fail(f"no arm is called {name!r}; `python -m hivg.ablate list` shows them")
    if not 1 <= args.jobs <= 64:
        fail(f"--jobs must be from 1 to 64, not {args.jobs}")
    if args.seeds and min(args.seeds) < 0:
        fail(f"--seeds must be 0 or more, not {min(args.seeds)}")
    if args.command == "one" and (len(args.names), len(args.seeds or []), args.lr is None) != (1, 1, False):
        fail("`one` takes the name of an arm, --lr and one of --seeds")
    if args.command in ("list", "report") and args.names:
        fail(f"{args.command} takes no names; it shows all arms")
    args.names = list(dict.fromkeys(args.names))  # once each
    args.seeds = args.seeds and list(dict.fromkeys(args.seeds))
    return args


def main():
    args = arguments()
    if args.command == "list":
        width = 2 + max(map(len, BY_NAME))
        for arm in ARMS:
            against = f" (against {arm.against})" if arm.claim else ""
            print(f"{arm.name:<{width}}{arm.differs}{against}")
    elif args.command == "one":
        run_one(BY_NAME[args.names[0]], args.budget or "short", args.lr, args.seeds[0])
    elif args.command == "run":
        failed = 0
        for budget in [args.budget] if args.budget else BUDGETS:
            arms = BUDGETS[budget].arms or list(BY_NAME)
            names = args.names or arms
            if not args.budget:
                names = [name for name in names if name in arms]
            failed += run_missing(budget, names, args.seeds, args.jobs)
        if failed:
            fail(f"{failed} run(s) failed; the lines above say where to look", code=1)
    else:
        print(report(RESULTS, RUNS / FOLDER))


if __name__ == "__main__":
    run(main, "interrupted; the same command continues")
