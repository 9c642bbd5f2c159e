"""FIRST with a teacher behind an endpoint: it is calibrated and learnt as the same teacher here."""

from __future__ import annotations

import pytest
from test_teachers_elsewhere import close, materials, run, served  # noqa: F401  (fixtures)

from stillhouse.base.errors import ConfigError
from stillhouse.runs import stage_artifacts


def test_a_teacher_behind_an_endpoint_is_as_good_as_one_here(materials, served, tmp_path):  # noqa: F811
    fields = {"topk": 5, "side": "bucket", "teacher_epochs": 0.0, "accumulate": 1}
    here = run("first", materials, tmp_path / "here", **fields)
    there = run("first", materials, tmp_path / "there", teacher=served.url, **fields)
    other = run("first", materials, tmp_path / "other", **{**fields, "c": 5.0})
    one, two = (stage_artifacts(tmp_path / name)["calibration"].json() for name in ("here", "there"))
    assert one["c"] == two["c"] and one["mass"] == pytest.approx(two["mass"], abs=1e-4)
    figure = "student/val_loss"
    assert here["figures"][figure] == pytest.approx(there["figures"][figure], abs=5e-3)
    assert not close(here, other)
    with pytest.raises(ConfigError, match="teacher_epochs"):
        run("first", materials, tmp_path / "tuned", teacher=served.url, **{**fields, "teacher_epochs": 1.0})
    with pytest.raises(ConfigError, match="student_c"):
        run("first", materials, tmp_path / "whole", **{**fields, "side": "whole", "student_c": 1.0})
