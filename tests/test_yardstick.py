"""ONNX Runtime's own quantization, and files as networks."""

import onnx
import pytest
import torch

import dfsq
from dfsq.sr.models.edsr import EDSR
from dfsq.study.benchmark import evaluate
from dfsq.study.yardstick import OnnxNetwork, int8_beside_float, int8_onnx

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return EDSR(2, 1, 8).eval()


def test_int8_is_per_channel_and_near_the_float_network(net, tmp_path):
    images = torch.rand(4, 3, 32, 32)
    int8_onnx(net, images, tmp_path / "int8.onnx")
    made = OnnxNetwork(tmp_path / "int8.onnx", 2)
    x = torch.rand(1, 3, 20, 28)
    with torch.no_grad():
        difference = (made(x) - net(x)).abs()
    assert 0 < difference.mean() < 0.01
    graph = onnx.load(tmp_path / "int8.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 6
    producers = {output: node for node in graph.node for output in node.output}
    for node in convolutions:
        value, weight = (producers[name] for name in node.input[:2])
        assert value.op_type == weight.op_type == "DequantizeLinear"
        codes, scale, _ = (tensors[name] for name in weight.input)
        assert codes.data_type == onnx.TensorProto.INT8
        assert list(scale.dims) == [codes.dims[0]]


def test_int8_beside_float(net):
    pairs = dfsq.sr.load_dataset(limit=2)
    table = int8_beside_float(net, torch.rand(2, 3, 32, 32), pairs, repeats=1)
    assert table.index.tolist() == ["float", "int8"]
    assert table.psnr["float"] == pytest.approx(evaluate(net, pairs).psnr.mean(), abs=1e-3)
    assert 0 < abs(table.psnr["int8"] - table.psnr["float"]) < 3
    assert table.time["float"] == 1
    assert (table["size"] > 1000).all()


def test_without_the_extra(net, tmp_path, monkeypatch):
    monkeypatch.setattr("dfsq.export.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'dfsq\[onnx\]'"):
        int8_onnx(net, torch.rand(1, 3, 16, 16), tmp_path / "x.onnx")
