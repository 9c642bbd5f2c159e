"""The stage in which a teacher learns the text first: its passes are its own, whatever the students' steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.run import Run
from stillhouse.core.train import Train
from stillhouse.systems import get_system

sys.path.append(str(Path(__file__).parents[1] / "systems"))
import helpers


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.mark.parametrize("name", ["memorisation", "fidelity"])
def test_teacher_epochs_are_passes_over_the_text(materials, tmp_path, name):
    values = helpers.small_values(get_system(name), materials)
    own = {key: value for key, value in values.items() if key not in ("trackers", "checkpoint_minutes")}

    def teacher(steps: int | None, epochs: float) -> Train:
        given: dict[str, Any] = {**own, "steps": steps, "teacher_epochs": epochs}
        stage = next(get_system(name).make(**given).stages(Run(tmp_path / "run", quiet=True)))  # type: ignore[call-overload]
        assert isinstance(stage, Train) and stage.name == "teacher"
        return stage

    once = teacher(3, 1.0)
    assert once.steps == len(once.source) > 3  # all whole batches of the text
    assert teacher(3, 2.0).steps == teacher(None, 2.0).steps == 2 * once.steps
