"""Pictures from texts: a Stable Diffusion 3 pipeline asked for GenEval's prompts or any others, one file and one seed a picture.

Every draw for picture i of the prompt at index p follows from (seed, p, i), and is made on the CPU: neither batch, device, number
of processes nor interruption changes what is drawn. Files appear whole, and those that are there are kept.

Legend: B batch, h×w px.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lineate.calls import Call, listening
from lineate.evaluate import Progress
from lineate.generation.classes import KEPT_STEPS, claim, write_picture
from lineate.mixers.base import Frozen
from lineate.text2image.autoencoder import GenerateError, fingerprint, to_bytes
from lineate.text2image.prompts import Prompt, read_prompts, sample_file, write_layout
from lineate.text2image.texts import encode_texts, quietly
from lineate.train.randomness import IMAGE, TRAJECTORY, derive


class PromptSampling(Frozen):
    """How pictures are drawn from texts; steps and guidance are the paper's. `size`: height and width in px, None the model's."""

    steps: int = Field(28, ge=1)
    guidance: float = Field(3.5, ge=0)
    size: tuple[int, int] | None = None
    seed: int = Field(0, ge=0, lt=2**63)


def plain_prompts(texts: Sequence[str]) -> list[Prompt]:
    """Texts of which nothing is said but that they be drawn."""
    return [Prompt(tag="", include=(), prompt=text) for text in texts]


def prompts_in(file: Path) -> list[Prompt]:
    """The prompts of a file: GenEval's metadata, or a text a line. Raises `PromptError`."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        lines = []
    return plain_prompts(lines) if lines and not lines[0].startswith("{") else read_prompts(file)


def check_size(pipe: Any, size: tuple[int, int] | None) -> None:
    """Raise `GenerateError` for pictures whose tokens are no whole ones, or lie beyond the transformer's table of positions."""
    stride = pipe.vae_scale_factor * pipe.patch_size
    most = pipe.transformer.config.pos_embed_max_size * stride
    if size is not None and any(side % stride or not stride <= side <= most for side in size):
        raise GenerateError(f"no pictures of {size[0]}x{size[1]} px; choices: sides that are multiples of {stride}, up to {most}")


def draw(pipe: Any, texts: Sequence[str], seeds: Sequence[int], sampling: PromptSampling) -> Tensor:
    """(B, 3, h, w) in [-1, 1]: one picture of each text, from its seed."""
    return 2 * _ask(pipe, texts, seeds, sampling, "pt") - 1


def _ask(pipe: Any, texts: Sequence[str], seeds: Sequence[int], sampling: PromptSampling, kind: str) -> Tensor:
    """What the pipeline makes: pictures ("pt"), or latents, which pass the autoencoder by ("latent")."""
    distinct = ["", *dict.fromkeys(texts)]
    text, pooled = encode_texts(pipe, distinct)
    said = [distinct.index(text) for text in texts]
    height, width = sampling.size or (None, None)
    with quietly():
        pipe.set_progress_bar_config(disable=True)
        found: Tensor = pipe(
            prompt_embeds=text[said], pooled_prompt_embeds=pooled[said],
            negative_prompt_embeds=text[[0] * len(said)], negative_pooled_prompt_embeds=pooled[[0] * len(said)],
            num_inference_steps=sampling.steps, guidance_scale=sampling.guidance, height=height, width=width,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type=kind,
        ).images  # fmt: skip
    return found


def trajectory(
    pipe: Any, texts: Sequence[str], sampling: PromptSampling, count: int, *, batch: int = 16, progress: Progress | None = None
) -> list[Call]:
    """`count` calls of the transformer, one example each and in host memory, as drawing the texts makes them: to calibrate on.

    Texts come in turn. Of every picture `KEPT_STEPS` steps are kept, drawn evenly from all, with both halves of guidance. All
    follows from the sampling's seed.
    """
    check_size(pipe, sampling.size)
    dice = torch.Generator().manual_seed(derive(TRAJECTORY, sampling.seed))
    kept: list[Call] = []
    first = 0
    while len(kept) < count:
        some = [texts[index % len(texts)] for index in range(first, first + batch)]
        seeds = torch.randint(2**62, (batch,), generator=dice).tolist()
        heard: list[Call] = []
        with listening([pipe.transformer], heard.append):
            _ask(pipe, some, seeds, sampling, "latent")
        for step in torch.randperm(len(heard), generator=dice)[:KEPT_STEPS].tolist():
            kept += (call.to("cpu") for call in heard[step].each())
        first += batch
        if progress is not None:
            progress(min(len(kept), count), count, "drawing")
    return [kept[index] for index in torch.randperm(len(kept), generator=dice)[:count].tolist()]


def generate_prompts(
    pipe: Any,
    prompts: Sequence[Prompt],
    out: Path,
    sampling: PromptSampling,
    *,
    images: int = 4,
    batch: int = 4,
    accelerator: Any = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `images` pictures of each prompt into `out`, laid out as GenEval's; those that are there from before are kept.

    `accelerator` is an `accelerate.Accelerator` or `PartialState` where several processes share the work. All files are there
    when this returns. Raises `GenerateError` if `out` holds pictures made otherwise, and for a size that cannot be had.
    """
    check_size(pipe, sampling.size)
    claim(out, {
        "sampling": sampling.model_dump(mode="json"), "prompts": [prompt.prompt for prompt in prompts],
        "model": fingerprint(pipe.transformer), "autoencoder": fingerprint(pipe.vae),
    })  # fmt: skip
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    write_layout(prompts, out)
    every = [(index, number) for index in range(len(prompts)) for number in range(images)]
    mine = [place for place in every[rank::world] if not sample_file(out, *place).is_file()]
    for first in range(0, len(mine), batch):
        places = mine[first : first + batch]
        seeds = [derive(IMAGE, sampling.seed, *place) for place in places]
        pictures = to_bytes(draw(pipe, [prompts[index].prompt for index, _ in places], seeds, sampling)).cpu()
        for place, picture in zip(places, pictures, strict=True):
            write_picture(sample_file(out, *place), picture)
        if progress is not None:
            progress(min(first + batch, len(mine)), len(mine), "generating")
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return [sample_file(out, *place) for place in every]
