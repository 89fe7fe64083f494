"""Another quantizer's numbers beside DFSQ's: ONNX Runtime's own 8 bits.

What a user gets today from a runtime that does compute in integers: static per-tensor ranges of
activations, found on calibration images, and weights by output channel, in all convolutions. It is
a yardstick, **not** DFSQ, which keeps head and tail in float and takes its statistics from each
map.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ..calibration import as_batches
from ..export import check_installed, export_onnx
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


def int8_psnr(model, images, pairs):
    """PSNR of ONNX Runtime's 8-bit network on photographs, by the protocol of every table.

    Parameters
    ----------
    model : nn.Module
        A float network with an attribute ``scale``.
    images : sequence
        Calibration images, such as :func:`dfsq.sr.datasets.calibration_crops` gives.
    pairs : list of dfsq.sr.datasets.ImagePair

    Returns
    -------
    pandas.DataFrame
        See :func:`dfsq.study.benchmark.evaluate`.
    """
    with TemporaryDirectory(prefix="dfsq-") as folder:
        path = Path(folder) / "int8.onnx"
        int8_onnx(model, images, path)
        return evaluate(OnnxNetwork(path, model.scale), pairs)
