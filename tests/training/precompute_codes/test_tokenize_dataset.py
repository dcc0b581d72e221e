"""Datasets to codes: exact, whoever works on them, and whatever interrupts it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoProcessor

from lavit_hf import ImageTextProcessor, LavitVisualTokenizer
from lavit_hf.data.scenes import make_scenes, stream_scenes
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.precompute_codes.directory import TokenizedDirectory, read_metadata
from lavit_hf.training.precompute_codes.tokenize_dataset import load_tokenized_dataset, tokenize_dataset
from lavit_hf.utils.atomic_files import write_json
from lavit_hf.utils.claims import Claims

CHECKPOINT = Path(__file__).resolve().parents[3] / "checkpoints" / "lavit-tiny-random"
NUM_SCENES = 22
SCENES = make_scenes(num_scenes=NUM_SCENES)


@pytest.fixture(scope="module")
def processor() -> ImageTextProcessor:
    visual_tokenizer = LavitVisualTokenizer.from_pretrained(CHECKPOINT)
    return AutoProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=visual_tokenizer)


@pytest.fixture(scope="module")
def tokenized(processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes, tokenized in shards of 5. Do not write into it."""
    path = tmp_path_factory.mktemp("tokenized") / "scenes"
    tokenize_dataset(SCENES, path, processor, shard_size=5, progress=False)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` stores what it reads; not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenize(dataset, path: Path, processor, **options):
    return tokenize_dataset(dataset, path, processor, **{"shard_size": 5, "progress": False, **options})


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "data").iterdir()}


def test_rows_are_what_the_processor_gives(tokenized: Path, processor) -> None:
    rows = load_tokenized_dataset(tokenized, processor.visual_tokenizer)
    assert rows.column_names == ["codes", "text", "length", "sample_id"]
    assert rows["sample_id"] == list(range(NUM_SCENES)) and rows["text"] == SCENES["text"]
    for row, scene in zip(rows, SCENES, strict=True):
        (ids,) = processor.tokenize_images(scene["image"])
        assert row["codes"] == [processor.tokenizer.convert_ids_to_codes(ids[1:-1]).tolist()]
        whole = processor(images=scene["image"], text="<image>" + row["text"], visual_mode="discrete")
        assert row["length"] == len(whole["input_ids"][0])
    assert len({len(row["codes"][0]) for row in rows}) > 1


def test_budgets(processor, tmp_path: Path) -> None:
    few = SCENES.select(range(4))
    assert tokenize(few, tmp_path / "out", processor, num_image_tokens=5).num_codes == 20
    for row, scene in zip(load_tokenized_dataset(tmp_path / "out"), few, strict=True):
        (ids,) = processor.tokenize_images(scene["image"], num_image_tokens=5)
        assert row["codes"] == [processor.tokenizer.convert_ids_to_codes(ids[1:-1]).tolist()]


def test_another_selection_is_another_checkpoint(tokenized: Path) -> None:
    other = LavitVisualTokenizer.from_pretrained(CHECKPOINT)
    other.config.selection = "argmax" if other.config.selection == "expected" else "expected"
    with pytest.raises(ValueError, match="with other options .*selection: "):
        tokenize(SCENES, tokenized, AutoProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=other))


def test_report_and_metadata(tokenized: Path, processor) -> None:
    report = tokenize(SCENES, tokenized, processor)  # finished already
    codes = [codes for row in load_tokenized_dataset(tokenized) for codes in row["codes"]]
    assert (report.num_samples, report.num_rows, report.num_images) == (NUM_SCENES,) * 3
    assert report.num_codes == sum(map(len, codes)) and report.bad_samples == []
    metadata = read_metadata(tokenized)
    assert metadata["checkpoint"] == str(CHECKPOINT)
    assert len(metadata["codebook_fingerprint"]) == 64
    assert sorted(path.name for path in tokenized.iterdir()) == [
        "README.md",
        "data",
        "dataset_info.json",
        "state.json",
        "tokenization.json",
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_does_not_matter(batch_size: int, tokenized: Path, processor, tmp_path: Path) -> None:
    tokenize(SCENES, tmp_path / "out", processor, batch_size=batch_size, num_threads=1)
    assert files(tmp_path / "out") == files(tokenized)


def test_streams_give_the_same(tokenized: Path, processor, tmp_path: Path) -> None:
    tokenize(stream_scenes(num_scenes=NUM_SCENES), tmp_path / "out", processor)
    assert files(tmp_path / "out") == files(tokenized)


def test_streams_of_several_files(tokenized: Path, processor, tmp_path: Path) -> None:
    tokenize(stream_scenes(num_scenes=NUM_SCENES, num_shards=3), tmp_path / "out", processor)
    rows = load_tokenized_dataset(tmp_path / "out")
    assert rows["sample_id"] == sorted(rows["sample_id"])
    order = [index for first in range(3) for index in range(first, NUM_SCENES, 3)]
    assert rows["codes"] == load_tokenized_dataset(tokenized).select(order)["codes"]
    assert rows["sample_id"] == [index % 3 * 2**32 + index // 3 for index in order]


def test_saved_datasets_tell_themselves_apart(tokenized: Path, processor, tmp_path: Path) -> None:
    tokenize(SCENES.select(range(9)), tmp_path / "out", processor)
    fingerprints = {datasets.load_from_disk(str(path))._fingerprint for path in (tokenized, tmp_path / "out")}
    assert len(fingerprints) == 2


def test_webdataset(tokenized: Path, processor, tmp_path: Path) -> None:
    for name in ("out", "again"):
        tokenize(SCENES, tmp_path / name, processor, output_format="webdataset")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    rows = load_tokenized_dataset(tmp_path / "out", processor.visual_tokenizer)
    assert list(rows) == list(load_tokenized_dataset(tokenized))
    stream = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True)
    assert [row["json"]["codes"] for row in stream] == rows["codes"]


def test_training_reads_codes(tokenized: Path) -> None:
    training = TrainingDataset(load_tokenized_dataset(tokenized))
    sample = training[7]
    assert sample["codes"] == load_tokenized_dataset(tokenized)[7]["codes"]
    assert (sample["sample_id"], sample["text"]) == (7, SCENES[7]["text"])


def damaged_scenes() -> datasets.Dataset:
    rows = list(SCENES.cast_column("image", datasets.Image(decode=False)).select_columns(["image", "text"]))
    rows[2]["image"] = {"bytes": rows[2]["image"]["bytes"][:200], "path": None}
    rows[6]["text"] = "  "
    rows[7]["text"] = None
    rows[8]["image"] = None
    for index in range(10, 15):  # a whole shard
        rows[index]["image"] = {"bytes": b"no picture", "path": None}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def test_bad_samples_are_reported_and_left_out(tokenized: Path, processor, tmp_path: Path) -> None:
    report = tokenize(damaged_scenes(), tmp_path / "out", processor)
    bad = dict(report.bad_samples)
    assert sorted(bad) == [2, 6, 7, *range(10, 15)]
    assert "truncated or corrupt" in bad[2] and "empty" in bad[6] and "missing" in bad[7] and "bytes" in bad[10]
    assert read_metadata(tmp_path / "out")["bad_samples"] == [list(pair) for pair in report.bad_samples]
    assert (report.num_samples, report.num_rows) == (NUM_SCENES, NUM_SCENES - 8)
    rows = load_tokenized_dataset(tmp_path / "out")
    assert rows["sample_id"] == [index for index in range(NUM_SCENES) if index not in bad]
    text_only = rows[rows["sample_id"].index(8)]
    assert text_only["codes"] == [] and text_only["text"] == SCENES[8]["text"]
    good = load_tokenized_dataset(tokenized).select([0, 1, 3])
    assert rows[:3] == good[:]


def test_bad_samples_stop_if_wanted(processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Sample 2 of the dataset is bad: .*corrupt"):
        tokenize(damaged_scenes(), tmp_path / "out", processor, on_bad_sample="raise")
    with pytest.raises(ValueError, match="incomplete"):
        load_tokenized_dataset(tmp_path / "out")


_CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a ring"}]


@pytest.mark.parametrize("output_format", ["arrow", "webdataset"])
def test_nulls_integers_and_half_characters(output_format: str, processor, tmp_path: Path) -> None:
    good = {"image": SCENES[0]["image"], "text": "a", "prompt": "b", "messages": _CHAT, "name": "c", "number": 1}
    harmless = [{name: None} for name in ("prompt", "messages", "name", "number")] + [{"messages": []}]
    bad = [
        {"text": 5},
        {"text": "\ud83d"},
        {"prompt": 5},
        {"prompt": "\ud83d"},
        {"messages": 0},
        {"messages": [None]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        {"image": 5},
        {"image": "data:image/png;base64,AAA"},
        {"name": 5},
        {"name": ["c"]},
        {"name": "\ud83d"},
        {"number": "one"},
        {"number": 1.5},
        {"number": 2**70},
    ]
    rows = [{**good, **change} for change in [{}, *harmless, *bad]]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    options = {"keep_columns": ["name", "number"], "output_format": output_format}
    report = tokenize(stream, tmp_path / "out", processor, **options)
    first_bad = 1 + len(harmless)
    assert [index for index, _ in report.bad_samples] == list(range(first_bad, len(rows)))
    kept = load_tokenized_dataset(tmp_path / "out")
    for row, written in zip(rows, kept, strict=False):
        found = {name: written[name] for name in ("text", "prompt", "name", "number")}
        assert found == {name: row[name] for name in found}
        assert (written["messages"] or None) == (row["messages"] or None)
    assert len(kept) == first_bad


def test_nothing_but_bad_samples(processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="None of the 3 samples can be used; the first one: .*bytes"):
        tokenize(damaged_scenes().select(range(10, 13)), tmp_path / "out", processor)


def test_several_images_prompts_and_other_columns(processor, tmp_path: Path) -> None:
    pictures = [scene["image"] for scene in SCENES.select(range(3))]
    rows = [
        {"images": pictures[:2], "prompt": "Compare <image> and <image>.", "text": "Same.", "license": "CC0"},
        {"images": pictures[2:], "prompt": None, "text": "A scene.", "license": "MIT"},
        {"images": [], "prompt": None, "text": "No image.", "license": None},
    ]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            **{n: datasets.Value("string") for n in ("prompt", "text", "license")},
        }
    )
    dataset = datasets.Dataset.from_list(rows, features=features)
    report = tokenize(dataset, tmp_path / "out", processor, image_column="images", keep_columns=["license"])
    found = list(load_tokenized_dataset(tmp_path / "out"))
    assert report.num_images == 3 and [len(row["codes"]) for row in found] == [2, 1, 0]
    assert [row["license"] for row in found] == ["CC0", "MIT", None]
    assert found[0]["prompt"] == rows[0]["prompt"] and found[1]["prompt"] is None
    ids = processor(images=pictures[:2], text="Compare <image> and <image>.", visual_mode="discrete")["input_ids"][0]
    assert found[0]["length"] == len(ids) + len(processor.tokenizer("Same.")["input_ids"])
    assert list(TrainingDataset(load_tokenized_dataset(tmp_path / "out"))[0]) >= ["codes", "text"]


def test_chats(processor, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is <image>?"}, {"role": "assistant", "content": "A scene."}]
    dataset = SCENES.select(range(2)).select_columns("image").add_column("messages", [messages] * 2)
    tokenize(dataset, tmp_path / "out", processor, text_column=None)
    for row in load_tokenized_dataset(tmp_path / "out"):
        assert row["messages"] == messages
        words = processor.tokenizer(["What is ", "?", "A scene."])["input_ids"]
        assert row["length"] == len(row["codes"][0]) + 2 + sum(map(len, words))


def test_images_without_text_and_with_ids_of_their_own(tokenized: Path, processor, tmp_path: Path) -> None:
    dataset = SCENES.select(range(4)).add_column("sample_id", [40, 30, 20, 10])
    tokenize(dataset, tmp_path / "out", processor, text_column=None)
    rows = load_tokenized_dataset(tmp_path / "out")
    assert rows.column_names == ["codes", "length", "sample_id"]
    assert rows["sample_id"] == [40, 30, 20, 10]
    assert rows["codes"] == load_tokenized_dataset(tokenized)["codes"][:4]


def test_paths_of_images(tokenized: Path, processor, tmp_path: Path) -> None:
    SCENES[0]["image"].save(tmp_path / "0.png")
    rows = [{"image": "0.png", "text": "relative"}, {"image": str(tmp_path / "0.png"), "text": "absolute"}]
    report = tokenize(datasets.Dataset.from_list(rows), tmp_path / "out", processor, image_root=tmp_path)
    assert report.bad_samples == []
    expected = load_tokenized_dataset(tokenized)["codes"][0]
    assert load_tokenized_dataset(tmp_path / "out")["codes"] == [expected, expected]


def test_own_transforms(processor, tokenized: Path, tmp_path: Path) -> None:
    def mirror(rows: dict) -> dict:
        images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in rows["image"]]
        return {"image": images, "text": rows["text"]}

    mirrored = SCENES.select(range(6)).with_transform(mirror)
    tokenize(mirrored, tmp_path / "out", processor)
    rows = load_tokenized_dataset(tmp_path / "out")
    (ids,) = processor.tokenize_images(mirrored[5]["image"])
    assert rows["codes"][5] == [processor.tokenizer.convert_ids_to_codes(ids[1:-1]).tolist()]
    assert rows["codes"] != load_tokenized_dataset(tokenized)["codes"][:6]


def test_model_is_left_in_the_mode_it_was_in(processor, tmp_path: Path) -> None:
    processor.visual_tokenizer.train()
    tokenize(SCENES.select(range(2)), tmp_path / "out", processor)
    assert processor.visual_tokenizer.training
    processor.visual_tokenizer.eval()


# Interrupted and continued


def script(dataset: str, path: Path, before: str = "") -> str:
    return f"""
import os, signal
from transformers import AutoProcessor
from lavit_hf import LavitVisualTokenizer
from lavit_hf.data.scenes import make_scenes, stream_scenes
from lavit_hf.training.precompute_codes.tokenize_dataset import tokenize_dataset
{before}
visual_tokenizer = LavitVisualTokenizer.from_pretrained({str(CHECKPOINT)!r})
processor = AutoProcessor.from_pretrained({str(CHECKPOINT)!r}, visual_tokenizer=visual_tokenizer)
tokenize_dataset({dataset}, {str(path)!r}, processor, shard_size=5, progress=False)
"""


# Dies while the third shard's file has its content, but not yet its name.
DIE = """
replace = os.replace
def die(source, destination):
    if "000002.arrow" in str(destination):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, destination)
os.replace = die
"""


def test_killed_and_continued(python: str, tokenized: Path, processor, tmp_path: Path) -> None:
    path = tmp_path / "out"
    code = script(f"make_scenes(num_scenes={NUM_SCENES})", path, DIE)
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = files(path)
    assert len([name for name in left if name.endswith(".partial")]) == 1
    finished = {name: content for name, content in left.items() if not name.endswith(".partial")}
    assert sorted(finished) == ["00000-000000.arrow", "00000-000001.arrow"]
    with pytest.raises(ValueError, match="incomplete; run `lavit tokenize` again"):
        load_tokenized_dataset(path)
    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(str(path))
    ages = {name: (path / "data" / name).stat().st_mtime_ns for name in finished}
    tokenize(SCENES, path, processor)
    assert files(path) == files(tokenized)
    assert {name: (path / "data" / name).stat().st_mtime_ns for name in finished} == ages
    for name in ("state.json", "dataset_info.json", "README.md", "tokenization.json"):
        assert (path / name).read_text() == (tokenized / name).read_text()


# Says what is finished by whom.
TELL = """
from lavit_hf.training.precompute_codes.directory import TokenizedDirectory
finish = TokenizedDirectory.finish
def tell(self, shard, *args):
    finish(self, shard, *args)
    print(shard.name, flush=True)
TokenizedDirectory.finish = tell
"""


@pytest.mark.parametrize("data", [f"make_scenes(num_scenes={NUM_SCENES})", f"stream_scenes(num_scenes={NUM_SCENES})"])
def test_workers_that_know_nothing_of_one_another(data: str, python: str, tokenized: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    codes = [script(data, path, TELL), script(data, path, TELL), script(data, path, TELL + DIE)]
    workers = [subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True) for code in codes]
    told = [worker.communicate()[0].split() for worker in workers]
    # The third dies in one shard, if it gets there first.
    assert [worker.returncode for worker in workers] in ([0, 0, 0], [0, 0, -signal.SIGKILL])
    assert sorted(name for names in told for name in names) == [f"00000-{chunk:06d}" for chunk in range(5)]
    assert files(path) == files(tokenized) and not (path / "progress").exists()


def test_what_a_dead_worker_had_claimed_is_made_by_another(
    processor, tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another machine, for which its successor has to wait."""
    path = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("lavit_hf.training.precompute_codes.rows.RowTokenizer.tokenize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tokenize(SCENES, path, processor)
    claims = path / "progress" / "claims"
    assert list(claims.iterdir()) == [], "an interrupted one gives back what it has"
    (claims / "00000-000001.0").write_text("elsewhere")
    monkeypatch.setattr("lavit_hf.training.precompute_codes.tokenize_dataset._POLL", 0.05)
    monkeypatch.setattr(Claims.__init__, "__defaults__", (0.2,))
    finished, finish = [], TokenizedDirectory.finish

    def tell(self, shard, *args):
        finished.append(shard.chunk)
        finish(self, shard, *args)

    monkeypatch.setattr(TokenizedDirectory, "finish", tell)
    tokenize(SCENES, path, processor)
    assert finished == [0, 2, 3, 4, 1] and files(path) == files(tokenized)


def interrupt(*args, **options) -> None:
    raise KeyboardInterrupt


class Stop(Exception):
    pass


@pytest.mark.parametrize("num_shards", [1, 3])
def test_streams_are_continued(num_shards: int, processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream():
        return stream_scenes(num_scenes=NUM_SCENES, num_shards=num_shards)

    tokenize(stream(), tmp_path / "whole", processor)
    encode, batches = processor.visual_tokenizer.encode, []

    def stop_at_the_third(pixel_values: torch.Tensor, **options):
        batches.append(len(pixel_values))
        if len(batches) == 3:
            raise Stop
        return encode(pixel_values, **options)

    monkeypatch.setattr(processor.visual_tokenizer, "encode", stop_at_the_third)
    with pytest.raises(Stop):
        tokenize(stream(), tmp_path / "out", processor)
    tokenize(stream(), tmp_path / "out", processor)
    assert sum(batches) == NUM_SCENES + batches[2]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    tokenize(stream(), tmp_path / "out", processor)
    assert sum(batches) == NUM_SCENES + batches[2]


def test_other_data_or_options_are_refused(tokenized: Path, processor) -> None:
    before = files(tokenized)
    for dataset, options, named in (
        (SCENES.select(range(21)), {}, "data: "),
        (make_scenes(num_scenes=NUM_SCENES, seed=1), {}, "data: "),
        (SCENES, {"shard_size": 6}, "shard_size: 5 there, 6 now"),
        (SCENES, {"output_format": "webdataset"}, "output_format: arrow there, webdataset now"),
        (SCENES, {"text_column": None}, "text_column: text there, None now"),
        (SCENES, {"on_bad_sample": "raise"}, "on_bad_sample"),
        (SCENES, {"num_image_tokens": 4}, "num_image_tokens: None there, 4 now"),
    ):
        with pytest.raises(ValueError, match=f"other data, by another checkpoint or with other options .*{named}"):
            tokenize(dataset, tokenized, processor, **options)
    assert files(tokenized) == before


def test_another_checkpoint_is_refused(tokenized: Path) -> None:
    other = LavitVisualTokenizer.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        other.discrete.selector.out_proj_3.bias[0] += 1
    processor = AutoProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=other)
    with pytest.raises(ValueError, match="by another checkpoint .*visual_tokenizer: "):
        tokenize(SCENES, tokenized, processor)
    load_tokenized_dataset(tokenized, other)  # its codes mean the same
    with torch.no_grad():
        other.discrete.quantizer.codebook.weight[0, 0] += 1
    with pytest.raises(ValueError, match="whose codebook is another one"):
        load_tokenized_dataset(tokenized, other)


def test_half_precision_is_continued_with_the_same_batches(processor, tmp_path: Path) -> None:
    half = LavitVisualTokenizer.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    processor = AutoProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=half)
    few = SCENES.select(range(3))
    report = tokenize(few, tmp_path / "out", processor, batch_size=2)
    assert report.num_rows == 3
    with pytest.raises(ValueError, match="batch_size: 2 there, 3 now"):
        tokenize(few, tmp_path / "out", processor, batch_size=3)


def test_other_directories_are_left_alone(processor, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="holds no tokenized data"):
            tokenize(SCENES, path, processor)
        with pytest.raises(ValueError, match="holds no tokenized data"):
            load_tokenized_dataset(path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    settings = {"output_format": "webdataset"}
    about = {"is_complete": True, "settings": settings, "codebook_fingerprint": "0"}
    (tmp_path / "tokenization.json").write_text(json.dumps(about))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "00000-000000.tar").write_bytes(b"\x00\xffgarbage" * 20)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} cannot be read: ")):
        load_tokenized_dataset(tmp_path)


# Several processes


# `lavit` that tells who finishes what.
TELLING = """
import lavit_cli
from accelerate import PartialState
from lavit_hf.training.precompute_codes.directory import TokenizedDirectory

finish = TokenizedDirectory.finish
def tell(self, shard, *args):
    finish(self, shard, *args)
    print(f"process {PartialState().process_index} {shard.name}\\n", end="", flush=True)
TokenizedDirectory.finish = tell
lavit_cli.main()
"""


def test_two_processes_are_one(python: str, tokenized: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    SCENES.save_to_disk(tmp_path / "scenes")
    (tmp_path / "telling.py").write_text(TELLING)
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["tokenize", tmp_path / "scenes", path, "--model", CHECKPOINT, "--shard-size", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*launch, tmp_path / "telling.py", *command], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Wrote") == 1
    told = sorted(line.split()[1:] for line in result.stdout.splitlines() if line.startswith("process "))
    assert told == [[f"{rank}", f"00000-{chunk:06d}"] for rank in (0, 1) for chunk in range(rank, 5, 2)]
    assert files(path) == files(tokenized)
    assert datasets.load_from_disk(str(path))[:] == load_tokenized_dataset(tokenized)[:]


def test_the_visual_tokenizer_of_its_checkpoint(tokenized: Path, tmp_path: Path) -> None:
    """A processor loads it when it is needed, as in a call."""
    tokenize(SCENES, tmp_path / "out", AutoProcessor.from_pretrained(CHECKPOINT))
    assert files(tmp_path / "out") == files(tokenized)


# What cannot be tokenized


def test_wrong_arguments(processor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for dataset, options, error, message in (
        (SCENES, {"image_column": "picture"}, ValueError, "no column 'picture'; it has 'image', 'text'"),
        (SCENES, {"keep_columns": ["license"]}, ValueError, "no column 'license'"),
        (SCENES, {"output_format": "zip"}, ValueError, "must be one of arrow, webdataset, got 'zip'"),
        (SCENES, {"on_bad_sample": "ignore"}, ValueError, "must be 'skip' or 'raise'"),
        (SCENES, {"batch_size": 0}, ValueError, "must be at least 1"),
        (SCENES, {"num_image_tokens": 17}, ValueError, "An image has 1 to 16 tokens"),
        (SCENES.select([]), {}, ValueError, "The dataset is empty"),
        (stream_scenes(num_scenes=0), {}, ValueError, "The dataset is empty"),
        (list(SCENES), {}, TypeError, "got list"),
        (datasets.DatasetDict(train=SCENES), {}, TypeError, "got DatasetDict. Of several splits choose one"),
    ):
        with pytest.raises(error, match=message):
            tokenize(dataset, out, processor, **options)
    parts = processor.image_processor, processor.tokenizer
    alone = ImageTextProcessor(*parts, image_seq_length=processor.image_seq_length)
    with pytest.raises(ValueError, match="Discrete images need a visual tokenizer: pass `visual_tokenizer=`"):
        tokenize(SCENES, out, alone)
    assert not out.exists()


@pytest.mark.parametrize("missing", ["datasets", "accelerate"])
def test_missing_packages(missing: str, processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="pip install 'lavit-hf\\[training\\]'"):
        tokenize(SCENES, tmp_path / "out", processor)


def test_strangers_are_noticed(processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState()  # set up as a single process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but accelerate was set up for 1 before"):
        tokenize(SCENES, tmp_path / "out", processor)
    assert not (tmp_path / "out").exists()


def test_images_elsewhere_are_bad_samples(processor, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    SCENES[0]["image"].save(root / "own.png")
    names = ["own.png", "../secret.png", str(tmp_path / "secret.png"), str(root / "own.png")]
    rows = datasets.Dataset.from_dict({"image": names, "text": ["a"] * 4})
    images = rows.cast_column("image", datasets.Image(decode=False))
    digests = []
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / "secret.png")
        for kind, data in (("names", rows), ("images", images)):
            report = tokenize(data, tmp_path / color / kind, processor, image_root=root)
            assert [sample_id for sample_id, _ in report.bad_samples] == [1, 2]
            assert all("secret.png, which is outside of" in reason for _, reason in report.bad_samples)
        digests.append(read_metadata(tmp_path / color / "images")["settings"]["data"])
    assert digests[0] == digests[1]  # it was not read for this either


def test_tokenized_data_of_others_are_not_loaded(tokenized: Path, processor, tmp_path: Path) -> None:
    shutil.copytree(tokenized, tmp_path / "out")
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    (file, *_) = (tokenized / "data").iterdir()
    state["_data_files"] = [{"filename": str(file)}]
    (tmp_path / "out" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="state.json names .*, which is outside of"):
        load_tokenized_dataset(tmp_path / "out")
    for name in ("one", "two"):
        tokenize(SCENES, tmp_path / name, processor, output_format="webdataset")
    (tmp_path / "one" / "data" / "more.tar").symlink_to(tmp_path / "two" / "data" / "00000-000000.tar")
    with pytest.raises(ValueError, match="has data/more.tar, which links to .* outside of it"):
        load_tokenized_dataset(tmp_path / "one")


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": None},
        {"settings": {}},
        {"is_complete": "x"},
        {"num_codes": None},
        {"bad_samples": 5},
        {"bad_samples": ["x"]},
        *({name: None} for name in ("codebook_fingerprint", "num_rows")),
    ],
)
def test_damaged_notes_are_named(tokenized: Path, processor, tmp_path: Path, changes: dict) -> None:
    shutil.copytree(tokenized, tmp_path / "out")
    path = tmp_path / "out" / "tokenization.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(ValueError, match=r"tokenization.json is damaged. Remove .*out, and run"):
        tokenize(SCENES, tmp_path / "out", processor)


@pytest.mark.parametrize("name", ["00000-000000.json", "00000-end.json"])
def test_damaged_progress_is_named(processor, tmp_path: Path, monkeypatch, name: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lavit_hf.training.precompute_codes.directory.write_json", interrupt_at("tokenization.json"))
        with pytest.raises(KeyboardInterrupt):
            tokenize(SCENES, tmp_path, processor)
    (tmp_path / "progress" / name).write_text("{}")
    monkeypatch.setattr(TokenizedDirectory, "finish_source", lambda *args: None)
    with pytest.raises(ValueError, match=rf"{name} is damaged. Remove .*{name}, and run"):
        tokenize(SCENES, tmp_path, processor)


def interrupt_at(name: str):
    def write(path: Path, content) -> None:
        if path.name == name and content["is_complete"]:
            raise KeyboardInterrupt
        write_json(path, content)

    return write


@pytest.mark.parametrize("name", ["dataset_info.json", "data/00000-000000.arrow"])
@pytest.mark.parametrize("content", [b"", b"[]", None])
def test_damaged_data_are_named(tokenized: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    path = Path(shutil.copytree(tokenized, tmp_path / "out")) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"{tmp_path / 'out'}.*(cannot be read|is damaged)|{path}"
    ):
        load_tokenized_dataset(tmp_path / "out")


def test_what_a_killed_process_left_is_cleaned(processor, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    tokenize(SCENES, folder, processor)
    complete = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".tokenization.json.abcd1234.partial").write_bytes(b"half")  # killed before anything was there
    tokenize(SCENES, folder, processor)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == complete
