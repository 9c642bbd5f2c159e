"""Tokenizers: train a small one, and make sure that teacher and student share theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stillhouse.base.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PROBE = (
    "The quick brown fox, 1234567890 times: it's  spaced\tout.\n\n    def f(x): return x**2  # 3.14\n"
    "Größe élève НЕТ 東京 한국어 العربية हिन्दी 👩‍🚀🇪🇺 \u00a0\u200b ﬁ e\u0301 <b>&amp;</b> https://a.b/c?d=e"
)
"""Text on which two tokenizers with one vocabulary but other rules (merges, normalisation) would differ."""


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    min_frequency: int = 2,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: lossless on any text, the same every time.

    Args:
        texts: what it is trained on.
        vocab_size: number of tokens at most; a small text may give fewer. All 256 bytes are always among them.
        special_tokens: tokens that stand for themselves; the first is EOS, BOS and padding.
        min_frequency: how often a pair of tokens must occur to become one token.

    Raises:
        ModelError: no special token, or a vocabulary too small for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not special_tokens:
        raise ModelError("special_tokens is empty: the first one is the end of every document; give at least one")
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ModelError(f"vocab_size={vocab_size}: must be at least {least}, all bytes and the special tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    end = special_tokens[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        bos_token=end,
        pad_token=end,
        additional_special_tokens=list(special_tokens[1:]),
        clean_up_tokenization_spaces=False,
    )


def real_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids that mean something: the largest id of any token, added ones included, plus one.

    The embedding of a model may have more rows (padded to a round number); those are noise to distil from.
    """
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int:
    """Make sure that two tokenizers give every text the same ids.

    Compares the vocabularies, added tokens included, and the ids of a probe text; the embeddings of the two
    models may be padded to different sizes.

    Returns:
        The common :func:`real_vocab_size`.

    Raises:
        ModelError: naming the first difference, in the order of the ids.
    """
    difference = _first_difference(teacher.get_vocab(), student.get_vocab()) or _probe_difference(teacher, student)
    if difference:
        raise ModelError(
            f"teacher and student have different tokenizers: {difference}; use a student with the teacher's tokenizer"
        )
    return real_vocab_size(teacher)


def _first_difference(teacher: dict[str, int], student: dict[str, int]) -> str:
    if teacher == student:
        return ""
    apart = teacher.items() ^ student.items()
    token = min(apart, key=lambda item: (item[1], item[0]))[0]
    places = [f"id {ids[token]}" if token in ids else "missing" for ids in (teacher, student)]
    return (
        f"token {token!r} is {places[0]} for the teacher and {places[1]} for the student "
        f"({len(teacher):,} and {len(student):,} tokens)"
    )


def _probe_difference(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str:
    for word in (*PROBE.split(" "), PROBE):
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for tokenizer in (teacher, student)]
        if ids[0] != ids[1]:
            return f"the same vocabulary, but {word[:40]!r} becomes {ids[0][:8]} and {ids[1][:8]}"
    return ""
