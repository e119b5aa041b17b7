"""A process that measures one build of fbila for `benchmarks.compare`.

    cd FOLDER && python -m benchmarks.worker [--quick]

FOLDER holds the packages fbila and benchmarks. The first line of standard output says which fbila
is measured; then each line of standard input names a case and is answered by its record.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import fbila

from .cases import find
from .measure import measure
from .timing import make_timer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    # Whatever else is printed in this process must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    print(json.dumps({"package": str(Path(fbila.__file__).parent)}), file=answers)
    timer = make_timer(args.quick)
    with timer.stream():
        for line in sys.stdin:
            case = find(line.strip())
            print(json.dumps(measure(case, timer, case.target_peers)), file=answers)


if __name__ == "__main__":
    main()
