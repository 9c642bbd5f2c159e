"""Conversations packed into windows: nothing is lost, nothing seen by a neighbour; models that mix them are refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from stillhouse import Observed
from stillhouse.base.errors import ConfigError
from stillhouse.data.windows import packed
from stillhouse.models import new_causal_lm
from stillhouse.models.packing import check_packing
from stillhouse.objectives.language import TokenCrossEntropy, head_of


def examples(lengths: list[int], T: int = 10) -> dict[str, torch.Tensor]:
    """Example n has the tokens 10 n, 10 n + 1, ...; all but the first two are its response."""
    ids, attention, loss = (torch.zeros(len(lengths), T, dtype=torch.long) for _ in range(3))
    ids += 99
    for row, length in enumerate(lengths):
        ids[row, :length] = 10 * row + torch.arange(length)
        attention[row, :length] = 1
        loss[row, 2:length] = 1
    return {"input_ids": ids, "attention_mask": attention, "loss_mask": loss}


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return new_causal_lm(LlamaConfig(vocab_size=100, initializer_range=0.5, **sizes, **options), seed=0)


def test_every_example_is_whole_and_in_one_window():
    columns = examples([4, 6, 10, 3, 3, 2])
    found = packed(columns)
    assert found["input_ids"].shape == (3, 10)  # 28 tokens
    pieces = []
    for ids, positions in zip(found["input_ids"], found["position_ids"], strict=True):
        parts = list(itertools.pairwise([*positions.eq(0).nonzero()[:, 0].tolist(), 10]))
        pieces += [ids[start:end].tolist() for start, end in parts]
        assert all(positions[start:end].tolist() == list(range(end - start)) for start, end in parts)
    whole = [
        row[: int(mask.sum())].tolist()
        for row, mask in zip(columns["input_ids"], columns["attention_mask"], strict=True)
    ]
    assert sorted(piece for piece in pieces if piece[0] != 99) == sorted(whole)


def test_the_loss_counts_the_same_tokens_with_the_same_values():
    """The summed cross-entropy of packed windows is that of the examples one by one."""
    columns = examples([4, 6, 3, 5, 2])
    model = llama()
    term = TokenCrossEntropy(head_of(Observed(model, options={"use_cache": False})))
    batch = packed(columns)
    assert len(batch["input_ids"]) == 2 and "attention_mask" not in batch
    counts = [one["loss_mask"][:, 1:].sum() for one in (columns, batch)]
    assert counts[0] == counts[1]
    torch.testing.assert_close(term(columns), term(batch), rtol=1e-4, atol=1e-5)


def test_a_response_without_a_prompt_is_not_predicted_from_a_neighbour():
    columns = examples([3, 3])
    columns["loss_mask"][:, :3] = 1
    found = packed(columns)
    assert found["loss_mask"][0].tolist() == [0, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_attention_models_keep_packed_sequences_apart():
    check_packing(llama())


def test_recurrent_models_are_refused():
    from transformers import MambaConfig

    model = new_causal_lm(MambaConfig(vocab_size=100, hidden_size=8, num_hidden_layers=1, state_size=4), seed=0)
    with torch.no_grad():  # as new, it hardly remembers anything
        for parameter in model.parameters():
            parameter.mul_(5)
    with pytest.raises(ConfigError, match="packing=false"):
        check_packing(model)
