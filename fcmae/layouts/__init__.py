"""State-dict layouts of the same network: how other code names and shapes the tensors this toolkit trains."""
