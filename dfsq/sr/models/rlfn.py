"""RLFN (Kong et al., CVPR Workshops 2022): residual local features, spatial attention."""

import torch
from torch import nn
from torch.nn import functional


def _conv(in_channels, out_channels, size=3):
    return nn.Conv2d(in_channels, out_channels, size, padding=size // 2)


class SpatialAttention(nn.Module):
    """Enhanced spatial attention: a mask from a pooled map, brought back to full size."""

    def __init__(self, channels, inner=16):
        super().__init__()
        self.conv1 = _conv(channels, inner, 1)
        self.conv_f = _conv(inner, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=2)
        self.conv3 = _conv(inner, inner)
        self.conv4 = _conv(inner, channels, 1)

    def forward(self, x):
        inner = self.conv1(x)
        pooled = functional.max_pool2d(self.conv2(inner), 7, stride=3)
        coarse = functional.interpolate(self.conv3(pooled), x.shape[2:], mode="bilinear")
        return x * torch.sigmoid(self.conv4(coarse + self.conv_f(inner)))


class FeatureBlock(nn.Module):
    """Three convolutions with a skip, then attention."""

    def __init__(self, channels):
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (_conv(channels, channels) for _ in range(3))
        self.c5 = _conv(channels, channels, 1)
        self.esa = SpatialAttention(channels)
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x):
        out = x
        for conv in (self.c1_r, self.c2_r, self.c3_r):
            out = self.act(conv(out))
        return self.esa(self.c5(out + x))


class RLFN(nn.Module):
    """Residual local feature network, with the key names of the official weights.

    Parameters
    ----------
    scale : int
    features : int
    value_range : float
        The weights expect RGB in ``0..value_range``, 255 for the official ones.
    """

    head_layers = ("conv_1",)
    body_layers = ("block_*.c?_r", "block_*.c5")
    reach = 1
    attention_layers = ("block_*.esa.*",)

    def __init__(self, scale=2, features=52, value_range=255.0):
        super().__init__()
        self.scale = scale
        self.value_range = value_range
        self.conv_1 = _conv(3, features)
        for i in range(1, 7):
            setattr(self, f"block_{i}", FeatureBlock(features))
        self.conv_2 = _conv(features, features)
        self.upsampler = nn.Sequential(_conv(features, 3 * scale**2), nn.PixelShuffle(scale))

    def forward(self, x):
        return self.reconstruct(self.features(x))

    def features(self, x):
        """All but the upsampler: maps of the input's size."""
        shallow = x = self.conv_1(x * self.value_range)
        for i in range(1, 7):
            x = getattr(self, f"block_{i}")(x)
        return self.conv_2(x) + shallow

    def reconstruct(self, features):
        """The upsampler, which sees a pixel's neighbourhood only."""
        return self.upsampler(features) / self.value_range
