"""A DiT of this project as diffusers' DiTTransformer2DModel and DiTPipeline, computing the same, and as a folder of them.

    model (converted or not) -> diffusers' names for its tensors -> diffusers' model, converted alike -> filled strictly

`DiffusionPipeline.from_pretrained` and `DiTTransformer2DModel.from_pretrained` read the folder back, with lineate imported: the
cores are made there, and the original's frequencies of the time, which diffusers' DiT does not have by itself. An unconverted
model becomes its identity conversion, for the same reason; plain weights for diffusers alone are `to_diffusers`' of
`models/dit_weights.py`, and diffusers computes something else with them.

The pipeline is diffusers' own: its guidance moves all channels, takes 1000 for the null label, and samples by DDIM.
"""

from __future__ import annotations

import copy
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineate.convert import convert, is_new, preset, record
from lineate.evaluate import evaluating
from lineate.export import TOLERANCE, ExportError
from lineate.generation.classes import Sampling, make_scheduler
from lineate.models.dit import DiT
from lineate.models.dit_weights import to_diffusers
from lineate.text2image.autoencoder import load_autoencoder


def transformer(model: nn.Module) -> nn.Module:
    """`model` as a DiTTransformer2DModel that computes the same, in eval mode. Raises `ExportError` where diffusers has none."""
    from diffusers import DiTTransformer2DModel

    from lineate.families.diffusers_dit import original_times

    if not isinstance(model, DiT):
        raise ExportError(f"{type(model).__name__} is no DiT of this project; choices: dit:NAME@CHECKPOINT, or what came of it")
    config, reference = _config(model), next(model.parameters())
    converted = model if hasattr(model, "lineate_record") else convert(copy.deepcopy(model), preset("softmax"))
    done, state = record(converted), converted.state_dict()
    made = original_times(DiTTransformer2DModel(**config)).to(reference)
    conversion = done.conversion.model_copy(
        update={"sites": tuple(f"transformer_{site}1" for site in done.sites), "inherit": "all"}
    )
    redrawn = to_diffusers({name: state[name] for name in done.names("new") if not is_new(name)})
    convert(made, conversion, redrawn=tuple(redrawn)).load_state_dict(to_diffusers(state))
    return made.eval()


def pipeline(model: nn.Module, vae: nn.Module) -> Any:
    """The DiTPipeline of `model` and diffusers' AutoencoderKL. Raises `ExportError`."""
    from diffusers import DiTPipeline

    scheduler = make_scheduler(Sampling(scheduler="ddim", steps=50), learned=True)
    return DiTPipeline(transformer=transformer(model), vae=vae, scheduler=scheduler)


@torch.no_grad()
def export_pipeline(model: nn.Module, folder: Path, vae: Path | None = None) -> float:
    """Write `model` as a DiTPipeline with the autoencoder in `vae`, or alone; the relative error of what is read back from there.

    Raises `ExportError` if `folder` is there, or if what is read back disagrees; then nothing was written.
    """
    from diffusers import DiTTransformer2DModel

    if folder.exists():
        raise ExportError(f"{folder} exists; give a folder that does not")
    written: Any = transformer(model) if vae is None else pipeline(model, load_autoencoder(vae))
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        written.save_pretrained(temporary)
        again = DiTTransformer2DModel.from_pretrained(temporary, subfolder=None if vae is None else "transformer")
        error = _disagreement(model, again)
        if not error <= TOLERANCE:
            raise ExportError(
                f"diffusers' model disagrees by {error:.1e} (relative), more than {TOLERANCE:.0e}; nothing was written"
            )
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return error


def _config(model: DiT) -> dict[str, Any]:
    """The arguments of diffusers' class. Raises `ExportError` for what it cannot have."""
    of = model.arguments
    height, width = of["input_size"]
    cannot = {
        f"a grid of {height}x{width}, which is no square": height != width,
        f"been trained at {of['sample_size']}, another size than its own": of["sample_size"] not in (None, of["input_size"]),
        "learned a velocity, which DiTPipeline does not sample": of["objective"] == "flow",
        f"mlp_ratio={of['mlp_ratio']:g}, where diffusers has 4": of["mlp_ratio"] != 4,
        "no null label": of["class_dropout_prob"] == 0,
    }
    if found := next((what for what, so in cannot.items() if so), None):
        raise ExportError(f"this DiT cannot be diffusers': it has {found}")
    channels = of["in_channels"]
    return {
        "num_attention_heads": of["num_heads"], "attention_head_dim": of["hidden_size"] // of["num_heads"],
        "in_channels": channels, "out_channels": model.out_channels, "num_layers": of["depth"], "sample_size": height,
        "patch_size": of["patch_size"], "num_embeds_ada_norm": of["num_classes"], "norm_eps": 1e-6,
    }  # fmt: skip


def _disagreement(model: Any, theirs: Any) -> float:
    """‖diffusers' - ours‖ / ‖ours‖ of one output."""
    place, draw = next(iter(model.parameters())), torch.Generator().manual_seed(0)
    x = torch.randn(2, model.arguments["in_channels"], *model.arguments["input_size"], generator=draw).to(place)
    t, y = torch.tensor([3, 977], device=place.device), torch.tensor([0, model.arguments["num_classes"]], device=place.device)
    with evaluating(model):
        expected = model(x, t, y)
    found = theirs.to(place)(x, timestep=t, class_labels=y).sample
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))  # a DiT that was not trained yet gives zeros
