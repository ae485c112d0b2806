"""Kernels on packed visible tiles. Not public API: the models call these through `fcmae.models.support`."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package fcmae.kernels, not a top-level module: import fcmae.kernels instead "
        "(after `pip install -e .`)"
    )


def active(device_type: str) -> str:
    """What the `native` backend runs on a kind of device, such as "C++, avx2"; may compile the CPU kernels."""
    if device_type != "cpu":
        return f"PyTorch reference (no {device_type} kernels in this version)"
    from fcmae.kernels import cpu

    kernels, what = cpu.library()
    return what if kernels else f"PyTorch reference ({what})"


def backends() -> dict[str, str]:
    """`active` for every kind of device: a fallback is never silent."""
    return {device_type: active(device_type) for device_type in ("cpu", "cuda", "mps")}
