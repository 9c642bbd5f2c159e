"""Answers in a given form: a JSON schema or a pydantic model, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
from pydantic import BaseModel, ValidationError

from stillhouse.base.errors import ConfigError


class Schema:
    """The form that answers must have.

    Args:
        form: a JSON schema (any draft `jsonschema` knows), or a pydantic model, whose validators then count too.

    Raises:
        ConfigError: the schema itself is wrong.
    """

    def __init__(self, form: Mapping[str, Any] | type[BaseModel]) -> None:
        self.model = form if isinstance(form, type) else None
        self.json: dict[str, Any] = self.model.model_json_schema() if self.model else dict(form)  # type: ignore[arg-type]
        checker = jsonschema.validators.validator_for(self.json)
        try:
            checker.check_schema(self.json)
        except jsonschema.SchemaError as error:
            raise ConfigError(f"the JSON schema is wrong at {error.json_path}: {error.message}") from error
        self._checker = checker(self.json)

    def response_format(self) -> dict[str, Any]:
        """The form as endpoints take it."""
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.json, "strict": True}}

    def read(self, text: str) -> tuple[str, str | None]:
        """The JSON in ``text`` (a Markdown fence around it is taken off), and what is wrong with it, if anything is."""
        bare = text.strip()
        if bare.startswith("```") and bare.endswith("```") and "\n" in bare:
            bare = bare.split("\n", 1)[1].rsplit("```", 1)[0].strip()
        try:
            value = json.loads(bare)
        except ValueError as error:
            return bare, f"not JSON ({error})"
        if self.model is not None:
            try:
                self.model.model_validate_json(bare)
            except ValidationError as error:
                first = error.errors()[0]
                return bare, f"{'.'.join(map(str, first['loc'])) or 'the value'}: {first['msg']}"
            return bare, None
        wrong = jsonschema.exceptions.best_match(self._checker.iter_errors(value))
        return bare, f"{wrong.json_path}: {wrong.message}" if wrong else None

    def complaint(self, problem: str) -> str:
        """What a teacher is told whose answer does not fit."""
        return (
            f"That answer cannot be used: {problem[:200]}. Answer again with nothing but JSON that fits this schema:\n"
            f"{json.dumps(self.json)}"
        )
