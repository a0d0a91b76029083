"""The classifiers: how well they read real images, what is cached, what their features are."""

from pathlib import Path

import pytest
import torch
from torch import nn

from evaluation import classifiers
from evaluation.classifiers import SmallCNN, load_classifier, predict, train_classifier


def test_training_tells_bright_images_from_dark_ones_with_the_same_bits_again() -> None:
    labels = torch.arange(256) % 2
    images = labels.view(-1, 1, 1, 1) * 1.0 - 0.5 + 0.1 * torch.randn(256, 1, 8, 8)
    models = [SmallCNN(2, 8), SmallCNN(2, 8)]
    for model in models:
        train_classifier(model, images, labels, num_epochs=8, shift=True)
        torch.rand(3)  # the caller's own generator does not matter
    assert torch.equal(predict(models[0], images), labels)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


def test_training_leaves_the_callers_generator_alone() -> None:
    model, images = SmallCNN(2, 8), torch.randn(8, 1, 8, 8)
    before = torch.get_rng_state()
    train_classifier(model, images, torch.arange(8) % 2, num_epochs=1, shift=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_what_the_last_layer_and_positions_see() -> None:
    model = SmallCNN(10, 16).eval()
    images = torch.randn(3, 1, 8, 8)
    found = model.features(images)
    assert found.pool.shape == (3, 128) and found.spatial.shape == (3, 7 * 2 * 2)
    head = model.head[-1]
    assert isinstance(head, nn.Linear)
    assert torch.equal(head(found.pool), found.logits) and torch.equal(model(images), found.logits)


def test_a_classifier_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(classifiers.EPOCHS, "digits", 1)
    first = load_classifier("digits", tmp_path)
    monkeypatch.setattr(classifiers, "train_classifier", None)
    again = load_classifier("digits", tmp_path)
    assert again.accuracy == first.accuracy and not again.model.training
    assert [path.name for path in tmp_path.iterdir()] == ["digits.pt"]


def test_other_data_has_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classifiers for digits and fashion-mnist, not for cats"):
        load_classifier("cats", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accuracy"), [("digits", 0.99), ("fashion-mnist", 0.91)])
def test_real_test_images_are_read_right(name: str, accuracy: float, tmp_path: Path) -> None:
    assert load_classifier(name, tmp_path).accuracy >= accuracy
