"""From a float network to a quantized one."""

import copy
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from glob import escape

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from . import budget, ranges
from .activations import (
    BuffersKeepType,
    CodebookQuantizer,
    DynamicUniformQuantizer,
    StaticUniformQuantizer,
    static_range,
)
from .cache import select_channels
from .calibration import (
    Calibration,
    calibrate,
    find_layers,
    float_digest,
    is_held_out,
    needs_inputs,
    stated_sign,
)
from .compensation import Statistics, compensate
from .config import Config
from .memory import freed_memory_kept, in_groups
from .universal import universal_set
from .weights import QuantizedWeight, quantize_weight


@dataclass
class LayerReport:
    """What was done to one layer; a row of :func:`summary`."""

    layer: str
    inputs: int
    outputs: int
    weight_bits: int
    act_bits: int
    non_negative: bool | None = None
    points: float = float("nan")  # mean number of distinct points a channel
    duplicates: int = 0
    relative_error: float = float("nan")  # squared error over the samples' own square sum
    samples: float = float("nan")  # a channel
    seconds: float = 0.0


@dataclass
class Quantization:
    """How a network was quantized; the attribute ``quantization`` of a quantized network."""

    config: Config
    layers: list = field(default_factory=list)
    calibration_digest: str = ""
    float_digest: str = ""
    state_digest: str = ""  # of the quantized network, as it was made


class QuantConv2d(BuffersKeepType, nn.Conv2d):
    """A convolution whose input and weight are quantized; an emulation in floating point.

    A cast rounds the weight and the bias; codebooks and scales stay as they are.

    Attributes
    ----------
    activation : ActivationQuantizer or None
        Applied to the input before zero padding.
    codes, points, scale : tensors or None
        Of the weight, see :class:`dfsq.weights.QuantizedWeight`.
    fitted : tuple of str
        Which of ``"weight"`` and ``"bias"`` are other float values than the float network's.
    """

    @classmethod
    def from_float(cls, conv, quantized_weight=None, activation=None, **fitted):
        """Replace `conv`; none of its parameters are shared.

        Parameters
        ----------
        conv : nn.Conv2d
        quantized_weight : QuantizedWeight, optional
        activation : ActivationQuantizer, optional
        **fitted
            ``weight`` and ``bias``: float tensors instead of those of `conv`.
        """
        new = nn.utils.skip_init(
            cls,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        weight = fitted.get("weight", conv.weight).detach().to(conv.weight).clone()
        if quantized_weight is not None:
            weight = quantized_weight.dequantize().to(weight)
        new.weight = nn.Parameter(weight, requires_grad=False)
        if conv.bias is not None:
            bias = fitted.get("bias", conv.bias).detach().to(conv.bias).clone()
            new.bias = nn.Parameter(bias, requires_grad=False)
        for name in ("codes", "points", "scale"):
            new.register_buffer(name, getattr(quantized_weight, name, None))
        new.activation = activation
        new.fitted = tuple(sorted(fitted))
        return new.to(conv.weight.device).eval()

    @property
    def quantized_weight(self):
        """The weight's :class:`dfsq.weights.QuantizedWeight`, or None."""
        if self.codes is not None:
            return QuantizedWeight(self.codes, self.points, self.scale)

    def forward(self, x):
        if self.activation is not None:
            x = self.activation(x.float()).to(x.dtype)  # statistics and codes in float32
        return super().forward(x)


def quantize(model, images, config=None, *, progress=True):
    """Quantize the convolutions of a network after training.

    Parameters
    ----------
    model : nn.Module
        Any network of ``nn.Conv2d``; it is left untouched.
    images : sequence or Calibration
        Calibration images, see :func:`dfsq.calibration.as_batches`: uint8 arrays of shape
        (H, W, C) or float tensors of shape (C, H, W) in 0..1. Or what :func:`dfsq.calibrate`
        returned, to try several configurations on one pass; those that differ only in how
        weights are chosen then share the layers' second moments as well.
    config : Config, optional
        ``Config()`` by default.
    progress : bool
        Whether to show progress bars, and at the end a table of the layers that changed and the
        names of those that stay in float.

    Returns
    -------
    nn.Module
        A copy with each chosen layer replaced by a :class:`QuantConv2d`, in eval mode, and
        with an attribute ``quantization``.

    Raises
    ------
    ValueError
        For weights, biases or images with NaN, images the network does not take, patterns that
        match no convolution, a network that is quantized or compiled already, a convolution that
        has a forward pass of its own or a forward hook, that no image reaches, or that the network
        also reaches where it cannot be replaced, as in a lambda.

    Notes
    -----
    Means and selections are in float64, which a network on Apple's MPS cannot compute: move it to
    the CPU or to CUDA.

    Examples
    --------
    >>> import dfsq, torch
    >>> _ = torch.manual_seed(0)
    >>> layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 3)
    >>> net = torch.nn.Sequential(*layers)
    >>> qnet = dfsq.quantize(net, torch.rand(2, 3, 32, 32), progress=False)
    >>> [layer.act_bits for layer in qnet.quantization.layers]
    [4, 4]
    >>> dfsq.summary(qnet)[["layer", "outputs", "weight_bits", "act_bits"]]
      layer  outputs  weight_bits  act_bits
    0     0        8            4         4
    1     2        3            4         4
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dfsq.save(qnet, f"{folder}/q.safetensors")
    ...     again = dfsq.load(f"{folder}/q.safetensors", net)
    >>> image = torch.rand(1, 3, 32, 32)
    >>> torch.equal(again(image), qnet(image))
    True
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise ValueError(
            f"config must be a dfsq.Config, such as dfsq.Config.preset('dfsq'), not {config!r}"
        )
    if isinstance(getattr(model, "quantization", None), Quantization):
        raise ValueError("the network is quantized already; give the float one")
    for name, conv in find_layers(model, config).items():
        check_replaceable(name, conv)
        for part in ("weight", "bias"):
            value = getattr(conv, part)
            if value is not None and not torch.isfinite(value).all():
                raise ValueError(f"layer {name!r}: the {part} holds NaN or infinity")
    calibration = images
    if not isinstance(images, Calibration):
        calibration = calibrate(model, images, config, progress=progress)
    _check_reached(model, config, calibration.batches)
    quantized = copied(model)
    record = Quantization(config, [], calibration.digest, float_digest(model))
    if calibration.error_units != config.error_units and calibration.layers:
        raise ValueError(
            f"the calibration has error_units {calibration.error_units!r}, the configuration "
            f"{config.error_units!r}; calibrate with this configuration"
        )
    layers = find_layers(quantized, config)
    configs = {name: config.for_layer(name) for name in layers}
    for name, conv in layers.items():
        if config.budget or configs[name].act_bits < 32:
            _check_calibrated(name, conv, configs[name], calibration)
    if calibration.float_digest not in (None, record.float_digest):
        raise ValueError("the calibration is of a network of other weights; calibrate this one")
    chosen_later = [name for name in layers if configs[name].needs_statistics]
    if chosen_later and not calibration.batches:
        raise ValueError(
            "budget, least_squares, scale_search, compensation and bias_correction need "
            "calibration images"
        )
    points, searched = dict.fromkeys(layers, (None, None)), {}
    if config.budget:
        points = budget.plan(quantized, configs, calibration)  # in float as yet
    to_search = {name: own for name, own in configs.items() if own.searches_range}
    if to_search and not config.sequential:
        numbers = {name: sides[0] for name, sides in points.items()}
        searched = ranges.search(quantized, to_search, calibration, numbers, progress=progress)
    if config.sequential:
        layers = _in_order_of_execution(quantized, layers, calibration.batches)
    for name, conv in tqdm(layers.items(), "quantizing", disable=not progress, unit="layer"):
        chosen = configs[name]
        report = LayerReport(
            name, conv.in_channels, conv.out_channels, chosen.weight_bits, chosen.act_bits
        )
        seen = calibration
        if config.sequential:
            seen = _recalibrated(quantized, name, calibration, config)
            if name in to_search:
                searched = ranges.search(quantized, {name: chosen}, seen)
        activation = None
        if chosen.act_bits < 32:
            activation = _activation(
                name, chosen, seen, report, points[name][0], searched.get(name)
            )
        weight = None if name in chosen_later else _weight(name, conv, chosen)
        replace_layers(quantized, {name: QuantConv2d.from_float(conv, weight, activation)})
        if config.sequential and name in chosen_later:
            _compensate(quantized, [name], configs, points, seen)
        record.layers.append(report)
    if chosen_later and not config.sequential:
        _compensate(quantized, chosen_later, configs, points, calibration, progress)
    record.state_digest = float_digest(quantized)
    quantized.quantization = record
    if progress:
        print(summary(quantized).to_string(index=False))
        if left := _in_float(quantized):
            shown = ", ".join(left[:6]) + (", ..." if len(left) > 6 else "")
            print(f"in float: {len(left)} layers with weights, {shown}")
    return quantized


def _in_float(model):
    """Convolutions of all kinds and linear layers that are not quantized, each with its kind."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        and not isinstance(module, QuantConv2d)
    ]


def _check_reached(model, config, batches):
    """Refuse a layer that the network also holds where it cannot be replaced, and runs there.

    In a lambda, `functools.partial` or an object that is no module it would stay in float, and
    the network be called quantized.
    """
    if not batches:
        return
    stand_ins = copied(model)
    old = find_layers(stand_ins, config)
    layers = {name: QuantConv2d.from_float(conv) for name, conv in old.items()}
    replace_layers(stand_ins, layers)
    # a copy of a lambda still calls the convolutions of the network that it was made in
    kept = [*old.items(), *find_layers(model, config).items()]
    with _noted(kept) as in_float:
        reached = _reached(stand_ins, layers, batches)
    for name in layers:
        if name in in_float:
            raise ValueError(
                f"layer {name!r} cannot be replaced: the network calls it through something else "
                "than its modules, such as a lambda, functools.partial or an object of another "
                f"kind; call it as self.{name}, or exclude it"
            )
        if name not in reached:
            raise ValueError(
                f"layer {name!r} was not run on the calibration images; exclude it, or give images "
                "that reach it"
            )


def _in_order_of_execution(model, layers, batches):
    """Layers in the order in which images reach them; those that none does come last."""
    return {name: layers[name] for name in _reached(model, layers, batches) | layers}


@torch.no_grad()
def _reached(model, layers, batches):
    """Names of the layers that images reach, in that order, as keys."""
    first = next(model.parameters())
    with _noted(layers.items()) as reached:
        for batch in batches:
            model(batch.to(first.device, first.dtype))
            if len(reached) == len(layers):
                break
    return reached


@contextmanager
def _noted(layers):
    """Names of the layers, of pairs with these, that are called meanwhile, in order, as keys."""
    called = {}
    hooks = [
        conv.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, conv in layers
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _recalibrated(model, name, calibration, config):
    """The calibration of one layer on the inputs that a partly quantized network gives it."""
    known = calibration.layers.get(name)
    pattern = (escape(name),)
    stated = pattern if known is not None and known.non_negative else ()
    return calibrate(
        model,
        calibration.batches,
        replace(config, layers=pattern, exclude=(), overrides=(), non_negative=stated),
        keep_inputs=calibration.keeps_inputs,
        progress=False,
    )


def _weight(name, conv, config):
    """A layer's quantized weight by itself; None for float."""
    if config.weight_bits == 32:
        return None
    universal = universal_set(config.universal, config.words)
    try:
        return quantize_weight(conv.weight, config.weight_bits, config.weights, universal)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None


@torch.no_grad()
def _compensate(model, names, configs, points, calibration, progress=False):
    """Choose weights and biases of layers whose activations are quantized already."""
    sizes = {name: 2 * Statistics.bytes(model.get_submodule(name)) for name in names}
    made = {}
    with tqdm(total=len(names), desc="compensating", disable=not progress, unit="layer") as bar:
        for group in in_groups(sizes):
            gathered = _gathered(model, group, calibration, progress)
            bar.unpause()  # that time is no layer's
            for name in group:
                made[name] = _compensated(
                    name,
                    model.get_submodule(name),
                    configs[name],
                    points[name][1],
                    *gathered[name],
                )
                bar.update()
            del gathered  # or the next group's would be beyond the memory limit
    replace_layers(model, made)  # only now, so that every pass is over the same network


def _gathered(model, names, calibration, progress):
    """Second moments of layers' inputs; those taken last, where they are of the same network.

    Configurations that differ in how weights are chosen have the same inputs, and to take these
    moments is most of the work. One group of layers, within the memory limit, is kept.
    """
    # of all layers, as any may lie before these; what a quantizer holds is in the digest
    quantizers = {n: m.activation for n, m in model.named_modules() if isinstance(m, QuantConv2d)}
    settings = [
        (name, type(q), *(getattr(q, field, None) for field in ("bits", "non_negative")))
        for name, q in quantizers.items()
    ]
    key = (names, float_digest(model), settings)
    have_key, have = calibration.moments
    if have_key != key:
        calibration.moments = (None, None)  # two groups would be beyond the limit
        have = _gather(model, names, calibration.batches, progress)
        calibration.moments = key, have
    return have


def _gather(model, names, batches, progress=False):
    """Second moments of layers' inputs on the calibration images, some held out.

    Returns
    -------
    dict of str to (Statistics, Statistics)
        Of three images in four, and of the fourth; a single image serves for both.
    """
    first = next(model.parameters())
    modules = {name: model.get_submodule(name) for name in names}
    gathered = {name: (Statistics(conv), Statistics(conv)) for name, conv in modules.items()}
    # of each layer its own, so that it does not matter which layers share a pass
    generators = {name: torch.Generator().manual_seed(0) for name in names}
    parts = []

    def observer(name):
        def observe(module, arguments):
            x = arguments[0].detach().float()
            q = x if module.activation is None else module.activation(x)
            for part in parts:
                for a, b in zip(x.split(1), q.split(1), strict=True):
                    gathered[name][part].add(a, b, generators[name])

        return observe

    hooks = [conv.register_forward_pre_hook(observer(name)) for name, conv in modules.items()]
    try:
        with freed_memory_kept():
            bar = tqdm(batches, "taking moments", leave=False, disable=not progress, unit="image")
            for i, batch in enumerate(bar):
                alone = len(batches) == 1
                parts[:] = (0, 1) if alone else (int(is_held_out(i, len(batches))),)
                model(batch.to(first.device, first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    for name, (fit, check) in gathered.items():
        if not fit.count + check.count:
            raise ValueError(f"layer {name!r} was not run on the calibration images; exclude it")
        if not fit.count or not check.count:  # a branch that few images take
            gathered[name] = (fit, fit) if fit.count else (check, check)
    return gathered


def _compensated(name, conv, config, points, fit, check):
    """A layer with new weights and bias."""
    given = None
    if config.weight_bits < 32 and config.weights == "subset":
        points = np.full(conv.out_channels, 2**config.weight_bits) if points is None else points
    elif config.weight_bits < 32:
        given = _weight(name, conv, config)
    found = compensate(
        conv, fit, check,
        levels=None if given is None else given.levels.double().numpy(),
        points=points,
        universal=universal_set(config.universal, config.words),
        least_squares=config.least_squares,
        compensation=config.compensation,
        scale_search=config.scale_search,
        bias_correction=config.bias_correction,
        damping=config.damping,
        order=config.order,
    )  # fmt: skip
    fitted, weight = {}, None
    if found.codes is None:
        fitted["weight"] = torch.from_numpy(found.weight)
    else:
        codes = torch.from_numpy(found.codes.astype(np.uint8))
        chosen = (found.points, found.scale) if given is None else (given.points, given.scale)
        weight = QuantizedWeight(codes, *(torch.as_tensor(part, device="cpu") for part in chosen))
    if found.bias is not None:
        fitted["bias"] = torch.from_numpy(found.bias)
    return QuantConv2d.from_float(conv, weight, conv.activation, **fitted)


def _check_calibrated(name, conv, config, calibration):
    """Refuse a calibration that does not hold what a layer's configuration needs of it."""
    if name not in calibration.layers:
        raise ValueError(f"layer {name!r} is not in the calibration; calibrate with its name")
    layer, stated = calibration.layers[name], stated_sign(config, name)
    if layer.histogram.channels != conv.in_channels:
        raise ValueError(
            f"layer {name!r} has {conv.in_channels} input channels, in the calibration "
            f"{layer.histogram.channels}; calibrate this network"
        )
    if stated is not None and stated != layer.non_negative:
        raise ValueError(
            f"layer {name!r} has the input non_negative={layer.non_negative} in the calibration, "
            f"non_negative={config.non_negative} of the configuration says {stated}; calibrate "
            "with this configuration"
        )
    if needs_inputs(config) and not calibration.keeps_inputs:
        dynamic = config.normalization == "center-max"
        raise ValueError(
            f"layer {name!r}: {config.selector if dynamic else config.normalization} needs the "
            "layers' inputs; calibrate with keep_inputs=True"
        )


def _activation(name, config, calibration, report, points, searched=None):
    """The activation quantizer of one layer, and its part of the report.

    Of a search of the ranges, `searched` has their shares and the histogram under these.
    """
    layer = calibration.layers[name]
    report.non_negative = layer.non_negative
    if config.normalization == "minmax":
        return DynamicUniformQuantizer(config.act_bits, layer.non_negative, name)
    if config.normalization != "center-max":
        if config.static_range == "minmax":
            values = np.stack([layer.low, layer.high], axis=1)
        else:
            values = layer.values()
        rows = [values.ravel()] if config.normalization == "static-tensor" else values
        ranges = [static_range(row, config.act_bits, config.static_range) for row in rows]
        return StaticUniformQuantizer(
            config.act_bits, *zip(*ranges, strict=True), layer.non_negative, name
        )
    k, channels = 2**config.act_bits, layer.histogram.channels
    if config.selector == "even":
        even = np.linspace(0 if layer.non_negative else -1, 1, k)
        report.points = k
        return CodebookQuantizer([even] * channels, None, layer.non_negative, name)
    universal = universal_set(config.universal, config.words, signed=not layer.non_negative)
    shares, histogram = (None, layer.histogram) if searched is None else searched
    data = layer.samples() if config.selector == "kmeans" else histogram
    try:
        selections = select_channels(
            data,
            k=k if points is None else points,
            method=config.selector,
            universal=universal,
            seed=config.seed,
        )
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None
    report.points = float(np.mean([len(s.points) for s in selections]))
    report.duplicates = sum(s.duplicates for s in selections)
    report.seconds = sum(s.seconds for s in selections)
    report.samples = float(layer.values_seen)
    power = layer.histogram.squares.sum()
    if config.selector == "kmeans" and calibration.error_units == "output":
        power = np.square(data, dtype=np.float64).sum()  # it takes normalized samples regardless
    unit = np.ones(channels) if shares is None else shares**2
    error = sum(square * s.sse for square, s in zip(unit, selections, strict=True))
    report.relative_error = float(error / power) if power else 0.0
    return CodebookQuantizer(
        [s.points for s in selections],
        [s.thresholds for s in selections],
        layer.non_negative,
        name,
        shares,
    )


def check_replaceable(name, conv):
    """Refuse a convolution that computes something else than its weight and settings say."""
    kind = type(conv)
    if "weight" in vars(conv):  # no parameter, nor a parametrization of one
        raise ValueError(
            f"layer {name!r} computes its weight in a hook, as torch.nn.utils.weight_norm has it; "
            "remove that before quantization, as by torch.nn.utils.remove_weight_norm"
        )
    if isinstance(conv, QuantConv2d):
        raise ValueError(f"layer {name!r} is quantized already; give the float network")
    if conv._forward_hooks or conv._forward_pre_hooks:
        raise ValueError(
            f"layer {name!r} has a forward hook, which quantization would leave out; remove it, or "
            "exclude the layer"
        )
    for method in ("forward", "_conv_forward"):
        if method in vars(conv) or getattr(kind, method) is not getattr(nn.Conv2d, method):
            raise ValueError(
                f"layer {name!r} is a {kind.__name__} with a {method} of its own, which "
                "quantization would leave out; exclude it, or put an nn.Conv2d in its place"
            )


def copied(model):
    """A copy of a network in eval mode, none of its tensors shared."""
    computed = [  # by hooks, from parameters; deepcopy refuses these
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed}).eval()


def replace_layers(model, modules):
    """Put modules, by name, in the place of others, wherever in the network these are used.

    Also in lists, tuples and dicts that are attributes, through which a network may call them.
    """
    olds = [model.get_submodule(name) for name in modules]  # held, so that their ids stay theirs
    places, seen = dict(zip(map(id, olds), modules.values(), strict=True)), set()
    for parent in list(model.modules()):
        _put(vars(parent), places, seen)


def _put(value, places, seen):
    """A value with new modules in the places of old ones; lists and dicts are changed in place."""
    if id(value) in places:
        return places[id(value)]
    if type(value) is tuple:
        parts = [_put(part, places, seen) for part in value]
        changed = any(part is not before for part, before in zip(parts, value, strict=True))
        return tuple(parts) if changed else value
    if isinstance(value, (list, dict)) and id(value) not in seen:  # one may hold itself
        seen.add(id(value))
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            replaced = _put(part, places, seen)
            if replaced is not part:
                value[key] = replaced
    return value


def summary(model):
    """The layers that were quantized, and how.

    Returns
    -------
    pandas.DataFrame
        A row a layer: name, channels in and out, bit-widths, whether its input is
        non-negative, the mean number of distinct points a channel, duplicates lost in
        snapping, the relative squared error on the calibration samples, their number a channel,
        and the seconds that selection took (where it was read from the cache, then).
    """
    if not isinstance(getattr(model, "quantization", None), Quantization):
        raise ValueError("this network was not made by dfsq.quantize or dfsq.load")
    rows = pd.DataFrame([asdict(report) for report in model.quantization.layers])
    return rows.astype({"samples": "Int64"})  # a whole number, or missing
