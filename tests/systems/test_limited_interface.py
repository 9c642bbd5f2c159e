"""Logit leakage through an interface that shows a few entries: its answers are kept once, and the clone reads them."""

from __future__ import annotations

import json

import helpers
import pytest

from stillhouse.systems import get_system
from stillhouse.workflow import run_system


@pytest.mark.parametrize("head", ["recovered", "random"])
def test_a_few_entries_and_a_bias_are_enough(tmp_path, head):
    materials = helpers.make_materials(tmp_path)
    values = helpers.small_values(get_system("logit-leakage"), materials)
    limited = {"shows": "log-probs", "top_k": 30, "head": head, "budget": 600, "steps": 4}
    done = run_system("logit-leakage", {**values, **limited}, output=tmp_path / "run", quiet=True)
    found = done.artifacts["recovery"].metrics
    calls = -(-(300 - 1) // 29)
    assert done.artifacts["queries"].metrics == {"records": 600 // calls, "dropped": 60 - 600 // calls}
    assert found["calls"] == 600 // calls * calls <= 600
    assert found["width"] == 16 and found["cosine"] > 0.999
    cached = json.loads((done.artifacts["teacher-cache"].path / "cache.json").read_text())
    assert cached["columns"]["logits"]["k"] == 30
    defences = done.artifacts["defences"].table()
    assert defences.row("all logits")["rank"] == 16
    assert defences.row("top 8, with bias")["rank"] == 16
    assert defences.row("top 8, no bias")["rank"] < 16
    assert defences.row("whole numbers")["cosine"] < defences.row("rounded to 3 decimals")["cosine"] + 1e-9
