"""What the tokens of a fast tokenizer stand for, as bytes: the one language in which two tokenizers can be compared.

``Vocabulary`` reads byte-level BPE (GPT-2, Llama 3, Qwen), BPE and Unigram with byte fallback (SentencePiece: Llama 2,
Gemma) and plain ones. From it follow how tokens of one vocabulary are composed of another's (to inherit embeddings),
which of them are nearest in spelling, and how much a token tells of what does not follow it (`PairBias`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stillhouse.base.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ROLES = ("bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "pad_token_id", "cls_token_id")
"""Special tokens that two tokenizers may share, the most important first."""

FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BLANKS = b" \n\t\r"


class Vocabulary:
    """The tokens of a fast tokenizer as bytes.

    Attributes:
        pieces: bytes of every id; None for special tokens and ids without a token, which stand for no text.
        lengths: (V) number of these bytes.
        special: (V) whether an id is a special token.

    Raises:
        ModelError: a tokenizer that is not a fast one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} is not a fast one, so its tokens cannot be aligned with "
                "another's; use one with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        raw = json.loads(tokenizer.backend_tokenizer.to_str())
        kinds = json.dumps([raw.get("decoder"), raw.get("pre_tokenizer")])
        self._byte_level = '"ByteLevel"' in kinds
        self._letters = bytes_to_unicode()
        known = tokenizer.get_vocab()
        self.size = 1 + max(known.values())
        self.pieces: list[bytes | None] = [None] * self.size
        self.special = np.zeros(self.size, dtype=bool)
        self.special[[number for number in tokenizer.all_special_ids if number < self.size]] = True
        literal = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        values = {letter: byte for byte, letter in self._letters.items()}
        for token, number in known.items():
            if literal.get(token) or self.special[number]:
                self.special[number] = True
            elif token in literal:
                self.pieces[number] = token.encode()
            elif self._byte_level:
                plain = all(letter in values for letter in token)
                self.pieces[number] = bytes(values[letter] for letter in token) if plain else token.encode()
            elif found := FALLBACK.fullmatch(token):
                self.pieces[number] = bytes([int(found[1], 16)])
            else:
                self.pieces[number] = token.replace("▁", " ").encode()
        self.lengths = np.array([len(piece or b"") for piece in self.pieces])

    def text(self, ids: Iterable[int]) -> bytes:
        """The bytes that ``ids`` stand for."""
        return b"".join(self.pieces[number] or b"" for number in ids)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, without special tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def split(self, piece: bytes) -> list[int]:
        """The ids a piece of text has when it stands alone and is not cut at words first; [] if it has none."""
        try:
            text = "".join(self._letters[byte] for byte in piece) if self._byte_level else piece.decode()
        except UnicodeDecodeError:
            return []
        tokens = self.tokenizer.backend_tokenizer.model.tokenize(text if self._byte_level else text.replace(" ", "▁"))
        ids = [token.id for token in tokens]
        return ids if self.text(ids) == piece else []

    def role(self, name: str) -> int | None:
        """The id of a special token by its role (``"eos_token_id"``)."""
        return getattr(self.tokenizer, name, None)

    @property
    def lead(self) -> list[int]:
        """The BOS id, for tokenizers that themselves put it before a text; else nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []

    def boundaries(self) -> np.ndarray:
        """(V) whether a token begins what ends the word before it: a blank, a new line, a tab, or a special token."""
        begins = [piece is not None and piece[:1] in (b" ", b"\n", b"\t") for piece in self.pieces]
        return np.array(begins) | self.special


def compositions(old: Vocabulary, new: Vocabulary) -> list[list[int]]:
    """For every id of ``new`` the ids of ``old`` whose mean it begins as (FVT); [] where there are none.

    A token of the same bytes is taken alone; a special token takes the one of its role, or of its name; any other the
    tokens its bytes have in the old vocabulary (Gee et al., 2022, Fast Vocabulary Transfer, arXiv 2402.09977).
    """
    same = {piece: number for number, piece in reversed(list(enumerate(old.pieces))) if piece}
    names, found = old.tokenizer.get_vocab(), []
    roles: dict[int, int] = {}
    for role in reversed(ROLES):  # the most important has the last word
        theirs, ours = old.role(role), new.role(role)
        if theirs is not None and ours is not None:
            roles[ours] = theirs
    tokens = {number: token for token, number in new.tokenizer.get_vocab().items()}
    for number, piece in enumerate(new.pieces):
        if piece is None:
            named = names.get(tokens.get(number, ""))
            chosen = roles.get(number, named)
            found.append([] if chosen is None else [chosen])
        else:
            found.append([same[piece]] if piece in same else old.split(piece))
    return found


def spellings(old: Vocabulary, new: Vocabulary) -> dict[tuple[int, ...], int]:
    """How the tokens of ``old`` are written in the single bytes of ``new``: ids of ``new`` -> the id of ``old``.

    A special token of ``new`` writes the one of its role, or of its name. Of several old tokens of the same bytes the
    first is taken; those with a byte that ``new`` has not are left out.
    """
    letters = {piece: number for number, piece in reversed(list(enumerate(new.pieces))) if piece and len(piece) == 1}
    found: dict[tuple[int, ...], int] = {}
    for number, parts in enumerate(compositions(old, new)):
        if new.special[number] and parts:
            found[number,] = parts[0]
    for number, piece in enumerate(old.pieces):
        ids = [letters.get(bytes([byte])) for byte in piece or b""]
        written = tuple(each for each in ids if each is not None)
        if written and len(written) == len(ids):
            found.setdefault(written, number)
    return found


def nearest_spelling(teacher: Vocabulary, student: Vocabulary) -> np.ndarray:
    """(V_S) for every student token the teacher's token of the same bytes, or of the least edit distance (MinED).

    Special tokens go by role. Of several at one distance the shortest is taken, then the first. (Wan et al., 2024,
    Knowledge Fusion of Large Language Models, arXiv 2401.10491.) The cost grows with the product of the vocabularies.
    """
    exact = compositions(teacher, student)
    ids = [number for number, piece in enumerate(teacher.pieces) if piece]
    ids.sort(key=lambda number: len(teacher.pieces[number] or b""))
    longest = max(len(teacher.pieces[number] or b"") for number in ids)
    letters_NL = np.full((len(ids), longest), -1, dtype=np.int16)
    for row, number in enumerate(ids):
        letters = list(teacher.pieces[number] or b"")
        letters_NL[row, : len(letters)] = letters
    lengths_N = teacher.lengths[ids]
    nearest = np.zeros(student.size, dtype=np.int64)
    for number, parts in enumerate(exact):
        piece = student.pieces[number]
        if piece is None:
            nearest[number] = parts[0] if parts else 0
        elif len(parts) == 1 and teacher.pieces[parts[0]] == piece:
            nearest[number] = parts[0]
        else:
            nearest[number] = ids[int(_edit_distances(piece, letters_NL, lengths_N).argmin())]
    return nearest


def _edit_distances(piece: bytes, letters_NL: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """(N) Levenshtein distances of ``piece`` to N words, whose letters are padded with -1."""
    N, L = letters_NL.shape
    row = np.tile(np.arange(L + 1), (N, 1))
    for place, letter in enumerate(piece, start=1):
        changed = row[:, :-1] + (letters_NL != letter)
        step = np.minimum(changed, row[:, 1:] + 1)
        row = np.concatenate([np.full((N, 1), place), step], axis=1)
        # An insertion costs one a letter: the running minimum of (cost - place), brought back to its place.
        row = np.minimum.accumulate(row - np.arange(L + 1), axis=1) + np.arange(L + 1)
    return row[np.arange(N), lengths_N]


class PairBias:
    """How much a pair of last tokens tells of what does not follow them: the bias of a chunk that ends there.

    A model that has just written ``the`` as one token will not go on with ``n``, for that it would have written
    ``then``. Where one tokenizer rules out continuations that the other does not, the likelihoods of a chunk are not
    of the same event. The bias is the probability (of tokens as such, in the text) of the continuations that one
    of the two could have covered and the other could not; the larger of both sides. (Minixhofer et al., 2025, arXiv
    2503.20083, section 3.)

    Args:
        counts: how often each id occurs in some text, teacher's and student's.
        smoothing: what is added to every count, as a share of all tokens.
    """

    def __init__(
        self,
        teacher: Vocabulary,
        student: Vocabulary,
        counts: tuple[np.ndarray, np.ndarray],
        *,
        smoothing: float = 1e-9,
    ) -> None:
        self.sides = (teacher, student)
        self.probabilities = []
        for count in counts:
            raised = count + smoothing * count.sum()
            self.probabilities.append(raised / raised.sum())
        self._starts = [_starts(vocabulary) for vocabulary in self.sides]
        self._covers: tuple[dict[int, dict[bytes, float]], ...] = ({}, {})
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, teacher_id: int, student_id: int) -> float:
        pair = (teacher_id, student_id)
        if pair not in self._known:
            self._known[pair] = self._bias(*pair)
        return self._known[pair]

    def _bias(self, teacher_id: int, student_id: int) -> float:
        pieces = [side.pieces[number] for side, number in zip(self.sides, (teacher_id, student_id), strict=True)]
        if None in pieces:
            return 0.0  # nothing is written into a special token
        if any(not (piece or b"").strip(BLANKS) for piece in pieces):
            return 1.0  # blanks: many continuations, and as a rule a high bias
        first, second = self._cover(0, teacher_id), self._cover(1, student_id)
        return max(
            sum(value for key, value in one.items() if key not in other)
            for one, other in ((first, second), (second, first))
        )

    def _cover(self, side: int, number: int) -> dict[bytes, float]:
        """The continuations that tokens beginning inside the token (or with it) cover, with their probabilities."""
        known = self._covers[side]
        if number not in known:
            vocabulary, found = self.sides[side], {}
            piece = vocabulary.pieces[number] or b""
            for place in range(len(piece)):
                before = vocabulary.split(piece[:place]) if place else []
                if place and not before:
                    continue
                for last in self._starts[side].get(piece[place:], ()):
                    whole = piece[:place] + (vocabulary.pieces[last] or b"")
                    if len(whole) > len(piece) and vocabulary.split(whole) == [*before, last]:
                        found[whole[len(piece) :]] = float(self.probabilities[side][last])
            known[number] = found
        return known[number]


def _starts(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    """The ids of the tokens that begin with certain bytes."""
    found: dict[bytes, list[int]] = defaultdict(list)
    for number, piece in enumerate(vocabulary.pieces):
        for end in range(1, len(piece or b"") + 1):
            found[(piece or b"")[:end]].append(number)
    return found


def token_counts(vocabulary: Vocabulary, rows: Iterable[Any]) -> np.ndarray:
    """(V) how often each id occurs in rows of ids."""
    total = np.zeros(vocabulary.size)
    for row in rows:
        total += np.bincount(np.asarray(row), minlength=vocabulary.size)
    return total
