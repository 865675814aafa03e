"""The Inception network of the Frechet Inception distance, as pytorch-fid has it, for its weights.

The network is that of TensorFlow's 2015-12-05 release, which differs from torchvision's: its average pooling leaves the
padding out, and its last block pools the maximum. Written down here, since pytorch-fid takes its weights from the
network only and needs torchvision, whose builds have to match torch's. Parameters have the names of pytorch-fid's file
`pt_inception-2015-12-05-6726825d.pth`; that the features are the same was checked against pytorch-fid 0.3.0.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

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
    """Chains of convolutions by their names, and what is joined of them."""

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
    """From images to the features of the last average pooling."""

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
        """Features, [batch, 2048], of pixels in [0, 1], [batch, 3, height, width]."""
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
