"""python -m benchmarks [NAME ...] [--only PIECE ...] [--quick] [--report-only]"""

import argparse

from benchmarks import harness, report
from benchmarks.names import BENCHMARKS, PIECES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; nothing is written")
    parser.add_argument("--report-only", action="store_true", help="rewrite docs/performance.md from the JSON files")
    parser.add_argument("--only", nargs="+", metavar="PIECE", default=[], help=f"pieces of {' or '.join(PIECES)}")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    for piece in given.only:
        known = [one for name in given.names or PIECES for one in PIECES.get(name, ())]
        if piece not in known:
            parser.error(f"no piece {piece!r}: choose from {', '.join(map(repr, known)) or 'none'}")
    names = given.names or [name for name in BENCHMARKS if not given.only or name in PIECES]
    for name in [] if given.report_only else names:
        pieces = [piece for piece in given.only if piece in PIECES.get(name, ())]
        if given.only and not pieces:
            continue
        result = BENCHMARKS[name](quick=given.quick, **({"only": pieces} if pieces else {}))
        if not given.quick:
            print(f"wrote {harness.save(name, result)}")
    if not given.quick:
        print(f"wrote {report.write()}")


if __name__ == "__main__":
    main()
