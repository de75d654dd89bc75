"""Which number format a model runs in when nobody says."""

from __future__ import annotations

import torch


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bf16 (x86: AMX or AVX512_BF16; Arm: what oneDNN accepts).

    oneDNN takes bf16 on older CPUs too and is then slower than fp32, so it is not asked on x86.
    """
    if torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT", "NO AVX")):
        # NOTE: private names, which may go: a CPU that cannot be asked counts as one without.
        asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return any(supported is not None and supported() for supported in asked)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(torch.backends.mkldnn.is_available() and supported is not None and supported())


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Of the network and the autoencoder: float16 on a GPU; on a CPU bfloat16 where it multiplies that, else float32."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def automatic_side_dtype(device: torch.device) -> torch.dtype:
    """Of the CLIP towers and the caption decoder, which take little of the time: as they are on a CPU.

    A condition in bf16 would add as much error as the whole network does, and beams would tie differently.
    """
    return torch.float16 if device.type != "cpu" else torch.float32
