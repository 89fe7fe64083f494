"""IMDN (Hui et al., ACM Multimedia 2019): information multi-distillation, contrast attention."""

import torch
from torch import nn


def _conv(in_channels, out_channels, size=3):
    return nn.Conv2d(in_channels, out_channels, size, padding=size // 2)


class ContrastAttention(nn.Module):
    """Scales channels by what their mean and standard deviation say."""

    def __init__(self, channels, reduction=16):
        super().__init__()
        self.conv_du = nn.Sequential(
            _conv(channels, channels // reduction, 1),
            nn.ReLU(),
            _conv(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)
        deviation = (x - mean).square().mean((2, 3), keepdim=True).sqrt()
        return x * self.conv_du(deviation + mean)


class DistillationBlock(nn.Module):
    """Three times a quarter of the channels is set aside, the rest refined further."""

    def __init__(self, channels):
        super().__init__()
        kept = channels // 4
        self.split = (kept, channels - kept)
        self.c1 = _conv(channels, channels)
        self.c2 = _conv(channels - kept, channels)
        self.c3 = _conv(channels - kept, channels)
        self.c4 = _conv(channels - kept, kept)
        self.cca = ContrastAttention(channels)
        self.c5 = _conv(channels, channels, 1)
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x):
        distilled, rest = [], x
        for conv in (self.c1, self.c2, self.c3):
            part, rest = self.act(conv(rest)).split(self.split, dim=1)
            distilled.append(part)
        distilled.append(self.c4(rest))
        return x + self.c5(self.cca(torch.cat(distilled, 1)))


class IMDN(nn.Module):
    """Information multi-distillation network, with the key names of the official weights.

    Parameters
    ----------
    scale : int
    blocks, features : int
    value_range : float
        The weights expect RGB in ``0..value_range``, 1 for the official ones.
    """

    head_layers = ("fea_conv",)
    body_layers = ("IMDB*.c?",)
    reach = 1
    attention_layers = ("IMDB*.cca.*",)

    def __init__(self, scale=2, blocks=6, features=64, value_range=1.0):
        super().__init__()
        self.scale = scale
        self.value_range = value_range
        self.fea_conv = _conv(3, features)
        for i in range(1, blocks + 1):
            setattr(self, f"IMDB{i}", DistillationBlock(features))
        self.blocks = blocks
        self.c = nn.Sequential(_conv(features * blocks, features, 1), nn.LeakyReLU(0.05))
        self.LR_conv = _conv(features, features)
        self.upsampler = nn.Sequential(_conv(features, 3 * scale**2), nn.PixelShuffle(scale))

    def forward(self, x):
        return self.reconstruct(self.features(x))

    def features(self, x):
        """All but the upsampler: maps of the input's size."""
        shallow = x = self.fea_conv(x * self.value_range)
        outputs = []
        for i in range(1, self.blocks + 1):
            x = getattr(self, f"IMDB{i}")(x)
            outputs.append(x)
        return self.LR_conv(self.c(torch.cat(outputs, 1))) + shallow

    def reconstruct(self, features):
        """The upsampler, which sees a pixel's neighbourhood only."""
        return self.upsampler(features) / self.value_range
