"""Shards that are read while training goes on: nothing twice, nothing lost, whoever reads, and what is bad counted."""

import io
import itertools
import json
import subprocess
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from lavit_hf.training import (
    MixturePart,
    StreamedTrainingDataset,
    StreamSource,
    StreamTrainer,
    load_stream,
    streaming,
)
from lavit_hf.training.streaming import ShardProgress
from tiny_parts import picture_rows
from training import tiny_training
from training.tiny_training import build_trainer, losses, script_environment

NUM_SHARDS, SHARD_SIZE = 12, 7
NUM_ROWS = NUM_SHARDS * SHARD_SIZE


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_shards(folder: Path, kind: str) -> MixturePart:
    """A dataset of texts that are numbers, in shards."""
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"text": [str(number) for number in range(NUM_ROWS)]})
    if kind == "saved":
        rows.save_to_disk(folder / "data", num_shards=3)
        return MixturePart(str(folder / "data"))
    for shard in range(NUM_SHARDS):
        texts = [str(number) for number in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE)]
        if kind == "parquet":
            datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / f"{shard:05d}.parquet")
        elif kind == "json":
            lines = [json.dumps({"text": text}) for text in texts]
            (folder / f"{shard:05d}.jsonl").write_text("\n".join(lines))
        else:
            files = {f"{text}.txt": text.encode() for text in texts}
            write_tar(folder / f"{shard:05d}.tar", files)
    if kind == "webdataset":
        return MixturePart(str(folder / "*.tar"), text_column="txt")
    return MixturePart(str(folder))


def identity(rows: list[dict]) -> list[tuple[int, str]]:
    return [(row["epoch"], row["text"]) for row in rows]


class Processes:
    """Several processes in one: each has its dataset, and all share what they know when they save."""

    def __init__(self, open_stream, num_processes: int, num_workers: int, state: dict | None = None) -> None:
        self.streams = [open_stream() for _ in range(num_processes)]
        if state is not None:
            for stream in self.streams:
                stream.load_state_dict(json.loads(json.dumps(state)))
        self.loaders = [
            iter(stream.batches(2, identity, process, num_processes, num_workers))
            for process, stream in enumerate(self.streams)
        ]

    def take(self, num_batches: int) -> list[tuple[int, str]]:
        """The rows of so many batches of each process."""
        return [row for _ in range(num_batches) for loader in self.loaders for row in next(loader)]

    def state(self, monkeypatch) -> dict:
        parts = [stream._progress for stream in self.streams]
        monkeypatch.setattr(streaming, "gather_object", lambda own: parts)
        return self.streams[0].state_dict()


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("parquet", (1, 0), (2, 2)),
        ("webdataset", (2, 2), (1, 0)),
        ("webdataset", (3, 0), (2, 0)),
        ("json", (1, 0), (3, 0)),
        ("saved", (2, 0), (1, 0)),
    ],
)
def test_nothing_is_read_twice_or_lost_by_other_readers(tmp_path, monkeypatch, kind, before, after):
    part = write_shards(tmp_path / "data", kind)

    def open_stream():
        return load_stream([part], shuffle_buffer=3)

    first = Processes(open_stream, *before)
    taken = first.take(13 // before[0])
    second = Processes(open_stream, *after, state=first.state(monkeypatch))
    taken += second.take(2 * NUM_ROWS // 2 // after[0])
    assert len(set(taken)) == len(taken)
    assert {text for epoch, text in taken if epoch == 0} == {str(number) for number in range(NUM_ROWS)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_as_many_readers_go_on_as_if_nothing_had_happened(tmp_path, monkeypatch, num_workers):
    parts = [write_shards(tmp_path / "a", "parquet"), write_shards(tmp_path / "b", "webdataset")]
    parts[1].weight = 2.5

    def open_stream():
        return load_stream(parts, shuffle_buffer=4)

    expected = Processes(open_stream, 2, num_workers).take(40)
    state, found = None, []
    for count in (7, 15, 18):  # no multiples of two workers
        run = Processes(open_stream, 2, num_workers, state=state)
        found += run.take(count)
        state = run.state(monkeypatch)
    assert found == expected


def test_what_is_read_ahead_does_not_count(tmp_path, monkeypatch):
    part = write_shards(tmp_path / "data", "parquet")
    run = Processes(lambda: load_stream([part], shuffle_buffer=3), 1, 2)
    taken = run.take(3)
    assert sum(rows for *_, rows, _, _ in map(tuple, run.state(monkeypatch)["shards"][0])) == len(taken)


def test_every_pass_has_another_order_and_rows_are_shuffled(tmp_path):
    stream = load_stream([write_shards(tmp_path / "data", "parquet")], shuffle_buffer=4)
    rows = [(row["epoch"], int(row["text"])) for row in itertools.islice(stream, 2 * NUM_ROWS)]
    passes = [[number for epoch, number in rows if epoch == wanted] for wanted in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(NUM_ROWS))
    shards = [[number // SHARD_SIZE for number in numbers[::SHARD_SIZE]] for numbers in passes]
    assert shards[0] != shards[1] and shards[0] != sorted(shards[0])
    begin = passes[0][:4]  # of one shard, and the first four of its rows
    assert sorted(begin) == list(range(min(begin), min(begin) + 4)) and min(begin) % SHARD_SIZE == 0
    assert passes[0] != sorted(passes[0], key=lambda number: (shards[0].index(number // SHARD_SIZE), number))


def test_other_seeds_read_in_another_order(tmp_path):
    part = write_shards(tmp_path / "data", "parquet")
    orders = [[row["text"] for row in itertools.islice(load_stream([part], seed=seed), 30)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_parts_of_a_mixture_keep_their_weights(tmp_path):
    parts = [write_shards(tmp_path / name, "parquet") for name in ("pairs", "text")]
    for part, weight in zip(parts, (1.0, 2.0), strict=True):
        part.weight = weight
    stream = load_stream(parts)
    for source, prefix in zip(stream.sources, "pt", strict=True):
        source.dataset = source.dataset.map(lambda row, prefix=prefix: {"text": prefix + row["text"]})
    kinds = "".join(row["text"][0] for row in itertools.islice(stream, 90))
    assert kinds.count("t") == 60 and all(kinds[start : start + 3].count("t") == 2 for start in range(0, 90, 3))
    loader = iter(stream.batches(9, identity))
    for _ in range(42):
        next(loader)
    counts = stream.counts()  # 126 of 84 rows, 252 of 84
    assert counts["passes_0"] == pytest.approx(1.5, abs=0.1) and counts["passes_1"] == pytest.approx(3, abs=0.1)


def test_bad_samples_are_left_out_and_counted(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(2):
        files = {}
        for number in range(10):
            files[f"{number}.png"] = b"no picture" if number == 3 else png()
            files[f"{number}.txt"] = b" " if number == 5 else b"a red square"
        write_tar(folder / f"{shard}.tar", files)
    part = MixturePart(str(folder), image_column="png", text_column="txt")
    stream = load_stream([part], max_bad_share=0.2)
    loader = iter(stream.batches(8, lambda rows: [row["images"][0].size for row in rows]))
    assert [next(loader) for _ in range(3)] == [[(4, 4)] * 8] * 3  # 16 good rows per pass
    assert stream.num_bad_samples == stream.counts()["bad_samples"] == 6
    assert stream.image_column == "png"


def rows_of(texts: list[str], num_shards: int = 1) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=num_shards)


def test_too_many_bad_samples_stop_the_run():
    texts = ["", *["fine"] * 4] * 100
    loader = iter(StreamedTrainingDataset(rows_of(texts)).batches(10, identity))
    with pytest.raises(ValueError, match=r"\d+ of 1\d\d samples of the dataset are bad.*max_bad_share \(0.1\).*empty"):
        list(itertools.islice(loader, 20))
    allowed = StreamedTrainingDataset(rows_of(texts), max_bad_share=0.25)
    assert len(list(itertools.islice(allowed, 400))) == 400
    with pytest.raises(ValueError, match="Sample of the dataset, shard 0, is bad: the text is empty"):
        list(itertools.islice(StreamedTrainingDataset(rows_of(texts), on_bad_sample="raise"), 400))


def test_data_without_a_good_sample():
    with pytest.raises(ValueError, match="no sample that can be used"):
        next(iter(StreamedTrainingDataset(rows_of(["", ""]))))


def test_a_damaged_shard_costs_its_rest(tmp_path, caplog):
    folder = tmp_path / "data"
    part = write_shards(folder, "webdataset")
    broken = folder / "00003.tar"
    broken.write_bytes(broken.read_bytes()[: 512 * 9 + 100])  # ends in the fifth row
    stream = load_stream([part])
    texts = {row["text"] for row in itertools.islice(stream, NUM_ROWS - 3)}
    assert set(map(str, range(NUM_ROWS))) - texts == {"25", "26", "27"}
    loader = iter(stream.batches(9, identity))
    for _ in range(10):
        next(loader)
    assert stream.counts()["damaged_shards"] == 1
    for shard in (5, 7):
        (folder / f"{shard:05d}.tar").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match=r"2 of 12 shards of .* are damaged, more than max_bad_share \(0.1\)"):
        list(itertools.islice(load_stream([part]), NUM_ROWS))
    with pytest.raises(ValueError, match="Shard . of .* is damaged"):
        list(itertools.islice(load_stream([part], on_bad_sample="raise"), NUM_ROWS))


def test_every_reader_needs_a_shard(tmp_path):
    stream = load_stream([write_shards(tmp_path / "data", "webdataset")])
    with pytest.raises(ValueError, match=r"12 shard\(s\), and each of 16 readers \(4 process\(es\) with 4 worker"):
        stream.batches(2, identity, 0, 4, 4)


def test_what_no_stream_is_made_of(tmp_path):
    with pytest.raises(TypeError, match="to_iterable_dataset"):
        StreamSource(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="no column 'caption'"):
        StreamSource(rows_of(["a"]), text_column="caption")
    with pytest.raises(ValueError, match="weight"):
        StreamSource(rows_of(["a"]), weight=0)
    with pytest.raises(ValueError, match="No file is named like"):
        load_stream([MixturePart(str(tmp_path / "*.tar"))])
    with pytest.raises(ValueError, match="nothing to read"):
        StreamedTrainingDataset([])
    for option in ({"shuffle_buffer": 0}, {"on_bad_sample": "hide"}, {"max_bad_share": 2}):
        with pytest.raises(ValueError, match=next(iter(option))):
            StreamedTrainingDataset(rows_of(["a"]), **option)


def test_a_state_has_to_fit(monkeypatch):
    def open_stream(**options):
        return StreamedTrainingDataset(rows_of(["a", "b", "c", "d"], 2), **options)

    state = Processes(open_stream, 1, 0).state(monkeypatch)
    open_stream().load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        open_stream(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="other data"):
        StreamedTrainingDataset(rows_of(["a", "b", "c"], 3)).load_state_dict(state)
    for name, value in [("shards", [[[0, 0]]]), ("shards", [[[0, -1, 0, 0, 0]] * 2]), ("layout", "x"), ("drawn", 3)]:
        with pytest.raises(ValueError, match="damaged"):
            open_stream().load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match="damaged"):
        open_stream().load_state_dict({})


# With `Trainer`.


@pytest.fixture
def pictures(tmp_path) -> str:
    """Four files of five rows, one of which is bad."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = picture_rows(20)
    rows[7]["text"] = ""
    for shard in range(4):
        part = datasets.Dataset.from_list(rows[5 * shard : 5 * shard + 5])
        part.cast_column("image", datasets.Image()).to_parquet(folder / f"{shard}.parquet")
    return str(folder)


STEPS = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_is_bit_equal(tmp_path, pictures, num_workers):
    arguments = {**STEPS, "stream": pictures, "dataloader_num_workers": num_workers, "gradient_accumulation_steps": 3}
    arguments["collator"] = {"image_first_probability": 1.0} if num_workers else {}
    expected = build_trainer(tmp_path / "whole", **arguments)
    expected.train()
    resumed = build_trainer(tmp_path / "again", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(expected) and len(losses(expected)) == 7
    for name, value in expected.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    log = expected.state.log_history[-2]
    assert log["bad_samples"] == 2 and log["damaged_shards"] == 0 and log["passes"] == 2  # 42 of 19 good rows
    assert [entry["epoch"] for entry in resumed.state.log_history] == [
        entry["epoch"] for entry in expected.state.log_history
    ]


def test_what_workers_leave_is_done_in_the_main_process(tmp_path, pictures, monkeypatch):
    """As on a GPU, where they have no visual tokenizer."""
    arguments = {**STEPS, "stream": pictures, "dataloader_num_workers": 2}
    expected = build_trainer(tmp_path / "whole", **arguments)
    expected.train()
    later = build_trainer(tmp_path / "later", collator={"encode_later": True}, **arguments)
    finished = []
    finish = later.data_collator.finish
    monkeypatch.setattr(later.data_collator, "finish", lambda batch: finished.append("rows" in batch) or finish(batch))
    later.train()
    assert losses(later) == losses(expected) and True in finished
    finished.clear()
    assert later.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"] and True in finished


def test_a_run_that_is_over_does_nothing(tmp_path, pictures):
    trainer = build_trainer(tmp_path / "out", stream=pictures, **STEPS)
    trainer.train()
    again = build_trainer(tmp_path / "out", stream=pictures, **STEPS)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-7"))
    assert again.state.global_step == 7
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_run_that_ended_in_the_middle_of_an_epoch_does_nothing(tmp_path):
    """Regression: without a stream, it made one more update, as `Trainer` does."""
    options = {"num_samples": 6, "per_device_train_batch_size": 2, "max_steps": 4, "trainer_class": StreamTrainer}
    trainer = build_trainer(tmp_path, save_strategy="steps", save_steps=4, **options)
    trainer.train()
    again = build_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 4 and losses(again) == losses(trainer)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_two_processes_go_on_as_one(python, tmp_path, pictures):
    arguments = {**STEPS, "max_steps": 3, "stream": pictures}
    options = {"output_dir": str(tmp_path / "out"), "arguments": arguments}
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [tiny_training.__file__, json.dumps(options)]
    run = subprocess.run(command, env=script_environment(), capture_output=True, text=True)
    assert run.returncode == 0 and "2 processes DistributedDataParallel" in run.stdout, run.stderr[-3000:]

    checkpoint = tmp_path / "out" / "checkpoint-3"
    state = json.loads((checkpoint / "streamed_data.json").read_text())
    numbers = [ShardProgress(*shard) for shard in state["shards"][0]]
    assert state["layout"] == [2, 1] and state["num_batches"] == 3
    assert sum(shard.num_read - shard.num_bad for shard in numbers) == 12  # 3 updates of 2 x 2
    assert sum(shard.num_read for shard in numbers[::2]) == 6 + sum(shard.num_bad for shard in numbers[::2])

    alone = build_trainer(tmp_path / "alone", **{**STEPS, "max_steps": 4, "save_steps": 4}, stream=pictures)
    alone.args.per_device_train_batch_size = 4
    alone.train(resume_from_checkpoint=str(checkpoint))
    state = json.loads((tmp_path / "alone" / "checkpoint-4" / "streamed_data.json").read_text())
    numbers = [ShardProgress(*shard) for shard in state["shards"][0]]
    assert sum(shard.num_read - shard.num_bad for shard in numbers) == 16
    assert all(shard.passes == 0 or shard.rows == 0 for shard in numbers), "all are read once before any twice"


def test_checkpoints_that_a_stream_cannot_go_on_from(tmp_path, pictures):
    build_trainer(tmp_path / "plain", **STEPS).train()
    trainer = build_trainer(tmp_path / "out", stream=pictures, **STEPS)
    checkpoint = tmp_path / "plain" / "checkpoint-3"
    with pytest.raises(ValueError, match=r"has no streamed_data\.json, as it was written without streaming"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "streamed_data.json").write_text("[]")
    with pytest.raises(ValueError, match=r"streamed_data\.json cannot be used: .*does not hold a JSON object"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
