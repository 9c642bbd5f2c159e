"""MEND (card 025): vectors in place of demonstrations, read by a frozen model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig

from stillhouse import Observed, Player, Run, Train, adamw
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import Progress
from stillhouse.data.in_context import (
    UNSCORED,
    Example,
    Item,
    all_maps,
    collate,
    episode,
    key_map,
    pair_streams,
    read_records,
    shown,
    shuffled,
    tasks_of,
)
from stillhouse.data.sources import Drawn
from stillhouse.losses.divergences import ForwardKL
from stillhouse.models import new_causal_lm
from stillhouse.models.demonstration_distiller import (
    DemonstrationDistiller,
    WithDemonstrations,
    WithVectors,
    pieces,
    positions,
)
from stillhouse.objectives.in_context import as_with_demonstrations
from stillhouse.systems.language.mend import MEND
from stillhouse.tasks.in_context import KeyMaps, _key_tokenizer, _split, mean_logprobs

WORDS, WIDTH = 13, 16


def reader(kind: str = "gpt2", seed: int = 0) -> Any:
    if kind == "gpt2":
        config: Any = GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64)
    else:
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    model = new_causal_lm(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():  # opinions that differ, by what was read
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model.eval()


def small(seed: int = 3) -> Any:
    return new_causal_lm(GPT2Config(vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=64), seed=seed).eval()


def distiller(vectors: int = 3, chunks: int = 1, seed: int = 0) -> DemonstrationDistiller:
    return DemonstrationDistiller(small(), vectors=vectors, width=WIDTH, chunks=chunks, seed=seed)


ITEMS = [
    Item((1, 7, 2, 8), (3,), (9,)),
    Item((4, 10, 5, 11, 0, 6), (2, 1), (7, 8)),
    Item((5, 6), (4,), (11, 9, 10)),
]


def batch(items: Any = None, demo_tokens: int = 99) -> dict[str, Tensor]:
    return collate(items or ITEMS, pad=12, demo_tokens=demo_tokens)


class Identity(nn.Module):
    """The distiller that leaves the demonstrations as they are: their embeddings in the reader."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(lm.get_input_embeddings().weight.detach().clone())

    def forward(self, demo_ids: Tensor, demo_mask: Tensor) -> Tensor:
        return self.table[demo_ids]


# -- what is read ---------------------------------------------------------------------------------------------------


def test_a_batch():
    made = batch(demo_tokens=4)
    assert made["demo_ids"].tolist() == [[1, 7, 2, 8], [5, 11, 0, 6], [12, 12, 5, 6]]  # cut and filled at the left
    assert made["demo_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert made["input_ids"].tolist() == [[3, 9, 12, 12], [2, 1, 7, 8], [4, 11, 9, 10]]
    assert made["attention_mask"].sum(1).tolist() == [2, 4, 4]
    no = UNSCORED
    assert made["targets"].tolist() == [[9, no, no], [no, 7, 8], [11, 9, 10]]
    for row, item in enumerate(ITEMS):  # position t says token t + 1
        text = [*item.question, *item.answer]
        for t, target in enumerate(made["targets"][row].tolist()):
            if target != no:
                assert text[t + 1] == target and t + 1 >= len(item.question)


@pytest.mark.parametrize(("kind", "chunks"), [("gpt2", 1), ("llama", 1), ("llama", 4)])
def test_padding_changes_nothing(kind, chunks):
    """Each row alone, without padding, has the logits it has in the batch, for both readers."""
    lm, made = reader(kind), batch()
    vectors = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    together = WithDemonstrations(lm)(*(made[n] for n in ("demo_ids", "demo_mask", "input_ids", "attention_mask")))
    with_vectors = WithVectors(lm)(vectors, made["input_ids"], made["attention_mask"])
    read = distiller(chunks=chunks)
    made_vectors = read(made["demo_ids"], made["demo_mask"])
    for row, item in enumerate(ITEMS):
        alone = batch([item])
        text = len(item.question) + len(item.answer)
        ids = torch.tensor([[*item.demonstrations, *item.question, *item.answer]])
        torch.testing.assert_close(together[row, :text], lm(input_ids=ids).logits[0, -text:], atol=1e-4, rtol=1e-4)
        own = WithVectors(lm)(vectors[row : row + 1], alone["input_ids"], alone["attention_mask"])
        torch.testing.assert_close(with_vectors[row, :text], own[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            made_vectors[row], read(alone["demo_ids"], alone["demo_mask"])[0], atol=1e-5, rtol=1e-4
        )


def test_positions_count_from_the_first_token():
    assert positions(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_demonstrations_themselves_as_vectors_leave_nothing_to_learn(kind):
    lm = reader(kind)
    even = batch([ITEMS[0], Item((4, 10, 5, 11), (2,), (7,))])
    identity = Observed(Identity(lm))
    objective = as_with_demonstrations(identity, lm, labels=0.0, kl=1.0)
    assert objective(even).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        identity.module.table.mul_(0.5)
    assert objective(even).item() > 1e-3


# -- the objective --------------------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    p, q = torch.tensor([[2.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert ForwardKL()(q, p).item() == pytest.approx(0.43304, abs=1e-4)
    assert ForwardKL()(q / 1e4, p / 1e4).item() == pytest.approx(0.0, abs=1e-6)


def test_the_objective_by_hand():
    """KL over all tokens of question and answer, cross-entropy over the answer's; lambda weighs the first."""
    lm, read, made = reader(), distiller(), batch()
    t = WithDemonstrations(lm)(*(made[n] for n in ("demo_ids", "demo_mask", "input_ids", "attention_mask")))
    s = WithVectors(lm)(read(made["demo_ids"], made["demo_mask"]), made["input_ids"], made["attention_mask"])
    kls, losses = [], []
    for row, item in enumerate(ITEMS):
        text = [*item.question, *item.answer]
        for place in range(len(text)):
            p, q = t[row, place].log_softmax(-1), s[row, place].log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum())
        for place in range(len(item.question), len(text)):
            losses.append(-s[row, place - 1].log_softmax(-1)[text[place]])
    kl, ce = torch.stack(kls).mean().item(), torch.stack(losses).mean().item()
    assert kl > 0.01

    def value(**weights: float) -> float:
        return as_with_demonstrations(Observed(read), lm, **weights)(made).item()

    assert value(labels=0.0, kl=1.0) == pytest.approx(kl, abs=1e-5)
    assert value(labels=1.0, kl=0.0) == pytest.approx(ce, abs=1e-5)  # plain meta-training of soft prompts
    assert value(labels=1.0, kl=2.5) == pytest.approx(ce + 2.5 * kl, abs=1e-5)


def test_the_reader_is_not_trained_and_passes_the_gradient_on(tmp_path):
    lm, read = reader(), distiller()
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    start = {name: tensor.clone() for name, tensor in read.state_dict().items()}
    observed = Observed(read)
    objective = as_with_demonstrations(observed, lm, labels=1.0, kl=1.0)
    assert {id(p) for p in objective.parameters()} == set()
    values = objective.evaluate(Turn(objective.signals()), batch(), Progress(0, 1))
    sum(value.weighted for value in values).backward()
    assert read.prompt.grad.abs().sum() > 0 and read.adapter.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in lm.parameters())
    stage = Train(
        "student",
        Player("distiller", observed, objective, optimizer=adamw(1e-2)),
        source=Drawn(lambda _: batch()),
        steps=3,
        save=lambda model, folder: (folder / "done").write_text("1"),
    )
    Run(tmp_path, quiet=True).execute([stage])
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())
    moved = {name for name, tensor in read.state_dict().items() if not torch.equal(start[name], tensor)}
    assert {"prompt", "adapter.weight", "lm.transformer.h.0.attn.c_attn.weight"} <= moved


def test_what_stands_at_padding_does_not_count():
    lm, read, made = reader(), distiller(), batch()
    objective = as_with_demonstrations(Observed(read), lm, labels=1.0, kl=1.0)
    other = {name: tensor.clone() for name, tensor in made.items()}
    other["input_ids"][made["attention_mask"] == 0] = 5
    other["demo_ids"][made["demo_mask"] == 0] = 6
    assert objective(other).item() == pytest.approx(objective(made).item(), abs=1e-5)
    other["demo_ids"][0, -1] = 3  # a demonstration does
    assert abs(objective(other).item() - objective(made).item()) > 1e-5


# -- the distiller --------------------------------------------------------------------------------------------------


def test_vectors_are_the_last_states_of_the_prompt_mapped():
    read, made = distiller(vectors=2), batch([ITEMS[0]])
    assert read(made["demo_ids"], made["demo_mask"]).shape == (1, 2, WIDTH)
    embedded = torch.cat([read.lm.get_input_embeddings()(made["demo_ids"]), read.prompt[None]], 1)
    states = read.lm.base_model(inputs_embeds=embedded).last_hidden_state[:, -2:]
    expected = states @ read.adapter.weight.T + read.adapter.bias
    torch.testing.assert_close(read(made["demo_ids"], made["demo_mask"]), expected, atol=1e-5, rtol=1e-4)
    table = read.lm.get_input_embeddings().weight
    assert all(any(torch.equal(row, known) for known in table) for row in read.prompt)
    same_width = DemonstrationDistiller(small(), vectors=2, width=8)
    assert isinstance(same_width.adapter, nn.Identity)


def test_chunks_are_read_apart_and_stand_side_by_side():
    read, made = distiller(vectors=2, chunks=2), batch([ITEMS[0]])
    whole = read(made["demo_ids"], made["demo_mask"])
    read.chunks = 1
    halves = [read(made["demo_ids"][:, half], made["demo_mask"][:, half]) for half in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, torch.cat(halves, 1))
    assert whole.shape == (1, 4, WIDTH)


@pytest.mark.parametrize("length", [0, 3, 5, 9])
def test_there_are_always_as_many_chunks(length):
    ids = torch.arange(1, length + 1)[None]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], 1)
    found = pieces(padded, (padded > 0).long(), 4)
    assert [row for one, mask in found for row in one[mask.bool()].tolist()] == ids[0].tolist()
    assert len(found) == 4
    assert max(m.sum() for _, m in found) - min(m.sum() for _, m in found) <= 1


def test_vectors_begin_as_large_as_embeddings(tmp_path):
    lm, read, made = reader(), distiller().eval(), batch()
    table = lm.get_input_embeddings()
    embedded = table(made["input_ids"])[made["attention_mask"].bool()]
    none = torch.zeros(2, 0, dtype=torch.int64)
    read.fit_scale(none, none, embedded)  # a soft prompt
    assert read(none, none).pow(2).mean().item() == pytest.approx(embedded.pow(2).mean().item(), rel=1e-4)
    read.fit_scale(made["demo_ids"], made["demo_mask"], embedded)
    vectors = read(made["demo_ids"], made["demo_mask"])
    assert vectors.pow(2).mean().item() == pytest.approx(embedded.pow(2).mean().item(), rel=1e-4)
    read.save(tmp_path, _key_tokenizer(KeyMaps()))
    assert DemonstrationDistiller.load(tmp_path).scale == read.scale != 1.0


def test_without_demonstrations_the_vectors_are_a_plain_soft_prompt():
    read = distiller()
    none = read(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64))
    assert torch.equal(none[0], none[1]) and none.shape == (2, 3, WIDTH)


def test_saved_and_loaded(tmp_path):
    read, made = distiller(chunks=2).eval(), batch()
    read.save(tmp_path, _key_tokenizer(KeyMaps()))
    again = DemonstrationDistiller.load(tmp_path)
    assert torch.equal(again(made["demo_ids"], made["demo_mask"]), read(made["demo_ids"], made["demo_mask"]))


# -- tasks ----------------------------------------------------------------------------------------------------------


def test_embedded_tasks_are_maps():
    records = key_map([4, 0, 4], 6, copies=3)
    assert len(records) == 9 and {record["task"] for record in records} == {"map 4 0 4"}
    assert {(record["input"], record["output"]) for record in records} == {("k0", "v4"), ("k1", "v0"), ("k2", "v4")}
    assert set(records[0]["candidates"]) == {f"v{number}" for number in range(6)}
    maps = torch.tensor([[4, 0, 4], [1, 1, 5]])
    streams = pair_streams(maps, 50, 15, generator=torch.Generator().manual_seed(0))
    assert streams.shape == (50, 30) and (streams[:, ::2] < 3).all() and (streams[:, 1::2] >= 3).all()
    seen = set()
    for row in streams.tolist():
        pairs = {(key, label - 3) for key, label in zip(row[::2], row[1::2], strict=True)}
        (of,) = (n for n, chosen in enumerate(maps.tolist()) if pairs <= set(enumerate(chosen)))
        seen.add(of)
    assert seen == {0, 1}


def test_no_map_that_is_asked_for_is_learnt_from(tmp_path):
    """Neither by the distiller nor, in the first stage, from streams, nor by the model that reads."""
    maps = all_maps(3, 4, seed=1)
    assert len(maps) == 64 == len({tuple(row) for row in maps.tolist()}) and int(maps.max()) == 3
    assert not torch.equal(maps, all_maps(3, 4, seed=2)) and torch.equal(maps, all_maps(3, 4, seed=1))
    learnt, held = ({tuple(row) for row in part.tolist()} for part in KeyMaps().maps())
    assert len(learnt) == 480 and len(held) == 32 and not learnt & held
    system = MEND.make(pretrain_steps=1, steps=1)
    stages = system.stages(Run(tmp_path, quiet=True))
    reader_stage = next(stages)
    streams = next(reader_stage.source)["input_ids"]
    reader_stage.players().trained[0].module.save_pretrained(tmp_path)
    _key_tokenizer(KeyMaps()).save_pretrained(tmp_path)
    pretraining = stages.send(Artifact(kind="model", path=tmp_path))
    task = pretraining.save.__self__
    for keys_and_labels in (streams, task.streams):
        keys, labels = keys_and_labels[:, ::2], keys_and_labels[:, 1::2] - 3
        for row_keys, row_labels in zip(keys.tolist(), labels.tolist(), strict=True):
            found = dict(zip(row_keys, row_labels, strict=True))
            assert len(found) < 3 or tuple(found[key] for key in range(3)) in learnt
    for tasks, of in ((task.train, learnt), (task.test, held)):
        assert {tuple(int(label) for label in one.name.split()[1:]) for one in tasks} == of


def test_what_is_asked_is_not_among_the_demonstrations():
    examples = tuple(Example((n,), (100 + n,)) for n in range(9))
    (task,) = tasks_of([{"task": "t", "input": "a", "output": "b"}], lambda _: [1], separator=" ", end=" ")
    task = type(task)("t", examples)
    for seed in range(20):
        item = episode(task, 8, torch.Generator().manual_seed(seed))
        assert len(item.demonstrations) == 16
        assert item.question[0] not in item.demonstrations and item.answer == (100 + item.question[0],)
    mixed = shuffled(examples, torch.Generator().manual_seed(0))
    assert [one.question for one in mixed] == [one.question for one in examples]
    assert sorted(one.answer for one in mixed) == sorted(one.answer for one in examples)
    assert sorted(shown(mixed)) == sorted(shown(examples)) and mixed != list(examples)


def test_candidates_are_scored_by_their_mean():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[UNSCORED, 2, 4], [UNSCORED, UNSCORED, 1]])
    log_p = F.log_softmax(logits, -1)
    expected = [(log_p[0, 1, 2] + log_p[0, 2, 4]).item() / 2, log_p[1, 2, 1].item()]
    assert mean_logprobs(logits, targets).tolist() == pytest.approx(expected)


def test_held_out_tasks_are_whole_tasks():
    records = [{"task": name, "input": str(n), "output": "x"} for name in "abcde" for n in range(2)]
    train, test = _split(records, 0.4, "mine")
    assert [record["task"] for record in train[::2]] == ["a", "b", "c"] and {one["task"] for one in test} == {"d", "e"}
    with pytest.raises(DataError, match="one task"):
        _split(records[:2], 0.4, "mine")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ('{"task": "a", "input": "b"}', "line 2: must have task, input and output"),
        ('{"task": "a", "input": "b", "output": "c", "candidates": ["d"]}', "line 2: candidates must be"),
    ],
)
def test_bad_records(tmp_path, line, said):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"task": "a", "input": "b", "output": "c"}\n' + line)
    with pytest.raises(DataError, match=said):
        read_records(file)
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.jsonl")


def my_tasks(folder: Path) -> Path:
    file = folder / "tasks.jsonl"
    records = [
        {"task": f"{verb} {n}", "input": word, "output": f"{word} {verb}", **more}
        for n, (verb, more) in enumerate([("up", {}), ("down", {}), ("left", {}), ("right", {})])
        for word in ("cat", "dog", "bird", "stone", "river")
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_on_one_s_own_model_and_tasks(tmp_path):
    """A model from a directory, free-text answers, a text for the first stage."""
    from stillhouse.models import train_bpe
    from stillhouse.workflow import run_system

    text = "the cat sees the bird and the dog hears the river near a stone going up and down left and right. " * 30
    (tmp_path / "text.txt").write_text(text)
    tokenizer = train_bpe([text], vocab_size=280)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=128)
    new_causal_lm(config, seed=0).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    fields = {
        "teacher": str(tmp_path / "lm"),
        "student": "layers=1",
        "data": str(my_tasks(tmp_path)),
        "text": str(tmp_path / "text.txt"),
        "demos": 3,
        "demo_tokens": 40,
        "vectors": 4,
        "pretrain_steps": 2,
        "steps": 2,
        "batch_size": 2,
        "trackers": [],
    }
    done = run_system("mend", fields, output=tmp_path / "run", quiet=True)
    assert {"pretrained", "student", "evaluation"} <= set(done.artifacts)
    assert done.artifacts["evaluation"].metrics["distilled/prefix"] == 4
    assert DemonstrationDistiller.load(done.artifacts["student"].path).width == 16
    with pytest.raises(DataError, match=r"5 examples; 9 demonstrations"):
        run_system("mend", {**fields, "demos": 9}, output=tmp_path / "more", quiet=True)
    tight = {**fields, "demo_tokens": 113}  # 1.25 times as many are more than the 128 positions
    assert run_system("mend", tight, output=tmp_path / "tight", quiet=True)
    with pytest.raises(ConfigError, match=r"demo_tokens=127 and vectors=4 .* 128 positions"):
        run_system("mend", {**fields, "demo_tokens": 127}, output=tmp_path / "long", quiet=True)
    with pytest.raises(ConfigError, match=r"15 vectors and 115 tokens of text \(ratio=0.1\)"):
        run_system("mend", {**tight, "vectors": 15, "ratio": 0.1}, output=tmp_path / "rest", quiet=True)
    short = new_causal_lm(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=32), seed=0)
    short.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match=r"40 tokens .* 32 positions of the student"):
        run_system("mend", {**fields, "student": str(tmp_path / "short")}, output=tmp_path / "own", quiet=True)
    copied = run_system("mend", {**fields, "student": "teacher"}, output=tmp_path / "copied", quiet=True)
    assert DemonstrationDistiller.load(copied.artifacts["student"].path).lm.config.n_layer == 2


def test_a_question_without_tokens_is_refused():
    with pytest.raises(DataError, match="task 't': an input is empty"):
        tasks_of([{"task": "t", "input": "", "output": "b"}], lambda text: list(map(ord, text)), separator="", end="")
