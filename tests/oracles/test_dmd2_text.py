"""DMD2 of a teacher that reads: a small Stable Diffusion, with text encoder, tokenizer, autoencoder; and adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from stillhouse import Run
from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.cli.main import app
from stillhouse.core.observed import Observed
from stillhouse.diffusion.conditions import Prompts
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.guidance import ClassifierFreeGuidance
from stillhouse.diffusion.parameterisations import Epsilon
from stillhouse.diffusion.pipelines import load_denoiser, save_pipeline
from stillhouse.diffusion.processes import DiscreteVP
from stillhouse.models.lora import ADAPTER, add_lora, merged
from stillhouse.systems.diffusion.dmd2 import DMD2
from stillhouse.tasks.diffusion import DiffusionTask, load_generator, read_prompts
from stillhouse.workflow import run_system

PROMPTS = ("a red square", "a blue disc", "two lines")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def text_encoder(vocab: int, *, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=8,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    values = {"cross_attention_dim": 16, **options}
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        **values,
    ).eval()


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "teacher")
    return folder / "teacher"


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and images with captions: the folders' names."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("materials")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    for number, caption in enumerate(("green", "grey")):
        (folder / "images" / caption).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 18), (40 * i, 90 * number, 90)).save(folder / "images" / caption / f"{i}.png")
    return folder


def values(teacher: Path, materials: Path, **more: Any) -> dict[str, Any]:
    small = {"steps": 3, "batch_size": 4, "student_steps": 2, "teacher_steps": 2, "eval_samples": 64, "lr": 1e-3}
    own = {"teacher": str(teacher), "data": str(materials / "images"), "prompts": str(materials / "prompts.txt")}
    return {**small, **own, "critic_steps": 2, "guidance": 2.0, "warmup": 0, **more}


def prepared(folder: Path, given: dict[str, Any]) -> DiffusionTask:
    system, run, kept = DMD2.make(**given), Run(folder, quiet=True), []

    def stages() -> Any:
        kept.append((yield from DiffusionTask.prepare(system, run)))

    run.execute(stages())
    return kept[0]


# -- conditions -----------------------------------------------------------------------------------------------------


def test_numbers_stand_for_texts_as_the_pipeline_reads_them(teacher):
    """The denoiser's output is that of the pipeline's own network on the pipeline's own encoding of the text."""
    from diffusers import StableDiffusionPipeline

    denoiser = load_denoiser(str(teacher))
    denoiser.conditions = denoiser.conditions.of((), PROMPTS)
    assert denoiser.classes == 4 and denoiser.shape == (4, 8, 8)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    x, t, labels = drawn(4, 4, 8, 8), torch.tensor([3, 500, 980, 40]), torch.tensor([2, 0, 3, 2])
    texts = [(*PROMPTS, "")[number] for number in labels.tolist()]
    with torch.no_grad():
        encoded, _ = pipeline.encode_prompt(texts, "cpu", 1, False)
        wanted = pipeline.unet(x, t, encoder_hidden_states=encoded).sample
        found = denoiser.output(x, t, labels)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        other = denoiser.output(x, t, torch.tensor([1, 1, 1, 1]))
    assert (found - other).abs().max() > 1e-4  # the text is read


def test_guidance_goes_away_from_the_empty_text(teacher):
    denoiser = load_denoiser(str(teacher))
    denoiser.conditions = denoiser.conditions.of((), PROMPTS)
    null = denoiser.conditions.null(3)
    assert denoiser.conditions.texts[null] == ""
    x, t, labels = drawn(2, 4, 8, 8), torch.tensor([300, 800]), torch.tensor([1, 2])
    with torch.no_grad():
        found = ClassifierFreeGuidance(denoiser, scale=3.0, null_class=null)(x, t, labels)
        empty = denoiser(x, t, torch.full((2,), null))
        torch.testing.assert_close(found, empty + 3 * (denoiser(x, t, labels) - empty), rtol=1e-3, atol=1e-4)


def test_a_pipeline_of_two_encoders(tmp_path):
    """Stable Diffusion XL: pooled text and sizes beside the text; the empty text is all zeros where it says so."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    words = tokenizer(tmp_path / "words")
    first, second = text_encoder(len(words)), text_encoder(len(words), projection=True)
    net = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
    )
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts = {"tokenizer": words, "tokenizer_2": words, "text_encoder": first, "text_encoder_2": second}
    StableDiffusionXLPipeline(vae=autoencoder(), unet=net, scheduler=scheduler, **parts).save_pretrained(tmp_path)
    denoiser = load_denoiser(str(tmp_path))
    denoiser.conditions = denoiser.conditions.of(PROMPTS, ())
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    x, t = drawn(2, 4, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        encoded, empty, pooled, nothing = pipeline.encode_prompt([PROMPTS[1]], device="cpu")
        assert empty.abs().max() == 0  # what the pipeline itself takes for no text
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
        for number, text, pool in ((1, encoded, pooled), (3, empty, nothing)):
            more = {"text_embeds": pool.expand(2, -1), "time_ids": sizes.expand(2, -1)}
            wanted = pipeline.unet(x, t, text.expand(2, -1, -1), added_cond_kwargs=more).sample
            found = denoiser.output(x, t, torch.tensor([number, number]))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_transformer_that_reads(tmp_path):
    """PixArt: a masked text, no sizes; its tokens in the middle are a map to a discriminator."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = tokenizer(tmp_path / "words")
    encoder = T5EncoderModel(T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    net = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    pipeline = PixArtSigmaPipeline(words, encoder.eval(), autoencoder(), net, DDIMScheduler())
    conditions = Prompts(pipeline, net, PROMPTS)
    denoiser = Denoiser(net.eval(), DiscreteVP.linear(), Epsilon(), conditions=conditions)
    x, t = drawn(2, 4, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        one, other = (denoiser(x, t, torch.tensor([number] * 2)) for number in (0, 1))
        text, mask, *_ = pipeline.encode_prompt([PROMPTS[0]] * 2, do_classifier_free_guidance=False, device="cpu")
        none = {"resolution": None, "aspect_ratio": None}
        wanted = net(x, text, t, none, encoder_attention_mask=mask, return_dict=False)[0][:, :4]
        torch.testing.assert_close(denoiser.output(x, t, torch.tensor([0, 0])), wanted, rtol=1e-4, atol=1e-5)
    assert one.shape == x.shape and (one - other).abs().max() > 1e-5
    task = DiffusionTask(DMD2(), None, denoiser, None, (0, 3))  # type: ignore[arg-type]
    batch = {"sample": x, "timestep": t, "class_labels": torch.tensor([0, 1])}
    assert task.features(Observed(denoiser))(batch).shape == (2, 16, 4, 4)


def test_copies_share_what_is_not_trained(teacher):
    import copy

    denoiser = load_denoiser(str(teacher))
    other = copy.deepcopy(denoiser)
    assert other.net is not denoiser.net
    for part in ("conditions", "space", "home"):
        assert getattr(other, part) is getattr(denoiser, part)
    names = {name.partition(".")[0] for name, _ in denoiser.named_parameters()}
    assert names == {"net"}  # so that neither text encoder nor autoencoder is a weight of the student


# -- latents --------------------------------------------------------------------------------------------------------


def test_samples_are_latents(teacher):
    denoiser = load_denoiser(str(teacher))
    images = drawn(3, 3, 16, 16).tanh()
    assert denoiser.space.image_shape((4, 8, 8)) == (3, 16, 16)
    with torch.no_grad():
        code = denoiser.space.vae.encode(images).latent_dist
        torch.testing.assert_close(denoiser.space.encode(images), 0.5 * code.mean)
        one = denoiser.space.encode(images, torch.Generator().manual_seed(3))
        wanted = 0.5 * (code.mean + code.std * drawn(3, 4, 8, 8, seed=3))
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)
        shown = denoiser.space.shown(one)
        torch.testing.assert_close(shown, denoiser.space.vae.decode(2 * one).sample, rtol=1e-4, atol=1e-5)


# -- data -----------------------------------------------------------------------------------------------------------


def test_captions_come_first_and_prompts_are_generated_from(teacher, materials, tmp_path):
    task = prepared(tmp_path / "run", values(teacher, materials))
    assert task.teacher.conditions.texts == ("green", "grey", *PROMPTS, "")
    batch = next(task.batches({}))
    assert batch["real"].shape == (4, 4, 8, 8) and set(batch["real_labels"].tolist()) <= {0, 1}
    source = task.batches({})
    seen = {label for _ in range(30) for label in next(source)["class_labels"].tolist()}
    assert seen == {2, 3, 4}
    assert task.guided_teacher().null_class == 5
    alone = prepared(tmp_path / "alone", {**values(teacher, materials), "prompts": None})
    assert alone.generated == (0, 2) and alone.guided_teacher().null_class == 2


def test_bad_prompts_are_one_clear_line(teacher, materials, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_prompts(str(tmp_path / "rows.jsonl")) == ("one", "two")
    for name, expected in (("empty.txt", "no prompt"), ("nothing.txt", "cannot be read")):
        with pytest.raises(DataError, match=expected) as found:
            read_prompts(str(tmp_path / name))
        assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match="does not read text"):
        prepared(tmp_path / "run", {"demo_steps": 2, "prompts": str(materials / "prompts.txt")})


def test_other_conditions_are_refused(tmp_path, teacher):
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    parts = {**pipeline.components, "scheduler": DDPMScheduler(clip_sample=False)}
    parts["unet"] = unet(addition_embed_type="text", encoder_hid_dim=None, addition_embed_type_num_heads=2)
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not understood"):
        load_denoiser(str(tmp_path))


# -- the system -----------------------------------------------------------------------------------------------------


def test_from_the_command_line_to_a_stock_pipeline(teacher, materials, tmp_path):
    """All stages, with GAN and guidance; what is left is a Stable Diffusion pipeline that differs in its network."""
    from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline

    given = {**values(teacher, materials), "score_steps": 2, "regression_steps": 1, "regression_ode_steps": 2}
    arguments = [f"{key}={value}" for key, value in given.items()]
    done = CliRunner().invoke(app, ["run", "dmd2", *arguments, f"output={tmp_path / 'run'}"])
    assert done.exit_code == 0, done.output
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model")
    assert isinstance(pipeline, StableDiffusionPipeline) and isinstance(pipeline.scheduler, LCMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(list(PROMPTS[:2]), num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    old = StableDiffusionPipeline.from_pretrained(teacher)
    for part, same in (("text_encoder", True), ("vae", True), ("unet", False)):
        pairs = zip(getattr(pipeline, part).parameters(), getattr(old, part).parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs) == same, part
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())
    assert metrics["status"] == "done"


def test_a_student_is_what_its_pipeline_is(teacher, materials, tmp_path):
    """The saved pipeline, asked with the same noise, makes the latents that the few-step generator makes."""
    from diffusers import StableDiffusionPipeline

    task = prepared(tmp_path / "run", values(teacher, materials))
    model = task.new_generator(2).eval()
    save_pipeline(model.denoiser, tmp_path / "student", times=model.times)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    noise = drawn(2, 2, 4, 8, 8)
    generator = torch.Generator().manual_seed(5)
    fresh = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", "generator": generator}
    found = pipeline(["green", "two lines"], latents=noise[:, 0].clone(), **options).images
    wanted = model.sample(torch.stack([noise[:, 0], fresh], 1), torch.tensor([0, 4]))
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


# -- adapters -------------------------------------------------------------------------------------------------------


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    torch.manual_seed(0)
    net = unet()
    x, t, text = drawn(2, 4, 8, 8), torch.tensor([5, 700]), drawn(2, 12, 16)
    before = net(x, t, text).sample
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    add_lora(net, rank=3, alpha=6, seed=1)
    torch.testing.assert_close(net(x, t, text).sample, before)
    trained = {name for name, one in net.named_parameters() if one.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert any("to_q" in name for name in trained) and any("conv1" in name for name in trained)
    assert not any("time_embedding" in name or "conv_in" in name for name in trained)
    with torch.no_grad():
        for name, one in net.named_parameters():
            if ".lora_B." in name:
                one.copy_(drawn(*one.shape, seed=len(name)) / 10)
    plain = merged(net)
    torch.testing.assert_close(plain(x, t, text).sample, net(x, t, text).sample, rtol=1e-3, atol=1e-4)
    assert plain.state_dict().keys() == weights.keys()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = net.get_submodule(name)
    low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(plain.state_dict()[f"{name}.weight"], weights[f"{name}.weight"] + 6 / 3 * low)
    assert torch.linalg.matrix_rank(plain.state_dict()[f"{name}.weight"] - weights[f"{name}.weight"]) <= 3


def test_an_adapter_for_the_stock_pipeline(teacher, materials, tmp_path):
    """The teacher's own pipeline with the saved adapter is the student; the stages share one adapter."""
    from diffusers import StableDiffusionPipeline

    given = {**values(teacher, materials), "lora_rank": 2, "lora_alpha": 4.0, "score_steps": 2, "lr": 1e-2}
    done = run_system("dmd2", {**given, "trackers": []}, output=tmp_path / "run", quiet=True)
    folder = done.artifacts["student"].path
    student = load_generator(folder)
    old = StableDiffusionPipeline.from_pretrained(teacher)
    x, t, text = drawn(2, 4, 8, 8), torch.tensor([999, 499]), drawn(2, 12, 16)
    with torch.no_grad():
        wanted = student.denoiser.net(x, t, text).sample
        assert (old.unet(x, t, text).sample - wanted).abs().max() > 1e-4
        rank = torch.linalg.matrix_rank(
            student.denoiser.net.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
            - old.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight,
            atol=1e-5,
        )
        assert rank == 2  # of both stages together
        old.load_lora_weights(folder, weight_name=ADAPTER)
        torch.testing.assert_close(old.unet(x, t, text).sample, wanted, rtol=1e-3, atol=1e-4)
    assert math.isfinite(done.artifacts["evaluation"].metrics["student/swd"])


def test_adapters_on_the_embedded_task(tmp_path, monkeypatch):
    """The same fields on the plane: a network with none of the layers gets adapters on its linear ones."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    given = {
        "demo_steps": 3,
        "steps": 3,
        "batch_size": 16,
        "teacher_steps": 3,
        "eval_samples": 64,
        "lora_rank": 2,
        "warmup": 0,
    }
    done = run_system("dmd2", {**given, "lr": 1e-2, "trackers": []}, output=tmp_path / "run", quiet=True)
    teacher, student = (load_denoiser(str(done.artifacts[name].path)).net for name in ("teacher", "student"))
    difference = student.blocks[0].first.weight - teacher.blocks[0].first.weight
    assert difference.abs().max() > 0 and torch.linalg.matrix_rank(difference, atol=1e-5) <= 2
    torch.testing.assert_close(student.blocks[0].first.bias, teacher.blocks[0].first.bias)
