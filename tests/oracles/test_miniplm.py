"""MiniPLM (card 119): the difference score, what is kept by it, and that what is kept is text for anybody."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.data.difference_sampling import count_of, difference_score, gumbel_top_fraction, top_fraction
from stillhouse.data.passages import Corpus, Junk, passage_texts, shuffled, text_windows, with_junk
from stillhouse.data.text import load_text
from stillhouse.metrics.sequence_loss import mean_loss, sequence_nats
from stillhouse.models import train_bpe
from stillhouse.runs import Finished
from stillhouse.tasks import refining
from stillhouse.teachers import scorer
from stillhouse.teachers.likelihood import EndpointLikelihood
from stillhouse.workflow import run_system

# -- scores and the choice ------------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    """Losses (1, 2, 3, 3) and (1.1, 3, 3, 3.5): scores (0.1, 1, 0, 0.5), of which half keeps 1 and 3 in order."""
    score_N = difference_score(torch.tensor([1.0, 2.0, 3.0, 3.0]), torch.tensor([1.1, 3.0, 3.0, 3.5]))
    torch.testing.assert_close(score_N, torch.tensor([0.1, 1.0, 0.0, 0.5], dtype=torch.float64), atol=1e-6, rtol=0)
    assert top_fraction(score_N, 0.5).tolist() == [1, 3]


def test_equal_models_tie_and_the_first_passages_are_kept():
    loss_N = torch.rand(101, generator=torch.Generator().manual_seed(0))
    score_N = difference_score(loss_N, loss_N)
    assert score_N.abs().max() == 0
    assert top_fraction(score_N, 0.3).tolist() == list(range(30))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.floats(0.05, 1), st.floats(-3, 3), st.integers(1, 99))
def test_what_is_kept(values, fraction, constant, length):
    """floor(alpha N) passages in the corpus's order, none worse than one dropped; constants and lengths change none."""
    teacher_N = torch.tensor(values, dtype=torch.float64)
    reference_N = torch.zeros_like(teacher_N)
    if math.floor(fraction * len(values) + 1e-9) < 1:
        with pytest.raises(DataError, match="keeps none"):
            top_fraction(teacher_N, fraction)
        return
    score_N = difference_score(teacher_N, reference_N)
    kept = top_fraction(score_N, fraction).tolist()
    assert len(kept) == count_of(fraction, len(values)) and kept == sorted(set(kept))
    dropped = [place for place in range(len(values)) if place not in kept]
    assert all(score_N[a] > score_N[b] or (score_N[a] == score_N[b] and a < b) for a in kept for b in dropped)
    moved = difference_score(teacher_N + round(constant), reference_N + round(constant))
    assert top_fraction(length * moved, fraction).tolist() == kept


def test_all_of_it_is_the_corpus():
    score_N = torch.randn(17, generator=torch.Generator().manual_seed(1))
    assert top_fraction(score_N, 1.0).tolist() == list(range(17))
    assert count_of(0.29, 100) == 29 and count_of(0.57, 100) == 57  # as floats they are a little less


def test_gumbel_draws_in_proportion():
    """One of three is drawn with probability proportional to exp(score / temperature)."""
    score_N, temperature = torch.tensor([0.0, 1.0, -0.5]), 0.7
    drawn = [gumbel_top_fraction(score_N, 1 / 3, temperature=temperature, seed=s).item() for s in range(4000)]
    share_N = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
    torch.testing.assert_close(share_N, (score_N / temperature).softmax(0), atol=0.03, rtol=0)
    cold = gumbel_top_fraction(torch.arange(20.0), 0.5, temperature=1e-6, seed=0)
    assert cold.tolist() == list(range(10, 20))
    assert len(set(gumbel_top_fraction(torch.zeros(20), 0.5, temperature=1.0, seed=3).tolist())) == 10


def llama(seed: int, width: int = 8, vocab_size: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **sizes)).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def test_the_expected_score_is_a_divergence():
    """Over all texts, E_p[r] = KL(p || p_ref) > 0 and E_ref[r] = -KL(p_ref || p) < 0; equal models give 0."""
    texts_NT = torch.cartesian_prod(*[torch.arange(3)] * 4)
    rows_NT = torch.cat([torch.zeros(len(texts_NT), 1, dtype=torch.long), texts_NT], 1)
    nats = [sequence_nats(llama(seed), [{"input_ids": rows_NT}], vocab_size=3)[0] for seed in (0, 1)]
    log_p_N, log_ref_N = -nats[0], -nats[1]
    assert log_p_N.exp().sum().item() == pytest.approx(1) and log_ref_N.exp().sum().item() == pytest.approx(1)
    r_N = 4 * difference_score(nats[0] / 4, nats[1] / 4)
    assert (log_p_N.exp() * r_N).sum().item() == pytest.approx((log_p_N.exp() * (log_p_N - log_ref_N)).sum().item())
    assert (log_p_N.exp() * r_N).sum() > 0.1 and (log_ref_N.exp() * r_N).sum() < -0.1


def test_losses_of_rows_against_full_logits():
    """Padding and prompts count nothing; rows of the vocabulary beyond the real one are no tokens."""
    model = llama(2, vocab_size=11)
    ids_BT = torch.randint(0, 9, (3, 7), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]])
    nats_N, tokens_N = sequence_nats(model, [{"input_ids": ids_BT, "loss_mask": mask_BT}], vocab_size=9)
    log_q = model(input_ids=ids_BT).logits[:, :-1, :9].log_softmax(-1)
    lost_BT = -log_q.gather(-1, ids_BT[:, 1:, None])[..., 0] * mask_BT[:, 1:]
    torch.testing.assert_close(nats_N, lost_BT.sum(-1).detach())
    assert tokens_N.tolist() == [6, 3, 3]
    split = [{"input_ids": ids_BT[:2]}, {"input_ids": ids_BT[2:]}]
    model.train()
    assert mean_loss(model, split, vocab_size=11) == pytest.approx(
        float(sequence_nats(model, split, vocab_size=11)[0].sum() / 18)
    )
    assert model.training


# -- passages and text ----------------------------------------------------------------------------------------------

TEXTS = [f"the {word} grows near the river and the stone, é{number} ü" for number, word in enumerate("abcdefghijkl")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe(TEXTS, vocab_size=300)


def test_passages_become_their_documents_again(tokenizer):
    windows, size = text_windows(TEXTS, tokenizer, 7, name="t")
    ids_NT = windows[:]["input_ids"]
    texts, passages = passage_texts(ids_NT, tokenizer)

    def letters(parts: list[str]) -> str:
        return "".join(c for c in "".join(parts) if c.isascii() and not c.isspace())

    assert letters(TEXTS).startswith(letters(texts)) and len(letters(texts)) > 0.9 * len(letters(TEXTS))
    assert passages == sorted(passages) and set(passages) == set(range(len(ids_NT)))
    assert "<|endoftext|>" not in "".join(texts) and "\ufffd" not in "".join(texts)
    assert 0 < size <= sum(len(text.encode()) for text in TEXTS)
    with pytest.raises(DataError, match="do not fill one window"):
        text_windows(["a"], tokenizer, 100, name="short")


def test_the_embedded_corpus(tokenizer):
    clean_NT, _ = text_windows(TEXTS * 4, tokenizer, 8, name="t")
    made = with_junk(clean_NT[:]["input_ids"], TEXTS, tokenizer, Junk(passages=60, copied=3))
    assert made.ids.shape == (60, 8)
    assert {kind: made.kinds.count(kind) for kind in set(made.kinds)} == {"clean": 18, "duplicate": 24, "noise": 18}
    copies = {tuple(row) for row, kind in zip(made.ids.tolist(), made.kinds, strict=True) if kind == "duplicate"}
    assert len(copies) <= 3
    mixed = shuffled(made)
    assert mixed.ids.tolist() != made.ids.tolist()
    assert sorted(zip(mixed.ids.tolist(), mixed.kinds, strict=True)) == sorted(
        zip(made.ids.tolist(), made.kinds, strict=True)
    )
    assert torch.equal(shuffled(made).ids, mixed.ids)


# -- the system -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """A teacher and a reference of one tokenizer, a student of another family and tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("miniplm")
    words = ["the", "cat", "dog", "sees", "hears", "old", "bright", "river", "and", "then", "never", "stone"]
    draw = torch.Generator().manual_seed(0)
    text = ["".join(f"{words[i]} " for i in torch.randint(12, (40,), generator=draw).tolist()) for _ in range(60)]
    (folder / "text.txt").write_text("\f".join(text), encoding="utf-8")
    tokenizer, other = train_bpe(text, vocab_size=290), train_bpe(text, vocab_size=262)
    for name, width, seed in (("teacher", 24, 0), ("reference", 8, 1)):
        model = llama(seed, width, len(tokenizer)).float()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = GPT2Config(vocab_size=len(other), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder / "student")
    other.save_pretrained(folder / "student")
    return folder


def run(materials: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Finished:
    from stillhouse.tasks import language

    monkeypatch.setattr(language, "tokens_per_second", lambda *_: 1.0)
    common = {"window": 16, "steps": 4, "batch_size": 4, "validation": 0.2, "selection": 0.1, "trackers": []}
    mine = {"teacher": str(materials / "teacher"), "data": str(materials / "text.txt"), "student": "layers=1"}
    common["reference"] = str(materials / "reference")
    return run_system("miniplm", {**common, **mine, **values}, output=output, quiet=True)


def lines(done: Finished, stage: str) -> list[dict[str, Any]]:
    return pq.read_table(done.artifacts[stage].data_file()).to_pylist()


def test_the_system_keeps_what_the_models_say(materials, tmp_path, monkeypatch):
    """Scores are the two models' own; the kept half is the best; students see it in order, and no other passage."""
    seen: list[Tensor] = []
    made = refining.Refining.student_task

    def watched(self: Any, passages: Corpus) -> Any:
        task = made(self, passages)
        seen.append(task.windows.train[:]["input_ids"])
        return task

    monkeypatch.setattr(refining.Refining, "student_task", watched)
    done = run(materials, tmp_path / "run", monkeypatch)
    rows, kept = lines(done, "scores"), lines(done, "refined")
    assert sum(row["kept"] for row in rows) == len(rows) // 2
    assert min(r["score"] for r in rows if r["kept"]) >= max(r["score"] for r in rows if not r["kept"])
    places = [row["passage"] for row in rows if row["kept"]]
    assert "reference" not in done.artifacts  # it was given: nothing is held back for it
    tokenizer = AutoTokenizer.from_pretrained(materials / "teacher")
    models = {name: LlamaForCausalLM.from_pretrained(materials / name).eval() for name in ("teacher", "reference")}
    (ids_NT,) = seen
    for name, model in models.items():
        nats_N, tokens_N = sequence_nats(model, [{"input_ids": ids_NT}], vocab_size=len(tokenizer))
        expected = [rows[place][f"{name}_loss"] for place in places]
        assert (nats_N / tokens_N).tolist() == pytest.approx(expected, rel=1e-5)
        assert all(row["score"] == pytest.approx(row["reference_loss"] - row["teacher_loss"], abs=1e-9) for row in rows)
    texts, passages = passage_texts(ids_NT, tokenizer)
    assert [row["text"] for row in kept] == texts and [row["passage"] for row in kept] == passages
    again = load_text(str(done.artifacts["refined"].data_file()))  # a data set that any system reads
    assert again.documents["text"][:3] == texts[:3] and again.kind == "text"
    assert (done.artifacts["selection"].path / "scores.svg").exists()


def test_the_models_are_asked_once(materials, tmp_path, monkeypatch):
    """Another student, another share, another run: the losses are those of before."""
    asked: list[int] = []
    made = refining.sequence_nats

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(1)
        return made(*args, **options)

    monkeypatch.setattr(refining, "sequence_nats", counted)
    run(materials, tmp_path / "one", monkeypatch, alpha=0.5)
    asked.clear()
    other = run(materials, tmp_path / "two", monkeypatch, alpha=0.25, student="layers=1,hidden_size=16,heads=2")
    assert not asked
    rows = lines(other, "scores")
    assert sum(row["kept"] for row in rows) == len(rows) // 4
    likeliest = lines(run(materials, tmp_path / "three", monkeypatch, select="teacher-loss"), "scores")
    assert not asked and all(row["score"] == -row["teacher_loss"] for row in likeliest)


def test_a_student_of_another_family(materials, tmp_path, monkeypatch):
    """It learns the kept text in its own tokens."""
    done = run(materials, tmp_path / "run", monkeypatch, student=str(materials / "student"), baseline=True)
    model = GPT2LMHeadModel.from_pretrained(done.folder / "model")
    before = GPT2LMHeadModel.from_pretrained(materials / "student")
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, before.transformer.h[0].mlp.c_fc.weight)
    assert [row["name"] for row in done.artifacts["evaluation"].table().rows] == ["student", "baseline"]
    with pytest.raises(ConfigError, match="another tokenizer"):
        run(materials, tmp_path / "kd", monkeypatch, student=str(materials / "student"), kd_ratio=0.5)


def test_the_reference_reads_what_no_student_does(materials, tmp_path, monkeypatch):
    seen: list[Tensor] = []
    made = refining.Refining.pretraining

    def watched(self: Any, name: str, task: Any, passages_NT: Any = None, **options: Any) -> Any:
        ids_NT = task.windows.train[:]["input_ids"] if passages_NT is None else passages_NT
        seen.append(ids_NT)
        return made(self, name, task, passages_NT, **options)

    monkeypatch.setattr(refining.Refining, "pretraining", watched)
    done = run(materials, tmp_path / "run", monkeypatch, reference="layers=1", reference_share=0.2, alpha=1.0)
    reference, student = ({tuple(row) for row in ids_NT.tolist()} for ids_NT in seen)
    assert len(seen[1]) == len(lines(done, "scores")) and not reference & student
    assert len(seen[0]) == math.floor(0.2 * (len(seen[0]) + len(seen[1])))


def test_a_teacher_behind_an_endpoint(materials, tmp_path, monkeypatch):
    """It is asked for the log-probability of each token, and says what the same model here would."""
    model = LlamaForCausalLM.from_pretrained(materials / "teacher").eval()

    async def row(self: Any, ids: list[int]) -> list[dict[int, Any]]:
        with torch.no_grad():
            log_p_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        best = log_p_TV.argmax(-1).tolist()
        return [
            {token: scorer._Said(logprob=float(log_p_TV[t, token])) for token in (best[t], after)}
            for t, after in enumerate(ids[1:])
        ]

    monkeypatch.setattr(EndpointLikelihood, "_row", row)
    here = lines(run(materials, tmp_path / "here", monkeypatch), "scores")
    url = "http://localhost:9/v1#teacher"
    there = run(materials, tmp_path / "there", monkeypatch, teacher=url)
    assert [r["score"] for r in lines(there, "scores")] == pytest.approx([r["score"] for r in here], abs=1e-4)
    with pytest.raises(ConfigError, match="reference=layers=1"):
        run(materials, tmp_path / "shape", monkeypatch, teacher=url, reference="layers=1")


def test_bad_input(materials, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="pre-trains its student"):
        run(materials, tmp_path / "a", monkeypatch, pretrain=1.0)
    with pytest.raises(ModelError, match="different tokenizers"):
        run(materials, tmp_path / "b", monkeypatch, reference=str(materials / "student"))
    (tmp_path / "chat.jsonl").write_text('{"prompt": "a b", "completion": "the cat sees"}\n' * 30)
    with pytest.raises(ConfigError, match="these are conversations"):
        run(materials, tmp_path / "c", monkeypatch, data=str(tmp_path / "chat.jsonl"), window=64)
