"""RoBERTa as the user's own teacher of the encoder task, from a directory, by the command line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.cli.main import main
from stillhouse.models.efficient_attention import convert_encoder, load_efficient
from stillhouse.models.elastic import check_elastic, load_encoder
from stillhouse.models.text_encoder import TextEncoder
from stillhouse.tasks.encoder import load_masked_lm
from stillhouse.workflow import run_system

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
POSITIONS = 48


def text(documents: int = 60) -> list[str]:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=4)) for _ in range(60)]
    return [" ".join(chance.choices(words, k=40)) for _ in range(documents)]


def byte_level_bpe(texts: list[str]) -> PreTrainedTokenizerFast:
    """As RoBERTa has it: ids 0 to 4 are special, padding is 1."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="<s>",
        sep_token="</s>",
        **{f"{name}_token": token for name, token in names.items()},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("roberta")
    texts = text()
    (made / "text.txt").write_text("\n\n".join(texts))
    tokenizer = byte_level_bpe(texts)
    tokenizer.save_pretrained(made / "teacher")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS + 2,
        type_vocab_size=1,
        initializer_range=0.3,
    )
    RobertaForMaskedLM(config).save_pretrained(made / "teacher")
    return made


def words(folder: Path, **more: object) -> list[str]:
    given = {"teacher": folder / "teacher", "data": folder / "text.txt", "batch_size": 2, "window": 16, **more}
    return [f"{name}={value}" for name, value in given.items()]


def test_a_roberta_of_one_s_own_is_converted_and_distilled(folder, tmp_path):
    more = {"length": 64, "attention": "lsg,full", "block_size": 8, "tasks": "long-ner", "documents": 8}
    more |= {"pretrain_steps": 2, "steps": 4, "tune_steps": 2, "tune_batch": 2}
    given = [f"{name}={value}" for name, value in more.items()]
    main(["run", "efficient-attention-kd", *words(folder), *given, f"output={tmp_path / 'run'}", "-q"])
    student = load_efficient(tmp_path / "run" / "model")
    assert student.config.model_type == "lsg-roberta" and student.config.num_hidden_layers == 1
    full = AutoModelForMaskedLM.from_pretrained(next(tmp_path.glob("run/stages/*full-student/artifact"))).eval()
    assert isinstance(full, RobertaForMaskedLM) and full.config.max_position_embeddings == 64 + 2
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").mask_token == "<mask>"


def test_autodistil_cuts_a_roberta_out_of_a_roberta(folder, tmp_path):
    more = {"epochs": 1, "steps": 4, "finetune_steps": 2, "relation_heads": 2, "eval_windows": 4}
    more |= {"spaces": "a: layers=1-2 heads=2 hidden=8-16 ratio=2", "max_parameters": 6000}
    given = [f"{name}={value}" for name, value in more.items()]
    main(["run", "autodistil", *words(folder), *given, f"output={tmp_path / 'run'}", "-q"])
    student = load_encoder(tmp_path / "run" / "model", masked_lm=True)
    assert student.config.model_type == "stillhouse-slim-roberta"  # two heads of 8 in a width of 8
    assert student.config.max_position_embeddings == POSITIONS + 2


def test_the_first_token_stands_at_the_first_position(folder):
    """RoBERTa keeps two rows of its table; read without them, every token would stand two places early."""
    teacher, tokenizer = load_masked_lm(str(folder / "teacher"))
    ids = tokenizer("".join(text(1)), return_tensors="pt")["input_ids"][:, :24]
    long = convert_encoder(teacher, "full", length=2 * POSITIONS)
    with torch.no_grad():
        torch.testing.assert_close(long(ids).logits, teacher(ids).logits, rtol=1e-5, atol=1e-5)
    table = long.roberta.embeddings.position_embeddings.weight
    assert torch.equal(table[2 : 2 + POSITIONS], table[2 + POSITIONS :]) and len(table) == 2 * POSITIONS + 2


def test_texts_are_cut_to_the_positions_that_there_are(folder):
    assert TextEncoder(str(folder / "teacher"))([" ".join(text(3))]).shape == (1, 16)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    values = {"teacher": str(folder / "teacher"), "data": str(folder / "text.txt"), "window": POSITIONS + 1}
    with pytest.raises(ConfigError, match=f"the teacher has {POSITIONS} positions"):
        run_system("efficient-attention-kd", {**values, "length": 64}, output=tmp_path / "run", quiet=True)
    config = DistilBertConfig(vocab_size=20, dim=8, n_heads=1, n_layers=1, hidden_dim=8)
    DistilBertForMaskedLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="a distilbert model; give a BERT or RoBERTa"):
        load_masked_lm(str(tmp_path / "other"))
    (tmp_path / "small").mkdir()
    RobertaForMaskedLM(
        RobertaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="320 tokens, the model 30"):
        load_masked_lm(str(tmp_path / "small"))
    with pytest.raises(ModelError, match="slimmed already"):
        check_elastic("stillhouse-slim-roberta")
    with pytest.raises(ModelError, match="a distilbert encoder"):
        check_elastic("distilbert")
