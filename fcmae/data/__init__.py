"""Images in: a source of decoded images, the transform, the dataset keyed by (epoch, index), the loader."""

from fcmae.data.dataset import LabelledImages, MaskedImages
from fcmae.data.loader import SampleStream, make_loader
from fcmae.data.sources import open_source

__all__ = ["LabelledImages", "MaskedImages", "SampleStream", "make_loader", "open_source"]
