"""Text-to-image pipelines by name: diffusers' StableDiffusion3Pipeline, converted or not.

    shapes             the stand-in that ships with this package
    diffusers:NAME     a pipeline of the Hugging Face hub, or a folder with model_index.json that `save_pretrained` wrote
    FOLDER             such a folder, or what `lineate train`, `calibrate` or `convert` left: the transformer, put into the
                       pipeline that it came from

The stand-in is a pipeline of 2.5M parameters that draws the scenes of `shapes`; `experiments/drawn.py` trained it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineate import checkpoint
from lineate.convert import record
from lineate.text2image.autoencoder import GenerateError
from lineate.text2image.texts import quietly

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
STAND_IN, SHAPES = Path(__file__).parent / "standin", "shapes"
FAMILY = "diffusers-sd3"
PIPELINES = f"{SHAPES}, diffusers:NAME, a folder with model_index.json, a folder that lineate wrote"


def load_pipeline(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline that `source` names, in one of the forms of the module docstring, on the CPU. Raises `GenerateError`."""
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

    from lineate.models import patches  # noqa: F401  diffusers takes a class of ours only from a module that is imported already

    if (saved := checkpoint.saved_in(source)) is not None:
        pipe = load_pipeline(_base(saved), dtype)
        model = checkpoint.load(saved)
        softmax = record(model).conversion.keeps_softmax  # a host like any other then
        with quietly():
            pipe.transformer = (checkpoint.original_of(model) if softmax else model).to(dtype)
        return pipe
    name = str(STAND_IN) if source == SHAPES else source.removeprefix("diffusers:")
    if name == source and not (Path(source) / "model_index.json").is_file():
        raise GenerateError(f"{source or 'the empty name'} is no pipeline; choices: {PIPELINES}")
    try:
        with quietly():
            pipe = DiffusionPipeline.from_pretrained(name).to(dtype)
    except Exception as error:  # whatever diffusers, transformers or the hub's client raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GenerateError(f"no pipeline can be loaded from {source}: {reason}") from error
    if not isinstance(pipe, StableDiffusion3Pipeline):
        raise GenerateError(f"{source} is a {type(pipe).__name__}; only StableDiffusion3Pipeline can be used here")
    return pipe


def is_pipeline(source: str) -> bool:
    """Whether `source` names a text-to-image pipeline, as far as can be told without loading it."""
    if (saved := checkpoint.saved_in(source)) is not None:
        return checkpoint.read_record(saved).family == FAMILY
    return source == SHAPES or source.startswith("diffusers:") or (bool(source) and (Path(source) / "model_index.json").is_file())


def encoders(pipe: Any) -> list[nn.Module]:
    """The autoencoder and the text encoders: all that stays as it is, whatever happens to the transformer."""
    return [getattr(pipe, name) for name in ENCODERS if getattr(pipe, name) is not None]


def put_aside(pipe: Any) -> None:
    """Into host memory with what makes latents and embeddings, once it is not asked again: it is larger than the transformer."""
    for part in encoders(pipe):
        part.cpu()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _base(saved: Path) -> str:
    """The pipeline that a trained transformer came from, as its run says."""
    told = next((file for file in (saved / checkpoint.RUN, saved.parent / checkpoint.RUN) if file.is_file()), None)
    try:
        found = json.loads(told.read_text(encoding="utf-8"))["source"] if told is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str):
        raise GenerateError(f"{saved} holds a transformer alone, and no {checkpoint.RUN} says of which pipeline")
    return found
