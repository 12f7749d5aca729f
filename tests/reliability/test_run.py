"""The command that runs the long parts."""

import json

import pytest

from reliability import kills, run


def test_a_part_s_counts_are_merged_into_the_file(tmp_path, monkeypatch, capsys):
    output = tmp_path / "reliability.json"
    output.write_text(json.dumps({"another": {"tried": 1}}))
    asked = []

    def few(work, count):
        asked.append((work, count))
        return {"tried": count, "survived": count - 1, "lost": 1}

    monkeypatch.setattr(kills, "run", few)
    arguments = ["kills", "--count", "3", "--work", str(tmp_path), "--output", str(output)]
    assert run.main(arguments) == 1, "something was lost"
    assert asked == [(tmp_path / "kills", 3)]
    found = json.loads(output.read_text())
    assert found["another"] == {"tried": 1}
    assert found["kills"]["command"] == "python tests/reliability/run.py kills --count 3"
    assert [found["kills"][key] for key in ("tried", "survived", "lost")] == [3, 2, 1]
    assert "goes on" in found["kills"]["what"]


def test_every_long_part_is_found_and_others_are_refused(capsys):
    assert {"kills", "signals", "disk", "endurance"} <= set(run.parts())
    with pytest.raises(SystemExit):
        run.main(["nothing"])
    assert "no part nothing" in capsys.readouterr().err
