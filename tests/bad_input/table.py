"""Bad input over all scripts: what is typed, and what the one sentence must mention.

In arguments, {tmp} is a folder of `places.py`, {run} a good run folder in it.
"""

import dataclasses

TRAIN = "experiments/train.py"
EVALUATE = "experiments/evaluate.py"
GENERATE = "experiments/generate.py"
CONFIG = "--config=tests/bad_input/config.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
      script: path in the project.
      arguments: after it.
      words: in the sentence.
    """

    script: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        name = self.script.rpartition("/")[2].removesuffix(".py")
        return f"{name} {' '.join(self.arguments)}".replace(f"{CONFIG} ", "")


def train(*arguments: str, words: str) -> Case:
    """`train.py` with the small config and a fresh workdir."""
    return Case(TRAIN, (CONFIG, "--workdir={tmp}/new", *arguments), tuple(words.split("|")))


def field(name: str, value: str, words: str) -> Case:
    """A value that a field of the config cannot have."""
    return train(f"--config.{name}={value}", words=words)


def case(script: str, *arguments: str, words: str) -> Case:
    """Any script."""
    return Case(script, arguments, tuple(words.split("|")))


FLAGS = [
    train("--stepz=3", words="there is no flag --stepz; the nearest is --steps"),
    train("--steps=ten", words="steps|ten"),
    train("--steps=0", words="steps"),
    train("--steps=-5", words="steps"),
    train("--steps=1e3", words="steps|1e3"),
    train("--unheard_of=3", words="there is no flag --unheard_of; --help lists"),
    train("three", words="three|--name=value"),
    train("--mesh=data", words="mesh|data"),
    train("--mesh=data:", words="mesh|data:"),
    train("--mesh=data:²", words="mesh|data:²"),
    train("--mesh=data:0", words="mesh|data|0|at least 1"),
    train("--mesh=data:-1", words="mesh|-1"),
    train("--mesh=rows:2", words="mesh|rows:2|data:2,expert:4"),
    train("--mesh=data:2,data:4", words="mesh|data"),
    train("--mesh=data:2;expert:4", words="mesh"),
    train("--mesh=data:1000000", words="mesh|1000000"),
    train("--topology=v9:2x2", words="topology is 'v9:2x2'|; the chips are tpu-v2, tpu-v3"),
    train("--topology=v4:0x0", words="topology|v4:0x0"),
    train("--topology=v4", words="topology|v4"),
    train("--topology=99999999*v4:2x2x2", words="topology"),
    train("--profile_steps=3", words="profile_steps|FIRST:COUNT"),
    train("--profile_steps=0:2", words="profile_steps|0:2"),
    train("--profile_steps=a:b", words="profile_steps|a:b"),
    train("--process_id=0", words="process_id|coordinator"),
    train(
        "--coordinator=nowhere", "--process_id=0", "--process_count=1", words="coordinator|nowhere"
    ),
    train("--coordinator=localhost:99999", "--process_id=0", "--process_count=1", words="99999"),
    train("--coordinator=localhost:1", "--process_id=5", "--process_count=2", words="process_id|5"),
    train(
        "--coordinator=localhost:1", "--process_id=0", "--process_count=0", words="process_count"
    ),
    train("--import=no_such_module", words="import|no_such_module"),
    train("--import={tmp}/no_such_file.py", words="import|no_such_file.py"),
    train("--import={tmp}/broken.py", words="import|broken.py"),
    train("--import={tmp}/raises.py", words="import|raises.py"),
    case(TRAIN, CONFIG, words="--workdir is not given; write --workdir=VALUE"),
    case(TRAIN, "--workdir={tmp}/new", words="--config"),
    case(TRAIN, CONFIG, "--workdir=", words="--workdir is ''; name a folder"),
    case(TRAIN, CONFIG, "--workdir={tmp}/file", words="--workdir={tmp}/file: File exists"),
    case(TRAIN, CONFIG, "--workdir={tmp}/file/below", words="--workdir={tmp}/file/below: Not a"),
    case(TRAIN, CONFIG, "--workdir={tmp}/" + "n" * 300, words="shorter"),
    case(TRAIN, CONFIG, "--workdir={tmp}/loop", words="--workdir={tmp}/loop: |links are meant"),
    case(
        TRAIN,
        CONFIG,
        "--workdir={tmp}/loop/below",
        words="--workdir={tmp}/loop/below: |links are meant",
    ),
    case(TRAIN, CONFIG, "--workdir=/proc/nowhere", words="--workdir=/proc/nowhere: No such"),
]

CONFIG_FILES = [
    case(TRAIN, f"--config={path}", "--workdir={tmp}/new", words=words)
    for path, words in (
        ("configs/missing.py", "configs/missing.py"),
        ("", "--config"),
        ("{tmp}", "--config"),
        ("{tmp}/loop/config.py", "--config"),
        ("{tmp}/" + "n" * 300 + ".py", "--config"),
        ("{tmp}/empty.py", "empty.py|get_config"),
        ("{tmp}/broken.py", "broken.py"),
        ("{tmp}/raises.py", "raises.py"),
        ("{tmp}/binary.py", "binary.py"),
        ("{tmp}/imports_nothing.py", "imports_nothing.py|no_such_module"),
        ("{tmp}/returns_none.py", "get_config|Experiment"),
        ("{tmp}/returns_model.py", "get_config|Experiment"),
        ("{tmp}/config.json", "config.json"),
        ("configs/olmoe.py:small", "small"),
        ("configs/switch.py", "switch"),
        ("configs/switch.py:", "switch"),
        ("configs/switch.py:huge", "huge"),
    )
]  # fmt: skip

FIELDS = [
    field(
        "model.widht",
        "64",
        "no field 'widht'; the nearest is 'width'|python -m pydoc moe_jax.models",
    ),
    field("modle.width", "64", "no field 'modle'; the nearest is 'model'"),
    field("model.moe.router.q", "2", "no field 'q'"),
    field("model.width", "wide", "width|wide"),
    field("model.width", "1.5", "width|1.5"),
    field("model.width", "", "width"),
    field("model.width", "0", "model.width is 0|at least 1"),
    field("model.width", "-64", "model.width is -64"),
    field("model.width", "1048576000", "GB"),
    field("model.num_layers", "0", "num_layers is 0"),
    field("model.num_layers", "10000000", "num_layers is 10000000"),
    field("model.num_layers", "3", "moe_every is 2|num_layers=3"),
    field("model.num_heads", "0", "num_heads is 0"),
    field("model.head_width", "7", "head_width|7"),
    field("model.mlp_width", "0", "mlp_width is 0"),
    field("model.num_experts", "0", "num_experts is 0|at least 1"),
    field("model.num_experts", "6", "num_experts is 6|4 devices|such as 8"),
    field("model.moe_every", "-1", "moe_every is -1"),
    field("model.moe_at", "(9,)", "moe_at"),
    field("model.moe_at", "(1,1)", "moe_at"),
    field("model.moe_at", "x", "moe_at"),
    field("model.vocab_size", "200", "vocab_size is 200"),
    field("model.vocab_size", "0", "vocab_size is 0"),
    field("model.max_length", "0", "max_length is 0"),
    field("model.dropout", "1.0", "dropout is 1.0"),
    field("model.dropout", "nan", "dropout is nan"),
    field("model.dropout", "-0.1", "dropout is -0.1"),
    field("model.init_scale", "-1", "init_scale is -1"),
    field("model.init_scale", "inf", "init_scale is inf"),
    field("model.norm_epsilon", "-1", "norm_epsilon is -1"),
    field("model.dtype", "float8", "dtype is 'float8'; it must be one of float32, bfloat16"),
    field("model.remat", "some", "remat|some"),
    field("model.norm", "batch", "norm|batch"),
    field("model.tied", "maybe", "tied|maybe"),
    field("model.moe.router.k", "0", "model.moe.router.k is 0"),
    field("model.moe.router.k", "9", "model.moe.router.k is 9|8 experts"),
    field("model.moe.router.k", "two", "router.k|two"),
    field("model.moe.router.gate_scale", "0", "gate_scale is 0"),
    field("model.moe.router.gate_scale", "inf", "gate_scale is inf"),
    field("model.moe.router.losses.load_balancing", "-1", "load_balancing is -1"),
    field("model.moe.router.losses.load_balancing", "nan", "load_balancing is nan"),
    field("model.moe.router.losses.devices", "3", "model.moe.router.losses.devices is 3|8 experts"),
    field("model.moe.router.order", "last", "order|last"),
    field("model.moe.capacity.train_factor", "0", "train_factor is 0|1.25"),
    field("model.moe.capacity.train_factor", "-1", "model.moe.capacity.train_factor is -1"),
    field("model.moe.capacity.evaluation_factor", "inf", "evaluation_factor is inf"),
    field("model.moe.capacity.rule", "none", "rule|none"),
    field("model.moe.group_size", "-1", "model.moe.group_size is -1"),
    field("model.moe.group_size", "600", "group_size is 600|512 works (4 of the batch's rows)"),
    field("model.moe.group_size", "4096", "group_size=4096|1024 works (8 of the batch's rows)"),
    field("model.moe.group_rows", "0", "group_rows is 0"),
    field("model.moe.expert_layers", "0", "expert_layers is 0"),
    field("model.moe.expert_dropout", "1", "expert_dropout is 1"),
    field("model.moe.shared_experts", "-1", "shared_experts is -1"),
    field("model.moe.dispatch.transport", "ragged", "transport is ragged|Dropless"),
    field("model.moe.dispatch.transport", "pigeon", "transport|pigeon"),
    field("model.moe.experts.activation", "tanh", "activation|tanh"),
    field("data.batch_size", "0", "batch_size is 0"),
    field("data.batch_size", "63", "batch_size is 63|8 devices|such as 64"),
    field("data.batch_size", "-64", "batch_size is -64"),
    field("data.sequence_length", "0", "sequence_length is 0"),
    field("data.sequence_length", "256", "sequence_length is 256|max_length"),
    field("data.dataset", "wikipedia", "wikipedia|python_library"),
    field("data.dataset", "./nowhere", "./nowhere|dataset_info.json; name one that has"),
    field("data.dataset", "../../etc/passwd", "../../etc/passwd"),
    field("data.dataset", "a/b/c", "a/b/c"),
    field("data.dataset", "", "dataset"),
    field("data.dataset", "{tmp}/file", "{tmp}/file"),
    field("data.dataset", "x" * 300, "--config.data.dataset=xxx|name a shorter path"),
    field("optimizer.learning_rate", "0", "learning_rate is 0"),
    field("optimizer.learning_rate", "-1", "learning_rate is -1"),
    field("optimizer.learning_rate", "inf", "learning_rate is inf"),
    field("optimizer.learning_rate", "nan", "learning_rate is nan"),
    field("optimizer.epsilon", "0", "epsilon is 0"),
    field("optimizer.warmup_steps", "-1", "warmup_steps is -1"),
    field("optimizer.weight_decay", "inf", "weight_decay is inf"),
    field("optimizer.schedule", "step", "schedule|step"),
    field("mesh.data", "0", "mesh.data is 0"),
    field("mesh.data", "64", "batch_size is 64|256 devices"),
    field("mesh.expert", "3", "expert"),
    field("mesh.expert", "-1", "mesh.expert is -1"),
    field("mesh.host_devices", "-1", "host_devices is -1|with 0 it has"),
    field("mesh.host_devices", "100000", "host_devices is 100000|at most"),
    field("microbatches", "0", "microbatches is 0"),
    field("microbatches", "3", "microbatches is 3"),
    field("microbatches", "1000000", "microbatches"),
    field("seed", "-1", "seed is -1"),
    field("seed", "99999999999999999999", "seed"),
    field("steps", "0", "steps is 0"),
    field("steps", "x", "steps|x"),
    field("checkpoint.every", "0", "checkpoint.every is 0"),
    field("checkpoint.keep", "-1", "checkpoint.keep is -1"),
    field("evaluation.every", "-1", "evaluation.every is -1"),
    field("evaluation.batches", "0", "evaluation.batches is 0"),
    field("logging.every", "0", "logging.every is 0"),
]

OF_A_RUN = [
    *(
        case(script, "--workdir={tmp}/" + folder, words=words)
        for script in (EVALUATE, GENERATE)
        for folder, words in (
            ("nowhere", "nowhere|config.json"),
            ("file", "file"),
            ("loop", "loop"),
            ("empty", "config.json"),
            ("n" * 300, "n" * 100),
            ("run_config_is_list", "config.json|bring back a copy of it."),
            ("run_config_is_null", "config.json|bring back a copy of it."),
            ("run_config_is_empty", "config.json"),
            ("run_config_is_cut", "config.json"),
            ("run_config_is_binary", "config.json"),
            ("run_config_is_folder", "config.json"),
            ("run_config_of_a_stranger", "config.json|evil"),
            ("run_config_type_is_list", "config.json"),
            ("run_config_width_is_text", "width"),
            ("run_config_has_more", "config.json|no field 'colour'|more, which python -m pydoc"),
            ("run_without_checkpoints", "checkpoint"),
            ("run_with_cut_array", "bring back a copy of one."),
            ("run_with_empty_manifest", "checkpoints|bring back a copy of one."),
            ("run_with_list_manifest", "manifest.json"),
            ("run_with_binary_manifest", "manifest.json"),
        )
    ),
    case(EVALUATE, words="workdir|checkpoint"),
    case(EVALUATE, "--workdir={run}", "--checkpoint=hf:{tmp}/empty", words="workdir|checkpoint"),
    case(EVALUATE, "--checkpoint=hf:{tmp}/empty", CONFIG, words="empty"),
    case(EVALUATE, "--checkpoint=hf:{tmp}/empty", words="--config"),
    case(EVALUATE, "--workdir={tmp}/run_of_vanished_data", words="./vanished"),
    case(
        EVALUATE,
        "--workdir={run}",
        "--split=nowhere",
        words="split='nowhere'|train, validation, test; name one of them",
    ),
    case(EVALUATE, "--workdir={run}", "--split=", words="split"),
    case(EVALUATE, "--workdir={run}", "--split=train[5:", words="split"),
    case(
        EVALUATE, "--workdir={run}", "--batches=0", words="--batches is '0'; it must be at least 1"
    ),
    case(EVALUATE, "--workdir={run}", "--batches=many", words="batches|many"),
    case(EVALUATE, "--workdir={run}", "--mesh=data:3", words="3"),
    case(EVALUATE, "--workdir={run}", "--saturation_from=3", words="saturation_from|3"),
    case(
        EVALUATE,
        "--workdir={run}",
        "--format=xml",
        words="--format is 'xml'; it must be one of table, json",
    ),
    case(EVALUATE, "--workdir={run}", "--import=no_such_module", words="no_such_module"),
    case(GENERATE, words="workdir|checkpoint"),
    case(GENERATE, "--workdir={run}", "--temperature=-1", words="temperature"),
    case(GENERATE, "--workdir={run}", "--temperature=nan", words="temperature"),
    case(GENERATE, "--workdir={run}", "--top_k=-1", words="top_k"),
    case(
        GENERATE,
        "--workdir={run}",
        "--beams=-1",
        words="--beams is -1; it must be the number of hypotheses",
    ),
    case(GENERATE, "--workdir={run}", "--max_new_tokens=0", words="max_new_tokens"),
    case(GENERATE, "--workdir={run}", "--max_new_tokens=5000", words="max_new_tokens"),
    case(GENERATE, "--workdir={run}", "--prompt=" + "a" * 5000, words="prompt"),
    case(GENERATE, "--workdir={run}", "--mesh=model:3", words="model"),
    case(GENERATE, "--workdir={run}", "--checkpoint=hf:{tmp}/empty", words="checkpoint"),
    case(GENERATE, "--checkpoint={tmp}/empty", words="checkpoint|hf:"),
    case(GENERATE, "--checkpoint=hf:", words="checkpoint"),
    case(GENERATE, "--checkpoint=hf:{tmp}/nowhere", words="nowhere"),
    case(GENERATE, "--checkpoint=hf:{tmp}/empty", words="empty"),
    case(GENERATE, "--checkpoint=hf:{tmp}/file", words="file"),
    case(GENERATE, "--checkpoint=hf:{tmp}/loop", words="loop"),
]

TO_TEXT = "--config=configs/tiny/encoder_decoder.py"

OF_A_CHECKPOINT = [
    case(EVALUATE, "--checkpoint=hf:{tmp}/hf_t5", CONFIG, words="hf_t5|LanguageModeling|--config="),
    case(EVALUATE, "--checkpoint=hf:{tmp}/hf_t5", TO_TEXT, words="0 of T5's sentinels|5 spans|lower"),
    case(
        EVALUATE, "--checkpoint=hf:{tmp}/hf_t5", TO_TEXT, "--config.data.input_length=1",
        words="data.input_length is 1|at least 3",
    ),
    case(
        EVALUATE, "--checkpoint=hf:{tmp}/hf_without_tokenizer", TO_TEXT,
        words="hf_without_tokenizer has no tokenizer.json|save_pretrained",
    ),
    case(EVALUATE, "--checkpoint=hf:{tmp}/hf_pads_with_3", TO_TEXT, words="pads with token 3 (pad_token_id)|with 0"),
    case(
        EVALUATE, "--checkpoint=hf:{tmp}/hf_large_tokenizer", TO_TEXT,
        words="tokenizer.json of 53 tokens|vocab_size=48",
    ),
    case(
        GENERATE, "--checkpoint=hf:{tmp}/hf_without_tokenizer",
        words="hf_without_tokenizer has no tokenizer.json|save_pretrained",
    ),
    case(
        GENERATE, "--checkpoint=hf:{tmp}/hf_without_start",
        words="decoder_start_token_id=None|name the token that targets begin with",
    ),
    case(
        GENERATE, "--checkpoint=hf:{tmp}/hf_large_tokenizer", "--prompt=1 48",
        words="token 51|vocab_size is 48",
    ),
    case(GENERATE, "--checkpoint=hf:{tmp}/hf_t5", "--beams=2", "--top_k=3", words="beams|top_k"),
]  # fmt: skip

OTHERS = [
    case("experiments/prepare_data.py", words="--dataset"),
    case("experiments/prepare_data.py", "--dataset=imagenet", words="imagenet|mnist5k"),
    case("experiments/prepare_data.py", "--dataset=../x", words="../x"),
    case(
        "experiments/prepare_data.py", "--dataset=mnist5k", "--data_dir={tmp}/file",
        words="{tmp}/file",
    ),
    case("experiments/compile_pod.py", CONFIG, words="topology"),
    case("experiments/compile_pod.py", CONFIG, "--topology=tpu", words="topology|tpu"),
    case("experiments/compile_pod.py", CONFIG, "--topology=v5e:3x3x3", words="v5e:3x3x3"),
    case("experiments/compile_pod.py", CONFIG, "--topology=v5e:2x2", "--mesh=data:3", words="data"),
    case("experiments/compile_pod.py", "--topology=v5e:2x2", words="--config"),
    case(
        "experiments/compile_pod.py", CONFIG, "--topology=v5e:2x2", "--search_limit=0",
        words="search_limit",
    ),
    case("experiments/profile_step.py", CONFIG, "--steps=0", words="steps"),
    case("experiments/profile_step.py", CONFIG, "--mesh=data:64", words="64"),
    case("experiments/profile_step.py", CONFIG, "--format=xml", words="format|xml"),
    case("experiments/profile_step.py", words="--config"),
    case("experiments/paper_tables.py", "--paper=unknown", words="paper|unknown"),
    case("experiments/paper_tables.py", "--paper=../setup", words="paper|../setup"),
    case("experiments/reproduce.py", "--claim=unknown", words="claim|unknown"),
    case("experiments/reproduce.py", "--profile=tpu", words="profile|tpu"),
    case("experiments/reproduce.py", "--workdir={tmp}/file", words="--workdir={tmp}/file: {tmp}/file/"),
    case("experiments/publish_claims.py", "--report={tmp}/nowhere", words="nowhere"),
    case("experiments/publish_claims.py", "--report={tmp}/empty", words="empty"),
    case("experiments/publish_claims.py", "--report={tmp}", words="config.json"),
    case("experiments/pod_scaling.py", "--model=unknown", words="model|unknown"),
    case("experiments/pod_scaling.py", "--devices=many", words="devices|many"),
    case("experiments/pod_scaling.py", "--devices=0", words="devices|0"),
    case("experiments/pod_tables.py", "--compile", "--only=unknown", words="only|unknown"),
    case("experiments/jacobs_1991.py", "--seeds=0", words="seeds"),
    case("experiments/jacobs_1991.py", "--seeds=x", words="seeds|x"),
    case("experiments/jordan_jacobs_1994.py", "--seeds=-1", words="seeds"),
    case("experiments/jordan_jacobs_1994.py", "--gradient_epochs=0", words="gradient_epochs"),
    case("experiments/moe_vs_dense.py", "--config.model.widht=3", words="the nearest is 'width'|21 more, which"),
    case("experiments/quickstart.py", "--config.model.widht=3", words="the nearest is 'width'|21 more, which"),
    case("experiments/quickstart.py", "--steps=0", words="steps"),
    case("experiments/quickstart.py", "--steps=2", "--workdir={tmp}/file", words="--workdir={tmp}/file: {tmp}/"),
    case("experiments/api_table.py", "--output={tmp}/nowhere/x.md", words="--output={tmp}/nowhere/x.md: No such"),
    case("experiments/router_table.py", "--output={tmp}", words="--output={tmp}: Is a directory; name a file"),
]  # fmt: skip

CASES = [*FLAGS, *CONFIG_FILES, *FIELDS, *OF_A_RUN, *OF_A_CHECKPOINT, *OTHERS]
