"""Networks by name, or from a file of the user's, in eval mode: 0..1 RGB in, 0..1 RGB out."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .datasets import photograph
from .imaging import crop_to_multiple, imresize, psnr_y, to_image, to_tensor
from .models.edsr import EDSR

#: Networks whose weights come with the project.
EMBEDDED = {"edsr-x2": "edsr-x2.safetensors"}

WEIGHTS_FOLDER = Path(__file__).resolve().parents[2] / "data" / "weights"


def model_names():
    """The names that :func:`load_model` knows."""
    return tuple(EMBEDDED)


def load_model(name, *, value_range=None):
    """A network with its weights.

    Parameters
    ----------
    name : str or path
        A name of :func:`model_names`, or a file of EDSR weights, of any depth, width and scale,
        with the key names of EDSR-PyTorch (``.pt``, ``.pth`` or ``.safetensors``).
    value_range : float, optional
        For a file: the range of the RGB values that its weights expect, 255 (the default, as in
        the official files) or 1.

    Returns
    -------
    nn.Module in eval mode, with ``scale`` and ``body_layers``

    Raises
    ------
    ValueError
        For an unknown name, a damaged file, or weights that do not beat bicubic upscaling on an
        embedded photograph, or do better there with another `value_range`.
    """
    if name in EMBEDDED:
        if value_range is not None:
            raise ValueError("value_range goes with a file, not with a network's name")
        path = WEIGHTS_FOLDER / EMBEDDED[name]
        if not path.is_file():
            raise FileNotFoundError(
                f"the weights of {name!r} are not installed at {path}; "
                "run from a checkout, or `pip install -e .` in one"
            )
        return edsr_from_state(read_weights(path), value_range=1.0)
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"unknown model {str(name)!r}; there are {', '.join(model_names())}, "
            "or give a file of EDSR weights"
        )
    value_range = 255.0 if value_range is None else float(value_range)
    if not 0 < value_range < float("inf"):
        raise ValueError(f"value_range must be positive, such as 255 or 1, not {value_range:g}")
    model = edsr_from_state(read_weights(path), value_range)
    _check_beats_bicubic(model, path)
    return model


def read_weights(path):
    """A state dict in float32 from a .safetensors, .pt or .pth file.

    Raises
    ------
    ValueError
        If the file is damaged, or no state dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError):
        raise ValueError(
            f"{path} is damaged, cut short, or no file of weights; fetch it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (names with tensors)")
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: the weights {key!r} hold NaN or infinity")
    return {key: value.float() for key, value in state.items()}


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
    model = EDSR(scale, max(numbers), features, residual_scale, value_range)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"these are not EDSR's weights: {error}") from None
    return model.eval()


@torch.no_grad()
def _check_beats_bicubic(model, path):
    """Refuse weights that do not beat bicubic, or do better under the other common range.

    The latter is no small print: EDSR is nearly homogeneous, so weights for 0..1 that are
    loaded for 0..255 lose 2 dB, and still beat bicubic.
    """
    hr = crop_to_multiple(photograph("coffee")[100:292, 200:392], model.scale)
    lr = imresize(hr, 1 / model.scale)
    bicubic = psnr_y(imresize(lr, model.scale), hr, model.scale)
    given, other = model.value_range, 1.0 if model.value_range == 255 else 255.0
    psnr = {}
    for model.value_range in (other, given):
        psnr[model.value_range] = psnr_y(to_image(model(to_tensor(lr))), hr, model.scale)
    if not psnr[given] > max(bicubic, psnr[other]):
        fits = psnr[other] > max(bicubic, psnr[given])
        advice = f"give value_range={other:g}" if fits else "they are not trained for this network"
        raise ValueError(
            f"{path} with value_range={given:g} gives {psnr[given]:.2f} dB on a photograph, with "
            f"{other:g} {psnr[other]:.2f} dB, bicubic {bicubic:.2f} dB: these weights do not fit; "
            f"{advice}"
        )
