"""Real text as bytes: the standard library's source, or the user's own files."""

import dataclasses
import hashlib
import pathlib
import sysconfig

import numpy as np

HELD_OUT = 0.1
"""The share of the text, at its end, that is kept for validation."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes to learn from and bytes to validate on.

    Attributes:
      train: uint8 array of shape ``(bytes,)``.
      validation: uint8 array of shape ``(bytes,)``, the tail of the text.
      digest: SHA-256 of the whole text.
    """

    train: np.ndarray
    validation: np.ndarray
    digest: str

    def batches(self, steps: int, batch: int, context: int, seed: int) -> np.ndarray:
        """Random windows: int32 of shape ``(steps, batch, context + 1)``."""
        rng = np.random.default_rng(seed)
        starts = rng.integers(len(self.train) - context, size=(steps, batch))
        return _windows(self.train, starts, context)

    def validation_batch(self, windows: int, context: int) -> np.ndarray:
        """Evenly spaced windows: int32 of shape ``(windows, context + 1)``."""
        starts = np.linspace(0, len(self.validation) - context - 1, windows).astype(int)
        return _windows(self.validation, starts, context)


def load(path: pathlib.Path | None, context: int, out: pathlib.Path | None = None) -> Text:
    """Reads a file, the files below a directory, or the standard library's source.

    Args:
      path: a file; a directory, whose files are joined in the order of their
        paths; or None for the top-level modules of the running interpreter's
        standard library.
      context: the number of bytes a model reads at once.
      out: a directory whose files are left out: that of the results.

    Returns:
      The text, with its tail held out.

    Raises:
      ValueError: if the text can't be read, or is too short for one window.
    """
    if path is None:
        name, files = "the standard library", _standard_library()
    else:
        name, files = str(path), _files_below(path, out)
    try:
        content = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise ValueError(
            f"--text {name} can't be read: {error.strerror}: {error.filename}. Name a readable "
            "file, or a directory of such files."
        ) from None
    values = np.frombuffer(content, np.uint8)
    cut = len(values) - int(HELD_OUT * len(values))
    if len(values) - cut <= context:
        raise ValueError(
            f"--text {name} holds {len(values)} bytes in {len(files)} file(s); with --context "
            f"{context} it needs at least {int((context + 1) / HELD_OUT) + 1}. Name a longer "
            "text, or give a smaller --context."
        )
    return Text(values[:cut], values[cut:], hashlib.sha256(content).hexdigest())


def _standard_library() -> list[pathlib.Path]:
    return sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _files_below(path: pathlib.Path, out: pathlib.Path | None) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in files if out is None or out.resolve() not in file.resolve().parents]


def _windows(values: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    return values[starts[..., None] + np.arange(context + 1)].astype(np.int32)
