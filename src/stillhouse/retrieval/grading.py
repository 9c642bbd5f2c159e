"""How useful results are, by the judgement of language models: what a grader is asked, and what it must answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, Field


class Grade(BaseModel):
    """A grader's verdict on one result."""

    grade: Annotated[int, Field(ge=0, le=3, description="0 of no use, 1 touches on it, 2 helps, 3 answers it")]


def grade_prompt(query: str, text: str, *, most_characters: int = 8000) -> str:
    """What a grader is asked about one result of a search; the result is cut to ``most_characters``."""
    return (
        "A person searches the history of conversations with an assistant for something that was said or done before. "
        "How well does the exchange below serve the question? Answer with JSON: "
        '{"grade": 0} if it is of no use, 1 if it touches on the matter, 2 if it helps, 3 if it is what was looked '
        "for.\n\n"
        f"Question: {query}\n\nExchange:\n{text[:most_characters]}"
    )


def pooled(rankings: Mapping[str, Sequence[Sequence[str]]], *, depth: int = 10) -> list[list[str]]:
    """For each query the first ``depth`` results of all rankings, each once: what has to be graded."""
    lists = list(rankings.values())
    queries = range(len(lists[0]) if lists else 0)
    return [list(dict.fromkeys(key for ranked in lists for key in ranked[query][:depth])) for query in queries]
