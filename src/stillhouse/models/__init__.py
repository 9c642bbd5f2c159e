"""Causal language models and tokenizers: loading, scaling down, comparing."""

from stillhouse.models.causal_lm import (
    OutputHead,
    check_output_head,
    has_remote_code,
    load_causal_lm,
    new_causal_lm,
    output_head,
    parameter_count,
    read_config,
    scaled_config,
    student_from_spec,
)
from stillhouse.models.tokenizers import check_same_tokenizer, real_vocab_size, train_bpe

__all__ = [
    "OutputHead",
    "check_output_head",
    "check_same_tokenizer",
    "has_remote_code",
    "load_causal_lm",
    "new_causal_lm",
    "output_head",
    "parameter_count",
    "read_config",
    "real_vocab_size",
    "scaled_config",
    "student_from_spec",
    "train_bpe",
]
