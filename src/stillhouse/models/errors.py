"""What can go wrong with a model, in one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillhouse.base.errors import ModelError, near, one_line


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers: what matters in them becomes an error here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Whatever loading raises becomes one line."""
    try:
        with quiet():
            yield
    except Exception as error:
        raise ModelError(f"{name}: {_what_to_do(error, near(Path(name).expanduser()))}") from error


def _what_to_do(error: Exception, nearby: str) -> str:
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(map(str, causes))

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if among(hub.GatedRepoError):
        return "access to this hub model must be granted; ask for it on its page, then: hf auth login"
    if among(hub.RevisionNotFoundError):
        return "no such revision on the hub; check revision="
    if among(hub.RepositoryNotFoundError, hub.HFValidationError):
        return (
            f"no such directory, and no such hub model (or it is private: hf auth login){nearby or '; check the name'}"
        )
    if among(SafetensorError):
        return f"weights damaged or cut short ({one_line(error)}); download or save them again"
    if "trust_remote_code" in text:
        return "needs Python code that comes with it; read it, and if you trust it set trust_remote_code=true"
    if "safetensors" in text and "file named" in text:
        return "no safetensors weights on the hub; use a revision that has them, or convert a copy you trust"
    if among(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        return f"no such directory, and the hub cannot be reached; give a local directory, or go online{nearby}"
    if among(ImportError):
        return f"a package is missing ({one_line(error)}); install it"
    return f"cannot be loaded ({one_line(error)}); check its files, or save or download it again"
