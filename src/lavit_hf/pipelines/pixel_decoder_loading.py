"""Saving and loading of pixel decoders, two of which may share one directory."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

HIGHRES, LOWRES = "highres", "lowres"
_COMPONENTS = ("token_decoder", "unet", "vae", "scheduler", "safety_checker", "feature_extractor")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")

# `model_index.json` names files beside it, so that diffusers can load the classes without this package ...
_PIPELINE = ("pipeline_lavit_pixel_decoder", "LavitPixelDecoderPipeline")
_TOKEN_DECODER = ("lavit_token_decoder", "LavitTokenDecoder")
# ... which loads its own classes instead, for which nobody has to trust remote code.
_PACKAGE = "lavit_hf"
_TOKEN_DECODER_HERE = (f"{_PACKAGE}.modeling.modeling_lavit_token_decoder", "LavitTokenDecoder")
_CODE_HERE = f"{_PACKAGE}.pipelines.remote_code"


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
            **kwargs: As for any pipeline of diffusers: `dtype`, components, `revision`, ...

        Returns:
            The pipeline.

        Raises:
            OSError: If there is no such decoder.
            ValueError: If `decoder` is anything else.
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
        pipeline = super().from_pretrained(str(folder), **kwargs)
        beside = _ids_beside(folder.parent if folder.name == LOWRES else folder)
        ids = {name: value for name, value in beside.items() if name not in kwargs}
        pipeline.register_to_config(_name_or_path=source, **ids)
        return pipeline

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

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves the pipeline, with the code that `DiffusionPipeline` needs to load it.

        Args:
            save_directory: Where to; created if needed.
            *args: As for any pipeline of diffusers.
            **kwargs: As for any pipeline of diffusers.
        """
        folder = Path(save_directory)
        codes = {folder / f"{_PIPELINE[0]}.py": _code(PixelDecoderStorage, "pipeline_code")}
        if self.token_decoder is not None:
            file = folder / "token_decoder" / f"{_TOKEN_DECODER[0]}.py"
            codes[file] = _code(type(self.token_decoder), "token_decoder_code")
        for file, code in codes.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)


def _find_decoder(root: Path, decoder: str | None) -> Path:
    """The directory of a decoder: `lowres/` has one if the root is a LaVIT directory."""
    return root / LOWRES if decoder == LOWRES and (root / LOWRES).is_dir() else root


def _ids_beside(root: Path) -> dict[str, int]:
    """The ids of codes and image end in the LaVIT of a directory, if there is one: its word counts there.

    A pixel decoder that was trained by itself and then copied to a language model does not know them.
    """
    try:
        config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("model_type") != "lavit":
        return {}
    names = ("visual_token_offset", "eoi_token_id")
    return {name: config[name] for name in names if isinstance(config.get(name), int)}


def _kind(folder: Path) -> str | None:
    """Which decoder a directory holds, by the token decoder's configuration."""
    try:
        config = json.loads((folder / "token_decoder" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it has more to say about what is wrong
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


__all__ = ["PixelDecoderStorage"]
