"""Ablation: the paper's claims, each tried on the drawn world with the seeds and intervals that such a claim needs.

    python -m hivg.ablate list                                the arms: what differs, against which other
    python -m hivg.ablate run [NAME ...] [--seeds 0 1 2] [--jobs 2]
    python -m hivg.ablate report                              tables and charts from the results file alone

`run` trains and evaluates what is missing in notebooks/ablations.jsonl. It can be killed at any time and started
again. Every arm sees the same expressions in the same order, as often, with the same optimizer; its learning rate is
the best on `val` of a grid that is the same for all. Run it in the folder of train.py.
"""

from hivg.ablate.arms import ARMS, BY_NAME
from hivg.ablate.report import report
from hivg.ablate.runs import BUDGETS, RESULTS, run, run_missing
from hivg.utils.cli import Parser, fail


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("list", "run", "report", "one"), help="one: a single run, for `run`")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of arms; default: all")
    parser.add_argument("--budget", default="short", choices=tuple(BUDGETS), help="default: short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2; the learning rates "
                        "are chosen on the first")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each; default: 1")
    parser.add_argument("--lr", type=float, help="of `one`")
    parser.add_argument("--seed", type=int, default=0, help="of `one`")
    args = parser.parse_args()
    for name in args.names:
        if name not in BY_NAME:
            fail(f"no arm is called {name!r}; `python -m hivg.ablate list` shows them")
    if not 1 <= args.jobs <= 64:
        fail(f"--jobs must be from 1 to 64, not {args.jobs}")
    return args


def main():
    args = arguments()
    try:
        if args.command == "list":
            for arm in ARMS:
                print(f"{arm.name:<24}{arm.differs} (against {arm.against})" if arm.claim else
                      f"{arm.name:<24}{arm.differs}")
        elif args.command == "one":
            run(BY_NAME[args.names[0]], args.budget, args.lr, args.seed)
        elif args.command == "run":
            run_missing(args.budget, args.names, args.seeds, args.jobs)
        else:
            print(report(RESULTS))
    except KeyboardInterrupt:
        fail("interrupted; the same command continues", code=130)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
