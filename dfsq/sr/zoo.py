"""Networks by name, or from a file of the user's, in eval mode: 0..1 RGB in, 0..1 RGB out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .datasets import photograph
from .fetch import fetch
from .imaging import crop_to_multiple, imresize, psnr_y, to_image, to_tensor
from .models.edsr import EDSR
from .models.imdn import IMDN
from .models.rdn import RDN
from .models.rlfn import RLFN
from .models.srresnet import SRResNet
from .mxnet import read_mxnet
from .userfiles import is_user_function, user_function

WEIGHTS_FOLDER = Path(__file__).resolve().parents[2] / "data" / "weights"


@dataclass(frozen=True)
class Entry:
    """A network by name: the file of its weights, and how a state dict becomes a network.

    Attributes
    ----------
    file : str
        In ``data/weights`` if `embedded`, else a registered file, see :mod:`dfsq.sr.fetch`.
    build : callable
        State dict to network.
    network : str
        Its architecture.
    trained_by : str
    """

    file: str
    build: Callable
    network: str
    trained_by: str
    embedded: bool = False


def load_model(name, *, value_range=None):
    """A network with its weights.

    Parameters
    ----------
    name : str or path
        A name of :func:`model_names`; a file of weights (``.pt``, ``.pth`` or ``.safetensors``)
        with the key names of EDSR-PyTorch (EDSR of any depth, width and scale; RDN), IMDN, RLFN,
        or the SRResNet of DFSQ's authors; or a function of the user's that returns a network,
        ``FILE.py:NAME``, see :func:`dfsq.sr.userfiles.user_function`.
    value_range : float, optional
        For a file: the range of the RGB values that its weights expect, 255 or 1; by default what
        a file of `dfsq publish` says of itself, else that of the official files, 1 for IMDN and
        255 for the others.

    Returns
    -------
    nn.Module in eval mode, with ``scale`` and ``body_layers``

    Raises
    ------
    FileNotFoundError
        If the weights of a known network are neither here nor can be downloaded.
    ValueError
        For an unknown name, a damaged file, a function that does not return a network, weights
        that do not beat bicubic upscaling on an embedded photograph, or a file's that do better
        there with another `value_range`.

    Examples
    --------
    >>> network = load_model("edsr-x2")
    >>> network.scale, network.body_layers
    (2, ('body.*.body.*',))
    """
    if name in ENTRIES:
        if value_range is not None:
            raise ValueError("value_range goes with a file, not with a network's name")
        entry = ENTRIES[name]
        path = WEIGHTS_FOLDER / entry.file if entry.embedded else fetch(entry.file)
        if not path.is_file():
            raise FileNotFoundError(
                f"the weights of {name!r} are not installed at {path}; "
                + (
                    "this network is not trained yet, or its weights are too large to come with "
                    f"the project: `dfsq train {name}`, then `dfsq publish {name}`; weights that "
                    "are too large stay in the run's folder: give their file in place of the name, "
                    f"runs/{name}/{name}.safetensors"
                    if any(WEIGHTS_FOLDER.glob("*.safetensors"))
                    else "run from a checkout, or `pip install -e .` in one"
                )
            )
        return entry.build(read_weights(path)).eval()
    if is_user_function(name):
        if value_range is not None:
            raise ValueError("value_range goes with a file of weights, not with a function")
        return _user_model(name)
    path = Path(name)
    if not path.is_file() or path.suffix == ".py":
        raise ValueError(
            f"unknown model {str(name)!r}; there are {', '.join(model_names())}, "
            "or give a file of weights, or FILE.py:FUNCTION"
        )
    if value_range is not None and not 0 < value_range < float("inf"):
        raise ValueError(f"value_range must be positive, such as 255 or 1, not {value_range:g}")
    state = read_weights(path)
    value_range = value_range or _stored_value_range(path)
    try:
        model = from_state(state, value_range).eval()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_beats_bicubic(model, path, model.value_range)
    return model


def _stored_value_range(path):
    """The value range that a file of `dfsq publish` says its weights expect, or None."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("value_range")
    if text is None:
        return None
    try:
        value_range = float(text)
    except ValueError:
        value_range = 0.0
    if not 0 < value_range < float("inf"):
        raise ValueError(
            f"value_range in the metadata of {path} must be a positive number, such as 255 or 1, "
            f"not {text!r}; give value_range"
        )
    return value_range


def _user_model(name):
    """The network of a user's function, checked."""
    function = user_function(name)
    try:
        model = function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{name} must return an nn.Module, not {type(model).__name__}")
    if getattr(model, "scale", None) not in (2, 3, 4, 8):
        raise ValueError(
            f"the network of {name} must have an attribute scale of 2, 3, 4 or 8, "
            f"not {getattr(model, 'scale', None)!r}"
        )
    if not any(isinstance(module, torch.nn.Conv2d) for module in model.modules()):
        raise ValueError(f"the network of {name} has no nn.Conv2d, so there is nothing to quantize")
    _check_beats_bicubic(model.eval(), name)
    return model


def read_weights(path):
    """A state dict in float32 from a .safetensors, .pt, .pth or (MXNet's) .params file.

    Raises
    ------
    ValueError
        If the file is damaged, or no state dict.
    PermissionError
        If it may not be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".params":
            state = read_mxnet(path)
        elif path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except PermissionError:
        raise PermissionError(f"{path} may not be read by this user") from None
    except MemoryError:
        raise
    except Exception:  # unpickling stumbles over other files in ways of all kinds
        raise ValueError(
            f"{path} is damaged, cut short, or no file of weights; fetch it again"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # of a checkpoint of training
    tensors = isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
    if not tensors or not state:
        raise ValueError(f"{path} holds no state dict (names with tensors)")
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: the weights {key!r} hold NaN or infinity")
    return {key: value.float() for key, value in state.items()}


def from_state(state, value_range=None):
    """The network that a state dict shows, by its key names: EDSR, RDN, IMDN, RLFN or SRResNet."""
    build = edsr_from_state
    if any(key.startswith("RDBs.") for key in state):
        build = rdn_from_state
    elif "fea_conv.weight" in state or "module.fea_conv.weight" in state:
        build = imdn_from_state
    elif "block_1.esa.conv1.weight" in state:
        build = rlfn_from_state
    elif "conv_input.weight" in state or "blocks.0.bn1.weight" in state:
        build = srresnet_from_state
    try:
        return build(state) if value_range is None else build(state, value_range)
    except KeyError as error:
        raise ValueError(f"these weights are not whole: {error} is missing") from None
    except (ValueError, IndexError, RuntimeError) as error:  # keys or shapes of another network
        raise ValueError(
            f"{shorten(str(error), 300)}; known are the names of EDSR, RDN, IMDN, RLFN and "
            "SRResNet; another network is given as FILE.py:FUNCTION, which returns it"
        ) from None


def _loaded(model, state):
    """A network with a state dict in it, or an error that names the first misfit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        name = type(model).__name__
        raise ValueError(f"these are not {name}'s weights: {error}") from None
    return model.eval()


def imdn_from_state(state, value_range=1.0):
    """An IMDN of the scale and width that a state dict of the official form shows."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    out, features = state["upsampler.0.weight"].shape[:2]
    return _loaded(IMDN(int((out // 3) ** 0.5), features=features, value_range=value_range), state)


def rlfn_from_state(state, value_range=255.0):
    """An RLFN of the scale and width that a state dict of the official form shows."""
    out, features = state["upsampler.0.weight"].shape[:2]
    return _loaded(RLFN(int((out // 3) ** 0.5), features, value_range), state)


def rdn_from_state(state, value_range=255.0):
    """An RDN of the size that a state dict with EDSR-PyTorch's key names shows."""
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("RDBs."))
    layers = 1 + max(int(key.split(".")[3]) for key in state if key.startswith("RDBs.0.convs."))
    growth, features = state["RDBs.0.convs.0.conv.0.weight"].shape[:2]
    scale = 4 if "UPNet.4.weight" in state else 3
    if scale == 3 and state["UPNet.0.weight"].shape[0] == 4 * growth:
        scale = 2
    return _loaded(RDN(scale, blocks, layers, growth, features, value_range), state)


def srresnet_from_state(state, value_range=255.0):
    """An SRResNet of the size that a state dict shows, with the names of DFSQ's authors or ours.

    Theirs has no bias outside batch normalization and one slope for all channels of a PReLU, and
    subtracts no mean (``model/bnsrresnet_org.py`` of their DDTB, which DFSQ's code shares).
    """
    parts = {
        "conv_input": "head.0",
        "relu": "head.1",
        "residual": "blocks",
        "conv_mid": "merge.0",
        "bn_mid": "merge.1",
        "upscale": "upsampler",
        "conv_output": "tail",
    }
    layers = {"relu": "prelu", "in1": "bn1", "in2": "bn2"}
    renamed = {}
    for key, value in state.items():
        part, *rest = key.split(".")
        if part == "residual":
            rest[1] = layers.get(rest[1], rest[1])
        renamed[".".join((parts.get(part, part), *rest))] = value
    features = renamed["head.0.weight"].shape[0]
    blocks = 1 + max(int(key.split(".")[1]) for key in renamed if key.startswith("blocks."))
    scale = 4 if "upsampler.3.weight" in renamed else 2
    model = SRResNet(scale, blocks, features, signed_output=False, value_range=value_range)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.PReLU) and renamed[f"{name}.weight"].numel() == 1:
            renamed[f"{name}.weight"] = renamed[f"{name}.weight"].expand(features)
        if isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            renamed.setdefault(f"{name}.bias", torch.zeros(module.out_channels))
    return _loaded(model, renamed)


def edsr_from_mxnet(state):
    """EDSR from the zoo's MXNet form, whose convolutions are numbered.

    Its depth_to_space takes channel ``q * 64 + c`` where PixelShuffle takes ``c * 4 + q``; RGB in
    0..1 less the mean is doubled.
    """
    blocks = (sum(key.endswith("_weight") for key in state) - 4) // 2
    layers = ["head.0"]
    for i in range(blocks):
        layers += [f"body.{i}.body.0", f"body.{i}.body.2"]
    layers += [f"body.{blocks}", "tail.0.0", "tail.1"]
    renamed = {
        f"{layer}.{kind}": state[f"convolution{i}_{kind}"]
        for i, layer in enumerate(layers)
        for kind in ("weight", "bias")
    }
    for key in ("tail.0.0.weight", "tail.0.0.bias"):
        renamed[key] = renamed[key].unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)
    return edsr_from_state(renamed, value_range=2.0)


def srresnet_from_mxnet(state):
    """SRResNet x4 from the zoo's MXNet form, whose layers are numbered by kind."""
    blocks = (sum(key.startswith("batchnorm") for key in state) // 4 - 1) // 2
    renamed = {}

    def take(target, kind, number, names):
        for theirs, ours in names.items():
            renamed[f"{target}.{ours}"] = state[f"{kind}{number}_{theirs}"]

    weight, biased = {"weight": "weight"}, {"weight": "weight", "bias": "bias"}
    norm = {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_var": "running_var",
    }
    take("head.0", "convolution", 0, biased)
    take("head.1", "leakyrelu", 0, weight)
    for i in range(blocks):
        take(f"blocks.{i}.conv1", "convolution", 2 * i + 1, weight)
        take(f"blocks.{i}.bn1", "batchnorm", 2 * i, norm)
        take(f"blocks.{i}.prelu", "leakyrelu", i + 1, weight)
        take(f"blocks.{i}.conv2", "convolution", 2 * i + 2, weight)
        take(f"blocks.{i}.bn2", "batchnorm", 2 * i + 1, norm)
    after = 2 * blocks + 1
    take("merge.0", "convolution", after, weight)
    take("merge.1", "batchnorm", 2 * blocks, norm)
    for n in range(2):
        take(f"upsampler.{3 * n}", "convolution", after + 1 + n, biased)
        take(f"upsampler.{3 * n + 2}", "leakyrelu", blocks + 1 + n, weight)
    take("tail", "convolution", after + 3, biased)
    model = SRResNet(4, blocks)
    model.load_state_dict(renamed, strict=False)  # batch norm's counters are not in the file
    return model.eval()


def edsr_from_state(state, value_range=255.0, residual_scale=None):
    """An EDSR of the depth, width and scale that a state dict shows.

    Parameters
    ----------
    state : dict
        Key names of EDSR-PyTorch; its mean-shift layers are accepted and left out.
    value_range : float
        See :class:`~dfsq.sr.models.edsr.EDSR`.
    residual_scale : float, optional
        By default 1, and 0.1 for 256 features, as in the large EDSR.
    """
    state = {k: v for k, v in state.items() if not k.startswith(("sub_mean.", "add_mean."))}
    needed = ("head.0.weight", "body.0.body.0.weight", "tail.0.0.weight", "tail.1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(
            f"these are not EDSR's weights: {missing[0]!r} is missing, "
            f"there is {', '.join(list(state)[:3])}, ..."
        )
    features = state["head.0.weight"].shape[0]
    numbers = {int(k.split(".")[1]) for k in state if k.startswith("body.")}
    factor = state["tail.0.0.weight"].shape[0] // features
    scale = 4 if "tail.0.2.weight" in state else {4: 2, 9: 3}.get(factor, 0)
    if residual_scale is None:
        residual_scale = 0.1 if features == 256 else 1.0
    return _loaded(EDSR(scale, max(numbers), features, residual_scale, value_range), state)


def _trained(name, build, title, scales=(2, 4)):
    """Entries, one a scale, of a network that `dfsq train` makes."""
    return {
        f"{name}-x{scale}": Entry(
            f"{name}-x{scale}.safetensors",
            lambda state: build(state, value_range=1.0),
            title,
            "this project",
            embedded=True,
        )
        for scale in scales
    }


#: Networks by name.
ENTRIES = {
    **_trained("edsr", edsr_from_state, "EDSR-baseline"),
    **_trained("srresnet", srresnet_from_state, "SRResNet with 16 blocks"),
    **_trained("rdn", rdn_from_state, "RDN with 16 blocks of 8 layers"),
    **_trained("rdn-small", rdn_from_state, "RDN with 8 blocks of 4 layers"),
    **_trained("edsr-long", edsr_from_state, "EDSR-baseline", scales=(2,)),
    "edsr-baseline-x2": Entry(
        "weights/edsr_baseline_x2-1bc95232.pt", edsr_from_state, "EDSR-baseline", "its authors"
    ),
    "edsr-baseline-x4": Entry(
        "weights/edsr_baseline_x4-6b446fab.pt", edsr_from_state, "EDSR-baseline", "its authors"
    ),
    "edsr-8-x2": Entry(
        "weights/EDSR-8-x2-0000.params", edsr_from_mxnet, "EDSR with 8 blocks", "krasserm"
    ),
    "srresnet-8-x4": Entry(
        "weights/SRResNet_4x-0000.params",
        srresnet_from_mxnet,
        "SRResNet with 8 blocks",
        "not known",
    ),
    "imdn-x2": Entry("weights/IMDN_x2.pth", imdn_from_state, "IMDN", "its authors"),
    "imdn-x4": Entry("weights/IMDN_x4.pth", imdn_from_state, "IMDN", "its authors"),
    "rlfn-x2": Entry("weights/rlfn_x2.pth", rlfn_from_state, "RLFN", "its authors"),
    "rlfn-x4": Entry("weights/rlfn_x4.pth", rlfn_from_state, "RLFN", "its authors"),
}


def model_names():
    """The names that :func:`load_model` knows, less those of networks not trained yet.

    Examples
    --------
    >>> "edsr-x2" in model_names()
    True
    """
    return tuple(
        name
        for name, entry in ENTRIES.items()
        if not entry.embedded or (WEIGHTS_FOLDER / entry.file).is_file()
    )


def trained_names():
    """The names of the networks that this project trained, as far as their weights are here.

    Examples
    --------
    >>> trained_names()[0]
    'edsr-x2'
    """
    return tuple(name for name in model_names() if ENTRIES[name].embedded)


@torch.no_grad()
def _check_beats_bicubic(model, path, value_range=None):
    """Refuse a network that does not beat bicubic, or does better under the other common range.

    The latter, checked if a range is given, is no small print: EDSR is nearly homogeneous, so
    weights for 0..1 that are loaded for 0..255 lose 2 dB, and still beat bicubic.
    """
    hr = crop_to_multiple(photograph("coffee")[100:292, 200:392], model.scale)
    lr = imresize(hr, 1 / model.scale)
    bicubic = psnr_y(imresize(lr, model.scale), hr, model.scale)
    if value_range is None:
        for key, value in model.state_dict().items():
            if not torch.isfinite(value).all():
                raise ValueError(f"the network of {path}: the weights {key!r} hold NaN or infinity")
        try:
            result = to_image(model(to_tensor(lr)))
        except Exception as error:
            raise ValueError(
                f"the network of {path} fails on an RGB image in 0..1, a tensor of shape "
                f"{tuple(to_tensor(lr).shape)}: {type(error).__name__}: {error}"
            ) from error
        if result.shape != hr.shape:
            raise ValueError(
                f"{path} makes an image of shape {result.shape} of one of {lr.shape}, "
                f"with scale {model.scale} it must be {hr.shape}"
            )
        psnr = psnr_y(result, hr, model.scale)
        if not psnr > bicubic:
            raise ValueError(
                f"{path} gives {psnr:.2f} dB on a photograph, bicubic {bicubic:.2f} dB: it is "
                "trained too little, or for another range; a network takes and returns RGB in 0..1"
            )
        return
    other = 1.0 if value_range == 255 else 255.0
    psnr = {}
    for model.value_range in (other, value_range):
        psnr[model.value_range] = psnr_y(to_image(model(to_tensor(lr))), hr, model.scale)
    if not psnr[value_range] > max(bicubic, psnr[other]):
        fits = psnr[other] > max(bicubic, psnr[value_range])
        advice = (
            f"give value_range={other:g} (--value-range {other:g}; where there is no such option, "
            "name a function, FILE.py:NAME, that returns the network)"
            if fits
            else "they are trained too little, for another network, or for another range"
        )
        raise ValueError(
            f"{path} with value_range={value_range:g} gives {psnr[value_range]:.2f} dB on a "
            f"photograph, with {other:g} {psnr[other]:.2f} dB, bicubic {bicubic:.2f} dB: these "
            f"weights do not fit; {advice}"
        )
