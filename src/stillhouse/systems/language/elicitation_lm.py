"""The six ways to ask a teacher, and what is learnt from each: the survey's pillars on language models."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.divergences import ForwardKL, JensenShannon, ReverseKL
from stillhouse.objectives.language import TokenCrossEntropy, TokenMatch, head_of
from stillhouse.objectives.ranked_responses import RankedResponses, preferring_by_mean
from stillhouse.objectives.responses import PolicyGradient, preferring
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.lm_elicitation import WAYS, Ask, Asking, AskingSystem, Learn

SFT, RL = "supervised fine-tuning", "reinforcement learning"
DIVERGENCES = {"forward-kl": ForwardKL, "reverse-kl": ReverseKL, "jsd": JensenShannon}


@dataclass(kw_only=True)
class ElicitationLM(AskingSystem):
    """Elicitation and distillation algorithms of a survey on KD of LLMs (Xu et al., 2024, arXiv 2402.13116).

    A student learns ``labelled`` seeds, then goes on with them and what ``ask`` elicits: the teacher's answers to given
    prompts (labelling), new problems that it writes after demonstrations (expansion) or on topics (curation), its
    logits (feature), its ranking of the student's guesses (feedback), own answers that agree (self-knowledge), nothing
    (none). ``learn``: fine-tuning, a divergence, a ranking loss, or a reward model and E r - beta KL to the start.
    """

    meta = Meta(
        card=165,
        title="Six ways to ask a language model",
        domain="language",
        family="survey: elicitation x algorithm",
        citation="Xu et al. (2024), A Survey on Knowledge Distillation of Large Language Models, arXiv 2402.13116",
        feedback=("traces", "logits", "preferences"),
        teacher_access=("white-box", "black-box", "teacher-free"),
        granularity=("sequence", "token"),
        policy=("off-policy", "on-policy"),
        elicitation=("labelling", "expansion", "curation", "feature", "feedback", "self-knowledge"),
        algorithm=(SFT, "divergence", "ranking", RL),
        scheme=("offline", "self"),
        stages="3-6",
        skill="thinking patterns",
        role="smaller models",
    )
    recipes: ClassVar = {
        **{(ask, SFT): {"ask": ask} for ask in ("labelling", "expansion", "curation", "self-knowledge")},
        ("feature", "divergence"): {"ask": "feature"},
        ("feedback", "ranking"): {"ask": "feedback", "learn": "dpo"},
        ("feedback", RL): {"ask": "feedback", "learn": "reward"},
    }
    smoke: ClassVar = {**AskingSystem.smoke, "ask": "feedback", "learn": "reward"}

    ask: Annotated[Ask, "what the teacher is asked for; self-knowledge: the student itself"] = "labelling"
    learn: Annotated[Learn | None, "how: by default sft; of features divergence, of feedback dpo"] = None
    weight: Annotated[float, "of what is elicited, beside the seeds", Ge(0)] = 1.0
    divergence: Annotated[Literal["forward-kl", "reverse-kl", "jsd"], "feature: token by token"] = "forward-kl"
    beta: Annotated[float, "feedback: of DPO, and of the KL to the start beside the reward", Gt(0)] = 0.1
    group: Annotated[int, "reward: responses that the student writes to a prompt in a step", Ge(2)] = 4

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        ask, learn = self.ask, self.learn or WAYS[self.ask][0]
        if learn not in WAYS[ask]:
            raise ConfigError(f"learn={learn} does not go with ask={ask}; what does: {', '.join(WAYS[ask])}")
        asking = yield from Asking.prepare(self, run, ask)
        first = yield asking.first("seeds")
        elicited = yield from asking.elicit(ask, first)
        reward: Artifact | None = None
        if elicited is not None and learn == "reward":
            reward = yield asking.reward("reward", first, elicited)
        lesson = partial(self.lesson, asking, first, learn)
        student = yield asking.train("student", first, learn, elicited, lesson, reward=reward, group=self.group)
        yield asking.evaluation({"student": student, "seeds": first}, elicited)

    def lesson(self, asking: Asking, first: Artifact, learn: Learn, student: Observed) -> Objective:
        """What the student minimises on what was elicited; the seeds' cross-entropy stands beside it."""
        head = head_of(student)
        if learn == "divergence":
            teacher, divergence = head_of(asking.observed_teacher()), DIVERGENCES[self.divergence]()
            return self.weight * TokenMatch(head, teacher, divergence, vocab_size=asking.vocabulary)
        if learn == "pairwise":
            return self.weight * preferring_by_mean(head)
        if learn == "rrhf" or learn == "pro":
            return self.weight * RankedResponses(head, learn)
        if learn == "sft":
            return self.weight * TokenCrossEntropy(head, name="elicited")
        start = head_of(asking.frozen(first, "first"))
        if learn == "dpo":
            return self.weight * preferring(head, start, beta=self.beta, name="dpo")
        # E r - beta KL of whole responses: sums over tokens; of the KL's estimators k2 has the right gradient.
        sums: dict[str, Any] = {"normalisation": "constant", "constant": 1.0, "estimator": "k2"}
        return self.weight * PolicyGradient(head, kl=self.beta, reference=start, **sums)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "seeds": {"ask": "none"},
            **{ask: {"ask": ask} for ask in ("labelling", "feature", "self-knowledge", "feedback")},
            **{f"{ask} from seeds alone": {"ask": ask, "pool": "seeds"} for ask in ("labelling", "expansion")},
        }
        claim = Experiment("elicitation-lm", arms, "16 seeds; equal steps, batches and initial weights").claim
        accuracy = ("share of right answers to held-out problems", "student/accuracy")
        also: dict[str, Any] = {"scope": "consequence"}
        created = "a teacher that writes new problems teaches more than one that answers those at hand"
        return [
            claim("a teacher's answers to problems without any help", *accuracy, "labelling", "seeds"),
            claim(created, *accuracy, "expansion from seeds alone", "labelling from seeds alone", **also),
            claim("its logits teach more than the answers they make", *accuracy, "feature", "labelling", **also),
            claim("own answers that agree help", *accuracy, "self-knowledge", "seeds", **also),
            claim("the teacher's ranking of own guesses helps (dpo)", *accuracy, "feedback", "seeds", **also),
        ]
