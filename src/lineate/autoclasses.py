"""transformers' Auto classes and converted models: `save_pretrained` writes them, `AutoModel.from_pretrained` reads them back.

`families/hf_config.py` has what is in their config.json. `import lineate` imports no transformers: names of types are registered
as soon as transformers' own list of them is there, and classes once a type is asked for, so that no code of a model is imported
sooner than it would be anyway.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from lineate.convert import ReloadError, reconvert
from lineate.families.hf_types import HOLDERS, TOWERS, own_type
from lineate.imports import when_imported


class _Converted:
    """In front of a host's model class: converted as its config says, as soon as it is built."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        reconvert(self, config.lineate)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the host's. Raises `ReloadError` if a tensor of the backbone or of a core is missing, too many or misshapen.

        Those of a head are left to transformers' own warnings: a new one is how a backbone is fine-tuned.
        """
        parent: Any = super()
        model, info = parent.from_pretrained(*args, output_loading_info=True, **kwargs)
        prefix = "" if model.base_model is model else model.base_model_prefix
        backbone = {name for name, _ in model.base_model.named_parameters(prefix=prefix)}
        missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        lost = sorted(missing & backbone) + sorted(name for name in info["unexpected_keys"] if ".core." in f".{name}")
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise ReloadError(f"{args[0]} does not fit its config; missing, unknown or misshapen: {', '.join(lost[:3])}{more}")
        return (model, info) if output_loading_info else model


@cache
def model_class(host: Any) -> Any:
    """The converted class of a host's class, by the same name; a config's `architectures` mean the same with and without it."""
    from lineate.families.hf_config import config_class

    said = {"__module__": __name__, "config_class": config_class(host.config_class.model_type)}
    return type(host.__name__, (_Converted, host), said)


@cache
def _register(model_type: str) -> Any:
    """Tell every Auto class that takes the host which class is the converted one; return the config class.

    Old names of tensors are translated as the host's are.
    """
    from transformers import conversion_mapping
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from lineate.families.hf_config import config_class

    host, own = CONFIG_MAPPING[model_type], config_class(model_type)
    autos = [cls for cls in vars(modeling_auto).values() if isinstance(cls, type) and issubclass(cls, _BaseAutoModelClass)]
    for mapping in (cast(Any, auto)._model_mapping for auto in autos):
        if mapping is not None and host in mapping:
            found = mapping[host]
            converted = tuple(map(model_class, found)) if isinstance(found, tuple) else model_class(found)
            mapping.register(own, converted, exist_ok=True)
    renaming = conversion_mapping.get_checkpoint_conversion_mapping(model_type) or []
    conversion_mapping.register_checkpoint_conversion_mapping(own_type(model_type), renaming, overwrite=True)
    return own


class _Type:
    """Stands in transformers' list of types for a config class that is made when something is asked of it."""

    def __init__(self, model_type: str) -> None:
        self._host = model_type

    def __getattr__(self, name: str) -> Any:
        return getattr(_register(self._host), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _register(self._host)(*args, **kwargs)


def _list_types() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in TOWERS + HOLDERS:
        CONFIG_MAPPING.register(own_type(model_type), _Type(model_type), exist_ok=True)


def watch_for_transformers() -> None:
    """Register now, or as soon as transformers' list of types is imported."""
    when_imported("transformers.models.auto.configuration_auto", _list_types)


def __getattr__(name: str) -> Any:
    """A class made above, by name: unpickling asks for it."""
    if not name.startswith("_"):
        import transformers

        host: Any = getattr(transformers, name, None)
        if getattr(getattr(host, "config_class", None), "model_type", None) in TOWERS + HOLDERS:
            return model_class(host)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
