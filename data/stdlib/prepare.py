"""Prepare the default corpus: this Python's standard library, some 11 MB, without a download.

Left out are tests, installed packages, tables of characters (generated, and near copies of each
other) and records of how this Python was built (they name folders of a machine). The text differs
between versions of Python: the manifest in meta.json tells.
"""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # corpus.py lies in data/
from corpus import Parser, build, list_files, one_line_errors

FOLDERS_LEFT_OUT = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"),
}
FILES_LEFT_OUT = ("html/entities.py", "_sysconfigdata", "config-")  # beginnings of relative names


def stdlib_files():
    """Return {relative name: Path} of the standard library's own source files."""
    files = {}
    for name, path in list_files([sysconfig.get_paths()["stdlib"]], FOLDERS_LEFT_OUT).items():
        if name.endswith(".py") and not name.startswith(FILES_LEFT_OUT):
            files[name] = path
    return files


@one_line_errors
def main(argv=None):
    example = "python data/stdlib/prepare.py --vocab-size 1024 --out data/stdlib-1024"
    parser = Parser(__doc__, example)
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N",
                        help="token ids (default: %(default)s)")
    args = parser.parse_args(argv)
    out = args.out or Path(__file__).resolve().parent
    build("stdlib", stdlib_files(), out, args.vocab_size, args.val_fraction, args.seed,
          force=args.force)


if __name__ == "__main__":
    sys.exit(main())
