"""Texts as a Stable Diffusion 3 pipeline gives them to its transformer.

Legend: n texts, M tokens, E width of their embeddings, P width of the pooled ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

T5_TOKENS = 256  # the pipeline's own default


def encode_texts(pipe: Any, texts: Sequence[str], batch: int = 64) -> tuple[Tensor, Tensor]:
    """Embeddings (n, M, E) and pooled ones (n, P) of `texts`, as the pipeline gives them to its transformer."""
    found = []
    with torch.no_grad(), quietly():
        for first in range(0, len(texts), batch):
            text, _, pooled, _ = pipe.encode_prompt(
                list(texts[first : first + batch]), None, None, do_classifier_free_guidance=False,
                max_sequence_length=t5_tokens(pipe),
            )  # fmt: skip
            found.append((text, pooled))
    text, pooled = (torch.cat(parts) for parts in zip(*found, strict=True))
    return text, pooled


def t5_tokens(pipe: Any) -> int:
    """How many tokens of T5's the pipeline is given: its default, or fewer where its tokenizer takes no more."""
    longest = T5_TOKENS if pipe.tokenizer_3 is None else int(pipe.tokenizer_3.model_max_length)
    return min(T5_TOKENS, longest)


@contextmanager
def quietly() -> Iterator[None]:
    """Without bars, and without what diffusers and transformers say of what is meant: our autoencoder, a T5 of one token."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, shown in before:
            library.set_verbosity(level)
            if shown:
                library.enable_progress_bar()
