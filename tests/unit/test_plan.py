"""Plans of stages: the survey's rules, what the stages cost, which systems fit them."""

from __future__ import annotations

import pytest

from stillhouse.base.errors import ConfigError
from stillhouse.plan import in_words, off_policy_cost, on_policy_cost, plan, systems_with
from stillhouse.systems import all_systems


def test_a_small_student_of_an_open_teacher():
    found = plan(1e9, teacher=8e9, tokens=1e6)
    assert [one.name for one in found.stages] == ["off-policy", "on-policy"]
    assert sum(one.tokens for one in found.stages) == pytest.approx(1e6)
    assert {"gkd", "minillm"} <= set(found.stages[1].systems)
    assert "kd" in found.stages[0].systems and "minillm" not in found.stages[0].systems
    assert found.memory == {"student in training": 16e9, "teacher": 16e9, "reference": 2e9}


def test_a_verifier_adds_a_stage_and_leads_large_students():
    small, large = plan(1e9, teacher=8e9, verifier=True), plan(8e9, teacher=32e9, verifier=True)
    assert [one.name for one in small.stages] == ["off-policy", "on-policy", "reward"]
    assert [one.name for one in large.stages] == ["off-policy", "reward-guided", "reward"]
    assert "srpo" in large.stages[1].systems and "gkd" not in large.stages[1].systems


def test_a_black_box_gives_text_only():
    found = plan(1e9, access="black-box")
    systems = {name for one in found.stages for name in one.systems}
    assert "seqkd" in systems and not systems & {"gkd", "kd", "taid"}


def test_without_a_teacher():
    (only,) = plan(1e9, access="teacher-free").stages
    assert "srpo" in only.systems and only.tokens == 100e6


def test_what_stages_cost():
    assert off_policy_cost(10, teacher=3, student=2) == 10 * (6 + 12)
    assert on_policy_cost(10, teacher=3, student=2) == 10 * (4 + 6 + 12)


def test_queries_intersect():
    both = set(systems_with(policy="on-policy", feedback="logits"))
    assert both == set(systems_with(policy="on-policy")) & set(systems_with(feedback="logits"))
    assert both < set(all_systems())


def test_words_name_rule_systems_and_memory():
    said = in_words(plan(1e9, teacher=8e9))
    assert "1. off-policy: 70M tokens" in said and "teacher 14.9 GiB" in said and "gkd" in said


@pytest.mark.parametrize("bad", [{"access": "grey-box"}, {"tokens": 0}, {"teacher": -1.0}])
def test_bad_questions(bad):
    with pytest.raises(ConfigError):
        plan(1e9, **bad)
