"""Everything that can be wrong with a model, a tokenizer or a student gives one clear line."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GPT2Config, LlamaConfig, LlamaModel, MambaConfig, T5Config

from stillhouse.base.errors import ModelError
from stillhouse.models import (
    check_output_head,
    check_same_tokenizer,
    load_causal_lm,
    new_causal_lm,
    output_head,
    read_config,
    scaled_config,
    student_from_spec,
    train_bpe,
)

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
TEXTS = ["some words to learn from, again and again " * 5]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    new_causal_lm(CONFIG, seed=0).save_pretrained(folder)
    train_bpe(TEXTS, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "teacher"))


def checked(message: str, needles) -> str:
    assert "\n" not in message
    assert len(message) < 500
    for needle in needles:
        assert str(needle) in message, f"{needle!r} not in {message!r}"
    return message


def refused(name, *needles, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load_causal_lm(str(name), **options)
    return checked(str(caught.value), needles)


def change(folder: Path, **entries) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | entries).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Where it is


def test_missing_directory_suggests_its_neighbours(model):
    refused(model.parent / "techer", "techer: no such directory", "did you mean 'teacher'?")
    refused(model.parent / "a" / "b", "no such directory", f"{model.parent / 'a'} does not exist")
    refused("./zzz", "./zzz: no such directory", "check the path")


def test_a_file_instead_of_a_directory(model):
    refused(model / "model.safetensors", "a file, must be the directory", f"give {model}")
    (model / "a.gguf").write_text("GGUF")
    refused(model / "a.gguf", "GGUF is not read")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_hub_cannot_be_reached(model, monkeypatch):
    refused("org/no-such-model", "org/no-such-model", "the hub cannot be reached", "give a local directory")
    monkeypatch.chdir(model.parent.parent)
    refused(f"{model.parent.name}/techer", "no such directory", "did you mean 'teacher'?")
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        read_config("org/no-such-model")


def from_hub(kind: type[Exception]) -> Exception:
    class Response:
        headers: dict = {}  # noqa: RUF012
        request = None

    return kind("401 Client Error.\n\nRepository Not Found for url", response=Response())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (from_hub(RepositoryNotFoundError), "no such hub model"),
        (from_hub(GatedRepoError), "must be granted"),
        (from_hub(RevisionNotFoundError), "check revision="),
        (OSError("a/b does not appear to have a file named model.safetensors"), "no safetensors weights"),
        (ImportError("This needs `bitsandbytes`:\npip install bitsandbytes"), "bitsandbytes"),
        (RuntimeError("first line\nsecond line"), "cannot be loaded (first line second line)"),
    ],
)
def test_hub_errors(monkeypatch, error, says):
    def fail(*args, **options):
        raise OSError("wrapped\nby transformers") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail if "granted" in says else _raiser(error))
    refused("org/model", "org/model", says)


def _raiser(error):
    def fail(*args, **options):
        raise error

    return fail


def test_wrong_dtype(model):
    refused(model, "dtype='half-ish'", "bfloat16", dtype="half-ish")


# The config


def test_no_config(model):
    (model / "config.json").unlink()
    refused(model, model, "no config.json", "save_pretrained")
    (model / "checkpoint-5").mkdir()
    (model / "checkpoint-5" / "config.json").write_text("{}")
    refused(model, "one of its folders checkpoint-5")
    (model / "adapter_config.json").write_text("{}")
    refused(model, "PEFT adapter", "merge it")


@pytest.mark.parametrize("text", ["{", "\xff\xfe", ""])
def test_config_that_is_not_json(model, text):
    (model / "config.json").write_bytes(text.encode("latin-1"))
    refused(model, model / "config.json", "not readable as JSON", "download it again")


def test_config_without_or_with_unknown_model_type(model):
    refused(change(model, model_type=...), model / "config.json", "names no model_type")
    refused(
        change(model, model_type="lama"), "unknown model_type 'lama'", "did you mean 'llama'", "update transformers"
    )
    (model / "config.json").write_text("[]")
    refused(model, "names no model_type")


def test_model_that_needs_remote_code(model):
    (model / "modeling_own.py").write_text("raise SystemExit('executed')")
    auto = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    refused(change(model, model_type="own", auto_map=auto), "'own'", "Python code", "trust_remote_code=true")


def test_known_model_does_not_run_the_code_beside_it(model):
    (model / "modeling_own.py").write_text("raise SystemExit('executed')")
    auto = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    load_causal_lm(str(change(model, auto_map=auto)))


def test_tokenizer_that_needs_remote_code(model):
    (model / "own.py").write_text("raise SystemExit('executed')")
    path = model / "tokenizer_config.json"
    known = json.loads(path.read_text())
    known |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(known))
    refused(model, "trust_remote_code=true")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"model_type": "vit", "architectures": None}, "vit"),
    ],
)
def test_not_a_causal_language_model(model, entries, says):
    refused(change(model, **entries), model, says, "not a causal language model", "next token")
    with pytest.raises(ModelError, match="not a causal language model"):
        read_config(str(model))


@pytest.mark.parametrize(
    "entries", [{"num_hidden_layers": "two"}, {"num_attention_heads": 5}, {"hidden_act": "nonsense"}]
)
def test_config_with_impossible_values(model, entries):
    refused(change(model, **entries), model, "cannot be loaded")


# The weights


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    refused(model, model, "no weights", "*.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth", "model.pt"])
def test_pickled_weights_are_never_opened(model, name):
    (model / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (model / name).write_bytes(pickle.dumps(Bomb()))
    refused(model, model, f"only pickled weights ({name})", "save_pretrained")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_weights_cut_short(model, keep):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(model, path, "damaged or cut short", "download it again")


def test_weights_that_are_a_git_lfs_pointer(model):
    path = model / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(model, path, "git lfs pull")


def test_missing_shard_and_broken_index(saved, tmp_path):
    folder = tmp_path / "sharded"
    new_causal_lm(CONFIG, seed=0).save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, folder, "1 of", shard.name, "copy or download")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "model.safetensors.index.json", "no weight_map")


def test_weights_of_other_shapes_than_the_config(model):
    refused(change(model, intermediate_size=80), model, "do not fit", "mlp.down_proj", "(32, 64)", "(32, 80)")


def test_weights_with_fewer_layers_than_the_config(model):
    refused(change(model, num_hidden_layers=3), model, "do not fit", "tensors are missing", "layers.2")


def test_weights_without_the_head(model):
    torch.manual_seed(0)
    LlamaModel(CONFIG).save_pretrained(model)
    refused(change(model, architectures=["LlamaForCausalLM"]), "lm_head.weight")


def test_weights_with_more_than_the_config_warn(model):
    with pytest.warns(UserWarning, match="9 tensors of the weights are not used"):
        load_causal_lm(str(change(model, num_hidden_layers=1)))


def test_good_model_gives_no_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_causal_lm(str(model))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_no_permission(model, monkeypatch, name):
    opened = Path.open

    def deny(self, *args, **options):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", deny)
    refused(model, model / name, "no permission", "chmod u+r")


def test_renamed_tensor(model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["elsewhere"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    refused(model, "model.norm.weight", "do not fit")


# The tokenizer


def test_no_tokenizer(model):
    for path in [*model.glob("*token*"), *model.glob("vocab*"), *model.glob("merges*")]:
        path.unlink()
    refused(model, model, "no tokenizer files", "tokenizer.save_pretrained")


def test_broken_tokenizer(model):
    (model / "tokenizer.json").write_text("{")
    refused(model, f"{model} (its tokenizer)", "cannot be loaded")


def test_tokenizer_of_a_larger_vocabulary(model, tmp_path):
    small = LlamaConfig(**{**CONFIG.to_dict(), "vocab_size": 100})
    new_causal_lm(small, seed=0).save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, tmp_path / "small" / name)
    refused(tmp_path / "small", "uses ids up to", "its embedding has 100 rows")


def different(teacher, student, *needles) -> None:
    with pytest.raises(ModelError) as caught:
        check_same_tokenizer(teacher, student)
    checked(str(caught.value), ["different tokenizers", "student with the teacher's tokenizer", *needles])


def test_tokenizers_that_differ(tmp_path):
    teacher = train_bpe(TEXTS, vocab_size=300)
    different(
        teacher, train_bpe(["quite other words here " * 9], vocab_size=300), "is missing for the teacher and id 257"
    )
    smaller = train_bpe(TEXTS, vocab_size=260)
    first = teacher.convert_ids_to_tokens(260)
    different(teacher, smaller, f"token {first!r} is id 260 for the teacher and missing for the student")
    teacher.save_pretrained(tmp_path)
    added = AutoTokenizer.from_pretrained(tmp_path)
    added.add_tokens(["<tool>"])
    different(teacher, added, "token '<tool>' is missing for the teacher and id")


def test_tokenizers_with_one_vocabulary_but_other_rules():
    from tokenizers import normalizers

    teacher, student = train_bpe(TEXTS, vocab_size=300), train_bpe(TEXTS, vocab_size=300)
    student.backend_tokenizer.normalizer = normalizers.Lowercase()
    different(teacher, student, "the same vocabulary, but 'The' becomes")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocab_size": 256}, "must be at least 257"),
        ({"vocab_size": 300, "special_tokens": ()}, "special_tokens is empty"),
    ],
)
def test_impossible_tokenizer(options, says):
    with pytest.raises(ModelError) as caught:
        train_bpe(TEXTS, **options)
    checked(str(caught.value), [says])


# Students and heads


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "'' is not a size"),
        ("small", "'small' is not a size"),
        ("scale:", "must be a fraction"),
        ("scale:half", "'scale:half': must be a fraction"),
        ("scale:0", "scale 0.0: must be above 0"),
        ("scale:1.5", "scale 1.5: must be above 0 and at most 1"),
        ("scale:nan", "must be above 0"),
        ("scale:0.5,scale:0.4", "scale is there twice"),
        ("layers=2,layers=3", "layers is there twice"),
        ("layers=2,num_hidden_layers=3", "is there twice"),
        ("layers:2", "'layers:2' is not a size"),
        ("layer=2", "did you mean 'layers'"),
        ("layers=two", "'layers=two': must be a whole number"),
        ("layers=0", "layers=0: must be at least 1"),
        ("hidden_size=-8", "hidden_size=-8"),
        ("layers=2,,", "'' is not a size"),
        ("hidden_size=30,heads=4", "cannot be built with these sizes"),
        ("scale:0.0001", "no model with scale 0.0001"),
        ("scale:0.1,hidden_size=32", "fewer fixed sizes"),
        ("scale:0.1,layers=2,hidden_size=32", "fewer fixed sizes"),
    ],
)
def test_bad_student_spec(spec, says):
    with pytest.raises(ModelError) as caught:
        student_from_spec(spec, CONFIG)
    checked(str(caught.value), ["student", says])


def test_size_that_an_architecture_does_not_have():
    with pytest.raises(ModelError) as caught:
        scaled_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50), kv_heads=1)
    checked(str(caught.value), ["kv_heads cannot be set for a gpt2 model", "leave it out"])


def test_teacher_that_cannot_be_scaled():
    with pytest.raises(ModelError) as caught:
        scaled_config(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50), ratio=0.5)
    checked(str(caught.value), ["a mamba teacher cannot be scaled", "give a student model instead"])


def test_config_without_a_causal_model():
    with pytest.raises(ModelError) as caught:
        new_causal_lm(T5Config(vocab_size=50, d_model=16, num_layers=1, num_heads=2), seed=0)
    checked(str(caught.value), ["a t5 model cannot be built"])


def test_model_without_a_head():
    with pytest.raises(ModelError) as caught:
        output_head(LlamaModel(CONFIG))
    checked(str(caught.value), ["LlamaModel has no output head", "lm_head"])


def test_head_whose_logits_are_changed_in_an_unknown_way():
    model = new_causal_lm(CONFIG, seed=0)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    head = output_head(model)
    check_output_head(model, head)
    with pytest.raises(ModelError) as caught:
        check_output_head(model, head._replace(logit_scale=2.0))
    checked(str(caught.value), ["its logits are not those of lm_head", "scale 2.0"])
