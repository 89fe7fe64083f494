"""Training: a run that is stopped anywhere goes on as if it had not been."""

import csv
import hashlib
import json
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dfsq.sr.datasets import ImagePair
from dfsq.sr.imaging import imresize, psnr_y, to_image, to_tensor
from dfsq.study import training
from dfsq.study.patches import Patches
from dfsq.study.recipes import Recipe
from dfsq.study.training import read_checkpoint, train, update_average, validate

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"patch": 6, "batch": 2, "warmup": 2, "halve_every": 4, "average": 0.6}
RECIPES = {
    "edsr": Recipe(blocks=1, features=4, precision="float32", **OPTIONS),
    "srresnet": Recipe("srresnet", blocks=1, features=4, precision="float32", **OPTIONS),
    "rdn": Recipe(
        "rdn", 4, blocks=1, features=4, layers=2, growth=3, precision="float32", **OPTIONS
    ),
}
RECIPE = RECIPES["edsr"]


@pytest.fixture(autouse=True)
def _no_benchmark_sets(monkeypatch, tmp_path):
    """The embedded test photographs alone are compared with: the sets take long to read."""
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DFSQ_DATA", raising=False)


@pytest.fixture(autouse=True, scope="module")
def _heed_ctrl_c():
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def random_image(seed):
    small = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    return imresize(small, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(10):
        Image.fromarray(random_image(seed)).save(folder / f"{seed}.png")
    return folder


def run(data, out, steps, recipe=RECIPE, **options):
    train(data, out, recipe, steps, **({"save_every": 3, "device": "cpu"} | options))


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
    first, second = read_checkpoint(a), read_checkpoint(b)
    assert first.keys() == second.keys()
    for part in first.keys() - {"seconds_by_device"}:
        for x, y in zip(flat(first[part]), flat(second[part]), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, part
    assert log(a) == log(b)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Nine steps in one run, of each network; losses at full precision beside."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFSQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("DFSQ_DATA", raising=False)
        for network, recipe in RECIPES.items():
            out = tmp_path_factory.mktemp(network)
            with recorded_losses() as losses:
                run(data, out, 9, recipe)
            found[network] = out, losses
    return found


class recorded_losses:  # noqa: N801
    """Within this, the loss of each step, at full precision; of one done twice the latter."""

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        losses, original = {}, training._Run.advance

        def advance(run, *batch):
            original(run, *batch)
            losses[run.step] = run._pending[-1].item()

        self._patch.setattr(training._Run, "advance", advance)
        return losses

    def __exit__(self, *_):
        self._patch.undo()


# --- validation and averages ---


class Upscaler(nn.Module):
    """Plain bicubic, which uses every pixel of a whole image."""

    scale = 2

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return to_tensor(imresize(to_image(x), 2))


def test_validation_is_psnr_over_whole_images():
    hrs = [random_image(seed) for seed in range(4)]
    pairs = [ImagePair("", imresize(hr, 1 / 2), hr) for hr in hrs]
    expected = np.mean([psnr_y(imresize(p.lr, 2), p.hr, 2) for p in pairs])
    assert validate(Upscaler(), pairs) == pytest.approx(expected)


def test_the_average_forgets_the_start():
    model, averaged = (nn.Linear(1, 1, bias=False) for _ in "ab")
    expected = None
    for count, value in enumerate([5.0, 1.0, -2.0, 4.0, 0.5]):
        model.weight.data.fill_(value)
        update_average(averaged, model, count, 0.3)
        decay = min(0.3, (1 + count) / (10 + count))
        expected = value if count == 0 else decay * expected + (1 - decay) * value
        assert averaged.weight.item() == pytest.approx(expected, rel=1e-6)


def test_statistics_of_batch_norm_are_averaged_and_counters_copied():
    model, averaged = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    expected = None
    for count in range(4):
        model(torch.rand(2, 3, 4, 4))
        update_average(averaged, model, count, 0.5)
        decay = min(0.5, (1 + count) / (10 + count))
        now = model.running_var
        expected = now.clone() if count == 0 else decay * expected + (1 - decay) * now
        torch.testing.assert_close(averaged.running_var, expected)
        assert not torch.equal(averaged.running_mean, model.running_mean) or count == 0
        assert averaged.num_batches_tracked == model.num_batches_tracked == count + 1
        assert averaged.num_batches_tracked.dtype == torch.int64


def test_the_average_is_validated_by_its_own_statistics(uninterrupted, data):
    """In evaluation mode: a validation changes no statistic, and its PSNR can be had again."""
    out, _ = uninterrupted["srresnet"]
    saved = read_checkpoint(out)
    model = RECIPES["srresnet"].build().eval()
    model.load_state_dict(saved["averaged"])
    assert saved["averaged"]["merge.1.num_batches_tracked"] == 9
    found = training.training_images(data, 2, 6, progress=False)
    assert float(log(out)[-1]["validation_psnr"]) == pytest.approx(
        validate(model, found.held_out), abs=1e-3
    )


# --- going on ---


@pytest.mark.parametrize("network", RECIPES)
def test_files_of_a_run(uninterrupted, network):
    out, losses = uninterrupted[network]
    recipe = RECIPES[network]
    names = sorted(p.name for p in out.iterdir())
    assert set(names) - {".lock"} == {"checkpoint.pt", "log.csv", "recipe.json"}
    assert json.loads((out / "recipe.json").read_text()) == recipe.facts()
    saved = read_checkpoint(out)
    assert (saved["step"], saved["data"]["images"], saved["initial"]) == (9, 8, None)
    rows = log(out)
    assert [int(row["step"]) for row in rows] == [3, 6, 9]
    assert [float(row["learning_rate"]) for row in rows] == [recipe.rate(s) for s in (2, 5, 8)]
    means = [np.mean([losses[s] for s in range(i, i + 3)]) for i in (1, 4, 7)]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means, rel=1e-5)
    assert all(-50 < float(row["validation_psnr"]) < 50 for row in rows)


@pytest.mark.parametrize("network", RECIPES)
def test_weights_change_and_are_averaged(uninterrupted, network):
    saved = read_checkpoint(uninterrupted[network][0])
    torch.manual_seed(RECIPES[network].seed)
    initial = RECIPES[network].build().state_dict()
    for name, value in saved["model"].items():
        assert not torch.equal(value, initial[name])
        if value.is_floating_point():
            assert not torch.equal(value, saved["averaged"][name])


@pytest.mark.parametrize("network", RECIPES)
@pytest.mark.parametrize("stops", [(3, 9), (6, 9), (3, 6, 9)])
def test_a_run_in_parts_is_the_run_in_one(data, uninterrupted, tmp_path, stops, network):
    for steps in stops:
        run(data, tmp_path, steps, RECIPES[network])
    assert_same_run(tmp_path, uninterrupted[network][0])


@pytest.mark.parametrize("network", RECIPES)
@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_kill_at_any_step(data, uninterrupted, tmp_path, monkeypatch, at, network):
    """The loss curve, the weights and the log of the unbroken run, to the last bit in float32."""
    original = Patches.batch

    def killed(patches, recipe, step):
        if step == at:
            raise KeyboardInterrupt
        return original(patches, recipe, step)

    out, losses = uninterrupted[network]
    with recorded_losses() as found:
        with monkeypatch.context() as patch:
            patch.setattr(Patches, "batch", killed)
            with pytest.raises(KeyboardInterrupt):
                run(data, tmp_path, 9, RECIPES[network])
        assert (tmp_path / "checkpoint.pt").exists() == (at >= 3)
        run(data, tmp_path, 9, RECIPES[network])
    assert found == losses
    assert_same_run(tmp_path, out)


def told_to_stop(monkeypatch, number, at):
    """A signal that arrives in the midst of a step: Ctrl-C, say."""
    original = training._Run.advance

    def advance(run, *batch):
        if run.step == at:
            signal.raise_signal(number)
        original(run, *batch)

    monkeypatch.setattr(training._Run, "advance", advance)


def stopped(at, *arguments, **options):
    """A run with Ctrl-C in the midst of a step."""
    with pytest.MonkeyPatch.context() as patch:
        told_to_stop(patch, signal.SIGINT, at)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, **options)


@pytest.mark.parametrize("network", RECIPES)
@pytest.mark.parametrize("at", [0, 3, 4, 8])
def test_a_stop_loses_no_step(data, uninterrupted, tmp_path, capsys, at, network):
    """The step in work is done and saved; the run that goes on is the unbroken one."""
    out, losses = uninterrupted[network]
    with recorded_losses() as found:
        stopped(at, data, tmp_path, 9, RECIPES[network])
        assert read_checkpoint(tmp_path)["step"] == at + 1
        assert sorted(found) == list(range(1, at + 2))
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"step {at + 1}: saved; the same command goes on from here"
        run(data, tmp_path, 9, RECIPES[network])
    assert found == losses
    assert_same_run(tmp_path, out)


def test_stopped_time_and_again(data, uninterrupted, tmp_path):
    for at in range(9):
        stopped(at, data, tmp_path, 9)
    assert_same_run(tmp_path, uninterrupted["edsr"][0])


def test_a_stop_does_then_what_it_did_before(data, tmp_path, monkeypatch):
    """Whoever handles SIGTERM still does, and after the run as before it."""
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        told_to_stop(monkeypatch, signal.SIGTERM, 1)
        run(data, tmp_path, 9)
        assert asked == [signal.SIGTERM]
        assert read_checkpoint(tmp_path)["step"] == 2
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_is_ignored(data, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        told_to_stop(monkeypatch, signal.SIGTERM, 1)
        run(data, tmp_path, 3)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert read_checkpoint(tmp_path)["step"] == 3


def test_the_second_stop_does_not_wait(data, tmp_path, monkeypatch):
    original = training._Run.save

    def save(run, held_out=None):
        signal.raise_signal(signal.SIGINT)
        original(run, held_out)

    monkeypatch.setattr(training._Run, "save", save)
    stopped(4, data, tmp_path, 9, save_every=9)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_of_earlier_versions(data, uninterrupted, tmp_path):
    """Without losses, which were written where a row of the log was due; of one device."""
    run(data, tmp_path, 3)
    state = read_checkpoint(tmp_path)
    assert state.pop("losses") == []
    assert list(state.pop("seconds_by_device")) == ["cpu"]
    torch.save(state | {"seconds": 70.0, "device": "cuda"}, tmp_path / "checkpoint.pt")
    run(data, tmp_path, 9)
    assert_same_run(tmp_path, uninterrupted["edsr"][0])
    seconds = read_checkpoint(tmp_path)["seconds_by_device"]
    assert list(seconds) == ["cuda", "cpu"]
    assert seconds["cuda"] == 70
    with open(tmp_path / "log.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    assert float(last["seconds"]) == pytest.approx(sum(seconds.values()), abs=0.1)


def test_in_another_thread(data, tmp_path):
    """Which may not listen to signals."""
    thread = threading.Thread(target=run, args=(data, tmp_path, 1))
    thread.start()
    thread.join()
    assert read_checkpoint(tmp_path)["step"] == 1


@pytest.mark.parametrize("while_writing", ["checkpoint.pt", "log.csv"])
def test_a_kill_while_writing_leaves_the_old_file(
    data, uninterrupted, tmp_path, monkeypatch, while_writing
):
    """Half a file is left as .part, which is never taken for the checkpoint or the log."""
    run(data, tmp_path, 3)
    before = (tmp_path / while_writing).read_bytes()
    original = training.write_whole

    def killed(path, save):
        if path.name == while_writing:
            path.with_name(path.name + ".1.part").write_bytes(b"half")  # as write_whole does
            raise KeyboardInterrupt
        original(path, save)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, 9)
    assert (tmp_path / while_writing).read_bytes() == before
    assert read_checkpoint(tmp_path)["step"] == 3
    run(data, tmp_path, 9)
    assert_same_run(tmp_path, uninterrupted["edsr"][0])


def test_a_run_that_is_done_is_left_alone(data, tmp_path, capsys):
    run(data, tmp_path, 3)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    capsys.readouterr()
    for steps in (3, 2):
        run(data, tmp_path, steps)
        assert "is at step 3 already" in capsys.readouterr().out
    refused("there is no folder 'gone'", "gone", tmp_path, 3)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_fifty_steps_lower_the_loss(data, tmp_path, capsys):
    recipe = replace(RECIPE, learning_rate=1e-3, halve_every=1000, precision="bfloat16")
    run(data, tmp_path, 50, recipe, save_every=10)
    told = capsys.readouterr().out.splitlines()
    losses = [float(row["loss"]) for row in log(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
    assert told[0] == "8 images to train on, 2 held out for validation"
    assert "not compared with Set5, Set14, B100, Urban100: not on this machine" in told[1]
    assert told[2] == "training on cpu in bfloat16, step 0 of 50"
    steps = [line for line in told if line.startswith("step ") and "min left" in line]
    assert len(steps) == 10


@pytest.mark.parametrize(
    ("precision", "cost", "said"),
    [("bfloat16", 4, True), ("bfloat16", 1, False), ("float32", 4, False)],
)
def test_a_processor_without_bfloat16_is_told(
    data, tmp_path, capsys, monkeypatch, precision, cost, said
):
    monkeypatch.setattr(training, "cost_of_bfloat16", lambda: cost)
    run(data, tmp_path, 1, replace(RECIPE, precision=precision))
    assert ("bfloat16 takes 4.0 times as long" in capsys.readouterr().out) == said


def test_cost_of_bfloat16_draws_no_random_number():
    before = torch.get_rng_state()
    assert 0 < training.cost_of_bfloat16() < 100
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("network", RECIPES)
def test_bfloat16_trains_every_network(data, tmp_path, network):
    run(data, tmp_path, 2, replace(RECIPES[network], precision="bfloat16"))
    saved = read_checkpoint(tmp_path)["model"]
    assert {v.dtype for v in saved.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "new"])
def test_only_one_run_works_in_a_folder(data, tmp_path, begun):
    out = tmp_path / "out"
    if begun:
        run(data, out, 3)
    before = {p.name: p.read_bytes() for p in out.iterdir()} if begun else {}
    out.mkdir(exist_ok=True)
    with (
        FileLock(out / ".lock"),
        pytest.raises(ValueError, match=r"another run is at work in .*out; wait, stop it, or give"),
    ):
        run(data, out, 6)
    after = {p.name: p.read_bytes() for p in out.iterdir()}
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }
    run(data, out, 6)
    assert read_checkpoint(out)["step"] == 6


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "new"])
def test_a_run_that_another_overtook_writes_nothing(data, tmp_path, monkeypatch, begun):
    """One that ended while this one was reading its images."""
    out, images = tmp_path / "out", training.training_images
    if begun:
        run(data, out, 3)

    def overtaken(*arguments):
        monkeypatch.setattr(training, "training_images", images)
        run(data, out, 6)
        return images(*arguments)

    monkeypatch.setattr(training, "training_images", overtaken)
    with pytest.raises(ValueError, match=r"another run has been at work in .*out meanwhile"):
        run(data, out, 9)
    assert read_checkpoint(out)["step"] == 6
    run(data, out, 9)


# --- initial weights ---


def weights(path, recipe=RECIPE, step=7):
    torch.manual_seed(5)
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in recipe.build().state_dict().items()
    }
    save_file(state, path, {"step": str(step)})
    return state


def test_going_on_from_published_weights(data, tmp_path):
    """Their steps, seconds and log stand behind the run; the schedule goes by all steps."""
    path = tmp_path / "w.safetensors"
    initial = weights(path)
    rows = [[s, 5e-4, 0.1, 20.0, 60.0 * s] for s in (5, 7, 10)]
    text = "\n".join(",".join(map(str, row)) for row in (training.LOG_FIELDS, *rows))
    path.with_suffix(".csv").write_text(text + "\n")
    recipe = replace(RECIPE, learning_rate=1e-30)  # changes nothing
    run(data, tmp_path / "out", 8, recipe, initial=path)
    saved = read_checkpoint(tmp_path / "out")
    assert (saved["step"], saved["recipe"]["first_step"]) == (8, 7)
    assert saved["seconds_by_device"]["unknown"] == 420
    assert saved["seconds_by_device"]["cpu"] > 0
    assert saved["initial"]["name"] == "w"
    assert saved["initial"]["data"] is None
    assert all(torch.equal(saved["model"][k], v.float()) for k, v in initial.items())
    found = log(tmp_path / "out")
    assert [row["step"] for row in found] == ["5", "7", "8"]
    assert float(found[-1]["learning_rate"]) == pytest.approx(1e-30 / 2 / 2, rel=1e-5)
    run(data, tmp_path / "out", 10, recipe)  # the weights need not be named again
    run(data, tmp_path / "out", 11, recipe, initial=path)
    assert read_checkpoint(tmp_path / "out")["recipe"]["first_step"] == 7


@pytest.mark.parametrize("network", RECIPES)
@pytest.mark.parametrize("of", ["the same network", "another scale"])
def test_a_run_with_initial_weights_in_parts_is_the_run_in_one(data, tmp_path, network, of):
    recipe, path = RECIPES[network], tmp_path / "w.safetensors"
    other = {2: 4, 4: 2}[recipe.scale] if of == "another scale" else recipe.scale
    weights(path, replace(recipe, scale=other))
    first = 7 if of == "the same network" else 0
    for out, stops in (("one", [6]), ("parts", [2, 3, 6])):
        for stop in stops:
            run(data, tmp_path / out, first + stop, recipe, initial=path)
    one, parts = (read_checkpoint(tmp_path / out) for out in ("one", "parts"))
    assert one["recipe"]["first_step"] == first
    kept = ("recipe", "data", "initial", "model", "averaged", "optimizer", "step")
    for a, b in zip(*(flat([state[key] for key in kept]) for state in (one, parts)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("of", ["these weights", "others"])
def test_the_record_of_initial_weights_is_kept(data, tmp_path, of):
    """What they were trained on, and how long on which device, if it is theirs."""
    path = tmp_path / "w.safetensors"
    weights(path)
    path.with_suffix(".csv").write_text(f"{','.join(training.LOG_FIELDS)}\n7,1,0.1,20,420\n")
    digest = hashlib.sha256(path.read_bytes() if of == "these weights" else b"").hexdigest()
    record = {
        "weights": {"sha256": digest},
        "recipe": {"batch": 2},
        "data": {"source": "BSDS500", "images": 349},
        "initial": {"name": "v", "data": None},
        "seconds": {"cuda": 20.0, "cpu": 400.0},
    }
    path.with_suffix(".json").write_text(json.dumps(record))
    run(data, tmp_path / "out", 8, initial=path)
    saved = read_checkpoint(tmp_path / "out")
    if of == "others":
        assert {saved["initial"][key] for key in ("recipe", "data", "initial")} == {None}
        assert list(saved["seconds_by_device"]) == ["unknown", "cpu"]
        return
    kept = ("recipe", "data", "initial")
    assert {key: saved["initial"][key] for key in kept} == {key: record[key] for key in kept}
    assert saved["seconds_by_device"]["cuda"] == 20
    assert 400 < saved["seconds_by_device"]["cpu"] < 420
    recipe = replace(RECIPE, scale=4)  # another network: its time is its own
    run(data, tmp_path / "x4", 1, recipe, initial=path)
    saved = read_checkpoint(tmp_path / "x4")
    assert list(saved["seconds_by_device"]) == ["cpu"]
    assert saved["initial"]["data"] == record["data"]


def test_x4_from_x2(data, tmp_path, capsys):
    initial = weights(tmp_path / "w.safetensors", RECIPES["srresnet"])
    recipe = replace(RECIPES["srresnet"], scale=4, learning_rate=1e-30, average=0.0)
    run(data, tmp_path / "out", 1, recipe, initial=tmp_path / "w.safetensors")
    told = capsys.readouterr().out
    assert f"{len(initial)} tensors taken\n" in told
    assert "not found there: upsampler.3.weight, upsampler.3.bias, upsampler.5.weight\n" in told
    saved = read_checkpoint(tmp_path / "out")
    assert (saved["step"], saved["recipe"]["first_step"]) == (1, 0)
    assert saved["initial"]["taken"] == len(initial)
    learned = [k for k, v in initial.items() if v.dim() > 0 and "running" not in k]
    for key in learned:
        torch.testing.assert_close(saved["model"][key], initial[key].float(), rtol=0, atol=1e-20)


# --- what is refused ---


def refused(message, *arguments, error=ValueError, **options):
    out = arguments[1]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(error, match=message):
        run(*arguments, **options)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"learning_rate": 1e-3}, r"learning_rate is 0\.0005 there and 0\.001 here"),
        ({"features": 8}, "features is 4 there and 8 here"),
        ({"precision": "bfloat16"}, "precision is 'float32' there and 'bfloat16' here"),
        ({"network": "srresnet"}, "network is 'edsr' there and 'srresnet' here"),
        ({"network": "rdn", "layers": 2, "growth": 2}, "network is 'edsr' there and 'rdn' here"),
    ],
)
def test_a_checkpoint_of_another_recipe(data, tmp_path, change, message):
    run(data, tmp_path, 1)
    message = f"made by another recipe: {message}; give the same options, or another folder"
    refused(message, data, tmp_path, 2, replace(RECIPE, **change))


def test_a_checkpoint_of_other_images_or_weights(data, tmp_path):
    run(data, tmp_path / "out", 1)
    (tmp_path / "others").mkdir()
    for seed in range(3):
        Image.fromarray(random_image(seed)).save(tmp_path / "others" / f"{seed}.png")
    message = r"checkpoint\.pt was trained on other images: 8 of photos\d*; give the same"
    for steps in (2, 1):
        refused(message, tmp_path / "others", tmp_path / "out", steps)
    weights(tmp_path / "w.safetensors")
    message = r"checkpoint\.pt began with other weights than those given as initial"
    refused(message, data, tmp_path / "out", 2, initial=tmp_path / "w.safetensors")


def test_a_damaged_checkpoint(data, tmp_path):
    run(data, tmp_path, 1)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        refused(r"checkpoint\.pt is damaged or no checkpoint; move it", data, tmp_path, 2)


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(data, tmp_path, monkeypatch):
    run(data, tmp_path, 1)

    (tmp_path / "not a file" / "checkpoint.pt").mkdir(parents=True)
    with pytest.raises(OSError, match=r"checkpoint\.pt cannot be read: Is a directory$"):
        run(data, tmp_path / "not a file", 2)

    def is_full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", is_full)
    refused("^$", data, tmp_path, 2, error=MemoryError)


def test_a_run_without_its_log_or_with_another_file_in_its_place(data, tmp_path):
    run(data, tmp_path, 1)
    text = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    refused(r"log\.csv is not the log of a run: no table of step, lea", data, tmp_path, 2)
    (tmp_path / "log.csv").unlink()
    message = r"log\.csv is missing: a run writes it beside its checkpoint"
    refused(message, data, tmp_path, 2, error=FileNotFoundError)
    (tmp_path / "log.csv").write_text(text)
    run(data, tmp_path, 2)
    assert [row["step"] for row in log(tmp_path)] == ["1", "2"]


def test_options_out_of_range(data, tmp_path):
    refused("steps must be at least 1, not 0", data, tmp_path, 0)
    refused("save_every must be at least 1, not 0", data, tmp_path, 1, save_every=0)
    refused("device must be cpu.* not 'abacus'", data, tmp_path, 1, device="abacus")
    weights(tmp_path / "w.safetensors")
    initial = tmp_path / "w.safetensors"
    message = "initial weights have behind them: it must be more than 7, not"
    for steps in (3, 7):
        refused(f"{message} {steps}", data, tmp_path, steps, initial=initial)
    other = replace(RECIPE, features=8)
    refused("does not fit edsr", data, tmp_path, 9, other, initial=initial)
    gone = tmp_path / "gone.safetensors"
    message = r"no such file of initial weights: .*gone"
    refused(message, data, tmp_path, 9, initial=gone, error=FileNotFoundError)


def test_patches_that_no_image_holds(data, tmp_path):
    message = "0 of 10 images to train on, .*: 10 smaller than 80x80 pixels, 0 showing"
    refused(message, data, tmp_path, 1, replace(RECIPE, patch=40))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch, bad):
    original = Patches.batch

    def broken(patches, recipe, step):
        lr, hr = original(patches, recipe, step)
        return lr, hr * bad if step == 4 else hr

    monkeypatch.setattr(Patches, "batch", broken)
    with pytest.raises(FloatingPointError, match=f"the loss is {bad} at step 4; the last"):
        run(data, tmp_path, 9)
    assert read_checkpoint(tmp_path)["step"] == 3
    assert [row["step"] for row in log(tmp_path)] == ["3"]
