"""Facts about methods: what is stored stands beside axes and fields, and says nothing that these say."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from stillhouse import catalogue
from stillhouse.base.method_facts import FROZEN, TRAINED, MethodFacts
from stillhouse.catalogue import FACTS, facts_of, rows
from stillhouse.cli.main import main
from stillhouse.systems import all_systems, get_system
from stillhouse.tasks.policies import PolicySystem

KNOWN = {name: system for name, system in all_systems().items() if system.meta.facts is not None}
CARD = {
    *("gkd", "minillm", "seqkd", "distillm", "distillm-2", "f-distill", "opd", "spin", "srpo", "aligndistil"),
    *("kd", "taid", "alm", "sft", "teacher-hacking"),
}


def defaults(name: str) -> dict[str, Any]:
    return {one.name: one.default for one in fields(get_system(name))}


def names(**wanted: str) -> set[str]:
    return {row["name"] for row in rows(**wanted)}


def test_the_language_family_is_filled_in():
    assert set(KNOWN) >= CARD
    for name in CARD:
        found = facts_of(get_system(name))
        assert set(found) == set(FACTS) and found["own_text"] is not None and found["sampler"], name
        assert found["year"] is not None or name == "sft"


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_is_stored_that_fields_say(name):
    stored = KNOWN[name].meta.facts
    if issubclass(KNOWN[name], PolicySystem):
        assert (stored.divergence, stored.own_text, stored.sampler) == ((), None, "")
    else:
        assert stored.own_text is not None and stored.sampler
    assert not (stored.divergence and "divergence" in defaults(name))


@pytest.mark.parametrize("name", KNOWN)
def test_facts_and_axes_agree(name):
    found, meta = facts_of(KNOWN[name]), KNOWN[name].meta
    share, given = found["own_text"], defaults(name)
    policies = {0.0: "off-policy", 1.0: "on-policy"}
    if not given.get("replay"):  # there the share grows by itself
        assert policies.get(share, "mixed") in meta.policy
    assert ("verifier" in found["needs"]) == ("outcomes" in meta.feedback)
    if "shared tokenizer" in found["needs"]:
        assert "logits" in meta.feedback and "white-box" in meta.teacher_access
    assert ("teacher" in found["beside"]) <= ("teacher-free" not in meta.teacher_access)
    assert (found["drawing"] == "nothing drawn") <= (share == 0)
    if found["drawing"] == "likelihood ratio":
        assert "reinforcement learning" in meta.algorithm and found["reward"]


def test_what_is_derived_follows_the_fields():
    assert facts_of(get_system("gkd"))["divergence"] == ("jsd beta=0.5",)
    assert facts_of(get_system("f-distill"))["divergence"] == ("skew-forward skew=0.5", "skew-reverse skew=0.5")
    assert facts_of(get_system("minillm"))["sampler"] == "student with 0.2 of the teacher"
    assert facts_of(get_system("seqkd"))["sampler"] == "teacher, 5 beams"
    assert facts_of(get_system("distillm"))["sampler"] == "data | student, 1000 responses kept"
    assert catalogue.divergences_in({"divergence": "alpha-beta", "skew": 0.2, "beta": 0.7}) == (
        "alpha-beta skew=0.2 beta=0.7",
    )
    assert (facts_of(get_system("gkd"))["year"], facts_of(get_system("kd"))["year"]) == (2024, 2015)
    two = MethodFacts(beside=("DPO model", "reverse DPO model"))
    assert two.memory == 1 + 2 * FROZEN / TRAINED and MethodFacts(beside=()).memory == 1.0


def test_queries(capsys):
    assert {"gkd", "minillm", "spin", "distillm"} <= names(year="2024") and "kd" not in names(year="2024")
    assert names(year="2024", divergence="jsd") == names(year="2024") & names(divergence="jsd") != set()
    assert "srpo" in names(needs="verifier") and "gkd" not in names(needs="verifier")
    assert {"gkd", "kd"} <= names(needs="shared tokenizer") and not {"alm", "spin"} & names(needs="shared tokenizer")
    main(["systems", "--json", "--needs", "verifier", "--domain", "language"])
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == names(needs="verifier", domain="language")
    main(["systems", "--json", "--year", "2024", "--divergence", "reverse"])
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["minillm"]["drawing"] == "likelihood ratio" and "gkd" not in found
    main(["show", "spin"])
    assert (
        "beside: opponent" in (said := capsys.readouterr().out) and "year: 2024" in said and "divergence:" not in said
    )
