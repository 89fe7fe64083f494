"""What a quantized network costs: operations, bits moved and stored, shifts and additions.

Counts, not measurements: what hardware would have to do that computes what the emulation shows.
"""

import copy
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import nn

from .activations import CodebookQuantizer, StaticUniformQuantizer
from .calibration import as_batches
from .convert import QuantConv2d, summary
from .storage import layer_parts
from .universal import shifts_and_adds, universal_set

#: Bits of a float value.
FLOAT = 32
#: Operations on each input value for dynamic statistics: an addition for the mean, two comparisons
#: for the range, a subtraction and a multiplication by a reciprocal to normalize.
STATISTICS = 5
#: Tensors of a file that belong to the inputs' quantizer.
INPUTS = ("inputs", "inputs_count", "thresholds", "shares", "low", "high")


def operations(model, height, width):
    """Operations and bits moved by each convolution, for one image.

    Parameters
    ----------
    model : nn.Module
        Float or quantized; RGB in.
    height, width : int
        Of the input, in pixels.

    Returns
    -------
    pandas.DataFrame
        A row a convolution: ``layer``; ``macs``, its multiply-accumulates; ``partial_sums``, pairs
        of an output value and an input channel that it sums over; ``inputs``, ``outputs`` and
        ``weights``, numbers of values; ``input_bits`` and ``weight_bits``, mean bits of one value,
        ``log2`` of a channel's number of points; ``moved``, bits of inputs, weights and dynamic
        scales, each read once; ``statistics``, operations on inputs for dynamic normalization.

    Raises
    ------
    ValueError
        For a network that does not take an RGB image of that size.

    Examples
    --------
    >>> import dfsq
    >>> from dfsq import cost
    >>> net = dfsq.sr.load_model("edsr-x2")
    >>> int(cost.operations(net, 360, 640).set_index("layer").macs["body.0.body.0"])
    8493465600
    """
    fixed = {
        name: (_input_bits(module), _weight_bits(module), _is_dynamic(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    counted, rows = copy.deepcopy(model).eval().to("meta"), []  # shapes are all that is needed

    def observer(name):
        def observe(conv, arguments, output):
            x = arguments[0]
            input_bits, weight_bits, dynamic = fixed[name]
            moved = input_bits * x.numel() + weight_bits * conv.weight.numel()
            rows.append(
                {
                    "layer": name,
                    "macs": output.numel() * conv.weight[0].numel(),
                    "partial_sums": output.numel() * conv.weight.shape[1],
                    "inputs": x.numel(),
                    "outputs": output.numel(),
                    "weights": conv.weight.numel(),
                    "input_bits": input_bits,
                    "weight_bits": weight_bits,
                    "moved": moved + dynamic * 2 * FLOAT * conv.in_channels,
                    "statistics": dynamic * STATISTICS * x.numel(),
                }
            )

        return observe

    for name, module in counted.named_modules():
        if isinstance(module, nn.Conv2d):
            module.activation = None
            module.register_forward_hook(observer(name))
    image = torch.empty(1, 3, height, width, device="meta", dtype=next(model.parameters()).dtype)
    try:
        with torch.no_grad():
            counted(image)
    except RuntimeError as error:
        raise ValueError(
            f"the network does not take an RGB image of {width}x{height} pixels: {error}"
        ) from error
    return pd.DataFrame(rows)


def _quantizer(conv):
    return conv.activation if isinstance(conv, QuantConv2d) else None


def _input_bits(conv):
    quantizer = _quantizer(conv)
    if isinstance(quantizer, CodebookQuantizer):
        return float(quantizer.count.double().log2().mean())
    return float(FLOAT if quantizer is None else quantizer.bits)


def _weight_bits(conv):
    if isinstance(conv, QuantConv2d) and conv.codes is not None:
        return float(torch.isfinite(conv.points).sum(1).log2().mean())
    return float(FLOAT)


def _is_dynamic(conv):
    return not isinstance(_quantizer(conv), (type(None), StaticUniformQuantizer))


def storage(model):
    """Bits that each quantized layer takes by itself, packed as in a file of :func:`dfsq.save`.

    Such a file leaves out biases and weights that are still those of the float network, which
    :func:`dfsq.load` is given; here they are counted.

    Parameters
    ----------
    model : nn.Module
        Made by :func:`dfsq.quantize`.

    Returns
    -------
    pandas.DataFrame
        A row a layer: ``layer``; ``codes``, ``codebooks`` and ``scales`` of the weight, the float
        values where it is not quantized; ``inputs``, the inputs' codebooks and ranges; ``bias``;
        ``total``; ``float``, what the layer takes in float.
    """
    summary(model)  # refuses other networks
    rows = []
    for report in model.quantization.layers:
        conv = model.get_submodule(report.layer)
        _, parts = layer_parts(conv, model.quantization.config, report)
        sizes = {name: 8 * _bytes(part) for name, part in parts.items()}
        bias = 0 if conv.bias is None else FLOAT * conv.bias.numel()
        row = {
            "layer": report.layer,
            "codes": sizes.get("codes", FLOAT * conv.weight.numel()),
            "codebooks": sizes.get("points", 0) + sizes.get("points_count", 0),
            "scales": sizes.get("scale", 0),
            "inputs": sum(sizes.get(name, 0) for name in INPUTS),
            "bias": bias,
        }
        row["total"] = sum(value for name, value in row.items() if name != "layer")
        rows.append(row | {"float": FLOAT * conv.weight.numel() + bias})
    return pd.DataFrame(rows)


def _bytes(part):
    return part.nbytes if isinstance(part, np.ndarray) else part.numel() * part.element_size()


@torch.no_grad()
def shift_adds(model, images):
    """Terms of the points that activations really take: what a multiplication costs in shifts.

    To multiply by a point that is a sum of ``t`` powers of two takes ``t`` shifts and ``t - 1``
    additions; by 0, nothing.

    Parameters
    ----------
    model : nn.Module
        Made by :func:`dfsq.quantize` with codebooks of a universal set.
    images : sequence
        As :func:`dfsq.calibration.as_batches` takes them.

    Returns
    -------
    pandas.DataFrame
        A row a layer: ``layer``; ``shifts`` and ``adds``, means over all activation values;
        ``zeros``, the share of them that are the point 0; ``shifts of points``, the mean over the
        codebooks, each point counted once.

    Raises
    ------
    ValueError
        If no layer has such codebooks.
    """
    summary(model)  # refuses other networks
    used, terms, points = {}, {}, {}

    def observer(name, quantizer):
        def observe(conv, arguments):
            x = arguments[0].float()
            offset, scale = quantizer.statistics(x)
            codes = quantizer.codes((x - offset) / scale)
            for c in range(codes.shape[1]):
                counts = torch.bincount(codes[:, c].flatten(), minlength=len(terms[name][c]))
                used[name][c] += counts.double().cpu().numpy()

        return observe

    hooks = []
    for report in model.quantization.layers:
        conv = model.get_submodule(report.layer)
        config = model.quantization.config.for_layer(report.layer)
        universal = config.universal, config.words
        if not isinstance(conv.activation, CodebookQuantizer):
            continue
        if not set(np.concatenate(conv.activation.points)) <= set(universal_set(*universal)):
            continue
        points[report.layer] = conv.activation.points
        terms[report.layer] = [_terms(row, *universal) for row in conv.activation.points]
        used[report.layer] = [np.zeros(len(row)) for row in conv.activation.points]
        observe = observer(report.layer, conv.activation)
        hooks.append(conv.register_forward_pre_hook(observe))
    if not hooks:
        raise ValueError("no layer's activations have points of a universal set on a binary grid")
    first = next(model.parameters())
    try:
        for batch in as_batches(images):
            model(batch.to(first.device, first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for name, counts in used.items():
        counts, t = np.concatenate(counts), np.concatenate(terms[name])
        rows.append(
            {
                "layer": name,
                "shifts": float(counts @ t / counts.sum()),
                "adds": float(counts @ np.maximum(t - 1, 0) / counts.sum()),
                "zeros": float(counts[np.concatenate(points[name]) == 0].sum() / counts.sum()),
                "shifts of points": float(t.mean()),
            }
        )
    return pd.DataFrame(rows)


def energy(counts, picojoules):
    """Bounds of the energy that counted operations take.

    Parameters
    ----------
    counts : pandas.DataFrame
        A row a kind of operation: ``count``; ``least`` and ``most``, names of the operations whose
        energies bound it, the same where it is known, ``none`` for no energy. Other columns are
        kept.
    picojoules : mapping of str to float
        Energy of one operation, by name.

    Returns
    -------
    pandas.DataFrame
        `counts` with ``least`` and ``most`` in joules.

    Raises
    ------
    ValueError
        If an operation has no energy, or the bounds are the wrong way round.

    Examples
    --------
    >>> import pandas as pd
    >>> from dfsq import cost
    >>> counts = pd.DataFrame(
    ...     {"part": ["products"], "count": [10**12], "least": ["add-8"], "most": ["multiply-8"]}
    ... )
    >>> cost.energy(counts, {"add-8": 0.03, "multiply-8": 0.2})[["part", "least", "most"]]
           part  least  most
    0  products   0.03   0.2
    """
    known = {"none": 0.0, **picojoules}
    missing = sorted({*counts["least"], *counts["most"]} - set(known))
    if missing:
        raise ValueError(f"no energy is given for {', '.join(missing)}; there are {list(known)}")
    bounds = {side: counts[side].map(known) for side in ("least", "most")}
    if (bounds["least"] > bounds["most"]).any():
        row = counts[bounds["least"] > bounds["most"]].iloc[0]
        raise ValueError(f"{row['least']} takes more energy than {row['most']}: swap the bounds")
    return counts.assign(**{side: 1e-12 * counts["count"] * bounds[side] for side in bounds})


def _terms(points, universal, words):
    table = _all_terms(universal, words)
    return np.array([table[point] for point in points], dtype=float)


@cache
def _all_terms(universal, words):
    return {
        point: len(shifts_and_adds(point, universal, words))
        for point in universal_set(universal, words).tolist()
    }
