"""Models of one seed share what they have in common: parameters, dropout masks and router noise.

A comparison of a MoE with its dense twin is between models that differ in nothing but the MoEs, and
how blocks are grouped into scans changes nothing at all.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax as moe
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.recurrent_lm import RecurrentLMConfig
from moe_jax.models.recurrent_translator import RecurrentTranslatorConfig
from moe_jax.models.stack import MoERule, SparseDense, StackConfig, Stage
from moe_jax.models.vision import VisionConfig
from moe_jax.routing.fixed import UniformRandom
from moe_jax.routing.noisy_top_k import NoisyTopK
from moe_jax.training.run import Run, broadcast_signal
from tests.tiny import tiny_config

B, L, V, LAYERS = 4, 8, 32, 4
SIZES = dict(num_layers=LAYERS, width=16, num_heads=2, head_width=8, mlp_width=32, num_experts=4)
MOE = moe.MoEConfig(router=UniformRandom(), group_size=L)
EVERY = moe.DecoderLMConfig(
    vocab_size=V,
    max_length=L,
    **SIZES,
    moe_every=1,
    moe=MOE,
    dropout=0.5,
    learned_positions=True,
    attention=MultiHead(positions=Positions.RELATIVE),
)
DENSE = dataclasses.replace(EVERY, moe_every=0)
HASH = moe.MoEConfig(router=moe.HashRouter(vocab_size=V))
CHANGES = {
    "every block": {},
    "every second": {"moe_every": 2},
    "the last": {"moe_at": (3,)},
    "in no order": {"moe_at": (1, 2)},
    "twice the experts": {"moe_every": 2, "num_experts": 8},
    "a pyramid of experts": {"moe_every": 2, "experts_by_layer": (2, 4)},
    "another router in the first": {"moe_rules": (MoERule((0,), HASH),)},
    "a dense layer besides": {"moe_every": 2, "sparse_dense": SparseDense.BEFORE},
    "not scanned": {"moe_every": 2, "unroll": True},
}
SPARSE = {name: dataclasses.replace(EVERY, **changes) for name, changes in CHANGES.items()}


class OwnStages:
    """Every block is a stage of its own, for configs that are a StackConfig too."""

    @property
    def stages(self):
        return [
            Stage(block, (sum(stage.experts) if block in stage.moe_blocks else 0,), 1, stage.rule)
            for stage in super().stages
            for block in stage.blocks
        ]


@dataclasses.dataclass
class Ungrouped(OwnStages, moe.DecoderLMConfig):
    """A decoder without a period or a scan over more than one block."""


def ungrouped(config):
    return Ungrouped(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def drawn(config, seed=0):
    config.validate()
    return jax.jit(
        lambda: nnx.to_pure_dict(nnx.state(config.build(jax.random.key(seed)), nnx.Param))
    )()


def by_path(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(a) for p, a in leaves}


def by_block(config, stack):
    """A stack's arrays by the index of their block and the role of their sub-layer."""
    found = by_path({name: value for name, value in stack.items() if name != "stages"})
    for i, stage in enumerate(config.stages):
        for place in range(len(stage.experts)):
            role = "moe" if stage.experts[place] else "feed_forward"
            for path, value in by_path(stack["stages"][i]["blocks"][place]).items():
                name = path.replace("mlp", role, 1).replace("dense/norm", "feed_forward_norm")
                name = name.replace("dense/feed_forward", "feed_forward")
                for first, of_block in zip(stage.firsts, value, strict=True):
                    found[f"{first + place}/{name}"] = of_block
    return found


def of_decoder(config, seed=0):
    values = drawn(config, seed)
    rest = by_path({name: value for name, value in values.items() if name != "stack"})
    return rest | by_block(config, values["stack"])


def check_shared(one, other):
    """Everything outside the MoEs that both have is equal, and so are MoEs of one shape.

    Returns:
      names of what both have.
    """
    shared = sorted(one.keys() & other.keys())
    for name in shared:
        if "/moe/" in name and one[name].shape != other[name].shape:
            continue
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    return shared


@pytest.fixture(scope="module")
def models():
    return {"dense": of_decoder(DENSE)} | {name: of_decoder(c) for name, c in SPARSE.items()}


@pytest.mark.parametrize("name", SPARSE)
def test_a_dense_twin_has_the_parameters_of_all_that_it_shares(models, name):
    sparse, config = models[name], SPARSE[name]
    shared = check_shared(models["dense"], sparse)
    # Nothing is left out: only the MoEs, and the dense layers in their places, are one model's alone.
    lacking = set() if config.sparse_dense != SparseDense.NONE else set(config.moe_layers)
    assert models["dense"].keys() - shared == {
        path
        for path in models["dense"]
        if path.split("/")[0] in map(str, lacking) and "/feed_forward" in path
    }
    assert {path.split("/")[1].removesuffix("_norm") for path in sparse.keys() - shared} == {"moe"}
    assert {"tokens/table", "positions/table", "relative/table", "norm/scale"} <= set(shared)


def test_models_with_a_moe_in_the_same_block_share_it(models):
    pairs = 0
    for one, other in itertools.combinations(SPARSE, 2):
        shared = check_shared(models[one], models[other])
        pairs += f"{LAYERS - 1}/moe/w_in" in shared
    assert pairs > 10


def test_nothing_that_is_drawn_is_drawn_twice(models):
    """Sharing is between models; within one, blocks and sub-layers start different."""
    for name, arrays in models.items():
        random = [a for path, a in arrays.items() if a.std() > 0]
        beginnings = {a.ravel()[:8].tobytes() for a in random}
        assert len(beginnings) == len(random), name
    other = of_decoder(DENSE, seed=1)
    assert all((a != other[path]).any() for path, a in models["dense"].items() if a.std() > 0)


@pytest.mark.parametrize("name", ["dense", "every second", "in no order", "a dense layer besides"])
def test_how_blocks_are_grouped_changes_no_parameter(models, name):
    config = DENSE if name == "dense" else SPARSE[name]
    alone = of_decoder(ungrouped(config))
    assert alone.keys() == models[name].keys()
    check_shared(models[name], alone)


def test_encoder_and_decoder_share_with_their_dense_twins():
    def arrays(moe_every):
        stack = StackConfig(**SIZES, moe_every=moe_every, attention=EVERY.attention)
        config = EncoderDecoderConfig(vocab_size=V, encoder=stack, decoder=stack)
        values = drawn(config)
        found = by_path(
            {name: a for name, a in values.items() if name not in ("encoder", "decoder")}
        )
        for half in ("encoder", "decoder"):
            of_half = by_block(stack, values[half])
            found |= {f"{half}/{name}": a for name, a in of_half.items()}
        return found

    dense = arrays(0)
    for moe_every in (1, 2, 4):
        shared = check_shared(dense, arrays(moe_every))
        assert "inputs/table" in shared and "decoder_norm/scale" in shared
        for half, block in itertools.product(("encoder", "decoder"), range(LAYERS)):
            assert f"{half}/{block}/attention/qkv" in shared
            assert (f"{half}/{block}/cross_attention/query" in shared) == (half == "decoder")
            is_dense = bool((block + 1) % moe_every)
            assert (f"{half}/{block}/feed_forward/w_in" in shared) == is_dense


def test_vision_shares_with_its_dense_twin():
    def arrays(**fields):
        config = VisionConfig(**SIZES, image_size=8, patch_size=4, num_classes=3, **fields)
        values = drawn(config)
        rest = by_path({name: a for name, a in values.items() if name != "stack"})
        return rest | by_block(config, values["stack"])

    shared = check_shared(arrays(moe_every=0), arrays(moe_every=2))
    assert {"patches/kernel", "positions/table", "0/feed_forward/w_in", "3/attention/out"} <= set(
        shared
    )


@pytest.mark.parametrize("family", [RecurrentLMConfig, RecurrentTranslatorConfig])
def test_lstms_are_those_of_the_model_without_a_moe(family):
    sizes = dict(vocab_size=V, width=8, units=12, mlp_width=16, moe=moe.MoEConfig(NoisyTopK(k=2)))
    dense = {"num_experts": 0} | ({"hidden_widths": (5,)} if family is RecurrentLMConfig else {})
    models = [
        by_path(drawn(family(**sizes, **fields)))
        for fields in (dense, {"num_experts": 0}, {"num_experts": 4}, {"num_experts": 8})
    ]
    own = ("dense/", "sigmoid_moe/", "encoder_moe/", "decoder_moe/")
    names = [{path for path in arrays if not path.startswith(own)} for arrays in models]
    assert names[0] == names[1] == names[2] == names[3] and len(names[0]) >= 9
    for path, arrays in itertools.product(names[0], models[1:]):
        np.testing.assert_array_equal(models[0][path], arrays[path], err_msg=path)


def test_the_first_lstms_of_a_deeper_model_are_those_of_a_shallower_one():
    sizes = dict(vocab_size=V, width=8, units=8, num_experts=0)
    two, three = (by_path(drawn(RecurrentLMConfig(**sizes, num_lstms=n))) for n in (2, 3))
    assert two.keys() < three.keys()
    for path, value in two.items():
        np.testing.assert_array_equal(value, three[path], err_msg=path)


def silenced(config, values, blocks):
    """The parameters with 0 for what MoEs and feed-forward layers of these blocks give."""
    values = jax.tree.map(lambda a: a, values)
    for i, stage in enumerate(config.stages):
        for place in range(len(stage.experts)):
            mlp = values["stack"]["stages"][i]["blocks"][place]["mlp"]
            off = np.array([first + place in blocks for first in stage.firsts])
            mlp["w_out"] = jnp.where(
                off.reshape(-1, *[1] * (mlp["w_out"].ndim - 1)), 0, mlp["w_out"]
            )
    return values


def trained_pass(config, values, seed=5):
    """Logits and reports of a pass in training, with dropout."""
    model, tokens = AbstractModel.of(config), jax.random.randint(jax.random.key(1), (B, L), 0, V)

    @jax.jit
    def run(values):
        logits, reports, _ = model.merge(values)(tokens, None, moe.Mode.TRAIN, jax.random.key(seed))
        return logits, [report.statistics["load"] for report in reports]

    return run(values)


@pytest.mark.parametrize("name", ["every block", "every second", "the last", "not scanned"])
def test_dropout_masks_are_the_dense_twins(name):
    """Where MoEs and what stands in their places say nothing, one pass equals the other's.

    Half of the entries are dropped: of the embedding, of attention in all blocks, and inside and after
    the feed-forward layers of dense blocks.
    """
    config, blocks = SPARSE[name], set(SPARSE[name].moe_layers)
    sparse, dense = (silenced(c, drawn(c), blocks) for c in (config, DENSE))
    want, _ = trained_pass(DENSE, dense)
    got, _ = trained_pass(config, sparse)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for others, of_others in ((DENSE, dense), (config, sparse)):
        other, _ = trained_pass(others, of_others, seed=6)
        assert np.abs(other - want).max() > 0.1


def test_router_noise_follows_the_index_of_the_block():
    """Experts are drawn with the key alone, so that equal keys are seen as equal loads."""
    loads = {}
    for name in ("every block", "every second", "the last", "a dense layer besides", "not scanned"):
        config = SPARSE[name]
        _, found = trained_pass(config, drawn(config))
        loads[name] = dict(zip(config.moe_layers, np.concatenate(found), strict=True))
    for of_blocks in loads.values():
        for block, load in of_blocks.items():
            np.testing.assert_array_equal(load, loads["every block"][block])
    assert len({load.tobytes() for load in loads["every block"].values()}) == LAYERS


def test_how_blocks_are_grouped_changes_no_loss_in_training(data_dir):
    """Scanned, unrolled and ungrouped: with dropout, jitter and expert dropout, on eight devices."""
    config = tiny_config(data_dir)
    config.model = dataclasses.replace(config.model, num_layers=LAYERS, dropout=0.2)
    data = config.data.open(config.seed)
    batches = [data.rows(step, 0, config.data.batch_size) for step in range(4)]
    layouts = (
        config.model,
        dataclasses.replace(config.model, unroll=True),
        ungrouped(config.model),
    )
    losses, starts = [], []
    for model in layouts:
        run = Run.build(dataclasses.replace(config, model=model))
        with jax.set_mesh(run.mesh):
            state, found = run.initial_state(), []
            starts.append(by_block(model, state.parameters["stack"]))
            for batch in batches:
                state, metrics = run.train_step(
                    state, run.put_batch(batch), broadcast_signal(run.mesh, 0), run.hyperparameters
                )
                found.append(float(metrics["loss"]))
        losses.append(found)
    for start in starts[1:]:
        assert start.keys() == starts[0].keys()
        check_shared(starts[0], start)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)
