"""Update rules: PyTorch's own for groups with rates of their own; GaLore and ReLoRA, low-rank training of matrices."""
