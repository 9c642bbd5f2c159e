"""Measurements of models."""

from stillhouse.metrics.calibration import Reliability
from stillhouse.metrics.language import LanguageFigures, compare_causal_lms, tokens_per_second

__all__ = ["LanguageFigures", "Reliability", "compare_causal_lms", "tokens_per_second"]
