"""The long parts of the reliability tests: counts of what was tried, survived and lost, into results/reliability.json.

    python tests/reliability/run.py                      # all parts
    python tests/reliability/run.py kills --count 60     # some of them, with another number of trials
    python results/make.py readme                        # then: the table in the README

A part that was interrupted goes on where it stopped when it is given the same --work again. A part is a module beside
this file with ``COUNT``, the trials of a full run, and ``run(work, count)``, which returns a mapping with ``tried``,
``survived``, ``lost`` and whatever else it found.
"""

import argparse
import importlib
import json
import platform
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
RESULT = TESTS.parent / "results" / "reliability.json"
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]


def parts():
    """Names of the modules that have a long part."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if "\ndef run(work" in file.read_text(encoding="utf-8")]


def main(argv=None):
    """See the module; exit 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts())} (all)")
    parser.add_argument("--count", type=int, help="trials (each part's own)")
    parser.add_argument("--work", type=Path, default=Path("runs/reliability"), help="where the trials run")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file that the counts are merged into")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.parts) - set(parts())
    if unknown:
        parser.error(f"no part {sorted(unknown)[0]}; there are {', '.join(parts())}")

    import mindspore

    lost = 0
    for name in arguments.parts or parts():
        part = importlib.import_module(f"reliability.{name}")
        count = arguments.count or part.COUNT
        work = arguments.work.absolute() / name
        work.mkdir(parents=True, exist_ok=True)
        found = part.run(work, count)
        lost += found["lost"]
        results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        results[name] = {
            "what": part.__doc__.split("\n\n")[0].replace("\n", " "),
            "command": f"python tests/reliability/run.py {name} --count {count}",
            "date": time.strftime("%Y-%m-%d"),
            "mindspore": mindspore.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            **found,
        }
        arguments.output.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        print(f"{name}: {json.dumps(found)}", flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
