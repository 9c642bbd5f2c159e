"""Small things for systems to run on, and children in which a run can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.core.system import System
from stillhouse.tasks.language import LanguageSystem

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "river",
    "stone",
    "sees",
    "hears",
    "finds",
    "old",
    "small",
    "bright",
    "and",
    "then",
    "never",
]


@dataclass(frozen=True)
class Materials:
    """A folder with a tiny teacher (``teacher``) and a small text (``text.txt``)."""

    folder: Path

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"


def sentences(count: int, seed: int = 0) -> str:
    """Sentences with some order in them: a word is mostly followed by the next one."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(count):
        place = int(torch.randint(len(WORDS), (1,), generator=generator))
        line = []
        for jump in torch.rand(12, generator=generator).tolist():
            line.append(WORDS[place])
            place = (place + (1 if jump < 0.8 else 5)) % len(WORDS)
        lines.append(" ".join(line) + ".")
    return "\n\n".join(lines) + "\n"


def make_materials(folder: Path) -> Materials:
    """Write a teacher of some thousand weights, with its tokenizer, and a text of some thousand words."""
    from transformers import LlamaConfig

    from stillhouse.models import new_causal_lm, train_bpe

    made = Materials(folder)
    made.text.write_text(sentences(150), encoding="utf-8")
    tokenizer = train_bpe([made.text.read_text(encoding="utf-8")], vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    teacher = new_causal_lm(config, seed=0)
    with torch.no_grad():  # opinions strong enough to be learnt
        teacher.get_output_embeddings().weight.mul_(20)
    teacher.save_pretrained(made.teacher)
    tokenizer.save_pretrained(made.teacher)
    return made


def small_values(system: type[System], materials: Materials) -> dict[str, Any]:
    """Field values with which ``system`` runs in seconds: some twenty steps, saved after ten."""
    fields: dict[str, Any] = {}
    if issubclass(system, LanguageSystem):
        fields = {
            "teacher": str(materials.teacher),
            "data": str(materials.text),
            "student": "layers=1",
            "steps": 22,
            "window": 16,
            "batch_size": 4,
            "validation": 0.2,
            "selection": 0.1,
            "lr": 1e-2,
        }
    elif not system.smoke:
        pytest.fail(f"{system.name()} must say with which field values it runs in seconds: smoke = {{...}}")
    return {**fields, **system.smoke, "trackers": [], "checkpoint_minutes": 1e-9}


def content(folder: Path) -> dict[str, Any]:
    """What an artifact holds that must not differ between two runs of one seed: its tensors and its tables."""
    import pyarrow.parquet as pq

    tables = {str(file.relative_to(folder)): pq.read_table(file) for file in sorted(folder.rglob("*.parquet"))}
    return {**tables, **tensors(folder)}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files of a folder."""
    from safetensors.torch import load_file

    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(one: Any, other: Any) -> bool:
    """Whether two tensors or tables are equal to the bit."""
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one.equals(other)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# -- children -------------------------------------------------------------------------------------------------------


def _child(name: str, values: Mapping[str, Any], output: Path, kill_after: int, said: Path) -> None:
    with said.open("w") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
        torch.set_num_threads(1)
        from stillhouse.base.files import Checkpoints
        from stillhouse.core import run
        from stillhouse.workflow import run_system

        passed = 0

        def then_die(function: Any) -> Any:
            def wrapped(*args: Any) -> None:
                nonlocal passed
                function(*args)
                passed += 1
                if passed == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        write_record, die_after_record = run.write_record, then_die(run.write_record)
        run.write_record = lambda folder, record: (
            die_after_record if record["status"] == "done" and not record.get("cache") else write_record
        )(folder, record)
        Checkpoints.save = then_die(Checkpoints.save)  # type: ignore[method-assign]
        run_system(name, values, output=output, quiet=True)


def run_and_kill(name: str, values: Mapping[str, Any], output: Path, *, after: int = 1) -> None:
    """Run a system in a child that is killed when it has made so many checkpoints or finished so many stages."""
    context = multiprocessing.get_context("forkserver")
    said = output.with_suffix(".said")
    child = context.Process(target=_child, args=(name, dict(values), output, after, said))
    with _plain_main():
        child.start()
    child.join(120)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive and child.exitcode == -signal.SIGKILL, f"exit code {child.exitcode}: {said.read_text()}"


@contextlib.contextmanager
def _plain_main() -> Any:
    """Keep the child from importing pytest's main module again."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file
