"""Configs of converted transformers models: the host's, with a `model_type` of its own and the conversion in it.

config.json                     what for
"model_type": "lineate_dinov2"  no Auto class knows it without lineate
"attn_implementation"           "lineate": no class of transformers' own takes it without lineate, or runs it unconverted
"lineate"                       the conversion, to be made again before the weights are read, which must fit it
"""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lineate.families.hf_types import HOLDERS, IMPLEMENTATION, TOWERS, own_type

_PREFIX = "Lineate"


class _Converted:
    """In front of a host's config class."""

    def __post_init__(self: Any, **said: Any) -> None:
        super().__post_init__(**said)  # type: ignore[misc]
        asked = said.get("attn_implementation")
        self._attn_implementation = None if asked == IMPLEMENTATION else asked  # for what is not converted; nested ones too

    def to_dict(self: Any) -> dict[str, Any]:
        """As the host's, marked so that no other class takes it for its own."""
        said: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for config in (said, *(said[name] for name in self.sub_configs)):
            config["attn_implementation"] = IMPLEMENTATION
        return said


@cache
def config_class(model_type: str) -> Any:
    """The config class of converted models whose host has this `model_type`."""
    host = CONFIG_MAPPING[model_type]
    return type(f"{_PREFIX}{host.__name__}", (_Converted, host), {"__module__": __name__, "model_type": own_type(model_type)})


def __getattr__(name: str) -> Any:
    """A class made above, by name: unpickling asks for it."""
    host: Any = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if getattr(host, "model_type", None) in TOWERS + HOLDERS:
        return config_class(host.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
