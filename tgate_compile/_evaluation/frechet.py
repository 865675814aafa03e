"""The Frechet distance between two sets of features, each taken as a normal distribution."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tgate_compile._errors import ConfigurationError

MSG_STATISTICS = (
    "{path} has no statistics of features: expected an .npz file with mu, [n], and sigma, [n, n], as pytorch-fid "
    "writes them: {reason}."
)


@dataclass(frozen=True)
class Statistics:
    """Of some features.

    Attributes:
        mean: [features], float64.
        covariance: [features, features], float64, unbiased.
        count: of how many images; None if nobody knows.
        about: what they were computed from.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None
    about: Mapping[str, Any]

    @cached_property
    def root(self) -> torch.Tensor:
        """The square root of the covariance. It takes seconds for Inception's 2,048 features."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: torch.Tensor = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
        return root

    @classmethod
    def of(cls, features: torch.Tensor, about: Mapping[str, Any] | None = None) -> Statistics:
        """Of `features`, [images, features], of at least two images."""
        values = features.double()
        return cls(values.mean(0), torch.cov(values.T), len(values), dict(about or {}))

    def save(self, path: Path) -> None:
        """Write an .npz file that pytorch-fid reads, too."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(
                file, mu=self.mean.numpy(), sigma=self.covariance.numpy(), count=self.count or 0,
                about=json.dumps(dict(self.about)),
            )  # fmt: skip
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """From a file of `save`, or of pytorch-fid's `--save-stats`.

        Raises:
            ConfigurationError: it is none.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (torch.from_numpy(np.asarray(file[name], np.float64)) for name in ("mu", "sigma"))
                count = int(file["count"]) if "count" in file else 0
                about = json.loads(str(file["about"])) if "about" in file else {}
        except (OSError, ValueError, KeyError) as error:
            raise ConfigurationError(MSG_STATISTICS.format(path=path, reason=error)) from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ConfigurationError(MSG_STATISTICS.format(path=path, reason=f"got {mean.shape}, {covariance.shape}"))
        return cls(mean, covariance, count or None, about)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The trace of the root is taken of the symmetric C_b^(1/2) C_a C_b^(1/2), which has the same eigenvalues: no complex
    numbers appear, and few images, whose covariances are singular, do no harm.

    Source: arXiv 1706.08500, equation 6.
    """
    middle = b.root @ a.covariance @ b.root
    trace = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0.0).sqrt().sum()
    shift = a.mean - b.mean
    distance = shift @ shift + a.covariance.trace() + b.covariance.trace() - 2 * trace
    return max(float(distance), 0.0)
