"""What is published of a directory: files, card, licenses. Nothing here needs a Hub."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from lavit_hf import LavitConfig, LavitVisualTokenizer
from lavit_hf.hub import PublishError, publish
from lavit_hf.hub.card import Origin
from lavit_hf.hub.files import check_licenses
from lavit_hf.hub.publish import prepare
from lavit_hf.remote_code import code_files

METRICS = {
    "checkpoint": "x",
    "versions": {},
    "results": [
        {
            "task": "vqa",
            "data": "scenes",
            "split": "test",
            "num_samples": 200,
            "metrics": {
                "accuracy": {
                    "value": 0.925,
                    "n": 200,
                    "unit": "questions",
                    "interval": [0.88, 0.95],
                    "is_share": True,
                },
                "color": {"value": None, "n": 0, "unit": "questions", "interval": None, "is_share": True},
            },
        },
        {
            "task": "caption",
            "data": "owner/photos",
            "split": None,
            "num_samples": 3,
            "metrics": {"cider": {"value": 1.25, "n": 3, "unit": "samples", "interval": None, "is_share": False}},
        },
    ],
}


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that may be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pixel_decoders_are_told_the_ids_of_the_language_model(folder: Path) -> None:
    """Regression: the card's "Use" failed for a folder put together by hand of what stages 2 and 3 write."""
    index = json.loads((folder / "model_index.json").read_text())
    for offset in (None, 7):
        (folder / "model_index.json").write_text(json.dumps({**index, "visual_token_offset": offset}))
        with prepare(folder, "owner/name", Origin()) as publication:
            published = json.loads(publication.files["model_index.json"].read_text())
            assert published["visual_token_offset"] == index["visual_token_offset"] == 302


def read_card(folder: Path, origin: Origin | None = None) -> tuple[ModelCard, str]:
    with prepare(folder, "owner/name", origin or Origin()) as publication:
        text = publication.files["README.md"].read_text()
    return ModelCard(text), text


def test_dry_run_changes_nothing(folder: Path) -> None:
    (folder / "modeling_lavit.py").write_text("# of an older version\n")
    before = content(folder)
    report = publish(folder, "owner/name", dry_run=True)
    assert content(folder) == before
    assert report.url is None and report.commit is None
    code = set(code_files())
    for decoder in ("", "lowres/"):
        code |= {f"{decoder}pipeline_lavit_pixel_decoder.py", f"{decoder}token_decoder/lavit_token_decoder.py"}
    assert report.sizes.keys() == before.keys() | code
    assert report.sizes["modeling_lavit.py"] > 10_000  # written anew
    assert report.sizes["model.safetensors"] == len(before["model.safetensors"])
    assert report.hints == ["The card names no base_model (--base-model).", "The card names no datasets (--dataset)."]


def test_card_holds_the_facts(folder: Path) -> None:
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(METRICS))
    card, text = read_card(folder, Origin(base_models=["a/b"], datasets=["c/d", "e/f"]))
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", "apache-2.0")
    assert (data.base_model, data.datasets) == ("a/b", ["c/d", "e/f"])
    assert {"lavit", "any-to-any", "random-weights"} <= set(data.tags)
    results = [
        (r.task_type, r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results
    ]
    assert results == [
        ("visual-question-answering", "scenes", "test", "accuracy", 0.925),
        ("image-to-text", "owner/photos", None, "cider", 1.25),
    ]
    assert data.model_name == "name"
    assert "| vqa | scenes test | accuracy | 92.5 % (88.0 to 95.0) | 200 questions |" in text
    assert "| caption | owner/photos | cider | 1.250 | 3 samples |" in text
    tensors = load_file(folder / "model.safetensors")
    visual = sum(tensor.numel() for name, tensor in tensors.items() if ".visual_tokenizer." in name)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert f"| Parameters, visual tokenizer | {visual:,} |" in text
    assert f"| Parameters, language model | {total - visual:,} |" in text
    assert "| Vocabulary | 366 ids: 300 of text, start, end, codes |" in text
    assert "- c/d\n- e/f" in text
    assert 'repository = "owner/name"' in text


def test_card_draws_as_the_checkpoint_says(folder: Path) -> None:
    assert "guidance_scale=4.0," in read_card(folder)[1]
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "drawing_guidance_scale": 1.5}))
    assert "guidance_scale=1.5," in read_card(folder)[1]


def test_what_the_owner_wrote_stays(folder: Path) -> None:
    (folder / "README.md").write_text(
        "---\nlanguage: en\ndatasets:\n- my/data\ntags:\n- mine\n---\n# Mine\n\nMy words.\n"
    )
    _, text = read_card(folder, Origin(license="mit"))
    (folder / "README.md").write_text(text)
    card, again = read_card(folder)
    assert again == text
    assert again.count("## Architecture") == 1 and "# Mine\n\nMy words.\n" in again
    assert (card.data.language, card.data.license, card.data.datasets) == ("en", "mit", ["my/data"])
    assert "mine" in card.data.tags and "lavit" in card.data.tags


@pytest.mark.parametrize("heading", ["## Training data", "### Training Data", "# Training data: #"])
def test_what_the_owner_wrote_of_the_training_data_replaces_the_section(folder: Path, heading: str) -> None:
    (folder / "README.md").write_text(f"# Mine\n\n{heading}\n\nMy pictures.\n")
    _, text = read_card(folder, Origin(license="mit"))
    assert text.lower().count("# training data") == 1 and "My pictures." in text and "Not stated." not in text


@pytest.mark.parametrize("text", ["See ## Training data below.", "```python\n# Training data\nrows = 1\n```"])
def test_training_data_in_passing_is_no_section(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(f"# Mine\n\n{text}\n")
    assert "## Training data\n\nNot stated." in read_card(folder, Origin(license="mit"))[1]


def test_without_a_card(folder: Path) -> None:
    (folder / "README.md").unlink()
    card, text = read_card(folder, Origin(license="apache-2.0"))
    assert "# name\n" in text and "Not stated." in text
    assert card.data.license == "apache-2.0"


def test_pixel_decoders_are_told_apart_by_what_they_are(folder: Path) -> None:
    """Regression: the one at the root was called high-resolution, whatever it was."""
    assert "| Pixel decoders | high-resolution, low-resolution |" in read_card(folder)[1]
    shutil.copyfile(folder / "lowres" / "token_decoder" / "config.json", folder / "token_decoder" / "config.json")
    assert "| Pixel decoders | low-resolution, low-resolution |" in read_card(folder)[1]


def test_visual_tokenizers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    LavitVisualTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    card, text = read_card(tmp_path)
    assert card.data.pipeline_tag == "image-feature-extraction" and "any-to-any" not in card.data.tags
    assert "Language model" not in text and 'AutoModel.from_pretrained("owner/name"' in text


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def lose_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + (name[0] == 'l')}-of-00002.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model.safetensors"), "no weights in the safetensors format"),
        (lose_a_shard, "model-00002-of-00002.safetensors, which is not there"),
        (
            write("unet/diffusion_pytorch_model.safetensors", "x"),
            "unet/diffusion_pytorch_model.safetensors is not a read",
        ),
        (remove("processor_config.json"), "no processor_config.json"),
        (remove("tokenizer.json"), "no tokenizer.json"),
        (remove("config.json"), "it has no config.json"),
        (write("adapter_config.json", "{}"), "adapters of LoRA beside a model"),
        (write("config.json", '{"model_type": "llama"}'), "'llama' model"),
        (write("README.md", "---\na: [\n---\n"), "README.md: the metadata"),
        (write("metrics.json", "{}"), "not what `lavit evaluate` writes"),
        (remove("NOTICE"), "NOTICE, which is gone"),
    ],
)
def test_broken_checkpoints(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(PublishError, match=message):
        publish(folder, "owner/name", dry_run=True)


@pytest.mark.parametrize("name", ["name", "a/b/c", "a--b/c", "-a/b"])
def test_names_of_repositories(tiny_checkpoint: Path, name: str) -> None:
    with pytest.raises(PublishError):
        publish(tiny_checkpoint, name, dry_run=True)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="nowhere is not a directory"):
        publish(tmp_path / "nowhere", "owner/name", dry_run=True)


class TestDerivedWeights:
    """Converted weights whose card says nothing of a license of their own."""

    @pytest.fixture
    def derived(self, folder: Path) -> Path:
        card = ModelCard.load(folder / "README.md")
        card.data.license = "other"
        card.save(folder / "README.md")
        return folder

    def test_are_refused_without_licenses(self, derived: Path) -> None:
        with pytest.raises(PublishError, match="a license is missing") as error:
            publish(derived, "owner/name", dry_run=True)
        assert "acceptable use policy" in str(error.value) and "Llama 2 is licensed under" in str(error.value)

    def test_carry_them(self, derived: Path) -> None:
        for name in ("LICENSE", "LICENSE-LLAMA2.txt", "USE_POLICY.md"):
            (derived / name).write_text(name)
        with prepare(derived, "owner/name", Origin()) as publication:
            assert {"LICENSE", "LICENSE-LLAMA2.txt", "USE_POLICY.md", "NOTICE"} <= publication.files.keys()
            data = ModelCard(publication.files["README.md"].read_text()).data
        assert (data.license, data.license_name) == ("other", "lavit-community-license")
        assert data.license_link == "LICENSE"

    def test_copied_ones_cannot_be_dropped(self, derived: Path) -> None:
        layout = json.loads((derived / "original" / "layout.json").read_text())
        layout["copied"] |= {"LICENSE": "LICENSE", "pixel_decoding/LICENSE": "pixel_decoding-LICENSE"}
        (derived / "original" / "layout.json").write_text(json.dumps(layout))
        (derived / "LICENSE").write_text("license")
        for license in (None, "apache-2.0"):
            with pytest.raises(PublishError, match="was converted with pixel_decoding-LICENSE, which is gone"):
                publish(derived, "owner/name", dry_run=True, license=license)
        (derived / "pixel_decoding-LICENSE").write_text("license")
        publish(derived, "owner/name", dry_run=True)

    def test_are_known_by_their_sizes(self, tmp_path: Path) -> None:
        with pytest.raises(PublishError, match="sizes of the published model"):
            check_licenses(tmp_path, ["config.json"], LavitConfig(), None)
        assert check_licenses(tmp_path, ["LICENSE", "NOTICE"], LavitConfig(), None)
        assert not check_licenses(tmp_path, ["config.json"], LavitConfig(), "apache-2.0")
