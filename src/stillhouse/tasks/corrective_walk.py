"""A task in which a mistake can be made good: a walk on a line towards a target, from wherever one stands.

A prompt is BOS, start, SEP, target, SEP; the response is eight positions. The expert takes one step towards the target
from where the last token stands, then stays. The teacher is that rule, available after every prefix: 0.98 on the
expert's next position, the rest spread over the other tokens (the small check of card 151). A student that has seen the
expert's walks only never learns what to do off the path.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.data.text import TextData
from stillhouse.data.windows import Counts, Windows, WindowSplit
from stillhouse.metrics.compounding import expected_errors
from stillhouse.models.causal_lm import new_causal_lm
from stillhouse.tasks.language import LanguageSystem, LanguageTask

POSITIONS, STEPS, PROMPT = 13, 8, 5
BOS, SEP, END = POSITIONS, POSITIONS + 1, POSITIONS + 2
VOCABULARY = POSITIONS + 3
CERTAINTY = 0.98
NOISES = (0.0, 0.1, 0.2)
LONG = 100  # steps over which errors are reckoned up


def expert(place: Tensor, target: Tensor) -> Tensor:
    """Where the expert goes from ``place``."""
    return place + (target - place).sign()


def walks(count: int, generator: torch.Generator) -> Tensor:
    """Prompts with the expert's walks: (count, 13)."""
    start, target = torch.randint(POSITIONS, (2, count), generator=generator)
    tokens = [torch.full_like(start, BOS), start, torch.full_like(start, SEP), target, torch.full_like(start, SEP)]
    place = start
    for _ in range(STEPS):
        place = expert(place, target)
        tokens.append(place)
    return torch.stack(tokens, -1)


def rule_teacher() -> Any:
    """The rule as a causal LM of ``transformers``, whose output layer is the identity."""
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class WalkConfig(PretrainedConfig):
        model_type = "corrective-walk"
        num_hidden_layers = 0

    class Walk(PreTrainedModel, GenerationMixin):
        config_class = WalkConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.lm_head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
            self.post_init()

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=self.lm_head(rule_log_p(input_ids)))

    model = Walk(WalkConfig(vocab_size=VOCABULARY, eos_token_id=END, pad_token_id=END, use_cache=False))
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(VOCABULARY))
    return model.eval()


def rule_log_p(ids_BT: Tensor) -> Tensor:
    """The teacher's distribution after every prefix: (B, T, 16); before the prompt is over it says nothing useful."""
    B, T = ids_BT.shape
    target_B1 = ids_BT[:, min(3, T - 1)].clamp(max=POSITIONS - 1)[:, None]
    place_BT = ids_BT.clone()
    if T >= PROMPT:
        place_BT[:, PROMPT - 1] = ids_BT[:, 1]  # the first step is taken from the start
    place_BT = torch.where(place_BT < POSITIONS, place_BT, target_B1)
    next_BT = expert(place_BT, target_B1.expand(B, T))
    p_BTV = torch.full((B, T, VOCABULARY), (1 - CERTAINTY) / (VOCABULARY - 1), device=ids_BT.device)
    return p_BTV.scatter(2, next_BT[..., None], CERTAINTY).log()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*map(str, range(POSITIONS)), "<bos>", "<sep>", "<end>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<end>", pad_token="<end>")


def _student(seed: int) -> nn.Module:
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,  # samples in the report go on for longer
        n_embd=32,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=END,
    )
    return new_causal_lm(config, seed=seed)


@dataclass
class CorrectiveWalk:
    """The embedded task of the survey of on-policy distillation."""

    @staticmethod
    def prepare(system: LanguageSystem, run: Run) -> Generator[Stage, Artifact, LanguageTask]:
        """A student that was trained on the expert's walks (the system's ``pretrain`` passes), and the rule."""
        import datasets

        generator = torch.Generator().manual_seed(0)  # what is held out does not depend on the seed
        columns = []
        for count in (4096, 256, 256):
            ids_NT = walks(count, generator)
            loss_NT = torch.zeros_like(ids_NT)
            loss_NT[:, PROMPT:] = 1
            columns.append({"input_ids": ids_NT, "attention_mask": torch.ones_like(ids_NT), "loss_mask": loss_NT})
        held_out = columns[2]["loss_mask"].sum().item()
        counts = Counts(columns[0]["input_ids"].numel(), int(held_out), int(held_out))
        train, selection, validation = map(WindowSplit, columns)
        windows = Windows(
            train,
            selection,
            validation,
            PROMPT + STEPS,
            "prompt-completion",
            "corrective walk",
            "corrective walk 1",
            counts,
        )
        data = TextData(
            datasets.Dataset.from_dict({"prompt": [], "completion": []}), "prompt-completion", "walk", "walk"
        )
        task = LanguageTask(
            system, run, rule_teacher(), _tokenizer(), data, windows, VOCABULARY, partial(_student, system.seed)
        )
        if system.pretrain:
            steps = task.steps_of(system.pretrain)
            task.begin_as((yield task.train("pretrain", task.cross_entropy, steps=steps, adapters=False)))
        return task


@torch.no_grad()
def exposure(model: Any, *, seed: int, count: int = 512) -> dict[str, float]:
    """How well a model walks when it is pushed: ``right_X`` for every X of `NOISES`.

    Greedily, each of the first five positions is replaced by a random one with probability X; the figure is the share
    of the last three steps that are the expert's from where the model then stands.
    """
    device = next(model.parameters()).device
    found = {}
    for noise in NOISES:
        generator = torch.Generator().manual_seed(seed)
        whole = walks(count, generator)
        ids, target = whole[:, :PROMPT].to(device), whole[:, 3].to(device)
        right = []
        for step in range(STEPS):
            place = ids[:, 1] if step == 0 else ids[:, -1]
            chosen = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            if step >= STEPS - 3:
                right.append((chosen == expert(place, target)).float().mean().item())
            pushed = (torch.rand(count, generator=generator) < noise).to(device)
            elsewhere = torch.randint(POSITIONS, (count,), generator=generator).to(device)
            if step < 5:
                chosen = torch.where(pushed, elsewhere, chosen)
            ids = torch.cat([ids, chosen[:, None]], 1)
        found[f"right_{noise:g}"] = sum(right) / len(right)
    return found


def excess_error(model: Any, *, seed: int, count: int = 512) -> dict[str, float]:
    """How much more a model errs on its own walks than on the teacher's, and what its errors there come to.

    ``excess_1`` to ``excess_8``: the probability of a move that is not the expert's, at each position of walks that the
    model drew, less that on walks which the teacher drew from the same prompts. With the error of a step on the
    teacher's walks, ``lost_unrecovered`` and ``lost_recovered`` say how many of `LONG` steps would be wrong if no error
    were made good, and if each were.
    """
    own, given = (_errors(model, taught=taught, seed=seed, count=count) for taught in (False, True))
    error = sum(given) / len(given)
    return {
        **{f"excess_{step}": mine - its for step, (mine, its) in enumerate(zip(own, given, strict=True), start=1)},
        "lost_unrecovered": expected_errors(error, LONG),
        "lost_recovered": expected_errors(error, LONG, recovery=1.0),
    }


@torch.no_grad()
def _errors(model: Any, *, taught: bool, seed: int, count: int) -> list[float]:
    """The model's mean probability of a wrong move by position, on walks that it draws or (``taught``) the teacher."""
    generator = torch.Generator().manual_seed(seed)
    ids = walks(count, generator)[:, :PROMPT].to(next(model.parameters()).device)
    found = []
    for _ in range(STEPS):
        q = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        p = rule_log_p(ids)[:, -1].exp()
        found.append(1 - q.gather(1, p.argmax(-1, keepdim=True)).double().mean().item())
        drawn = torch.multinomial((p if taught else q).cpu(), 1, generator=generator)
        ids = torch.cat([ids, drawn.to(ids.device)], 1)
    return found
