"""The teacher cache: the codec's promises, the store, the stand-in, and training from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from stillhouse import Batches, Observed, Player, Run, TokenMatch, Train, adamw
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.losses.divergences import ForwardKL, InterpolatedForwardKL, JensenShannon, ReverseKL, TotalVariation
from stillhouse.losses.sparse_divergence import bucketed, linear_topk_divergence
from stillhouse.models import new_causal_lm
from stillhouse.objectives import LogitMatch, head_of
from stillhouse.objectives.cached import CachedTokenMatch
from stillhouse.teachers.cache import (
    DenseColumn,
    Numbered,
    TeacherCache,
    TopKColumn,
    cached_teacher,
    causal_lm_cache,
    fill_stage,
    spread_evenly,
    top_k,
)
from stillhouse.teachers.topk_codec import TopK, TopKCodec

# -- the codec ------------------------------------------------------------------------------------------------------


def logits(samples: int, positions: int, vocab: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(vocab, generator=generator)
    return scale * (0.5 * common + torch.randn(samples, positions, vocab, generator=generator))


def by_token(top: TopK) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(top.tokens, -1)
    return np.take_along_axis(top.tokens, order, -1), np.take_along_axis(top.log_p, order, -1)


def kl(exact: TopK, found: TopK) -> np.ndarray:
    """KL on K + 1 outcomes, position by position."""
    (tokens, p), (again, q) = by_token(exact), by_token(found)
    assert np.array_equal(tokens, again)
    rest = np.exp(exact.log_rest) * (exact.log_rest - found.log_rest) if np.isfinite(found.log_rest).all() else 0.0
    return (np.exp(p) * (p - q)).sum(-1) + rest


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 5),
    positions=st.integers(1, 70),
    vocab=st.integers(2, 300),
    share=st.floats(0.01, 1),
    scale=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    error=st.sampled_from([1e-6, 1e-4, 1e-2]),
    seed=st.integers(0, 99),
)
def test_round_trip(samples, positions, vocab, share, scale, error, seed):
    """Whatever the distribution: the same tokens, every log-probability within its step, and the promised KL."""
    k = max(1, round(share * vocab))
    exact = top_k(logits(samples, positions, vocab, scale=scale, seed=seed), k)
    codec = TopKCodec(k, vocab, error)
    book = codec.fit(exact)
    found = codec.decode(codec.encode(exact, book), book)
    tokens, p = by_token(exact)
    again, q = by_token(found)
    assert np.array_equal(tokens, again)
    total = np.log(np.exp(q.astype(np.float64)).sum(-1) + np.exp(found.log_rest.astype(np.float64)))
    assert np.abs(total).max() < 1e-5  # it is a distribution
    shift = (q - p).mean(-1, keepdims=True)  # what normalising did to all alike
    bound = codec.levels.bound(p)
    assert (np.abs(q - p) <= bound + np.abs(shift) + bound.max(-1, keepdims=True) + 1e-4)[p > -60].all()
    assert k == vocab or np.abs((exact.log_rest - found.log_rest)[exact.log_rest > -60]).max(initial=0) <= 2**-11 + 1e-5
    assert kl(exact, found).mean() <= 2 * error + 1e-6


@settings(max_examples=25, deadline=None)
@given(error=st.floats(1e-7, 1e-1), k=st.integers(1, 128), log_p=st.lists(st.floats(-64, 0), min_size=1, max_size=50))
def test_levels_keep_their_bound_and_order(error, k, log_p):
    levels = TopKCodec(k, 1000, error).levels
    values = np.sort(np.array(log_p))
    found = levels.of(values)
    assert (np.diff(found) >= 0).all() and found.min() >= 0 and found.max() < levels.count
    assert (np.abs(levels.values[found] - values) <= levels.bound(values) + 1e-9).all()
    assert (np.diff(levels.values) > 0).all()


def test_any_samples_of_a_shard_are_read_alone():
    exact = top_k(logits(6, 37, 90), 12)
    codec = TopKCodec(12, 90)
    book = codec.fit(exact)
    arrays = codec.encode(exact, book)
    whole = codec.decode(arrays, book)
    starts = arrays["offsets"]
    for rows in ([3], [5, 0], [2, 2, 4]):
        part = {
            "states": arrays["states"][rows],
            "rest": arrays["rest"][rows],
            "words": np.concatenate([arrays["words"][starts[r] : starts[r + 1]] for r in rows]),
            "offsets": np.cumsum([0, *(starts[r + 1] - starts[r] for r in rows)]),
        }
        found = codec.decode(part, book)
        assert np.array_equal(found.tokens, whole.tokens[rows]) and np.array_equal(found.log_p, whole.log_p[rows])


def test_what_the_codebook_has_not_seen_is_coded_too():
    codec = TopKCodec(8, 64, 1e-4)
    book = codec.fit(top_k(logits(4, 20, 64, seed=1), 8))
    one = torch.full((2, 9, 64), -40.0)
    one[..., 63] = 5.0
    one[0, :, :10] = -2.0
    exact = top_k(one, 8)
    found = codec.decode(codec.encode(exact, book), book)
    assert np.array_equal(by_token(found)[0], by_token(exact)[0])
    assert kl(exact, found).max() < 1e-3


def test_a_smaller_error_costs_more_bytes_and_buys_accuracy():
    exact = top_k(logits(8, 64, 500), 32)
    sizes, errors = [], []
    for error in (1e-2, 1e-3, 1e-4, 1e-5):
        codec = TopKCodec(32, 500, error)
        book = codec.fit(exact)
        arrays = codec.encode(exact, book)
        sizes.append(arrays["words"].nbytes)
        errors.append(kl(exact, codec.decode(arrays, book)).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


def test_less_than_packed_indices_alone():
    """Packing 64 of 512 tokens takes 9 bits each before any probability is stored."""
    exact = top_k(logits(16, 64, 512, scale=2.0), 64)
    codec = TopKCodec(64, 512, 1e-3)
    arrays = codec.encode(exact, codec.fit(exact))
    assert sum(array.nbytes for array in arrays.values()) / (16 * 64) < 64 * 9 / 8


@pytest.mark.parametrize("wrong", [math.nan, 0.5])
def test_a_teacher_that_gives_nonsense_is_refused(wrong):
    top = top_k(logits(1, 2, 10), 3)
    bad = TopK(top.tokens, np.where(top.log_p == top.log_p.max(), wrong, top.log_p), top.log_rest)
    with pytest.raises(DataError, match="nothing was stored"):
        TopKCodec(3, 10).fit(bad)
    with pytest.raises(ConfigError, match="k=11"):
        TopKCodec(11, 10)


# -- the store ------------------------------------------------------------------------------------------------------


class Teacher:
    """Counts what it is asked."""

    def __init__(self, samples: int = 20, positions: int = 9, vocab: int = 40) -> None:
        self.logits = logits(samples, positions, vocab)
        self.hidden = torch.randn(samples, 5, 3, generator=torch.Generator().manual_seed(1))
        self.asked: list[int] = []

    def __call__(self, ids: list[int]) -> dict[str, torch.Tensor]:
        self.asked += ids
        return {"logits": self.logits[ids], "hidden": self.hidden[ids]}


def cache_of(folder: Any, teacher: Teacher | None, **options: Any) -> TeacherCache:
    columns = {"logits": TopKColumn(6, 40, 1e-5), "hidden": DenseColumn()}
    return TeacherCache(folder, columns, 20, compute=teacher, **{"shard_samples": 6, "batch": 4, **options})


def test_filled_once_read_in_any_order(tmp_path):
    teacher = Teacher()
    assert cache_of(tmp_path, teacher).fill() == [0, 1, 2, 3]
    assert cache_of(tmp_path, teacher).fill() == []
    assert sorted(teacher.asked) == list(range(20))
    cache = cache_of(tmp_path, None)
    ids = [19, 0, 7, 6, 0]
    found = cache.read(ids)
    assert torch.equal(found["hidden"]["hidden"], teacher.hidden[ids])  # float32: to the bit
    exact = top_k(teacher.logits[ids], 6)
    order = found["logits"]["tokens"].sort(-1).indices
    assert np.array_equal(found["logits"]["tokens"].gather(-1, order).numpy(), by_token(exact)[0])
    assert torch.equal(found["logits"]["log_p"][1], found["logits"]["log_p"][4])
    with pytest.raises(DataError, match="0 to 19, not 20"):
        cache.read([20])


def test_half_precision_features_are_rounded_once(tmp_path):
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    cache = TeacherCache(tmp_path, {"x": DenseColumn("float16")}, 3, compute=lambda ids: {"x": values[ids]})
    cache.fill()
    assert torch.equal(cache.read([2, 1])["x"]["x"], values[[2, 1]].half().float())


def test_another_teacher_s_cache_is_not_read(tmp_path):
    teacher = Teacher()
    cache_of(tmp_path, teacher).fill()
    with pytest.raises(DataError, match="no cache of this teacher"):
        cache_of(tmp_path, None, fingerprint="another").read([0])
    assert cache_of(tmp_path, teacher, fingerprint="another").fill() == [0, 1, 2, 3]


def test_spread_evenly_is_a_distribution():
    top = top_k(logits(2, 3, 30), 4)
    whole = spread_evenly(*map(torch.from_numpy, top), 30)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert len(set(whole[0, 0].tolist())) == 5


# -- sparse divergences ---------------------------------------------------------------------------------------------

DIVERGENCES = [
    ForwardKL(temperature=2.0),
    ReverseKL(),
    JensenShannon(beta=0.3),
    TotalVariation(),
    InterpolatedForwardKL(t=0.5),
    lambda s, t: ForwardKL()(s, t) + 0.5 * ReverseKL()(s, t),
]


def head(tokens: int = 7, width: int = 5, vocab: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((tokens, width), (vocab, width))]
    return parts[0].requires_grad_(), parts[1].requires_grad_(), logits(1, tokens, vocab)[0].double()


def sparse(z: torch.Tensor, k: int) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in top_k(z, k)]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("rest", ["bucket", "even"])
@pytest.mark.parametrize("k", [3, 10, 11])
def test_the_fused_form_is_the_plain_one(divergence, rest, k):
    """Value and gradients against autograd on whole logits."""
    hidden, weight, z = head()
    tokens, log_p, log_rest = sparse(z, k)
    mask = torch.tensor([1.0, 0, 2, 1, 1, 1, 0])
    result = linear_topk_divergence(
        hidden, weight, tokens, log_p, log_rest, divergence=divergence, rest=rest, weight_N=mask, chunk_tokens=2,
        student_softcap=4.0, labels_N=torch.arange(7), cross_entropy_weight=0.3, divergence_weight=0.7,
    )  # fmt: skip
    found = torch.autograd.grad(result.loss, (hidden, weight))
    student = 4 * torch.tanh(hidden @ weight.T / 4)
    if rest == "even":
        loss = divergence(student, spread_evenly(tokens, log_p, log_rest, 11))
    else:
        kept = student.log_softmax(-1).gather(-1, tokens)
        others = 1 - kept.exp().sum(-1, keepdim=True)
        both = (kept, log_p) if k == 11 else (
            torch.cat([kept, others.log()], -1), torch.cat([log_p, log_rest[:, None]], -1)
        )  # fmt: skip
        loss = divergence(*both)
    labels = nn.functional.cross_entropy(student, torch.arange(7), reduction="none")
    expected = (mask * (0.7 * loss + 0.3 * labels)).sum() / mask.sum()
    torch.testing.assert_close(result.loss, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_bucket_hides_but_never_adds():
    """KL on K + 1 outcomes rises with K to that on all of them; it does not see the order within the rest."""
    hidden, weight, z = head()
    student = (hidden @ weight.T).detach()
    whole = ForwardKL()(student, z)
    before = torch.zeros(7, dtype=torch.float64)
    for k in range(1, 12):
        tokens, log_p, log_rest = sparse(z, k)
        target = log_p if k == 11 else torch.cat([log_p, log_rest[:, None]], -1)
        now = ForwardKL()(bucketed(student, tokens), target)
        assert (now >= before - 1e-9).all() and (now <= whole + 1e-9).all()
        before = now
    torch.testing.assert_close(before, whole)


# -- in place of the teacher ----------------------------------------------------------------------------------------


def model(seed: int, layers: int = 1) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=60, num_hidden_layers=layers, max_position_embeddings=32, **sizes)
    made = new_causal_lm(config, seed=seed)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20)
    return made


class Windows:
    """Twelve windows of eight tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(60, (12, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


def trained(folder: Any, objective: Any) -> dict[str, torch.Tensor]:
    student = Observed(model(1), name="student", options={"use_cache": False})
    player = Player("student", student, objective(student), optimizer=adamw(1e-2))
    source = Batches(Numbered(Windows()), 4, gather=True)
    Run(folder, quiet=True).execute([Train("student", player, source=source, steps=12)])
    return student.module.state_dict()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_from_a_whole_cache_kd_is_that_of_the_live_teacher(tmp_path, temperature):
    """With k = V nothing is lost: the same weights after training, whole or in the chunked form."""
    teacher = model(0, layers=2)
    divergence = ForwardKL(temperature=temperature)
    cache = causal_lm_cache(tmp_path / "cache", teacher, Windows(), k=60, vocab_size=60, fingerprint="t")
    cache.fill()
    live = head_of(Observed(teacher, frozen=True, options={"use_cache": False}))
    kept = cached_teacher(TeacherCache(cache.folder, cache.columns, 12, fingerprint="t", shard_samples=256))
    match = {
        "live": lambda s: TokenMatch(head_of(s), live, divergence),
        "kept": lambda s: CachedTokenMatch(head_of(s), kept, divergence, whole=True, rest="even"),
        "plain": lambda s: LogitMatch(s.output("logits").map(lambda z: z[:, :-1]), kept.output("logits"), divergence),
    }
    both = [trained(tmp_path / name, objective) for name, objective in match.items()]
    untrained = model(1).state_dict()
    for name, weight in both[0].items():
        for other in both[1:]:
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=2e-4)
    assert max(float((both[0][name] - untrained[name]).abs().max()) for name in untrained) > 0.05


def test_from_a_top_k_cache_training_runs_and_lowers_the_kl(tmp_path):
    teacher, windows = model(0, layers=2), Windows()
    cache = causal_lm_cache(tmp_path / "cache", teacher, windows, k=16, vocab_size=60, fingerprint="t")
    cache.fill()
    kept = cached_teacher(cache)

    def kl_to_teacher(state: dict[str, torch.Tensor]) -> float:
        student = model(1)
        student.load_state_dict(state)
        with torch.no_grad():
            q, p = (m.eval()(input_ids=windows.ids).logits for m in (student, teacher))
            return ForwardKL()(q, p).mean().item()

    after = {
        rest: kl_to_teacher(
            trained(tmp_path / rest, lambda s, rest=rest: CachedTokenMatch(head_of(s), kept, ForwardKL(), rest=rest))
        )
        for rest in ("bucket", "even")
    }
    assert max(after.values()) < 0.8 * kl_to_teacher(model(1).state_dict())


def test_a_batch_without_ids_is_told_what_it_lacks(tmp_path):
    cache = cache_of(tmp_path, Teacher())
    with pytest.raises(KeyError, match=r"Numbered\(data\)"):
        cached_teacher(cache).output("log_p")({"input_ids": torch.zeros(1, 2)})


def test_every_part_is_a_signal(tmp_path):
    cache = cache_of(tmp_path, teacher := Teacher())
    cache.fill()
    batch = {"sample_id": torch.tensor([4, 2])}
    stand_in = cached_teacher(cache)
    assert torch.equal(stand_in.output("hidden")(batch), teacher.hidden[[4, 2]])
    assert stand_in.output("tokens")(batch).shape == (2, 9, 6)
    whole = stand_in.output("logits")(batch)
    assert whole.shape == (2, 9, 40) and torch.equal(whole.argmax(-1), teacher.logits[[4, 2]].argmax(-1))


def test_the_filling_stage_is_shared_between_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "shared"))
    teacher = Teacher()
    for name in ("one", "two"):
        stage = fill_stage("teacher-cache", lambda folder: cache_of(folder, teacher), cache={"of": "this teacher"})
        done = Run(tmp_path / name, quiet=True).execute([stage])["teacher-cache"]
        assert cache_of(done.path, None).read([3])["hidden"]["hidden"].shape == (1, 5, 3)
    assert len(teacher.asked) == 20 and done.metrics["samples"] == 20


def test_columns_say_what_they_cannot_keep():
    with pytest.raises(ConfigError, match="float16 or float32"):
        DenseColumn("int8")
    with pytest.raises(ConfigError, match="at least one sample"):
        TeacherCache("nowhere", {}, 3)
    assert dataclasses.asdict(DenseColumn()) == {"dtype": "float32"}
