"""Quantized convolutions in integers: the reference for hardware.

What the emulation computes in floating point is computed here as hardware would: codes are read
from a table, points and weights are integers, and everything up to the output's scale is exact
integer arithmetic. ``book/integer.md`` is the specification; names here are its symbols.
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from numba import prange
from torch import nn

from .activations import CodebookQuantizer
from .convert import replace_layers, summary
from .threads import parallel

#: A point of the universal set is a whole number of these.
UNIT = 2**-10
#: Bits of the dynamic scales and offsets: as many as the mantissa of float32 has.
SCALE_BITS = 24


@parallel()
def _accumulate(q, w, scale, offset, stride, padding, dilation, groups, out):
    images, _, height, width = q.shape
    outputs, share, rows, columns = w.shape
    for job in prange(images * outputs):
        n, o = job // outputs, job % outputs
        first = o // (outputs // groups) * share
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                total = 0
                for c in range(share):
                    product = inside = 0
                    for u in range(rows):
                        y = i * stride[0] - padding[0] + u * dilation[0]
                        if y < 0 or y >= height:
                            continue
                        for v in range(columns):
                            x = j * stride[1] - padding[1] + v * dilation[1]
                            if x < 0 or x >= width:
                                continue
                            product += w[o, c, u, v] * q[n, first + c, y, x]
                            inside += w[o, c, u, v]
                    total += scale[n, first + c] * product
                    total += (offset[n, first + c] * inside) << 10
                out[n, o, i, j] = total


def fixed_point(scale, offset):
    """Scales and offsets of each image as whole numbers of one power of two.

    Parameters
    ----------
    scale, offset : float32 arrays, shape (N, C)

    Returns
    -------
    S, M : int64 arrays, shape (N, C)
        ``round(scale * 2**F)`` and ``round(offset * 2**F)``, of at most 24 bits and a sign.
    F : int64 array, shape (N,)
        So that the largest of an image's scales and offsets takes all 24 bits.
    """
    largest = np.maximum(scale, np.abs(offset)).max(axis=1).astype(np.float64)
    F = SCALE_BITS - np.frexp(largest)[1].astype(np.int64)  # noqa: N806
    S, M = (  # noqa: N806
        np.rint(np.ldexp(part.astype(np.float64), F[:, None])).astype(np.int64)
        for part in (scale, offset)
    )
    return S, M, F


class IntegerConv2d(nn.Module):
    """A quantized convolution in integers.

    Parameters
    ----------
    conv : QuantConv2d
        Weight and input quantized; the input by codebooks of a dyadic universal set.
    name : str
        Of the layer, for messages.

    Attributes
    ----------
    points : int32 tensor, shape (C, k)
        Points of the input's channels, in units of 2^-10; the last is repeated where a channel
        has fewer.
    weight : int32 tensor, shape (O, C/groups, kH, kW)
        In units of ``weight_scale``.
    weight_scale : float64 tensor, shape (O,)
    bias : float32 tensor, shape (O,), or None
    """

    def __init__(self, conv, name=""):
        super().__init__()
        quantizer, weight = conv.activation, conv.quantized_weight
        if weight is None or not isinstance(quantizer, CodebookQuantizer):
            raise ValueError(
                f"layer {name!r}: weight and input must both be quantized, the input by codebooks"
            )
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"layer {name!r}: only zero padding by numbers of pixels is specified, "
                f"not {conv.padding_mode!r}, {conv.padding!r}"
            )
        points = quantizer.levels.double() / UNIT
        finite = torch.isfinite(weight.points)
        numerators = torch.where(finite, weight.points, 0)
        unit = 1.0 if torch.equal(numerators, numerators.round()) else UNIT
        numerators = numerators / unit
        if quantizer.table is None or not torch.equal(points, points.round()):
            raise ValueError(f"layer {name!r}: the inputs' points are not multiples of 2^-10")
        if not torch.equal(numerators, numerators.round()):
            raise ValueError(f"layer {name!r}: the weight's points are not multiples of 2^-10")
        largest = numerators.abs().max()
        if largest >= 2**15:
            raise ValueError(f"layer {name!r}: a weight takes {int(largest)} units, more than 2^15")
        self.activation = quantizer
        codes = conv.codes.flatten(1).long()
        self.register_buffer("points", points.to(torch.int32))
        self.register_buffer(
            "weight", numerators.gather(1, codes).view(conv.weight.shape).to(torch.int32)
        )
        self.register_buffer("weight_scale", weight.scale.flatten() * unit)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.groups = conv.groups

    def codes(self, x):
        """Codes of an input, and its dynamic scales and offsets, float32 of shape (N, C, 1, 1)."""
        offset, scale = self.activation.statistics(x)
        if not torch.isfinite(scale).all():
            raise ValueError(f"layer {self.activation.layer!r}: its input holds NaN or infinity")
        return self.activation.codes((x - offset) / scale), scale, offset

    def accumulate(self, codes, S, M):  # noqa: N803
        """Accumulators of codes under fixed-point scales and offsets.

        Parameters
        ----------
        codes : int64 tensor, shape (N, C, H, W)
        S, M : int64 arrays, shape (N, C)
            See :func:`fixed_point`.

        Returns
        -------
        int64 array, shape (N, O, H', W')
        """
        by_channel = codes.transpose(0, 1).flatten(1)
        q = self.points.gather(1, by_channel).view(codes.shape[1], codes.shape[0], *codes.shape[2:])
        q = q.transpose(0, 1).contiguous().numpy()
        size = [
            (extent + 2 * p - d * (k - 1) - 1) // s + 1
            for extent, p, d, k, s in zip(
                q.shape[2:], self.padding, self.dilation, self.weight.shape[2:], self.stride,
                strict=True,
            )
        ]  # fmt: skip
        if min(size) < 1:
            raise ValueError(f"a map of {q.shape[2]}x{q.shape[3]} is smaller than the kernel")
        out = np.empty((len(q), len(self.weight), *size), np.int64)
        geometry = self.stride, self.padding, self.dilation, self.groups
        _accumulate(q, self.weight.numpy(), S, M, *geometry, out)
        return out

    @torch.no_grad()
    def forward(self, x):
        codes, scale, offset = self.codes(x.float())
        S, M, F = fixed_point(*(part[..., 0, 0].numpy() for part in (scale, offset)))  # noqa: N806
        total = self.accumulate(codes, S, M)
        # the one multiplication in floating point: the output's scale
        unit = self.weight_scale.numpy() * np.ldexp(UNIT, -F)[:, None]
        y = total * unit[:, :, None, None]
        if self.bias is not None:
            y += self.bias.double().numpy()[:, None, None]
        return torch.from_numpy(y.astype(np.float32)).to(x.dtype)


def to_integer(model):
    """A quantized network whose quantized convolutions compute in integers.

    Parameters
    ----------
    model : nn.Module
        Made by :func:`dfsq.quantize`, on the CPU; left untouched.

    Returns
    -------
    nn.Module
        With an :class:`IntegerConv2d` for each quantized layer. What is not quantized (head, tail,
        skip additions) stays in floating point.

    Raises
    ------
    ValueError
        If a layer's weight or input is in float, or its points are no multiples of 2^-10.

    Examples
    --------
    >>> import dfsq, torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1))
    >>> config = dfsq.Config.preset("dfsq-subset")
    >>> qnet = dfsq.quantize(net, torch.rand(2, 3, 16, 16), config, progress=False)
    >>> inet, x = to_integer(qnet), torch.rand(1, 3, 16, 16)
    >>> bool((inet(x) - qnet(x)).abs().max() < 1e-5)
    True
    """
    summary(model)  # refuses other networks
    made = copy.deepcopy(model)
    names = [report.layer for report in model.quantization.layers]
    replace_layers(made, {name: IntegerConv2d(made.get_submodule(name), name) for name in names})
    return made


def vectors(conv, x):
    """Everything that one integer convolution takes, computes and gives, as test vectors.

    Parameters
    ----------
    conv : IntegerConv2d
    x : float32 tensor, shape (N, C, H, W)

    Returns
    -------
    dict
        Plain lists and numbers, by the symbols of the specification; floats are exact.
    """
    codes, scale, offset = conv.codes(x)
    S, M, F = fixed_point(*(part[..., 0, 0].numpy() for part in (scale, offset)))  # noqa: N806
    arrays = {
        "x": x,
        "scale": scale[..., 0, 0],
        "offset": offset[..., 0, 0],
        "codes": codes,
        "points": conv.points,
        "weight": conv.weight,
        "weight_scale": conv.weight_scale,
        "bias": conv.bias,
        "S": S,
        "M": M,
        "F": F,
        "accumulators": conv.accumulate(codes, S, M),
        "y": conv(x),
    }
    listed = {name: None if a is None else a.tolist() for name, a in arrays.items()}
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    geometry = {name: list(value) for name, value in geometry.items()}
    return listed | geometry | {"groups": conv.groups, "non_negative": conv.activation.non_negative}


def write_vectors(path):
    """Write the test vectors of the specification: small convolutions, all their numbers."""
    from . import Config, quantize

    cases = {
        "signed": ({"in_channels": 3, "out_channels": 2, "padding": 1}, False),
        "behind a ReLU, strided": ({"in_channels": 2, "out_channels": 2, "stride": 2}, True),
        "grouped, dilated": (
            {"in_channels": 4, "out_channels": 4, "groups": 2, "dilation": 2, "padding": 2},
            False,
        ),
    }
    found = {}
    for seed, (name, (options, relu)) in enumerate(cases.items()):
        generator = torch.Generator().manual_seed(seed)
        conv = nn.Conv2d(kernel_size=3, **options)
        for parameter in conv.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5
        x = torch.randn(2, conv.in_channels, 8, 9, generator=generator)
        x = x.relu() if relu else x
        config = Config.preset("dfsq-subset", 3 + seed % 2)
        quantized = quantize(nn.Sequential(conv), x, config, progress=False)
        found[name] = vectors(IntegerConv2d(quantized[0], "0"), x)
    Path(path).write_text(json.dumps(found))
