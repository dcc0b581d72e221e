"""Publishing to a Hub, and what others get from it; every client is a process of its own with an empty cache."""

import json
from pathlib import Path

import pytest
import torch

import lavit_hf
import standalone
from hub.hub_server import HubServer
from lavit_hf.hub.card import Origin
from lavit_hf.hub.publish import prepare
from lavit_hf.remote_code import PIPELINE_MODULE, code_files, pipeline_code
from standalone import compute

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
    code = code.replace("top_k=50", "top_k=5, max_new_tokens=9").replace("1] :])", "1] :], num_inference_steps=2)")
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
    assert (tmp_path / "chair.png").is_file()


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
    hub.add(REPOSITORY, {"notes.txt": tiny_checkpoint / "NOTICE", **{f.name: f for f in sharded.iterdir()}})
    old = {name for name in hub.files(REPOSITORY) if name.startswith("model-") or name.endswith(".index.json")}
    assert len(old) > 2
    code = f"import sys, lavit_hf.hub; print(*lavit_hf.hub.publish(sys.argv[1], {REPOSITORY!r}).removed)"
    assert set(client(code, tiny_checkpoint).stdout.split()) == old
    files = hub.files(REPOSITORY)
    assert not old & files.keys() and {"model.safetensors", "notes.txt"} <= files.keys()


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
