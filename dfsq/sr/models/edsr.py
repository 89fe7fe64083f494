"""EDSR (Lim et al., CVPR Workshops 2017), with the key names of EDSR-PyTorch."""

import torch
from torch import nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


def _conv(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, and a scaled skip; no normalization layer."""

    def __init__(self, features, residual_scale):
        super().__init__()
        self.body = nn.Sequential(
            _conv(features, features), nn.ReLU(inplace=True), _conv(features, features)
        )
        self.residual_scale = residual_scale

    def forward(self, x):
        residual = self.body(x)
        if self.residual_scale != 1:
            residual *= self.residual_scale
        residual += x  # in place: on a large photograph every map counts
        return residual


class EDSR(nn.Module):
    """Enhanced deep residual network for super-resolution.

    Parameters
    ----------
    scale : {2, 3, 4}
        Upscaling factor.
    blocks, features : int
        Number of residual blocks and of feature channels. EDSR-baseline, the network
        of the paper, has 16 and 64.
    residual_scale : float
        Factor on the residual branch; 1 for EDSR-baseline, 0.1 for the large EDSR.
    value_range : float
        The weights expect RGB in ``0..value_range`` after subtraction of the DIV2K mean:
        255 for the official files, 1 for the weights trained here. The module itself always
        takes and gives RGB in 0..1.

    Notes
    -----
    Input ``(N, 3, H, W)``, output ``(N, 3, scale*H, scale*W)``, float, not clipped.
    """

    #: The convolution that takes the image.
    head_layers = ("head.0",)
    #: The convolutions that the paper quantizes: those of the residual blocks.
    body_layers = ("body.*.body.*",)
    #: Rows of features beyond its own that the upsampler looks at, at most.
    reach = 2

    def __init__(self, scale=2, blocks=16, features=64, residual_scale=1.0, value_range=1.0):
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"scale must be 2, 3 or 4, not {scale!r}")
        self.scale = scale
        self.value_range = value_range
        self.register_buffer("mean", torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1), persistent=False)
        self.head = nn.Sequential(_conv(3, features))
        self.body = nn.Sequential(
            *(ResidualBlock(features, residual_scale) for _ in range(blocks)),
            _conv(features, features),
        )
        steps = [2] * (scale // 2) if scale != 3 else [3]
        upsampler = []
        for step in steps:
            upsampler += [_conv(features, features * step**2), nn.PixelShuffle(step)]
        self.tail = nn.Sequential(nn.Sequential(*upsampler), _conv(features, 3))

    def forward(self, x):
        return self.reconstruct(self.features(x))

    def features(self, x):
        """All but the upsampler: maps of the input's size."""
        x = self.head((x - self.mean) * self.value_range)
        features = self.body(x)
        features += x
        return features

    def reconstruct(self, features):
        """The upsampler, which sees a pixel's neighbourhood only."""
        return self.tail(features) / self.value_range + self.mean
