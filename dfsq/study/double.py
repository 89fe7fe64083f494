"""Double precision, in which a quantized network's result does not depend on the machine.

Another processor, or another number of threads, adds up in another order, and sums differ in their
last bits. Where a value then goes to the neighbouring quantization point, all that follows differs
by far more than these bits, and so does PSNR, already in the third digit after the point. In
float64 a sum must come a billion times closer to a boundary for that: in practice never. That was
seen on CPUs, with AVX-512 and with AVX2; no GPU has been tried.

Statistics and codes of activations stay in float32, as everywhere: they are exact functions of
what is convolved, but for a rounding that float64 leaves hardly ever in doubt. The one step that
multiplies the noise of sums, least squares by a nearly singular matrix, ends in scales that are
rounded (:mod:`dfsq.compensation`). Where fitted weights stay unrounded, as in ``dfsq-exact-a``, the
noise goes on, and double precision promises nothing.
"""

from torch import cat, float64
from torch.nn import functional
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

#: Rows of a convolution's output that are computed at a time.
ROWS = 4


class convolving_in_strips(TorchFunctionMode):  # noqa: N801
    """Within this, a CPU's convolutions in float64 take a few rows at a time.

    PyTorch unfolds the whole map for them, which takes a kernel's size times its memory, 11 GB for
    the 9x9 kernel of SRResNet on an image of Set5, and two thirds more time than when the unfolded
    part fits the cache.

    Examples
    --------
    >>> import torch
    >>> conv = torch.nn.Conv2d(3, 2, 5, padding=2).double()
    >>> x = torch.rand(1, 3, 30, 20).double()
    >>> with convolving_in_strips():
    ...     y = conv(x)
    >>> torch.allclose(y, conv(x))
    True
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None  # given by name, it is left to PyTorch, as is a lone image
        if function is functional.conv2d and x is not None and x.dtype == float64 and x.ndim == 4:
            function = function if x.is_cuda else _in_strips
        return function(*args, **kwargs)


def _in_strips(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str):
        return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    (down, right), (step, _), (spread, _) = map(_pair, (padding, stride, dilation))
    x = functional.pad(x, (right, right, down, down))
    reach = spread * (weight.shape[2] - 1) + 1
    tops = range(0, max(1, x.shape[2] - reach + 1), ROWS * step)  # or PyTorch's error
    strips = (x[..., top : top + (ROWS - 1) * step + reach, :] for top in tops)
    parts = [functional.conv2d(s, weight, bias, stride, 0, dilation, groups) for s in strips]
    return cat(parts, dim=-2)
