"""A plan before anything is trained: which stages of distillation, with which systems, and what they cost.

The rules are those of the survey of on-policy distillation (card 151); which systems fit a stage is asked of their
taxonomy, and what is known of them here is their committed verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from stillhouse.base.errors import ConfigError
from stillhouse.base.method_facts import FROZEN, TRAINED
from stillhouse.base.taxonomy import AXES, Values, checked
from stillhouse.catalogue import row
from stillhouse.metrics.compounding import expected_errors
from stillhouse.models.sizes import format_size
from stillhouse.systems import all_systems, get_system

Access = Literal["white-box", "black-box", "teacher-free"]
LARGE = 7e9  # from here on a verifier's reward guides better than logits do
OWN_TEXT = ("on-policy", "mixed")
MODE_SEEKING = ("reverse-kl", "skew-reverse")
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
class OpenProblem:
    """One of the survey's open problems that a plan meets: why it does, and what there is for it here."""

    name: str
    why: str
    here: str


@dataclass(frozen=True)
class Plan:
    """The stages in their order, and the bytes of the models that have to be held at one time.

    Attributes:
        problems: what nobody has solved yet of this plan.
        errors: wrong steps among so many, if none is made good and if each is; empty where the error is not known.
    """

    stages: list[StageOfPlan]
    memory: dict[str, float]
    problems: list[OpenProblem] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        stages, problems = ([one.__dict__ for one in some] for some in (self.stages, self.problems))
        return {"stages": stages, "memory": self.memory, "problems": problems, "errors": self.errors}


def systems_with(**wanted: Values) -> dict[str, str | None]:
    """Language systems whose every named axis has one of the words, with their verdicts, those shown first.

    Without tours of a survey: they have many words on every axis, but not all of them together.
    """
    systems = [one for one in all_systems().values() if one.meta.domain == "language" and not one.recipes]
    rows = [row(system) for system in systems]
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
    teachers: int = 1,
    same_tokenizer: bool = True,
    agent: bool = False,
    error: float | None = None,
    length: int = 100,
) -> Plan:
    """Stages for a student of ``student`` parameters.

    Args:
        teacher: parameters of the teacher; 0 where it is not known or there is none.
        access: what there is of the teacher: its logits, its text, nothing.
        verifier: answers can be judged.
        tokens: to be trained on in all.
        teachers: how many there are.
        same_tokenizer: teacher and student have one.
        agent: the student is to act over many turns.
        error: how often the student errs in a step on the teacher's text, if that is known; ``length``: in so many
            steps, what do its errors come to?

    Raises:
        ConfigError: a size or budget that is not positive, an access that is none, or an error that is no probability.
    """
    if access not in AXES["teacher_access"]:
        raise ConfigError(f"access={access!r}: one of {', '.join(AXES['teacher_access'])}")
    if student <= 0 or tokens <= 0 or teacher < 0:
        raise ConfigError("sizes and the budget of tokens must be positive")
    if error is not None and not 0 <= error <= 1:
        raise ConfigError(f"error={error:g}: a probability, from 0 to 1")
    if teachers < 1 or length < 1:
        raise ConfigError("there must be at least one teacher, and at least one step")
    stages: list[StageOfPlan] = []
    shares = dict(SHARES) if verifier else {"off-policy": 0.7, "on-policy": 0.3}

    def finished(memory: dict[str, float]) -> Plan:
        met = open_problems(stages, access=access, teachers=teachers, same_tokenizer=same_tokenizer, agent=agent)
        return Plan(stages, memory, met, {} if error is None else _errors(error, length))

    def add(name: str, rule: str, share: float, cost: float, **wanted: Values) -> None:
        stages.append(StageOfPlan(name, rule, tokens * share, systems_with(**wanted), cost))

    if access == "teacher-free":
        rule = "no teacher: the model teaches itself, from its own context or its own earlier self"
        cost = on_policy_cost(tokens, teacher=student, student=student)
        add("self-distillation", rule, 1.0, cost, teacher_access="teacher-free", scheme="self")
        return finished(_memory(student, student if stages else 0.0))
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
    return finished(_memory(student, teacher))


def _memory(student: float, teacher: float) -> dict[str, float]:
    """Bytes: float32 weights, gradients and two moments of the student; frozen models in bfloat16."""
    return {"student in training": TRAINED * student, "teacher": FROZEN * teacher, "reference": FROZEN * student}


def _errors(error: float, length: int) -> dict[str, float]:
    """Wrong steps, if no error is made good (a student of the teacher's path alone, at worst), and if each is."""
    never, always = (expected_errors(error, length, recovery=recovery) for recovery in (0.0, 1.0))
    return {"error of a step": error, "steps": length, "wrong, none made good": never, "wrong, each made good": always}


def open_problems(
    stages: list[StageOfPlan], *, access: Access, teachers: int, same_tokenizer: bool, agent: bool
) -> list[OpenProblem]:
    """Which of the survey's open problems a plan meets, and what there is for each here."""
    names = list(dict.fromkeys(name for one in stages for name in one.systems))
    known = {name: row(get_system(name)) for name in names}
    seeking = [name for name, one in known.items() if any(d.startswith(MODE_SEEKING) for d in one["divergence"] or ())]
    bound = [name for name, one in known.items() if "shared tokenizer" in one["needs"]]
    agents = [name for name, one in all_systems().items() if one.meta.domain == "agents"]
    own_text = any(one.name == "on-policy" for one in stages)
    taught = access != "teacher-free"
    met = {
        OpenProblem(
            "tokenizer mismatch",
            f"teacher and student have different tokenizers; {_some(bound)} need one",
            "`alm`, by chunks of text; `seqkd` behind an endpoint, by the text alone",
        ): taught and not same_tokenizer,
        OpenProblem(
            "several teachers",
            f"there are {teachers}",
            "no language system learns from several at one time; `advise teacher` chooses one of them",
        ): taught and teachers > 1,
        OpenProblem(
            "diversity collapse",
            f"{_some(seeking)} seek modes: closeness to the teacher is bought with variety",
            "the diversity probe, own_responses=8; divergence=forward-kl does not seek them",
        ): bool(seeking),
        OpenProblem(
            "uncertain feedback",
            "the teacher is asked after the student's own text, which it may never have seen",
            "own_nll (the teacher's loss there) in the final table; accept=25 has the teacher replace what it finds "
            "unlikely; `srpo` weighs by certainty",
        ): own_text,
        OpenProblem(
            "scaling laws",
            "that a budget is best split like this is a rule of thumb, the laws are conjectured",
            "`capacity-gap` fits one of teacher and student size; none of on-policy budgets",
        ): taught,
        OpenProblem(
            "agents",
            "an error changes all that an agent sees from then on, and tools answer too",
            f"{_some(agents)}, from a memory of traces; no on-policy distillation over turns",
        ): agent,
        OpenProblem(
            "safety",
            "what a teacher refuses, its student may not",
            "`memorisation`, `logit-leakage` and `teacher-hacking` look at other harm; refusals are not measured",
        ): True,
    }
    return [problem for problem, applies in met.items() if applies]


def _some(names: list[str], most: int = 4) -> str:
    """The first names, for a sentence."""
    return ", ".join(f"`{name}`" for name in names[:most]) + " and others" * (len(names) > most)


def in_words(found: Plan) -> str:
    """The plan as lines of text."""
    lines = []
    for number, one in enumerate(found.stages, start=1):
        lines.append(f"{number}. {one.name}: {format_size(one.tokens)} tokens, {one.flops:.1e} FLOPs")
        lines.append(f"   {one.rule}")
        names = [f"{name} ({verdict or 'not checked'})" for name, verdict in one.systems.items()]
        lines.append(f"   systems: {', '.join(names) or 'none yet'}")
    if found.errors:
        error, steps, never, always = found.errors.values()
        lines.append(
            f"errors: at {error:g} a step on the teacher's text, of {steps:,} steps {never:.2f} are wrong if none is "
            f"made good (off-policy, at worst), {always:.2f} if each is (on-policy, at best)"
        )
    lines += [f"open: {one.name}: {one.why}. Here: {one.here}" for one in found.problems]
    held = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in found.memory.items() if size)
    return "\n".join([*lines, f"memory: {held} (weights and optimizer; activations come on top)"])
