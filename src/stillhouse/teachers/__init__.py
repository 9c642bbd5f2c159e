"""Teachers that write: behind an OpenAI-compatible endpoint, or in this process."""

from stillhouse.teachers.answers import Answer, AnswerStore, Request, Sampling, read_answers
from stillhouse.teachers.client import Retry
from stillhouse.teachers.endpoint import Budget, EndpointTeacher
from stillhouse.teachers.in_process import LocalTeacher

__all__ = [
    "Answer",
    "AnswerStore",
    "Budget",
    "EndpointTeacher",
    "LocalTeacher",
    "Request",
    "Retry",
    "Sampling",
    "read_answers",
]
