"""python -m hivg.data check DATASET [--data_root DIR] [--annotations FILE] [--decode]: what the files of a data set
hold, the problems in them, and whether training images are in another split too.

DATASET is a name (refcoco, refcoco+, refcocog, refcocog_google, referit, flickr, mixup) or a .jsonl or .json file.
"""

from hivg.data.published.catalogue import DATA_ROOT
from hivg.data.published.check import check
from hivg.utils.cli import Parser, run


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("dataset")
    parser.add_argument("--data_root", default=DATA_ROOT, metavar="DIR", help="folder of all data sets; default: data")
    parser.add_argument("--annotations", metavar="FILE", help="a file or folder, if it is not at a published place")
    parser.add_argument("--decode", action="store_true", help="also read every image and list the damaged ones")
    args = parser.parse_args()
    print(check(args.data_root, args.dataset, args.annotations, args.decode))


if __name__ == "__main__":
    run(main)
