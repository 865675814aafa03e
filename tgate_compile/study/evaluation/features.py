"""Compute features of images, their statistics, and the Frechet distance between them."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tgate_compile._errors import ConfigurationError, first_line

ABSENT = "its weights are not available: set {option} to the file {name} (from {source})"


@dataclass(frozen=True)
class WeightsFile:
    """A file with weights that are not part of this package.

    Attributes:
        what: name of the network.
        option: argument of `evaluate` that takes the file.
        name: name of the file at its source and in torch's download folder.
        source: where to get the file.
    """

    what: str
    option: str
    name: str
    source: str

    @property
    def absent(self) -> str:
        """The reason why a metric that needs the file is missing."""
        return ABSENT.format(option=self.option, name=self.name, source=self.source)

    def find(self, given: Path | None) -> Path | None:
        """Return `given`, or by default the file in torch's download folder; None if that does not exist.

        Raises:
            ConfigurationError: `given` does not exist.
        """
        if given is None:
            downloaded = Path(torch.hub.get_dir()) / "checkpoints" / self.name
            return downloaded if downloaded.is_file() else None
        if not given.is_file():
            raise ConfigurationError(f"{self.option}: the file {given} does not exist.")
        return given

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the tensors in the file.

        Raises:
            ConfigurationError: the file does not contain a dict of tensors.
        """
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise self.refused(path, error) from error
        if not isinstance(weights, dict):
            raise self.refused(path, ValueError("it does not contain a dict of tensors"))
        return weights

    def refused(self, path: Path, error: Exception) -> ConfigurationError:
        """Return an error that explains why a file cannot be used."""
        reason = first_line(error)
        return ConfigurationError(f"{self.option}: {path} does not contain weights of {self.what}: {reason[:200]}.")


INCEPTION = WeightsFile(
    "FID's Inception network", "fid_weights", "pt_inception-2015-12-05-6726825d.pth", "pytorch-fid's releases"
)
ALEXNET = WeightsFile("AlexNet", "lpips_weights", "alexnet-owt-7be5be79.pth", "torchvision's models")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


FEATURES = 2048
SIDE = 299


class _Convolution(nn.Module):
    def __init__(
        self, wide: int, wider: int, size: int | tuple[int, int], stride: int = 1, *, pad: bool = True
    ) -> None:
        super().__init__()
        rows, columns = (size, size) if isinstance(size, int) else size
        padding = (rows // 2, columns // 2) if pad else 0
        self.conv = nn.Conv2d(wide, wider, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(wider, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Branches(nn.Module):
    """A block with several branches, which are chains of convolutions given by name."""

    def chain(self, x: torch.Tensor, *names: str) -> torch.Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), "branch_pool")


class _A(_Branches):
    def __init__(self, wide: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(wide, 64, 1)
        self.branch5x5_1 = _Convolution(wide, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5)
        self.branch3x3dbl_1 = _Convolution(wide, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3)
        self.branch_pool = _Convolution(wide, pool, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fives = self.chain(x, "branch5x5_1", "branch5x5_2")
        threes = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch1x1(x), fives, threes, self.pooled(x)], 1)


class _B(_Branches):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(wide, 384, 3, 2, pad=False)
        self.branch3x3dbl_1 = _Convolution(wide, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, 2, pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        threes = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch3x3(x), threes, F.max_pool2d(x, 3, 2)], 1)


class _C(_Branches):
    def __init__(self, wide: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(wide, 192, 1)
        self.branch7x7_1 = _Convolution(wide, inner, 1)
        self.branch7x7_2 = _Convolution(inner, inner, (1, 7))
        self.branch7x7_3 = _Convolution(inner, 192, (7, 1))
        self.branch7x7dbl_1 = _Convolution(wide, inner, 1)
        self.branch7x7dbl_2 = _Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_3 = _Convolution(inner, inner, (1, 7))
        self.branch7x7dbl_4 = _Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_5 = _Convolution(inner, 192, (1, 7))
        self.branch_pool = _Convolution(wide, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sevens = self.chain(x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        doubles = self.chain(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        return torch.cat([self.branch1x1(x), sevens, doubles, self.pooled(x)], 1)


class _D(_Branches):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(wide, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, 2, pad=False)
        self.branch7x7x3_1 = _Convolution(wide, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, 2, pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        threes = self.chain(x, "branch3x3_1", "branch3x3_2")
        sevens = self.chain(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
        return torch.cat([threes, sevens, F.max_pool2d(x, 3, 2)], 1)


class _E(_Branches):
    def __init__(self, wide: int, *, pools_maximum: bool) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(wide, 320, 1)
        self.branch3x3_1 = _Convolution(wide, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Convolution(wide, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1))
        self.branch_pool = _Convolution(wide, 192, 1)
        self._pools_maximum = pools_maximum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = self.branch3x3_1(x)
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        joined = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(F.max_pool2d(x, 3, 1, 1)) if self._pools_maximum else self.pooled(x),
        ]
        return torch.cat(joined, 1)


class Inception(nn.Module):
    """The Inception network up to the features of the last average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, pad=False)
        self.Mixed_5b = _A(192, 32)
        self.Mixed_5c = _A(256, 64)
        self.Mixed_5d = _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b = _C(768, 128)
        self.Mixed_6c = _C(768, 160)
        self.Mixed_6d = _C(768, 160)
        self.Mixed_6e = _C(768, 192)
        self.Mixed_7a = _D(768)
        self.Mixed_7b = _E(1280, pools_maximum=False)
        self.Mixed_7c = _E(2048, pools_maximum=True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features, [batch, 2048], of pixels in [0, 1], [batch, 3, height, width]."""
        x = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = 2 * x - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


MSG_STATISTICS = (
    "{path} does not contain feature statistics ({reason}). Expected an .npz file with mu, [n], and sigma, [n, n], as "
    "written by pytorch-fid."
)


@dataclass(frozen=True)
class Statistics:
    """The mean and covariance of features.

    Attributes:
        mean: mean, [features], float64.
        covariance: unbiased covariance, [features, features], float64.
        count: number of images; None if unknown.
        about: description of the images and features.
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
        """Compute the statistics of `features`, [images, features], of at least two images."""
        values = features.double()
        return cls(values.mean(0), torch.cov(values.T), len(values), dict(about or {}))

    def save(self, path: Path) -> None:
        """Write an .npz file, which pytorch-fid can read as well."""
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
        """Read a file written by `save` or by pytorch-fid's `--save-stats`.

        Raises:
            ConfigurationError: the file does not contain statistics.
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
    """Return the Frechet distance ||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The trace of the root is computed from the symmetric matrix C_b^(1/2) C_a C_b^(1/2), which has the same eigenvalues.
    This avoids complex numbers, and also works for few images, whose covariance is singular.

    Source: arXiv 1706.08500, equation 6.
    """
    middle = b.root @ a.covariance @ b.root
    trace = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0.0).sqrt().sum()
    shift = a.mean - b.mean
    distance = shift @ shift + a.covariance.trace() + b.covariance.trace() - 2 * trace
    return max(float(distance), 0.0)


BATCH = 16
ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Features:
    """A feature extractor.

    Attributes:
        name: name of the features.
        extract: computes features, [batch, features], of pixels in [0, 1], [batch, 3, height, width].
        prepare: resizes an image to the size that `extract` expects.
        about: everything the features depend on; stored statistics are reused while it is unchanged.
    """

    name: str
    extract: Callable[[torch.Tensor], torch.Tensor]
    prepare: Callable[[Image.Image], Image.Image]
    about: Mapping[str, Any]

    def of(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """Return the features of all images, [images, features]."""
        found: list[torch.Tensor] = []
        batch: list[Image.Image] = []
        for image in images:
            batch.append(self.prepare(image))
            if len(batch) == BATCH:
                found.append(self.extract(pixels_of(batch)).cpu())
                batch = []
        if batch:
            found.append(self.extract(pixels_of(batch)).cpu())
        return torch.cat(found)

    def statistics(
        self, folder: Path, name: str, images: Callable[[], Iterable[Image.Image]], about: Mapping[str, Any]
    ) -> Statistics:
        """Return the statistics of `images`, from `folder` if stored there; otherwise compute and store them."""
        record = {"features": dict(self.about), **about}
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
        path = folder / f"{name}.{self.name}.{key}.npz"
        if path.exists():
            return Statistics.load(path)
        statistics = Statistics.of(self.of(images()), record)
        statistics.save(path)
        return statistics


def inception_features(weights: Path, size: int, device: torch.device) -> Features:
    """Return pytorch-fid's features of images resized to `size` x `size` pixels, as in the paper.

    Raises:
        ConfigurationError: the file does not contain Inception's weights.
    """
    network = Inception()
    tensors = {name: value for name, value in INCEPTION.load(weights).items() if not name.startswith("fc.")}
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise INCEPTION.refused(weights, error) from error
    network.eval().requires_grad_(False).to(device)

    def prepare(image: Image.Image) -> Image.Image:
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)

    about = {
        "network": "pytorch-fid Inception",
        "sha256": sha256_of(weights),
        "size": size,
        "resize": "bicubic, no crop",
    }
    return Features("inception", lambda pixels: network(pixels.to(device)), prepare, about)


def reference_statistics(given: Path, features: Features, folder: Path) -> Statistics:
    """Return the statistics of the real images that generated images are compared with.

    Args:
        given: a folder of images, or an .npz file with their statistics.
        features: feature extractor, for a folder of images.
        folder: folder for computed statistics.

    Raises:
        ConfigurationError: `given` contains neither images nor statistics.
    """
    if given.suffix == ".npz":
        return Statistics.load(given)
    files = sorted(path for path in given.rglob("*") if path.suffix.lower() in ENDINGS) if given.is_dir() else []
    if len(files) < 2:
        raise ConfigurationError(
            f"fid_reference must be a folder with at least two images ({', '.join(ENDINGS)}) or an .npz file with "
            f"their statistics, but got {given}."
        )
    listing = hashlib.sha256()
    for path in files:
        listing.update(f"{path.relative_to(given).as_posix()} {path.stat().st_size}\n".encode())
    about = {"folder": str(given), "images": len(files), "listing": listing.hexdigest()}
    return features.statistics(folder, "reference", lambda: _opened(files), about)


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return the pixels of images of equal size, in [0, 1], [batch, 3, height, width]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def _opened(files: Iterable[Path]) -> Iterable[Image.Image]:
    for path in files:
        with Image.open(path) as image:
            yield image.convert("RGB")
