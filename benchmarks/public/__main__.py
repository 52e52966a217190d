"""Judge the predictions by what others published: python -m benchmarks.public [--write] [SOURCE ...]

Traces what is missing (minutes the first time), predicts, and prints one table by source and class. --write also writes
results/public.md and its picture beside this folder.
"""

import argparse
import importlib

from benchmarks.public import report, traces
from benchmarks.public.predictions import predict
from benchmarks.public.rows import Row

SOURCES = ("xmem", "preflight_t4", "detectron2_zoo", "single_rows")


def main() -> None:
    """Trace, predict, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", default=SOURCES)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows: list[Row] = [
        row for source in given.sources for row in importlib.import_module(f"benchmarks.public.{source}").rows()
    ]
    traces.make(case for row in rows if row.case is not None for case in (row.case, *row.bounds))
    found = [(row, predict(row)) for row in rows]
    pairs = [(row, predicted) for row, predicted in found if predicted is not None]
    left_out = [row for row, predicted in found if predicted is None]
    text = report.text(pairs, left_out)
    print(text)
    if given.write:
        report.write(text, pairs)


main()
