"""Documents, and the token windows made of them."""

from stillhouse.data.encoding import tokenizer_fingerprint
from stillhouse.data.text import TextData, load_text
from stillhouse.data.windows import Counts, Windows, WindowSplit, tokenize_windows

__all__ = [
    "Counts",
    "TextData",
    "WindowSplit",
    "Windows",
    "load_text",
    "tokenize_windows",
    "tokenizer_fingerprint",
]
