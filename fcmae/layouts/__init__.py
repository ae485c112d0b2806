"""State-dict layouts of the same network: how other code names and shapes the tensors this toolkit trains."""

from __future__ import annotations

from fcmae.layouts import dense, fcmae, hf, hf_vit, mae, minkowski, official, timm
from fcmae.layouts.layout import Layout

# In the order in which they are recognised: ConvNeXt V2's, and ViT's. The authors' MAE has the keys of this toolkit's,
# which only a run's checkpoint tells apart.
LAYOUTS: dict[str, Layout] = {
    module.LAYOUT.name: module.LAYOUT for module in (fcmae, official, minkowski, dense, timm, hf)
}
VIT_LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (mae.OFFICIAL, mae.FCMAE, mae.TIMM, hf_vit.LAYOUT)}
FAMILIES = {"convnext": LAYOUTS, "vit": VIT_LAYOUTS}
