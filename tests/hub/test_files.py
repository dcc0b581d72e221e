"""Which files of a directory are published: what a checkpoint consists of, and what its owner asks for."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from lavit_hf.hub import PublishError, export_llama, publish

# What has lain beside checkpoints, and must not become public because somebody published these.
PRIVATE = [
    "hf_token.txt",
    "id_rsa",
    "credentials.json",
    "private_data.csv",
    "trainer_state.json",
    "training_args.bin",
    "wandb/run-1/files/config.yaml",
    "runs/events.out.tfevents.1",
    "checkpoint-10/model.safetensors",
    "checkpoint-10/config.json",
    "model.PKL",
    "optimizer.PT",
    "optimizer.safetensors",
    "scaler.joblib",
    "state.dill",
    "weights.pth.tar",
    "unet/weights.ckpt",
    "unet/notes.txt",
    "original/private.json",
    "original/language_model/training.json",
    "evaluation/vqa/predictions.jsonl",
    "LICENSE-KEY.pem",
    "license_key.txt",
    "train.py",
    "__pycache__/x.cpython-311.pyc",
    ".git/config",
    ".env",
]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that may be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def add(folder: Path, *names: str, content: bytes = b"0") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def dry_run(folder: Path, **options):
    return publish(folder, "owner/name", dry_run=True, **options)


def test_what_is_no_part_of_a_checkpoint_stays_at_home(folder: Path) -> None:
    published = dry_run(folder).sizes.keys()
    add(folder, *PRIVATE)
    report = dry_run(folder)
    assert report.sizes.keys() == published
    folders = {".git/config": ".git/", "__pycache__/x.cpython-311.pyc": "__pycache__/"}
    assert report.left_out.keys() == {folders.get(name, name) for name in PRIVATE}
    assert "--include " in report.left_out["private_data.csv"]
    assert "--include-evaluation" in report.left_out["evaluation/vqa/predictions.jsonl"]
    never = {name for name, reason in report.left_out.items() if "never published" in reason}
    assert {"hf_token.txt", "id_rsa", "credentials.json", "model.PKL", "weights.pth.tar", "license_key.txt"} <= never


def test_all_parts_of_a_checkpoint_are_published(folder: Path) -> None:
    names = ["LICENSE", "LICENSE-2.0.txt", "USE_POLICY.md", "unet/LICENSE", "vocab.json", "merges.txt"]
    names += ["metrics.json", "additional_chat_templates/short.jinja", "model.fp16.safetensors"]
    add(folder, *names)
    for name in ("vocab.json", "metrics.json"):
        (folder / name).write_text('{"results": []}')
    shutil.copyfile(folder / "model.safetensors", folder / "model.fp16.safetensors")
    sizes = dry_run(folder).sizes
    assert set(names) <= sizes.keys()
    assert {
        "original/layout.json",
        "original/unused.safetensors",
        "original/language_model/config.json",
    } <= sizes.keys()


def test_code_that_a_configuration_names_is_published_with_what_it_imports(folder: Path) -> None:
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config |= {"processor_class": "Mine", "auto_map": {"AutoProcessor": "my_processing.Mine"}}
    path.write_text(json.dumps(config))
    with pytest.raises(PublishError, match=r"my_processing\.py \(auto_map\), which is not there"):
        dry_run(folder)
    add(folder, "my_processing.py", content=b"from .my_tools import tool\n")
    add(folder, "my_tools.py", "my_secrets.py")
    sizes = dry_run(folder).sizes
    assert {"my_processing.py", "my_tools.py"} <= sizes.keys() and "my_secrets.py" not in sizes


def test_only_pixel_decoders_that_an_index_names_are_published(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    report = dry_run(folder)
    assert not any(name.startswith(("unet/", "vae/")) for name in report.sizes)
    assert "lowres/unet/config.json" in report.sizes and "unet/config.json" in report.left_out


def test_a_pixel_decoder_without_a_part_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "lowres" / "vae")
    with pytest.raises(PublishError, match=r"lowres/model_index\.json names vae, but lowres/vae is not there"):
        dry_run(folder)


@pytest.mark.parametrize("file", ["lowres/token_decoder/config.json", "scheduler/scheduler_config.json"])
def test_a_part_of_a_pixel_decoder_without_its_configuration_is_refused(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(
        PublishError,
        match=f"{(folder / file).parent} has no configuration|names scheduler, but scheduler is not there",
    ):
        dry_run(folder)


def test_other_files_are_published_where_they_are_asked_for(folder: Path) -> None:
    add(folder, "docs/a.md", "docs/b/c.md", "docs/d.pkl", "private_data.csv", "train.py")
    report = dry_run(folder, include=["docs", "*.csv"])
    assert {"docs/a.md", "docs/b/c.md", "private_data.csv"} <= report.sizes.keys()
    assert report.left_out.keys() == {"docs/d.pkl", "train.py"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.PKL", b"0", "a pickle"),
        ("a.joblib.gz", b"0", "a pickle"),
        ("renamed.dat", pickle.dumps({}), "a pickle"),
        ("id_ed25519", b"0", "a key"),
        ("service-credentials.json", b"{}", "a key"),
        ("notes.txt", b"-----BEGIN OPENSSH PRIVATE KEY-----", "looks like a key"),
        ("notes.txt", b"token: hf_" + b"a1" * 17, "looks like a key or a token"),
        (".env", b"0", "hidden"),
    ],
)
def test_even_then_never_pickles_and_secrets(folder: Path, name: str, content: bytes, reason: str) -> None:
    add(folder, name, content=content)
    with pytest.raises(PublishError, match=f"{name} is not published, even with --include.*{reason}"):
        dry_run(folder, include=[name])


def test_a_pickle_of_torch_is_one_under_any_name(folder: Path) -> None:
    torch.save({}, folder / "weights.data")
    with pytest.raises(PublishError, match="a pickle"):
        dry_run(folder, include=["weights.data"])


def test_an_archive_that_cannot_be_searched_is_refused(folder: Path) -> None:
    with zipfile.ZipFile(folder / "broken.data", "w") as archive:
        archive.writestr("a", "1")
        archive.writestr("b.pkl", "2")
    content = (folder / "broken.data").read_bytes()
    last = content.rindex(b"PK\1\2")  # where the directory of the archive tells of the pickle
    (folder / "broken.data").write_bytes(content[:last] + b"PK\0\0" + content[last + 4 :])
    with pytest.raises(PublishError, match=r"broken\.data cannot be read: Bad magic number"):
        dry_run(folder, include=["broken.data"])


def test_included_files_may_hold_anything(folder: Path) -> None:
    for name, content in {"rows.json": "[1]", "docs/config.json": "[", "own.safetensors": "x" * 9}.items():
        add(folder, name, content=content.encode())
    assert {"rows.json", "docs/config.json"} <= dry_run(folder, include=["*.json"]).sizes.keys()
    with pytest.raises(PublishError, match=r"own\.safetensors is not a readable safetensors file"):
        dry_run(folder, include=["own.safetensors"])


def test_indices_of_the_original_tell_of_shards_that_are_gone(folder: Path) -> None:
    """Regression: a checkpoint that was converted from sharded safetensors could not be published."""
    name = "original/language_model/model.safetensors.index.json"
    (folder / name).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    path = folder / "original" / "layout.json"
    layout = json.loads(path.read_text())
    layout["copied"]["language_model/model.safetensors.index.json"] = name
    path.write_text(json.dumps(layout))
    assert name in dry_run(folder).sizes


def test_a_pattern_that_matches_nothing_is_an_error(folder: Path) -> None:
    with pytest.raises(PublishError, match=r"nothing that --include docs/\*\.md matches"):
        dry_run(folder, include=["docs/*.md"])


def test_a_token_in_a_file_of_the_checkpoint_is_found(folder: Path) -> None:
    with open(folder / "README.md", "a") as file:
        file.write("\nLog in with hf_" + "aB" * 17)
    with pytest.raises(PublishError, match=r"README\.md is part of the checkpoint, but it holds .* token"):
        dry_run(folder)


class TestLinks:
    """Links out of the directory would publish what is elsewhere."""

    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        path = tmp_path / "shadow"
        path.write_text("root:x")
        return path

    def test_parts_of_the_checkpoint_are_refused(self, folder: Path, secret: Path) -> None:
        (folder / "LICENSE").symlink_to(secret)
        with pytest.raises(PublishError, match="LICENSE is part of the checkpoint, but a link that leads out"):
            dry_run(folder)
        with pytest.raises(PublishError, match="LICENSE is part of the checkpoint, but a link that leads out"):
            export_llama(folder, folder.parent / "llama", progress=False)
        assert not (folder.parent / "llama").exists()

    def test_others_are_left_out(self, folder: Path, secret: Path) -> None:
        (folder / "notes.txt").symlink_to(secret)
        (folder / "docs").symlink_to(secret.parent, target_is_directory=True)
        (folder / "gone.txt").symlink_to(folder / "nowhere")
        report = dry_run(folder)
        assert report.left_out.keys() == {"notes.txt", "docs", "gone.txt"}
        assert all("a link" in reason for reason in report.left_out.values())
        with pytest.raises(PublishError, match="leads out of the directory"):
            dry_run(folder, include=["notes.txt"])
        with pytest.raises(PublishError, match="a link to a directory"):
            dry_run(folder, include=["docs"])

    def test_a_linked_folder_of_the_pixel_decoder_is_an_error(self, folder: Path) -> None:
        shutil.move(folder / "unet", folder.parent / "unet")
        (folder / "unet").symlink_to(folder.parent / "unet", target_is_directory=True)
        with pytest.raises(PublishError, match="names unet, but unet is not there"):
            dry_run(folder)

    def test_inside_the_directory_they_are_files(self, folder: Path) -> None:
        shutil.move(folder / "NOTICE", folder / "original" / "NOTICE")
        (folder / "NOTICE").symlink_to(Path("original") / "NOTICE")
        assert "NOTICE" in dry_run(folder).sizes

    def test_the_cache_of_the_hub_is_made_of_them(self, folder: Path, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
            shutil.copyfile(path, blobs / str(number))
            target = snapshot / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(blobs / str(number))
        assert dry_run(snapshot).sizes == dry_run(folder).sizes


class TestEvaluation:
    """Pictures and predictions show the data."""

    NAMES = ["predictions.jsonl", "samples.html", "samples.png", "pictures/00.png", "settings.json", "metrics.json"]

    @pytest.fixture
    def evaluated(self, folder: Path) -> Path:
        add(folder, *(f"evaluation/text-to-image/test/{name}" for name in self.NAMES), "evaluation/mine.txt")
        for name in ("settings.json", "metrics.json"):
            path = folder / "evaluation" / "text-to-image" / "test" / name
            path.write_text(json.dumps({"options": {"clip": "/home/me/clip"}, "results": []}))
        (folder / "evaluation" / "metrics.json").write_text('{"checkpoint": "/home/me/lavit", "results": []}')
        return folder

    def test_stay_at_home(self, evaluated: Path) -> None:
        report = dry_run(evaluated)
        assert [name for name in report.sizes if name.startswith("evaluation")] == ["evaluation/metrics.json"]

    def test_are_published_where_they_are_asked_for(self, evaluated: Path) -> None:
        report = dry_run(evaluated, include_evaluation=True)
        assert {f"evaluation/text-to-image/test/{name}" for name in self.NAMES} <= report.sizes.keys()
        assert report.left_out.keys() == {"evaluation/mine.txt"}


def test_what_is_published_loads(folder: Path, tmp_path: Path) -> None:
    from lavit_hf.hub.card import Origin
    from lavit_hf.hub.publish import prepare

    add(folder, *PRIVATE)
    with prepare(folder, "owner/name", Origin()) as publication:
        for name, path in publication.files.items():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / "copy" / name)
    assert type(AutoProcessor.from_pretrained(tmp_path / "copy")).__name__ == "ImageTextProcessor"
