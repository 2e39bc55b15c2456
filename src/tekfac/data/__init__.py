"""Image data sets, held whole as tensors: named ones, ``.npz`` files, image folders.

A file for each kind; ``registry`` has them by name. What torchvision has is a line of
``downloads.DOWNLOADS``, anything else a file beside ``digits`` and a line of ``registry.EMBEDDED``.
"""

from tekfac.data.dataset import Dataset
from tekfac.data.downloads import DOWNLOADS
from tekfac.data.registry import (
    DATA_DIR,
    EMBEDDED,
    NAMED,
    augments,
    canonical_data_dir,
    canonical_source,
    load,
    source_name,
)

__all__ = [
    "DATA_DIR",
    "DOWNLOADS",
    "EMBEDDED",
    "NAMED",
    "Dataset",
    "augments",
    "canonical_data_dir",
    "canonical_source",
    "load",
    "source_name",
]
