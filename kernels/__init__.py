"""Kernels on packed visible tiles. Not public API: the models call these through `fcmae.models.support`."""

if __name__ == "kernels":
    # From a checkout this folder hides the PyPI package of that name, for which others look, such as transformers: they
    # shall find it, or else nothing; and whoever means this folder the right name.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _elsewhere = [place for place in sys.path if os.path.abspath(place) != _checkout]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    __path__: list[str] = []

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("this folder is the package fcmae.kernels: import that (after `pip install -e .`)")

else:

    def backends() -> dict[str, str]:
        """What the `native` backend runs on each device that is here: a fallback is never silent."""
        import torch

        from fcmae.kernels.devices import active

        devices = [
            "cpu",
            *(["cuda"] if torch.cuda.is_available() else []),
            *(["mps"] if torch.backends.mps.is_available() else []),
        ]
        return {name: active(torch.device(name)) for name in devices}
