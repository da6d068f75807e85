"""FLOPs of training steps: by hand, and as programs for one or two CPUs have them."""

import dataclasses

import jax
import pytest

from moe_jax.analysis.accounting.training import training_flops
from moe_jax.analysis.hlo import Program
from moe_jax.data.images import ImageData
from moe_jax.data.pairs import PairData
from moe_jax.data.pipelines import TextData
from moe_jax.dispatch.dropless import Dropless
from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.exchange import Transport
from moe_jax.errors import UserError
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.latent_attention import MultiHeadLatent
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.shared_experts import BranchMix
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.recurrent_lm import RecurrentLMConfig
from moe_jax.models.recurrent_translator import RecurrentTranslatorConfig
from moe_jax.models.stack import Remat, SparseDense, StackConfig
from moe_jax.models.vision import VisionConfig
from moe_jax.parallel.mesh import AXES, MeshConfig, mesh_of
from moe_jax.routing.fixed import UniformRandom
from moe_jax.routing.noisy_top_k import NoisyTopK
from moe_jax.routing.soft import SoftMoE
from moe_jax.routing.token_choice import TopK
from moe_jax.tasks.image_classification import ImageClassification
from moe_jax.tasks.language_modeling import LanguageModeling
from moe_jax.tasks.text_to_text import TextToText
from moe_jax.training.experiment import Experiment
from moe_jax.training.run import Run

ONE = dict.fromkeys(AXES, 1)
SIZES = {"num_layers": 2, "width": 64, "num_heads": 2, "head_width": 32, "mlp_width": 96}
GATED = FeedForwardForm(Activation.SILU, gated=True)
TOP_2 = MoEConfig(TopK(k=2), group_size=32)
DECODER = DecoderLMConfig(**SIZES, vocab_size=264, num_experts=4, moe=TOP_2, max_length=32)
TEXT = TextData(sequence_length=32, batch_size=4)
PAIRS = PairData(input_length=24, target_length=32, batch_size=4)


def lowered(model, data, task, mesh):
    experiment = Experiment(steps=2, model=model, data=data, task=task, mesh=mesh)
    experiment.validate()
    run = Run.on(experiment, mesh_of(mesh, jax.devices()[: mesh.size]))
    with jax.set_mesh(run.mesh):
        return run.train_step.lower(*run.abstract_arguments())


def matrix_flops(text):
    products = Program(text).matrix_products()
    assert all(product.trips.exact for product in products)
    return sum(product.flops * product.trips.count for product in products)


def check(model, data, task, besides=0):
    """Of the step that XLA gets: compiling it takes five times as long and changes no product."""
    program = lowered(model, data, task, MeshConfig()).compiler_ir("hlo").as_hlo_text()
    assert training_flops(model, data, "cpu", ONE).executed + besides == matrix_flops(program)


def test_by_hand():
    model = DecoderLMConfig(
        vocab_size=10, max_length=8, num_layers=2, width=4, num_heads=3, head_width=2, mlp_width=7,
        num_experts=5, moe=MoEConfig(TopK(k=1), group_size=8),
    )  # fmt: skip
    data = TextData(sequence_length=8, batch_size=3)

    def executed(remat):
        counted = training_flops(dataclasses.replace(model, remat=remat), data, "cpu", ONE)
        assert counted.skipped == 0
        # 24 tokens. Forward for each: 2 layers' projections 2 * 4 * 4 * 6 and a dense or expert
        # network 2 * 2 * 4 * 7, logits 2 * 4 * 10; scores 4 * 6 for 4.5 positions in each layer.
        forward = 24 * (2 * 192 + 2 * 112 + 80 + 2 * 24 * 4.5)
        assert counted.algorithmic == 3 * forward
        return counted.executed

    # 8 tokens * 1.25 / 5 experts = 2 slots: 10 rows of experts for 8 tokens. All 8 positions.
    experts, scores, router = 24 * 112 * 10 / 8, 24 * 2 * 24 * 8, 24 * 2 * 4 * 5
    dense = 24 * (2 * 192 + 112)
    none = 3 * (experts + scores + router + dense + 24 * 80)
    assert executed(Remat.NONE) == none
    # Experts and scores are batched products. Logits are outside the stack.
    assert executed(Remat.DOTS) == none + experts + scores
    assert executed(Remat.FULL) == none + experts + scores + router + dense
    # Of a dense model, nobody reads the second product of a feed-forward layer again.
    model = dataclasses.replace(model, moe_every=0)
    none = 3 * 24 * (2 * 192 + 2 * 112 + 2 * 24 * 8 + 80)
    counted = training_flops(dataclasses.replace(model, remat=Remat.FULL), data, "cpu", ONE)
    assert counted.executed == none + 24 * (2 * 192 + 2 * 56 + 2 * 24 * 8)


@pytest.mark.parametrize("remat", Remat)
def test_a_decoder_with_shared_experts_and_a_dense_first_block(remat):
    model = dataclasses.replace(
        DECODER, moe_at=(1,), attention=MultiHead(kv_heads=1), remat=remat,
        moe=dataclasses.replace(TOP_2, experts=GATED, shared_experts=2),
    )  # fmt: skip
    check(model, TEXT, LanguageModeling())


@pytest.mark.parametrize("remat", [Remat.DOTS, Remat.FULL])
def test_a_decoder_with_one_hot_masks_and_a_dense_layer_beside_the_experts(remat):
    model = dataclasses.replace(
        DECODER, attention=MultiHead(positions=Positions.TRANSFORMER_XL), remat=remat,
        moe=dataclasses.replace(
            TOP_2, dispatch=Einsum(), shared_experts=1, shared_mix=BranchMix.LEARNED
        ),
        sparse_dense=SparseDense.AFTER,
    )  # fmt: skip
    # Not counted: the masks themselves, of dispatch and combine forward and again, and the gates'
    # gradient: 128 tokens, 2 choices, 4 experts of 32 * 2 * 1.25 / 4 = 20 slots.
    check(model, TEXT, LanguageModeling(), besides=5 * 2 * 128 * 2 * 4 * 20)


@pytest.mark.parametrize("remat", [Remat.DOTS, Remat.FULL])
def test_a_decoder_with_soft_slots_and_latent_attention(remat):
    model = dataclasses.replace(
        DECODER, attention=MultiHeadLatent(24, 16, nope_width=16, rotary_width=8, value_width=16),
        moe=dataclasses.replace(TOP_2, router=SoftMoE(slots_per_expert=5)), remat=remat,
        sparse_dense=SparseDense.BEFORE, bidirectional=False, accept_leak=True,
    )  # fmt: skip
    check(model, TEXT, LanguageModeling())


def test_gates_without_gradient_read_no_outputs():
    model = dataclasses.replace(
        DECODER, moe=dataclasses.replace(TOP_2, router=UniformRandom(k=2)), remat=Remat.FULL
    )
    check(model, TEXT, LanguageModeling())


def test_an_encoder_and_a_decoder():
    stack = StackConfig(
        **SIZES, num_experts=4, moe=TOP_2, attention=MultiHead(positions=Positions.RELATIVE)
    )
    model = EncoderDecoderConfig(
        vocab_size=264, encoder=stack, decoder=dataclasses.replace(stack, remat=Remat.FULL)
    )
    check(model, PAIRS, TextToText())


def test_images_have_no_gradient():
    model = VisionConfig(
        **SIZES, num_experts=4, moe=dataclasses.replace(TOP_2, group_size=34), image_size=28,
        patch_size=7, channels=1, num_classes=10, pre_logits=True, remat=Remat.FULL,
    )  # fmt: skip
    check(model, ImageData(batch_size=4), ImageClassification())


def test_recurrent_models():
    moe = MoEConfig(NoisyTopK(k=2), group_size=32)
    sizes = {"vocab_size": 264, "width": 16, "units": 24, "num_experts": 4, "mlp_width": 48}
    model = RecurrentLMConfig(**sizes, moe=moe, remat_moe=True)
    check(model, TEXT, LanguageModeling())
    check(RecurrentTranslatorConfig(**sizes, moe=moe, attention_width=20), PAIRS, TextToText())


def test_each_device_of_model_routes_its_tokens_itself():
    mesh = MeshConfig(model=2)
    model = dataclasses.replace(DECODER, remat=Remat.FULL)
    compiled = lowered(model, TEXT, LanguageModeling(), mesh).compile()
    counted = training_flops(model, TEXT, "cpu", {**ONE, "model": 2}).executed
    assert counted == 2 * matrix_flops(compiled.as_text())
    # 4 experts of 64 wide tokens: forward, two gradients, again.
    assert counted - training_flops(model, TEXT, "cpu", ONE).executed == 4 * 2 * 128 * 64 * 4


@pytest.mark.parametrize(
    ("length", "pairs"),
    [
        # 2 blocks of 512: the first queries read 1 block, the others 2.
        (1024, 3 * 512**2),
        # Blocks of 128: 1 + 2 + 3.
        (384, 6 * 128**2),
        # No block divides it: all positions, by XLA, and 3 times forward.
        (200, None),
    ],
)
def test_splash_attention_skips_masked_blocks_and_computes_scores_anew(length, pairs):
    model = dataclasses.replace(DECODER, moe_every=0, max_length=length)
    data = TextData(sequence_length=length, batch_size=4)
    on_cpu = training_flops(model, data, "cpu", ONE)
    on_tpu = training_flops(model, data, "tpu", ONE)
    forward = 2 * 2 * 4 * 2 * length**2 * 32
    # 2 products forward, 3 for the queries' gradients and 4 for those of keys and values, each of
    # 2 * 32 for a pair, in 2 layers of 2 heads for 4 rows.
    kernels = 2 * 2 * 4 * (2 + 3 + 4) * 2 * 32 * pairs if pairs else 6 * forward
    assert on_tpu.executed - on_cpu.executed == kernels - 6 * forward
    assert on_tpu.algorithmic == on_cpu.algorithmic


def test_attention_with_a_bias_is_not_splash_attention():
    model = dataclasses.replace(
        DECODER, max_length=512, attention=MultiHead(positions=Positions.RELATIVE_PER_LAYER)
    )
    data = TextData(sequence_length=512, batch_size=4)
    assert training_flops(model, data, "tpu", ONE) == training_flops(model, data, "cpu", ONE)


@pytest.mark.parametrize(
    ("dispatch", "shards", "empty"),
    [
        # One device has room for the 2 choices of each token.
        (Dropless(), 1, 0),
        (Dropless(buffer_factor=1.5), 1, 0),
        # 1.5 times the 2 choices.
        (Dropless(buffer_factor=1.5), 4, 1),
        # Tokens of 4 devices may all come, each for the 1 expert here, or the 2.
        (Dropless(), 4, 4 - 2),
        (Dropless(), 2, 2 * 2 - 2),
        # Nothing is lost in the ring, which brings all tokens: at most 2 * 2 rows for a token.
        (Dropless(Transport.RING, buffer_factor=3), 2, 2 * 2 - 2),
    ],
)
def test_empty_rows_of_dropless_buffers_are_skipped(dispatch, shards, empty):
    model = dataclasses.replace(DECODER, moe=dataclasses.replace(TOP_2, dispatch=dispatch))
    counted = training_flops(model, TEXT, "tpu", {**ONE, "expert": shards})
    # 128 tokens, 2 matrices of 64 * 96; forward and two gradients.
    assert counted.skipped == 3 * empty * 128 * 2 * 2 * 64 * 96
    assert training_flops(model, TEXT, "cpu", {**ONE, "expert": shards}).skipped == 0


def test_a_family_without_counts_is_refused():
    with pytest.raises(UserError, match="model is MoEConfig, whose parameters and FLOPs"):
        training_flops(TOP_2, TEXT, "cpu", ONE)
