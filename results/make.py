"""Record runs as JSON here, and write the README's table of results from those files.

python results/make.py record RUN_FOLDER NAME "COMMAND"   # results/NAME.json from a run's own files
python results/make.py readme                             # the block between the markers in README.md
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def record(run: Path, command: str) -> dict[str, Any]:
    """What a finished run found, from its ``metrics.jsonl``, ``run.json`` and ``config.yaml``."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [item for item in metrics if "top1" in item]
    config = yaml.safe_load((run / "config.yaml").read_text())
    for place in ("train", "val", "masks"):  # where the data lay on that machine is nobody's business
        config["data"].pop(place)
    config["train"].pop("output")
    return {
        "command": command,
        "final": validations[-1],
        "curve": [[item["epoch"], item["top1"]] for item in validations],
        "environment": json.loads((run / "run.json").read_text()),
        "config": config,
    }


def table() -> str:
    """The README's block, markers included."""
    lines = [
        "| run | Top-1 | epochs | the object's patches kept | a random choice keeps | file |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(HERE.glob("run_*.json")):
        run = json.loads(path.read_text())
        final, of = run["final"], run["config"]["train"]["epochs"]
        shares = [f"{100 * final[key]:.1f}%" if key in final else "" for key in ("object_kept", "random_kept")]
        epochs = f"{final['epoch']:g}" + ("" if final["epoch"] == of else f" of {of}")
        lines.append(
            f"| `{run['command']}` | {final['top1']:.2f}% of {final['images']} images | {epochs} | {shares[0]} "
            f"| {shares[1]} | [{path.name}](results/{path.name}) |"
        )
    return "\n".join([BEGIN, *lines, END])


def with_table(readme: str) -> str:
    """The README's text with the block brought up to date."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2] if END in rest else rest
    return before + table() + after


def main(argv: list[str]) -> None:
    """See the module."""
    if argv[:1] == ["record"] and len(argv) == 4:
        content = record(Path(argv[1]), argv[3])
        (HERE / f"run_{argv[2]}.json").write_text(json.dumps(content, indent=1) + "\n")
    elif argv == ["readme"]:
        README.write_text(with_table(README.read_text()))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
