"""Scikit-learn's handwritten digits, which come with the program."""

from __future__ import annotations

import numpy as np

from tekfac.data.dataset import SPLIT_SEED, Dataset, assemble

TEST_IMAGES = 500


def load_digits_dataset() -> Dataset:
    """Scikit-learn's 1797 handwritten digits, 8×8 grey: 1297 to train on, 500 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.images[:, None].astype(np.float32),
        digits.target,
        test_size=TEST_IMAGES,
        random_state=SPLIT_SEED,
        stratify=digits.target,
    )
    return assemble("digits", x_train, y_train, x_test, y_test, classes=10)
