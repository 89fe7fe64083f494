"""Recipes of training by name: which network, and how it is trained.

One recipe serves all of them. It is EDSR's: L1 loss, 48x48 LR patches, batches of 16, Adam, flips
and rotations, a learning rate that is halved at fixed steps; with a warm-up, a higher first rate
(the runs are short), and an exponential moving average of the weights, which is what is kept.
The kernels of 9x9 in SRResNet learn at a ninth of the rate.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open

from ..sr.models.edsr import EDSR
from ..sr.models.rdn import RDN
from ..sr.models.srresnet import SRResNet
from ..sr.zoo import WEIGHTS_FOLDER, read_weights

#: Where a run is kept, by its name, in the folder at work.
RUNS_FOLDER = Path("runs")


@dataclass(frozen=True)
class Architecture:
    """How a network is built of a recipe, and which of its layers depend on the scale.

    Every network takes and gives RGB in 0..1, and so do its weights (``value_range=1``).
    """

    build: Callable
    upsampler: tuple[str, ...]
    initialize: Callable = lambda model: None  # what is done to the framework's random weights


ARCHITECTURES = {
    "edsr": Architecture(lambda r: EDSR(r.scale, r.blocks, r.features), ("tail.",)),
    "srresnet": Architecture(
        lambda r: SRResNet(r.scale, r.blocks, r.features, signed_output=False),
        ("upsampler.", "tail."),
        SRResNet.begin_bilinear,
    ),
    "rdn": Architecture(
        lambda r: RDN(r.scale, r.blocks, r.layers, r.growth, r.features, value_range=1.0),
        ("UPNet.",),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What determines the weights, with the images; stored beside them."""

    network: str = "edsr"
    scale: int = 2
    blocks: int = 16
    features: int = 64
    layers: int | None = None  # in a dense block of RDN
    growth: int | None = None  # of RDN
    patch: int = 48  # LR pixels
    batch: int = 16
    learning_rate: float = 5e-4
    warmup: int = 250  # steps
    halve_every: int = 3000  # steps
    average: float = 0.999  # decay of the averaged weights
    precision: str = "bfloat16"  # of the forward pass, or float32
    seed: int = 0
    first_step: int = 0  # steps that the initial weights have behind them

    # Fields that make the network, and those that no change by name can reach.
    NETWORK = ("network", "scale", "blocks", "features", "layers", "growth")
    NOT_CHOSEN = (*NETWORK, "precision", "first_step")

    def __post_init__(self):
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed!r}")
        at_least = {"patch": 2, "batch": 1, "warmup": 1, "halve_every": 1, "seed": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate!r}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be at least 0 and below 1, not {self.average!r}")

    def rate(self, step):
        """Learning rate at a step: linear warm-up, then halved every `halve_every` steps."""
        warmup = min(1.0, (step - self.first_step + 1) / self.warmup)
        return self.learning_rate * warmup * 0.5 ** (step // self.halve_every)

    def facts(self):
        """The fields as a dict, less those that the network does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def network_facts(self):
        """Those of the fields that make the network."""
        return {name: value for name, value in self.facts().items() if name in self.NETWORK}

    def build(self):
        """The network as it is before its first step, in training mode."""
        architecture = ARCHITECTURES[self.network]
        model = architecture.build(self)
        architecture.initialize(model)
        return model


_SIZES = {
    "edsr": {"network": "edsr"},
    "srresnet": {"network": "srresnet"},
    "rdn": {"network": "rdn", "layers": 8, "growth": 64},
    # The same network at about the cost of EDSR-baseline.
    "rdn-small": {"network": "rdn", "blocks": 8, "layers": 4, "growth": 32},
}

#: Recipes by the names of the networks that they make.
RECIPES = {
    f"{name}-x{scale}": Recipe(scale=scale, **size)
    for name, size in _SIZES.items()
    for scale in (2, 4)
}
# The same network, trained further under a name of its own: does it lose more or less then?
RECIPES["edsr-long-x2"] = RECIPES["edsr-x2"]


def parameter_groups(model):
    """The parameters of a network for an optimizer, by the ``factor`` of their learning rate.

    Adam moves every weight by about the rate, so an output moves by the rate times the number of
    weights that it sums over: kernels of more than 3x3 learn more slowly by their area.

    Returns
    -------
    list of dict
    """
    groups = {}
    for parameter in model.parameters():
        area = parameter[0, 0].numel() if parameter.ndim == 4 else 1
        groups.setdefault(min(1.0, 9 / area), []).append(parameter)
    return [{"params": params, "factor": factor} for factor, params in groups.items()]


def recipe(name, changes=(), precision="bfloat16"):
    """A recipe by name.

    Parameters
    ----------
    name : str
        Of ``RECIPES``.
    changes : sequence of (field, value), both str
        Fields of the training, not of the network, that are to differ.
    precision : str
        Of the forward pass, ``bfloat16`` or ``float32``.

    Raises
    ------
    ValueError
        For a name or a field that there is not, or a value out of its range.

    Examples
    --------
    >>> recipe("edsr-x4", [("batch", "8")]).batch
    8
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    kinds = {f.name: f.type for f in fields(Recipe) if f.name not in Recipe.NOT_CHOSEN}
    changed = {"precision": precision}
    for field, text in changes:
        if field not in kinds:
            raise ValueError(f"a recipe has no {field!r} to change; there are {', '.join(kinds)}")
        try:
            changed[field] = kinds[field](text)
        except ValueError:
            kind = kinds[field].__name__
            raise ValueError(f"{field} must be of type {kind}, not {text!r}") from None
    return replace(RECIPES[name], **changed)


def size(made):
    """Parameters of a recipe's network, and its bytes in half precision."""
    with torch.device("meta"):
        model = made.build()
    count = sum(p.numel() for p in model.parameters())
    held = sum(v.numel() * (2 if v.is_floating_point() else 8) for v in model.state_dict().values())
    return count, held


def table():
    """The recipes as a table: the networks' shapes and sizes, and which weights are here."""
    lines = [f"{'name':14}{'blocks':>7}{'features':>9}{'parameters':>12}{'in half':>10}  weights"]
    for name, made in RECIPES.items():
        count, held = size(made)
        here = published_weights(name)
        lines.append(
            f"{name:14}{made.blocks:7}{made.features:9}{count / 1e6:10.2f} M{held / 1e6:7.1f} MB  "
            + ("here" if here else "not trained yet")
        )
    return "\n".join(lines)


def began_as(name):
    """The network whose weights another is started from, or None.

    At x4 the same network at x2, and for the long training that of the short one.
    """
    other = name.replace("-x4", "-x2").replace("-long-", "-")
    return other if other != name else None


def default_initial(name):
    """Weights that a network is started from unless others are given, or None.

    They are those of :func:`began_as`, where they are published.
    """
    other = began_as(name)
    return published_weights(other) if other else None


def published_weights(name):
    """The file of a network's published weights, or None.

    It is among the project's, or, if too large for that, beside the run that made it.
    """
    file = f"{name}.safetensors"
    places = (WEIGHTS_FOLDER / file, RUNS_FOLDER / name / file)
    return next((path for path in places if path.is_file()), None)


@dataclass(frozen=True)
class Start:
    """What a network took from initial weights.

    Attributes
    ----------
    taken, left : tuple of str
        Names of the network's tensors that were found, and that were not and stay random.
    step : int
        Steps that training has behind it: those of the weights where all of them were taken and
        nothing else is left, so that the same network is trained further, and 0 where the network
        is another.
    """

    taken: tuple[str, ...]
    left: tuple[str, ...]
    step: int


def start(model, made, path):
    """Put initial weights into a network, all or those of another scale that fit.

    Parameters
    ----------
    model : nn.Module
        Of the recipe; changed in place.
    made : Recipe
    path : path
        Weights that this project published (``.safetensors``), of the same architecture and size.

    Returns
    -------
    Start

    Raises
    ------
    ValueError
        If a layer outside the upsampler is missing, of another shape, or not the network's; or if
        the weights are for another range of values than 0..1.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"initial weights must be a .safetensors file, not {str(path)!r}")
    state, own = read_weights(path), model.state_dict()
    upsampler = ARCHITECTURES[made.network].upsampler
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    for key in (*own, *state):
        if key not in fits and not key.startswith(upsampler):
            shapes = [tuple(s[key].shape) if key in s else "nothing" for s in (state, own)]
            raise ValueError(
                f"{path} does not fit {made.network} of {made.blocks} blocks and {made.features} "
                f"features: {key!r} is {shapes[0]} there, and {shapes[1]} here"
            )
    with safe_open(path, "pt") as file:
        metadata = {"value_range": "1", "step": "0"} | (file.metadata() or {})
    try:
        span, step = float(metadata["value_range"]), int(metadata["step"])
    except ValueError as error:
        raise ValueError(f"{path}: value_range and step in its metadata: {error}") from None
    if span != 1:
        raise ValueError(f"{path} is for values in 0..{span:g}; recipes train for those in 0..1")
    model.load_state_dict(fits, strict=False)
    left = tuple(key for key in own if key not in fits)
    same = not left and state.keys() == own.keys()
    return Start(tuple(fits), left, step if same else 0)
