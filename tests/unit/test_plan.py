"""Plans of stages: the survey's rules, what the stages cost, which systems fit them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from stillhouse.base.errors import ConfigError
from stillhouse.catalogue import rows
from stillhouse.cli.main import main
from stillhouse.plan import OpenProblem, in_words, off_policy_cost, on_policy_cost, plan, systems_with
from stillhouse.systems import all_systems, get_system


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


def test_a_tour_of_a_survey_fits_no_stage():
    """It has logits and on-policy text among its words, but no arm of it has both."""
    assert all_systems()["elicitation-lm"].meta.domain == "language"
    assert "elicitation-lm" not in systems_with(policy="on-policy", feedback="logits")


def test_words_name_rule_systems_and_memory():
    said = in_words(plan(1e9, teacher=8e9))
    assert "1. off-policy: 70M tokens" in said and "teacher 14.9 GiB" in said and "gkd" in said


def met(**situation: Any) -> dict[str, OpenProblem]:
    return {one.name: one for one in plan(1e9, **situation).problems}


def test_open_problems_of_a_plan():
    usual = met(teacher=8e9)
    assert set(usual) == {"diversity collapse", "uncertain feedback", "scaling laws", "safety"}
    assert "own_responses" in usual["diversity collapse"].here and "`distillm`" in usual["diversity collapse"].why
    assert "`gkd`" not in usual["diversity collapse"].why  # forward KL and the symmetric JSD do not seek modes
    assert set(met(access="teacher-free")) == {"safety"}
    assert "uncertain feedback" not in met(access="black-box")  # no teacher reads the student's text there
    special = met(teacher=8e9, teachers=3, same_tokenizer=False, agent=True)
    assert set(special) - set(usual) == {"several teachers", "tokenizer mismatch", "agents"}
    assert "`alm`" in special["tokenizer mismatch"].here and "`agent-memory`" in special["agents"].here
    assert {name for name in all_systems() if f"`{name}`" in special["tokenizer mismatch"].why} <= {
        row["name"] for row in rows(needs="shared tokenizer")
    }


def test_what_is_named_exists():
    """Systems and fields that the answers send one to."""
    for one in plan(1e9, teacher=8e9, teachers=2, same_tokenizer=False, agent=True).problems:
        for word in re.findall(r"`([\w-]+)`", one.here + one.why):
            assert word in all_systems(), word
    family = get_system("gkd").__dataclass_fields__
    assert {"own_responses", "accept", "divergence"} <= set(family)


def test_what_errors_come_to():
    found = plan(1e9, teacher=8e9, error=0.01)
    assert found.errors["wrong, none made good"] == pytest.approx(37.24, abs=5e-3)
    assert found.errors["wrong, each made good"] == pytest.approx(1.0)
    said = in_words(found)
    assert "37.24 are wrong" in said and "1.00 if each" in said and "open: safety" in said
    assert plan(1e9, teacher=8e9).errors == {} and "errors:" not in in_words(plan(1e9, teacher=8e9))
    main(["advise", "method", "1B", "--teacher", "8B", "--error", "0.02", "--length", "50", "--json"])


@pytest.mark.parametrize(
    "bad",
    [{"access": "grey-box"}, {"tokens": 0}, {"teacher": -1.0}, {"error": 1.5}, {"teachers": 0}, {"length": 0}],
)
def test_bad_questions(bad):
    with pytest.raises(ConfigError):
        plan(1e9, **bad)
