"""Names and other entities in a text, found by a token classifier of ``transformers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stillhouse.base.errors import ModelError
from stillhouse.models.errors import clear_errors
from stillhouse.models.loading import check_report, load_tokenizer, local_folder

TOGETHER = 16  # texts that are read at one time
OUTSIDE = "O"


def entity_finder(
    name: str, *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> Callable[[list[str]], list[list[tuple[int, int]]]]:
    """Load a token classifier (``dslim/bert-base-NER``, say): from texts to the places of the entities in each.

    Everything it does not label ``O`` is an entity; one that begins or ends within a word has the whole word. Texts
    longer than the classifier reads are read in overlapping parts.

    Args:
        name: directory or hub id.

    Raises:
        ModelError: no token classifier there, one that was never trained, or a tokenizer without character offsets.
    """
    from transformers import AutoModelForTokenClassification, pipeline

    folder = local_folder(name)
    with clear_errors(name):
        model, report = AutoModelForTokenClassification.from_pretrained(
            folder or name, use_safetensors=True, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    check_report(name, report)
    if OUTSIDE not in model.config.id2label.values():
        labels = ", ".join(map(str, list(model.config.id2label.values())[:5]))
        raise ModelError(
            f"{name}: has no label {OUTSIDE!r} for what is no entity (its labels: {labels}); use one that has"
        )
    tokenizer = load_tokenizer(name, folder, revision="main", trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer gives no character offsets; use a classifier with a tokenizer.json")
    most = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    tokenizer.model_max_length = min(most, tokenizer.model_max_length)
    options: dict[str, Any] = {"aggregation_strategy": "simple", "stride": tokenizer.model_max_length // 4}
    classify = pipeline(
        "token-classification", model=model.eval(), tokenizer=tokenizer, device=torch.device(device), **options
    )

    def find(texts: list[str]) -> list[list[tuple[int, int]]]:
        found: list[list[tuple[int, int]]] = [[] for _ in texts]
        places = [place for place, text in enumerate(texts) if text.strip()]
        said: Any = classify([texts[place] for place in places], batch_size=TOGETHER) if places else []
        for place, entities in zip(places, said, strict=True):
            found[place] = [whole_words(texts[place], one["start"], one["end"]) for one in entities]
        return found

    return find


def whole_words(text: str, first: int, last: int) -> tuple[int, int]:
    """A place in a text, widened to the words it begins and ends in."""
    while first and text[first - 1].isalnum() and text[first : first + 1].isalnum():
        first -= 1
    while last < len(text) and text[last].isalnum() and text[last - 1 : last].isalnum():
        last += 1
    return first, last
