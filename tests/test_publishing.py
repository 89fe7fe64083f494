"""What is published is what was trained, and every figure of its card comes from the run."""

import hashlib
import json
import os
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dfsq import files
from dfsq.sr import zoo
from dfsq.sr.datasets import ImagePair
from dfsq.sr.fetch import files_of
from dfsq.sr.imaging import imresize, psnr_y
from dfsq.study import publishing, recipes
from dfsq.study.figures import training_curve
from dfsq.study.publishing import card, page, publish
from dfsq.study.recipes import Recipe
from dfsq.study.training import (
    LOG_FIELDS,
    read_checkpoint,
    read_log,
    train,
    validate,
    write_log,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "edsr-x2": Recipe(blocks=1, features=4),
    "srresnet-x2": Recipe("srresnet", blocks=1, features=4),
    "srresnet-x4": Recipe("srresnet", 4, blocks=1, features=4),
}
SUFFIXES = ("csv", "json", "md", "png", "safetensors")


def random_image(seed):
    small = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    return imresize(small, 4)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs of tiny networks under the names of the recipes, in `runs`; and a folder of photos."""
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DFSQ_DATA", raising=False)
    monkeypatch.setattr(publishing, "RECIPES", TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for seed in range(4):
        Image.fromarray(random_image(seed)).save(tmp_path / "photos" / f"{seed}.png")

    def run(name, steps=4, out=None, initial=None, **changes):
        made = replace(TINY[name], **{"patch": 6, "batch": 2} | changes)
        folder = tmp_path / "runs" / (out or name)
        train("photos", folder, made, steps, initial=initial, save_every=2, device="cpu")
        return folder

    return run


def published(run, name, folder="weights", sets=("photos",)):
    return publish(name, run, folder, sets=sets, device="cpu")


@pytest.mark.parametrize("name", TINY)
def test_what_is_published(trained, tmp_path, name, monkeypatch):
    run = trained(name)
    target = published(run, name)
    files = sorted(p.name for p in (tmp_path / "weights").iterdir())
    assert files == [f"{name}.{suffix}" for suffix in SUFFIXES]

    averaged = read_checkpoint(run)["averaged"]
    weights = load_file(target)
    assert weights.keys() == averaged.keys()
    for key, value in weights.items():
        half = averaged[key].half() if averaged[key].is_floating_point() else averaged[key]
        assert torch.equal(value, half)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"step": "4", "value_range": "1"}

    about = target.with_suffix(".md").read_text()
    monkeypatch.setattr(zoo, "WEIGHTS_FOLDER", tmp_path / "weights")
    model = zoo.load_model(name)
    assert name in zoo.model_names()
    facts = json.loads(target.with_suffix(".json").read_text())
    assert (facts["name"], facts["steps"], facts["initial"]) == (name, 4, None)
    assert Recipe(**facts["recipe"]) == replace(TINY[name], patch=6, batch=2)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["weights"]["bytes"] == target.stat().st_size
    assert facts["weights"]["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert facts["data"] == read_checkpoint(run)["data"]
    scale = model.scale
    hrs = [random_image(i) for i in range(4)]
    pairs = [ImagePair("", imresize(hr, 1 / scale), hr) for hr in hrs]
    bicubic = np.mean([psnr_y(imresize(p.lr, scale), p.hr, scale) for p in pairs])
    assert facts["psnr"]["photos"]["bicubic"] == pytest.approx(bicubic)
    assert facts["psnr"]["photos"]["float"] == pytest.approx(validate(model, pairs))
    assert target.with_suffix(".csv").read_bytes() == (run / "log.csv").read_bytes()
    assert about == card(facts, f"{name}.safetensors")  # the name is of what the project holds
    monkeypatch.setattr(publishing, "WEIGHTS_FOLDER", tmp_path / "weights")
    published(run, name)
    assert target.with_suffix(".md").read_text() == card(facts)
    assert f'load_model("{name}")' in card(facts)


def test_weights_of_another_run_are_replaced_only_when_asked(trained, tmp_path):
    run = trained("edsr-x2", steps=2)
    target = published(run, "edsr-x2")
    published(run, "edsr-x2")  # anew
    published(trained("edsr-x2"), "edsr-x2")  # the same run, further on
    published(trained("edsr-x2", steps=6, out="more", initial=target, batch=1), "edsr-x2")
    before = {path.name: path.read_bytes() for path in target.parent.iterdir()}
    other = trained("edsr-x2", steps=50, out="other", seed=1)
    for path in (other, run):  # one that did not begin with them, and one that they began with
        with pytest.raises(
            ValueError, match=r"another run, of 6 steps.*did not begin with it.*--out"
        ):
            published(path, "edsr-x2")
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == before
    publish("edsr-x2", other, "weights", sets=("photos",), replace=True, device="cpu")
    assert json.loads(target.with_suffix(".json").read_text())["steps"] == 50


def test_a_run_is_known_by_its_pixels_wherever_they_lie(trained, tmp_path, monkeypatch):
    published(trained("edsr-x2", steps=2), "edsr-x2")
    (tmp_path / "data" / "Set5").mkdir(parents=True)
    shown = tmp_path / "data" / files_of("Set5")[0]
    Image.fromarray(random_image(9)).save(shown)
    monkeypatch.setenv("DFSQ_DATA", str(tmp_path / "data"))
    target = published(trained("edsr-x2"), "edsr-x2")  # compared with more than before
    facts = json.loads(target.with_suffix(".json").read_text())
    assert (facts["steps"], facts["data"]["compared"]["Set5"]) == (4, 1)
    text = target.with_suffix(".md").read_text()
    assert "photographs (3), Set5 (1).\n" in text or "photographs (3), Set5 (1). " in text
    assert "Not compared with 4 of the 5 images of Set5, Set14, " in text


@pytest.mark.parametrize("content", ["{", "{}", "[]", None])
def test_weights_of_which_nothing_is_known_are_replaced_only_when_asked(trained, content):
    run = trained("edsr-x2", steps=2)
    target = published(run, "edsr-x2")
    if content is None:
        target.with_suffix(".json").unlink()
        message = r"edsr-x2\.safetensors is of a run not known, as no edsr-x2\.json is there; publ"
    else:
        target.with_suffix(".json").write_text(content)
        message = r"edsr-x2\.json is not what was published of a network; publish to another"
    target.write_bytes(b"precious")
    with pytest.raises(ValueError, match=message):
        published(run, "edsr-x2")
    assert target.read_bytes() == b"precious"
    publish("edsr-x2", run, "weights", sets=("photos",), replace=True, device="cpu")
    assert target.read_bytes() != b"precious"


def test_sets_of_one_name_are_refused(trained, tmp_path):
    run = trained("edsr-x2", steps=2)
    for folder in ("a/HR", "b/HR", "a/Set5"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(random_image(1)).save(tmp_path / folder / "x.png")
    with pytest.raises(ValueError, match=r"sets: a/HR and b/HR are both called HR; rename one"):
        published(run, "edsr-x2", sets=("a/HR", "b/HR"))
    with pytest.raises(ValueError, match=r"a/Set5 is a folder, and the card would call it Set5"):
        published(run, "edsr-x2", sets=("a/Set5",))
    assert not (tmp_path / "weights").exists()
    target = published(run, "edsr-x2", sets=("a/HR", "a/HR/../../photos"))
    assert json.loads(target.with_suffix(".json").read_text())["psnr"].keys() == {"HR", "photos"}


def test_the_card_tells_the_facts(trained, tmp_path):
    published(trained("srresnet-x2"), "srresnet-x2")
    initial = tmp_path / "weights" / "srresnet-x2.safetensors"
    published(trained("srresnet-x4", initial=initial), "srresnet-x4")
    facts = json.loads((tmp_path / "weights" / "srresnet-x4.json").read_text())
    text = card(facts)
    digest = hashlib.sha256(initial.read_bytes()).hexdigest()
    for figure in (
        f"{facts['parameters'] / 1e6:.2f} million parameters",
        facts["weights"]["sha256"],
        f"| photos | {facts['psnr']['photos']['bicubic']:.3f} | ",
        f"{facts['psnr']['photos']['float']:.3f} |",
        "SRResNet, 4-fold, 1 blocks, 4 features",
        "4 steps, 0 hours on a CPU",
        f"Started from `srresnet-x2` (SHA-256 `{digest}`)",
        "not found there: `upsampler.3.weight`, `upsampler.3.bias`, `upsampler.5.weight`.",
        "| `learning_rate` | 0.0005 |",
        "3 images of photos; 1 more are held out",
        "Licence of the images: not known to this project",
        facts["data"]["digest"],
        "photographs (3).",
        "Not compared with Set5, Set14, B100, Urban100, which were not there.",
        "No benchmark image was found.",
        'load_model("srresnet-x4")',
    ):
        assert figure in text, figure
    changed = facts | {"data": facts["data"] | {"too_small": 5, "left_out": {"a.png": "Set5/x"}}}
    assert "5 images smaller than a patch were left out." in card(changed)
    assert "Left out: `a.png` (shows Set5/x)." in card(changed)
    assert (
        "The weights of `srresnet-x2` that it began with were trained on 3 images of photos; "
        "licence of the images: not known to this project: a folder of the user's."
    ) in text
    first = facts["initial"] | {"name": "X", "data": facts["data"] | {"licence": "CC0"}}
    chained = card(facts | {"initial": facts["initial"] | {"initial": first}})
    assert "The weights of `srresnet-x2` that it began with were trained on " in chained
    assert "The weights of `X` that `srresnet-x2` began with were trained on " in chained
    assert "licence of the images: CC0." in chained
    earlier = {k: v for k, v in facts["initial"].items() if k not in ("data", "initial")}
    unknown = card(facts | {"initial": earlier})  # as earlier versions left it
    assert "What the weights of `srresnet-x2` that it began with were trained on is not" in unknown
    both = card(facts | {"seconds": {"cuda": 720.0, "cpu": 5400.0}})
    assert "4 steps, 0.2 hours on a GPU and 1.5 hours on a CPU, to " in both
    assert "dB on held-out images. Started" in text
    assert "dB on held-out images at step 2. Started" in card(facts | {"validated_at": 2})
    later = facts | {"recipe": facts["recipe"] | {"first_step": 3500}}
    assert "the same network after 3,500 steps." in card(later)


def test_the_card_tells_the_recipes_of_earlier_runs(trained, tmp_path):
    folder = tmp_path / "weights"
    published(trained("srresnet-x2", steps=2), "srresnet-x2")
    initial = folder / "srresnet-x2.safetensors"
    of_first = hashlib.sha256(initial.read_bytes()).hexdigest()
    run = trained("srresnet-x2", steps=4, initial=initial, out="more", batch=3, learning_rate=0.001)
    published(run, "srresnet-x2")
    facts = json.loads((folder / "srresnet-x2.json").read_text())
    text = card(facts)
    assert f"(SHA-256 `{of_first}`), the same network after 2 steps." in text
    assert "| `batch` | 3 |" in text
    assert "Steps 1 to 2 were made with `batch` 2, `learning_rate` 0.0005. Started without" in text
    same = facts["initial"] | {"recipe": facts["recipe"] | {"first_step": 0}}
    assert "Steps 1 to 2 were made by the same recipe." in card(facts | {"initial": same})
    chained = facts["initial"] | {
        "recipe": facts["recipe"] | {"first_step": 1, "patch": 99},
        "initial": facts["initial"] | {"recipe": None, "sha256": "0"},
    }
    text = card(facts | {"initial": chained})
    assert (
        "Steps 2 to 2 were made with `patch` 99. Started from `srresnet-x2` (SHA-256 `0`)" in text
    )
    assert "The recipe of the first 1 steps is not known." in text  # as earlier versions left it


def test_the_card_names_the_sets_not_measured(trained, tmp_path, monkeypatch):
    pairs = publishing.load_dataset("photos", 2)
    monkeypatch.setattr(publishing, "load_dataset", lambda name, scale: pairs)
    run = trained("edsr-x2")

    def results(sets):
        target = published(run, "edsr-x2", sets=sets)
        text = target.with_suffix(".md").read_text()
        return text[text.index("## Results") : text.index("## Training")]

    found = results(("Set14", "photographs"))
    assert re.findall(r"^\| (\w+) \| \d", found, re.M) == ["Set14", "photographs"]
    assert found.endswith("\n\nNot measured when published: Set5, B100, Urban100.\n\n")
    assert "Not measured" not in results(publishing.BENCHMARK_SETS)


@pytest.mark.parametrize("first", ["step", "value_range"])
def test_published_anew_weights_are_the_same_file(trained, monkeypatch, first):
    """Whatever order the library writes metadata in, which changes from process to process."""
    run = trained("srresnet-x2", 2)
    before = published(run, "srresnet-x2").read_bytes()
    plain = files.save

    def save(weights, metadata):
        second = next(key for key in metadata if key != first)
        content = plain(weights, {first: metadata[first]})
        own, both = (
            json.dumps({k: metadata[k] for k in keys}, separators=(",", ":")).encode()
            for keys in ((first,), (first, second))
        )
        end = 8 + int.from_bytes(content[:8], "little")
        header = content[8:end].rstrip().replace(own, both)
        header = header.ljust(-(-len(header) // 8) * 8)
        return len(header).to_bytes(8, "little") + header + content[end:]

    monkeypatch.setattr(files, "save", save)
    assert published(run, "srresnet-x2").read_bytes() == before


def test_cards_tell_of_the_weights_that_are_here():
    """Weights that a network began with have the digest of those published by that name."""
    facts = {p.stem: json.loads(p.read_text()) for p in zoo.WEIGHTS_FOLDER.glob("*.json")}
    compared = []
    for name, own in facts.items():
        initial = own["initial"]
        while initial is not None:
            if initial["name"] != name:  # and not the same network at an earlier step
                assert initial["sha256"] == facts[initial["name"]]["weights"]["sha256"], name
                compared.append(name)
            initial = initial.get("initial")
    assert set(compared) >= {"edsr-x4", "edsr-long-x2", "srresnet-x4", "rdn-small-x4"}


def test_large_weights_stay_beside_the_run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "LARGEST", 1000)
    run = trained("edsr-x2")
    target = published(run, "edsr-x2")
    assert target == run / "edsr-x2.safetensors"
    files = sorted(p.suffix for p in (tmp_path / "weights").iterdir())
    assert files == [".csv", ".json", ".md", ".png"]
    for suffix in (".csv", ".json"):  # for training that starts from them
        beside = target.with_suffix(suffix).read_text()
        assert beside == (tmp_path / "weights" / f"edsr-x2{suffix}").read_text()
    text = (tmp_path / "weights" / "edsr-x2.md").read_text()
    assert "too large for the repository" in text
    assert 'load_model("edsr-x2.safetensors")' in text


def test_large_weights_are_taken_by_their_file(tmp_path, monkeypatch):
    """As published, with no word of the range of values."""
    averaged = zoo.load_model("edsr-x2").state_dict()
    state = {
        "recipe": recipes.RECIPES["edsr-x2"].facts(),
        "averaged": averaged,
        "step": 4,
        "seconds_by_device": {"cpu": 1.0},
        "initial": None,
        "data": json.loads((zoo.WEIGHTS_FOLDER / "edsr-x2.json").read_text())["data"],
    }
    torch.save(state, tmp_path / "checkpoint.pt")
    row = dict.fromkeys(LOG_FIELDS, 1.0) | {"step": 4}
    write_log(tmp_path / "log.csv", [row])
    monkeypatch.setattr(publishing, "LARGEST", 1000)
    target = publish("edsr-x2", tmp_path, tmp_path / "weights", sets=(), device="cpu")
    assert target == tmp_path / "edsr-x2.safetensors"
    loaded = zoo.load_model(target)
    assert loaded.value_range == 1
    assert all(torch.equal(v, averaged[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["srresnet-x2", "srresnet-x4", "rdn-small-x2", "rdn-small-x4"])
def test_weights_of_every_network_are_read_from_a_file(name, tmp_path):
    """A file of them is read as what was trained, the architecture being seen by its keys."""
    torch.manual_seed(0)
    made = recipes.RECIPES[name].build().eval()
    path = tmp_path / "w.safetensors"
    save_file(made.state_dict(), path)
    loaded = zoo.from_state(zoo.read_weights(path), 1.0)
    x = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))


def test_weights_beyond_half_precision(trained, tmp_path):
    run = trained("srresnet-x2")
    state = read_checkpoint(run)
    state["averaged"]["merge.1.running_var"][0] = 7e4
    torch.save(state, run / "checkpoint.pt")
    message = r"'merge\.1\.running_var' of the checkpoint in .* goes up to 7e\+04, and half"
    with pytest.raises(ValueError, match=message):
        published(run, "srresnet-x2")
    assert not (tmp_path / "weights").exists()


def test_others_may_read_published_weights(trained):
    before = os.umask(0o022)
    try:
        target = published(trained("edsr-x2"), "edsr-x2")
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o644


def test_only_rdn_is_too_large():
    large = {n for n, made in recipes.RECIPES.items() if recipes.size(made)[1] > publishing.LARGEST}
    assert large == {"rdn-x2", "rdn-x4"}


def test_a_run_that_was_stopped(trained, tmp_path):
    """The last validation is told with its step; without one there is nothing to publish."""
    run = trained("edsr-x2", 3)
    rows = read_log(run / "log.csv", 3)
    assert [row["step"] for row in rows] == ["2", "3"]
    write_log(run / "log.csv", rows[:1])
    facts = json.loads(published(run, "edsr-x2").with_suffix(".json").read_text())
    assert (facts["steps"], facts["validated_at"]) == (3, 2)
    assert facts["validation_psnr"] == float(rows[0]["validation_psnr"])
    (run / "log.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"log\.csv is missing"):
        published(run, "edsr-x2", "others")
    write_log(run / "log.csv", [])
    message = r"stopped before its first validation; go on: `dfsq train edsr-x2`"
    with pytest.raises(ValueError, match=message):
        published(run, "edsr-x2", "others")
    assert not (tmp_path / "others").exists()


def test_what_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="there is no recipe 'edsr'; there are edsr-x2, "):
        published(tmp_path, "edsr")
    with pytest.raises(ValueError, match=r"no checkpoint in .*; train first: `dfsq train edsr-x2`"):
        published(tmp_path / "gone", "edsr-x2")
    run = trained("srresnet-x2", 2)
    with pytest.raises(ValueError, match=r"is of the network \{'network': 'srresnet', .* edsr-x2"):
        published(run, "edsr-x2")
    with pytest.raises(ValueError, match="unknown data set 'gone'"):
        published(run, "srresnet-x2", sets=["gone"])
    assert not (tmp_path / "weights").exists()


def test_the_page_shows_every_network_by_itself(trained, tmp_path):
    names = ["edsr-x2", "srresnet-x2"]
    for name in reversed(names):
        published(trained(name), name)
    text = page(tmp_path / "weights")
    assert re.findall(r"^## (.*)$", text, re.M) == names  # in the order of the recipes
    assert re.findall(r"^:name: fig-training-(.*)$", text, re.M) == names
    assert re.findall(r"^:file: (.*)$", text, re.M) == [f"../data/weights/{n}.csv" for n in names]
    assert not re.findall(r"^# ", text, re.M)
    assert text.count("on 1 held-out images") == 2
    (tmp_path / "weights" / "edsr-x2.json").unlink()
    assert re.findall(r"^## (.*)$", page(tmp_path / "weights"), re.M) == ["srresnet-x2"]


# --- what the project has published ---


def test_the_projects_own_files(repository):
    folder = repository / "data" / "weights"
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text())
        name = facts["name"]
        assert path.stem == name
        made = Recipe(**facts["recipe"])
        assert made.network_facts() == recipes.RECIPES[name].network_facts()
        assert path.with_suffix(".md").read_text() == card(facts)
        weights = path.with_suffix(".safetensors")
        assert weights.is_file() == (facts["weights"]["bytes"] <= publishing.LARGEST)
        if weights.is_file():
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            assert facts["weights"] == {"bytes": weights.stat().st_size, "sha256": digest}
            with safe_open(weights, "pt") as file:
                assert file.metadata()["step"] == str(facts["steps"])
    committed = {path.stem for path in folder.glob("*.safetensors")}
    assert committed <= {path.stem for path in folder.glob("*.json")}
    assert page(folder)


@pytest.mark.parametrize(("first", "lowest", "title"), [(18, 31.5, True), (31.9, 31.5, False)])
def test_a_curve_shows_what_is_gained_in_the_end(first, lowest, title):
    log = {"step": [500, 1000, 1500], "loss": [3, 2, 1], "validation_psnr": [first, 32, 32.5]}
    figure = training_curve(pd.DataFrame(log))
    right = figure.axes[1]
    bottom, top = right.get_ylim()
    assert bottom >= lowest
    assert top > 32.5
    assert bool(right.get_title()) == title  # which says that there is more below
    assert (first >= bottom) != title
    plt.close(figure)
