"""``stillhouse advise``: answers before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from stillhouse.base.errors import ConfigError

advise = typer.Typer(help="Answers before anything is trained.", no_args_is_help=True, rich_markup_mode=None)


@advise.callback()
def _group() -> None:
    """Answers before anything is trained."""


@advise.command()
def teacher(
    student: Annotated[str, typer.Argument(help="The student: a size (1.1B), a directory or a hub id.")],
    teachers: Annotated[
        list[str] | None, typer.Argument(metavar="TEACHER...", help="Teachers to choose from, in the same forms.")
    ] = None,
    law: Annotated[Path | None, typer.Option(help="A finished run of capacity-gap whose law to use.")] = None,
    k: Annotated[
        float | None, typer.Option(help="How many times the student's size; by default the published.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with a model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which teacher is nearest to k times the student's size, and where k is known from."""
    from stillhouse.advise import PUBLISHED, Law, advise_teacher, in_words, law_of_run

    if law is not None and k is not None:
        raise ConfigError("--law and --k are two answers to one question; give one of them")
    chosen = law_of_run(law) if law is not None else PUBLISHED if k is None else Law(k, "given with --k")
    advice = advise_teacher(student, teachers or [], law=chosen, trust_remote_code=trust_remote_code)
    print(json.dumps(advice.to_json(), indent=1) if as_json else in_words(advice))


@advise.command()
def method(
    student: Annotated[str, typer.Argument(help="The student: a size (1.1B), a directory or a hub id.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher, in the same forms.")] = None,
    access: Annotated[str, typer.Option(help="What there is of the teacher: white-box, black-box, teacher-free.")] = (
        "white-box"
    ),
    verifier: Annotated[bool, typer.Option(help="Answers can be judged.")] = False,
    tokens: Annotated[str, typer.Option(help="Tokens to be trained on in all, such as 100M.")] = "100M",
    teachers: Annotated[int, typer.Option(help="How many teachers there are.")] = 1,
    other_tokenizer: Annotated[bool, typer.Option(help="Teacher and student have different tokenizers.")] = False,
    agent: Annotated[bool, typer.Option(help="The student is to act over many turns.")] = False,
    error: Annotated[
        float | None, typer.Option(help="How often the student errs in a step on the teacher's text, such as 0.01.")
    ] = None,
    length: Annotated[int, typer.Option(help="Steps over which errors are reckoned up.")] = 100,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with a model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which stages of distillation to run, with which systems, at what cost, by which rule, and what is open."""
    from stillhouse.advise import model_size
    from stillhouse.models.sizes import parse_size
    from stillhouse.plan import Access, in_words, plan

    def size(entry: str) -> float:
        return model_size(entry, trust_remote_code=trust_remote_code)

    found = plan(
        size(student),
        teacher=size(teacher) if teacher else 0.0,
        access=cast(Access, access),
        verifier=verifier,
        tokens=parse_size(tokens),
        teachers=teachers,
        same_tokenizer=not other_tokenizer,
        agent=agent,
        error=error,
        length=length,
    )
    print(json.dumps(found.to_json(), indent=1) if as_json else in_words(found))
