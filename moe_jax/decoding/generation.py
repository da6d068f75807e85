"""Texts from a model of any family that can be decoded."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.decoding.beam_search import Beams
from moe_jax.decoding.sampling import Sampling
from moe_jax.decoding.seq2seq import translate_texts
from moe_jax.decoding.text import MOST_NEW_TOKENS, continue_texts
from moe_jax.errors import UserError
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.recurrent_lm import RecurrentLMConfig

_DECODED = (DecoderLMConfig, RecurrentLMConfig, EncoderDecoderConfig)


def generate_texts(
    model: Any,
    mesh: Mesh,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    beams: int = 0,
    seed: int = 0,
) -> list[str]:
    """Continues prompts, or answers them where the model is one from text to text.

    Args:
      model: on `mesh`, with its arrays.
      mesh: where it is.
      tokenizer: of the text that it was trained on.
      prompts: one text for each is returned, in this order.
      max_new_tokens: tokens to add to each at most; None for as many as there is room for, at most
        128.
      temperature: divides the logits; 0 is greedy.
      top_k: draw among the k most probable tokens; 0 for all.
      beams: search with so many hypotheses instead of drawing, from text to text only; 0 to draw.
      seed: of the draws.

    Raises:
      UserError: the model cannot be decoded, or a value or a prompt is too large for it.
    """
    if not isinstance(model.config, _DECODED):
        raise UserError(
            f"the run has a {type(model.config).__name__}, which cannot be decoded; name a run of a "
            "decoder or of an EncoderDecoderConfig."
        )
    sampling = Sampling(temperature, top_k)
    if isinstance(model.config, EncoderDecoderConfig):
        method = Beams(beams) if beams else sampling
        most = MOST_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        return translate_texts(model, mesh, tokenizer, prompts, most, method, seed)
    if beams:
        raise UserError(
            f"beams is {beams}, but beam search is for models from text to text, and this one has a "
            f"{type(model.config).__name__}; leave it out."
        )
    return continue_texts(model, mesh, tokenizer, prompts, max_new_tokens, sampling, seed)
