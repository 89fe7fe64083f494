"""What is quantized, and how: a frozen, validated, serialisable configuration."""

import json
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase

from .universal import universal_set, universal_words

FORMAT = 2
BITS = (*range(2, 9), 32)
WEIGHTS = ("minmax", "mse", "subset")
NORMALIZATIONS = ("center-max", "minmax", "static-tensor", "static-channel")
SELECTORS = (
    "exact",
    "kmeans",
    "kmeans-hist",
    "exhaustive",
    "symmetric",
    "even",
    "uniform-mse",
    "free",
)
STATIC_RANGES = ("minmax", "percentile", "mse")

ERROR_UNITS = ("normalized", "output")
ORDERS = ("diagonal", "given")

#: What the released method does not have; off in all presets that do not name it.
_RELEASED = {
    "weights": "minmax",
    "error_units": "normalized",
    "least_squares": False,
    "compensation": False,
    "scale_search": False,
    "range_search": False,
    "bias_correction": False,
    "budget": False,
}

_EXACT = {
    "selector": "exact",
    "weights": "subset",
    "error_units": "output",
    "least_squares": True,
    "compensation": True,
    "scale_search": True,
    "bias_correction": True,
}

#: Presets by name; weights are MinMax unless the name says otherwise.
PRESETS = {
    "float": {},
    "static-tensor-minmax": {"normalization": "static-tensor", "static_range": "minmax"},
    "static-tensor-percentile": {"normalization": "static-tensor", "static_range": "percentile"},
    "static-tensor-mse": {"normalization": "static-tensor", "static_range": "mse"},
    "static-channel-minmax": {"normalization": "static-channel", "static_range": "minmax"},
    "static-channel-mse": {"normalization": "static-channel", "static_range": "mse"},
    "uniform-minmax": {"normalization": "minmax"},
    "uniform-norm": {"selector": "even"},
    "uniform-mse": {"selector": "uniform-mse"},
    "sq": {"selector": "symmetric", "universal": "sq", "words": None},
    "dfsq": {"selector": "kmeans"},
    "dfsq-points": {"selector": "exact"},
    "dfsq-subset": {"selector": "exact", "weights": "subset"},
    "dfsq-exact": _EXACT,
    "dfsq-budget": _EXACT | {"budget": True},
    "free": {"selector": "free"},
}


@dataclass(frozen=True)
class Config:
    """How to quantize a network.

    Parameters
    ----------
    weight_bits, act_bits : int
        Bit-widths, 2 to 8, or 32 for float.
    weights : {"subset", "minmax", "mse"}
        How weights are quantized, see :func:`dfsq.weights.quantize_weight`.
    normalization : {"center-max", "minmax", "static-tensor", "static-channel"}
        How activations are brought to a common range: DFSQ's dynamic normalization with a
        codebook a channel; dynamic uniform over [min, max]; or a static uniform range.
    selector : {"exact", "kmeans", "kmeans-hist", "exhaustive", "symmetric", "even", \
"uniform-mse", "free"}
        How the codebook of ``"center-max"`` is found: see :func:`dfsq.select`; ``"even"`` takes
        evenly spaced points over the whole range, ``"uniform-mse"`` over the part of it that has
        the least squared error, and ``"free"`` unconstrained levels of least squared error.
    static_range : {"minmax", "percentile", "mse"}
        How a static range is found, see :func:`dfsq.activations.static_range`.
    error_units : {"output", "normalized"}
        Units of the squared error that an activation's points are selected for: of the output,
        each map's samples weighted by the square of its range, or of the normalized samples, as
        released. The selector ``"kmeans"`` is the released one, which takes the normalized
        samples with equal weights, whatever the units.
    least_squares : bool
        Whether weights are first fitted to the quantized input, see :mod:`dfsq.compensation`.
    compensation : bool
        Whether each weight's rounding error is made up for by those still to be rounded (GPTQ).
    scale_search : bool
        Whether other scales than ``max|w|`` are tried for the subset of an output channel, and
        taken where they leave less error on held-out calibration images; for weights by
        ``"subset"``.
    range_search : bool
        Whether codebooks are tried that span another share of a channel's range than all of it,
        and taken where they leave less error on held-out calibration images, see
        :mod:`dfsq.ranges`; for the selector ``"exact"``.
    bias_correction : bool
        Whether the bias makes up for the mean error.
    budget : bool
        Whether the widths are averages, the points of each channel being chosen under them, see
        :mod:`dfsq.budget`; for the selector ``"exact"`` and weights by ``"subset"``. Activations
        with another normalization than ``"center-max"`` have no points and keep their width.
    sequential : bool
        Whether each layer, in the order in which they run, is calibrated on the inputs that the
        layers before it, quantized, give it; takes a pass over the images for each layer.
    damping : float
        Share of the mean diagonal that is added to a layer's Hessian.
    order : {"diagonal", "given"}
        Order in which compensation rounds the inputs: largest second moment first, or as they are.
    universal : {"dfsq", "sq"} or tuple of tuples of float
    words : int, optional
        The universal set, see :func:`dfsq.universal_set`.
    layers : tuple of str, optional
        Name patterns (``*``, ``?``) of the convolutions to quantize. By default those that the
        network itself names in an attribute ``body_layers``, as every network of
        ``dfsq.sr`` does, and all convolutions of a network without one.
    exclude : tuple of str
        Name patterns of the convolutions to leave out.
    non_negative : tuple of str, optional
        Name patterns of the layers whose input is non-negative; found in calibration if None.
    overrides : tuple of (pattern, dict), or dict of dict
        Fields that differ for the layers of a pattern, such as
        ``(("head.*", {"weight_bits": 8, "act_bits": 8}),)``; later ones win.
    seed : int
        Of the K-means draws.

    Raises
    ------
    ValueError
        Names the field, the value, and what is allowed.

    Examples
    --------
    >>> Config(weight_bits=4, act_bits=4).selector
    'exact'
    >>> Config.from_json(Config.preset("dfsq", bits=3).to_json()) == Config.preset("dfsq", bits=3)
    True
    >>> Config(act_bits=33)
    Traceback (most recent call last):
    ...
    ValueError: act_bits must be one of 2, 3, 4, 5, 6, 7, 8, 32, not 33
    """

    weight_bits: int = 4
    act_bits: int = 4
    weights: str = "subset"
    normalization: str = "center-max"
    selector: str = "exact"
    static_range: str = "minmax"
    error_units: str = "output"
    least_squares: bool = True
    compensation: bool = True
    scale_search: bool = True
    range_search: bool = False
    bias_correction: bool = True
    budget: bool = False
    sequential: bool = False
    damping: float = 0.01
    order: str = "diagonal"
    universal: str | tuple = "dfsq"
    words: int | None = 4
    layers: tuple | None = None
    exclude: tuple = ()
    non_negative: tuple | None = None
    overrides: tuple = ()
    seed: int = 0

    def __post_init__(self):
        for name in ("layers", "exclude", "non_negative"):
            value = getattr(self, name)
            if value is None and name != "exclude":
                continue
            object.__setattr__(self, name, _patterns(name, value))
        if not isinstance(self.universal, str):
            object.__setattr__(self, "universal", universal_words(self.universal))
        if self.universal != "dfsq" and self.words == 4:
            object.__setattr__(self, "words", None)  # the default of another set
        pairs = self.overrides.items() if isinstance(self.overrides, dict) else self.overrides
        try:
            overrides = tuple((p, tuple(sorted(dict(o).items()))) for p, o in pairs)
        except (TypeError, ValueError):
            raise ValueError(
                "overrides must be fields by name pattern, such as {'head.*': {'act_bits': 8}}, "
                f"not {self.overrides!r}"
            ) from None
        for pattern, _ in overrides:
            if not isinstance(pattern, str):
                raise ValueError(f"overrides must be by name pattern, a text, not by {pattern!r}")
        object.__setattr__(self, "overrides", overrides)
        allowed = {
            "weight_bits": BITS,
            "act_bits": BITS,
            "weights": WEIGHTS,
            "normalization": NORMALIZATIONS,
            "selector": SELECTORS,
            "static_range": STATIC_RANGES,
            "error_units": ERROR_UNITS,
            "order": ORDERS,
            "budget": (True, False),
            "sequential": (True, False),
            **dict.fromkeys(_STATISTICS, (True, False)),
            "scale_search": (True, False),
            "range_search": (True, False),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if not isinstance(value, type(values[0])) or value not in values:
                listed = ", ".join(map(str, values))
                raise ValueError(f"{name} must be one of {listed}, not {value!r}")
        if self.layers == ():
            raise ValueError("layers must hold at least one name pattern, such as '*'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, not {self.seed!r}")
        if not isinstance(self.damping, float) or not 0 < self.damping < 1:
            raise ValueError(f"damping must be between 0 and 1, such as 0.01, not {self.damping!r}")
        if self.range_search and self.selector != "exact":
            raise ValueError(f"range_search=True goes with selector='exact', not {self.selector!r}")
        if self.budget:
            needed = {
                "selector": "exact",
                "weights": "subset",
                "error_units": "output",
                "sequential": False,
            }
            for name, value in needed.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"budget=True goes with {name}={value!r}, not {getattr(self, name)!r}"
                    )
        points = universal_set(self.universal, self.words)
        if self.selector == "symmetric" and (points * 2**10 % 1).any():
            raise ValueError(
                "selector='symmetric' goes with a universal set of multiples of 2**-10, not with "
                f"universal={self.universal!r}, words={self.words!r}"
            )
        if self.selector == "symmetric" and self.universal == "sq" and 4 < self.act_bits < 32:
            raise ValueError(
                f"act_bits must be 4 or less for SQ's set of 15 magnitudes, not {self.act_bits}"
            )
        for pattern, changes in self.overrides:
            unknown = {name for name, _ in changes} - _LAYER_FIELDS
            if unknown:
                raise ValueError(
                    f"overrides of {pattern!r}: unknown field {', '.join(sorted(unknown))}; "
                    f"allowed are {', '.join(sorted(_LAYER_FIELDS))}"
                )
            replace(self, overrides=(), **dict(changes))

    @classmethod
    def preset(cls, name, bits=4, **changes):
        """The configuration of a named method.

        Parameters
        ----------
        name : str
            One of ``dfsq.PRESETS``; with ``-w`` appended weights only are quantized, with ``-a``
            activations only.
        bits : int
            Bit-width of weights and activations.
        **changes
            Any other field.
        """
        base, weight_bits, act_bits = name, bits, bits
        if name.endswith("-w"):
            base, act_bits = name[:-2], 32
        elif name.endswith("-a"):
            base, weight_bits = name[:-2], 32
        if base not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}; there are {', '.join(PRESETS)}, "
                "each also with -w (weights only) and -a (activations only)"
            )
        if base == "float":
            weight_bits = act_bits = 32
        values = {"weight_bits": weight_bits, "act_bits": act_bits} | _RELEASED
        return cls(**(values | PRESETS[base] | changes))

    def for_layer(self, name):
        """The configuration of one layer, with its overrides."""
        changes = {}
        for pattern, override in self.overrides:
            if fnmatchcase(name, pattern):
                changes |= dict(override)
        return replace(self, overrides=(), **changes)

    @property
    def searches_range(self):
        """Whether the activations' range is searched; other normalizations have no codebook."""
        return self.range_search and self.act_bits < 32 and self.normalization == "center-max"

    @property
    def needs_statistics(self):
        """Whether weights or biases are chosen with regard to the layers' inputs."""
        quantized = min(self.weight_bits, self.act_bits) < 32
        searched = self.scale_search and self.weights == "subset" and self.weight_bits < 32
        wanted = self.budget or searched or any(getattr(self, name) for name in _STATISTICS)
        return quantized and wanted

    def to_json(self):
        """As JSON text, with the version of the format."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text):
        """The inverse of :meth:`to_json`; unknown fields and formats are refused."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a configuration must be a JSON object, not {type(values).__name__}")
        version = values.pop("format", None)
        if version != FORMAT:
            raise ValueError(f"format must be {FORMAT}, not {version!r}; update dfsq to read it")
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown field in a configuration: {', '.join(sorted(unknown))}")
        return cls(**values)


def _patterns(name, value):
    """Name patterns as a tuple of str; a single str is one."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{name} must be name patterns, such as 'body.*', not {value!r}")
    return tuple(patterns)


def body_layers(model, default=None):
    """Name patterns in a network's attribute ``body_layers``, `default` if it has none."""
    if not hasattr(model, "body_layers"):
        return default
    return _patterns("layers, or the network's body_layers,", model.body_layers)


def with_all_layers(config, model, outer_bits=8):
    """The configuration for all layers of a network: its body as before, the others at 8 bits.

    Parameters
    ----------
    config : Config
        For the body.
    model : nn.Module
        With an attribute ``body_layers``; those of an attribute ``attention_layers``, branches
        on pooled maps, stay in float; those of an attribute ``head_layers``, which take the image
        itself, get dynamic uniform activations, whatever `config` has.
    outer_bits : int
        Bit-width of head, tail and upsampler, where `config` does not leave them in float.

    Returns
    -------
    Config

    Raises
    ------
    ValueError
        For a network without ``body_layers``, if `config` names no layers either; for `outer_bits`
        that the method of `config` does not have.

    Notes
    -----
    An image comes in 8 evenly spaced bits. The universal set of four words is dense near zero and
    leaves an eighth of the half range between its last two points, which suits the tails of a
    layer's inputs, but not pixels, of which many lie there.
    """
    body = config.layers or body_layers(model)
    if not body:
        raise ValueError(
            "the network names no body_layers; give it an attribute body_layers, the name patterns "
            "of the convolutions of its body"
        )
    widths = {"weight_bits": config.weight_bits, "act_bits": config.act_bits}
    outer = {name: bits if bits == 32 else outer_bits for name, bits in widths.items()}
    overrides = [("*", outer), *((pattern, widths) for pattern in body)]
    head = getattr(model, "head_layers", ())
    overrides += [*((pattern, {"normalization": "minmax"}) for pattern in head), *config.overrides]
    exclude = (*config.exclude, *getattr(model, "attention_layers", ()))
    try:
        return replace(config, layers=("*",), exclude=exclude, overrides=tuple(overrides))
    except ValueError as error:
        raise ValueError(f"head and tail at {outer_bits} bits: {error}") from None


#: Fields that need the second moments of a layer's inputs, whatever the weights.
_STATISTICS = ("least_squares", "compensation", "bias_correction")

#: Fields that may differ between layers.
_LAYER_FIELDS = {
    *_STATISTICS,
    "scale_search",
    "range_search",
    "damping",
    "order",
    "weight_bits",
    "act_bits",
    "weights",
    "normalization",
    "selector",
    "static_range",
    "seed",
}
