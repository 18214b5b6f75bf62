"""Labelled images to learn from: scikit-learn's handwritten digits, or CIFAR-100 from its files."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import pickle

import jax
import numpy as np
from sklearn import datasets, model_selection

HELD_OUT = 600
"""Of the 1,797 digits."""
SIDE, CHANNELS, CLASSES = 32, 3, 100
"""Of CIFAR-100."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to learn from and images to test on.

    Attributes:
      train: uint8 array of shape ``(images, side, side, channels)``.
      train_labels: int32 array of shape ``(images,)``.
      test: images of the same shape that are held out.
      test_labels: their labels.
      classes: how many there are.
      white: the largest value of a pixel; the smallest is 0.
    """

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    classes: int
    white: int

    @property
    def digest(self) -> str:
        """SHA-256 of images and labels."""
        arrays = self.train, self.train_labels, self.test, self.test_labels
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def normalised(self, pixels: jax.Array) -> jax.Array:
        """Pixels in [-1, 1]."""
        return 2.0 * pixels / self.white - 1.0


def load_digits() -> Images:
    """1,797 digits of 8 × 8 pixels, a third of each class held out."""
    loaded = datasets.load_digits()
    pixels, labels = loaded.images[..., None].astype(np.uint8), loaded.target.astype(np.int32)
    split = model_selection.train_test_split(
        pixels, labels, test_size=HELD_OUT, random_state=0, stratify=labels
    )
    train, test, train_labels, test_labels = split
    return Images(train, train_labels, test, test_labels, classes=10, white=16)


def load_cifar100(directory: pathlib.Path) -> Images:
    """60,000 images of 32 × 32 pixels, 10,000 of which are held out.

    Args:
      directory: with the files ``train`` and ``test`` of CIFAR-100's python version, or with
        ``cifar-100-python``, which holds them.

    Raises:
      ValueError: if a file can't be read, or is none of CIFAR-100.
    """
    inner = directory / "cifar-100-python"
    folder = inner if inner.is_dir() else directory
    train, test = _read(folder / "train"), _read(folder / "test")
    return Images(*train, *test, classes=CLASSES, white=255)


def patches(images: jax.Array, size: int) -> jax.Array:
    """Squares of an image as tokens.

    Args:
      images: of shape ``(batch, side, side, channels)``.
      size: the side of a square.

    Returns:
      Their pixels, of shape ``(batch, (side / size)², size² · channels)``.

    Example:
      >>> patches(np.arange(16).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
      [2, 3, 6, 7]
    """
    batch, side, _, channels = images.shape
    count = side // size
    squares = images.reshape(batch, count, size, count, size, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, count**2, size**2 * channels)


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file."""
    try:
        with path.open("rb") as file:
            content = _ArraysAlone(file, encoding="bytes").load()
        pixels, labels = np.asarray(content[b"data"]), np.asarray(content[b"fine_labels"])
    except OSError as error:
        raise ValueError(
            f"--cifar100: {path} can't be read: {error.strerror}. Name the directory that "
            "cifar-100-python.tar.gz unpacks to."
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"--cifar100: {path} is no file of CIFAR-100's python version ({error}). Unpack "
            "cifar-100-python.tar.gz again, and name its directory."
        ) from None
    shaped = labels.size and pixels.shape == (*labels.shape, CHANNELS * SIDE * SIDE)
    if not shaped or pixels.dtype != np.uint8 or not set(labels.tolist()) <= set(range(CLASSES)):
        raise ValueError(
            f"--cifar100: {path} has data of shape {pixels.shape} and type {pixels.dtype} and "
            f"fine_labels of shape {labels.shape}, but images are rows of 3072 bytes, each with a "
            f"label from 0 to {CLASSES - 1}. Unpack cifar-100-python.tar.gz again, and name its "
            "directory."
        )
    images = pixels.reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
    return images, labels.astype(np.int32)


class _ArraysAlone(pickle.Unpickler):
    """A pickle can call whatever it names: this one, only what makes an array."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module, name)


_ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
