"""A plan before anything is trained: which stages of distillation, with which systems, and what they cost.

The rules are those of the survey of on-policy distillation (card 151); which systems fit a stage is asked of their
taxonomy, and what is known of them here is their committed verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.base.errors import ConfigError
from stillhouse.base.taxonomy import AXES, Values, checked
from stillhouse.catalogue import row
from stillhouse.models.sizes import format_size
from stillhouse.systems import all_systems

Access = Literal["white-box", "black-box", "teacher-free"]
LARGE = 7e9  # from here on a verifier's reward guides better than logits do
OWN_TEXT = ("on-policy", "mixed")
SHARES = {"off-policy": 0.65, "on-policy": 0.25, "reward": 0.10}


@dataclass(frozen=True)
class StageOfPlan:
    """One stage: what is done, on what share of the tokens, with which systems, at what cost in FLOPs."""

    name: str
    rule: str
    tokens: float
    systems: dict[str, str | None]  # by name, their verdict
    flops: float


@dataclass(frozen=True)
class Plan:
    """The stages in their order, and the bytes of the models that have to be held at one time."""

    stages: list[StageOfPlan]
    memory: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"stages": [one.__dict__ for one in self.stages], "memory": self.memory}


def systems_with(**wanted: Values) -> dict[str, str | None]:
    """Language systems whose every named axis has one of the words, with their verdicts, those shown first."""
    rows = [row(system) for system in all_systems().values() if system.meta.domain == "language"]
    fitting = [one for one in rows if all(set(checked(axis, words)) & set(one[axis]) for axis, words in wanted.items())]
    return {one["name"]: one["verdict"] for one in sorted(fitting, key=lambda one: one["verdict"] != "shown")}


def off_policy_cost(tokens: float, *, teacher: float, student: float) -> float:
    """FLOPs of training on ``tokens`` of text, which the teacher reads or has written: C_T + C_S,train."""
    return tokens * (2 * teacher + 6 * student)


def on_policy_cost(tokens: float, *, teacher: float, student: float) -> float:
    """FLOPs of training on the student's own text: C_S,gen + C_T,forward + C_S,train."""
    return tokens * (2 * student + 2 * teacher + 6 * student)


def plan(
    student: float,
    *,
    teacher: float = 0.0,
    access: Access = "white-box",
    verifier: bool = False,
    tokens: float = 100e6,
) -> Plan:
    """Stages for a student of ``student`` parameters.

    Args:
        teacher: parameters of the teacher; 0 where it is not known or there is none.
        access: what there is of the teacher: its logits, its text, nothing.
        verifier: answers can be judged.
        tokens: to be trained on in all.

    Raises:
        ConfigError: a size or budget that is not positive, or an access that is none.
    """
    if access not in AXES["teacher_access"]:
        raise ConfigError(f"access={access!r}: one of {', '.join(AXES['teacher_access'])}")
    if student <= 0 or tokens <= 0 or teacher < 0:
        raise ConfigError("sizes and the budget of tokens must be positive")
    stages: list[StageOfPlan] = []
    shares = dict(SHARES) if verifier else {"off-policy": 0.7, "on-policy": 0.3}

    def add(name: str, rule: str, share: float, cost: float, **wanted: Values) -> None:
        stages.append(StageOfPlan(name, rule, tokens * share, systems_with(**wanted), cost))

    if access == "teacher-free":
        rule = "no teacher: the model teaches itself, from its own context or its own earlier self"
        cost = on_policy_cost(tokens, teacher=student, student=student)
        add("self-distillation", rule, 1.0, cost, teacher_access="teacher-free", scheme="self")
        return Plan(stages, _memory(student, student if stages else 0.0))
    part = shares["off-policy"]
    text = "labelling" if access == "black-box" else "feature"
    add(
        "off-policy",
        "a warm start on given text, 60 to 70 % of the tokens: what the student writes is no use before it can write",
        part,
        off_policy_cost(tokens * part, teacher=teacher, student=student),
        teacher_access=access,
        policy="off-policy",
        elicitation=text,
    )
    part = shares["on-policy"]
    cost = on_policy_cost(tokens * part, teacher=teacher, student=student)
    if access == "black-box":
        rule = "only the teacher's text: sequence-level, on more of it"
        add("more text", rule, part, cost, teacher_access="black-box", granularity="sequence")
    elif student >= LARGE and verifier:
        rule = f"a student from {format_size(LARGE)} on with a verifier: reward-guided, teacher's logits beside it"
        add("reward-guided", rule, part, cost, policy=OWN_TEXT, feedback="outcomes")
    else:
        rule = f"the teacher's logits on the student's own text, 20 to 30 % of the tokens (below {format_size(LARGE)})"
        add("on-policy", rule, part, cost, teacher_access="white-box", feedback="logits", policy=OWN_TEXT)
    if verifier:
        part = shares["reward"]
        cost = on_policy_cost(tokens * part, teacher=0.0, student=student)
        add("reward", "the verifier's rewards, about 10 % of the tokens", part, cost, feedback="outcomes")
    return Plan(stages, _memory(student, teacher))


def _memory(student: float, teacher: float) -> dict[str, float]:
    """Bytes: float32 weights, gradients and two moments of the student; frozen models in bfloat16."""
    return {"student in training": 16 * student, "teacher": 2 * teacher, "reference": 2 * student}


def in_words(found: Plan) -> str:
    """The plan as lines of text."""
    lines = []
    for number, one in enumerate(found.stages, start=1):
        lines.append(f"{number}. {one.name}: {format_size(one.tokens)} tokens, {one.flops:.1e} FLOPs")
        lines.append(f"   {one.rule}")
        names = [f"{name} ({verdict or 'not checked'})" for name, verdict in one.systems.items()]
        lines.append(f"   systems: {', '.join(names) or 'none yet'}")
    held = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in found.memory.items() if size)
    return "\n".join([*lines, f"memory: {held} (weights and optimizer; activations come on top)"])
