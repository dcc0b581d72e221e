"""Code that travels with weights: checkpoints where the package is not installed and where it is; copying, joining."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import lavit_hf
from lavit_hf import composition, remote_code
from lavit_hf.remote_code import code_files, copy_files, join_files, save_remote_code
from standalone import compute

STANDALONE = Path(__file__).parent / "standalone.py"
PICTURE = Path(__file__).parents[1] / "examples" / "images" / "chelsea.jpg"
AUTO_CLASSES = {
    "AutoConfig": lavit_hf.LavitConfig,
    "AutoModel": lavit_hf.LavitModel,
    "AutoModelForImageTextToText": lavit_hf.LavitForConditionalGeneration,
    "AutoModelForMultimodalLM": lavit_hf.LavitForConditionalGeneration,
    "AutoImageProcessor": lavit_hf.LavitImageProcessorPil,
    "AutoTokenizer": lavit_hf.LavitTokenizer,
    "AutoProcessor": lavit_hf.ImageTextProcessor,
}
DEPENDENCIES = {"PIL", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}


def test_outputs_without_the_package_are_the_same(python: str, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    command = [python, STANDALONE, checkpoint, PICTURE, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pixel_decoder = lavit_hf.LavitPixelDecoderPipeline.from_pretrained(checkpoint)
    own_tokens = []
    for name, source in (("first", checkpoint), ("again", checkpoint), ("own-tokens", tmp_path / "own-tokens")):
        model = lavit_hf.LavitForConditionalGeneration.from_pretrained(source)
        processor = lavit_hf.ImageTextProcessor.from_pretrained(source)
        expected = compute(model, processor, pixel_decoder, str(PICTURE))
        found = torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
        own_tokens.append(int((found["own tokens"] > processor.tokenizer.eoi_token_id).sum()))
    assert own_tokens == [0, 0, 2]


@pytest.mark.parametrize("trust", [None, True, False])
@pytest.mark.parametrize("name", [name for name in AUTO_CLASSES if name != "AutoTokenizer"])
def test_the_package_comes_first(checkpoint: Path, name: str, trust: bool | None) -> None:
    found = getattr(transformers, name).from_pretrained(checkpoint, trust_remote_code=trust)
    assert type(found) is AUTO_CLASSES[name]
    if name == "AutoProcessor":
        assert type(found.tokenizer) is lavit_hf.LavitTokenizer


@pytest.mark.parametrize("trust", [None, False])
def test_the_package_comes_first_for_tokenizers(checkpoint: Path, trust: bool | None) -> None:
    # With `True`, transformers prefers remote tokenizers even to registered ones; a processor takes either.
    found = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust)
    assert type(found) is lavit_hf.LavitTokenizer


def test_parts_are_saved_with_their_code(checkpoint: Path, tmp_path: Path) -> None:
    processor = lavit_hf.ImageTextProcessor.from_pretrained(checkpoint)
    parts = {
        "visual_tokenizer": lavit_hf.LavitVisualTokenizer.from_pretrained(checkpoint),
        "tokenizer": processor.tokenizer,
        "image_processor": processor.image_processor,
    }
    expected = {
        "visual_tokenizer": ["AutoConfig", "AutoModel"],
        "tokenizer": ["AutoTokenizer"],
        "image_processor": ["AutoImageProcessor"],
    }
    files = {"visual_tokenizer": "config", "tokenizer": "tokenizer_config", "image_processor": "preprocessor_config"}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
        assert set(code_files()) <= {path.name for path in (tmp_path / name).iterdir()}
        config = transformers.PreTrainedConfig.get_config_dict(
            tmp_path / name, _configuration_file=f"{files[name]}.json"
        )
        assert sorted(config[0]["auto_map"]) == expected[name]
    found = transformers.AutoModel.from_pretrained(tmp_path / "visual_tokenizer")
    assert type(found) is lavit_hf.LavitVisualTokenizer


def test_what_is_loaded_equals_what_was_saved(checkpoint: Path, tmp_path: Path) -> None:
    """transformers' own tests compare the dictionaries of both."""
    processor = lavit_hf.ImageTextProcessor.from_pretrained(checkpoint)
    config = lavit_hf.LavitConfig.from_pretrained(checkpoint)
    new = lavit_hf.LavitImageProcessorPil(size={"height": 56, "width": 56})
    assert processor.image_processor.to_dict() == new.to_dict()
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "auto_map" not in config.to_dict() and "auto_map" not in processor.tokenizer.init_kwargs
    assert lavit_hf.LavitConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert lavit_hf.ImageTextProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_directories_of_others_are_left_alone(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    save_remote_code(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_code_does_not_compose_new_models() -> None:
    code = "".join(code_files().values())
    functions = [
        name for name, value in vars(composition).items() if getattr(value, "__module__", "") == composition.__name__
    ]
    assert "compose_model" in functions
    assert [name for name in functions if f"def {name}(" in code] == []


def test_code_has_no_undefined_names(tmp_path: Path) -> None:
    for name, code in code_files().items():
        (tmp_path / name).write_text(code)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path)]
    result = subprocess.run(ruff, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_code_needs_nothing_but_dependencies_of_transformers_and_diffusers(tmp_path: Path) -> None:
    for name, code in code_files().items():
        (tmp_path / name).write_text(code)
        found = set(transformers.dynamic_module_utils.get_imports(tmp_path / name)) - sys.stdlib_module_names
        assert found <= DEPENDENCIES


# What diffusers loads: one file each.


@pytest.mark.parametrize(
    "make", [remote_code.pipeline_code, remote_code.text_to_image_code, remote_code.token_decoder_code]
)
def test_code_stands_alone(make, tmp_path: Path) -> None:
    code = make()
    assert not re.search(r"^ *(from|import) +(\.|lavit_hf)", code, flags=re.MULTILINE)
    (tmp_path / "alone.py").write_text(code)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path / "alone.py")]
    result = subprocess.run(ruff, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    found = set(transformers.dynamic_module_utils.get_imports(tmp_path / "alone.py")) - sys.stdlib_module_names
    assert found <= {*DEPENDENCIES, "diffusers"}


def test_only_files_that_are_needed_are_taken() -> None:
    code = remote_code.token_decoder_code()
    assert "class LavitCrossAttention" in code and "class LavitTokenDecoderConfig" in code
    assert "class LavitModel" not in code and "def compose_model" not in code


def test_converted_directories_hold_it(checkpoint: Path) -> None:
    for root in (checkpoint, checkpoint / "lowres"):
        assert (root / f"{remote_code.PIPELINE_MODULE}.py").read_text() == remote_code.pipeline_code()
        decoder = root / "token_decoder" / f"{remote_code.TOKEN_DECODER_MODULE}.py"
        assert decoder.read_text() == remote_code.token_decoder_code()
    code = {root: root / f"{remote_code.TEXT_TO_IMAGE_MODULE}.py" for root in (checkpoint, checkpoint / "lowres")}
    assert code[checkpoint].read_text() == remote_code.text_to_image_code()
    assert not code[checkpoint / "lowres"].exists()  # a pixel decoder alone


# Copying and joining.


def write(folder: Path, sources: dict[str, str]) -> list[Path]:
    for name, source in sources.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    return [folder / name for name in sources]


def test_copies_import_their_siblings(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        {
            "high/main.py": (
                '"""Main."""\nfrom ..low.base import BASE\n\ndef main():\n'
                "    from .tool import (\n        tool,\n    )\n\n    return BASE + tool()\n"
            ),
            "high/tool.py": "from ..low.base import BASE\n\ndef tool():\n    return BASE\n",
            "high/unused.py": "",
            "low/base.py": (
                '"""Base."""\nBASE = 1\n\ndef late():\n    from ..high.tool import tool\n    return tool()\n'
            ),
        },
    )
    files = copy_files(paths[:1])
    assert files.keys() == {"main.py", "tool.py", "base.py"}
    assert "\nfrom .base import BASE\n" in files["main.py"] and "    from .tool import tool\n" in files["base.py"]
    package = tmp_path / "package"
    write(package, {"__init__.py": "", **files})
    code = "import package.main as m; from package.base import late; print(late(), m.main(), m.__doc__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout == "1 2 Main.\n"


def test_copies_of_the_same_name(tmp_path: Path) -> None:
    paths = write(tmp_path, {"high/same.py": "from ..low.same import x\n", "low/same.py": "x = 1\n"})
    with pytest.raises(ValueError, match="has this name, too"):
        copy_files(paths)


def test_joined_files_in_order_with_their_comments(tmp_path: Path) -> None:
    sources = {
        "main.py": (
            '"""Main."""\nimport sys as system\nfrom .middle import Middle\nfrom .base import BASE\n'
            "A, B = 1, 2\nclass Main(Middle):\n    here = (BASE, A, system.path)\n__all__ = ['Main']\n"
        ),
        "middle.py": "from .base import BASE\n\nclass Middle:\n    value = BASE\n",
        "base.py": "import os\n\n# why\nBASE = len([os])\n",
        "unused.py": "class Unused:\n    pass\n",
    }
    code = join_files(write(tmp_path, sources)[0])
    assert "import sys as system" in code and "__all__" not in code and "class Unused" not in code
    assert code.index("# why\nBASE") < code.index("class Middle") < code.index("class Main")
    namespace: dict = {}
    exec(code, namespace)
    assert namespace["Main"].value == 1 and namespace["Main"].here[1] == 1


@pytest.mark.parametrize("line", ["from . import base", "from .base import thing as other", "from .gone import thing"])
def test_imports_that_do_not_name_what_a_file_defines(tmp_path: Path, line: str) -> None:
    paths = write(tmp_path, {"main.py": f"{line}\n", "base.py": "thing = 1\n"})
    for make in (lambda: copy_files(paths[:1]), lambda: join_files(paths[0])):
        with pytest.raises(ValueError, match=f"`{line}` does not import names of a file"):
            make()


@pytest.mark.parametrize(
    "base", ["def same():\n    return 1\n", "from os import path as same\n", "import os as same\n", "same = 3\n"]
)
def test_names_that_collide(tmp_path: Path, base: str) -> None:
    main = "from .base import base\n\ndef same():\n    return base\n"
    paths = write(tmp_path, {"main.py": main, "base.py": f"{base}base = same\n"})
    with pytest.raises(ValueError, match="same means something else"):
        join_files(paths[0])


def test_equal_definitions_do_not_collide(tmp_path: Path) -> None:
    shared = "import logging\n\nlogger = logging.getLogger(__name__)\n"
    base = shared + "\ndef base():\n    logger.info('')\n"
    main = f"from .base import base\n{shared}\ndef main():\n    logger.info(base())\n"
    namespace: dict = {"__name__": "joined"}
    exec(join_files(write(tmp_path, {"main.py": main, "base.py": base})[0]), namespace)
    assert namespace["main"]() is None


def test_imports_that_cannot_be_left_out(tmp_path: Path) -> None:
    main = "def main():\n    from .base import thing\n    return thing\n"
    paths = write(tmp_path, {"main.py": main, "base.py": "thing = 1\n"})
    with pytest.raises(ValueError, match=r"main.py:1: imports of the package within functions"):
        join_files(paths[0])
