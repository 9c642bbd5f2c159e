"""The axes along which systems are classified, each with its closed vocabulary.

``feedback``, ``teacher_access`` and ``granularity`` are those of the survey of on-policy distillation (card 151),
widened beyond language; ``elicitation``, ``algorithm``, ``skill``, ``vertical`` and ``role`` those of the survey of
distilling language models (Xu et al., 2024, arXiv 2402.13116; card 165); ``knowledge`` and ``scheme`` are the field's
usual ones, which the Distiller study (card 072) factors pipelines by.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.base.errors import ConfigError, suggest

Values = str | Sequence[str]

AXES: dict[str, tuple[str, ...]] = {
    "feedback": (
        "logits",
        "features",
        "relations",
        "labels",
        "traces",
        "outcomes",  # a verifier's or a reward model's
        "preferences",
        "scores",  # of a diffusion model: gradients of its log-density
        "self-play",
        "data",  # real data alone
        "none",
    ),
    "teacher_access": ("white-box", "black-box", "teacher-free"),
    "granularity": ("token", "sequence", "hybrid", "sample", "pixel", "patch", "graph", "data set", "model"),
    "policy": ("off-policy", "on-policy", "mixed", "none"),
    "elicitation": ("labelling", "expansion", "curation", "feature", "feedback", "self-knowledge", "none"),
    "algorithm": (
        "supervised fine-tuning",
        "divergence",
        "similarity",
        "reinforcement learning",
        "ranking",
        "adversarial",
        "condensation",
        "pruning",
        "search",
        "retrieval",
        "none",
    ),
    "knowledge": ("response", "feature", "relation", "data", "score", "none"),
    "scheme": ("offline", "online", "self", "none"),
    "modality": ("text", "image", "video", "audio", "graph", "points", "action", "table"),
    "skill": (
        "instruction following",
        "dialogue",
        "answering from documents",
        "thinking patterns",
        "preferences",
        "values",
        "tool use",
        "planning",
        "understanding",
        "generation",
        "information retrieval",
        "recommendation",
        "judging text",
        "code",
        "multi-modality",
        "none",  # no skill of its own: whatever the data teach
    ),
    "vertical": ("law", "medicine", "finance", "science", "education", "other", "none"),
    "role": ("smaller models", "compression", "self-improvement", "none"),
}


def checked(axis: str, values: Values) -> tuple[str, ...]:
    """The values of one axis as a tuple; raises `ConfigError` with the nearest valid ones for a word not in it."""
    several = (values,) if isinstance(values, str) else tuple(values)
    for value in several:
        if value not in AXES[axis]:
            raise ConfigError(f"{axis}={value!r} is not in the taxonomy{suggest(value, AXES[axis])}")
    return several
