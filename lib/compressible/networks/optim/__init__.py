"""Low-rank training of full matrices: GaLore and ReLoRA as optimisers and restarts for any network."""
