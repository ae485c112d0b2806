"""Masked autoencoders for ConvNets (FCMAE) and ViTs: pretraining, conversion, comparison."""

from fcmae.models import create_model
from fcmae.models.fcmae import FCMAE
from fcmae.models.mae import MAE

__all__ = ["FCMAE", "MAE", "create_model"]
__version__ = "0.1.0"
