"""Cards are made of what files say, and files may say anything: none of it becomes Markdown, HTML, YAML or code."""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lavit_hf.hub import PublishError, publish
from lavit_hf.hub.card import read_card

EVIL = "a | b\n## c\n---\n<script>alert(1)<script> `x` [y](z) <!-- end of facts --> \ud800\u202e"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that may be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def measured(**values: Any) -> dict[str, Any]:
    return {"value": 0.5, "n": 2, "unit": "samples", "interval": None, "is_share": True, **values}


def write_metrics(folder: Path, name: str = "accuracy", **values: Any) -> None:
    result = {"task": "vqa", "data": "scenes", "split": "test", "metrics": {name: measured()}, **values}
    (folder / "metrics.json").write_text(json.dumps({"checkpoint": "x", "results": [result]}))


def card_of(folder: Path, **options: Any) -> str:
    return publish(folder, "owner/name", dry_run=True, **options).card


def rows_of(card: str) -> list[list[str]]:
    section = card[card.index("## Evaluation") :]
    return [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("place", ["task", "data", "split", "metric", "unit"])
def test_nothing_breaks_out_of_the_table(folder: Path, place: str) -> None:
    values = {place: EVIL} if place in ("task", "data", "split") else {}
    if place == "unit":
        values = {"metrics": {"accuracy": measured(unit=EVIL)}}
    write_metrics(folder, EVIL if place == "metric" else "accuracy", **values)
    card = card_of(folder)
    rows = rows_of(card)
    assert [len(row) for row in rows] == [5, 5, 5]
    assert "&#60;script&#62;" in card and "alert(1)" in card
    text = ModelCard(card).text
    assert not re.search(r"<script|^## c|^---$|`x`|\[y\]\(|\u202e", text, re.MULTILINE)
    assert text.count("<!-- end of facts -->") == 1
    path = folder / "README.md"
    path.write_text(card)
    assert card_of(folder) == card  # the block of facts is still one


def test_metadata_stays_yaml(folder: Path) -> None:
    write_metrics(folder, EVIL, data=EVIL, split=EVIL, task=EVIL)
    data = ModelCard(card_of(folder)).data
    (result,) = data.eval_results
    names = [result.dataset_name, result.dataset_split, result.metric_type, result.task_type]
    assert all("\n" not in name and "<script>" in name for name in names)  # the Hub shows them as text
    assert data.license == "apache-2.0"


@pytest.mark.parametrize("data", ["/home/me/secret/pairs.json", "~/secret/pairs.json", "../secret/pairs.json"])
def test_paths_of_data_become_names(folder: Path, data: str) -> None:
    write_metrics(folder, data=data)
    path = folder / "metrics.json"
    content = json.loads(path.read_text())
    content["checkpoint"] = "/home/me/secret/lavit"
    content["results"][0]["options"] = {"clip": "/home/me/secret/clip"}
    path.write_text(json.dumps(content))
    from lavit_hf.hub.card import Origin
    from lavit_hf.hub.publish import prepare

    with prepare(folder, "owner/name", Origin()) as publication:
        published = json.loads(publication.files["metrics.json"].read_text())
        texts = [publication.card, json.dumps(published)]
    assert not any("secret" in text for text in texts) and rows_of(texts[0])[2][1] == "pairs.json test"
    assert (published["checkpoint"], published["results"][0]["data"]) == ("lavit", "pairs.json")


def test_configurations_name_no_paths(folder: Path) -> None:
    for name, key in (("unet/config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: "/home/me/secret/model"}))
    from lavit_hf.hub.card import Origin
    from lavit_hf.hub.publish import prepare

    with prepare(folder, "owner/name", Origin()) as publication:
        for name in ("unet/config.json", "tokenizer_config.json"):
            assert "secret" not in publication.files[name].read_text()


def test_paths_that_libraries_wrote_into_the_card_go(folder: Path) -> None:
    path = "/home/me/secret/lavit-base"
    (folder / "README.md").write_text(
        f"---\nlicense: mit\nbase_model: {path}\ndatasets:\n- {path}\n- c/d\ntags:\n- base_model:{path}\n- x\n---\n"
        f"# Mine\n\nA fine-tuned version of [{path}](https://huggingface.co/{path}).\n"
    )
    report = publish(folder, "owner/name", dry_run=True)
    data = ModelCard(report.card).data
    assert "secret" not in report.card and "A fine-tuned version of [lavit-base]" in report.card
    assert (data.base_model, data.datasets) == (None, ["c/d"]) and "x" in data.tags
    assert f"Left out of the card: {path}, a path of this machine." in report.hints


def test_variants_are_counted_once(folder: Path) -> None:
    before = card_of(folder)
    for part in ("model", "unet/diffusion_pytorch_model"):
        shutil.copyfile(folder / f"{part}.safetensors", folder / f"{part}.fp16.safetensors")
    assert card_of(folder) == before


def test_the_examples_are_code(folder: Path) -> None:
    facts = card_of(folder).partition("<!-- facts")[2]
    blocks = re.findall(r"```python\n(.*?)```", facts, re.DOTALL)
    assert len(blocks) == 2 and all(ast.parse(block) for block in blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_models": ["/home/me/base"]}, "--base-model '/home/me/base' is no name on the Hub"),
        ({"base_models": ['a/b", x="']}, "--base-model"),
        ({"datasets": ["a/b\n## c"]}, "--dataset"),
        ({"license": "mit\n---\n"}, "--license"),
    ],
)
def test_options_that_are_no_names(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(PublishError, match=re.escape(message)):
        card_of(folder, **options)


def text(name: str, content: str | bytes):
    return name, lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name: str, **values: Any):
    return name, lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def metrics(**values: Any):
    return "metrics.json", lambda path: write_metrics(path.parent, **values)


def measurement(**values: Any):
    return metrics(metrics={"accuracy": measured(**values)})


NESTED = "[" * 100_000

MALFORMED = [
    text("metrics.json", "[]"),
    text("metrics.json", "{"),
    text("metrics.json", b"\xff\xfe"),
    text("metrics.json", NESTED),
    text("metrics.json", '{"results": [1]}'),
    text("metrics.json", '{"results": {"a": 1}}'),
    metrics(task=3),
    metrics(data=None),
    metrics(split=["test"]),
    metrics(metrics=["accuracy"]),
    metrics(metrics={"accuracy": 0.5}),
    measurement(value="0.5"),
    measurement(value=True),
    measurement(value=10**400),
    measurement(value=float("nan")),
    measurement(interval=[0.1]),
    measurement(interval=[0.1, "b"]),
    measurement(interval=0.1),
    measurement(n="many"),
    measurement(unit=None),
    measurement(is_share="yes"),
    text("config.json", "null"),
    text("config.json", '{"model_type": ["lavit"]}'),
    text("config.json", b'{"model_type": "\xff"}'),
    edit("config.json", text_config=5),
    edit("config.json", visual_tokenizer_config={"image_size": "large"}),
    edit("config.json", auto_map=["a"]),
    text("generation_config.json", "[1]"),
    edit("generation_config.json", drawing_guidance_scale='4.0)\nimport os; os.system("x"'),
    edit("generation_config.json", drawing_guidance_scale=[4.0]),
    edit("generation_config.json", drawing_guidance_scale=float("inf")),
    text("processor_config.json", "[]"),
    edit("processor_config.json", image_processor=5),
    text("tokenizer_config.json", '"a"'),
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": [{}]}),
    text("tokenizer.json", b"\x00"),
    text("unet/config.json", "1"),
    text("token_decoder/config.json", "[]"),
    text("model_index.json", "[]"),
    edit("model_index.json", unet=["diffusers"]),
    edit("lowres/model_index.json", vae=[1, 2]),
    edit("model_index.json", **{"../../vae": ["diffusers", "AutoencoderKL"]}),
    text("model.safetensors.index.json", "{}"),
    text("model.safetensors.index.json", '{"weight_map": ["a"]}'),
    text("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
    text("model.safetensors.index.json", '{"weight_map": {"a": "../model.safetensors"}}'),
    text("model.safetensors", b""),
    text("model.safetensors", b"\xff" * 64),
    text("original/layout.json", "[]"),
    edit("original/layout.json", copied={"a": 1}),
    text("README.md", b"---\nlicense: mit\n---\n\xff"),
    text("README.md", "---\n- a\n---\n"),
    text("README.md", "---\nlicense: {a: b}\n---\n"),
    text("README.md", "---\nlicense: 'a | b'\n---\n"),
    text("README.md", "---\ntags: 5\n---\n"),
    text("README.md", "---\ndatasets: [{a: b}]\n---\n"),
    text("README.md", "---\nbase_model: 1.5\n---\n"),
    text("README.md", "---\n1: x\n---\n"),
    text("README.md", "---\nmodel-index: [1]\n---\n"),
    text("README.md", f"---\na: {NESTED}\n---\n"),
    text("README.md", "---\na: !!python/object/apply:os.getcwd []\n---\n"),
]


@pytest.mark.parametrize(("name", "damage"), MALFORMED, ids=[f"{i}-{one[0]}" for i, one in enumerate(MALFORMED)])
def test_malformed_files_are_named(folder: Path, name: str, damage: Any) -> None:
    damage(folder / name)
    with pytest.raises(PublishError) as error:
        publish(folder, "owner/name", dry_run=True)
    assert name in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["license", "tags", "datasets", "base_model"])
def test_metadata_that_are_no_text_are_refused(folder: Path, name: str) -> None:
    (folder / "README.md").write_text(f"---\n{name}: [lavit, 7]\n---\n# Mine\n")
    message = rf"README\.md: {name} in the metadata at its top is \['lavit', 7\], which is no text"
    with pytest.raises(PublishError, match=message):
        read_card(folder)
