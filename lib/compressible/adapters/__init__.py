"""Deep LoRA on one model: configuration, adapted layer, wrapping, compressed start, merging and files."""
