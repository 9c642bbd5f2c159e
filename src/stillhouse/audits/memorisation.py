"""Which training sequences a language model gives back word for word, whose they are, and who could have told.

A sequence is memorised if greedy decoding from its prefix reproduces what follows (discoverable memorisation; Carlini
et al., 2023, arXiv 2202.07646). Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.stage import Audit, Context
from stillhouse.losses.bucketed import entropy

LOGITS = 2**23  # of one model that exist at one time
FEATURES = ("zlib bytes", "teacher perplexity", "baseline perplexity", "KL(teacher || baseline)")


@torch.no_grad()
def greedy_continuations(model: Any, prefixes_NT: Tensor, tokens: int, *, batch: int = 64) -> Tensor:
    """The ``tokens`` likeliest next tokens, one after the other; no token ends the text: (N, tokens)."""
    device = next(model.parameters()).device
    found = []
    for part in prefixes_NT.split(batch):
        ids, past, written = part.to(device), None, []
        for _ in range(tokens):
            answer = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            ids = answer.logits[:, -1:].argmax(-1)
            written.append(ids)
        found.append(torch.cat(written, 1).cpu())
    return torch.cat(found)


def extracted(model: nn.Module, sequences_NT: Tensor, *, prefix: int, suffix: int, batch: int = 64) -> Tensor:
    """Whether each sequence's ``suffix`` tokens come back, all of them, from the ``prefix`` before them: (N), bool."""
    if prefix < 1 or suffix < 1 or prefix + suffix > sequences_NT.shape[1]:
        raise ConfigError(
            f"prefix={prefix} and suffix={suffix} must be at least 1 and fit into sequences of {sequences_NT.shape[1]}"
        )
    written = greedy_continuations(model, sequences_NT[:, :prefix], suffix, batch=batch)
    return (written == sequences_NT[:, prefix : prefix + suffix].cpu()).all(1)


@dataclass(frozen=True)
class Overlap:
    """How a student's memorised set is made up; ``easy``, ``inherited``, ``baseline_only`` and ``novel`` add up to it.

    easy: teacher and baseline memorised it too. inherited: the teacher did, the baseline did not. baseline_only: the
    other way round. novel: neither did. rejected: what both memorised and the student did not.
    """

    memorised: int
    easy: int
    inherited: int
    baseline_only: int
    novel: int
    rejected: int

    @property
    def easy_share(self) -> float:
        return self.easy / self.memorised if self.memorised else 0.0


def overlap(teacher_N: Tensor, baseline_N: Tensor, student_N: Tensor) -> Overlap:
    """The set algebra of three memorised sets, given as masks."""
    t, b, s = teacher_N.bool(), baseline_N.bool(), student_N.bool()
    parts = (s, s & t & b, s & t & ~b, s & ~t & b, s & ~t & ~b, t & b & ~s)
    return Overlap(*(int(part.sum()) for part in parts))


# -- risk, before any student is trained ----------------------------------------------------------------------------


def zlib_bytes(text: str) -> int:
    """Length of the compressed text: what a simple rule can say of it."""
    return len(zlib.compress(text.encode()))


@torch.no_grad()
def _log_probabilities(model: Any, ids_NT: Tensor) -> Tensor:
    ids = ids_NT.to(next(model.parameters()).device)
    return model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).cpu()


def risk_features(teacher: Any, baseline: Any, sequences_NT: Tensor, texts: Sequence[str]) -> np.ndarray:
    """`FEATURES` of every sequence: (N, 4)."""
    size = max(1, LOGITS // (sequences_NT.shape[1] * int(teacher.config.get_text_config().vocab_size)))
    rows = []
    for part in sequences_NT.split(size):
        log_p, log_q = _log_probabilities(teacher, part), _log_probabilities(baseline, part)
        width = min(log_p.shape[-1], log_q.shape[-1])  # vocabularies of one family are padded differently
        log_p, log_q = log_p[..., :width], log_q[..., :width]
        labels = part[:, 1:, None].cpu()
        perplexities = [(-log.gather(-1, labels)[..., 0].mean(1)).exp() for log in (log_p, log_q)]
        rows.append(torch.stack([*perplexities, (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)], 1))
    sizes = torch.tensor([[float(zlib_bytes(text))] for text in texts])
    return torch.cat([sizes, torch.cat(rows)], 1).double().numpy()


@dataclass(frozen=True)
class Predictor:
    """How well memorisation can be told before distilling; means over the repeats, ``auc_std`` their deviation."""

    auc: float
    auc_std: float
    precision: float
    recall: float
    coefficients: dict[str, float]
    positives: int
    repeats: int


def risk_model(features_NF: np.ndarray, memorised_N: np.ndarray, *, seed: int = 0, negatives: int = 3) -> Any:
    """Logistic regression on standardised features; ``negatives`` not memorised for each that is."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen = _balanced(memorised_N, negatives, np.random.default_rng(seed))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(features_NF[chosen], memorised_N[chosen])


def _balanced(memorised_N: np.ndarray, negatives: int, random: np.random.Generator) -> np.ndarray:
    yes, no = np.flatnonzero(memorised_N), np.flatnonzero(~memorised_N)
    return np.concatenate([yes, random.permutation(no)[: negatives * len(yes)]])


def predict_risk(
    features_NF: np.ndarray,
    memorised_N: np.ndarray,
    *,
    names: Sequence[str] = FEATURES,
    repeats: int = 100,
    test: float = 0.3,
    seed: int = 0,
) -> Predictor | None:
    """Fit and test a risk model ``repeats`` times on random splits; None if there are too few of either kind."""
    from sklearn.metrics import precision_score, recall_score, roc_auc_score
    from sklearn.model_selection import train_test_split

    memorised = np.asarray(memorised_N, bool)
    if memorised.sum() < 5 or (~memorised).sum() < 5:
        return None
    random = np.random.default_rng(seed)
    scores, coefficients = [], []
    for number in range(repeats):
        chosen = _balanced(memorised, 3, random)
        fit, held = train_test_split(chosen, test_size=test, stratify=memorised[chosen], random_state=seed + number)
        model = risk_model(features_NF[fit], memorised[fit], seed=seed + number)
        risk, truth = model.predict_proba(features_NF[held])[:, 1], memorised[held]
        guess = risk > 0.5
        scores.append(
            (
                roc_auc_score(truth, risk),
                precision_score(truth, guess, zero_division=0.0),
                recall_score(truth, guess, zero_division=0.0),
            )
        )
        coefficients.append(model[-1].coef_[0])
    auc, precision, recall = np.mean(scores, 0)
    mean = dict(zip(names, np.mean(coefficients, 0).tolist(), strict=True))
    spread = float(np.std([score[0] for score in scores]))
    return Predictor(float(auc), spread, float(precision), float(recall), mean, int(memorised.sum()), repeats)


def at_risk(features_NF: np.ndarray, memorised_N: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Which sequences a risk model of all the evidence would leave out: (N), bool; none if it has too little."""
    memorised = np.asarray(memorised_N, bool)
    if not memorised.any() or memorised.all():
        return np.zeros(len(memorised), bool)
    return risk_model(features_NF, memorised, seed=seed).predict_proba(features_NF)[:, 1] > 0.5


# -- the audit ------------------------------------------------------------------------------------------------------


def certainty(model: Any, sequences_NT: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Mean entropy of the predictions of the ``last`` tokens, nats, and these tokens' log-probability: (N), (N)."""
    size = max(1, LOGITS // (sequences_NT.shape[1] * int(model.config.get_text_config().vocab_size)))
    entropies, likelihoods = [], []
    for part in sequences_NT.split(size):
        log_p = _log_probabilities(model, part)[:, -last:]
        entropies.append(entropy(log_p).mean(1))
        likelihoods.append(log_p.gather(-1, part[:, 1:, None].cpu()[:, -last:])[..., 0].sum(1))
    return torch.cat(entropies), torch.cat(likelihoods)


COLUMNS = [
    Column("memorised", "memorised", ".2%", "lower", "share of the training sequences that come back word for word"),
    Column("easy_share", "easy", ".1%", None, "of these: memorised by teacher and baseline too"),
    Column("inherited", "inherited", ",d", "lower", "memorised by teacher and student, not by the baseline"),
    Column("novel", "novel", ",d", "lower", "memorised by neither teacher nor baseline"),
    Column("rejected", "rejected", ",d", None, "memorised by teacher and baseline, not by the student"),
    Column("auc", "risk AUC", ".3f", None, "how well this could be told before: ROC-AUC of a logistic regression"),
    Column("entropy", "entropy", ".2f", None, "mean entropy on the last tokens of what the baseline memorised, nats"),
    Column("log_probability", "log-prob.", ".1f", None, "of the last tokens of what the baseline memorised, nats"),
]


@torch.no_grad()
def memorisation(
    models: Mapping[str, nn.Module],
    sequences_NT: Tensor,
    texts: Sequence[str],
    *,
    prefix: int = 50,
    suffix: int = 50,
    repeats: int = 100,
    seed: int = 0,
) -> tuple[Table, dict[str, Any]]:
    """Audit ``models`` (among them "teacher" and "baseline"; the others are students) on their training sequences.

    Returns the table, and per model the ids of what it memorised, its overlap and its predictor.
    """
    for role in ("teacher", "baseline"):
        if role not in models:
            raise ConfigError(f"the audit compares students with a teacher and a baseline; there is no {role!r}")
    for model in models.values():
        model.eval()
    masks = {name: extracted(m, sequences_NT, prefix=prefix, suffix=suffix) for name, m in models.items()}
    features = risk_features(models["teacher"], models["baseline"], sequences_NT, texts)
    hard = sequences_NT[masks["baseline"]]
    rows: list[dict[str, Any]] = []
    details: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        row: dict[str, Any] = {"name": name, "memorised": float(mask.float().mean())}
        details[name] = {"memorised": torch.nonzero(mask)[:, 0].tolist()}
        if name not in ("teacher", "baseline"):
            sets = overlap(masks["teacher"], masks["baseline"], mask)
            predictor = predict_risk(features, mask.numpy(), repeats=repeats, seed=seed)
            row |= {"easy_share": sets.easy_share, **asdict(sets), "memorised": row["memorised"]}
            row["auc"] = predictor.auc if predictor else None
            details[name] |= {"overlap": asdict(sets), "predictor": asdict(predictor) if predictor else None}
        if len(hard):
            entropies, likelihoods = certainty(models[name], hard, suffix)
            row |= {"entropy": float(entropies.mean()), "log_probability": float(likelihoods.mean())}
        rows.append(row)
    note = f"{len(sequences_NT):,} training sequences; {suffix} tokens after {prefix}. No formal guarantee of privacy."
    return Table("Memorisation", COLUMNS, rows, [note]), {"memorised.json": details, "features.json": features.tolist()}


def memorisation_audit(
    name: str,
    models: Callable[[], Mapping[str, nn.Module]],
    sequences_NT: Tensor,
    texts: Callable[[], Sequence[str]],
    **options: Any,
) -> Audit:
    """The audit as a stage that any run can take; ``models`` and ``texts`` are asked for when it runs."""

    def audit(context: Context) -> tuple[Table, dict[str, Any]]:
        table, files = memorisation(models(), sequences_NT, texts(), seed=context.seed, **options)
        context.results = {
            f"{row['name']}/{key}": float(value)
            for row in table.rows
            for key, value in row.items()
            if key != "name" and value is not None
        }
        return table, files

    return Audit(name, audit)


def left_out(audit: Artifact, *, seed: int = 0) -> Tensor:
    """Which sequences its student should not be shown, after a finished audit: (N), bool; see `at_risk`."""
    features = np.array(audit.json("features.json"))
    memorised = np.isin(np.arange(len(features)), audit.json("memorised.json")["student"]["memorised"])
    return torch.from_numpy(at_risk(features, memorised, seed=seed))


# -- the onion ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def exposure(model: Any, sequences_NT: Tensor, *, prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
    """Whether each sequence is memorised (N), and the log-probability of its suffix after its prefix, nats (N).

    Among the memorised, the likelier a suffix the more exposed it is.
    """
    model.eval()
    whole_NT = sequences_NT[:, : prefix + suffix]
    return extracted(model, sequences_NT, prefix=prefix, suffix=suffix), certainty(model, whole_NT, suffix)[1]


def outer_layer(memorised_N: Tensor, log_probability_N: Tensor, share: float) -> Tensor:
    """The most exposed of the memorised sequences, a ``share`` of them and at least one if there is any: (N), bool."""
    ids_K = torch.nonzero(memorised_N)[:, 0]
    count = min(len(ids_K), max(1, round(share * len(ids_K))))
    order_K = log_probability_N[ids_K].argsort(descending=True, stable=True)
    return torch.zeros(len(memorised_N), dtype=torch.bool).index_fill(0, ids_K[order_K[:count]], True)


@dataclass(frozen=True)
class Peeled:
    """What is known of a student once layers have been taken away; ``removed`` so far, all masks of N sequences."""

    removed: Tensor
    memorised: Tensor


def onion(layers: Sequence[Peeled]) -> Table:
    """Which sequences become memorised when those more exposed than they are gone (Carlini et al., 2022, 2206.10469).

    The first of ``layers`` is the student that has seen all; each later one has not seen ``removed``.
    """
    rows: list[dict[str, Any]] = []
    for number, layer in enumerate(layers):
        kept = ~layer.removed
        row: dict[str, Any] = {"name": f"layer {number} removed" if number else "all sequences"}
        row |= {"removed": int(layer.removed.sum()), "kept": int(kept.sum())}
        row["found"] = int((layer.memorised & kept).sum())
        row["share"] = row["found"] / max(1, row["kept"])
        if number:
            before = layers[number - 1].memorised
            row["stay"] = int((layer.memorised & kept & before).sum())
            row["new"] = int((layer.memorised & kept & ~before).sum())
            row["lost"] = int((~layer.memorised & kept & before).sum())
            row["unseen"] = int((layer.memorised & layer.removed).sum())
        rows.append(row)
    note = "A layer is the most exposed of what is memorised; then a new student is trained without it."
    return Table("The onion: who is memorised once the most exposed are gone", ONION, rows, [note])


ONION = [
    Column("removed", "removed", ",d", None, "sequences the student has not been shown"),
    Column("kept", "shown", ",d"),
    Column("found", "memorised", ",d", "lower", "of those shown"),
    Column("share", "share", ".2%", "lower"),
    Column("stay", "as before", ",d", None, "of these: memorised by the student before too"),
    Column(
        "new", "newly", ",d", "lower", "of these: not memorised by the student before, with more exposed ones there"
    ),
    Column("lost", "no longer", ",d", None, "shown, memorised before, and not any more"),
    Column("unseen", "unseen", ",d", None, "given back though not shown: they follow a rule, or were shown in part"),
]
