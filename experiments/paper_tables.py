"""Every published model beside what its paper prints of it.

    python experiments/paper_tables.py [--paper=glam] [--format=table|markdown|json]

Each row of configs/<paper>.py with published numbers is built abstractly (1.6 trillion parameters
take no memory), counted, and compared: published, computed, relative error, verdict. The
verdict is `ok` within the rounding of the printed number, `erratum` where the paper contradicts itself
or its code, `not reproduced` where its own shape gives another number: their notes have both numbers.
`differs` is without a note, and makes the exit status 2.
--format=markdown is the page docs/published_models.md.
"""

import collections
import dataclasses
import importlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

from absl import flags
from tqdm import tqdm

from moe_jax import command_line
from moe_jax.analysis.published import CheckedNumber, compare
from moe_jax.errors import UserError
from moe_jax.training.rows import Row

_PAPER = flags.DEFINE_string("paper", "", "File in configs/ without .py; all papers if not given.")
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "markdown", "json"], "What stdout gets.")

PAPERS = {
    "base_layers": ("BASE, Lewis et al. 2021", "https://arxiv.org/abs/2103.16716"),
    "clark_2022": ("Scaling laws, Clark et al. 2022", "https://arxiv.org/abs/2202.01169"),
    "deepseek_moe": ("DeepSeekMoE, Dai et al. 2024", "https://arxiv.org/abs/2401.06066"),
    "deepseek_v2": ("DeepSeek-V2, 2024", "https://arxiv.org/abs/2405.04434"),
    "deepseek_v3": ("DeepSeek-V3, 2024", "https://arxiv.org/abs/2412.19437"),
    "deepspeed_moe": ("DeepSpeed-MoE, Rajbhandari et al. 2022", "https://arxiv.org/abs/2201.05596"),
    "expert_choice": ("Expert Choice, Zhou et al. 2022", "https://arxiv.org/abs/2202.09368"),
    "glam": ("GLaM, Du et al. 2022", "https://arxiv.org/abs/2112.06905"),
    "gshard": ("GShard, Lepikhin et al. 2021", "https://arxiv.org/abs/2006.16668"),
    "megablocks": ("MegaBlocks, Gale et al. 2023", "https://arxiv.org/abs/2211.15841"),
    "mixtral": ("Mixtral, Jiang et al. 2024", "https://arxiv.org/abs/2401.04088"),
    "olmoe": ("OLMoE, Muennighoff et al. 2024", "https://arxiv.org/abs/2409.02060"),
    "shazeer_2017": ("Sparsely gated MoE, Shazeer et al. 2017", "https://arxiv.org/abs/1701.06538"),
    "soft_moe": ("Soft MoE, Puigcerver et al. 2023", "https://arxiv.org/abs/2308.00951"),
    "st_moe": ("ST-MoE, Zoph et al. 2022", "https://arxiv.org/abs/2202.08906"),
    "switch": ("Switch Transformer, Fedus et al. 2021", "https://arxiv.org/abs/2101.03961"),
    "upcycling": ("Sparse upcycling, Komatsuzaki et al. 2022", "https://arxiv.org/abs/2212.05055"),
    "vmoe": ("V-MoE, Riquelme et al. 2021", "https://arxiv.org/abs/2106.05974"),
}
# Notes begin so where ours differs from the print.
EXPLAINED = ("erratum", "not reproduced")


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A row of a config file that has published numbers; `paper` and `model` are their names."""

    paper: str
    model: str
    row: Row


def published_models(paper: str = "") -> Iterator[PublishedModel]:
    """Imports the config file of a paper, or of all, and gives its rows by name.

    Raises:
      UserError: there is no such paper.
    """
    if paper and paper not in PAPERS:
        raise UserError(f"--paper is {paper!r}; it must be one of {', '.join(PAPERS)}.")
    for name in [paper] if paper else PAPERS:
        rows: dict[str, Row] = importlib.import_module(f"configs.{name}").ROWS
        for model, row in sorted(rows.items()):
            if row.published:
                yield PublishedModel(name, model, row)


def checked_numbers(model: PublishedModel) -> list[CheckedNumber]:
    """Counts a model."""
    experiment = model.row.build()
    return compare(model.paper, model.model, experiment.model, experiment.data, model.row.published)


def verdict(row: CheckedNumber) -> str:
    """`ok`, one of EXPLAINED, or `differs`."""
    if row.ok:
        return "ok"
    return next((kind for kind in EXPLAINED if f"{kind}:" in row.note), "differs")


def main() -> None:
    """Counts and prints.

    Raises:
      UserError: a number differs and no note explains it.
    """
    models = list(published_models(_PAPER.value))
    counted = [(model, checked_numbers(model)) for model in tqdm(models, unit="model", leave=False)]
    rows = [row for _, of_model in counted for row in of_model]
    if _FORMAT.value == "json":
        print(json.dumps([_json(row) for row in rows], indent=1))
    elif _FORMAT.value == "markdown":
        print(page(counted), end="")
    else:
        print(table(rows))
    differs = [f"{row.paper}/{row.model}" for row in rows if verdict(row) == "differs"]
    if differs:
        raise UserError(
            f"{len(differs)} of {len(rows)} published numbers are not met, and no note explains them: "
            f"{', '.join(dict.fromkeys(differs))}; correct the config, or note the erratum."
        )


def _json(row: CheckedNumber) -> dict[str, Any]:
    """Its numbers, without their text."""
    text = ("printed", "computed_as_printed")
    return {name: value for name, value in dataclasses.asdict(row).items() if name not in text}


def table(rows: list[CheckedNumber]) -> str:
    """For a terminal."""
    lines = [
        f"{'model':34}{'quantity':44}{'published':>11}{'computed':>15}{'error':>9}  {'verdict':14} note"
    ]
    for row in rows:
        lines.append(
            f"{row.paper + '/' + row.model:34}{row.quantity:44}{row.printed:>11}"
            f"{row.computed_as_printed:>15}{100 * row.relative_error:>8.2f}%  {verdict(row):14} {row.note}"
        )
    counts = collections.Counter(verdict(row) for row in rows)
    lines.append(f"{len(rows)} rows: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    return "\n".join(lines)


def page(counted: list[tuple[PublishedModel, list[CheckedNumber]]]) -> str:
    """docs/published_models.md: a line for each model, with links."""
    lines = [
        "# Published models",
        "",
        "<!-- Written by `python experiments/paper_tables.py --format=markdown`; a test compares. -->",
        "",
        "Each is a config; its parameters and FLOPs are counted from the modules that train. *ok*: within",
        "the rounding of the print. *erratum*: the paper contradicts itself or its code. *not reproduced*:",
        "its printed shape gives another number, and we do not know why. The config has both numbers.",
        "Hash Layers, THOR, Jacobs 1991 and Jordan & Jacobs 1994 have configs but no printed counts, or",
        "none whose shape is printed, too.",
        "",
    ]
    for paper, models in itertools.groupby(counted, key=lambda pair: pair[0].paper):
        citation, link = PAPERS[paper]
        lines += [f"## [{citation}]({link})", "", "| model | published | ours | verdict |"]
        lines.append("|---|---|---|---|")
        for model, rows in models:
            config = f"[{model.model}](../configs/{paper}.py)"
            published = "; ".join(f"{row.printed} {row.quantity}" for row in rows)
            ours = "; ".join(row.computed_as_printed for row in rows)
            verdicts = "; ".join(verdict(row) for row in rows)
            lines.append(f"| {config}: {model.row.title} | {published} | {ours} | {verdicts} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
