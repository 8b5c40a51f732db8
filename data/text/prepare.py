"""Prepare a corpus from your own text: files, or folders with all that is in them, in UTF-8.

With 20 files or more, whole files go to val, picked by a seeded hash of their names, up to
--val-fraction of the bytes. With fewer, the last --val-fraction of each file is val, cut at a blank
line or else a line end; --seed only orders the files. Hidden files are passed over, binary ones
skipped and counted, identical ones used once.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # corpus.py lies in data/
from corpus import Parser, build, list_files, one_line_errors

from lawa_core import LawaError

DATA = Path(__file__).resolve().parents[1]


def check_name(name, out):
    """Return the folder to write to: `out`, or else data/NAME.

    LawaError for a bad name or a taken folder.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        allowed = "letters, digits, '_', '-' and '.'"
        raise LawaError(f"--name {name!r}: must be a plain folder name of {allowed}")
    if not out and (DATA / name / "prepare.py").exists():
        advice = "choose another name, or give --out"
        raise LawaError(f"--name {name}: data/{name} has a prepare.py of its own; {advice}")
    return out or DATA / name


@one_line_errors
def main(argv=None):
    example = "python data/text/prepare.py ~/books notes.txt --name books --vocab-size 4096"
    parser = Parser(__doc__, example)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a text file, or a folder of them")
    parser.add_argument("--name", required=True, help="of the corpus, written to data/NAME")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--vocab-size", type=int, default=2048, metavar="N",
                      help="token ids (default: %(default)s)")
    kind.add_argument("--tokenizer", choices=["gpt2"],
                      help="use this encoding of tiktoken's instead of training one")
    args = parser.parse_args(argv)
    out = check_name(args.name, args.out)
    build(args.name, list_files(args.paths), out, args.vocab_size, args.val_fraction, args.seed,
          args.tokenizer, args.force)


if __name__ == "__main__":
    sys.exit(main())
