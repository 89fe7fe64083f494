"""RDN (Zhang et al., CVPR 2018): residual dense blocks, with the key names of EDSR-PyTorch."""

import torch
from torch import nn


class DenseConv(nn.Module):
    """Convolution and ReLU, whose result is appended to the input."""

    def __init__(self, channels, growth):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, growth, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return torch.cat((x, self.conv(x)), 1)


class DenseBlock(nn.Module):
    """Dense convolutions, fused by a 1x1 convolution, and a skip."""

    def __init__(self, features, growth, layers):
        super().__init__()
        self.convs = nn.Sequential(
            *(DenseConv(features + i * growth, growth) for i in range(layers))
        )
        self.LFF = nn.Conv2d(features + layers * growth, features, 1)

    def forward(self, x):
        return self.LFF(self.convs(x)) + x


class RDN(nn.Module):
    """Residual dense network.

    Parameters
    ----------
    scale : {2, 3, 4}
    blocks, layers, growth, features : int
        D, C, G and G0 of the paper; 16, 8, 64 and 64 in its larger configuration.
    value_range : float
        The weights expect RGB in ``0..value_range``.
    """

    head_layers = ("SFENet1",)
    body_layers = ("RDBs.*.convs.*.conv.0", "RDBs.*.LFF", "GFF.*")
    reach = 2

    def __init__(self, scale=4, blocks=16, layers=8, growth=64, features=64, value_range=255.0):
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"scale must be 2, 3 or 4, not {scale!r}")
        self.scale = scale
        self.value_range = value_range
        self.SFENet1 = nn.Conv2d(3, features, 3, padding=1)
        self.SFENet2 = nn.Conv2d(features, features, 3, padding=1)
        self.RDBs = nn.ModuleList(DenseBlock(features, growth, layers) for _ in range(blocks))
        self.GFF = nn.Sequential(
            nn.Conv2d(blocks * features, features, 1),
            nn.Conv2d(features, features, 3, padding=1),
        )
        upsampler, channels = [], features
        for step in [2, 2] if scale == 4 else [scale]:
            upsampler += [
                nn.Conv2d(channels, growth * step**2, 3, padding=1),
                nn.PixelShuffle(step),
            ]
            channels = growth
        self.UPNet = nn.Sequential(*upsampler, nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x):
        return self.reconstruct(self.features(x))

    def features(self, x):
        """All but the upsampler: maps of the input's size."""
        shallow = self.SFENet1(x * self.value_range)
        x, outputs = self.SFENet2(shallow), []
        for block in self.RDBs:
            x = block(x)
            outputs.append(x)
        return self.GFF(torch.cat(outputs, 1)) + shallow

    def reconstruct(self, features):
        """The upsampler, which sees a pixel's neighbourhood only."""
        return self.UPNet(features) / self.value_range
