"""PS-KD token by token (card 076): a table of the likeliest tokens, or a snapshot, against whole logits by hand."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from stillhouse import Observed, Run
from stillhouse.core.player import Player, sgd
from stillhouse.core.schedule import Progress
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches
from stillhouse.losses.token_logprobs import Head
from stillhouse.models.causal_lm import new_causal_lm
from stillhouse.objectives.language import head_of
from stillhouse.objectives.memory import ByEpoch
from stillhouse.objectives.token_memory import RememberedTokens, SnapshotTokens, TokenMemory
from stillhouse.systems.language.ps_kd_lm import PSKDLM
from stillhouse.teachers.cache import Numbered

sys.path.append(str(Path(__file__).parents[1] / "systems"))
from helpers import make_materials

N, T, V, BATCH, EPOCHS = 8, 6, 13, 4, 3


class Sequences:
    """N sequences of T + 1 tokens, the first two predictions of the even ones not counted."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(V, (N, T + 1), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[::2, :3] = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "loss_mask": self.mask[index]}


def model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    found = new_causal_lm(config, seed=0)
    with torch.no_grad():
        found.lm_head.weight.mul_(20)  # opinions
    return found


def batches() -> Batches:
    return Batches(Numbered(Sequences()), BATCH, seed=0, gather=True)


def term(student: Observed, kind: str, alpha: float) -> Any:
    course = ByEpoch(alpha, EPOCHS)
    if kind == "snapshot":
        return SnapshotTokens(student, alpha=course, vocab_size=V)
    k = {"table": V, "top": 3}[kind]
    return RememberedTokens(head_of(student), TokenMemory(N, T, k=k, vocab_size=V), alpha=course)


def train(folder: Path, kind: str, alpha: float, *, steps: int = EPOCHS * N // BATCH) -> nn.Module:
    net = model()
    student = Observed(net, options={"use_cache": False})
    player = Player("student", student, term(student, kind, alpha), optimizer=sgd(0.2, momentum=0.0))
    Run(folder, quiet=True).execute(iter([Train("student", player, source=batches(), steps=steps)]))
    return net


def by_hand(kind: str, alpha: float, *, steps: int = EPOCHS * N // BATCH) -> nn.Module:
    """Whole logits, a dense table, autograd."""
    net, source = model(), batches()
    optimizer = torch.optim.SGD(net.parameters(), 0.2)
    table: dict[int, Tensor] = {}
    snapshot: Any = None
    for step in range(steps):
        epoch = step // (N // BATCH)
        if step % (N // BATCH) == 0:
            snapshot = copy.deepcopy(net)
        batch = next(source)
        ids, mask = batch["input_ids"], batch["loss_mask"][:, 1:].float()
        logits = net(input_ids=ids).logits[:, :-1]
        hard = nn.functional.one_hot(ids[:, 1:], V).float()
        rows = batch["sample_id"].tolist()
        if kind == "snapshot":
            past = snapshot(input_ids=ids).logits[:, :-1].softmax(-1).detach() if epoch else hard
        else:
            past = torch.stack([table.get(row, one) for row, one in zip(rows, hard, strict=True)])
        a = alpha * (epoch + 1) / EPOCHS
        target = (1 - a) * hard + a * past
        loss = (-(target * logits.log_softmax(-1)).sum(-1) * mask).sum() / mask.sum()
        table |= dict(zip(rows, logits.detach().softmax(-1), strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def distance(one: nn.Module, other: nn.Module) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["table", "snapshot"])
def test_against_a_loop_by_hand(tmp_path, kind):
    """With every token kept; the table is in float16, which is the difference that is left."""
    assert distance(train(tmp_path, kind, 0.9), by_hand(kind, 0.9)) < (2e-3 if kind == "table" else 1e-5)
    assert distance(by_hand(kind, 0.9), by_hand(kind, 0.0)) > 2e-2
    assert distance(by_hand("table", 0.9), by_hand("snapshot", 0.9)) > 1e-2


@pytest.mark.parametrize("kind", ["table", "top", "snapshot"])
def test_without_weight_and_in_the_first_epoch_the_text_alone_teaches(tmp_path, kind):
    first = N // BATCH
    assert distance(train(tmp_path / "zero", kind, 0.0), by_hand(kind, 0.0)) < 1e-5
    assert distance(train(tmp_path / "first", kind, 0.9, steps=first), by_hand(kind, 0.0, steps=first)) < 1e-5
    longer = distance(train(tmp_path / "more", kind, 0.9, steps=first + 1), by_hand(kind, 0.0, steps=first + 1))
    assert longer > 1e-3


def test_what_is_remembered_is_the_likeliest_tokens_and_the_rest():
    memory = TokenMemory(N, T, k=3, vocab_size=V)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, T, 5, generator=generator), torch.randn(V + 3, 5, generator=generator)
    sample, labels = torch.tensor([6, 1]), torch.randint(V, (2, T), generator=generator)
    tokens, log_p, log_rest = memory.recall(sample, labels)
    assert torch.equal(tokens[..., 0], labels) and log_p[..., 0].abs().max() == 0  # not met: the label, surely
    assert log_p[..., 1:].max() < -50 and log_rest.max() < -50
    assert all(len(set(row.tolist())) == 3 for row in tokens.flatten(0, 1))
    memory.remember(sample, hidden, Head(weight))
    tokens, log_p, log_rest = memory.recall(sample, labels)
    p = (hidden @ weight[:V].T).softmax(-1)  # a padded vocabulary's last rows are no tokens
    wanted, places = p.topk(3, -1)
    assert torch.equal(tokens, places)
    torch.testing.assert_close(log_p.exp(), wanted, atol=1e-3, rtol=2e-3)
    torch.testing.assert_close(log_rest.exp(), 1 - wanted.sum(-1), atol=1e-3, rtol=5e-3)
    untouched, *_ = memory.recall(torch.tensor([0, 2]), labels)
    assert torch.equal(untouched[..., 0], labels)


@pytest.mark.parametrize("kind", ["table", "snapshot"])
def test_the_past_is_saved_with_the_term_and_evaluating_changes_nothing(kind):
    net = model()
    first, resumed = (term(Observed(net, options={"use_cache": False}), kind, 0.9) for _ in range(2))
    batch = Numbered(Sequences())[list(range(N))]
    first(batch, Progress(0, 10, epoch=1))
    with torch.no_grad():
        net.lm_head.weight.add_(torch.linspace(-1, 1, V)[:, None])
    state = {name: value.clone() for name, value in first.state_dict().items()}
    first.eval()(batch, Progress(1, 10, epoch=1))
    assert all(torch.equal(state[name], value) for name, value in first.state_dict().items())
    fresh = term(Observed(net, options={"use_cache": False}), kind, 0.9)
    resumed.load_state_dict(state)
    now = Progress(1, 10, epoch=1)
    one, other = first.eval()(batch, now), resumed.eval()(batch, now)
    assert torch.equal(one, other) and not torch.equal(one, fresh.eval()(batch, now))
    assert not any(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("past", ["table", "snapshot"])
def test_prompts_and_translations(tmp_path, past):
    """Pairs of the user's: only completions are predicted; a_t is logged; the result is a model of transformers."""
    (tmp_path / "made").mkdir()
    made = make_materials(tmp_path / "made")
    rows = [{"prompt": f"the cat sees {i % 7}", "completion": "a dog hears " * (1 + i % 3)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"teacher": str(made.teacher), "data": str(tmp_path / "pairs.jsonl"), "student": "layers=1"}
    fields |= {"window": 64, "batch_size": 8, "steps": 12, "validation": 0.2, "selection": 0.1, "lr": 1e-2}
    done = Run(tmp_path / "run", quiet=True).execute(PSKDLM.make(**fields, past=past, alpha=0.6, topk=4))
    (file,) = (tmp_path / "run").glob("stages/*-student/metrics.jsonl")
    lines = [line for line in map(json.loads, file.read_text().splitlines()) if line["kind"] == "train"]
    weights = [value for key, value in lines[-1]["values"].items() if key.endswith("weight") or key.endswith("alpha")]
    assert any(value == pytest.approx(0.6) for value in weights), lines[-1]["values"]
    assert (done["student"].path / "config.json").exists()
