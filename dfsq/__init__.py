"""DFSQ: distribution-flexible subset quantization, reproduced, tested and carried further."""

from . import cost, integer, sr
from .calibration import calibrate
from .config import PRESETS, Config
from .convert import quantize, summary
from .export import export_onnx
from .histogram import Histogram
from .selection import Selection, select, select_channels
from .storage import load, save
from .universal import shifts_and_adds, universal_set

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Config",
    "Histogram",
    "Selection",
    "calibrate",
    "cost",
    "export_onnx",
    "integer",
    "load",
    "quantize",
    "save",
    "select",
    "select_channels",
    "shifts_and_adds",
    "sr",
    "summary",
    "universal_set",
]
