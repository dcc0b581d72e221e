"""Which files of a directory are published: those that a checkpoint consists of, and those that its owner asks for.

All other files are left out, as no list could name them: keys, data, what training leaves behind.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.utils import filter_repo_objects
from transformers.dynamic_module_utils import get_relative_import_files

from ..conversion.model_card import LICENSE, NOTICE, is_notice
from ..conversion.original import FOLDER as ORIGINAL
from ..conversion.original import LAYOUT, UNUSED
from ..evaluation import TASKS
from ..modeling.configuration_lavit import LavitConfig
from ..pipelines.pixel_decoder_files import DECODER_FOLDERS, MODEL_INDEX, read_parts
from ..pipelines.pixel_decoder_storage import COMPONENTS
from ..remote_code import PIPELINE_MODULE, TEXT_TO_IMAGE_MODULE, code_files
from ..utils.json_files import read_json_object
from ..utils.paths import is_inside
from ..utils.safetensors_files import read_headers, read_index


class PublishError(ValueError):
    """A checkpoint cannot be published or exported as it is; the message says why and what to do."""


# A file may hold anything. What is wrong with it becomes an error that names it.


WEIGHTS = ".safetensors"
_INDEX = f"{WEIGHTS}.index."


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that has to hold an object."""
    return read_json_object(path, PublishError)


def is_index(file: str) -> bool:
    """Whether a file tells which shard has which tensor; those of the original tell it of shards that are gone."""
    return _INDEX in file and (not file.startswith("original/") or file.startswith("original/unused."))


def check_weights(root: Path, files: list[str]) -> None:
    """Makes sure that what is published can be loaded: safetensors that are there, complete and readable."""
    for index in filter(is_index, files):
        for shard in sorted(read_index(root / index, PublishError)):
            if str(PurePosixPath(index).parent / shard) not in files:
                raise PublishError(f"{root / index} lists {shard}, which is not there.")
    weights = [file for file in files if file.endswith(WEIGHTS)]
    if not any("/" not in file for file in weights):
        raise PublishError(
            f"{root} has no weights in the safetensors format; pickles are not published. Save the model with "
            "`save_pretrained`, or convert the original with `lavit convert`."
        )
    for file in weights:
        read_headers(root / file, PublishError)


# Which files are published.


METRICS = ("metrics.json", "evaluation/metrics.json")

# Weights, whole or in shards, of any variant, and the indices of shards.
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model|adapter_model)([.-][\w.-]+)?\.safetensors(\.index(\.\w+)?\.json)?"
)
CONFIGURATIONS = {
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    MODEL_INDEX,
    "preprocessor_config.json",
    "processor_config.json",
    "scheduler_config.json",
}
_TEXT = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}
_CHAT_TEMPLATE = re.compile(r"additional_chat_templates/[\w.-]+\.jinja")
_UNUSED = re.compile(rf"{ORIGINAL}/{UNUSED}([.-][\w.-]+)?\.safetensors(\.index\.json)?")
_OF_ORIGINAL = re.compile(rf"{ORIGINAL}/(.*/)?(README\.md|[\w.-]+\.index\.json)")
# What `lavit evaluate` writes of single samples, in a folder of its own or beside the weights.
_EVALUATION = re.compile(
    rf"(evaluation/)?({'|'.join(map(re.escape, TASKS))})/([\w.-]+/)?"
    r"(metrics\.json|settings\.json|predictions\.jsonl|samples\.html|samples\.png|pictures/[^/]+\.png)"
)
_MODULE = re.compile(r"[A-Za-z_]\w*")
_MAPS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")

# Pickles can run code when they are loaded, whatever they are called.
_PICKLES = {"bin", "ckpt", "cloudpickle", "dill", "joblib", "pickle", "pkl", "pt", "pth", "pyc"}
_PACKED = {"bz2", "gz", "lz4", "lzma", "tar", "tgz", "xz", "z", "zip", "zst"}
_PICKLE_START = re.compile(rb"\x80[\x02-\x05]")
# Keys, tokens and passwords, by name and by content.
_OF_SECRETS = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519)(\W.*)?"
    r"|.*\.(pem|key|p12|pfx|ppk|jks|keystore|kdbx|env)"
    r"|(.*[._-])?(credentials?|secrets?|passwords?|passwd|htpasswd|netrc|pypirc)([._-].*)?"
    r"|(.*[._-])?(access|api|auth|aws|bearer|github|gitlab|hf|hub|licen[cs]e|openai|private|ssh|wandb)"
    r"[._-]?(tokens?|keys?)([._-].*)?"
    r"|(stored_)?tokens?(\.\w+)?",
    re.IGNORECASE,
)
_SECRETS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY|\b(hf_[A-Za-z0-9]{34}|gh[pousr]_[A-Za-z0-9]{36}|AKIA[A-Z0-9]{16})\b"
)
_SEARCHED = 2**24  # bytes of a file that are searched for secrets; configurations and tokenizers are smaller

_NOT_A_PART = "not part of a checkpoint; --include publishes it"
_OF_SAMPLES = "of single samples; --include-evaluation publishes it"


@dataclass
class FileList:
    """The files of a directory, as paths relative to it.

    Attributes:
        published: What is published.
        included: What of it is no part of the checkpoint.
        left_out: What is not, and why.
        refused: What is part of the checkpoint but must not be published, and why.
    """

    published: list[str] = field(default_factory=list)
    included: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def list_files(root: Path, include: Sequence[str] = (), include_evaluation: bool = False) -> FileList:
    """Finds out what of a directory is published; `include` and `include_evaluation` as in `publish`.

    Raises:
        PublishError: If a file that tells what there is cannot be read, or if all that a pattern matches is refused.
    """
    found = dict(_walk(root))
    known = _KnownFiles(root, include_evaluation)
    asked = {pattern: _matching(root, found, pattern) for pattern in include}
    wanted = {name for names in asked.values() for name in names}
    files = FileList()
    for name, reason in found.items():
        is_known = name in known
        if (is_known or name in wanted) and reason is None:
            reason = _refuse_content(root / name)
        if reason is not None:
            (files.refused if is_known else files.left_out)[name] = reason
        elif is_known or name in wanted:
            files.published.append(name)
            files.included += [] if is_known else [name]
        else:
            files.left_out[name] = _OF_SAMPLES if _EVALUATION.fullmatch(name) else _NOT_A_PART
    for pattern, names in asked.items():
        if not names:
            raise PublishError(f"{root} has nothing that --include {pattern} matches.")
        if not set(names) & {*files.published, *files.refused}:
            raise PublishError(f"{root / names[0]} is not published, even with --include: {files.left_out[names[0]]}.")
    return files


def _matching(root: Path, names: dict[str, Any], pattern: str) -> list[str]:
    patterns = [pattern, f"{pattern.rstrip('/')}/"] if (root / pattern).is_dir() else [pattern]
    return list(filter_repo_objects(names, allow_patterns=patterns))


def _walk(root: Path) -> Iterator[tuple[str, str | None]]:
    """All files, and why one must never be published, as far as its name tells; folders of tools as a whole."""

    def refuse(error: OSError) -> None:
        raise PublishError(f"{error.filename} cannot be read: {error.strerror}.") from error

    for place, folders, names in os.walk(root, onerror=refuse):
        folder = Path(place).relative_to(root)
        for name in sorted(folders):
            path = (folder / name).as_posix()
            if name.startswith(".") or name == "__pycache__":
                folders.remove(name)
                yield f"{path}/", "of a tool; never published"
            elif (root / path).is_symlink():  # which os.walk does not follow
                yield path, "a link to a directory; never published"
        folders.sort()
        for name in sorted(names):
            path = (folder / name).as_posix()
            yield path, _refuse_name(root, path)


def _refuse_name(root: Path, name: str) -> str | None:
    path = root / name
    endings = path.name.lower().split(".")[1:]
    while len(endings) > 1 and endings[-1] in _PACKED:
        endings.pop()
    if path.name.startswith("."):
        return "hidden; never published"
    if endings and endings[-1] in _PICKLES:
        return "a pickle, which can run code; never published"
    if _OF_SECRETS.fullmatch(path.name):
        return "a key, token or password by its name; never published"
    if not path.is_file():
        return "a link to nothing, or no regular file; never published"
    if path.is_symlink() and not is_inside(root, path):
        return "a link that leads out of the directory; never published"
    return None


def _refuse_content(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            content = file.read(8 if path.suffix == ".safetensors" else _SEARCHED)
        is_archive = content.startswith(b"PK\3\4") and zipfile.is_zipfile(path)
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                is_archive = any(name.endswith(".pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise PublishError(f"{path} cannot be read: {error}.") from error
    if is_archive or _PICKLE_START.match(content):
        return "a pickle, which can run code; never published"
    if _SECRETS.search(content):
        return "it holds what looks like a key or a token; never published"
    return None


class _KnownFiles:
    """What a checkpoint consists of."""

    def __init__(self, root: Path, include_evaluation: bool) -> None:
        self._include_evaluation = include_evaluation
        self._parts, code = set(), {f"{PIPELINE_MODULE}.py", f"{TEXT_TO_IMAGE_MODULE}.py", *code_files()}
        for folder in DECODER_FOLDERS:
            if (root / folder / MODEL_INDEX).is_file():
                parts, modules = read_parts(root / folder / MODEL_INDEX, PublishError)
                self._parts |= {f"{folder}{part}" for part in parts}
                code |= {f"{folder}{module}.py" for module in modules}
        for module in mapped_modules(root):
            code.add(f"{module}.py")
            if (root / f"{module}.py").is_file():
                imported = get_relative_import_files(root / f"{module}.py")
                code |= {Path(file).name for file in imported if Path(file).parent == root}
        self._code = code
        self._recorded = set(copied_files(root))

    def __contains__(self, name: str) -> bool:
        path = PurePosixPath(name)
        folder, is_file_of_model = str(path.parent), _is_file_of_model(path.name)
        if name in self._code or name in METRICS:
            return True
        if _OF_SECRETS.fullmatch(path.name):  # `license_key.txt` is no license
            return False
        if name.startswith(f"{ORIGINAL}/"):
            is_recorded = name in self._recorded and (is_file_of_model or bool(_OF_ORIGINAL.fullmatch(name)))
            return name == LAYOUT or bool(_UNUSED.fullmatch(name)) or is_recorded
        if folder == ".":
            return is_file_of_model or name == "README.md" or is_notice(name)
        if folder in self._parts:
            return is_file_of_model or is_notice(path.name)
        is_index = f"{folder}/" in DECODER_FOLDERS and path.name == MODEL_INDEX
        is_asked = self._include_evaluation and bool(_EVALUATION.fullmatch(name))
        return is_index or is_asked or bool(_CHAT_TEMPLATE.fullmatch(name))


def is_weights(name: str) -> bool:
    """Whether a file, named from the root of a checkpoint, holds weights of one of its models, or is their index."""
    path = PurePosixPath(name)
    folders = {".", *(f"{folder}{part}" for folder in DECODER_FOLDERS for part in COMPONENTS)}
    return str(path.parent) in folders and bool(_WEIGHTS.fullmatch(path.name))


def _is_file_of_model(name: str) -> bool:
    return name in CONFIGURATIONS or name in _TEXT or bool(_WEIGHTS.fullmatch(name))


def mapped_modules(root: Path) -> list[str]:
    """The modules of code beside the configurations in a directory that these name in `auto_map`."""
    found = set()
    for name in _MAPS:
        auto_map = read_object(root / name).get("auto_map", {}) if (root / name).is_file() else {}
        if not isinstance(auto_map, dict):
            raise PublishError(f"{root / name}: auto_map is not an object, but {auto_map!r:.100}.")
        for value in auto_map.values():
            for reference in value if isinstance(value, list) else [value]:
                if reference is not None and not isinstance(reference, str):
                    raise PublishError(f"{root / name}: auto_map names {reference!r:.100}, which is no class.")
                module, _, _ = (reference or "").rpartition(".")
                if _MODULE.fullmatch(module):  # of another repository: `user/name--module`
                    found.add(module)
    return sorted(found)


# Weights that derive from others are published with the licenses of these, or not at all.


# What a card says of weights that have no license of their own.
_INHERITED = (None, "other", "llama2")

_NEEDED = """{root} holds weights that derive from LaVIT's and Llama 2's{why}, but {missing}.
Add the license files of what they were converted from to the directory: the LaVIT community license, the Llama 2 Community License Agreement and its acceptable use policy, and a NOTICE with "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
Or, if these weights derive from none of them, name their license: --license apache-2.0"""  # noqa: E501 - one line each


def find_notices(files: list[str]) -> list[str]:
    """The licenses, notices and use policies among files at the root."""
    return [file for file in files if "/" not in file and is_notice(file)]


def check_licenses(root: Path, files: list[str], config: Any, stated: str | None) -> bool:
    """Refuses to publish derived weights without the files that have to go with them.

    Args:
        root: The checkpoint.
        files: The files to publish.
        config: The checkpoint's configuration; that of their base for adapters, `None` if nothing is known of it.
        stated: The license that its card or its owner states, as the Hub names it.

    Returns:
        Whether the weights have the licenses of others.
    """
    is_converted = (root / LAYOUT).is_file()
    if is_converted:
        copied = [target for target in copied_files(root) if "/" not in target and is_notice(target)]
        if missing := sorted({*(copied or ["NOTICE"])} - set(files)):
            raise PublishError(f"{root} was converted with {', '.join(missing)}, which is gone: put it back.")
    if stated not in _INHERITED or not (is_converted or _has_published_sizes(config)):
        return False
    notices = find_notices(files)
    kinds = {"a license": LICENSE, "a notice": NOTICE}
    lacking = [kind for kind, pattern in kinds.items() if not any(map(pattern.search, notices))]
    if lacking:
        why = " (it was converted)" if is_converted else " (it has the sizes of the published model)"
        raise PublishError(_NEEDED.format(root=root, why=why, missing=f"{' and '.join(lacking)} is missing"))
    return True


def copied_files(root: Path) -> list[str]:
    """What `lavit convert` took over as it was, by its own record; paths relative to the directory."""
    copied = read_object(root / LAYOUT).get("copied") if (root / LAYOUT).is_file() else {}
    if not isinstance(copied, dict) or not all(isinstance(target, str) for target in copied.values()):
        raise PublishError(f"{root / LAYOUT} is damaged: `copied` is no object of paths.")
    return list(copied.values())


def _has_published_sizes(config: Any) -> bool:
    """Whether this is the published architecture, as a fine-tuned copy of the published weights is."""
    if config is None or config.model_type != "lavit":
        return False
    text, published = config.text_config, LavitConfig().text_config
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    return all(getattr(text, name, None) == getattr(published, name) for name in names)
