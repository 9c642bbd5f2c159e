"""Self-distillation of language models from what they said of every token an epoch ago (PS-KD, token by token).

Shapes: B sequences, T predictions of each, N sequences of the training set, K kept tokens, V vocabulary, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch, Observed, Turn
from stillhouse.core.schedule import Progress, Schedule
from stillhouse.losses.divergences import ForwardKL
from stillhouse.losses.sparse_divergence import linear_topk_divergence
from stillhouse.losses.token_logprobs import Head, in_chunks
from stillhouse.objectives.language import LanguageHead, TokenMatch, fused_values, head_of, predicted
from stillhouse.objectives.memory import FromSecondEpoch, Rest, Snapshot, of_all_processes
from stillhouse.teachers.cache import SAMPLE_ID

NEVER = -60.0  # log-probability of what is taken to be impossible


class TokenMemory(nn.Module):
    """The ``k`` likeliest tokens that a model last expected at every place of a training set; saved with the run.

    A place costs 6 k + 2 bytes (int32 and float16). With several processes each keeps the whole table.

    Args:
        sequences, predictions: N and T.
        k: K; the vocabulary's size keeps everything.
        vocab_size: V.
    """

    tokens: Tensor
    log_p: Tensor
    log_rest: Tensor
    seen: Tensor

    def __init__(self, sequences: int, predictions: int, *, k: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.k = vocab_size, min(k, vocab_size)
        shape = (sequences, predictions)
        self.register_buffer("tokens", torch.zeros(*shape, self.k, dtype=torch.int32))
        self.register_buffer("log_p", torch.zeros(*shape, self.k, dtype=torch.float16))
        self.register_buffer("log_rest", torch.zeros(shape, dtype=torch.float16))
        self.register_buffer("seen", torch.zeros(sequences, dtype=torch.bool))

    def recall(self, sample_B: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, K), their log-probabilities, and that of all others (B, T).

        Of a sequence that was not met yet, the labels, with certainty.
        """
        offset_K = torch.arange(self.k, device=labels_BT.device)
        hard_BTK = (labels_BT[..., None] + offset_K) % self.vocab_size
        sure_BTK = torch.where(offset_K == 0, 0.0, NEVER).expand_as(hard_BTK)
        known_B11 = self.seen[sample_B, None, None]
        tokens_BTK = torch.where(known_B11, self.tokens[sample_B].long(), hard_BTK)
        log_p_BTK = torch.where(known_B11, self.log_p[sample_B].float(), sure_BTK)
        log_rest_BT = self.log_rest[sample_B].float().masked_fill(~self.seen[sample_B, None], NEVER)
        return tokens_BTK, log_p_BTK, log_rest_BT

    @torch.no_grad()
    def remember(self, sample_B: Tensor, hidden_BTD: Tensor, head: Head) -> None:
        """Replace what is remembered of these sequences by what an output layer says now."""

        def top(hidden_CD: Tensor) -> Tensor:
            log_q_CV = head.logits(hidden_CD)[:, : self.vocab_size].log_softmax(-1)
            log_p_CK, tokens_CK = log_q_CV.topk(self.k, -1)
            log_rest_C1 = log_q_CV.scatter(-1, tokens_CK, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([tokens_CK.double(), log_p_CK.double(), log_rest_C1.double()], -1)

        found_NX = in_chunks(top, hidden_BTD.flatten(0, 1), vocab_size=self.vocab_size)
        found_BTX = of_all_processes(found_NX.unflatten(0, hidden_BTD.shape[:2]))
        sample_B = of_all_processes(sample_B)
        tokens_BTK, log_p_BTK, log_rest_BT1 = found_BTX.split([self.k, self.k, 1], -1)
        self.tokens[sample_B] = tokens_BTK.int()
        self.log_p[sample_B] = log_p_BTK.clamp(min=NEVER).half()
        self.log_rest[sample_B] = log_rest_BT1.squeeze(-1).clamp(min=NEVER).half()
        self.seen[sample_B] = True


class RememberedTokens(Term):
    """(1 - alpha) cross-entropy to the next token + alpha KL(P || model), P what the model said there an epoch ago.

    Up to P's entropy, which has no gradient, this is the cross-entropy to (1 - alpha) y + alpha P: PS-KD (Kim et al.,
    2021, arXiv 2006.12000, eq. 3) at every token. Of P the likeliest tokens are known; the others are one outcome. What
    the model says now is remembered after it was used. ``batch["sample_id"]`` (B,) says which sequences they are.
    """

    def __init__(
        self, student: LanguageHead, memory: TokenMemory, *, alpha: Schedule, name: str = "PastTokens"
    ) -> None:
        super().__init__(name=name, **student.signals("student"))
        self.head = student
        self.memory = memory
        self.alpha = alpha

    def compute(
        self,
        *,
        student_hidden: Tensor,
        student_weight: Tensor,
        batch: Batch,
        progress: Progress,
        student_bias: Tensor | None = None,
    ) -> list[TermValue]:
        labels_BT, weight_BT = predicted(batch)
        hidden_BTD, sample_B = student_hidden[:, :-1], batch[SAMPLE_ID]
        alpha = self.at(self.alpha, progress)
        result = linear_topk_divergence(
            hidden_BTD,
            student_weight,
            *self.memory.recall(sample_B, labels_BT),
            divergence=ForwardKL(),
            student_bias_V=student_bias,
            student_logit_scale=self.head.scale,
            student_softcap=self.head.softcap,
            labels_N=labels_BT,
            divergence_weight=alpha,
            cross_entropy_weight=1 - alpha,
            weight_N=weight_BT,
            vocab_size=self.memory.vocab_size,
        )
        if self.training:
            head = Head(student_weight, student_bias, self.head.scale, self.head.softcap)
            self.memory.remember(sample_B, hidden_BTD.detach(), head)
        return fused_values(self.name, result, alpha, 1 - alpha)


class SnapshotTokens(TokenMatch):
    """The same with P from the model of the end of the last epoch: one more forward, no table, whole distributions."""

    def __init__(self, student: Observed, *, alpha: Schedule, vocab_size: int, name: str = "PastTokens") -> None:
        past, later = Snapshot(student.module), FromSecondEpoch(alpha)
        super().__init__(
            head_of(student),
            head_of(past.observed),
            ForwardKL(),
            divergence_weight=later,
            cross_entropy=Rest(later),
            vocab_size=vocab_size,
            name=name,
        )
        self.past = past

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        if self.training:
            self.past.follow(progress)
        return super().evaluate(turn, batch, progress)
