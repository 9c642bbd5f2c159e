"""Masked tokens, mean values of objectives, and what the encoder task refuses."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.observed import Observed
from stillhouse.data.masking import IGNORED, Masked, mask_tokens
from stillhouse.data.sources import Batches
from stillhouse.data.windows import WindowSplit
from stillhouse.metrics.objectives import mean_values
from stillhouse.models.elastic import SubNetwork, load_encoder
from stillhouse.objectives import FeatureMSE
from stillhouse.systems.language.autodistil import AutoDistil
from stillhouse.tasks.elastic import Budget
from stillhouse.tasks.encoder import EncoderTask, load_masked_lm

MASK = 99
SPECIAL = [0, MASK]


def masked(seed: int = 0, rate: float = 0.15):  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 99, (200, 50), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    found, labels = mask_tokens(ids, mask_id=MASK, vocab_size=100, special=SPECIAL, rate=rate, generator=generator)
    return ids, found, labels


def test_masking_by_bert_s_shares():
    ids, found, labels = masked()
    picked = labels != IGNORED
    ordinary = ids != 0
    assert torch.equal(labels[picked], ids[picked]) and torch.equal(found[~picked], ids[~picked])
    assert not picked[~ordinary].any()  # special tokens are never asked for
    share = picked.sum() / ordinary.sum()
    assert abs(float(share) - 0.15) < 0.01
    asked, given = ids[picked], found[picked]
    shares = [float((given == MASK).float().mean()), float((given == asked).float().mean())]
    assert abs(shares[0] - 0.8) < 0.03 and abs(shares[1] - 0.1) < 0.03
    assert int(found.max()) <= 99
    again = masked()
    assert torch.equal(again[1], found) and not torch.equal(masked(seed=1)[1], found)


def test_a_masked_source_goes_on_where_it_stood():
    def source() -> Masked:
        rows = [{"input_ids": torch.arange(i, i + 30)} for i in range(12)]
        return Masked(Batches(rows, 4, seed=2), mask_id=MASK, vocab_size=100, special=SPECIAL, seed=5)

    first = source()
    next(first)
    next(first)
    state = first.state_dict()
    expected = [next(first) for _ in range(4)]  # over the end of a pass
    resumed = source()
    resumed.load_state_dict(state)
    for batch in expected:
        found = next(resumed)
        assert torch.equal(found["input_ids"], batch["input_ids"]) and torch.equal(found["labels"], batch["labels"])
    assert resumed.epoch == first.epoch == 1
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in itertools.pairwise(expected))


def test_shards_see_their_own_rows_and_masks():
    rows = [{"input_ids": torch.arange(i, i + 30)} for i in range(8)]
    parts = []
    for rank in range(2):
        source = Masked(Batches(rows, 4), mask_id=MASK, vocab_size=100, special=SPECIAL)
        source.shard = (rank, 2)
        parts.append(next(source))
    assert all(len(part["input_ids"]) == 2 for part in parts)
    assert not torch.equal(parts[0]["labels"] == IGNORED, parts[1]["labels"] == IGNORED)


def test_mean_values_are_means_and_leave_models_as_they_were():
    class Shift(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by, self.calls = nn.Parameter(torch.tensor(by)), 0

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            assert not self.training
            return inputs + self.by

    student, teacher = Shift(1.0), Shift(0.0)
    seen, told = Observed(student), Observed(teacher, frozen=True)
    student.train()
    terms = {
        "one": FeatureMSE(seen.output(), told.output()),
        "scaled": FeatureMSE(seen.output().map(lambda x: 3 * x), told.output()),
    }
    batches = [torch.zeros(2, 3), torch.full((2, 3), 2.0)]
    found = mean_values(terms, batches)
    assert found == pytest.approx({"one": 1.0, "scaled": (3**2 + (9 - 2) ** 2) / 2})
    assert student.training and (student.calls, teacher.calls) == (2, 2)  # once a batch, whoever reads
    with pytest.raises(ValueError, match="no batch"):
        mean_values(terms, [])


def test_budgets():
    row = {"parameters": 100, "megaflops": 2.0}
    assert Budget().allows(row) and Budget(100, 2.0).allows(row)
    assert not Budget(99).allows(row) and not Budget(None, 1.9).allows(row)
    assert SubNetwork.parse(str(SubNetwork(3, 2, 20, 2.5))) == SubNetwork(3, 2, 20, 2.5)


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="each with a name of its own"):
        next(iter(AutoDistil.make(spaces=("a: layers=1 heads=1 hidden=8 ratio=1",) * 2).stages(None)))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")
    from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=300, **small)).save_pretrained(tmp_path / "bert")
    from stillhouse.models import train_bpe

    train_bpe(["a b"], vocab_size=257).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="no mask token"):
        load_masked_lm(str(tmp_path / "bert"))
    DistilBertModel(DistilBertConfig(vocab_size=20, dim=8, n_heads=1, n_layers=1, hidden_dim=8)).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(ModelError, match="BERT"):
        load_encoder(tmp_path / "other")


class Tokens:
    mask_token_id, all_special_ids = MASK, SPECIAL

    def __len__(self) -> int:
        return 100


def test_a_held_out_batch_without_a_masked_token_does_not_count():
    """Its loss would be 0, as if everything had been filled in rightly."""
    ids = torch.zeros(64, 8, dtype=torch.long)  # special tokens only: never masked
    system = SimpleNamespace(eval_windows=64, mask_rate=0.5)
    run = SimpleNamespace(fabric=SimpleNamespace(to_device=lambda batch: batch))
    task = EncoderTask(system, run, None, Tokens(), None, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no token is masked in 64"):
        list(task.batches_of(WindowSplit({"input_ids": ids}), masked=True))
    assert len(list(task.batches_of(WindowSplit({"input_ids": ids})))) == 2
    ids[40:] = 7
    (batch,) = task.batches_of(WindowSplit({"input_ids": ids}), masked=True)
    assert (batch["labels"] != IGNORED).any()
