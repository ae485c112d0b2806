"""State-dict layouts of the same network: how other code names and shapes the tensors this toolkit trains."""

from __future__ import annotations

from fcmae.layouts import dense, fcmae, hf, minkowski, official, timm
from fcmae.layouts.layout import Layout

# In the order in which they are recognised.
LAYOUTS: dict[str, Layout] = {
    module.LAYOUT.name: module.LAYOUT for module in (fcmae, official, minkowski, dense, timm, hf)
}
