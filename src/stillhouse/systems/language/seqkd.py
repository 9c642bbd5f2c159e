"""Sequence-level knowledge distillation: the student learns the text that the teacher writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.policies import BeamsField, DivergenceField, PolicySystem, TextField


@dataclass(kw_only=True)
class SeqKD(PolicySystem):
    """Sequence-level knowledge distillation (Kim and Rush, EMNLP 2016, arXiv 1606.07947).

    The teacher's distribution over sequences is replaced by its mode, found by beam search, and the student is trained
    on it as on text. ``beams=1`` samples from the teacher instead.
    """

    meta = Meta(
        card=151,
        title="Sequence-level KD",
        domain="language",
        family="response KD",
        citation="Kim and Rush (2016), Sequence-Level Knowledge Distillation, EMNLP 2016, arXiv 1606.07947",
        feedback="traces",
        teacher_access=("white-box", "black-box"),
        granularity="sequence",
        elicitation="labelling",
        algorithm="supervised fine-tuning",
        stages=2,
        role="smaller models",
        facts=MethodFacts(shared_tokenizer=False, beside=(), drawing="nothing drawn"),
    )
    divergence: DivergenceField = "labels"
    text: TextField = "teacher"
    beams: BeamsField = 5

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"pretrain": 1.0, "epochs": 1.0}
        arms = {
            "beam search": common,
            "samples": {**common, "beams": 1},
            "the data's text": {**common, "text": "data"},
        }
        experiment = Experiment("seqkd", arms, "equal steps from equal students")
        agreement = "share of held-out tokens where the most likely next token is the teacher's"
        return [
            experiment.claim(
                "trained on the teacher's text, a student agrees with it more often than trained on the data's",
                agreement,
                "student/agreement",
                "beam search",
                "the data's text",
            ),
            experiment.claim(
                "the teacher's most likely text teaches more than its samples",
                agreement,
                "student/agreement",
                "beam search",
                "samples",
                scope="consequence",
            ),
        ]
