"""Objectives: losses bound to the signals of observed models."""

from stillhouse.objectives.adaptive import MomentumRamp
from stillhouse.objectives.features import FeatureMSE
from stillhouse.objectives.language import LanguageHead, TokenCrossEntropy, TokenMatch, head_of
from stillhouse.objectives.logits import CrossEntropy, KLDivergence, LogitMatch

__all__ = [
    "CrossEntropy",
    "FeatureMSE",
    "KLDivergence",
    "LanguageHead",
    "LogitMatch",
    "MomentumRamp",
    "TokenCrossEntropy",
    "TokenMatch",
    "head_of",
]
