"""Vision Transformer, dense or with a Mixture-of-Experts in some blocks: ViT, V-MoE and Soft MoE.

Axis letters: B images, N patches, L tokens (patches and the class token), p side of a patch, d width,
V classes.
"""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.layers.attention import AttentionConfig, MultiHead, Positions
from moe_jax.layers.dropout import dropout
from moe_jax.layers.embedding import LearnedPositions
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.initializers import Scale, scaled_truncated_normal
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig, MoEReport, TokenInfo
from moe_jax.layers.normalization import Norm, make_norm
from moe_jax.models.blocks import Pass
from moe_jax.models.interface import ModelConfig
from moe_jax.models.stack import Stack, StackConfig
from moe_jax.parallel.sharding import constrain
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.token_choice import VMoE


class Pooling(enum.StrEnum):
    """The vector that is classified: the class TOKEN's (ViT, V-MoE), or the mean of all patches'
    (GAP, global average pooling: Soft MoE).
    """

    TOKEN = "token"
    GAP = "gap"


class Interpolation(enum.StrEnum):
    """How position embeddings become those of another grid: BILINEAR (ViT), BICUBIC."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


def _attention() -> MultiHead:
    return MultiHead(positions=Positions.NONE, qkv_bias=True, out_bias=True)


def _feed_forward() -> FeedForwardForm:
    return FeedForwardForm(activation=Activation.GELU, bias=True)


def _moe() -> MoEConfig:
    return MoEConfig(
        router=VMoE(),
        capacity=Capacity(1.05, 1.05, CapacityRule.VMOE_ROUND),
        group_size=8 * 197,
        experts=_feed_forward(),
    )


@dataclasses.dataclass
class VisionConfig(StackConfig, ModelConfig):
    """A Vision Transformer (Dosovitskiy et al. 2020), with biases, GELU and layer norms as its own.

    Attributes:
      image_size: side of the square images.
      patch_size: p; image_size must be a multiple.
      channels: of the images.
      num_classes: V.
      pooling: what is classified.
      pre_logits: a layer [d, d] with tanh between pooling and head.
      head_bias: at the start; -log(V), or -10, lets losses of a sigmoid per class begin small. The
        head's matrix starts at 0.

    The other attributes are those of `StackConfig`. V-MoE's groups are 8 images (group_size = 8 L),
    Soft MoE's are one image. The experts of a layer start different from each other; in the authors'
    code they start equal.
    """

    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    head_width: int = 64
    mlp_width: int = 3072
    attention: AttentionConfig = dataclasses.field(default_factory=_attention)
    feed_forward: FeedForwardForm = dataclasses.field(default_factory=_feed_forward)
    norm: Norm = Norm.LAYER
    moe: MoEConfig = dataclasses.field(default_factory=_moe)
    image_size: int = field(224, at_least=1)
    patch_size: int = field(16, at_least=1)
    channels: int = field(3, at_least=1)
    num_classes: int = field(1000, at_least=1)
    pooling: Pooling = Pooling.TOKEN
    pre_logits: bool = False
    head_bias: float = 0.0

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.grid**2 + (self.pooling == Pooling.TOKEN)

    def validate(self, path: str = "model") -> None:
        """Raises UserError for a model that could not be built; `path` is the config's own."""
        super().validate(path)
        if self.image_size % self.patch_size:
            raise UserError(
                f"{path}.patch_size is {self.patch_size}, which does not divide "
                f"{path}.image_size={self.image_size}; change one of them."
            )
        for moe in self.moe_settings:
            if moe.router.reads_token_ids:
                raise UserError(
                    f"{path}.moe.router is {type(moe.router).__name__}, which routes by token ids, and "
                    "patches have none; use another router."
                )

    def build(self, key: jax.Array) -> "Vision":
        """Creates the model with freshly drawn parameters."""
        return Vision(self, key)


class PatchEmbedding(nnx.Module):
    """A linear map of each patch: a convolution whose stride is its window.

    Attributes:
      kernel: [p, p, channels, d] float32.
      bias: [d] float32, 0 at the start.
    """

    def __init__(
        self, patch_size: int, channels: int, width: int, scale: Scale, key: jax.Array
    ) -> None:
        shape = (patch_size, patch_size, channels, width)
        kernel = scaled_truncated_normal(key, shape, patch_size**2 * channels, scale)
        self.kernel = nnx.Param(kernel, axes=("patch", "patch", "channels", "embed"))
        self.bias = nnx.Param(jnp.zeros(width), axes=("norm",))

    @jax.named_scope("embedding")
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, Hh, Ww, channels] to [B, N, d], patches row by row."""
        kernel = self.kernel[...].astype(images.dtype)
        p, _, channels, _ = kernel.shape
        b, height, width, _ = images.shape
        patches = images.reshape(b, height // p, p, width // p, p, channels)
        x = jnp.einsum("brpcqx,pqxd->brcd", patches, kernel) + self.bias[...].astype(images.dtype)
        return x.reshape(b, -1, x.shape[-1])


class Linear(nnx.Module):
    """x W + b.

    Attributes:
      kernel: [d, n] float32.
      bias: [n] float32.
    """

    def __init__(self, kernel: jax.Array, bias: jax.Array, axes: tuple[str, str]) -> None:
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(bias, axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, d] to [B, n] float32."""
        kernel = self.kernel[...].astype(x.dtype)
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32) + self.bias[...]


class Vision(nnx.Module):
    """The image classifier.

    Attributes:
      class_token: [d] float32, 0 at the start; None without one.
      positions: learned, of the class token first and then of the patches row by row.
      pre_logits: None without that layer.
    """

    def __init__(self, config: VisionConfig, key: jax.Array) -> None:
        patch_key, position_key, stack_key, pre_logits_key = jax.random.split(key, 4)
        width, classes = config.width, config.num_classes
        self.config = nnx.static(config)
        self.patches = PatchEmbedding(
            config.patch_size, config.channels, width, config.scale, patch_key
        )
        has_token = config.pooling == Pooling.TOKEN
        self.class_token = nnx.Param(jnp.zeros(width), axes=("norm",)) if has_token else None
        self.positions = LearnedPositions(config.num_tokens, width, position_key)
        self.stack = Stack(config, stack_key, causal=False)
        self.norm = make_norm(config.norm, width, config.norm_epsilon)
        square = scaled_truncated_normal(pre_logits_key, (width, width), width, config.scale)
        self.pre_logits = (
            Linear(square, jnp.zeros(width), ("embed", "width")) if config.pre_logits else None
        )
        self.head = Linear(
            jnp.zeros((width, classes)),
            jnp.full(classes, config.head_bias, jnp.float32),
            ("embed", "classes"),
        )

    def __call__(
        self,
        images: jax.Array,
        mask: jax.Array | None,
        mode: Mode,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[MoEReport]]:
        """Classifies images.

        Args:
          images: [B, image_size, image_size, channels] float32.
          mask: [B] bool, False for images that only fill the batch; None for none.
          mode: what the pass is for.
          key: PRNG key of this step; None where nothing is random.

        Returns:
          logits [B, V] float32; the MoE layers' reports, one for each stage of the stack that has
          some, with a leading axis over its layers.

        Raises:
          UserError: the images have another size.
        """
        pooled, reports = self.features(images, mask, mode, key)
        with jax.named_scope("logits"):
            return self.head(pooled), reports

    def features(
        self,
        images: jax.Array,
        mask: jax.Array | None,
        mode: Mode,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[MoEReport]]:
        """What the head classifies: the pooled vectors, after the layer `pre_logits` if there is one.

        Args:
          images, mask, mode, key: see `__call__`.

        Returns:
          [B, d] in the model's dtype; the MoE layers' reports.

        Raises:
          UserError: the images have another size.
        """
        config: VisionConfig = self.config
        size = (config.image_size, config.image_size, config.channels)
        if images.shape[1:] != size:
            raise UserError(
                f"model.image_size is {config.image_size} and model.channels {config.channels}, but "
                f"the images are {images.shape[1:]}; make them {size}, or see `resized`."
            )
        embed_key, stack_key = (None,) * 2 if key is None else jax.random.split(key)
        x = self._embedded(images.astype(jnp.dtype(config.dtype)))
        x = dropout(constrain(x, "batch", "length", "width"), config.dropout, embed_key)
        # Without a mask for attention: padding is whole images, of which no token sees another's.
        this_pass = Pass(self.token_info(len(x), mask), mode, stack_key)
        x, reports, _ = self.stack(x, this_pass)
        x = self.norm(x)
        pooled = x[:, 0] if config.pooling == Pooling.TOKEN else x.mean(axis=1)
        with jax.named_scope("logits"):
            if self.pre_logits is not None:
                pooled = jnp.tanh(self.pre_logits(pooled)).astype(x.dtype)
        return pooled, reports

    def token_info(self, count: int, mask: jax.Array | None) -> TokenInfo:
        """[B, L] of each; ids are 0, because patches have none.

        Args:
          count: B.
          mask: see `__call__`.
        """
        return TokenInfo.of(jnp.zeros((count, self.config.num_tokens), jnp.int32), mask)

    def _embedded(self, images: jax.Array) -> jax.Array:
        """[B, L, d] the class token and the patches, with their positions."""
        x = self.patches(images)
        if self.class_token is not None:
            token = jnp.broadcast_to(
                self.class_token[...].astype(x.dtype), (len(x), 1, x.shape[-1])
            )
            x = jnp.concatenate([token, x], axis=1)
        positions = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
        return x + self.positions(positions, x.dtype)


def resized(
    config: VisionConfig,
    parameters: Any,
    image_size: int,
    interpolation: Interpolation = Interpolation.BILINEAR,
) -> tuple[VisionConfig, Any]:
    """The model for images of another size: its position embeddings are interpolated.

    Groups keep their number of images. Patches' centers keep their places in the image, as in
    transformers; ViT's own code keeps the places of the outermost patches' instead.

    Args:
      config: of the model.
      parameters: its nested dicts, see `moe_jax.models.abstract_model.arrays_of`.
      image_size: the new one.
      interpolation: between patches; the class token's embedding is kept.

    Raises:
      UserError: the patches do not fit into the new size, or a group is no whole number of images.
    """
    images, rest = divmod(config.moe.group_size, config.num_tokens)
    if config.sparse and rest:
        raise UserError(
            f"moe.group_size is {config.moe.group_size}, no multiple of the {config.num_tokens} tokens "
            "of an image, so that it cannot follow another image_size; use whole images."
        )
    new = dataclasses.replace(config, image_size=image_size)
    if config.sparse and images:
        group_size = images * new.num_tokens
        new.moe = dataclasses.replace(config.moe, group_size=group_size)
        new.moe_rules = tuple(
            dataclasses.replace(rule, moe=dataclasses.replace(rule.moe, group_size=0))
            for rule in config.moe_rules
        )
    new.validate()
    table = resized_positions(
        parameters["positions"]["table"], config.grid, new.grid, interpolation
    )
    return new, {**parameters, "positions": {**parameters["positions"], "table": table}}


def resized_positions(
    table: jax.Array, grid: int, new_grid: int, interpolation: Interpolation
) -> jax.Array:
    """Position embeddings of grid^2 patches, [L, d], as those of new_grid^2 patches.

    Rows before the patches' (the class token's) are kept.
    """
    others = len(table) - grid**2
    patches = table[others:].reshape(grid, grid, -1)
    shape = (new_grid, new_grid, patches.shape[-1])
    patches = jax.image.resize(patches, shape, interpolation.value, antialias=False)
    return jnp.concatenate([table[:others], patches.reshape(new_grid**2, -1)])
