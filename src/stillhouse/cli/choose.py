"""``stillhouse choose``: from what is wanted and what there is of a teacher to a command."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def choose(
    elicitation: Annotated[str, typer.Argument(help="What the teacher is asked for: labelling, expansion, ...")],
    algorithm: Annotated[str, typer.Argument(help="How it is learnt: 'supervised fine-tuning', divergence, ...")],
    access: Annotated[
        str, typer.Option(help="What there is of the teacher: teacher-free, black-box, logits or white-box.")
    ] = "white-box",
    domain: Annotated[str, typer.Option(help="Only systems of this domain.")] = "",
    teacher: Annotated[
        str, typer.Option(help="The teacher's directory: say what its licence is, for using what it writes.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which systems do what is wanted with the access there is, and with which fields."""
    from stillhouse.navigation import recipes_for
    from stillhouse.teachers.licence import licence_of

    found = recipes_for(elicitation, algorithm, access=access, domain=domain)
    licence = licence_of(teacher) if teacher else None
    if as_json:
        terms = {"teacher": licence.to_json()} if licence else {}
        print(json.dumps({"recipes": [one.to_json() for one in found], **terms}, indent=1))
        return
    for one in found:
        print(f"{one.command()}    # {one.domain}, {one.access}, {one.verdict or 'not checked'}")
    if not found:
        print(f"no system has {elicitation} with {algorithm} here; see `stillhouse systems --matrix`")
    if licence:
        print(f"teacher: {licence.note}")
