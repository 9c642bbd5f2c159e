"""Pictures of questions without a certain answer and of text with secrets, as SVG text."""

from __future__ import annotations

import io

import torch

from stillhouse.tasks.choices import Choices, World, choice_tokenizer
from stillhouse.tasks.secrets import DIGITS, WORDS, SecretText, secret_tokenizer

PLAIN, SECRET, BAR = "#eef1f4", "#fb9a99", "#3564a8"


def _svg(figure: object) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    return buffer.getvalue()


def choices_picture(recipe: Choices, *, count: int = 4, answers: int = 5) -> str:
    """Questions, each with the probabilities of its likeliest answers."""
    from matplotlib.figure import Figure

    world, tokenizer = World(recipe), choice_tokenizer(recipe)
    random = torch.Generator().manual_seed(recipe.seed)
    rows = world.rows(count, random)
    questions = rows[:, 1:-1] - recipe.answers - torch.arange(recipe.slots) * recipe.values
    best = world.probabilities(questions).topk(answers)
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    for number, axis in enumerate(figure.subplots(1, count, sharey=True)):
        names = [tokenizer.decode([token]).removeprefix("answer") for token in best.indices[number].tolist()]
        axis.bar(names, best.values[number].tolist(), color=BAR)
        axis.set_ylim(0, 1)
        axis.set_title(tokenizer.decode(rows[number, 1:-1]), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("answer", fontsize=7)
    return _svg(figure)


def secrets_picture(text: SecretText, *, plain: int = 4, secret: int = 2) -> str:
    """Training sentences, the last of them with a secret, token by token."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    tokenizer = secret_tokenizer()
    is_digit = (text.train >= len(WORDS)) & (text.train < len(WORDS) + len(DIGITS))
    holds = is_digit.any(1)
    rows = torch.cat([text.train[~holds][:plain], text.train[holds][:secret]])[:, 1:]
    figure = Figure(figsize=(9, 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.set_xlim(0, rows.shape[1])
    axis.set_ylim(len(rows), 0)
    axis.axis("off")
    for y, row in enumerate(rows.tolist()):
        for x, token in enumerate(row):
            colour = SECRET if len(WORDS) <= token < len(WORDS) + len(DIGITS) else PLAIN
            axis.add_patch(Rectangle((x + 0.02, y + 0.08), 0.96, 0.84, color=colour))
            axis.text(x + 0.5, y + 0.5, tokenizer.decode([token]), ha="center", va="center", fontsize=7)
    return _svg(figure)
