"""Search of the activations' range: what share of a map's largest magnitude its codebook spans.

DFSQ's normalization puts a map's largest magnitude onto 1, the outermost point of the universal
set. Under a share ``s`` of it the points are ``s`` times those of the set: denser, while what lies
beyond ``s`` goes to the outermost. For each candidate the points are selected exactly, on
histograms of ``z / s``, so that the best of share and points together is found; it is kept for a
channel only where it leaves less error on calibration images that it was not selected on.
"""

import numpy as np
import torch
from tqdm import tqdm

from .cache import select_channels
from .calibration import add_normalized, is_held_out
from .compensation import SCALES
from .histogram import Histogram
from .memory import freed_memory_kept, in_groups
from .universal import universal_set

#: Shares of the largest magnitude that are tried; the first is the method without a search.
SHARES = SCALES
#: How much of its error another share than the first must take away on images held out.
LEAST_GAIN = 1e-3


@torch.no_grad()
def search(model, configs, calibration, points=None, *, progress=False):
    """Find the range of each input channel of some layers.

    Parameters
    ----------
    model : nn.Module
        In eval mode; it gives the layers the inputs that their points are selected for.
    configs : dict of str to Config
        The layers' configurations.
    calibration : Calibration
        Of these layers.
    points : dict of str to int array, shape (C,), optional
        Numbers of points of a layer's channels, where not all have ``2**act_bits``.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    dict of str to (float64 array, Histogram)
        For each layer the shares of its channels, shape (C,), and the histogram of ``z / share`` of
        all images, to select the points on.

    Notes
    -----
    Takes a pass over the images for each group of layers whose histograms, 14 times 96 KiB a
    channel on the dyadic grid, fit the memory limit together.
    """
    sizes = {name: 2 * len(SHARES) * calibration.layers[name].histogram.nbytes for name in configs}
    found = {}
    with tqdm(total=len(configs), desc="ranging", disable=not progress, unit="layer") as bar:
        for group in in_groups(sizes):
            gathered = _gather(model, group, calibration, progress)
            bar.unpause()  # that time is no layer's
            for name, parts in gathered.items():
                config, layer = configs[name], calibration.layers[name]
                own = None if points is None else points.get(name)
                found[name] = _best(
                    *parts,
                    2**config.act_bits if own is None else own,
                    universal_set(config.universal, config.words, signed=not layer.non_negative),
                )
                bar.update()
    return found


def _gather(model, names, calibration, progress):
    """Histograms under each share, of the images to select on and of those held out, by layer."""
    gathered, part, batches = {}, [0], calibration.batches

    def observer(name):
        layer = calibration.layers[name]
        channels = layer.histogram.channels
        gathered[name] = [
            [Histogram(channels, calibration.edges) for _ in SHARES] for _ in range(2)
        ]

        def observe(module, arguments):
            histograms = dict(zip(SHARES, gathered[name][part[0]], strict=True))
            x = arguments[0].detach().float()
            add_normalized(histograms, x, layer.non_negative, calibration.error_units)

        return observe

    first = next(model.parameters())
    hooks = [model.get_submodule(n).register_forward_pre_hook(observer(n)) for n in names]
    try:
        with freed_memory_kept():
            bar = tqdm(batches, "taking ranges", leave=False, disable=not progress, unit="image")
            for i, batch in enumerate(bar):
                part[0] = int(len(batches) > 1 and is_held_out(i, len(batches)))
                model(batch.to(first.device, first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return gathered


def _best(fit, check, k, universal):
    """Shares of a layer's channels, and the histogram of all images under them."""
    if not fit[0].count.any() or not check[0].count.any():  # one image, or a branch of few
        fit = check = fit if fit[0].count.any() else check
    errors = []
    for share, own, held_out in zip(SHARES, fit, check, strict=True):
        selections = select_channels(own, k=k, method="exact", universal=universal)
        left = [held_out.squared_error(s.points, c) for c, s in enumerate(selections)]
        errors.append([[share**2 * s.sse for s in selections], share**2 * np.array(left)])
    selected_on, judged_on = np.swapaxes(errors, 0, 1)
    best, channels = selected_on.argmin(axis=0), np.arange(fit[0].channels)
    # by less than this it is noise
    best[judged_on[best, channels] > (1 - LEAST_GAIN) * judged_on[0]] = 0
    whole = Histogram(len(channels), fit[0].edges)
    for choice in np.unique(best):
        rows = best == choice
        for part in (fit,) if fit is check else (fit, check):
            for name in ("count", "total", "squares"):
                getattr(whole, name)[rows] += getattr(part[choice], name)[rows]
    return np.array(SHARES)[best], whole
