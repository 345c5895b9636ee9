"""The small scale of text to image: `lineate.text2image.shapes` (world "grid") and a Stable Diffusion 3 of 2.5M parameters.

    python experiments/drawn.py --work runs/stand-in   trains the stand-in once, into lineate/text2image/standin (resumable)

SD3.5-Medium in the small: 4 MMDiT blocks of 128 channels, 4 heads of 32, the first two dual, q-k norms; latents 4×4 of 32×32 px,
one token each. Its autoencoder is linear and loses nothing here (`lineate.models.patches`); its two CLIP text encoders are drawn
at random and stay so, as SD3's are frozen: 10 tokens of a vocabulary made from the captions. Its T5 gives one token of zeros.
Raw pixels would need a width above the patch's 192 numbers, since a velocity holds all of its noise. Few bright objects on black
show through much noise, so what the text says is decided close to pure noise: the times need SD3's shift of 3 here too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from lineate import runs
from lineate.models.patches import PatchAutoencoder
from lineate.text2image.pipelines import STAND_IN
from lineate.text2image.shapes import TAGS, TrainingScenes, find_world, prompts_of
from lineate.text2image.texts import encode_texts
from lineate.train.config import TrainConfig
from lineate.train.data import Order, Ordered
from lineate.train.loop import FitResult, fit
from lineate.train.rectified import Pairs, rectified_flow

WORLD = find_world("grid")
SCENES = 12_000
TOKENS = 10  # "a red cross and a blue circle" has 7 words, and there is a mark at either end
TRAINING = TrainConfig(
    epochs=10.7, batch=64, lr=1e-3, min_lr=1e-5, warmup_epochs=0.5, weight_decay=0.01, betas=(0.9, 0.99), clip_grad=1.0,
    ema=0.999, checkpoint_steps=250, eval_epochs=0, tracker="none", workers=0,
)  # fmt: skip


class Scenes(Ordered):
    """The training scenes as latents and text embeddings, in memory."""

    def __init__(self, pipe: Any, config: TrainConfig) -> None:
        super().__init__(SCENES, config)
        pictures, captions = zip(*TrainingScenes(WORLD, SCENES), strict=True)
        with torch.inference_mode():
            self.latents = pipe.vae.encode(2 * torch.stack(pictures) - 1).latent_dist.mean.clone()
        unique = sorted(set(captions))
        self.text, self.pooled = encode_texts(pipe, unique)
        self.said = torch.tensor([unique.index(caption) for caption in captions])

    def identity(self) -> dict[str, Any]:
        """World and number of scenes."""
        return {"world": "grid", "scenes": SCENES}

    def stream(self, start: int, stop: int, process: int, processes: int) -> Iterator[Pairs]:
        """The batches of one process."""
        for keys in Order(self, start, stop, process, processes):
            chosen = torch.tensor([key.picture for key in keys])
            said = self.said[chosen]
            yield Pairs(self.latents[chosen], self.text[said], self.pooled[said])


def tune(pipe: Any, config: TrainConfig, out: Path, **options: Any) -> FitResult:
    """Train the transformer of `pipe`, in place, on the training scenes."""
    text, pooled = encode_texts(pipe, [""])
    objective = rectified_flow((text[0], pooled[0]), shift=pipe.scheduler.config.shift)
    return fit(pipe.transformer, Scenes(pipe, config), objective, config, out, **options)


def build() -> StableDiffusion3Pipeline:
    """The pipeline, its transformer freshly drawn."""
    torch.manual_seed(0)
    tokenizer, silent = make_tokenizer(), T5TokenizerFast(extra_ids=0, model_max_length=1)
    pictures = torch.stack([picture for picture, _ in TrainingScenes(WORLD, 2000)])
    return StableDiffusion3Pipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=PatchAutoencoder.fitted(2 * pictures - 1, patch=8, channels=12),
        text_encoder=make_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(len(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=make_silent_t5(len(silent)),
        tokenizer_3=silent,
    )


def make_transformer() -> nn.Module:
    """SD3's transformer; its modulations and its last layer begin at zero, as DiT's do."""
    made = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=12, out_channels=12, num_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128, pos_embed_max_size=8,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    for name, parameter in made.named_parameters():
        if name.startswith("proj_out") or ".linear." in name:
            nn.init.zeros_(parameter)
    return made


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's, with a vocabulary in which every word of the captions is one token; other words are spelt."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    captions = [prompt.prompt for tag in TAGS for prompt in prompts_of(WORLD, tag)]
    backend = CLIPTokenizer().backend_tokenizer
    backend.train_from_iterator(
        captions,
        BpeTrainer(
            vocab_size=1000, show_progress=False, initial_alphabet=ByteLevel.alphabet(), end_of_word_suffix="</w>",
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
        ),
    )  # fmt: skip
    learned = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS)


@torch.no_grad()
def make_text_encoder(vocabulary: int) -> CLIPTextModelWithProjection:
    """One drawn at random so that a token's place and what stands before it show in its embedding, but less than the token."""
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    made = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=0.5 if "position" in name else 1.0)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
    return made


@torch.no_grad()
def make_silent_t5(vocabulary: int) -> T5EncoderModel:
    """Gives zeros, as the pipeline does where T5 is left out; but a pipeline without it is not loaded without being told so."""
    config = T5Config(vocab_size=vocabulary, d_model=128, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    made = T5EncoderModel(config).eval().requires_grad_(False)
    made.encoder.final_layer_norm.weight.zero_()
    return made


def main() -> None:
    """Train the stand-in and save it, with what it took beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/stand-in"), help="checkpoints: a broken training goes on there")
    parser.add_argument("--steps", type=int, help="stop after so many, and save nothing: to look whether it goes well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = runs.environment(torch.device("cpu"))
    pipe = build()
    config = TRAINING.model_copy(update={"max_steps": options.steps})
    result = tune(pipe, config, options.work, resume=True, say=print, progress=told)
    print(result.model_dump_json(exclude={"history"}))
    if options.steps is not None:
        return
    pipe.transformer.half()  # its library loads it as fp32 all the same; the text encoders' would load them as they are stored
    pipe.save_pretrained(STAND_IN)
    about = {"config": config.model_dump(mode="json"), "result": result.model_dump(mode="json")}
    runs.write_json(STAND_IN / "training.json", about | {"environment": environment})


def told(done: int, total: int, what: str) -> None:
    """Print every 25th step."""
    if done % 25 == 0:
        print(done, total, what, flush=True)


if __name__ == "__main__":
    main()
