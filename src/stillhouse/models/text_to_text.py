"""Models that read one text and write another: encoder-decoders such as T5, and causal language models.

Both are fed by the same batches and read out in the same way: `TextToText` knows what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.models.errors import clear_errors
from stillhouse.models.loading import check_files, load_causal_lm, load_tokenizer, local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class TextToText:
    """A model that reads a text and writes one, with its tokenizer.

    Args:
        model: an encoder-decoder or a causal language model of ``transformers``.
        tokenizer: its tokenizer; it must have an end-of-text token.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def _ids(self, text: str, most: int) -> list[int]:
        """The ids of a source; a causal model goes on where it ends."""
        ids = self.tokenizer(text if self.encoder_decoder else text + "\n")["input_ids"][:most]
        return ids[:-1] if not self.encoder_decoder and ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def batch(
        self, sources: Sequence[str], targets: Sequence[str], *, max_source: int, max_target: int
    ) -> dict[str, Tensor]:
        """What the model is fed to learn to write ``targets``, and ``labels``: what each output position has to be.

        Both sides are cut to so many tokens; targets end with the end-of-text token. An empty target has no labels at
        all. ``labels`` (B, T) are aligned with the logits; -100 everywhere but on the target's tokens.
        """
        read = [self._ids(text, max_source) for text in sources]
        end = self.tokenizer.eos_token_id
        written = [
            [*self.tokenizer(text, add_special_tokens=False)["input_ids"][: max_target - 1], end] if text else []
            for text in targets
        ]
        if self.encoder_decoder:
            start = self.model.config.decoder_start_token_id
            return {
                **self._padded(read),
                "decoder_input_ids": _pad([[start, *ids[:-1]] for ids in written], self._pad_id),
                "labels": _pad([ids or [IGNORED] for ids in written], IGNORED),
            }
        whole = [before + after for before, after in zip(read, written, strict=True)]
        labels = [
            [IGNORED] * (len(before) - 1) + after + [IGNORED] for before, after in zip(read, written, strict=True)
        ]
        return {**self._padded(whole), "labels": _pad(labels, IGNORED)}

    @torch.no_grad()
    def write(self, sources: Sequence[str], *, max_source: int, max_target: int) -> list[tuple[str, int]]:
        """What the model writes, greedily, and how many tokens that took, the end-of-text token included."""
        device, end = self.model.device, self.tokenizer.eos_token_id
        fed = self._padded([self._ids(text, max_source) for text in sources], left=not self.encoder_decoder)
        was_training = self.model.training
        self.model.eval()
        made = self.model.generate(
            **{name: tensor.to(device) for name, tensor in fed.items()},
            max_new_tokens=max_target,
            do_sample=False,
            pad_token_id=self._pad_id,
            eos_token_id=end,
        )
        self.model.train(was_training)
        answers = []
        for row in made[:, 1 if self.encoder_decoder else fed["input_ids"].shape[1] :].tolist():
            ids = row[: row.index(end)] if end in row else row
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append((text, len(ids) + (end in row)))
        return answers

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _padded(self, rows: list[list[int]], *, left: bool = False) -> dict[str, Tensor]:
        return {
            "input_ids": _pad(rows, self._pad_id, left=left),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, left=left),
        }


def _pad(rows: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    longest = max(1, *map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows, strict=True)])


def load_text_to_text(name: str, *, trust_remote_code: bool = False) -> TextToText:
    """Load an encoder-decoder or a causal language model, to train: in float32, whatever it was saved in.

    Raises:
        ModelError: one line that says what is wrong, where, and what to do.
    """
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    folder = local_folder(name)
    with clear_errors(name):
        config: Any = AutoConfig.from_pretrained(folder or name, trust_remote_code=trust_remote_code)
    if not config.is_encoder_decoder:
        return TextToText(*load_causal_lm(name, dtype=torch.float32, trust_remote_code=trust_remote_code))
    if folder is not None:
        check_files(folder)
    with clear_errors(name):
        model = AutoModelForSeq2SeqLM.from_pretrained(
            folder or name, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    tokenizer = load_tokenizer(name, folder, revision="main", trust_remote_code=trust_remote_code)
    return TextToText(model.eval(), tokenizer)
