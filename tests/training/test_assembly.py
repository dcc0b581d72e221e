"""What stage 2 and stage 3 write becomes one checkpoint, or a clear error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitTokenDecoder
from lavit_hf.conversion.weight_files import ConversionError
from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline
from lavit_hf.training import assemble, build_pixel_decoder
from tiny_parts import CHECKPOINT

OFFSET, END = 302, 301


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As stage 2 leaves it, with what else `Trainer` writes."""
    folder = tmp_path_factory.mktemp("stage2") / "lm"
    LavitForConditionalGeneration.from_pretrained(CHECKPOINT).save_pretrained(folder, max_shard_size="200KB")
    ImageTextProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-2").mkdir()
    (folder / "LICENSE").write_text("mine")
    return folder


@pytest.fixture(scope="module")
def pixel_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As stage 3 leaves it when it starts from scratch: nobody has told it which ids codes have."""
    folder = tmp_path_factory.mktemp("stage3") / "pixel-decoder"
    base = LavitPixelDecoderPipeline.from_pretrained(CHECKPOINT)
    token_decoder = LavitTokenDecoder.from_pretrained(CHECKPOINT / "token_decoder")
    pipeline = build_pixel_decoder(token_decoder, base.vae, dict(base.unet.config))
    pipeline.save_pretrained(folder)
    (folder / "log.jsonl").write_text("{}")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "random_states_0.pkl").write_bytes(b"a pickle")
    assert json.loads((folder / "model_index.json").read_text())["visual_token_offset"] is None
    return folder


def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / f"copy of {source.name}"))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        input_ids=[torch.tensor([END - 1, OFFSET + 3, OFFSET + 14, END])],
        num_inference_steps=2,
        generator=generator,
        output_type="pt",
    ).images


def test_a_checkpoint_of_both(language_model: Path, pixel_decoder: Path, tmp_path: Path) -> None:
    folder = assemble(language_model, pixel_decoder, tmp_path / "new" / "lavit")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "processor_config.json", "model_index.json"} <= names
    assert {"README.md", "LICENSE", "unet", "modeling_lavit.py", "pipeline_lavit_text_to_image.py"} <= names
    assert not {"training_args.bin", "trainer_state.json", "checkpoint-2", "log.jsonl", "lowres"} & names
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["lavit"]
    pipeline = LavitTextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    original = LavitForConditionalGeneration.from_pretrained(language_model).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in pipeline.model.state_dict().items())
    generator = torch.Generator().manual_seed(0)
    assert pipeline("a cat", num_inference_steps=2, generator=generator).images[0].size == (64, 64)
    card = ModelCard.load(folder / "README.md")
    assert "lavit assemble" in card.text and str(tmp_path) not in card.content
    assert "`lm` and the pixel decoder of `pixel-decoder`" in card.text


def test_ids_are_those_of_the_language_model(language_model: Path, pixel_decoder: Path, tmp_path: Path) -> None:
    """The "Use" of its card: `DiffusionPipeline` draws the ids that the language model writes."""
    other = copy(pixel_decoder, tmp_path)
    change_json(other / "model_index.json", visual_token_offset=7, eoi_token_id=6)
    drawings = []
    for number, source in enumerate((pixel_decoder, other)):
        folder = assemble(language_model, source, tmp_path / f"{number}")
        index = json.loads((folder / "model_index.json").read_text())
        assert (index["visual_token_offset"], index["eoi_token_id"]) == (OFFSET, END)
        assert index["_class_name"] == ["pipeline_lavit_text_to_image", "LavitTextToImagePipeline"]
        assert "_ignore_files" not in index, "the language model is downloaded, too"
        drawings.append(draw(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).pixel_decoder))
    assert torch.equal(*drawings)


def test_all_pixel_decoders_of_a_checkpoint(language_model: Path, tmp_path: Path) -> None:
    folder = assemble(language_model, CHECKPOINT, tmp_path / "lavit")
    for decoder in ("highres", "lowres"):
        draw(LavitPixelDecoderPipeline.from_pretrained(folder, decoder=decoder))
    assert (folder / "NOTICE").read_bytes() == (CHECKPOINT / "NOTICE").read_bytes()


def test_pixel_decoders_of_the_language_model_are_left_out(pixel_decoder: Path, tmp_path: Path) -> None:
    folder = assemble(CHECKPOINT, pixel_decoder, tmp_path / "lavit")
    assert not (folder / "lowres").exists()
    assert (folder / "README.md").read_bytes() == (CHECKPOINT / "README.md").read_bytes(), "its owner's words"
    new, old = (load_file(root / "unet" / "diffusion_pytorch_model.safetensors") for root in (folder, CHECKPOINT))
    assert not torch.equal(new["conv_in.weight"], old["conv_in.weight"])


def other_codes(folder: Path) -> None:
    path = folder / "token_decoder" / "model.safetensors"
    weights = load_file(path)
    weights["codebook.weight"] = weights["codebook.weight"] + 0.1
    save_file(weights, path, metadata={"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_codes, "the codes of another visual tokenizer"),
        (lambda f: change_json(f / "token_decoder/config.json", codebook_size=32), "codes: 32 there, 64 in"),
        (lambda f: change_json(f / "token_decoder/config.json", codebook_dim=4), "numbers per code: 4 there, 8 in"),
        (lambda f: change_json(f / "token_decoder/config.json", num_queries=8), "takes at most 8 codes per image"),
        (lambda f: change_json(f / "unet/config.json", cross_attention_dim=99), "99 in its U-Net"),
        (lambda f: change_json(f / "unet/config.json", addition_embed_type=None), "a pooled condition: True there"),
        (lambda f: change_json(f / "vae/config.json", latent_channels=8), "channels of latents: 8 there, 4 in"),
        (lambda f: (f / "model_index.json").unlink(), "no pixel decoder: it has no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json"),
        (lambda f: change_json(f / "model_index.json", **{"../x": ["a", "b"]}), "'../x', which cannot be a part"),
        (lambda f: shutil.rmtree(f / "scheduler"), "scheduler"),
        (lambda f: (f / "vae/config.json").write_text("[]"), "vae/config.json does not hold a JSON object"),
        (lambda f: cut(f / "unet/diffusion_pytorch_model.safetensors"), "diffusion_pytorch_model.safetensors is"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "vae has no weights in the safetensors"),
    ],
)
def test_pixel_decoders_that_do_not_fit(language_model, pixel_decoder, tmp_path: Path, damage, message: str) -> None:
    broken = copy(pixel_decoder, tmp_path)
    damage(broken)
    with pytest.raises(ConversionError) as error:
        assemble(language_model, broken, tmp_path / "out")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "processor_config.json").unlink(), "no processor_config.json: save the processor there, too"),
        (lambda f: (f / "config.json").unlink(), "is no LaVIT: it has no config.json"),
        (lambda f: change_json(f / "config.json", model_type="llama"), "of a 'llama' model"),
        (lambda f: change_json(f / "config.json", visual_token_offset=10**6), "config.json"),
        (lambda f: sorted(f.glob("model-*"))[0].unlink(), "lists shards that are missing"),
        (lambda f: cut(sorted(f.glob("model-*"))[0]), "model-00001"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "first merge them: lavit merge"),
    ],
)
def test_language_models_that_do_not_fit(language_model, pixel_decoder, tmp_path: Path, damage, message: str) -> None:
    broken = copy(language_model, tmp_path)
    damage(broken)
    with pytest.raises(ConversionError) as error:
        assemble(broken, pixel_decoder, tmp_path / "out")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [broken]


def test_wrong_kinds_of_directories(language_model: Path, pixel_decoder: Path, tmp_path: Path) -> None:
    def error(*arguments) -> str:
        with pytest.raises(ConversionError) as caught:
            assemble(*arguments)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    out = tmp_path / "out"
    assert "name the language model first" in error(pixel_decoder, language_model, out)
    assert "what training goes on from" in error(language_model, pixel_decoder / "checkpoint-2", out)
    assert "holds a 'lavit' model and no pixel decoder" in error(language_model, language_model, out)
    assert "does not exist" in error(tmp_path / "nowhere", pixel_decoder, out)
    assert "does not exist" in error(language_model, tmp_path / "nowhere", out)
    assert "exists and is not empty" in error(language_model, pixel_decoder, language_model)


@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja", "LICENSE", "model-00009-of-00009.safetensors"])
def test_files_of_others_are_not_copied(language_model: Path, pixel_decoder: Path, tmp_path: Path, name: str) -> None:
    """Whoever publishes the result would publish them."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in").mkdir()
    source = copy(language_model, tmp_path / "in")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ConversionError, match=f"has {name}, which links to .*secret outside of it: put a copy"):
        assemble(source, pixel_decoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(language_model, pixel_decoder, tmp_path: Path, monkeypatch) -> None:
    def full(source, target) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ConversionError, match="No space left on device"):
        assemble(language_model, pixel_decoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_put_together_by_hand_knows_its_ids(language_model, pixel_decoder, tmp_path: Path) -> None:
    """Regression: `model_index.json` of stage 3 has no offset. One of another language model is refused."""
    right = draw(
        LavitPixelDecoderPipeline.from_pretrained(assemble(language_model, pixel_decoder, tmp_path / "right"))
    )
    folder = Path(shutil.copytree(language_model, tmp_path / "by-hand"))
    shutil.copytree(pixel_decoder, folder, dirs_exist_ok=True)
    assert torch.equal(draw(LavitPixelDecoderPipeline.from_pretrained(folder)), right)
    change_json(folder / "model_index.json", visual_token_offset=7, eoi_token_id=6)
    with pytest.raises(ValueError, match="lavit assemble"):
        LavitPixelDecoderPipeline.from_pretrained(folder)
