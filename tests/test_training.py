"""Training: a run that is stopped anywhere goes on as if it had not been."""

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dfsq.sr.imaging import imresize, psnr_y, to_image, to_tensor
from dfsq.sr.models.edsr import EDSR
from dfsq.sr.zoo import edsr_from_state, read_weights
from dfsq.study import training
from dfsq.study.training import Recipe, draw_batch, export, main, train, training_pairs, validate

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(blocks=1, features=4, patch=6, batch=2, warmup=2, halve_every=4, average=0.6)


def random_image(seed, height=20, width=26):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return imresize(small, 4)[:height, :width]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images in train, one of them Set5's woman; 53 in test; a val that must not be read."""
    folder = tmp_path_factory.mktemp("BSDS500")
    names = {"train": ["100", "200", "302003", "400"], "test": [f"{i:03}" for i in range(53)]}
    for seed, (part, name) in enumerate((p, n) for p in names for n in names[p]):
        (folder / part).mkdir(exist_ok=True)
        Image.fromarray(random_image(seed)).save(folder / part / f"{name}.png")
    (folder / "val").mkdir()
    (folder / "val" / "000.png").write_text("not to be read")
    return folder


def run(data, out, steps, recipe=RECIPE, **options):
    train(data, out, recipe, steps, **({"save_every": 3, "validate_on": 2} | options))


def state(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def log(out):
    with open(out / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def flat(value):
    """Tensors and numbers of a nested state."""
    if isinstance(value, dict):
        return [x for key in value for x in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in flat(item)]
    return [value]


def assert_same_run(a, b):
    first, second = state(a), state(b)
    for part in ("recipe", "model", "averaged", "optimizer", "step"):
        for x, y in zip(flat(first[part]), flat(second[part]), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, part
    assert log(a) == log(b)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run(data, out, 9)
    return out


# --- recipe and data ---


def test_learning_rate():
    recipe = Recipe(learning_rate=8e-4, warmup=10, halve_every=100)
    rates = [recipe.rate(step) for step in (0, 4, 9, 10, 99, 100, 199, 200, 399)]
    expected = [0.8e-4, 4e-4, 8e-4, 8e-4, 8e-4, 4e-4, 4e-4, 2e-4, 1e-4]
    assert rates == pytest.approx(expected, rel=1e-12)
    later = replace(recipe, first_step=150)  # warms up again, but halves by all of the steps
    assert [later.rate(s) for s in (150, 159, 200)] == pytest.approx([0.4e-4, 4e-4, 2e-4])


def test_what_is_trained_on_and_what_is_held_out(data):
    train_pairs, held_out = training_pairs(data, 2)
    hrs = [random_image(seed) for seed in range(4 + 53)]
    expected = [*hrs[:2], hrs[3], *hrs[4:7]], hrs[7:]  # without the woman; the last 50 of test
    for pairs, images in zip((train_pairs, held_out), expected, strict=True):
        assert len(pairs) == len(images)
        for (lr, hr), image in zip(pairs, images, strict=True):
            assert np.array_equal(hr, image)
            assert np.array_equal(lr, imresize(image, 1 / 2))
    assert training_pairs(data, 3)[0][0][1].shape == (18, 24, 3)


def test_a_batch_is_a_function_of_seed_and_step(data):
    pairs, _ = training_pairs(data, 2)
    lr, hr = draw_batch(pairs, RECIPE, 5)
    assert lr.shape == (2, 3, 6, 6)
    assert hr.shape == (2, 3, 12, 12)
    np.random.default_rng(0).random(7)  # draws of others do not matter
    again = draw_batch(pairs, RECIPE, 5)
    assert torch.equal(lr, again[0])
    assert torch.equal(hr, again[1])
    for other in (draw_batch(pairs, RECIPE, 6), draw_batch(pairs, replace(RECIPE, seed=1), 5)):
        assert not torch.equal(lr, other[0])


def test_patches_are_flipped_and_rotated_and_fit_each_other(data):
    pairs, _ = training_pairs(data, 2)
    whole = [imresize(hr, 1 / 2) for _, hr in pairs]
    seen = set()
    for step in range(40):
        lrs, hrs = (map(to_image, batch[:, None]) for batch in draw_batch(pairs, RECIPE, step))
        for lr, hr in zip(lrs, hrs, strict=True):
            # but for the border, where the kernel saw other pixels, and a turn's other rounding
            difference = imresize(hr, 1 / 2)[2:-2, 2:-2] - lr[2:-2, 2:-2].astype(float)
            assert np.abs(difference).max() <= 1
            seen.add(orientation(lr, whole))
    assert seen == {(turns, mirror) for turns in range(4) for mirror in (False, True)}


def orientation(patch, images):
    for turns in range(4):
        for mirror in (False, True):
            # undone in the opposite order
            part = np.rot90(patch[:, ::-1] if mirror else patch, -turns)
            for image in images:
                windows = np.lib.stride_tricks.sliding_window_view(image, part.shape)
                if (windows == part).all((-1, -2, -3)).any():
                    return turns, mirror
    raise AssertionError("no image holds this patch")


def test_validation_is_the_mean_psnr(data):
    torch.manual_seed(0)
    model = EDSR(2, 1, 4).eval()
    _, pairs = training_pairs(data, 2)
    with torch.no_grad():
        values = [psnr_y(to_image(model(to_tensor(lr))), hr, 2) for lr, hr in pairs[:3]]
    assert validate(model, pairs[:3]) == pytest.approx(np.mean(values), abs=1e-9)


def test_moving_average_forgets_its_start():
    """Its decay is (1 + n)/(10 + n) for the n-th update, and no more than the recipe's."""
    model = nn.Linear(1, 1, bias=False)
    update = training._moving_average(0.3)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)
    expected = None
    for count, value in enumerate([5.0, 1.0, -2.0, 4.0, 0.5]):
        model.weight.data.fill_(value)
        averaged.update_parameters(model)
        decay = min(0.3, (1 + count) / (10 + count))
        expected = value if count == 0 else decay * expected + (1 - decay) * value
        assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-6)


# --- going on ---


def test_files_of_a_run(uninterrupted):
    names = sorted(p.name for p in uninterrupted.iterdir())
    assert names == ["checkpoint.pt", "log.csv", "recipe.json"]
    assert json.loads((uninterrupted / "recipe.json").read_text()) == asdict(RECIPE)
    assert state(uninterrupted)["step"] == 9
    rows = log(uninterrupted)
    assert [int(row["step"]) for row in rows] == [3, 6, 9]
    assert [float(row["learning_rate"]) for row in rows] == [RECIPE.rate(s) for s in (2, 5, 8)]
    assert all(5 < float(row["validation_psnr"]) < 50 for row in rows)


def test_weights_change_and_are_averaged(uninterrupted):
    saved = state(uninterrupted)
    torch.manual_seed(RECIPE.seed)
    initial = EDSR(2, 1, 4).state_dict()
    for name, value in saved["model"].items():
        assert not torch.equal(value, initial[name])
        assert not torch.equal(value, saved["averaged"][f"module.{name}"])


@pytest.mark.parametrize("stops", [(3, 9), (6, 9), (3, 6, 9)])
def test_a_run_in_parts_is_the_run_in_one(data, uninterrupted, tmp_path, stops):
    for steps in stops:
        run(data, tmp_path, steps)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_kill_between_checkpoints(data, uninterrupted, tmp_path, monkeypatch, at):
    def killed(pairs, recipe, step):
        if step == at:
            raise KeyboardInterrupt
        return draw_batch(pairs, recipe, step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, 9)
    assert (tmp_path / "checkpoint.pt").exists() == (at >= 3)
    run(data, tmp_path, 9)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("while_writing", ["checkpoint.pt", "log.csv"])
def test_a_kill_while_writing_leaves_the_old_file(
    data, uninterrupted, tmp_path, monkeypatch, while_writing
):
    """Half a file is left as .part, which is never taken for the checkpoint or the log."""
    run(data, tmp_path, 3)
    before = (tmp_path / while_writing).read_bytes()
    original = training._write

    def killed(path, save):
        if path.name == while_writing:
            path.with_name(path.name + ".part").write_bytes(b"half")
            raise KeyboardInterrupt
        original(path, save)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, 9)
    assert (tmp_path / while_writing).read_bytes() == before
    assert state(tmp_path)["step"] == 3
    run(data, tmp_path, 9)
    assert_same_run(tmp_path, uninterrupted)


def test_files_are_written_beside_and_moved(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def save(temporary):
        temporary.write_text("new")
        assert path.read_text() == "old"

    training._write(path, save)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_that_is_done_is_left_alone(data, tmp_path):
    run(data, tmp_path, 3)
    before = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "log.csv").read_bytes()
    run(data, tmp_path, 3)
    run(data, tmp_path, 2)
    after = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "log.csv").read_bytes()
    assert after == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 1e-3}, {"features": 8}])
def test_another_recipe_is_refused(data, tmp_path, change):
    run(data, tmp_path, 1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"made by another recipe, .* or another folder"):
        run(data, tmp_path, 2, replace(RECIPE, **change))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_initial_weights(data, tmp_path):
    torch.manual_seed(5)
    initial = {k: v.half() for k, v in EDSR(2, 1, 4).state_dict().items()}
    save_file(initial, tmp_path / "initial.safetensors")
    recipe = replace(RECIPE, first_step=7, learning_rate=0.0)
    run(data, tmp_path / "out", 8, recipe, initial=tmp_path / "initial.safetensors")
    saved = state(tmp_path / "out")
    assert saved["step"] == 8
    assert all(torch.equal(saved["model"][k], v.float()) for k, v in initial.items())


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    def broken(pairs, recipe, step):
        lr, hr = draw_batch(pairs, recipe, step)
        return lr, hr * float("nan") if step == 4 else hr

    monkeypatch.setattr(training, "draw_batch", broken)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
        run(data, tmp_path, 9)
    assert state(tmp_path)["step"] == 3


# --- publishing ---


def test_export(data, uninterrupted, tmp_path):
    target = tmp_path / "edsr.safetensors"
    export(uninterrupted, target, [data / "train"])
    averaged = state(uninterrupted)["averaged"]
    weights = load_file(target)
    for name, value in weights.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, averaged[f"module.{name}"].half())
    model = EDSR(2, 1, 4)
    model.load_state_dict(read_weights(target))
    again = edsr_from_state(read_weights(target), value_range=1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]

    report = json.loads(target.with_suffix(".json").read_text())
    assert (report["steps"], report["recipe"]) == (9, asdict(RECIPE))
    pairs = [(imresize(hr, 1 / 2), hr) for hr in (random_image(i) for i in range(4))]
    bicubic = np.mean([psnr_y(imresize(lr, 2), hr, 2) for lr, hr in pairs])
    assert report["psnr"]["train"]["bicubic"] == pytest.approx(bicubic)
    assert report["psnr"]["train"]["float"] == pytest.approx(validate(again, pairs))


def test_command_line(data, tmp_path, uninterrupted):
    options = [f"--{k.replace('_', '-')}={v}" for k, v in asdict(RECIPE).items()]
    arguments = ["--data", str(data), "--out", str(tmp_path), "--save-every", "3", *options]
    main([*arguments, "--steps", "9"])
    assert torch.equal(
        state(tmp_path)["model"]["head.0.weight"], state(uninterrupted)["model"]["head.0.weight"]
    )
    main([*arguments, "--export", str(tmp_path / "weights.safetensors")])
    assert len(load_file(tmp_path / "weights.safetensors")) == 12
