"""The plan at full size, and the table of names behind it."""

import json
from pathlib import Path

import pytest

from lavit_hf.conversion import ConversionError, names, plan

MANIFEST = Path(__file__).parents[1] / "data/published-7b-manifest.json"


def _changed(tmp_path: Path, change) -> Path:
    content = json.loads(MANIFEST.read_text())
    change({file.partition(".")[0]: entry["tensors"] for file, entry in content["files"].items()})
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(content))
    return path


def test_published_checkpoint_has_no_gap():
    published = json.loads(MANIFEST.read_text())["files"]
    full = plan(MANIFEST)
    assert len({(tensor.file, tensor.name) for tensor in full.tensors}) == sum(
        len(f["tensors"]) for f in published.values()
    )
    aside = {(tensor.file, tensor.name) for tensor in full.tensors if tensor.model is None}
    unused = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    assert aside == {("visual_tokenizer/eva_vitg_psz14", name) for name in unused}
    assert full.models["token_decoder"] == (288, 414_526_592)
    text = str(full)
    assert "1,012,588,928 parameters, 4 kept aside" in text and "6,872,649,728" in text


def test_tensor_without_a_place(tmp_path):
    path = _changed(
        tmp_path, lambda files: files["visual_tokenizer/eva_vitg_psz14"].update({"blocks.0.gamma": [1408]})
    )
    with pytest.raises(ConversionError, match=r"unexpected blocks.0.gamma \[1408\]"):
        plan(path)


def test_place_without_a_tensor(tmp_path):
    path = _changed(tmp_path, lambda files: files["visual_tokenizer/tokenizer_decoder"].pop("unet_proj.bias"))
    with pytest.raises(ConversionError, match=r"tokenizer_decoder: missing unet_proj.bias \[768\]"):
        plan(path)


def test_wrong_shape(tmp_path):
    change = lambda files: files["language_model/visual_weight"].update({"vit_proj.bias": [4095]})  # noqa: E731
    with pytest.raises(ConversionError, match=r"vit_proj.bias has shape \[4095\], expected \[4096\]"):
        plan(_changed(tmp_path, change))


@pytest.mark.parametrize(
    ("file", "left_out", "message"),
    [
        (
            "visual_tokenizer/tokenizer_encoder",
            "causal_encoder.blocks.",
            "has no tensors named causal_encoder.blocks.*",
        ),
        ("language_model/pytorch_model*", "model.embed_tokens.", ": missing\n  model.embed_tokens.weight"),
    ],
)
def test_sizes_that_cannot_be_told(tmp_path, file, left_out, message):
    def change(files):
        for name in [name for name in files[file] if name.startswith(left_out)]:
            del files[file][name]

    with pytest.raises(ConversionError) as caught:
        plan(_changed(tmp_path, change))
    assert message in str(caught.value)


def test_files_that_are_not_listed(tmp_path):
    content = json.loads(MANIFEST.read_text())
    kept = {file: entry for file, entry in content["files"].items() if "tokenizer_encoder" not in file}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"files": kept}))
    with pytest.raises(ConversionError, match=r"manifest\.json does not list:\s+visual_tokenizer/tokenizer_encoder"):
        plan(path)


def test_heads_can_be_given():
    with pytest.raises(ConversionError, match="not a multiple"):
        plan(MANIFEST, heads="vision=15")


def test_manifest_that_is_none(tmp_path):
    path = tmp_path / "manifest.json"
    for content in (
        "{",
        "[]",
        "{}",
        '{"files": {"a.bin": {"tensors": {}}}}',
        '{"files": {"a.bin": 1}}',
        '{"files": {}}',
    ):
        path.write_text(content)
        with pytest.raises(ConversionError, match=r"manifest\.json"):
            plan(path)


def test_table_reads_the_same_in_both_directions():
    for tensor in plan(MANIFEST).tensors:
        if tensor.model is not None:
            back = [(origin.file, origin.name) for origin in names.origins_of(tensor.model, tensor.target)]
            assert (tensor.file, tensor.name) in back
