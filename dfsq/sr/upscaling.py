"""A network applied to an image, or to a photograph of any common mode."""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from .imaging import imresize, to_image, to_tensor


class NetworkError(RuntimeError):
    """A network fails on an image."""


@contextmanager
def running_on(name, width, height):
    """Within this, where a network refuses an image, the error names that and its size.

    A mistake in the network's code, of whatever other type, is shown where it is.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise NetworkError(
            f"the network fails on {name}, of {width}x{height} pixels: {reason}"
        ) from error


@torch.no_grad()
def upscale(model, lr):
    """Upscale an image with a network.

    Parameters
    ----------
    model : nn.Module
        RGB 0..1 in and out.
    lr : uint8 array, shape (H, W, 3)

    Returns
    -------
    uint8 array, shape (scale*H, scale*W, 3)
        The output clipped to 0..1 and rounded to 8 bits.

    Examples
    --------
    >>> import dfsq
    >>> (crop,) = dfsq.sr.calibration_crops(count=1, size=16)
    >>> upscale(dfsq.sr.load_model("edsr-x2"), crop).shape
    (32, 32, 3)
    """
    parameter = next(model.parameters(), torch.empty(0))  # a network may have none
    return to_image(model(to_tensor(lr).to(parameter.device, parameter.dtype)))


class Bicubic(nn.Module):
    """Plain upscaling with the interface of a network; the baseline of every table."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.unused = nn.Parameter(torch.zeros(()))  # carries device and type, as a network's do

    def forward(self, x):
        return torch.cat([to_tensor(imresize(to_image(y), self.scale)) for y in x.split(1)])


def upscale_photograph(model, image, how=upscale):
    """Upscale a photograph: upright, greyscale as greyscale, transparency kept.

    Parameters
    ----------
    model : nn.Module
        With an attribute ``scale``.
    image : PIL.Image.Image
        With 8 bits a channel. A transparency channel is upscaled by bicubic.
    how : callable
        Of the network and the pixels; :func:`upscale` by default.

    Returns
    -------
    PIL.Image.Image
        In mode L, LA, RGB or RGBA, with the colour profile of `image`, if that is of RGB or grey.

    Examples
    --------
    >>> from PIL import Image
    >>> from dfsq.sr.upscaling import Bicubic, upscale_photograph
    >>> upscale_photograph(Bicubic(4), Image.new("L", (48, 32))).size
    (192, 128)
    """
    image = ImageOps.exif_transpose(image)
    transparent = image.has_transparency_data
    grey = image.mode in ("1", "L", "LA")
    rgb = np.asarray(image.convert("RGBA" if transparent else "RGB"))
    result = Image.fromarray(how(model, rgb[..., :3]))
    if grey:
        result = result.convert("L")
    if transparent:
        result.putalpha(Image.fromarray(imresize(rgb[..., 3], model.scale)))
    profile = image.info.get("icc_profile", b"")
    if profile[16:20] == (b"GRAY" if grey else b"RGB "):  # the colour space of its numbers
        result.info["icc_profile"] = profile
    return result
