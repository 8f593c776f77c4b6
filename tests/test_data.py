import dataclasses

import numpy as np
import pytest
from sklearn.datasets import load_digits

from temi.backbones import load_backbone
from temi.data import load_images


def test_digits():
    images, original = load_images("digits"), load_digits()
    assert images.images.shape == (1797, 8, 8)
    assert images.images.dtype == np.uint8
    np.testing.assert_allclose(images.images / 255 * 16, original.images, atol=0.04)
    np.testing.assert_array_equal(images.labels, original.target)
    assert images.num_classes == 10
    assert len(set(images.ids)) == len(images) == 1797


def test_fingerprint_depends_on_images_and_not_on_labels():
    images = load_images("digits")
    unlabelled = dataclasses.replace(images, labels=None, class_names=())
    assert unlabelled.num_classes is None
    assert unlabelled.fingerprint == images.fingerprint == load_images("digits").fingerprint
    changed = images.images.copy()
    changed[5, 5, 5] ^= 1
    assert dataclasses.replace(images, images=changed).fingerprint != images.fingerprint


def test_unknown_names():
    with pytest.raises(ValueError, match="dataset='didgits': one of 'digits' is allowed"):
        load_images("didgits")
    with pytest.raises(ValueError, match=r"backbone='pixel': one of 'pixels', .* is allowed"):
        load_backbone("pixel")
