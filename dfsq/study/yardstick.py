"""Another quantizer's numbers beside DFSQ's: ONNX Runtime's own 8 bits.

What a user gets today from a runtime that does compute in integers: static per-tensor ranges of
activations, found on calibration images, and weights by output channel, in all convolutions. It is
a yardstick, **not** DFSQ, which keeps head and tail in float and takes its statistics from each
map.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from torch import nn

from ..calibration import as_batches
from ..export import check_installed, export_onnx
from ..sr.imaging import to_tensor
from .benchmark import evaluate


class OnnxNetwork(nn.Module):
    """An ONNX file with the interface of a network, run by ONNX Runtime on the CPU.

    Parameters
    ----------
    path : path
        Of a file with one input and one output, such as :func:`dfsq.export_onnx` writes.
    scale : int
        Upscaling factor.
    threads : int, optional
        As many as PyTorch uses, by default.
    """

    def __init__(self, path, scale, threads=None):
        super().__init__()
        check_installed(["onnxruntime"])
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.scale = scale
        self.unused = nn.Parameter(torch.zeros(()))  # carries device and type, as a network's do

    def forward(self, x):
        (name,) = (entry.name for entry in self.session.get_inputs())
        return torch.from_numpy(self.session.run(None, {name: x.detach().numpy()})[0])


def int8_onnx(model, images, path):
    """Write a float network to an ONNX file in 8 bits, by ONNX Runtime's static quantization.

    Convolutions between pairs of QuantizeLinear and DequantizeLinear, which the runtime turns into
    integer arithmetic; activations int8 with [min, max] of the calibration images, weights int8 and
    symmetric with a range for each output channel.

    Parameters
    ----------
    model : nn.Module
        In float32.
    images : sequence
        Calibration images, see :func:`dfsq.calibration.as_batches`.
    path : path
        Of the file.
    """
    check_installed(["onnx", "onnxscript", "onnxruntime"])
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = as_batches(images)

    class Reader(CalibrationDataReader):
        remaining = iter(batches)

        def get_next(self):
            batch = next(self.remaining, None)
            return None if batch is None else {"input": batch.numpy()}

    with TemporaryDirectory(prefix="dfsq-") as folder:
        whole, prepared = Path(folder) / "float.onnx", Path(folder) / "prepared.onnx"
        export_onnx(model, whole, channels=batches[0].shape[1])
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )


def int8_beside_float(model, images, pairs, repeats=3):
    """ONNX Runtime's 8 bits and the float network in the same runtime, in quality, size and time.

    Parameters
    ----------
    model : nn.Module
        A float network with an attribute ``scale``.
    images : sequence
        Calibration images, such as :func:`dfsq.sr.datasets.calibration_crops` gives.
    pairs : list of dfsq.sr.datasets.ImagePair
    repeats : int
        Runs of each network on the first photograph, by turns, of which the fastest counts.

    Returns
    -------
    pandas.DataFrame
        Rows ``float`` and ``int8``; columns ``psnr`` (dB, mean over the photographs by the protocol
        of every table), ``size`` (of the file, bytes) and ``time`` (over the float network's).

    Raises
    ------
    ModuleNotFoundError
        Without the packages of the extra ``onnx``.
    """
    rows, networks = {}, {}
    x = to_tensor(pairs[0].lr)
    with TemporaryDirectory(prefix="dfsq-") as folder:
        for kind, write in (
            ("float", lambda path: export_onnx(model, path)),
            ("int8", lambda path: int8_onnx(model, images, path)),
        ):
            path = Path(folder) / f"{kind}.onnx"
            write(path)
            network = networks[kind] = OnnxNetwork(path, model.scale)
            size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
            psnr = evaluate(network, pairs).psnr.mean()  # and what is done once only is not timed
            rows[kind] = {"psnr": psnr, "size": size, "time": float("inf")}
        for _ in range(repeats):
            for kind, network in networks.items():
                start = time.perf_counter()
                network(x)
                rows[kind]["time"] = min(rows[kind]["time"], time.perf_counter() - start)
    table = pd.DataFrame(rows).T
    return table.assign(time=table.time / table.time["float"])
