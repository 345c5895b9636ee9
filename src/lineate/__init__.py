"""lineate: turn a pretrained softmax-attention vision transformer into a linear-time one.

`convert` replaces the attention cores in place, `calibrate` fits what is new to the model's own attention, `save` and `load`
keep it, `record` tells what was done. Importing this pulls in torch and no other heavy library: a host library is imported
when a model of it is converted.
"""

from importlib import import_module

from lineate.autoclasses import watch_for_transformers
from lineate.calibrate import CalibrationConfig, CalibrationResult, calibrate
from lineate.checkpoint import load, save
from lineate.convert import PRESETS, Conversion, ConversionRecord, convert, preset, record
from lineate.imports import when_imported
from lineate.layout import TokenLayout
from lineate.released import from_released
from lineate.version import __version__

watch_for_transformers()
when_imported("diffusers.quantizers.auto", lambda: import_module("lineate.reloading").register())

__all__ = [
    "PRESETS",
    "CalibrationConfig",
    "CalibrationResult",
    "Conversion",
    "ConversionRecord",
    "TokenLayout",
    "__version__",
    "calibrate",
    "convert",
    "from_released",
    "load",
    "preset",
    "record",
    "save",
]
