"""Who gets which shard: each belongs to exactly one process, whatever their number."""

from pathlib import Path

import datasets
import pytest

from lavit_hf.training.precompute_codes.directory import TokenizationReport, TokenizedDirectory
from lavit_hf.training.precompute_codes.source import TokenizedSource


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` puts lock files into its cache; not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": [None] * count, "text": [f"t{index}" for index in range(count)]})


def generate(first: list[int]):
    for start in first:
        yield from ({"image": None, "text": f"t{start + index}"} for index in range(7 + start % 3))


def stream(num_files: int) -> datasets.IterableDataset:
    features = datasets.Features({"image": datasets.Value("string"), "text": datasets.Value("string")})
    starts = {"first": [100 * number for number in range(num_files)]}
    return datasets.IterableDataset.from_generator(generate, features=features, gen_kwargs=starts)


def directory(path: Path) -> TokenizedDirectory:
    opened = TokenizedDirectory(path, "arrow", datasets.Features({"sample_id": datasets.Value("int64")}))
    opened.open({"checkpoint": "x"}, {})
    return opened


def read(source: TokenizedSource, rank: int, num_processes: int, opened: TokenizedDirectory) -> dict:
    return {
        shard: [(index, row["text"]) for index, row in numbered]
        for shard, numbered in source.shards(rank, num_processes, opened)
    }


@pytest.mark.parametrize("num_processes", [2, 3, 5])
@pytest.mark.parametrize("num_files", [None, 1, 2, 4])
def test_every_shard_has_one_reader(num_files: int | None, num_processes: int, tmp_path: Path) -> None:
    dataset = rows(13) if num_files is None else stream(num_files)
    source = TokenizedSource(dataset, "image", "text", (), shard_size=2)
    whole = read(source, 0, 1, directory(tmp_path / "one"))
    assert [text for numbered in whole.values() for _, text in numbered] == [row["text"] for row in dataset]
    assert max(len(numbered) for numbered in whole.values()) == 2
    parts = [read(source, rank, num_processes, directory(tmp_path / f"{rank}")) for rank in range(num_processes)]
    assert sum(map(len, parts)) == len(whole)
    assert {shard: numbered for part in parts for shard, numbered in part.items()} == whole


def test_finished_shards_are_passed_over(tmp_path: Path) -> None:
    for dataset in (rows(13), stream(2)):
        source = TokenizedSource(dataset, "image", "text", (), shard_size=4)
        opened = directory(tmp_path / type(dataset).__name__)
        shards = list(read(source, 0, 1, opened))
        opened.finish(shards[1], [], TokenizationReport(tmp_path))
        assert list(read(source, 0, 1, opened)) == [shards[0], *shards[2:]]


def test_finished_streams_are_not_read_again(tmp_path: Path) -> None:
    source = TokenizedSource(stream(3), "image", "text", (), shard_size=4)
    opened = directory(tmp_path / "out")
    for shard, _ in source.shards(0, 1, opened):
        opened.finish(shard, [], TokenizationReport(tmp_path))
    source.dataset = source.dataset.map(fail)  # on the first row
    assert read(source, 0, 1, opened) == {}


def fail(row: dict) -> dict:
    raise AssertionError("read again")


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    opened = directory(tmp_path / "out")
    opened.finish_source(0, 2)
    with pytest.raises(RuntimeError, match="Shard 00000-000000 is missing .* the same directory"):
        opened.merge(1)


def test_digest() -> None:
    def digest(dataset) -> str:
        return TokenizedSource(dataset, "image", "text", (), shard_size=4).digest()

    assert digest(rows(40)) == digest(rows(40)) != digest(rows(41))
    assert digest(stream(2)) == digest(stream(2)) != digest(stream(3))
    changed = rows(40).map(lambda row, index: {"text": row["text"] + "!" * (index == 0)}, with_indices=True)
    assert digest(changed) != digest(rows(40))
