"""State-dict layouts of the same network: how other code names and shapes the tensors this toolkit trains."""

from __future__ import annotations

from fcmae.layouts import dense, fcmae, hf, mae, minkowski, official, timm
from fcmae.layouts.layout import Layout

# ConvNeXt V2's, in the order in which they are recognised.
LAYOUTS: dict[str, Layout] = {
    module.LAYOUT.name: module.LAYOUT for module in (fcmae, official, minkowski, dense, timm, hf)
}
VIT_LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (mae.FCMAE, mae.OFFICIAL, mae.TIMM)}
FAMILIES = {"convnext": LAYOUTS, "vit": VIT_LAYOUTS}
