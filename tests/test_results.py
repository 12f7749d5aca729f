import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("make", ROOT / "results" / "make.py")
make = importlib.util.module_from_spec(specification)
specification.loader.exec_module(make)


def test_the_readme_says_what_the_files_say():
    for page, blocks in ((make.README, ("results", "speed", "reliability")), (make.ASCEND, ("prediction",))):
        text = page.read_text()
        assert make.filled(text) == text, "run: python results/make.py readme"
        for name in blocks:
            assert f"<!-- {name} -->\n|" in text.replace("Dense, predicted", "|")
    assert len(list((ROOT / "results").glob("run_*.json"))) > 0


def test_a_run_is_recorded_from_its_own_files(tmp_path):
    metrics = [{"step": 1, "loss": 2.0}, {"epoch": 1.0, "top1": 50.0}, {"epoch": 2.0, "top1": 75.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in metrics))
    (tmp_path / "run.json").write_text('{"mindspore": "2.10.0"}')
    sections = "data: {train: a, val: b, masks: null, seed: 1}\ntrain: {output: c, epochs: 2}\n"
    (tmp_path / "config.yaml").write_text(sections)
    recorded = make.record(tmp_path, "bash run_train.sh")
    assert recorded["final"] == metrics[-1]
    assert recorded["curve"] == [[1.0, 50.0], [2.0, 75.0]]
    assert recorded["environment"] == {"mindspore": "2.10.0"}
    assert recorded["config"] == {"data": {"seed": 1}, "train": {"epochs": 2}}


def test_a_changed_figure_changes_the_readme(tmp_path, monkeypatch):
    for path in (ROOT / "results").glob("*.json"):
        content = json.loads(path.read_text())
        if path.name.startswith("run_"):
            content["final"]["top1"] = 12.34
        (tmp_path / path.name).write_text(json.dumps(content))
    monkeypatch.setattr(make, "HERE", tmp_path)
    readme = (ROOT / "README.md").read_text()
    assert "12.34% of" in make.filled(readme)
    assert make.filled(make.filled(readme)) == make.filled(readme)


def test_a_figure_has_the_quartiles_of_its_rounds():
    of = {"speed_up": 1.8, "speed_up_quartiles": [1.6, 2.0], "bound": 2.0, "efficiency": 0.9, "peak_memory_ratio": 0.7}
    assert make.quartiles(of, "speed_up") == [1.6, 2.0]
    assert make.quartiles(of, "efficiency") == [0.8, 1.0]
    assert make.quartiles({"ratio": 1.5, "quartiles": [1.4, 1.6]}, "ratio") == [1.4, 1.6]
    assert make.quartiles(of, "peak_memory_ratio") == []
