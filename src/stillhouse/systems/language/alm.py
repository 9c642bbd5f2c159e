"""ALM: likelihoods of chunks of text, between models of different tokenizers."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from stillhouse.base.errors import ConfigError
from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective, Sum
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.chunks import ChunkDivergence, ChunkDivergenceName
from stillhouse.tasks.cross_tokenizer import CrossTokenizerSystem, CrossTokenizerTask, HiddenLayers
from stillhouse.tasks.cross_tokenizer_terms import balanced, chunk_match, hidden_match, other_match, text_bits
from stillhouse.tasks.experiments import Experiment


@dataclass(kw_only=True)
class ALM(CrossTokenizerSystem):
    """Approximate likelihood matching (Minixhofer, Vulic and Ponti, 2025, arXiv 2503.20083).

    The text is cut into the smallest chunks that both tokenizers cover with whole tokens, and the student learns to
    give each the likelihood that the teacher gives it. A student that begins as the teacher is moved to another
    tokenizer; any other learns from a teacher whose tokenizer it does not share. Defaults are those of the transfer
    to bytes.
    """

    meta = Meta(
        card=124,
        title="ALM",
        domain="language",
        family="cross-tokenizer KD, tokenizer transfer",
        citation="Minixhofer, Vulić and Ponti (2025), Universal Cross-Tokenizer Distillation via Approximate "
        "Likelihood Matching, NeurIPS 2025, arXiv 2503.20083",
        feedback=("logits", "features"),
        granularity="hybrid",
        elicitation="feature",
        algorithm=("divergence", "similarity"),
        knowledge=("response", "feature"),
        scheme=("offline", "self"),
        role="smaller models",
        facts=MethodFacts(shared_tokenizer=False, drawing="nothing drawn", own_text=0.0, sampler="data"),
    )
    demo: ClassVar[dict[str, Any]] = {**CrossTokenizerSystem.demo, "steps": 300, "lr": 1e-3, "baseline": True}
    smoke: ClassVar[dict[str, Any]] = {"student": "teacher", "tokenizer": "bytes", "baseline": True}

    match: Annotated[Literal["alm", "uld", "mined", "dskd", "none"], "what is matched; others: to compare"] = "alm"
    divergence: Annotated[ChunkDivergenceName, "between the likelihoods of a chunk"] = "binary-ce"
    binarisation: Annotated[float, "temperature of the event that a chunk is written", Gt(0)] = 100.0
    renyi_order: Annotated[float, "with divergence=renyi", Gt(0), Lt(1)] = 0.5
    debias: Annotated[
        Literal["merge", "pairs", "none"],
        "where chunks may end: after what the teacher takes for a word's end, after unbiased pairs of tokens, anywhere",
    ] = "merge"
    bias_threshold: Annotated[
        float, "merge: least probability of a word's end; pairs: largest bias (1e-4 in the paper)", Ge(0), Le(1)
    ] = 0.1
    append_boundary: Annotated[bool, "count that a word ends after the chunk, too"] = True
    weighting: Annotated[Literal["chunks", "tokens"], "what counts once: a chunk, or a token of the teacher"] = "chunks"
    match_weight: Annotated[float, "weight of the match", Ge(0)] = 1.0
    text_weight: Annotated[float, "weight of the cross-entropy on the text; 0: distillation alone", Ge(0)] = 1.0
    hidden_weight: Annotated[float, "weight of the hidden states at the ends of chunks; 0: none", Ge(0)] = 1.0
    hidden_layers: Annotated[HiddenLayers, "which hidden states"] = "last"
    project: Annotated[bool, "compare hidden states through a learned matrix even where widths are equal"] = False
    balance: Annotated[bool, "bring the terms' gradients in the last layer to one norm (GradMag)"] = True
    steps: Annotated[int | None, "optimizer steps; by default as many as the epochs need", Ge(1)] = 5000
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 1e-5

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        threshold = self.bias_threshold if self.debias == "pairs" else None
        task = yield from CrossTokenizerTask.prepare(self, run, bias_threshold=threshold)
        models = {"student": (yield task.train("student", lambda student: self.objective(task, student)))}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def objective(self, task: CrossTokenizerTask, student: Observed) -> Objective:
        """What the student minimises."""
        terms: list[Objective] = []
        if self.match == "alm":
            divergence = ChunkDivergence(self.divergence, self.binarisation, self.renyi_order)
            merge = self.bias_threshold if self.debias == "merge" else None
            options: Any = {"merge": merge, "append": self.append_boundary, "weighting": self.weighting}
            terms.append(self.match_weight * chunk_match(task, student, divergence, **options))
        elif self.match != "none":
            terms.append(self.match_weight * other_match(task, student, self.match))
        if self.text_weight:
            terms.append(self.text_weight * task.cross_entropy(student))
        if self.hidden_weight:
            terms.append(self.hidden_weight * hidden_match(task, student, self.hidden_layers, project=self.project))
        if not terms:
            raise ConfigError("alm: match=none with text_weight=0 and hidden_weight=0 leaves nothing to learn")
        return balanced(terms, student) if self.balance else Sum(terms)

    def claims(self) -> list[Claim]:
        # Short windows and few steps: student and teacher are of one size, and all arms of all seeds take minutes.
        task = {"student": "teacher", "tokenizer": "bpe:512", "window": 64, "batch_size": 4, "steps": 60, "lr": 1e-3}
        alone = {"text_weight": 0.0, "hidden_weight": 0.0, "balance": False, "baseline": False}
        alm: dict[str, Any] = {**task, **alone, "keep": "last", "eval_windows": 8}
        arms = {
            "alm": {**alm, "baseline": True},
            "sft": {**alm, "match": "none", "text_weight": 1.0},
            "uld": {**alm, "match": "uld", "match_weight": 1.5, "text_weight": 1.0},
            "mined": {**alm, "match": "mined"},
            "temperature 1": {**alm, "binarisation": 1.0},
        }
        run = Experiment("alm", arms, "equal steps, batches, learning rates and initial weights")
        bits = {"metric": "bits per byte of held-out text", "figure": "student/bits_per_byte"}
        own: Any = partial(run.claim, **{**bits, "method": "alm", "higher_is_better": False})  # type: ignore[arg-type]
        moved = (
            "a model moved to another tokenizer by its chunks alone predicts held-out text better than one moved by "
        )
        together = "a model moved by ALM and one moved by SFT predict better together than the latter alone"
        nearer = "mean difference of a chunk's log-likelihood to the teacher's, nats"
        return [
            own(moved + "SFT", baseline="sft"),
            own(moved + "sorted probabilities beside SFT (ULD)", baseline="uld"),
            own(moved + "spelling (MinED)", baseline="mined"),
            own(moved + "ALM at temperature 1", baseline="temperature 1", scope="consequence"),
            own("ALM brings likelihoods nearer than SFT", metric=nearer, figure="student/gap", baseline="sft",
                scope="consequence"),
            own(together, figure=text_bits, baseline="sft", scope="consequence"),
        ]  # fmt: skip
