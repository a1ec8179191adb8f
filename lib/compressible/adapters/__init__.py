"""Deep LoRA as a method of peft: configuration, adapted layer, model, compressed start, rates and export as LoRA."""

import peft  # noqa: F401  # first of all, since its import registers the method, which imports this room's files
