"""A quantized network in a file, at its true bit-width.

A safetensors file with, for each layer, ``codes`` (of the weight, packed row by row to the base of
the channel's number of points), the ``points`` and ``scale`` of its codebooks, the ``inputs``' own
codebooks, the ``shares`` of the range that these span where it was searched, and the ``bias`` (or
float ``weight``) where it was fitted. Points of a universal set are indices into the set. The float
parts are not in the file: :func:`load` takes them from the float network. The metadata hold the
configuration, the layer map and a checksum of all that is in the file.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .activations import CodebookQuantizer, DynamicUniformQuantizer, StaticUniformQuantizer
from .calibration import digest_of
from .config import Config
from .convert import (
    LayerReport,
    QuantConv2d,
    Quantization,
    check_replaceable,
    copied,
    float_digest,
    replace_layers,
    summary,
)
from .files import write_tensors
from .packing import pack, packed_bytes, unpack
from .universal import universal_set
from .weights import QuantizedWeight

FILE_FORMAT = "dfsq-4"


def save(model, path):
    """Write a quantized network's codes, codebooks, configuration and layer map to a file.

    Parameters
    ----------
    model : nn.Module
        Made by :func:`quantize`.
    path : path
        Of the safetensors file; it is replaced only once the new one is complete.

    Raises
    ------
    ValueError
        For a network that was not quantized, or that was cast or changed since.
    FileNotFoundError
        If there is no such folder.

    Examples
    --------
    >>> import tempfile, torch, dfsq
    >>> net = dfsq.sr.load_model("edsr-x2")
    >>> images = dfsq.sr.calibration_crops(scale=2, count=2, size=32)
    >>> config = dfsq.Config.preset("dfsq-points", 4, layers=("body.0.body.*",))
    >>> qnet = dfsq.quantize(net, images, config, progress=False)
    >>> x = torch.rand(1, 3, 16, 16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dfsq.save(qnet, f"{folder}/edsr4.safetensors")
    ...     again = dfsq.load(f"{folder}/edsr4.safetensors", net)
    >>> torch.equal(again(x), qnet(x))
    True
    """
    summary(model)  # refuses other networks
    if float_digest(model) != model.quantization.state_digest:
        raise ValueError(
            "the network was cast or its values changed since it was quantized, which the file "
            "would not hold; save it first and cast what dfsq.load returns, or quantize the "
            "changed network"
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    record, tensors, layers = model.quantization, {}, []
    for report in record.layers:
        entry, parts = layer_parts(model.get_submodule(report.layer), record.config, report)
        layers.append({"report": asdict(report), **entry})
        tensors |= {
            f"{report.layer}/{key}": torch.as_tensor(part, device="cpu")
            for key, part in parts.items()
        }
    metadata = {
        "format": FILE_FORMAT,
        "config": record.config.to_json(),
        "layers": json.dumps(layers, separators=(",", ":")),
        "calibration_digest": record.calibration_digest,
        "float_digest": record.float_digest,
    }
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata["checksum"] = _checksum(tensors, metadata)
    write_tensors(path, tensors, metadata)


def load(path, model):
    """Read a quantized network.

    Parameters
    ----------
    path : path
        A file of :func:`save`.
    model : nn.Module
        The float network that was quantized, of the same code; left untouched.

    Returns
    -------
    nn.Module
        Bit for bit the network that was saved.

    Raises
    ------
    ValueError
        If the file is damaged, of another kind, or does not fit the network; a layer that does not
        is named.
    """
    if isinstance(path, nn.Module):
        raise ValueError("the file comes first, and then the network: dfsq.load(path, model)")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError(
            f"{path} is not a quantized network of format {FILE_FORMAT}; dfsq.save writes those"
        )
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content does not have its checksum")
    config = Config.from_json(metadata["config"])
    quantized = copied(model)
    modules = dict(quantized.named_modules())
    reports, made = [], {}
    for entry in json.loads(metadata["layers"]):
        report = LayerReport(**entry["report"])
        reports.append(report)
        name, conv = report.layer, modules.get(report.layer)
        if not isinstance(conv, nn.Conv2d):
            raise _misfit(path, f"the network has no convolution {name!r}")
        if (conv.in_channels, conv.out_channels) != (report.inputs, report.outputs):
            raise _misfit(
                path,
                f"layer {name!r} has {conv.in_channels} to {conv.out_channels} channels, in the "
                f"file {report.inputs} to {report.outputs}",
            )
        if tuple(entry["shape"]) != conv.weight.shape:
            raise _misfit(
                path,
                f"the weight of layer {name!r} has shape {tuple(conv.weight.shape)}, in the file "
                f"{tuple(entry['shape'])}",
            )
        check_replaceable(name, conv)
        prefix = f"{name}/"
        parts = {
            key.removeprefix(prefix): part
            for key, part in tensors.items()
            if key.startswith(prefix)
        }
        made[name] = _read(conv, entry, parts, config, report)
    replace_layers(quantized, made)
    if metadata["float_digest"] != float_digest(model):
        raise _misfit(path, "the network has other weights, or other layers beside the quantized")
    quantized.quantization = Quantization(
        config,
        reports,
        metadata["calibration_digest"],
        metadata["float_digest"],
        float_digest(quantized),
    )
    return quantized


def _misfit(path, what):
    return ValueError(
        f"{path} does not fit: {what}; give the float network that the file was made from (--model)"
    )


def _checksum(tensors, metadata):
    """SHA-256 over tensors with their names and types, and over the other metadata."""
    tensors = dict(sorted(tensors.items()))
    types = {key: str(tensor.dtype) for key, tensor in tensors.items()}
    text = json.dumps([types, metadata, digest_of(tensors.values())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sets(config, report):
    """The universal sets of a layer's weights and of its inputs."""
    own = config.for_layer(report.layer)
    name = own.universal, own.words
    return universal_set(*name), universal_set(*name, signed=not report.non_negative)


def layer_parts(conv, config, report):
    """What a file holds of a layer.

    Parameters
    ----------
    conv : QuantConv2d
    config : Config
        Of the whole network.
    report : LayerReport

    Returns
    -------
    entry : dict
        Of the layer map: how the tensors are to be read.
    tensors : dict of str to array or tensor
        By the names in the module's description.
    """
    for_weights, for_inputs = _sets(config, report)
    entry, tensors = {"shape": list(conv.weight.shape), "fitted": list(conv.fitted)}, {}
    if conv.codes is not None:
        rows = [row[np.isfinite(row)] for row in conv.points.cpu().numpy()]
        entry["points"] = _write_points("points", rows, for_weights, tensors)
        tensors["scale"] = conv.scale.flatten()
        codes, counts = conv.codes.flatten(1).cpu().numpy(), np.array([len(row) for row in rows])
        packed = [pack(codes[counts == count], count) for count in np.unique(counts).tolist()]
        tensors["codes"] = np.concatenate(packed)
    for key in conv.fitted:
        tensors[key] = getattr(conv, key).detach()
    quantizer = conv.activation
    if isinstance(quantizer, CodebookQuantizer):
        rows = [points.astype(np.float32) for points in quantizer.points]
        entry["inputs"] = _write_points("inputs", rows, for_inputs, tensors)
        thresholds = quantizer.thresholds.cpu()
        again = CodebookQuantizer(_read_points("inputs", entry["inputs"], for_inputs, tensors))
        if not torch.equal(again.thresholds, thresholds):  # not the midpoints
            tensors["thresholds"] = thresholds
        if quantizer.shares is not None:
            tensors["shares"] = quantizer.shares.flatten()
    elif quantizer is not None:
        entry["bits"] = quantizer.bits
        if isinstance(quantizer, StaticUniformQuantizer):
            tensors |= {"low": quantizer.low.flatten(), "high": quantizer.high.flatten()}
    return entry, tensors


def _read(conv, entry, tensors, config, report):
    """The quantized layer that an entry and its tensors describe."""
    for_weights, for_inputs = _sets(config, report)
    name, non_negative = report.layer, bool(report.non_negative)
    weight = quantizer = None
    if "points" in entry:
        rows = _read_points("points", entry["points"], for_weights, tensors)
        counts, digits = np.array([len(row) for row in rows]), conv.weight[0].numel()
        codes, packed = np.empty((len(rows), digits), np.uint8), tensors["codes"].numpy()
        for count in np.unique(counts).tolist():
            size = int((counts == count).sum()) * digits
            own, packed = np.split(packed, [packed_bytes(size, count)])
            codes[counts == count] = unpack(own, size, count).reshape(-1, digits)
        points = np.full((len(rows), max(counts)), np.inf)
        for row, found in zip(points, rows, strict=True):
            row[: len(found)] = found
        weight = QuantizedWeight(
            torch.from_numpy(codes).view(conv.weight.shape),
            torch.from_numpy(points),
            tensors["scale"][:, None],
        )
    if "inputs" in entry:
        points = _read_points("inputs", entry["inputs"], for_inputs, tensors)
        thresholds = None
        if "thresholds" in tensors:
            thresholds = [
                row[: len(p) - 1].double().numpy()
                for row, p in zip(tensors["thresholds"], points, strict=True)
            ]
        shares = tensors["shares"].numpy() if "shares" in tensors else None
        quantizer = CodebookQuantizer(points, thresholds, non_negative, name, shares)
    elif "low" in tensors:
        low, high = tensors["low"].numpy(), tensors["high"].numpy()
        quantizer = StaticUniformQuantizer(entry["bits"], low, high, non_negative, name)
    elif "bits" in entry:
        quantizer = DynamicUniformQuantizer(entry["bits"], non_negative, name)
    fitted = {key: tensors[key] for key in entry["fitted"]}
    return QuantConv2d.from_float(conv, weight, quantizer, **fitted)


def _write_points(name, rows, universal, tensors):
    """Put codebooks among the tensors.

    Returns
    -------
    list
        How they are written, the number of channels, and the number of points, None if it differs.
    """
    counts, flat = [len(row) for row in rows], np.concatenate(rows)
    equal = len(set(counts)) == 1
    if not equal:
        tensors[f"{name}_count"] = np.array(counts, np.int16)
    kept = universal.astype(flat.dtype)
    index = np.searchsorted(kept, flat).clip(max=len(kept) - 1)
    if np.array_equal(kept[index], flat):
        how, tensors[name] = "universal", pack(index, len(kept))
    elif _are_consecutive(rows) and np.abs(flat).max() < 2**31:
        how, tensors[name] = "consecutive", np.array([row[0] for row in rows], np.int32)
    else:
        how, tensors[name] = "float", flat
    return [how, len(rows), counts[0] if equal else None]


def _are_consecutive(rows):
    """Whether each row is of consecutive whole numbers."""
    return all((row == np.round(row[0]) + np.arange(len(row))).all() for row in rows)


def _read_points(name, entry, universal, tensors):
    """The codebooks that :func:`_write_points` has written, a list of float64 arrays."""
    how, channels, count = entry
    data = np.asarray(tensors[name])
    counts = np.full(channels, count)
    if count is None:
        counts = np.asarray(tensors[f"{name}_count"]).astype(int)
    if how == "consecutive":
        return [
            first + np.arange(count, dtype=float) for first, count in zip(data, counts, strict=True)
        ]
    if how == "universal":
        data = universal[unpack(data, int(counts.sum()), len(universal))]
    return np.split(data.astype(float), np.cumsum(counts)[:-1])
