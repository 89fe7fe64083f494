"""Large photographs in little memory.

Statistics are those of the whole map, so a network has to run layer by layer; but within a layer
nothing forbids to quantize and convolve a few rows at a time, and the upsampler, whose maps are the
largest, sees a pixel's neighbourhood only. What remains in memory are the body's own maps.
"""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from ..activations import CodebookQuantizer, StaticUniformQuantizer
from ..convert import QuantConv2d
from ..sr.imaging import to_image, to_tensor

#: Pixels of the input above which :func:`upscale_large` is worth its overhead.
LARGE = 2**20
#: Pixels of a map that are worked on at a time.
STRIP = 2**17
#: Modules that keep nothing of what goes through them.
_SEEN_THROUGH = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.BatchNorm2d, nn.Identity)


def has_parts(model):
    """Whether a network has the two parts that :func:`upscale_large` runs one after the other.

    It states so by `reach`, for the methods of the class that has it; where a class that is derived
    from it has other methods, it has to state it anew.
    """

    def owner(name):
        return next((kind for kind in type(model).__mro__ if name in vars(kind)), None)

    stated = owner("reach")
    parts = [owner(part) for part in ("forward", "features", "reconstruct")]
    return stated is not None and None not in parts and all(issubclass(stated, p) for p in parts)


@contextmanager
def convolved_in_strips(model):
    """Within the context, convolutions of stride 1 take a few rows at a time.

    The same values as otherwise, up to the order of the sums, without copies of whole maps:
    convolutions need one of the layout they work in, a quantizer one of its output. A convolution
    behind another one in an ``nn.Sequential`` writes over its input, while that sequence runs and
    if nobody else can see it: with nothing but activation functions and batch normalization
    between them, and the convolution used nowhere else.
    Quantizers without a codebook, which are controls only, still take whole maps.

    Gradients are not for this: use it under :class:`torch.no_grad`.
    """
    convs = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and set(module.stride) == {1}
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ]
    for conv in convs:
        conv.forward = _Strips(conv)
    hooks = []
    for sequence, behind in _behind_another(model):
        strips = [conv.forward for conv in behind if isinstance(conv.forward, _Strips)]
        hooks.append(sequence.register_forward_pre_hook(partial(_own, strips, True)))
        hooks.append(sequence.register_forward_hook(partial(_own, strips, False), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for conv in convs:
            del conv.forward


def _behind_another(model):
    """Each ``nn.Sequential`` with those of its convolutions whose input is seen by nobody else."""
    used = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential) and type(sequence).forward is nn.Sequential.forward:
            behind, passed_on = [], False
            for module in sequence:
                if isinstance(module, nn.Conv2d):
                    if passed_on and used[module] == 1:
                        behind.append(module)
                    passed_on = True
                elif not isinstance(module, _SEEN_THROUGH):
                    passed_on = False
            if behind:
                yield sequence, behind


def _own(strips, whether, *_):
    """A hook: whether convolutions own their inputs from now on."""
    for strip in strips:
        strip.owns_input = whether


class _Strips:
    """A convolution's forward pass, strip by strip."""

    def __init__(self, conv):
        self.conv = conv
        self.owns_input = False

    def __call__(self, x):
        conv = self.conv
        quantizer = conv.activation if isinstance(conv, QuantConv2d) else None
        whole = quantizer is not None and not isinstance(quantizer, CodebookQuantizer)
        if x.shape[2] * x.shape[3] <= STRIP or whole:
            return type(conv).forward(conv, x)
        statistics = None if quantizer is None else quantizer.statistics(x.float())
        (top, left), reach = conv.padding, conv.dilation[0] * (conv.kernel_size[0] - 1)
        height = x.shape[2] + 2 * top - reach
        width = x.shape[3] + 2 * left - conv.dilation[1] * (conv.kernel_size[1] - 1)
        shape = (x.shape[0], conv.out_channels, height, width)
        in_place = self.owns_input and shape == x.shape
        out = x if in_place else x.new_empty(shape)
        above = x[:, :, :0]  # the rows before a strip, where they have been written over
        rows = max(1, STRIP // x.shape[3])
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            first, last = start - top, stop - top + reach  # rows of the input, some beyond it
            if in_place:
                strip = torch.cat((above, x[:, :, start : min(last, height)]), dim=2)
                done = above.shape[2] + stop - start
                above = strip[:, :, max(done - top, 0) : done]
            else:
                strip = x[:, :, max(first, 0) : max(min(last, x.shape[2]), 0)]
            if quantizer is not None:
                strip = quantizer.quantized(strip.float(), *statistics).to(x.dtype)
            beyond = (left, left, max(-first, 0), max(last - x.shape[2], 0))
            out[:, :, start:stop] = functional.conv2d(
                functional.pad(strip, beyond),
                conv.weight,
                conv.bias,
                dilation=conv.dilation,
                groups=conv.groups,
            )
        return out


def _takes_statistics(conv):
    """Whether a convolution's input is quantized by what its map holds."""
    quantizer = conv.activation if isinstance(conv, QuantConv2d) else None
    return quantizer is not None and not isinstance(quantizer, StaticUniformQuantizer)


@torch.no_grad()
def upscale_large(model, lr, *, progress=False):
    """Upscale an image of many pixels within bounded memory.

    Parameters
    ----------
    model : nn.Module
        Float or quantized, as the networks of the zoo are: ``forward(x)`` is
        ``reconstruct(features(x))``, where ``features`` gives maps of the input's size, and
        ``reconstruct`` looks at ``reach`` rows of these at most beyond its own; with ``scale``.
    lr : uint8 array, shape (H, W, 3)
    progress : bool
        Show a bar of the network's layers.

    Returns
    -------
    uint8 array, shape (scale*H, scale*W, 3)
        As :func:`dfsq.sr.upscaling.upscale` gives it; statistics are over the whole image.

    Raises
    ------
    ValueError
        For a network that does not state these parts by an attribute ``reach``.

    Notes
    -----
    If the upsampler itself is quantized with statistics at run time, it takes whole maps, too.

    EDSR holds three maps of its body at a time, in float32: 768 bytes for each input pixel with 64
    features, 9.2 GB for 12 megapixels. All else is small beside that.

    Examples
    --------
    >>> import dfsq
    >>> from dfsq.study.large import upscale_large
    >>> photograph = dfsq.sr.photograph("astronaut")[:32, :48]
    >>> upscale_large(dfsq.sr.load_model("edsr-x2"), photograph).shape
    (64, 96, 3)
    """
    if not has_parts(model):
        raise ValueError(
            f"{type(model).__name__} does not state by an attribute reach that its forward is "
            "reconstruct(features(x)); dfsq.sr.upscaling.upscale takes any network"
        )
    parameter = next(model.parameters())
    height, width = lr.shape[:2]
    out = np.empty((height * model.scale, width * model.scale, 3), np.uint8)
    rows = max(1, STRIP // width)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with (
        convolved_in_strips(model),
        tqdm(
            total=len(convs),
            desc="layers",
            leave=False,
            disable=not progress,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
        ) as bar,
    ):
        ran = set()

        def count(conv, *_):
            ran.add(conv)
            bar.update()  # what it returns would take the place of the layer's result

        hooks = [conv.register_forward_hook(count) for conv in convs]
        try:
            features = model.features(to_tensor(lr).to(parameter.device, parameter.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        in_upsampler = len(convs) - bar.n
        if any(_takes_statistics(conv) for conv in convs if conv not in ran):
            rows = height
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            first = max(start - model.reach, 0)
            part = model.reconstruct(features[:, :, first : stop + model.reach])
            part = part[:, :, (start - first) * model.scale : (stop - first) * model.scale]
            out[start * model.scale : stop * model.scale] = to_image(part)
            bar.update(in_upsampler * (stop - start) / height)
    return out
