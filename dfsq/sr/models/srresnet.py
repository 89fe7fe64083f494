"""SRResNet (Ledig et al., CVPR 2017): batch normalization, PReLU, 9x9 head and tail."""

import torch
from torch import nn


class Block(nn.Module):
    """Convolution, batch norm, PReLU, convolution, batch norm, and a skip."""

    def __init__(self, features):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features, eps=1e-5)
        self.prelu = nn.PReLU(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features, eps=1e-5)

    def forward(self, x):
        residual = self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x)))))
        return x + residual


class SRResNet(nn.Module):
    """SRResNet; RGB 0..1 in and out, whatever the weights expect.

    Parameters
    ----------
    scale : {2, 4}
    blocks, features : int
    signed_output : bool
        Whether the weights end in -1..1, as those of the MXNet zoo, or in the range of their input.
    value_range : float
        The weights take RGB in ``0..value_range``: 1 for the MXNet zoo, 255 for those of DFSQ's
        authors.
    """

    head_layers = ("head.0",)
    body_layers = ("blocks.*.conv*",)
    reach = 3

    def __init__(self, scale=4, blocks=16, features=64, signed_output=True, value_range=1.0):
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"scale must be 2 or 4, not {scale!r}")
        self.scale = scale
        self.signed_output = signed_output
        self.value_range = value_range
        self.head = nn.Sequential(nn.Conv2d(3, features, 9, padding=4), nn.PReLU(features))
        self.blocks = nn.Sequential(*(Block(features) for _ in range(blocks)))
        self.merge = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(features, eps=1e-5),
        )
        upsampler = []
        for _ in range(scale // 2):
            upsampler += [
                nn.Conv2d(features, 4 * features, 3, padding=1),
                nn.PixelShuffle(2),
                nn.PReLU(features),
            ]
        self.upsampler = nn.Sequential(*upsampler)
        self.tail = nn.Conv2d(features, 3, 9, padding=4)

    @torch.no_grad()
    def begin_bilinear(self):
        """Set weights, in place, with which the network is bilinear doubling, to be trained from.

        The first three feature maps are the image, residual branches begin at zero (by the scale of
        their last batch normalization, Goyal et al. 2017, arXiv 1706.02677), the upsampler
        interpolates each map by itself, and the tail takes the first three. Random weights would
        first have to learn, through all layers, to give back the image that they take.
        """
        for block in self.blocks:
            block.bn2.weight.zero_()
        self.merge[1].weight.zero_()
        image = torch.eye(3, self.tail.in_channels)
        middle = self.tail.kernel_size[0] // 2
        self.head[0].weight[:3] = 0
        self.head[0].weight[:3, :, middle, middle] = image[:, :3]
        self.head[0].bias[:3] = 0
        # of the two pixels that are made of one
        sides = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]])
        kernels = torch.einsum("iy,jx->ijyx", sides, sides).reshape(4, 3, 3)
        for layer in self.upsampler:
            if isinstance(layer, nn.Conv2d):
                layer.weight.zero_()
                for channel in range(layer.in_channels):
                    layer.weight[4 * channel : 4 * channel + 4, channel] = kernels
                layer.bias.zero_()
        self.tail.weight.zero_()
        self.tail.weight[:, :, middle, middle] = image
        self.tail.bias.zero_()

    def forward(self, x):
        return self.reconstruct(self.features(x))

    def features(self, x):
        """All but the upsampler: maps of the input's size."""
        x = self.head(x * self.value_range)
        return x + self.merge(self.blocks(x))

    def reconstruct(self, features):
        """The upsampler, which sees a pixel's neighbourhood only."""
        x = self.tail(self.upsampler(features))
        return (x + 1) / 2 if self.signed_output else x / self.value_range
