"""Recipes by name, and networks started from weights."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from dfsq.sr import zoo
from dfsq.study import recipes
from dfsq.study.recipes import RECIPES, Recipe, recipe, size, start

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "edsr": Recipe(blocks=2, features=4),
    "srresnet": Recipe("srresnet", blocks=2, features=4),
    "rdn": Recipe("rdn", blocks=2, features=4, layers=2, growth=3),
}


def test_learning_rate():
    made = Recipe(learning_rate=8e-4, warmup=10, halve_every=100)
    rates = [made.rate(step) for step in (0, 4, 9, 10, 99, 100, 199, 200, 399)]
    expected = [0.8e-4, 4e-4, 8e-4, 8e-4, 8e-4, 4e-4, 4e-4, 2e-4, 1e-4]
    assert rates == pytest.approx(expected, rel=1e-12)
    later = replace(made, first_step=150)  # warms up again, but halves by all of the steps
    assert [later.rate(s) for s in (150, 159, 200)] == pytest.approx([0.4e-4, 4e-4, 2e-4])


def test_the_networks_are_those_of_the_paper():
    sizes = {
        name: {k: v for k, v in made.network_facts().items() if k not in ("network", "scale")}
        for name, made in RECIPES.items()
    }
    for scale in (2, 4):
        assert sizes[f"edsr-x{scale}"] == {"blocks": 16, "features": 64}
        assert sizes[f"srresnet-x{scale}"] == {"blocks": 16, "features": 64}
        rdn = {"blocks": 16, "features": 64, "layers": 8, "growth": 64}
        assert sizes[f"rdn-x{scale}"] == rdn
        assert sizes[f"rdn-small-x{scale}"] == rdn | {"blocks": 8, "layers": 4, "growth": 32}
    assert RECIPES["edsr-long-x2"] == RECIPES["edsr-x2"]
    for name, made in RECIPES.items():
        assert name.endswith(f"-x{made.scale}")
        same = replace(RECIPES["edsr-x2"], **made.network_facts())  # one recipe for all
        assert same == made


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.startswith("rdn-x")])
def test_what_is_trained_is_what_the_zoo_reads(name, monkeypatch, tmp_path):
    """Weights of random networks, in half precision, by the name of the recipe."""
    torch.manual_seed(0)
    model = RECIPES[name].build().eval()
    assert model.scale == RECIPES[name].scale
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / f"{name}.safetensors")
    model.load_state_dict(state)
    monkeypatch.setattr(zoo, "WEIGHTS_FOLDER", tmp_path)
    loaded = zoo.load_model(name)
    assert type(loaded) is type(model)
    x = torch.rand(1, 3, 8, 10)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    count, held = size(RECIPES[name])
    assert count == sum(p.numel() for p in model.parameters())
    assert held == sum(v.nbytes for v in state.values())


def test_sizes():
    assert {name: round(size(made)[0] / 1e6, 2) for name, made in RECIPES.items()} == {
        "edsr-x2": 1.37, "edsr-x4": 1.52, "srresnet-x2": 1.40, "srresnet-x4": 1.55,
        "rdn-x2": 22.12, "rdn-x4": 22.27, "rdn-small-x2": 1.32, "rdn-small-x4": 1.35,
        "edsr-long-x2": 1.37,
    }  # fmt: skip
    table = recipes.table().splitlines()
    assert [line.split()[0] for line in table[1:]] == list(RECIPES)
    assert "1.37 M" in table[1]
    assert table[1].endswith("here")


def test_changes():
    made = recipe("rdn-small-x4", [("batch", "4"), ("learning_rate", "1e-4")], "float32")
    assert made == replace(
        RECIPES["rdn-small-x4"], batch=4, learning_rate=1e-4, precision="float32"
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("edsr", [], r"there is no recipe 'edsr'; there are edsr-x2, edsr-x4, srresnet-x2, "),
        ("edsr-x2", [("bach", "4")], r"no 'bach' to change; there are patch, batch, "),
        ("edsr-x2", [("blocks", "4")], r"no 'blocks' to change"),
        ("edsr-x2", [("first_step", "4")], r"no 'first_step' to change"),
        ("edsr-x2", [("batch", "4.5")], r"batch must be of type int, not '4\.5'"),
        ("edsr-x2", [("batch", "0")], r"batch must be at least 1, not 0"),
        ("edsr-x2", [("patch", "1")], r"patch must be at least 2, not 1"),
        ("edsr-x2", [("seed", str(2**63))], r"seed must be below 2\*\*63, not 9223372036854775808"),
        ("edsr-x2", [("seed", "-1")], r"seed must be at least 0, not -1"),
        ("edsr-x2", [("learning_rate", "nan")], r"learning_rate must be positive, not nan"),
        ("edsr-x2", [("average", "1")], r"average must be at least 0 and below 1, not 1\.0"),
    ],
)
def test_what_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(name, changes)


# --- before the first step ---


@pytest.mark.parametrize("scale", [2, 4])
def test_srresnet_begins_as_bilinear_doubling(scale):
    made = replace(TINY["srresnet"], scale=scale)
    x = torch.rand(1, 3, 16, 18, generator=torch.Generator().manual_seed(0))
    expected = x
    for _ in range(scale // 2):
        expected = functional.interpolate(expected, scale_factor=2, mode="bilinear")
    model = made.build()
    inside = (..., *[slice(2 * scale, -2 * scale)] * 2)  # the network pads with zeros
    for mode in (model.train(), model.eval()):
        assert torch.allclose(mode(x)[inside], expected[inside], atol=1e-6)


def test_large_kernels_learn_more_slowly():
    for name, rates in (("edsr", {1.0}), ("rdn", {1.0}), ("srresnet", {1.0, 1 / 9})):
        model = TINY[name].build()
        groups = recipes.parameter_groups(model)
        assert {group["factor"] for group in groups} == rates
        found = [p for group in groups for p in group["params"]]
        assert len(found) == len(list(model.parameters())) == len({*found})
    slow = [p for group in groups if group["factor"] < 1 for p in group["params"]]
    assert {id(p) for p in slow} == {id(model.head[0].weight), id(model.tail.weight)}


# --- starting from weights ---


def saved(made, path, metadata=None):
    torch.manual_seed(5)
    model = made.build()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape).half())
        else:
            value += 7
    save_file(model.state_dict(), path, metadata)
    return model.state_dict()


@pytest.mark.parametrize("network", TINY)
def test_the_same_network_goes_on_from_the_steps_of_its_weights(network, tmp_path):
    state = saved(TINY[network], tmp_path / "w.safetensors", {"step": "3500"})
    model = TINY[network].build()
    begun = start(model, TINY[network], tmp_path / "w.safetensors")
    assert (set(begun.taken), begun.left, begun.step) == (set(state), (), 3500)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("network", "left"),
    [
        ("edsr", {"tail.0.2.weight", "tail.0.2.bias"}),
        (
            "srresnet",
            {"upsampler.3.weight", "upsampler.3.bias", "upsampler.5.weight"},
        ),
        (
            "rdn",  # its tail is numbered after the upsampler
            {"UPNet.2.weight", "UPNet.2.bias", "UPNet.4.weight", "UPNet.4.bias"},
        ),
    ],
)
def test_x4_takes_of_x2_what_fits(network, left, tmp_path):
    state = saved(TINY[network], tmp_path / "w.safetensors", {"step": "3500"})
    made = replace(TINY[network], scale=4)
    model = made.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    begun = start(model, made, tmp_path / "w.safetensors")
    assert (set(begun.left), begun.step) == (left, 0)  # another network, from its first step
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in left else state[key])


@pytest.mark.parametrize("network", ["edsr", "srresnet"])
def test_x2_from_x4_is_another_network(network, tmp_path):
    """Though all of it is found there: it begins at its first step."""
    path = tmp_path / "w.safetensors"
    state = saved(replace(TINY[network], scale=4), path, {"step": "3500"})
    model = TINY[network].build()
    begun = start(model, TINY[network], path)
    assert (begun.left, begun.step) == ((), 0)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_weights_for_another_range_of_values_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    saved(TINY["edsr"], path, {"step": "3500", "value_range": "255"})
    model = TINY["edsr"].build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"values in 0\.\.255; recipes train for those in 0\.\.1"):
        start(model, TINY["edsr"], path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_x4_starts_from_x2_where_that_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "WEIGHTS_FOLDER", tmp_path)
    assert recipes.default_initial("edsr-x4") is None
    for name in ("edsr-x2", "rdn-small-x2"):
        (tmp_path / f"{name}.safetensors").touch()
        assert recipes.default_initial(name) is None
        expected = tmp_path / f"{name}.safetensors"
        assert recipes.default_initial(name.replace("x2", "x4")) == expected
    assert recipes.default_initial("rdn-x4") is None


def test_weights_too_large_for_the_project_are_found_beside_their_run(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "WEIGHTS_FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)

    def listed():
        return next(line for line in recipes.table().splitlines() if line.startswith("rdn-x2"))

    assert listed().endswith("not trained yet")
    beside = tmp_path / "runs" / "rdn-x2" / "rdn-x2.safetensors"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert recipes.default_initial("rdn-x4").resolve() == beside
    assert recipes.default_initial("rdn-x2") is None
    assert listed().endswith("here")


@pytest.mark.parametrize(("field", "value"), [("step", "many"), ("value_range", "wide")])
def test_metadata_that_is_no_number(field, value, tmp_path):
    path = tmp_path / "w.safetensors"
    saved(TINY["edsr"], path, {"step": "1", "value_range": "1", field: value})
    with pytest.raises(ValueError, match=rf"w\.safetensors: value_range and step .*'{value}'"):
        start(TINY["edsr"].build(), TINY["edsr"], path)


def test_long_training_starts_from_the_short_one(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "WEIGHTS_FOLDER", tmp_path)
    assert recipes.began_as("edsr-long-x2") == "edsr-x2"
    assert recipes.began_as("edsr-x2") is None
    assert recipes.default_initial("edsr-long-x2") is None
    (tmp_path / "edsr-x2.safetensors").touch()
    assert recipes.default_initial("edsr-long-x2") == tmp_path / "edsr-x2.safetensors"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"features": 8}, r"'head\.0\.weight' is \(8, 3, 3, 3\) there, and \(4, 3, 3, 3\) here"),
        ({"blocks": 1}, r"'body\.1\.body\.0\.weight' is nothing there, and \(4, 4, 3, 3\) here"),
        ({"blocks": 3}, r"'body\.2\.weight' is nothing there"),
        (TINY["srresnet"].network_facts(), r"does not fit edsr of 2 blocks and 4 features: 'head"),
        (TINY["rdn"].network_facts(), r"'head\.0\.weight' is nothing there"),
    ],
)
def test_weights_of_another_architecture(other, message, tmp_path):
    path = tmp_path / "w.safetensors"
    saved(replace(TINY["edsr"], **other), path)
    model = TINY["edsr"].build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        start(model, TINY["edsr"], path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_deeper_network_is_not_cut_off(tmp_path):
    """Every layer of the shallower one is there, and more."""
    saved(replace(TINY["srresnet"], blocks=3), tmp_path / "w.safetensors")
    message = r"'blocks\.2\..*' is .* there, and nothing here"
    with pytest.raises(ValueError, match=message):
        start(TINY["srresnet"].build(), TINY["srresnet"], tmp_path / "w.safetensors")


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "w.pt").touch()
    (tmp_path / "cut.safetensors").write_bytes(b"half")
    model = TINY["edsr"].build()
    with pytest.raises(ValueError, match=r"must be a \.safetensors file, not .*w\.pt"):
        start(model, TINY["edsr"], tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged"):
        start(model, TINY["edsr"], tmp_path / "cut.safetensors")
