"""Input expansion: which subword is seen at each byte, and that a model with it is saved, loaded and used alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from stillhouse.base.errors import ModelError
from stillhouse.data.token_bytes import Vocabulary, compositions, spellings
from stillhouse.models import load_causal_lm, new_causal_lm, train_bpe
from stillhouse.models.input_expansion import Expansion, _tree, check_spelled, expanded, is_expanded
from stillhouse.models.tokenizer_transfer import byte_tokenizer, transplant

TEXT = "the cat sees the other dog, and then the weather is better than that; résumé.\n" * 4


def expansion(rows: dict[tuple[int, ...], int], vocab_size: int) -> Expansion:
    keys, row = _tree(rows, vocab_size)
    made = Expansion(
        edges=len(keys),
        rows=max(rows.values()) + 1,
        longest=max(map(len, rows)),
        width=2,
        vocab_size=vocab_size,
    )
    made.keys.copy_(torch.tensor(keys))
    made.row.copy_(torch.tensor(row))
    return made


SPELLING = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=100)
@given(st.lists(SPELLING, min_size=1, max_size=8, unique=True), st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_the_longest_spelling_against_a_search(known, text):
    rows = {spelling: row for row, spelling in enumerate(known, start=1)}
    expected = []
    for end in range(1, len(text) + 1):
        fits = [one for one in known if len(one) <= end and tuple(text[end - len(one) : end]) == one]
        expected.append(rows[max(fits, key=len)] if fits else 0)
    found = expansion(rows, 4).find(torch.tensor([text, text[::-1]]))
    assert found[0].tolist() == expected
    assert expansion(rows, 4).find(torch.tensor([text[::-1]]))[0].tolist() == found[1].tolist()


class Moved:
    """A model, and the same with a tokenizer of bytes, plain and expanded."""

    def __init__(self, kind: str = "llama", untie: bool = True) -> None:
        self.subwords = train_bpe([TEXT], vocab_size=300)
        self.bytes = byte_tokenizer(self.subwords)
        self.old, self.new = Vocabulary(self.subwords), Vocabulary(self.bytes)
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
        if kind == "llama":
            config: Any = LlamaConfig(vocab_size=self.old.size, tie_word_embeddings=True, **sizes)
        else:  # scales its embeddings by the root of their width
            config = Gemma2Config(vocab_size=self.old.size, head_dim=8, **sizes)
        self.model: Any = new_causal_lm(config, seed=0).eval()
        self.plain: Any = transplant(self.model, compositions(self.old, self.new), self.bytes, untie=untie)
        self.spellings = spellings(self.old, self.new)
        self.made: Any = expanded(self.plain, self.model.get_input_embeddings(), self.spellings)

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.bytes(text)["input_ids"]])


def embedded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(ids)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_byte_s_embedding_gets_that_of_the_subword_that_ends_there(kind):
    """Subwords are searched for in the text itself, not with the tree."""
    moved = Moved(kind)
    text = "the weather é"
    ids, raw = moved.ids(text), text.encode()
    pieces = {piece: number for number, piece in reversed(list(enumerate(moved.old.pieces))) if piece}
    added = embedded(moved.made, ids) - embedded(moved.plain, ids)
    lengths = []
    for end in range(1, len(raw) + 1):
        longest = max((raw[start:end] for start in range(end) if raw[start:end] in pieces), key=len)
        lengths.append(len(longest))
        expected = embedded(moved.model, torch.tensor([[pieces[longest]]]))[0, 0]
        torch.testing.assert_close(added[0, end - 1], expected)
    assert max(lengths) > 3  # whole words are seen


def test_a_special_token_sees_itself_and_ends_what_came_before():
    moved = Moved()
    end = moved.bytes.eos_token_id
    ids = torch.cat([moved.ids("th"), torch.tensor([[end]]), moved.ids("e")], 1)
    added = embedded(moved.made, ids) - embedded(moved.plain, ids)
    old = moved.subwords.eos_token_id
    torch.testing.assert_close(added[0, 2], embedded(moved.model, torch.tensor([[old]]))[0, 0])
    torch.testing.assert_close(
        added[0, 3], (embedded(moved.made, moved.ids("e")) - embedded(moved.plain, moved.ids("e")))[0, 0]
    )


@pytest.mark.parametrize("untie", [True, False])
def test_saved_and_loaded_the_logits_are_the_same(tmp_path: Path, untie):
    moved = Moved(untie=untie)
    moved.made.save_pretrained(tmp_path)
    moved.bytes.save_pretrained(tmp_path)
    ids = moved.ids("the other weather")
    with torch.no_grad():
        before = moved.made(input_ids=ids).logits
        assert not torch.allclose(before, moved.plain(input_ids=ids).logits)
        loaded, tokenizer = load_causal_lm(str(tmp_path))
        assert torch.equal(loaded(input_ids=ids).logits, before)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, before)
        half, _ = load_causal_lm(str(tmp_path), dtype="bfloat16")
        torch.testing.assert_close(half(input_ids=ids).logits.float(), before, rtol=0.1, atol=0.05)
    assert is_expanded(tmp_path) and tokenizer("a é")["input_ids"] == moved.bytes("a é")["input_ids"]
    shared = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert shared == (not untie)


def test_it_generates_with_a_cache_what_it_does_without():
    moved = Moved()
    with torch.no_grad():
        moved.made.get_output_embeddings().weight.mul_(30)
    options: Any = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": moved.bytes.eos_token_id,
        "eos_token_id": None,
    }
    ids = moved.ids("the weather and")
    seen = []
    handle = moved.made.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    cached = moved.made.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert seen[0] == ids.shape[1] and seen[1:] == [1] * 11  # the cache was in use
    handle.remove()
    slow = moved.made.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, slow)
    beams = {**options, "num_beams": 2}
    assert torch.equal(
        moved.made.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **beams),
        moved.made.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **beams),
    )


def test_a_cache_fed_by_hand_needs_what_it_has_read():
    moved = Moved()
    ids = moved.ids("the weather")
    with torch.no_grad():
        whole = moved.made(input_ids=ids).logits[:, -1]
        cache = moved.made(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with pytest.raises(ModelError, match="pass those before the new ones as before"):
            moved.made(input_ids=ids[:, -1:], past_key_values=cache)
        step = moved.made(input_ids=ids[:, -1:], past_key_values=cache, before=ids[:, :-1]).logits[:, -1]
    torch.testing.assert_close(step, whole)


def test_the_table_stays_and_everything_else_learns():
    moved = Moved()
    model = moved.made.train()
    table = model.get_input_embeddings().expansion.table.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = moved.ids("the weather")
    model(input_ids=ids, labels=ids).loss.backward()
    before = model.get_input_embeddings().weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.get_input_embeddings().expansion.table, table)
    assert not torch.equal(model.get_input_embeddings().weight, before)


def test_what_cannot_be_is_said():
    moved = Moved()
    with pytest.raises(ModelError, match="tokenizers of bytes"):
        check_spelled(moved.old.pieces)
    check_spelled(moved.new.pieces)
    with pytest.raises(ModelError, match="expanded already"):
        expanded(moved.made, moved.model.get_input_embeddings(), moved.spellings)
    with pytest.raises(ModelError, match="no token of the former vocabulary"):
        expanded(moved.plain, moved.model.get_input_embeddings(), {})
