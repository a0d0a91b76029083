"""Metrics against torch-fidelity's own run on the same images, and facts known on paper."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common import process
from common.errors import FileError, UserError
from evaluation.classifiers import Classifier, Features, SmallCNN
from evaluation.features import ClassifierExtractor, InceptionExtractor, find_inception_weights
from evaluation.metrics import Moments, Statistics, StatisticsBuilder, compare, frechet_distance

ALONE = process.Runtime(0, 1, torch.device("cpu"))


def some_images(count: int, seed: int, size: int = 32) -> Tensor:
    """Return gray images (count, 1, size, size) uint8 whose brightness depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 200, (count, 1, size, size), generator=generator)
    return (noise + 10 * seed).to(torch.uint8)


def small_extractor() -> ClassifierExtractor:
    torch.manual_seed(0)
    classifier = Classifier(SmallCNN(10, 16).eval(), 0.5)
    return ClassifierExtractor(classifier, "digits", torch.device("cpu"))


def statistics_of(images: Tensor, extractor, batch_size: int = 7) -> Statistics:
    builder = StatisticsBuilder(len(images))
    for first in range(0, len(images), batch_size):
        builder.add(first, extractor(images[first : first + batch_size]))
    found = builder.finish(ALONE)
    assert found is not None
    return found


def save_folder(images: Tensor, folder: Path) -> str:
    folder.mkdir()
    for index, image in enumerate(images):
        rgb = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(rgb).save(folder / f"{index:03d}.png")
    return str(folder)


def library_values(folders: list[str], extractor: str, **options) -> dict[str, float]:
    """Return what torch-fidelity itself computes from two folders."""
    import torch_fidelity

    return torch_fidelity.calculate_metrics(
        input1=folders[0],
        input2=folders[1],
        feature_extractor=extractor,
        fid=True,
        isc=True,
        prc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=7,
        num_workers=0,
        verbose=False,
        **options,
    )


def assert_equal_to_library(values: dict[str, float], library: dict[str, float], name: str) -> None:
    brackets = f" ({name})" if name else ""
    fid = values[f"FD{brackets}" if name else "FID"]
    assert fid == pytest.approx(library["frechet_inception_distance"], rel=1e-4)
    assert values[f"IS{brackets}"] == pytest.approx(library["inception_score_mean"], rel=1e-5)
    assert values["precision"] == library["precision"]
    assert values["recall"] == library["recall"]


def test_the_distances_are_those_of_the_library_on_the_same_images(tmp_path: Path) -> None:
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor

    ours = small_extractor()

    class Wrapped(FeatureExtractorBase):
        """The small network, as torch-fidelity wants it."""

        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return "pool", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "pool"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            found = ours(images)
            return tuple(getattr(found, name) for name in self.features_list)

    register_feature_extractor("small", Wrapped)
    one, other = some_images(200, 1), some_images(150, 2)
    folders = [save_folder(one, tmp_path / "one"), save_folder(other, tmp_path / "other")]
    values = compare(statistics_of(one, ours), statistics_of(other, ours), ours.name)
    assert_equal_to_library(values, library_values(folders, "small"), ours.name)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of random weights of Inception's shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_args, **_options: {})
        network = FeatureExtractorInceptionV3(
            "random", ["2048"], feature_extractor_weights_path="none"
        )
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.mark.slow
def test_fid_of_inception_is_the_librarys_own(inception_weights: str, tmp_path: Path) -> None:
    ours = InceptionExtractor(inception_weights, torch.device("cpu"))
    one, other = some_images(24, 1), some_images(20, 3)
    folders = [save_folder(one, tmp_path / "one"), save_folder(other, tmp_path / "other")]
    values = compare(statistics_of(one, ours), statistics_of(other, ours), ours.name)
    library = library_values(
        folders, "inception-v3-compat", feature_extractor_weights_path=inception_weights
    )
    assert_equal_to_library(values, library, "")


@pytest.mark.slow
def test_sfid_looks_at_seven_channels_of_17_by_17_positions(inception_weights: str) -> None:
    ours = InceptionExtractor(inception_weights, torch.device("cpu"))
    branch: list[torch.Tensor] = []
    ours.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: branch.append(call[-1]))
    features = ours(some_images(2, 1))
    assert features.pool.shape == (2, 2048)
    spatial = features.spatial.view(2, 17, 17, 7)  # as TensorFlow, and so ADM's moments, have it
    assert torch.equal(spatial[1, 4, 9], branch[0][1, :7, 4, 9])
    assert features.logits.shape == (2, 1008)


def test_weights_that_could_run_code_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "inception.pth"
    torch.save({"weight": torch.zeros(1), "surprise": Path("x")}, path)
    with pytest.raises(ValueError, match=f"--inception-weights: {path} does not load"):
        InceptionExtractor(str(path), torch.device("cpu"))


def test_weights_that_are_none_are_named_in_one_line(tmp_path: Path) -> None:
    for name, content in (("text.pth", b"text"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} does not load; give torch-fid") as caught:
            InceptionExtractor(str(tmp_path / name), torch.device("cpu"))
        assert "\n" not in str(caught.value)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="does not load"):
        InceptionExtractor(str(tmp_path / "list.pth"), torch.device("cpu"))
    with pytest.raises(UserError, match=r"does not load.*: no such file"):
        InceptionExtractor(str(tmp_path), torch.device("cpu"))


def test_no_network_says_which_weights_to_give_at_once(monkeypatch, tmp_path: Path) -> None:
    module = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(f"{module}.URL_INCEPTION_V3", "http://127.0.0.1:9/inception.pth")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"can't be downloaded \(.*refused\); give torch-fid"):
        InceptionExtractor(None, torch.device("cpu"))
    assert time.monotonic() - began < 3
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "inception.pth").write_bytes(b"downloaded before")
    assert find_inception_weights() == str(tmp_path / "checkpoints" / "inception.pth")


def test_a_set_is_at_no_distance_from_itself() -> None:
    ours = small_extractor()
    found = statistics_of(some_images(300, 1), ours)
    values = compare(found, found, ours.name)
    assert values["FD (classifier features)"] == pytest.approx(0.0, abs=1e-5)
    assert values["sFD (classifier features)"] == pytest.approx(0.0, abs=1e-5)
    assert values["precision"] == values["recall"] == 1.0


def test_the_distance_of_normals_follows_its_formula() -> None:
    one = {"mu": np.array([0.0, 1.0]), "sigma": np.diag([4.0, 9.0])}
    other = {"mu": np.array([3.0, 5.0]), "sigma": np.diag([1.0, 1.0])}
    # |mu|^2 = 25; (2 - 1)^2 + (3 - 1)^2 = 5
    assert frechet_distance(one, other) == pytest.approx(30.0)


def test_moments_of_batches_are_those_of_all_rows() -> None:
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments(4)
    for part in rows.split(8):
        moments.add(part)
    found = moments.finish()
    np.testing.assert_allclose(found["mu"], rows.double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(found["sigma"], np.cov(rows.double().T), rtol=1e-9)


def test_rows_are_kept_in_the_order_of_images_and_no_more_than_allowed(monkeypatch) -> None:
    monkeypatch.setattr("evaluation.metrics.MAX_ROWS", 4)
    numbers = torch.arange(10.0)[:, None]
    builder = StatisticsBuilder(10)
    for first in (6, 0, 3, 9):
        part = numbers[first : first + 3]
        builder.add(first, Features(part, part, part))
    found = builder.finish(ALONE)
    assert found is not None
    assert found.count == 10 and found.rows.flatten().tolist() == [0.0, 3.0, 6.0, 9.0]


def test_a_flipped_bit_or_a_wrong_entry_of_saved_statistics_is_found(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    statistics_of(some_images(20, 1), small_extractor()).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"statistics\.npz is damaged \(.*\); delete it"):
        Statistics.load(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(FileError, match="is damaged"):
        Statistics.load(path)


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    found = statistics_of(some_images(20, 1), small_extractor())
    found.save(tmp_path / "statistics.npz")
    again = Statistics.load(tmp_path / "statistics.npz")
    assert again.count == 20 and torch.equal(again.rows, found.rows)
    np.testing.assert_array_equal(again.pool["sigma"], found.pool["sigma"])
    np.testing.assert_array_equal(again.spatial["mu"], found.spatial["mu"])
