"""Super-resolution: networks, data sets, imaging. Knows nothing of quantization."""

from .datasets import calibration_crops, load_dataset, photograph
from .zoo import load_model, model_names

__all__ = ["calibration_crops", "load_dataset", "load_model", "model_names", "photograph"]
