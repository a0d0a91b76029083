"""What images are judged by: the network whose features are compared, and what reads their classes.

`features_for` says which network, `open_eyes` loads it, with what reads classes, trained if it
must be.
"""

from common import process
from common.errors import UserError
from common.files import make_writable
from evaluation.classifiers import EPOCHS, load_classifier
from evaluation.comparison import Look, Witness, describe_source
from evaluation.encoders import ReaderResult, TimmExtractor, open_encoder, train_reader
from evaluation.features import ClassifierExtractor, Extractor, InceptionExtractor
from evaluation.flags import PREFIX
from evaluation.image_sets import DatasetSet, ImageSet


def features_for(reference: str) -> str:
    """Return the network that real images are compared by, unless a flag says another."""
    return "classifier" if reference in EPOCHS else "inception"


def open_eyes(
    features: str,
    path: str,
    reference: ImageSet,
    *,
    batch_size: int,
    backbone: str,
    inception_weights: str | None,
    cache: str,
    fashion_mnist_root: str | None,
    rt: process.Runtime,
) -> tuple[Witness | None, Look]:
    """Return what reads samples, None where nothing does, and how images are looked at.

    Args:
        features: of `features_flag`.
        path: of the reference, as `open_images` takes it.
        reference: the real images there.
        batch_size: images at once.
        backbone: encoder of timm that a reader sees with.
        inception_weights: file of torch-fidelity; None downloads it.
        cache: folder of what was trained.
        fashion_mnist_root: see `load_dataset`.
        rt: this process; all ranks call this.

    Raises:
        UserError: weights cannot be had; or "classifier", and the reference tells no classes.
    """
    witness = _load_witness(features, path, reference, backbone, cache, fashion_mnist_root, rt)
    extractor = _load_extractor(features, path, witness, inception_weights, rt)
    return witness, Look(extractor, batch_size, rt)


def _load_witness(
    features: str,
    path: str,
    reference: ImageSet,
    backbone: str,
    cache: str,
    fashion_mnist_root: str | None,
    rt: process.Runtime,
) -> Witness | None:
    """Return a data set's own classifier, or a reader of it, trained if it must be."""
    named = path in EPOCHS
    if features != "classifier" and not named:
        return None
    folder = process.call_on_main(make_writable, cache, "--cache")
    if named:
        witness: Witness = process.call_on_main(load_classifier, path, folder, fashion_mnist_root)
    else:
        if not isinstance(reference, DatasetSet):
            raise UserError(f"--features classifier: {path} tells no classes")
        encoder = open_encoder(backbone, rt.device)
        source = describe_source(path, fashion_mnist_root)
        train = (reference.dataset, encoder, rt.device, folder, source)
        if rt.is_main:  # the others find it
            train_reader(*train)
        process.barrier()
        witness = train_reader(*train)
    witness.model.to(rt.device)
    return witness


def _load_extractor(
    features: str,
    path: str,
    witness: Witness | None,
    inception_weights: str | None,
    rt: process.Runtime,
) -> Extractor:
    """Return the network whose features are compared."""
    if features == "inception":
        return InceptionExtractor(inception_weights, rt.device)
    if features.startswith(PREFIX):
        return TimmExtractor(open_encoder(features, rt.device), rt.device)
    assert witness is not None
    if isinstance(witness, ReaderResult):
        return TimmExtractor(witness.model.encoder, rt.device, witness.model)
    return ClassifierExtractor(witness, path, rt.device)
