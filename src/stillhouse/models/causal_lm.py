"""Causal language models: load them, scale a student down from a teacher, find the head."""

from stillhouse.models.heads import OutputHead, check_output_head, output_head
from stillhouse.models.loading import has_remote_code, load_causal_lm, read_config
from stillhouse.models.scaling import new_causal_lm, parameter_count, scaled_config, student_from_spec

__all__ = [
    "OutputHead",
    "check_output_head",
    "has_remote_code",
    "load_causal_lm",
    "new_causal_lm",
    "output_head",
    "parameter_count",
    "read_config",
    "scaled_config",
    "student_from_spec",
]
