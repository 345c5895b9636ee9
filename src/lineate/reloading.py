"""diffusers' pipelines and converted transformers: `save_pretrained` writes them, `DiffusionPipeline.from_pretrained` reads them.

A converted transformer keeps its class, so that whatever lists it (a pipeline's model_index.json, AutoModel) stays true. Its
config.json has

    "quantization_config": {"quant_method": "lineate", "record": {...}}

for that is where diffusers lets a model be rebuilt, still empty, before its weights are read. With lineate imported it is
converted there, strictly: any tensor missing or too many is an error. Without lineate diffusers refuses the method that it does
not know, naming it. Nothing is quantised, and the model does not say that it is.

`import lineate` imports no diffusers: this module is imported as soon as diffusers' list of methods is there.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from lineate.checkpoint import disagreement, shapes
from lineate.convert import ReloadError, reconvert
from lineate.families.diffusers_host import METHOD


class Method(StrEnum):
    """diffusers asks its methods for a `value`."""

    CONVERTED = METHOD


class Converted(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says."""

    def __init__(self, record: dict[str, Any], quant_method: str = METHOD) -> None:
        self.quant_method, self.record = Method(quant_method), record

    def to_diff_dict(self) -> dict[str, Any]:
        """What diffusers shows of it."""
        found: dict[str, Any] = self.to_dict()
        return found


class Converter(DiffusersQuantizer):  # type: ignore[misc]
    """Converts the empty model before its weights are read."""

    is_serializable = is_trainable = is_compileable = True

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember what is stored; diffusers asks this first."""
        self.stored = loaded_keys
        return loaded_keys

    def preprocess_model(self, model: nn.Module, **also: Any) -> None:
        """Convert. Raises `ReloadError` if what is stored is not what the converted model has."""
        from lineate.families.diffusers_dit import TIMES, original_times  # diffusers has its models by now

        said = self.quantization_config.record
        if said["host"] == TIMES:
            original_times(model)
        expected = shapes(reconvert(model, said).state_dict())
        if trouble := disagreement(expected, {name: expected.get(name, ()) for name in self.stored}):
            raise ReloadError(f"what is stored does not fit the conversion in its config.json: {trouble}")

    def _process_model_before_weight_loading(self, model: nn.Module, **also: Any) -> None: ...

    def _process_model_after_weight_loading(self, model: nn.Module, **also: Any) -> None: ...


def register() -> None:
    """Tell diffusers."""
    AUTO_QUANTIZER_MAPPING[METHOD] = Converter
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Converted
