"""The embedded clean data: what is held out of it must not stand in what is trained on."""

from __future__ import annotations

import torch

from stillhouse.data.docstrings import docstrings, load_preferences, load_quality
from stillhouse.data.text import TextData
from stillhouse.data.windows import WindowSplit, tokenize_windows
from stillhouse.models import train_bpe


def answers(split: WindowSplit) -> set[tuple[int, ...]]:
    rows = split[torch.arange(len(split))]
    return {tuple(ids[mask.bool()].tolist()) for ids, mask in zip(rows["input_ids"], rows["loss_mask"], strict=True)}


def test_no_held_out_answer_is_trained_on_under_another_question():
    data: TextData = load_quality("demo")
    documents = data.documents
    said = [" ".join(answer.casefold().rstrip(" .").split()) for answer in documents["completion"]]
    known = dict(docstrings())
    assert len(set(said)) == len(said) > 900 and len(known) > len(said)  # some are said of several functions
    assert all(known[q] == a for q, a in zip(documents["prompt"], documents["completion"], strict=True))
    tokenizer = train_bpe(documents["completion"], vocab_size=400)
    windows = tokenize_windows(data, tokenizer, window=128, validation=0.1, selection=0.05)
    train, chosen_by, held_out = map(answers, (windows.train, windows.selection, windows.validation))
    assert len(held_out) == len(windows.validation) > 50
    assert not held_out & (train | chosen_by) and not chosen_by & train


def test_no_worse_answer_is_the_better_one():
    pairs = load_preferences("demo", seed=3)
    assert len({pair.chosen for pair in pairs}) == len(pairs) and all(p.chosen != p.rejected for p in pairs)
