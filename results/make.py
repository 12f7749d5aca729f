"""Record runs as JSON here, and write the README's table of results from those files.

python results/make.py record RUN_FOLDER NAME "COMMAND"   # results/NAME.json from a run's own files
python results/make.py readme                             # the blocks between markers in README.md and docs/ascend.md
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
ASCEND = HERE.parent / "docs" / "ascend.md"


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
    """The runs."""
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
    return "\n".join(lines)


def read(name: str) -> dict[str, Any]:
    """A result, by its file's name without the suffix."""
    return json.loads((HERE / f"{name}.json").read_text())


def speed() -> str:
    """What the benchmark measured: a figure, its command, its file."""
    main, every, mindcv = (read(name) for name in ("benchmark", "benchmark_all_tokens", "benchmark_mindcv"))
    least, large = (read(name) for name in ("sweep", "benchmark_64"))
    images, as_bytes = (read(name) for name in ("benchmark_input", "benchmark_input_bytes"))
    rows = [
        ("training step, dense / skip", "speed_up", main, "{:.2f}x"),
        ("… of what arithmetic allows", "efficiency", main, "{:.3f}"),
        ("… the same, all tokens in the last block", "speed_up", every, "{:.2f}x"),
        ("… of what arithmetic allows", "efficiency", every, "{:.3f}"),
        ("… of what arithmetic allows, least of the sweep below", "least_efficiency", least, "{:.3f}"),
        ("choosing, parting and rejoining tokens, share of the skip step", "token_path_share", main, "{:.2%}"),
        ("peak memory, skip / dense", "peak_memory_ratio", main, "{:.2f}"),
        ("… at 64 images a step", "peak_memory_ratio", large, "{:.2f}"),
        ("dense step / PyTorch's dense step (eager, fused attention)", "against.dense_time.ratio", main, "{:.2f}"),
        ("skip step / PyTorch's dense step", "against.skip_time.ratio", main, "{:.2f}"),
        ("dense step / PyTorch's, all tokens in the last block", "against.dense_time.ratio", every, "{:.2f}"),
        ("skip step / PyTorch's, all tokens in the last block", "against.skip_time.ratio", every, "{:.2f}"),
        ("dense step / mindcv's ViT", "against.dense_time.ratio", mindcv, "{:.2f}"),
        ("skip step / mindcv's ViT", "against.skip_time.ratio", mindcv, "{:.2f}"),
        ("first step of the skip model, compilation included", "skip.first_step_seconds", main, "{:.1f} s"),
        ("JPEGs to training images on one core / Pillow in PyTorch's DataLoader", "input_speed_up", images, "{:.2f}x"),
        ("… without mixup and cutmix, which that has not", "input_speed_up_unmixed", images, "{:.2f}x"),
        ("… and that left in bytes too, as ours are", "input_speed_up_unmixed", as_bytes, "{:.2f}x"),
    ]
    lines = ["| figure | | quartiles | command |", "| --- | --- | --- | --- |"]
    for label, key, result, form in rows:
        *path, last = key.split(".")
        of = result
        for part in path:
            of = of[part]
        spread = " to ".join(form.format(value) for value in quartiles(of, last))
        lines.append(f"| {label} | {form.format(of[last])} | {spread} | {command_of(result)} |")
    return "\n".join(lines)


def quartiles(of: dict[str, Any], key: str) -> list[float]:
    """Of a figure, over the rounds of its run; none of what is measured once."""
    if key == "efficiency":
        return [value / of["bound"] for value in of["speed_up_quartiles"]]
    return of["quartiles"] if key == "ratio" else of.get(f"{key}_quartiles", [])


def command_of(result: dict[str, Any]) -> str:
    """The command that made it, with a link to the file it made."""
    name = result["command"].split("--output ")[1].split()[0]
    return f"[`{result['command'].split(' --output')[0].replace('python -m skipvit.', '')}`]({name})"


def prediction() -> str:
    """The table of predictions for 910A."""
    result = read("prediction_910a")
    lines = [
        f"Dense, predicted: {result['dense_images_per_second']} images/s at most.",
        "",
        "| blocks skipped | kept of 196 | images/s, predicted | speed-up, predicted | by arithmetic alone |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['start']} to {row['end'] - 1} | {row['kept']} | {row['images_per_second']} "
            f"| {row['speed_up']:.2f} | {row['bound']:.2f} |"
        )
    return "\n".join(lines)


def reliability() -> str:
    """What was done to runs, and what they survived: counts of the long parts of ``tests/reliability``."""
    lines = ["| what | tried | survived | lost | command |", "| --- | --- | --- | --- | --- |"]
    for part in read("reliability").values():
        counts = " | ".join(str(part[key]) for key in ("tried", "survived", "lost"))
        lines.append(f"| {part['what']} | {counts} | [`{part['command']}`](results/reliability.json) |")
    return "\n".join(lines)


BLOCKS = {"results": table, "speed": speed, "prediction": prediction, "reliability": reliability}


def filled(text: str) -> str:
    """A page's text with each block between ``<!-- NAME -->`` and ``<!-- /NAME -->`` brought up to date."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


def main(argv: list[str]) -> None:
    """See the module."""
    if argv[:1] == ["record"] and len(argv) == 4:
        content = record(Path(argv[1]), argv[3])
        (HERE / f"run_{argv[2]}.json").write_text(json.dumps(content, indent=1) + "\n")
    elif argv == ["readme"]:
        for page in (README, ASCEND):
            page.write_text(filled(page.read_text()))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
