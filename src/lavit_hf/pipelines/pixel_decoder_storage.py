"""Saving and loading of pixel decoders, two of which may share one directory, and what is checked then."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ..modeling.checkpoint_files import built_from, check_counts, differing_shapes, state_shapes
from ..utils.json_files import read_json_object
from ..utils.safetensors_files import read_headers

HIGHRES, LOWRES = "highres", "lowres"
_MODEL_INDEX = "model_index.json"
_CONFIG_FILES = {
    "token_decoder": "config.json",
    "unet": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
    "safety_checker": "config.json",
    "feature_extractor": "preprocessor_config.json",
}
COMPONENTS = tuple(_CONFIG_FILES)
_OF_DIFFUSERS = ("scheduler", "unet", "vae")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_IDS = ("visual_token_offset", "eoi_token_id")

# `model_index.json` names files beside it, so that diffusers can load the classes without this package ...
_PIPELINE = ("pipeline_lavit_pixel_decoder", "LavitPixelDecoderPipeline")
_TOKEN_DECODER = ("lavit_token_decoder", "LavitTokenDecoder")
# ... which loads its own classes instead, so that no remote code has to be trusted.
PACKAGE = "lavit_hf"
_TOKEN_DECODER_HERE = (f"{PACKAGE}.modeling.modeling_lavit_token_decoder", "LavitTokenDecoder")
_CODE_HERE = f"{PACKAGE}.remote_code"


class PixelDecoderStorage(DiffusionPipeline):
    """What [`LavitPixelDecoderPipeline`] does differently from other pipelines when it is saved and loaded.

    `model_index.json` stands at the root of a LaVIT directory for the high-resolution decoder and in `lowres/` for the
    other one. It names classes by files of code beside it, which `DiffusionPipeline.from_pretrained(...,
    trust_remote_code=True)` runs; at the root that is the pipeline of prompts, whose second half the decoder is.
    Loading by [`LavitPixelDecoderPipeline`] runs none of them.
    """

    _named_pipeline = _PIPELINE  # in `model_index.json`

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, decoder: str | None = None, **kwargs: Any
    ) -> Self:
        """Loads a pixel decoder from a directory or from the Hub.

        Args:
            pretrained_model_name_or_path: A LaVIT directory, one written by `save_pretrained`, or the id of a
                repository with the files of one.
            decoder: `"highres"` or `"lowres"`. By default what stands at the root, which in a LaVIT directory is the
                high-resolution decoder.
            **kwargs: As for any pipeline of diffusers: `dtype`, `variant`, `device_map`, components, `revision`, ...

        Returns:
            The pipeline.

        Raises:
            OSError: If there is no such decoder, or a file is corrupt.
            ValueError: If `decoder` is anything else, or the files do not fit together.
        """
        if decoder not in (None, HIGHRES, LOWRES):
            raise ValueError(f"`decoder` must be {HIGHRES!r} or {LOWRES!r}; got {decoder!r}.")
        source = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(source):
            folder = _find_decoder(Path(source), decoder)
        else:
            hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            folder = _find_decoder(Path(cls.download(source, decoder=decoder, **hub_options)), decoder)
        if not (folder / cls.config_name).is_file():
            has_other = (folder / LOWRES / cls.config_name).is_file()
            wanted = decoder or (HIGHRES if has_other else None)
            name = f"{wanted} pixel decoder" if wanted else "pixel decoder"
            hint = f" Its other one: decoder={LOWRES!r}." if has_other else ""
            raise OSError(f"{source} holds no {name} (no {cls.config_name}).{hint}")
        kind = _kind(folder)
        if decoder and kind and decoder != kind:
            raise OSError(f"{source} holds no {decoder} pixel decoder, only a {kind} one.")
        check_index(folder, given=kwargs)
        with name_broken_part(folder):
            pipeline = super().from_pretrained(str(folder), **kwargs)
        check_complete(folder, {name: getattr(pipeline, name) for name in ("unet", "vae") if name not in kwargs})
        # A pixel decoder that was trained by itself and then copied to a language model does not know its ids.
        beside = lavit_beside(folder.parent if folder.name == LOWRES else folder)
        ids = {name: beside[name] for name in _IDS if isinstance(beside.get(name), int)}
        unknown = {name: value for name, value in ids.items() if pipeline.config.get(name) is None}
        pipeline.register_to_config(_name_or_path=source, **unknown)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """See [`DiffusionPipeline.from_pipe`]. The ids of codes come along, from a language model if there is one."""
        config = getattr(getattr(pipeline, "model", None), "config", None)
        for name in _IDS:
            if pipeline.config.get(name) is None and hasattr(config, name):
                kwargs.setdefault(name, getattr(config, name))
        return super().from_pipe(pipeline, **kwargs)

    @property
    def components(self) -> dict[str, Any]:
        """What another pipeline like this one is made of (`LavitPixelDecoderPipeline(**pipeline.components)`).

        With the modules come the ids of codes, without which it could not read `input_ids`.
        """
        return {**super().components, **{name: self.config[name] for name in _IDS}}

    @classmethod
    def download(cls, pretrained_model_name: str, *, decoder: str | None = None, **kwargs: Any) -> str:
        """Downloads what one pixel decoder needs, and not the language model beside it.

        Args:
            pretrained_model_name: Id of a repository.
            decoder: As in [`~LavitPixelDecoderPipeline.from_pretrained`].
            **kwargs: `cache_dir`, `revision`, `token`, `force_download`, `local_files_only`.

        Returns:
            The local copy of the repository's root.
        """
        if pretrained_model_name.count("/") > 1 or os.path.isabs(pretrained_model_name):
            raise OSError(f"{pretrained_model_name} is neither a directory nor the id of a repository.")
        options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        folder = _snapshot(cls, pretrained_model_name, f"{LOWRES}/" if decoder == LOWRES else "", options)
        if decoder == LOWRES and not (Path(folder) / LOWRES / cls.config_name).is_file():
            return _snapshot(cls, pretrained_model_name, "", options)
        return folder

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads `model_index.json`, naming this class and this package's token decoder instead of remote code."""
        config = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        if isinstance(config, dict):
            config["_class_name"] = cls.__name__
            is_remote = list(config.get("token_decoder") or ()) == list(_TOKEN_DECODER)
            if is_remote and module_here(_TOKEN_DECODER_HERE[0]):
                config["token_decoder"] = list(_TOKEN_DECODER_HERE)
        return config

    def to_json_string(self) -> str:
        """The content of `model_index.json`."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = list(self._named_pipeline)
        config.pop("_name_or_path", None)  # a path of the machine that saved it
        if self.token_decoder is not None:
            config["token_decoder"] = list(_TOKEN_DECODER)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves the pipeline, with the code that `DiffusionPipeline` needs to load it.

        Args:
            save_directory: Where to; created if needed.
            *args: As for any pipeline of diffusers.
            push_to_hub: Whether to upload it as well; of the directory nothing else.
            **kwargs: As for any pipeline of diffusers.
        """
        save_and_push(self._save, save_directory, *args, push_to_hub=push_to_hub, **kwargs)

    def _save(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        folder = Path(save_directory)
        codes = {folder / f"{_PIPELINE[0]}.py": code_for(PixelDecoderStorage, "pipeline_code")}
        if self.token_decoder is not None:
            file = folder / "token_decoder" / f"{_TOKEN_DECODER[0]}.py"
            codes[file] = code_for(type(self.token_decoder), "token_decoder_code")
        for file, code in codes.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, encoding="utf-8")
        with keep_config(folder / "token_decoder", kwargs.get("variant")):
            super().save_pretrained(str(folder), *args, **kwargs)


@contextmanager
def keep_config(folder: Path, variant: str | None) -> Iterator[None]:
    """A variant leaves the configuration there is, which says what dtype the other weights are loaded in."""
    file = folder / "config.json"
    stored = file.read_bytes() if variant is not None and file.is_file() else None
    try:
        yield
    finally:  # if saving the variant failed, too
        if stored is not None:
            file.write_bytes(stored)


def save_and_push(
    save: Callable[..., None], save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool, **kwargs: Any
) -> None:
    """Saves a pipeline, and uploads it from a directory of its own: diffusers uploads all that is in the given one."""
    save(save_directory, *args, **kwargs)
    if push_to_hub:
        kwargs.setdefault("repo_id", Path(save_directory).resolve().name)
        with tempfile.TemporaryDirectory() as folder:
            save(folder, *args, push_to_hub=True, **kwargs)


def _find_decoder(root: Path, decoder: str | None) -> Path:
    """The directory of a decoder: `lowres/` has one if the root is a LaVIT directory."""
    return root / LOWRES if decoder == LOWRES and (root / LOWRES).is_dir() else root


def lavit_beside(root: Path) -> dict[str, Any]:
    """The configuration of the LaVIT in a directory; empty if there is none, or it is that of another model."""
    file = root / "config.json"
    config = read_json_object(file) if file.is_file() else {}
    return config if config.get("model_type") == "lavit" else {}


def _kind(folder: Path) -> str | None:
    """Which decoder a directory holds, by the token decoder's configuration."""
    try:
        config = read_json_object(folder / "token_decoder" / "config.json")
    except OSError:  # loading it gives a better error
        return None
    return LOWRES if config.get("pooled_size", 0) is None else HIGHRES


def _snapshot(cls: type[DiffusionPipeline], repository: str, prefix: str, options: dict[str, Any]) -> str:
    # The configuration of the language model says which ids its codes have.
    wanted = ["config.json", f"{prefix}{cls.config_name}", *(f"{prefix}{name}/*" for name in COMPONENTS)]
    try:
        return snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["*.py"], **options)
    except LocalEntryNotFoundError as error:
        raise OSError(f"{repository} is neither a directory nor a repository that can be reached: {error}") from error


def module_here(name: str) -> Any:
    """A module of this package, or `None` where this file stands alone, as remote code."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def code_for(of_class: type, bundle: str) -> str:
    """The source of a class as one file: as it is where the class was loaded as remote code, else made for it."""
    if of_class.__module__.partition(".")[0] == PACKAGE:
        return getattr(importlib.import_module(_CODE_HERE), bundle)()
    return Path(inspect.getfile(of_class)).read_text(encoding="utf-8")


# Whether the files fit each other, and the LaVIT that they belong to.


def check_index(folder: Path, given: Collection[str] = ()) -> None:
    """Checks what a directory says of its pixel decoder, but for what is `given`, before anything is loaded from it.

    Raises:
        OSError: If a file is no JSON object, or a file of weights is corrupt.
        ValueError: If values are impossible, or do not fit together.
    """
    file = folder / _MODEL_INDEX
    index = read_json_object(file)
    for part in _CONFIG_FILES.keys() - set(given):
        entry = index.get(part, [None, None])
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str | None) for e in entry):
            raise ValueError(f"{file}: {part} must name a library and a class, got {entry!r}.")
        if entry == [None, None] and part not in ("safety_checker", "feature_extractor"):
            raise ValueError(f"{file} names no {part}, which a pixel decoder needs.")
        if part in _OF_DIFFUSERS and not _is_known(entry[0], folder / part):
            raise ValueError(f"{file}: {part} is of the library {entry[0]!r}; expected 'diffusers'.")
        if entry[0] == "diffusers" and not isinstance(getattr(diffusers, entry[1] or "", None), type):
            raise ValueError(f"{file}: {part} is of the class {entry[1]!r}, which diffusers does not have.")
        if entry[0] is not None:
            _check_part(folder / part, _CONFIG_FILES[part])
    ids = {name: index[name] for name in _IDS if index.get(name) is not None and name not in given}
    for name, value in ids.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{file}: {name} must be an id, got {value!r}.")
    if len(ids) == 2 and ids["visual_token_offset"] != ids["eoi_token_id"] + 1:
        raise ValueError(
            f"{file}: visual_token_offset ({ids['visual_token_offset']}), the id of code 0, must follow eoi_token_id "
            f"({ids['eoi_token_id']}), that of the image end."
        )
    for root in (folder, folder.parent) if folder.name == LOWRES else (folder,):
        _check_whole(root, file, ids, None if "token_decoder" in given else folder / "token_decoder")


def _is_known(library: str, folder: Path) -> bool:
    """Whether diffusers loads from it: a file of code beside the component, or what was imported already."""
    return library == "diffusers" or (folder / f"{library}.py").is_file() or library.partition(".")[0] in sys.modules


def _check_part(folder: Path, name: str) -> None:
    """Checks the configuration of a component, and that it asks for no more layers than there are tensors."""
    file = folder / name
    if not file.is_file():  # its loader says so, or looks elsewhere
        return
    values = read_json_object(file)
    count = sum(len(read_headers(weights)) for weights in sorted(folder.glob("*.safetensors")))
    if count:
        check_counts(values, count, file)


def _check_whole(root: Path, index_file: Path, ids: dict[str, int], token_decoder: Path | None) -> None:
    """Compares a pixel decoder with the configuration of the language model, if one stands beside it."""
    config, config_file = lavit_beside(root), root / "config.json"
    for name, value in ids.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{name} is {value} in {index_file}, but {config[name]} in {config_file}. Of a language model and a "
                "pixel decoder that know the same codes, `lavit assemble` makes one checkpoint."
            )
    visual = config.get("visual_tokenizer_config")
    if token_decoder is None or not isinstance(visual, dict) or not (token_decoder / "config.json").is_file():
        return
    decoder = read_json_object(token_decoder / "config.json")
    for name in ("codebook_size", "codebook_dim"):
        if decoder.get(name, visual.get(name)) != visual.get(name, decoder.get(name)):
            raise ValueError(
                f"{name} is {decoder[name]} in {token_decoder / 'config.json'}, but {visual[name]} in {config_file}: "
                "their codes mean different things."
            )


@contextmanager
def name_broken_part(folder: Path) -> Iterator[None]:
    """Finds out which file is to blame when the pipeline of a directory cannot be loaded.

    Raises:
        ValueError: If a component cannot be made of what its configuration says.
    """
    try:
        yield
    except Exception as error:
        if str(folder) not in str(error):
            for part in _OF_DIFFUSERS:
                _try_part(folder, part)
        raise


def _try_part(folder: Path, part: str) -> None:
    file = folder / part / _CONFIG_FILES[part]
    if not file.is_file():
        return
    entry = read_json_object(folder / _MODEL_INDEX).get(part)
    if entry is None:  # it is not loaded
        return
    with built_from(file, "cpu" if part == "scheduler" else "meta"):
        built = getattr(diffusers, entry[1]).from_config(read_json_object(file))
    if not isinstance(built, torch.nn.Module):
        return
    expected = state_shapes(built)
    for weights in sorted(file.parent.glob("*.safetensors")):
        found = {name: header.shape for name, header in read_headers(weights).items()}
        for name in differing_shapes(found, expected):
            raise ValueError(
                f"{file} does not fit {weights.name}: {name} would have the shape {expected[name]}, but the weights "
                f"have {found[name]}."
            )


def check_complete(folder: Path, components: dict[str, Any]) -> None:
    """Refuses networks that diffusers has left without some of their weights, with a warning at most.

    Raises:
        OSError: If a tensor is in no file.
    """
    for part, network in components.items():
        empty = {name for name, tensor in network.state_dict().items() if tensor.is_meta}
        if not empty:
            continue
        files = sorted((folder / part).glob("*.safetensors"))
        for file in files:
            empty -= read_headers(file).keys()
        if empty and files:  # else it was offloaded
            raise OSError(f"{files[0]} lacks {len(empty)} tensors, the first is {min(empty)}; save it again.")
