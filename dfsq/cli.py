"""The command line: upscale, compare, quantize, export, fetch, bench, train, publish, run."""

import argparse
import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

BITS_HELP = (
    "bit-width of weights and activations, 2 to 8, or for upscale and export 32, the float network "
    "(default: 4)"
)
QUANTIZES_NOTHING = "--bits 32 and the method float quantize nothing; give 2 to 8 bits"
LAYERS = {
    "default": "body",
    "choices": ("body", "all"),
    "help": "the network's body, as in the paper, or head, tail and upsampler at 8 bits as well, "
    "the image itself evenly (default: body)",
}


def main(arguments=None):
    """Run a command; 0 on success, 2 with a one-line error otherwise."""
    options = _parser().parse_args(arguments)
    from .sr.upscaling import NetworkError
    from .study.notebooks import NotebookError

    try:
        with _sigterm_raises():
            options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or exit would fail again
        return 1
    except (ValueError, OSError, FloatingPointError, NetworkError, NotebookError) as error:
        print(f"dfsq: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dfsq: stopped", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _sigterm_raises():
    """Within this, SIGTERM is an exception, as Ctrl-C is, so that temporary files are removed."""

    def leave(number, _):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser():
    parser = argparse.ArgumentParser(
        prog="dfsq",
        description="Distribution-flexible subset quantization of super-resolution networks.",
    )
    from . import __version__

    parser.add_argument("--version", action="version", version=f"dfsq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name, run, text, example):
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}",
        )
        added.set_defaults(run=run)
        return added

    upscale = command(
        "upscale",
        _upscale,
        "upscale photographs with a float or quantized network",
        "dfsq upscale photo.png --model edsr-x2 --bits 4 --out upscaled",
    )
    upscale.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    _network_options(upscale)
    _quantized_option(upscale)
    upscale.add_argument(
        "--out", default=".", metavar="FOLDER", help="folder for the results (default: this one)"
    )

    compare = command(
        "compare",
        _compare,
        "put a network and its quantized version side by side on photographs",
        "dfsq compare photos --model edsr-x2 --bits 4 --out compared",
    )
    compare.add_argument(
        "images", metavar="FOLDER",
        help="HR photographs: a folder of them, photographs (embedded), or a benchmark set's name",
    )  # fmt: skip
    _network_options(compare)
    _quantized_option(compare)
    compare.add_argument("--limit", type=int, help="take the first so many photographs")
    compare.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for the strips and comparison.csv"
    )

    quantize = command(
        "quantize",
        _quantize,
        "quantize a network and write it to a file",
        "dfsq quantize --model edsr-x2 --bits 4 --out edsr4.safetensors",
    )
    _network_options(quantize)
    quantize.add_argument(
        "--out", required=True, metavar="FILE", help="file to write, .safetensors"
    )

    export = command(
        "export",
        _export,
        "write a float or quantized network to an ONNX file",
        "dfsq export --model edsr-x2 --bits 4 --out edsr4.onnx",
    )
    _network_options(export)
    _quantized_option(export)
    export.add_argument("--out", required=True, metavar="FILE", help="file to write, .onnx")

    fetch = command(
        "fetch",
        _fetch,
        "list, download and verify data sets and published weights",
        "dfsq fetch Set5 weights/IMDN_x2.pth",
    )
    fetch.add_argument(
        "names", nargs="*", metavar="NAME", help="what to fetch and verify (default: list all)"
    )

    bench = command(
        "bench",
        _bench,
        "measure networks, data sets, methods and bit-widths; resumes where it was stopped",
        "dfsq bench --methods dfsq dfsq-points --bits 4 3 --out results",
    )
    bench.add_argument(
        "--models", nargs="+", default=["edsr-x2"], metavar="MODEL",
        help="names, files of weights, or FILE.py:FUNCTION that returns a network",
    )  # fmt: skip
    bench.add_argument(
        "--datasets", nargs="+", default=["photographs"], metavar="DATASET",
        help="photographs (embedded), Set5, Set14, B100, Urban100, or folders of HR images",
    )  # fmt: skip
    bench.add_argument(
        "--methods", nargs="+", metavar="METHOD",
        help="presets, also with -w (weights only) and -a (activations only) appended or with "
        "fields that differ (dfsq-exact:damping=0.1,sequential=true), float, bicubic, or "
        "FILE.py:FUNCTION (default: bicubic, float and all presets)",
    )  # fmt: skip
    bench.add_argument(
        "--bits", nargs="+", type=int, default=[8, 6, 4, 3, 2], metavar="BITS",
        help="2 to 8 (default: 8 6 4 3 2)",
    )  # fmt: skip
    bench.add_argument("--layers", **LAYERS)
    bench.add_argument(
        "--calibration", metavar="SOURCE",
        help="photographs, BSDS500/train, BSDS500/test, or a folder (default: photographs, and "
        "BSDS500/train for the benchmark sets)",
    )  # fmt: skip
    bench.add_argument(
        "--draws", nargs="+", type=int, default=[0], metavar="SEED", help="of the calibration crops"
    )
    bench.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="SEED",
        help="of K-means; other methods have none",
    )
    bench.add_argument(
        "--standard", action="store_true",
        help="whatever the project's tables on the benchmark sets lack; only --device, --double "
        "and --out are heeded beside",
    )  # fmt: skip
    bench.add_argument("--limit", type=int, help="take the first so many images of each data set")
    bench.add_argument("--device", help="cpu or cuda (default: a GPU, if there is one)")
    bench.add_argument(
        "--double", action="store_true",
        help="in double precision, in which rows came out the same on every CPU tried, in two to "
        "five times the time; also rows that stand in single precision, which go to repeats.csv",
    )  # fmt: skip
    bench.add_argument("--out", metavar="FOLDER", help="results (default: the project's own)")

    train = command(
        "train",
        _train,
        "train a network; a run that was stopped goes on where it was",
        "dfsq train edsr-x2 --steps 50",
    )
    train.add_argument("name", nargs="?", metavar="NAME", help="a recipe, see --list")
    train.add_argument(
        "--list", action="store_true", help="list the recipes and their sizes and do nothing else"
    )
    train.add_argument(
        "--data", default="BSDS500", metavar="SOURCE",
        help="BSDS500, photographs (embedded), or a folder of photographs, searched with all below "
        "it; benchmark images are left out, as far as their sets are here (default: BSDS500)",
    )  # fmt: skip
    train.add_argument("--out", metavar="FOLDER", help="checkpoint and log (default: runs/NAME)")
    train.add_argument(
        "--steps", type=int, default=20000, help="in all, earlier runs included (default: 20000)"
    )
    train.add_argument(
        "--save-every", type=int, default=1000, metavar="STEPS",
        help="between checkpoints, each with a validation (default: 1000)",
    )  # fmt: skip
    train.add_argument(
        "--initial", metavar="FILE",
        help="weights to start from, .safetensors, or none (default: at x4 those of the same "
        "network at x2, for edsr-long-x2 edsr-x2, where these are; else none)",
    )  # fmt: skip
    train.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), dest="changes",
        help="change a field of the recipe, such as batch; may be given several times",
    )  # fmt: skip
    train.add_argument("--float32", action="store_true", help="no bfloat16 in the forward pass")
    train.add_argument("--device", help="cpu or cuda (default: a GPU, if there is one)")

    publish = command(
        "publish",
        _publish,
        "publish what was trained: weights in half precision, facts, log, curve and model card",
        "dfsq publish edsr-x2 --out mine",
    )
    publish.add_argument("name", metavar="NAME", help="a recipe, see dfsq train --list")
    publish.add_argument(
        "--run", metavar="FOLDER", dest="folder", help="of dfsq train (default: runs/NAME)"
    )
    publish.add_argument("--out", metavar="FOLDER", help="(default: the project's own weights)")
    publish.add_argument(
        "--sets", nargs="+", metavar="DATASET",
        help="to measure on, as for bench; the card names the benchmark sets not among them "
        "(default: Set5 Set14 B100 Urban100)",
    )  # fmt: skip
    publish.add_argument(
        "--replace", action="store_true",
        help="also weights of another run: rows measured with them then stand no longer",
    )  # fmt: skip
    publish.add_argument("--device", help="cpu or cuda (default: a GPU, if there is one)")

    run = command(
        "run",
        _run,
        "run a notebook with parameters of yours",
        "dfsq run notebooks/03_selection.ipynb -p bits 3 --out out.ipynb",
    )
    run.add_argument("notebook", metavar="NOTEBOOK", help="a notebook with a parameters cell")
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="parameters",
        help="a parameter; may be given several times",
    )
    run.add_argument(
        "--out", metavar="FILE", help="executed notebook (default: NOTEBOOK's name, -run appended)"
    )
    run.add_argument(
        "--list", action="store_true", help="list the notebook's parameters and do nothing else"
    )
    return parser


def _network_options(parser):
    from .config import PRESETS

    parser.add_argument(
        "--model",
        default="edsr-x2",
        metavar="MODEL",
        help="a network's name, a file of weights, or FILE.py:FUNCTION that returns a network for "
        "RGB in 0..1 with an attribute scale, and body_layers, patterns, where not all of its "
        "convolutions are its body (default: edsr-x2)",
    )
    parser.add_argument(
        "--value-range",
        type=float,
        metavar="RANGE",
        help="for a file of weights: range of the RGB values that they expect, 255 or 1",
    )
    parser.add_argument("--bits", type=int, default=4, help=BITS_HELP)
    parser.add_argument("--layers", **LAYERS)
    parser.add_argument(
        "--method",
        default="dfsq-exact",
        metavar="PRESET",
        help=f"{', '.join(PRESETS)}, also with -w (weights only) or -a (activations only) appended "
        "(default: dfsq-exact)",
    )
    parser.add_argument(
        "--calibration",
        default="photographs",
        metavar="SOURCE",
        help="HR images to calibrate on: photographs (embedded), BSDS500/train, BSDS500/test, or a "
        "folder (default: photographs)",
    )
    parser.add_argument(
        "--crops", type=int, default=32, help="number of calibration crops (default: 32)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the calibration draw and of K-means (default: 0)"
    )


def _quantized_option(parser):
    parser.add_argument(
        "--quantized",
        metavar="FILE",
        help="a file of `dfsq quantize` for the same --model; other options of quantizing are not "
        "heeded then",
    )


def _config(options):
    from .config import BITS, Config

    if options.bits not in BITS:
        raise ValueError(
            f"--bits must be of 2 to 8, or 32 for the float network, not {options.bits}"
        )
    if options.crops < 1:
        raise ValueError(f"--crops must be at least 1, not {options.crops}")
    if options.bits == 32:
        return Config.preset("float")
    return Config.preset(options.method, options.bits, seed=options.seed)


def _out_folder(folder):
    """The folder of --out, refused before any work if it cannot be written to."""
    from .files import writable_folder

    return writable_folder(folder, "give another --out")


def _out_file(path, suffix):
    """The file of --out, refused before any work if it is none of the kind or cannot be written."""
    target = Path(path)
    if target.suffix != suffix:
        article = "an" if suffix == ".onnx" else "a"
        raise ValueError(f"--out must be {article} {suffix} file, not {path!r}")
    if target.is_dir():
        raise ValueError(f"--out must be a file, and {target} is a folder; name a file in it")
    _out_folder(target.parent)
    return target


def _size(path):
    """The size of a file, to be read."""
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _float_network(options):
    from . import sr

    return sr.load_model(options.model, value_range=options.value_range)


def _quantized(options, config, model):
    """A float network quantized, unless the configuration is float."""
    from . import quantize, sr
    from .config import with_all_layers

    if _is_float(config):
        return model
    if options.layers == "all":
        config = with_all_layers(config, model)
    crops = sr.calibration_crops(options.calibration, model.scale, options.crops, seed=options.seed)
    return quantize(model, crops, config)


def _is_float(config):
    return config.weight_bits == config.act_bits == 32


def _upscale(options):
    from tqdm import tqdm

    from . import load
    from .files import write_whole
    from .sr.datasets import open_image
    from .sr.upscaling import running_on, upscale, upscale_photograph
    from .study.large import LARGE, has_parts, upscale_large

    config = _config(options)
    paths = [Path(path) for path in options.images]
    is_float = _is_float(config) and not options.quantized
    for path in paths:  # all are read before any work, but not kept: hundreds may not fit
        width, height = open_image(path).size
        if min(width, height) < 8 and not is_float:
            raise ValueError(
                f"{path} has {width}x{height} pixels; "
                "8x8 at least are needed to normalize by an image's statistics"
            )
    names = [path.stem for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two images are called {twice}; upscale them into two folders (--out)")
    folder = _out_folder(options.out)
    model = _float_network(options)
    if options.quantized:
        model = load(options.quantized, model)
        config = model.quantization.config
    else:
        model = _quantized(options, config, model)
    width = f"w{config.weight_bits}a{config.act_bits}"
    for path in tqdm(paths, "upscaling", unit="image"):
        image = open_image(path)
        is_large = image.width * image.height > LARGE and has_parts(model)
        how = partial(upscale_large, progress=True) if is_large else upscale
        with running_on(path, *image.size):
            result = upscale_photograph(model, image, how)
        target = folder / f"{path.stem}_x{model.scale}_{width}.png"
        write_whole(target, partial(result.save, format="PNG"))
        tqdm.write(f"{target}  {result.width}x{result.height}")


def _compare(options):
    from . import load, sr
    from .study.comparison import compare, with_mean

    config = _config(options)
    if _is_float(config) and not options.quantized:
        raise ValueError(QUANTIZES_NOTHING)
    float_model = _float_network(options)
    pairs = sr.load_dataset(options.images, float_model.scale, options.limit)
    model = load(options.quantized, float_model) if options.quantized else None
    source = sr.datasets.image_folder(options.images)
    if source and Path(options.out).is_dir() and source.samefile(options.out):
        raise ValueError(
            f"--out is where the images are, {options.out}: a strip would take the place of the "
            "photograph of its name; give another --out"
        )
    folder = _out_folder(options.out)
    if model is None:
        model = _quantized(options, config, float_model)
    config = model.quantization.config
    label = f"quantized W{config.weight_bits}A{config.act_bits}"
    table = compare(float_model, model, pairs, folder, label=label)
    print(with_mean(table).to_string(float_format="%.3f"))
    print(f"{folder}  comparison.csv, and a strip of each photograph")


def _quantize(options):
    from . import save

    config = _config(options)
    if _is_float(config):
        raise ValueError(QUANTIZES_NOTHING)
    target = _out_file(options.out, ".safetensors")
    if target.exists() and Path(options.model).exists() and target.samefile(options.model):
        raise ValueError(f"--out is the float network itself, {target}; give another --out")
    model = _quantized(options, config, _float_network(options))
    save(model, target)
    print(f"{target}  {_size(target)}")


def _export(options):
    from . import export, load

    config = _config(options)
    target = _out_file(options.out, ".onnx")
    try:
        export.check_installed()
    except ModuleNotFoundError as error:
        raise ValueError(error) from None
    model = _float_network(options)
    model = (
        load(options.quantized, model) if options.quantized else _quantized(options, config, model)
    )
    export.export_onnx(model, target)
    print(f"{target}  {_size(target)}")


def _fetch(options):
    from tqdm import tqdm

    from .sr import fetch

    if not options.names:
        for group in fetch.groups():
            files = fetch.files_of(group)
            here = sum(fetch.local(file) is not None for file in files)
            size = fetch.registry().loc[files, "bytes"].sum() / 1e6
            print(f"{group:40} {here:4} of {len(files):4} here  {size:7.1f} MB")
        print("\nlooked for in $DFSQ_DATA, then in", fetch.cache())
        return
    files = [file for name in options.names for file in fetch.files_of(name)]
    for file in tqdm(files, "fetching", unit="file"):
        fetch.fetch(file, progress=False)
    print(f"{len(files)} files are here and as registered")


def _bench(options):
    from .config import PRESETS
    from .study.benchmark import RESULTS_FOLDER, Bench, Store, grid, standard_grid

    if not set(options.bits) <= set(range(2, 9)):
        raise ValueError(
            f"--bits must be of 2 to 8, not {' '.join(map(str, options.bits))}; the network in "
            "float is a method, float"
        )
    folder = _out_folder(options.out or RESULTS_FOLDER)
    methods = options.methods or ["bicubic", *PRESETS]
    cells = standard_grid() if options.standard else []
    for draw in () if options.standard else options.draws:
        cells += grid(
            options.models,
            options.datasets,
            methods,
            options.bits,
            options.seeds,
            options.limit,
            layers=options.layers,
            calibration=options.calibration,
            draw=draw,
        )
    # the project's own rows stand for its own tables, wherever what they lack is written
    store = Store(folder, standing=RESULTS_FOLDER if options.standard else None)
    rows = Bench(store, device=options.device, double=options.double).run(cells)
    shown = rows[
        ["model", "dataset", "images", "layers", "method", "bits", "seed", "draw", "psnr", "ssim"]
    ]
    print(shown.to_string(index=False, float_format="%.3f"))


def _train(options):
    from .study import recipes
    from .study.training import read_checkpoint, train

    if options.list:
        print(recipes.table())
        return
    if options.name is None:
        raise ValueError(f"NAME is missing; there are {', '.join(recipes.RECIPES)}")
    precision = "float32" if options.float32 else "bfloat16"
    recipe = recipes.recipe(options.name, options.changes, precision)
    out = _out_folder(options.out or recipes.RUNS_FOLDER / options.name)
    initial = options.initial
    if initial is None and not (out / "checkpoint.pt").exists():
        initial = recipes.default_initial(options.name)
        began_as = recipes.began_as(options.name)
        if initial is None and began_as:
            print(
                f"no weights of {began_as} to start from in {recipes.WEIGHTS_FOLDER} or "
                f"{recipes.RUNS_FOLDER / began_as}: starting without; --initial FILE takes others"
            )
    if initial == "none" and (state := read_checkpoint(out)) and state["initial"]:
        raise ValueError(
            f"{out / 'checkpoint.pt'} began with weights of {state['initial']['name']}, not with "
            "none; leave --initial away, or give another folder (--out)"
        )
    train(
        options.data,
        out,
        recipe,
        options.steps,
        initial=None if initial == "none" else initial,
        save_every=options.save_every,
        device=options.device,
    )


def _publish(options):
    from .sr.datasets import BENCHMARK_SETS
    from .study import publishing, recipes

    folder = _out_folder(options.out or publishing.WEIGHTS_FOLDER)
    run = options.folder or recipes.RUNS_FOLDER / options.name
    sets = options.sets or BENCHMARK_SETS
    weights = publishing.publish(
        options.name, run, folder, sets=sets, replace=options.replace, device=options.device
    )
    print(f"{weights}  {_size(weights)}; the rest in {folder}")
    psnr = json.loads((folder / f"{options.name}.json").read_text())["psnr"]
    behind = [title for title, found in psnr.items() if found["float"] <= found["bicubic"]]
    if behind:
        print(
            f"no better than bicubic on {', '.join(behind)}: trained too little; commands refuse "
            "such weights where their file is named"
        )
    if weights.parent != folder:
        print(
            "too large for a repository: these weights belong beside a release; commands take "
            f"them by their file: dfsq bench --models {weights}"
        )


def _run(options):
    from .study import notebooks

    path = Path(options.notebook)
    if options.list:
        for parameter in notebooks.parameters(path):
            print(f"{parameter.name}: {parameter.type} = {parameter.default}  # {parameter.help}")
        return
    output = Path(options.out) if options.out else Path(f"{path.stem}-run.ipynb")
    seconds = notebooks.execute(path, output, dict(options.parameters))
    print(f"{output}  {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
