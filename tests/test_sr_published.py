"""Published networks: their readers and forms, and PSNR-Y as published."""

import hashlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import dfsq
from dfsq.calibration import find_layers
from dfsq.sr import fetch
from dfsq.sr.models.edsr import EDSR
from dfsq.sr.models.imdn import IMDN
from dfsq.sr.models.rdn import RDN
from dfsq.sr.models.rlfn import RLFN
from dfsq.sr.models.srresnet import SRResNet
from dfsq.sr.mxnet import read_mxnet
from dfsq.sr.zoo import ENTRIES, from_state, load_model
from dfsq.study import tables
from dfsq.study.benchmark import (
    RESULTS_FOLDER,
    Bench,
    Cell,
    Store,
    config_digest,
    evaluate,
    row_id,
)

PUBLISHED = [  # name, set, PSNR-Y as published for the weights
    ("edsr-8-x2", "Set5", 37.801),
    ("edsr-8-x2", "Set14", 33.373),
    ("srresnet-8-x4", "Set5", 31.882),
    ("srresnet-8-x4", "Set14", 28.429),
    ("imdn-x2", "Set5", 37.996),
    ("imdn-x2", "Set14", 33.627),
    ("imdn-x4", "Set5", 32.209),
    ("imdn-x4", "Set14", 28.582),
]


@pytest.mark.parametrize(("name", "dataset", "psnr"), PUBLISHED)
def test_published_psnr(dfsq_data, name, dataset, psnr):
    network = load_model(name)
    measured = evaluate(network, dfsq.sr.load_dataset(dataset, network.scale)).psnr.mean()
    assert abs(measured - psnr) < 0.01


@pytest.mark.parametrize("scale", [2, 4])
def test_rlfn_beats_bicubic(dfsq_data, scale):
    """No value is published for these weights; the range of 0..255 is what this pins down."""
    network = load_model(f"rlfn-x{scale}")
    pairs = dfsq.sr.load_dataset("Set5", scale)
    assert evaluate(network, pairs).psnr.mean() > {2: 37.9, 4: 32.1}[scale]


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("make", [IMDN, RLFN, RDN, SRResNet])
def test_shapes_and_body_layers(make, scale):
    small = {"blocks": 2, "layers": 2, "growth": 8, "features": 8} if make is RDN else {}
    network = make(scale, **small).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 36, 41)).shape == (1, 3, 36 * scale, 41 * scale)
    config = dfsq.Config.preset("dfsq-points", 4)  # quick; which layers does not depend on it
    quantized = dfsq.quantize(network, [torch.rand(3, 36, 41)], config, progress=False)
    names = list(dfsq.summary(quantized).layer)
    assert names
    assert not any("cca" in n or "esa" in n or "head" in n or "tail" in n for n in names)


def test_the_body_is_what_the_released_code_quantizes():
    """RDN's 16 blocks of 8 convolutions and a fusion, and the two that fuse the blocks."""
    for network, count in ((EDSR(2), 32), (SRResNet(2), 32), (RDN(2), 16 * 9 + 2)):
        names = list(find_layers(network, dfsq.Config()))
        assert len(names) == count, type(network)
    assert {"GFF.0", "GFF.1", "RDBs.15.LFF", "RDBs.0.convs.7.conv.0"} < set(names)


@pytest.mark.parametrize("make", [EDSR, IMDN, RLFN, RDN, SRResNet])
def test_head_layers_are_those_that_take_the_image(make):
    network = make(2)
    convolutions = find_layers(network, dfsq.Config(layers=("*",)))
    of_rgb = [name for name, conv in convolutions.items() if conv.in_channels == 3]
    assert list(find_layers(network, dfsq.Config(layers=network.head_layers))) == of_rgb
    assert len(of_rgb) == 1


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_rdn_is_recognised(scale):
    torch.manual_seed(0)
    network = RDN(scale, blocks=3, layers=2, growth=8, features=12).eval()
    again = from_state(network.state_dict())
    x = torch.rand(1, 3, 12, 13)
    with torch.no_grad():
        assert torch.equal(network(x), again(x))


@pytest.mark.parametrize("name", ["IMDN_x2", "rlfn_x4"])
def test_a_file_is_recognised_by_its_keys(dfsq_data, name):
    path = dfsq_data / "weights" / f"{name}.pth"
    network = load_model(path)
    assert isinstance(network, IMDN if name.startswith("IMDN") else RLFN)
    right = network.value_range
    with pytest.raises(ValueError, match=f"give value_range={right:g}"):
        load_model(path, value_range=256 - right)


def test_rdn_literal():
    """Against the network written out, as in the paper."""
    torch.manual_seed(0)
    net = RDN(2, blocks=2, layers=2, growth=4, features=6, value_range=255.0)
    x = torch.rand(1, 3, 9, 10)
    shallow = net.SFENet1(x * 255)
    y, outputs = net.SFENet2(shallow), []
    for block in net.RDBs:
        dense = y
        for conv in block.convs:
            dense = torch.cat((dense, torch.relu(conv.conv[0](dense))), 1)
        y = block.LFF(dense) + y
        outputs.append(y)
    expected = net.UPNet(net.GFF(torch.cat(outputs, 1)) + shallow) / 255
    assert torch.equal(net(x), expected)


def test_mxnet_damage_is_named(dfsq_data, tmp_path):
    whole = (dfsq_data / "weights" / "EDSR-8-x2-0000.params").read_bytes()
    assert read_mxnet(dfsq_data / "weights" / "EDSR-8-x2-0000.params")["DIV2K_mean"].numel() == 3
    for size in (0, 10, 1000, len(whole) - 1):
        (tmp_path / "cut.params").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.params is damaged"):
            read_mxnet(tmp_path / "cut.params")


def test_registry_is_complete():
    table = fetch.registry()
    assert table.index.is_unique
    assert table.sha256.str.fullmatch("[0-9a-f]{64}").all()
    assert table.url.str.startswith("https://").all()
    counts = {name: len(fetch.files_of(name)) for name in fetch.groups()}
    sets = {"Set5": 5, "Set14": 14, "B100": 100, "Urban100": 100, "BSDS500/train": 199}
    assert sets.items() <= counts.items()
    for entry in ENTRIES.values():
        assert entry.embedded or entry.file in table.index
    with pytest.raises(ValueError, match=r"there are .*Set5"):
        fetch.files_of("Set6")


def test_files_are_as_registered(dfsq_data):
    for group in ("Set5", "weights/IMDN_x2.pth"):
        for file in fetch.files_of(group):
            fetch.verify(file, fetch.local(file))
    urban = fetch.files_of("Urban100")[27]  # held as lossless WebP there, or as PNG
    fetch.verify(urban, fetch.local(urban))


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """A function that registers an image as the only file, with its pixels or without."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "original.png")
    sha = hashlib.sha256((tmp_path / "original.png").read_bytes()).hexdigest()
    monkeypatch.setenv("DFSQ_DATA", str(tmp_path))
    (tmp_path / "Set").mkdir()

    def register(with_pixels):
        digest = fetch.pixels_digest(tmp_path / "original.png") if with_pixels else ""
        row = {"file": "Set/x.png", "sha256": sha, "pixels": digest}
        monkeypatch.setattr(fetch, "registry", lambda: pd.DataFrame([row]).set_index("file"))
        return tmp_path / "Set", pixels

    return register


@pytest.mark.parametrize("form", ["png", "webp", "bmp"])
def test_any_lossless_form_where_pixels_are_registered(registered, form):
    folder, pixels = registered(with_pixels=True)
    path = folder / f"x.{form}"
    options = {"compress_level": 0} if form == "png" else {"lossless": True}
    Image.fromarray(pixels).save(path, **options)
    assert fetch.fetch("Set/x.png") == path
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(path, **options)
    with pytest.raises(ValueError, match=rf"x\.{form} is not the registered .*fetch Set`"):
        fetch.fetch("Set/x.png")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"x\.{form} is not the registered Set/x\.png: cut"):
        fetch.fetch("Set/x.png")


def test_the_registered_bytes_where_no_pixels_are(registered, tmp_path):
    folder, pixels = registered(with_pixels=False)
    Image.fromarray(pixels).save(folder / "x.bmp")
    message = r"x\.bmp cannot be checked: Set/x\.png is registered by its bytes alone, as \.png; "
    with pytest.raises(ValueError, match=message):
        fetch.fetch("Set/x.png")
    Image.fromarray(pixels).save(folder / "x.png", compress_level=0)
    with pytest.raises(ValueError, match="is not the registered"):
        fetch.fetch("Set/x.png")
    (folder / "x.png").write_bytes((tmp_path / "original.png").read_bytes())
    assert fetch.fetch("Set/x.png") == folder / "x.png"


def test_altered_and_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DFSQ_DATA", str(tmp_path))
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path / "cache"))
    file = fetch.files_of("Set5")[0]
    (tmp_path / "Set5").mkdir()
    (tmp_path / file).write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the registered"):
        fetch.fetch(file)
    (tmp_path / file).unlink()

    def offline(*_, **__):
        raise OSError

    monkeypatch.setattr("pooch.retrieve", offline)
    with pytest.raises(FileNotFoundError, match=r"(Set5/\S+) is .* as FOLDER/\1, .*DFSQ_DATA"):
        dfsq.sr.load_dataset("Set5")


def test_a_folder_of_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DFSQ_DATA", str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"DFSQ_DATA names no folder: .*data; mend it, or unset"):
        dfsq.sr.load_dataset("Set5")


def test_download(tmp_path, monkeypatch):
    """From an address that can be reached without a network."""
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DFSQ_DATA", raising=False)
    file = fetch.files_of("Set5")[0]
    got = []

    def retrieve(url, known_hash, name, folder, progressbar):
        got.append((url, known_hash))
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"")

    monkeypatch.setattr("pooch.retrieve", retrieve)
    path = fetch.fetch(file, progress=False)
    assert path == tmp_path / "cache" / "data" / file
    row = fetch.registry().loc[file]
    assert got == [(row.url, f"sha256:{row.sha256}")]


def test_a_folder_in_the_usual_layouts(tmp_path):
    image = Image.fromarray(np.arange(20 * 16 * 3, dtype=np.uint8).reshape(20, 16, 3))
    (tmp_path / "a" / "HR").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    image.save(tmp_path / "a" / "HR" / "x.png")
    image.save(tmp_path / "b" / "x.bmp")
    first, second = (dfsq.sr.load_dataset(tmp_path / n, 2)[0] for n in "ab")
    assert np.array_equal(first.hr, second.hr)


def test_standing_rows_are_of_the_configurations_that_stand(dfsq_data):
    """So that rows of other layers, say, cannot stand: their network has changed since."""
    rows = tables.current(Store(RESULTS_FOLDER).results)
    rows = rows[~rows.method.isin(["float", "bicubic"])]
    names = ["model", "dataset", "method", "bits", "seed", "layers"]
    bench, digests = Bench(device="cpu"), {}
    for row in rows.itertuples():
        cell = Cell(**{name: getattr(row, name) for name in names})
        key = replace(cell, dataset="")
        if key not in digests:
            digests[key] = config_digest(bench.config(cell))[:16]
        assert row.config_digest == digests[key], cell
    assert len(digests) > 200


@pytest.mark.parametrize("draw", range(3))
def test_rows_drawn_from_the_tables_hold(dfsq_data, draw):
    """A row on Set5 in double precision, drawn anew in each run, holds to the last digit."""
    rows = tables.whole_sets(Store(RESULTS_FOLDER).results)
    rows = rows[(rows.dataset == "Set5") & (rows.method != "bicubic")]
    rows = rows[rows.precision == "double"]
    bench = Bench(device="cpu", double=True)
    # from the system's own randomness: the tests' seeds must not fix the draw
    (row,) = rows.sample(1, random_state=np.random.default_rng()).to_dict("records")
    cell = Cell(**{name: row[name] for name in ("model", "dataset", "method", "bits", "layers")})
    assert row_id(bench.key(cell)) == row["id"], cell  # weights, pixels and crops are the same
    assert bench.compute(cell).psnr.mean() == pytest.approx(row["psnr"], abs=1e-6), cell
