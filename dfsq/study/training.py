"""Training of super-resolution networks: a run that is stopped goes on as if it had not been.

Batches are a function of the seed and the step alone, and checkpoints, written whole, hold all the
rest. Ctrl-C and SIGTERM wait for the step in work and a checkpoint of it; a run that is killed goes
on from the checkpoint before. In float32 on a CPU (with as many threads) a run in parts equals the
run in one, to the last bit; on a GPU sums are taken in an order that changes from run to run.
"""

import copy
import csv
import hashlib
import io
import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.nn import functional

from ..files import write_whole
from ..sr.imaging import psnr_y
from ..sr.upscaling import upscale
from . import recipes
from .devices import choose_device
from .leaks import not_compared
from .patches import Patches, training_images

LOG_FIELDS = ("step", "learning_rate", "loss", "validation_psnr", "seconds")

#: Held-out images that a validation in the run takes: every second or further one, if there are so
#: many, or else the first.
VALIDATE_ON = 16


def validate(model, pairs):
    """Mean PSNR-Y in dB over whole images, in float32."""
    return float(np.mean([psnr_y(upscale(model, p.lr), p.hr, model.scale) for p in pairs]))


@torch.no_grad()
def update_average(averaged, model, count, decay):
    """One step of the exponential moving average of a network.

    The decay grows to `decay`, so that the average forgets the start. The running statistics of
    batch normalization are averaged as the weights are: to first order they are then those of the
    averaged weights, where a copy would be those of the last weights, over some ten batches. Their
    counters of batches, integers, are copied.

    Parameters
    ----------
    averaged, model : nn.Module
        The former is changed in place.
    count : int
        Updates before this one; the first copies.
    decay : float
    """
    now = min(decay, (1 + count) / (10 + count)) if count else 0.0
    both = list(zip(averaged.state_dict().values(), model.state_dict().values(), strict=True))
    weights = [pair for pair in both if pair[0].is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*weights, strict=True)), 1 - now)
    for mean, value in both:
        if not mean.is_floating_point():
            mean.copy_(value)


def read_log(path, last_step):
    """Rows of a log up to a step; later ones were written by a run that is being repeated.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is no log.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a run writes it beside its checkpoint")
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != LOG_FIELDS:
            raise ValueError(f"{path} is not the log of a run: no table of {', '.join(LOG_FIELDS)}")
        return [row for row in rows if int(row["step"]) <= last_step]


def write_log(path, rows):
    def save(temporary):
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, save)


def read_checkpoint(out):
    """The state of a run, or None where there is none.

    Raises
    ------
    OSError
        If the file is there and cannot be read.
    ValueError
        If it is damaged.
    """
    path = Path(out) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        state["recipe"], state["data"], state["averaged"]
        # what earlier versions did not write
        state.setdefault("losses", [])
        if "seconds_by_device" not in state:
            state["seconds_by_device"] = {state["device"]: state["seconds"]}
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, as the unpickler meets what is not its own
        kind = type(error).__name__
        raise ValueError(
            f"{path} is damaged or no checkpoint; move it away to start anew ({kind})"
        ) from None
    return state


def _say(text):
    print(text, flush=True)  # also where the output goes to a file


class _Stop:
    """Within this, Ctrl-C and SIGTERM are noted, and do what they did before when it is time.

    Only the first: the next one does not wait. One that the process ignores is left ignored.
    """

    def __enter__(self):
        self.asked, self._before = None, {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, _):
        self.asked = number
        self.__exit__()

    def now(self):
        """Do what was asked."""
        signal.raise_signal(self.asked)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def train(source, out, recipe, steps, *, initial=None, save_every=1000, device=None):
    """Train, or go on training, until `steps` steps are done.

    Ctrl-C and SIGTERM, in the main thread, stop the run after the step in work and a checkpoint;
    a second one stops it at once.

    Parameters
    ----------
    source : str or path
        What to train on, see :func:`dfsq.study.patches.training_images`.
    out : path
        Folder of ``checkpoint.pt``, ``log.csv`` and ``recipe.json``. A checkpoint found there is
        gone on from; it must come from the same recipe and images.
    recipe : dfsq.study.recipes.Recipe
    steps : int
        Total number of steps, those of earlier runs included.
    initial : path, optional
        Weights to start from, see :func:`dfsq.study.recipes.start`. Where there is a checkpoint
        they are only checked to be those that it began with.
    save_every : int
        Steps between checkpoints, each with a validation.
    device : str, optional
        A GPU by default, if there is one.

    Raises
    ------
    ValueError
        For options that are out of their range, or that do not go with the checkpoint, or if
        another run is at work in `out`.
    FloatingPointError
        If the loss is no longer finite; the last checkpoint stands, if there was one.
    """
    for name, value in (("steps", steps), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value!r}")
    device = choose_device(device)
    with _Run(Path(out), recipe, initial, device) as run:
        _train(run, source, steps, save_every)


def _train(run, source, steps, save_every):
    out, recipe, device = run.out, run.recipe, run.device
    if run.step >= steps and not run.resumed:
        raise ValueError(
            f"steps counts those that the initial weights have behind them: it must be more "
            f"than {run.step}, not {steps}"
        )
    images = training_images(source, recipe.scale, recipe.patch)
    run.take(images.facts)
    if run.step >= steps:
        _say(f"{out} is at step {run.step} already")
        return
    _tell(images.facts)
    held_out = images.held_out[:: max(1, len(images.held_out) // VALIDATE_ON)][:VALIDATE_ON]
    patches = Patches(images.train, recipe.scale, device)
    _say(f"training on {device} in {recipe.precision}, step {run.step} of {steps}")
    if device == "cpu" and recipe.precision == "bfloat16" and (cost := cost_of_bfloat16()) > 1.2:
        _say(f"bfloat16 takes {cost:.1f} times as long as float32 here: --float32 is faster")

    first, began = run.step, time.perf_counter()
    told_every = max(1, min(50, (steps - first) // 10))
    with _Stop() as stop:
        while run.step < steps:
            run.advance(*patches.batch(run.recipe, run.step))
            due = run.step % save_every == 0 or run.step == steps
            if stop.asked:  # nothing is said before: who reads it may have been stopped as well
                run.save(held_out if due else None)
                break
            spent = time.perf_counter() - began
            if run.step % told_every == 0 or due:
                losses = run.losses()
                pace = spent / (run.step - first)
                _say(
                    f"step {run.step}/{steps}  L1 {np.mean(losses[-told_every:]):.5f}  "
                    f"{pace:.2f} s/step  {pace * (steps - run.step) / 60:.0f} min left"
                )
            if due:
                psnr = run.save(held_out)
                _say(f"step {run.step}: saved; validation PSNR-Y {psnr:.3f} dB")
        if stop.asked:
            _say(f"step {run.step}: saved; the same command goes on from here")
            stop.now()


def cost_of_bfloat16():
    """Time of a convolution and its gradient in bfloat16 over that in float32, on this CPU.

    A processor without instructions for bfloat16 emulates it, and the ratio is above 1.

    Returns
    -------
    float
    """
    x = torch.ones(4, 64, 48, 48).to(memory_format=torch.channels_last)
    weight = torch.ones(64, 64, 3, 3, requires_grad=True)
    seconds = {}
    for low in (False, True):
        for _ in range(3):
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                functional.conv2d(x, weight).float().sum().backward()
            spent = time.perf_counter() - began
            seconds[low] = min(spent, seconds.get(low, spent))
    return seconds[True] / seconds[False]


def _tell(facts):
    """What is trained on, and what is not."""
    _say(f"{facts['images']} images to train on, {facts['held_out']} held out for validation")
    if facts["too_small"]:
        _say(f"{facts['too_small']} left out: smaller than a patch")
    for name, shown in facts["left_out"].items():
        _say(f"left out: {name} shows {shown}")
    if missing := not_compared(facts["compared"]):
        _say(f"not compared with {', '.join(missing)}: not on this machine (`dfsq fetch`)")


def _record(path, digest):
    """The facts that were published of weights; empty if they are not beside them, or of others."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        return facts if facts["weights"]["sha256"] == digest else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class _Run:
    """The state of a run: networks, optimizer, step and log; new, or as a checkpoint left it."""

    def __init__(self, out, recipe, initial, device):
        self.out, self.device = out, device
        self._lock = FileLock(out / ".lock", timeout=0)
        state = read_checkpoint(out)
        self.resumed = state is not None
        if initial is not None and not Path(initial).is_file():
            raise FileNotFoundError(f"no such file of initial weights: {initial}")
        self._digest = initial and hashlib.sha256(Path(initial).read_bytes()).hexdigest()
        if self.resumed:
            self._check(state, recipe)
            recipe = replace(recipe, first_step=state["recipe"]["first_step"])
        torch.manual_seed(recipe.seed)
        model = recipe.build()
        self.data, self.initial, self.step = None, None, 0
        self.seconds, self.rows, self._losses = {}, [], []
        if self.resumed:
            model.load_state_dict(state["model"])
            self.data, self.initial = state["data"], state["initial"]
            self.step, self.seconds = state["step"], state["seconds_by_device"]
            self.rows = read_log(out / "log.csv", self.step)
        elif initial is not None:
            recipe = self._start(model, recipe, Path(initial))
        self.recipe = recipe
        self.model = model.to(device, memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.Adam(
            recipes.parameter_groups(self.model), lr=recipe.learning_rate
        )
        if self.resumed:
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:  # what earlier versions did not write
                group.setdefault("factor", 1.0)
            self._losses = state["losses"]
        self._pending = []

    def _be_alone(self):
        """Refuse to go on where another run writes, which would take each other's files."""
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"another run is at work in {self.out}; wait, stop it, or give another folder"
            ) from None
        state = read_checkpoint(self.out)
        if (state["step"] if state else None) != (self.step if self.resumed else None):
            raise ValueError(
                f"another run has been at work in {self.out} meanwhile; give the command again"
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lock.release(force=True)

    def _check(self, state, recipe):
        """Refuse a checkpoint that is not of this recipe or these initial weights."""
        path = self.out / "checkpoint.pt"
        saved = state["recipe"]
        given = replace(recipe, first_step=saved["first_step"]).facts()
        if saved != given:
            name = next(n for n in saved | given if saved.get(n) != given.get(n))
            raise ValueError(
                f"{path} was made by another recipe: {name} is {saved.get(name)!r} there and "
                f"{given.get(name)!r} here; give the same options, or another folder"
            )
        begun = state["initial"] and state["initial"]["sha256"]
        if self._digest is not None and self._digest != begun:
            raise ValueError(
                f"{path} began with other weights than those given as initial; leave them away, or "
                "give another folder"
            )

    def _start(self, model, recipe, path):
        """Take initial weights, with the steps, the seconds and the log they have behind them."""
        start = recipes.start(model, recipe, path)
        _say(f"starting from {path}: {len(start.taken)} tensors taken")
        if start.left:
            _say(f"not found there: {', '.join(start.left)}")
        record = _record(path, self._digest)
        self.step = start.step
        log = path.with_suffix(".csv")
        self.rows = read_log(log, start.step) if start.step and log.exists() else []
        if self.rows:
            before = {record.get("device", "unknown"): float(self.rows[-1]["seconds"])}
            self.seconds = record.get("seconds", before)
        self.initial = {
            "name": path.stem,
            "sha256": self._digest,
            "taken": len(start.taken),
            "not_taken": list(start.left),
            "recipe": record.get("recipe"),
            "data": record.get("data"),
            "initial": record.get("initial"),
        }
        return replace(recipe, first_step=start.step)

    def take(self, facts):
        """Take note of the images, which must be those that the run began with."""
        if self.data is not None and self.data["digest"] != facts["digest"]:
            raise ValueError(
                f"{self.out / 'checkpoint.pt'} was trained on other images: "
                f"{self.data['images']} of {self.data['source']}; give the same, or another folder"
            )
        self.data = facts
        self.out.mkdir(parents=True, exist_ok=True)
        self._be_alone()
        text = json.dumps(self.recipe.facts(), indent=2) + "\n"
        write_whole(self.out / "recipe.json", lambda path: path.write_text(text))
        self._began = time.perf_counter()

    def advance(self, lr, hr):
        """One step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self.recipe.rate(self.step)
        low = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, enabled=low):
            result = self.model(lr)
        loss = functional.l1_loss(result.float(), hr)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        count = self.step - self.recipe.first_step
        update_average(self.averaged, self.model, count, self.recipe.average)
        self._pending.append(loss.detach())
        self.step += 1

    def losses(self):
        """Losses since the last row of the log.

        They are looked at when they are told, not at each step, which would hold up a GPU.
        """
        if self._pending:
            values = torch.stack(self._pending).tolist()
            bad = next((i for i, value in enumerate(values) if not np.isfinite(value)), None)
            if bad is not None:
                raise FloatingPointError(
                    f"the loss is {values[bad]} at step {self.step - len(values) + bad}; the last "
                    "checkpoint stands; try a lower learning_rate in another folder"
                )
            self._losses += values
            self._pending = []
        return self._losses

    def _spent(self):
        """Seconds by device, those of earlier runs included."""
        now = time.perf_counter() - self._began
        return self.seconds | {self.device: self.seconds.get(self.device, 0.0) + now}

    def save(self, held_out=None):
        """Write log and checkpoint; the PSNR-Y in dB on the held-out images.

        Without images no row is added to the log: its next one is then that of an unbroken run.
        """
        losses, psnr = self.losses(), None
        if held_out is not None:
            psnr = validate(self.averaged, held_out)
            seconds = sum(self._spent().values())
            values = (self.recipe.rate(self.step - 1), np.mean(losses), psnr, seconds)
            values = (self.step, *(f"{value:.6g}" for value in values))
            self.rows.append(dict(zip(LOG_FIELDS, values, strict=True)))
            self._losses = []
        state = {
            "recipe": self.recipe.facts(),
            "data": self.data,
            "initial": self.initial,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self._losses,
            "step": self.step,
            "seconds_by_device": self._spent(),
        }
        # the log first: rows beyond the checkpoint are dropped when the run goes on
        write_log(self.out / "log.csv", self.rows)
        write_whole(self.out / "checkpoint.pt", lambda path: torch.save(state, path))
        return psnr
