"""bistil with a narrower student: both phases match the teacher along the same directions."""

from __future__ import annotations

import pytest

from stillhouse.models.text_classifier import load_text_classifier
from stillhouse.systems import all_systems
from stillhouse.tasks.bilingual import DIRECTIONS, read_directions
from stillhouse.workflow import run_system


@pytest.mark.slow
def test_a_narrower_student_passes_both_phases(tmp_path):
    values = {**all_systems()["bistil"].smoke, "trackers": [], "hidden_factor": 2}
    done = run_system("bistil", values, output=tmp_path / "run", quiet=True)
    teacher, student = (load_text_classifier(str(done.artifacts[name].path)).config for name in ("teacher", "student"))
    assert student.hidden_size == teacher.hidden_size // 2
    assert student.intermediate_size == teacher.intermediate_size // 2
    assert student.num_attention_heads == teacher.num_attention_heads
    directions = read_directions(done.artifacts["start"].path / DIRECTIONS)
    assert [one.shape for one in directions] == [(teacher.hidden_size, student.hidden_size)] * (
        teacher.num_hidden_layers + 1
    )
