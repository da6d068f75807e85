"""Speeds that papers and projects print, beside the roofline of our training step.

Nobody can run a pod's step on this page; these runs did. A roofline is a bound that no run reaches,
so what matters is how much longer the published step takes, and why.
"""

import dataclasses
from collections.abc import Sequence

from moe_jax.pods.hardware import topology
from moe_jax.pods.report import PodReport

_GSHARD = "Lepikhin et al. 2020, https://arxiv.org/abs/2006.16668, Table 3"
_GLAM = "Du et al. 2022, https://arxiv.org/abs/2112.06905, section 6 and appendix"
_DEEPSEEK = "DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, section 1"
_MAXTEXT = "MaxText, https://maxtext.readthedocs.io/en/latest/reference/models/tiering.html"
_RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes/tree/main/training"


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Attributes: seconds: of a step; formula: what they were computed by from what is printed."""

    seconds: float
    formula: str


def from_rate(steps_per_second: float) -> StepTime:
    """Of a run whose steps per second are printed."""
    return StepTime(1 / steps_per_second, f"1 / ({steps_per_second:g} steps/s)")


def from_seconds(seconds: float) -> StepTime:
    """Of a run whose time of a step is printed."""
    return StepTime(seconds, f"{seconds:g} s, as printed")


def from_run(hours: float, tokens: float, batch: float) -> StepTime:
    """Of a run that took so long for so many tokens, or images, in such batches."""
    return StepTime(
        hours * 3600 * batch / tokens, f"{hours:g} h * 3600 s * {batch:.4g} / {tokens:.4g}"
    )


def from_device_hours(hours: float, devices: int, tokens: float, batch: float) -> StepTime:
    """Of a run of which the hours of all devices together are printed."""
    return StepTime(
        hours / devices * 3600 * batch / tokens,
        f"{hours:g} h / {devices} * 3600 s * {batch:.4g} / {tokens:.4g}",
    )


def from_throughput(tokens_per_second: float, devices: int, batch: float) -> StepTime:
    """Of a run of which the tokens per second of one device are printed."""
    return StepTime(
        batch / (tokens_per_second * devices),
        f"{batch:.4g} / ({tokens_per_second:g} /s * {devices})",
    )


@dataclasses.dataclass(frozen=True)
class PublishedSpeed:
    """How fast a model ran on a machine.

    Attributes:
      model: for people.
      config: as --config names it.
      machine: as `moe_jax.pods.hardware.topology` reads it.
      batch: tokens or images of a step, counted as our data do (source and target of a sentence
        pair together).
      step: its time.
      source: where that is printed.
      explanation: why it is not the roofline.
      inference: of the forward pass alone.
    """

    model: str
    config: str
    machine: str
    batch: float
    step: StepTime
    source: str
    explanation: str
    inference: bool = False


_GSHARD_NOTE = (
    "The paper counts 4M or 1M tokens, which we take for those of one side with as many of the "
    "other; if they are both sides together, our step is twice theirs. It finds its forward pass "
    "above 70% of its own roofline with 128 experts and at 48% with 2,048, where all-to-alls are "
    "36% of the time; dispatch and combine are products with one-hot matrices there, and copies "
    "here."
)
_DEEP_NOTE = (
    " With 36 layers its compiler recomputes for 28% of the time; our layout recomputes every "
    "block."
)


def _gshard(experts: int, layers: int, chips: str, tokens: int, steps: float) -> PublishedSpeed:
    """A row of Table 3: `tokens` of one side, `steps` per second."""
    return PublishedSpeed(
        f"GShard MoE({experts}E, {layers}L)",
        f"configs/gshard.py:{experts}e_{layers}l",
        f"v3:{chips}",
        2 * tokens,
        from_rate(steps),
        _GSHARD,
        _GSHARD_NOTE + (_DEEP_NOTE if layers == 36 else ""),
    )


_GLAM_BATCH = 2**20
_GLAM_NOTE = (
    "The paper does not divide the time. Its experts are split in two dimensions, which adds "
    "collectives to their products; the hours may hold checkpoints and restarts too. All 600B tokens "
    "took 456 MWh and these 213, as much for each token, so the rest was as fast if it took as much "
    "power."
)

PUBLISHED_SPEEDS = (
    _gshard(2048, 36, "32x32", 2**22, 0.72),
    _gshard(2048, 12, "32x32", 2**22, 2.15),
    _gshard(512, 36, "16x16", 2**20, 1.05),
    _gshard(512, 12, "16x16", 2**20, 3.28),
    _gshard(128, 36, "8x8", 2**20, 0.67),
    _gshard(128, 12, "8x8", 2**20, 2.16),
    PublishedSpeed(
        "GLaM 64B/64E, first 280B tokens",
        "configs/glam.py:64b_64e",
        "v4:8x8x16",
        _GLAM_BATCH,
        from_run(574, 280e9, _GLAM_BATCH),
        _GLAM,
        _GLAM_NOTE,
    ),
    PublishedSpeed(
        "Mixtral 8x7B by MaxText, 52.6% MFU",
        "configs/mixtral.py:8x7b",
        "v5p:4x4x8",
        1024 * 4096,
        from_throughput(2909, 128, 1024 * 4096),
        f"{_MAXTEXT} (8x4x4 chips, bf16, length 4,096; the page calls these 256 cores 256 chips)",
        "MaxText's MFU counts attention between all positions, ours the half that is causal. The "
        "batch is not printed: the rate is that of a device, set beside our batch. Synthetic "
        "data.",
    ),
    PublishedSpeed(
        "Mixtral 8x7B by MaxText on v6e",
        "configs/mixtral.py:8x7b",
        "v6e:16x16",
        256 * 12 * 4096,
        from_seconds(13.484),
        f"{_RECIPES}/trillium/Mixtral-8x7B-MaxText",
        "FSDP over all chips, 12 sequences for each; activations are moved to the host, and "
        "experts drop what is over a capacity of 1.25, where ours have room for twice the balanced "
        "load. Synthetic data.",
    ),
    PublishedSpeed(
        "Mixtral 8x22B by MaxText on v6e",
        "configs/mixtral.py:8x22b",
        "v6e:16x16",
        256 * 8 * 4096,
        from_seconds(24.706),
        f"{_RECIPES}/trillium/Mixtral-8x22B-MaxText",
        "8 sequences for each chip, and experts that drop what is over their capacity, where ours "
        "have room for twice the balanced load. Synthetic data.",
    ),
    PublishedSpeed(
        "DeepSeek-V3 on 2,048 H800",
        "configs/deepseek_v3.py:v3",
        "gpu-h800-2048",
        15360 * 4096,
        from_device_hours(180e3, 2048, 1e12, 15360 * 4096),
        f"{_DEEPSEEK} (180K GPU hours for a trillion tokens)",
        "A token goes to four hosts at most and from there over NVLink, and stages of a pipeline keep "
        "layers apart; our layout gathers the parameters of all, and sends rows to the devices of an expert's `model` axis "
        "over the network, each of which gets all of them. Most products are FP8, at twice the bf16 rate "
        "that MFU is relative to. The run also trains a module that "
        "predicts a second token, which our config leaves out. https://arxiv.org/abs/2505.09343 "
        "prints the same speed, 272.8B tokens a day, and 38.9% causal MFU.",
    ),
    PublishedSpeed(
        "DeepSeek-V3 by MaxText on v5p",
        "configs/deepseek_v3.py:v3",
        "v5p:8x8x8",
        512 * 6 * 8192,
        from_seconds(90.668),
        f"{_RECIPES}/v5p/DeepSeek3-671B-MaxText",
        "Sequences of 8,192 tokens, of which ours have half, so that attention takes more. FSDP "
        "alone gathers all experts in every layer, and activations are moved to the host. "
        "Synthetic data.",
    ),
    PublishedSpeed(
        "OLMoE-1B-7B",
        "configs/olmoe.py:1b_7b",
        "gpu-h100-256",
        1024 * 4096,
        from_throughput(23_600, 256, 1024 * 4096),
        "Muennighoff et al. 2024, https://arxiv.org/abs/2409.02060, Figure 4",
        "PyTorch with FSDP: every GPU gathers and runs all 64 experts, whose width of 1,024 makes "
        "small products. The rate is that of a GPU.",
    ),
    PublishedSpeed(
        "V-MoE-S/32, 8 experts, on ImageNet",
        "configs/vmoe.py:imagenet_s32_8e",
        "v3:4x4",
        8192,
        # 300 epochs of the 1,268,356 images.
        from_run(5 + 50 / 60, 300 * 1_268_356, 8192),
        "https://github.com/google-research/vmoe, vmoe_s32_last2_ilsvrc2012_randaug_light1.py",
        "A model of 57M parameters that takes 18,000 images a second, evaluation included: "
        "reading, decoding and augmenting them on the hosts is no part of a roofline.",
    ),
    PublishedSpeed(
        "Soft MoE H/14, 256 experts, inference",
        "configs/soft_moe.py:soft_h14_256e",
        "v3:2x2",
        8,
        # 10.9 ms of a core for an image, so eight cores do eight in that time.
        from_seconds(10.9e-3),
        "Puigcerver et al. 2023, https://arxiv.org/abs/2308.00951, Table 8",
        "The forward pass on one core, at a batch that we do not know, beside its FLOPs at the "
        "peak alone: 256 tokens of an image are few, and its norms, softmaxes and slots are not "
        "products.",
        inference=True,
    ),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A published speed beside our step.

    Attributes:
      published: the speed.
      seconds: roofline of a step of the published batch, if everything overlaps.
      seconds_without_overlap: if nothing does.
      published_mfu: algorithmic FLOPs by our accounting a second of the published step, over the
        bf16 peak of the published machine.
      hardware: of the roofline.
    """

    published: PublishedSpeed
    seconds: float
    seconds_without_overlap: float
    published_mfu: float
    hardware: str

    @property
    def ratio(self) -> float:
        """How many times longer the published step takes than the roofline."""
        return self.published.step.seconds / self.seconds


def compare(published: PublishedSpeed, report: PodReport) -> Comparison | None:
    """Scales our roofline to the published batch and to the peak of the published machine.

    Both are factors of 1 where the report is of the same batch and machine; otherwise collectives
    and memory are scaled along with FLOPs, which is rough.

    Args:
      published: of the report's config.
      report: of a training step.

    Returns:
      None where the step does not fit the report's machine. Of inference a third of the training
      step's algorithmic FLOPs at the peak, which is all that such a report says of it.
    """
    if report.roofline is None or not report.fits:
        return None
    own_chip, machine = topology(report.topology).chip, topology(published.machine)
    peak = machine.devices * machine.chip.matrix_flops
    share = published.batch / report.tokens_per_step
    flops = report.algorithmic_flops_per_device * report.devices * share
    scale = share * report.devices * own_chip.matrix_flops / peak
    terms = report.roofline
    together = terms.step_seconds * scale
    apart = (terms.compute + terms.memory + terms.interconnect + terms.network) * scale
    if published.inference:
        flops /= 3
        together = apart = flops / peak
    return Comparison(
        published, together, apart, flops / peak / published.step.seconds, report.hardware
    )


def find(published: PublishedSpeed, reports: Sequence[PodReport]) -> PodReport | None:
    """The report of its config, of the same machine if there is one; None without any."""
    of_config = [report for report in reports if report.config == published.config]
    machine = topology(published.machine).name
    return min(of_config, key=lambda report: report.hardware != machine, default=None)


def table(reports: Sequence[PodReport]) -> str:
    """A Markdown table of published speeds, below it how each was derived, and how many are left out.

    Args:
      reports: of any configs; a speed without the report of a step that fits is left out.
    """
    lines = [
        "| model | machine | published, s | roofline, s | without overlap, s | ratio | published "
        "MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for published in PUBLISHED_SPEEDS:
        report = find(published, reports)
        found = compare(published, report) if report else None
        if found is None:
            continue
        machine = topology(published.machine).name
        cells = (
            published.model,
            machine,
            f"{published.step.seconds:.3g}",
            f"{found.seconds:.3g}",
            f"{found.seconds_without_overlap:.3g}",
            f"{found.ratio:.1f}",
            f"{found.published_mfu:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
        scaled = (
            f" The roofline is that of {found.hardware}, scaled by peak."
            if found.hardware != machine
            else ""
        )
        notes.append(
            f"- **{published.model}**: {published.step.formula} = {published.step.seconds:.4g} s. "
            f"{published.explanation}{scaled} Source: {published.source}."
        )
    others = len(PUBLISHED_SPEEDS) - len(notes)
    if others:
        rest = (
            f"Another {others} speeds in moe_jax/pods/published_speeds.py need the report of a step "
            "of their config that fits."
        )
        notes += ["", rest]
    return "\n".join([*lines, "", *notes, ""])
