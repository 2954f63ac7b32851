"""python -m benchmarks [NAME ...] [--only PIECE ...] [--quick] [--report-only]"""

import argparse

from benchmarks import harness, linear, report
from benchmarks.names import BENCHMARKS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; nothing is written")
    parser.add_argument("--report-only", action="store_true", help="rewrite docs/performance.md from the JSON files")
    parser.add_argument("--only", nargs="+", metavar="PIECE", choices=linear.PIECES, help="pieces of `linear`")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    for name in [] if given.report_only else given.names or list(BENCHMARKS):
        pieces = {"only": given.only} if given.only and name == "linear" else {}
        result = BENCHMARKS[name](quick=given.quick, **pieces)
        if not given.quick:
            print(f"wrote {harness.save(name, result)}")
    if not given.quick:
        print(f"wrote {report.write()}")


if __name__ == "__main__":
    main()
