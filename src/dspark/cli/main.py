"""`dspark VERB`: one file per verb. Nothing heavy is imported before a verb runs, so --help is instant."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence

from dspark import __version__
from dspark.cli import (
    calibrate,
    capacity,
    chat,
    compare,
    convert,
    data,
    doctor,
    generate,
    info,
    profile,
    serve,
    train,
    verify_lossless,
)
from dspark.cli.parser import Parser
from dspark.errors import DSparkError

MISUSE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code. Mistakes a user can mend are one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" instead of ending the run
    _show_warnings()
    if not (sys.argv[1:] if argv is None else argv):
        _parser().print_help(sys.stderr)
        return MISUSE
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()  # here, where a closed pipe is caught, and not at exit
        return code
    except DSparkError as error:
        print("dspark: error:", " ".join(str(error).split()), file=sys.stderr)
        return MISUSE
    except BrokenPipeError:
        # Whoever read us has gone (`| head`). What is still buffered must go nowhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a write to an open file does not know its name
            print(f"dspark: error: {error.strerror}: make room and run the same command again", file=sys.stderr)
            return MISUSE
        if error.filename is None:
            raise
        print(f"dspark: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return MISUSE
    except KeyboardInterrupt:
        print("dspark: interrupted", file=sys.stderr)
        return INTERRUPTED


def _show_warnings() -> None:
    """Those of this package, on stderr. Libraries have handlers of their own; one at the root would say all twice."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.getLogger("dspark").handlers = [handler]


def _parser() -> Parser:
    parser = Parser(
        prog="dspark",
        description="Confidence-scheduled speculative decoding: the text your model would have written, sooner.",
        epilog='Begin with: dspark generate "What is a river?" --compare',
    )
    parser.add_argument("--version", action="version", version=f"dspark {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, verb in (
        ("generate", generate),
        ("chat", chat),
        ("serve", serve),
        ("data", data),
        ("train", train),
        ("calibrate", calibrate),
        ("info", info),
        ("doctor", doctor),
        ("convert", convert),
        ("profile", profile),
        ("capacity", capacity),
        ("compare", compare),
        ("verify-lossless", verify_lossless),
    ):
        summary = (verb.__doc__ or "").splitlines()[0]
        subparser = verbs.add_parser(
            name,
            help=summary,
            description=verb.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(subparser)
        subparser.set_defaults(run=verb.run)
    return parser
