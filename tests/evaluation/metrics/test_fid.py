import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics.tiny_networks import save_mean_color
from lavit_hf.evaluation.metrics import load_metric
from lavit_hf.evaluation.metrics.fid.fid import frechet_inception_distance

# Colors whose three channels vary independently: every combination of two values per channel, once.
CORNERS = np.array(np.meshgrid([0, 1], [0, 1], [0, 1])).reshape(3, -1).T


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mean_color(tmp_path_factory.mktemp("inception") / "mean_color.pt")


def draw(colors: np.ndarray, size: tuple[int, int] = (5, 4)) -> list[Image.Image]:
    return [Image.new("RGB", size, tuple(map(int, color))) for color in colors]


def closed_form(first: np.ndarray, second: np.ndarray) -> float:
    """Of normal distributions with independent features: |mean difference|^2 + |difference of deviations|^2."""
    means = first.mean(axis=0) - second.mean(axis=0)
    deviations = first.std(axis=0, ddof=1) - second.std(axis=0, ddof=1)
    return float((means**2).sum() + (deviations**2).sum())


def test_distance_is_the_closed_form(network: Path) -> None:
    generated, real = 100 + CORNERS * [10, 20, 30], 90 + CORNERS * [40, 20, 6]
    result = load_metric("fid", inception_path=network).compute(predictions=draw(generated), references=draw(real))
    assert result == {"fid": pytest.approx(closed_form(generated, real), rel=1e-6)}


def test_distance_of_features_that_depend_on_each_other(network: Path) -> None:
    """Turning both sets of features moves no distance; the closed form then is that before turning."""
    turn = np.array([[2, 2, 1], [-2, 1, 2], [1, -2, 2]])  # a rotation times 3
    generated, real = CORNERS * [4, 8, 12], 3 + CORNERS * [16, 8, 2]
    images = draw(100 + generated @ turn), draw(100 + real @ turn)
    assert abs(np.corrcoef(np.array([image.getpixel((0, 0)) for image in images[0]]).T)[0, 1]) > 0.3
    distance = frechet_inception_distance(*images, network)
    assert distance == pytest.approx(9 * closed_form(generated, real), rel=1e-5)


def test_the_same_pictures_have_no_distance(network: Path) -> None:
    images = draw(CORNERS * 50)
    assert frechet_inception_distance(images, images[::-1], network) == pytest.approx(0, abs=1e-3)


def test_paths_sizes_and_numbers_of_pictures_may_differ(network: Path, tmp_path: Path) -> None:
    colors = CORNERS * [10, 20, 30]
    images = [*draw(colors[:5]), *draw(colors[5:], size=(7, 3))]
    twice = draw(np.concatenate([colors, colors]) + 5)
    expected = closed_form(colors, np.concatenate([colors, colors]))
    assert frechet_inception_distance(images, twice, network) == pytest.approx(expected + 3 * 5**2, rel=1e-5)

    paths = [str(tmp_path / f"{index}.png") for index in range(8)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    metric = load_metric("fid", inception_path=network, batch_size=2)
    from_paths = metric.compute(predictions=paths, references=twice[:8])
    assert from_paths == metric.compute(predictions=images, references=twice[:8])


def test_only_a_batch_is_in_memory(network: Path) -> None:
    made: list[weakref.ref] = []
    most = 0

    def stream() -> Iterator[Image.Image]:
        nonlocal most
        for color in np.tile(CORNERS * 9, (4, 1)):
            (image,) = draw(color[None])
            made.append(weakref.ref(image))
            most = max(most, sum(reference() is not None for reference in made))
            yield image

    frechet_inception_distance(stream(), stream(), network, batch_size=4)
    assert most <= 4 + 2  # and the one that comes next


def test_missing_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the weights.*https://.*inception_path="):
        load_metric("fid")
    images = draw(CORNERS)
    with pytest.raises(FileNotFoundError, match=r"none.pt does not exist.*https://"):
        frechet_inception_distance(images, images, tmp_path / "none.pt")
    (tmp_path / "other.pt").write_text("something else")
    with pytest.raises(ValueError, match=r"no TorchScript file.*https://"):
        frechet_inception_distance(images, images, tmp_path / "other.pt")


def test_a_single_picture_is_refused(network: Path) -> None:
    with pytest.raises(ValueError, match="at least two"):
        frechet_inception_distance(draw(CORNERS[:1]), draw(CORNERS), network)
