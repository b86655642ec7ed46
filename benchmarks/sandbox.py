"""Programs per minute of the sandbox, on the solutions of MBPP's test split with their tests.

python benchmarks/sandbox.py --data-dir data/mbpp
python benchmarks/sandbox.py --data-dir data/mbpp --isolation process --workers 1
"""

import argparse
import resource
import time
from collections import Counter

from selftaught.sandbox import Sandbox
from selftaught.tasks import open_task
from selftaught.tasks.programs import program


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--data-dir", help="folder with mbpp.jsonl; default: the Hub")
    parser.add_argument("--isolation", choices=["namespaces", "process"], default="namespaces")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    options = {} if args.data_dir is None else {"data_dir": args.data_dir}
    problems = open_task("mbpp", **options).problems("test")
    programs = [program(problem.tests, problem.gold) for problem in problems]
    start = time.perf_counter()
    with Sandbox(workers=args.workers, isolation=args.isolation) as sandbox:
        opened = time.perf_counter()
        results = sandbox.run(programs)
        seconds = time.perf_counter() - opened
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    rate = 60 * len(programs) / seconds
    print(f"{len(programs)} programs: {dict(Counter(one.outcome for one in results))}")
    print(f"start {opened - start:.2f} s; {seconds:.1f} s, {rate:,.0f} programs per minute")
    print(f"CPU time: {1000 * (used.ru_utime + used.ru_stime) / len(programs):.0f} ms per program")


if __name__ == "__main__":
    main()
