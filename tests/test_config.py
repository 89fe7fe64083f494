"""Configurations validate themselves and survive JSON."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from torch import nn

from dfsq.config import PRESETS, Config, with_all_layers

CONFIGS = [
    Config(),
    Config(8, 32, layers="body.*", exclude=["body.0"], non_negative=("*.2",), seed=7),
    Config(universal=[[1, 0.5, 0], [0.25, 0]], selector="exhaustive"),
    Config(universal="sq", selector="symmetric"),
    Config(words=3),
    Config(overrides=(("head", {"weight_bits": 8, "act_bits": 8}), ("*", {"weights": "mse"}))),
    Config(sequential=True, damping=0.1, order="given", overrides={"head": {"damping": 0.5}}),
    *(Config.preset(name, 3) for name in PRESETS),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config):
    assert Config.from_json(config.to_json()) == config
    assert hash(Config.from_json(config.to_json())) == hash(config)
    assert json.loads(config.to_json())["format"] == 2


def test_files_that_are_not_of_this_format():
    values = json.loads(Config().to_json())
    with pytest.raises(ValueError, match="must be a JSON object, not list"):
        Config.from_json("[]")
    with pytest.raises(ValueError, match="format must be 2, not 3; update dfsq"):
        Config.from_json(json.dumps(values | {"format": 3}))
    with pytest.raises(ValueError, match="format must be 2, not None"):
        Config.from_json("{}")
    with pytest.raises(ValueError, match="unknown field in a configuration: clip, rounding"):
        Config.from_json(json.dumps(values | {"rounding": 1, "clip": 2}))
    with pytest.raises(ValueError, match="act_bits must be one of"):
        Config.from_json(json.dumps(values | {"act_bits": "4"}))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("weight_bits", 0, "2, 3, 4, 5, 6, 7, 8, 32"),
        ("weight_bits", 1, "2, 3"),
        ("act_bits", 33, "2, 3, 4, 5, 6, 7, 8, 32"),
        ("act_bits", True, "8, 32"),
        ("act_bits", 4.0, "8, 32"),
        ("act_bits", "4", "8, 32"),
        ("weights", "gptq", "minmax, mse, subset"),
        ("normalization", "rms", "center-max, minmax, static-tensor, static-channel"),
        ("selector", "k-means", "exact, kmeans, kmeans-hist"),
        ("static_range", "max", "minmax, percentile, mse"),
        ("universal", "paper", "dfsq, sq or a list of words"),
        ("universal", 7, "dfsq, sq or a list of words"),
        ("universal", [1, 0], "list of words, each a list of numbers"),
        ("words", 5, "1, 2, 3 or 4"),
        ("words", 2.0, "1, 2, 3 or 4"),
        ("error_units", "input", "normalized, output"),
        ("order", "random", "diagonal, given"),
        ("least_squares", 1, "True, False"),
        ("compensation", "gptq", "True, False"),
        ("scale_search", None, "True, False"),
        ("bias_correction", 0, "True, False"),
        ("budget", 3, "True, False"),
        ("sequential", "yes", "True, False"),
        ("damping", 0.0, "between 0 and 1, such as 0.01"),
        ("damping", 1.0, "between 0 and 1"),
        ("damping", 1, "between 0 and 1"),
        ("seed", -1, "a whole number of at least 0"),
        ("seed", 0.5, "a whole number of at least 0"),
        ("layers", (), "at least one name pattern"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=field) as error:
        Config(**{field: value})
    assert allowed in str(error.value)
    if value != ():
        assert repr(value) in str(error.value)


def test_words_that_are_no_powers_of_two():
    with pytest.raises(ValueError, match=r"0\.3, which is neither 0 nor a power of two"):
        Config(universal=[[1, 0.3]])
    with pytest.raises(ValueError, match="words=3 goes with universal='dfsq' only"):
        Config(universal="sq", words=3)


def test_the_sq_set_has_too_few_points_beyond_four_bits():
    assert Config.preset("sq", 4).selector == "symmetric"
    assert Config.preset("sq-w", 8).act_bits == 32
    with pytest.raises(ValueError, match=r"act_bits must be 4 or less for SQ's set .* not 6"):
        Config.preset("sq", 6)


def test_frozen_and_comparable():
    config = Config(layers=["a", "b"], universal=[[1, 0]])
    assert config == Config(layers=("a", "b"), universal=((1.0, 0.0),))
    assert len({config, replace(config), Config()}) == 2
    with pytest.raises(FrozenInstanceError):
        config.seed = 3


def test_a_single_pattern_may_be_a_string():
    config = Config(layers="body.*", exclude="body.0", non_negative="body.2")
    assert (config.layers, config.exclude, config.non_negative) == (
        ("body.*",),
        ("body.0",),
        ("body.2",),
    )


@pytest.mark.parametrize("value", [3, [3], {"a": "b"}])
@pytest.mark.parametrize("name", ["layers", "exclude", "non_negative"])
def test_patterns_that_are_none(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be name patterns, such as 'body\.\*', not"):
        Config(**{name: value})


# --- overrides ---


def test_overrides_by_layer():
    config = Config(
        weight_bits=4,
        overrides=(
            ("body.*", {"weight_bits": 3, "selector": "kmeans"}),
            ("body.0", {"weight_bits": 8}),
        ),
    )
    assert config.for_layer("tail").weight_bits == 4
    assert config.for_layer("body.1").weight_bits == 3
    last = config.for_layer("body.0")
    assert (last.weight_bits, last.selector, last.overrides) == (8, "kmeans", ())
    as_dict = Config(overrides={"body.*": {"weight_bits": 3}})
    assert as_dict.for_layer("body.1").weight_bits == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 33}, "weight_bits must be one of .* not 33"),
        ({"layers": ("a",)}, "overrides of 'head': unknown field layers; allowed are act_bits"),
        ({"bits": 4}, "unknown field bits"),
        ({"sequential": True}, "unknown field sequential"),
        ({"error_units": "normalized"}, "unknown field error_units"),
        ({"damping": 2.0}, "damping must be between 0 and 1"),
    ],
)
def test_overrides_are_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(overrides=(("head", changes),))


def test_overrides_are_by_name():
    with pytest.raises(ValueError, match="overrides must be by name pattern, a text, not by 1"):
        Config(overrides={1: {"act_bits": 8}})


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_symmetric_subsets_are_of_a_set_on_the_dyadic_grid(words):
    """Three words make thirds, of which a histogram of both signs cannot be folded."""
    if words == 3:
        with pytest.raises(ValueError, match=r"selector='symmetric' goes with .* words=3"):
            Config(selector="symmetric", words=words, act_bits=2)
    else:
        Config(selector="symmetric", words=words, act_bits=2)


@pytest.mark.parametrize("value", [3, {"head": 3}, ["head"], [("head", {}, 1)]])
def test_overrides_of_another_form(value):
    with pytest.raises(ValueError, match="overrides must be fields by name pattern, such as"):
        Config(overrides=value)


# --- presets ---

#: Those with more than the released method has.
OURS = ("dfsq-exact", "dfsq-budget")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bits", [2, 4])
def test_presets(name, bits):
    both, weights, activations = (Config.preset(name + end, bits) for end in ("", "-w", "-a"))
    if name == "float":
        assert both == weights == activations
        assert (both.weight_bits, both.act_bits) == (32, 32)
        return
    assert (both.weight_bits, both.act_bits) == (bits, bits)
    assert weights == replace(both, act_bits=32)
    assert activations == replace(both, weight_bits=32)
    assert both.weights == ("subset" if name in ("dfsq-subset", *OURS) else "minmax")
    beyond = ("least_squares", "compensation", "scale_search", "bias_correction")
    assert [getattr(both, field) for field in beyond] == [name in OURS] * 4
    assert both.error_units == ("output" if name in OURS else "normalized")
    assert both.budget == (name == "dfsq-budget")
    assert both.needs_statistics == (name in OURS)


def test_presets_are_the_methods_of_the_tables():
    assert Config.preset("dfsq").selector == "kmeans"
    assert Config.preset("dfsq-points").selector == "exact"
    assert Config.preset("free").selector == "free"
    assert Config.preset("uniform-norm").selector == "even"
    assert Config.preset("uniform-mse").selector == "uniform-mse"
    assert Config.preset("uniform-minmax").normalization == "minmax"
    sq = Config.preset("sq", 3)
    assert (sq.selector, sq.universal) == ("symmetric", "sq")
    for name in PRESETS:
        if name.startswith("static-"):
            _, grain, method = name.split("-")
            config = Config.preset(name)
            assert (config.normalization, config.static_range) == (f"static-{grain}", method)


def test_the_default_is_dfsq_exact():
    assert Config() == Config.preset("dfsq-exact")
    assert Config(3, 2, budget=True) == Config.preset("dfsq-budget", weight_bits=3, act_bits=2)


STATISTICS = ("least_squares", "compensation", "scale_search", "bias_correction")


@pytest.mark.parametrize("field", [*STATISTICS, "budget"])
def test_what_needs_statistics_of_the_inputs(field):
    base = Config.preset("dfsq-exact", 4, **dict.fromkeys(STATISTICS, False))
    assert not base.needs_statistics
    assert replace(base, **{field: True}).needs_statistics
    for bits in ({"weight_bits": 32}, {"act_bits": 32}):
        searches_nothing = field == "scale_search" and "weight_bits" in bits
        assert replace(base, **{field: True}, **bits).needs_statistics != searches_nothing
    assert not replace(base, **{field: True}, weight_bits=32, act_bits=32).needs_statistics
    if field != "budget":
        config = replace(base, overrides={"head": {field: True}})
        assert config.for_layer("head").needs_statistics
        assert not config.for_layer("tail").needs_statistics


@pytest.mark.parametrize("weights", ["minmax", "mse"])
def test_a_search_of_scales_is_for_subsets(weights):
    released = dict.fromkeys(STATISTICS, False) | {"scale_search": True}
    assert not Config(weights=weights, **released).needs_statistics


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("selector", "kmeans"),
        ("weights", "mse"),
        ("error_units", "normalized"),
        ("sequential", True),
    ],
)
def test_a_budget_goes_with_the_exact_subset_only(name, value):
    with pytest.raises(ValueError, match=rf"budget=True goes with {name}=.*, not {value!r}"):
        Config(budget=True, **{name: value})


def test_presets_take_further_fields():
    config = Config.preset("dfsq-a", 6, seed=5, weights="mse", layers="*")
    assert (config.act_bits, config.weight_bits, config.seed) == (6, 32, 5)
    assert (config.weights, config.layers) == ("mse", ("*",))


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'dsfq'") as error:
        Config.preset("dsfq")
    assert all(name in str(error.value) for name in PRESETS)


@pytest.fixture
def network():
    net = nn.Sequential()
    for name in ("head", "body", "gate", "tail"):
        net.add_module(name, nn.Conv2d(3, 3, 3))
    net.body_layers, net.head_layers, net.attention_layers = ("body",), ("head",), ("gate",)
    return net


@pytest.mark.parametrize("preset", ["dfsq", "dfsq-exact", "dfsq-budget", "static-channel-mse"])
def test_all_layers(network, preset):
    body = Config.preset(preset, 3)
    config = with_all_layers(body, network)
    assert (config.layers, config.exclude) == (("*",), ("gate",))
    head, middle, tail = (config.for_layer(name) for name in ("head", "body", "tail"))
    assert replace(middle, layers=None, exclude=()) == body
    outer = replace(middle, weight_bits=8, act_bits=8)
    assert tail == outer
    assert head == replace(outer, normalization="minmax")


def test_all_layers_of_weights_alone(network):
    config = with_all_layers(Config.preset("dfsq-exact-w", 4), network)
    assert config.for_layer("head").act_bits == config.for_layer("tail").act_bits == 32


def test_overrides_of_ones_own_come_last(network):
    own = {"head": {"normalization": "center-max"}, "tail": {"act_bits": 6}}
    config = with_all_layers(Config(overrides=own), network)
    assert config.for_layer("head").normalization == "center-max"
    assert config.for_layer("tail").act_bits == 6


def test_a_network_that_names_no_head(network):
    del network.head_layers
    assert with_all_layers(Config(), network).for_layer("head").normalization == "center-max"


def test_a_network_that_names_no_body(network):
    del network.body_layers
    with pytest.raises(ValueError, match="names no body_layers; give it an attribute"):
        with_all_layers(Config(), network)


def test_all_layers_by_a_set_of_too_few_points(network):
    with pytest.raises(ValueError, match="head and tail at 8 bits: act_bits must be 4 or less"):
        with_all_layers(Config.preset("sq", 4), network)
