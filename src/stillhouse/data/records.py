"""The forms a record may have, checked by ``pydantic``, and the document each becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, Field, ValidationError, create_model

Kind = Literal["text", "prompt-completion", "messages"]

ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
ACCEPTED = (
    "{text}, {prompt, completion}, {messages: [{role, content}]}, {conversations: [{from, value}]} "
    "or {instruction, input, output}"
)


class Form(BaseModel):
    """One way to write a record: ``marks`` are the fields it is known by."""

    kind: ClassVar[Kind] = "text"
    marks: ClassVar[tuple[str, ...]]

    def document(self) -> dict[str, Any]:
        """The columns of ``kind``."""
        return self.model_dump()


class Message(BaseModel):
    role: Annotated[str, AfterValidator(lambda role: ROLES.get(role, role))] = Field(
        validation_alias=AliasChoices("role", "from")
    )
    content: str = Field(validation_alias=AliasChoices("content", "value"))


class _Messages(Form):
    kind = "messages"
    marks = ("messages",)
    messages: list[Message] = Field(min_length=1)


class _Conversations(Form):
    kind = "messages"
    marks = ("conversations",)
    messages: list[Message] = Field(min_length=1, validation_alias="conversations")


class _PromptCompletion(Form):
    kind = "prompt-completion"
    marks = ("prompt", "completion")
    prompt: str
    completion: str


class _Instruction(Form):
    kind = "prompt-completion"
    marks = ("instruction", "output")
    instruction: str
    input: str | None = None
    output: str

    def document(self) -> dict[str, Any]:
        prompt = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return {"prompt": prompt, "completion": self.output}


def text_form(name: str) -> type[Form]:
    """Records whose text is in the field ``name``."""
    form = create_model("_Text", __base__=Form, text=(str, Field(validation_alias=name)))
    form.marks = (name,)
    return form


FORMS = (_Messages, _Conversations, _PromptCompletion, _Instruction, text_form("text"))


def form_of(names: Iterable[str]) -> type[Form] | None:
    """The first form that fields of these names can have."""
    held = set(names)
    return next((form for form in FORMS if held.issuperset(form.marks)), None)


def find_form(reads: Iterable[Callable[[], Any]]) -> type[Form] | None:
    """The form of the first record that has one."""
    for read in reads:
        with suppress(ValueError):
            record = read()
            if isinstance(record, dict) and (form := form_of(record)):
                return form
    return None


def to_document(record: Any, form: type[Form] | None) -> dict[str, Any]:
    """What a record says, in the columns of the form's kind.

    Raises:
        ValueError: it is not of this form; see :func:`problem`.
    """
    if not isinstance(record, dict):
        raise ValueError('must be an object such as {"text": ...}')
    if form is None:
        raise ValueError(f"no text in a record with {_names(record)}; use {ACCEPTED}, or set text_field")
    return form.model_validate(record).document()


def features(form: type[Form] | None) -> dict[str, Any]:
    """The columns of documents, as ``datasets`` describes them."""
    import datasets

    string = datasets.Value("large_string")  # a batch may hold more than 2 GiB
    if form is None or form.kind == "text":
        return {"text": string}
    if form.kind == "prompt-completion":
        return {"prompt": string, "completion": string}
    return {"messages": datasets.List({"role": string, "content": string})}


def problem(error: ValueError) -> str:
    """What is wrong with a record, for people."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error}); convert the file, for example with: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    found = f"it has {_names(first['input'])}" if first["type"] == "missing" else f"it is {first['input']!r:.40}"
    return f"field {'.'.join(map(str, first['loc']))!r}: {first['msg']} ({found})"


def _names(record: dict[str, Any]) -> str:
    return ("the fields " + ", ".join(map(repr, list(record)[:8]))) if record else "no fields"
