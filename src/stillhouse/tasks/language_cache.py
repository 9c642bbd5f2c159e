"""The teacher of a language task, asked once: its next-token distributions kept on disk for any later run."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.stage import Stage
from stillhouse.tasks.language import LanguageTask
from stillhouse.teachers.cache import (
    FORMAT,
    TeacherCache,
    cached_teacher,
    causal_lm_cache,
    fill_stage,
    model_fingerprint,
)


def teacher_from_cache(task: LanguageTask, *, k: int = 64, error: float = 1e-4) -> Generator[Stage, Artifact, Observed]:
    """Fill (or find) the cache of the task's teacher on its training windows; returns the stand-in for the teacher.

    Read it with `CachedTokenMatch` (``whole=True`` from ``k`` = vocabulary size on), from batches that carry sample
    ids: ``Batches(Numbered(task.windows.train), ..., gather=True)``.

    Args:
        k: tokens kept at each position.
        error: what rounding their log-probabilities may cost, nats of KL a position.
    """
    teacher = model_fingerprint(task.teacher)
    what = {"format": FORMAT, "teacher": teacher, "data": task.windows.fingerprint, "k": k, "error": error}
    whole = {**what, "windows": len(task.windows.train), "vocab_size": task.vocab_size}

    def open_cache(folder: Path) -> TeacherCache:
        return causal_lm_cache(
            folder,
            task.teacher.to(task.run.fabric.device),
            task.windows.train,
            k=min(k, task.vocab_size),
            vocab_size=task.vocab_size,
            error=error,
            fingerprint=f"{teacher}-{task.windows.fingerprint}",
        )

    filled = yield fill_stage("teacher-cache", open_cache, cache=whole)
    return cached_teacher(open_cache(filled.path))
