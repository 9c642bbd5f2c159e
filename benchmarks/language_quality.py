"""Our GKD beside TRL's: one teacher, one student, one text, the same batches and steps, side by side in one process.

Both minimise the generalised Jensen-Shannon divergence (beta 0.5) on the data's text in float32, with AdamW, a cosine
and clipping at 1. Compared are the students' perplexity and agreement with the teacher on held-out text, tokens a
second in training, and the peak of the resident set above what there was before. TRL runs as it comes (it recomputes
activations to save memory) and without that; we are compared with the faster one in speed, and with the leaner one in
memory. Usage: python benchmarks/language_quality.py [--steps N] [--vocab V] [--output FILE]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from _measure import RESULTS, environment, peak_resident, print_table, write_json
from stillhouse import Batches, Observed, Player, Run, Train, adamw, cosine
from stillhouse.data.text import load_text
from stillhouse.data.windows import Windows, tokenize_windows
from stillhouse.losses.divergences import JensenShannon
from stillhouse.metrics.language import compare_causal_lms
from stillhouse.models import new_causal_lm, student_from_spec, train_bpe
from stillhouse.objectives.language import TokenCrossEntropy, TokenMatch, head_of

LR, SEED = 1e-3, 0


def teacher_config(vocab: int, end: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=True,
    )


def trained(name: str, model: Any, objective: Any, windows: Windows, batch: int, steps: int, lr: float) -> float:
    """Train with our own stage; returns its seconds."""
    observed = objective.observed()
    student = next(one for one in observed if one.module is model)
    player = Player(name, student, objective, optimizer=adamw(lr, weight_decay=0.0), lr=cosine(1.0, 0.0), clip=1.0)
    source = Batches(windows.train, batch, seed=SEED, gather=True)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        Run(folder, quiet=True).execute([Train(name, player, source=source, steps=steps, shares_every=0)])
        return time.perf_counter() - begun


def ours(student: Any, teacher: Any, windows: Windows, batch: int, steps: int) -> float:
    watched = Observed(teacher, frozen=True, options={"use_cache": False})
    objective = TokenMatch(
        head_of(Observed(student, options={"use_cache": False})), head_of(watched), JensenShannon(beta=0.5)
    )
    return trained("student", student, objective, windows, batch, steps, LR)


def theirs(
    student: Any, teacher: Any, windows: Windows, batch: int, steps: int, tokenizer: Any, recompute: bool
) -> float:
    """TRL's trainer on the very same batches, in the same order."""
    import datasets
    from torch.utils.data import SequentialSampler
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    source = Batches(windows.train, batch, seed=SEED, gather=True)
    rows = [row for _ in range(steps) for row in next(source)["input_ids"].tolist()]

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([item["input_ids"] for item in items])
        ones = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": ones,
            "labels": ids,
            "prompts": ids[:, :1],
            "prompt_attention_mask": ones[:, :1],
        }

    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=LR,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            max_grad_norm=1.0,
            lmbda=0.0,
            beta=0.5,
            temperature=1.0,
            bf16=False,
            gradient_checkpointing=recompute,
            save_strategy="no",
            report_to=[],
            logging_steps=10,
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
        )
        trainer = InOrder(
            model=student,
            teacher_model=teacher,
            args=config,
            data_collator=collate,
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
        )
        begun = time.perf_counter()
        trainer.train()
        return time.perf_counter() - begun


def figures(students: dict[str, Any], teacher: Any, windows: Windows, vocab: int) -> dict[str, Any]:
    held_out = windows.validation
    batches = [held_out[list(range(start, min(start + 8, len(held_out))))] for start in range(0, len(held_out), 8)]
    models = {"teacher": teacher, **students}
    for model in models.values():
        model.eval()
    return compare_causal_lms(models, batches, vocab_size=vocab, reference="teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULTS / "language_quality.json")
    options = parser.parse_args()

    data = load_text("demo")
    tokenizer = train_bpe(data.documents["text"], vocab_size=options.vocab)
    windows = tokenize_windows(data, tokenizer, window=options.window, validation=0.05)
    vocab = len(tokenizer)
    teacher = new_causal_lm(teacher_config(vocab, tokenizer.eos_token_id), seed=1)
    cross_entropy = TokenCrossEntropy(head_of(Observed(teacher, options={"use_cache": False})))
    trained("teacher", teacher, cross_entropy, windows, options.batch, options.teacher_steps, 1e-3)
    teacher.eval().requires_grad_(False)

    def fresh() -> Any:
        return new_causal_lm(student_from_spec("scale:0.25", teacher.config), seed=SEED)

    def go(kind: str, student: Any, steps: int) -> float:
        if kind == "ours":
            return ours(student, teacher, windows, options.batch, steps)
        return theirs(student, teacher, windows, options.batch, steps, tokenizer, kind == "TRL as it comes")

    kinds = ["ours", "TRL as it comes", "TRL without recomputing"]
    students: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    memory: dict[str, int] = {}
    for kind in kinds:  # the first use of a library costs memory and time that later ones do not
        go(kind, fresh(), 2)
    for _ in range(options.rounds):
        for kind in kinds:
            student = fresh()
            run: Callable[[], float] = lambda kind=kind, student=student: go(kind, student, options.steps)  # noqa: E731
            held: list[float] = []
            peak, how = peak_resident(lambda run=run, held=held: held.append(run()))
            seconds[kind].append(held[0])
            memory[kind] = min(memory.get(kind, peak), peak)
            students[kind] = student
    found = figures(students, teacher, windows, vocab)
    tokens = options.steps * options.batch * options.window
    rate = {kind: tokens / min(seconds[kind]) for kind in kinds}
    rows = [
        [kind, found[kind].perplexity, found[kind].agreement, rate.get(kind, 0.0), memory.get(kind, 0) / 2**20]
        for kind in ("teacher", *kinds)
    ]
    print_table(["", "perplexity", "agreement", "tokens/s", "peak MiB"], rows)
    trl = kinds[1:]
    ratios = {
        "perplexity": found["ours"].perplexity / min(found[kind].perplexity for kind in trl),
        "agreement": found["ours"].agreement / max(found[kind].agreement for kind in trl),
        "tokens_per_second": rate["ours"] / max(rate[kind] for kind in trl),
        "peak_memory": memory["ours"] / min(memory[kind] for kind in trl),
    }
    print(ratios)
    write_json(
        options.output,
        {
            "environment": environment("transformers", "trl", "lightning-fabric"),
            "settings": {key: value for key, value in vars(options).items() if key != "output"},
            "memory_measured": how,
            "seconds": seconds,
            "peak_bytes": memory,
            "figures": {
                kind: {"perplexity": one.perplexity, "agreement": one.agreement, "kl": one.kl}
                for kind, one in found.items()
            },
            "ratios": ratios,
        },
    )


if __name__ == "__main__":
    main()
