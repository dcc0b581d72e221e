"""The nodes of ComfyUI, called as ComfyUI calls them: inputs by name, of the kinds that they ask for."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "comfyui"


@pytest.fixture(scope="module")
def nodes():
    """The package, loaded from its folder as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_lavit", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


def run(node, **given):
    """Calls a node with its defaults, and with what is given."""
    asked = {name: kind for part in node.INPUT_TYPES().values() for name, kind in part.items()}
    assert set(given) <= set(asked)
    required = node.INPUT_TYPES()["required"]
    defaults = {
        name: kind[0][0] if isinstance(kind[0], list) else kind[1]["default"]
        for name, kind in required.items()
        if name not in given
    }
    results = getattr(node(), node.FUNCTION)(**defaults, **given)
    assert len(results) == len(node.RETURN_TYPES)
    return results if len(results) > 1 else results[0]


@pytest.fixture(scope="module")
def lavit(nodes):
    pipeline = run(nodes["LavitLoad"], checkpoint=str(ROOT / "checkpoints" / "lavit-tiny-random"), device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(2, 40, 60, 3, generator=torch.Generator().manual_seed(0))


def test_outputs_of_nodes_fit_inputs_of_others(nodes) -> None:
    asked = {
        kind[0]
        for node in nodes.values()
        for part in node.INPUT_TYPES().values()
        for kind in part.values()
        if isinstance(kind[0], str)
    }
    given = {kind for node in nodes.values() for kind in node.RETURN_TYPES}
    assert {kind for kind in asked if kind.startswith("LAVIT")} == {kind for kind in given if kind.startswith("LAVIT")}


def test_descriptions_and_answers(nodes, lavit, pictures) -> None:
    texts = run(nodes["LavitCaption"], lavit=lavit, images=pictures, max_new_tokens=8)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    alone = run(nodes["LavitCaption"], lavit=lavit, images=pictures[1:], max_new_tokens=8)
    assert alone == texts[1:]
    asked = run(
        nodes["LavitCaption"], lavit=lavit, images=pictures, question="What is it?", max_new_tokens=8, num_tokens=3
    )
    assert asked != texts


def test_drawing(nodes, lavit, pictures) -> None:
    options = {"lavit": lavit, "steps": 2, "seed": 7}
    images, codes = run(nodes["LavitDraw"], number=2, **options)
    assert images.shape == (2, 64, 64, 3) and images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
    assert len(codes) == 2 and all(len(one) for one in codes)
    second, (second_codes,) = run(nodes["LavitDraw"], **{**options, "seed": 8})
    assert torch.equal(second_codes, codes[1])
    torch.testing.assert_close(second[0], images[1], atol=2 / 255, rtol=0)
    changed, _ = run(nodes["LavitDraw"], image=pictures[:1], negative_prompt="a dog", **options)
    assert not torch.equal(changed[0], images[0])


def test_codes_and_pixels(nodes, lavit, pictures) -> None:
    codes = run(nodes["LavitCodes"], lavit=lavit, images=pictures, num_tokens=5)
    assert [len(one) for one in codes] == [5, 5]
    images = run(nodes["LavitPixels"], lavit=lavit, codes=codes, steps=2, aspect_ratio="16:9")
    assert images.shape[0] == 2 and images.shape[2] > images.shape[1]


def test_largest_seed(nodes, lavit) -> None:
    run(nodes["LavitDraw"], lavit=lavit, steps=1, number=2, seed=2**64 - 1)
