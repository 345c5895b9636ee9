"""Tiny random hosts, and what several test files ask of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    from lineate.models.dit import DiT

DIT = {"input_size": (8, 6), "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}

# transformers' configs
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
PLAIN = VISION | {"intermediate_size": 48}
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99,
    "bos_token_id": 1, "eos_token_id": 2, "projection_size": 24,
}  # fmt: skip


def dit(**changes: Any) -> DiT:
    """A DiT, random everywhere, also where it starts at zero."""
    from lineate.models.dit import DiT

    model = DiT(**(DIT | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def sd3(**changes: Any) -> SD3Transformer2DModel:
    """An SD3 transformer, random everywhere; two plain joint blocks where nothing is said."""
    from diffusers import SD3Transformer2DModel

    geometry = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 3, "joint_attention_dim": 12, "caption_projection_dim": 24, "pooled_projection_dim": 10,
        "pos_embed_max_size": 12,
    }  # fmt: skip
    return SD3Transformer2DModel(**geometry | changes).eval()


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def t5() -> tuple[Any, Any]:
    """A T5 encoder of 20 channels, and its tokenizer, whose words are letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=20, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def clip() -> tuple[Any, Any]:
    """A CLIP text tower, projecting to 5 channels, and its tokenizer, whose words are letters."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval(), tokenizer


def autoencoder() -> AutoencoderKL:
    """An autoencoder whose latents, of 4 channels, are as large as the picture."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=2, sample_size=8, shift_factor=0.1).eval()


def sd3_pipeline(**changes: Any) -> StableDiffusion3Pipeline:
    """A whole SD3.5-Medium in the small, three text encoders and all; `changes` are the transformer's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    geometry = {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm", "joint_attention_dim": 20}
    (first, tokenizer), (second, tokenizer_2), (third, tokenizer_3) = clip(), clip(), t5()
    pipeline = StableDiffusion3Pipeline(
        transformer=sd3(**geometry | changes), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(),
        text_encoder=first, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer_2,
        text_encoder_3=third, tokenizer_3=tokenizer_3,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def aligned(model: Any) -> Any:
    """`model`, its tensors copied: one mapped from a file may lie askew, and then products differ in their last bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def softmax_twin(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> nn.Module:
    """The model's identity conversion, which is it to the bit: in what `run` gives, in every gradient, in its tensors' names."""
    from lineate.convert import convert

    twin = convert(copy.deepcopy(model), "softmax")
    found = []
    for m in (model, twin):
        out = run(m)
        found.append((out, *torch.autograd.grad(out.square().sum(), tuple(m.parameters()), allow_unused=True)))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert twin.state_dict().keys() == model.state_dict().keys()
    return twin


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; the model's own are gone afterwards."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_with_gradients(found: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Two functions of the inputs give the same output and the same gradients."""
    leaves = [x.requires_grad_() for x in inputs]
    cotangent = torch.randn_like(leaves[0])
    outputs, slopes = [], []
    for function in (found, expected):
        out = function(*leaves)
        outputs.append(out.detach())
        slopes.append(torch.autograd.grad((out * cotangent).sum(), leaves))
    torch.testing.assert_close(*outputs)
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)
