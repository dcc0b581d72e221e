"""Saving and loading of pixel decoders, two of which may share one directory."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ..utils.json_files import read_json_object
from .pixel_decoder_checks import check_complete, check_index, name_broken_part

HIGHRES, LOWRES = "highres", "lowres"
_COMPONENTS = ("token_decoder", "unet", "vae", "scheduler", "safety_checker", "feature_extractor")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_IDS = ("visual_token_offset", "eoi_token_id")

# `model_index.json` names files beside it, so that diffusers can load the classes without this package ...
_PIPELINE = ("pipeline_lavit_pixel_decoder", "LavitPixelDecoderPipeline")
_TOKEN_DECODER = ("lavit_token_decoder", "LavitTokenDecoder")
# ... which loads its own classes instead, for which nobody has to trust remote code.
_PACKAGE = "lavit_hf"
_TOKEN_DECODER_HERE = (f"{_PACKAGE}.modeling.modeling_lavit_token_decoder", "LavitTokenDecoder")
_CODE_HERE = f"{_PACKAGE}.remote_code"


class PixelDecoderStorage(DiffusionPipeline):
    """What [`LavitPixelDecoderPipeline`] does differently from other pipelines when it is saved and loaded.

    `model_index.json` stands at the root of a LaVIT directory for the high-resolution decoder and in `lowres/` for the
    other one. It names classes by files of code beside it, which `DiffusionPipeline.from_pretrained(...,
    trust_remote_code=True)` runs. Loading by [`LavitPixelDecoderPipeline`] runs none of them.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, decoder: str | None = None, **kwargs: Any
    ) -> Any:
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
            hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
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
        beside = _ids_beside(folder.parent if folder.name == LOWRES else folder)
        unknown = {name: value for name, value in beside.items() if pipeline.config.get(name) is None}
        pipeline.register_to_config(_name_or_path=source, **unknown)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
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
        options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
        folder = _snapshot(cls, pretrained_model_name, "lowres/" if decoder == LOWRES else "", options)
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
            if is_remote and _module_here(_TOKEN_DECODER_HERE[0]):
                config["token_decoder"] = list(_TOKEN_DECODER_HERE)
        return config

    def to_json_string(self) -> str:
        """The content of `model_index.json`."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = list(_PIPELINE)
        config.pop("_name_or_path", None)  # a path of whoever saved it
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
        codes = {folder / f"{_PIPELINE[0]}.py": _code(PixelDecoderStorage, "pipeline_code")}
        if self.token_decoder is not None:
            file = folder / "token_decoder" / f"{_TOKEN_DECODER[0]}.py"
            codes[file] = _code(type(self.token_decoder), "token_decoder_code")
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
    yield
    if stored is not None:
        file.write_bytes(stored)


def save_and_push(
    save: Callable[..., None], save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool, **kwargs: Any
) -> None:
    """Saves a pipeline, and uploads it from a directory of its own: diffusers uploads whatever lies in the given one.

    Args:
        save: How it is saved.
        save_directory: Where to.
        *args: Of `save`.
        push_to_hub: Whether to upload it as well.
        **kwargs: Of `save`.
    """
    save(save_directory, *args, **kwargs)
    if push_to_hub:
        kwargs.setdefault("repo_id", Path(save_directory).resolve().name)
        with tempfile.TemporaryDirectory() as folder:
            save(folder, *args, push_to_hub=True, **kwargs)


def _find_decoder(root: Path, decoder: str | None) -> Path:
    """The directory of a decoder: `lowres/` has one if the root is a LaVIT directory."""
    return root / LOWRES if decoder == LOWRES and (root / LOWRES).is_dir() else root


def _ids_beside(root: Path) -> dict[str, int]:
    """The ids of codes and image end in the LaVIT of a directory, if there is one.

    A pixel decoder that was trained by itself and then copied to a language model does not know them.
    """
    try:
        config = read_json_object(root / "config.json")
    except OSError:  # there is none, or it is somebody else's business
        return {}
    if config.get("model_type") != "lavit":
        return {}
    return {name: config[name] for name in _IDS if isinstance(config.get(name), int)}


def _kind(folder: Path) -> str | None:
    """Which decoder a directory holds, by the token decoder's configuration."""
    try:
        config = read_json_object(folder / "token_decoder" / "config.json")
    except OSError:  # whoever loads it has more to say about what is wrong
        return None
    return LOWRES if config.get("pooled_size", 0) is None else HIGHRES


def _snapshot(cls: type[DiffusionPipeline], repository: str, prefix: str, options: dict[str, Any]) -> str:
    # The configuration of the language model says which ids its codes have.
    wanted = ["config.json", f"{prefix}{cls.config_name}", *(f"{prefix}{name}/*" for name in _COMPONENTS)]
    try:
        return snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["*.py"], **options)
    except LocalEntryNotFoundError as error:
        raise OSError(f"{repository} is neither a directory nor a repository that can be reached: {error}") from error


def _module_here(name: str) -> Any:
    """A module of this package, or `None` where this file stands alone, as remote code."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _code(of_class: type, bundle: str) -> str:
    """The source of a class as one file: as it is where the class was loaded as remote code, else made for it."""
    if of_class.__module__.partition(".")[0] == _PACKAGE:
        return getattr(importlib.import_module(_CODE_HERE), bundle)()
    return Path(inspect.getfile(of_class)).read_text(encoding="utf-8")


__all__ = ["PixelDecoderStorage", "keep_config"]
