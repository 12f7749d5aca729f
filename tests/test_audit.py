"""The graph that a 910A would be given: what the skip path adds to it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from runs import SMALL_MODEL, run

from skipvit import audit
from skipvit.audit import Operator

SMALL = [*SMALL_MODEL, "model.drop_path=0.1", "skip.end=2"]
TABLE = yaml.safe_load(audit.TABLE.read_text(encoding="utf-8"))


def test_every_row_of_the_table_has_a_source():
    for name, row in TABLE.items():
        assert row["core"] in ("ai_core", "aicpu", "none", "unknown"), name
        assert row["source"], name


@pytest.mark.slow
def test_the_skip_path_adds_no_aicpu_operator_and_no_dynamic_shape(tmp_path):
    done = run("benchmark", "--audit", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["added_aicpu"] == result["dynamic_shapes"] == result["added_unknown"] == []
    operators = result["operators"]
    # Ranking and its inverse; kept, skipped, and the gradient of both.
    assert operators["TopK Float16"] == {"count": 2, "core": "ai_core"}
    assert operators["Gather Float32"] == {"count": 3, "core": "ai_core"}
    assert not any("Scatter" in name for name in operators)
    assert operators["MatMul Float16"]["count"] > 0, "the graph is not the one for Ascend"
    assert "MatMul Float32" not in operators


def test_an_operator_that_falls_to_aicpu_and_a_dynamic_shape_are_told(capsys):
    matmul = Operator("MatMul", "Float16", "(8, 8)")
    dense = (Counter({matmul: 3, Operator("IsFinite", "Float32", "(8)"): 1}), [])
    added = [Operator("TopK", "Float32", "(2, 196)"), Operator("GatherD", "Float16", "(2, 8)")]
    strange = Operator("Whatever", "Float16", "(2, -1)")
    skip = (dense[0] + Counter([*added, strange]), [strange])
    result = audit.report(dense, skip)
    assert result["added_aicpu"] == ["GatherD Float16", "TopK Float32"]
    assert result["added_unknown"] == ["Whatever Float16"]
    assert result["dynamic_shapes"] == ["Whatever"]
    assert "IsFinite Float32 x1" in result["aicpu_in_both"]
    said = capsys.readouterr().out
    assert "not run on Ascend" in said
    assert "GatherD Float16 x1" in said


GRAPH = """
  %0(x) = PrimFunc_Gather(%para1, %para2, I64(0), I64(0)) cnode_attrs: {a: 1}
      : (<Tensor[Float32], (394, 384)>, <Tensor[Int32], (192)>, <Int64, NoShape>) -> (<Tensor[Float32], (192, 384)>)
      # Fullname with scope: (Default/net)
  %1(equiv_y) = TopK(%0, I64(196)) primitive_attrs: {sorted: Bool(1)}
      : (<Tensor[Float16], (-1, 196)>, <Int64, NoShape>) -> (<Tuple[Tensor[Float16],Tensor[Int32]], TupleShape(...)>)
  %2(z) = Add(%1, Tensor(shape=[2], dtype=Float32, value=[
  1.0, 2.0]))
      : (<Tensor[Float32], (2)>, <Tensor[Float32], (2)>) -> (<Tensor[Float32], (2)>)
"""


def test_reading_a_graph(tmp_path):
    path = Path(tmp_path) / "validate.ir"
    path.write_text(GRAPH)
    assert list(audit.read_graph(path)) == [
        (Operator("Gather", "Float32", "(394, 384)"), False),
        (Operator("TopK", "Float16", "(-1, 196)"), True),
        (Operator("Add", "Float32", "(2)"), False),
    ]
