"""Fields of the on-policy family that no system sets by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest

from stillhouse.base.errors import ConfigError
from stillhouse.runs import stage_artifacts
from stillhouse.systems import get_system
from stillhouse.workflow import run_system


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


def run(
    name: str, materials: helpers.Materials, folder: Path, **fields: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """The student's weights, and the figures of the final table."""
    small = helpers.small_values(get_system(name), materials)
    run_system(name, {**small, "steps": 6, **fields}, output=folder, quiet=True)
    artifacts = stage_artifacts(folder)
    return helpers.weights(artifacts["student"].path), artifacts["evaluation"].metrics


@pytest.mark.slow
def test_the_diversity_probe_adds_figures_and_changes_no_other(materials, tmp_path):
    plain_weights, plain = run("gkd", materials, tmp_path / "plain")
    weights, probed = run("gkd", materials, tmp_path / "probed", own_responses=3)
    assert all(helpers.same(tensor, weights[name]) for name, tensor in plain_weights.items())
    new = {key.partition("/")[2] for key in probed.keys() - plain.keys()}
    assert new == {"different", "distinct_1", "distinct_2", "self_bleu", "own_entropy"}
    assert all(plain[key] == probed[key] for key in plain if not key.endswith("tokens_per_second"))
    # the teacher has strong opinions, a student of six steps none: ln 300 = 5.7 nats is that of one that knows nothing
    assert 0 < probed["teacher/own_entropy"] < probed["student/own_entropy"] < 6
    assert probed["teacher/distinct_1"] < probed["student/distinct_1"]
    assert 0 <= probed["student/self_bleu"] <= probed["teacher/self_bleu"] < 1


@pytest.mark.slow
def test_text_of_ones_own_beside_the_students(materials, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(helpers.sentences(60, seed=7), encoding="utf-8")
    same, _ = run("gkd", materials, tmp_path / "same", lm_weight=1.0, lm_data=str(materials.text))
    default, _ = run("gkd", materials, tmp_path / "default", lm_weight=1.0)
    changed, _ = run("gkd", materials, tmp_path / "other", lm_weight=1.0, lm_data=str(other))
    assert all(helpers.same(tensor, same[name]) for name, tensor in default.items())
    assert any(not helpers.same(tensor, changed[name]) for name, tensor in default.items())


@pytest.mark.slow
def test_the_teacher_writes_along_in_one_way_only(materials, tmp_path):
    plain, _ = run("gkd", materials, tmp_path / "plain", on_policy=1.0)
    corrected, _ = run("gkd", materials, tmp_path / "corrected", on_policy=1.0, accept=1)
    assert any(not helpers.same(tensor, corrected[name]) for name, tensor in plain.items())
    with pytest.raises(ConfigError, match="two ways for the teacher to write along"):
        run("gkd", materials, tmp_path / "both", on_policy=1.0, accept=5, teacher_share=0.2)
    with pytest.raises(ConfigError, match="do not go with server"):
        run("gkd", materials, tmp_path / "server", on_policy=1.0, accept=5, server="http://127.0.0.1:9/v1#m")


def test_minillm_without_rounds_writes_at_every_step(materials, tmp_path):
    """And what is not its own text cannot be used again."""
    once, _ = run("minillm", materials, tmp_path / "once", inner_epochs=1, rollouts=1)
    rounds, _ = run("minillm", materials, tmp_path / "rounds", inner_epochs=2, rollouts=4)
    assert any(not helpers.same(tensor, rounds[name]) for name, tensor in once.items())
    with pytest.raises(ConfigError, match="inner_epochs=1 rollouts=1"):
        run("minillm", materials, tmp_path / "half", on_policy=0.5)
