"""Weights of the networks that measure: files that are given, or that are where their own packages keep them."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from tgate_compile._errors import ConfigurationError

MSG_NO_FILE = "{option}: there is no file {given}."
MSG_NO_WEIGHTS = "{option}: {given} has no weights of {what}: {reason}."
ABSENT = "its weights are not at hand: give {option}, the file {name} ({source})"


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that this package does not bring.

    Attributes:
        what: the network.
        option: the argument that gives it.
        name: what it is called at its source, and in torch's own folder of downloads.
        source: where it comes from.
    """

    what: str
    option: str
    name: str
    source: str

    @property
    def absent(self) -> str:
        """Why there is no measure."""
        return ABSENT.format(option=self.option, name=self.name, source=self.source)

    def find(self, given: Path | None) -> Path | None:
        """The file given, or that among torch's downloads, if it is there.

        Raises:
            ConfigurationError: the file given is not there.
        """
        if given is None:
            downloaded = Path(torch.hub.get_dir()) / "checkpoints" / self.name
            return downloaded if downloaded.is_file() else None
        if not given.is_file():
            raise ConfigurationError(MSG_NO_FILE.format(option=self.option, given=given))
        return given

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        """The tensors in the file.

        Raises:
            ConfigurationError: there are none.
        """
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise self.refused(path, error) from error
        if not isinstance(weights, dict):
            raise self.refused(path, ValueError("it is no table of tensors"))
        return weights

    def refused(self, path: Path, error: Exception) -> ConfigurationError:
        """The error that says what is wrong with a file."""
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return ConfigurationError(
            MSG_NO_WEIGHTS.format(option=self.option, given=path, what=self.what, reason=reason[:200])
        )


INCEPTION = WeightsFile(
    "FID's Inception network", "fid_weights", "pt_inception-2015-12-05-6726825d.pth", "pytorch-fid's releases"
)
ALEXNET = WeightsFile("AlexNet", "lpips_weights", "alexnet-owt-7be5be79.pth", "torchvision's models")


def sha256_of(path: Path) -> str:
    """Of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
