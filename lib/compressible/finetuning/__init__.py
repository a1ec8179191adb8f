"""S fine-tuning runs over one frozen model: seeds, rates, ranks and variants in one pass; one model's rates; LoRA."""
