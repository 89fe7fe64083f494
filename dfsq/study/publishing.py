"""A trained network made public: weights in half precision, facts, log, curve and a model card.

Every figure of the card and of the book's page comes from the run or is measured here, with the
weights as rounded.
"""

import hashlib
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from ..files import write_tensors, write_whole
from ..memory import freed_memory_kept
from ..sr.datasets import BENCHMARK_SETS, CALIBRATION_SETS, load_dataset
from ..sr.upscaling import Bicubic
from ..sr.zoo import WEIGHTS_FOLDER
from .devices import choose_device
from .figures import training_curve, use_style
from .leaks import not_compared
from .recipes import RECIPES, Recipe, size
from .training import VALIDATE_ON, read_checkpoint, read_log, validate, write_log

#: Weights of more bytes are not committed; they belong beside a release.
LARGEST = 20_000_000

NAMED_SETS = ("photographs", *BENCHMARK_SETS, *CALIBRATION_SETS)

DEVICES = {"cpu": "a CPU", "cuda": "a GPU", "unknown": "a device that is not known"}
TITLES = {"edsr": "EDSR", "srresnet": "SRResNet", "rdn": "RDN"}

# What a model card says of every network.
TOO_LARGE = ", too large for the repository: they belong beside a release"
USE = """\
`dfsq.sr.load_model("{source}")` gives a network that takes and returns RGB in 0..1. It is meant for
the study of quantization: to be compared with its own quantized versions, not with the best
network of its kind. It undoes bicubic downscaling by {scale}; photographs that were blurred,
compressed or made noisy are not what it has seen. Details that it draws need not be true: it is
not for medical, forensic or other use in which they must be. The weights have the licence of the
project, which does not extend to the images."""


def publish(name, run, folder=WEIGHTS_FOLDER, *, sets=BENCHMARK_SETS, replace=False, device=None):
    """Publish the last checkpoint of a run.

    Parameters
    ----------
    name : str
        Of the recipe, see :func:`dfsq.study.recipes.recipe`.
    run : path
        Folder of :func:`dfsq.study.training.train`.
    folder : path
        Where ``NAME.json`` (facts), ``NAME.csv`` (log), ``NAME.png`` (curve) and ``NAME.md`` (model
        card) go, and the averaged weights, in half precision, as ``NAME.safetensors``. Weights of
        more than 20 MB stay in `run`, with facts and log beside them too.
    sets : sequence of str
        Data sets to measure PSNR-Y on, in float32; the card names the benchmark sets that are not
        among them.
    replace : bool
        Whether weights of another run that stand in `folder` may be replaced. Those that this run
        began with, and those that it had at an earlier step, always are.
    device : str, optional
        A GPU by default, if there is one.

    Returns
    -------
    path
        Where the weights are.

    Raises
    ------
    ValueError
        If there is no such recipe, no checkpoint, one of another network, or one that was saved
        before the first validation; if weights of another run stand in `folder`; if the weights
        are beyond half precision; or if two of `sets` have one name, or a folder that of a
        benchmark set.
    FileNotFoundError
        If a data set is neither here nor can be downloaded.
    """
    run, folder, device = Path(run), Path(folder), choose_device(device)
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    state = read_checkpoint(run)
    if state is None:
        raise ValueError(f"there is no checkpoint in {run}; train first: `dfsq train {name}`")
    recipe = Recipe(**state["recipe"])
    if recipe.network_facts() != RECIPES[name].network_facts():
        raise ValueError(
            f"the checkpoint in {run} is of the network {recipe.network_facts()}, not of {name}"
        )
    rows = read_log(run / "log.csv", state["step"])
    if not rows:
        raise ValueError(
            f"the run in {run} was stopped before its first validation; go on: `dfsq train {name}`"
        )
    titles = _titles(sets)
    if not replace:
        _check_replaced(folder / f"{name}.json", state)
    weights = {  # the counters of batch normalization stay integers
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in state["averaged"].items()
    }
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            largest = state["averaged"][key].abs().max()
            raise ValueError(
                f"{key!r} of the checkpoint in {run} goes up to {largest:.3g}, and half precision "
                "holds values up to 65504; train with a lower learning_rate in another folder"
            )
    model = recipe.build().eval()
    model.load_state_dict(weights)
    model = model.to(device, memory_format=torch.channels_last)
    psnr = {}
    with freed_memory_kept():
        for title, benchmark in titles.items():
            pairs = load_dataset(benchmark, recipe.scale)
            psnr[title] = {
                "bicubic": validate(Bicubic(recipe.scale), pairs),
                "float": validate(model, pairs),
            }

    parameters, held = size(recipe)
    target = (folder if held <= LARGEST else run) / f"{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"step": str(state["step"]), "value_range": "1"}
    write_tensors(target, weights, metadata)
    facts = {
        "name": name,
        "parameters": parameters,
        "steps": state["step"],
        "seconds": {name: round(value, 1) for name, value in state["seconds_by_device"].items()},
        "validation_psnr": float(rows[-1]["validation_psnr"]),
        "validated_at": int(rows[-1]["step"]),
        "recipe": recipe.facts(),
        "initial": state["initial"],
        "data": state["data"],
        "weights": {
            "bytes": target.stat().st_size,
            "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        },
        "psnr": psnr,
    }
    use_style()
    curve = training_curve(pd.DataFrame(rows).astype(float))
    beside = folder / name  # suffixes are appended to it
    write_whole(beside.with_suffix(".png"), lambda path: curve.savefig(path, format="png", dpi=100))
    plt.close(curve)
    is_embedded = target.parent.resolve() == WEIGHTS_FOLDER.resolve()
    about = card(facts, None if is_embedded else target.name)
    write_whole(beside.with_suffix(".md"), lambda path: path.write_text(about))
    text = json.dumps(facts, indent=2) + "\n"
    for place in {beside, target}:  # where training that starts from the weights looks for them
        write_log(place.with_suffix(".csv"), rows)
        write_whole(place.with_suffix(".json"), lambda path: path.write_text(text))
    return target


def _titles(sets):
    """Data sets by what the card calls them: a folder by its own name, which no set may have."""
    titles = {}
    for given in map(str, sets):
        folder = given not in NAMED_SETS
        title = Path(given).resolve().name if folder else given
        if folder and title in NAMED_SETS:
            raise ValueError(
                f"sets: {given} is a folder, and the card would call it {title}, as if "
                f"it were that set; rename it, or give {title}"
            )
        if title in titles:
            raise ValueError(
                f"sets: {titles[title]} and {given} are both called {title}; rename one"
            )
        titles[title] = given
    return titles


def _check_replaced(path, state):
    """Refuse to replace published weights by those of a run that does not go on from them."""
    weights = path.with_suffix(".safetensors")
    others = (
        "publish to another folder (--out), or replace it (--replace): rows measured with it then "
        "stand no longer"
    )
    if not path.exists():
        if weights.exists():
            raise ValueError(
                f"{weights} is of a run not known, as no {path.name} is there; {others}"
            )
        return

    def run(facts):  # not all of its data: images may be moved, and more benchmark sets be here
        return facts["recipe"], facts["initial"], facts["data"]["digest"]

    try:
        facts = json.loads(path.read_text())
        other, digest, steps = run(facts), facts["weights"]["sha256"], facts["steps"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not what was published of a network; {others}") from None
    begun_with = state["initial"] and state["initial"]["sha256"] == digest
    same_run = other == run(state)
    if not begun_with and not (same_run and steps <= state["step"]):
        raise ValueError(
            f"{weights} is of another run, of {steps:,} steps, and this one, of "
            f"{state['step']:,}, did not begin with it; {others}"
        )


def card(facts, source=None):
    """The model card of a published network, in Markdown.

    Parameters
    ----------
    facts : dict
        What :func:`publish` writes as JSON.
    source : str, optional
        By what :func:`dfsq.sr.zoo.load_model` takes it: the file of the weights, or, by default,
        the name, by which it takes those that the project holds.
    """
    name, recipe, weights = facts["name"], facts["recipe"], facts["weights"]
    size = f"{facts['parameters'] / 1e6:.2f} million parameters, {weights['bytes'] / 1e6:.1f} MB"
    missing = [benchmark for benchmark in BENCHMARK_SETS if benchmark not in facts["psnr"]]
    where = TOO_LARGE if weights["bytes"] > LARGEST else ""
    measured = [
        (benchmark, f"{row['bicubic']:.3f}", f"{row['float']:.3f}")
        for benchmark, row in facts["psnr"].items()
    ]
    parts = [
        f"# {name}",
        f"{_network(recipe)}: {size} in half precision{where}. SHA-256 of the weights: "
        f"`{weights['sha256']}`.",
        "## Results",
        "PSNR-Y in dB by the standard protocol, in float32 with the weights as rounded.",
        _table(("set", "bicubic", name), measured),
        *([f"Not measured when published: {', '.join(missing)}."] if missing else []),
        "## Training",
        f"{facts['steps']:,} steps, {_hours(facts)}, to {_validated(facts)}. "
        f"{_start(facts['initial'], recipe)}",
        _table(("recipe", "value"), [(f"`{field}`", value) for field, value in recipe.items()]),
        *_earlier(facts["initial"], recipe),
        "## Data",
        " ".join((_data(facts["data"]), *_before(facts["initial"]))),
        "## Use and limits",
        USE.format(source=source or name, scale=recipe["scale"]),
    ]
    return "\n\n".join(parts) + "\n"


def _network(recipe):
    shape = f"{recipe['blocks']} blocks, {recipe['features']} features"
    if "layers" in recipe:
        shape += f", {recipe['layers']} layers in a block, growth {recipe['growth']}"
    return f"{TITLES[recipe['network']]}, {recipe['scale']}-fold, {shape}"


def _hours(facts):
    """Hours by device."""
    # one device, the last, is what earlier versions wrote
    seconds = facts.get("seconds") or {facts["device"]: 3600 * facts["hours"]}
    hours = [f"{round(s / 3600, 2):g} hours on {DEVICES[name]}" for name, s in seconds.items()]
    return " and ".join(hours)


def _validated(facts):
    text = f"{facts['validation_psnr']:.2f} dB on held-out images"
    at = facts.get("validated_at", facts["steps"])
    return text if at == facts["steps"] else f"{text} at step {at:,}"


def _start(initial, recipe):
    if initial is None:
        return "Started without earlier weights."
    text = f"Started from `{initial['name']}` (SHA-256 `{initial['sha256']}`)"
    if recipe["first_step"]:
        return f"{text}, the same network after {recipe['first_step']:,} steps."
    left = ", ".join(f"`{name}`" for name in initial["not_taken"])
    return f"{text}; not found there: {left}."


def _earlier(initial, recipe):
    """By which recipe the steps were made that a network had behind it when a run began."""
    while initial is not None and (steps := recipe["first_step"]):
        earlier = initial.get("recipe")
        if earlier is None:
            yield f"The recipe of the first {steps:,} steps is not known."
            return
        changed = [k for k, v in earlier.items() if v != recipe.get(k) and k != "first_step"]
        others = [f"`{k}` {earlier[k]}" for k in changed]
        made = f"with {', '.join(others)}" if others else "by the same recipe"
        initial, recipe = initial.get("initial"), earlier
        span = f"Steps {recipe['first_step'] + 1:,} to {steps:,}"
        yield f"{span} were made {made}. {_start(initial, recipe)}"


def _data(data):
    lines = [
        f"{data['images']} images of {data['source']}; {data['held_out']} more are held out for "
        f"validation. Licence of the images: {data['licence']}. SHA-256 of the pixels trained "
        f"on, LR and HR: `{data['digest']}`.",
    ]
    if data["too_small"]:
        lines.append(f"{data['too_small']} images smaller than a patch were left out.")
    compared = ", ".join(f"{name} ({count})" for name, count in data["compared"].items() if count)
    lines.append(f"Thumbnails of all were compared with those of the test images: {compared}.")
    if missing := not_compared(data["compared"]):
        lines.append(f"Not compared with {', '.join(missing)}, which were not there.")
    shown = [f"`{name}` (shows {what})" for name, what in data["left_out"].items()]
    lines.append(f"Left out: {', '.join(shown)}." if shown else "No benchmark image was found.")
    return " ".join(lines)


def _before(initial):
    """What the weights that a run began with were trained on, and those before them."""
    began = "it"
    while initial is not None:
        weights, data = (
            f"weights of `{initial['name']}` that {began} began with",
            initial.get("data"),
        )
        yield (
            f"What the {weights} were trained on is not known."
            if data is None
            else f"The {weights} were trained on {data['images']} images of {data['source']}; "
            f"licence of the images: {data['licence']}."
        )
        began, initial = f"`{initial['name']}`", initial.get("initial")


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def page(folder=WEIGHTS_FOLDER, prefix="../data/weights"):
    """The published networks for the book, in MyST Markdown: card, curve and log of each.

    Parameters
    ----------
    folder : path
    prefix : str
        Where the folder is, seen from the page.
    """
    names = [name for name in RECIPES if (Path(folder) / f"{name}.json").is_file()]
    return "\n".join(_section(Path(folder), name, prefix) for name in names)


def _section(folder, name, prefix):
    facts = json.loads((folder / f"{name}.json").read_text())
    validated = min(VALIDATE_ON, facts["data"]["held_out"])
    source = f"{name}.safetensors" if facts["weights"]["bytes"] > LARGEST else None
    text = card(facts, source).replace("## ", "### ").replace(f"# {name}\n", f"## {name}\n", 1)
    return f"""{text}
```{{figure}} {prefix}/{name}.png
:alt: Training loss and validation PSNR of {name} against steps
:name: fig-training-{name}

{name}: loss (left) and PSNR-Y of the averaged weights on {validated} held-out images (right).
```

```{{csv-table}}
:file: {prefix}/{name}.csv
:header-rows: 1
```
"""
