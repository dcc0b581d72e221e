"""What FSDP2 and DeepSpeed pickle runs no code, and is gone on from where that is possible only."""

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from lavit_hf.training import find_trainer_checkpoint
from lavit_hf.training.sharded_checkpoints import (
    require_harmless_shards,
    require_same_sharding,
    sharded_directories,
    why_shards_are_incomplete,
)


class Evil:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("ran-code"),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint as `Trainer` saves sharded state: tensors, and numbers, which torch pickles."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint-4"
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    dcp.save({"model": network.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(saved, tmp_path / saved.name)


def test_what_torch_writes_is_data(checkpoint):
    assert [path.name for path in sharded_directories(checkpoint)] == ["optimizer_0", "pytorch_model_fsdp_0"]
    assert why_shards_are_incomplete(checkpoint) is None
    assert find_trainer_checkpoint("latest", checkpoint.parent) == str(checkpoint)


def change(folder: Path, **values: object) -> None:
    """Pickles the metadata of a directory with other values."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for name, value in values.items():
        setattr(metadata, name, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def of_another_name(folder: Path) -> None:
    """torch falls back to such files where `.metadata` is missing."""
    (folder / "__0.metadata").write_bytes(pickle.dumps(Evil()))


def by_opcode(folder: Path, *operations: bytes) -> None:
    (folder / ".metadata").write_bytes(b"".join(operations) + b".")


TENSORS = b"ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n"
BYTES = b"ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\n"


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Evil())), r"names pathlib\.Path"),
        (lambda folder: change(folder, planner_data=Evil()), r"names pathlib\.Path"),
        (lambda folder: change(folder, storage_meta=[{"a": Evil()}]), r"names pathlib\.Path"),
        (lambda folder: by_opcode(folder, b"cos\nsystem\n(S'touch ran-code'\ntR"), r"names os\.system"),
        (lambda folder: by_opcode(folder, b"(ibuiltins\neval\n"), r"names builtins\.eval"),
        # A name with dots is looked up part by part.
        (lambda folder: by_opcode(folder, b"\x80\x04\x8c\x05torch\x8c\tos.system\x93"), r"names torch\.os\.system"),
        # Attributes that are set by name: of a class itself, and the class of an object.
        (lambda folder: by_opcode(folder, TENSORS, b"N}S'__class__'\n", BYTES, b"s\x86b"), "cannot be read"),
        (lambda folder: by_opcode(folder, TENSORS, b")\x81N}S'__class__'\n", BYTES, b"s\x86b"), "not of the form"),
        (of_another_name, r"__0\.metadata is read where"),
    ],
)
@pytest.mark.parametrize("folder", ["optimizer_0", "pytorch_model_fsdp_0", "."])
def test_metadata_that_could_run_code(checkpoint, attack, reason, folder):
    if folder == ".":  # one may be handed to torch itself
        shutil.copytree(checkpoint / "optimizer_0", checkpoint, dirs_exist_ok=True)
    attack(checkpoint / folder)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"is not loaded, as whatever code is in it would run: .*{reason}"
        ) as error:
            require_harmless_shards(checkpoint)
        assert error.value.__suppress_context__
    assert not Path("ran-code").exists()
    with pytest.raises(ValueError, match=r"checkpoint-4"):
        find_trainer_checkpoint(str(checkpoint), checkpoint.parent)
    assert not Path("ran-code").exists()


def test_the_attack_would_work_on_torch(checkpoint):
    """Or the tests above would show nothing."""
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointException):  # after it ran the code
        dcp.load({"a": torch.ones(1)}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
    assert Path("ran-code").exists()


@pytest.mark.parametrize("hides", [False, True])
def test_values_that_could_run_code(checkpoint, hides):
    """torch pickles numbers beside tensors, and loads them with all code, whatever else names the same place."""
    folder = checkpoint / "optimizer_0"
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.endswith(".lr"))
    assert isinstance(metadata.state_dict_metadata[name], BytesStorageMetadata)
    content = io.BytesIO()
    torch.save(Evil(), content)
    (folder / "evil.distcp").write_bytes(b"junk" + content.getvalue())
    info = filesystem._StorageInfo("evil.distcp", 4, len(content.getvalue()))
    honest = dict(metadata.storage_data)
    if hides:  # behind an offset that torch does not look at
        metadata.storage_data = {MetadataIndex(name, [0]): info, **honest}
    else:
        metadata.storage_data[MetadataIndex(name)] = info
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"evil\.distcp holds more than data"):
        find_trainer_checkpoint("latest", checkpoint.parent)
    assert find_trainer_checkpoint("latest", checkpoint.parent, trust_checkpoint=True) == str(checkpoint)
    assert not Path("ran-code").exists()


def test_tensors_are_read_as_nothing_else(checkpoint):
    """A tensor by its metadata may hold what it wants: torch loads it as a tensor only."""
    folder = checkpoint / "pytorch_model_fsdp_0"
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    content = io.BytesIO()
    torch.save(Evil(), content)
    (folder / "evil.distcp").write_bytes(content.getvalue())
    assert isinstance(metadata.state_dict_metadata["model.weight"], TensorStorageMetadata)
    index = next(index for index in metadata.storage_data if index.fqn == "model.weight")
    metadata.storage_data[index] = filesystem._StorageInfo("evil.distcp", 0, len(content.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    require_harmless_shards(checkpoint)
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        dcp.load({"model": torch.nn.Linear(3, 2).state_dict()}, checkpoint_id=folder, no_dist=True)
    assert not Path("ran-code").exists()


@pytest.mark.parametrize("name", ["../../other", "/etc/hostname", "link"])
def test_paths_that_lead_out_of_the_directory(checkpoint, name):
    folder = checkpoint / "optimizer_0"
    (folder / "link").symlink_to(checkpoint.parent)
    data = pickle.loads((folder / ".metadata").read_bytes()).storage_data
    change(folder, storage_data={index: filesystem._StorageInfo(name, 0, 1) for index in data})
    with pytest.raises(ValueError, match=r"\.metadata (names|has) .*outside of"):
        find_trainer_checkpoint("latest", checkpoint.parent)


def test_incomplete_ones_are_skipped(checkpoint):
    earlier = shutil.copytree(checkpoint, checkpoint.parent / "checkpoint-2")
    part = checkpoint / "optimizer_0" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-10])
    assert why_shards_are_incomplete(checkpoint) == "optimizer_0/__0_0.distcp is missing or damaged"
    assert find_trainer_checkpoint("latest", checkpoint.parent) == str(earlier)
    (checkpoint / "optimizer_0" / ".metadata").unlink()
    assert "optimizer_0/.metadata is missing or damaged" in str(why_shards_are_incomplete(checkpoint))
    (earlier / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"\x80\x04}")
    assert "pytorch_model_fsdp_0/.metadata is missing or damaged" in str(why_shards_are_incomplete(earlier))
    assert find_trainer_checkpoint("latest", checkpoint.parent) is None


@pytest.fixture
def deepspeed(tmp_path) -> Path:
    """The layout that ZeRO-3 has in a checkpoint of `Trainer`, of two processes."""
    folder = tmp_path / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    for rank in range(2):
        for name in (
            f"zero_pp_rank_{rank}_mp_rank_00_model_states",
            f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states",
        ):
            torch.save({"state": torch.ones(2)}, folder / "global_step4" / f"{name}.pt")
    (folder / "latest").write_text("global_step4")
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    return folder


def test_state_of_deepspeed_has_to_be_trusted(deepspeed):
    for name in ("latest", str(deepspeed)):
        with pytest.raises(ValueError, match=r"global_step4 holds pickles of DeepSpeed.*--trust_checkpoint.*--model"):
            find_trainer_checkpoint(name, deepspeed.parent)
    assert find_trainer_checkpoint("latest", deepspeed.parent, trust_checkpoint=True) == str(deepspeed)


def test_deepspeed_goes_on_with_as_many_processes(deepspeed):
    require_same_sharding(deepspeed, 2, is_deepspeed=True)
    for world_size in (1, 4):
        with pytest.raises(ValueError, match=rf"state of 2 processes, and this run has {world_size}: .*--model"):
            require_same_sharding(deepspeed, world_size, is_deepspeed=True)
    with pytest.raises(ValueError, match="was saved with DeepSpeed, and this run trains without it"):
        require_same_sharding(deepspeed, 2)
    (deepspeed / "latest").write_text("../../elsewhere")
    with pytest.raises(ValueError, match="latest names none of the directories"):
        require_same_sharding(deepspeed, 2, is_deepspeed=True)


def test_state_of_another_kind_is_named(checkpoint, tmp_path):
    full, plain = tmp_path / "full", tmp_path / "plain"
    full.mkdir()
    plain.mkdir()
    torch.save({}, full / "pytorch_model_fsdp.bin")
    torch.save({}, plain / "optimizer.pt")
    for folder, state in ((checkpoint, "SHARDED_STATE_DICT"), (full, "FULL_STATE_DICT"), (plain, None)):
        require_same_sharding(folder, 3, fsdp_state=state)
    with pytest.raises(ValueError, match=r"saved by FSDP, .* without it\. .*--num_processes 1"):
        require_same_sharding(checkpoint, 1)
    with pytest.raises(ValueError, match="saved by FSDP"):
        require_same_sharding(full, 1)
    with pytest.raises(ValueError, match="holds state as of fsdp_state_dict_type: SHARDED_STATE_DICT, .*Set it to SH"):
        require_same_sharding(checkpoint, 2, fsdp_state="FULL_STATE_DICT")
    with pytest.raises(ValueError, match="was saved without FSDP"):
        require_same_sharding(plain, 2, fsdp_state="FULL_STATE_DICT")
    with pytest.raises(ValueError, match="was saved without DeepSpeed"):
        require_same_sharding(plain, 2, is_deepspeed=True)
