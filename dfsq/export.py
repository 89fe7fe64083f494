"""Networks as ONNX files, for other runtimes.

What a quantizer computes is written out in the operators of ONNX, from the same tensor operations
that specify it here: extremes, a mean in double precision, a division, the table look-up. Like the
network that it was made from, the file is an emulation: its numbers, the weights among them, are
float32, and it is no faster than the float network's.

Given the same input, a quantized layer gives the same codes in ONNX Runtime as in PyTorch, and an
output equal to 1e-5. A deep network as a whole does not: convolutions are summed in another order,
a sum that differs in its last bit may cross a threshold, and a changed code moves the statistics
of the layers behind it. PyTorch differs as much from itself between the contiguous and the
channels-last layout, which notebook 4 measures.
"""

import copy
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .activations import ActivationQuantizer
from .files import write_whole

#: Version of the operator set; runtimes since 2023 have it.
OPSET = 18


def check_installed(packages=("onnx", "onnxscript")):
    """Refuse to go on without packages of the extra ``onnx``; by default those that write a file.

    Raises
    ------
    ModuleNotFoundError
        Names what is missing, and the extra.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX files need {' and '.join(missing)}, which the extra `onnx` installs: "
            "pip install 'dfsq[onnx]'",
            name=missing[0],
        )


class _Marked(nn.Module):
    """A network whose outputs are NaN wherever PyTorch's quantizers would have raised an error."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        zero = 0 * x.sum((1, 2, 3))

        def marked(y):
            if y.shape[:1] != x.shape[:1]:
                raise ValueError(
                    "each output of a quantized network must have an entry for each image, but "
                    f"one has the shape {tuple(y.shape)} for {len(x)} images"
                )
            return y + zero.view(-1, *[1] * (y.ndim - 1)) if y.is_floating_point() else y

        return tree_map_only(torch.Tensor, marked, self.model(x))


def export_onnx(model, path, *, channels=3):
    """Write a network to an ONNX file, float or quantized.

    The file's one input, ``input``, is a float32 map of shape (batch, channels, height, width), its
    output, or the first of several, ``output``; batch, height and width are free. The networks of
    ``dfsq.sr`` take and give RGB in 0..1. How the network was quantized is in the file's metadata,
    as ``dfsq.config``.

    Parameters
    ----------
    model : nn.Module
        Any network in float32, also one made by :func:`quantize` or :func:`load`; exported in
        eval mode, and left untouched.
    path : path
        Of the file, ``.onnx``; it is replaced only once the new one is complete.
    channels : int
        Of the input.

    Raises
    ------
    ModuleNotFoundError
        Without the packages of the extra ``onnx``.
    ValueError
        For a network that is not in float32, or that PyTorch cannot export, or a quantized one with
        an output that has no entry for each image.
    OSError
        If the file cannot be written.

    Notes
    -----
    A graph neither warns nor raises. In place of the errors of the quantizers, an image that holds
    NaN or infinity gives outputs of NaN throughout.

    A quantized layer agrees with PyTorch's to 1e-5, given the same input. A deep quantized network
    as a whole agrees only as well as PyTorch does with itself in another memory layout, since
    sums that differ in their last bit change codes. A float network agrees to 1e-5.
    """
    check_installed()
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"path must be an .onnx file, not {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"the network must be in float32, but {name!r} is {parameter.dtype}; "
                "model.float() makes it so"
            )
    exported = copy.deepcopy(model).cpu().eval()
    if any(isinstance(module, ActivationQuantizer) for module in model.modules()):
        exported = _Marked(exported)
    program = _program(exported, torch.zeros(2, channels, 48, 56))
    graph = program.model
    fold_constants(graph)
    remove_unused_nodes(graph)
    graph.metadata_props.clear()
    for node in graph.graph:
        node.metadata_props.clear()  # traces with paths of the machine it was made on
    record = getattr(model, "quantization", None)
    if record is not None:
        graph.metadata_props["dfsq.config"] = record.config.to_json()
    write_whole(path, lambda temporary: program.save(temporary, external_data=False))


def _program(model, example):
    """PyTorch's exporter, without its remarks."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own deprecated calls
            return torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
                # the whole of its optimizer takes 1e-8 for 0, and drops the addition
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"PyTorch cannot export this network: {reason}") from error
    finally:
        log.setLevel(level)
