"""How the embedded weights were made: EDSR-baseline trained on BSDS500.

The recipe is EDSR's: L1 loss, 48x48 LR patches, batches of 16, Adam, flips and rotations, a
learning rate that is halved at fixed steps; with a warm-up, a higher first rate (the run is
short), and an exponential moving average of the weights, which is what is kept. Batches are a
function of the seed and the step alone, so a run that was killed goes on as if it had not been.

Run ``python -m dfsq.study.training --help`` for the options.
"""

import argparse
import csv
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from ..sr.datasets import image_files, load_dataset, read_image
from ..sr.imaging import crop_to_multiple, imresize, psnr_y, to_tensor
from ..sr.models.edsr import EDSR
from ..sr.upscaling import Bicubic, upscale
from .figures import training_curve, use_style

LOG_FIELDS = ("step", "learning_rate", "loss", "validation_psnr", "seconds")


@dataclass(frozen=True)
class Recipe:
    """What determines the weights; stored beside them."""

    scale: int = 2
    blocks: int = 16
    features: int = 64
    patch: int = 48  # LR pixels
    batch: int = 16
    learning_rate: float = 5e-4
    warmup: int = 250  # steps
    halve_every: int = 3000  # steps
    average: float = 0.999  # decay of the averaged weights
    seed: int = 0
    first_step: int = 0  # steps that the initial weights have behind them

    def rate(self, step):
        """Learning rate at a step: linear warm-up, then halved every `halve_every` steps."""
        warmup = min(1.0, (step - self.first_step + 1) / self.warmup)
        return self.learning_rate * warmup * 0.5 ** (step // self.halve_every)


def training_pairs(folder, scale):
    """LR and HR images of BSDS500 for training and for validation.

    `folder` holds ``train`` and ``test``. Trained on are both but the last 50 of ``test`` by
    name, which are held out, and but ``train/302003``, which is Set5's "woman" at another
    size. BSDS500's ``val`` is B100 and is never read.

    Returns
    -------
    train, validation : list of (LR, HR), uint8 arrays of shape (H, W, 3)
    """
    folder = Path(folder)
    train = [p for p in image_files(folder / "train") if p.stem != "302003"]
    test = image_files(folder / "test")

    def pairs(paths):
        hrs = (crop_to_multiple(read_image(p), scale) for p in paths)
        return [(imresize(hr, 1 / scale), hr) for hr in hrs]

    return pairs(train + test[:-50]), pairs(test[-50:])


def draw_batch(pairs, recipe, step):
    """The batch of one step: random patches, flipped and rotated; a function of seed and step.

    Returns
    -------
    lr, hr : float32 tensors in 0..1, (batch, 3, patch, patch) and scale times that
    """
    generator = np.random.default_rng([recipe.seed, step])
    lrs, hrs = [], []
    for _ in range(recipe.batch):
        lr, hr = pairs[generator.integers(len(pairs))]
        y, x = (generator.integers(n - recipe.patch + 1) for n in lr.shape[:2])
        lr = lr[y : y + recipe.patch, x : x + recipe.patch]
        y, x, size = (n * recipe.scale for n in (y, x, recipe.patch))
        hr = hr[y : y + size, x : x + size]
        turns, mirror = generator.integers(4), generator.integers(2)
        for image, images in ((lr, lrs), (hr, hrs)):
            image = np.rot90(image, turns)
            images.append(to_tensor(image[:, ::-1] if mirror else image))
    return torch.cat(lrs), torch.cat(hrs)


def validate(model, pairs):
    """Mean PSNR-Y in dB over whole images, in float32."""
    return float(np.mean([psnr_y(upscale(model, lr), hr, model.scale) for lr, hr in pairs]))


def _moving_average(decay):
    """Exponential moving average whose decay grows to `decay`, so that it forgets the start."""

    def update(averaged, current, count):
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, 1 - now)

    return update


def _write(path, save):
    """Write a file so that a kill leaves the old one or the new one, never half of one."""
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    os.replace(temporary, path)


def _read_log(path, last_step):
    """Rows of the log up to a step; later ones were written by a run that is being repeated."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= last_step]


def _write_log(path, rows):
    def save(temporary):
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    _write(path, save)


def train(folder, out, recipe, steps, *, initial=None, save_every=1000, validate_on=16):
    """Train, or go on training, until `steps` steps are done.

    Parameters
    ----------
    folder : path
        BSDS500, with ``train`` and ``test``.
    out : path
        Folder of ``checkpoint.pt``, ``log.csv`` and ``recipe.json``. A checkpoint found there is
        gone on from; it must come from the same recipe.
    recipe : Recipe
    steps : int
        Total number of steps, those of earlier runs included.
    initial : path, optional
        Weights (safetensors) to start from when there is no checkpoint; their steps stand in
        ``recipe.first_step``.
    save_every : int
        Steps between checkpoints, each with a validation.
    validate_on : int
        Number of held-out images, evenly spread, that a validation in the run takes.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out / "checkpoint.pt", out / "log.csv"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(recipe.seed)
    model = EDSR(recipe.scale, recipe.blocks, recipe.features)
    if initial is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(initial).items()})
    model = model.to(device, memory_format=torch.channels_last)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=_moving_average(recipe.average)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.999))
    step, seconds = recipe.first_step, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(
                f"{checkpoint} was made by another recipe, {state['recipe']}; "
                "give the same options, or another folder"
            )
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    rows = _read_log(log, step)
    _write(out / "recipe.json", lambda p: p.write_text(json.dumps(asdict(recipe), indent=2) + "\n"))

    print(f"reading {folder}", flush=True)
    pairs, held_out = training_pairs(folder, recipe.scale)
    held_out = held_out[:: max(1, len(held_out) // validate_on)][:validate_on]
    print(f"{len(pairs)} images to train on, {device}, step {step} of {steps}", flush=True)
    losses, began, first = [], time.perf_counter(), step
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        lr, hr = (t.to(device) for t in draw_batch(pairs, recipe, step))
        lr = lr.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            result = model(lr)
        loss = functional.l1_loss(result.float(), hr)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            spent = time.perf_counter() - began
            left = spent / (step - first) * (steps - step)
            print(
                f"step {step}/{steps}  L1 {np.mean(losses[-50:]):.5f}  "
                f"{spent / (step - first):.2f} s/step  {left / 60:.0f} min left",
                flush=True,
            )
        if step % save_every == 0 or step == steps:
            psnr = validate(averaged.module, held_out)
            total = seconds + time.perf_counter() - began
            row = (step, recipe.rate(step - 1), np.mean(losses), psnr, total)
            rows.append(
                dict(zip(LOG_FIELDS, (row[0], *(f"{v:.6g}" for v in row[1:])), strict=True))
            )
            losses = []
            state = {
                "recipe": asdict(recipe),
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": total,
            }
            # the log first: rows beyond the checkpoint are dropped when the run goes on
            _write_log(log, rows)
            _write(checkpoint, lambda p, state=state: torch.save(state, p))
            print(f"step {step}: validation PSNR-Y {psnr:.3f} dB", flush=True)


def export(out, target, report_on=()):
    """Publish a checkpoint: weights, and beside them recipe, log, curve and a report.

    Parameters
    ----------
    out : path
        Folder of :func:`train`.
    target : path
        The averaged weights go there in half precision (safetensors); ``.json`` (recipe, steps,
        report), ``.csv`` (log) and ``.png`` (curve) beside it.
    report_on : sequence of paths
        Folders of HR images to report PSNR-Y on, in float32 and with the weights as rounded.
    """
    out, target = Path(out), Path(target)
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    recipe = state["recipe"]
    weights = {
        name.removeprefix("module."): value.half().contiguous()
        for name, value in state["averaged"].items()
        if name != "n_averaged"
    }
    model = EDSR(recipe["scale"], recipe["blocks"], recipe["features"]).eval()
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    rows = _read_log(out / "log.csv", state["step"])
    report = {
        "steps": state["step"],
        "hours": round(state["seconds"] / 3600, 2),
        "validation_psnr": float(rows[-1]["validation_psnr"]),
        "recipe": recipe,
        "psnr": {},
    }
    for folder in map(Path, report_on):
        pairs = [(p.lr, p.hr) for p in load_dataset(folder, model.scale)]
        report["psnr"][folder.name] = {
            "bicubic": validate(Bicubic(model.scale), pairs),
            "float": validate(model, pairs),
        }
    use_style()
    log = pd.DataFrame(rows).astype(float)
    _write(target, lambda p: save_file(weights, p, {"step": str(state["step"])}))
    _write(target.with_suffix(".json"), lambda p: p.write_text(json.dumps(report, indent=2) + "\n"))
    _write_log(target.with_suffix(".csv"), rows)
    _write(
        target.with_suffix(".png"), lambda p: training_curve(log).savefig(p, format="png", dpi=100)
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m dfsq.study.training",
        description="Train EDSR on BSDS500; a run that was stopped goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="folder of BSDS500, with train and test")
    parser.add_argument("--out", default="runs/edsr-x2", help="folder of checkpoint and log")
    parser.add_argument("--steps", type=int, default=20000, help="steps in all")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--initial", help="weights to start from (safetensors)")
    parser.add_argument("--export", help="publish the averaged weights there and stop")
    parser.add_argument(
        "--report-on", nargs="*", default=[], help="with --export: folders to report PSNR-Y on"
    )
    for name, default in asdict(Recipe()).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, help="recipe")
    options = vars(parser.parse_args(arguments))
    if options["export"]:
        export(options["out"], options["export"], options["report_on"])
        return
    recipe = Recipe(**{name: options[name] for name in asdict(Recipe())})
    train(
        options["data"],
        options["out"],
        recipe,
        options["steps"],
        initial=options["initial"],
        save_every=options["save_every"],
    )


if __name__ == "__main__":
    main()
