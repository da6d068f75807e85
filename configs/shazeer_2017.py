"""The language models and translators of the sparsely gated MoE (Shazeer et al. 2017, arXiv:1701.06538).

    python experiments/train.py --config=configs/shazeer_2017.py:moe_256 --workdir=runs/moe_256

Language models (appendices C and D): LSTMs with a MoE after the first, residual connections, dropout on
every layer's output, a sigmoid on the MoE's. Noisy top-4 gating, or top-2 groups and top-2 experts of
each in a hierarchy, of which each GPU had a group or several; losses of importance and load of 0.1
each; no expert drops a token. Adam, with a learning rate that rises in 1,000 steps and falls as 1 /
sqrt(step).

The paper does not say: the learning rate (1e-3 here), Adam's constants (its authors' defaults), how
weights start, whether LSTMs have biases (they do here: no printed digit tells), the branching of
MoE-34M's and MoE-143M's hierarchies (32, for their 32 GPUs; 16 prints the same), and of the news
models the vocabulary (100,000 here: the total parameters of Table 8 allow 76,000 to 109,000) and
the dropout (none here).

Here not as in the paper: importance and load are balanced over each GPU's share of the batch, rows
are packed text of 64 tokens, and these are subwords, because no tokenizer here has whole words; the
vocabulary counts as in the paper. The softmax is whole, the paper's was sampled. The news corpus is
not public: lm1b is in its place.

Translators (appendices E and G): a GNMT (Wu et al. 2016) with LSTMs of 2048 units, projected to 512, a
MoE in the encoder and one in the decoder, dropout of 0.4 on every layer's output, losses of importance
and load of 0.01 each. Adam, with a learning rate that rises in 2,000 steps, stays for 8,000 and falls
as 1 / sqrt(step). About 16,000 words a GPU on 64 K40s.

The encoder's three LSTMs are read here as the two directions of GNMT's first layer, which the paper
counts as two when it gives GNMT nine, and one more; the MoE is after the two. So the model has the
printed 85M operations: with another LSTM it would have 94M. These count the output layer: without
it they would be 68M, and GNMT's own 214M are 180M of LSTMs and 34M of output layer, too. The two
directions are added, since all layers are 512 wide.

The paper does not say: the learning rate (1e-3 here), the steps (100,000 here), the width of the
attention function (512 here), the branching of the hierarchies (64, for the GPUs; 32 of 512
experts), and the dropout of the multilingual model (none here).

Here not as in the paper: gating is noisy, where the bilingual models had the strictly balanced
gating of appendix F, which was a makeshift for their infrastructure; each GPU's share of the batch
is balanced by itself.
"""

from collections.abc import Callable

from moe_jax.data.pairs import PairData
from moe_jax.data.pipelines import TextData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.recurrent_lm import RecurrentLMConfig
from moe_jax.models.recurrent_translator import RecurrentTranslatorConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.published import Published, Quantity
from moe_jax.routing.noisy_top_k import HierarchicalNoisyTopK, NoisyTopK
from moe_jax.routing.router import Router
from moe_jax.tasks.text_to_text import TextToText
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import Adafactor, AdamW, Optimizer, Schedule
from moe_jax.training.rows import Row, chosen

LENGTH = 64
# Words of the benchmark of Chelba et al. (2013).
BILLION_WORDS_VOCABULARY = 793_471
NEWS_VOCABULARY = 100_000
# Of 300,000 and of 2.5 million words, in numbers that 16 and 32, and 32 to 128, GPUs divide.
BILLION_WORDS_ROWS = 4_704
NEWS_ROWS = 39_040

TRANSLATION_VOCABULARY = 32_000
TRANSLATION_GPUS = 64
# Of 125 pairs of 2 * 64 tokens for each GPU.
TRANSLATION_ROWS = TRANSLATION_GPUS * 125


def flat(k: int = 4, loss_weight: float = 0.1) -> Router:
    return NoisyTopK(k=k, importance_weight=loss_weight, load_weight=loss_weight)


def hierarchical(groups: int, loss_weight: float = 0.1) -> Router:
    return HierarchicalNoisyTopK(
        groups=groups,
        groups_per_token=2,
        k=2,
        importance_weight=loss_weight,
        load_weight=loss_weight,
    )


def dense(
    *, num_lstms: int = 2, width: int = 512, units: int = 512, hidden_widths: tuple[int, ...] = ()
) -> RecurrentLMConfig:
    return RecurrentLMConfig(
        max_length=LENGTH,
        num_lstms=num_lstms,
        width=width,
        units=units,
        num_experts=0,
        hidden_widths=hidden_widths,
    )


def sparse(
    num_experts: int,
    router: Router,
    *,
    width: int = 512,
    units: int = 512,
    expert_width: int = 1024,
) -> RecurrentLMConfig:
    return RecurrentLMConfig(
        max_length=LENGTH,
        width=width,
        units=units,
        num_experts=num_experts,
        mlp_width=expert_width,
        moe=MoEConfig(router=router, dispatch=Dropless()),
    )


def billion_words(model: RecurrentLMConfig, *, dropout: float, gpus: int = 16) -> Experiment:
    """10 epochs of the 1 Billion Word benchmark (appendix C)."""
    model.vocab_size, model.dropout = BILLION_WORDS_VOCABULARY, dropout
    return _language_model(
        model,
        steps=27_000,
        rows=BILLION_WORDS_ROWS,
        optimizer=AdamW(
            learning_rate=1e-3,
            schedule=Schedule.INVERSE_SQRT,
            warmup_steps=1000,
            weight_decay=0.0,
            clip_norm=0.0,
            b1=0.9,
            b2=0.999,
        ),
        gpus=gpus,
    )


def news(model: RecurrentLMConfig, *, gpus: int = 32) -> Experiment:
    """One epoch of 100 billion words (appendix D).

    The hidden layers of experts are computed again in the backward pass, and Adam has no first and
    factored second moments; the paper's had so for experts only.
    """
    model.vocab_size, model.remat_moe = NEWS_VOCABULARY, True
    return _language_model(
        model,
        steps=40_000,
        rows=NEWS_ROWS,
        optimizer=Adafactor(
            learning_rate=1e-3,
            schedule=Schedule.INVERSE_SQRT,
            warmup_steps=1000,
            constant_steps=0,
            b2=0.999,
            decay_exponent=1.0,
            clipping_threshold=0.0,
            scale_by_parameters=False,
        ),
        gpus=gpus,
    )


def _language_model(
    model: RecurrentLMConfig, *, steps: int, rows: int, optimizer: Optimizer, gpus: int
) -> Experiment:
    owners = min(gpus, model.num_experts) or 1
    model.moe.group_size = rows * LENGTH // gpus
    return Experiment(
        steps=steps,
        model=model,
        data=TextData(
            dataset="lm1b",
            domain_feature="",
            held_out_split="test",
            tokenizer=Subword(vocab_size=32_768),
            sequence_length=LENGTH,
            batch_size=rows,
        ),
        optimizer=optimizer,
        mesh=MeshConfig(data=gpus // owners, expert=owners),
        logging=Logging(every=100),
        checkpoint=Checkpointing(every=1000),
        evaluation=Evaluation(every=5000, batches=8),
    )


def english_to_french(num_experts: int, router: Router) -> Experiment:
    data = _pairs("wmt14_translate/fr-en", ("en-fr",))
    return _translator(num_experts, router, data, steps=100_000, dropout=0.4)


def english_to_german(num_experts: int, router: Router) -> Experiment:
    data = _pairs("wmt14_translate/de-en", ("en-de",))
    return _translator(num_experts, router, data, steps=100_000, dropout=0.4)


def multilingual(num_experts: int, router: Router, expert_width: int) -> Experiment:
    """About 3 billion pairs of sentences.

    The paper's corpus is Google's; in its place are the languages of `translations`, which has
    neither Japanese nor Korean, with an instruction in place of a token for the target language.
    """
    pairs = ("fr-en", "de-en", "pt-en", "es-en", "en-fr", "en-de", "en-pt", "en-es")
    data = _pairs("translations", pairs)
    data.instruction = True
    return _translator(num_experts, router, data, steps=375_000, expert_width=expert_width)


def _pairs(dataset: str, pairs: tuple[str, ...]) -> PairData:
    return PairData(
        dataset=dataset,
        pairs=pairs,
        instruction=False,
        tokenizer=Subword(vocab_size=TRANSLATION_VOCABULARY),
        input_length=LENGTH,
        target_length=LENGTH,
        batch_size=TRANSLATION_ROWS,
    )


def _translator(
    num_experts: int,
    router: Router,
    data: PairData,
    *,
    steps: int,
    expert_width: int = 2048,
    dropout: float = 0.0,
) -> Experiment:
    owners = min(TRANSLATION_GPUS, num_experts)
    return Experiment(
        steps=steps,
        model=RecurrentTranslatorConfig(
            vocab_size=TRANSLATION_VOCABULARY,
            width=512,
            units=2048,
            attention_width=512,
            num_experts=num_experts,
            mlp_width=expert_width,
            moe=MoEConfig(
                router=router,
                group_size=TRANSLATION_ROWS * LENGTH // TRANSLATION_GPUS,
                dispatch=Dropless(),
            ),
            dropout=dropout,
        ),
        task=TextToText(),
        data=data,
        optimizer=AdamW(
            learning_rate=1e-3,
            schedule=Schedule.INVERSE_SQRT,
            warmup_steps=2000,
            constant_steps=8000,
            weight_decay=0.0,
            clip_norm=0.0,
            b1=0.9,
            b2=0.999,
        ),
        mesh=MeshConfig(data=TRANSLATION_GPUS // owners, expert=owners),
        logging=Logging(every=100),
        checkpoint=Checkpointing(every=1000),
        evaluation=Evaluation(every=5000, batches=8),
    )


def _benchmark(
    title: str,
    build: Callable[[], Experiment],
    printed: tuple[str, str, str],
    perplexity: str,
    cost: str,
    note: str = "",
    *,
    ops_note: str = "",
    total_note: str = "",
) -> Row:
    """A row of Table 7.

    Args:
      title, build, note: see `Row`.
      printed: operations per timestep, parameters without embeddings and all parameters.
      perplexity: on the test split.
      cost: hours and GPUs, and TFLOPS per GPU.
      ops_note, total_note: of the first and the last of `printed`.
    """
    operations, parameters, total = printed
    table = "Shazeer 2017, Table 7"
    published = (
        Published(Quantity.OPS_PER_TIMESTEP, operations, table, ops_note),
        Published(Quantity.PARAMETERS_WITHOUT_EMBEDDINGS, parameters, table),
        Published(Quantity.PARAMETERS, total, table, total_note),
    )
    result = f"Test perplexity {perplexity} on the 1 Billion Word benchmark after 10 epochs."
    return Row(title, build, published, result, f"{cost} TFLOPS per GPU.", note=note)


def _news(
    title: str,
    build: Callable[[], Experiment],
    printed: tuple[str, str],
    perplexities: tuple[str, str],
    cost: str,
    note: str = "",
) -> Row:
    """A row of Table 8: as `_benchmark`; perplexities after a tenth of the words and after all."""
    operations, parameters = printed
    table = "Shazeer 2017, Table 8"
    published = (
        Published(Quantity.OPS_PER_TIMESTEP, operations, table),
        Published(Quantity.PARAMETERS_WITHOUT_EMBEDDINGS, parameters, table),
    )
    tenth, whole = perplexities
    result = (
        f"Test perplexity {tenth} after a tenth of 100 billion words of Google News and {whole} "
        "after all."
    )
    return Row(title, build, published, result, f"{cost} TFLOPS per GPU.", note=note)


def _translation(
    title: str,
    build: Callable[[], Experiment],
    printed: tuple[str, ...],
    source: str,
    result: str,
    note: str = "",
) -> Row:
    """A translator: operations per timestep are printed, and of some all parameters."""
    quantities = (Quantity.OPS_PER_TIMESTEP, Quantity.PARAMETERS)
    published = tuple(
        Published(quantity, number, f"Shazeer 2017, {source}")
        for quantity, number in zip(quantities, printed, strict=False)
    )
    return Row(title, build, published, result, note=note)


ROWS = {
    "moe_1_wide": _benchmark(
        "MoE-1-Wide: a dense layer of 4096 ReLU units in the place of the MoE.",
        lambda: billion_words(dense(hidden_widths=(4096,)), dropout=0.1),
        ("8.4M", "8.4M", "0.8B"),
        "46.1",
        "12 to 16 hours on 16 K40 GPUs, 1.29",
    ),
    "moe_1_deep": _benchmark(
        "MoE-1-Deep: four dense layers of 1024 ReLU units in the place of the MoE.",
        lambda: billion_words(dense(hidden_widths=(1024, 1024, 1024, 1024)), dropout=0.1),
        ("8.4M", "8.4M", "0.8B"),
        "45.7",
        "12 to 16 hours on 16 K40 GPUs, 1.29",
    ),
    "lstm_4x512": _benchmark(
        "4xLSTM-512: two more LSTM layers in the place of the MoE.",
        lambda: billion_words(dense(num_lstms=4), dropout=0.1),
        ("8.4M", "8.4M", "0.8B"),
        "46.0",
        "12 to 16 hours on 16 K40 GPUs, 1.07",
    ),
    "lstm_2048_512": _benchmark(
        "LSTM-2048-512: one LSTM of 2048 units, projected to 512.",
        lambda: billion_words(dense(num_lstms=1, units=2048), dropout=0.1),
        ("9.4M", "9.4M", "0.8B"),
        "44.7",
        "12 to 16 hours on 16 K40 GPUs, 1.21",
        "A model of Jozefowicz et al. (2016), who print 45.0 after 10 epochs and 43.7 in the end; "
        "here as Shazeer et al. trained it again. Residual connection and dropout are those of the "
        "other models.",
    ),
    "moe_4": _benchmark(
        "MoE-4: 4 experts, all of which every word visits.",
        lambda: billion_words(sparse(4, flat()), dropout=0.1),
        ("8.4M", "8.4M", "0.8B"),
        "45.0",
        "18 hours on 16 K40 GPUs, 0.52",
        "The dense twin of the models with more experts; the hours are MoE-4's own, because only 4 "
        "of the 16 GPUs had an expert.",
    ),
    "moe_32": _benchmark(
        "MoE-32: 4 of 32 experts.",
        lambda: billion_words(sparse(32, flat()), dropout=0.1),
        ("8.4M", "37.8M", "0.9B"),
        "39.7",
        "12 to 16 hours on 16 K40 GPUs, 0.87",
    ),
    "moe_256": _benchmark(
        "MoE-256: 4 of 256 experts, flat.",
        lambda: billion_words(sparse(256, flat()), dropout=0.1),
        ("8.6M", "272.9M", "1.1B"),
        "35.7",
        "12 to 16 hours on 16 K40 GPUs, 0.81",
        "Table 6 varies its losses of importance and load: 39.8 without, 35.6 to 35.7 with any of "
        "five pairs of coefficients.",
        ops_note="not reproduced: 8.65M here, which rounds to 8.7M: 2 LSTMs, 4 experts and the gates "
        "of 256 are 8,650,752 products, and all other rows are counted alike; rounded twice, to 8.65 "
        "and half to even, that is 8.6M",
    ),
    "moe_256_h": _benchmark(
        "MoE-256-h: 2 of 16 experts in each of 2 of 16 groups.",
        lambda: billion_words(sparse(256, hierarchical(16)), dropout=0.1),
        ("8.4M", "272.9M", "1.1B"),
        "36.0",
        "12 to 16 hours on 16 K40 GPUs, 0.89",
    ),
    "moe_1024_h": _benchmark(
        "MoE-1024-h: 2 of 64 experts in each of 2 of 16 groups.",
        lambda: billion_words(sparse(1024, hierarchical(16)), dropout=0.2),
        ("8.5M", "1079.0M", "1.9B"),
        "34.6",
        "12 to 16 hours on 16 K40 GPUs, 0.90",
    ),
    "moe_4096_h": _benchmark(
        "MoE-4096-h: 2 of 256 experts in each of 2 of 16 groups.",
        lambda: billion_words(sparse(4096, hierarchical(16)), dropout=0.2),
        ("8.9M", "4303.4M", "5.1B"),
        "34.1",
        "15 hours on 16 K40 GPUs, 0.74",
        "The low-budget model of Table 1.",
    ),
    "moe_34m": _benchmark(
        "MoE-34M: 2 of 32 experts in each of 2 of 32 groups, width 1024.",
        lambda: billion_words(
            sparse(1024, hierarchical(32), width=1024, units=1024, expert_width=2048),
            dropout=0.3,
            gpus=32,
        ),
        ("33.8M", "4313.9M", "6.0B"),
        "31.3",
        "17 hours on 32 K40 GPUs, 1.22",
        "The medium-budget model of Table 1. Each expert has 2048 hidden units.",
        total_note="not reproduced: 5.94B here, which rounds to 5.9B: 4313.9M and two tables of "
        "793,471 x 1024; MoE-143M has the same tables, 57M parameters more, and 6.0B",
    ),
    "moe_143m": _benchmark(
        "MoE-143M: 2 of 8 experts in each of 2 of 32 groups, width 1024.",
        lambda: billion_words(
            sparse(256, hierarchical(32), width=1024, units=4096, expert_width=8192),
            dropout=0.4,
            gpus=32,
        ),
        ("142.7M", "4371.1M", "6.0B"),
        "28.0",
        "47 hours on 32 K40 GPUs, 1.56",
        "The high-budget model of Table 1. LSTMs have 4096 units, projected to 1024, and each expert "
        "8192 hidden units.",
    ),
    "news_lstm_4x512": _news(
        "4xLSTM-512 on 100 billion words: two more LSTM layers in the place of the MoE.",
        lambda: news(dense(num_lstms=4)),
        ("8.4M", "8.4M"),
        ("54.5", "47.0"),
        "32 K40 GPUs, 1.23",
    ),
    "news_moe_32": _news(
        "MoE-32 on 100 billion words: 4 of 32 experts.",
        lambda: news(sparse(32, flat())),
        ("8.4M", "37.8M"),
        ("48.5", "40.4"),
        "32 K40 GPUs, 0.83",
    ),
    "news_moe_256_h": _news(
        "MoE-256-h on 100 billion words: 2 of 8 experts in each of 2 of 32 groups.",
        lambda: news(sparse(256, hierarchical(32))),
        ("8.4M", "272.9M"),
        ("42.8", "35.3"),
        "32 K40 GPUs, 1.11",
    ),
    "news_moe_1024_h": _news(
        "MoE-1024-h on 100 billion words: 2 of 32 experts in each of 2 of 32 groups.",
        lambda: news(sparse(1024, hierarchical(32))),
        ("8.5M", "1079.0M"),
        ("40.3", "32.7"),
        "32 K40 GPUs, 1.14",
    ),
    "news_moe_4096_h": _news(
        "MoE-4096-h on 100 billion words: 2 of 64 experts in each of 2 of 64 groups.",
        lambda: news(sparse(4096, hierarchical(64))),
        ("8.6M", "4303.4M"),
        ("38.9", "30.9"),
        "32 K40 GPUs, 1.07",
    ),
    "news_moe_16384_h": _news(
        "MoE-16384-h on 100 billion words: 2 of 128 experts in each of 2 of 128 groups.",
        lambda: news(sparse(16_384, hierarchical(128))),
        ("8.8M", "17201.0M"),
        ("38.2", "29.7"),
        "32 K40 GPUs, 0.96",
    ),
    "news_moe_65536_h": _news(
        "MoE-65536-h on 100 billion words: 2 of 256 experts in each of 2 of 256 groups.",
        lambda: news(sparse(65_536, hierarchical(256)), gpus=64),
        ("9.2M", "68791.0M"),
        ("38.2", "28.9"),
        "64 K40 GPUs, 0.72",
        "The best of the series.",
    ),
    "news_moe_131072_h": _news(
        "MoE-131072-h on 100 billion words: 2 of 512 experts in each of 2 of 256 groups.",
        lambda: news(sparse(131_072, hierarchical(256)), gpus=128),
        ("9.7M", "137577.6M"),
        ("39.8", "29.2"),
        "128 K40 GPUs, 0.30",
        'Worse than half as many experts: "possibly a result of too much sparsity" (section 5.2).',
    ),
    "translation_en_fr_32": _translation(
        "English to French with 32 experts in each MoE, of which a token visits 4.",
        lambda: english_to_french(32, flat(k=4, loss_weight=0.01)),
        ("85M",),
        "Figure 4",
        "Its perplexity is a curve of Figure 4 (appendix E).",
    ),
    "translation_en_fr_512_h": _translation(
        "English to French with 512 experts in each MoE: 2 of 16 in each of 2 of 32 groups.",
        lambda: english_to_french(512, hierarchical(32, loss_weight=0.01)),
        ("85M",),
        "Figure 4",
        "Its perplexity is a curve of Figure 4 (appendix E).",
    ),
    "translation_en_fr_2048_h": _translation(
        "English to French with 2048 experts in each MoE: 2 of 32 in each of 2 of 64 groups.",
        lambda: english_to_french(2048, hierarchical(64, loss_weight=0.01)),
        ("85M", "8.7B"),
        "Table 2",
        "newstest2014: perplexity 2.69 and BLEU 40.35 after 3 days on 64 K40 GPUs, 2.63 and 40.56 "
        "after 6 (GNMT: 2.79 and 39.22, 6 days on 96 K80s). Table 4, Google's own data: test "
        "perplexity 2.69 and BLEU 36.57 after a day.",
    ),
    "translation_en_de_2048_h": _translation(
        "English to German with 2048 experts in each MoE: 2 of 32 in each of 2 of 64 groups.",
        lambda: english_to_german(2048, hierarchical(64, loss_weight=0.01)),
        ("85M", "8.7B"),
        "Table 3",
        "newstest2014: perplexity 4.64 and BLEU 26.03 after a day on 64 K40 GPUs (GNMT: 5.25 and "
        "24.91, a day on 96 K80s).",
    ),
    "translation_multilingual_512": _translation(
        "Twelve language pairs at once with 512 wide experts in each MoE, of which a token visits 2.",
        lambda: multilingual(512, flat(k=2, loss_weight=0.01), expert_width=8192),
        ("102M", "8.7B"),
        "Table 5",
        "Perplexity 3.35 on the development set after 12 days on 64 K40 GPUs (GNMT: 4.14, 21 days on "
        "96 K20s), test BLEU better than the multilingual GNMT's for 11 of 12 pairs and than those "
        "of twelve bilingual GNMTs for 8.",
        "Each expert has 8192 hidden units.",
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
