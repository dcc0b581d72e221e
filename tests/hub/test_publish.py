"""What is published of a directory or of adapters, and what others get from a Hub.

Every client of the Hub is a process of its own with an empty cache.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lavit_hf
import standalone
from hub.hub_server import HubServer
from lavit_hf import ImageTextProcessor, LavitConfig, LavitForConditionalGeneration, LavitVisualTokenizer
from lavit_hf.hub import PublishError, publish
from lavit_hf.hub.card import Origin
from lavit_hf.hub.files import check_licenses
from lavit_hf.hub.publish import prepare
from lavit_hf.remote_code import PIPELINE_MODULE, code_files, pipeline_code, text_to_image_code
from lavit_hf.training import get_lora_config
from standalone import compute

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
    code.add("pipeline_lavit_text_to_image.py")
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
    assert "guidance_scale=4.0)" in read_card(folder)[1]
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "drawing_guidance_scale": 1.5}))
    assert "guidance_scale=1.5)" in read_card(folder)[1]


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


PICTURE = Path(__file__).parents[2] / "examples" / "images" / "chelsea.jpg"
REPOSITORY = "owner/tiny"


@pytest.fixture
def published(hub: HubServer, tiny_checkpoint: Path) -> str:
    """The commit of what `publish` uploads."""
    with prepare(tiny_checkpoint, REPOSITORY, Origin()) as publication:
        return hub.add(REPOSITORY, publication.files)


def test_everything_in_one_commit(hub: HubServer, client, tiny_checkpoint: Path, published) -> None:
    code = """
import sys
from lavit_hf.hub import publish
for _ in range(2):
    print(publish(sys.argv[1], "owner/new", base_models=["a/b", "c/d"]).commit)
"""
    commits = client(code, tiny_checkpoint).stdout.split()
    repository = hub.repositories["owner/new"]
    assert commits == [repository.names["main"]] * 2  # the second time nothing had changed
    assert len(repository.commits) == 2  # the first one made the repository
    files = hub.files("owner/new")
    expected = hub.files(REPOSITORY) | {name: files[name] for name in ("README.md", ".gitattributes")}
    assert files == expected
    assert b"- a/b\n- c/d\n" in files["README.md"]
    code = {**code_files(), f"{PIPELINE_MODULE}.py": pipeline_code(), f"lowres/{PIPELINE_MODULE}.py": pipeline_code()}
    code["pipeline_lavit_text_to_image.py"] = text_to_image_code()
    assert {name: files[name].decode() for name in code} == code  # the checkpoint of this repository has none
    assert set(hub.uploads.values()) == {1}


def test_others_compute_the_same_without_the_package(hub, client, tiny_checkpoint, published, tmp_path) -> None:
    """What the card says runs, and a pinned revision stays what it is."""
    later = hub.add(REPOSITORY, {"README.md": tiny_checkpoint / "README.md"})
    assert hub.repositories[REPOSITORY].names["main"] == later != published
    card = hub.files(REPOSITORY, published)["README.md"].decode()
    blocks = [part.partition("```")[0] for part in card[card.index("<!-- facts") :].split("```python\n")[1:]]
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("trust_remote_code", f"revision={published!r}, trust_remote_code")
    # Few tokens and steps, so that it takes no time; the checkpoint cannot do more.
    code = code.replace(").images[0]", ", num_inference_steps=2, max_new_tokens=9).images[0]")
    (tmp_path / "picture.png").write_bytes(PICTURE.read_bytes())
    script = f"import runpy, sys\nrunpy.run_path({standalone.__file__!r})['main'](*sys.argv[1:])\n{code}"
    client(script, REPOSITORY, PICTURE, tmp_path, published)
    expected = compute(
        lavit_hf.LavitForConditionalGeneration.from_pretrained(tiny_checkpoint),
        lavit_hf.ImageTextProcessor.from_pretrained(tiny_checkpoint),
        lavit_hf.LavitPixelDecoderPipeline.from_pretrained(tiny_checkpoint),
        str(PICTURE),
    )
    found = torch.load(tmp_path / "first.pt")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert (tmp_path / "drawing.png").is_file()
    asked = {path for _, path in hub.requests}
    assert f"/{REPOSITORY}/resolve/{published}/model.safetensors" in asked
    assert not [path for path in asked if "/lowres/" in path or "/original/" in path]  # no pipeline needs them


def test_an_interrupted_upload_changes_nothing_and_goes_on(hub: HubServer, client, tiny_checkpoint: Path) -> None:
    hub.failing_upload = 4
    code = """
import sys
from huggingface_hub import HfApi
from lavit_hf.hub import PublishError, publish
try:
    publish(sys.argv[1], "owner/tiny")
except PublishError as error:
    print(error)
print(HfApi().list_repo_files("owner/tiny"))
print(len(publish(sys.argv[1], "owner/tiny").sizes))
"""
    *message, before, count = client(code, tiny_checkpoint).stdout.splitlines()
    assert message[0].startswith("owner/tiny was not changed") and message[-1].endswith(
        "goes on with what is missing."
    )
    assert before == "['.gitattributes']"
    assert len(hub.files("owner/tiny")) == int(count) + 1
    assert len(hub.uploads) == 8 and set(hub.uploads.values()) == {1}  # nothing twice


def test_weights_of_an_earlier_version_go(hub: HubServer, client, tiny_checkpoint: Path, published, tmp_path) -> None:
    sharded = tmp_path / "sharded"
    model = lavit_hf.LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.save_pretrained(sharded, max_shard_size="1MB")
    lavit_hf.ImageTextProcessor.from_pretrained(tiny_checkpoint).save_pretrained(sharded)
    model.save_pretrained(sharded, max_shard_size="1MB", variant="fp16")
    other = dict.fromkeys(("lora/model.safetensors", "mine.safetensors"), tiny_checkpoint / "model.safetensors")
    stored = {"notes.txt": tiny_checkpoint / "NOTICE", **other, **{f.name: f for f in sharded.iterdir()}}
    hub.add(REPOSITORY, stored)
    old = {name for name in stored if name.startswith("model") and ".safetensors" in name}
    assert len(old) > 4 and {"model.safetensors.index.json", "model.safetensors.index.fp16.json"} < old
    code = f"import sys, lavit_hf.hub; print(*lavit_hf.hub.publish(sys.argv[1], {REPOSITORY!r}).removed)"
    assert set(client(code, tiny_checkpoint).stdout.split()) == old
    files = hub.files(REPOSITORY)
    assert not old & files.keys() and {"model.safetensors", "notes.txt", *other} <= files.keys()


def test_private_repositories(hub: HubServer, client, tiny_checkpoint: Path) -> None:
    code = """
import sys
from lavit_hf import LavitConfig
from lavit_hf.hub import PublishError, publish
publish(sys.argv[1], "owner/tiny", private=True, revision="next")
print(LavitConfig.from_pretrained("owner/tiny", revision="next").model_type)
try:
    publish(sys.argv[1], "owner/public", private=True)
except PublishError as error:
    print(error)
"""
    hub.add("owner/public", {})
    lines = client(code, tiny_checkpoint).stdout.splitlines()
    assert lines[0] == "lavit"
    assert lines[1].startswith("owner/public exists and is public") and hub.files("owner/public") == {}
    assert hub.repositories["owner/tiny"].private
    assert "config.json" in hub.files("owner/tiny", "next") and "config.json" not in hub.files("owner/tiny")
    code = """
import sys
from lavit_hf import LavitForConditionalGeneration, LavitPixelDecoderPipeline, LavitVisualTokenizer
from lavit_hf.hub import publish
for call in (
    lambda: LavitForConditionalGeneration.from_pretrained("owner/tiny"),
    lambda: LavitVisualTokenizer.from_pretrained("owner/tiny"),
    lambda: LavitPixelDecoderPipeline.from_pretrained("owner/tiny"),
    lambda: publish(sys.argv[1], "owner/tiny"),
):
    try:
        call()
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()))
"""
    *loading, publishing = client(code, tiny_checkpoint, is_owner=False).stdout.splitlines()
    assert len(loading) == 3
    assert all("owner/tiny" in line and "private" in line for line in loading)
    assert publishing.startswith("The Hub does not let you write to owner/tiny: log in with `hf auth login`.")


def test_missing_files(hub: HubServer, client, tiny_checkpoint: Path) -> None:
    left_out = ("model.safetensors", "unet/config.json")
    paths = {
        path.relative_to(tiny_checkpoint).as_posix(): path for path in tiny_checkpoint.rglob("*") if path.is_file()
    }
    hub.add(REPOSITORY, {name: path for name, path in paths.items() if name not in left_out})
    code = """
import lavit_hf
for name in ("LavitForConditionalGeneration", "LavitVisualTokenizer", "LavitPixelDecoderPipeline"):
    try:
        getattr(lavit_hf, name).from_pretrained("owner/tiny")
    except OSError as error:
        print(" ".join(str(error).split()))
"""
    lines = client(code).stdout.splitlines()
    assert len(lines) == 3
    assert all("owner/tiny" in line and "model.safetensors" in line for line in lines[:2])
    assert "config.json" in lines[2] and "unet" in lines[2]


def test_push_to_hub(hub: HubServer, client, tiny_checkpoint: Path) -> None:
    code = """
import os, sys
import lavit_hf
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

path = sys.argv[1]
model = lavit_hf.LavitForConditionalGeneration.from_pretrained(path)
processor = lavit_hf.ImageTextProcessor.from_pretrained(path)
pipeline = lavit_hf.LavitTextToImagePipeline.from_pretrained(path, model=model, processor=processor)
model.push_to_hub("owner/model")
processor.push_to_hub("owner/processor")
model.visual_tokenizer.push_to_hub("owner/visual-tokenizer")
pipeline.pixel_decoder.push_to_hub("owner/pixels")
pipeline.push_to_hub("owner/all")
for folder in ("pixels", "all", "model"):
    os.makedirs(f"out/{folder}")
    open(f"out/{folder}/hf_token.txt", "w").write("x")
pipeline.pixel_decoder.save_pretrained("out/pixels", push_to_hub=True, repo_id="owner/saved-pixels")
pipeline.save_pretrained("out/all", push_to_hub=True, repo_id="owner/saved-all")
model.save_pretrained("out/model", push_to_hub=True, repo_id="owner/saved-model")
processor.save_pretrained("out/processor", push_to_hub=True, repo_id="owner/saved-processor")
processor.image_processor.save_pretrained("out/image-processor", push_to_hub=True, private=True)
found = [AutoModelForImageTextToText.from_pretrained("owner/model"), AutoProcessor.from_pretrained("owner/processor")]
found.append(AutoModel.from_pretrained("owner/visual-tokenizer"))
found.append(AutoImageProcessor.from_pretrained("owner/image-processor"))
found.append(lavit_hf.LavitPixelDecoderPipeline.from_pretrained("owner/pixels"))
found.append(lavit_hf.LavitTextToImagePipeline.from_pretrained("owner/all"))
print(*(type(thing).__module__.partition(".")[0] + "." + type(thing).__name__ for thing in found))
"""
    names = ["LavitForConditionalGeneration", "ImageTextProcessor", "LavitVisualTokenizer", "LavitImageProcessorPil"]
    names += ["LavitPixelDecoderPipeline", "LavitTextToImagePipeline"]
    assert client(code, tiny_checkpoint).stdout.split() == [f"lavit_hf.{name}" for name in names]
    model = {"config.json", "model.safetensors", "configuration_lavit.py", "modeling_lavit.py", "processing_lavit.py"}
    processor = {"processor_config.json", "tokenizer.json", "processing_lavit.py", "modeling_lavit.py"}
    pixels = {"model_index.json", "pipeline_lavit_pixel_decoder.py", "unet/config.json"}
    pixels |= {"token_decoder/model.safetensors", "token_decoder/lavit_token_decoder.py"}
    expected = {
        "model": model,
        "processor": processor,
        "visual-tokenizer": model,
        "pixels": pixels,
        "all": model | processor | pixels,
        "saved-pixels": pixels,
        "saved-all": model | processor | pixels,
        "saved-model": model,
        "saved-processor": processor,
        "image-processor": {"preprocessor_config.json", "image_processing_pil_lavit.py"},
    }
    for name, files in expected.items():
        assert files <= hub.files(f"owner/{name}").keys(), name
        assert len(hub.repositories[f"owner/{name}"].commits) == 2, name
        assert "hf_token.txt" not in hub.files(f"owner/{name}"), name
    assert hub.repositories["owner/image-processor"].private
    config = json.loads(hub.files("owner/visual-tokenizer")["config.json"])
    assert config["auto_map"]["AutoModel"] == "modeling_lavit_visual_tokenizer.LavitVisualTokenizer"


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """What `Trainer` saves of a model of `get_peft_model`."""
    model = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    torch.manual_seed(0)
    adapted = get_peft_model(model, get_lora_config(model, r=4, modules_to_save=None, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    ImageTextProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "adapter")
    torch.save({}, tmp_path / "adapter" / "training_args.bin")
    return tmp_path / "adapter"


def test_the_card_says_what_it_is_and_names_no_path(adapter: Path, tiny_checkpoint: Path) -> None:
    assert str(tiny_checkpoint) in (adapter / "README.md").read_text()  # by PEFT
    with prepare(adapter, "owner/adapter", Origin(base_models=["owner/tiny"])) as publication:
        card = ModelCard(publication.card)
        config = json.loads(publication.files["adapter_config.json"].read_text())
    assert "training_args.bin" not in publication.files and "adapter_model.safetensors" in publication.files
    assert str(tiny_checkpoint.parent) not in str(card)
    assert config["base_model_name_or_path"] == "owner/tiny"
    assert (card.data.base_model, card.data.library_name) == ("owner/tiny", "peft")
    assert card.data.pipeline_tag == "image-text-to-text" and {"lavit", "lora"} <= set(card.data.tags)
    assert "Model Card for Model ID" not in card.text and "More Information Needed" not in card.text
    assert "fine-tuning changed of [owner/tiny](https://huggingface.co/owner/tiny)" in card.text
    assert "| Kind | LORA, of PEFT |" in card.text and "| Rank | 4 |" in card.text
    assert "| Parameters, adapter | " in card.text and "Language model" not in card.text


def test_a_base_that_only_this_machine_has_is_refused(adapter: Path) -> None:
    with pytest.raises(PublishError, match=r"adapter_config\.json names no model on the Hub.*--base-model"):
        publish(adapter, "owner/adapter", dry_run=True)


def test_a_base_on_the_hub_is_known(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "owner/tiny"}))
    (adapter / "README.md").write_text("# Mine\n\nMy words.\n")
    card = publish(adapter, "owner/adapter", dry_run=True).card
    assert 'from_pretrained("owner/tiny", trust' in card and "My words." in card


def test_without_a_processor_that_of_the_base_is_used(adapter: Path) -> None:
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (adapter / name).unlink()
    card = publish(adapter, "owner/adapter", dry_run=True, base_models=["owner/tiny"]).card
    assert 'AutoProcessor.from_pretrained("owner/tiny"' in card
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(PublishError, match=r"has no processor_config\.json"):
        publish(adapter, "owner/adapter", dry_run=True, base_models=["owner/tiny"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", "[]"),
        ("adapter_config.json", '{"peft_type": 1}'),
        ("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": ["a"]}'),
        ("adapter_config.json", '{"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "os"}'),
        ("adapter_config.json", '{"peft_type": "LORA", "target_modules": {"a": "b"}}'),
        ("adapter_model.safetensors", "x"),
    ],
)
def test_malformed_files_are_named(adapter: Path, name: str, content: str) -> None:
    (adapter / name).write_text(content)
    with pytest.raises(PublishError, match=name):
        publish(adapter, "owner/adapter", dry_run=True, base_models=["owner/tiny"])


def test_the_code_of_the_card_runs(hub: HubServer, client, adapter: Path, tiny_checkpoint: Path, tmp_path) -> None:
    with prepare(tiny_checkpoint, "owner/tiny", Origin()) as publication:
        hub.add("owner/tiny", publication.files)
    with prepare(adapter, "owner/adapter", Origin(base_models=["owner/tiny"])) as publication:
        hub.add("owner/adapter", publication.files)
        card = publication.card
    code = card.split("```python\n")[1].partition("```")[0].replace("max_new_tokens=10", "max_new_tokens=4")
    shutil.copyfile(PICTURE, tmp_path / "picture.png")
    printed = client(f"{code}\nimport torch\ntorch.save(output, 'output.pt')").stdout
    assert printed
    base = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = ImageTextProcessor.from_pretrained(tiny_checkpoint)
    inputs = processor(images=str(PICTURE), text="<image>Question: What is this? Answer:", return_tensors="pt")
    expected = PeftModel.from_pretrained(base, adapter).generate(
        **inputs, num_beams=5, length_penalty=0.0, max_new_tokens=4
    )
    assert torch.equal(torch.load(tmp_path / "output.pt"), expected)
