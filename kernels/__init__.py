"""Kernels on packed visible tiles. Not public API: the models call these through `fcmae.models.support`."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package fcmae.kernels, not a top-level module: import fcmae.kernels instead "
        "(after `pip install -e .`)"
    )


def backends() -> dict[str, str]:
    """What the `native` backend runs on each kind of device, such as {"cpu": "C++, avx2", …}.

    The first call may compile the CPU kernels.
    """
    from fcmae.kernels import cpu

    kernels, what = cpu.library()
    return {
        "cpu": what if kernels else f"PyTorch reference ({what})",
        "cuda": "PyTorch reference (no GPU kernels in this version)",
        "mps": "PyTorch reference (no MPS kernels)",
    }
