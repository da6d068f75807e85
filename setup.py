"""Package metadata: the only place that names dependencies. `make lock` pins them in requirements.lock."""

from setuptools import find_namespace_packages, find_packages, setup

# An installed package has no checkout beside it, so the published configs travel in moe_jax/shipped/,
# where --config=configs/... finds them.
CONFIGS = find_namespace_packages(include=["configs", "configs.*"])

setup(
    name="moe_jax",
    version="0.2.0",
    description="Mixture-of-Experts papers in JAX and Flax: reproduce, compare, extend.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["moe_jax", "moe_jax.*"]),
        *(f"moe_jax.shipped.{name}" for name in CONFIGS),
    ],
    package_dir={f"moe_jax.shipped.{name}": name.replace(".", "/") for name in CONFIGS},
    install_requires=[
        "absl-py",
        "array_record",
        "etils[epath]",
        "flax>=0.12.8",
        "fonttools",
        "grain>=0.2.18",
        "importlib_resources",  # Imported by tensorflow-datasets, which does not ask for it.
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "markdown-it-py",
        "matplotlib",
        "ml_collections>=1.1.0",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow",
        "polib",
        "safetensors",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        # Peterson and Barney's vowels are in it; GPL-3, so not among the requirements.
        "vowels": ["praat-parselmouth"],
        "test": [
            "beartype>=0.23.1",  # Checks the shapes that jaxtyping writes.
            "hypothesis",
            "mypy",
            "praat-parselmouth",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
        ],
        # To drive a browser that opens reports.
        "browser": ["selenium"],
        # To execute notebooks without a browser.
        "notebooks": ["ipykernel", "nbclient"],
        # To compare with another implementation; pinned, because the committed outputs are theirs.
        "parity": ["torch==2.13.0", "transformers==5.23.0"],
        # In an environment of its own: it opens what moe_jax wrote, and needs older libraries.
        "transformers4": ["torch==2.13.0", "transformers==4.57.6"],
        "gpu": ["jax[cuda12]", "tokamax>=0.0.12"],
        # Compiles for GPUs where there is none: of jax[cuda12] XLA's plugin and CUDA's assembler alone.
        "gpu-compiler": [
            "jax-cuda12-pjrt",
            "jax-cuda12-plugin",
            "nvidia-cuda-nvcc-cu12; sys_platform == 'linux'",
            "tokamax>=0.0.12",
        ],
        "tpu": ["jax[tpu]"],
        # For checkpoints in gs:// buckets.
        "gcs": ["gcsfs"],
    },
)
