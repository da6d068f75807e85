"""NVIDIA GPUs as XLA sees them, so that it compiles for them where there are none.

XLA's plugin for CUDA (jax-cuda12-plugin and jax-cuda12-pjrt) reads a description of a GPU in place of the
GPU. It needs no driver and no library of CUDA, but the assembler and libdevice, from /usr/local/cuda or the
package nvidia-cuda-nvcc-cu12. Left out of it are the rates of single units, from which XLA only
estimates how long an operation takes.
"""

import dataclasses

# The newest that requirements.lock has: what cuDNN and CUDA can do depends on them.
CUDNN = (9, 28, 0)
CUDA = "12.9.0"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One model in an SXM socket.

    The figures are those that its driver reported to XLA's authors:
    https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs; those of an H800 are an
    H100's but for the links (https://arxiv.org/abs/2505.09343, section 4.1: 400 GB/s in place of 900).

    Attributes:
      name: as the driver reports it.
      capability: CUDA compute capability, major and minor.
      cores: streaming multiprocessors.
      fpus_per_core: float32 units of each.
      shared_memory_per_core: bytes of each.
      shared_memory_per_block: bytes of it that one block of threads may ask for.
      l2_cache: bytes.
      clock: GHz.
      memory: bytes of it that the driver shows.
      memory_bandwidth: bytes/s.
      links: NVLinks.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_cache: int
    clock: float
    memory: int
    memory_bandwidth: int
    links: int

    @property
    def description(self) -> str:
        """For XLA: a `GpuTargetConfigProto` in protobuf's text format."""
        major, minor = self.capability
        # Instructions of one generation alone, which Mosaic's kernels use, exist from Hopper on.
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        cudnn = ".".join(map(str, CUDNN))
        return f"""\
gpu_device_info {{
  name: "{self.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {self.cores}
  fpus_per_core: {self.fpus_per_core}
  clock_rate_ghz: {self.clock}
  shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  l2_cache_size: {self.l2_cache}
  device_memory_size: {self.memory}
  memory_bandwidth: {self.memory_bandwidth}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "{CUDA}"
  runtime_version: "{CUDA}"
  compile_time_toolkit_version: "{CUDA}"
  dnn_version: "{cudnn}"
  device_interconnect_info {{ active_links: {self.links} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
device_description_str: "{self.name}"
"""


_H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    fpus_per_core=128,
    shared_memory_per_core=233_472,
    shared_memory_per_block=232_448,
    l2_cache=52_428_800,
    clock=1.98,
    memory=84_942_979_072,
    memory_bandwidth=3_352_320_000_000,
    links=18,
)

# By the model in a chip's name: gpu-h100.
GPUS = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        fpus_per_core=64,
        shared_memory_per_core=167_936,
        shared_memory_per_block=166_912,
        l2_cache=41_943_040,
        clock=1.41,
        memory=85_100_068_864,
        memory_bandwidth=2_039_040_000_000,
        links=12,
    ),
    "h100": _H100,
    "h800": dataclasses.replace(_H100, name="NVIDIA H800", links=8),
    "h200": dataclasses.replace(
        _H100,
        name="NVIDIA H200",
        memory=151_397_597_184,
        memory_bandwidth=4_800_000_000_000,
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        fpus_per_core=128,
        shared_memory_per_core=233_472,
        shared_memory_per_block=232_448,
        l2_cache=132_644_864,
        clock=1.965,
        memory=191_514_411_008,
        memory_bandwidth=7_672_320_000_000,
        links=18,
    ),
}
