"""Hierarchical mixture of experts on the dynamics of a robot arm (Jordan and Jacobs 1994).

    python experiments/train.py --config=configs/jordan_jacobs_1994.py:hme --workdir=runs/hme

"Hierarchical Mixtures of Experts and the EM Algorithm", Neural Computation 6(2):181-214: a binary
tree of depth 4, 16 linear experts with 4 outputs, 12 inputs; 15,000 rows to train on and 5,000 to
test on. Hardware and cost are not given. experiments/jordan_jacobs_1994.py trains by EM; this config
is the same model by gradient ascent on the likelihood. The arm is not printed: see
moe_jax/data/robot_arm.py for what is assumed.
"""

from moe_jax.data.robot_arm import RobotArm
from moe_jax.models.mixtures.mixture import MixtureConfig
from moe_jax.tasks.mixture_regression import MixtureRegression
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW
from moe_jax.training.rows import Row, chosen


def hme() -> Experiment:
    return Experiment(
        steps=3000,
        model=MixtureConfig(num_inputs=12, num_outputs=4, branches=(2, 2, 2, 2), deviations=True),
        task=MixtureRegression(classes=False),
        data=RobotArm(batch_size=500),
        optimizer=AdamW(learning_rate=1e-2, weight_decay=0.0),
        logging=Logging(every=50),
        checkpoint=Checkpointing(every=1000),
        evaluation=Evaluation(every=500, batches=10),
    )


ROWS = {
    "hme": Row(
        "Hierarchical mixture of experts on the dynamics of a robot arm (Jordan and Jacobs 1994).",
        hme,
        result="Relative error on the test rows, and epochs to convergence: linear .31 (1); "
        "backpropagation .09 (5,500); this tree by EM .10 (35), with least-squares gates .12 (39); "
        "CART .17, CART with linear leaves .13, MARS .16.",
        ours="Linear .325 (1); backpropagation .032 (1,927); this tree by EM .168 (31), with "
        "least-squares gates .204 (15): docs/results/jordan_jacobs_1994.md.",
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
